"""Which seconds of a recording decided for the label of each segment: predict.py --explain.

The video is read a second time. Inside each segment that has a class, windows of the model are
explained for that class, and the relevance of each frame stands at its time. What is unreadable or
was taken outside the patient is not shown to the model here either.
"""

import math
from collections import deque
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from clips.manifest import OUT_OF_BODY, UNREADABLE
from explanation.methods import explain, require_method
from explanation.relevance import Method
from modeling.inference import prepare_for_inference
from timeline.prefetch import Prefetcher
from timeline.segments import Segment, Timeline
from timeline.sources import Frame, FrameSource
from utils.errors import UserError
from utils.interrupt import Interrupt, Interrupted
from utils.tables import write_csv
from video.container import ClipError

MAX_WINDOWS = 8
"""windows per segment that are explained; in a longer segment they are spread evenly"""

BATCH = 4
"""windows that are explained at once"""

CHUNK = 16
"""frames that are taken from the decoder at once"""

STANDS_OUT = 1 / 3
"""the largest part of the frames that half of the relevance may come from, to be worth naming"""

_BAR = "relevance: {percentage:3.0f}%|{bar}| left {remaining}"


class Stretch(NamedTuple):
    """The shortest stretch of frames that at least half of the positive relevance comes from."""

    start: float
    """seconds of the video"""
    end: float
    fraction: float
    """of the positive relevance of the segment"""
    stands_out: bool
    """whether it is at most a third of the frames that were looked at: of relevance that is spread
    evenly, half would come from half of the frames"""


@dataclass(frozen=True)
class SegmentRelevance:
    """The relevance of frames of a segment for its label."""

    number: int
    """index of the segment in its timeline"""
    times: np.ndarray
    """`(N,)` seconds of the video, in order"""
    values: np.ndarray
    """`(N,)` relevance of the frames for the logit of the label: positive where a frame speaks for
    it. Segments cannot be compared by it."""
    interval: float
    """seconds from one frame of a window to the next"""

    def main_stretch(self) -> Stretch | None:
        """Where most of the positive relevance comes from; None: no frame speaks for the label."""
        positive = np.clip(self.values, 0, None)
        sums = np.concatenate(([0.0], np.cumsum(positive)))
        half, count = sums[-1] / 2, len(positive)
        if not sums[-1] > 0:
            return None
        best = (count + 1, 0.0, 0, 0)  # frames, -sum, first, last + 1
        last = 0
        for first in range(count):
            while last < count and sums[last] - sums[first] < half * (1 - 1e-9):
                last += 1
            amount = sums[last] - sums[first]
            if amount < half * (1 - 1e-9):
                break
            best = min(best, (last - first, -amount, first, last))
        frames, amount, first, last = best
        return Stretch(
            start=float(self.times[first]),
            end=float(self.times[last - 1] + self.interval),
            fraction=float(-amount / sums[-1]),
            stands_out=frames <= STANDS_OUT * count,
        )


class WindowExplainer:
    """Explains windows of a video by a method.

    Args:
        model: trained model; it is copied and prepared for inference.
        n_frames: T, frames of a window.
        device: device to compute on, in fp32.

    Raises:
        UserError: the method is not defined for the model.
    """

    def __init__(
        self, model: nn.Module, method: Method, n_frames: int, device: torch.device | str = "cpu"
    ) -> None:
        self.method = method
        self.n_frames = n_frames
        self.device = torch.device(device)
        require_method(model, method)
        self._model = prepare_for_inference(model, self.device)

    def explain(self, windows: Sequence[Sequence[Frame]], targets: Sequence[int]) -> np.ndarray:
        """The relevance of the frames of B windows for a class each, `(B, T)`.

        Args:
            windows: of `n_frames` frames each.

        Raises:
            UserError: it is not finite.
        """
        images = np.stack([[frame.image for frame in window] for window in windows])
        clips = torch.from_numpy(images).permute(0, 1, 4, 2, 3).contiguous()  # (B, T, C, H, W)
        relevance = explain(self._model, clips.to(self.device), torch.tensor(targets), self.method)
        values = relevance.frames.double().numpy()
        if not np.isfinite(values).all():
            raise UserError("the relevance is not finite")
        return values


def explain_timeline(
    source: FrameSource,
    timeline: Timeline,
    explainer: WindowExplainer,
    interrupt: Interrupt | None = None,
) -> list[SegmentRelevance]:
    """The relevance of every segment that has a class, in their order.

    Windows are explained as they fill, a few at a time, so that memory does not grow with the
    video.

    Args:
        source: the video again, opened as for the timeline.
        interrupt: request to stop.

    Raises:
        ClipError: the video gives no frame any more.
        UserError: the relevance is not finite, or the model cannot be explained.
        Interrupted: the interrupt came.
    """
    found: dict[int, list[tuple[float, float]]] = {}
    batch: list[Window] = []

    def explain_batch() -> None:
        targets = [timeline.classes.index(timeline.segments[w.number].label) for w in batch]
        values = explainer.explain([window.padded for window in batch], targets)
        for window, row in zip(batch, values, strict=True):
            count = len(window.frames)
            # The last frame of a window that is too short is repeated.
            row = [*row[: count - 1], row[count - 1 :].sum()]
            times = [frame.time for frame in window.frames]
            found.setdefault(window.number, []).extend(zip(times, row, strict=True))
        batch.clear()

    with closing(fill_windows(source, timeline, explainer.n_frames, interrupt)) as windows:
        for window in windows:
            batch.append(window)
            if len(batch) == BATCH:
                explain_batch()
    if batch:
        explain_batch()
    interval = frame_interval(source)
    return [
        SegmentRelevance(number, *np.array(pairs, float).T, interval)
        for number, pairs in sorted(found.items())
    ]


def frame_interval(source: FrameSource) -> float:
    """Seconds from one frame that the model is shown to the next."""
    return 1 / min(source.fps, source.rate or source.fps)


@dataclass(frozen=True)
class Window:
    """A window of a segment."""

    number: int
    """index of the segment"""
    frames: Sequence[Frame]
    """at least 1, at most T"""
    n_frames: int

    @property
    def padded(self) -> list[Frame]:
        """T frames: the last one is repeated where the video gives fewer, as for the timeline."""
        return [*self.frames, *[self.frames[-1]] * (self.n_frames - len(self.frames))]


@dataclass
class _Plan:
    """The windows of a segment that are still to be filled."""

    number: int
    starts: deque[float]
    """from when on each window takes frames"""
    limit: float
    """no window reaches further: there the video ends, or something is not to be seen"""
    n_frames: int
    frames: list[Frame] = field(default_factory=list)
    """of the window that is being filled"""
    filled: bool = False
    """whether a window has been filled"""

    def add(self, frame: Frame) -> Window | None:
        """Take the next frame, and return the window that it completes."""
        if frame.time >= self.limit:
            return self.finish()
        if not self.frames and frame.time < self.starts[0] - 1e-6:
            return None
        self.frames.append(frame)
        if len(self.frames) < self.n_frames:
            return None
        window = Window(self.number, self.frames, self.n_frames)
        self.frames, self.filled = [], True
        self.starts.popleft()
        return window

    def finish(self) -> Window | None:
        """The only window of a segment, if there are too few frames for a whole one."""
        self.starts.clear()
        if self.filled or not self.frames:
            return None
        self.filled = True
        return Window(self.number, self.frames, self.n_frames)


def fill_windows(
    source: FrameSource, timeline: Timeline, n_frames: int, interrupt: Interrupt | None = None
) -> Generator[Window]:
    """The windows of all segments, each as soon as its last frame is read.

    Raises:
        ClipError: the video gives no frame.
        Interrupted: the interrupt came.
    """
    marks = deque(s for s in timeline.segments if s.label in (UNREADABLE, OUT_OF_BODY))
    plans: deque[_Plan] | None = None
    active: list[_Plan] = []
    with (
        Prefetcher(source) as prefetcher,
        tqdm(total=timeline.duration, bar_format=_BAR, leave=False) as bar,
    ):
        while True:
            if interrupt and interrupt.signal:
                raise Interrupted
            try:
                frames = prefetcher.get(CHUNK)
            except ClipError:
                if plans is None:
                    raise
                break  # the timeline ends here too, and tells why
            if frames is None:
                break
            if plans is None and frames:  # from here on the source knows its rate
                window = n_frames * frame_interval(source)
                plans = deque(plan_windows(timeline, window, n_frames))
            for frame in frames:
                while marks and marks[0].end <= frame.time:
                    marks.popleft()
                if marks and marks[0].start <= frame.time:
                    continue
                while plans and plans[0].starts[0] <= frame.time + 1e-6:
                    active.append(plans.popleft())
                yield from filter(None, [plan.add(frame) for plan in active])
                active = [plan for plan in active if plan.starts]
            if frames:
                bar.update(frames[-1].time - bar.n)
    yield from filter(None, [plan.finish() for plan in active])


def plan_windows(timeline: Timeline, window: float, n_frames: int) -> list[_Plan]:
    """Where the windows of each segment that has a class lie, in order of their first start.

    A segment gets as many windows as fit into it, at most MAX_WINDOWS, spread evenly and without
    overlap. A shorter one gets a window that is centred on it, as far as the video and the marked
    stretches around it allow.

    Args:
        window: length of a window in seconds.
    """
    marks = [s for s in timeline.segments if s.label in (UNREADABLE, OUT_OF_BODY)]
    plans, before = [], 0.0  # end of the last mark before the segment
    after = deque(marks)
    for number, segment in enumerate(timeline.segments):
        if after and segment is after[0]:
            before = after.popleft().end
        if segment.label not in timeline.classes:
            continue
        limit = after[0].start if after else math.inf
        starts = _starts(segment, window, before, min(limit, timeline.duration))
        plans.append(_Plan(number, deque(starts), limit, n_frames))
    return sorted(plans, key=lambda plan: plan.starts[0])


def _starts(segment: Segment, window: float, before: float, after: float) -> list[float]:
    """The starts of the windows of a segment that lies between two times."""
    count = min(MAX_WINDOWS, math.floor(segment.duration / window + 1e-6))
    if count:
        share = segment.duration / count  # of the segment for each window
        return [segment.start + (i + 0.5) * share - window / 2 for i in range(count)]
    middle = (segment.start + segment.end) / 2
    return [max(before, min(middle - window / 2, after - window))]


def write_relevance(
    path: str | Path, timeline: Timeline, relevance: Sequence[SegmentRelevance]
) -> None:
    """Write relevance.csv: a row per frame that was looked at, segments numbered from 1."""
    rows: list[list[str]] = [["segment", "start", "end", "label", "time", "relevance"]]
    for part in relevance:
        segment = timeline.segments[part.number]
        first = [f"{part.number + 1}", f"{segment.start:.3f}", f"{segment.end:.3f}", segment.label]
        rows += [
            [*first, f"{time:.3f}", f"{value:.6g}"]
            for time, value in zip(part.times, part.values, strict=True)
        ]
    write_csv(path, rows)
