"""What a checkpoint needs to tell how unlike its training a clip is; see evaluation/novelty.py."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from clips.manifest import ClipRow
from config import TrainConfig
from evaluation.novelty import class_means
from modeling.features import per_clip, recorded_features
from modeling.inference import prepare_for_inference
from training.engine import NoClipError
from training.loaders import eval_loader, open_cache
from utils import distributed
from utils.interrupt import Interrupt
from utils.workers import show_batches

CLIPS_PER_CLASS = 20


@torch.inference_mode()
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
    model = prepare_for_inference(model, device)
    loader = eval_loader(some_per_class(rows), config, open_cache(config))
    features, labels, quiet = [], [], distributed.rank() != 0
    for batch in show_batches(loader, "training features", interrupt, quiet):
        if len(batch.labels):
            with recorded_features(model) as newest:
                model(batch.clips.to(device, non_blocking=True))
            features.append(per_clip(newest[0], len(batch.labels)))
            labels.append(batch.labels)
        if interrupt and distributed.world_size() == 1:
            interrupt.check()
    own = (torch.cat(features), torch.cat(labels)) if features else None
    parts = [part for part in distributed.all_gather(own) if part is not None]
    if not parts:
        raise NoClipError("none of the training clips can be read", [])
    return class_means(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


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
