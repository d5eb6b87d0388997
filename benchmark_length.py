"""What longer clips cost, and what gradient checkpointing saves; see benchmark_latency.py.

Every measurement is a process of its own: on a CPU the peak memory belongs to the process. There it
is what the process held of the machine, libraries' buffers and gaps between blocks included, and
checkpointing saves a smaller share of it than of the tensors alone, which a GPU counts.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from benchmarking import (
    conditions,
    forget_peak_memory,
    peak_memory,
    random_clips,
    report,
    time_calls,
)
from checkpoint import build_model_from_config
from config import TrainConfig
from device import Precision, autocast, choose_device, choose_precision, suit_device
from errors import UserError, is_out_of_memory
from inference import prepare_for_inference
from plots import plot_lengths
from recompute import recompute_stages
from script import script

if TYPE_CHECKING:
    from benchmark_latency import BenchmarkConfig

CALLS = 3  # that are timed in a process
WORK = ("training", "checkpointed", "inference")


@dataclass(frozen=True)
class Job:
    """One measurement."""

    work: str
    model: str
    image_size: int
    n_frames: int
    batch_size: int
    num_classes: int
    device: str
    amp: Precision


def time_lengths(models: list[tuple[str, int]], config: BenchmarkConfig) -> None:
    """Report and draw what clips of each length cost the models (name, image size).

    Raises:
        UserError: a length is none.
    """
    if not config.lengths or min(config.lengths) < 1:
        raise UserError(f"lengths = {config.lengths}: must be numbers of frames, at least 1")
    device = choose_device(config.device)
    dtype = choose_precision(config.amp, device)
    rounds = max(1, config.repeats // 3)
    jobs = [
        Job(work, name, size, n_frames, config.batch_size, config.num_classes, str(device),
            config.amp)
        for name, size in models
        for n_frames in sorted(set(config.lengths))
        for work in WORK
    ]  # fmt: skip
    table = compare_lengths(jobs, rounds)
    facts = conditions(
        device,
        precision=str(dtype).removeprefix("torch."),
        batch_size=config.batch_size,
        n=f"{rounds} processes of {CALLS} timed calls a cell",
        memory="model, optimizer and activations at their peak; -: more than there was",
    )
    formats = {name: "{:.0f}" for name in table.columns if name.endswith("(MB)")}
    report("length", table, facts, config.output, {**formats, "frames": "{:.0f}"})
    path = Path(config.output) / "length.png"
    plot_lengths(table, path)
    print(f"saved: {path}")


def compare_lengths(jobs: list[Job], rounds: int) -> pd.DataFrame:
    """A row for each model and number of frames: ms a clip and MB for each kind of work.

    Medians over `rounds` processes; all jobs run once, then all again, so that whatever else the
    machine does then is spread over all of them. NaN where the memory did not suffice.
    """
    results: dict[Job, list[tuple[float, float]]] = {job: [] for job in jobs}
    for job in tqdm(jobs * rounds, "length", unit="process", leave=False):
        results[job].append(_run(job))
    rows: dict[tuple[str, int, int], dict[str, float | str]] = {}
    for job, runs in results.items():
        row = rows.setdefault(
            (job.model, job.image_size, job.n_frames),
            {"model": f"{job.model}, {job.image_size} px", "frames": job.n_frames},
        )
        seconds, megabytes = np.median(runs, axis=0)
        row[f"{job.work} (ms/clip)"] = 1000 * seconds / job.batch_size
        row[f"{job.work} (MB)"] = megabytes
    return pd.DataFrame(rows.values())


def _run(job: Job) -> tuple[float, float]:
    done = subprocess.run(
        [sys.executable, str(Path(__file__)), json.dumps(asdict(job))],
        capture_output=True,
        text=True,
        check=False,
    )
    # Without memory a process on a CPU is killed by the kernel, or told so.
    if done.returncode == -signal.SIGKILL or is_out_of_memory(done.stderr):
        return np.nan, np.nan
    if done.returncode:
        raise RuntimeError(f"{job} failed:\n{done.stderr}")
    return tuple(json.loads(done.stdout.splitlines()[-1]))


def measure(job: Job) -> tuple[float, float]:
    """Median seconds of a batch, and its peak memory in MB: all that came on top of a process that
    has no model yet (NaN where the system does not tell)."""
    device = choose_device(job.device)
    dtype = choose_precision(job.amp, device)
    forget_peak_memory(device)
    before = peak_memory(device)
    torch.manual_seed(0)
    config = TrainConfig(model=job.model, n_frames=job.n_frames, image_size=job.image_size)
    model = build_model_from_config(vars(config), job.num_classes)
    clips = random_clips(job.batch_size, job.n_frames, job.image_size, device)
    if job.work == "inference":
        model = prepare_for_inference(model, device, dtype)
        call = torch.inference_mode()(lambda: model(clips))
    else:
        if job.work == "checkpointed":
            recompute_stages(model)
        call = _training_step(suit_device(model, device, dtype), clips, job.num_classes, dtype)
    forget_peak_memory(device)  # that of building and preparing the model
    call()
    seconds = time_calls(call, CALLS, device)
    peak = peak_memory(device)
    return float(np.median(seconds)), np.nan if peak is None else peak - before


def _training_step(
    model: nn.Module, clips: torch.Tensor, num_classes: int, dtype: torch.dtype
) -> Callable[[], None]:
    """Forward, backward and AdamW's step on a batch."""
    model.train()
    labels = torch.arange(len(clips), device=clips.device) % num_classes
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step() -> None:
        with autocast(clips.device, dtype):
            logits = model(clips)
        F.cross_entropy(logits.float(), labels).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


@script
def main() -> None:
    print(json.dumps(measure(Job(**json.loads(sys.argv[1])))))


if __name__ == "__main__":
    main()
