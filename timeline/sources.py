"""Where whole videos come from: files and a pipe; live_source.py has cameras and streams.

Clips are short and whole or refused (video.py). An operation is hours long, and a bad stretch in it
is no reason to lose the rest: it is bridged, and marked.
"""

import math
import os
import select
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np

from timeline.segments import UNREADABLE, Segment
from utils.errors import UserError
from video.container import (
    DECODING_ERRORS,
    FORMATS,
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


class Picture(NamedTuple):
    """A frame that the model is to see."""

    time: float
    """seconds since the start"""
    image: np.ndarray
    """`(size, size, 3)` uint8 RGB"""
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
        self.closing = False
        """set it, from any thread, to make the source end as soon as it can"""
        self._due = 0

    @abstractmethod
    def __iter__(self) -> Iterator[Picture]:
        """Read on to the end.

        Raises:
            ClipError: there is nothing that can be read.
        """

    def _take(self, frame: av.VideoFrame, seconds: float) -> Picture | None:
        """The picture of a frame, if one is due."""
        passed = math.floor((seconds + 1e-4) * self.rate)  # the multiples of 1/rate so far
        if passed < self._due:
            return None
        self._due = passed + 1
        shown = None
        if self.preview:
            width = min(PREVIEW_WIDTH, frame.width)
            shown = to_rgb(frame, (width, max(1, round(width * frame.height / frame.width))))
        return Picture(seconds, to_rgb(frame, self.size), shown)

    def _bridge(self, until: float, why: str) -> None:
        """Mark the stretch from the last good frame on as unreadable."""
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
        if self.duration > self.end + 1.0:
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
        for item, seconds in _with_times(decode_all(container, stream), origin, interval, longest):
            if isinstance(item, str):
                error, trusted, lost_at = error or item, False, self.end
                continue
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
            try:
                picture = self._take(item, seconds)
            except DECODING_ERRORS as problem:  # it cannot be converted
                error = error or reason(problem)
                continue
            if error or seconds > self.end + longest:
                if seconds > self.end + interval / 2:
                    self._bridge(seconds, error or "no frames")
                error = ""
            self.end = max(self.end, seconds + interval)
            if picture:
                yield picture
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
        # Playlists are left out as for files: they would open others.
        return av.open(self, options={"format_whitelist": FORMATS}, **TOLERANT)

    def read(self, most: int) -> bytes:
        """What PyAV reads from. Python's own stdin would wait for ever, and hold its lock."""
        if os.name == "posix":
            while not select.select([0], [], [], 0.2)[0]:
                if self.closing:
                    return b""
        return b"" if self.closing else os.read(0, most)


def decode_all(
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


def _with_times(
    items: Iterator[av.VideoFrame | str], origin: float, interval: float, longest: float
) -> Iterator[tuple[av.VideoFrame | str, float]]:
    """Each frame with its time in seconds, which never runs backwards.

    A time stamp that jumps ahead is believed only once the next one goes on from there: a single
    wrong one would cost all frames up to it.

    Args:
        origin: what the time stamps count from.
        interval: that frames usually are apart.
        longest: step that is believed at once.
    """
    last, held = -interval, None
    for item in items:
        if isinstance(item, str):
            yield item, 0.0
            continue
        seconds = last + interval if item.time is None else max(0.0, item.time - origin)
        if held:
            real = seconds >= held[1]
            yield held[0], held[1] if real else last + interval
            last, held = held[1] if real else last + interval, None
        if seconds <= last:
            seconds = last + interval
        if seconds > last + longest and last >= 0:
            held = item, seconds
        else:
            yield item, seconds
            last = seconds
    if held:
        yield held[0], last + interval
