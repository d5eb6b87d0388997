"""The state of a training: what changes from step to step, and its checkpoint."""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from checkpoint import rng_state, save_checkpoint, set_rng_state
from config import TrainConfig
from training.losses import Criterion
from training.optim import WeightAverage, cosine_with_warmup, parameter_groups
from utils import distributed
from utils.device import choose_precision
from utils.errors import UserError


class Training:
    """The things that change while training, and their checkpoint."""

    def __init__(
        self,
        config: TrainConfig,
        model: nn.Module,
        device: torch.device,
        batches: int,
        class_counts: Sequence[int] = (),
    ) -> None:
        """`model` is on its device; `batches` is the number of batches an epoch; `class_counts`
        `(K,)` are the training clips of each class, which plain cross entropy can do without."""
        self.config = config
        self.model = model
        self.device = device
        self.class_counts = list(class_counts)
        self._losses = Criterion(config, class_counts, device)
        self.dtype = choose_precision(config.amp, device)
        groups = parameter_groups(
            model, config.learning_rate, config.weight_decay, config.layer_decay
        )
        fused = device.type in ("cpu", "cuda")  # one kernel instead of ten
        self.optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, fused=fused)
        steps = math.ceil(batches / config.accumulation)
        self.scheduler = cosine_with_warmup(
            self.optimizer, config.epochs * steps, int(config.warmup_epochs * steps)
        )
        # Only fp16 needs scaled gradients; disabled, the scaler does nothing.
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype == torch.float16)
        self.average = WeightAverage(model, config.ema) if config.ema else None
        self.epoch = 0  # epochs finished
        self.step = 0  # batches done of the epoch under way
        self.totals = [0.0, 0.0, 0.0]  # loss, right answers, clips of the epoch under way
        self.history: list[dict[str, Any]] = []
        self.best: dict[str, Any] = {}  # history's row of the best epoch
        self.unreadable: set[str] = set()

    @property
    def tested(self) -> nn.Module:
        """The model that is validated, kept and tested: the averaged one, if there is one."""
        return self.average.model if self.average else self.model

    def criterion(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Logits `(N, K)`, fp32, and labels `(N,)` to the loss of each clip `(N,)`, in the epoch
        under way."""
        return self._losses(logits, labels, self.epoch)

    def state(self) -> dict[str, Any]:
        """Everything needed to go on exactly. All processes must call this together.

        "model" is the tested one here too; beside an average stand the weights that are `trained`.
        """
        rngs, totals, unreadable = zip(
            *distributed.gather((rng_state(), self.totals, self.unreadable)), strict=True
        )
        averaging = {}
        if self.average:
            averaging = {"trained": self.model.state_dict(), "averaged_steps": self.average.steps}
        return {
            **self.model_state(),
            **averaging,
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
            "step": self.step,
            "totals": list(totals),
            "rng": list(rngs),
            "unreadable": sorted(set().union(*unreadable)),
        }

    def model_state(self) -> dict[str, Any]:
        """Everything needed to rebuild the model."""
        return {
            "model": self.tested.state_dict(),
            "epoch": self.epoch,
            "best": self.best,
            "history": self.history,
            "config": dataclasses.asdict(self.config),
            "classes": list(self.config.classes),
            "class_counts": self.class_counts,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from `state()`.

        Raises:
            UserError: the number of processes is another one.
        """
        if len(state["rng"]) != distributed.world_size():
            raise UserError(
                f"the run was trained by {len(state['rng'])} processes and can go on only with as "
                f"many, not {distributed.world_size()} (torchrun --nproc-per-node)"
            )
        self.tested.load_state_dict(state["model"])
        if self.average:
            self.model.load_state_dict(state["trained"])
            self.average.steps = state["averaged_steps"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.scaler.load_state_dict(state["scaler"])
        self.epoch, self.step = state["epoch"], state["step"]
        self.history, self.best = state["history"], state["best"]
        self.unreadable = set(state["unreadable"])
        self.totals = list(state["totals"][distributed.rank()])
        set_rng_state(state["rng"][distributed.rank()])

    def save(self, folder: Path) -> None:
        """Write last.pt."""
        state = self.state()
        if distributed.rank() == 0:
            save_checkpoint(folder / "last.pt", state)
