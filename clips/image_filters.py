"""Blur, veils, blobs and turbulence on a clip: what corruptions.py is made of.

Clips and pictures are `(T, C, H, W)`. What is smooth is worked out on a coarse grid and enlarged.
Nothing here depends on the number of threads, so that the same seed gives the same bytes.
"""

import numpy as np
import torch
from torch.nn import functional as F

LUMA = (0.299, 0.587, 0.114)  # how bright red, green and blue are: ITU-R BT.601, as torchvision


def disc_kernel(radius: float) -> torch.Tensor:
    """A disc of a radius in pixels, `(k, k)` with k odd; it sums to one."""
    steps = np.linspace(-1, 1, 2 * max(int(4 * radius), 16) + 1)
    y, x = np.meshgrid(steps, steps, indexing="ij")
    inside = y**2 + x**2 <= 1 + 1e-9  # the points on the axes are in, on either side
    return _kernel(radius * y[inside], radius * x[inside])


def line_kernel(length: float, angle: float) -> torch.Tensor:
    """A line through the centre, length in pixels, `(k, k)` with k odd; it sums to one."""
    along = np.linspace(-length / 2, length / 2, 2 * max(int(4 * length), 16) + 1)
    return _kernel(np.sin(angle) * along, np.cos(angle) * along)


def _kernel(y: np.ndarray, x: np.ndarray) -> torch.Tensor:
    """Points around the centre, each shared among the four pixels it lies between."""
    reach = int(max(y.max(), x.max())) + 1
    kernel = np.zeros((2 * reach + 1, 2 * reach + 1))
    top, left = np.floor(y).astype(int), np.floor(x).astype(int)
    for row, part in ((top, top + 1 - y), (top + 1, y - top)):
        for column, share in ((left, left + 1 - x), (left + 1, x - left)):
            np.add.at(kernel, (row + reach, column + reach), part * share / len(y))
    return torch.from_numpy(kernel).float()


def filtered(clip: torch.Tensor, kernel: torch.Tensor) -> torch.Tensor:
    """Convolved with a kernel, as floats. The picture goes on beyond its edge as it ends there.

    By Fourier transforms: a long line or a wide disc costs no more than a short one.
    """
    k, (h, w) = len(kernel), clip.shape[-2:]
    padded = F.pad(clip.float(), [k // 2] * 4, mode="replicate")
    size = [_smooth_number(n) for n in padded.shape[-2:]]
    product = torch.fft.rfft2(padded, s=size) * torch.fft.rfft2(kernel, s=size)
    whole = torch.fft.irfft2(product, s=size)  # what is left and above of k - 1 wrapped around
    return whole[..., k - 1 : k - 1 + h, k - 1 : k - 1 + w]


def _smooth_number(n: int) -> int:
    """The next number without a prime factor above 5: transforms of such sizes are fast."""
    while 30**16 % n:
        n += 1
    return n


def blurred(picture: torch.Tensor) -> torch.Tensor:
    """`(T, C, H, W)` floats blurred by about 0.04 of the side (deviation), worked out small."""
    small = F.interpolate(picture, size=coarse(picture), mode="area")
    reach = max(round(0.035 * min(small.shape[-2:])), 1)
    for _ in range(2):  # two boxes make a tent, much like a Gaussian
        small = F.avg_pool2d(small, 2 * reach + 1, 1, reach, count_include_pad=False)
    return enlarged(small, picture)


def view_mask(clip: torch.Tensor) -> torch.Tensor:
    """Where the scope sees, `(1, 1, H, W)` in [0, 1]: 0 in the black around its round picture.

    Nothing in the abdomen or on the lens lightens what the scope's stop hides. Dark places narrower
    than an eighth of the side are shadows in the scene, not outside it.
    """
    some = clip[:: max(len(clip) // 5, 1)].amax(1, keepdim=True).float()
    small = F.interpolate(some, size=coarse(clip, 128), mode="area")
    small = small.median(0, keepdim=True).values  # one flash or dark frame does not count
    reach = max(shorter_side(small) // 16, 1)
    small = F.pad(small, [2 * reach] * 4, mode="replicate")
    for sign in (1, -1):  # the largest around, then the smallest of these: fills holes
        for down, right in ((reach, 0), (0, reach)):
            kernel = (2 * down + 1, 2 * right + 1)
            small = sign * F.max_pool2d(sign * small, kernel, 1, (down, right))
    small = small[..., 2 * reach : -2 * reach, 2 * reach : -2 * reach]
    return enlarged(((small - 12) / 8).clamp(0, 1), clip)


def turbulence(
    rng: np.random.Generator,
    clip: torch.Tensor,
    cells: float,
    octaves: int,
    times: int = 1,
    drift: float = 0.0,
) -> torch.Tensor:
    """Turbulence on the coarse grid, `(times, 1, h, w)`, of mean 0 and deviation about 1.

    Octaves of smooth noise, the first with so many cells a side, each twice as fine and half as
    strong as the one before. They lie at different angles, lest the cells' squares show, and drift
    over the clip, each a little its own way, so that shapes change.
    """
    y, x = places(clip)
    time = torch.linspace(-0.5, 0.5, times).view(-1, 1, 1)
    y, x = y - y.mean(), x - x.mean()
    reach = float(torch.hypot(y.max(), x.max())) + drift
    heading = rng.uniform(0, 2 * np.pi)
    total = torch.zeros(times, 1, *y.shape)
    for octave in range(octaves):
        n = cells * 2**octave
        points = int(2 * n * reach) + 5  # a side; two beyond reach, for the bicubic
        lattice = torch.from_numpy(rng.standard_normal((1, 1, points, points), dtype=np.float32))
        way, turn = heading + rng.normal(0, 0.6), rng.uniform(0, 2 * np.pi)
        down, right = y + drift * np.sin(way) * time, x + drift * np.cos(way) * time
        cos, sin = np.cos(turn), np.sin(turn)
        grid = torch.stack([cos * right - sin * down, sin * right + cos * down], -1)
        grid = grid * (2 * n / (points - 1))  # (times, h, w, 2), in [-1, 1]
        lattice = lattice.expand(times, -1, -1, -1)
        total += 0.5**octave * F.grid_sample(lattice, grid, "bicubic", align_corners=True)
    return total


def patchy(noise: torch.Tensor, spread: float) -> torch.Tensor:
    """Noise as a positive density of mean 1, so that no seed makes it worse than another."""
    density = torch.exp(spread * noise)
    return density / float(density.numpy().mean())  # torch's mean depends on the threads


def blobs(
    rng: np.random.Generator, y: torch.Tensor, x: torch.Tensor, radius: np.ndarray, longer: float
) -> torch.Tensor:
    """Bell-shaped ellipses at random places, `(len(radius), h, w)`, up to so much longer."""
    n = len(radius)
    up, right, angle, stretch = rng.uniform(0, 1, (4, n, 1, 1)).astype(np.float32)
    dy, dx = y - torch.from_numpy(up) * y.max(), x - torch.from_numpy(right) * x.max()
    cos, sin = torch.from_numpy(np.cos(np.pi * angle)), torch.from_numpy(np.sin(np.pi * angle))
    along = (cos * dx + sin * dy) / torch.from_numpy(1 + (longer - 1) * stretch)
    across = cos * dy - sin * dx
    return torch.exp(-(along**2 + across**2) / torch.from_numpy(radius).float().view(-1, 1, 1) ** 2)


def shorter_side(clip: torch.Tensor) -> int:
    return min(clip.shape[-2:])


def coarse(clip: torch.Tensor, side: int = 64) -> tuple[int, int]:
    """The size at which smooth things are worked out: at most so much on the shorter side."""
    shrink = max(shorter_side(clip) / side, 1)
    return round(clip.shape[-2] / shrink), round(clip.shape[-1] / shrink)


def places(clip: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """y and x of the coarse grid's pixels, `(h, w)` each, in shorter sides of the picture."""
    axes = [
        (torch.arange(n) + 0.5) * (whole / n / shorter_side(clip))
        for n, whole in zip(coarse(clip), clip.shape[-2:], strict=True)
    ]
    return torch.meshgrid(*axes, indexing="ij")


def enlarged(small: torch.Tensor, clip: torch.Tensor) -> torch.Tensor:
    """`(T, C, h, w)` floats at the clip's size."""
    # Plane by plane: for three channels at once torch's rounding depends on the number of threads.
    planes = small.flatten(0, 1).unsqueeze(1)
    large = F.interpolate(planes, size=clip.shape[-2:], mode="bilinear")
    return large.view(*small.shape[:2], *clip.shape[-2:])


def to_luma(picture: torch.Tensor) -> torch.Tensor:
    red, green, blue = picture.split(1, dim=1)
    return LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue


def as_colour(rgb: tuple[float, float, float]) -> torch.Tensor:
    return torch.tensor(rgb).view(1, 3, 1, 1)


def to_bytes(picture: torch.Tensor) -> torch.Tensor:
    """Rounded; `picture` itself is used up."""
    return picture.add_(0.5).clamp_(0, 255).to(torch.uint8)
