"""Cameras, network streams and video files at an address as frame sources."""

import platform
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import av

from timeline.sources import RECOVERY, Frame, FrameSource, Recording, decode_packets, read_packets
from utils.errors import UserError
from utils.run_dir import strip_credentials
from video.container import (
    DECODING_ERRORS,
    TOLERANT,
    ClipError,
    decoding_stream,
    reason,
    video_streams,
)

_SCHEMES = ("rtsp", "rtsps", "rtmp", "rtmps", "srt", "udp", "tcp", "http", "https")

# Without "file": a playlist at an address must not make FFmpeg read files of this machine.
_PROTOCOLS = ",".join((*_SCHEMES, "rtp", "srtp", "tls", "crypto", "httpproxy"))

_TIMEOUT = 10.0  # seconds


def open_address(
    address: str,
    fps: float,
    size: int,
    preview: bool = False,
    reconnect_timeout: float = 0.0,
) -> FrameSource:
    """A camera or a stream, or the recording at an address; for the arguments see `LiveSource`.

    What has a duration or a number of bytes at an http address comes to an end: it is read once. A
    playlist without a duration (HLS, DASH) has no end yet.

    Raises:
        ClipError: the http address cannot be opened, or sends no video.
    """
    source = LiveSource(address, fps, size, preview, reconnect_timeout)
    if not address.startswith(("http://", "https://")):
        return source
    container = source.connect()
    is_playlist = container.format.name in ("hls", "dash")
    if container.duration or (container.size > 0 and not is_playlist):
        return AddressSource(container, source.name, fps, size, preview)
    source.container = container
    return source


class AddressSource(Recording):
    """A video file at an address, read once, from its start to its end.

    Args:
        container: the open file, which is closed at the end.
        name, fps, size, preview: see `FrameSource`.
    """

    def __init__(
        self,
        container: av.container.InputContainer,
        name: str,
        fps: float,
        size: int,
        preview: bool = False,
    ) -> None:
        super().__init__(name, fps, size, preview)
        self._container = container

    def _open(self) -> av.container.InputContainer:
        return self._container

    def __iter__(self) -> Iterator[Frame]:
        try:
            yield from super().__iter__()
        except ClipError as error:
            # Of a server that sends no parts of a file, an MP4 with its index at the end is such.
            advice = "; download it and predict the file"
            raise ClipError(self.name, error.reason + advice) from error


class LiveSource(FrameSource):
    """A camera or a network stream. Times are those of the clock; a lost connection is restored.

    Args:
        address: number of a camera, or address of a stream.
        fps, size, preview: see `FrameSource`.
        reconnect_timeout: seconds without a frame after which the source ends; 0: never.
        sleep: function that waits for some seconds.
    """

    live = True

    def __init__(
        self,
        address: str,
        fps: float,
        size: int,
        preview: bool = False,
        reconnect_timeout: float = 0.0,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        name = f"camera {address}" if address.isdecimal() else strip_credentials(address)
        super().__init__(name, fps, size, preview)
        self.address = address
        self.reconnect_timeout = reconnect_timeout
        self.container: av.container.InputContainer | None = None
        """a connection that is open already and used first"""
        self._sleep = sleep

    def __iter__(self) -> Iterator[Frame]:
        container = self.container or self.connect()  # an error is the user's: a wrong address
        began, pause, problem = time.monotonic(), 0.5, ""
        while True:
            try:
                if container is None:
                    container = self.connect()
                with container:
                    index, _ = video_streams(container, Path(self.name))[0]
                    stream = decoding_stream(container, index)
                    trusted, lost_at = False, time.monotonic() - began
                    for item in decode_packets(read_packets(container, stream)):
                        seconds = time.monotonic() - began
                        if isinstance(item, str):
                            problem, trusted, lost_at = item, False, seconds
                            continue
                        trusted = trusted or item.key_frame or seconds > lost_at + RECOVERY
                        if item.is_corrupt or not trusted:
                            continue
                        if self.end and seconds > self.end + 2.0:
                            self._mark_gap(seconds, problem or "no frames came")
                        self.end, self.state, pause, problem = seconds, "", 0.5, ""
                        if frame := self._take(item, seconds):
                            yield frame
                        if self.closing:
                            return
                    problem = problem or "the stream ended"
            except (ClipError, *DECODING_ERRORS) as error:
                problem = error.reason if isinstance(error, ClipError) else reason(error)
            container = None
            if self.closing:
                return
            problem = _describe(problem)
            silent = time.monotonic() - began - self.end
            if self.reconnect_timeout and silent > self.reconnect_timeout:
                self._mark_gap(time.monotonic() - began, problem)
                self.notes.append(f"given up after {silent:.0f} s without a frame: {problem}")
                return
            self.state = f"reconnecting ({problem})"
            self._sleep(pause)
            pause = min(2 * pause, 10.0)

    def connect(self) -> av.container.InputContainer:
        """Open the camera or the address.

        Raises:
            ClipError: it cannot be opened, or sends no video.
        """
        try:
            if self.address.isdecimal():
                container = _open_camera(int(self.address))
            else:
                options = {"protocol_whitelist": _PROTOCOLS}
                if self.address.startswith("rtsp"):
                    options["rtsp_transport"] = "tcp"  # with UDP, lost packets smear frames
                container = av.open(self.address, options=options, timeout=_TIMEOUT, **TOLERANT)
            if not container.streams.video:
                container.close()
                raise ClipError(self.name, "sends no video")
            return container
        except DECODING_ERRORS as error:
            raise ClipError(self.name, f"cannot be opened: {_describe(reason(error))}") from error


def is_live(text: str) -> bool:
    """Whether a text is the number of a camera or the address of a stream."""
    return text.isdecimal() or text.partition("://")[0] in _SCHEMES


def _describe(message: str) -> str:
    """FFmpeg's message for a timeout in plain words; other messages as they are."""
    return f"no answer within {_TIMEOUT:.0f} s" if message.startswith("immediate exit") else message


def _open_camera(index: int) -> av.container.InputContainer:
    system = platform.system()
    if system == "Linux":
        return av.open(f"/dev/video{index}", format="v4l2")
    if system == "Darwin":
        return av.open(str(index), format="avfoundation", options={"framerate": "30"})
    raise UserError("cameras are read on Linux and macOS only: send the camera's stream instead")
