"""Pictures of a run."""

import math
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MultipleLocator, NullFormatter

from atomic import atomic
from lever_table import TITLES
from timeline import MARKS, Timeline

# Okabe and Ito, https://jfly.uni-koeln.de/color: told apart with every kind of colour vision; those
# of timeline.html
_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442")


def plot_confusion(matrix: np.ndarray, classes: Sequence[str], path: str | Path) -> None:
    """Draw a confusion matrix: colour is the share of the true class, numbers are clips."""
    n = len(classes)
    share = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    side = 2.2 + 0.62 * n
    figure = Figure(figsize=(side + 0.8, side), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(share, vmin=0, vmax=1, cmap="Blues")
    for row, column in np.ndindex(n, n):
        if matrix[row, column]:
            ink = "white" if share[row, column] > 0.55 else "black"
            axes.text(column, row, matrix[row, column], ha="center", va="center", color=ink)
    names = [_plain_text(name if len(name) <= 28 else f"{name[:27]}…") for name in classes]
    axes.set_xticks(range(n), names, rotation=40, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(n), names)
    axes.set(xlabel="predicted", ylabel="true", title=f"{int(matrix.sum())} clips")
    figure.colorbar(image, label="share of the true class", shrink=0.8)
    _save(figure, path)


def plot_curves(history: Sequence[dict[str, Any]], best_epoch: int, path: str | Path) -> None:
    """Draw loss and scores over the epochs, the chosen epoch marked."""
    epochs = [row["epoch"] for row in history]
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for column, style in (("train_loss", "o-"), ("val_loss", "s-")):
        left.plot(epochs, [row[column] for row in history], style, ms=3, label=_words(column))
    for column in ("train_accuracy", "val_accuracy", "val_macro_f1"):
        right.plot(epochs, [row[column] for row in history], "o-", ms=3, label=_words(column))
    right.set_ylim(0, 1.02)
    for axes, name in ((left, "loss"), (right, "score")):
        axes.axvline(best_epoch, color="grey", ls=":", label=f"chosen: epoch {best_epoch}")
        axes.set(xlabel="epoch", ylabel=name)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    _save(figure, path)


def plot_tradeoff(
    latency: np.ndarray,
    scores: np.ndarray,
    labels: Sequence[str],
    front: Sequence[int],
    names: tuple[str, str],
    path: str | Path,
) -> None:
    """Draw scores against latencies: the Pareto front as a line, models that are not on it hollow.

    Args:
        latency: `(N,)`, above zero.
        scores: `(N, 3)` score, low and high; NaN: no interval is drawn.
        front: places of the models that no other beats, the fastest first.
        names: of the axes.
    """
    figure = Figure(figsize=(9, max(4.2, 1.5 + 0.25 * len(labels))), layout="constrained")
    axes = figure.subplots()
    axes.step(latency[front], scores[front, 0], "k--", where="post", lw=1.2)
    for n, (x, (y, low, high)) in enumerate(zip(latency, scores, strict=True)):
        look = {"marker": "o"} if n in front else {"marker": "D", "mfc": "white"}
        axes.plot([x, x], [low, high], f"C{n % 10}")
        axes.plot([x], [y], f"C{n % 10}", ms=8, mew=1.5, **look)
    wide = latency.max() > 10 * latency.min()
    axes.set(xlabel=names[0], ylabel=names[1], xscale="log", title="better: up and to the left")
    axes.set_xlim(latency.min() / 1.6, latency.max() * 1.6)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if wide else (1, 1.5, 2, 3, 4, 5, 7)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.3)
    axes.plot([], [], "ko--", lw=1.2, label="Pareto front: no other beats it")
    axes.plot([], [], "kD", mfc="white", label="beaten: another is as fast and as good, or better")
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    _label_beside(axes, latency, scores[:, 0], labels)
    _save(figure, path)


def _label_beside(axes: Axes, x: np.ndarray, y: np.ndarray, labels: Sequence[str]) -> None:
    """Name points in a column right of the axes, a line from each: no name lies on another."""
    low, high = axes.get_ylim()
    gap = 0.06 * 4.2 / axes.figure.get_figheight()
    order = np.lexsort((-x, y))  # from the lowest up
    step = gap * np.arange(len(y))
    wanted = (y[order] - low) / (high - low) - step
    upward, downward = np.maximum.accumulate(wanted), np.minimum.accumulate(wanted[::-1])[::-1]
    places = np.clip((upward + downward) / 2 + step, step, 1 - step[::-1])
    for n, place in zip(order, places, strict=True):
        name = labels[n] if len(labels[n]) < 40 else f"{labels[n][:18]}...{labels[n][-18:]}"
        axes.annotate(
            _plain_text(name),
            (x[n], y[n]),
            (1.03, place),
            textcoords="axes fraction",
            va="center",
            color=f"C{n % 10}",
            arrowprops={"arrowstyle": "-", "color": f"C{n % 10}", "lw": 0.6, "relpos": (0, 0.5)},
            zorder=0,
        )


def plot_lengths(table: pd.DataFrame, path: str | Path) -> None:
    """Draw memory and time of training steps against the frames a clip, dashed: checkpointed.

    Args:
        table: the columns model, frames, and training and checkpointed in (MB) and (ms/clip).
    """
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    for axes, unit, name in zip(
        figure.subplots(1, 2), ("(MB)", "(ms/clip)"), ("peak memory (MB)", "ms a clip"), strict=True
    ):
        for number, (model, some) in enumerate(table.groupby("model", sort=False)):
            look = {"color": _COLOURS[number % len(_COLOURS)], "ms": 4}
            axes.plot(some["frames"], some[f"training {unit}"], "o-", **look, label=model)
            axes.plot(some["frames"], some[f"checkpointed {unit}"], "o--", mfc="white", **look)
        axes.set(xlabel="frames a clip", ylabel=name, xscale="log", yscale="log")
        axes.set_xticks(frames := sorted(table["frames"].unique()), frames)
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_minor_formatter(NullFormatter())
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    axes.plot([], [], "ko--", ms=4, mfc="white", label="with gradient checkpointing")
    lines = axes.get_legend_handles_labels()
    figure.legend(*lines, loc="outside lower center", ncols=5, fontsize=8, frameon=False)
    figure.suptitle("a training step", fontsize=10)
    _save(figure, path)


def plot_differences(table: pd.DataFrame, path: str | Path) -> None:
    """Draw what each lever of a `lever_table` gains over the recipe, the largest gain on top.

    A filled point's interval leaves out zero.
    """
    table = table.iloc[1:].sort_values("macro_f1 gain")
    figure = Figure(figsize=(9, 1.6 + 0.28 * len(table)), layout="constrained")
    sides = figure.subplots(1, 2, sharey=True)
    for axes, (name, title) in zip(sides, TITLES.items(), strict=True):
        for place, (_, row) in enumerate(table.iterrows()):
            low, high = row[f"{name} gain low"], row[f"{name} gain high"]
            sure = low > 0 or high < 0
            axes.plot([low, high], [place, place], "C0", lw=1.2)
            axes.plot(row[f"{name} gain"], place, "C0o", mfc="C0" if sure else "white")
        axes.axvline(0, color="k", lw=0.8)
        axes.grid(axis="x", alpha=0.3)
        axes.set(title=f"{title}: gain over the recipe", xlabel="bars: 95 % intervals")
    sides[0].set_yticks(range(len(table)), [_plain_text(lever) for lever in table["lever"]])
    _save(figure, path)


def plot_robustness(table: pd.DataFrame, clean: float, path: str | Path) -> None:
    """Draw accuracy against severity, a panel a corruption, the clean accuracy as a line.

    Args:
        table: the columns corruption, severity, accuracy.
    """
    names = list(table["corruption"].unique())
    columns = min(5, len(names))
    rows = math.ceil(len(names) / columns)
    figure = Figure(figsize=(2.3 * columns + 0.4, 2.1 * rows + 0.4), layout="constrained")
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for axes, name in zip_longest(panels.flat, names):
        if name is None:
            axes.set_visible(False)
            continue
        some = table[table["corruption"] == name]
        axes.axhline(clean, color="grey", ls=":", label="clean")
        axes.plot(some["severity"], some["accuracy"], "o-", ms=4)
        axes.set_title(name.replace("_", " "), fontsize=9)
        axes.set(ylim=(0, 1.02), xticks=sorted(some["severity"]))
        axes.grid(alpha=0.3)
    panels[0, 0].legend(fontsize=8)
    figure.supxlabel("severity", fontsize=9)
    figure.supylabel("accuracy", fontsize=9)
    _save(figure, path)


def plot_timeline(timeline: Timeline, path: str | Path) -> None:
    """Draw a row for each class, its segments as bars over its probability, and one for what is no
    class. Whoever needs details opens timeline.html."""
    rows = [
        *timeline.classes,
        *dict.fromkeys(s.label for s in timeline.segments if s.label in MARKS),
    ]
    figure = Figure(figsize=(12, 1.1 + 0.42 * len(rows)), layout="constrained")
    axes = figure.subplots()
    step = math.ceil(len(timeline.times) / 3000) or 1  # more than there are pixels
    for row, name in enumerate(rows):
        bars = [(s.start, s.duration) for s in timeline.segments if s.label == name]
        if name in MARKS:
            look = {"facecolor": "none", "edgecolor": "0.35", "hatch": "////", "lw": 0.5}
        else:
            look = {"facecolor": _COLOURS[row % len(_COLOURS)], "edgecolor": "none"}
            if len(timeline.times):
                curve = timeline.probabilities[::step, row]
                base = np.full(len(curve), row + 0.4)
                axes.fill_between(timeline.times[::step], base, base - 0.8 * curve, color="0.85")
        axes.broken_barh(bars, (row + 0.05, 0.35), **look)
    axes.set_yticks(range(len(rows)), [_plain_text(name) for name in rows])
    axes.set(xlim=(0, timeline.duration), ylim=(len(rows) - 0.5, -0.5), xlabel="time")
    axes.xaxis.set_major_locator(MultipleLocator(_tick(timeline.duration)))
    axes.xaxis.set_major_formatter(lambda seconds, _: _minutes(seconds))
    axes.set_title(_plain_text(timeline.name), fontsize=10)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    _save(figure, path)


def _tick(duration: float) -> float:
    """Seconds between the marks of a time axis: at most fifteen, on round times."""
    steps = [k * unit for unit in (1, 60, 3600) for k in (1, 2, 5, 10, 15, 30)]
    return next((step for step in steps if duration <= 15 * step), duration / 10)


def _minutes(seconds: float) -> str:
    """`1:02:03`, or `2:03` below an hour."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def _save(figure: Figure, path: str | Path) -> None:
    with atomic(path) as unfinished:
        figure.savefig(unfinished, dpi=120)


def _words(column: str) -> str:
    return column.replace("val_", "validation ").replace("train_", "training ").replace("_", " ")


def _plain_text(name: str) -> str:
    return name.replace("$", r"\$")  # a class name is no formula
