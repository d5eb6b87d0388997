"""Manifests: which clips there are, what they show and whom they come from.

`read_manifest` understands three layouts:

- ours: a header with `path` and `label`, and when known `patient` and `video`;
- SLAM and LapSurg-230K: column 1 the path below `clips/`, column 2 the label's name; patient and
  video stand in the file name (`Clip_P058_V001_C1_UseClipper_part6.mp4`);
- the field's headerless `path label` (space, tab or comma), the label often a number.

`read_splits` looks at train, val and test together before anything is trained on them.
"""

import difflib
import os
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from clips.manifest_formats import read_records
from utils.errors import UserError

CLASSES = (
    "AbdominalEntry",
    "UseClipper",
    "HookCut",
    "Suturing",
    "PanoView",
    "LocPanoView",
    "Suction",
)

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
    """One clip of a manifest. `label` is the class's number; what follows it may be unknown."""

    path: Path
    label: int
    patient: str | None = None
    video: str | None = None
    action: str | None = None
    """the source action that the clip is a part of"""


def get_num_classes(classes: Sequence[str] = CLASSES) -> int:
    """The number of classes: 7, unless another list is given."""
    return len(classes)


def read_manifest(
    path: str | Path, data_root: str | Path | None = None, classes: Sequence[str] = CLASSES
) -> list[ClipRow]:
    """Read one manifest in any of the three layouts.

    Clip paths are looked up below `data_root` (by default the manifest's own folder), then below
    its `clips/`; backslashes are taken as separators where that finds the file. A label is the name
    of a class, an alias of it, or its number in `classes`.

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
        UserError: every problem of every manifest, of files shared between splits and of classes
            that have no training clip, in one message.
    """
    splits, problems = {}, []
    for name, path in manifests.items():
        splits[name], found = _parse(Path(path), data_root, classes)
        problems += found
    whole = not problems  # else rows are left out, and a class may look absent that is not
    problems += shared_files(splits)
    if whole and "train" in splits:
        problems += absent_classes(splits["train"], classes)
    _raise(problems)
    return splits


def read_paths(path: str | Path, data_root: str | Path | None = None) -> list[Path]:
    """The clips of a manifest whatever their labels, each once, looked up as in `read_manifest`.

    Raises:
        UserError: no such manifest, an unknown layout, or missing clips.
    """
    rows, problems = _parse(Path(path), data_root, None)
    _raise(problems)
    return list(dict.fromkeys(row.path for row in rows))


def shared_files(splits: Mapping[str, Sequence[ClipRow]]) -> list[str]:
    """A problem if any file is in two splits."""
    where = defaultdict(set)
    for name, rows in splits.items():
        for row in rows:
            where[os.path.realpath(row.path)].add(name)
    shared = [f"{path} ({', '.join(sorted(s))})" for path, s in where.items() if len(s) > 1]
    return _summary("the same file in two splits (keep it in one)", shared)


def absent_classes(train: Sequence[ClipRow], classes: Sequence[str]) -> list[str]:
    """A problem if a class has no clip to learn from."""
    present = {row.label for row in train}
    absent = [name for number, name in enumerate(classes) if number not in present]
    return _summary("classes with no training clip (leave them out of --classes)", absent)


def patient_overlap(splits: Mapping[str, Sequence[ClipRow]]) -> list[str]:
    """Warnings that splits share patients, with counts but without naming anybody.

    A model that has seen the patient in training is tested on its memory; SLAM's official split is
    of this kind.
    """
    patients = {name: {r.patient for r in rows if r.patient} for name, rows in splits.items()}
    warnings = []
    names = list(splits)
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            common = patients[first] & patients[second]
            if common:
                clips = sum(row.patient in common for row in splits[second])
                warnings.append(
                    f"LEAKAGE: {len(common)} of {len(patients[second])} patients of {second} are "
                    f"also in {first} ({clips} of {len(splits[second])} {second} clips): "
                    f"{second} numbers will partly measure memory of these patients"
                )
    return warnings


def match_class(label: str, classes: Sequence[str]) -> int | None:
    """The number of the class that a label names, or None.

    Exact names first, then spelling without case, spaces, `-` and `_`, then aliases, then numbers.
    """
    label = label.strip()
    if label in classes:
        return list(classes).index(label)
    plain = {_plain(name): number for number, name in enumerate(classes)}
    aliases = {_plain(other): _plain(name) for other, name in ALIASES.items()}
    key = _plain(label)
    if key in plain:
        return plain[key]
    if aliases.get(key) in plain:
        return plain[aliases[key]]
    if label.isascii() and label.isdigit() and int(label) < len(classes):
        return int(label)
    return None


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]", "", name).casefold()


def _parse(
    manifest: Path, data_root: str | Path | None, classes: Sequence[str] | None
) -> tuple[list[ClipRow], list[str]]:
    """The readable rows of one manifest and the problems with the others.

    Without `classes` any label will do, and every row gets number 0.
    """
    root = Path(data_root) if data_root else manifest.parent
    records, problems = read_records(manifest)
    rows: list[ClipRow] = []
    missing, unknown, seen = [], Counter(), Counter()
    for record in records:
        path = locate(record.path, root)
        label = 0 if classes is None else match_class(record.label or "", classes)
        if path is None:
            missing.append(record.path)
        elif label is None:
            unknown[record.label or "(none)"] += 1
        else:
            seen[os.path.realpath(path)] += 1
            rows.append(ClipRow(path, label, record.patient, record.video, record.action))

    hint = f"below {root} or {root / 'clips'}"
    problems += _summary(f"{manifest}: clips that are not there ({hint})", missing)
    problems += _summary(
        f"{manifest}: unknown labels (the classes are {', '.join(classes or ())}; "
        "--classes sets others)",
        [_suggest(label, count, classes or ()) for label, count in unknown.items()],
    )
    twice = [str(path) for path, count in seen.items() if count > 1]
    problems += _summary(f"{manifest}: the same clip in more than one row", twice)
    if not rows and not problems:
        problems.append(f"{manifest}: lists no clip")
    return rows, problems


def locate(name: str, root: Path) -> Path | None:
    """The file that a manifest's path means, below the data's root or its clips/, or None."""
    for spelling in dict.fromkeys((name, name.replace("\\", "/"))):
        relative = PurePosixPath(spelling)
        for candidate in (root / relative, root / "clips" / relative):
            try:
                if candidate.is_file():
                    return candidate
            except (OSError, ValueError):  # a name too long, or with a NUL in it
                return None
    return None


def _suggest(label: str, count: int, classes: Sequence[str]) -> str:
    near = difflib.get_close_matches(label, [*classes, *ALIASES], n=1)
    meant = f", did you mean {near[0]!r}?" if near else ""
    return f"{label!r} ({count} row{'s' * (count > 1)}{meant})"


def _summary(what: str, items: Sequence[str], most: int = 5) -> list[str]:
    """One line for any number of equal problems, the first few shown."""
    if not items:
        return []
    more = f" and {len(items) - most:,} more" if len(items) > most else ""
    return [f"{what}: {len(items):,}: {'; '.join(map(str, items[:most]))}{more}"]


def _raise(problems: Sequence[str]) -> None:
    if problems:
        raise UserError("\n  ".join(["the manifests need mending:", *problems]))


UNCERTAIN = "uncertain"  # the answer below the threshold
