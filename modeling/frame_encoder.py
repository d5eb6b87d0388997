"""FrameEncoder: the part that TSM and CNN-LSTM share, a 2D CNN over frames and their motion."""

import copy
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn

from modeling.layers import Normalize
from video.motion import MAX_MOTION, ZERO, Modality

if TYPE_CHECKING:
    from modeling.backbones import Backbone

# Motion of this fraction of the frame's side per frame is scaled to 1, the value of a normalised
# pixel that is one standard deviation above the mean.
_TYPICAL_MOTION = 0.025

# Neighbouring frames differ little: their differences are enlarged by this factor.
_RGBDIFF_GAIN = 2.0

Convolution = TypeVar("Convolution", nn.Conv2d, nn.Conv3d)


class FrameEncoder(nn.Module):
    """Features of every frame.

    Args:
        backbone: name of the 2D CNN; see modeling/backbones.py.
        modality: `rgb`, a kind of motion (`rgbdiff`, `flow`, `mv`), or `rgb+` one of them.
        fusion: how motion is used beside RGB. `early`: as more channels of the first convolution,
            whose new filters start as the mean of those for RGB. `late`: as the input of a second
            network, whose features are concatenated with the first one's (the two streams of
            Simonyan and Zisserman, arXiv:1406.2199). `summary`: only as six numbers per frame that
            describe the camera's motion.
        spatial_pool: pool each of spatial_pool x spatial_pool parts of the frame, not the whole
            frame, because the position of an instrument helps to recognise the action.
    """

    def __init__(
        self,
        backbone: str = "resnet18",
        modality: str = "rgb",
        fusion: str = "late",
        spatial_pool: int = 1,
    ) -> None:
        super().__init__()
        from modeling.backbones import build_backbone  # imports torchvision, which takes seconds

        if fusion not in ("early", "late", "summary"):
            raise ValueError(f"fusion must be early, late or summary, not {fusion!r}")
        self.modality = Modality.parse(modality)
        motion = self.modality.motion
        if fusion == "summary" and self.modality.rgb and motion == "rgbdiff":
            raise ValueError("fusion summary needs a field of motion: rgb+flow or rgb+mv")
        self.fusion = fusion if self.modality.rgb and motion else None
        self.backbone = build_backbone(backbone, spatial_pool)
        self.normalize = Normalize(self.backbone.mean_std)
        self.num_features = self.backbone.num_features
        self.motion_backbone: Backbone | None = None
        if self.fusion == "early":
            conv = self.backbone.get_submodule(self.backbone.first_conv)
            wider = inflate_first_conv(conv, 3 if motion == "rgbdiff" else 2)
            self.backbone.set_submodule(self.backbone.first_conv, wider)
        elif self.fusion == "late":
            self.motion_backbone = build_backbone(backbone, spatial_pool)
            self.num_features += self.motion_backbone.num_features
        elif self.fusion == "summary":
            self.num_features += 6

    @property
    def torchvision_weights(self) -> Any:
        """torchvision's enum of pretrained weights for the backbone, if there is one."""
        return self.backbone.torchvision_weights

    @property
    def channels(self) -> int:
        """C of the clips that the model takes."""
        return self.modality.channels

    def backbones(self) -> "list[Backbone]":
        """The network for RGB or for a single modality, and the one for motion if there is one."""
        return [net for net in (self.backbone, self.motion_backbone) if net is not None]

    def forward_features(self, clips: torch.Tensor) -> torch.Tensor:
        """`(B, T, C, H, W)` to the features of the frames, `(B * T, num_features)`."""
        frames = self.normalize(clips[:, :, :3])  # (B, T, 3, H, W)
        motion = self.modality.motion
        if motion is None:
            return self.backbone(frames.flatten(0, 1))
        if motion == "rgbdiff":
            values = image = rgb_difference(frames) * _RGBDIFF_GAIN  # (B, T, 3, H, W)
        else:
            field = decode_motion(clips[:, :, 3:]).to(frames.dtype)  # (B, T, 2, H, W)
            values = field / _TYPICAL_MOTION
            # A third channel, the speed, makes it an image for a network of RGB images.
            image = torch.cat((values, values.norm(dim=2, keepdim=True)), dim=2)
        if self.fusion is None:
            return self.backbone(image.flatten(0, 1))
        if self.fusion == "early":
            return self.backbone(torch.cat((frames, values), dim=2).flatten(0, 1))
        features = self.backbone(frames.flatten(0, 1))  # (B * T, width)
        if self.fusion == "summary":
            motion_features = camera_motion(field).flatten(0, 1) / _TYPICAL_MOTION  # (B * T, 6)
        else:
            motion_features = self.motion_backbone(image.flatten(0, 1))
        return torch.cat((features, motion_features.to(features.dtype)), dim=1)

    def frame_stages(self) -> dict[str, list[nn.Module]]:
        """The modules from stem to features; each stage includes those of a motion network."""
        stages = self.backbone.stages()
        if self.motion_backbone is None:
            return stages
        second = self.motion_backbone.stages()
        return {name: [*modules, *second[name]] for name, modules in stages.items()}


def decode_motion(codes: torch.Tensor) -> torch.Tensor:
    """Motion as fractions of the side, float; `codes` are uint8, or float in [0, 1] like pixels."""
    codes = codes.float() if codes.dtype == torch.uint8 else codes * 255
    return (codes - ZERO) * (MAX_MOTION / 127)


def rgb_difference(clips: torch.Tensor) -> torch.Tensor:
    """Frame t minus frame t - 1 of the clip; zero for the first frame.

    `(B, T, 3, H, W)` uint8, or float, to float of the same shape; uint8 is scaled to [0, 1] first.
    """
    x = clips / 255 if clips.dtype == torch.uint8 else clips
    return torch.cat([torch.zeros_like(x[:, :1]), x[:, 1:] - x[:, :-1]], 1)


def camera_motion(field: torch.Tensor) -> torch.Tensor:
    """The part of the motion that the camera explains, and the rest: `(B, T, 2, H, W)` fractions of
    the side to `(B, T, 6)`.

    The camera's part is the similarity about the centre of the frame that fits best by least
    squares:

        right = shift_x + zoom * x - turn * y
        down  = shift_y + zoom * y + turn * x

    with x, y as fractions of the side. The six numbers are shift_x, shift_y (fractions per frame),
    zoom (per frame; positive: the content grows), turn (radians per frame; positive: clockwise),
    the mean length of the motion, and the root mean square of the residual of the fit. Pixels lie
    evenly about the centre, so the four unknowns are independent of each other.
    """
    right, down = field.float().unbind(2)  # (B, T, H, W)
    y, x = ((torch.arange(n, device=field.device) + 0.5) / n - 0.5 for n in field.shape[-2:])
    y = y.unsqueeze(1)  # (H, 1), against (W,)
    spread = (x**2).mean() + (y**2).mean()
    shift_x, shift_y = right.mean((-2, -1)), down.mean((-2, -1))  # (B, T)
    zoom = (x * right + y * down).mean((-2, -1)) / spread
    turn = (x * down - y * right).mean((-2, -1)) / spread
    a, b, z, r = (value[..., None, None] for value in (shift_x, shift_y, zoom, turn))
    squares = (right - a - z * x + r * y) ** 2 + (down - b - z * y - r * x) ** 2
    length, residual = field.float().norm(dim=2).mean((-2, -1)), squares.mean((-2, -1)).sqrt()
    return torch.stack([shift_x, shift_y, zoom, turn, length, residual], -1)


def inflate_first_conv(conv: Convolution, extra: int) -> Convolution:
    """A copy of a pretrained convolution of RGB that takes `extra` more channels."""
    wider = copy.deepcopy(conv)
    wider.in_channels += extra
    wider.weight = nn.Parameter(inflate_filters(conv.weight.detach(), extra))
    return wider


def inflate_filters(weight: torch.Tensor, extra: int) -> torch.Tensor:
    """Filters of RGB, `(N, 3, ...)`, with `extra` more channels.

    Each new channel is the mean over the RGB filters: the cross-modality initialisation of Temporal
    Segment Networks (Wang et al., arXiv:1608.00859, section 3.2). The RGB filters stay as they are.
    """
    return torch.cat([weight, *[weight.mean(1, keepdim=True)] * extra], 1)
