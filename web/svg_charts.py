"""Where things are in a report's charts; templates/charts.html.j2 draws them as SVG.

All lengths are units of a viewBox 360 wide: about a phone's pixels, so that text stays readable
there, and drawn larger elsewhere.
"""

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

WIDTH = 360

_NAME_LENGTH = 14  # characters beside a dot

_MOST_POINTS = 400  # of a line: more cannot be seen and only make the page heavy


@dataclass(frozen=True)
class Axis:
    """A linear scale with its ticks."""

    label: str
    low: float
    high: float
    ticks: Sequence[float]
    percent: bool = False

    def text(self, value: float) -> str:
        return f"{100 * value:.0f}" if self.percent else f"{value:g}"

    def share(self, value: float) -> float:
        """0 at the low end, 1 at the high one."""
        return min(1.0, max(0.0, (value - self.low) / (self.high - self.low)))


@dataclass(frozen=True)
class Line:
    """A line through points; `style` names its look in report.css, the dashes included."""

    name: str
    style: str
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
    """what a screen reader says instead of it"""
    x: Axis
    y: Axis
    lines: Sequence[Line] = ()
    marks: Sequence[Mark] = ()
    vertical: float | None = None
    """where a dotted line stands"""
    horizontal: float | None = None
    keys: Sequence[tuple[str, str]] = ()
    """(style, words) of the legend"""
    height: int = 260
    left: int = 48
    right: int = 12
    top: int = 10
    bottom: int = 42

    def px(self, value: float) -> float:
        return round(self.left + self.x.share(value) * (WIDTH - self.left - self.right), 1)

    def py(self, value: float) -> float:
        return round(self.height - self.bottom - self.y.share(value) * self.inner_height, 1)

    def path(self, points: Sequence[tuple[float, float]]) -> str:
        return " ".join(f"{self.px(x)},{self.py(y)}" for x, y in points)

    @property
    def inner_height(self) -> int:
        return self.height - self.top - self.bottom


@dataclass(frozen=True)
class Row:
    """A line of a RowChart: a dot, and perhaps a second one with an interval."""

    name: str
    value: float | None
    """None: nothing to show, `note` says why"""
    note: str = ""
    title: str = ""
    radius: float = 5.0
    second: float | None = None
    interval: Sequence[float] | None = None

    def lines(self, most: int) -> list[str]:
        """The name as it fits beside the dot, in `most` lines."""
        wrapped = textwrap.wrap(self.name, _NAME_LENGTH) or [""]
        if len(wrapped) > most:
            wrapped = [*wrapped[: most - 1], wrapped[most - 1][: _NAME_LENGTH - 1] + "…"]
        return wrapped


@dataclass(frozen=True)
class RowChart:
    """Named rows over one axis."""

    label: str
    axis: Axis
    rows: Sequence[Row]
    row_height: int = 20
    reference: float | None = None
    left: int = 132
    right: int = 76
    bottom: int = 42

    @property
    def name_lines(self) -> int:
        return 2 if self.row_height >= 30 else 1

    @property
    def bottom_line(self) -> int:
        return 6 + len(self.rows) * self.row_height

    def px(self, value: float) -> float:
        width = WIDTH - self.left - self.right
        return round(self.left + self.axis.share(value) * width, 1)

    def py(self, number: int) -> float:
        return 6 + (number + 0.5) * self.row_height


@dataclass(frozen=True)
class Whisker:
    """A card's estimate on its scale, with the wide and the naive interval."""

    label: str
    value: float
    high: float
    """the scale goes from 0 to here"""
    ends: tuple[str, str]
    wide: Sequence[float] | None = None
    naive: Sequence[float] | None = None
    baseline: float | None = None

    def px(self, value: float) -> float:
        return round(8 + min(1.0, max(0.0, value / self.high)) * 184, 1)


@dataclass(frozen=True)
class Histogram:
    """Bars of counts, each with its number."""

    label: str
    x: Axis
    bars: Sequence[tuple[float, float, int]]
    """(low end, high end, count)"""
    left: int = 48
    right: int = 12
    height: int = 112
    bottom: int = 6
    heights: Sequence[float] = field(init=False)

    def __post_init__(self) -> None:
        most = max((count for *_, count in self.bars), default=1)
        object.__setattr__(self, "heights", [66 * count / most for *_, count in self.bars])

    def px(self, value: float) -> float:
        return round(self.left + self.x.share(value) * (WIDTH - self.left - self.right), 1)


def share_axis(label: str) -> Axis:
    """0 to 100 %."""
    return Axis(label, 0, 1, (0, 0.25, 0.5, 0.75, 1), percent=True)


def nice_axis(label: str, low: float, high: float, whole: bool = False, most: int = 6) -> Axis:
    """An axis around values whose ticks are 1, 2 or 5 times a power of ten apart.

    Args:
        whole: ticks are whole numbers (epochs) and the axis ends at its values.
    """
    if not high > low:
        low, high = low - 0.5 * whole, low + (0.5 if whole else max(1e-3, abs(low)))
    step = _step((high - low) / most)
    step = max(1, step) if whole else step
    first = math.ceil(low / step - 1e-9) if whole else math.floor(low / step + 1e-9)
    last = math.floor(high / step + 1e-9) if whole else math.ceil(high / step - 1e-9)
    ticks = [float(f"{number * step:.6g}") for number in range(first, last + 1)]
    return Axis(label, *((low, high) if whole else (ticks[0], ticks[-1])), ticks)


def percent_axis(label: str, high: float) -> Axis:
    """0 % to a round number of per cent above `high`, for shares that are small."""
    found = nice_axis(label, 0, min(1.0, max(high, 0.01)) * 100, most=5)
    ticks = [tick / 100 for tick in found.ticks]
    return Axis(label, 0, ticks[-1], ticks, percent=True)


def thinned(x: np.ndarray, y: np.ndarray) -> list[tuple[float, float]]:
    """The points of a line, or evenly chosen ones of too many; those without a value left out."""
    chosen = np.unique(np.linspace(0, len(x) - 1, min(len(x), _MOST_POINTS)).round().astype(int))
    pairs = [(float(x[i]), float(y[i])) for i in chosen]
    return [pair for pair in pairs if all(map(math.isfinite, pair))]


def area(clips: float, most: float, smallest: float = 3.0, largest: float = 9.0) -> float:
    """The radius of a dot whose area tells how many clips it stands for."""
    return round(max(smallest, largest * math.sqrt(clips / max(1, most))), 1)


def pages(rows: Sequence[Row], row_height: int, tallest: int = 760) -> list[Sequence[Row]]:
    """Rows in portions that a printed page holds."""
    most = tallest // row_height
    return [rows[start : start + most] for start in range(0, len(rows), most)]


def _step(rough: float) -> float:
    power = 10 ** math.floor(math.log10(rough))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
