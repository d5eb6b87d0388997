"""Segments and timelines of whole videos, and their files.

An output folder of predict.py holds `frames.csv` (`time` in seconds, then one column of
probabilities per class) and `timeline.csv` (`start,end,label,confidence`, times in seconds).
"""

import contextlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from clips.annotations import read_annotations
from clips.segments import Segment
from utils.files import write_text
from utils.tables import write_csv, write_rows


@dataclass
class Timeline:
    """The segments of a video, and the probabilities that they were made from."""

    name: str
    """name of the video, for pages and pictures"""
    classes: tuple[str, ...]
    duration: float
    """length of the video in seconds"""
    segments: list[Segment]
    """segments in order of time, without overlap; together they cover the video"""
    times: np.ndarray
    """times of the predictions, `(N,)` seconds"""
    probabilities: np.ndarray
    """`(N, num_classes)`"""
    notes: list[str] = field(default_factory=list)
    """messages for the reader: stretches that could not be read, an interruption"""


def write_timeline(path: str | Path, segments: Sequence[Segment]) -> None:
    """Write timeline.csv."""
    rows = [["start", "end", "label", "confidence"]]
    for segment in segments:
        confidence = "" if math.isnan(segment.confidence) else f"{segment.confidence:.4f}"
        rows.append([f"{segment.start:.3f}", f"{segment.end:.3f}", segment.label, confidence])
    write_csv(path, rows)


def read_timeline(path: str | Path, tiers: Sequence[str] = ()) -> dict[str, list[Segment]]:
    """The segments of each video in a timeline.csv, in order of time; see `read_annotations`.

    The columns are `start,end,label` (times as in `clips.segments.parse_seconds`), and optionally
    `confidence` and `video`. Without a column `video` all segments belong to one video called "".

    Raises:
        UserError: the file is not a timeline; the message lists all problems with line numbers.
    """
    return read_annotations(path, tiers).videos


class FramesWriter:
    """Writes frames.csv while predictions come: a run that is killed leaves those made so far."""

    def __init__(self, path: str | Path, classes: Sequence[str]) -> None:
        # Not atomic on purpose: an unfinished file is better than none.
        self._file = open(path, "w", newline="", encoding="utf-8")  # noqa: SIM115
        write_rows(self._file, [["time", *classes]])

    def write(self, times: Iterable[float], probabilities: np.ndarray) -> None:
        """Append rows and flush them to the file.

        Args:
            times: `(n,)` seconds.
            probabilities: `(n, num_classes)`.
        """
        pairs = zip(times, probabilities, strict=True)
        write_rows(
            self._file,
            ([f"{time:.3f}", *(f"{value:.4f}" for value in row)] for time, row in pairs),
        )
        self._file.flush()

    def close(self) -> None:
        with contextlib.suppress(OSError):  # `write` has flushed all, or raised it already
            self._file.close()


def write_subtitles(path: str | Path, segments: Sequence[Segment]) -> None:
    """Write the segments as WebVTT subtitles (https://www.w3.org/TR/webvtt1/)."""
    cues = ["WEBVTT"]
    for segment in segments:
        label = segment.label
        for character, escape in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;")):
            label = label.replace(character, escape)
        label = " ".join(label.split())  # a line break would end the cue
        confidence = "" if math.isnan(segment.confidence) else f" {segment.confidence:.0%}"
        cues.append(
            f"{format_timestamp(segment.start)} --> {format_timestamp(segment.end)}\n"
            f"{label}{confidence}"
        )
    write_text(path, "\n\n".join(cues) + "\n")


def format_timestamp(seconds: float) -> str:
    """Seconds as `hh:mm:ss.ttt`, the format of WebVTT."""
    milliseconds = round(seconds * 1000)
    minutes, milliseconds = divmod(milliseconds, 60_000)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:02d}:{minutes:02d}:{milliseconds // 1000:02d}.{milliseconds % 1000:03d}"


class Snapshot(NamedTuple):
    """The newest frame of a live video and its prediction."""

    time: float
    """seconds of the video or stream"""
    label: str
    """smoothed prediction: a class or one of NON_CLASS_LABELS"""
    probabilities: np.ndarray
    """`(num_classes,)`, not smoothed; nan where there are none"""
    frame: np.ndarray | None
    """`(H, W, 3)` uint8 RGB, which must not be changed any more; None: not shown"""
    state: str = ""
    """message for the viewers, e.g. "reconnecting"; empty: running"""
