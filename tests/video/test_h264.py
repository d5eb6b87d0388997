"""The packets that must be decoded, on packets written by hand."""

import pytest

from video.h264 import Kind, Picture, frame_numbers, length_size, needed, picture

IDR, REFERENCE, DISPOSABLE = Kind.IDR, Kind.REFERENCE, Kind.DISPOSABLE
NONE, BOTH = frozenset(), frozenset({7, 8})


def packet(*units: tuple[int, int], size: int = 4) -> bytes:
    """NAL units (nal_ref_idc, nal_unit_type) with three bytes of payload, length-prefixed."""
    return b"".join(
        (4).to_bytes(size, "big") + bytes([reference << 5 | kind, 1, 2, 3])
        for reference, kind in units
    )


@pytest.mark.parametrize(
    ("units", "wanted"),
    [
        ([(3, 5)], (IDR, NONE)),
        ([(3, 7), (3, 8), (0, 6), (3, 5), (3, 5)], (IDR, BOTH)),
        ([(2, 1)], (REFERENCE, NONE)),
        ([(0, 9), (0, 6), (0, 1), (0, 1)], (DISPOSABLE, NONE)),
        ([(3, 8), (0, 1)], (REFERENCE, frozenset({8}))),  # a parameter set must not get lost
        ([(0, 1), (1, 1)], None),  # slices of one picture must agree
        ([(0, 6)], None),  # no picture in it
        ([(0, 1), (0, 14)], None),  # scalable or 3D video
        ([(2, 2)], None),  # data partitions
    ],
)
@pytest.mark.parametrize("size", [1, 2, 4])
def test_packets_by_hand(units, wanted, size: int) -> None:
    result = picture(7, packet(*units, size=size), size)
    assert result == (wanted and Picture(7, *wanted))


@pytest.mark.parametrize("data", [b"", b"\0", packet((0, 1))[:-1], packet((0, 1)) + b"\0\0\0\x09"])
def test_broken_packet_is_unusual(data: bytes) -> None:
    assert picture(0, data, 4) is None


def test_length_size_of_an_avcc_record() -> None:
    assert length_size(bytes([1, 100, 0, 31, 0xFF, 0xE1, 0, 28])) == 4
    assert length_size(bytes([1, 100, 0, 31, 0xFD, 0xE1, 0, 28])) == 2
    assert length_size(bytes([0, 0, 0, 1, 0x67, 0, 0, 0])) is None  # start codes
    assert length_size(None) is None


def stream(*pictures: tuple) -> list[Picture]:
    return [Picture(pts, kind, rest[0] if rest else NONE) for pts, kind, *rest in pictures]


# I0 P4 B2 b1 b3 | I5 P7 b6, in decode order
TWO_GROUPS = stream(
    (0, IDR), (40, REFERENCE), (20, REFERENCE), (10, DISPOSABLE), (30, DISPOSABLE),
    (50, IDR), (70, REFERENCE), (60, DISPOSABLE),
)  # fmt: skip


def test_frames_are_numbered_in_display_order() -> None:
    assert frame_numbers(TWO_GROUPS) == [0, 4, 2, 1, 3, 5, 7, 6]
    late = [p._replace(pts=p.pts * 3 - 77) for p in TWO_GROUPS]  # only the order counts
    assert frame_numbers(late) == [0, 4, 2, 1, 3, 5, 7, 6]


@pytest.mark.parametrize(
    ("wanted", "decoded"),
    [
        ({0, 7}, [1, 0, 0, 0, 0, 1, 1, 0]),
        ({1}, [1, 1, 1, 1, 0, 0, 0, 0]),
        ({6}, [0, 0, 0, 0, 0, 1, 1, 1]),
        ({3, 5}, [1, 1, 1, 0, 1, 1, 0, 0]),
        (set(range(8)), [1] * 8),
    ],
)
def test_only_what_wanted_frames_rest_on_is_decoded(wanted: set[int], decoded: list[int]) -> None:
    assert needed(TWO_GROUPS, frame_numbers(TWO_GROUPS), wanted) == [bool(d) for d in decoded]


@pytest.mark.parametrize(
    "pictures",
    [
        stream((0, IDR), (0, REFERENCE)),  # two frames at one time
        stream((0, REFERENCE), (1, IDR)),  # does not start at an IDR picture
        stream((5, IDR), (6, REFERENCE), (0, IDR), (1, REFERENCE)),  # time starts anew
        stream((0, IDR), (9, REFERENCE), (5, IDR), (6, REFERENCE)),  # groups overlap in time
        stream((0, IDR, BOTH), (1, IDR)),  # the second group needs the first one's parameters
        stream((0, IDR, frozenset({7})), (1, IDR, frozenset({7}))),
        stream((0, IDR), (1, REFERENCE, BOTH)),
    ],
)
def test_unusual_streams_are_not_numbered(pictures: list[Picture]) -> None:
    assert frame_numbers(pictures) is None


def test_parameters_with_every_group_are_fine() -> None:
    assert frame_numbers(stream((0, IDR, BOTH), (1, REFERENCE), (2, IDR, BOTH))) == [0, 1, 2]
