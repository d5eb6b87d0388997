"""Segments and timelines of whole videos, and their files.

An output folder of predict.py holds `frames.csv` (`time` in seconds, then one column of
probabilities per class) and `timeline.csv` (`start,end,label,confidence`, times in seconds).
"""

import contextlib
import itertools
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from utils.errors import UserError, describe_os_error
from utils.files import write_text
from utils.tables import parse_number, read_table, write_csv, write_rows
from utils.text_table import list_some, shorten

LONGEST = 1000 * 3600.0  # seconds; a time beyond it is a mistake

# `1:23.5` and `1:01:23,5`; then `1h02m03s`, `90 s`, `2 min`.
_CLOCK = re.compile(r"(?:(\d+):)?(\d+):(\d\d?(?:[.,]\d+)?)", re.ASCII)
_UNITS = re.compile(
    r"(?:(\d+)\s*(?:h|hrs?|hours?))?\s*(?:(\d+)\s*(?:m|mins?|minutes?))?\s*"
    r"(?:(\d+(?:[.,]\d+)?)\s*(?:s|secs?|seconds?))?",
    re.ASCII | re.IGNORECASE,
)
_FRAMES = re.compile(r"\d+:\d+:\d+[:;]\d+", re.ASCII)  # hh:mm:ss:ff


class Segment(NamedTuple):
    """A stretch of video with one label."""

    start: float
    """seconds"""
    end: float
    """seconds, exclusive"""
    label: str
    """a class, or one of clips.manifest.NON_CLASS_LABELS"""
    confidence: float = math.nan
    """mean probability of the label (of the likeliest class if `uncertain`); nan: unknown"""

    @property
    def duration(self) -> float:
        return self.end - self.start


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


def read_timeline(path: str | Path) -> dict[str, list[Segment]]:
    """The segments of each video in a timeline.csv, in order of time.

    The columns are `start,end,label` (times as in `parse_seconds`), and optionally `confidence` and
    `video`. Without a column `video` all segments belong to one video called "".

    Raises:
        UserError: the file is not a timeline; the message lists all problems with line numbers.
    """
    try:
        table = read_table(path)
    except OSError as error:
        raise UserError(describe_os_error(error, path)) from None
    missing = {"start", "end", "label"} - set(table.header())
    if missing:
        raise UserError(
            f"{path}: no column {', '.join(sorted(missing))} (a timeline has the header "
            "start,end,label)"
        )
    videos: dict[str, list[tuple[int, Segment]]] = {}
    problems = []
    for number, row in table.records():
        try:
            segment = _segment(row, table.delimiter)
        except ValueError as error:
            problems.append(f"line {number}: {error}")
            continue
        videos.setdefault(row.get("video", "").strip(), []).append((number, segment))
    for name, segments in videos.items():
        segments.sort(key=lambda pair: pair[1].start)
        for (_, before), (number, after) in itertools.pairwise(segments):
            if after.start < before.end - 1e-6:
                where = f" of video {name}" if name else ""
                problems.append(f"line {number}: starts before the segment before it ends{where}")
    if not videos and not problems:
        problems.append("holds no segments")
    if problems:
        listing = list_some(problems, 20, "\n  ")
        raise UserError(f"{path}: not a timeline:\n  {listing}")
    return {name: [segment for _, segment in pairs] for name, pairs in videos.items()}


def _segment(row: dict[str, str], delimiter: str) -> Segment:
    times = []
    for name in ("start", "end"):
        text = row.get(name, "")
        try:
            times.append(parse_seconds(text, delimiter))
        except ValueError as error:
            raise ValueError(f"{name} is {shorten(text)!r}, {error}") from None
    start, end = times
    if end <= start:
        raise ValueError(f"ends at {end:g} s, not after its start, {start:g} s")
    label = row.get("label", "").strip()
    if not label:
        raise ValueError("has no label")
    confidence = row.get("confidence", "").strip()
    if confidence in ("", "nan"):
        return Segment(start, end, label)
    try:
        return Segment(start, end, label, parse_number(confidence, delimiter))
    except ValueError as error:
        raise ValueError(f"confidence is {shorten(confidence)!r}, {error}") from None


def parse_seconds(text: str, delimiter: str = ",") -> float:
    """The seconds of a time in a table.

    A time is a number of seconds (`83.5`, `83,5`), a clock (`1:23.5` is minutes and seconds,
    `0:01:23.5` and `0:01:23,5` have hours too) or has units (`1m23.5s`, `1h 2min`). A time in
    frames (`hh:mm:ss:ff`) is refused, because the frame rate is not known.

    Args:
        delimiter: of the table; see `parse_number`.

    Raises:
        ValueError: it is not a time, or not an unambiguous one.
    """
    text = text.strip()
    clock = _CLOCK.fullmatch(text) or (_UNITS.fullmatch(text) if text else None)
    if _FRAMES.fullmatch(text):
        raise ValueError("which counts frames: write hh:mm:ss.mmm, or seconds")
    if clock:
        parts = [part and float(part.replace(",", ".")) for part in clock.groups()]
        given = [part for part in parts if part is not None]
        if any(part >= 60 for part in given[1:]):
            raise ValueError("not a time: 60 or more minutes or seconds below a larger unit")
        hours, minutes, seconds = (part or 0.0 for part in parts)
        total = 3600 * hours + 60 * minutes + seconds
    else:
        try:
            total = parse_number(text, delimiter)
        except ValueError as error:
            raise ValueError(f"not a time ({error}): write 83.5 or 0:01:23.5") from None
    if not 0 <= total <= LONGEST:
        raise ValueError(f"not a time from 0 to {LONGEST / 3600:,.0f} hours")
    return total


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
