"""What the tests share: tiny clips, tiny manifests, scripts run as subprocesses, real files."""

import csv
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import nn
from torchvision.transforms.v2 import functional as tv

from modeling.frame_encoder import decode_motion
from tsm_resnet import TSM
from video.encoder import write_video

ROOT = Path(__file__).parent.parent


def make_clip(path: Path, brightness: int, frames: int = 20, size: int = 32, seed: int = 0) -> Path:
    """A bright square that moves over noise; `brightness` tells the clip's class."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 40, (frames, size, size, 3), dtype=np.uint8)
    for number, frame in enumerate(noise):
        left = (seed + number) % (size // 2)
        frame[4:20, left : left + 10] = brightness
    write_video(path, noise)
    return path


def make_data(
    root: Path, classes: tuple[str, ...], clips: dict[str, int], frames: int = 20
) -> Path:
    """Manifests with `clips[split]` tiny clips a class; each split has patients of its own."""
    for split, count in clips.items():
        with open(root / f"{split}.csv", "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["path", "label", "patient"])
            for label, name in enumerate(classes):
                for number in range(count):
                    path = root / "clips" / split / f"{label}_{number}.mp4"
                    seed = 1000 * label + number + 100 * len(split)
                    make_clip(path, 60 + 190 * label // len(classes), frames, seed=seed)
                    relative = path.relative_to(root / "clips")
                    writer.writerow([relative.as_posix(), name, f"{split}{number % 2}"])
    return root


# fmt: off
TINY_FLAGS = [  # ViViT is the smallest of the models: a quarter of TSM's time for a step
    "--classes", "dark", "grey", "light", "--weights", "none", "--image-size", "32",
    "--model", "vivit", "--n-frames", "4", "--batch-size", "6", "--learning-rate", "1e-3",
    "--workers", "0", "--amp", "fp32", "--device", "cpu",
]
# fmt: on


def run_script(
    *arguments: object, cwd: Path, check: bool = True, timeout: float = 280, **environment: str
) -> subprocess.CompletedProcess:
    """Run a script (`train.py`) or a module (`demo.data`) in a folder, as a person would."""
    script, *rest = map(str, arguments)
    start = [str(ROOT / script)] if script.endswith(".py") else ["-m", script]
    done = subprocess.run(
        [sys.executable, *start, *rest],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    if check:
        assert done.returncode == 0, f"{script} failed:\n{done.stdout}\n{done.stderr}"
    return done


def train_flags(data: Path, *more: object) -> list[str]:
    """Of a tiny training of four epochs."""
    own = ["--data-root", str(data), "--epochs", "4", "--dropout", "0.2"]
    return [*own, *TINY_FLAGS, *map(str, more)]


def only_run(folder: Path) -> Path:
    (run,) = (folder / "runs").iterdir()
    return run


def history(run: Path) -> pd.DataFrame:
    return pd.read_csv(run / "metrics.csv").drop(columns="seconds")


class Ended(NamedTuple):
    """How a script ended, and what it printed."""

    code: int
    stdout: str
    stderr: str


class Mistake(NamedTuple):
    """How a script ended that could not do what it was told."""

    code: int
    stderr: str


CHROMIUM = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "{{7*7}}",
    "it's & <b>",
    "A" * 60,
    "Ångström/use_CLIPPER",
    "x",
)


PALE_TEXTS = """() => {
  const parse = text => {
    const n = text.match(/[\\d.]+/g).map(Number);
    return n.length > 3 ? n : [...n, 1];
  };
  const over = (top, under) => top.slice(0, 3).map((c, i) => c * top[3] + under[i] * (1 - top[3]));
  const light = rgb => {
    const [r, g, b] = rgb.map(c => c / 255).map(
      c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = element => {
    if (!element) return [255, 255, 255];
    const colour = parse(getComputedStyle(element).backgroundColor);
    return colour[3] === 1 ? colour.slice(0, 3) : over(colour, behind(element.parentElement));
  };
  const pale = [];
  let seen = 0;
  for (const element of document.querySelectorAll("body *")) {
    const own = [...element.childNodes].some(n => n.nodeType === 3 && n.textContent.trim());
    if (!own || element.tagName === "title" || !element.getClientRects().length) continue;
    const style = getComputedStyle(element);
    const ink = parse(element.ownerSVGElement ? style.fill : style.color);
    const page = behind(element);
    const [a, b] = [light(over(ink, page)), light(page)];
    const contrast = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    seen += 1;
    if (contrast < 4.5) pale.push(`${element.tagName} ${element.textContent.trim()} ${contrast}`);
  }
  return [seen, pale];
}"""


SIDE = 96


def scene(height: int, width: int) -> np.ndarray:
    """A still, large picture with details at several scales, `(height, width, 3)` uint8."""
    generator = torch.Generator().manual_seed(0)
    total = torch.zeros(3, height, width)
    for cells in (16, 8, 4):
        noise = torch.rand(3, height // cells + 1, width // cells + 1, generator=generator)
        total += tv.resize(noise, [height, width], antialias=True)
    total = (total - total.mean()) / total.std() * 50 + 128
    return total.clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy()


def pan(right: int, down: int, frames: int = 12, height: int = SIDE, width: int = SIDE):
    """Frames whose content moves by so many pixels a frame."""
    still = scene(height + abs(down) * frames, width + abs(right) * frames)
    tops = [(frames - 1 - t if down > 0 else t) * abs(down) for t in range(frames)]
    lefts = [(frames - 1 - t if right > 0 else t) * abs(right) for t in range(frames)]
    return [still[y : y + height, x : x + width] for y, x in zip(tops, lefts, strict=True)]


def moving(path: Path, right: int = 3, down: int = -2, frames: int = 12) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_video(path, pan(right, down, frames))
    return path


def pixels(field: np.ndarray, side: int = SIDE) -> np.ndarray:
    """Median motion to the right and down of a field `(2, h, w)` in pixels."""
    return np.median(decode_motion(torch.from_numpy(field)).numpy(), axis=(1, 2)) * side


def clips(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def lively(**options: object) -> TSM:
    """A random model in eval mode, its BatchNorm statistics those of some clips.

    With fresh statistics the signal fades or explodes: all models would give the same logits.
    """
    torch.manual_seed(0)
    model = TSM(**options)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0  # take the statistics of the next batch
    with torch.no_grad():
        model(clips(2, 4, 3, 64, 64, seed=1))
    return model.eval()
