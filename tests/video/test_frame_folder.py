"""Folders of numbered images: they are read like the video of the same frames, or refused."""

import io
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest
from helpers import link, scene, touch, write_images
from PIL import Image

from video.clip_reader import FrameSampler, check_clip, effective_fps, read_clip
from video.container import ClipError, VideoMetadata, probe
from video.decoder import check_video, read_frames
from video.encoder import write_video
from video.files import find_videos, fingerprint
from video.frame_folder import frame_positions, is_frame_folder, list_frames, read_image


def frames(count: int = 20, height: int = 48, width: int = 64) -> list[np.ndarray]:
    still = scene(height + count, width)
    return [np.ascontiguousarray(still[k : k + height]) for k in range(count)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 PNG frames, with what systems and people leave beside them."""
    folder = write_images(tmp_path_factory.mktemp("frames") / "clip 1", frames())
    touch(folder, "Thumbs.db", "labels.txt", "._img_00003.png", ".img_00099.jpg", "masks/a.txt")
    return folder


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The same frames as lossless videos."""
    h264, ffv1 = (tmp_path_factory.mktemp("videos") / name for name in ("rgb.mp4", "ffv1.mkv"))
    write_video(h264, frames(), lossless=True)
    with av.open(str(ffv1), "w") as container:
        stream = container.add_stream("ffv1", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "bgr0"
        for frame in frames():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    return [h264, ffv1]


@pytest.mark.parametrize("size", [None, 32, 48, 100])
def test_the_pixels_are_those_of_the_video(folder: Path, videos: list[Path], size) -> None:
    for sampler in (
        FrameSampler(4),
        FrameSampler(7, "first"),
        FrameSampler(30),
        FrameSampler(4, views=3),
    ):
        read = read_clip(folder, sampler, size).rgb
        assert read.dtype == np.uint8
        for video in videos:
            assert np.array_equal(read, read_clip(video, sampler, size).rgb)
    offsets = [0.1, 0.9, 0.3, 0.7]
    read = read_clip(folder, FrameSampler(4, "random"), size, offsets).rgb
    assert np.array_equal(read, read_clip(videos[0], FrameSampler(4, "random"), size, offsets).rgb)


def test_flow_is_that_of_the_video_and_motion_vectors_are_refused(folder, videos) -> None:
    pytest.importorskip("cv2")
    read, decoded = (
        read_clip(clip, FrameSampler(4), 32, motion="flow") for clip in (folder, videos[0])
    )
    assert np.array_equal(read.motion, decoded.motion)
    assert np.array_equal(read.rgb, decoded.rgb)
    with pytest.raises(
        ClipError, match=r"a folder of images holds no motion vectors: use rgb\+flow"
    ):
        read_clip(folder, FrameSampler(4), 32, motion="mv")
    assert "no motion vectors" in check_clip(folder, "mv")
    assert check_clip(folder) is check_clip(folder, "flow") is None


def test_metadata(folder: Path, tmp_path: Path) -> None:
    assert probe(folder) == VideoMetadata(20, 0.0, 0.0, 64, 48, "png")
    jpeg = write_images(tmp_path / "jpeg", frames(3), "{}.JPG", 0)
    assert probe(jpeg) == VideoMetadata(3, 0.0, 0.0, 64, 48, "jpeg")
    paths = [folder, jpeg, tmp_path / "none"]
    assert effective_fps(paths, FrameSampler(16)) is None
    assert effective_fps(paths, FrameSampler(16), known=[25.0, None, 25.0]) == 20.0
    assert effective_fps(paths, FrameSampler(16, "first"), known=[25.0, None, 25.0]) == 25.0


def test_only_the_chosen_images_are_opened(tmp_path: Path) -> None:
    clip = write_images(tmp_path / "clip", frames(10))
    for number in (2, 3, 4, 5, 7, 8, 9):
        (clip / f"img_{number:05d}.png").write_bytes(b"no image")
    assert np.array_equal(
        read_frames(clip, lambda n: [5, 0, 9, 5], None), [frames(10)[k] for k in (5, 0, 9, 5)]
    )
    with pytest.raises(ClipError, match=r"clip: img_00005.png is no JPEG or PNG image, or damaged"):
        read_frames(clip, lambda n: [0, 4, 9], 32)  # and not the frame before it


@pytest.mark.parametrize(
    ("names", "order"),
    [
        (["10.png", "9.png", "11.png"], ["9.png", "10.png", "11.png"]),
        (["v2_f0.jpg", "v2_f1.JPEG", "v2_f2.jpeg"], ["v2_f0.jpg", "v2_f1.JPEG", "v2_f2.jpeg"]),
        (["a50.png", "a0.png", "a25.png"], ["a0.png", "a25.png", "a50.png"]),  # every 25th
        (["b007b.png"], ["b007b.png"]),
        (["a1.png", "b2.png"], ["a1.png", "b2.png"]),
        (
            ["img_1.jpg", "img_2.jpg", "flow_x_1.jpg", "flow_y_1.jpg", "x_00001.jpg", "y_1.jpg"],
            ["img_1.jpg", "img_2.jpg"],
        ),
        (["x_1.jpg", "x_2.jpg"], ["x_1.jpg", "x_2.jpg"]),
    ],
)
def test_order_of_numbers(names: list[str], order: list[str], tmp_path: Path) -> None:
    touch(tmp_path, *names)
    assert list_frames(tmp_path) == order


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        (["a1.png", "a2.png", "a4.png", "a9.png"], "image 3 is missing: a4.png comes after a2.png"),
        (["a0.png", "a25.png", "a75.png", "a100.png"], "image 50 is missing"),
        (["a1.png", "a3.png"], "image 2 is missing"),
        (["a1.png", "a01.png", "a2.png"], "two images have the number 1: a01.png and a1.png"),
        (["a1.png", "a2.png", "a2.jpg"], "holds JPEG and PNG images: keep one of the two kinds"),
        (["a1.png", "a\n1.png"], "two images have the number 1: a?1.png and a1.png"),
        (["a1.png", "cover.png"], "cover.png has no number"),
        (["a1.png", "a2.png", "a3.png/x"], "a3.png is not a file"),
        (["Thumbs.db", ".a1.png"], "a folder without JPEG or PNG images"),
        ([], "a folder without JPEG or PNG images"),
    ],
)  # fmt: skip
def test_what_cannot_be_put_in_order_is_refused(names, reason: str, tmp_path: Path) -> None:
    clip = tmp_path / "clip"
    clip.mkdir()
    touch(clip, *names)
    for read in (read_clip, probe, list_frames):
        with pytest.raises(ClipError) as error:
            read(clip)
        assert error.value.path == str(clip)
        assert reason in error.value.reason
        assert "\n" not in str(error.value)
    assert reason in check_video(clip)


def test_positions_of_a_video_with_missing_images(tmp_path: Path) -> None:
    touch(tmp_path, "10.png", "11.png", "14.png")
    assert frame_positions(tmp_path) == [(0, "10.png"), (1, "11.png"), (4, "14.png")]


def test_links_pipes_and_folders_that_are_gone(tmp_path: Path) -> None:
    clip = write_images(tmp_path / "clip", frames(3))
    link(tmp_path / "other" / "1.png", clip / "img_00001.png")
    assert len(list_frames(tmp_path / "other")) == 1
    link(clip / "img_00004.png", clip / "img_00004.png")  # to itself
    with pytest.raises(ClipError):
        list_frames(clip)
    (clip / "img_00004.png").unlink()
    link(clip / "img_00004.png", clip / "gone.png")
    with pytest.raises(ClipError, match=r"img_00004\.png is not a file"):
        list_frames(clip)
    (clip / "img_00004.png").unlink()
    os.mkfifo(clip / "img_00004.png")
    with pytest.raises(ClipError, match=r"img_00004\.png is not a file"):
        list_frames(clip)
    with pytest.raises(ClipError, match="no such file"):
        read_clip(tmp_path / "none")
    assert not is_frame_folder(tmp_path / "none")
    assert not is_frame_folder("a\0b")
    assert not is_frame_folder(tmp_path)


def jpeg(frame: np.ndarray, **options: object) -> bytes:
    file = io.BytesIO()
    Image.fromarray(frame).save(file, "jpeg", **options)
    return file.getvalue()


def bomb(width: int, height: int) -> bytes:
    """The header of a PNG of this size, without pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    return b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 10**6) + b"IDAT"


DAMAGE: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda content: b"", "img_3.jpg is empty"),
    "text": (lambda content: b"<html>404</html>", "img_3.jpg is no JPEG or PNG image"),
    "another format": (lambda content: b"GIF89a" + content, "img_3.jpg is no JPEG or PNG image"),
    "truncated": (lambda content: content[: len(content) // 2], "img_3.jpg cannot be .*truncated"),
    "header alone": (lambda content: content[:30], "img_3.jpg"),
    "another size": (lambda content: jpeg(frames(1, 40, 64)[0]), "mixed sizes: img_3.jpg"),
    "bomb": (lambda content: bomb(60000, 60000), "img_3.jpg"),
    "large": (lambda content: bomb(8200, 8200), "img_3.jpg .* 8200 x 8200 pixels are too"),
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_image_is_told_and_never_replaced(kind: str, tmp_path: Path) -> None:
    change, reason = DAMAGE[kind]
    clip = write_images(tmp_path / "clip", frames(6), "img_{}.jpg")
    path = clip / "img_3.jpg"
    path.write_bytes(change(path.read_bytes()))
    for size in (None, 32):
        with pytest.raises(ClipError, match=reason) as error:
            read_clip(clip, FrameSampler(6), size)
        assert str(error.value).startswith(f"{clip}: ")
        assert "\n" not in str(error.value)
    assert read_frames(clip, lambda n: [0, 1, 3], 32).shape == (3, 32, 32, 3)
    assert "1 of 6 images are damaged, the first one: " in check_video(clip)


def test_the_check_finds_damage_that_the_decoders_conceal(tmp_path: Path) -> None:
    still = scene(224, 224)
    clip = tmp_path / "clip"
    write_images(clip, [still] * 3, "{}.jpg")
    content = bytearray((clip / "2.jpg").read_bytes())
    middle = len(content) // 2
    content[middle : middle + 400] = bytes(400)
    (clip / "2.jpg").write_bytes(content)
    assert "2.jpg" in check_video(clip)
    for options in ({}, {"progressive": True}, {"subsampling": 0, "quality": 100}, {"quality": 5}):
        (clip / "2.jpg").write_bytes(jpeg(still, **options) + b"after the end")
        assert check_video(clip) is None
    write_images(tmp_path / "png", [still], "1.png")
    assert check_video(tmp_path / "png") is None
    whole = (tmp_path / "png/1.png").read_bytes()
    for place in np.random.default_rng(0).integers(60, len(whole) - 20, 20):
        flipped = bytearray(whole)
        flipped[place] ^= 1
        (tmp_path / "png/1.png").write_bytes(flipped)
        assert "1.png" in check_video(tmp_path / "png")


def saved(tmp_path: Path, image: Image.Image, suffix: str = "png", **options: object) -> np.ndarray:
    image.save(tmp_path / f"1.{suffix}", **options)
    return read_image(tmp_path / f"1.{suffix}")


def test_all_kinds_of_png_become_rgb(tmp_path: Path) -> None:
    frame = frames(1)[0]
    grey = Image.fromarray(frame).convert("L")
    as_rgb = np.repeat(np.asarray(grey)[..., None], 3, axis=2)
    assert np.array_equal(saved(tmp_path, grey), as_rgb)
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    assert deep.mode.startswith("I")
    assert np.array_equal(saved(tmp_path, deep), as_rgb)
    palette = Image.fromarray(frame).quantize(32)
    assert np.array_equal(saved(tmp_path, palette), np.asarray(palette.convert("RGB")))
    bilevel = grey.convert("1")
    assert np.array_equal(saved(tmp_path, bilevel), np.asarray(bilevel.convert("RGB")))
    alpha = np.dstack([frame, np.full((48, 64), 255, np.uint8)])
    alpha[:10, :, 3] = 0
    seen = frame.copy()
    seen[:10] = 0  # what is transparent is shown on black
    assert np.array_equal(saved(tmp_path, Image.fromarray(alpha)), seen)
    assert np.array_equal(saved(tmp_path, Image.fromarray(alpha).convert("LA"))[:10], seen[:10])
    palette.info["transparency"] = np.asarray(palette)[0, 0]
    shown = saved(tmp_path, palette, transparency=int(np.asarray(palette)[0, 0]))
    assert shown[0, 0].tolist() == [0, 0, 0]
    deep_frame = av.VideoFrame.from_ndarray(frame.astype(np.uint16) * 257, format="rgb48le")
    path = tmp_path / "2.png"
    with av.open(str(path), "w", format="image2") as container:
        stream = container.add_stream("png", rate=1, options={"update": "1"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "rgb48be"
        container.mux(stream.encode(deep_frame.reformat(format="rgb48be")))
        container.mux(stream.encode(None))
    assert np.array_equal(read_image(path), frame)


def test_jpeg_in_grey_and_cmyk_and_turned_by_exif(tmp_path: Path) -> None:
    frame = scene(48, 64)
    grey = saved(tmp_path, Image.fromarray(frame).convert("L"), "jpg", quality=95)
    assert grey.shape == (48, 64, 3)
    cmyk = saved(tmp_path, Image.fromarray(frame).convert("CMYK"), "jpg", quality=95)
    assert np.abs(cmyk.astype(int) - frame).mean() < 12
    plain = saved(tmp_path, Image.fromarray(frame), "jpg")
    exif = Image.Exif()
    for orientation, upright in (
        (3, np.rot90(plain, 2)),
        (6, np.rot90(plain, -1)),
        (2, plain[:, ::-1]),
    ):
        exif[0x0112] = orientation
        assert np.array_equal(saved(tmp_path, Image.fromarray(frame), "jpg", exif=exif), upright)
        assert np.array_equal(saved(tmp_path, Image.fromarray(plain), exif=exif), upright)


def test_the_content_decides_and_not_the_extension(tmp_path: Path) -> None:
    clip = write_images(tmp_path / "clip", frames(2), "{}.png")
    for path in list(clip.iterdir()):
        path.rename(path.with_suffix(".jpg"))
    assert np.array_equal(read_frames(clip, range, None), frames(2))
    assert probe(clip).codec == "png"
    assert check_video(clip) is None


def test_any_change_of_an_image_changes_the_fingerprint(tmp_path: Path) -> None:
    clip = write_images(tmp_path / "clip", frames(3))
    seen = [fingerprint(clip)]
    touch(clip, "notes.txt")
    assert fingerprint(clip) == seen[0]

    def changed() -> bool:
        seen.append(fingerprint(clip))
        return seen[-1] not in seen[:-1]

    os.utime(clip / "img_00002.png", ns=(1, 1))
    assert changed()
    write_images(clip, frames(1), first=4)
    assert changed()
    (clip / "img_00004.png").rename(clip / "img_00005.png")
    assert changed()
    (clip / "img_00001.png").unlink()
    assert changed()
    assert fingerprint(tmp_path / "none") == []


def found(folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in find_videos(folder).paths]


def test_frame_folders_are_found_as_clips(tmp_path: Path) -> None:
    touch(
        tmp_path,
        "cut/c1/img_1.jpg",
        "cut/c1/img_2.jpg",
        "cut/c1/Thumbs.db",
        "sew/c2/0.png",
        "sew/c3.mp4",
    )
    assert found(tmp_path) == ["cut/c1", "sew/c2", "sew/c3.mp4"]
    assert find_videos(tmp_path).passed_over == "passed over: 1 .db"
    assert found(tmp_path / "cut/c1") == ["."]  # the folder itself


def test_images_beside_videos_and_folders_are_no_clips(tmp_path: Path) -> None:
    touch(
        tmp_path,
        "previews/a.mp4",
        "previews/a1.jpg",
        "1.png",
        "figures/loss.png",
        "deep/1/2/3/1.jpg",
        "deep/1/4.png",
    )
    assert found(tmp_path) == ["deep/1/2/3", "previews/a.mp4"]
    assert find_videos(tmp_path).passed_over == "passed over: 3 .png, 1 .jpg"
    touch(tmp_path, "a.timeline/1.png", "@eaDir/1.jpg", ".hidden/1.jpg", "deep/1/2/3/@eaDir/1.jpg")
    assert found(tmp_path) == ["deep/1/2/3", "previews/a.mp4"]


def test_links_to_frame_folders(tmp_path: Path) -> None:
    touch(tmp_path, "store/P1/1.jpg", "store/P1/2.jpg")
    link(tmp_path / "data/cut/a", tmp_path / "store/P1")
    link(tmp_path / "data/cut/b", tmp_path / "store/P1")
    assert found(tmp_path / "data") == ["cut/a"]
    assert find_videos(tmp_path / "data").twice == [
        (tmp_path / "data/cut/b", tmp_path / "data/cut/a")
    ]
