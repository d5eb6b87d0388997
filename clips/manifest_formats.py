"""Reads the clips that a manifest lists or a folder holds, as text (layouts: docs/data.md)."""

import functools
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from utils.errors import UserError, describe_os_error
from utils.tables import Table, column_name, parse_number, read_table
from utils.text_table import list_some, shorten
from video.files import find_videos, is_video, no_video

_SLAM_NAME = re.compile(
    r"Clip_P(?P<patient>[^_]+)_V(?P<video>[^_]+)_C(?P<action>[^_]+)_(?P<label>[^_.]+)"
)

# Names of columns, without case, spaces and hyphens. The first group of which a table has a column
# counts. `phase` may hold splits and `action` the source action, see _find_columns.
_PATHS = (
    ("path", "loop_path"),  # the second is the name in SLAM's looped_clips.csv
    ("file_path", "filepath", "video_path", "clip_path", "frames_path", "frame_path"),
    ("file", "file_name", "filename", "video_file", "clip", "clip_file", "clip_name", "folder"),
    ("video",),  # if it holds files; otherwise the name of the source video
    ("video_name", "name"),
)
_LABELS = (
    ("label", "label_name"),
    ("class", "class_name", "category", "target", "class_id", "label_id"),
    ("action", "action_name", "action_label", "activity", "phase", "phase_name", "step"),
)
_PATIENTS = ("patient", "patient_id", "subject", "subject_id", "case", "case_id")
_VIDEOS = ("video", "video_id", "source_video", "recording", "recording_id")
_ACTIONS = ("action", "action_id", "source_action")
_SPLIT_COLUMNS = ("split", "subset", "partition", "set", "fold")
_RATES = ("fps", "frame_rate", "framerate")

# Names of splits. A column called `split` may hold any names. A column called `phase` is a column
# of splits only if it holds nothing but these; otherwise it holds phases of the operation.
SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
    "testing": "test",
}

# A line of the lists of frame folders that TSM and mmaction2 use: folder, number of frames, label.
_FRAME_LIST = re.compile(r"(?P<path>.*[^\s,;])[\s,;]+(?P<frames>\d+)[\s,;]+(?P<label>\d+)")

_SINGLE_LABEL = (
    "clips with several labels, or a column per label: here a clip has one class. Make one column "
    "of labels: of the main label, of one label (present or absent), or of each combination"
)

_FLAGS = "--path-column, --label-column, --patient-column, --split-column"


@dataclass(frozen=True, kw_only=True)
class ManifestOptions:
    """How manifests are read: the columns that are not recognised by their names."""

    path_column: str = ""
    """manifests: the column of the paths (empty: recognised by its name, see docs/data.md)"""
    label_column: str = ""
    """manifests: the column of the labels (empty: recognised by its name)"""
    patient_column: str = ""
    """manifests: the column of the patients (empty: recognised by its name)"""
    split_column: str = ""
    """manifests: the column of the splits (empty: recognised by its name)"""
    patient_pattern: str = ""
    """regular expression that finds the patient in a path, e.g. "(VID[0-9]+)_" """
    frame_rate: float = 0.0
    """images per second of clips that are folders of images, where their manifest has no column fps
    (0: unknown)"""

    @classmethod
    def of(cls, config: Any) -> "ManifestOptions":
        """The options among the settings of a script."""
        return cls(**{name: getattr(config, name) for name in cls.__dataclass_fields__})


class Record(NamedTuple):
    """A row of a manifest, as text: no file and no label has been looked up yet."""

    line: int
    path: str
    """as it is written, with the spaces around it: a file name may begin with one"""
    label: str | None = None
    patient: str | None = None
    video: str | None = None
    action: str | None = None
    """the source action; SLAM cuts one long action into several clips"""
    split: str | None = None
    """train, val, test, or another name in the manifest's column of splits"""
    frames: int | None = None
    """number of images in the folder, in a list of frame folders"""
    fps: float | None = None
    """frames per second of a folder of images"""


def parse_slam_filename(path: str) -> dict[str, str]:
    """Patient, video, action and label in a file name of SLAM; empty for other file names.

    SLAM numbers videos per patient and actions per video. So their names here begin with the name
    of the patient.
    """
    name = path.replace("\\", "/").rstrip("/").rpartition("/")[2]
    match = _SLAM_NAME.search(name)
    if not match:
        return {}
    video = f"{match['patient']}_V{match['video']}"
    return {
        "patient": match["patient"],
        "video": video,
        "action": f"{video}_C{match['action']}",
        "label": match["label"],
    }


def read_records(
    source: Path, options: ManifestOptions | None = None, labels: bool = True
) -> tuple[list[Record], list[str]]:
    """The rows of a manifest in any layout, or the clips in a folder, and the problems with them.

    A row without patient, video or action gets those of its file name. The label of a row is not
    taken from the file name (see clip_table.py for the one exception); that of a clip in a folder
    is the one in SLAM's file name, or else the name of the folder that it lies in.

    Args:
        labels: whether a manifest without labels is a problem.

    Raises:
        UserError: the pattern of the patients is no regular expression.
    """
    options = options or ManifestOptions()
    find_patient = patient_finder(options.patient_pattern)
    if source.is_dir():
        records, problems = _folder_records(source)
    elif source.is_file() and is_video(source.name):
        problem = "is a video: name the folder that it lies in, or a manifest"
        records, problems = [], [f"{source}: {problem}"]
    else:
        records, problems = _table_records(source, options, labels)
    if options.patient_pattern:
        found = ((record, find_patient(record.path)) for record in records)
        records = [r._replace(patient=patient) if patient else r for r, patient in found]
    return records, problems


def _table_records(
    manifest: Path, options: ManifestOptions, labels: bool
) -> tuple[list[Record], list[str]]:
    records: list[Record] = []
    try:
        table = read_table(manifest)
        for line, cells in _rows(table, options):
            records.append(_record(line, cells))
        if labels and records and not any(record.label for record in records):
            if _is_one_hot(table):
                raise UserError(f"{manifest}: {_SINGLE_LABEL}")
            raise _no_column(table, "labels")
    except FileNotFoundError:
        wanted = "manifest (a CSV with the columns path,label)"
        if not manifest.suffix:
            wanted = "folder of clips (train, val and test need one each, with clips in it)"
        return [], [f"{manifest}: no such {wanted}"]
    except OSError as error:
        return [], [describe_os_error(error, manifest)]
    except UserError as error:
        return records, [str(error)]
    return records, _several_labels(manifest, records) if labels else []


def _folder_records(folder: Path) -> tuple[list[Record], list[str]]:
    """The clips in a folder as rows of a manifest, and the problems with it."""
    found = find_videos(folder)
    if not found.paths:
        return [], [no_video(folder, found, "neither train.csv nor any video")]
    if found.passed_over:
        _tell(f"{folder}: {found.passed_over}")
    records, classes, nested = [], set(), []
    for number, video in enumerate(found.paths, 1):
        path = video.relative_to(folder).as_posix()
        if not path.isprintable():  # a CSV cannot hold control characters and invalid UTF-8
            return [], [f"{folder}: rename {path!r}: a manifest cannot hold that name"]
        fields = parse_slam_filename(path)
        if "label" not in fields and folder not in (video, video.parent):
            fields["label"] = video.parent.name
            classes.add(video.parent)
            if folder != video.parent.parent:
                nested.append(path)
        records.append(Record(number, path, **fields))
    if nested:
        _tell(
            f"{folder}: folders in folders: the class of a clip is the folder that it lies in (of "
            f"{shorten(nested[0])} {shorten(PurePosixPath(nested[0]).parent.name)!r})"
        )
    return records, [
        f"{again} and {first} are one folder, but two classes: take one of them out"
        for again, first in found.twice
        if first in classes and first not in again.parents and again.name != first.name
    ]


@functools.cache  # a folder is read several times
def _tell(text: str) -> None:
    print(text)


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


def _record(line: int, cells: Mapping[str, str]) -> Record:
    """The row of a table, whose cells are named like the fields of a Record."""
    slam = parse_slam_filename(cells["path"])
    patient = cells.get("patient") or slam.get("patient")
    video = _qualified(patient, cells.get("video")) or slam.get("video")
    action = _qualified(video or patient, cells.get("action")) or slam.get("action")
    label, split = cells.get("label") or None, cells.get("split")
    frames, fps = cells.get("frames"), cells.get("fps")
    return Record(
        line,
        cells["path"],
        label,
        patient,
        video,
        action,
        split,
        int(frames) if frames else None,
        float(fps) if fps else None,
    )


def _qualified(owner: str | None, name: str | None) -> str | None:
    """The name of a video or action after that of its owner.

    So the first videos of two patients have different names.
    """
    if not owner or not name or name.startswith(f"{owner}_"):
        return name or None
    return f"{owner}_{name}"


def _rows(table: Table, options: ManifestOptions) -> Iterator[tuple[int, dict[str, str]]]:
    """(line number, cells named like the fields of a Record) of each clip.

    Raises:
        UserError: the layout is unknown, or two columns have the same name.
    """
    if not table.rows:
        return
    first = table.rows[0].cells
    columns = _find_columns(table, options)
    if columns:
        yield from _rows_below_header(table, columns)
        return
    pairs = all(len(row.cells) == 2 and _is_pair(*row.cells) for row in table.rows)
    frame_lists = [_FRAME_LIST.fullmatch(row.cells[0].strip(' "')) for row in table.lines]
    if len(first) >= 3 and (is_video(first[1]) or _has_slam_names(table)):
        # SLAM: index, path, label; with or without a header
        if not is_video(first[1]):
            table.header()  # refuses two columns of the same name
        for line, cells in table.rows[not is_video(first[1]) :]:
            if len(cells) < 3 or not is_video(cells[1]):
                raise _unknown_layout(table, line)
            yield line, {"path": cells[1], "label": cells[2].strip()}
    elif all(len(row.cells) == 1 and is_video(row.cells[0]) for row in table.lines):
        for line, (text,) in table.lines:  # clips without labels
            yield line, {"path": text}
    elif pairs:
        for line, (name, label) in table.rows:
            yield line, {"path": name, "label": label.strip()}
    elif all(match and not is_video(match["path"]) for match in frame_lists):
        for row, match in zip(table.lines, frame_lists, strict=True):
            yield row.line, match.groupdict()
    elif _is_header(table):
        raise _no_column(table, "paths")
    elif all(len(row.cells) > 2 and is_video(row.cells[0]) for row in table.rows):
        raise UserError(f"{table.path}: has no header: write one, e.g. path,label,patient")
    else:
        for line, (text,) in table.lines:
            # The label is the end of the line: the path may hold spaces and commas.
            text = text.strip()
            label = re.split(r"[\s,;]", text)[-1]
            name = text.removesuffix(label).strip(' \t,;"')
            if not label or not name:
                raise _unknown_layout(table, line)
            yield line, {"path": name, "label": label.strip('"')}


def _is_pair(name: str, label: str) -> bool:
    """Whether two cells are a path and a label, and not the parts of a path with a comma in it."""
    return is_video(name) or ("/" in name and not is_video(label.rpartition(" ")[0]))


def _has_slam_names(table: Table) -> bool:
    return any(len(row.cells) > 1 and parse_slam_filename(row.cells[1]) for row in table.rows[1:])


def _is_header(table: Table) -> bool:
    """Whether the first row names columns: no cell of it is a video, of other rows some are."""
    has_video = [any(is_video(cell) for cell in row.cells) for row in table.rows]
    return len(table.rows[0].cells) > 1 and not has_video[0] and any(has_video)


def _rows_below_header(
    table: Table, columns: Mapping[str, str]
) -> Iterator[tuple[int, dict[str, str]]]:
    """The clips of a table with a header.

    Args:
        columns: the column of each field of a Record.
    """
    for line, cells in table.records(_plain):
        row = {field: cells[name].strip() for field, name in columns.items() if name in cells}
        if not row.get("path") or ("label" in columns and "label" not in row):
            raise _unknown_layout(table, line)
        row["path"] = cells[columns["path"]]
        if "split" in columns:
            name = row.get("split") or "(none)"
            row["split"] = SPLIT_NAMES.get(name.lower(), name)
        if row.get("fps"):
            row["fps"] = _rate(table, line, row["fps"])
        yield line, row


def _rate(table: Table, line: int, text: str) -> str:
    try:
        rate = parse_number(text, table.delimiter)
    except ValueError as error:
        raise UserError(
            f"{table.path}, line {line}: frame rate {shorten(text)!r}, {error}"
        ) from None
    if not 0 < rate < 1000:
        raise UserError(f"{table.path}, line {line}: {rate:g} is no frame rate")
    return repr(rate)


def _plain(cell: str) -> str:
    """The name of a column as it is compared: `File-Name` is `file_name`."""
    return column_name(cell).replace(" ", "_").replace("-", "_")


def _find_columns(table: Table, options: ManifestOptions) -> dict[str, str]:
    """The column of each field of a Record; empty for a table without a header that we know.

    Raises:
        UserError: a column that the user names does not exist, or two columns could be meant.
    """
    header = [_plain(cell) for cell in table.rows[0].cells]
    columns = {}
    for field in ("path", "label", "patient", "split"):
        if given := _plain(getattr(options, f"{field}_column")):
            if given not in header:
                raise UserError(
                    f"{table.path}: has no column {getattr(options, f'{field}_column')!r}: its "
                    f"columns are {_names(table)}"
                )
            columns[field] = given

    def find(field: str, groups: Sequence[Sequence[str]]) -> None:
        """Take a column of the first group that the table has any of."""
        for group in groups:
            names = [n for n in group if n in header and n not in columns.values()]
            if names and field not in columns:
                columns[field] = names[0] if len(names) == 1 else _choose(table, field, names)

    files = any(map(is_video, _cells(table, header, "video")))
    find("path", [group for group in _PATHS if files or group != ("video",)])
    if "path" not in columns:
        return {}
    find("split", [_SPLIT_COLUMNS])
    phases = {cell.strip().lower() for cell in _cells(table, header, "phase")} - {""}
    if "split" not in columns and phases and phases <= SPLIT_NAMES.keys():
        columns["split"] = "phase"
    find("label", _LABELS)
    for field, names in (
        ("patient", _PATIENTS),
        ("video", _VIDEOS),
        ("action", _ACTIONS),
        ("fps", _RATES),
    ):
        find(field, [[name] for name in names])
    return columns


def _cells(table: Table, header: Sequence[str], name: str) -> list[str]:
    """The cells below a name in the header."""
    column = header.index(name) if name in header else sys.maxsize
    return [row.cells[column] for row in table.rows[1:] if len(row.cells) > column]


def _choose(table: Table, field: str, names: Sequence[str]) -> str:
    """One of several columns with names for a field: beside numbers, that of the names.

    Raises:
        UserError: they say different things.
    """
    header = [_plain(cell) for cell in table.rows[0].cells]
    cells = {name: _cells(table, header, name) for name in names}
    pairs = set(zip(*cells.values(), strict=False))
    alike = all(len(set(values)) == len(pairs) for values in map(set, cells.values()))
    texts = [name for name in names if not all(map(is_number, cells[name]))]
    if not alike or len(texts) > 1:
        raise UserError(
            f"{table.path}: the columns {' and '.join(names)} could all hold the {field}: give "
            f"--{field}-column"
        )
    return (texts or names)[0]


def is_number(text: str) -> bool:
    """Whether a label or the name of a class is a number, such as `2`, `-1` or `1.0`."""
    return bool(re.fullmatch(r"\s*[+-]?\d+(\.\d+)?\s*", text, re.ASCII))


def _several_labels(manifest: Path, records: Sequence[Record]) -> list[str]:
    """A problem, as a list of one line, if clips have several labels each."""
    labels_of: dict[str, set[str | None]] = {}
    for record in records:
        labels_of.setdefault(record.path.strip(), set()).add(record.label)
    examples = [f"{path}, in several rows" for path, labels in labels_of.items() if len(labels) > 1]
    # `hook|grasper` if `hook` and `grasper` are labels too, or parts of other such labels
    parts = {
        record.label: re.split(r"\s*[|;,]\s*", record.label) for record in records if record.label
    }
    times = Counter(part for label_parts in parts.values() for part in set(label_parts))
    examples += [
        label
        for label, label_parts in parts.items()
        if len(label_parts) > 1 and min(times[part] for part in label_parts) > 1
    ]
    return [f"{manifest}: {_SINGLE_LABEL} (e.g. {shorten(examples[0])})"] if examples else []


def _is_one_hot(table: Table) -> bool:
    """Whether columns are classes, and the cells below say whether a clip belongs to each."""
    header = table.rows[0].cells
    columns = [{cell.strip() for cell in _cells(table, header, name)} for name in header]
    return sum(values <= {"0", "1", "0.0", "1.0", "True", "False"} for values in columns) > 1


def _no_column(table: Table, what: str) -> UserError:
    return UserError(
        f"{table.path}: which column holds the {what} is not known: its columns are "
        f"{_names(table)}: give {_FLAGS}, or move the table elsewhere if folders are the classes"
    )


def _names(table: Table) -> str:
    return list_some((repr(shorten(cell.strip())) for cell in table.rows[0].cells), 12)


def _unknown_layout(table: Table, line: int) -> UserError:
    return UserError(f"{table.path}, line {line}: neither 'path,label' nor SLAM's columns")
