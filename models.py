"""The models by name, and what is the same for all of them: groups, freezing, description.

Every model lists its modules from stem to head once, in `stages()`; everything here works on that.
"""

import inspect
from collections.abc import Iterator
from typing import Any

from torch import nn

from cnn_lstm import CNNLSTM
from errors import UserError
from r2plus1d_resnet import R2Plus1DResNet18
from tsm_resnet import TSM
from vivit import ViViT

MODELS = {"tsm": TSM, "cnn_lstm": CNNLSTM, "r2plus1d": R2Plus1DResNet18, "vivit": ViViT}


def model_options(name: str) -> set[str]:
    """The settings that a model takes, besides the number of classes."""
    return set(inspect.signature(MODELS[name]).parameters) - {"num_classes"}


def build_model(name: str, num_classes: int, **options: Any) -> nn.Module:
    """A model with random weights.

    Raises:
        UserError: no such model, or it does not take an option.
    """
    if name not in MODELS:
        raise UserError(f"no model is called {name!r}: choose from {', '.join(MODELS)}")
    unknown = set(options) - model_options(name)
    if unknown:
        raise UserError(
            f"{name} has no setting {', '.join(sorted(unknown))}; it has "
            f"{', '.join(sorted(model_options(name)))}"
        )
    return MODELS[name](num_classes, **options)


def freeze(model: nn.Module, up_to: str) -> None:
    """Freeze the stages up to and including `up_to`: no gradients; see `hold_frozen` for the rest.

    Raises:
        UserError: no such stage, or nothing would be left to train.
    """
    names = list(model.stages())
    if up_to not in names[:-1]:
        raise UserError(f"cannot freeze up to {up_to!r}: choose from {', '.join(names[:-1])}")
    for name, modules in model.stages().items():
        for module in modules:
            module.requires_grad_(False)
        if name == up_to:
            return


def hold_frozen(model: nn.Module, batchnorms: bool = False) -> None:
    """Keep the BatchNorm statistics and the dropout of frozen stages still.

    `model.train()` wakes them up: call this after it. Frozen weights behind moving statistics are
    not frozen features.

    Args:
        batchnorms: also the statistics of stages that are trained; their weights go on learning.
    """
    for name, modules in model.stages().items():
        frozen = not any(p.requires_grad for module in modules for p in module.parameters())
        for module in modules:
            for part in module.modules():
                pretrained = batchnorms and name != "head" and isinstance(part, _BATCHNORMS)
                if frozen or pretrained:
                    part.training = False


_BATCHNORMS = (nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


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


def describe(model: nn.Module) -> str:
    """A line a stage: how many parameters, and whether they are trained."""
    lines, total, trained = [], 0, 0
    for name, modules in model.stages().items():
        parameters = [p for module in modules for p in module.parameters()]
        count = sum(p.numel() for p in parameters)
        learning = sum(p.numel() for p in parameters if p.requires_grad)
        total, trained = total + count, trained + learning
        lines.append(f"{name:>16} {count:12,d}{'' if learning else '  frozen'}")
    lines.append(f"{'parameters':>16} {total:12,d}, trained {trained:,d}")
    return "\n".join(lines)
