"""Accuracy on corrupted clips compared with the accuracy on clean ones.

After Hendrycks and Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and
Perturbations", ICLR 2019, arXiv:1903.12261; the corruptions are in clips/corruptions.py.
"""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from clips.corruptions import SEVERITIES
from evaluation.bootstrap import (
    cluster_bootstrap_weights,
    confidence_interval,
    format_interval,
    n_clusters,
)
from evaluation.predictions import Predictions
from utils.files import write_all, write_json
from utils.tables import write_table
from utils.text_table import frame_table

if TYPE_CHECKING:
    import pandas as pd

N_RESAMPLES = 2000

EvaluateFn = Callable[[str, int], Predictions]
"""maps a corruption and its severity to the predictions for the corrupted clips"""


def measure_robustness(
    evaluate: EvaluateFn, clean: Predictions, corruptions: Iterable[str], folder: Path
) -> None:
    """Evaluate every corruption and severity; print the table for people, and write
    robustness.csv, .json and .png into a folder.

    Raises:
        UserError: a file could not be written; the others are.
    """
    import pandas as pd

    from evaluation.plots import plot_robustness

    rows, correct = [], {}
    for name in corruptions:
        for severity in SEVERITIES:
            corrupted = evaluate(name, severity)
            correct[name, severity] = corrupted.correct
            rows.append({"corruption": name, "severity": severity, **corrupted.scores})
    table = pd.DataFrame(rows)
    summary = summarize(clean, correct)
    print(format_robustness(table, summary))
    accuracy = summary["clean_accuracy"]
    write_all(
        {
            folder / "robustness.csv": lambda path: write_table(path, table, float_format=".6g"),
            folder / "robustness.json": lambda path: write_json(path, summary),
            folder / "robustness.png": lambda path: plot_robustness(table, accuracy, path),
        }
    )


def summarize(clean: Predictions, correct: Mapping[tuple[str, int], np.ndarray]) -> dict[str, Any]:
    """The mean accuracy over all severities, per corruption and overall, against the clean one.

    Args:
        correct: for each corruption and severity whether each clip was correct, `(N,)`.

    Returns:
        clean_accuracy; for `all` and each corruption its mean accuracy, that accuracy relative to
        the clean one (None if the clean one is zero), and the 95 % interval over patients of the
        loss, clean accuracy minus mean accuracy (None unless two patients are known), both
        resampled together.
    """
    patients = clean.groups("patient")
    names = list(dict.fromkeys(name for name, _ in correct))
    hits = {n: np.mean([correct[n, s] for s in SEVERITIES], axis=0) for n in names}  # (N,) each
    hits["all"] = np.mean(list(hits.values()), axis=0)
    lost = np.stack([clean.correct - hits[name] for name in hits], axis=1)  # (N, names)
    weights = cluster_bootstrap_weights(patients, N_RESAMPLES)
    resampled = np.concatenate(
        [chunk @ lost / chunk.sum(axis=1, keepdims=True) for chunk in weights]
    )
    accuracy = float(clean.correct.mean())
    corruptions = {
        name: {
            "mean_accuracy": float(hits[name].mean()),
            "relative": float(hits[name].mean() / accuracy) if accuracy else None,
            "loss_interval": confidence_interval(resampled[:, column], n_clusters(patients)),
        }
        for column, name in enumerate(hits)
    }
    return {"clean_accuracy": accuracy, "clips": len(clean), "corruptions": corruptions}


def format_robustness(table: "pd.DataFrame", summary: Mapping[str, Any]) -> str:
    """The accuracy per corruption and severity, and the means, for people."""
    import pandas as pd

    wide = table.pivot(index="corruption", columns="severity", values="accuracy")
    wide = wide.loc[table["corruption"].unique()]
    means = summary["corruptions"]
    wide["mean"] = [means[name]["mean_accuracy"] for name in wide.index]
    wide["relative"] = pd.Series({n: means[n]["relative"] for n in wide.index}, dtype=float)
    wide["lost (95 % interval)"] = [
        format_interval(means[name]["loss_interval"]) for name in wide.index
    ]
    overall = means["all"]
    relative = "-" if overall["relative"] is None else f"{overall['relative']:.1%}"
    unknown = "not known: there are no two patients to compare"
    lost = format_interval(overall["loss_interval"], missing=unknown)
    return (
        f"\naccuracy on corrupted clips, by severity (clean: {summary['clean_accuracy']:.4f})\n"
        f"{frame_table(wide)}\n"
        f"mean corruption accuracy {overall['mean_accuracy']:.4f}, {relative} of the clean one; "
        f"lost (95 % interval): {lost}"
    )
