"""Reads manifests: the clips of a split with their labels, patients and source videos.

`read_manifest` understands three layouts:

- a header with `path` and `label`, and when known `patient`, `video` and `action`;
- SLAM and LapSurg-230K: column 1 is the path below `clips/`, column 2 the name of the label; the
  file name holds patient and video (`Clip_P058_V001_C1_UseClipper_part6.mp4`);
- lines of `path label` without a header (separated by space, tab or comma), as in many video data
  sets; the label is often a number.

`read_splits` checks train, val and test together before anything is trained on them.
"""

import difflib
import hashlib
import json
import os
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path, PurePath
from typing import NamedTuple

from clips.manifest_formats import read_records
from utils.errors import ResultWarning, UserError
from utils.run_dir import sanitize
from utils.text_table import list_some, shorten
from video.frame_folder import is_frame_folder

CLASSES = (
    "AbdominalEntry",
    "UseClipper",
    "HookCut",
    "Suturing",
    "PanoView",
    "LocPanoView",
    "Suction",
)

# Labels of clips and segments that are not classes.
UNCERTAIN = "uncertain"
"""the decision about a clip whose confidence is below the threshold"""
UNREADABLE = "unreadable"
"""the video could not be decoded there"""
OUT_OF_BODY = "out_of_body"
"""according to the user's detector (predict.py --out-of-body)"""
NON_CLASS_LABELS = (UNCERTAIN, UNREADABLE, OUT_OF_BODY)

RESERVED_NAMES = (*NON_CLASS_LABELS, "time", "path")
"""names that no class may have; the last two are columns of the tables of predictions"""

# Other names of the classes in SLAM's CSVs, its file names, its paper and its successor LapSurg.
ALIASES = {
    "Needle": "Suturing",
    "NeedleIn": "Suturing",
    "NeedleOut": "Suturing",
    "UseClip": "UseClipper",
    "PanoramicView": "PanoView",
    "LocalPanoramicView": "LocPanoView",
}


class ClipRow(NamedTuple):
    """One clip of a manifest. `label` is the number of its class; later fields may be unknown."""

    path: Path
    label: int
    patient: str | None = None
    video: str | None = None
    action: str | None = None
    """the source action that the clip was cut from"""
    fps: float | None = None
    """frames per second of a folder of images, where known"""


def get_num_classes(classes: Sequence[str] = CLASSES) -> int:
    """The number of classes: 7 unless other classes are given."""
    return len(classes)


def read_manifest(
    path: str | Path, data_root: str | Path | None = None, classes: Sequence[str] = CLASSES
) -> list[ClipRow]:
    """Read one manifest in any of the three layouts.

    Clips are looked up below `data_root` (by default the manifest's own folder), then below its
    `clips/`. Backslashes count as separators if the file is found that way. A label is the name of
    a class, an alias of it, or its number in `classes`.

    Raises:
        UserError: with all problems of the file at once: no such file, an unknown layout, missing
            clips, unknown labels with the nearest known name, duplicate rows, no rows.
    """
    rows, problems = _parse(Path(path), data_root, classes)
    _raise(problems)
    return rows


def read_splits(
    manifests: Mapping[str, str | Path],
    data_root: str | Path | None = None,
    classes: Sequence[str] = CLASSES,
) -> dict[str, list[ClipRow]]:
    """Read the manifests of several splits and check them together; see also `patient_overlap`.

    Raises:
        UserError: in one message all problems of all manifests, files that are in two splits, and
            classes without a training clip.
    """
    splits, problems = {}, []
    for name, path in manifests.items():
        splits[name], new_problems = _parse(Path(path), data_root, classes)
        problems += new_problems
    complete = not problems  # otherwise rows are left out, and classes may seem to be missing
    problems += shared_files(splits)
    if complete and "train" in splits:
        problems += missing_classes(splits["train"], classes)
    _raise(problems)
    return splits


def read_paths(path: str | Path, data_root: str | Path | None = None) -> list[Path]:
    """The distinct clips of a manifest, whatever their labels, looked up as in `read_manifest`.

    Raises:
        UserError: there is no such manifest, its layout is unknown, or clips are missing.
    """
    rows, problems = _parse(Path(path), data_root, None)
    _raise(problems)
    return list(dict.fromkeys(row.path for row in rows))


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
    return _summary("the same file in two splits (keep it in one)", shared)


def missing_classes(train: Sequence[ClipRow], classes: Sequence[str]) -> list[str]:
    """A problem, as a list of one line, if a class has no training clip."""
    present = {row.label for row in train}
    missing = [name for label, name in enumerate(classes) if label not in present]
    return _summary("classes with no training clip (leave them out of --classes)", missing)


def clips_digest(rows: Sequence[ClipRow], data_root: str | Path) -> str:
    """A hash of the clips of a split, their order and labels, wherever the data root is."""
    digest = hashlib.sha256()
    for row in rows:
        # not `relative_to`: a clip may lie outside
        path = os.path.relpath(row.path, data_root).replace(os.sep, "/")
        digest.update(json.dumps([path, row.label]).encode())
    return digest.hexdigest()


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
            "may share patients (add a column `patient` to the manifests)"
        )
        warnings.append({"kind": "other", "text": text})
    return warnings


def parse_label(label: str, classes: Sequence[str]) -> int | None:
    """The number of the class that a label names, or None.

    The label is compared with the exact names, then with names without case, spaces, `-` and `_`,
    then with aliases. Names that are numbers are compared by value: spreadsheets make `1.0` or `1`
    of a `01`. Only where no class is a number, a whole number (also `1.0`) is an index into
    `classes`.
    """
    label = label.strip()
    if label in classes:
        return list(classes).index(label)
    numbers = {_normalize(name): number for number, name in enumerate(classes)}
    aliases = {_normalize(alias): _normalize(name) for alias, name in ALIASES.items()}
    key = _normalize(label)
    if key in numbers:
        return numbers[key]
    if aliases.get(key) in numbers:
        return numbers[aliases[key]]
    if is_number(label) and not any(map(is_number, classes)):
        index = float(label)
        return int(index) if index.is_integer() and 0 <= index < len(classes) else None
    return None


def is_number(name: str) -> bool:
    """Whether a label or the name of a class is a number, such as `2`, `-1` or `1.0`."""
    return bool(re.fullmatch(r"\s*[+-]?\d+(\.\d+)?\s*", name, re.ASCII))


def class_problems(classes: Sequence[str]) -> list[str]:
    """A line for each name that no class can have, and for names that labels cannot tell apart."""
    problems = []
    for name in classes:
        if not name.strip():
            problems.append(f"classes: {name!r} is an empty name")
        elif name != name.strip():
            problems.append(f"classes: {name!r} begins or ends with a space: leave it out")
        elif any(unicodedata.category(character) in _NOT_TEXT for character in name):
            problems.append(f"classes: {name!r} holds a control character or a line break")
        elif name in RESERVED_NAMES:
            problems.append(
                f"classes: no class may be called {name!r}, which is reserved (so are "
                f"{', '.join(other for other in RESERVED_NAMES if other != name)})"
            )
    spellings = defaultdict(list)
    for name in classes:
        spellings[_normalize(name)].append(name)
    for names in spellings.values():
        if len(names) > len(set(names)):
            problems.append(f"classes: a name occurs twice: {names[0]!r}")
        elif len(names) > 1:
            problems.append(
                f"classes: {' and '.join(map(repr, names))} differ only in case, spaces, '-', '_' "
                "or the way a number is written, and labels are read without looking at that"
            )
    return problems


_NOT_TEXT = {"Cc", "Cs", "Zl", "Zp"}  # control characters, bytes that are not UTF-8, line breaks


def _normalize(name: str) -> str:
    if is_number(name):
        return repr(float(name))
    return re.sub(r"[\s_-]", "", unicodedata.normalize("NFC", name)).casefold()


def _parse(
    manifest: Path, data_root: str | Path | None, classes: Sequence[str] | None
) -> tuple[list[ClipRow], list[str]]:
    """The valid rows of one manifest, and the problems with the others.

    Without `classes` every label is valid, and every row gets number 0.
    """
    root = Path(data_root) if data_root else manifest.parent
    records, problems = read_records(manifest)
    rows: list[ClipRow] = []
    missing, unknown, seen = [], Counter(), Counter()
    spellings = {record.label or "" for record in records}
    numbers = {s: 0 if classes is None else parse_label(s, classes) for s in spellings}
    for record in records:
        path = resolve_path(record.path, root)
        label = numbers[record.label or ""]
        if path is None:
            missing.append(record.path)
        elif label is None:
            unknown[record.label or "(none)"] += 1
        else:
            seen[os.path.realpath(path)] += 1
            rows.append(ClipRow(path, label, record.patient, record.video, record.action))

    hint = f"below {root} or {root / 'clips'}"
    problems += _summary(f"{manifest}: clips that do not exist ({hint})", missing)
    problems += _summary(
        f"{manifest}: unknown labels (the classes are {', '.join(classes or ())}; "
        "--classes sets others)",
        [_suggest(label, count, classes or ()) for label, count in unknown.items()],
    )
    repeated = [str(path) for path, count in seen.items() if count > 1]
    problems += _summary(f"{manifest}: the same clip in more than one row", repeated)
    if not rows and not problems:
        problems.append(f"{manifest}: lists no clip")
    return rows, problems


def resolve_path(name: str, root: Path) -> Path | None:
    """The file or folder of images that a path in a manifest names, below `root` or its clips/, or
    None."""
    for candidate in path_candidates(name, root):
        try:
            if candidate.is_file() or is_frame_folder(candidate):
                return candidate
        except (OSError, ValueError):  # a name too long, or with a NUL in it
            return None
    return None


def path_candidates(name: str, root: PurePath) -> list[PurePath]:
    """Where a path in a manifest may lead, in the order of preference.

    An absolute path stays as it is, on Windows with its drive or network share.
    """
    spellings = (name, name.strip(), name.strip().replace("\\", "/"))
    # Joined as text: as another kind of path, `C:/clips` would lose its slash on Windows.
    paths = [folder / text for text in spellings for folder in (root, root / "clips")]
    return list(dict.fromkeys(paths))


def _suggest(label: str, count: int, classes: Sequence[str]) -> str:
    matches = difflib.get_close_matches(label[:100], [*classes, *ALIASES], n=1)
    suggestion = f", did you mean {matches[0]!r}?" if matches else ""
    return f"{shorten(label)!r} ({count} row{'s' * (count > 1)}{suggestion})"


def _summary(problem: str, items: Sequence[str]) -> list[str]:
    """One line about all items with the same problem, which shows the first few of them."""
    if not items:
        return []
    shown = list_some((shorten(sanitize(item), 300) for item in items), separator="; ")
    return [f"{problem}: {len(items):,}: {shown}"]


def _raise(problems: Sequence[str]) -> None:
    if problems:
        raise UserError("\n  ".join(["the manifests have problems:", *problems]))
