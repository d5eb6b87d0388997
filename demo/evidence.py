"""The planted evidence: demo clips that tell when and where their action is, to test explanations.

    python -m demo.evidence data/evidence           evidence in three frames and one quadrant
    python -m demo.evidence data/mark --mark        no evidence, but a mark that betrays the class

The action is planted: it appears in three neighbouring ones of the T frames that a model samples,
in one quadrant of the picture, and the table `evidence.csv` says in which. Clips with the same
number show the same patient, tissue, camera, instrument and light, interval, quadrant and position,
and differ only in the kind of the evidence: a puff of smoke (HookCut), a pool of dark blood
(Suction), open jaws of steel (UseClipper), a ring of thread (Suturing). So interval and quadrant
say nothing about the class, and a model that is right has looked there.

With `--mark` there is no action. A small coloured mark in the corner, such as a logo, is all that
tells the class: a model that is right has learned a shortcut.

The folder has the layout of the demo data; a clip has 2 T frames at 25 frames per second, so that
T equal segments hold two frames each, and random sampling meets the evidence as uniform sampling
does.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from demo.data import Clip, render_folder
from demo.scene import (
    HEIGHT,
    WIDTH,
    Patient,
    View,
    add_noise,
    blend,
    colour,
    draw_frame,
    make_patient,
    make_tissue,
    stroke,
)
from utils.errors import UserError

VERSION = 1  # raise it when the pixels change: older renderings are then replaced

MARKER = "evidence.json"  # the file that a complete folder holds

PATIENTS = {"train": 12, "val": 4, "test": 6}

CLIPS_PER_CLASS = {"train": 72, "val": 24, "test": 24}

CLASSES = ("UseClipper", "HookCut", "Suturing", "Suction")

QUADRANTS = ("top left", "top right", "bottom left", "bottom right")

SAMPLED_FRAMES = 3
"""number of the T sampled frames that show the evidence"""

FRAMES_PER_SAMPLE = 2
"""frames of the clip per sampled frame"""

RADIUS = 17.0
"""largest distance of the evidence from its centre, in pixels"""

# The corner that the mark fills, less than 8 % of the height and of the width, and its colours.
_MARK = (slice(1, 7), slice(2, 10))
_MARK_COLOURS = {
    "UseClipper": (235, 235, 235),
    "HookCut": (235, 205, 30),
    "Suturing": (40, 200, 70),
    "Suction": (60, 110, 240),
}


@dataclass(frozen=True)
class EvidenceClip(Clip):
    """One clip to render: its scene, and the evidence in it."""

    n_frames: int
    """number of frames that a model samples, T"""
    first_frame: int
    """the first of the sampled frames with evidence, from 0"""
    quadrant: str
    mark: bool
    """whether a mark in the corner replaces the evidence"""

    def render(self, seed: int) -> np.ndarray:
        """The frames, `(2 T, 96, 128, 3)` uint8; the same on every call."""
        return render(self, seed)

    @property
    def last_frame(self) -> int:
        """The last of the sampled frames with evidence."""
        return self.first_frame + SAMPLED_FRAMES - 1


def render_evidence(
    root: Path,
    patients: dict[str, int] | None = None,
    clips_per_class: dict[str, int] | None = None,
    seed: int = 0,
    n_frames: int = 8,
    num_workers: int | None = None,
    mark: bool = False,
) -> Path:
    """Render the planted evidence into `root`, unless it is there already.

    `evidence.csv` holds the truth of all clips: `path` as in the manifests, `first_frame` and
    `last_frame` (of the sampled frames, from 0), `quadrant`. With a mark there is no such table.

    Args:
        patients: number of patients in train, val and test.
        clips_per_class: number of clips of each class in train, val and test; with a multiple of
            4 (T - 2), every pair of interval and quadrant is equally frequent.
        n_frames: number of frames that a model samples of a clip, T.
        num_workers: number of processes that render (None: one per core, at most 8).
        mark: betray the class by a mark in the corner and show no evidence.

    Returns:
        The absolute path.

    Raises:
        UserError: `n_frames` is too small; or see `demo.data.render_folder`.
    """
    if n_frames < SAMPLED_FRAMES:
        raise UserError(f"n_frames must be at least {SAMPLED_FRAMES}, not {n_frames}")
    settings = {
        "version": VERSION,
        "seed": seed,
        "patients": patients or PATIENTS,
        "clips_per_class": clips_per_class or CLIPS_PER_CLASS,
        "n_frames": n_frames,
        "mark": mark,
    }
    clips = list(
        plan_clips(settings["patients"], settings["clips_per_class"], seed, n_frames, mark)
    )
    rows = [(clip.path, clip.first_frame, clip.last_frame, clip.quadrant) for clip in clips]
    truth = [("path", "first_frame", "last_frame", "quadrant"), *rows]
    tables = {} if mark else {"evidence.csv": truth}
    return render_folder(root, MARKER, settings, clips, tables, num_workers)


def plan_clips(
    patients: dict[str, int],
    clips_per_class: dict[str, int],
    seed: int = 0,
    n_frames: int = 8,
    mark: bool = False,
) -> Iterator[EvidenceClip]:
    """All clips of the data set: one of each class for each interval and quadrant drawn."""
    cells = [
        (first, quadrant)
        for first in range(n_frames - SAMPLED_FRAMES + 1)
        for quadrant in QUADRANTS
    ]
    before = 0  # patients of the splits before this one
    for split, count in patients.items():
        order: list[int] = []
        for index in range(clips_per_class[split]):
            # All cells come once, in a random order, before any comes again.
            if not order:
                order = (
                    np.random.default_rng([seed, before, index]).permutation(len(cells)).tolist()
                )
            first, quadrant = cells[order.pop()]
            patient = 7 * (before + index % count + 1)  # as in SLAM, not numbered 1, 2, 3
            number = 1 + index // count
            for action in CLASSES:
                video = 1 + number % 2
                yield EvidenceClip(
                    split, patient, video, number, 1, action, n_frames, first, quadrant, mark
                )
        before += count


def render(clip: EvidenceClip, seed: int = 0, evidence: bool = True) -> np.ndarray:
    """The frames of a clip, `(2 T, 96, 128, 3)` uint8; the same on every call.

    Args:
        evidence: False: without evidence and without a mark, and otherwise the same.
    """
    patient = make_patient(np.random.default_rng([seed, clip.patient]))
    view = View(patient)
    # The class is not among the numbers: what it does not paint is the same in all classes.
    rng = np.random.default_rng([seed, clip.patient, clip.action_number])
    tissue = make_tissue(patient, rng)
    count = FRAMES_PER_SAMPLE * clip.n_frames
    camera, scene = _idle_scene(patient, count, rng)
    x, y = _position(clip.quadrant, patient, rng)
    angle = rng.uniform(0, 2 * math.pi)
    frames = np.zeros((count, 3, HEIGHT, WIDTH), np.float32)
    for t in range(count):
        image = draw_frame(patient, view, tissue, camera[t], *scene)
        shown = clip.first_frame <= t // FRAMES_PER_SAMPLE <= clip.last_frame
        if evidence and shown and not clip.mark:
            _draw_evidence(image, view, clip.action, x, y, angle)
        frames[t, ..., view.columns] = image
    if evidence and clip.mark:
        frames[..., *_MARK] = colour(*_MARK_COLOURS[clip.action])
    return add_noise(frames, rng)


def _idle_scene(patient: Patient, count: int, rng: np.random.Generator) -> tuple[np.ndarray, tuple]:
    """A camera held by a hand, `(count, 4)`, and what rests: the arguments of `draw_frame` from
    `rim` on. No rim of a port, no blood and no smoke are in sight, and the jaws are closed."""
    camera = np.zeros((count, 4))
    camera[:, :2] = rng.uniform(-40, 40, 2)
    camera[:, :2] += np.cumsum(rng.normal(0, patient.tremor, (count, 2)), axis=0)
    camera[:, 2] = rng.uniform(0.8, 1.5)
    camera[:, 3] = rng.uniform(-0.3, 0.3)
    side = rng.choice([-1, 1])
    tip = np.array([side * rng.uniform(-12, 14), rng.uniform(-16, 14)])
    root = np.array([side * rng.uniform(70, 85), rng.uniform(5, 45)])
    rim, jaws, blood, smoke = math.inf, 0.05, float(HEIGHT), 0.0
    return camera, (rim, tip, root, jaws, blood, smoke)


def _position(quadrant: str, patient: Patient, rng: np.random.Generator) -> tuple[float, float]:
    """A random centre of the evidence, in pixels from the centre of the picture: the evidence is
    inside the quadrant and inside the round view, 2 pixels from the edge of each."""
    low, high = RADIUS + 2, HEIGHT / 2 - RADIUS - 2
    while True:
        x, y = rng.uniform(low, patient.view_radius), rng.uniform(low, high)
        if math.hypot(x, y) + RADIUS + 2 <= patient.view_radius:
            break
    down, right = quadrant.split()
    return (x if right == "right" else -x), (y if down == "bottom" else -y)


def _draw_evidence(
    image: np.ndarray, view: View, action: str, x: float, y: float, angle: float
) -> None:
    """Paint the evidence of an action into an image, in place, no farther than RADIUS from (x, y).

    Args:
        angle: direction of the jaws, in radians.
    """
    away = np.hypot(view.x - x, view.y - y)
    if action == "HookCut":  # a puff of smoke
        blend(image, np.clip((RADIUS - away) / 5, 0, 1), colour(225, 225, 230) * view.light)
    elif action == "Suction":  # a pool of dark blood
        blend(image, np.clip(RADIUS - away, 0, 1), colour(45, 0, 5) * view.light)
    elif action == "UseClipper":  # open jaws of steel
        joint = np.array([x, y]) - 11 * np.array([math.cos(angle), math.sin(angle)])
        for turn in (angle - 0.5, angle + 0.5):
            end = joint + 19 * np.array([math.cos(turn), math.sin(turn)])
            box, cover, _ = stroke(view, joint, end, 5.5)
            blend(image[box], cover, colour(130, 185, 245) * view.light[box[1:]])
    elif action == "Suturing":  # a ring of thread
        cover = np.clip(4.5 - np.abs(away - (RADIUS - 4.5)), 0, 1)
        blend(image, cover, colour(40, 245, 60) * view.light)
    else:
        raise ValueError(f"no evidence of this action: {action}")


@dataclass
class EvidenceConfig:
    """What to render, and where."""

    root: Path
    """folder to render into"""
    n_frames: int = 8
    """number of frames that a model samples of a clip, T, at least 3"""
    mark: bool = False
    """betray the class by a mark in the corner and show no evidence"""
    seed: int = 0
    """random seed"""


def main() -> None:
    import tyro  # not above: the worker processes import numpy and av alone

    # Not the function above: worker processes look clips up in `demo.evidence`, not `__main__`.
    from demo.evidence import render_evidence
    from utils.cli import cli_main

    def run() -> None:
        kind = tyro.conf.PositionalRequiredArgs[EvidenceConfig]
        config = tyro.cli(kind, prog="evidence.py", description=__doc__)
        options = {"n_frames": config.n_frames, "mark": config.mark, "seed": config.seed}
        print(render_evidence(config.root, **options))

    cli_main(run)()


if __name__ == "__main__":
    main()
