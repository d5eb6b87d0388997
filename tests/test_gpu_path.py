"""The paths that only a GPU takes, on a stand-in that keeps its tensors on the CPU."""

import json
from pathlib import Path

import pandas as pd
import pytest
import torch
from helpers import GpuStandIn, history, only_run, tiny_config

from benchmark_latency import main as benchmark_main
from benchmarks import epoch_time, roofline
from benchmarks.data import main as data_main
from train import main as train_main
from train import train
from training.mixup import mixup_cutmix
from utils.device import to_device

pytestmark = pytest.mark.usefixtures("no_figures")


def test_training_is_that_of_a_cpu(
    tiny_data: Path, tmp_path: Path, gpu: GpuStandIn, run_main
) -> None:
    """Up to the rounding of bf16, which is the default there."""
    common = {"epochs": 1, "batch_size": 4, "mixup_alpha": 0.2, "ema_decay": 0.5}
    run = train(tiny_config(tiny_data, **common, run_dir=str(tmp_path / "cpu")))
    flags = {**common, "data_root": tiny_data, "classes": "dark grey light", "weights": "none"}
    flags |= {"model_name": "vivit", "n_frames": 4, "image_size": 32, "num_workers": 0}
    words = [word for name, value in flags.items()
             for word in (f"--{name.replace('_', '-')}", *str(value).split(" "))
             if name not in ("data_root", "classes")]  # fmt: skip
    words += ["--data-root", tiny_data, "--classes", "dark", "grey", "light"]
    done = run_main(train_main, *words, "--device", "cuda", cwd=tmp_path)
    assert f"{gpu.name}, torch.bfloat16" in done.stdout
    assert "waiting " in done.stdout
    on_gpu, on_cpu = history(only_run(tmp_path)), history(run)
    assert on_gpu["train_loss"].tolist() == pytest.approx(on_cpu["train_loss"].tolist(), rel=0.02)
    assert on_gpu["val_loss"].tolist() == pytest.approx(on_cpu["val_loss"].tolist(), rel=0.05)
    waiting = pd.read_csv(only_run(tmp_path) / "metrics.csv")["waiting"]
    assert waiting.between(0, 1).all()
    assert "synchronize" not in gpu.calls
    assert gpu.calls["event"] == 1  # the waiting is read once per 16 batches and epoch
    assert gpu.calls["pin_memory"] >= 5  # the lambdas of mixup, and the batches


def test_small_tensors_are_pinned(gpu: GpuStandIn) -> None:
    x = torch.arange(3)
    assert torch.equal(to_device(x, torch.device("cuda")), x)
    assert gpu.calls == {"pin_memory": 1}
    assert to_device(x, torch.device("cpu")) is x
    mixup_cutmix(torch.zeros(2, 1, 3, 4, 4, dtype=torch.uint8), torch.zeros(2), 0.0, 1.0)
    assert gpu.calls == {"pin_memory": 1}


def test_tables_of_a_gpu(
    tmp_path: Path, gpu: GpuStandIn, run_main, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every timed call is waited for, and the memory is the GPU's."""
    monkeypatch.setattr(roofline, "SIDE", {"cuda": 64})
    monkeypatch.setattr(roofline, "COPIED", {"cuda": 2**20})
    flags = ["--model-names", "tsm_resnet@32", "vivit@32", "--n-frames", 2, "--batch-size", 2]
    flags += ["--repeats", 2, "--warmup", 1, "--device", "cuda", "--precision", "bf16"]
    run_main(benchmark_main, *flags, "--what", "latency", cwd=tmp_path)
    table = pd.read_csv(tmp_path / "runs/benchmarks/latency.csv")
    assert table["Peak memory (MB)"].tolist() == [123, 123]
    assert gpu.calls["reset_peak_memory_stats"] == 2
    assert gpu.calls["synchronize"] == 2 * 2 * (2 + 5 * 2 + 2)  # before and after each call
    gpu.calls.clear()
    done = run_main(benchmark_main, *flags, "--what", "roofline", cwd=tmp_path)
    assert gpu.calls["synchronize"] == 2 * 2 * (2 * 4)
    conditions = json.loads(done.stdout.splitlines()[-1])["conditions"]
    assert conditions["device"] == gpu.name
    assert conditions["peak"] == "product of matrices of 64 x 64"


def test_how_busy_a_gpu_is(
    tmp_path: Path, gpu: GpuStandIn, run_main, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(epoch_time, "HEIGHT", 90)
    monkeypatch.setattr(epoch_time, "FRAMES", 20)
    flags = ["--what", "training", "--device", "cuda", "--model-name", "vivit", "--repeats", 1]
    flags += ["--clips", 3, "--batch-size", 2, "--image-size", 32, "--num-workers", 0]
    run_main(data_main, *flags, cwd=tmp_path)
    table = pd.read_csv(tmp_path / "runs/benchmarks/training.csv").iloc[1:]
    assert table["GPU busy (%)"].between(0, 100).all()
    sums = table["GPU busy (%)"] + table["waiting for clips (%)"]
    assert sums.tolist() == pytest.approx([100, 100])
    assert gpu.calls["event"] > 0
