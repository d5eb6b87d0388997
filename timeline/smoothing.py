"""HMM smoothing of per-frame probabilities into segments.

The hidden state is the true class, which lasts for a while; the network's probabilities are the
evidence. Offline, the Viterbi algorithm finds the likeliest sequence whose segments keep a minimum
duration. Online, a forward filter gives the likeliest class now. (Rabiner, "A Tutorial on Hidden
Markov Models", Proceedings of the IEEE, 1989.) The network's probabilities are used as likelihoods,
so all classes count as equally frequent.

Where the mean probability of the chosen class is below the threshold of the checkpoint, the label
is `uncertain`.
"""

import itertools
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from clips.manifest import UNCERTAIN
from timeline.segments import Segment

_MIN_PROBABILITY = 1e-6  # otherwise one overconfident prediction could decide everything


class HMMParams(NamedTuple):
    """The hidden Markov model for predictions that are some interval apart."""

    switch_prob: float
    """probability that the next prediction belongs to another segment"""
    evidence_weight: float
    """fraction of new evidence in a prediction: neighbouring windows share most of their frames"""
    min_length: int
    """smallest number of predictions in a segment"""

    def evidence(self, probabilities: np.ndarray) -> np.ndarray:
        """Log-likelihoods of the classes, in the shape of the probabilities."""
        return self.evidence_weight * np.log(np.maximum(probabilities, _MIN_PROBABILITY))

    def transitions(self, num_states: int) -> tuple[float, float]:
        """Log-probabilities of staying in a state, and of switching to one given other state."""
        return math.log1p(-self.switch_prob), math.log(self.switch_prob / (num_states - 1))


@dataclass(frozen=True)
class SmoothingConfig:
    """Settings of the smoothing; durations are in seconds."""

    mean_duration: float
    """mean duration of a segment"""
    min_duration: float
    """shortest duration of a segment"""
    window: float
    """length of the window of frames that a prediction is made from"""
    threshold: float
    """mean probability below which a stretch is `uncertain`; infinity: everything is uncertain"""
    method: Literal["auto", "viterbi", "causal", "none"] = "auto"
    """`viterbi` uses the whole video, `causal` only the past; auto: causal for live sources"""

    def params(self, interval: float) -> HMMParams:
        """The model for predictions that are `interval` seconds apart."""
        return HMMParams(
            switch_prob=min(0.5, interval / self.mean_duration),
            evidence_weight=min(1.0, interval / self.window),
            min_length=max(1, round(self.min_duration / interval)),
        )


def viterbi(evidence: np.ndarray, stay: float, switch: float, min_length: int = 1) -> np.ndarray:
    """The likeliest states whose segments all hold at least `min_length` predictions.

    Args:
        evidence: `(N, S)` log-likelihoods.
        stay, switch: log-probabilities of staying in a state, and of switching to one given other.
        min_length: smallest number of predictions in a segment, D.

    Returns:
        `(N,)` states. With N < D they are all the same.

    best[t, s] is the score of the best sequence up to t whose last segment, in state s, is long
    enough. Either the segment goes on from best[t - 1, s], or a new segment of exactly D
    predictions ends at t.
    """
    n, num_states = evidence.shape
    if n <= min_length:
        return np.full(n, evidence.sum(axis=0).argmax()) if n else np.zeros(0, int)
    sums = np.concatenate((np.zeros((1, num_states)), evidence.cumsum(axis=0)))
    # scores of the segments t - D + 1 ... t
    segment = sums[min_length:] - sums[:-min_length] + (min_length - 1) * stay
    best = segment[0]
    history = [best]  # best[t] from t = D - 1 on
    came_from = np.full((n, num_states), -1)  # state before a new segment; -1: the segment goes on
    states = np.arange(num_states)
    for t in range(min_length, n):
        going_on = best + stay + evidence[t]
        best = going_on
        if t >= 2 * min_length - 1:
            before = history[t - 2 * min_length + 1]  # best[t - D]
            first = int(before.argmax())
            without_first = before.copy()
            without_first[first] = -math.inf
            # A new segment comes from the best state that is not its own.
            source = np.where(states == first, int(without_first.argmax()), first)
            starting = before[source] + switch + segment[t - min_length + 1]
            is_new = starting > going_on
            came_from[t] = np.where(is_new, source, -1)
            best = np.where(is_new, starting, going_on)
        history.append(best)
    path = np.empty(n, int)
    t, state = n - 1, int(best.argmax())
    while t >= 0:
        source = came_from[t, state]
        if source < 0:
            path[t] = state
            t -= 1
        else:
            path[t - min_length + 1 : t + 1] = state
            t, state = t - min_length, int(source)
    return path


def viterbi_smooth(
    times: np.ndarray, probabilities: np.ndarray, smoothing: SmoothingConfig
) -> np.ndarray:
    """Smooth the predictions of a whole video.

    The uncertain stretches are those that maximise the sum of (probability - threshold) over all
    other predictions, while every stretch lasts the minimum duration: so the mean probability of
    what is labelled lies above the threshold. A class that is left with less than the minimum
    duration is uncertain too.

    Args:
        times: `(N,)` seconds.
        probabilities: `(N, num_classes)`.

    Returns:
        `(N,)` states; the state `num_classes` is `uncertain`.
    """
    n, num_classes = probabilities.shape
    if n == 0 or smoothing.threshold == math.inf:
        return np.full(n, num_classes)
    interval = float(np.median(np.diff(times))) if n > 1 else smoothing.window
    params = smoothing.params(interval)
    # A path may switch once per window, however many predictions there are. If it could switch at
    # every prediction, a switch would cost more the more often the same evidence is repeated.
    stay, switch = smoothing.params(max(interval, smoothing.window)).transitions(num_classes)
    evidence = params.evidence(probabilities)
    states = viterbi(evidence, params.evidence_weight * stay, switch, params.min_length)
    margin = probabilities[np.arange(n), states] - smoothing.threshold
    choices = np.stack((margin, np.zeros(n)), axis=1)  # to label, or to be uncertain
    is_uncertain = viterbi(choices, 0.0, 0.0, params.min_length) == 1
    states = np.where(is_uncertain, num_classes, states)
    for start, end in _runs(states):
        if end - start < params.min_length and is_uncertain.any():
            states[start:end] = num_classes
    return states


def _runs(states: np.ndarray) -> list[tuple[int, int]]:
    """First index and last index + 1 of each run of equal states."""
    starts = [0, *(np.flatnonzero(np.diff(states)) + 1).tolist(), len(states)]
    return list(itertools.pairwise(starts)) if len(states) else []


class ForwardFilter:
    """The likeliest class now, from the predictions so far; a new class must hold for a while."""

    def __init__(self, smoothing: SmoothingConfig, num_classes: int) -> None:
        self._smoothing = smoothing
        self._belief = np.full(num_classes, 1 / num_classes)
        self._recent: deque[tuple[float, np.ndarray]] = deque()  # within the minimum duration
        self._state: int | None = None
        self._likeliest, self._since = -1, 0.0  # the likeliest class, and since when it is
        self._time: float | None = None

    def step(self, time: float, probabilities: np.ndarray) -> int:
        """The state after the next prediction, `(num_classes,)`; `num_classes` is `uncertain`."""
        smoothing, num_classes = self._smoothing, len(probabilities)
        interval = smoothing.window if self._time is None else max(1e-3, time - self._time)
        self._time = time
        params = smoothing.params(interval)
        stay, switch = np.exp(params.transitions(num_classes))
        evidence = params.evidence(probabilities)
        belief = (switch + (stay - switch) * self._belief) * np.exp(evidence - evidence.max())
        self._belief = belief / belief.sum()
        likeliest = int(self._belief.argmax())
        if likeliest != self._likeliest:
            self._likeliest, self._since = likeliest, time - interval
        if self._state is None or time - self._since >= smoothing.min_duration - 1e-6:
            self._state = likeliest
        self._recent.append((time, probabilities))
        while time - self._recent[0][0] >= max(smoothing.min_duration, interval) - 1e-6:
            self._recent.popleft()
        confidence = np.mean([row[self._state] for _, row in self._recent])
        return self._state if confidence >= smoothing.threshold else num_classes


def to_segments(
    times: np.ndarray,
    states: np.ndarray,
    probabilities: np.ndarray,
    classes: Sequence[str],
    duration: float,
    marked: Sequence[Segment] = (),
) -> list[Segment]:
    """Segments that cover 0 to `duration`, from the smoothed predictions.

    A segment ends halfway between two predictions, or where a marked stretch begins.

    Args:
        times, states: `(N,)`, in order of time; the state `len(classes)` is `uncertain`.
        probabilities: `(N, num_classes)`.
        duration: length of the video in seconds.
        marked: stretches with other labels (unreadable, out of body), in order of time, without
            overlap. Predictions inside them do not count. Where there is no prediction between two
            of them, it is `uncertain`; if that lasts less than a second, the first one is extended.
    """
    labels = [*classes, UNCERTAIN]
    confidence = np.concatenate((probabilities, probabilities.max(axis=1, keepdims=True)), axis=1)
    segments: list[Segment] = []
    start = 0.0  # of the stretch before the next mark
    for mark in [*marked, None]:
        end = mark.start if mark else duration
        indices = np.flatnonzero((times >= start) & ((times < end) | (mark is None)))
        if len(indices):
            middles = (times[indices[1:]] + times[indices[:-1]]) / 2
            edges = np.concatenate(([start], middles, [max(end, times[indices[-1]])]))
            for first, last in _runs(states[indices]):
                state = states[indices[first]]
                mean = float(confidence[indices[first:last], state].mean())
                segments.append(
                    Segment(float(edges[first]), float(edges[last]), labels[state], mean)
                )
        elif end - start >= 1.0 or (not marked and end > start):
            segments.append(Segment(start, end, UNCERTAIN))
        elif end > start + 1e-9:
            if segments:
                segments[-1] = segments[-1]._replace(end=end)
            else:
                mark = mark._replace(start=start)
        if mark:
            if segments and segments[-1].label == mark.label:
                segments[-1] = segments[-1]._replace(end=mark.end)
            else:
                segments.append(mark)
            start = mark.end
    return segments
