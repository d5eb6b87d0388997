"""Reading frames together with their motion, whichever way it is measured."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from motion import Brought
from motion_vectors import VectorReader
from optical_flow import flow_fields
from sampling import Sampling, clip_indices
from video import read_frames


def read_with_motion(
    path: str | Path, choose: Callable[[int], Sequence[int]], size: int, inputs: Brought
) -> tuple[np.ndarray, np.ndarray | None]:
    """The chosen frames of a file, `(n, size, size, 3)` uint8 RGB, and their motion.

    Args:
        inputs: decides how the motion is measured: `(n, 2, h, w)` uint8, see motion.py, or None.

    Raises:
        ClipError: as for `video.read_frames`, or the file has no motion vectors to read.
    """
    if inputs == "rgb":
        return read_frames(path, choose, size), None
    chosen: list[int] = []

    def remember(count: int) -> list[int]:
        chosen[:] = choose(count)
        return list(chosen)

    if inputs == "rgb+vectors":
        vectors = VectorReader(Path(path), size)
        frames = read_frames(path, remember, size, vectors=vectors)
        return frames, vectors.fields(chosen)

    frames = read_frames(path, lambda count: with_previous(remember(count)), size)
    by_number = dict(zip(with_previous(chosen), frames, strict=True))
    distinct = sorted(set(chosen))
    pairs = ((by_number[max(0, number - 1)], by_number[number]) for number in distinct)
    fields = dict(zip(distinct, flow_fields(pairs, size), strict=True))
    return np.stack([by_number[n] for n in chosen]), np.stack([fields[n] for n in chosen])


def with_previous(numbers: Sequence[int]) -> list[int]:
    """Frames and the ones before them, in order."""
    return sorted({max(0, number - back) for number in numbers for back in (0, 1)})


def read_motion_clip(
    path: str | Path,
    n_frames: int,
    sampling: Sampling,
    size: int,
    draws: Sequence[float] | None,
    views: int,
    inputs: Brought,
) -> tuple[np.ndarray, np.ndarray | None]:
    """`video.read_clip` with motion: frames and fields of a clip, view after view."""

    def choose(n_available: int) -> list[int]:
        return clip_indices(n_available, n_frames, sampling, draws, views)

    return read_with_motion(path, choose, size, inputs)
