"""Stratified group split: balanced splits or folds of clips that share no patient."""

import warnings
from collections.abc import Hashable, Iterator, Mapping

import numpy as np

from utils.errors import UserError

N_RESTARTS = 10  # random divisions that are improved, beside that of scikit-learn
_MAX_GROUPS = 300  # more groups balance each other, and improving them would take long

# Costs of a class that is missing in train, of one missing in another split, of an empty split.
_MISSING_IN_TRAIN, _MISSING, _EMPTY = 10.0, 1.0, 1e6


def stratified_group_split(
    labels: np.ndarray, groups: np.ndarray, fractions: Mapping[Hashable, float], seed: int = 0
) -> np.ndarray:
    """The split of each clip. No group is in two splits.

    The search starts from scikit-learn's StratifiedGroupKFold and from random divisions. Each is
    improved by moving one group or swapping two, as long as that lowers the cost. Most expensive is
    a class that is missing in a split (above all in `train`); after that `class_imbalance` counts.
    With as many equal splits as groups, each group is a split, in the order of the groups' names.

    Args:
        labels, groups: `(N,)` classes and names of groups.
        fractions: fraction of the clips that each split should have; they sum to 1.

    Returns:
        `(N,)` keys of `fractions`. The same arguments give the same result.

    Raises:
        UserError: there are fewer groups than splits.
    """
    splits = np.array(list(fractions), object)
    names, group_index = np.unique(groups, return_inverse=True)
    if len(names) < len(splits):
        raise UserError(
            f"{len(names)} patients (or other groups) cannot fill {len(splits)} splits or folds"
        )
    target = np.array(list(fractions.values()))
    equal = np.allclose(target, target[0])
    if len(names) == len(splits) and equal:
        return splits[group_index]
    classes, class_index = np.unique(labels, return_inverse=True)
    counts = np.zeros((len(names), len(classes)), int)  # clips per group and class
    np.add.at(counts, (group_index, class_index), 1)
    cost = _Cost(counts.sum(axis=0), fractions)
    best, best_cost = None, np.inf
    for start in _starts(class_index, group_index, target, equal, seed):
        chosen = _improve(counts, start, cost) if len(names) <= _MAX_GROUPS else start
        chosen_cost = cost(cost.totals(counts, chosen)).sum()
        if chosen_cost < best_cost and len(set(chosen)) == len(splits):
            best, best_cost = chosen, chosen_cost
    if best is None:
        raise UserError("no division gives each split a patient: choose fewer splits or folds")
    return splits[best[group_index]]


def class_imbalance(
    labels: np.ndarray, splits: np.ndarray, fractions: Mapping[Hashable, float]
) -> float:
    """The fraction of a class's clips that are in the wrong split, as a mean over the classes.

    It is 0 if each split has its fraction of each class. Every class counts the same, however rare.
    """
    classes, class_index = np.unique(labels, return_inverse=True)
    counts = np.array(
        [np.bincount(class_index[splits == split], minlength=len(classes)) for split in fractions]
    )  # (splits, classes)
    sizes = counts.sum(axis=0)  # (classes,)
    target = np.outer(list(fractions.values()), sizes)
    return float((np.abs(counts - target).sum(axis=0) / 2 / sizes).mean())


def missing_classes(labels: np.ndarray, splits: np.ndarray, split: str) -> list[str]:
    """The classes without a clip in a split."""
    return np.setdiff1d(labels, labels[splits == split]).tolist()


class _Cost:
    """The cost of a division: its `class_imbalance`, and missing classes.

    Args:
        sizes: `(classes,)` number of clips.
        fractions: fraction of the clips that each split should have.
    """

    def __init__(self, sizes: np.ndarray, fractions: Mapping[Hashable, float]) -> None:
        self.sizes = sizes
        self.target = np.outer(list(fractions.values()), sizes)  # (splits, classes)
        self.missing = np.array(
            [_MISSING_IN_TRAIN if split == "train" else _MISSING for split in fractions]
        )

    def totals(self, counts: np.ndarray, chosen: np.ndarray) -> np.ndarray:
        """`(splits, classes)` clips, from `(groups, classes)` clips and the split of each group."""
        totals = np.zeros(self.target.shape, int)
        np.add.at(totals, chosen, counts)
        return totals

    def __call__(self, totals: np.ndarray, split: np.ndarray | slice = slice(None)) -> np.ndarray:
        """The cost `(...)` of splits with `(..., classes)` clips."""
        wrong = np.abs(totals - self.target[split]) / 2 / self.sizes / len(self.sizes)
        missing = self.missing[split] * (totals == 0).sum(axis=-1)
        return wrong.sum(axis=-1) + missing + _EMPTY * (totals.sum(axis=-1) == 0)


def _starts(
    class_index: np.ndarray, group_index: np.ndarray, target: np.ndarray, equal: bool, seed: int
) -> Iterator[np.ndarray]:
    """Divisions to improve: the number of the split of each group, `(groups,)`."""
    n_groups = int(group_index.max()) + 1
    edges = np.cumsum(target)[:-1]
    largest = np.bincount(class_index).max()  # scikit-learn allows at most this many folds
    # Unequal splits take several of many small folds.
    folds = len(target) if equal else min(20, n_groups, largest)
    if 2 <= folds <= largest:
        from sklearn.model_selection import StratifiedGroupKFold  # slow to import

        splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
        chosen = np.zeros(n_groups, int)
        with warnings.catch_warnings():  # about classes with fewer clips than folds
            warnings.simplefilter("ignore", UserWarning)
            folds_of_clips = splitter.split(class_index, class_index, group_index)
            for fold, (_, test) in enumerate(folds_of_clips):
                chosen[group_index[test]] = np.searchsorted(edges, (fold + 0.5) / folds)
        yield chosen
    sizes = np.bincount(group_index)
    rng = np.random.default_rng(seed)
    for _ in range(N_RESTARTS):
        order = rng.permutation(n_groups)
        middles = (np.cumsum(sizes[order]) - sizes[order] / 2) / len(group_index)
        chosen = np.empty(n_groups, int)
        chosen[order] = np.searchsorted(edges, middles)
        yield chosen


def _improve(counts: np.ndarray, chosen: np.ndarray, cost: _Cost) -> np.ndarray:
    """Move one group or swap two, always the change that lowers the cost most, until none does.

    Args:
        counts: `(groups, classes)` clips.
        chosen: `(groups,)` number of the split of each group.
    """
    chosen = chosen.copy()
    n_groups, n_splits = len(counts), len(cost.target)
    while True:
        totals = cost.totals(counts, chosen)
        current = cost(totals)  # (splits,)
        without = totals[chosen] - counts  # (groups, classes): the split of a group without it
        leaving = cost(without, chosen) - current[chosen]  # (groups,)
        joining = cost(totals + counts[:, None]) - current  # (groups, splits)
        moves = leaving[:, None] + joining
        moves[np.arange(n_groups), chosen] = 0
        replaced = cost(without[:, None] + counts, chosen[:, None]) - current[chosen][:, None]
        swaps = replaced + replaced.T  # (groups, groups)
        swaps[chosen[:, None] == chosen] = 0
        if min(moves.min(), swaps.min()) > -1e-9:
            return chosen
        if moves.min() <= swaps.min():
            group, split = divmod(int(moves.argmin()), n_splits)
            chosen[group] = split
        else:
            first, second = divmod(int(swaps.argmin()), n_groups)
            chosen[[first, second]] = chosen[[second, first]]
