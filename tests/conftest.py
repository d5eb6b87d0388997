"""What the tests share: tiny clips, tiny manifests, scripts run as subprocesses, real files."""

import csv
import inspect
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pytest
import torch

from allocator import SWITCH
from video import write_video

ROOT = Path(__file__).parent.parent

# The tests run in as many processes as there are cores (pyproject.toml): one thread for each, and
# for each script that they start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)


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


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes, 6 + 3 + 3 clips a class, read-only."""
    root = tmp_path_factory.mktemp("tiny data")  # a path with a space, on purpose
    return make_data(root, ("dark", "grey", "light"), {"train": 6, "val": 3, "test": 3})


# fmt: off
TINY_FLAGS = [  # ViViT is the smallest of the models: a quarter of TSM's time for a step
    "--classes", "dark", "grey", "light", "--weights", "none", "--image-size", "32",
    "--model", "vivit", "--n-frames", "4", "--batch-size", "6", "--learning-rate", "1e-3",
    "--workers", "0", "--amp", "fp32", "--device", "cpu",
]
# fmt: on


@pytest.fixture(scope="session")
def real() -> Path:
    """The folder of real clips that the environment names, or a skipped test."""
    folder = os.environ.get("SURGICAL_CLIPS_REAL")
    if not folder:
        pytest.skip("SURGICAL_CLIPS_REAL is not set: no real clips to test on")
    return Path(folder)


def run_script(
    *arguments: object, cwd: Path, check: bool = True, timeout: float = 280, **environment: str
) -> subprocess.CompletedProcess:
    """Run one of the project's scripts in a folder, as a person would."""
    script, *rest = map(str, arguments)
    done = subprocess.run(
        [sys.executable, str(ROOT / script), *rest],
        cwd=cwd,
        env={**os.environ, **environment},
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


@pytest.fixture(scope="session")
def trained(
    tiny_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, subprocess.CompletedProcess]:
    """The run of `train_flags` that nobody disturbed, and what it printed."""
    folder = tmp_path_factory.mktemp("trained")
    done = run_script("train.py", *train_flags(tiny_data), cwd=folder)
    return only_run(folder), done


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


@pytest.fixture
def run_main(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Callable:
    """Call a script's `main` in this process: as `run_script`, which takes seconds to start one."""

    def call(main: Callable[[], None], *arguments: object, cwd: Path, code: int = 0) -> Ended:
        monkeypatch.chdir(cwd)
        script = Path(inspect.getfile(inspect.unwrap(main))).name
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        capsys.readouterr()
        ended = 0
        with monkeypatch.context() as patch:
            patch.setenv(SWITCH, "default")  # pytest's own memory stays as it is
            try:
                main()
            except SystemExit as end:
                ended = end.code
        done = Ended(ended or 0, *capsys.readouterr())
        assert done.code == code, f"{script} ended with {done.code}:\n{done.stdout}\n{done.stderr}"
        return done

    return call


class Mistake(NamedTuple):
    """How a script ended that could not do what it was told."""

    code: int
    stderr: str


@pytest.fixture
def mistake(run_main: Callable) -> Callable:
    """Call a script's `main` in this process with wrong arguments."""

    def call(main: Callable[[], None], *arguments: object, cwd: Path) -> Mistake:
        done = run_main(main, *arguments, cwd=cwd, code=2)
        return Mistake(done.code, done.stderr)

    return call


CHROMIUM = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)

# All texts whose contrast with what is behind them is below 4.5 (WCAG 2, AA).


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Headless Chromium, or a skipped test."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = shutil.which("chromium")
    if not chromium:
        pytest.skip("chromium is not installed: the page was not looked at in a browser")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=CHROMIUM)
        yield browser
        browser.close()
