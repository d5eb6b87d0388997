"""Distillation: targets, their loss, and features that are computed once."""

from pathlib import Path

import pytest
import torch
from helpers import make_clip, make_model
from torch.nn import functional as F

from clips.manifest import ClipRow
from cnn_lstm import CNNLSTM
from modeling.weights import LoadedWeights
from pretraining.clips import CropFlip, PretrainingClips
from pretraining.distil import (
    Distillation,
    DistillationLoss,
    load_teacher,
    make_targets,
    random_features,
    target_width,
    teacher_features,
    teacher_provenance,
)
from utils.errors import UserError

CPU = torch.device("cpu")


@pytest.fixture
def clips(tmp_path: Path) -> PretrainingClips:
    paths = [make_clip(tmp_path / f"{n}.mp4", 80 + 60 * n, seed=n) for n in range(3)]
    transform = CropFlip(32, 0.5, 0.5, (0.0, 0.0, 0.0, 0.0))
    rows = [ClipRow(path, 0) for path in paths]
    return PretrainingClips(rows, 4, "random", transform, views=2)


def test_a_view_is_the_same_whenever_it_is_read(clips: PretrainingClips) -> None:
    first, number = clips[1, 5]
    again, same = clips[1, 7]
    other, next_number = clips[1, 6]
    assert (number, same, next_number) == (3, 3, 2)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_features_are_the_teachers_and_are_computed_once(clips, tmp_path, monkeypatch) -> None:
    torch.manual_seed(0)
    teacher = CNNLSTM(2, "resnet18", lstm_layers=0).eval()
    features = teacher_features(teacher, clips, tmp_path / "cache", CPU, 4, 0)
    assert features.shape == (6, 4, 512)
    with torch.no_grad():
        for index, view in ((0, 0), (2, 1)):
            clip, number = clips[index, view]
            assert number == 2 * index + view
            expected = teacher.frame_features(clip[None])[0]
            assert torch.allclose(features[number].float(), expected, rtol=2e-2, atol=2e-2)
    monkeypatch.setattr(CNNLSTM, "frame_features", lambda *_: pytest.fail("computed again"))
    assert torch.equal(teacher_features(teacher, clips, tmp_path / "cache", CPU, 4, 0), features)
    (kept,) = (tmp_path / "cache").iterdir()
    with torch.no_grad():
        teacher.backbone.conv1.weight.add_(0.1)
    with pytest.raises(pytest.fail.Exception, match="computed again"):
        teacher_features(teacher, clips, tmp_path / "cache", CPU, 4, 0)
    assert [kept] == list((tmp_path / "cache").iterdir())


def test_targets_of_clips_are_mean_and_change_standardised() -> None:
    features = torch.randn(5, 4, 3, generator=torch.Generator().manual_seed(0)) * 7 + 2
    targets = make_targets(features, per_frame=False)
    assert targets.shape == (5, 6)
    assert torch.allclose(targets.mean(dim=0), torch.zeros(6), atol=1e-5)
    assert torch.allclose(targets.std(dim=0, correction=0), torch.ones(6), atol=1e-5)
    changes = [(clip[2] + clip[3] - clip[0] - clip[1]) / 2 for clip in features]
    expected = torch.stack(changes)
    expected = (expected - expected.mean(0)) / expected.std(0, correction=0)
    assert torch.allclose(targets[:, 3:], expected, atol=1e-5)
    # The clips backward: the same means, the opposite changes.
    backward = make_targets(features.flip(1), per_frame=False)
    assert torch.allclose(backward[:, :3], targets[:, :3], atol=1e-5)
    assert torch.allclose(backward[:, 3:], -targets[:, 3:], atol=1e-5)


def test_targets_of_frames_keep_their_order() -> None:
    features = torch.randn(5, 4, 3, generator=torch.Generator().manual_seed(0))
    targets = make_targets(features, per_frame=True).view(5, 4, 3)
    flat = features.flatten(0, 1)
    expected = (features - flat.mean(0)) / flat.std(0, correction=0)
    assert torch.allclose(targets, expected, atol=1e-5)


def test_the_loss_is_smooth_l1_against_the_targets_with_these_numbers() -> None:
    targets = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    loss, numbers = DistillationLoss(targets), torch.tensor([4, 1])
    assert loss(targets[[4, 1]], numbers, 0).tolist() == [0.0, 0.0]
    wrong = torch.zeros(2, 8)
    expected = [float(F.smooth_l1_loss(wrong[0], targets[n])) for n in (4, 1)]
    assert loss(wrong, numbers, 0).tolist() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("name", "outputs"), [("tsm_resnet", 4 * 5), ("vivit", 2 * 5), ("r2plus1d", 2 * 5)]
)
def test_models_predict_per_frame_or_per_clip(name: str, outputs: int) -> None:
    model = make_model(name, target_width(5, name), n_frames=4, image_size=32)
    student = Distillation(model).eval()
    with torch.no_grad():
        predicted = student(torch.zeros(2, 4, 3, 32, 32))
    assert predicted.shape == (2, outputs)
    features = random_features(3, 4, 0)[..., :5]
    assert make_targets(features, name == "tsm_resnet").shape == (3, outputs)


def test_random_targets_depend_on_the_seed_alone() -> None:
    assert torch.equal(random_features(3, 4, 1), random_features(3, 4, 1))
    assert not torch.equal(random_features(3, 4, 1), random_features(3, 4, 2))


def test_a_teacher_without_weights_is_refused() -> None:
    with pytest.raises(UserError, match="--teacher random"):
        load_teacher("resnet18", "none")


def test_the_licences_of_teacher_and_start_both_hold() -> None:
    taught = LoadedWeights("", {"file": "t.pth", "encoder": "EndoViT", "licence": "CC BY-NC 4.0"})
    start = {"file": "s.pth", "licence": "MIT"}
    expected = {"file": "s.pth", "teacher": "EndoViT", "licence": "MIT and CC BY-NC 4.0"}
    assert teacher_provenance("timm:vit", taught, start) == expected
    assert teacher_provenance("resnet18", LoadedWeights(""), {}) == {"teacher": "resnet18"}
