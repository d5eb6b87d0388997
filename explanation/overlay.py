"""An explained clip as a video: its frames with their maps, and a band below them."""

import math
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
from matplotlib.font_manager import FontProperties, findfont
from PIL import Image, ImageDraw, ImageFont

from evaluation.plots import COLOURS, drawable_text
from explanation.coloured_maps import (
    CAUTION,
    METHOD_NAMES,
    NOTHING,
    answer,
    has_positive,
    paint,
    positive_shares,
    question,
    time_text,
)
from explanation.relevance import ExplainedClip
from video.encoder import write_video

MIN_WIDTH = 480  # pixels; smaller frames are enlarged, so that the text has room
MAX_HEIGHT = 1080  # up to which they are

BACKGROUND, INK = (24, 27, 31), (255, 255, 255)
_CURRENT = (72, 80, 90)  # behind the bar of the frame that is shown
FOR, AGAINST = (
    tuple(int(colour[i : i + 2], 16) for i in (1, 3, 5)) for colour in (COLOURS[4], COLOURS[5])
)
"""colours of the bars above and below the axis, which stand on a dark band"""


def write_overlay(path: str | Path, clip: ExplainedClip, rate: float | Fraction) -> None:
    """Write the frames with their maps as H.264, and below them a band: what is explained, and a
    bar for the relevance of each frame, with a playhead. The name of the clip is not in it.

    Args:
        rate: frames per second, above 0.
    """
    rate = max(Fraction(rate).limit_denominator(1001), Fraction(1, 1001))
    write_video(path, overlay_frames(clip), rate)


def overlay_frames(clip: ExplainedClip) -> Iterator[np.ndarray]:
    """The frames of the overlay `(H, W, 3)`, uint8 RGB, with even sides."""
    height, width = clip.frames.shape[1:3]
    factor = max(1, min(math.ceil(MIN_WIDTH / width), MAX_HEIGHT // height))
    beside = max(0, MIN_WIDTH - factor * width)  # margins of a frame that is high and narrow
    beside += (factor * width + beside) % 2
    band = Band(clip, factor * width + beside)
    shares = positive_shares(clip.maps)
    for number, frame in enumerate(clip.frames):
        picture = paint(frame.repeat(factor, axis=0).repeat(factor, axis=1), shares[number])
        left, odd = beside // 2, picture.shape[0] % 2
        picture = np.pad(picture, ((0, odd), (left, beside - left), (0, 0)))
        yield np.concatenate((picture, band.at(number)))


class Band:
    """The band below the picture: what is explained, the bars, and what the map does not mean.

    Args:
        width: of the picture in pixels.
    """

    def __init__(self, clip: ExplainedClip, width: int) -> None:
        self.clip, self.width = clip, width
        self.text_size = max(13, round(width / 38))
        """height of the text in pixels"""
        self.strip_height = 4 * self.text_size
        self.strip = self._draw_strip()
        texts = question(clip), answer(clip)
        self._above = self._text(self._wrap(*texts))
        below = CAUTION if has_positive(clip) else f"{NOTHING} {CAUTION}"
        self._below = self._text(self._wrap(below, scale=0.8), 0.8)

    @property
    def strip_top(self) -> int:
        """The row of pixels of the band at which the bars begin."""
        return len(self._above) + len(self._text([""]))

    @property
    def height(self) -> int:
        """Of the band in pixels, even."""
        return len(self.at(0))

    def columns(self, number: int) -> tuple[int, int]:
        """The first column of pixels of a bar, and the first one after it."""
        count = len(self.clip.frames)
        start, end = (round(n * self.width / count) for n in (number, number + 1))
        return min(start, self.width - 1), max(end, start + 1)

    def at(self, number: int) -> np.ndarray:
        """The band `(height, width, 3)` while a frame is shown."""
        strip, (start, end) = self.strip.copy(), self.columns(number)
        column = strip[:, start:end]
        column[(column == BACKGROUND).all(axis=2)] = _CURRENT
        column[: max(2, self.text_size // 6)] = INK
        texts = f"frame {number + 1} of {len(self.clip.frames)}", time_text(self.clip.times[number])
        line = ", ".join(filter(None, (*texts, METHOD_NAMES[self.clip.method])))
        parts = self._above, self._text([line]), strip, self._below
        band = np.concatenate(parts)
        return np.pad(band, ((0, len(band) % 2), (0, 0), (0, 0)), "edge")

    def _draw_strip(self) -> np.ndarray:
        """The bars of all frames, and their axis."""
        strip = np.full((self.strip_height, self.width, 3), BACKGROUND, np.uint8)
        margin = max(3, self.text_size // 4)
        values = self.clip.relevance
        low, high = min(0.0, float(values.min())), max(0.0, float(values.max()))
        scale = (self.strip_height - 2 * margin) / (high - low) if high > low else 0.0
        axis = round(margin + scale * high) if scale else self.strip_height - margin
        for number, value in enumerate(values):
            start, end = self.columns(number)
            gap = (end - start) // 8
            upper, lower = sorted((axis, round(axis - scale * float(value))))
            strip[upper:lower, start + gap : end - gap] = FOR if value > 0 else AGAINST
        strip[axis] = INK
        return strip

    def _wrap(self, *texts: str, scale: float = 1.0) -> list[str]:
        room, used = self.width - self.text_size, font(round(scale * self.text_size))
        return [line for text in texts for line in wrap(text, room, used)]

    def _text(self, lines: Sequence[str], scale: float = 1.0) -> np.ndarray:
        """Lines of text as a picture of the whole width."""
        step, margin = round(1.3 * scale * self.text_size), round(0.25 * self.text_size)
        image = Image.new("RGB", (self.width, step * len(lines) + 2 * margin), BACKGROUND)
        draw, used = ImageDraw.Draw(image), font(round(scale * self.text_size))
        for number, line in enumerate(lines):
            middle = margin + step * number + step // 2
            draw.text((self.text_size // 2, middle), line, INK, used, "lm")
        return np.asarray(image)


def font(size: float, weight: str = "normal") -> ImageFont.FreeTypeFont:
    """The font of all pictures, of this size in pixels."""
    return ImageFont.truetype(findfont(FontProperties(weight=weight)), size)


def wrap(text: str, room: float, used: ImageFont.FreeTypeFont) -> list[str]:
    """The lines of a text, as it can be drawn, that fit into a width; a word that does not fit is
    broken."""
    lines = [""]
    for word in drawable_text(text).split():
        joined = f"{lines[-1]} {word}".strip()
        if used.getlength(joined) <= room:
            lines[-1] = joined
            continue
        lines += [""] * bool(lines[-1])
        for letter in word:
            if used.getlength(lines[-1] + letter) > room:
                lines.append("")
            lines[-1] += letter
    return lines
