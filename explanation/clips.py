"""From a batch of clips to explained clips: predictions, relevance, times of the frames."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from clips.manifest import ClipRow
from explanation.baseline import Reference
from explanation.methods import explain
from explanation.relevance import ExplainedClip, Method
from modeling.inference import require_finite
from video.clip_reader import FrameSampler
from video.container import ClipError, probe


def explain_batch(
    model: nn.Module,
    clips: torch.Tensor,
    rows: Sequence[ClipRow],
    classes: Sequence[str],
    method: Method,
    sampler: FrameSampler,
    temperature: float = 1.0,
    target: int | None = None,
    against: int | None = None,
    labelled: bool = True,
    reference: Reference = "still",
) -> list[ExplainedClip]:
    """Explain the answers of a model for a batch of clips.

    Args:
        model: in eval mode.
        clips: `(B, T, C, H, W)` uint8, on the model's device.
        rows: what the clips are, `B` of them.
        sampler: how the frames were chosen, for their times.
        temperature: the logits are divided by it for the probabilities.
        target: the class that is explained (None: the predicted one of each clip).
        against: a class to compare with; clips for which it is the target are explained alone.
        labelled: whether the rows have true classes.
        reference: see `explain`.

    Raises:
        UserError: the method is not defined for the model; or the outputs are not finite.
    """
    with torch.no_grad():
        logits = require_finite(model(clips).cpu().double())
    probabilities = (logits / temperature).softmax(dim=1)
    predicted = logits.argmax(dim=1)
    targets = predicted if target is None else torch.full_like(predicted, target)
    others = None if against is None else torch.full_like(predicted, against)
    relevance = explain(model, clips, targets, method, others, reference)
    images = clips[:, :, :3].permute(0, 1, 3, 4, 2).cpu().numpy()  # (B, T, H, W, 3)
    return [
        ExplainedClip(
            name=str(row.path),
            frames=images[i],
            times=frame_times(row, sampler),
            maps=relevance.maps[i].numpy(),
            relevance=relevance.frames[i].numpy(),
            method=method,
            predicted=classes[predicted[i]],
            confidence=float(probabilities[i].max()),
            explained=classes[targets[i]],
            probability=float(probabilities[i, targets[i]]),
            against="" if against in (None, int(targets[i])) else classes[against],
            label=classes[row.label] if labelled else "",
        )
        for i, row in enumerate(rows)
    ]


def frame_times(row: ClipRow, sampler: FrameSampler) -> np.ndarray:
    """The times of the frames that a model sees of a clip, `(T,)` seconds from its first frame;
    NaN where its frame rate is not known, or the clip is no longer there."""
    unknown = np.full(sampler.n_frames, np.nan)
    try:
        metadata = probe(row.path)
    except (ClipError, OSError):
        return unknown
    rate = metadata.rate or row.fps
    if not rate or not metadata.frames:
        return unknown
    return np.array(sampler.indices(metadata.frames)[: sampler.n_frames]) / rate
