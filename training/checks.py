"""What cannot work about the settings of a training, found before it begins."""

import dataclasses
import logging
import math
import os
from collections import Counter
from collections.abc import Sequence
from typing import get_args, get_type_hints

from torch.utils.data import DataLoader
from tqdm import tqdm

from clips.manifest import UNCERTAIN
from config import TrainConfig
from dataset import ClipsDataset, require_readable
from modeling.weights import load_weights
from models import build_model_from_config, freeze, model_options
from training.feature_cache import require_frozen
from utils import distributed
from utils.errors import UserError
from video.motion import brought

# (smallest, largest) allowed value; None is no bound.
_BOUNDS: dict[str, tuple[float | None, float | None]] = {
    "n_frames": (1, None),
    "image_size": (16, None),
    "flip": (0, 1),
    "rotation": (0, 180),
    "translate": (0, 1),
    "zoom": (0, 0.9),
    "brightness": (0, None),
    "contrast": (0, None),
    "saturation": (0, None),
    "hue": (0, 0.5),
    "rand_augment": (0, None),
    "rand_magnitude": (0, 30),
    "erasing": (0, 1),
    "shift_div": (2, None),
    "carry_past": (0, 1),
    "grid": (1, 7),
    "lstm_hidden": (1, None),
    "lstm_layers": (0, None),
    "dropout": (0, 0.99),
    "drop_path": (0, 0.99),
    "layer_decay": (0.01, 1),
    "feature_draws": (1, 1000),
    "epochs": (1, None),
    "batch_size": (1, None),
    "accumulation": (1, None),
    "learning_rate": (0, None),
    "weight_decay": (0, None),
    "warmup_epochs": (0, None),
    "label_smoothing": (0, 0.99),
    "focal_gamma": (0, 10),
    "adjustment_tau": (0, 5),
    "effective_beta": (0, 0.999999),
    "mixup": (0, 100),
    "cutmix": (0, 100),
    "tau": (0, 5),
    "clip_norm": (0, None),
    "ema": (0, 0.99999),
    "test_views": (1, None),
    "wanted_error": (0, 1),
    "patience": (0, None),
    "workers": (0, None),
    "seed": (0, 2**32),
}

# Settings that do nothing unless another one has one of these values.
_ONLY_WITH = {
    "label_smoothing": ("loss", ("cross_entropy", "balanced_softmax", "logit_adjustment")),
    "focal_gamma": ("loss", ("focal",)),
    "adjustment_tau": ("loss", ("logit_adjustment",)),
    "effective_beta": ("class_weights", ("effective",)),
    "patience": ("select_by", ("macro_f1", "accuracy", "balanced_accuracy", "loss")),
    "carry_past": ("shift_mode", ("causal",)),
    "fusion": ("inputs", ("rgb+gradients", "rgb+flow", "rgb+vectors")),
}

# Settings that do nothing while another one is off.
_ONLY_BESIDE = {
    "rand_magnitude": "rand_augment",
    "feature_draws": "features",
    "lstm_hidden": "lstm_layers",
    "bidirectional": "lstm_layers",
}


def find_problems(config: TrainConfig) -> list[str]:
    """A line for each thing that is wrong, with the allowed values."""
    problems = []
    hints = get_type_hints(type(config))
    for field in dataclasses.fields(config):
        name, value = field.name, getattr(config, field.name)
        choices = get_args(hints[name]) if "Literal" in str(hints[name]) else ()
        if choices and value not in choices:
            problems.append(f"{name} = {value!r}: choose from {', '.join(map(repr, choices))}")
        low, high = _BOUNDS.get(name, (None, None))
        if (low is not None and not low <= value < math.inf) or (high is not None and value > high):
            problems.append(f"{name} = {value}: must be {_range(low, high)}")
    if not problems:
        problems += _misplaced_options(config) + _without_effect(config)
    if brought(config.inputs) != "rgb" and (config.rand_augment or config.erasing):
        problems.append(f"rand_augment and erasing change RGB alone, not inputs {config.inputs}")
    if config.fusion == "summary" and config.inputs == "rgb+gradients":
        problems.append("fusion summary needs a field of motion: inputs rgb+flow or rgb+vectors")
    if config.backbone == "convnext_tiny" and config.image_size < 32:
        problems.append(f"image_size = {config.image_size}: convnext_tiny needs 32 at least")
    if config.features and config.cutmix:
        problems.append("cutmix cuts pictures, and features are none: give --mixup instead")
    if config.features and config.gradient_checkpointing:
        problems.append("gradient_checkpointing saves nothing where features are given: leave it")
    if (config.mixup or config.cutmix) and config.batch_size == 1:
        problems.append(
            "mixup and cutmix blend the clips of a batch: batch_size must be 2 at least"
        )
    if config.test_views > 1 and config.eval_sampling == "first":
        problems.append("test_views: eval_sampling first has one view only, the first frames")
    without_norm = {"vivit", "convnext_tiny"} & {config.model, config.backbone}
    if config.freeze_batchnorm and without_norm:
        problems.append(f"freeze_batchnorm: {without_norm.pop()} has no BatchNorm")
    if config.compile and config.gradient_checkpointing:
        problems.append("compile and gradient_checkpointing do not go together: take one of them")
    if len(config.classes) < 2:
        problems.append(f"classes = {config.classes}: needs two at least")
    if UNCERTAIN in config.classes:
        problems.append(f"classes: no class may be called {UNCERTAIN!r}, the answer that is none")
    if len(set(config.classes)) < len(config.classes):
        problems.append(f"classes = {config.classes}: a name stands there twice")
    return problems


def _misplaced_options(config: TrainConfig) -> list[str]:
    """Settings of one model that were changed although another is trained."""
    options = {
        name: model_options(name) for name in get_args(get_type_hints(type(config))["model"])
    }
    problems = []
    for field in dataclasses.fields(config):
        if field.name in ("n_frames", "image_size"):  # ViViT is built for them, all models use them
            continue
        owners = [model for model, accepted in options.items() if field.name in accepted]
        changed = getattr(config, field.name) != field.default
        if owners and config.model not in owners and changed and field.default is not None:
            problems.append(f"{field.name} is a setting of {', '.join(owners)}, not {config.model}")
    return problems


def _without_effect(config: TrainConfig) -> list[str]:
    """Settings that were changed although nothing uses them; 0 switches each off."""
    problems = []
    for name, (setting, users) in _ONLY_WITH.items():
        value, used_by = getattr(config, name), getattr(config, setting)
        if used_by not in users and value not in (0, getattr(type(config), name)):
            problems.append(
                f"{name} is a setting of {setting} {', '.join(users)}, not {used_by}: leave it out"
            )
    for name, setting in _ONLY_BESIDE.items():
        if getattr(config, name) != getattr(type(config), name) and not getattr(config, setting):
            problems.append(f"{name} does nothing without {setting}: leave it out, or give that")
    return problems


def _range(low: float | None, high: float | None) -> str:
    return f"at least {low}" if high is None else f"from {low} to {high}"


# What None stands for. The demo is small enough to train from scratch on two CPU cores.
DEMO = {
    "n_frames": 8,
    "image_size": 64,
    "weights": "none",
    "epochs": 7,
    "learning_rate": 2e-3,
}

OWN_DATA = {
    "n_frames": 16,
    "image_size": 224,
    "weights": "default",
    "epochs": 30,
    "learning_rate": 1e-4,
}

# Settings that may differ between a run and its continuation without changing the result.
RESUMABLE = {
    "workers",
    "device",
    "patience",
    "tensorboard",
    "resume",
    "check_clips",
    "skip_unreadable",
    "gradient_checkpointing",
    "features",
}


def resolve(config: TrainConfig) -> TrainConfig:
    """Fill in what None stands for, and refuse what cannot work.

    Raises:
        UserError: all wrong settings at once, each with the allowed values.
    """
    defaults = OWN_DATA if config.data_root else DEMO
    unset = {name: value for name, value in defaults.items() if getattr(config, name) is None}
    # A run is looked at from other folders later.
    places = ("data_root", "cache", "features")
    named = {name: getattr(config, name) for name in places if getattr(config, name)}
    unset |= {name: os.path.abspath(place) for name, place in named.items()}
    config = dataclasses.replace(config, **unset)
    problems = find_problems(config)
    if problems:
        raise UserError("\n  ".join(["these settings cannot work:", *problems]))
    return config


def refuse_changes(saved: TrainConfig, now: TrainConfig) -> None:
    """Hold a resumed run to its settings.

    Raises:
        UserError: a setting differs that would change the result.
    """
    for field in dataclasses.fields(now):
        before, value = getattr(saved, field.name), getattr(now, field.name)
        # Of the features only the folder: without them every epoch draws its clips anew.
        free = field.name in RESUMABLE and not (field.name == "features" and not (before and value))
        if before != value and not free:
            raise UserError(
                f"a resumed run keeps its settings: {field.name} is {before!r}, not {value!r} (only"
                f" {', '.join(sorted(RESUMABLE - {'resume'}))} may change; to train on from its "
                f"weights, start a new run with --weights {now.resume}/best.pt)"
            )


log = logging.getLogger(__name__)


def check_cache(splits: Sequence[ClipsDataset]) -> None:
    """Look whether a cache, if one is named, has all the clips as they are now.

    Raises:
        UserError: saying how many it has not, and why.
    """
    problems = [
        (row.path, problem)
        for clips in splits
        if clips.cache
        for row in tqdm(clips.rows, "looking into the cache", leave=False, delay=1)
        if (problem := clips.cache.problem(row.path))
    ]
    if problems:
        kinds = Counter(problem for _, problem in problems)
        said = "; ".join(f"{count:,} {problem}" for problem, count in kinds.items())
        raise UserError(
            f"{splits[0].cache.folder}: {said} (e.g. {problems[0][0]}): "
            "run python prepare_data.py cache again"
        )


def check_clips(loaders: dict[str, DataLoader], skip_unreadable: bool) -> None:
    """Read every clip of these loaders once, before hours of training rest on them.

    Raises:
        UserError: listing all that cannot be read, unless they are to be skipped.
    """
    unreadable = []
    for name, loader in loaders.items():
        bar = tqdm(
            loader, f"reading {name} clips", leave=False, disable=distributed.rank() != 0, delay=1
        )
        for lines in distributed.gather([line for batch in bar for line in batch.unreadable]):
            unreadable += lines
    if not skip_unreadable:
        require_readable(unreadable, "validation and test")
    elif unreadable:
        listing = "\n  ".join(unreadable)
        log.warning(f"{len(unreadable)} validation and test clips are left out:\n  {listing}")


def check_model(config: TrainConfig) -> None:
    """Build the model of a resolved config, with its weights and what is frozen, as training will.

    Raises:
        UserError: something about them would stop it.
    """
    model = build_model_from_config(dataclasses.asdict(config), len(config.classes))
    load_weights(model, config.weights)
    if config.freeze_to:
        freeze(model, config.freeze_to)
    if config.features:
        require_frozen(model)
