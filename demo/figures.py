"""Draws the figures of the documentation that show the demo data.

python -m demo.figures filmstrip docs/demo_filmstrip.png       a filmstrip per class
python -m demo.figures corruptions docs/corruptions.png        a clip under every corruption
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import tyro

from clips.manifest import CLASSES
from demo.data import Clip, render
from demo.scene import FRAMES
from utils.cli import cli_main, parse
from utils.files import atomic

# torch, torchvision and matplotlib are imported in the functions: --help does without them.
if TYPE_CHECKING:
    import torch


def demo_clip(size: int = 224) -> "torch.Tensor":
    """16 frames of the demo data, squeezed to a square: `(16, 3, size, size)` uint8."""
    import torch
    from torchvision.transforms.v2 import functional as tv

    frames = render(Clip("train", 5, 1, 1, 1, "Suturing"))  # (30, H, W, 3)
    frames = frames[np.linspace(0, len(frames) - 1, 16).round().astype(int)]
    return tv.resize(torch.from_numpy(frames).permute(0, 3, 1, 2), [size, size], antialias=True)


def draw_corruptions(path: str | Path, clip: "torch.Tensor", seed: int = 0) -> None:
    """Draw a row per corruption: the middle frame without it and at all severities.

    Lost frames cannot be seen in a single frame: their rows show frames over the whole clip at
    severity 3.
    """
    import torch
    from matplotlib.figure import Figure
    from torchvision.utils import make_grid

    from clips.corruptions import CORRUPTIONS, SEVERITIES, corrupt

    columns, middle, side = 1 + len(SEVERITIES), len(clip) // 2, clip.shape[-1] + 4
    times = np.linspace(0, len(clip) - 1, columns).round().astype(int).tolist()
    frames, notes, labels = [], [], []
    for name in CORRUPTIONS:
        if name.startswith("frame_"):
            frames += corrupt(clip, name, 3, seed)[times]
            indices = torch.arange(len(clip), dtype=torch.uint8).view(-1, 1, 1, 1)
            sources = corrupt(indices.expand(-1, 3, 16, 16), name, 3, seed)[times, 0, 0, 0].tolist()
            notes += [f"{time}" if time == source else f"{time} (shows {source})"
                      for time, source in zip(times, sources, strict=True)]  # fmt: skip
            labels.append(f"{name}\nseverity 3,\nover time")
        else:
            frames += [clip[middle]]
            frames += [corrupt(clip, name, severity, seed)[middle] for severity in SEVERITIES]
            notes += ["clean", *map(str, SEVERITIES)]
            labels.append(name)
    figure = Figure(figsize=(8, 1.36 * len(CORRUPTIONS)))
    axes = figure.subplots()
    axes.imshow(make_grid(frames, columns, padding=4, pad_value=255).permute(1, 2, 0).numpy())
    for i, note in enumerate(notes):
        colour = "yellow" if "shows" in note else "white"
        position = (i % columns + 0.06) * side, (i // columns + 0.96) * side
        axes.text(*position, note, color=colour, fontsize=8, va="bottom")
    axes.set_yticks([(row + 0.5) * side for row in range(len(labels))], labels, fontsize=9)
    axes.tick_params(length=0)
    axes.set(xticks=[], frame_on=False)
    with atomic(path) as unfinished:
        figure.savefig(unfinished, dpi=100, bbox_inches="tight", pad_inches=0.03)


def draw_filmstrip(path: str | Path, columns: int = 7) -> None:
    """Draw a row of frames per class."""
    from matplotlib.figure import Figure

    patients = {action: 1 + index for index, action in enumerate(CLASSES)}
    figure = Figure(figsize=(1.3 * columns, 1.02 * len(CLASSES)), layout="constrained")
    grid = figure.subplots(len(CLASSES), columns)
    for row, action in zip(grid, CLASSES, strict=True):
        frames = render(Clip("train", patients[action], 1, 1, 1, action))
        indices = np.linspace(0, FRAMES - 1, columns).round().astype(int)
        for axes, index in zip(row, indices, strict=True):
            axes.imshow(frames[index])
            axes.set(xticks=[], yticks=[])
            for spine in axes.spines.values():
                spine.set_visible(False)
            if action == CLASSES[0]:
                axes.set_title(f"{index / 25:.2f} s", fontsize=8)
        row[0].set_ylabel(action, fontsize=8, rotation=0, ha="right", va="center")
    with atomic(path) as unfinished:
        figure.savefig(unfinished, dpi=110)


@dataclass
class FigureConfig:
    """What to draw, and where to write it."""

    figure: tyro.conf.Positional[Literal["filmstrip", "corruptions"]]
    """figure to draw"""
    path: tyro.conf.Positional[Path]
    """image file to write"""
    size: int = 224
    """corruptions: height and width of a frame in pixels"""
    seed: int = 3
    """corruptions: random seed"""


@cli_main
def main() -> None:
    config = parse(FigureConfig, __doc__)
    if config.figure == "filmstrip":
        draw_filmstrip(config.path)
    else:
        draw_corruptions(config.path, demo_clip(config.size), config.seed)


if __name__ == "__main__":
    main()
