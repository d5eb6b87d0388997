"""The frame rate of files whose headers do not tell it, or tell another one."""

from pathlib import Path

import av
import numpy as np
import pytest
from helpers import write_dv, write_stamped

from video.clip_reader import FrameSampler, effective_fps
from video.container import probe
from video.encoder import write_video


def average_rate(path: Path) -> float:
    """The frame rate that FFmpeg reads from the header."""
    with av.open(str(path)) as container:
        return float(container.streams.video[0].average_rate or 0)


REGULAR = [round(1000 * k / 30) for k in range(60)]
CHANGING = [*range(0, 1000, 40), *range(1000, 3000, 200)]  # 25 frames, then 5 per second


@pytest.mark.parametrize("live", [True, False])
@pytest.mark.parametrize(("stamps", "rate"), [(REGULAR, 30.0), (CHANGING, 34 / 2.8)])
def test_a_webm_of_a_browser(tmp_path: Path, stamps: list, rate: float, live: bool) -> None:
    path = write_stamped(tmp_path / "browser.webm", stamps, live=live)
    assert average_rate(path) == 1000
    metadata = probe(path)
    assert metadata.frames == len(stamps)
    assert metadata.rate == pytest.approx(rate, rel=0.002)
    assert metadata.seconds == pytest.approx(len(stamps) / rate, rel=0.002)


@pytest.mark.skipif("dvvideo" not in av.codecs_available, reason="FFmpeg without DV")
def test_raw_dv(tmp_path: Path) -> None:
    path = write_dv(tmp_path / "tape.dv")
    assert average_rate(path) == 60000
    assert (probe(path).rate, probe(path).seconds) == (25, 2)


def test_a_variable_rate_in_other_containers(tmp_path: Path) -> None:
    for name in ("v.mp4", "v.mkv"):
        path = write_stamped(tmp_path / name, CHANGING, "mpeg4")
        assert probe(path).rate == pytest.approx(34 / 2.8, rel=0.03)


def test_a_pause_is_not_part_of_the_rate(tmp_path: Path) -> None:
    stamps = [*range(0, 1000, 40), *range(4000, 5000, 40)]
    assert probe(write_stamped(tmp_path / "pause.webm", stamps)).rate == pytest.approx(25)
    slow = [2000 * k for k in range(10)]  # such steps are usual here, and no pauses
    assert probe(write_stamped(tmp_path / "slow.webm", slow)).rate == pytest.approx(0.5)


def test_without_time_stamps_the_rate_is_unknown(tmp_path: Path) -> None:
    """FFmpeg would say 25."""
    path = tmp_path / "raw.h264"
    write_video(path, (np.full((48, 64, 3), k, np.uint8) for k in range(40)), 30)
    assert average_rate(path) == 25
    assert probe(path)[:3] == (40, 0.0, 0.0)
    assert effective_fps([path], FrameSampler(16)) is None


def test_impossible_stamps_leave_the_duration(tmp_path: Path) -> None:
    """All frames within 60 ms of a file of two seconds."""
    with av.open(str(write_stamped(tmp_path / "a.mkv", range(60), "mpeg4"))) as source:
        assert float(source.streams.video[0].average_rate) == 1000
    assert probe(tmp_path / "a.mkv").rate == 0  # 60 frames in 0.06 s are not believed either


def test_what_a_model_sees_of_such_clips(tmp_path: Path) -> None:
    path = write_stamped(tmp_path / "browser.webm", REGULAR, live=True)  # 2 s
    assert effective_fps([path], FrameSampler(16)) == pytest.approx(8, rel=0.002)
    assert effective_fps([path], FrameSampler(16, "first")) == pytest.approx(30, rel=0.002)


@pytest.mark.parametrize(
    ("name", "rate"),
    [
        ("sample.flv", 29.99),
        ("sample.mkv", 29.99),
        ("sample.mp4", 30000 / 1001),
        ("sample_with_pgs_subtitles.mkv", 30 / 1.24),  # 30 frames within 50 ms of 1.24 s
    ],
)
def test_real_files_whose_header_says_something_else(real: Path, name: str, rate: float) -> None:
    assert probe(real / "odd" / "androidx-media" / name).rate == pytest.approx(rate, abs=0.01)
