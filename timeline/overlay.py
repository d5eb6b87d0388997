"""overlay.mp4: a recorded video with its predictions and its timeline below the picture.

The band below hides nothing of the picture. Where the video is unreadable or was taken outside the
patient, the picture is replaced by an empty one.
"""

import bisect
import itertools
import math
from collections.abc import Iterator
from fractions import Fraction
from functools import lru_cache
from pathlib import Path

import numpy as np
from matplotlib.font_manager import FontProperties, findfont
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from clips.manifest import OUT_OF_BODY, UNCERTAIN, UNREADABLE
from evaluation.plots import COLOURS, drawable_text
from timeline.output import format_minutes
from timeline.segments import Segment, Timeline
from timeline.sources import Frame, FrameSource
from utils.files import try_write
from utils.interrupt import Interrupt, Interrupted
from utils.text_table import shorten
from video.encoder import write_video

MIN_WIDTH = 320  # pixels; a smaller picture is enlarged, so that the text has room

EVERY_FRAME = 1e6
"""frames per second of a source for the overlay: more than any video has, so none is left out"""

_BACKGROUND, _INK = (24, 27, 31), (255, 255, 255)
_EMPTY_PICTURE = 40  # the grey of a picture that is not shown

# The style of labels that are no class: a colour and a pattern, as on timeline.html.
_MARKS = {
    UNCERTAIN: ("#c3c9d1", "diagonals"),
    UNREADABLE: ("#3d4650", "crosses"),
    OUT_OF_BODY: ("#8a939e", "dots"),
}
_PATTERNS = ("plain", "bars", "columns", "squares")  # one per round through the colours


def write_overlay(
    path: Path,
    source: FrameSource,
    timeline: Timeline,
    fps: float,
    interrupt: Interrupt | None = None,
) -> list[str]:
    """Write the video with its timeline; `path` appears only when it is complete.

    Args:
        source: the video again, with EVERY_FRAME and frames of their own size.
        fps: frames per second that the model was shown. What an out-of-body detector says about
            one of these frames holds for the frames around it.
        interrupt: request to stop; there is then no file.

    Returns:
        Why it could not be written, as a list of one line; an empty list if it could.
    """

    def write(path: Path) -> None:
        try:
            frames, rate = overlay_frames(source, timeline, fps, interrupt)
            write_video(path, frames, rate)
        except Interrupted:
            pass  # the caller sees the interrupt too

    problem = try_write(path, write)
    return [problem] * bool(problem)


def overlay_frames(
    source: FrameSource, timeline: Timeline, fps: float, interrupt: Interrupt | None = None
) -> tuple[Iterator[np.ndarray], Fraction]:
    """The frames of the overlay `(H, W, 3)`, uint8 RGB, one after another, and their rate.

    The rate is that of the video and constant: where frames are missing, the last one is repeated.
    """
    frames = iter(source)
    first = next(frames)  # from here on the source knows its rate
    rate = Fraction(source.rate or 25).limit_denominator(1001)
    shown = _in_step(itertools.chain([first], frames), rate, timeline.duration)
    return _draw(shown, timeline, rate, 1 / fps + 1 / rate, interrupt), rate


def _in_step(frames: Iterator[Frame], rate: Fraction, duration: float) -> Iterator[Frame | None]:
    """The frame to show at each multiple of 1/rate, None before the first one.

    It ends with the last frame: the rest of a file that breaks off has no picture.
    """
    shown, step = None, 0
    for frame in frames:
        while (step + 0.5) / rate < frame.time and step / rate < duration:
            yield shown
            step += 1
        shown = frame
    if step / rate < duration:
        yield shown


def _draw(
    frames: Iterator[Frame | None],
    timeline: Timeline,
    rate: Fraction,
    margin: float,
    interrupt: Interrupt | None,
) -> Iterator[np.ndarray]:
    """The pictures with the band below them."""
    band = shape = empty = None
    # Between the last frame that the detector saw inside and the first one outside nobody knows.
    hidden = [(s.start - margin, s.end) for s in timeline.segments if s.label == OUT_OF_BODY]
    waiting = 0  # frames before the first one that can be read
    bar = tqdm(desc="overlay.mp4", total=round(timeline.duration * rate), unit="frame", leave=False)
    with bar:
        for step, frame in enumerate(frames):
            if interrupt and interrupt.signal:
                raise Interrupted
            if frame is None:
                waiting += 1
                continue
            if band is None:
                shape = _canvas(frame.image).shape
                band = Band(timeline, shape[1], shape[0])
                empty = np.full(shape, _EMPTY_PICTURE, np.uint8)
                for earlier in range(waiting):
                    yield band.below(empty, float(earlier / rate))
            seconds = float(step / rate)
            is_hidden = band.label(seconds) in (OUT_OF_BODY, UNREADABLE) or any(
                start <= time < end for start, end in hidden for time in (seconds, frame.time)
            )
            picture = empty if is_hidden else _fit(_canvas(frame.image), shape)
            yield band.below(picture, seconds)
            bar.update()


def _canvas(image: np.ndarray) -> np.ndarray:
    """A frame, enlarged if it is narrow, with even sides: H.264 stores colours for 2 x 2 pixels."""
    factor = math.ceil(MIN_WIDTH / image.shape[1])
    if factor > 1:
        image = image.repeat(factor, axis=0).repeat(factor, axis=1)
    height, width = image.shape[:2]
    return np.pad(image, ((0, height % 2), (0, width % 2), (0, 0)), "edge")


def _fit(image: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """A frame in the shape of the first one; some recordings change theirs in between."""
    if image.shape == shape:
        return image
    return np.asarray(Image.fromarray(image).resize((shape[1], shape[0])))


class Band:
    """The band below the picture: the label, its confidence, the time, and the timeline.

    Args:
        width, height: of the picture in pixels.
    """

    def __init__(self, timeline: Timeline, width: int, height: int) -> None:
        self.timeline = timeline
        self.width = width
        self.text_size = max(11, round(min(width, 1.6 * height) / 44))
        """height of the text in pixels"""
        self.caption_height = 2 * round(0.85 * self.text_size)
        self.strip_height = 2 * round(0.6 * self.text_size)
        self._line = max(1, self.text_size // 10)  # half the width of the playhead
        self._starts = [segment.start for segment in timeline.segments]
        self._font = ImageFont.truetype(findfont(FontProperties()), self.text_size)
        self._strip = self._draw_strip()
        self._caption = lru_cache(maxsize=2)(self._draw_caption)

    @property
    def height(self) -> int:
        return self.caption_height + self.strip_height

    def label(self, seconds: float) -> str:
        """The label at a time."""
        return self.timeline.segments[self._index(seconds)].label

    def column(self, seconds: float) -> int:
        """The column of pixels that a time has on the strip."""
        fraction = seconds / max(self.timeline.duration, 1e-9)
        return min(self.width - 1, int(fraction * self.width))

    def below(self, picture: np.ndarray, seconds: float) -> np.ndarray:
        """The picture with the band below it, `(H + height, W, 3)`."""
        strip, at = self._strip.copy(), self.column(seconds)
        for colour, half in ((_BACKGROUND, 2 * self._line + 1), (_INK, self._line)):
            strip[:, max(0, at - half) : at + half + 1] = colour
        return np.concatenate((picture, self._caption(self._index(seconds), int(seconds)), strip))

    def _index(self, seconds: float) -> int:
        return max(0, bisect.bisect_right(self._starts, seconds + 1e-6) - 1)

    def _draw_strip(self) -> np.ndarray:
        strip = np.full((self.strip_height, self.width, 3), _BACKGROUND, np.uint8)
        for segment in self.timeline.segments:
            left, right = self.column(segment.start), self.column(segment.end)
            right = self.width if segment.end >= self.timeline.duration else max(right, left + 1)
            strip[:, left:right] = self._fill(segment.label)[:, left:right]
        return strip

    @lru_cache(maxsize=64)  # noqa: B019, of a few labels; the band lives as long as its video
    def _fill(self, label: str) -> np.ndarray:
        """The strip in the style of one label."""
        return fill(label, self.timeline.classes, self.strip_height, self.width, self.text_size)

    def _draw_caption(self, index: int, second: int) -> np.ndarray:
        """A square in the colour of the label, the label, its confidence, the time."""
        segment, size = self.timeline.segments[index], self.text_size
        image = Image.new("RGB", (self.width, self.caption_height), _BACKGROUND)
        draw, middle = ImageDraw.Draw(image), self.caption_height // 2
        time = f"{format_minutes(second)} / {format_minutes(self.timeline.duration)}"
        right = self.width - size // 2 - self._font.getlength(time)
        draw.text((right, middle), time, _INK, self._font, "lm")
        text = self._fitting(segment, right - 3 * size)
        draw.text((2 * size, middle), text, _INK, self._font, "lm")
        caption = np.array(image)
        top, left = (self.caption_height - size) // 2, size // 2
        square = fill(segment.label, self.timeline.classes, size, size, size)
        caption[top : top + size, left : left + size] = square
        return caption

    def _fitting(self, segment: Segment, width: float) -> str:
        """The label and the confidence; the label is shortened until both fit."""
        is_known = segment.label not in _MARKS and not math.isnan(segment.confidence)
        confidence = f"  {segment.confidence:.0%}" if is_known else ""
        label = drawable_text(segment.label)
        for length in range(min(len(label), 200), 0, -1):
            text = shorten(label, length) + confidence
            if self._font.getlength(text) <= width:
                return text
        return confidence.strip()


def fill(
    label: str, classes: tuple[str, ...], height: int, width: int, text_size: int
) -> np.ndarray:
    """An area `(height, width, 3)` in the colour and the pattern of a label."""
    if label in _MARKS:
        colour, pattern = _MARKS[label]
    else:
        round_number, place = divmod(classes.index(label), len(COLOURS))
        colour, pattern = COLOURS[place], _PATTERNS[round_number % len(_PATTERNS)]
    tile = max(4, text_size // 3)
    y, x = np.ogrid[:height, :width]
    rows, columns = y % tile < tile // 2, x % tile < tile // 2
    diagonals = (x + y) % tile < tile // 3
    is_dark = {
        "plain": np.zeros((1, 1), bool),
        "bars": rows,
        "columns": columns,
        "squares": rows & columns,
        "diagonals": diagonals,
        "crosses": diagonals | ((x - y) % tile < tile // 3),
        "dots": rows & columns,
    }[pattern]
    rgb = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)])
    is_dark = np.broadcast_to(is_dark, (height, width))
    return np.where(is_dark[..., None], rgb // 2, rgb).astype(np.uint8)
