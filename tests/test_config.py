"""TrainConfig: what its defaults stand for and what is refused."""

import dataclasses
import importlib
import re
import sys
from pathlib import Path

import pytest
from helpers import ROOT

from config import TrainConfig, from_dict, manifest_paths
from train import main
from training.checks import DEMO, OWN_DATA, resolve
from utils.errors import UserError


def test_none_stands_for_what_suits_the_data() -> None:
    demo, own = resolve(TrainConfig()), resolve(TrainConfig(data_root="x"))
    assert (demo.weights, own.weights) == ("none", "default")
    assert (demo.image_size, own.image_size) == (DEMO["image_size"], 224)
    assert own.epochs == OWN_DATA["epochs"]
    assert resolve(TrainConfig(image_size=80, epochs=3)).image_size == 80
    unset = {field.name for field in dataclasses.fields(TrainConfig) if field.default is None}
    assert unset == set(DEMO) == set(OWN_DATA)


def test_round_trip_through_a_checkpoint() -> None:
    config = resolve(TrainConfig(classes=("a", "b"), model="vivit"))
    saved = dataclasses.asdict(config) | {"classes": ["a", "b"], "a_setting_of_the_future": 1}
    assert from_dict(saved) == config


def test_every_field_has_a_docstring() -> None:
    source = (ROOT / "config.py").read_text(encoding="utf-8")
    body = source[source.index("class TrainConfig") :]
    for field in dataclasses.fields(TrainConfig):
        assert re.search(rf'\n    {field.name}: .*\n    """.+', body), field.name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "resnet"}, "model = 'resnet': choose from 'tsm', 'cnn_lstm'"),
        ({"epochs": 0}, "epochs = 0: must be at least 1"),
        ({"flip": 1.5}, "flip = 1.5: must be from 0 to 1"),
        ({"hue": 0.7}, "hue = 0.7: must be from 0 to 0.5"),
        ({"learning_rate": float("nan")}, "learning_rate = nan"),
        ({"classes": ("a",)}, "needs two at least"),
        ({"classes": ("a", "a")}, "twice"),
        ({"features": "x", "cutmix": 1.0}, "cutmix cuts pictures"),
        ({"rand_magnitude": 20}, "rand_magnitude does nothing without rand_augment"),
        ({"feature_draws": 2}, "feature_draws does nothing without features"),
        ({"learning_rate": float("inf")}, "learning_rate = inf"),
        ({"patience": 5, "select_by": "last"}, "patience is a setting of select_by macro_f1"),
        ({"carry_past": 0.9}, "carry_past is a setting of shift_mode causal"),
        ({"mixup": 0.2, "batch_size": 1}, "batch_size must be 2 at least"),
        ({"test_views": 2, "eval_sampling": "first"}, "one view only"),
        ({"model": "vivit", "freeze_batchnorm": True}, "vivit has no BatchNorm"),
        ({"backbone": "convnext_tiny", "freeze_batchnorm": True}, "convnext_tiny has no BatchNorm"),
        (
            {"model": "cnn_lstm", "lstm_layers": 0, "bidirectional": True},
            "bidirectional does nothing without lstm_layers",
        ),
        ({"features": "x", "gradient_checkpointing": True}, "gradient_checkpointing saves nothing"),
        ({"lstm_hidden": 64}, "lstm_hidden is a setting of cnn_lstm, not tsm"),
        ({"model": "vivit", "shift_div": 4}, "shift_div is a setting of tsm, not vivit"),
    ],
)
def test_what_cannot_work_is_refused(changes: dict, message: str) -> None:
    with pytest.raises(UserError) as error:
        resolve(dataclasses.replace(TrainConfig(), **changes))
    assert message in str(error.value)


def test_all_wrong_settings_are_told_at_once() -> None:
    with pytest.raises(UserError) as error:
        resolve(TrainConfig(epochs=0, batch_size=0, tau=-1))
    assert all(name in str(error.value) for name in ("epochs", "batch_size", "tau"))


def test_manifests_are_looked_up_below_data_root_first(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.csv").touch()
    (tmp_path / "other.csv").touch()
    paths = manifest_paths(TrainConfig(data_root="data", val_csv="other.csv"))
    assert paths["train"] == Path("data/train.csv")
    assert paths["val"] == Path("other.csv")
    assert paths["test"] == Path("data/test.csv")


SCRIPTS = sorted(path.stem for path in ROOT.glob("*.py") if "tyro" in path.read_text())
SCRIPTS = [name for name in SCRIPTS if "\n@script\n" in (ROOT / f"{name}.py").read_text()]


def test_scripts_are_found() -> None:
    assert len(SCRIPTS) >= 9
    assert {"train", "evaluate", "cross_validate", "report", "compare"} <= set(SCRIPTS)


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_has_help(script: str, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", [f"{script}.py", "--help"])
    with pytest.raises(SystemExit) as end:
        importlib.import_module(script).main()
    assert not end.value.code
    said = capsys.readouterr().out
    assert f"{script}.py" in said
    assert "--" in said


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model", "resnet"], "cnn_lstm"),
        (["--epochs", "0"], "epochs = 0: must be at least 1"),
        (["--device", "cuda:77"], "device 'cuda:77' cannot be used here"),
        (["--data-root", "nowhere"], "nowhere/train.csv: no such manifest"),
        (["--resume", "nowhere"], "nowhere: no such checkpoint"),
        (["--no-such-flag"], "no-such-flag"),
    ],
)
def test_wrong_flags_are_an_error_for_people(flags, message, tmp_path: Path, mistake) -> None:
    code, stderr = mistake(main, *flags, cwd=tmp_path)
    assert code == 2
    assert message in " ".join(stderr.split())
    assert not (tmp_path / "runs").exists()
