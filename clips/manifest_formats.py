"""Parses the layouts that a manifest may have; manifest.py describes them."""

import csv
import re
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

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
    try:
        lines = manifest.read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError:
        return [], [f"{manifest}: no such manifest (a CSV with the columns path,label)"]
    except UnicodeDecodeError:
        return [], [f"{manifest}: not UTF-8 text: save the table as 'CSV UTF-8'"]
    except OSError as error:
        return [], [f"{manifest}: {error.strerror}"]
    records = []
    for number, cells in _rows(lines):
        if cells is None:
            problem = f"{manifest}, line {number}: neither 'path,label' nor SLAM's columns"
            return records, [problem]
        slam = parse_slam_filename(cells["path"])
        patient = cells.get("patient") or slam.get("patient")
        video = _qualified(patient, cells.get("video")) or slam.get("video")
        action = _qualified(video or patient, cells.get("action")) or slam.get("action")
        label, split = cells.get("label") or None, cells.get("split")
        records.append(Record(number, cells["path"], label, patient, video, action, split))
    return records, []


def _qualified(owner: str | None, name: str | None) -> str | None:
    """The name of a video or action after that of its owner.

    So the first videos of two patients have different names.
    """
    if not owner or not name or name.startswith(f"{owner}_"):
        return name or None
    return f"{owner}_{name}"


def _rows(lines: Sequence[str]) -> Iterator[tuple[int, dict[str, str] | None]]:
    """(line number, columns) of each clip; the columns are None if the layout is unknown."""
    numbered = [(n, line) for n, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        return
    delimiter = max(",;\t", key=numbered[0][1].count)
    table = [(n, next(csv.reader([line], delimiter=delimiter))) for n, line in numbered]
    header = [name.strip().lower() for name in table[0][1]]
    first = table[0][1]
    path = next((name for name in _PATH_COLUMNS if name in header), None)
    split = _split_column(header, [cells for _, cells in table[1:]])
    if path and ("label" in header or split):
        for number, cells in table[1:]:
            row = dict(zip(header, (cell.strip() for cell in cells), strict=False))
            row["path"] = row.get(path, "")
            name = row.get(split) or "(none)" if split else None
            row["split"] = name and _SPLITS.get(name.lower(), name)
            complete = row["path"] and ("label" in row or "label" not in header)
            yield number, row if complete else None
    elif len(first) >= 3:  # SLAM: index, path, label; with or without a header
        for number, cells in table[not is_video(first[1]) :]:
            known = len(cells) >= 3 and is_video(cells[1])
            yield number, {"path": cells[1].strip(), "label": cells[2].strip()} if known else None
    else:
        for number, line in numbered:
            # The label is matched at the end of the line: the path may hold spaces and commas.
            parts = re.match(r"\s*(.+?)\s*[,;\t ]\s*([^\s,;]+)\s*$", line)
            yield number, {"path": parts[1].strip('"'), "label": parts[2]} if parts else None


def _split_column(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str | None:
    """The column that holds the split of each clip, if there is one."""
    if "split" in header:
        return "split"
    column = header.index("phase") if "phase" in header else len(header)
    values = {row[column].strip().lower() for row in rows if len(row) > column} - {""}
    return "phase" if values and values <= _SPLITS.keys() else None
