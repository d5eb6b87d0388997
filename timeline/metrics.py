"""What the numbers of a whole video mean: how much time is labelled right, and in which order.

Truth and prediction are segments in seconds. Time is not sampled: the scores are sums over the
stretches between all boundaries of both, which sampling finer and finer tends to.

- Only time that the truth gives a class is scored. Where it has a gap or a mark (`timeline.MARKS`),
  whatever is predicted there counts neither for nor against anything.
- Predicted time that is missing or has a mark is no answer: wrong in the accuracy, in nobody's
  precision. `coverage` is the share of time that is answered, `accuracy_answered` is over it alone.
- A class without truth is left out of the averages, as in metrics.py; time that is called so is
  wrong for the class that it really is.
- Touching segments of one label are one segment. The segmental scores see no marks and no time
  without truth; what is left on the two sides of such a hole stays two segments.

Relaxed by N seconds: in the first N seconds of a true segment the label of the segment before it is
right as well, in the last N that of the one after it, if they touch (`elementary_intervals`).
Cholec80's Evaluate.m means the same with N = 10 (its pitfalls: Funke et al., "Metrics Matter in
Surgical Phase Recognition", arXiv:2305.13961). But it forgives by phase numbers, one off and for
some phases two; applies what it finds in a segment's last N seconds to its first ones; and divides
all that is right in the union of truth and prediction by either of them, so that its precision and
recall can exceed 1. Ours cannot. Do not compare the two digit by digit.
"""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from timeline.segments import MARKS, Segment

OVERLAPS = (0.10, 0.25, 0.50)  # of segmental F1@10, @25, @50

_TOUCH = 1e-6  # seconds; what timeline.read_timeline lets pass as rounding


class Intervals(NamedTuple):
    """Scored time, cut wherever truth or prediction changes; each array is `(N,)`."""

    seconds: np.ndarray
    """how long each lasts"""
    truth: np.ndarray
    """true classes, names"""
    predicted: np.ndarray
    """predicted classes, names; empty where there is no answer"""
    right: np.ndarray
    """whether the prediction is the truth"""
    right_relaxed: np.ndarray
    """whether it is, or is the label beyond a near boundary"""


def class_segments(segments: Iterable[Segment]) -> list[Segment]:
    """Segments in order of time without marks; touching ones of one label become one."""
    merged: list[Segment] = []
    for segment in segments:
        if segment.label in MARKS:
            continue
        last = merged[-1] if merged else None
        if last and last.label == segment.label and segment.start - last.end < _TOUCH:
            merged[-1] = last._replace(end=segment.end)
        else:
            merged.append(segment)
    return merged


def elementary_intervals(
    truth: Sequence[Segment], predicted: Sequence[Segment], relaxed: float = 0.0
) -> Intervals:
    """Cut the time to which the truth gives a class wherever truth or prediction changes.

    Args:
        truth: in order of time, without overlap, a class among them; `predicted` may be empty.
        relaxed: seconds on either side of a boundary between two true segments in which the label
            of the other side is right, too. Only the boundaries of the segment in question count:
            a short one does not let through what lies behind it.
    """
    truth, predicted = class_segments(truth), class_segments(predicted)
    edges = [edge for one in (*truth, *predicted) for edge in (one.start, one.end)]
    edges += [edge for one in truth for edge in (one.start + relaxed, one.end - relaxed)]
    cuts = np.unique(edges)
    middles = (cuts[:-1] + cuts[1:]) / 2
    scored = _places(truth, middles) >= 0
    seconds, middles = np.diff(cuts)[scored], middles[scored]
    place = _places(truth, middles)
    starts, ends = _times(truth)
    before, after = _neighbours(truth)
    true, said = _names(truth)[place], _names(predicted)[_places(predicted, middles)]
    early = (middles - starts[place] < relaxed) & (said == before[place])
    late = (ends[place] - middles < relaxed) & (said == after[place])
    right_relaxed = (said == true) | ((early | late) & (said != ""))
    return Intervals(seconds, true, said, said == true, right_relaxed)


def pooled(parts: Sequence[Intervals]) -> Intervals:
    """The time of several videos as that of one."""
    return Intervals(*map(np.concatenate, zip(*parts, strict=True)))


def per_class(intervals: Intervals) -> pd.DataFrame:
    """Scores of each class that the truth has, 0 to 1.

    Returns:
        A row a class. `precision`: how much of the time that is called so is right. `recall`: how
        much of its true time is right. `f1`: their harmonic mean. `jaccard`: how much of the time
        that is or is called so is right. `seconds`: its true time. Never predicted: precision and
        F1 are zero.
    """
    rows = {}
    for name in sorted(set(intervals.truth)):
        true, said = intervals.truth == name, intervals.predicted == name
        precision, recall = _right_share(intervals, said), _right_share(intervals, true)
        rows[name] = {
            "precision": precision,
            "recall": recall,
            "f1": 2 * precision * recall / (precision + recall) if precision * recall else 0.0,
            "jaccard": _right_share(intervals, true | said),
            "seconds": math.fsum(intervals.seconds[true]),
        }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("class")


def time_scores(intervals: Intervals) -> dict[str, float]:
    """The headline scores of time, 0 to 1; of relaxed ones if `right` is replaced by them.

    Returns:
        `accuracy`; `macro_f1` and `jaccard`, means over the classes that the truth has; `coverage`,
        the share of time that is answered with a class; `accuracy_answered`, nan if none is.
    """
    table = per_class(intervals)
    answered = intervals.predicted != ""
    coverage = math.fsum(intervals.seconds[answered]) / math.fsum(intervals.seconds)
    return {
        "accuracy": _right_share(intervals, np.ones_like(answered)),
        "macro_f1": float(table["f1"].mean()),
        "jaccard": float(table["jaccard"].mean()),
        "coverage": coverage,
        "accuracy_answered": _right_share(intervals, answered) if coverage else math.nan,
    }


def segmental_scores(truth: Sequence[Segment], predicted: Sequence[Segment]) -> dict[str, float]:
    """`edit`, `f1_10`, `f1_25` and `f1_50` of a video; see `edit_score` and `segmental_f1`.

    Predicted segments are cut to the time that the truth covers.
    """
    truth = class_segments(truth)
    covered = class_segments(one._replace(label="covered") for one in truth)
    inside = [
        one._replace(start=max(one.start, span.start), end=min(one.end, span.end))
        for one in class_segments(predicted)
        for span in covered
        if min(one.end, span.end) - max(one.start, span.start) > _TOUCH
    ]
    f1 = {f"f1_{100 * overlap:.0f}": segmental_f1(truth, inside, overlap) for overlap in OVERLAPS}
    labels = [[one.label for one in segments] for segments in (truth, inside)]
    return {"edit": edit_score(*labels), **f1}


def edit_score(truth: Sequence[str], predicted: Sequence[str]) -> float:
    """How alike two sequences of labels are, 0 to 1: 1 - Levenshtein distance / the longer length.

    It punishes wrong order and over-segmentation, not shifted boundaries. Lea et al., "Segmental
    Spatiotemporal CNNs for Fine-grained Action Segmentation", ECCV 2016, arXiv:1602.02995.
    """
    above = list(range(len(predicted) + 1))
    for number, true in enumerate(truth, 1):
        row = [number]
        for place, said in enumerate(predicted):
            row.append(min(above[place] + (said != true), above[place + 1] + 1, row[place] + 1))
        above = row
    return 1 - above[-1] / max(len(truth), len(predicted))


def segmental_f1(truth: Sequence[Segment], predicted: Sequence[Segment], overlap: float) -> float:
    """F1 of segments, 0 to 1: a predicted one is right if its IoU with a true one is large enough.

    In order of time each predicted segment goes to the true one of its label with the highest IoU;
    it is wrong if that IoU is below `overlap` or that true segment is taken. Lea et al., "Temporal
    Convolutional Networks for Action Segmentation and Detection", CVPR 2017, arXiv:1611.05267.
    """
    taken: set[Segment] = set()
    for said in predicted:
        same = [true for true in truth if true.label == said.label]
        best = max(same, key=lambda true: _iou(true, said), default=None)
        if best and _iou(best, said) >= overlap - 1e-9:  # 3 s of 30 s are 10 %, in floats as well
            taken.add(best)
    return 2 * len(taken) / (len(truth) + len(predicted))


def _iou(a: Segment, b: Segment) -> float:
    common = max(0.0, min(a.end, b.end) - max(a.start, b.start))
    return common / (a.duration + b.duration - common)


def _right_share(intervals: Intervals, chosen: np.ndarray) -> float:
    """How much of the chosen time is right; zero if there is none."""
    # fsum rounds once, so that a part of the time is never more than all of it.
    total = math.fsum(intervals.seconds[chosen])
    return math.fsum(intervals.seconds[chosen & intervals.right]) / total if total else 0.0


def _times(segments: Sequence[Segment]) -> tuple[np.ndarray, np.ndarray]:
    """Starts and ends, `(S + 1,)`; the last stands for "none" and lies nowhere."""
    starts = [*(one.start for one in segments), math.inf]
    return np.array(starts), np.array([*(one.end for one in segments), -math.inf])


def _names(segments: Sequence[Segment]) -> np.ndarray:
    """Labels, `(S + 1,)`; the last is empty, for "none"."""
    return np.array([*(one.label for one in segments), ""])


def _places(segments: Sequence[Segment], times: np.ndarray) -> np.ndarray:
    """The number of the segment at each time; -1: none."""
    starts, ends = _times(segments)
    place = np.searchsorted(starts, times, side="right") - 1
    return np.where(times < ends[place], place, -1)


def _neighbours(segments: Sequence[Segment]) -> tuple[np.ndarray, np.ndarray]:
    """The labels of the segments that touch each one before and after it; empty: there is none."""
    names, (starts, ends) = _names(segments), _times(segments)
    touching = starts[1:] - ends[:-1] < _TOUCH
    after = np.append(np.where(touching, names[1:], ""), "")
    return np.append("", np.where(touching, names[:-1], "")), after
