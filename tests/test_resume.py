"""Interrupted training: exact resume, interrupts, kills, partial writes, more patience."""

import inspect
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import (
    history,
    make_model,
    make_state,
    only_run,
    same_tensors,
    start_script,
    tiny_config,
    train_epoch,
    train_flags,
    wait_for,
)
from torch.utils.data import DataLoader

from checkpoint import load_checkpoint, rebuild_model, save_checkpoint
from config import from_dict
from models import build_model
from train import main
from training.checks import keep_clips_per_step
from training.engine import evaluate
from training.loaders import build_dataloaders
from training.state import TrainState
from utils.interrupt import Interrupt

pytestmark = pytest.mark.usefixtures("no_figures")


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

    With a worker the whole process group gets the signal, as from terminals, torchrun and job
    managers.
    """
    process = start_script(
        "train.py", *train_flags(tiny_data, "--num-workers", workers), cwd=tmp_path
    )
    wait_for(lambda: epochs_done(tmp_path) >= 2, process)
    if workers:
        os.killpg(process.pid, number)
    else:
        os.kill(process.pid, number)
    process.join(60)
    assert process.exitcode == 128 + number
    output = (tmp_path / "out.txt").read_text()
    run = only_run(tmp_path)
    assert f"python train.py --resume {run.relative_to(tmp_path)}" in output
    assert "Traceback" not in output
    stopped = load_checkpoint(run, "last.pt")
    assert 2 <= stopped["epoch"] < 4
    # A checkpoint stands for its run.
    run_main(main, "--resume", run / "best.pt" if workers else run, cwd=tmp_path)
    whole, _ = trained
    for name in ("last.pt", "best.pt"):
        assert same_tensors(
            load_checkpoint(whole, name)["model"], load_checkpoint(run, name)["model"]
        )
    assert history(run).equals(history(whole))
    assert (run / "predictions.csv").read_text() == (whole / "predictions.csv").read_text()


class Stop(Exception):
    """Stands for an interrupt."""


def stop_after(steps: int) -> Callable[[], None]:
    """A function that raises Stop when it is called for the last of these steps."""
    calls = iter(range(1, steps + 1))

    def check() -> None:
        if next(calls) == steps:
            raise Stop

    return check


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("tsm_resnet", {}),
        ("tsm_resnet", {"ema_decay": 0.9, "mixup_alpha": 0.4, "cutmix_alpha": 1.0}),
        ("timesformer", {"drop_path": 0.3, "image_size": 16}),
        ("video_swin", {"drop_path": 0.3, "image_size": 16}),
        ("mvit", {"drop_path": 0.3, "image_size": 16, "n_frames": 2}),
    ],
)
def test_stopping_inside_an_epoch_loses_no_step(name: str, more: dict, tiny_data: Path) -> None:
    """Two steps, a checkpoint and a third step in a new state equal three steps in a row."""
    config = tiny_config(tiny_data, model_name=name, dropout=0.3, **more)

    def fresh() -> tuple[TrainState, DataLoader]:
        loader = build_dataloaders(config)[0]
        torch.manual_seed(1)
        return make_state(config, build_model(config, 3)), loader

    whole, loader = fresh()
    torch.manual_seed(2)
    train_epoch(whole, loader)

    first, loader = fresh()
    torch.manual_seed(2)
    with pytest.raises(Stop):
        train_epoch(first, loader, stop_after(2))
    saved = first.state_dict()
    assert saved["step"] == 2
    second, loader = fresh()
    torch.manual_seed(3)
    second.load_state_dict(saved)
    train_epoch(second, loader)
    assert same_tensors(whole.model.state_dict(), second.model.state_dict())
    assert same_tensors(whole.eval_model.state_dict(), second.eval_model.state_dict())
    assert second.progress.running_sums == whole.progress.running_sums


def test_another_number_of_processes_continues_at_the_same_clip(tiny_data: Path) -> None:
    """A checkpoint of two processes after two of three steps with three clips each: one process
    goes on with two batches of three per step, and ends as if it had done all of it."""
    config = tiny_config(tiny_data, batch_size=3, gradient_accumulation_steps=2, epochs=2)

    def fresh() -> tuple[TrainState, DataLoader]:
        torch.manual_seed(1)
        model = make_model("vivit", 3, n_frames=4, image_size=32)
        return make_state(config, model, batches=6), build_dataloaders(config)[0]

    whole, loader = fresh()
    train_epoch(whole, loader)
    first, loader = fresh()
    with pytest.raises(Stop):
        train_epoch(first, loader, stop_after(2))
    saved = first.state_dict()
    assert saved["step"] == 4
    # The same moment as two processes save it.
    half = [value / 2 for value in saved["totals"][0]]
    of_two = {**saved, "step": 2, "rng": saved["rng"] * 2, "totals": [half, half]}
    of_two["config"] = {**saved["config"], "gradient_accumulation_steps": 1}
    assert keep_clips_per_step(from_dict(of_two["config"]), of_two) == config

    second, loader = fresh()
    second.load_state_dict(of_two)
    assert second.progress.step == 4
    assert second.scheduler.last_epoch == 2
    assert [g["lr"] for g in second.optimizer.param_groups] == [
        g["lr"] for g in first.optimizer.param_groups
    ]
    train_epoch(second, loader)
    assert same_tensors(whole.model.state_dict(), second.model.state_dict())
    assert second.progress.running_sums == pytest.approx(whole.progress.running_sums)


@pytest.mark.parametrize(
    ("before", "after"), [("fp32", "fp16"), ("bf16", "fp16"), ("fp16", "fp32")]
)
def test_a_run_continues_in_another_precision(before: str, after: str, tiny_data: Path) -> None:
    """`auto` means another precision on another device; only fp16 has a scaled loss."""
    config = tiny_config(tiny_data)

    def fresh(precision: str) -> TrainState:
        torch.manual_seed(1)
        state = make_state(config, make_model("vivit", 3, n_frames=4, image_size=32))
        state.scaler = torch.amp.GradScaler("cpu", enabled=precision == "fp16")
        return state

    first, loader = fresh(before), build_dataloaders(config)[0]
    train_epoch(first, loader)
    second = fresh(after)
    second.load_state_dict(first.state_dict())
    assert second.scaler.get_scale() == (2.0**16 if after == "fp16" else 1.0)
    assert same_tensors(first.model.state_dict(), second.model.state_dict())
    second.progress.end_epoch()
    train_epoch(second, loader)
    assert not same_tensors(first.model.state_dict(), second.model.state_dict())


@pytest.mark.usefixtures("checkpoints_only")
def test_a_run_continues_where_its_data_has_moved(
    trained, tiny_data, tmp_path, run_main, mistake
) -> None:
    """Stopped after the second epoch, resumed with the data in another folder: the same result, bit
    for bit. With other labels in the manifests there it does not continue."""
    run, moved, broken = tmp_path / "run", tmp_path / "moved", tmp_path / "broken"
    shutil.copytree(tiny_data, moved)
    shutil.copytree(tiny_data, broken)
    text = (broken / "train.csv").read_text()
    (broken / "train.csv").write_text(text.replace("dark", "light", 1))

    def save(state: TrainState, folder: Path) -> None:
        save_checkpoint(folder / "last.pt", state.state_dict())
        if state.progress.epoch == 2:
            raise Stop

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
        patch.setattr(TrainState, "save", save)
        patch.setattr("train.start_log", lambda _: None)
        flags = train_flags(tiny_data)
        patch.setattr("sys.argv", ["train.py", *flags, "--run-dir", str(tmp_path / "runs")])
        inspect.unwrap(main)()
    (run,) = (tmp_path / "runs").iterdir()
    code, stderr = mistake(main, "--resume", run, "--data-root", broken, cwd=tmp_path)
    assert code == 2
    assert "error: the train clips are not those that the run began with" in stderr
    done = run_main(main, "--resume", run, "--data-root", moved, cwd=tmp_path)
    assert "resumed at epoch 3, batch 1, with the same clips in another place\n" in done.stdout
    assert f"data_root: '{moved}', before '{tiny_data}'" in done.stdout
    whole, _ = trained
    for name in ("last.pt", "best.pt"):
        states = [load_checkpoint(folder, name) for folder in (whole, run)]
        assert same_tensors(states[0]["model"], states[1]["model"])
    assert states[1]["config"]["data_root"] == str(moved)


# What may differ between checkpoints of equal runs; nothing draws from Python's generator.
ACCIDENTAL = ("seconds", "waiting", "resume", "early_stopping_patience", "python")


def same(one: object, two: object) -> bool:
    """Whether two checkpoints hold the same, bit for bit, except for what is ACCIDENTAL."""
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
    """Leave out the test, which takes long for a tiny run."""
    monkeypatch.setattr("train.final_test", lambda *_: None)


@pytest.mark.usefixtures("checkpoints_only")
def test_resume_is_exact_with_averaged_weights_and_mixed_clips(
    tiny_data, tmp_path, run_main, monkeypatch
) -> None:
    """After a stop in the second epoch both checkpoints are as without it. The average is what is
    kept and what metrics.csv describes."""
    arguments = train_flags(tiny_data, "--epochs", 2, "--ema-decay", 0.9)
    arguments += ["--mixup-alpha", "0.4", "--cutmix-alpha", "1", "--batch-size", "3"]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    whole.mkdir()
    stopped.mkdir()
    run_main(main, *arguments, cwd=whole)
    calls, check = [], Interrupt.check

    def stop_at_the_twelfth(interrupt: Interrupt) -> None:
        calls.append(interrupt)
        if len(calls) == 12:  # 6 batches and 3 of validation per epoch
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
    assert not same_tensors(last["model"], last["trained"])
    _, val_loader, _, _ = build_dataloaders(from_dict(last["config"]))
    for state in (last, best):
        loss = state["history"][state["epoch"] - 1]["val_loss"]
        predictions = evaluate(rebuild_model(state), val_loader, torch.device("cpu"))
        assert predictions.loss == pytest.approx(loss, abs=1e-6)


def test_kill_at_any_moment_leaves_a_loadable_checkpoint(
    trained, tiny_data, tmp_path, run_main
) -> None:
    """Several SIGKILLs from the first checkpoint on; the last resume ends as without them."""
    delays = iter([0.0, 0.1, 0.3, 0.6])
    arguments = train_flags(tiny_data)
    for delay in delays:
        process = start_script("train.py", *arguments, cwd=tmp_path)
        wait_for(lambda: list((tmp_path / "runs").glob("*/last.pt")), process)
        if arguments[0] == "--resume":  # let it load and continue a little
            lines = (tmp_path / "out.txt").read_text().count("resumed at")
            wait_for(
                lambda n=lines: (tmp_path / "out.txt").read_text().count("resumed") > n, process
            )
        time.sleep(delay)
        process.kill()
        process.join()
        run = only_run(tmp_path)
        for name in ("last.pt", "best.pt"):
            assert name != "last.pt" or (run / name).is_file()
            assert not (run / name).exists() or "model" in load_checkpoint(run, name)
        arguments = ["--resume", str(run)]
    run_main(main, *arguments, cwd=tmp_path)
    whole, _ = trained
    assert same_tensors(
        load_checkpoint(whole, "last.pt")["model"], load_checkpoint(run, "last.pt")["model"]
    )
    assert not list(run.glob(".*"))  # unfinished files are removed


def test_a_partial_write_never_replaces_the_checkpoint(tmp_path, monkeypatch) -> None:
    save_checkpoint(tmp_path / "last.pt", {"model": {"w": torch.ones(2)}})

    def partial(state, file) -> None:
        file.write(b"half a file")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", partial)
    with pytest.raises(OSError, match="No space"):
        save_checkpoint(tmp_path / "last.pt", {"model": {}})
    state = torch.load(tmp_path / "last.pt", weights_only=True)
    assert torch.equal(state["model"]["w"], torch.ones(2))
    assert [path.name for path in tmp_path.iterdir()] == ["last.pt"]


def test_resumed_run_keeps_its_settings(trained, tmp_path, mistake) -> None:
    run, _ = trained
    code, stderr = mistake(main, "--resume", run, "--seed", 5, cwd=tmp_path)
    assert code == 2
    assert "a resumed run keeps its settings: seed is 0, not 5" in stderr
    assert f"--weights {run}/best.pt" in stderr


@pytest.mark.usefixtures("checkpoints_only")
def test_a_run_that_stopped_early_continues_exactly_with_more_patience(
    tiny_data, tmp_path, run_main, monkeypatch
) -> None:
    """Epoch 1 is the best until 3. After a stop at 2, more patience finds 3, as with that patience
    from the start; with the same patience nothing is left to do."""
    scores = {1: 2, 2: 1, 3: 3}
    monkeypatch.setattr("training.state.TrainState.score", lambda _, row: scores[row["epoch"]])
    arguments = train_flags(tiny_data, "--epochs", 3)
    patient, hasty = tmp_path / "patient", tmp_path / "hasty"
    patient.mkdir()
    hasty.mkdir()
    run_main(main, *arguments, "--early-stopping-patience", 2, cwd=patient)
    done = run_main(main, *arguments, "--early-stopping-patience", 1, cwd=hasty)
    assert "stopped: none of 1 epochs was better than epoch 1" in done.stdout
    run = only_run(hasty)
    before = [load_checkpoint(run, name) for name in ("last.pt", "best.pt")]
    assert [state["epoch"] for state in before] == [2, 1]
    run_main(main, "--resume", run, cwd=hasty)
    after = [load_checkpoint(run, name) for name in ("last.pt", "best.pt")]
    assert all(map(same, before, after))
    run_main(main, "--resume", run, "--early-stopping-patience", 2, cwd=hasty)
    for name in ("last.pt", "best.pt"):
        state = load_checkpoint(run, name)
        assert state["epoch"] == 3
        assert same(load_checkpoint(only_run(patient), name), state), name
    assert history(run).equals(history(only_run(patient)))
