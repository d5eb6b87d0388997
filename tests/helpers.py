"""What the tests share: tiny clips, manifests, models and training runs, and started scripts."""

import atexit
import contextlib
import csv
import importlib
import logging
import math
import multiprocessing
import os
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import av
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.data import DataLoader
from torchvision.transforms.v2 import functional as tv

from config import TrainConfig
from explanation.relevance import ExplainedClip
from modeling.frame_encoder import decode_motion
from models import MODELS, model_options
from training.checks import resolve
from training.engine import train_one_epoch
from training.losses import Criterion
from training.optim import ModelEma, cosine_with_warmup, param_groups
from training.state import Progress, TrainState
from tsm_resnet import TSM
from utils.cli import cli_main, end_workers
from video.encoder import write_video

ROOT = Path(__file__).parent.parent


def explained_clip(maps: np.ndarray, size: tuple[int, int], **fields: object) -> ExplainedClip:
    """A red clip with these maps `(T, h, w)`, whose frames' relevance rises from -1 to 1.

    Args:
        size: height and width of the frames in pixels.
    """
    count = len(maps)
    values = {
        "name": "data/P058/VID12_0003.mp4",
        "frames": np.full((count, *size, 3), (150, 40, 40), np.uint8),
        "times": np.arange(count) * 0.4,
        "maps": maps,
        "relevance": np.linspace(-1, 1, count, dtype=np.float32),
        "method": "gradcam++",
        "predicted": "cut",
        "confidence": 0.83,
        "explained": "cut",
        "probability": 0.83,
    }
    return ExplainedClip(**(values | fields))


def touch(root: Path, *names: str) -> None:
    """Make empty files, and the folders that they are in."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def link(path: Path, target: Path) -> None:
    """Make a symbolic link, or skip the test where that is not possible (Windows)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        path.symlink_to(target, target_is_directory=target.is_dir())
    except OSError as error:
        pytest.skip(f"no symbolic links here: {error}")


def make_clip(path: Path, brightness: int, frames: int = 20, size: int = 32, seed: int = 0) -> Path:
    """A bright square that moves over noise; `brightness` tells the clip's class."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 40, (frames, size, size, 3), dtype=np.uint8)
    for number, frame in enumerate(noise):
        left = (seed + number) % (size // 2)
        frame[4:20, left : left + 10] = brightness
    write_video(path, noise)
    return path


def write_images(
    folder: Path, frames: Iterable[np.ndarray], name: str = "img_{:05d}.png", first: int = 1
) -> Path:
    """A folder of frames: numbered images that a viewer shows as these `(H, W, 3)` arrays."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, frame in enumerate(frames, first):
        Image.fromarray(frame).save(folder / name.format(number))
    return folder


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
# Once, instead of in each of the processes: what the scripts and this file import.
_PRELOAD = "train pandas pytest torchvision.transforms.v2 evaluation.plots sklearn.manifold"
_FORKSERVER.set_forkserver_preload(_PRELOAD.split())


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


def in_process(function: Callable[[], None], folder: Path, seconds: float = 50) -> tuple[int, str]:
    """Call a function as a script's `main` in a process that is forked from this one, so that
    PyTorch is imported already. Returns its exit code and its output.
    """
    if not hasattr(os, "fork"):
        pytest.skip("processes cannot be forked here")

    def run() -> None:
        output = os.open(folder / "out.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.stdout = sys.stderr = open(1, "w", buffering=1, encoding="utf-8")  # noqa: SIM115
        logging.basicConfig(stream=sys.stdout, force=True, format="%(message)s")
        try:
            cli_main(function)()
        finally:
            end_workers()  # as at the end of a script

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    process.join(seconds)
    if process.exitcode is None:
        process.kill()
        pytest.fail(f"it hangs:\n{(folder / 'out.txt').read_text()}")
    return process.exitcode, (folder / "out.txt").read_text(encoding="utf-8")


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
    """A model with options of its constructor, also with those that no setting has.

    A size of the clips is passed on to the models that are built for one.
    """
    sizes = {"n_frames", "image_size"} - model_options(name)
    return MODELS[name](num_classes, **{k: v for k, v in options.items() if k not in sizes})


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


class _StopWhere:
    """An Interrupt whose `check` is this function."""

    raised = contextlib.nullcontext

    def __init__(self, check: Callable[[], None]) -> None:
        self.check = check


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
        interrupt=_StopWhere(check_interrupt),
    )


def same_tensors(first: dict, second: dict) -> bool:
    """Whether two state dicts hold the same values, bit for bit."""
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def only_run(folder: Path) -> Path:
    (run,) = (folder / "runs").iterdir()
    return run


def history(run: Path) -> pd.DataFrame:
    return pd.read_csv(run / "metrics.csv").drop(columns=["seconds", "waiting"])


class Ended(NamedTuple):
    """How a script ended, and what it printed."""

    code: int
    stdout: str
    stderr: str


class Mistake(NamedTuple):
    """How a script ended that was given wrong arguments."""

    code: int
    stderr: str


def write_stamped(
    path: Path, milliseconds: Sequence[int], codec: str = "libvpx", live: bool = False
) -> Path:
    """A video with these time stamps and a header without a frame rate.

    Args:
        live: write it as a browser's MediaRecorder does: without a duration either.
    """
    options = {"live": "1"} if live else {}
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream(codec, rate=1000, options={"lag-in-frames": "0"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number, pts in enumerate(milliseconds):
            image = np.full((48, 64, 3), number, np.uint8)
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = pts, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def write_reordered(path: Path, rate: Fraction | int, frames: int = 120, first: int = 0) -> Path:
    """H.264 of constant rate in which up to 16 B-frames follow the frame that is shown after them.

    Args:
        first: number of the first frame: the file starts at `first / rate` seconds.
    """
    texture = np.random.default_rng(0).integers(0, 255, (100, 120, 3), dtype=np.uint8)
    options = {"bf": "16", "b_strategy": "0", "x264-params": "scenecut=0"}
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=rate, options=options)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for k in range(frames):
            image = np.ascontiguousarray(texture[k % 20 : k % 20 + 48, k % 30 : k % 30 + 64])
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = first + k, 1 / Fraction(rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def write_dv(path: Path, frames: int = 50) -> Path:
    """Raw DV, PAL: 25 frames per second."""
    with av.open(str(path), "w", format="dv") as container:
        stream = container.add_stream("dvvideo", rate=25)
        stream.width, stream.height, stream.pix_fmt = 720, 576, "yuv420p"
        for number in range(frames):
            image = np.full((576, 720, 3), number, np.uint8)
            frame = av.VideoFrame.from_ndarray(image, format="rgb24").reformat(format="yuv420p")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


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


# Widths of a phone, a tablet and two screens in pixels.
WIDTHS = (390, 768, 1280, 1920)

# Names of classes that do not fit beside anything.
LONG_NAMES = (
    "A" * 60,
    "Клипирование пузырного протока и пузырной артерии у шейки пузыря",
    "Лапароскопическая холецистэктомия",
    "Өт қабын қарағымен бөліп алу және қуысты тексеру",
    "use_clipper_on_the_cystic_artery/and_on_the_cystic_duct_too",
    "ЛапароскопическаяХолецистэктомияПоПоводуОстрогоХолецистита",
)

# JavaScript: what cannot be read of a page: a page that scrolls sideways, texts that are cut off
# by a box or by the edge of a picture or that leave their cell, boxes that scroll sideways and do
# not say so, and words, percentages and flags of commands that are broken where they could be on a
# line. A text of more than 20 characters may be cut if a tooltip says it all.
# The argument is a selector of boxes that may scroll sideways, or null.
CUT_TEXTS = """mayScroll => {
  const found = [];
  const visible = element => element.checkVisibility({ visibilityProperty: true });
  const quote = text => text.trim().replace(/\\s+/g, " ").slice(0, 50);
  const nameOf = box => `${box.closest("[id]")?.id} ${box.tagName} ${box.className}`;
  const page = document.documentElement;
  if (page.scrollWidth > page.clientWidth) found.push(`the page is ${page.scrollWidth} wide`);
  for (const box of document.querySelectorAll("body *")) {
    const text = box.innerText?.trim();
    if (!text || !visible(box) || box.matches("select, option, canvas")) continue;
    const isCell = box.matches("th, td, [role=cell], [role=columnheader]");
    if (text.length > 20 && box.title.includes(text)) continue;
    if (getComputedStyle(box).overflowX === "visible" && !isCell) continue;
    if (mayScroll && box.matches(mayScroll)) continue;
    if (box.scrollWidth > box.clientWidth) found.push(`cut: ${nameOf(box)}: ${quote(text)}`);
  }
  for (const box of document.querySelectorAll(".scroll:has(.hint)")) {
    const isHinted = box.querySelector(".hint").clientHeight > 15;
    const scrolls = box.scrollWidth > box.clientWidth;
    if (scrolls !== isHinted) found.push(`hint is ${isHinted}: ${nameOf(box)}: ${box.ariaLabel}`);
  }
  for (const text of document.querySelectorAll("svg text")) {
    const [inner, outer] = [text, text.ownerSVGElement].map(e => e.getBoundingClientRect());
    const above = 5; // pixels of a line above and below its figures
    if (visible(text) && (inner.left < outer.left - 1 || inner.right > outer.right + 1
      || inner.top < outer.top - above || inner.bottom > outer.bottom + above)) {
      found.push(`outside of its picture: ${quote(text.textContent)}`);
    }
  }
  const nodes = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (nodes.nextNode()) {
    const { parentElement, data } = nodes.currentNode;
    if (parentElement.closest("svg, script") || !visible(parentElement)) continue;
    const isTyped = parentElement.closest("pre, code, dd"); // paths are broken anywhere there
    const words = isTyped ? /--[\\w-]+/gu
      : /(--)?[\\p{L}\\p{N}_.]+((?<=--.*)-[\\w-]+)?(\\u00a0%)?/gu;
    for (const { 0: word, index } of data.matchAll(words)) {
      if (word.length > 20) continue;
      const range = document.createRange();
      range.setStart(nodes.currentNode, index);
      range.setEnd(nodes.currentNode, index + word.length);
      const edge = getComputedStyle(parentElement).writingMode === "horizontal-tb" ? "top" : "left";
      const lines = new Set([...range.getClientRects()].map(line => Math.round(line[edge])));
      if (lines.size > 1) found.push(`broken: ${nameOf(parentElement)}: ${word}`);
    }
  }
  return found;
}"""


# JavaScript: what a screen reader misses in a page: its language and title, and for each cell of a
# table the direction of the header.
UNNAMED = """() => [
  ...[document.documentElement.lang, document.title].filter(text => !text.trim()),
  ...[...document.querySelectorAll("th:not([scope]), table:not(:has(th[scope=col]))")].map(
    element => element.outerHTML.slice(0, 80)),
]"""


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


class GpuStandIn(TorchFunctionMode):
    """Lets code that was given the device `cuda` run on a machine without a GPU.

    Within it PyTorch says that there is a GPU, and every tensor that is put on it stays on the CPU.
    So all branches for a GPU run, except in its own kernels. It counts the calls that wait for the
    GPU and keeps the memory that was pinned.
    """

    name = "a stand-in for a GPU"

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        stand_ins = {
            "is_available": lambda: True,
            "is_bf16_supported": lambda including_emulation=True: True,
            "get_device_name": lambda device: self.name,
            "get_rng_state_all": list,
            "synchronize": lambda device=None: self._count("synchronize"),
            "reset_peak_memory_stats": lambda device: self._count("reset_peak_memory_stats"),
            "max_memory_allocated": lambda device: 123e6,
            "current_stream": lambda device: device,
            "Event": self._event,
        }
        for name, function in stand_ins.items():
            patch.setattr(torch.cuda, name, function)
        for kind in ("accelerator", "cuda"):  # the optimizer asks the driver, by version of torch
            name = f"_{kind}_graph_capture_health_check"
            patch.setattr(torch.optim.Optimizer, name, lambda _: None, raising=False)

    def __torch_function__(
        self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if function is torch.Tensor.pin_memory:
            self._count("pin_memory")
            return args[0]
        if function is torch.device:  # a device keeps its name
            return function(*args, **(kwargs or {}))
        args, kwargs = (self._on_cpu(value) for value in (args, kwargs or {}))
        return function(*args, **kwargs)

    def _on_cpu(self, value: Any) -> Any:
        if isinstance(value, dict):
            return {name: self._on_cpu(item) for name, item in value.items()}
        if isinstance(value, tuple):
            return tuple(self._on_cpu(item) for item in value)
        is_gpu = isinstance(value, torch.device | str) and str(value).startswith("cuda")
        return torch.device("cpu") if is_gpu else value

    def _count(self, name: str) -> None:
        self.calls[name] += 1

    def _event(self, enable_timing: bool) -> Any:
        event = SimpleNamespace(synchronize=lambda: self._count("event"))
        event.record = lambda stream: setattr(event, "time", time.perf_counter())
        event.elapsed_time = lambda later: 1000 * (later.time - event.time)
        return event
