"""What the tests share: tiny clips, manifests, models and training runs, and started scripts."""

import atexit
import csv
import importlib
import math
import multiprocessing
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import nn
from torch.utils.data import DataLoader
from torchvision.transforms.v2 import functional as tv

from config import TrainConfig
from modeling.frame_encoder import decode_motion
from models import MODELS
from training.checks import resolve
from training.engine import train_one_epoch
from training.losses import Criterion
from training.optim import ModelEma, cosine_with_warmup, param_groups
from training.state import Progress, TrainState
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
    """Manifests with `clips[split]` tiny clips per class; each split has patients of its own."""
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
    "--model-name", "vivit", "--n-frames", "4", "--batch-size", "6", "--learning-rate", "1e-3",
    "--num-workers", "0", "--precision", "fp32", "--device", "cpu",
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


_FORKSERVER = multiprocessing.get_context("forkserver")
_FORKSERVER.set_forkserver_preload(["train"])  # once, instead of in each of the processes


def start_script(
    script: str, *arguments: object, cwd: Path, stdin: Path | None = None, **environment: str
) -> BaseProcess:
    """Start a script in a process and process group of its own, which signals can disturb.

    The process is forked from one that has imported torch, which saves seconds. Its output is added
    to out.txt in the folder `cwd`.

    Args:
        stdin: what the script reads: a file or a named pipe.
    """
    cwd.mkdir(parents=True, exist_ok=True)
    process = _FORKSERVER.Process(
        target=_run_in, args=(script, list(map(str, arguments)), cwd, stdin, environment)
    )
    process.start()
    return process


def _run_in(
    script: str,
    arguments: Sequence[str],
    cwd: Path,
    stdin: Path | None,
    environment: dict[str, str],
) -> None:
    main = importlib.import_module(script.removesuffix(".py")).main
    os.environ.update(environment)
    os.setsid()
    os.chdir(cwd)
    if stdin:
        os.dup2(os.open(stdin, os.O_RDONLY), 0)
        sys.stdin = open(0)  # noqa: SIM115
    multiprocessing.set_start_method("fork", force=True)  # of loaders' workers, as in a script
    torch.set_num_threads(1)
    # It stays open until the end, because multiprocessing flushes it.
    output = open("out.txt", "a", buffering=1)  # noqa: SIM115
    sys.argv, sys.stdout, sys.stderr = [str(ROOT / script), *arguments], output, output
    try:
        main()
    except Exception:
        traceback.print_exc()
        raise
    finally:
        atexit._run_exitfuncs()  # a process of multiprocessing ends without


def wait_for(condition: Callable[[], object], process: BaseProcess, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.exitcode is None, "training ended before it could be disturbed"
        assert time.monotonic() < deadline
        time.sleep(0.02)


def train_flags(data: Path, *more: object) -> list[str]:
    """The flags of a tiny training run of four epochs."""
    own = ["--data-root", str(data), "--epochs", "4", "--dropout", "0.2"]
    return [*own, *TINY_FLAGS, *map(str, more)]


def tiny_config(data: Path, **settings: object) -> TrainConfig:
    """A resolved config for `tiny_data`: a ViViT on the CPU, three batches per epoch."""
    tiny = {"data_root": str(data), "classes": ("dark", "grey", "light"), "weights": "none"}
    tiny |= {"model_name": "vivit", "n_frames": 4, "image_size": 32, "batch_size": 6}
    tiny |= {"num_workers": 0, "precision": "fp32", "device": "cpu"}
    return resolve(TrainConfig(**{**tiny, **settings}))


def make_model(name: str, num_classes: int = 7, **options: object) -> nn.Module:
    """A model with options of its constructor, also with those that no setting has."""
    return MODELS[name](num_classes, **options)


def make_state(
    config: TrainConfig, model: nn.Module, batches: int = 3, class_counts: Sequence[int] = ()
) -> TrainState:
    """The state of a training run on the CPU, made as in train.py.

    Args:
        batches: number of batches per epoch.
    """
    rate = config.learning_rate
    groups = param_groups(model, rate, config.weight_decay, config.layer_decay)
    optimizer = torch.optim.AdamW(groups, lr=rate, fused=True)
    steps = math.ceil(batches / config.gradient_accumulation_steps)
    scheduler = cosine_with_warmup(
        optimizer, config.epochs * steps, int(config.warmup_epochs * steps)
    )
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    ema = ModelEma(model, config.ema_decay) if config.ema_decay else None
    progress = Progress(batches)
    return TrainState(config, model, optimizer, scheduler, scaler, ema, progress, class_counts)


def train_epoch(
    state: TrainState, loader: DataLoader, check_interrupt: Callable[[], None] = lambda: None
) -> None:
    """Train on what is left of the epoch; it is not counted as finished."""
    train_one_epoch(
        state.model,
        Criterion(state.config, state.class_counts),
        state.optimizer,
        state.scheduler,
        state.scaler,
        loader,
        torch.device("cpu"),
        state.config,
        state.progress,
        state.ema,
        check_interrupt=check_interrupt,
    )


def same_tensors(first: dict, second: dict) -> bool:
    """Whether two state dicts hold the same values, bit for bit."""
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


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
    """How a script ended that was given wrong arguments."""

    code: int
    stderr: str


# Flags of the headless browser in the tests of pages.
CHROMIUM = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


# Names of classes and patients that break pages that are not escaped.
HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "{{7*7}}",
    "it's & <b>",
    "A" * 60,
    "Ångström/use_CLIPPER",
    "x",
)


# JavaScript: the number of texts of a page, and those whose contrast with what is behind them is
# below 4.5 (WCAG 2, level AA).
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
    """A still, large image with details at several scales, `(height, width, 3)` uint8."""
    generator = torch.Generator().manual_seed(0)
    total = torch.zeros(3, height, width)
    for cells in (16, 8, 4):
        noise = torch.rand(3, height // cells + 1, width // cells + 1, generator=generator)
        total += tv.resize(noise, [height, width], antialias=True)
    total = (total - total.mean()) / total.std() * 50 + 128
    return total.clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy()


def pan(right: int, down: int, frames: int = 12, height: int = SIDE, width: int = SIDE):
    """Frames whose content moves by this many pixels per frame."""
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
    """A random TSM in eval mode whose BatchNorm statistics are those of some clips.

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
