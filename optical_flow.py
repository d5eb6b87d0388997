"""Optical flow: how far each place of a picture moved, from the pixels of two frames.

OpenCV's DIS (Kroeger et al., "Fast Optical Flow using Dense Inverse Search", ECCV 2016,
arXiv:1603.03590), preset `fast`: it works on pictures a quarter as large and enlarges the result,
so that the field (see motion.py) loses next to nothing.
"""

from collections.abc import Iterable

import numpy as np

from errors import UserError
from motion import encode_motion, grid_side


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
