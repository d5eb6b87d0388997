"""Prefetching: a thread decodes the next frames while the model predicts."""

import queue
import threading
from typing import Self

from timeline.sources import Frame, FrameSource

QUEUE_SIZE = 32  # frames


class Prefetcher:
    """Reads a source in a thread of its own, as a context manager.

    A recording waits until its frames are taken. A live source does not wait: frames that are not
    taken in time are dropped, the oldest first, because a late prediction would be about the past.
    """

    def __init__(self, source: FrameSource) -> None:
        self.dropped = 0
        """number of frames that were not taken in time"""
        self._source = source
        self._queue: queue.Queue[Frame | None] = queue.Queue(2 if source.live else QUEUE_SIZE)
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
        # The thread lives on only if a dead stream blocks it; it ends with this process.
        self._thread.join(timeout=5)

    def get(self, max_frames: int, timeout: float = 1.0) -> list[Frame] | None:
        """The next frames: of a recording `max_frames`, of a live source those that are there.

        Returns:
            None at the end; an empty list if no frame came for `timeout` seconds.

        Raises:
            ClipError: the error of the source, after its last frame was taken.
        """
        frames: list[Frame] = []
        while len(frames) < max_frames and not self._ended:
            try:
                block = not frames or not self._source.live
                frame = self._queue.get(block, timeout if block else None)
            except queue.Empty:
                return frames
            if frame is None:
                self._ended = True
            else:
                frames.append(frame)
        if frames:
            return frames
        if self._error:
            raise self._error
        return None

    def _read(self) -> None:
        try:
            for frame in self._source:
                self._put(frame)
                if self._stopped.is_set():
                    return
        except BaseException as error:  # raised again in `get`
            self._error = error
        self._put(None)

    def _put(self, frame: Frame | None) -> None:
        while not self._stopped.is_set():
            try:
                self._queue.put(frame, timeout=0 if self._source.live else 0.2)
                return
            except queue.Full:
                if self._source.live:
                    self._drop_oldest()

    def _drop_oldest(self) -> None:
        try:
            self._queue.get_nowait()
            self.dropped += 1
        except queue.Empty:  # it was taken in this moment
            pass
