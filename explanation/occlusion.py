"""Occlusion: how much the score falls when frames, or a part of all frames, are taken away.

Zeiler and Fergus, "Visualizing and Understanding Convolutional Networks", ECCV 2014,
arXiv:1311.2901. Nothing is painted black: a black frame is a thing that no model has seen, and its
answer to it says little. Frames are replaced by the frames beside them, parts of the picture by a
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

    A quarter of the clip at a time is replaced in time; the relevance of a frame is the mean fall
    over all such stretches that it lies in. A part of the picture is replaced in all frames. The
    map of a frame is the frame's relevance, divided among the parts as their own positive relevance
    is.

    Args:
        model: in eval mode.
        clip: `(T, C, H, W)` uint8, or float in [0, 1].
        score: what is explained.
    """
    frames = temporal_occlusion(model, clip, score)  # (T,)
    parts = spatial_occlusion(model, clip, score).clamp(min=0)  # (h, w)
    division = parts / parts.sum() if parts.any() else torch.full_like(parts, 1 / parts.numel())
    return frames[:, None, None] * division


def temporal_occlusion(
    model: nn.Module, clip: torch.Tensor, score: Score, length: int | None = None
) -> torch.Tensor:
    """The relevance of the frames of one clip, `(T,)`.

    Args:
        clip: `(T, C, H, W)`.
        length: frames that are replaced at once (None: a quarter of the clip).
    """
    t = len(clip)
    length = length or max(1, t // 4)
    stretches = [(max(0, i), min(t, i + length)) for i in range(1 - length, t)]
    falls = _falls(model, clip, (without_frames(clip, *s) for s in stretches), score)
    sums, counts = torch.zeros(t), torch.zeros(t)
    for (start, end), fall in zip(stretches, falls, strict=True):
        sums[start:end] += fall
        counts[start:end] += 1
    return sums / counts


def without_frames(clip: torch.Tensor, start: int, end: int) -> torch.Tensor:
    """The clip with the frames from `start` to before `end` blended from the frame before them to
    the frame after them; at an end of the clip there is only one of these, in a clip of which
    nothing would stay the mean of all frames."""
    t, changed = len(clip), clip.clone()
    if start == 0 and end == t:
        changed[:] = clip.float().mean(dim=0).to(clip.dtype)
        return changed
    before = clip[start - 1] if start > 0 else clip[end]
    after = clip[end] if end < t else clip[start - 1]
    for i in range(start, end):
        weight = (i - start + 1) / (end - start + 1)
        changed[i] = torch.lerp(before.float(), after.float(), weight).to(clip.dtype)
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
