"""Opening video files, reading their metadata, and converting decoded frames to RGB."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
from av.stream import Disposition
from av.video.reformatter import Interpolation

from utils.errors import ClipError
from video.frame_folder import MAX_PIXELS, list_frames, read_metadata

LUMA = (0.299, 0.587, 0.114)
"""weights of red, green and blue in the brightness of a pixel: ITU-R BT.601, as in torchvision"""

# Frames per second above which time stamps alone are not believed. Milliseconds round 240 up.
MAX_RATE = 250.0

# Container formats that are opened. Playlists (HLS, DASH, concat, SDP) are left out, because the
# reader would open any file or address that they name.
FORMATS = (
    "mov,mp4,3gp,matroska,webm,avi,asf,flv,mpegts,mpeg,mpegvideo,ivf,ogg,gif,apng,h263,h264,hevc,"
    "m4v,obu,mjpeg,dv,gxf,mxf,nut,rm,swf,vob,wtv,yuv4mpegpipe"
)

DECODING_ERRORS = (av.FFmpegError, ValueError, MemoryError)


class ColourError(ValueError):
    """The colours of a frame cannot be converted to RGB."""


class VideoMetadata(NamedTuple):
    """Metadata of a file's first video stream, or of a folder of images."""

    frames: int
    """number of non-empty packets, or of images"""
    seconds: float
    """duration without pauses, `frames / rate`; 0 if the rate is unknown"""
    rate: float
    """frames per second, see `frame_rate`; 0 if unknown, as for every folder of images"""
    width: int
    height: int
    codec: str


# A clip with metadata that is not UTF-8 (old cameras, other languages) can still be read. PyAV
# decodes the metadata when it opens a file and needs this option up to version 18.
TOLERANT = {"metadata_errors": "replace"} if int(av.__version__.split(".")[0]) < 19 else {}


def open_video(path: Path) -> av.container.InputContainer:
    """Open a file; formats and protocols that can reach other files are switched off."""
    # With the absolute path "concat:a|b" or "http://x" in a manifest stays a file name.
    options = {"format_whitelist": FORMATS, "protocol_whitelist": "file"}
    return av.open(str(path.absolute()), options=options, **TOLERANT)


def video_streams(container: av.container.InputContainer, path: Path) -> list[tuple[int, int]]:
    """(stream index, number of frames in the header) of each video stream that is no cover image.

    Raises:
        ClipError: there is no video stream, or none with a known codec.
    """
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
    """The stream with this index, set up for decoding on one thread.

    FFmpeg's thread pools can deadlock beside those of PyTorch (PyAV issues 1849, 1861 and 1962),
    and with several worker processes they gain nothing.
    """
    stream = container.streams[index]
    stream.thread_type = "NONE"
    stream.codec_context.thread_count = 1
    stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}
    return stream


def decode(path: Path, index: int) -> Iterator[av.VideoFrame]:
    """Yield all frames of stream `index` in the order in which the decoder returns them."""
    with open_video(path) as container:
        yield from container.decode(decoding_stream(container, index))


def probe(path: Path) -> VideoMetadata:
    """The metadata of a file's first video stream, or of a folder of numbered images.

    Packets or images are counted; nothing is decoded.

    Raises:
        ClipError: there is no such file, it holds no video, or it breaks off; or see `list_frames`.
    """
    if path.is_dir():
        images = list_frames(path)
        return VideoMetadata(len(images), 0.0, 0.0, *read_metadata(path / images[0]))
    require_file(path)
    try:
        with open_video(path) as container:
            index, _ = video_streams(container, path)[0]
            stream = container.streams[index]
            context = stream.codec_context
            stamps = [(p.pts, p.dts) for p in container.demux(stream) if p.size]
            rate, _ = frame_rate(stream, stamps, duration(container, stream))
            seconds = len(stamps) / rate if rate else 0.0
            size = context.width, context.height
            return VideoMetadata(len(stamps), seconds, rate, *size, context.name)
    except DECODING_ERRORS as error:
        raise ClipError(path, f"cannot be read: {reason(error)}") from error


def duration(container: av.container.InputContainer, stream: av.VideoStream) -> float:
    """Seconds of a stream, or else of its file, according to the header; 0 if it does not say."""
    if stream.duration and stream.time_base:
        return max(0.0, float(stream.duration * stream.time_base))
    return max(0.0, (container.duration or 0) / av.time_base)


def longest_step(interval: float, least: float = 1.0) -> float:
    """Seconds from one frame to the next above which something is missing between them.

    Args:
        interval: usual seconds between two frames.
        least: least result, for videos whose frame rate varies.
    """
    return max(least, 5 * interval)


def frame_rate(
    stream: av.VideoStream,
    stamps: Sequence[tuple[int | None, int | None]],
    seconds: float = 0.0,
    is_whole: bool = True,
) -> tuple[float, str]:
    """Mean frames per second of a stream outside pauses, and a doubt about its time stamps.

    The header is believed only where the packets agree. Where it holds no rate, FFmpeg takes the
    time base for one: a browser's WebM would have 1000 frames per second, and raw DV 60000.

    Args:
        stamps: presentation and decoding time of each packet, in units of the stream's time base.
        seconds: duration of the stream; 0: unknown.
        is_whole: whether these are all packets of the stream, and not only its first ones.

    Returns:
        The rate, 0 if the packets do not tell it; and what the time stamps say, if that is not
        believed (else an empty text).
    """
    pts, dts = ([row[k] for row in stamps if row[k] is not None] for k in (0, 1))
    known = max(pts, dts, key=len)  # some containers store only one of the two, or leave some out
    if not is_whole:
        # Later packets may be shown between these ones (B-frames), but none before the newest dts.
        known = [time for time in known if time <= max(dts, default=time)]
    tick = float(stream.time_base)
    rate = 0.0
    if len(known) > max(1, len(stamps) / 2):
        steps = np.diff(np.sort(known)) * tick
        steps = steps[steps <= longest_step(float(np.median(steps)))]
        rate = len(steps) / float(steps.sum()) if steps.any() else 0.0
    mean = len(stamps) / seconds if seconds and is_whole else 0.0
    headers = [float(header) for header in (stream.average_rate, stream.guessed_rate) if header]
    doubt = ""
    # Cameras for slow motion are this fast, and so are wrong stamps: the whole file must agree. One
    # frame per tick of a clock of milliseconds is the time base again. (AVI's base is its rate.)
    if rate > MAX_RATE and (
        not any(_are_near(header, rate) for header in headers)
        or (mean and not _are_near(mean, rate, 0.1))
        or (rate > 900 and _are_near(1 / tick, rate))
    ):
        doubt = f"its time stamps say {rate:.4g} frames per second, and nothing else confirms that"
        rate = 0.0
    if not rate and mean <= MAX_RATE:
        rate = mean
    agreeing = (header for header in headers if _are_near(header, rate))
    return min(agreeing, key=lambda header: abs(header - rate), default=rate), doubt


def _are_near(rate: float, reference: float, tolerance: float = 0.03) -> bool:
    """Whether two rates are one: milliseconds, or the last frame's length, change one a little."""
    return abs(rate - reference) <= tolerance * reference


def count_packets(path: Path, index: int) -> int:
    """The number of non-empty packets of stream `index`."""
    with open_video(path) as container:
        return sum(1 for packet in container.demux(container.streams[index]) if packet.size)


def require_file(path: Path) -> None:
    """Raise a ClipError unless the path is a regular file. Opening a pipe would block for ever."""
    if not path.is_file():
        raise ClipError(path, "no such file" if not path.exists() else "not a file")


def reason(error: BaseException) -> str:
    """FFmpeg's error message without its number and the path, which the caller adds."""
    message = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return message[0].lower() + message[1:]


def to_rgb(frame: av.VideoFrame, size: int | tuple[int, int] | None) -> np.ndarray:
    """A decoded frame as `(H, W, 3)` uint8 RGB, upright.

    The frame's own colour matrix and range are used.

    Args:
        size: side of the square that the frame is squeezed to; or (width, height), before the
            frame is rotated upright; or None to keep its size.

    Raises:
        ColourError: swscale does not know the frame's colour matrix.
    """
    width, height = (size, size) if isinstance(size, int) else size or (frame.width, frame.height)
    try:
        rgb = frame.reformat(
            width=width,
            height=height,
            format="rgb24",
            interpolation=Interpolation.BILINEAR,
            src_colorspace=frame.colorspace,
            src_color_range=frame.color_range,
            threads=1,
        ).to_ndarray()
    except av.FFmpegError as error:
        if isinstance(error, MemoryError):
            raise
        raise ColourError(
            f"its colours cannot be converted to RGB ({frame.format.name}, matrix "
            f"{frame.colorspace}: {reason(error)}): export it with the colour matrix BT.709"
        ) from error
    # rotation is counter-clockwise in degrees; np.rot90 takes the number of quarter turns
    return np.rot90(rgb, round(frame.rotation / 90)) if frame.rotation else rgb
