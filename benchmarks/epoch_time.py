"""Training end to end for benchmarks/data.py: clips a second, time spent waiting, memory."""

import csv
import multiprocessing
import resource
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from benchmarks.baselines import NaiveClips, train_naively
from benchmarks.timing import interleave
from benchmarks.videos import write_benchmark_video
from clips.cache import CacheSettings, ClipCache
from clips.manifest import CLASSES, read_manifest
from config import TrainConfig
from dataset import Batch
from models import build_model, build_model_from_config
from training.checks import resolve
from training.engine import train_one_epoch
from training.loaders import batches_per_epoch, build_dataloaders
from training.state import Training
from utils.device import choose_device, choose_precision, suit_device
from utils.interrupt import Interrupt


@dataclass
class EpochConfig:
    """What to train in order to time it."""

    repeats: int = 5
    """times that everything is timed"""
    source: str = ""
    """a video whose frames the benchmark's videos are made of (empty: a rendered scene)"""
    model: Literal["tsm", "cnn_lstm", "r2plus1d", "vivit"] = "cnn_lstm"
    """training, memory: which model"""
    clips: int = 24
    """training, memory: clips an epoch"""
    batch_size: int = 4
    """training, memory: clips a batch"""
    image_size: int = 224
    """training, memory: pixels of a side"""
    workers: int = 2
    """training, memory: processes that read clips"""
    epochs: int = 20
    """memory: epochs"""
    device: str = "cpu"
    """training, memory: auto, cpu, cuda, cuda:1, mps"""


DISTINCT = 6  # videos that are encoded; the others are copies

HEIGHT, FRAMES = 720, 100  # 4 s


def time_training(config: EpochConfig, folder: Path) -> pd.DataFrame:
    """Whole epochs from 720p files: as a first script does it, decoding, and from the cache."""
    _write_data(config, folder, HEIGHT, FRAMES)
    device = choose_device(config.device)
    naive = _naive_epoch(config, folder, device)
    decoding, cached = _Epoch(config, folder), _Epoch(config, folder, cache=True)
    calls = {"naive": naive, "decoding": decoding, "from the cache": cached}
    times = interleave(calls, config.repeats, device)
    slowest = sorted(times["naive"])[config.repeats // 2]
    names = {
        "naive": "naive: decode and convert all, PIL frame by frame, fp32",
        "decoding": f"train.py, decoding ({decoding.run.dtype})",
        "from the cache": f"train.py, from the cache ({cached.run.dtype})",
    }
    rows = []
    for name, seconds in times.items():
        median = sorted(seconds)[config.repeats // 2]
        epoch = calls[name]
        rows.append(
            {
                "training": names[name],
                "model": config.model,
                "clips/s": config.clips / median,
                "faster (x)": slowest / median,
                "waiting for clips (%)": 100 * epoch.waited / epoch.total
                if isinstance(epoch, _Epoch)
                else None,
            }
        )
    return pd.DataFrame(rows)


def watch_memory(config: EpochConfig, folder: Path) -> pd.DataFrame:
    """Memory of the training process and of all its workers after each of many epochs, in MB."""
    # In a process of its own: workers are forked, and keep the memory that their parent had then.
    arguments = (config, folder, HEIGHT, FRAMES)
    writer = multiprocessing.get_context("spawn").Process(target=_write_data, args=arguments)
    writer.start()
    writer.join()
    epoch = _Epoch(config, folder, cache=True)
    rows = []
    for number in tqdm(range(1, config.epochs + 1), "watching memory", unit="epoch", leave=False):
        epoch()
        rows.append(
            {
                "epoch": f"{number}",
                "training process (MB)": _resident("self"),
                "its workers (MB)": sum(map(_resident, _children())),
                "peak of the training process (MB)": resource.getrusage(
                    resource.RUSAGE_SELF
                ).ru_maxrss
                * 1024
                / 1e6,
            }
        )
    return pd.DataFrame(rows)


class _Epoch:
    """Calling it trains one epoch with train.py's own loaders, loop and defaults."""

    def __init__(self, config: EpochConfig, folder: Path, cache: bool = False) -> None:
        self.config = resolve(
            TrainConfig(
                data_root=str(folder),
                cache=str(folder / "cache") if cache else "",
                model=config.model,
                weights="none",
                image_size=config.image_size,
                batch_size=config.batch_size,
                workers=config.workers,
                device=config.device,
                epochs=1000,
            )
        )
        device = choose_device(config.device)
        self.loader, *_, num_classes = build_dataloaders(self.config)
        model = build_model_from_config(vars(self.config), num_classes)
        suit_device(model, device, choose_precision(self.config.amp, device))
        self.run = Training(self.config, model, device, batches_per_epoch(self.loader))
        self.interrupt = Interrupt()
        self.interrupt.restore()
        self.waited = self.total = 0.0

    def __call__(self) -> None:
        began = time.perf_counter()
        train_one_epoch(self.run, self.run.model, _Watched(self), self.interrupt)
        self.total += time.perf_counter() - began
        self.run.epoch, self.run.step = self.run.epoch + 1, 0


class _Watched:
    """A loader that adds up how long the training waits for it."""

    def __init__(self, epoch: _Epoch) -> None:
        self.epoch = epoch

    def __getattr__(self, name: str) -> Any:
        return getattr(self.epoch.loader, name)

    def __iter__(self) -> Iterator[Batch]:
        batches = iter(self.epoch.loader)
        while True:
            began = time.perf_counter()
            batch = next(batches, None)
            self.epoch.waited += time.perf_counter() - began
            if batch is None:
                return
            yield batch


def _naive_epoch(config: EpochConfig, folder: Path, device: torch.device) -> Any:
    options = {"n_frames": 16, "image_size": config.image_size} if config.model == "vivit" else {}
    model = build_model(config.model, len(CLASSES), **options).to(device)
    clips = NaiveClips(read_manifest(folder / "train.csv"), 16, config.image_size)
    loader = DataLoader(clips, config.batch_size, shuffle=True, num_workers=config.workers)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    return lambda: train_naively(model, loader, optimizer, device)


def _write_data(config: EpochConfig, folder: Path, height: int, frames: int) -> None:
    """Clips, their manifests and their cache."""
    cache = ClipCache.create(folder / "cache", folder, CacheSettings(image_size=config.image_size))
    (folder / "clips").mkdir()
    splits = {"train": config.clips, "val": 1, "test": 1}
    for split, count in splits.items():
        with open(folder / f"{split}.csv", "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["path", "label"])
            for number in range(max(count, len(CLASSES)) if split == "train" else count):
                clip = folder / "clips" / f"{split}_{number}.mp4"
                first = folder / "clips" / f"train_{number % DISTINCT}.mp4"
                if first.exists():
                    shutil.copy(first, clip)
                else:
                    write_benchmark_video(clip, height, frames, 250, config.source, seed=number)
                cache.write(clip)
                writer.writerow([clip.name, CLASSES[number % len(CLASSES)]])


def _children() -> list[str]:
    path = Path("/proc/self/task")
    return [pid for task in path.iterdir() for pid in (task / "children").read_text().split()]


def _resident(process: str) -> float:
    """Memory of a process in MB: its own share of pages that several have (Linux)."""
    for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024 / 1e6
    return float("nan")
