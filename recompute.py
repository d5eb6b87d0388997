"""Gradient checkpointing: activations are thrown away, and computed anew in the backward pass.

Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016, arXiv:1604.06174. What is kept
falls to the inputs of the stages and the activations of one stage at a time; a step pays with about
one more forward pass. Losses, gradients and statistics stay the same, bit for bit.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


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
