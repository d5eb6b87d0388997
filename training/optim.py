"""An exponential moving average of the weights: less noisy than those of any single step.

Polyak and Juditsky, "Acceleration of Stochastic Approximation by Averaging", SIAM J. Control Optim.
1992; with a ramped decay as in TensorFlow's `tf.train.ExponentialMovingAverage(num_updates=...)`.
"""

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, SequentialLR
from torch.optim.swa_utils import get_ema_multi_avg_fn

from utils import distributed


class WeightAverage:
    """The average of a model's weights over its optimizer steps, as a model of its own.

    After step n (0, 1, ...) each floating tensor becomes `d * average + (1 - d) * weight` with
    `d = min(decay, (1 + n) / (10 + n))`: the random weights that training starts from are forgotten
    in a few steps, whatever the decay. Frozen weights stay exactly what they are.

    BatchNorm's running statistics are averaged like the weights, not copied: they would be those of
    the newest weights, which the average lags behind. Integers (batches counted) are copied.

    Each of several processes keeps one; `agree` makes them the same.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        """`model` is on its device; its weights are where the average starts."""
        self.model = copy.deepcopy(model).requires_grad_(False)
        self.decay = decay
        self.steps = 0

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take in the weights after an optimizer step. A step that was left out is none."""
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        newest = model.state_dict()
        means, values = [], []
        for name, mean in self.model.state_dict().items():
            if mean.is_floating_point():
                means.append(mean)
                values.append(newest[name])
            else:
                mean.copy_(newest[name])
        get_ema_multi_avg_fn(decay)(means, values, self.steps)  # one kernel for many tensors
        self.steps += 1

    def agree(self) -> None:
        """Take over the first process's average, which is the one that checkpoints hold.

        The processes step alike, but only the first one has loaded weights to start from, and on
        CPUs each has BatchNorm statistics of its own. All must call this together, before the
        average is used.
        """
        distributed.copy_from_first(self.model.state_dict().values())


def parameter_groups(
    model: nn.Module, learning_rate: float, weight_decay: float, layer_decay: float = 1.0
) -> list[dict[str, Any]]:
    """AdamW's parameter groups: what is trained, how fast, with what decay.

    Stage k of n learns with `learning_rate * layer_decay ** (n - 1 - k)`, the head with the full
    rate. Biases, norms and embeddings of positions and tokens are not decayed: pulling them to
    zero regularises nothing.
    """
    stages = model.stages()
    groups = []
    for number, modules in enumerate(stages.values()):
        rate = learning_rate * layer_decay ** (len(stages) - 1 - number)
        decayed, kept = [], []
        for module in modules:
            for owner, parameter in _owned_parameters(module):
                if parameter.requires_grad:
                    plain = parameter.dim() > 1 and isinstance(owner, _WEIGHT_LAYERS)
                    (decayed if plain else kept).append(parameter)
        for parameters, decay in ((decayed, weight_decay), (kept, 0.0)):
            if parameters:
                groups.append({"params": parameters, "lr": rate, "weight_decay": decay})
    return groups


_WEIGHT_LAYERS = (nn.Linear, nn.Conv2d, nn.Conv3d, nn.LSTM)


def _owned_parameters(module: nn.Module) -> Iterator[tuple[nn.Module, nn.Parameter]]:
    """Each parameter below a module with the layer it belongs to."""
    for owner in module.modules():
        for parameter in owner.parameters(recurse=False):
            yield owner, parameter


def cosine_with_warmup(optimizer: torch.optim.Optimizer, steps: int, warmup: int) -> LRScheduler:
    """Linear warm-up from 1 % over `warmup` steps (half of all at most), then a cosine to zero."""
    warmup = min(warmup, steps // 2)
    cosine = CosineAnnealingLR(optimizer, max(1, steps - warmup))
    if not warmup:
        return cosine
    linear = LinearLR(optimizer, start_factor=0.01, total_iters=warmup)
    return SequentialLR(optimizer, [linear, cosine], milestones=[warmup])
