"""What a model said of a split's clips, in memory and as predictions.csv."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd

from clips.manifest import UNCERTAIN, ClipRow
from evaluation import metrics
from utils.errors import UserError
from utils.files import write_text


@dataclass
class Predictions:
    """What a model said of the clips of a split, in the split's order."""

    rows: Sequence[ClipRow]
    """(N,) the clips, with their true classes"""
    probabilities: np.ndarray
    """(N, num_classes), averaged over views"""
    unreadable: list[str] = field(default_factory=list)
    """a line for each clip of the split that is missing from the above"""
    untempered: np.ndarray | None = None
    """(N, num_classes), the probabilities without the temperature, if they are known"""

    def __len__(self) -> int:
        return len(self.rows)

    @cached_property
    def labels(self) -> np.ndarray:
        """(N,) true classes"""
        return np.array([row.label for row in self.rows], int)

    @cached_property
    def predicted(self) -> np.ndarray:
        """(N,) the classes with the highest probability"""
        return self.probabilities.argmax(axis=1)

    @cached_property
    def confidence(self) -> np.ndarray:
        """(N,) their probability"""
        return self.probabilities.max(axis=1)

    @cached_property
    def right(self) -> np.ndarray:
        """(N,) whether they are the true ones"""
        return self.predicted == self.labels

    @cached_property
    def confusion(self) -> np.ndarray:
        """(num_classes, num_classes) counts, see `metrics.confusion_matrix`"""
        return metrics.confusion_matrix(self.labels, self.predicted, self.probabilities.shape[1])

    @cached_property
    def scores(self) -> dict[str, float]:
        """accuracy, balanced accuracy and macro-F1, see `metrics.scores`"""
        return {name: float(value) for name, value in metrics.scores(self.confusion).items()}

    @property
    def loss(self) -> float:
        """mean negative log-likelihood of the true classes"""
        return float(metrics.log_losses(self.labels, self.probabilities).mean())

    def units(self, kind: str) -> np.ndarray:
        """(N,) each clip's `patient`, `video` or `action`, None where it is unknown"""
        units = np.empty(len(self.rows), object)
        units[:] = [getattr(row, kind) for row in self.rows]
        return units


def write_predictions(
    path: Path, predictions: Predictions, classes: Sequence[str], thresholds: np.ndarray | float
) -> None:
    """Write a row a clip: path, truth, prediction, answer, whose clip it is, all probabilities.

    The answer is the prediction, or `uncertain` below the threshold (one for all, or `(N,)`).
    """
    names = np.array(classes, object)
    said = names[predictions.predicted]
    table = pd.DataFrame(
        {
            "path": [str(row.path) for row in predictions.rows],
            "label": names[predictions.labels],
            "prediction": said,
            "answer": np.where(predictions.confidence >= thresholds, said, UNCERTAIN),
            **{kind: predictions.units(kind) for kind in ("patient", "video", "action")},
        }
    )
    columns = [f"p_{name}" for name in classes]
    probabilities = pd.DataFrame(predictions.probabilities, columns=columns)
    listing = pd.concat([table, probabilities], axis=1)
    write_text(path, listing.to_csv(index=False, float_format="%.9g"))


def read_predictions(path: Path) -> tuple[Predictions, list[str]]:
    """Read a predictions.csv back, with the names of its classes.

    Raises:
        UserError: there is none, or it is not one of ours.
    """
    try:
        # As text: a patient called 058, or NA, must stay what it is.
        table = pd.read_csv(path, dtype=str, keep_default_na=False, index_col=False)
        columns = [name for name in table.columns if name.startswith("p_")]
        classes = [name.removeprefix("p_") for name in columns]
        probabilities = table[columns].to_numpy(float)
        units = table[["patient", "video", "action"]].itertuples(index=False)
        labels = [classes.index(name) for name in table["label"]]
        paths = map(Path, table["path"])
    except FileNotFoundError:
        raise UserError(f"{path}: no such file (finish the training, or run evaluate.py)") from None
    except (KeyError, ValueError, OSError, pd.errors.ParserError):
        raise UserError(f"{path}: not a predictions.csv of this version: evaluate again") from None
    possible = ((probabilities >= 0) & (probabilities <= 1)).all()  # NaN is not
    if not len(table) or not classes or not possible:
        raise UserError(f"{path}: holds no predictions, or impossible ones: evaluate again")
    rows = [
        ClipRow(place, label, *(name or None for name in names))
        for place, label, names in zip(paths, labels, units, strict=True)
    ]
    return Predictions(rows, probabilities), classes
