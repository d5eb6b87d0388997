"""Occlusion: how much the score falls when frames, or a part of all frames, are taken away.

Zeiler and Fergus, "Visualizing and Understanding Convolutional Networks", ECCV 2014,
arXiv:1311.2901. Nothing is painted black: a black frame is a thing that no model has seen, and its
answer to it says little. A frame is replaced by neighbours in time, a part of the picture by that
part of a still picture of the clip (explanation/baseline.py).
"""

import itertools
from collections.abc import Iterable

import torch
from torch import nn

from explanation.baseline import Reference, blurred_still, reference_clips
from explanation.relevance import Relevance, Score

GRID = 7
"""parts of the picture along each side"""

BATCH = 16
"""clips that go through the model at once"""


@torch.no_grad()
def occlusion(
    model: nn.Module, clip: torch.Tensor, score: Score, reference: Reference = "still"
) -> Relevance:
    """The fall of the score for each frame, and for each part of the picture, of one clip.

    A frame at a time is replaced, and a part of the picture in all frames. The maps divide the fall
    of each part among the frames as their own positive relevance is, so that over time they add up
    to the falls of the parts.

    Args:
        model: in eval mode.
        clip: `(T, C, H, W)` uint8, or float in [0, 1].
        score: what is explained.
        reference: what the parts of the picture are replaced by.
    """
    frames = temporal_occlusion(model, clip, score)  # (T,)
    parts = spatial_occlusion(model, clip, score, reference)  # (h, w)
    positive = frames.clamp(min=0)
    division = positive / positive.sum() if positive.any() else torch.ones_like(frames) / len(clip)
    return Relevance((division[:, None, None] * parts)[None], frames[None])


@torch.no_grad()
def temporal_occlusion(model: nn.Module, clip: torch.Tensor, score: Score) -> torch.Tensor:
    """The relevance of the frames of one clip, `(T,)`.

    A frame is replaced by the one a quarter of the clip earlier, and by the one as much later; its
    relevance is the mean of both falls, or the one there is. The frames next to it would not do:
    they show the same. Only one frame at a time is replaced: what a model cannot see, such as the
    frames after the answer of a causal one, has a relevance of exactly 0.

    Args:
        clip: `(T, C, H, W)`.
    """
    t = len(clip)
    distance = max(1, t // 4)
    pairs = [(i, j) for i in range(t) for j in (i - distance, i + distance) if 0 <= j < t]
    if not pairs:  # a single frame
        blurred = as_dtype(blurred_still(clip[None])[0], clip.dtype)
        return _falls(model, clip, [blurred], score)
    falls = _falls(model, clip, (_with_frame(clip, *pair) for pair in pairs), score)
    frames = torch.tensor([i for i, _ in pairs])
    sums = torch.zeros(t).index_add(0, frames, falls)
    return sums / frames.bincount(minlength=t).clamp(min=1)


def _with_frame(clip: torch.Tensor, number: int, other: int) -> torch.Tensor:
    """The clip with another of its frames in the place of one."""
    changed = clip.clone()
    changed[number] = clip[other]
    return changed


def spatial_occlusion(
    model: nn.Module, clip: torch.Tensor, score: Score, reference: Reference = "still"
) -> torch.Tensor:
    """The relevance of GRID x GRID parts of the picture of one clip, `(GRID, GRID)`.

    Args:
        clip: `(T, C, H, W)`.
    """
    other = as_dtype(reference_clips(clip[None], reference)[0], clip.dtype)  # (T, C, H, W)
    rows, columns = (torch.linspace(0, n, GRID + 1).round().int().tolist() for n in clip.shape[-2:])

    def without(row: int, column: int) -> torch.Tensor:
        part = slice(rows[row], rows[row + 1]), slice(columns[column], columns[column + 1])
        changed = clip.clone()
        changed[..., part[0], part[1]] = other[..., part[0], part[1]]
        return changed

    changed = (without(row, column) for row in range(GRID) for column in range(GRID))
    return _falls(model, clip, changed, score).view(GRID, GRID)


def as_dtype(clip: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Pixels in [0, 1] as float, or as uint8 from 0 to 255."""
    return (clip * 255).round().to(dtype) if dtype == torch.uint8 else clip.to(dtype)


def _falls(
    model: nn.Module, clip: torch.Tensor, changed: Iterable[torch.Tensor], score: Score
) -> torch.Tensor:
    """How much lower the score of each changed clip is than that of the clip, float32 on the
    CPU."""
    values = score(logits_in_batches(model, itertools.chain([clip], changed)))
    return values[0] - values[1:]


def logits_in_batches(model: nn.Module, clips: Iterable[torch.Tensor]) -> torch.Tensor:
    """The logits of clips `(T, C, H, W)`, computed BATCH at a time, `(N, num_classes)` float32 on
    the CPU."""
    clips, logits = iter(clips), []
    while batch := list(itertools.islice(clips, BATCH)):
        logits.append(model(torch.stack(batch)).float().cpu())
    return torch.cat(logits)
