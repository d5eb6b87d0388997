"""overlay.mp4: the right label at the right time, nothing hidden is shown, bounded memory."""

import itertools
import tracemalloc
from pathlib import Path

import av
import numpy as np
import pytest
from helpers import write_stamped

from clips.manifest import OUT_OF_BODY, UNCERTAIN, UNREADABLE
from timeline.overlay import EVERY_FRAME, Band, fill, overlay_frames, write_overlay
from timeline.segments import Segment, Timeline
from timeline.sources import FileSource
from utils.interrupt import Interrupt
from video.container import decode, to_rgb
from video.encoder import write_video

CLASSES = ("dark", "grey", "Құрал ұстағыш")
PLAN = [("dark", 1.0), (UNCERTAIN, 2.0), (OUT_OF_BODY, 3.0), ("grey", 4.0), (UNREADABLE, 5.0)]
RATE = 10
RED = (200, 30, 30)


def make_timeline(plan=PLAN, classes=CLASSES) -> Timeline:
    starts = [0.0, *(end for _, end in plan)]
    segments = [
        Segment(start, end, label, 0.82) for start, (label, end) in zip(starts, plan, strict=False)
    ]
    empty = np.empty((0, len(classes)))
    return Timeline("v", classes, plan[-1][1], segments, np.empty(0), empty)


def make_video(path: Path, seconds: float = 5.0, size=(64, 96), rate: int = RATE) -> Path:
    """A red video."""
    frames = np.full((round(seconds * rate), *size, 3), RED, np.uint8)
    write_video(path, frames, rate)
    return path


def source(path: Path) -> FileSource:
    return FileSource(path, EVERY_FRAME, None)


def read(path: Path) -> list[np.ndarray]:
    return [to_rgb(frame, None) for frame in decode(path, 0)]


def test_each_frame_has_its_label_and_its_playhead(tmp_path: Path) -> None:
    timeline = make_timeline()
    video = make_video(tmp_path / "v.mp4")
    assert write_overlay(tmp_path / "overlay.mp4", source(video), timeline, RATE) == []
    frames = read(tmp_path / "overlay.mp4")
    assert len(frames) == 50
    with av.open(str(tmp_path / "overlay.mp4")) as container:
        assert container.streams.video[0].average_rate == RATE
    width = 4 * 96  # enlarged, so that the text has room
    band = Band(timeline, width, 4 * 64)
    assert frames[0].shape == (4 * 64 + band.height, width, 3)
    for number, frame in enumerate(frames):
        seconds = number / RATE
        label = next(label for label, end in PLAN if seconds < end)
        size, half = band.text_size, (band.caption_height - band.text_size) // 2
        top = 4 * 64 + half
        square = frame[top : top + size, size // 2 : size // 2 + size]
        errors = {
            name: np.abs(square.astype(int) - fill(name, CLASSES, size, size, size)).mean()
            for name in (*CLASSES, UNCERTAIN, OUT_OF_BODY, UNREADABLE)
        }
        assert min(errors, key=errors.get) == label
        strip = frame[-band.strip_height + 4 : -4].astype(int).min(axis=(0, 2))
        assert abs(int(strip.argmax()) - band.column(seconds)) <= 2


def test_frames_outside_the_patient_and_unreadable_ones_are_not_shown(tmp_path: Path) -> None:
    """Nor the frames just before: the detector saw only some of the frames."""
    video = make_video(tmp_path / "v.mp4")
    frames, rate = overlay_frames(source(video), make_timeline(), 5.0)
    assert rate == RATE
    is_red = [bool(np.abs(f[:256].mean((0, 1)) - RED).max() < 20) for f in frames]
    is_empty = [not red for red in is_red]
    hidden = [n for n in range(50) if is_empty[n]]
    # from 2 - 1/5 - 1/10 s to 3 s, and from 4 s on
    assert hidden == [*range(17, 30), *range(40, 50)]


def test_a_frame_from_outside_is_not_held_over_its_end(tmp_path: Path) -> None:
    """Where frames are missing, the last one is repeated, but not one that is hidden."""
    video = make_video(tmp_path / "v.mp4", 2.05)
    timeline = make_timeline([(OUT_OF_BODY, 2.02), ("grey", 4.0)])
    frames, _ = overlay_frames(source(video), timeline, 5.0)
    assert all(np.ptp(f[:256]) == 0 for f in frames)


def test_a_video_of_a_camera_with_pauses_keeps_its_time(tmp_path: Path) -> None:
    path = tmp_path / "pause.webm"
    write_stamped(path, [*range(0, 1000, 100), *range(3000, 4000, 100)])
    frames, _ = overlay_frames(source(path), make_timeline([("dark", 4.0)]), 5.0)
    pictures = [f[:240] for f in frames]
    same = [np.array_equal(a, b) for a, b in itertools.pairwise(pictures)]
    assert len(pictures) == 40
    assert all(same[10:29])  # the last frame before the pause is repeated


@pytest.mark.parametrize("size", [(31, 33), (240, 320), (1080, 1920), (700, 200)])
@pytest.mark.parametrize("name", ["x" * 300, "Құрал ұстағыш", "手術 🔪 𓀀", "a$b$"])
def test_any_name_fits_any_size(size: tuple[int, int], name: str) -> None:
    timeline = make_timeline([(name, 5.0)], (name, "other"))
    width = max(size[1], 320)
    band = Band(timeline, width, size[0])
    frame = band.below(np.zeros((size[0], width, 3), np.uint8), 2.0)
    assert frame.shape == (size[0] + band.height, width, 3)
    assert band.height < 0.3 * max(size[0], 120)
    caption = frame[size[0] : -band.strip_height].astype(int).sum(axis=2)
    is_ink = (caption[2:-2] > 300).any(axis=0)
    ink = np.flatnonzero(is_ink)
    assert ink[0] >= band.text_size // 2 and ink[-1] < width - 1  # nothing is cut off
    right = width - band.text_size // 2 - band._font.getlength("0:02 / 0:05")
    gap = is_ink[int(right) - band.text_size // 2 : int(right)]
    assert not gap.any()  # between the label and the time


def test_classes_beyond_the_palette_have_patterns_of_their_own() -> None:
    classes = tuple(f"class {i}" for i in range(28))
    areas = [fill(name, classes, 40, 40, 20) for name in classes]
    assert not any(np.array_equal(a, b) for a, b in itertools.combinations(areas, 2))


def test_an_interrupt_leaves_no_file(tmp_path: Path) -> None:
    video = make_video(tmp_path / "v.mp4", 1.0)
    with Interrupt() as interrupt:
        interrupt.signal = 2
        assert (
            write_overlay(tmp_path / "o.mp4", source(video), make_timeline(), RATE, interrupt) == []
        )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["v.mp4"]


def test_memory_does_not_grow_with_the_video(tmp_path: Path) -> None:
    """The largest use of memory is that of a few frames, for 10 frames and for 100."""
    peaks = []
    for seconds in (1, 10):
        video = make_video(tmp_path / f"{seconds}.mp4", seconds, (240, 320))
        frames, _ = overlay_frames(source(video), make_timeline([("dark", float(seconds))]), 5.0)
        tracemalloc.start()
        count = sum(1 for _ in frames)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert count == 10 * seconds
    assert max(peaks) < 20 * 240 * 320 * 3
    assert peaks[1] < 1.5 * peaks[0]


def test_what_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    video = make_video(tmp_path / "v.mp4", 1.0)
    (problem,) = write_overlay(tmp_path / "gone" / "o.mp4", source(video), make_timeline(), RATE)
    assert "could not be written" in problem and "\n" not in problem
