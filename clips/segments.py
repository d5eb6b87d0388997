"""Labelled segments of whole videos, and the texts that their times are read from."""

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from utils.errors import UserError
from utils.tables import parse_number
from utils.text_table import shorten

UNDERSTOOD = (
    "timelines with the header start,end,label; Cholec80's Frame,Phase; CholecT50's JSON; ELAN's "
    ".eaf and tab-delimited text; BORIS's tabular and aggregated events; Audacity's label tracks"
)

LONGEST = 1000 * 3600.0  # seconds; a time beyond it is a mistake

# `1:23.5` and `1:01:23,5`; then `1h02m03s`, `90 s`, `2 min`.
_CLOCK = re.compile(r"(?:(\d+):)?(\d+):(\d\d?(?:[.,]\d+)?)", re.ASCII)
_UNITS = re.compile(
    r"(?:(\d+)\s*(?:h|hrs?|hours?))?\s*(?:(\d+)\s*(?:m|mins?|minutes?))?\s*"
    r"(?:(\d+(?:[.,]\d+)?)\s*(?:s|secs?|seconds?))?",
    re.ASCII | re.IGNORECASE,
)
FRAMES = re.compile(r"\d+:\d+:\d+[:;]\d+", re.ASCII)  # hh:mm:ss:ff


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


class Entry(NamedTuple):
    """A segment as a file gives it."""

    where: str
    """the place in the file, for messages: `line 3`"""
    segment: Segment
    tiers: tuple[str, ...] = ()
    """names by which it can be chosen: its tier, category, subject"""
    video: str = ""
    """name of the video; empty: the file does not name it"""


class Parsed(NamedTuple):
    """The content of an annotation file."""

    entries: list[Entry]
    problems: list[str]
    """a line for each thing that is wrong"""
    notes: list[str]
    """what the reader must know: how it was understood, and what was left out"""
    default_tier: str = ""
    """the tier that is meant if none is chosen; empty: all"""
    one_tier: bool = False
    """whether segments of two tiers must not be mixed, even if they do not overlap"""


class UnknownFormatError(UserError):
    """A file is no annotation in a format that is understood."""

    def __init__(self, path: Path, found: str) -> None:
        super().__init__(f"{path}: not an annotation: it is {found}; understood are {UNDERSTOOD}")


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
    if FRAMES.fullmatch(text):
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


def is_float(text: str) -> bool:
    try:
        float(text.replace(",", "."))
    except ValueError:
        return False
    return True


def parse_segment(
    start: str, end: str, label: str, delimiter: str, names: Sequence[str]
) -> Segment:
    """A segment from the cells of a table.

    Raises:
        ValueError: what is wrong with it; `names` are those of the two times.
    """
    times = []
    for name, text in zip(names, (start, end), strict=True):
        try:
            times.append(parse_seconds(text, delimiter))
        except ValueError as error:
            raise ValueError(f"{name} is {shorten(text)!r}, {error}") from None
    if times[1] <= times[0]:
        raise ValueError(f"ends at {times[1]:g} s, not after its start, {times[0]:g} s")
    if not label.strip():
        raise ValueError("has no label")
    return Segment(*times, label.strip())


def list_tiers(entries: Iterable[Entry]) -> list[str]:
    """The names of tiers that tell entries apart, in the order of the file."""
    entries = list(entries)
    counts = Counter(tier for entry in entries for tier in dict.fromkeys(entry.tiers))
    return [tier for tier, count in counts.items() if count < len(entries)]
