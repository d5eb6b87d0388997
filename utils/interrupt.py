"""Stopping on request without losing work."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Self


class Interrupted(Exception):
    """The work was asked to stop."""


class Interrupt:
    """Turns the first Ctrl-C or SIGTERM into a request to stop; the second one ends at once.

    As a context manager it gives the signals back their handlers at the end.
    """

    def __init__(self) -> None:
        self.signal = 0
        """number of the signal that asked to stop; 0 while none did"""
        self._raises = False
        self._before = {
            number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)
        }

    def _ask(self, number: int, _: Any) -> None:
        self.signal = number
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if self._raises:
            raise Interrupted

    @contextmanager
    def raised(self) -> Iterator[None]:
        """Within this block a request to stop raises Interrupted at once, whatever runs there.

        With several processes it does not: they have to stop together, see `check`.
        """
        from utils import distributed  # imports torch, as in `check`

        self._raises = distributed.world_size() == 1
        try:
            if self.signal and self._raises:
                raise Interrupted
            yield
        finally:
            self._raises = False

    def restore(self) -> None:
        """Give the signals back the handlers that they had before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.restore()

    def check(self) -> None:
        """Raise Interrupted if this process, or with torchrun any process, was asked to stop.

        All processes must call this at the same point of the work: they stop there together.
        """
        from utils import distributed  # imports torch, which predict.py and train.py import anyway

        if distributed.all_reduce_sum([self.signal])[0]:
            raise Interrupted
