"""Random flips, turns, zooms and colours: one draw a clip, one pass over its pixels.

Motion (see motion.py) is moved as the picture is, and turns, shrinks and grows with it.

A draw is a handful of numbers, made where the clip is read, so that a clip comes out the same
whatever the number of workers and wherever training resumed. It is applied there too, or, on a GPU,
to the whole batch, each clip with its own draw.
"""

import math

import numpy as np
import torch
from torch.nn import functional as F
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as tv

from clips.image_filters import LUMA
from modeling.layers import IMAGENET_MEAN_STD
from video.motion import NONE

_RGB_TO_YIQ = (LUMA, (0.5959, -0.2746, -0.3213), (0.2115, -0.5227, 0.3112))

_YIQ_TO_RGB = np.linalg.inv(_RGB_TO_YIQ).tolist()


class Augment:
    """Random flip, affine map and colours, drawn once for a whole clip.

    Called with a clip, `(T, C, H, W)` uint8, it draws and applies; clips of another size are
    resized to `size` first. All frames share one draw: redrawing for each frame would make the
    scene jump and bury the motion that the classes differ in.

    Args:
        flip: probability of a horizontal flip.
        rotation: largest angle, degrees. Flip, rotation, translation and zoom are one affine map:
            pixels are interpolated once (bilinear; black comes in from outside).
        translate: largest shift, as a share of the size.
        zoom: largest relative change of scale.
        brightness, contrast, saturation, hue: strengths, meant as in torchvision's `ColorJitter`.

    Colours differ from `ColorJitter` in four ways. The order is fixed: brightness, contrast,
    saturation, hue. Together they are one linear map of RGB, so that values are clipped to 0..255
    once at the end and not after each step. Contrast turns about the mean luma of the whole clip
    before it was warped, not of each frame: no flicker. Hue turns the chroma plane of YIQ by 360
    degrees x hue, which keeps the luma, instead of moving HSV's H: alike for the small angles that
    make sense here (up to 1.6 times as far), not for large ones.

    Strong zoom and flips blur the difference between PanoView and LocPanoView, which is camera
    motion: keep them mild where that matters. A strength of 0 switches its part off.
    """

    def __init__(
        self,
        size: int = 224,
        flip: float = 0.5,
        rotation: float = 10.0,
        translate: float = 0.05,
        zoom: float = 0.1,
        brightness: float = 0.2,
        contrast: float = 0.2,
        saturation: float = 0.2,
        hue: float = 0.02,
    ) -> None:
        self.size = size
        self.flip = flip
        self.geometry = (rotation, translate, translate, zoom)
        self.colours = (brightness, contrast, saturation, hue)

    def draw(self) -> torch.Tensor:
        """Nine numbers from torch's generator: flip (1 or -1), degrees, shifts to the right and
        down (shares of the size), scale, brightness, contrast, saturation, hue."""
        flip = -1.0 if torch.rand(()) < self.flip else 1.0
        angle, right, down, zoom = (torch.rand(4) * 2 - 1) * torch.tensor(self.geometry)
        brightness, contrast, saturation, hue = torch.rand(4)
        factors = [
            max(0.0, 1 - strength) + draw * (1 + strength - max(0.0, 1 - strength))
            for draw, strength in zip(
                (brightness, contrast, saturation), self.colours, strict=False
            )
        ]
        hue = (2 * hue - 1) * self.colours[3]
        return torch.tensor([flip, angle, right, down, 1 + zoom, *factors, hue])

    def __call__(self, clip: torch.Tensor) -> torch.Tensor:
        return self.apply(clip.unsqueeze(0), self.draw().unsqueeze(0))[0]

    def apply(self, clips: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
        """`(B, T, C, H, W)` uint8 to `(B, T, C, size, size)` uint8, with `draws` `(B, 9)`.

        C is 3, or 5 with motion.
        """
        if clips.dtype != torch.uint8:
            raise ValueError(f"clips are augmented as uint8, not {clips.dtype}")
        if clips.shape[-2:] != (self.size, self.size):
            clips = tv.resize(clips, [self.size, self.size], antialias=True)
        warped, recoloured = bool(self.flip or any(self.geometry)), any(self.colours)
        if not warped and not recoloured:
            return clips
        maps = inverse_maps(draws)
        grid = sampling_grid(maps, clips.shape[-2:]) if warped else None
        pictures, motion = clips[:, :, :3], clips[:, :, 3:]
        colours = colour_maps(draws, mean_colour(pictures)) if recoloured else None
        # A few frames at a time stay in a CPU's cache; a GPU takes all at once.
        frames = clips.shape[1] if clips.is_cuda else 4
        parts = [_change(part, grid, colours) for part in pictures.split(frames, dim=1)]
        pictures = torch.cat(parts, 1)
        if grid is not None and motion.shape[2]:
            motion = warp_motion(motion, grid, maps)
        return torch.cat([pictures, motion], 2) if motion.shape[2] else pictures


def _change(
    clips: torch.Tensor,
    grid: torch.Tensor | None,
    colours: tuple[torch.Tensor, torch.Tensor] | None,
) -> torch.Tensor:
    """Warp and recolour uint8 clips."""
    x = clips.contiguous().float()
    if grid is not None:
        x = warp(x, grid)
    if colours is not None:
        x = recolour(x, *colours)
    return x.add_(0.5).clamp_(0, 255).to(torch.uint8)


def inverse_maps(draws: torch.Tensor) -> torch.Tensor:
    """For each draw the map from places in the result to places in the clip, `(B, 2, 3)`.

    Places are in [-1, 1], as `affine_grid` wants them. A clip is flipped, turned clockwise and
    scaled about its centre, then shifted, as in torchvision's `affine`.
    """
    flip, degrees, right, down, scale = draws[:, :5].unbind(1)
    cosine, sine = torch.cos(degrees * math.pi / 180), torch.sin(degrees * math.pi / 180)
    turn = torch.stack([cosine, sine, -sine, cosine], 1).unflatten(1, (2, 2)) / scale.view(-1, 1, 1)
    turn = torch.stack([flip, torch.ones_like(flip)], 1).unsqueeze(2) * turn  # (B, 2, 2)
    shift = 2 * torch.stack([right, down], 1).unsqueeze(2)  # (B, 2, 1)
    return torch.cat([turn, -turn @ shift], 2)


def sampling_grid(maps: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Where each pixel of the result is taken from, `(B, H, W, 2)`."""
    return F.affine_grid(maps, [len(maps), 1, *size], align_corners=False)


def warp(clips: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
    """Sample `(B, T, C, H, W)` floats at the places of a `sampling_grid`.

    The frames of a clip are taken as channels of one picture: where to look is worked out once.
    """
    sampled = F.grid_sample(clips.flatten(1, 2), grid, align_corners=False)  # (B, T * C, H, W)
    return sampled.unflatten(1, clips.shape[1:3])


def warp_motion(motion: torch.Tensor, grid: torch.Tensor, maps: torch.Tensor) -> torch.Tensor:
    """Warp uint8 motion, `(B, T, 2, H, W)`; what comes in from outside has none.

    A vector changes as the difference of two places does: by the linear part of the map from the
    clip to the result, the inverse of `maps`.
    """
    x = warp(motion.float() - NONE, grid)
    linear = torch.linalg.inv(maps[:, :, :2])  # (B, 2, 2)
    x = torch.einsum("bij,btjhw->btihw", linear, x)
    return x.add_(NONE + 0.5).clamp_(1, 255).to(torch.uint8)


def mean_colour(clips: torch.Tensor) -> torch.Tensor:
    """Mean R, G and B of each clip, `(B, 3)`, from every fourth pixel of every fourth row."""
    return clips[..., ::4, ::4].float().mean((1, 3, 4))


def colour_maps(draws: torch.Tensor, mean: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """For each draw the linear map of RGB, `(B, 3, 3)`, and what it adds, `(B, 3, 1)`.

    `mean` `(B, 3)` is the clip's mean colour, about whose luma contrast turns.
    """
    brightness, contrast, saturation, hue = draws[:, 5:].view(-1, 4, 1, 1).unbind(1)  # (B, 1, 1)
    luma, to_yiq, from_yiq = (draws.new_tensor(m) for m in (LUMA, _RGB_TO_YIQ, _YIQ_TO_RGB))
    # In YIQ saturation scales the chroma plane (I, Q), hue turns it, and luma (Y) stays.
    angle = -2 * math.pi * hue  # the way round that HSV's H goes
    along, across = saturation * torch.cos(angle), saturation * torch.sin(angle)
    one, zero = torch.ones_like(hue), torch.zeros_like(hue)
    entries = [one, zero, zero, zero, along, -across, zero, across, along]
    in_yiq = torch.cat(entries, 2).view(-1, 3, 3)
    matrix = brightness * contrast * (from_yiq @ in_yiq @ to_yiq)
    # Greys stay greys under saturation and hue: contrast adds the same to R, G and B.
    offset = brightness * (1 - contrast) * (mean @ luma).view(-1, 1, 1)
    return matrix, offset.expand(-1, 3, 1)


def recolour(clips: torch.Tensor, matrix: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
    """Map the colours of `(B, T, 3, H, W)` floats in 0..255 by `colour_maps`, unclipped."""
    b, t, c, h, w = clips.shape
    matrix, offset = matrix.repeat_interleave(t, 0), offset.repeat_interleave(t, 0)
    x = torch.bmm(matrix, clips.reshape(b * t, c, h * w)).add_(offset)  # baddbmm would copy first
    return x.view(b, t, c, h, w)


class StrongAugment:
    """RandAugment, then random erasing, on a whole clip `(T, 3, H, W)` uint8.

    All frames share the operations, their directions and the erased box. Three of RandAugment's
    fourteen operations measure the picture, and torchvision's do so frame by frame: AutoContrast,
    Equalize and Contrast can flicker a little where the light changes within the clip.

    Args:
        operations: N, how many of RandAugment's operations change a clip (0: none).
        magnitude: M, their strength, 0..30.
        erasing: probability that a box is filled with ImageNet's mean colour (the paper's RE-M):
            2 to 33 % of the picture, 0.3 to 3.3 times as high as wide, the same in all frames.

    It comes before `Augment`, which then also turns and tints the box, so that the order is the
    same where `Augment` is left to a GPU. What comes in from outside is black, as there.

    Raises:
        ValueError: on a call with other than three channels: colours are changed as RGB.
    """

    def __init__(self, operations: int = 0, magnitude: int = 9, erasing: float = 0.0) -> None:
        self.operations = v2.RandAugment(
            operations, magnitude, interpolation=InterpolationMode.BILINEAR
        )
        mean_colour = [round(255 * mean) for mean in IMAGENET_MEAN_STD[0]]
        self.erase = v2.RandomErasing(erasing, value=mean_colour)

    def __call__(self, clip: torch.Tensor) -> torch.Tensor:
        if clip.shape[-3] != 3:
            raise ValueError(f"RandAugment and erasing change RGB, not {clip.shape[-3]} channels")
        return self.erase(self.operations(clip))


SHARE = 0.875
"""of the picture's sides that a crop shows"""

# Where a crop begins: shares of what is left over, from the top and from the left.
_PLACES = {
    1: (),
    3: ((0.5, 0.0), (0.5, 0.5), (0.5, 1.0)),
    5: ((0.5, 0.5), (0.0, 0.0), (0.0, 1.0), (1.0, 0.0), (1.0, 1.0)),
}

COUNTS = tuple(_PLACES)


def spatial_crops(clip: torch.Tensor, count: int) -> torch.Tensor:
    """`(T, C, H, W)` uint8 to `(count, T, C, H, W)`: each crop enlarged to the clip's own size.

    Args:
        count: 1, the whole picture; 3, left, middle and right; 5, the middle and the corners.
    """
    if count not in _PLACES:
        raise ValueError(f"crops must be one of {COUNTS}, not {count}")
    if count == 1:
        return clip.unsqueeze(0)
    height, width = clip.shape[-2:]
    size = [round(height * SHARE), round(width * SHARE)]
    crops = []
    for down, right in _PLACES[count]:
        top, left = round(down * (height - size[0])), round(right * (width - size[1]))
        crop = clip[..., top : top + size[0], left : left + size[1]]
        crops.append(tv.resize(crop, [height, width], antialias=False))
    crops = torch.stack(crops)  # (count, T, C, H, W)
    if clip.shape[1] > 3:  # motion is measured in shares of the side, which is shorter now
        motion = (crops[:, :, 3:].float() - NONE) / SHARE + NONE
        crops[:, :, 3:] = motion.round().clamp(NONE - 127, NONE + 127).to(torch.uint8)
    return crops
