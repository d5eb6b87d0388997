"""Train, val and test: where they are, and what must be checked across them before training."""

import os
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from pathlib import Path

from clips.manifest import CLASSES, ClipRow, parse_manifest, raise_problems, summarize
from clips.manifest_formats import SPLIT_NAMES, ManifestOptions, read_records
from utils.errors import ResultWarning, UserError
from utils.tables import read_table
from utils.text_table import list_some, shorten
from video.files import is_video

SPLITS = ("train", "val", "test")


def find_splits(
    root: Path,
    names: Mapping[str, str] | None = None,
    options: ManifestOptions | None = None,
) -> dict[str, Path] | Path:
    """The manifests or folders of the splits of a data set.

    These are, in this order: the named manifests below `root`, or as paths; folders called train,
    val and test (or another usual name of these splits) in `root`; the only table of labelled
    clips in `root`; or `root` itself, whose clips then have no splits yet.

    Args:
        names: name of the manifest per split (default: train.csv, val.csv and test.csv).
        options: how the table is read.

    Returns:
        The manifest or folder per split, whether or not it exists; or the table or folder of all
        clips.
    """
    usual = {split: f"{split}.csv" for split in SPLITS}
    names = names or usual
    paths = {}
    for split, name in names.items():
        below = root / name
        paths[split] = Path(name) if not below.exists() and Path(name).exists() else below
    if names != usual or any(path.is_file() for path in paths.values()) or not root.is_dir():
        return paths
    entries = sorted(root.iterdir())
    folders = {SPLIT_NAMES.get(path.name.lower()): path for path in entries if path.is_dir()}
    if "train" in folders:
        return {split: folders.get(split, root / split) for split in SPLITS}
    tables = [
        path for path in entries if path.suffix.lower() in _TABLES and _lists_clips(path, options)
    ]
    return tables[0] if len(tables) == 1 else root


_TABLES = (".csv", ".tsv", ".xlsx")

BAD_FILES = ["path", "reason"]
"""columns of the list of bad files that prepare_data.py writes"""


def _lists_clips(path: Path, options: ManifestOptions | None) -> bool:
    """Whether a table lists clips; that it can be understood is not asked for.

    The list of bad files that prepare_data.py writes is none.
    """
    if not path.is_file():
        return False
    if options and options != ManifestOptions(
        patient_pattern=options.patient_pattern, frame_rate=options.frame_rate
    ):
        return True  # columns are named
    try:
        rows = [row.cells for row in read_table(path).rows]
    except UserError:  # the reader will say what is wrong with it
        return True
    if not rows or rows[0] == BAD_FILES:
        return False
    return any(is_video(cell) for cells in rows for cell in cells) or any(
        record.label for record in read_records(path, options)[0]
    )


def read_splits(
    manifests: Mapping[str, str | Path],
    data_root: str | Path | None = None,
    classes: Sequence[str] = CLASSES,
    options: ManifestOptions | None = None,
    fitted: Sequence[str] = ("train",),
) -> dict[str, list[ClipRow]]:
    """Read the manifests of several splits and check them together; see also `patient_overlap`.

    Args:
        fitted: the splits whose clips a model is fitted to.

    Raises:
        UserError: in one message all problems of all manifests, files that are in two splits, and
            classes without a training clip.
    """
    splits, problems = {}, []
    for name, path in manifests.items():
        splits[name], new_problems = parse_manifest(Path(path), data_root, classes, options)
        problems += new_problems
    return _checked(splits, problems, classes, fitted)


def _checked(
    splits: dict[str, list[ClipRow]],
    problems: list[str],
    classes: Sequence[str],
    fitted: Sequence[str],
) -> dict[str, list[ClipRow]]:
    """The splits, if there are no problems with them."""
    complete = not problems  # otherwise rows are left out, and classes may seem to be missing
    problems = problems + shared_files(splits)
    if complete and "train" in splits:
        rows = [row for split in fitted for row in splits.get(split, ())]
        problems += missing_classes(rows, classes)
    raise_problems(problems)
    return splits


def read_table_of_splits(
    source: Path,
    data_root: str | Path | None,
    classes: Sequence[str],
    options: ManifestOptions | None,
    divide: Callable[[Sequence[ClipRow]], Sequence[str]],
    fitted: Sequence[str] = ("train",),
) -> dict[str, list[ClipRow]]:
    """The splits of a table with a column of splits, or of clips without splits.

    Args:
        source: the table, or a folder of clips.
        divide: gives the split of each clip where the table has no column of splits.
        fitted: see `read_splits`.

    Raises:
        UserError: in one message all problems of the clips, of the splits, and of their names.
    """
    records, _ = read_records(source, options)
    rows, problems = parse_manifest(source, data_root, classes, options)
    names = [record.split for record in records]
    raise_problems(problems)
    if not any(names):
        names = list(divide(rows))
    unknown = Counter(name or "(none)" for name in names if name not in SPLITS)
    missing = [split for split in SPLITS if split not in names]
    if unknown or missing:
        found = list_some(repr(shorten(name)) for name in sorted({str(n) for n in names}))
        raise UserError(
            f"{source}: its splits are {found}: they must be train, val and test, each with clips "
            "(python prepare_data.py split makes new ones)"
        )
    splits = {s: [row for row, n in zip(rows, names, strict=True) if n == s] for s in SPLITS}
    return _checked(splits, [], classes, fitted)


def shared_files(splits: Mapping[str, Sequence[ClipRow]]) -> list[str]:
    """A problem, as a list of one line, if any file is in two splits."""
    splits_of = defaultdict(set)
    for name, rows in splits.items():
        for row in rows:
            splits_of[os.path.realpath(row.path)].add(name)
    shared = [
        f"{path} ({', '.join(sorted(names))})"
        for path, names in splits_of.items()
        if len(names) > 1
    ]
    return summarize("the same file in two splits (keep it in one)", shared)


def missing_classes(train: Sequence[ClipRow], classes: Sequence[str]) -> list[str]:
    """A problem, as a list of one line, if a class has no training clip."""
    present = {row.label for row in train}
    missing = [name for label, name in enumerate(classes) if label not in present]
    return summarize("classes with no training clip (leave them out of --classes)", missing)


def patient_overlap(
    splits: Mapping[str, Sequence[ClipRow]], compared: str = ""
) -> list[ResultWarning]:
    """Warnings that splits share patients, or that this is not known, without the patients' names.

    A model that was trained on a patient may recognise this patient in the test. SLAM's official
    split shares patients.

    Args:
        compared: compare this split with each of the others, instead of all with each other.
    """
    patients = {name: {r.patient for r in rows if r.patient} for name, rows in splits.items()}
    warnings: list[ResultWarning] = []
    for first, second in combinations(splits, 2):
        if compared not in ("", first, second):
            continue
        common = patients[first] & patients[second]
        if common:
            clips = sum(row.patient in common for row in splits[second])
            text = (
                f"{len(common)} of {len(patients[second])} patients of {second} are also in "
                f"{first} ({clips} of {len(splits[second])} {second} clips): {second} numbers will "
                "partly measure memory of these patients"
            )
            warnings.append({"kind": "leakage", "text": text})
    unknown = [
        f"{count} of {len(rows)} clips of {name}"
        for name, rows in splits.items()
        if (count := sum(not row.patient for row in rows))
    ]
    if unknown and len(splits) > 1:
        text = (
            f"the patients of {', '.join(unknown)} are unknown and were not compared: the splits "
            "may share patients (add a column `patient`, or give --patient-pattern)"
        )
        warnings.append({"kind": "other", "text": text})
    return warnings
