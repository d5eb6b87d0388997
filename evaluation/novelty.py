"""How unlike the clips of its training a clip is: a score beside the confidence.

A model can be as sure of a clip that shows something else as of its own, or surer: see
docs/results/classification.md. So the score does not use the logits, but the features: the input of
the last layer. It is the cosine distance to the nearest mean of a class, a simple relative of the
Mahalanobis distance of Lee et al. (arXiv:1807.03888). The checkpoint holds the means of the classes
and the distances of the validation clips, with which that of another clip is compared.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch.nn import functional as F


class NoveltyReference(NamedTuple):
    """What the features of a clip are compared with."""

    means: torch.Tensor
    """`(K, num_features)` mean of the features of each class, of length 1"""
    distances: tuple[float, ...]
    """distance of each validation clip to the nearest mean"""

    @classmethod
    def of_checkpoint(cls, state: Mapping[str, Any]) -> Self | None:
        """That of a checkpoint; None if an earlier version wrote it."""
        stored = state.get("novelty")
        return cls(stored["means"], tuple(stored["distances"])) if stored else None

    def state_dict(self) -> dict[str, Any]:
        """As a checkpoint holds it."""
        return {"means": self.means, "distances": list(self.distances)}

    def novelty(self, distance: np.ndarray) -> np.ndarray:
        """How unusual clips are, `(N,)` from 0 to 1: the fraction of the validation clips that are
        nearer to the means.

        The clip itself is counted as one more validation clip, so that a few of them are no reason
        to call anything novel. A clip like the validation clips gets a novelty above 1 - p with
        probability p at most (a conformal p-value; Vovk et al., "Algorithmic Learning in a Random
        World", 2005).

        Args:
            distance: `(N,)`, see `distance_to_means`.
        """
        return np.searchsorted(np.sort(self.distances), distance) / (len(self.distances) + 1)


def class_means(features: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The mean of the features of each class that has a clip, `(K, num_features)`, of length 1.

    Args:
        features: `(N, num_features)`.
        labels: `(N,)`.
    """
    units = F.normalize(features, dim=1)
    means = [units[labels == label].mean(dim=0) for label in labels.unique()]
    return F.normalize(torch.stack(means), dim=1)


def distance_to_means(features: torch.Tensor, means: torch.Tensor) -> torch.Tensor:
    """The cosine distance to the nearest mean, from 0 to 2: `(..., num_features)` to `(...)`."""
    return 1 - (F.normalize(features, dim=-1) @ means.T).amax(dim=-1)
