"""From a config to batches: the splits, the samplers and the three loaders."""

import dataclasses
import functools
import logging
import math
import multiprocessing
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler, WeightedRandomSampler

from clips.cache import ClipCache
from clips.manifest import ClipRow, get_num_classes, write_manifest
from clips.manifest_formats import ManifestOptions
from clips.split import divide_by_patient
from clips.splits import SPLITS, read_splits, read_table_of_splits
from clips.transforms import RandAugmentErase
from config import Config, TrainConfig, fitted_splits, manifest_paths
from dataset import (
    ClipsDataset,
    Perturbation,
    collate,
    collate_by_value,
    get_train_transform,
    get_val_transform,
)
from demo.data import render_demo
from training.checks import resolve
from utils import distributed
from utils.device import get_device
from utils.errors import UserError
from utils.workers import SHARED_MEMORY, shared_memory_free, start_worker
from video.motion import Modality

log = logging.getLogger(__name__)

DEMO_ROOT = Path("data") / "demo"


class TrainSampler(Sampler[tuple[int, int]]):
    """Which clips an epoch trains on, as `(index, seed)` pairs (see `ClipsDataset`).

    A clip of a class with `count` training clips is drawn with weight `count^-tau`, so that a class
    makes up a part of the epoch proportional to `count^(1-tau)`; tau = 0 is plain shuffling, each
    clip once. The order depends on the seed and `epoch` alone. Process `rank` of `world_size` takes
    every world_size-th clip: together the processes see the batches that one process would have
    seen.

    Set `epoch` before each epoch; `start` skips this process's first clips, to continue in the
    middle of an epoch.
    """

    def __init__(
        self, labels: Sequence[int], tau: float, seed: int, rank: int = 0, world_size: int = 1
    ) -> None:
        counts = np.bincount(labels)
        self.weights = torch.as_tensor(counts[np.asarray(labels)] ** -float(tau))
        self.tau = tau
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.epoch = 0
        self.start = 0

    def _epoch(self) -> list[tuple[int, int]]:
        """The pairs of the whole epoch, of all processes."""
        n = len(self.weights)
        words = np.random.SeedSequence([self.seed, self.epoch]).generate_state(1, np.uint64)
        generator = torch.Generator().manual_seed(int(words[0]) >> 1)
        if self.tau:
            order = list(WeightedRandomSampler(self.weights, n, True, generator))
        else:
            order = torch.randperm(n, generator=generator).tolist()
        # All processes need the same number of clips, or they would wait for each other for ever.
        order += [order[i % n] for i in range(-n % self.world_size)]
        seeds = torch.randint(2**62, (len(order),), generator=generator).tolist()
        return list(zip(order, seeds, strict=True))

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter(self._epoch()[self.rank :: self.world_size][self.start :])

    def __len__(self) -> int:
        return self.clips_per_epoch - self.start

    @property
    def clips_per_epoch(self) -> int:
        """Number of clips of a whole epoch for this process."""
        return math.ceil(len(self.weights) / self.world_size)


def build_dataloaders(config: TrainConfig) -> tuple[DataLoader, DataLoader, DataLoader, int]:
    """The train, val and test loaders of a config, and the number of classes.

    Each loader yields `dataset.Batch`es. The demo data is rendered if there is none yet.

    Raises:
        UserError: the settings or the manifests are wrong.
    """
    config = resolve(config)
    splits = load_splits(config)
    cache = open_cache(config)
    train = ClipsDataset(
        splits["train"],
        config.n_frames,
        config.image_size,
        config.sampling,
        get_train_transform(
            config.image_size,
            config.hflip_prob,
            config.rotation,
            config.translate,
            config.scale,
            config.brightness,
            config.contrast,
            config.saturation,
            config.hue,
        ),
        cache=cache,
        motion=Modality.parse(config.modality).stored_motion,
        pre_transform=_pre_transform(config),
        # A GPU augments a whole batch in less time than a worker one clip.
        augment_on_device=get_device(config.device).type == "cuda",
    )
    sampler = TrainSampler(
        [row.label for row in train.rows],
        config.sampler_tau,
        config.seed,
        distributed.rank(),
        distributed.world_size(),
    )
    return (
        make_loader(train, sampler, config, config.batch_size, persistent=True),
        eval_loader(splits["val"], config, cache, persistent=not _forks()),
        eval_loader(splits["test"], config, cache, config.test_views, config.test_crops),
        get_num_classes(config.classes),
    )


def batches_per_epoch(loader: DataLoader) -> int:
    """Number of batches of a whole epoch of the train loader, wherever the epoch is continued."""
    return math.ceil(loader.sampler.clips_per_epoch / loader.batch_size)


def eval_loader(
    rows: Sequence[ClipRow],
    config: TrainConfig,
    cache: ClipCache | None = None,
    views: int = 1,
    crops: int = 1,
    perturbations: Sequence[Perturbation] = (),
    persistent: bool = False,
) -> DataLoader:
    """A loader of clips in their order, without anything random.

    With several processes each one gets a part of the clips; the parts differ in length by one clip
    at most and hold no clip twice, so that the gathered predictions are exactly those of the split.

    Args:
        config: a resolved config.
        cache: where the clips are read (None: they are decoded).
        perturbations: for robustness tests; see `clips.corruptions`.
        persistent: keep the workers for the next pass over the clips.
    """
    clips = ClipsDataset(
        rows,
        config.n_frames,
        config.image_size,
        config.eval_sampling,
        get_val_transform(config.image_size),
        views,
        crops,
        cache,
        Modality.parse(config.modality).stored_motion,
        perturbations=perturbations,
    )
    part = range(distributed.rank(), len(rows), distributed.world_size())
    batch_size = max(1, config.batch_size // clips.num_views)
    return make_loader(clips, part, config, batch_size, persistent)


def _forks() -> bool:
    """Whether starting a worker costs nothing; elsewhere it takes seconds to import PyTorch."""
    return multiprocessing.get_start_method() == "fork"


def open_cache(config: TrainConfig) -> ClipCache | None:
    """The cache that a config names, if any.

    Raises:
        UserError: there is none, or its clips are not what the config needs.
    """
    if not config.cache:
        return None
    cache = ClipCache(config.cache, config.data_root or DEMO_ROOT)
    for name in ("image_size", "n_frames"):
        wanted, cached = getattr(config, name), getattr(cache.settings, name)
        flag = name.replace("_", "-")
        if wanted != cached:
            raise UserError(
                f"{config.cache}: cached for {name} {cached}, not {wanted}: give --{flag} {cached}"
                f", or make another cache (python prepare_data.py cache ... --{flag} {wanted})"
            )
    motion = Modality.parse(config.modality).stored_motion
    if motion not in (None, cache.settings.motion):
        raise UserError(
            f"{config.cache}: cached with modality {cache.settings.modality}, not rgb+{motion}: "
            f"make another cache (python prepare_data.py cache ... --modality rgb+{motion})"
        )
    return cache


def load_splits(config: TrainConfig) -> dict[str, list[ClipRow]]:
    """The rows of train, val and test. Renders the demo data where data_root is empty.

    Raises:
        UserError: something is wrong with the manifests, their clips, or their splits.
    """
    config = resolve(config)
    if config.data_root:
        if not Path(config.data_root).is_dir():
            raise UserError(f"{config.data_root}: no such folder: give --data-root")
        found, options = manifest_paths(config), ManifestOptions.of(config)
        common, fitted = (config.data_root, config.classes, options), fitted_splits(config)
        if isinstance(found, Path):
            divide = functools.partial(_divide, found)
            return read_table_of_splits(found, *common, divide, fitted)
        return read_splits(found, *common, fitted)
    if distributed.rank() == 0:
        render_demo(DEMO_ROOT)
    distributed.broadcast_object()  # the other processes wait for it
    manifests = {name: DEMO_ROOT / f"{name}.csv" for name in ("train", "val", "test")}
    return read_splits(manifests, DEMO_ROOT, config.classes)


def _divide(source: Path, rows: Sequence[ClipRow]) -> list[str]:
    splits = divide_by_patient(rows)
    log.info(
        f"{source}: has no splits: its clips are divided into train, val and test, with no patient "
        "in two of them where the patients are known; the run folder keeps the three manifests\n"
    )
    return splits


def keep_splits(
    config: TrainConfig, splits: Mapping[str, Sequence[ClipRow]], folder: Path
) -> TrainConfig:
    """The config with manifests of its own, where the splits come from one table or folder.

    They are written into the run folder, so that later clips or tables do not change the splits.
    """
    if not config.data_root or not isinstance(manifest_paths(config), Path):
        return config
    if distributed.rank() == 0:
        write_splits(config, splits, folder)
    return use_splits(config, folder)


def write_splits(
    config: TrainConfig, splits: Mapping[str, Sequence[ClipRow]], folder: Path
) -> None:
    """Write the manifests of train, val and test into a folder, for `use_splits`."""
    for split, rows in splits.items():
        root = config.data_root or DEMO_ROOT
        write_manifest(folder / f"{split}.csv", rows, root, config.classes)


def use_splits(config: Config, folder: Path) -> Config:
    """The resolved config with the manifests of a folder, see `write_splits`, instead of its own.

    The settings that say how its own manifests are read are reset; the demo data becomes data of
    one's own.
    """
    root = config.data_root or str(DEMO_ROOT.absolute())
    plain = {field.name: field.default for field in dataclasses.fields(ManifestOptions)}
    manifests = {f"{split}_csv": str(folder.absolute() / f"{split}.csv") for split in SPLITS}
    return dataclasses.replace(config, data_root=root, csv="", **manifests, **plain)


def _pre_transform(config: TrainConfig) -> RandAugmentErase | None:
    if not (config.rand_augment or config.random_erase):
        return None
    return RandAugmentErase(config.rand_augment, config.ra_magnitude, config.random_erase)


def make_loader(
    clips: ClipsDataset,
    sampler: Sampler | range,
    config: TrainConfig,
    batch_size: int,
    persistent: bool = False,
) -> DataLoader:
    """A loader with the settings that all of them share; see `eval_loader` for `persistent`."""
    channels = 3 if clips.motion is None else 5
    clip_bytes = config.n_frames * channels * config.image_size**2 * clips.num_views
    has_room = _room_in_shared_memory(batch_size * clip_bytes, config.num_workers)
    return DataLoader(
        clips,
        batch_size,
        sampler=sampler,
        num_workers=config.num_workers,
        collate_fn=collate if has_room else collate_by_value,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=start_worker,
        persistent_workers=persistent and config.num_workers > 0,
        # The loader has its own generator: starting it must not advance the generator of dropout,
        # or a resumed epoch would differ from an uninterrupted one.
        generator=torch.Generator(),
    )


def _room_in_shared_memory(batch_bytes: int, num_workers: int) -> bool:
    """Whether the batches of one loader fit into the memory that processes can share."""
    free = shared_memory_free()
    if free is None or not num_workers:
        return True
    # Each worker reads two batches ahead (PyTorch's default); one more is being used. torchrun's
    # processes on this machine share the room.
    batches = (2 * num_workers + 1) * int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if batches * batch_bytes <= free:
        return True
    _tell_small_shared_memory(free, batches * batch_bytes)
    return False


@functools.cache  # once, and not for each loader of the same size
def _tell_small_shared_memory(free: int, needed: int) -> None:
    log.warning(
        f"{SHARED_MEMORY} has {free / 1e6:.0f} MB free and the clips read ahead need "
        f"{needed / 1e6:.0f} MB: they take a slower way to the training process (more room: docker "
        "run --shm-size=1g)"
    )
