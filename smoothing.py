"""From an answer a frame to a timeline that somebody can read.

A hidden Markov model: at every moment one of the classes is the true one, it stays so for a while,
and what the network says is the evidence. Offline Viterbi's algorithm finds the likeliest sequence
that keeps a minimum duration; online a forward filter says what is likeliest now. (Rabiner, "A
Tutorial on Hidden Markov Models", Proceedings of the IEEE, 1989.) The network's probabilities are
used as likelihoods: all classes are taken as equally frequent.

Where the network is not sure of the class that is found, by its probability over the minimum
duration and the checkpoint's threshold, the answer is `uncertain`.
"""

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from calibration import UNCERTAIN
from timeline import Segment

_SMALLEST = 1e-6  # one overconfident answer must not decide everything


@dataclass(frozen=True)
class Smoothing:
    """How much is smoothed. All in answers, of which there are several a second."""

    switching: float
    """probability that the next answer belongs to another segment"""
    weight: float
    """share of new evidence in an answer: neighbours see mostly the same frames"""
    minimum: int
    """answers that a segment lasts at least"""
    threshold: float
    """mean probability below which a stretch is `uncertain`; infinity: all is"""

    @classmethod
    def for_video(
        cls,
        interval: float,
        window: float,
        threshold: float,
        expected: float,
        minimum: float,
    ) -> "Smoothing":
        """From seconds.

        Args:
            interval: from one answer to the next.
            window: that an answer looks at.
            threshold: the checkpoint's; see calibration.py.
            expected: how long a segment lasts, on average.
            minimum: how long it lasts at least.
        """
        return cls(
            switching=min(0.5, interval / expected),
            weight=min(1.0, interval / window),
            minimum=max(1, round(minimum / interval)),
            threshold=threshold,
        )

    def evidence(self, probabilities: np.ndarray) -> np.ndarray:
        """Log-likelihoods of the classes, `(N, K)` as the probabilities."""
        return self.weight * np.log(np.maximum(probabilities, _SMALLEST))

    def transitions(self, states: int) -> tuple[float, float]:
        """Log-probabilities of staying, and of going to one certain other state."""
        return math.log1p(-self.switching), math.log(self.switching / (states - 1))


def viterbi(evidence: np.ndarray, stay: float, switch: float, minimum: int = 1) -> np.ndarray:
    """The likeliest states whose segments all last `minimum` answers at least.

    Args:
        evidence: `(N, S)` log-likelihoods.
        stay, switch: log-probabilities of staying in a state, of going to a certain other one.

    Returns:
        `(N,)` states. With fewer than `minimum` answers: one state for all.

    best[t, s] is the score of the best sequence up to t whose last segment, in s, is long enough.
    It goes on from best[t - 1, s], or a new segment of just `minimum` answers ends at t.
    """
    n, states = evidence.shape
    if n <= minimum:
        return np.full(n, evidence.sum(axis=0).argmax()) if n else np.zeros(0, int)
    within = np.concatenate((np.zeros((1, states)), evidence.cumsum(axis=0)))
    within = within[minimum:] - within[:-minimum] + (minimum - 1) * stay  # of answers t-D+1 ... t
    best = within[0]
    history = [best]  # from the answer minimum - 1 on
    came_from = np.full((n, states), -1)  # the state before a new segment; -1: the same goes on
    everyone = np.arange(states)
    for t in range(minimum, n):
        going_on = best + stay + evidence[t]
        best = going_on
        if t >= 2 * minimum - 1:
            before = history[t - 2 * minimum + 1]  # at the answer t - minimum
            first = int(before.argmax())
            others = before.copy()
            others[first] = -math.inf
            source = np.where(everyone == first, int(others.argmax()), first)
            starting = before[source] + switch + within[t - minimum + 1]
            fresh = starting > going_on
            came_from[t] = np.where(fresh, source, -1)
            best = np.where(fresh, starting, going_on)
        history.append(best)
    path = np.empty(n, int)
    t, state = n - 1, int(best.argmax())
    while t >= 0:
        source = came_from[t, state]
        if source < 0:
            path[t] = state
            t -= 1
        else:
            path[t - minimum + 1 : t + 1] = state
            t, state = t - minimum, int(source)
    return path


def smooth(probabilities: np.ndarray, smoothing: Smoothing) -> np.ndarray:
    """The states `(N,)` of answers `(N, num_classes)`, offline; `num_classes` is `uncertain`.

    The uncertain stretches are those that make the sum of (probability - threshold) over the others
    largest, where all last the minimum duration at least: what is answered is above the threshold
    on average. A class that has less than the minimum left is uncertain too.
    """
    n, classes = probabilities.shape
    minimum = smoothing.minimum
    states = viterbi(smoothing.evidence(probabilities), *smoothing.transitions(classes), minimum)
    if smoothing.threshold == math.inf:
        return np.full(n, classes)
    worth = probabilities[np.arange(n), states] - smoothing.threshold
    unsure = viterbi(np.stack((worth, np.zeros(n)), axis=1), 0.0, 0.0, minimum) == 1
    states = np.where(unsure, classes, states)
    starts = np.flatnonzero(np.diff(states, prepend=-1))
    for start, end in zip(starts, [*starts[1:], n], strict=True):
        if end - start < minimum and unsure.any():
            states[start:end] = classes
    return states


class CausalFilter:
    """What is likeliest now, from the answers so far; a new class must hold for a while."""

    def __init__(self, smoothing: Smoothing, classes: int) -> None:
        self._smoothing = smoothing
        stay, switch = smoothing.transitions(classes)
        self._move = np.full((classes, classes), math.exp(switch))
        np.fill_diagonal(self._move, math.exp(stay))
        self._belief = np.full(classes, 1 / classes)
        self._recent: deque[np.ndarray] = deque(maxlen=smoothing.minimum)
        self._state: int | None = None
        self._rival: int | None = None
        self._held = 0

    def push(self, probabilities: np.ndarray) -> int:
        """The state after the next answer, `(num_classes,)`; `num_classes` is `uncertain`."""
        log = self._smoothing.evidence(probabilities)
        belief = (self._belief @ self._move) * np.exp(log - log.max())
        self._belief = belief / belief.sum()
        likeliest = int(self._belief.argmax())
        self._held = self._held + 1 if likeliest == self._rival else 1
        self._rival = likeliest
        if self._state is None or self._held >= self._smoothing.minimum:
            self._state = likeliest
        self._recent.append(probabilities)
        confidence = np.mean([row[self._state] for row in self._recent])
        return self._state if confidence >= self._smoothing.threshold else len(probabilities)


def to_segments(
    times: np.ndarray,
    states: np.ndarray,
    probabilities: np.ndarray,
    classes: Sequence[str],
    duration: float,
    marked: Sequence[Segment] = (),
) -> list[Segment]:
    """Segments that cover 0 to `duration`, from answers at some times.

    A segment ends halfway between two answers, or where a marked stretch begins.

    Args:
        times, states: `(N,)`, in order; the state `len(classes)` is `uncertain`.
        probabilities: `(N, num_classes)`.
        marked: stretches that are something else (unreadable, out of body), in order, without
            overlap. Answers inside them do not count. Where there is no answer between two of them,
            the first goes on to the second.
    """
    labels = [*classes, UNCERTAIN]
    confidence = np.concatenate((probabilities, probabilities.max(axis=1, keepdims=True)), axis=1)
    segments: list[Segment] = []
    place = 0.0
    for mark in [*marked, None]:
        end = mark.start if mark else duration
        these = np.flatnonzero((times >= place) & ((times < end) | (mark is None)))
        if len(these):
            middles = (times[these[1:]] + times[these[:-1]]) / 2
            edges = np.concatenate(([place], middles, [max(end, times[these[-1]])]))
            starts = np.flatnonzero(np.diff(states[these], prepend=-1))
            for first, last in zip(starts, [*starts[1:], len(these)], strict=True):
                state = states[these[first]]
                mean = float(confidence[these[first:last], state].mean())
                segments.append(
                    Segment(float(edges[first]), float(edges[last]), labels[state], mean)
                )
        elif end > place + 1e-9:
            if segments:
                segments[-1] = segments[-1]._replace(end=end)
            elif mark:
                mark = mark._replace(start=place)
            else:
                segments.append(Segment(place, end, UNCERTAIN))
        if mark:
            if segments and segments[-1].label == mark.label:
                segments[-1] = segments[-1]._replace(end=mark.end)
            else:
                segments.append(mark)
            place = mark.end
    return segments
