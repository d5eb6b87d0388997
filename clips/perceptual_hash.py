"""Telling whether two clips are the same: to the byte, or to the eye."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.fft import dctn
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from clips.image_filters import LUMA
from video.clip_reader import read_clip

FRAMES = 3

BITS = 64  # a frame

_SIDE = 32  # pixels that a frame is shrunk to

_FLAT = 4.0  # grey levels: a frame that varies less (black, white) looks like any other

_CHUNK = 1024


def content_hash(path: Path) -> str:
    """The SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def look(path: Path) -> np.ndarray | None:
    """What a clip looks like: a perceptual hash of three frames, `(3 * 64,)` bool.

    Raises:
        ClipError: it cannot be read.

    Returns:
        None where a frame is all of one grey, and so has no look. Otherwise the signs of a frame's
        64 lowest frequencies (DCT-II of 32 x 32 grey pixels, without the mean) against their
        median: the "pHash" of Zauner, "Implementation and Benchmarking of Perceptual Image Hash
        Functions" (2010). Recoding, scaling and brightness change few of them.
    """
    frames = read_clip(path, FRAMES, "uniform", 128)  # (3, 128, 128, 3)
    hashes = []
    for grey in (frames @ np.array(LUMA)).astype(np.uint8):
        small = np.asarray(Image.fromarray(grey).resize((_SIDE, _SIDE)), float)
        if small.std() < _FLAT:
            return None
        low = dctn(small, norm="ortho")[:9, :9].ravel()[1 : BITS + 1]
        hashes.append(low > np.median(low))
    return np.concatenate(hashes)


def alike(looks: Sequence[np.ndarray | None], bits: int) -> np.ndarray:
    """Groups of clips that look alike: `(N,)` numbers, -1 for clips without a look.

    Two clips are alike if at most `bits` of their 192 bits differ; what is alike to one of a group
    belongs to the group.
    """
    known = [number for number, one in enumerate(looks) if one is not None]
    groups = np.full(len(looks), -1)
    if not known:
        return groups
    signs = np.stack([looks[number] for number in known]).astype(np.float32) * 2 - 1
    least = signs.shape[1] - 2 * bits  # the product of two rows is 192 - 2 * differing bits
    pairs = []
    for start in range(0, len(signs), _CHUNK):
        near = np.argwhere(signs[start : start + _CHUNK] @ signs.T >= least)
        pairs.append(near + np.array((start, 0)))
    one, other = np.concatenate(pairs).T
    graph = coo_array((np.ones(len(one), bool), (one, other)), shape=(len(signs),) * 2)
    groups[known] = connected_components(graph, directed=False)[1]
    return groups
