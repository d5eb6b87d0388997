"""Reads manifests: the clips of a split with their labels, patients and source videos.

`clips.manifest_formats` reads the layouts that they may have; `clips.splits` finds train, val and
test and checks them together.
"""

import difflib
import errno
import functools
import hashlib
import json
import os
import re
import stat
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import NamedTuple

from clips.manifest_formats import (
    ManifestOptions,
    Record,
    is_number,
    read_records,
)
from utils.errors import UserError
from utils.run_dir import sanitize
from utils.tables import write_csv
from utils.text_table import list_some, shorten
from video.frame_folder import frame_files, is_frame_folder

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
    path: str | Path,
    data_root: str | Path | None = None,
    classes: Sequence[str] = CLASSES,
    options: ManifestOptions | None = None,
    split: str = "",
) -> list[ClipRow]:
    """Read one manifest, or the clips of a folder; see `clips.manifest_formats.read_records`.

    Clips are looked up below `data_root` (by default the manifest's own folder), then below its
    `clips/`; those of a folder in that folder. Backslashes count as separators if the file is found
    that way. A label is the name of a class, an alias of it, or its number in `classes`.

    Args:
        split: where the manifest has a column of splits, only the clips of this one are read
            (empty: all).

    Raises:
        UserError: with all problems of the file at once: no such file, an unknown layout, missing
            clips, unknown labels with the nearest known name, duplicate rows, no rows.
    """
    rows, problems = parse_manifest(Path(path), data_root, classes, options, split)
    raise_problems(problems)
    return rows


def write_manifest(
    path: Path, rows: Sequence[ClipRow], data_root: str | Path, classes: Sequence[str]
) -> None:
    """Write a manifest, atomically; its paths are relative to `data_root`."""
    table = [["path", "label", "patient", "video", "action", "fps"]]
    for row in rows:
        name = os.path.relpath(row.path, data_root).replace(os.sep, "/")
        table.append([name, classes[row.label], row.patient, row.video, row.action, row.fps])
    write_csv(path, table)


def read_paths(
    path: str | Path,
    data_root: str | Path | None = None,
    options: ManifestOptions | None = None,
) -> list[Path]:
    """The distinct clips of a manifest or folder, whatever their labels; see `read_manifest`.

    Raises:
        UserError: there is no such manifest, its layout is unknown, or clips are missing.
    """
    rows, problems = parse_manifest(Path(path), data_root, None, options)
    raise_problems(problems)
    return list(dict.fromkeys(row.path for row in rows))


def classes_of(records: Mapping[str, Sequence[Record]]) -> tuple[str, ...]:
    """The classes that the labels name: those of SLAM in their order, or else sorted by name.

    Spellings that differ only in case, spaces, `-` and `_` are one class, called by the most
    frequent one. Numbers are sorted by value.

    Args:
        records: the clips of each split; those of `train`, if there is one, have all classes.

    Raises:
        UserError: a label is found in validation or test clips alone.
    """
    labels = {split: Counter(r.label for r in rows if r.label) for split, rows in records.items()}
    total = sum(labels.values(), Counter())
    slam = {label: parse_label(label, CLASSES) for label in total}
    if all(number is not None and not is_number(label) for label, number in slam.items()):
        key = {label: CLASSES[number] for label, number in slam.items()}
        order = CLASSES.index
    else:
        key, order = {label: _normalize(label) for label in total}, _natural_order
    trained = {key[label] for label in labels.get("train", total)}
    unseen = {
        f"{label!r} ({split})"
        for split, counts in labels.items()
        for label in counts
        if key[label] not in trained
    }
    if unseen:
        raise UserError(
            "no training clip has the label " + list_some(sorted(unseen)) + ": correct it, give "
            "training clips of this class, or leave its clips out"
        )
    names = {}
    for label, _ in sorted(total.items(), key=lambda pair: (-pair[1], pair[0])):
        names.setdefault(key[label], key[label] if order == CLASSES.index else _plain(label))
    return tuple(names[k] for k in sorted(names, key=order))


def _plain(label: str) -> str:
    """A label as the name of a class; spreadsheets write `1.0` for 1."""
    label = label.strip()
    return label.removesuffix(".0") if is_number(label) else label


def _natural_order(key: str) -> tuple:
    """Where a normalized name is sorted: numbers by value, then names, `P2` before `P10`."""
    if is_number(key):
        return (0, float(key))
    return (1, *(int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", key)))


def clips_digest(rows: Sequence[ClipRow], data_root: str | Path) -> str:
    """A hash of the clips of a split, their order and labels, wherever the data root is."""
    digest = hashlib.sha256()
    for row in rows:
        # not `relative_to`: a clip may lie outside
        path = os.path.relpath(row.path, data_root).replace(os.sep, "/")
        digest.update(json.dumps([path, row.label]).encode())
    return digest.hexdigest()


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


def parse_manifest(
    manifest: Path,
    data_root: str | Path | None,
    classes: Sequence[str] | None,
    options: ManifestOptions | None = None,
    split: str = "",
) -> tuple[list[ClipRow], list[str]]:
    """The valid rows of one manifest, and the problems with the others.

    Without `classes` every label is valid, and every row gets number 0.
    """
    root = manifest if manifest.is_dir() else Path(data_root or manifest.parent)
    records, problems = read_records(manifest, options, labels=classes is not None)
    if split:
        records = [record for record in records if record.split in (None, split)]
    rows: list[ClipRow] = []
    missing, miscounted, unknown, seen = [], [], Counter(), Counter()
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
            fps = record.fps or (options.frame_rate if options else 0) or None
            rows.append(ClipRow(path, label, record.patient, record.video, record.action, fps))
            if record.frames and path.is_dir() and (n := len(frame_files(path))) != record.frames:
                miscounted.append(f"{record.path} ({n} of {record.frames})")

    hint = f"below {root} or {root / 'clips'}"
    problems += summarize(f"{manifest}: clips that do not exist ({hint})", missing)
    problems += summarize(
        f"{manifest}: unknown labels (the classes are {', '.join(classes or ())}; "
        "--classes sets others)",
        [_suggest(label, count, classes or ()) for label, count in unknown.items()],
    )
    if unknown.keys() & {str(len(classes or ()))} and all(map(is_number, spellings)):
        problems.append(
            f"{manifest}: numbers of classes count from 0. If its labels count from 1, leave "
            "--classes out (the numbers are then the names of the classes), or write names"
        )
    problems += summarize(f"{manifest}: folders with more or fewer images than listed", miscounted)
    repeated = [str(path) for path, count in seen.items() if count > 1]
    problems += summarize(f"{manifest}: the same clip in more than one row", repeated)
    if not rows and not problems:
        problems.append(f"{manifest}: lists no clip")
    return rows, problems


def resolve_path(name: str, root: Path) -> Path | None:
    """The file or folder of images that a path in a manifest names, below `root` or its clips/, or
    None."""
    for candidate in path_candidates(name, root):
        try:
            mode = os.stat(candidate).st_mode
        except OSError as error:
            if error.errno in _NO_SUCH_FILE:
                continue
            return None  # for example, a name too long
        except ValueError:  # a NUL in it
            return None
        if stat.S_ISREG(mode) or (stat.S_ISDIR(mode) and is_frame_folder(candidate)):
            return candidate
    return None


_NO_SUCH_FILE = (errno.ENOENT, errno.ENOTDIR, errno.EBADF, errno.ELOOP)  # as in Path.is_file


@functools.cache
def _clip_folders(root: PurePath) -> tuple[PurePath, PurePath]:
    return root, root / "clips"


def path_candidates(name: str, root: PurePath) -> list[PurePath]:
    """Where a path in a manifest may lead, in the order of preference.

    An absolute path stays as it is, on Windows with its drive or network share.
    """
    # Most names are the same in all spellings, and joining paths takes long.
    spellings = dict.fromkeys((name, name.strip(), name.strip().replace("\\", "/")))
    # Joined as text: as another kind of path, `C:/clips` would lose its slash on Windows.
    paths = [folder / text for text in spellings for folder in _clip_folders(root)]
    return list(dict.fromkeys(paths))


def _suggest(label: str, count: int, classes: Sequence[str]) -> str:
    matches = difflib.get_close_matches(label[:100], [*classes, *ALIASES], n=1)
    suggestion = f", did you mean {matches[0]!r}?" if matches else ""
    return f"{shorten(label)!r} ({count} row{'s' * (count > 1)}{suggestion})"


def summarize(problem: str, items: Sequence[str]) -> list[str]:
    """One line about all items with the same problem, which shows the first few of them."""
    if not items:
        return []
    shown = list_some((shorten(sanitize(item), 300) for item in items), separator="; ")
    return [f"{problem}: {len(items):,}: {shown}"]


def raise_problems(problems: Sequence[str]) -> None:
    """Raise a UserError with these lines, if there are any."""
    if problems:
        raise UserError("\n  ".join(["the manifests have problems:", *problems]))
