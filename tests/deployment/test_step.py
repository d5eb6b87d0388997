"""The network of one frame gives what a Streamer gives, from the first frame on."""

import numpy as np
import pytest
import torch
from helpers import make_model

from cnn_lstm import CNNLSTM, Standardise
from deployment.graph import to_onnx
from deployment.step import (
    CNNLSTMStep,
    Step,
    StepNames,
    TSMStep,
    find_streaming_problem,
    run_step,
    trace_step,
)
from modeling.engines import OnnxRuntimeEngine
from timeline.streaming import Streamer, supports_streaming
from utils.errors import UserError

SIZE = 16


def random_frames(model: torch.nn.Module, count: int, streams: int = 2) -> list[torch.Tensor]:
    shape = streams, model.channels, SIZE, SIZE
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(256, shape, generator=generator, dtype=torch.uint8) for _ in range(count)]


@torch.inference_mode()
def require_equal(model: torch.nn.Module, step: Step, n_frames: int) -> None:
    streamer = Streamer(model, n_frames, streams=2)
    memory = step.empty_memory(SIZE, batch=2)
    assert not any(part.any() for part in memory)
    for frame in random_frames(model, 2 * n_frames + 2):
        logits, *memory = step(frame, memory)
        torch.testing.assert_close(
            logits.double().softmax(dim=1), streamer.step(frame), rtol=0, atol=1e-5
        )
    assert all(part.dtype == torch.float32 for part in memory)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"shift_place": "stage", "shift_div": 4},
        {"modality": "rgb+flow", "fusion": "summary"},
    ],
)
@pytest.mark.parametrize("n_frames", [1, 3])
def test_causal_tsm(options: dict, n_frames: int) -> None:
    model = make_model("tsm_resnet", 3, shift_mode="causal", **options).eval()
    require_equal(model, TSMStep(model, n_frames), n_frames)


@pytest.mark.parametrize(
    "pooling", ["mean", "last", "max", "attention", "statistics", "root_statistics"]
)
@pytest.mark.parametrize(
    "options",
    [
        {"lstm_layers": 0},
        {"lstm_layers": 2, "lstm_hidden": 8},
        {"lstm_layers": 2, "lstm_hidden": 8, "bidirectional": True},
    ],
)
def test_cnn_lstm(pooling: str, options: dict) -> None:
    model = make_model("cnnlstm", 3, temporal_pooling=pooling, **options).eval()
    for module in model.modules():
        if isinstance(module, Standardise):
            width = len(module.running_mean)
            module.set_statistics(torch.rand(width), torch.rand(width) + 0.1)
    require_equal(model, CNNLSTMStep(model, 3), 3)
    if pooling in ("mean", "statistics"):
        require_equal(model, CNNLSTMStep(model, 1), 1)


def test_what_cannot_follow_a_stream_is_refused() -> None:
    for name, options, reason in (
        ("vivit", {}, "needs the frames of a whole clip"),
        ("tsm_resnet", {}, "--shift-mode causal"),
        ("cnnlstm", {"modality": "rgbdiff"}, "rgbdiff"),
        ("cnnlstm", {"bidirectional": True}, ""),
    ):
        with torch.device("meta"):
            model = make_model(name, 3, **options)
        assert reason in find_streaming_problem(model)
        assert bool(reason) != supports_streaming(model)
        if reason:
            with pytest.raises(UserError, match="--streaming"):
                trace_step(model, 4, SIZE)


def test_the_exported_step_in_onnx_runtime() -> None:
    for module in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(module)
    model = CNNLSTM(3, lstm_hidden=8, bidirectional=True).eval()
    program, shapes = trace_step(model, 3, SIZE)
    names = StepNames(len(shapes))
    engine = OnnxRuntimeEngine(to_onnx(program, names.inputs, names.outputs))
    streamer = Streamer(model, 3)
    memory = {name: np.zeros((1, *shape), np.float32) for name, shape in shapes.items()}
    for frame in random_frames(model, 8, streams=1):
        logits, memory = run_step(engine, frame, memory)
        torch.testing.assert_close(
            logits.double().softmax(dim=1), streamer.step(frame), rtol=0, atol=1e-5
        )
