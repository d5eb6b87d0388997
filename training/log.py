"""The log of a training run: texts for people, train.log, metrics.csv, curves."""

import contextlib
import dataclasses
import logging
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from clips.manifest import ClipRow
from config import TrainConfig, differences, from_dict
from models import summary
from training.state import Progress
from utils import distributed
from utils.device import describe_device
from utils.files import try_write, write_json
from utils.run_dir import log_environment
from utils.tables import write_table
from utils.text_table import text_table


class _LogFile(logging.FileHandler):
    """A log file. A disk that is full is no reason to stop, or to print a traceback per line."""

    def handleError(self, record: logging.LogRecord) -> None:
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            super().close()


def start_log(folder: Path | None) -> None:
    """Send the program's log to standard output and, with a folder, to its train.log."""
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stdout)]
    if folder:
        path = folder / "train.log"  # the names of files in it may not be UTF-8
        handlers.append(_LogFile(path, encoding="utf-8", errors="backslashreplace"))
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=handlers, force=True)


def record_settings(folder: Path, config: TrainConfig, device: torch.device) -> None:
    """Write config.json, unless the run has one, and add an entry to environment.json."""
    if not (folder / "config.json").exists():
        write_json(folder / "config.json", dataclasses.asdict(config))
    log_environment(folder, describe_device(device))


def run_header(
    config: TrainConfig,
    model: nn.Module,
    splits: Mapping[str, Sequence[ClipRow]],
    device: torch.device,
    dtype: torch.dtype,
) -> str:
    """Which model will be trained on which clips, and where."""
    counts = [Counter(row.label for row in rows) for rows in splits.values()]
    table = [["clips", *splits]]
    for label, name in enumerate(config.classes):
        table.append([name, *(str(count[label]) for count in counts)])
    frames = f"{config.n_frames} frames of {config.image_size} px"
    frames += f" from {config.cache}" if config.cache else ""
    hardware = f"{describe_device(device)}, {dtype}, torch {torch.__version__}"
    if distributed.world_size() > 1:
        hardware += f", {distributed.world_size()} processes"
    title = f"{config.model_name}, {frames}, on {hardware}"
    return f"{text_table(table)}\n\n{title}\n{summary(model)}"


FEW_CLIPS = 500


def small_data_hint(config: TrainConfig, num_clips: int) -> str:
    """What often does better with few clips; empty if they are not few, or it is done already."""
    if not config.data_root or config.head == "linear" or num_clips > FEW_CLIPS:
        return ""
    return (
        f"\n{num_clips} training clips are few: try --recipe laptop too, a linear head on frozen "
        "features, which takes minutes (docs/small-data.md)"
    )


def resume_line(saved: Mapping[str, Any], config: TrainConfig, progress: Progress) -> str:
    """Where a run continues, and what is not as it was when it was saved.

    Args:
        saved: the checkpoint.
    """
    lines = [f"resumed at epoch {progress.epoch + 1}, batch {progress.step + 1}"]
    changes = differences(from_dict(saved["config"]), config, ignore=("resume",))
    if any(name in ("data_root", "train_csv", "val_csv", "test_csv") for name, *_ in changes):
        lines[0] += ", with the same clips in another place"
    lines += [f"  {name}: {value!r}, before {earlier!r}" for name, earlier, value in changes]
    before, now = len(saved["rng"]), distributed.world_size()
    if before != now:
        clips = config.batch_size * config.gradient_accumulation_steps
        lines.append(
            f"  {now} processes, before {before}: {now * clips} clips per step. The results differ "
            "a little from those of a run without this change"
        )
    return "\n".join(lines)


def epoch_line(row: Mapping[str, Any], config: TrainConfig, better: bool) -> str:
    """A row of metrics.csv for people; a star marks the best epoch so far."""
    return (
        f"epoch {row['epoch']:3d}/{config.epochs}  "
        f"train loss {row['train_loss']:.4f} accuracy {row['train_accuracy']:.3f}  "
        f"val loss {row['val_loss']:.4f} accuracy {row['val_accuracy']:.3f} "
        f"macro-F1 {row['val_macro_f1']:.3f}  {row['seconds']:.1f} s, waiting {row['waiting']:.0%}"
        f"{'  *' if better else ''}"
    )


def write_history(path: str | Path, history: Sequence[dict[str, Any]]) -> None:
    """Write metrics.csv, one row per epoch."""
    import pandas as pd  # takes as long to import as the rest of this module

    write_table(path, pd.DataFrame(history), float_format=".6g")


def draw_curves(path: Path, history: Sequence[dict[str, Any]], best_epoch: int) -> None:
    """Draw the losses and scores of the epochs so far. An error is no reason to stop training."""
    from evaluation.plots import plot_curves  # importing matplotlib takes longer than an epoch

    if problem := try_write(path, lambda path: plot_curves(history, best_epoch, path)):
        logging.getLogger(__name__).warning(problem)


def unreadable_line(unreadable: Iterable[str]) -> str:
    """Which training clips were left out because they could not be read, one line per clip.

    Args:
        unreadable: the message of each of them.
    """
    lines = sorted(unreadable)
    return "\n  ".join(
        [
            f"{len(lines)} training clips that were drawn could not be read and were left out "
            "(python prepare_data.py check reads all of them):",
            *lines,
        ]
    )
