"""What a clip is compared with, and what stands where a part of it is taken away.

A picture that stands still has no motion: channels that hold measured motion (video/motion.py) hold
none in it.
"""

from typing import Literal

import torch
from torch.nn import functional as F

from video.motion import ZERO

SIGMA = 1 / 8
"""standard deviation of the blur as a fraction of the side"""


Reference = Literal["still", "blurred"]
"""what a clip is compared with, see `still` and `blurred_still`"""


def reference_clips(clips: torch.Tensor, reference: Reference) -> torch.Tensor:
    """What clips are compared with, of the same shape, float in [0, 1], all frames of a clip alike.

    Args:
        clips: `(B, T, C, H, W)` uint8, or float in [0, 1].
    """
    return blurred_still(clips) if reference == "blurred" or clips.shape[1] == 1 else still(clips)


def still(clips: torch.Tensor) -> torch.Tensor:
    """The median of a clip's frames: the same scene, standing still. What comes and goes, or moves,
    is away; what stands still in all frames stays.

    It is sharp on purpose: a blurred picture looks like smoke or fog to a model, which are content.

    Args:
        clips: `(B, T, C, H, W)` uint8, or float in [0, 1].

    Returns:
        The same shape, float in [0, 1], all frames of a clip alike.
    """
    pixels = clips / 255 if clips.dtype == torch.uint8 else clips.float()
    median = pixels.median(dim=1).values  # (B, C, H, W)
    return _standing(median).unsqueeze(1).expand_as(pixels).contiguous()


def blurred_still(clips: torch.Tensor) -> torch.Tensor:
    """The mean of a clip's frames, blurred: its light and colours without details or motion. What
    stands still in all frames is away too.

    Args:
        clips: `(B, T, C, H, W)` uint8, or float in [0, 1].

    Returns:
        The same shape, float in [0, 1], all frames of a clip alike.
    """
    pixels = clips / 255 if clips.dtype == torch.uint8 else clips.float()
    mean = pixels.mean(dim=1)  # (B, C, H, W)
    return _standing(blur(mean, SIGMA)).unsqueeze(1).expand_as(pixels).contiguous()


def _standing(images: torch.Tensor) -> torch.Tensor:
    """Images `(B, C, H, W)` in [0, 1] without motion in the channels after the colours."""
    motion = torch.full_like(images[:, 3:], ZERO / 255)
    return torch.cat((images[:, :3], motion), dim=1)


def blur(images: torch.Tensor, sigma: float) -> torch.Tensor:
    """Images `(N, C, H, W)`, blurred by a Gaussian, with reflected borders.

    Args:
        sigma: standard deviation as a fraction of each side.
    """
    for axis in (2, 3):
        size = images.shape[axis]
        radius = min(size - 1, round(3 * sigma * size))  # a reflection is shorter than the side
        offsets = torch.arange(-radius, radius + 1, device=images.device, dtype=images.dtype)
        kernel = torch.exp(-0.5 * (offsets / max(sigma * size, 1e-6)) ** 2)
        kernel = (kernel / kernel.sum()).view(1, 1, -1)
        lines = images.movedim(axis, 3)
        padded = F.pad(lines.flatten(0, 2).unsqueeze(1), (radius, radius), mode="reflect")
        images = F.conv1d(padded, kernel).view(lines.shape).movedim(3, axis)
    return images
