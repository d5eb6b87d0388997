"""What a checkpoint needs to tell how unlike its training a clip is; see evaluation/novelty.py."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from clips.manifest import ClipRow
from config import TrainConfig
from evaluation.novelty import class_means
from training.engine import evaluate
from training.loaders import eval_loader, open_cache
from utils.interrupt import Interrupt

CLIPS_PER_CLASS = 20


def measure_class_means(
    model: nn.Module,
    rows: Sequence[ClipRow],
    config: TrainConfig,
    device: torch.device,
    interrupt: Interrupt | None = None,
) -> torch.Tensor:
    """The means of the features of each class, `(K, num_features)`; see evaluation/novelty.py.

    With several processes each one reads its part of the clips, and all get the same means.

    Args:
        rows: the training clips; some of each class are read.

    Raises:
        Interrupted: `interrupt` was asked to stop.
        NoClipError: none of the clips can be read.
    """
    loader = eval_loader(some_per_class(rows), config, open_cache(config))
    predictions = evaluate(
        model,
        loader,
        device,
        description="training",
        skip_unreadable=True,
        interrupt=interrupt,
        with_features=True,
    )
    features = torch.from_numpy(predictions.features).double()
    return class_means(features, torch.from_numpy(predictions.labels))


def some_per_class(rows: Sequence[ClipRow], count: int = CLIPS_PER_CLASS) -> list[ClipRow]:
    """At most `count` rows of each class, spread evenly over its rows and so over its patients."""
    rows_of: dict[int, list[ClipRow]] = {}
    for row in rows:
        rows_of.setdefault(row.label, []).append(row)
    return [
        members[i]
        for members in rows_of.values()
        for i in np.unique(np.linspace(0, len(members) - 1, count).round().astype(int))
    ]
