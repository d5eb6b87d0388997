"""What the benchmark scripts share: fair timing, tables, and what the numbers depend on."""

import contextlib
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from allocator import SWITCH, keep_freed_memory
from atomic import write_text
from device import describe_device
from run_folder import write_json

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


def to_markdown(
    table: pd.DataFrame, facts: Mapping[str, Any], formats: Mapping[str, str] | None = None
) -> str:
    """A table and its conditions as Markdown; numbers have two digits unless `formats` says so."""
    rows = [
        [_cell(row[name], (formats or {}).get(name, "{:.2f}")) for name in table.columns]
        for row in table.to_dict(orient="records")
    ]
    lines = [list(table.columns), ["---"] * len(table.columns), *rows]
    text = "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
    said = "; ".join(f"{name}: {value}" for name, value in facts.items())
    return f"{text}\n\n{said}\n"


def _cell(value: Any, pattern: str) -> str:
    if isinstance(value, str):
        return value.replace("\\", "\\\\").replace("|", "\\|")
    if value is None or np.isnan(value):
        return "-"
    return pattern.format(value)


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
