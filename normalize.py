"""Raw pixels in, normalised floats out: the first layer of every model."""

import torch
from torch import nn

IMAGENET_MEAN_STD = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF_MEAN_STD = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
KINETICS_MEAN_STD = ((0.43216, 0.394666, 0.37645), (0.22803, 0.22145, 0.216989))


class Normalize(nn.Module):
    """`(B, T, C, H, W)` uint8, or float in [0, 1], to float with the pretraining's mean and std.

    It belongs to the model because the pretrained weights decide mean and std, and so that a data
    set, a camera and an exported graph all feed raw pixels. One multiply and one add, no matter
    which dtype comes in; float dtypes are kept unless `dtype` is set. Not part of the checkpoint.
    """

    def __init__(self, mean_std: tuple[tuple[float, ...], tuple[float, ...]]) -> None:
        super().__init__()
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in mean_std)  # (C, 1, 1)
        self.register_buffer("scale", 1 / std, persistent=False)
        self.register_buffer("shift", -mean / std, persistent=False)
        self.dtype: torch.dtype | None = None
        """what comes out, whatever comes in (None: fp32 of uint8, other types as they are)"""

    def forward(self, clips: torch.Tensor) -> torch.Tensor:
        if clips.dtype == torch.uint8:
            x = clips * (self.scale / 255) + self.shift
        else:
            x = clips * self.scale.to(clips.dtype) + self.shift.to(clips.dtype)
        return x if self.dtype is None else x.to(self.dtype)
