"""Whether relevance is right: against planted evidence, by deletion, and with random weights.

Three questions, each with what chance gives beside the answer. Does relevance point to evidence
whose place is known? Does the answer change when what is relevant is taken away? Does the map
depend on what the model has learned at all?
"""

import copy
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from evaluation.bootstrap import (
    N_RESAMPLES,
    Interval,
    canonical_order,
    cluster_bootstrap_weights,
    confidence_interval,
    patient_clips,
)
from explanation import methods
from explanation.baseline import Reference, reference_clips
from explanation.occlusion import BATCH, as_dtype, logits_in_batches
from explanation.relevance import Method, Relevance
from modeling.inference import PackedConv2d, require_finite

STEPS = 14
"""steps of the curves from nothing deleted to all"""

QUADRANTS = ("top left", "top right", "bottom left", "bottom right")
"""the quarters of a picture, in the order of their numbers"""


# Intervals


def mean_interval(
    values: np.ndarray, patients: np.ndarray, n_resamples: int = N_RESAMPLES, seed: int = 0
) -> tuple[float, Interval]:
    """The mean of a number per clip, and its 95 % interval by the cluster bootstrap.

    For two methods on the same clips give their difference per clip: what both share cancels out.

    Args:
        values: `(N,)`.
        patients: `(N,)` names; a clip of an unknown patient (None) counts as a patient by itself.

    Returns:
        The mean, and low and high; no interval where there is a single patient.
    """
    values = _finite(values)
    order = canonical_order(np.zeros(len(values)), values[:, None], patients)
    values, patients = values[order], patients[order]
    means = [
        weights @ values / weights.sum(axis=1)
        for weights in cluster_bootstrap_weights(patients, n_resamples, seed)
    ]
    interval = confidence_interval(np.concatenate(means), len(patient_clips(patients)))
    return float(values.mean()), interval


# Planted evidence


class Pointing(NamedTuple):
    """How well relevance finds evidence whose place is known; the means are over the clips."""

    scores: np.ndarray
    """`(N,)` from 0 to 1"""
    chances: np.ndarray
    """`(N,)` what relevance at random gets on average"""

    @property
    def score(self) -> float:
        return float(self.scores.mean())

    @property
    def chance(self) -> float:
        return float(self.chances.mean())


def temporal_pointing(frames: torch.Tensor, first: np.ndarray, last: np.ndarray) -> Pointing:
    """Whether the most relevant frame of each clip shows the evidence (the pointing game of Zhang
    et al., "Top-down Neural Attention by Excitation Backprop", ECCV 2016, arXiv:1608.00507, in
    time).

    Where several frames are the most relevant ones, the score is the fraction of them that show the
    evidence: relevance that is even, or zero, gets what chance gets.

    Args:
        frames: `(N, T)` relevance.
        first, last: `(N,)` numbers of the first and the last frame that show the evidence.
    """
    values = _finite(frames)
    inside = _inside(values.shape[1], first, last)
    largest = values == values.max(axis=1, keepdims=True)
    return Pointing((largest & inside).sum(axis=1) / largest.sum(axis=1), inside.mean(axis=1))


def temporal_average_precision(
    frames: torch.Tensor, first: np.ndarray, last: np.ndarray
) -> Pointing:
    """The area under the curve of precision and recall of each clip's frames, as average precision:
    which frames show the evidence, ranked by relevance.

    Args:
        frames, first, last: as in `temporal_pointing`.

    Returns:
        Average precisions, and the fractions of the frames that show the evidence.
    """
    from sklearn.metrics import average_precision_score  # takes a second to import

    values = _finite(frames)
    inside = _inside(values.shape[1], first, last)
    scores = [average_precision_score(*pair) for pair in zip(inside, values, strict=True)]
    return Pointing(np.array(scores), inside.mean(axis=1))


def spatial_pointing(maps: torch.Tensor, quadrants: np.ndarray) -> Pointing:
    """Whether the most relevant cell, summed over time, lies in the quarter that shows the
    evidence.

    A cell counts by its centre. A grid with an odd number of rows or columns has centres on a line
    in the middle: such a cell counts half for either side, the one in the very middle a quarter for
    each quadrant. Chance is then 1/4 with every grid. Ties as in `temporal_pointing`.

    Args:
        maps: `(N, T, h, w)` relevance.
        quadrants: `(N,)` numbers of the quarters, in the order of `QUADRANTS`.
    """
    sums = _finite(maps).sum(axis=1)  # (N, h, w)
    quadrants = np.asarray(quadrants)
    if not np.isin(quadrants, range(4)).all():
        raise ValueError(f"quadrants must be numbers from 0 to 3, not {quadrants}")
    rows, columns = (_halves(n) for n in sums.shape[1:])
    parts = rows[quadrants // 2, :, None] * columns[quadrants % 2, None, :]  # (N, h, w)
    largest = sums == sums.max(axis=(1, 2), keepdims=True)
    scores = (parts * largest).sum(axis=(1, 2)) / largest.sum(axis=(1, 2))
    return Pointing(scores, np.full(len(sums), 0.25))


def _halves(n: int) -> np.ndarray:
    """`(2, n)` how much of each cell belongs to the first and to the second half of a side."""
    centres = 2 * np.arange(n) + 1 - n  # integers: exactly 0 in the middle
    first = (centres < 0) + 0.5 * (centres == 0)
    return np.stack([first, 1 - first])


def _inside(n_frames: int, first: np.ndarray, last: np.ndarray) -> np.ndarray:
    """`(N, T)` bool, which frames lie from `first` to `last`."""
    first, last = np.asarray(first)[:, None], np.asarray(last)[:, None]
    if (first < 0).any() or (first > last).any() or (last >= n_frames).any():
        raise ValueError(f"first and last must be frames from 0 to {n_frames - 1}, in this order")
    numbers = np.arange(n_frames)
    return (first <= numbers) & (numbers <= last)


def _finite(values: torch.Tensor | np.ndarray) -> np.ndarray:
    """The values as float64.

    Raises:
        ValueError: some are not finite.
    """
    values = np.asarray(values, dtype=np.float64)
    if not np.isfinite(values).all():
        raise ValueError("relevance and scores must be finite")
    return values


# Deletion and insertion


@dataclass(frozen=True)
class Curves:
    """The probability of the target while more and more of a clip is deleted or inserted.

    The curve of a faithful explanation falls early when the most relevant parts are deleted first,
    and rises early when they are inserted first: a small area under the first, a large one under
    the second. Areas say something only beside those of other orders (`random_maps`,
    `centre_maps`) on the same clips.
    """

    fractions: np.ndarray
    """`(S,)` of the parts that are deleted, or inserted; from 0 to 1"""
    deletion: np.ndarray
    """`(N, S)`"""
    insertion: np.ndarray
    """`(N, S)`"""

    @property
    def deletion_areas(self) -> np.ndarray:
        """`(N,)` from 0 to 1, by the trapezoidal rule; smaller is better."""
        return _areas(self.fractions, self.deletion)

    @property
    def insertion_areas(self) -> np.ndarray:
        """`(N,)` from 0 to 1; larger is better."""
        return _areas(self.fractions, self.insertion)


class Gain(NamedTuple):
    """By how much areas are better than those of another order, with 95 % intervals by patient;
    above 0: better."""

    deletion: tuple[float, Interval]
    insertion: tuple[float, Interval]


def gain(curves: Curves, baseline: Curves, patients: np.ndarray) -> Gain:
    """By how much the areas are better than a baseline's, paired by clip.

    Args:
        baseline: the curves of the same clips in another order.
        patients: see `mean_interval`.
    """
    return Gain(
        mean_interval(baseline.deletion_areas - curves.deletion_areas, patients),
        mean_interval(curves.insertion_areas - baseline.insertion_areas, patients),
    )


def random_maps(shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    """Maps whose cells are relevant at random: the baseline that knows nothing.

    Args:
        shape: `(N, T, h, w)`, or `(N, T)` for frames.
    """
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def centre_maps(shape: tuple[int, ...]) -> torch.Tensor:
    """Maps whose cells are the more relevant the nearer they are to the centre of the clip, in
    space and in time: the baseline that knows only how people film.

    The distance is Euclidean; each side of the picture and the duration count as 1.

    Args:
        shape: `(N, T, h, w)`, or `(N, T)` for frames.
    """
    axes = [(torch.arange(n) + 0.5) / n - 0.5 for n in shape[1:]]
    squares = sum(axis**2 for axis in torch.meshgrid(*axes, indexing="ij"))
    return -squares.sqrt().expand(shape)


@torch.no_grad()
def deletion_insertion(
    model: nn.Module,
    clips: torch.Tensor,
    targets: torch.Tensor,
    maps: torch.Tensor,
    steps: int = STEPS,
    seed: int = 0,
    reference: Reference = "still",
) -> Curves:
    """The curves over the cells in space and time, the most relevant ones first.

    Petsiuk, Das and Saenko, "RISE: Randomized Input Sampling for Explanation of Black-box Models",
    BMVC 2018, arXiv:1806.07421, section 4. Other than there, a deleted cell is never grey or black
    but shows a still picture of the clip (explanation/baseline.py), in both curves: each curve ends
    where the other begins.

    Args:
        model: in eval mode.
        clips: `(N, T, C, H, W)` uint8, or float in [0, 1], on the model's device.
        targets: `(N,)` the class of each clip whose probability is followed.
        maps: `(N, T, h, w)`; cells of equal relevance come in random order.
        steps: how many times cells are deleted, about as many each time.
        seed: of the order of equal cells.
        reference: the still picture.

    Raises:
        NotFiniteError: the model's logits are not finite.
    """
    n, t, h, w = maps.shape
    _check_shapes(clips, targets, n, t)
    cells = t * h * w
    if not 1 <= steps <= cells:
        raise ValueError(f"steps must be from 1 to the {cells} cells of a map, not {steps}")
    counts = [round(step * cells / steps) for step in range(steps + 1)]
    cell_rows, cell_columns = (
        _cell_of_pixels(clips.shape[-2], h),
        _cell_of_pixels(clips.shape[-1], w),
    )
    deletion, insertion = [], []
    for clip, target, order in zip(clips, targets, _descending(maps, seed), strict=True):
        still = as_dtype(reference_clips(clip[None], reference)[0], clip.dtype)
        ranks = order.argsort().view(t, h, w)[:, cell_rows][:, :, cell_columns]  # (T, H, W)
        ranks = ranks.unsqueeze(1).to(clip.device)
        variants = _deleted_and_inserted(clip, still, ranks, counts)
        values = _probabilities(model, variants, target)
        deletion.append(values[: steps + 1])
        insertion.append(
            np.concatenate([values[steps : steps + 1], values[steps + 1 :], values[:1]])
        )
    return Curves(np.array(counts) / cells, np.stack(deletion), np.stack(insertion))


def _deleted_and_inserted(
    clip: torch.Tensor, still: torch.Tensor, ranks: torch.Tensor, counts: list[int]
) -> Iterator[torch.Tensor]:
    """The clip without its first cells for each count, then the still picture with them; the last
    ones' ends are those of the first ones.

    Args:
        ranks: `(T, 1, H, W)` the place of each pixel's cell in the order.
    """
    for count in counts:
        yield torch.where(ranks < count, still, clip)
    for count in counts[1:-1]:
        yield torch.where(ranks < count, clip, still)


@torch.no_grad()
def frame_deletion_insertion(
    model: nn.Module,
    clips: torch.Tensor,
    targets: torch.Tensor,
    frames: torch.Tensor,
    seed: int = 0,
) -> Curves:
    """The curves over whole frames, the most relevant ones first.

    A deleted frame is replaced by the nearest one that is left, of two the earlier one: the clip
    seems to stand still there. So no content is invented, but one frame must be left: the curves
    go from T frames to one, and from one to T.

    Args:
        model, clips, targets, seed: as in `deletion_insertion`.
        frames: `(N, T)` relevance.

    Raises:
        NotFiniteError: the model's logits are not finite.
    """
    n, t = frames.shape
    _check_shapes(clips, targets, n, t)
    deletion, insertion = [], []
    for clip, target, order in zip(clips, targets, _descending(frames, seed), strict=True):
        kept = [order[count:] for count in range(t)] + [order[:count] for count in range(1, t)]
        variants = (clip[_nearest(part, t).to(clip.device)] for part in kept)
        values = _probabilities(model, variants, target)
        deletion.append(values[:t])
        insertion.append(np.append(values[t:], values[0]))
    fractions = np.linspace(0, 1, t) if t > 1 else np.zeros(1)
    return Curves(fractions, np.stack(deletion), np.stack(insertion))


def _nearest(kept: torch.Tensor, n_frames: int) -> torch.Tensor:
    """`(T,)` for each frame the number of the nearest one that is kept, of two the earlier one."""
    kept = kept.sort().values
    return kept[(torch.arange(n_frames)[:, None] - kept).abs().argmin(dim=1)]


def _descending(maps: torch.Tensor, seed: int) -> torch.Tensor:
    """`(N, cells)` the cells of each map, the most relevant ones first; equal ones at random,
    because in their own order the first frames would come first."""
    values = _finite(maps).reshape(len(maps), -1)
    shuffled = np.random.default_rng(seed).permutation(values.shape[1])
    order = shuffled[np.argsort(-values[:, shuffled], axis=1, kind="stable")]
    return torch.from_numpy(order)


def _cell_of_pixels(pixels: int, cells: int) -> torch.Tensor:
    """`(pixels,)` the cell of a side in which the centre of each pixel lies."""
    return torch.arange(1, 2 * pixels, 2) * cells // (2 * pixels)


def _probabilities(
    model: nn.Module, variants: Iterable[torch.Tensor], target: torch.Tensor
) -> np.ndarray:
    """The probability of a class for each clip `(T, C, H, W)`, in batches of bounded size."""
    logits = require_finite(logits_in_batches(model, variants))
    return logits.softmax(dim=1)[:, int(target)].double().numpy()


def _areas(fractions: np.ndarray, curves: np.ndarray) -> np.ndarray:
    """`(N,)` areas by the trapezoidal rule; that of a single point is its height."""
    if len(fractions) == 1:
        return curves[:, 0]
    return ((curves[:, 1:] + curves[:, :-1]) / 2) @ np.diff(fractions)


def _check_shapes(clips: torch.Tensor, targets: torch.Tensor, n: int, t: int) -> None:
    if tuple(clips.shape[:2]) != (n, t) or len(targets) != n:
        raise ValueError(
            f"clips {tuple(clips.shape)} and targets {tuple(targets.shape)} do not belong to "
            f"relevance of {n} clips of {t} frames"
        )


# Random weights


@dataclass(frozen=True)
class Randomisation:
    """How much a method's maps still resemble the original ones when weights are random."""

    stages: tuple[str, ...]
    """from the head downward; with each, all before it are random too"""
    correlations: np.ndarray
    """`(len(stages), N)` rank correlation of each clip's map with its original one"""

    @property
    def means(self) -> np.ndarray:
        """`(len(stages),)` over the clips. Near 1 at the end: the method shows the picture, not
        what the model has learned."""
        return self.correlations.mean(axis=1)


def randomisation(
    model: nn.Module,
    clips: torch.Tensor,
    targets: torch.Tensor,
    method: Method,
    explain: Callable[[nn.Module, torch.Tensor, torch.Tensor, Method], Relevance] = methods.explain,
    seed: int = 0,
    ends_only: bool = False,
) -> Randomisation:
    """Randomise a model's weights stage by stage, from the head downward, and compare the maps.

    The cascading randomisation of Adebayo et al., "Sanity Checks for Saliency Maps", NeurIPS 2018,
    arXiv:1810.03292, section 3: a method whose map hardly changes does not explain the model. The
    measure is Spearman's correlation of the absolute relevance of all cells. It is exactly 1 for
    identical maps and 0 where one of two different maps is constant.

    Layers are initialised as when they were made. Parameters of no such layer (tokens, positions)
    are permuted, which keeps their distribution. BatchNorms get the statistics of what reaches them
    now, because with those of the trained weights the signal would vanish or grow without bound.

    Args:
        model: in eval mode; it is left as it is.
        clips: `(N, T, C, H, W)` uint8, or float in [0, 1], on the model's device.
        targets: `(N,)`.
        explain: `methods.explain`, or a function like it.
        ends_only: compare the maps after the head and after all stages alone, which saves time.
    """
    model = copy.deepcopy(model)
    original = explain(model, clips, targets, method).maps
    names, correlations, changed = [], [], []
    devices = [clips.device] if clips.device.type == "cuda" else []
    stages = [
        (name, modules)
        for name, modules in reversed(model.stages().items())
        if any(True for module in modules for _ in module.parameters())
    ]
    for number, (name, modules) in enumerate(stages):
        with torch.random.fork_rng(devices):  # the caller's random numbers stay as they are
            torch.manual_seed(seed + number)
            for module in modules:
                randomise(module)
        changed += modules
        fit_statistics(model, changed, clips[:BATCH])
        if ends_only and 0 < number < len(stages) - 1:
            continue
        maps = explain(model, clips, targets, method).maps
        names.append(name)
        correlations.append([rank_correlation(*pair) for pair in zip(original, maps, strict=True)])
    return Randomisation(tuple(names), np.array(correlations))


@torch.no_grad()
def randomise(module: nn.Module) -> None:
    """Give random weights to a module and all below it, in place."""
    for part in module.modules():
        own = list(part.parameters(recurse=False))
        if own and hasattr(part, "reset_parameters"):
            part.reset_parameters()
        else:
            for parameter in own:
                order = torch.randperm(parameter.numel(), device=parameter.device)
                parameter.copy_(parameter.flatten()[order].view_as(parameter))
        if isinstance(part, PackedConv2d):
            part._packed = None  # laid out anew by its next input


@torch.no_grad()
def fit_statistics(model: nn.Module, modules: Iterable[nn.Module], clips: torch.Tensor) -> None:
    """Set the statistics of BatchNorms, and of modules like them, to those of their inputs.

    One pass is enough: each is set before it is used, and what follows gets its new output.

    Args:
        model: in eval mode.
        modules: the parts of the model whose statistics are set.
        clips: `(N, T, C, H, W)`.
    """

    def before(norm: nn.Module, inputs: tuple) -> None:
        x = inputs[0].float().transpose(0, 1).flatten(1)  # (C, values)
        if x.shape[1] > 1:
            norm.running_mean.copy_(x.mean(dim=1))
            norm.running_var.copy_(x.var(dim=1))

    norms = {
        part
        for module in modules
        for part in module.modules()
        if getattr(part, "running_var", None) is not None
    }
    if not norms:
        return
    hooks = [norm.register_forward_pre_hook(before) for norm in norms]
    try:
        model(clips)
    finally:
        for hook in hooks:
            hook.remove()


def rank_correlation(one: torch.Tensor, other: torch.Tensor) -> float:
    """Spearman's correlation of the absolute values of two maps of the same shape.

    Identical maps: exactly 1, constant ones included. Otherwise 0 if one is constant.
    """
    from scipy.stats import spearmanr  # takes a second to import

    first, second = (np.abs(_finite(x)).ravel() for x in (one, other))
    if (first == second).all():
        return 1.0
    if np.ptp(first) == 0 or np.ptp(second) == 0:
        return 0.0
    return float(spearmanr(first, second).statistic)
