"""The charts of a report, from a run's numbers."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from evaluation import metrics
from evaluation.calibration import temper
from web import svg_charts as charts
from web.anonymize import Names
from web.report_data import History, Run
from web.svg_charts import Axis, Chart, Histogram, Line, Mark, Row, RowChart
from web.templating import decimals, percent

# Columns of metrics.csv: what they are called and how their lines look.
_LOSS = {"train_loss": ("training", "b"), "val_loss": ("validation", "a")}

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
    return [RowChart(label, axis, part, row_height=30) for part in charts.pages(rows, 30)]


def per_patient(run: Run, names: Names) -> list[RowChart]:
    """The accuracy of each patient, the lowest first; nothing without patients."""
    units, right = run.predictions.units("patient"), run.predictions.right
    found = [(called, right[units == name]) for name, called in names.patients.items()]
    most = max((len(those) for _, those in found), default=1)
    rows = [
        Row(
            called,
            float(those.mean()),
            f"{len(those)} clip{'s' * (len(those) != 1)}",
            f"{called}: {percent(float(those.mean()))} of {len(those)} clips right",
            charts.area(len(those), most, largest=7.5),
        )
        for called, those in found
    ]
    label = "Accuracy of each patient, the lowest first"
    axis = Axis("clips named right (%)", 0, 1, (0, 0.5, 1), percent=True)
    parts = charts.pages(rows, 20)
    return [RowChart(label, axis, part, 20, run.results["accuracy"]) for part in parts]


def reliability(run: Run) -> dict[str, Any]:
    """Confidence against accuracy, after and before tempering; clips a bin; the same as a table."""
    predictions = run.predictions
    table = metrics.reliability(predictions.confidence, predictions.right)
    points = _points(table)
    most = table["clips"].max()
    marks = [
        Mark(x, y, "a", f"{n} clips: sure {percent(x)}, right {percent(y)}", charts.area(n, most))
        for (x, y), n in zip(points, table["clips"], strict=True)
    ]
    lines = [Line("perfect", "guide", ((0, 0), (1, 1))), Line("after", "a", points)]
    keys = [("a dot", "this model; larger dots: more clips"), ("guide", "perfect agreement")]
    temperature = run.results["calibration"]["temperature"]
    if temperature not in (None, 1):
        untempered = temper(predictions.probabilities, 1 / temperature)
        before = metrics.reliability(untempered.max(axis=1), predictions.right)
        lines.insert(1, Line("before", "b", _points(before)))
        keys.insert(1, ("b", "before calibration"))
    label = (
        f"Reliability diagram: confidence against accuracy in {len(points)} bins; "
        "the table below it holds the numbers"
    )
    axes = charts.share_axis("how sure the model is (%)"), charts.share_axis("how often right (%)")
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


def risk_coverage(run: Run) -> Chart:
    """How wrong the answers are if only the surest clips are answered."""
    coverage, risk = metrics.risk_coverage(run.predictions.confidence, run.predictions.right)
    selective = run.results["selective"]
    wanted, error = selective["wanted_error"], selective["error"]
    keys = [("a", "wrong among the answered")]
    marks = []
    if wanted is not None:
        keys.append(("horizontal", f"wanted: at most {percent(wanted)} wrong"))
    if wanted is not None and error is not None:
        text = f"threshold: answers {percent(selective['coverage'])}, wrong {percent(error)}"
        marks.append(Mark(selective["coverage"], error, "chosen", text, 6))
        keys.append(("chosen dot", text))
    return Chart(
        "Risk-coverage curve: share of wrong answers against share of clips answered",
        charts.share_axis("clips answered, the surest first (%)"),
        charts.percent_axis("wrong among the answered (%)", max(risk.max(), wanted or 0)),
        [Line("risk", "a", charts.thinned(coverage, risk))],
        marks,
        horizontal=wanted,
        keys=keys,
    )


def training(run: Run) -> list[tuple[str, Chart]]:
    """Loss and scores over the epochs, a line a training."""
    if not run.histories:
        return []
    losses = [one.table[column] for one in run.histories for column in _LOSS if column in one.table]
    highest = max((float(values.max()) for values in losses), default=1.0)
    loss_axis = charts.nice_axis("loss (nats)", 0, highest if np.isfinite(highest) else 1.0)
    score_axis = Axis("score", 0, 1, (0, 0.25, 0.5, 0.75, 1))
    return [
        ("Loss", _curves(run.histories, _LOSS, loss_axis)),
        ("Scores", _curves(run.histories, _SCORES, score_axis)),
    ]


def _curves(
    histories: Sequence[History], columns: Mapping[str, tuple[str, str]], axis: Axis
) -> Chart:
    """Columns of metrics.csv over the epochs; several trainings have thin lines."""
    several = len(histories) > 1
    lines, keys = [], {}
    for history in histories:
        epochs = history.table["epoch"].to_numpy(float)
        for column, (words, style) in columns.items():
            if column in history.table:
                points = charts.thinned(epochs, history.table[column].to_numpy(float))
                lines.append(Line(f"{history.name} {words}".strip(), style, points, several))
                keys[style, words] = None
    chosen = None if several else histories[0].chosen
    marks = _chosen(histories, list(columns)[-1]) if several else []
    if chosen:
        keys["vertical", f"kept: epoch {chosen}"] = None
    if marks:
        keys["chosen dot", "epoch that was kept"] = None
    last = max(float(history.table["epoch"].max()) for history in histories)
    return Chart(
        f"{' and '.join(words for words, _ in columns.values())} {axis.label} over the epochs",
        charts.nice_axis("epoch", 1, last, whole=True),
        axis,
        lines,
        marks,
        vertical=chosen,
        keys=list(keys),
    )


def _chosen(histories: Sequence[History], column: str) -> list[Mark]:
    """Where each of several trainings had its best epoch."""
    marks = []
    for history in histories:
        if history.chosen is None or column not in history.table:
            continue
        for value in history.table.loc[history.table["epoch"] == history.chosen, column]:
            if np.isfinite(value):
                text = f"{history.name}: epoch {history.chosen} was kept"
                marks.append(Mark(history.chosen, float(value), "chosen", text, 4.5))
    return marks


def _points(table: Any) -> list[tuple[float, float]]:
    return list(zip(table["confidence"].tolist(), table["accuracy"].tolist(), strict=True))
