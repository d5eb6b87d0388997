"""TrainConfig: every setting of a training run.

Edit the defaults here, or give them as flags: `--batch-size 16` sets `batch_size`.
"""

import dataclasses
import sys
from collections.abc import Container, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from clips.manifest_formats import ManifestOptions
from clips.splits import SPLITS, find_splits
from utils.errors import UserError
from utils.structure import find_mismatch, short_repr

Precision = Literal["auto", "fp32", "bf16", "fp16"]
EngineName = Literal["torch", "openvino", "onnxruntime", "auto"]


def setting(
    default: Any,
    *,
    section: str = "",
    low: float | None = None,
    high: float | None = None,
    needs: str = "",
    only_with: Mapping[str, tuple[str, ...]] | None = None,
    pixels: Literal["", "all clips", "training clips"] = "",
    gradient: bool = False,
    resumable: bool = False,
    neutral: bool = False,
) -> Any:
    """A field of TrainConfig with everything that the code must know about it.

    Args:
        section: heading of the group of settings that begins here; `--help` shows the same groups.
        low, high: allowed range, both ends included.
        needs: another field without which this one has no effect.
        only_with: another field and its values with which this one has an effect.
        pixels: which clips' pixels depend on it; cached features are computed again if it changes.
        gradient: only training by gradient steps uses it, so it has no effect with `head` linear;
            neither have those with `pixels` of training clips.
        resumable: a resumed run may have another value than before (the clips must be the same,
            wherever they are; TrainState compares them).
        neutral: the results do not depend on it (so it is resumable as well).
    """
    metadata = {
        "section": section,
        "low": low,
        "high": high,
        "needs": needs,
        "only_with": only_with or {},
        "pixels": pixels,
        "gradient": gradient or pixels == "training clips",
        "resumable": resumable or neutral,
        "neutral": neutral,
    }
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a training run.

    Where a default is None, `training.checks.resolve` fills in the value for the demo data or for
    your own data (DEMO_DEFAULTS and OWN_DATA_DEFAULTS below).
    """

    # ---- Data ----
    data_root: str = setting("", section="Data", resumable=True)
    """folder of your data: train.csv, val.csv and test.csv, and the clips there or below clips/; or
    train/, val/ and test/ with a folder of clips per class; or a folder of clips per class, which
    are divided by patient (empty: demo data)"""
    train_csv: str = setting("train.csv", resumable=True)
    """manifest (or folder) of the training clips, below data_root or a path of its own"""
    val_csv: str = setting("val.csv", resumable=True)
    """manifest of the validation clips, which choose the best epoch (head linear trains on them)"""
    test_csv: str = setting("test.csv", resumable=True)
    """manifest of the test clips, which are used once, at the end"""
    csv: str = setting("", resumable=True)
    """one table of all clips instead of the three, with a column of their splits; without it they
    are divided by patient"""
    path_column: str = setting("", resumable=True)
    """manifests: the column of the paths (empty: recognised by its name, see docs/data.md)"""
    label_column: str = setting("", resumable=True)
    """manifests: the column of the labels (empty: recognised by its name)"""
    patient_column: str = setting("", resumable=True)
    """manifests: the column of the patients (empty: recognised by its name)"""
    split_column: str = setting("", resumable=True)
    """manifests: the column of the splits (empty: recognised by its name)"""
    patient_pattern: str = setting("", resumable=True)
    """regular expression that finds the patient in a path, e.g. "(VID[0-9]+)_" """
    frame_rate: float = setting(0.0, low=0, high=1000, resumable=True)
    """images per second of clips that are folders of images, where their manifest has no column fps
    (0: unknown)"""
    classes: tuple[str, ...] | None = None
    """names of the classes, in the order of their numbers (None: those of the labels)"""
    skip_unreadable: bool = setting(False, resumable=True)
    """leave out validation and test clips that cannot be read and report how many, instead of
    stopping (unreadable training clips are always left out and listed)"""
    cache: str = setting("", pixels="all clips", resumable=True)
    """folder filled by `prepare_data.py cache`: reading clips there is much faster than decoding"""
    check_clips: bool = setting(True, neutral=True)
    """read every validation and test clip once before the first epoch"""

    # ---- Clips ----
    n_frames: int | None = setting(None, section="Clips", low=1, high=1024, pixels="all clips")
    """frames per clip, T (None: 16; demo data 8)"""
    image_size: int | None = setting(None, low=16, high=4096, pixels="all clips")
    """height and width of the frames in pixels (None: 224; demo data 48)"""
    modality: Literal["rgb", "rgbdiff", "flow", "mv", "rgb+rgbdiff", "rgb+flow", "rgb+mv"] = (
        setting("rgb", pixels="all clips")
    )
    """input of tsm_resnet and cnnlstm: RGB frames, differences of neighbouring frames (rgbdiff),
    optical flow (needs OpenCV), motion vectors of H.264 and MPEG files (mv), or RGB and one of
    these"""
    sampling: Literal["random", "uniform", "first"] = setting("random", pixels="training clips")
    """frames of a training clip: one at random from each of T equal segments, the middle of each
    segment (uniform), or the first T frames, the last one repeated (first)"""
    eval_sampling: Literal["uniform", "first"] = setting("uniform", pixels="all clips")
    """frames of a validation or test clip; the values mean the same as for sampling"""

    # ---- Augmentation ----
    hflip_prob: float = setting(0.5, section="Augmentation", low=0, high=1, pixels="training clips")
    """probability of a horizontal flip"""
    rotation: float | None = setting(None, low=0, high=180, pixels="training clips")
    """largest random rotation in degrees (None: 10; demo data 0)"""
    translate: float | None = setting(None, low=0, high=1, pixels="training clips")
    """largest random shift as a fraction of the frame's size (None: 0.05; demo data 0)"""
    scale: float | None = setting(None, low=0, high=0.9, pixels="training clips")
    """largest random change of scale; a large one makes PanoView and LocPanoView look alike
    (None: 0.1; demo data 0)"""
    brightness: float = setting(0.2, low=0, pixels="training clips")
    """strength of the random brightness change"""
    contrast: float = setting(0.2, low=0, pixels="training clips")
    """strength of the random contrast change"""
    saturation: float = setting(0.2, low=0, pixels="training clips")
    """strength of the random saturation change"""
    hue: float = setting(0.02, low=0, high=0.5, pixels="training clips")
    """strength of the random hue change"""
    rand_augment: int = setting(0, low=0, pixels="training clips")
    """number of RandAugment operations per training clip, before the changes above (0: none;
    2 is usual)"""
    ra_magnitude: int = setting(9, low=0, high=30, needs="rand_augment", pixels="training clips")
    """strength of the RandAugment operations"""
    random_erase: float = setting(0.0, low=0, high=1, pixels="training clips")
    """probability that a box of a training clip is painted over, the same box in all frames"""
    mixup_alpha: float = setting(0.0, gradient=True, low=0, high=100)
    """blend each clip with another one, and their labels, in proportions from Beta(alpha, alpha);
    0.2 is a common start (0: never; together with cutmix_alpha: every other batch, by chance)"""
    cutmix_alpha: float = setting(0.0, gradient=True, low=0, high=100)
    """paste a box of another clip into each clip, the same box in all frames, with an area from
    Beta(alpha, alpha), and mix the labels by area; 1 is a common start (0: never)"""

    # ---- Model ----
    model_name: str = setting("tsm_resnet", section="Model")
    """model to train: tsm_resnet, r2plus1d, cnnlstm, vivit, timesformer, video_swin, mvit, or your
    own (models.MODELS)"""
    weights: str | None = None
    """pretrained weights: default, a torchvision name such as IMAGENET1K_V1, a file, a run folder,
    or none (None: default; demo data none)"""
    model_size: Literal["", "tiny", "small", "base"] = ""
    """vivit, timesformer, video_swin, mvit: size of the model (empty: the smallest that it has;
    vivit's is smaller than tiny)"""
    backbone: str = "resnet18"
    """tsm_resnet, cnnlstm: network applied to each frame: resnet18, resnet50, convnext_tiny,
    convnext_large, efficientnet_lite0 (suits a laptop; its weights are a package), one of a public
    encoder (train.py --list-encoders), or any network of timm, e.g. timm:vit_small_patch14_dinov2
    (pip install -r requirements-optional.txt)"""
    fusion: Literal["early", "late", "summary"] = setting(
        "late", only_with={"modality": ("rgb+rgbdiff", "rgb+flow", "rgb+mv")}
    )
    """tsm_resnet, cnnlstm with two modalities: motion as more channels of the first convolution
    (early), as the input of a second network (late), or as six numbers per frame that describe the
    camera's motion (summary)"""
    shift_place: Literal["blockres", "stage"] = "blockres"
    """tsm_resnet: shift inside every residual branch, or before each of the four stages"""
    shift_div: int = setting(8, low=2, high=1024)
    """tsm_resnet: 1/shift_div of the channels are shifted forward in time, as many backward"""
    shift_mode: Literal["bidirectional", "causal"] = "bidirectional"
    """tsm_resnet: causal shifts from the past only, so that predict.py can follow a live stream"""
    shift_buffer_prob: float = setting(
        0.5, gradient=True, low=0, high=1, only_with={"shift_mode": ("causal",)}
    )
    """causal tsm_resnet: probability that a training clip begins with the end of another clip in
    its shift buffer, as in a stream, and not with an empty one"""
    spatial_pool: int = setting(1, low=1, high=7)
    """cnnlstm: pool each of spatial_pool x spatial_pool parts of the frame, not the whole frame"""
    lstm_hidden: int = setting(512, low=1, high=65536, needs="lstm_layers")
    """cnnlstm: hidden size of the LSTM"""
    lstm_layers: int = setting(1, low=0, high=16)
    """cnnlstm: layers of the LSTM (0: no LSTM, the features of the frames are pooled)"""
    bidirectional: bool = setting(False, needs="lstm_layers")
    """cnnlstm: a second LSTM reads the clip backward"""
    temporal_pooling: Literal[
        "mean", "last", "max", "attention", "statistics", "root_statistics"
    ] = "mean"
    """cnnlstm: how the outputs of T frames become one vector"""
    dropout: float = setting(0.0, gradient=True, low=0, high=0.99)
    """dropout before the classifier (also inside ViViT's blocks and between LSTM layers)"""
    drop_path: float = setting(0.0, gradient=True, low=0, high=0.99)
    """vivit, timesformer, video_swin, mvit: probability that a clip skips a residual branch of the
    last block, falling linearly to 0 at the first block (stochastic depth)"""
    patch_size: int = setting(16, low=4, high=64)
    """vivit, timesformer: height and width of a patch in pixels (DINOv2's weights need 14)"""
    tubelet_frames: int = setting(1, low=1, high=64)
    """vivit: frames per token"""
    attention: Literal["factorised", "joint"] = "factorised"
    """vivit: within each frame, then between frames (factorised), or between all tokens of a clip
    (joint)"""
    pixel_mean: tuple[float, ...] = ()
    """mean of red, green and blue that is subtracted from pixels in [0, 1] (empty: the one that the
    weights were trained with)"""
    pixel_std: tuple[float, ...] = ()
    """standard deviation of red, green and blue, by which they are then divided"""
    allow_pretraining_leak: bool = setting(False, resumable=True)
    """train although pretrain.py has seen patients or clips of validation or test; the results then
    hold a warning"""

    # ---- Freezing ----
    head: Literal["adamw", "linear"] = setting("adamw", section="Freezing")
    """how the classifier is fitted: with the other layers, by AdamW; or alone (linear), as the
    logistic regression that is the optimum for the features of the pretrained model, to training
    and validation clips together: best for few clips (see --recipe laptop)"""
    freeze_until: str = setting("", gradient=True)
    """freeze the model's stages up to and including this one, e.g. layer2 (empty: train all)"""
    freeze_batchnorm: bool = setting(False, gradient=True)
    """keep the pretrained BatchNorm statistics; those of small batches are noisy"""
    feature_cache: str = setting("", neutral=True)
    """folder for the features of a frozen backbone: they are computed once, then an epoch takes a
    second. Needs cnnlstm with everything frozen before the LSTM (--head linear, or --freeze-until
    layer4, or top)"""
    feature_augmentations: int = setting(4, gradient=True, low=1, high=1000, needs="feature_cache")
    """number of random augmentations of each training clip whose features are kept"""

    # ---- Loss and class balance ----
    loss: str = setting("cross_entropy", gradient=True, section="Loss")
    """cross_entropy, focal, ldam, balanced_softmax, logit_adjustment, or your own (LOSSES in
    training/losses.py); ldam and the two after it favour rare classes: use --sampler-tau 0 with
    them"""
    label_smoothing: float = setting(
        0.0,
        gradient=True,
        low=0,
        high=0.99,
        only_with={"loss": ("cross_entropy", "balanced_softmax", "logit_adjustment")},
    )
    """fraction of the target that is spread over all classes"""
    focal_gamma: float = setting(2.0, gradient=True, low=0, high=10, only_with={"loss": ("focal",)})
    """focal: how much less a well classified clip counts (0: cross entropy)"""
    logit_adjust_tau: float = setting(
        1.0, gradient=True, low=0, high=5, only_with={"loss": ("logit_adjustment",)}
    )
    """logit_adjustment: the logits are shifted by tau times the log frequency of the classes"""
    class_weights: Literal["none", "inverse", "effective"] = "none"
    """weights of the classes in the loss, with mean 1: by 1 / count, or by the effective number of
    samples; with ldam only in the last fifth of the epochs"""
    class_balanced_beta: float = setting(
        0.999, low=0, high=0.999999, only_with={"class_weights": ("effective",)}
    )
    """class_weights effective: 0 gives equal weights, values near 1 give those of inverse"""
    sampler_tau: float = setting(0.5, low=0, high=5)
    """weighted sampler: clips are drawn with weight count^-tau (0: plain shuffling, 1: all classes
    equally often)"""

    # ---- Optimisation ----
    epochs: int | None = setting(None, gradient=True, section="Optimisation", low=1)
    """passes over the training clips (None: 30; demo data 4)"""
    batch_size: int = setting(8, low=1)
    """clips per step and process"""
    gradient_accumulation_steps: int = setting(1, gradient=True, low=1)
    """batches whose gradients are added up for one optimizer step"""
    learning_rate: float | None = setting(None, gradient=True, low=0)
    """peak learning rate of AdamW (None: 1e-4; demo data 1e-3)"""
    layer_decay: float = setting(1.0, gradient=True, low=0.01, high=1)
    """the learning rate of each stage is that of the next one times this factor (1: all equal)"""
    weight_decay: float = setting(0.05, gradient=True, low=0)
    """weight decay of AdamW; biases, norms and position embeddings have none"""
    warmup_epochs: float = setting(1.0, gradient=True, low=0)
    """epochs of linear warm-up before the cosine decay (at most half of all epochs)"""
    max_grad_norm: float = setting(1.0, gradient=True, low=0)
    """largest gradient norm; larger gradients are clipped (0: no clipping)"""
    ema_decay: float = setting(0.0, gradient=True, low=0, high=0.99999)
    """decay per step of an exponential moving average of the weights, which is then validated, kept
    and tested; 0.99 averages over about 100 steps (0: no average)"""
    precision: Precision = "auto"
    """precision of the forward pass: auto (what the device computes fast), fp32, bf16, fp16"""
    gradient_checkpointing: bool = setting(False, gradient=True, neutral=True)
    """recompute activations in the backward pass: less memory, slower steps, the same result"""
    compile: bool = setting(False, gradient=True)
    """compile the model with torch.compile (the first step is slow)"""

    # ---- Evaluation ----
    monitor: Literal["macro_f1", "accuracy", "balanced_accuracy", "loss", "last"] = setting(
        "macro_f1", gradient=True, section="Evaluation"
    )
    """validation metric that chooses the best epoch (last: always the last epoch, for when the
    validation clips are so few that they would choose by chance)"""
    early_stopping_patience: int = setting(
        0,
        gradient=True,
        low=0,
        only_with={"monitor": ("macro_f1", "accuracy", "balanced_accuracy", "loss")},
        resumable=True,
    )
    """stop after this many epochs without a better one (0: never)"""
    test_views: int = setting(1, low=1)
    """temporal views per test clip, whose probabilities are averaged"""
    test_crops: Literal[1, 3, 5] = 1
    """spatial crops per view: the whole frame, 3 along its width, or 5"""
    target_error: float = setting(0.1, low=0, high=1)
    """error rate among the answered clips that the confidence threshold aims at; the threshold is
    chosen on the validation clips after training, and below it a clip is called uncertain"""

    # ---- Run ----
    num_workers: int = setting(2, section="Run", low=0, high=1024, neutral=True)
    """processes that read clips, per training process (0: read them between the steps)"""
    seed: int = setting(0, low=0, high=2**32)
    """random seed"""
    device: str = setting("auto", neutral=True)
    """device: auto, cpu, cuda, cuda:1, mps"""
    run_dir: str = setting("runs", neutral=True)
    """folder in which run folders are made"""
    resume: str = setting("", neutral=True)
    """run folder to continue; it brings its own settings"""
    tensorboard: bool = setting(False, neutral=True)
    """also write TensorBoard logs into the run folder (pip install -r requirements-optional.txt)"""
    wandb: bool = setting(False, neutral=True)
    """also send settings and scores to Weights & Biases (pip install wandb; docs/training.md)"""

    def __post_init__(self) -> None:
        for name, spellings in OLD_VALUES.items():
            value = getattr(self, name)
            object.__setattr__(self, name, spellings.get(value, value))


Config = TypeVar("Config", bound=TrainConfig)

# What None stands for. The demo is small enough to be trained from scratch on two CPU cores; with
# geometric augmentation, four epochs would be too few.
DEMO_DEFAULTS = {
    "n_frames": 8,
    "image_size": 48,
    "rotation": 0.0,
    "translate": 0.0,
    "scale": 0.0,
    "weights": "none",
    "epochs": 4,
    "learning_rate": 1e-3,
}
OWN_DATA_DEFAULTS = {
    "n_frames": 16,
    "image_size": 224,
    "rotation": 10.0,
    "translate": 0.05,
    "scale": 0.1,
    "weights": "default",
    "epochs": 30,
    "learning_rate": 1e-4,
}

# `--recipe NAME` gives these settings; other flags are given beside it, and win.
RECIPES = {
    "laptop": {
        "model_name": "cnnlstm",
        "backbone": "efficientnet_lite0",
        "modality": "rgb+rgbdiff",
        "lstm_layers": 0,
        "spatial_pool": 2,
        "temporal_pooling": "root_statistics",
        "head": "linear",
        "sampler_tau": 1.0,
        "feature_cache": "runs/features",
    },
}

# Earlier names of the settings, as old checkpoints hold them. Flags with these names (except
# --model) are refused, with a message that gives the new name.
OLD_NAMES = {
    "accumulation": "gradient_accumulation_steps",
    "adjustment_tau": "logit_adjust_tau",
    "amp": "precision",
    "carry_past": "shift_buffer_prob",
    "clip_norm": "max_grad_norm",
    "cutmix": "cutmix_alpha",
    "effective_beta": "class_balanced_beta",
    "ema": "ema_decay",
    "erasing": "random_erase",
    "feature_draws": "feature_augmentations",
    "features": "feature_cache",
    "flip": "hflip_prob",
    "freeze_to": "freeze_until",
    "grid": "spatial_pool",
    "inputs": "modality",
    "mixup": "mixup_alpha",
    "model": "model_name",
    "patience": "early_stopping_patience",
    "rand_magnitude": "ra_magnitude",
    "select_by": "monitor",
    "tau": "sampler_tau",
    "wanted_error": "target_error",
    "workers": "num_workers",
    "zoom": "scale",
}
# Earlier spellings of values, which are still accepted everywhere.
OLD_VALUES = {
    "model_name": {"tsm": "tsm_resnet", "cnn_lstm": "cnnlstm"},
    "modality": {
        "gradients": "rgbdiff",
        "vectors": "mv",
        "rgb+gradients": "rgb+rgbdiff",
        "rgb+vectors": "rgb+mv",
    },
}


def from_dict(
    settings: Mapping[str, Any], kind: type[Config] = TrainConfig, source: str = "settings"
) -> Config:
    """The config of a checkpoint or a config.json, also of earlier versions.

    Settings that this version does not know are left out.

    Args:
        source: the file, for messages.

    Raises:
        UserError: a setting has a value of another type, or out of its range.
    """
    known = {field.name for field in dataclasses.fields(kind)}
    named = {OLD_NAMES.get(name, name): value for name, value in settings.items()}
    named = {name: tuple(v) if isinstance(v, list) else v for name, v in named.items()}
    if "classes" not in named:
        raise UserError(f"{source}: names no classes: not the settings of a run")
    try:
        config = kind(**{name: value for name, value in named.items() if name in known})
    except TypeError:  # a value that is no key of OLD_VALUES
        raise UserError(f"{source}: a setting is of another type than this version's") from None
    if problems := wrong_values(config):
        raise UserError(f"{source}: the settings of no run: {'; '.join(problems)}")
    return config


def wrong_values(config: TrainConfig) -> list[str]:
    """A line for each setting whose value is of another type, or not among the allowed ones.

    Which models and losses there are, `training.checks.find_problems` knows.
    """
    problems = []
    hints = get_type_hints(type(config))
    for field in dataclasses.fields(config):
        name, value, hint = field.name, getattr(config, field.name), hints[field.name]
        choices = get_args(hint) if get_origin(hint) is Literal else ()
        low, high = field.metadata.get("low"), field.metadata.get("high")
        tuples = [kind for kind in (hint, *get_args(hint)) if get_origin(kind) is tuple]
        if tuples and value is None and hint is not tuples[0]:
            continue
        shape = [get_args(tuples[0])[0]] if tuples else hint
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if choices and value not in choices:
            problems.append(
                f"{name} = {short_repr(value)}: choose from {', '.join(map(repr, choices))}"
            )
        elif is_number and low is not None and not low <= value <= (high or sys.float_info.max):
            allowed = f"at least {low}" if high is None else f"from {low} to {high}"
            problems.append(f"{name} = {short_repr(value)}: must be {allowed}")
        elif not choices and (mismatch := find_mismatch(value, shape, name)):
            problems.append(mismatch)
        elif isinstance(value, str) and "\0" in value:
            problems.append(f"{name} holds a character that no path has")
    return problems


def differences(
    first: TrainConfig, second: TrainConfig, ignore: Container[str] = ()
) -> list[tuple[str, Any, Any]]:
    """The settings in which two configs differ: name, first value, second value."""
    return [
        (field.name, getattr(first, field.name), getattr(second, field.name))
        for field in dataclasses.fields(first)
        if field.name not in ignore and getattr(first, field.name) != getattr(second, field.name)
    ]


def fitted_splits(config: TrainConfig) -> tuple[str, ...]:
    """The splits whose clips the model is fitted to.

    A linear head takes the validation clips too: there is no epoch to choose by them.
    """
    return ("train", "val") if config.head == "linear" else ("train",)


def names_with(attribute: str, *values: Any) -> list[str]:
    """The names of the settings whose `attribute` has one of these values; see `setting`."""
    return [f.name for f in dataclasses.fields(TrainConfig) if f.metadata.get(attribute) in values]


def manifest_paths(config: TrainConfig) -> dict[str, Path] | Path:
    """The manifest or folder of each split, or of all clips; see `clips.splits.find_splits`."""
    if config.csv:
        return Path(config.csv)
    names = {split: getattr(config, f"{split}_csv") for split in SPLITS}
    return find_splits(Path(config.data_root), names, ManifestOptions.of(config))
