"""How fast the models are: the ms/clip table.

    python benchmark_latency.py                              all four models, on what is here
    python benchmark_latency.py --models tsm runs/2026..._tsm --device cuda --amp bf16
    python benchmark_latency.py --models r2plus1d@112 --batch-size 8 --repeats 30
    python benchmark_latency.py --what inference training    what the preparation for speed gains
    python benchmark_latency.py --what streaming             an answer at every frame of a video
    python benchmark_latency.py --what length                time and memory of longer clips

A model is a name (random weights: speed does not depend on them), a name@size, or a run folder
(its own settings, its accuracy and macro-F1 beside its speed). Two numbers are easily confused:

- Latency (ms/clip) is the mean time of a batch of 8 divided by 8, as published: throughput;
- batch-1 p50, p95 and p99 are what someone waits for the answer to one clip.

Only the forward pass is timed, from a batch in the device's memory to its logits, but for the
column end to end, which starts at a video file (an H.264 clip of 30 frames, 1280 x 720).
"""

import dataclasses
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
import tyro
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from benchmarks.clip_length import time_lengths
from benchmarks.speedups import compare
from benchmarks.streaming import STREAMED, compare_streaming, measure_live
from benchmarks.timing import (
    conditions,
    forget_peak_memory,
    peak_memory,
    published_speed,
    random_clips,
    report,
    time_calls,
)
from checkpoint import build_from_checkpoint, load_checkpoint
from clips.manifest import ClipRow
from config import TrainConfig
from dataset import ClipsDataset
from modeling.inference import prepare_for_inference
from models import MODELS, build_model_from_config
from utils.cli import script
from utils.device import choose_device, choose_precision
from utils.errors import UserError
from video.encoder import write_video
from video.motion import brought, channels

# how many digits make sense, where two are not right
FORMATS = {
    "Accuracy": "{:.4f}",
    "Macro F1": "{:.4f}",
    "Mean Batch Time (s)": "{:.4f}",
    "+- std (s)": "{:.4f}",
    "Frames": "{:.0f}",
    "Size (px)": "{:.0f}",
}

Table = Literal["latency", "inference", "training", "streaming", "length"]


@dataclass
class BenchmarkConfig:
    """What to time, and how often."""

    what: tuple[Table, ...] = ("latency",)
    """which tables: the models' latency; ways to run them against plain PyTorch and onnxruntime;
    training steps against plain PyTorch; following a video frame by frame; clips of several
    lengths"""
    models: tuple[str, ...] = ("tsm", "cnn_lstm", "r2plus1d@112", "vivit")
    """names, name@size, or run folders"""
    batch_size: int = 8
    """clips a batch for the published columns"""
    n_frames: int = 16
    """frames a clip"""
    lengths: tuple[int, ...] = (8, 16, 32, 64)
    """for length: frames a clip, one after the other"""
    image_size: int = 224
    """pixels of a side"""
    warmup: int = 3
    """forward passes before the clock starts"""
    repeats: int = 10
    """timed forward passes of a batch; five times as many of a single clip; for the comparisons
    a third as many processes a way"""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps"""
    amp: Literal["auto", "fp32", "bf16", "fp16"] = "fp32"
    """precision"""
    compile: bool = False
    """torch.compile the models"""
    num_classes: int = 7
    """classes of the models that are given by name"""
    video: str = ""
    """for streaming: a video whose pictures are followed (empty: a rendered scene with noise)"""
    output: str = "runs/benchmarks"
    """folder for latency.csv, .json and .md"""


@dataclass
class Subject:
    """A model to time, with what it takes in."""

    name: str
    model: nn.Module
    n_frames: int
    image_size: int
    scores: dict[str, float]


def subject(spec: str, config: BenchmarkConfig) -> Subject:
    """The model that a name, a name@size or a run folder means.

    Raises:
        UserError: it means nothing.
    """
    name, _, size = spec.partition("@")
    if name in MODELS:
        if size and not size.isdigit():
            raise UserError(
                f"{spec!r}: after the @ stands the image size in pixels, e.g. {name}@112"
            )
        settings = dataclasses.replace(
            TrainConfig(),
            model=name,
            n_frames=config.n_frames,
            image_size=int(size or config.image_size),
        )
        torch.manual_seed(0)
        model = build_model_from_config(dataclasses.asdict(settings), config.num_classes).eval()
        return Subject(spec, model, settings.n_frames, settings.image_size, {})
    if not Path(spec).exists():
        raise UserError(
            f"{spec!r} is neither a model ({', '.join(MODELS)}) nor a run folder or checkpoint"
        )
    state = load_checkpoint(spec)
    settings, results = state["config"], Path(spec) / "test_metrics.json"
    scores = json.loads(results.read_text(encoding="utf-8")) if results.is_file() else {}
    model = build_from_checkpoint(state)
    label = f"{settings['model']} ({Path(spec).name})"
    return Subject(label, model, settings["n_frames"], settings["image_size"], scores)


def count_gflops(model: nn.Module, clip: torch.Tensor) -> float:
    """Floating-point operations of a forward pass in billions, a multiply-add counted as two.

    PyTorch's counter sees an LSTM as nothing: it is added by formula, for each frame and layer
    2 x 4 x hidden x (input + hidden), twice that if bidirectional.
    """
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        model(clip)
    flops = counter.get_total_flops()
    for module in model.modules():
        if isinstance(module, nn.LSTM):
            directions = 2 if module.bidirectional else 1
            for layer in range(module.num_layers):
                width = module.input_size if layer == 0 else directions * module.hidden_size
                cells = 2 * 4 * module.hidden_size * (width + module.hidden_size)
                flops += clip.shape[0] * clip.shape[1] * directions * cells
    return flops / 1e9


@torch.inference_mode()
def measure(
    item: Subject, video: Path, config: BenchmarkConfig, device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    """The table's row of one model."""
    model = prepare_for_inference(item.model, device, dtype, config.compile)
    inputs = brought(getattr(item.model, "inputs", "rgb"))
    how = (config.batch_size, item.n_frames, item.image_size)
    batch = random_clips(*how, device, channels(inputs))
    dataset = ClipsDataset([ClipRow(video, 0)], item.n_frames, item.image_size, inputs=inputs)
    gflops = count_gflops(model, batch[:1])
    forget_peak_memory(device)

    def from_file() -> None:
        model(dataset[0][0][None].to(device)).cpu()

    for clips in (batch, batch[:1]):
        for _ in range(config.warmup):
            model(clips)
    batches = time_calls(lambda: model(batch), config.repeats, device)
    singles = time_calls(lambda: model(batch[:1]), 5 * config.repeats, device) * 1000
    whole = time_calls(from_file, config.repeats, device) * 1000
    p50, p95, p99 = np.percentile(singles, (50, 95, 99))
    return {
        "Model": item.name,
        "Params (M)": sum(p.numel() for p in item.model.parameters()) / 1e6,
        "Accuracy": item.scores.get("accuracy"),
        "Macro F1": item.scores.get("macro_f1"),
        **published_speed(batches, config.batch_size),
        "Batch-1 p50 (ms)": p50,
        "Batch-1 p95 (ms)": p95,
        "Batch-1 p99 (ms)": p99,
        "End to end (ms)": float(np.median(whole)),
        "GFLOPs": gflops,
        "Peak memory (MB)": peak_memory(device),
        "Frames": item.n_frames,
        "Size (px)": item.image_size,
    }


def benchmark(specs: Sequence[str], config: BenchmarkConfig) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Time the models one after the other: the table, and its conditions."""
    device = choose_device(config.device)
    dtype = choose_precision(config.amp, device)
    items = [subject(spec, config) for spec in specs]  # a wrong name is told before the work
    with tempfile.TemporaryDirectory() as folder:
        video = Path(folder) / "clip.mp4"
        write_video(video, _test_video())
        rows = [
            measure(items.pop(0), video, config, device, dtype)  # a timed model's memory is freed
            for _ in tqdm(specs, "timing", unit="model", leave=False)
        ]
    facts = conditions(
        device,
        precision=str(dtype).removeprefix("torch."),
        batch_size=config.batch_size,
        n=f"{config.repeats} batches, {5 * config.repeats} single clips",
        compile=config.compile,
    )
    return pd.DataFrame(rows), facts


def _test_video() -> np.ndarray:
    """30 frames of 1280 x 720 with some detail and some motion, `(30, 720, 1280, 3)`."""
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (100, 180, 3), dtype=np.uint8)
    scene = blocks.repeat(8, axis=0).repeat(8, axis=1)  # (800, 1440, 3)
    return np.stack([scene[t : t + 720, 2 * t : 2 * t + 1280] for t in range(30)])


@script
def main() -> None:
    config = tyro.cli(BenchmarkConfig, description=__doc__)
    for name in ("batch_size", "n_frames", "image_size", "repeats", "num_classes"):
        if getattr(config, name) < 1:
            raise UserError(f"{name} = {getattr(config, name)}: must be at least 1")
    if config.warmup < 0 or not config.models:
        raise UserError("warmup must be at least 0, and there must be a model to time")
    for what in config.what:
        if what == "latency":
            report(what, *benchmark(config.models, config), config.output, FORMATS)
        elif what == "streaming":
            time_streaming(config)
        elif what == "length":
            time_lengths(
                _by_name(what, config),
                config.lengths,
                config.batch_size,
                config.num_classes,
                max(1, config.repeats // 3),
                config.device,
                config.amp,
                config.output,
            )
        else:
            report(f"{what}_ways", *compare_ways(what, config), config.output, FORMATS)


def time_streaming(config: BenchmarkConfig) -> None:
    """Report what streaming saves, and whether it keeps up with a camera."""
    names = [spec for spec in config.models if spec in STREAMED]
    if not names:
        raise UserError(f"streaming times models by name: {', '.join(STREAMED)}")
    device = choose_device(config.device)
    dtype = choose_precision(config.amp, device)
    settings = names, config.n_frames, config.image_size
    ratios = compare_streaming(*settings, config.repeats, device, dtype)
    live = measure_live(*settings, 60 * config.repeats, device, dtype, config.video)
    facts = {"precision": str(dtype).removeprefix("torch."), "window": config.n_frames,
             "pixels": config.image_size}  # fmt: skip
    turns = f"{config.repeats} turns of 3 calls"
    report("streaming", ratios, conditions(device, n=turns, **facts), config.output, FORMATS)
    video = f"1280 x 720 H.264, {config.video or 'rendered'}, decoded in the same thread"
    report("live", live, conditions(device, video=video, **facts), config.output, FORMATS)


def _by_name(what: str, config: BenchmarkConfig) -> list[tuple[str, int]]:
    """The models by name with their image sizes.

    Raises:
        UserError: one is a run folder.
    """
    models = []
    for spec in config.models:
        item = subject(spec, config)
        if spec.partition("@")[0] not in MODELS:
            raise UserError(f"{spec!r}: {what} compares models by name ({', '.join(MODELS)})")
        models.append((spec.partition("@")[0], item.image_size))
    return models


def compare_ways(
    task: Literal["inference", "training"], config: BenchmarkConfig
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """The models by name, run in several ways: the table, and its conditions."""
    models = _by_name(task, config)
    rounds = max(1, config.repeats // 3)
    device = choose_device(config.device)
    table = compare(task, models, config.batch_size, config.n_frames, rounds, str(device))
    facts = conditions(
        device,
        ("onnxruntime",),
        batch_size=config.batch_size,
        n=f"{rounds} processes of 3 timed calls",
    )
    del facts["allocator"]  # a column of its own
    return table, facts


if __name__ == "__main__":
    main()
