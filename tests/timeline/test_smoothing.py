"""Viterbi against brute force, the filter against the forward algorithm, segments by hand."""

import itertools
import math

import numpy as np
import pytest

from clips.manifest import OUT_OF_BODY, UNCERTAIN, UNREADABLE
from timeline.segments import Segment
from timeline.smoothing import (
    ForwardFilter,
    HMMParams,
    SmoothingConfig,
    to_segments,
    viterbi,
    viterbi_smooth,
)

STAY, SWITCH = math.log(0.8), math.log(0.1)


def random_evidence(n: int, states: int, seed: int) -> np.ndarray:
    return np.log(np.random.default_rng(seed).dirichlet(np.ones(states) * 0.5, n) + 1e-4)


def smooth(probabilities: np.ndarray, smoothing: SmoothingConfig) -> list[int]:
    """Smooth predictions that are one second apart."""
    return viterbi_smooth(np.arange(len(probabilities)), probabilities, smoothing).tolist()


def score(path: tuple[int, ...], evidence: np.ndarray, min_length: int) -> float:
    """Log-probability of a sequence; minus infinity if one of its segments is too short."""
    lengths = [len(list(group)) for _, group in itertools.groupby(path)]
    if min(lengths) < min_length:
        return -math.inf
    moves = [STAY if a == b else SWITCH for a, b in itertools.pairwise(path)]
    return sum(evidence[t, s] for t, s in enumerate(path)) + sum(moves)


@pytest.mark.parametrize("min_length", [1, 2, 3, 4])
@pytest.mark.parametrize(("n", "states"), [(4, 3), (7, 3), (8, 3), (9, 2), (10, 2)])
def test_viterbi_equals_brute_force(n: int, states: int, min_length: int) -> None:
    for seed in range(6):
        evidence = random_evidence(n, states, seed)
        path = tuple(viterbi(evidence, STAY, SWITCH, min_length))
        if n < min_length:
            assert len(set(path)) == 1
            continue
        paths = itertools.product(range(states), repeat=n)
        best = max(score(other, evidence, min_length) for other in paths)
        assert score(path, evidence, min_length) == pytest.approx(best)


def test_viterbi_of_nothing_and_of_little() -> None:
    assert viterbi(np.zeros((0, 3)), STAY, SWITCH, 5).tolist() == []
    evidence = np.log([[0.6, 0.4], [0.1, 0.9]])
    assert viterbi(evidence, STAY, SWITCH, 5).tolist() == [1, 1]


def test_a_short_slip_is_smoothed_away_and_a_long_change_is_not() -> None:
    sure = np.array([0.9, 0.05, 0.05])
    probabilities = np.stack([np.roll(sure, k) for k in [0] * 20 + [1] * 2 + [0] * 20 + [2] * 20])
    smoothing = SmoothingConfig(mean_duration=50, window=2, min_duration=5, threshold=0.0)
    assert smooth(probabilities, smoothing) == [0] * 42 + [2] * 20


def test_below_the_threshold_it_is_uncertain() -> None:
    sure, unsure = [0.9, 0.05, 0.05], [0.45, 0.35, 0.2]
    probabilities = np.array([sure] * 30 + [unsure] * 30 + [sure] * 30)
    smoothing = SmoothingConfig(mean_duration=20, window=1, min_duration=3, threshold=0.6)
    assert smooth(probabilities, smoothing) == [0] * 30 + [3] * 30 + [0] * 30
    online = ForwardFilter(smoothing, 3)
    states = [online.step(t, row) for t, row in enumerate(probabilities)]
    assert states[:31] == [0] * 31  # the mean of the last three decides
    assert states[33:60] == [3] * 27
    assert states[63:] == [0] * 27
    lenient = SmoothingConfig(20, 3, 1, threshold=0.0)
    assert smooth(probabilities, lenient) == [0] * 90
    strict = SmoothingConfig(20, 3, 1, threshold=math.inf)
    assert smooth(probabilities, strict) == [3] * 90


def test_what_is_left_over_between_uncertain_stretches_is_uncertain() -> None:
    """Class 1 lasts 8 predictions, but only 2 of them are sure: less than the minimum."""
    probabilities = np.array([[0.9, 0.1]] * 10 + [[0.05, 0.95]] * 2 + [[0.4, 0.6]] * 6)
    smoothing = SmoothingConfig(mean_duration=3, window=1, min_duration=4, threshold=0.7)
    assert smooth(probabilities, smoothing) == [0] * 10 + [2] * 8


@pytest.mark.parametrize("seed", range(8))
def test_labelled_stretches_are_sure_enough_and_long_enough(seed: int) -> None:
    rng = np.random.default_rng(seed)
    probabilities = rng.dirichlet(np.ones(3) * 0.4, 20).repeat(rng.integers(2, 9, 20), axis=0)
    smoothing = SmoothingConfig(mean_duration=10, window=2.5, min_duration=5, threshold=0.6)
    states = np.array(smooth(probabilities, smoothing))
    assert 0 < (states == 3).mean() < 1
    runs = [list(group) for _, group in itertools.groupby(states)]
    assert all(len(run) >= 5 for run in runs)
    start = 0
    for is_labelled, group in itertools.groupby(states, key=lambda state: state < 3):
        length = len(list(group))
        if is_labelled:
            rows = np.arange(start, start + length)
            assert probabilities[rows, states[rows]].mean() >= 0.6
        start += length


def test_seconds_become_numbers_of_predictions() -> None:
    smoothing = SmoothingConfig(mean_duration=10.0, min_duration=1.0, window=1.6, threshold=0.5)
    assert smoothing.params(0.2) == HMMParams(
        pytest.approx(0.02), evidence_weight=0.125, min_length=5
    )
    assert smoothing.params(30.0) == HMMParams(0.5, evidence_weight=1.0, min_length=1)


def test_the_number_of_predictions_per_second_does_not_matter() -> None:
    """The same five seconds of another class, with five predictions per second and with one."""
    smoothing = SmoothingConfig(mean_duration=10.0, min_duration=2.0, window=2.0, threshold=0.0)
    for rate in (1, 5):
        rows = [[0.9, 0.1]] * 10 * rate + [[0.1, 0.9]] * 5 * rate + [[0.9, 0.1]] * 10 * rate
        probabilities, times = np.array(rows), np.arange(25 * rate) / rate
        states = viterbi_smooth(times, probabilities, smoothing)
        assert states.tolist() == [0] * 10 * rate + [1] * 5 * rate + [0] * 10 * rate
        online = ForwardFilter(smoothing, 2)
        states = np.array([online.step(t, p) for t, p in zip(times, probabilities, strict=True)])
        assert 2 <= (states == 1).sum() / rate <= 7
        delay = times[states == 1][0] - 10
        assert 1 <= delay <= 4


def test_smoothing_nothing() -> None:
    smoothing = SmoothingConfig(10.0, 1.0, 1.6, 0.5)
    assert viterbi_smooth(np.zeros(0), np.zeros((0, 3)), smoothing).tolist() == []
    assert viterbi_smooth(np.zeros(1), np.array([[0.1, 0.8, 0.1]]), smoothing).tolist() == [1]


def test_the_filter_is_the_forward_algorithm() -> None:
    """Against the sum over all sequences of states."""
    smoothing = SmoothingConfig(
        mean_duration=1 / 0.3, window=1 / 0.7, min_duration=1, threshold=0.0
    )
    probabilities = np.random.default_rng(3).dirichlet(np.ones(3), 6)
    params = smoothing.params(1.0)
    evidence = params.evidence(probabilities)
    # The first prediction has a whole window to itself.
    evidence[0] = np.log(probabilities[0])
    np.testing.assert_allclose(evidence[1:], 0.7 * np.log(probabilities[1:]))
    stay, switch = params.transitions(3)
    assert math.exp(stay) + 2 * math.exp(switch) == pytest.approx(1)
    online = ForwardFilter(smoothing, 3)
    for t in range(len(probabilities)):
        totals = np.zeros(3)
        for path in itertools.product(range(3), repeat=t + 1):
            moves = sum(stay if a == b else switch for a, b in itertools.pairwise(path))
            totals[path[-1]] += math.exp(sum(evidence[k, s] for k, s in enumerate(path)) + moves)
        assert online.step(t, probabilities[t]) == totals.argmax()


def test_the_filter_waits_before_it_changes_its_mind() -> None:
    smoothing = SmoothingConfig(mean_duration=3, window=1, min_duration=3, threshold=0.0)
    online = ForwardFilter(smoothing, 2)
    a, b = np.array([0.95, 0.05]), np.array([0.05, 0.95])
    states = [online.step(t, p) for t, p in enumerate((a, a, b, b, a, b, b, b, b))]
    assert states == [0, 0, 0, 0, 0, 0, 0, 1, 1]


def test_the_filter_is_causal() -> None:
    smoothing = SmoothingConfig(mean_duration=10, window=2, min_duration=2, threshold=0.3)
    probabilities = np.random.default_rng(0).dirichlet(np.ones(4), 40)
    changed = probabilities.copy()
    changed[25:] = np.random.default_rng(1).dirichlet(np.ones(4), 15)
    states = []
    for rows in (probabilities, changed):
        online = ForwardFilter(smoothing, 4)
        states.append([online.step(t, row) for t, row in enumerate(rows)])
    assert states[0][:25] == states[1][:25]


def predictions(states: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """States, and rising probabilities of their classes: 0.50, 0.51 ..."""
    sure = 0.5 + 0.01 * np.arange(len(states))
    probabilities = np.stack([1 - sure, 1 - sure], axis=1)
    probabilities[np.arange(len(states)), np.array(states) % 2] = sure
    return np.array(states), probabilities


def test_segments_end_halfway_between_predictions() -> None:
    states, probabilities = predictions([0, 0, 1, 1, 2])
    segments = to_segments(
        np.array([1.0, 2, 3, 4, 5]), states, probabilities, ["a", "b"], duration=6.0
    )
    assert [segment[:3] for segment in segments] == [
        (0.0, 2.5, "a"),
        (2.5, 4.5, "b"),
        (4.5, 6.0, UNCERTAIN),
    ]
    assert [s.confidence for s in segments] == pytest.approx([0.505, 0.525, 0.54])


def test_marked_stretches_cut_segments() -> None:
    states, probabilities = predictions([0, 0, 0, 0, 1])
    marked = [Segment(2.2, 3.6, UNREADABLE), Segment(4.8, 5.5, OUT_OF_BODY)]
    segments = to_segments(
        np.array([1.0, 2, 3, 4, 6]), states, probabilities, ["a", "b"], 7.0, marked
    )
    assert [segment[:3] for segment in segments] == [
        (0.0, 2.2, "a"),
        (2.2, 3.6, UNREADABLE),
        (3.6, 4.8, "a"),
        (4.8, 5.5, OUT_OF_BODY),
        (5.5, 7.0, "b"),
    ]
    # The prediction at 3 s lies in the unreadable stretch: it does not count.
    assert segments[0].confidence == pytest.approx(0.505)
    assert segments[2].confidence == pytest.approx(0.53)


def test_marks_without_a_prediction_between_them_are_one() -> None:
    states, probabilities = predictions([0])
    marked = [Segment(0.5, 1.0, UNREADABLE), Segment(1.2, 2.0, UNREADABLE),
              Segment(4.0, 4.5, UNREADABLE)]  # fmt: skip
    segments = to_segments(np.array([3.0]), states, probabilities, ["a", "b"], 5.0, marked)
    assert [segment[:3] for segment in segments] == [
        (0.0, 2.0, UNREADABLE),
        (2.0, 4.0, "a"),
        (4.0, 5.0, UNREADABLE),
    ]


def test_without_any_prediction_nothing_is_known() -> None:
    none = np.zeros(0), np.zeros(0, int), np.zeros((0, 2))
    (segment,) = to_segments(*none, ["a", "b"], 5.0)
    assert segment[:3] == (0.0, 5.0, UNCERTAIN)
    (segment,) = to_segments(*none, ["a", "b"], 5.0, [Segment(0.2, 4.1, UNREADABLE)])
    assert segment[:3] == (0.0, 5.0, UNREADABLE)
    # Seconds that could be read are not called unreadable.
    segments = to_segments(*none, ["a", "b"], 5.0, [Segment(1.0, 3.0, UNREADABLE)])
    assert [segment[:3] for segment in segments] == [
        (0.0, 1.0, UNCERTAIN),
        (1.0, 3.0, UNREADABLE),
        (3.0, 5.0, UNCERTAIN),
    ]
    assert all(math.isnan(segment.confidence) for segment in segments)


@pytest.mark.parametrize("seed", range(5))
def test_segments_cover_the_video(seed: int) -> None:
    rng = np.random.default_rng(seed)
    n = 40
    times = np.sort(rng.uniform(0, 20, n))
    cuts = np.sort(rng.uniform(0, 20, 8)).reshape(-1, 2)
    marked = [Segment(a, b, [UNREADABLE, OUT_OF_BODY][k % 2]) for k, (a, b) in enumerate(cuts)]
    probabilities = rng.dirichlet(np.ones(3), n)
    segments = to_segments(times, rng.integers(0, 4, n), probabilities, "abc", 20.0, marked)
    assert segments[0].start == 0
    assert segments[-1].end == 20
    for before, after in itertools.pairwise(segments):
        assert before.end == after.start
        assert before.label != after.label or before.label in "abc"
    for mark in marked:
        middle = (mark.start + mark.end) / 2
        assert [s.label for s in segments if s.start <= middle < s.end] == [mark.label]
