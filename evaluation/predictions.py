"""The predictions of a model for a split, in memory and as predictions.csv."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from clips.manifest import UNCERTAIN, ClipRow
from evaluation import metrics
from utils.errors import UserError
from utils.tables import read_table, write_csv


@dataclass
class Predictions:
    """The predictions for the clips of a split, in the split's order."""

    rows: Sequence[ClipRow]
    """`(N,)` the clips, with their true classes"""
    probabilities: np.ndarray
    """`(N, num_classes)`, averaged over views"""
    unreadable: list[str] = field(default_factory=list)
    """an error message for each clip of the split that could not be read and is missing here"""
    uncalibrated: np.ndarray | None = None
    """`(N, num_classes)`, the probabilities without the temperature, if they are known"""
    distance: np.ndarray | None = None
    """`(N,)` distances to the nearest class mean, averaged over views, if they are known; see
    evaluation/novelty.py"""
    features: np.ndarray | None = None
    """`(N, num_features)` float32, the input of the classifier averaged over frames and views, if
    it was recorded"""
    folds: Sequence[str] = ()
    """`(N,)` the fold whose model predicted each clip, in a cross-validation; else empty"""

    def __len__(self) -> int:
        return len(self.rows)

    @cached_property
    def labels(self) -> np.ndarray:
        """`(N,)` true classes."""
        return np.array([row.label for row in self.rows], int)

    @cached_property
    def y_pred(self) -> np.ndarray:
        """`(N,)` classes with the highest probability."""
        return self.probabilities.argmax(axis=1)

    @cached_property
    def confidence(self) -> np.ndarray:
        """`(N,)` probabilities of the predicted classes."""
        return self.probabilities.max(axis=1)

    @cached_property
    def correct(self) -> np.ndarray:
        """`(N,)` whether the predicted class is the true class."""
        return self.y_pred == self.labels

    @cached_property
    def confusion(self) -> np.ndarray:
        """`(num_classes, num_classes)` counts, see `metrics.confusion_matrix`."""
        return metrics.confusion_matrix(self.labels, self.y_pred, self.probabilities.shape[1])

    @cached_property
    def scores(self) -> dict[str, float]:
        """Accuracy, balanced accuracy and macro-F1, see `metrics.scores`."""
        return {name: float(value) for name, value in metrics.scores(self.confusion).items()}

    @property
    def loss(self) -> float:
        """Mean negative log-likelihood of the true classes."""
        return float(metrics.per_sample_nll(self.labels, self.probabilities).mean())

    def summary(self) -> dict[str, Any]:
        """`metrics.summarize`, the loss, and the number of missing clips."""
        counts = {"loss": self.loss, "unreadable_clips": len(self.unreadable)}
        return {**metrics.summarize(self.confusion), **counts}

    def groups(self, kind: str) -> np.ndarray:
        """`(N,)` each clip's `patient`, `video` or `action`, None where it is unknown."""
        groups = np.empty(len(self.rows), object)
        groups[:] = [getattr(row, kind) for row in self.rows]
        return groups

    @cached_property
    def numbered_patients(self) -> list[str]:
        """The patients in the order of their numbers in pictures and reports, from 1: by accuracy,
        the lowest first.

        Equal ones are sorted by a hash: an alphabetical order would tell something about their
        names.
        """
        clips = self.clips_of_patients

        def key(name: str) -> tuple[float, str]:
            accuracy = float(self.correct[clips[name]].mean())
            return accuracy, hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest()

        return sorted(clips, key=key)

    @cached_property
    def clips_of_patients(self) -> dict[str, list[int]]:
        """The indices of the clips of each known patient."""
        clips: dict[str, list[int]] = {}
        for index, row in enumerate(self.rows):
            if row.patient is not None:
                clips.setdefault(row.patient, []).append(index)
        return clips


_GROUPS = ("patient", "video", "action")


def write_predictions(
    path: str | Path,
    predictions: Predictions,
    classes: Sequence[str],
    thresholds: np.ndarray | float,
    folds: Sequence[str] = (),
) -> None:
    """Write one row per clip: path, fold if given, label, prediction, decision, patient, video,
    action, all probabilities.

    The decision is the prediction, or `uncertain` below the threshold (one for all, or `(N,)`).
    """
    decided = predictions.confidence >= thresholds
    fold_column = ["fold"] if folds else []
    probability_columns = [f"p_{name}" for name in classes]
    table = [
        ["path", *fold_column, "label", "prediction", "decision", *_GROUPS, *probability_columns]
    ]
    for i, row in enumerate(predictions.rows):
        prediction = classes[predictions.y_pred[i]]
        decision = prediction if decided[i] else UNCERTAIN
        table.append(
            [
                str(row.path),
                *folds[i : i + 1],
                classes[row.label],
                prediction,
                decision,
                *(getattr(row, name) for name in _GROUPS),
                *(f"{probability:.9g}" for probability in predictions.probabilities[i]),
            ]
        )
    write_csv(path, table)


def read_predictions(path: Path) -> tuple[Predictions, list[str], np.ndarray]:
    """Read a predictions.csv.

    Returns:
        The predictions, the names of the classes, and for each clip, `(N,)`, whether a decision was
        made (its confidence reached the threshold).

    Raises:
        UserError: there is no such file, or it is not a predictions.csv.
    """
    try:
        content = read_table(path, delimiter=",")
        header = content.header(str)
        columns = [name for name in header[header.index("path") :] if name.startswith("p_")]
        table = [row for _, row in content.records(str)]
        classes = [name.removeprefix("p_") for name in columns]
        numbers = [[float(row[name]) for name in columns] for row in table]
        probabilities = np.array(numbers).reshape(len(table), len(columns))
        rows = [
            ClipRow(
                Path(row["path"]),
                classes.index(row["label"]),
                *(row[name] or None for name in _GROUPS),
            )
            for row in table
        ]
        # The column was called `answer` in earlier versions, and before that there was none.
        decided = [
            row.get("decision", row.get("answer", row["prediction"])) == row["prediction"]
            for row in table
        ]
    except FileNotFoundError:
        raise UserError(f"{path}: no such file (finish the training, or run evaluate.py)") from None
    except (KeyError, ValueError, OSError, UserError):
        raise UserError(f"{path}: not a predictions.csv of this version: evaluate again") from None
    valid = ((probabilities >= 0) & (probabilities <= 1)).all()  # NaN is not
    if not rows or not classes or not valid:
        raise UserError(f"{path}: holds no predictions, or impossible ones: evaluate again")
    folds = [row["fold"] for row in table] if "fold" in header else ()
    return Predictions(rows, probabilities, folds=folds), classes, np.array(decided, bool)
