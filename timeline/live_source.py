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

_PLAYLISTS = ("hls", "dash")

_ADVICE = "; download it and predict the file"


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
    if not source.address.startswith(("http://", "https://")):
        return source
    container = source.connect()
    is_playlist = container.format.name in _PLAYLISTS
    if container.duration or (_num_bytes(container) and not is_playlist):
        return AddressSource(container, source.name, fps, size, preview)
    source.container = container
    return source


def _num_bytes(container: av.container.InputContainer) -> int:
    """The length of what is at an address; 0 if the server does not tell it (PyAV: None or -1)."""
    return max(0, container.size or 0)


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
        self.in_parts = container.format.name in _PLAYLISTS
        self._container = container
        self._size = 0 if self.in_parts else _num_bytes(container)
        self._received = 0
        """bytes of the file up to the end of the newest packet"""
        self._problem = ""
        """why no more packets came"""

    def _open(self) -> av.container.InputContainer:
        return self._container

    def _packets(
        self, container: av.container.InputContainer, stream: av.VideoStream
    ) -> Iterator[av.Packet | str]:
        """The packets, and messages that say what the connection did."""
        asked = time.monotonic()
        for item in read_packets(container, stream):
            if isinstance(item, str):
                self._problem = _describe(item, time.monotonic() - asked)
                if self._problem.startswith("invalid data"):  # so is called what an MP4 lacks
                    self._problem = "the connection ended, or the file is damaged"
                item = self._problem + _ADVICE
            elif item.size:
                self._received = max(self._received, (item.pos or 0) + item.size)
                self._problem = ""
            yield item
            asked = time.monotonic()

    def __iter__(self) -> Iterator[Frame]:
        try:
            yield from super().__iter__()
        except ClipError as error:
            # Of a server that sends no parts of a file, an MP4 with its index at the end is such.
            raise ClipError(self.name, error.reason.removesuffix(_ADVICE) + _ADVICE) from error
        is_cut = self._received < 0.9 * self._size or self._problem.startswith("no data")
        if is_cut and self.duration < 0.9 * self.end:  # the duration, if any, does not show it
            problem = self._problem or f"only {self._received / self._size:.0%} of the file came"
            self.notes.append(f"from {self.end:.1f} s on unreadable: {problem}{_ADVICE}")


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
        scheme, separator, rest = address.partition("://")
        self.address = scheme.lower() + separator + rest  # FFmpeg knows small letters only
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
        began, cause, message = time.monotonic(), None, ""
        try:
            if self.address.isdecimal():
                container = _open_camera(int(self.address))
            else:
                options = {"protocol_whitelist": _PROTOCOLS}
                if self.address.startswith("rtsp"):
                    options["rtsp_transport"] = "tcp"  # with UDP, lost packets smear frames
                container = av.open(self.address, options=options, timeout=_TIMEOUT, **TOLERANT)
            if container.streams.video:
                return container
            container.close()
        except DECODING_ERRORS as error:
            cause, message = error, reason(error)
        problem = _describe(message, time.monotonic() - began)
        if problem != message:
            problem += ": check the address, the network and the server"
        problem = f"cannot be opened: {problem}" if problem else "sends no video"
        raise ClipError(self.name, problem) from cause


def is_live(text: str) -> bool:
    """Whether a text is the number of a camera or the address of a stream."""
    scheme, separator, _ = text.partition("://")
    return text.isdecimal() or bool(separator and scheme.lower() in _SCHEMES)


def _describe(message: str, waited: float = 0.0) -> str:
    """FFmpeg's message about a connection in plain words; other messages as they are.

    Args:
        waited: seconds until the message came. After a timeout, many demuxers report what they
            make of the data so far.
    """
    if message.startswith("immediate exit") or waited >= 0.9 * _TIMEOUT:
        return f"no data came within {_TIMEOUT:g} s"
    return "the connection ended" if message in ("input/output error", "end of file") else message


def _open_camera(index: int) -> av.container.InputContainer:
    system = platform.system()
    if system == "Linux":
        return av.open(f"/dev/video{index}", format="v4l2")
    if system == "Darwin":
        return av.open(str(index), format="avfoundation", options={"framerate": "30"})
    raise UserError("cameras are read on Linux and macOS only: send the camera's stream instead")
