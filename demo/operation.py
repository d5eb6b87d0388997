"""Renders a whole operation of demo clips, whose true segments are known.

    python -m demo.operation operation.mp4                  ten minutes; also writes operation.csv
    python -m demo.operation short.mp4 --minutes 1 --seed 3

The operation shows one patient who is not in the demo data. One action follows the other, and each
consists of several clips of 1.2 s. `operation.csv` holds the true segments: `start,end,label`, in
seconds.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from tqdm import tqdm

from demo.data import CLIPS_PER_PATIENT, Clip, render
from demo.scene import FRAMES
from timeline.segments import Segment
from utils.cli import cli_main, parse
from utils.errors import UserError
from utils.tables import write_csv
from video.encoder import write_video

FPS = 25

PATIENT = 1000  # the patients of the demo data have multiples of 7 as numbers

SEGMENT_CLIPS = (3, 12)  # smallest and largest number of clips of a segment


def plan_operation(minutes: float, seed: int = 0) -> list[list[Clip]]:
    """The clips of each segment. Together they last `minutes`, to the nearest clip, at least one.

    The probability of an action is proportional to its frequency in the demo data, but no action
    follows itself. The last segment ends when the time is over.
    """
    rng = np.random.default_rng(seed)
    actions = list(CLIPS_PER_PATIENT)
    remaining = max(1, round(minutes * 60 * FPS / FRAMES))
    plan: list[list[Clip]] = []
    while remaining:
        weights = np.array([*CLIPS_PER_PATIENT.values()], float)
        if plan:
            weights[actions.index(plan[-1][0].action)] = 0
        action = actions[rng.choice(len(actions), p=weights / weights.sum())]
        length = min(remaining, int(rng.integers(*SEGMENT_CLIPS, endpoint=True)))
        number = len(plan) + 1
        plan.append([Clip("", PATIENT, 1, number, part + 1, action) for part in range(length)])
        remaining -= length
    return plan


def true_segments(plan: list[list[Clip]]) -> list[Segment]:
    """The segments of a plan; they cover the video without a gap."""
    ends = np.cumsum([len(clips) for clips in plan]) * FRAMES / FPS
    starts = [0.0, *ends[:-1].tolist()]
    return [
        Segment(start, end, clips[0].action)
        for start, end, clips in zip(starts, ends.tolist(), plan, strict=True)
    ]


def render_operation(plan: list[list[Clip]], seed: int = 0) -> Iterator[np.ndarray]:
    """The frames of a plan, `(96, 128, 3)` uint8 each, each rendered when it is needed."""
    clips = [clip for segment in plan for clip in segment]
    for clip in tqdm(clips, "rendering", unit="clip", leave=False):
        yield from render(clip, seed)


@dataclass
class OperationConfig:
    """What to render, and where to write it."""

    video: tyro.conf.Positional[Path]
    """video file to write, .mp4; the true segments are written next to it, to .csv"""
    minutes: float = 10.0
    """duration in minutes, to the nearest clip"""
    seed: int = 0
    """random seed of the patient and the actions"""


@cli_main
def main() -> None:
    config = parse(OperationConfig, __doc__)
    if not 0 < config.minutes < math.inf or config.seed < 0:
        raise UserError("minutes must be more than 0, and seed at least 0")
    csv_path = config.video.with_suffix(".csv")
    if config.video.suffix != ".mp4":
        raise UserError(f"{config.video}: the name of the video must end in .mp4")
    for path in (config.video, csv_path):
        if path.exists():
            raise UserError(f"{path} exists already: move it away, or choose another name")
    config.video.parent.mkdir(parents=True, exist_ok=True)
    plan = plan_operation(config.minutes, config.seed)
    segments = true_segments(plan)
    write_video(config.video, render_operation(plan, config.seed), FPS)
    rows = [(f"{s.start:.3f}", f"{s.end:.3f}", s.label) for s in segments]
    write_csv(csv_path, [("start", "end", "label"), *rows])
    duration, count = segments[-1].end, len(segments)
    print(f"{config.video}: {duration:.1f} s, {count} segments, which {csv_path} lists")


if __name__ == "__main__":
    main()
