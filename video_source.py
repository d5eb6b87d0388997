"""Where whole videos come from: files, a pipe, cameras and network streams.

Clips are short and whole or refused (video.py). An operation is hours long, and a bad stretch in it
is no reason to lose the rest: it is bridged, and marked.
"""

import math
import platform
import re
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import av
import numpy as np

from errors import UserError
from run_folder import public_address
from timeline import UNREADABLE, Segment
from video_file import (
    DECODING_ERRORS,
    TOLERANT,
    ClipError,
    decoding_stream,
    open_video,
    reason,
    require_file,
    to_rgb,
    video_streams,
)

PREVIEW_WIDTH = 640
RECOVERY = 10.0  # seconds after an error in which frames that rest on others are not trusted

_SCHEMES = ("rtsp", "rtsps", "rtmp", "rtmps", "srt", "udp", "tcp", "http", "https")
# Not "file": a playlist at an address must not make us read this machine's files.
_PROTOCOLS = ",".join((*_SCHEMES, "rtp", "srtp", "tls", "crypto", "httpproxy"))


class Picture(NamedTuple):
    """A frame that the model is to see."""

    time: float
    """seconds since the start"""
    image: np.ndarray
    """`(size, size, 3)` uint8 RGB"""
    gap: float = 0.0
    """seconds before it that could not be read"""
    preview: np.ndarray | None = None
    """the frame in its own shape, for people"""


class Source(ABC):
    """A video as a stream of pictures, `rate` a second at most.

    Pictures are taken at the first frame at or after each multiple of 1/rate; where there are fewer
    frames than that, all are taken, none twice.
    """

    live = False
    """whether it goes on while nobody reads"""
    duration = 0.0
    """seconds, as the file says; 0: unknown"""

    def __init__(self, name: str, rate: float, size: int, preview: bool = False) -> None:
        self.name = name
        """for people"""
        self.rate = rate
        self.size = size
        self.preview = preview
        self.end = 0.0
        """seconds from the start to the end of the last frame so far"""
        self.unreadable: list[Segment] = []
        """the stretches that were bridged"""
        self.notes: list[str] = []
        self.state = ""
        """what a live source is doing while there are no pictures"""
        self._due = 0
        self._gap = 0.0

    @abstractmethod
    def __iter__(self) -> Iterator[Picture]:
        """Read on to the end.

        Raises:
            ClipError: there is nothing that can be read.
        """

    def _take(self, frame: av.VideoFrame, seconds: float) -> Iterator[Picture]:
        """The picture of a frame, if one is due."""
        passed = math.floor((seconds + 1e-4) * self.rate)  # the multiples of 1/rate so far
        if passed < self._due:
            return
        self._due = passed + 1
        shown = None
        if self.preview:
            width = min(PREVIEW_WIDTH, frame.width)
            shown = to_rgb(frame, (width, max(1, round(width * frame.height / frame.width))))
        yield Picture(seconds, to_rgb(frame, self.size), self._gap, shown)
        self._gap = 0.0

    def _bridge(self, until: float, why: str) -> None:
        """Mark the stretch from the last good frame on as unreadable."""
        self._gap += until - self.end
        if self.unreadable and self.unreadable[-1].end >= self.end - 1e-6:
            last = self.unreadable.pop()
            self.unreadable.append(Segment(last.start, until, UNREADABLE))
        else:
            self.unreadable.append(Segment(self.end, until, UNREADABLE))
            self.notes.append(f"from {self.end:.1f} s on unreadable: {why}")


class _Recorded(Source):
    """A video with a beginning, an end, and time stamps."""

    @abstractmethod
    def _open(self) -> av.container.InputContainer: ...

    def __iter__(self) -> Iterator[Picture]:
        try:
            with self._open() as container:
                index, _ = video_streams(container, Path(self.name))[0]
                stream = decoding_stream(container, index)
                yield from self._read(container, stream)
        except DECODING_ERRORS as error:
            raise ClipError(self.name, f"cannot be read: {reason(error)}") from error
        if not self.end:
            why = f": {self.notes[0]}" if self.notes else ""
            raise ClipError(self.name, f"holds no frame that can be decoded{why}")
        if self.duration > self.end + max(1.0, 0.01 * self.duration):
            self._bridge(self.duration, f"the file ends there, and says {self.duration:.1f} s")

    def _read(
        self, container: av.container.InputContainer, stream: av.VideoStream
    ) -> Iterator[Picture]:
        interval = 1 / float(stream.average_rate or stream.guessed_rate or 25)
        interval = min(max(interval, 1e-3), 60.0)
        origin = (container.start_time or 0) / av.time_base
        self.duration = max(0.0, (container.duration or 0) / av.time_base)
        longest = max(1.0, 5 * interval)  # between frames, without a word
        trusted, error, lost_at = True, "", -math.inf
        for item in _decode_all(container, stream):
            if isinstance(item, str):
                error, trusted, lost_at = error or item, False, self.end
                continue
            seconds = self.end if item.time is None else item.time - origin
            backwards = seconds < self.end - interval / 2
            absurd = self.duration and seconds > 2 * self.duration + 60
            if backwards or absurd:
                seconds = self.end
            # After an error pictures are patched up from others until one stands for itself, and
            # where some are missing then, the damage goes on.
            if seconds > lost_at + RECOVERY:
                trusted = True
            elif trusted and seconds > self.end + 1.5 * interval:
                trusted, error = False, "frames are missing"
            trusted = trusted or item.key_frame
            if item.is_corrupt or not trusted:
                error = error or "damaged frames"
                continue
            if error or seconds > self.end + longest:
                if seconds > self.end + interval / 2:
                    self._bridge(seconds, error or "no frames")
                error = ""
            self.end = seconds + interval
            yield from self._take(item, seconds)
        if error and self.end and self.duration > self.end + interval:
            self._bridge(self.duration, error)


class FileSource(_Recorded):
    """A video file."""

    def __init__(self, path: Path, rate: float, size: int, preview: bool = False) -> None:
        super().__init__(str(path), rate, size, preview)
        self.path = path

    def _open(self) -> av.container.InputContainer:
        require_file(self.path)
        return open_video(self.path)


class PipeSource(_Recorded):
    """A video that comes in through standard input, in a format that can be read without seeking
    (MPEG-TS, Matroska, fragmented MP4)."""

    def __init__(self, rate: float, size: int, preview: bool = False) -> None:
        super().__init__("standard input", rate, size, preview)
        if sys.stdin.isatty():
            raise UserError(
                "- reads a video from a pipe, but nothing is piped in: ... | predict.py"
            )

    def _open(self) -> av.container.InputContainer:
        return av.open(sys.stdin.buffer, **TOLERANT)


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
                    stream = decoding_stream(container, container.streams.video[0].index)
                    trusted, lost_at = False, time.monotonic() - began
                    for item in _decode_all(container, stream):
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
                        yield from self._take(item, seconds)
                    why = why or "the stream ended"
            except (ClipError, *DECODING_ERRORS) as error:
                why = error.reason if isinstance(error, ClipError) else reason(error)
            container = None
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
                container = av.open(self.address, options=options, timeout=(10.0, 10.0), **TOLERANT)
            if not container.streams.video:
                container.close()
                raise ClipError(self.name, "sends no video")
            return container
        except DECODING_ERRORS as error:
            raise ClipError(self.name, f"cannot be opened: {reason(error)}") from error


def is_live(text: str) -> bool:
    """Whether an input is a camera's number or a stream's address."""
    return text.isdecimal() or urlsplit(text).scheme in _SCHEMES


def safe_name(name: str) -> str:
    """A source's name as part of a file name."""
    return re.sub(r"[^\w.-]+", "_", name).strip("._") or "video"


def _open_camera(index: int) -> av.container.InputContainer:
    system = platform.system()
    if system == "Linux":
        return av.open(f"/dev/video{index}", format="v4l2")
    if system == "Darwin":
        return av.open(str(index), format="avfoundation", options={"framerate": "30"})
    raise UserError("cameras are read on Linux and macOS only: send the camera's stream instead")


def _decode_all(
    container: av.container.InputContainer, stream: av.VideoStream
) -> Iterator[av.VideoFrame | str]:
    """All frames that can be decoded, and in their place what is wrong with those that cannot."""
    failures = 0  # in a row
    while failures < 50:
        try:
            # An error ends PyAV's iterator; a new one goes on behind the damage.
            for packet in container.demux(stream):
                try:
                    yield from packet.decode()
                    failures = 0
                except DECODING_ERRORS as error:
                    yield reason(error)
            return
        except av.EOFError:
            return
        except DECODING_ERRORS as error:
            failures += 1
            yield reason(error)
