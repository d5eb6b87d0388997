"""Worker processes: what a loader's worker does first, and a parallel map over clips."""

import itertools
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from utils.allocator import restore_malloc_defaults
from utils.errors import UserError

PREFETCH = 4  # items per worker that are submitted before their results are needed


def start_worker(_: int) -> None:
    """Prepare a DataLoader's worker process: signals, memory, and one thread per process."""
    import torch  # not above: the workers of `in_parallel` do without it

    # The main process handles Ctrl-C and ends its workers itself.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # A SIGTERM to the whole process group must not end the workers before the main process has
    # saved its state. A second one, such as the DataLoader's own, ends them. See also
    # `cli.end_workers`.
    signal.signal(signal.SIGTERM, lambda number, _: signal.signal(number, signal.SIG_DFL))
    restore_malloc_defaults()
    torch.set_num_threads(1)


def in_parallel(
    function: Callable[[Any], Any], items: Sequence[Any], num_workers: int, description: str
) -> Iterator[tuple[Any, Any]]:
    """Yield (item, result) of each item in order, with a progress bar.

    Args:
        function: a plain function, or a method of an object that can be pickled.
        num_workers: number of processes; 0 works in this process.
        description: label of the progress bar.

    Raises:
        UserError: a worker was killed, usually because memory ran out.
    """
    from tqdm import tqdm

    bar_settings = {"desc": description, "unit": "clip", "leave": False, "delay": 1}
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
