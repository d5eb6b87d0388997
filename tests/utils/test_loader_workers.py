"""Reading batches from worker processes that fail, are slow, or have little to share memory with.

Each case runs in a process of its own, which is forked from this one: PyTorch is imported already.
"""

import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import in_process
from torch.utils.data import DataLoader, Dataset

import utils.workers
from dataset import collate, collate_by_value
from utils.interrupt import Interrupt, Interrupted
from utils.workers import read_batches, start_worker

CLIP = 600_000  # bytes


class Clips(Dataset):
    """Twelve clips; reading the last one is `disturbed`."""

    def __init__(self, disturb: Callable[[], None] = lambda: None) -> None:
        self.disturb = disturb

    def __len__(self) -> int:
        return 12

    def __getitems__(self, indices: list[int]) -> list:
        if 11 in indices:
            self.disturb()
        shape = (1, 3, 1, CLIP // 3)
        return [(i, (torch.full(shape, i, dtype=torch.uint8), i)) for i in indices]


def make_loader(
    disturb: Callable[[], None] = lambda: None,
    collate_fn: Callable = collate,
    init: Callable[[int], None] = start_worker,
) -> DataLoader:
    return DataLoader(
        Clips(disturb), 2, num_workers=2, collate_fn=collate_fn, worker_init_fn=init, timeout=0
    )


def read_all(loader: DataLoader, interrupt: Interrupt | None = None) -> None:
    for batch in read_batches(loader, interrupt):
        for clip, index in zip(batch.clips, batch.indices, strict=True):
            assert (clip == index).all()
            print("read", index, flush=True)


def small_shared_memory() -> None:
    """Give this process a /dev/shm of 2 MB, which no other process sees."""
    new_mount_namespace = 0x00020000
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(new_mount_namespace):
        print("not permitted")
        os._exit(77)
    for words in ("--make-rprivate /", "-t tmpfs -o size=2m tmpfs /dev/shm"):
        if subprocess.run(["mount", *words.split()], capture_output=True).returncode:
            print("not permitted")
            os._exit(77)


def test_batches_come_in_order_through_shared_memory_or_pipes(tmp_path: Path) -> None:
    for collate_fn in (collate, collate_by_value):
        code, output = in_process(
            lambda c=collate_fn: read_all(make_loader(collate_fn=c)), tmp_path
        )
        assert code == 0, output
        assert output.split()[1::2] == [str(index) for index in range(12)]


def test_a_full_shared_memory_is_found_out(tmp_path: Path) -> None:
    """The main process takes its time, so the workers read more ahead than there is room for."""

    def main() -> None:
        small_shared_memory()
        for _ in read_batches(make_loader()):
            time.sleep(0.5)

    code, output = in_process(main, tmp_path)
    if code == 77:
        pytest.skip("a private /dev/shm needs root")
    assert code == 2
    (line,) = [line for line in output.splitlines() if line.startswith("error")]
    assert "could not hand over a batch: /dev/shm has " in line
    assert "--num-workers 0" in line


def test_through_pipes_no_shared_memory_is_needed(tmp_path: Path) -> None:
    def main() -> None:
        small_shared_memory()
        read_all(make_loader(collate_fn=collate_by_value))

    code, output = in_process(main, tmp_path)
    if code == 77:
        pytest.skip("a private /dev/shm needs root")
    assert (code, output.split()[1::2]) == (0, [str(index) for index in range(12)])


def test_too_few_open_files_in_a_worker_are_found_out(tmp_path: Path) -> None:
    import resource

    def limited(number: int) -> None:
        start_worker(number)
        resource.setrlimit(resource.RLIMIT_NOFILE, (20, 20))

    def main() -> None:
        for _ in read_batches(make_loader(init=limited)):
            time.sleep(0.5)

    code, output = in_process(main, tmp_path)
    assert code == 2
    assert "could not hand over a batch" in output.splitlines()[-1]
    assert "ulimit -n" in output.splitlines()[-1]


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (signal.SIGKILL, "was killed, probably because memory ran out: give a smaller"),
        (signal.SIGSEGV, "has crashed (exit code -11): with --num-workers 0"),
    ],
)
def test_a_worker_that_dies_is_one_line(tmp_path: Path, number: int, text: str) -> None:
    def main() -> None:
        read_all(make_loader(lambda: os.kill(os.getpid(), number)))

    code, output = in_process(main, tmp_path)
    assert code == 2, output
    (line,) = [line for line in output.splitlines() if line.startswith("error")]
    assert text in line
    assert "Traceback" not in output


def test_the_death_of_a_worker_that_pytorch_misses_is_found_out(tmp_path: Path) -> None:
    """Here its handler of SIGCHLD does nothing and the main process waits for what never comes."""

    def wait(_: object) -> None:
        time.sleep(100)

    def main() -> None:
        utils.workers.PATIENCE = 0.5
        clips = Clips(lambda: os.kill(os.getpid(), signal.SIGKILL))
        loader = DataLoader(clips, 6, num_workers=2, worker_init_fn=start_worker)
        batches = iter(loader)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        type(batches)._next_data = wait
        read_all(loader, Interrupt())

    code, output = in_process(main, tmp_path)
    assert code == 2
    assert output.splitlines()[-1].startswith("error: a process that reads clips was killed")


def test_an_interrupt_is_heard_while_no_batch_comes(tmp_path: Path) -> None:
    """The last clip never comes: the log says so, and the first Ctrl-C ends the program."""

    def main() -> None:
        utils.workers.PATIENCE = 0.5
        torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL = 0.2  # waits for each worker at the end
        interrupt = Interrupt()
        main_process = os.getpid()

        def hang() -> None:
            time.sleep(1.2)
            os.kill(main_process, signal.SIGINT)
            time.sleep(100)

        try:
            read_all(make_loader(hang), interrupt)
        except Interrupted:
            print("heard", flush=True)

    code, output = in_process(main, tmp_path)
    assert code == 0, output
    assert output.endswith("heard\n")
    assert "read 9\n" in output
    assert "no clips for 0 s, although the processes that read them are alive" in output
    assert "may open" in output


def test_nothing_of_a_batch_outlives_it(tmp_path: Path) -> None:
    """Batches that share memory are open files: reading many leaves as many open as reading few."""

    def main() -> None:
        counts = []
        for batch in read_batches(make_loader()):
            kept = batch.indices, batch.unreadable  # what the evaluation keeps
            counts.append((len(os.listdir("/proc/self/fd")), kept))
        print(max(count for count, _ in counts[2:]) - counts[1][0] <= 6)

    if not Path("/proc/self/fd").exists():
        pytest.skip("open files are counted in /proc")
    assert in_process(main, tmp_path) == (0, "True\n")
