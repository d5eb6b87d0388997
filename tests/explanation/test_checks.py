"""The checks of explanations by hand, by slow loops, and on methods known to be right or wrong."""

import itertools

import numpy as np
import pytest
import torch
from helpers import make_model
from torch import nn
from torch.nn import functional as F

from explanation import checks
from explanation.baseline import still as still_of
from explanation.checks import (
    centre_maps,
    deletion_insertion,
    fit_statistics,
    frame_deletion_insertion,
    gain,
    mean_interval,
    random_maps,
    randomisation,
    rank_correlation,
    spatial_pointing,
    temporal_average_precision,
    temporal_pointing,
)
from explanation.relevance import Relevance
from modeling.inference import NotFiniteError


def test_the_mean_has_an_interval_of_patients() -> None:
    values = np.array([0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 0.5, 0.5])
    patients = np.array(["a", "a", "a", "b", "b", "b", "c", "c"], dtype=object)
    mean, (low, high) = mean_interval(values, patients)
    assert mean == pytest.approx(0.5)
    assert low < 0.1 < 0.9 < high  # of three patients, not of eight clips
    order = np.random.default_rng(0).permutation(8)
    assert mean_interval(values[order], patients[order])[1] == [low, high]
    assert mean_interval(values, np.array(["a"] * 8, dtype=object)) == (mean, None)
    nobody = mean_interval(values, np.array([None] * 8, dtype=object))[1]
    assert low < nobody[0] < nobody[1] < high  # eight independent clips
    with pytest.raises(ValueError, match="finite"):
        mean_interval(np.array([0.0, np.nan]), patients[:2])


def test_pointing_in_time_by_hand() -> None:
    frames = torch.tensor([[0, 3, 1, 0.0], [9, 3, 1, 0], [2, 1, 2, 2], [0, 0, 0, 0]])
    pointing = temporal_pointing(frames, np.array([1, 1, 2, 0]), np.array([2, 3, 3, 0]))
    assert pointing.scores == pytest.approx([1, 0, 2 / 3, 1 / 4])
    assert pointing.chances == pytest.approx([2 / 4, 3 / 4, 2 / 4, 1 / 4])
    assert pointing.score == pytest.approx((1 + 2 / 3 + 1 / 4) / 4)
    assert pointing.chance == pytest.approx(0.5)


def test_even_relevance_gets_chance() -> None:
    first, last = np.array([0, 2, 5]), np.array([1, 2, 7])
    for check in (temporal_pointing, temporal_average_precision):
        pointing = check(torch.ones(3, 8), first, last)
        assert pointing.scores == pytest.approx(pointing.chances)
        assert pointing.chances == pytest.approx([2 / 8, 1 / 8, 3 / 8])
    for h, w in ((7, 7), (4, 4), (3, 8), (1, 1)):
        pointing = spatial_pointing(torch.zeros(4, 2, h, w), np.arange(4))
        assert pointing.scores == pytest.approx([0.25] * 4)
        assert pointing.chance == 0.25


def test_average_precision_by_hand() -> None:
    # The two frames of the evidence are ranked second and third: (1/2 + 2/3) / 2.
    scores = temporal_average_precision(
        torch.tensor([[0.5, -2, 0.4, 0.9], [0, 5, 4, 0]]), np.array([0, 1]), np.array([1, 2])
    ).scores
    assert scores == pytest.approx([(1 / 2 + 2 / 4) / 2, 1])
    scores = temporal_average_precision(
        torch.tensor([[0.5, 0.4, -2, 0.9]]), np.array([0]), np.array([1])
    ).scores
    assert scores == pytest.approx([(1 / 2 + 2 / 3) / 2])


@pytest.mark.parametrize(("first", "last"), [(-1, 2), (2, 1), (0, 4)])
def test_intervals_that_no_clip_has_are_refused(first: int, last: int) -> None:
    with pytest.raises(ValueError, match="frames from 0 to 3"):
        temporal_pointing(torch.rand(1, 4), np.array([first]), np.array([last]))


def test_pointing_in_space_by_hand() -> None:
    maps = torch.zeros(4, 3, 4, 6)
    for clip, (row, column) in enumerate([(0, 0), (1, 3), (2, 2), (3, 5)]):
        maps[clip, :, row, column] = 1  # together more than a single larger one
        maps[clip, 1, 1, 1] += 2
    assert spatial_pointing(maps, np.arange(4)).scores.tolist() == [1, 1, 1, 1]
    assert spatial_pointing(maps, np.array([1, 0, 0, 2])).scores.tolist() == [0, 0, 0, 0]
    maps = torch.zeros(3, 1, 5, 5)
    maps[0, 0, 2, 4] = maps[1, 0, 2, 2] = maps[2, 0, 3, 2] = 1  # on the lines in the middle
    expected = [[0, 0.25, 0], [0.5, 0.25, 0], [0, 0.25, 0.5], [0.5, 0.25, 0.5]]
    for quadrant, scores in enumerate(expected):
        assert spatial_pointing(maps, np.full(3, quadrant)).scores.tolist() == scores
    with pytest.raises(ValueError, match="0 to 3"):
        spatial_pointing(maps, np.array([0, 1, 4]))


def test_relevance_that_is_not_finite_is_refused() -> None:
    with pytest.raises(ValueError, match="finite"):
        temporal_pointing(torch.tensor([[0, torch.nan]]), np.array([0]), np.array([0]))


class LinearModel(nn.Module):
    """Two classes whose logits differ by a weighted sum of the pixels."""

    def __init__(self, t: int, size: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.weight = torch.randn(t, 3, size, size, generator=generator) / 8
        self.batches: list[int] = []

    def forward(self, clips: torch.Tensor) -> torch.Tensor:
        self.batches.append(len(clips))
        pixels = clips / 255 if clips.dtype == torch.uint8 else clips
        score = (pixels * self.weight).sum((1, 2, 3, 4))
        return torch.stack([score, torch.zeros_like(score)], dim=1)


def make_clips(n: int = 2, t: int = 3, size: int = 8) -> torch.Tensor:
    return torch.rand(n, t, 3, size, size, generator=torch.Generator().manual_seed(0))


def contributions(model: LinearModel, clips: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The fall of the target's score for each cell of a 4 x 4 grid, `(N, T, 4, 4)`: exact, because
    the model is linear."""
    values = ((clips - still_of(clips)) * model.weight).sum(dim=2)
    sign = torch.where(targets == 0, 1.0, -1.0).view(-1, 1, 1, 1)
    return sign * F.avg_pool2d(values, 2) * 4


def test_curves_equal_a_slow_loop() -> None:
    clips, targets, model = make_clips(), torch.tensor([0, 1]), LinearModel(3, 8)
    maps = contributions(model, clips, targets)
    curves = deletion_insertion(model, clips, targets, maps, steps=48)
    still = still_of(clips)
    for i in range(2):
        for inserted, values in ((False, curves.deletion[i]), (True, curves.insertion[i])):
            clip, new = (still[i], clips[i]) if inserted else (clips[i], still[i])
            clip = clip.clone()
            expected = [model(clip[None]).softmax(1)[0, targets[i]].item()]
            for cell in maps[i].flatten().argsort(descending=True).tolist():
                frame, row, column = cell // 16, cell // 4 % 4, cell % 4
                part = slice(2 * row, 2 * row + 2), slice(2 * column, 2 * column + 2)
                clip[frame, :, part[0], part[1]] = new[frame, :, part[0], part[1]]
                expected.append(model(clip[None]).softmax(1)[0, targets[i]].item())
            assert values == pytest.approx(expected, abs=1e-5)
    assert curves.fractions == pytest.approx(np.arange(49) / 48)
    middle = curves.deletion[:, 1:-1].sum(1) + curves.deletion[:, [0, -1]].mean(1)
    assert curves.deletion_areas == pytest.approx(middle / 48)


@pytest.mark.parametrize("steps", [6, 48])
def test_the_true_order_falls_and_rises_fastest(steps: int) -> None:
    clips, targets, model = make_clips(4), torch.tensor([0, 1, 0, 1]), LinearModel(3, 8)
    maps = contributions(model, clips, targets)
    true = deletion_insertion(model, clips, targets, maps, steps)
    others = [random_maps(tuple(maps.shape), seed) for seed in range(4)]
    for other in (*others, centre_maps(tuple(maps.shape)), -maps):
        curves = deletion_insertion(model, clips, targets, other, steps)
        assert (true.deletion <= curves.deletion + 1e-6).all()
        assert (true.insertion >= curves.insertion - 1e-6).all()
        patients = np.array(["a", "b", "c", "d"], dtype=object)
        for mean, (low, _) in gain(true, curves, patients):
            assert 0 < low < mean
        worse = gain(curves, true, patients).deletion[0]
        assert worse == pytest.approx(-gain(true, curves, patients).deletion[0])


def test_batches_are_bounded_and_bytes_give_the_same_curves() -> None:
    clips, targets, model = make_clips(), torch.tensor([0, 1]), LinearModel(3, 8)
    maps = random_maps((2, 3, 4, 4))
    clips = (clips * 255).round() / 255
    curves = deletion_insertion(model, clips, targets, maps, steps=20)
    assert max(model.batches) == checks.BATCH
    assert sum(model.batches) == 2 * 40  # both curves share their ends
    as_bytes = deletion_insertion(model, (clips * 255).byte(), targets, maps, steps=20)
    assert as_bytes.deletion == pytest.approx(curves.deletion, abs=0.02)  # the still is rounded
    assert as_bytes.deletion[:, 0] == pytest.approx(curves.deletion[:, 0], abs=1e-5)


def test_cells_are_divided_among_pixels_as_evenly_as_can_be() -> None:
    assert checks._cell_of_pixels(8, 4).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert checks._cell_of_pixels(5, 2).tolist() == [0, 0, 1, 1, 1]
    assert checks._cell_of_pixels(224, 7).bincount().tolist() == [32] * 7
    assert set(checks._cell_of_pixels(64, 7).bincount().tolist()) == {9, 10}


def test_frames_are_replaced_by_the_nearest_that_are_left() -> None:
    clips, targets, model = make_clips(t=5), torch.tensor([1, 0]), LinearModel(5, 8)
    frames = torch.tensor([[1, 5, 2, 4, 3.0], [5, 4, 3, 2, 1]])
    curves = frame_deletion_insertion(model, clips, targets, frames)
    deleted = [  # which frame is shown, after each deletion
        [[0, 1, 2, 3, 4], [0, 0, 2, 3, 4], [0, 0, 2, 2, 4], [0, 0, 2, 2, 2], [0, 0, 0, 0, 0]],
        [[0, 1, 2, 3, 4], [1, 1, 2, 3, 4], [2, 2, 2, 3, 4], [3, 3, 3, 3, 4], [4, 4, 4, 4, 4]],
    ]
    inserted = [
        [[1, 1, 1, 1, 1], [1, 1, 1, 3, 3], [1, 1, 1, 3, 4], [1, 1, 2, 3, 4], [0, 1, 2, 3, 4]],
        [[0, 0, 0, 0, 0], [0, 1, 1, 1, 1], [0, 1, 2, 2, 2], [0, 1, 2, 3, 3], [0, 1, 2, 3, 4]],
    ]
    for i, (shown, values) in itertools.product(
        range(2), ((deleted, curves.deletion), (inserted, curves.insertion))
    ):
        expected = model(clips[i][torch.tensor(shown[i])]).softmax(1)[:, targets[i]]
        assert values[i] == pytest.approx(expected.numpy(), abs=1e-6)
    assert curves.fractions.tolist() == [0, 0.25, 0.5, 0.75, 1]
    single = frame_deletion_insertion(LinearModel(1, 8), clips[:, :1], targets, frames[:, :1])
    assert single.deletion_areas.tolist() == single.insertion_areas.tolist()


def test_equal_cells_come_in_random_order_and_the_centre_first() -> None:
    orders = [checks._descending(torch.zeros(2, 4, 2, 2), seed) for seed in (0, 0, 1)]
    assert torch.equal(orders[0], orders[1])
    assert not torch.equal(orders[0], orders[2])
    assert orders[0][0].tolist() != list(range(16))
    assert orders[0][0].sort().values.tolist() == list(range(16))
    centre = centre_maps((1, 3, 3, 5))[0]
    assert centre.flatten().argmax() == 1 * 15 + 1 * 5 + 2
    assert centre[0, 1, 2] == pytest.approx(-1 / 3)
    assert centre[2, 0, 4] == pytest.approx(-((2 / 9 + 0.4**2) ** 0.5))


def test_wrong_shapes_and_logits_are_refused() -> None:
    clips, targets, model = make_clips(), torch.tensor([0, 1]), LinearModel(3, 8)
    with pytest.raises(ValueError, match="do not belong"):
        deletion_insertion(model, clips, targets, random_maps((2, 4, 4, 4)))
    with pytest.raises(ValueError, match="48 cells"):
        deletion_insertion(model, clips, targets, random_maps((2, 3, 4, 4)), steps=49)
    model.weight[0] = torch.inf
    with pytest.raises(NotFiniteError):
        frame_deletion_insertion(model, clips, targets, random_maps((2, 3)))


class Layers(nn.Module):
    """A small network of three layers, whose gradient depends on all of its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(2 * 3 * 16 * 16, 24)
        self.norm = nn.BatchNorm1d(24)
        self.layer1 = nn.Linear(24, 24)
        self.head = nn.Linear(24, 5)

    def forward(self, clips: torch.Tensor) -> torch.Tensor:
        x = self.layer1(self.norm(self.stem(clips.flatten(1))).tanh()).tanh()
        return self.head(x)

    def stages(self) -> dict[str, list[nn.Module]]:
        return {
            "stem": [self.stem, self.norm],
            "nothing": [],
            "layer1": [self.layer1],
            "head": [self.head],
        }


def gradients(model: nn.Module, clips: torch.Tensor, targets: torch.Tensor, _: str) -> Relevance:
    clips = clips.clone().requires_grad_()
    scores = model(clips).gather(1, targets[:, None]).sum()
    maps = torch.autograd.grad(scores, clips)[0].sum(dim=2)
    return Relevance(maps, maps.sum((2, 3)))


def edges(model: nn.Module, clips: torch.Tensor, targets: torch.Tensor, _: str) -> Relevance:
    maps = clips.mean(dim=2).diff(dim=3)
    return Relevance(maps, maps.sum((2, 3)))


def test_random_weights_change_gradients_but_not_an_edge_detector() -> None:
    torch.manual_seed(0)
    model, clips = Layers().eval(), make_clips(3, 2, 16)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    targets = torch.tensor([0, 3, 1])
    result = randomisation(model, clips, targets, "gradcam++", gradients)
    assert result.stages == ("head", "layer1", "stem")
    assert result.correlations.shape == (3, 3)
    assert abs(result.means[-1]) < 0.1
    assert (result.means < 0.5).all()
    caught = randomisation(model, clips, targets, "gradcam++", edges)
    assert (caught.correlations == 1).all()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    again = randomisation(model, clips, targets, "gradcam++", gradients)
    assert np.array_equal(again.correlations, result.correlations)
    ends = randomisation(model, clips, targets, "gradcam++", gradients, ends_only=True)
    assert ends.stages == ("head", "stem")
    assert np.array_equal(ends.correlations, result.correlations[[0, 2]])


@pytest.mark.parametrize("name", ["tsm_resnet", "cnnlstm", "vivit", "timesformer"])
def test_all_weights_are_random_in_the_end_and_the_model_is_left_as_it_is(name: str) -> None:
    """Stages come one after the other, and the last map sees none of the model's weights."""
    torch.manual_seed(0)
    model = make_model(name, num_classes=3, n_frames=2, image_size=32).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # also those that start as constants
            parameter.add_(0.1 * torch.randn_like(parameter))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    seen: list[dict[str, torch.Tensor]] = []

    def explain(model: nn.Module, clips: torch.Tensor, *_: object) -> Relevance:
        seen.append({key: value.clone() for key, value in model.named_parameters()})
        with torch.no_grad():
            assert model(clips).isfinite().all()
        return Relevance(torch.rand(2, 2, 4, 4), torch.rand(2, 2))

    clips = make_clips(2, 2, 32)
    result = randomisation(model, clips, torch.tensor([0, 1]), "gradcam++", explain)
    assert result.stages == tuple(reversed(model.stages()))
    changed = [{key for key in after if not torch.equal(after[key], before[key])} for after in seen]
    assert changed[0] == set()
    assert all(a < b for a, b in itertools.pairwise(changed))  # more with each stage
    assert changed[-1] == before.keys() & dict(model.named_parameters()).keys()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_shifting_model_is_explained_with_its_own_weights() -> None:
    """The shifts of a TSM are hooks bound to it: those of the copy must not be the model's."""
    torch.manual_seed(0)
    model, clips = make_model("tsm_resnet", num_classes=3).eval(), make_clips(2, 4, 32)
    models = []

    def explain(model: nn.Module, clips: torch.Tensor, *_: object) -> Relevance:
        models.append((model._context, model(clips[:, :3]), model._context))
        return Relevance(torch.rand(2, 4, 2, 2), torch.rand(2, 4))

    context = model._context
    randomisation(model, clips, torch.tensor([0, 1]), "gradcam++", explain)
    assert model._context is context  # untouched, because the copies shift with their own
    assert all(before is not after for before, _, after in models)


def test_a_real_method_on_a_real_model() -> None:
    torch.manual_seed(0)
    model = make_model("tsm_resnet", num_classes=3).eval()
    result = randomisation(model, make_clips(2, 2, 64), torch.tensor([0, 2]), "gradcam++")
    assert result.correlations.shape == (len(model.stages()), 2)
    assert np.abs(result.correlations).max() <= 1
    assert result.means[-1] < 0.9


def test_statistics_follow_the_random_weights() -> None:
    """Those of the trained weights would fit nothing: here they are far off from the beginning."""
    model, clips, scales = Layers().eval(), make_clips(8, 2, 16), []
    model.norm.running_mean.fill_(100)

    def explain(model: nn.Module, clips: torch.Tensor, *_: object) -> Relevance:
        with torch.no_grad():
            normed = model.norm(model.stem(clips.flatten(1)))
        scales.append((normed.mean().abs().item(), normed.std(0).mean().item()))
        return Relevance(torch.rand(8, 2, 4, 4), torch.rand(8, 2))

    randomisation(model, clips, torch.zeros(8, dtype=torch.long), "gradcam++", explain)
    assert [mean > 50 for mean, _ in scales] == [True, True, True, False]  # the stem comes last
    assert scales[-1] == pytest.approx((0, 1), abs=0.02)


def test_statistics_are_those_of_what_reaches_them() -> None:
    torch.manual_seed(0)
    first, second = nn.BatchNorm2d(3), nn.BatchNorm2d(4)
    model = nn.Sequential(first, nn.Conv2d(3, 4, 3), second).eval()
    x = 5 + 7 * torch.randn(6, 3, 8, 8)
    fit_statistics(model, [second], x)
    assert first.running_mean.tolist() == [0, 0, 0]
    fit_statistics(model, [model], x)
    y = model(x)
    torch.testing.assert_close(y.mean((0, 2, 3)), torch.zeros(4), rtol=0, atol=1e-5)
    torch.testing.assert_close(y.std((0, 2, 3)), torch.ones(4), rtol=0, atol=1e-3)


def test_rank_correlation_by_hand() -> None:
    a = torch.tensor([[1, -2], [3, 4.0]])
    assert rank_correlation(a, a**2) == pytest.approx(1)  # of absolute values
    assert rank_correlation(a, -a) == 1
    assert rank_correlation(a, 5 - a.abs()) == pytest.approx(-1)
    assert rank_correlation(a, torch.tensor([[2, 1], [3, 4.0]])) == pytest.approx(1 - 6 * 2 / 60)
    assert rank_correlation(a, torch.ones(2, 2)) == 0
    assert rank_correlation(torch.ones(2, 2), torch.ones(2, 2)) == 1
