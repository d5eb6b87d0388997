"""The picture that replaces what is deleted: by a slow reference, its borders and its dtypes."""

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from explanation.baseline import blurred_still


@pytest.mark.parametrize(("height", "width"), [(16, 16), (24, 40), (33, 20)])
def test_it_is_the_mean_over_time_blurred_with_an_eighth_of_the_side(
    height: int, width: int
) -> None:
    clips = torch.rand(2, 3, 3, height, width, dtype=torch.float64)
    still = blurred_still(clips)
    assert still.shape == clips.shape
    sigma = min(height, width) / 8
    for clip, picture in zip(clips, still[:, 0], strict=True):
        for channel in range(3):
            mean = clip[:, channel].mean(0).numpy()
            expected = gaussian_filter(mean, sigma, mode="mirror", radius=int(np.ceil(3 * sigma)))
            assert np.allclose(picture[channel], expected, rtol=0, atol=1e-12)
    assert torch.equal(still, still[:, :1].expand_as(still))


def test_motion_and_details_are_gone_but_not_the_light() -> None:
    clips = torch.zeros(1, 4, 3, 32, 32)
    for time in range(4):
        clips[0, time, :, :, time::4] = 1  # stripes that move
    still = blurred_still(clips)
    assert (still.sum() / clips.sum()).item() == pytest.approx(1, abs=1e-5)
    assert still.std().item() < 1e-5
    clips[0, :, :, :16] = 0  # a dark half stays dark
    still = blurred_still(clips)[0, 0, 0].mean(dim=1)
    assert still[0] < 0.01
    assert still[-1] > 0.24


def test_dtypes_and_range() -> None:
    clips = torch.randint(0, 256, (2, 3, 3, 16, 16), dtype=torch.uint8)
    still = blurred_still(clips)
    assert still.dtype == torch.float32
    assert torch.allclose(still.double(), blurred_still(clips.double() / 255), rtol=0, atol=1e-6)
    white = blurred_still(torch.full((1, 2, 3, 56, 56), 255, dtype=torch.uint8))
    assert white.max() <= 1
    assert torch.allclose(white, torch.ones(()))


def test_tiny_pictures_are_blurred_as_far_as_they_can_be_reflected() -> None:
    assert torch.equal(
        blurred_still(torch.full((1, 2, 3, 1, 1), 0.5)).unique(), torch.tensor([0.5])
    )
    assert blurred_still(torch.rand(1, 2, 3, 2, 5)).shape == (1, 2, 3, 2, 5)
