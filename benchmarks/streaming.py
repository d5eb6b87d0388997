"""Compares streaming with whole windows, and times live prediction; see benchmark_latency.py."""

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

from benchmarks.engines import int8_step
from benchmarks.timing import interleave, random_clips
from benchmarks.videos import write_benchmark_video
from deployment.runtime import build_engine
from modeling.inference import pack_convolutions, prepare_for_inference
from models import MODELS
from timeline.prefetch import Prefetcher
from timeline.sources import FileSource, Frame
from timeline.streaming import EngineStreamer, Streamer, to_probabilities

INT8 = "openvino int8"

Way = tuple[str, str]
"""a model by name, and what computes it"""

OneVideo = Streamer | EngineStreamer

STREAMED = {"tsm_resnet": {"shift_mode": "causal"}, "cnnlstm": {}}
"""the models that can be streamed, and their options for it"""


def compare_streaming(
    names: Sequence[str],
    n_frames: int,
    image_size: int,
    repeats: int,
    device: torch.device,
    dtype: torch.dtype,
) -> pd.DataFrame:
    """Time a prediction at every frame: one step of the stream, or the whole window again.

    All take turns: see `benchmarks.timing.interleave`. Only the models are timed,
    from frames in the memory of the device.
    """
    calls = {}
    window = random_clips(1, n_frames, image_size, device)
    for name in names:
        model = _build(name)
        prepared = prepare_for_inference(model, device, dtype)
        pack_convolutions(prepared)  # as a Streamer does
        streamer = Streamer(model, n_frames, device=device, dtype=dtype)
        for _ in range(n_frames):
            streamer.step(window[:, 0])  # the window is full from the first timed call on
        calls[f"{name} window"] = lambda model=prepared: _predict(model, window)
        calls[f"{name} stream"] = lambda streamer=streamer: streamer.step(window[:, 0])
    seconds = interleave(calls, repeats, device, in_a_row=3)
    rows = []
    for name in names:
        window_ms, stream_ms = (1000 * seconds[f"{name} {kind}"] for kind in ("window", "stream"))
        low, ratio, high = np.percentile(window_ms / stream_ms, (25, 50, 75))
        rows.append(
            {
                "Model": name,
                "Whole window (ms/frame)": np.median(window_ms),
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
    engines: Sequence[str] = ("torch",),
) -> pd.DataFrame:
    """Time every frame of a 1280 x 720 H.264 video from its packets to the prediction.

    The times per frame are those of one thread; the models take turns, one second of video each.
    The last throughput is that with a second thread that decodes.

    Args:
        frames: number of frames of the video.
        source: video whose frames are used (empty: a rendered scene).
        engines: what computes the models: torch, openvino, onnxruntime, or `INT8`.
    """
    ways = [(name, engine) for name in names for engine in engines]
    with tempfile.TemporaryDirectory() as folder:
        video = Path(folder) / "live.mp4"
        write_benchmark_video(video, 720, frames, group=50, source=source)

        def start(way: Way) -> tuple[OneVideo, FileSource]:
            name, engine = way
            streamer: OneVideo = Streamer(_build(name), n_frames, device=device, dtype=dtype)
            if engine == INT8:
                streamer = EngineStreamer(int8_step(_build(name), n_frames, image_size))
            elif engine != "torch":
                step = build_engine(_build(name), engine, n_frames, image_size, step=True)
                streamer = EngineStreamer(step)
            return streamer, FileSource(video, 1000.0, image_size)  # 1000 fps: every frame

        runs = {way: _time_frames(*start(way)) for way in ways}
        seconds: dict[Way, list[float]] = {way: [] for way in ways}
        memory: dict[Way, list[float]] = {way: [] for way in ways}
        while any(len(times) < frames for times in seconds.values()):
            for way, times in runs.items():
                seconds[way] += itertools.islice(times, 25)
                memory[way].append(_resident_memory())
        prefetched = {way: _prefetched_fps(*start(way)) for way in ways}
    rows = []
    for name, engine in ways:
        way = name, engine
        milliseconds = 1000 * np.array(seconds[way][n_frames:])  # from the first full window on
        p50, p99 = np.percentile(milliseconds, (50, 99))
        rows.append(
            {
                "Model": name,
                "Engine": engine,
                "p50 (ms/frame)": p50,
                "p99 (ms/frame)": p99,
                "Frames per second": 1000 / milliseconds.mean(),
                "With prefetch (frames per second)": prefetched[way],
                "Frames": len(milliseconds),
                "Memory after a quarter (MB)": memory[way][len(memory[way]) // 4],
                "Memory at the end (MB)": memory[way][-1],
            }
        )
    return pd.DataFrame(rows)


def _time_frames(streamer: OneVideo, source: FileSource) -> Iterator[float]:
    """Yield the seconds from asking for each frame to its prediction."""
    frames = iter(source)
    while True:
        began = time.perf_counter()
        frame = next(frames, None)
        if frame is None:
            return
        _step(streamer, frame)
        yield time.perf_counter() - began


def _prefetched_fps(streamer: OneVideo, source: FileSource) -> float:
    """Frames per second with a thread that decodes, as in predict.py."""
    began, count = time.perf_counter(), 0
    with Prefetcher(source) as prefetcher:
        while (frames := prefetcher.get(1)) is not None:
            for frame in frames:
                _step(streamer, frame)
                count += 1
    return count / (time.perf_counter() - began)


def _step(streamer: OneVideo, frame: Frame) -> None:
    image = torch.from_numpy(frame.image).permute(2, 0, 1)  # (H, W, C) -> (C, H, W)
    streamer.step(image[None])


def _build(name: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name](7, **STREAMED[name]).eval()


@torch.inference_mode()
def _predict(model: nn.Module, window: torch.Tensor) -> torch.Tensor:
    return to_probabilities(model(window), temperature=1.0)


def _resident_memory() -> float:
    """Memory of this process in MB; NaN where the system does not report it."""
    with contextlib.suppress(OSError):
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmRSS:")[1].split()[0]) * 1024 / 1e6
    return float("nan")
