"""Sources of whole videos: files and a pipe. Folders of images are in folder_source.py, cameras and
streams in live_source.py.

A damaged clip is refused (video/decoder.py). An operation is hours long, and a bad stretch in it is
no reason to lose the rest: the stretch is skipped and marked as a gap.
"""

import itertools
import math
import os
import select
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np

from clips.manifest import UNREADABLE
from timeline.segments import Segment
from utils.errors import UserError
from video.container import (
    DECODING_ERRORS,
    FORMATS,
    MAX_RATE,
    TOLERANT,
    ClipError,
    decoding_stream,
    duration,
    frame_rate,
    longest_step,
    open_video,
    reason,
    require_file,
    to_rgb,
    video_streams,
)

PREVIEW_WIDTH = 640

# Seconds after an error in which frames that are predicted from other frames are not trusted.
RECOVERY = 10.0

# Packets at the start that tell the frame rate. A pipe cannot be read twice, nor a long file.
HEAD = 50


class Frame(NamedTuple):
    """A frame for the model."""

    time: float
    """seconds since the start of the video"""
    image: np.ndarray
    """`(size, size, 3)` uint8 RGB, or in its own size"""
    preview: np.ndarray | None = None
    """the frame in its own shape, for the live page; None: not asked for"""


class FrameSource(ABC):
    """A video as a sequence of frames, at most `fps` per second.

    The first frame at or after each multiple of 1/fps is taken. Where the video has fewer frames,
    all are taken, and none twice.

    Args:
        name: name for messages and pages.
        fps: frames per second that the model is shown.
        size: height and width of these frames in pixels; None: their own size.
        preview: whether frames in their own shape are returned as well.
    """

    live = False
    """whether the video goes on while nobody reads"""
    duration = 0.0
    """length in seconds according to the file; 0: unknown"""
    rate = 0.0
    """frames per second of the video itself; 0: unknown"""

    def __init__(self, name: str, fps: float, size: int | None, preview: bool = False) -> None:
        self.name = name
        self.fps = fps
        self.size = size
        self.preview = preview
        self.end = 0.0
        """seconds from the start to the end of the last frame so far"""
        self.gaps: list[Segment] = []
        """stretches that could not be read"""
        self.notes: list[str] = []
        """messages about the gaps"""
        self.state = ""
        """what a live source does while no frames come; empty: frames come"""
        self.closing = False
        """set it, from any thread, to make the source end as soon as it can"""
        self._next_step = 0  # the next multiple of 1/fps without a frame

    @abstractmethod
    def __iter__(self) -> Iterator[Frame]:
        """Read the video to its end.

        Raises:
            ClipError: nothing can be read.
        """

    def _step(self, seconds: float) -> int:
        return math.floor((seconds + 1e-4) * self.fps)

    def _is_due(self, seconds: float) -> bool:
        """Whether the model is to be shown the frame at this time."""
        return self._step(seconds) >= self._next_step

    def _take(self, frame: av.VideoFrame, seconds: float) -> Frame | None:
        """The decoded frame for the model, if one is due at this time."""
        if not self._is_due(seconds):
            return None
        self._next_step = self._step(seconds) + 1
        preview = None
        if self.preview:
            width = min(PREVIEW_WIDTH, frame.width)
            preview = to_rgb(frame, (width, max(1, round(width * frame.height / frame.width))))
        return Frame(seconds, to_rgb(frame, self.size), preview)

    def _mark_gap(self, until: float, message: str) -> None:
        """Mark the stretch from the last good frame on as unreadable."""
        if self.gaps and self.gaps[-1].end >= self.end - 1e-6:
            self.gaps[-1] = Segment(self.gaps[-1].start, until, UNREADABLE)
        else:
            self.gaps.append(Segment(self.end, until, UNREADABLE))
            self.notes.append(f"from {self.end:.1f} s on unreadable: {message}")


class Recording(FrameSource):
    """A video with a beginning, an end, and timestamps."""

    in_parts = False
    """whether the video is a playlist of parts, each of which can be missing by itself"""

    @abstractmethod
    def _open(self) -> av.container.InputContainer: ...

    def _packets(
        self, container: av.container.InputContainer, stream: av.VideoStream
    ) -> Iterator[av.Packet | str]:
        """The packets, see `read_packets`; a source may explain the messages."""
        return read_packets(container, stream)

    def __iter__(self) -> Iterator[Frame]:
        try:
            with self._open() as container:
                index, _ = video_streams(container, Path(self.name))[0]
                stream = decoding_stream(container, index)
                yield from self._read(container, stream)
        except DECODING_ERRORS as error:
            raise ClipError(self.name, f"cannot be read: {reason(error)}") from error

    def _read(
        self, container: av.container.InputContainer, stream: av.VideoStream
    ) -> Iterator[Frame]:
        origin = (container.start_time or 0) / av.time_base
        self.duration = (container.duration or 0) / av.time_base
        if "matroska" in container.format.name:  # it says when the last frame ends
            self.duration -= origin
        self.duration = max(0.0, self.duration)
        packets = self._packets(container, stream)
        head = list(itertools.islice(packets, HEAD))
        interval = 1 / self._find_rate(stream, head, duration(container, stream))
        # A longer time between two frames is a gap. The parts of a playlist can be short.
        max_step = longest_step(interval, 0.25 if self.in_parts else 1.0)
        items = decode_packets(itertools.chain(head, packets))
        if container.format.name == "avi":
            items = _in_decoding_time(items)
        trusted, error, lost_at = True, "", -math.inf
        first = next((packet for packet in head if isinstance(packet, av.Packet)), None)
        for item, seconds in _with_times(items, origin, interval, max_step):
            if isinstance(item, str):
                error, trusted, lost_at = item, False, self.end
                continue
            if first and not first.is_keyframe:  # FFmpeg may lose a packet while it opens a file
                first, error = None, error or "the first key frame is missing"
            # After an error the decoder patches frames up from others until the next key frame.
            # If frames are missing after that, the damage goes on.
            if seconds > lost_at + RECOVERY:
                trusted = True
            elif trusted and seconds > self.end + 1.5 * interval:
                trusted, error = False, "frames are missing"
            trusted = trusted or item.key_frame
            if item.is_corrupt or not trusted:
                error = error or "damaged frames"
                continue
            try:
                frame = self._take(item, seconds)
            except DECODING_ERRORS as conversion_error:
                error = error or reason(conversion_error)
                continue
            if error or seconds > self.end + max_step:
                if seconds > self.end + interval / 2:
                    self._mark_gap(seconds, error or "no frames")
                error = ""
            self.end = max(self.end, seconds + interval)
            if frame:
                yield frame
        if not self.end:
            detail = f": {error}" if error else ""
            raise ClipError(self.name, f"holds no frame that can be decoded{detail}")
        if error and self.duration > self.end + interval:
            self._mark_gap(self.duration, error)
        elif self.duration > self.end + max_step:
            problem = "the file ends there, but its header says"
            if self.in_parts:
                problem = "parts of the playlist are missing at its start or its end: it says"
            self._mark_gap(self.duration, f"{problem} {self.duration:.1f} s")

    def _find_rate(
        self, stream: av.VideoStream, head: list[av.Packet | str], seconds: float
    ) -> float:
        """The video's frames per second by its first packets; a note if they do not tell it."""
        # Packets are missing where an error is: the rate is that of the longest piece without one.
        pieces = itertools.groupby(head, key=lambda item: isinstance(item, str))
        packets = max((list(piece) for is_error, piece in pieces if not is_error), key=len)
        stamps = [(packet.pts, packet.dts) for packet in packets if packet.size]
        is_whole = len(packets) == len(head) < HEAD
        self.rate, doubt = frame_rate(stream, stamps, seconds, is_whole)
        header = float(stream.guessed_rate or 0)
        used = self.rate or (header if 1 <= header <= MAX_RATE else 25.0)
        if doubt:
            self.notes.append(
                f"{doubt}: {used:.4g} frames per second are assumed where a time stamp is missing"
            )
        elif not self.rate and all(stamp == (None, None) for stamp in stamps):
            self.notes.append(
                f"the file holds no time stamps: all times assume {used:g} frames per second"
            )
        return used


class FileSource(Recording):
    """A video file."""

    def __init__(self, path: Path, fps: float, size: int | None, preview: bool = False) -> None:
        super().__init__(str(path), fps, size, preview)
        self.path = path

    def _open(self) -> av.container.InputContainer:
        require_file(self.path)
        return open_video(self.path)


class PipeSource(Recording):
    """A video from standard input, in a format that can be read without seeking (MPEG-TS, Matroska,
    fragmented MP4)."""

    def __init__(self, fps: float, size: int, preview: bool = False) -> None:
        super().__init__("standard input", fps, size, preview)
        if sys.stdin.isatty():
            raise UserError(
                "- reads a video from a pipe, but nothing is piped in: ... | predict.py"
            )

    def _open(self) -> av.container.InputContainer:
        # No playlists, as for files: they would open other files.
        return av.open(self, options={"format_whitelist": FORMATS}, **TOLERANT)

    def read(self, size: int) -> bytes:
        """Read up to `size` bytes for PyAV. Python's own stdin would block for ever, and hold its
        lock."""
        if os.name == "posix":
            while not select.select([0], [], [], 0.2)[0]:
                if self.closing:
                    return b""
        return b"" if self.closing else os.read(0, size)


def read_packets(
    container: av.container.InputContainer, stream: av.VideoStream
) -> Iterator[av.Packet | str]:
    """All packets that can be read, and an error message in place of those that cannot.

    The last packet is empty: for it, the decoder returns the frames that it holds back.
    """
    failures, problem = 0, ""  # one after the other
    while failures < 50:
        try:
            # An error ends PyAV's iterator; a new iterator continues behind the damage.
            for packet in container.demux(stream):
                if packet.size and problem:
                    yield problem
                    problem = ""
                if packet.size:
                    yield packet
                failures = 0
            break
        except av.EOFError:
            break
        except DECODING_ERRORS as error:
            failures += 1
            problem = problem or reason(error)
    flush = av.Packet()
    flush.stream, flush.time_base = stream, stream.time_base
    yield flush  # before the message: the frames in the decoder are not damaged
    if problem:
        yield problem


def decode_packets(packets: Iterable[av.Packet | str]) -> Iterator[av.VideoFrame | str]:
    """All frames that can be decoded, and an error message in place of each one that cannot.

    Args:
        packets: output of `read_packets`.
    """
    problem = ""
    for packet in packets:
        # The empty packet at the end gives frames that came before the packet with the problem.
        if problem and (isinstance(packet, str) or packet.size):
            yield problem
            problem = ""
        if isinstance(packet, str):
            yield packet
            continue
        try:
            yield from packet.decode()
        except DECODING_ERRORS as error:
            problem = reason(error)
    if problem:
        yield problem


def _in_decoding_time(items: Iterator[av.VideoFrame | str]) -> Iterator[av.VideoFrame | str]:
    """The items with frames that are stamped with decoding times, moved to begin at 0.

    AVI holds no presentation times. Those that FFmpeg makes up run backwards where there are
    B-frames. Decoders return frames in the right order, a constant number of frames later.
    """
    delay: int | None = None
    for item in items:
        if isinstance(item, av.VideoFrame):
            if delay is None:  # no decoder waits for more than 16 frames: before, some are missing
                delay = item.dts if item.dts and item.dts <= 16 else 0
            item.pts = None if item.dts is None else item.dts - delay
        yield item


def _with_times(
    items: Iterator[av.VideoFrame | str], origin: float, interval: float, max_step: float
) -> Iterator[tuple[av.VideoFrame | str, float]]:
    """Each frame with its time in seconds, which never runs backwards.

    A timestamp that jumps ahead is accepted only when the next one continues from there: a single
    wrong one would cost all frames up to it.

    Args:
        items: output of `decode_packets`.
        origin: timestamp of the start in seconds.
        interval: usual seconds between two frames.
        max_step: longest step in seconds that is accepted at once.
    """
    last, held = -interval, None
    for item in items:
        if isinstance(item, str):
            yield item, 0.0
            continue
        seconds = last + interval if item.time is None else max(0.0, item.time - origin)
        if held:
            last = held[1] if seconds >= held[1] else last + interval
            yield held[0], last
            held = None
        if seconds <= last:
            seconds = last + interval
        if seconds > last + max_step and last >= 0:
            held = item, seconds
        else:
            yield item, seconds
            last = seconds
    if held:
        yield held[0], last + interval
