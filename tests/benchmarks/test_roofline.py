"""benchmarks/roofline.py: operations and bytes by hand, and the word from known numbers."""

import json
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import torch
from helpers import make_model
from torch import nn
from torch.nn import functional as F

from benchmark_latency import main
from benchmarks import roofline
from benchmarks.roofline import ByteCounter, TrainingStep, count_flops, measure_rooflines
from benchmarks.timing import random_clips
from config import TrainConfig

X = torch.zeros(10, 6)  # 240 bytes
CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("call", "moved"),
    [
        (lambda: X + X, 3 * 240),
        (lambda: X + 1, 2 * 240),
        (lambda: X.clone().add_(X), (2 + 3) * 240),
        (lambda: X.clone().zero_(), (2 + 1) * 240),
        (lambda: torch.empty(10, 6).copy_(X), 2 * 240),
        (lambda: torch.empty(10, 6), 0),
        (lambda: torch.zeros(10, 6), 240),
        (lambda: X.view(6, 10).t()[1:].unsqueeze(0), 0),
        (lambda: X.t().reshape(60), 2 * 240),  # a copy
        (lambda: X[:, :3] + X[:1, :3].expand(10, 3), 120 + 12 + 120),
        (lambda: X.sum(), 240 + 4),
        (lambda: X.double(), 240 + 480),
        (lambda: X @ torch.zeros(6, 2), 48 + 240 + 48 + 80),  # zeros, inputs, output
        (lambda: torch.cat([X, X]), 4 * 240),
        (lambda: F.relu(X), 2 * 240),
    ],
)
def test_bytes_by_hand(call: Callable, moved: int) -> None:
    with torch.no_grad(), ByteCounter() as counter:
        call()
    assert counter.total == moved


def test_bytes_of_a_training_step() -> None:
    """A linear layer in fp32: 6 x 2 weights, 10 rows."""
    model = nn.Linear(6, 2, bias=False)
    x = torch.zeros(10, 6)
    with ByteCounter() as forward:
        loss = model(x).sum()
    assert forward.total == (240 + 48 + 80) + (80 + 4)
    with ByteCounter() as backward:
        loss.backward()
    # The gradient of 1 and its expansion, a view, of which one number is stored; then that of the
    # weights, (2, 10) x (10, 6).
    assert backward.total == pytest.approx(4 + 4 + 240 + 48, abs=100)


def test_bytes_of_the_optimizer() -> None:
    """Norm of the gradients: read. Clipping: read and written. AdamW: weights and two averages read
    and written, gradients read."""
    model = make_model("vivit", 3, n_frames=2, image_size=32)
    step = TrainingStep(model, random_clips(1, 2, 32, CPU), TrainConfig(), torch.float32)
    moved = step.count_bytes()
    trained = 4 * sum(p.numel() for p in model.parameters())
    assert moved["optimizer"] == pytest.approx((1 + 2 + 7) * trained, rel=0.01)
    assert moved["backward"] > moved["forward"] > trained


def flops(model: nn.Module, x: torch.Tensor) -> tuple[int, int]:
    """Of the forward pass, and of both passes."""
    with torch.no_grad():
        forward = count_flops(lambda: model(x))
    return forward, count_flops(lambda: _total(model(x)).backward())


def _total(output: torch.Tensor | tuple) -> torch.Tensor:
    return (output[0] if isinstance(output, tuple) else output).sum()


@pytest.mark.parametrize("groups", [1, 4])
def test_backward_passes_cost_twice_the_forward_pass(groups: int) -> None:
    conv = nn.Conv2d(8, 12, 3, groups=groups, padding=1)
    x = torch.zeros(2, 8, 5, 7, requires_grad=True)
    forward = 2 * 2 * 12 * 5 * 7 * (8 // groups) * 9
    assert flops(conv, x) == (forward, 3 * forward)
    assert flops(conv, x.detach()) == (forward, 2 * forward)  # no gradient of the pixels
    up = nn.ConvTranspose2d(8, 12, 2, stride=2, groups=groups)
    forward = 2 * 2 * 8 * 5 * 7 * (12 // groups) * 4
    assert flops(up, x) == (forward, 3 * forward)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_an_lstm_is_counted_in_both_passes(bidirectional: bool) -> None:
    lstm = nn.LSTM(6, 5, 2, batch_first=True, bidirectional=bidirectional)
    x = torch.zeros(3, 4, 6, requires_grad=True)
    directions = 1 + bidirectional
    weights = directions * 4 * 5 * ((6 + 5) + (5 * directions + 5))
    forward = 2 * 3 * 4 * weights
    assert flops(lstm, x) == (forward, 3 * forward)


def test_the_lstm_of_cudnn() -> None:
    """Its weights come in a list with their biases: of one layer, 6 to 5."""
    shapes = [torch.Size(shape) for shape in ((20, 6), (20, 5), (20,), (20,))]
    assert roofline._lstm_flops((4, 3, 6), shapes, 4, None) == 2 * 4 * 3 * 20 * 11


def test_fused_attention_is_counted_in_both_passes() -> None:
    x = torch.zeros(3, 2, 5, 8, requires_grad=True)  # (N, heads, tokens, dim)
    forward = 3 * 2 * 2 * 2 * 5 * 5 * 8
    assert count_flops(lambda: F.scaled_dot_product_attention(x, x, x)) == forward
    call = lambda: F.scaled_dot_product_attention(x, x, x).sum().backward()  # noqa: E731
    assert count_flops(call) == 3 * forward


@pytest.mark.parametrize(
    ("computed", "moved", "seconds", "word"),
    [
        (1e9, 1e6, 1.2, "compute"),
        (1e6, 1e8, 1.2, "memory"),
        (1e9, 2e8, 2.5, "memory"),  # 1 s of arithmetic, 2 s of memory
        (1e9, 2e8, 6.1, "neither"),
    ],
)
def test_the_larger_limit_bounds(computed: float, moved: float, seconds: float, word: str) -> None:
    row = roofline.roofline(computed, moved, seconds, peak=1e9, bandwidth=1e8)
    assert row["bound by"] == word
    assert row["compute limit (ms)"] == pytest.approx(1000 * computed / 1e9)
    assert row["memory limit (ms)"] == pytest.approx(1000 * moved / 1e8)
    assert row["share of the peak (%)"] == pytest.approx(100 * computed / 1e9 / seconds)
    assert row["FLOPs per byte"] == pytest.approx(computed / moved)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline, "SIDE", {"cpu": 64})
    monkeypatch.setattr(roofline, "COPIED", {"cpu": 2**20})


def test_table(small: None) -> None:
    models = [("cnnlstm", 32), ("vivit", 32)]
    table = measure_rooflines(models, 2, 2, 7, 0, 1, CPU, torch.float32)
    assert table["work"].tolist() == ["forward", "training step"] * 2
    ratio = table["GFLOPs"][1::2].to_numpy() / table["GFLOPs"][::2].to_numpy()
    assert ((ratio > 2.5) & (ratio <= 3)).all()
    parts = table[[f"of it {part} (GB)" for part in roofline.PARTS]].sum(axis=1)
    assert parts.tolist() == pytest.approx(table["moved (GB)"].tolist())
    shares = table["compute limit (ms)"] / table["measured (ms)"] * 100
    assert table["share of the peak (%)"].tolist() == pytest.approx(shares.tolist())


def test_script(small: None, tmp_path: Path, run_main, mistake) -> None:
    flags = ["--what", "roofline", "--model-names", "vivit@32", "--n-frames", 2]
    flags += ["--batch-size", 1, "--repeats", 1, "--warmup", 0]
    done = run_main(main, *flags, cwd=tmp_path)
    last = json.loads(done.stdout.strip().splitlines()[-1])
    assert last["conditions"]["bandwidth"] == "copy of 1 MiB, read and written"
    assert len(pd.read_csv(tmp_path / "runs/benchmarks/roofline.csv")) == 2
    code, _ = mistake(main, "--what", "roofline", "--model-names", tmp_path, cwd=tmp_path)
    assert code == 2
