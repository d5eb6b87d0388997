"""Motion beside the picture: what the channels after R, G and B mean, and the maths of them.

A clip with motion is `(T, 5, H, W)` uint8: RGB, then how far the picture's content moved, to the
right and down, since the frame before, in shares of the picture's width and height. 128 is no
motion; 128 +- 127 is 5 % of the side (`RANGE`) or more: faster motion is clamped. The frame before
is the one before it in the file, not in the clip: a frame's motion does not depend on which other
frames were sampled. The first frame of a file has none.

Motion is measured on a coarse grid over the whole picture, a cell for every `CELL` x `CELL` pixels
of the clip, and stored as such a field, `(T, 2, h, w)` uint8; `join_motion` enlarges it. Where it
comes from: optical_flow.py, motion_vectors.py.
"""

import copy
from typing import Literal, TypeVar

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

Motion = Literal["gradients", "flow", "vectors"]
Inputs = Literal["rgb", Motion, "rgb+gradients", "rgb+flow", "rgb+vectors"]
Brought = Literal["rgb", "rgb+flow", "rgb+vectors"]
NONE = 128
RANGE = 0.05
CELL = 4

Convolution = TypeVar("Convolution", nn.Conv2d, nn.Conv3d)


def motion_of(inputs: Inputs) -> Motion | None:
    """Which motion a model is shown."""
    return None if inputs == "rgb" else inputs.removeprefix("rgb+")


def brought(inputs: Inputs) -> Brought:
    """What a data set brings for it: gradients are worked out from RGB in the model, and measured
    motion comes beside the RGB, wanted or not."""
    motion = motion_of(inputs)
    return f"rgb+{motion}" if motion in ("flow", "vectors") else "rgb"


def channels(inputs: Inputs) -> int:
    """C of the clips that a data set gives."""
    return 3 if brought(inputs) == "rgb" else 5


def grid_side(size: int) -> int:
    """Cells of a side of the field of a clip of `size` pixels."""
    return -(-size // CELL)


def encode_motion(shares: np.ndarray) -> np.ndarray:
    """Motion in shares of the side as uint8 codes."""
    codes = np.rint(NONE + np.asarray(shares) * (127 / RANGE))
    return codes.clip(NONE - 127, NONE + 127).astype(np.uint8)


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
