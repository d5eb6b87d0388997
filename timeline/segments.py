"""Segments and timelines of whole videos, and their files.

An output folder of predict.py holds `frames.csv` (`time` in seconds, then one column of
probabilities per class) and `timeline.csv` (`start,end,label,confidence`, times in seconds).
"""

import csv
import io
import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from clips.manifest import UNCERTAIN
from utils.errors import UserError
from utils.files import write_text

UNREADABLE = "unreadable"  # the video could not be decoded there

OUT_OF_BODY = "out_of_body"  # according to the user's detector (predict.py --out-of-body)

# Labels of segments that are not classes.
NON_CLASS_LABELS = (UNCERTAIN, UNREADABLE, OUT_OF_BODY)


class Segment(NamedTuple):
    """A stretch of video with one label."""

    start: float
    """seconds"""
    end: float
    """seconds, exclusive"""
    label: str
    """a class, or one of NON_CLASS_LABELS"""
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
    write_text(path, _to_csv(rows))


def read_timeline(path: str | Path) -> dict[str, list[Segment]]:
    """The segments of each video in a timeline.csv, in order of time.

    The columns are `start,end,label` (times in seconds or as `hh:mm:ss`), and optionally
    `confidence` and `video`. Without a column `video` all segments belong to one video called "".

    Raises:
        UserError: the file is not a timeline; the message lists all problems with line numbers.
    """
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            missing = {"start", "end", "label"} - set(reader.fieldnames or ())
            if missing:
                raise UserError(
                    f"{path}: no column {', '.join(sorted(missing))} (a timeline has the header "
                    "start,end,label)"
                )
            lines = [(reader.line_num, row) for row in reader]
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: not a CSV file: {error}") from None
    videos: dict[str, list[tuple[int, Segment]]] = {}
    problems = []
    for number, row in lines:
        try:
            segment = _segment(row)
        except ValueError as error:
            problems.append(f"line {number}: {error}")
            continue
        videos.setdefault(row.get("video") or "", []).append((number, segment))
    for name, segments in videos.items():
        segments.sort(key=lambda pair: pair[1].start)
        for (_, before), (number, after) in itertools.pairwise(segments):
            if after.start < before.end - 1e-6:
                where = f" of video {name}" if name else ""
                problems.append(f"line {number}: starts before the segment before it ends{where}")
    if not lines:
        problems.append("holds no segments")
    if problems:
        raise UserError("\n  ".join([f"{path}: not a timeline:", *problems]))
    return {name: [segment for _, segment in pairs] for name, pairs in videos.items()}


def _segment(row: dict[str, str]) -> Segment:
    start, end = (_seconds(row[name], name) for name in ("start", "end"))
    if end <= start:
        raise ValueError(f"ends at {end:g} s, not after its start, {start:g} s")
    label = (row["label"] or "").strip()
    if not label:
        raise ValueError("has no label")
    confidence = row.get("confidence") or "nan"
    return Segment(start, end, label, _number(confidence, "confidence"))


def _seconds(text: str | None, name: str) -> float:
    """The seconds of `83.5`, `1:23.5` or `0:01:23.5`."""
    total = 0.0
    for part in (text or "").split(":"):
        total = 60 * total + _number(part, name)
    if not 0 <= total < math.inf:
        raise ValueError(f"{name} is {text!r}, not a time")
    return total


def _number(text: str, name: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{name} is {text!r}, not a number") from None


class FramesWriter:
    """Writes frames.csv while predictions come: a run that is killed leaves those made so far."""

    def __init__(self, path: str | Path, classes: Sequence[str]) -> None:
        # Not atomic on purpose: an unfinished file is better than none.
        self._file = open(path, "w", newline="", encoding="utf-8")  # noqa: SIM115
        self._writer = csv.writer(self._file, lineterminator="\n")
        self._writer.writerow(["time", *classes])

    def write(self, times: Iterable[float], probabilities: np.ndarray) -> None:
        """Append rows and flush them to the file.

        Args:
            times: `(n,)` seconds.
            probabilities: `(n, num_classes)`.
        """
        for time, row in zip(times, probabilities, strict=True):
            self._writer.writerow([f"{time:.3f}", *(f"{value:.4f}" for value in row)])
        self._file.flush()

    def close(self) -> None:
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


def _to_csv(rows: Iterable[Sequence[str]]) -> str:
    file = io.StringIO(newline="")
    csv.writer(file, lineterminator="\n").writerows(rows)
    return file.getvalue()


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
