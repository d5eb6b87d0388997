"""What the cache holds of one clip: a header that describes it, its frames, and their motion.

The header is JSON: the size and time stamp of the clip's file, the settings of the cache, and
either the error with which the clip cannot be read, or the numbers of the frames and the lengths in
bytes of their JPEGs and of their motion (zlib).
"""

import json
import os
import struct
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO, NamedTuple

from utils.errors import UserError
from utils.files import parse_json

# See `utils.structure.find_mismatch`.
HEADER = {
    "source": [int],
    "settings": dict,
    "error?": str,
    "count?": int,
    "numbers?": [int],
    "lengths?": [int],
    "motion?": [int],
    "crc32?": int,  # in shards
}


_MAGIC = b"clipjpg\n"


class StaleCacheEntry(Exception):
    """What the cache holds of a clip is damaged or out of date."""


class Place(NamedTuple):
    """Where the parts of an entry lie in a file that is open."""

    file: BinaryIO
    header: dict[str, Any]
    frames: int
    """offset of the first JPEG"""
    motion: int
    """offset of the first motion"""


def parse_header(content: bytes) -> dict[str, Any]:
    """The header of an entry.

    Raises:
        StaleCacheEntry: it is damaged.
    """
    try:
        header = parse_json(content, "the cache", HEADER)
    except (UserError, UnicodeDecodeError):
        raise StaleCacheEntry("damaged in the cache") from None
    complete = "error" in header or {"count", "numbers", "lengths"} <= header.keys()
    source = header["source"]  # see video.files.fingerprint
    known = len(source) in (0, 2) and all(0 <= number < 2**63 for number in source)
    if not complete or not known or min(piece_lengths(header), default=0) < 0:
        raise StaleCacheEntry("damaged in the cache")
    return header


def piece_lengths(header: dict[str, Any]) -> list[int]:
    """The lengths of all JPEGs and then of all motion, in bytes."""
    return [*header.get("lengths", []), *header.get("motion", [])]


def entry_file(header: dict[str, Any], pieces: Sequence[bytes]) -> bytes:
    """The content of a file that holds one entry alone.

    Args:
        pieces: all JPEGs and then all motion.
    """
    text = json.dumps(header).encode()
    return b"".join([_MAGIC, struct.pack("<I", len(text)), text, *pieces])


def read_entry_file(file: BinaryIO) -> Place:
    """The parts of the entry in such a file.

    Raises:
        StaleCacheEntry: it is damaged.
    """
    start, size = len(_MAGIC) + 4, os.fstat(file.fileno()).st_size
    magic, length = struct.unpack(f"<{len(_MAGIC)}sI", read_at(file, 0, start))
    if magic != _MAGIC:
        raise StaleCacheEntry("damaged in the cache")
    header = parse_header(read_at(file, start, min(length, size - start)))
    frames = start + length
    if frames + sum(piece_lengths(header)) != size:
        raise StaleCacheEntry("damaged in the cache")
    return Place(file, header, frames, frames + sum(header.get("lengths", [])))


def read_at(file: BinaryIO, offset: int, length: int) -> bytes:
    """`length` bytes from `offset` on.

    Where the system can, the position in the file stays: processes that were forked share it.

    Raises:
        StaleCacheEntry: the file ends before.
    """
    if hasattr(os, "pread"):
        content = os.pread(file.fileno(), length, offset)
    else:  # Windows, which does not fork
        file.seek(offset)
        content = file.read(length)
    if len(content) != length:
        raise StaleCacheEntry("damaged in the cache")
    return content


def read_pieces(
    file: BinaryIO, offset: int, lengths: Sequence[int], positions: set[int]
) -> Iterator[tuple[int, bytes]]:
    """The position and content of each wanted piece, of those that follow each other from `offset`
    on."""
    for position, length in enumerate(lengths):
        if position in positions:
            yield position, read_at(file, offset, length)
        offset += length
