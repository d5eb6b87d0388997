"""The end of a training: the best epoch is calibrated on the validation clips, then tested."""

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from checkpoint import load_checkpoint, rebuild_model, save_checkpoint
from clips.manifest import ClipRow
from config import TrainConfig
from evaluation.calibration import Calibration, calibrate
from evaluation.novelty import NoveltyReference
from evaluation.predictions import Predictions
from training.engine import evaluate
from training.novelty import measure_class_means
from training.state import TrainState
from training.writers import Writers
from utils import distributed
from utils.errors import ResultWarning
from utils.interrupt import Interrupt
from video.clip_reader import FrameSampler, effective_fps

log = logging.getLogger(__name__)


def calibrate_best(
    state: TrainState,
    train_rows: Sequence[ClipRow],
    loader: DataLoader,
    device: torch.device,
    folder: Path,
    interrupt: Interrupt,
) -> None:
    """Fit temperature and threshold of the best epoch on the validation clips and save them.

    They go into best.pt, together with what the novelty of clips is measured by, and with the frame
    rate of the clips: predict.py shows the model whole videos at that rate.

    Raises:
        Interrupted: before the end.
    """
    config, best = state.config, load_checkpoint(folder)
    means = measure_class_means(rebuild_model(best), train_rows, config, device, interrupt)
    predictions = _evaluate_best(best, loader, device, "validation", config, interrupt, means)
    # Uncalibrated, because a run that is resumed after this point has been calibrated already.
    fitted = calibrate(predictions.labels, predictions.uncalibrated, config.target_error)
    novelty = NoveltyReference(means, tuple(predictions.distance.tolist()))
    best["config"] = dataclasses.asdict(config)  # the data may have moved since that epoch
    best["class_counts"] = state.class_counts  # runs of earlier versions have none yet
    save_calibrated(folder, best, fitted, novelty, loader.dataset.rows, config)


def save_calibrated(
    folder: Path,
    best: Mapping[str, Any],
    calibration: Calibration,
    novelty: NoveltyReference,
    rows: Sequence[ClipRow],
    config: TrainConfig,
) -> None:
    """Write best.pt with its calibration, what novelty is measured by, and the clips' frame rate.

    Args:
        best: everything else that it holds.
        rows: the clips whose frame rate it is.
    """
    if distributed.rank() == 0:
        paths, fps = zip(*((row.path, row.fps) for row in rows), strict=True)
        sampler = FrameSampler(config.n_frames, config.eval_sampling)
        calibrated = {
            **best,
            "calibration": calibration.state_dict(),
            "novelty": novelty.state_dict(),
            "frame_rate": effective_fps(paths, sampler, known=fps),
        }
        save_checkpoint(folder / "best.pt", calibrated)
    distributed.broadcast_object()  # the other processes wait until it is written


def final_test(
    state: TrainState,
    loader: DataLoader,
    device: torch.device,
    folder: Path,
    interrupt: Interrupt,
    writers: Writers,
    warnings: list[ResultWarning],
) -> None:
    """Test the best epoch and write the results with the warnings.

    Raises:
        Interrupted: before the end.
    """
    from evaluation.results import write_results

    config, best = state.config, load_checkpoint(folder)
    predictions = _evaluate_best(best, loader, device, "test", config, interrupt)
    if distributed.rank() == 0:
        metadata = {
            "checkpoint": str((folder / "best.pt").absolute()),
            "epoch": best["epoch"],
            "split": "test",
            "views": config.test_views,
            "crops": config.test_crops,
            "warnings": warnings,
        }
        calibration = Calibration.from_state_dict(best["calibration"])
        rule = config.monitor
        chosen = "the last" if rule == "last" else f"the best by validation {rule}"
        title = f"test of epoch {best['epoch']}, {chosen}"
        log.info(f"\n{'test of the linear head' if config.head == 'linear' else title}:")
        results = write_results(
            predictions, config.classes, folder, [calibration], metadata, show=log.info
        )
        writers.write_results(results, best["epoch"])
        log.info(f"\nrun folder: {folder}")


def _evaluate_best(
    best: dict[str, Any],
    loader: DataLoader,
    device: torch.device,
    split: str,
    config: TrainConfig,
    interrupt: Interrupt,
    means: torch.Tensor | None = None,
) -> Predictions:
    """The predictions of the best epoch, in fp32 as in evaluate.py.

    They are calibrated if its checkpoint holds a calibration.
    """
    temperature = Calibration.from_state_dict(best.get("calibration")).temperature
    # For the test the embedding of the clips is drawn from their features.
    options = split, config.skip_unreadable, interrupt, temperature, 0.0, means, split == "test"
    return evaluate(rebuild_model(best), loader, device, torch.float32, *options)
