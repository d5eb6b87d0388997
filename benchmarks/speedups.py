"""Speedup of inference and training over eager PyTorch; see benchmark_latency.py.

Every measurement has a process of its own, because allocator and peak memory belong to the process.
The variants take turns.
"""

import os
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
from benchmarks.epoch_time import epoch_trainer
from benchmarks.timing import run_isolated, time_calls
from clips.manifest import CLASSES
from config import TrainConfig
from dataset import collate
from modeling.inference import prepare_for_inference
from models import build_model
from training.checks import resolve
from training.loaders import TrainSampler
from utils.allocator import SWITCH
from utils.device import get_device

NUM_CLASSES = 7

STEPS = 2  # training steps per timed call

Task = Literal["inference", "training", "compile"]


@dataclass(frozen=True)
class Job:
    """One measurement."""

    task: Task
    variant: str
    allocator: Literal["default", "kept"]
    model_name: str
    batch_size: int
    n_frames: int
    image_size: int
    calls: int
    device: str


def compare(
    task: Task,
    models: list[tuple[str, int]],
    batch_size: int,
    n_frames: int,
    rounds: int,
    device: str,
) -> pd.DataFrame:
    """A row per model and variant, with its speedup over the first variant.

    The values are medians over `rounds` processes. For inference and training the first variant is
    eager fp32 with the system's default allocator, which is what a plain script has; `x, same
    allocator` is the speedup over eager fp32 that keeps freed memory. For `compile` it is train.py
    without torch.compile; the first call contains the compilation, without any cache of earlier
    ones.

    Args:
        models: name and image size of each model.
    """
    variants = [("eager fp32", "default"), ("eager fp32", "kept")]
    if task == "inference":
        variants += [("prepared fp32", "kept"), ("prepared bf16", "kept")]
        if device == "cpu" and find_spec("onnxruntime"):
            variants.append(("onnxruntime fp32", "default"))
    elif task == "compile":
        variants = [("train.py", "kept"), ("train.py --compile", "kept")]
    else:
        variants += [("train.py", "default"), ("train.py", "kept")]
    jobs = [
        Job(task, variant, allocator, name, batch_size, n_frames, size, 3, device)
        for name, size in models
        for _ in range(rounds)
        for variant, allocator in variants
    ]
    results: dict[Job, list[dict[str, Any]]] = {job: [] for job in jobs}
    for job in tqdm(jobs, task, unit="process", leave=False):
        results[job].append(_measure_isolated(job))
    rows = []
    for name, size in models:
        own = {job: runs for job, runs in results.items() if job.model_name == name}
        medians = {
            (job.variant, job.allocator): np.median([run["seconds"] for run in runs])
            for job, runs in own.items()
        }
        (reference,) = (
            runs[0] for job, runs in own.items() if (job.variant, job.allocator) == variants[0]
        )
        for job, runs in own.items():
            seconds = medians[job.variant, job.allocator]
            row = {
                "model": f"{name}, {size} px",
                "variant": job.variant,
                "malloc": job.allocator,
                "ms/clip": 1000 * seconds / batch_size,
                "x": medians[variants[0]] / seconds,
                "x, same allocator": medians[variants[1]] / seconds,
                "peak memory (MB)": np.median([run["peak"] for run in runs]),
            }
            if task == "compile":
                del row["malloc"], row["x, same allocator"]
                row[f"first {STEPS} steps (s)"] = np.median([run["first"] for run in runs])
            if task == "inference":
                difference = np.abs(np.array(runs[0]["logits"]) - np.array(reference["logits"]))
                row["largest logit difference"] = f"{difference.max():.1e}"
            rows.append(row)
    return pd.DataFrame(rows)


def _measure_isolated(job: Job) -> dict[str, Any]:
    variables = {
        SWITCH: "default" if job.allocator == "default" else "",
        "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1",  # compiling takes as long every time
    }
    with mock.patch.dict(os.environ, variables):
        return run_isolated(measure, job)


def measure(job: Job) -> dict[str, Any]:
    """Median seconds per batch, peak memory in MB, for inference the logits, for training the
    seconds of the first call."""
    device = get_device(job.device)
    config = resolve(
        TrainConfig(
            data_root=".",
            classes=CLASSES,
            model_name=job.model_name,
            weights="none",
            n_frames=job.n_frames,
            image_size=job.image_size,
            batch_size=job.batch_size,
            device=job.device,
        )
    )
    torch.manual_seed(0)
    model = build_model(config, NUM_CLASSES).to(device)
    shape = (job.batch_size, job.n_frames, 3, job.image_size, job.image_size)
    clips = torch.randint(0, 256, shape, dtype=torch.uint8)
    result: dict[str, Any] = {}
    if job.task == "inference":
        call = _inference_call(job, model, clips.to(device), device)
        with torch.inference_mode():
            result["logits"] = call().float().tolist()
            call()
            seconds = time_calls(call, job.calls, device)
    else:
        call = _training_call(job, config, model, clips, device)
        result["first"] = float(time_calls(call, 1, device)[0])
        seconds = time_calls(call, job.calls, device) / STEPS
    result["seconds"] = float(np.median(seconds))
    if device.type == "cuda":
        result["peak"] = torch.cuda.max_memory_allocated(device) / 1e6
    elif sys.platform == "win32":
        result["peak"] = float("nan")  # Windows tells it in another way
    else:
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        result["peak"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6
    return result


def _inference_call(
    job: Job, model: torch.nn.Module, clips: torch.Tensor, device: torch.device
) -> Callable[[], torch.Tensor]:
    model.eval()
    if job.variant == "onnxruntime fp32":
        session = onnxruntime_session(model, clips)
        return lambda: session(clips)
    if job.variant != "eager fp32":
        dtype = torch.bfloat16 if job.variant == "prepared bf16" else torch.float32
        model = prepare_for_inference(model, device, dtype)
    return lambda: model(clips)


def _training_call(
    job: Job, config: TrainConfig, model: torch.nn.Module, clips: torch.Tensor, device: torch.device
) -> Callable[[], None]:
    labels = [index % NUM_CLASSES for index in range(job.batch_size * STEPS)]
    if job.variant == "eager fp32":
        batches = [(clips / 255, torch.tensor(labels[: job.batch_size]))] * STEPS
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
        return lambda: train_naively(model, batches, optimizer, device)
    sampler = TrainSampler(labels, config.sampler_tau, config.seed)
    dataset = InMemory(clips, labels)
    pinned = device.type == "cuda"
    loader = DataLoader(
        dataset, job.batch_size, sampler=sampler, collate_fn=collate, pin_memory=pinned
    )
    if job.variant == "train.py --compile":
        model.compile()
    train = epoch_trainer(config, model, STEPS, device)
    return lambda: train(loader)


class InMemory(Dataset):
    """A few clips in memory, used again and again; items are those that `collate` expects."""

    def __init__(self, clips: torch.Tensor, labels: list[int]) -> None:
        self.clips = clips
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index_and_seed: tuple[int, int]) -> tuple[int, tuple[torch.Tensor, int]]:
        index, _ = index_and_seed
        return index, (self.clips[index % len(self.clips)], self.labels[index])
