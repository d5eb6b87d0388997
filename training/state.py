"""The state of a training run: everything that a checkpoint must hold to continue exactly."""

import dataclasses
import logging
import math
import signal
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from checkpoint import rng_state, save_checkpoint, set_rng_state
from config import TrainConfig
from training.optim import ModelEma
from utils import distributed
from utils.errors import UserError
from utils.interrupt import Interrupt

log = logging.getLogger(__name__)


class Progress:
    """The current epoch and batch of a training run, and the running sums of that epoch.

    Args:
        batches: number of batches per epoch.
    """

    def __init__(self, batches: int) -> None:
        self.batches = batches
        self.epoch = 0
        """epochs that are finished"""
        self.step = 0
        """batches of the current epoch that are done"""
        self.unreadable: set[str] = set()
        """error messages of the training clips that could not be read"""
        self.waited = 0.0
        """seconds for which the device had nothing to do in the current epoch, because no batch had
        come; see `training.engine.WaitClock`"""
        self._sums: torch.Tensor | None = None  # (3,): loss, correct clips, clips

    def steps_per_epoch(self, batches_per_step: int) -> int:
        """Number of optimizer steps per epoch."""
        return math.ceil(self.batches / batches_per_step)

    def count(self, loss: torch.Tensor, correct: torch.Tensor, clips: int) -> None:
        """Add the summed loss of a batch and how many of its clips are correct.

        The sums stay on the device: reading them there would wait for all work that is queued.
        """
        dtype = torch.float32 if loss.device.type == "mps" else torch.float64
        number = loss.new_full((), clips, dtype=dtype)  # new_tensor would wait for a GPU
        batch = torch.stack((loss.to(dtype), correct.to(dtype), number))
        self._sums = batch if self._sums is None else self._sums.to(batch) + batch

    @property
    def running_sums(self) -> list[float]:
        """Loss, correct clips and clips of the current epoch; reading them waits for the device."""
        return [0.0, 0.0, 0.0] if self._sums is None else self._sums.tolist()

    @running_sums.setter
    def running_sums(self, values: Sequence[float]) -> None:
        self._sums = torch.tensor(values, dtype=torch.float64) if any(values) else None

    @property
    def mean_loss(self) -> float:
        """Mean loss per clip of the current epoch so far."""
        loss, _, clips = self.running_sums
        return loss / max(1.0, clips)

    def end_epoch(self) -> None:
        """Count the epoch as finished and start the next one's sums."""
        self.epoch, self.step, self._sums, self.waited = self.epoch + 1, 0, None, 0.0


class TrainState:
    """The objects that change in training, and their checkpoint.

    Args:
        class_counts: `(K,)` training clips of each class; evaluate.py can adjust logits by them.
        clips: `clips.manifest.clips_digest` of each split; a resumed run must have the same clips.
        pretrained, pretraining: where the weights come from, and what pretrain.py has seen of which
            patients and files; see `modeling.weights.LoadedWeights`.
    """

    def __init__(
        self,
        config: TrainConfig,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        scheduler: LRScheduler,
        scaler: torch.amp.GradScaler,
        ema: ModelEma | None,
        progress: Progress,
        class_counts: Sequence[int],
        clips: Mapping[str, str] | None = None,
        pretrained: Mapping[str, str] | None = None,
        pretraining: Mapping[str, Any] | None = None,
    ) -> None:
        self.config = config
        self.model = model
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.scaler = scaler
        self.ema = ema
        self.progress = progress
        self.class_counts = list(class_counts)
        self.clips = dict(clips or {})
        self.pretrained = dict(pretrained or {})
        self.pretraining = dict(pretraining or {})
        self.history: list[dict[str, Any]] = []
        """rows of metrics.csv"""
        self.best: dict[str, Any] = {}
        """the row of the best epoch"""

    def score(self, row: dict[str, Any]) -> float:
        """The value by which epochs are compared; the highest one is the best."""
        if self.config.monitor == "last":
            return row["epoch"]
        value = row[f"val_{self.config.monitor}"]
        return -value if self.config.monitor == "loss" else value

    @property
    def out_of_patience(self) -> bool:
        """Whether so many epochs were no better than the best one that the training stops early."""
        patience = self.config.early_stopping_patience
        waited = self.progress.epoch - self.best["epoch"] if self.best else 0
        return bool(patience) and waited >= patience

    @property
    def eval_model(self) -> nn.Module:
        """The model that is validated, kept and tested: the averaged one, if there is one."""
        return self.ema.model if self.ema else self.model

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to continue exactly. All processes must call this together.

        "model" holds the weights that are evaluated. With an EMA these are the averaged ones, and
        "trained" holds the weights that the optimizer trains.
        """
        progress = self.progress
        rngs, sums, unreadable = zip(
            *distributed.all_gather((rng_state(), progress.running_sums, progress.unreadable)),
            strict=True,
        )
        averaging = {}
        if self.ema:
            averaging = {"trained": self.model.state_dict(), "averaged_steps": self.ema.steps}
        return {
            **self.model_state_dict(),
            **averaging,
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
            "step": progress.step,
            "totals": list(sums),
            "rng": list(rngs),
            "unreadable": sorted(set().union(*unreadable)),
        }

    def model_state_dict(self) -> dict[str, Any]:
        """Everything needed to rebuild the model."""
        return {
            "model": self.eval_model.state_dict(),
            "epoch": self.progress.epoch,
            "best": self.best,
            "history": self.history,
            "config": dataclasses.asdict(self.config),
            "classes": list(self.config.classes),
            "class_counts": self.class_counts,
            "clips": self.clips,
            "pretrained": self.pretrained,
            **({"pretraining": self.pretraining} if self.pretraining else {}),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict()`.

        With as many processes as before, the run continues exactly. With another number, it
        continues at the same part of the epoch and of the learning rate's schedule; up to
        `clips_per_step` clips may be seen twice in that epoch, and the random numbers are new.

        Raises:
            UserError: the clips are not those that the run began with.
        """
        self._require_same_clips(state)
        self.eval_model.load_state_dict(state["model"])
        if self.ema:
            self.model.load_state_dict(state["trained"])
            self.ema.steps = state["averaged_steps"]
        self.progress.epoch, self.progress.step = state["epoch"], state["step"]
        self.progress.unreadable = set(state["unreadable"])
        self.history, self.best = state["history"], state["best"]
        self.pretrained = state.get("pretrained", {})
        self.pretraining = state.get("pretraining", {})
        if state["scaler"]:  # empty if the run has not trained in fp16 before
            self.scaler.load_state_dict(state["scaler"])
        if len(state["rng"]) == distributed.world_size():
            self._load_optimizer(state["optimizer"])
            self.scheduler.load_state_dict(state["scheduler"])
            self.progress.running_sums = state["totals"][distributed.rank()]
            set_rng_state(state["rng"][distributed.rank()])
        else:
            self._change_processes(state)

    def _load_optimizer(self, state: dict[str, Any]) -> None:
        # Which kernel suits the device; the run may have begun on another one.
        fused = [group["fused"] for group in self.optimizer.param_groups]
        groups = zip(state["param_groups"], fused, strict=True)
        groups = [{**group, "fused": value} for group, value in groups]
        self.optimizer.load_state_dict({**state, "param_groups": groups})

    def _require_same_clips(self, state: dict[str, Any]) -> None:
        before = state.get("clips")
        if not before:  # a run of an earlier version, or a test without manifests
            earlier = state["config"].get("data_root", "")
            if earlier != self.config.data_root:
                raise UserError(
                    f"data_root: this run of an earlier version continues only with {earlier!r}, "
                    "because it does not say what its clips were"
                )
            return
        changed = [split for split, digest in self.clips.items() if before.get(split) != digest]
        if changed:
            raise UserError(
                f"the {' and '.join(changed)} clips are not those that the run began with (other "
                "paths below data_root, labels or order): restore the manifests, or start a new run"
            )

    def _change_processes(self, state: dict[str, Any]) -> None:
        """Continue a run of another number of processes; see `load_state_dict`."""
        before, now, progress = len(state["rng"]), distributed.world_size(), self.progress
        # Together the processes have seen the first clips of the epoch's order (TrainSampler).
        batches_per_step = self.config.gradient_accumulation_steps
        steps = progress.step * before // now // batches_per_step
        progress.step = steps * batches_per_step
        sums = [sum(values) for values in zip(*state["totals"], strict=True)]
        progress.running_sums = sums if distributed.rank() == 0 else [0.0] * len(sums)
        with warnings.catch_warnings():  # PyTorch warns of steps without the optimizer's
            warnings.simplefilter("ignore")
            for _ in range(progress.epoch * progress.steps_per_epoch(batches_per_step) + steps):
                self.scheduler.step()
        rates = [group["lr"] for group in self.optimizer.param_groups]
        self._load_optimizer(state["optimizer"])
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        words = [self.config.seed, progress.epoch, progress.step, distributed.rank()]
        torch.manual_seed(int(np.random.SeedSequence(words).generate_state(1)[0]))

    def save_interrupted(self, folder: Path, interrupt: Interrupt, command: str) -> SystemExit:
        """Write last.pt and tell the command that continues; returns what ends the program."""
        self.save(folder)
        log.info(f"\ninterrupted: to continue, run\n  {command}")
        return SystemExit(128 + (interrupt.signal or signal.SIGTERM))

    def save(self, folder: Path) -> None:
        """Write last.pt."""
        state = self.state_dict()
        if distributed.rank() == 0:
            save_checkpoint(folder / "last.pt", state)
