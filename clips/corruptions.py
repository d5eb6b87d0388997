"""Ten corruptions of laparoscopic video in five severities, to test a model's robustness.

Named corruptions in five severities, applied to test clips only, are an idea of Hendrycks and
Dietterich (2019, arXiv:1903.12261). The corruptions that occur in surgery (smoke, fog, splashes)
are taken from SurgClean (arXiv:2505.19161). The strengths were chosen by eye on clips of real
operations.

The random numbers (positions, directions, times) depend on the name and the seed but not on the
severity: a higher severity shows the same corruption, only stronger. Lengths are fractions of the
shorter side of the frame and times are fractions of the clip, so that the corruptions look similar
at 64 and 224 pixels and with 8 and 16 frames. Only the noise of `low_light` is one pixel wide at
any size, and drawn anew for each frame.
"""

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from clips.image_filters import (
    blur,
    convolve,
    coordinate_grid,
    disc_kernel,
    fractal_noise,
    gaussian_blobs,
    line_kernel,
    lognormal_density,
    rgb,
    shorter_side,
    to_luma,
    to_uint8,
    upsample,
    view_mask,
)
from video.encoder import recompress

SEVERITIES = (1, 2, 3, 4, 5)

# All tables below have one value per severity.
_SMOKE_DEPTH = (0.2, 0.42, 0.72, 1.1, 1.6)  # mean optical depth d; a fraction exp(-d) gets through
_SMOKE_COLOUR = (176.0, 167.0, 171.0)  # colour of thick smoke in the light of a laparoscope


def smoke(clip: torch.Tensor, severity: int, rng: np.random.Generator) -> torch.Tensor:
    """Grey smoke that rises from one point and drifts by a quarter of the frame.

    Fractal noise with four octaves is blended in by the haze model: the light that gets through
    falls exponentially with the optical depth, and the smoke adds its own light. Smoke also removes
    colour.
    """
    noise = fractal_noise(rng, clip, 1.5, octaves=4, times=len(clip), drift=0.25)
    depth = _SMOKE_DEPTH[severity - 1] * lognormal_density(noise, 0.65)
    y, x = coordinate_grid(clip)
    up, right = rng.uniform(0.3, 0.7, 2)
    source = torch.exp(-((y - up * y.max()) ** 2 + (x - right * x.max()) ** 2) / 0.2)
    cover = upsample(1 - torch.exp(-depth * (0.7 + 0.6 * source)), clip) * view_mask(clip)
    # The lamp is at the tip of the laparoscope: smoke near the edge of the view is darker.
    lamp = 1.08 - 0.8 * ((y - y.max() / 2) ** 2 + (x - x.max() / 2) ** 2)
    lit = rgb(_SMOKE_COLOUR) * upsample(lamp.clamp(min=0.5)[None, None], clip)
    frames = clip.float()
    frames.lerp_(to_luma(frames), 0.6 * cover)
    return to_uint8(frames.lerp_(lit, cover))


_BLOOD_DROPLETS = (5, 11, 19, 30, 44)
_BLOOD_ABSORPTION = (0.9, 3.2, 3.0)  # of red, green and blue per unit of thickness
_BLOOD_COLOUR = (62.0, 7.0, 9.0)  # light that thick blood scatters back


def blood_splash(clip: torch.Tensor, severity: int, rng: np.random.Generator) -> torch.Tensor:
    """Droplets of blood on the lens. They stay where they are while the scene moves.

    Red light gets through thin blood, and no light through thick blood (Beer-Lambert law). The lens
    itself is out of focus: droplets have soft edges, and the scene behind them is blurred.
    """
    y, x = coordinate_grid(clip)
    ragged_y, ragged_x = (0.015 * fractal_noise(rng, clip, 6, octaves=3)[0, 0] for _ in "yx")
    radius = 0.036 * np.exp(0.6 * rng.standard_normal(_BLOOD_DROPLETS[-1])).clip(0.4, 2.2)
    droplets = gaussian_blobs(rng, y + ragged_y, x + ragged_x, radius, longer=1.7)
    film = droplets[: _BLOOD_DROPLETS[severity - 1]].sum(0)  # (h, w): close droplets merge
    film = upsample((3.2 * (film - 0.22)).clamp(0, 2.2)[None, None], clip) * view_mask(clip)
    frames = clip.float()
    frames.lerp_(blur(frames), (2 * film).clamp(max=1))
    through = torch.exp(-film * rgb(_BLOOD_ABSORPTION))  # (1, 3, H, W)
    return to_uint8(frames.mul_(through) + rgb(_BLOOD_COLOUR) * (1 - through[:, 1:2]))


_FOG_DEPTH = (0.2, 0.4, 0.7, 1.15, 1.8)  # optical depth near the edge, 3 times that in the middle


def lens_fog(clip: torch.Tensor, severity: int, rng: np.random.Generator) -> torch.Tensor:
    """Moisture on a cold lens: a veil that does not move, thicker in patches and near the edge.

    Scattering blurs the scene and adds a milky light, which has some of the scene's colour.
    """
    y, x = coordinate_grid(clip)
    edge = 4 * ((y - y.max() / 2) ** 2 + (x - x.max() / 2) ** 2)  # 1 at half a side from the centre
    patches = lognormal_density(fractal_noise(rng, clip, 1.5, octaves=3), 0.55)
    depth = _FOG_DEPTH[severity - 1] * (0.35 + 0.75 * edge.clamp(max=1.5)) * patches
    cover = upsample(1 - torch.exp(-depth), clip) * view_mask(clip)
    frames = clip.float()
    # A sum of integers, because a sum of floats depends on the number of threads.
    milk = 150 + 0.5 * clip.sum((0, 2, 3), keepdim=True) / clip[:, 0].numel()
    frames.lerp_(blur(frames), (1.7 * cover).clamp(max=1))
    return to_uint8(frames.lerp_(milk, 0.7 * cover))


_GLARE_SPOTS = (7, 12, 18, 25, 32)
_GLARE_LEVEL = (0.7, 0.66, 0.61, 0.55, 0.48)  # where saturation begins; spots have peaks of about 1
_GLARE_BLOOM = (0.8, 0.9, 1.0, 1.1, 1.2)
_GLARE_COLOUR = (255.0, 250.0, 244.0)


def specular_glare(clip: torch.Tensor, severity: int, rng: np.random.Generator) -> torch.Tensor:
    """Reflections of the lamp on wet tissue: saturated spots with a bloom around them.

    The lamp moves with the camera, so the spots do not move in the view. They are brighter on
    bright tissue, the brightness of each follows a slow sine, and highlights of the clip grow.
    """
    n, y, x = _GLARE_SPOTS[-1], *coordinate_grid(clip)
    spots = gaussian_blobs(rng, y, x, rng.uniform(0.015, 0.06, n), longer=2.5)  # (n, h, w)
    spots *= lognormal_density(fractal_noise(rng, clip, 14, octaves=2)[0], 0.85)
    cycles = np.linspace(0, 1, len(clip))[:, None] * rng.uniform(0.5, 1.2, n) + rng.random(n)
    flicker = torch.from_numpy(1 + 0.15 * np.sin(2 * np.pi * cycles)).float()  # (T, n)
    lit = flicker[:, :, None, None] * spots  # (T, n, h, w)
    light = upsample(lit[:, : _GLARE_SPOTS[severity - 1]].sum(1, keepdim=True), clip)
    frames = clip.float()
    luma = to_luma(frames) / 255
    light = (light * (0.35 + 1.4 * luma) + 0.6 * luma**4) * view_mask(clip)
    core = (3 * (light - _GLARE_LEVEL[severity - 1])).clamp(0, 1)
    bloom = _GLARE_BLOOM[severity - 1] * blur(core)
    white = rgb(_GLARE_COLOUR)
    return to_uint8(frames.lerp_(white, core).add_(bloom * white))


_LOW_LIGHT = (0.45, 0.22, 0.1, 0.045, 0.02)  # fraction of the light that is left
_FULL_WELL = 1500  # electrons of a saturated pixel
_READ_NOISE = 1.5  # electrons


def low_light(clip: torch.Tensor, severity: int, rng: np.random.Generator) -> torch.Tensor:
    """Too little light: the gain of the camera compensates a part of it and amplifies the noise.

    The noise is shot noise (its variance is the number of electrons) and read noise, approximated
    by a Gaussian after gamma 2.2; see Foi et al., "Practical Poissonian-Gaussian noise modeling",
    IEEE TIP 2008.
    """
    fraction = _LOW_LIGHT[severity - 1]
    linear = np.linspace(0, 1, 256, dtype=np.float32) ** 2.2  # (256,): one entry per pixel value
    gain = fraction**-0.3
    signal = gain * fraction * linear
    noise = gain * np.sqrt(fraction * linear * _FULL_WELL + _READ_NOISE**2) / _FULL_WELL
    slope = (signal + 0.004) ** (1 / 2.2 - 1) / 2.2  # of the gamma curve, finite at black
    mean, deviation = (255 * signal ** (1 / 2.2)), (255 * noise * slope)
    pixels = clip.numpy()
    noisy = rng.standard_normal(pixels.shape, dtype=np.float32)
    noisy *= deviation.astype(np.float32)[pixels]
    noisy += mean.astype(np.float32)[pixels]
    return to_uint8(torch.from_numpy(noisy))


_MOTION_LENGTH = (0.02, 0.04, 0.065, 0.1, 0.15)  # of the shorter side


def motion_blur(clip: torch.Tensor, severity: int, rng: np.random.Generator) -> torch.Tensor:
    """Each frame is averaged along a line, in one direction per clip, as in arXiv:1903.12261."""
    length, angle = _MOTION_LENGTH[severity - 1] * shorter_side(clip), rng.uniform(0, np.pi)
    return to_uint8(convolve(clip, line_kernel(length, angle)))


_DISC_RADIUS = (0.006, 0.011, 0.018, 0.027, 0.04)  # of the shorter side


def defocus(clip: torch.Tensor, severity: int, rng: np.random.Generator) -> torch.Tensor:
    """Each point becomes a disc, as in arXiv:1903.12261. No random numbers are used."""
    return to_uint8(convolve(clip, disc_kernel(_DISC_RADIUS[severity - 1] * shorter_side(clip))))


_CRF = (30, 35, 39, 43, 47)


def compression(clip: torch.Tensor, severity: int, rng: np.random.Generator) -> torch.Tensor:
    """H.264 at a low bit rate, with the clip as one stream. No random numbers are used."""
    frames = recompress(clip.permute(0, 2, 3, 1).numpy(), _CRF[severity - 1])
    return torch.from_numpy(frames).permute(0, 3, 1, 2).contiguous()


_LOST = (0.125, 0.25, 0.375, 0.5, 0.625)  # fraction of the frames, also for frame_freeze


def frame_drop(clip: torch.Tensor, severity: int, rng: np.random.Generator) -> torch.Tensor:
    """Scattered frames are lost, and the last frame that arrived is shown again.

    Every second frame is lost first, so that few neighbouring frames are lost.
    """
    t = len(clip)
    order = 1 + rng.permutation(t - 1)  # frame 0 always arrives
    order = order[np.argsort((order + rng.integers(2)) % 2, kind="stable")]
    shown = np.arange(t)
    shown[order[: _n_lost(t, severity)]] = 0
    return clip[np.maximum.accumulate(shown)]


def frame_freeze(clip: torch.Tensor, severity: int, rng: np.random.Generator) -> torch.Tensor:
    """The stream stops at one moment, and later jumps to the live frame.

    It loses as many frames as `frame_drop`, but all in a row.
    """
    t = len(clip)
    # Even the longest freeze must end before the last frame, where it jumps to the live frame.
    start = rng.integers(max(t - 2 - _n_lost(t, SEVERITIES[-1]), 0) + 1)
    shown = np.arange(t)
    shown[start : start + 1 + _n_lost(t, severity)] = start
    return clip[shown]


def _n_lost(t: int, severity: int) -> int:
    """The number of lost frames of t; halves are rounded up."""
    return int(_LOST[severity - 1] * t + 0.5)


CORRUPTIONS: dict[str, Callable[[torch.Tensor, int, np.random.Generator], torch.Tensor]] = {
    function.__name__: function
    for function in (smoke, blood_splash, lens_fog, specular_glare, low_light,
                     motion_blur, defocus, compression, frame_drop, frame_freeze)
}  # fmt: skip

Corruption = Literal[tuple(CORRUPTIONS)]
"""The names of the corruptions, as a type for command lines."""


@dataclass(frozen=True)
class Corrupt:
    """A corruption of evaluation clips; clip i is always corrupted in the same way."""

    name: str
    severity: int

    def __call__(self, clip: torch.Tensor, index: int) -> torch.Tensor:
        return corrupt(clip, self.name, self.severity, seed=index)


class ShuffleFrames:
    """Puts the frames of a clip into a random order, which is always the same for clip i.

    The loss of accuracy tells how much the model uses the order of the frames. Measured motion
    stays with its frame.
    """

    def __call__(self, clip: torch.Tensor, index: int) -> torch.Tensor:
        return clip[torch.randperm(len(clip), generator=torch.Generator().manual_seed(index))]


def corrupt(clip: torch.Tensor, name: str, severity: int, seed: int) -> torch.Tensor:
    """A corrupted copy of a clip.

    Args:
        clip: `(T, 3, H, W)` uint8 RGB on the CPU, with T >= 1, H and W >= 16; it is not changed.
        name: a key of `CORRUPTIONS`.
        severity: 1 to 5.
        seed: 0 or more. Seed and name determine all random numbers: give each clip its own seed.

    Returns:
        A clip of the same shape and type. The same arguments give the same bytes with the same
        versions of torch, numpy and FFmpeg.

    Raises:
        ValueError: there is no such name or severity, or the clip has another type or shape.
    """
    if name not in CORRUPTIONS:
        raise ValueError(f"no such corruption: {name} (there are {', '.join(CORRUPTIONS)})")
    if severity not in SEVERITIES:
        raise ValueError(f"severity must be one of {SEVERITIES}, not {severity}")
    if clip.dtype != torch.uint8 or clip.ndim != 4 or clip.shape[1] != 3:
        raise ValueError(f"a clip is (T, 3, H, W) uint8, not {tuple(clip.shape)} {clip.dtype}")
    # Python's own hash of a string differs between processes.
    rng = np.random.default_rng([zlib.crc32(name.encode()), seed])
    return CORRUPTIONS[name](clip, severity, rng)
