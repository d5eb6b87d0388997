"""TSM: a 2D network that sees motion by shifting channels in time.

Lin, Gan and Han, "TSM: Temporal Shift Module for Efficient Video Understanding", ICCV 2019,
arXiv:1811.08383.
"""

from typing import Literal

import torch
from torch import nn

from modeling.backbones import BackboneName
from modeling.frame_encoder import FrameModel, Fusion
from video.motion import Inputs


def temporal_shift(x: torch.Tensor, n_frames: int, shift_div: int = 8) -> torch.Tensor:
    """Shift 1/shift_div of the channels from the next frame and as many from the previous one.

    `(B * T, C, H, W)` to the same shape. The first C // shift_div channels of frame t become those
    of frame t + 1, the second C // shift_div those of frame t - 1, the others stay; where there is
    no such frame they are zero (section 3.2 of the paper; bidirectional). Frames never cross from
    one clip into another.
    """
    fold = x.shape[1] // shift_div
    x = x.unflatten(0, (-1, n_frames))  # (B, T, C, H, W)
    out = torch.zeros_like(x)  # keeps the memory format, which concatenation would lose
    out[:, :-1, :fold] = x[:, 1:, :fold]
    out[:, 1:, fold : 2 * fold] = x[:, :-1, fold : 2 * fold]
    out[:, :, 2 * fold :] = x[:, :, 2 * fold :]
    return out.flatten(0, 1)  # (B * T, C, H, W)


def causal_shift(
    x: torch.Tensor, n_frames: int, shift_div: int = 8, before: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Shift 1/shift_div of the channels from the previous frame, none from the next.

    `(B * T, C, H, W)` to the same shape: the first C // shift_div channels of frame t become those
    of frame t - 1 (the paper's section 4, online models), those of the first frame `before`.

    Args:
        before: `(B, C // shift_div, H, W)`, those channels of the frame before the first one; None:
            there is none, they are zero.

    Returns:
        The shifted features, and `before` for the frames that come next.
    """
    fold = x.shape[1] // shift_div
    x = x.unflatten(0, (-1, n_frames))  # (B, T, C, H, W)
    out = x.clone()
    out[:, 1:, :fold] = x[:, :-1, :fold]
    out[:, 0, :fold] = 0 if before is None else before
    # A clone: a view would hold on to the whole of x.
    return out.flatten(0, 1), x[:, -1, :fold].clone()


class TSM(FrameModel):
    """A ResNet-18, or another backbone, over the frames, temporal shifts inside, logits averaged
    over time.

    Args:
        backbone, inputs, fusion: see `FrameModel`.
        shift_place: `blockres` shifts the input of the first convolution inside every residual
            branch and leaves the identity path alone, so that no frame loses what it saw itself
            (the paper's released recipe); `stage` shifts the features before each of the layers,
            as the project that this one follows did.
        shift_div: 1/shift_div of the channels shift each way.
        shift_mode: `bidirectional`, or `causal`: from the past only, so that the model can follow a
            stream (see stream.py).
        carry_past: causal, in training: probability that a clip's past is not nothing but the end
            of another clip of the batch. In a stream there always is a past: a model that has only
            seen clips begin with nothing before them makes poor use of it (RESULTS.md).
        dropout: before the classifier.
    """

    def __init__(
        self,
        num_classes: int = 7,
        backbone: BackboneName = "resnet18",
        inputs: Inputs = "rgb",
        fusion: Fusion = "late",
        shift_place: Literal["blockres", "stage"] = "blockres",
        shift_div: int = 8,
        shift_mode: Literal["bidirectional", "causal"] = "bidirectional",
        carry_past: float = 0.5,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(backbone, inputs, fusion)
        if shift_mode not in ("bidirectional", "causal"):
            raise ValueError(f"shift_mode must be bidirectional or causal, not {shift_mode!r}")
        if shift_place not in ("blockres", "stage"):
            raise ValueError(f"shift_place must be blockres or stage, not {shift_place!r}")
        self.shift_place = shift_place
        self.shift_div = shift_div
        self.shift_mode = shift_mode
        self.carry_past = carry_past
        self.head = nn.Linear(self.width, num_classes)
        self.dropout = nn.Dropout(dropout)

    def forward(self, clips: torch.Tensor) -> torch.Tensor:
        """`(B, T, C, H, W)` uint8 or float in [0, 1] to logits `(B, num_classes)`."""
        return self.over_window(self.per_frame(clips)[0])

    def per_frame(
        self, clips: torch.Tensor, memory: list[torch.Tensor] | None = None
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """`(B, T, C, H, W)` to each frame's logits, `(B, T, num_classes)`.

        Args:
            memory: of a causal model, what this method returned for the frames just before.
        """
        n_frames = clips.shape[1]
        kept: list[torch.Tensor] = []  # by the shifts, in their order
        carried = None
        if self.training and self.causal and not memory:
            carried = torch.rand(len(clips), 1, 1, 1, device=clips.device) < self.carry_past

        def shift(x: torch.Tensor) -> torch.Tensor:
            if self.shift_mode == "bidirectional":
                return temporal_shift(x, n_frames, self.shift_div)
            before = memory[len(kept)] if memory else None
            if carried is not None:
                ends = x[n_frames - 1 :: n_frames, : x.shape[1] // self.shift_div]  # (B, fold, ...)
                before = ends.detach().roll(1, dims=0) * carried
            x, after = causal_shift(x, n_frames, self.shift_div, before)
            kept.append(after)
            return x

        x = self.frame_features(clips, shift, self.shift_place)  # (B * T, width)
        logits = self.head(self.dropout(x))  # (B * T, num_classes)
        return logits.unflatten(0, (-1, n_frames)), kept

    def over_window(self, logits: torch.Tensor) -> torch.Tensor:
        """The logits of T frames `(B, T, num_classes)` as one answer, `(B, num_classes)`."""
        return logits.mean(dim=1)

    @property
    def causal(self) -> bool:
        """Whether no frame's logits depend on later frames."""
        return self.shift_mode == "causal"

    def stages(self) -> dict[str, list[nn.Module]]:
        """The modules from stem to head."""
        return self.frame_stages() | {"head": [self.head]}
