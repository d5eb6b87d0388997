"""What the benchmark scripts share: fair timing, tables, and what the numbers depend on."""

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
from utils.files import to_markdown, write_json, write_text

Call = Callable[[], Any]

CPU = torch.device("cpu")


def time_calls(call: Call, repeats: int, device: torch.device) -> np.ndarray:
    """Seconds of each call, `(repeats,)`; the device's queue is empty before and after each."""
    return np.array([_seconds(call, device) for _ in range(repeats)])


def interleave(
    calls: Mapping[str, Call],
    repeats: int,
    device: torch.device = CPU,
    warmup: int = 1,
    in_a_row: int = 1,
) -> dict[str, np.ndarray]:
    """Seconds of each call by name, `(repeats,)` each: all of them once, then all again, and so on.

    Whatever else the machine does then slows all alike, and their ratios mean something. Short
    calls are made `in_a_row` times each turn, and their mean is what counts for the turn.
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
    """`function(*arguments)` in a fresh process, since allocator and peak memory belong to one.

    Raises:
        MemoryError: the memory did not suffice: the process was killed for it, or was told so.
        Exception: whatever the function raises.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send_result, args=(sender, function, arguments))
    process.start()
    sender.close()
    try:
        result = receiver.recv()
    except EOFError:  # the process ended without an answer
        process.join()
        if process.exitcode == -signal.SIGKILL:  # by the kernel, where memory is short
            raise MemoryError("the process was killed: out of memory") from None
        raise RuntimeError(f"the process ended with code {process.exitcode}") from None
    process.join()
    if isinstance(result, Exception):
        raise MemoryError(str(result)) if is_out_of_memory(str(result)) else result
    return result


def _send_result(sender: Connection, function: Callable[..., Any], arguments: Sequence) -> None:
    keep_freed_memory()
    try:
        sender.send(function(*arguments))
    except Exception as error:  # the parent raises it
        sender.send(error)


def forget_peak_memory(device: torch.device) -> None:
    """Begin anew to watch for the most memory."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with contextlib.suppress(OSError):  # Linux alone can forget a process's peak
            Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: torch.device) -> float | None:
    """Most memory since `forget_peak_memory`, MB: of the GPU, or of this whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    with contextlib.suppress(OSError):
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e6
    return None


def random_clips(
    clips: int, n_frames: int, image_size: int, device: torch.device, channels: int = 3
) -> torch.Tensor:
    """A batch to time a model with: uint8 noise `(clips, n_frames, channels, image_size,
    image_size)`."""
    shape = (clips, n_frames, channels, image_size, image_size)
    return torch.randint(0, 256, shape, dtype=torch.uint8, device=device)


def published_speed(seconds: np.ndarray, batch_size: int) -> dict[str, float]:
    """The published columns, from the seconds of batches `(repeats,)`.

    Latency is a batch's mean time divided by its clips: throughput, not what one clip waits.
    """
    return {
        "Mean Batch Time (s)": float(seconds.mean()),
        "+- std (s)": float(seconds.std()),
        "Latency (ms/clip)": float(seconds.mean()) / batch_size * 1000,
    }


def conditions(device: torch.device, packages: Sequence[str] = (), **facts: Any) -> dict[str, Any]:
    """Everything that the numbers depend on besides the code."""
    return {
        "device": describe_device(device),
        **facts,
        "allocator": describe_allocator(),
        **{name: _version(name) for name in ("torch", "torchvision", "av", *packages)},
        "python": platform.python_version(),
        "system": platform.platform(),
        "command": " ".join(["python", *sys.argv]),
    }


def describe_allocator() -> str:
    """Which memory the C library keeps, for tables of measurements."""
    if keep_freed_memory():
        return "malloc keeps freed memory (allocator.py)"
    return f"the system's default ({SWITCH}={os.environ.get(SWITCH, '')})"


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def report(
    name: str,
    table: pd.DataFrame,
    facts: Mapping[str, Any],
    folder: str | Path,
    formats: Mapping[str, str] | None = None,
) -> None:
    """Print a table, write `name`.csv, .md and .json into a folder, and print one JSON line."""
    text = to_markdown(table, facts, formats)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    records = json.loads(table.to_json(orient="records", double_precision=9))
    result = {"conditions": dict(facts), "rows": records}
    write_text(folder / f"{name}.csv", table.to_csv(index=False))
    write_text(folder / f"{name}.md", text)
    write_json(folder / f"{name}.json", result)
    print(f"{text}\nsaved: {folder}/{name}.csv, .md, .json")
    print(json.dumps(result))
