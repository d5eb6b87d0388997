"""Whole videos: which frames are taken when, and what becomes of bad stretches and lost streams."""

import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
import pytest

from timeline.live_source import LiveSource, is_live
from timeline.output import safe_name
from timeline.prefetch import AHEAD, ReadAhead
from timeline.segments import UNREADABLE
from timeline.sources import FileSource, Picture, Source
from video.container import ClipError
from video.decoder import read_frames
from video.encoder import write_video

ALL = 1000.0  # pictures a second: every frame


def numbered(count: int, height: int = 48, width: int = 64) -> Iterator[np.ndarray]:
    """Frames that tell their number by their brightness, on a texture that moves."""
    texture = np.random.default_rng(0).integers(0, 60, (100, 120, 3), dtype=np.uint8)
    for t in range(count):
        yield texture[t % 20 : t % 20 + height, t % 30 : t % 30 + width] + np.uint8(
            t * 190 // count
        )


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 s at 25 frames a second, a keyframe every 2 s."""
    path = tmp_path_factory.mktemp("source") / "whole.mp4"
    write_video(path, numbered(500), 25, group=50)
    return path


def times_of(source: Source) -> list[float]:
    return [round(picture.time, 3) for picture in source]


def test_every_frame_once(video: Path) -> None:
    source = FileSource(video, ALL, 32)
    pictures = list(source)
    assert [round(p.time * 25) for p in pictures] == list(range(500))
    wanted = read_frames(video, lambda _: [0, 123, 499], 32)
    assert np.array_equal(np.stack([pictures[n].image for n in (0, 123, 499)]), wanted)
    assert source.duration == source.end == 20.0
    assert source.unreadable == []
    assert source.notes == []


@pytest.mark.parametrize("rate", [25.0, 10.0, 6.67, 0.3])
def test_pictures_are_taken_at_the_rate(video: Path, rate: float) -> None:
    times = times_of(FileSource(video, rate, 16))
    wanted = [round(np.ceil(round(k / rate * 25, 6)) / 25, 3) for k in range(int(20 * rate) + 1)]
    assert times == [time for time in wanted if time < 20]


def test_a_preview_keeps_the_shape(video: Path) -> None:
    picture = next(iter(FileSource(video, 1.0, 16, preview=True)))
    assert picture.image.shape == (16, 16, 3)
    assert picture.preview.shape == (48, 64, 3)
    assert next(iter(FileSource(video, 1.0, 16))).preview is None


def test_a_bad_stretch_is_bridged_and_marked(video: Path, tmp_path: Path) -> None:
    data = bytearray(video.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 8000] = np.random.default_rng(0).bytes(8000)
    bad = tmp_path / "bad.mp4"
    bad.write_bytes(data)
    source = FileSource(bad, ALL, 32)
    pictures = list(source)
    assert {stretch.label for stretch in source.unreadable} == {UNREADABLE}
    assert len(source.notes) == len(source.unreadable) >= 1
    start, end = source.unreadable[0].start, source.unreadable[-1].end
    assert 7 < start < end < 14
    assert end - start < 4  # up to the next keyframe behind the damage
    assert f"from {start:.1f} s on unreadable" in source.notes[0]
    whole = {round(p.time * 25): p.image for p in FileSource(video, ALL, 32)}
    smeared = 0
    for picture in pictures:
        assert not any(s.start <= picture.time < s.end - 1e-3 for s in source.unreadable)
        smeared += not np.array_equal(picture.image, whole[round(picture.time * 25)])
    assert smeared <= 1  # half of a keyframe, which the decoder does not mention
    times = [picture.time for picture in pictures]
    assert {s.end for s in source.unreadable} <= set(times)


def test_a_file_that_breaks_off_says_so(video: Path, tmp_path: Path) -> None:
    whole = tmp_path / "whole.mkv"
    with av.open(str(video)) as source, av.open(str(whole), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                target.mux(packet)
    half = tmp_path / "half.mkv"
    half.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    source = FileSource(half, 10.0, 16)
    times = times_of(source)
    assert 5 < times[-1] < 15
    (stretch,) = source.unreadable
    assert (stretch.start, stretch.end) == (source.end, source.duration)
    assert source.duration == pytest.approx(20, abs=0.1)


def test_stopped_and_backward_clocks(tmp_path: Path) -> None:
    """A pause in the recording is marked; time never runs backwards."""
    path = tmp_path / "paused.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"bf": "0"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number, frame in enumerate(numbered(40)):
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            picture.pts = number + 100 * (number >= 20)
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))
    source = FileSource(path, ALL, 16)
    times = times_of(source)
    assert len(times) == 40
    assert times == sorted(times)
    (stretch,) = source.unreadable
    assert (stretch.start, stretch.end) == (pytest.approx(0.8, abs=0.01), pytest.approx(4.8))


def write_with_times(path: Path, ticks: list[int], wrong: dict[int, int] | None = None) -> Path:
    """A video whose frames have these time stamps, in hundredths of a second, some of them wrong
    by so many."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=100, options={"bf": "0", "g": "1"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        packets = []
        for number, frame in enumerate(numbered(len(ticks))):
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            picture.pts = number
            packets += stream.encode(picture)
        packets += stream.encode(None)
        for number, (packet, tick) in enumerate(zip(packets, ticks, strict=True)):
            packet.pts, packet.dts = tick + (wrong or {}).get(number, 0), tick
            container.mux(packet)
    return path


def test_a_changing_frame_rate_keeps_its_times(tmp_path: Path) -> None:
    """2 s at 50 frames a second, then 10 s at 5."""
    ticks = [*range(0, 200, 2), *range(200, 1200, 20)]
    source = FileSource(write_with_times(tmp_path / "v.mkv", ticks), ALL, 16)
    assert times_of(source) == [tick / 100 for tick in ticks]
    assert source.unreadable == []
    few = times_of(FileSource(tmp_path / "v.mkv", 5.0, 16))
    assert few == pytest.approx(np.arange(0, 12, 0.2), abs=0.021)


def test_one_wrong_time_stamp_costs_nothing(tmp_path: Path) -> None:
    ticks = list(range(0, 1000, 10))
    source = FileSource(write_with_times(tmp_path / "w.mkv", ticks, {40: 6000}), ALL, 16)
    times = times_of(source)
    assert len(times) == 100
    assert times[39] < times[40] < times[41]
    assert np.diff(times).max() < 0.3
    assert [s.start for s in source.unreadable] == [source.end]  # the header believes it


@pytest.mark.parametrize(
    ("content", "words"), [(None, "no such file"), (b"", "cannot be read"), (b"x" * 999, "cannot")]
)
def test_what_is_no_video_is_an_error(content: bytes | None, words: str, tmp_path: Path) -> None:
    path = tmp_path / "no.mp4"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ClipError, match=words):
        list(FileSource(path, 10.0, 16))


def serve(parts: list[bytes]) -> tuple[str, threading.Thread]:
    """A server that sends one part to each connection in turn, and closes it."""
    server = socket.create_server(("127.0.0.1", 0))

    def send() -> None:
        with server:
            for part in parts:
                connection, _ = server.accept()
                with connection:
                    connection.sendall(part)

    thread = threading.Thread(target=send, daemon=True)
    thread.start()
    return f"tcp://127.0.0.1:{server.getsockname()[1]}", thread


@pytest.fixture(scope="module")
def transport(video: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The first 4 s of the video as an MPEG transport stream."""
    path = tmp_path_factory.mktemp("live") / "live.ts"
    write_video(path, numbered(100), 25, group=25)
    return path.read_bytes()


def test_a_lost_stream_is_connected_again(transport: bytes) -> None:
    address, server = serve([transport, transport])
    pauses: list[float] = []
    states: list[str] = []
    source = LiveSource(address, 1e7, 16, give_up=0.3, sleep=lambda s: note(s))

    def note(seconds: float) -> None:
        pauses.append(seconds)
        states.append(source.state)
        threading.Event().wait(min(seconds, 0.2))

    pictures = list(source)
    server.join(5)
    assert len(pictures) >= 180  # of twice 100
    assert [p.time for p in pictures] == sorted(p.time for p in pictures)
    assert pauses[0] == 0.5
    assert pauses == sorted(pauses)  # ever longer while nothing comes
    assert states[0].startswith("reconnecting (")
    assert "given up after" in source.notes[-1]
    assert source.unreadable[-1].end > source.end


def test_a_stream_that_is_not_there_is_an_error_at_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(ClipError, match="cannot be opened"):
        next(iter(LiveSource(f"tcp://127.0.0.1:{port}", 10.0, 16)))
    with pytest.raises(ClipError, match="camera 77"):
        next(iter(LiveSource("77", 10.0, 16)))


def test_passwords_are_not_shown() -> None:
    source = LiveSource("rtsp://anna:secret@theatre:554/cam?key=1234", 10.0, 16)
    assert source.name == "rtsp://theatre:554/cam"


def test_what_is_live() -> None:
    assert [is_live(text) for text in ("0", "12", "rtsp://x/y", "tcp://h:1")] == [True] * 4
    assert [is_live(text) for text in ("a.mp4", "-", "file:///etc/passwd", "C:\\x.mp4")] == [
        False
    ] * 4


def test_safe_names() -> None:
    assert safe_name("rtsp://h:554/../../x y") == "rtsp_h_554_.._.._x_y"
    assert safe_name("../..") == "video"


class Counting(Source):
    """Pictures without end, or an error after some."""

    def __init__(self, live: bool, fail_after: int | None = None) -> None:
        super().__init__("counting", 1.0, 4)
        self.live = live
        self.fail_after = fail_after
        self.made = 0

    def __iter__(self) -> Iterator[Picture]:
        while self.fail_after is None or self.made < self.fail_after:
            yield Picture(float(self.made), np.zeros((4, 4, 3), np.uint8))
            self.made += 1
        raise ClipError("counting", "is broken")


def test_a_recording_waits_for_its_reader() -> None:
    source = Counting(live=False)
    with ReadAhead(source) as ahead:
        first = [p.time for _ in range(10) for p in ahead.take(16)]
        threading.Event().wait(0.3)
        assert source.made <= 160 + AHEAD + 1
        second = [p.time for _ in range(10) for p in ahead.take(16)]
    assert first + second == list(range(320))
    assert ahead.dropped == 0


def test_a_live_source_does_not_wait() -> None:
    source = Counting(live=True)
    with ReadAhead(source) as ahead:
        while source.made < 500:
            threading.Event().wait(0.01)
        newest = ahead.take(16)
        assert newest[0].time >= 400
        assert len(newest) <= 3
        assert ahead.dropped > 400


def test_errors_come_after_the_last_picture() -> None:
    with ReadAhead(Counting(live=False, fail_after=20)) as ahead:
        assert len(ahead.take(16)) == 16
        assert len(ahead.take(16)) == 4
        with pytest.raises(ClipError, match="is broken"):
            ahead.take(16)


def test_nothing_comes_in_time() -> None:
    class Silent(Counting):
        def __iter__(self) -> Iterator[Picture]:
            threading.Event().wait(1.0)
            yield from ()

    with ReadAhead(Silent(live=True)) as ahead:
        assert ahead.take(4, wait=0.05) == []
        assert ahead.take(4, wait=3.0) is None
