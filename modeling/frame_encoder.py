"""What TSM and CNN-LSTM share: a network that looks at each frame, and perhaps at its motion."""

import copy
from typing import Any, Literal, TypeVar

import torch
from torch import nn
from torch.nn import functional as F

from modeling.backbones import BackboneName, Frames, Shift, build_backbone
from modeling.layers import Normalize
from video.motion import NONE, RANGE, Inputs, channels, motion_of

Fusion = Literal["early", "late", "summary"]

# Motion of this share of the picture's side a frame is as large to a network as a pixel one
# standard deviation off the mean.
_USUAL_MOTION = 0.025

# Frames differ little from the ones before them.
_GRADIENT_GAIN = 2.0


class FrameModel(nn.Module):
    """Features of every frame.

    Args:
        backbone: the network that looks at frames; see backbones.py.
        inputs: what it is shown: RGB, motion as a picture (motion.py), or both.
        fusion: of both, how motion is used. `early`: as more channels of the first convolution,
            whose new filters start as the mean of those for RGB. `late`: as the picture that a
            second network sees, whose features are put beside the first one's (the two streams of
            Simonyan and Zisserman, arXiv:1406.2199). `summary`: only as six numbers a frame that
            say how the camera moves.
        grid: features of each of `grid` x `grid` parts of the picture, not of the whole: where an
            instrument is tells what it does.
    """

    def __init__(
        self, backbone: BackboneName, inputs: Inputs, fusion: Fusion, grid: int = 1
    ) -> None:
        super().__init__()
        if fusion not in ("early", "late", "summary"):
            raise ValueError(f"fusion must be early, late or summary, not {fusion!r}")
        self.motion = motion_of(inputs)
        if fusion == "summary" and inputs == "rgb+gradients":
            raise ValueError("fusion summary needs a field of motion: rgb+flow or rgb+vectors")
        self.inputs = inputs
        self.fusion = fusion if inputs.startswith("rgb+") else None
        self.backbone = build_backbone(backbone)
        self.normalize = Normalize(self.backbone.mean_std)
        self.grid = grid
        self.width = grid**2 * self.backbone.width
        self.motion_backbone: Frames | None = None
        if self.fusion == "early":
            conv = self.backbone.get_submodule(self.backbone.first_conv)
            wider = inflate_first_conv(conv, 3 if self.motion == "gradients" else 2)
            self.backbone.set_submodule(self.backbone.first_conv, wider)
        elif self.fusion == "late":
            self.motion_backbone = build_backbone(backbone)
            self.width += grid**2 * self.motion_backbone.width
        elif self.fusion == "summary":
            self.width += 6

    @property
    def torchvision_weights(self) -> Any:
        """torchvision's enum of pretrained weights for the backbone, if it has one."""
        return self.backbone.torchvision_weights

    @property
    def channels(self) -> int:
        """C of the clips that it takes."""
        return channels(self.inputs)

    def frame_features(
        self, clips: torch.Tensor, shift: Shift | None = None, shift_place: str = "blockres"
    ) -> torch.Tensor:
        """`(B, T, C, H, W)` to `(B * T, width)`; `shift` as in `Frames.embed`."""
        frames = self.normalize(clips[:, :, :3])  # (B, T, 3, H, W)
        if self.inputs == "rgb":
            return self.backbone.embed(frames.flatten(0, 1), shift, shift_place, self.grid)
        if self.motion == "gradients":
            motion = picture = temporal_gradients(frames) * _GRADIENT_GAIN  # (B, T, 3, H, W)
        else:
            field = decode_motion(clips[:, :, 3:]).to(frames.dtype)  # (B, T, 2, H, W)
            motion = field / _USUAL_MOTION
            picture = torch.cat((motion, motion.norm(dim=2, keepdim=True)), dim=2)
        if self.fusion is None:
            return self.backbone.embed(picture.flatten(0, 1), shift, shift_place, self.grid)
        if self.fusion == "early":
            both = torch.cat((frames, motion), dim=2).flatten(0, 1)  # (B * T, 5 or 6, H, W)
            return self.backbone.embed(both, shift, shift_place, self.grid)
        seen = self.backbone.embed(frames.flatten(0, 1), shift, shift_place, self.grid)
        if self.fusion == "summary":
            moved = global_motion(field).flatten(0, 1) / _USUAL_MOTION  # (B * T, 6)
        else:
            moved = self.motion_backbone.embed(picture.flatten(0, 1), shift, shift_place, self.grid)
        return torch.cat((seen, moved.to(seen.dtype)), dim=1)

    def frame_stages(self) -> dict[str, list[nn.Module]]:
        """The modules from stem to features; those of a second network beside the first one's."""
        stages = self.backbone.stages()
        if self.motion_backbone is None:
            return stages
        second = self.motion_backbone.stages()
        return {name: [*modules, *second[name]] for name, modules in stages.items()}


Convolution = TypeVar("Convolution", nn.Conv2d, nn.Conv3d)


def decode_motion(codes: torch.Tensor) -> torch.Tensor:
    """Motion in shares of the side, float; `codes` are uint8, or float in [0, 1] as pixels are."""
    codes = codes.float() if codes.dtype == torch.uint8 else codes * 255
    return (codes - NONE) * (RANGE / 127)


def join_motion(clip: torch.Tensor, field: torch.Tensor) -> torch.Tensor:
    """`(T, 3, H, W)` uint8 pictures and their `(T, 2, h, w)` uint8 field as `(T, 5, H, W)`."""
    return torch.cat([clip, F.interpolate(field, clip.shape[-2:], mode="bilinear")], 1)


def temporal_gradients(clips: torch.Tensor) -> torch.Tensor:
    """`(B, T, 3, H, W)` uint8, or float in [0, 1], to what each frame changed, float in [-1, 1].

    Frame t minus frame t - 1 of the clip; the first frame's are zero.
    """
    x = clips / 255 if clips.dtype == torch.uint8 else clips
    return torch.cat([torch.zeros_like(x[:, :1]), x[:, 1:] - x[:, :-1]], 1)


def global_motion(field: torch.Tensor) -> torch.Tensor:
    """What moves as the camera does, and what is left: `(B, T, 2, H, W)` shares to `(B, T, 6)`.

    The camera's part is the similarity about the picture's centre that fits best by least squares:

        right = shift_x + zoom * x - turn * y
        down  = shift_y + zoom * y + turn * x

    with x, y in shares of the side. The six numbers are shift_x, shift_y (shares a frame), zoom (a
    frame; positive: the content grows), turn (radians a frame; positive: clockwise), then the mean
    length of the motion, and the root of the mean squared length of what the fit leaves over.
    Pixels lie evenly about the centre, so that the four unknowns are independent of each other.
    """
    right, down = field.float().unbind(2)  # (B, T, H, W)
    y, x = ((torch.arange(n, device=field.device) + 0.5) / n - 0.5 for n in field.shape[-2:])
    y = y.unsqueeze(1)  # (H, 1), against (W,)
    spread = (x**2).mean() + (y**2).mean()
    shift_x, shift_y = right.mean((-2, -1)), down.mean((-2, -1))  # (B, T)
    zoom = (x * right + y * down).mean((-2, -1)) / spread
    turn = (x * down - y * right).mean((-2, -1)) / spread
    a, b, z, r = (one[..., None, None] for one in (shift_x, shift_y, zoom, turn))
    left_over = (right - a - z * x + r * y) ** 2 + (down - b - z * y - r * x) ** 2
    length, residual = torch.hypot(right, down).mean((-2, -1)), left_over.mean((-2, -1)).sqrt()
    return torch.stack([shift_x, shift_y, zoom, turn, length, residual], -1)


def inflate_first_conv(conv: Convolution, extra: int) -> Convolution:
    """A copy of a pretrained convolution of RGB that takes `extra` more channels."""
    wider = copy.deepcopy(conv)
    wider.in_channels += extra
    wider.weight = nn.Parameter(inflate_filters(conv.weight.detach(), extra))
    return wider


def inflate_filters(weight: torch.Tensor, extra: int) -> torch.Tensor:
    """Filters of RGB, `(N, 3, ...)`, with `extra` more channels.

    Each new one is the mean over the RGB filters: the cross-modality initialisation of Temporal
    Segment Networks (Wang et al., arXiv:1608.00859, section 3.2). The RGB filters stay as they are.
    """
    return torch.cat([weight, *[weight.mean(1, keepdim=True)] * extra], 1)
