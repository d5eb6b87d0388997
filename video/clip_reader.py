"""Which frames of a video make a clip."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from video.container import ClipError, probe
from video.decoder import read_frames
from video.motion import Brought, flow_fields
from video.motion_vectors import VectorReader

Sampling = Literal["first", "uniform", "random"]


def sample_indices(
    n_available: int,
    n_frames: int,
    sampling: Sampling = "uniform",
    draws: Sequence[float] | None = None,
    view: tuple[int, int] = (0, 1),
) -> list[int]:
    """Which `n_frames` of `n_available` frames make the clip.

    The clip is cut into `n_frames` equal segments and one frame is taken of each, as in Temporal
    Segment Networks (Wang et al., arXiv:1608.00859, section 3.1).

    - `first`: the first frames, what the data set's own code does;
    - `uniform`: the middle of each segment; view k of n takes the point (k + 1/2) / n instead, so
      that the views of one clip see different frames;
    - `random`: `draws[i]` in [0, 1) is the place inside segment i, for training.

    A clip shorter than `n_frames` is taken whole, its last frame repeated, whatever the sampling.
    """
    if n_available < 1:
        raise ValueError("a clip without frames cannot be sampled")
    if sampling == "first" or n_available <= n_frames:
        return [min(i, n_available - 1) for i in range(n_frames)]
    if sampling == "uniform":
        number, count = view
        draws = [(number + 0.5) / count] * n_frames
    elif sampling != "random":
        raise ValueError(f"sampling must be first, uniform or random, not {sampling!r}")
    elif draws is None or len(draws) != n_frames:
        raise ValueError("random sampling needs one draw a frame")
    # int() after the sum: segments may have unequal whole lengths, no frame is left out for ever.
    return [int((i + draws[i]) * n_available / n_frames) for i in range(n_frames)]


def clip_indices(
    n_available: int,
    n_frames: int,
    sampling: Sampling = "uniform",
    draws: Sequence[float] | None = None,
    views: int = 1,
) -> list[int]:
    """The frames of all views of a clip, view after view; see `sample_indices`."""
    return [
        index
        for number in range(views)
        for index in sample_indices(n_available, n_frames, sampling, draws, (number, views))
    ]


def read_clip(
    path: str | Path,
    n_frames: int = 16,
    sampling: Sampling = "uniform",
    size: int | None = 224,
    draws: Sequence[float] | None = None,
    views: int = 1,
) -> np.ndarray:
    """A clip of `n_frames` frames, `(views * n_frames, size, size, 3)` uint8, view after view.

    See `sampling.sample_indices` for the sampling and `read_frames` for everything else.
    """

    def choose(n_available: int) -> list[int]:
        return clip_indices(n_available, n_frames, sampling, draws, views)

    return read_frames(path, choose, size, stop_after=n_frames if sampling == "first" else None)


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


def seen_frame_rate(
    paths: Sequence[Path], n_frames: int, sampling: Sampling, most: int = 50
) -> float | None:
    """Frames a second of the clips that a model is given, the median over some of these files.

    Returns:
        None if no file tells its rate.
    """
    rates = []
    for path in paths[:: max(1, len(paths) // most)]:
        try:
            facts = probe(path)
        except ClipError:
            continue
        if facts.seconds and sampling == "first":
            rates.append(facts.rate)
        elif facts.seconds:  # all frames of a short clip, n_frames of a long one
            rates.append(min(n_frames, facts.frames) / facts.seconds)
    return float(np.median(rates)) if rates else None
