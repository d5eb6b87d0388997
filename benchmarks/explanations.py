"""Which explanation passes which check, for trained models of planted evidence (demo/evidence.py).

    python -m demo.evidence data/evidence
    python -m benchmarks.explanations runs/... runs/... --data data/evidence

The models must have been trained on that data. Explained are right answers of the test split, whose
evidence lies in known frames and a known quadrant. A method passes for a model if

- its most relevant frame is one of the planted ones in at least 90 % of the clips, and its most
  relevant place in the planted quadrant in at least 80 %;
- deleting what it calls relevant lowers the probability faster than deleting in a random order,
  and inserting it raises it faster, both with a 95 % interval over patients that excludes 0;
- with random weights its maps are others: rank correlation below 0.5 with the original ones.
"""

import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import torch
import tyro
from torch import nn

from benchmarks.timing import environment, report
from checkpoint import load_checkpoint, rebuild_model
from clips.manifest import ClipRow
from config import from_dict
from evaluation.bootstrap import interval_columns
from explanation import checks
from explanation.methods import explain, require_method
from explanation.relevance import Method, Relevance
from modeling.inference import prepare_for_inference
from training.engine import evaluate
from training.loaders import eval_loader, load_splits
from utils.cli import cli_main, parse
from utils.device import get_device
from utils.errors import UserError
from utils.tables import read_table

METHODS: tuple[Method, ...] = ("gradcam++", "rollout", "occlusion", "integrated-gradients")

TEMPORAL, SPATIAL, RANDOMISED = 0.9, 0.8, 0.5
"""lowest pointing accuracies, and the highest correlation with random weights, of a pass"""


@dataclass
class ExplanationsConfig:
    """The runs, and the data that they were trained on."""

    runs: Annotated[tuple[str, ...], tyro.conf.Positional]
    """run folders, each trained on the data"""
    data: str = "data/evidence"
    """folder of `python -m demo.evidence`"""
    methods: tuple[Method, ...] = METHODS
    """methods to check; one that is not defined for a model is left out"""
    clips: int = 48
    """most clips that are explained, spread evenly over the right answers"""
    randomised_clips: int = 12
    """most clips that are explained again after each stage of random weights"""
    steps: int = checks.STEPS
    """steps of the curves of deletion and insertion"""
    num_workers: int = 0
    """processes that read clips"""
    device: str = "auto"
    """device: auto, cpu, cuda, cuda:1, mps"""
    output: str = "runs/explanations"
    """folder for the table"""


@dataclass(frozen=True)
class Planted:
    """Explained clips, and where their evidence lies."""

    clips: torch.Tensor
    """`(N, T, C, H, W)` uint8"""
    targets: torch.Tensor
    """`(N,)` true and predicted class"""
    patients: np.ndarray
    """`(N,)`"""
    first: np.ndarray
    last: np.ndarray
    """`(N,)` first and last frame of the evidence"""
    quadrants: np.ndarray
    """`(N,)` numbers of the quarters, see `checks.QUADRANTS`"""


def read_truth(data: Path) -> dict[str, Mapping[str, str]]:
    """The rows of evidence.csv by the path of the clip.

    Raises:
        UserError: the folder holds no planted evidence.
    """
    try:
        table = read_table(data / "evidence.csv", ",")
    except FileNotFoundError:
        raise UserError(
            f"{data}: no evidence.csv: render it with python -m demo.evidence {data}"
        ) from None
    return {str((data / "clips" / row["path"]).resolve()): row for _, row in table.records(str)}


def right_answers(
    run: str, config: ExplanationsConfig, truth: Mapping[str, Mapping[str, str]]
) -> tuple[str, nn.Module, float, Planted]:
    """The model's name, the model, its test accuracy, and test clips that it classifies rightly.

    Raises:
        UserError: the run was trained on other data.
    """
    state = load_checkpoint(run)
    settings = dataclasses.replace(from_dict(state["config"]), num_workers=config.num_workers)
    device = get_device(config.device)
    rows: Sequence[ClipRow] = load_splits(settings)["test"]
    if unknown := [row.path for row in rows if str(Path(row.path).resolve()) not in truth]:
        raise UserError(f"{run}: was not trained on {config.data}: it does not hold {unknown[0]}")
    model = rebuild_model(state)
    loader = eval_loader(rows, settings)
    predictions = evaluate(model, loader, device)
    right = np.flatnonzero(predictions.correct)
    if not len(right):
        raise UserError(f"{run}: no test clip is classified rightly: train it longer")
    chosen = right[
        np.linspace(0, len(right) - 1, min(config.clips, len(right))).round().astype(int)
    ]
    evidence = [truth[str(Path(rows[i].path).resolve())] for i in chosen]
    planted = Planted(
        torch.stack([loader.dataset[i][0] for i in chosen]).to(device),
        torch.tensor([rows[i].label for i in chosen]),
        np.array([rows[i].patient for i in chosen], object),
        np.array([int(row["first_frame"]) for row in evidence]),
        np.array([int(row["last_frame"]) for row in evidence]),
        np.array([checks.QUADRANTS.index(row["quadrant"]) for row in evidence]),
    )
    return settings.model_name, model.to(device), float(predictions.correct.mean()), planted


def in_batches(
    model: nn.Module, planted: Planted, method: Method, size: int = 8
) -> tuple[Relevance, float]:
    """The relevance of all clips, and the seconds per clip."""
    start = time.perf_counter()
    parts = [
        explain(model, clips, targets, method)
        for clips, targets in zip(
            planted.clips.split(size), planted.targets.split(size), strict=True
        )
    ]
    seconds = (time.perf_counter() - start) / len(planted.clips)
    maps = torch.cat([part.maps for part in parts])
    return Relevance(maps, torch.cat([part.frames for part in parts])), seconds


def check_method(
    model: nn.Module, planted: Planted, method: Method, randomised_clips: int, steps: int
) -> dict[str, Any]:
    """The results of all checks of one method, as a row of the table."""
    prepared = prepare_for_inference(model, planted.clips.device)
    relevance, seconds = in_batches(prepared, planted, method)
    in_time = checks.temporal_pointing(relevance.frames, planted.first, planted.last)
    precision = checks.temporal_average_precision(relevance.frames, planted.first, planted.last)
    in_space = checks.spatial_pointing(relevance.maps, planted.quadrants)
    row: dict[str, Any] = {
        "method": method,
        "clips": len(planted.clips),
        "frames": in_time.score,
        **interval_columns("frames", checks.mean_interval(in_time.scores, planted.patients)[1]),
        "frames chance": in_time.chance,
        "frames AP": precision.score,
        "places": in_space.score,
        **interval_columns("places", checks.mean_interval(in_space.scores, planted.patients)[1]),
        "places chance": in_space.chance,
    }
    clips, targets, shape = planted.clips, planted.targets, tuple(relevance.maps.shape)
    curves = checks.deletion_insertion(prepared, clips, targets, relevance.maps, steps)
    faithful = True
    for name, maps in (
        ("random", checks.random_maps(shape)),
        ("centre", checks.centre_maps(shape)),
    ):
        baseline = checks.deletion_insertion(prepared, clips, targets, maps, steps)
        gain = checks.gain(curves, baseline, planted.patients)
        for kind, (mean, interval) in gain._asdict().items():
            row |= {f"{kind} vs {name}": mean, **interval_columns(f"{kind} vs {name}", interval)}
            if name == "random":
                faithful &= interval is not None and interval[0] > 0
    some = slice(0, randomised_clips)
    random = checks.randomisation(model, clips[some], targets[some], method, ends_only=True)
    row |= {"random head": random.means[0], "random weights": random.means[-1]}
    row["s/clip"] = seconds
    row["passes"] = bool(
        in_time.score >= TEMPORAL
        and in_space.score >= SPATIAL
        and faithful
        and random.means[-1] < RANDOMISED
    )
    return row


def check_runs(config: ExplanationsConfig) -> Iterator[dict[str, Any]]:
    """The rows of the table, one per run and method.

    Raises:
        UserError: see `right_answers`.
    """
    truth = read_truth(Path(config.data))
    for run in config.runs:
        name, model, accuracy, planted = right_answers(run, config, truth)
        for method in config.methods:
            try:
                require_method(model, method)
            except UserError:
                continue  # rollout of a network without such attention
            row = check_method(model, planted, method, config.randomised_clips, config.steps)
            print(f"{name} {method}: {'passes' if row['passes'] else 'does not pass'}", flush=True)
            yield {"model": name, "accuracy": accuracy, **row}


@cli_main
def main() -> None:
    config = parse(ExplanationsConfig, __doc__)
    if min(config.clips, config.randomised_clips, config.steps) < 1:
        raise UserError("clips, randomised_clips and steps must be at least 1")
    table = pd.DataFrame(check_runs(config))
    device = get_device(config.device)
    report("explanations", table, environment(device, ("scipy",)), config.output)


if __name__ == "__main__":
    main()
