"""Which packets of an H.264 stream must be decoded to see certain frames. Nothing is decoded here.

Most frames of a usual file are disposable: no other frame is predicted from them (every slice has
nal_ref_idc 0; ITU-T H.264, 7.4.1). Those that nobody wants need not be decoded at all. Nor does a
group of pictures without a wanted frame, nor its rest after the last wanted one: the next group
starts at an IDR picture, which forgets everything before it. What is left is decoded exactly as if
everything were.
"""

from collections.abc import Collection, Sequence
from enum import Enum
from typing import NamedTuple

_SLICE, _IDR_SLICE = 1, 5

_SEQUENCE_PARAMETERS, _PICTURE_PARAMETERS = 7, 8

_HARMLESS = {6, 9, 12}  # supplemental information, access unit delimiter, filler


class Kind(Enum):
    """What a packet's picture is to the pictures after it."""

    IDR = "they need nothing from before it"
    REFERENCE = "they may need it"
    DISPOSABLE = "they do not need it"


class Picture(NamedTuple):
    """A packet that holds one picture."""

    pts: int
    kind: Kind
    parameters: frozenset[int]  # which parameter sets it brings along


def length_size(avcc: bytes | None) -> int | None:
    """How many bytes tell a NAL unit's length, from a container's avcC record.

    None if it is not one: then units are found by start codes, or the stream is not H.264.
    """
    return (avcc[4] & 3) + 1 if avcc and len(avcc) > 6 and avcc[0] == 1 else None


def picture(pts: int, packet: bytes | memoryview, length_size: int) -> Picture | None:
    """Look at a packet's NAL units. None if there is anything unusual about them."""
    kinds, parameters = set(), set()
    place, end = 0, len(packet)
    while place + length_size < end:
        length = int.from_bytes(packet[place : place + length_size], "big")
        place += length_size
        header = packet[place]
        unit, reference = header & 31, bool(header >> 5 & 3)
        if unit in (_SLICE, _IDR_SLICE):
            kinds.add((unit, reference))
        elif unit in (_SEQUENCE_PARAMETERS, _PICTURE_PARAMETERS):
            parameters.add(unit)
        elif unit not in _HARMLESS:
            return None
        place += max(1, length)
    if place != end or len(kinds) != 1:
        return None
    ((unit, reference),) = kinds
    if unit == _IDR_SLICE:
        kind = Kind.IDR
    else:
        kind = Kind.REFERENCE if reference or parameters else Kind.DISPOSABLE
    return Picture(pts, kind, frozenset(parameters))


def is_reference(packet: bytes, length_size: int | None) -> bool:
    """Whether other pictures may be predicted from a packet's picture, by its first slice.

    `length_size` as from the function of that name: None where units are found by start codes.
    """
    place = 0
    while True:
        if length_size is None:
            place = packet.find(b"\0\0\1", place) + 3
            length = 1
        else:
            length = int.from_bytes(packet[place : place + length_size], "big")
            place += length_size
        if place < (length_size or 3) or place >= len(packet):
            return True  # no slice in it: who knows
        if _SLICE <= packet[place] & 31 <= _IDR_SLICE:
            return bool(packet[place] >> 5 & 3)
        place += max(1, length)


def frame_numbers(pictures: Sequence[Picture]) -> list[int] | None:
    """Each packet's place in display order.

    None where the time stamps do not tell it for sure: two are equal, the stream does not start at
    an IDR picture, or time runs backwards from one IDR picture to the next.
    """
    order = sorted(range(len(pictures)), key=lambda place: pictures[place].pts)
    numbers = [0] * len(pictures)
    for number, place in enumerate(order):
        numbers[place] = number
    if len({one.pts for one in pictures}) < len(pictures):
        return None
    groups = _groups(pictures)
    if not groups or groups[0].start != 0:
        return None
    if any(numbers[g.start] != g.start or max(numbers[g.start : g.stop]) >= g.stop for g in groups):
        return None
    brought = {pictures[group.start].parameters for group in groups}
    loose = any(one.parameters for one in pictures if one.kind is not Kind.IDR)
    # Parameter sets inside the stream must come with every group: a group may be left out.
    if loose or len(brought) > 1 or len(next(iter(brought))) == 1:
        return None
    return numbers


def needed(
    pictures: Sequence[Picture], numbers: Sequence[int], wanted: Collection[int]
) -> list[bool]:
    """For each packet, whether it must be decoded to see the wanted frames."""
    wanted = set(wanted)
    decode = [False] * len(pictures)
    for group in _groups(pictures):
        last = max((place for place in group if numbers[place] in wanted), default=-1)
        for place in range(group.start, last + 1):
            decode[place] = pictures[place].kind is not Kind.DISPOSABLE or numbers[place] in wanted
    return decode


def _groups(pictures: Sequence[Picture]) -> list[range]:
    """The groups of pictures: from each IDR picture to the next, in decode order."""
    starts = [place for place, one in enumerate(pictures) if one.kind is Kind.IDR]
    return [range(a, b) for a, b in zip(starts, [*starts[1:], len(pictures)], strict=True)]
