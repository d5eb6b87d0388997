"""The results of a test: test_metrics.json, predictions.csv, the confusion matrix, a table."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from evaluation import metrics
from evaluation.bootstrap import format_interval, score_intervals
from evaluation.calibration import Calibration, apply_temperature, describe_alternative
from evaluation.predictions import Predictions, write_predictions
from utils.errors import UserError
from utils.files import read_json, write_all, write_json
from utils.structure import find_mismatch
from utils.tables import write_table
from utils.text_table import frame_table

# Earlier names in test_metrics.json.
_OLD_NAMES = {
    "chance_accuracy": "majority_baseline",
    "wanted_error": "target_error",
    "units": "groups",
    "adjust": "logit_adjust_tau",
}


# What test_metrics.json holds, as far as somebody reads it; see `utils.structure.find_mismatch`.
_NUMBER = float | None
_NUMBERS = {str: _NUMBER}
_SHAPE = {
    **{f"{name}?": _NUMBER for name in ("accuracy", "balanced_accuracy", "macro_f1", "loss")},
    **{f"{name}?": int | None for name in ("clips", "patients", "epoch", "views", "crops")},
    "unreadable_clips?": int,
    "intervals?": {str: {str: list | None}},
    **{f"{name}?": _NUMBER for name in ("macro_average_precision", "top2_accuracy")},
    "averages?": dict,
    "actions?": _NUMBERS,
    "calibration?": {"ece?": _NUMBER, "brier?": _NUMBER, "nll?": _NUMBER, "before?": _NUMBERS},
    "selective?": {str: _NUMBER | dict},
    "per_class?": {str: _NUMBERS},
    "checkpoint?": str,
    "split?": str,
    "shuffle_frames?": bool,
    "logit_adjust_tau?": float,
    "folds?": [dict],
    "warnings?": [str | dict],
}


def compute_results(
    predictions: Predictions, classes: Sequence[str], calibrations: Sequence[Calibration]
) -> dict[str, Any]:
    """Everything that is reported about a test, in types that JSON supports (None instead of NaN).

    Args:
        calibrations: of the model that predicted each clip: one for all, or one per clip (models of
            several folds).

    Returns:
        `Predictions.summary`; `macro_average_precision`, the mean over the classes that have clips;
        with more than five classes `top2_accuracy`; `patients`, the number of known patients;
        `intervals` (see `bootstrap.score_intervals`); `averages` over clips, videos and patients;
        `actions`, the scores of the averages over the parts of each source action; `calibration`;
        `selective`, the effect of the threshold, and where it answers nothing a better one;
        `per_class`.
    """
    labels, probabilities = predictions.labels, predictions.probabilities
    confidence, correct = predictions.confidence, predictions.correct
    patients = predictions.groups("patient")
    table = metrics.per_class(predictions.confusion, classes, labels, patients)
    average_precision = metrics.average_precision(labels, probabilities)
    table.insert(3, "average_precision", average_precision)
    temperatures, thresholds = _temperatures_and_thresholds(calibrations)
    uncalibrated = predictions.uncalibrated
    if uncalibrated is None:
        uncalibrated = apply_temperature(probabilities, 1 / temperatures)
    selective = metrics.selective_risk(confidence, correct, thresholds)
    if not selective["coverage"] and len(calibrations) == 1:
        selective["alternative"] = calibrations[0].alternative()
    top2 = len(classes) > 5  # among few classes nearly every clip has its own in the first two
    results = {
        **predictions.summary(),
        "macro_average_precision": float(np.nanmean(average_precision)),
        **({"top2_accuracy": metrics.top_k_accuracy(labels, probabilities, 2)} if top2 else {}),
        "patients": len({patient for patient in patients if patient}),
        "clips_of_unknown_patient": sum(patient is None for patient in patients),
        "intervals": score_intervals(labels, probabilities, patients),
        "averages": _averages(predictions, len(classes)),
        "actions": _action_scores(predictions),
        "calibration": {
            "temperature": _common(temperatures),
            **_calibration_scores(labels, probabilities),
            "before": _calibration_scores(labels, uncalibrated),
        },
        "selective": {
            "target_error": _target_error(calibrations),
            "threshold": _common(thresholds),
            **selective,
            "aurc": metrics.area_under_risk_coverage(confidence, correct),
        },
        "per_class": json.loads(table.to_json(orient="index", double_precision=15)),  # NaN -> null
    }
    return _finite(results)


def _finite(value: Any) -> Any:
    """The same with None for numbers that are not finite and for intervals of such numbers, which
    your own scores may have."""
    if isinstance(value, dict):
        return {name: _finite(inner) for name, inner in value.items()}
    numbers = value if isinstance(value, list) else [value]
    finite = all(np.isfinite(number) for number in numbers if isinstance(number, float))
    return value if finite else None


def write_results(
    predictions: Predictions,
    classes: Sequence[str],
    folder: Path,
    calibrations: Sequence[Calibration],
    metadata: Mapping[str, Any] | None = None,
    folds: Sequence[str] = (),
    show: Callable[[str], object] | None = None,
) -> dict[str, Any]:
    """Show the results, and write test_metrics.json, predictions.csv, confusion_matrix.csv and the
    pictures into a folder.

    Args:
        calibrations: as for `compute_results`.
        metadata: more values for test_metrics.json.
        folds: name of the fold of each clip, for predictions.csv.
        show: gets the results as text, before anything is written.

    Returns:
        What test_metrics.json holds.

    Raises:
        UserError: a file could not be written; the others are.
    """
    results = {**compute_results(predictions, classes, calibrations), **(metadata or {})}
    if show:
        show(format_results(results))
    save_results(results, predictions, classes, folder, calibrations, folds)
    return results


def save_results(
    results: dict[str, Any],
    predictions: Predictions,
    classes: Sequence[str],
    folder: Path,
    calibrations: Sequence[Calibration],
    folds: Sequence[str] = (),
) -> None:
    """Write the files of `write_results`, which explains the arguments.

    Raises:
        UserError: a file could not be written; the others are.
    """
    import pandas as pd  # takes half a second to import, matplotlib as long

    from evaluation.plots import plot_confusion, plot_precision_recall

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "test_metrics.json").unlink(missing_ok=True)  # results of an earlier test
    _, thresholds = _temperatures_and_thresholds(calibrations)
    matrix, names = predictions.confusion, pd.Index(classes, name="true\\predicted")
    confusion = pd.DataFrame(matrix, index=names, columns=classes)

    def write_scores(path: Path) -> None:
        write_predictions(path, predictions, classes, thresholds, folds)
        # Its presence means that the predictions are there and complete.
        write_json(folder / "test_metrics.json", results)

    labels, probabilities = predictions.labels, predictions.probabilities

    def draw_precision_recall(path: Path) -> None:
        plot_precision_recall(labels, probabilities, classes, path)

    writers = {
        folder / "predictions.csv": write_scores,
        folder / "confusion_matrix.csv": lambda path: write_table(path, confusion, index=True),
        folder / "confusion_matrix.png": lambda path: plot_confusion(matrix, classes, path),
        folder / "precision_recall.png": draw_precision_recall,
    }
    for name in ("embedding.png", "embedding.csv"):
        (folder / name).unlink(missing_ok=True)  # of an earlier test
    if predictions.features is not None:
        writers[folder / "embedding.png"] = lambda path: draw_embedding(path, predictions, classes)
    write_all(writers)


def draw_embedding(path: Path, predictions: Predictions, classes: Sequence[str]) -> None:
    """Draw the map of the features of a test, and write its positions beside it, as .csv."""
    from evaluation.embedding import embed, write_embedding
    from evaluation.plots import plot_embedding

    embedding = embed(predictions.features)
    write_embedding(path.with_suffix(".csv"), predictions, embedding, classes)
    plot_embedding(embedding, predictions, classes, path)


def read_results(path: Path) -> dict[str, Any]:
    """Read test_metrics.json, also of earlier versions; empty if there is none.

    Raises:
        UserError: it is damaged.
    """
    results = _renamed(read_json(path))
    if not results:
        return {}
    if mismatch := find_mismatch(results, _SHAPE):
        raise UserError(f"{path}: not the results of a test ({mismatch})")
    # In earlier versions a warning was a text, and one about leakage began with LEAKAGE.
    results["warnings"] = [
        {"kind": "leakage" if "LEAKAGE" in w else "other", "text": w.removeprefix("LEAKAGE: ")}
        if isinstance(w, str)
        else w
        for w in results.get("warnings", [])
    ]
    return results


def _renamed(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    # The names of classes are the user's own.
    return {
        _OLD_NAMES.get(name, name): inner if name == "per_class" else _renamed(inner)
        for name, inner in value.items()
    }


def format_results(results: Mapping[str, Any]) -> str:
    """The results for people: one line per class, the headline, and how to read it."""
    import pandas as pd

    table = pd.DataFrame.from_dict(results["per_class"], orient="index")
    counts = {name: table[name].astype(int) for name in ("clips", "patients") if name in table}
    table = table.astype(float).assign(**counts)
    lines = [frame_table(table), "", headline(results)]
    titles = {"accuracy": "accuracy", "macro_f1": "macro-F1"}
    for name in metrics.MORE_SCORES:  # of your own
        if results.get(name) is not None:
            titles[name] = f"{name} {results[name]:.4f}"
    for name, title in titles.items():
        lines.append(f"  {title}: {_interval_text(results, name)}")
    averages = results["averages"]
    for kind in ("video", "patient"):
        if mean := averages[kind]:
            lines.append(
                f"averaged over {mean['groups']} {kind}s: accuracy {mean['accuracy']:.4f} "
                f"(the worst: {mean['worst_accuracy']:.4f}), macro-F1 {mean['macro_f1']:.4f}"
            )
    if results["actions"]:
        lines.append(
            f"one prediction per source action ({results['actions']['clips']}): "
            f"accuracy {results['actions']['accuracy']:.4f}, "
            f"macro-F1 {results['actions']['macro_f1']:.4f}"
        )
    lines.append(_calibration_text(results["calibration"]))
    lines.append(_selective_text(results["selective"]))
    return "\n".join(lines)


def headline(summary: Mapping[str, Any]) -> str:
    """`Predictions.summary` and the scores of the ranking in a few lines."""
    text = (
        f"{summary['clips']} clips: accuracy {summary['accuracy']:.4f}, "
        f"balanced accuracy {summary['balanced_accuracy']:.4f}, "
        f"macro-F1 {summary['macro_f1']:.4f} over {summary['classes_present']} classes "
        f"(majority-class accuracy {summary['majority_baseline']:.4f})"
    )
    if "macro_average_precision" in summary:  # results of earlier versions have none
        text += f"\nmacro average precision {summary['macro_average_precision']:.4f}"
        if "top2_accuracy" in summary:
            text += f", top-2 accuracy {summary['top2_accuracy']:.4f}"
    if summary.get("unreadable_clips"):
        text += f"\nMISSING: {summary['unreadable_clips']} clips could not be read"
    return text


def _averages(predictions: Predictions, num_classes: int) -> dict[str, Any]:
    """The scores averaged over clips (pooled), videos and patients."""
    averages: dict[str, Any] = {"clip": predictions.scores}
    for kind in ("video", "patient"):
        averages[kind] = metrics.grouped_scores(
            predictions.groups(kind), predictions.labels, predictions.y_pred, num_classes
        )
    return averages


def _action_scores(predictions: Predictions) -> dict[str, Any]:
    """The scores of the averages over each source action; empty where no action is known."""
    labels, probabilities = metrics.average_by_action(
        predictions.groups("action"), predictions.labels, predictions.probabilities
    )
    if not len(labels):
        return {}
    y_pred, num_classes = probabilities.argmax(axis=1), probabilities.shape[1]
    return metrics.summarize(metrics.confusion_matrix(labels, y_pred, num_classes))


def _target_error(calibrations: Sequence[Calibration]) -> float | None:
    """The error rate that the thresholds aim at; None if none was chosen."""
    targets = {calibration.target_error for calibration in calibrations} - {None}
    return max(targets, default=None)


def _temperatures_and_thresholds(
    calibrations: Sequence[Calibration],
) -> tuple[np.ndarray, np.ndarray]:
    pairs = [(calibration.temperature, calibration.min_confidence) for calibration in calibrations]
    temperatures, thresholds = np.array(pairs).T
    return temperatures, thresholds


def _common(values: np.ndarray) -> float | None:
    """The common value of all; None if they differ, or are infinite."""
    return float(values[0]) if np.isfinite(values).all() and np.ptp(values) == 0 else None


def _calibration_scores(labels: np.ndarray, probabilities: np.ndarray) -> dict[str, float]:
    correct = probabilities.argmax(axis=1) == labels
    confidence = probabilities.max(axis=1)
    return {
        "ece": metrics.expected_calibration_error(confidence, correct),
        "brier": float(metrics.brier_scores(labels, probabilities).mean()),
        "nll": float(metrics.per_sample_nll(labels, probabilities).mean()),
    }


def _interval_text(results: Mapping[str, Any], name: str) -> str:
    intervals = results["intervals"][name]
    naive = format_interval(intervals["clips"], missing="none")
    naive = f"(clips taken as independent: {naive})"
    if not results["patients"]:
        return f"95 % interval {naive}; no patient is known, so it may be far too narrow"
    if not intervals["patients"]:
        return f"no 95 % interval: one patient does not show how patients differ {naive}"
    clusters = f"{results['patients']} patients"
    if results["clips_of_unknown_patient"]:
        clusters += f" and {results['clips_of_unknown_patient']} clips of unknown patients"
    return f"95 % interval {format_interval(intervals['patients'])} over {clusters} {naive}"


def _calibration_text(scores: Mapping[str, Any]) -> str:
    temperature = scores["temperature"]
    at = "each model's temperature" if temperature is None else f"temperature {temperature:.3f}"
    return (
        f"calibration: ECE {scores['ece']:.4f} (before {scores['before']['ece']:.4f}), "
        f"Brier {scores['brier']:.4f}, NLL {scores['nll']:.4f} at {at}"
    )


def _selective_text(selective: Mapping[str, Any]) -> str:
    if selective["target_error"] is None:
        return "no clip is called uncertain: the checkpoint has no threshold"
    target = f"for an error rate of at most {selective['target_error']:.0%} on validation clips"
    if not selective["coverage"]:
        remedy = describe_alternative(selective.get("alternative"))
        return f"every clip is uncertain ({target}). With evaluate.py and predict.py, {remedy}"
    threshold = selective["threshold"]
    below = "each model's threshold" if threshold is None else f"{threshold:.3f}"
    return (
        f"uncertain below a confidence of {below} ({target}): {selective['coverage']:.1%} of the "
        f"clips are answered, {selective['error']:.1%} of the answers are wrong"
    )
