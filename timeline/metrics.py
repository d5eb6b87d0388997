"""Scores of timelines: how much time is labelled correctly, and in which order.

Truth and prediction are segments in seconds. Time is not sampled: the scores are sums over the
stretches between all boundaries of both, the limit of ever finer sampling.

- Only time to which the truth gives a class is scored. Where the truth has a gap or a mark
  (`clips.manifest.NON_CLASS_LABELS`), the prediction does not count.
- Time that the prediction leaves out or marks is not answered: it is wrong in the accuracy, and
  counts in the precision of no class. `coverage` is the fraction of time that is answered,
  `accuracy_answered` the accuracy over that time.
- A class without truth is left out of the averages, as in evaluation/metrics.py; time that is
  predicted as such a class is wrong for its true class.
- Touching segments of one label count as one segment. The segmental scores ignore marks and time
  without truth; the parts on the two sides of such a hole stay two segments.

Relaxed by N seconds: in the first N seconds of a true segment the label of the segment before it is
correct as well, in the last N seconds that of the segment after it, if they touch
(`align_segments`). Cholec80's Evaluate.m does something similar with N = 10 (for its pitfalls see
Funke et al., "Metrics Matter in Surgical Phase Recognition", arXiv:2305.13961), but the numbers
cannot be compared: it forgives by the distance of phase numbers (one, for some phases two), applies
what it finds in the last N seconds of a segment to the first ones, and divides all correct time in
the union of truth and prediction by either of them, so that its precision and recall can exceed 1.
"""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from clips.manifest import NON_CLASS_LABELS
from timeline.segments import Segment

OVERLAPS = (0.10, 0.25, 0.50)  # of segmental F1@10, @25, @50

_TOLERANCE = 1e-6  # seconds; timeline.segments.read_timeline accepts as much as rounding


class Intervals(NamedTuple):
    """Scored time, cut wherever truth or prediction changes; each array is `(N,)`."""

    seconds: np.ndarray
    """length of each interval"""
    truth: np.ndarray
    """names of the true classes"""
    prediction: np.ndarray
    """names of the predicted classes; empty where the time is not answered"""
    correct: np.ndarray
    """whether the prediction is the truth"""
    correct_relaxed: np.ndarray
    """whether the prediction is the truth, or the true label beyond a near boundary"""


def merge_segments(segments: Iterable[Segment]) -> list[Segment]:
    """Segments in order of time without marks; touching segments of one label become one."""
    merged: list[Segment] = []
    for segment in segments:
        if segment.label in NON_CLASS_LABELS:
            continue
        last = merged[-1] if merged else None
        if last and last.label == segment.label and segment.start - last.end < _TOLERANCE:
            merged[-1] = last._replace(end=segment.end)
        else:
            merged.append(segment)
    return merged


def align_segments(
    truth: Sequence[Segment], prediction: Sequence[Segment], relaxed: float = 0.0
) -> Intervals:
    """Cut the time to which the truth gives a class wherever truth or prediction changes.

    Args:
        truth: segments in order of time, without overlap, at least one of them with a class.
        prediction: segments in order of time, without overlap; there may be none.
        relaxed: seconds on either side of a boundary between two true segments in which the label
            of the other side is correct as well. Only the boundaries of the segment itself count:
            behind a short segment, the label of the next but one is not correct.
    """
    truth, prediction = merge_segments(truth), merge_segments(prediction)
    edges = [edge for segment in (*truth, *prediction) for edge in segment[:2]]
    edges += [edge for true in truth for edge in (true.start + relaxed, true.end - relaxed)]
    cuts = np.unique(edges)
    middles = (cuts[:-1] + cuts[1:]) / 2
    is_scored = _segment_at(truth, middles) >= 0
    seconds, middles = np.diff(cuts)[is_scored], middles[is_scored]
    index = _segment_at(truth, middles)
    starts, ends = _bounds(truth)
    before, after = _neighbours(truth)
    true = _labels(truth)[index]
    predicted = _labels(prediction)[_segment_at(prediction, middles)]
    is_early = (middles - starts[index] < relaxed) & (predicted == before[index])
    is_late = (ends[index] - middles < relaxed) & (predicted == after[index])
    correct = predicted == true
    correct_relaxed = correct | ((is_early | is_late) & (predicted != ""))
    return Intervals(seconds, true, predicted, correct, correct_relaxed)


def concatenate(parts: Sequence[Intervals]) -> Intervals:
    """The intervals of several videos as those of a single one."""
    return Intervals(*map(np.concatenate, zip(*parts, strict=True)))


def per_class(intervals: Intervals) -> dict[str, dict[str, float]]:
    """Scores of each class that the truth has, 0 to 1, by the names of the classes.

    Returns:
        `precision`: correct fraction of the time that is predicted as the class (0 if there is
        none). `recall`: correct fraction of its true time. `f1`: harmonic mean of the two.
        `jaccard`: correct fraction of the time that is the class or is predicted as it. `seconds`:
        its true time.
    """
    scores = {}
    for name in sorted(set(intervals.truth.tolist())):
        true, predicted = intervals.truth == name, intervals.prediction == name
        precision, recall = _accuracy(intervals, predicted), _accuracy(intervals, true)
        scores[name] = {
            "precision": precision,
            "recall": recall,
            "f1": 2 * precision * recall / (precision + recall) if precision * recall else 0.0,
            "jaccard": _accuracy(intervals, true | predicted),
            "seconds": math.fsum(intervals.seconds[true]),
        }
    return scores


def duration_scores(intervals: Intervals) -> dict[str, float]:
    """The main scores of time, 0 to 1. For relaxed scores replace `correct` by `correct_relaxed`.

    Returns:
        `accuracy`; `macro_f1` and `jaccard`, means over the classes that the truth has; `coverage`,
        the fraction of time that is answered with a class; `accuracy_answered`, nan if none is.
    """
    classes = per_class(intervals).values()
    is_answered = intervals.prediction != ""
    coverage = math.fsum(intervals.seconds[is_answered]) / math.fsum(intervals.seconds)
    return {
        "accuracy": _accuracy(intervals, np.ones_like(is_answered)),
        "macro_f1": float(np.mean([scores["f1"] for scores in classes])),
        "jaccard": float(np.mean([scores["jaccard"] for scores in classes])),
        "coverage": coverage,
        "accuracy_answered": _accuracy(intervals, is_answered) if coverage else math.nan,
    }


def segmental_scores(truth: Sequence[Segment], prediction: Sequence[Segment]) -> dict[str, float]:
    """`edit`, `f1_10`, `f1_25` and `f1_50` of a video; see `edit_score` and `segmental_f1`.

    Predicted segments are cut to the time that the truth covers.
    """
    truth = merge_segments(truth)
    covered = merge_segments(segment._replace(label="covered") for segment in truth)
    inside = [
        segment._replace(start=max(segment.start, span.start), end=min(segment.end, span.end))
        for segment in merge_segments(prediction)
        for span in covered
        if min(segment.end, span.end) - max(segment.start, span.start) > _TOLERANCE
    ]
    f1 = {f"f1_{100 * overlap:.0f}": segmental_f1(truth, inside, overlap) for overlap in OVERLAPS}
    labels = [[segment.label for segment in segments] for segments in (truth, inside)]
    return {"edit": edit_score(*labels), **f1}


def edit_score(truth: Sequence[str], prediction: Sequence[str]) -> float:
    """Similarity of two label sequences, 0 to 1: 1 - Levenshtein distance / the longer length.

    It punishes wrong order and over-segmentation, not shifted boundaries. Lea et al., "Segmental
    Spatiotemporal CNNs for Fine-grained Action Segmentation", ECCV 2016, arXiv:1602.02995.
    """
    above = list(range(len(prediction) + 1))
    for number, true in enumerate(truth, 1):
        row = [number]
        for i, predicted in enumerate(prediction):
            row.append(min(above[i] + (predicted != true), above[i + 1] + 1, row[i] + 1))
        above = row
    return 1 - above[-1] / max(len(truth), len(prediction))


def segmental_f1(
    truth: Sequence[Segment], prediction: Sequence[Segment], min_overlap: float
) -> float:
    """F1 of segments, 0 to 1: a prediction is correct if its IoU with a true segment is enough.

    In order of time each predicted segment is matched with the true segment of its label that has
    the highest IoU. It is wrong if that IoU is below `min_overlap`, or if that true segment is
    already matched. Lea et al., "Temporal Convolutional Networks for Action Segmentation and
    Detection", CVPR 2017, arXiv:1611.05267.
    """
    matched: set[Segment] = set()
    for segment in prediction:
        candidates = [true for true in truth if true.label == segment.label]
        best = max(candidates, key=lambda true: _iou(true, segment), default=None)
        # The tolerance is for floats: 3 s of 30 s are 10 %.
        if best and _iou(best, segment) >= min_overlap - 1e-9:
            matched.add(best)
    return 2 * len(matched) / (len(truth) + len(prediction))


def _iou(a: Segment, b: Segment) -> float:
    common = max(0.0, min(a.end, b.end) - max(a.start, b.start))
    return common / (a.duration + b.duration - common)


def _accuracy(intervals: Intervals, mask: np.ndarray) -> float:
    """The correct fraction of the selected time; zero if there is no such time."""
    # fsum rounds only once, so a part of the time is never more than all of it.
    total = math.fsum(intervals.seconds[mask])
    return math.fsum(intervals.seconds[mask & intervals.correct]) / total if total else 0.0


def _bounds(segments: Sequence[Segment]) -> tuple[np.ndarray, np.ndarray]:
    """Starts and ends, `(S + 1,)`; the last entry stands for "no segment" and contains no time."""
    starts = [*(segment.start for segment in segments), math.inf]
    return np.array(starts), np.array([*(segment.end for segment in segments), -math.inf])


def _labels(segments: Sequence[Segment]) -> np.ndarray:
    """Labels, `(S + 1,)`; the last one is empty, for "no segment"."""
    return np.array([*(segment.label for segment in segments), ""])


def _segment_at(segments: Sequence[Segment], times: np.ndarray) -> np.ndarray:
    """The index of the segment at each time; -1: none."""
    starts, ends = _bounds(segments)
    index = np.searchsorted(starts, times, side="right") - 1
    return np.where(times < ends[index], index, -1)


def _neighbours(segments: Sequence[Segment]) -> tuple[np.ndarray, np.ndarray]:
    """The labels of the touching segments before and after each segment; empty: there is none."""
    labels, (starts, ends) = _labels(segments), _bounds(segments)
    is_touching = starts[1:] - ends[:-1] < _TOLERANCE
    after = np.append(np.where(is_touching, labels[1:], ""), "")
    return np.append("", np.where(is_touching, labels[:-1], "")), after
