"""Transforms of whole clips: random flips, warps and colours, RandAugment, erasing, crops.

All frames of a clip are transformed with the same random numbers: new ones for each frame would
make the scene jump and hide the motion by which the classes differ. Motion fields (video/motion.py)
are moved with the frames, and turn, shrink and grow with them.
"""

import functools
import math

import numpy as np
import torch
from torch.nn import functional as F

from modeling.layers import IMAGENET_MEAN_STD
from video.container import LUMA
from video.motion import ZERO

_RGB_TO_YIQ = (LUMA, (0.5959, -0.2746, -0.3213), (0.2115, -0.5227, 0.3112))
_YIQ_TO_RGB = np.linalg.inv(_RGB_TO_YIQ).tolist()


class Resize:
    """`(..., H, W)` clips to `(..., size, size)`; clips of that size are returned as they are."""

    def __init__(self, size: int = 224) -> None:
        self.size = size

    def __call__(self, clip: torch.Tensor) -> torch.Tensor:
        # Clips of ClipsDataset come in this size from the decoder; others are resized here.
        if clip.shape[-2:] == (self.size, self.size):
            return clip
        from torchvision.transforms.v2 import functional as tv  # slow to import, seldom needed

        return tv.resize(clip, [self.size, self.size], antialias=True)


class ClipAugment:
    """Random flip, affine map and colour changes, drawn once per clip.

    A call takes a clip, `(T, C, H, W)` uint8. The drawing (`sample_params`) and the application
    (`apply`) can also be separated: the numbers are drawn where the clip is read, so that a clip
    comes out the same whatever the number of workers and wherever training resumed, and a GPU
    applies them to a whole batch, each clip with its own numbers.

    Args:
        size: clips of another size are resized to it first.
        hflip_prob: probability of a horizontal flip.
        rotation: largest angle in degrees. Flip, rotation, translation and scale are one affine
            map: pixels are interpolated once (bilinear; black comes in from outside).
        translate: largest shift as a fraction of the size.
        scale: largest relative change of scale.
        brightness, contrast, saturation, hue: strengths, as in torchvision's `ColorJitter`.

    Colours differ from `ColorJitter` in four ways. The order is fixed: brightness, contrast,
    saturation, hue. Together they are one linear map of RGB, so values are clipped to 0..255 once
    at the end and not after each step. Contrast turns about the mean luma of the whole clip before
    it was warped, not of each frame: no flicker. Hue turns the chroma plane of YIQ by 360 degrees x
    hue, which keeps the luma, instead of moving H of HSV: nearly the same for the small angles that
    make sense here (up to 1.6 times as far), not for large ones.

    A strength of 0 switches its part off.
    """

    def __init__(
        self,
        size: int = 224,
        hflip_prob: float = 0.5,
        rotation: float = 10.0,
        translate: float = 0.05,
        scale: float = 0.1,
        brightness: float = 0.2,
        contrast: float = 0.2,
        saturation: float = 0.2,
        hue: float = 0.02,
    ) -> None:
        self.size = size
        self.hflip_prob = hflip_prob
        self.geometry = (rotation, translate, translate, scale)
        self.colors = (brightness, contrast, saturation, hue)

    def sample_params(self) -> torch.Tensor:
        """Nine numbers from torch's generator: flip (1 or -1), degrees, shift to the right and
        down (fractions of the size), scale, brightness, contrast, saturation, hue."""
        flip = -1.0 if torch.rand(()) < self.hflip_prob else 1.0
        angle, right, down, scale = (torch.rand(4) * 2 - 1) * torch.tensor(self.geometry)
        brightness, contrast, saturation, hue = torch.rand(4)
        factors = [
            max(0.0, 1 - strength) + uniform * (1 + strength - max(0.0, 1 - strength))
            for uniform, strength in zip(
                (brightness, contrast, saturation), self.colors, strict=False
            )
        ]
        hue = (2 * hue - 1) * self.colors[3]
        return torch.tensor([flip, angle, right, down, 1 + scale, *factors, hue])

    def __call__(self, clip: torch.Tensor) -> torch.Tensor:
        return self.apply(clip.unsqueeze(0), self.sample_params().unsqueeze(0))[0]

    def apply(self, clips: torch.Tensor, params: torch.Tensor) -> torch.Tensor:
        """`(B, T, C, H, W)` uint8 to `(B, T, C, size, size)` uint8, with `params` `(B, 9)`.

        C is 3, or 5 with motion.
        """
        if clips.dtype != torch.uint8:
            raise ValueError(f"clips are augmented as uint8, not {clips.dtype}")
        clips = Resize(self.size)(clips)
        warps, recolors = bool(self.hflip_prob or any(self.geometry)), any(self.colors)
        if not warps and not recolors:
            return clips
        maps = inverse_affine(params)
        grid = sampling_grid(maps, clips.shape[-2:]) if warps else None
        frames, motion = clips[:, :, :3], clips[:, :, 3:]
        color_map = color_maps(params, mean_color(frames)) if recolors else None
        # A few frames at a time stay in a CPU's cache; a GPU takes all at once.
        chunk = clips.shape[1] if clips.is_cuda else 4
        frames = torch.cat(
            [_transform(part, grid, color_map) for part in frames.split(chunk, dim=1)], 1
        )
        if grid is not None and motion.shape[2]:
            motion = warp_motion(motion, grid, maps)
        return torch.cat([frames, motion], 2) if motion.shape[2] else frames


def _transform(
    clips: torch.Tensor,
    grid: torch.Tensor | None,
    color_map: tuple[torch.Tensor, torch.Tensor] | None,
) -> torch.Tensor:
    """Warp and recolour uint8 clips."""
    x = clips.contiguous().float()
    if grid is not None:
        x = warp(x, grid)
    if color_map is not None:
        x = apply_color(x, *color_map)
    return x.add_(0.5).clamp_(0, 255).to(torch.uint8)


def inverse_affine(params: torch.Tensor) -> torch.Tensor:
    """The map from points of the result to points of the clip per row of `params`, `(B, 2, 3)`.

    Points are in [-1, 1], as `affine_grid` wants them. A clip is flipped, turned clockwise and
    scaled about its centre, then shifted, as in torchvision's `affine`.
    """
    flip, degrees, right, down, scale = params[:, :5].unbind(1)
    cosine, sine = torch.cos(degrees * math.pi / 180), torch.sin(degrees * math.pi / 180)
    turn = torch.stack([cosine, sine, -sine, cosine], 1).unflatten(1, (2, 2)) / scale.view(-1, 1, 1)
    turn = torch.stack([flip, torch.ones_like(flip)], 1).unsqueeze(2) * turn  # (B, 2, 2)
    shift = 2 * torch.stack([right, down], 1).unsqueeze(2)  # (B, 2, 1)
    return torch.cat([turn, -turn @ shift], 2)


def sampling_grid(maps: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Where each pixel of the result is taken from, `(B, H, W, 2)`."""
    return F.affine_grid(maps, [len(maps), 1, *size], align_corners=False)


def warp(clips: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
    """Sample `(B, T, C, H, W)` floats at the points of a `sampling_grid`.

    The frames of a clip are taken as channels of one image, so that the points are worked out once.
    """
    sampled = F.grid_sample(clips.flatten(1, 2), grid, align_corners=False)  # (B, T * C, H, W)
    return sampled.unflatten(1, clips.shape[1:3])


def warp_motion(motion: torch.Tensor, grid: torch.Tensor, maps: torch.Tensor) -> torch.Tensor:
    """Warp uint8 motion, `(B, T, 2, H, W)`; what comes in from outside does not move.

    A vector changes as the difference of two points does: by the linear part of the map from the
    clip to the result, the inverse of `maps`.
    """
    x = warp(motion.float() - ZERO, grid)
    linear = torch.linalg.inv_ex(maps[:, :, :2]).inverse  # (B, 2, 2); `inv` would wait for a GPU
    x = torch.einsum("bij,btjhw->btihw", linear, x)
    return x.add_(ZERO + 0.5).clamp_(1, 255).to(torch.uint8)


def mean_color(clips: torch.Tensor) -> torch.Tensor:
    """Mean R, G and B of each clip, `(B, 3)`, from every fourth pixel of every fourth row."""
    return clips[..., ::4, ::4].float().mean((1, 3, 4))


def color_maps(params: torch.Tensor, mean: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """For each row of `params` the linear map of RGB, `(B, 3, 3)`, and its offset, `(B, 3, 1)`.

    `mean` `(B, 3)` is the mean colour of the clip, about whose luma the contrast turns.
    """
    brightness, contrast, saturation, hue = params[:, 5:].view(-1, 4, 1, 1).unbind(1)  # (B, 1, 1)
    luma, to_yiq, from_yiq = _color_matrices(params.device, params.dtype)
    # In YIQ saturation scales the chroma plane (I, Q), hue turns it, and luma (Y) stays.
    angle = -2 * math.pi * hue  # in the direction of H of HSV
    along, across = saturation * torch.cos(angle), saturation * torch.sin(angle)
    one, zero = torch.ones_like(hue), torch.zeros_like(hue)
    entries = [one, zero, zero, zero, along, -across, zero, across, along]
    in_yiq = torch.cat(entries, 2).view(-1, 3, 3)
    matrix = brightness * contrast * (from_yiq @ in_yiq @ to_yiq)
    # Greys stay greys under saturation and hue: contrast adds the same to R, G and B.
    offset = brightness * (1 - contrast) * (mean @ luma).view(-1, 1, 1)
    return matrix, offset.expand(-1, 3, 1)


@functools.cache
def _color_matrices(device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """The weights of luma, `(3,)`, and the maps to and from YIQ, `(3, 3)`, on a device.

    They stay there: a GPU would have to finish its work before each batch could copy them anew.
    """
    matrices = LUMA, _RGB_TO_YIQ, _YIQ_TO_RGB
    return tuple(torch.tensor(matrix, dtype=dtype, device=device) for matrix in matrices)


def apply_color(clips: torch.Tensor, matrix: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
    """Map the colours of `(B, T, 3, H, W)` floats in 0..255 by `color_maps`, unclipped."""
    b, t, c, h, w = clips.shape
    matrix, offset = matrix.repeat_interleave(t, 0), offset.repeat_interleave(t, 0)
    x = torch.bmm(matrix, clips.reshape(b * t, c, h * w)).add_(offset)  # baddbmm would copy first
    return x.view(b, t, c, h, w)


class RandAugmentErase:
    """RandAugment, then random erasing, on a whole clip `(T, 3, H, W)` uint8.

    Cubuk et al., "RandAugment", 2019, arXiv:1909.13719; Zhong et al., "Random Erasing Data
    Augmentation", 2017, arXiv:1708.04896. All frames share the operations, their directions and the
    erased box. Three of RandAugment's fourteen operations measure the image, and torchvision's do
    so frame by frame: AutoContrast, Equalize and Contrast can flicker a little where the light
    changes within the clip.

    Args:
        operations: N, number of RandAugment operations per clip (0: none).
        magnitude: M, their strength, 0..30.
        random_erase: probability that a box is filled with ImageNet's mean colour (RE-M in the
            paper): 2 to 33 % of the frame, 0.3 to 3.3 times as high as wide, the same in all
            frames.

    It comes before `ClipAugment`, which then also turns and tints the box, so that the order is the
    same where a GPU applies `ClipAugment`. What comes in from outside is black, as there.

    Raises:
        ValueError: on a call with other than three channels: colours are changed as RGB.
    """

    def __init__(self, operations: int = 0, magnitude: int = 9, random_erase: float = 0.0) -> None:
        from torchvision.transforms import InterpolationMode, v2  # slow to import, seldom needed

        bilinear = InterpolationMode.BILINEAR
        self.operations = v2.RandAugment(operations, magnitude, interpolation=bilinear)
        mean_color = [round(255 * mean) for mean in IMAGENET_MEAN_STD[0]]
        self.erase = v2.RandomErasing(random_erase, value=mean_color)

    def __call__(self, clip: torch.Tensor) -> torch.Tensor:
        if clip.shape[-3] != 3:
            raise ValueError(f"RandAugment and erasing change RGB, not {clip.shape[-3]} channels")
        return self.erase(self.operations(clip))


CROP_RATIO = 0.875
"""fraction of the frame's sides that a crop shows"""

# Where a crop begins: fractions of the remaining height and width.
_CROP_POSITIONS = {
    1: (),
    3: ((0.5, 0.0), (0.5, 0.5), (0.5, 1.0)),
    5: ((0.5, 0.5), (0.0, 0.0), (0.0, 1.0), (1.0, 0.0), (1.0, 1.0)),
}
CROP_COUNTS = tuple(_CROP_POSITIONS)


def spatial_crops(clip: torch.Tensor, count: int) -> torch.Tensor:
    """`(T, C, H, W)` uint8 to `(count, T, C, H, W)`: each crop enlarged to the clip's own size.

    Args:
        count: 1, the whole frame; 3, left, middle and right; 5, the middle and the corners.
    """
    if count not in _CROP_POSITIONS:
        raise ValueError(f"crops must be one of {CROP_COUNTS}, not {count}")
    if count == 1:
        return clip.unsqueeze(0)
    from torchvision.transforms.v2 import functional as tv  # slow to import, seldom needed

    height, width = clip.shape[-2:]
    size = [round(height * CROP_RATIO), round(width * CROP_RATIO)]
    crops = []
    for down, right in _CROP_POSITIONS[count]:
        top, left = round(down * (height - size[0])), round(right * (width - size[1]))
        crop = clip[..., top : top + size[0], left : left + size[1]]
        crops.append(tv.resize(crop, [height, width], antialias=False))
    crops = torch.stack(crops)  # (count, T, C, H, W)
    if clip.shape[1] > 3:  # motion is a fraction of the side, which is shorter now
        motion = (crops[:, :, 3:].float() - ZERO) / CROP_RATIO + ZERO
        crops[:, :, 3:] = motion.round().clamp(ZERO - 127, ZERO + 127).to(torch.uint8)
    return crops
