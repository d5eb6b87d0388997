"""Training that is stopped: exact resume, interrupts, kills, torn writes, more patience."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import ROOT, history, only_run, run_script, train_flags

from checkpoint import build_from_checkpoint, load_checkpoint, save_checkpoint
from config import TrainConfig, from_dict
from models import build_model
from train import main
from training.checks import resolve
from training.engine import evaluate, train_one_epoch
from training.loaders import build_dataloaders
from training.state import Training
from utils.interrupt import Interrupt


def same_weights(one: dict, two: dict) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


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
def test_interrupted_run_resumes_exactly(
    trained, tiny_data, tmp_path, run_main, number, workers
) -> None:
    """Stopped in the middle of an epoch and resumed: every weight equal, bit for bit.

    With a worker the whole process group is asked, as terminals, torchrun and job managers do.
    """
    process = start(tmp_path, *train_flags(tiny_data, "--workers", workers))
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
    run_main(main, "--resume", run / "best.pt" if workers else run, cwd=tmp_path)
    whole, _ = trained
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
    arguments = train_flags(tiny_data, "--epochs", 2, "--ema", 0.9)
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


def test_kill_at_any_moment_leaves_a_loadable_checkpoint(trained, tiny_data, tmp_path) -> None:
    """SIGKILL again and again, from the first checkpoint on; the last resume ends as if alone."""
    delays = iter([0.0, 0.1, 0.3, 0.6])
    arguments = train_flags(tiny_data)
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
    whole, _ = trained
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


def test_resumed_run_keeps_its_settings(trained, tmp_path, mistake) -> None:
    run, _ = trained
    code, stderr = mistake(main, "--resume", run, "--seed", 5, cwd=tmp_path)
    assert code == 2
    assert "a resumed run keeps its settings: seed is 0, not 5" in stderr
    assert f"--weights {run}/best.pt" in stderr


@pytest.mark.usefixtures("checkpoints_only")
def test_a_run_out_of_patience_goes_on_exactly_with_more(
    tiny_data, tmp_path, run_main, monkeypatch
) -> None:
    """Epoch 1 is the best until 3: stopped after 2, more patience finds 3, as if it had been there
    from the start. With the same patience there is nothing to go on with."""
    goodness = {1: 2, 2: 1, 3: 3}
    monkeypatch.setattr("train._goodness", lambda row, _: goodness[row["epoch"]])
    arguments = train_flags(tiny_data, "--epochs", 3)
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
