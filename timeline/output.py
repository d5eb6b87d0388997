"""Output folders of predict.py, what it prints, curves of probabilities, and timeline.png."""

import math
import re
import time
from pathlib import Path

import numpy as np

from clips.manifest import NON_CLASS_LABELS, OUT_OF_BODY, UNREADABLE
from evaluation.calibration import Calibration, describe_alternative
from timeline.segments import Timeline
from timeline.sources import FrameSource
from utils.run_dir import sanitize, strip_credentials
from utils.text_table import shorten, text_table

MAX_BINS = 20_000  # per curve; in a video of three hours each one is half a second long

MAX_VALUES = 400_000  # of all curves together: half a megabyte as base64

NO_PREDICTION = 255  # the value of a bin without a prediction


def output_folders(sources: list[str | Path], output: str) -> list[Path]:
    """A folder for each source: `operation.mp4.timeline` beside the video, or below `output`.

    Args:
        sources: paths of files and of folders of images; cameras, addresses and the pipe as text.
        output: folder below which they all lie; empty: see above, for live sources predictions/.
    """
    folders: list[Path] = []
    for source in sources:
        if isinstance(source, Path):
            source = source if source.name not in ("", "..") else source.resolve()
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


def advice(timeline: Timeline, calibration: Calibration) -> list[str]:
    """A note for a timeline whose predictions are all uncertain: what gives answers."""
    labels = {segment.label for segment in timeline.segments}
    if not len(timeline.times) or labels & set(timeline.classes):
        return []
    return [
        "no stretch is given a class: all confidences are below the threshold that "
        f"--target-error {calibration.target_error} asks for; "
        f"{describe_alternative(calibration.alternative())}"
    ]


def summary(timeline: Timeline, seconds: float, frames: FrameSource, folder: Path) -> str:
    """Notes, the time of each label, the speed, and the page to open."""
    durations: dict[str, float] = {}
    for segment in timeline.segments:
        durations[segment.label] = durations.get(segment.label, 0.0) + segment.duration
    longest_first = sorted(durations.items(), key=lambda pair: -pair[1])
    count = len(timeline.segments)
    total = f"{count} segment{'s' * (count != 1)} in {timeline.duration:.1f} s of video"
    if frames.rate:
        total += f" at {frames.rate:.3g} frames per second"
    if not frames.live:
        total += f", {timeline.duration / max(seconds, 1e-9):.1f} times as fast as it plays"
    return "\n".join(
        [
            *(f"note: {note}" for note in timeline.notes),
            text_table([label, f"{duration:.1f} s"] for label, duration in longest_first),
            total,
            f"open {sanitize(str(folder / 'timeline.html'))}",
        ]
    )


def probability_curves(timeline: Timeline, max_bins: int = MAX_BINS) -> np.ndarray:
    """The probabilities of a timeline as curves that are small enough for a page or a picture.

    Bins within stretches that are unreadable or out of the body are NO_PREDICTION.

    Returns:
        `(bins, num_classes)` uint8, see `bin_probabilities`.
    """
    curves = bin_probabilities(timeline.times, timeline.probabilities, timeline.duration, max_bins)
    edges = np.linspace(0, timeline.duration, len(curves) + 1)
    for segment in timeline.segments:
        if segment.label in (UNREADABLE, OUT_OF_BODY):
            is_within = (edges[:-1] >= segment.start) & (edges[1:] <= segment.end + 1e-9)
            curves[is_within] = NO_PREDICTION
    return curves


def bin_probabilities(
    times: np.ndarray, probabilities: np.ndarray, duration: float, max_bins: int = MAX_BINS
) -> np.ndarray:
    """Curves of at most `max_bins` bins.

    A bin holds the mean of its predictions, 0 to 254 for 0 to 1. With means, the classes still add
    up to one and agree with the confidence of the segments. A prediction holds until the next one
    is due, also where the model becomes slower; where there is none, as in a stretch that could not
    be read, the bin is NO_PREDICTION.

    Args:
        times: `(N,)` seconds.
        probabilities: `(N, num_classes)`; rows that are not finite are left out.
        duration: length of the video in seconds.

    Returns:
        `(bins, num_classes)` uint8 over the whole duration.
    """
    num_classes = probabilities.shape[1]
    known = np.isfinite(probabilities).all(axis=1) & (times >= 0) & (times <= duration)
    times, probabilities = times[known], probabilities[known]
    if not len(times) or not num_classes:
        return np.empty((0, num_classes), np.uint8)
    order = np.argsort(times, kind="stable")
    times, probabilities = times[order], probabilities[order]
    steps = np.diff(times)
    interval = float(np.median(steps)) if len(times) > 1 else duration
    max_bins = max(1, min(max_bins, MAX_VALUES // num_classes))
    bins = min(max_bins, math.ceil(duration / interval)) if interval > 0 else max_bins
    edges = np.arange(bins) * (duration / bins)

    index = np.clip(np.searchsorted(edges, times, "right") - 1, 0, bins - 1)
    count = np.bincount(index, minlength=bins)
    sums = [np.bincount(index, weights=column, minlength=bins) for column in probabilities.T]
    means = np.stack(sums, axis=1) / np.maximum(count, 1)[:, None]

    before = np.searchsorted(times, edges, "right") - 1  # the last prediction before each bin
    # A single long step is a gap, but two in a row are a slower model.
    steps = np.append(steps, [0, 0])
    due = times + np.maximum(2 * interval, 1.5 * np.minimum(steps[:-1], steps[1:]))
    is_held = (count == 0) & (before >= 0) & (edges < due[before])
    means[is_held] = probabilities[before[is_held]]
    values = np.round(254 * np.clip(means, 0, 1)).astype(np.uint8)
    values[(count == 0) & ~is_held] = NO_PREDICTION
    return values


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
    curves = probability_curves(timeline, max_bins=3000).astype(float)  # as many as pixels
    curves[curves == NO_PREDICTION] = np.nan
    edges = np.linspace(0, timeline.duration, len(curves) + 1)
    for row, name in enumerate(rows):
        bars = [(s.start, s.duration) for s in timeline.segments if s.label == name]
        if name in NON_CLASS_LABELS:
            style = {"facecolor": "none", "edgecolor": "0.35", "hatch": "////", "lw": 0.5}
        else:
            style = {"facecolor": COLOURS[row % len(COLOURS)], "edgecolor": "none"}
            base = row + 0.05
            top = base - 0.5 * curves[:, row] / 254
            axes.stairs(top, edges, baseline=base, fill=True, color="0.85")
        axes.broken_barh(bars, (row + 0.05, 0.35), **style)
    axes.set_yticks(range(len(rows)), [plain_text(shorten(name, 32)) for name in rows])
    axes.set(xlim=(0, timeline.duration), ylim=(len(rows) - 0.5, -0.5), xlabel="time")
    axes.xaxis.set_major_locator(MultipleLocator(_tick(timeline.duration)))
    axes.xaxis.set_major_formatter(
        lambda seconds, _: format_minutes(seconds) if timeline.duration > 2 else f"{seconds:.1f} s"
    )
    axes.set_title(plain_text(timeline.name), fontsize=10)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    save_figure(figure, path)


def _tick(duration: float) -> float:
    """Seconds between the ticks of a time axis: at most fifteen ticks, at round times."""
    steps = [0.1, *(k * unit for unit in (1, 60, 3600) for k in (1, 2, 5, 10, 15, 30))]
    return next((step for step in steps if duration <= 15 * step), duration / 10)


def format_minutes(seconds: float) -> str:
    """`1:02:03`, or `2:03` below an hour."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
