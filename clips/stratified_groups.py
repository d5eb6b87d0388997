"""Dividing clips among splits or folds: whole patients, each class as evenly as can be."""

import warnings
from collections.abc import Hashable, Iterator, Mapping

import numpy as np

from utils.errors import UserError

STARTS = 10  # random divisions that are improved besides scikit-learn's

_MOST_GROUPS = 300  # beyond, groups balance by themselves, and improving them takes long

_TRAINED, _JUDGED = 10.0, 1.0  # what a class costs that is absent from train, from another part

_EMPTY = 1e6  # what a part without any clip costs


def divide(
    labels: np.ndarray, groups: np.ndarray, shares: Mapping[Hashable, float], seed: int = 0
) -> np.ndarray:
    """The part of each clip, no group in two parts.

    Starts are scikit-learn's StratifiedGroupKFold and random divisions; each is improved by moving
    one group, or swapping two, as long as that helps. What counts is `imbalance`, and before it
    that every class is in every part (in `train` above all). With as many equal parts as groups
    each group is a part, in the order of their names.

    Args:
        labels, groups: `(N,)` classes and names of groups.
        shares: what share of the clips each part is to have; they sum to one.

    Returns:
        `(N,)` of the keys of `shares`; the same for the same arguments.

    Raises:
        UserError: there are fewer groups than parts.
    """
    parts = np.array(list(shares), object)
    names, number = np.unique(groups, return_inverse=True)
    if len(names) < len(parts):
        raise UserError(f"{len(names)} patients (or other groups) cannot fill {len(parts)} parts")
    wanted = np.array(list(shares.values()))
    equal = np.allclose(wanted, wanted[0])
    if len(names) == len(parts) and equal:
        return parts[number]
    classes, label = np.unique(labels, return_inverse=True)
    counts = np.zeros((len(names), len(classes)), int)  # clips of each group and class
    np.add.at(counts, (number, label), 1)
    cost = _Cost(counts.sum(axis=0), shares)
    best, least = None, np.inf
    for start in _starts(label, number, wanted, equal, seed):
        chosen = _improve(counts, start, cost) if len(names) <= _MOST_GROUPS else start
        left = cost(cost.totals(counts, chosen)).sum()
        if left < least and len(set(chosen)) == len(parts):
            best, least = chosen, left
    if best is None:
        raise UserError("no division gives each part a patient: choose fewer parts")
    return parts[best[number]]


def imbalance(labels: np.ndarray, parts: np.ndarray, shares: Mapping[Hashable, float]) -> float:
    """The share of a class's clips that sit in the wrong part, as a mean over the classes.

    Zero if each part has its share of each class. Every class counts alike, however rare.
    """
    classes, numbers = np.unique(labels, return_inverse=True)
    chosen = [numbers[parts == part] for part in shares]
    counts = np.array([np.bincount(some, minlength=len(classes)) for some in chosen])
    sizes = counts.sum(axis=0)  # (classes,); counts is (parts, classes)
    wanted = np.outer(list(shares.values()), sizes)
    return float((np.abs(counts - wanted).sum(axis=0) / 2 / sizes).mean())


def absent(labels: np.ndarray, parts: np.ndarray, part: str) -> list[str]:
    """The classes without a clip in a part."""
    return np.setdiff1d(labels, labels[parts == part]).tolist()


class _Cost:
    """What a division costs: `imbalance`, part by part and class by class, and absent classes."""

    def __init__(self, sizes: np.ndarray, shares: Mapping[Hashable, float]) -> None:
        self.sizes = sizes
        self.wanted = np.outer(list(shares.values()), sizes)  # (parts, classes)
        self.missing = np.array([_TRAINED if part == "train" else _JUDGED for part in shares])

    def totals(self, counts: np.ndarray, chosen: np.ndarray) -> np.ndarray:
        """`(parts, classes)` clips, of `(groups, classes)` clips and each group's part."""
        totals = np.zeros(self.wanted.shape, int)
        np.add.at(totals, chosen, counts)
        return totals

    def __call__(self, totals: np.ndarray, part: np.ndarray | slice = slice(None)) -> np.ndarray:
        """The cost `(...)` of parts that have `(..., classes)` clips."""
        wrong = np.abs(totals - self.wanted[part]) / 2 / self.sizes / len(self.sizes)
        absent = self.missing[part] * (totals == 0).sum(axis=-1)
        return wrong.sum(axis=-1) + absent + _EMPTY * (totals.sum(axis=-1) == 0)


def _starts(
    label: np.ndarray, number: np.ndarray, shares: np.ndarray, equal: bool, seed: int
) -> Iterator[np.ndarray]:
    """Divisions to improve: the part of each group, `(groups,)`."""
    groups = int(number.max()) + 1
    edges = np.cumsum(shares)[:-1]
    most = np.bincount(label).max()  # scikit-learn refuses more folds than the largest class has
    folds = len(shares) if equal else min(20, groups, most)  # of which unequal parts take several
    if 2 <= folds <= most:
        # Here, because importing it takes longer than the other work of most who import this file.
        from sklearn.model_selection import StratifiedGroupKFold

        splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
        chosen = np.zeros(groups, int)
        with warnings.catch_warnings():  # of classes rarer than folds
            warnings.simplefilter("ignore", UserWarning)
            for fold, (_, test) in enumerate(splitter.split(label, label, number)):
                chosen[number[test]] = np.searchsorted(edges, (fold + 0.5) / folds)
        yield chosen
    sizes = np.bincount(number)
    rng = np.random.default_rng(seed)
    for _ in range(STARTS):
        order = rng.permutation(groups)
        middles = (np.cumsum(sizes[order]) - sizes[order] / 2) / len(number)
        chosen = np.empty(groups, int)
        chosen[order] = np.searchsorted(edges, middles)
        yield chosen


def _improve(counts: np.ndarray, chosen: np.ndarray, cost: _Cost) -> np.ndarray:
    """Move single groups and swap pairs, always the one that helps most, until none does."""
    chosen = chosen.copy()
    groups, parts = len(counts), len(cost.wanted)
    everyone = np.arange(groups)
    while True:
        totals = cost.totals(counts, chosen)
        now = cost(totals)  # (parts,)
        left = totals[chosen] - counts  # (groups, classes): a group's part without it
        leaving = cost(left, chosen) - now[chosen]  # (groups,)
        joined = cost(totals + counts[:, None]) - now  # (groups, parts)
        moves = leaving[:, None] + joined
        moves[everyone, chosen] = 0
        swapped = cost(left[:, None] + counts, chosen[:, None]) - now[chosen][:, None]
        swaps = swapped + swapped.T  # (groups, groups)
        swaps[chosen[:, None] == chosen] = 0
        if min(moves.min(), swaps.min()) > -1e-9:
            return chosen
        if moves.min() <= swaps.min():
            group, part = divmod(int(moves.argmin()), parts)
            chosen[group] = part
        else:
            one, other = divmod(int(swaps.argmin()), groups)
            chosen[[one, other]] = chosen[[other, one]]
