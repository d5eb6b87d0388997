"""What an explanation is: the relevance of every frame, and of every part of it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import nn

from modeling.inference import NotFiniteError

Method = Literal["gradcam++", "rollout", "occlusion", "integrated-gradients"]

Score = Callable[[torch.Tensor], torch.Tensor]
"""from logits `(B, num_classes)` to what is explained, `(B,)`"""


@dataclass(frozen=True)
class Relevance:
    """The relevance of a batch of clips for a score of each, float32 on the CPU.

    Positive relevance speaks for the score, negative relevance against it. The numbers of two
    methods, or of two models, have no common unit.
    """

    maps: torch.Tensor
    """`(B, T, h, w)` of each cell of a grid over each frame; h and w depend on method and model"""
    frames: torch.Tensor
    """`(B, T)` of each frame"""

    def __post_init__(self) -> None:
        """Refuse numbers that no picture may be drawn from.

        Raises:
            NotFiniteError: some are not finite.
        """
        if not (self.maps.isfinite().all() and self.frames.isfinite().all()):
            raise NotFiniteError("the relevance is not finite: choose another --method")


@dataclass(frozen=True)
class ExplainedClip:
    """A clip with its explanation, as pictures and pages show it."""

    name: str
    """what the clip is called; it may name a patient"""
    frames: np.ndarray
    """`(T, H, W, 3)` uint8 RGB: the frames that the model saw"""
    times: np.ndarray
    """`(T,)` times of the frames in seconds of the clip; NaN where its frame rate is unknown"""
    maps: np.ndarray
    """`(T, h, w)` see `Relevance`"""
    relevance: np.ndarray
    """`(T,)` of the frames, see `Relevance`"""
    method: Method
    predicted: str
    """the predicted class"""
    confidence: float
    """the probability of the predicted class, calibrated"""
    explained: str
    """the class that the relevance speaks for"""
    probability: float
    """the probability of the explained class, calibrated"""
    against: str = ""
    """the class that it is compared with; empty: none"""
    label: str = ""
    """the true class; empty: unknown"""

    @property
    def correct(self) -> bool | None:
        """Whether the prediction is right; None: unknown."""
        return self.predicted == self.label if self.label else None


@contextmanager
def differentiable(model: nn.Module) -> Iterator[None]:
    """cuDNN differentiates an LSTM in training mode only; without dropout that changes nothing."""
    lstms = [module for module in model.modules() if isinstance(module, nn.RNNBase)]
    before = [(lstm.training, lstm.dropout) for lstm in lstms]
    for lstm in lstms:
        lstm.training, lstm.dropout = True, 0.0
    try:
        yield
    finally:
        for lstm, (training, dropout) in zip(lstms, before, strict=True):
            lstm.training, lstm.dropout = training, dropout
