"""Checkpoints: what they hold, that earlier ones still work, and what is refused."""

import dataclasses
import json
import random
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import make_model, make_state, same_tensors, tiny_config, train_epoch

from checkpoint import (
    load_checkpoint,
    rebuild_model,
    rng_state,
    save_checkpoint,
    set_rng_state,
)
from config import OLD_NAMES, OLD_VALUES, TrainConfig
from evaluate import main as evaluate_main
from evaluation.calibration import Calibration
from evaluation.novelty import NoveltyReference
from train import main
from training.loaders import build_dataloaders
from utils.errors import UserError

# The keys of a checkpoint. Those of the averaged weights are there only with ema_decay.
MODEL_KEYS = {"model", "epoch", "best", "history", "config", "classes", "class_counts", "clips"}
MODEL_KEYS |= {"pretrained"}
RESUME_KEYS = {"optimizer", "scheduler", "scaler", "step", "totals", "rng", "unreadable"}
EMA_KEYS = {"trained", "averaged_steps"}


def as_earlier(state: dict) -> dict:
    """A checkpoint as earlier versions wrote it: other names in the config and calibration."""
    new_to_old = {new: old for old, new in OLD_NAMES.items()}
    config = {}
    for name, value in state["config"].items():
        spellings = {new: old for old, new in OLD_VALUES.get(name, {}).items()}
        config[new_to_old.get(name, name)] = spellings.get(value, value) if spellings else value
    earlier = {**state, "config": config}
    if "calibration" in state:
        names = {"target_error": "wanted_error", "correct": "right"}
        calibration = state["calibration"].items()
        earlier["calibration"] = {names.get(key, key): value for key, value in calibration}
    earlier.pop("novelty", None)
    return earlier


@pytest.fixture
def earlier_run(trained, tmp_path: Path) -> Path:
    """A copy of a finished run as an earlier version would have written it."""
    run = tmp_path / "earlier"
    shutil.copytree(trained[0], run)
    for name in ("best.pt", "last.pt"):
        save_checkpoint(run / name, as_earlier(load_checkpoint(run, name)))
    config = as_earlier({"config": json.loads((run / "config.json").read_text())})["config"]
    (run / "config.json").write_text(json.dumps(config))
    return run


def test_the_keys_are_those_of_the_format(tiny_data: Path) -> None:
    config = tiny_config(tiny_data)
    plain = make_state(config, make_model("vivit", 3, n_frames=4, image_size=32))
    assert plain.model_state_dict().keys() == MODEL_KEYS
    assert plain.state_dict().keys() == MODEL_KEYS | RESUME_KEYS
    config = dataclasses.replace(config, ema_decay=0.9)
    averaged = make_state(config, make_model("vivit", 3, n_frames=4, image_size=32))
    assert averaged.state_dict().keys() == MODEL_KEYS | RESUME_KEYS | EMA_KEYS


def test_a_finished_run_also_has_its_calibration(trained) -> None:
    best, last = (load_checkpoint(trained[0], name) for name in ("best.pt", "last.pt"))
    assert best.keys() == MODEL_KEYS | {"calibration", "novelty", "frame_rate", "format_version"}
    assert last.keys() == MODEL_KEYS | RESUME_KEYS | {"format_version"}
    assert best["calibration"].keys() == {
        *("temperature", "target_error", "threshold", "confidence", "correct")
    }


def test_checkpoints_of_earlier_versions_rebuild_the_model(earlier_run: Path, trained) -> None:
    earlier, best = load_checkpoint(earlier_run), load_checkpoint(trained[0])
    assert earlier["config"]["model"] == "vivit"
    assert "workers" in earlier["config"] and "num_workers" not in earlier["config"]
    assert "wanted_error" in earlier["calibration"]
    first, second = rebuild_model(earlier), rebuild_model(best)
    assert same_tensors(first.state_dict(), second.state_dict())
    clips = torch.randint(0, 256, (2, 4, 3, 32, 32), dtype=torch.uint8)
    with torch.inference_mode():
        assert torch.equal(first(clips), second(clips))
    calibrations = [Calibration.from_state_dict(s["calibration"]) for s in (earlier, best)]
    assert calibrations[0] == calibrations[1]
    assert NoveltyReference.of_checkpoint(earlier) is None


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("tsm", {"shift_mode": "causal", "carry_past": 0.3, "inputs": "rgb+vectors"}),
        ("cnn_lstm", {"grid": 2, "lstm_hidden": 8, "inputs": "gradients"}),
    ],
)
def test_earlier_spellings_rebuild_the_same_model(name: str, options: dict) -> None:
    """As a checkpoint of an earlier version names the model and its settings."""
    now = {OLD_NAMES.get(k, k): OLD_VALUES["modality"].get(v, v) for k, v in options.items()}
    torch.manual_seed(0)
    model = make_model(OLD_VALUES["model_name"][name], 2, **now).eval()
    config = {**options, "model": name, "classes": ["a", "b"]}
    state = {"model": model.state_dict(), "config": config, "classes": ["a", "b"]}
    rebuilt = rebuild_model(state)
    assert type(rebuilt) is type(model)
    assert same_tensors(rebuilt.state_dict(), model.state_dict())
    clips = torch.randint(0, 256, (1, 3, model.channels, 32, 32), dtype=torch.uint8)
    with torch.inference_mode():
        assert torch.equal(rebuilt(clips), model(clips))


def test_a_run_of_an_earlier_version_predicts_as_before(
    earlier_run: Path, trained, run_main
) -> None:
    flags = ("--num-workers", 0, "--device", "cpu")
    run_main(evaluate_main, earlier_run, *flags, cwd=earlier_run)
    columns = ["p_dark", "p_grey", "p_light"]
    before = pd.read_csv(trained[0] / "predictions.csv")
    now = pd.read_csv(earlier_run / "evaluate_test" / "predictions.csv")
    assert (now["prediction"] == before["prediction"]).all()
    assert (now["decision"] == before["decision"]).all()
    np.testing.assert_allclose(now[columns], before[columns], atol=1e-6)


def test_a_run_of_an_earlier_version_can_be_resumed(
    earlier_run: Path, trained, tmp_path: Path, run_main, no_figures
) -> None:
    """It is finished already, so that only calibration and test are repeated."""
    run_main(main, "--resume", earlier_run, cwd=tmp_path)
    before, now = load_checkpoint(trained[0]), load_checkpoint(earlier_run)
    assert now["calibration"] == before["calibration"]
    results = json.loads((earlier_run / "test_metrics.json").read_text())
    assert results["loss"] == json.loads((trained[0] / "test_metrics.json").read_text())["loss"]


def test_a_state_that_is_loaded_continues_exactly(tiny_data: Path, tmp_path: Path) -> None:
    """Through the file, where a safe load turns tuples into other types."""
    config = tiny_config(tiny_data, ema_decay=0.9, learning_rate=1e-2)
    loader = build_dataloaders(config)[0]
    torch.manual_seed(1)
    whole = make_state(config, make_model("vivit", 3, n_frames=4, image_size=32, dropout=0.3))
    train_epoch(whole, loader)
    whole.progress.end_epoch()
    whole.save(tmp_path)
    train_epoch(whole, loader)
    second = make_state(config, make_model("vivit", 3, n_frames=4, image_size=32, dropout=0.3))
    second.load_state_dict(load_checkpoint(tmp_path, "last.pt"))
    train_epoch(second, loader)
    assert same_tensors(whole.eval_model.state_dict(), second.eval_model.state_dict())
    assert same_tensors(whole.model.state_dict(), second.model.state_dict())


def test_random_generators_continue() -> None:
    state = rng_state()
    drawn = random.random(), torch.rand(3)
    set_rng_state(state)
    assert random.random() == drawn[0]
    assert torch.equal(torch.rand(3), drawn[1])


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"give a run folder or a \.pt file"):
        load_checkpoint(tmp_path)
    path = tmp_path / "best.pt"
    torch.save({"model": {}}, path)
    with pytest.raises(UserError, match="no 'format_version' in it"):
        load_checkpoint(path)
    torch.save({"format_version": 99}, path)
    with pytest.raises(UserError, match="written by a newer version"):
        load_checkpoint(tmp_path)
    path.write_bytes(b"no checkpoint")
    with pytest.raises(UserError, match=r"it is damaged, or not a file of torch\.save"):
        load_checkpoint(path)


def test_a_config_without_a_setting_has_its_default() -> None:
    """Earlier versions did not have all settings."""
    state = {"config": {"model": "tsm", "classes": ["a", "b"]}, "classes": ["a", "b"]}
    state["model"] = make_model("tsm_resnet", 2).state_dict()
    assert rebuild_model(state).shift_div == TrainConfig().shift_div


@pytest.mark.parametrize("key", ["model", "config", "classes"])
def test_a_checkpoint_without_its_parts_is_one_line(key: str, tmp_path: Path) -> None:
    state = {"model": {}, "config": {}, "classes": []}
    del state[key]
    save_checkpoint(tmp_path / "best.pt", state)
    with pytest.raises(UserError, match=f"not a checkpoint of this project .no '{key}' in it"):
        load_checkpoint(tmp_path)
