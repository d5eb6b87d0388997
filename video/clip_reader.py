"""Reading a clip: T frames of a video or a folder of images, chosen by a FrameSampler, and their
motion if wanted."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from video.container import ClipError, probe
from video.decoder import check_video, read_frames
from video.motion import StoredMotion, flow_fields
from video.motion_vectors import VectorReader

Sampling = Literal["first", "uniform", "random"]


@dataclass(frozen=True)
class FrameSampler:
    """Chooses `n_frames` frames per view of a video.

    The video is cut into `n_frames` equal segments and one frame is taken from each, as in Temporal
    Segment Networks (Wang et al., arXiv:1608.00859, section 3.1).

    - `first`: the first frames, as in the SLAM data set's own code;
    - `uniform`: the middle of each segment; view k of n takes the point (k + 1/2) / n instead, so
      that the views of a clip show different frames;
    - `random`: a random point of each segment, for training.

    A video shorter than `n_frames` is taken whole and its last frame repeated, whatever the
    sampling.
    """

    n_frames: int = 16
    sampling: Sampling = "uniform"
    views: int = 1

    def indices(self, n_available: int, offsets: Sequence[float] | None = None) -> list[int]:
        """The frame numbers of all views, one view after another.

        Args:
            n_available: number of frames in the video.
            offsets: for random sampling, one number in [0, 1) per segment: the point in the
                segment.
        """
        return [i for view in range(self.views) for i in self._of_view(n_available, offsets, view)]

    def _of_view(self, n_available: int, offsets: Sequence[float] | None, view: int) -> list[int]:
        n = self.n_frames
        if n_available < 1:
            raise ValueError("a clip without frames cannot be sampled")
        if self.sampling == "first" or n_available <= n:
            return [min(i, n_available - 1) for i in range(n)]
        if self.sampling == "uniform":
            offsets = [(view + 0.5) / self.views] * n
        elif self.sampling != "random":
            raise ValueError(f"sampling must be first, uniform or random, not {self.sampling!r}")
        elif offsets is None or len(offsets) != n:
            raise ValueError("random sampling needs one offset per frame")
        # int() after the sum: segments may have unequal lengths, and no frame is left out for ever.
        return [int((i + offsets[i]) * n_available / n) for i in range(n)]


class DecodedClip(NamedTuple):
    """The frames of a clip, one view after another, and their motion."""

    rgb: np.ndarray
    """`(views * n_frames, H, W, 3)` uint8"""
    motion: np.ndarray | None = None
    """`(views * n_frames, 2, h, w)` uint8 codes, see video/motion.py; None if not asked for"""


def read_clip(
    path: str | Path,
    sampler: FrameSampler | None = None,
    size: int | None = 224,
    offsets: Sequence[float] | None = None,
    motion: StoredMotion | None = None,
) -> DecodedClip:
    """Decode the frames of a clip.

    Args:
        sampler: chooses the frames (None: 16 evenly spaced ones).
        size: frames are squeezed to `size` x `size` pixels (None: their own size, without motion).
        offsets: see `FrameSampler.indices`.
        motion: also measure the motion of the frames in this way.

    Raises:
        ClipError: see `read_frames`; or the file holds no motion vectors.
    """
    sampler = sampler or FrameSampler()

    def choose(n_available: int) -> list[int]:
        return sampler.indices(n_available, offsets)

    if motion is None:
        stop_after = sampler.n_frames if sampler.sampling == "first" else None
        return DecodedClip(read_frames(path, choose, size, stop_after))
    return read_frames_and_motion(path, choose, size, motion)


def check_clip(path: str | Path, motion: StoredMotion | None = None) -> str | None:
    """Decode every frame of a clip, and read it once as training does, with this motion.

    Returns:
        The problem in a few words; None if training can read the clip and no frame is damaged.
    """
    problem = check_video(path)
    if problem is None:
        try:
            read_clip(path, motion=motion)
        except ClipError as error:
            return error.reason
    return problem


def read_frames_and_motion(
    path: str | Path,
    choose: Callable[[int], Sequence[int]],
    size: int,
    motion: StoredMotion | None,
) -> DecodedClip:
    """The chosen frames of a file and their motion; `choose` is that of `read_frames`.

    Raises:
        ClipError: see `read_frames`; or the file holds no motion vectors.
    """
    if motion is None:
        return DecodedClip(read_frames(path, choose, size))
    chosen: list[int] = []

    def choose_and_keep(n_available: int) -> list[int]:
        chosen[:] = choose(n_available)
        return list(chosen)

    if motion == "mv":
        vectors = VectorReader(Path(path), size)
        frames = read_frames(path, choose_and_keep, size, vectors=vectors)
        return DecodedClip(frames, vectors.fields(chosen))

    frames = read_frames(path, lambda n: with_previous(choose_and_keep(n)), size)
    by_index = dict(zip(with_previous(chosen), frames, strict=True))
    distinct = sorted(set(chosen))
    pairs = ((by_index[max(0, index - 1)], by_index[index]) for index in distinct)
    fields = dict(zip(distinct, flow_fields(pairs, size), strict=True))
    return DecodedClip(
        np.stack([by_index[i] for i in chosen]), np.stack([fields[i] for i in chosen])
    )


def with_previous(indices: Sequence[int]) -> list[int]:
    """The given frame numbers and those of the frames before them, in order."""
    return sorted({max(0, index - back) for index in indices for back in (0, 1)})


def effective_fps(
    paths: Sequence[Path],
    sampler: FrameSampler,
    most: int = 50,
    known: Sequence[float | None] = (),
) -> float | None:
    """Frames per second that a model sees of these clips: the median over at most `most` of them.

    A model that was trained on 16 frames of clips of 1.2 s must be shown whole videos at 13 frames
    per second.

    Args:
        known: frames per second of each clip that does not tell them itself (a folder of images).

    Returns:
        None if no frame rate is known.
    """
    rates = []
    step = max(1, len(paths) // most)
    for path, fps in list(zip_longest(paths, known))[::step]:
        try:
            metadata = probe(path)
        except ClipError:
            continue
        rate = metadata.rate or fps
        if rate and sampler.sampling == "first":
            rates.append(rate)
        elif rate and metadata.frames:  # all frames of a short clip, n_frames of a long one
            rates.append(rate * min(sampler.n_frames, metadata.frames) / metadata.frames)
    return float(np.median(rates)) if rates else None
