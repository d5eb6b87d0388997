"""Motion vectors of encoded clips, and by hand; every real file gives a clip or one error."""

import csv
import shutil
import struct
from pathlib import Path

import av
import numpy as np
import pytest
from helpers import SIDE, moving, pan, pixels, scene

from video import decoder, h264
from video.clip_reader import read_frames_and_motion
from video.container import ClipError
from video.decoder import read_frames
from video.motion import ZERO, encode_motion
from video.motion_vectors import (
    block_sums,
    decoding_order,
    mean_motion,
    reference_distances,
    resample_sums,
    rotate_field,
)

FIELDS = ("source", "w", "h", "dst_x", "dst_y", "motion_x", "motion_y", "motion_scale")

ONE_REFERENCE = {"refs": "1", "weightp": "0"}  # in each list: only then vectors are all exact


def encode(
    path: Path, frames, codec: str = "libx264", rotation: int = 0, **options: str
) -> list[str]:
    """Write frames with a codec; returns the types of the pictures, as shown."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(
            codec, rate=25, options={"threads": "1", **ONE_REFERENCE, **options}
        )
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        stream.bit_rate = 2_000_000
        for frame in frames:
            video_frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            container.mux(stream.encode(video_frame))
        container.mux(stream.encode(None))
    if rotation:
        turn(path, rotation)
    with av.open(str(path)) as container:
        return [av.video.frame.PictureType(f.pict_type).name for f in container.decode(video=0)]


def turn(path: Path, degrees: int) -> None:
    """Write a rotation (counter-clockwise) into the display matrix of an MP4's video track."""
    content = bytearray(path.read_bytes())
    start = content.index(b"tkhd") + 4 + 40  # the matrix of version 0 of the box
    sine, cosine = {90: (1, 0), 180: (0, -1), 270: (-1, 0)}[degrees]
    one = 0x10000
    matrix = (cosine * one, -sine * one, 0, sine * one, cosine * one, 0, 0, 0, 0x40000000)
    content[start : start + 36] = struct.pack(">9i", *matrix)
    path.write_bytes(content)


def all_fields(path: Path, size: int = 64) -> tuple[np.ndarray, np.ndarray]:
    return read_frames_and_motion(path, lambda n: range(n), size, "mv")


@pytest.mark.parametrize("options", [{"bf": "0"}, {"bf": "2", "b-pyramid": "none"}, {"bf": "3"}])
@pytest.mark.parametrize(("right", "down"), [(3, 0), (-3, 0), (0, 3), (2, -4)])
def test_vectors_of_a_pan(tmp_path: Path, options: dict, right: int, down: int) -> None:
    """In each frame, whichever pictures it was predicted from."""
    types = encode(tmp_path / "clip.mp4", pan(right, down), **options, b_strategy="0")
    assert ("B" in types) == (options["bf"] != "0")
    _, fields = all_fields(tmp_path / "clip.mp4")
    assert (fields[0] == ZERO).all()
    for field in fields[1:]:
        assert np.allclose(pixels(field), (right, down), atol=0.3), types


@pytest.mark.parametrize("bf", ["0", "2"])
@pytest.mark.parametrize(
    ("codec", "name"),
    [("mpeg4", "clip.avi"), ("mpeg2video", "clip.mpg"), ("mpeg4", "clip.mkv"),
     ("libx264", "clip.ts"), ("libx264", "clip.avi")],
)  # fmt: skip
def test_other_codecs_and_containers(tmp_path: Path, codec: str, name: str, bf: str) -> None:
    """Also where time stamps are not those of showing (AVI), or units have start codes (TS).

    FFmpeg tells no vectors of the B-frames of MPEG-4 part 2.
    """
    types = encode(tmp_path / name, pan(3, -2), codec, bf=bf, g="100")
    _, fields = all_fields(tmp_path / name)
    found = np.array([pixels(field) for field in fields])
    assert len(fields) == len(types) >= 11
    told = np.array([kind == "P" or (kind == "B" and codec != "mpeg4") for kind in types])
    if codec != "libx264":  # nor those of the last frame, where it had to be waited for
        told[-1] = found[-1].any()
    assert np.allclose(found[told], (3, -2), atol=0.3)
    assert (found[~told] == 0).all()


@pytest.mark.parametrize("rotation", [90, 180, 270])
def test_vectors_turn_with_the_file(tmp_path: Path, rotation: int) -> None:
    """A turned file gives the motion that its upright frames show, here of one side only."""
    frames = [frame.copy() for frame in pan(4, 2, height=64, width=SIDE)]
    still = scene(64, SIDE)
    for frame in frames:
        frame[:, : SIDE // 2] = still[:, : SIDE // 2]  # nothing moves on the left
    encode(tmp_path / "plain.mp4", frames)
    turn(Path(shutil.copy(tmp_path / "plain.mp4", tmp_path / "turned.mp4")), rotation)
    straight, fields = all_fields(tmp_path / "plain.mp4")
    upright, motion = all_fields(tmp_path / "turned.mp4")
    quarters = rotation // 90
    assert np.array_equal(upright, np.rot90(straight, quarters, axes=(1, 2)))
    wanted = {90: (2 / 64, -4 / SIDE), 180: (-4 / SIDE, -2 / 64), 270: (-2 / 64, 4 / SIDE)}
    part = np.rot90(np.arange(256).reshape(16, 16) % 16 >= 9, quarters)
    for before, field in zip(fields, motion, strict=True):
        again = encode_motion(rotate_field(decoded(before), quarters))
        assert np.abs(field.astype(int) - again).max() < 2
    moved = np.median(decoded(motion[1:])[:, :, part], axis=(0, 2))
    assert np.allclose(moved, wanted[rotation], atol=0.004)


def decoded(field: np.ndarray) -> np.ndarray:
    return (field.astype(float) - 128) * 0.05 / 127


@pytest.mark.parametrize("options", [{}, {"bf": "0"}, {"g": "7"}, {"g": "5", "bf": "2"}])
def test_needed_pictures_have_the_motion_of_a_full_decoding(
    tmp_path: Path, monkeypatch, options: dict
) -> None:
    encode(tmp_path / "clip.mp4", pan(2, 1, 24), **options)
    frames, fields = all_fields(tmp_path / "clip.mp4")
    wanted = [0, 3, 4, 13, 22, 23]
    some = read_frames_and_motion(tmp_path / "clip.mp4", lambda n: wanted, 64, "mv")
    monkeypatch.setattr(decoder, "_read_needed", lambda *_: None)
    every = read_frames_and_motion(tmp_path / "clip.mp4", lambda n: wanted, 64, "mv")
    for part, whole in ((some, every), (some, (frames[wanted], fields[wanted]))):
        assert np.array_equal(part[0], whole[0])
        assert np.array_equal(part[1], whole[1])


def test_vectors_do_not_change_the_pictures(tmp_path: Path) -> None:
    frames, _ = all_fields(moving(tmp_path / "clip.mp4"))
    assert np.array_equal(frames, read_frames(tmp_path / "clip.mp4", lambda n: range(n), 64))


@pytest.mark.parametrize("codec", ["mjpeg", "libvpx-vp9"])
def test_codecs_without_vectors_are_refused(tmp_path: Path, codec: str) -> None:
    encode(tmp_path / "clip.mkv", pan(1, 0, 3), codec)
    with pytest.raises(
        ClipError, match=r"clip.mkv: its codec, .* no motion vectors: use rgb\+flow"
    ):
        all_fields(tmp_path / "clip.mkv")


def vectors(*blocks: tuple) -> np.ndarray:
    return np.array(list(blocks), [(name, np.int32) for name in FIELDS])


def test_blocks_are_added_to_the_cells_they_cover() -> None:
    """A 16 x 8 block of list 0, an 8 x 8 one of list 1 over it, one that hangs over the edge."""
    array = vectors(
        (-1, 16, 8, 8, 4, -8, 4, 4), (1, 8, 8, 12, 4, 6, 0, 2), (-1, 16, 16, 24, 16, 4, 4, 4)
    )  # source, width, height, centre, vector, scale
    sums = block_sums(array, 28, 20) * np.array([28, 20, 1]).reshape(3, 1, 1)
    assert sums.shape == (2, 3, 3, 4)
    first, second = np.zeros((3, 3, 4)), np.zeros((3, 3, 4))
    first[:, 0, 0] = first[:, 0, 1] = (-2, 1, 1)
    first[:, 1:, 2:] = np.array([1, 1, 1]).reshape(3, 1, 1)
    second[:, 0, 1] = (3, 0, 1)
    assert np.allclose(sums, [first, second])
    motion = mean_motion(sums, (2, -3))
    # -(-2, 1) / 2 from list 0 and (3, 0) / 3 from list 1; (1, 1) / -2; nothing
    assert np.allclose(motion[:, 0, 0], (1, -0.5))
    assert np.allclose(motion[:, 0, 1], (1, -0.25))
    assert np.allclose(motion[:, 2, 3], (-0.5, -0.5))
    assert np.allclose(motion[:, 2, 0], 0)


def test_grid_ends_with_the_picture() -> None:
    """Two cells a side of a picture that is one and a half of them wide, one and a quarter high."""
    sums = np.broadcast_to(np.float32([[1, 3], [5, 7]]), (2, 3, 2, 2))
    grid = resample_sums(sums, 12, 10, 3)
    assert grid.shape == (2, 3, 3, 3)
    across = np.array([1, 1.5, 2.5])  # at 1/4, 3/4 and 5/4 cells, of 1 and 3 at 1/2 and 3/2
    assert np.allclose(grid[0, 0], across + np.array([[0], [0.5], [13 / 6]]), atol=1e-5)


def test_distances_of_references_by_hand() -> None:
    # I0 b1 B2 b3 P4 b5 P6, each pair (time, reference), as decoded
    order = [(0, True), (4, True), (2, True), (1, False), (3, False), (6, True), (5, False)]
    distances = reference_distances(order)
    assert distances == {
        0: (1, -1), 4: (4, 4), 2: (2, -2), 1: (1, -1), 3: (1, -1), 6: (2, 2), 5: (1, -1),
    }  # fmt: skip
    frames = [(0, True), (1, False), (2, True)]  # shown as I B P; packets I P B
    packets = [(70, True), (71, True), (72, False)]
    assert decoding_order(packets, [(70, True), (72, False), (71, True)]) == [
        (0, True), (2, True), (1, False)
    ]  # fmt: skip
    assert decoding_order([(None, True)] * 3, frames) == [(0, True), (2, True), (1, False)]
    plain = reference_distances([(0, True), (3, True), (1, False), (2, False)])
    assert plain[1] == (1, -2)
    assert plain[2] == (2, -1)  # 1 is no reference


def test_reference_slices() -> None:
    starts = [b"\0\0\1", b"\0\0\0\1"]
    for header, wanted in ((0x65, True), (0x41, True), (0x01, False)):
        units = [bytes([0x09, 0xF0]), bytes([header, 1, 2, 3])]
        for start in starts:
            assert h264.is_reference(b"".join(start + u for u in units), None) is wanted
        sized = b"".join(len(unit).to_bytes(4, "big") + unit for unit in units)
        assert h264.is_reference(sized, 4) is wanted
    for nothing in (b"", b"\0\0\1", b"\0\0\0\2\x09\xf0"):
        assert h264.is_reference(nothing, None)
        assert h264.is_reference(nothing, 4)


with open(Path(__file__).parent.parent / "real_outcomes.csv", encoding="utf-8") as table:
    OUTCOMES = list(csv.DictReader(table))


@pytest.mark.parametrize(("motion", "step"), [("mv", 1), ("flow", 6)])
def test_real_files_give_a_clip_or_one_error(real: Path, motion: str, step: int) -> None:
    odd = [row for row in OUTCOMES if row["path"].startswith("odd/")]
    for row in odd[::step]:
        path = real / row["path"]
        try:
            frames, fields = read_frames_and_motion(path, lambda n: [0, n // 2, n - 1], 32, motion)
        except ClipError as error:
            assert row["outcome"] != "clip" or "no motion vectors" in error.reason, error
            continue
        assert row["outcome"] == "clip", path
        assert fields.shape == (3, 2, 8, 8)
        assert np.array_equal(frames, read_frames(path, lambda n: [0, n // 2, n - 1], 32)), path


def test_real_fights_have_vectors(real: Path) -> None:
    paths = sorted((real / "fights").glob("*/*.mp4"))[::8]
    for path in paths:
        _, fields = read_frames_and_motion(path, lambda n: range(1, n, 7), 64, "mv")
        assert (fields != ZERO).mean() > 0.01, path
