"""Grad-CAM++: the paper's equations, torchcam, and where the maps of each model lie."""

import itertools

import pytest
import torch
from helpers import make_model
from torch import nn
from torchcam.methods import GradCAMpp

from explanation.gradcam import _at_frames, gradcam_plus_plus, last_layers, weighted_maps
from explanation.methods import class_score
from modeling.inference import prepare_for_inference
from models import MODELS
from utils.errors import UserError


def random_clips(seed: int = 0, n: int = 2, t: int = 8, size: int = 64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (n, t, 3, size, size), generator=generator, dtype=torch.uint8)


def slow_weighted_maps(maps: torch.Tensor, gradients: torch.Tensor) -> torch.Tensor:
    """Equations 5, 6 and 19 of the paper, one position after another, in double precision."""
    b, c, *size = maps.shape
    result = torch.zeros(b, *size, dtype=torch.float64)
    positions = list(itertools.product(*map(range, size)))
    for i, k in itertools.product(range(b), range(c)):
        a, g = maps[i, k].double(), gradients[i, k].double()
        weight = 0.0
        for p in positions:
            denominator = 2 * g[p] ** 2 + sum(a[q] for q in positions) * g[p] ** 3
            if g[p] > 0:
                weight += g[p] ** 2 / denominator * g[p]
        for p in positions:
            result[i][p] += weight * a[p]
    return result.clamp(min=0)


def test_the_paper_s_equations_over_space_and_time() -> None:
    generator = torch.Generator().manual_seed(0)
    maps = torch.randn(2, 5, 3, 2, 4, generator=generator).relu()
    gradients = torch.randn(2, 5, 3, 2, 4, generator=generator)
    expected = slow_weighted_maps(maps, gradients)
    torch.testing.assert_close(weighted_maps(maps, gradients).double(), expected)
    assert expected.max() > 0.1


def test_tiny_gradients_do_not_vanish() -> None:
    """A score that is nearly certain has gradients whose square is zero in fp32."""
    maps, gradients = torch.ones(1, 1, 1, 1, 2), torch.full((1, 1, 1, 1, 2), 1e-30)
    assert weighted_maps(maps, gradients).min() > 0


class PaperGradCAMpp(GradCAMpp):
    """torchcam's Grad-CAM++ with the paper's alpha. torchcam 0.5.0 divides a copy, so that its
    alpha is the squared gradient, and sums the wrong gradients in the denominator."""

    def _get_weights(self, class_idx: int, scores: torch.Tensor, **kwargs: object) -> list:
        self._backprop(scores, class_idx, **kwargs)
        weights = []
        for g, a in zip(self.hook_g, self.hook_a, strict=True):
            total = a.flatten(2).sum(-1)[(...,) + (None,) * (a.ndim - 2)]
            alpha = torch.where(g > 0, g**2 / (2 * g**2 + g**3 * total), 0)
            weights.append((alpha * g.relu()).flatten(2).sum(-1))
        return weights


def test_torchcam_on_maps_of_space_and_time() -> None:
    torch.manual_seed(0)
    model = make_model("r2plus1d").eval()
    clips = random_clips(n=1, size=32)
    with PaperGradCAMpp(model, model.backbone.layer4) as cam:
        scores = model(clips)
        (expected,) = cam(class_idx=3, scores=scores, normalized=False)
    maps = gradcam_plus_plus(model, clips, class_score(torch.tensor([3]))).maps
    torch.testing.assert_close(maps[:, 0], expected[:, 0], rtol=1e-5, atol=1e-5 * expected.max())
    assert expected.max() > 0


def test_torchcam_on_frames() -> None:
    """With one frame per clip, the maps of a 2D CNN are those of an image."""
    torch.manual_seed(0)
    model = make_model("tsm_resnet").eval()
    clips = random_clips(n=1, t=1)
    with PaperGradCAMpp(model, model.backbone.layer4[-1]) as cam:
        (expected,) = cam(class_idx=3, scores=model(clips), normalized=False)
    maps = gradcam_plus_plus(model, clips, class_score(torch.tensor([3]))).maps
    torch.testing.assert_close(maps[:, 0], expected, rtol=1e-5, atol=1e-5 * expected.max())
    assert expected.max() > 0


def test_torchcam_itself_loses_the_division() -> None:
    """When this fails, torchcam has been mended, and PaperGradCAMpp can go."""
    torch.manual_seed(0)
    model = make_model("r2plus1d").eval()
    with GradCAMpp(model, model.backbone.layer4) as cam:
        cam._backprop(model(random_clips(n=1, size=32)), 3)
        g, a = cam.hook_g[0].clone(), cam.hook_a[0].clone()
    with GradCAMpp(model, model.backbone.layer4) as cam:
        weights = cam._get_weights(3, model(random_clips(n=1, size=32)))[0]
    torch.testing.assert_close(weights, (g**2 * g.relu()).flatten(2).sum(-1))
    assert a.max() > 0


# Times, height and width of the last maps for clips of 8 frames of 64 pixels.
GRIDS = {
    "tsm_resnet": (2, 2),
    "r2plus1d": (4, 4),
    "cnnlstm": (2, 2),
    "vivit": (4, 4),
    "timesformer": (4, 4),
    "video_swin": (2, 2),
    "mvit": (2, 2),
}


@pytest.mark.parametrize("name", MODELS)
def test_maps_of_each_model(name: str) -> None:
    torch.manual_seed(0)
    model = make_model(name, n_frames=8, image_size=64).eval()
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    clips, targets = random_clips(), torch.tensor([1, 3])
    relevance = gradcam_plus_plus(model, clips, class_score(targets))
    assert relevance.maps.shape == (2, 8, *GRIDS[name])
    assert relevance.maps.min() >= 0 and relevance.maps.flatten(1).amax(1).min() > 0
    torch.testing.assert_close(relevance.frames, relevance.maps.sum((2, 3)))
    # A clip's map does not depend on the other clips; the model is left as it was.
    alone = gradcam_plus_plus(model, clips[1:], class_score(targets[1:]))
    torch.testing.assert_close(alone.maps, relevance.maps[1:], rtol=1e-3, atol=1e-5)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert hooks == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]


@torch.no_grad()
def test_the_times_of_r2plus1d_lie_at_the_frames_that_they_see() -> None:
    """Of its two times for 16 frames the second one is centred on frame 8, not on 11.5."""
    torch.manual_seed(0)
    model = make_model("r2plus1d").eval()
    clips = torch.rand(1, 16, 3, 32, 32)
    outputs = []
    model.backbone.layer4.register_forward_hook(lambda *args: outputs.append(args[-1]))
    model(clips)
    for frame in range(16):
        changed = clips.clone()
        changed[:, frame] = torch.rand(3, 32, 32)
        model(changed)
    changes = torch.stack([(x - outputs[0]).square().sum((0, 1, 3, 4)) for x in outputs[1:]])
    assert changes.shape == (16, 2)
    sees_second_better = changes[:, 1] > changes[:, 0]
    assert not sees_second_better[:3].any() and sees_second_better[5:].all()

    (layer,) = last_layers(model)
    maps = torch.tensor([1.0, 3.0]).view(1, 2, 1, 1)
    frames = _at_frames(maps, 16, layer.stride).flatten().tolist()
    assert frames == [1, 1.25, 1.5, 1.75, 2, 2.25, 2.5, 2.75, *[3] * 8]
    assert _at_frames(maps[:, :1], 7, layer.stride).flatten().tolist() == [1] * 7


@pytest.mark.parametrize("name", ["tsm_resnet", "r2plus1d", "mvit"])
def test_a_model_prepared_for_inference_has_the_same_maps(name: str) -> None:
    torch.manual_seed(0)
    model = make_model(name, n_frames=8, image_size=64).eval()
    prepared = prepare_for_inference(model, torch.device("cpu"))
    score = class_score(torch.tensor([2]))
    maps = [gradcam_plus_plus(m, random_clips(n=1), score).maps for m in (model, prepared)]
    torch.testing.assert_close(maps[1], maps[0], rtol=1e-3, atol=1e-4)


def test_two_networks_add_their_maps(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = make_model("tsm_resnet", modality="rgb+rgbdiff").eval()
    layers, score = last_layers(model), class_score(torch.tensor([2]))
    both = gradcam_plus_plus(model, random_clips(n=1), score).maps
    alone = []
    for layer in layers:
        monkeypatch.setattr("explanation.gradcam.last_layers", lambda _, layer=layer: [layer])
        alone.append(gradcam_plus_plus(model, random_clips(n=1), score).maps)
    assert len(alone) == 2 and all(maps.max() > 0 for maps in alone)
    torch.testing.assert_close(both, alone[0] + alone[1])


def test_a_model_of_one_s_own() -> None:
    class Own(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.stem, self.head = layer, nn.Linear(4, 3)

        def forward(self, clips: torch.Tensor) -> torch.Tensor:
            x = self.stem((clips / 255).flatten(0, 1))
            x = x.mean((2, 3)) if x.dim() == 4 else x
            return self.head(x.unflatten(0, clips.shape[:2]).mean(1))

        def stages(self) -> dict[str, list[nn.Module]]:
            return {"stem": [self.stem], "head": [self.head]}

    torch.manual_seed(0)
    model = Own(nn.Sequential(nn.Conv2d(3, 4, 8, 8), nn.ReLU()))
    relevance = gradcam_plus_plus(model, random_clips(), class_score(torch.tensor([1])))
    assert relevance.maps.shape == (2, 8, 8, 8)
    model.stem[1].inplace = True  # as in the networks of torchvision
    in_place = gradcam_plus_plus(model, random_clips(), class_score(torch.tensor([1])))
    torch.testing.assert_close(in_place.maps, relevance.maps)
    with pytest.raises(UserError, match="--method occlusion"):
        last_layers(Own(nn.Sequential(nn.Flatten(), nn.Linear(3 * 64 * 64, 4))))


@pytest.mark.parametrize(("name", "label"), [("timesformer", 1), ("vivit", 0)])
def test_a_patch_that_moves_by_one_moves_the_map_by_one(name: str, label: int) -> None:
    torch.manual_seed(0)
    model = make_model(name, n_frames=4, image_size=64).eval()
    with torch.no_grad():  # without positions all patches and times are alike
        if name == "vivit":
            model.embedding.positions.zero_()
        else:
            model.pos_embed.zero_()
    clip = torch.full((1, 4, 3, 64, 64), 90, dtype=torch.uint8)
    maps = []
    for column in (1, 2):
        moved = clip.clone()
        moved[..., 16:32, 16 * column : 16 * column + 16] = 200
        maps.append(gradcam_plus_plus(model, moved, class_score(torch.tensor([label]))).maps)
    torch.testing.assert_close(maps[1][..., 1, 2], maps[0][..., 1, 1], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(maps[1].roll(-1, 3), maps[0], rtol=1e-4, atol=1e-6)
    assert maps[0][..., 1, 1].ne(maps[0][..., 1, 0]).any()
