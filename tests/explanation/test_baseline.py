"""The picture that replaces what is deleted: by scipy's filter, its light and its dtypes."""

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from explanation.baseline import Reference, blurred_still, reference_clips
from explanation.occlusion import as_dtype
from modeling.frame_encoder import decode_motion


@pytest.mark.parametrize(("height", "width"), [(16, 16), (24, 40), (33, 20)])
def test_it_is_the_mean_over_time_blurred_with_an_eighth_of_the_side(
    height: int, width: int
) -> None:
    clips = torch.rand(2, 3, 3, height, width)
    still = blurred_still(clips)
    assert still.shape == clips.shape
    radius = round(3 * height / 8), round(3 * width / 8)
    for clip, picture in zip(clips, still[:, 0], strict=True):
        for channel in range(3):
            mean = clip[:, channel].double().mean(0).numpy()
            expected = gaussian_filter(mean, (height / 8, width / 8), mode="mirror", radius=radius)
            assert np.allclose(picture[channel], expected, rtol=0, atol=1e-6)
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


@pytest.mark.parametrize("reference", ["still", "blurred"])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_measured_motion_is_none_in_a_still_picture(
    reference: Reference, dtype: torch.dtype
) -> None:
    """Also where the camera moves all the time, and in what occlusion gives to the model."""
    clips = torch.randint(0, 256, (2, 4, 5, 16, 16), dtype=torch.uint8)
    clips[:, :, 3:] = 200
    clips = clips if dtype == torch.uint8 else clips / 255
    picture = reference_clips(clips, reference)
    assert (decode_motion(picture[:, :, 3:]).abs() < 1e-6).all()
    assert (decode_motion(as_dtype(picture, dtype)[:, :, 3:]).abs() < 1e-6).all()
    colours = reference_clips(clips[:, :, :3], reference)
    torch.testing.assert_close(picture[:, :, :3], colours)
    assert colours.std() > 0


def test_bytes_are_scaled() -> None:
    clips = torch.randint(0, 256, (2, 3, 3, 16, 16), dtype=torch.uint8)
    still = blurred_still(clips)
    assert still.dtype == torch.float32
    torch.testing.assert_close(still, blurred_still(clips.float() / 255), rtol=0, atol=1e-6)


def test_tiny_pictures_are_blurred_as_far_as_they_can_be_reflected() -> None:
    single = blurred_still(torch.full((1, 2, 3, 1, 1), 0.5))
    assert torch.equal(single.unique(), torch.tensor([0.5]))
    assert blurred_still(torch.rand(1, 2, 3, 2, 5)).shape == (1, 2, 3, 2, 5)
