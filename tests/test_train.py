"""train.py from end to end: the run folder, all models, fine-tuning, several processes."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import ROOT, history, make_data, only_run, run_script, train_flags

from checkpoint import build_from_checkpoint, load_checkpoint
from config import TrainConfig, from_dict
from evaluate import main as evaluate_main
from evaluation.calibration import Calibration, calibrate
from models import build_model
from train import main, train
from training.checks import resolve
from training.engine import evaluate, train_one_epoch
from training.loaders import build_dataloaders
from training.optim import cosine_with_warmup
from training.state import Training
from utils import distributed
from utils.errors import UserError
from utils.interrupt import Interrupt


def test_run_folder_is_complete(trained) -> None:
    run, done = trained
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
        "curves.png",
        "train.log",
        "environment.json",
    }
    assert str(run.name) in done.stdout
    assert run.name.endswith("_vivit")
    assert json.loads((run / "config.json").read_text())["epochs"] == 4
    assert len(history(run)) == 4
    assert "precision" in done.stdout
    assert "precision" in (run / "train.log").read_text()


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
    right = (predictions["label"] == predictions["prediction"]).mean()
    assert right == pytest.approx(tested["accuracy"])
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
    said = evaluate(build_from_checkpoint(state), val_loader, cpu)
    fitted = calibrate(said.labels, said.probabilities, config.wanted_error)
    stored = Calibration.from_state(state["calibration"])
    assert stored.temperature == pytest.approx(fitted.temperature, rel=1e-4)
    assert stored.confidence == pytest.approx(fitted.confidence, rel=1e-4)
    assert stored.right == fitted.right
    tested = json.loads((run / "test_metrics.json").read_text())
    assert tested["calibration"]["temperature"] == stored.temperature != 1
    assert tested["selective"]["threshold"] == stored.threshold
    again = tmp_path / "again"
    shutil.copytree(run, again)
    last = load_checkpoint(again, "last.pt")
    train(dataclasses.replace(from_dict(last["config"]), resume=str(again)), last)
    assert load_checkpoint(again)["calibration"] == state["calibration"]
    assert json.loads((again / "test_metrics.json").read_text())["loss"] == tested["loss"]


@pytest.mark.parametrize("model", ["tsm", "cnn_lstm", "r2plus1d"])
def test_every_model_trains_and_evaluates(model: str, tiny_data, tmp_path, run_main) -> None:
    arguments = train_flags(tiny_data, "--model", model, "--epochs", 1, "--accumulation", 2)
    run_main(main, *arguments, cwd=tmp_path)
    run = only_run(tmp_path)
    again = ("--workers", 0, "--device", "cpu")
    again = run_main(evaluate_main, run, *again, cwd=tmp_path).stdout
    tested = json.loads((run / "test_metrics.json").read_text())
    evaluated = json.loads((run / "evaluate_test" / "test_metrics.json").read_text())
    assert evaluated["accuracy"] == tested["accuracy"]
    assert evaluated["loss"] == pytest.approx(tested["loss"], abs=1e-6)
    assert "macro-F1" in again


def test_fine_tuning_freezing_and_tensorboard(trained, tiny_data, tmp_path, run_main) -> None:
    pytest.importorskip("tensorboard")
    run, _ = trained
    more = ["--weights", run / "best.pt", "--freeze-to", "temporal3", "--layer-decay", "0.5"]
    more += ["--epochs", 1, "--tensorboard"]
    done = run_main(main, *train_flags(tiny_data, *more), cwd=tmp_path)
    assert "all of the model" in done.stdout
    (block,) = build_model("vivit", 3).stages()["temporal3"]
    size = sum(parameter.numel() for parameter in block.parameters())
    assert re.search(rf"temporal3 +{size:,}  frozen", done.stdout)
    before, after = load_checkpoint(run)["model"], load_checkpoint(only_run(tmp_path))["model"]
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    free = ("temporal.3.", "temporal_norm.", "head.")
    assert moved == {key for key in before if key.startswith(free)}
    assert list(only_run(tmp_path).glob("events.out.tfevents*"))


def test_missing_tensorboard_is_told(monkeypatch, tmp_path) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match="pip install tensorboard"):
        from train import _tensorboard

        _tensorboard(tmp_path)


def test_own_data_without_network_names_the_weights_file(tiny_data: Path, tmp_path: Path) -> None:
    """The default on own data is pretrained: no network must never mean random weights."""
    arguments = ["--data-root", tiny_data, "--classes", "dark", "grey", "light", "--epochs", 1]
    done = run_script(
        "train.py",
        *arguments,
        cwd=tmp_path,
        check=False,
        TORCH_HOME=str(tmp_path),
        https_proxy="http://127.0.0.1:9",
    )
    assert done.returncode == 2
    assert "resnet18-f37072fd.pth (44.7 MB" in done.stderr
    assert str(tmp_path / "hub" / "checkpoints") in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("error: cannot download")


def test_unreadable_clips(tmp_path: Path, run_main, mistake) -> None:
    """In training left out and listed at the end; in validation and test an error listing all."""
    data = make_data(tmp_path, ("dark", "light"), {"train": 4, "val": 2, "test": 2})
    common = ["--classes", "dark", "light", "--epochs", 1, "--tau", 0]  # every clip is drawn
    (data / "clips/train/0_1.mp4").write_bytes(b"broken")
    done = run_main(main, *train_flags(data, *common), cwd=tmp_path)
    assert "1 training clips could not be read and were left out" in done.stdout
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
    code, stderr = mistake(evaluate_main, run, "--workers", 0, cwd=tmp_path)
    assert code == 2
    assert "1 test clips cannot be read" in stderr


def test_non_finite_loss_stops_with_the_clips(tiny_data: Path, tmp_path: Path, mistake) -> None:
    more = ["--learning-rate", "1e30", "--warmup-epochs", 0, "--clip-norm", 0]
    code, stderr = mistake(main, *train_flags(tiny_data, *more), cwd=tmp_path)
    assert code == 2
    assert "error: the loss became" in stderr
    assert "lower learning_rate" in stderr
    assert ".mp4" in stderr
    assert "Traceback" not in stderr


def test_patience_stops_early(tiny_data: Path, tmp_path: Path, run_main) -> None:
    more = ["--epochs", 30, "--patience", 1, "--learning-rate", "1e-9"]
    run_main(main, *train_flags(tiny_data, *more), cwd=tmp_path)
    table = history(only_run(tmp_path))
    assert len(table) < 30
    assert table["val_macro_f1"].iloc[-1] <= table["val_macro_f1"].iloc[:-1].max()


def test_schedule_is_linear_then_cosine() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = cosine_with_warmup(optimizer, steps=100, warmup=10)
    rates = []
    for _ in range(100):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates[:10] == pytest.approx([0.01 + 0.099 * i for i in range(10)])
    cosine = [0.5 * (1 + np.cos(np.pi * i / 90)) for i in range(90)]
    assert rates[10:] == pytest.approx(cosine, abs=1e-9)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0, abs=1e-9)


def gradients(config: TrainConfig, tiny_data: Path) -> list[torch.Tensor]:
    """Weights of a ViViT (no BatchNorm: batches do not mix) after one epoch."""
    loader = build_dataloaders(config)[0]
    torch.manual_seed(0)
    model = build_model("vivit", 3, n_frames=4, image_size=32)
    run = Training(config, model, torch.device("cpu"), 18 // config.batch_size)
    train_one_epoch(run, model, loader, Interrupt())
    return [parameter.detach() for parameter in model.parameters()]


def test_accumulated_batches_equal_one_large_batch(tiny_data: Path) -> None:
    """Also where the last step is short: 18 clips, 4 x 2 a step."""
    settings = {"data_root": str(tiny_data), "classes": ("dark", "grey", "light"), "amp": "fp32"}
    settings |= {"image_size": 32, "n_frames": 4, "workers": 0, "weights": "none"}
    settings |= {"model": "vivit", "learning_rate": 1e-3, "warmup_epochs": 0}
    large = resolve(TrainConfig(**settings, batch_size=8))
    small = resolve(TrainConfig(**settings, batch_size=4, accumulation=2))
    for one, two in zip(gradients(large, tiny_data), gradients(small, tiny_data), strict=True):
        assert torch.allclose(one, two, atol=2e-5)


def torchrun(processes: int, cwd: Path, *arguments: object, check: bool = True):
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}"]
    command += ["--master-port=0", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    done = subprocess.run(
        [*command, str(ROOT / "train.py"), *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    if check:
        assert done.returncode == 0, done.stdout + done.stderr
    return done


def test_two_processes_train_as_one_with_the_same_global_batch(
    tiny_data, tmp_path, run_main, mistake
) -> None:
    """Same losses epoch by epoch, same predictions, every test clip counted once."""
    common = train_flags(tiny_data, "--epochs", 2, "--dropout", 0)
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    run_main(main, *common, "--batch-size", 6, cwd=tmp_path / "one")
    done = torchrun(2, tmp_path / "two", *common, "--batch-size", 3)
    assert "2 processes" in done.stdout
    one, two = only_run(tmp_path / "one"), only_run(tmp_path / "two")
    assert np.allclose(history(one), history(two), atol=1e-4)
    predictions = [pd.read_csv(run / "predictions.csv") for run in (one, two)]
    assert predictions[0]["path"].tolist() == predictions[1]["path"].tolist()
    assert len(predictions[1]) == 9  # odd: a padded sampler would count a clip twice
    columns = ["p_dark", "p_grey", "p_light"]
    assert np.allclose(predictions[0][columns], predictions[1][columns], atol=1e-3)
    code, stderr = mistake(main, "--resume", two, cwd=tmp_path)
    assert code == 2
    assert "was trained by 2 processes" in stderr


def test_totals_of_one_process_are_its_own() -> None:
    assert distributed.total([1.5, 2]) == [1.5, 2]
    assert distributed.gather("a") == ["a"]
    assert (distributed.rank(), distributed.world_size()) == (0, 1)


def test_train_can_be_called_from_python(tiny_data: Path, tmp_path: Path, monkeypatch) -> None:
    settings = {"data_root": str(tiny_data), "classes": ("dark", "grey", "light"), "epochs": 1}
    settings |= {"image_size": 32, "n_frames": 4, "workers": 0, "weights": "none", "device": "cpu"}
    settings |= {"model": "vivit"}
    monkeypatch.chdir(tmp_path)
    assert (train(resolve(TrainConfig(**settings))) / "best.pt").is_file()
