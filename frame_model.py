"""What TSM and CNN-LSTM share: a network that looks at each frame, and perhaps at its motion."""

from typing import Any, Literal

import torch
from torch import nn

from backbones import BackboneName, Frames, Shift, build_backbone
from motion import (
    Inputs,
    channels,
    decode_motion,
    global_motion,
    inflate_first_conv,
    motion_of,
    temporal_gradients,
)
from normalize import Normalize

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
