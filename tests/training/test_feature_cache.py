"""Frozen features: the same numbers as the whole model, computed once, found again."""

import dataclasses
import hashlib
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import TINY_FLAGS

import evaluate
import train
from checkpoint import load_checkpoint
from config import TrainConfig, from_dict
from evaluation.predictions import read_predictions
from models import build_model, freeze
from training.checks import refuse_changes
from training.feature_cache import over_features, require_frozen
from training.loaders import build_dataloaders
from utils.errors import UserError
from utils.interrupt import Interrupt

CLASSES = ("dark", "grey", "light")
CPU = torch.device("cpu")


def settings(data: Path, store: Path, **others: object) -> TrainConfig:
    return TrainConfig(
        data_root=str(data),
        classes=CLASSES,
        model="cnn_lstm",
        weights="none",
        freeze_to="layer4",
        features=str(store),
        feature_draws=2,
        image_size=32,
        n_frames=4,
        batch_size=4,
        workers=0,
        **others,
    )


def frozen_model() -> torch.nn.Module:
    torch.manual_seed(0)
    model = build_model("cnn_lstm", 3, lstm_hidden=8).eval()
    freeze(model, "layer4")
    return model


@torch.no_grad()
def test_features_are_those_of_the_clips(tiny_data: Path, tmp_path: Path) -> None:
    config = settings(tiny_data, tmp_path, test_views=2, test_crops=3)
    model = frozen_model()
    _, val, test, _ = build_dataloaders(config)
    for loader, shape in ((val, (4, 512)), (test, (6, 4, 512))):
        features = over_features(loader, model, config, CPU).dataset
        for number in (0, 3):
            clip, label = loader.dataset.clips[number]
            found = features[number]
            assert (found[0], found[1][1]) == (number, label)
            assert found[1][0].shape == shape
            wanted = model.per_frame(clip.flatten(0, -5) if clip.dim() > 4 else clip[None])
            # Kept as fp16.
            torch.testing.assert_close(found[1][0], wanted.view(shape), atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("deferred", [False, True])
@torch.no_grad()
def test_training_clips_have_a_few_draws(tiny_data: Path, tmp_path: Path, deferred: bool) -> None:
    """Also where augmentation would be left to a GPU."""
    config = settings(tiny_data, tmp_path)
    model = frozen_model()
    loader = build_dataloaders(config)[0]
    loader.dataset.clips.defer = deferred
    features = over_features(loader, model, config, CPU).dataset
    draws = [features[3, seed][1][0] for seed in range(4)]
    assert torch.equal(draws[0], draws[2])
    assert torch.equal(draws[1], draws[3])
    assert not torch.allclose(draws[0], draws[1], atol=1e-3)
    # As ClipsDataset draws them, from a seed that the path and the number of the draw give.
    path = loader.dataset.clips.rows[3].path.absolute()
    for draw in (0, 1):
        seed = int.from_bytes(hashlib.sha256(f"{path} {draw}".encode()).digest()[:7])
        loader.dataset.clips.defer = False
        wanted = model.per_frame(loader.dataset.clips[3, seed][0][None])[0]
        torch.testing.assert_close(draws[draw], wanted, atol=2e-3, rtol=2e-3)


def test_only_what_changed_is_computed_again(tiny_data: Path, tmp_path: Path) -> None:
    store, model = tmp_path / "features", frozen_model()

    def computed(**others: object) -> int:
        began = time.time_ns()
        config = settings(tiny_data, store, **others)
        for loader in build_dataloaders(config)[:3]:
            over_features(loader, model, config, CPU)
        return sum(file.stat().st_mtime_ns >= began for file in store.glob("*/*.npy"))

    assert computed() == 18 * 2 + 9 + 9  # two draws of each training clip
    assert computed() == 0
    assert computed(loss="focal", seed=4, epochs=2) == 0
    assert computed(flip=0.0) == 36  # of validation and test clips nothing changed
    assert computed(eval_sampling="first") == 54
    file = next(store.glob("*/*.npy"))
    file.unlink()
    assert computed(eval_sampling="first") + computed() + computed(flip=0.0) == 1
    with torch.no_grad():
        model.backbone.conv1.weight.mul_(2)
    assert computed() == 54


def test_a_clip_that_changed_is_computed_again(tmp_path: Path, tiny_data: Path) -> None:
    config = settings(tiny_data, tmp_path)
    loader = build_dataloaders(config)[1]
    features = over_features(loader, frozen_model(), config, CPU).dataset
    row = features.clips.rows[0]
    before = features.place(row, 0)
    status = row.path.stat()
    os.utime(row.path, ns=(status.st_atime_ns, status.st_mtime_ns + 1_000_000))
    try:
        assert before.exists()
        assert features.place(row, 0) != before
    finally:
        os.utime(row.path, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_what_cannot_be_kept_is_refused() -> None:
    model = build_model("cnn_lstm", 3)
    with pytest.raises(UserError, match=r"--freeze-to layer4"):
        require_frozen(model)
    freeze(model, "layer3")
    with pytest.raises(UserError, match=r"--freeze-to layer4"):
        require_frozen(model)
    freeze(model, "layer4")
    require_frozen(model)
    tsm = build_model("tsm", 3)
    freeze(tsm, "layer4")
    with pytest.raises(UserError, match=r"only cnn_lstm"):
        require_frozen(tsm)


def test_training_on_features_tests_like_the_whole_model(
    tiny_data: Path, tmp_path: Path, run_main: Callable
) -> None:
    flags = [
        *TINY_FLAGS, "--data-root", tiny_data, "--model", "cnn_lstm", "--freeze-to", "layer4",
        "--epochs", 2, "--features", tmp_path / "store", "--lstm-layers", 0,
        "--temporal-pooling", "statistics", "--test-views", 2, "--select-by", "last",
        "--run-dir", tmp_path / "runs",
    ]  # fmt: skip
    run_main(train.main, *flags, cwd=tmp_path)
    (run,) = (tmp_path / "runs").iterdir()
    state = load_checkpoint(run)
    assert state["epoch"] == 2  # the last, whatever validation said
    torch.manual_seed(0)
    start = build_model("cnn_lstm", 3, lstm_layers=0, temporal_pooling="statistics")
    for key, value in start.state_dict().items():  # the backbone has not moved
        if key.startswith("backbone"):
            assert torch.equal(state["model"][key], value), key
    run_main(evaluate.main, run, "--workers", 0, cwd=tmp_path)  # decodes, and runs all of it
    whole, _ = read_predictions(run / "evaluate_test" / "predictions.csv")
    kept, _ = read_predictions(run / "predictions.csv")
    np.testing.assert_allclose(kept.probabilities, whole.probabilities, atol=5e-3)


@pytest.mark.parametrize("pooling", ["statistics", "attention"])
def test_low_precision_is_of_the_backbone(
    pooling: str, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Features come as fp32, and a head in bf16 would refuse them."""
    monkeypatch.setattr("train.plot_curves", lambda *_: None)
    more = {"epochs": 1, "amp": "bf16", "lstm_layers": 0, "temporal_pooling": pooling}
    run = train.train(settings(tiny_data, tmp_path / "store", **more), folder=tmp_path / "run")
    assert (run / "test_metrics.json").exists()


def test_features_are_taken_or_left_for_a_whole_run(tmp_path: Path) -> None:
    one, moved, off = (TrainConfig(model="cnn_lstm", features=name) for name in ("a", "b", ""))
    refuse_changes(one, moved)
    for saved, now in ((one, off), (off, one)):
        with pytest.raises(UserError, match="keeps its settings: features"):
            refuse_changes(saved, now)


def test_a_stopped_run_goes_on_exactly(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the features are there already at the second start: no random number differs."""
    monkeypatch.setattr("train.plot_curves", lambda *_: None)
    monkeypatch.setattr("train.test", lambda *_: None)
    config = settings(tiny_data, tmp_path / "store", epochs=2, dropout=0.5, lstm_hidden=8)
    whole = train.train(config, folder=tmp_path / "whole")
    asked, check = [], Interrupt.check

    def stop_at_the_third(interrupt: Interrupt) -> None:
        asked.append(interrupt)
        if len(asked) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        check(interrupt)

    part = tmp_path / "part"
    config = dataclasses.replace(config, features=str(tmp_path / "other store"))
    with monkeypatch.context() as patch:
        patch.setattr(Interrupt, "check", stop_at_the_third)
        with pytest.raises(SystemExit):
            train.train(config, folder=part)
    state = load_checkpoint(part, "last.pt")
    assert (state["epoch"], state["step"]) == (0, 3)
    train.train(dataclasses.replace(from_dict(state["config"]), resume=str(part)), state)
    one, other = (load_checkpoint(folder, "last.pt")["model"] for folder in (whole, part))
    assert all(torch.equal(one[key], other[key]) for key in one)
