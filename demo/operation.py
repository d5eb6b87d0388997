"""A whole operation of demo clips, of which the truth is known.

    python -m demo.operation operation.mp4                  ten minutes, and operation.csv beside it
    python -m demo.operation short.mp4 --minutes 1 --seed 3

It shows one patient whom no clip of the demo data shows, in one action after the other, each of
several clips of 1.2 s. `operation.csv` is the truth: `start,end,label`, in seconds.
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
from utils.cli import script
from utils.errors import UserError
from utils.files import write_text
from video.encoder import write_video

RATE = 25  # frames a second

PATIENT = 1000  # the demo data's patients have multiples of 7

CLIPS = (3, 12)  # the least and the most that an action lasts


def plan_operation(minutes: float, seed: int = 0) -> list[list[Clip]]:
    """The clips of each segment; together as many as come closest to so many minutes, at least one.

    An action is as likely as it is frequent in the demo data, but never follows itself. The last
    segment is cut where the time is up.
    """
    rng = np.random.default_rng(seed)
    actions = list(CLIPS_PER_PATIENT)
    left = max(1, round(minutes * 60 * RATE / FRAMES))
    plan: list[list[Clip]] = []
    while left:
        weights = np.array([*CLIPS_PER_PATIENT.values()], float)
        if plan:
            weights[actions.index(plan[-1][0].action)] = 0
        action = actions[rng.choice(len(actions), p=weights / weights.sum())]
        length = min(left, int(rng.integers(CLIPS[0], CLIPS[1], endpoint=True)))
        number = len(plan) + 1
        plan.append([Clip("", PATIENT, 1, number, part + 1, action) for part in range(length)])
        left -= length
    return plan


def true_segments(plan: list[list[Clip]]) -> list[Segment]:
    """The truth of a plan; it covers the video without a gap."""
    ends = np.cumsum([len(clips) for clips in plan]) * FRAMES / RATE
    starts = [0.0, *ends[:-1].tolist()]
    return [
        Segment(start, end, clips[0].action)
        for start, end, clips in zip(starts, ends.tolist(), plan, strict=True)
    ]


def render_operation(plan: list[list[Clip]], seed: int = 0) -> Iterator[np.ndarray]:
    """The frames of a plan, `(96, 128, 3)` uint8 each, drawn as they are asked for."""
    clips = [clip for segment in plan for clip in segment]
    for clip in tqdm(clips, "rendering", unit="clip", leave=False):
        yield from render(clip, seed)


@dataclass
class OperationConfig:
    """What to render, and where."""

    video: tyro.conf.Positional[Path]
    """the file to write, .mp4; the truth goes beside it, into .csv"""
    minutes: float = 10.0
    """how long it lasts, to the nearest clip"""
    seed: int = 0
    """another one gives another patient and other actions"""


@script
def main() -> None:
    config = tyro.cli(OperationConfig, description=__doc__)
    if not 0 < config.minutes < math.inf or config.seed < 0:
        raise UserError("minutes must be more than 0, seed at least 0")
    truth = config.video.with_suffix(".csv")
    if config.video.suffix != ".mp4":
        raise UserError(f"{config.video}: the video's name must end in .mp4")
    for path in (config.video, truth):
        if path.exists():
            raise UserError(f"{path}: is there already (move it away, or choose another name)")
    config.video.parent.mkdir(parents=True, exist_ok=True)
    plan = plan_operation(config.minutes, config.seed)
    segments = true_segments(plan)
    write_video(config.video, render_operation(plan, config.seed), RATE)
    rows = [f"{one.start:.3f},{one.end:.3f},{one.label}" for one in segments]
    write_text(truth, "\n".join(["start,end,label", *rows]) + "\n")
    print(f"{config.video}: {segments[-1].end:.1f} s, {len(segments)} segments, truth in {truth}")


if __name__ == "__main__":
    main()
