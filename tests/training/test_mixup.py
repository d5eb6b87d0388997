"""Mixup and CutMix: equal to loops over clips, lambdas that add up, nothing drawn when off."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import make_model, make_state, tiny_config, train_epoch
from torch.nn import functional as F

from training.loaders import build_dataloaders
from training.mixup import mixup_cutmix, rand_bbox
from training.state import TrainState


def noise(*shape: int) -> torch.Tensor:
    return torch.randint(256, shape, dtype=torch.uint8)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def test_mixup_equals_a_loop_over_clips() -> None:
    clips, labels = noise(5, 3, 3, 6, 7), torch.tensor([4, 2, 0, 1, 3])
    mixed, other_labels, lam = mixup_cutmix(clips, labels, 0.4, 0)
    assert (mixed.dtype, lam.dtype) == (torch.float32, torch.float32)
    assert other_labels.tolist() == [3, 4, 2, 0, 1]
    assert len(lam.unique()) == 5  # one draw per clip
    for number, result in enumerate(mixed):
        own, other = clips[number] / 255, clips[number - 1] / 255
        wanted = lam[number] * own + (1 - lam[number]) * other
        assert torch.allclose(result, wanted, atol=1e-6)


def test_mixup_of_white_clips_stays_within_the_range() -> None:
    white = torch.full((64, 1, 3, 2, 2), 255, dtype=torch.uint8)
    assert (mixup_cutmix(white, torch.zeros(64), 1, 0)[0] == 1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_features_are_blended_in_their_own_dtype(dtype: torch.dtype) -> None:
    features = torch.randn(4, 3, 5).to(dtype)
    kept = features.clone()
    mixed, _, lam = mixup_cutmix(features, torch.arange(4), 1, 0)
    assert mixed.dtype == dtype
    assert torch.equal(features, kept)
    lam = lam.view(-1, 1, 1)
    wanted = lam * kept.float() + (1 - lam) * kept.float().roll(1, 0)
    assert torch.allclose(mixed.float(), wanted, atol=1e-6 if dtype == torch.float32 else 0.05)
    with pytest.raises(ValueError, match="cutmix is for pixels"):
        mixup_cutmix(features, torch.arange(4), 0, 1)


@pytest.mark.parametrize("alpha", [0.2, 1, 3])
def test_lambdas_of_mixup_are_beta_distributed(alpha: float) -> None:
    _, _, lam = mixup_cutmix(torch.zeros(20000, 1, 1), torch.zeros(20000), alpha, 0)
    assert lam.mean() == pytest.approx(0.5, abs=0.01)
    assert lam.var() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.03)


def test_cutmix_lambdas_are_the_areas_of_one_box_in_all_frames() -> None:
    """All pixels of clip n are n, so the pasted pixels can be counted; they must be a rectangle."""
    count, height, width = 60, 20, 12
    clips = torch.arange(count, dtype=torch.uint8).view(-1, 1, 1, 1, 1)
    clips = clips.expand(count, 4, 3, height, width)
    mixed, other_labels, lam = mixup_cutmix(clips, torch.arange(count), 0, 1)
    assert mixed.dtype == torch.uint8
    assert torch.equal(other_labels, torch.arange(count).roll(1))
    assert lam.max() - lam.min() > 0.4
    centres = []
    for number, clip in enumerate(mixed):
        assert (clip == clip[:1, :1]).all()  # the same in all frames and channels
        other = clip[0, 0] == other_labels[number]
        assert (other | (clip[0, 0] == number)).all()
        assert lam[number].item() == pytest.approx(1 - other.sum().item() / (height * width))
        rows, columns = other.nonzero(as_tuple=True)
        if len(rows):
            sides = (rows.max() - rows.min() + 1, columns.max() - columns.min() + 1)
            assert sides[0] * sides[1] == other.sum()
            centres.append((rows.double().mean().item(), columns.double().mean().item()))
    assert len(set(centres)) > count / 2  # one draw per clip


def test_cutmix_pastes_the_same_box_of_the_clip_before() -> None:
    clips = noise(6, 2, 3, 9, 9)
    mixed, _, lam = mixup_cutmix(clips, torch.arange(6), 0, 1)
    for number, clip in enumerate(mixed):
        differs = (clip != clips[number]).any(dim=(0, 1))
        assert torch.equal(clip[..., differs], clips[number - 1][..., differs])
        assert 1 - lam[number] == pytest.approx(differs.double().mean().item())


def test_boxes_have_the_area_and_shape_of_the_paper() -> None:
    """Sides are sqrt(1 - lambda) times the frame's, cut off at its edges, and anywhere in it."""
    lam = torch.linspace(0, 1, 5001)
    boxes = rand_bbox(lam, 40, 60)
    assert (boxes >= 0).all()
    assert (boxes <= torch.tensor([40, 60])).all()
    for axis, side in enumerate((40, 60)):
        first, last = boxes[:, 0, axis], boxes[:, 1, axis]
        size = (side * (1 - lam).sqrt()).round()
        whole = (first > 0) & (last < side)
        assert torch.equal((last - first)[whole].float(), size[whole])
        assert ((last - first) <= size).all()
        assert ((last - first) >= (size / 2).floor()).all()  # the centre is in the frame
        small = boxes[lam > 0.99, :, axis].double().mean(1) / side
        assert small.mean() == pytest.approx(0.5, abs=0.1)
        assert small.std() == pytest.approx(12**-0.5, abs=0.1)  # uniform
    assert torch.equal(boxes[-1, 0], boxes[-1, 1])  # lambda 1: an empty box


@pytest.mark.parametrize("count", [0, 1])
@pytest.mark.parametrize(("mixup", "cutmix"), [(1, 0), (0, 1), (1, 1)])
def test_a_single_clip_stays_as_it_is(count: int, mixup: float, cutmix: float) -> None:
    clips, labels = noise(count, 2, 3, 4, 4), torch.ones(count, dtype=torch.long)
    mixed, other_labels, lam = mixup_cutmix(clips, labels, mixup, cutmix)
    assert torch.equal(mixed, clips)
    assert torch.equal(other_labels, labels)
    assert torch.equal(lam, torch.ones(count))


def test_a_fair_coin_chooses_for_the_batch() -> None:
    clips = noise(2, 1, 3, 4, 4)
    cut = [mixup_cutmix(clips, torch.arange(2), 1, 1)[0].dtype == torch.uint8 for _ in range(400)]
    assert 160 < sum(cut) < 240


def trained(tiny_data: Path, **settings: object) -> TrainState:
    """One epoch of a ViViT without dropout, whose weights do not change."""
    config = tiny_config(tiny_data, **{"learning_rate": 0.0, **settings})
    loader = build_dataloaders(config)[0]
    torch.manual_seed(1)
    state = make_state(config, make_model("vivit", 3, n_frames=4, image_size=32))
    train_epoch(state, loader)
    return state


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 0), (0, 0.8)])
def test_the_loss_is_that_of_targets_in_proportion(
    mixup: float, cutmix: float, tiny_data: Path, monkeypatch
) -> None:
    """A prediction counts as correct if it is the label with the larger part."""
    batches = []

    def watched(clips: torch.Tensor, labels: torch.Tensor, *alphas: float) -> tuple:
        mixed = mixup_cutmix(clips, labels, *alphas)
        batches.append((labels, mixed))
        return mixed

    monkeypatch.setattr("training.engine.mixup_cutmix", watched)
    state = trained(tiny_data, mixup_alpha=mixup, cutmix_alpha=cutmix, label_smoothing=0.1)
    loss, correct = 0.0, 0
    assert len(batches) == 3
    for labels, (clips, other_labels, lam) in batches:
        for clip, one, two, part in zip(clips, labels, other_labels, lam, strict=True):
            logits = state.model(clip[None])
            target = part * F.one_hot(one, 3) + (1 - part) * F.one_hot(two, 3)
            loss += F.cross_entropy(logits, target[None], label_smoothing=0.1).item()
            correct += logits.argmax().item() == (one if part >= 0.5 else two)
    assert state.progress.running_sums == [pytest.approx(loss, rel=1e-5), correct, 18]


def test_off_nothing_is_drawn(tiny_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> Callable:
        raise AssertionError

    monkeypatch.setattr("training.engine.mixup_cutmix", never)
    trained(tiny_data)
    after = torch.get_rng_state()
    torch.manual_seed(1)
    make_model("vivit", 3, n_frames=4, image_size=32)
    assert torch.equal(after, torch.get_rng_state())
