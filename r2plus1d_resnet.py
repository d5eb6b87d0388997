"""R(2+1)D-18: 3D convolutions split into space and time.

Tran et al., "A Closer Look at Spatiotemporal Convolutions for Action Recognition", CVPR 2018,
arXiv:1711.11248.
"""

from typing import Any

import torch
from torch import nn

from modeling.layers import KINETICS_MEAN_STD, LAYERS, Normalize, checkpointed


class R2Plus1DResNet18(nn.Module):
    """torchvision's R(2+1)D-18 with a new classifier.

    Its Kinetics-400 weights were trained on 16 frames of 112 pixels, normalised with the data set's
    own mean and std.
    """

    def __init__(self, num_classes: int = 7, dropout: float = 0.0) -> None:
        super().__init__()
        from torchvision.models.video import r2plus1d_18  # takes seconds to import

        self.normalize = Normalize(KINETICS_MEAN_STD)
        self.backbone = r2plus1d_18(weights=None)
        self.head = nn.Linear(self.backbone.fc.in_features, num_classes)
        self.backbone.fc = nn.Identity()
        self.dropout = nn.Dropout(dropout)

    @property
    def torchvision_weights(self) -> Any:
        """torchvision's enum of pretrained weights."""
        from torchvision.models.video import R2Plus1D_18_Weights

        return R2Plus1D_18_Weights

    def forward(self, clips: torch.Tensor) -> torch.Tensor:
        """`(B, T, C, H, W)` uint8 or float in [0, 1] to logits `(B, num_classes)`."""
        x = self.normalize(clips).transpose(1, 2)  # (B, T, C, H, W) -> (B, C, T, H, W)
        for name in ("stem", *LAYERS):
            layer = getattr(self.backbone, name)
            x = checkpointed([layer], layer, x)
        x = self.backbone.avgpool(x).flatten(1)  # (B, 512)
        return self.head(self.dropout(x))  # (B, num_classes)

    def stages(self) -> dict[str, list[nn.Module]]:
        """The modules from stem to head."""
        layers = {name: [getattr(self.backbone, name)] for name in LAYERS}
        return {"stem": [self.backbone.stem]} | layers | {"head": [self.head]}
