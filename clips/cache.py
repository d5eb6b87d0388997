"""Clips kept as small JPEGs: reading one takes milliseconds, whatever it takes to decode its video.

A cache is a folder with `cache.json` (its settings) and one file a clip, named by a hash of the
clip's path below the data's root, in 4096 folders: no folder gets long, and no name gives a patient
away. `prepare_data.py cache` writes it; training reads it where TrainConfig.cache names the folder.

A file holds all frames of a short clip. Of a long one it holds the middles of `per_segment` equal
parts of each of the clip's `n_frames` segments: uniform sampling finds its frames, random sampling
still has `per_segment` to choose from in each segment. JPEG loses a little (see RESULTS.md).
Motion, if the settings name it, is kept beside each frame exactly: 0.2 to 4 kB for 224 px.
"""

import hashlib
import io
import json
import os
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from utils.errors import UserError
from utils.files import atomic, write_json
from video.clip_reader import Sampling, clip_indices, read_with_motion, sample_indices
from video.container import ClipError
from video.motion import Brought, grid_side

FORMAT = 1

_MAGIC = b"clipjpg\n"

_BYTES_PER_PIXEL = 250_000 / (16 * 224 * 224)  # at most, on average over a clip

_LOWEST_QUALITY = 20


@dataclass(frozen=True)
class CacheSettings:
    """What a cache's clips look like."""

    n_frames: int = 16
    """T of the trainings that will read it"""
    image_size: int = 224
    """pixels of a side"""
    quality: int = 92
    """of the JPEGs; lowered for a clip that would take more than 250 kB per 16 frames of 224 px"""
    per_segment: int = 5
    """frames kept in each of the T segments of a long clip; odd: the middle must be one of them"""
    inputs: Brought = "rgb"
    """what is kept beside the picture; rgb is enough for rgb+gradients"""


class Stale(Exception):
    """A clip's file in the cache is damaged or no longer right."""


class ClipCache:
    """A folder of cached clips.

    Args:
        folder: of the cache.
        root: the data's root, which the clips' paths are relative to; data and cache may move.

    Raises:
        UserError: there is no cache in the folder, or one of another version.
    """

    def __init__(self, folder: str | Path, root: str | Path) -> None:
        self.folder = Path(folder)
        self.root = Path(root)
        try:
            content = json.loads((self.folder / "cache.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            raise UserError(
                f"{self.folder}: holds no cache (make one: python prepare_data.py cache)"
            ) from None
        if not isinstance(content, dict) or content.pop("format", None) != FORMAT:
            raise UserError(
                f"{self.folder}: a cache of another version of this project: make it anew"
            )
        self.settings = CacheSettings(**content)

    @classmethod
    def create(cls, folder: str | Path, root: str | Path, settings: CacheSettings) -> "ClipCache":
        """Open the cache in a folder with these settings. Clips of other settings become stale."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        write_json(Path(folder) / "cache.json", {"format": FORMAT, **asdict(settings)})
        return cls(folder, root)

    def place(self, clip: Path) -> Path:
        """The file of a clip."""
        relative = os.path.relpath(clip, self.root).replace(os.sep, "/")
        name = hashlib.sha256(relative.encode("utf-8", "surrogateescape")).hexdigest()
        return self.folder / name[:3] / f"{name[3:27]}.clip"

    def write(self, clip: Path) -> tuple[int, str | None]:
        """Decode a clip and keep it.

        A clip that cannot be read is kept as such: reading it from the cache gives the same error.

        Returns:
            The bytes of its file, and why it cannot be read if that is so.
        """
        facts = {"source": _fingerprint(clip), "settings": asdict(self.settings)}
        try:
            numbers, count, frames, fields = self._frames(clip)
            jpegs = _encode(frames, self.settings.quality)
            facts |= {"count": count, "numbers": numbers, "lengths": [len(jpeg) for jpeg in jpegs]}
            motion = [zlib.compress(field.tobytes()) for field in fields]
            facts |= {"motion": [len(field) for field in motion]} if motion else {}
        except ClipError as error:
            jpegs, motion, facts = [], [], {**facts, "error": error.reason}
        header = json.dumps(facts).encode()
        content = b"".join([_MAGIC, struct.pack("<I", len(header)), header, *jpegs, *motion])
        place = self.place(clip)
        place.parent.mkdir(exist_ok=True)
        with atomic(place) as unfinished:
            unfinished.write_bytes(content)
        return len(content), facts.get("error")

    def _frames(self, clip: Path) -> tuple[list[int], int, np.ndarray, np.ndarray | tuple[()]]:
        """The numbers of the frames to keep, of how many, the frames, and their motion, if any."""
        counts = []

        def choose(count: int) -> list[int]:
            counts.append(count)
            n, views = self.settings.n_frames, self.settings.per_segment
            if count <= n * views:
                return list(range(count))
            kept = (sample_indices(count, n, "uniform", view=(k, views)) for k in range(views))
            return sorted({number for view in kept for number in view})

        size, inputs = self.settings.image_size, self.settings.inputs
        frames, fields = read_with_motion(clip, choose, size, inputs)
        return choose(counts[-1]), counts[-1], frames, () if fields is None else fields

    def problem(self, clip: Path, unreadable: bool = False) -> str | None:
        """Why a clip must be cached (again) before it can be read from here, or None.

        That its video could not be read is a problem only if `unreadable` says so.
        """
        try:
            with open(self.place(clip), "rb") as file:
                facts = self._header(file, clip)
            if unreadable and "error" in facts:
                return "could not be read"
        except FileNotFoundError:
            return "not in the cache"
        except (OSError, Stale) as error:
            return str(error)
        return None

    def _header(self, file: BinaryIO, clip: Path) -> dict[str, Any]:
        """What the file of a clip says about itself.

        Raises:
            Stale: it is damaged, or not of this clip as it is now.
        """
        try:
            if file.read(len(_MAGIC)) != _MAGIC:
                raise ValueError
            (length,) = struct.unpack("<I", file.read(4))
            facts = json.loads(file.read(length))
            lengths = facts.get("lengths", []) + facts.get("motion", [])
            if file.tell() + sum(lengths) != os.fstat(file.fileno()).st_size:
                raise ValueError
        except (ValueError, struct.error):
            raise Stale("damaged in the cache") from None
        # Files from before there was motion do not name their inputs.
        if {"inputs": "rgb", **facts["settings"]} != asdict(self.settings):
            raise Stale("cached with other settings")
        if facts["source"] != _fingerprint(clip):
            raise Stale("changed since it was cached")
        return facts

    def read(
        self,
        clip: Path,
        n_frames: int = 16,
        sampling: Sampling = "uniform",
        draws: Sequence[float] | None = None,
        views: int = 1,
    ) -> np.ndarray:
        """The frames that `video.read_clip` gives, `(views * n_frames, size, size, 3)` uint8 RGB.

        Of a long clip random sampling takes, in each segment, the kept frame nearest to the draw.

        Raises:
            ClipError: the clip is not in the cache, changed since, cannot be read, or the wanted
                frames of a long clip are not among those kept.
        """
        return self._read(clip, n_frames, sampling, draws, views, motion=False)[0]

    def read_motion(
        self,
        clip: Path,
        n_frames: int = 16,
        sampling: Sampling = "uniform",
        draws: Sequence[float] | None = None,
        views: int = 1,
    ) -> tuple[np.ndarray, np.ndarray]:
        """`read`, and the frames' motion, `(views * n_frames, 2, h, w)` uint8, see motion.py.

        The cache's settings must name it.
        """
        return self._read(clip, n_frames, sampling, draws, views, motion=True)

    def _read(
        self,
        clip: Path,
        n_frames: int,
        sampling: Sampling,
        draws: Sequence[float] | None,
        views: int,
        motion: bool,
    ) -> tuple[np.ndarray, np.ndarray | None]:
        hint = "run prepare_data.py cache again"
        try:
            with open(self.place(clip), "rb") as file:
                facts = self._header(file, clip)
                if "error" in facts:
                    raise ClipError(clip, facts["error"])
                kept = {number: place for place, number in enumerate(facts["numbers"])}
                whole = len(kept) == facts["count"]
                if draws is not None and not whole:
                    parts = self.settings.per_segment
                    draws = [(int(draw * parts) + 0.5) / parts for draw in draws]
                wanted = clip_indices(facts["count"], n_frames, sampling, draws, views)
                if not kept.keys() >= set(wanted):
                    raise ClipError(
                        clip,
                        f"the cache keeps {len(kept)} of {facts['count']} frames, not all that are "
                        f"wanted ({sampling} sampling, {n_frames} frames, {views} views)",
                    )
                places = {kept[number] for number in wanted}
                pictures = _decode(file, facts["lengths"], places)
                fields = _inflate(file, facts["motion"], places) if motion else {}
        except FileNotFoundError:
            raise ClipError(clip, f"not in the cache: {hint}") from None
        except (OSError, zlib.error, Stale) as error:  # PIL's errors are OSErrors too
            raise ClipError(clip, f"{error}: {hint}") from None
        order = [kept[number] for number in wanted]
        frames = np.stack([pictures[place] for place in order])  # (V * T, H, W, 3)
        if not motion:
            return frames, None
        side = grid_side(self.settings.image_size)
        stacked = np.stack([np.frombuffer(fields[place], np.uint8) for place in order])
        return frames, stacked.reshape(-1, 2, side, side)


def _fingerprint(clip: Path) -> list[int]:
    """Size and time of change: a file with the same ones is taken for the same file."""
    try:
        status = os.stat(clip)
    except OSError:
        return []
    return [status.st_size, status.st_mtime_ns]


def _encode(frames: np.ndarray, quality: int) -> list[bytes]:
    """`(N, H, W, 3)` uint8 RGB as JPEGs, none too large on average."""
    limit = _BYTES_PER_PIXEL * frames[..., 0].size
    while True:
        jpegs = []
        for frame in frames:
            file = io.BytesIO()
            Image.fromarray(frame).save(file, "jpeg", quality=quality)
            jpegs.append(file.getvalue())
        if sum(map(len, jpegs)) <= limit or quality <= _LOWEST_QUALITY:
            return jpegs
        quality = max(_LOWEST_QUALITY, quality - 8)


def _decode(file: BinaryIO, lengths: Sequence[int], places: set[int]) -> dict[int, np.ndarray]:
    """The pictures at some places of a file that stands at the first one."""
    pictures = {}
    for place, content in _pieces(file, lengths, places):
        with Image.open(io.BytesIO(content), formats=["jpeg"]) as picture:
            pictures[place] = np.asarray(picture)
    return pictures


def _inflate(file: BinaryIO, lengths: Sequence[int], places: set[int]) -> dict[int, bytes]:
    """The motion at some places of a file that stands behind its last picture."""
    return {place: zlib.decompress(piece) for place, piece in _pieces(file, lengths, places)}


def _pieces(
    file: BinaryIO, lengths: Sequence[int], places: set[int]
) -> Iterator[tuple[int, bytes]]:
    """What stands at some places of a file; at the end it stands behind the last place."""
    for place, length in enumerate(lengths):
        if place in places:
            yield place, file.read(length)
        else:
            file.seek(length, os.SEEK_CUR)
