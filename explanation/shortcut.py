"""Whether a model answers from what is no part of the operation: borders, logos, time stamps.

A short cut is a cue that goes with a class in the training videos only by chance (Geirhos et al.,
"Shortcut Learning in Deep Neural Networks", Nature Machine Intelligence 2020, arXiv:2004.07780).
Two regions are looked at, because nothing that happens in them is an action: the border of the
picture, and pixels that stand still while the rest moves. A bell says where to look; it is no
proof. Instruments come in from the border, and a class may truly be recognised there.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from evaluation.bootstrap import Interval, format_interval
from explanation.checks import mean_interval
from utils.tables import write_csv
from utils.text_table import text_table

Region = Literal["border", "static"]

BORDER = 0.08
"""width of the border as a fraction of each side"""

STILL = 0.1
"""a pixel stands still if it changes less than this fraction of what the changing parts do"""

_CHANGING = 0.95  # quantile over the pixels: half of an endoscope's picture may be black
_MOST_CLIPS = 0.9  # of those in which a static pixel stands still; the others may show a cut
_LEAST_CLIPS = 3  # that can be compared with each other
_LEAST_CHANGE = 2 / 255  # of the changing parts; noise of compression alone is about as strong

RATIO, RATIO_LOW = 2.0, 1.5
"""the ratio above which the bell rings, and what its interval must lie above"""

MIN_LIMIT = 1.5
"""a region in more than two thirds of the cells, because it is large or they are, cannot be told
from the rest"""


def border_mask(height: int, width: int, fraction: float = BORDER) -> np.ndarray:
    """`(H, W)` bool, the outer pixels on all four sides: a fraction of each side, at least one."""
    rows, columns = (max(1, round(fraction * n)) for n in (height, width))
    mask = np.ones((height, width), dtype=bool)
    mask[rows : height - rows, columns : width - columns] = False
    return mask


def static_mask(clips: Sequence[torch.Tensor] | torch.Tensor) -> np.ndarray | None:
    """The pixels that stand still while others move, in nearly all clips.

    Either is enough, in at least 90 % of the clips:

    - The pixel hardly changes within the clip: its standard deviation over time is below a tenth of
      that of the moving parts (the 95th percentile over the pixels, so that clips of little and of
      much motion are judged alike). Tissue may rest in one clip, but hardly at the same place in
      all. From clip to clip such a pixel may change: text that names the hospital or the day is the
      most dangerous of all. Clips without motion tell nothing here and are left out.
    - The pixel looks alike in the clip and in the others: from its median over the clips it
      deviates less than a tenth as far as the changing parts. So logos are found in clips without
      motion. Two clips may be alike by accident: it takes three.

    Digits that count seconds change within clips and between them, and are not found.

    Args:
        clips: `(N, T, C, H, W)`, or N clips `(T, C, H, W)` of one size; uint8, or float in [0, 1].
            Of more than three channels the first three count, the colours.

    Returns:
        `(H, W)` bool; None where nothing can be told: fewer than three clips, and none moves.
    """
    means, variances = [], []
    for clip in clips:
        pixels = clip[:, :3].float() / (255 if clip.dtype == torch.uint8 else 1)
        variance, mean = torch.var_mean(pixels, dim=0, correction=0)
        means.append(mean.cpu().numpy())
        variances.append(variance.cpu().numpy())
    deviations = np.sqrt(np.stack(variances)).max(
        axis=1
    )  # (N, H, W), the channel that changes most
    moving = np.quantile(deviations, _CHANGING, axis=(1, 2))  # (N,)
    informative = moving >= _LEAST_CHANGE
    masks = []
    if informative.any():
        masks.append(_mostly(deviations[informative] < STILL * moving[informative, None, None]))
    if len(means) >= _LEAST_CLIPS:
        differences = np.stack(means) - np.median(means, axis=0)  # (N, C, H, W)
        distances = np.sqrt(differences**2 + variances).max(axis=1)  # (N, H, W)
        changing = np.quantile(np.median(distances, axis=0), _CHANGING)
        if changing >= _LEAST_CHANGE:
            masks.append(_mostly(distances < STILL * changing))
    return np.any(masks, axis=0) if masks else None


def _mostly(still: np.ndarray) -> np.ndarray:
    """`(N, H, W)` bool to `(H, W)`: what is true in nearly all clips."""
    return still.mean(axis=0) >= _MOST_CLIPS


@dataclass(frozen=True)
class ShortcutShare:
    """How much of the positive relevance for a class lies in a region, beside its area."""

    label: str
    region: Region
    shares: np.ndarray
    """`(clips,)` of the clips that have positive relevance"""
    area: float
    """of the picture; NaN for static pixels if they cannot be told. A map that is even has this
    share: each cell counts with the part of it that the region covers"""
    limit: float
    """the ratio if all relevance lay evenly in the cells that the region touches: the grid of the
    maps cannot show much more; NaN without an area"""
    interval: Interval
    """95 % interval of the ratio, by patient; None with fewer than two patients"""

    @property
    def share(self) -> float:
        return float(self.shares.mean()) if len(self.shares) else float("nan")

    @property
    def ratio(self) -> float:
        """The share divided by the area: 1 for an even map."""
        return self.share / self.area if self.area > 0 else float("nan")

    @property
    def thresholds(self) -> tuple[float, float]:
        """What ratio and lower end must exceed: 2 and 1.5, or with a coarse grid a half and a
        quarter of the way from 1 to the limit. A border of 8 % covers half of the outer cells of a
        7 x 7 grid: they cannot show more than 2.04, and 1.52 and 1.26 are asked of them."""
        excess = self.limit - 1
        return min(RATIO, 1 + excess / 2), min(RATIO_LOW, 1 + excess / 4)

    @property
    def verdict(self) -> str:
        """`look` where the bell rings, `no sign`, or why nothing can be told."""
        if not len(self.shares):
            return "no positive relevance"
        if np.isnan(self.area):
            return "not measured: nothing changes"
        if self.area == 0:
            return "no such pixels"
        if self.limit < MIN_LIMIT:
            return "not measured: in most of the cells"
        if self.interval is None:
            return "not measured: fewer than 2 patients"
        ratio, low = self.thresholds
        return "look" if self.ratio > ratio and self.interval[0] > low else "no sign"


def shortcut_shares(
    maps: torch.Tensor,
    clips: Sequence[torch.Tensor] | torch.Tensor,
    labels: np.ndarray,
    classes: Sequence[str],
    patients: np.ndarray | None = None,
) -> list[ShortcutShare]:
    """The share of the positive relevance in the border and in static pixels, for each class.

    The positive relevance of a clip is summed over time, and each cell's is spread evenly over the
    area of the cell. Clips count alike, however large their relevance. Static pixels are those of
    the clips of the class: a logo that only one class has is what is looked for.

    Args:
        maps: `(N, T, h, w)` relevance for the labels.
        clips: N clips, as in `static_mask`.
        labels: `(N,)` the number of the class that each clip's map explains.
        classes: the names of the classes; those without clips are left out.
        patients: `(N,)` names; a clip of an unknown patient (None) counts as a patient by itself,
            as all do by default.

    Returns:
        Border and static pixels of the first class, of the second one, and so on.
    """
    labels = np.asarray(labels)
    patients = np.full(len(labels), None) if patients is None else np.asarray(patients, object)
    if not len(maps) == len(clips) == len(labels) == len(patients):
        raise ValueError("maps, clips, labels and patients must be of the same clips")
    positive = np.asarray(maps, dtype=np.float64).clip(min=0).sum(axis=1)  # (N, h, w)
    if not np.isfinite(positive).all():
        raise ValueError("relevance must be finite")
    results = []
    for number, label in enumerate(classes):
        mine = np.flatnonzero(labels == number)
        if not len(mine):
            continue
        masks: dict[Region, np.ndarray | None] = {
            "border": border_mask(*clips[mine[0]].shape[-2:]),
            "static": static_mask([clips[i] for i in mine]),
        }
        relevant = mine[positive[mine].any(axis=(1, 2))]
        for region, mask in masks.items():
            results.append(_measure(label, region, mask, positive[relevant], patients[relevant]))
    return results


def _measure(
    label: str, region: Region, mask: np.ndarray | None, positive: np.ndarray, patients: np.ndarray
) -> ShortcutShare:
    """The share of one region.

    Args:
        mask: `(H, W)` bool; None: unknown.
        positive: `(n, h, w)` relevance summed over time, some of it above 0 in each clip.
    """
    nan = float("nan")
    if mask is None or not mask.any():
        share = nan if mask is None else 0.0
        return ShortcutShare(label, region, np.full(len(positive), share), share, nan, None)
    covered = covered_parts(mask, positive.shape[1:])  # (h, w)
    area, limit = float(covered.mean()), 1 / float((covered > 1e-9).mean())
    shares = (positive * covered).sum(axis=(1, 2)) / positive.sum(axis=(1, 2))
    interval = mean_interval(shares / area, patients)[1] if len(shares) else None
    return ShortcutShare(label, region, shares, area, limit, interval)


def covered_parts(mask: np.ndarray, grid: tuple[int, ...]) -> np.ndarray:
    """Which part of each cell's area a region covers, `(h, w)` from 0 to 1.

    It is exact, also where the borders of cells run through pixels, so that the mean over the cells
    is the mean over the pixels.

    Args:
        mask: `(H, W)` bool.
        grid: h and w.
    """
    rows, columns = (_overlaps(n, cells) for n, cells in zip(mask.shape, grid, strict=True))
    return rows @ mask @ columns.T


def _overlaps(pixels: int, cells: int) -> np.ndarray:
    """`(cells, pixels)` which part of each cell of a side each pixel covers; rows sum to 1."""
    edges = np.arange(cells + 1)[:, None] * pixels / cells
    starts = np.arange(pixels)
    lengths = np.minimum(edges[1:], starts + 1) - np.maximum(edges[:-1], starts)
    return lengths.clip(min=0) * cells / pixels


def find_shortcuts(shares: Sequence[ShortcutShare]) -> list[ShortcutShare]:
    """Those for which the bell rings.

    The rule: the region is at least twice as relevant as an even map would make it, and the 95 %
    interval by patient lies above 1.5; less is asked of grids too coarse for that
    (`ShortcutShare.thresholds`). The interval keeps two clips of one patient from ringing it, the
    ratio keeps many clips with a small effect from it.
    """
    return [share for share in shares if share.verdict == "look"]


def write_shares(path: str | Path, shares: Sequence[ShortcutShare]) -> None:
    """Write the shares as a CSV, a row for each class and region."""
    rows: list[list[object]] = [
        ["class", "region", "clips", "share", "area", "ratio", "low", "high", "verdict"]
    ]
    for share in shares:
        numbers = [share.share, share.area, share.ratio, *(share.interval or (np.nan, np.nan))]
        cells = ["" if np.isnan(number) else f"{number:.6g}" for number in numbers]
        rows.append([share.label, share.region, len(share.shares), *cells, share.verdict])
    write_csv(path, rows)


def shortcut_table(shares: Sequence[ShortcutShare]) -> str:
    """The shares as a table for the terminal, a line for each class and region."""
    header = ["class", "region", "clips", "share", "area", "ratio", "95 % interval", "verdict"]
    rows = [
        [
            share.label,
            share.region,
            str(len(share.shares)),
            _percent(share.share),
            _percent(share.area),
            "-" if np.isnan(share.ratio) else f"{share.ratio:.2f}",
            format_interval(share.interval, ".2f"),
            share.verdict,
        ]
        for share in shares
    ]
    return text_table([header, *rows])


def _percent(fraction: float) -> str:
    return "-" if np.isnan(fraction) else f"{100 * fraction:.1f} %"
