"""Figures of runs with matplotlib: results of a test, training curves, trade-off, robustness.

Importing matplotlib takes a second: other modules import this one inside the functions that draw.
"""

import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.ticker import LogLocator, NullFormatter

from evaluation.embedding import Embedding, neighbour_agreement, patient_numbers
from evaluation.metrics import average_precision, precision_recall
from evaluation.predictions import Predictions
from utils.files import atomic
from utils.text_table import shorten

if TYPE_CHECKING:
    import pandas as pd

# The palette of Okabe and Ito, https://jfly.uni-koeln.de/color, which people with any kind of
# colour vision can distinguish. web/templates/timeline_styles.js has the same colours.
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442")


def plot_confusion(matrix: np.ndarray, classes: Sequence[str], path: str | Path) -> None:
    """Draw a confusion matrix: in each cell the clips, and below them their share of the row.

    The row of a class without clips is grey.

    Args:
        matrix: `(num_classes, num_classes)` counts, rows are the true classes.
    """
    n = len(classes)
    totals = matrix.sum(axis=1, keepdims=True)
    fraction = np.where(totals, matrix / np.maximum(totals, 1), np.nan)
    cell, sizes = (0.66, (10, 7.5)) if n <= 15 else (0.46, (7.5, 6))  # inches; points of both lines
    names = [plain_text(shorten(name, 28)) for name in classes]
    longest = max(map(len, names))
    # Inches of a letter: beside the rows, and below the columns, where the names are slanted.
    inches = cell * n + 0.09 * longest + 2.4, cell * n + 0.06 * longest + 1.2
    figure = Figure(figsize=inches, layout="constrained")
    axes = figure.subplots()
    axes.set_facecolor("0.9")  # seen where the fraction is not a number
    image = axes.imshow(fraction, vmin=0, vmax=1, cmap="Blues")
    for row in np.flatnonzero(totals == 0):
        axes.text((n - 1) / 2, row, "no clips", ha="center", va="center", color="0.35")
    for row, column in np.argwhere(matrix):
        colour = "white" if fraction[row, column] > 0.55 else "black"
        texts = (f"{matrix[row, column]}", "bottom"), (f"{fraction[row, column]:.0%}", "top")
        for (text, side_of_middle), size in zip(texts, sizes, strict=True):
            axes.text(column, row, text, ha="center", va=side_of_middle, color=colour, size=size)
    axes.set_xticks(range(n), names, rotation=40, ha="right", rotation_mode="anchor")
    counted = [f"{name}  ({total})" for name, total in zip(names, totals[:, 0], strict=True)]
    axes.set_yticks(range(n), counted)
    axes.set(xlabel="predicted", ylabel="true (clips)")
    figure.suptitle(f"{int(matrix.sum())} clips: number, and share of the true class", fontsize=11)
    label = "share of the true class"
    figure.colorbar(image, label=label, shrink=0.8, fraction=0.8 / inches[0], aspect=30)
    save_figure(figure, path)


def plot_precision_recall(
    labels: np.ndarray, probabilities: np.ndarray, classes: Sequence[str], path: str | Path
) -> None:
    """Draw the precision-recall curve of each class against all others, one panel per class.

    The area under a curve, which is drawn in steps, is the average precision in its title. A class
    without clips has no curve, and its panel says so.
    """
    columns = min(8, math.ceil((1.6 * len(classes)) ** 0.5))
    panels, figure = _panels(len(classes), columns, 2.3, 2.35)
    average = average_precision(labels, probabilities)
    for label, (axes, name) in enumerate(zip(panels, classes, strict=True)):
        positive = labels == label
        title = plain_text(shorten(name, 26))
        axes.set(xlim=(-0.02, 1.02), ylim=(0, 1.05), xticks=(0, 0.5, 1), yticks=(0, 0.5, 1))
        axes.grid(alpha=0.3)
        if positive.any():
            precision, recall = precision_recall(positive, probabilities[:, label])
            x, y = np.append(0, recall), np.append(precision[0], precision)
            axes.plot(x, y, drawstyle="steps-pre")
            axes.axhline(positive.mean(), color="grey", ls=":")
            title += f"\nAP {average[label]:.3f}, {positive.sum()} clips"
        else:
            axes.text(0.5, 0.5, "no clips of this class", ha="center", va="center", color="0.35")
            title += "\nno AP"
        axes.set_title(title, fontsize=8)
    figure.supxlabel("recall (dotted: the precision of guessing)", fontsize=9)
    figure.supylabel("precision", fontsize=9)
    macro, present = np.nanmean(average), np.isfinite(average).sum()
    figure.suptitle(f"macro average precision {macro:.3f} over {present} classes", fontsize=10)
    save_figure(figure, path)


def plot_embedding(
    embedding: Embedding, predictions: Predictions, classes: Sequence[str], path: str | Path
) -> None:
    """Draw the map of the clips twice: coloured by class, and by patient.

    Patients are numbered, and named nowhere.
    """
    patients = patient_numbers(predictions)[embedding.clips]
    rows = min(50, max(len(classes), patients.max(initial=0))) / 4  # of a legend
    figure = Figure(figsize=(13, 7 + 0.16 * rows), layout="constrained")
    names = [f"patient {number}" for number in range(1, patients.max(initial=0) + 1)]
    panels = (
        ("class", predictions.labels[embedding.clips], list(classes)),
        ("patient", np.maximum(patients - 1, -1), names),
    )
    for axes, (kind, groups, names) in zip(figure.subplots(1, 2), panels, strict=True):
        _scatter_groups(axes, embedding.positions, groups, names)
        title = f"by {kind}"
        if agreement := neighbour_agreement(groups, embedding.neighbours):
            found, chance = agreement
            title += f": {found:.0%} of the clips have a nearest neighbour of their own {kind}"
            title += f"\n(in the features themselves; {chance:.0%} would by chance)"
        elif kind == "patient" and not (groups >= 0).any():
            title += ": no patient is known"
        axes.set_title(title, fontsize=10)
        axes.set(xticks=[], yticks=[])
    caption = f"{embedding.method}. "
    if embedding.method.startswith("t-SNE"):
        caption += (
            "Near neighbours are alike to the model. Nothing else has a meaning: not the distance "
            "between far clusters, not their size, not the directions. "
        )
    else:
        caption += "Two dimensions show only a part of the differences between clips. "
    caption += (
        "Where the clips of one patient lie together within a class, the model can tell patients "
        "apart, by their hospital or camera perhaps."
    )
    figure.supxlabel("\n".join(textwrap.wrap(caption, 150)), fontsize=9)
    save_figure(figure, path)


_MARKERS = "os^DvPX"


def _scatter_groups(
    axes: Axes, positions: np.ndarray, groups: np.ndarray, names: Sequence[str]
) -> None:
    """Points of numbered groups, each with a colour and marker of its own, and their legend below.

    Groups for which there is no such pair, and points of no group (below 0), are grey.
    """
    pairs = [(colour, marker) for marker in _MARKERS for colour in COLOURS]
    style = {"linestyle": "", "ms": 6 if len(groups) < 400 else 4, "mec": "0.25", "mew": 0.4}
    present = [group for group in np.unique(groups) if group >= 0]
    for group in present[: len(pairs)]:
        colour, marker = pairs[group % len(pairs)]
        label = f"{plain_text(shorten(names[group], 28))} ({(groups == group).sum()})"
        axes.plot(*positions[groups == group].T, marker, color=colour, label=label, **style)
    rest = ~np.isin(groups, present[: len(pairs)])
    if rest.any():
        label = f"{len(present) - len(pairs)} more" if len(present) > len(pairs) else "unknown"
        axes.plot(*positions[rest].T, "o", color="0.75", label=label, zorder=1, **style)
    axes.set_aspect("equal", adjustable="datalim")
    longest = max(len(line.get_label()) for line in axes.lines)
    axes.legend(
        loc="upper center", bbox_to_anchor=(0.5, -0.01), ncols=max(1, 110 // (longest + 5)),
        fontsize=7.5, frameon=False, handletextpad=0.2, columnspacing=1,
    )  # fmt: skip


def plot_curves(history: Sequence[dict[str, Any]], best_epoch: int, path: str | Path) -> None:
    """Draw losses, scores and the learning rate over the epochs, and a line at the epoch that was
    kept.

    Args:
        history: one dict per epoch, with the columns of metrics.csv.
    """
    epochs = [row["epoch"] for row in history]
    panels = {
        "loss": ("train_loss", "val_loss"),
        "score": ("train_accuracy", "val_accuracy", "val_macro_f1"),
        "learning rate": ("learning_rate",),
    }
    figure = Figure(figsize=(13, 3.6), layout="constrained")
    for axes, (name, columns) in zip(figure.subplots(1, 3), panels.items(), strict=True):
        for column, style in zip(columns, ("o-", "s-", "^-"), strict=False):
            values = [row.get(column, math.nan) for row in history]
            axes.plot(epochs, values, style, ms=3, label=_series_name(column))
        axes.axvline(best_epoch, color="grey", ls=":", label=f"kept: epoch {best_epoch}")
        axes.set(xlabel="epoch", ylabel=name)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
        if name == "score":
            axes.set_ylim(0, 1.02)
        elif name == "learning rate":
            axes.set_ylim(bottom=0)
    save_figure(figure, path)


def plot_losses(history: Sequence[dict[str, Any]], path: str | Path) -> None:
    """Draw the training loss and, where there is one, the accuracy and chance over the epochs."""
    epochs = [row["epoch"] for row in history]
    panels = {"loss": ("train_loss",), "accuracy": ("accuracy", "chance")}
    shown = {name: columns for name, columns in panels.items() if columns[0] in history[0]}
    figure = Figure(figsize=(4.6 * len(shown), 3.6), layout="constrained")
    for axes, (name, columns) in zip(
        figure.subplots(1, len(shown), squeeze=False)[0], shown.items(), strict=True
    ):
        for column in columns:
            axes.plot(epochs, [row[column] for row in history], label=_series_name(column))
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


def plot_label_efficiency(
    table: "pd.DataFrame",
    runs: "pd.DataFrame",
    majority: Mapping[str, float],
    test_patients: int,
    path: str | Path,
) -> None:
    """Draw scores against the share of the training clips whose labels were used.

    Args:
        table: of `evaluation.ablation.label_table`.
        runs: one row per training with its share and scores, drawn as points.
        majority: for each score that of always predicting the largest class, drawn as a line.
        test_patients: that the intervals are over (0: unknown, they are over clips).
    """
    figure = Figure(figsize=(13, 4.8), layout="constrained")
    table = table.sort_values("share")
    interval = f"95 % interval over {test_patients} test patients"
    if not test_patients:
        interval = "95 % interval over test clips (patients unknown)"
    shown = _apart(np.log(table["share"].to_numpy()), 0.13)
    several_seeds = len(runs) > len(table)
    for axes, name in zip(figure.subplots(1, len(majority), sharey=True), majority, strict=True):
        low, high = table[f"{name} low"], table[f"{name} high"]
        if low.notna().any():
            axes.fill_between(
                table["share"], low, high, color=COLOURS[0], alpha=0.2, lw=0, label=interval
            )
            # Beside a single point there is no band.
            axes.vlines(table["share"], low, high, color=COLOURS[0], lw=1)
        else:
            axes.plot([], [], " ", label="no interval: one test patient")
        if several_seeds:
            axes.plot(
                runs["share"], runs[name], "o", color="0.35", ms=3.5, alpha=0.7, mew=0, zorder=3,
                label="single trainings",
            )  # fmt: skip
        style = {"color": COLOURS[0], "lw": 2, "ms": 7, "zorder": 4}
        label = "mean over the seeds" if several_seeds else "one training each"
        axes.plot(table["share"], table[name], "o-", label=label, **style)
        label = "guessing the largest class"
        axes.axhline(majority[name], color=COLOURS[5], ls="--", label=label)
        axes.set(xscale="log", ylim=(0, 1.02), title=_series_name(name))
        axes.set_xlim(runs["share"].min() / 1.25, runs["share"].max() * 1.25)
        texts = [_labels_used(row) for row in table[shown].to_dict(orient="records")]
        axes.set_xticks(table["share"][shown], texts, fontsize=8)
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.tick_params(axis="x", which="minor", bottom=False)
        axes.tick_params(axis="y", labelleft=True)
        axes.grid(alpha=0.3)
    label = "share of the training clips whose labels are used, log scale"
    figure.supxlabel(label + " (numbers: means over the seeds)" * several_seeds, fontsize=10)
    figure.axes[0].set_ylabel("score on the test clips")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=4, frameon=False)
    save_figure(figure, path)


def _labels_used(row: Mapping[str, float]) -> str:
    """The text below a tick: share, clips and patients, which are means over the seeds."""
    share = f"{row['share']:.0%}" if row["share"] >= 0.095 else f"{row['share']:.1%}"
    lines = [share.replace("%", " %"), f"{row['clips']:.0f} clips"]
    if not math.isnan(row["patients"]):
        patients = round(row["patients"])
        lines.append(f"{patients} patient{'s' * (patients != 1)}")
    return "\n".join(lines)


def _apart(positions: np.ndarray, gap: float) -> np.ndarray:
    """Which of the sorted positions get a text, `(N,)` bool: the last one, then all that are apart
    by this part of the range."""
    shown = np.zeros(len(positions), bool)
    nearest = math.inf
    for k in range(len(positions) - 1, -1, -1):
        if nearest - positions[k] >= gap * max(positions[-1] - positions[0], 1e-9):
            shown[k], nearest = True, positions[k]
    return shown


def plot_robustness(table: "pd.DataFrame", clean: float, path: str | Path) -> None:
    """Draw accuracy against severity, one panel per corruption.

    Args:
        table: the columns corruption, severity, accuracy.
        clean: accuracy on clean clips, drawn as a line.
    """
    names = list(table["corruption"].unique())
    panels, figure = _panels(len(names), min(5, len(names)), 2.3, 2.1)
    for axes, name in zip(panels, names, strict=True):
        panel = table[table["corruption"] == name]
        axes.axhline(clean, color="grey", ls=":", label="clean")
        axes.plot(panel["severity"], panel["accuracy"], "o-", ms=4)
        axes.set_title(name.replace("_", " "), fontsize=9)
        axes.set(ylim=(0, 1.02), xticks=sorted(panel["severity"]))
        axes.grid(alpha=0.3)
    panels[0].legend(fontsize=8)
    figure.supxlabel("severity", fontsize=9)
    figure.supylabel("accuracy", fontsize=9)
    save_figure(figure, path)


def _panels(count: int, columns: int, width: float, height: float) -> tuple[list[Axes], Figure]:
    """Panels of this size in inches with common axes, in rows, and their figure."""
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(width * columns + 0.4, height * rows + 0.5), layout="constrained")
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flat
    for axes in panels[count:]:
        axes.set_visible(False)
    for axes in panels[max(0, count - columns) : count]:  # the lowest panel of each column
        axes.tick_params(labelbottom=True)
    return list(panels[:count]), figure


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
