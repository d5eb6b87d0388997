"""train.py from end to end: the run folder, all models, fine-tuning, several processes."""

import dataclasses
import json
import re
import shutil
import socket
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import (
    history,
    make_data,
    make_model,
    make_state,
    only_run,
    start_script,
    tiny_config,
    train_epoch,
    train_flags,
)

from checkpoint import load_checkpoint, rebuild_model
from config import TrainConfig, from_dict
from evaluate import main as evaluate_main
from evaluation.calibration import Calibration, calibrate
from models import MODELS
from train import main, read_settings, train
from training.engine import evaluate
from training.loaders import build_dataloaders
from utils import distributed

pytestmark = pytest.mark.usefixtures("no_figures")


def test_run_folder_is_complete(trained) -> None:
    run, stdout = trained
    names = {path.name for path in run.iterdir()}
    assert names == {
        "config.json",
        "metrics.csv",
        "best.pt",
        "last.pt",
        "test_metrics.json",
        "predictions.csv",
        "confusion_matrix.csv",
        "confusion_matrix.png",
        "precision_recall.png",
        "embedding.csv",
        "embedding.png",
        "curves.png",
        "train.log",
        "environment.json",
    }
    assert str(run.name) in stdout
    assert run.name.endswith("_vivit")
    assert json.loads((run / "config.json").read_text())["epochs"] == 4
    assert len(history(run)) == 4
    assert "macro-F1" in stdout
    assert "macro-F1" in (run / "train.log").read_text()


def test_best_epoch_is_the_one_that_is_tested(trained) -> None:
    run, _ = trained
    table = history(run)
    best = load_checkpoint(run)
    tested = json.loads((run / "test_metrics.json").read_text())
    assert best["epoch"] == tested["epoch"] == int(table["val_macro_f1"].idxmax()) + 1
    predictions = pd.read_csv(run / "predictions.csv")
    assert len(predictions) == tested["clips"] == 9
    probabilities = predictions[["p_dark", "p_grey", "p_light"]].to_numpy()
    assert np.allclose(probabilities.sum(axis=1), 1, atol=1e-5)
    named = np.array(["dark", "grey", "light"])[probabilities.argmax(axis=1)]
    assert (named == predictions["prediction"]).all()
    accuracy = (predictions["label"] == predictions["prediction"]).mean()
    assert accuracy == pytest.approx(tested["accuracy"])
    assert pd.read_csv(run / "confusion_matrix.csv", index_col=0).to_numpy().sum() == 9


def test_checkpoints_are_plain_and_safe(trained) -> None:
    run, _ = trained
    for name in ("best.pt", "last.pt"):
        state = torch.load(run / name, weights_only=True)
        assert state["format_version"] == 1
        assert state["classes"] == ["dark", "grey", "light"]
        assert not any("_orig_mod" in key or "module." in key for key in state["model"])
    assert {"optimizer", "scheduler", "scaler", "rng", "step"} <= set(state)
    assert state["epoch"] == 4


def test_best_epoch_is_calibrated_on_validation(trained, tiny_data: Path, tmp_path: Path) -> None:
    """Temperature and threshold are those of the validation clips, also if fitted a second time."""
    run, _ = trained
    state = load_checkpoint(run)
    config = from_dict({**state["config"], "data_root": str(tiny_data)})
    _, val_loader, _, _ = build_dataloaders(config)
    cpu = torch.device("cpu")
    predictions = evaluate(rebuild_model(state), val_loader, cpu)
    fitted = calibrate(predictions.labels, predictions.probabilities, config.target_error)
    stored = Calibration.from_state_dict(state["calibration"])
    assert stored.temperature == pytest.approx(fitted.temperature, rel=1e-4)
    assert stored.confidence == pytest.approx(fitted.confidence, rel=1e-4)
    assert stored.correct == fitted.correct
    tested = json.loads((run / "test_metrics.json").read_text())
    assert tested["calibration"]["temperature"] == stored.temperature != 1
    assert tested["selective"]["threshold"] == stored.threshold
    again = tmp_path / "again"
    shutil.copytree(run, again)
    last = load_checkpoint(again, "last.pt")
    train(dataclasses.replace(from_dict(last["config"]), resume=str(again)), last)
    assert load_checkpoint(again)["calibration"] == state["calibration"]
    assert json.loads((again / "test_metrics.json").read_text())["loss"] == tested["loss"]


@pytest.mark.parametrize("model", [name for name in MODELS if name != "vivit"])
def test_every_model_trains_and_evaluates(model: str, tiny_data, tmp_path, run_main) -> None:
    more = ["--model-name", model, "--epochs", 1, "--gradient-accumulation-steps", 2]
    run_main(main, *train_flags(tiny_data, *more), cwd=tmp_path)
    run = only_run(tmp_path)
    flags = ("--num-workers", 0, "--device", "cpu")
    stdout = run_main(evaluate_main, run, *flags, cwd=tmp_path).stdout
    tested = json.loads((run / "test_metrics.json").read_text())
    evaluated = json.loads((run / "evaluate_test" / "test_metrics.json").read_text())
    assert evaluated["accuracy"] == tested["accuracy"]
    assert evaluated["loss"] == pytest.approx(tested["loss"], abs=1e-6)
    assert "macro-F1" in stdout


def test_fine_tuning_freezing_and_tensorboard(trained, tiny_data, tmp_path, run_main) -> None:
    pytest.importorskip("tensorboard")
    run, _ = trained
    more = ["--weights", run / "best.pt", "--freeze-until", "temporal3", "--layer-decay", "0.5"]
    more += ["--epochs", 1, "--tensorboard"]
    done = run_main(main, *train_flags(tiny_data, *more), cwd=tmp_path)
    assert "all of the model" in done.stdout
    (block,) = make_model("vivit", 3).stages()["temporal3"]
    size = sum(parameter.numel() for parameter in block.parameters())
    assert re.search(rf"temporal3 +{size:,}  frozen", done.stdout)
    before, after = load_checkpoint(run)["model"], load_checkpoint(only_run(tmp_path))["model"]
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    trained_keys = ("temporal.3.", "temporal_norm.", "head.")
    assert changed == {key for key in before if key.startswith(trained_keys)}
    assert list(only_run(tmp_path).glob("events.out.tfevents*"))


def test_own_data_without_network_names_the_weights_file(
    tiny_data: Path, tmp_path: Path, run_main, monkeypatch
) -> None:
    """Own data are trained from pretrained weights: without a network, never from random ones."""
    arguments = ["--data-root", tiny_data, "--classes", "dark", "grey", "light", "--epochs", 1]
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    done = run_main(main, *arguments, cwd=tmp_path, code=2)
    assert "resnet18-f37072fd.pth (44.7 MB" in done.stderr
    assert str(tmp_path / "hub" / "checkpoints") in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("error: cannot download")


def test_unreadable_clips(tmp_path: Path, run_main, mistake) -> None:
    """Unreadable training clips are left out and listed; others are an error that lists all."""
    data = make_data(tmp_path, ("dark", "light"), {"train": 4, "val": 2, "test": 2})
    # With tau 0 every clip is drawn.
    common = ["--classes", "dark", "light", "--epochs", 1, "--sampler-tau", 0]
    (data / "clips/train/0_1.mp4").write_bytes(b"broken")
    done = run_main(main, *train_flags(data, *common), cwd=tmp_path)
    assert "1 training clips that were drawn could not be read and were left out" in done.stdout
    assert "train/0_1.mp4: cannot be read" in done.stdout
    for name in ("val/0_0", "test/1_1"):
        (data / f"clips/{name}.mp4").write_bytes(b"broken")
    done = run_main(main, *train_flags(data, *common), cwd=tmp_path, code=2)
    assert "2 validation and test clips cannot be read" in done.stderr
    assert all(f"{name}.mp4: cannot be read" in done.stderr for name in ("val/0_0", "test/1_1"))
    assert "epoch   1" not in done.stdout
    done = run_main(main, *train_flags(data, *common, "--skip-unreadable"), cwd=tmp_path)
    assert "MISSING: 1 clips could not be read" in done.stdout
    run = max((tmp_path / "runs").iterdir(), key=lambda path: path.stat().st_mtime)
    tested = json.loads((run / "test_metrics.json").read_text())
    assert (tested["clips"], tested["unreadable_clips"]) == (3, 1)
    code, stderr = mistake(evaluate_main, run, "--num-workers", 0, cwd=tmp_path)
    assert code == 2
    assert "1 test clips cannot be read" in stderr


@pytest.mark.parametrize(
    ("broken", "flags", "message"),
    [
        ("train/*", [], "none of the train clips of dark, light can be read:"),
        ("train/1_*", [], "none of the train clips of light can be read:"),
        ("test/*", ["--skip-unreadable"], "none of the test clips can be read:"),
        ("val/*", ["--skip-unreadable", "--no-check-clips"], "none of the val clips can be read:"),
    ],
)
def test_nothing_is_trained_without_readable_clips(
    broken: str, flags: list[str], message: str, tmp_path: Path, mistake
) -> None:
    data = make_data(tmp_path, ("dark", "light"), {"train": 2, "val": 1, "test": 1})
    for path in (data / "clips").glob(f"{broken}.mp4"):
        path.write_bytes(b"broken")
    code, stderr = mistake(main, *train_flags(data, "--classes", "dark", "light", *flags), cwd=data)
    assert code == 2
    assert f"error: {message}\n" in stderr
    assert ".mp4: cannot be read: " in stderr
    assert not (data / "runs").exists()


def test_batchnorm_needs_more_than_one_value_per_channel(
    tiny_data: Path, tmp_path: Path, mistake, monkeypatch
) -> None:
    """R(2+1)D turns 4 frames of 16 px into one value per channel. 18 training clips leave a batch
    of one where 17 fit into the first."""
    flags = ["--model-name", "r2plus1d", "--image-size", 16, "--batch-size", 17]
    code, stderr = mistake(main, *train_flags(tiny_data, *flags), cwd=tmp_path)
    assert code == 2
    assert "the smallest batch of an epoch has 1 of 18 clips, too few for BatchNorm" in stderr
    assert not (tmp_path / "runs").exists()
    # A batch that only unreadable clips make that small is found out later.
    monkeypatch.setattr("training.checks.check_smallest_batch", lambda *_: None)
    code, stderr = mistake(main, *train_flags(tiny_data, *flags), cwd=tmp_path)
    assert code == 2
    assert "a batch has only one clip that can be read, too few for BatchNorm" in stderr


def test_non_finite_loss_stops_with_the_clips(tiny_data: Path, tmp_path: Path, mistake) -> None:
    more = ["--learning-rate", "1e30", "--warmup-epochs", 0, "--max-grad-norm", 0]
    code, stderr = mistake(main, *train_flags(tiny_data, *more), cwd=tmp_path)
    assert code == 2
    assert "error: the loss became" in stderr
    assert "lower learning_rate" in stderr
    assert ".mp4" in stderr
    assert "Traceback" not in stderr


def test_patience_stops_early(tiny_data: Path, tmp_path: Path, run_main) -> None:
    more = ["--epochs", 30, "--early-stopping-patience", 1, "--learning-rate", "1e-9"]
    run_main(main, *train_flags(tiny_data, *more), cwd=tmp_path)
    table = history(only_run(tmp_path))
    assert len(table) < 30
    assert table["val_macro_f1"].iloc[-1] <= table["val_macro_f1"].iloc[:-1].max()


def weights_after_an_epoch(config: TrainConfig) -> list[torch.Tensor]:
    """The weights of a ViViT, which has no BatchNorm that would see the batch size."""
    loader = build_dataloaders(config)[0]
    torch.manual_seed(0)
    model = make_model("vivit", 3, n_frames=4, image_size=32)
    train_epoch(make_state(config, model, -(-18 // config.batch_size)), loader)
    return [parameter.detach() for parameter in model.parameters()]


def test_accumulated_batches_equal_one_large_batch(tiny_data: Path) -> None:
    """Also where the last step is short: 18 clips, 4 x 2 per step."""
    settings = {"learning_rate": 1e-3, "warmup_epochs": 0}
    large = tiny_config(tiny_data, **settings, batch_size=8)
    small = tiny_config(tiny_data, **settings, batch_size=4, gradient_accumulation_steps=2)
    first, second = weights_after_an_epoch(large), weights_after_an_epoch(small)
    for one, two in zip(first, second, strict=True):
        assert torch.allclose(one, two, atol=2e-5)


def test_two_processes_train_as_one_with_the_same_global_batch(
    tiny_data, tmp_path, run_main
) -> None:
    """Same losses epoch by epoch, same predictions, every test clip counted once."""
    common = train_flags(tiny_data, "--epochs", 2, "--dropout", 0)
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    run_main(main, *common, "--batch-size", 6, cwd=tmp_path / "one")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    # The environment that torchrun makes.
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    flags = [*common, "--batch-size", 3]
    processes = [
        start_script("train.py", *flags, cwd=tmp_path / "two", **group, RANK=rank, LOCAL_RANK=rank)
        for rank in ("0", "1")
    ]
    for process in processes:
        process.join(200)
    output = (tmp_path / "two" / "out.txt").read_text()
    assert [process.exitcode for process in processes] == [0, 0], output
    assert "2 processes" in output
    one, two = only_run(tmp_path / "one"), only_run(tmp_path / "two")
    assert np.allclose(history(one), history(two), atol=1e-4)
    predictions = [pd.read_csv(run / "predictions.csv") for run in (one, two)]
    assert predictions[0]["path"].tolist() == predictions[1]["path"].tolist()
    assert len(predictions[1]) == 9  # odd: a padded sampler would count a clip twice
    columns = ["p_dark", "p_grey", "p_light"]
    assert np.allclose(predictions[0][columns], predictions[1][columns], atol=1e-3)
    # One process can go on, with as many clips per step.
    done = run_main(main, "--resume", two, cwd=tmp_path)
    assert "resumed at epoch 3, batch 1\n" in done.stdout
    assert "  gradient_accumulation_steps: 2, before 1\n" in done.stdout
    assert "  1 processes, before 2: 6 clips per step." in done.stdout
    assert np.allclose(pd.read_csv(two / "predictions.csv")[columns], predictions[1][columns])


def test_one_process_is_a_group_by_itself() -> None:
    assert distributed.all_reduce_sum([1.5, 2]) == [1.5, 2]
    assert distributed.all_gather("a") == ["a"]
    assert distributed.broadcast_object("a") == "a"
    assert (distributed.rank(), distributed.world_size()) == (0, 1)


def test_train_can_be_called_from_python(tiny_data: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert (train(tiny_config(tiny_data, epochs=1)) / "best.pt").is_file()


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--amp", "--amp is now called --precision"),
        ("--no-features", "--no-features is now called --feature-cache"),
        ("--clip-norm=0", "--clip-norm is now called --max-grad-norm"),
    ],
)
def test_earlier_flags_are_told_their_new_name(
    flag: str, message: str, tmp_path: Path, mistake
) -> None:
    assert mistake(main, flag, "fp32", cwd=tmp_path).stderr == f"error: {message}\n"


@pytest.mark.parametrize("equals", [True, False])
def test_earlier_spellings_of_models_and_modalities_are_understood(
    equals: bool, tmp_path: Path, monkeypatch
) -> None:
    pairs = [("--model", "cnn_lstm"), ("--modality", "rgb+gradients")]
    flags = (
        [f"{flag}={value}" for flag, value in pairs] if equals else [x for p in pairs for x in p]
    )
    monkeypatch.setattr(sys, "argv", ["train.py", *flags, "--train-csv", "tsm"])
    config, state = read_settings()
    assert (config.model_name, config.modality) == ("cnnlstm", "rgb+rgbdiff")
    assert (config.train_csv, state) == ("tsm", None)  # only these flags have earlier spellings
    monkeypatch.setattr(sys, "argv", ["train.py", "--model", "tsm"])
    assert read_settings()[0] == TrainConfig(model_name="tsm_resnet")
