"""Folders of images in every command: what holds for a video holds for the folder of its frames."""

import csv
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from helpers import only_run, scene, touch, train_flags, write_images

import predict
import prepare_data
import train
from clips.cache import CacheSettings, ClipCache
from clips.manifest import UNREADABLE, ClipRow, read_manifest, resolve_path
from clips.perceptual_hash import perceptual_hash, sha256_file
from dataset import ClipsDataset
from timeline.folder_source import FolderSource
from timeline.open_source import find_sources
from timeline.output import output_folders
from timeline.sources import FileSource, FrameSource
from training.feature_cache import CachedFeatures
from utils.errors import UserError
from video.clip_reader import FrameSampler
from video.container import ClipError
from video.encoder import write_video

pytestmark = pytest.mark.usefixtures("no_figures")


def moving(brightness: int, count: int = 12, seed: int = 0) -> np.ndarray:
    """Frames `(count, 32, 32, 3)` with a bright square that moves over noise."""
    noise = np.random.default_rng(seed).integers(0, 40, (count, 32, 32, 3), dtype=np.uint8)
    for number, frame in enumerate(noise):
        frame[4:20, number % 16 : number % 16 + 10] = brightness
    return noise


def pair(folder: Path, frames: Sequence[np.ndarray]) -> tuple[Path, Path]:
    """The same frames as a lossless video and as a folder of images."""
    folder.mkdir(exist_ok=True)
    write_video(folder / "video.mp4", frames, 25, lossless=True)
    return folder / "video.mp4", write_images(folder / "images", frames)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Manifests whose clips are folders of images; read-only."""
    root = tmp_path_factory.mktemp("data of images")
    for split, count in {"train": 3, "val": 2, "test": 2}.items():
        rows = [["path", "label", "patient"]]
        for label, name in enumerate(("dark", "grey", "light")):
            for number in range(count):
                path = root / "clips" / split / f"{name}_{number}"
                seed = 1000 * label + 100 * len(split) + number
                write_images(path, moving(60 + 63 * label, seed=seed), "{:04d}.jpg", number)
                rows.append([path.relative_to(root / "clips").as_posix(), name, f"{split}{number}"])
        with open(root / f"{split}.csv", "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(rows)
    return root


def test_manifests_and_the_data_set(data: Path) -> None:
    rows = read_manifest(data / "val.csv", classes=("dark", "grey", "light"))
    assert rows[0] == ClipRow(data / "clips/val/dark_0", 0, "val0")
    clips = ClipsDataset([*rows, ClipRow(data / "clips", 0)], n_frames=4, size=24)
    clip, label = clips[1]
    assert clip.shape == (4, 3, 24, 24)
    assert label == 0
    with pytest.raises(ClipError, match="clips: not a file, and a folder without JPEG or PNG"):
        clips[len(rows)]


def test_paths_of_manifests_are_files_or_folders_with_images(tmp_path: Path) -> None:
    touch(tmp_path, "clips/a/1.jpg", "b.mp4", "c/video.mp4", "d/notes.txt")
    (tmp_path / "empty").mkdir()
    assert resolve_path("a", tmp_path) == tmp_path / "clips/a"
    assert resolve_path("clips\\a", tmp_path) == tmp_path / "clips/a"
    assert resolve_path("b.mp4", tmp_path) == tmp_path / "b.mp4"
    for name in ("c", "d", "empty", "e"):
        assert resolve_path(name, tmp_path) is None


def test_the_cache_holds_what_it_holds_of_the_video(tmp_path: Path) -> None:
    settings = CacheSettings(n_frames=4, image_size=24, frames_per_segment=3)
    for count in (7, 30):  # kept whole, and in part
        frames = [np.roll(scene(32, 32), k, axis=0) for k in range(count)]
        video, images = pair(tmp_path / f"{count}", frames)
        cache = ClipCache.create(tmp_path / "cache", tmp_path, settings)
        assert [cache.write(clip)[1] for clip in (video, images)] == [None, None]
        for sampler, offsets in (
            (FrameSampler(4), None),
            (FrameSampler(4, "random"), [0.1, 0.9, 0.4, 0.7]),
        ):
            cached = [cache.read(clip, sampler, offsets).rgb for clip in (video, images)]
            assert np.array_equal(*cached)


def test_changes_make_cached_clips_and_features_stale(tmp_path: Path) -> None:
    images = write_images(tmp_path / "data/images", moving(200, 6))
    cache = ClipCache.create(tmp_path / "cache", tmp_path / "data", CacheSettings(4, 24))
    features = CachedFeatures(ClipsDataset([]), tmp_path, 0)
    row = ClipRow(images, 0)
    names = {features.path(row, 0)}

    def is_stale() -> bool:
        stale, name = cache.check(images), features.path(row, 0)
        is_new = name not in names
        names.add(name)
        cache.write(images)
        assert cache.check(images) is None
        assert (stale == "changed since it was cached") is is_new
        return is_new

    cache.write(images)
    touch(images, "Thumbs.db")
    assert not is_stale()
    os.utime(images / "img_00003.png", ns=(1, 1))
    assert is_stale()
    write_images(images, moving(100, 1), first=7)
    assert is_stale()
    (images / "img_00001.png").unlink()
    assert is_stale()
    (images / "img_00003.png").unlink()
    assert is_stale()
    with pytest.raises(ClipError, match=r"image 3 is missing: img_00004\.png comes after"):
        cache.read(images)


def test_digests_and_hashes(tmp_path: Path) -> None:
    frames = [np.roll(scene(64, 64), k, axis=1) for k in range(10)]
    video, images = pair(tmp_path / "a", frames)
    copy = shutil.copytree(images, tmp_path / "copy")
    for path in sorted(copy.iterdir(), reverse=True):
        path.rename(copy / f"f{int(path.stem[4:]) + 7}.png")  # other numbers, the same images
    assert sha256_file(copy) == sha256_file(images)
    order = write_images(tmp_path / "order", frames[::-1])
    assert len({sha256_file(clip) for clip in (video, images, order)}) == 3
    assert np.array_equal(perceptual_hash(images), perceptual_hash(video))


def test_the_audit_finds_copies_and_the_frames_of_a_video(tmp_path: Path, run_main) -> None:
    first, second, third = (
        [np.roll(scene(64, 64 + 8 * k)[:, :64], shift, axis=1) for shift in range(8)]
        for k in range(3)
    )
    write_images(tmp_path / "train/cut/2", second)
    write_video(tmp_path / "train/cut/1.mp4", first)
    write_images(tmp_path / "test/cut/1", first, "{}.jpg")
    write_images(tmp_path / "test/cut/2", second, "f{}.png", 0)
    write_images(tmp_path / "test/cut/3", third, "f{}.png", 0)
    write_images(tmp_path / "test/cut/4", [third[0]] * 2, "f{}.png", 0)
    (tmp_path / "test/cut/4/f9.png").touch()
    flags = ("audit", "train", "test", "--num-workers", 0, "--output", "out")
    done = run_main(prepare_data.main, *flags, cwd=tmp_path, code=1)
    found = pd.read_csv(tmp_path / "out/overlaps.csv")
    assert found["kind"].tolist() == ["content", "near_duplicate"]
    assert found["lines"].tolist() == ["train:2 test:2", "train:1 test:1"]
    assert "1 files cannot be read" in done.stdout
    facts = pd.read_csv(tmp_path / "out/files.csv").set_index("split")
    assert facts.loc["test", ["files", "seconds", "fps"]].tolist() == [3, "'-", "unknown (3)"]


def test_the_check_names_bad_folders(data: Path, tmp_path: Path, run_main) -> None:
    assert (
        "6 files, 0 of them bad"
        in run_main(
            prepare_data.main, "check", data / "val.csv", "--num-workers", 0, cwd=tmp_path
        ).stdout
    )
    bad = shutil.copytree(data / "clips/val", tmp_path / "clips")
    (bad / "dark_1/0005.jpg").unlink()
    (bad / "grey_0/0002.jpg").write_bytes(b"")
    run_main(prepare_data.main, "check", bad, "--num-workers", 0, cwd=tmp_path, code=1)
    listed = pd.read_csv(tmp_path / "runs/bad_clips.csv").set_index("path")["reason"]
    assert listed[str(bad / "dark_1")] == "image 5 is missing: 0006.jpg comes after 0004.jpg"
    assert "0002.jpg is empty" in listed[str(bad / "grey_0")]
    assert len(listed) == 2


@pytest.fixture(scope="module")
def operation(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A whole video of 8 s, as a file and as a folder of images."""
    frames = [frame for level in (60, 186, 123, 250) for frame in moving(level, 50)]
    return pair(tmp_path_factory.mktemp("operation"), frames)


ALL = 1000.0  # frames per second: every frame


@pytest.mark.parametrize("fps", [ALL, 25.0, 10.0, 6.67, 0.3])
def test_a_folder_gives_the_frames_and_times_of_the_video(operation, fps: float) -> None:
    video, images = operation
    sources: list[FrameSource] = [
        FileSource(video, fps, 16, preview=True),
        FolderSource(images, fps, 16, 25.0, preview=True),
    ]
    decoded, read = (list(source) for source in sources)
    assert [frame.time for frame in read] == pytest.approx([frame.time for frame in decoded])
    assert all(np.array_equal(a.image, b.image) for a, b in zip(read, decoded, strict=True))
    assert np.array_equal(read[-1].preview, decoded[-1].preview)
    for source in sources:
        assert (source.duration, source.end, source.rate) == pytest.approx((8.0, 8.0, 25.0))
        assert source.gaps == source.notes == []


def test_only_the_images_that_are_due_are_opened(operation, tmp_path: Path) -> None:
    images = shutil.copytree(operation[1], tmp_path / "images")
    for number in range(1, 201):
        if number % 5 != 1:
            (images / f"img_{number:05d}.png").write_bytes(b"never opened")
    source = FolderSource(images, 5.0, 16, 25.0)
    assert len(list(source)) == 40
    assert source.gaps == []


def test_bad_stretches_are_marked(operation, tmp_path: Path) -> None:
    images = shutil.copytree(operation[1], tmp_path / "images")
    for number in (1, 2, *range(51, 76), 200):
        (images / f"img_{number:05d}.png").write_bytes(b"damaged")
    for number in range(101, 126):
        (images / f"img_{number:05d}.png").unlink()
    source = FolderSource(images, ALL, 16, 25.0)
    assert len(list(source)) == 200 - 2 - 25 - 1 - 25
    gaps = [(gap.start, gap.end) for gap in source.gaps]
    assert gaps == [pytest.approx(g) for g in ((0, 0.08), (2, 3), (4, 5), (7.96, 8))]
    assert {gap.label for gap in source.gaps} == {UNREADABLE}
    assert source.notes[1] == (
        "from 2.0 s on unreadable: img_00051.png is no JPEG or PNG image, or damaged"
    )
    assert source.notes[2] == "from 4.0 s on unreadable: images are missing"
    write_images(tmp_path / "mixed", [scene(32, 32), scene(32, 40), scene(32, 32)])
    source = FolderSource(tmp_path / "mixed", ALL, 16, 1.0)
    assert [frame.time for frame in source] == [0, 2]
    assert "images of mixed sizes: img_00002.png has 40 x 32" in source.notes[0]
    for path in (tmp_path / "mixed").iterdir():
        path.write_bytes(b"")
    with pytest.raises(ClipError, match=r"no image that can be read: img_00001\.png is empty"):
        list(FolderSource(tmp_path / "mixed", ALL, 16, 1.0))


def test_training_and_the_timeline_of_a_folder(data, operation, tmp_path: Path, run_main) -> None:
    """The timeline of the images is that of the video, bit for bit."""
    run_main(train.main, *train_flags(data, "--epochs", 1), cwd=tmp_path)
    run = only_run(tmp_path)
    assert pd.read_csv(run / "predictions.csv").shape[0] == 6
    video, images = operation
    (tmp_path / "all").mkdir()
    shutil.copy(video, tmp_path / "all")
    shutil.copytree(images, tmp_path / "all/images")
    flags = (run, tmp_path / "all", "--frame-rate", 25, "--fps", 10, "--device", "cpu")
    run_main(predict.main, *flags, cwd=tmp_path)
    for name in ("frames.csv", "timeline.csv", "timeline.vtt"):
        of_video, of_images = (
            (tmp_path / "all" / f"{clip}.timeline" / name).read_text()
            for clip in ("video.mp4", "images")
        )
        assert of_video == of_images
    page = (tmp_path / "all/images.timeline/timeline.html").read_text()
    assert "There is no video to play with this timeline." in page
    assert "<video" not in page


def test_the_frame_rate_must_be_given_for_folders_and_for_them_alone(
    operation, mistake, tmp_path: Path
) -> None:
    video, images = operation
    assert find_sources((str(images),), 25.0) == [images]
    assert find_sources((str(images.parent),), 25.0) == [images, video]
    with pytest.raises(UserError, match=r"images do not tell how many .* give it as --frame-rate"):
        find_sources((str(images),))
    with pytest.raises(UserError, match="--frame-rate is for folders of images"):
        find_sources((str(video),), 25.0)
    for rate in ("0", "-1", "nan", "inf"):
        done = mistake(predict.main, "run", images, "--frame-rate", rate, cwd=tmp_path)
        assert "frame_rate" in done.stderr
    assert output_folders([images], "") == [images.parent / "images.timeline"]


def test_results_of_the_current_folder_go_beside_it(tmp_path: Path, monkeypatch) -> None:
    images = write_images(tmp_path / "images", moving(100, 2))
    monkeypatch.chdir(images)
    (source,) = find_sources((".",), 25.0)
    assert output_folders([source], "") == [tmp_path / "images.timeline"]
