"""Times how clips reach the model: decoding, the cache, augmentation, training, memory.

    python -m benchmarks.data                             all tables, 20 minutes on two CPU cores
    python -m benchmarks.data --what decode --repeats 9 --source real.mp4
    python -m benchmarks.data --what training --device cuda --model-name tsm_resnet --num-workers 12

Each table compares several ways to do the same thing, which take turns; times are medians. Other
libraries are timed too if they are installed (pip install -r requirements-dev.txt). The videos are
H.264 with B-frames, written from a moving rendered scene or from the frames of a real video.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from PIL import Image
from torchvision.transforms import v2

from benchmarks import epoch_time
from benchmarks.baselines import augment_each_frame, decoders
from benchmarks.epoch_time import EpochConfig
from benchmarks.timing import environment, interleave, report
from benchmarks.videos import write_benchmark_video
from clips.cache import CacheSettings, ClipCache
from clips.transforms import ClipAugment
from utils.cli import cli_main, parse
from utils.device import get_device
from utils.errors import UserError
from video.clip_reader import FrameSampler, read_clip
from video.decoder import read_frames

What = Literal["decode", "cache", "augment", "training", "memory"]


@dataclass
class BenchmarkConfig(EpochConfig):
    """What to time, and how often."""

    what: tuple[What, ...] = ("decode", "cache", "augment", "training", "memory")
    """tables to make"""
    output: str = "runs/benchmarks"
    """folder for the tables"""


# height, number of frames, largest distance between keyframes
VIDEOS = [
    (360, 30, 250),
    (360, 100, 25),
    (720, 100, 250),
    (720, 250, 25),
    (1080, 100, 25),
    (1080, 250, 250),
]

CACHED_VIDEOS = [(720, 30, 250), (720, 100, 250), (720, 250, 250)]
QUALITY = 76  # of the images: with it they are as large as those in the cache


def time_decoding(config: BenchmarkConfig, folder: Path) -> pd.DataFrame:
    """Time decoding 16 evenly spaced frames of 224 px in one process, here and in other libraries.

    Raises:
        RuntimeError: a frame differs from what decoding everything gives.
    """
    paths = {f"{h}p, {n} frames, g {g}": folder / f"{h}_{n}_{g}.mp4" for h, n, g in VIDEOS}
    for (height, count, group), path in zip(VIDEOS, paths.values(), strict=True):
        write_benchmark_video(path, height, count, group, config.source)
    if config.source:
        paths["the source as it is"] = Path(config.source)
    rows = []
    for name, path in paths.items():
        calls = {
            "this project": lambda path=path: read_clip(path).rgb,
            "decoding all": lambda path=path: _decode_all(path),
            **{
                peer: lambda path=path, decode=decode: decode(path, 16, 224)
                for peer, decode in decoders().items()
            },
        }
        if not np.array_equal(calls["this project"](), calls["decoding all"]()):
            raise RuntimeError(f"{name}: the frames differ from those of decoding everything")
        seconds = {n: np.median(s) for n, s in interleave(calls, config.repeats).items()}
        rows.append({"video": name, **{f"{n} (ms)": 1000 * s for n, s in seconds.items()}})
    table = pd.DataFrame(rows)
    total = {"video": "all, summed", **table.drop(columns="video").sum()}
    table = pd.concat([table, pd.DataFrame([total])], ignore_index=True)
    for column in table.columns[2:]:
        table[column.replace(" (ms)", " (x)")] = table[column] / table["this project (ms)"]
    return table


def _decode_all(path: Path) -> np.ndarray:
    # With `stop_after` every frame is decoded, not only those that are needed.
    return read_frames(path, FrameSampler().indices, 224, stop_after=10**9)


def time_cache(config: BenchmarkConfig, folder: Path) -> pd.DataFrame:
    """Time reading 16 frames from the cache, and from a folder of JPEG images of the same size and
    quality, against decoding them from 720p."""
    cache = ClipCache.create(folder / "cache", folder, CacheSettings())
    rows = []
    for height, count, group in CACHED_VIDEOS:
        clip = folder / f"cached_{count}.mp4"
        write_benchmark_video(clip, height, count, group, config.source)
        size, _ = cache.write(clip)
        images = folder / f"images_{count}"
        images.mkdir()
        for number, frame in enumerate(read_frames(clip, range), 1):
            Image.fromarray(frame).save(images / f"img_{number:05d}.jpg", quality=QUALITY)
        calls = {
            "decode": lambda c=clip: read_clip(c).rgb,
            "read": lambda c=clip: cache.read(c).rgb,
            "images": lambda c=images: read_clip(c).rgb,
        }
        seconds = {
            n: np.median(s) for n, s in interleave(calls, config.repeats, in_a_row=3).items()
        }
        error = np.abs(calls["read"]().astype(int) - calls["decode"]()).mean()
        kept = min(count, 80)
        rows.append(
            {
                "video": f"{height}p, {count} frames",
                "decoded (ms)": 1000 * seconds["decode"],
                "from the cache (ms)": 1000 * seconds["read"],
                "from images (ms)": 1000 * seconds["images"],
                "faster (x)": seconds["decode"] / seconds["read"],
                "frames kept": f"{kept}",
                "kB per 16 frames": size / kept * 16 / 1000,
                "mean difference (grey levels)": error,
            }
        )
    return pd.DataFrame(rows)


def time_augmentation(config: BenchmarkConfig, folder: Path) -> pd.DataFrame:
    """Time flip, rotation, affine and colours on 16 x 224 x 224, on one thread as in a worker."""
    write_benchmark_video(folder / "augment.mp4", 360, 30, 250, config.source)
    frames = read_clip(folder / "augment.mp4").rgb  # (T, H, W, 3)
    clip = torch.from_numpy(frames).permute(0, 3, 1, 2).contiguous()  # (T, 3, H, W)
    chain = v2.Compose(
        [
            v2.RandomHorizontalFlip(),
            v2.RandomRotation(10, interpolation=v2.InterpolationMode.BILINEAR),
            v2.ColorJitter(0.2, 0.2, 0.2, 0.02),
            v2.RandomAffine(
                0, (0.05, 0.05), (0.9, 1.1), interpolation=v2.InterpolationMode.BILINEAR
            ),
        ]
    )
    augment = ClipAugment()
    calls = {
        "PIL, per frame": lambda: augment_each_frame(
            frames, 7.0, (5, -4), 1.07, 1.1, 0.9, 1.15, 0.01
        ),
        "torchvision v2 on the clip": lambda: chain(clip),
        "this project": lambda: augment(clip),
    }
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    times = interleave(calls, config.repeats, warmup=3, in_a_row=5)
    torch.set_num_threads(threads)
    slowest = np.median(times["PIL, per frame"])
    return pd.DataFrame(
        {
            "chain": name,
            "ms/clip": 1000 * np.median(seconds),
            "faster (x)": slowest / np.median(seconds),
        }
        for name, seconds in times.items()
    )


TABLES: dict[What, Any] = {
    "decode": time_decoding,
    "cache": time_cache,
    "augment": time_augmentation,
    "training": epoch_time.time_training,
    "memory": epoch_time.watch_memory,
}


@cli_main
def main() -> None:
    config = parse(
        BenchmarkConfig, __doc__, old_names={"model": "model_name", "workers": "num_workers"}
    )
    for name in ("repeats", "clips", "batch_size", "image_size", "epochs"):
        if getattr(config, name) < 1:
            raise UserError(f"{name} = {getattr(config, name)}: must be at least 1")
    if config.source and not Path(config.source).is_file():
        raise UserError(f"{config.source}: no such file")
    device = get_device(config.device)
    for what in config.what:
        with tempfile.TemporaryDirectory() as folder:
            table = TABLES[what](config, Path(folder))
        packages = ("decord", "torchcodec", "opencv-python-headless") if what == "decode" else ()
        source = Path(config.source).name if config.source else "rendered"
        conditions = environment(device, packages, n=config.repeats, source=source)
        report(what, table, conditions, config.output)


if __name__ == "__main__":
    main()
