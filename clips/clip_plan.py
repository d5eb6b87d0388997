"""Which clips an annotated video is cut into, and their labels.

The video is divided into clips of `seconds` that start every `stride` seconds, the first at 0. The
label of a clip is the one that covers the largest part of it, if that is more than `min_share` of
it. A clip is left out if its middle is closer than `margin` seconds to a boundary: a time at which
the label changes, begins or ends (the start and the end of the video are none). The marks
`uncertain`, `unreadable` and `out_of_body` count as no label. Where there is no label there are no
clips, unless `background` names a class for them.
"""

import math
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from clips.manifest import NON_CLASS_LABELS
from clips.segments import Segment

_TOUCHING = 0.001  # seconds; segments closer than that follow each other without a gap
_ROUNDING = 1e-6


class PlannedClip(NamedTuple):
    """A clip that is to be cut."""

    start: float
    end: float
    label: str
    segment: Segment
    """the source segment"""


def plan_clips(
    segments: Sequence[Segment],
    duration: float,
    seconds: float,
    stride: float,
    margin: float = 0.5,
    min_share: float = 0.5,
    background: str = "",
) -> tuple[list[PlannedClip], Counter[str]]:
    """The clips of a video, and how many are left out for each reason; see above for the rules.

    Args:
        segments: in order of time, without overlap.
        duration: length of the video; no clip reaches beyond it.
    """
    pieces = _pieces(segments, duration)
    starts = [piece.start for piece in pieces]
    boundaries = starts[1:]
    clips: list[PlannedClip] = []
    left_out: Counter[str] = Counter()
    # The last number is that of the last clip that ends within the video.
    for number in range(math.floor((duration - seconds + _ROUNDING) / stride) + 1):
        start, end = number * stride, number * stride + seconds
        middle = (start + end) / 2
        near = bisect_right(boundaries, middle)
        near_boundary = any(
            abs(middle - boundary) < margin - _ROUNDING
            for boundary in boundaries[max(0, near - 1) : near + 1]
        )
        shares: Counter[str] = Counter()
        longest: dict[str, tuple[float, Segment]] = {}
        for piece in pieces[bisect_right(starts, start) - 1 : bisect_left(starts, end)]:
            share = (min(end, piece.end) - max(start, piece.start)) / seconds
            shares[piece.label] += share
            longest[piece.label] = max(longest.get(piece.label, (0.0, piece)), (share, piece))
        label, share = shares.most_common(1)[0]
        if near_boundary:
            left_out["near a boundary"] += 1
        elif share <= min_share + _ROUNDING:
            left_out["without a label that covers enough of them"] += 1
        elif not label and not background:
            left_out["without a label"] += 1
        else:
            clips.append(PlannedClip(start, end, label or background, longest[label][1]))
    return clips, left_out


def _pieces(segments: Sequence[Segment], duration: float) -> list[Segment]:
    """The whole video as segments with different labels; an empty label where there is none."""
    pieces: list[Segment] = []

    def add(start: float, end: float, label: str) -> None:
        if pieces and pieces[-1].label == label:
            pieces[-1] = Segment(pieces[-1].start, end, label)
        elif end > start:
            pieces.append(Segment(start, end, label))

    time = 0.0
    for segment in segments:
        start, end = max(segment.start, time), min(segment.end, duration)
        if segment.label in NON_CLASS_LABELS or end <= start:
            continue
        if start - time < _TOUCHING:
            start = time
        add(time, start, "")
        add(start, end, segment.label)
        time = end
    if duration - time >= _TOUCHING or not pieces:
        add(time, duration, "")
    else:
        add(time, duration, pieces[-1].label)
    return pieces
