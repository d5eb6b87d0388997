"""Which frames of a video make a clip."""

from collections.abc import Sequence
from typing import Literal

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
