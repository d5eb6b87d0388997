"""What a loader's worker process does first."""

import signal
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from utils.allocator import give_back_batches


def start_worker(_: int) -> None:
    """Prepare a loader's worker process: signals, memory, and one thread for each."""
    # The main process decides what Ctrl-C means and ends its workers itself.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # A SIGTERM to the whole process group must not end the workers before the main process has
    # saved; a second one, such as the loader's own, ends them. See also `script.end_workers`.
    signal.signal(signal.SIGTERM, lambda number, _: signal.signal(number, signal.SIG_DFL))
    give_back_batches()
    torch.set_num_threads(1)


class _Results(Dataset):
    """Item i is what the function gives for item i."""

    def __init__(self, function: Callable[[Any], Any], items: Sequence[Any]) -> None:
        self.function = function
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        return self.function(self.items[index])


def in_parallel(
    function: Callable[[Any], Any], items: Sequence[Any], workers: int, description: str
) -> Iterator[tuple[Any, Any]]:
    """(item, result) of each item in order, with a progress bar.

    Args:
        function: a plain function or a method of something that can be pickled.
        workers: processes; 0 works in this one.
    """
    loader = DataLoader(
        _Results(function, items),
        batch_size=None,
        num_workers=min(workers, len(items)),
        collate_fn=_as_it_is,
        worker_init_fn=start_worker,
    )
    bar = tqdm(loader, description, unit="clip", leave=False, delay=1)
    yield from zip(items, bar, strict=True)


def _as_it_is(result: Any) -> Any:
    return result
