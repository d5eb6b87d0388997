"""A run's results as a report needs them: read from its folder, with intervals for everything."""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from clips.manifest import ClipRow
from clips.manifest_formats import read_records
from config import from_dict, manifest_paths
from evaluation import bootstrap, metrics
from evaluation.predictions import Predictions, read_predictions
from utils.errors import UserError
from web.anonymize import identifiers

_NEEDED = ("accuracy", "intervals", "averages", "actions", "calibration", "selective", "per_class")

Interval = list[float] | None


@dataclass(frozen=True)
class History:
    """The epochs of one training."""

    name: str
    table: pd.DataFrame
    chosen: int | None
    """the epoch that was kept"""


@dataclass(frozen=True)
class Run:
    """A run's results, and what is known of how they came about."""

    folder: Path
    results: dict[str, Any]
    predictions: Predictions
    classes: Sequence[str]
    answered: np.ndarray
    """(N,) whether the clip got an answer"""
    settings: dict[str, Any] = field(default_factory=dict)
    sessions: Sequence[dict[str, Any]] = ()
    """of the training: commands, versions, hardware"""
    evaluations: Sequence[dict[str, Any]] = ()
    """the same of evaluate.py, where it leaves them"""
    histories: Sequence[History] = ()
    folds: pd.DataFrame | None = None
    """cross_validation.csv"""
    others: frozenset[str] = frozenset()
    """names of patients and clips in the training's manifests, as far as they are still there"""
    written: str = ""
    """when the results were written"""

    @property
    def split(self) -> str:
        return str(self.results.get("split", "test"))


def load_run(folder: str | Path) -> Run:
    """Read a run folder, a folder of evaluate.py inside one, or one of a cross-validation.

    Raises:
        UserError: it holds no results, or not those of this version.
    """
    folder = Path(folder)
    folder = folder.parent if folder.is_file() else folder  # one of its files stands for it
    results = _results(folder)
    predictions, classes = read_predictions(folder / "predictions.csv")
    if results["clips"] != len(predictions) or set(results["per_class"]) != set(classes):
        raise UserError(
            f"{folder}: test_metrics.json and predictions.csv are not of the same test: "
            f"evaluate again (python evaluate.py {folder})"
        )
    table = pd.read_csv(folder / "predictions.csv", dtype=str, keep_default_na=False)
    home = _home(folder, results)
    settings = _json(home / "config.json")
    written = time.localtime((folder / "test_metrics.json").stat().st_mtime)
    return Run(
        folder,
        results,
        predictions,
        classes,
        (table.get("answer", table["prediction"]) == table["prediction"]).to_numpy(bool),
        settings,
        _sessions(home),
        _sessions(folder) if home != folder else [],
        _histories(home, settings, results.get("epoch") if home == folder else None),
        _table(home / "cross_validation.csv"),
        _names_in_manifests(settings),
        time.strftime("%Y-%m-%d %H:%M", written),
    )


def more_intervals(run: Run, draws: int = bootstrap.DRAWS) -> dict[str, dict[str, Interval]]:
    """What bootstrap.intervals leaves out, in its form.

    Over few clips ECE comes out too high, and over a resample even higher. For a model that is
    perfectly calibrated, the plain percentiles of 12 patients with 30 clips each never held the
    true ECE in 300 simulations. So the lower end is that of the percentiles mirrored at the
    estimate, which takes the bias back, and the upper end is the plain one: at least 95 % of the
    simulated intervals held the truth, and the estimate is always inside.

    Returns:
        `ece`; `coverage` and `error` of the answers; `recall of NAME` for each class.
    """
    predictions = run.predictions
    patients = predictions.units("patient")
    order = bootstrap.canonical_order(predictions.labels, predictions.probabilities, patients)
    patients = patients[order]
    shares = {name: (part[order], among[order]) for name, (part, among) in _shares(run).items()}
    gaps = _bin_gaps(predictions.confidence[order], predictions.right[order])
    columns = np.stack([column for pair in shares.values() for column in pair], axis=1)
    columns = np.concatenate((gaps, columns.astype(float)), axis=1)
    clusters = bootstrap.patient_clips(patients)
    found: dict[str, dict[str, Interval]] = {name: {} for name in ("ece", *shares)}
    for kind, weights, units in (
        ("patients", bootstrap.patient_weights(patients, draws), clusters),
        ("clips", bootstrap.clip_weights(len(patients), draws), np.arange(len(patients))[:, None]),
    ):
        sums = np.concatenate([chosen @ columns for chosen in weights])  # (draws, columns)
        pairs = sums[:, gaps.shape[1] :].reshape(draws, len(shares), 2)
        clips = pairs[:, 0, 1]  # all of a resample
        ece = np.abs(sums[:, : gaps.shape[1]]).sum(axis=1) / clips
        found["ece"][kind] = _around(ece, run.results["calibration"]["ece"], len(units))
        for number, (name, (_, among)) in enumerate(shares.items()):
            count = sum(bool(among[members].any()) for members in units)
            found[name][kind] = _ratio_interval(pairs[:, number], count)
    return found


def _shares(run: Run) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Names of shares with their masks: what is counted, and among what."""
    labels, right = run.predictions.labels, run.predictions.right
    everything = np.ones(len(labels), bool)
    recalls = {
        f"recall of {name}": (right & (labels == number), labels == number)
        for number, name in enumerate(run.classes)
    }
    return {
        "coverage": (run.answered, everything),
        "error": (run.answered & ~right, run.answered),
        **recalls,
    }


def _ratio_interval(pairs: np.ndarray, units: int) -> Interval:
    """The interval of a share; resamples without any to count among say nothing of it."""
    pairs = pairs[pairs[:, 1] > 0]
    return bootstrap.interval(pairs[:, 0] / pairs[:, 1], units) if len(pairs) else None


def _bin_gaps(confidence: np.ndarray, right: np.ndarray) -> np.ndarray:
    """`(N, bins)`: each clip's confidence minus its rightness, in its bin's column."""
    bins = metrics.ECE_BINS
    place = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)  # as in reliability
    gaps = np.zeros((len(confidence), bins))
    gaps[np.arange(len(confidence)), place] = confidence - right
    return gaps


def _around(values: np.ndarray, estimate: float, units: int) -> Interval:
    plain = bootstrap.interval(values, units)
    mirrored = bootstrap.interval(2 * estimate - values, units)
    if plain is None or mirrored is None:
        return None
    return [max(0.0, min(plain[0], mirrored[0])), max(plain[1], estimate)]


def _results(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder (give a run folder, e.g. runs/<time>_<model>)")
    if not (folder / "test_metrics.json").exists():
        inside = sorted(path.parent.name for path in folder.glob("*/test_metrics.json"))
        raise UserError(
            f"{folder}: holds no results (test_metrics.json): finish the training with "
            f"`python train.py --resume {folder}`, or run `python evaluate.py {folder}`"
            + (f"; there are results in {', '.join(inside)}" if inside else "")
        )
    results = _json(folder / "test_metrics.json")
    if not all(name in results for name in _NEEDED):
        raise UserError(
            f"{folder}: results of an earlier version: evaluate again (python evaluate.py {folder})"
        )
    return results


def _home(folder: Path, results: Mapping[str, Any]) -> Path:
    """The run that results belong to: evaluate.py writes into a folder of its own."""
    if (folder / "config.json").exists():
        return folder
    checkpoint = Path(results.get("checkpoint") or folder)
    for place in (checkpoint, checkpoint.parent, folder.parent):
        if (place / "config.json").exists():
            return place
    return folder


def _names_in_manifests(settings: Mapping[str, Any]) -> frozenset[str]:
    """What the manifests of a training name, if it was not on the demo data."""
    if not settings.get("data_root"):
        return frozenset()
    rows = [
        ClipRow(Path(record.path), 0, record.patient, record.video, record.action)
        for manifest in manifest_paths(from_dict(dict(settings))).values()
        for record in read_records(manifest)[0]
    ]
    return frozenset(identifiers(rows))


def _sessions(folder: Path) -> list[dict[str, Any]]:
    """The entries of environment.json; an older file is a single one."""
    content = _json(folder / "environment.json")
    return content.get("sessions", [content] if "command" in content else [])


def _histories(home: Path, settings: Mapping[str, Any], epoch: int | None) -> list[History]:
    """One training, or one a fold."""
    found = []
    for path in [home / "metrics.csv", *sorted(home.glob("fold*/metrics.csv"), key=_natural)]:
        table = _table(path)
        if table is None or "epoch" not in table or not len(table):
            continue
        own = path.parent == home
        chosen = epoch if own and epoch else _best_epoch(table, settings)
        found.append(History("" if own else path.parent.name, table, chosen))
    return found


def _natural(path: Path) -> tuple[int, str]:
    name = path.parent.name
    return len(name), name  # fold2 before fold10


def _best_epoch(table: pd.DataFrame, settings: Mapping[str, Any]) -> int | None:
    """The epoch that train.py keeps: the first of the best."""
    by = settings.get("select_by", "macro_f1")
    if by == "last":
        return int(table["epoch"].max())
    values = table.get(f"val_{by}")
    if values is None or values.isna().all():
        return None
    return int(table["epoch"][values.idxmin() if by == "loss" else values.idxmax()])


def _table(path: Path) -> pd.DataFrame | None:
    try:
        return pd.read_csv(path)
    except FileNotFoundError:
        return None
    except ValueError as error:  # pandas' own errors are ValueErrors
        raise UserError(f"{path}: not a table: {error}") from None


def _json(path: Path) -> dict[str, Any]:
    """A JSON file's dict; empty without the file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise UserError(f"{path}: not JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: not one of this project's files")
    return content
