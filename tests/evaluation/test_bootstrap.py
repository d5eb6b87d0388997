"""Intervals against plain loops, against tables, and against the truth that they must contain."""

import math
import random

import numpy as np
import pytest

from benchmarks.intervals import coverage, simulate, true_scores
from evaluation import bootstrap
from evaluation.bootstrap import (
    cluster_bootstrap_weights,
    confidence_interval,
    format_interval,
    iid_bootstrap_weights,
    paired_difference,
    patient_clips,
    resampled_scores,
    score_intervals,
)
from evaluation.metrics import brier_scores, confusion_matrix, per_sample_nll, scores

#                    clips 0, 2, 5 | 1, 6 | 3 | two clips of unknown patients
PATIENTS = np.array(["a", "b", "a", "c", None, "a", "b", None], object)
GROUPS = [[0, 2, 5], [1, 6], [3], [4], [7]]


def drawn(patients: np.ndarray, n_resamples: int, seed: int = 0) -> np.ndarray:
    return np.concatenate(list(cluster_bootstrap_weights(patients, n_resamples, seed)))


def test_clips_of_a_patient_belong_together() -> None:
    assert sorted(clips.tolist() for clips in patient_clips(PATIENTS)) == sorted(GROUPS)


def test_clips_of_a_patient_are_drawn_as_often_as_the_patient() -> None:
    weights = drawn(PATIENTS, 2000)
    assert weights.shape == (2000, 8)
    assert (weights >= 0).all()
    times = np.stack([weights[:, group].sum(axis=1) / len(group) for group in GROUPS], axis=1)
    assert (times == times.round()).all()  # m times n clips, for a whole m
    assert (times.sum(axis=1) == len(GROUPS)).all()  # as many patients as there are
    # A patient is drawn once on average, and never in (4/5)^5 = 0.328 of the resamples.
    assert times.mean(axis=0) == pytest.approx([1] * 5, abs=0.08)
    assert (times == 0).mean(axis=0) == pytest.approx([0.8**5] * 5, abs=0.04)


def test_clips_are_drawn_again_within_a_patient() -> None:
    """All three of three clips are drawn in 3!/3^3 = 2/9 of the cases, not always."""
    weights = drawn(PATIENTS, 4000)[:, GROUPS[0]]
    once = weights[weights.sum(axis=1) == 3]
    assert len(once) > 1000
    assert (once == 1).all(axis=1).mean() == pytest.approx(2 / 9, abs=0.04)


def test_seed_decides() -> None:
    assert (drawn(PATIENTS, 50, seed=1) == drawn(PATIENTS, 50, seed=1)).all()
    assert (drawn(PATIENTS, 50, seed=1) != drawn(PATIENTS, 50, seed=2)).any()
    first, again, other = (
        np.concatenate(list(iid_bootstrap_weights(8, 50, seed))) for seed in (1, 1, 2)
    )
    assert (first == again).all()
    assert (first != other).any()


def test_single_clips_are_drawn_as_many_as_there_are() -> None:
    weights = np.concatenate(list(iid_bootstrap_weights(8, 2000)))
    assert weights.shape == (2000, 8)
    assert (weights.sum(axis=1) == 8).all()
    assert (weights == 0).mean() == pytest.approx((7 / 8) ** 8, abs=0.02)


@pytest.mark.parametrize("chunk", [1, 8, 24, 2**24])
def test_chunks_hold_all_draws(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(bootstrap, "_CHUNK", chunk)
    rows = max(1, chunk // 8)  # resamples of 8 clips that are held at a time
    for parts in (
        list(cluster_bootstrap_weights(PATIENTS, 10)),
        list(iid_bootstrap_weights(8, 10)),
    ):
        assert max(map(len, parts)) == min(rows, 10)
        weights = np.concatenate(parts)
        assert weights.shape == (10, 8)
        assert len(np.unique(weights, axis=0)) > 5  # each has draws of its own
    labels, probabilities, _ = simulate(1, np.random.default_rng(0), 5)
    alone = np.array(["a"] * len(labels), object)
    found = resampled_scores(cluster_bootstrap_weights(alone, 10), labels, probabilities)
    assert {values.shape for values in found.values()} == {(10,)}


def test_weights_count_clips() -> None:
    """A weight of 2 is the clip twice."""
    labels, probabilities, _ = simulate(2, np.random.default_rng(0))
    labels, probabilities = labels[:4], probabilities[:4]
    weights = np.array([[1.0, 1, 1, 1], [2, 0, 1, 1], [0, 0, 0, 3]])
    found = resampled_scores(iter([weights[:2], weights[2:]]), labels, probabilities)
    for row, chosen in enumerate(([0, 1, 2, 3], [0, 0, 2, 3], [3, 3, 3])):
        truth, predicted = labels[chosen], probabilities[chosen]
        expected = {
            **scores(confusion_matrix(truth, predicted.argmax(axis=1), 3)),
            "brier": brier_scores(truth, predicted).mean(),
            "nll": per_sample_nll(truth, predicted).mean(),
        }
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert found[name][row] == pytest.approx(float(value)), name


def test_equals_plain_loops() -> None:
    """The same resampling one clip at a time: equal probabilities, other random numbers."""
    labels, probabilities, patients = simulate(6, np.random.default_rng(3), 9)
    patients[-4:] = None
    correct = (probabilities.argmax(axis=1) == labels).tolist()
    clips_of: dict[object, list[int]] = {}
    for index, patient in enumerate(patients):
        clips_of.setdefault(patient or index, []).append(index)
    rng, n, slow = random.Random(0), 5000, []
    for _ in range(n):
        clips: list[int] = []
        for patient in rng.choices(list(clips_of), k=len(clips_of)):
            clips += rng.choices(clips_of[patient], k=len(clips_of[patient]))
        slow.append(sum(correct[clip] for clip in clips) / len(clips))
    fast = resampled_scores(cluster_bootstrap_weights(patients, n), labels, probabilities)[
        "accuracy"
    ]
    spread = np.std(slow)
    assert spread > 0.05
    # Means of n resamples differ by spread * sqrt(2/n), deviations by spread / sqrt(n): 4 sigma.
    assert fast.mean() == pytest.approx(np.mean(slow), abs=4 * spread * math.sqrt(2 / n))
    assert fast.std() == pytest.approx(spread, abs=4 * spread / math.sqrt(n))


@pytest.mark.parametrize(("n", "t"), [(4, 3.182446), (12, 2.200985), (31, 2.042272)])
def test_interval_by_hand(n: int, t: float) -> None:
    """`t`: the 97.5 % quantile of Student's t with n - 1 degrees of freedom, from tables."""
    spread = t * math.sqrt(n / (n - 1))
    tail = math.erfc(spread / math.sqrt(2)) / 2  # of the normal distribution
    values = np.random.default_rng(0).permutation(np.linspace(2, 3, 100_001))  # quantile q: 2 + q
    assert confidence_interval(values, n) == pytest.approx([2 + tail, 3 - tail], abs=1e-7)


def test_interval_of_many_patients_is_the_plain_percentiles() -> None:
    values = np.linspace(0, 1, 100_001)
    assert confidence_interval(values, 1_000_000) == pytest.approx([0.025, 0.975], abs=1e-5)
    assert confidence_interval(values, 1_000_000, level=0.8) == pytest.approx([0.1, 0.9], abs=1e-5)
    assert (
        confidence_interval(values, 3)[0]
        < confidence_interval(values, 5)[0]
        < confidence_interval(values, 50)[0]
    )


def test_one_patient_has_no_interval() -> None:
    assert confidence_interval(np.linspace(0, 1, 100), 1) is None
    labels, probabilities, patients = simulate(1, np.random.default_rng(0))
    for name, found in score_intervals(labels, probabilities, patients, n_resamples=100).items():
        assert found["patients"] is None, name
        assert found["clips"] is not None, name
    assert set(paired_difference(labels, probabilities, probabilities, patients, 100).values()) == {
        None
    }


def test_intervals_contain_each_score() -> None:
    labels, probabilities, patients = simulate(12, np.random.default_rng(0))
    found = score_intervals(labels, probabilities, patients, n_resamples=1000)
    y_pred = probabilities.argmax(axis=1)
    measured = {
        name: float(value) for name, value in scores(confusion_matrix(labels, y_pred, 3)).items()
    }
    measured["brier"] = brier_scores(labels, probabilities).mean()
    measured["nll"] = per_sample_nll(labels, probabilities).mean()
    assert found.keys() == measured.keys()
    for name, value in measured.items():
        for kind in ("patients", "clips"):
            low, high = found[name][kind]
            assert low < value < high, (name, kind)
    assert found == score_intervals(labels, probabilities, patients, n_resamples=1000)
    assert found != score_intervals(labels, probabilities, patients, n_resamples=1000, seed=1)


def test_without_known_patients_there_is_only_the_naive_interval() -> None:
    labels, probabilities, patients = simulate(12, np.random.default_rng(0))
    unknown = score_intervals(
        labels, probabilities, np.full(len(patients), None), n_resamples=3000
    )["accuracy"]
    assert unknown["patients"] is None
    assert np.ptp(unknown["clips"]) > 0
    known = score_intervals(labels, probabilities, patients, n_resamples=3000)["accuracy"]
    assert np.ptp(known["patients"]) > 1.5 * np.ptp(known["clips"])


def test_interval_over_patients_contains_the_truth_and_the_naive_one_does_not() -> None:
    """On 500 simulated data sets of 12 patients, at nominally 95 %."""
    held = coverage(12, 500, 200)
    assert 0.90 <= held["accuracy", "patients"] <= 0.98
    assert held["accuracy", "clips"] < 0.85


def test_interval_holds_with_five_patients() -> None:
    held = coverage(5, 300, 200)
    assert held["accuracy", "patients"] >= 0.90
    assert held["accuracy", "clips"] < 0.85


def test_the_truth_is_that_of_very_many_patients() -> None:
    labels, probabilities, _ = simulate(50_000, np.random.default_rng(1))
    correct = probabilities.argmax(axis=1) == labels
    assert true_scores()["accuracy"] == pytest.approx(correct.mean(), abs=0.01)


def test_what_patients_have_in_common_cancels_out() -> None:
    """Both models fail on the same patients; one of them errs a little more."""
    rng = np.random.default_rng(5)
    labels, one, patients = simulate(12, rng)
    other = one.copy()
    worse = rng.random(len(labels)) < 0.05
    other[worse] = 0.1 + 0.7 * np.eye(3)[(labels[worse] + 1) % 3]
    paired = paired_difference(labels, one, other, patients, n_resamples=2000)
    unpaired = {
        name: confidence_interval(
            values
            - resampled_scores(cluster_bootstrap_weights(patients, 2000, 1), labels, other)[name],
            12,
        )
        for name, values in resampled_scores(
            cluster_bootstrap_weights(patients, 2000, 0), labels, one
        ).items()
    }
    assert paired.keys() == unpaired.keys()
    for name in ("accuracy", "brier", "nll"):
        assert np.ptp(paired[name]) < np.ptp(unpaired[name]) / 2, name
    accuracy = [(p.argmax(axis=1) == labels).mean() for p in (one, other)]
    low, high = paired["accuracy"]
    assert 0 < low < accuracy[0] - accuracy[1] < high
    assert paired["brier"][1] < 0 < unpaired["brier"][1]  # lower is better; only pairs can tell


def test_intervals_are_written_as_text() -> None:
    assert format_interval([0.5191, 0.7168]) == "0.519 to 0.717"
    assert format_interval([-0.05, 0.1], "+.2f") == "-0.05 to +0.10"
    assert format_interval(None) == format_interval([math.nan, math.nan]) == "-"
    assert format_interval(None, missing="none") == "none"


def test_equal_models_do_not_differ() -> None:
    labels, one, patients = simulate(12, np.random.default_rng(0))
    for name, found in paired_difference(
        labels, one, one.copy(), patients, n_resamples=200
    ).items():
        assert found == [0, 0], name


def test_exchanging_the_models_changes_the_sign() -> None:
    rng = np.random.default_rng(0)
    labels, one, patients = simulate(12, rng)
    other = one[rng.permutation(len(one))]
    forth = paired_difference(labels, one, other, patients, n_resamples=300)
    back = paired_difference(labels, other, one, patients, n_resamples=300)
    assert forth["accuracy"][0] > 0
    assert forth["nll"][1] < 0
    for name, (low, high) in forth.items():
        assert back[name] == pytest.approx([-high, -low], abs=1e-12), name


def test_many_clips_are_drawn_in_the_same_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counting drawn clips gives the distribution of drawing the counts."""
    patients = np.array(["b", "a", "a", None, "b", "a", "c", "a"], object)
    counted = drawn(patients, 20_000)
    clips = np.concatenate(list(bootstrap.iid_bootstrap_weights(8, 20_000)))
    monkeypatch.setattr(bootstrap, "_MANY", 0)
    monkeypatch.setattr(bootstrap, "_CHUNK", 16 * 8 * 999)  # the last chunk is a smaller one
    many = drawn(patients, 20_000)
    assert many.shape == counted.shape
    for members in bootstrap.patient_clips(patients):
        assert not (many[:, members].sum(axis=1) % len(members)).any()
    many_clips = np.concatenate(list(bootstrap.iid_bootstrap_weights(8, 20_000)))
    assert (many_clips.sum(axis=1) == 8).all()
    for first, second in ((counted, many), (clips, many_clips)):
        assert np.abs(second.mean(axis=0) - 1).max() < 0.05
        assert np.abs(np.cov(first.T) - np.cov(second.T)).max() < 0.12


@pytest.mark.parametrize("many", [20_000, 0])
def test_shared_resamples_give_the_numbers_of_separate_ones(
    many: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, also for the former way of scoring: a product of weights and one-hot cells."""
    monkeypatch.setattr(bootstrap, "_MANY", many)
    rng = np.random.default_rng(3)
    patients = np.array(["c", "a", None, "b"], object)[rng.integers(0, 4, 60)]
    labels = rng.integers(0, 3, 60)
    models = [rng.dirichlet([1, 1, 1], 60) for _ in range(3)]
    own, differences = bootstrap.compare_scores(labels, models, 1, patients, 500)
    for k, model in enumerate(models):
        separate = bootstrap.score_intervals(labels, model, patients, 500)
        assert own[k] == {name: kinds["patients"] for name, kinds in separate.items()}
        both = np.concatenate((models[1] + model, abs(models[1] - model)), axis=1)
        order = bootstrap.canonical_order(labels, both, patients)
        weights = drawn(patients[order], 500)
        values = []
        for probabilities in (models[1][order], model[order]):
            cells = np.zeros((60, 9))
            cells[np.arange(60), labels[order] * 3 + probabilities.argmax(axis=1)] = 1
            values.append(scores((weights @ cells).reshape(-1, 3, 3)))
        n = len(bootstrap.patient_clips(patients))
        for name in values[0]:
            expected = bootstrap.confidence_interval(values[0][name] - values[1][name], n)
            assert differences[k][name] == expected
