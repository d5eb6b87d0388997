"""Cutting excerpts out of a video: without encoding again where that is exact.

An excerpt holds the frames whose time stamps are in [start, end). If the packets of just these
frames follow each other in the file, the first of them a key frame, they are copied. Then the copy
is decoded and compared with the video frame by frame; only an equal one is kept. All other excerpts
are encoded again as H.264, with the size and the time stamps of the video.
"""

import functools
import os
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, suppress
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np

from utils.errors import FULL_DISK
from utils.files import atomic
from video.container import (
    DECODING_ERRORS,
    ClipError,
    decode,
    decoding_stream,
    duration,
    frame_rate,
    open_video,
    reason,
    require_file,
    to_rgb,
    video_streams,
)
from video.encoder import frame_writer

_HALF_TICK = 0.0005  # seconds; containers round times to milliseconds


class Excerpt(NamedTuple):
    """A part of a video, and the file that it is written to."""

    start: float
    """seconds since the start of the video"""
    end: float
    """seconds, exclusive"""
    target: Path


class FrameTimes(NamedTuple):
    """When the frames of a video are shown, according to its packets."""

    stream: int
    """index of the stream"""
    rate: float
    """frames per second"""
    duration: float
    """seconds until the end of the last frame"""
    origin: float
    """seconds of the time stamps where the video starts"""
    pts: np.ndarray
    """`(N,)` time stamps of all frames, in order of time; empty: the stamps are not usual, and
    frames are counted"""
    file_pts: np.ndarray
    """`(N,)` the same stamps in the order of the file"""
    keys: np.ndarray
    """`(N,)` whether the packets in the order of the file are key frames"""
    tick: Fraction
    """seconds per unit of the time stamps"""

    def select(self, start: float, end: float) -> np.ndarray:
        """The time stamps of the frames in [start, end)."""
        times = np.maximum(0.0, self.pts * float(self.tick) - self.origin)
        low, high = np.searchsorted(times, (start - _HALF_TICK, end - _HALF_TICK))
        return self.pts[low:high]


def frame_times(path: Path) -> FrameTimes:
    """The times of all frames, from the packets; nothing is decoded.

    Raises:
        ClipError: the file cannot be read, holds no video, or does not tell its frame rate.
    """
    require_file(path)
    status = os.stat(path)
    return _frame_times(path, status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=2)  # a worker cuts the same video again and again
def _frame_times(path: Path, size: int, modified: int) -> FrameTimes:
    try:
        with open_video(path) as container:
            index, _ = video_streams(container, path)[0]
            stream = container.streams[index]
            packets = [
                (p.pts, p.dts, p.is_keyframe, p.is_discard or p.is_corrupt)
                for p in container.demux(stream)
                if p.size
            ]
            seconds = duration(container, stream)
            rate, _ = frame_rate(stream, [packet[:2] for packet in packets], seconds)
            is_avi, tick = container.format.name == "avi", stream.time_base
            origin = (container.start_time or 0) / av.time_base
    except DECODING_ERRORS as error:
        raise ClipError(path, f"cannot be read: {reason(error)}") from error
    if not rate or not packets:
        raise ClipError(path, "does not tell how many frames it shows per second")
    stamps = [packet[0] for packet in packets]
    keys = np.array([packet[2] for packet in packets], bool)
    # FFmpeg makes up the presentation times of AVI, wrongly where there are B-frames.
    unusual = None in stamps or any(packet[3] for packet in packets) or (is_avi and not keys.all())
    if unusual or len(set(stamps)) < len(stamps):
        empty = np.empty(0, np.int64)
        length = len(packets) / rate
        return FrameTimes(index, rate, length, 0.0, empty, empty, empty, 1 / _fraction(rate))
    pts = np.array(stamps, np.int64)
    last = max(0.0, float(pts.max() * tick) - origin)
    return FrameTimes(index, rate, last + 1 / rate, origin, np.sort(pts), pts, keys, tick)


def _fraction(rate: float) -> Fraction:
    """A frame rate as a fraction, such as 30000/1001."""
    return Fraction(rate).limit_denominator(1001)


def write_excerpts(path: Path, excerpts: Sequence[Excerpt]) -> list[str]:
    """Cut excerpts out of a video; each file appears only when it is complete.

    They should be near each other: the video is decoded from the key frame before the first one to
    the end of the last one.

    Returns:
        For each excerpt why it could not be cut; an empty text if it was.
    """
    try:
        times = frame_times(path)
        copied = [_copy(path, times, excerpt) for excerpt in excerpts]
        rest = [e for e, done in zip(excerpts, copied, strict=True) if not done]
        if not rest:
            return [""] * len(excerpts)
        problems = _encode(path, times, rest, seek=True)
        return [problems.get(excerpt, "") for excerpt in excerpts]
    except ClipError as error:
        if len(excerpts) > 1:  # damage concerns some of them only
            return [write_excerpts(path, [excerpt])[0] for excerpt in excerpts]
        return [error.reason]


def _read(path: Path, times: FrameTimes, start: float, end: float, seek: bool) -> Iterator:
    """The time and the frame of each frame in [start, end).

    Raises:
        ClipError: a frame is missing or the video breaks off.
    """
    wanted = deque(times.select(start, end).tolist())
    tick = float(times.tick)
    try:
        with open_video(path) as container:
            stream = decoding_stream(container, times.stream)
            if seek and wanted:
                _seek(container, stream, times, wanted[0])
            for number, frame in enumerate(container.decode(stream)):
                if not len(times.pts):
                    seconds = number / times.rate
                    if start - _HALF_TICK <= seconds < end - _HALF_TICK:
                        frame.pts, frame.time_base = number, times.tick
                        yield seconds, frame
                    elif seconds >= end:
                        return
                    continue
                if not wanted:
                    return
                if frame.pts is None or frame.pts < wanted[0]:
                    continue
                if frame.pts != wanted.popleft():
                    raise ClipError(path, "frames are missing")
                yield max(0.0, frame.pts * tick - times.origin), frame
    except DECODING_ERRORS as error:
        raise ClipError(path, f"breaks off: {reason(error)}") from error
    if wanted:
        raise ClipError(path, "frames are missing")


def _seek(
    container: av.container.InputContainer, stream: av.VideoStream, times: FrameTimes, pts: int
) -> None:
    """Move to a packet at or before the key frame that a frame depends on.

    In MPEG-TS, FFmpeg looks for times, not for key frames, and may end up behind one.
    """
    (place,) = np.flatnonzero(times.file_pts == pts)
    # A frame that is shown before the key frame in front of it depends on the one before that.
    is_before = times.keys[: place + 1] & (times.file_pts[: place + 1] <= pts)
    key = np.flatnonzero(is_before)[-1] if is_before.any() else 0
    for seconds in (0, 1, 4, 16):
        target = int(times.file_pts[key]) - int(seconds / times.tick)
        container.seek(target, stream=stream)
        packet = next((packet for packet in container.demux(stream) if packet.size), None)
        arrived = np.flatnonzero(times.file_pts == packet.pts) if packet else ()
        if len(arrived) and arrived[0] <= key:
            container.seek(target, stream=stream)
            return
    container.seek(-(2**40), stream=stream)


def _encode(
    path: Path, times: FrameTimes, excerpts: Sequence[Excerpt], seek: bool
) -> dict[Excerpt, str]:
    """Encode excerpts again. Returns the problems of those that cannot be cut.

    Raises:
        ClipError: the video cannot be decoded there.
    """
    waiting = deque(sorted(excerpts))
    active: dict[Excerpt, Generator] = {}
    problems: dict[Excerpt, str] = {}
    first, last = waiting[0].start, max(excerpt.end for excerpt in excerpts)
    rate = _fraction(times.rate)
    try:
        with closing(_read(path, times, first, last, seek)) as frames:
            for seconds, frame in frames:
                while waiting and waiting[0].start <= seconds + _HALF_TICK:
                    excerpt = waiting.popleft()
                    active[excerpt] = frame_writer(excerpt.target, rate)
                    next(active[excerpt])
                for excerpt in [e for e in active if seconds >= e.end - _HALF_TICK]:
                    _finish(active.pop(excerpt))
                for excerpt in list(active):
                    if frame.is_corrupt:
                        active.pop(excerpt).close()
                        problems[excerpt] = "damaged frames"
                    else:
                        active[excerpt].send(frame)
        for excerpt in list(active):
            _finish(active.pop(excerpt))
    except (*DECODING_ERRORS, ClipError) as error:
        if getattr(error, "errno", None) in FULL_DISK:
            raise OSError(error.errno, error.strerror, str(excerpts[0].target)) from None
        if (
            seek and len(times.pts) and len(excerpts) == 1
        ):  # another try, without relying on key frames
            for writer in active.values():
                writer.close()
            active.clear()
            return _encode(path, times, excerpts, seek=False)
        if isinstance(error, ClipError):
            raise
        raise ClipError(path, f"cannot be cut: {reason(error)}") from error
    finally:
        for writer in active.values():
            writer.close()
    return problems | dict.fromkeys(waiting, "holds no frame there")


def _finish(writer: Generator) -> None:
    """End a file: `None` stands for the end of its frames."""
    with suppress(StopIteration):
        writer.send(None)


def _copy(path: Path, times: FrameTimes, excerpt: Excerpt) -> bool:
    """Copy the packets of an excerpt, if the copy is exact. Returns whether it is."""
    wanted = times.select(excerpt.start, excerpt.end)
    if not len(wanted):
        return False
    (first,) = np.flatnonzero(times.file_pts == wanted[0])
    run = times.file_pts[first : first + len(wanted)]
    if not times.keys[first] or not np.array_equal(np.sort(run), wanted):
        return False
    try:
        with atomic(excerpt.target) as unfinished:
            _copy_packets(path, times, run.tolist(), unfinished)
            if not _are_equal(path, times, excerpt, unfinished):
                raise _InexactError
    except (*DECODING_ERRORS, ClipError, _InexactError):  # MP4 cannot hold the codec, for example
        return False
    return True


class _InexactError(Exception):
    """A copy does not show the same frames."""


def _copy_packets(path: Path, times: FrameTimes, run: Sequence[int], target: Path) -> None:
    """Write the packets with these time stamps, which are in the order of the file, as MP4."""
    waiting = deque(run)
    with open_video(path) as source, av.open(str(target.absolute()), "w") as container:
        stream = source.streams[times.stream]
        copied = container.add_stream_from_template(stream)
        _seek(source, stream, times, run[0])
        for packet in source.demux(stream):
            if not waiting:
                break
            if packet.pts != waiting[0] or not packet.size:
                continue
            waiting.popleft()
            packet.pts -= run[0]
            packet.dts = None if packet.dts is None else packet.dts - run[0]
            packet.stream = copied
            container.mux(packet)
    if waiting:
        raise _InexactError


def _are_equal(path: Path, times: FrameTimes, excerpt: Excerpt, copy: Path) -> bool:
    """Whether a file shows the frames of an excerpt, without any difference in their pixels."""
    copied = decode(copy, 0)
    with closing(_read(path, times, excerpt.start, excerpt.end, True)) as frames, closing(copied):
        for _, frame in frames:
            other = next(copied, None)
            if other is None or frame.is_corrupt or other.is_corrupt:
                return False
            if not np.array_equal(to_rgb(frame, None), to_rgb(other, None)):
                return False
        return next(copied, None) is None
