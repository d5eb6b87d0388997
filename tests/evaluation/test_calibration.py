"""Temperature and threshold: by hand, by brute force, and on simulated models."""

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, softmax

from evaluation.calibration import (
    Calibration,
    apply_temperature,
    calibrate,
    choose_threshold,
    fit_temperature,
)
from evaluation.metrics import selective_risk


def simulated(clips: int, scale: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Labels, and the probabilities of a model whose logits are `scale` times the true ones."""
    rng = np.random.default_rng(seed)
    true_logits = rng.normal(0, 1.5, (clips, 4))
    below = np.cumsum(softmax(true_logits, axis=1), axis=1)
    labels = (rng.random((clips, 1)) > below).sum(axis=1).clip(max=3)
    return labels, softmax(scale * true_logits, axis=1)


def test_temperature_divides_the_logits() -> None:
    logits = np.random.default_rng(0).normal(0, 3, (20, 5))
    for temperature in (0.3, 1.0, 4.0):
        expected = softmax(logits / temperature, axis=1)
        assert np.allclose(
            apply_temperature(softmax(logits, axis=1), temperature), expected, atol=1e-12
        )
    each = np.linspace(0.2, 5, 20)  # one temperature per clip
    expected = softmax(logits / each[:, None], axis=1)
    assert np.allclose(apply_temperature(softmax(logits, axis=1), each), expected, atol=1e-12)
    # logits ln 4 and 0 are 0.8 and 0.2; halved, ln 2 and 0 are 2/3 and 1/3
    assert apply_temperature(np.array([[0.8, 0.2]]), 2.0)[0].tolist() == pytest.approx(
        [2 / 3, 1 / 3]
    )


def test_temperature_of_certain_predictions() -> None:
    for temperature in (0.05, 20.0):
        with np.errstate(divide="raise", invalid="raise"):  # no warning of log(0) either
            calibrated = apply_temperature(np.array([[1.0, 0.0, 0.0]]), temperature)
        assert np.isfinite(calibrated).all()
        assert calibrated.sum() == pytest.approx(1)
        assert calibrated.argmax() == 0


def test_no_temperature_changes_the_prediction() -> None:
    rng = np.random.default_rng(0)
    vague = rng.dirichlet(np.ones(7), 500)
    certain = rng.dirichlet(np.full(7, 0.01), 500)  # most of them 1 and 0 to many digits
    for probabilities in (vague, certain):
        y_pred = probabilities.argmax(axis=1)
        for temperature in (0.05, 0.7, 3.0, 20.0, rng.uniform(0.05, 20, 500)):
            assert (apply_temperature(probabilities, temperature).argmax(axis=1) == y_pred).all()


@pytest.mark.parametrize("scale", [2.5, 1.0, 0.4])
def test_the_temperature_of_a_simulated_model_is_found(scale: float) -> None:
    labels, probabilities = simulated(20_000, scale)
    assert fit_temperature(labels, probabilities) == pytest.approx(scale, rel=0.03)


def test_temperature_is_the_minimum_of_the_smoothed_loss() -> None:
    labels, probabilities = simulated(40, 3.0, seed=3)
    targets = np.where(np.eye(4)[labels] > 0, 1 - 1 / 42, 1 / 42 / 3)

    def loss(temperature: float) -> float:
        return -float(
            (targets * log_softmax(np.log(probabilities) / temperature, axis=1)).sum() / 40
        )

    grid = np.geomspace(0.05, 20, 3001)  # steps of 0.2 %
    losses = [loss(temperature) for temperature in grid]
    best = int(np.argmin(losses))
    assert 0 < best < 3000
    fitted = fit_temperature(labels, probabilities)
    assert grid[best - 1] < fitted < grid[best + 1]
    assert loss(fitted) <= losses[best] + 1e-12


@pytest.mark.parametrize("clips", [1, 5, 30])
def test_a_perfect_tiny_validation_set_does_not_give_certainty(clips: int) -> None:
    """All clips are alike: the best confidence is the target itself, 1 - 1/(N + 2)."""
    labels = np.arange(clips) % 3
    probabilities = np.where(np.eye(3)[labels] > 0, 0.98, 0.01)
    temperature = fit_temperature(labels, probabilities)
    confidence = apply_temperature(probabilities, temperature).max(axis=1)
    assert confidence.tolist() == pytest.approx([1 - 1 / (clips + 2)] * clips, abs=1e-4)


def test_a_perfect_mixed_validation_set() -> None:
    labels = np.arange(12) % 3
    sure = np.linspace(0.8, 0.999, 12)[:, None]
    probabilities = np.where(np.eye(3)[labels] > 0, sure, (1 - sure) / 2)
    temperature = fit_temperature(labels, probabilities)
    assert np.isfinite(temperature)
    confidence = apply_temperature(probabilities, temperature).max(axis=1)
    assert confidence.mean() == pytest.approx(1 - 1 / 14, abs=0.03)


def test_a_model_that_knows_nothing_gets_a_finite_temperature() -> None:
    labels = np.arange(90) % 3
    wrong = np.where(np.eye(3)[(labels + 1) % 3] > 0, 0.98, 0.01)
    temperature = fit_temperature(labels, wrong)
    assert 10 < temperature <= 20  # as flat as is allowed


def threshold_above(confidence: np.ndarray, lowest: float | None) -> object:
    """Midway between the lowest answered confidence and the next one below it, if there is one."""
    if lowest is None:
        return None
    below = max((c for c in confidence if c < lowest), default=None)
    return pytest.approx(lowest if below is None else (lowest + below) / 2, rel=1e-5)


@pytest.mark.parametrize(
    ("confidence", "correct", "target", "lowest"),
    [
        # (wrong + 1) / (n + 2) of the 1, 2, 3, 4 most confident: 1/3, 1/4, 2/5, 2/6
        ([0.9, 0.8, 0.7, 0.6], "++-+", 0.24, None),
        ([0.9, 0.8, 0.7, 0.6], "++-+", 0.25, 0.8),
        ([0.9, 0.8, 0.7, 0.6], "++-+", 0.33, 0.8),
        ([0.9, 0.8, 0.7, 0.6], "++-+", 1 / 3, 0.6),  # beyond a worse part: more clips are answered
        ([0.9, 0.8, 0.7, 0.6], "++-+", 1.0, 0.6),
        ([0.6, 0.7, 0.9, 0.8], "+-++", 0.25, 0.8),  # the order of the clips does not matter
        ([0.9, 0.8], "-+", 0.49, None),  # 2/3, 2/4
        ([0.9, 0.8], "-+", 0.5, 0.8),
        ([0.9, 0.8], "--", 0.5, None),  # 2/3, 3/4
        ([0.9, 0.8], "++", 0.1, None),  # two correct ones do not promise 10 %: 1/3, 1/4
        ([0.9] * 8, "++++++++", 0.1, 0.9),  # eight do: 1/10
        ([0.9] * 7, "+++++++", 0.1, None),  # seven do not: 1/9
        # clips of equal confidence are answered together or not: 1/3, then 2/5 for three, then 3/6
        ([0.9, 0.7, 0.7, 0.5], "++--", 0.39, 0.9),
        ([0.9, 0.7, 0.7, 0.5], "+-+-", 0.39, 0.9),
        ([0.9, 0.7, 0.7, 0.5], "++--", 0.4, 0.7),
        ([0.7, 0.7], "+-", 0.4, None),
        ([0.7, 0.7], "+-", 0.5, 0.7),
        ([], "", 0.1, None),
    ],
)
def test_threshold_by_hand(
    confidence: list[float], correct: str, target: float, lowest: float | None
) -> None:
    marks = np.array([mark == "+" for mark in correct], bool)
    threshold = choose_threshold(np.array(confidence), marks, target)
    assert threshold == threshold_above(confidence, lowest)
    assert threshold is None or threshold < lowest  # rounding must not exclude it


def test_threshold_answers_as_many_as_possible() -> None:
    rng = np.random.default_rng(0)
    unanswered = 0
    for _ in range(200):
        confidence = rng.integers(3, 11, 12) / 10  # many equal ones
        correct = rng.random(12) < confidence
        target = rng.choice([0.1, 0.2, 1 / 3])
        kept = []
        for threshold in confidence:
            answered = correct[confidence >= threshold]
            if ((~answered).sum() + 1) / (
                len(answered) + 2
            ) <= target + 1e-9:  # 1/3 may be 0.33...34
                kept.append(threshold)
        lowest = min(kept, default=None)
        unanswered += lowest is None
        assert choose_threshold(confidence, correct, target) == threshold_above(confidence, lowest)
    assert 0 < unanswered < 200


def test_calibrate_keeps_the_target_error_on_its_clips() -> None:
    labels, probabilities = simulated(300, 2.5)
    fitted = calibrate(labels, probabilities, 0.2)
    assert fitted.temperature == fit_temperature(labels, probabilities)
    calibrated = apply_temperature(probabilities, fitted.temperature)
    assert fitted.confidence == tuple(calibrated.max(axis=1))
    assert fitted.correct == tuple(probabilities.argmax(axis=1) == labels)
    assert fitted.target_error == 0.2
    answers = selective_risk(
        calibrated.max(axis=1), np.array(fitted.correct), fitted.min_confidence
    )
    assert answers["error"] <= 0.2
    assert 0 < answers["coverage"] < 1


def test_another_target_error() -> None:
    first = Calibration(1.7, 0.0, 0.8, (0.9, 0.8, 0.7, 0.6), (True, True, False, True))
    other = first.with_target_error(0.25)
    assert (other.target_error, other.threshold) == (0.25, pytest.approx(0.75))
    assert (other.temperature, other.confidence) == (1.7, first.confidence)
    assert other.correct == first.correct
    assert (first.target_error, first.threshold) == (0.0, 0.8)
    never = Calibration(1.7, 0.5, 0.8, (0.9, 0.8), (False, True)).with_target_error(0.1)
    assert never.threshold is None
    assert never.min_confidence == np.inf


@pytest.mark.parametrize(
    "calibration",
    [
        Calibration(),
        Calibration(1.7, 0.1, 0.8, (0.9, 0.8), (True, False)),
        Calibration(1.7, 0.1, None, (0.9, 0.8), (False, True)),
        calibrate(np.array([0, 1, 0]), np.array([[0.9, 0.1], [0.6, 0.4], [0.7, 0.3]]), 0.1),
    ],
)
def test_it_comes_back_from_a_checkpoint(calibration: Calibration, tmp_path: Path) -> None:
    torch.save({"calibration": calibration.state_dict()}, tmp_path / "c.pt")
    state = torch.load(tmp_path / "c.pt", weights_only=True)
    assert Calibration.from_state_dict(state["calibration"]) == calibration


def test_checkpoints_of_earlier_versions_are_read() -> None:
    state = {"temperature": 1.7, "wanted_error": 0.1, "threshold": 0.8}
    state |= {"confidence": [0.9, 0.8], "right": [True, False]}
    calibration = Calibration.from_state_dict(state)
    assert calibration == Calibration(1.7, 0.1, 0.8, (0.9, 0.8), (True, False))


def test_without_calibration_every_clip_is_answered() -> None:
    none = Calibration.from_state_dict(None)
    assert none == Calibration()
    assert none.temperature == 1
    assert none.target_error is None
    answers = selective_risk(np.array([0.0, 0.2, 1.0]), np.array([True] * 3), none.min_confidence)
    assert answers["coverage"] == 1


def test_what_a_checkpoint_holds_besides_is_left_out() -> None:
    fitted = calibrate(*simulated(40, 1.0), 0.1)
    state = {**fitted.state_dict(), "added by a newer version": 1}
    assert Calibration.from_state_dict(state) == fitted
