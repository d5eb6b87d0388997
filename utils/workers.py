"""Worker processes: reading batches from a loader's workers, and a parallel map over clips."""

import contextlib
import itertools
import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.process import BaseProcess
from multiprocessing.queues import Queue
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.allocator import restore_malloc_defaults
from utils.errors import UserError
from utils.interrupt import Interrupt

if TYPE_CHECKING:
    from torch.utils.data import DataLoader

log = logging.getLogger(__name__)

PREFETCH = 4  # items per worker that are submitted before their results are needed
PATIENCE = 45.0  # seconds without a batch after which `read_batches` says so
SHARED_MEMORY = Path("/dev/shm")  # where Linux keeps the memory that processes share

_CANNOT_SEND = 75  # exit code of a loader's worker that could not hand over a batch
_workers: set[BaseProcess] = set()  # those of the loaders that this process has read


def read_batches(loader: "DataLoader", interrupt: Interrupt | None = None) -> Iterator[Any]:
    """Yield the batches of a loader.

    A worker that ends too early also makes PyTorch raise a RuntimeError wherever the program is;
    `worker_failure` explains it. If all workers live but no batch comes, the log says so.

    Args:
        interrupt: a request to stop is heard also while no batch comes.

    Raises:
        Interrupted: `interrupt` was asked to stop while no batch came.
        UserError: a worker has ended too early.
    """
    batches = iter(loader)
    _workers.difference_update([worker for worker in _workers if worker.exitcode == 0])
    # `active_children` would leave out those that have died already.
    _workers.update(getattr(batches, "_workers", ()))
    while True:
        watch = threading.Timer(PATIENCE, _end_waiting)
        watch.daemon = True
        if loader.num_workers:
            watch.start()
        try:
            with interrupt.raised() if interrupt else contextlib.nullcontext():
                batch = next(batches)
        except StopIteration:
            return
        except BaseException as error:
            # The connection to a dying process is lost before it has an exit code.
            deadline = time.monotonic() + 5 * isinstance(error, OSError | EOFError)
            while not worker_failure() and time.monotonic() < deadline:
                time.sleep(0.05)
            if reason := worker_failure():
                raise UserError(reason) from error
            raise
        finally:
            watch.cancel()
        yield batch


def show_batches(
    loader: "DataLoader", description: str, interrupt: Interrupt | None = None, quiet: bool = False
) -> Iterator[Any]:
    """`read_batches` with a progress bar, unless it is to be quiet."""
    from tqdm import tqdm  # not above, as in `in_parallel`

    bar_settings = {"total": len(loader), "unit": "batch", "leave": False, "delay": 1}
    return tqdm(read_batches(loader, interrupt), description, disable=quiet, **bar_settings)


def worker_failure() -> str:
    """Why a worker of a loader has ended too early, and the remedy; empty if none has."""
    codes = {worker.exitcode for worker in _workers} - {None, 0, -signal.SIGTERM}
    if not codes:
        return ""
    if _CANNOT_SEND in codes or -getattr(signal, "SIGBUS", 0) in codes:
        return (
            f"a process that reads clips could not hand over a batch: {_sharing_limits()}: give "
            "--num-workers 0, or raise these limits (docker run --shm-size=1g, ulimit -n 4096)"
        )
    if -getattr(signal, "SIGKILL", 0) in codes:
        return (
            "a process that reads clips was killed, probably because memory ran out: give a "
            "smaller --num-workers or --batch-size"
        )
    return (
        f"a process that reads clips has crashed (exit code {max(codes, key=abs)}): with "
        "--num-workers 0 the error shows where"
    )


def _end_waiting() -> None:
    """Say that no batch comes, or end the waiting if none can come.

    PyTorch notices a worker's death at once, except while it reads what that worker left half
    written: then it would wait for ever.
    """
    if worker_failure():
        if hasattr(signal, "pthread_kill"):  # not on Windows, where nothing else wakes it either
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
    else:
        log.warning(
            f"no clips for {PATIENCE:.0f} s, although the processes that read them are alive. Is "
            f"the disk or the network slow? ({_sharing_limits()}.)"
        )


def _sharing_limits() -> str:
    """What processes can share their memory with here, in words."""
    free = shared_memory_free()
    limits = [] if free is None else [f"{SHARED_MEMORY} has {free / 1e6:.1f} MB free"]
    if sys.platform != "win32":
        import resource

        files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        limits.append(f"a process may open {files} files")
    return " and ".join(limits) or "memory is short"


def shared_memory_free() -> int | None:
    """Bytes that processes can still share with each other; None where there is no such limit."""
    try:
        status = os.statvfs(SHARED_MEMORY)
    except (OSError, AttributeError):  # macOS and Windows have no such folder
        return None
    return status.f_bavail * status.f_frsize


def start_worker(_: int) -> None:
    """Prepare a DataLoader's worker process: signals, memory, and one thread per process.

    A batch is handed over by a thread of the worker. If that thread fails, because shared memory
    or the number of open files is short, Python prints the error and goes on without the batch,
    for which the main process would wait for ever. So the worker ends then.
    """
    import torch  # not above: the workers of `in_parallel` do without it

    # The main process handles Ctrl-C and ends its workers itself.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # A SIGTERM to the whole process group must not end the workers before the main process has
    # saved its state. A second one, such as the DataLoader's own, ends them. See also
    # `cli.end_workers`.
    signal.signal(signal.SIGTERM, lambda number, _: signal.signal(number, signal.SIG_DFL))
    restore_malloc_defaults()
    torch.set_num_threads(1)
    Queue._on_queue_feeder_error = staticmethod(lambda *_: os._exit(_CANNOT_SEND))


def in_parallel(
    function: Callable[[Any], Any],
    items: Sequence[Any],
    num_workers: int,
    description: str,
    unit: str = "clip",
) -> Iterator[tuple[Any, Any]]:
    """Yield (item, result) of each item in order, with a progress bar.

    Args:
        function: a plain function, or a method of an object that can be pickled.
        num_workers: number of processes; 0 works in this process.
        description: label of the progress bar.
        unit: what an item is called there.

    Raises:
        UserError: a worker was killed, usually because memory ran out.
    """
    from tqdm import tqdm

    bar_settings = {"desc": description, "unit": unit, "leave": False, "delay": 1}
    num_workers = min(num_workers, len(items))
    if num_workers == 0:
        for item in tqdm(items, **bar_settings):
            yield item, function(item)
        return
    other_processes = set(multiprocessing.active_children())
    executor = ProcessPoolExecutor(num_workers, initializer=_start_pool_worker)
    try:
        # The workers start here, before tqdm starts a thread: processes with threads should not be
        # forked.
        first = items[: PREFETCH * num_workers]
        futures = deque(executor.submit(function, item) for item in first)
        rest = iter(items[len(first) :])
        for item in tqdm(items, **bar_settings):
            result = futures.popleft().result()
            futures.extend(executor.submit(function, later) for later in itertools.islice(rest, 1))
            yield item, result
        executor.shutdown()
    except BrokenProcessPool:
        raise UserError(
            f"{description}: a worker process was killed, probably because memory ran out: give a "
            "smaller --num-workers"
        ) from None
    finally:  # after an error or Ctrl-C the other results are not needed
        for worker in set(multiprocessing.active_children()) - other_processes:
            worker.kill()
        executor.shutdown(cancel_futures=True)


def _start_pool_worker() -> None:
    """Prepare a process of `in_parallel`."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process handles Ctrl-C
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    restore_malloc_defaults()
    exit_with_parent()


def exit_with_parent() -> None:
    """In a worker process: exit when the main process is killed, instead of waiting for ever."""

    def wait() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
