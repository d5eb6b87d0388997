"""Time and memory of longer clips, and what gradient checkpointing saves; see benchmark_latency.py.

Every measurement has a process of its own, because on a CPU the peak memory belongs to the process.
It includes the buffers of libraries and gaps between blocks, so checkpointing saves a smaller
fraction of it than of the tensors alone, which a GPU counts.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from benchmarks.timing import (
    environment,
    peak_memory,
    random_clips,
    report,
    reset_peak_memory,
    run_isolated,
    time_calls,
)
from config import Precision, TrainConfig
from evaluation.plots import COLOURS, save_figure
from modeling.inference import prepare_for_inference
from modeling.layers import enable_gradient_checkpointing
from models import build_model
from utils.device import autocast, autocast_dtype, get_device, prepare_model
from utils.errors import UserError

CALLS = 3  # timed calls per process

WORK = ("training", "checkpointed", "inference")


@dataclass(frozen=True)
class Job:
    """One measurement."""

    work: str
    """one of WORK"""
    model_name: str
    image_size: int
    n_frames: int
    batch_size: int
    num_classes: int
    device: str
    precision: Precision


def time_lengths(
    models: Sequence[tuple[str, int]],
    lengths: Sequence[int],
    batch_size: int,
    num_classes: int,
    rounds: int,
    device_name: str,
    precision: Precision,
    output: str,
) -> None:
    """Report and draw the time and memory of clips of each length.

    Args:
        models: name and image size of each model.
        lengths: numbers of frames per clip.
        rounds: processes per cell of the table.
        output: folder for the table and the figure.

    Raises:
        UserError: a length is not a number of frames.
    """
    if not lengths or min(lengths) < 1:
        raise UserError(f"lengths = {lengths}: must be numbers of frames, at least 1")
    device = get_device(device_name)
    dtype = autocast_dtype(precision, device)
    jobs = [
        Job(work, name, size, n_frames, batch_size, num_classes, str(device), precision)
        for name, size in models
        for n_frames in sorted(set(lengths))
        for work in WORK
    ]
    table = compare_lengths(jobs, rounds)
    conditions = environment(
        device,
        precision=str(dtype).removeprefix("torch."),
        batch_size=batch_size,
        n=f"{rounds} processes of {CALLS} timed calls per cell",
        memory="peak of model, optimizer and activations; -: more than the machine has",
    )
    formats = {name: "{:.0f}" for name in table.columns if name.endswith("(MB)")}
    report("length", table, conditions, output, {**formats, "frames": "{:.0f}"})
    path = Path(output) / "length.png"
    plot_lengths(table, path)
    print(f"saved: {path}")


def compare_lengths(jobs: list[Job], rounds: int) -> pd.DataFrame:
    """A row per model and number of frames, with ms/clip and MB of each kind of work.

    The values are medians over `rounds` processes. In every round all jobs run once, so that
    other programs on the machine slow all of them down alike. NaN where memory was too small.
    """
    results: dict[Job, list[tuple[float, float]]] = {job: [] for job in jobs}
    for job in tqdm(jobs * rounds, "length", unit="process", leave=False):
        results[job].append(_measure_isolated(job))
    rows: dict[tuple[str, int, int], dict[str, float | str]] = {}
    for job, runs in results.items():
        row = rows.setdefault(
            (job.model_name, job.image_size, job.n_frames),
            {"model": f"{job.model_name}, {job.image_size} px", "frames": job.n_frames},
        )
        seconds, megabytes = np.median(runs, axis=0)
        row[f"{job.work} (ms/clip)"] = 1000 * seconds / job.batch_size
        row[f"{job.work} (MB)"] = megabytes
    return pd.DataFrame(rows.values())


def _measure_isolated(job: Job) -> tuple[float, float]:
    try:
        return run_isolated(measure, job)
    except MemoryError:
        return np.nan, np.nan


def measure(job: Job) -> tuple[float, float]:
    """Median seconds per batch, and the peak memory in MB beyond that of a process without a model
    (NaN where the system does not report it)."""
    device = get_device(job.device)
    dtype = autocast_dtype(job.precision, device)
    reset_peak_memory(device)
    before = peak_memory(device)
    torch.manual_seed(0)
    config = TrainConfig(
        model_name=job.model_name, n_frames=job.n_frames, image_size=job.image_size
    )
    model = build_model(config, job.num_classes)
    clips = random_clips(job.batch_size, job.n_frames, job.image_size, device)
    if job.work == "inference":
        model = prepare_for_inference(model, device, dtype)
        call = torch.inference_mode()(lambda: model(clips))
    else:
        if job.work == "checkpointed":
            enable_gradient_checkpointing(model)
        call = _training_step(prepare_model(model, device, dtype), clips, job.num_classes, dtype)
    reset_peak_memory(device)  # building and preparing the model does not count
    call()
    seconds = time_calls(call, CALLS, device)
    peak = peak_memory(device)
    return float(np.median(seconds)), np.nan if peak is None else peak - before


def _training_step(
    model: nn.Module, clips: torch.Tensor, num_classes: int, dtype: torch.dtype
) -> Callable[[], None]:
    """A call that trains one step on a batch: forward, backward, AdamW."""
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


def plot_lengths(table: pd.DataFrame, path: str | Path) -> None:
    """Draw memory and time of training steps against the frames per clip, dashed: checkpointed.

    Args:
        table: output of `compare_lengths`.
    """
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    for axes, unit, name in zip(
        figure.subplots(1, 2),
        ("(MB)", "(ms/clip)"),
        ("peak memory (MB)", "ms per clip"),
        strict=True,
    ):
        for i, (model, rows) in enumerate(table.groupby("model", sort=False)):
            style = {"color": COLOURS[i % len(COLOURS)], "ms": 4}
            axes.plot(rows["frames"], rows[f"training {unit}"], "o-", **style, label=model)
            axes.plot(rows["frames"], rows[f"checkpointed {unit}"], "o--", mfc="white", **style)
        axes.set(xlabel="frames per clip", ylabel=name, xscale="log", yscale="log")
        axes.set_xticks(frames := sorted(table["frames"].unique()), frames)
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_minor_formatter(NullFormatter())
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    axes.plot([], [], "ko--", ms=4, mfc="white", label="with gradient checkpointing")
    figure.legend(
        *axes.get_legend_handles_labels(),
        loc="outside lower center",
        ncols=5,
        fontsize=8,
        frameon=False,
    )
    figure.suptitle("a training step", fontsize=10)
    save_figure(figure, path)
