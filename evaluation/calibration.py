"""Temperature scaling and a confidence threshold for abstaining.

Both are fitted on the validation clips at the end of training and stored in the checkpoint: a
temperature that all logits are divided by, and the confidence below which a clip is called
`uncertain`.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from evaluation.metrics import risk_coverage
from utils.errors import UserError

_MIN_TEMPERATURE, _MAX_TEMPERATURE = 0.05, 20.0

# Earlier names of what a checkpoint holds.
_OLD_NAMES = {"wanted_error": "target_error", "right": "correct"}


@dataclass(frozen=True)
class Calibration:
    """The calibration of a checkpoint."""

    temperature: float = 1.0
    """the logits are divided by it before the softmax"""
    target_error: float | None = None
    """error rate among the answered clips that the threshold aims at; None: nothing was fitted"""
    threshold: float | None = 0.0
    """lowest confidence that is answered; None: no threshold reaches the target error, and every
    clip is uncertain"""
    confidence: tuple[float, ...] = ()
    """calibrated confidence of each validation clip, from which another threshold can be chosen"""
    correct: tuple[bool, ...] = ()
    """whether the prediction for each validation clip was correct"""

    @property
    def min_confidence(self) -> float:
        """The threshold as a number: infinity where nothing is answered."""
        return np.inf if self.threshold is None else self.threshold

    def with_target_error(self, target_error: float) -> "Calibration":
        """The same with the threshold for another error rate."""
        confidence, correct = np.array(self.confidence), np.array(self.correct, bool)
        threshold = choose_threshold(confidence, correct, target_error)
        return replace(self, target_error=target_error, threshold=threshold)

    def alternative(self) -> dict[str, float] | None:
        """What a higher target error would give: the lowest one, in whole percent, at which more
        validation clips are answered than now, and at least half of them.

        Returns:
            `target_error`; `clips`, the number of validation clips; `answered`, how many of them
            it answers; `error`, the fraction of these that is wrong. None: there is no such target.
        """
        confidence, correct = np.array(self.confidence), np.array(self.correct, bool)
        now = (confidence >= self.min_confidence).sum()
        for percent in range(1, 101):
            other = self.with_target_error(percent / 100)
            answered = confidence >= other.min_confidence
            if answered.sum() > now and answered.mean() >= 0.5:
                return {
                    "target_error": percent / 100,
                    "clips": len(confidence),
                    "answered": int(answered.sum()),
                    "error": float((~correct[answered]).mean()),
                }
        return None

    def state_dict(self) -> dict[str, Any]:
        """As a checkpoint holds it: plain numbers and lists."""
        return {
            **asdict(self),
            "confidence": list(self.confidence),
            "correct": list(self.correct),
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any] | None) -> "Calibration":
        """The calibration of a checkpoint. Without one: every clip is answered, temperature 1."""
        if not state:
            return cls()
        values = {_OLD_NAMES.get(name, name): value for name, value in state.items()}
        lists = {name: tuple(values[name]) for name in ("confidence", "correct")}
        known = {field.name for field in fields(cls)}  # a file may hold anything else
        return cls(**{name: values[name] for name in known & values.keys()} | lists)


def load_calibration(
    state: Mapping[str, Any], target_error: float | None, source: str | Path
) -> Calibration:
    """The calibration of a checkpoint, with the threshold for `target_error` if that is given.

    Args:
        state: the checkpoint.
        source: its file or run folder, for messages.

    Raises:
        UserError: the checkpoint has none that a threshold could be chosen from.
    """
    calibration = Calibration.from_state_dict(state.get("calibration"))
    if target_error is None:
        return calibration
    if not 0 <= target_error <= 1:
        raise UserError(f"target_error = {target_error}: must be from 0 to 1")
    if not calibration.correct:
        raise UserError(
            f"{source}: was not calibrated on validation clips, so there is nothing to choose a "
            "threshold from (leave --target-error out)"
        )
    return calibration.with_target_error(target_error)


def describe_alternative(alternative: Mapping[str, float] | None) -> str:
    """`Calibration.alternative` as a sentence for people who got only `uncertain`."""
    if not alternative:
        return "a higher --target-error answers more, and more of it wrongly"
    return (
        f"--target-error {alternative['target_error']:g} would answer {alternative['answered']} of "
        f"the {alternative['clips']} validation clips, {alternative['error']:.0%} of these wrongly"
    )


def calibrate(labels: np.ndarray, probabilities: np.ndarray, target_error: float) -> Calibration:
    """Fit temperature and threshold on validation clips.

    Args:
        labels: `(N,)` true classes.
        probabilities: `(N, num_classes)`, uncalibrated.
        target_error: see `choose_threshold`.
    """
    temperature = fit_temperature(labels, probabilities)
    calibrated = apply_temperature(probabilities, temperature)
    correct = calibrated.argmax(axis=1) == labels
    fitted = Calibration(
        temperature,
        confidence=tuple(map(float, calibrated.max(axis=1))),
        correct=tuple(map(bool, correct)),
    )
    return fitted.with_target_error(target_error)


def apply_temperature(probabilities: np.ndarray, temperature: float | np.ndarray) -> np.ndarray:
    """The probabilities if the logits were divided by `temperature`, one for all or `(N,)`."""
    powers = np.log(np.maximum(probabilities, 1e-300)) / np.reshape(temperature, (-1, 1))
    powers = np.exp(powers - powers.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def fit_temperature(labels: np.ndarray, probabilities: np.ndarray) -> float:
    """The temperature with the lowest negative log-likelihood (Guo et al., arXiv:1706.04599).

    A model that is correct on all of the few validation clips would get temperature zero, and then
    be certain of everything. So the targets are not quite 0 and 1: as in Platt, "Probabilistic
    Outputs for Support Vector Machines" (1999), the true class of N clips gets 1 - 1/(N + 2).
    """
    from scipy import optimize  # takes half a second to import

    n, num_classes = probabilities.shape
    logits = np.log(np.maximum(probabilities, 1e-300))
    epsilon = 1 / (n + 2)
    targets = np.full((n, num_classes), epsilon / (num_classes - 1))
    targets[np.arange(n), labels] = 1 - epsilon

    def loss(log_temperature: float) -> float:
        scaled = logits / np.exp(log_temperature)
        top = scaled.max(axis=1, keepdims=True)
        normalizer = top + np.log(np.exp(scaled - top).sum(axis=1, keepdims=True))
        return float((targets * (normalizer - scaled)).sum() / n)

    bounds = (np.log(_MIN_TEMPERATURE), np.log(_MAX_TEMPERATURE))
    result = optimize.minimize_scalar(loss, bounds=bounds, method="bounded")
    return float(np.exp(result.x))


def choose_threshold(
    confidence: np.ndarray, correct: np.ndarray, target_error: float
) -> float | None:
    """The threshold that answers most clips while at most `target_error` of the answers are wrong.

    The error rate of n answers is estimated as (wrong + 1) / (n + 2), Laplace's rule of succession:
    if only the most confident clip is answered, and correctly, the estimate is not zero. The
    estimate holds for these clips; on others, especially of other patients, the error rate may be
    higher: the test measures it.

    Args:
        confidence: `(N,)`.
        correct: `(N,)` bool.

    Returns:
        The threshold, midway to the next lower confidence, so that rounding changes nothing; None
        if there is no such threshold.
    """
    coverage, risk = risk_coverage(confidence, correct)
    answered = np.round(coverage * len(confidence))
    expected = (risk * answered + 1) / (answered + 2)
    ordered = np.sort(confidence)[::-1]
    # Clips of equal confidence are answered together: only the last of them can be the limit.
    last = np.append(ordered[:-1] > ordered[1:], True) if len(ordered) else np.array([], bool)
    possible = np.flatnonzero(last & (expected <= target_error + 1e-12))
    if not len(possible):
        return None
    lowest, *lower = ordered[possible[-1] :]
    return float((lowest + lower[0]) / 2) if lower else float(lowest * (1 - 1e-6))
