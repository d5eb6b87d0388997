"""The changes to a recipe that ablate.py tries: settings of train.py, by a name for people."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from evaluation import bootstrap
from evaluation.plots import plain_text, save_figure
from evaluation.predictions import Predictions
from utils.errors import UserError

RECIPE = "recipe"

LEVERS: dict[str, dict[str, Any]] = {
    RECIPE: {},
    "plain shuffling": {"tau": 0.0},
    "all classes equally often": {"tau": 1.0},
    "inverse class weights": {"class_weights": "inverse", "tau": 0.0},
    "effective class weights": {"class_weights": "effective", "tau": 0.0},
    "focal loss": {"loss": "focal"},
    "LDAM, deferred weights": {"loss": "ldam", "class_weights": "effective", "tau": 0.0},
    "balanced softmax": {"loss": "balanced_softmax", "tau": 0.0},
    "logit adjustment": {"loss": "logit_adjustment", "tau": 0.0, "adjustment_tau": 0.5},
    "label smoothing": {"label_smoothing": 0.1},
    "no label smoothing": {"label_smoothing": 0.0},
    "averaged weights": {"ema": 0.98},
    "mixup": {"mixup": 0.2},
    "cutmix": {"cutmix": 1.0},
    "slower early stages": {"layer_decay": 0.7},
    "frozen BatchNorm": {"freeze_batchnorm": True},
    "stochastic depth": {"drop_path": 0.1},
    "RandAugment": {"rand_augment": 2},
    "random erasing": {"erasing": 0.25},
    "no augmentation": {
        **dict.fromkeys(("flip", "rotation", "translate", "zoom"), 0.0),
        **dict.fromkeys(("brightness", "contrast", "saturation", "hue"), 0.0),
    },
    "4 frames": {"n_frames": 4},
    "8 frames": {"n_frames": 8},
    "16 frames": {"n_frames": 16},
    "32 frames": {"n_frames": 32},
    "2 views": {"test_views": 2},
    "2 views x 3 crops": {"test_views": 2, "test_crops": 3},
    "LSTM": {"lstm_layers": 1, "temporal_pooling": "mean"},
    "attention": {"temporal_pooling": "attention"},
    "mean over time": {"temporal_pooling": "mean"},
    "2 x 2 parts of the picture": {"grid": 2},
    "ResNet-50": {"backbone": "resnet50"},
    "ConvNeXt-Tiny": {"backbone": "convnext_tiny"},
    "EfficientNet-Lite0": {"backbone": "efficientnet_lite0"},
    "gradients alone": {"inputs": "gradients"},
    "flow alone": {"inputs": "flow"},
    "vectors alone": {"inputs": "vectors"},
    "+ gradients": {"inputs": "rgb+gradients"},
    "+ gradients, early": {"inputs": "rgb+gradients", "fusion": "early"},
    "+ flow": {"inputs": "rgb+flow"},
    "+ flow summary": {"inputs": "rgb+flow", "fusion": "summary"},
    "+ vectors": {"inputs": "rgb+vectors"},
    "+ vectors summary": {"inputs": "rgb+vectors", "fusion": "summary"},
}

ADJUSTED = {"adjusted afterwards, 0.5": 0.5, "adjusted afterwards, 1": 1.0}
"""levers that need no training: the recipe's answers, `evaluate.py --adjust` so much"""

TITLES = {"accuracy": "accuracy", "macro_f1": "macro-F1"}


def lever_table(found: Mapping[str, Sequence[Predictions]]) -> pd.DataFrame:
    """A row a lever; the first one is what the others are compared with.

    For `accuracy` and `macro_f1`: the mean over the seeds, `sd` (n - 1), `low` and `high` of its
    95 % interval, and `gain` over the first lever with an interval of its own.

    Args:
        found: for each lever the test predictions of its seeds.

    Raises:
        UserError: they are not of the same clips.
    """
    first = next(iter(found.values()))[0]
    order = _order(first)
    labels, patients = first.labels[order], first.units("patient")[order]
    clips = [str(first.rows[n].path) for n in order]
    units = bootstrap.independent_units(patients) or len(labels)
    resampled: dict[str, dict[str, np.ndarray]] = {}
    rows = []
    for lever, seeds in found.items():
        values: dict[str, list[np.ndarray]] = {name: [] for name in TITLES}
        for one in seeds:
            order = _order(one)
            if [str(one.rows[n].path) for n in order] != clips:
                raise UserError(f"{lever}: was tested on other clips than {next(iter(found))}")
            weights = bootstrap.patient_weights(patients, bootstrap.DRAWS)
            scores = bootstrap.resampled_scores(weights, labels, one.probabilities[order])
            for name in TITLES:
                values[name].append(scores[name])
        resampled[lever] = {name: np.mean(values[name], axis=0) for name in TITLES}
        row: dict[str, float | str] = {"lever": lever, "seeds": len(seeds)}
        for name in TITLES:
            plain = [one.scores[name] for one in seeds]
            row[name] = float(np.mean(plain))
            row[f"{name} sd"] = float(np.std(plain, ddof=1)) if len(plain) > 1 else float("nan")
            row |= _ends(name, resampled[lever][name], units)
            base = rows[0][name] if rows else row[name]
            row[f"{name} gain"] = row[name] - base
            gain = resampled[lever][name] - resampled[next(iter(found))][name]
            row |= _ends(f"{name} gain", gain, units)
        rows.append(row)
    return pd.DataFrame(rows)


def _order(predictions: Predictions) -> list[int]:
    """The places of the clips by their paths: folds may come in any order."""
    return sorted(range(len(predictions)), key=lambda n: str(predictions.rows[n].path))


def _ends(name: str, values: np.ndarray, units: int) -> dict[str, float]:
    low, high = bootstrap.interval(values, units) or (float("nan"), float("nan"))
    return {f"{name} low": low, f"{name} high": high}


def plot_differences(table: pd.DataFrame, path: str | Path) -> None:
    """Draw what each lever of a `lever_table` gains over the recipe, the largest gain on top.

    A filled point's interval leaves out zero.
    """
    table = table.iloc[1:].sort_values("macro_f1 gain")
    figure = Figure(figsize=(9, 1.6 + 0.28 * len(table)), layout="constrained")
    sides = figure.subplots(1, 2, sharey=True)
    for axes, (name, title) in zip(sides, TITLES.items(), strict=True):
        for place, (_, row) in enumerate(table.iterrows()):
            low, high = row[f"{name} gain low"], row[f"{name} gain high"]
            sure = low > 0 or high < 0
            axes.plot([low, high], [place, place], "C0", lw=1.2)
            axes.plot(row[f"{name} gain"], place, "C0o", mfc="C0" if sure else "white")
        axes.axvline(0, color="k", lw=0.8)
        axes.grid(axis="x", alpha=0.3)
        axes.set(title=f"{title}: gain over the recipe", xlabel="bars: 95 % intervals")
    sides[0].set_yticks(range(len(table)), [plain_text(lever) for lever in table["lever"]])
    save_figure(figure, path)
