"""The settings of a pretraining: those of the training that it shares, and its own."""

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from config import DEMO_DEFAULTS, OWN_DATA_DEFAULTS, TrainConfig, setting
from pretraining.mae import MAE_MODELS, default_mask_ratio
from pretraining.order import ORDER_MODELS, SEGMENTS
from training import checks
from utils.errors import UserError

MODELS_OF = {"mae": MAE_MODELS, "order": ORDER_MODELS}
"""the models that a method is made for; distil is for all"""


@dataclass(frozen=True)
class PretrainConfig(TrainConfig):
    """The settings of a pretraining: those of the training that it shares, and its own."""

    # Settings of the training whose defaults differ here.
    n_frames: int | None = setting(None, section="Clips", low=1, high=1024, pixels="all clips")
    """frames per clip, T (None: 16; demo data 8; order 15 and 9)"""
    brightness: float = setting(0.0, low=0, pixels="training clips")
    """strength of the random brightness change"""
    contrast: float = setting(0.0, low=0, pixels="training clips")
    """strength of the random contrast change"""
    saturation: float = setting(0.0, low=0, pixels="training clips")
    """strength of the random saturation change"""
    hue: float = setting(0.0, low=0, high=0.5, pixels="training clips")
    """strength of the random hue change"""
    model_name: str = setting("vivit", section="Model")
    """model to pretrain: vivit, timesformer (mae, distil), tsm_resnet, cnnlstm, r2plus1d (distil,
    order), video_swin, mvit, or your own (distil)"""
    weights: str | None = None
    """weights to start from: default, a torchvision name, a file, a run folder, or none (None:
    default; mae and demo data none)"""
    epochs: int | None = setting(None, section="Optimisation", low=1)
    """passes over the clips (None: 200 for mae, else 60; demo data 40 and 12)"""
    learning_rate: float | None = setting(None, low=0)
    """peak learning rate of AdamW (None: 3e-4; demo data 1e-3)"""
    batch_size: int = setting(16, low=1)
    """clips per step and process"""
    warmup_epochs: float | None = setting(None, low=0)
    """epochs of linear warm-up before the cosine decay (None: a twentieth of all)"""

    # ---- Pretraining ----
    data: Annotated[tuple[str, ...], tyro.conf.Positional] = setting((), section="Pretraining")
    """videos, manifests, or folders; of data with splits only the training clips are taken
    (default: the training clips of --data-root, or of the demo)"""
    method: Literal["mae", "distil", "order"] = "mae"
    """predict hidden patches, the features of an image network, or the order of segments"""
    output: str = setting("", neutral=True)
    """file for the encoder, .pt (empty: encoder.pt in the run folder)"""
    exclude: tuple[str, ...] = ()
    """manifests or folders whose patients and files are left out"""
    seconds: float = setting(2.0, low=0.1, high=3600)
    """length of the windows that long videos are cut into"""
    stride: float = setting(2.0, low=0.01, high=36000)
    """seconds from the start of a window to that of the next one"""
    longest: float = setting(10.0, low=0.1)
    """videos longer than this many seconds are cut into windows"""
    windows: str = setting("", neutral=True)
    """folder in which the windows, frames of patients, are kept (empty: windows/ in run_dir)"""
    min_crop: float = setting(0.5, low=0.05, high=1)
    """smallest part of a frame's area that a random crop keeps (1: no crop)"""
    mask_ratio: float | None = setting(None, low=0.05, high=0.98, only_with={"method": ("mae",)})
    """mae: part of the patches that is hidden (None: 0.9; 0.75 if a frame has few patches)"""
    decoder_width: int = setting(96, low=32, high=4096, only_with={"method": ("mae",)})
    """mae: width of the decoder, a multiple of 32"""
    decoder_depth: int = setting(2, low=1, high=24, only_with={"method": ("mae",)})
    """mae: blocks of the decoder"""
    shuffle_frames: bool = setting(False, only_with={"method": ("mae",)})
    """mae: show the frames of each clip in a random order; a control, for comparisons"""
    with_frames: bool = setting(False, only_with={"method": ("mae",)}, neutral=True)
    """mae: draw frames of some clips, as they are, hidden and predicted, into reconstruction.png
    (the demo's always)"""
    teacher: str = setting("efficientnet_lite0", only_with={"method": ("distil",)})
    """distil: image network, named as for --backbone; random: targets that say nothing of the
    clips, a control"""
    teacher_weights: str = setting("default", only_with={"method": ("distil",)})
    """distil: weights of the teacher: default, or a file"""
    teacher_cache: str = setting("", neutral=True)
    """distil: folder in which the teacher's features are kept (empty: in the run folder)"""
    views: int = setting(4, low=1, high=1000, only_with={"method": ("distil",)})
    """distil: number of random views of each clip whose features are computed"""


# Settings of the training that mean nothing here: no flags, and refused if they are changed.
UNUSED = {
    *("val_csv", "test_csv", "label_column", "classes", "skip_unreadable", "cache", "check_clips"),
    *("modality", "eval_sampling", "head", "rotation", "translate", "scale", "rand_augment"),
    *("ra_magnitude", "random_erase", "mixup_alpha", "cutmix_alpha", "fusion", "freeze_until"),
    *("freeze_batchnorm", "feature_cache", "feature_augmentations", "loss", "label_smoothing"),
    *("focal_gamma", "logit_adjust_tau", "class_weights", "class_balanced_beta", "sampler_tau"),
    *("ema_decay", "compile", "monitor", "early_stopping_patience", "test_views", "test_crops"),
    *("target_error", "allow_pretraining_leak"),
}
SHARED_SECTIONS = ("Data", "Clips", "Model")  # see `shared_settings`
SHARED = ("precision", "num_workers", "seed", "device", "run_dir")


def shared_settings(config: TrainConfig, **own: Any) -> PretrainConfig:
    """The pretraining for a training with these settings: its data, clips, model and machine.

    Args:
        own: settings of the pretraining, `method="mae"` for example.
    """
    values, section = {}, ""
    for field in dataclasses.fields(TrainConfig):
        section = field.metadata.get("section") or section
        is_shared = section in SHARED_SECTIONS or field.name in SHARED
        # Another modality than RGB is not left out, but refused: its encoder would be another.
        if is_shared and field.name not in UNUSED - {"modality"}:
            values[field.name] = getattr(config, field.name)
    values["weights"] = None  # those of the training are what the pretraining gives
    return PretrainConfig(**{**values, **own})


def is_demo(config: PretrainConfig) -> bool:
    """Whether the demo's training clips are pretrained on."""
    return not (config.data or config.data_root or config.csv)


def resolve(config: PretrainConfig) -> PretrainConfig:
    """Fill in the settings that are None, and refuse settings that cannot work.

    Raises:
        UserError: all wrong settings at once.
    """
    demo, mae = is_demo(config), config.method == "mae"
    changes: dict[str, Any] = {"classes": ()}
    defaults = DEMO_DEFAULTS if demo else OWN_DATA_DEFAULTS
    defaults = {name: defaults[name] for name in ("n_frames", "image_size")}
    if config.method == "order":
        defaults["n_frames"] = 9 if demo else 15
    defaults |= {"weights": "none" if demo or mae else "default"}
    defaults |= {"epochs": (40 if mae else 12) if demo else (200 if mae else 60)}
    defaults |= {"learning_rate": 1e-3 if demo else 3e-4}
    changes |= {name: value for name, value in defaults.items() if getattr(config, name) is None}
    paths = {n: getattr(config, n) for n in ("data_root", "csv", "output", "teacher_cache")}
    # Absolute, because a run may be resumed from another folder.
    paths["windows"] = config.windows or os.path.join(config.run_dir, "windows")
    if os.path.exists(config.teacher_weights):
        paths["teacher_weights"] = config.teacher_weights
    changes |= {name: os.path.abspath(path) for name, path in paths.items() if path}
    changes |= {n: tuple(map(os.path.abspath, getattr(config, n))) for n in ("data", "exclude")}
    problems = [
        f"{field.name} has no effect in pretraining: leave it out"
        for field in dataclasses.fields(config)
        if field.name in UNUSED - {"modality"}
        and getattr(config, field.name) not in (field.default, ())
    ]
    if config.modality != "rgb":
        problems.append(f"modality = {config.modality}: pretraining is for rgb alone")
    if config.output and (Path(config.output).suffix != ".pt" or Path(config.output).is_dir()):
        problems.append(f"output = {config.output}: must be a file with a name that ends in .pt")
    if config.seconds > config.longest:
        problems.append(f"seconds = {config.seconds:g}: at most longest = {config.longest:g}")
    config = dataclasses.replace(config, **{**changes, "classes": None})
    problems += checks.find_problems(config)
    allowed = MODELS_OF.get(config.method, (config.model_name,))
    if config.model_name not in allowed:
        names = ", ".join(allowed)
        problems.append(f"method {config.method} is for {names}, not {config.model_name}")
    if config.method == "order" and config.n_frames % SEGMENTS:
        problems.append(f"n_frames = {config.n_frames}: method order needs a multiple of 3")
    if config.method == "distil" and config.n_frames < 2:
        problems.append("n_frames = 1: method distil compares the halves of a clip")
    if config.decoder_width % 32:
        problems.append(f"decoder_width = {config.decoder_width}: must be a multiple of 32")
    if config.data and (config.data_root or config.csv) and not all(map(_is_table, config.data)):
        problems.append("data_root is the folder of the clips of manifests: name one, or leave out")
    if problems:
        raise UserError("\n  ".join(["these settings cannot work:", *problems]))
    if config.warmup_epochs is None:
        changes["warmup_epochs"] = config.epochs / 20
    if mae and config.mask_ratio is None:
        changes["mask_ratio"] = default_mask_ratio((config.image_size // config.patch_size) ** 2)
    return dataclasses.replace(config, **changes)


def _is_table(source: str) -> bool:
    return Path(source).suffix.lower() in (".csv", ".tsv", ".xlsx", ".txt")
