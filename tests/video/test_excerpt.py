"""Excerpts of videos: exactly the frames of their time, copied where that is exact."""

from pathlib import Path

import av
import numpy as np
import pytest
from helpers import write_stamped

from video import excerpt as module
from video.container import probe
from video.decoder import read_frames
from video.excerpt import Excerpt, frame_times, write_excerpts

SIDE = 64


def frames_of(count: int, seed: int = 0, height: int = SIDE, width: int = SIDE) -> np.ndarray:
    """Smooth frames, each of which tells its number by the brightness of a band."""
    ramp = np.add.outer(np.arange(height), np.arange(width)) % 200
    frames = np.repeat(ramp[None, ..., None], count, 0).repeat(3, 3).astype(np.uint8)
    for number, frame in enumerate(frames):
        frame[: height // 2] = (7 * number + seed) % 251
    return frames


def write(path: Path, frames: np.ndarray, codec: str = "libx264", rate: object = 25, **options):
    """Encode frames; `pixels` and the tags of colour are options of the stream."""
    pixels = options.pop("pixels", "yuv420p")
    tags = {name: options.pop(name) for name in ("colorspace", "color_range") if name in options}
    with av.open(str(path), "w") as container:
        stream = container.add_stream(
            codec, rate=rate, options={k: str(v) for k, v in options.items()}
        )
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], pixels
        for name, value in tags.items():
            setattr(stream.codec_context, name, value)
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame)))
        container.mux(stream.encode(None))
    return path


def cut(path: Path, *times: tuple[float, float]) -> list[Path]:
    targets = [path.parent / f"{path.stem}_{start}-{end}.mp4" for start, end in times]
    excerpts = [Excerpt(*pair, target) for pair, target in zip(times, targets, strict=True)]
    assert write_excerpts(path, excerpts) == [""] * len(times)
    return targets


def all_frames(path: Path) -> np.ndarray:
    return read_frames(path, range, size=None)


def codec_bytes(path: Path) -> list[bytes]:
    with av.open(str(path)) as container:
        return [bytes(packet) for packet in container.demux(video=0) if packet.size]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("intra.mp4", {"g": 1}),
        ("mjpeg.avi", {"codec": "mjpeg", "pixels": "yuvj420p"}),
        ("keys.mkv", {"g": 25, "sc_threshold": 0, "bf": 2, "x264-params": "open-gop=0"}),
        ("stream.ts", {"g": 25, "sc_threshold": 0}),
    ],
)
def test_copies_are_the_same_frames(name: str, options: dict, tmp_path: Path) -> None:
    path = write(tmp_path / name, frames_of(100), **options)
    source = all_frames(path)
    for start, target in zip((1, 3), cut(path, (1, 2), (3, 4)), strict=True):
        assert np.array_equal(all_frames(target), source[25 * start : 25 * start + 25])
        assert probe(target).rate == pytest.approx(25)
        if not name.endswith(".ts"):  # there, each packet begins with a start code
            assert codec_bytes(target) == codec_bytes(path)[25 * start : 25 * start + 25]


def test_the_end_of_a_copy_may_lie_inside_a_group(tmp_path: Path) -> None:
    """Without B-frames, any run of packets from a key frame on can be decoded."""
    path = write(tmp_path / "a.mp4", frames_of(60), g=50, bf=0, sc_threshold=0)
    (target,) = cut(path, (0, 0.4))
    assert codec_bytes(target) == codec_bytes(path)[:10]
    assert np.array_equal(all_frames(target), all_frames(path)[:10])


@pytest.mark.parametrize("open_gop", [0, 1])
def test_encoded_excerpts_start_and_end_at_the_frame(open_gop: int, tmp_path: Path) -> None:
    parameters = f"open-gop={open_gop}"
    options = {"g": 30, "bf": 3, "sc_threshold": 0, "x264-params": parameters, "crf": 10}
    path = write(tmp_path / "a.mp4", frames_of(120), **options)
    source = all_frames(path)
    times = (0.52, 1.2), (1.0, 3.0), (1.6, 2.2), (4.0, 4.8)  # they overlap
    for (start, end), target in zip(times, cut(path, *times), strict=True):
        excerpt = all_frames(target)
        expected = source[round(25 * start) : round(25 * end)]
        assert excerpt.shape == expected.shape
        assert np.abs(excerpt.astype(int) - expected).mean() < 2  # the next frame differs by 7
        assert probe(target)[2:5] == (25, SIDE, SIDE)


def test_the_same_excerpt_is_the_same_file(tmp_path: Path) -> None:
    """Whatever other excerpts are cut with it, and from wherever decoding starts."""
    path = write(tmp_path / "a.mp4", frames_of(120), g=30, bf=3, sc_threshold=0)
    (alone,) = cut(path, (2.2, 3.0))
    content = alone.read_bytes()
    assert cut(path, (0.1, 1.0), (2.0, 2.5), (2.2, 3.0))[2].read_bytes() == content


@pytest.mark.parametrize("tags", [{"colorspace": 1, "color_range": 1}, {"color_range": 2}])
def test_colours_stay(tags: dict, tmp_path: Path) -> None:
    """BT.709 and the full range are kept: read without them, colours would shift by 10 and more."""
    frames = np.zeros((20, SIDE, SIDE, 3), np.uint8)
    frames[:, :, 32:] = 200, 30, 60
    path = write(tmp_path / "a.mp4", frames, crf=1, **tags)
    (target,) = cut(path, (0.2, 0.6))
    difference = all_frames(target).astype(int) - all_frames(path)[5:15]
    assert np.abs(difference).mean() < 1


@pytest.mark.parametrize(
    ("height", "width", "pixels"), [(64, 63, "yuv444p"), (64, 64, "yuv422p"), (64, 64, "gray")]
)
def test_unusual_pixels(height: int, width: int, pixels: str, tmp_path: Path) -> None:
    path = write(tmp_path / "a.mkv", frames_of(20, 0, height, width), pixels=pixels, crf=1)
    (target,) = cut(path, (0.2, 0.6))
    difference = all_frames(target).astype(int) - all_frames(path)[5:15]
    assert np.abs(difference).mean() < 3


def test_times_of_a_variable_rate_are_kept(tmp_path: Path) -> None:
    """Frames are chosen by their time, not by counting; their distances stay."""
    path, stamps = tmp_path / "a.mkv", [0, 40, 80, 200, 240, 500, 520, 540, 1000, 1040]
    write_stamped(path, stamps)
    (target,) = cut(path, (0.08, 0.52))
    with av.open(str(target)) as container:
        times = [frame.time for frame in container.decode(video=0)]
    assert [round(1000 * time) for time in times] == [0, 120, 160, 420]


def test_avi_with_b_frames_is_counted(tmp_path: Path) -> None:
    """Its time stamps are made up by FFmpeg and run backwards."""
    path = write(tmp_path / "a.avi", frames_of(60), g=30, bf=2)
    assert not len(frame_times(path).pts)
    source = all_frames(path)
    for (low, high), target in zip(
        ((5, 15), (20, 30)), cut(path, (0.2, 0.6), (0.8, 1.2)), strict=True
    ):
        difference = all_frames(target).astype(int) - source[low:high]
        assert difference.shape[0] == 10 and np.abs(difference).mean() < 2


def test_a_turned_video_gives_upright_excerpts(real: Path, tmp_path: Path) -> None:
    path = real / "odd" / "androidx-media" / "sample_with_color_info.mp4"  # 1920 x 1080, turned
    target = tmp_path / "a.mp4"
    assert write_excerpts(path, [Excerpt(0.1, 0.2, target)]) == [""]
    assert all_frames(target).shape == (3, 1920, 1080, 3)


def test_damage_concerns_only_the_excerpts_in_it(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mp4", frames_of(200), g=25, bf=0, sc_threshold=0, crf=20)
    with av.open(str(path)) as container:
        packets = [(p.pos, p.size) for p in container.demux(video=0) if p.size]
    data = bytearray(path.read_bytes())
    for position, size in packets[60:70]:
        data[position + 4 : position + size] = bytes(size - 4)
    path.write_bytes(data)
    targets = [tmp_path / f"{n}.mp4" for n in range(4)]
    problems = write_excerpts(path, [Excerpt(2 * n, 2 * n + 2, t) for n, t in enumerate(targets)])
    assert [bool(problem) for problem in problems] == [False, True, False, False]
    assert [target.exists() for target in targets] == [True, False, True, True]
    assert [p.name for p in tmp_path.glob(".*")] == []  # nothing unfinished is left


def test_what_cannot_be_cut_is_one_message(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"not a video" * 100)
    excerpts = [Excerpt(0, 1, tmp_path / "x.mp4"), Excerpt(1, 2, tmp_path / "y.mp4")]
    assert all(
        "cannot be read" in problem for problem in write_excerpts(tmp_path / "a.mp4", excerpts)
    )
    path = write(tmp_path / "b.mp4", frames_of(20))
    assert write_excerpts(path, [Excerpt(5, 6, tmp_path / "x.mp4")]) == ["holds no frame there"]
    assert not (tmp_path / "x.mp4").exists()


def test_a_copy_that_differs_is_encoded_instead(tmp_path: Path, monkeypatch) -> None:
    path = write(tmp_path / "a.mp4", frames_of(50), g=1)
    monkeypatch.setattr(module, "_are_equal", lambda *_: False)
    (target,) = cut(path, (0, 1))
    assert codec_bytes(target) != codec_bytes(path)[:25]
    assert np.abs(all_frames(target).astype(int) - all_frames(path)[:25]).mean() < 2
