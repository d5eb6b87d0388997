"""Folders of videos: which of them are done, and one table over all.

predict.py writes `done.json` last into the folder of a video. It says what was computed from what:
a folder without it, of another checkpoint, of other settings, or of a video that has changed since,
is not done.
"""

import hashlib
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from clips.manifest import OUT_OF_BODY, UNCERTAIN
from clips.perceptual_hash import sha256_file
from timeline.segments import Timeline
from utils.errors import UserError
from utils.files import make_folder, read_json, write_json
from utils.run_dir import sanitize
from utils.tables import write_csv

DONE = "done.json"

SUMMARY = "summary.csv"

COLUMNS = ("video", "status", "reason", "duration")
"""of summary.csv; then the seconds of each class, and the fraction that is uncertain and out of
body"""

_SHAPE = {
    "video": str,
    "source": [int],
    "computed": str,
    "status": str,
    "reason": str,
    "duration": float,
    "seconds": {str: float},
}


def fingerprint(files: Sequence[Path], settings: Mapping[str, Any]) -> str:
    """What a timeline depends on besides its video: files, as the model's, and the settings."""
    texts = [sha256_file(path) for path in files] + [repr(sorted(settings.items()))]
    return hashlib.sha256(" ".join(texts).encode()).hexdigest()


def write_done(
    folder: Path,
    source: Path,
    state: Sequence[int],
    computed: str,
    timeline: Timeline | None,
    reason: str = "",
) -> None:
    """Write the record of a video, the last of its results.

    Args:
        state: `video_state` before the video was read: a change since then makes it not done.
        computed: of `fingerprint`.
        timeline: of the video; None: it cannot be read.
        reason: why it cannot be read, or why the timeline ends early.
    """
    seconds: dict[str, float] = defaultdict(float)
    for segment in timeline.segments if timeline else ():
        seconds[segment.label] += segment.end - segment.start
    status = "unreadable" if timeline is None else "ended early" if reason else "ok"
    make_folder(folder)
    write_json(
        folder / DONE,
        {
            "video": sanitize(str(source)),
            "source": list(state),
            "computed": computed,
            "status": status,
            "reason": sanitize(reason),
            "duration": float(timeline.duration) if timeline else 0.0,
            "seconds": dict(seconds),
        },
    )


def read_done(folder: Path, source: Path, computed: str) -> dict[str, Any] | None:
    """The record of a video, if it is of this model, these settings and the video as it is now."""
    try:
        record = read_json(folder / DONE, _SHAPE) if (folder / DONE).exists() else {}
    except UserError:
        return None
    if not record or record["computed"] != computed or record["source"] != video_state(source):
        return None
    return record


def video_state(source: Path) -> list[int]:
    """Size and time of modification of a video, or of a folder of images."""
    try:
        status = source.stat()
        return [status.st_size if source.is_file() else 0, status.st_mtime_ns]
    except OSError:
        return []


def summary_path(folders: Sequence[Path]) -> Path:
    """Where the table over all videos lies: in the folder that holds all of their folders."""
    parents = [os.path.abspath(folder.parent) for folder in folders]
    return Path(os.path.commonpath(parents)) / SUMMARY


def write_summary(path: Path, records: Sequence[Mapping[str, Any]], classes: Sequence[str]) -> None:
    """Write the table over all videos.

    Args:
        records: of `read_done`.
    """
    rows = [[*COLUMNS, *(f"{name} (s)" for name in classes), UNCERTAIN, OUT_OF_BODY]]
    for record in records:
        seconds, duration = record["seconds"], record["duration"]
        known = [f"{seconds.get(name, 0.0):.1f}" for name in classes]
        fractions = [seconds.get(name, 0.0) / duration if duration else 0.0 for name in
                     (UNCERTAIN, OUT_OF_BODY)]  # fmt: skip
        if record["status"] == "unreadable":
            known, fractions = [""] * len(classes), []
        cells = [f"{fraction:.4f}" for fraction in fractions] or ["", ""]
        texts = [record["video"], record["status"], record["reason"], f"{duration:.1f}"]
        rows.append([*texts, *known, *cells])
    write_csv(path, rows)
