"""The models by name, and what is the same for all of them: groups, freezing, description.

Every model lists its modules from stem to head once, in `stages()`; everything here works on that.
"""

import inspect
from typing import Any

import torch
from torch import nn

from cnn_lstm import CNNLSTM
from r2plus1d_resnet import R2Plus1DResNet18
from tsm_resnet import TSM
from utils.errors import UserError
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


def build_model_from_config(config: dict[str, Any], num_classes: int) -> torch.nn.Module:
    """The model that a `TrainConfig` (as a dict) describes, with random weights."""
    options = {name: config[name] for name in model_options(config["model"]) if name in config}
    return build_model(config["model"], num_classes, **options)
