"""One epoch of training, and the evaluation of a split."""

import contextlib
import math
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader
from tqdm import tqdm

from config import TrainConfig
from dataset import Batch, require_readable
from evaluation.novelty import distance_to_means
from evaluation.predictions import Predictions
from modeling.features import per_clip, recorded_features
from modeling.inference import prepare_for_inference
from models import keep_frozen_in_eval
from training.losses import Criterion
from training.mixup import mixup_cutmix
from training.optim import ModelEma
from training.state import Progress
from utils import distributed
from utils.device import autocast, autocast_dtype
from utils.errors import UserError
from utils.interrupt import Interrupt, Interrupted
from utils.text_table import list_some
from utils.workers import read_batches, show_batches
from video.motion import Modality

# Number of batches between two checks that the loss is finite. On a GPU a check waits for all
# queued work, so it is not made after every batch; on a CPU it costs nothing. Nothing else in an
# epoch reads a value of the device (tests/training/test_host_reads.py), except that fp16, for GPUs
# without bf16, reads at each step whether it overflowed.
_CHECK_EVERY = 16


class WaitClock:
    """Adds up the seconds for which a device has nothing to do because no batch has come.

    On a CPU these are the seconds for which the loop waits. A GPU still works on earlier batches
    while the loop waits; there events mark when the GPU itself comes to the end of a batch and to
    the beginning of the next one. Gaps within a batch are not counted.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._pairs: list[tuple[Any, Any]] = []

    def watch(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Yield the batches; what is done with one is over when the next one is asked for."""
        while True:
            ended = self._now()
            batch = next(batches, None)
            if batch is None:
                return
            self._pairs.append((ended, self._now()))
            yield batch

    def seconds(self) -> float:
        """The seconds since the last call, up to the newest batch; waits for the device to begin
        that batch."""
        pairs, self._pairs = self._pairs, []
        if self.device.type != "cuda" or not pairs:
            return sum(began - ended for ended, began in pairs)
        pairs[-1][1].synchronize()
        return sum(ended.elapsed_time(began) for ended, began in pairs) / 1000

    def _now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event


def train_one_epoch(
    model: nn.Module,
    criterion: Criterion,
    optimizer: torch.optim.Optimizer,
    scheduler: LRScheduler,
    scaler: torch.amp.GradScaler,
    loader: DataLoader,
    device: torch.device,
    config: TrainConfig,
    progress: Progress,
    ema: ModelEma | None = None,
    ddp_model: nn.Module | None = None,
    interrupt: Interrupt | None = None,
) -> None:
    """Train for one epoch, or for the rest of an epoch that was interrupted.

    The gradient of an optimizer step is the mean over all clips that went into it: over accumulated
    batches and processes, and over what is left when clips could not be read. Class weights
    multiply the losses of the clips (training/losses.py); the sum is still divided by the number of
    clips, not by the sum of their weights. The accuracy of a mixed clip is that for the label with
    the larger part.

    Args:
        loader: train loader of `build_dataloaders`.
        progress: the current epoch and batch; updated after each batch.
        ema: average of the weights, updated after each step.
        ddp_model: `model` wrapped in DistributedDataParallel, if there are several processes.
        interrupt: checked after each optimizer step, and while a batch is waited for (unless its
            gradient is to be added to those of other batches, which would be lost).

    Raises:
        Interrupted: `interrupt` was asked to stop.
        UserError: the loss is no longer finite, or no clip of the epoch could be read.
    """
    world_size = distributed.world_size()
    dtype = autocast_dtype(config.precision, device)
    clips_per_step = config.batch_size * config.gradient_accumulation_steps
    loader.sampler.epoch = progress.epoch
    loader.sampler.start = progress.step * config.batch_size
    check_every = 1 if device.type == "cpu" else _CHECK_EVERY
    unchecked: list[tuple[int, list[int], torch.Tensor]] = []  # step, indices of clips, loss
    model.train()
    keep_frozen_in_eval(model, config.freeze_batchnorm)
    optimizer.zero_grad(set_to_none=True)
    clips_in_step, scale = 0, scaler.get_scale()
    bar = tqdm(
        total=progress.batches,
        initial=progress.step,
        desc=f"epoch {progress.epoch + 1}/{config.epochs}",
        unit="batch",
        leave=False,
        disable=distributed.rank() != 0,
    )
    clock = WaitClock(device)
    while_waiting = interrupt if config.gradient_accumulation_steps == 1 else None
    with bar, _checked_before_saving(unchecked, loader, config, progress):
        for batch in clock.watch(read_batches(loader, while_waiting)):
            progress.step += 1
            progress.unreadable.update(batch.unreadable)
            last = progress.step == progress.batches
            is_update_step = progress.step % config.gradient_accumulation_steps == 0 or last

            # forward, backward; DDP sums gradients over the processes in the backward pass of the
            # last batch of a step only
            no_sync = ddp_model is not None and not is_update_step
            with ddp_model.no_sync() if no_sync else contextlib.nullcontext():
                n = len(batch.labels)
                if n or world_size > 1:
                    loss, correct = _forward(
                        ddp_model or model,
                        criterion,
                        batch,
                        loader,
                        device,
                        dtype,
                        config,
                        progress,
                    )
                    scaler.scale(loss / clips_per_step).backward()
                if n:
                    progress.count(loss.detach(), correct, n)
                    unchecked.append((progress.step, batch.indices, loss.detach()))
            clips_in_step += n
            if len(unchecked) >= check_every or last:
                mean_loss = _require_finite(unchecked, loader, config, progress)
                unchecked.clear()
                bar.set_postfix_str(f"loss {mean_loss:.3f}", refresh=False)
                progress.waited += clock.seconds()  # the device has just been waited for

            # optimizer step
            if is_update_step:
                clips, clips_in_step = clips_in_step, 0
                parts = model, optimizer, scheduler, scaler
                scale = _step(*parts, clips, clips_per_step, config, ema, scale)
            bar.update()
            if is_update_step and interrupt:
                interrupt.check()
    if not distributed.all_reduce_sum([progress.running_sums[2]])[0]:
        examples = list_some(sorted(progress.unreadable), separator="\n  ")
        raise UserError(f"none of the training clips can be read:\n  {examples}")
    if ema:
        ema.broadcast()


def _forward(
    model: nn.Module,
    criterion: Criterion,
    batch: Batch,
    loader: DataLoader,
    device: torch.device,
    dtype: torch.dtype,
    config: TrainConfig,
    progress: Progress,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The summed loss of a batch's clips, and how many of them are classified correctly."""
    clips, labels = batch.clips, batch.labels
    n = len(labels)
    if n == 0:  # no clip could be read, but the other processes wait for gradients: send zeros
        channels = Modality.parse(config.modality).channels
        shape = (1, config.n_frames, channels, config.image_size, config.image_size)
        clips, labels = torch.zeros(shape, dtype=torch.uint8), torch.zeros(1, dtype=torch.long)
    clips = clips.to(device, non_blocking=True)
    if batch.params is not None and n:
        params = batch.params.to(device, non_blocking=True)
        clips = loader.dataset.transform.apply(clips, params)
    labels = labels.to(device, non_blocking=True)
    mixed = n > 0 and (config.mixup_alpha > 0 or config.cutmix_alpha > 0)
    if mixed:
        alphas = config.mixup_alpha, config.cutmix_alpha
        clips, other_labels, lam = mixup_cutmix(clips, labels, *alphas)
    try:
        with autocast(device, dtype):
            logits = model(clips)
    except ValueError:
        if n > 1:
            raise
        raise UserError(
            "a batch has only one clip that can be read, too few for BatchNorm with clips of this "
            "size: repair the others, or give a larger --image-size or --freeze-batchnorm"
        ) from None
    losses = criterion(logits.float(), labels, progress.epoch)  # (B,)
    if mixed:
        other_losses = criterion(logits.float(), other_labels, progress.epoch)
        losses = lam * losses + (1 - lam) * other_losses
        labels = torch.where(lam >= 0.5, labels, other_labels)  # for the accuracy
    loss = losses.sum()
    return (loss if n else loss * 0), (logits.argmax(dim=1) == labels).sum()


@contextlib.contextmanager
def _checked_before_saving(
    unchecked: list[tuple[int, list[int], torch.Tensor]],
    loader: DataLoader,
    config: TrainConfig,
    progress: Progress,
) -> Iterator[None]:
    """Check the losses that are not checked yet when training is interrupted, whether after a step
    or while a batch is waited for: the state is saved then."""
    try:
        yield
    except Interrupted:
        _require_finite(unchecked, loader, config, progress)
        raise


def _require_finite(
    batches: list[tuple[int, list[int], torch.Tensor]],
    loader: DataLoader,
    config: TrainConfig,
    progress: Progress,
) -> float:
    """The mean loss of the epoch so far. A loss that is not finite, of one of these batches, makes
    it not finite and is an error."""
    mean_loss = progress.mean_loss  # the only value that is read from the device
    if math.isfinite(mean_loss) or not batches:
        return mean_loss
    step, indices, loss = next((b for b in batches if not b[2].isfinite()), batches[-1])
    paths = [str(loader.dataset.rows[index].path) for index in indices]
    heading = (
        f"the loss became {loss.item()} in epoch {progress.epoch + 1}, batch {step}: lower "
        f"learning_rate ({config.learning_rate}), or set precision to fp32. The clips were:"
    )
    raise UserError("\n  ".join([heading, *paths]))


def _step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: LRScheduler,
    scaler: torch.amp.GradScaler,
    clips: int,
    clips_per_step: int,
    config: TrainConfig,
    ema: ModelEma | None,
    scale: float,
) -> float:
    """Make an optimizer step with the mean gradient of `clips` clips; their gradients were divided
    by `clips_per_step`, and their losses multiplied by `scale`.

    Returns:
        The scale of the next losses.
    """
    world_size = distributed.world_size()  # DDP divides the sum of the gradients by it
    clips = distributed.all_reduce_sum([clips])[0]
    if not clips:  # none of them could be read
        optimizer.zero_grad(set_to_none=True)
        scheduler.step()
        return scale
    scaler.unscale_(optimizer)
    parameters = [p for p in model.parameters() if p.grad is not None]
    if clips != clips_per_step * world_size:
        for parameter in parameters:
            parameter.grad.mul_(clips_per_step * world_size / clips)
    if config.max_grad_norm:
        nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
    scaler.step(optimizer)
    scaler.update()
    scale_before, scale = scale, scaler.get_scale()
    if scale >= scale_before:  # a smaller scale: fp16 overflowed and the step was skipped
        scheduler.step()
        if ema:
            ema.update(model)
    optimizer.zero_grad(set_to_none=True)
    return scale


class NoClipError(UserError):
    """None of the clips can be read."""

    def __init__(self, message: str, unreadable: list[str]) -> None:
        super().__init__(message)
        self.unreadable = unreadable
        """an error message for each clip"""


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    loader: DataLoader,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    description: str = "test",
    skip_unreadable: bool = False,
    interrupt: Interrupt | None = None,
    temperature: float = 1.0,
    logit_adjustment: torch.Tensor | float = 0.0,
    means: torch.Tensor | None = None,
    with_features: bool = False,
) -> Predictions:
    """The predictions of a model for a split: validation, test and evaluate.py all use this.

    With several processes each one evaluates its part, and all get the whole result.

    Args:
        loader: from `training.loaders.eval_loader`.
        dtype: see `prepare_for_inference`; the softmax is computed in fp64 on the CPU.
        interrupt: checked after each batch, and while a batch is waited for.
        temperature: the logits are divided by it; see evaluation/calibration.py.
        logit_adjustment: `(num_classes,)`, subtracted from the logits first; see
            training/losses.py.
        means: `(K, num_features)`: also measure the distance to them; see evaluation/novelty.py.
        with_features: also record `Predictions.features`, at no cost.

    Raises:
        Interrupted: `interrupt` was asked to stop.
        NoClipError: none of the clips can be read.
        UserError: clips cannot be read (all of them are listed), unless `skip_unreadable`; or the
            outputs are not finite.
    """
    model = prepare_for_inference(model, device, dtype)
    indices, outputs, distances, features, unreadable = [], [], [], [], []
    record, quiet = means is not None or with_features, distributed.rank() != 0
    for batch in show_batches(loader, description, interrupt, quiet):
        unreadable += batch.unreadable
        if len(batch.labels):
            views = batch.clips.to(device, non_blocking=True)
            if loader.dataset.num_views == 1:
                views = views.unsqueeze(1)  # (B, T, C, H, W) -> (B, V, T, C, H, W)
            with recorded_features(model) if record else contextlib.nullcontext() as newest:
                logits = model(views.flatten(0, 1))  # (B*V, T, C, H, W) -> (B*V, classes)
            if record:
                vectors = per_clip(newest[0], len(logits))  # (B*V, F)
                vectors = vectors.unflatten(0, views.shape[:2])  # (B, V, F)
            if means is not None:
                distances.append(distance_to_means(vectors, means).mean(dim=1))  # (B,)
            if with_features:
                features.append(vectors.mean(dim=1).float())  # (B, F)
            outputs.append(logits.unflatten(0, views.shape[:2]))  # (B, V, classes)
            indices += batch.indices
        # Processes have different numbers of batches, so they cannot agree to stop between batches.
        if interrupt and distributed.world_size() == 1:
            interrupt.check()
    own = None
    if indices:
        probabilities = []
        for logits in outputs:  # read here: between the batches a GPU would have to be waited for
            logits = logits.cpu().double() - logit_adjustment
            both = torch.stack((logits / temperature, logits)).softmax(dim=-1)
            probabilities.append(both.mean(dim=2))  # (2, B, V, classes) -> (2, B, classes)
        own = [np.array(indices), torch.cat(probabilities, dim=1).numpy()]
        own += [torch.cat(arrays).numpy() for arrays in (distances, features) if arrays]
    gathered = distributed.all_gather((own, unreadable))
    unreadable = [line for _, lines in gathered for line in lines]
    if not skip_unreadable:
        require_readable(unreadable, description)
    parts = [arrays for arrays, _ in gathered if arrays is not None]
    if not parts:
        raise NoClipError(f"none of the {description} clips can be read", unreadable)
    indices, probabilities, *measured = zip(*parts, strict=True)
    indices, probabilities = np.concatenate(indices), np.concatenate(probabilities, axis=1)
    if not np.isfinite(probabilities).all():
        raise UserError(
            f"the model's {description} outputs are not finite: train with a lower learning_rate "
            "or precision fp32"
        )
    order = indices.argsort()
    rows = [loader.dataset.rows[index] for index in indices[order]]
    calibrated, uncalibrated = probabilities[:, order]
    measured = [np.concatenate(arrays)[order] for arrays in measured]
    recorded = measured.pop() if with_features else None
    distance = measured.pop() if means is not None else None
    return Predictions(rows, calibrated, unreadable, uncalibrated, distance, recorded)
