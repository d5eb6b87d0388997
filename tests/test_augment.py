"""One draw a clip; geometry equals torchvision's affine; colours equal their formulas."""

import colorsys

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as pil
from torchvision.transforms.v2 import functional as tv

from augment import LUMA, Augment, colour_maps, inverse_maps, recolour, sampling_grid, warp

NAMES = ("flip", "rotation", "translate", "zoom", "brightness", "contrast", "saturation", "hue")
OFF = dict.fromkeys(NAMES, 0.0)
SAME = [1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 0.0]


def blurred(n_frames: int = 4, size: int = 96, clips: int = 1) -> torch.Tensor:
    """(B, T, 3, size, size) uint8 with soft edges, as a camera sees them."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(clips * n_frames, 3, size, size, generator=generator)
    soft = tv.gaussian_blur(noise, [9, 9])
    soft = (soft - soft.min()) / (soft.max() - soft.min())
    return (soft * 255).to(torch.uint8).unflatten(0, (clips, n_frames))


def draw(**changes: float) -> torch.Tensor:
    names = ("flip", "angle", "right", "down", "scale", "brightness", "contrast", "saturation")
    return torch.tensor([{**dict(zip((*names, "hue"), SAME, strict=True)), **changes}[n]
                         for n in (*names, "hue")])  # fmt: skip


def coloured(clip: torch.Tensor, one: torch.Tensor) -> torch.Tensor:
    """Recoloured by one draw, the mean taken of all pixels."""
    return recolour(clip, *colour_maps(one[None], clip.mean((1, 3, 4))))


@pytest.mark.parametrize(
    ("angle", "right", "down", "scale"),
    [(0, 0, 0, 1), (10, 0, 0, 1), (-33, 12, -7, 1), (90, 0, 0, 1), (7, 3, 5, 1.2), (0, -9, 0, 0.7)],
)
@pytest.mark.parametrize("flip", [False, True])
def test_geometry_is_torchvisions(flip: bool, angle, right, down, scale) -> None:
    clip, size = blurred(), 96
    one = draw(
        flip=-1.0 if flip else 1.0, angle=angle, right=right / size, down=down / size, scale=scale
    )
    grid = sampling_grid(inverse_maps(one[None]), (size, size))
    ours = warp(clip.float(), grid)[0].round()
    # PIL does not blend the outermost pixels with the black around them.
    inside = warp(torch.ones_like(clip, dtype=torch.float32), grid)[0] > 0.999
    for frame, result, there in zip(clip[0], ours, inside, strict=True):
        image = Image.fromarray(frame.permute(1, 2, 0).numpy())
        image = pil.hflip(image) if flip else image
        image = pil.affine(image, angle, [right, down], scale, [0.0], InterpolationMode.BILINEAR)
        wanted = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        error = (result - wanted).abs()[there]
        assert np.percentile(error, 99) <= 1
        assert error.mean() < 0.7


def test_nothing_drawn_is_nothing_changed() -> None:
    clip = blurred(clips=2)
    assert torch.equal(Augment(96).apply(clip, torch.tensor([SAME, SAME])), clip)
    assert torch.equal(Augment(96, **OFF)(clip[0]), clip[0])


def test_flip_is_the_exact_mirror_image() -> None:
    clip = blurred()[0]
    assert torch.equal(Augment(96, **{**OFF, "flip": 1.0})(clip), clip.flip(-1))


def test_brightness_contrast_saturation_by_their_formulas() -> None:
    clip = blurred().float()
    luma = (clip * torch.tensor(LUMA).view(3, 1, 1)).sum(2, keepdim=True)
    wanted = {
        "brightness": 1.3 * clip,
        "contrast": 0.7 * clip + 0.3 * luma.mean(),
        "saturation": 1.4 * clip - 0.4 * luma,
    }
    for name, factor in (("brightness", 1.3), ("contrast", 0.7), ("saturation", 1.4)):
        out = coloured(clip, draw(**{name: factor}))
        assert torch.allclose(out, wanted[name], atol=0.05), name
    together = coloured(clip, draw(brightness=1.3, contrast=0.7, saturation=1.4))
    step = 0.7 * (1.3 * clip) + 0.3 * (1.3 * luma).mean()
    grey = (step * torch.tensor(LUMA).view(3, 1, 1)).sum(2, keepdim=True)
    assert torch.allclose(together, 1.4 * step - 0.4 * grey, atol=0.05)


@pytest.mark.parametrize("hue", [-0.02, 0.02, 0.1])
def test_hue_turns_colours_and_keeps_luma_and_greys(hue: float) -> None:
    clip = blurred().float() * 0.3 + 90  # pale: nothing is clipped by the reference
    out = coloured(clip, draw(hue=hue))
    weights = torch.tensor(LUMA).view(3, 1, 1)
    assert torch.allclose((out * weights).sum(2), (clip * weights).sum(2), atol=0.05)
    grey = torch.full((1, 1, 3, 2, 2), 120.0)
    assert torch.allclose(coloured(grey, draw(hue=hue)), grey, atol=0.05)
    red, turned = torch.tensor([200.0, 60.0, 50.0]), []
    for colour in (red, coloured(red.view(1, 1, 3, 1, 1), draw(hue=hue)).flatten()):
        turned.append(colorsys.rgb_to_hsv(*(colour / 255).tolist())[0])
    moved = (turned[1] - turned[0] + 0.5) % 1 - 0.5
    assert moved * hue > 0  # the same way round as HSV, and about as far
    assert abs(moved) == pytest.approx(abs(hue), rel=0.6)


def test_each_clip_of_a_batch_has_its_own_draw() -> None:
    """What a GPU does to a batch is what a worker does to each clip."""
    augment, clips = Augment(96), blurred(clips=3)
    draws = torch.stack([augment.draw() for _ in range(3)])
    together = augment.apply(clips, draws)
    alone = [
        augment.apply(clip[None], one[None])[0] for clip, one in zip(clips, draws, strict=True)
    ]
    assert not torch.equal(draws[0], draws[1])
    assert (together.int() - torch.stack(alone).int()).abs().max() <= 1


def test_draws_stay_within_their_strengths() -> None:
    augment = Augment(96, 0.25, 20, 0.1, 0.3, 0.2, 1.5, 0.4, 0.05)
    draws = torch.stack([augment.draw() for _ in range(4000)])
    assert (draws[:, 0] < 0).float().mean() == pytest.approx(0.25, abs=0.03)
    low, high = draws.amin(0)[1:], draws.amax(0)[1:]
    wanted = [(-20, 20), (-0.1, 0.1), (-0.1, 0.1), (0.7, 1.3), (0.8, 1.2), (0, 2.5), (0.6, 1.4),
              (-0.05, 0.05)]  # fmt: skip
    for (a, b), smallest, largest in zip(wanted, low, high, strict=True):
        assert a <= smallest + 1e-6 < a + 0.02 * (b - a)
        assert b - 0.02 * (b - a) < largest <= b + 1e-6


def test_clips_of_another_size_are_resized_first() -> None:
    clip = blurred(size=64)[0]
    assert Augment(96)(clip).shape == (4, 3, 96, 96)
    with pytest.raises(ValueError, match="uint8"):
        Augment(96)(clip.float())
