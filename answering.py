"""From pictures with their times to answers with theirs, whatever the model."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from stream import Memory, SlidingWindows, Streamer, can_stream
from video_source import Picture


class Answers(NamedTuple):
    """What a model said, and about when."""

    times: np.ndarray
    """`(N,)` seconds"""
    probabilities: np.ndarray
    """`(N, num_classes)`"""


class Answerer:
    """Shows a model the pictures of one video, as they come.

    Live, an answer stands at the newest picture, and the first picture gets one. Of a recording an
    answer stands in the middle of the T pictures that it looked at, and none looks at fewer.

    A model that can be streamed (stream.py) answers at every picture, another one at every
    `stride`-th. After a pause longer than a window the model starts anew.
    """

    def __init__(
        self,
        model: nn.Module,
        num_classes: int,
        n_frames: int,
        rate: float,
        stride: int,
        live: bool = False,
        memory: Memory = "window",
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        temperature: float = 1.0,
    ) -> None:
        self.n_frames = n_frames
        self.window = n_frames / rate
        """seconds"""
        self.live = live
        self.streams = can_stream(model, memory)
        self._num_classes = num_classes
        if self.streams:
            self._model: Streamer | SlidingWindows = Streamer(
                model, n_frames, 1, memory, device, dtype, temperature
            )
        else:
            self._model = SlidingWindows(model, n_frames, stride, device, dtype, temperature)
        self._times: list[float] = []  # of the last T pictures since the start or a long gap
        self._first: list[torch.Tensor] = []  # pictures that have not filled a window yet
        self._answered = False

    def push(self, pictures: Sequence[Picture]) -> Answers:
        """The answers that the next pictures give, of which there may be none."""
        answers: list[tuple[float, np.ndarray]] = []
        run: list[Picture] = []
        for picture in pictures:
            times = [*self._times, *(one.time for one in run)][-self.n_frames :]
            if times and picture.time - times[-1] > self._longest_pause(times):
                answers += self._push(run)
                run = []
                self._model.reset()
                self._times, self._first = [], []
            run.append(picture)
        answers += self._push(run)
        return self._collect(answers)

    def finish(self) -> Answers:
        """What is still to be said at the end: about a video that is shorter than a window. Its
        last frame is repeated, as in training."""
        if self._answered or not self._first:
            return self._collect([])
        frames = self._first + [self._first[-1]] * (self.n_frames - len(self._first))
        self._model.reset()
        if self.streams:
            answer = self._model.push_many(torch.stack(frames)[None])[0, -1]
        else:
            answer = self._model.answer(torch.stack(frames))
        return self._collect([((self._times[0] + self._times[-1]) / 2, answer.numpy())])

    def _longest_pause(self, times: list[float]) -> float:
        """Seconds without a picture that a window may bridge: its own length, at these pictures'
        rate."""
        if len(times) < 2:
            return 10 * self.window
        return max(self.window, self.n_frames * (times[-1] - times[0]) / (len(times) - 1))

    def _push(self, pictures: list[Picture]) -> list[tuple[float, np.ndarray]]:
        if not pictures:
            return []
        images = np.stack([picture.image for picture in pictures])
        frames = torch.from_numpy(images).permute(0, 3, 1, 2)  # (t, H, W, C) -> (t, C, H, W)
        if not self._answered and len(self._first) < self.n_frames:
            self._first += list(frames)[: self.n_frames - len(self._first)]
        if self.streams:
            said = list(self._model.push_many(frames[None])[0])
        else:
            said = [self._model.push(frame) for frame in frames]
        answers = []
        for picture, probabilities in zip(pictures, said, strict=True):
            self._times = [*self._times, picture.time][-self.n_frames :]
            full = len(self._times) == self.n_frames
            if probabilities is None or not (full or self.live):
                continue
            middle = (self._times[0] + self._times[-1]) / 2
            answers.append((picture.time if self.live else middle, probabilities.numpy()))
        return answers

    def _collect(self, answers: list[tuple[float, np.ndarray]]) -> Answers:
        if answers:
            self._answered = True
            self._first = []
        times = np.array([time for time, _ in answers])
        rows = [probabilities for _, probabilities in answers]
        return Answers(times, np.array(rows).reshape(len(rows), self._num_classes))
