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

from clips.manifest import OUT_OF_BODY, UNCERTAIN, UNREADABLE
from clips.perceptual_hash import sha256_file
from timeline.segments import Timeline
from utils.errors import UserError
from utils.files import make_folder, read_json, try_write, write_json
from utils.run_dir import sanitize
from utils.sharding import Shard, file_size
from utils.tables import write_csv

DONE = "done.json"

SUMMARY = "summary.csv"

OK, ENDED_EARLY = "ok", "ended early"
"""status of a video, besides `UNREADABLE`"""

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


class Archive:
    """The videos of one start of predict.py, and what of them is done.

    Args:
        videos: all of them, also those of other processes, each with the folder of its results.
        computed: of `fingerprint`.
        shard: the part of this process; None: it does all.
        keep: also keep a record of a video that cannot be read, in a folder of its own: other
            processes, or a later start, need it.
    """

    def __init__(
        self,
        videos: Sequence[tuple[Path, Path]],
        computed: str,
        shard: Shard | None = None,
        keep: bool = True,
    ) -> None:
        self.videos = videos
        self.computed = computed
        self.shard = shard
        self.keep = keep
        self._unreadable: dict[Path, dict[str, Any]] = {}  # by their folders, if not kept

    def remaining(self) -> list[tuple[Path, Path]]:
        """The videos of this process that are not done; how many are is printed. One that could not
        be read is among them: it may have been repaired."""
        part = self.videos
        if self.shard:
            part = self.shard.part(part, [file_size(video) for video, _ in part])
        remaining = [v for v in part if (self.read(*v) or {}).get("status") in (None, UNREADABLE)]
        which = f"part {self.shard}: " if self.shard else ""
        done = len(part) - len(remaining)
        print(f"{which}{done:,} of {len(part):,} videos are done already", flush=True)
        return remaining

    def record(
        self,
        video: Path,
        folder: Path,
        state: Sequence[int],
        timeline: Timeline | None,
        reason: str = "",
    ) -> str:
        """Write the record of a video, the last of its results.

        Args:
            state: `video_state` before the video was read: a change since then makes it not done.
            timeline: of the video; None: it cannot be read.
            reason: why it cannot be read, or why the timeline ends early.

        Returns:
            Why the record could not be written, in one line; empty if it was.
        """
        seconds: dict[str, float] = defaultdict(float)
        for segment in timeline.segments if timeline else ():
            seconds[segment.label] += segment.end - segment.start
        content = {
            "video": sanitize(str(video)),
            "source": list(state),
            "computed": self.computed,
            "status": UNREADABLE if timeline is None else ENDED_EARLY if reason else OK,
            "reason": sanitize(reason),
            "duration": float(timeline.duration) if timeline else 0.0,
            "seconds": dict(seconds),
        }
        if timeline is None and not self.keep:
            self._unreadable[folder] = content
            return ""
        return try_write(folder, lambda _: _write_record(folder, content))

    def read(self, video: Path, folder: Path) -> dict[str, Any] | None:
        """The record of a video, if it is of this model, these settings and the video as it is."""
        if folder in self._unreadable:
            return self._unreadable[folder]
        try:
            record = read_json(folder / DONE, _SHAPE)
        except (UserError, OSError):
            return None
        if not record or record["computed"] != self.computed:
            return None
        return record if record["source"] == video_state(video) else None

    def summarize(self, path: Path, classes: Sequence[str]) -> str:
        """Write the table over all videos if all are done, and print what became of it.

        Returns:
            Why it could not be written, in one line; empty if it was, or if videos are missing.
        """
        records = [self.read(*video) for video in self.videos]
        if missing := records.count(None):
            if self.shard:
                print(
                    f"{missing:,} of {len(records):,} videos are left to the other processes; if "
                    "none of them runs any more, start again"
                )
            return ""
        problem = try_write(path, lambda table: write_summary(table, records, classes))
        if not problem:
            print(f"all {len(records):,} videos: {sanitize(str(path))}")
        return problem


def _write_record(folder: Path, content: dict[str, Any]) -> None:
    make_folder(folder)
    write_json(folder / DONE, content)


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
    try:
        return Path(os.path.commonpath(parents)) / SUMMARY
    except ValueError:  # on several drives of Windows
        return Path(parents[0]) / SUMMARY


def write_summary(path: Path, records: Sequence[Mapping[str, Any]], classes: Sequence[str]) -> None:
    """Write the table over all videos.

    Args:
        records: of `read_done`.
    """
    rows = [[*COLUMNS, *(f"{name} (s)" for name in classes), UNCERTAIN, OUT_OF_BODY]]
    for record in records:
        seconds, duration = record["seconds"], record["duration"]
        texts = [record["video"], record["status"], record["reason"], f"{duration:.1f}"]
        if record["status"] == UNREADABLE:
            rows.append([*texts, *[""] * (len(classes) + 2)])
            continue
        known = [f"{seconds.get(name, 0.0):.1f}" for name in classes]
        others = (seconds.get(name, 0.0) for name in (UNCERTAIN, OUT_OF_BODY))
        rows.append([*texts, *known, *(f"{x / duration if duration else 0:.4f}" for x in others)])
    write_csv(path, rows)
