"""CNN-LSTM: a 2D CNN computes the features of each frame, an LSTM combines them over time.

Donahue et al., "Long-term Recurrent Convolutional Networks for Visual Recognition and Description",
CVPR 2015, arXiv:1411.4389.
"""

from typing import Literal, get_args

import torch
from torch import nn
from torch.nn import functional as F

from modeling.frame_encoder import FrameEncoder

TemporalPooling = Literal["mean", "last", "max", "attention", "statistics", "root_statistics"]


class CNNLSTM(FrameEncoder):
    """Features of every frame, an LSTM over them, its outputs pooled over time, a classifier.

    Args:
        num_classes: number of classes.
        backbone, modality, fusion, spatial_pool: see `FrameEncoder`.
        lstm_hidden, lstm_layers, bidirectional: the LSTM. With 0 layers there is none, and the
            features of the frames themselves are pooled: few clips are not enough to train an LSTM
            (docs/results).
        temporal_pooling: how T outputs become one vector: their `mean`, the `last`, their `max`, a
            mean weighted by a learnt softmax (`attention`), or their `statistics`: mean, standard
            deviation and mean absolute change from frame to frame, each standardised by its mean
            and deviation over the training clips; `root_statistics`: of these the signed square
            roots, which are less skewed (the power normalisation of Perronnin et al., "Improving
            the Fisher Kernel for Large-Scale Image Classification", ECCV 2010, section 3.3).
        dropout: dropout before the classifier and between LSTM layers.
    """

    def __init__(
        self,
        num_classes: int = 7,
        backbone: str = "resnet18",
        modality: str = "rgb",
        fusion: str = "late",
        spatial_pool: int = 1,
        lstm_hidden: int = 512,
        lstm_layers: int = 1,
        bidirectional: bool = False,
        temporal_pooling: TemporalPooling = "mean",
        dropout: float = 0.0,
    ) -> None:
        super().__init__(backbone, modality, fusion, spatial_pool)
        if temporal_pooling not in get_args(TemporalPooling):
            raise ValueError(f"no temporal_pooling is called {temporal_pooling!r}")
        self.temporal_pooling = temporal_pooling
        self.lstm: nn.LSTM | None = None
        width = self.num_features
        if lstm_layers:
            self.lstm = nn.LSTM(
                width,
                lstm_hidden,
                lstm_layers,
                batch_first=True,
                dropout=dropout if lstm_layers > 1 else 0.0,
                bidirectional=bidirectional,
            )
            width = lstm_hidden * (2 if bidirectional else 1)
        self.attention = nn.Linear(width, 1) if temporal_pooling == "attention" else None
        self.standardise: Standardise | None = None
        if temporal_pooling in ("statistics", "root_statistics"):
            width *= 3
            self.standardise = Standardise(width)
        self.power_normalised = temporal_pooling == "root_statistics"
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(width, num_classes)

    def forward(self, clips: torch.Tensor) -> torch.Tensor:
        """`(B, T, C, H, W)` uint8 or float in [0, 1] to logits `(B, num_classes)`.

        It also takes the output of `frame_features`, `(B, T, num_features)`: see
        training/feature_cache.py.
        """
        return self.consensus(clips if clips.dim() == 3 else self.frame_features(clips))

    def frame_features(self, clips: torch.Tensor) -> torch.Tensor:
        """`(B, T, C, H, W)` to the features of each frame by itself, `(B, T, num_features)`."""
        return self.forward_features(clips).unflatten(0, clips.shape[:2])

    def consensus(self, features: torch.Tensor) -> torch.Tensor:
        """The features of T frames, `(B, T, num_features)`, to logits `(B, num_classes)`."""
        return self.classify(self.lstm(features)[0] if self.lstm else features)

    def classify(self, outputs: torch.Tensor) -> torch.Tensor:
        """T outputs of the LSTM (without one, of the backbone), `(B, T, width)`, to logits
        `(B, num_classes)`."""
        return self.head(self.dropout(self.pool(outputs)))

    @property
    def causal(self) -> bool:
        """Whether no LSTM reads backward."""
        return self.lstm is None or not self.lstm.bidirectional

    def pool(self, x: torch.Tensor) -> torch.Tensor:
        """`(B, T, width)` to one vector per clip, `(B, width)`; `(B, 3 * width)` for statistics."""
        if self.temporal_pooling == "mean":
            return x.mean(dim=1)
        if self.temporal_pooling == "max":
            return x.amax(dim=1)
        if self.attention is not None:
            return (x * self.attention(x).softmax(dim=1)).sum(dim=1)
        if self.standardise is not None:
            x = temporal_statistics(x)
            return self.standardise(signed_root(x) if self.power_normalised else x)
        if self.lstm and self.lstm.bidirectional:
            # The backward LSTM has seen the whole clip at frame 0, but only one frame at the last.
            forward, backward = x.chunk(2, dim=2)
            return torch.cat((forward[:, -1], backward[:, 0]), dim=1)
        return x[:, -1]

    def stages(self) -> dict[str, list[nn.Module]]:
        """The modules from stem to head."""
        head = [part for part in (self.attention, self.standardise, self.head) if part is not None]
        return self.frame_stages() | ({"lstm": [self.lstm]} if self.lstm else {}) | {"head": head}


class Standardise(nn.Module):
    """Standardises `(B, width)`: by the batch's mean and deviation in training, later by those of
    all batches.

    It is a BatchNorm without weights, with two differences: a batch of a single clip, which has no
    deviation, is standardised by the running statistics, and several processes do not wait for each
    other's statistics.
    """

    eps = 1e-5
    """added to the variance"""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(width))
        self.register_buffer("running_var", torch.ones(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        training = self.training and len(x) > 1
        return F.batch_norm(x, self.running_mean, self.running_var, training=training, eps=self.eps)

    def set_statistics(self, mean: torch.Tensor, variance: torch.Tensor) -> None:
        """Standardise by these from now on, both `(width,)`."""
        self.running_mean.copy_(mean)
        self.running_var.copy_(variance)


def temporal_statistics(x: torch.Tensor) -> torch.Tensor:
    """`(B, T, width)` to `(B, 3 * width)`: mean, standard deviation (over T, not T - 1) and mean
    absolute change from frame to frame; for a single frame the last two are zero."""
    changes = x.diff(dim=1).abs()
    change = changes.mean(dim=1) if x.shape[1] > 1 else torch.zeros_like(x[:, 0])
    # The root of a variance of exactly 0 (a still clip) would have no gradient.
    deviation = (x.var(dim=1, correction=0) + 1e-8).sqrt()
    return torch.cat((x.mean(dim=1), deviation, change), dim=1)


def signed_root(x: torch.Tensor) -> torch.Tensor:
    """`sign(x) sqrt(|x|)`, of any shape. The slope at zero is infinite: values below 1e-8 in size
    are divided by 1e-4 instead."""
    return x / x.abs().clamp_min(1e-8).sqrt()
