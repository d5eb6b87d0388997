"""Writing videos as H.264, and compressing frames with it."""

import io
from collections.abc import Generator, Iterable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from utils.files import atomic
from video.container import decoding_stream, to_rgb

_HIGH = 17  # constant rate factor that can hardly be told from the original


def write_video(
    path: str | Path,
    frames: Iterable[np.ndarray],
    rate: int | Fraction = 25,
    lossless: bool = False,
    group: int = 250,
) -> None:
    """Write `(H, W, 3)` uint8 RGB frames as H.264; `path` appears only when it is complete.

    Args:
        rate: frames per second.
        lossless: keep RGB exactly (libx264rgb), for tests. Otherwise H and W must be even (4:2:0).
        group: largest distance between keyframes.
    """
    crf = 0 if lossless else 20
    with atomic(path) as unfinished, av.open(str(unfinished.absolute()), "w") as container:
        _encode(container, frames, rate, crf, group, lossless)


def frame_writer(path: str | Path, rate: Fraction) -> Generator[None, av.VideoFrame | None, None]:
    """Writes decoded frames as H.264 of high quality: a generator that receives them.

    The frames keep their size, their distances in time and their colours (matrix and range); they
    are turned upright. `path` appears only when `None` is sent for the end.

    Args:
        rate: usual frames per second.
    """
    with atomic(path) as unfinished, av.open(str(unfinished.absolute()), "w") as container:
        frame = yield
        first, tick, stream = frame.pts, frame.time_base, None
        while frame is not None:
            pts = frame.pts
            is_even = not (frame.width % 2 or frame.height % 2)
            if frame.rotation or not is_even or frame.format.name not in ("yuv420p", "yuvj420p"):
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(to_rgb(frame, None)))
            if stream is None:
                stream = container.add_stream("libx264", rate=rate, options=_options(_HIGH, 250))
                stream.width, stream.height = frame.width, frame.height
                # 4:2:0 halves the sides. The colours of RGB are converted as BT.601.
                stream.pix_fmt = "yuv420p" if is_even else "yuv444p"
                context = stream.codec_context
                context.time_base = tick
                if frame.format.name != "rgb24":
                    stream.pix_fmt = frame.format.name
                    context.color_range, context.colorspace = frame.color_range, frame.colorspace
            if (frame.width, frame.height) != (stream.width, stream.height):
                raise ValueError("the frame size changes")
            frame.pts, frame.time_base = pts - first, tick
            frame.pict_type = 0  # the encoder chooses its own key frames
            container.mux(stream.encode(frame))
            frame.pts = pts  # other writers may receive the same frame
            frame = yield
        container.mux(stream.encode(None))


def recompress(frames: np.ndarray, crf: int) -> np.ndarray:
    """Compress frames with H.264 and decode them again: `(T, H, W, 3)` uint8 RGB to the same.

    Args:
        crf: constant rate factor, 0 to 51; a larger one is worse.
    """
    height, width = frames.shape[1:3]
    even = np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), "edge")  # 4:2:0
    file = io.BytesIO()
    with av.open(file, "w", format="matroska") as container:
        _encode(container, even, crf=crf)
    file.seek(0)
    with av.open(file) as container:
        decoded = container.decode(decoding_stream(container, 0))
        result = [to_rgb(frame, None) for frame in decoded]
    return np.stack(result)[:, :height, :width]  # (T, H, W, 3)


def _encode(
    container: av.container.OutputContainer,
    frames: Iterable[np.ndarray],
    rate: int | Fraction = 25,
    crf: int = 20,
    group: int = 250,
    rgb: bool = False,
) -> None:
    """Encode frames as H.264 on one thread, so that the same frames always give the same bytes."""
    codec, pixels = ("libx264rgb", "rgb24") if rgb else ("libx264", "yuv420p")
    stream = container.add_stream(codec, rate=rate, options=_options(crf, group))
    stream.pix_fmt = pixels
    for number, frame in enumerate(frames):
        if number == 0:
            stream.height, stream.width = frame.shape[:2]
        video_frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
        container.mux(stream.encode(video_frame))
    container.mux(stream.encode(None))


def _options(crf: int, group: int) -> dict[str, str]:
    """The options of x264."""
    options = {"crf": str(crf), "preset": "veryfast", "threads": "1", "g": str(group)}
    # x264's AVX-512 code is not deterministic: without this, the same frames gave up to 5 streams.
    return options | {"x264-params": "cpu-independent=1"}
