"""The parallel map over clips: order, errors, workers that are killed, and what they import."""

import os
import signal
import subprocess
import sys
import time

import pytest
from helpers import ROOT

from utils.errors import UserError
from utils.workers import in_parallel


def square(number: int) -> int:
    time.sleep(0.01 * (number % 3))  # later items finish first
    return number**2


def killed(number: int) -> int:
    if number == 12:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def full(number: int) -> int:
    if number == 12:
        raise OSError(28, "No space left on device", "/clips")
    return number


@pytest.mark.parametrize("num_workers", [0, 1, 3])
@pytest.mark.parametrize("count", [0, 1, 40])
def test_results_come_in_order(num_workers: int, count: int) -> None:
    results = list(in_parallel(square, range(count), num_workers, "squares"))
    assert results == [(number, number**2) for number in range(count)]


def test_a_killed_worker_is_found_out() -> None:
    with pytest.raises(UserError, match="decoding: a worker process was killed, probably because"):
        list(in_parallel(killed, range(50), 2, "decoding"))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_error_is_that_of_the_function(num_workers: int) -> None:
    with pytest.raises(OSError, match="No space left on device") as error:
        list(in_parallel(full, range(50), num_workers, "caching"))
    assert (error.value.errno, error.value.filename) == (28, "/clips")


SCRIPT = """
import os, signal, sys, time
from utils.cli import cli_main
from utils.workers import in_parallel

def work(number):
    time.sleep(0.01)
    return os.getpid()

@cli_main
def main():
    for number, pid in in_parallel(work, range(1000), 2, "working"):
        print(pid, flush=True)
        if number == 30:
            os.kill(os.getpid(), int(sys.argv[1]))

if __name__ == "__main__":
    main()
"""


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGINT, 130), (signal.SIGTERM, -signal.SIGTERM), (signal.SIGKILL, -signal.SIGKILL)],
)
def test_no_worker_outlives_the_program(tmp_path, number: int, code: int) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, "script.py", str(int(number))],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,  # a worker that lives on would keep the pipe open
        text=True,
        timeout=20,
        check=False,
    )
    assert done.returncode == code
    assert "Traceback" not in done.stderr
    assert len(set(done.stdout.split())) == 2


def test_it_needs_neither_torch_nor_pandas() -> None:
    code = "import sys, utils.workers, utils.files; print({'torch', 'pandas'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "set()"
