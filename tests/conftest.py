"""The fixtures that tests share; plain functions and constants are in helpers.py."""

import inspect
import io
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import CHROMIUM, Ended, GpuStandIn, Mistake, make_data, only_run, train_flags

from utils.allocator import SWITCH
from utils.errors import UserError
from utils.lock import FolderLock

# The tests run in as many processes as there are cores (pyproject.toml), so each process and each
# script that it starts gets one thread.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)


@contextmanager
def shared(factory: pytest.TempPathFactory, name: str) -> Iterator[tuple[Path, bool]]:
    """A folder that the processes of a test session share, and whether this one is to fill it."""
    root = factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root
    folder, filled = root / name, root / f"{name}.filled"
    while True:
        try:
            lock = FolderLock(folder, beside=True)
            break
        except UserError:  # another process fills it now
            time.sleep(0.1)
    with lock:
        folder.mkdir(exist_ok=True)
        yield folder, not filled.exists()
        filled.touch()


# Tests import OpenVINO and NNCF themselves: see utils.errors.require_package.
sys.modules.setdefault("openvino_telemetry", None)


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes with 6 + 3 + 3 clips each; read-only."""
    with shared(tmp_path_factory, "tiny data") as (root, empty):  # a space in the path, on purpose
        if empty:
            make_data(root, ("dark", "grey", "light"), {"train": 6, "val": 3, "test": 3})
    return root


@pytest.fixture(scope="session")
def real() -> Path:
    """The folder of real clips that the environment names, or a skipped test."""
    folder = os.environ.get("SURGICAL_CLIPS_REAL")
    if not folder:
        pytest.skip("SURGICAL_CLIPS_REAL is not set: no real clips to test on")
    return Path(folder)


@pytest.fixture(scope="session")
def trained(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The uninterrupted training run of `train_flags`, and what it printed; read-only."""
    from train import main

    with shared(tmp_path_factory, "trained") as (folder, empty):
        if empty:
            with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as stdout:
                patch.chdir(folder)
                patch.setenv(SWITCH, "default")
                patch.setattr(sys, "argv", ["train.py", *train_flags(tiny_data)])
                main()
            (folder / "out.txt").write_text(stdout.getvalue())
    return only_run(folder), (folder / "out.txt").read_text()


@pytest.fixture
def run_main(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Callable:
    """Call a script's `main` in this process; `run_script` takes seconds to start another one."""

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


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[GpuStandIn]:
    """A stand-in for a GPU, under the name cuda."""
    with GpuStandIn(monkeypatch) as stand_in:
        yield stand_in


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training in this process draws nothing, which takes longer than training a tiny model."""
    monkeypatch.setattr("train.draw_curves", lambda *_: None)
    for name in ("plots.plot_confusion", "plots.plot_precision_recall", "results.draw_embedding"):
        monkeypatch.setattr(f"evaluation.{name}", lambda *_: None)


@pytest.fixture
def mistake(run_main: Callable) -> Callable:
    """Call a script's `main` in this process with wrong arguments."""

    def call(main: Callable[[], None], *arguments: object, cwd: Path) -> Mistake:
        done = run_main(main, *arguments, cwd=cwd, code=2)
        return Mistake(done.code, done.stderr)

    return call


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Headless Chromium, or a skipped test."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = shutil.which("chromium")
    if not chromium:
        pytest.skip("chromium is not installed: the page was not opened in a browser")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=CHROMIUM)
        yield browser
        browser.close()


# The files that take longest, which start first: a long one at the end would run alone. Left to
# itself, xdist starts with the files of most tests; see --no-loadscope-reorder in pyproject.toml.
_SLOWEST = (
    "test_resume.py",
    "test_real_clips.py",
    "test_train.py",
    "test_predict.py",
    "test_benchmark_latency.py",
    "test_hostile_checkpoints.py",
    "test_timeline_page.py",
    "test_compare.py",
    "test_start_methods.py",
    "test_live_server.py",
    "test_streaming.py",
    "test_cross_validate.py",
    "test_backbones.py",
    "test_feature_cache.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in _SLOWEST)  # stable: the rest keeps its order
