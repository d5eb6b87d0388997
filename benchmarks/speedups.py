"""How much faster models answer and learn here than as PyTorch runs them by itself.

Called by benchmark_latency.py. Every single measurement is a process of its own, because allocator
and peak memory belong to the process; the ways to be compared take turns.
"""

import os
import resource
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Literal
from unittest import mock

import numpy as np
import pandas as pd
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from benchmarks.baselines import onnxruntime_session, train_naively
from benchmarks.timing import run_isolated, time_calls
from config import TrainConfig
from dataset import collate
from modeling.inference import prepare_for_inference
from models import build_model_from_config
from training.checks import resolve
from training.engine import train_one_epoch
from training.loaders import TrainSampler
from training.state import Training
from utils.allocator import SWITCH
from utils.device import choose_device, choose_precision, suit_device
from utils.interrupt import Interrupt

NUM_CLASSES = 7

STEPS = 2  # training steps of one timed call


@dataclass(frozen=True)
class Job:
    """One measurement."""

    task: Literal["inference", "training"]
    way: str
    allocator: Literal["default", "kept"]
    model: str
    batch_size: int
    n_frames: int
    image_size: int
    calls: int
    device: str


def compare(
    task: Literal["inference", "training"],
    models: list[tuple[str, int]],
    batch_size: int,
    n_frames: int,
    rounds: int,
    device: str,
) -> pd.DataFrame:
    """A row for each model (name, image size) and way, with its multiples of plain PyTorch's speed.

    Medians over `rounds` processes. `x` compares with eager fp32 under the system's own allocator,
    which is what a plain script gets, `x, same allocator` with eager fp32 that keeps freed memory.
    """
    ways = [("eager fp32", "default"), ("eager fp32", "kept")]
    if task == "inference":
        ways += [("prepared fp32", "kept"), ("prepared bf16", "kept")]
        if device == "cpu" and find_spec("onnxruntime"):
            ways.append(("onnxruntime fp32", "default"))
    else:
        ways += [("train.py", "default"), ("train.py", "kept")]
    jobs = [
        Job(task, way, allocator, name, batch_size, n_frames, size, 3, device)
        for name, size in models
        for _ in range(rounds)
        for way, allocator in ways
    ]
    results: dict[Job, list[dict[str, Any]]] = {job: [] for job in jobs}
    for job in tqdm(jobs, task, unit="process", leave=False):
        results[job].append(_measure_isolated(job))
    rows = []
    for name, size in models:
        mine = {job: runs for job, runs in results.items() if job.model == name}
        medians = {
            (job.way, job.allocator): np.median([run["seconds"] for run in runs])
            for job, runs in mine.items()
        }
        (reference,) = (
            runs[0] for job, runs in mine.items() if (job.way, job.allocator) == ways[0]
        )
        for job, runs in mine.items():
            seconds = medians[job.way, job.allocator]
            row = {
                "model": f"{name}, {size} px",
                "way": job.way,
                "malloc": job.allocator,
                "ms/clip": 1000 * seconds / batch_size,
                "x": medians[ways[0]] / seconds,
                "x, same allocator": medians[ways[1]] / seconds,
                "peak memory (MB)": np.median([run["peak"] for run in runs]),
            }
            if task == "inference":
                difference = np.abs(np.array(runs[0]["logits"]) - np.array(reference["logits"]))
                row["largest logit difference"] = f"{difference.max():.1e}"
            rows.append(row)
    return pd.DataFrame(rows)


def _measure_isolated(job: Job) -> dict[str, Any]:
    with mock.patch.dict(os.environ, {SWITCH: "default" if job.allocator == "default" else ""}):
        return run_isolated(measure, job)


def measure(job: Job) -> dict[str, Any]:
    """Median seconds of a batch, peak memory in MB, and the logits where there are any."""
    device = choose_device(job.device)
    config = resolve(
        TrainConfig(
            data_root=".",
            model=job.model,
            weights="none",
            n_frames=job.n_frames,
            image_size=job.image_size,
            batch_size=job.batch_size,
            device=job.device,
        )
    )
    torch.manual_seed(0)
    model = build_model_from_config(vars(config), NUM_CLASSES).to(device)
    shape = (job.batch_size, job.n_frames, 3, job.image_size, job.image_size)
    clips = torch.randint(0, 256, shape, dtype=torch.uint8)
    result: dict[str, Any] = {}
    if job.task == "inference":
        call = _answer(job, model, clips.to(device), device)
        with torch.inference_mode():
            result["logits"] = call().float().tolist()
            call()
            seconds = time_calls(call, job.calls, device)
    else:
        call = _learn(job, config, model, clips, device)
        call()
        seconds = time_calls(call, job.calls, device) / STEPS
    result["seconds"] = float(np.median(seconds))
    if device.type == "cuda":
        result["peak"] = torch.cuda.max_memory_allocated(device) / 1e6
    else:
        unit = 1 if sys.platform == "darwin" else 1024
        result["peak"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6
    return result


def _answer(
    job: Job, model: torch.nn.Module, clips: torch.Tensor, device: torch.device
) -> Callable[[], torch.Tensor]:
    model.eval()
    if job.way == "onnxruntime fp32":
        session = onnxruntime_session(model, clips)
        return lambda: session(clips)
    if job.way != "eager fp32":
        dtype = torch.bfloat16 if job.way == "prepared bf16" else torch.float32
        model = prepare_for_inference(model, device, dtype)
    return lambda: model(clips)


def _learn(
    job: Job, config: TrainConfig, model: torch.nn.Module, clips: torch.Tensor, device: torch.device
) -> Callable[[], None]:
    labels = [number % NUM_CLASSES for number in range(job.batch_size * STEPS)]
    if job.way == "eager fp32":
        batches = [(clips / 255, torch.tensor(labels[: job.batch_size]))] * STEPS
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
        return lambda: train_naively(model, batches, optimizer, device)
    suit_device(model, device, choose_precision(config.amp, device))
    sampler = TrainSampler(labels, config.tau, config.seed)
    clips = InMemory(clips, labels)
    loader = DataLoader(clips, job.batch_size, sampler=sampler, collate_fn=collate)
    run, interrupt = Training(config, model, device, STEPS), Interrupt()
    return lambda: _epoch(run, loader, interrupt)


def _epoch(run: Training, loader: DataLoader, interrupt: Interrupt) -> None:
    train_one_epoch(run, run.model, loader, interrupt)
    run.step = 0


class InMemory(Dataset):
    """The same few clips again and again, as `ReportingDataset` gives them."""

    def __init__(self, clips: torch.Tensor, labels: list[int]) -> None:
        self.clips = clips
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, draw: tuple[int, int]) -> tuple[int, tuple[torch.Tensor, int]]:
        index = draw[0]
        return index, (self.clips[index % len(self.clips)], self.labels[index])
