"""Draws laparoscope-like clips whose action shows in the motion, but not in any single frame.

Every clip shows the same things: tissue through a round endoscope, an instrument with two jaws, a
pool of blood, the rim of a port. The actions differ in how these move. Played backwards, most
of the movements belong to another action, or to none:

- AbdominalEntry: the camera pushes in through the port, and the rim passes outwards;
- PanoView: the camera draws back, and the rim closes in;
- LocPanoView: the camera wanders over the tissue at one distance;
- UseClipper: the jaws close (elsewhere they open, or rest);
- HookCut: strokes along the shaft, slow in and fast out, and smoke that gathers (elsewhere it
  clears, or there is none);
- Suturing: the tip of the instrument goes round in circles;
- Suction: the blood sinks (elsewhere it rises, or stands).

Images are arrays of planes, `(3, H, W)` float32, from 0 to 255: numpy computes them several times
faster than pixels of three values.
"""

import math
from dataclasses import dataclass

import numpy as np

HEIGHT, WIDTH, FRAMES = 96, 128, 30

TEXTURE_SIZE = 320  # height and width of the tissue in pixels, much more than one view shows


@dataclass(frozen=True)
class Patient:
    """The appearance that all clips of a patient share."""

    tissue: tuple[float, float, float]
    roughness: float
    view_radius: float
    brightness: float
    steel: float
    tremor: float


def make_patient(rng: np.random.Generator) -> Patient:
    """A patient with a random appearance."""
    pink, yellow = rng.uniform(0.75, 1.0), rng.uniform(0.0, 1.0)
    return Patient(
        tissue=(205 * pink, (82 + 40 * yellow) * pink, (80 - 10 * yellow) * pink),
        roughness=rng.uniform(0.6, 1.4),
        view_radius=rng.uniform(50, 60),
        brightness=rng.uniform(0.85, 1.15),
        steel=rng.uniform(120, 190),
        tremor=rng.uniform(0.1, 0.5),
    )


def make_tissue(patient: Patient, rng: np.random.Generator) -> np.ndarray:
    """The texture of the tissue: folds of several sizes, vessels, wet highlights.

    Returns:
        `(3, 320, 320)` float64, in which the frames are interpolated.
    """
    folds = np.zeros((TEXTURE_SIZE, TEXTURE_SIZE), np.float32)
    for cells, weight in ((5, 0.5), (11, 0.35), (27, 0.3), (60, 0.22)):
        folds += weight * _enlarge(rng.normal(0, 1, (cells + 2, cells + 2)))
    texture = colour(*patient.tissue) * (1 + 0.22 * patient.roughness * folds)
    pixels = texture.reshape(3, -1)  # a view of the texture
    y, x = np.mgrid[0:TEXTURE_SIZE, 0:TEXTURE_SIZE].astype(np.float32)
    for _ in range(7):  # vessels
        slope = float(rng.uniform(-1, 1))
        start, bend = float(rng.uniform(0, TEXTURE_SIZE)), rng.uniform(6, 20)
        path = bend * np.sin(x[0] / rng.uniform(18, 45) + rng.uniform(0, 6)).astype(np.float32)
        distance = np.abs((y - start) - slope * (x - TEXTURE_SIZE / 2) - path)
        distance /= math.hypot(1, slope)
        cover = (np.clip(1.6 * rng.uniform(0.8, 2.2) - distance, 0, 1) * 0.55).ravel()
        covered = np.flatnonzero(cover)  # few pixels
        part = pixels[:, covered]
        blend(part, cover[covered], colour(125, 25, 30)[..., 0])
        pixels[:, covered] = part
    wet = np.clip((_enlarge(rng.normal(0, 1, (62, 62))) - 1.3) * 2, 0, 1)
    blend(texture, wet, 245)
    return texture.astype(np.float64)


def render_clip(
    action: str, patient: Patient, tissue: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """A clip of an action, `(30, 96, 128, 3)` uint8.

    Args:
        action: a name of `clips.manifest.CLASSES`.
        tissue: output of `make_tissue`; the parts of one source action share it.
        rng: draws everything that moves.
    """
    tracks = _movement(action, patient, rng)
    view = View(patient)
    frames = np.zeros((FRAMES, 3, HEIGHT, WIDTH), np.float32)
    for t in range(FRAMES):
        frames[t, ..., view.columns] = draw_frame(
            patient, view, tissue, *(track[t] for track in tracks)
        )
    return add_noise(frames, rng)


def add_noise(frames: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Add a camera's noise to `(T, 3, H, W)` float32 frames, in place. Returns `(T, H, W, 3)`
    uint8."""
    noise = rng.normal(0, 3, (len(frames), HEIGHT, WIDTH, 1)).astype(np.float32)
    frames += noise.transpose(0, 3, 1, 2)
    clip = np.clip(frames, 0, 255, out=frames).astype(np.uint8)  # (T, 3, H, W)
    return np.ascontiguousarray(clip.transpose(0, 2, 3, 1))  # (T, H, W, 3)


class View:
    """What all frames of a patient's clips share. W is the width of the endoscope's round view.

    Attributes:
        columns: the columns of the frame in which the view is.
        x, y: `(H, W)` coordinates of the pixels, from the centre of the image.
        distance: distance of the pixels from the centre.
        waves: height of the waves of the blood's surface.
        light: brightness of the pixels; 0 outside the view.
    """

    def __init__(self, patient: Patient) -> None:
        reach = math.ceil(patient.view_radius)
        self.columns = slice(WIDTH // 2 - reach, WIDTH // 2 + reach)
        self.y, self.x = np.mgrid[-HEIGHT // 2 : HEIGHT // 2, -reach:reach].astype(np.float32)
        self.distance = np.hypot(self.x, self.y)
        self.waves = 1.5 * np.sin(self.x / 14)
        light = float(patient.brightness) * (1.12 - 0.55 * (self.distance / 64) ** 2)
        inside = np.clip(float(patient.view_radius) - self.distance, 0, 1)
        self.light = np.clip(light * inside, 0, None)


def _movement(action: str, patient: Patient, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
    """Tracks over time, `(30, ...)`: camera (x, y, zoom, angle), radius of the rim, tip and root of
    the instrument (x, y), jaws, blood level, smoke."""
    t = np.linspace(0, 1, FRAMES)
    ease = t**2 * (3 - 2 * t) * 0.4 + t * 0.6

    def ramp(low: float, high: float) -> np.ndarray:
        return low + (high - low) * ease

    # In every clip: a camera held by a hand, a resting tip, jaws and blood that may move in the
    # direction that belongs to no action, and a rim that is out of sight or at rest.
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
        # The camera goes a little closer and back: what entry and panorama do in one direction.
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


def draw_frame(
    patient: Patient,
    view: View,
    tissue: np.ndarray,
    camera: np.ndarray,
    rim: float,
    tip: np.ndarray,
    root: np.ndarray,
    jaws: float,
    blood: float,
    smoke: float,
) -> np.ndarray:
    """The view in one frame, `(3, H, W)` float32: tissue, blood, instrument, smoke, rim, light.

    Things are drawn only where they can be seen; everywhere else their cover is 0.
    """
    x, y, distance = view.x, view.y, view.distance
    # Python floats from here on: numpy's would turn the images into float64, twice as slow.
    cx, cy, zoom, angle = camera.tolist()
    cos, sin = math.cos(angle) / zoom, math.sin(angle) / zoom
    rim, jaws, blood, smoke = float(rim), float(jaws), float(blood), float(smoke)
    image = _sample(tissue, cos * x - sin * y + cx, sin * x + cos * y + cy)

    top = max(0, int(blood + HEIGHT / 2) - 4)  # the first row of the gleam, which is 9 rows high
    if top < HEIGHT:
        surface = y[top:] - blood - view.waves[top:]
        blend(image[:, top:], np.clip(surface, 0, 1) * 0.8, colour(96, 12, 16))
        gleam = np.clip(1.6 - np.abs(surface[:9]), 0, 1) * 0.6
        blend(image[:, top : top + 9], gleam, colour(215, 120, 115))

    along = (tip - root) / np.hypot(*(tip - root))
    box, cover, offset = stroke(view, root, tip, 7.0)
    shine = float(patient.steel) * (0.55 + 0.6 * np.exp(-(((offset + 2) / 3) ** 2)))
    blend(image[box], cover, shine)
    for turn in (-jaws, jaws):
        c, s = np.cos(turn), np.sin(turn)
        end = tip + 28 * np.array([c * along[0] - s * along[1], s * along[0] + c * along[1]])
        box, cover, _ = stroke(view, tip, end, 3.5)
        blend(image[box], cover, patient.steel + 45)

    if smoke:
        away = np.hypot(x - float(tip[0]), y - float(tip[1]) + 12 * smoke)
        puff = 0.85 * smoke * np.exp(-((away / (10 + 30 * smoke)) ** 2))
        blend(image, puff, colour(205, 205, 210))

    if rim - 3 < patient.view_radius:
        blend(image, np.clip((distance - rim) / 2, 0, 1) * 0.85, colour(52, 40, 38))
        ring = np.clip(3 - np.abs(distance - rim), 0, 1) * 0.7
        blend(image, ring, colour(150, 140, 135))

    image *= view.light
    return image


def colour(red: float, green: float, blue: float) -> np.ndarray:
    """A colour as `(3, 1, 1)` float32."""
    return np.array([red, green, blue], np.float32)[:, None, None]


def blend(image: np.ndarray, cover: np.ndarray, colour: np.ndarray | float) -> None:
    """Paint a colour over the planes of an image, in place, where `cover` is above 0."""
    image *= 1 - cover
    image += colour * cover


def stroke(
    view: View, start: np.ndarray, end: np.ndarray, half_width: float
) -> tuple[tuple[slice, ...], np.ndarray, np.ndarray]:
    """A thick line: the box of an image that holds it, its cover in the box, and the signed
    distance of the box's pixels from its axis."""
    (x0, y0), (x1, y1), (dx, dy) = start.tolist(), end.tolist(), (end - start).tolist()
    length = math.hypot(dx, dy)
    box = (
        slice(None),
        _pixels(min(y0, y1) - half_width, max(y0, y1) + half_width, view.x.shape[0]),
        _pixels(min(x0, x1) - half_width, max(x0, x1) + half_width, view.x.shape[1]),
    )
    x, y = view.x[box[1:]] - x0, view.y[box[1:]] - y0
    fraction = np.clip((x * dx + y * dy) / length**2, 0, 1)
    away = np.hypot(x - fraction * dx, y - fraction * dy)
    offset = (x * dy - y * dx) / length
    return box, np.clip(half_width - away, 0, 1), offset


def _pixels(low: float, high: float, size: int) -> slice:
    """The pixels from `low` to `high`, coordinates from the centre, on an axis of `size` pixels."""
    first, last = math.floor(low + size / 2), math.ceil(high + size / 2)
    return slice(min(max(0, first), size), max(0, last + 1))


def _sample(image: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Bilinear samples of an image, `(3, H, W)`, around its centre; the edge goes on for ever.

    Args:
        x, y: `(h, w)` positions; the samples are `(3, h, w)`.
    """
    height, width = image.shape[1:]
    x = np.clip(x + width / 2, 0, width - 1.001)
    y = np.clip(y + height / 2, 0, height - 1.001)
    left, top = x.astype(np.int32), y.astype(np.int32)
    u, v = x - left, y - top
    corner = top * np.intp(width) + left
    pixels = image.reshape(3, -1)
    upper = _lerp(pixels.take(corner, axis=1), pixels.take(corner + 1, axis=1), u)
    corner += width
    lower = _lerp(pixels.take(corner, axis=1), pixels.take(corner + 1, axis=1), u)
    return _lerp(upper, lower, v).astype(np.float32)


def _lerp(first: np.ndarray, second: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """The mean of two arrays, with the weight of the second one; it overwrites both."""
    first *= 1 - weight
    second *= weight
    first += second
    return first


def _enlarge(noise: np.ndarray) -> np.ndarray:
    """Coarse noise, `(n, n)`, as a smooth image of the texture's size, float32."""
    position = np.linspace(0, noise.shape[0] - 1.001, TEXTURE_SIZE)
    cell = position.astype(int)
    part = position - cell
    part = part * part * (3 - 2 * part)
    rows = noise[cell] * (1 - part)[:, None] + noise[cell + 1] * part[:, None]
    columns = rows.take(cell, axis=1) * (1 - part) + rows.take(cell + 1, axis=1) * part
    return columns.astype(np.float32)
