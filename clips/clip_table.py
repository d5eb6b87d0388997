"""Load all clips of manifests and folders into one DataFrame, whether or not their files exist.

prepare_data.py uses it; training reads manifests with manifest.py.
"""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clips.manifest import CLASSES, is_number, parse_label, resolve_path
from clips.manifest_formats import Record, parse_slam_filename, read_records
from utils.errors import UserError
from video.files import find_videos, is_video, no_video

if TYPE_CHECKING:
    import pandas as pd

SPLIT_FILES = ("train.csv", "val.csv", "test.csv")

NO_LABEL = "(no label)"


def read_clips(
    sources: Sequence[str | Path], data_root: str = "", patient_pattern: str = ""
) -> "pd.DataFrame":
    """The clips of manifests and folders.

    Args:
        sources: manifests; folders that hold train.csv, val.csv or test.csv; or folders of videos,
            whose labels are those in SLAM's file names, or else the names of the folders.
        data_root: folder that the paths in manifests are relative to (empty: the folder of each
            manifest); the clips of a folder of videos are looked up in that folder.
        patient_pattern: regular expression that is searched in each path as it is written; the
            patient is its first group, or the whole match if it has no group.

    Returns:
        One row per clip with the columns manifest, line, path (as it is written), file (the Path,
        None if it does not exist), split (that of the row, else the name of the manifest), label
        (SLAM's aliases replaced), patient, video and action.

    Raises:
        UserError: a source cannot be read or lists no clip, or the pattern is not valid.
    """
    import pandas as pd  # not above: --help does without it

    manifests = [path for source in sources for path in _manifests(Path(source))]
    manifests = list({path.resolve(): path for path in manifests}.values())  # each one once
    if not manifests:
        raise UserError("name a manifest (a CSV of clips) or a folder")
    find_patient = patient_finder(patient_pattern)
    rows, problems = [], []
    for path, split in zip(manifests, _split_names(manifests), strict=True):
        records, new_problems = _records(path)
        problems += new_problems or ([] if records else [f"{path}: lists no clip"])
        root = path if path.is_dir() else Path(data_root or path.parent)
        for record in records:
            row = _row(record, path, root, split)
            rows.append(row | {"patient": find_patient(record.path) or row["patient"]})
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


def _manifests(source: Path) -> list[Path]:
    """The manifests in a source; the source itself if it is a manifest or a folder of videos."""
    if not source.is_dir():
        return [source]
    return [source / name for name in SPLIT_FILES if (source / name).is_file()] or [source]


def _records(source: Path) -> tuple[list[Record], list[str]]:
    """The rows of a manifest or the videos in a folder, and the problems with it."""
    if source.is_dir():
        return _folder_records(source)
    if source.is_file() and is_video(source.name):
        return [], [f"{source}: is a video: name the folder that it lies in, or a manifest"]
    return read_records(source)


def _folder_records(folder: Path) -> tuple[list[Record], list[str]]:
    """The videos in a folder as rows of a manifest, and the problems with it."""
    found = find_videos(folder)
    if not found.paths:
        return [], [no_video(folder, found, "neither train.csv nor any video")]
    if found.passed_over:
        print(f"{folder}: {found.passed_over}")
    records, classes = [], set()
    for number, video in enumerate(found.paths, 1):
        path = video.relative_to(folder).as_posix()
        if not path.isprintable():  # a CSV cannot hold control characters and invalid UTF-8
            return [], [f"{folder}: rename {path!r}: a manifest cannot hold that name"]
        fields = parse_slam_filename(path)
        if "label" not in fields and video.parent != folder:
            fields["label"] = video.parent.name
            classes.add(video.parent)
        records.append(Record(number, path, **fields))
    return records, [
        f"{again} and {first} are one folder, but two classes: take one of them out"
        for again, first in found.twice
        if first in classes and first not in again.parents and again.name != first.name
    ]


def patient_finder(pattern: str) -> Callable[[str], str | None]:
    """A function that returns the patient in a path, or None."""
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise UserError(f"patient_pattern {pattern!r} is no regular expression: {error}") from None

    def find(path: str) -> str | None:
        match = compiled.search(path) if pattern else None
        return match and match[1 if compiled.groups else 0]

    return find


def _split_names(manifests: Sequence[Path]) -> list[str]:
    """The name of each manifest's split: its file name, after as many folders as make it unique."""
    all_parts = [path.absolute().with_suffix("").parts for path in manifests]
    for length in range(1, max(map(len, all_parts)) + 1):
        names = ["/".join(parts[-length:]) for parts in all_parts]
        if len(set(names)) == len(names):
            break
    return names
