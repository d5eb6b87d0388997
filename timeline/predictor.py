"""One video from its first picture to its timeline."""

import importlib.util
import math
import time
from array import array
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from clips.manifest import UNCERTAIN
from evaluation.calibration import Calibration
from timeline.prefetch import ReadAhead
from timeline.segments import OUT_OF_BODY, FramesWriter, Segment, Snapshot, Timeline
from timeline.smoothing import CausalFilter, Smoothing, smooth, to_segments
from timeline.sources import Picture, Source
from timeline.streaming import Answerer, Answers, Memory
from utils.errors import UserError, first_line
from utils.interrupt import Interrupt, Interrupted
from utils.run_dir import printable
from video.container import ClipError

_BAR = "{desc}: {percentage:3.0f}%|{bar}| {n:.0f}/{total:.0f} s, left {remaining}{postfix}"

_ENDLESS_BAR = "{desc}: {n:.0f} s{postfix}"

TOGETHER = 16  # pictures of a recording that go through the model in one call

Hook = Callable[[np.ndarray], bool]


@dataclass(frozen=True)
class Recipe:
    """How videos are followed; see PredictConfig."""

    model: nn.Module
    classes: tuple[str, ...]
    n_frames: int
    image_size: int
    rate: float
    stride: int
    memory: Memory
    calibration: Calibration
    smoothing: Literal["auto", "viterbi", "causal", "none"]
    segment_seconds: float
    minimum_seconds: float
    out_of_body: Hook | None
    device: torch.device
    dtype: torch.dtype


class Follower:
    """Follows one source, as a context manager."""

    def __init__(
        self,
        source: Source,
        recipe: Recipe,
        folder: Path,
        interrupt: Interrupt | None = None,
        on_update: Callable[[Snapshot], None] | None = None,
    ) -> None:
        self.source = source
        self.recipe = recipe
        self.folder = folder
        self.interrupt = interrupt
        self._on_update = on_update
        self.seconds = 0.0
        """that it took"""
        self._answerer = Answerer(
            recipe.model,
            len(recipe.classes),
            recipe.n_frames,
            recipe.rate,
            recipe.stride,
            source.live,
            recipe.memory,
            recipe.device,
            recipe.dtype,
            recipe.calibration.temperature,
        )
        self._kind = recipe.smoothing
        if self._kind == "auto":
            self._kind = "causal" if source.live else "viterbi"
        self._smoothing = Smoothing(
            recipe.segment_seconds,
            recipe.minimum_seconds,
            self._answerer.window,
            recipe.calibration.lowest_answered,
        )
        self._filter = CausalFilter(self._smoothing, len(recipe.classes))
        self._labels = (*recipe.classes, UNCERTAIN)
        self._stack = ExitStack()
        # Arrays: an answer to seven classes is 38 bytes in them, and an operation has many.
        self._times = array("d")
        self._probabilities = array("f")
        self._states = array("h")  # of the causal filter
        self._newest: np.ndarray | None = None
        self._outside: list[Segment] = []  # out of body
        self._is_outside = False
        self._now = 0.0  # of the newest picture
        self._preview: np.ndarray | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def follow(self, description: str) -> Timeline:
        """Follow the source to its end, or until the interrupt.

        Raises:
            ClipError: the source gives no picture, or the folder cannot be written.
            Interrupted: before the first picture.
        """
        began = time.perf_counter()
        writer: FramesWriter | None = None
        notes: list[str] = []
        ahead = self._stack.enter_context(ReadAhead(self.source))
        with tqdm(desc=description, bar_format=_ENDLESS_BAR) as bar:
            while not (self.interrupt and self.interrupt.number):
                try:
                    pictures = ahead.take(TOGETHER)
                except ClipError as error:
                    if writer is None:
                        raise
                    notes.append(f"ended after {self._now:.1f} s: {error.reason}")
                    break
                if pictures is None:
                    break
                if writer is None and pictures:  # there will be results
                    writer = self._open_results()
                self._add(self._answerer.push(self._inside(pictures)), writer)
                self._show(pictures)
                self._progress(bar, time.perf_counter() - began)
            else:
                notes.append(f"interrupted after {self._now:.1f} s")
                if writer is None:
                    raise Interrupted
            self._add(self._answerer.finish(), writer)
        self.seconds = time.perf_counter() - began
        if writer is None:
            raise ClipError(self.source.name, (self.source.notes or ["gave no picture"])[-1])
        if ahead.dropped:
            notes.append(
                f"{ahead.dropped} pictures were left out: the model is slower than the camera"
            )
        return self._timeline(notes)

    def _open_results(self) -> FramesWriter:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for earlier in self.folder.glob("timeline.*"):
                earlier.unlink()  # it fits the new frames.csv no longer
            writer = FramesWriter(self.folder / "frames.csv", self.recipe.classes)
        except OSError as error:
            raise ClipError(
                self.folder, f"cannot be written ({error.strerror}): choose --output"
            ) from None
        self._stack.callback(writer.close)
        return writer

    def _inside(self, pictures: list[Picture]) -> list[Picture]:
        """The pictures from inside the body; the others are marked."""
        if pictures:
            self._now = pictures[-1].time
        hook = self.recipe.out_of_body
        if hook is None:
            return pictures
        inside = []
        for picture in pictures:
            if self._call(hook, picture.image):
                if not self._is_outside:
                    self._outside.append(Segment(picture.time, math.inf, OUT_OF_BODY))
                self._is_outside = True
                continue
            if self._is_outside:
                self._outside[-1] = self._outside[-1]._replace(end=picture.time)
                self._is_outside = False
            inside.append(picture)
        return inside

    @staticmethod
    def _call(hook: Hook, image: np.ndarray) -> bool:
        try:
            return bool(hook(image))
        except Exception as error:  # not our code: its own words, without our traceback
            raise UserError(
                f"the out-of-body detector failed: {type(error).__name__}: {first_line(error)}"
            ) from error

    def _add(self, answers: Answers, writer: FramesWriter | None) -> None:
        if not len(answers.times) or not writer:
            return
        writer.write(*answers)
        self._times.extend(answers.times)
        self._probabilities.extend(answers.probabilities.ravel())
        self._states.extend(map(self._filter.push, answers.times, answers.probabilities))
        self._newest = answers.probabilities[-1]

    def _show(self, pictures: list[Picture]) -> None:
        """Tell the browser the newest picture and what is thought of it."""
        if not self._on_update or self._newest is None:
            return
        if pictures:
            self._preview = pictures[-1].preview
        state = self.source.state or ("" if pictures else "no new pictures")
        label, frame = self._labels[self._states[-1]], self._preview
        probabilities = self._newest
        if self._is_outside:  # the last answer is about something else
            label, frame, probabilities = OUT_OF_BODY, None, np.full_like(probabilities, np.nan)
        self._on_update(Snapshot(self._now, label, probabilities, frame, state))

    def _progress(self, bar: tqdm, seconds: float) -> None:
        bar.total = self.source.duration or None
        bar.bar_format = _BAR if bar.total else _ENDLESS_BAR
        said = self._labels[self._states[-1]] if self._states else "-"
        speed = "" if self.source.live else f", {self._now / max(seconds, 1e-9):.1f}x as fast"
        bar.set_postfix_str(f"{said}{speed} {self.source.state}", refresh=False)
        bar.update(self._now - bar.n)

    def _timeline(self, notes: list[str]) -> Timeline:
        """What was seen, smoothed, in segments."""
        source, classes = self.source, len(self.recipe.classes)
        duration = max(source.duration, source.end)
        if notes and self.interrupt and self.interrupt.number and not source.live:
            duration = min(duration, self._now + 1 / self.recipe.rate)
        times = np.array(self._times)
        probabilities = np.array(self._probabilities, float).reshape(-1, classes)
        if self._kind == "viterbi":
            states = smooth(times, probabilities, self._smoothing)
        elif self._kind == "causal":
            states = np.array(self._states, int)
        else:
            sure = probabilities.max(axis=1) >= self.recipe.calibration.lowest_answered
            states = np.where(sure, probabilities.argmax(axis=1), classes)
        outside = [s._replace(end=min(s.end, duration)) for s in self._outside]
        unreadable = [
            segment._replace(end=min(segment.end, duration))
            for segment in source.unreadable
            if segment.start < duration
            and not any(o.start <= segment.start and segment.end <= o.end for o in outside)
        ]
        return Timeline(
            name=printable(Path(source.name).name),
            classes=self.recipe.classes,
            duration=duration,
            segments=to_segments(
                times,
                states,
                probabilities,
                self.recipe.classes,
                duration,
                sorted([*outside, *unreadable]),
            ),
            times=times,
            probabilities=probabilities,
            notes=[*source.notes, *notes],
        )


def load_hook(text: str) -> Hook:
    """The function that `detector.py:function` names. It is the user's own code, and is run.

    Raises:
        UserError: there is no such file or function.
    """
    path, _, name = text.rpartition(":")
    if not path or not Path(path).is_file():
        raise UserError(f"{text}: no such file; give detector.py:function")
    spec = importlib.util.spec_from_file_location("out_of_body_detector", path)
    if spec is None:
        raise UserError(f"{path}: not a Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # not our code
        raise UserError(
            f"{path}: cannot be loaded: {type(error).__name__}: {first_line(error)}"
        ) from error
    hook = getattr(module, name, None)
    if not callable(hook):
        raise UserError(f"{path}: has no function {name!r}")
    return hook
