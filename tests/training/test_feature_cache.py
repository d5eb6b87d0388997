"""Cached features: the same numbers as from the whole model, computed once and found again."""

import dataclasses
import hashlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import TINY_FLAGS, make_model, same_tensors
from torch.utils.data import DataLoader

import evaluate
import train
from checkpoint import load_checkpoint
from config import TrainConfig, from_dict
from evaluation.predictions import read_predictions
from models import freeze
from training.checks import refuse_changes, require_frozen
from training.feature_cache import feature_loader
from training.loaders import build_dataloaders
from utils.errors import UserError
from utils.interrupt import Interrupt

pytestmark = pytest.mark.usefixtures("no_figures")

CLASSES = ("dark", "grey", "light")
CPU = torch.device("cpu")


def settings(data: Path, folder: Path, **others: object) -> TrainConfig:
    return TrainConfig(
        data_root=str(data),
        classes=CLASSES,
        model_name="cnnlstm",
        weights="none",
        freeze_until="layer4",
        feature_cache=str(folder),
        feature_augmentations=2,
        image_size=32,
        n_frames=4,
        batch_size=4,
        num_workers=0,
        **others,
    )


def frozen_model() -> torch.nn.Module:
    torch.manual_seed(0)
    model = make_model("cnnlstm", 3, lstm_hidden=8).eval()
    freeze(model, "layer4")
    return model


@torch.no_grad()
@pytest.mark.parametrize(("split", "bias"), [(0, 1e5), (1, float("inf"))])
def test_features_that_are_not_finite_are_not_kept(
    tiny_data: Path, tmp_path: Path, split: int, bias: float
) -> None:
    """Those of augmented clips are kept as fp16, which ends at 65504."""
    config = settings(tiny_data, tmp_path)
    model = frozen_model()
    last = [m for m in model.backbone.modules() if isinstance(m, torch.nn.BatchNorm2d)][-1]
    last.bias += bias
    loaders = build_dataloaders(config)
    with pytest.raises(UserError, match="not finite"):
        feature_loader(loaders[split], model, config, CPU)
    assert not list(tmp_path.rglob("*.npy"))


@torch.no_grad()
def test_features_are_those_of_the_clips(tiny_data: Path, tmp_path: Path) -> None:
    config = settings(tiny_data, tmp_path, test_views=2, test_crops=3)
    model = frozen_model()
    _, val, test, _ = build_dataloaders(config)
    for loader, shape in ((val, (4, 512)), (test, (6, 4, 512))):
        features = feature_loader(loader, model, config, CPU).dataset
        for number in (0, 3):
            clip, label = loader.dataset[number]
            index, (array, its_label) = features[number]
            assert (index, its_label, array.shape) == (number, label, shape)
            wanted = model.frame_features(clip.flatten(0, -5) if clip.dim() > 4 else clip[None])
            torch.testing.assert_close(array, wanted.view(shape), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_without_shared_memory_the_clips_are_sent_by_value(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same features, whether or not the workers have room for their clips in /dev/shm."""
    sent, computed = set(), []

    def show_batches(loader: DataLoader, *_: object) -> Iterator[list]:
        for batch in loader:
            sent.add(type(batch[0][2]))
            yield batch

    monkeypatch.setattr("training.feature_cache.show_batches", show_batches)
    for free, folder in ((10**12, "shared"), (1, "pipes")):
        monkeypatch.setattr("training.loaders.shared_memory_free", lambda free=free: free)
        config = dataclasses.replace(settings(tiny_data, tmp_path / folder), num_workers=1)
        _, val, _, _ = build_dataloaders(config)
        dataset = feature_loader(val, frozen_model(), config, CPU).dataset
        computed.append([dataset[number][1][0] for number in range(len(dataset))])
    assert sent == {torch.Tensor, np.ndarray}
    assert all(map(torch.equal, *computed))


@pytest.mark.parametrize("on_device", [False, True])
@torch.no_grad()
def test_training_clips_have_a_few_augmentations(
    tiny_data: Path, tmp_path: Path, on_device: bool
) -> None:
    """Also where a GPU would augment the batch."""
    config = settings(tiny_data, tmp_path)
    model = frozen_model()
    loader = build_dataloaders(config)[0]
    loader.dataset.augment_on_device = on_device
    features = feature_loader(loader, model, config, CPU).dataset
    draws = [features[3, seed][1][0] for seed in range(4)]
    assert torch.equal(draws[0], draws[2])
    assert torch.equal(draws[1], draws[3])
    assert not torch.allclose(draws[0], draws[1], atol=1e-3)
    # As ClipsDataset draws them, seeded by the path and the number of the augmentation.
    path = loader.dataset.rows[3].path.absolute()
    for draw in (0, 1):
        seed = int.from_bytes(hashlib.sha256(f"{path} {draw}".encode()).digest()[:7])
        loader.dataset.augment_on_device = False
        wanted = model.frame_features(loader.dataset[3, seed][0][None])[0]
        torch.testing.assert_close(draws[draw], wanted, atol=2e-3, rtol=2e-3)


def test_only_what_changed_is_computed_again(tiny_data: Path, tmp_path: Path) -> None:
    folder, model = tmp_path / "features", frozen_model()

    def computed(**others: object) -> int:
        began = time.time_ns()
        config = settings(tiny_data, folder, **others)
        for loader in build_dataloaders(config)[:3]:
            feature_loader(loader, model, config, CPU)
        return sum(file.stat().st_mtime_ns >= began for file in folder.glob("*/*.npy"))

    assert computed() == 18 * 2 + 9 + 9  # two augmentations per training clip
    assert computed() == 0
    assert computed(loss="focal", seed=4, epochs=2) == 0
    assert computed(hflip_prob=0.0) == 36  # validation and test clips did not change
    assert computed(eval_sampling="first") == 54
    file = next(folder.glob("*/*.npy"))
    file.unlink()
    assert computed(eval_sampling="first") + computed() + computed(hflip_prob=0.0) == 1
    with torch.no_grad():
        model.backbone.conv1.weight.mul_(2)
    assert computed() == 54


def test_a_clip_that_changed_is_computed_again(tmp_path: Path, tiny_data: Path) -> None:
    config = settings(tiny_data, tmp_path)
    loader = build_dataloaders(config)[1]
    features = feature_loader(loader, frozen_model(), config, CPU).dataset
    row = features.rows[0]
    before = features.path(row, 0)
    status = row.path.stat()
    os.utime(row.path, ns=(status.st_atime_ns, status.st_mtime_ns + 1_000_000))
    try:
        assert before.exists()
        assert features.path(row, 0) != before
    finally:
        os.utime(row.path, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_models_whose_features_change_are_refused() -> None:
    model = make_model("cnnlstm", 3)
    with pytest.raises(UserError, match=r"--freeze-until layer4"):
        require_frozen(model)
    freeze(model, "layer3")
    with pytest.raises(UserError, match=r"--freeze-until layer4"):
        require_frozen(model)
    freeze(model, "layer4")
    require_frozen(model)
    tsm = make_model("tsm_resnet", 3)
    freeze(tsm, "layer4")
    with pytest.raises(UserError, match=r"only cnnlstm"):
        require_frozen(tsm)


def test_a_run_on_features_predicts_like_the_whole_model(
    tiny_data: Path, tmp_path: Path, run_main: Callable
) -> None:
    flags = [
        *TINY_FLAGS, "--data-root", tiny_data, "--model-name", "cnnlstm",
        "--freeze-until", "layer4", "--epochs", 2, "--feature-cache", tmp_path / "store",
        "--lstm-layers", 0, "--temporal-pooling", "statistics", "--test-views", 2,
        "--monitor", "last", "--run-dir", tmp_path / "runs",
    ]  # fmt: skip
    run_main(train.main, *flags, cwd=tmp_path)
    (run,) = (tmp_path / "runs").iterdir()
    state = load_checkpoint(run)
    assert state["epoch"] == 2  # the last, whatever the validation scores are
    torch.manual_seed(0)
    start = make_model("cnnlstm", 3, lstm_layers=0, temporal_pooling="statistics")
    for key, value in start.state_dict().items():  # the backbone did not change
        if key.startswith("backbone"):
            assert torch.equal(state["model"][key], value), key
    run_main(
        evaluate.main, run, "--num-workers", 0, cwd=tmp_path
    )  # decodes, and runs the whole model
    whole, *_ = read_predictions(run / "evaluate_test" / "predictions.csv")
    cached, *_ = read_predictions(run / "predictions.csv")
    np.testing.assert_allclose(cached.probabilities, whole.probabilities, atol=5e-3)


@pytest.mark.parametrize("pooling", ["statistics", "attention"])
def test_the_precision_is_that_of_the_backbone(
    pooling: str, tiny_data: Path, tmp_path: Path
) -> None:
    """Features are fp32, which a head in bf16 would not take."""
    more = {"epochs": 1, "precision": "bf16", "lstm_layers": 0, "temporal_pooling": pooling}
    run = train.train(settings(tiny_data, tmp_path / "store", **more), folder=tmp_path / "run")
    assert (run / "test_metrics.json").exists()


def test_a_whole_run_uses_features_or_none(tmp_path: Path) -> None:
    one, moved, off = (
        TrainConfig(model_name="cnnlstm", feature_cache=name) for name in ("a", "b", "")
    )
    refuse_changes(one, moved)
    for saved, now in ((one, off), (off, one)):
        with pytest.raises(UserError, match="keeps its settings: feature_cache"):
            refuse_changes(saved, now)


def test_a_stopped_run_continues_exactly(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if the features are there already at the second start: no random number differs."""
    monkeypatch.setattr("train.final_test", lambda *_: None)
    config = settings(tiny_data, tmp_path / "store", epochs=2, dropout=0.5, lstm_hidden=8)
    whole = train.train(config, folder=tmp_path / "whole")
    asked, check = [], Interrupt.check

    def stop_at_the_third(interrupt: Interrupt) -> None:
        asked.append(interrupt)
        if len(asked) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        check(interrupt)

    part = tmp_path / "part"
    config = dataclasses.replace(config, feature_cache=str(tmp_path / "other store"))
    with monkeypatch.context() as patch:
        patch.setattr(Interrupt, "check", stop_at_the_third)
        with pytest.raises(SystemExit):
            train.train(config, folder=part)
    state = load_checkpoint(part, "last.pt")
    assert (state["epoch"], state["step"]) == (0, 3)
    train.train(dataclasses.replace(from_dict(state["config"]), resume=str(part)), state)
    one, other = (load_checkpoint(folder, "last.pt")["model"] for folder in (whole, part))
    assert same_tensors(one, other)
