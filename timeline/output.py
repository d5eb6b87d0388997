"""Output folders of predict.py, and timeline.png."""

import math
import re
import time
from pathlib import Path

import numpy as np

from timeline.segments import NON_CLASS_LABELS, Timeline
from utils.run_dir import strip_credentials


def output_folders(sources: list[str | Path], output: str) -> list[Path]:
    """A folder for each source: `operation.mp4.timeline` beside the video, or below `output`.

    Args:
        sources: paths of files; cameras, addresses and the pipe as text.
        output: folder below which they all lie; empty: see above, for live sources predictions/.
    """
    folders: list[Path] = []
    for source in sources:
        if isinstance(source, Path):
            folder = Path(output or source.parent) / f"{source.name}.timeline"
        else:
            stream = "pipe" if source == "-" else safe_name(strip_credentials(source))
            now = time.strftime("%Y%m%d-%H%M%S")
            folder = Path(output or "predictions") / f"{now}_{stream}.timeline"
        stem, number = folder.stem, 1
        while folder in folders:  # files with the same name in several folders
            number += 1
            folder = folder.with_name(f"{stem}_{number}.timeline")
        folders.append(folder)
    return folders


def safe_name(name: str) -> str:
    """A source's name as part of a file name."""
    return re.sub(r"[^\w.-]+", "_", name).strip("._") or "video"


def plot_timeline(timeline: Timeline, path: str | Path) -> None:
    """Draw one row per class and per other label: segments as bars, the probability above them."""
    # Not above: predict.py --help imports this module.
    from matplotlib.figure import Figure
    from matplotlib.ticker import MultipleLocator

    from evaluation.plots import COLOURS, plain_text, save_figure

    rows = [
        *timeline.classes,
        *dict.fromkeys(s.label for s in timeline.segments if s.label in NON_CLASS_LABELS),
    ]
    figure = Figure(figsize=(12, 1.1 + 0.42 * len(rows)), layout="constrained")
    axes = figure.subplots()
    step = math.ceil(len(timeline.times) / 3000) or 1  # more points than pixels are not visible
    for row, name in enumerate(rows):
        bars = [(s.start, s.duration) for s in timeline.segments if s.label == name]
        if name in NON_CLASS_LABELS:
            style = {"facecolor": "none", "edgecolor": "0.35", "hatch": "////", "lw": 0.5}
        else:
            style = {"facecolor": COLOURS[row % len(COLOURS)], "edgecolor": "none"}
            if len(timeline.times):
                curve = timeline.probabilities[::step, row]
                base = np.full(len(curve), row + 0.4)
                axes.fill_between(timeline.times[::step], base, base - 0.8 * curve, color="0.85")
        axes.broken_barh(bars, (row + 0.05, 0.35), **style)
    axes.set_yticks(range(len(rows)), [plain_text(name) for name in rows])
    axes.set(xlim=(0, timeline.duration), ylim=(len(rows) - 0.5, -0.5), xlabel="time")
    axes.xaxis.set_major_locator(MultipleLocator(_tick(timeline.duration)))
    axes.xaxis.set_major_formatter(lambda seconds, _: _minutes(seconds))
    axes.set_title(plain_text(timeline.name), fontsize=10)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    save_figure(figure, path)


def _tick(duration: float) -> float:
    """Seconds between the ticks of a time axis: at most fifteen ticks, at round times."""
    steps = [k * unit for unit in (1, 60, 3600) for k in (1, 2, 5, 10, 15, 30)]
    return next((step for step in steps if duration <= 15 * step), duration / 10)


def _minutes(seconds: float) -> str:
    """`1:02:03`, or `2:03` below an hour."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
