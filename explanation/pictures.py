"""An explained clip as a film strip, and the relevance of frames as a table."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from evaluation import plots
from evaluation.plots import COLOURS
from explanation.coloured_maps import (
    BARS,
    CAUTION,
    METHOD_NAMES,
    OUTLINE,
    answer,
    blend,
    chosen_frames,
    has_outline,
    has_positive,
    legend,
    paint,
    positive_shares,
    question,
    time_text,
)
from explanation.overlay import font, wrap
from explanation.relevance import ExplainedClip
from utils.tables import write_csv

MAX_FRAMES = 32
"""of a film strip"""
ROW = 8
"""frames in a row of a film strip"""

FOR, AGAINST = COLOURS[0], COLOURS[5]
"""colours of the bars above and below the axis"""

HEADER = (
    "clip", "name", "frame", "time", "relevance", "explained", "against", "predicted",
    "confidence", "label", "correct", "method",
)  # fmt: skip


def write_filmstrip(path: str | Path, clip: ExplainedClip) -> None:
    """Draw the frames, the same frames with their maps, and below them the relevance over time.

    A row holds 8 frames. Of a long clip 32 evenly chosen frames are shown, and the bars of the
    others stand between theirs. The name of the clip is not in the picture.
    """
    shown = chosen_frames(len(clip.frames), MAX_FRAMES)
    columns = min(ROW, len(shown))
    rows = math.ceil(len(shown) / columns)
    # All sizes are inches.
    cell = min(2.4, 12 / columns)
    ratio = clip.frames.shape[1] / clip.frames.shape[2]
    tall = cell * min(3.0, max(1 / 3, ratio))
    width = max(8.0, cell * columns + 2.2)
    texts = [(question(clip), "bold"), (answer(clip), "normal")]
    texts.append((f"method: {METHOD_NAMES[clip.method]}", "normal"))
    above = [(line, weight) for text, weight in texts for line in _wrap(text, width, 11, weight)]
    below = [line for text in _notes(clip, len(shown)) for line in _wrap(text, width, 9)]
    head, foot = 0.3 + 0.21 * len(above), 0.2 + 0.19 * len(below)
    bars, per_row = 0.9, 2 * tall + 1.75
    height = head + rows * per_row + foot
    figure = Figure(figsize=(width, height))

    def panel(x: float, y: float, across: float, down: float) -> Axes:
        """Axes at a place that is measured from the upper left corner."""
        left, lower = x / width, 1 - (y + down) / height
        return figure.add_axes((left, lower, across / width, down / height))

    for number, (text, weight) in enumerate(above):
        y = 1 - (0.12 + 0.21 * number) / height
        figure.text(0.15 / width, y, text, va="top", size=11, weight=weight)
    for number, text in enumerate(below):
        y = (foot - 0.05 - 0.19 * number) / height
        figure.text(0.15 / width, y, text, va="top", size=9)
    shares = positive_shares(clip.maps)
    for row in range(rows):
        y = head + row * per_row + 0.25
        in_row = range(row * columns, min((row + 1) * columns, len(shown)))
        for place, index in zip(in_row, shown[in_row.start : in_row.stop], strict=True):
            x = 0.85 + cell * (place - in_row.start)
            frame = clip.frames[index]
            plain = panel(x + 0.02, y, cell - 0.04, tall - 0.04)
            plain.set_title(f"{index + 1}", size=9, pad=3)
            plain.imshow(frame)
            mapped = panel(x + 0.02, y + tall, cell - 0.04, tall - 0.04)
            mapped.imshow(paint(frame, shares[index]))
            for axes in (plain, mapped):
                axes.set_axis_off()
        curve = panel(0.85, y + 2 * tall + 0.08, cell * len(in_row), bars)
        _draw_bars(curve, clip, shown, in_row)
    if has_positive(clip):
        _draw_colour_bar(panel(1.1 + cell * columns, head + 0.25 + tall, 0.18, tall - 0.04), clip)
    plots.save_figure(figure, path)


def _wrap(text: str, width: float, points: float, weight: str = "normal") -> list[str]:
    """The lines of a text that fit into a figure of this width in inches."""
    # Measured at 720 pixels per inch; drawn with fewer, letters are up to 5 % wider.
    room = 0.95 * 720 * (width - 0.3)
    return [line.replace("$", r"\$") for line in wrap(text, room, font(10 * points, weight))]


def _notes(clip: ExplainedClip, shown: int) -> list[str]:
    """The texts below the frames, of which so many are shown."""
    bars = BARS if clip.relevance.any() else "The relevance of every frame is 0."
    if shown < len(clip.frames):
        bars += (
            f" {shown} of the {len(clip.frames)} frames are shown, evenly chosen; the bars are of "
            "all frames."
        )
    return [legend(clip), bars, CAUTION]


def _draw_bars(axes: Axes, clip: ExplainedClip, shown: np.ndarray, in_row: range) -> None:
    """The relevance of the frames of one row, each bar below its frame.

    Args:
        shown: indices of the frames that are shown.
        in_row: which of these are in the row.
    """
    values = clip.relevance
    # A frame that is not shown stands between its neighbours that are.
    x = np.interp(np.arange(len(values)), shown, np.arange(len(shown)))
    colours = np.where(values >= 0, FOR, AGAINST)
    axes.bar(x, values, width=0.7 * np.diff(x).min(initial=1), color=colours)
    axes.axhline(0, color="0.2", lw=0.9)
    low, high = min(0.0, values.min()), max(0.0, values.max())
    room = 0.06 * (high - low) or 1.0
    axes.set(xlim=(in_row.start - 0.5, in_row.stop - 0.5), ylim=(low - room, high + room))
    axes.yaxis.set_major_locator(MaxNLocator(3))
    axes.yaxis.set_major_formatter("{x:.3g}")
    if not high > low:
        axes.set_yticks([0])
    times = [time_text(seconds) for seconds in clip.times[shown[in_row.start : in_row.stop]]]
    numbers = [f"{index + 1}" for index in shown[in_row.start : in_row.stop]]
    axes.set_xticks(list(in_row), times if all(times) else numbers)
    axes.set_xlabel("time in the clip" if all(times) else "frame", size=8, labelpad=2)
    axes.set_ylabel("relevance", size=8)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right", "bottom"]].set_visible(False)


def _draw_colour_bar(axes: Axes, clip: ExplainedClip) -> None:
    """The colours of the map, over the mean colour of the clip."""
    background = np.broadcast_to(clip.frames.mean(axis=(0, 1, 2)), (256, 1, 3))
    image = blend(background, np.linspace(0, 1, 256)[:, None])
    axes.imshow(image, origin="lower", aspect="auto", extent=(0, 1, 0, 1))
    if has_outline(clip):
        axes.axhline(0.5, color=OUTLINE / 255, lw=2)
    axes.yaxis.tick_right()
    axes.set_xticks([])
    axes.set_yticks([0, 0.5, 1], ["none", "half", "highest\nin clip"], size=8)


def write_relevance(path: str | Path, clips: Sequence[ExplainedClip]) -> None:
    """Write the relevance of all frames of all clips as a CSV with the columns of `HEADER`.

    Clips and frames are counted from 1, as in the pictures. `time` is in seconds and empty where
    it is unknown; `correct` is 1, 0 or, without a true class, empty. The names may name patients.
    """
    rows: list[Sequence[object]] = [HEADER]
    for number, clip in enumerate(clips, 1):
        correct = "" if clip.correct is None else int(clip.correct)
        answered = clip.explained, clip.against, clip.predicted, f"{clip.confidence:.6g}"
        for frame, (seconds, value) in enumerate(zip(clip.times, clip.relevance, strict=True), 1):
            time = f"{seconds:.3f}" if math.isfinite(seconds) else ""
            mine = number, clip.name, frame, time, f"{value:.6g}"
            rows.append((*mine, *answered, clip.label, correct, clip.method))
    write_csv(path, rows)
