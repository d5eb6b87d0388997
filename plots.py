"""Pictures of a run."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from atomic import atomic


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
    names = [_plain_text(name) for name in classes]
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


def _save(figure: Figure, path: str | Path) -> None:
    with atomic(path) as unfinished:
        figure.savefig(unfinished, dpi=120)


def _words(column: str) -> str:
    return column.replace("val_", "validation ").replace("train_", "training ").replace("_", " ")


def _plain_text(name: str) -> str:
    return name.replace("$", r"\$")  # a class name is no formula
