"""The step from one frame of a stream to the next, as a network whose memory goes in and comes out.

A program that calls it once per frame, and hands each memory back at the next frame, follows a
stream like `timeline.streaming.Streamer`: at every frame it gets the logits for the last T frames,
fewer at the start. All memory is fp32 and starts as zeros; zeros again start a new stream.
"""

from typing import Any

import numpy as np
import torch
from torch import nn
from torch.export import ExportedProgram

from cnn_lstm import CNNLSTM, signed_root
from deployment.files import FRAME, next_name
from deployment.graph import EXAMPLE_BATCH, folded, trace_module
from modeling.engines import LOGITS, Engine
from modeling.frame_encoder import FrameEncoder
from tsm_resnet import TSM
from utils.errors import UserError


def find_streaming_problem(model: nn.Module) -> str:
    """Why a model cannot follow a stream frame by frame; empty if it can."""
    if isinstance(model, FrameEncoder) and model.modality.motion == "rgbdiff":
        return "with modality rgbdiff it needs the frames of a whole clip"
    if isinstance(model, TSM) and not model.causal:
        return "its shift_mode is bidirectional: train with --shift-mode causal"
    if not isinstance(model, TSM | CNNLSTM):
        return "it needs the frames of a whole clip, only causal TSM and CNN-LSTM do not"
    return ""


class Step(nn.Module):
    """One frame of each stream, `(B, C, H, W)` uint8, and memory, to logits and the new memory.

    The first memory is the number of frames seen, at most T; the second one what the model computed
    for the last T frames, `(B, T, D)`; others belong to the model.

    Args:
        model: a trained model.
        n_frames: T.
    """

    def __init__(self, model: nn.Module, n_frames: int) -> None:
        super().__init__()
        self.model = model
        self.n_frames = n_frames

    def embed(
        self, clips: torch.Tensor, memory: list[torch.Tensor]
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """`(B, 1, C, H, W)` to the vector of the frame, `(B, 1, D)`, and the model's new memory."""
        raise NotImplementedError

    def consensus(self, vectors: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
        """The first `count` of T vectors, `(B, T, D)`, to logits `(B, num_classes)`; the others are
        zeros. `count` is `(B, 1)`, float."""
        raise NotImplementedError

    def forward(self, frame: torch.Tensor, memory: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        seen, vectors, *own = memory
        vector, own = self.embed(frame.unsqueeze(1), own)
        count = (seen + 1).clamp(max=self.n_frames)  # (B, 1)
        zero = torch.zeros_like(vector)
        later = torch.cat((vectors[:, 1:], zero), dim=1) if self.n_frames > 1 else zero
        vectors = torch.where(seen.unsqueeze(2) >= self.n_frames, later, vectors)  # (B, T, D)
        position = torch.arange(self.n_frames).view(1, -1, 1)
        vectors = torch.where(position == count.unsqueeze(2) - 1, vector, vectors)
        return self.consensus(vectors, count), count, vectors, *own

    def empty_memory(self, image_size: int, batch: int = 1) -> list[torch.Tensor]:
        """The memory at the start of a stream: zeros."""
        clips = torch.zeros(
            batch, 1, self.model.channels, image_size, image_size, dtype=torch.uint8
        )
        with torch.inference_mode():
            vector, own = self.embed(clips, [])
        shapes = [(batch, 1), (batch, self.n_frames, vector.shape[2]), *(x.shape for x in own)]
        return [torch.zeros(shape) for shape in shapes]


class TSMStep(Step):
    """The step of a causal TSM. The vectors are the logits of the frames, and its own memory the
    shift buffers."""

    def embed(
        self, clips: torch.Tensor, memory: list[torch.Tensor]
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        return self.model.frame_logits(clips, memory)

    def consensus(self, vectors: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
        return vectors.sum(dim=1) / count


class CNNLSTMStep(Step):
    """The step of a CNN-LSTM. The vectors are the features of the frames: the LSTM reads those of
    the last T frames anew at every frame, as it does in training."""

    def __init__(self, model: CNNLSTM, n_frames: int) -> None:
        super().__init__(model, n_frames)
        self.one_way = nn.ModuleList()
        """for a bidirectional LSTM: the forward and the backward LSTM of each layer"""
        if model.lstm and model.lstm.bidirectional:
            for layer in range(model.lstm.num_layers):
                self.one_way += [_one_way(model.lstm, layer, s) for s in ("", "_reverse")]

    def embed(
        self, clips: torch.Tensor, memory: list[torch.Tensor]
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        return self.model.frame_features(clips), []

    def consensus(self, vectors: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
        # What an LSTM reads after the last frame does not change its outputs before.
        outputs = vectors
        if self.one_way:
            order = (count - 1 - torch.arange(self.n_frames)).clamp(min=0).long()  # (B, T)
            for forward, backward in zip(self.one_way[::2], self.one_way[1::2], strict=True):
                reverse = backward(_reorder(outputs, order))[0]
                outputs = torch.cat((forward(outputs)[0], _reorder(reverse, order)), dim=2)
        elif self.model.lstm:
            outputs = self.model.lstm(vectors)[0]
        return self.model.head(self.pool(outputs, count))

    def pool(self, x: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
        """`CNNLSTM.pool` of the first `count` outputs of `(B, T, width)`."""
        model, kind = self.model, self.model.temporal_pooling
        count = count.unsqueeze(2)  # (B, 1, 1)
        positions = torch.arange(self.n_frames).view(1, -1, 1)
        valid = positions < count  # (B, T, 1)
        if kind == "mean":
            return _mean(x, valid)
        if kind == "max":
            return x.masked_fill(~valid, -torch.inf).amax(dim=1)
        if kind == "attention":
            scores = model.attention(x).masked_fill(~valid, -torch.inf)
            return (x * scores.softmax(dim=1)).sum(dim=1)
        if kind == "last":
            last = (x * (positions == count - 1)).sum(dim=1)  # (B, width)
            if not self.one_way:
                return last
            return torch.cat((last.chunk(2, dim=1)[0], x[:, 0].chunk(2, dim=1)[1]), dim=1)
        mean = _mean(x, valid)
        variance = _mean((x - mean.unsqueeze(1)).square(), valid)
        change = torch.zeros_like(mean)
        if self.n_frames > 1:
            change = _mean(x.diff(dim=1).abs(), valid[:, 1:])
        x = torch.cat((mean, (variance + 1e-8).sqrt(), change), dim=1)  # temporal_statistics
        return model.standardise(signed_root(x) if model.power_normalised else x)


def _mean(x: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """The mean over the valid ones of `(B, n, width)`, zero where there is none."""
    return (x * valid).sum(dim=1) / valid.sum(dim=1).clamp(min=1)


def _reorder(x: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """`(B, T, width)` with the positions `order`, `(B, T)`, along T."""
    return x.gather(1, order.unsqueeze(2).expand(-1, -1, x.shape[2]))


def _one_way(lstm: nn.LSTM, layer: int, suffix: str) -> nn.LSTM:
    """One layer and direction of an LSTM; the suffix `_reverse` is that of the backward one."""
    names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    weights = {f"{n}_l0": getattr(lstm, f"{n}_l{layer}{suffix}") for n in names}
    part = nn.LSTM(weights["weight_ih_l0"].shape[1], lstm.hidden_size, batch_first=True)
    part.load_state_dict(weights)
    return part.eval().requires_grad_(False)


class StepNames:
    """The names of the inputs and outputs of a step with so many memories."""

    def __init__(self, memories: int) -> None:
        self.memory = [f"memory_{number}" for number in range(memories)]
        self.inputs = [FRAME, *self.memory]
        self.outputs = [LOGITS, *map(next_name, self.memory)]


def make_step(model: nn.Module, n_frames: int) -> Step:
    """The step of a model that can follow a stream (`find_streaming_problem`)."""
    kind = TSMStep if isinstance(model, TSM) else CNNLSTMStep
    return kind(model, n_frames).eval()


def trace_step(
    model: nn.Module, n_frames: int, image_size: int, dynamic_batch: bool = False
) -> tuple[ExportedProgram, dict[str, tuple[int, ...]]]:
    """The graph of a model's step.

    Args:
        model, n_frames, image_size, dynamic_batch: see `deployment.graph.trace`; a batch is frames
            of several streams.

    Returns:
        The graph, and the shape of each memory without the batch by its name. `StepNames` has the
        names of all inputs and outputs in their order.

    Raises:
        UserError: the model cannot follow a stream.
    """
    if problem := find_streaming_problem(model):
        raise UserError(f"--streaming: this {type(model).__name__} cannot: {problem}")
    step = make_step(folded(model, image_size), n_frames)
    batch = EXAMPLE_BATCH if dynamic_batch else 1
    memory = step.empty_memory(image_size, batch)
    frame = torch.zeros(batch, model.channels, image_size, image_size, dtype=torch.uint8)
    program = trace_module(step, (frame, memory), dynamic_batch)
    names = StepNames(len(memory)).memory
    return program, {n: tuple(x.shape[1:]) for n, x in zip(names, memory, strict=True)}


def run_step(
    engine: Any, frame: torch.Tensor, memory: dict[str, Any]
) -> tuple[torch.Tensor, dict[str, Any]]:
    """Call an exported step: `(B, C, H, W)` uint8 and memory to logits and the new memory."""
    outputs = engine.compute({FRAME: frame.numpy(), **memory})
    return torch.from_numpy(outputs[LOGITS].copy()), {
        name: outputs[next_name(name)].copy() for name in memory
    }


class ClipsByStep(Engine):
    """An engine of whole clips whose frames an engine of one frame computes one after the other.

    At the last of T frames a step gives the logits of the clip. There are no features.
    """

    def __init__(self, step: Engine) -> None:
        super().__init__()
        self.step = step

    def forward(self, clips: torch.Tensor) -> torch.Tensor:
        """`(B, T, C, H, W)` uint8 to logits `(B, num_classes)`."""
        return torch.cat([self._last_logits(clip) for clip in clips.split(1)])

    def _last_logits(self, clip: torch.Tensor) -> torch.Tensor:
        memory = self.empty_memory()
        for frame in clip.unbind(1):
            logits, memory = run_step(self.step, frame, memory)
        return logits

    def empty_memory(self) -> dict[str, np.ndarray]:
        """The memory at the start of a stream."""
        shapes = self.step.memory.items()
        return {name: np.zeros((1, *shape), np.float32) for name, shape in shapes}

    def inputs(self, clip: torch.Tensor) -> list[dict[str, np.ndarray]]:
        """What the step takes at the middle frame and at the last one of a clip `(T, C, H, W)`."""
        memory, kept = self.empty_memory(), []
        for number, frame in enumerate(clip):
            if number in (len(clip) // 2, len(clip) - 1):
                kept.append({FRAME: frame[None].numpy(), **memory})
            memory = run_step(self.step, frame[None], memory)[1]
        return kept
