"""Image filters and noise for corruptions.py: blur, blobs, fractal noise, masks.

Clips and frames are `(T, C, H, W)`. Smooth functions are computed on a coarse grid and upsampled.
No result depends on the number of threads, so that the same seed gives the same bytes.
"""

import numpy as np
import torch
from torch.nn import functional as F

from video.container import LUMA


def disc_kernel(radius: float) -> torch.Tensor:
    """A disc with a radius in pixels, as `(k, k)` weights with odd k that sum to 1."""
    steps = np.linspace(-1, 1, 2 * max(int(4 * radius), 16) + 1)
    y, x = np.meshgrid(steps, steps, indexing="ij")
    inside = y**2 + x**2 <= 1 + 1e-9  # the points on the axes belong to the disc
    return _kernel(radius * y[inside], radius * x[inside])


def line_kernel(length: float, angle: float) -> torch.Tensor:
    """A line through the centre with a length in pixels, as `(k, k)` weights that sum to 1.

    k is odd; the angle is in radians.
    """
    along = np.linspace(-length / 2, length / 2, 2 * max(int(4 * length), 16) + 1)
    return _kernel(np.sin(angle) * along, np.cos(angle) * along)


def _kernel(y: np.ndarray, x: np.ndarray) -> torch.Tensor:
    """A kernel from points around the centre; each is divided among its four nearest pixels."""
    reach = int(max(y.max(), x.max())) + 1
    kernel = np.zeros((2 * reach + 1, 2 * reach + 1))
    top, left = np.floor(y).astype(int), np.floor(x).astype(int)
    for row, row_weight in ((top, top + 1 - y), (top + 1, y - top)):
        for column, weight in ((left, left + 1 - x), (left + 1, x - left)):
            np.add.at(kernel, (row + reach, column + reach), row_weight * weight / len(y))
    return torch.from_numpy(kernel).float()


def convolve(clip: torch.Tensor, kernel: torch.Tensor) -> torch.Tensor:
    """The clip convolved with a kernel, as floats; pixels at the edge are repeated beyond it.

    It uses Fourier transforms, so that a large kernel costs no more than a small one.
    """
    k, (h, w) = len(kernel), clip.shape[-2:]
    padded = F.pad(clip.float(), [k // 2] * 4, mode="replicate")
    size = [_smooth_number(n) for n in padded.shape[-2:]]
    product = torch.fft.rfft2(padded, s=size) * torch.fft.rfft2(kernel, s=size)
    full = torch.fft.irfft2(product, s=size)  # rows and columns before k - 1 are wrapped around
    return full[..., k - 1 : k - 1 + h, k - 1 : k - 1 + w]


def _smooth_number(n: int) -> int:
    """The next number without prime factors above 5: Fourier transforms of such sizes are fast."""
    while 30**16 % n:
        n += 1
    return n


def blur(frames: torch.Tensor) -> torch.Tensor:
    """`(T, C, H, W)` floats blurred at low resolution; the deviation is about 0.04 of the side."""
    small = F.interpolate(frames, size=low_res_size(frames), mode="area")
    reach = max(round(0.035 * min(small.shape[-2:])), 1)
    for _ in range(2):  # two box filters are similar to a Gaussian
        small = F.avg_pool2d(small, 2 * reach + 1, 1, reach, count_include_pad=False)
    return upsample(small, frames)


def view_mask(clip: torch.Tensor) -> torch.Tensor:
    """Mask of the laparoscope's view, `(1, 1, H, W)` in [0, 1]: 0 in the black border around it.

    The border stays black, whatever happens in the abdomen or on the lens. Dark regions narrower
    than an eighth of the side are shadows in the scene and belong to the view.
    """
    brightest = clip[:: max(len(clip) // 5, 1)].amax(1, keepdim=True).float()
    small = F.interpolate(brightest, size=low_res_size(clip, 128), mode="area")
    small = small.median(0, keepdim=True).values  # ignores single bright or dark frames
    reach = max(shorter_side(small) // 16, 1)
    small = F.pad(small, [2 * reach] * 4, mode="replicate")
    for sign in (1, -1):  # morphological closing: maximum, then minimum, which fills dark holes
        for down, right in ((reach, 0), (0, reach)):
            kernel = (2 * down + 1, 2 * right + 1)
            small = sign * F.max_pool2d(sign * small, kernel, 1, (down, right))
    small = small[..., 2 * reach : -2 * reach, 2 * reach : -2 * reach]
    return upsample(((small - 12) / 8).clamp(0, 1), clip)


def fractal_noise(
    rng: np.random.Generator,
    clip: torch.Tensor,
    cells: float,
    octaves: int,
    times: int = 1,
    drift: float = 0.0,
) -> torch.Tensor:
    """Turbulence on the coarse grid, `(times, 1, h, w)`, with mean 0 and a deviation of about 1.

    It is a sum of octaves of smooth noise, each twice as fine and half as strong as the one before.
    They lie at different angles, so that the square cells cannot be seen, and drift over the clip
    in slightly different directions, so that shapes change.

    Args:
        cells: cells of the first octave along the shorter side.
        times: number of frames.
        drift: distance of the drift over the clip, as a fraction of the shorter side.
    """
    y, x = coordinate_grid(clip)
    time = torch.linspace(-0.5, 0.5, times).view(-1, 1, 1)
    y, x = y - y.mean(), x - x.mean()
    reach = float(torch.hypot(y.max(), x.max())) + drift
    heading = rng.uniform(0, 2 * np.pi)
    total = torch.zeros(times, 1, *y.shape)
    for octave in range(octaves):
        n = cells * 2**octave
        points = int(2 * n * reach) + 5  # per side; the bicubic filter needs two beyond `reach`
        lattice = torch.from_numpy(rng.standard_normal((1, 1, points, points), dtype=np.float32))
        direction, turn = heading + rng.normal(0, 0.6), rng.uniform(0, 2 * np.pi)
        down, right = y + drift * np.sin(direction) * time, x + drift * np.cos(direction) * time
        cos, sin = np.cos(turn), np.sin(turn)
        grid = torch.stack([cos * right - sin * down, sin * right + cos * down], -1)
        grid = grid * (2 * n / (points - 1))  # (times, h, w, 2), in [-1, 1]
        lattice = lattice.expand(times, -1, -1, -1)
        total += 0.5**octave * F.grid_sample(lattice, grid, "bicubic", align_corners=True)
    return total


def lognormal_density(noise: torch.Tensor, spread: float) -> torch.Tensor:
    """Noise as a positive density with mean 1, so that all seeds give the same mean severity."""
    density = torch.exp(spread * noise)
    return density / float(density.numpy().mean())  # torch's mean depends on the number of threads


def gaussian_blobs(
    rng: np.random.Generator, y: torch.Tensor, x: torch.Tensor, radius: np.ndarray, longer: float
) -> torch.Tensor:
    """Gaussian ellipses at random positions, `(len(radius), h, w)`.

    Args:
        y, x: see `coordinate_grid`.
        radius: `(n,)` short radius of each ellipse.
        longer: largest ratio of the long to the short radius.
    """
    n = len(radius)
    up, right, angle, stretch = rng.uniform(0, 1, (4, n, 1, 1)).astype(np.float32)
    dy, dx = y - torch.from_numpy(up) * y.max(), x - torch.from_numpy(right) * x.max()
    cos, sin = torch.from_numpy(np.cos(np.pi * angle)), torch.from_numpy(np.sin(np.pi * angle))
    along = (cos * dx + sin * dy) / torch.from_numpy(1 + (longer - 1) * stretch)
    across = cos * dy - sin * dx
    return torch.exp(-(along**2 + across**2) / torch.from_numpy(radius).float().view(-1, 1, 1) ** 2)


def shorter_side(clip: torch.Tensor) -> int:
    """The smaller one of H and W in pixels."""
    return min(clip.shape[-2:])


def low_res_size(clip: torch.Tensor, side: int = 64) -> tuple[int, int]:
    """Height and width of the coarse grid, whose shorter side has at most `side` pixels."""
    shrink = max(shorter_side(clip) / side, 1)
    return round(clip.shape[-2] / shrink), round(clip.shape[-1] / shrink)


def coordinate_grid(clip: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """y and x of the pixels of the coarse grid, `(h, w)` each, in units of the shorter side."""
    axes = [
        (torch.arange(n) + 0.5) * (length / n / shorter_side(clip))
        for n, length in zip(low_res_size(clip), clip.shape[-2:], strict=True)
    ]
    return torch.meshgrid(*axes, indexing="ij")


def upsample(small: torch.Tensor, clip: torch.Tensor) -> torch.Tensor:
    """`(T, C, h, w)` floats upsampled to the size of the clip."""
    # One channel at a time: for three, torch's rounding depends on the number of threads.
    planes = small.flatten(0, 1).unsqueeze(1)
    large = F.interpolate(planes, size=clip.shape[-2:], mode="bilinear")
    return large.view(*small.shape[:2], *clip.shape[-2:])


def to_luma(frames: torch.Tensor) -> torch.Tensor:
    """The brightness of RGB frames, `(T, 1, H, W)`."""
    red, green, blue = frames.split(1, dim=1)
    return LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue


def rgb(color: tuple[float, float, float]) -> torch.Tensor:
    """A colour as `(1, 3, 1, 1)`."""
    return torch.tensor(color).view(1, 3, 1, 1)


def to_uint8(frames: torch.Tensor) -> torch.Tensor:
    """Floats rounded to uint8; `frames` is changed in place."""
    return frames.add_(0.5).clamp_(0, 255).to(torch.uint8)
