"""Times the models: the ms/clip table, and comparisons with other ways to run them.

    python benchmark_latency.py                              all models, on this machine
    python benchmark_latency.py --model-names tsm_resnet runs/2026..._tsm_resnet --precision bf16
    python benchmark_latency.py --model-names r2plus1d@112 --batch-size 8 --repeats 30
    python benchmark_latency.py --what inference training    speedup over eager PyTorch
    python benchmark_latency.py --what engines               PyTorch, OpenVINO, ONNX Runtime, int8
    python benchmark_latency.py --what streaming             a prediction at every frame of a video
    python benchmark_latency.py --what length                time and memory of longer clips
    python benchmark_latency.py --what roofline              what bounds a training step
    python benchmark_latency.py --what compile               training steps with torch.compile

A model is a name (with random weights, because speed does not depend on them), a name@size, or a
run folder (with its own settings, and its accuracy and macro-F1 next to its speed). Two numbers are
easily confused:

- Latency (ms/clip) is the mean time of a batch of 8 divided by 8, as published: it measures
  throughput;
- batch-1 p50, p95 and p99 are how long the prediction for a single clip takes.

Only the forward pass is timed, from a batch in the memory of the device to its logits, except in
the column end to end, which starts at a video file (an H.264 clip of 30 frames, 1280 x 720).
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from config import OLD_VALUES, EngineName, Precision, TrainConfig, from_dict
from utils.cli import cli_main, parse
from utils.errors import UserError
from utils.files import read_json, require_writable

# torch, pandas and what imports them are imported in the functions: --help does without them.
if TYPE_CHECKING:
    import pandas as pd
    import torch
    from torch import nn

# Formats of the columns for which two digits are not right.
FORMATS = {
    "Accuracy": "{:.4f}",
    "Macro F1": "{:.4f}",
    "Mean Batch Time (s)": "{:.4f}",
    "+- std (s)": "{:.4f}",
    "Frames": "{:.0f}",
    "Size (px)": "{:.0f}",
    "batch": "{:.0f}",
    "n": "{:.0f}",
}

Table = Literal[
    "latency",
    "inference",
    "training",
    "compile",
    "engines",
    "streaming",
    "length",
    "roofline",
]


@dataclass
class BenchmarkConfig:
    """What to time, and how often."""

    what: tuple[Table, ...] = ("latency",)
    """tables to make: latency of the models; inference here, in eager PyTorch and in onnxruntime;
    training steps here and in eager PyTorch; training steps with and without torch.compile
    (compile); engines side by side (engines); following a video frame by frame (streaming); clips
    of several lengths (length); whether arithmetic or memory bounds a forward pass and a training
    step (roofline)"""
    model_names: tuple[str, ...] = (
        *("tsm_resnet", "cnnlstm", "r2plus1d@112", "vivit", "timesformer", "video_swin", "mvit"),
    )
    """models to time: names, name@size, run folders, or files of export.py"""
    batch_size: int = 8
    """clips per batch for the published columns"""
    n_frames: int = 16
    """frames per clip"""
    lengths: tuple[int, ...] = (8, 16, 32, 64)
    """length: numbers of frames per clip"""
    image_size: int = 224
    """height and width of the frames in pixels"""
    warmup: int = 3
    """forward passes before the timed ones"""
    repeats: int = 10
    """timed forward passes of a batch; those of a single clip are five times as many, and the
    processes per variant of the comparisons a third"""
    device: str = "auto"
    """device: auto, cpu, cuda, cuda:1, mps"""
    precision: Precision = "fp32"
    """precision of the forward pass: auto (what the device computes fast), fp32, bf16, fp16"""
    compile: bool = False
    """compile the models with torch.compile"""
    engine: EngineName | None = None
    """latency: what computes the models (None: torch; for an exported file the engine
    that it was exported for)"""
    num_classes: int = 7
    """number of classes of the models that are given by name"""
    video: str = ""
    """streaming: video whose frames are used (empty: a rendered scene with noise)"""
    output: str = "runs/benchmarks"
    """folder for the tables: latency.csv, .json and .md, and so on"""


@dataclass
class ModelSpec:
    """A model to time, and its input."""

    name: str
    model: "nn.Module"
    n_frames: int
    image_size: int
    scores: dict[str, float]
    """of test_metrics.json, if it is a run folder"""
    engine: str = "torch"
    """what computes the model"""
    computed: "nn.Module | None" = None
    """the model as this engine computes it"""


def read_model(name_or_run: str, config: BenchmarkConfig) -> ModelSpec:
    """The model of a name, a name@size or a run folder.

    Raises:
        UserError: there is no such model or run folder.
    """
    import torch

    from deployment.files import is_exported
    from deployment.loading import ModelSource
    from models import MODELS, build_model

    name, _, size = name_or_run.partition("@")
    name = OLD_VALUES["model_name"].get(name, name)
    if name in MODELS:
        if size and not (size.isdecimal() and len(size) < 5):
            raise UserError(
                f"{name_or_run!r}: after the @ comes the image size in pixels, e.g. {name}@112"
            )
        settings = TrainConfig(
            model_name=name, n_frames=config.n_frames, image_size=int(size or config.image_size)
        )
        torch.manual_seed(0)
        model = build_model(settings, config.num_classes).eval()
        shape = settings.n_frames, settings.image_size
        return ModelSpec(name_or_run, model, *shape, {}, *_in_engine(model, *shape, config))
    if not Path(name_or_run).exists():
        raise UserError(
            f"{name_or_run!r} is neither a model ({', '.join(MODELS)}) nor a run folder or "
            "checkpoint"
        )
    engine = config.engine if is_exported(name_or_run) else None  # a run's model is asked below
    source = ModelSource(name_or_run, engine, config.device, config.precision)
    settings = from_dict(source.state["config"])
    model = source.build()
    shape = {"accuracy?": float | None, "macro_f1?": float | None}
    run = Path(name_or_run)
    scores = read_json(run / "test_metrics.json", shape) if run.is_dir() else {}
    label = f"{settings.model_name} ({Path(name_or_run).name})"
    size = settings.n_frames, settings.image_size
    in_engine = (source.engine, model) if source.exported else _in_engine(model, *size, config)
    return ModelSpec(label, model, *size, scores, *in_engine)


def _in_engine(
    model: "nn.Module", n_frames: int, image_size: int, config: BenchmarkConfig
) -> "tuple[str, nn.Module]":
    """The engine of the settings, and a model as this engine computes it."""
    from deployment.runtime import engine_device, in_engine

    engine = config.engine or "torch"
    place = engine_device(engine, config.device, config.precision)
    computed, engine = in_engine(model, engine, n_frames, image_size, *place)
    return engine, computed


def count_gflops(model: "nn.Module", clip: "torch.Tensor") -> float:
    """Floating-point operations of a forward pass in billions; a multiply-add counts as two.

    Attention and LSTMs are counted too, see `benchmarks.roofline.count_flops`.
    """
    import torch

    from benchmarks.roofline import count_flops

    with torch.inference_mode():
        return count_flops(lambda: model(clip)) / 1e9


def measure(
    spec: ModelSpec,
    video: Path,
    config: BenchmarkConfig,
    device: "torch.device",
    dtype: "torch.dtype",
) -> dict[str, Any]:
    """The row of one model in the table."""
    import torch

    from benchmarks.timing import (
        peak_memory,
        random_clips,
        reset_peak_memory,
        throughput_columns,
        time_calls,
    )
    from clips.manifest import ClipRow
    from dataset import ClipsDataset
    from modeling.engines import Engine
    from modeling.inference import prepare_for_inference
    from video.motion import Modality

    model = prepare_for_inference(spec.computed or spec.model, device, dtype, config.compile)
    modality = getattr(spec.model, "modality", Modality.parse("rgb"))
    shape = config.batch_size, spec.n_frames, spec.image_size
    batch = random_clips(*shape, device, modality.channels)
    dataset = ClipsDataset(
        [ClipRow(video, 0)], spec.n_frames, spec.image_size, motion=modality.stored_motion
    )
    exported = isinstance(spec.model, Engine)  # its operations and weights are not ours to count
    gflops = (
        None
        if exported
        else count_gflops(prepare_for_inference(spec.model, device, dtype), batch[:1])
    )
    reset_peak_memory(device)

    def from_file() -> None:
        model(dataset[0][0][None].to(device)).cpu()

    with torch.inference_mode():
        for clips in (batch, batch[:1]):
            for _ in range(config.warmup):
                model(clips)
        batches = time_calls(lambda: model(batch), config.repeats, device)
        singles = time_calls(lambda: model(batch[:1]), 5 * config.repeats, device) * 1000
        end_to_end = time_calls(from_file, config.repeats, device) * 1000
    p50, p95, p99 = np.percentile(singles, (50, 95, 99))
    return {
        "Model": spec.name,
        **({"Engine": spec.engine} if config.engine or exported else {}),
        "Params (M)": None if exported else sum(p.numel() for p in spec.model.parameters()) / 1e6,
        "Accuracy": spec.scores.get("accuracy"),
        "Macro F1": spec.scores.get("macro_f1"),
        **throughput_columns(batches, config.batch_size),
        "Batch-1 p50 (ms)": p50,
        "Batch-1 p95 (ms)": p95,
        "Batch-1 p99 (ms)": p99,
        "End to end (ms)": float(np.median(end_to_end)),
        "GFLOPs": gflops,
        "Peak memory (MB)": peak_memory(device),
        "Frames": spec.n_frames,
        "Size (px)": spec.image_size,
    }


def time_models(config: BenchmarkConfig) -> tuple["pd.DataFrame", dict[str, Any]]:
    """Time the models one after the other: the table, and its conditions."""
    import pandas as pd
    from tqdm import tqdm

    from benchmarks.timing import environment
    from deployment.runtime import engine_device
    from video.encoder import write_video

    device, dtype = engine_device(config.engine or "torch", config.device, config.precision)
    specs = [read_model(name, config) for name in config.model_names]  # finds wrong names first
    with tempfile.TemporaryDirectory() as folder:
        video = Path(folder) / "clip.mp4"
        write_video(video, _test_video())
        rows = [
            measure(specs.pop(0), video, config, device, dtype)  # frees the memory of each model
            for _ in tqdm(config.model_names, "timing", unit="model", leave=False)
        ]
    conditions = environment(
        device,
        precision=str(dtype).removeprefix("torch."),
        batch_size=config.batch_size,
        n=f"{config.repeats} batches, {5 * config.repeats} single clips",
        compile=config.compile,
    )
    return pd.DataFrame(rows), conditions


def _test_video() -> np.ndarray:
    """30 frames of 1280 x 720 with some detail and motion, `(30, 720, 1280, 3)` uint8."""
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (100, 180, 3), dtype=np.uint8)
    scene = blocks.repeat(8, axis=0).repeat(8, axis=1)  # (800, 1440, 3)
    return np.stack([scene[t : t + 720, 2 * t : 2 * t + 1280] for t in range(30)])


def time_engines(config: BenchmarkConfig) -> tuple["pd.DataFrame", dict[str, Any]]:
    """Time the engines on models by name: the table, and its conditions."""
    import torch

    from benchmarks.engines import compare_engines, instruction_sets
    from benchmarks.timing import environment

    models, batch_sizes = _named_models("engines", config), sorted({1, config.batch_size})
    table = compare_engines(models, batch_sizes, config.n_frames, config.repeats)
    packages = "openvino", "onnxruntime", "nncf"
    conditions = environment(torch.device("cpu"), packages, instructions=instruction_sets())
    return table, conditions


def time_streaming(config: BenchmarkConfig) -> None:
    """Report what streaming saves, and whether it is fast enough for a camera."""
    from importlib.util import find_spec

    import torch

    from benchmarks.streaming import INT8, STREAMED, compare_streaming, measure_live
    from benchmarks.timing import environment, report
    from utils.device import autocast_dtype, get_device

    names = [name for name in config.model_names if name in STREAMED]
    if not names:
        raise UserError(f"streaming times models by name: {', '.join(STREAMED)}")
    device = get_device(config.device)
    dtype = autocast_dtype(config.precision, device)
    shape = names, config.n_frames, config.image_size
    ratios = compare_streaming(*shape, config.repeats, device, dtype)
    conditions = {
        "precision": str(dtype).removeprefix("torch."),
        "window": config.n_frames,
        "pixels": config.image_size,
    }
    turns = f"{config.repeats} turns of 3 calls"
    report("streaming", ratios, environment(device, n=turns, **conditions), config.output, FORMATS)
    engines = ["torch"]
    if device.type == "cpu" and dtype == torch.float32 and find_spec("openvino"):
        engines += ["openvino"] + [INT8] * bool(find_spec("nncf"))
    live = measure_live(*shape, 60 * config.repeats, device, dtype, config.video, engines)
    video = f"1280 x 720 H.264, {config.video or 'rendered'}, decoded in the same thread"
    report("live", live, environment(device, video=video, **conditions), config.output, FORMATS)


def time_rooflines(config: BenchmarkConfig) -> tuple["pd.DataFrame", dict[str, Any]]:
    """What bounds the models by name: the table, and its conditions."""
    from benchmarks.roofline import COPIED, SIDE, measure_rooflines
    from benchmarks.timing import environment
    from utils.device import autocast_dtype, get_device

    models = _named_models("roofline", config)
    device = get_device(config.device)
    dtype = autocast_dtype(config.precision, device)
    shape = config.batch_size, config.n_frames, config.num_classes
    table = measure_rooflines(models, *shape, config.warmup, config.repeats, device, dtype)
    kind = "cuda" if device.type == "cuda" else "cpu"
    conditions = environment(
        device,
        precision=str(dtype).removeprefix("torch."),
        batch_size=config.batch_size,
        n=f"{config.repeats} rounds per model, medians",
        peak=f"product of matrices of {SIDE[kind]} x {SIDE[kind]}",
        bandwidth=f"copy of {COPIED[kind] >> 20} MiB, read and written",
    )
    return table, conditions


def compare_variants(
    task: Literal["inference", "training", "compile"], config: BenchmarkConfig
) -> tuple["pd.DataFrame", dict[str, Any]]:
    """Run the models by name in several variants: the table, and its conditions."""
    from benchmarks.speedups import compare
    from benchmarks.timing import environment
    from utils.device import get_device

    models = _named_models(task, config)
    rounds = max(1, config.repeats // 3)
    device = get_device(config.device)
    table = compare(task, models, config.batch_size, config.n_frames, rounds, str(device))
    conditions = environment(
        device,
        ("onnxruntime",),
        batch_size=config.batch_size,
        n=f"{rounds} processes of 3 timed calls",
    )
    del conditions["allocator"]  # it is a column of the table
    return table, conditions


def _named_models(what: str, config: BenchmarkConfig) -> list[tuple[str, int]]:
    """Names and image sizes of the models, which must all be given by name.

    Raises:
        UserError: one is a run folder.
    """
    from models import MODELS

    models = []
    for name_or_run in config.model_names:
        spec = read_model(name_or_run, config)
        name = name_or_run.partition("@")[0]
        name = OLD_VALUES["model_name"].get(name, name)
        if name not in MODELS:
            raise UserError(
                f"{name_or_run!r}: {what} compares models by name ({', '.join(MODELS)})"
            )
        models.append((name, spec.image_size))
    return models


@cli_main
def main() -> None:
    config = parse(
        BenchmarkConfig, __doc__, old_names={"amp": "precision", "models": "model_names"}
    )
    for name in ("batch_size", "n_frames", "image_size", "repeats", "num_classes"):
        if getattr(config, name) < 1:
            raise UserError(f"{name} = {getattr(config, name)}: must be at least 1")
    if config.compile and config.engine not in (None, "torch"):
        raise UserError(f"--compile is for torch: leave out --engine {config.engine}")
    if config.warmup < 0 or not config.model_names:
        raise UserError("warmup must be at least 0, and at least one model must be given")
    from benchmarks.timing import report

    require_writable(config.output)
    for what in config.what:
        if what == "latency":
            report(what, *time_models(config), config.output, FORMATS)
        elif what == "streaming":
            time_streaming(config)
        elif what == "engines":
            report(what, *time_engines(config), config.output, FORMATS)
        elif what == "roofline":
            report(what, *time_rooflines(config), config.output, FORMATS)
        elif what == "length":
            from benchmarks.clip_length import time_lengths

            time_lengths(
                _named_models(what, config),
                config.lengths,
                config.batch_size,
                config.num_classes,
                max(1, config.repeats // 3),
                config.device,
                config.precision,
                config.output,
            )
        else:
            report(f"{what}_speedup", *compare_variants(what, config), config.output, FORMATS)


if __name__ == "__main__":
    main()
