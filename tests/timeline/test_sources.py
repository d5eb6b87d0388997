"""Sources of whole videos: which frames they give, and how they handle damage and lost streams."""

import functools
import http.server
import shutil
import socket
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from helpers import write_dv, write_reordered, write_stamped

from clips.manifest import UNREADABLE
from timeline.live_source import LiveSource, is_live, open_address
from timeline.output import safe_name
from timeline.prefetch import QUEUE_SIZE, Prefetcher
from timeline.sources import FileSource, Frame, FrameSource
from video.container import ClipError, probe
from video.decoder import read_frames
from video.encoder import write_video

ALL = 1000.0  # frames per second: every frame


def numbered(count: int, height: int = 48, width: int = 64) -> Iterator[np.ndarray]:
    """Frames whose brightness rises with their number, on a moving texture."""
    texture = np.random.default_rng(0).integers(0, 60, (100, 120, 3), dtype=np.uint8)
    for t in range(count):
        yield texture[t % 20 : t % 20 + height, t % 30 : t % 30 + width] + np.uint8(
            t * 190 // count
        )


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 s at 25 frames per second, a key frame every 2 s."""
    path = tmp_path_factory.mktemp("source") / "whole.mp4"
    write_video(path, numbered(500), 25, group=50)
    return path


def times_of(source: FrameSource) -> list[float]:
    return [round(frame.time, 3) for frame in source]


def test_every_frame_once(video: Path) -> None:
    source = FileSource(video, ALL, 32)
    frames = list(source)
    assert [round(frame.time * 25) for frame in frames] == list(range(500))
    wanted = read_frames(video, lambda _: [0, 123, 499], 32)
    assert np.array_equal(np.stack([frames[n].image for n in (0, 123, 499)]), wanted)
    assert source.duration == source.end == 20.0
    assert source.gaps == []
    assert source.notes == []


@pytest.mark.parametrize("fps", [25.0, 10.0, 6.67, 0.3])
def test_frames_are_taken_at_the_rate(video: Path, fps: float) -> None:
    times = times_of(FileSource(video, fps, 16))
    wanted = [round(np.ceil(round(k / fps * 25, 6)) / 25, 3) for k in range(int(20 * fps) + 1)]
    assert times == [time for time in wanted if time < 20]


def test_a_preview_keeps_the_shape(video: Path) -> None:
    frame = next(iter(FileSource(video, 1.0, 16, preview=True)))
    assert frame.image.shape == (16, 16, 3)
    assert frame.preview.shape == (48, 64, 3)
    assert next(iter(FileSource(video, 1.0, 16))).preview is None


def test_a_bad_stretch_is_skipped_and_marked(video: Path, tmp_path: Path) -> None:
    data = bytearray(video.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 8000] = np.random.default_rng(0).bytes(8000)
    bad = tmp_path / "bad.mp4"
    bad.write_bytes(data)
    source = FileSource(bad, ALL, 32)
    frames = list(source)
    assert {gap.label for gap in source.gaps} == {UNREADABLE}
    assert len(source.notes) == len(source.gaps) >= 1
    start, end = source.gaps[0].start, source.gaps[-1].end
    assert 7 < start < end < 14
    assert end - start < 4  # up to the next key frame after the damage
    assert f"from {start:.1f} s on unreadable" in source.notes[0]
    whole = {round(f.time * 25): f.image for f in FileSource(video, ALL, 32)}
    smeared = 0
    for frame in frames:
        assert not any(gap.start <= frame.time < gap.end - 1e-3 for gap in source.gaps)
        smeared += not np.array_equal(frame.image, whole[round(frame.time * 25)])
    assert smeared <= 1  # half of a key frame, which the decoder does not report
    times = [frame.time for frame in frames]
    assert {gap.end for gap in source.gaps} <= set(times)


def test_a_truncated_file_has_a_gap_at_its_end(video: Path, tmp_path: Path) -> None:
    whole = tmp_path / "whole.mkv"
    copy_packets(video, whole)
    half = tmp_path / "half.mkv"
    half.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    source = FileSource(half, 10.0, 16)
    times = times_of(source)
    assert 5 < times[-1] < 15
    (gap,) = source.gaps
    assert (gap.start, gap.end) == (source.end, source.duration)
    assert source.duration == pytest.approx(20, abs=0.1)


def test_stopped_and_backward_clocks(tmp_path: Path) -> None:
    """A pause in the recording is marked as a gap; time never runs backwards."""
    path = tmp_path / "paused.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"bf": "0"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number, frame in enumerate(numbered(40)):
            encoded = av.VideoFrame.from_ndarray(frame, format="rgb24")
            encoded.pts = number + 100 * (number >= 20)
            container.mux(stream.encode(encoded))
        container.mux(stream.encode(None))
    source = FileSource(path, ALL, 16)
    times = times_of(source)
    assert len(times) == 40
    assert times == sorted(times)
    (gap,) = source.gaps
    assert (gap.start, gap.end) == (pytest.approx(0.8, abs=0.01), pytest.approx(4.8))


def write_with_times(path: Path, ticks: list[int], wrong: dict[int, int] | None = None) -> Path:
    """A video with these timestamps in hundredths of a second; `wrong` is added to some of them."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=100, options={"bf": "0", "g": "1"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        packets = []
        for number, frame in enumerate(numbered(len(ticks))):
            encoded = av.VideoFrame.from_ndarray(frame, format="rgb24")
            encoded.pts = number
            packets += stream.encode(encoded)
        packets += stream.encode(None)
        for number, (packet, tick) in enumerate(zip(packets, ticks, strict=True)):
            packet.pts, packet.dts = tick + (wrong or {}).get(number, 0), tick
            container.mux(packet)
    return path


def test_a_changing_frame_rate_keeps_its_times(tmp_path: Path) -> None:
    """2 s at 50 frames per second, then 10 s at 5."""
    ticks = [*range(0, 200, 2), *range(200, 1200, 20)]
    source = FileSource(write_with_times(tmp_path / "v.mkv", ticks), ALL, 16)
    assert times_of(source) == [tick / 100 for tick in ticks]
    assert source.gaps == []
    times = times_of(FileSource(tmp_path / "v.mkv", 5.0, 16))
    assert times == pytest.approx(np.arange(0, 12, 0.2), abs=0.021)


def test_one_wrong_timestamp_costs_nothing(tmp_path: Path) -> None:
    ticks = list(range(0, 1000, 10))
    source = FileSource(write_with_times(tmp_path / "w.mkv", ticks, {40: 6000}), ALL, 16)
    times = times_of(source)
    assert len(times) == 100
    assert times[39] < times[40] < times[41]
    assert np.diff(times).max() < 0.3
    assert [gap.start for gap in source.gaps] == [source.end]  # the header has the wrong duration


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "no such file"), (b"", "cannot be read"), (b"x" * 999, "cannot")],
)
def test_a_file_that_is_not_a_video_is_an_error(
    content: bytes | None, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "no.mp4"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ClipError, match=message):
        list(FileSource(path, 10.0, 16))


def serve(parts: list[bytes]) -> tuple[str, threading.Thread]:
    """A server that sends one part to each connection, and closes it."""
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
    source = LiveSource(address, 1e7, 16, reconnect_timeout=60, sleep=lambda s: wait(s))

    def wait(seconds: float) -> None:
        pauses.append(seconds)
        states.append(source.state)
        if len(pauses) == 4:  # the server has gone: enough
            source.reconnect_timeout = 1e-6

    times = [frame.time for frame in source]
    server.join(5)
    assert len(times) >= 180  # of twice 100
    assert times == sorted(times)
    assert pauses == [0.5, 0.5, 1, 2]  # the pauses grow while nothing comes
    assert states[0].startswith("reconnecting (")
    assert "given up after" in source.notes[-1]
    assert source.gaps[-1].end > source.end


def test_a_stream_that_is_not_there_is_an_error_at_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(ClipError, match="cannot be opened"):
        next(iter(LiveSource(f"tcp://127.0.0.1:{port}", 10.0, 16)))
    with pytest.raises(ClipError, match="camera 77"):
        next(iter(LiveSource("77", 10.0, 16)))


class Files(http.server.SimpleHTTPRequestHandler):
    """A folder as a server; it sends parts of files only if `ranges`."""

    ranges = False
    endless = False
    """send no length"""
    lost = ""
    """end of the path of a file that is not sent"""
    stop_after: int | None = None
    """send only so many bytes"""
    stall: threading.Event | None = None
    """wait for it after the last byte, and do not close the connection before"""

    def do_GET(self) -> None:
        self.server.requests.append(self.path)
        if self.lost and self.path.endswith(self.lost):
            self.send_error(503)
            return
        path = Path(self.translate_path(self.path))
        content = path.read_bytes() if path.exists() else b""
        if self.endless or self.stop_after is not None:
            self.send_response(200)
            if not self.endless:
                self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: self.stop_after])
            if self.stall:
                self.stall.wait(60)
            return
        if not (self.ranges and content and self.headers["Range"]):
            super().do_GET()
            return
        first, _, last = self.headers["Range"].removeprefix("bytes=").partition("-")
        part = content[int(first) : int(last) + 1 if last else None]
        self.send_response(206)
        self.send_header("Accept-Ranges", "bytes")
        span = f"{first}-{int(first) + len(part) - 1}/{len(content)}"
        self.send_header("Content-Range", f"bytes {span}")
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        self.wfile.write(part)

    def handle(self) -> None:
        with suppress(ConnectionError):  # the reader has what it needs
            super().handle()

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def web_server(folder: Path, **options: object) -> Iterator[tuple[str, list]]:
    """The address of a folder's server, and the paths that are asked for."""
    handler = functools.partial(type("Handler", (Files,), options), directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.requests = []
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", server.requests
        finally:
            server.shutdown()
            thread.join()


def copy_packets(video: Path, to: Path, options: dict | None = None, skip: int = 0) -> None:
    """Copy a video into another container, without its first `skip` packets."""
    with av.open(str(video)) as source, av.open(str(to), "w", options=options or {}) as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for number, packet in enumerate(source.demux(video=0)):
            if packet.size and number >= skip:
                packet.stream = stream
                target.mux(packet)


@pytest.fixture(scope="module")
def web_folder(video: Path, transport: bytes, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The video with its index at the end and at the start, as WebM without a duration, as a
    transport stream, and as a finished HLS playlist."""
    folder = tmp_path_factory.mktemp("web")
    shutil.copy(video, folder / "end.mp4")
    (folder / "stream.ts").write_bytes(transport)
    for name, options in (
        ("start.mp4", {"movflags": "faststart"}),
        ("whole.mkv", {}),
        ("live.mkv", {"live": "1"}),
        ("list.m3u8", {"hls_time": "2", "hls_list_size": "0"}),
    ):
        copy_packets(video, folder / name, options)
    return folder


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize(
    ("name", "seconds"),
    [("start.mp4", 20), ("end.mp4", 20), ("live.mkv", 20), ("stream.ts", 4), ("list.m3u8", 20)],
)
def test_a_file_at_an_address_is_read_once(
    name: str, seconds: int, ranges: bool, web_folder: Path
) -> None:
    if name == "end.mp4" and not ranges:
        return  # see the next test
    with web_server(web_folder, ranges=ranges) as (address, requests):
        source = open_address(f"{address}/{name}", 5.0, 16)
        times = times_of(source)
    assert not source.live
    assert times == pytest.approx(np.arange(0, seconds, 0.2), abs=0.05)
    assert source.end == pytest.approx(seconds, abs=0.05)
    assert source.gaps == []
    assert source.notes == []
    # With ranges its end is looked at too, for the index or the last time.
    assert max(Counter(requests).values()) <= (3 if ranges else 1)


def test_a_file_that_cannot_be_read_from_its_address_is_an_error(web_folder: Path) -> None:
    """Its index is behind the frames, and the server cannot go back to them."""
    with web_server(web_folder) as (address, requests):
        with pytest.raises(ClipError, match=r"end\.mp4: .*download it and predict the file"):
            list(open_address(f"{address}/end.mp4", 5.0, 16))
        with pytest.raises(ClipError, match=r"none\.mp4: cannot be opened"):
            open_address(f"{address}/none.mp4", 5.0, 16)
    assert len(requests) == 2


def test_a_download_that_breaks_off_ends(web_folder: Path) -> None:
    class Half(Files):
        def copyfile(self, source: object, outputfile: object) -> None:
            outputfile.write(source.read(Path(source.name).stat().st_size // 2))

    with web_server(web_folder, copyfile=Half.copyfile) as (address, requests):
        source = open_address(f"{address}/start.mp4", 5.0, 16)
        times = times_of(source)
    assert len(requests) == 1
    assert 5 < times[-1] < 15
    (gap,) = source.gaps
    assert (gap.end, gap.label) == (20, UNREADABLE)


@pytest.mark.parametrize("name", ["start.mp4", "whole.mkv"])
def test_a_file_without_a_length_is_read_to_its_end(name: str, web_folder: Path) -> None:
    """The server closes the connection at the end, which FFmpeg reports as an error."""
    with web_server(web_folder, endless=True) as (address, requests):
        source = open_address(f"{address}/{name}", ALL, 16)
        times = times_of(source)
    assert not source.live
    assert len(requests) == 1
    assert times == pytest.approx(np.arange(500) / 25, abs=0.001)
    assert source.end == source.duration == pytest.approx(20)
    assert source.gaps == source.notes == []
    with web_server(web_folder, endless=True, stop_after=40_000) as (address, _):
        source = open_address(f"{address}/{name}", 5.0, 16)
        assert 1 < times_of(source)[-1] < 19
    (gap,) = source.gaps
    assert (gap.start, gap.end) == (source.end, source.duration)
    (note,) = source.notes
    assert note.endswith(": the connection ended; download it and predict the file")


@pytest.mark.parametrize(("stalls", "endless"), [(True, False), (False, False), (False, True)])
def test_a_server_that_sends_no_more(
    stalls: bool, endless: bool, web_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    over = threading.Event()
    problem, options = "the connection ended", {"endless": endless}
    if stalls:
        monkeypatch.setattr("timeline.live_source._TIMEOUT", 1.0)
        problem, options = "no data came within 1 s", {"stall": over}
    with web_server(web_folder, stop_after=2000, **options) as (address, _):  # within the index
        with pytest.raises(ClipError) as caught:
            open_address(f"{address}/start.mp4", 5.0, 16)
        over.set()
    assert caught.value.reason == (
        f"cannot be opened: {problem}: check the address, the network and the server"
    )
    for name in ("start.mp4", "whole.mkv"):
        over.clear()
        with web_server(web_folder, stop_after=40_000, **options) as (address, _):
            source = open_address(f"{address}/{name}", 5.0, 16)
            list(source)
            over.set()
        assert [(gap.start, gap.end) for gap in source.gaps] == [(source.end, source.duration)]
        assert source.notes == [
            f"from {source.end:.1f} s on unreadable: {problem}; download it and predict the file"
        ]


def test_a_missing_end_is_told_where_no_duration_shows_it(web_folder: Path) -> None:
    size = (web_folder / "stream.ts").stat().st_size
    with web_server(web_folder, stop_after=size // 2) as (address, _):
        source = open_address(f"{address}/stream.ts", 5.0, 16)
        times = times_of(source)
    assert 1 < times[-1] < 3
    assert source.duration == 0
    (note,) = source.notes
    assert note.startswith(f"from {source.end:.1f} s on unreadable: ")
    assert note.endswith("; download it and predict the file")


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts"])
def test_a_lost_first_key_frame_is_told(tmp_path: Path, suffix: str) -> None:
    """FFmpeg reads the first packets while it opens a file; a request that fails costs one."""
    write_video(tmp_path / "whole.mp4", numbered(100), 25, group=20)
    copy_packets(tmp_path / "whole.mp4", tmp_path / f"cut.{suffix}", skip=4)
    with web_server(tmp_path, ranges=True) as (address, _):
        at_address = open_address(f"{address}/cut.{suffix}", ALL, 16)
        times = times_of(at_address)
    from_file = FileSource(tmp_path / f"cut.{suffix}", ALL, 16)
    assert times_of(from_file) == times
    for source in (from_file, at_address):
        (gap,) = source.gaps
        assert (gap.start, gap.end) == (0, pytest.approx(times[0], abs=0.001))
        assert 0.4 < gap.end < 0.8
        assert source.notes == ["from 0.0 s on unreadable: the first key frame is missing"]


@pytest.mark.parametrize(
    ("lost", "start", "end"), [("list0.ts", 3.2, 4), ("list3.ts", 2.4, 3.2), ("list4.ts", 3.2, 4)]
)
def test_a_lost_part_of_a_playlist_is_told(
    tmp_path: Path, lost: str, start: float, end: float
) -> None:
    write_video(tmp_path / "whole.mp4", numbered(100), 25, group=20)
    copy_packets(tmp_path / "whole.mp4", tmp_path / "list.m3u8", {"hls_time": "0.8"})
    with web_server(tmp_path, lost=lost) as (address, _):
        source = open_address(f"{address}/list.m3u8", ALL, 16)
        assert len(times_of(source)) == 80
    (gap,) = source.gaps
    assert (gap.start, gap.end) == (pytest.approx(start, abs=0.01), pytest.approx(end, abs=0.01))
    (note,) = source.notes
    assert note.startswith(f"from {start} s on unreadable: ")
    assert ("at its start or its end" in note) == (end == 4)  # FFmpeg does not tell which


def test_what_has_no_end_at_an_address_stays_live(web_folder: Path) -> None:
    with web_server(web_folder, endless=True) as (address, requests):
        # A short timeout would end the source where a busy machine takes long for a frame.
        source = open_address(f"{address}/live.mkv", 1e7, 16, reconnect_timeout=60)
        assert source.live
        assert len(requests) == 1
        frames = []
        for frame in source:  # the connection that told this is used, and restored at its end
            frames.append(frame)
            source.closing = len(requests) > 1
    assert len(frames) > 400
    assert len(requests) == 2
    assert open_address("rtsp://127.0.0.1:1/x", 5.0, 16).live  # not connected yet


def test_a_playlist_that_goes_on_stays_live(web_folder: Path) -> None:
    playlist = (web_folder / "list.m3u8").read_text()
    unfinished = web_folder / "unfinished.m3u8"
    unfinished.write_text(playlist.replace("#EXT-X-ENDLIST", ""))
    with web_server(web_folder) as (address, _):
        source = open_address(f"{address}/{unfinished.name}", 5.0, 16)
        assert source.live
        source.container.close()


@pytest.mark.parametrize("fps", [5.0, ALL])
def test_files_whose_header_has_no_frame_rate(tmp_path: Path, fps: float) -> None:
    stamps = [round(1000 * k / 30) for k in range(60)]
    source = FileSource(write_stamped(tmp_path / "b.webm", stamps, live=True), fps, 16)
    wanted = stamps if fps == ALL else [stamps[k] for k in range(0, 60, 6)]
    assert times_of(source) == pytest.approx([t / 1000 for t in wanted], abs=0.002)
    assert source.rate == pytest.approx(30, rel=0.002)
    assert source.end == pytest.approx(2, abs=0.01)
    assert source.gaps == source.notes == []


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts", "avi"])
@pytest.mark.parametrize("rate", [25, 50, Fraction(30000, 1001), Fraction(1, 2), 480])
def test_b_frames_change_neither_rate_nor_times(tmp_path: Path, suffix: str, rate) -> None:
    """The first packets lack frames that are shown between them. AVI has no presentation times."""
    path = write_reordered(tmp_path / f"b.{suffix}", rate)
    source = FileSource(path, 1e6, 16)
    times = [frame.time for frame in source]
    assert source.rate == pytest.approx(float(rate), rel=1e-3)
    assert probe(path).rate == pytest.approx(float(rate), rel=1e-3)
    assert times == pytest.approx(np.arange(120) / float(rate), abs=0.001)
    assert source.end == pytest.approx(120 / float(rate), abs=0.001)
    assert source.duration <= source.end + 0.001  # the timeline ends with the last frame
    assert source.gaps == source.notes == []


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts", "flv"])
def test_a_clock_that_does_not_begin_at_zero(tmp_path: Path, suffix: str) -> None:
    source = FileSource(write_reordered(tmp_path / f"b.{suffix}", 25, first=125), ALL, 16)
    assert times_of(source) == pytest.approx(np.arange(120) / 25)
    assert source.end == pytest.approx(4.8)
    assert source.duration == pytest.approx(4.8, abs=0.1)
    assert source.gaps == []


def test_a_rate_that_nothing_confirms_is_told(tmp_path: Path) -> None:
    """A frame in each millisecond may be 1000 frames per second, or no clock at all."""
    path = write_stamped(tmp_path / "a.mkv", range(60), "mpeg4")
    source = FileSource(path, 1e6, 16)
    assert times_of(source) == pytest.approx(np.arange(60) / 1000)
    assert source.rate == probe(path).rate == 0
    assert source.notes == [
        "its time stamps say 1000 frames per second, and nothing else confirms that: 25 frames "
        "per second are assumed where a time stamp is missing"
    ]


@pytest.mark.skipif("dvvideo" not in av.codecs_available, reason="FFmpeg without DV")
def test_raw_dv_has_its_times(tmp_path: Path) -> None:
    source = FileSource(write_dv(tmp_path / "tape.dv", 30), 5.0, 16)
    assert times_of(source) == pytest.approx(np.arange(0, 1.2, 0.2), abs=0.001)
    assert (source.rate, source.end) == (25, pytest.approx(1.2))


def test_a_file_without_time_stamps_says_so(tmp_path: Path) -> None:
    write_video(tmp_path / "raw.h264", numbered(60), 30)
    source = FileSource(tmp_path / "raw.h264", 5.0, 16)
    assert times_of(source) == pytest.approx(np.arange(0, 2, 0.2), abs=0.001)
    assert source.rate == 0
    assert source.notes == ["the file holds no time stamps: all times assume 30 frames per second"]


def test_passwords_are_not_shown() -> None:
    source = LiveSource("rtsp://anna:secret@theatre:554/cam?key=1234", 10.0, 16)
    assert source.name == "rtsp://theatre:554/cam"


def test_what_is_live() -> None:
    for text in ("0", "12", "rtsp://x/y", "tcp://h:1", "RTSP://x/y", "Https://x/a.mp4"):
        assert is_live(text)
    for text in ("a.mp4", "-", "file:///etc/passwd", "C:\\x.mp4", "http", "FILE://x"):
        assert not is_live(text)


def test_an_address_in_capitals(web_folder: Path) -> None:
    with web_server(web_folder) as (address, _):
        source = open_address(f"{address.replace('http', 'HTTP')}/start.mp4", 5.0, 16)
        assert not source.live
        assert len(times_of(source)) == 100
    assert LiveSource("RTSP://Host/Cam", 5.0, 16).address == "rtsp://Host/Cam"


def test_safe_names() -> None:
    assert safe_name("rtsp://h:554/../../x y") == "rtsp_h_554_.._.._x_y"
    assert safe_name("../..") == "video"


class Counting(FrameSource):
    """Frames without end, or an error after some of them."""

    def __init__(self, live: bool, fail_after: int | None = None) -> None:
        super().__init__("counting", 1.0, 4)
        self.live = live
        self.fail_after = fail_after
        self.made = 0

    def __iter__(self) -> Iterator[Frame]:
        while self.fail_after is None or self.made < self.fail_after:
            yield Frame(float(self.made), np.zeros((4, 4, 3), np.uint8))
            self.made += 1
        raise ClipError("counting", "is broken")


def test_a_recording_waits_for_its_reader() -> None:
    source = Counting(live=False)
    with Prefetcher(source) as prefetcher:
        first = [frame.time for _ in range(10) for frame in prefetcher.get(16)]
        threading.Event().wait(0.3)
        assert source.made <= 160 + QUEUE_SIZE + 1
        second = [frame.time for _ in range(10) for frame in prefetcher.get(16)]
    assert first + second == list(range(320))
    assert prefetcher.dropped == 0


def test_a_live_source_does_not_wait() -> None:
    source = Counting(live=True)
    with Prefetcher(source) as prefetcher:
        while source.made < 500:
            threading.Event().wait(0.01)
        newest = prefetcher.get(16)
        assert newest[0].time >= 400
        assert len(newest) <= 3
        assert prefetcher.dropped > 400


def test_errors_come_after_the_last_frame() -> None:
    with Prefetcher(Counting(live=False, fail_after=20)) as prefetcher:
        assert len(prefetcher.get(16)) == 16
        assert len(prefetcher.get(16)) == 4
        with pytest.raises(ClipError, match="is broken"):
            prefetcher.get(16)


def test_no_frame_comes_in_time() -> None:
    class Silent(Counting):
        def __iter__(self) -> Iterator[Frame]:
            threading.Event().wait(1.0)
            yield from ()

    with Prefetcher(Silent(live=True)) as prefetcher:
        assert prefetcher.get(4, timeout=0.05) == []
        assert prefetcher.get(4, timeout=3.0) is None
