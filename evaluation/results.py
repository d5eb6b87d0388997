"""The numbers of a test, as files and as a table for people."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from evaluation import bootstrap, metrics
from evaluation.calibration import Calibration, temper
from evaluation.plots import plot_confusion
from evaluation.predictions import Predictions, write_predictions
from utils.files import write_json, write_text


def headline_scores(predictions: Predictions) -> dict[str, Any]:
    """`metrics.summarize` of predictions, with their loss and how many clips are missing."""
    summary = metrics.summarize(predictions.confusion)
    return {**summary, "loss": predictions.loss, "unreadable_clips": len(predictions.unreadable)}


def assess(
    predictions: Predictions, classes: Sequence[str], calibrations: Sequence[Calibration]
) -> dict[str, Any]:
    """Everything that is reported of a test, in types that JSON knows (NaN is null).

    Args:
        calibrations: of the model that answered each clip: one for all, or one a clip (models of
            several folds).

    Returns:
        The headline scores; `patients`, how many are known; `intervals` (see
        `bootstrap.intervals`); `averages` over clips, videos and patients; `actions`, the scores of
        the vote over each source action's parts; `calibration`; `selective`, what the threshold
        answers; `per_class`.
    """
    labels, probabilities = predictions.labels, predictions.probabilities
    confidence, right = predictions.confidence, predictions.right
    patients = predictions.units("patient")
    table = metrics.per_class(predictions.confusion, classes, labels, patients)
    temperatures, thresholds = _fitted(calibrations)
    untempered = predictions.untempered
    if untempered is None:
        untempered = temper(probabilities, 1 / temperatures)
    answered = metrics.selective(confidence, right, thresholds)
    return {
        **headline_scores(predictions),
        "patients": len({patient for patient in patients if patient}),
        "clips_of_unknown_patient": sum(patient is None for patient in patients),
        "intervals": bootstrap.intervals(labels, probabilities, patients),
        "averages": _averages(predictions, len(classes)),
        "actions": _actions(predictions),
        "calibration": {
            "temperature": _common(temperatures),
            **_calibration_scores(labels, probabilities),
            "before": _calibration_scores(labels, untempered),
        },
        "selective": {
            "wanted_error": _wanted(calibrations),
            "threshold": _common(thresholds),
            **answered,
            "aurc": metrics.area_under_risk_coverage(confidence, right),
        },
        "per_class": json.loads(table.to_json(orient="index", double_precision=15)),  # NaN -> null
    }


def write_results(
    predictions: Predictions,
    classes: Sequence[str],
    folder: Path,
    calibrations: Sequence[Calibration],
    facts: dict[str, Any] | None = None,
) -> str:
    """Write test_metrics.json, predictions.csv and confusion_matrix.csv and .png into a folder.

    Args:
        calibrations: as for `assess`.
        facts: more to write into test_metrics.json.

    Returns:
        The table for people; see `describe`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "test_metrics.json").unlink(missing_ok=True)  # an earlier one fits no longer
    matrix = predictions.confusion
    results = assess(predictions, classes, calibrations)
    _, thresholds = _fitted(calibrations)
    write_predictions(folder / "predictions.csv", predictions, classes, thresholds)
    counts = pd.DataFrame(matrix, index=pd.Index(classes, name="true\\predicted"), columns=classes)
    write_text(folder / "confusion_matrix.csv", counts.to_csv())
    plot_confusion(matrix, classes, folder / "confusion_matrix.png")
    write_json(folder / "test_metrics.json", {**results, **(facts or {})})  # last: all is there
    return describe(results)


def describe(results: dict[str, Any]) -> str:
    """The results in words: a line a class, the headline, and what to make of it."""
    table = pd.DataFrame.from_dict(results["per_class"], orient="index")
    counts = {name: table[name].astype(int) for name in ("clips", "patients") if name in table}
    table = table.astype(float).assign(**counts)
    lines = [table.to_string(float_format="{:.3f}".format, na_rep="-"), "", headline(results)]
    for name, words in (("accuracy", "accuracy"), ("macro_f1", "macro-F1")):
        lines.append(f"  {words}: {_intervals(results, name)}")
    averages = results["averages"]
    for unit in ("video", "patient"):
        if mean := averages[unit]:
            lines.append(
                f"averaged over {mean['units']} {unit}s: accuracy {mean['accuracy']:.4f} "
                f"(the worst: {mean['worst_accuracy']:.4f}), macro-F1 {mean['macro_f1']:.4f}"
            )
    if results["actions"]:
        lines.append(
            f"one vote for each of {results['actions']['clips']} source actions: "
            f"accuracy {results['actions']['accuracy']:.4f}, "
            f"macro-F1 {results['actions']['macro_f1']:.4f}"
        )
    lines += [_calibration_line(results["calibration"]), _selective_line(results["selective"])]
    return "\n".join(lines)


def headline(summary: dict[str, Any]) -> str:
    """The summary in one or two lines."""
    lines = (
        f"{summary['clips']} clips: accuracy {summary['accuracy']:.4f}, "
        f"balanced accuracy {summary['balanced_accuracy']:.4f}, "
        f"macro-F1 {summary['macro_f1']:.4f} over {summary['classes_present']} classes "
        f"(always the largest class: accuracy {summary['chance_accuracy']:.4f})"
    )
    if summary.get("unreadable_clips"):
        lines += f"\nMISSING: {summary['unreadable_clips']} clips could not be read"
    return lines


def _averages(predictions: Predictions, num_classes: int) -> dict[str, Any]:
    """The scores averaged over clips (pooled), videos and patients."""
    averages: dict[str, Any] = {"clip": predictions.scores}
    for unit in ("video", "patient"):
        averages[unit] = metrics.averaged_over(
            predictions.units(unit), predictions.labels, predictions.predicted, num_classes
        )
    return averages


def _actions(predictions: Predictions) -> dict[str, Any]:
    """The scores of the vote; empty where no source action is known."""
    labels, probabilities = metrics.vote(
        predictions.units("action"), predictions.labels, predictions.probabilities
    )
    if not len(labels):
        return {}
    num_classes = probabilities.shape[1]
    return metrics.summarize(
        metrics.confusion_matrix(labels, probabilities.argmax(axis=1), num_classes)
    )


def _wanted(calibrations: Sequence[Calibration]) -> float | None:
    """The error rate that thresholds were chosen for; None if none was chosen."""
    chosen = {one.wanted_error for one in calibrations} - {None}
    return max(chosen, default=None)


def _fitted(calibrations: Sequence[Calibration]) -> tuple[np.ndarray, np.ndarray]:
    """Temperatures and lowest answered confidences."""
    pairs = [(one.temperature, one.lowest_answered) for one in calibrations]
    temperatures, thresholds = np.array(pairs).T
    return temperatures, thresholds


def _common(values: np.ndarray) -> float | None:
    """The number that all are; None if they differ, or are infinite."""
    return float(values[0]) if np.isfinite(values).all() and np.ptp(values) == 0 else None


def _calibration_scores(labels: np.ndarray, probabilities: np.ndarray) -> dict[str, float]:
    right = probabilities.argmax(axis=1) == labels
    confidence = probabilities.max(axis=1)
    return {
        "ece": metrics.expected_calibration_error(confidence, right),
        "brier": float(metrics.brier_scores(labels, probabilities).mean()),
        "nll": float(metrics.log_losses(labels, probabilities).mean()),
    }


def _intervals(results: dict[str, Any], name: str) -> str:
    """A score's intervals in words."""
    found = results["intervals"][name]
    naive = "{:.3f} to {:.3f}".format(*found["clips"]) if found["clips"] else "none"
    naive = f"(clips taken as independent: {naive})"
    if not results["patients"]:
        return f"95 % interval {naive}; no patient is known, so it may be far too narrow"
    if not found["patients"]:
        return f"no 95 % interval: one patient does not tell how patients differ {naive}"
    low, high = found["patients"]
    units = f"{results['patients']} patients"
    if results["clips_of_unknown_patient"]:
        units += f" and {results['clips_of_unknown_patient']} clips of unknown patients"
    return f"95 % interval {low:.3f} to {high:.3f} over {units} {naive}"


def _calibration_line(scores: dict[str, Any]) -> str:
    temperature = scores["temperature"]
    at = "each model's temperature" if temperature is None else f"temperature {temperature:.3f}"
    return (
        f"calibration: ECE {scores['ece']:.4f} (before {scores['before']['ece']:.4f}), "
        f"Brier {scores['brier']:.4f}, NLL {scores['nll']:.4f} at {at}"
    )


def _selective_line(found: dict[str, Any]) -> str:
    if found["wanted_error"] is None:
        return "nothing is called uncertain: the checkpoint has no threshold"
    wanted = f"for at most {found['wanted_error']:.0%} wrong, by the validation clips"
    if not found["coverage"]:
        return f"all is uncertain ({wanted})"
    threshold = found["threshold"]
    below = "each model's threshold" if threshold is None else f"{threshold:.3f}"
    return (
        f"uncertain below {below} ({wanted}): answers {found['coverage']:.1%} of the clips, "
        f"{found['error']:.1%} of the answers are wrong"
    )
