"""CNN-LSTM: ResNet-18 sees each frame, an LSTM remembers.

Donahue et al., "Long-term Recurrent Convolutional Networks for Visual Recognition and Description",
CVPR 2015, arXiv:1411.4389.
"""

from typing import Literal

import torch
from torch import nn
from torchvision.models import ResNet18_Weights, resnet18

from normalize import IMAGENET_MEAN_STD, Normalize
from tsm_resnet import resnet_features, resnet_stages


class CNNLSTM(nn.Module):
    """Features of every frame, an LSTM over them, its outputs pooled over time, a classifier.

    Args:
        lstm_hidden, lstm_layers, bidirectional: the LSTM.
        temporal_pooling: how T outputs become one: their `mean`, the `last`, their `max`, or a mean
            weighted by a learnt softmax (`attention`).
        dropout: before the classifier and between LSTM layers.
    """

    torchvision_weights = ResNet18_Weights

    def __init__(
        self,
        num_classes: int = 7,
        lstm_hidden: int = 512,
        lstm_layers: int = 1,
        bidirectional: bool = False,
        temporal_pooling: Literal["mean", "last", "max", "attention"] = "mean",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if temporal_pooling not in ("mean", "last", "max", "attention"):
            raise ValueError(f"no temporal_pooling is called {temporal_pooling!r}")
        self.temporal_pooling = temporal_pooling
        self.normalize = Normalize(IMAGENET_MEAN_STD)
        self.backbone = resnet18(weights=None)
        features = self.backbone.fc.in_features
        self.backbone.fc = nn.Identity()
        self.lstm = nn.LSTM(
            features,
            lstm_hidden,
            lstm_layers,
            batch_first=True,
            dropout=dropout if lstm_layers > 1 else 0.0,
            bidirectional=bidirectional,
        )
        width = lstm_hidden * (2 if bidirectional else 1)
        self.attention = nn.Linear(width, 1) if temporal_pooling == "attention" else None
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(width, num_classes)

    def forward(self, clips: torch.Tensor) -> torch.Tensor:
        """`(B, T, C, H, W)` uint8 or float in [0, 1] to logits `(B, num_classes)`."""
        return self.over_window(self.per_frame(clips))

    def per_frame(self, clips: torch.Tensor) -> torch.Tensor:
        """`(B, T, C, H, W)` to each frame's features, `(B, T, 512)`: no other frame counts."""
        x = self.normalize(clips).flatten(0, 1)  # (B * T, C, H, W)
        return resnet_features(self.backbone, x).unflatten(0, clips.shape[:2])

    def over_window(self, features: torch.Tensor) -> torch.Tensor:
        """The features of T frames `(B, T, 512)` to logits `(B, num_classes)`."""
        return self.conclude(self.lstm(features)[0])

    def conclude(self, outputs: torch.Tensor) -> torch.Tensor:
        """T outputs of the LSTM `(B, T, width)` to logits `(B, num_classes)`."""
        return self.head(self.dropout(self.pool(outputs)))

    @property
    def causal(self) -> bool:
        """Whether the LSTM reads forward only."""
        return not self.lstm.bidirectional

    def pool(self, x: torch.Tensor) -> torch.Tensor:
        """The LSTM's outputs `(B, T, width)` as one vector a clip, `(B, width)`."""
        if self.temporal_pooling == "mean":
            return x.mean(dim=1)
        if self.temporal_pooling == "max":
            return x.amax(dim=1)
        if self.attention is not None:
            return (x * self.attention(x).softmax(dim=1)).sum(dim=1)
        if self.lstm.bidirectional:
            # The backward LSTM has seen the whole clip at frame 0; at the last, one frame only.
            forward, backward = x.chunk(2, dim=2)
            return torch.cat((forward[:, -1], backward[:, 0]), dim=1)
        return x[:, -1]

    def stages(self) -> dict[str, list[nn.Module]]:
        """The modules from stem to head."""
        head = [self.head] if self.attention is None else [self.attention, self.head]
        return resnet_stages(self.backbone) | {"lstm": [self.lstm], "head": head}
