"""A model that was trained on planted evidence is explained by that evidence."""

import itertools

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.explanations import Planted, in_batches
from demo.evidence import CLASSES, plan_clips, render
from explanation import checks
from explanation.baseline import still
from explanation.relevance import Relevance
from modeling.layers import IMAGENET_MEAN_STD, Normalize

T, SIZE = 8, 48


class SmallNet(nn.Module):
    """The largest value of each channel over all places of all frames, classified."""

    def __init__(self) -> None:
        super().__init__()
        self.normalize = Normalize(IMAGENET_MEAN_STD)
        widths = (3, 16, 32, 64)
        layers = [
            layer
            for before, after in itertools.pairwise(widths)
            for layer in (nn.Conv2d(before, after, 5, 2, 2), nn.BatchNorm2d(after), nn.ReLU())
        ]
        self.layers = nn.Sequential(*layers)
        self.head = nn.Linear(64, len(CLASSES))

    def forward(self, clips: torch.Tensor) -> torch.Tensor:
        x = self.layers(self.normalize(clips).flatten(0, 1))  # (B * T, 64, 6, 6)
        return self.head(x.amax((2, 3)).unflatten(0, clips.shape[:2]).amax(1))

    def stages(self) -> dict[str, list[nn.Module]]:
        return {"stem": [self.layers], "head": [self.head]}


def rendered(split: str) -> Planted:
    """The clips of a split as a model sees them."""
    plan = [
        clip
        for clip in plan_clips(
            {"train": 4, "val": 0, "test": 4}, {"train": 24, "val": 0, "test": 8}
        )
        if clip.split == split
    ]
    frames = [torch.from_numpy(render(clip)[::2]) for clip in plan]  # (T, H, W, 3)
    clips = torch.stack(frames).permute(0, 1, 4, 2, 3)
    small = F.interpolate(clips.flatten(0, 1).float(), (SIZE, SIZE), mode="area")
    return Planted(
        small.round().byte().unflatten(0, clips.shape[:2]),
        torch.tensor([CLASSES.index(clip.action) for clip in plan]),
        np.array([str(clip.patient) for clip in plan], object),
        np.array([clip.first_frame for clip in plan]),
        np.array([clip.last_frame for clip in plan]),
        np.array([checks.QUADRANTS.index(clip.quadrant) for clip in plan]),
    )


@pytest.fixture(scope="module")
def trained_net() -> tuple[nn.Module, Planted]:
    """The trained network, and the test clips that it classifies rightly."""
    train, test = rendered("train"), rendered("test")
    torch.manual_seed(0)
    model = SmallNet()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(20):
        for batch in torch.randperm(len(train.clips)).split(16):
            loss = F.cross_entropy(model(train.clips[batch]), train.targets[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    model.eval()
    with torch.no_grad():
        right = (model(test.clips).argmax(1) == test.targets).nonzero()[:, 0]
    assert len(right) >= 0.8 * len(test.clips)
    parts = [getattr(test, name)[right] for name in Planted.__dataclass_fields__]
    return model, Planted(*parts)


@pytest.fixture(scope="module", params=["gradcam++", "occlusion", "integrated-gradients"])
def explained(
    request: pytest.FixtureRequest, trained_net: tuple[nn.Module, Planted]
) -> tuple[str, Relevance]:
    """A method, and what it says about all clips."""
    return request.param, in_batches(*trained_net, request.param)[0]


def test_the_most_relevant_frame_and_place_are_the_planted_ones(
    explained: tuple[str, Relevance], trained_net: tuple[nn.Module, Planted]
) -> None:
    relevance, planted = explained[1], trained_net[1]
    in_time = checks.temporal_pointing(relevance.frames, planted.first, planted.last)
    in_space = checks.spatial_pointing(relevance.maps, planted.quadrants)
    assert in_time.score >= 0.9
    assert in_space.score >= 0.8
    assert (in_time.chance, in_space.chance) == (3 / 8, 1 / 4)


def test_what_is_relevant_is_what_the_answer_depends_on(
    explained: tuple[str, Relevance], trained_net: tuple[nn.Module, Planted]
) -> None:
    """Deleting it lowers the probability faster than deleting at random or from the centre, or
    inserting it raises it faster."""
    maps, (model, planted) = explained[1].maps, trained_net
    curves = [
        checks.deletion_insertion(model, planted.clips, planted.targets, order, steps=4)
        for order in (maps, checks.random_maps(maps.shape), checks.centre_maps(maps.shape))
    ]
    for baseline in curves[1:]:
        gain = checks.gain(curves[0], baseline, planted.patients)
        assert gain.deletion[1][0] > 0 or gain.insertion[1][0] > 0, gain


def test_with_random_weights_the_maps_are_others(
    explained: tuple[str, Relevance], trained_net: tuple[nn.Module, Planted]
) -> None:
    method, (model, planted) = explained[0], trained_net
    result = checks.randomisation(model, planted.clips[:2], planted.targets[:2], method)
    assert result.stages == ("head", "stem")
    assert abs(result.means[-1]) < 0.5


def test_integrated_gradients_are_complete(
    explained: tuple[str, Relevance], trained_net: tuple[nn.Module, Planted]
) -> None:
    """The relevance adds up to the difference of the logits, within 1 %."""
    (method, relevance), (model, planted) = explained, trained_net
    if method != "integrated-gradients":
        return
    with torch.no_grad():
        logits = model(planted.clips) - model(still(planted.clips))
    differences = logits.gather(1, planted.targets[:, None])[:, 0]
    gaps = (relevance.frames.sum(dim=1) - differences).abs()
    assert (gaps <= 0.01 * differences.abs().clamp(min=1)).all()
    assert (differences.abs() > 1).float().mean() > 0.5
