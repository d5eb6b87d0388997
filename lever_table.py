"""How much each lever gains over the recipe: means over seeds, intervals over patients."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

import bootstrap
from errors import UserError
from predictions import Predictions

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
