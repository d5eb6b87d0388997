"""Many videos, several processes: each video once, kills, and one table over all."""

import csv
import dataclasses
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import start_script, wait_for

from checkpoint import save_checkpoint
from config import TrainConfig
from models import build_model
from predict import main
from prepare_data import main as prepare
from timeline.archive import DONE, SUMMARY
from timeline.segments import read_timeline
from training.checks import resolve
from video.encoder import write_video

CLASSES = ("dark", "grey", "light")
VIDEOS = 6


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    config = resolve(TrainConfig(model_name="vivit", image_size=32, n_frames=4, classes=CLASSES))
    torch.manual_seed(0)
    state = {"model": build_model(config, 3).state_dict(), "classes": list(CLASSES)}
    save_checkpoint(
        folder / "best.pt", {**state, "config": dataclasses.asdict(config), "frame_rate": 5.0}
    )
    return folder


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Short videos of different lengths, and a file that is no video."""
    root = tmp_path_factory.mktemp("originals")
    rng = np.random.default_rng(0)
    for number in range(VIDEOS):
        frames = rng.integers(0, 256, (20 + 5 * number, 1, 1, 3)) + rng.integers(0, 50, (48, 64, 1))
        write_video(root / f"{number}.mp4", frames.clip(0, 255).astype(np.uint8), 10)
    (root / "broken.mp4").write_bytes(b"no video")
    return root


@pytest.fixture
def archive(originals: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(originals, tmp_path / "archive"))


def table(folder: Path) -> dict[str, dict[str, str]]:
    """The rows of summary.csv by the name of the video."""
    with open(folder / SUMMARY, newline="") as file:
        return {Path(row["video"]).name: row for row in csv.DictReader(file)}


def results(archive: Path) -> dict[str, tuple[str, str]]:
    return {
        folder.name: ((folder / "frames.csv").read_text(), (folder / "timeline.csv").read_text())
        for folder in archive.glob("?.mp4.timeline")
    }


def test_parts_give_what_one_process_gives(
    run: Path, archive: Path, originals: Path, run_main: Callable, tmp_path: Path
) -> None:
    alone = Path(shutil.copytree(originals, tmp_path / "alone"))
    run_main(main, run, alone, cwd=tmp_path, code=2)  # it ends with a word about the broken one
    assert table(alone)["broken.mp4"]["status"] == "unreadable"

    for index in (2, 0):
        done = run_main(main, run, archive, "--shard", f"{index}/3", cwd=tmp_path)
        assert f"part {index}/3: 0 of " in done.stdout
        assert "videos are left to the other processes" in done.stdout
        assert not (archive / SUMMARY).exists()
    done = run_main(main, run, archive, "--shard", "1/3", cwd=tmp_path)
    assert f"all {VIDEOS + 1} videos: {archive / SUMMARY}" in done.stdout
    assert results(archive) == results(alone)
    assert len(results(archive)) == VIDEOS
    ours, theirs = table(archive), table(alone)
    assert ours == {name: {**row, "video": str(archive / name)} for name, row in theirs.items()}

    row = ours["3.mp4"]
    segments = read_timeline(archive / "3.mp4.timeline" / "timeline.csv")[""]
    assert row["status"] == "ok" and float(row["duration"]) == pytest.approx(3.5, abs=0.06)
    for name in CLASSES:
        seconds = sum(s.end - s.start for s in segments if s.label == name)
        assert float(row[f"{name} (s)"]) == pytest.approx(seconds, abs=0.06)
    assert ours["broken.mp4"]["reason"] and not ours["broken.mp4"]["dark (s)"]

    # Nothing is left to do, but the broken one is tried again.
    stamps = {path: path.stat().st_mtime_ns for path in archive.glob("?.mp4.timeline/*")}
    done = run_main(main, run, archive, "--shard", "0/1", cwd=tmp_path)
    assert f"{VIDEOS} of {VIDEOS + 1} videos are done already" in done.stdout
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps


def test_other_settings_models_and_videos_are_not_done(
    run: Path, archive: Path, run_main: Callable, tmp_path: Path
) -> None:
    for path in ("2.mp4", "3.mp4", "4.mp4", "5.mp4", "broken.mp4"):
        (archive / path).unlink()

    def done(*flags: object, model: Path = run) -> str:
        output = run_main(main, model, archive, "--skip-done", *flags, cwd=tmp_path).stdout
        return next(line for line in output.splitlines() if "done already" in line)

    assert done().startswith("0 of 2")
    assert done().startswith("2 of 2")
    assert done("--device", "cpu").startswith("2 of 2")  # changes nothing
    assert done("--min-duration", "0.5").startswith("0 of 2")
    assert done("--min-duration", "0.5").startswith("2 of 2")
    shutil.copy(archive / "0.mp4", archive / "1.mp4")
    assert done("--min-duration", "0.5").startswith("1 of 2")
    record = archive / "0.mp4.timeline" / DONE
    record.write_text(record.read_text()[:40])
    assert done("--min-duration", "0.5").startswith("1 of 2")
    state = torch.load(run / "best.pt", weights_only=True)
    next(iter(state["model"].values())).add_(1)
    save_checkpoint(tmp_path / "other.pt", state)
    assert done("--min-duration", "0.5", model=tmp_path / "other.pt").startswith("0 of 2")


def test_killed_processes_lose_nothing_but_what_they_were_at(
    run: Path, archive: Path, originals: Path, run_main: Callable, tmp_path: Path
) -> None:
    flags = run, archive, "--shard"
    processes = [
        start_script("predict.py", *flags, f"{index}/2", cwd=tmp_path / str(index))
        for index in range(2)
    ]
    wait_for(lambda: list(archive.glob(f"*/{DONE}")), processes[0])
    for process in processes:
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    begun = {path.parent.name for path in archive.glob(f"?.mp4.timeline/{DONE}")}
    frames = {name: (archive / name / "frames.csv").stat().st_ino for name in begun}
    for index in range(3):  # another number of processes
        run_main(main, *flags, f"{index}/3", cwd=tmp_path)
    assert {n: (archive / n / "frames.csv").stat().st_ino for n in begun} == frames  # not again
    assert {name: row["status"] for name, row in table(archive).items()} == {
        **{f"{number}.mp4": "ok" for number in range(VIDEOS)},
        "broken.mp4": "unreadable",
    }
    assert len(results(archive)) == VIDEOS
    assert all(json.loads(path.read_text()) for path in archive.glob(f"*/{DONE}"))


def test_what_cannot_be_shared_is_refused(
    run: Path, archive: Path, mistake: Callable, tmp_path: Path
) -> None:
    assert (
        "--shard 3/3: give i/n"
        in mistake(main, run, archive, "--shard", "3/3", cwd=tmp_path).stderr
    )
    error = mistake(main, run, "-", "--shard", "0/2", cwd=tmp_path).stderr
    assert "torchrun and --shard: for files and folders, not for -" in error
    error = mistake(main, run, "-", "--skip-done", cwd=tmp_path).stderr
    assert "--skip-done: for files and folders" in error
    error = mistake(main, run, archive, "--clips", "a.csv", "--shard", "0/2", cwd=tmp_path).stderr
    assert "changes nothing with --clips" in error
    (archive / SUMMARY).write_text("patient,age\n")
    error = mistake(main, run, archive, cwd=tmp_path).stderr
    assert f"{archive / SUMMARY}: exists already, is not a table that this command wrote" in error
    assert (archive / SUMMARY).read_text() == "patient,age\n"


def test_check_is_shared(originals: Path, run_main: Callable, tmp_path: Path) -> None:
    bad, whole = tmp_path / "bad.csv", tmp_path / "whole.csv"
    flags = "check", originals.parent / "classes", "--num-workers", 0, "--output"
    shutil.copytree(originals, originals.parent / "classes" / "dark", dirs_exist_ok=True)
    run_main(prepare, *flags, whole, cwd=tmp_path, code=1)
    done = run_main(prepare, *flags, bad, "--shard", "0/2", cwd=tmp_path)
    assert "0 of 7 files are done; here 4" in done.stdout
    assert "3 of 7 files are left to the other processes" in done.stdout
    assert not bad.exists()
    done = run_main(prepare, *flags, bad, "--shard", "1/2", cwd=tmp_path, code=1)
    assert "7 files, 1 of them bad" in done.stdout
    assert bad.read_text() == whole.read_text()
    assert [path.name for path in tmp_path.glob("bad*")] == ["bad.csv"]


def test_audit_is_shared(tiny_data: Path, run_main: Callable, tmp_path: Path) -> None:
    flags = "audit", tiny_data, "--num-workers", 0, "--output"
    whole = run_main(prepare, *flags, "whole", cwd=tmp_path, code=1)
    for index in range(2):
        done = run_main(prepare, *flags, "ours", "--shard", f"{index}/3", cwd=tmp_path)
        assert "left to the other processes" in done.stdout and "composition" not in done.stdout
    done = run_main(prepare, *flags, "ours", "--shard", "2/3", cwd=tmp_path, code=1)
    assert done.stdout.split("\n", 1)[1] == whole.stdout.replace("whole", "ours")
    tables = {path.name: path.read_text() for path in (tmp_path / "whole").iterdir()}
    assert {path.name: path.read_text() for path in (tmp_path / "ours").iterdir()} == tables


def test_cache_is_shared(tiny_data: Path, run_main: Callable, tmp_path: Path) -> None:
    flags = "cache", tiny_data, "--num-workers", 0, "--n-frames", 4, "--image-size", 32, "--output"
    run_main(prepare, *flags, "whole", cwd=tmp_path)
    for index, missing in ((1, 18), (0, 0)):
        done = run_main(prepare, *flags, "ours", "--shard", f"{index}/2", cwd=tmp_path)
        assert f"lacks {missing} of 36 clips" in done.stdout

    def entries(folder: Path) -> dict[Path, bytes]:
        return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}

    assert entries(tmp_path / "ours") == entries(tmp_path / "whole")
    done = run_main(prepare, *flags, "ours", "--shard", "0/1", cwd=tmp_path)
    assert "36 clips, 0 of them to write" in done.stdout
    error = run_main(prepare, *flags, "ours", "--shard", "0/2", "--shards", 2, cwd=tmp_path, code=2)
    assert "one process packs a cache into tar files" in error.stderr
