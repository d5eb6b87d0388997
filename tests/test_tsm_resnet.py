"""The temporal shift against loops, TSM-ResNet18 against hooks on torchvision's ResNet-18."""

import pytest
import torch
from helpers import clips, lively
from torch import nn
from torchvision.models import resnet18

from modeling.layers import LAYERS
from tsm_resnet import TSM, causal_shift, temporal_shift


def shift_by_loop(x: torch.Tensor, n_frames: int, shift_div: int = 8) -> torch.Tensor:
    """One frame of one channel at a time, from the paper's description."""
    frames, channels = x.shape[:2]
    fold = channels // shift_div
    out = x.clone()
    for clip in range(frames // n_frames):
        for t in range(n_frames):
            for channel in range(2 * fold):
                source = t + 1 if channel < fold else t - 1
                inside = 0 <= source < n_frames
                frame = x[clip * n_frames + source, channel] if inside else 0.0
                out[clip * n_frames + t, channel] = frame
    return out


@pytest.mark.parametrize("n_frames", [1, 2, 5, 16])
@pytest.mark.parametrize("shift_div", [2, 4, 8, 64])
def test_shift_equals_the_loop(n_frames: int, shift_div: int) -> None:
    x = clips(3 * n_frames, 16, 2, 3)
    assert torch.equal(
        temporal_shift(x, n_frames, shift_div), shift_by_loop(x, n_frames, shift_div)
    )


def test_shift_directions() -> None:
    x = torch.arange(1.0, 4.0).view(3, 1, 1, 1).expand(3, 8, 1, 1)  # frame t holds t + 1
    out = temporal_shift(x, 3)[:, :, 0, 0]
    assert out[:, 0].tolist() == [2, 3, 0]
    assert out[:, 1].tolist() == [0, 1, 2]
    assert out[:, 2:].tolist() == [[1] * 6, [2] * 6, [3] * 6]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_shift_keeps_the_memory_format_and_its_input(layout: torch.memory_format) -> None:
    x = clips(8, 16, 4, 5).contiguous(memory_format=layout)
    before = x.clone()
    out = temporal_shift(x, 4)
    assert out.is_contiguous(memory_format=layout)
    assert out.stride() == x.stride()
    assert torch.equal(x, before)


def test_shift_gradient() -> None:
    x = clips(6, 8, 2, 2).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: temporal_shift(x, 3, 4), x)


def test_shift_gradient_is_the_adjoint() -> None:
    x, y = clips(10, 16, 3, 3).double().requires_grad_(), clips(10, 16, 3, 3, seed=1).double()
    shifted = temporal_shift(x, 5)
    (gradient,) = torch.autograd.grad(shifted, x, y)
    torch.testing.assert_close((shifted * y).sum(), (x * gradient).sum())


def test_parameters() -> None:
    assert sum(p.numel() for p in TSM().parameters()) == 11_180_103


@pytest.mark.parametrize("shift_place", ["blockres", "stage"])
@pytest.mark.parametrize("shift_div", [4, 8])
def test_model_equals_torchvision_with_hooks(shift_place: str, shift_div: int) -> None:
    model = lively(shift_place=shift_place, shift_div=shift_div)
    x = clips(2, 3, 3, 32, 32)
    reference = resnet18(weights=None).eval()
    reference.fc = nn.Identity()
    reference.load_state_dict(model.backbone.state_dict())
    stages = [getattr(reference, name) for name in LAYERS]
    blocks = [block.conv1 for stage in stages for block in stage]
    pixels = model.normalize(x).flatten(0, 1)
    with torch.no_grad():
        unshifted = model.head(reference(pixels))
    for module in blocks if shift_place == "blockres" else stages:
        module.register_forward_pre_hook(lambda _, args: shift_by_loop(args[0], 3, shift_div))
    with torch.no_grad():
        logits = model.head(reference(pixels))
        assert not torch.allclose(logits, unshifted, atol=1e-2)  # the shift changes the logits
        wanted = torch.stack([logits[:3].mean(0), logits[3:].mean(0)])
        torch.testing.assert_close(model(x), wanted, atol=1e-5, rtol=1e-4)


def test_places_and_divs_differ() -> None:
    x = clips(1, 4, 3, 32, 32)
    models = [lively(shift_place=place, shift_div=div) for place in ("blockres", "stage")
              for div in (4, 8)]  # fmt: skip
    with torch.no_grad():
        outputs = [model(x) for model in models]
    for number, one in enumerate(outputs):
        for other in outputs[number + 1 :]:
            assert not torch.allclose(one, other, atol=1e-4)


@pytest.mark.parametrize("shift_place", ["blockres", "stage"])
def test_the_order_of_frames_matters(shift_place: str) -> None:
    model = lively(shift_place=shift_place)
    x = clips(1, 6, 3, 32, 32)
    with torch.no_grad():
        assert not torch.allclose(model(x), model(x[:, [3, 0, 5, 1, 4, 2]]), atol=1e-4)


def test_one_model_takes_any_number_of_frames() -> None:
    model = lively()
    with torch.no_grad():
        assert [model(clips(2, t, 3, 32, 32)).shape for t in (1, 3, 8)] == [(2, 7)] * 3


def test_channels_last_weights_give_the_same_logits() -> None:
    model, x = lively(), clips(2, 4, 3, 32, 32)
    with torch.no_grad():
        wanted = model(x)
        out = model.to(memory_format=torch.channels_last)(x)
    torch.testing.assert_close(out, wanted, atol=1e-4, rtol=1e-4)


def causal_by_loop(x: torch.Tensor, n_frames: int, shift_div: int, before: torch.Tensor | None):
    """One frame of one channel at a time: nothing comes from the future."""
    out = x.clone()
    for frame in range(len(x)):
        clip, t = divmod(frame, n_frames)
        for channel in range(x.shape[1] // shift_div):
            if t:
                out[frame, channel] = x[frame - 1, channel]
            else:
                out[frame, channel] = 0.0 if before is None else before[clip, channel]
    return out


@pytest.mark.parametrize("n_frames", [1, 2, 5])
@pytest.mark.parametrize("shift_div", [2, 8])
@pytest.mark.parametrize("known", [False, True])
def test_causal_shift_equals_the_loop(n_frames: int, shift_div: int, known: bool) -> None:
    x = clips(3 * n_frames, 16, 2, 3)
    before = clips(3, 16 // shift_div, 2, 3, seed=1) if known else None
    out, after = causal_shift(x, n_frames, shift_div, before)
    assert torch.equal(out, causal_by_loop(x, n_frames, shift_div, before))
    assert torch.equal(after, x[n_frames - 1 :: n_frames, : 16 // shift_div])


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_causal_shift_keeps_the_memory_format_and_its_input(layout: torch.memory_format) -> None:
    x = clips(8, 16, 4, 5).contiguous(memory_format=layout)
    copy_of_x = x.clone()
    out, _ = causal_shift(x, 4)
    assert out.stride() == x.stride()
    assert torch.equal(x, copy_of_x)


def test_causal_shift_gradient() -> None:
    x = clips(6, 8, 2, 2).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: causal_shift(x, 3, 4)[0], x)


@torch.no_grad()
@pytest.mark.parametrize("shift_place", ["blockres", "stage"])
def test_no_frame_knows_the_future(shift_place: str) -> None:
    """Other frames from t on change the logits of t and later ones, not of earlier ones."""
    model = lively(shift_mode="causal", shift_place=shift_place)
    both = lively(shift_place=shift_place)
    x = clips(1, 12, 3, 32, 32)
    wanted, mixed = model.frame_logits(x)[0], both.frame_logits(x)[0]
    for t in (1, 6, 11):
        other = x.clone()
        other[:, t:] = clips(1, 12 - t, 3, 32, 32, seed=t)
        logits = model.frame_logits(other)[0]
        torch.testing.assert_close(logits[:, :t], wanted[:, :t], atol=1e-6, rtol=0)
        assert (logits[:, t] - wanted[:, t]).abs().max() > 1e-3
        assert (both.frame_logits(other)[0] - mixed)[
            :, t - 1
        ].abs().max() > 1e-4  # a future frame would show
    assert model.causal
    assert not both.causal


@torch.no_grad()
def test_each_frame_knows_the_past() -> None:
    model = lively(shift_mode="causal")
    x = clips(1, 8, 3, 32, 32)
    other = x.clone()
    other[:, 3] = clips(1, 3, 32, 32, seed=5)
    changed = (model.frame_logits(other)[0] - model.frame_logits(x)[0]).abs().amax(dim=2)[0]
    assert (changed[:3] == 0).all()
    assert (changed[3:] > 1e-4).all()


@torch.no_grad()
def test_a_clip_is_the_mean_of_its_frames() -> None:
    model = lively(shift_mode="causal")
    x = clips(2, 5, 3, 32, 32)
    torch.testing.assert_close(model(x), model.frame_logits(x)[0].mean(dim=1))


@torch.no_grad()
def test_in_training_another_clip_can_be_the_past() -> None:
    """As if the clips of the batch followed each other in a video that goes round and round."""
    x = clips(3, 4, 3, 32, 32)
    model = lively(shift_mode="causal", shift_buffer_prob=1.0)
    alone = model.frame_logits(x)[0]
    model.training = True  # of this module alone: the BatchNorms' statistics stay
    carried = model.frame_logits(x)[0]
    model.training = False
    video = x.flatten(0, 1).repeat(3, 1, 1, 1)[None]  # (1, 3 * 3 * 4, C, H, W)
    last_round = model.frame_logits(video)[0][0, -12:].unflatten(0, (3, 4))
    torch.testing.assert_close(carried, last_round, atol=1e-5, rtol=0)
    assert (carried - alone).abs().amax(dim=(1, 2)).min() > 1e-3
    model.shift_buffer_prob, model.training = 0.0, True
    torch.testing.assert_close(model.frame_logits(x)[0], alone)


def test_unknown_shift_modes_are_refused() -> None:
    with pytest.raises(ValueError, match="shift_mode must be bidirectional or causal"):
        TSM(shift_mode="online")
