"""One epoch of training: forward, backward, step."""

import contextlib
import math

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from dataset import Batch, require_readable
from evaluation.predictions import Predictions
from modeling.inference import prepare_for_inference
from models import hold_frozen
from training.loaders import batches_per_epoch
from training.mixup import mix
from training.state import Training
from utils import distributed
from utils.device import autocast
from utils.errors import UserError
from utils.interrupt import Interrupt
from video.motion import channels


def train_one_epoch(
    run: Training, parallel: nn.Module, loader: DataLoader, interrupt: Interrupt
) -> None:
    """Train on what is left of the epoch.

    Args:
        parallel: `run.model` as several processes train it together; alone, the model itself.

    Raises:
        Interrupted: between two optimizer steps.
        UserError: the loss is no longer finite.

    The gradient of a step is the mean over all clips that went into it: over accumulated batches
    and processes, and over what is left when clips could not be read. Class weights multiply the
    clips' losses (losses.py); the mean is over the clips all the same, not over their weights.

    The accuracy of mixed clips (mixing.py) is counted against the label with the larger share.
    """
    config = run.config
    world = distributed.world_size()
    full = config.batch_size * config.accumulation
    loader.sampler.epoch, loader.sampler.start = run.epoch, run.step * config.batch_size
    batches = batches_per_epoch(loader)
    run.model.train()
    hold_frozen(run.model, config.freeze_batchnorm)
    run.optimizer.zero_grad(set_to_none=True)
    clips_in_step = 0
    bar = tqdm(
        total=batches,
        initial=run.step,
        desc=f"epoch {run.epoch + 1}/{config.epochs}",
        unit="batch",
        leave=False,
        disable=distributed.rank() != 0,
    )
    with bar:
        for batch in loader:
            run.step += 1
            run.unreadable.update(batch.unreadable)
            steps_now = run.step % config.accumulation == 0 or run.step == batches
            # DDP sums gradients over the processes in the backward pass of the step's last batch.
            waiting = world > 1 and not steps_now
            with parallel.no_sync() if waiting else contextlib.nullcontext():
                clips_in_step += _forward_backward(run, parallel, batch, loader, full)
            if steps_now:
                _optimizer_step(run, clips_in_step, full)
                clips_in_step = 0
            bar.update()
            bar.set_postfix_str(f"loss {run.totals[0] / max(1, run.totals[2]):.3f}", refresh=False)
            if steps_now:
                interrupt.check()
    if run.average:
        run.average.agree()


def _forward_backward(
    run: Training, parallel: nn.Module, batch: Batch, loader: DataLoader, full: int
) -> int:
    """Add one batch's gradients, as if the step had `full` clips. Returns the number of clips."""
    config = run.config
    n = len(batch.labels)
    clips, labels = batch.clips, batch.labels
    if n == 0:  # none could be read
        if distributed.world_size() == 1:
            return 0
        # The other processes wait for this one's gradients: send zeros.
        shape = (1, config.n_frames, channels(config.inputs), config.image_size, config.image_size)
        clips, labels = torch.zeros(shape, dtype=torch.uint8), torch.zeros(1, dtype=torch.long)
    clips = clips.to(run.device, non_blocking=True)
    if batch.draws is not None and n:
        draws = batch.draws.to(run.device, non_blocking=True)
        clips = loader.dataset.clips.transform.apply(clips, draws)
    labels = labels.to(run.device, non_blocking=True)
    mixing = n > 0 and (config.mixup > 0 or config.cutmix > 0)
    if mixing:
        clips, others, share = mix(clips, labels, config.mixup, config.cutmix)
    with autocast(run.device, run.dtype):
        logits = parallel(clips)
    losses = run.criterion(logits.float(), labels)  # (B,)
    if mixing:
        losses = share * losses + (1 - share) * run.criterion(logits.float(), others)
        labels = torch.where(share >= 0.5, labels, others)  # for the accuracy
    loss = losses.sum()
    loss = loss if n else loss * 0
    if not math.isfinite(value := loss.item()):
        rows = loader.dataset.clips.rows
        raise UserError(
            "\n  ".join(
                [
                    f"the loss became {value} in epoch {run.epoch + 1}, batch {run.step}: lower "
                    f"learning_rate ({config.learning_rate}), or set amp to fp32. The clips were:",
                    *(str(rows[index].path) for index in batch.indices),
                ]
            )
        )
    run.scaler.scale(loss / full).backward()
    if n:
        right = (logits.argmax(dim=1) == labels).sum().item()
        run.totals = [old + new for old, new in zip(run.totals, (value, right, n), strict=True)]
    return n


def _optimizer_step(run: Training, clips: int, full: int) -> None:
    """Step on the mean gradient of `clips` clips whose gradients were divided by `full`."""
    world = distributed.world_size()  # DDP divides the sum of gradients by it
    clips = distributed.total([clips])[0]
    if not clips:  # none of them could be read
        run.optimizer.zero_grad(set_to_none=True)
        run.scheduler.step()
        return
    run.scaler.unscale_(run.optimizer)
    parameters = [p for p in run.model.parameters() if p.grad is not None]
    if clips != full * world:
        for parameter in parameters:
            parameter.grad.mul_(full * world / clips)
    if run.config.clip_norm:
        nn.utils.clip_grad_norm_(parameters, run.config.clip_norm)
    scale = run.scaler.get_scale()
    run.scaler.step(run.optimizer)
    run.scaler.update()
    if run.scaler.get_scale() >= scale:  # a smaller scale: fp16 overflowed, the step was left out
        run.scheduler.step()
        if run.average:
            run.average.update(run.model)
    run.optimizer.zero_grad(set_to_none=True)


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
    shift: torch.Tensor | float = 0.0,
) -> Predictions:
    """Run a model over a split. The one way validation, test and this script get their numbers.

    With several processes each runs over its own share and all get the whole result.

    Args:
        loader: from `loaders.eval_loader`.
        dtype: see `prepare_for_inference`; the softmax is taken in fp64, on the CPU.
        interrupt: looked at after each batch.
        temperature: divides the logits; see calibration.py.
        shift: `(num_classes,)`, subtracted from the logits first; see `losses.post_hoc_shift`.

    Raises:
        Interrupted: `interrupt` was asked to stop.
        UserError: clips that cannot be read, all of them, unless `skip_unreadable`.
    """
    model = prepare_for_inference(model, device, dtype)
    indices, probabilities, unreadable = [], [], []
    quiet = distributed.rank() != 0
    for batch in tqdm(loader, description, unit="batch", leave=False, disable=quiet, delay=1):
        unreadable += batch.unreadable
        if len(batch.labels):
            views = batch.clips.to(device, non_blocking=True)
            if loader.dataset.clips.answers == 1:
                views = views.unsqueeze(1)  # (B, T, C, H, W) -> (B, V, T, C, H, W)
            logits = model(views.flatten(0, 1))  # (B*V, T, C, H, W) -> (B*V, classes)
            logits = logits.cpu().double() - shift
            logits = logits.unflatten(0, views.shape[:2])  # (B, V, classes)
            both = torch.stack((logits / temperature, logits)).softmax(dim=-1)
            probabilities.append(both.mean(dim=2))  # (2, B, V, classes) -> (2, B, classes)
            indices.append(batch.indices)
        # Several processes hold different numbers of batches and cannot agree in between.
        if interrupt and distributed.world_size() == 1:
            interrupt.check()
    mine = None
    if indices:
        mine = torch.cat(indices).numpy(), torch.cat(probabilities, dim=1).numpy()
    shares = distributed.gather((mine, unreadable))
    unreadable = [line for _, lines in shares for line in lines]
    if not skip_unreadable:
        require_readable(unreadable, description)
    parts = [arrays for arrays, _ in shares if arrays is not None]
    if not parts:
        raise UserError(f"none of the {description} clips can be read")
    indices = np.concatenate([one for one, _ in parts])
    probabilities = np.concatenate([both for _, both in parts], axis=1)
    if not np.isfinite(probabilities).all():
        raise UserError(
            f"the model's {description} outputs are not finite: train with a lower learning_rate "
            "or amp fp32"
        )
    order = indices.argsort()
    rows = [loader.dataset.clips.rows[index] for index in indices[order]]
    tempered, untempered = probabilities[:, order]
    return Predictions(rows, tempered, unreadable, untempered)
