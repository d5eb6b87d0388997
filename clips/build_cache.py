"""Fill a cache with every clip as small JPEGs: `prepare_data.py cache`.

Interrupted at any moment, it continues when started again; clips that changed, that could not be
read, or that were cached with other settings are cached again. One process at a time fills a cache.
With --shards the files are then packed into tar files.
"""

import dataclasses
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro
from tqdm import tqdm

from clips.cache import CacheSettings, ClipCache
from clips.manifest import read_paths
from clips.manifest_formats import ManifestOptions
from clips.pack_cache import choose_shards, pack, packed_part
from clips.shards import MAX_SHARDS
from clips.splits import find_splits
from utils.errors import UserError
from utils.files import remove_unfinished, require_space, require_writable
from utils.lock import FolderLock
from utils.sharding import Shard, file_size, this_shard
from utils.workers import in_parallel
from video.motion import require_opencv

N_SAMPLES = 8  # clips that are cached first, to estimate the size of the cache


@dataclass(frozen=True)
class CacheConfig(CacheSettings, ManifestOptions):
    """Keep every clip of the manifests as JPEG frames of training size, and its motion.

    The exit code is 1 if a clip cannot be read.
    """

    data_root: tyro.conf.Positional[str] = dataclasses.field(kw_only=True)
    """folder of the manifests and of the clips, or of the clips alone, as train.py takes it"""
    output: str = dataclasses.field(kw_only=True)
    """folder of the cache"""
    manifests: tuple[str, ...] = ("train.csv", "val.csv", "test.csv")
    """manifests below data_root, or paths of their own"""
    num_workers: int = 2
    """number of processes that decode"""
    shard: str = ""
    """i/n: write the clips of part i of n, from 0 (docs/scale.md; torchrun does this by itself)"""
    shards: int = 0
    """number of tar files that hold all clips together, for network drives; clips cached before are
    packed too (0: one file per clip, or as many tar files as there are already)"""


def fill_cache(config: CacheConfig) -> int:
    """Write every clip that the cache lacks.

    Returns:
        The exit code: 1 if a clip cannot be read.

    Raises:
        UserError: the manifests are wrong, the settings cannot work, or the disk is too small.
    """
    _check(config)
    root = Path(config.data_root)
    if not root.is_dir():
        raise UserError(f"{root}: no such folder (data_root is the folder of the clips)")
    options = ManifestOptions.of(config)
    found = find_splits(root, {Path(name).stem: name for name in config.manifests}, options)
    sources = [found] if isinstance(found, Path) else found.values()
    clips = list(dict.fromkeys(c for path in sources for c in read_paths(path, root, options)))
    names = [field.name for field in dataclasses.fields(CacheSettings)]
    settings = CacheSettings(**{name: getattr(config, name) for name in names})
    shard = this_shard(config.shard)
    if shard and choose_shards(Path(config.output), config.shards):
        raise UserError(
            "--shard: one process packs a cache into tar files: fill a cache of single files, then "
            "pack it with --shards"
        )
    require_writable(config.output)
    if shard:  # several processes write different clips, each of them atomically
        return _fill_part(ClipCache.create(config.output, root, settings), clips, config, shard)
    with FolderLock(config.output):
        n_shards = choose_shards(Path(config.output), config.shards)
        cache = ClipCache.create(config.output, root, settings)
        return _fill(cache, clips, config.num_workers, n_shards)


def _fill_part(cache: ClipCache, clips: Sequence[Path], config: CacheConfig, shard: Shard) -> int:
    """Write what the cache lacks of this process's part.

    Returns:
        The exit code, 0: torchrun would stop the other processes because of a clip that cannot be
        read. The cache keeps which clips these are, and the next start tries them again.
    """
    part = shard.part(clips, [file_size(clip) for clip in clips])
    bar = tqdm(part, "checking the cache", leave=False, delay=1)
    todo = [clip for clip in bar if cache.check(clip, unreadable=True)]
    print(f"part {shard}: {len(part):,} of {len(clips):,} clips, {len(todo):,} of them to write")
    unreadable = _write(cache, todo, config.num_workers) if todo else []
    missing = sum(bool(cache.check(clip)) for clip in clips)
    print(f"done: {cache.folder} lacks {missing:,} of {len(clips):,} clips")
    if unreadable:
        print("\n  ".join([f"{len(unreadable)} clips cannot be read:", *unreadable]))
    return 0


def _fill(cache: ClipCache, clips: Sequence[Path], num_workers: int, n_shards: int) -> int:
    """Write the clips that the cache lacks. Returns the exit code."""
    packed = packed_part(cache, n_shards)
    parts = [packed, cache] if n_shards else [cache]
    bar = tqdm(clips, "checking the cache", leave=False, delay=1)
    todo = [clip for clip in bar if all(part.check(clip, unreadable=True) for part in parts)]
    print(f"{len(clips):,} clips, {len(clips) - len(todo):,} of them cached already")
    unreadable = _write(cache, todo, num_workers) if todo else []
    # Writing clears folders as well; but workers outlive a killed process for a moment.
    for folder in cache.folder.glob("???"):
        remove_unfinished(folder)
    if n_shards:
        pack(cache, packed.shards)
        print(f"packed into {n_shards} tar files")
    print(f"done: {cache.folder} holds {len(clips) - len(unreadable):,} of {len(clips):,} clips")
    if unreadable:
        print("\n  ".join([f"{len(unreadable)} clips cannot be read:", *unreadable]))
    return int(bool(unreadable))


def _write(cache: ClipCache, clips: Sequence[Path], num_workers: int) -> list[str]:
    """Write a few clips to estimate size and time, then the others.

    Returns:
        A line for each clip that cannot be read.
    """
    samples = clips[:: max(1, len(clips) // N_SAMPLES)][:N_SAMPLES]
    start = time.perf_counter()
    written = [(clip, *cache.write(clip)) for clip in samples]
    factor = len(clips) / len(samples)
    size = factor * sum(size for _, size, _ in written)
    minutes = factor * (time.perf_counter() - start) / max(1, num_workers) / 60
    free = shutil.disk_usage(cache.folder).free
    print(
        f"to write: {len(clips):,} clips, about {size / 1e9:.2f} GB of {free / 1e9:,.0f} GB free, "
        f"about {minutes:,.0f} min with {num_workers} workers (estimated from {len(samples)} clips)"
    )
    require_space(cache.folder, size, "the clips need about")
    done = set(samples)
    others = [clip for clip in clips if clip not in done]
    for clip, (size, error) in in_parallel(cache.write, others, num_workers, "caching"):
        written.append((clip, size, error))
    print(f"written: {sum(size for _, size, _ in written) / 1e9:.2f} GB")
    return [f"{clip}: {error}" for clip, _, error in written if error]


def _check(config: CacheConfig) -> None:
    for name, low, high in (("n_frames", 1, 1024), ("image_size", 16, 4096), ("quality", 20, 100)):
        if not low <= getattr(config, name) <= high:
            raise UserError(f"{name} = {getattr(config, name)}: must be from {low} to {high}")
    if config.frames_per_segment < 1 or config.frames_per_segment % 2 == 0:
        raise UserError(
            f"frames_per_segment = {config.frames_per_segment}: must be odd (1, 3, 5 ...)"
        )
    if config.motion == "flow":
        require_opencv()
    if not 0 <= config.shards <= MAX_SHARDS:
        raise UserError(f"shards = {config.shards}: must be from 0 to {MAX_SHARDS}")
    if config.num_workers < 0:
        raise UserError(f"num_workers = {config.num_workers}: must be at least 0")
