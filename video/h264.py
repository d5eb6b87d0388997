"""Finds the packets of an H.264 stream that must be decoded to get certain frames.

Most frames of a usual file are disposable: no other frame is predicted from them (every slice has
nal_ref_idc 0; ITU-T H.264, 7.4.1). Disposable frames that are not wanted need not be decoded. The
same holds for a group of pictures without a wanted frame, and for the rest of a group after its
last wanted frame, because the next group starts at an IDR picture, which depends on nothing before
it. The wanted frames come out exactly as if everything were decoded.
"""

from collections.abc import Collection, Sequence
from enum import Enum
from typing import NamedTuple

_SLICE, _IDR_SLICE = 1, 5

_SEQUENCE_PARAMETERS, _PICTURE_PARAMETERS = 7, 8

_HARMLESS = {6, 9, 12}  # supplemental information, access unit delimiter, filler


class Kind(Enum):
    """How the pictures that follow in decoding order depend on a picture."""

    IDR = "they depend on nothing before it"
    REFERENCE = "they may depend on it"
    DISPOSABLE = "they do not depend on it"


class Picture(NamedTuple):
    """A packet that holds one picture."""

    pts: int
    kind: Kind
    parameters: frozenset[int]  # types of the parameter sets in the packet


def length_size(avcc: bytes | None) -> int | None:
    """The number of bytes of a NAL unit's length field, from a container's avcC record.

    None if the record is no avcC: then units are found by start codes, or it is not H.264.
    """
    return (avcc[4] & 3) + 1 if avcc and len(avcc) > 6 and avcc[0] == 1 else None


def picture(pts: int, packet: bytes | memoryview, length_size: int) -> Picture | None:
    """The picture in a packet, from its NAL units; None if anything about them is unusual."""
    kinds, parameters = set(), set()
    position, end = 0, len(packet)
    while position + length_size < end:
        length = int.from_bytes(packet[position : position + length_size], "big")
        position += length_size
        header = packet[position]
        unit, reference = header & 31, bool(header >> 5 & 3)
        if unit in (_SLICE, _IDR_SLICE):
            kinds.add((unit, reference))
        elif unit in (_SEQUENCE_PARAMETERS, _PICTURE_PARAMETERS):
            parameters.add(unit)
        elif unit not in _HARMLESS:
            return None
        position += max(1, length)
    if position != end or len(kinds) != 1:
        return None
    ((unit, reference),) = kinds
    if unit == _IDR_SLICE:
        kind = Kind.IDR
    else:
        kind = Kind.REFERENCE if reference or parameters else Kind.DISPOSABLE
    return Picture(pts, kind, frozenset(parameters))


def is_reference(packet: bytes, length_size: int | None) -> bool:
    """Whether other pictures may be predicted from a packet's picture, by its first slice.

    Args:
        length_size: result of `length_size`; None where units are found by start codes.
    """
    position = 0
    while True:
        if length_size is None:
            position = packet.find(b"\0\0\1", position) + 3
            length = 1
        else:
            length = int.from_bytes(packet[position : position + length_size], "big")
            position += length_size
        if position < (length_size or 3) or position >= len(packet):
            return True  # without a slice it is unknown
        if _SLICE <= packet[position] & 31 <= _IDR_SLICE:
            return bool(packet[position] >> 5 & 3)
        position += max(1, length)


def frame_numbers(pictures: Sequence[Picture]) -> list[int] | None:
    """The frame number of each packet, in display order.

    None if the timestamps do not determine it: two are equal, the stream does not start at an IDR
    picture, or time runs backwards from one IDR picture to the next.
    """
    order = sorted(range(len(pictures)), key=lambda index: pictures[index].pts)
    numbers = [0] * len(pictures)
    for number, index in enumerate(order):
        numbers[index] = number
    if len({picture.pts for picture in pictures}) < len(pictures):
        return None
    groups = _groups(pictures)
    if not groups or groups[0].start != 0:
        return None
    if any(numbers[g.start] != g.start or max(numbers[g.start : g.stop]) >= g.stop for g in groups):
        return None
    # Any group may be left out. So parameter sets must come with every group, or with none.
    in_idr = {pictures[group.start].parameters for group in groups}
    elsewhere = any(p.parameters for p in pictures if p.kind is not Kind.IDR)
    if elsewhere or len(in_idr) > 1 or len(next(iter(in_idr))) == 1:
        return None
    return numbers


def needed(
    pictures: Sequence[Picture], numbers: Sequence[int], wanted: Collection[int]
) -> list[bool]:
    """For each packet, whether it must be decoded to get the wanted frames."""
    wanted = set(wanted)
    decode = [False] * len(pictures)
    for group in _groups(pictures):
        last = max((index for index in group if numbers[index] in wanted), default=-1)
        for index in range(group.start, last + 1):
            decode[index] = pictures[index].kind is not Kind.DISPOSABLE or numbers[index] in wanted
    return decode


def _groups(pictures: Sequence[Picture]) -> list[range]:
    """The groups of pictures, from each IDR picture to the next, in decoding order."""
    starts = [index for index, picture in enumerate(pictures) if picture.kind is Kind.IDR]
    ends = [*starts[1:], len(pictures)]
    return [range(start, end) for start, end in zip(starts, ends, strict=True)]
