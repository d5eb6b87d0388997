"""What train.py says of what it does."""

import logging
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from clips.manifest import ClipRow
from config import TrainConfig
from models import describe
from training.state import Training
from utils import distributed
from utils.device import describe_device
from utils.files import write_text


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


def start_log(folder: Path | None) -> None:
    """Send the program's log to standard output and, with a folder, to its train.log."""
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stdout)]
    if folder:
        handlers.append(logging.FileHandler(folder / "train.log", encoding="utf-8"))
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=handlers, force=True)


def write_history(path: str | Path, history: Sequence[dict[str, Any]]) -> None:
    """Write metrics.csv, a row an epoch, as a whole."""
    write_text(path, pd.DataFrame(history).to_csv(index=False, float_format="%.6g"))
