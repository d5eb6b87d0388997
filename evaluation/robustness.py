"""What smoke, blood, fog and bad video cost: the accuracy on corrupted clips against clean ones.

After Hendrycks and Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and
Perturbations", ICLR 2019, arXiv:1903.12261; what is corrupted how stands in corruptions.py.
"""

from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pandas as pd

from clips.corruptions import SEVERITIES, Corruption
from evaluation import bootstrap
from evaluation.plots import plot_robustness
from evaluation.predictions import Predictions
from utils.files import write_json, write_text

DRAWS = 2000

Answer = Callable[[tuple[Corruption, int]], Predictions]
"""from a corruption and its severity to what the model says of the corrupted clips"""


def measure_robustness(
    answer: Answer, clean: Predictions, corruptions: Iterable[Corruption], folder: Path
) -> str:
    """Test on every corruption and severity. Writes robustness.csv, .json and .png into a folder.

    Returns:
        The table for people.
    """
    rows, right = [], {}
    for name in corruptions:
        for severity in SEVERITIES:
            corrupted = answer((name, severity))
            right[name, severity] = corrupted.right
            rows.append({"corruption": name, "severity": severity, **corrupted.scores})
    table = pd.DataFrame(rows)
    summary = summarize(clean, right)
    write_text(folder / "robustness.csv", table.to_csv(index=False, float_format="%.6g"))
    write_json(folder / "robustness.json", summary)
    plot_robustness(table, summary["clean_accuracy"], folder / "robustness.png")
    return describe(table, summary)


def summarize(clean: Predictions, right: dict[tuple[str, int], np.ndarray]) -> dict:
    """The mean accuracy over all severities, of each corruption and of all, against the clean one.

    Args:
        right: for each corruption and severity whether each clip was right, `(N,)`.

    Returns:
        clean_accuracy; for `all` and each corruption its mean accuracy, that relative to the clean
        one (None if that is zero), and the 95 % interval over patients of the loss, clean accuracy
        minus mean accuracy (None unless two patients are known), both resampled together.
    """
    patients = clean.units("patient")
    names = list(dict.fromkeys(name for name, _ in right))
    hits = {n: np.mean([right[n, s] for s in SEVERITIES], axis=0) for n in names}  # (N,) each
    hits["all"] = np.mean(list(hits.values()), axis=0)
    lost = np.stack([clean.right - hits[name] for name in hits], axis=1)  # (N, names)
    weights = bootstrap.patient_weights(patients, DRAWS)
    resampled = np.concatenate([some @ lost / some.sum(axis=1, keepdims=True) for some in weights])
    units = bootstrap.independent_units(patients)
    accuracy = float(clean.right.mean())
    found = {
        name: {
            "mean_accuracy": float(hits[name].mean()),
            "relative": float(hits[name].mean() / accuracy) if accuracy else None,
            "loss_interval": bootstrap.interval(resampled[:, column], units),
        }
        for column, name in enumerate(hits)
    }
    return {"clean_accuracy": accuracy, "clips": len(clean), "corruptions": found}


def describe(table: pd.DataFrame, summary: dict) -> str:
    """The accuracy of each corruption and severity, and the means, in words."""
    wide = table.pivot(index="corruption", columns="severity", values="accuracy")
    wide = wide.loc[table["corruption"].unique()]
    found = summary["corruptions"]
    wide["mean"] = [found[name]["mean_accuracy"] for name in wide.index]
    wide["relative"] = pd.Series({n: found[n]["relative"] for n in wide.index}, dtype=float)
    wide["lost (95 % interval)"] = [_interval(found[name]["loss_interval"]) for name in wide.index]
    overall = found["all"]
    relative = "-" if overall["relative"] is None else f"{overall['relative']:.1%}"
    return (
        f"\naccuracy on corrupted clips, by severity (clean: {summary['clean_accuracy']:.4f})\n"
        f"{wide.to_string(float_format='{:.3f}'.format, na_rep='-')}\n"
        f"mean corruption accuracy {overall['mean_accuracy']:.4f}, {relative} of the clean one; "
        f"lost {_interval(overall['loss_interval'])}"
    )


def _interval(found: list[float] | None) -> str:
    return "-" if found is None else "{:.3f} to {:.3f}".format(*found)
