"""Stopping on request, without losing work."""

import signal
from typing import Any

from utils import distributed


class Interrupted(Exception):
    """The work was asked to stop."""


class Interrupt:
    """Turns the first Ctrl-C or SIGTERM into a request to stop; the second one ends at once."""

    def __init__(self) -> None:
        self.number = 0
        """the signal that asked, 0 while none did"""
        self._before = {
            number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)
        }

    def _ask(self, number: int, _: Any) -> None:
        self.number = number
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def restore(self) -> None:
        """Let the signals do again what they did before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def check(self) -> None:
        """Raise Interrupted if this process, or with torchrun any process, was asked to stop.

        All processes must call this at the same place: they stop there together.
        """
        if distributed.total([self.number])[0]:
            raise Interrupted
