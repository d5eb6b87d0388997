"""The layouts that a manifest may have, and what each says of its clips; see manifest.py."""

import csv
import re
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

_SLAM_NAME = re.compile(
    r"Clip_P(?P<patient>[^_]+)_V(?P<video>[^_]+)_C(?P<action>[^_]+)_(?P<label>[^_.]+)"
)

_VIDEO_NAME = re.compile(r"\.(mp4|avi|mov|mkv|webm|m4v|mpe?g|ts|wmv|flv|3gp|ogv|asf)$", re.I)

_PATH_COLUMNS = ("path", "loop_path")  # the second is the name in SLAM's looped_clips.csv

# A column called `phase` names a split only if it holds nothing but these: elsewhere a phase is a
# phase of the operation. A column called `split` always does.
_SPLITS = {"train": "train", "training": "train", "test": "test", "testing": "test"}

_SPLITS |= dict.fromkeys(("val", "valid", "validation", "dev"), "val")


class Record(NamedTuple):
    """A row of a manifest: text as it stands there, nothing looked up yet."""

    line: int
    path: str
    label: str | None = None
    patient: str | None = None
    video: str | None = None
    action: str | None = None
    """the source action: SLAM cuts one long action into several clips, its parts"""
    split: str | None = None
    """train, val, test, or what else a column of the manifest says"""


def is_video(name: str) -> bool:
    """Whether a file's name ends like a video's."""
    return bool(_VIDEO_NAME.search(name.strip()))


def name_facts(path: str) -> dict[str, str]:
    """What SLAM's naming tells of a clip: patient, video, action and label; else nothing.

    Video and action are numbered anew within a patient, so their names start with the patient's.
    """
    named = _SLAM_NAME.search(PurePosixPath(path.replace("\\", "/")).name)
    if not named:
        return {}
    video = f"{named['patient']}_V{named['video']}"
    return {
        "patient": named["patient"],
        "video": video,
        "action": f"{video}_C{named['action']}",
        "label": named["label"],
    }


def read_records(manifest: Path) -> tuple[list[Record], list[str]]:
    """The rows of a manifest in any layout, and the problems with it.

    A row without a patient, video or action of its own has those that its file name tells; a label
    is never taken from there (see `clip_table.py` for the one exception).
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
        named = name_facts(cells["path"])
        patient = cells.get("patient") or named.get("patient")
        video = _within(patient, cells.get("video")) or named.get("video")
        action = _within(video or patient, cells.get("action")) or named.get("action")
        label, split = cells.get("label") or None, cells.get("split")
        records.append(Record(number, cells["path"], label, patient, video, action, split))
    return records, []


def _within(owner: str | None, name: str | None) -> str | None:
    """A video's or action's name with its owner's: two patients' first videos are two."""
    if not owner or not name or name.startswith(f"{owner}_"):
        return name or None
    return f"{owner}_{name}"


def _rows(lines: Sequence[str]) -> Iterator[tuple[int, dict[str, str] | None]]:
    """(line number, columns) of each clip; None for a line of no known layout."""
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
            said = row.get(split) or "(none)" if split else None
            row["split"] = said and _SPLITS.get(said.lower(), said)
            whole = row["path"] and ("label" in row or "label" not in header)
            yield number, row if whole else None
    elif len(first) >= 3:  # SLAM: index, path, label; with or without a header of whatever names
        for number, cells in table[not is_video(first[1]) :]:
            known = len(cells) >= 3 and is_video(cells[1])
            yield number, {"path": cells[1].strip(), "label": cells[2].strip()} if known else None
    else:
        for number, line in numbered:
            # From the right: the path may hold spaces and commas, the label may not.
            parts = re.match(r"\s*(.+?)\s*[,;\t ]\s*([^\s,;]+)\s*$", line)
            yield number, {"path": parts[1].strip('"'), "label": parts[2]} if parts else None


def _split_column(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str | None:
    """The column that says which split a clip is in, if there is one."""
    if "split" in header:
        return "split"
    place = header.index("phase") if "phase" in header else len(header)
    values = {row[place].strip().lower() for row in rows if len(row) > place} - {""}
    return "phase" if values and values <= _SPLITS.keys() else None
