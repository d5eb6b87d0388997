"""From an answer a frame to a timeline that somebody can read.

A hidden Markov model: at every moment one of the classes is the true one, it stays so for a while,
and what the network says is the evidence. Offline Viterbi's algorithm finds the likeliest sequence
that keeps a minimum duration; online a forward filter says what is likeliest now. (Rabiner, "A
Tutorial on Hidden Markov Models", Proceedings of the IEEE, 1989.) The network's probabilities are
used as likelihoods: all classes are taken as equally frequent.

Where the network is not sure of the class that is found, by its probability over the minimum
duration and the checkpoint's threshold, the answer is `uncertain`.
"""

import itertools
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from clips.manifest import UNCERTAIN
from timeline.segments import Segment

_SMALLEST = 1e-6  # one overconfident answer must not decide everything


class Steps(NamedTuple):
    """What smoothing means from one answer to the next."""

    switching: float
    """probability that the next answer belongs to another segment"""
    weight: float
    """share of new evidence in an answer: neighbours see mostly the same frames"""
    minimum: int
    """answers that a segment lasts at least"""

    def evidence(self, probabilities: np.ndarray) -> np.ndarray:
        """Log-likelihoods of the classes, of the probabilities' shape."""
        return self.weight * np.log(np.maximum(probabilities, _SMALLEST))

    def transitions(self, states: int) -> tuple[float, float]:
        """Log-probabilities of staying, and of going to one certain other state."""
        return math.log1p(-self.switching), math.log(self.switching / (states - 1))


@dataclass(frozen=True)
class Smoothing:
    """How much is smoothed, in seconds."""

    expected: float
    """how long a segment lasts, on average"""
    minimum: float
    """how long it lasts at least"""
    window: float
    """that an answer looks at"""
    threshold: float
    """mean probability below which a stretch is `uncertain`; infinity: all is"""

    def steps(self, interval: float) -> Steps:
        """For answers that are `interval` seconds apart."""
        return Steps(
            switching=min(0.5, interval / self.expected),
            weight=min(1.0, interval / self.window),
            minimum=max(1, round(self.minimum / interval)),
        )


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


def smooth(times: np.ndarray, probabilities: np.ndarray, smoothing: Smoothing) -> np.ndarray:
    """The states `(N,)` of answers `(N, num_classes)`, offline; `num_classes` is `uncertain`.

    The uncertain stretches are those that make the sum of (probability - threshold) over the others
    largest, where all last the minimum duration at least: what is answered is above the threshold
    on average. A class that has less than the minimum left is uncertain too.
    """
    n, classes = probabilities.shape
    if n == 0 or smoothing.threshold == math.inf:
        return np.full(n, classes)
    interval = float(np.median(np.diff(times))) if n > 1 else smoothing.window
    steps = smoothing.steps(interval)
    # A path has one chance a window to switch, however many answers there are: with one at every
    # answer a switch would cost the more, the more often the same evidence is told.
    stay, switch = smoothing.steps(max(interval, smoothing.window)).transitions(classes)
    evidence = steps.evidence(probabilities)
    states = viterbi(evidence, steps.weight * stay, switch, steps.minimum)
    worth = probabilities[np.arange(n), states] - smoothing.threshold
    unsure = viterbi(np.stack((worth, np.zeros(n)), axis=1), 0.0, 0.0, steps.minimum) == 1
    states = np.where(unsure, classes, states)
    for start, end in _runs(states):
        if end - start < steps.minimum and unsure.any():
            states[start:end] = classes
    return states


def _runs(states: np.ndarray) -> list[tuple[int, int]]:
    """First and one past the last place of each run of equal states."""
    starts = [0, *(np.flatnonzero(np.diff(states)) + 1).tolist(), len(states)]
    return list(itertools.pairwise(starts)) if len(states) else []


class CausalFilter:
    """What is likeliest now, from the answers so far; a new class must hold for a while."""

    def __init__(self, smoothing: Smoothing, classes: int) -> None:
        self._smoothing = smoothing
        self._belief = np.full(classes, 1 / classes)
        self._recent: deque[tuple[float, np.ndarray]] = deque()  # of the minimum duration
        self._state: int | None = None
        self._rival, self._since = -1, 0.0  # what is likeliest, and since when
        self._time: float | None = None

    def push(self, time: float, probabilities: np.ndarray) -> int:
        """The state after the next answer, `(num_classes,)`; `num_classes` is `uncertain`."""
        smoothing, classes = self._smoothing, len(probabilities)
        passed = smoothing.window if self._time is None else max(1e-3, time - self._time)
        self._time = time
        steps = smoothing.steps(passed)
        stay, switch = np.exp(steps.transitions(classes))
        log = steps.evidence(probabilities)
        belief = (switch + (stay - switch) * self._belief) * np.exp(log - log.max())
        self._belief = belief / belief.sum()
        likeliest = int(self._belief.argmax())
        if likeliest != self._rival:
            self._rival, self._since = likeliest, time - passed
        if self._state is None or time - self._since >= smoothing.minimum - 1e-6:
            self._state = likeliest
        self._recent.append((time, probabilities))
        while time - self._recent[0][0] >= max(smoothing.minimum, passed) - 1e-6:
            self._recent.popleft()
        confidence = np.mean([row[self._state] for _, row in self._recent])
        return self._state if confidence >= smoothing.threshold else classes


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
            for first, last in _runs(states[these]):
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
