"""Locks on folders: of two processes the second stops, and a dead one holds nothing."""

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from helpers import ROOT, start_script, train_flags, wait_for

import ablate
import cross_validate
import prepare_data
import train
from utils.errors import UserError
from utils.files import unfinished_path
from utils.lock import FolderLock

HOLD = """
import os, sys, time
from utils.lock import FolderLock
lock = FolderLock(sys.argv[1], beside=sys.argv[2:] == ["beside"])
child = os.fork()
if child == 0:
    time.sleep(300)
    os._exit(0)
print(child, flush=True)
time.sleep(300)
"""


@contextmanager
def held(folder: Path, *beside: str) -> Iterator[tuple[subprocess.Popen, int]]:
    """A process that holds a folder, and the number of a worker that it has forked."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder), *beside],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    worker = int(process.stdout.readline())
    try:
        yield process, worker
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        os.kill(worker, signal.SIGKILL)


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[tuple[subprocess.Popen, int]]:
    with held(tmp_path) as processes:
        yield processes


def test_the_second_process_is_told_who_holds_the_folder(holder, tmp_path: Path) -> None:
    process, _ = holder
    with pytest.raises(UserError) as refused:
        FolderLock(tmp_path)
    assert f"{tmp_path}: another process is working in it (process {process.pid} on " in str(
        refused.value
    )
    assert ", since 20" in str(refused.value)


def test_a_killed_process_holds_nothing_although_its_workers_live(holder, tmp_path) -> None:
    process, worker = holder
    process.kill()
    process.wait()
    os.kill(worker, 0)  # it lives
    with FolderLock(tmp_path):
        assert (tmp_path / ".lock").read_text().startswith(f"process {os.getpid()} on ")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_a_lock_has_made_is_removed_if_nothing_was_written(tmp_path: Path) -> None:
    with FolderLock(tmp_path / "a" / "b"):
        pass
    assert not list(tmp_path.iterdir())
    with FolderLock(tmp_path / "a"):
        (tmp_path / "a" / "result").touch()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["result"]


def test_a_drive_without_locks_is_a_warning(tmp_path: Path, monkeypatch, capsys) -> None:
    def none(descriptor: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("utils.lock._lock", none)
    with FolderLock(tmp_path):
        (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning: {tmp_path}: this drive has no locks")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="a file is in the place of a folder"):
        FolderLock(tmp_path / "file" / "folder")


def test_two_trainings_of_one_run(
    tiny_data: Path, tmp_path: Path, run_main, mistake, no_figures
) -> None:
    """The second stops at once and disturbs nothing; after a kill the next one goes on."""
    first = start_script("train.py", *train_flags(tiny_data, "--num-workers", 1), cwd=tmp_path)
    wait_for(lambda: list((tmp_path / "runs").glob("*/last.pt")), first)
    (run,) = (tmp_path / "runs").iterdir()
    os.kill(first.pid, signal.SIGSTOP)  # it would end before the second has begun
    unfinished = unfinished_path(run / "last.pt", first.pid)
    unfinished.touch()
    second = mistake(train.main, "--resume", run, cwd=tmp_path)
    assert f"another process is working in it (process {first.pid} on " in second.stderr
    assert len(second.stderr.splitlines()) == 1
    assert unfinished.exists()
    os.kill(first.pid, signal.SIGKILL)
    first.join()
    third = run_main(train.main, "--resume", run, cwd=tmp_path)
    assert "resumed at epoch" in third.stdout
    assert not list(run.glob(".*"))


@pytest.mark.parametrize(
    ("script", "arguments", "beside"),
    [
        (prepare_data, ["cache", "{data}", "--output", "out"], []),
        (prepare_data, ["split", "{data}", "--output", "out"], ["beside"]),
        (cross_validate, ["--resume", "out"], []),
        (ablate, ["--data-root", "{data}", "--output", "out"], []),
    ],
)
def test_scripts_stop_where_another_process_works(
    script, arguments, beside, tiny_data, tmp_path: Path, mistake
) -> None:
    folder = tmp_path / "out"
    if script is cross_validate:
        (folder / "folds" / "fold1").mkdir(parents=True)
        for split in ("train", "val", "test"):
            (folder / "folds" / "fold1" / f"{split}.csv").touch()
        settings = {"classes": ["a", "b"], "folds": "out/folds", "data_root": str(tiny_data)}
        (folder / "config.json").write_text(json.dumps(settings))
    before = sorted(tmp_path.rglob("*"))
    filled = [argument.format(data=tiny_data) for argument in arguments]
    with held(folder, *beside) as (process, _):
        locked = sorted(tmp_path.rglob("*"))
        stderr = mistake(script.main, *filled, cwd=tmp_path).stderr
        assert f"out: another process is working in it (process {process.pid} on " in stderr
        assert len(stderr.splitlines()) == 1
        assert sorted(tmp_path.rglob("*")) == locked
    lock = {folder / ".lock", tmp_path / ".out.lock"} & set(locked)
    assert set(locked) == {*before, *lock, *([] if beside else [folder])}


def test_a_folder_without_its_result_is_removed_if_it_was_made_here(tmp_path: Path) -> None:
    """With all that is in it, unless there is the result, or the folder was there before."""
    for result in ("last.pt", "other.pt"):
        with FolderLock(tmp_path / "runs" / "new", "last.pt", new=True) as lock:
            (lock.folder / "part").mkdir()
            (lock.folder / "part" / result).touch()
        assert not list(tmp_path.iterdir())
    with FolderLock(tmp_path / "run", "last.pt"):
        (tmp_path / "run" / "last.pt").touch()
    (tmp_path / "run" / "last.pt").unlink()
    (tmp_path / "run" / "notes.txt").touch()
    with FolderLock(tmp_path / "run", "last.pt"):
        pass
    assert [path.name for path in tmp_path.rglob("*")] == ["run", "notes.txt"]
    with pytest.raises(FileExistsError):
        FolderLock(tmp_path / "run", new=True)
