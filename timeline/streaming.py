"""Following a video frame by frame: every frame is seen once, and answered at once.

A window of T frames that moves on by one frame shares T - 1 of them with the one before. `Streamer`
keeps what a model made of those: a causal TSM the shifted channels of each block, a CNN-LSTM the
features of the last T frames, or its LSTM's state. `SlidingWindows` is for models that need a whole
window at once: it keeps the frames.
"""

from collections import deque
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import nn

from cnn_lstm import CNNLSTM
from modeling.frame_encoder import FrameModel
from modeling.inference import pack_convolutions, prepare_for_inference
from timeline.sources import Picture
from tsm_resnet import TSM
from utils.errors import UserError

Memory = Literal["window", "state"]

Embedding = Callable[
    [torch.Tensor, list[torch.Tensor]], tuple[torch.Tensor, list[torch.Tensor]]
]  # clips (S, t, C, H, W), memory -> vectors (S, t, D), memory; all with a row a stream


def can_stream(model: nn.Module, memory: Memory = "window") -> bool:
    """Whether a `Streamer` can follow a video with a model."""
    if isinstance(model, FrameModel) and model.motion == "gradients":
        return False  # the frame before is part of what is seen
    if isinstance(model, CNNLSTM):
        return memory == "window" or (model.causal and model.lstm is not None)
    return isinstance(model, TSM) and model.causal


class Streamer:
    """Answers to the frames of one or several videos, as they come.

    The answer at frame t is what the model says of the frames t - T + 1 ... t (of fewer at the
    start), and costs one frame's work:

    - TSM, causal: the mean of the logits of those frames. For the first T frames that is what the
      model says of them as a clip; later ones also carry what the shifts brought from before;
    - CNN-LSTM, `window`: what it says of them as a clip, bidirectional or not;
    - CNN-LSTM, `state`: the LSTM never starts anew, its outputs at those frames are pooled.

    Args:
        model: a trained model; it is left as it is.
        n_frames: T, as in training.
        streams: S videos followed at once, in one batch.
        dtype: see `prepare_for_inference`.
        temperature: divides the logits; see calibration.py.

    Raises:
        UserError: the model cannot be streamed.
    """

    def __init__(
        self,
        model: nn.Module,
        n_frames: int,
        streams: int = 1,
        memory: Memory = "window",
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        temperature: float = 1.0,
    ) -> None:
        if not can_stream(model, memory):
            raise UserError(
                f"{type(model).__name__} as trained cannot follow a stream with memory {memory!r}: "
                "TSM must be trained with shift_mode causal; only an LSTM has a state, and a "
                "bidirectional one only windows; gradients need windows"
            )
        self.n_frames = n_frames
        self.streams = streams
        self.temperature = temperature
        self.device = torch.device(device)
        model = prepare_for_inference(model, self.device, dtype)
        pack_convolutions(model)
        self._embed, self._conclude = _halves(model, memory)
        self.reset()

    @torch.inference_mode()
    def reset(self, stream: int | None = None) -> None:
        """Forget what was seen, of all streams or of one: the next frame is its first."""
        if stream is None:
            self._memory: list[torch.Tensor] = []
            self._tail: torch.Tensor | None = None  # (S, T - 1, D), the vectors before the next one
            self._seen = torch.zeros(self.streams, dtype=torch.long)
            return
        self._seen[stream] = 0
        for kept in self._memory:  # zeros are what a model starts from; _seen hides the tail
            kept[stream] = 0

    def push(self, frames: torch.Tensor) -> torch.Tensor:
        """The next frame of each stream, `(S, C, H, W)` uint8 or float in [0, 1].

        Returns:
            `(S, num_classes)` fp64 probabilities on the CPU.
        """
        return self.push_many(frames.unsqueeze(1))[:, 0]

    @torch.inference_mode()
    def push_many(self, frames: torch.Tensor) -> torch.Tensor:
        """The next t frames of each stream, `(S, t, C, H, W)`: the same answers in fewer, larger
        calls, for files.

        Returns:
            `(S, t, num_classes)` fp64 probabilities on the CPU, an answer a frame.
        """
        if frames.dim() != 5 or len(frames) != self.streams:
            raise ValueError(f"{self.streams} streams need frames (S, t, C, H, W)")
        vectors, self._memory = self._embed(frames.to(self.device), self._memory)  # (S, t, D)
        if self._tail is None:
            self._tail = vectors.new_zeros(self.streams, self.n_frames - 1, vectors.shape[2])
        vectors = torch.cat((self._tail, vectors), dim=1)  # (S, T - 1 + t, D)
        windows = vectors.unfold(1, self.n_frames, 1).transpose(2, 3)  # (S, t, T, D)
        self._tail = vectors[:, vectors.shape[1] - self.n_frames + 1 :].clone()

        seen = self._seen[:, None] + torch.arange(1, frames.shape[1] + 1)  # (S, t)
        self._seen = seen[:, -1]
        lengths = seen.clamp(max=self.n_frames)
        logits: torch.Tensor | None = None
        for length in lengths.unique().tolist():  # one, unless a stream has just begun
            these = (lengths == length).to(self.device)
            part = self._conclude(windows[these][:, -length:])  # (n, T, D) -> (n, classes)
            if logits is None:
                logits = part.new_empty(*lengths.shape, part.shape[1])
            logits[these] = part
        return _tempered(logits, self.temperature)


def _tempered(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """Logits as fp64 probabilities on the CPU, as evaluate.py has them."""
    return (logits.cpu().double() / temperature).softmax(dim=-1)


def _halves(
    model: nn.Module, memory: Memory
) -> tuple[Embedding, Callable[[torch.Tensor], torch.Tensor]]:
    """A model as two functions: what is done once for each frame, and what with the last T."""
    if isinstance(model, TSM):
        return model.per_frame, model.over_window
    if memory == "window":
        return lambda clips, _: (model.per_frame(clips), []), model.over_window

    def embed(
        clips: torch.Tensor, state: list[torch.Tensor]
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        # PyTorch's LSTM has the streams in the second place of its state, we have them in the first
        before = tuple(kept.transpose(0, 1).contiguous() for kept in state) or None
        outputs, after = model.lstm(model.per_frame(clips), before)
        return outputs, [kept.transpose(0, 1) for kept in after]

    return embed, model.conclude


class SlidingWindows:
    """Answers to windows of T frames, one every `stride` frames, for any model.

    Args:
        as for `Streamer`.
    """

    def __init__(
        self,
        model: nn.Module,
        n_frames: int,
        stride: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        temperature: float = 1.0,
    ) -> None:
        self.n_frames = n_frames
        self.stride = stride
        self.temperature = temperature
        self.device = torch.device(device)
        self._model = prepare_for_inference(model, self.device, dtype)
        self.reset()

    def reset(self) -> None:
        """Forget what was seen."""
        self._frames: deque[torch.Tensor] = deque(maxlen=self.n_frames)
        self._wait = self.n_frames  # frames until the next window is full

    @torch.inference_mode()
    def push(self, frame: torch.Tensor) -> torch.Tensor | None:
        """The next frame, `(C, H, W)`.

        Returns:
            `(num_classes,)` fp64 probabilities of the window that it completes, or None.
        """
        self._frames.append(frame)
        self._wait -= 1
        if self._wait:
            return None
        self._wait = self.stride
        return self.answer(torch.stack(list(self._frames)))

    @torch.inference_mode()
    def answer(self, window: torch.Tensor) -> torch.Tensor:
        """What the model says of a window `(T, C, H, W)`: `(num_classes,)` probabilities."""
        logits = self._model(window[None].to(self.device))[0]  # (num_classes,)
        return _tempered(logits, self.temperature)


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
