"""How well scores of novelty tell the test clips of a run from clips of another kind.

    python -m benchmarks.novelty RUN /data/other              a folder of videos, or a manifest
    python -m benchmarks.novelty RUN a b c --output runs/novelty

The scores: that of evaluation/novelty.py (cosine distance to the nearest class mean), energy (Liu
et al., arXiv:2010.03759), 1 - the highest softmax probability (Hendrycks and Gimpel,
arXiv:1610.02136), the Mahalanobis distance to the nearest class (Lee et al., arXiv:1807.03888) and
the distance to the k-th nearest training clip (Sun et al., arXiv:2204.06507). All but energy and
softmax use the input of the last layer. AUROC is the probability that a clip of the other kind gets
a higher score than a test clip: 1 is perfect, 0.5 is chance. Its 95 % interval resamples the
patients of the test clips, then their clips, and the other clips.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import pandas as pd
import torch
import tyro
from torch import nn

from benchmarks.timing import environment, report
from checkpoint import load_checkpoint, rebuild_model
from clips.manifest import ClipRow
from config import TrainConfig, from_dict
from evaluation.novelty import class_means, distance_to_means
from modeling.features import per_clip, recorded_features
from modeling.inference import prepare_for_inference
from training.loaders import eval_loader, load_splits
from training.predict_clips import find_clips
from utils.cli import cli_main, parse
from utils.device import get_device
from utils.errors import UserError
from utils.workers import show_batches

RESAMPLES = 1000


@dataclass
class NoveltyConfig:
    """The run, and the other clips."""

    run: Annotated[str, tyro.conf.Positional]
    """run folder or checkpoint file; its training data must be there"""
    others: Annotated[tuple[str, ...], tyro.conf.Positional]
    """clips of another kind: files, folders of videos, manifests; each is compared by itself"""
    k: int = 5
    """which nearest training clip the distance is measured to"""
    num_workers: int = 0
    """processes that read clips"""
    device: str = "auto"
    """device: auto, cpu, cuda, cuda:1, mps"""
    output: str = "runs/novelty"
    """folder for the table"""


@torch.inference_mode()
def logits_and_features(
    model: nn.Module, rows: Sequence[ClipRow], config: TrainConfig, device: torch.device, name: str
) -> tuple[list[int], np.ndarray, np.ndarray]:
    """The indices of the clips that can be read, their logits `(N, num_classes)`, and the input of
    the last layer `(N, F)`, averaged over frames where it is applied to each frame."""
    model = prepare_for_inference(model, device)
    indices, logits, features = [], [], []
    for batch in show_batches(eval_loader(rows, config), name):
        if len(batch.labels):
            with recorded_features(model) as newest:
                logits.append(model(batch.clips.to(device)).cpu().double())
            features.append(per_clip(newest[0], len(batch.labels)))
            indices += batch.indices
    if not indices:
        raise UserError(f"none of the {name} clips can be read")
    return indices, torch.cat(logits).numpy(), torch.cat(features).numpy()


def novelty_scores(
    logits: np.ndarray, features: np.ndarray, known: np.ndarray, labels: np.ndarray, k: int
) -> dict[str, np.ndarray]:
    """Each score `(N,)` of clips; higher is more novel.

    Args:
        logits, features: of the clips, `(N, num_classes)` and `(N, F)`.
        known, labels: features `(M, F)` and classes `(M,)` of the training clips.
    """
    top = logits.max(axis=1)
    log_sum = top + np.log(np.exp(logits - top[:, None]).sum(axis=1))
    means = {label: known[labels == label].mean(axis=0) for label in np.unique(labels)}
    centred = known - np.stack([means[label] for label in labels])
    covariance = centred.T @ centred / len(known)
    # Fewer clips than features: without a ridge the covariance has no inverse.
    ridge = 0.01 * np.trace(covariance) / len(covariance) * np.eye(len(covariance))
    precision = np.linalg.inv(covariance + ridge)
    differences = [features - mean for mean in means.values()]
    distances = [np.einsum("nf,fg,ng->n", d, precision, d) for d in differences]
    units, known_units = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (features, known))
    to_known = np.sort(np.sqrt(np.maximum(0, 2 - 2 * units @ known_units.T)), axis=1)
    class_mean = class_means(torch.from_numpy(known), torch.from_numpy(labels))
    return {
        "cosine to class means": distance_to_means(torch.from_numpy(features), class_mean).numpy(),
        "energy": -log_sum,
        "1 - max softmax": 1 - np.exp(top - log_sum),
        "Mahalanobis": np.min(distances, axis=0),
        f"k nearest, k = {k}": to_known[:, min(k, len(known)) - 1],
    }


def auroc(ordinary: np.ndarray, novel: np.ndarray) -> float:
    """The probability that a novel clip scores higher than an ordinary one; ties count half."""
    ordered = np.sort(ordinary)
    below = np.searchsorted(ordered, novel, "left") + np.searchsorted(ordered, novel, "right")
    return float(below.mean() / (2 * len(ordinary)))


def auroc_interval(
    ordinary: np.ndarray, groups: Sequence[str | None], novel: np.ndarray
) -> tuple[float, float]:
    """The 95 % interval of `auroc` over patients and clips."""
    rng = np.random.default_rng(0)
    names = np.array([group or f"clip {i}" for i, group in enumerate(groups)])
    members = [np.flatnonzero(names == name) for name in np.unique(names)]
    values = []
    for _ in range(RESAMPLES):
        chosen = [members[i] for i in rng.integers(len(members), size=len(members))]
        picked = np.concatenate([rng.choice(clips, len(clips)) for clips in chosen])
        values.append(auroc(ordinary[picked], rng.choice(novel, len(novel))))
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


def measure(config: NoveltyConfig) -> pd.DataFrame:
    """One row per kind of other clips and score.

    Raises:
        UserError: clips or data of the run are missing.
    """
    state = load_checkpoint(config.run)
    settings = dataclasses.replace(from_dict(state["config"]), num_workers=config.num_workers)
    device, model = get_device(config.device), rebuild_model(state)
    splits = load_splits(settings)
    indices, _, known = logits_and_features(model, splits["train"], settings, device, "train")
    labels = np.array([splits["train"][i].label for i in indices])
    test, *outputs = logits_and_features(model, splits["test"], settings, device, "test")
    ordinary = novelty_scores(*outputs, known, labels, config.k)
    patients = [splits["test"][i].patient for i in test]
    table = []
    for other in config.others:
        rows = [ClipRow(path, 0) for path in find_clips([other])]
        found, *outputs = logits_and_features(model, rows, settings, device, "other")
        for name, scores in novelty_scores(*outputs, known, labels, config.k).items():
            low, high = auroc_interval(ordinary[name], patients, scores)
            table.append(
                {
                    "other clips": Path(other).name,
                    "test clips": len(test),
                    "others": len(found),
                    "score": name,
                    "AUROC": auroc(ordinary[name], scores),
                    "95 % from": low,
                    "to": high,
                }
            )
    return pd.DataFrame(table)


@cli_main
def main() -> None:
    config = parse(NoveltyConfig, __doc__)
    conditions = environment(get_device(config.device), run=config.run, k=config.k)
    counts = dict.fromkeys(("test clips", "others"), "{:.0f}")
    report("novelty", measure(config), conditions, config.output, counts)


if __name__ == "__main__":
    main()
