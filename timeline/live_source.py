"""Cameras and network streams as frame sources."""

import platform
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import av

from timeline.sources import RECOVERY, Frame, FrameSource, decode_all
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
        self._sleep = sleep

    def __iter__(self) -> Iterator[Frame]:
        container = self._connect()  # an error here is the user's: a wrong address
        began, pause, problem = time.monotonic(), 0.5, ""
        while True:
            try:
                if container is None:
                    container = self._connect()
                with container:
                    index, _ = video_streams(container, Path(self.name))[0]
                    stream = decoding_stream(container, index)
                    trusted, lost_at = False, time.monotonic() - began
                    for item in decode_all(container, stream):
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

    def _connect(self) -> av.container.InputContainer:
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
