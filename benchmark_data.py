"""How fast clips reach the model: decoding, the cache, augmentation, and training end to end.

    python benchmark_data.py                              all of it
    python benchmark_data.py --what decode --repeats 9
    python benchmark_data.py --what training --device cuda --model tsm

Each table compares ways to do the same thing, timed in turn in one run; times are medians. Peers
that are installed (pip install -r requirements-bench.txt) are timed too. The videos are rendered:
moving tissue-like texture with camera noise, H.264 with B-frames as x264 writes it by default.
"""

from dataclasses import dataclass
from typing import Literal


@dataclass
class BenchmarkConfig:
    """What to time, and how often."""

    what: tuple[Literal["decode", "cache", "augment", "training"], ...] = (
        "decode",
        "cache",
        "augment",
        "training",
    )
    """which tables"""
    repeats: int = 5
    """times that everything is timed"""
    model: Literal["tsm", "cnn_lstm", "r2plus1d", "vivit"] = "cnn_lstm"
    """training: which model"""
    batches: int = 6
    """training: batches in each repeat"""
    batch_size: int = 4
    """training: clips a batch"""
    workers: int = 2
    """training: processes that decode"""
    device: str = "cpu"
    """training: auto, cpu, cuda, cuda:1, mps"""
    output: str = "benchmarks"
    """folder for the tables"""
