"""Mixup and cutmix: equal to loops over clips, shares that add up, nothing drawn where off."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from config import TrainConfig
from models import build_model
from training.checks import resolve
from training.engine import train_one_epoch
from training.loaders import build_dataloaders
from training.mixup import draw_boxes, mix
from training.state import Training
from utils.interrupt import Interrupt


def noise(*shape: int) -> torch.Tensor:
    return torch.randint(256, shape, dtype=torch.uint8)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def test_mixup_equals_a_loop_over_clips() -> None:
    clips, labels = noise(5, 3, 3, 6, 7), torch.tensor([4, 2, 0, 1, 3])
    mixed, others, share = mix(clips, labels, 0.4, 0)
    assert (mixed.dtype, share.dtype) == (torch.float32, torch.float32)
    assert others.tolist() == [3, 4, 2, 0, 1]
    assert len(share.unique()) == 5  # drawn for each clip
    for number, result in enumerate(mixed):
        own, other = clips[number] / 255, clips[number - 1] / 255
        wanted = share[number] * own + (1 - share[number]) * other
        assert torch.allclose(result, wanted, atol=1e-6)


def test_mixup_of_white_clips_stays_within_the_range() -> None:
    white = torch.full((64, 1, 3, 2, 2), 255, dtype=torch.uint8)
    assert (mix(white, torch.zeros(64), 1, 0)[0] == 1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_features_are_blended_in_their_own_dtype(dtype: torch.dtype) -> None:
    features = torch.randn(4, 3, 5).to(dtype)
    kept = features.clone()
    mixed, _, share = mix(features, torch.arange(4), 1, 0)
    assert mixed.dtype == dtype
    assert torch.equal(features, kept)
    share = share.view(-1, 1, 1)
    wanted = share * kept.float() + (1 - share) * kept.float().roll(1, 0)
    assert torch.allclose(mixed.float(), wanted, atol=1e-6 if dtype == torch.float32 else 0.05)
    with pytest.raises(ValueError, match="cutmix is for pictures"):
        mix(features, torch.arange(4), 0, 1)


@pytest.mark.parametrize("alpha", [0.2, 1, 3])
def test_shares_of_mixup_are_beta_distributed(alpha: float) -> None:
    _, _, share = mix(torch.zeros(20000, 1, 1), torch.zeros(20000), alpha, 0)
    assert share.mean() == pytest.approx(0.5, abs=0.01)
    assert share.var() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.03)


def test_cutmix_shares_are_the_areas_of_one_box_in_all_frames() -> None:
    """Clip n is n everywhere: what was pasted can be seen, counted, and must be a rectangle."""
    count, height, width = 60, 20, 12
    clips = torch.arange(count, dtype=torch.uint8).view(-1, 1, 1, 1, 1)
    clips = clips.expand(count, 4, 3, height, width)
    mixed, others, share = mix(clips, torch.arange(count), 0, 1)
    assert mixed.dtype == torch.uint8
    assert torch.equal(others, torch.arange(count).roll(1))
    assert share.max() - share.min() > 0.4
    centres = []
    for number, clip in enumerate(mixed):
        assert (clip == clip[:1, :1]).all()  # the same in all frames and channels
        other = clip[0, 0] == others[number]
        assert (other | (clip[0, 0] == number)).all()
        assert share[number].item() == pytest.approx(1 - other.sum().item() / (height * width))
        rows, columns = other.nonzero(as_tuple=True)
        if len(rows):
            sides = (rows.max() - rows.min() + 1, columns.max() - columns.min() + 1)
            assert sides[0] * sides[1] == other.sum()
            centres.append((rows.double().mean().item(), columns.double().mean().item()))
    assert len(set(centres)) > count / 2  # drawn for each clip


def test_cutmix_pastes_the_same_place_of_the_clip_before() -> None:
    clips = noise(6, 2, 3, 9, 9)
    mixed, _, share = mix(clips, torch.arange(6), 0, 1)
    for number, clip in enumerate(mixed):
        differs = (clip != clips[number]).any(dim=(0, 1))
        assert torch.equal(clip[..., differs], clips[number - 1][..., differs])
        assert 1 - share[number] == pytest.approx(differs.double().mean().item())


def test_boxes_have_the_area_and_shape_of_the_paper() -> None:
    """Sides of sqrt(1 - share) times the picture's, cut off at its edges, anywhere in it."""
    share = torch.linspace(0, 1, 5001)
    boxes = draw_boxes(share, 40, 60)
    assert (boxes >= 0).all()
    assert (boxes <= torch.tensor([40, 60])).all()
    for axis, side in enumerate((40, 60)):
        first, last = boxes[:, 0, axis], boxes[:, 1, axis]
        size = (side * (1 - share).sqrt()).round()
        whole = (first > 0) & (last < side)
        assert torch.equal((last - first)[whole].float(), size[whole])
        assert ((last - first) <= size).all()
        assert ((last - first) >= (size / 2).floor()).all()  # the centre is in the picture
        small = boxes[share > 0.99, :, axis].double().mean(1) / side
        assert small.mean() == pytest.approx(0.5, abs=0.1)
        assert small.std() == pytest.approx(12**-0.5, abs=0.1)  # uniform
    assert torch.equal(boxes[-1, 0], boxes[-1, 1])  # share 1: an empty box


@pytest.mark.parametrize("count", [0, 1])
@pytest.mark.parametrize(("mixup", "cutmix"), [(1, 0), (0, 1), (1, 1)])
def test_a_clip_alone_stays_as_it_is(count: int, mixup: float, cutmix: float) -> None:
    clips, labels = noise(count, 2, 3, 4, 4), torch.ones(count, dtype=torch.long)
    mixed, others, share = mix(clips, labels, mixup, cutmix)
    assert torch.equal(mixed, clips)
    assert torch.equal(others, labels)
    assert torch.equal(share, torch.ones(count))


def test_a_fair_coin_chooses_for_the_batch() -> None:
    clips = noise(2, 1, 3, 4, 4)
    cut = [mix(clips, torch.arange(2), 1, 1)[0].dtype == torch.uint8 for _ in range(400)]
    assert 160 < sum(cut) < 240


def trained(tiny_data: Path, **changes: object) -> Training:
    """One epoch of a ViViT without dropout, whose weights do not move."""
    settings = {"data_root": str(tiny_data), "classes": ("dark", "grey", "light")}
    settings |= {"image_size": 32, "n_frames": 4, "batch_size": 6, "workers": 0, "weights": "none"}
    settings |= {"amp": "fp32", "device": "cpu", "model": "vivit", "learning_rate": 0.0}
    config = resolve(TrainConfig(**{**settings, **changes}))
    loader = build_dataloaders(config)[0]
    torch.manual_seed(1)
    model = build_model("vivit", 3, n_frames=4, image_size=32)
    run = Training(config, model, torch.device("cpu"), 3)
    train_one_epoch(run, model, loader, Interrupt())
    return run


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 0), (0, 0.8)])
def test_the_loss_is_that_of_targets_in_proportion(
    mixup: float, cutmix: float, tiny_data: Path, monkeypatch
) -> None:
    """And an answer is right if it is the label with the larger share."""
    batches = []

    def watched(clips: torch.Tensor, labels: torch.Tensor, *alphas: float) -> tuple:
        mixed = mix(clips, labels, *alphas)
        batches.append((labels, mixed))
        return mixed

    monkeypatch.setattr("training.engine.mix", watched)
    run = trained(tiny_data, mixup=mixup, cutmix=cutmix, label_smoothing=0.1)
    loss, right = 0.0, 0
    assert len(batches) == 3
    for labels, (clips, others, share) in batches:
        for clip, one, two, part in zip(clips, labels, others, share, strict=True):
            logits = run.model(clip[None])
            target = part * F.one_hot(one, 3) + (1 - part) * F.one_hot(two, 3)
            loss += F.cross_entropy(logits, target[None], label_smoothing=0.1).item()
            right += logits.argmax().item() == (one if part >= 0.5 else two)
    assert run.totals == [pytest.approx(loss, rel=1e-5), right, 18]


def test_off_nothing_is_drawn(tiny_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> Callable:
        raise AssertionError

    monkeypatch.setattr("training.engine.mix", never)
    trained(tiny_data)
    after = torch.get_rng_state()
    torch.manual_seed(1)
    build_model("vivit", 3, n_frames=4, image_size=32)
    assert torch.equal(after, torch.get_rng_state())
