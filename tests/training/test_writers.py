"""What other programs are told about a training: scores and settings, and no names."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from helpers import only_run, train_flags

from config import TrainConfig
from train import main
from training.writers import Writers, numbers, open_writers, public_settings, require_packages
from utils.errors import UserError


class FakeWandb:
    """The part of the package that is used; it keeps what it is given."""

    def __init__(self, error: str = "") -> None:
        self.error = error
        self.started: list[dict[str, Any]] = []
        self.logged: list[tuple[int, dict]] = []
        self.summary: dict[str, float] = {}
        self.ended: list[int] = []

    def Settings(self, **settings: object) -> dict:
        return settings

    def init(self, **arguments: object) -> SimpleNamespace:
        if self.error:
            raise ValueError(self.error)
        self.started.append(arguments)
        return SimpleNamespace(
            log=lambda row, step: self.logged.append((step, row)),
            summary=self.summary,
            finish=lambda exit_code: self.ended.append(exit_code),
        )


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> FakeWandb:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def test_a_run_and_its_resumption_are_one_run_without_names(
    wandb: FakeWandb, tiny_data: Path, tmp_path: Path, run_main, mistake, no_figures, monkeypatch
) -> None:
    flags = train_flags(tiny_data, "--epochs", 2, "--wandb")

    def stop(*_: object) -> None:
        raise UserError("stopped before the test")

    with monkeypatch.context() as patch:
        patch.setattr("train.calibrate_best", stop)
        mistake(main, *flags, cwd=tmp_path)
    run = only_run(tmp_path)
    assert (len(wandb.logged), wandb.summary, wandb.ended) == (2, {}, [1])
    run_main(main, "--resume", run, cwd=tmp_path)

    first, second = wandb.started
    assert first["id"] == second["id"] == (run / "wandb_id.txt").read_text().strip()
    assert (first["resume"], first["name"], second["name"]) == ("allow", run.name, None)
    assert wandb.ended == [1, 0]
    history = pd.read_csv(run / "metrics.csv")
    assert [step for step, _ in wandb.logged] == [1, 2]
    logged = pd.DataFrame([row for _, row in wandb.logged])
    assert list(logged.columns) == list(history.columns)
    np.testing.assert_allclose(logged, history, rtol=1e-5)
    results = json.loads((run / "test_metrics.json").read_text())
    assert wandb.summary["test/accuracy"] == results["accuracy"]
    assert wandb.summary["test/macro_average_precision"] == results["macro_average_precision"]
    assert wandb.summary["test/per_class/dark/f1"] == results["per_class"]["dark"]["f1"]
    assert first["config"]["epochs"] == 2
    assert first["config"]["classes"] == ("dark", "grey", "light")
    sent = repr((wandb.logged, wandb.summary, first["config"], second["config"]))
    for secret in (str(tiny_data), "tiny data", ".mp4", ".csv", "test0", "train1"):
        assert secret not in sent
    off = first["settings"]
    assert off["console"] == "off"  # the output names clips
    assert all(off[name] for name in ("x_disable_meta", "disable_git", "disable_code"))


def test_settings_that_may_be_paths_stay_here() -> None:
    config = TrainConfig(
        data_root="/data/Smith",
        train_csv="Smith.csv",
        cache="/Smith",
        feature_cache="/Smith",
        run_dir="Smith",
        resume="Smith",
        weights="Smith.pt",
    )
    settings = public_settings(config)
    assert "Smith" not in repr(settings)
    assert settings.keys() >= {"model_name", "loss", "modality", "epochs", "learning_rate", "seed"}
    assert public_settings(TrainConfig(weights="none"))["weights"] == "none"


def test_of_results_only_numbers_are_sent() -> None:
    results = {
        "accuracy": 0.5,
        "checkpoint": "/data/Smith/best.pt",
        "shuffle_frames": True,
        "warnings": [{"kind": "other", "text": "Smith"}],
        "per_class": {"cut": {"f1": 0.25, "recall": None}},
    }
    assert numbers(results) == {"accuracy": 0.5, "per_class/cut/f1": 0.25}


@pytest.mark.parametrize(
    ("module", "flag", "remedy"),
    [
        ("wandb", "--wandb", "pip install 'wandb>=0.19'"),
        ("torch.utils.tensorboard", "--tensorboard", "pip install -r requirements-optional.txt"),
    ],
)
def test_a_missing_package_is_told_before_anything_is_read(
    module: str, flag: str, remedy: str, tmp_path: Path, monkeypatch, mistake
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    data = ["--data-root", tmp_path / "nowhere", "--classes", "cut", "sew"]
    code, stderr = mistake(main, *data, flag, cwd=tmp_path)
    assert (code, stderr) == (2, f"error: {flag} needs a package: {remedy}\n")
    assert not list(tmp_path.iterdir())
    require_packages(TrainConfig())  # without the flags nothing is needed


def test_a_run_that_cannot_be_started_is_one_line(wandb: FakeWandb, tmp_path: Path) -> None:
    wandb.error = "No API key configured"
    with (
        pytest.raises(UserError, match=r"No API key configured: .*WANDB_MODE=offline"),
        open_writers(TrainConfig(wandb=True), tmp_path),
    ):
        pass
    assert not (tmp_path / "wandb_id.txt").exists()


def test_an_id_that_is_none_is_refused(wandb: FakeWandb, tmp_path: Path) -> None:
    (tmp_path / "wandb_id.txt").write_text("../../other\n")
    with (
        pytest.raises(UserError, match="holds no id of a run"),
        open_writers(TrainConfig(wandb=True), tmp_path),
    ):
        pass
    assert not wandb.started


def test_a_writer_that_fails_stops_no_training(caplog: pytest.LogCaptureFixture) -> None:
    class Broken:
        def write_epoch(self, row: dict) -> None:
            raise OSError("the network is gone\nsince yesterday")

    written: list[dict] = []
    works = SimpleNamespace(write_epoch=written.append)
    Writers([Broken(), works]).write_epoch({"epoch": 1})
    assert written == [{"epoch": 1}]
    assert caplog.messages == ["Broken got no scores: the network is gone"]


def test_tensorboard_gets_epochs_and_results(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with open_writers(TrainConfig(tensorboard=True), tmp_path) as writers:
        for epoch in (1, 2):
            writers.write_epoch({"epoch": epoch, "val_loss": 1 / epoch})
        writers.write_results({"accuracy": 0.75, "split": "test"}, 2)
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(e.step, e.value) for e in events.Scalars("val_loss")] == [(1, 1.0), (2, 0.5)]
    assert [(e.step, e.value) for e in events.Scalars("test/accuracy")] == [(2, 0.75)]
    assert "test/split" not in events.Tags()["scalars"]
