"""What a loader's worker process does first."""

import signal

import torch

from allocator import give_back_batches


def start_worker(_: int) -> None:
    """Prepare a loader's worker process: signals, memory, and one thread for each."""
    # The main process decides what Ctrl-C means and ends its workers itself.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # A SIGTERM to the whole process group must not end the workers before the main process has
    # saved; a second one, such as the loader's own, ends them. See also `script.end_workers`.
    signal.signal(signal.SIGTERM, lambda number, _: signal.signal(number, signal.SIG_DFL))
    give_back_batches()
    torch.set_num_threads(1)
