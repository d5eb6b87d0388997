"""Disks without room: found before the work; nothing that was computed is lost without being shown.

Writing that fails stands for the disk, because a test may not mount one.
"""

import errno
import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pandas as pd
import pytest
import torch
from helpers import (
    history,
    make_clip,
    make_model,
    make_state,
    only_run,
    same_tensors,
    tiny_config,
    touch,
    train_flags,
)

import evaluate
import predict
import prepare_data
import train
from benchmarks.timing import report
from checkpoint import load_checkpoint
from timeline.segments import FramesWriter
from training.checks import check_space
from training.log import start_log
from utils.errors import UserError
from utils.files import require_space

FULL = errno.ENOSPC, "No space left on device"


def one_line(stderr: str) -> str:
    """The only line of an error, apart from progress bars."""
    (line,) = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in stderr
    return line


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch) -> None:
    """No file that is written gets its name."""

    def fail(source: Path, target: Path) -> None:
        raise OSError(*FULL, str(source))

    monkeypatch.setattr("utils.files._replace", fail)


@contextmanager
def room_for(checkpoints: int) -> Iterator[None]:
    """In this block only so many checkpoints can be written."""
    save, saved = torch.save, []

    def save_while_there_is_room(*arguments: object) -> None:
        if len(saved) == checkpoints:
            raise OSError(*FULL)
        saved.append(arguments)
        save(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "save", save_while_there_is_room)
        yield


def test_no_run_folder_without_a_checkpoint(tiny_data, tmp_path, mistake) -> None:
    """A folder that was there before stays, with what is in it."""
    with room_for(0):
        line = one_line(mistake(train.main, *train_flags(tiny_data), cwd=tmp_path).stderr)
    assert line.startswith("error: runs/")
    assert "/last.pt: the disk is full" in line
    assert not list(tmp_path.iterdir())
    touch(tmp_path, "given/notes.txt")
    with room_for(0), pytest.raises(OSError, match="No space"):
        train.train(tiny_config(tiny_data), folder=tmp_path / "given")
    assert (tmp_path / "given" / "notes.txt").exists()
    assert not (tmp_path / "given" / ".lock").exists()


@pytest.mark.usefixtures("no_figures")
def test_the_scores_of_an_epoch_are_written_before_its_checkpoint(
    trained, tiny_data, tmp_path, mistake, run_main, monkeypatch
) -> None:
    """The disk is full in the second epoch. The resumed run has every epoch once, and ends as
    without that."""
    for later in ("calibrate_best", "final_test"):
        monkeypatch.setattr(f"train.{later}", lambda *_: None)
    monkeypatch.setattr("training.state.TrainState.score", lambda _, row: row["epoch"] == 1)
    with room_for(3):  # last.pt at the beginning, best.pt and last.pt of the first epoch
        line = one_line(mistake(train.main, *train_flags(tiny_data), cwd=tmp_path).stderr)
    assert "/last.pt: the disk is full" in line
    run, whole = only_run(tmp_path), trained[0]
    assert history(run).equals(history(whole)[:2])
    assert load_checkpoint(run, "last.pt")["epoch"] == 1
    assert not list(run.glob(".*"))
    run_main(train.main, "--resume", run, cwd=tmp_path)
    assert history(run).equals(history(whole))
    states = [load_checkpoint(folder, "last.pt")["model"] for folder in (run, whole)]
    assert same_tensors(*states)


def test_room_for_the_checkpoints_is_asked_before_anything_is_decoded(
    tiny_data, tmp_path, mistake, monkeypatch
) -> None:
    def decode(*_: object) -> None:
        raise AssertionError("it was decoded")

    monkeypatch.setattr("dataset.ClipsDataset.__getitem__", decode)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: (10**12, 10**12 - 10**8, 10**8))
    line = one_line(mistake(train.main, *train_flags(tiny_data), cwd=tmp_path).stderr)
    assert line.startswith(f"error: {tmp_path / 'runs'}: the disk is too small: ")
    assert "need 103.8 MB, and 100.0 MB are free" in line
    assert not list(tmp_path.iterdir())


def test_the_room_is_that_of_the_files(trained, tiny_data, tmp_path, monkeypatch) -> None:
    """Two of last.pt and one of best.pt; in a run that is resumed, one of last.pt."""
    asked = []
    monkeypatch.setattr("training.checks.require_space", lambda _, size, *__: asked.append(size))
    config = tiny_config(tiny_data)
    state = make_state(config, make_model("vivit", 3, n_frames=4, image_size=32))
    for folder in (tmp_path / "new", trained[0]):
        check_space(state, folder)
    last, best = ((trained[0] / name).stat().st_size for name in ("last.pt", "best.pt"))
    assert asked == pytest.approx([2 * last + best, last], rel=0.01)
    state.ema = object()  # the average is as large as the weights
    check_space(state, tmp_path / "new")
    assert asked[2] - asked[0] == pytest.approx(2 * best, rel=0.01)


def test_a_disk_that_says_nothing_is_no_reason_to_stop(tmp_path, monkeypatch) -> None:
    def unknown(_: Path) -> tuple[int, int, int]:
        raise OSError(errno.ENOSYS, "Function not implemented")

    require_space(tmp_path / "new" / "folder", 1000, "the files need")
    for usage in (lambda _: (0, 0, 0), unknown):
        monkeypatch.setattr(shutil, "disk_usage", usage)
        require_space(tmp_path, 10**15, "the files need")


def test_a_log_that_cannot_be_written_stops_nothing(tmp_path, capsys) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    (tmp_path / "train.log").symlink_to("/dev/full")
    start_log(tmp_path)
    logging.getLogger("test").info("a line")
    start_log(None)
    assert capsys.readouterr() == ("a line\n", "")


@pytest.mark.usefixtures("full")
def test_results_are_printed_although_they_cannot_be_written(
    trained, tiny_data, tmp_path, run_main, capsys
) -> None:
    def printed(main: Callable[[], None], *arguments: object) -> str:
        arguments = (*arguments, "--output", tmp_path / main.__module__ / "x.csv")
        done = run_main(main, *arguments, cwd=tmp_path, code=2)
        assert "the disk is full" in done.stderr
        return done.stdout

    assert "9 clips: accuracy" in printed(evaluate.main, trained[0], "--num-workers", 0)
    (tmp_path / "t.csv").write_text("start,end,label\n0,1,a\n")
    assert "all time pooled" in printed(evaluate.main, "timeline", "t.csv", "t.csv")
    video = tiny_data / "clips" / "test" / "0_0.mp4"
    assert " of video at " in printed(predict.main, trained[0], video)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.mp4").write_bytes(b"no video")
    assert "a.mp4: " in printed(prepare_data.main, "check", tmp_path / "broken")
    with pytest.raises(UserError, match=r"speed\.csv.*speed\.md.*speed\.json"):
        report("speed", pd.DataFrame({"ms": [1.5]}), {"device": "cpu"}, tmp_path / "speed")
    assert "1.50" in capsys.readouterr().out


def test_predictions_of_a_video_survive_frames_csv(
    trained, tiny_data, tmp_path, mistake, monkeypatch
) -> None:
    """From the second chunk on there is no room: the timeline has all of the video all the same."""
    write, chunks = FramesWriter.write, []

    def write_once(writer: FramesWriter, *arguments: object) -> None:
        chunks.append(arguments)
        if len(chunks) > 1:
            raise OSError(*FULL)
        write(writer, *arguments)

    monkeypatch.setattr(FramesWriter, "write", write_once)
    video = make_clip(tmp_path / "long.mp4", 200, frames=200)
    done = mistake(predict.main, trained[0], video, "--output", tmp_path / "out", cwd=tmp_path)
    folder = tmp_path / "out" / "long.mp4.timeline"
    assert f"error: could not be written: {folder / 'frames.csv'}: the disk is full" in done.stderr
    times = pd.read_csv(folder / "frames.csv")["time"]
    segments = pd.read_csv(folder / "timeline.csv")
    assert 0 < times.iloc[-1] < segments["end"].iloc[-1] - 1
    assert len(chunks) == 2
