"""train.py from end to end: the run folder, exact resume, interrupts, kills, several processes."""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT, TINY_FLAGS, make_data, run_script

import distributed
from calibration import Calibration, calibrate
from checkpoint import build_from_checkpoint, load_checkpoint, save_checkpoint
from config import TrainConfig, from_dict, resolve
from epoch import train_one_epoch
from errors import UserError
from evaluate import evaluate
from evaluate import main as evaluate_main
from interrupt import Interrupt
from loaders import build_dataloaders
from models import build_model
from train import main, train
from training import Training, cosine_with_warmup

FLAGS = ["--data-root", "{data}", *TINY_FLAGS, "--epochs", "4", "--dropout", "0.2"]


def flags(data: Path, *more: object) -> list[str]:
    return [flag.format(data=data) for flag in FLAGS] + [str(flag) for flag in more]


def only_run(folder: Path) -> Path:
    (run,) = (folder / "runs").iterdir()
    return run


def same_weights(one: dict, two: dict) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def history(run: Path) -> pd.DataFrame:
    return pd.read_csv(run / "metrics.csv").drop(columns="seconds")


@pytest.fixture(scope="module")
def finished(tiny_data: Path, tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess]:
    """A run of four epochs that nobody disturbed."""
    folder = tmp_path_factory.mktemp("finished")
    done = run_script("train.py", *flags(tiny_data), cwd=folder)
    return only_run(folder), done


def test_run_folder_is_complete(finished) -> None:
    run, done = finished
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


def test_best_epoch_is_the_one_that_is_tested(finished) -> None:
    run, _ = finished
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


def test_checkpoints_are_plain_and_safe(finished) -> None:
    run, _ = finished
    for name in ("best.pt", "last.pt"):
        state = torch.load(run / name, weights_only=True)
        assert state["format_version"] == 1
        assert state["classes"] == ["dark", "grey", "light"]
        assert not any("_orig_mod" in key or "module." in key for key in state["model"])
    assert {"optimizer", "scheduler", "scaler", "rng", "step"} <= set(state)
    assert state["epoch"] == 4


def test_best_epoch_is_calibrated_on_validation(finished, tiny_data: Path, tmp_path: Path) -> None:
    """Temperature and threshold are those of the validation clips, also if fitted a second time."""
    run, _ = finished
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


def wait_for(condition, process: subprocess.Popen, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, "training ended before it could be disturbed"
        assert time.monotonic() < deadline
        time.sleep(0.02)


def start(folder: Path, *arguments: str) -> subprocess.Popen:
    folder.mkdir(parents=True, exist_ok=True)
    return subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *arguments],
        cwd=folder,
        stdout=open(folder / "out.txt", "a"),
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def epochs_done(folder: Path) -> int:
    runs = list((folder / "runs").glob("*/metrics.csv"))
    return len(runs[0].read_text().splitlines()) - 1 if runs else 0


@pytest.mark.parametrize(
    ("number", "workers"), [(signal.SIGINT, 0), (signal.SIGINT, 1), (signal.SIGTERM, 1)]
)
def test_interrupted_run_resumes_exactly(finished, tiny_data, tmp_path, number, workers) -> None:
    """Stopped in the middle of an epoch and resumed: every weight equal, bit for bit.

    With a worker the whole process group is asked, as terminals, torchrun and job managers do.
    """
    process = start(tmp_path, *flags(tiny_data, "--workers", workers))
    wait_for(lambda: epochs_done(tmp_path) >= 2, process)
    if workers:
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    assert process.wait(60) == 128 + number
    said = (tmp_path / "out.txt").read_text()
    run = only_run(tmp_path)
    assert f"python train.py --resume {run.relative_to(tmp_path)}" in said
    assert "Traceback" not in said
    stopped = load_checkpoint(run, "last.pt")
    assert 2 <= stopped["epoch"] < 4
    # One of the checkpoints stands for the run.
    run_script("train.py", "--resume", run / "best.pt" if workers else run, cwd=tmp_path)
    whole, _ = finished
    for name in ("last.pt", "best.pt"):
        assert same_weights(
            load_checkpoint(whole, name)["model"], load_checkpoint(run, name)["model"]
        )
    assert history(run).equals(history(whole))
    assert (run / "predictions.csv").read_text() == (whole / "predictions.csv").read_text()


@pytest.mark.parametrize("more", [{}, {"ema": 0.9, "mixup": 0.4, "cutmix": 1.0}])
def test_stopping_inside_an_epoch_loses_no_step(more: dict, tiny_data: Path) -> None:
    """Two steps, a checkpoint, the third in a new process's state: as three steps in a row."""
    settings = {"data_root": str(tiny_data), "classes": ("dark", "grey", "light")}
    settings |= {"image_size": 32, "n_frames": 4, "batch_size": 6, "workers": 0, "weights": "none"}
    settings |= {"amp": "fp32", "dropout": 0.3, "device": "cpu"}
    config = resolve(TrainConfig(**settings, **more))

    class Stop(Exception):
        pass

    class After:
        def __init__(self, steps: int) -> None:
            self.steps = steps

        def check(self) -> None:
            self.steps -= 1
            if self.steps == 0:
                raise Stop

    def fresh() -> tuple[Training, object]:
        loader = build_dataloaders(config)[0]
        torch.manual_seed(1)
        model = build_model("tsm", 3, dropout=0.3)
        return Training(config, model, torch.device("cpu"), 3), loader

    whole, loader = fresh()
    torch.manual_seed(2)
    train_one_epoch(whole, whole.model, loader, After(99))

    first, loader = fresh()
    torch.manual_seed(2)
    with pytest.raises(Stop):
        train_one_epoch(first, first.model, loader, After(2))
    state = first.state()
    assert state["step"] == 2
    second, loader = fresh()
    torch.manual_seed(3)
    second.load_state(state)
    train_one_epoch(second, second.model, loader, After(99))
    assert same_weights(whole.model.state_dict(), second.model.state_dict())
    assert same_weights(whole.tested.state_dict(), second.tested.state_dict())
    assert second.totals == whole.totals


# What may differ between checkpoints of one training; nothing draws from Python's generator.
ACCIDENTAL = ("seconds", "resume", "patience", "python")


def same(one: object, two: object) -> bool:
    """Whether two checkpoints hold the same, bit for bit, but for what is ACCIDENTAL."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, two)
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(
            same(one[key], two[key]) for key in one if key not in ACCIDENTAL
        )
    if isinstance(one, list | tuple):
        return len(one) == len(two) and all(map(same, one, two))
    return one == two


@pytest.fixture
def checkpoints_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the pictures and the test: most of the time of a tiny run."""
    monkeypatch.setattr("train.plot_curves", lambda *_: None)
    monkeypatch.setattr("train.test", lambda *_: None)


@pytest.mark.usefixtures("checkpoints_only")
def test_resume_is_exact_with_averaged_weights_and_mixed_clips(
    tiny_data, tmp_path, run_main, monkeypatch
) -> None:
    """Stopped in the second epoch: all of both checkpoints is as without the stop. What is kept and
    what metrics.csv tells of is the average."""
    arguments = flags(tiny_data, "--epochs", 2, "--model", "vivit", "--ema", 0.9)
    arguments += ["--mixup", "0.4", "--cutmix", "1", "--batch-size", "3"]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    whole.mkdir()
    stopped.mkdir()
    run_main(main, *arguments, cwd=whole)
    asked, check = [], Interrupt.check

    def stop_at_the_twelfth(interrupt: Interrupt) -> None:
        asked.append(interrupt)
        if len(asked) == 12:  # 6 batches and 3 of validation an epoch
            os.kill(os.getpid(), signal.SIGTERM)
        check(interrupt)

    with monkeypatch.context() as patch:
        patch.setattr(Interrupt, "check", stop_at_the_twelfth)
        run_main(main, *arguments, cwd=stopped, code=128 + signal.SIGTERM)
    run = only_run(stopped)
    assert load_checkpoint(run, "last.pt")["step"] == 3
    run_main(main, "--resume", run, cwd=stopped)
    whole = only_run(whole)
    for name in ("last.pt", "best.pt"):
        assert same(load_checkpoint(whole, name), load_checkpoint(run, name)), name

    last, best = load_checkpoint(run, "last.pt"), load_checkpoint(run)
    assert last["averaged_steps"] == 12
    assert not same_weights(last["model"], last["trained"])
    _, val_loader, _, _ = build_dataloaders(from_dict(last["config"]))
    for state in (last, best):
        told = state["history"][state["epoch"] - 1]["val_loss"]
        predictions = evaluate(build_from_checkpoint(state), val_loader, torch.device("cpu"))
        assert predictions.loss == pytest.approx(told, abs=1e-6)


def test_kill_at_any_moment_leaves_a_loadable_checkpoint(finished, tiny_data, tmp_path) -> None:
    """SIGKILL again and again, from the first checkpoint on; the last resume ends as if alone."""
    delays = iter([0.0, 0.2, 0.7, 1.6])
    arguments = flags(tiny_data)
    for delay in delays:
        process = start(tmp_path, *arguments)
        wait_for(lambda: list((tmp_path / "runs").glob("*/last.pt")), process)
        if arguments[0] == "--resume":  # let it load and go on a little
            lines = (tmp_path / "out.txt").read_text().count("resumed at")
            wait_for(
                lambda n=lines: (tmp_path / "out.txt").read_text().count("resumed") > n, process
            )
        time.sleep(delay)
        process.kill()
        process.wait()
        run = only_run(tmp_path)
        for name in ("last.pt", "best.pt"):
            assert name != "last.pt" or (run / name).is_file()
            assert not (run / name).exists() or "model" in load_checkpoint(run, name)
        arguments = ["--resume", str(run)]
    run_script("train.py", *arguments, cwd=tmp_path)
    whole, _ = finished
    assert same_weights(
        load_checkpoint(whole, "last.pt")["model"], load_checkpoint(run, "last.pt")["model"]
    )
    assert not list(run.glob(".*"))  # what the kills left is cleaned up


def test_torn_write_never_replaces_the_checkpoint(tmp_path, monkeypatch) -> None:
    save_checkpoint(tmp_path / "last.pt", {"model": {"w": torch.ones(2)}})

    def torn(state, path) -> None:
        Path(path).write_bytes(b"half a file")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", torn)
    with pytest.raises(OSError, match="No space"):
        save_checkpoint(tmp_path / "last.pt", {"model": {}})
    assert torch.equal(load_checkpoint(tmp_path / "last.pt")["model"]["w"], torch.ones(2))
    assert [path.name for path in tmp_path.iterdir()] == ["last.pt"]


def test_resumed_run_keeps_its_settings(finished, tmp_path, mistake) -> None:
    run, _ = finished
    code, stderr = mistake(main, "--resume", run, "--seed", 5, cwd=tmp_path)
    assert code == 2
    assert "a resumed run keeps its settings: seed is 0, not 5" in stderr
    assert f"--weights {run}/best.pt" in stderr


@pytest.mark.parametrize("model", ["cnn_lstm", "r2plus1d", "vivit"])
def test_every_model_trains_and_evaluates(model: str, tiny_data, tmp_path, run_main) -> None:
    arguments = flags(tiny_data, "--model", model, "--epochs", 1, "--accumulation", 2)
    run_main(main, *arguments, cwd=tmp_path)
    run = only_run(tmp_path)
    again = ("--workers", 0, "--device", "cpu")
    again = run_main(evaluate_main, run, *again, cwd=tmp_path).stdout
    tested = json.loads((run / "test_metrics.json").read_text())
    evaluated = json.loads((run / "evaluate_test" / "test_metrics.json").read_text())
    assert evaluated["accuracy"] == tested["accuracy"]
    assert evaluated["loss"] == pytest.approx(tested["loss"], abs=1e-6)
    assert "macro-F1" in again


def test_fine_tuning_freezing_and_tensorboard(finished, tiny_data, tmp_path, run_main) -> None:
    pytest.importorskip("tensorboard")
    run, _ = finished
    more = ["--weights", run / "best.pt", "--freeze-to", "temporal3", "--layer-decay", "0.5"]
    more += ["--epochs", 1, "--tensorboard"]
    done = run_main(main, *flags(tiny_data, *more), cwd=tmp_path)
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
    done = run_main(main, *flags(data, *common), cwd=tmp_path)
    assert "1 training clips could not be read and were left out" in done.stdout
    assert "train/0_1.mp4: cannot be read" in done.stdout
    for name in ("val/0_0", "test/1_1"):
        (data / f"clips/{name}.mp4").write_bytes(b"broken")
    done = run_main(main, *flags(data, *common), cwd=tmp_path, code=2)
    assert "2 validation and test clips cannot be read" in done.stderr
    assert all(f"{name}.mp4: cannot be read" in done.stderr for name in ("val/0_0", "test/1_1"))
    assert "epoch   1" not in done.stdout
    done = run_main(main, *flags(data, *common, "--skip-unreadable"), cwd=tmp_path)
    assert "MISSING: 1 clips could not be read" in done.stdout
    run = max((tmp_path / "runs").iterdir(), key=lambda path: path.stat().st_mtime)
    tested = json.loads((run / "test_metrics.json").read_text())
    assert (tested["clips"], tested["unreadable_clips"]) == (3, 1)
    code, stderr = mistake(evaluate_main, run, "--workers", 0, cwd=tmp_path)
    assert code == 2
    assert "1 test clips cannot be read" in stderr


def test_non_finite_loss_stops_with_the_clips(tiny_data: Path, tmp_path: Path, mistake) -> None:
    more = ["--learning-rate", "1e30", "--warmup-epochs", 0, "--clip-norm", 0]
    code, stderr = mistake(main, *flags(tiny_data, *more), cwd=tmp_path)
    assert code == 2
    assert "error: the loss became" in stderr
    assert "lower learning_rate" in stderr
    assert ".mp4" in stderr
    assert "Traceback" not in stderr


def test_patience_stops_early(tiny_data: Path, tmp_path: Path, run_main) -> None:
    more = ["--epochs", 30, "--patience", 1, "--learning-rate", "1e-9"]
    run_main(main, *flags(tiny_data, *more), cwd=tmp_path)
    table = history(only_run(tmp_path))
    assert len(table) < 30
    assert table["val_macro_f1"].iloc[-1] <= table["val_macro_f1"].iloc[:-1].max()


@pytest.mark.usefixtures("checkpoints_only")
def test_a_run_out_of_patience_goes_on_exactly_with_more(
    tiny_data, tmp_path, run_main, monkeypatch
) -> None:
    """Epoch 1 is the best until 3: stopped after 2, more patience finds 3, as if it had been there
    from the start. With the same patience there is nothing to go on with."""
    goodness = {1: 2, 2: 1, 3: 3}
    monkeypatch.setattr("train._goodness", lambda row, _: goodness[row["epoch"]])
    arguments = flags(tiny_data, "--epochs", 3, "--model", "vivit")
    patient, hasty = tmp_path / "patient", tmp_path / "hasty"
    patient.mkdir()
    hasty.mkdir()
    run_main(main, *arguments, "--patience", 2, cwd=patient)
    done = run_main(main, *arguments, "--patience", 1, cwd=hasty)
    assert "stopped: none of 1 epochs was better than 1" in done.stdout
    run = only_run(hasty)
    before = [load_checkpoint(run, name) for name in ("last.pt", "best.pt")]
    assert [state["epoch"] for state in before] == [2, 1]
    run_main(main, "--resume", run, cwd=hasty)
    after = [load_checkpoint(run, name) for name in ("last.pt", "best.pt")]
    assert all(map(same, before, after))
    run_main(main, "--resume", run, "--patience", 2, cwd=hasty)
    for name in ("last.pt", "best.pt"):
        state = load_checkpoint(run, name)
        assert state["epoch"] == 3
        assert same(load_checkpoint(only_run(patient), name), state), name
    assert history(run).equals(history(only_run(patient)))


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
    common = flags(tiny_data, "--model", "vivit", "--epochs", 2, "--dropout", 0)
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
