"""Evaluate a checkpoint on a split.

    python evaluate.py runs/20260101-120000_tsm                    the test split
    python evaluate.py runs/20260101-120000_tsm --split val --views 2
    python evaluate.py best.pt --data-root /data/SLAM --csv other_hospital.csv
    python evaluate.py RUN --shuffle-frames                        how much of it is motion?

Everything needed to rebuild the model is in the checkpoint. Results go into a folder of the run.
"""

import dataclasses
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import pandas as pd
import torch
import tyro
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

import distributed
import metrics
from atomic import write_text
from checkpoint import build_from_checkpoint, load_checkpoint
from config import TrainConfig, from_dict
from dataset import require_readable
from device import choose_device, choose_precision, describe_device
from errors import UserError
from inference import prepare_for_inference
from interrupt import Interrupt
from loaders import eval_loader, load_splits
from manifest import ClipRow, patient_overlap, read_manifest
from plots import plot_confusion
from run_folder import write_json
from script import script


@dataclass
class Predictions:
    """What a model said of the clips of a split, in the split's order."""

    indices: np.ndarray
    """(N,) places in the split"""
    labels: np.ndarray
    """(N,) true classes"""
    probabilities: np.ndarray
    """(N, num_classes), averaged over views"""
    unreadable: list[str]
    """a line for each clip that is missing from the above"""

    @property
    def predicted(self) -> np.ndarray:
        """(N,) the classes with the highest probability"""
        return self.probabilities.argmax(axis=1)

    @cached_property
    def confusion(self) -> np.ndarray:
        """(num_classes, num_classes) counts, see `metrics.confusion_matrix`"""
        num_classes = self.probabilities.shape[1]
        return metrics.confusion_matrix(self.labels, self.predicted, num_classes)

    @property
    def loss(self) -> float:
        """mean negative log-likelihood of the true classes"""
        likelihood = self.probabilities[np.arange(len(self.labels)), self.labels]
        return float(-np.log(np.maximum(likelihood, 1e-12)).mean())


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    loader: DataLoader,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    description: str = "test",
    skip_unreadable: bool = False,
    interrupt: Interrupt | None = None,
) -> Predictions:
    """Run a model over a split. The one way validation, test and this script get their numbers.

    With several processes each runs over its own share and all get the whole result.

    Args:
        loader: from `loaders.eval_loader`.
        dtype: see `prepare_for_inference`; the softmax is taken in fp32 (fp64 on the way out).
        interrupt: looked at after each batch.

    Raises:
        Interrupted: `interrupt` was asked to stop.
        UserError: clips that cannot be read, all of them, unless `skip_unreadable`.
    """
    model = prepare_for_inference(model, device, dtype)
    indices, labels, probabilities, unreadable = [], [], [], []
    quiet = distributed.rank() != 0
    for batch in tqdm(loader, description, unit="batch", leave=False, disable=quiet, delay=1):
        unreadable += batch.unreadable
        if len(batch.labels):
            views = batch.clips.to(device, non_blocking=True)
            if views.dim() == 5:  # one view
                views = views.unsqueeze(1)  # (B, T, C, H, W) -> (B, V, T, C, H, W)
            logits = model(views.flatten(0, 1))  # (B*V, T, C, H, W) -> (B*V, classes)
            scores = logits.float().softmax(dim=1).unflatten(0, views.shape[:2])
            probabilities.append(scores.mean(dim=1).cpu())  # (B, V, classes) -> (B, classes)
            indices.append(batch.indices)
            labels.append(batch.labels)
        # Several processes hold different numbers of batches and cannot agree in between.
        if interrupt and distributed.world_size() == 1:
            interrupt.check()
    mine = None
    if labels:
        mine = [torch.cat(parts).numpy() for parts in (indices, labels, probabilities)]
    shares = distributed.gather((mine, unreadable))
    unreadable = [line for _, lines in shares for line in lines]
    if not skip_unreadable:
        require_readable(unreadable, description)
    parts = [arrays for arrays, _ in shares if arrays is not None]
    if not parts:
        raise UserError(f"none of the {description} clips can be read")
    indices, labels, probabilities = (np.concatenate(part) for part in zip(*parts, strict=True))
    if not np.isfinite(probabilities).all():
        raise UserError(
            f"the model's {description} outputs are not finite: train with a lower learning_rate "
            "or amp fp32"
        )
    order = indices.argsort()
    return Predictions(
        indices[order], labels[order], probabilities[order].astype(float), unreadable
    )


def scores(predictions: Predictions, classes: Sequence[str]) -> dict:
    """`metrics.summarize` of predictions, with their loss and how many clips are missing."""
    summary = metrics.summarize(predictions.confusion, classes)
    return {**summary, "loss": predictions.loss, "unreadable_clips": len(predictions.unreadable)}


def write_results(
    predictions: Predictions,
    rows: Sequence[ClipRow],
    classes: Sequence[str],
    folder: Path,
    facts: dict | None = None,
) -> str:
    """Write test_metrics.json, predictions.csv and confusion_matrix.csv and .png into a folder.

    Returns:
        The table for people: a line a class, and the headline numbers.
    """
    folder.mkdir(parents=True, exist_ok=True)
    matrix = predictions.confusion
    table = metrics.per_class(matrix, classes)
    summary = scores(predictions, classes)
    per_class = json.loads(table.to_json(orient="index", double_precision=15))  # NaN -> null
    write_json(folder / "test_metrics.json", {**summary, **(facts or {}), "per_class": per_class})

    probabilities = pd.DataFrame(
        predictions.probabilities, columns=[f"p_{name}" for name in classes]
    )
    names = pd.DataFrame(
        {
            "path": [str(rows[index].path) for index in predictions.indices],
            "label": [classes[label] for label in predictions.labels],
            "prediction": [classes[label] for label in predictions.predicted],
        }
    )
    listing = pd.concat([names, probabilities], axis=1)
    write_text(folder / "predictions.csv", listing.to_csv(index=False, float_format="%.6f"))
    counts = pd.DataFrame(matrix, index=pd.Index(classes, name="true\\predicted"), columns=classes)
    write_text(folder / "confusion_matrix.csv", counts.to_csv())
    plot_confusion(matrix, classes, folder / "confusion_matrix.png")
    return f"{table.to_string(float_format='{:.3f}'.format, na_rep='-')}\n\n{headline(summary)}"


def headline(summary: dict) -> str:
    """The summary in one or two lines."""
    lines = (
        f"{summary['clips']} clips: accuracy {summary['accuracy']:.4f}, "
        f"balanced accuracy {summary['balanced_accuracy']:.4f}, "
        f"macro-F1 {summary['macro_f1']:.4f} over {summary['classes_present']} classes "
        f"(always the largest class: accuracy {summary['chance_accuracy']:.4f})"
    )
    if summary.get("unreadable_clips"):
        lines += f"\nMISSING: {summary['unreadable_clips']} clips could not be read"
    return lines


@dataclass
class EvaluateConfig:
    """What to evaluate, on what."""

    checkpoint: Annotated[str, tyro.conf.Positional]
    """a run folder (its best.pt) or a checkpoint file"""
    split: Literal["train", "val", "test"] = "test"
    """which of the run's splits"""
    csv: str = ""
    """a manifest to evaluate on instead of a split"""
    data_root: str = ""
    """where the clips are now (empty: where they were in training; for --csv, beside it)"""
    cache: str | None = None
    """folder of cached clips; empty: decode (None: as in training; for --csv, decode)"""
    views: int = 1
    """temporal views of each clip, their probabilities averaged"""
    shuffle_frames: bool = False
    """shuffle each clip's frames in time: what is lost came from motion"""
    skip_unreadable: bool = False
    """leave out clips that cannot be read, and say how many"""
    batch_size: int | None = None
    """clips a batch (None: as in training)"""
    workers: int = 2
    """processes that decode clips"""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps"""
    amp: Literal["auto", "fp32", "bf16", "fp16"] = "fp32"
    """precision of the forward pass"""
    output: str = ""
    """folder for the results (empty: a folder of its own inside the run)"""


def output_folder(config: EvaluateConfig) -> Path:
    """A folder that says by its name what was evaluated."""
    if config.output:
        return Path(config.output)
    place = Path(config.checkpoint)
    parts = ["evaluate", Path(config.csv).stem if config.csv else config.split]
    parts += [f"views{config.views}"] * (config.views > 1) + ["shuffled"] * config.shuffle_frames
    return (place if place.is_dir() else place.parent) / "_".join(parts)


def _cache(config: EvaluateConfig, training: TrainConfig) -> str:
    if config.cache is not None:
        return config.cache
    return "" if config.csv else training.cache


@script
def main() -> None:
    config = tyro.cli(EvaluateConfig, description=__doc__)
    if config.views < 1 or config.workers < 0 or (config.batch_size or 1) < 1:
        raise UserError("views and batch_size must be at least 1, workers at least 0")
    state = load_checkpoint(config.checkpoint)
    training = from_dict(state["config"])
    training = dataclasses.replace(
        training,
        data_root=config.data_root or training.data_root,
        batch_size=config.batch_size or training.batch_size,
        workers=config.workers,
        cache=_cache(config, training),
    )
    device = choose_device(config.device)
    dtype = choose_precision(config.amp, device)
    model = build_from_checkpoint(state)
    if config.csv:
        rows, warnings = read_manifest(config.csv, config.data_root or None, training.classes), []
    else:
        splits = load_splits(training)
        rows, warnings = splits[config.split], patient_overlap(splits)
    loader = eval_loader(rows, training, config.views, config.shuffle_frames)
    what = Path(config.csv).stem if config.csv else config.split
    print(f"{training.model} on {len(rows)} {what} clips, {describe_device(device)}, {dtype}")
    print("\n".join(warnings), end="\n" if warnings else "")
    predictions = evaluate(model, loader, device, dtype, what, config.skip_unreadable)
    folder = output_folder(config)
    facts = {
        "checkpoint": config.checkpoint,
        "command": " ".join(sys.argv),
        "split": what,
        "views": config.views,
        "shuffle_frames": config.shuffle_frames,
        "warnings": warnings,
    }
    print(write_results(predictions, rows, state["classes"], folder, facts))
    print(f"results: {folder}")


if __name__ == "__main__":
    main()
