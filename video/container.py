"""Opening video files, and what can be told of one without decoding it.

Besides video.py, which reads the frames, motion_vectors.py and peers.py the only module that
imports av.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
from av.stream import Disposition
from av.video.reformatter import Interpolation

from utils.errors import UserError

# A frame this large is a decompression bomb, not an endoscope: 8K is 33 million pixels.
MAX_PIXELS = 8192 * 4608

# Containers that hold video. Playlists (HLS, DASH, concat, SDP) are left out: they make the reader
# open whatever other file or address they name.
FORMATS = (
    "mov,mp4,3gp,matroska,webm,avi,asf,flv,mpegts,mpeg,mpegvideo,ivf,ogg,gif,apng,h263,h264,hevc,"
    "m4v,obu,mjpeg,dv,gxf,mxf,nut,rm,swf,vob,wtv,yuv4mpegpipe"
)

DECODING_ERRORS = (av.FFmpegError, ValueError, MemoryError)


class ClipError(UserError):
    """A clip file that cannot be read, with the path and the reason."""

    def __init__(self, path: str | Path, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path = str(path)
        self.reason = reason

    def __reduce__(self) -> tuple:  # exceptions cross from a DataLoader worker as pickles
        return type(self), (self.path, self.reason)


class VideoFacts(NamedTuple):
    """What a file says of its video."""

    frames: int
    """packets with a picture, counted"""
    seconds: float
    """`frames / rate`"""
    rate: float
    """frames a second on average, 0 if unknown"""
    width: int
    height: int
    codec: str


# Non-UTF-8 metadata (old cameras, other languages) is no reason to refuse a clip. PyAV decodes it
# when opening and must be told so; since 19 the option is gone, and nothing needs it.
TOLERANT = {"metadata_errors": "replace"} if int(av.__version__.split(".")[0]) < 19 else {}


def open_video(path: Path) -> av.container.InputContainer:
    # The absolute path: "concat:a|b" or "http://x" in a manifest stays a file name.
    options = {"format_whitelist": FORMATS, "protocol_whitelist": "file"}
    return av.open(str(path.absolute()), options=options, **TOLERANT)


def video_streams(container: av.container.InputContainer, path: Path) -> list[tuple[int, int]]:
    """(number, expected frames) of the file's video streams, cover pictures left out."""
    streams = [
        stream
        for stream in container.streams.video
        if not stream.disposition & Disposition.attached_pic
    ]
    known = [stream for stream in streams if stream.codec_context is not None]
    if not streams:
        raise ClipError(path, "holds no video stream")
    if not known:
        raise ClipError(path, "holds video of an unknown codec only")
    return [(stream.index, stream.frames) for stream in known]


def decoding_stream(container: av.container.InputContainer, index: int) -> av.VideoStream:
    """A stream, set to be decoded on one thread.

    One thread a worker: FFmpeg's thread pools beside PyTorch's can deadlock (PyAV issues 1849, 1861
    and 1962), and with several workers they gain nothing.
    """
    stream = container.streams[index]
    stream.thread_type = "NONE"
    stream.codec_context.thread_count = 1
    stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}
    return stream


def decode(path: Path, index: int) -> Iterator[av.VideoFrame]:
    """All frames of stream `index` in decode order."""
    with open_video(path) as container:
        yield from container.decode(decoding_stream(container, index))


def probe(path: Path) -> VideoFacts:
    """What a file says of its first video stream; its packets are counted, nothing is decoded.

    Raises:
        ClipError: no such file, no video in it, or it breaks off.
    """
    require_file(path)
    try:
        with open_video(path) as container:
            index, _ = video_streams(container, path)[0]
            stream = container.streams[index]
            context = stream.codec_context
            rate = float(stream.average_rate or stream.guessed_rate or 0)
            frames = sum(1 for packet in container.demux(stream) if packet.size)
            size = context.width, context.height
            return VideoFacts(frames, frames / rate if rate else 0.0, rate, *size, context.name)
    except DECODING_ERRORS as error:
        raise ClipError(path, f"cannot be read: {reason(error)}") from error


def count_packets(path: Path, index: int) -> int:
    with open_video(path) as container:
        return sum(1 for packet in container.demux(container.streams[index]) if packet.size)


def require_file(path: Path) -> None:
    """Raise a ClipError unless there is a file; also keeps out pipes, which block for ever."""
    if not path.is_file():
        raise ClipError(path, "no such file" if not path.exists() else "not a file")


def reason(error: BaseException) -> str:
    """FFmpeg's words without its number and without the path, which the caller names already."""
    words = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return words[0].lower() + words[1:]


def to_rgb(frame: av.VideoFrame, size: int | tuple[int, int] | None) -> np.ndarray:
    """`(H, W, 3)` uint8 RGB, upright. The frame's own colour matrix and range are used.

    Args:
        size: of a side of the square that it is squeezed to, or (width, height) before it is turned
            upright, or None: as it is.
    """
    width, height = (size, size) if isinstance(size, int) else size or (frame.width, frame.height)
    rgb = frame.reformat(
        width=width,
        height=height,
        format="rgb24",
        interpolation=Interpolation.BILINEAR,
        src_colorspace=frame.colorspace,
        src_color_range=frame.color_range,
        threads=1,
    ).to_ndarray()
    # rotation is in degrees counter-clockwise, as np.rot90 counts quarters
    return np.rot90(rgb, round(frame.rotation / 90)) if frame.rotation else rgb
