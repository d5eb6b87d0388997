"""benchmark_length.py: its table from known measurements; one real one, in its own process."""

from dataclasses import replace
from pathlib import Path
from subprocess import CompletedProcess

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

import benchmark_length
from benchmark_latency import main
from benchmark_length import Job, compare_lengths

JOB = Job("training", "vivit", 32, 2, 2, 7, "cpu", "fp32")


def test_a_row_has_the_medians_of_its_three_kinds_of_work(monkeypatch) -> None:
    """Rounds alternate over all cells; a cell without memory is empty, not an error."""
    order: list[Job] = []

    def run(job: Job) -> tuple[float, float]:
        order.append(job)
        if job.n_frames == 4 and job.work == "training":
            return np.nan, np.nan
        turn = order.count(job)  # 1, 2, 3
        return {1: 5.0, 2: 1.0, 3: 2.0}[turn], 100.0 * turn

    monkeypatch.setattr(benchmark_length, "_run", run)
    jobs = [replace(JOB, work=work, n_frames=n) for n in (2, 4) for work in benchmark_length.WORK]
    table = compare_lengths(jobs, 3)
    assert order == jobs * 3
    assert table["model"].tolist() == ["vivit, 32 px"] * 2
    assert table["frames"].tolist() == [2, 4]
    assert table["checkpointed (ms/clip)"].tolist() == [1000, 1000]  # 2 s a batch of 2
    assert table["inference (MB)"].tolist() == [200, 200]
    assert table["training (MB)"].isna().tolist() == [False, True]


def test_measured_in_a_process_of_its_own() -> None:
    seconds, megabytes = benchmark_length._run(JOB)
    assert seconds > 0
    assert megabytes > 4 * 4 * 2.7  # weights, gradients and AdamW's two moments of 2.7 million


def test_memory_that_does_not_suffice_is_no_error_of_ours(monkeypatch) -> None:
    def ended(code: int, stderr: str) -> None:
        done = CompletedProcess([], code, "", stderr)
        monkeypatch.setattr(benchmark_length.subprocess, "run", lambda *_, **__: done)

    with pytest.raises(RuntimeError) as cpu:
        torch.empty(1 << 50)
    gpu = "error: CUDA out of memory. Tried to allocate 2 GiB"
    for code, stderr in ((-9, ""), (2, gpu), (2, f"error: {cpu.value}")):
        ended(code, stderr)
        assert np.isnan(benchmark_length._run(JOB)).all()
    ended(1, "KeyError: 'none'")
    with pytest.raises(RuntimeError, match=r"failed:\nKeyError"):
        benchmark_length._run(JOB)


@pytest.mark.parametrize("work", benchmark_length.WORK)
def test_every_kind_of_work_runs(work: str) -> None:
    seconds, _ = benchmark_length.measure(replace(JOB, work=work))
    assert seconds > 0


def test_script(monkeypatch, tmp_path: Path, run_main, mistake) -> None:
    monkeypatch.setattr(benchmark_length, "_run", lambda job: (job.n_frames / 100, 10.0))
    flags = ["--what", "length", "--models", "tsm", "vivit@48", "--batch-size=2", "--device=cpu"]
    run_main(main, *flags, "--lengths", 8, 4, "--image-size", 32, cwd=tmp_path)
    table = pd.read_csv(tmp_path / "benchmarks/length.csv")
    assert table["model"].tolist() == ["tsm, 32 px"] * 2 + ["vivit, 48 px"] * 2
    assert table["frames"].tolist() == [4, 8] * 2
    assert table["training (ms/clip)"].tolist() == pytest.approx([20, 40] * 2)
    with Image.open(tmp_path / "benchmarks/length.png") as picture:
        assert picture.width > picture.height > 300
    assert "lengths = (0,): must be" in mistake(main, *flags, "--lengths", 0, cwd=tmp_path).stderr
