"""Occlusion: how much the score falls when frames, or a part of all frames, are taken away.

Zeiler and Fergus, "Visualizing and Understanding Convolutional Networks", ECCV 2014,
arXiv:1311.2901. Nothing is painted black: a black frame is a thing that no model has seen, and its
answer to it says little. A frame is replaced by neighbours in time, a part of the picture by a
blurred still picture of the clip.
"""

from collections.abc import Iterable

import torch
from torch import nn

from explanation.baseline import blurred_still
from explanation.relevance import Score

GRID = 7
"""parts of the picture along each side"""

BATCH = 16
"""clips that go through the model at once"""


@torch.no_grad()
def occlusion(model: nn.Module, clip: torch.Tensor, score: Score) -> torch.Tensor:
    """The fall of the score, for frames times for parts of the picture, `(T, h, w)`.

    A frame at a time is replaced, and a part of the picture in all frames. The map of a frame is
    the frame's relevance, divided among the parts as their own positive relevance is.

    Args:
        model: in eval mode.
        clip: `(T, C, H, W)` uint8, or float in [0, 1].
        score: what is explained.
    """
    frames = temporal_occlusion(model, clip, score)  # (T,)
    parts = spatial_occlusion(model, clip, score).clamp(min=0)  # (h, w)
    division = parts / parts.sum() if parts.any() else torch.full_like(parts, 1 / parts.numel())
    return frames[:, None, None] * division


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
        still = as_dtype(blurred_still(clip[None])[0], clip.dtype)
        return _falls(model, clip, [still], score)
    falls = _falls(model, clip, (_with_frame(clip, *pair) for pair in pairs), score)
    frames = torch.tensor([i for i, _ in pairs])
    sums = torch.zeros(t).index_add(0, frames, falls)
    return sums / frames.bincount(minlength=t).clamp(min=1)


def _with_frame(clip: torch.Tensor, number: int, other: int) -> torch.Tensor:
    """The clip with another of its frames in the place of one."""
    changed = clip.clone()
    changed[number] = clip[other]
    return changed


def spatial_occlusion(model: nn.Module, clip: torch.Tensor, score: Score) -> torch.Tensor:
    """The relevance of GRID x GRID parts of the picture of one clip, `(GRID, GRID)`.

    Args:
        clip: `(T, C, H, W)`.
    """
    still = as_dtype(blurred_still(clip[None])[0], clip.dtype)  # (T, C, H, W)
    rows, columns = (torch.linspace(0, n, GRID + 1).round().int().tolist() for n in clip.shape[-2:])

    def without(row: int, column: int) -> torch.Tensor:
        part = slice(rows[row], rows[row + 1]), slice(columns[column], columns[column + 1])
        changed = clip.clone()
        changed[..., part[0], part[1]] = still[..., part[0], part[1]]
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
    scores = []
    batch = [clip]
    for variant in changed:
        batch.append(variant)
        if len(batch) == BATCH:
            scores.append(score(model(torch.stack(batch))).float().cpu())
            batch = []
    if batch:
        scores.append(score(model(torch.stack(batch))).float().cpu())
    values = torch.cat(scores)
    return values[0] - values[1:]
