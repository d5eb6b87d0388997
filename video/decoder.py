"""Reading and writing clips; video_file.py opens the files.

Frames are found by counting, never by a header's frame count or by looking up time stamps: real
files lie about both. Frames keep the order in which the decoder puts them out; some AVI files carry
time stamps that run backwards, and sorting by them scrambles the clip.

Of a usual H.264 file only what the wanted frames need is decoded (`_read_needed`), of any other
file everything (`_read_stream`): the frames are the same. What is not decoded is not checked
either: damage in a picture that nobody needs goes unnoticed.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import av
import numpy as np

from video import h264
from video.container import (
    DECODING_ERRORS,
    ClipError,
    count_packets,
    decode,
    decoding_stream,
    open_video,
    reason,
    require_file,
    to_rgb,
    video_streams,
)
from video.motion_vectors import VectorReader


def read_frames(
    path: str | Path,
    choose: Callable[[int], Sequence[int]],
    size: int | None = 224,
    stop_after: int | None = None,
    vectors: VectorReader | None = None,
) -> np.ndarray:
    """Decode the chosen frames of a file.

    Args:
        choose: maps the number of frames in the file to the wanted frame numbers; called again if
            the header's number turns out wrong, so it must be a pure function.
        size: frames are squeezed to `size` x `size` pixels while the colours are converted, by one
            resizer (swscale, bilinear with support widened when shrinking) for all of the project.
            None keeps the file's own size.
        stop_after: count no further than this many frames.
        vectors: is shown every frame that is kept, to take its motion; not with stop_after.

    Returns:
        `(len(choose(n)), size, size, 3)` uint8 RGB.

    Raises:
        ClipError: no such file, no video in it, it breaks off before its end, or most of the
            wanted frames are damaged.

    The file's rotation is applied; pixel shape is not, since the target is square anyway. Memory is
    bounded by the chosen frames, however many the file has.
    """
    path = Path(path)
    require_file(path)
    try:
        with open_video(path) as container:
            streams = video_streams(container, path)
            if len(streams) == 1 and stop_after is None:
                frames = _read_needed(container, *streams[0], choose, size, vectors)
                if frames is not None:
                    return frames
        for stream, expected in streams:
            frames = _read_stream(path, stream, expected, choose, size, stop_after, vectors)
            if frames is not None:
                return frames
    except DECODING_ERRORS as error:
        raise ClipError(path, f"cannot be read: {reason(error)}") from error
    raise ClipError(path, "holds no video frames")


def check_video(path: str | Path) -> str | None:
    """Decode every frame of a file, also those that no sampling asks for.

    Returns:
        What is wrong with it in a few words, or None.
    """
    path = Path(path)
    found = damaged = 0
    try:
        require_file(path)
        with open_video(path) as container:
            streams = video_streams(container, path)
        for index, _ in streams:
            for frame in decode(path, index):
                found += 1
                damaged += frame.is_corrupt
            if found:
                break
    except ClipError as error:
        return error.reason
    except DECODING_ERRORS as error:
        return f"breaks off after {found} frames: {reason(error)}" if found else reason(error)
    if damaged:
        return f"{damaged} of {found} frames are damaged"
    return None if found else "holds no video frames"


def _read_needed(
    container: av.container.InputContainer,
    index: int,
    expected: int,
    choose: Callable[[int], Sequence[int]],
    size: int | None,
    vectors: VectorReader | None,
) -> np.ndarray | None:
    """The chosen frames of an H.264 stream, decoding only what they need; see h264.py.

    Equal to `_read_stream` bit for bit. None wherever anything is unusual, in the file or in what
    the decoder puts out: then that one has a look at it.
    """
    try:
        stream = decoding_stream(container, index)
        pictures = _pictures(container, stream)
        if not pictures or expected not in (0, len(pictures)):
            return None
        numbers = h264.frame_numbers(pictures)
        if numbers is None:
            return None
        wanted = list(choose(len(pictures)))
        decode = h264.needed(pictures, numbers, wanted)
        if vectors is not None:
            kinds = (one.kind for one in pictures)
            vectors.begin(zip(numbers, (k is not h264.Kind.DISPOSABLE for k in kinds), strict=True))
            vectors.export(stream)
        by_pts = {one.pts: number for one, number in zip(pictures, numbers, strict=True)}
        kept: dict[int, np.ndarray] = {}
        seen, latest = 0, -math.inf
        for frame in _decode_needed(container, stream, pictures, decode):
            if frame.is_corrupt or frame.interlaced_frame or frame.pts <= latest:
                return None
            seen, latest = seen + 1, frame.pts
            if by_pts[frame.pts] in wanted:
                kept[by_pts[frame.pts]] = to_rgb(frame, size)
                if vectors is not None:
                    vectors.keep(by_pts[frame.pts], frame)
    except (*DECODING_ERRORS, LookupError, TypeError):
        return None
    same_size = len({frame.shape for frame in kept.values()}) == 1
    if seen != sum(decode) or kept.keys() != set(wanted) or not same_size:
        return None
    return np.stack([kept[number] for number in wanted])  # (T, H, W, 3)


def _pictures(
    container: av.container.InputContainer, stream: av.VideoStream
) -> list[h264.Picture] | None:
    """The packets of an H.264 stream, or None if it is none or there is anything unusual."""
    context = stream.codec_context
    length_size = h264.length_size(context.extradata) if context.name == "h264" else None
    if length_size is None:
        return None
    pictures = []
    for packet in container.demux(stream):
        if not packet.size and packet.pts is None:  # the end
            continue
        # Discarded: an edit list cuts it out. New extradata: the stream changes in the middle.
        unusual = packet.is_discard or packet.is_corrupt or packet.has_sidedata("new_extradata")
        if unusual or packet.pts is None:
            return None
        picture = h264.picture(packet.pts, memoryview(packet), length_size)
        if picture is None:
            return None
        pictures.append(picture)
    return pictures


def _decode_needed(
    container: av.container.InputContainer,
    stream: av.VideoStream,
    pictures: Sequence[h264.Picture],
    decode: Sequence[bool],
) -> Iterator[av.VideoFrame]:
    """Read the stream again from its start and decode the packets that `decode` marks.

    Raises:
        LookupError: its packets are not the same this time.
    """
    container.seek(-(2**40), stream=stream)
    last = max(place for place, needed in enumerate(decode) if needed)
    skipping = False
    for place, packet in enumerate(container.demux(stream)):
        if packet.pts != pictures[place].pts:
            raise LookupError("seeking did not lead back to the start")
        if decode[place]:
            if skipping and pictures[place].kind is h264.Kind.IDR:
                yield from stream.codec_context.decode(None)  # what the group before it still holds
                stream.codec_context.flush_buffers()
            yield from packet.decode()
        skipping = not decode[place]
        if place == last:
            break
    yield from stream.codec_context.decode(None)


def _read_stream(
    path: Path,
    index: int,
    expected: int,
    choose: Callable[[int], Sequence[int]],
    size: int | None,
    stop_after: int | None,
    vectors: VectorReader | None,
) -> np.ndarray | None:
    """The chosen frames of one stream, or None where it has none.

    The header's frame count is only a guess at what to keep while decoding. The pass counts what
    really came; where the guess was wrong the frames are chosen anew and read in a second pass.
    """
    count = min(expected or count_packets(path, index), stop_after or math.inf)
    for _ in range(2):
        wanted = choose(count) if count else []
        kept, found, damaged = _keep(path, index, set(wanted), size, stop_after, vectors)
        if found == 0:
            return None
        if found == count or list(choose(found)) == list(wanted):
            if damaged > len(kept) / 2:  # the decoder filled them in: grey, green or smeared
                raise ClipError(path, f"{damaged} of {len(kept)} frames are damaged or encrypted")
            if len({frame.shape for frame in kept.values()}) > 1:
                raise ClipError(path, "the frame size changes inside the clip: give a size")
            return np.stack([kept[number] for number in wanted])  # (T, H, W, 3)
        count = found
    raise ClipError(path, "the number of frames differs from one reading to the next")


def _keep(
    path: Path,
    index: int,
    wanted: set[int],
    size: int | None,
    stop_after: int | None,
    vectors: VectorReader | None,
) -> tuple[dict[int, np.ndarray], int, int]:
    """Decode a stream: the wanted frames, how many it has, how many wanted ones are damaged."""
    kept: dict[int, np.ndarray] = {}
    found = damaged = 0
    try:
        for frame in decode(path, index) if vectors is None else vectors.decode(path, index):
            if found in wanted:
                kept[found] = to_rgb(frame, size)
                if vectors is not None:
                    vectors.keep(found, frame)
                damaged += frame.is_corrupt
            found += 1
            if found == stop_after:
                break
    except DECODING_ERRORS as error:
        if found == 0:
            raise
        raise ClipError(path, f"breaks off after {found} frames: {reason(error)}") from error
    return kept, found, damaged
