"""TSM: a 2D CNN that uses motion, because some channels are shifted in time.

Lin, Gan and Han, "TSM: Temporal Shift Module for Efficient Video Understanding", ICCV 2019,
arXiv:1811.08383.
"""

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F

from modeling.frame_encoder import FrameEncoder


def temporal_shift(x: torch.Tensor, n_frames: int, shift_div: int = 8) -> torch.Tensor:
    """Shift 1/shift_div of the channels from the next frame and as many from the previous one.

    `(B * T, C, H, W)` to the same shape. The first C // shift_div channels of frame t become those
    of frame t + 1, the second C // shift_div those of frame t - 1, and the others stay; where there
    is no such frame they are zero (section 3.2 of the paper; bidirectional). Frames never cross
    from one clip into another.
    """
    fold = x.shape[1] // shift_div
    x = x.unflatten(0, (-1, n_frames))  # (B, T, C, H, W)
    if torch.compiler.is_exporting():
        return _shift_by_slices(x, fold).flatten(0, 1)
    out = torch.zeros_like(x)  # keeps the memory format, which concatenation would lose
    out[:, :-1, :fold] = x[:, 1:, :fold]
    out[:, 1:, fold : 2 * fold] = x[:, :-1, fold : 2 * fold]
    out[:, :, 2 * fold :] = x[:, :, 2 * fold :]
    return out.flatten(0, 1)  # (B * T, C, H, W)


def _shift_by_slices(x: torch.Tensor, fold: int) -> torch.Tensor:
    """The shift of `(B, T, C, H, W)` for other runtimes, which fuse no assignments to slices.

    Zeros come from padding: in int8 a padded slice keeps the scale of the others, so that the
    convolution after the shift stays in int8.
    """
    from_next = F.pad(x[:, 1:, :fold], (0, 0, 0, 0, 0, 0, 0, 1))  # a frame of zeros at the end
    from_previous = F.pad(x[:, :-1, fold : 2 * fold], (0, 0, 0, 0, 0, 0, 1, 0))
    return torch.cat((from_next, from_previous, x[:, :, 2 * fold :]), dim=2)


def _causal_shift_by_slices(
    x: torch.Tensor, fold: int, buffer: torch.Tensor | None
) -> torch.Tensor:
    """The same for the causal shift; `buffer` is `(B, fold, H, W)`."""
    if buffer is None:
        moved = F.pad(x[:, :-1, :fold], (0, 0, 0, 0, 0, 0, 1, 0))
    elif x.shape[1] == 1:  # no empty slices: not every runtime takes them
        moved = buffer.unsqueeze(1)
    else:
        moved = torch.cat((buffer.unsqueeze(1), x[:, :-1, :fold]), dim=1)
    return torch.cat((moved, x[:, :, fold:]), dim=2)


def causal_shift(
    x: torch.Tensor, n_frames: int, shift_div: int = 8, buffer: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Shift 1/shift_div of the channels from the previous frame, none from the next.

    `(B * T, C, H, W)` to the same shape: the first C // shift_div channels of frame t become those
    of frame t - 1 (section 4 of the paper, online models); in the first frame they become `buffer`.

    Args:
        buffer: `(B, C // shift_div, H, W)`, those channels of the frame before the first one; None:
            there is no such frame, they are zero.

    Returns:
        The shifted features, and the buffer for the frames that follow.
    """
    fold = x.shape[1] // shift_div
    x = x.unflatten(0, (-1, n_frames))  # (B, T, C, H, W)
    if torch.compiler.is_exporting():
        return _causal_shift_by_slices(x, fold, buffer).flatten(0, 1), x[:, -1, :fold]
    out = x.clone()
    out[:, 1:, :fold] = x[:, :-1, :fold]
    out[:, 0, :fold] = 0 if buffer is None else buffer
    # A clone, because a view would keep all of x in memory.
    return out.flatten(0, 1), x[:, -1, :fold].clone()


@dataclass
class _ShiftContext:
    """What the shifts of one forward pass need to know."""

    n_frames: int
    buffers: list[torch.Tensor] | None = None
    """causal, at inference: the buffers of the frames before, in the order of the shifts"""
    carried: torch.Tensor | None = None
    """causal, in training: `(B, 1, 1, 1)` bool, whether a clip begins with another one's end"""
    new_buffers: list[torch.Tensor] = field(default_factory=list)


class TSM(FrameEncoder):
    """A 2D CNN with temporal shifts over the frames; their logits are averaged.

    Args:
        num_classes: number of classes.
        backbone, modality, fusion: see `FrameEncoder`.
        shift_place: `blockres` shifts the input of the first convolution of every residual branch
            and leaves the identity path alone, so that no frame loses its own content (as in the
            paper's code); `stage` shifts the input of each of the network's layers, as the project
            that this one follows did.
        shift_div: 1/shift_div of the channels are shifted each way.
        shift_mode: `bidirectional`, or `causal`: from the past only, so that the model can follow a
            stream (timeline/streaming.py).
        shift_buffer_prob: causal, in training: probability that the shift buffer of a clip holds
            the end of another clip of the batch. In a stream the buffer is never empty: a model
            that has only seen clips with empty buffers makes poor use of it (docs/results).
        dropout: dropout before the classifier.
    """

    def __init__(
        self,
        num_classes: int = 7,
        backbone: str = "resnet18",
        modality: str = "rgb",
        fusion: str = "late",
        shift_place: Literal["blockres", "stage"] = "blockres",
        shift_div: int = 8,
        shift_mode: Literal["bidirectional", "causal"] = "bidirectional",
        shift_buffer_prob: float = 0.5,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(backbone, modality, fusion)
        if shift_mode not in ("bidirectional", "causal"):
            raise ValueError(f"shift_mode must be bidirectional or causal, not {shift_mode!r}")
        if shift_place not in ("blockres", "stage"):
            raise ValueError(f"shift_place must be blockres or stage, not {shift_place!r}")
        self.shift_div = shift_div
        self.shift_mode = shift_mode
        self.shift_buffer_prob = shift_buffer_prob
        self.head = nn.Linear(self.num_features, num_classes)
        self.dropout = nn.Dropout(dropout)
        self._context = _ShiftContext(n_frames=1)
        for net in self.backbones():
            is_blockres = shift_place == "blockres"
            for module in net.residual_branches() if is_blockres else net.layer_inputs():
                module.register_forward_pre_hook(self._shift)

    def _shift(self, module: nn.Module, inputs: tuple[torch.Tensor]) -> torch.Tensor:
        """Forward pre-hook: shift the input of a module."""
        (x,), context = inputs, self._context
        if self.shift_mode == "bidirectional":
            return temporal_shift(x, context.n_frames, self.shift_div)
        buffer = context.buffers[len(context.new_buffers)] if context.buffers else None
        if context.carried is not None:
            # (B, fold, H, W): the last frame of each clip; roll passes it to the next clip
            ends = x[context.n_frames - 1 :: context.n_frames, : x.shape[1] // self.shift_div]
            buffer = ends.detach().roll(1, dims=0) * context.carried
        x, new_buffer = causal_shift(x, context.n_frames, self.shift_div, buffer)
        if not self.training:
            context.new_buffers.append(new_buffer)
        return x

    def forward(self, clips: torch.Tensor) -> torch.Tensor:
        """`(B, T, C, H, W)` uint8 or float in [0, 1] to logits `(B, num_classes)`."""
        return self.consensus(self.frame_logits(clips)[0])

    def frame_logits(
        self, clips: torch.Tensor, buffers: list[torch.Tensor] | None = None
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """`(B, T, C, H, W)` to the logits of each frame, `(B, T, num_classes)`, and shift buffers.

        Args:
            buffers: for a causal model, what this method returned for the frames just before.
        """
        n_frames = clips.shape[1]
        carried = None
        if self.training and self.causal and not buffers:
            carried = torch.rand(len(clips), 1, 1, 1, device=clips.device) < self.shift_buffer_prob
        # Kept after this call: with gradient checkpointing the backward pass shifts once more.
        self._context = context = _ShiftContext(n_frames, buffers, carried)
        x = self.forward_features(clips)  # (B * T, num_features)
        logits = self.head(self.dropout(x))  # (B * T, num_classes)
        new_buffers, context.buffers, context.new_buffers = context.new_buffers, None, []
        return logits.unflatten(0, (-1, n_frames)), new_buffers

    def consensus(self, logits: torch.Tensor) -> torch.Tensor:
        """The logits of T frames, `(B, T, num_classes)`, as those of a clip, `(B, num_classes)`."""
        return logits.mean(dim=1)

    @property
    def causal(self) -> bool:
        """Whether the logits of a frame do not depend on later frames."""
        return self.shift_mode == "causal"

    def stages(self) -> dict[str, list[nn.Module]]:
        """The modules from stem to head."""
        return self.frame_stages() | {"head": [self.head]}
