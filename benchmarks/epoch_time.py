"""Times whole epochs of training for benchmarks/data.py: clips/s, waiting for clips, memory."""

import math
import multiprocessing
import resource
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from benchmarks.baselines import NaiveClips, train_naively
from benchmarks.timing import interleave
from benchmarks.videos import write_benchmark_video
from clips.cache import CacheSettings, ClipCache
from clips.manifest import CLASSES, read_manifest
from config import TrainConfig
from models import build_model
from training.checks import resolve
from training.engine import train_one_epoch
from training.loaders import batches_per_epoch, build_dataloaders
from training.losses import Criterion
from training.optim import cosine_with_warmup, param_groups
from training.state import Progress
from utils.device import autocast_dtype, get_device, prepare_model
from utils.tables import write_csv


@dataclass
class EpochConfig:
    """What to train, and how often."""

    repeats: int = 5
    """timed rounds"""
    source: str = ""
    """video whose frames are used for the benchmark's videos (empty: a rendered scene)"""
    model_name: str = "cnnlstm"
    """training, memory: model to train, one of models.MODELS"""
    clips: int = 24
    """training, memory: clips per epoch"""
    batch_size: int = 4
    """training, memory: clips per batch"""
    image_size: int = 224
    """training, memory: height and width of the frames in pixels"""
    num_workers: int = 2
    """training, memory: processes that read clips"""
    epochs: int = 20
    """memory: number of epochs"""
    device: str = "cpu"
    """training, memory: device, as in train.py"""


DISTINCT = 6  # number of videos that are encoded; the others are copies

HEIGHT, FRAMES = 720, 100  # 4 s


def time_training(config: EpochConfig, folder: Path) -> pd.DataFrame:
    """Time epochs from 720p files: as a naive script trains, with decoding, and with the cache."""
    _write_data(config, folder, HEIGHT, FRAMES)
    device = get_device(config.device)
    naive = _naive_epoch(config, folder, device)
    decoding, cached = _Epoch(config, folder), _Epoch(config, folder, cache=True)
    calls = {"naive": naive, "decoding": decoding, "from the cache": cached}
    times = interleave(calls, config.repeats, device, warmup=1)
    slowest = sorted(times["naive"])[config.repeats // 2]
    names = {
        "naive": "naive: decode and convert all frames, PIL per frame, fp32",
        "decoding": f"train.py, decoding ({decoding.dtype})",
        "from the cache": f"train.py, from the cache ({cached.dtype})",
    }
    rows = []
    for name, seconds in times.items():
        median = sorted(seconds)[config.repeats // 2]
        waiting = calls[name].waiting[-config.repeats :] if name != "naive" else [float("nan")]
        rows.append(
            {
                "training": names[name],
                "model": config.model_name,
                "clips/s": config.clips / median,
                "faster (x)": slowest / median,
                "waiting for clips (%)": 100 * np.median(waiting),
            }
        )
        if device.type == "cuda":
            rows[-1]["GPU busy (%)"] = 100 - rows[-1]["waiting for clips (%)"]
    return pd.DataFrame(rows)


def watch_memory(config: EpochConfig, folder: Path) -> pd.DataFrame:
    """Measure the memory of the training process and of its workers after each epoch, in MB."""
    # In another process: workers are forked and keep the memory that their parent had at that time.
    arguments = (config, folder, HEIGHT, FRAMES)
    writer = multiprocessing.get_context("spawn").Process(target=_write_data, args=arguments)
    writer.start()
    writer.join()
    train_epoch = _Epoch(config, folder, cache=True)
    rows = []
    for epoch in tqdm(range(1, config.epochs + 1), "measuring memory", unit="epoch", leave=False):
        train_epoch()
        rows.append(
            {
                "epoch": f"{epoch}",
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
    """Trains one epoch per call, with the loaders, the loop and the defaults of train.py."""

    def __init__(self, config: EpochConfig, folder: Path, cache: bool = False) -> None:
        settings = resolve(
            TrainConfig(
                data_root=str(folder),
                cache=str(folder / "cache") if cache else "",
                model_name=config.model_name,
                weights="none",
                image_size=config.image_size,
                batch_size=config.batch_size,
                num_workers=config.num_workers,
                device=config.device,
                epochs=1000,
            )
        )
        device = get_device(config.device)
        self.dtype = autocast_dtype(settings.precision, device)
        self.loader, *_, num_classes = build_dataloaders(settings)
        model = build_model(settings, num_classes)
        self.train = epoch_trainer(settings, model, batches_per_epoch(self.loader), device)
        self.waiting: list[float] = []
        """of each epoch the fraction of its time for which the device had no batch"""

    def __call__(self) -> None:
        start = time.perf_counter()
        waited = self.train(self.loader)
        self.waiting.append(waited / (time.perf_counter() - start))


def epoch_trainer(
    config: TrainConfig, model: nn.Module, batches: int, device: torch.device
) -> Callable[[DataLoader], float]:
    """A call that trains a model for one epoch on a loader, as train.py does, and returns the
    seconds for which the device had no batch (`training.engine.WaitClock`).

    Args:
        config: a resolved config; its loss needs no class counts.
        batches: number of batches per epoch.
    """
    dtype = autocast_dtype(config.precision, device)
    prepare_model(model, device, dtype)
    optimizer = torch.optim.AdamW(
        param_groups(model, config.learning_rate, config.weight_decay, config.layer_decay),
        lr=config.learning_rate,
        fused=device.type in ("cpu", "cuda"),
    )
    steps = math.ceil(batches / config.gradient_accumulation_steps)
    warmup_steps = int(config.warmup_epochs * steps)
    scheduler = cosine_with_warmup(optimizer, config.epochs * steps, warmup_steps)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    criterion, progress = Criterion(config, device=device), Progress(batches)

    def train(loader: DataLoader) -> float:
        train_one_epoch(
            model, criterion, optimizer, scheduler, scaler, loader, device, config, progress
        )
        waited = progress.waited
        progress.end_epoch()
        return waited

    return train


def _naive_epoch(config: EpochConfig, folder: Path, device: torch.device) -> Callable[[], None]:
    settings = TrainConfig(model_name=config.model_name, n_frames=16, image_size=config.image_size)
    model = build_model(settings, len(CLASSES)).to(device)
    clips = NaiveClips(read_manifest(folder / "train.csv"), 16, config.image_size)
    loader = DataLoader(clips, config.batch_size, shuffle=True, num_workers=config.num_workers)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    return lambda: train_naively(model, loader, optimizer, device)


def _write_data(config: EpochConfig, folder: Path, height: int, frames: int) -> None:
    """Write clips, their manifests and their cache."""
    cache = ClipCache.create(folder / "cache", folder, CacheSettings(image_size=config.image_size))
    (folder / "clips").mkdir()
    splits = {"train": config.clips, "val": 1, "test": 1}
    for split, count in splits.items():
        rows = [["path", "label"]]
        for index in range(max(count, len(CLASSES)) if split == "train" else count):
            clip = folder / "clips" / f"{split}_{index}.mp4"
            first = folder / "clips" / f"train_{index % DISTINCT}.mp4"
            if first.exists():
                shutil.copy(first, clip)
            else:
                write_benchmark_video(clip, height, frames, 250, config.source, seed=index)
            cache.write(clip)
            rows.append([clip.name, CLASSES[index % len(CLASSES)]])
        write_csv(folder / f"{split}.csv", rows)


def _children() -> list[str]:
    path = Path("/proc/self/task")
    return [pid for task in path.iterdir() for pid in (task / "children").read_text().split()]


def _resident(process: str) -> float:
    """Memory of a process in MB; shared pages are divided among their processes (Linux)."""
    for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024 / 1e6
    return float("nan")
