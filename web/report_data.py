"""The results of a run as a report needs them, with intervals for every number."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from clips.manifest import ClipRow
from clips.manifest_formats import ManifestOptions, read_records
from config import TrainConfig, manifest_paths
from evaluation import metrics
from evaluation.bootstrap import (
    N_RESAMPLES,
    Interval,
    canonical_order,
    cluster_bootstrap_weights,
    confidence_interval,
    iid_bootstrap_weights,
    patient_clips,
)
from evaluation.predictions import Predictions
from evaluation.runs import Run, read_run
from utils.errors import UserError
from utils.files import read_json
from utils.run_dir import read_sessions
from utils.tables import read_table
from web.anonymize import identifiers

# What test_metrics.json must hold.
_NEEDED = {
    "accuracy",
    "actions",
    "averages",
    "calibration",
    "clips",
    "intervals",
    "majority_baseline",
    "per_class",
    "selective",
}


@dataclass(frozen=True)
class History:
    """The epochs of one training."""

    name: str
    """name of the fold; empty outside a cross-validation"""
    table: Mapping[str, np.ndarray]
    """the columns of metrics.csv, `(epochs,)` each"""
    best_epoch: int | None
    """the epoch that was kept"""


@dataclass(frozen=True)
class ReportData:
    """The results of a run, and how they came about."""

    run: Run
    settings: Mapping[str, Any] = field(default_factory=dict)
    """config.json of the training, as it was written"""
    sessions: Sequence[dict[str, Any]] = ()
    """of the training: commands, versions, hardware"""
    evaluations: Sequence[dict[str, Any]] = ()
    """the same of evaluate.py, if it wrote the results"""
    histories: Sequence[History] = ()
    folds: Mapping[str, Sequence[str]] | None = None
    """the columns of cross_validation.csv, as text"""
    other_names: frozenset[str] = frozenset()
    """names of patients and clips in the manifests of the training, if they are still there"""
    written: str = ""
    """when the results were written"""

    @property
    def results(self) -> Mapping[str, Any]:
        return self.run.results

    @property
    def predictions(self) -> Predictions:
        return self.run.predictions

    @property
    def classes(self) -> Sequence[str]:
        return self.run.classes

    @property
    def split(self) -> str:
        return str(self.results.get("split", "test"))


def load_report_data(folder: str | Path) -> ReportData:
    """Read a run folder, a folder of evaluate.py inside one, or one of a cross-validation.

    Raises:
        UserError: it holds no results, or not those of this version.
    """
    folder = Path(folder)
    folder = folder.parent if folder.is_file() else folder  # one of its files stands for it
    _require_results(folder)
    run = read_run(folder)
    if not run.results.keys() >= _NEEDED:
        raise UserError(
            f"{folder}: results of an earlier version: evaluate again (python evaluate.py {folder})"
        )
    same_classes = set(run.results["per_class"]) == set(run.classes)
    if run.results["clips"] != len(run.predictions) or not same_classes:
        raise UserError(
            f"{folder}: test_metrics.json and predictions.csv are not of the same test: "
            f"evaluate again (python evaluate.py {folder})"
        )
    own = run.home == folder
    written = time.localtime((folder / "test_metrics.json").stat().st_mtime)
    return ReportData(
        run,
        read_json(run.home / "config.json"),
        read_sessions(run.home),
        [] if own else read_sessions(folder),
        _histories(run, run.results.get("epoch") if own else None),
        _read_table(run.home / "cross_validation.csv"),
        _names_in_manifests(run.config),
        time.strftime("%Y-%m-%d %H:%M", written),
    )


def more_intervals(
    data: ReportData, n_resamples: int = N_RESAMPLES
) -> dict[str, dict[str, Interval]]:
    """The intervals that `score_intervals` leaves out, in its form.

    Over few clips the ECE is biased upwards, and over a resample even more. For a model that is
    perfectly calibrated, the plain percentiles of 12 patients with 30 clips each never held the
    true ECE in 300 simulations. So the lower end is that of the percentiles mirrored at the
    estimate, which removes the bias, and the upper end is the plain one: at least 95 % of the
    simulated intervals held the truth, and the estimate is always inside.

    Returns:
        `ece`; `coverage` and `error` at the threshold; `recall of NAME` for each class.
    """
    predictions = data.predictions
    patients = predictions.groups("patient")
    order = canonical_order(predictions.labels, predictions.probabilities, patients)
    patients = patients[order]
    masks = {name: (part[order], among[order]) for name, (part, among) in _fractions(data).items()}
    gaps = _bin_gaps(predictions.confidence[order], predictions.correct[order])
    columns = np.stack([column for pair in masks.values() for column in pair], axis=1)
    columns = np.concatenate((gaps, columns.astype(float)), axis=1)
    intervals: dict[str, dict[str, Interval]] = {name: {} for name in ("ece", *masks)}
    n = len(patients)
    clusters = patient_clips(patients)
    patient_of = np.empty(n, int)
    patient_of[np.concatenate(clusters)] = np.repeat(range(len(clusters)), list(map(len, clusters)))
    for kind, weights, cluster_of in (
        ("patients", cluster_bootstrap_weights(patients, n_resamples), patient_of),
        ("clips", iid_bootstrap_weights(n, n_resamples), np.arange(n)),
    ):
        sums = np.concatenate([chunk @ columns for chunk in weights])  # (n_resamples, columns)
        pairs = sums[:, gaps.shape[1] :].reshape(n_resamples, len(masks), 2)
        clips = pairs[:, 0, 1]  # all clips of a resample
        ece = np.abs(sums[:, : gaps.shape[1]]).sum(axis=1) / clips
        estimate = data.results["calibration"]["ece"]
        intervals["ece"][kind] = _bias_corrected_interval(ece, estimate, cluster_of.max() + 1)
        for k, (name, (_, among)) in enumerate(masks.items()):
            count = len(np.unique(cluster_of[among]))
            intervals[name][kind] = _ratio_interval(pairs[:, k], count)
    return intervals


def _fractions(data: ReportData) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The fractions by name, as two masks of clips: those counted, and those they are among."""
    labels, correct, decided = data.predictions.labels, data.predictions.correct, data.run.decided
    recalls = {
        f"recall of {name}": (correct & (labels == label), labels == label)
        for label, name in enumerate(data.classes)
    }
    everything = np.ones(len(labels), bool)
    return {"coverage": (decided, everything), "error": (decided & ~correct, decided), **recalls}


def _ratio_interval(pairs: np.ndarray, n: int) -> Interval:
    """The interval of a fraction; resamples with an empty denominator are left out."""
    pairs = pairs[pairs[:, 1] > 0]
    return confidence_interval(pairs[:, 0] / pairs[:, 1], n) if len(pairs) else None


def _bin_gaps(confidence: np.ndarray, correct: np.ndarray) -> np.ndarray:
    """`(N, bins)`: each clip's confidence minus its correctness, in the column of its bin."""
    gaps = np.zeros((len(confidence), metrics.ECE_BINS))
    gaps[np.arange(len(confidence)), metrics.confidence_bins(confidence)] = confidence - correct
    return gaps


def _bias_corrected_interval(values: np.ndarray, estimate: float, n: int) -> Interval:
    plain = confidence_interval(values, n)
    mirrored = confidence_interval(2 * estimate - values, n)
    if plain is None or mirrored is None:
        return None
    return [max(0.0, min(plain[0], mirrored[0])), max(plain[1], estimate)]


def _require_results(folder: Path) -> None:
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder (give a run folder, e.g. runs/<time>_<model>)")
    if not (folder / "test_metrics.json").exists():
        inside = sorted(path.parent.name for path in folder.glob("*/test_metrics.json"))
        raise UserError(
            f"{folder}: holds no results (test_metrics.json): finish the training with "
            f"`python train.py --resume {folder}`, or run `python evaluate.py {folder}`"
            + (f"; there are results in {', '.join(inside)}" if inside else "")
        )


def _names_in_manifests(config: TrainConfig | None) -> frozenset[str]:
    """The names in the manifests of a training, if it was not on the demo data."""
    if not config or not config.data_root:
        return frozenset()
    found, options = manifest_paths(config), ManifestOptions.of(config)
    rows = [
        ClipRow(Path(record.path), 0, record.patient, record.video, record.action)
        for manifest in ([found] if isinstance(found, Path) else found.values())
        for record in read_records(manifest, options)[0]
    ]
    return frozenset(identifiers(rows))


def _histories(run: Run, epoch: int | None) -> list[History]:
    """The epochs of the training, or of the training of each fold.

    Args:
        epoch: the epoch of the checkpoint that was tested, if it is known.
    """
    paths = [run.home / "metrics.csv"]
    paths += sorted(run.home.glob("fold*/metrics.csv"), key=_fold_order)
    histories = []
    for path in paths:
        table = numeric_columns(_read_table(path) or {})
        if not len(epochs := table.get("epoch", ())):
            continue
        if not np.isfinite(epochs).all():
            raise UserError(f"{path}: is damaged: an epoch is no number")
        own = path.parent == run.home
        best_epoch = epoch if own and epoch else _best_epoch(table, run.config)
        histories.append(History("" if own else path.parent.name, table, best_epoch))
    return histories


def _fold_order(path: Path) -> tuple[int, str]:
    name = path.parent.name
    return len(name), name  # fold2 before fold10


def _best_epoch(table: Mapping[str, np.ndarray], config: TrainConfig | None) -> int | None:
    """The epoch that train.py keeps: the first of the best."""
    monitor = config.monitor if config else "macro_f1"
    if monitor == "last":
        return int(table["epoch"].max())
    values = table.get(f"val_{monitor}")
    if values is None or np.isnan(values).all():
        return None
    index = np.nanargmin(values) if monitor == "loss" else np.nanargmax(values)
    return int(table["epoch"][index])


def numeric_columns(table: Mapping[str, Sequence[str]]) -> dict[str, np.ndarray]:
    """The columns that hold nothing but numbers, as arrays; an empty cell is NaN."""
    columns = {}
    for name, cells in table.items():
        try:
            columns[name] = np.array([float(cell or "nan") for cell in cells])
        except ValueError:
            continue
    return columns


def _read_table(path: Path) -> dict[str, list[str]] | None:
    """The columns of a CSV file, as text; None if there is no file."""
    try:
        table = read_table(path, delimiter=",")
    except FileNotFoundError:
        return None
    header, records = table.header(str), table.records(str)
    cut_off = [line for line, row in records if len(row) < len(header)]
    if not header or cut_off:
        raise UserError(f"{path}, line {(cut_off or [1])[0]}: not a table, or cut off")
    return {name: [row[name] for _, row in records] for name in header}
