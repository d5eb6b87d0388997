"""Spatial crops of a clip, whose answers are averaged at test time."""

import torch
from torchvision.transforms.v2 import functional as tv

from motion import NONE

SHARE = 0.875
"""of the picture's sides that a crop shows"""

# Where a crop begins: shares of what is left over, from the top and from the left.
_PLACES = {
    1: (),
    3: ((0.5, 0.0), (0.5, 0.5), (0.5, 1.0)),
    5: ((0.5, 0.5), (0.0, 0.0), (0.0, 1.0), (1.0, 0.0), (1.0, 1.0)),
}
COUNTS = tuple(_PLACES)


def spatial_crops(clip: torch.Tensor, count: int) -> torch.Tensor:
    """`(T, C, H, W)` uint8 to `(count, T, C, H, W)`: each crop enlarged to the clip's own size.

    Args:
        count: 1, the whole picture; 3, left, middle and right; 5, the middle and the corners.
    """
    if count not in _PLACES:
        raise ValueError(f"crops must be one of {COUNTS}, not {count}")
    if count == 1:
        return clip.unsqueeze(0)
    height, width = clip.shape[-2:]
    size = [round(height * SHARE), round(width * SHARE)]
    crops = []
    for down, right in _PLACES[count]:
        top, left = round(down * (height - size[0])), round(right * (width - size[1]))
        crop = clip[..., top : top + size[0], left : left + size[1]]
        crops.append(tv.resize(crop, [height, width], antialias=False))
    crops = torch.stack(crops)  # (count, T, C, H, W)
    if clip.shape[1] > 3:  # motion is measured in shares of the side, which is shorter now
        motion = (crops[:, :, 3:].float() - NONE) / SHARE + NONE
        crops[:, :, 3:] = motion.round().clamp(NONE - 127, NONE + 127).to(torch.uint8)
    return crops
