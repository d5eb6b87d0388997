"""dividing.py: nobody in two parts, as balanced as an exhaustive search, the same every time."""

from itertools import product

import numpy as np
import pytest
from sklearn.model_selection import StratifiedGroupKFold

from clips.stratified_groups import absent, divide, imbalance
from utils.errors import UserError

SHARES = {"train": 0.7, "val": 0.15, "test": 0.15}


def data_set(seed: int, patients: int = 20) -> tuple[np.ndarray, np.ndarray]:
    """Labels and patients of clips: three unequal classes, patients of different sizes."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(3, 30, patients)
    groups = np.repeat([f"p{number:02d}" for number in range(patients)], sizes)
    return rng.choice(["a", "b", "c"], len(groups), p=[0.6, 0.3, 0.1]), groups


def test_imbalance_by_hand() -> None:
    labels = np.array(["a"] * 4 + ["b"] * 2)
    halves = {0: 0.5, 1: 0.5}
    assert imbalance(labels, np.array([0, 0, 1, 1, 0, 1]), halves) == 0
    # a: 3 and 1 instead of 2 and 2, one of four is wrong; b: 2 and 0, one of two is wrong
    skewed = np.array([0, 0, 0, 1, 0, 0])
    assert imbalance(labels, skewed, halves) == pytest.approx((1 / 4 + 1 / 2) / 2)
    # 3/4 and 1/4 wanted: a is right, b has 2 and 0 instead of 1.5 and 0.5
    assert imbalance(labels, skewed, {0: 0.75, 1: 0.25}) == pytest.approx((0 + 0.5 / 2) / 2)


def test_absent_classes() -> None:
    labels, parts = np.array(["a", "b", "a"]), np.array(["train", "test", "test"])
    assert absent(labels, parts, "train") == ["b"]
    assert absent(labels, parts, "test") == []


@pytest.mark.parametrize("seed", range(5))
def test_three_parts_share_no_patient_and_are_balanced(seed: int) -> None:
    labels, groups = data_set(seed)
    parts = divide(labels, groups, SHARES)
    patients = [set(groups[parts == part]) for part in SHARES]
    assert sum(map(len, patients)) == 20
    assert all(patients)
    for part, share in SHARES.items():
        assert absent(labels, parts, part) == []
        assert abs((parts == part).mean() - share) < 0.06
    assert imbalance(labels, parts, SHARES) < 0.06
    assert (divide(labels, groups, SHARES) == parts).all()


@pytest.mark.parametrize("seed", range(4))
def test_nothing_better_is_found_by_trying_everything(seed: int) -> None:
    """Against all 3^8 divisions of eight patients."""
    labels, groups = data_set(seed, patients=8)
    shares = {"train": 0.5, "val": 0.25, "test": 0.25}
    _, number = np.unique(groups, return_inverse=True)
    names = np.array(list(shares), object)
    scored = []
    for choice in product(range(3), repeat=8):
        parts = names[np.array(choice)[number]]
        if set(choice) == {0, 1, 2}:
            missing = sum(len(absent(labels, parts, part)) for part in shares)
            scored.append((missing, imbalance(labels, parts, shares)))
    found = divide(labels, groups, shares)
    missing = sum(len(absent(labels, found, part)) for part in shares)
    assert missing == min(scored)[0]
    assert imbalance(labels, found, shares) <= min(scored)[1] + 0.01


@pytest.mark.parametrize("seed", range(3))
def test_folds_are_better_balanced_than_scikit_learn_alone(seed: int) -> None:
    labels, groups = data_set(seed)
    wanted = dict.fromkeys(range(5), 0.2)
    numbers = divide(labels, groups, wanted)
    plain = np.empty(len(labels), int)
    folds = StratifiedGroupKFold(5, shuffle=True, random_state=0).split(labels, labels, groups)
    for fold, (_, test) in enumerate(folds):
        plain[test] = fold
    assert imbalance(labels, numbers, wanted) < imbalance(labels, plain, wanted)
    assert sum(len(set(groups[numbers == fold])) for fold in range(5)) == 20


def test_many_groups_and_one_rare_class() -> None:
    """More groups than are improved one by one; the rare class is learnt at least."""
    labels, groups = data_set(0, patients=400)
    labels[groups == "p00"] = "r"
    parts = divide(labels, groups, SHARES)
    assert imbalance(labels[labels != "r"], parts[labels != "r"], SHARES) < 0.03
    few_labels, few_groups = data_set(1, patients=10)
    few_labels[few_groups == "p03"] = "r"
    parts = divide(few_labels, few_groups, SHARES)
    assert set(parts[few_labels == "r"]) == {"train"}


def test_as_many_parts_as_patients_leave_each_out_once() -> None:
    labels, groups = data_set(0, patients=5)
    numbers = divide(labels, groups, dict.fromkeys(range(5), 0.2))
    assert [set(groups[numbers == fold]) for fold in range(5)] == [{f"p0{n}"} for n in range(5)]
    with pytest.raises(UserError, match="5 patients"):
        divide(labels, groups, dict.fromkeys(range(6), 1 / 6))


def test_small_classes_are_divided_too() -> None:
    """Fewer clips in every class than scikit-learn's folds would be."""
    groups = np.repeat([f"p{n:02d}" for n in range(20)], 4)[:70]
    labels = np.tile(list("abcdefg"), 10)
    parts = divide(labels, groups, SHARES)
    assert set(parts) == {"train", "val", "test"}
    few = divide(np.repeat(list("abcd"), 4), np.arange(16) % 12, dict.fromkeys(range(5), 0.2))
    assert set(few) == set(range(5))


def test_three_patients_for_three_unequal_parts() -> None:
    """The small one is not what is trained on."""
    groups = np.repeat(["p1", "p2", "p3"], [2, 50, 51])
    labels = np.tile(["a", "b"], 60)[: len(groups)]
    parts = divide(labels, groups, SHARES)
    assert set(groups[parts == "train"]) <= {"p2", "p3"}
    assert set(parts) == {"train", "val", "test"}
