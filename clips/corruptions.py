"""What goes wrong in a laparoscope's picture, in five severities, to test a model's robustness.

The idea of named corruptions in five severities, applied to test clips only, is Hendrycks and
Dietterich's (2019, arXiv:1903.12261); which ones a surgeon meets (smoke, fog, splashes) is from
SurgClean (arXiv:2505.19161). The strengths were set by eye on clips of real operations.

The draw (places, directions, moments) depends on the name and the seed and never on the severity:
a worse picture is the same picture with more of the same. Lengths are shares of the picture's
shorter side and times are shares of the clip, so that 64 and 224 pixels, 8 and 16 frames look
alike. Only the noise of `low_light` is one pixel wide whatever the size, and redrawn each frame.
"""

import zlib
from collections.abc import Callable
from typing import Literal

import numpy as np
import torch

from clips.image_filters import (
    as_colour,
    blobs,
    blurred,
    disc_kernel,
    enlarged,
    filtered,
    line_kernel,
    patchy,
    places,
    shorter_side,
    to_bytes,
    to_luma,
    turbulence,
    view_mask,
)
from video.encoder import recompress

SEVERITIES = (1, 2, 3, 4, 5)

# One column a severity in all tables below.
_SMOKE_DEPTH = (0.2, 0.42, 0.72, 1.1, 1.6)  # mean optical depth; at 1 a share of 1/e gets through

_SMOKE_COLOUR = (176.0, 167.0, 171.0)  # what thick smoke under a scope's light looks like


def smoke(clip: torch.Tensor, severity: int, rng: np.random.Generator) -> torch.Tensor:
    """Grey smoke that rises from one place and drifts by a quarter of the picture.

    Turbulence in four octaves, blended in by the haze model: what gets through falls
    exponentially with the depth, and the smoke's own light takes its place. It also loses colour.
    """
    noise = turbulence(rng, clip, 1.5, octaves=4, times=len(clip), drift=0.25)
    depth = _SMOKE_DEPTH[severity - 1] * patchy(noise, 0.65)
    y, x = places(clip)
    up, right = rng.uniform(0.3, 0.7, 2)
    source = torch.exp(-((y - up * y.max()) ** 2 + (x - right * x.max()) ** 2) / 0.2)
    cover = enlarged(1 - torch.exp(-depth * (0.7 + 0.6 * source)), clip) * view_mask(clip)
    # The lamp is at the scope's tip: smoke, too, is lit less towards the edge of the view.
    lamp = 1.08 - 0.8 * ((y - y.max() / 2) ** 2 + (x - x.max() / 2) ** 2)
    lit = as_colour(_SMOKE_COLOUR) * enlarged(lamp.clamp(min=0.5)[None, None], clip)
    picture = clip.float()
    picture.lerp_(to_luma(picture), 0.6 * cover)
    return to_bytes(picture.lerp_(lit, cover))


_BLOOD_DROPLETS = (5, 11, 19, 30, 44)

_BLOOD_ABSORPTION = (0.9, 3.2, 3.0)  # of red, green and blue; at 1 a share of 1/e gets through

_BLOOD_COLOUR = (62.0, 7.0, 9.0)  # light that thick blood scatters back


def blood_splash(clip: torch.Tensor, severity: int, rng: np.random.Generator) -> torch.Tensor:
    """Droplets of blood on the lens: they stay where they are while the scene moves.

    Red gets through thin blood, nothing through thick (Beer and Lambert's law). The lens is far
    too close to be in focus: edges are soft, and what is seen through a droplet is blurred.
    """
    y, x = places(clip)
    ragged_y, ragged_x = (0.015 * turbulence(rng, clip, 6, octaves=3)[0, 0] for _ in "yx")
    radius = 0.036 * np.exp(0.6 * rng.standard_normal(_BLOOD_DROPLETS[-1])).clip(0.4, 2.2)
    droplets = blobs(rng, y + ragged_y, x + ragged_x, radius, longer=1.7)
    film = droplets[: _BLOOD_DROPLETS[severity - 1]].sum(0)  # (h, w): near ones run together
    film = enlarged((3.2 * (film - 0.22)).clamp(0, 2.2)[None, None], clip) * view_mask(clip)
    picture = clip.float()
    picture.lerp_(blurred(picture), (2 * film).clamp(max=1))
    through = torch.exp(-film * as_colour(_BLOOD_ABSORPTION))  # (1, 3, H, W)
    return to_bytes(picture.mul_(through) + as_colour(_BLOOD_COLOUR) * (1 - through[:, 1:2]))


_FOG_DEPTH = (0.2, 0.4, 0.7, 1.15, 1.8)  # optical depth near the edge, three times the middle's


def lens_fog(clip: torch.Tensor, severity: int, rng: np.random.Generator) -> torch.Tensor:
    """Moisture on a cold lens: a veil that stands still, thicker in patches and to the edge.

    Scattering blurs what is behind and adds a milky light, which has some of the scene's colour.
    """
    y, x = places(clip)
    edge = 4 * ((y - y.max() / 2) ** 2 + (x - x.max() / 2) ** 2)  # 1 at half a side from the centre
    patches = patchy(turbulence(rng, clip, 1.5, octaves=3), 0.55)
    depth = _FOG_DEPTH[severity - 1] * (0.35 + 0.75 * edge.clamp(max=1.5)) * patches
    cover = enlarged(1 - torch.exp(-depth), clip) * view_mask(clip)
    picture = clip.float()
    # A sum of integers: one of floats depends on how many threads share it.
    milk = 150 + 0.5 * clip.sum((0, 2, 3), keepdim=True) / clip[:, 0].numel()
    picture.lerp_(blurred(picture), (1.7 * cover).clamp(max=1))
    return to_bytes(picture.lerp_(milk, 0.7 * cover))


_GLARE_SPOTS = (7, 12, 18, 25, 32)

_GLARE_LEVEL = (0.7, 0.66, 0.61, 0.55, 0.48)  # where saturation begins; spots are about 1 high

_GLARE_BLOOM = (0.8, 0.9, 1.0, 1.1, 1.2)

_GLARE_COLOUR = (255.0, 250.0, 244.0)


def specular_glare(clip: torch.Tensor, severity: int, rng: np.random.Generator) -> torch.Tensor:
    """Wet tissue that mirrors the lamp: saturated spots with a bloom around them.

    Lamp and camera move as one, so the spots keep their places in view. They are brighter where the
    tissue is, each waxes and wanes by a slow sine, and highlights that are there already grow.
    """
    n, y, x = _GLARE_SPOTS[-1], *places(clip)
    spots = blobs(rng, y, x, rng.uniform(0.015, 0.06, n), longer=2.5)  # (n, h, w)
    spots *= patchy(turbulence(rng, clip, 14, octaves=2)[0], 0.85)
    cycles = np.linspace(0, 1, len(clip))[:, None] * rng.uniform(0.5, 1.2, n) + rng.random(n)
    flicker = torch.from_numpy(1 + 0.15 * np.sin(2 * np.pi * cycles)).float()  # (T, n)
    lit = flicker[:, :, None, None] * spots  # (T, n, h, w)
    light = enlarged(lit[:, : _GLARE_SPOTS[severity - 1]].sum(1, keepdim=True), clip)
    picture = clip.float()
    luma = to_luma(picture) / 255
    light = (light * (0.35 + 1.4 * luma) + 0.6 * luma**4) * view_mask(clip)
    core = (3 * (light - _GLARE_LEVEL[severity - 1])).clamp(0, 1)
    bloom = _GLARE_BLOOM[severity - 1] * blurred(core)
    white = as_colour(_GLARE_COLOUR)
    return to_bytes(picture.lerp_(white, core).add_(bloom * white))


_LOW_LIGHT = (0.45, 0.22, 0.1, 0.045, 0.02)  # share of the light that is left

_FULL_WELL = 1500  # electrons of a saturated pixel

_READ_NOISE = 1.5  # electrons


def low_light(clip: torch.Tensor, severity: int, rng: np.random.Generator) -> torch.Tensor:
    """Too little light: the camera's gain makes up for a part of it and amplifies the noise.

    Shot noise (its variance is the number of electrons) and read noise after Foi et al., "Practical
    Poissonian-Gaussian noise modeling", IEEE TIP 2008, as a Gaussian, carried through gamma 2.2.
    """
    share = _LOW_LIGHT[severity - 1]
    linear = np.linspace(0, 1, 256, dtype=np.float32) ** 2.2  # (256,): a table over pixel values
    gain = share**-0.3
    seen = gain * share * linear
    noise = gain * np.sqrt(share * linear * _FULL_WELL + _READ_NOISE**2) / _FULL_WELL
    slope = (seen + 0.004) ** (1 / 2.2 - 1) / 2.2  # of the gamma curve, finite at black
    mean, deviation = (255 * seen ** (1 / 2.2)), (255 * noise * slope)
    pixels = clip.numpy()
    noisy = rng.standard_normal(pixels.shape, dtype=np.float32)
    noisy *= deviation.astype(np.float32)[pixels]
    noisy += mean.astype(np.float32)[pixels]
    return to_bytes(torch.from_numpy(noisy))


_MOTION_LENGTH = (0.02, 0.04, 0.065, 0.1, 0.15)  # of the shorter side


def motion_blur(clip: torch.Tensor, severity: int, rng: np.random.Generator) -> torch.Tensor:
    """Each frame averaged along a line of one direction a clip, as in arXiv:1903.12261."""
    length, angle = _MOTION_LENGTH[severity - 1] * shorter_side(clip), rng.uniform(0, np.pi)
    return to_bytes(filtered(clip, line_kernel(length, angle)))


_DISC_RADIUS = (0.006, 0.011, 0.018, 0.027, 0.04)  # of the shorter side


def defocus(clip: torch.Tensor, severity: int, rng: np.random.Generator) -> torch.Tensor:
    """A scope out of focus: each point becomes a disc, as in arXiv:1903.12261. Nothing is drawn."""
    return to_bytes(filtered(clip, disc_kernel(_DISC_RADIUS[severity - 1] * shorter_side(clip))))


_CRF = (30, 35, 39, 43, 47)


def compression(clip: torch.Tensor, severity: int, rng: np.random.Generator) -> torch.Tensor:
    """H.264 at a falling bit rate, the clip as one stream. Nothing is drawn."""
    frames = recompress(clip.permute(0, 2, 3, 1).numpy(), _CRF[severity - 1])
    return torch.from_numpy(frames).permute(0, 3, 1, 2).contiguous()


_LOST = (0.125, 0.25, 0.375, 0.5, 0.625)  # of the frames; for frame_freeze too


def frame_drop(clip: torch.Tensor, severity: int, rng: np.random.Generator) -> torch.Tensor:
    """Frames lost here and there; the last one that arrived is shown again.

    Every other frame is lost first: losses are single as long as they can be.
    """
    t = len(clip)
    order = 1 + rng.permutation(t - 1)  # frame 0 always arrives
    order = order[np.argsort((order + rng.integers(2)) % 2, kind="stable")]
    shown = np.arange(t)
    shown[order[: _n_lost(t, severity)]] = 0
    return clip[np.maximum.accumulate(shown)]


def frame_freeze(clip: torch.Tensor, severity: int, rng: np.random.Generator) -> torch.Tensor:
    """The stream stands still from one moment on, then jumps to the live frame.

    As many frames are lost as by `frame_drop`: what differs between the two is the arrangement.
    """
    t = len(clip)
    # The worst freeze, too, must find room after this moment and a live frame to jump to.
    start = rng.integers(max(t - 2 - _n_lost(t, SEVERITIES[-1]), 0) + 1)
    shown = np.arange(t)
    shown[start : start + 1 + _n_lost(t, severity)] = start
    return clip[shown]


def _n_lost(t: int, severity: int) -> int:
    """Of t frames; halves are rounded up."""
    return int(_LOST[severity - 1] * t + 0.5)


CORRUPTIONS: dict[str, Callable[[torch.Tensor, int, np.random.Generator], torch.Tensor]] = {
    function.__name__: function
    for function in (smoke, blood_splash, lens_fog, specular_glare, low_light,
                     motion_blur, defocus, compression, frame_drop, frame_freeze)
}  # fmt: skip

Corruption = Literal[tuple(CORRUPTIONS)]
"""The names, as a type for command lines."""


def corrupt(clip: torch.Tensor, name: str, severity: int, seed: int) -> torch.Tensor:
    """A corrupted copy of a clip.

    Args:
        clip: `(T, 3, H, W)` uint8 RGB on the CPU, T >= 1, H and W >= 16; it is not changed.
        name: a key of `CORRUPTIONS`.
        severity: 1 to 5.
        seed: 0 or more; with the name it decides everything random. Give each clip its own.

    Returns:
        The same shape and type. The same arguments give the same bytes (and with them the same
        torch, numpy and FFmpeg; a test set that must outlive them is to be saved).

    Raises:
        ValueError: no such name or severity, or a clip of another type or shape.
    """
    if name not in CORRUPTIONS:
        raise ValueError(f"no such corruption: {name} (there are {', '.join(CORRUPTIONS)})")
    if severity not in SEVERITIES:
        raise ValueError(f"severity must be one of {SEVERITIES}, not {severity}")
    if clip.dtype != torch.uint8 or clip.ndim != 4 or clip.shape[1] != 3:
        raise ValueError(f"a clip is (T, 3, H, W) uint8, not {tuple(clip.shape)} {clip.dtype}")
    # crc32, because Python's own hash of a string differs from process to process.
    rng = np.random.default_rng([zlib.crc32(name.encode()), seed])
    return CORRUPTIONS[name](clip, severity, rng)
