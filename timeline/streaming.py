"""Online prediction: feed timestamped frames to a streaming or a sliding-window model.

A window of T frames that moves on by one frame shares T - 1 frames with the window before.
`Streamer` keeps what the model computed for those frames: the shift buffers and logits of a causal
TSM, or the features of the last T frames of a CNN-LSTM. `SlidingWindows` is for models that need a
whole window at once, so it keeps the frames themselves. `OnlinePredictor` chooses between them.
"""

from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from deployment.files import FRAME, next_name
from deployment.step import find_streaming_problem
from modeling.engines import LOGITS, Engine
from modeling.inference import pack_convolutions, prepare_for_inference, require_finite
from timeline.sources import Frame
from tsm_resnet import TSM
from utils.errors import UserError

# Clips (S, t, C, H, W) and buffers to vectors (S, t, D) and new buffers, for S streams.
Embedding = Callable[
    [torch.Tensor, list[torch.Tensor]], tuple[torch.Tensor, list[torch.Tensor]]
]  # fmt: skip

# Vectors of T frames, (n, T, D), to logits (n, num_classes).
Consensus = Callable[[torch.Tensor], torch.Tensor]


def supports_streaming(model: nn.Module) -> bool:
    """Whether a `Streamer` can follow a video with this model."""
    return not find_streaming_problem(model)


class Streamer:
    """Predicts at every frame of one or several videos, at the cost of one frame per prediction.

    The prediction at frame t is that for the frames t - T + 1 ... t (fewer at the start):

    - causal TSM: the mean of the logits of those frames. For the first T frames this equals the
      prediction for them as a clip; later frames also see what the shift buffers brought from
      earlier ones.
    - CNN-LSTM: the prediction for those frames as a clip, also if the LSTM is bidirectional.

    Args:
        model: trained model; it is not changed.
        n_frames: T, as in training.
        streams: number of videos that are followed at once, in one batch, S.
        dtype: see `prepare_for_inference`.
        temperature: the logits are divided by it (evaluation/calibration.py).

    Raises:
        UserError: the model cannot be streamed.
    """

    def __init__(
        self,
        model: nn.Module,
        n_frames: int,
        streams: int = 1,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        temperature: float = 1.0,
    ) -> None:
        if not supports_streaming(model):
            raise UserError(
                f"{type(model).__name__} as trained cannot follow a stream: a TSM must be trained "
                "with shift_mode causal, and rgbdiff needs whole windows"
            )
        self.n_frames = n_frames
        self.streams = streams
        self.temperature = temperature
        self.device = torch.device(device)
        model = prepare_for_inference(model, self.device, dtype)
        pack_convolutions(model)
        self._embed, self._consensus = split_model(model)
        self.reset()

    @torch.inference_mode()
    def reset(self, stream: int | None = None) -> None:
        """Forget all frames of one stream, or of all streams (None)."""
        if stream is None:
            self._buffers: list[torch.Tensor] = []
            self._tail: torch.Tensor | None = None  # (S, T - 1, D), vectors of the last frames
            self._seen = torch.zeros(self.streams, dtype=torch.long)  # frames of each stream
            return
        self._seen[stream] = 0  # this hides the tail
        for buffer in self._buffers:  # zeros are what a model starts from
            buffer[stream] = 0

    def step(self, frames: torch.Tensor) -> torch.Tensor:
        """Predict at the next frame of each stream, `(S, C, H, W)` uint8 or float in [0, 1].

        Returns:
            `(S, num_classes)` float64 probabilities on the CPU.
        """
        return self.step_many(frames.unsqueeze(1))[:, 0]

    @torch.inference_mode()
    def step_many(self, frames: torch.Tensor) -> torch.Tensor:
        """Predict at the next t frames of each stream, `(S, t, C, H, W)`.

        The predictions are those of t calls of `step`, computed in fewer and larger batches.

        Returns:
            `(S, t, num_classes)` float64 probabilities on the CPU.
        """
        if frames.dim() != 5 or len(frames) != self.streams:
            raise ValueError(f"{self.streams} streams need frames (S, t, C, H, W)")
        vectors, self._buffers = self._embed(frames.to(self.device), self._buffers)  # (S, t, D)
        if self._tail is None:
            self._tail = vectors.new_zeros(self.streams, self.n_frames - 1, vectors.shape[2])
        vectors = torch.cat((self._tail, vectors), dim=1)  # (S, T - 1 + t, D)
        windows = vectors.unfold(1, self.n_frames, 1).transpose(2, 3)  # (S, t, T, D)
        self._tail = vectors[:, vectors.shape[1] - self.n_frames + 1 :].clone()

        seen = self._seen[:, None] + torch.arange(1, frames.shape[1] + 1)  # (S, t)
        self._seen = seen[:, -1]
        lengths = seen.clamp(max=self.n_frames)
        logits: torch.Tensor | None = None
        for length in lengths.unique().tolist():  # a single one, unless a stream has just begun
            mask = (lengths == length).to(self.device)
            part = self._consensus(windows[mask][:, -length:])  # (n, T, D) -> (n, num_classes)
            if logits is None:
                logits = part.new_empty(*lengths.shape, part.shape[1])
            logits[mask] = part
        return to_probabilities(logits, self.temperature)


def split_model(model: nn.Module) -> tuple[Embedding, Consensus]:
    """A model as two functions: what is computed once per frame, and what for the last T frames."""
    if isinstance(model, TSM):
        return model.frame_logits, model.consensus
    return lambda clips, _: (model.frame_features(clips), []), model.consensus


def to_probabilities(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """Logits as float64 probabilities on the CPU, computed as evaluate.py does.

    Raises:
        NotFiniteError: a logit is not finite.
    """
    return (require_finite(logits.cpu().double()) / temperature).softmax(dim=-1)


class EngineStreamer:
    """A `Streamer` of a single video whose network of one frame an engine computes.

    Args:
        engine: of deployment/step.py.
        temperature: as for `Streamer`.
    """

    def __init__(self, engine: Engine, temperature: float = 1.0) -> None:
        self.temperature = temperature
        self._engine = engine
        self.reset()

    def reset(self) -> None:
        """Forget all frames."""
        shapes = self._engine.memory.items()
        self._memory = {name: np.zeros((1, *shape), np.float32) for name, shape in shapes}

    def step(self, frames: torch.Tensor) -> torch.Tensor:
        """Predict at the next frame, `(1, C, H, W)` uint8.

        Returns:
            `(1, num_classes)` float64 probabilities.
        """
        outputs = self._engine.compute({FRAME: frames.numpy(), **self._memory})
        # A copy: the engine may write the next outputs into the same memory.
        self._memory = {name: outputs[next_name(name)].copy() for name in self._memory}
        return to_probabilities(torch.from_numpy(outputs[LOGITS]), self.temperature)

    def step_many(self, frames: torch.Tensor) -> torch.Tensor:
        """Predict at the next t frames, `(1, t, C, H, W)`, one after the other.

        Returns:
            `(1, t, num_classes)` float64 probabilities.
        """
        return torch.stack([self.step(frame) for frame in frames.unbind(1)], dim=1)


class SlidingWindows:
    """Predicts for windows of T frames, one window every `stride` frames, with any model.

    Args:
        model, n_frames, device, dtype, temperature: as for `Streamer`.
        stride: number of frames from one window to the next.
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
        """Forget all frames."""
        self._frames: deque[torch.Tensor] = deque(maxlen=self.n_frames)
        self._missing = self.n_frames  # frames until the next window is complete

    @torch.inference_mode()
    def step(self, frame: torch.Tensor) -> torch.Tensor | None:
        """Take the next frame, `(C, H, W)` uint8 or float in [0, 1].

        Returns:
            `(num_classes,)` float64 probabilities for the window that it completes, or None.
        """
        self._frames.append(frame)
        self._missing -= 1
        if self._missing:
            return None
        self._missing = self.stride
        window = torch.stack(list(self._frames))  # (T, C, H, W)
        logits = self._model(window[None].to(self.device))[0]  # (num_classes,)
        return to_probabilities(logits, self.temperature)


class FramePredictions(NamedTuple):
    """Predictions with their times."""

    times: np.ndarray
    """`(N,)` seconds"""
    probabilities: np.ndarray
    """`(N, num_classes)`"""


class OnlinePredictor:
    """Predicts from the frames of a video as they come; `reset` starts the next video.

    In a live video a prediction stands at the newest frame, and the first frame gets one. In a
    recording a prediction stands in the middle of the T frames that it was made from, and none is
    made from fewer.

    A model that supports streaming predicts at every frame, another one at every `stride`-th. After
    a pause that is longer than a window the model starts anew.

    Args:
        model: trained model; it is copied and prepared for inference once. Or an engine.
        classes: names of the classes, in the order of the logits.
        n_frames: T, the number of frames that a prediction is made from.
        image_size: height and width of the frames in pixels.
        fps: frames per second that the model is shown.
        stride: frames from one window to the next, for models that cannot be streamed.
        device, dtype, temperature: as for `Streamer`.
    """

    def __init__(
        self,
        model: nn.Module,
        classes: Sequence[str],
        n_frames: int,
        image_size: int,
        fps: float,
        stride: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        temperature: float = 1.0,
    ) -> None:
        self.classes = tuple(classes)
        self.n_frames = n_frames
        self.image_size = image_size
        self.fps = fps
        self.window = n_frames / fps
        """length of a window in seconds"""
        self.rate = 0.0
        """frames per second that the video itself has; 0: unknown"""
        self.device = torch.device(device)
        self._model: Streamer | EngineStreamer | SlidingWindows
        if isinstance(model, Engine) and model.memory:
            self._model = EngineStreamer(model, temperature)
        elif supports_streaming(model):
            self._model = Streamer(model, n_frames, 1, device, dtype, temperature)
        else:
            self._model = SlidingWindows(model, n_frames, stride, device, dtype, temperature)
        self.reset()

    def reset(self, live: bool = False) -> None:
        """Start a new video.

        Args:
            live: whether it is a live video.
        """
        self.live = live
        self.rate = 0.0
        self._has_predicted = False
        self._forget_frames()

    def step(self, frames: Sequence[Frame]) -> FramePredictions:
        """Take the next frames, and return the predictions that they give (perhaps none).

        Raises:
            NotFiniteError: an output of the model is not finite.
        """
        predictions: list[tuple[float, np.ndarray]] = []
        batch: list[Frame] = []
        for frame in frames:
            times = [*self._times, *(earlier.time for earlier in batch)][-self.n_frames :]
            if times and frame.time - times[-1] > self._longest_pause(times):
                predictions += self._predict(batch)
                batch = []
                self._forget_frames()
            batch.append(frame)
        predictions += self._predict(batch)
        return self._collect(predictions)

    def flush(self) -> FramePredictions:
        """Return the prediction for a video that ended before its first window was complete.

        Its last frame is repeated, as in training. Longer videos have none left.
        """
        if self._has_predicted or self._last_image is None:
            return self._collect([])
        # The time of a frame: the middle itself may lie in a pause.
        center = (self._times[0] + self._times[-1]) / 2
        middle = min(self._times, key=lambda time: abs(time - center))
        padding = [self._last_image] * (self.n_frames - len(self._times))
        return self._collect([(middle, self._step_model(padding)[-1].numpy())])

    @property
    def frames_seen(self) -> int:
        """How many of the frames of a window have come since the start or the last long pause."""
        return len(self._times)

    def _forget_frames(self) -> None:
        self._model.reset()
        self._times: list[float] = []  # of the last T frames since the start or a long pause
        self._last_image: np.ndarray | None = None

    def _longest_pause(self, times: list[float]) -> float:
        """Seconds without a frame that a window may contain: its length at its own frame rate."""
        if len(times) < 2:
            return 10 * self.n_frames / min(self.fps, self.rate or self.fps)
        return max(self.window, self.n_frames * (times[-1] - times[0]) / (len(times) - 1))

    def _predict(self, frames: list[Frame]) -> list[tuple[float, np.ndarray]]:
        """Times and probabilities of the predictions that these frames give."""
        if not frames:
            return []
        self._last_image = frames[-1].image
        predictions = []
        outputs = self._step_model([frame.image for frame in frames])
        for frame, probabilities in zip(frames, outputs, strict=True):
            self._times = [*self._times, frame.time][-self.n_frames :]
            is_full = len(self._times) == self.n_frames
            if probabilities is None or not (is_full or self.live):
                continue
            middle = (self._times[0] + self._times[-1]) / 2
            predictions.append((frame.time if self.live else middle, probabilities.numpy()))
        return predictions

    def _step_model(self, images: list[np.ndarray]) -> list[torch.Tensor | None]:
        """`(num_classes,)` probabilities at each image, or None where no window is complete."""
        frames = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)  # (t, C, H, W)
        if isinstance(self._model, Streamer | EngineStreamer):
            return list(self._model.step_many(frames[None])[0])
        return [self._model.step(frame) for frame in frames]

    def _collect(self, predictions: list[tuple[float, np.ndarray]]) -> FramePredictions:
        self._has_predicted = self._has_predicted or bool(predictions)
        times = np.array([time for time, _ in predictions])
        rows = [probabilities for _, probabilities in predictions]
        return FramePredictions(times, np.array(rows).reshape(len(rows), len(self.classes)))
