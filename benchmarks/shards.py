"""Times a cache in tar shards against the same cache as single files.

    python -m benchmarks.shards --folder /data/tmp                    50,000 clips
    python -m benchmarks.shards --entries 2000 --repeats 1

The clips are a few rendered ones, many times under different names (hard links). Both caches are
written, checked as train.py does before it starts, and read in the same random order, in turn.
Before each reading the system is told to forget the contents of the files (posix_fadvise); their
names and sizes it keeps, which on a network drive would cost single files most of their time. So
the folder should be on the drive that the cache is meant for.
"""

import os
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from benchmarks.timing import environment, report
from benchmarks.videos import write_benchmark_video
from clips.cache import CacheSettings, ClipCache
from clips.cache_entry import read_pieces
from clips.pack_cache import pack, packed_part
from utils.cli import cli_main, parse
from utils.device import get_device
from utils.errors import UserError
from utils.files import atomic, require_space, require_writable
from video.clip_reader import FrameSampler

RENDERED = 4


@dataclass
class ShardsConfig:
    """How large the caches are."""

    entries: int = 50_000
    """clips"""
    shards: int = 64
    """tar files"""
    frames: int = 16
    """frames per clip"""
    image_size: int = 112
    """height and width of the frames in pixels"""
    reads: int = 10_000
    """clips read per round, in random order"""
    decoded: int = 500
    """clips read and decoded per round"""
    repeats: int = 3
    """rounds"""
    folder: str = ""
    """where both caches are written and deleted again (empty: the folder for temporary files)"""
    output: str = "runs/benchmarks"
    """folder for the table"""


def make_clips(config: ShardsConfig, folder: Path) -> list[Path]:
    """The clips: links to a few rendered videos."""
    folder.mkdir()
    sources = [folder / f"rendered{number}.mp4" for number in range(RENDERED)]
    for number, source in enumerate(sources):
        write_benchmark_video(source, 180 + 20 * number, config.frames, 250)
    clips = []
    for number in range(config.entries):
        clips.append(folder / f"{number}.mp4")
        os.link(sources[number % RENDERED], clips[-1])
    return clips


def write_single(cache: ClipCache, clips: Sequence[Path]) -> int:
    """Write a file per clip, as `ClipCache.write` does after decoding. Returns their bytes."""
    contents = []
    for clip in clips[:RENDERED]:
        cache.write(clip)
        contents.append(cache.path(clip).read_bytes())
    require_space(cache.folder, len(clips) / RENDERED * 2 * sum(map(len, contents)), "they need")
    size = 0
    for number, clip in enumerate(clips):
        path = cache.path(clip)
        path.parent.mkdir(exist_ok=True)
        with atomic(path) as unfinished:
            size += unfinished.write_bytes(contents[number % RENDERED])
    return size


def link_cache(source: Path, target: Path) -> None:
    """A second cache of the same single files."""
    target.mkdir()
    for path in source.rglob("*"):
        copy = target / path.relative_to(source)
        copy.mkdir() if path.is_dir() else os.link(path, copy)


def forget(folder: Path) -> None:
    """Tell the system that the contents of all files need not stay in memory."""
    for path in folder.rglob("*"):
        if path.is_file():
            file = os.open(path, os.O_RDONLY)
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(file)


def _read(cache: ClipCache, clips: Sequence[Path]) -> None:
    """Read what a training reads of these clips, without decoding it."""
    for clip in clips:
        with cache._open(clip) as place:
            wanted = set(FrameSampler().indices(place.header["count"]))
            for _ in read_pieces(place.file, place.frames, place.header["lengths"], wanted):
                pass


def _decode(cache: ClipCache, clips: Sequence[Path]) -> None:
    for clip in clips:
        cache.read(clip)


def timed(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def compare(config: ShardsConfig, folder: Path) -> pd.DataFrame:
    """One row for the single files, and one for the shards."""
    clips = make_clips(config, folder / "data")
    settings = CacheSettings(image_size=config.image_size)
    folders = {"single files": folder / "single", "tar shards": folder / "shards"}
    single = ClipCache.create(folders["single files"], folder / "data", settings)
    rows = {name: {"cache": name} for name in folders}
    start = time.perf_counter()
    size = write_single(single, clips)
    rows["single files"]["writing (s)"] = time.perf_counter() - start
    link_cache(*folders.values())
    linked = ClipCache.create(folders["tar shards"], folder / "data", settings)
    start = time.perf_counter()
    pack(linked, packed_part(linked, config.shards).shards)
    rows["tar shards"]["writing (s)"] = time.perf_counter() - start
    os.sync()  # what is not on the disk yet cannot be forgotten
    seconds: dict[str, dict[str, list[float]]] = {name: {} for name in folders}
    draw = random.Random(0)
    for _ in range(config.repeats):
        chosen = draw.choices(clips, k=config.reads)
        for name, path in folders.items():
            cache = ClipCache(path, folder / "data")
            reading = partial(_read, cache, chosen)
            calls = {
                "opening and checking (s)": partial(_check, path, folder / "data", clips),
                "cold": reading,
                "warm": reading,
                "decoded": partial(_decode, cache, chosen[: config.decoded]),
            }
            for call, function in calls.items():
                if call == "cold":
                    forget(path)
                seconds[name].setdefault(call, []).append(timed(function))
    for name, row in rows.items():
        medians = {call: float(np.median(values)) for call, values in seconds[name].items()}
        row["opening and checking (s)"] = medians["opening and checking (s)"]
        row["read, cold (clips/s)"] = config.reads / medians["cold"]
        row["read, warm (clips/s)"] = config.reads / medians["warm"]
        row["read and decoded, warm (clips/s)"] = config.decoded / medians["decoded"]
        paths = list(folders[name].rglob("*"))
        row["files and folders"] = f"{len(paths):,}"
        row["GB"] = sum(path.stat().st_size for path in paths if path.is_file()) / 1e9
    print(f"{len(clips):,} clips of {size / len(clips) / 1000:.1f} kB")
    return pd.DataFrame(rows.values())


def _check(path: Path, root: Path, clips: Sequence[Path]) -> None:
    cache = ClipCache(path, root)
    if problems := [problem for clip in clips if (problem := cache.check(clip))]:
        raise UserError(f"{path}: {problems[0]}")


@cli_main
def main() -> None:
    config = parse(ShardsConfig, __doc__)
    for name in ("entries", "shards", "frames", "reads", "decoded", "repeats"):
        if getattr(config, name) < 1:
            raise UserError(f"{name} = {getattr(config, name)}: must be at least 1")
    if config.entries < RENDERED or not hasattr(os, "posix_fadvise"):
        raise UserError(f"entries must be at least {RENDERED}, and the system Linux")
    if config.folder:
        require_writable(config.folder, "--folder")
    with tempfile.TemporaryDirectory(dir=config.folder or None) as folder:
        table = compare(config, Path(folder))
    conditions = environment(get_device("cpu"), n=config.repeats, entries=config.entries)
    report("shards", table, conditions, config.output)


if __name__ == "__main__":
    main()
