"""A prepared model gives the model's own logits, and leaves the model alone."""

import copy

import pytest
import torch
from helpers import make_model
from torch import nn

from modeling.features import last_layer, per_clip, recorded_features
from modeling.inference import (
    NotFiniteError,
    fold_batchnorms,
    pack_convolutions,
    prepare_for_inference,
    require_finite,
)
from models import MODELS
from utils.errors import UserError

CPU = torch.device("cpu")
BATCHNORMS = {"tsm_resnet": 20, "cnnlstm": 20, "r2plus1d": 37}  # the others have none


def trained(name: str, n_frames: int = 8, size: int = 64) -> nn.Module:
    """A model whose BatchNorms have statistics and weights worth folding."""
    torch.manual_seed(0)
    model = make_model(name, 7, n_frames=n_frames, image_size=size).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm3d):
            nn.init.uniform_(module.running_mean, -0.3, 0.3)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.3, 0.3)
    return model


@pytest.fixture(scope="module")
def clips() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (2, 8, 3, 64, 64), dtype=torch.uint8, generator=generator)


@pytest.fixture(scope="module")
def small() -> torch.Tensor:
    """One small clip: without units for bf16 a CPU takes 20 s for a larger one in R(2+1)D."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (1, 4, 3, 32, 32), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("name", MODELS)
@torch.inference_mode()
def test_fp32_logits_are_the_models_own(name: str, clips: torch.Tensor) -> None:
    model = trained(name)
    wanted = model(clips)
    logits = prepare_for_inference(model, CPU)(clips)
    assert logits.dtype == torch.float32
    # 1e-5 of logits of about 1; these random BatchNorms make some of them ten times as large
    assert (logits - wanted).abs().max() < 1e-5 * max(1, wanted.abs().max())


def in_bf16(model: nn.Module) -> nn.Module:
    """The model in bf16, if this CPU has an LSTM in bf16."""
    try:
        return prepare_for_inference(model, CPU, torch.bfloat16)
    except UserError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("name", MODELS)
@torch.inference_mode()
def test_bf16_is_close_and_stays_bf16(name: str, small: torch.Tensor) -> None:
    model = trained(name, 4, 32)
    wanted = model(small)
    fast = in_bf16(model)
    assert {parameter.dtype for parameter in fast.parameters()} == {torch.bfloat16}
    logits = fast(small)
    assert logits.dtype == torch.bfloat16
    assert (logits.float() - wanted).abs().max() < 0.05 * wanted.abs().max()


@pytest.mark.parametrize("name", MODELS)
def test_the_model_itself_is_left_alone(name: str, small: torch.Tensor) -> None:
    model = trained(name, 4, 32).train()
    before = copy.deepcopy(model.state_dict())
    with torch.inference_mode():
        in_bf16(model)(small)
    assert model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    model(small).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("name", MODELS)
def test_every_batchnorm_is_folded(name: str) -> None:
    model = trained(name)
    assert fold_batchnorms(model) == BATCHNORMS.get(name, 0)
    kinds = {type(module) for module in model.modules()}
    assert not kinds & {nn.BatchNorm2d, nn.BatchNorm3d}


@pytest.mark.parametrize("name", MODELS)
@torch.inference_mode()
def test_features_are_the_mean_of_what_the_classifier_gets(name: str) -> None:
    """For TSM over its frames: the classifier of the mean gives the mean logits; it is linear."""
    generator = torch.Generator().manual_seed(1)
    clips = torch.randint(0, 256, (6, 4, 3, 32, 32), dtype=torch.uint8, generator=generator)
    model = prepare_for_inference(trained(name, 4, 32), CPU)
    with recorded_features(model) as newest:
        logits = model(clips)
    features = per_clip(newest[0], len(clips))
    classifier = last_layer(model)
    assert features.shape == (6, classifier.in_features)
    wanted = classifier(features.float())
    torch.testing.assert_close(wanted, logits, atol=1e-4, rtol=1e-4)
    newest.clear()
    model(clips[:1])
    assert not newest  # nothing is recorded outside the block


class FixedLength(nn.Module):
    """An own model that takes clips of 4 frames only."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.head = nn.Linear(16, 2)

    def forward(self, clips: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.conv(clips.flatten(0, 1).float())).mean((2, 3))
        return self.head(x.unflatten(0, clips.shape[:2]).flatten(1))


@torch.inference_mode()
def test_a_model_that_takes_clips_of_one_length_only_is_left_unfolded(small: torch.Tensor) -> None:
    model = FixedLength().eval()
    assert fold_batchnorms(model) == 0
    torch.testing.assert_close(prepare_for_inference(model, CPU)(small), model(small))


class Unusual(nn.Module):
    """A BatchNorm before its convolution, and a convolution whose output goes two ways."""

    def __init__(self) -> None:
        super().__init__()
        self.first_norm = nn.BatchNorm2d(3)
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm_a = nn.BatchNorm2d(4)
        self.norm_b = nn.BatchNorm2d(4)

    def forward(self, clips: torch.Tensor) -> torch.Tensor:
        x = self.conv(self.first_norm(clips.flatten(0, 1).float()))
        return (self.norm_a(x) - self.norm_b(x)).mean((2, 3))


@torch.inference_mode()
def test_what_cannot_be_folded_is_not(clips: torch.Tensor) -> None:
    torch.manual_seed(0)
    model = Unusual().eval()
    nn.init.uniform_(model.first_norm.running_mean, -0.3, 0.3)
    nn.init.uniform_(model.norm_a.running_var, 0.5, 2.0)
    wanted = model(clips)
    fast = prepare_for_inference(model, CPU)
    assert isinstance(fast.norm_a, nn.BatchNorm2d)
    assert torch.allclose(fast(clips), wanted, rtol=1e-6)


class OtherUses(nn.Module):
    """Convolutions whose BatchNorm is not all that follows them."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.conv, self.norm, self.relu = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU(True)

    def forward(self, clips: torch.Tensor) -> torch.Tensor:
        x = self.conv(clips.flatten(0, 1).float())
        if self.kind == "skip":  # as in networks with pre-activation
            return x + self.norm(x)
        if self.kind == "list":
            return torch.cat([self.norm(x), x], 1)
        if self.kind == "relu in place":  # which gives back the same tensor
            return self.norm(self.relu(x))
        return self.norm(x) + self.conv(x)  # "conv twice"


@pytest.mark.parametrize("kind", ["skip", "list", "relu in place", "conv twice"])
@torch.no_grad()
def test_a_convolution_that_something_else_needs_is_not_folded(kind: str) -> None:
    model = OtherUses(kind).eval()
    nn.init.uniform_(model.norm.running_mean, -0.3, 0.3)
    nn.init.uniform_(model.norm.running_var, 0.5, 2.0)
    clips = torch.rand(1, 2, 3, 8, 8)
    wanted = model(clips)
    assert fold_batchnorms(model) == 0
    assert torch.equal(model(clips), wanted)


@torch.inference_mode()
@pytest.mark.parametrize("name", ["tsm_resnet", "cnnlstm"])
def test_packed_convolutions_give_the_same(name: str) -> None:
    torch.manual_seed(0)
    model = prepare_for_inference(make_model(name, 3), CPU)
    packed = copy.deepcopy(model)
    assert pack_convolutions(packed) == 20
    for size, frames in ((32, 4), (48, 2)):  # the second with weights packed for the first
        clips = torch.randint(0, 256, (1, frames, 3, size, size), dtype=torch.uint8)
        torch.testing.assert_close(packed(clips), model(clips), atol=1e-5, rtol=1e-5)


def test_what_cannot_be_packed_stays() -> None:
    half = prepare_for_inference(make_model("tsm_resnet", 3), CPU, torch.bfloat16)
    assert pack_convolutions(half) == 0
    odd = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3, padding="same"),
        torch.nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"),
    )
    assert pack_convolutions(odd) == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_outputs_that_are_not_finite_are_refused(value: float) -> None:
    outputs = torch.zeros(2, 3)
    assert require_finite(outputs) is outputs
    outputs[1, 2] = value
    with pytest.raises(NotFiniteError, match="not finite: use --precision fp32"):
        require_finite(outputs)
