"""Reading run folders: the results that training, evaluate.py and cross_validate.py write there."""

import dataclasses
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from clips.manifest import ClipRow
from config import TrainConfig, from_dict
from evaluation.predictions import Predictions, read_predictions
from evaluation.results import read_results
from utils.errors import UserError
from utils.files import read_json


@dataclass(frozen=True)
class Run:
    """The results of a test, and the training run that they belong to."""

    folder: Path
    """folder of the results: a run, an evaluation or a cross-validation"""
    home: Path
    """folder of the training run (`folder` itself, unless evaluate.py wrote it)"""
    results: Mapping[str, Any]
    """test_metrics.json, empty if there is none"""
    predictions: Predictions
    classes: Sequence[str]
    decided: np.ndarray
    """`(N,)` whether the confidence of each clip reached the threshold"""
    config: TrainConfig | None
    """the settings of the training, None if config.json is not there"""

    @property
    def folds(self) -> int:
        """How many models the predictions come from."""
        return max(1, len(self.results.get("folds", ())))

    @property
    def num_views(self) -> int:
        """How many times the model saw each clip in the test."""
        return int(self.results.get("views") or 1) * int(self.results.get("crops") or 1)

    @property
    def clip_keys(self) -> list[tuple[str, int]]:
        """What identifies each clip: its absolute path and its label."""
        return [_clip_key(row) for row in self.predictions.rows]

    def checkpoint(self, fold: str = "") -> Path | None:
        """The checkpoint file that the results come from; None: it is not there any more.

        Args:
            fold: a fold of a cross-validation, see `Predictions.folds`; empty: its first one.
        """
        tested = Path(self.results.get("checkpoint") or self.folder)
        name = tested.name if tested.suffix == ".pt" else "best.pt"
        folders = (self.home, self.home / "fold1", tested, tested.parent)
        if fold:  # a cell of predictions.csv may hold anything
            folders = (self.home / fold,) if re.fullmatch(r"fold[0-9]+", fold) else ()
        return next((path / name for path in folders if (path / name).is_file()), None)

    def load_state(self, fold: str = "") -> dict[str, Any]:
        """The checkpoint that the results come from, see `checkpoint`.

        Raises:
            UserError: there is none, or it is damaged.
        """
        from checkpoint import load_checkpoint  # imports torch

        if path := self.checkpoint(fold):
            return load_checkpoint(path)
        raise UserError(
            f"{self.folder}: no best.pt in it, in its fold1 or in the folder above: give a run "
            "folder, a folder of evaluate.py in one, or a folder of a cross-validation"
        )


def read_run(folder: str | Path) -> Run:
    """Read a run, an evaluation or a cross-validation.

    Raises:
        UserError: the predictions are missing, or something is damaged.
    """
    folder = Path(folder)
    predictions, classes, decided = read_predictions(folder / "predictions.csv")
    results = read_results(folder / "test_metrics.json")
    home = _home(folder, results)
    settings = read_json(home / "config.json")
    config = from_dict(settings, source=str(home / "config.json")) if settings else None
    return Run(folder, home, results, predictions, classes, decided, config)


def read_runs(folders: Sequence[str]) -> list[Run]:
    """Read runs that were tested on the same clips, sorted by clip.

    Raises:
        UserError: one of them cannot be read, or they cannot be compared.
    """
    if len({Path(folder).resolve() for folder in folders}) < max(2, len(folders)):
        raise UserError("give two runs at least, each once")
    runs = [_sorted_by_clip(read_run(folder)) for folder in folders]
    for run in runs[1:]:
        check_same_test_set(runs[0], run)
    return runs


def check_same_test_set(first: Run, second: Run) -> None:
    """Refuse runs that were tested on different clips or classes.

    Raises:
        UserError: with the numbers of clips, and the remedy.
    """
    if first.classes != second.classes:
        raise UserError(
            f"{first.folder} has the classes {', '.join(map(repr, first.classes))}, but "
            f"{second.folder} has {', '.join(map(repr, second.classes))}: compare runs that were "
            "trained with the same --classes in the same order"
        )
    clips, others = Counter(first.clip_keys), Counter(second.clip_keys)
    if clips != others:
        raise UserError(
            f"{first.folder} and {second.folder} were tested on different clips (path and label): "
            f"{(clips - others).total()} only in the first, {(others - clips).total()} only in the "
            "second, {} in both: test both on the same manifest (python evaluate.py RUN --csv "
            "MANIFEST) and compare the folders that it makes".format((clips & others).total())
        )


def run_labels(models: Sequence[str], folders: Sequence[Path]) -> list[str]:
    """A label per run: the model's name. Where several runs have the same model, the shortest end
    of the folder's path that distinguishes them is added.

    Args:
        folders: absolute paths, all different.
    """
    labels = []
    for model, folder in zip(models, folders, strict=True):
        pairs = zip(models, folders, strict=True)
        rivals = [other.parts for name, other in pairs if name == model and other != folder]
        length = next(n for n in count(1) if all(r[-n:] != folder.parts[-n:] for r in rivals))
        suffix = " ".join("/".join(folder.parts[-length:]).split())  # a name may hold line breaks
        labels.append(f"{model} ({suffix})" if rivals else model)
    return labels


def patients_of(runs: Sequence[Run]) -> np.ndarray:
    """`(N,)` the patient of each clip or None, from the run that knows most patients."""
    patients = [run.predictions.groups("patient") for run in runs]
    return max(patients, key=lambda names: sum(name is not None for name in names))


def _home(folder: Path, results: Mapping[str, Any]) -> Path:
    """The folder of the run that results belong to: evaluate.py writes into another one."""
    if (folder / "config.json").exists():
        return folder
    checkpoint = Path(results.get("checkpoint") or folder)
    for path in (checkpoint, checkpoint.parent, folder.resolve().parent):
        if (path / "config.json").exists():
            return path
    return folder


def _sorted_by_clip(run: Run) -> Run:
    """The same run with its clips in an order that does not depend on a file's order."""
    keys = run.clip_keys
    order = sorted(range(len(keys)), key=lambda i: keys[i])
    rows = [run.predictions.rows[i] for i in order]
    folds = [run.predictions.folds[i] for i in order] if run.predictions.folds else ()
    predictions = Predictions(rows, run.predictions.probabilities[order], folds=folds)
    return dataclasses.replace(run, predictions=predictions, decided=run.decided[order])


def _clip_key(row: ClipRow) -> tuple[str, int]:
    return os.path.abspath(row.path), row.label
