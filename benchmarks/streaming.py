"""What streaming saves, and whether it keeps up with a camera; see benchmark_latency.py."""

import contextlib
import itertools
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import nn

from benchmarks.timing import interleave, random_clips
from benchmarks.videos import write_benchmark_video
from modeling.inference import pack_convolutions, prepare_for_inference
from models import build_model
from timeline.prefetch import ReadAhead
from timeline.sources import FileSource, Picture
from timeline.streaming import Streamer

STREAMED = {"tsm": {"shift_mode": "causal"}, "cnn_lstm": {}}
"""the models that can be streamed, and what they must be built with"""


def compare_streaming(
    names: Sequence[str],
    n_frames: int,
    image_size: int,
    repeats: int,
    device: torch.device,
    dtype: torch.dtype,
) -> pd.DataFrame:
    """An answer at every frame: a step of the stream against the whole window anew.

    All four take turns: see `benchmarking.interleave`. Models only, from frames in the device's
    memory.
    """
    calls = {}
    window = random_clips(1, n_frames, image_size, device)
    for name in names:
        model = _model(name)
        whole = prepare_for_inference(model, device, dtype)
        pack_convolutions(whole)  # as a Streamer does
        streamer = Streamer(model, n_frames, device=device, dtype=dtype)
        for _ in range(n_frames):
            streamer.push(window[:, 0])  # full from the first timed call on
        calls[f"{name} window"] = lambda whole=whole: _answer(whole, window)
        calls[f"{name} stream"] = lambda streamer=streamer: streamer.push(window[:, 0])
    seconds = interleave(calls, repeats, device, in_a_row=3)
    rows = []
    for name in names:
        window_ms, stream_ms = (1000 * seconds[f"{name} {way}"] for way in ("window", "stream"))
        low, ratio, high = np.percentile(window_ms / stream_ms, (25, 50, 75))
        rows.append(
            {
                "Model": name,
                "Window anew (ms/frame)": np.median(window_ms),
                "Stream (ms/frame)": np.median(stream_ms),
                "Times faster": ratio,
                "Quartiles": f"{low:.1f} to {high:.1f}",
            }
        )
    return pd.DataFrame(rows)


def measure_live(
    names: Sequence[str],
    n_frames: int,
    image_size: int,
    frames: int,
    device: torch.device,
    dtype: torch.dtype,
    source: str = "",
) -> pd.DataFrame:
    """Every frame of a 1280 x 720 H.264 video from its packets to the answer, in one thread; and
    how many a second with the decoding in a thread of its own.

    The models take turns, a second of video each.

    Args:
        source: a video whose pictures are used; empty: a rendered scene.
    """
    with tempfile.TemporaryDirectory() as folder:
        video = Path(folder) / "live.mp4"
        write_benchmark_video(video, 720, frames, group=50, source=source)

        def start(name: str) -> tuple[Streamer, FileSource]:
            streamer = Streamer(_model(name), n_frames, device=device, dtype=dtype)
            return streamer, FileSource(video, 1000.0, image_size)  # every frame

        clocks = {name: _live(*start(name)) for name in names}
        seconds: dict[str, list[float]] = {name: [] for name in names}
        memory: dict[str, list[float]] = {name: [] for name in names}
        while any(len(taken) < frames for taken in seconds.values()):
            for name, clock in clocks.items():
                seconds[name] += itertools.islice(clock, 25)
                memory[name].append(_resident_memory())
        ahead = {name: _ahead(*start(name)) for name in names}
    rows = []
    for name in names:
        taken = 1000 * np.array(seconds[name][n_frames:])  # without the first ones, while it fills
        p50, p99 = np.percentile(taken, (50, 99))
        rows.append(
            {
                "Model": name,
                "p50 (ms/frame)": p50,
                "p99 (ms/frame)": p99,
                "Frames a second": 1000 / taken.mean(),
                "Decoding ahead (frames a second)": ahead[name],
                "Frames": len(taken),
                "Memory after a quarter (MB)": memory[name][len(memory[name]) // 4],
                "Memory at the end (MB)": memory[name][-1],
            }
        )
    return pd.DataFrame(rows)


def _live(streamer: Streamer, source: FileSource) -> Iterator[float]:
    """Seconds from asking for the next frame to its answer."""
    pictures = iter(source)
    while True:
        began = time.perf_counter()
        picture = next(pictures, None)
        if picture is None:
            return
        _push(streamer, picture)
        yield time.perf_counter() - began


def _ahead(streamer: Streamer, source: FileSource) -> float:
    """Frames a second with the decoding in a thread of its own, as predict.py has it."""
    began, count = time.perf_counter(), 0
    with ReadAhead(source) as ahead:
        while pictures := ahead.take(1):
            _push(streamer, pictures[0])
            count += 1
    return count / (time.perf_counter() - began)


def _push(streamer: Streamer, picture: Picture) -> None:
    frame = torch.from_numpy(picture.image).permute(2, 0, 1)  # (H, W, C) -> (C, H, W)
    streamer.push(frame[None])


def _model(name: str) -> nn.Module:
    torch.manual_seed(0)
    return build_model(name, 7, **STREAMED[name]).eval()


@torch.inference_mode()
def _answer(model: nn.Module, window: torch.Tensor) -> torch.Tensor:
    return model(window).cpu().double().softmax(dim=-1)


def _resident_memory() -> float:
    """Of this process, MB; nan where the system does not say."""
    with contextlib.suppress(OSError):
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmRSS:")[1].split()[0]) * 1024 / 1e6
    return float("nan")
