"""Writes the videos that the benchmarks read."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from video.decoder import read_frames
from video.encoder import write_video


def write_benchmark_video(
    path: Path, height: int, count: int, group: int, source: str = "", seed: int = 0
) -> None:
    """Write an H.264 video of 16 : 9 frames, from a rendered scene or from the frames of a video.

    Args:
        count: number of frames.
        group: largest distance between keyframes.
        source: video whose frames are used, from its start again when it ends (empty: a rendered
            scene).
    """
    width = height * 16 // 9 // 2 * 2
    frames = (
        _from_video(source, height, width, count) if source else _scene(height, width, count, seed)
    )
    write_video(path, frames, group=group)


def _scene(height: int, width: int, count: int, seed: int) -> Iterator[np.ndarray]:
    """Frames of a camera that sways over coarse and fine texture, with noise; (H, W, 3) uint8."""
    generator = torch.Generator().manual_seed(seed)
    size = (height + 96, width + 96)
    coarse = torch.rand(1, 3, size[0] // 24, size[1] // 24, generator=generator)
    fine = torch.rand(1, 3, size[0] // 4, size[1] // 4, generator=generator)
    scene = 150 * F.interpolate(coarse, size, mode="bicubic") + 70 * F.interpolate(fine, size)
    scene = scene[0].permute(1, 2, 0).clamp(0, 235)  # (H, W, 3)
    for t in range(count):
        top, left = (int(48 + 47 * np.sin(t / period)) for period in (17, 11))
        view = scene[top : top + height, left : left + width]
        noise = 2 * torch.randn(height, width, 1, generator=generator)
        yield (view + noise).clamp(0, 255).to(torch.uint8).numpy()


def _from_video(source: str, height: int, width: int, count: int) -> Iterator[np.ndarray]:
    """The frames of a video, resized, from its start again when it ends."""
    chunk = 25  # frames in memory at a time
    available = []
    read_frames(source, lambda n: available.append(n) or [0], 16)
    for start in range(0, count, chunk):
        indices = [n % available[-1] for n in range(start, min(start + chunk, count))]
        for frame in read_frames(source, lambda _, indices=indices: indices, None):
            yield np.asarray(Image.fromarray(frame).resize((width, height)))
