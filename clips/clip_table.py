"""Load all clips of manifests and folders into one DataFrame, whether or not their files exist.

prepare_data.py uses it; training reads manifests with manifest.py.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clips.manifest import CLASSES, parse_label, resolve_path
from clips.manifest_formats import (
    ManifestOptions,
    Record,
    is_number,
    parse_slam_filename,
    read_records,
)
from clips.splits import find_splits
from utils.errors import UserError

if TYPE_CHECKING:
    import pandas as pd

NO_LABEL = "(no label)"


def read_clips(
    sources: Sequence[str | Path], data_root: str = "", options: ManifestOptions | None = None
) -> "pd.DataFrame":
    """The clips of manifests and folders.

    Args:
        sources: manifests; or folders, see `clips.splits.find_splits` and `read_records`.
        data_root: folder that the paths in manifests are relative to (empty: the folder of each
            manifest); the clips of a folder of videos are looked up in that folder.
        options: how manifests are read.

    Returns:
        One row per clip with the columns manifest, line, path (as it is written), file (the Path,
        None if it does not exist), split (that of the row, else the name of the manifest), label
        (SLAM's aliases replaced), patient, video and action.

    Raises:
        UserError: a source cannot be read or lists no clip, or the pattern is not valid.
    """
    import pandas as pd  # not above: --help does without it

    roots = {path: Path(source) for source in sources for path in _manifests(Path(source), options)}
    manifests = list({path.resolve(): path for path in roots}.values())  # each one once
    if not manifests:
        raise UserError("name a manifest (a CSV of clips) or a folder")
    rows, problems = [], []
    for path, split in zip(manifests, _split_names(manifests), strict=True):
        records, new_problems = read_records(path, options, labels=False)
        problems += new_problems or ([] if records else [f"{path}: lists no clip"])
        root = roots[path] if path.is_dir() else Path(data_root or path.parent)
        for record in records:
            if path.is_dir():  # train/, val/ or test/ in the folder that was named
                name = (path.relative_to(root) / record.path).as_posix()
                record = record._replace(path=name)
            rows.append(_row(record, path, root, split))
    if problems:
        heading = ["the manifests have problems:"] if len(problems) > 1 else []
        raise UserError("\n  ".join([*heading, *problems]))
    return _replace_aliases(pd.DataFrame(rows).astype(object))


def splits_of(clips: "pd.DataFrame") -> list[str]:
    """The names of the splits: train, val, test, then others in the order of the table."""
    usual = ["train", "val", "test"]
    names = list(dict.fromkeys(clips["split"]))
    return sorted(names, key=lambda name: usual.index(name) if name in usual else len(usual))


def _row(record: Record, manifest: Path, root: Path, split: str) -> dict[str, Any]:
    """A row of the table. A missing label is taken from the file name: nothing is trained on it."""
    return {
        **record._asdict(),
        "manifest": str(manifest),
        "file": resolve_path(record.path, root),
        "split": record.split or split,
        "label": record.label or parse_slam_filename(record.path).get("label", NO_LABEL),
    }


def _replace_aliases(clips: "pd.DataFrame") -> "pd.DataFrame":
    """The table with one name per class, if all labels are classes of SLAM or their aliases."""
    numbers = {label: parse_label(label, CLASSES) for label in clips["label"].unique()}
    if any(number is None or is_number(label) for label, number in numbers.items()):
        return clips  # the classes of another data set keep their names
    return clips.assign(label=clips["label"].map(lambda label: CLASSES[numbers[label]]))


def _manifests(source: Path, options: ManifestOptions | None) -> list[Path]:
    """The manifests or folders of the splits in a source, or of all its clips."""
    if not source.is_dir():
        return [source]
    found = find_splits(source, options=options)
    paths = [found] if isinstance(found, Path) else found.values()
    return [path for path in paths if path.exists()]


def _split_names(manifests: Sequence[Path]) -> list[str]:
    """The name of each manifest's split: its file name, after as many folders as make it unique."""
    all_parts = [path.absolute().with_suffix("").parts for path in manifests]
    for length in range(1, max(map(len, all_parts)) + 1):
        names = ["/".join(parts[-length:]) for parts in all_parts]
        if len(set(names)) == len(names):
            break
    return names
