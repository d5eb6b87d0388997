"""benchmark_latency.py: what it counts is checked by hand; how fast things are is not tested."""

import contextlib
import json
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

import pandas as pd
import pytest
import torch
from helpers import ROOT, TINY_FLAGS, make_clip, make_model
from torch import nn

from benchmark_latency import BenchmarkConfig, ModelSpec, count_gflops, main
from benchmark_latency import measure as measure_speed
from benchmarks import speedups
from benchmarks.speedups import Job, measure
from benchmarks.timing import time_calls
from cnn_lstm import CNNLSTM
from train import main as train_main
from utils.allocator import SWITCH
from utils.errors import UserError


def test_flops_of_a_layer_by_hand() -> None:
    class OneConv(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3, padding=1)

        def forward(self, clips: torch.Tensor) -> torch.Tensor:
            return self.conv(clips.flatten(0, 1))

    clip = torch.zeros(1, 4, 3, 10, 12)
    assert count_gflops(OneConv(), clip) == pytest.approx(2 * 4 * 8 * 10 * 12 * 3 * 9 / 1e9)


def test_fused_attention_is_counted() -> None:
    """Two products of 5 x 8 matrices per head, (5, 8) x (8, 5) and (5, 5) x (5, 8)."""

    class Attend(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.scaled_dot_product_attention(x, x, x)

    x = torch.zeros(3, 2, 5, 8)  # (N, heads, tokens, dim)
    assert count_gflops(Attend(), x) == pytest.approx(3 * 2 * 2 * 2 * 5 * 5 * 8 / 1e9)


@pytest.mark.parametrize(("layers", "bidirectional"), [(1, False), (2, False), (2, True)])
def test_lstm_has_its_own_term(layers: int, bidirectional: bool) -> None:
    """PyTorch's counter counts nothing for it."""

    class OnlyLSTM(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(512, 256, layers, batch_first=True, bidirectional=bidirectional)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.lstm(x)[0]

    d = 2 if bidirectional else 1
    cells = 2 * 4 * 256 * (512 + 256) * d + (layers - 1) * d * 2 * 4 * 256 * (d * 256 + 256)
    assert count_gflops(OnlyLSTM(), torch.zeros(1, 16, 512)) == pytest.approx(16 * cells / 1e9)


def test_gflops_of_the_published_sizes() -> None:
    """ResNet-18 at 224 px is 3.63 GFLOPs per frame (2 x MAC); R(2+1)D-18 at 16 x 112 px 81.0;
    Swin3D-T and MViTv2-S at 16 x 224 px twice the 43.882 and 64.224 GMAC of torchvision's tables.
    """
    clip = torch.zeros(1, 1, 3, 224, 224, dtype=torch.uint8)
    assert count_gflops(make_model("tsm_resnet").eval(), clip) == pytest.approx(3.63, abs=0.01)
    lstm = count_gflops(CNNLSTM().eval(), clip) - count_gflops(
        make_model("tsm_resnet").eval(), clip
    )
    assert lstm * 16 == pytest.approx(0.067, abs=0.001)
    clip = torch.zeros(1, 16, 3, 112, 112, dtype=torch.uint8)
    assert count_gflops(make_model("r2plus1d").eval(), clip) == pytest.approx(81.0, abs=0.1)
    with torch.device("meta"):
        clip = torch.zeros(1, 16, 3, 224, 224, dtype=torch.uint8)
        gflops = {name: count_gflops(make_model(name), clip) for name in ("video_swin", "mvit")}
    assert gflops == pytest.approx({"video_swin": 2 * 43.882, "mvit": 2 * 64.224}, rel=1e-3)


def test_help_is_light() -> None:
    code = (
        "import sys, benchmark_latency as script\n"
        "sys.argv = ['benchmark_latency.py', '--help']\n"
        "try:\n    script.main()\n"
        "except SystemExit:\n    pass\n"
        "assert not {'torch', 'torchvision', 'pandas', 'matplotlib', 'PIL'} & sys.modules.keys()"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--model-names" in done.stdout


def test_every_repeat_is_timed() -> None:
    calls = []
    seconds = time_calls(lambda: calls.append(1), 7, torch.device("cpu"))
    assert len(calls) == len(seconds) == 7
    assert (seconds > 0).all()


def test_script(tiny_data: Path, tmp_path: Path, run_main) -> None:
    run_main(train_main, "--data-root", tiny_data, *TINY_FLAGS, "--epochs", 1, cwd=tmp_path)
    run = next((tmp_path / "runs").iterdir())
    done = run_main(
        main,
        *("--model-names", "cnnlstm", "vivit@48", run),
        *("--image-size", 32, "--n-frames", 4, "--batch-size", 2, "--repeats", 2, "--warmup", 1),
        cwd=tmp_path,
    )
    table = pd.read_csv(tmp_path / "runs/benchmarks/latency.csv")
    assert len(table) == 3
    assert table["Size (px)"].tolist() == [32, 48, 32]
    assert table["Params (M)"].iloc[0] == pytest.approx(13.281351)
    latency = table["Mean Batch Time (s)"] / 2 * 1000
    assert table["Latency (ms/clip)"].tolist() == pytest.approx(latency.tolist())
    tested = json.loads((run / "test_metrics.json").read_text())
    assert table["Accuracy"].iloc[2] == pytest.approx(tested["accuracy"])
    assert table["Accuracy"].iloc[:2].isna().all()
    last = json.loads(done.stdout.strip().splitlines()[-1])
    saved = json.loads((tmp_path / "runs/benchmarks/latency.json").read_text())
    assert last == saved
    assert {"device", "precision", "torch", "command"} <= set(last["conditions"])
    markdown = (tmp_path / "runs/benchmarks/latency.md").read_text()
    assert markdown.count("\n| ") == 4
    assert markdown in done.stdout


@pytest.mark.parametrize("modality", ["rgb+mv", "rgbdiff"])
def test_models_of_motion_are_timed(modality: str) -> None:
    """From the file on, which includes reading the motion."""
    model = make_model("cnnlstm", 3, modality=modality).eval()
    spec = ModelSpec(modality, model, 4, 32, {})
    config = BenchmarkConfig(batch_size=2, repeats=2, warmup=1)
    with tempfile.TemporaryDirectory() as folder:
        video = make_clip(Path(folder) / "clip.mp4", 200)
        row = measure_speed(spec, video, config, torch.device("cpu"), torch.float32)
    assert row["Params (M)"] == pytest.approx(sum(p.numel() for p in model.parameters()) / 1e6)
    gflops = count_gflops(model, torch.zeros(1, 4, model.channels, 32, 32, dtype=torch.uint8))
    assert row["GFLOPs"] == pytest.approx(gflops, rel=0.01)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model-names", "resnet"], "'resnet' is neither a model"),
        (["--model-names", "tsm_resnet@big"], "after the @ comes the image size"),
        (["--model-names", "tsm_resnet@²"], "after the @ comes the image size"),
        (["--model-names", f"tsm_resnet@{'9' * 5001}"], "after the @ comes the image size"),
        (["--models", "vivit"], "--models is now called --model-names"),
        (["--repeats", "0"], "repeats = 0: must be at least 1"),
        (["--model-names", "vivit@50"], "must be a multiple"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], message: str, tmp_path, mistake) -> None:
    code, stderr = mistake(main, *arguments, cwd=tmp_path)
    assert code == 2
    assert message in stderr


def test_variants_of_training_are_compared(monkeypatch) -> None:
    monkeypatch.setattr(speedups, "_measure_isolated", measure)  # in this process
    table = speedups.compare("training", [("tsm_resnet", 32)], 2, 2, 1, "cpu")
    assert table["variant"].tolist() == ["eager fp32"] * 2 + ["train.py"] * 2
    assert table["malloc"].tolist() == ["default", "kept"] * 2
    speed = table["ms/clip"]
    assert table["x"].tolist() == pytest.approx((speed.iloc[0] / speed).tolist())
    assert table["x, same allocator"].tolist() == pytest.approx((speed.iloc[1] / speed).tolist())
    assert (table["peak memory (MB)"] > 100).all()


def test_compiled_steps_are_compared(monkeypatch) -> None:
    compiled = []
    monkeypatch.setattr(speedups, "_measure_isolated", measure)
    monkeypatch.setattr(
        nn.Module, "compile", lambda model: compiled.append(model)
    )  # the real one takes minutes
    table = speedups.compare("compile", [("vivit", 32)], 2, 2, 2, "cpu")
    assert len(compiled) == 2
    assert table["variant"].tolist() == ["train.py", "train.py --compile"]
    assert table["x"].iloc[0] == 1
    assert (table["first 2 steps (s)"] > 0).all()
    assert not {"malloc", "x, same allocator"} & set(table)


def test_a_measurement_is_a_process_of_its_own(monkeypatch) -> None:
    monkeypatch.delenv(SWITCH, raising=False)
    result = speedups._measure_isolated(
        Job("training", "train.py", "kept", "vivit", 1, 2, 32, 1, "cpu")
    )
    assert result["seconds"] > 0
    with pytest.raises(UserError, match="these settings cannot work"):
        speedups._measure_isolated(Job("training", "train.py", "kept", "none", 1, 2, 32, 1, "cpu"))


def test_all_variants_give_the_same_logits() -> None:
    def logits(variant: str) -> torch.Tensor:
        job = Job("inference", variant, "default", "cnnlstm", 2, 3, 32, 1, "cpu")
        result = measure(job)
        assert result["seconds"] > 0
        return torch.tensor(result["logits"])

    eager = logits("eager fp32")
    assert (logits("prepared fp32") - eager).abs().max() < 1e-5
    with contextlib.suppress(UserError):  # a CPU without an LSTM in bf16
        assert 0 < (logits("prepared bf16") - eager).abs().max() < 0.05
    if find_spec("onnxruntime"):
        assert (logits("onnxruntime fp32") - eager).abs().max() < 1e-5
