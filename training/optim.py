"""What train.py gives to AdamW: parameter groups, the learning-rate schedule, averaged weights."""

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, SequentialLR
from torch.optim.swa_utils import get_ema_multi_avg_fn

from utils import distributed


def param_groups(
    model: nn.Module, learning_rate: float, weight_decay: float, layer_decay: float = 1.0
) -> list[dict[str, Any]]:
    """AdamW's parameter groups: which parameters are trained, how fast, and with what weight decay.

    Stage k of n gets the learning rate `learning_rate * layer_decay ** (n - 1 - k)`, the head the
    full one. Biases, norms and embeddings of positions and tokens have no weight decay: pulling
    them towards zero does not regularise the model.
    """
    stages = model.stages()
    groups = []
    for k, modules in enumerate(stages.values()):
        rate = learning_rate * layer_decay ** (len(stages) - 1 - k)
        decayed, not_decayed = [], []
        for module in modules:
            for owner, parameter in _owned_parameters(module):
                if parameter.requires_grad:
                    is_weight = parameter.dim() > 1 and isinstance(owner, _WEIGHT_LAYERS)
                    (decayed if is_weight else not_decayed).append(parameter)
        for parameters, decay in ((decayed, weight_decay), (not_decayed, 0.0)):
            if parameters:
                groups.append({"params": parameters, "lr": rate, "weight_decay": decay})
    return groups


_WEIGHT_LAYERS = (nn.Linear, nn.Conv2d, nn.Conv3d, nn.LSTM)


def _owned_parameters(module: nn.Module) -> Iterator[tuple[nn.Module, nn.Parameter]]:
    """Each parameter below a module with the layer that owns it."""
    for owner in module.modules():
        for parameter in owner.parameters(recurse=False):
            yield owner, parameter


def cosine_with_warmup(
    optimizer: torch.optim.Optimizer, total_steps: int, warmup_steps: int
) -> LRScheduler:
    """Linear warm-up from 1 % (at most half of all steps), then a cosine to zero."""
    warmup_steps = min(warmup_steps, total_steps // 2)
    cosine = CosineAnnealingLR(optimizer, max(1, total_steps - warmup_steps))
    if not warmup_steps:
        return cosine
    linear = LinearLR(optimizer, start_factor=0.01, total_iters=warmup_steps)
    return SequentialLR(optimizer, [linear, cosine], milestones=[warmup_steps])


class ModelEma:
    """An exponential moving average (EMA) of a model's weights, as a model of its own.

    Polyak and Juditsky, "Acceleration of Stochastic Approximation by Averaging", SIAM J. Control
    Optim. 1992; with a ramped decay as in TensorFlow's
    `tf.train.ExponentialMovingAverage(num_updates=...)`: after step n (0, 1, ...) each floating
    tensor becomes `d * average + (1 - d) * weight` with `d = min(decay, (1 + n) / (10 + n))`, so
    that the random weights at the start are forgotten in a few steps, whatever the decay. Frozen
    weights stay exactly as they are.

    BatchNorm's running statistics are averaged like the weights, not copied: those of the newest
    weights would not fit the average, which lags behind. Integers (the number of batches) are
    copied.

    With several processes each one keeps an average; `broadcast` makes them the same.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        """`model` is on its device; its weights are the start of the average."""
        self.model = copy.deepcopy(model).requires_grad_(False)
        self.decay = decay
        self.steps = 0

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Add the weights after an optimizer step. A step that was skipped does not count."""
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        newest = model.state_dict()
        averages, values = [], []
        for name, average in self.model.state_dict().items():
            if average.is_floating_point():
                averages.append(average)
                values.append(newest[name])
            else:
                average.copy_(newest[name])
        get_ema_multi_avg_fn(decay)(averages, values, self.steps)  # one kernel for many tensors
        self.steps += 1

    def broadcast(self) -> None:
        """Replace the average by that of process 0, which is the one that checkpoints hold.

        All processes make the same steps, but only process 0 has loaded weights to start from, and
        on CPUs each has its own BatchNorm statistics. All must call this together, before the
        average is used.
        """
        distributed.broadcast_tensors(self.model.state_dict().values())
