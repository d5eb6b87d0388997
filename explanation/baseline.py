"""What a deleted part of a clip is replaced by: the blurred still picture of the clip."""

import math

import torch
from torch.nn import functional as F


def blurred_still(clips: torch.Tensor) -> torch.Tensor:
    """The mean of a clip's frames, blurred, as every frame of a clip without motion.

    It has the colours and the light of the clip, but no movement and no details. Black in place of
    what is deleted would be a new object with sharp edges, and in endoscopy a meaningful one: the
    border of the view and a covered lens are black (Sturmfels, Lundberg and Lee, "Visualizing the
    Impact of Feature Attribution Baselines", Distill, 2020, compare baselines; Fong and Vedaldi,
    ICCV 2017, arXiv:1704.03296, delete by blurring).

    The blur is a Gaussian whose standard deviation is an eighth of the shorter side, cut off at
    three deviations; beyond the border the picture is reflected.

    Args:
        clips: `(B, T, C, H, W)` uint8, or float in [0, 1].

    Returns:
        `(B, T, C, H, W)` float in [0, 1], float32 for uint8 and otherwise of the dtype of the
        clips. All frames share one memory, so do not write into it.
    """
    frames = clips.shape[1]
    still = clips.float() / 255 if clips.dtype == torch.uint8 else clips
    still = still.mean(dim=1)  # (B, C, H, W)
    height, width = still.shape[-2:]
    kernel = _gaussian(min(height, width) / 8, min(height, width) - 1).to(still)
    reach, channels = len(kernel) // 2, still.shape[1]
    kernel = kernel.expand(channels, 1, 1, -1)  # (C, 1, 1, k), the same for each channel
    still = F.pad(still, [reach] * 4, mode="reflect")
    still = F.conv2d(still, kernel, groups=channels)
    still = F.conv2d(still, kernel.transpose(2, 3), groups=channels)
    return still.clamp(0, 1).unsqueeze(1).expand(-1, frames, -1, -1, -1)  # rounding exceeds 1


def _gaussian(sigma: float, max_reach: int) -> torch.Tensor:
    """`(2 r + 1,)` weights that sum to 1, float64; r is three deviations, at most `max_reach`,
    because a picture cannot be reflected further than itself."""
    reach = min(math.ceil(3 * sigma), max_reach)
    distances = torch.arange(-reach, reach + 1, dtype=torch.float64)
    weights = torch.exp(-0.5 * (distances / sigma) ** 2)
    return weights / weights.sum()
