"""A cache gives the frames that decoding gives, notices what is stale, and stays small."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from clips.cache import CacheSettings, ClipCache
from video.clip_reader import FrameSampler, read_clip
from video.container import ClipError
from video.encoder import write_video

SETTINGS = CacheSettings(n_frames=4, image_size=48, frames_per_segment=3)


def gradients(count: int) -> np.ndarray:
    """Frames whose brightness tells their number."""
    ramp = np.arange(48, dtype=np.uint8)[None, None, :, None]
    return np.broadcast_to(ramp + np.arange(count)[:, None, None, None] * 3, (count, 48, 48, 3))


def make(folder: Path, count: int, name: str = "clip.mp4") -> tuple[ClipCache, Path]:
    clip = folder / "data" / name
    clip.parent.mkdir(exist_ok=True)
    write_video(clip, gradients(count).astype(np.uint8), lossless=True)
    return ClipCache.create(folder / "cache", folder / "data", SETTINGS), clip


@pytest.mark.parametrize("count", [1, 3, 12, 13, 60])
@pytest.mark.parametrize("sampling", ["uniform", "random"])
def test_cached_frames_are_the_decoded_ones(tmp_path: Path, count: int, sampling: str) -> None:
    cache, clip = make(tmp_path, count)
    cache.write(clip)
    sampler = FrameSampler(4, sampling)
    offsets = [0.1, 0.9, 0.5, 0.49] if sampling == "random" else None
    cached = cache.read(clip, sampler, offsets).rgb
    if offsets and count > 12:  # of a long clip, the nearest of three in each segment
        offsets = [1 / 6, 5 / 6, 0.5, 0.5]
    decoded = read_clip(clip, sampler, 48, offsets).rgb
    assert cached.shape == decoded.shape
    assert cached.dtype == np.uint8
    error = np.abs(cached.astype(int) - decoded)
    assert error.mean() < 1.5  # the next frame is 3 away
    assert np.abs(error.mean(axis=(1, 2, 3))).max() < 1.5


def test_short_clip_is_kept_whole_and_long_one_evenly(tmp_path: Path) -> None:
    for count, kept in ((12, 12), (13, 12), (60, 12)):
        cache, clip = make(tmp_path, count, f"{count}.mp4")
        cache.write(clip)
        with cache._open(clip) as place:
            header = place.header
        assert header["count"] == count
        assert len(header["numbers"]) == kept
        for views in (1, 3):
            assert set(FrameSampler(4, views=views).indices(count)) <= set(header["numbers"])


def test_frames_that_are_not_kept_are_refused(tmp_path: Path) -> None:
    cache, clip = make(tmp_path, 60)
    cache.write(clip)
    for wanted in ({"n_frames": 5}, {"sampling": "first"}, {"views": 2}):
        with pytest.raises(ClipError, match="keeps 12 of 60 frames"):
            cache.read(clip, FrameSampler(**{"n_frames": 4, **wanted}))


def test_stale_entries_are_noticed(tmp_path: Path) -> None:
    cache, clip = make(tmp_path, 8)
    assert cache.check(clip) == "not in the cache"
    with pytest.raises(ClipError, match="not in the cache: run prepare_data"):
        cache.read(clip)
    cache.write(clip)
    assert cache.check(clip) is None
    os.utime(clip, ns=(1, 1))
    assert cache.check(clip) == "changed since it was cached"
    with pytest.raises(ClipError, match="changed since it was cached: run prepare_data"):
        cache.read(clip)
    cache.write(clip)
    other = ClipCache.create(tmp_path / "cache", tmp_path / "data", CacheSettings(4, 40))
    assert other.check(clip) == "cached with other settings"
    other.write(clip)
    assert other.read(clip, FrameSampler(4)).rgb.shape == (4, 40, 40, 3)


@pytest.mark.parametrize("keep", [0, 5, 30, -1])
def test_damaged_entries_are_noticed(tmp_path: Path, keep: int) -> None:
    cache, clip = make(tmp_path, 8)
    cache.write(clip)
    path = cache.path(clip)
    path.write_bytes(path.read_bytes()[:keep])
    assert cache.check(clip) == "damaged in the cache"
    with pytest.raises(ClipError, match="damaged in the cache"):
        cache.read(clip)


def test_unreadable_clip_gives_the_error_of_its_video(tmp_path: Path) -> None:
    cache, clip = make(tmp_path, 8)
    clip.write_bytes(b"no video")
    _, error = cache.write(clip)
    assert cache.check(clip) is None
    assert cache.check(clip, unreadable=True) == "could not be read"
    with pytest.raises(ClipError) as decoding:
        read_clip(clip)
    with pytest.raises(ClipError) as reading:
        cache.read(clip)
    assert str(decoding.value) == str(reading.value)
    assert error == decoding.value.reason


def test_data_and_cache_may_move(tmp_path: Path) -> None:
    cache, clip = make(tmp_path, 8)
    cache.write(clip)
    (tmp_path / "elsewhere").mkdir()
    for name in ("data", "cache"):
        (tmp_path / name).rename(tmp_path / "elsewhere" / name)
    moved = ClipCache(tmp_path / "elsewhere/cache", tmp_path / "elsewhere/data")
    assert moved.check(tmp_path / "elsewhere/data/clip.mp4") is None


def test_noise_is_compressed_until_it_fits(tmp_path: Path) -> None:
    """At most 250 kB for 16 frames of 224 px, even of what compresses worst."""
    clip = tmp_path / "noise.mp4"
    rng = np.random.default_rng(0)
    write_video(clip, rng.integers(0, 256, (16, 224, 224, 3), dtype=np.uint8), lossless=True)
    cache = ClipCache.create(tmp_path / "cache", tmp_path, CacheSettings())
    size, error = cache.write(clip)
    assert error is None
    assert cache.path(clip).stat().st_size == size <= 252_000


def test_names_give_nobody_away_and_folders_stay_short(tmp_path: Path) -> None:
    cache = ClipCache.create(tmp_path / "cache", tmp_path, SETTINGS)
    paths = {cache.path(tmp_path / f"clips/Clip_P{i:03d}_V1_C1_x.mp4") for i in range(4000)}
    assert len(paths) == 4000
    assert not any("P0" in path.name for path in paths)
    folders = [path.parent.name for path in paths]
    assert max(folders.count(name) for name in set(folders)) < 12
    assert json.loads((tmp_path / "cache/cache.json").read_text())["n_frames"] == 4
