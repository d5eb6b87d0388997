"""The geometry of a report's charts, which templates/charts.html.j2 draws as SVG.

All lengths are in units of a viewBox that is 360 wide. On a phone a unit is about a pixel, so that
text stays readable there; on wider screens the charts are enlarged.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from utils.text_table import shorten
from web.templating import break_points

WIDTH = 360

_NAME_LENGTH = 14  # characters of a name that fit into one line beside a dot

_MAX_POINTS = 400  # of a line: more cannot be seen and only make the page larger


@dataclass(frozen=True)
class Axis:
    """A linear scale with its ticks."""

    label: str
    low: float
    high: float
    ticks: Sequence[float]
    percent: bool = False

    def text(self, value: float) -> str:
        """The text at a tick."""
        return f"{100 * value:.0f}" if self.percent else f"{value:g}"

    def position(self, value: float) -> float:
        """Where a value is on the axis: 0 at its low end, 1 at its high end."""
        return min(1.0, max(0.0, (value - self.low) / (self.high - self.low)))


@dataclass(frozen=True)
class Line:
    """A line through points."""

    name: str
    style: str
    """report.css has its colour and dashes"""
    points: Sequence[tuple[float, float]]
    thin: bool = False


@dataclass(frozen=True)
class Mark:
    """A single point."""

    x: float
    y: float
    style: str
    title: str
    radius: float = 4.0


@dataclass(frozen=True)
class Chart:
    """Lines and marks over two axes."""

    label: str
    """what a screen reader reads out instead of the chart"""
    x: Axis
    y: Axis
    lines: Sequence[Line] = ()
    marks: Sequence[Mark] = ()
    vertical: float | None = None
    """value of x at which a dotted line is drawn"""
    horizontal: float | None = None
    """value of y at which a dashed line is drawn"""
    keys: Sequence[tuple[str, str]] = ()
    """style and text of each entry of the legend"""
    height: int = 260
    left: int = 48
    right: int = 12
    top: int = 10
    bottom: int = 42

    def px(self, value: float) -> float:
        """The horizontal coordinate of a value of x."""
        return round(self.left + self.x.position(value) * (WIDTH - self.left - self.right), 1)

    def py(self, value: float) -> float:
        """The vertical coordinate of a value of y."""
        return round(self.height - self.bottom - self.y.position(value) * self.inner_height, 1)

    def path(self, points: Sequence[tuple[float, float]]) -> str:
        """The coordinates of a polyline."""
        return " ".join(f"{self.px(x)},{self.py(y)}" for x, y in points)

    @property
    def inner_height(self) -> int:
        return self.height - self.top - self.bottom


@dataclass(frozen=True)
class Row:
    """A row of a RowChart: one value as a dot, and possibly a second one with an interval."""

    name: str
    value: float | None
    """None: there is nothing to draw, and `note` says why"""
    note: str = ""
    title: str = ""
    radius: float = 5.0
    second: float | None = None
    interval: Sequence[float] | None = None

    def lines(self, max_lines: int) -> list[str]:
        """The name in at most `max_lines` lines that fit beside the dot, shortened with …"""
        lines = [""]
        for part in break_points(self.name):
            for word in re.split(r"(?<=\s)", part):
                if lines[-1] and len(lines[-1] + word.rstrip()) > _NAME_LENGTH:
                    lines.append("")
                lines[-1] += word
        if len(lines) > max_lines:
            lines = [*lines[: max_lines - 1], "".join(lines[max_lines - 1 :])]
        return [shorten(line.strip(), _NAME_LENGTH) for line in lines]


@dataclass(frozen=True)
class RowChart:
    """Named rows over one axis."""

    label: str
    axis: Axis
    rows: Sequence[Row]
    row_height: int = 20
    reference: float | None = None
    """value at which a dashed line is drawn"""
    left: int = 132
    right: int = 76
    bottom: int = 42

    @property
    def name_lines(self) -> int:
        """How many lines a name may have."""
        return 2 if self.row_height >= 30 else 1

    @property
    def name_width(self) -> int:
        """The width of the room for a name."""
        return self.left - 12

    def is_wide(self, line: str) -> bool:
        """Whether a line of a name may need more room than there is, at 12 units per em."""
        em = sum(0.63 if c.islower() or not c.isalpha() else 1.0 for c in line)
        return 12 * em > self.name_width

    @property
    def bottom_line(self) -> int:
        """The vertical coordinate of the lower end of the rows."""
        return 6 + len(self.rows) * self.row_height

    def px(self, value: float) -> float:
        width = WIDTH - self.left - self.right
        return round(self.left + self.axis.position(value) * width, 1)

    def py(self, index: int) -> float:
        """The vertical coordinate of a row."""
        return 6 + (index + 0.5) * self.row_height


@dataclass(frozen=True)
class Whisker:
    """The estimate of a headline card on its scale, with its two intervals."""

    label: str
    value: float
    high: float
    """the upper end of the scale, which begins at 0"""
    ends: tuple[str, str]
    """texts at both ends of the scale"""
    wide: Sequence[float] | None = None
    """the interval over patients"""
    naive: Sequence[float] | None = None
    """the interval over clips"""
    baseline: float | None = None

    def px(self, value: float) -> float:
        return round(8 + min(1.0, max(0.0, value / self.high)) * 184, 1)


@dataclass(frozen=True)
class Histogram:
    """Counts as bars, with the number at each bar."""

    label: str
    x: Axis
    bars: Sequence[tuple[float, float, int]]
    """low end, high end and count of each bar"""
    left: int = 48
    right: int = 12
    height: int = 112
    bottom: int = 6
    heights: Sequence[float] = field(init=False)

    def __post_init__(self) -> None:
        highest = max((count for *_, count in self.bars), default=1)
        object.__setattr__(self, "heights", [66 * count / highest for *_, count in self.bars])

    def px(self, value: float) -> float:
        return round(self.left + self.x.position(value) * (WIDTH - self.left - self.right), 1)


def fraction_axis(label: str) -> Axis:
    """An axis from 0 to 100 %."""
    return Axis(label, 0, 1, (0, 0.25, 0.5, 0.75, 1), percent=True)


def nice_axis(
    label: str, low: float, high: float, integer: bool = False, intervals: int = 6
) -> Axis:
    """An axis whose ticks are 1, 2 or 5 times a power of ten apart.

    Args:
        low, high: the range of the values.
        integer: the ticks are integers (epochs), and the axis ends exactly at `low` and `high`.
        intervals: about how many intervals between ticks there may be.
    """
    if not high > low:
        low, high = low - 0.5 * integer, low + (0.5 if integer else max(1e-3, abs(low)))
    step = _step((high - low) / intervals)
    step = max(1, step) if integer else step
    first = math.ceil(low / step - 1e-9) if integer else math.floor(low / step + 1e-9)
    last = math.floor(high / step + 1e-9) if integer else math.ceil(high / step - 1e-9)
    ticks = [float(f"{number * step:.6g}") for number in range(first, last + 1)]
    return Axis(label, *((low, high) if integer else (ticks[0], ticks[-1])), ticks)


def percent_axis(label: str, high: float) -> Axis:
    """An axis from 0 to a round number of per cent above `high`, for small fractions."""
    in_percent = nice_axis(label, 0, min(1.0, max(high, 0.01)) * 100, intervals=5)
    ticks = [tick / 100 for tick in in_percent.ticks]
    return Axis(label, 0, ticks[-1], ticks, percent=True)


def downsample(x: np.ndarray, y: np.ndarray) -> list[tuple[float, float]]:
    """At most 400 evenly chosen points of a line, without those that are not finite."""
    indices = np.unique(np.linspace(0, len(x) - 1, min(len(x), _MAX_POINTS)).round().astype(int))
    pairs = [(float(x[i]), float(y[i])) for i in indices]
    return [pair for pair in pairs if all(map(math.isfinite, pair))]


def radius_for_count(
    count: float, highest: float, smallest: float = 3.0, largest: float = 9.0
) -> float:
    """The radius of a dot whose area is proportional to a count, `largest` for the highest one."""
    return round(max(smallest, largest * math.sqrt(count / max(1, highest))), 1)


def paginate(rows: Sequence[Row], row_height: int, max_height: int = 760) -> list[Sequence[Row]]:
    """The rows in parts that fit on a printed page each."""
    per_page = max_height // row_height
    return [rows[start : start + per_page] for start in range(0, len(rows), per_page)]


def _step(rough: float) -> float:
    """The lowest of 1, 2 and 5 times the powers of ten that is not below `rough`."""
    power = 10 ** math.floor(math.log10(rough))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
