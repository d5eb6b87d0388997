"""The features of clips: the input of a model's last layer."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from modeling.engines import Engine


def last_layer(model: nn.Module) -> nn.Linear:
    """The layer that gives the logits: in every model the linear layer that is defined last."""
    return [module for module in model.modules() if isinstance(module, nn.Linear)][-1]


@contextmanager
def recorded_features(model: nn.Module) -> Iterator[list[torch.Tensor]]:
    """Within this block the list holds the features of the last call of the model, `(B, F)`, or
    `(B * T, F)` where the last layer is applied to each frame; see `per_clip`."""
    newest: list[torch.Tensor] = []

    def record(_: nn.Module, inputs: tuple[torch.Tensor]) -> None:
        newest[:] = inputs

    def record_engine(engine: Engine, *_: object) -> None:
        newest[:] = [engine.features]

    if isinstance(model, Engine):
        hook = model.register_forward_hook(record_engine)
    else:
        hook = last_layer(model).register_forward_pre_hook(record)
    try:
        yield newest
    finally:
        hook.remove()


def per_clip(features: torch.Tensor, clips: int) -> torch.Tensor:
    """Features as `(clips, F)` in double precision on the CPU, averaged over the frames if the last
    layer is applied to each frame."""
    return features.cpu().double().reshape(clips, -1, features.shape[-1]).mean(dim=1)
