"""What train.py says of what it does."""

from collections import Counter
from typing import Any

import torch

import distributed
from config import TrainConfig
from device import describe_device
from manifest import ClipRow
from models import describe
from training import Training


def introduction(run: Training, splits: dict[str, list[ClipRow]]) -> str:
    """What will be trained on what, where, in words."""
    config = run.config
    lines = [f"{'clips':>16} {'train':>6} {'val':>6} {'test':>6}"]
    counts = [Counter(row.label for row in rows) for rows in splits.values()]
    for number, name in enumerate(config.classes):
        lines.append(f"{name:>16} " + " ".join(f"{count[number]:6d}" for count in counts))
    frames = f"{config.n_frames} frames of {config.image_size} px"
    frames += f" from {config.cache}" if config.cache else ""
    where = f"{describe_device(run.device)}, {run.dtype}, torch {torch.__version__}"
    if distributed.world_size() > 1:
        where += f", {distributed.world_size()} processes"
    lines += ["", f"{config.model}, {frames}, on {where}", describe(run.model)]
    return "\n".join(lines)


def epoch_line(row: dict[str, Any], config: TrainConfig, better: bool) -> str:
    """A row of metrics.csv for people; a star marks the best so far."""
    return (
        f"epoch {row['epoch']:3d}/{config.epochs}  "
        f"train loss {row['train_loss']:.4f} accuracy {row['train_accuracy']:.3f}  "
        f"val loss {row['val_loss']:.4f} accuracy {row['val_accuracy']:.3f} "
        f"macro-F1 {row['val_macro_f1']:.3f}  {row['seconds']:.1f} s{'  *' if better else ''}"
    )
