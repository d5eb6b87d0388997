"""What the live page's viewers are sent: the newest picture and answer, and the last two minutes.

No network here. The model's thread puts snapshots in; the server's thread (live_page.py) publishes
the newest of them and asks for messages. However slow a viewer is, what is kept stays the same:
one picture, and the answers of two minutes.
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

WINDOW = 120.0  # seconds of answers that the page shows

MOST_ANSWERS = 3600  # of a window, 30 a second: with more, it gets shorter

LARGEST_PICTURE = 960  # pixels of the longer side

ENDED = "ended"  # the state after which nothing comes


class Feed:
    """The newest snapshot, a ring of answers, and the messages made of them."""

    def __init__(self) -> None:
        self.version = 0
        """grows with everything published"""
        self.ended = False
        self._newest: tuple[Snapshot | None, float] = (None, 0.0)  # and when it came
        self._inbox: deque[tuple[float, str, np.ndarray]] = deque(maxlen=MOST_ANSWERS)
        self._published = self._newest
        self._answers: deque[tuple[float, str, str]] = deque(maxlen=MOST_ANSWERS)
        """time, label, all of it as JSON"""
        self._count = 0  # of answers so far, those dropped included
        self._picture = b""
        self._pictured: Snapshot | None = None  # what it is of
        self._picture_version = 0

    def put(self, snapshot: Snapshot) -> None:
        """Take what is newest; from any thread, without waiting for any."""
        # Both are atomic in CPython. The slot first: no answer is ever ahead of its picture, which
        # may be one to hide.
        self._newest = (snapshot, time.monotonic())
        self._inbox.append((snapshot.time, snapshot.label, np.array(snapshot.probabilities)))

    def publish(self, watched: bool, last: bool = False) -> bool:
        """Make what is newest what viewers get; whether that is anything new.

        Args:
            watched: there are viewers: encode the picture too.
            last: nothing comes after this.
        """
        newest, self.ended = self._newest, last
        snapshot = newest[0]
        pictured = snapshot if watched and snapshot and snapshot.frame is not None else None
        if newest is self._published and pictured is self._pictured and not last:
            return False
        while self._inbox:
            self._remember(*self._inbox.popleft())
        self.version += 1
        self._published = newest
        if pictured is not self._pictured:
            self._picture = _jpeg(pictured.frame) if pictured else b""
            self._pictured, self._picture_version = pictured, self.version
        return True

    def message(self, after: int, seen: int) -> bytes:
        """What a viewer lacks: length of the JSON (4 bytes), JSON, and the picture if it is new.

        Args:
            after: how many answers the viewer has had, as the last message told it.
            seen: the version that the viewer had last on this connection; -1: none.
        """
        snapshot, came = self._published
        first = self._count - len(self._answers)
        missing = itertools.islice(self._answers, max(0, after - first), None)
        head = {
            "first": first,
            "next": self._count,
            "age": round(time.monotonic() - came, 3) if snapshot else None,
            "state": ENDED if self.ended else snapshot.state if snapshot else "",
            "hidden": snapshot is not None and snapshot.frame is None,
        }
        answers = ",".join(answer for *_, answer in missing)
        data = f'{json.dumps(head)[:-1]}, "answers": [{answers}]}}'.encode()
        picture = self._picture if self._picture_version > seen else b""
        return struct.pack(">I", len(data)) + data + picture

    def _remember(self, moment: float, label: str, probabilities: np.ndarray) -> None:
        """Add an answer, written once for all viewers, and drop what is out of the window."""
        answers = self._answers
        if answers and (moment, label) == answers[-1][:2]:
            return  # said again, while a camera is away: it must not push out what was before
        if answers and moment < answers[-1][0]:
            answers.clear()  # the video was wound back, or the stream began anew
        while answers and answers[0][0] < moment - WINDOW:
            answers.popleft()
        known = np.isfinite(probabilities).all()
        thousandths = np.rint(1000 * probabilities).astype(int).tolist() if known else []
        answer = json.dumps([round(float(moment), 3), label, thousandths], separators=(",", ":"))
        answers.append((moment, label, answer))
        self._count += 1


def _jpeg(frame: np.ndarray) -> bytes:
    image = Image.fromarray(frame)
    image.thumbnail((LARGEST_PICTURE, LARGEST_PICTURE))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=80)
    return file.getvalue()
