"""Engines side by side: eager and prepared PyTorch, OpenVINO, ONNX Runtime, int8; see
benchmark_latency.py."""

import platform
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from benchmarks.timing import interleave, random_clips
from config import TrainConfig
from deployment.graph import to_openvino, trace
from deployment.quantization import TOKEN_MODELS, has_vnni, quantize
from deployment.runtime import build_engine
from deployment.step import ClipsByStep, StepNames, trace_step
from modeling.engines import OpenVINOEngine
from modeling.inference import prepare_for_inference
from models import build_model

Run = Callable[[torch.Tensor], torch.Tensor]

CALIBRATION_CLIPS = 4  # of noise: enough for the speed of int8, which does not depend on the scales
_INSTRUCTIONS = ("avx2", "avx512f", "avx_vnni", "avx512_vnni", "avx512_bf16", "amx_int8")


def compare_engines(
    models: Sequence[tuple[str, int]], batch_sizes: Sequence[int], n_frames: int, rounds: int
) -> pd.DataFrame:
    """A row per model, batch size and engine: all engines of a model take turns in one process.

    Random weights; int8 is calibrated on noise, so that only its speed means anything.

    Args:
        models: name and image size of each model.
        rounds: timed calls of each; the table has their medians.
    """
    rows = []
    for name, size in tqdm(models, "engines", unit="model", leave=False):
        torch.manual_seed(0)
        model = build_model(TrainConfig(model_name=name, n_frames=n_frames, image_size=size), 7)
        runs = _build(name, model.eval(), n_frames, size)
        for batch_size in batch_sizes:
            clips = random_clips(batch_size, n_frames, size, torch.device("cpu"))
            with torch.inference_mode():
                logits = {way: run(clips) for way, run in runs.items()}
                calls = {way: partial(run, clips) for way, run in runs.items()}
                seconds = interleave(calls, rounds)
            medians = {way: np.median(values) for way, values in seconds.items()}
            for way in runs:
                rows.append(
                    {
                        "model": f"{name}, {size} px",
                        "batch": batch_size,
                        "engine": way,
                        "ms/clip": 1000 * medians[way] / batch_size,
                        "x eager": medians["eager"] / medians[way],
                        "x prepared": medians["prepared"] / medians[way],
                        "largest logit difference": _difference(logits[way], logits["eager"]),
                        "n": rounds,
                    }
                )
    return pd.DataFrame(rows)


def _build(name: str, model: torch.nn.Module, n_frames: int, size: int) -> dict[str, Run]:
    """What computes the model: a function of clips per engine that is installed."""
    runs: dict[str, Run] = {"eager": model}
    runs["prepared"] = prepare_for_inference(model, torch.device("cpu"))
    if find_spec("openvino"):
        runs["openvino"] = build_engine(model, "openvino", n_frames, size)
    if find_spec("onnxruntime") and find_spec("onnxscript"):
        runs["onnxruntime"] = build_engine(model, "onnxruntime", n_frames, size)
    if find_spec("nncf"):
        noise = random_clips(CALIBRATION_CLIPS, n_frames, size, torch.device("cpu")).numpy()
        graph = to_openvino(trace(model, n_frames, size))
        int8 = quantize(graph, [clip[None] for clip in noise], name in TOKEN_MODELS, has_vnni())
        runs["openvino int8"] = OpenVINOEngine(int8, torch.get_num_threads())
    return runs


def int8_step(model: torch.nn.Module, n_frames: int, size: int) -> OpenVINOEngine:
    """The network of one frame of a model in int8, calibrated on noise."""
    program, memory = trace_step(model, n_frames, size)
    names = StepNames(len(memory))
    graph = to_openvino(program, names.inputs, names.outputs)
    threads = torch.get_num_threads()
    fp32 = OpenVINOEngine(graph, threads)
    fp32.memory = memory
    noise = random_clips(CALIBRATION_CLIPS, n_frames, size, torch.device("cpu"))
    samples = [inputs for clip in noise for inputs in ClipsByStep(fp32).inputs(clip)]
    int8 = OpenVINOEngine(quantize(graph, samples, False, has_vnni()), threads)
    int8.memory = memory
    return int8


def _difference(logits: torch.Tensor, reference: torch.Tensor) -> str:
    return f"{(logits - reference).abs().max().item():.1e}"


def instruction_sets() -> str:
    """Which of the instructions that decide about speed this CPU has."""
    try:
        flags = set(Path("/proc/cpuinfo").read_text(encoding="utf-8").split())
    except OSError:  # only Linux has this file
        return f"{platform.machine()}, not known"
    return ", ".join(name for name in _INSTRUCTIONS if name in flags) or "none of AVX2 and later"
