"""Integrated gradients: the score's gradient along the way from a still picture to the clip.

Sundararajan, Taly and Yan, "Axiomatic Attribution for Deep Networks", ICML 2017, arXiv:1703.01365.
The still picture is the clip's own (explanation/baseline.py): the same scene, standing still.
"""

import logging

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from explanation.baseline import Reference, reference_clips
from explanation.relevance import Relevance, Score, differentiable

log = logging.getLogger(__name__)

BATCH = 4
"""clips that go through the model at once: all its activations are kept for the gradients, 0.4 GB
for 16 frames of 224 pixels in a ResNet-18, and larger batches are not faster on a CPU"""

STEPS = (32, 64, 128, 256, 512)
"""points on the way: as many as completeness needs"""

TOLERANCE = 0.01
"""how far the sum of the relevance may be from the difference of the scores, as a fraction of it;
of a difference below 1, which decides little, a hundredth of a logit"""


def integrated_gradients(
    model: nn.Module, clip: torch.Tensor, score: Score, reference: Reference = "still"
) -> Relevance:
    """The relevance of all values of the pixels of one clip, summed over the cells of a grid.

    Completeness (proposition 1 of the paper): it adds up to the score of the clip minus that of the
    still picture. The points on the way are doubled until it does, within TOLERANCE, and a warning
    tells if 512 points are not enough.

    Args:
        model: in eval mode.
        clip: `(T, C, H, W)` uint8, or float in [0, 1].
        score: what is explained.
        reference: the still picture.
    """
    still = reference_clips(clip[None], reference)[0]
    clip = clip / 255 if clip.dtype == torch.uint8 else clip.float()
    with torch.no_grad():
        after, before = score(model(torch.stack([clip, still])))
    for steps in STEPS:
        attributions = attribute(model, clip, still, score, steps)  # (T, C, H, W)
        gap = (attributions.sum() - (after - before)).abs()
        if gap <= TOLERANCE * (after - before).abs().clamp(min=1):
            break
    else:
        log.warning(
            f"warning: the integrated gradients of a clip add up to {attributions.sum():.3g} "
            f"instead of {after - before:.3g} at {steps} points"
        )
    grid = cells_per_side(clip.shape[-2]), cells_per_side(clip.shape[-1])
    maps = _sum_cells(attributions.sum(dim=1), grid).cpu()[None]  # (1, T, h, w)
    return Relevance(maps, maps.sum((2, 3)))


def attribute(
    model: nn.Module, clip: torch.Tensor, still: torch.Tensor, score: Score, steps: int
) -> torch.Tensor:
    """The relevance of each value of one clip, `(T, C, H, W)` (equation 1 of the paper), by the
    quadrature of Gauss and Legendre."""
    nodes, weights = np.polynomial.legendre.leggauss(steps)
    gradient = torch.zeros_like(clip)
    with torch.enable_grad(), differentiable(model):
        for start in range(0, steps, BATCH):
            at = torch.from_numpy((nodes[start : start + BATCH] + 1) / 2).to(clip)
            weight = torch.from_numpy(weights[start : start + BATCH] / 2).to(clip)
            at, weight = at.view(-1, 1, 1, 1, 1), weight.view(-1, 1, 1, 1, 1)
            points = torch.lerp(still[None], clip[None], at).requires_grad_()
            (gradients,) = torch.autograd.grad(score(model(points)).sum(), points)
            gradient += (gradients * weight).sum(dim=0)
    return (clip - still) * gradient


def cells_per_side(pixels: int) -> int:
    """At most 16 cells that divide a side evenly."""
    return next(n for n in range(16, 0, -1) if pixels % n == 0)


def _sum_cells(x: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """`(T, H, W)` summed over the cells of a grid, `(T, h, w)`."""
    cell = x.shape[-2] // grid[0] * (x.shape[-1] // grid[1])
    return F.adaptive_avg_pool2d(x, grid) * cell
