"""VideoPredictor: one video, from its first frame to its timeline."""

import importlib.util
import math
import time
from array import array
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Self

import numpy as np
from tqdm import tqdm

from clips.manifest import OUT_OF_BODY, UNCERTAIN
from modeling.inference import NotFiniteError
from timeline.archive import DONE
from timeline.prefetch import Prefetcher
from timeline.segments import FramesWriter, Segment, Snapshot, Timeline
from timeline.smoothing import ForwardFilter, SmoothingConfig, to_segments, viterbi_smooth
from timeline.sources import Frame, FrameSource
from timeline.streaming import FramePredictions, OnlinePredictor
from utils.errors import UserError, first_line, os_error_cause
from utils.files import try_write
from utils.interrupt import Interrupt, Interrupted
from utils.run_dir import sanitize
from video.container import ClipError

_BAR = "{desc}: {percentage:3.0f}%|{bar}| {n:.0f}/{total:.0f} s, left {remaining}{postfix}"

_ENDLESS_BAR = "{desc}: {n:.0f} s{postfix}"

CHUNK_SIZE = 16  # frames of a recording that go through the model in one call

FrameFilter = Callable[[np.ndarray], bool]
"""Tells whether a frame `(H, W, 3)`, uint8 RGB, was taken outside the body."""


class VideoPredictor:
    """Predicts the timeline of one source, as a context manager.

    Args:
        source: video to read.
        predictor: model; it is reset for this video.
        smoothing: how the predictions are smoothed.
        folder: folder of the results; frames.csv is written into it while the video is read.
        frame_filter: detector of frames from outside the body, which the model is not shown.
        interrupt: request to stop early.
        on_update: called with a snapshot after each chunk of frames.
    """

    def __init__(
        self,
        source: FrameSource,
        predictor: OnlinePredictor,
        smoothing: SmoothingConfig,
        folder: Path,
        frame_filter: FrameFilter | None = None,
        interrupt: Interrupt | None = None,
        on_update: Callable[[Snapshot], None] | None = None,
    ) -> None:
        self.source = source
        self.predictor = predictor
        self.smoothing = smoothing
        self.folder = folder
        self.frame_filter = frame_filter
        self.interrupt = interrupt
        self.seconds = 0.0
        """computing time of `run`"""
        self.method = smoothing.method
        """how the timeline is smoothed: viterbi, causal or none"""
        if self.method == "auto":
            self.method = "causal" if source.live else "viterbi"
        self.broke_off = ""
        """why the video could not be read to its end"""
        self.problem = ""
        """why frames.csv could not be written to its end; the other results are whole"""
        self._on_update = on_update
        self._filter = ForwardFilter(smoothing, len(predictor.classes))
        self._labels = (*predictor.classes, UNCERTAIN)
        self._stack = ExitStack()
        # Arrays take 38 bytes per prediction of seven classes, and an operation has many.
        self._times = array("d")
        self._probabilities = array("f")
        self._states = array("h")  # of the forward filter
        self._writer: FramesWriter | None = None
        self._newest: np.ndarray | None = None  # probabilities of the last prediction
        self._out_of_body: list[Segment] = []
        self._is_outside = False
        self._now = 0.0  # time of the newest frame
        self._preview: np.ndarray | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def run(self, description: str) -> Timeline:
        """Read the source to its end, or until the interrupt, and return its timeline.

        Args:
            description: text before the progress bar.

        Raises:
            ClipError: the source gives no frame, the folder cannot be written, or an output of the
                model is not finite.
            Interrupted: the interrupt came before the first frame.
        """
        self.predictor.reset(live=self.source.live)
        began = time.perf_counter()
        has_frames = ended_early = False
        notes: list[str] = []
        prefetcher = self._stack.enter_context(Prefetcher(self.source))
        with tqdm(desc=description, bar_format=_ENDLESS_BAR) as bar:
            while not (self.interrupt and self.interrupt.signal):
                try:
                    frames = prefetcher.get(CHUNK_SIZE)
                except ClipError as error:
                    if not has_frames:
                        raise
                    ended_early = True
                    self.broke_off = f"ended after {self._now:.1f} s: {error.reason}"
                    notes.append(self.broke_off)
                    break
                if frames is None:
                    break
                has_frames = has_frames or bool(frames)
                self._add(self._step(frames))
                self._update_viewers(frames)
                self._update_bar(bar, time.perf_counter() - began)
            else:
                if not has_frames:
                    raise Interrupted
                ended_early = True
                notes.append(f"interrupted after {self._now:.1f} s")
            if not has_frames:
                raise ClipError(self.source.name, (self.source.notes or ["gave no frame"])[-1])
            seen = self.predictor.frames_seen
            last = self._step(None)
            if len(last.times):
                notes.append(
                    f"a window of the model has {self.predictor.n_frames} frames "
                    f"({self.predictor.window:.2f} s), and the video gave only {seen} in one "
                    "piece: the last one was repeated"
                )
            self._add(last)
            self._open_results()
        self.seconds = time.perf_counter() - began
        if 0 < (rate := self.source.rate) < 0.95 * self.predictor.fps:
            notes.append(
                f"the model expects {self.predictor.fps:.3g} frames per second, and the video has "
                f"{rate:.3g}: a window lasts {self.predictor.n_frames / rate:.2f} s here"
            )
        if prefetcher.dropped:
            notes.append(
                f"{prefetcher.dropped} frames were left out: the model is slower than the camera"
            )
        return self._timeline(notes, ended_early)

    def _step(self, frames: list[Frame] | None) -> FramePredictions:
        """The predictions that the next frames give; None: that of a video that was too short.

        Raises:
            ClipError: an output of the model is not finite.
        """
        try:
            if frames is None:
                return self.predictor.flush()
            self.predictor.rate = self.source.rate
            return self.predictor.step(self._inside_body(frames))
        except NotFiniteError as error:
            raise ClipError(self.source.name, f"no timeline, because {error}") from None

    def _open_results(self) -> FramesWriter:
        """Open frames.csv, unless it is open.

        Raises:
            ClipError: the folder cannot be written.
        """
        if self._writer:
            return self._writer
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            # The record that they are complete goes first.
            others = (self.folder / name for name in (DONE, "overlay.mp4", "relevance.csv"))
            for earlier in (*others, *self.folder.glob("timeline.*")):
                earlier.unlink(missing_ok=True)  # it would not fit the new frames.csv
            self._writer = FramesWriter(self.folder / "frames.csv", self.predictor.classes)
        except OSError as error:
            raise ClipError(self.folder, f"{os_error_cause(error)} (--output)") from None
        self._stack.callback(self._writer.close)
        return self._writer

    def _inside_body(self, frames: list[Frame]) -> list[Frame]:
        """The frames from inside the body; stretches of the others are marked."""
        if frames:
            self._now = frames[-1].time
        if self.frame_filter is None:
            return frames
        inside = []
        for frame in frames:
            if self._call(self.frame_filter, frame.image):
                if not self._is_outside:
                    self._out_of_body.append(Segment(frame.time, math.inf, OUT_OF_BODY))
                self._is_outside = True
                continue
            if self._is_outside:
                self._out_of_body[-1] = self._out_of_body[-1]._replace(end=frame.time)
                self._is_outside = False
            inside.append(frame)
        return inside

    @staticmethod
    def _call(frame_filter: FrameFilter, image: np.ndarray) -> bool:
        try:
            return bool(frame_filter(image))
        except Exception as error:  # the user's code: its message, without our traceback
            raise UserError(
                f"the out-of-body detector failed: {type(error).__name__}: {first_line(error)}"
            ) from error

    def _add(self, predictions: FramePredictions) -> None:
        """Keep predictions and write them to frames.csv.

        A window may reach across a stretch that is marked. A prediction that stands inside such a
        stretch is left out, because nothing was seen there.
        """
        if not len(predictions.times):
            return
        marks = (*self.source.gaps, *self._out_of_body)
        if marks := [mark for mark in marks if mark.end > predictions.times[0]]:
            is_seen = [
                not any(mark.start <= time < mark.end for mark in marks)
                for time in predictions.times
            ]
            if not any(is_seen):
                return
            predictions = FramePredictions(*(array[is_seen] for array in predictions))
        # Not before the first prediction: a file or a model that is bad gets no results.
        writer = self._open_results()
        if not self.problem:  # after an error only the file ends early
            self.problem = try_write(
                self.folder / "frames.csv", lambda _: writer.write(*predictions)
            )
        self._times.extend(predictions.times)
        self._probabilities.extend(predictions.probabilities.ravel())
        self._states.extend(map(self._filter.step, *predictions))
        self._newest = predictions.probabilities[-1]

    def _update_viewers(self, frames: list[Frame]) -> None:
        """Send the newest frame and prediction to the live page."""
        if not self._on_update or self._newest is None:
            return
        if frames:
            self._preview = frames[-1].preview
        state = self.source.state or ("" if frames else "no new frames")
        label, preview = self._labels[self._states[-1]], self._preview
        probabilities = self._newest
        if self._is_outside:  # the last prediction is about an earlier frame
            label, preview, probabilities = OUT_OF_BODY, None, np.full_like(probabilities, np.nan)
        self._on_update(Snapshot(self._now, label, probabilities, preview, state))

    def _update_bar(self, bar: tqdm, seconds: float) -> None:
        bar.total = self.source.duration or None
        bar.bar_format = _BAR if bar.total else _ENDLESS_BAR
        label = self._labels[self._states[-1]] if self._states else "-"
        speed = "" if self.source.live else f", {self._now / max(seconds, 1e-9):.1f}x as fast"
        bar.set_postfix_str(f"{label}{speed} {self.source.state}", refresh=False)
        bar.update(self._now - bar.n)

    def _timeline(self, notes: list[str], ended_early: bool) -> Timeline:
        """The predictions as smoothed segments."""
        source, classes = self.source, self.predictor.classes
        duration = max(source.duration, source.end)
        if ended_early and not source.live:
            duration = min(duration, self._now + 1 / self.predictor.fps)
        times = np.array(self._times)
        probabilities = np.array(self._probabilities, float).reshape(-1, len(classes))
        if self.method == "viterbi":
            states = viterbi_smooth(times, probabilities, self.smoothing)
        elif self.method == "causal":
            states = np.array(self._states, int)
        else:
            is_sure = probabilities.max(axis=1) >= self.smoothing.threshold
            states = np.where(is_sure, probabilities.argmax(axis=1), len(classes))
        out_of_body = [s._replace(end=min(s.end, duration)) for s in self._out_of_body]
        gaps = [
            gap._replace(end=min(gap.end, duration))
            for gap in source.gaps
            if gap.start < duration
            and not any(o.start <= gap.start and gap.end <= o.end for o in out_of_body)
        ]
        marked = sorted([*out_of_body, *gaps])
        return Timeline(
            name=sanitize(Path(source.name).name),
            classes=classes,
            duration=duration,
            segments=to_segments(times, states, probabilities, classes, duration, marked),
            times=times,
            probabilities=probabilities,
            notes=[*source.notes, *notes],
        )


def load_frame_filter(text: str) -> FrameFilter:
    """The function that `detector.py:function` names. This runs the user's file.

    Raises:
        UserError: there is no such file or function, or the file cannot be loaded.
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
    except Exception as error:  # the user's code
        raise UserError(
            f"{path}: cannot be loaded: {type(error).__name__}: {first_line(error)}"
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        raise UserError(f"{path}: has no function {name!r}")
    return function
