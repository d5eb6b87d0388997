"""Metrics against cases worked out by hand, and against scikit-learn where it has no edge case."""

import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score, f1_score

from metrics import confusion_matrix, per_class, summarize


def test_hand_computed_case() -> None:
    #          truth  a a a a b b c      said  a a a b b a a
    labels, said = np.array([0, 0, 0, 0, 1, 1, 2]), np.array([0, 0, 0, 1, 1, 0, 0])
    matrix = confusion_matrix(labels, said, 3)
    assert matrix.tolist() == [[3, 1, 0], [1, 1, 0], [1, 0, 0]]
    table = per_class(matrix, "abc")
    assert table["precision"].tolist() == pytest.approx([3 / 5, 1 / 2, 0])
    assert table["recall"].tolist() == pytest.approx([3 / 4, 1 / 2, 0])
    assert table["f1"].tolist() == pytest.approx([2 / 3, 1 / 2, 0])
    assert table["support"].tolist() == [4, 2, 1]
    summary = summarize(matrix, "abc")
    assert summary["accuracy"] == pytest.approx(4 / 7)
    assert summary["balanced_accuracy"] == pytest.approx((3 / 4 + 1 / 2 + 0) / 3)
    assert summary["macro_f1"] == pytest.approx((2 / 3 + 1 / 2 + 0) / 3)
    assert summary["chance_accuracy"] == pytest.approx(4 / 7)


def test_absent_class_is_left_out_not_zero() -> None:
    """Class c has no clip, but one clip of b is called c."""
    matrix = confusion_matrix(np.array([0, 0, 1, 1]), np.array([0, 0, 1, 2]), 3)
    table = per_class(matrix, "abc")
    assert np.isnan(table.loc["c", ["precision", "recall", "f1"]].astype(float)).all()
    summary = summarize(matrix, "abc")
    assert summary["classes_present"] == 2
    assert summary["balanced_accuracy"] == pytest.approx((1 + 1 / 2) / 2)
    assert summary["macro_f1"] == pytest.approx((1 + 2 / 3) / 2)
    silent_zero = f1_score([0, 0, 1, 1], [0, 0, 1, 2], average="macro", labels=[0, 1, 2])
    assert summary["macro_f1"] > silent_zero


def test_equals_scikit_learn_when_all_classes_are_there() -> None:
    rng = np.random.default_rng(0)
    labels, said = rng.integers(0, 7, 500), rng.integers(0, 7, 500)
    summary = summarize(confusion_matrix(labels, said, 7), "abcdefg")
    assert summary["macro_f1"] == pytest.approx(f1_score(labels, said, average="macro"))
    assert summary["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(labels, said))
