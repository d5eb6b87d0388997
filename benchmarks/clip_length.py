"""What longer clips cost, and what gradient checkpointing saves; see benchmark_latency.py.

Every measurement is a process of its own: on a CPU the peak memory belongs to the process. There it
is what the process held of the machine, libraries' buffers and gaps between blocks included, and
checkpointing saves a smaller share of it than of the tensors alone, which a GPU counts.
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
    conditions,
    forget_peak_memory,
    peak_memory,
    random_clips,
    report,
    run_isolated,
    time_calls,
)
from config import TrainConfig
from evaluation.plots import COLOURS, save_figure
from modeling.inference import prepare_for_inference
from modeling.layers import recompute_stages
from models import build_model_from_config
from utils.device import Precision, autocast, choose_device, choose_precision, suit_device
from utils.errors import UserError

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
    """Report and draw what clips of each length cost the models (name, image size).

    Args:
        lengths: numbers of frames per clip.
        rounds: processes per cell of the table.
        output: folder for the table and the picture.

    Raises:
        UserError: a length is none.
    """
    if not lengths or min(lengths) < 1:
        raise UserError(f"lengths = {lengths}: must be numbers of frames, at least 1")
    device = choose_device(device_name)
    dtype = choose_precision(precision, device)
    jobs = [
        Job(work, name, size, n_frames, batch_size, num_classes, str(device), precision)
        for name, size in models
        for n_frames in sorted(set(lengths))
        for work in WORK
    ]
    table = compare_lengths(jobs, rounds)
    facts = conditions(
        device,
        precision=str(dtype).removeprefix("torch."),
        batch_size=batch_size,
        n=f"{rounds} processes of {CALLS} timed calls a cell",
        memory="model, optimizer and activations at their peak; -: more than there was",
    )
    formats = {name: "{:.0f}" for name in table.columns if name.endswith("(MB)")}
    report("length", table, facts, output, {**formats, "frames": "{:.0f}"})
    path = Path(output) / "length.png"
    plot_lengths(table, path)
    print(f"saved: {path}")


def compare_lengths(jobs: list[Job], rounds: int) -> pd.DataFrame:
    """A row for each model and number of frames: ms a clip and MB for each kind of work.

    Medians over `rounds` processes; all jobs run once, then all again, so that whatever else the
    machine does then is spread over all of them. NaN where the memory did not suffice.
    """
    results: dict[Job, list[tuple[float, float]]] = {job: [] for job in jobs}
    for job in tqdm(jobs * rounds, "length", unit="process", leave=False):
        results[job].append(_measure_isolated(job))
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


def _measure_isolated(job: Job) -> tuple[float, float]:
    try:
        return run_isolated(measure, job)
    except MemoryError:
        return np.nan, np.nan


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


def plot_lengths(table: pd.DataFrame, path: str | Path) -> None:
    """Draw memory and time of training steps against the frames a clip, dashed: checkpointed.

    Args:
        table: the columns model, frames, and training and checkpointed in (MB) and (ms/clip).
    """
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    for axes, unit, name in zip(
        figure.subplots(1, 2), ("(MB)", "(ms/clip)"), ("peak memory (MB)", "ms a clip"), strict=True
    ):
        for number, (model, some) in enumerate(table.groupby("model", sort=False)):
            look = {"color": COLOURS[number % len(COLOURS)], "ms": 4}
            axes.plot(some["frames"], some[f"training {unit}"], "o-", **look, label=model)
            axes.plot(some["frames"], some[f"checkpointed {unit}"], "o--", mfc="white", **look)
        axes.set(xlabel="frames a clip", ylabel=name, xscale="log", yscale="log")
        axes.set_xticks(frames := sorted(table["frames"].unique()), frames)
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_minor_formatter(NullFormatter())
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    axes.plot([], [], "ko--", ms=4, mfc="white", label="with gradient checkpointing")
    lines = axes.get_legend_handles_labels()
    figure.legend(*lines, loc="outside lower center", ncols=5, fontsize=8, frameon=False)
    figure.suptitle("a training step", fontsize=10)
    save_figure(figure, path)
