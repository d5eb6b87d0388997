"""A map of the test clips in two dimensions: which clips are alike to a model?

The features before the classifier are reduced by PCA, then by t-SNE (van der Maaten and Hinton,
JMLR 9, 2008). A map may mislead: t-SNE keeps neighbours together and nothing else. So the nearest
neighbours are also counted in the features themselves, where nothing was squeezed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from evaluation.predictions import Predictions
from utils.tables import write_csv

MAX_CLIPS = 2000  # t-SNE takes about ten seconds for them; more points would hide each other
_FEWEST_FOR_TSNE = 12
_COMPONENTS = 50  # of the PCA, as in the paper


@dataclass(frozen=True)
class Embedding:
    """Positions of clips in two dimensions."""

    clips: np.ndarray
    """`(M,)` indices of the clips: all, or MAX_CLIPS evenly chosen ones"""
    positions: np.ndarray
    """`(M, 2)`"""
    neighbours: np.ndarray
    """`(M,)` for each clip which of the M is nearest to it in the features (itself: unknown)"""
    method: str
    """how the positions were computed, for people"""


def embed(features: np.ndarray) -> Embedding:
    """The map of features `(N, num_features)`; the same features give the same map.

    Few clips are mapped by PCA alone, because t-SNE needs more neighbours than they have.
    """
    from sklearn.decomposition import PCA  # takes a second to import
    from sklearn.manifold import TSNE

    total, width = features.shape
    clips = np.linspace(0, total - 1, min(total, MAX_CLIPS)).round().astype(int)
    x = features[clips].astype(float)
    n, positions = len(x), np.zeros((len(x), 2))
    if not np.ptp(x, axis=0).any():  # a single clip, or the same features for all
        return Embedding(clips, positions, np.arange(n), "all clips have the same features")
    components = PCA(min(_COMPONENTS, *x.shape), random_state=0).fit_transform(x)
    if n < _FEWEST_FOR_TSNE:
        positions[:, : components.shape[1]] = components[:, :2]
        method = f"PCA of the {width} features before the classifier"
    else:
        perplexity = min(30.0, (n - 1) / 3)
        tsne = TSNE(perplexity=perplexity, init="random", random_state=0)
        if components.shape[1] > 1:
            tsne.set_params(init="pca")
        positions = tsne.fit_transform(components).astype(float)
        method = (
            f"t-SNE (perplexity {perplexity:.3g}) of {components.shape[1]} principal components of "
            f"the {width} features before the classifier"
        )
    if n < total:
        method += f", {n:,} of {total:,} clips"
    squares = (components**2).sum(axis=1)
    distances = squares[:, None] + squares - 2 * components @ components.T  # squared
    np.fill_diagonal(distances, np.inf)
    return Embedding(clips, positions, distances.argmin(axis=1), method)


def neighbour_agreement(groups: np.ndarray, neighbours: np.ndarray) -> tuple[float, float] | None:
    """How many clips have a nearest neighbour of their own group, and how many would by chance.

    Args:
        groups: `(M,)` numbers; below 0: unknown, such clips are not counted.
        neighbours: see `Embedding`.

    Returns:
        Two fractions of the clips whose group and whose neighbour's group are known; None if there
        is no such clip, or fewer than two groups.
    """
    known = (groups >= 0) & (groups[neighbours] >= 0) & (neighbours != np.arange(len(groups)))
    sizes = np.bincount(groups[groups >= 0])
    if not known.any() or (sizes > 0).sum() < 2:
        return None
    n = sizes.sum()
    chance = float((sizes * (sizes - 1)).sum() / (n * (n - 1)))
    return float((groups == groups[neighbours])[known].mean()), chance


def patient_numbers(predictions: Predictions) -> np.ndarray:
    """`(N,)` the number of each clip's patient, from 1 as in the report; -1: unknown."""
    number = {name: i for i, name in enumerate(predictions.numbered_patients, 1)}
    return np.array([number.get(name, -1) for name in predictions.groups("patient")])


def write_embedding(
    path: Path, predictions: Predictions, embedding: Embedding, classes: Sequence[str]
) -> None:
    """Write the positions, one row per clip, without names of patients or files.

    `clip` is the number of the clip's row in predictions.csv, from 0.
    """
    patients = patient_numbers(predictions)
    table: list[list[object]] = [["clip", "x", "y", "label", "prediction", "patient"]]
    for clip, (x, y) in zip(embedding.clips.tolist(), embedding.positions, strict=True):
        names = [classes[predictions.labels[clip]], classes[predictions.y_pred[clip]]]
        patient = patients[clip] if patients[clip] > 0 else ""
        table.append([clip, f"{x:.6g}", f"{y:.6g}", *names, patient])
    write_csv(path, table)
