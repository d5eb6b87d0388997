"""The choice of what computes a model on this machine: torch, OpenVINO or ONNX Runtime."""

import hashlib
import json
import os
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import nn

from config import EngineName
from deployment.files import FRAME
from deployment.graph import to_onnx, to_openvino, trace
from deployment.parity import TOLERANCE
from deployment.step import StepNames, make_step, trace_step
from modeling.engines import CLIPS, LOGITS, Engine, OnnxRuntimeEngine, OpenVINOEngine
from modeling.inference import pack_convolutions, prepare_for_inference
from utils.device import autocast_dtype, describe_device, get_device
from utils.errors import UserError, first_line
from utils.files import read_json, try_write, write_json

TRIAL_SECONDS = 10.0
"""of timed calls, after the networks are built"""

_MAX_ROUNDS = 50
_PACKAGES = {"torch": "torch", "openvino": "openvino", "onnxruntime": "onnxruntime"}
_NEEDED = {"torch": (), "openvino": ("openvino",), "onnxruntime": ("onnx", "onnxscript")}

Run = Callable[[], torch.Tensor]


def engine_device(
    engine: EngineName, device: str, precision: str
) -> tuple[torch.device, torch.dtype]:
    """The device and dtype that an engine computes on and in, from the names that scripts take.

    Raises:
        UserError: the engine cannot, or this machine has no such device.
    """
    if engine in ("openvino", "onnxruntime"):
        if device not in ("auto", "cpu"):
            raise UserError(f"--engine {engine} computes on the CPU: leave out --device {device}")
        if precision not in ("auto", "fp32"):
            raise UserError(
                f"--engine {engine} computes in fp32: leave out --precision {precision}"
            )
        device, precision = "cpu", "fp32"
    found = get_device(device)
    return found, autocast_dtype(precision, found)


def in_engine(
    model: nn.Module,
    engine: EngineName,
    n_frames: int,
    image_size: int,
    device: torch.device,
    dtype: torch.dtype,
    step: bool = False,
) -> tuple[nn.Module, EngineName]:
    """A trained model as the engine computes it, and which engine `auto` became: torch where the
    others do not compute, on a GPU or in another dtype than fp32.

    Args:
        engine: for torch the model is returned as it is.
        device, dtype: of `engine_device`.
        n_frames, image_size, step: see `build_engine`.
    """
    shape = n_frames, image_size, step
    if engine == "auto":
        cpu = device.type == "cpu" and dtype == torch.float32
        engine = fastest_engine(model, *shape) if cpu else "torch"
    return (model if engine == "torch" else build_engine(model, engine, *shape)), engine


def build_engine(
    model: nn.Module, engine: EngineName, n_frames: int, image_size: int, step: bool = False
) -> Engine:
    """A trained model in another engine, with as many threads as torch uses.

    Args:
        engine: `openvino` or `onnxruntime`.
        n_frames, image_size: T, and height and width of the frames in pixels.
        step: the network of one frame with its memory; see deployment/step.py.

    Raises:
        UserError: a package is missing, or the model cannot be converted.
    """
    memory: dict[str, tuple[int, ...]] = {}
    names: tuple = ()
    if step:
        program, memory = trace_step(model, n_frames, image_size)
        names = StepNames(len(memory)).inputs, StepNames(len(memory)).outputs
    else:
        program = trace(model, n_frames, image_size)
    threads = torch.get_num_threads()
    result: Engine
    if engine == "openvino":
        result = OpenVINOEngine(to_openvino(program, *names), threads)
    else:
        result = OnnxRuntimeEngine(to_onnx(program, *names), threads)
    result.memory = memory
    return result


def fastest_engine(
    model: nn.Module, n_frames: int, image_size: int, step: bool = False
) -> EngineName:
    """The engine that computes one clip of this model fastest on this CPU, from a trial.

    The trial calls the engines that are installed in turn, for ten seconds in all. An engine whose
    logits differ from torch's is not chosen. The result is kept in the user's cache folder, per
    machine, versions, number of threads and shape of the model. One line is printed.

    Args:
        model, n_frames, image_size, step: see `build_engine`; with `step`, one frame is computed.
    """
    path, key = _cache_file(), _key(model, n_frames, image_size, step)
    times = _read_times(path).get(key)
    source = f"kept in {path}"
    if times is None:
        installed = [name for name in _PACKAGES if all(map(find_spec, _NEEDED[name]))]
        installed = [name for name in installed if find_spec(_PACKAGES[name])]
        print(f"trial of {', '.join(installed)} ...", flush=True)
        runs = _prepare(model, installed, n_frames, image_size, step)
        times = _time(runs)
        everything = {**_read_times(path), key: times}
        problem = try_write(path, partial(_keep_times, everything=everything))
        source = f"not kept: {problem}" if problem else f"kept in {path}"
    best = min(times, key=times.__getitem__)
    listed = ", ".join(f"{name} {ms:.1f}" for name, ms in times.items())
    what = "frame" if step else "clip"
    print(f"engine {best}: the fastest of a trial (ms per {what}: {listed}; {source})", flush=True)
    return best


def _prepare(
    model: nn.Module, names: list[str], n_frames: int, image_size: int, step: bool
) -> dict[str, Run]:
    """A call that computes one clip or frame for each engine; those that compute wrong logits or
    cannot be built are left out, and a line says so."""
    shape = (1, n_frames, getattr(model, "channels", 3), image_size, image_size)
    clip = torch.randint(256, shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    runs: dict[str, Run] = {}
    for name in names:
        try:
            runs[name] = _call(model, name, n_frames, image_size, clip, step)
            difference = (runs[name]() - runs["torch"]()).abs().max().item()
        except Exception as error:  # a runtime has errors of its own
            if name == "torch":
                raise
            print(f"{name} is left out: {first_line(error)}", flush=True)
            runs.pop(name, None)
            continue
        if not difference <= TOLERANCE:
            print(f"{name} is left out: its logits differ by {difference:.1e}", flush=True)
            del runs[name]
    return runs


def _call(
    model: nn.Module, name: str, n_frames: int, image_size: int, clip: torch.Tensor, step: bool
) -> Run:
    if name != "torch":
        engine = build_engine(model, name, n_frames, image_size, step)
        inputs = {CLIPS: clip.numpy()}
        if step:
            zeros = {n: np.zeros((1, *s), np.float32) for n, s in engine.memory.items()}
            inputs = {FRAME: clip[:, 0].numpy(), **zeros}
        return lambda: torch.from_numpy(engine.compute(inputs)[LOGITS].copy())
    prepared = prepare_for_inference(model, torch.device("cpu"))
    if not step:
        return lambda: prepared(clip)
    pack_convolutions(prepared)
    network = make_step(prepared, n_frames)
    memory = network.empty_memory(image_size)
    return lambda: network(clip[:, 0], memory)[0]


@torch.inference_mode()
def _time(runs: dict[str, Run]) -> dict[str, float]:
    """Median milliseconds per call of each; in every round all are called in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    end = time.perf_counter() + TRIAL_SECONDS
    for number in range(_MAX_ROUNDS):
        for name, run in runs.items():
            began = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - began)
        if number and time.perf_counter() > end:
            break
    return {name: 1000 * float(np.median(values)) for name, values in seconds.items()}


def _cache_file() -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "surgical_clips" / "engines.json"


def _read_times(path: Path) -> dict[str, dict[str, float]]:
    """The times that are kept; none where there is no such file, or it is of something else."""
    try:
        kept = read_json(path, {str: {str: float}}) if path.exists() else {}
    except (UserError, OSError):
        return {}
    return {key: times for key, times in kept.items() if times and times.keys() <= _PACKAGES.keys()}


def _keep_times(path: Path, everything: dict[str, dict[str, float]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, everything)


def _key(model: nn.Module, n_frames: int, image_size: int, step: bool) -> str:
    """What the times depend on: this machine, the versions, and the shape of the model."""
    shapes = {name: list(value.shape) for name, value in model.state_dict().items()}
    text = json.dumps([repr(model), shapes, n_frames, image_size, step])
    versions = [f"{name} {_version(name)}" for name in _PACKAGES.values()]
    machine = describe_device(torch.device("cpu"))
    return f"{machine}; {'; '.join(versions)}; {hashlib.sha256(text.encode()).hexdigest()[:16]}"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
