"""The models by name, and what all of them share: building, freezing, counting parameters.

Every model lists its modules from stem to head once, in `stages()`; freezing, layer-wise learning
rates, gradient checkpointing and the summary work on that list.
"""

import dataclasses
import inspect

import torch
from torch import nn

from cnn_lstm import CNNLSTM
from config import TrainConfig
from modeling.features import last_layer
from modeling.layers import MeanStd, Normalize
from mvit import MViT
from r2plus1d_resnet import R2Plus1DResNet18
from timesformer import TimeSformer
from tsm_resnet import TSM
from utils.errors import UserError
from utils.text_table import text_table
from video_swin import VideoSwin
from vivit import ViViT

MODELS = {
    "tsm_resnet": TSM,
    "r2plus1d": R2Plus1DResNet18,
    "cnnlstm": CNNLSTM,
    "vivit": ViViT,
    "timesformer": TimeSformer,
    "video_swin": VideoSwin,
    "mvit": MViT,
}


def model_options(name: str) -> set[str]:
    """The settings that a model takes, besides the number of classes."""
    return set(inspect.signature(MODELS[name]).parameters) - {"num_classes"}


def build_model(config: TrainConfig, num_classes: int = 7) -> nn.Module:
    """The model that a config describes, with random weights.

    It maps clips `(B, T, C, H, W)`, uint8 or float in [0, 1], to logits `(B, num_classes)`.

    Raises:
        UserError: there is no such model, or it cannot be built with these settings.
    """
    if config.model_name not in MODELS:
        raise UserError(
            f"no model is called {config.model_name!r}: choose from {', '.join(MODELS)}"
        )
    known = vars(config)
    options = {name: known[name] for name in model_options(config.model_name) if name in known}
    model = MODELS[config.model_name](num_classes, **options)
    mean_std = config.pixel_mean, config.pixel_std
    if any(mean_std):
        if [len(values) for values in mean_std] != [3, 3] or min(config.pixel_std) <= 0:
            raise UserError(
                "pixel_mean and pixel_std: give three numbers each, those of pixel_std above 0"
            )
        model.normalize = Normalize(mean_std)
    return model


def use_normalization(
    model: nn.Module, mean_std: MeanStd | None, config: TrainConfig
) -> TrainConfig:
    """Normalise a model's pixels as its pretrained weights need, unless the settings say how.

    Returns:
        The settings, with the normalisation if it is not the one that the model has by itself, so
        that the model is rebuilt with it.
    """
    normalize = getattr(model, "normalize", None)
    if mean_std is None or config.pixel_mean or normalize is None or normalize.mean_std == mean_std:
        return config
    model.normalize = Normalize(mean_std)
    return dataclasses.replace(config, pixel_mean=mean_std[0], pixel_std=mean_std[1])


def have_same_weights(one: TrainConfig, other: TrainConfig) -> bool:
    """Whether the weights of two configs' models have the same names and shapes."""
    with torch.device("meta"):  # takes no memory and hardly any time
        weights = [build_model(config).state_dict() for config in (one, other)]
    shapes = [{name: value.shape for name, value in state.items()} for state in weights]
    return shapes[0] == shapes[1]


def freeze(model: nn.Module, until: str) -> None:
    """Freeze the stages up to and including `until`: no gradients; see also `keep_frozen_in_eval`.

    Raises:
        UserError: there is no such stage, or nothing would be left to train.
    """
    names = list(model.stages())
    if until not in names[:-1]:
        raise UserError(f"cannot freeze until {until!r}: choose from {', '.join(names[:-1])}")
    for name, modules in model.stages().items():
        for module in modules:
            module.requires_grad_(False)
        if name == until:
            return


def apply_freezing(model: nn.Module, config: TrainConfig) -> None:
    """Freeze what a config says: the stages up to freeze_until; with head linear everything except
    the layer that gives the logits.

    Raises:
        UserError: see `freeze`.
    """
    if config.freeze_until:
        freeze(model, config.freeze_until)
    if config.head == "linear":
        model.requires_grad_(False)
        last_layer(model).requires_grad_(True)


def keep_frozen_in_eval(model: nn.Module, batchnorms: bool = False) -> None:
    """Put frozen stages into eval mode: their BatchNorm statistics stay fixed, dropout is off.

    Call it after `model.train()`, which puts all stages into training mode.

    Args:
        batchnorms: also keep the BatchNorm statistics of the stages that are trained, except the
            head; the weights of these stages are still trained.
    """
    for name, modules in model.stages().items():
        frozen = not any(p.requires_grad for module in modules for p in module.parameters())
        for module in modules:
            for part in module.modules():
                pretrained = batchnorms and name != "head" and isinstance(part, BATCHNORMS)
                if frozen or pretrained:
                    part.training = False


BATCHNORMS = nn.modules.batchnorm._BatchNorm  # of all dimensions, and those of timm


def summary(model: nn.Module) -> str:
    """One line per stage: the number of parameters, and whether they are trained."""
    rows, total, total_trained = [], 0, 0
    for name, modules in model.stages().items():
        parameters = [p for module in modules for p in module.parameters()]
        count = sum(p.numel() for p in parameters)
        trained = sum(p.numel() for p in parameters if p.requires_grad)
        total, total_trained = total + count, total_trained + trained
        rows.append([name, f"{count:,d}", "" if trained else "frozen"])
    rows.append(["parameters", f"{total:,d}", ""])
    return f"{text_table(rows)}, trained {total_trained:,d}"
