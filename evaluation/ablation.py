"""The ablations of ablate.py, and the table of their differences from the baseline."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from evaluation import metrics
from evaluation.bootstrap import (
    N_RESAMPLES,
    cluster_bootstrap_weights,
    confidence_interval,
    format_interval,
    interval_columns,
    n_clusters,
    resampled_scores,
)
from evaluation.predictions import Predictions
from utils.errors import UserError
from utils.files import to_markdown
from utils.run_dir import read_sessions

if TYPE_CHECKING:
    import pandas as pd

BASELINE = "baseline"

ABLATIONS: dict[str, dict[str, Any]] = {
    BASELINE: {},
    "plain shuffling": {"sampler_tau": 0.0},
    "all classes equally often": {"sampler_tau": 1.0},
    "inverse class weights": {"class_weights": "inverse", "sampler_tau": 0.0},
    "class-balanced weights": {"class_weights": "effective", "sampler_tau": 0.0},
    "focal loss": {"loss": "focal"},
    "LDAM-DRW": {"loss": "ldam", "class_weights": "effective", "sampler_tau": 0.0},
    "balanced softmax": {"loss": "balanced_softmax", "sampler_tau": 0.0},
    "logit adjustment": {
        "loss": "logit_adjustment",
        "sampler_tau": 0.0,
        "logit_adjust_tau": 0.5,
    },
    "label smoothing": {"label_smoothing": 0.1},
    "no label smoothing": {"label_smoothing": 0.0},
    "EMA of the weights": {"ema_decay": 0.98},
    "mixup": {"mixup_alpha": 0.2},
    "cutmix": {"cutmix_alpha": 1.0},
    "layer-wise learning-rate decay": {"layer_decay": 0.7},
    "frozen BatchNorm": {"freeze_batchnorm": True},
    "stochastic depth": {"drop_path": 0.1},
    "RandAugment": {"rand_augment": 2},
    "random erasing": {"random_erase": 0.25},
    "no augmentation": {
        **dict.fromkeys(("hflip_prob", "rotation", "translate", "scale"), 0.0),
        **dict.fromkeys(("brightness", "contrast", "saturation", "hue"), 0.0),
    },
    "4 frames": {"n_frames": 4},
    "8 frames": {"n_frames": 8},
    "16 frames": {"n_frames": 16},
    "32 frames": {"n_frames": 32},
    "224 px": {"image_size": 224},
    "320 px": {"image_size": 320},
    "384 px": {"image_size": 384},
    "2 views": {"test_views": 2},
    "2 views x 3 crops": {"test_views": 2, "test_crops": 3},
    "LSTM": {"lstm_layers": 1, "temporal_pooling": "mean"},
    "attention pooling": {"temporal_pooling": "attention"},
    "mean pooling": {"temporal_pooling": "mean"},
    "statistics": {"temporal_pooling": "statistics"},
    "root statistics": {"temporal_pooling": "root_statistics"},
    "2 x 2 spatial pooling": {"spatial_pool": 2},
    "no spatial parts": {"spatial_pool": 1},
    "linear head": {"head": "linear"},
    "head by AdamW": {
        "head": "adamw",
        "freeze_until": "top",
        "sampler_tau": 0.5,
        "dropout": 0.5,
        "learning_rate": 1e-3,
    },
    "ResNet-50": {"backbone": "resnet50"},
    "ConvNeXt-Tiny": {"backbone": "convnext_tiny"},
    "EfficientNet-Lite0": {"backbone": "efficientnet_lite0"},
    "RGB alone": {"modality": "rgb"},
    "RGB difference alone": {"modality": "rgbdiff"},
    "optical flow alone": {"modality": "flow"},
    "motion vectors alone": {"modality": "mv"},
    "+ RGB difference": {"modality": "rgb+rgbdiff"},
    "+ RGB difference, early fusion": {"modality": "rgb+rgbdiff", "fusion": "early"},
    "+ optical flow": {"modality": "rgb+flow"},
    "+ optical flow, summary": {"modality": "rgb+flow", "fusion": "summary"},
    "+ motion vectors": {"modality": "rgb+mv"},
    "+ motion vectors, summary": {"modality": "rgb+mv", "fusion": "summary"},
}
"""the settings that each ablation changes, by its name in tables"""

POST_HOC = {"post-hoc logit adjustment, 0.5": 0.5, "post-hoc logit adjustment, 1": 1.0}
"""ablations that need no training: tau of `evaluate.py --logit-adjust-tau` on the baseline"""

SCORES = {"accuracy": "accuracy", "macro_f1": "macro-F1"}
"""the scores of the table, with their titles"""


def ablation_table(predictions: Mapping[str, Sequence[Predictions]]) -> "pd.DataFrame":
    """One row per ablation; the first one is the baseline that the others are compared with.

    For `accuracy` and `macro_f1`: the mean over the seeds, `sd` (n - 1), `low` and `high` of its
    95 % interval, and `delta`, the difference from the baseline, with an interval of its own.

    Args:
        predictions: for each ablation the test predictions of its seeds.

    Raises:
        UserError: they are not of the same clips.
    """
    import pandas as pd

    baseline, seeds = next(iter(predictions.items()))
    order = _order(seeds[0])
    labels, patients = seeds[0].labels[order], seeds[0].groups("patient")[order]
    clips = [str(seeds[0].rows[i].path) for i in order]
    n = n_clusters(patients) or len(labels)
    resampled: dict[str, dict[str, np.ndarray]] = {}
    rows = []
    for ablation, seeds in predictions.items():
        values: dict[str, list[np.ndarray]] = {name: [] for name in SCORES}
        for seed in seeds:
            order = _order(seed)
            if [str(seed.rows[i].path) for i in order] != clips:
                raise UserError(f"{ablation}: was tested on other clips than {baseline}")
            weights = cluster_bootstrap_weights(patients, N_RESAMPLES)
            scores = resampled_scores(weights, labels, seed.probabilities[order])
            for name in SCORES:
                values[name].append(scores[name])
        resampled[ablation] = {name: np.mean(values[name], axis=0) for name in SCORES}
        row: dict[str, float | str] = {"ablation": ablation, "seeds": len(seeds)}
        for name in SCORES:
            scores = [seed.scores[name] for seed in seeds]
            row[name] = float(np.mean(scores))
            row[f"{name} sd"] = float(np.std(scores, ddof=1)) if len(scores) > 1 else float("nan")
            row |= interval_columns(name, confidence_interval(resampled[ablation][name], n))
            row[f"{name} delta"] = row[name] - (rows[0][name] if rows else row[name])
            delta = resampled[ablation][name] - resampled[baseline][name]
            row |= interval_columns(f"{name} delta", confidence_interval(delta, n))
        rows.append(row)
    return pd.DataFrame(rows)


def label_table(
    runs: "pd.DataFrame", predictions: Mapping[float, Sequence[Predictions]]
) -> "pd.DataFrame":
    """One row per fraction of the training labels, with the scores as in `ablation_table`.

    The columns fraction, share (of the training clips that was used), patients (NaN if unknown) and
    clips; share, patients and clips are means over the seeds, each of which draws other patients.

    Args:
        runs: one row per training with the columns fraction, share, patients and clips.
        predictions: for each fraction the test predictions of its seeds.

    Raises:
        UserError: they are not of the same clips.
    """
    import pandas as pd

    used = runs.groupby("fraction")[["share", "patients", "clips"]].mean().loc[list(predictions)]
    scores = ablation_table({f"{fraction:g}": seeds for fraction, seeds in predictions.items()})
    columns = [name for name in scores if name != "ablation" and "delta" not in name]
    return pd.concat([used.reset_index(), scores[columns]], axis=1)


def majority_scores(predictions: Predictions) -> dict[str, float]:
    """The SCORES of always predicting the largest class of these clips."""
    matrix = np.zeros_like(predictions.confusion)
    support = predictions.confusion.sum(axis=1)
    matrix[:, support.argmax()] = support
    return {name: float(value) for name, value in metrics.scores(matrix).items() if name in SCORES}


def format_table(
    table: "pd.DataFrame", seeds: Sequence[int], baseline: Predictions, run: Path
) -> str:
    """The table as Markdown, with the data and the machine that it was measured on.

    Args:
        baseline: predictions of the baseline, and `run` the folder that they are from.
    """
    import pandas as pd

    rows = []
    for row in table.to_dict(orient="records"):
        cells = {"ablation": row["ablation"], **_score_cells(row)}
        for score, title in SCORES.items():
            delta = _with_interval(f"{row[f'{score} delta']:+.3f}", row, f"{score} delta", "+.3f")
            cells[f"{title} - baseline"] = "-" if row["ablation"] == BASELINE else delta
        rows.append(cells)
    return to_markdown(pd.DataFrame(rows), _conditions(seeds, baseline, run))


def format_label_table(
    table: "pd.DataFrame",
    seeds: Sequence[int],
    predictions: Predictions,
    run: Path,
    majority: Mapping[str, float],
) -> str:
    """The table of `label_table` as Markdown, otherwise as `format_table`.

    Args:
        predictions: those of one run, and `run` the folder of one.
        majority: scores of always predicting the largest class.
    """
    import pandas as pd

    rows = []
    for row in table.to_dict(orient="records"):
        counts = {name: f"{row[name]:.4g}" for name in ("patients", "clips")}
        used = {"fraction": f"{row['fraction']:g}", "share used": f"{row['share']:.1%}"}
        rows.append({**used, **counts, **_score_cells(row)})
        if math.isnan(row["patients"]):
            rows[-1]["patients"] = "-"
    baseline = ", ".join(f"{SCORES[name]} {value:.3f}" for name, value in majority.items())
    conditions = {
        "means over the seeds +- standard deviation (95 % interval)": "each draws other patients",
        "always the largest class": baseline,
        **_conditions(seeds, predictions, run),
    }
    return to_markdown(pd.DataFrame(rows), conditions)


def _score_cells(row: Mapping[str, float]) -> dict[str, str]:
    """The cells of the scores: mean, standard deviation and interval."""
    means = {name: f"{row[name]:.3f} +- {row[f'{name} sd']:.3f}" for name in SCORES}
    return {SCORES[name]: _with_interval(mean, row, name, ".3f") for name, mean in means.items()}


def _with_interval(value: str, row: Mapping[str, float], column: str, pattern: str) -> str:
    text = format_interval([row[f"{column} low"], row[f"{column} high"]], pattern, missing="")
    return f"{value} ({text})" if text else value


def _conditions(seeds: Sequence[int], predictions: Predictions, run: Path) -> dict[str, object]:
    """The data and the machine of a table, see `format_table`."""
    session = (read_sessions(run) or [{}])[-1]
    patients = {patient for patient in predictions.groups("patient") if patient is not None}
    return {
        "seeds": ", ".join(map(str, seeds)),
        "test clips": len(predictions),
        "patients": len(patients) or "unknown: the intervals take clips as independent",
        "device": session.get("device", "unknown"),
        "torch": session.get("torch", "unknown"),
    }


def _order(predictions: Predictions) -> list[int]:
    """The indices of the clips by their paths: folds may come in any order."""
    return sorted(range(len(predictions)), key=lambda i: str(predictions.rows[i].path))


def plot_deltas(table: "pd.DataFrame", path: str | Path) -> None:
    """Draw the differences of an `ablation_table` from the baseline, the largest on top.

    A point is filled where its interval excludes zero.
    """
    from matplotlib.figure import Figure

    from evaluation.plots import plain_text, save_figure

    table = table.iloc[1:].sort_values("macro_f1 delta")
    figure = Figure(figsize=(9, 1.6 + 0.28 * len(table)), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, (name, title) in zip(panels, SCORES.items(), strict=True):
        for y, (_, row) in enumerate(table.iterrows()):
            low, high = row[f"{name} delta low"], row[f"{name} delta high"]
            excludes_zero = low > 0 or high < 0
            axes.plot([low, high], [y, y], "C0", lw=1.2)
            axes.plot(row[f"{name} delta"], y, "C0o", mfc="C0" if excludes_zero else "white")
        axes.axvline(0, color="k", lw=0.8)
        axes.grid(axis="x", alpha=0.3)
        axes.set(title=f"{title}: difference from the baseline", xlabel="bars: 95 % intervals")
    panels[0].set_yticks(range(len(table)), [plain_text(name) for name in table["ablation"]])
    save_figure(figure, path)
