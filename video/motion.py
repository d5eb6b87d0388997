"""Motion beside the picture: what the channels after R, G and B mean, and the maths of them.

A clip with motion is `(T, 5, H, W)` uint8: RGB, then how far the picture's content moved, to the
right and down, since the frame before, in shares of the picture's width and height. 128 is no
motion; 128 +- 127 is 5 % of the side (`RANGE`) or more: faster motion is clamped. The frame before
is the one before it in the file, not in the clip: a frame's motion does not depend on which other
frames were sampled. The first frame of a file has none.

Motion is measured on a coarse grid over the whole picture, a cell for every `CELL` x `CELL` pixels
of the clip, and stored as such a field, `(T, 2, h, w)` uint8; `join_motion` enlarges it. Where it
comes from: optical_flow.py, motion_vectors.py.
"""

from collections.abc import Iterable
from typing import Literal

import numpy as np

from utils.errors import UserError

Motion = Literal["gradients", "flow", "vectors"]

Inputs = Literal["rgb", Motion, "rgb+gradients", "rgb+flow", "rgb+vectors"]

Brought = Literal["rgb", "rgb+flow", "rgb+vectors"]

NONE = 128

RANGE = 0.05

CELL = 4


def motion_of(inputs: Inputs) -> Motion | None:
    """Which motion a model is shown."""
    return None if inputs == "rgb" else inputs.removeprefix("rgb+")


def brought(inputs: Inputs) -> Brought:
    """What a data set brings for it: gradients are worked out from RGB in the model, and measured
    motion comes beside the RGB, wanted or not."""
    motion = motion_of(inputs)
    return f"rgb+{motion}" if motion in ("flow", "vectors") else "rgb"


def channels(inputs: Inputs) -> int:
    """C of the clips that a data set gives."""
    return 3 if brought(inputs) == "rgb" else 5


def grid_side(size: int) -> int:
    """Cells of a side of the field of a clip of `size` pixels."""
    return -(-size // CELL)


def encode_motion(shares: np.ndarray) -> np.ndarray:
    """Motion in shares of the side as uint8 codes."""
    codes = np.rint(NONE + np.asarray(shares) * (127 / RANGE))
    return codes.clip(NONE - 127, NONE + 127).astype(np.uint8)


def require_opencv() -> None:
    """Raise a UserError unless OpenCV is installed."""
    try:
        import cv2  # noqa: F401
    except ImportError:
        raise UserError(
            "inputs rgb+flow needs a package: pip install -r requirements-flow.txt "
            "(training from a cache that was filled with --inputs rgb+flow does not)"
        ) from None


def flow_fields(pairs: Iterable[tuple[np.ndarray, np.ndarray]], size: int) -> np.ndarray:
    """The motion from the first to the second picture of each pair, seen from the second.

    Args:
        pairs: of `(size, size, 3)` uint8 RGB pictures.

    Returns:
        `(n, 2, h, w)` uint8, see motion.py.
    """
    import cv2

    cv2.setNumThreads(1)  # as the decoders: one thread a worker
    search = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_FAST)
    side = grid_side(size)
    fields = []
    for before, now in pairs:
        grey = (cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY) for picture in (now, before))
        back = search.calc(*grey, None)  # (size, size, 2): where each pixel of now comes from
        fields.append(-cv2.resize(back, (side, side), interpolation=cv2.INTER_AREA) / size)
    return encode_motion(np.stack(fields)).transpose(0, 3, 1, 2)
