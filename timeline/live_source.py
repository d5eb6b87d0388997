"""Cameras and network streams as sources of pictures."""

import platform
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import av

from timeline.sources import RECOVERY, Picture, Source, decode_all
from utils.errors import UserError
from utils.run_dir import public_address
from video.container import (
    DECODING_ERRORS,
    TOLERANT,
    ClipError,
    decoding_stream,
    reason,
    video_streams,
)

_SCHEMES = ("rtsp", "rtsps", "rtmp", "rtmps", "srt", "udp", "tcp", "http", "https")

# Not "file": a playlist at an address must not make us read this machine's files.
_PROTOCOLS = ",".join((*_SCHEMES, "rtp", "srtp", "tls", "crypto", "httpproxy"))

_TIMEOUT = 10.0  # seconds


class LiveSource(Source):
    """A camera or a network stream. Time is that of the clock; a lost connection is made anew."""

    live = True

    def __init__(
        self,
        address: str,
        rate: float,
        size: int,
        preview: bool = False,
        give_up: float = 0.0,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """`give_up`: seconds without a frame after which the source ends; 0: never."""
        name = f"camera {address}" if address.isdecimal() else public_address(address)
        super().__init__(name, rate, size, preview)
        self.address = address
        self.give_up = give_up
        self._sleep = sleep

    def __iter__(self) -> Iterator[Picture]:
        container = self._connect()  # the first time an error is the user's: a wrong address
        began, pause, why = time.monotonic(), 0.5, ""
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
                            why, trusted, lost_at = item, False, seconds
                            continue
                        trusted = trusted or item.key_frame or seconds > lost_at + RECOVERY
                        if item.is_corrupt or not trusted:
                            continue
                        if self.end and seconds > self.end + 2.0:
                            self._bridge(seconds, why or "no frames came")
                        self.end, self.state, pause, why = seconds, "", 0.5, ""
                        if picture := self._take(item, seconds):
                            yield picture
                        if self.closing:
                            return
                    why = why or "the stream ended"
            except (ClipError, *DECODING_ERRORS) as error:
                why = error.reason if isinstance(error, ClipError) else reason(error)
            container = None
            if self.closing:
                return
            why = _plain(why)
            silent = time.monotonic() - began - self.end
            if self.give_up and silent > self.give_up:
                self._bridge(time.monotonic() - began, why)
                self.notes.append(f"given up after {silent:.0f} s without a frame: {why}")
                return
            self.state = f"reconnecting ({why})"
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
                    options["rtsp_transport"] = "tcp"  # lost packets would be smeared pictures
                container = av.open(self.address, options=options, timeout=_TIMEOUT, **TOLERANT)
            if not container.streams.video:
                container.close()
                raise ClipError(self.name, "sends no video")
            return container
        except DECODING_ERRORS as error:
            raise ClipError(self.name, f"cannot be opened: {_plain(reason(error))}") from error


def is_live(text: str) -> bool:
    """Whether an input is a camera's number or a stream's address."""
    return text.isdecimal() or text.partition("://")[0] in _SCHEMES


def _plain(why: str) -> str:
    """FFmpeg's words for a timeout in ours; others as they are."""
    return f"no answer within {_TIMEOUT:.0f} s" if why.startswith("immediate exit") else why


def _open_camera(index: int) -> av.container.InputContainer:
    system = platform.system()
    if system == "Linux":
        return av.open(f"/dev/video{index}", format="v4l2")
    if system == "Darwin":
        return av.open(str(index), format="avfoundation", options={"framerate": "30"})
    raise UserError("cameras are read on Linux and macOS only: send the camera's stream instead")
