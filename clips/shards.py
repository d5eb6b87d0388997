"""Tar files that hold the clips of a cache: a few large files instead of one small file per clip.

A shard is an uncompressed POSIX tar archive (ustar) of the layout that the package webdataset
reads: the members of one clip follow each other and have the same stem, the clip's key.

- `KEY.json`: the header of the clip, see clips/cache_entry.py, with the CRC-32 of the rest;
- `KEY.mjpeg`: its frames, JPEGs one after another; the header has their lengths;
- `KEY.motion`: its motion, if the cache keeps motion.

A clip that cannot be read has a header alone. The key is a hash of the clip's path: it says in
which shard the clip is, and reveals no name. `shards.npz` has the place of each clip, so that a
clip is read without reading others. It holds the size and the time stamp of each shard too: a shard
that is not the one that was written is found when the cache is opened.

Names of members are compared, and never used as paths.
"""

import json
import os
import re
import tarfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, Self

import numpy as np

from clips.cache_entry import Place, StaleCacheEntry, parse_header, read_at
from utils.errors import UserError, describe_os_error
from utils.files import atomic

INDEX = "shards.npz"
MAX_SHARDS = 10_000

_NAME = re.compile(r"shard-(\d{5})-of-(\d{5})\.tar")
_HEADER_NAME = re.compile(r"([0-9a-f]{27})\.json")
_BLOCK = tarfile.BLOCKSIZE
_MAX_OPEN = 64  # shards that a process has open at a time

_ENTRY = np.dtype(
    [
        ("key", "S27"),
        ("shard", "<i4"),
        ("offset", "<i8"),  # of the first member, in bytes
        ("size", "<i8"),  # of all members together
        ("header", "<i8"),  # size of the JSON text
        ("source", "<i8", 2),  # see video.files.fingerprint; -1 where that is empty
        ("settings", "<u4"),  # see settings_hash
        ("error", "?"),
    ]
)
_SHARD = np.dtype([("size", "<i8"), ("mtime", "<i8")])  # bytes; nanoseconds, as in os.stat

AGAIN = "run python prepare_data.py cache again"


class Shards:
    """The shards of a cache, and where each clip lies in them.

    Every process opens the files that it reads. A process reads from one thread.
    """

    def __init__(self, folder: Path, entries: np.ndarray, shards: np.ndarray) -> None:
        self.folder = folder
        self.entries = entries  # sorted by key
        self._keys = np.ascontiguousarray(entries["key"])  # searching a column would copy it
        self.shards = shards
        self._files: dict[int, BinaryIO] = {}  # the one that was read last is the last

    @classmethod
    def open(cls, folder: Path) -> Self | None:
        """The shards of a folder; None if it has no index.

        Raises:
            UserError: the index is damaged, or is not of the shards that are there.
        """
        try:
            entries, shards = _read_index(folder / INDEX)
        except FileNotFoundError:
            return None
        found = cls(folder, entries, shards)
        for number, shard in enumerate(shards):
            try:
                size = found.path(number).stat().st_size
            except OSError as error:
                raise UserError(f"{describe_os_error(error)} ({AGAIN})") from None
            if size != shard["size"]:
                raise UserError(
                    f"{found.path(number)}: has {size:,} bytes, and {shard['size']:,} were "
                    f"written: {AGAIN}"
                )
        return found

    def __len__(self) -> int:
        return len(self.entries)

    def path(self, number: int) -> Path:
        """The file of a shard."""
        return shard_path(self.folder, number, len(self.shards))

    def find(self, key: str) -> np.void | None:
        """The row of a clip in the index, or None."""
        row = int(np.searchsorted(self._keys, key.encode()))
        found = row < len(self) and self._keys[row] == key.encode()
        return self.entries[row] if found else None

    def place(self, entry: np.void) -> Place:
        """Where the parts of a clip lie, and its header.

        Args:
            entry: its row in the index.

        Raises:
            StaleCacheEntry: the shard was changed after the cache was opened.
        """
        file, offset = self._file(int(entry["shard"])), int(entry["offset"])
        header = parse_header(read_at(file, offset + _BLOCK, int(entry["header"])))
        place = _place(file, offset, int(entry["header"]), header)
        if _end(place) != offset + entry["size"]:
            raise StaleCacheEntry("damaged in the cache")
        return place

    def members(self, entry: np.void) -> bytes:
        """All that a shard holds of a clip."""
        file = self._file(int(entry["shard"]))
        return read_at(file, int(entry["offset"]), int(entry["size"]))

    def check_contents(self) -> list[str]:
        """Read the shards whose time stamp is not that of the index, and compare all their clips.

        Returns:
            A line for each shard that differs.
        """
        problems = []
        for number, shard in enumerate(self.shards):
            path = self.path(number)
            if path.stat().st_mtime_ns != shard["mtime"]:
                expected = self.entries[self.entries["shard"] == number]
                if by_key(scan(path, number)).tobytes() != expected.tobytes():
                    problems.append(f"{path}: was changed after it was written")
        return problems

    def _file(self, number: int) -> BinaryIO:
        file = self._files.pop(number, None)
        if file is None:
            if len(self._files) >= _MAX_OPEN:
                self._files.pop(next(iter(self._files))).close()
            file = open(self.path(number), "rb", buffering=0)  # noqa: SIM115
        self._files[number] = file
        return file

    def close(self) -> None:
        """Close the files that this process has opened."""
        while self._files:
            self._files.popitem()[1].close()

    __del__ = close

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": {}}  # another process opens its own


def by_key(entries: np.ndarray) -> np.ndarray:
    """Rows of the index, sorted."""
    return entries[np.argsort(entries["key"])]


def settings_hash(settings: dict[str, Any]) -> int:
    """A number that differs for other settings of a cache."""
    return zlib.crc32(json.dumps(settings, sort_keys=True).encode())


def shard_of(key: str, n_shards: int) -> int:
    """The number of the shard that a clip belongs to."""
    return int(key[:12], 16) % n_shards


def shard_path(folder: Path, number: int, n_shards: int) -> Path:
    """The file of a shard."""
    return folder / f"shard-{number:05d}-of-{n_shards:05d}.tar"


def shard_count(folder: Path) -> int:
    """How many shards the cache in a folder is divided into, by their names; 0: there are none."""
    if not folder.is_dir():
        return 0
    counts = {int(match[2]) for path in folder.iterdir() if (match := _NAME.fullmatch(path.name))}
    return max(counts - {0}, default=0)


def members_of(key: str, header: dict[str, Any], frames: bytes, motion: bytes) -> tuple[bytes, int]:
    """The members of a clip as they are in a shard, and the size of the JSON text."""
    header = {name: value for name, value in header.items() if name != "crc32"}
    checksum = zlib.crc32(json.dumps(header).encode() + frames + motion)
    text = json.dumps({**header, "crc32": checksum}).encode()
    members = [_member(f"{key}.json", text)]
    if "error" not in header:
        members.append(_member(f"{key}.mjpeg", frames))
    if "motion" in header:
        members.append(_member(f"{key}.motion", motion))
    return b"".join(members), len(text)


def write_shard(path: Path, clips: Iterable[bytes]) -> None:
    """Write a shard, atomically.

    Args:
        clips: the members of each clip, see `members_of`.
    """
    with atomic(path) as unfinished, open(unfinished, "wb") as file:
        for members in clips:
            file.write(members)
        file.write(bytes(2 * _BLOCK))  # the end of an archive; tar pads it to a whole record
        file.write(bytes(-file.tell() % tarfile.RECORDSIZE))


def write_index(folder: Path, n_shards: int, entries: np.ndarray) -> None:
    """Write the index of the shards, atomically.

    Args:
        entries: as `scan` returns them, of all shards.
    """
    stats = [shard_path(folder, number, n_shards).stat() for number in range(n_shards)]
    shards = np.array([(status.st_size, status.st_mtime_ns) for status in stats], _SHARD)
    with atomic(folder / INDEX) as unfinished:
        np.savez(unfinished, entries=by_key(entries), shards=shards)


def scan(path: Path, number: int) -> np.ndarray:
    """The index of a shard, from the shard itself; clips that are damaged are left out.

    Everything in it is read and compared with its checksum.
    """
    entries: dict[str, tuple] = {}
    n_shards = int(_NAME.fullmatch(path.name)[2])
    with open(path, "rb", buffering=0) as file:
        for offset, key, size in _headers(path):
            if shard_of(key, n_shards) != number:
                continue
            try:
                header = parse_header(read_at(file, offset + _BLOCK, size))
                place = _place(file, offset, size, header)
                end = _end(place)
                if end > os.fstat(file.fileno()).st_size:
                    continue
                frames = read_at(file, place.frames, sum(header.get("lengths", [])))
                motion = read_at(file, place.motion, sum(header.get("motion", [])))
                expected = members_of(key, header, frames, motion)
                if (read_at(file, offset, end - offset), size) == expected:
                    entry = index_entry(key, number, offset, end - offset, size, header)
                    entries.setdefault(key, entry)
            except StaleCacheEntry:
                continue
    return np.array(list(entries.values()), _ENTRY)


def index_entry(
    key: str, number: int, offset: int, size: int, header_size: int, header: dict[str, Any]
) -> tuple:
    """A row of the index.

    Args:
        number: of the shard.
        offset: where the members of the clip begin.
        size: of all its members.
        header_size: of the JSON text of its header.
    """
    source = tuple(header["source"]) or (-1, -1)
    settings = settings_hash(header["settings"])
    return key, number, offset, size, header_size, source, settings, "error" in header


def recover(folder: Path, n_shards: int) -> Shards:
    """The clips in the shards that are there, whatever a killed process left or others changed.

    Shards that the index does not describe are read.
    """
    try:
        entries, shards = _read_index(folder / INDEX)
    except (OSError, UserError):
        entries, shards = np.empty(0, _ENTRY), np.empty(0, _SHARD)
    if len(shards) != n_shards:
        entries, shards = entries[:0], np.zeros(n_shards, _SHARD)
    parts = [entries[:0]]
    for number, shard in enumerate(shards):
        path = shard_path(folder, number, n_shards)
        if path.exists():
            status = path.stat()
            same = (status.st_size, status.st_mtime_ns) == (shard["size"], shard["mtime"])
            parts.append(entries[entries["shard"] == number] if same else scan(path, number))
    return Shards(folder, by_key(np.concatenate(parts)), shards)


def _read_index(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """The rows of the clips and of the shards.

    Raises:
        UserError: the file is damaged.
        FileNotFoundError: there is none.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            entries, shards = file["entries"], file["shards"]
    except FileNotFoundError:
        raise
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
        raise UserError(f"{path}: is damaged: {AGAIN}") from None
    if not _fits_together(entries, shards):
        raise UserError(f"{path}: is damaged: {AGAIN}")
    return entries, shards


def _fits_together(entries: np.ndarray, shards: np.ndarray) -> bool:
    """Whether these can be the two tables of an index."""
    if entries.dtype != _ENTRY or shards.dtype != _SHARD or not 0 < len(shards) <= MAX_SHARDS:
        return False
    if entries.ndim != 1 or shards.ndim != 1 or (entries["key"][1:] <= entries["key"][:-1]).any():
        return False
    if not len(entries):
        return True
    within = (entries["shard"] >= 0) & (entries["shard"] < len(shards)) & (entries["offset"] >= 0)
    if not within.all() or entries["header"].min() < 0 or entries["size"].min() < 0:
        return False
    room = shards["size"][entries["shard"]] - entries["offset"]
    return bool(((entries["size"] <= room) & (entries["header"] < entries["size"])).all())


def _member(name: str, content: bytes) -> bytes:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    return info.tobuf(tarfile.USTAR_FORMAT) + content + bytes(-len(content) % _BLOCK)


def _headers(path: Path) -> Iterator[tuple[int, str, int]]:
    """Offset, key and size of each header in a shard, up to where the shard is damaged."""
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                match = _HEADER_NAME.fullmatch(member.name)
                if match and member.type == tarfile.REGTYPE:
                    yield member.offset, match[1], member.size
    except (tarfile.TarError, OSError, ValueError):
        return


def _place(file: BinaryIO, offset: int, size: int, header: dict[str, Any]) -> Place:
    """Where the frames and the motion are of a clip whose members begin at `offset`.

    Args:
        size: of the JSON text of its header.
    """
    frames = offset + _BLOCK + _padded(size) + _BLOCK
    return Place(file, header, frames, frames + _padded(sum(header.get("lengths", []))) + _BLOCK)


def _end(place: Place) -> int:
    """Where the members of a clip end."""
    if "error" in place.header:
        return place.frames - _BLOCK
    if "motion" not in place.header:
        return place.motion - _BLOCK
    return place.motion + _padded(sum(place.header["motion"]))


def _padded(size: int) -> int:
    return size + -size % _BLOCK
