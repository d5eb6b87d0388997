"""Parses the layouts that a manifest may have; manifest.py describes them."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from utils.errors import UserError, describe_os_error
from utils.tables import Row, Table, column_name, read_table
from video.files import is_video

_SLAM_NAME = re.compile(
    r"Clip_P(?P<patient>[^_]+)_V(?P<video>[^_]+)_C(?P<action>[^_]+)_(?P<label>[^_.]+)"
)

_PATH_COLUMNS = ("path", "loop_path")  # the second is the name in SLAM's looped_clips.csv

# Names of splits. A column called `split` may hold any names. A column called `phase` is a column
# of splits only if it holds nothing but these; otherwise it holds phases of the operation.
_SPLITS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
    "testing": "test",
}


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


def parse_slam_filename(path: str) -> dict[str, str]:
    """Patient, video, action and label in a file name of SLAM; empty for other file names.

    SLAM numbers videos per patient and actions per video. So their names here begin with the name
    of the patient.
    """
    match = _SLAM_NAME.search(PurePosixPath(path.replace("\\", "/")).name)
    if not match:
        return {}
    video = f"{match['patient']}_V{match['video']}"
    return {
        "patient": match["patient"],
        "video": video,
        "action": f"{video}_C{match['action']}",
        "label": match["label"],
    }


def read_records(manifest: Path) -> tuple[list[Record], list[str]]:
    """The rows of a manifest in any layout, and the problems with it.

    A row without patient, video or action gets those of its file name. The label is not taken from
    the file name (see clip_table.py for the one exception).
    """
    records: list[Record] = []
    try:
        for line, cells in _rows(read_table(manifest)):
            records.append(_record(line, cells))
    except FileNotFoundError:
        return [], [f"{manifest}: no such manifest (a CSV with the columns path,label)"]
    except OSError as error:
        return [], [describe_os_error(error, manifest)]
    except UserError as error:
        return records, [str(error)]
    return records, []


def _record(line: int, cells: dict[str, str]) -> Record:
    slam = parse_slam_filename(cells["path"])
    patient = cells.get("patient") or slam.get("patient")
    video = _qualified(patient, cells.get("video")) or slam.get("video")
    action = _qualified(video or patient, cells.get("action")) or slam.get("action")
    label, split = cells.get("label") or None, cells.get("split")
    return Record(line, cells["path"], label, patient, video, action, split)


def _qualified(owner: str | None, name: str | None) -> str | None:
    """The name of a video or action after that of its owner.

    So the first videos of two patients have different names.
    """
    if not owner or not name or name.startswith(f"{owner}_"):
        return name or None
    return f"{owner}_{name}"


def _rows(table: Table) -> Iterator[tuple[int, dict[str, str]]]:
    """(line number, columns) of each clip.

    Raises:
        UserError: the layout of a row is unknown, or two columns have the same name.
    """
    if not table.rows:
        return
    first = table.rows[0].cells
    header = [column_name(cell) for cell in first]
    path = next((name for name in _PATH_COLUMNS if name in header), None)
    split = _split_column(header, table.rows[1:])
    pairs = all(len(row.cells) == 2 and is_video(row.cells[0]) for row in table.rows)
    if path and ("label" in header or split or len(header) < 3):
        for line, cells in table.records():
            row = {name: cell.strip() for name, cell in cells.items()}
            if not row.get(path) or ("label" in header and "label" not in row):
                raise _unknown_layout(table, line)
            name = row.get(split) or "(none)" if split else None
            row["path"] = cells[path]
            row["split"] = name and _SPLITS.get(name.lower(), name)
            yield line, row
    elif len(first) >= 3:  # SLAM: index, path, label; with or without a header
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
    else:
        for line, (text,) in table.lines:
            # The label is the end of the line: the path may hold spaces and commas.
            text = text.strip()
            label = re.split(r"[\s,;]", text)[-1]
            name = text.removesuffix(label).strip(' \t,;"')
            if not label or not name:
                raise _unknown_layout(table, line)
            yield line, {"path": name, "label": label}


def _unknown_layout(table: Table, line: int) -> UserError:
    return UserError(f"{table.path}, line {line}: neither 'path,label' nor SLAM's columns")


def _split_column(header: Sequence[str], rows: Sequence[Row]) -> str | None:
    """The column that holds the split of each clip, if there is one."""
    if "split" in header:
        return "split"
    column = header.index("phase") if "phase" in header else len(header)
    values = {row.cells[column].strip().lower() for row in rows if len(row.cells) > column} - {""}
    return "phase" if values and values <= _SPLITS.keys() else None
