"""Clips kept as small JPEGs: reading one takes milliseconds, however slowly its video is decoded.

A cache is a folder with `cache.json` (its settings) and one file per clip, named by a hash of the
clip's path below the data's root, in 4096 folders, so that no folder holds too many files and
no name reveals the patient. `prepare_data.py cache` fills it; training reads it if
TrainConfig.cache names it.

A cache on a network drive may be packed into tar files instead, see clips/shards.py: they are read
clip by clip as the single files are, and hold the same bytes.

A file holds all frames of a short clip. Of a long clip it holds the middles of `frames_per_segment`
equal parts of each of the clip's `n_frames` segments: uniform sampling finds its frames, and random
sampling can still choose among `frames_per_segment` in each segment. JPEG loses a little (see
docs/results/data.md). Motion, if the settings name it, is kept beside each frame without loss: 0.2
to 4 kB for 224 px.
"""

import contextlib
import hashlib
import io
import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from clips.cache_entry import Place, StaleCacheEntry, entry_file, read_entry_file, read_pieces
from clips.shards import Shards, settings_hash
from utils.errors import UserError
from utils.files import atomic, read_json, write_json
from utils.structure import find_mismatch
from video.clip_reader import DecodedClip, FrameSampler, read_frames_and_motion
from video.container import ClipError
from video.files import fingerprint
from video.motion import Modality, StoredMotion, grid_side

FORMAT = 1
_BYTES_PER_PIXEL = 250_000 / (16 * 224 * 224)  # at most, on average over a clip
_LOWEST_QUALITY = 20

# Settings and values under their earlier names, as caches of earlier versions hold them.
_OLD_NAMES = {"per_segment": "frames_per_segment", "inputs": "modality"}
_OLD_VALUES = {"rgb+vectors": "rgb+mv"}


# What cache.json holds; see `utils.structure.find_mismatch`. The
# first caches held no motion and do not name their modality.
_SHAPE = {
    "n_frames": int,
    "image_size": int,
    "quality": int,
    "frames_per_segment": int,
    "modality?": str,
}


@dataclass(frozen=True)
class CacheSettings:
    """What the clips of a cache look like."""

    n_frames: int = 16
    """frames per clip, T, of the trainings that will read the cache"""
    image_size: int = 224
    """height and width of the frames in pixels"""
    quality: int = 92
    """quality of the JPEGs; lowered for clips over 250 kB per 16 frames of 224 px"""
    frames_per_segment: int = 5
    """frames kept in each of the T segments of a long clip; odd, because the middle must be kept"""
    modality: Literal["rgb", "rgb+flow", "rgb+mv"] = "rgb"
    """what is kept; rgb is enough for training with rgbdiff or rgb+rgbdiff"""

    @property
    def motion(self) -> StoredMotion | None:
        """The motion that is kept beside each frame."""
        return Modality.parse(self.modality).stored_motion


class ClipCache:
    """A folder of cached clips.

    Args:
        folder: folder of the cache.
        root: the data's root, which the clips' paths are relative to; data and cache may move.
        packed: read the clips from the tar files, if there are any and their index is complete.

    Raises:
        UserError: there is no cache in the folder, or one of another version; or its tar files are
            not those that were written.
    """

    def __init__(self, folder: str | Path, root: str | Path, packed: bool = True) -> None:
        self.folder = Path(folder)
        self.root = Path(root)
        content = read_json(self.folder / "cache.json")
        if not content:
            raise UserError(
                f"{self.folder}: holds no cache (make one: python prepare_data.py cache)"
            )
        known = content.pop("format", None) == FORMAT
        settings = _renamed(content)
        known &= not find_mismatch(settings, _SHAPE)
        if not known or not settings.keys() <= asdict(CacheSettings()).keys():
            raise UserError(
                f"{self.folder}: a cache of another version of this project: make it anew"
            )
        self.settings = CacheSettings(**settings)
        self._settings_hash = settings_hash(asdict(self.settings))
        self.shards = Shards.open(self.folder) if packed else None

    @classmethod
    def create(cls, folder: str | Path, root: str | Path, settings: CacheSettings) -> "ClipCache":
        """Open the cache in a folder with these settings, for writing single files.

        Clips of other settings become stale.
        """
        Path(folder).mkdir(parents=True, exist_ok=True)
        write_json(Path(folder) / "cache.json", {"format": FORMAT, **asdict(settings)})
        return cls(folder, root, packed=False)

    def key(self, clip: Path) -> str:
        """The name of a clip in the cache: 27 hexadecimal digits."""
        relative = os.path.relpath(clip, self.root).replace(os.sep, "/")
        return hashlib.sha256(relative.encode("utf-8", "surrogateescape")).hexdigest()[:27]

    def path(self, clip: Path) -> Path:
        """The cache's single file of a clip."""
        key = self.key(clip)
        return self.folder / key[:3] / f"{key[3:]}.clip"

    def write(self, clip: Path) -> tuple[int, str | None]:
        """Decode a clip and keep it.

        A clip that cannot be read is kept as such: reading it from the cache gives the same error.

        Returns:
            The size of its file in bytes, and the error if the clip cannot be read.
        """
        header: dict[str, Any] = {"source": fingerprint(clip), "settings": asdict(self.settings)}
        jpegs, motion = [], []
        try:
            indices, count, decoded = self._decode(clip)
            jpegs = _encode(decoded.rgb, self.settings.quality)
            header |= {"count": count, "numbers": indices, "lengths": [len(j) for j in jpegs]}
            if decoded.motion is not None:
                motion = [zlib.compress(field.tobytes()) for field in decoded.motion]
                header |= {"motion": [len(field) for field in motion]}
        except ClipError as error:
            header |= {"error": error.reason}
        content = entry_file(header, [*jpegs, *motion])
        path = self.path(clip)
        path.parent.mkdir(exist_ok=True)
        with atomic(path) as unfinished:
            unfinished.write_bytes(content)
        return len(content), header.get("error")

    def _decode(self, clip: Path) -> tuple[list[int], int, DecodedClip]:
        """The numbers of the frames to keep, how many frames there are, and the kept frames."""
        counts = []
        sampler = FrameSampler(self.settings.n_frames, views=self.settings.frames_per_segment)

        def choose(count: int) -> list[int]:
            counts.append(count)
            if count <= sampler.n_frames * sampler.views:
                return list(range(count))
            return sorted(set(sampler.indices(count)))

        size, motion = self.settings.image_size, self.settings.motion
        decoded = read_frames_and_motion(clip, choose, size, motion)
        return choose(counts[-1]), counts[-1], decoded

    def check(self, clip: Path, unreadable: bool = False) -> str | None:
        """Why a clip must be cached (again) before it can be read from here, or None.

        Args:
            unreadable: also report clips whose video could not be read.
        """
        if self.shards is not None:
            return self._check_packed(self.shards.find(self.key(clip)), clip, unreadable)
        try:
            with self._open(clip) as place:
                if unreadable and "error" in place.header:
                    return "could not be read"
        except FileNotFoundError:
            return "not in the cache"
        except (OSError, StaleCacheEntry) as error:
            return str(error)
        return None

    def _check_packed(self, entry: np.void | None, clip: Path, unreadable: bool) -> str | None:
        """`check` by the index alone, without reading the shards."""
        if entry is None:
            return "not in the cache"
        if entry["settings"] != self._settings_hash:
            return "cached with other settings"
        if [number for number in entry["source"].tolist() if number >= 0] != fingerprint(clip):
            return "changed since it was cached"
        return "could not be read" if unreadable and entry["error"] else None

    @contextlib.contextmanager
    def _open(self, clip: Path) -> Iterator[Place]:
        """What the cache holds of a clip, open for reading.

        Raises:
            FileNotFoundError: nothing.
            StaleCacheEntry: it is damaged, or not of this clip as it is now.
        """
        if self.shards is None:
            with open(self.path(clip), "rb", buffering=0) as file:
                place = read_entry_file(file)
                self._require_current(place.header, clip)
                yield place
        else:
            entry = self.shards.find(self.key(clip))
            if entry is None:
                raise FileNotFoundError
            place = self.shards.place(entry)
            self._require_current(place.header, clip)
            yield place

    def _require_current(self, header: dict[str, Any], clip: Path) -> None:
        if current_settings(header) != asdict(self.settings):
            raise StaleCacheEntry("cached with other settings")
        if header["source"] != fingerprint(clip):
            raise StaleCacheEntry("changed since it was cached")

    def read(
        self,
        clip: Path,
        sampler: FrameSampler | None = None,
        offsets: Sequence[float] | None = None,
        motion: StoredMotion | None = None,
    ) -> DecodedClip:
        """The frames that `read_clip` gives, and their motion, which the cache must hold.

        Of a long clip random sampling takes, in each segment, the kept frame nearest to the offset.

        Raises:
            ClipError: the clip is not in the cache, changed since, cannot be read, or the wanted
                frames of a long clip are not among those kept.
        """
        sampler = sampler or FrameSampler()
        hint = "run prepare_data.py cache again"
        try:
            with self._open(clip) as place:
                header = place.header
                if "error" in header:
                    raise ClipError(clip, header["error"])
                position = {index: k for k, index in enumerate(header["numbers"])}
                if offsets is not None and len(position) < header["count"]:
                    parts = self.settings.frames_per_segment
                    offsets = [(int(offset * parts) + 0.5) / parts for offset in offsets]
                wanted = sampler.indices(header["count"], offsets)
                if not position.keys() >= set(wanted):
                    raise ClipError(
                        clip,
                        f"the cache keeps {len(position)} of {header['count']} frames, but not all "
                        f"wanted ones ({sampler.sampling} sampling, {sampler.n_frames} frames, "
                        f"{sampler.views} views)",
                    )
                positions = {position[index] for index in wanted}
                frames = _read_jpegs(place, positions)
                fields = _read_motion(place, positions) if motion else {}
        except FileNotFoundError:
            raise ClipError(clip, f"not in the cache: {hint}") from None
        except (OSError, zlib.error, StaleCacheEntry) as error:  # PIL's errors are OSErrors too
            raise ClipError(clip, f"{error}: {hint}") from None
        order = [position[index] for index in wanted]
        rgb = np.stack([frames[k] for k in order])  # (V * T, H, W, 3)
        if not motion:
            return DecodedClip(rgb)
        side = grid_side(self.settings.image_size)
        codes = np.stack([np.frombuffer(fields[k], np.uint8) for k in order])
        return DecodedClip(rgb, codes.reshape(-1, 2, side, side))


def current_settings(header: dict[str, Any]) -> dict[str, Any]:
    """The settings that a clip was cached with, under today's names."""
    # The first caches held no motion and do not name their modality.
    return {"modality": "rgb", **_renamed(header["settings"])}


def _renamed(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings of an earlier version under today's names."""
    values = {_OLD_NAMES.get(name, name): value for name, value in settings.items()}
    if "modality" in values:
        values["modality"] = _OLD_VALUES.get(str(values["modality"]), values["modality"])
    return values


def _encode(frames: np.ndarray, quality: int) -> list[bytes]:
    """`(N, H, W, 3)` uint8 RGB as JPEGs that are not too large on average."""
    from PIL import Image  # not above: --help does without it

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


def _read_jpegs(place: Place, positions: set[int]) -> dict[int, np.ndarray]:
    """The frames at some positions."""
    from PIL import Image  # not above: --help does without it

    frames = {}
    pieces = read_pieces(place.file, place.frames, place.header["lengths"], positions)
    for position, content in pieces:
        with Image.open(io.BytesIO(content), formats=["jpeg"]) as image:
            frames[position] = np.asarray(image)
    return frames


def _read_motion(place: Place, positions: set[int]) -> dict[int, bytes]:
    """The motion at some positions."""
    pieces = read_pieces(place.file, place.motion, place.header["motion"], positions)
    return {position: zlib.decompress(piece) for position, piece in pieces}
