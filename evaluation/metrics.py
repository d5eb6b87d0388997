"""Classification, calibration and selective-prediction metrics.

A class without a clip in the split has no recall: it is NaN and left out of the averages, which say
how many classes they cover. (Zero in its place would make the scores too low, and one would make
them too high.) A class that has clips but is never predicted has precision and F1 zero.

Throughout, `labels` are `(N,)` true classes, `probabilities` `(N, num_classes)`, `confidence` the
highest probability of each clip, and `correct` whether the class with that probability is the true
one. evaluation/bootstrap.py computes intervals for the scores.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import pandas as pd

ECE_BINS = 15  # as in Guo et al., arXiv:1706.04599

MORE_SCORES: dict[str, Callable[[np.ndarray], np.ndarray]] = {}
"""Your own scores by name: functions of `matrices` as in `scores`, `(..., C, C)` to `(...)`. Each
is part of every test, with its intervals over patients (docs/extending.md)."""


def confusion_matrix(labels: np.ndarray, predictions: np.ndarray, num_classes: int) -> np.ndarray:
    """Counts `(num_classes, num_classes)`: rows are the truth, columns the predictions."""
    pairs = np.asarray(labels) * num_classes + np.asarray(predictions)
    return np.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes)


def scores(matrices: np.ndarray) -> dict[str, np.ndarray]:
    """Accuracy, balanced accuracy (mean recall), macro-F1 and `MORE_SCORES` of confusion matrices.

    Args:
        matrices: `(..., C, C)` counts, or weights; at least one clip in each.

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
        **{name: score(matrices) for name, score in MORE_SCORES.items()},
    }


def per_class(
    matrix: np.ndarray,
    classes: Sequence[str],
    labels: np.ndarray | None = None,
    patients: np.ndarray | None = None,
) -> "pd.DataFrame":
    """Precision, recall and F1 of each class, and its number of clips and patients.

    The column `patients` is there if `labels` and `patients` (None: unknown) are given.
    """
    import pandas as pd  # takes half a second to import

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
        known = [{p for p in patients[labels == label] if p} for label in range(len(classes))]
        table["patients"] = np.array([len(names) for names in known])
    return pd.DataFrame(table, index=pd.Index(list(classes), name="class"))


def summarize(matrix: np.ndarray) -> dict[str, Any]:
    """The headline numbers of a confusion matrix.

    Returns:
        `scores`; `majority_baseline`, the accuracy of always predicting the largest class of the
        split; `classes_present`, the number of classes that the averages cover; `clips`.
    """
    support = matrix.sum(axis=1)
    return {
        **{name: float(value) for name, value in scores(matrix).items()},
        "majority_baseline": float(support.max() / support.sum()),
        "classes_present": int((support > 0).sum()),
        "clips": int(support.sum()),
    }


def grouped_scores(
    groups: np.ndarray, labels: np.ndarray, y_pred: np.ndarray, num_classes: int
) -> dict[str, float]:
    """`scores` of each group (a patient or a video), averaged: every group counts the same.

    Args:
        groups: `(N,)` names; clips whose group is unknown (None) are left out.

    Returns:
        The averages, the number of groups (`groups`), and the accuracy of the worst group. Empty if
        no group is known.
    """
    names = sorted({group for group in groups if group is not None})
    if not names:
        return {}
    matrices = [
        confusion_matrix(labels[groups == name], y_pred[groups == name], num_classes)
        for name in names
    ]
    table = scores(np.stack(matrices))
    averages = {name: float(values.mean()) for name, values in table.items()}
    return {**averages, "worst_accuracy": float(table["accuracy"].min()), "groups": len(names)}


def average_by_action(
    actions: np.ndarray, labels: np.ndarray, probabilities: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """One prediction per source action: the mean of the probabilities of its parts.

    Args:
        actions: `(N,)` names; parts of an unknown action (None) are left out. Parts with the same
            name but different labels are different actions.

    Returns:
        The labels `(A,)` and probabilities `(A, num_classes)` of the actions.
    """
    known = np.array([action is not None for action in actions], bool)
    keys = [(a, int(label)) for a, label in zip(actions[known], labels[known], strict=True)]
    order = {key: number for number, key in enumerate(dict.fromkeys(keys))}
    numbers = np.array([order[key] for key in keys], int)
    sums = np.zeros((len(order), probabilities.shape[1]))
    np.add.at(sums, numbers, probabilities[known])
    parts = np.bincount(numbers, minlength=len(order))[:, None]
    return np.array([label for _, label in order], int), sums / np.maximum(parts, 1)


def precision_recall(positive: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Precision and recall at every threshold of a score, from the highest threshold downwards.

    Clips of equal score are above a threshold together.

    Args:
        positive: `(N,)` whether each clip is of the class; at least one is.
        scores: `(N,)` the probability of the class.

    Returns:
        Precision and recall, `(thresholds,)` each; the last recall is 1.
    """
    order = np.argsort(-scores, kind="stable")
    hits = np.cumsum(positive[order])
    last = np.append(np.flatnonzero(np.diff(scores[order])), len(scores) - 1)  # of equal scores
    return hits[last] / (last + 1), hits[last] / hits[-1]


def average_precision(labels: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """The average precision of each class against all others, `(num_classes,)`.

    The sum of the precisions at all thresholds, weighted by the rise of the recall, without
    interpolation: the definition of scikit-learn's `average_precision_score`. A class without clips
    has none: it is NaN.
    """
    values = np.full(probabilities.shape[1], np.nan)
    for label in np.unique(labels):
        precision, recall = precision_recall(labels == label, probabilities[:, label])
        values[label] = (np.diff(recall, prepend=0) * precision).sum()
    return values


def top_k_accuracy(labels: np.ndarray, probabilities: np.ndarray, k: int) -> float:
    """The fraction of clips whose true class is among the k classes of highest probability.

    Of equal probabilities the class with the lower number comes first, as in argmax, so that the
    top-1 accuracy is the accuracy.
    """
    ranked = np.argsort(-probabilities, axis=1, kind="stable")
    return float((ranked[:, :k] == labels[:, None]).any(axis=1).mean())


def per_sample_nll(labels: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """The negative log-likelihood of each clip's true class, `(N,)`, in nats; at most 27.6."""
    likelihood = probabilities[np.arange(len(labels)), labels]
    return -np.log(np.maximum(likelihood, 1e-12))


def brier_scores(labels: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """The squared distance of each clip's probabilities from the truth, `(N,)`, 0 to 2.

    Summed over the classes, as in Brier, Monthly Weather Review 78 (1950).
    """
    truth = np.eye(probabilities.shape[1])[labels]
    return ((probabilities - truth) ** 2).sum(axis=1)


def confidence_bins(confidence: np.ndarray, bins: int = ECE_BINS) -> np.ndarray:
    """`(N,)` the number of the bin (low, high] that each confidence lies in."""
    return np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)


def calibration_curve(
    confidence: np.ndarray, correct: np.ndarray, bins: int = ECE_BINS
) -> "pd.DataFrame":
    """Confidence against accuracy in equally wide bins of confidence; empty bins are left out.

    Returns:
        One row per bin: `confidence` and `accuracy` (means), `clips`.
    """
    table = {"confidence": confidence, "accuracy": correct.astype(float)}
    import pandas as pd

    groups = pd.DataFrame(table | {"bin": confidence_bins(confidence, bins)}).groupby("bin")
    return groups.mean().assign(clips=groups.size())


def expected_calibration_error(
    confidence: np.ndarray, correct: np.ndarray, bins: int = ECE_BINS
) -> float:
    """The mean distance of accuracy from confidence over the bins, weighted by their clips.

    Guo et al., "On Calibration of Modern Neural Networks", ICML 2017, arXiv:1706.04599.
    """
    table = calibration_curve(confidence, correct, bins)
    gaps = (table["accuracy"] - table["confidence"]).abs()
    return float((gaps * table["clips"]).sum() / table["clips"].sum())


def risk_coverage(confidence: np.ndarray, correct: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The error rate (risk) if only the most confident clips are answered, for each number of them.

    Clips of equal confidence have no order: each of them counts with their mean error.

    Returns:
        coverage `(N,)`, 1/N to 1, and risk `(N,)`, the fraction of wrong answers.
    """
    count = np.arange(1, len(confidence) + 1)
    _, group = np.unique(-confidence, return_inverse=True)  # 0: the most confident ones
    wrong = np.bincount(group, weights=~correct) / np.bincount(group)
    return count / len(count), np.cumsum(wrong[np.sort(group)]) / count


def area_under_risk_coverage(confidence: np.ndarray, correct: np.ndarray) -> float:
    """The mean risk over all coverages; lower is better.

    Geifman et al., "Bias-Reduced Uncertainty Estimation for Deep Neural Classifiers", ICLR 2019,
    arXiv:1805.08206.
    """
    return float(risk_coverage(confidence, correct)[1].mean())


def selective_risk(
    confidence: np.ndarray, correct: np.ndarray, thresholds: np.ndarray | float
) -> dict[str, float | None]:
    """The fraction of clips that is answered at a confidence threshold (`coverage`), and the
    fraction of wrong answers among them (`error`).

    Args:
        thresholds: lowest confidence that is answered, one for all clips or `(N,)`.
    """
    answered = confidence >= thresholds
    error = float((~correct[answered]).mean()) if answered.any() else None
    return {"coverage": float(answered.mean()), "error": error}
