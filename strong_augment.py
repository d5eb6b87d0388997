"""RandAugment and random erasing: strong changes against overfitting, one draw a clip.

Cubuk et al., "RandAugment", 2019, arXiv:1909.13719; Zhong et al., "Random Erasing Data
Augmentation", 2017, arXiv:1708.04896.
"""

import torch
from torchvision.transforms import InterpolationMode, v2

from normalize import IMAGENET_MEAN_STD


class StrongAugment:
    """RandAugment, then random erasing, on a whole clip `(T, 3, H, W)` uint8.

    All frames share the operations, their directions and the erased box. Three of RandAugment's
    fourteen operations measure the picture, and torchvision's do so frame by frame: AutoContrast,
    Equalize and Contrast can flicker a little where the light changes within the clip.

    Args:
        operations: N, how many of RandAugment's operations change a clip (0: none).
        magnitude: M, their strength, 0..30.
        erasing: probability that a box is filled with ImageNet's mean colour (the paper's RE-M):
            2 to 33 % of the picture, 0.3 to 3.3 times as high as wide, the same in all frames.

    It comes before `Augment`, which then also turns and tints the box, so that the order is the
    same where `Augment` is left to a GPU. What comes in from outside is black, as there.

    Raises:
        ValueError: on a call with other than three channels: colours are changed as RGB.
    """

    def __init__(self, operations: int = 0, magnitude: int = 9, erasing: float = 0.0) -> None:
        self.operations = v2.RandAugment(
            operations, magnitude, interpolation=InterpolationMode.BILINEAR
        )
        mean_colour = [round(255 * mean) for mean in IMAGENET_MEAN_STD[0]]
        self.erase = v2.RandomErasing(erasing, value=mean_colour)

    def __call__(self, clip: torch.Tensor) -> torch.Tensor:
        if clip.shape[-3] != 3:
            raise ValueError(f"RandAugment and erasing change RGB, not {clip.shape[-3]} channels")
        return self.erase(self.operations(clip))
