"""Layers: normalisation equals its definition; gradient checkpointing changes no number."""

from pathlib import Path

import pytest
import torch
from helpers import TINY_FLAGS, make_model
from torch import nn

from config import TrainConfig
from modeling import layers
from modeling.layers import (
    IMAGENET_MEAN_STD,
    KINETICS_MEAN_STD,
    Normalize,
    checkpointed,
    enable_gradient_checkpointing,
)
from models import MODELS, freeze, keep_frozen_in_eval
from train import main
from training.checks import refuse_changes


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


VIVIT = {"n_frames": 4, "image_size": 16, "patch_size": 4, "dim": 24, "depth": 2, "dim_head": 8}
TIMESFORMER = {"n_frames": 4, "image_size": 16}
# fmt: off
CASES = {
    "tsm_resnet": ("tsm_resnet", {"dropout": 0.3}, False),
    "tsm_resnet, shift before the stages": ("tsm_resnet", {"shift_place": "stage"}, False),
    "causal tsm_resnet": ("tsm_resnet", {"shift_mode": "causal", "shift_buffer_prob": 0.5}, False),
    "cnnlstm": ("cnnlstm", {"lstm_hidden": 16, "lstm_layers": 2, "dropout": 0.3}, False),
    "r2plus1d": ("r2plus1d", {"dropout": 0.3}, False),
    "vivit": ("vivit", {**VIVIT, "dropout": 0.2, "drop_path": 0.5}, False),
    "vivit, bf16": ("vivit", {**VIVIT, "dropout": 0.2, "drop_path": 0.5}, True),
    "timesformer": ("timesformer", {**TIMESFORMER, "dropout": 0.2, "drop_path": 0.5}, False),
    "video_swin": ("video_swin", {"dropout": 0.2, "drop_path": 0.5}, False),
    "mvit": ("mvit", {"dropout": 0.2, "drop_path": 0.5}, False),
}
# fmt: on
every_model = pytest.mark.parametrize("name", MODELS)


def built(name: str, options: dict, recomputed: bool) -> nn.Module:
    torch.manual_seed(0)
    model = make_model(name, 7, **options).train()
    if recomputed:
        enable_gradient_checkpointing(model)
    return model


def clips() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (2, 4, 3, 16, 16), dtype=torch.uint8, generator=generator)


def step(model: nn.Module, bf16: bool = False) -> torch.Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
        logits = model(clips())
    nn.functional.cross_entropy(logits.float(), torch.tensor([0, 1])).backward()
    return logits.detach()


@pytest.mark.parametrize(("name", "options", "bf16"), CASES.values(), ids=CASES)
def test_everything_is_the_same_bit_for_bit(name: str, options: dict, bf16: bool) -> None:
    """Two steps: the statistics of the second start from those of the first."""
    ends = []
    for recomputed in (False, True):
        model = built(name, options, recomputed)
        logits = [step(model, bf16) for _ in range(2)]
        gradients = {key: parameter.grad for key, parameter in model.named_parameters()}
        ends.append((logits, gradients, dict(model.named_buffers()), torch.rand(3)))
    (logits, gradients, buffers, draws), (logits2, gradients2, buffers2, draws2) = ends
    assert all(torch.equal(one, two) for one, two in zip(logits, logits2, strict=True))
    assert torch.equal(draws, draws2)  # the random generator has the same state
    for key, gradient in gradients.items():
        assert torch.equal(gradient, gradients2[key]), key
    for key, buffer in buffers.items():
        assert torch.equal(buffer, buffers2[key]), key
        if key.endswith("num_batches_tracked"):
            assert buffer == 2


@every_model
def test_most_activations_are_not_kept(name: str) -> None:
    kept = []
    for recomputed in (False, True):
        sizes: dict[int, int] = {}

        def keep(tensor: torch.Tensor, sizes: dict[int, int] = sizes) -> torch.Tensor:
            if not isinstance(tensor, nn.Parameter):
                storage = tensor.untyped_storage()
                sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        model = built(name, {**CASES[name][1], "dropout": 0.0}, recomputed)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model(clips())
        kept.append(sum(sizes.values()))
    assert kept[1] < kept[0] / 2.5


@pytest.fixture
def recomputations(monkeypatch: pytest.MonkeyPatch) -> list:
    """The functions that are handed to PyTorch for recomputation."""
    handed: list = []

    def checkpoint(function, *inputs, **settings):
        handed.append(function)
        return original(function, *inputs, **settings)

    original = layers.checkpoint
    monkeypatch.setattr(layers, "checkpoint", checkpoint)
    return handed


@every_model
def test_recomputed_in_training_only(name: str, recomputations: list) -> None:
    model = built(name, CASES[name][1], recomputed=True)
    plain = built(name, CASES[name][1], recomputed=False)
    assert model.state_dict().keys() == plain.state_dict().keys()
    plain(clips())
    with torch.no_grad():
        model(clips())
    model.eval()
    model(clips())
    assert not recomputations
    model.train()
    model(clips())
    # blocks, those of Video Swin with three mergings; or the stem and four layers
    parts = {"vivit": 4, "timesformer": 12, "video_swin": 12 + 3, "mvit": 16}.get(name, 5)
    assert len(recomputations) == parts


@every_model
def test_frozen_stages_are_not_recomputed(name: str, recomputations: list) -> None:
    model = built(name, CASES[name][1], recomputed=True)
    up_to = list(model.stages())[2]
    freeze(model, up_to)
    keep_frozen_in_eval(model)
    step(model)
    # Of Video Swin two layers with 6 and 2 blocks and a merging between them.
    assert len(recomputations) == {"timesformer": 10, "video_swin": 6 + 1 + 2, "mvit": 14}.get(
        name, 2
    )
    for number, modules in enumerate(model.stages().values()):
        for module in modules:
            grads = [parameter.grad is not None for parameter in module.parameters()]
            assert all(grads) if number > 2 else not any(grads)


def test_a_stage_may_be_a_function_of_several_modules() -> None:
    """The statistics of all given modules are restored."""
    torch.manual_seed(0)
    one, two = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    holder = nn.ModuleList([one, two])
    holder.stages = lambda: {"both": [one, two]}
    enable_gradient_checkpointing(holder)
    x = torch.randn(8, 3, requires_grad=True)
    checkpointed([one, two], lambda x, scale: scale * two(one(x).tanh()), x, 2.0).sum().backward()
    assert one.num_batches_tracked == two.num_batches_tracked == 1
    torch.testing.assert_close(one.running_mean, 0.1 * x.mean(0).detach())
    assert x.grad.isfinite().all()


def test_a_failed_recomputation_leaves_the_statistics_alone() -> None:
    norm = nn.BatchNorm1d(3)
    norm.recomputed = True
    calls = []

    def stage(x: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        y = norm(x)
        if len(calls) > 1:
            raise RuntimeError("out of memory")
        return y.tanh()

    out = checkpointed([norm], stage, torch.randn(8, 3, requires_grad=True))
    mean = norm.running_mean.clone()
    with pytest.raises(RuntimeError, match="out of memory"):
        out.sum().backward()
    assert torch.equal(norm.running_mean, mean)
    assert norm.num_batches_tracked == 1


def test_a_training_recomputes_and_may_be_resumed_without(
    recomputations: list, tiny_data: Path, tmp_path: Path, run_main
) -> None:
    flags = ["--epochs", 1, "--gradient-checkpointing"]
    run_main(main, "--data-root", tiny_data, *TINY_FLAGS, *flags, cwd=tmp_path)
    assert len(recomputations) == 3 * 8  # batches of the epoch, blocks
    refuse_changes(TrainConfig(gradient_checkpointing=True), TrainConfig())


def test_together_with_compile_it_is_refused(tiny_data, tmp_path, mistake) -> None:
    flags = ["--data-root", tiny_data, *TINY_FLAGS, "--compile", "--gradient-checkpointing"]
    assert "do not go together" in mistake(main, *flags, cwd=tmp_path).stderr
