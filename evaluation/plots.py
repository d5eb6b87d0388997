"""Figures of runs with matplotlib: confusion matrix, training curves, trade-off, robustness.

Importing matplotlib takes a second: other modules import this one inside the functions that draw.
"""

import math
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.ticker import LogLocator, NullFormatter

from utils.files import atomic
from utils.text_table import shorten

if TYPE_CHECKING:
    import pandas as pd

# The palette of Okabe and Ito, https://jfly.uni-koeln.de/color, which people with any kind of
# colour vision can distinguish. web/templates/timeline_styles.js has the same colours.
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442")


def plot_confusion(matrix: np.ndarray, classes: Sequence[str], path: str | Path) -> None:
    """Draw a confusion matrix: colours are fractions of the true class, numbers are clips.

    The row of a class without clips is grey.

    Args:
        matrix: `(num_classes, num_classes)` counts, rows are the true classes.
    """
    n = len(classes)
    totals = matrix.sum(axis=1, keepdims=True)
    fraction = np.where(totals, matrix / np.maximum(totals, 1), np.nan)
    side = 2.2 + 0.62 * n
    figure = Figure(figsize=(side + 0.8, side), layout="constrained")
    axes = figure.subplots()
    axes.set_facecolor("0.9")  # seen where the fraction is not a number
    image = axes.imshow(fraction, vmin=0, vmax=1, cmap="Blues")
    for row in np.flatnonzero(totals == 0):
        axes.text((n - 1) / 2, row, "no clips", ha="center", va="center", color="0.35")
    for row, column in np.ndindex(n, n):
        if matrix[row, column]:
            text_colour = "white" if fraction[row, column] > 0.55 else "black"
            axes.text(column, row, matrix[row, column], ha="center", va="center", color=text_colour)
    names = [plain_text(shorten(name, 28)) for name in classes]
    axes.set_xticks(range(n), names, rotation=40, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(n), names)
    axes.set(xlabel="predicted", ylabel="true", title=f"{int(matrix.sum())} clips")
    figure.colorbar(image, label="fraction of the true class", shrink=0.8)
    save_figure(figure, path)


def plot_curves(history: Sequence[dict[str, Any]], best_epoch: int, path: str | Path) -> None:
    """Draw the loss and the scores over the epochs, and a line at the epoch that was kept.

    Args:
        history: one dict per epoch, with the columns of metrics.csv.
    """
    epochs = [row["epoch"] for row in history]
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for column, style in (("train_loss", "o-"), ("val_loss", "s-")):
        left.plot(epochs, [row[column] for row in history], style, ms=3, label=_series_name(column))
    for column in ("train_accuracy", "val_accuracy", "val_macro_f1"):
        right.plot(epochs, [row[column] for row in history], "o-", ms=3, label=_series_name(column))
    right.set_ylim(0, 1.02)
    for axes, name in ((left, "loss"), (right, "score")):
        axes.axvline(best_epoch, color="grey", ls=":", label=f"kept: epoch {best_epoch}")
        axes.set(xlabel="epoch", ylabel=name)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    save_figure(figure, path)


def plot_tradeoff(
    latency: np.ndarray,
    scores: np.ndarray,
    labels: Sequence[str],
    front: Sequence[int],
    axis_labels: tuple[str, str],
    path: str | Path,
) -> None:
    """Draw scores against latencies, and a line through the models on the Pareto front.

    Args:
        latency: `(N,)`, above zero.
        scores: `(N, 3)`: the score and both ends of its interval (NaN: no interval is drawn).
        labels: names of the N models.
        front: indices of the models on the Pareto front, the fastest first.
        axis_labels: of the horizontal and the vertical axis.
    """
    figure = Figure(figsize=(9, max(4.2, 1.5 + 0.25 * len(labels))), layout="constrained")
    axes = figure.subplots()
    axes.step(latency[front], scores[front, 0], "k--", where="post", lw=1.2)
    for n, (x, (y, low, high)) in enumerate(zip(latency, scores, strict=True)):
        style = {"marker": "o"} if n in front else {"marker": "D", "mfc": "white"}
        axes.plot([x, x], [low, high], f"C{n % 10}")
        axes.plot([x], [y], f"C{n % 10}", ms=8, mew=1.5, **style)
    wide = latency.max() > 10 * latency.min()
    axes.set(
        xlabel=axis_labels[0],
        ylabel=axis_labels[1],
        xscale="log",
        title="better: up and to the left",
    )
    axes.set_xlim(latency.min() / 1.6, latency.max() * 1.6)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if wide else (1, 1.5, 2, 3, 4, 5, 7)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.3)
    axes.plot([], [], "ko--", lw=1.2, label="on the Pareto front")
    axes.plot(
        [], [], "kD", mfc="white", label="dominated: another model is at least as fast and as good"
    )
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    _label_beside(axes, latency, scores[:, 0], labels)
    save_figure(figure, path)


def _label_beside(axes: Axes, x: np.ndarray, y: np.ndarray, labels: Sequence[str]) -> None:
    """Write the labels of points right of the axes, with a line to each point.

    The labels are spread vertically, so that they do not overlap.
    """
    low, high = axes.get_ylim()
    gap = 0.06 * 4.2 / axes.figure.get_figheight()
    order = np.lexsort((-x, y))  # from the lowest point upwards
    step = gap * np.arange(len(y))
    target = (y[order] - low) / (high - low) - step
    upward, downward = np.maximum.accumulate(target), np.minimum.accumulate(target[::-1])[::-1]
    heights = np.clip((upward + downward) / 2 + step, step, 1 - step[::-1])
    for n, height in zip(order, heights, strict=True):
        axes.annotate(
            plain_text(shorten(labels[n], 40)),
            (x[n], y[n]),
            (1.03, height),
            textcoords="axes fraction",
            va="center",
            color=f"C{n % 10}",
            arrowprops={"arrowstyle": "-", "color": f"C{n % 10}", "lw": 0.6, "relpos": (0, 0.5)},
            zorder=0,
        )


def plot_robustness(table: "pd.DataFrame", clean: float, path: str | Path) -> None:
    """Draw accuracy against severity, one panel per corruption.

    Args:
        table: the columns corruption, severity, accuracy.
        clean: accuracy on clean clips, drawn as a line.
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
        panel = table[table["corruption"] == name]
        axes.axhline(clean, color="grey", ls=":", label="clean")
        axes.plot(panel["severity"], panel["accuracy"], "o-", ms=4)
        axes.set_title(name.replace("_", " "), fontsize=9)
        axes.set(ylim=(0, 1.02), xticks=sorted(panel["severity"]))
        axes.grid(alpha=0.3)
    panels[0, 0].legend(fontsize=8)
    figure.supxlabel("severity", fontsize=9)
    figure.supylabel("accuracy", fontsize=9)
    save_figure(figure, path)


def save_figure(figure: Figure, path: str | Path) -> None:
    """Write a figure atomically, in the format of the path's suffix."""
    with atomic(path) as unfinished:
        figure.savefig(unfinished, dpi=120)


def _series_name(column: str) -> str:
    name = column.replace("val_", "validation ").replace("train_", "training ")
    return name.replace("macro_f1", "macro-F1").replace("_", " ")


def plain_text(name: str) -> str:
    """A name as matplotlib can draw it: `drawable_text`, and no formula."""
    return drawable_text(name).replace("$", r"\$")  # text between dollar signs would be a formula


def drawable_text(name: str) -> str:
    """A name in which the letters that matplotlib's font lacks, such as emoji, are □."""
    drawable = get_font(findfont(FontProperties())).get_charmap()
    marks = "\ufe0e\ufe0f\u200d"  # they choose or join emoji, and are not seen by themselves
    return "".join(c if ord(c) in drawable else "□" for c in name if c not in marks)
