"""What the numbers mean. All of them come from one confusion matrix.

A class without a clip in the split has no recall: it is NaN and left out of the averages, which say
over how many classes they go. (A zero in its place would punish the model for the split, and a one
would flatter it.) A class that has clips but is never predicted has precision and F1 zero.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd


def confusion_matrix(labels: np.ndarray, predictions: np.ndarray, num_classes: int) -> np.ndarray:
    """Counts `(num_classes, num_classes)`: rows are the truth, columns the predictions."""
    pairs = np.asarray(labels) * num_classes + np.asarray(predictions)
    return np.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes)


def per_class(matrix: np.ndarray, classes: Sequence[str]) -> pd.DataFrame:
    """Precision, recall, F1 and support (number of clips) of each class."""
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
    return pd.DataFrame({**table, "support": support}, index=pd.Index(list(classes), name="class"))


def summarize(matrix: np.ndarray, classes: Sequence[str]) -> dict[str, Any]:
    """The headline numbers of a confusion matrix.

    Returns:
        accuracy; balanced_accuracy (mean recall) and macro_f1 (mean F1) over the classes_present;
        chance_accuracy, what always answering the split's largest class would give; clips.
    """
    table = per_class(matrix, classes)
    clips = int(matrix.sum())
    return {
        "accuracy": float(np.diag(matrix).sum() / clips),
        "balanced_accuracy": float(table["recall"].mean()),
        "macro_f1": float(table["f1"].mean()),
        "chance_accuracy": float(matrix.sum(axis=1).max() / clips),
        "classes_present": int((table["support"] > 0).sum()),
        "clips": clips,
    }
