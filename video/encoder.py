"""Reading and writing clips; video_file.py opens the files.

Frames are found by counting, never by a header's frame count or by looking up time stamps: real
files lie about both. Frames keep the order in which the decoder puts them out; some AVI files carry
time stamps that run backwards, and sorting by them scrambles the clip.

Of a usual H.264 file only what the wanted frames need is decoded (`_read_needed`), of any other
file everything (`_read_stream`): the frames are the same. What is not decoded is not checked
either: damage in a picture that nobody needs goes unnoticed.
"""

import io
from collections.abc import Iterable
from pathlib import Path

import av
import numpy as np

from utils.files import atomic
from video.container import decoding_stream, to_rgb


def write_video(
    path: str | Path,
    frames: Iterable[np.ndarray],
    rate: int = 25,
    lossless: bool = False,
    group: int = 250,
) -> None:
    """Write `(H, W, 3)` uint8 RGB frames as H.264; `path` appears only when it is complete.

    `lossless` keeps RGB exactly (libx264rgb), for tests; otherwise H and W must be even (4:2:0).
    `group` is the largest distance of keyframes.
    """
    crf = 0 if lossless else 20
    with atomic(path) as unfinished, av.open(str(unfinished.absolute()), "w") as container:
        _encode(container, frames, rate, crf, group, lossless)


def recompress(frames: np.ndarray, crf: int) -> np.ndarray:
    """`(T, H, W, 3)` uint8 RGB after H.264 with this crf (0 to 51, larger is worse) and back."""
    height, width = frames.shape[1:3]
    even = np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), "edge")  # 4:2:0
    file = io.BytesIO()
    with av.open(file, "w", format="matroska") as container:
        _encode(container, even, crf=crf)
    file.seek(0)
    with av.open(file) as container:
        back = [to_rgb(frame, None) for frame in container.decode(decoding_stream(container, 0))]
    return np.stack(back)[:, :height, :width]  # (T, H, W, 3)


def _encode(
    container: av.container.OutputContainer,
    frames: Iterable[np.ndarray],
    rate: int = 25,
    crf: int = 20,
    group: int = 250,
    rgb: bool = False,
) -> None:
    """Encode frames as H.264, on one thread: the same frames always give the same bytes."""
    codec, pixels = ("libx264rgb", "rgb24") if rgb else ("libx264", "yuv420p")
    options = {"crf": str(crf), "preset": "veryfast", "threads": "1", "g": str(group)}
    # Otherwise x264's AVX-512 code is not deterministic: the same frames gave up to 5 streams.
    options["x264-params"] = "cpu-independent=1"
    stream = container.add_stream(codec, rate=rate, options=options)
    stream.pix_fmt = pixels
    for number, frame in enumerate(frames):
        if number == 0:
            stream.height, stream.width = frame.shape[:2]
        picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
        container.mux(stream.encode(picture))
    container.mux(stream.encode(None))
