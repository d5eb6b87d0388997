"""Normalisation equals its definition, whatever dtype the pixels come in."""

import pytest
import torch

from normalize import IMAGENET_MEAN_STD, KINETICS_MEAN_STD, Normalize


@pytest.fixture
def pixels() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (2, 3, 3, 4, 5), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("mean_std", [IMAGENET_MEAN_STD, KINETICS_MEAN_STD])
def test_equals_the_definition(pixels: torch.Tensor, mean_std: tuple) -> None:
    out = Normalize(mean_std)(pixels)
    mean, std = mean_std
    assert out.dtype == torch.float32
    for channel in range(3):
        wanted = (pixels[:, :, channel].double() / 255 - mean[channel]) / std[channel]
        torch.testing.assert_close(out[:, :, channel].double(), wanted, atol=1e-6, rtol=1e-6)


def test_uint8_and_float_agree(pixels: torch.Tensor) -> None:
    normalize = Normalize(IMAGENET_MEAN_STD)
    torch.testing.assert_close(normalize(pixels), normalize(pixels.float() / 255))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_floats_keep_their_dtype(pixels: torch.Tensor, dtype: torch.dtype) -> None:
    normalize = Normalize(IMAGENET_MEAN_STD)
    out = normalize((pixels.double() / 255).to(dtype))
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), normalize(pixels), atol=0.05, rtol=0.02)


def test_constants_are_not_in_the_checkpoint() -> None:
    normalize = Normalize(KINETICS_MEAN_STD)
    assert not normalize.state_dict()
    assert not list(normalize.parameters())
