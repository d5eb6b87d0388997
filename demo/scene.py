"""Draws laparoscope-like clips in which motion, not any single picture, tells the action.

Every clip shows the same things: tissue through a round endoscope, an instrument with two jaws, a
pool of blood, the rim of a port. What differs is how they move, and for the telling movements the
backward version belongs to another action or to none:

- AbdominalEntry: the camera pushes in through the port, the rim passes outwards;
- PanoView: the camera draws back, the rim closes in;
- LocPanoView: the camera wanders over the tissue at one distance;
- UseClipper: the jaws close (elsewhere they open, or rest);
- HookCut: strokes along the shaft, slow in and fast out, and smoke that gathers (elsewhere it
  clears, or there is none);
- Suturing: the tip goes round in circles;
- Suction: the blood sinks (elsewhere it rises, or stands).
"""

import math
from dataclasses import dataclass

import numpy as np

HEIGHT, WIDTH, FRAMES = 96, 128, 30

_Y, _X = np.mgrid[0:HEIGHT, 0:WIDTH].astype(np.float32)

_TEXTURE = 320  # pixels of a side of the tissue, much more than one view shows


@dataclass(frozen=True)
class Patient:
    """The looks that all clips of a patient share."""

    tissue: tuple[float, float, float]
    roughness: float
    view_radius: float
    brightness: float
    steel: float
    tremor: float


def make_patient(rng: np.random.Generator) -> Patient:
    """A patient with random looks."""
    pink, yellow = rng.uniform(0.75, 1.0), rng.uniform(0.0, 1.0)
    return Patient(
        tissue=(205 * pink, (82 + 40 * yellow) * pink, (80 - 10 * yellow) * pink),
        roughness=rng.uniform(0.6, 1.4),
        view_radius=rng.uniform(50, 60),
        brightness=rng.uniform(0.85, 1.15),
        steel=rng.uniform(120, 190),
        tremor=rng.uniform(0.1, 0.5),
    )


def render_clip(
    action: str, patient: Patient, scene: np.random.Generator, motion: np.random.Generator
) -> np.ndarray:
    """A clip of an action, `(30, 96, 128, 3)` uint8.

    Args:
        action: a name of `manifest.CLASSES`.
        scene: draws the tissue; parts of one source action share it.
        motion: draws everything that moves.
    """
    tissue = _tissue(patient, scene)
    move = _movement(action, patient, motion)
    frames = [_frame(patient, tissue, *(track[t] for track in move)) for t in range(FRAMES)]
    noise = motion.normal(0, 3, (FRAMES, HEIGHT, WIDTH, 1)).astype(np.float32)
    return np.clip(np.stack(frames) + noise, 0, 255).astype(np.uint8)


def _movement(action: str, patient: Patient, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
    """Tracks over time: camera (x, y, zoom, angle), rim radius, tip and root (x, y), jaws, blood
    level, smoke."""
    t = np.linspace(0, 1, FRAMES)
    ease = t**2 * (3 - 2 * t) * 0.4 + t * 0.6

    def ramp(low: float, high: float) -> np.ndarray:
        return low + (high - low) * ease

    # What every clip has: a camera held by a hand, a resting tip, jaws and blood that may move the
    # untelling way, the rim out of sight or at rest.
    camera = np.zeros((FRAMES, 4))
    camera[:, :2] = rng.uniform(-40, 40, 2)
    camera[:, :2] += np.cumsum(rng.normal(0, patient.tremor, (FRAMES, 2)), axis=0)
    camera[:, 2] = rng.uniform(0.8, 1.5)
    camera[:, 3] = rng.uniform(-0.3, 0.3)
    rim = np.full(FRAMES, rng.uniform(45, 80))
    side = rng.choice([-1, 1])
    tip = np.tile([side * rng.uniform(-12, 14), rng.uniform(-16, 14)], (FRAMES, 1))
    tip += np.cumsum(rng.normal(0, 0.4, (FRAMES, 2)), axis=0)
    low, high = rng.uniform(0.03, 0.1), rng.uniform(0.95, 1.2)
    jaws = ramp(low, high) if rng.random() < 0.3 else np.full(FRAMES, rng.uniform(low, high))
    bottom, top = rng.uniform(40, 46), rng.uniform(-16, -4)
    standing = np.full(FRAMES, rng.uniform(5, bottom))
    blood = ramp(bottom, top) if rng.random() < 0.3 else standing
    smoke = ramp(rng.uniform(0.7, 1), 0) if rng.random() < 0.3 else np.zeros(FRAMES)

    if action == "AbdominalEntry":
        camera[:, 2] = ramp(rng.uniform(0.6, 0.75), rng.uniform(1.6, 1.9))
        rim = ramp(rng.uniform(20, 28), rng.uniform(62, 75))
    elif action == "PanoView":
        camera[:, 2] = ramp(rng.uniform(1.6, 1.9), rng.uniform(0.6, 0.75))
        rim = ramp(rng.uniform(62, 75), rng.uniform(20, 28))
    elif action == "LocPanoView":
        heading = rng.uniform(0, 2 * np.pi)
        heading = heading + np.cumsum(rng.normal(0, 0.06, FRAMES))
        steps = rng.uniform(3.5, 5.0) * np.stack([np.cos(heading), np.sin(heading)], axis=1)
        camera[:, :2] += np.cumsum(steps, axis=0) - steps.sum(axis=0) / 2
        # A look closer and back: what the entry and the panorama do in one go, a little, both ways.
        swing = np.cos(2 * np.pi * (t * rng.uniform(1.3, 1.8) + rng.random()))
        rim = rng.uniform(43, 47) + rng.uniform(8, 11) * swing
        camera[:, 2] *= 1 + 0.25 * swing
    elif action == "UseClipper":
        jaws = ramp(high, low)
    elif action == "HookCut":
        phase = (t * rng.uniform(2.0, 3.0) + rng.random()) % 1
        stroke = np.where(phase < 0.75, phase / 0.75, (1 - phase) / 0.25)  # slow in, fast out
        reach = rng.uniform(28, 40) * (stroke - 0.5)
        tip += reach[:, None] * np.array([-side, -0.5])
        smoke = ramp(0, rng.uniform(0.7, 1))
    elif action == "Suturing":
        angle = rng.choice([-1, 1]) * 2 * np.pi * (t * rng.uniform(1.2, 2.0) + rng.random())
        tip += rng.uniform(14, 19) * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    elif action == "Suction":
        blood = ramp(top, bottom)
    else:
        raise ValueError(f"no such action: {action}")
    root = np.tile([side * rng.uniform(70, 85), rng.uniform(5, 45)], (FRAMES, 1))
    return camera, rim, tip, root, jaws, blood, smoke


def _tissue(patient: Patient, rng: np.random.Generator) -> np.ndarray:
    """Tissue, `(320, 320, 3)` float: folds of several sizes, vessels, wet highlights."""
    folds = np.zeros((_TEXTURE, _TEXTURE), np.float32)
    for cells, weight in ((5, 0.5), (11, 0.35), (27, 0.3), (60, 0.22)):
        folds += weight * _enlarge(rng.normal(0, 1, (cells + 2, cells + 2)))
    colour = (
        np.array(patient.tissue, np.float32) * (1 + 0.22 * patient.roughness * folds)[..., None]
    )
    y, x = np.mgrid[0:_TEXTURE, 0:_TEXTURE].astype(np.float32)
    for _ in range(7):  # vessels
        a, b, c = float(rng.uniform(-1, 1)), float(rng.uniform(0, _TEXTURE)), rng.uniform(6, 20)
        bend = c * np.sin(x[0] / rng.uniform(18, 45) + rng.uniform(0, 6)).astype(np.float32)
        across = np.abs((y - b) - a * (x - _TEXTURE / 2) - bend) / math.hypot(1, a)
        depth = np.clip(1.6 * rng.uniform(0.8, 2.2) - across, 0, 1)[..., None] * 0.55
        colour = colour * (1 - depth) + np.array([125, 25, 30], np.float32) * depth
    wet = np.clip((_enlarge(rng.normal(0, 1, (62, 62))) - 1.3) * 2, 0, 1)[..., None]
    return colour * (1 - wet) + 245 * wet


def _frame(
    patient: Patient,
    tissue: np.ndarray,
    camera: np.ndarray,
    rim: float,
    tip: np.ndarray,
    root: np.ndarray,
    jaws: float,
    blood: float,
    smoke: float,
) -> np.ndarray:
    """One picture, `(96, 128, 3)` float: tissue, blood, instrument, smoke, rim, light."""
    x, y = _X - WIDTH / 2, _Y - HEIGHT / 2
    distance = np.hypot(x, y)
    # Python floats from here on: numpy's would turn the pictures into float64, twice as slow.
    cx, cy, zoom, angle = camera.tolist()
    cos, sin = math.cos(angle) / zoom, math.sin(angle) / zoom
    rim, jaws, blood, smoke = float(rim), float(jaws), float(blood), float(smoke)
    picture = _sample(tissue, cos * x - sin * y + cx, sin * x + cos * y + cy)

    surface = y - blood - 1.5 * np.sin(x / 14)
    pool = np.clip(surface, 0, 1)[..., None] * 0.8
    picture = picture * (1 - pool) + np.array([96, 12, 16], np.float32) * pool
    gleam = np.clip(1.6 - np.abs(surface), 0, 1)[..., None] * 0.6
    picture = picture * (1 - gleam) + np.array([215, 120, 115], np.float32) * gleam

    along = (tip - root) / np.hypot(*(tip - root))
    shaft, offset = _stroke(x, y, root, tip, 7.0)
    shine = float(patient.steel) * (0.55 + 0.6 * np.exp(-(((offset + 2) / 3) ** 2)))
    picture = picture * (1 - shaft) + shine * shaft
    for turn in (-jaws, jaws):
        c, s = np.cos(turn), np.sin(turn)
        end = tip + 28 * np.array([c * along[0] - s * along[1], s * along[0] + c * along[1]])
        jaw, _ = _stroke(x, y, tip, end, 3.5)
        picture = picture * (1 - jaw) + (patient.steel + 45) * jaw

    if smoke:
        away = np.hypot(x - float(tip[0]), y - float(tip[1]) + 12 * smoke)
        puff = (0.85 * smoke * np.exp(-((away / (10 + 30 * smoke)) ** 2)))[..., None]
        picture = picture * (1 - puff) + np.array([205, 205, 210], np.float32) * puff

    wall = np.clip((distance - rim) / 2, 0, 1)[..., None] * 0.85
    ring = np.clip(3 - np.abs(distance - rim), 0, 1)[..., None] * 0.7
    picture = picture * (1 - wall) + np.array([52, 40, 38], np.float32) * wall
    picture = picture * (1 - ring) + np.array([150, 140, 135], np.float32) * ring

    light = float(patient.brightness) * (1.12 - 0.55 * (distance / 64) ** 2)
    view = np.clip(float(patient.view_radius) - distance, 0, 1)
    return picture * np.clip(light * view, 0, None)[..., None]


def _stroke(
    x: np.ndarray, y: np.ndarray, start: np.ndarray, end: np.ndarray, half_width: float
) -> tuple[np.ndarray, np.ndarray]:
    """Cover `(H, W, 1)` of a thick line, and the signed distance from its axis."""
    (x0, y0), (dx, dy) = start.tolist(), (end - start).tolist()
    length = math.hypot(dx, dy)
    x, y = x - x0, y - y0
    place = np.clip((x * dx + y * dy) / length**2, 0, 1)
    away = np.hypot(x - place * dx, y - place * dy)
    side = (x * dy - y * dx) / length
    return np.clip(half_width - away, 0, 1)[..., None], side[..., None]


def _sample(image: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Bilinear samples of an image around its centre; the edge goes on for ever."""
    x = np.clip(x + image.shape[1] / 2, 0, image.shape[1] - 1.001)
    y = np.clip(y + image.shape[0] / 2, 0, image.shape[0] - 1.001)
    left, top = x.astype(np.int32), y.astype(np.int32)
    u, v = (x - left)[..., None], (y - top)[..., None]
    upper = image[top, left] * (1 - u) + image[top, left + 1] * u
    lower = image[top + 1, left] * (1 - u) + image[top + 1, left + 1] * u
    return (upper * (1 - v) + lower * v).astype(np.float32)


def _enlarge(coarse: np.ndarray) -> np.ndarray:
    """Coarse noise as a smooth picture of the tissue's size."""
    cells = coarse.shape[0] - 1.001
    place = np.linspace(0, cells, _TEXTURE)
    whole = place.astype(int)
    part = place - whole
    part = part * part * (3 - 2 * part)
    rows = coarse[whole] * (1 - part)[:, None] + coarse[whole + 1] * part[:, None]
    columns = rows[:, whole] * (1 - part) + rows[:, whole + 1] * part
    return columns.astype(np.float32)
