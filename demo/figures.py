"""Pictures of the demo data for the documentation.

python -m demo.figures filmstrip docs/demo_filmstrip.png       a filmstrip per class
python -m demo.figures corruptions docs/corruptions.png        a clip under every corruption
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from matplotlib.figure import Figure
from torchvision.transforms.v2 import functional as tv
from torchvision.utils import make_grid

from clips.corruptions import CORRUPTIONS, SEVERITIES, corrupt
from clips.manifest import CLASSES
from demo.data import Clip, render
from demo.scene import FRAMES
from utils.cli import script
from utils.files import atomic


def demo_clip(size: int = 224) -> torch.Tensor:
    """16 frames of the demo data, `(16, 3, size, size)` uint8, squeezed as a file's would be."""
    frames = render(Clip("train", 5, 1, 1, 1, "Suturing"))  # (30, H, W, 3)
    frames = frames[np.linspace(0, len(frames) - 1, 16).round().astype(int)]
    return tv.resize(torch.from_numpy(frames).permute(0, 3, 1, 2), [size, size], antialias=True)


def draw_corruptions(path: str | Path, clip: torch.Tensor, seed: int = 0) -> None:
    """A row for each corruption: the middle frame clean and in all severities.

    Lost frames do not show in one picture: their rows go through the clip at severity 3.
    """
    columns, middle, side = 1 + len(SEVERITIES), len(clip) // 2, clip.shape[-1] + 4
    times = np.linspace(0, len(clip) - 1, columns).round().astype(int).tolist()
    frames, notes, labels = [], [], []
    for name in CORRUPTIONS:
        if name.startswith("frame_"):
            frames += corrupt(clip, name, 3, seed)[times]
            numbers = torch.arange(len(clip), dtype=torch.uint8).view(-1, 1, 1, 1)
            shown = corrupt(numbers.expand(-1, 3, 16, 16), name, 3, seed)[times, 0, 0, 0].tolist()
            notes += [f"{time}" if time == old else f"{time} (shows {old})"
                      for time, old in zip(times, shown, strict=True)]  # fmt: skip
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
        corner = (i % columns + 0.06) * side, (i // columns + 0.96) * side
        axes.text(*corner, note, color=colour, fontsize=8, va="bottom")
    axes.set_yticks([(row + 0.5) * side for row in range(len(labels))], labels, fontsize=9)
    axes.tick_params(length=0)
    axes.set(xticks=[], frame_on=False)
    with atomic(path) as unfinished:
        figure.savefig(unfinished, dpi=100, bbox_inches="tight", pad_inches=0.03)


def draw_filmstrip(path: str | Path, columns: int = 7) -> None:
    """One row of frames for each class, for the README."""
    patients = {action: 1 + number for number, action in enumerate(CLASSES)}
    figure = Figure(figsize=(1.3 * columns, 1.02 * len(CLASSES)), layout="constrained")
    grid = figure.subplots(len(CLASSES), columns)
    for row, action in zip(grid, CLASSES, strict=True):
        frames = render(Clip("train", patients[action], 1, 1, 1, action))
        picks = np.linspace(0, FRAMES - 1, columns).round().astype(int)
        for axes, pick in zip(row, picks, strict=True):
            axes.imshow(frames[pick])
            axes.set(xticks=[], yticks=[])
            for spine in axes.spines.values():
                spine.set_visible(False)
            if action == CLASSES[0]:
                axes.set_title(f"{pick / 25:.2f} s", fontsize=8)
        row[0].set_ylabel(action, fontsize=8, rotation=0, ha="right", va="center")
    with atomic(path) as unfinished:
        figure.savefig(unfinished, dpi=110)


@dataclass
class FigureConfig:
    """What to draw, and where."""

    figure: tyro.conf.Positional[Literal["filmstrip", "corruptions"]]
    """which picture"""
    path: tyro.conf.Positional[Path]
    """the file to write"""
    size: int = 224
    """corruptions: side of a frame in pixels"""
    seed: int = 3
    """corruptions: seed of the places, directions and moments"""


@script
def main() -> None:
    config = tyro.cli(FigureConfig, description=__doc__)
    if config.figure == "filmstrip":
        draw_filmstrip(config.path)
    else:
        draw_corruptions(config.path, demo_clip(config.size), config.seed)


if __name__ == "__main__":
    main()
