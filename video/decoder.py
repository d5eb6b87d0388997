"""Decoding chosen frames of a video file, or of a folder of images.

Frames are numbered by counting the decoder's output. The frame count in a header and the timestamps
are often wrong in real files: in some AVI files the timestamps run backwards, and sorting by them
would scramble the clip.

Of a usual H.264 file only the packets that the wanted frames depend on are decoded
(`_read_needed`), of any other file all packets (`_read_stream`). Both give the same frames. Damage
in packets that are not decoded is not noticed.

Of a folder of numbered images (frame_folder.py) only the chosen ones are opened (`_read_images`).
"""

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import av
import numpy as np

from utils.run_dir import sanitize
from video import h264
from video.container import (
    DECODING_ERRORS,
    ClipError,
    ColourError,
    count_packets,
    decode,
    decoding_stream,
    open_video,
    reason,
    require_file,
    to_rgb,
    video_streams,
)
from video.frame_folder import MAX_PIXELS, list_frames, read_image, read_metadata
from video.motion_vectors import VectorReader


def read_frames(
    path: str | Path,
    choose: Callable[[int], Sequence[int]],
    size: int | None = 224,
    stop_after: int | None = None,
    vectors: VectorReader | None = None,
) -> np.ndarray:
    """Decode the chosen frames of a file, or of a folder of images.

    The file's rotation is applied. The pixel aspect ratio is not, because the frames are squeezed
    into a square anyway. Memory is bounded by the chosen frames, whatever the length of the file.

    Args:
        choose: maps the number of frames in the file to the wanted frame numbers. It is called
            again if the number in the header was wrong, so it must be a pure function.
        size: frames are squeezed to `size` x `size` pixels during the colour conversion, by swscale
            (bilinear, with wider support when shrinking). None keeps the file's own size.
        stop_after: count at most this many frames.
        vectors: receives every frame that is kept, to read its motion vectors; not together with
            stop_after.

    Returns:
        `(len(choose(n)), size, size, 3)` uint8 RGB.

    Raises:
        ClipError: there is no such file, it holds no video, it breaks off before its end, or most
            of the wanted frames are damaged; of a folder: see `list_frames`, or a chosen image is
            damaged.
    """
    path = Path(path)
    if path.is_dir():
        return _read_images(path, choose, size, stop_after, vectors)
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
    """Decode every frame of a file or of a folder of images, to find damage anywhere in it.

    One frame of each size and colour format is converted to RGB; see clip_reader.check_clip.

    Returns:
        The problem in a few words, or None.
    """
    path = Path(path)
    count = damaged = 0
    converted = set()
    if path.is_dir():
        return _check_images(path)
    try:
        require_file(path)
        with open_video(path) as container:
            streams = video_streams(container, path)
        for index, _ in streams:
            for frame in decode(path, index):
                kind = frame.format.name, frame.colorspace, frame.color_range, frame.rotation
                if (kind := (*kind, frame.width, frame.height)) not in converted:
                    to_rgb(frame, 224)
                    converted.add(kind)
                count += 1
                damaged += frame.is_corrupt
            if count:
                break
    except ClipError as error:
        return error.reason
    except ColourError as error:
        return reason(error)
    except DECODING_ERRORS as error:
        return f"breaks off after {count} frames: {reason(error)}" if count else reason(error)
    if damaged:
        return f"{damaged} of {count} frames are damaged"
    return None if count else "holds no video frames"


def _read_images(
    folder: Path,
    choose: Callable[[int], Sequence[int]],
    size: int | None,
    stop_after: int | None,
    vectors: VectorReader | None,
) -> np.ndarray:
    """The chosen frames of a folder of images."""
    if vectors is not None:
        raise ClipError(folder, "a folder of images holds no motion vectors: use rgb+flow")
    images = list_frames(folder)
    first = read_metadata(folder / images[0])
    wanted = choose(min(len(images), stop_after or len(images)))
    kept: dict[int, np.ndarray] = {}
    for number in sorted(set(wanted)):
        image = read_image(folder / images[number], (first.width, first.height))
        if image.shape[:2] != (size, size):
            image = to_rgb(av.VideoFrame.from_ndarray(image, format="rgb24"), size)
        kept[number] = image
    if len({frame.shape for frame in kept.values()}) > 1:
        raise ClipError(folder, "images of mixed sizes: only some are turned by their EXIF data")
    return np.stack([kept[number] for number in wanted])  # (T, H, W, 3)


def _check_images(folder: Path) -> str | None:
    """The problem of a folder of images in a few words, or None."""
    try:
        images = list_frames(folder)
        first = read_metadata(folder / images[0])
    except ClipError as error:
        return error.reason
    problems = []
    for name in images:
        path = folder / name
        try:
            read_image(path, (first.width, first.height))
            if damage := _hidden_damage(path):
                problems.append(f"{sanitize(name)} is damaged: {damage}")
        except ClipError as error:
            problems.append(error.reason)
    if not problems:
        return None
    return f"{len(problems)} of {len(images)} images are damaged, the first one: {problems[0]}"


def _hidden_damage(path: Path) -> str | None:
    """What FFmpeg says of the compressed data of an image, or None.

    Where it is damaged, libjpeg shows grey or smeared blocks and says nothing, and Pillow does not
    compare the checksums of a PNG.
    """
    content = path.read_bytes()
    codec = "png" if content.startswith(b"\x89PNG") else "mjpeg"
    context = av.CodecContext.create(codec, "r")
    context.thread_count = 1
    context.options = {"err_detect": "crccheck+explode", "max_pixels": str(MAX_PIXELS)}
    try:
        context.decode(av.Packet(content))
    except av.error.InvalidDataError as error:
        return reason(error)
    except DECODING_ERRORS:  # a kind of image that FFmpeg does not know
        return None
    return None


def _read_needed(
    container: av.container.InputContainer,
    index: int,
    expected: int,
    choose: Callable[[int], Sequence[int]],
    size: int | None,
    vectors: VectorReader | None,
) -> np.ndarray | None:
    """The chosen frames of an H.264 stream, decoding only the packets they need; see h264.py.

    The result equals that of `_read_stream` bit for bit. It is None if anything is unusual, in the
    file or in the decoder's output; the caller then uses `_read_stream`.
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
            references = (p.kind is not h264.Kind.DISPOSABLE for p in pictures)
            vectors.begin(zip(numbers, references, strict=True))
            vectors.export(stream)
        number_of = {p.pts: number for p, number in zip(pictures, numbers, strict=True)}
        kept: dict[int, np.ndarray] = {}
        count, last_pts = 0, -math.inf
        for frame in _decode_needed(container, stream, pictures, decode):
            if frame.is_corrupt or frame.interlaced_frame or frame.pts <= last_pts:
                return None
            count, last_pts = count + 1, frame.pts
            number = number_of[frame.pts]
            if number in wanted:
                kept[number] = to_rgb(frame, size)
                if vectors is not None:
                    vectors.keep(number, frame)
    except (*DECODING_ERRORS, LookupError, TypeError):
        return None
    same_size = len({frame.shape for frame in kept.values()}) == 1
    if count != sum(decode) or kept.keys() != set(wanted) or not same_size:
        return None
    return np.stack([kept[number] for number in wanted])  # (T, H, W, 3)


def _pictures(
    container: av.container.InputContainer, stream: av.VideoStream
) -> list[h264.Picture] | None:
    """The pictures of an H.264 stream, or None for other streams and if anything is unusual."""
    context = stream.codec_context
    length_size = h264.length_size(context.extradata) if context.name == "h264" else None
    if length_size is None:
        return None
    pictures = []
    for packet in container.demux(stream):
        if not packet.size and packet.pts is None:  # the empty packet at the end
            continue
        # An edit list discards packets; with new extradata the stream changes in the middle.
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
    """Read the stream again from its start and decode the packets that are marked in `decode`.

    Raises:
        LookupError: the packets differ from those of the first reading.
    """
    container.seek(-(2**40), stream=stream)
    last = max(index for index, needed in enumerate(decode) if needed)
    skipping = False
    for index, packet in enumerate(container.demux(stream)):
        if packet.pts != pictures[index].pts:
            raise LookupError("seeking did not lead back to the start")
        if decode[index]:
            if skipping and pictures[index].kind is h264.Kind.IDR:
                yield from stream.codec_context.decode(None)  # frames of the group before it
                stream.codec_context.flush_buffers()
            yield from packet.decode()
        skipping = not decode[index]
        if index == last:
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
    """The chosen frames of one stream, or None if it has no frames.

    Frames are chosen by the frame count of the header. If decoding gives another count, they are
    chosen again and read in a second pass.
    """
    count = min(expected or count_packets(path, index), stop_after or math.inf)
    for _ in range(2):
        wanted = choose(count) if count else []
        kept, decoded, damaged = _keep(path, index, set(wanted), size, stop_after, vectors)
        if decoded == 0:
            return None
        if decoded == count or list(choose(decoded)) == list(wanted):
            if damaged > len(kept) / 2:  # such frames are grey, green or smeared
                raise ClipError(path, f"{damaged} of {len(kept)} frames are damaged or encrypted")
            if len({frame.shape for frame in kept.values()}) > 1:
                raise ClipError(path, "the frame size changes inside the clip: give a size")
            return np.stack([kept[number] for number in wanted])  # (T, H, W, 3)
        count = decoded
    raise ClipError(path, "the number of frames differs from one reading to the next")


def _keep(
    path: Path,
    index: int,
    wanted: set[int],
    size: int | None,
    stop_after: int | None,
    vectors: VectorReader | None,
) -> tuple[dict[int, np.ndarray], int, int]:
    """Decode a stream: its wanted frames, the number of all frames, and of damaged wanted ones."""
    kept: dict[int, np.ndarray] = {}
    count = damaged = 0
    try:
        for frame in decode(path, index) if vectors is None else vectors.decode(path, index):
            if count in wanted:
                kept[count] = to_rgb(frame, size)
                if vectors is not None:
                    vectors.keep(count, frame)
                damaged += frame.is_corrupt
            count += 1
            if count == stop_after:
                break
    except DECODING_ERRORS as error:
        if count == 0 or isinstance(error, ColourError):
            raise
        raise ClipError(path, f"breaks off after {count} frames: {reason(error)}") from error
    return kept, count, damaged
