"""The 2D networks that look at single frames: what TSM and CNN-LSTM are built on.

Each is the library's own network, so that its published weights fit, cut into a stem, layers of
blocks and an end. The branch and the identity path of a residual block can look at different
things: that is where TSM shifts.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional as F
from torchvision.models import (
    ConvNeXt,
    ConvNeXt_Tiny_Weights,
    ResNet,
    ResNet18_Weights,
    ResNet50_Weights,
)
from torchvision.models.convnext import CNBlock, CNBlockConfig
from torchvision.models.resnet import BasicBlock, Bottleneck

from modeling.layers import HALF_MEAN_STD, IMAGENET_MEAN_STD, run_stage
from utils.errors import UserError

BackboneName = Literal["resnet18", "resnet50", "convnext_tiny", "efficientnet_lite0"]

Shift = Callable[[torch.Tensor], torch.Tensor]


class Frames(nn.Module):
    """A network of single frames, `(N, C, H, W)` to `(N, width)`.

    Each network below says how it begins and ends, what its layers are, and what a block is.
    """

    width: int
    """of a frame's features"""
    mean_std = IMAGENET_MEAN_STD
    """how its pretrained weights want the pixels normalised"""
    torchvision_weights: Any = None
    """torchvision's enum of them"""
    first_conv: str
    """name of the convolution that sees the pixels"""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`(N, C, H, W)` to `(N, width)`."""
        return self.embed(x)

    def begin(self, x: torch.Tensor) -> torch.Tensor:
        """`(N, C, H, W)` to what the first layer sees."""
        raise NotImplementedError

    def end(self, x: torch.Tensor, grid: int = 1) -> torch.Tensor:
        """What the last layer says, averaged over each of `grid` x `grid` parts of the picture, to
        `(N, grid * grid * width)`."""
        raise NotImplementedError

    def stages(self) -> dict[str, list[nn.Module]]:
        """The modules from stem to features: `stem`, the layers, and `top` if `end` has weights."""
        raise NotImplementedError

    def residual(self, block: nn.Module, branch: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """A block whose residual branch looks at `branch`, and whose identity path at `x`."""
        raise NotImplementedError

    def has_identity(self, block: nn.Module) -> bool:
        """Whether a block has an identity path: shifting its branch then loses nothing."""
        return True

    def embed(
        self,
        x: torch.Tensor,
        shift: Shift | None = None,
        shift_place: str = "blockres",
        grid: int = 1,
    ) -> torch.Tensor:
        """`(N, C, H, W)` to `(N, grid * grid * width)`.

        Args:
            shift: applied to what each residual branch sees (`blockres`) or to what each layer sees
                (`stage`).
            grid: see `end`.
        """

        def layer(blocks: list[nn.Module], x: torch.Tensor) -> torch.Tensor:
            if shift and shift_place == "stage":
                x = shift(x)
            for block in blocks:
                if shift and shift_place == "blockres" and self.has_identity(block):
                    x = self.residual(block, shift(x), x)
                else:
                    x = block(x)
            return x

        for name, modules in self.stages().items():
            if name == "stem":
                x = run_stage(modules, self.begin, x)
            elif name != "top":
                x = run_stage(modules, partial(layer, modules), x)
        return self.end(x, grid)


class ResNetFrames(ResNet, Frames):
    """torchvision's ResNet without its classifier. He et al., arXiv:1512.03385."""

    first_conv = "conv1"

    def __init__(self, block: type[nn.Module], blocks: list[int], weights: Any) -> None:
        super().__init__(block, blocks)
        self.torchvision_weights = weights
        self.width = self.fc.in_features
        self.fc = nn.Identity()

    def begin(self, x: torch.Tensor) -> torch.Tensor:
        # Pooling before the ReLU gives the same and leaves it a quarter of the pixels.
        return self.relu(self.maxpool(self.bn1(self.conv1(x))))

    def end(self, x: torch.Tensor, grid: int = 1) -> torch.Tensor:
        return F.adaptive_avg_pool2d(x, grid).flatten(1)

    def stages(self) -> dict[str, list[nn.Module]]:
        layers = {name: list(getattr(self, name)) for name in LAYERS}
        return {"stem": [self.conv1, self.bn1]} | layers

    def residual(self, block: nn.Module, branch: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        branch = block.relu(block.bn1(block.conv1(branch)))
        branch = block.bn2(block.conv2(branch))
        if isinstance(block, Bottleneck):
            branch = block.bn3(block.conv3(block.relu(branch)))
        return block.relu(branch + (block.downsample(x) if block.downsample else x))


LAYERS = ("layer1", "layer2", "layer3", "layer4")


class ConvNeXtFrames(ConvNeXt, Frames):
    """torchvision's ConvNeXt-Tiny without its classifier: it has no BatchNorm, whose statistics
    suffer from small batches. Liu et al., arXiv:2201.03545."""

    first_conv = "features.0.0"
    torchvision_weights = ConvNeXt_Tiny_Weights

    def __init__(self) -> None:
        sizes = (96, 192, 384, 768)
        settings = zip(sizes, (*sizes[1:], None), (3, 3, 9, 3), strict=True)
        super().__init__([CNBlockConfig(*one) for one in settings])
        self.width = sizes[-1]
        self.classifier[2] = nn.Identity()

    def begin(self, x: torch.Tensor) -> torch.Tensor:
        return self.features[0](x)

    def end(self, x: torch.Tensor, grid: int = 1) -> torch.Tensor:
        return self.classifier(F.adaptive_avg_pool2d(x, grid))  # normalised, and flattened

    def stages(self) -> dict[str, list[nn.Module]]:
        first, *others = self.features[1:]  # blocks, halving, blocks, halving ...
        layers = [list(first)]
        for halving, blocks in zip(others[::2], others[1::2], strict=True):
            layers.append([halving, *blocks])
        named = dict(zip(LAYERS, layers, strict=True))
        return {"stem": [self.features[0]]} | named | {"top": [self.classifier[0]]}

    def residual(self, block: nn.Module, branch: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return x + block.layer_scale * block.block(branch)

    def has_identity(self, block: nn.Module) -> bool:
        return isinstance(block, CNBlock)


class EfficientNetLite0(Frames):
    """timm's EfficientNet-Lite0: a fifth of a ResNet-18's multiplications, and its ImageNet
    weights come as a package (requirements-lite.txt). Tan and Le, arXiv:1905.11946.

    Raises:
        UserError: timm is not installed.
    """

    first_conv = "conv_stem"
    mean_std = HALF_MEAN_STD

    def __init__(self) -> None:
        super().__init__()
        try:
            from timm import create_model
        except ImportError:
            raise UserError(
                "backbone efficientnet_lite0 needs packages: pip install -r requirements-lite.txt"
            ) from None
        # "tf": padded as in TensorFlow, where the weights come from, and with its epsilon.
        net = create_model("tf_efficientnet_lite0", num_classes=0)
        for name, norm in list(net.named_modules()):
            if isinstance(norm, nn.BatchNorm2d):  # timm's has the activation inside
                plain = nn.BatchNorm2d(norm.num_features, norm.eps, norm.momentum)
                net.set_submodule(name, nn.Sequential(plain, norm.act))
        self.width = net.num_features
        self.conv_stem, self.bn1 = net.conv_stem, net.bn1
        self.blocks = net.blocks
        self.conv_head, self.bn2 = net.conv_head, net.bn2

    def begin(self, x: torch.Tensor) -> torch.Tensor:
        return self.bn1(self.conv_stem(x))

    def end(self, x: torch.Tensor, grid: int = 1) -> torch.Tensor:
        return F.adaptive_avg_pool2d(self.bn2(self.conv_head(x)), grid).flatten(1)

    def stages(self) -> dict[str, list[nn.Module]]:
        layers = {f"layer{number}": list(blocks) for number, blocks in enumerate(self.blocks, 1)}
        stem, top = [self.conv_stem, self.bn1], [self.conv_head, self.bn2]
        return {"stem": stem} | layers | {"top": top}

    def residual(self, block: nn.Module, branch: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        branch = block.bn1(block.conv_pw(branch))
        branch = block.bn2(block.conv_dw(branch))
        return block.bn3(block.conv_pwl(branch)) + x

    def has_identity(self, block: nn.Module) -> bool:
        return block.has_skip


def build_backbone(name: BackboneName) -> Frames:
    """A network of frames with random weights.

    Raises:
        UserError: it needs a package that is not installed.
    """
    if name == "resnet18":
        return ResNetFrames(BasicBlock, [2, 2, 2, 2], ResNet18_Weights)
    if name == "resnet50":
        return ResNetFrames(Bottleneck, [3, 4, 6, 3], ResNet50_Weights)
    if name == "convnext_tiny":
        return ConvNeXtFrames()
    if name == "efficientnet_lite0":
        return EfficientNetLite0()
    raise ValueError(f"no backbone is called {name!r}")
