"""Windows inside segments: which frames they hold, and where their relevance stands."""

import csv
import itertools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import make_model

from clips.manifest import OUT_OF_BODY, UNCERTAIN, UNREADABLE
from explanation.methods import explain
from timeline.relevance import (
    BATCH,
    MAX_WINDOWS,
    SegmentRelevance,
    WindowExplainer,
    explain_timeline,
    fill_windows,
    write_relevance,
)
from timeline.segments import Segment, Timeline
from timeline.sources import Frame, FrameSource
from utils.errors import UserError
from utils.interrupt import Interrupt, Interrupted
from video.container import ClipError

CLASSES = ("cut", "sew")
T = 4
FPS = 10.0


class Numbered(FrameSource):
    """A video of `seconds` at ten frames per second; the pixels of frame n are n % 256."""

    def __init__(self, seconds: float, missing: Sequence[int] = ()) -> None:
        super().__init__("numbered", FPS, 4)
        self.rate = FPS
        self.numbers = [n for n in range(round(seconds * FPS)) if n not in missing]
        self.given = 0

    def __iter__(self) -> Iterator[Frame]:
        for n in self.numbers:
            self.given += 1
            yield Frame(n / FPS, np.full((4, 4, 3), n % 256, np.uint8))


class Fake:
    """Gives each frame its number as relevance, negative for the second class."""

    n_frames = T

    def __init__(self, source: Numbered | None = None) -> None:
        self.source = source
        self.batches: list[int] = []
        self.read: list[int] = []
        self.seen: set[int] = set()

    def explain(self, windows: Sequence[Sequence[Frame]], targets: Sequence[int]) -> np.ndarray:
        self.batches.append(len(windows))
        self.read += [self.source.given] if self.source else []
        numbers = np.array([[frame.image.max() for frame in window] for window in windows], float)
        assert numbers.shape == (len(windows), T)
        self.seen |= set(numbers.astype(int).ravel().tolist())
        return numbers * np.where(np.array(targets) == 0, 1, -1)[:, None]


def make_timeline(*segments: Segment) -> Timeline:
    return Timeline("v", CLASSES, segments[-1].end, list(segments), np.empty(0), np.empty((0, 2)))


def frames_of(timeline: Timeline, seconds: float | None = None, **options) -> dict[int, list]:
    """The numbers of the frames of each window, by the number of its segment."""
    windows: dict[int, list] = {}
    for window in fill_windows(Numbered(seconds or timeline.duration, **options), timeline, T):
        numbers = [round(frame.time * FPS) for frame in window.frames]
        windows.setdefault(window.number, []).append(numbers)
    return windows


def test_a_segment_is_filled_with_windows_that_do_not_overlap() -> None:
    timeline = make_timeline(Segment(0.0, 2.0, "cut"), Segment(2.0, 3.0, "sew"))
    windows = frames_of(timeline)
    assert windows[0] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15],
                          [16, 17, 18, 19]]  # fmt: skip
    assert windows[1] == [[21, 22, 23, 24], [26, 27, 28, 29]]  # 2 windows, 0.1 s around each


def test_a_long_segment_has_eight_windows_evenly_spread() -> None:
    windows = frames_of(make_timeline(Segment(0.0, 16.0, "cut")))[0]
    assert len(windows) == MAX_WINDOWS == 8
    assert windows == [list(range(start, start + T)) for start in range(8, 160, 20)]


@pytest.mark.parametrize(
    ("segments", "expected"),
    [
        # 0.2 s in the middle of 0.4 s
        ([Segment(0, 1.0, UNCERTAIN), Segment(1.0, 1.2, "cut"), Segment(1.2, 3.0, UNCERTAIN)],
         [9, 10, 11, 12]),
        ([Segment(0, 0.2, "cut"), Segment(0.2, 3.0, UNCERTAIN)], [0, 1, 2, 3]),
        ([Segment(0, 2.8, UNCERTAIN), Segment(2.8, 3.0, "cut")], [26, 27, 28, 29]),
        # between two marks
        ([Segment(0, 1.0, UNREADABLE), Segment(1.0, 1.2, "cut"), Segment(1.2, 3.0, UNCERTAIN)],
         [10, 11, 12, 13]),
        ([Segment(0, 1.0, UNCERTAIN), Segment(1.0, 1.2, "cut"), Segment(1.2, 3.0, OUT_OF_BODY)],
         [8, 9, 10, 11]),
        ([Segment(0, 1.0, UNREADABLE), Segment(1.0, 1.2, "cut"), Segment(1.2, 3.0, OUT_OF_BODY)],
         [10, 11]),
        ([Segment(0, 1.0, UNREADABLE), Segment(1.0, 1.2, "cut"), Segment(1.2, 1.3, UNCERTAIN),
          Segment(1.3, 3.0, OUT_OF_BODY)], [10, 11, 12]),
    ],
)  # fmt: skip
def test_a_short_segment_has_a_window_centred_on_it(
    segments: list[Segment], expected: list[int]
) -> None:
    windows = frames_of(make_timeline(*segments))
    assert list(windows.values()) == [[expected]]


def test_windows_of_neighbours_may_overlap() -> None:
    parts = [Segment(n / 10, (n + 1) / 10, CLASSES[n % 2]) for n in range(20)]
    windows = frames_of(make_timeline(*parts))
    assert len(windows) == 20
    assert all(len(numbers) == T for (numbers,) in windows.values())
    middle = [np.mean(windows[n][0]) for n in range(3, 17)]
    assert np.abs(np.array(middle) - np.arange(3, 17)).max() <= 0.5


def test_missing_frames_make_a_window_longer_and_none_is_shown_twice() -> None:
    windows = frames_of(make_timeline(Segment(0.0, 1.0, "cut")), missing=[2, 3])
    # The first window has its four frames, and the second one, which begins at 0.55 s, only three.
    assert windows[0] == [[1, 4, 5, 6]]


def test_marks_are_not_shown_and_nothing_uncertain_is_explained() -> None:
    timeline = make_timeline(
        Segment(0.0, 2.0, "cut"),
        Segment(2.0, 3.0, OUT_OF_BODY),
        Segment(3.0, 3.1, "sew"),
        Segment(3.1, 4.0, UNCERTAIN),
        Segment(4.0, 5.0, UNREADABLE),
        Segment(5.0, 6.0, "sew"),
    )
    fake = Fake()
    relevance = explain_timeline(Numbered(6.0), timeline, fake)
    assert [part.number for part in relevance] == [0, 2, 5]
    assert not fake.seen & {*range(20, 30), *range(40, 50)}
    for part in relevance:
        sign = 1 if timeline.segments[part.number].label == "cut" else -1
        np.testing.assert_allclose(part.values, sign * part.times * FPS, atol=1e-9)
        assert (np.diff(part.times) > 0).all()
        assert part.interval == 0.1


def test_the_relevance_of_a_repeated_frame_is_that_of_the_frame() -> None:
    timeline = make_timeline(Segment(0, 1.0, UNREADABLE), Segment(1.0, 1.2, "cut"))
    (part,) = explain_timeline(Numbered(1.2), timeline, Fake())
    assert part.times.tolist() == [1.0, 1.1]
    assert part.values.tolist() == [10, 3 * 11]  # frames 10, 11, 11, 11


def test_windows_are_explained_as_they_fill() -> None:
    """The frames that are kept do not grow with the video."""
    source = Numbered(120.0)
    timeline = make_timeline(*(Segment(s, s + 2.0, CLASSES[s // 2 % 2]) for s in range(0, 120, 2)))
    fake = Fake(source)
    relevance = explain_timeline(source, timeline, fake)
    assert len(relevance) == 60
    assert sum(fake.batches) == 60 * 5
    assert max(fake.batches) == BATCH
    # Batch k holds the frames up to 16 (k + 1); the decoder is at most its queue ahead.
    ahead = np.array(fake.read) - 16 * np.arange(1, len(fake.read) + 1)
    assert ahead.max() <= 64


def test_an_interrupt_ends_it() -> None:
    timeline = make_timeline(Segment(0.0, 100.0, "cut"))
    with Interrupt() as interrupt:
        interrupt.signal = 2
        with pytest.raises(Interrupted):
            explain_timeline(Numbered(100.0), timeline, Fake(), interrupt)


def test_a_video_that_breaks_off_is_explained_up_to_there() -> None:
    class Breaks(Numbered):
        def __iter__(self) -> Iterator[Frame]:
            yield from itertools.islice(super().__iter__(), self.good)
            raise ClipError("v", "the disk is gone")

    timeline = make_timeline(Segment(0.0, 2.0, "cut"))
    source = Breaks(2.0)
    source.good = 10
    (part,) = explain_timeline(source, timeline, Fake())
    assert part.times.tolist() == [n / 10 for n in range(8)]
    source = Breaks(2.0)
    source.good = 0
    with pytest.raises(ClipError, match="the disk is gone"):
        explain_timeline(source, timeline, Fake())


@pytest.mark.parametrize("name", ["tsm_resnet", "vivit"])
def test_a_window_is_explained_as_a_clip(name: str) -> None:
    torch.manual_seed(0)
    size = {"image_size": 32, "n_frames": T} if name == "vivit" else {}
    model = make_model(name, 2, **size).eval()
    images = torch.randint(0, 256, (2, T, 3, 32, 32), dtype=torch.uint8)
    windows = [
        [Frame(t / FPS, image.permute(1, 2, 0).numpy()) for t, image in enumerate(clip)]
        for clip in images
    ]
    method = "gradcam++" if name == "tsm_resnet" else "occlusion"
    values = WindowExplainer(model, method, T).explain(windows, [1, 0])
    expected = explain(model, images, torch.tensor([1, 0]), method).frames
    np.testing.assert_allclose(values, expected, rtol=1e-3, atol=1e-5)


def test_no_relevance_that_is_not_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("tsm_resnet", 2).eval()
    explainer = WindowExplainer(model, "occlusion", T)
    frames = [Frame(0.0, np.zeros((32, 32, 3), np.uint8))] * T

    infinite = torch.full((1, T), math.inf)
    monkeypatch.setattr("timeline.relevance.explain_frames", lambda *_: infinite)
    with pytest.raises(UserError, match="the relevance is not finite"):
        explainer.explain([frames], [0])


@pytest.mark.parametrize("seed", range(20))
def test_the_main_stretch_is_the_shortest_one_with_most_of_the_relevance(seed: int) -> None:
    rng = np.random.default_rng(seed)
    count = int(rng.integers(1, 25))
    values = rng.normal(0.3, 1, count) * rng.integers(0, 2, count)
    times = np.cumsum(rng.uniform(0.1, 2, count))
    stretch = SegmentRelevance(0, times, values, 0.1).main_stretch()
    positive = np.maximum(values, 0)
    if not positive.any():
        assert stretch is None
        return
    spans = [
        (j - i, -positive[i:j].sum(), times[i], times[j - 1] + 0.1)
        for i in range(count)
        for j in range(i + 1, count + 1)
        if positive[i:j].sum() >= 0.6 * positive.sum() - 1e-9
    ]
    frames, amount, start, end = min(spans)
    assert stretch[:3] == pytest.approx((start, end, -amount / positive.sum()))
    assert stretch.stands_out == (3 * frames <= count)


def test_the_table_has_a_row_per_frame(tmp_path: Path) -> None:
    timeline = make_timeline(Segment(0, 1, UNCERTAIN), Segment(1, 2.5, "cut"))
    part = SegmentRelevance(1, np.array([1.0, 1.08]), np.array([-0.5, 1 / 3]), 0.08)
    write_relevance(tmp_path / "relevance.csv", timeline, [part])
    with open(tmp_path / "relevance.csv", newline="") as file:
        rows = list(csv.reader(file))
    assert rows == [
        ["segment", "start", "end", "label", "time", "relevance"],
        ["2", "1.000", "2.500", "cut", "1.000", "-0.5"],
        ["2", "1.000", "2.500", "cut", "1.080", "0.333333"],
    ]
