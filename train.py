"""Train a clip classifier, choose the best epoch on the validation clips, and test that epoch.

    python train.py                                                  the demo data, two minutes
    python train.py --data-root /data/SLAM --model-name cnnlstm      your own data
    python train.py --data-root /data/clips --recipe laptop          few clips, or no GPU
    python train.py --resume runs/20260101-120000_cnnlstm            continue a stopped run
    python train.py --list-encoders                                  what --weights opens
    torchrun --nproc-per-node=4 train.py --data-root /data/SLAM      several GPUs

Settings are the fields of TrainConfig in config.py: edit them there or give them as flags. A recipe
(RECIPES there) is a set of them.
"""

import dataclasses
import logging
import math
import shlex
import sys
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from checkpoint import check_resume, load_checkpoint, save_checkpoint
from clips.manifest import clips_digest
from clips.splits import patient_overlap
from config import OLD_NAMES, OLD_VALUES, RECIPES, TrainConfig, fitted_splits, from_dict
from modeling.encoders import licence_warning, list_encoders
from modeling.layers import enable_gradient_checkpointing
from modeling.weights import load_weights
from models import apply_freezing, build_model, use_normalization
from training import checks
from training.engine import evaluate, train_one_epoch
from training.feature_cache import feature_loader, head_only
from training.final_test import calibrate_best, final_test
from training.leakage import pretraining_leaks
from training.linear_head import train_linear_head
from training.loaders import (
    DEMO_ROOT,
    batches_per_epoch,
    build_dataloaders,
    eval_loader,
    keep_splits,
    open_cache,
)
from training.log import (
    draw_curves,
    epoch_line,
    record_settings,
    resume_line,
    run_header,
    small_data_hint,
    start_log,
    unreadable_line,
    write_history,
)
from training.losses import Criterion, warn_double_balancing
from training.optim import ModelEma, cosine_with_warmup, param_groups
from training.state import Progress, TrainState
from training.writers import Writers, open_writers
from utils import distributed
from utils.cli import cli_main, parse
from utils.device import autocast_dtype, get_device, prepare_model
from utils.errors import format_warning
from utils.interrupt import Interrupt, Interrupted
from utils.run_dir import new_run_dir

log = logging.getLogger(__name__)


def train(
    config: TrainConfig,
    resume_from: dict[str, Any] | None = None,
    folder: Path | None = None,
    resume_command: str = "",
) -> Path:
    """Train, choose the best epoch, calibrate it, test it. Returns the run folder.

    Args:
        config: settings; see TrainConfig.
        resume_from: the content of last.pt, to continue from it.
        folder: the run folder (None: a new one below config.run_dir).
        resume_command: what to run after an interruption, for the log (empty: this script).

    Raises:
        SystemExit: interrupted; the run is saved.
    """
    with ExitStack() as stack:  # however it ends, the run folder is released
        return _train(stack, config, resume_from, folder, resume_command)


def _train(
    stack: ExitStack, config: TrainConfig, resume_from: dict | None, folder: Path | None, again: str
) -> Path:
    """The same; the stack ends what begins here, and `again` is the `resume_command`."""
    config = checks.resolve(config)
    stack.callback(distributed.cleanup)
    device = distributed.init(get_device(config.device))
    config = checks.keep_clips_per_step(config, resume_from) if resume_from else config
    linear = config.head == "linear"  # on features in fp32
    dtype = torch.float32 if linear else autocast_dtype(config.precision, device)
    is_main = distributed.rank() == 0
    start_log(None)
    if not is_main:
        logging.disable()
    folder = Path(config.resume) if config.resume else folder
    stack.enter_context(checks.hold_outputs(config, folder))

    # data
    train_loader, val_loader, test_loader, num_classes = build_dataloaders(config)
    splits = {"train": train_loader, "val": val_loader, "test": test_loader}
    rows = {name: loader.dataset.rows for name, loader in splits.items()}
    fitted = [row for split in fitted_splits(config) for row in rows[split]]
    counts = Counter(row.label for row in fitted)
    class_counts = [counts[label] for label in range(num_classes)]
    clips = {split: clips_digest(rows[split], config.data_root or DEMO_ROOT) for split in rows}

    # model
    torch.manual_seed(config.seed)
    model = build_model(config, num_classes)
    # Only process 0 loads weights: DistributedDataParallel sends them to the others.
    loaded = load_weights(model, config.weights if is_main and not resume_from else "none")
    loaded = distributed.broadcast_object(loaded)
    random_features = checks.warn_random_features(config, model, loaded, bool(resume_from))
    config = use_normalization(model, loaded.mean_std, config)
    apply_freezing(model, config)
    if config.gradient_checkpointing:
        enable_gradient_checkpointing(model)
    prepare_model(model, device, dtype)

    # optimizer
    progress = Progress(batches_per_epoch(train_loader))
    steps_per_epoch = progress.steps_per_epoch(config.gradient_accumulation_steps)
    optimizer = torch.optim.AdamW(
        param_groups(model, config.learning_rate, config.weight_decay, config.layer_decay),
        lr=config.learning_rate,
        fused=device.type in ("cpu", "cuda"),  # one kernel instead of ten
    )
    warmup_steps = int(config.warmup_epochs * steps_per_epoch)
    scheduler = cosine_with_warmup(optimizer, config.epochs * steps_per_epoch, warmup_steps)
    # Only fp16 needs a scaled loss; a disabled scaler does nothing.
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    criterion = Criterion(config, class_counts, device)
    ema = ModelEma(model, config.ema_decay) if config.ema_decay else None
    parts = config, model, optimizer, scheduler, scaler, ema, progress
    state = TrainState(*parts, class_counts, clips, loaded.provenance, loaded.pretraining)
    if resume_from:
        check_resume(resume_from, state.state_dict(), optimizer, config.resume or folder)
        state.load_state_dict(resume_from)
    else:
        torch.manual_seed(config.seed + distributed.rank())

    # checks, before anything is written
    checks.check_space(state, folder or config.run_dir)
    checks.check_smallest_batch(config, train_loader.sampler.clips_per_epoch)
    if config.feature_cache:
        checks.require_frozen(model)
    checks.check_cache([loader.dataset for loader in splits.values()])
    checks.require_some_readable(splits, config.classes)
    if config.check_clips and config.data_root and not resume_from:
        checks.check_clips({"validation": val_loader, "test": test_loader}, config.skip_unreadable)
    leaks = pretraining_leaks(state.pretraining, rows, config)

    # run folder and log
    if is_main and not folder:
        run = new_run_dir(config.run_dir, config.model_name, "last.pt")
        folder = stack.enter_context(run).folder
    folder = distributed.broadcast_object(folder)
    config = state.config = keep_splits(config, rows, folder)
    if is_main:
        stack.callback(start_log, None)
        start_log(folder)
        record_settings(folder, config, device)
    writers = stack.enter_context(open_writers(config, folder if is_main else None))
    warnings = patient_overlap(rows) + warn_double_balancing(config)
    warnings += licence_warning(state.pretrained) + random_features + leaks
    log.info(run_header(config, model, rows, device, dtype))
    for warning in warnings:
        log.warning(format_warning(warning))
    if resume_from:
        log.info(resume_line(resume_from, config, progress))
    else:
        log.info(loaded.line + small_data_hint(config, len(fitted)))

    if linear:
        train_loader = eval_loader(fitted, config, open_cache(config))
    if config.feature_cache:
        train_loader, val_loader, test_loader = (
            feature_loader(loader, model, config, device)
            for loader in (train_loader, val_loader, test_loader)
        )
    ddp_model = distributed.wrap_ddp(model, device)
    if config.compile:
        model.compile()  # in place, so that the keys of the checkpoint stay the same

    # loop
    interrupt = stack.enter_context(Interrupt())
    state.save(folder)  # from here on there is a checkpoint to resume from, whatever happens
    try:
        loop = device, ddp_model, folder, interrupt, writers
        if linear:
            warnings += train_linear_head(state, train_loader, device, folder, interrupt)
        else:
            train_epochs(state, criterion, train_loader, val_loader, *loop)
            calibrate_best(state, rows["train"], val_loader, device, folder, interrupt)
        final_test(state, test_loader, device, folder, interrupt, writers, warnings)
    except Interrupted:
        command = again or shlex.join(["python", "train.py", "--resume", str(folder)])
        raise state.save_interrupted(folder, interrupt, command) from None
    return folder


def train_epochs(
    state: TrainState,
    criterion: Criterion,
    train_loader: DataLoader,
    val_loader: DataLoader,
    device: torch.device,
    ddp_model: nn.Module | None,
    folder: Path,
    interrupt: Interrupt,
    writers: Writers,
) -> None:
    """Train the remaining epochs: train, validate, keep the best epoch, save.

    Raises:
        Interrupted: in the middle of an epoch, or at its end.
    """
    config, progress = state.config, state.progress
    is_main = distributed.rank() == 0
    last_drawn = -math.inf
    while progress.epoch < config.epochs and not state.out_of_patience:
        start = time.perf_counter()
        train_one_epoch(
            state.model,
            criterion,
            state.optimizer,
            state.scheduler,
            state.scaler,
            train_loader,
            device,
            config,
            progress,
            state.ema,
            ddp_model,
            interrupt,
        )
        waiting = progress.waited / (time.perf_counter() - start)
        model, dtype = state.eval_model, autocast_dtype(config.precision, device)
        if config.feature_cache:  # features are fp32; without Normalize nothing casts them
            model, dtype = head_only(model), torch.float32
        skip = config.skip_unreadable
        predictions = evaluate(model, val_loader, device, dtype, "validation", skip, interrupt)
        scores = predictions.summary()

        loss, correct, clips = distributed.all_reduce_sum(progress.running_sums)
        progress.end_epoch()
        row = {
            "epoch": progress.epoch,
            "train_loss": loss / max(1, clips),
            "train_accuracy": correct / max(1, clips),
            "val_loss": scores["loss"],
            "val_accuracy": scores["accuracy"],
            "val_balanced_accuracy": scores["balanced_accuracy"],
            "val_macro_f1": scores["macro_f1"],
            "learning_rate": state.optimizer.param_groups[-1]["lr"],
            "seconds": round(time.perf_counter() - start, 2),
            "waiting": round(waiting, 4),
        }
        state.history.append(row)
        better = not state.best or state.score(row) > state.score(state.best)
        if better:
            state.best = row
        log.info(epoch_line(row, config, better))
        if is_main:
            # Before the checkpoints, for which the disk may be full; a resumed run replaces it.
            write_history(folder / "metrics.csv", state.history)
            if better:
                save_checkpoint(folder / "best.pt", state.model_state_dict())
        state.save(folder)
        writers.write_epoch(row)
        ended = progress.epoch == config.epochs or state.out_of_patience
        if is_main and (ended or time.monotonic() > last_drawn + 10):
            # Drawing takes as long as an epoch of the demo.
            draw_curves(folder / "curves.png", state.history, state.best["epoch"])
            last_drawn = time.monotonic()
    if progress.epoch < config.epochs:
        log.info(
            f"stopped: none of {config.early_stopping_patience} epochs was better than epoch "
            f"{state.best['epoch']}"
        )
    if unreadable := set().union(*distributed.all_gather(progress.unreadable)):
        log.warning(unreadable_line(unreadable))


def read_settings() -> tuple[TrainConfig, dict[str, Any] | None]:
    """The settings of the command line, and with --resume the state to continue from."""

    def parse_with(default: TrainConfig | None = None) -> TrainConfig:
        names = OLD_NAMES, OLD_VALUES, ("model",)
        return parse(TrainConfig, __doc__, default, *names, recipes=RECIPES)

    config = parse_with()
    if not config.resume:
        return config, None
    run = Path(config.resume)
    run = run.parent if run.is_file() else run  # a checkpoint of the run: take its folder
    state = load_checkpoint(run, "last.pt")
    saved = dataclasses.replace(from_dict(state["config"]), resume=str(run))
    config = dataclasses.replace(parse_with(saved), resume=str(run))
    checks.refuse_changes(saved, config)
    return config, state


@cli_main
def main() -> None:
    if "--list-encoders" in sys.argv[1:]:
        print(list_encoders())
    else:
        train(*read_settings())


if __name__ == "__main__":
    main()
