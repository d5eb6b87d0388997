"""Temporal order: in which order three segments of a clip are shown, and forward or backward.

Misra et al., "Shuffle and Learn", ECCV 2016, arXiv:1603.08561, and Xu et al., "Self-Supervised
Spatiotemporal Learning via Video Clip Order Prediction", CVPR 2019; the arrow of time is that of
Wei et al., CVPR 2018. What would give the answer away without looking at the motion is avoided:

- the segments are equally long, so that the cuts between them are always at the same places;
- there is a gap between them: neighbouring frames would fit each other like pieces of a puzzle;
- one crop, flip and colour for all frames of a clip;
- clips with black frames are left out (pretraining/clips.py), and a clip of which a segment does
  not move is left out of the loss and told: nobody could say its order.
"""

from collections.abc import Sequence
from itertools import permutations
from typing import Any

import torch
from torch.nn import functional as F

from clips.manifest import ClipRow
from pretraining.clips import CropFlip, PretrainingClips
from video.container import ClipError

ORDER_MODELS = ("tsm_resnet", "cnnlstm", "r2plus1d")
"""the models that it is for: those that take clips of any length"""

SEGMENTS = 3
ORDERS = tuple(permutations(range(SEGMENTS)))
CLASSES = 2 * len(ORDERS)
"""each order of the segments, forward or backward; guessing is right once in 12 times"""

MIN_MOTION = 0.25
"""mean change of a pixel from frame to frame, in grey levels, below which a segment stands still"""


class SegmentOrder(PretrainingClips):
    """Clips of three segments in a random order: `((T, C, H, W) uint8, number of the class)`.

    Args:
        n_frames: T of what the model sees, a multiple of 3.
        transform: a `CropFlip`.
    """

    def __init__(
        self, rows: Sequence[ClipRow], n_frames: int, sampling: Any, transform: CropFlip
    ) -> None:
        self.length = n_frames // SEGMENTS
        self.gap = max(1, self.length // 2)
        frames = SEGMENTS * self.length + (SEGMENTS - 1) * self.gap
        super().__init__(rows, frames, sampling, transform)

    def _item(self, index: int) -> tuple:
        clip, _ = super()._item(index)
        segments = split_segments(clip, self.length, self.gap)  # (3, L, C, H, W)
        if self.length > 1:
            motion = segments.float().diff(dim=1).abs().mean(dim=(1, 2, 3, 4))
        else:
            motion = segments[:, 0].float().diff(dim=0).abs().mean(dim=(1, 2, 3))
        if motion.min() < MIN_MOTION:
            raise ClipError(self.rows[index].path, "a part of it does not move: no order to learn")
        number = int(torch.randint(CLASSES, ()))
        return arrange(segments, number), number


def split_segments(clip: torch.Tensor, length: int, gap: int) -> torch.Tensor:
    """`(T, ...)` to three segments with `gap` frames between them, `(3, length, ...)`."""
    return torch.stack([clip[k * (length + gap) :][:length] for k in range(SEGMENTS)])


def arrange(segments: torch.Tensor, number: int) -> torch.Tensor:
    """The segments in the order of a class, `(3, L, ...)` to `(3 * L, ...)`.

    Odd classes show each segment backward.
    """
    order, backward = ORDERS[number // 2], number % 2
    shown = segments[list(order)]
    return (shown.flip(1) if backward else shown).flatten(0, 1)


def order_loss(logits: torch.Tensor, numbers: torch.Tensor, _: int) -> torch.Tensor:
    """`(B, 12)` and `(B,)` to the cross entropy of each clip, `(B,)`."""
    return F.cross_entropy(logits, numbers, reduction="none")
