"""From a config to batches: the splits, the samplers and the three loaders."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler, WeightedRandomSampler

from clips.cache import ClipCache
from clips.corruptions import Corruption
from clips.manifest import ClipRow, get_num_classes, read_splits
from clips.transforms import StrongAugment
from config import TrainConfig, manifest_paths
from dataset import ClipsDataset, ReportingDataset, collate, get_train_transform, get_val_transform
from demo.data import render_demo
from training.checks import resolve
from utils import distributed
from utils.device import choose_device
from utils.errors import UserError
from utils.workers import start_worker
from video.motion import brought

DEMO_ROOT = Path("data") / "demo"


class TrainSampler(Sampler[tuple[int, int]]):
    """Which clips an epoch trains on, as `(index, seed)` pairs (see `ClipsDataset`).

    A clip of a class with `count` training clips is drawn with weight `count^-tau`, so that a class
    makes up a share of the epoch proportional to `count^(1-tau)`; tau = 0 is plain shuffling, each
    clip once. The order depends on the seed and `epoch` alone. Process `rank` of `world` takes
    every world-th draw: together the processes see the batches that one process would have seen.

    Set `epoch` before each epoch; `start` skips this process's first draws, to go on in the middle.
    """

    def __init__(
        self, labels: Sequence[int], tau: float, seed: int, rank: int = 0, world: int = 1
    ) -> None:
        counts = np.bincount(labels)
        self.weights = torch.as_tensor(counts[np.asarray(labels)] ** -float(tau))
        self.tau = tau
        self.seed = seed
        self.rank = rank
        self.world = world
        self.epoch = 0
        self.start = 0

    def _draws(self) -> list[tuple[int, int]]:
        n = len(self.weights)
        words = np.random.SeedSequence([self.seed, self.epoch]).generate_state(1, np.uint64)
        generator = torch.Generator().manual_seed(int(words[0]) >> 1)
        if self.tau:
            drawn = WeightedRandomSampler(self.weights, n, replacement=True, generator=generator)
            order = list(drawn)
        else:
            order = torch.randperm(n, generator=generator).tolist()
        # Every process needs equally many, or the others would wait for it for ever.
        order += [order[i % n] for i in range(-n % self.world)]
        seeds = torch.randint(2**62, (len(order),), generator=generator).tolist()
        return list(zip(order, seeds, strict=True))

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter(self._draws()[self.rank :: self.world][self.start :])

    def __len__(self) -> int:
        return self.total - self.start

    @property
    def total(self) -> int:
        """This process's draws in a whole epoch."""
        return math.ceil(len(self.weights) / self.world)


def build_dataloaders(config: TrainConfig) -> tuple[DataLoader, DataLoader, DataLoader, int]:
    """The train, val and test loaders of a config, and the number of classes.

    Each yields `dataset.Batch`es. The demo data is rendered where there is none yet.

    Raises:
        UserError: the manifests need mending.
    """
    config = resolve(config)
    splits = load_splits(config)
    labels = [row.label for row in splits["train"]]
    sampler = TrainSampler(
        labels, config.tau, config.seed, distributed.rank(), distributed.world_size()
    )
    transform = get_train_transform(
        config.image_size,
        config.flip,
        config.rotation,
        config.translate,
        config.zoom,
        config.brightness,
        config.contrast,
        config.saturation,
        config.hue,
    )
    strong = StrongAugment(config.rand_augment, config.rand_magnitude, config.erasing)
    train = ClipsDataset(
        splits["train"],
        config.n_frames,
        config.image_size,
        config.sampling,
        transform,
        cache=open_cache(config),
        # A GPU changes a whole batch in less time than a worker one clip.
        defer=choose_device(config.device).type == "cuda",
        strong=strong if config.rand_augment or config.erasing else None,
        inputs=brought(config.inputs),
    )
    return (
        _loader(train, sampler, config, config.batch_size, persistent=True),
        eval_loader(splits["val"], config),
        eval_loader(splits["test"], config, config.test_views, crops=config.test_crops),
        get_num_classes(config.classes),
    )


def batches_per_epoch(loader: DataLoader) -> int:
    """The batches of a whole epoch of the train loader, wherever it goes on."""
    return math.ceil(loader.sampler.total / loader.batch_size)


def eval_loader(
    rows: Sequence[ClipRow],
    config: TrainConfig,
    views: int = 1,
    shuffle_frames: bool = False,
    corruption: tuple[Corruption, int] | None = None,
    crops: int = 1,
) -> DataLoader:
    """A loader of clips in their order, nothing random; each process gets its own share of them.

    The shares differ in length by one clip at most and hold no clip twice, so that gathered
    predictions are those of the split exactly.
    """
    clips = ClipsDataset(
        rows,
        config.n_frames,
        config.image_size,
        config.eval_sampling,
        get_val_transform(config.image_size),
        views,
        shuffle_frames,
        open_cache(config),
        corruption=corruption,
        inputs=brought(config.inputs),
        crops=crops,
    )
    share = range(distributed.rank(), len(rows), distributed.world_size())
    return _loader(clips, share, config, max(1, config.batch_size // clips.answers))


def open_cache(config: TrainConfig) -> ClipCache | None:
    """The cache that a config names, if any.

    Raises:
        UserError: there is none, or its clips are not what the config wants.
    """
    if not config.cache:
        return None
    cache = ClipCache(config.cache, config.data_root or DEMO_ROOT)
    for name in ("image_size", "n_frames"):
        wanted, there = getattr(config, name), getattr(cache.settings, name)
        flag = name.replace("_", "-")
        if wanted != there:
            raise UserError(
                f"{config.cache}: cached for {name} {there}, not {wanted}: give --{flag} {there}, "
                f"or make another cache (python prepare_data.py cache ... --{flag} {wanted})"
            )
    inputs = brought(config.inputs)
    if inputs not in ("rgb", cache.settings.inputs):
        raise UserError(
            f"{config.cache}: cached with inputs {cache.settings.inputs}, not {inputs}: "
            f"make another cache (python prepare_data.py cache ... --inputs {inputs})"
        )
    return cache


def load_splits(config: TrainConfig) -> dict[str, list[ClipRow]]:
    """The rows of train, val and test. Renders the demo data where data_root is empty."""
    if config.data_root:
        return read_splits(manifest_paths(config), config.data_root, config.classes)
    if distributed.rank() == 0:
        render_demo(DEMO_ROOT)
    distributed.from_first(None)  # the others wait for it
    manifests = {name: DEMO_ROOT / f"{name}.csv" for name in ("train", "val", "test")}
    return read_splits(manifests, DEMO_ROOT, config.classes)


def _loader(
    clips: ClipsDataset,
    sampler: Sampler | range,
    config: TrainConfig,
    batch_size: int,
    persistent: bool = False,
) -> DataLoader:
    return DataLoader(
        ReportingDataset(clips),
        batch_size,
        sampler=sampler,
        num_workers=config.workers,
        collate_fn=collate,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=start_worker,
        persistent_workers=persistent and config.workers > 0,
        # A generator of its own: starting a loader must not move the one that dropout draws from,
        # or a resumed epoch would differ from an uninterrupted one.
        generator=torch.Generator(),
    )
