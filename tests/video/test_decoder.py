"""The decoder on clips whose every pixel is known."""

import os
import pickle
import subprocess
import sys
from fractions import Fraction

import av
import numpy as np
import pytest
from helpers import ROOT

from video import decoder
from video.clip_reader import FrameSampler
from video.clip_reader import read_clip as read_decoded_clip
from video.container import ClipError
from video.decoder import read_frames
from video.encoder import write_video


def frames(count: int, height: int = 48, width: int = 64) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def sample_indices(n: int, t: int, sampling: str = "uniform", offsets=None) -> list[int]:
    return FrameSampler(t, sampling).indices(n, offsets)


def read_clip(path, t: int = 16, sampling: str = "uniform", size=224, offsets=None) -> np.ndarray:
    return read_decoded_clip(path, FrameSampler(t, sampling), size, offsets).rgb


def by_hand(n: int, t: int, inside: float) -> list[int]:
    """Frames at `inside` of each of t equal segments, by the definition."""
    return [int(np.floor(segment * n / t + inside * n / t + 1e-9)) for segment in range(t)]


@pytest.mark.parametrize("t", [16, 32, 64])
@pytest.mark.parametrize("n", [1, 5, 15, 16, 17, 30, 64, 250])
def test_sampling_follows_its_definition(n: int, t: int) -> None:
    short = [*range(n), *[n - 1] * (t - n)]
    assert sample_indices(n, t, "first") == (short if n < t else list(range(t)))
    assert sample_indices(n, t, "uniform") == (short if n < t else by_hand(n, t, 0.5))
    offsets = np.random.default_rng(n).random(t)
    indices = sample_indices(n, t, "random", offsets)
    if n <= t:
        assert indices == short
    else:
        edges = np.arange(t + 1) * n / t
        assert all(np.floor(a) <= i < b for i, a, b in zip(indices, edges, edges[1:], strict=False))
    assert len(indices) == t
    assert indices == sorted(indices)


def test_random_sampling_can_reach_every_frame() -> None:
    rng = np.random.default_rng(0)
    seen = {i for _ in range(300) for i in sample_indices(37, 16, "random", rng.random(16))}
    assert seen == set(range(37))


def test_views_see_different_frames() -> None:
    indices = FrameSampler(16, "uniform", views=2).indices(64)
    assert indices == [*range(1, 64, 4), *range(3, 64, 4)]


@pytest.mark.parametrize("sampling", ["first", "uniform"])
def test_lossless_clip_comes_back_exactly(tmp_path, sampling: str) -> None:
    source = frames(30)
    write_video(tmp_path / "clip.mp4", source, lossless=True)
    clip = read_clip(tmp_path / "clip.mp4", 16, sampling, size=None)
    assert np.array_equal(clip, source[sample_indices(30, 16, sampling)])


def test_short_clip_repeats_its_last_frame(tmp_path) -> None:
    source = frames(5)
    write_video(tmp_path / "clip.mp4", source, lossless=True)
    clip = read_clip(tmp_path / "clip.mp4", 16, size=None)
    assert np.array_equal(clip, source[[0, 1, 2, 3, *[4] * 12]])


def test_views_of_a_clip_are_read_one_after_the_other(tmp_path) -> None:
    source = frames(64)
    write_video(tmp_path / "clip.mp4", source, lossless=True)
    clip = read_decoded_clip(tmp_path / "clip.mp4", FrameSampler(16, views=2), size=None)
    assert clip.motion is None
    assert np.array_equal(clip.rgb, source[[*range(1, 64, 4), *range(3, 64, 4)]])


def test_same_frames_give_the_same_bytes(tmp_path) -> None:
    for name in "ab":
        write_video(tmp_path / f"{name}.mp4", frames(12))
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()


def test_failed_writing_leaves_nothing(tmp_path) -> None:
    def broken():
        yield frames(1)[0]
        raise RuntimeError("camera unplugged")

    with pytest.raises(RuntimeError):
        write_video(tmp_path / "clip.mp4", broken())
    assert list(tmp_path.iterdir()) == []


def mux(path, image: np.ndarray, n: int = 8, **settings) -> None:
    """Write a constant image (rgb) with the given pix_fmt, colour matrix and range."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(settings.pop("codec", "libx264"), rate=25)
        stream.height, stream.width = image.shape[:2]
        stream.pix_fmt = settings.pop("pix_fmt", "yuv420p")
        stream.options = {"crf": "1"}
        matrix, colour_range = settings.get("matrix", 5), settings.get("range", 1)
        stream.codec_context.colorspace = matrix
        stream.codec_context.color_range = colour_range
        for _ in range(n):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24").reformat(
                format=stream.pix_fmt, dst_colorspace=matrix, dst_color_range=colour_range
            )
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


@pytest.mark.parametrize("pix_fmt", ["yuv420p", "yuv420p10le", "yuv444p"])
@pytest.mark.parametrize("colour_range", [1, 2])  # studio (16 to 235) and full (0 to 255)
@pytest.mark.parametrize("matrix", [1, 5])  # BT.709 and BT.601
def test_colours_survive_range_matrix_and_depth(
    tmp_path, pix_fmt: str, colour_range: int, matrix: int
) -> None:
    image = np.empty((64, 64, 3), np.uint8)
    image[:32], image[32:] = (180, 60, 40), (30, 140, 200)
    settings = {"pix_fmt": pix_fmt, "range": colour_range, "matrix": matrix}
    mux(tmp_path / "clip.mp4", image, **settings)
    clip = read_clip(tmp_path / "clip.mp4", 4, size=None).astype(int)
    assert np.abs(clip[:, 8:24] - image[8:24].astype(int)).max() <= 4
    assert np.abs(clip[:, 40:56] - image[40:56].astype(int)).max() <= 4


def write_with_cover(path, source: np.ndarray) -> None:
    """An MP4 of `source` with a white cover image; without frames, cover and sound only."""
    with av.open(str(path), "w") as container:
        cover = container.add_stream("mjpeg", rate=1)
        cover.width = cover.height = 64
        cover.pix_fmt = "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic
        if len(source):
            video = container.add_stream("libx264rgb", rate=25, options={"crf": "0"})
            video.width = video.height = 64
            video.pix_fmt = "rgb24"
        else:
            sound = container.add_stream("aac", rate=44100)
        white = av.VideoFrame.from_ndarray(np.full((64, 64, 3), 255, np.uint8), format="rgb24")
        container.mux([*cover.encode(white), *cover.encode(None)])
        for frame in source:
            container.mux(video.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        if not len(source):
            silence = np.zeros((1, 1024), np.float32)
            samples = av.AudioFrame.from_ndarray(silence, format="fltp", layout="mono")
            samples.sample_rate = 44100
            container.mux(sound.encode(samples))
        container.mux((video if len(source) else sound).encode(None))
    with av.open(str(path)) as container:  # the file is what it is meant to be
        flags = [stream.disposition for stream in container.streams.video]
    assert any(flag & av.stream.Disposition.attached_pic for flag in flags)


def test_cover_picture_is_not_the_video(tmp_path) -> None:
    write_with_cover(tmp_path / "clip.mp4", frames(6, 64, 64))
    clip = read_clip(tmp_path / "clip.mp4", 6, "first", size=None)
    assert np.array_equal(clip, frames(6, 64, 64))
    write_with_cover(tmp_path / "song.mp4", frames(0))
    with pytest.raises(ClipError, match="holds no video stream"):
        read_clip(tmp_path / "song.mp4")


def test_file_without_a_frame_count_is_counted(tmp_path) -> None:
    source = frames(40)
    write_video(tmp_path / "clip.mkv", source, lossless=True)  # Matroska: no frame count at all
    calls = []

    def choose(n: int) -> list[int]:
        calls.append(n)
        return [0, n - 1]

    clip = read_frames(tmp_path / "clip.mkv", choose, size=None)
    assert np.array_equal(clip, source[[0, 39]])
    assert set(calls) == {40}


def test_wrong_frame_count_in_the_header_is_put_right(tmp_path, monkeypatch) -> None:
    source = frames(40)
    write_video(tmp_path / "clip.mp4", source, lossless=True)
    for lie in (7, 40, 900):
        monkeypatch.setattr("video.decoder.video_streams", lambda *_, lie=lie: [(0, lie)])
        clip = read_clip(tmp_path / "clip.mp4", 16, size=None)
        assert np.array_equal(clip, source[sample_indices(40, 16)])


def test_metadata_that_is_not_utf8_is_tolerated(tmp_path) -> None:
    path = tmp_path / "clip.mkv"
    with av.open(str(path), "w") as container:
        container.metadata["title"] = "OP-Saal XXXX"
        stream = container.add_stream("libx264", rate=25)
        stream.width = stream.height = 32
        stream.pix_fmt = "yuv420p"
        image = np.zeros((32, 32, 3), np.uint8)
        container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode(None))
    path.write_bytes(path.read_bytes().replace(b"XXXX", b"K\xfcl\xe9"))  # Latin-1
    title = b"OP-Saal K\xfcl\xe9"
    assert title in path.read_bytes()
    with pytest.raises(UnicodeDecodeError):
        title.decode()
    assert read_clip(path, 16).shape == (16, 224, 224, 3)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "no such file"),
        (b"", "cannot be read"),
        (b"%PDF-1.7 not a video", "cannot be read"),
        (b"#EXTM3U\n#EXTINF:10,\n/etc/hostname\n", "cannot be read"),
        (b"ffconcat version 1.0\nfile other.mp4\n", "cannot be read"),
    ],
)
def test_unreadable_is_one_error_with_path_and_reason(tmp_path, content, reason: str) -> None:
    path = tmp_path / "clip.mp4"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ClipError) as error:
        read_clip(path)
    assert str(path) in str(error.value)
    assert reason in error.value.reason
    assert "\n" not in str(error.value)
    again = pickle.loads(pickle.dumps(error.value))  # as it travels out of a worker
    assert (again.path, again.reason) == (error.value.path, error.value.reason)


@pytest.mark.parametrize(
    "text", ["#EXTM3U\n#EXTINF:10,\n{}\n", "ffconcat version 1.0\nfile '{}'\n"]
)
def test_playlist_cannot_make_us_read_another_file(tmp_path, text: str) -> None:
    write_video(tmp_path / "secret.mp4", frames(3))
    for name in ("list.m3u8", "list.mp4"):
        (tmp_path / name).write_text(text.format(tmp_path / "secret.mp4"))
        with pytest.raises(ClipError):
            read_clip(tmp_path / name)


def test_folders_and_pipes_are_refused_at_once(tmp_path) -> None:
    os.mkfifo(tmp_path / "pipe.mp4")
    for path in (tmp_path, tmp_path / "pipe.mp4"):
        with pytest.raises(ClipError, match="not a file"):
            read_clip(path)


def test_name_that_looks_like_a_protocol_is_a_file_name(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_video("concat:a|b.mp4", frames(3), lossless=True)
    assert np.array_equal(read_clip("concat:a|b.mp4", 3, size=None), frames(3))


def test_memory_is_bounded_by_the_clip_not_by_the_file(tmp_path) -> None:
    """100,000 tiny frames, each blown up to 224 px, would be 15 GB."""
    path = tmp_path / "long.mp4"
    write_video(path, (np.full((16, 16, 3), i % 250, np.uint8) for i in range(100_000)))
    code = (
        "import resource, sys; from video.clip_reader import read_clip\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "assert read_clip(sys.argv[1]).rgb.shape == (16, 224, 224, 3)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], cwd=ROOT, capture_output=True, check=True
    )
    unit = 1 if sys.platform == "darwin" else 1024
    assert int(done.stdout) * unit < 150e6


def write_h264(path, count: int = 70, times=None, **options: str) -> None:
    """Moving noise as x264 compresses it, 25 frames per second or at the given times (1/1000 s)."""
    image = np.random.default_rng(0).integers(0, 256, (80, 200, 3), dtype=np.uint8)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.options = options
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for number in range(count):
            shifted = np.ascontiguousarray(image[number % 30 :][:48, number : number + 64])
            frame = av.VideoFrame.from_ndarray(shifted, format="rgb24")
            if times is not None:
                frame.pts, frame.time_base = int(times[number]), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


H264 = {
    "usual": ("mp4", {}),
    "short groups": ("mp4", {"g": "9"}),
    "one picture per group": ("mp4", {"g": "1"}),
    "no B-frames": ("mp4", {"bf": "0"}),
    "many B-frames": ("mp4", {"x264-params": "bframes=16:b-adapt=0:b-pyramid=strict"}),
    "no B-pyramid": ("mp4", {"x264-params": "bframes=3:b-adapt=0:b-pyramid=none"}),
    "open groups": ("mp4", {"x264-params": "open-gop=1:keyint=12:bframes=3:b-adapt=0"}),
    "no keyframes": ("mp4", {"x264-params": "intra-refresh=1:keyint=15"}),
    "slices": ("mp4", {"x264-params": "slices=3:keyint=20"}),
    "interlaced": ("mp4", {"x264-params": "interlaced=1"}),
    "Matroska": ("mkv", {"g": "20"}),
    "parameters in the stream": ("mp4", {"x264-params": "repeat-headers=1:keyint=20"}),
    "transport stream": ("ts", {"g": "20"}),
}
FALLS_BACK = {"interlaced", "transport stream"}  # and these do take the plain path


@pytest.mark.parametrize("name", H264)
@pytest.mark.parametrize("t", [4, 16])
def test_decoding_the_needed_packets_equals_decoding_all(tmp_path, monkeypatch, name, t) -> None:
    container, options = H264[name]
    path = tmp_path / f"clip.{container}"
    write_h264(path, **options)
    plain = read_frames(path, range, size=32, stop_after=10**6)  # stop_after: never the fast path
    assert len(plain) == 70
    fast, read_needed = [], decoder._read_needed

    def watched(*arguments):
        fast.append(read_needed(*arguments))
        return fast[-1]

    monkeypatch.setattr(decoder, "_read_needed", watched)
    for offsets in np.random.default_rng(0).random((8, t)):
        clip = read_clip(path, t, "random", 32, offsets)
        assert np.array_equal(clip, plain[sample_indices(70, t, "random", offsets)])
    assert all((result is None) == (name in FALLS_BACK) for result in fast)


def test_uneven_times_do_not_matter(tmp_path) -> None:
    """Frames are counted, not looked up by time: a variable frame rate needs no exception."""
    times = np.random.default_rng(0).integers(5, 200, 70).cumsum()
    write_h264(tmp_path / "clip.mp4", times=times)
    plain = read_frames(tmp_path / "clip.mp4", range, size=32, stop_after=10**6)
    clip = read_clip(tmp_path / "clip.mp4", 16, size=32)
    assert np.array_equal(clip, plain[sample_indices(70, 16)])


def test_disposable_pictures_are_not_decoded(tmp_path, monkeypatch) -> None:
    write_h264(tmp_path / "clip.mp4", **H264["no B-pyramid"][1])
    decoded, decode_needed = [], decoder._decode_needed

    def counted(*arguments):
        for frame in decode_needed(*arguments):
            decoded.append(frame.pts)
            yield frame

    monkeypatch.setattr(decoder, "_decode_needed", counted)
    read_clip(tmp_path / "clip.mp4", 4, size=32)
    assert len(decoded) < 30  # of 70: every fourth, and the wanted ones


def test_edit_list_takes_the_plain_path(tmp_path) -> None:
    """A file cut without re-encoding shows fewer frames than it stores."""
    write_h264(tmp_path / "whole.mp4", g="50")
    data = bytearray((tmp_path / "whole.mp4").read_bytes())
    position = data.find(b"elst")
    assert position > 0
    entry = position + 4 + 4 + 4  # version and flags, number of entries
    scale = int.from_bytes(data[data.find(b"mdhd") + 16 :][:4], "big")
    start = int.from_bytes(data[entry + 4 : entry + 8], "big")
    data[entry + 4 : entry + 8] = (start + scale).to_bytes(4, "big")  # the first second is cut
    (tmp_path / "cut.mp4").write_bytes(data)
    plain = read_frames(tmp_path / "cut.mp4", range, size=32, stop_after=10**6)
    whole = read_frames(tmp_path / "whole.mp4", range, size=32)
    assert len(plain) < 70
    assert np.array_equal(plain, whole[-len(plain) :])
    clip = read_clip(tmp_path / "cut.mp4", 8, size=32)
    assert np.array_equal(clip, plain[sample_indices(len(plain), 8)])
