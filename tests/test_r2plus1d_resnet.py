"""R(2+1)D-18: torchvision's network behind our contract."""

import pytest
import torch

from modeling.layers import KINETICS_MEAN_STD
from r2plus1d_resnet import R2Plus1DResNet18


@pytest.fixture(scope="module")
def model() -> R2Plus1DResNet18:
    torch.manual_seed(0)
    return R2Plus1DResNet18(7).eval()


def clips(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0))


def test_parameters(model: R2Plus1DResNet18) -> None:
    assert sum(p.numel() for p in model.parameters()) == 31_303_716


def test_equals_torchvision_on_permuted_kinetics_pixels(model: R2Plus1DResNet18) -> None:
    x = clips(2, 4, 3, 24, 32)  # T, H and W differ: a wrong permutation cannot pass
    mean, std = (torch.tensor(values).view(1, 1, 3, 1, 1) for values in KINETICS_MEAN_STD)
    with torch.no_grad():
        features = model.backbone(((x - mean) / std).permute(0, 2, 1, 3, 4))
        assert features.shape == (2, 512)
        wanted = features @ model.head.weight.T + model.head.bias
        torch.testing.assert_close(model(x), wanted, atol=1e-4, rtol=1e-4)


def test_the_order_of_frames_matters(model: R2Plus1DResNet18) -> None:
    x = clips(1, 8, 3, 32, 32)
    with torch.no_grad():
        assert not torch.allclose(model(x), model(x[:, [5, 0, 7, 2, 1, 6, 3, 4]]), atol=1e-4)


def test_dropout_is_before_the_head(model: R2Plus1DResNet18) -> None:
    dropping = R2Plus1DResNet18(3, dropout=1.0).train()  # everything dropped: the bias is left
    out = dropping(clips(2, 4, 3, 32, 32))
    torch.testing.assert_close(out, dropping.head.bias.expand(2, 3))
