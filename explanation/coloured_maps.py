"""How a map looks over its frame, and the words that go with it in every picture and on the page.

The colour is one hue, the blue of Okabe and Ito, that neither tissue nor fat has and that people
with any kind of colour vision tell from red. Its opacity grows with the relevance, so that what is
not relevant stays as the camera saw it. An outline at half of the maximum is the second mark, for
grey instruments, which may look blue.
"""

import math

import numpy as np
from PIL import Image

from explanation.relevance import ExplainedClip, Method
from utils.text_table import shorten

METHOD_NAMES: dict[Method, str] = {
    "gradcam++": "Grad-CAM++",
    "rollout": "attention rollout",
    "occlusion": "occlusion",
    "integrated-gradients": "integrated gradients",
}

BLUE = (
    "Blue: speaks for the explained class; the stronger, the more, as a share of the highest "
    "relevance in the whole clip. No colour: speaks for it hardly or not at all, or against it."
)

YELLOW = "Inside the yellow outline: at least half of the highest relevance."

BARS = "Bars: the relevance of each frame; a bar below the axis speaks against the explained class."

CAUTION = (
    "This shows what the model's answer depended on, as far as this method can tell. It does "
    "not show where an action is, it is not a cause, and it does not mean that the answer is right."
)

NOTHING = "No part of any frame has positive relevance: there is nothing to colour."

WEAK, STRONG = np.array([0, 114, 178]), np.array([86, 180, 233])
"""RGB of little and of the highest relevance"""
OUTLINE = np.array([240, 228, 66])
"""RGB of the outline at half of the maximum"""
OPACITY = 0.65
"""of the highest relevance"""

_FINE = 64  # cells along a side


def has_positive(clip: ExplainedClip) -> bool:
    """Whether a cell of a map has positive relevance: otherwise there is nothing to colour."""
    return bool((clip.maps > 0).any())


def has_outline(clip: ExplainedClip) -> bool:
    """Whether the maps are coarse enough to be outlined: an outline would hide small specks."""
    return max(clip.maps.shape[1:]) < _FINE


def cells_text(clip: ExplainedClip) -> str:
    """How fine the maps are, e.g. `7 x 7 cells`: a coarse one cannot show small things."""
    height, width = clip.maps.shape[1:]
    return "1 cell" if height * width == 1 else f"{height} x {width} cells"


def legend(clip: ExplainedClip) -> str:
    """What the colours over the frames mean."""
    if not has_positive(clip):
        return NOTHING
    outline = f" {YELLOW}" if has_outline(clip) else ""
    return f"{BLUE}{outline} The map has {cells_text(clip)} per frame and is smoothed."


def positive_shares(maps: np.ndarray) -> np.ndarray:
    """Positive relevance as a share of its maximum over the whole clip, `(T, h, w)` in [0, 1].

    Negative relevance is 0. All is 0 where no relevance is positive.
    """
    positive = np.maximum(np.asarray(maps, np.float32), 0)
    highest = positive.max()
    return positive / highest if highest > 0 else positive


def paint(frame: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """A frame `(H, W, 3)` with the map over it, uint8 RGB; a coarse map is outlined too.

    Args:
        shares: `(h, w)` of `positive_shares`, enlarged bilinearly.
    """
    height, width = frame.shape[:2]
    cells = Image.fromarray(np.ascontiguousarray(shares, np.float32))
    share = np.asarray(cells.resize((width, height), Image.Resampling.BILINEAR))
    painted = blend(frame, share)
    if max(shares.shape) < _FINE:
        painted[_edge(share >= 0.5, max(1, round(min(height, width) / 110)))] = OUTLINE
    return painted


def blend(background: np.ndarray, share: np.ndarray) -> np.ndarray:
    """The colour of a share of the highest relevance over a background, `(..., 3)` uint8 RGB.

    Args:
        background: `(..., 3)` RGB.
        share: `(...)` in [0, 1].
    """
    share = share[..., None]
    colour = WEAK + share * (STRONG - WEAK)
    opacity = OPACITY * share
    return np.rint(background * (1 - opacity) + colour * opacity).astype(np.uint8)


def _edge(inside: np.ndarray, thickness: int) -> np.ndarray:
    """The pixels of an area `(H, W)` bool that are within `thickness` of what is outside of it."""
    core = inside
    for _ in range(thickness):
        padded = np.pad(core, 1)  # also along the sides of the picture, so that it is closed
        core = core & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return inside & ~core


def chosen_frames(count: int, most: int) -> np.ndarray:
    """The indices of at most `most` of `count` frames, evenly chosen, the first and last among
    them."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(int))


def question(clip: ExplainedClip, longest: int = 40) -> str:
    """What the relevance answers: `why X`, or `why X and not Y`; longer names are shortened."""
    against = f" and not {shorten(clip.against, longest)}" if clip.against else ""
    return f"why {shorten(clip.explained, longest)}{against}"


def answer(clip: ExplainedClip, longest: int = 40) -> str:
    """What the model predicted and whether that is right, and the probability of the explained
    class if it is another one."""
    text = f"predicted: {shorten(clip.predicted, longest)}, confidence {clip.confidence:.0%}, "
    if clip.correct is None:
        text += "true class unknown"
    elif clip.correct:
        text += "which is right"
    else:
        text += f"which is wrong, true class: {shorten(clip.label, longest)}"
    if clip.explained != clip.predicted:
        text += f"; probability of {shorten(clip.explained, longest)}: {clip.probability:.0%}"
    return text


def time_text(seconds: float) -> str:
    """The time of a frame, e.g. `1.20 s`; empty if it is unknown."""
    return f"{seconds:.2f} s" if math.isfinite(seconds) else ""
