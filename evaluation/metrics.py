"""What the numbers mean: scores, averages over patients, calibration, abstention.

A class without a clip in the split has no recall: it is NaN and left out of the averages, which say
over how many classes they go. (A zero in its place would punish the model for the split, and a one
would flatter it.) A class that has clips but is never predicted has precision and F1 zero.

Everywhere `labels` are `(N,)` true classes, `probabilities` `(N, num_classes)`, `confidence` the
highest probability of each clip and `right` whether the class that has it is the true one.
bootstrap.py puts intervals around the scores.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

ECE_BINS = 15  # as in Guo et al., arXiv:1706.04599


def confusion_matrix(labels: np.ndarray, predictions: np.ndarray, num_classes: int) -> np.ndarray:
    """Counts `(num_classes, num_classes)`: rows are the truth, columns the predictions."""
    pairs = np.asarray(labels) * num_classes + np.asarray(predictions)
    return np.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes)


def scores(matrices: np.ndarray) -> dict[str, np.ndarray]:
    """Accuracy, balanced accuracy (mean recall) and macro-F1 of confusion matrices.

    Args:
        matrices: `(..., C, C)` counts, or weights; each with a clip at least.

    Returns:
        Arrays `(...)`; the means go over the classes that have a clip in that matrix.
    """
    hits = np.diagonal(matrices, axis1=-2, axis2=-1).astype(float)
    support, predicted = matrices.sum(axis=-1), matrices.sum(axis=-2)
    present = support > 0
    recall = np.divide(hits, support, out=np.zeros_like(hits), where=present)
    f1 = np.divide(2 * hits, support + predicted, out=np.zeros_like(hits), where=present)
    count = present.sum(axis=-1)
    return {
        "accuracy": hits.sum(axis=-1) / support.sum(axis=-1),
        "balanced_accuracy": recall.sum(axis=-1) / count,
        "macro_f1": f1.sum(axis=-1) / count,
    }


def per_class(
    matrix: np.ndarray,
    classes: Sequence[str],
    labels: np.ndarray | None = None,
    patients: np.ndarray | None = None,
) -> pd.DataFrame:
    """Precision, recall and F1 of each class, and how many clips, of how many patients, it has.

    The column `patients` is there where `labels` and `patients` (None: unknown) are given.
    """
    hits = np.diag(matrix).astype(float)
    support = matrix.sum(axis=1)
    predicted = matrix.sum(axis=0)
    present = support > 0
    with np.errstate(invalid="ignore"):
        table = {
            "precision": np.where(predicted > 0, hits / predicted, 0.0),
            "recall": hits / support,
            "f1": 2 * hits / (support + predicted),
        }
    table = {name: np.where(present, values, np.nan) for name, values in table.items()}
    table["clips"] = support
    if patients is not None:
        known = [{p for p in patients[labels == number] if p} for number in range(len(classes))]
        table["patients"] = np.array([len(those) for those in known])
    return pd.DataFrame(table, index=pd.Index(list(classes), name="class"))


def summarize(matrix: np.ndarray) -> dict[str, Any]:
    """The headline numbers of a confusion matrix.

    Returns:
        `scores`; chance_accuracy, what always answering the split's largest class would give;
        classes_present, how many the averages go over; clips.
    """
    support = matrix.sum(axis=1)
    return {
        **{name: float(value) for name, value in scores(matrix).items()},
        "chance_accuracy": float(support.max() / support.sum()),
        "classes_present": int((support > 0).sum()),
        "clips": int(support.sum()),
    }


def averaged_over(
    units: np.ndarray, labels: np.ndarray, predicted: np.ndarray, num_classes: int
) -> dict[str, float]:
    """`scores` of each unit (a patient or a video), averaged: every unit counts the same.

    Args:
        units: `(N,)` names; clips whose unit is unknown (None) are left out.

    Returns:
        The averages, how many units they go over (`units`), and the accuracy of the worst one.
        Empty if no unit is known.
    """
    names = sorted({unit for unit in units if unit is not None})
    if not names:
        return {}
    matrices = [
        confusion_matrix(labels[units == name], predicted[units == name], num_classes)
        for name in names
    ]
    table = scores(np.stack(matrices))
    averages = {name: float(values.mean()) for name, values in table.items()}
    return {**averages, "worst_accuracy": float(table["accuracy"].min()), "units": len(names)}


def vote(
    actions: np.ndarray, labels: np.ndarray, probabilities: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """One answer for each source action: the mean of its parts' probabilities.

    Args:
        actions: `(N,)` names; parts of unknown action (None) are left out. Parts of one name but
            with different labels are different actions.

    Returns:
        The labels `(A,)` and probabilities `(A, num_classes)` of the actions.
    """
    known = np.array([action is not None for action in actions], bool)
    keys = [(a, int(label)) for a, label in zip(actions[known], labels[known], strict=True)]
    order = {key: number for number, key in enumerate(dict.fromkeys(keys))}
    places = np.array([order[key] for key in keys], int)
    sums = np.zeros((len(order), probabilities.shape[1]))
    np.add.at(sums, places, probabilities[known])
    parts = np.bincount(places, minlength=len(order))[:, None]
    return np.array([label for _, label in order], int), sums / np.maximum(parts, 1)


def log_losses(labels: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """The negative log-likelihood of each clip's true class, `(N,)`, in nats; at most 27.6."""
    likelihood = probabilities[np.arange(len(labels)), labels]
    return -np.log(np.maximum(likelihood, 1e-12))


def brier_scores(labels: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """The squared distance of each clip's probabilities from the truth, `(N,)`, 0 to 2.

    Summed over the classes, as in Brier, Monthly Weather Review 78 (1950).
    """
    truth = np.eye(probabilities.shape[1])[labels]
    return ((probabilities - truth) ** 2).sum(axis=1)


def reliability(confidence: np.ndarray, right: np.ndarray, bins: int = ECE_BINS) -> pd.DataFrame:
    """Confidence against accuracy in equally wide bins of confidence; empty bins are left out.

    Returns:
        A row a bin: `confidence` and `accuracy` (means), `clips`.
    """
    place = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)  # (low, high] each
    table = pd.DataFrame({"confidence": confidence, "accuracy": right.astype(float), "bin": place})
    groups = table.groupby("bin")
    return groups.mean().assign(clips=groups.size())


def expected_calibration_error(
    confidence: np.ndarray, right: np.ndarray, bins: int = ECE_BINS
) -> float:
    """The mean distance of accuracy from confidence over the bins, weighted by their clips.

    Guo et al., "On Calibration of Modern Neural Networks", ICML 2017, arXiv:1706.04599.
    """
    table = reliability(confidence, right, bins)
    gaps = (table["accuracy"] - table["confidence"]).abs()
    return float((gaps * table["clips"]).sum() / table["clips"].sum())


def risk_coverage(confidence: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How wrong the most confident clips are, the others unanswered.

    Clips of equal confidence are in no order: each of them counts with their mean error.

    Returns:
        coverage `(N,)`, 1/N to 1, and risk `(N,)`, the share of wrong answers among the answered.
    """
    count = np.arange(1, len(confidence) + 1)
    _, group = np.unique(-confidence, return_inverse=True)  # 0: the most confident ones
    wrong = np.bincount(group, weights=~right) / np.bincount(group)
    return count / len(count), np.cumsum(wrong[np.sort(group)]) / count


def area_under_risk_coverage(confidence: np.ndarray, right: np.ndarray) -> float:
    """The mean risk over all coverages; lower is better.

    Geifman et al., "Bias-Reduced Uncertainty Estimation for Deep Neural Classifiers", ICLR 2019,
    arXiv:1805.08206.
    """
    return float(risk_coverage(confidence, right)[1].mean())


def selective(
    confidence: np.ndarray, right: np.ndarray, thresholds: np.ndarray | float
) -> dict[str, float | None]:
    """How much is answered at a threshold of confidence, and how much of that is wrong.

    Args:
        thresholds: the lowest confidence that is answered, one for all clips or `(N,)`.
    """
    answered = confidence >= thresholds
    error = float((~right[answered]).mean()) if answered.any() else None
    return {"coverage": float(answered.mean()), "error": error}
