"""Duplicate clips: identical files by SHA-256, near-duplicates by a perceptual hash."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from video.clip_reader import FrameSampler, read_clip
from video.container import LUMA
from video.frame_folder import frame_files

N_FRAMES = 3
BITS = 64  # per frame
_SIDE = 32  # pixels; frames are shrunk to this size
_MIN_DEVIATION = 4.0  # grey levels; flatter frames (black, white) would all have similar hashes
_CHUNK = 1024


def sha256_file(path: Path) -> str:
    """The SHA-256 of a file; of a folder of images, that of their SHA-256s in order."""
    if path.is_dir():
        images = [file.entry for file in frame_files(path) if file.entry.is_file()]
        digests = [sha256_file(Path(image)) for image in images]
        return hashlib.sha256(" ".join(digests).encode()).hexdigest()
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def perceptual_hash(path: Path) -> np.ndarray | None:
    """A perceptual hash of three frames of a clip, `(3 * 64,)` bool.

    For each frame, the 64 lowest frequencies (DCT-II of 32 x 32 grey pixels, without the mean) are
    compared with their median: the "pHash" of Zauner, "Implementation and Benchmarking of
    Perceptual Image Hash Functions" (2010). Recoding, scaling and brightness change few bits.

    Returns:
        None if a frame is almost uniform, because then the hash would mean nothing.

    Raises:
        ClipError: the clip cannot be read.
    """
    frames = read_clip(path, FrameSampler(N_FRAMES), 128).rgb  # (3, 128, 128, 3)
    hashes = [hash_frame(frame) for frame in frames]
    return None if any(bits is None for bits in hashes) else np.concatenate(hashes)


def hash_frame(frame: np.ndarray) -> np.ndarray | None:
    """The perceptual hash of a frame of 128 x 128 pixels, `(64,)` bool; see `perceptual_hash`.

    Returns:
        None if the frame is almost uniform.
    """
    from PIL import Image  # these are not above: --help does without them
    from scipy.fft import dctn

    grey = (frame @ np.array(LUMA)).astype(np.uint8)
    small = np.asarray(Image.fromarray(grey).resize((_SIDE, _SIDE)), float)
    if small.std() < _MIN_DEVIATION:
        return None
    low = dctn(small, norm="ortho")[:9, :9].ravel()[1 : BITS + 1]
    return low > np.median(low)


def duplicate_groups(hashes: Sequence[np.ndarray | None], max_distance: int) -> np.ndarray:
    """Groups of near-duplicates: `(N,)` group numbers, -1 for clips without a hash.

    Two clips are near-duplicates if at most `max_distance` of their 192 bits differ. A group holds
    all clips that are connected through pairs of near-duplicates.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    known = [index for index, bits in enumerate(hashes) if bits is not None]
    groups = np.full(len(hashes), -1)
    if not known:
        return groups
    signs = np.stack([hashes[index] for index in known]).astype(np.float32) * 2 - 1
    # The product of two rows is 192 - 2 * the number of bits that differ.
    min_product = signs.shape[1] - 2 * max_distance
    pairs = []
    for start in range(0, len(signs), _CHUNK):
        near = np.argwhere(signs[start : start + _CHUNK] @ signs.T >= min_product)
        pairs.append(near + np.array((start, 0)))
    first, second = np.concatenate(pairs).T
    graph = coo_array((np.ones(len(first), bool), (first, second)), shape=(len(signs),) * 2)
    groups[known] = connected_components(graph, directed=False)[1]
    return groups
