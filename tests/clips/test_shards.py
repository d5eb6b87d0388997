"""Tar shards hold what the single files held, other programs read them, and damage is noticed."""

import functools
import io
import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import tiny_config
from PIL import Image

import clips.pack_cache
from clips.build_cache import CacheConfig, fill_cache
from clips.cache import CacheSettings, ClipCache
from clips.pack_cache import pack, packed_part
from clips.shards import INDEX, Shards, scan, shard_path
from dataset import ClipsDataset
from training.checks import check_cache
from training.loaders import build_dataloaders
from utils.errors import UserError
from video.clip_reader import FrameSampler
from video.container import ClipError
from video.encoder import write_video

SIZES = {"n_frames": 4, "image_size": 32}


@pytest.fixture(scope="module")
def filled(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tiny data and a cache of single files; read-only."""
    folder = tmp_path_factory.mktemp("filled")
    shutil.copytree(tiny_data, folder / "data")
    fill(folder)
    return folder


@pytest.fixture
def folder(filled: Path, tmp_path: Path) -> Path:
    """A copy of it that may be changed."""
    shutil.copytree(filled, tmp_path / "copy")
    return tmp_path / "copy"


@pytest.fixture(scope="module")
def sharded(filled: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a packed cache; read-only."""
    folder = tmp_path_factory.mktemp("sharded") / "copy"
    shutil.copytree(filled, folder)
    fill(folder, shards=3)
    return folder


def fill(folder: Path, **settings) -> int:
    own = {"data_root": str(folder / "data"), "output": str(folder / "cached"), "num_workers": 0}
    return fill_cache(CacheConfig(**own, **SIZES, **settings))


def videos(folder: Path) -> list[Path]:
    return sorted((folder / "data").rglob("*.mp4"))


def shards(folder: Path) -> list[Path]:
    return sorted((folder / "cached").glob("*.tar"))


def open_cache(folder: Path) -> ClipCache:
    return ClipCache(folder / "cached", folder / "data")


def frames(cache: ClipCache, clips: list[Path]) -> list[np.ndarray]:
    offsets = [0.1, 0.9, 0.5, 0.49]
    return [cache.read(clip, FrameSampler(4, "random"), offsets).rgb for clip in clips]


def times(paths: list[Path]) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in paths}


def assert_same_clips(filled: Path, folder: Path) -> None:
    """Every clip is read from shards, with the pixels of the single files."""
    cache = open_cache(folder)
    assert cache.shards is not None
    assert not list((folder / "cached").glob("*/*.clip"))
    expected = frames(open_cache(filled), videos(filled))
    assert all(map(np.array_equal, frames(cache, videos(folder)), expected))
    assert not any(cache.check(clip) for clip in videos(folder))


def test_packing_changes_no_pixel_and_decodes_nothing(filled, folder, capsys) -> None:
    before = times(list((filled / "cached").glob("*/*.clip")))
    assert len(before) == 36
    assert fill(folder, shards=3) == 0
    said = capsys.readouterr().out
    assert "36 clips, 36 of them cached already" in said
    assert "packed into 3 tar files" in said
    names = {path.name for path in (folder / "cached").iterdir()}
    tars = {f"shard-0000{k}-of-00003.tar" for k in range(3)}
    assert names == {"cache.json", INDEX, *tars}
    assert_same_clips(filled, folder)


def test_the_same_clips_give_the_same_bytes(folder: Path, sharded: Path, tmp_path: Path) -> None:
    """Whether they were packed at once or one by one, from an old cache or with a new one."""
    for clip in videos(folder)[1:]:
        open_cache(folder).path(clip).unlink()
    lone = tmp_path / "lone.csv"
    name = videos(folder)[0].relative_to(folder / "data").as_posix()
    lone.write_text(f"path,label\n{name},dark\n")
    fill(folder, shards=3, manifests=(str(lone),))
    assert len(open_cache(folder).shards) == 1
    fill(folder)
    for one, other in zip(shards(folder), shards(sharded), strict=True):
        assert one.read_bytes() == other.read_bytes()


def test_tar_and_webdataset_read_them(filled: Path, sharded: Path, tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    urls = [str(path) for path in shards(sharded)]
    data = webdataset.WebDataset(urls, shardshuffle=False, empty_check=False).decode()
    samples = {sample["__key__"]: sample for sample in data}
    assert len(samples) == 36
    single = open_cache(filled)
    for clip in videos(filled):
        sample = samples[single.key(clip)]
        header, images, start = sample["json"], [], 0
        for length in header["lengths"]:
            jpeg = sample["mjpeg"][start : start + length]
            images.append(np.asarray(Image.open(io.BytesIO(jpeg))))
            start += length
        assert start == len(sample["mjpeg"])
        chosen = [header["numbers"].index(n) for n in FrameSampler(4).indices(header["count"])]
        expected = single.read(clip, FrameSampler(4)).rgb
        assert np.array_equal(np.stack([images[k] for k in chosen]), expected)
    for path in urls:
        subprocess.run(["tar", "xf", path, "-C", str(tmp_path)], check=True)
    extracted = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert len(extracted) == 72
    assert all(extracted[f"{key}.mjpeg"] == s["mjpeg"] for key, s in samples.items())


@pytest.mark.parametrize("modality", ["rgb", "rgb+flow"])
def test_long_clips_and_motion(tmp_path: Path, modality: str) -> None:
    if modality != "rgb":
        pytest.importorskip("cv2")
    clip = tmp_path / "data/clip.mp4"
    clip.parent.mkdir()
    rng = np.random.default_rng(0)
    write_video(clip, rng.integers(0, 255, (60, 48, 48, 3), dtype=np.uint8), lossless=True)
    settings = CacheSettings(4, 48, frames_per_segment=3, modality=modality)
    cache = ClipCache.create(tmp_path / "cached", tmp_path / "data", settings)
    cache.write(clip)
    sampler, motion = FrameSampler(4, views=3), settings.motion
    expected = cache.read(clip, sampler, motion=motion)
    pack(cache, packed_part(cache, 1).shards)
    read = open_cache(tmp_path).read(clip, sampler, motion=motion)
    assert np.array_equal(read.rgb, expected.rgb)
    assert (read.motion is None) == (motion is None)
    assert motion is None or np.array_equal(read.motion, expected.motion)
    with pytest.raises(ClipError, match="keeps 12 of 60 frames"):
        open_cache(tmp_path).read(clip, FrameSampler(5))


def test_training_sees_the_same_batches(filled: Path, sharded: Path) -> None:
    """Of drawn clips with augmentation, from the start of an epoch and from the middle of one."""
    loaders = [
        build_dataloaders(
            tiny_config(filled / "data", cache=str(folder / "cached"), sampler_tau=0.5)
        )
        for folder in (filled, sharded)
    ]
    for epoch, start in ((0, 0), (1, 6)):
        batches = []
        for train, val, _, _ in loaders:
            train.sampler.epoch, train.sampler.start = epoch, start
            batches.append([*train, *val])
        assert len(batches[0]) > 2
        for first, second in zip(*batches, strict=True):
            assert first.indices == second.indices
            assert torch.equal(first.clips, second.clips)
            assert not second.unreadable


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_processes_read_at_the_same_time(sharded: Path, method: str) -> None:
    """Forked processes share the open files: none may move another's place in them."""
    cache, clips = open_cache(sharded), videos(sharded) * (5 if method == "fork" else 1)
    expected = [cache.read(clip, FrameSampler(4)).rgb for clip in clips]  # the files are open now
    read = functools.partial(cache.read, sampler=FrameSampler(4))
    with multiprocessing.get_context(method).Pool(3 if method == "fork" else 1) as pool:
        decoded = pool.map(read, clips, chunksize=4)
    assert all(
        np.array_equal(clip.rgb, frame) for clip, frame in zip(decoded, expected, strict=True)
    )


def test_few_files_are_open_at_a_time(sharded: Path, monkeypatch) -> None:
    monkeypatch.setattr("clips.shards._MAX_OPEN", 2)
    cache = open_cache(sharded)
    expected = frames(open_cache(sharded), videos(sharded))
    assert all(map(np.array_equal, frames(cache, videos(sharded)), expected))
    assert len(cache.shards._files) == 2
    assert not pickle.loads(pickle.dumps(cache)).shards._files


def test_the_check_before_training_reads_no_shard(sharded: Path, monkeypatch) -> None:
    monkeypatch.setattr(Shards, "_file", lambda *_: pytest.fail("a shard was read"))
    cache = open_cache(sharded)
    check_cache([ClipsDataset([], cache=cache)])
    assert [cache.check(clip) for clip in videos(sharded)] == [None] * 36
    assert cache.check(sharded / "data/other.mp4") == "not in the cache"


def test_changed_clips_are_packed_again_and_no_others(folder: Path, capsys) -> None:
    fill(folder, shards=3)
    before, changed = times(shards(folder)), videos(folder)[5]
    os.utime(changed, ns=(1, 1))
    cache = open_cache(folder)
    assert cache.check(changed) == "changed since it was cached"
    with pytest.raises(ClipError, match="changed since it was cached: run prepare_data"):
        cache.read(changed)
    capsys.readouterr()
    fill(folder)  # without --shards: as many as there are
    assert "36 clips, 35 of them cached already" in capsys.readouterr().out
    now = times(shards(folder))
    assert sum(now[name] != before[name] for name in now) == 1
    assert open_cache(folder).check(changed) is None
    fill(folder)
    assert times(shards(folder)) == now
    fill(folder, quality=80)
    assert "36 clips, 0 of them cached already" in capsys.readouterr().out


def test_unreadable_clips_stay_unreadable(folder: Path, capsys) -> None:
    broken = videos(folder)[0]
    broken.write_bytes(b"no video")
    assert fill(folder, shards=2) == 1
    before = times(shards(folder))
    with pytest.raises(ClipError, match="cannot be read"):
        open_cache(folder).read(broken)
    assert open_cache(folder).check(broken) is None
    assert open_cache(folder).check(broken, unreadable=True) == "could not be read"
    assert fill(folder) == 1
    assert "1 clips cannot be read" in capsys.readouterr().out
    assert times(shards(folder)) == before


@pytest.mark.parametrize("when", ["before", "written", "deleting", "index"])
def test_killed_packing_goes_on(filled: Path, folder: Path, when: str, capsys) -> None:
    """Killed before or after the second shard is there, while single files are deleted, or before
    the index is there; or while clips are replaced in shards that were complete."""

    def die(function: Callable, calls: int, after: bool) -> Callable:
        count, later = iter(range(100)), iter(range(100))

        def call(*arguments, **options):
            if next(count) < calls or after:
                function(*arguments, **options)
            if next(later) >= calls:
                os.kill(os.getpid(), signal.SIGKILL)

        return call

    def killed() -> None:
        module = clips.pack_cache
        if when == "index":
            module.write_index = die(module.write_index, 0, False)
        elif when == "deleting":
            Path.unlink = die(Path.unlink, 20, False)
        else:
            module.write_shard = die(module.write_shard, 1, when == "written")
        fill(folder, shards=3)

    if when == "written":
        fill(folder, shards=3)
        for clip in videos(folder)[:12]:
            os.utime(clip, ns=(1, 1))
    process = multiprocessing.get_context("fork").Process(target=killed)
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    capsys.readouterr()
    fill(folder, shards=3)
    assert "36 clips, 36 of them cached already" in capsys.readouterr().out
    assert_same_clips(filled, folder)
    assert not list((folder / "cached").glob(".*"))


def flip(path: Path) -> None:
    """Change a byte in the middle of a file, whose size stays."""
    with open(path, "r+b") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: os.truncate(path, path.stat().st_size - 10240), "bytes, and .* were written"),
        (lambda path: path.unlink(), "shard-00000-of-00003.tar: No such file"),
        (flip, "shard-00000-of-00003.tar: was changed after it was written"),
        (lambda path: (path.parent / INDEX).write_bytes(b"PK"), "shards.npz: is damaged"),
    ],
)
def test_damage_is_found_before_training_and_mended(
    filled: Path, folder: Path, damage: Callable, message: str
) -> None:
    fill(folder, shards=3)
    damage(shards(folder)[0])
    with pytest.raises(UserError, match=message) as caught:
        check_cache([ClipsDataset([], cache=open_cache(folder))])
    assert "run python prepare_data.py cache again" in str(caught.value)
    assert "\n" not in str(caught.value)
    fill(folder)
    assert_same_clips(filled, folder)
    check_cache([ClipsDataset([], cache=open_cache(folder))])


def test_a_copy_with_other_times_is_the_same_cache(folder: Path) -> None:
    fill(folder, shards=3)
    for path in shards(folder):
        os.utime(path, ns=(1, 1))
    cache = open_cache(folder)
    check_cache([ClipsDataset([], cache=cache)])
    assert not any(cache.check(clip) for clip in videos(folder))


def test_another_number_of_shards_is_refused(folder: Path) -> None:
    fill(folder, shards=3)
    with pytest.raises(UserError, match="divided into 3 tar files, not 4: give --shards 3"):
        fill(folder, shards=4)
    with pytest.raises(UserError, match="shards = -1: must be from 0 to"):
        fill(folder, shards=-1)


def test_names_in_a_foreign_tar_lead_nowhere(folder: Path, tmp_path: Path) -> None:
    """Members with paths, links and false sizes are passed over, and nothing is written."""
    fill(folder, shards=1)
    (path,) = shards(folder)
    with tarfile.open(path) as archive:
        pairs = [(member, archive.extractfile(member).read()) for member in archive]
    good, evil = pairs[:2], tmp_path / "evil.tar"
    key = good[0][0].name.removesuffix(".json")
    with tarfile.open(evil, "w", format=tarfile.USTAR_FORMAT) as archive:
        for name in ("../../escaped.json", "/tmp/escaped.json", f"a/{key}.json", "x" * 90):
            info = tarfile.TarInfo(name)
            info.size = 4
            archive.addfile(info, io.BytesIO(b"evil"))
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE):
            info = tarfile.TarInfo(f"{'0' * 27}.json")
            info.type, info.linkname = kind, "/etc/passwd"
            archive.addfile(info)
        for text in (b"[]", b"{}", b'{"source": [1, 99999999999999999999], "settings": {}}'):
            info = tarfile.TarInfo(f"{'1' * 27}.json")
            info.size = len(text)
            archive.addfile(info, io.BytesIO(text))
        for member, content in good * 2:  # the clip itself, twice
            archive.addfile(member, io.BytesIO(content))
    shutil.move(evil, path)
    assert [entry["key"].decode() for entry in scan(path, 0)] == [key]
    fill(folder)
    assert len(open_cache(folder).shards) == 36
    with tarfile.open(path) as archive:
        assert len(archive.getnames()) == 72


@pytest.mark.parametrize("column", ["shard", "offset", "size", "header", "key"])
def test_a_foreign_index_is_refused(folder: Path, column: str) -> None:
    fill(folder, shards=2)
    path = folder / "cached" / INDEX
    with np.load(path) as file:
        entries, table = file["entries"], file["shards"]
    entries[column][3] = b"" if column == "key" else 2**31 - 1
    np.savez(path, entries=entries, shards=table)
    with pytest.raises(UserError, match=r"shards.npz: is damaged: run python prepare_data"):
        open_cache(folder)
    np.savez(path, entries=np.array([{}]), shards=table)  # a pickle
    with pytest.raises(UserError, match=r"shards.npz: is damaged"):
        open_cache(folder)


def test_no_clip_and_empty_shards(tmp_path: Path) -> None:
    cache = ClipCache.create(tmp_path / "cached", tmp_path, CacheSettings(**SIZES))
    pack(cache, packed_part(cache, 5).shards)
    cache = open_cache(tmp_path)
    assert len(cache.shards) == 0
    assert cache.check(tmp_path / "a.mp4") == "not in the cache"
    subprocess.run(["tar", "tf", str(shard_path(tmp_path / "cached", 4, 5))], check=True)
