"""Timing, memory and tables of the benchmarks, with the conditions of each measurement."""

import contextlib
import json
import multiprocessing
import os
import platform
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from utils.allocator import SWITCH, keep_freed_memory
from utils.device import describe_device
from utils.errors import is_out_of_memory
from utils.files import to_markdown, write_all, write_json, write_text
from utils.tables import write_table

Call = Callable[[], Any]

CPU = torch.device("cpu")


def time_calls(call: Call, repeats: int, device: torch.device) -> np.ndarray:
    """Seconds of each call, `(repeats,)`; before and after each, the device finishes its work."""
    return np.array([_seconds(call, device) for _ in range(repeats)])


def interleave(
    calls: Mapping[str, Call],
    repeats: int,
    device: torch.device = CPU,
    warmup: int = 1,
    in_a_row: int = 1,
) -> dict[str, np.ndarray]:
    """Seconds of each call by name, `(repeats,)` each. In every round all calls are made in turn.

    Other programs on the machine then slow all calls down alike, which keeps their ratios
    meaningful.

    Args:
        warmup: calls of each before anything is timed.
        in_a_row: calls per turn, of which the mean is taken; above 1 for short calls.
    """
    for call in calls.values():
        for _ in range(warmup):
            call()
    rounds = [
        {name: time_calls(call, in_a_row, device).mean() for name, call in calls.items()}
        for _ in range(repeats)
    ]
    return {name: np.array([seconds[name] for seconds in rounds]) for name in calls}


def _seconds(call: Call, device: torch.device) -> float:
    _synchronize(device)
    began = time.perf_counter()
    call()
    _synchronize(device)
    return time.perf_counter() - began


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def run_isolated(function: Callable[..., Any], *arguments: Any) -> Any:
    """`function(*arguments)` in a new process, which has its own allocator and peak memory.

    Raises:
        MemoryError: there was not enough memory, or the process was killed for that reason.
        Exception: any error that the function raises.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send_result, args=(sender, function, arguments))
    process.start()
    sender.close()
    try:
        result = receiver.recv()
    except EOFError:  # the process ended without a result
        process.join()
        if process.exitcode == -signal.SIGKILL:  # by the kernel, where memory is short
            raise MemoryError("the process was killed: out of memory") from None
        raise RuntimeError(f"the process ended with code {process.exitcode}") from None
    process.join()
    if isinstance(result, Exception):
        raise MemoryError(str(result)) if is_out_of_memory(result) else result
    return result


def _send_result(sender: Connection, function: Callable[..., Any], arguments: Sequence) -> None:
    keep_freed_memory()
    try:
        sender.send(function(*arguments))
    except Exception as error:  # the parent raises it
        sender.send(error)


def reset_peak_memory(device: torch.device) -> None:
    """Forget the peak memory so far."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with contextlib.suppress(OSError):  # only Linux can reset the peak of a process
            Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: torch.device) -> float | None:
    """Peak memory since `reset_peak_memory` in MB: of the GPU, or of this whole process.

    Returns:
        None where the system does not report it.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    with contextlib.suppress(OSError):
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e6
    return None


def random_clips(
    batch_size: int, n_frames: int, image_size: int, device: torch.device, channels: int = 3
) -> torch.Tensor:
    """A batch of uint8 noise, `(batch_size, n_frames, channels, image_size, image_size)`."""
    shape = (batch_size, n_frames, channels, image_size, image_size)
    return torch.randint(0, 256, shape, dtype=torch.uint8, device=device)


def throughput_columns(seconds: np.ndarray, batch_size: int) -> dict[str, float]:
    """The published columns, from the seconds per batch, `(repeats,)`.

    The latency is the mean time of a batch divided by its number of clips. It measures throughput,
    not how long the prediction for a single clip takes.
    """
    return {
        "Mean Batch Time (s)": float(seconds.mean()),
        "+- std (s)": float(seconds.std()),
        "Latency (ms/clip)": float(seconds.mean()) / batch_size * 1000,
    }


def environment(
    device: torch.device, packages: Sequence[str] = (), **conditions: Any
) -> dict[str, Any]:
    """The conditions of a measurement: hardware, versions of packages, command.

    Args:
        packages: further packages whose versions are listed.
        conditions: further conditions, such as the batch size.
    """
    return {
        "device": describe_device(device),
        **conditions,
        "allocator": describe_allocator(),
        **{name: _version(name) for name in ("torch", "torchvision", "av", *packages)},
        "python": platform.python_version(),
        "system": platform.platform(),
        "command": " ".join(["python", *sys.argv]),
    }


def describe_allocator() -> str:
    """Whether the C library keeps freed memory, for tables of measurements."""
    if keep_freed_memory():
        return "malloc keeps freed memory (utils/allocator.py)"
    return f"the system's default ({SWITCH}={os.environ.get(SWITCH, '')})"


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def report(
    name: str,
    table: pd.DataFrame,
    conditions: Mapping[str, Any],
    folder: str | Path,
    formats: Mapping[str, str] | None = None,
) -> None:
    """Print a table, write `name`.csv, .md and .json into a folder, and print the JSON in one line.

    Args:
        conditions: output of `environment`.
        formats: see `utils.files.to_markdown`.
    """
    text = to_markdown(table, conditions, formats)
    folder = Path(folder)
    records = json.loads(table.to_json(orient="records", double_precision=9))
    result = {"conditions": dict(conditions), "rows": records}
    print(f"{text}\nfiles: {folder}/{name}.csv, .md, .json")
    print(json.dumps(result))
    folder.mkdir(parents=True, exist_ok=True)
    write_all(
        {
            folder / f"{name}.csv": lambda path: write_table(path, table),
            folder / f"{name}.md": lambda path: write_text(path, text),
            folder / f"{name}.json": lambda path: write_json(path, result),
        }
    )
