"""Parity: whether an exported network computes what the trained model computes."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from deployment.step import run_step
from modeling.engines import Engine
from modeling.features import per_clip, recorded_features
from modeling.inference import require_finite
from utils.errors import UserError

TOLERANCE = 1e-4
"""largest difference of a logit"""

FEATURE_TOLERANCE = 1e-2
"""the same of a feature, as a fraction of the largest one where that is above 1. Features serve
novelty alone, and signed roots (`--recipe laptop`) enlarge the rounding of values near 0"""

BATCH_SIZES = (1, 2, 5)


class Parity(NamedTuple):
    """The largest differences from the trained model."""

    clips: int = 0
    logits: float = 0.0
    features: float = 0.0
    other_classes: int = 0
    """clips, or frames of streams, for which another class has the largest logit"""

    def add(self, reference: torch.Tensor, logits: torch.Tensor, features: float = 0.0) -> "Parity":
        """With the logits of more clips, `(B, num_classes)`, in double precision.

        Raises:
            NotFiniteError: a logit is not finite.
        """
        difference = (require_finite(reference) - require_finite(logits)).abs().max().item()
        other = (reference.argmax(dim=1) != logits.argmax(dim=1)).sum().item()
        return Parity(
            self.clips + len(logits),
            max(self.logits, difference),
            max(self.features, features),
            self.other_classes + int(other),
        )

    def require(self, what: str, unit: str = "clips") -> None:
        """Raise a UserError unless the network, called `what`, computes the same as the model."""
        same = self.logits <= TOLERANCE and self.features <= FEATURE_TOLERANCE
        if self.clips and same and not self.other_classes:
            return
        raise UserError(
            f"{what} does not compute what the model does: on {self.clips} {unit} its logits "
            f"differ by up to {self.logits:.2g} (allowed: {TOLERANCE:g}), its features by "
            f"{self.features:.2g} ({FEATURE_TOLERANCE:g}), and {self.other_classes} {unit} get "
            "another class: nothing was written; try another --format"
        )


@torch.inference_mode()
def compare(model: nn.Module, engine: nn.Module, batches: Iterable[torch.Tensor]) -> Parity:
    """Compare an engine with the trained model itself, in eager fp32 on the CPU.

    Args:
        model: as it was trained, not the copy whose BatchNorms are folded.
        batches: clips `(B, T, C, H, W)`, uint8.

    Raises:
        NotFiniteError: a logit or a feature of one of them is not finite.
    """
    parity = Parity()
    for clips in batches:
        outputs = []
        for network in (model, engine):
            with recorded_features(network) as newest:
                logits = network(clips).double()
            outputs.append((logits, require_finite(per_clip(newest[0], len(clips)))))
        (expected, expected_features), (logits, features) = outputs
        size = expected_features.abs().max().clamp(min=1)
        difference = ((expected_features - features).abs().max() / size).item()
        parity = parity.add(expected, logits, difference)
    return parity


@torch.inference_mode()
def compare_step(
    predict: Callable[[torch.Tensor], torch.Tensor],
    step: Engine,
    memory: dict[str, np.ndarray],
    frames: Sequence[torch.Tensor],
    streams: int,
) -> Parity:
    """Compare the network of one frame with what predict.py does, frame after frame.

    Only probabilities are known of the latter, so the differences are those of log probabilities.

    Args:
        predict: frames `(S, C, H, W)` to probabilities; of `timeline.streaming.Streamer`.
        memory: zeros for one stream.
        frames: each `(C, H, W)`, uint8; each stream begins one frame later than the one before.
        streams: S.

    Raises:
        NotFiniteError: a logit is not finite.
    """
    parity = Parity()
    memory = {name: np.repeat(value, streams, axis=0) for name, value in memory.items()}
    for number in range(len(frames) - streams + 1):
        batch = torch.stack(list(frames[number : number + streams]))
        logits, memory = run_step(step, batch, memory)
        parity = parity.add(predict(batch).log(), logits.double().log_softmax(dim=1))
    return parity


def in_batches(
    clips: Iterable[torch.Tensor], sizes: tuple[int, ...] = BATCH_SIZES
) -> Iterator[torch.Tensor]:
    """Clips `(T, C, H, W)` as batches whose sizes change from one to the next."""
    batch: list[torch.Tensor] = []
    number = 0
    for clip in clips:
        batch.append(clip)
        if len(batch) == sizes[number % len(sizes)]:
            yield torch.stack(batch)
            batch, number = [], number + 1
    if batch:
        yield torch.stack(batch)
