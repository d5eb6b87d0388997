"""An exponential moving average of the weights: less noisy than those of any single step.

Polyak and Juditsky, "Acceleration of Stochastic Approximation by Averaging", SIAM J. Control Optim.
1992; with a ramped decay as in TensorFlow's `tf.train.ExponentialMovingAverage(num_updates=...)`.
"""

import copy

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

import distributed


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
