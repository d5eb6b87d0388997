"""Decoding in a thread of its own, while the model answers."""

import queue
import threading
from typing import Self

from timeline.sources import Picture, Source

AHEAD = 32  # pictures


class ReadAhead:
    """Reads a source ahead, as a context manager.

    A recording waits until its pictures are taken. A live source does not wait: what is not taken
    in time is dropped, oldest first, so that the answer is never about the past.
    """

    def __init__(self, source: Source) -> None:
        self.dropped = 0
        """pictures that nobody took in time"""
        self._source = source
        self._waiting: queue.Queue[Picture | None] = queue.Queue(2 if source.live else AHEAD)
        self._stopped = threading.Event()
        self._error: BaseException | None = None
        self._ended = False
        self._thread = threading.Thread(target=self._read, name="decoding", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._source.closing = True
        self._thread.join(timeout=5)  # longer only if a dead stream keeps it; it dies with us

    def take(self, most: int, wait: float = 1.0) -> list[Picture] | None:
        """The next pictures: of a recording `most`, of a live source those that are there.

        Returns:
            None at the end; an empty list if none came for `wait` seconds.

        Raises:
            ClipError: as the source does, after its last picture was taken.
        """
        taken: list[Picture] = []
        while len(taken) < most and not self._ended:
            try:
                block = not taken or not self._source.live
                picture = self._waiting.get(block, wait if block else None)
            except queue.Empty:
                return taken
            if picture is None:
                self._ended = True
            else:
                taken.append(picture)
        if taken:
            return taken
        if self._error:
            raise self._error
        return None

    def _read(self) -> None:
        try:
            for picture in self._source:
                self._put(picture)
                if self._stopped.is_set():
                    return
        except BaseException as error:  # told to whoever takes
            self._error = error
        self._put(None)

    def _put(self, picture: Picture | None) -> None:
        while not self._stopped.is_set():
            try:
                self._waiting.put(picture, timeout=0 if self._source.live else 0.2)
                return
            except queue.Full:
                if self._source.live:
                    self._drop()

    def _drop(self) -> None:
        try:
            self._waiting.get_nowait()
            self.dropped += 1
        except queue.Empty:  # taken just now
            pass
