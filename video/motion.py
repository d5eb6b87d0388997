"""Motion between frames: how it is stored, and optical flow.

A clip with measured motion is `(T, 5, H, W)` uint8: RGB, then how far the content of the frame
moved to the right and down since the frame before, as fractions of the frame's width and height.
The code 128 means no motion, and 128 +- 127 means 5 % of the side (`MAX_MOTION`) or more: faster
motion is clamped. "The frame before" is the one before it in the file, not in the clip: the motion
of a frame does not depend on which other frames were sampled. The first frame of a file has no
motion.

Motion is measured on a coarse grid over the whole frame, with one cell per `STRIDE` x `STRIDE`
pixels of the clip, and stored as such a field, `(T, 2, h, w)` uint8. It comes from optical flow
(below) or from video/motion_vectors.py.
"""

import functools
from collections.abc import Iterable
from typing import Literal, NamedTuple

import numpy as np

from utils.errors import require_package

StoredMotion = Literal["flow", "mv"]

ZERO = 128
MAX_MOTION = 0.05
STRIDE = 4


class Modality(NamedTuple):
    """What a model sees: RGB frames, their motion, or both."""

    rgb: bool
    motion: Literal["rgbdiff", "flow", "mv"] | None

    @classmethod
    @functools.cache
    def parse(cls, name: str) -> "Modality":
        """The modality called `rgb`, `rgbdiff`, `flow`, `mv`, `rgb+rgbdiff`, `rgb+flow` or
        `rgb+mv`."""
        parts = name.split("+")
        motion = [part for part in parts if part != "rgb"]
        if parts not in (["rgb"], motion, ["rgb", *motion]) or len(motion) > 1:
            raise ValueError(f"no modality is called {name!r}")
        if motion and motion[0] not in ("rgbdiff", "flow", "mv"):
            raise ValueError(f"no modality is called {name!r}")
        return cls("rgb" in parts, motion[0] if motion else None)

    @property
    def stored_motion(self) -> StoredMotion | None:
        """The motion that a data set must read beside the RGB frames. Differences of frames are
        computed from RGB inside the model, so nothing is stored for them."""
        return self.motion if self.motion in ("flow", "mv") else None

    @property
    def channels(self) -> int:
        """C of the clips that a data set returns for it."""
        return 5 if self.stored_motion else 3


def grid_side(size: int) -> int:
    """Number of cells along one side of the motion field of a clip of `size` pixels."""
    return -(-size // STRIDE)


def encode_motion(motion: np.ndarray) -> np.ndarray:
    """Motion as fractions of the side to uint8 codes."""
    codes = np.rint(ZERO + np.asarray(motion) * (127 / MAX_MOTION))
    return codes.clip(ZERO - 127, ZERO + 127).astype(np.uint8)


def require_opencv() -> None:
    """Raise a UserError unless OpenCV is installed."""
    what = "optical flow (unless a cache was filled with --modality rgb+flow)"
    require_package("cv2", what)


def flow_fields(pairs: Iterable[tuple[np.ndarray, np.ndarray]], size: int) -> np.ndarray:
    """The motion from the first to the second frame of each pair, on the grid of the second.

    OpenCV's DIS flow (Kroeger et al., "Fast Optical Flow using Dense Inverse Search", ECCV 2016,
    arXiv:1603.03590), preset `fast`: it computes the flow at a quarter of the size and enlarges it,
    so that the coarse field loses next to nothing.

    Args:
        pairs: pairs of frames, `(size, size, 3)` uint8 RGB each.

    Returns:
        `(n, 2, h, w)` uint8 codes.
    """
    import cv2

    cv2.setNumThreads(1)  # one thread per worker, as for decoding
    dis = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_FAST)
    side = grid_side(size)
    fields = []
    for before, after in pairs:
        grey = (cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in (after, before))
        backward = dis.calc(*grey, None)  # (size, size, 2): where each pixel of `after` comes from
        fields.append(-cv2.resize(backward, (side, side), interpolation=cv2.INTER_AREA) / size)
    return encode_motion(np.stack(fields)).transpose(0, 3, 1, 2)
