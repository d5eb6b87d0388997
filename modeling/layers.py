"""Raw pixels in, normalised floats out: the first layer of every model."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

IMAGENET_MEAN_STD = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

HALF_MEAN_STD = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))

KINETICS_MEAN_STD = ((0.43216, 0.394666, 0.37645), (0.22803, 0.22145, 0.216989))


class Normalize(nn.Module):
    """`(B, T, C, H, W)` uint8, or float in [0, 1], to float with the pretraining's mean and std.

    It belongs to the model because the pretrained weights decide mean and std, and so that a data
    set, a camera and an exported graph all feed raw pixels. One multiply and one add, no matter
    which dtype comes in; float dtypes are kept unless `dtype` is set. Not part of the checkpoint.
    """

    def __init__(self, mean_std: tuple[tuple[float, ...], tuple[float, ...]]) -> None:
        super().__init__()
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in mean_std)  # (C, 1, 1)
        self.register_buffer("scale", 1 / std, persistent=False)
        self.register_buffer("shift", -mean / std, persistent=False)
        self.dtype: torch.dtype | None = None
        """what comes out, whatever comes in (None: fp32 of uint8, other types as they are)"""

    def forward(self, clips: torch.Tensor) -> torch.Tensor:
        if clips.dtype == torch.uint8:
            x = clips * (self.scale / 255) + self.shift
        else:
            x = clips * self.scale.to(clips.dtype) + self.shift.to(clips.dtype)
        return x if self.dtype is None else x.to(self.dtype)


def recompute_stages(model: nn.Module) -> None:
    """Have a model's stages computed anew in the backward pass, wherever it calls `run_stage`.

    A matter of training alone: evaluation and checkpoints' keys know nothing of it. torch.compile
    cannot follow it (config.py refuses the two together).
    """
    for modules in model.stages().values():
        for module in modules:
            module.recomputed = True


def run_stage(
    modules: Sequence[nn.Module], function: Callable[..., torch.Tensor], *inputs: Any
) -> torch.Tensor:
    """`function(*inputs)`, computed anew in the backward pass if `recompute_stages` asked for it.

    Args:
        modules: those whose weights and statistics `function` uses.
        function: gives the same when it is called again. Dropout does: it draws the same numbers.
    """
    wanted = any(module.training and getattr(module, "recomputed", False) for module in modules)
    if not wanted or not torch.is_grad_enabled():  # nothing is kept, or the stage is frozen
        return function(*inputs)
    contexts = contextlib.nullcontext(), _still_statistics(modules)
    return checkpoint(function, *inputs, use_reentrant=False, context_fn=lambda: contexts)


@contextlib.contextmanager
def _still_statistics(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Put the running statistics back at the end: BatchNorm counted this batch the first time.

    Switching `track_running_stats` off would not do: the recomputation must save as many tensors.
    """
    before = [(b, b.clone()) for module in modules for b in module.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in before:
                buffer.copy_(value)
