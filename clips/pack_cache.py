"""Pack the single files of a cache into tar files: the last step of `prepare_data.py cache`.

One process packs. It copies, and decodes nothing: an existing cache can be packed too. A shard is
written beside the one it replaces, and appears whole; then the single files that it holds are
deleted. So the disk needs room for one more shard. Killed at any moment, packing continues at the
next start: what is in shards that the index does not describe is read from the shards.
"""

import contextlib
import copy
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from clips.cache import ClipCache, current_settings
from clips.cache_entry import StaleCacheEntry, read_at, read_entry_file
from clips.shards import (
    INDEX,
    Shards,
    index_entry,
    members_of,
    recover,
    shard_count,
    shard_of,
    shard_path,
    write_index,
    write_shard,
)
from utils.errors import UserError

_KEY = re.compile(r"[0-9a-f]{27}")


def choose_shards(folder: Path, wanted: int) -> int:
    """The number of tar files of a cache: `wanted`, or, if that is 0, as many as there are.

    Raises:
        UserError: there is another number of them already.
    """
    existing = shard_count(folder)
    if existing and wanted not in (0, existing):
        raise UserError(
            f"{folder}: is divided into {existing} tar files, not {wanted}: give --shards "
            f"{existing}, or leave it out, or fill another folder (--output)"
        )
    return existing or wanted


def packed_part(cache: ClipCache, n_shards: int) -> ClipCache:
    """The same cache with the clips that are in tar files already.

    Without tar files it has no clips, and an index that is left of others is deleted.
    """
    part = copy.copy(cache)
    part.shards = recover(cache.folder, n_shards)
    if not n_shards:
        (cache.folder / INDEX).unlink(missing_ok=True)
    return part


def pack(cache: ClipCache, packed: Shards) -> None:
    """Move all single files of a cache into its shards, and write the index."""
    n_shards = len(packed.shards)
    singles: dict[int, dict[str, Path]] = defaultdict(dict)
    for path in cache.folder.glob("???/*.clip"):
        key = path.parent.name + path.stem
        if _KEY.fullmatch(key):
            singles[shard_of(key, n_shards)][key] = path
    parts = []
    for number in tqdm(range(n_shards), "packing", unit="file", leave=False, delay=1):
        old = packed.entries[packed.entries["shard"] == number]
        path, new = shard_path(cache.folder, number, n_shards), singles[number]
        if path.exists() and all(_is_packed(packed, key, new[key]) for key in new):
            parts.append(old)
        else:
            rows: list[tuple] = []
            write_shard(path, _contents(packed, old, new, number, rows))
            packed.close()  # the file that has just been replaced
            parts.append(np.array(rows, old.dtype))
        for single in new.values():
            single.unlink()
    for folder in cache.folder.glob("???"):
        with contextlib.suppress(OSError):  # it holds something else
            folder.rmdir()
    write_index(cache.folder, n_shards, np.concatenate(parts))


def _is_packed(packed: Shards, key: str, single: Path) -> bool:
    """Whether a shard holds what a single file holds, or the single file is damaged."""
    content, entry = _read_single(key, single), packed.find(key)
    return content is None or (entry is not None and packed.members(entry) == content[0])


def _contents(
    packed: Shards, old: np.ndarray, new: dict[str, Path], number: int, rows: list[tuple]
) -> Iterator[bytes]:
    """The members of each clip of a shard, sorted by key; the rows of the index go into `rows`."""
    entries = {entry["key"].decode(): entry for entry in old}
    offset = 0
    for key in sorted(entries.keys() | new.keys()):
        content = _read_single(key, new[key]) if key in new else None
        if content is not None:
            members, row = content
        elif key in entries:
            members, row = packed.members(entries[key]), entries[key].item()
        else:
            continue
        rows.append((key, number, offset, *row[3:]))
        offset += len(members)
        yield members


def _read_single(key: str, path: Path) -> tuple[bytes, tuple] | None:
    """The members of a clip from its single file, and its row; None if the file is damaged."""
    try:
        with open(path, "rb", buffering=0) as file:
            place = read_entry_file(file)
            frames = read_at(file, place.frames, place.motion - place.frames)
            motion = read_at(file, place.motion, sum(place.header.get("motion", [])))
    except StaleCacheEntry:
        return None
    header = {**place.header, "settings": current_settings(place.header)}
    members, size = members_of(key, header, frames, motion)
    return members, index_entry(key, 0, 0, len(members), size, header)
