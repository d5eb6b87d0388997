"""Train a clip classifier, pick the best epoch on validation, test that one.

    python train.py                                              the demo data, a few minutes
    python train.py --data-root /data/SLAM --model cnn_lstm      your own data
    python train.py --resume runs/20260101-120000_cnn_lstm       go on where it stopped
    torchrun --nproc-per-node=4 train.py --data-root /data/SLAM  several GPUs

Settings are the fields of TrainConfig in config.py: edit them there or give them as flags.
"""

import dataclasses
import logging
import math
import shlex
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import nn
from torch.utils.data import DataLoader

from checkpoint import build_from_checkpoint, load_checkpoint, save_checkpoint
from clips.manifest import patient_overlap
from config import TrainConfig, from_dict
from evaluation.calibration import Calibration, calibrate
from evaluation.plots import plot_curves
from evaluation.predictions import Predictions
from evaluation.results import headline_scores, write_results
from modeling.layers import recompute_stages
from modeling.weights import load_weights
from models import build_model_from_config, freeze
from training.checks import check_cache, check_clips, refuse_changes, resolve
from training.engine import evaluate, train_one_epoch
from training.feature_cache import over_features, require_frozen, without_backbone
from training.loaders import batches_per_epoch, build_dataloaders
from training.log import epoch_line, introduction, start_log, write_history
from training.losses import double_correction
from training.state import Training
from utils import distributed
from utils.cli import script
from utils.device import choose_device, choose_precision, describe_device, suit_device
from utils.errors import UserError
from utils.files import remove_unfinished, write_json
from utils.interrupt import Interrupt, Interrupted
from utils.run_dir import new_run_folder, record_session
from video.clip_reader import seen_frame_rate

log = logging.getLogger(__name__)


def train(
    config: TrainConfig,
    resume_from: dict[str, Any] | None = None,
    folder: Path | None = None,
    resume_command: str = "",
) -> Path:
    """Train, pick the best epoch, calibrate it, test it. Returns the run folder.

    Args:
        config: see TrainConfig.
        resume_from: the state of last.pt, to go on from it.
        folder: the run folder (None: a new one below config.run_dir).
        resume_command: what a person is told to run after an interruption (empty: this script).

    Raises:
        SystemExit: interrupted; the run is saved.
    """
    config = resolve(config)
    device = distributed.start(choose_device(config.device))
    first = distributed.rank() == 0
    start_log(None)
    if not first:
        logging.disable()
    folder = Path(config.resume) if config.resume else folder
    train_loader, val_loader, test_loader, num_classes = build_dataloaders(config)

    torch.manual_seed(config.seed)
    model = build_model_from_config(dataclasses.asdict(config), num_classes)
    # The first process's weights are everybody's: DistributedDataParallel sends them round.
    loaded = load_weights(model, config.weights) if first and not resume_from else ""
    if config.freeze_to:
        freeze(model, config.freeze_to)
    if config.gradient_checkpointing:
        recompute_stages(model)
    suit_device(model, device, choose_precision(config.amp, device))
    counts = Counter(row.label for row in train_loader.dataset.clips.rows)
    class_counts = [counts[label] for label in range(num_classes)]
    run = Training(config, model, device, batches_per_epoch(train_loader), class_counts)
    if resume_from:
        run.load_state(resume_from)
    else:
        torch.manual_seed(config.seed + distributed.rank())
    loaders = (train_loader, val_loader, test_loader)
    if config.features:
        require_frozen(model)
    check_cache([loader.dataset.clips for loader in loaders])
    if config.check_clips and config.data_root and not resume_from:
        check_clips({"validation": val_loader, "test": test_loader}, config.skip_unreadable)

    folder = Path(distributed.from_first(_run_folder(config, folder) if first else None))
    if first:
        start_log(folder)
        record_session(folder, describe_device(device))
        remove_unfinished(folder)
    splits = {
        name: loader.dataset.clips.rows
        for name, loader in (("train", train_loader), ("val", val_loader), ("test", test_loader))
    }
    warnings = patient_overlap(splits) + double_correction(config)
    log.info(introduction(run, splits))
    for warning in warnings:
        log.warning(warning)
    log.info(f"resumed at epoch {run.epoch + 1}, batch {run.step + 1}" if resume_from else loaded)
    if config.features:
        train_loader, val_loader, test_loader = (
            over_features(loader, model, config, device) for loader in loaders
        )
    parallel = _parallel(model, device)
    if config.compile:
        model.compile()  # in place: the checkpoint's keys stay clean
    interrupt = Interrupt()
    run.save(folder)  # from here on there is a checkpoint to resume from, whatever happens
    try:
        train_epochs(run, parallel, train_loader, val_loader, folder, interrupt)
        calibrate_best(run, val_loader, folder, interrupt)
        test(run, test_loader, folder, interrupt, warnings)
    except Interrupted:
        run.save(folder)
        resume = ["python", "train.py", "--resume", str(folder)]
        log.info(f"\ninterrupted: to go on, run\n  {resume_command or shlex.join(resume)}")
        raise SystemExit(128 + (interrupt.number or signal.SIGTERM)) from None
    finally:
        interrupt.restore()
        distributed.stop()
    return folder


def train_epochs(
    run: Training,
    parallel: nn.Module,
    train_loader: DataLoader,
    val_loader: DataLoader,
    folder: Path,
    interrupt: Interrupt,
) -> None:
    """The epochs that are left: train, validate, keep the best, save.

    Raises:
        Interrupted: in the middle of an epoch, or at its end.
    """
    config = run.config
    first = distributed.rank() == 0
    writer = _tensorboard(folder) if config.tensorboard and first else None
    drawn = -math.inf
    while run.epoch < config.epochs and not _out_of_patience(run):
        began = time.perf_counter()
        train_one_epoch(run, parallel, train_loader, interrupt)
        model, dtype = run.tested, run.dtype
        if config.features:  # the head alone, and no Normalize that would cast what is fp32
            model, dtype = without_backbone(model), torch.float32
        predictions = evaluate(
            model,
            val_loader,
            run.device,
            dtype,
            "validation",
            config.skip_unreadable,
            interrupt,
        )
        loss, right, clips = distributed.total(run.totals)
        summary = headline_scores(predictions)
        run.epoch, run.step = run.epoch + 1, 0
        run.totals = [0.0, 0.0, 0.0]
        row = {
            "epoch": run.epoch,
            "train_loss": loss / max(1, clips),
            "train_accuracy": right / max(1, clips),
            "val_loss": summary["loss"],
            "val_accuracy": summary["accuracy"],
            "val_balanced_accuracy": summary["balanced_accuracy"],
            "val_macro_f1": summary["macro_f1"],
            "learning_rate": run.optimizer.param_groups[-1]["lr"],
            "seconds": round(time.perf_counter() - began, 2),
        }
        run.history.append(row)
        better = not run.best or _goodness(row, config) > _goodness(run.best, config)
        if better:
            run.best = row
        log.info(epoch_line(row, config, better))
        if first:
            if better:
                save_checkpoint(folder / "best.pt", run.model_state())
            write_history(folder / "metrics.csv", run.history)
            over = run.epoch == config.epochs or _out_of_patience(run)
            if over or time.monotonic() > drawn + 10:  # drawing takes as long as a short epoch
                plot_curves(run.history, run.best["epoch"], folder / "curves.png")
                drawn = time.monotonic()
        if writer:
            for name, value in row.items():
                writer.add_scalar(name, value, run.epoch)
            writer.flush()
        run.save(folder)
    if run.epoch < config.epochs:
        log.info(f"stopped: none of {config.patience} epochs was better than {run.best['epoch']}")
    unreadable = set().union(*distributed.gather(run.unreadable))
    if unreadable:
        listing = "\n  ".join(sorted(unreadable))
        log.warning(
            f"{len(unreadable)} training clips could not be read and were left out:\n  {listing}"
        )


def calibrate_best(run: Training, loader: DataLoader, folder: Path, interrupt: Interrupt) -> None:
    """Fit the best epoch's temperature and threshold on validation, into its checkpoint; with them
    goes the frame rate of the clips, which predict.py shows it whole videos at.

    Raises:
        Interrupted: before the end.
    """
    state = load_checkpoint(folder)
    predictions = _evaluate_best(run, state, loader, "validation", interrupt)
    # Untempered: a run that is resumed after this point was calibrated already.
    fitted = calibrate(predictions.labels, predictions.untempered, run.config.wanted_error)
    if distributed.rank() == 0:
        config, paths = run.config, [row.path for row in loader.dataset.clips.rows]
        rate = seen_frame_rate(paths, config.n_frames, config.eval_sampling)
        fitted = {"calibration": fitted.state(), "frame_rate": rate}
        fitted["class_counts"] = run.class_counts  # runs of earlier versions have none yet
        save_checkpoint(folder / "best.pt", {**state, **fitted})
    distributed.from_first(None)  # the others wait until it is written


def test(
    run: Training, loader: DataLoader, folder: Path, interrupt: Interrupt, warnings: list[str]
) -> None:
    """Test the best epoch and write the results with the warnings.

    Raises:
        Interrupted: before the end.
    """
    state = load_checkpoint(folder)
    predictions = _evaluate_best(run, state, loader, "test", interrupt)
    if distributed.rank() == 0:
        config = run.config
        facts = {
            "checkpoint": str((folder / "best.pt").absolute()),
            "epoch": state["epoch"],
            "split": "test",
            "views": config.test_views,
            "crops": config.test_crops,
            "warnings": warnings,
        }
        calibration = Calibration.from_state(state["calibration"])
        table = write_results(predictions, config.classes, folder, [calibration], facts)
        last = config.select_by == "last"
        chosen = "the last" if last else f"the best by validation {config.select_by}"
        log.info(f"\ntest of epoch {state['epoch']}, {chosen}:")
        log.info(f"{table}\n\nrun folder: {folder}")


def _evaluate_best(
    run: Training, state: dict[str, Any], loader: DataLoader, split: str, interrupt: Interrupt
) -> Predictions:
    """What the best epoch says, in fp32 as in evaluate.py, tempered if it is calibrated."""
    return evaluate(
        build_from_checkpoint(state),
        loader,
        run.device,
        torch.float32,
        split,
        run.config.skip_unreadable,
        interrupt,
        Calibration.from_state(state.get("calibration")).temperature,
    )


def _parallel(model: nn.Module, device: torch.device) -> nn.Module:
    """The model as torchrun's processes train it together; alone, the model itself."""
    if distributed.world_size() == 1:
        return model
    if device.type == "cuda":
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
        return nn.parallel.DistributedDataParallel(model, device_ids=[device.index])
    return nn.parallel.DistributedDataParallel(model)


def _goodness(row: dict[str, Any], config: TrainConfig) -> float:
    if config.select_by == "last":
        return row["epoch"]
    value = row[f"val_{config.select_by}"]
    return -value if config.select_by == "loss" else value


def _out_of_patience(run: Training) -> bool:
    waited = run.epoch - run.best["epoch"] if run.best else 0
    return bool(run.config.patience) and waited >= run.config.patience


def _run_folder(config: TrainConfig, folder: Path | None) -> str:
    """The given folder or a new one, with the settings in it."""
    folder = folder or new_run_folder(config.run_dir, config.model)
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "config.json").exists():
        write_json(folder / "config.json", dataclasses.asdict(config))
    return str(folder)


def _tensorboard(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("--tensorboard needs a package: pip install tensorboard") from None
    return SummaryWriter(folder)


def read_settings() -> tuple[TrainConfig, dict[str, Any] | None]:
    """The settings of the command line, and with --resume the state to go on from."""
    config = tyro.cli(TrainConfig, description=__doc__)
    if not config.resume:
        return config, None
    run = Path(config.resume)
    if run.is_file():  # one of the run's checkpoints stands for the run
        run = run.parent
    state = load_checkpoint(run, "last.pt")
    saved = dataclasses.replace(from_dict(state["config"]), resume=str(run))
    config = tyro.cli(TrainConfig, default=saved, description=__doc__)
    config = dataclasses.replace(config, resume=str(run))
    refuse_changes(saved, config)
    return config, state


@script
def main() -> None:
    train(*read_settings())


if __name__ == "__main__":
    main()
