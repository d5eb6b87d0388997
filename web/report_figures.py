"""The charts of a report, from the numbers of a run."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from evaluation import metrics
from evaluation.calibration import apply_temperature
from explanation.mistakes import RelevanceCurve
from web import svg_charts as charts
from web.anonymize import Pseudonyms
from web.report_data import History, ReportData
from web.svg_charts import Axis, Chart, Histogram, Line, Mark, Row, RowChart
from web.templating import decimals, percent

MAX_PATIENTS = 200
"""on the page, which would be too large to open with all of thousands"""

# Columns of metrics.csv: their names in the legend, and the style of their lines.
_LOSS = {"train_loss": ("training", "b"), "val_loss": ("validation", "a")}

_RATE = {"learning_rate": ("at the end of the epoch", "a")}

_SCORES = {
    "train_accuracy": ("training accuracy", "b"),
    "val_accuracy": ("validation accuracy", "c"),
    "val_macro_f1": ("validation macro-F1", "a"),
}


def per_class(table: Sequence[Mapping[str, Any]]) -> list[RowChart]:
    """F1 and recall of each class; `table` is that of report_sections.per_class."""
    rows = [
        Row(
            row["name"],
            row["f1"],
            f"{row['clips']} clips" if row["clips"] else "no clips",
            f"{row['name']}: F1 {decimals(row['f1'])}, recall {percent(row['recall'])}",
            second=row["recall"],
            interval=row["interval"],
        )
        for row in table
    ]
    axis = Axis("F1 and recall", 0, 1, (0, 0.5, 1))
    label = "F1 and recall of each class; the table holds the same numbers"
    return [RowChart(label, axis, part, row_height=30) for part in charts.paginate(rows, 30)]


def precision_recall(data: ReportData) -> list[tuple[str, str, Chart | None]]:
    """Name, average precision as text, and the precision-recall curve of each class (None: it has
    no clips)."""
    labels, probabilities = data.predictions.labels, data.predictions.probabilities
    average = metrics.average_precision(labels, probabilities)
    axes = charts.fraction_axis("recall (%)"), charts.fraction_axis("precision (%)")
    curves: list[tuple[str, str, Chart | None]] = []
    for label, name in enumerate(data.classes):
        positive, chart = labels == label, None
        if positive.any():
            precision, recall = metrics.precision_recall(positive, probabilities[:, label])
            rises = np.diff(recall, prepend=0) > 0  # the others add a vertical line at most
            precision, recall = precision[rises], recall[rises]
            # Between two thresholds the curve has the precision of the lower one: steps.
            x = np.repeat(np.append(0, recall), 2)[:-1]
            y = np.append(precision[0], np.repeat(precision, 2))
            text = f"{name}: precision against recall, average precision {average[label]:.3f}"
            points = charts.downsample(x, y)
            chart = Chart(text, *axes, [Line(name, "a", points)], horizontal=positive.mean())
        curves.append((name, decimals(float(average[label])) if chart else "", chart))
    return curves


def per_patient(data: ReportData, names: Pseudonyms) -> list[RowChart]:
    """The accuracy of each patient, the lowest first, of at most MAX_PATIENTS; empty if no patient
    is known."""
    clips, correct = data.predictions.clips_of_patients, data.predictions.correct
    shown = list(names.patients.items())[:MAX_PATIENTS]
    correct_of = {page_name: correct[clips[name]] for name, page_name in shown}
    highest = max(map(len, correct_of.values()), default=1)
    rows = [
        Row(
            name,
            float(correct.mean()),
            f"{len(correct)} clip{'s' * (len(correct) != 1)}",
            f"{name}: {percent(float(correct.mean()))} of {len(correct)} clips correct",
            charts.radius_for_count(len(correct), highest, largest=7.5),
        )
        for name, correct in correct_of.items()
    ]
    label = "Accuracy of each patient, the lowest first"
    axis = Axis("accuracy (%)", 0, 1, (0, 0.5, 1), percent=True)
    parts = charts.paginate(rows, 20)
    return [RowChart(label, axis, part, 20, data.results["accuracy"]) for part in parts]


def reliability(data: ReportData) -> dict[str, Any]:
    """The reliability diagram with and without calibration, the clips per bin, and a table."""
    predictions = data.predictions
    table = metrics.calibration_curve(predictions.confidence, predictions.correct)
    points = _points(table)
    highest = table["clips"].max()
    marks = [
        Mark(
            x,
            y,
            "a",
            f"{n} clips: confidence {percent(x)}, accuracy {percent(y)}",
            charts.radius_for_count(n, highest),
        )
        for (x, y), n in zip(points, table["clips"], strict=True)
    ]
    lines = [Line("perfect calibration", "guide", ((0, 0), (1, 1))), Line("after", "a", points)]
    keys = [("a dot", "this model; larger dots: more clips"), ("guide", "perfect calibration")]
    temperature = data.results["calibration"]["temperature"]
    if temperature not in (None, 1):
        uncalibrated = apply_temperature(predictions.probabilities, 1 / temperature)
        before = metrics.calibration_curve(uncalibrated.max(axis=1), predictions.correct)
        lines.insert(1, Line("before", "b", _points(before)))
        keys.insert(1, ("b", "before calibration"))
    label = (
        f"Reliability diagram: confidence against accuracy in {len(points)} bins; "
        "the table below it holds the numbers"
    )
    axes = charts.fraction_axis("confidence (%)"), charts.fraction_axis("accuracy (%)")
    width = 1 / metrics.ECE_BINS
    bars = [(b * width, (b + 1) * width, int(n)) for b, n in table["clips"].items()]
    return {
        "chart": Chart(label, *axes, lines, marks, keys=keys),
        "counts": Histogram("Number of clips in each bin of confidence", axes[0], bars),
        "bins": [
            {"low": low, "high": high, "confidence": x, "accuracy": y, "clips": n}
            for (low, high, n), (x, y) in zip(bars, points, strict=True)
        ],
    }


def risk_coverage(data: ReportData) -> Chart:
    """The error rate if only the most confident clips are answered, for every number of them."""
    coverage, risk = metrics.risk_coverage(data.predictions.confidence, data.predictions.correct)
    selective = data.results["selective"]
    target, error = selective["target_error"], selective["error"]
    keys = [("a", "error among answered clips")]
    marks = []
    if target is not None:
        keys.append(("horizontal", f"target: at most {percent(target)}"))
    if target is not None and error is not None:
        text = f"threshold: coverage {percent(selective['coverage'])}, error {percent(error)}"
        marks.append(Mark(selective["coverage"], error, "chosen", text, 6))
        keys.append(("chosen dot", text))
    return Chart(
        "Risk-coverage curve: error among the answered clips against their fraction of all clips",
        charts.fraction_axis("coverage: answered clips (%)"),
        charts.percent_axis("error among answered clips (%)", max(risk.max(), target or 0)),
        [Line("risk", "a", charts.downsample(coverage, risk))],
        marks,
        horizontal=target,
        keys=keys,
    )


def relevance(curve: RelevanceCurve, number: int, predicted: str, true: str) -> Chart | None:
    """The relevance of the frames of a mistake, relative to the largest; None: there is none.

    Args:
        number: of the mistake on the page.
        predicted, true: names of the classes.
    """
    if curve.missing:
        return None
    largest = float(np.abs(curve.values).max())
    values = curve.values / (largest or 1.0)
    points = list(zip(curve.times.tolist(), values.tolist(), strict=True))
    when = "{:.2f} s" if curve.in_seconds else "frame {:.0f}"
    marks = [
        # In the colours of the two classes in the list above the chart.
        Mark(x, y, "b" if y > 0 else "a", f"{when.format(x)}: {y:+.2f}", 3.0)
        for x, y in points
        if y
    ]
    first, last = float(curve.times[0]), float(curve.times[-1])
    label = "time in the clip (s)" if curve.in_seconds else "frame of the clip"
    axis = charts.nice_axis(label, first, last, intervals=8, integer=not curve.in_seconds)
    axis = replace(axis, low=min(axis.low, first), high=max(axis.high, last))
    low = math.floor(2 * values.min(initial=0)) / 2  # 0, -0.5 or -1
    ticks = [tick for tick in (-1, -0.5, 0, 0.5, 1) if tick >= low]
    zero = Line("neither", "guide", ((axis.low, 0.0), (axis.high, 0.0)))
    peak = when.format(curve.times[values.argmax()])
    text = f"Mistake {number}: relevance of {len(points)} frames for {predicted} and not {true}, "
    text += f"largest at {peak}" if largest else "0 in all of them"
    return Chart(
        text,
        axis,
        Axis("relevance", low, 1.0, ticks),
        [zero, Line(predicted, "plain", points)],
        marks,
        height=int(150 - 40 * low),
    )


def training(data: ReportData) -> list[tuple[str, Chart]]:
    """Loss, scores and learning rate over the epochs, one line per training."""
    if not data.histories:
        return []
    tables = [history.table for history in data.histories]
    losses = [table[name] for table in tables for name in _LOSS if name in table]
    highest = max((float(v) for values in losses for v in values if np.isfinite(v)), default=1.0)
    loss_axis = charts.nice_axis("loss (nats)", 0, highest)
    score_axis = Axis("score", 0, 1, (0, 0.25, 0.5, 0.75, 1))
    curves = [
        ("Loss", _curves(data.histories, _LOSS, loss_axis)),
        ("Scores", _curves(data.histories, _SCORES, score_axis)),
    ]
    rates = [table["learning_rate"] for table in tables if "learning_rate" in table]
    if highest := max((float(v) for part in rates for v in part if np.isfinite(v)), default=0):
        rate_axis = charts.nice_axis("learning rate", 0, highest)
        chart = _curves(data.histories, _RATE, rate_axis)
        curves.append(("Learning rate", replace(chart, left=72)))  # room for 0.00025
    return curves


def _curves(
    histories: Sequence[History], columns: Mapping[str, tuple[str, str]], axis: Axis
) -> Chart:
    """Columns of metrics.csv over the epochs; the lines of several trainings are thin."""
    several = len(histories) > 1
    lines, keys = [], {}
    for history in histories:
        for column, (text, style) in columns.items():
            if column in history.table:
                points = charts.downsample(history.table["epoch"], history.table[column])
                lines.append(Line(f"{history.name} {text}".strip(), style, points, several))
                keys[style, text] = None
    best_epoch = None if several else histories[0].best_epoch
    marks = _best_epochs(histories, list(columns)[-1]) if several else []
    if best_epoch:
        keys["vertical", f"kept: epoch {best_epoch}"] = None
    if marks:
        keys["chosen dot", "epoch that was kept"] = None
    last = max(float(history.table["epoch"].max()) for history in histories)
    return Chart(
        f"{' and '.join(text for text, _ in columns.values())} {axis.label} over the epochs",
        charts.nice_axis("epoch", 1, last, integer=True),
        axis,
        lines,
        marks,
        vertical=best_epoch,
        keys=list(keys),
    )


def _best_epochs(histories: Sequence[History], column: str) -> list[Mark]:
    """A mark at the epoch that was kept of each training."""
    marks = []
    for history in histories:
        if history.best_epoch is None or column not in history.table:
            continue
        for value in history.table[column][history.table["epoch"] == history.best_epoch]:
            if np.isfinite(value):
                text = f"{history.name}: epoch {history.best_epoch} was kept"
                marks.append(Mark(history.best_epoch, float(value), "chosen", text, 4.5))
    return marks


def _points(table: Any) -> list[tuple[float, float]]:
    return list(zip(table["confidence"].tolist(), table["accuracy"].tolist(), strict=True))
