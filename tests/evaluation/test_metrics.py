"""Metrics against cases worked out by hand, and against scikit-learn where it has no edge case."""

import itertools

import numpy as np
import pytest
from sklearn.metrics import (
    average_precision_score,
    balanced_accuracy_score,
    cohen_kappa_score,
    f1_score,
    precision_recall_curve,
    top_k_accuracy_score,
)

from evaluation.bootstrap import score_intervals
from evaluation.metrics import (
    MORE_SCORES,
    area_under_risk_coverage,
    average_by_action,
    average_precision,
    brier_scores,
    calibration_curve,
    confusion_matrix,
    expected_calibration_error,
    grouped_scores,
    per_class,
    per_sample_nll,
    precision_recall,
    risk_coverage,
    scores,
    selective_risk,
    summarize,
    top_k_accuracy,
)


def objects(*names: str | None) -> np.ndarray:
    """As `Predictions.groups` returns them: None where a name is unknown."""
    array = np.empty(len(names), object)
    array[:] = names
    return array


def test_hand_computed_case() -> None:
    #          truth  a a a a b b c  predicted  a a a b b a a
    labels, y_pred = np.array([0, 0, 0, 0, 1, 1, 2]), np.array([0, 0, 0, 1, 1, 0, 0])
    matrix = confusion_matrix(labels, y_pred, 3)
    assert matrix.tolist() == [[3, 1, 0], [1, 1, 0], [1, 0, 0]]
    table = per_class(matrix, "abc")
    assert table["precision"].tolist() == pytest.approx([3 / 5, 1 / 2, 0])
    assert table["recall"].tolist() == pytest.approx([3 / 4, 1 / 2, 0])
    assert table["f1"].tolist() == pytest.approx([2 / 3, 1 / 2, 0])
    assert table["clips"].tolist() == [4, 2, 1]
    summary = summarize(matrix)
    assert summary["accuracy"] == pytest.approx(4 / 7)
    assert summary["balanced_accuracy"] == pytest.approx((3 / 4 + 1 / 2 + 0) / 3)
    assert summary["macro_f1"] == pytest.approx((2 / 3 + 1 / 2 + 0) / 3)
    assert summary["majority_baseline"] == pytest.approx(4 / 7)
    assert (summary["classes_present"], summary["clips"]) == (3, 7)


def test_absent_class_is_left_out_not_zero() -> None:
    """Class c has no clip, but one clip of b is called c."""
    matrix = confusion_matrix(np.array([0, 0, 1, 1]), np.array([0, 0, 1, 2]), 3)
    table = per_class(matrix, "abc")
    assert np.isnan(table.loc["c", ["precision", "recall", "f1"]].astype(float)).all()
    summary = summarize(matrix)
    assert summary["classes_present"] == 2
    assert summary["balanced_accuracy"] == pytest.approx((1 + 1 / 2) / 2)
    assert summary["macro_f1"] == pytest.approx((1 + 2 / 3) / 2)
    silent_zero = f1_score([0, 0, 1, 1], [0, 0, 1, 2], average="macro", labels=[0, 1, 2])
    assert summary["macro_f1"] > silent_zero


def test_equals_scikit_learn_when_all_classes_are_there() -> None:
    rng = np.random.default_rng(0)
    labels, y_pred = rng.integers(0, 7, 500), rng.integers(0, 7, 500)
    summary = summarize(confusion_matrix(labels, y_pred, 7))
    assert summary["macro_f1"] == pytest.approx(f1_score(labels, y_pred, average="macro"))
    assert summary["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(labels, y_pred))


def test_confusion_matrix_has_all_classes_although_the_last_has_no_clip() -> None:
    assert confusion_matrix(np.array([0, 1]), np.array([1, 1]), 3).tolist() == [
        [0, 1, 0],
        [0, 1, 0],
        [0, 0, 0],
    ]


def test_scores_of_many_matrices_are_those_of_each() -> None:
    rng = np.random.default_rng(1)
    matrices = rng.integers(0, 4, (2, 6, 3, 3))
    matrices[0, 0, 2] = 0  # no clip of the last class
    matrices[1, 3, :, 1] = 0  # the second class is never predicted
    matrices[1, 4, :2] = 0  # clips of one class alone
    batched = scores(matrices)
    for index in np.ndindex(2, 6):
        alone = summarize(matrices[index])
        for name in ("accuracy", "balanced_accuracy", "macro_f1"):
            assert batched[name].shape == (2, 6)
            assert batched[name][index] == pytest.approx(alone[name], abs=1e-15), (name, index)


def test_scores_do_not_depend_on_the_scale_of_the_weights() -> None:
    matrix = np.array([[3, 1, 0], [1, 1, 0], [1, 0, 0]])
    for name, value in scores(matrix / 7).items():
        assert value == pytest.approx(float(scores(matrix)[name])), name


def test_per_class_counts_known_patients() -> None:
    labels = np.array([0, 0, 0, 1, 1, 1])
    patients = objects("x", "x", "y", "x", None, None)
    matrix = confusion_matrix(labels, labels, 3)
    table = per_class(matrix, "abc", labels, patients)
    # a: x and y; b: x, and two clips of unknown patients; c: no clip at all
    assert table["patients"].tolist() == [2, 1, 0]
    assert table["clips"].tolist() == [3, 3, 0]
    assert "patients" not in per_class(matrix, "abc")
    unknown = per_class(matrix, "abc", labels, objects(*[None] * 6))
    assert unknown["patients"].tolist() == [0, 0, 0]


def test_every_group_counts_the_same() -> None:
    #                   x x x x  y y  z    two clips of an unknown group
    groups = objects("x", "x", "x", "x", "y", "y", "z", None, None)
    labels = np.array([0, 0, 0, 1, 0, 1, 2, 0, 0])
    y_pred = np.array([0, 0, 0, 0, 1, 1, 2, 1, 1])
    found = grouped_scores(groups, labels, y_pred, 3)
    # x: 3 of 4 correct; recalls 1 and 0; F1 of a 2*3/(3+4) = 6/7, of b 0; c is absent
    # y: 1 of 2 correct; recalls 0 and 1; F1 of a 0, of b 2*1/(1+2) = 2/3; c is absent
    # z: 1 of 1 correct; recall 1; F1 of c 1; a and b are absent
    assert found == {
        "accuracy": pytest.approx((3 / 4 + 1 / 2 + 1) / 3),
        "balanced_accuracy": pytest.approx((1 / 2 + 1 / 2 + 1) / 3),
        "macro_f1": pytest.approx((3 / 7 + 1 / 3 + 1) / 3),
        "worst_accuracy": pytest.approx(1 / 2),
        "groups": 3,
    }


def test_averages_over_unknown_groups_are_empty() -> None:
    assert grouped_scores(objects(None, None), np.array([0, 1]), np.array([0, 1]), 2) == {}


def test_an_action_gets_the_mean_of_its_parts() -> None:
    actions = objects("x", "y", "x", None, "x", "x")
    labels = np.array([0, 1, 0, 1, 1, 0])
    probabilities = np.array(
        [[0.9, 0.1], [0.3, 0.7], [0.4, 0.6], [0.0, 1.0], [0.2, 0.8], [0.5, 0.5]]
    )
    action_labels, means = average_by_action(actions, labels, probabilities)
    found = sorted((int(label), *row) for label, row in zip(action_labels, means, strict=True))
    expected = [
        (0, (0.9 + 0.4 + 0.5) / 3, (0.1 + 0.6 + 0.5) / 3),  # x, class 0: three parts
        (1, 0.2, 0.8),  # x again, but of class 1: another action
        (1, 0.3, 0.7),  # y; the clip of an unknown action is in none of them
    ]
    assert np.allclose(found, expected, atol=1e-12)
    assert len(found) == 3


def test_without_known_actions_there_is_no_average() -> None:
    labels, probabilities = average_by_action(
        objects(None, None), np.array([0, 1]), np.full((2, 3), 1 / 3)
    )
    assert labels.shape == (0,)
    assert probabilities.shape == (0, 3)


def test_per_sample_nll_by_hand() -> None:
    labels = np.array([0, 1, 0])
    probabilities = np.array([[0.5, 0.5], [0.75, 0.25], [0.0, 1.0]])
    losses = per_sample_nll(labels, probabilities)
    # certain and wrong is not infinite: 12 powers of ten are 12 * ln 10 = 27.63 nats
    assert losses.tolist() == pytest.approx([np.log(2), np.log(4), 12 * np.log(10)])


def test_brier_scores_by_hand() -> None:
    labels = np.array([0, 0, 0, 1])
    probabilities = np.array([[1, 0, 0], [0, 1, 0], [0.5, 0.25, 0.25], [0.5, 0.25, 0.25]])
    # perfect; certain and wrong, 1 + 1; 0.5² + 0.25² + 0.25²; 0.5² + 0.75² + 0.25²
    assert brier_scores(labels, probabilities).tolist() == pytest.approx([0, 2, 0.375, 0.875])


def test_calibration_curve_by_hand() -> None:
    #                      (0, .2] | (.4, .6]  | (.8, 1]
    confidence = np.array([0.1, 0.45, 0.55, 0.6, 0.85, 1.0])
    correct = np.array([False, True, False, False, True, True])
    table = calibration_curve(confidence, correct, bins=5)
    assert table.index.tolist() == [0, 2, 4]  # no clip in the others: no row
    assert table["clips"].tolist() == [1, 3, 2]
    assert table["confidence"].tolist() == pytest.approx([0.1, 1.6 / 3, 1.85 / 2])
    assert table["accuracy"].tolist() == pytest.approx([0, 1 / 3, 1])
    # 1/6 * |0 - 0.1| + 3/6 * |1/3 - 1.6/3| + 2/6 * |1 - 0.925| = 0.1/6 + 0.6/6 + 0.15/6
    assert expected_calibration_error(confidence, correct, bins=5) == pytest.approx(0.85 / 6)


@pytest.mark.parametrize("bins", [10, 15])
def test_a_confidence_on_an_edge_belongs_to_the_lower_bin(bins: int) -> None:
    for number in range(bins):
        edge = (number + 1) / bins
        table = calibration_curve(np.array([edge - 1e-6, edge]), np.array([True, True]), bins)
        assert table["clips"].to_dict() == {number: 2}
        if edge < 1:
            above = calibration_curve(np.array([edge + 1e-6]), np.array([True]), bins)
            assert above.index.tolist() == [number + 1]
    assert calibration_curve(np.array([0.0]), np.array([False]), bins).index.tolist() == [0]


def test_calibration_error_of_extremes() -> None:
    sure = np.ones(4)
    assert expected_calibration_error(sure, np.array([True] * 4)) == 0
    assert expected_calibration_error(sure, np.array([False] * 4)) == 1
    assert expected_calibration_error(np.full(4, 0.75), np.array([True, True, True, False])) == 0


def test_risk_coverage_by_hand() -> None:
    confidence = np.array([0.6, 0.9, 0.7, 0.8])
    correct = np.array(
        [True, True, True, False]
    )  # in order of confidence: correct, wrong, correct, correct
    coverage, risk = risk_coverage(confidence, correct)
    assert coverage.tolist() == [1 / 4, 2 / 4, 3 / 4, 1]
    assert risk.tolist() == pytest.approx([0, 1 / 2, 1 / 3, 1 / 4])
    area = area_under_risk_coverage(confidence, correct)
    assert area == pytest.approx((0 + 1 / 2 + 1 / 3 + 1 / 4) / 4)


def test_equal_confidences_have_no_order() -> None:
    confidence = np.array([0.9, 0.5, 0.5, 0.5, 0.2])
    correct = np.array([True, True, False, False, False])
    # the three at 0.5 are wrong by 2/3 each: errors 0, 2/3, 4/3, 2, then 3, over 1, 2, 3, 4, 5
    expected = [0, 1 / 3, 4 / 9, 2 / 4, 3 / 5]
    for order in map(list, itertools.permutations(range(5))):
        coverage, risk = risk_coverage(confidence[order], correct[order])
        assert coverage.tolist() == pytest.approx([0.2, 0.4, 0.6, 0.8, 1])
        assert risk.tolist() == pytest.approx(expected)
        area = area_under_risk_coverage(confidence[order], correct[order])
        assert area == pytest.approx(sum(expected) / 5)


def test_area_with_ties_is_the_mean_over_their_orders() -> None:
    confidence = np.array([0.9, 0.9, 0.5, 0.5, 0.5])
    correct = np.array([False, True, True, True, False])
    areas = []
    for order in map(list, itertools.permutations(range(5))):
        ranked = sorted(order, key=lambda i: -confidence[i])  # stable: ties keep their order
        wrong = np.cumsum(~correct[ranked])
        areas.append(np.mean(wrong / np.arange(1, 6)))
    assert len(set(np.round(areas, 9))) > 1  # orders do differ
    assert area_under_risk_coverage(confidence, correct) == pytest.approx(np.mean(areas))


def test_selective_risk_by_hand() -> None:
    confidence = np.array([0.9, 0.8, 0.6, 0.4])
    correct = np.array([True, False, True, False])
    assert selective_risk(confidence, correct, 0.8) == {
        "coverage": 2 / 4,
        "error": 1 / 2,
    }  # 0.8 answers
    assert selective_risk(confidence, correct, 0.81) == {"coverage": 1 / 4, "error": 0}
    assert selective_risk(confidence, correct, 0) == {"coverage": 1, "error": 2 / 4}
    assert selective_risk(confidence, correct, np.inf) == {"coverage": 0, "error": None}
    # one threshold per clip: 0.9 >= 0.95 no, 0.8 >= 0.5 yes, 0.6 >= inf no, 0.4 >= 0.4 yes
    thresholds = np.array([0.95, 0.5, np.inf, 0.4])
    assert selective_risk(confidence, correct, thresholds) == {"coverage": 2 / 4, "error": 2 / 2}
    # one threshold for all may also be an array
    assert selective_risk(confidence, correct, np.array([0.6])) == {
        "coverage": 3 / 4,
        "error": 1 / 3,
    }


@pytest.mark.parametrize("digits", [1, 2, 8])  # with few digits many probabilities are equal
def test_average_precision_and_its_curve_are_those_of_scikit_learn(digits: int) -> None:
    rng = np.random.default_rng(digits)
    labels = rng.integers(0, 4, 200)
    labels[labels == 2] = 3  # no clip of class 2
    probabilities = rng.dirichlet(np.ones(4), 200).round(digits)
    values = average_precision(labels, probabilities)
    assert np.isnan(values).tolist() == [False, False, True, False]
    for label in (0, 1, 3):
        positive = labels == label
        assert values[label] == pytest.approx(
            average_precision_score(positive, probabilities[:, label]), abs=1e-12
        )
        theirs = precision_recall_curve(positive, probabilities[:, label])
        for mine, other in zip(
            precision_recall(positive, probabilities[:, label]), theirs[:2], strict=True
        ):
            # Theirs begins at the lowest threshold, and ends with a point at recall 0.
            assert mine[::-1].tolist() == pytest.approx(other[:-1].tolist(), abs=1e-12)


def test_top_k_accuracy() -> None:
    rng = np.random.default_rng(0)
    labels, probabilities = rng.integers(0, 8, 300), rng.dirichlet(np.ones(8), 300)
    for k in (1, 2, 3, 7):
        wanted = top_k_accuracy_score(labels, probabilities, k=k)
        assert top_k_accuracy(labels, probabilities, k) == pytest.approx(wanted)
    assert top_k_accuracy(labels, probabilities, 1) == (probabilities.argmax(1) == labels).mean()


def test_an_own_score_is_part_of_every_test(monkeypatch: pytest.MonkeyPatch) -> None:
    def kappa(matrices: np.ndarray) -> np.ndarray:
        shares = matrices / matrices.sum((-2, -1), keepdims=True)
        chance = (shares.sum(-1) * shares.sum(-2)).sum(-1)
        return (np.trace(shares, axis1=-2, axis2=-1) - chance) / (1 - chance)

    monkeypatch.setitem(MORE_SCORES, "kappa", kappa)
    rng = np.random.default_rng(0)
    labels, probabilities = rng.integers(0, 3, 90), rng.dirichlet(np.ones(3), 90)
    y_pred = probabilities.argmax(axis=1)
    summary = summarize(confusion_matrix(labels, y_pred, 3))
    assert summary["kappa"] == pytest.approx(cohen_kappa_score(labels, y_pred))
    patients = np.array([f"P{n % 9}" for n in range(90)], object)
    low, high = score_intervals(labels, probabilities, patients, 200)["kappa"]["patients"]
    assert low < summary["kappa"] < high
