"""Occlusion and integrated gradients against captum, causality, and the choice of a method."""

import re

import captum.attr
import pytest
import torch
from helpers import ROOT, make_model
from torch import nn

from explanation import integrated_gradients as ig
from explanation.baseline import blur, blurred_still, reference_clips, still
from explanation.methods import (
    PASSED,
    advice,
    class_score,
    default_method,
    explain,
    explain_frames,
    require_method,
)
from explanation.occlusion import occlusion, spatial_occlusion, temporal_occlusion
from models import MODELS
from utils.errors import UserError


def random_clip(t: int = 8, size: int = 28) -> torch.Tensor:
    """Smooth frames `(T, 3, H, W)` in [0, 1]."""
    generator = torch.Generator().manual_seed(0)
    return blur(torch.rand(t, 3, size, size, generator=generator), 0.05).contiguous()


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return make_model("tsm_resnet").eval()


def test_occlusion_in_time_equals_captum(model: nn.Module) -> None:
    clip = random_clip()  # of 8 frames, which are replaced by those two earlier and two later
    frame = (1, *clip.shape[1:])
    earlier, later = (
        captum.attr.Occlusion(model).attribute(
            clip[None], frame, frame, clip.roll(shift, 0)[None], target=2
        )[0, :, 0, 0, 0]
        for shift in (2, -2)
    )
    expected = (earlier + later) / 2
    expected[:2], expected[6:] = later[:2], earlier[6:]
    relevance = temporal_occlusion(model, clip, class_score(torch.tensor([2])))
    torch.testing.assert_close(relevance, expected.float(), rtol=0, atol=1e-5)
    assert relevance.abs().max() > 1e-3


def test_the_maps_of_occlusion_add_up_to_the_parts(model: nn.Module) -> None:
    """Also where frames speak against the class in sum."""
    clip, score = random_clip(), class_score(torch.tensor([2]))
    relevance = occlusion(model, clip, score)
    frames, parts = temporal_occlusion(model, clip, score), spatial_occlusion(model, clip, score)
    torch.testing.assert_close(relevance.frames[0], frames)
    torch.testing.assert_close(relevance.maps[0].sum(0), parts)
    assert (frames < 0).any() and (relevance.maps[0, frames <= 0] == 0).all()


def test_a_single_frame_is_compared_with_the_still_picture(model: nn.Module) -> None:
    clip, score = random_clip(t=1), class_score(torch.tensor([2]))
    with torch.no_grad():
        expected = score(model(clip[None])) - score(model(blurred_still(clip[None])))
    torch.testing.assert_close(temporal_occlusion(model, clip, score), expected)


@pytest.mark.parametrize("reference", ["still", "blurred"])
def test_occlusion_in_space_equals_captum(model: nn.Module, reference: str) -> None:
    clip = random_clip()
    part = (8, 3, 4, 4)  # 7 x 7 parts of 28 pixels
    still = reference_clips(clip[None], reference)
    attributions = captum.attr.Occlusion(model).attribute(clip[None], part, part, still, target=2)
    relevance = spatial_occlusion(model, clip, class_score(torch.tensor([2])), reference)
    torch.testing.assert_close(
        relevance, attributions[0, 0, 0, ::4, ::4].float(), rtol=0, atol=1e-5
    )
    assert relevance.abs().max() > 1e-3


@pytest.mark.parametrize("reference", ["still", "blurred"])
def test_integrated_gradients_equal_captum_and_are_complete(
    model: nn.Module, reference: str
) -> None:
    clip, score = random_clip(), class_score(torch.tensor([2]))
    still = reference_clips(clip[None], reference)
    expected = captum.attr.IntegratedGradients(model, multiply_by_inputs=True).attribute(
        clip[None], still, target=2, n_steps=32, method="gausslegendre"
    )
    attributions = ig.attribute(model, clip, still[0], score, 32)
    torch.testing.assert_close(attributions, expected[0].float(), rtol=0, atol=1e-5)
    maps = ig.integrated_gradients(model, clip, score, reference).maps
    with torch.no_grad():
        difference = (model(clip[None]) - model(still))[0, 2]
    assert abs(maps.sum() - difference) <= 0.01 * max(1, abs(difference))


def test_incomplete_gradients_are_told(caplog: pytest.LogCaptureFixture) -> None:
    class Steps(nn.Module):
        def forward(self, clips: torch.Tensor) -> torch.Tensor:  # flat between its steps
            top = clips[:, :, :, :2].mean((1, 2, 3, 4))[:, None]
            return (top * 10).round() + 0 * top

    clip = torch.zeros(3, 3, 8, 8)
    clip[0, :, :2] = 1
    maps = ig.integrated_gradients(Steps(), clip, class_score(torch.tensor([0]))).maps
    assert not maps.any()
    assert "add up to 0 instead of" in caplog.text


def test_the_still_picture_keeps_what_stays() -> None:
    clips = torch.full((1, 5, 3, 8, 8), 0.2)
    clips[:, :, :, :2] = 0.9  # a logo
    clips[:, 1:3, :, 4:6] = 0.7  # something that comes and goes
    expected = torch.full((1, 5, 3, 8, 8), 0.2)
    expected[:, :, :, :2] = 0.9
    torch.testing.assert_close(still(clips), expected)
    torch.testing.assert_close(
        reference_clips((clips * 255).byte(), "still"), expected, atol=4e-3, rtol=0
    )
    alone = clips[:, :1]  # a single frame would be its own median
    torch.testing.assert_close(reference_clips(alone, "still"), blurred_still(alone))


@pytest.mark.parametrize("method", ["gradcam++", "occlusion", "integrated-gradients"])
def test_later_frames_have_no_relevance_in_a_causal_model(method: str) -> None:
    torch.manual_seed(0)
    model = make_model("tsm_resnet", shift_mode="causal").eval()
    model.forward = lambda clips: model.frame_logits(clips)[0][:, 3]  # the answer at frame 3
    clip = random_clip(t=8, size=32)[None]
    relevance = explain(model, clip, torch.tensor([1]), method)
    assert (relevance.frames[0, 4:] == 0).all() and (relevance.maps[0, 4:] == 0).all()
    assert (relevance.frames[0, :4] != 0).any()


@pytest.mark.parametrize("method", ["gradcam++", "occlusion", "integrated-gradients"])
def test_one_class_and_not_another(model: nn.Module, method: str) -> None:
    """What speaks for 1 against 2 speaks against 2 compared with 1."""
    clips = random_clip(size=32)[None]
    one, other = torch.tensor([1]), torch.tensor([2])
    forward = explain(model, clips, one, method, other).frames
    backward = explain(model, clips, other, method, one).frames
    if method == "gradcam++":  # it shows what speaks for a class alone
        assert not torch.equal(forward, backward)
    else:
        torch.testing.assert_close(forward, -backward, rtol=1e-3, atol=1e-5)
    plain = explain(model, clips, one, method).frames
    assert not torch.allclose(forward, plain)


def test_a_class_compared_with_itself_is_explained_alone() -> None:
    logits = torch.tensor([[1.0, 2.0, 4.0], [1.0, 2.0, 4.0]])
    score = class_score(torch.tensor([1, 2]), torch.tensor([2, 2]))
    assert score(logits).tolist() == [-2, 4]
    one = class_score(torch.tensor([2]), torch.tensor([2]))  # one class for all rows
    assert one(logits).tolist() == [4, 4]


@pytest.mark.parametrize("method", ["gradcam++", "occlusion", "integrated-gradients"])
@pytest.mark.parametrize("against", [None, torch.tensor([2, 0])])
def test_frames_alone_are_those_of_the_whole_explanation(
    model: nn.Module, method: str, against: torch.Tensor | None
) -> None:
    clips = torch.stack([random_clip(4, 32), 1 - random_clip(4, 32)])
    targets = torch.tensor([1, 2])
    expected = explain(model, clips, targets, method, against).frames
    found = explain_frames(model, clips, targets, method, against)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert not found.requires_grad


def test_pixels_as_bytes_and_as_fractions_are_the_same(model: nn.Module) -> None:
    clips = (random_clip(size=32)[None] * 255).byte()
    for method in ("gradcam++", "occlusion", "integrated-gradients"):
        as_bytes = explain(model, clips, torch.tensor([1]), method).frames
        as_fractions = explain(model, clips / 255, torch.tensor([1]), method).frames
        # bytes are rounded where pixels are replaced
        torch.testing.assert_close(as_bytes, as_fractions, rtol=0.1, atol=2e-3)


@pytest.mark.parametrize("name", MODELS)
def test_methods_of_each_model(name: str) -> None:
    model = make_model(name, n_frames=4, image_size=32)
    require_method(model, default_method(name))
    assert default_method(name, of_class=True) != "rollout"
    for method in PASSED.get(name, ()):
        require_method(model, method)
        assert advice(name, method) == []
    (line,) = advice(name, "integrated-gradients")  # passed nowhere
    assert line.startswith("warning: ")
    for method in ("gradcam++", "occlusion", "integrated-gradients"):
        require_method(model, method)
    if name in ("vivit", "timesformer"):
        require_method(model, "rollout")
        with pytest.raises(UserError, match="same for all classes"):
            clips = torch.zeros(1, 4, 3, 32, 32, dtype=torch.uint8)
            explain(model, clips, torch.tensor([0]), "rollout", torch.tensor([1]))
    else:
        with pytest.raises(UserError, match="--method gradcam"):
            require_method(model, "rollout")


def test_what_passed_is_what_the_results_say() -> None:
    page = (ROOT / "docs" / "results" / "explanations.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \|[^|]*\| `([\w+-]+)` \|.*\| (yes|no) \|$", page, re.M)
    assert len(rows) >= 14
    passed: dict[str, list[str]] = {name: [] for name, _, _ in rows}
    for name, method, answer in rows:
        passed[name] += [method] * (answer == "yes")
    assert {name: list(methods) for name, methods in PASSED.items()} == passed
