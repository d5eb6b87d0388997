"""Runs that were tested on the same clips: what compare.py compares."""

import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from checkpoint import build_from_checkpoint, load_checkpoint
from clips.manifest import ClipRow
from evaluation.predictions import Predictions, read_predictions
from utils.errors import UserError


@dataclass
class Run:
    """A model and what it said of the test clips."""

    folder: Path
    predictions: Predictions
    """sorted by path and label: no result depends on a file's order"""
    classes: list[str]
    facts: dict[str, Any]
    """the folder's test_metrics.json, empty if there is none"""
    model: nn.Module
    config: dict[str, Any]
    """the settings of its training"""
    folds: int
    """how many models the predictions are of"""
    label: str = ""
    """what it is called in the results"""

    @property
    def views(self) -> int:
        """Clips that the model saw for each clip that it was tested on."""
        return int(self.facts.get("views") or 1) * int(self.facts.get("crops") or 1)

    @property
    def clips(self) -> list[tuple[str, int]]:
        """What each clip is known by."""
        return [_identity(row) for row in self.predictions.rows]


def read_run(folder: Path) -> Run:
    """Read a run, an evaluation or a cross-validation.

    Raises:
        UserError: something is missing or damaged.
    """
    predictions, classes = read_predictions(folder / "predictions.csv")
    order = sorted(range(len(predictions)), key=lambda n: _identity(predictions.rows[n]))
    rows = [predictions.rows[n] for n in order]
    facts = _read_facts(folder / "test_metrics.json")
    checkpoint = Path(facts.get("checkpoint") or folder)  # evaluate.py's results may be anywhere
    places = (folder, folder / "fold1", checkpoint, checkpoint.parent, folder.resolve().parent)
    place = next((place for place in places if (place / "best.pt").is_file()), None)
    if place is None:
        raise UserError(
            f"{folder}: no best.pt in it, in its fold1 or in the folder above: give a run folder, "
            "a folder of evaluate.py in one, or a folder of a cross-validation"
        )
    state = load_checkpoint(place)
    return Run(
        folder,
        Predictions(rows, predictions.probabilities[order]),
        classes,
        facts,
        build_from_checkpoint(state),
        state["config"],
        len(list(folder.glob("fold*/best.pt"))) if place.name == "fold1" else 1,
    )


def read_runs(folders: Sequence[str]) -> list[Run]:
    """Read the runs to compare and give them labels.

    Raises:
        UserError: one of them cannot be read, or they cannot be compared.
    """
    if len({Path(folder).resolve() for folder in folders}) < max(2, len(folders)):
        raise UserError("give two runs at least, each once")
    runs = [read_run(Path(folder)) for folder in folders]
    for other in runs[1:]:
        require_same_test(runs[0], other)
    models = [run.config["model"] for run in runs]
    labels = label_runs(models, [run.folder.resolve() for run in runs])
    for run, label in zip(runs, labels, strict=True):
        run.label = label
    return runs


def require_same_test(one: Run, other: Run) -> None:
    """Refuse runs that were tested on different clips or classes.

    Raises:
        UserError: with the numbers of clips, and the remedy.
    """
    if one.classes != other.classes:
        raise UserError(
            f"{one.folder} has the classes {', '.join(map(repr, one.classes))}, but {other.folder} "
            f"has {', '.join(map(repr, other.classes))}: compare runs that were trained with the "
            "same --classes in the same order"
        )
    here, there = Counter(one.clips), Counter(other.clips)
    if here != there:
        raise UserError(
            f"{one.folder} and {other.folder} were tested on different clips (path and label): "
            f"{(here - there).total()} only in the first, {(there - here).total()} only in the "
            "second, {} in both: test both on the same manifest (python evaluate.py RUN --csv "
            "MANIFEST) and compare the folders that it makes".format((here & there).total())
        )


def label_runs(models: Sequence[str], folders: Sequence[Path]) -> list[str]:
    """The models' names; runs of the same model have as much of their folder's path as they need.

    Args:
        folders: absolute, no two the same.
    """
    labels = []
    for model, folder in zip(models, folders, strict=True):
        pairs = zip(models, folders, strict=True)
        rivals = [other.parts for name, other in pairs if name == model and other != folder]
        length = next(n for n in count(1) if all(r[-n:] != folder.parts[-n:] for r in rivals))
        suffix = " ".join("/".join(folder.parts[-length:]).split())  # a name may hold line breaks
        labels.append(f"{model} ({suffix})" if rivals else model)
    return labels


def known_patients(runs: Sequence[Run]) -> np.ndarray:
    """`(N,)` each clip's patient, None where unknown, by the run that knows the most."""
    found = [run.predictions.units("patient") for run in runs]
    return max(found, key=lambda patients: sum(patient is not None for patient in patients))


def _identity(row: ClipRow) -> tuple[str, int]:
    """A clip's path, wherever it was given relative to, and its label."""
    return os.path.abspath(row.path), row.label


def _read_facts(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError:
        raise UserError(f"{path}: is damaged: evaluate again") from None
