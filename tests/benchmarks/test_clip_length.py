"""benchmarks/clip_length.py: its table from known measurements, and one real measurement."""

import os
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from benchmark_latency import main
from benchmarks import clip_length
from benchmarks.clip_length import Job, compare_lengths
from benchmarks.timing import run_isolated

JOB = Job("training", "vivit", 32, 2, 2, 7, "cpu", "fp32")


def test_a_row_has_the_medians_of_its_three_kinds_of_work(monkeypatch) -> None:
    """Every round runs all cells; a cell without enough memory is empty, not an error."""
    order: list[Job] = []

    def run(job: Job) -> tuple[float, float]:
        order.append(job)
        if job.n_frames == 4 and job.work == "training":
            return np.nan, np.nan
        turn = order.count(job)  # 1, 2, 3
        return {1: 5.0, 2: 1.0, 3: 2.0}[turn], 100.0 * turn

    monkeypatch.setattr(clip_length, "_measure_isolated", run)
    jobs = [replace(JOB, work=work, n_frames=n) for n in (2, 4) for work in clip_length.WORK]
    table = compare_lengths(jobs, 3)
    assert order == jobs * 3
    assert table["model"].tolist() == ["vivit, 32 px"] * 2
    assert table["frames"].tolist() == [2, 4]
    assert table["checkpointed (ms/clip)"].tolist() == [1000, 1000]  # 2 s per batch of 2
    assert table["inference (MB)"].tolist() == [200, 200]
    assert table["training (MB)"].isna().tolist() == [False, True]


def test_measured_in_a_process_of_its_own() -> None:
    seconds, megabytes = clip_length._measure_isolated(JOB)
    assert seconds > 0
    assert megabytes > 4 * 4 * 2.7  # weights, gradients and AdamW's two moments of 2.7 million


def _killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _without_memory() -> None:
    torch.empty(1 << 50)


def _wrong() -> None:
    raise KeyError("none")


def test_too_little_memory_is_an_empty_cell(monkeypatch) -> None:
    """Other errors are raised."""
    for measured in (_killed, _without_memory):
        monkeypatch.setattr(clip_length, "measure", measured)
        monkeypatch.setattr(clip_length, "run_isolated", lambda call, _: run_isolated(call))
        assert np.isnan(clip_length._measure_isolated(JOB)).all()
    monkeypatch.setattr(clip_length, "measure", _wrong)
    with pytest.raises(KeyError):
        clip_length._measure_isolated(JOB)


@pytest.mark.parametrize("work", clip_length.WORK)
def test_every_kind_of_work_runs(work: str) -> None:
    seconds, _ = clip_length.measure(replace(JOB, work=work))
    assert seconds > 0


def test_script(monkeypatch, tmp_path: Path, run_main, mistake) -> None:
    monkeypatch.setattr(clip_length, "_measure_isolated", lambda job: (job.n_frames / 100, 10.0))
    flags = [
        "--what",
        "length",
        "--model-names",
        "tsm_resnet",
        "vivit@48",
        "--batch-size=2",
        "--device=cpu",
    ]
    run_main(main, *flags, "--lengths", 8, 4, "--image-size", 32, cwd=tmp_path)
    table = pd.read_csv(tmp_path / "runs/benchmarks/length.csv")
    assert table["model"].tolist() == ["tsm_resnet, 32 px"] * 2 + ["vivit, 48 px"] * 2
    assert table["frames"].tolist() == [4, 8] * 2
    assert table["training (ms/clip)"].tolist() == pytest.approx([20, 40] * 2)
    with Image.open(tmp_path / "runs/benchmarks/length.png") as image:
        assert image.width > image.height > 300
    assert "lengths = (0,): must be" in mistake(main, *flags, "--lengths", 0, cwd=tmp_path).stderr
