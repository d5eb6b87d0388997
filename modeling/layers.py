"""What all models share: input normalisation, stochastic depth, gradient checkpointing."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

Output = TypeVar("Output")

LAYERS = ("layer1", "layer2", "layer3", "layer4")
"""names of the layers of a ResNet, also of a 3D one"""

MeanStd = tuple[tuple[float, ...], tuple[float, ...]]
"""mean and standard deviation of red, green and blue in [0, 1]"""

IMAGENET_MEAN_STD = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF_MEAN_STD = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
KINETICS_MEAN_STD = ((0.43216, 0.394666, 0.37645), (0.22803, 0.22145, 0.216989))
SLOWFAST_MEAN_STD = ((0.45, 0.45, 0.45), (0.225, 0.225, 0.225))


class Normalize(nn.Module):
    """`(B, T, C, H, W)` uint8, or float in [0, 1], to float with the pretraining's mean and std.

    It belongs to the model because the pretrained weights decide mean and std, and so that data
    sets, cameras and exported graphs all feed raw pixels. It is one multiplication and one addition
    for every dtype; float dtypes are kept unless `dtype` is set. It is not part of checkpoints.
    """

    def __init__(self, mean_std: MeanStd) -> None:
        super().__init__()
        self.mean_std = mean_std
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in mean_std)  # (C, 1, 1)
        self.register_buffer("scale", 1 / std, persistent=False)
        self.register_buffer("shift", -mean / std, persistent=False)
        self.dtype: torch.dtype | None = None
        """dtype of the output (None: fp32 for uint8, other dtypes as they come in)"""

    def forward(self, clips: torch.Tensor) -> torch.Tensor:
        if clips.dtype == torch.uint8:
            x = clips * (self.scale / 255) + self.shift
        else:
            x = clips * self.scale.to(clips.dtype) + self.shift.to(clips.dtype)
        return x if self.dtype is None else x.to(self.dtype)


class ParameterGroup(nn.Module):
    """Parameters that a module holds itself, as a module that `stages()` can list.

    It is made anew at every call of `stages()` and is no part of the model, so that the names of
    the parameters stay as they are.
    """

    def __init__(self, *parameters: nn.Parameter) -> None:
        super().__init__()
        for number, parameter in enumerate(parameters):
            self.register_parameter(str(number), parameter)
        self.training = any(parameter.requires_grad for parameter in parameters)


def drop_path(
    branch: torch.Tensor, rate: float, training: bool, rows_per_clip: int = 1
) -> torch.Tensor:
    """A residual branch, `(N, ...)`, skipped in training with probability `rate`.

    Stochastic depth (Huang et al., 2016, arXiv:1603.09382). A branch is skipped for a whole clip at
    a time: every `rows_per_clip` rows belong to one clip. Where it is kept it is scaled by
    1 / (1 - rate), so that the expected output is that of eval mode.
    """
    if not (training and rate):
        return branch
    kept = 1 - rate
    shape = (branch.shape[0] // rows_per_clip, *[1] * (branch.dim() - 1))
    mask = branch.new_empty(shape).bernoulli_(kept) / kept
    return branch * mask.repeat_interleave(rows_per_clip, 0)  # one draw per clip


def drop_path_rates(largest: float, depth: int) -> list[float]:
    """The rate of each block: linear from 0 at the first to `largest` at the last, as in DeiT."""
    return torch.linspace(0, largest, depth, device="cpu").tolist()


def enable_gradient_checkpointing(model: nn.Module) -> None:
    """Recompute the activations of a model's stages in the backward pass.

    Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016, arXiv:1604.06174. What is
    kept falls to the inputs of the stages and the activations of one stage at a time, at the price
    of about one more forward pass per step. Losses, gradients and statistics stay the same, bit for
    bit. Evaluation and the keys of checkpoints do not change. torch.compile cannot follow it
    (training/checks.py refuses the two together).
    """
    for modules in model.stages().values():
        for module in modules:
            module.recomputed = True


def checkpointed(
    modules: Sequence[nn.Module], function: Callable[..., Output], *inputs: Any
) -> Output:
    """`function(*inputs)`, recomputed in the backward pass if checkpointing is enabled.

    Args:
        modules: the modules whose weights and statistics `function` uses.
        function: gives the same result when it is called again. Dropout does: its random numbers
            are the same the second time.
    """
    enabled = any(module.training and getattr(module, "recomputed", False) for module in modules)
    if not enabled or not torch.is_grad_enabled():  # evaluation, or the stage is frozen
        return function(*inputs)
    contexts = contextlib.nullcontext(), _restored_statistics(modules)
    return checkpoint(function, *inputs, use_reentrant=False, context_fn=lambda: contexts)


@contextlib.contextmanager
def _restored_statistics(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Restore the running statistics at the end, because BatchNorm has counted this batch already.

    Switching `track_running_stats` off would not do: the recomputation must save as many tensors.
    """
    before = [(b, b.clone()) for module in modules for b in module.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in before:
                buffer.copy_(value)
