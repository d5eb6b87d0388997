"""Finding videos in real folders: links, loops, rights, hidden files, and what is no video."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
import pytest
from helpers import link, touch

from utils.errors import UserError
from video.clip_reader import read_clip
from video.files import VIDEO_SUFFIXES, find_videos, is_video


def found(folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in find_videos(folder).paths]


def test_links_to_folders_and_files_are_followed(tmp_path: Path) -> None:
    touch(tmp_path, "store/P1/a.mp4", "store/P2/b.avi", "elsewhere/c.MKV")
    link(tmp_path / "data/cut", tmp_path / "store/P1")
    link(tmp_path / "data/sew", tmp_path / "store/P2")
    link(tmp_path / "data/sew2/d.mkv", tmp_path / "elsewhere/c.MKV")
    assert found(tmp_path / "data") == ["cut/a.mp4", "sew/b.avi", "sew2/d.mkv"]
    assert find_videos(tmp_path / "data").passed_over == ""
    link(tmp_path / "whole", tmp_path / "data")
    assert found(tmp_path / "whole") == ["cut/a.mp4", "sew/b.avi", "sew2/d.mkv"]


def test_loops_end(tmp_path: Path) -> None:
    touch(tmp_path, "cut/a.mp4", "sew/b.mp4")
    link(tmp_path / "cut/up", tmp_path)
    link(tmp_path / "sew/self", tmp_path / "sew")
    link(tmp_path / "sew/other", tmp_path / "cut")
    link(tmp_path / "a", tmp_path / "cut/up/sew/other")
    assert found(tmp_path) == ["cut/a.mp4", "sew/b.mp4"]  # real folders are read before links
    assert find_videos(tmp_path).passed_over == "passed over: 4 read under another name"


def test_a_folder_with_two_links_is_read_once(tmp_path: Path) -> None:
    touch(tmp_path, "store/a.mp4")
    link(tmp_path / "data/cut", tmp_path / "store")
    link(tmp_path / "data/sew", tmp_path / "store")
    assert found(tmp_path / "data") == ["cut/a.mp4"]
    twice = find_videos(tmp_path / "data").twice
    assert twice == [(tmp_path / "data/sew", tmp_path / "data/cut")]


def test_broken_links_are_counted_and_links_to_each_other_are_told(tmp_path: Path) -> None:
    touch(tmp_path, "a.mp4")
    link(tmp_path / "gone.mp4", tmp_path / "unmounted/gone.mp4")
    assert found(tmp_path) == ["a.mp4"]
    assert find_videos(tmp_path).passed_over == (
        "passed over: 1 without content (broken links, pipes)"
    )
    link(tmp_path / ".hidden", tmp_path / ".hidden")
    assert found(tmp_path) == ["a.mp4"]
    link(tmp_path / "x.mp4", tmp_path / "y.mp4")
    link(tmp_path / "y.mp4", tmp_path / "x.mp4")
    with pytest.raises(UserError, match=r"(?s)take them out:\n  .*x\.mp4: .*y\.mp4: "):
        find_videos(tmp_path)
    for number in range(15):
        link(tmp_path / f"z{number}", tmp_path / f"z{number}")
    with pytest.raises(UserError) as error:
        find_videos(tmp_path)
    assert str(error.value).splitlines()[-1] == "  and 7 more"
    assert len(str(error.value).splitlines()) == 12


@pytest.fixture
def ordinary_user() -> Iterator[Path]:
    """A folder that everybody may read, and rights that count, also where the tests run as root."""
    if not hasattr(os, "geteuid"):
        pytest.skip("no such rights on Windows")
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        was = os.geteuid()
        try:
            yield Path(name)
        finally:
            os.seteuid(was)
            for path in Path(name).iterdir():
                path.chmod(0o755)


def test_a_folder_that_may_not_be_read_is_told(ordinary_user: Path) -> None:
    touch(ordinary_user, "cut/a.mp4", "sew/b.mp4", "knot/c.mp4")
    for name in ("sew", "knot"):
        (ordinary_user / name).chmod(0o000)
    if os.geteuid() == 0:
        os.seteuid(65534)
    with pytest.raises(UserError, match="allow reading these, or take them out") as error:
        find_videos(ordinary_user)
    lines = str(error.value).splitlines()
    assert [line.split(": ")[0] for line in lines[1:]] == [
        f"  {ordinary_user / 'knot'}",
        f"  {ordinary_user / 'sew'}",
    ]


def test_hidden_files_and_those_of_systems_are_no_clips(tmp_path: Path) -> None:
    touch(tmp_path, "cut/a.mp4", "cut/._a.mp4", ".git/b.mp4", "cut/.ipynb_checkpoints/a.mp4")
    touch(tmp_path, "__MACOSX/cut/a.mp4", "cut/@eaDir/a.mp4", "$RECYCLE.BIN/a.mp4")
    touch(tmp_path, "op.mp4", "op.mp4.timeline/op.mp4")
    touch(tmp_path, "Thumbs.db", "cut/notes.TXT", "cut/notes.txt", "README")
    assert found(tmp_path) == ["cut/a.mp4", "op.mp4"]
    assert find_videos(tmp_path).passed_over == (
        "passed over: 3 hidden, 3 made by the system, 2 .txt, 1 .db, 1 made by predict.py, "
        "1 without a suffix"
    )


def test_a_hidden_folder_can_be_named(tmp_path: Path) -> None:
    touch(tmp_path, ".data/a.mp4", ".data/.b.mp4")
    assert found(tmp_path / ".data") == ["a.mp4"]


def test_rare_kinds_are_counted_together(tmp_path: Path) -> None:
    touch(tmp_path, "a.mp4", *(f"{k}.k{k}" for k in range(12)), "b.k3")
    assert find_videos(tmp_path).passed_over == (
        "passed over: 2 .k3, 1 .k0, 1 .k1, 1 .k10, 1 .k11, 1 .k2, 1 .k4, 1 .k5, 4 others"
    )


# The format of an extension, where its name is another, and the codec of a format, if not H.264.
FORMAT = {
    "264": "h264", "265": "hevc", "divx": "avi", "f4v": "mp4", "h265": "hevc", "m1v": "mpeg1video",
    "m2p": "mpeg", "m2t": "mpegts", "m2ts": "mpegts", "m2v": "mpeg2video", "m4v": "mp4",
    "mjpg": "mjpeg", "mkv": "matroska", "mod": "mpeg", "mpe": "mpeg", "mpg": "mpeg",
    "mts": "mpegts", "ogm": "ogg", "qt": "mov", "rmvb": "rm", "tod": "mpegts", "ts": "mpegts",
    "vro": "vob", "wmv": "asf", "y4m": "yuv4mpegpipe",
}  # fmt: skip
CODEC = {
    "3gp": "mpeg4", "3g2": "mpeg4", "apng": "apng", "asf": "wmv2", "avi": "mpeg4", "dv": "dvvideo",
    "flv": "flv", "gif": "gif", "gxf": "mpeg2video", "h263": "h263", "hevc": "libx265",
    "ivf": "libvpx", "mjpeg": "mjpeg", "mpeg": "mpeg2video", "mpeg1video": "mpeg1video",
    "mpeg2video": "mpeg2video", "mxf": "mpeg2video", "obu": "libsvtav1", "ogg": "libtheora",
    "ogv": "libtheora", "rm": "rv10", "swf": "flv", "vob": "mpeg2video", "webm": "libvpx",
    "wtv": "mpeg2video", "yuv4mpegpipe": "wrapped_avframe",
}  # fmt: skip
PIXELS = {"mjpeg": "yuvj420p", "gif": "rgb8", "apng": "rgb24"}
PAL = {"dvvideo", "gxf", "mxf"}  # these formats have no other size


@pytest.mark.parametrize("suffix", sorted(VIDEO_SUFFIXES))
def test_files_of_each_extension_are_found_and_read(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"clip{suffix.upper()}"
    name = FORMAT.get(suffix[1:], suffix[1:])
    codec = CODEC.get(name, "libx264")
    if codec not in av.codecs_available:
        pytest.skip(f"{codec} is not in this FFmpeg")
    width, height = (720, 576) if {name, codec} & PAL else (176, 144)
    with av.open(str(path), "w", format=name) as container:
        stream = container.add_stream(codec, rate=25)
        stream.width, stream.height = width, height
        stream.pix_fmt = PIXELS.get(codec, "yuv420p")
        for brightness in range(0, 240, 20):
            frame = np.full((height, width, 3), brightness, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    assert found(tmp_path) == [path.name]
    frames = read_clip(path, size=16).rgb[:12]
    assert frames.mean((1, 2, 3)) == pytest.approx(np.arange(0, 240, 20), abs=20)


@pytest.mark.parametrize("name", ["a.txt", "mp4", "a.mp4.timeline", "a.mp4.csv", "a.dat", "a.png"])
def test_other_names_are_no_videos(name: str) -> None:
    assert not is_video(name)
    assert is_video("clips/P1.v2.Mp4 ")
