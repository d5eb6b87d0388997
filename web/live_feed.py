"""The messages for the viewers of the live page: newest frame, and predictions of two minutes.

This module knows no network. The thread of the model publishes snapshots; the thread of the server
(live_server.py) makes the newest of them visible and asks for messages. However slow a viewer is,
the memory is limited to one frame and the predictions of two minutes.
"""

import io
import itertools
import json
import struct
import time
from collections import deque

import numpy as np
from PIL import Image

from timeline.segments import Snapshot

WINDOW = 120.0  # seconds of predictions that the page shows

MAX_PREDICTIONS = 3600  # 30 per second of the window; with more per second it gets shorter

MAX_SIDE = 960  # pixels of the longer side of a frame

ENDED = "ended"  # the state after the last update


class SnapshotFeed:
    """The newest snapshot, the latest predictions, and the messages made of them."""

    def __init__(self) -> None:
        self.version = 0
        """number of updates so far"""
        self.ended = False
        self._newest: tuple[Snapshot | None, float] = (None, 0.0)  # with the time when it came
        self._inbox: deque[tuple[float, str, np.ndarray]] = deque(maxlen=MAX_PREDICTIONS)
        self._visible = self._newest  # what viewers get
        self._predictions: deque[tuple[float, str, str]] = deque(maxlen=MAX_PREDICTIONS)
        """time, label, and the whole prediction as JSON"""
        self._count = 0  # of all predictions so far, dropped ones included
        self._jpeg = b""
        self._jpeg_of: Snapshot | None = None
        self._jpeg_version = 0

    def publish(self, snapshot: Snapshot) -> None:
        """Take the newest snapshot, from any thread, without waiting."""
        # Both assignments are atomic in CPython. The snapshot comes first: no prediction may be
        # shown before its frame, which may have to be hidden.
        self._newest = (snapshot, time.monotonic())
        self._inbox.append((snapshot.time, snapshot.label, np.array(snapshot.probabilities)))

    def update(self, watched: bool, last: bool = False) -> bool:
        """Make the newest snapshot visible, and return whether anything is new.

        Args:
            watched: whether there are viewers; only then is the frame encoded.
            last: whether this is the last update.
        """
        newest, self.ended = self._newest, last
        snapshot = newest[0]
        shown = snapshot if watched and snapshot and snapshot.frame is not None else None
        if newest is self._visible and shown is self._jpeg_of and not last:
            return False
        while self._inbox:
            self._append(*self._inbox.popleft())
        self.version += 1
        self._visible = newest
        if shown is not self._jpeg_of:
            self._jpeg = encode_jpeg(shown.frame) if shown else b""
            self._jpeg_of, self._jpeg_version = shown, self.version
        return True

    def delta(self, after: int, seen: int) -> bytes:
        """The message with everything that a viewer does not have yet.

        It holds the length of the JSON (4 bytes), the JSON, and the JPEG if the frame is new.

        Args:
            after: number of predictions that the viewer has had, as its last message told it.
            seen: version that the viewer had last on this connection; -1: none.
        """
        snapshot, came = self._visible
        first = self._count - len(self._predictions)
        missing = itertools.islice(self._predictions, max(0, after - first), None)
        head = {
            "first": first,
            "next": self._count,
            "age": round(time.monotonic() - came, 3) if snapshot else None,
            "state": ENDED if self.ended else snapshot.state if snapshot else "",
            "hidden": snapshot is not None and snapshot.frame is None,
        }
        predictions = ",".join(prediction for *_, prediction in missing)
        data = f'{json.dumps(head)[:-1]}, "predictions": [{predictions}]}}'.encode()
        jpeg = self._jpeg if self._jpeg_version > seen else b""
        return struct.pack(">I", len(data)) + data + jpeg

    def _append(self, seconds: float, label: str, probabilities: np.ndarray) -> None:
        """Add a prediction, encoded once for all viewers, and drop those before the window."""
        predictions = self._predictions
        if predictions and (seconds, label) == predictions[-1][:2]:
            return  # repeated while a camera is away: it must not push out earlier predictions
        if predictions and seconds < predictions[-1][0]:
            predictions.clear()  # the video was wound back, or the stream began anew
        while predictions and predictions[0][0] < seconds - WINDOW:
            predictions.popleft()
        is_known = np.isfinite(probabilities).all()
        thousandths = np.rint(1000 * probabilities).astype(int).tolist() if is_known else []
        values = [round(float(seconds), 3), label, thousandths]
        predictions.append((seconds, label, json.dumps(values, separators=(",", ":"))))
        self._count += 1


def encode_jpeg(frame: np.ndarray) -> bytes:
    """A frame `(H, W, 3)`, uint8 RGB, as JPEG, with at most MAX_SIDE pixels per side."""
    image = Image.fromarray(frame)
    image.thumbnail((MAX_SIDE, MAX_SIDE))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=80)
    return file.getvalue()
