"""Stratified group split: patients stay together, balance is near the optimum, repeatable."""

from itertools import product

import numpy as np
import pytest
from sklearn.model_selection import StratifiedGroupKFold

from clips.stratified_groups import class_imbalance, missing_classes, stratified_group_split
from utils.errors import UserError

FRACTIONS = {"train": 0.7, "val": 0.15, "test": 0.15}


def data_set(seed: int, patients: int = 20) -> tuple[np.ndarray, np.ndarray]:
    """Labels and patients of clips: three unequal classes, patients of different sizes."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(3, 30, patients)
    groups = np.repeat([f"p{number:02d}" for number in range(patients)], sizes)
    return rng.choice(["a", "b", "c"], len(groups), p=[0.6, 0.3, 0.1]), groups


def test_imbalance_by_hand() -> None:
    labels = np.array(["a"] * 4 + ["b"] * 2)
    halves = {0: 0.5, 1: 0.5}
    assert class_imbalance(labels, np.array([0, 0, 1, 1, 0, 1]), halves) == 0
    # a: 3 and 1 instead of 2 and 2, one of four is wrong; b: 2 and 0, one of two is wrong
    skewed = np.array([0, 0, 0, 1, 0, 0])
    assert class_imbalance(labels, skewed, halves) == pytest.approx((1 / 4 + 1 / 2) / 2)
    # 3/4 and 1/4 wanted: a is right, b has 2 and 0 instead of 1.5 and 0.5
    assert class_imbalance(labels, skewed, {0: 0.75, 1: 0.25}) == pytest.approx((0 + 0.5 / 2) / 2)


def test_absent_classes() -> None:
    labels, splits = np.array(["a", "b", "a"]), np.array(["train", "test", "test"])
    assert missing_classes(labels, splits, "train") == ["b"]
    assert missing_classes(labels, splits, "test") == []


@pytest.mark.parametrize("seed", range(5))
def test_three_parts_share_no_patient_and_are_balanced(seed: int) -> None:
    labels, groups = data_set(seed)
    splits = stratified_group_split(labels, groups, FRACTIONS)
    patients = [set(groups[splits == split]) for split in FRACTIONS]
    assert sum(map(len, patients)) == 20
    assert all(patients)
    for split, fraction in FRACTIONS.items():
        assert missing_classes(labels, splits, split) == []
        assert abs((splits == split).mean() - fraction) < 0.06
    assert class_imbalance(labels, splits, FRACTIONS) < 0.06
    assert (stratified_group_split(labels, groups, FRACTIONS) == splits).all()


@pytest.mark.parametrize("seed", range(4))
def test_nothing_better_is_found_by_trying_everything(seed: int) -> None:
    """Against all 3^8 divisions of eight patients."""
    labels, groups = data_set(seed, patients=8)
    fractions = {"train": 0.5, "val": 0.25, "test": 0.25}
    _, number = np.unique(groups, return_inverse=True)
    names = np.array(list(fractions), object)
    scored = []
    for choice in product(range(3), repeat=8):
        splits = names[np.array(choice)[number]]
        if set(choice) == {0, 1, 2}:
            missing = sum(len(missing_classes(labels, splits, split)) for split in fractions)
            scored.append((missing, class_imbalance(labels, splits, fractions)))
    splits = stratified_group_split(labels, groups, fractions)
    missing = sum(len(missing_classes(labels, splits, split)) for split in fractions)
    assert missing == min(scored)[0]
    assert class_imbalance(labels, splits, fractions) <= min(scored)[1] + 0.01


@pytest.mark.parametrize("seed", range(3))
def test_folds_are_better_balanced_than_scikit_learn_alone(seed: int) -> None:
    labels, groups = data_set(seed)
    wanted = dict.fromkeys(range(5), 0.2)
    numbers = stratified_group_split(labels, groups, wanted)
    plain = np.empty(len(labels), int)
    folds = StratifiedGroupKFold(5, shuffle=True, random_state=0).split(labels, labels, groups)
    for fold, (_, test) in enumerate(folds):
        plain[test] = fold
    assert class_imbalance(labels, numbers, wanted) < class_imbalance(labels, plain, wanted)
    assert sum(len(set(groups[numbers == fold])) for fold in range(5)) == 20


def test_many_groups_and_one_rare_class() -> None:
    """More groups than are improved one by one; the rare class is learnt at least."""
    labels, groups = data_set(0, patients=400)
    labels[groups == "p00"] = "r"
    splits = stratified_group_split(labels, groups, FRACTIONS)
    assert class_imbalance(labels[labels != "r"], splits[labels != "r"], FRACTIONS) < 0.03
    few_labels, few_groups = data_set(1, patients=10)
    few_labels[few_groups == "p03"] = "r"
    splits = stratified_group_split(few_labels, few_groups, FRACTIONS)
    assert set(splits[few_labels == "r"]) == {"train"}


def test_as_many_parts_as_patients_leave_each_out_once() -> None:
    labels, groups = data_set(0, patients=5)
    numbers = stratified_group_split(labels, groups, dict.fromkeys(range(5), 0.2))
    assert [set(groups[numbers == fold]) for fold in range(5)] == [{f"p0{n}"} for n in range(5)]
    with pytest.raises(UserError, match="5 patients"):
        stratified_group_split(labels, groups, dict.fromkeys(range(6), 1 / 6))


def test_small_classes_are_divided_too() -> None:
    """Fewer clips in every class than scikit-learn's folds would be."""
    groups = np.repeat([f"p{n:02d}" for n in range(20)], 4)[:70]
    labels = np.tile(list("abcdefg"), 10)
    splits = stratified_group_split(labels, groups, FRACTIONS)
    assert set(splits) == {"train", "val", "test"}
    few = stratified_group_split(
        np.repeat(list("abcd"), 4), np.arange(16) % 12, dict.fromkeys(range(5), 0.2)
    )
    assert set(few) == set(range(5))


def test_three_patients_for_three_unequal_parts() -> None:
    """The small one is not what is trained on."""
    groups = np.repeat(["p1", "p2", "p3"], [2, 50, 51])
    labels = np.tile(["a", "b"], 60)[: len(groups)]
    splits = stratified_group_split(labels, groups, FRACTIONS)
    assert set(groups[splits == "train"]) <= {"p2", "p3"}
    assert set(splits) == {"train", "val", "test"}
