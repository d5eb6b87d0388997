"""Confidence that means something, and when to say `uncertain`.

Both are fitted on the validation clips at the end of training and stored in the checkpoint:
a temperature that all logits are divided by, and the confidence below which there is no answer.
"""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy import optimize

from evaluation.metrics import risk_coverage

_LOWEST, _HIGHEST = 0.05, 20.0  # of temperatures


@dataclass(frozen=True)
class Calibration:
    """What a checkpoint knows of its confidence."""

    temperature: float = 1.0
    """logits are divided by it before the softmax"""
    wanted_error: float | None = None
    """share of wrong answers that the threshold is to keep; None: nothing was fitted"""
    threshold: float | None = 0.0
    """lowest confidence that is answered; None: no threshold keeps the wanted error, so none is"""
    confidence: tuple[float, ...] = ()
    """of each validation clip, tempered; what another threshold can be chosen from"""
    right: tuple[bool, ...] = ()
    """whether the model was right about each of them"""

    @property
    def lowest_answered(self) -> float:
        """The threshold as a number: infinity where nothing is answered."""
        return np.inf if self.threshold is None else self.threshold

    def with_wanted_error(self, wanted_error: float) -> "Calibration":
        """The same with the threshold for another error rate."""
        confidence, right = np.array(self.confidence), np.array(self.right, bool)
        threshold = choose_threshold(confidence, right, wanted_error)
        return Calibration(self.temperature, wanted_error, threshold, self.confidence, self.right)

    def state(self) -> dict[str, Any]:
        """As a checkpoint holds it: plain numbers and lists."""
        return {**asdict(self), "confidence": list(self.confidence), "right": list(self.right)}

    @classmethod
    def from_state(cls, state: dict[str, Any] | None) -> "Calibration":
        """The calibration of a checkpoint; an older one has none: all is answered, untempered."""
        if not state:
            return cls()
        lists = {name: tuple(state[name]) for name in ("confidence", "right")}
        return cls(**{**state, **lists})


def calibrate(labels: np.ndarray, probabilities: np.ndarray, wanted_error: float) -> Calibration:
    """Fit temperature and threshold on validation clips.

    Args:
        labels: `(N,)` true classes.
        probabilities: `(N, num_classes)`, untempered.
        wanted_error: see `choose_threshold`.
    """
    temperature = fit_temperature(labels, probabilities)
    tempered = temper(probabilities, temperature)
    right = tempered.argmax(axis=1) == labels
    fitted = Calibration(
        temperature,
        confidence=tuple(map(float, tempered.max(axis=1))),
        right=tuple(map(bool, right)),
    )
    return fitted.with_wanted_error(wanted_error)


def temper(probabilities: np.ndarray, temperature: float | np.ndarray) -> np.ndarray:
    """The probabilities if the logits had been divided by `temperature`, one for all or `(N,)`."""
    powers = np.log(np.maximum(probabilities, 1e-300)) / np.reshape(temperature, (-1, 1))
    powers = np.exp(powers - powers.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def fit_temperature(labels: np.ndarray, probabilities: np.ndarray) -> float:
    """The temperature with the lowest negative log-likelihood (Guo et al., arXiv:1706.04599).

    A model that is right about all of the few validation clips would get temperature zero, and then
    be certain of everything. So the targets are not quite 0 and 1: as in Platt, "Probabilistic
    Outputs for Support Vector Machines" (1999), the true class of N clips gets 1 - 1/(N + 2).
    """
    n, num_classes = probabilities.shape
    logits = np.log(np.maximum(probabilities, 1e-300))
    doubt = 1 / (n + 2)
    targets = np.full((n, num_classes), doubt / (num_classes - 1))
    targets[np.arange(n), labels] = 1 - doubt

    def loss(log_temperature: float) -> float:
        scaled = logits / np.exp(log_temperature)
        top = scaled.max(axis=1, keepdims=True)
        normalizer = top + np.log(np.exp(scaled - top).sum(axis=1, keepdims=True))
        return float((targets * (normalizer - scaled)).sum() / n)

    bounds = (np.log(_LOWEST), np.log(_HIGHEST))
    found = optimize.minimize_scalar(loss, bounds=bounds, method="bounded")
    return float(np.exp(found.x))


def choose_threshold(
    confidence: np.ndarray, right: np.ndarray, wanted_error: float
) -> float | None:
    """The threshold that answers most while at most `wanted_error` of the answers are wrong.

    The share of wrong ones among n answers is taken as (wrong + 1) / (n + 2), Laplace's rule of
    succession: that the one surest clip was right does not promise an error of zero. It holds on
    these clips; others, of other patients above all, may be answered worse: look at the test.

    Returns:
        The threshold, midway to the next lower confidence, so that rounding changes nothing; None
        if there is no such threshold.
    """
    coverage, risk = risk_coverage(confidence, right)
    answered = np.round(coverage * len(confidence))
    expected = (risk * answered + 1) / (answered + 2)
    ordered = np.sort(confidence)[::-1]
    # All clips of one confidence are answered or none: only the last of equals can be the limit.
    last = np.append(ordered[:-1] > ordered[1:], True) if len(ordered) else np.array([], bool)
    possible = np.flatnonzero(last & (expected <= wanted_error + 1e-12))
    if not len(possible):
        return None
    lowest, *lower = ordered[possible[-1] :]
    return float((lowest + lower[0]) / 2) if lower else float(lowest * (1 - 1e-6))
