"""Clips of annotated videos: their labels, their files, and that cutting can be interrupted."""

import csv
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT, link

from clips.clip_plan import plan_clips
from clips.manifest import read_manifest
from clips.segments import Segment
from prepare_data import main
from utils.files import safe_file_names
from video.decoder import read_frames
from video.encoder import write_video

# 0 to 4 s cut, 4 to 10 s sew, 10 to 12 s nothing, 12 to 20 s cut
SEGMENTS = [Segment(0, 4, "cut"), Segment(4, 10, "sew"), Segment(12, 20, "cut")]


def planned(segments: list[Segment] = SEGMENTS, duration: float = 20, **settings) -> str:
    """The starts of the clips and their labels, in short."""
    settings = {"seconds": 2, "stride": 2, "margin": 0.5} | settings
    clips, _ = plan_clips(segments, duration, **settings)
    assert all(clip.end == clip.start + settings["seconds"] for clip in clips)
    return " ".join(f"{clip.start:g}{clip.label[0]}" for clip in clips)


def test_the_label_is_that_of_most_of_the_clip() -> None:
    """Clips of 2 s every second; worked out by hand."""
    assert planned() == "0c 2c 4s 6s 8s 12c 14c 16c 18c"
    # The middles 4, 10 and 12 s are at boundaries; 3 and 5, 9 and 11, 13 s are 1 s away.
    assert planned(stride=1) == "0c 1c 2c 4s 5s 6s 7s 8s 12c 13c 14c 15c 16c 17c 18c"
    # Clips of 1.5 s: at 3 s, 1 of 1.5 s is `cut`, and the middle, 3.75 s, is 0.25 s from 4 s.
    sevenths = "0c 1.5c 3c 4.5s 6s 7.5s 9s 12c 13.5c 15c 16.5c 18c"
    assert planned(seconds=1.5, stride=1.5, margin=0.25) == sevenths
    without_both = sevenths.replace("3c ", "").replace("9s ", "")  # the middle of the last is 9.75
    assert planned(seconds=1.5, stride=1.5, margin=0.26) == without_both
    # With a margin of 0, a clip of which exactly one half is `cut` has no label.
    assert planned(seconds=2, stride=1, margin=0).split() == planned(stride=1).split()
    # More than 60 % are asked for; at 3 s it is 2 / 3, at 9 s as well.
    assert planned(seconds=1.5, stride=1.5, margin=0, min_share=0.6) == sevenths
    assert planned(seconds=1.5, stride=1.5, margin=0, min_share=0.7) == without_both


def test_no_clip_reaches_beyond_the_video() -> None:
    assert planned(duration=5.9, margin=0) == "0c 2c"
    assert planned(duration=6, margin=0) == "0c 2c 4s"
    assert planned(duration=1.9) == planned(duration=0) == ""
    assert planned([Segment(30, 40, "cut")]) == ""
    assert planned([Segment(0, 1000, "cut")], duration=4) == "0c 2c"


def test_touching_segments_of_one_label_have_no_boundary() -> None:
    parts = [Segment(0, 3, "cut"), Segment(3.0004, 8, "cut")]  # rounded to milliseconds
    assert planned(parts, duration=8) == "0c 2c 4c 6c"
    clips, left_out = plan_clips(parts, 8, 2, 2)
    assert clips[1].segment[:3] == (0, 8, "cut") and not left_out


def test_time_without_a_label() -> None:
    assert planned(background="other") == "0c 2c 4s 6s 8s 10o 12c 14c 16c 18c"
    marks = [Segment(0, 4, "uncertain"), Segment(4, 8, "cut"), Segment(8, 12, "unreadable")]
    assert planned(marks, duration=12) == "4c 6c"
    _, left_out = plan_clips(SEGMENTS, 20, 2, 1)
    assert left_out == {"near a boundary": 3, "without a label": 1}
    _, left_out = plan_clips(SEGMENTS, 20, 2, 1, margin=0)
    assert left_out["without a label that covers enough of them"] == 3


def test_file_names_are_safe_and_different() -> None:
    texts = [
        "../../etc",
        "a/b",
        "a_b",
        "CON",
        "con.txt",
        "",
        "...",
        "ü" * 300,
        "x\n\0y",
        "A_B",
        "$(ls)",
    ]
    names = safe_file_names([(text, text) for text in texts])
    values = list(names.values())
    assert len({name.casefold() for name in values}) == len(texts)
    for name in values:
        assert name and "/" not in name and name.isprintable() and not name.startswith((".", "-"))
        assert len(name.encode()) < 100 and name.split(".")[0].upper() != "CON"


def make_video(path: Path, seconds: int = 6, seed: int = 0) -> Path:
    """A video whose frames tell their number."""
    frames = np.zeros((25 * seconds, 32, 32, 3), np.uint8)
    for number, frame in enumerate(frames):
        frame[:16] = (7 * number + seed) % 251
        frame[16:] = np.arange(32)[None, :, None] * 7
    path.parent.mkdir(parents=True, exist_ok=True)
    write_video(path, frames, group=25)
    return path


TIMELINE = "start,end,label\n0,3,cut\n3,6,a/b: sew\n"


@pytest.fixture(scope="module")
def three_videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("videos")
    for number in range(3):
        make_video(root / f"P{number}_op.mp4", seed=50 * number)
    return root


@pytest.fixture
def videos(three_videos: Path, tmp_path: Path) -> Path:
    """Three videos, and their annotations in `labels`."""
    (tmp_path / "labels").mkdir()
    (tmp_path / "videos").mkdir()
    for path in three_videos.iterdir():
        os.link(path, tmp_path / "videos" / path.name)
        (tmp_path / "labels" / f"{path.stem}.csv").write_text(TIMELINE)
    return tmp_path


FLAGS = (
    "clips",
    "videos",
    "--annotations",
    "labels",
    "--output",
    "cut",
    "--seconds",
    1,
    "--stride",
    1,
)


@pytest.fixture
def cut(run_main: Callable, videos: Path) -> Callable[..., str]:
    def call(*more: object, code: int = 0) -> str:
        return run_main(main, *FLAGS, "--num-workers", 0, *more, cwd=videos, code=code).stdout

    return call


def listing(folder: Path) -> list[dict[str, str]]:
    with open(folder / "clips.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def contents(folder: Path) -> dict[str, bytes]:
    """All files but the record, whose stamps of the videos differ."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != "cut.json")
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def test_clips_and_their_list(videos: Path, cut) -> None:
    said = cut("--patient-pattern", "(P[0-9])_")
    rows = listing(videos / "cut")
    assert len(rows) == 18
    assert rows[0] == {
        "path": "clips/cut/P0_op_0-1000.mp4",
        "label": "cut",
        "patient": "P0",
        "video": "P0_op",
        "action": "P0_op_0-3000",
    }
    assert rows[5]["path"] == "clips/a_b_sew/P0_op_5000-6000.mp4"
    assert (rows[5]["label"], rows[5]["action"]) == ("a/b: sew", "P0_op_3000-6000")
    source = read_frames(videos / "videos" / "P1_op.mp4", range, size=None)
    frames = read_frames(videos / "cut/clips/cut/P1_op_2000-3000.mp4", range, size=None)
    assert np.array_equal(frames, source[50:75])  # a key frame per second: copied
    clips = read_manifest(videos / "cut" / "clips.csv", classes=("cut", "a/b: sew"))
    assert [clip.label for clip in clips[:6]] == [0, 0, 0, 1, 1, 1]
    table = [line.split() for line in said.splitlines()]
    assert ["P2", "3", "3", "6"] in table and ["(all)", "9", "9", "18"] in table


def test_the_next_command_works_as_printed(videos: Path, cut, run_main) -> None:
    (command,) = (line for line in cut().splitlines() if line.startswith("to divide them: "))
    python, script, *arguments = shlex.split(command.removeprefix("to divide them: "))
    assert (python, script) == ("python", "prepare_data.py")
    run_main(main, *arguments, cwd=videos)
    assert {path.name for path in (videos / "cut" / "splits").glob("*.csv")} == {
        "train.csv",
        "val.csv",
        "test.csv",
    }
    assert cut().rstrip().endswith("--output cut/splits2")  # the first one is not overwritten
    os.remove(videos / "labels" / "P0_op.csv")
    last = cut().splitlines()[-1]
    assert "fewer than 3 patients" in last
    run_main(main, *shlex.split(last.partition(": python prepare_data.py ")[2]), cwd=videos)


def test_only_what_changed_is_cut_again(videos: Path, cut) -> None:
    assert "18 clips, 0 of them cut already" in cut()
    before = {p: p.stat().st_mtime_ns for p in (videos / "cut").rglob("*.mp4")}

    def changed() -> tuple[int, int]:
        """The number of clips that are new, and of those that are gone."""
        now = {p: p.stat().st_mtime_ns for p in (videos / "cut").rglob("*.mp4")}
        new = sum(now[path] != before.get(path) for path in now)
        gone = len(before.keys() - now.keys())
        before.clear()
        before.update(now)
        assert len(listing(videos / "cut")) == len(now)
        return new, gone

    assert "18 clips, 18 of them cut already" in cut()
    assert changed() == (0, 0)
    (videos / "labels" / "P0_op.csv").write_text("start,end,label\n0,2,cut\n2,6,a/b: sew\n")
    assert "removed: 1 clips" in cut()  # from 2 to 3 s it is `sew` now
    assert changed() == (1, 1)
    os.utime(videos / "videos" / "P1_op.mp4", ns=(1, 1))
    assert "18 clips, 12 of them cut already" in cut()
    assert changed() == (6, 0)
    os.remove(next((videos / "cut").rglob("*.mp4")))
    cut()
    assert changed() == (1, 0)
    cut("--stride", 2)
    assert changed() == (0, 9)
    (videos / "labels" / "P2_op.csv").write_text("start,end,label\n0,6,cut\n")
    cut("--labels", "cut", "--stride", 2)
    assert not (videos / "cut" / "clips" / "a_b_sew").exists()


def test_killed_cutting_goes_on_with_the_same_result(videos: Path, cut) -> None:
    make_video(videos / "videos" / "P3_op.mp4", seconds=12)
    (videos / "labels" / "P3_op.csv").write_text("start,end,label\n0,12,cut\n")
    flags = [*map(str, FLAGS), "--seconds", "0.9"]
    cut("--seconds", 0.9, "--output", "whole")
    (videos / "torch.py").write_text("raise RuntimeError('torch was imported')")
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "prepare_data.py"), *flags],
        cwd=videos,
        env={**os.environ, "PYTHONPATH": str(videos)},  # it takes seconds in every process
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )

    def finished() -> dict[Path, int]:
        """The clips by their time of writing; names of unfinished ones begin with a dot."""
        paths = (videos / "cut").glob("clips/*/[!.]*.mp4")
        return {path: path.stat().st_mtime_ns for path in paths}

    while len(finished()) < 5:
        assert process.poll() is None
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (videos / "cut" / "clips.csv").exists()
    time.sleep(0.3)  # orphaned workers end with their pipe
    before = finished()
    (count,) = (line for line in cut("--seconds", 0.9).splitlines() if "cut already" in line)
    assert count == f"27 clips, {len(before)} of them cut already"
    assert before.items() <= finished().items()
    assert contents(videos / "cut") == contents(videos / "whole")


def test_files_that_were_not_cut_here_stay(videos: Path, mistake, cut) -> None:
    stranger = videos / "cut" / "clips" / "cut" / "P0_op_0-1000.mp4"
    make_video(stranger, seconds=1)
    content = stranger.read_bytes()
    stderr = mistake(main, *FLAGS, cwd=videos).stderr
    assert "holds 1 clips that were not cut here" in stderr and stranger.read_bytes() == content
    stranger.unlink()
    cut()
    outside = videos / "labels" / "P0_op.csv"
    record = json.loads((videos / "cut" / "cut.json").read_text())
    record["clips"] |= {"../labels/P0_op.csv": "", "clips/../P0_op.mp4": "", str(outside): ""}
    (videos / "cut" / "cut.json").write_text(json.dumps(record))
    cut()
    assert outside.exists()


def test_videos_and_annotations_may_lie_in_one_folder(videos: Path, run_main) -> None:
    """The output too: clips of an earlier run are no videos, and their list no annotation."""
    for path in (videos / "labels").iterdir():
        path.rename(videos / "videos" / path.name)
    flags = ("clips", ".", "--annotations", ".", "--output", "cut", "--num-workers", 0)
    for already in (0, 6):
        done = run_main(main, *flags, cwd=videos)
        assert f"6 clips, {already} of them cut already" in done.stdout
    assert "each video counts as a patient of its own" in done.stdout


def test_videos_of_one_name_are_told_apart(videos: Path, cut) -> None:
    for hospital in "ab":
        make_video(videos / "videos" / hospital / "op.mp4", seconds=2, seed=ord(hospital))
        (videos / "labels" / hospital).mkdir()
        (videos / "labels" / hospital / "op.csv").write_text("start,end,label\n0,2,cut\n")
    cut()
    names = {row["video"] for row in listing(videos / "cut")}
    assert len(names) == 5 and all(name.startswith("op-") for name in names if name[0] != "P")


def test_the_loop_of_corrections(videos: Path, cut, run_main) -> None:
    """What timeline.html exports goes in again, whatever the files are called."""
    corrected = videos / "corrected"
    corrected.mkdir()
    for number in range(3):
        name = "timeline_corrected.csv" if not number else f"timeline_corrected ({number}).csv"
        (corrected / name).write_text(
            "start,end,label,confidence,corrected_from,video\r\n"
            f"0.000,3.000,cut,0.9100,,P{number}_op.mp4\r\n"
            f"3.000,4.000,uncertain,0.4000,,P{number}_op.mp4\r\n"
            f"4.000,6.000,look,,cut,P{number}_op.mp4\r\n",
            newline="",
        )
    cut("--annotations", "corrected")
    assert [row["label"] for row in listing(videos / "cut")] == ["cut"] * 3 + ["look"] * 2 + [
        "cut",
        *["cut"] * 2,
        *["look"] * 2,
        *["cut"] * 3,
        *["look"] * 2,
    ]
    (corrected / "again.csv").write_text((corrected / "timeline_corrected.csv").read_text())
    done = run_main(main, *FLAGS, "--annotations", "corrected", cwd=videos, code=2)
    assert "P0_op.mp4: has two annotations" in done.stderr


def test_what_does_not_fit_is_told(videos: Path, cut) -> None:
    (videos / "labels" / "P0_op.csv").write_text("start,end,label\n0,3,cut\n3,90,sew\n")
    (videos / "labels" / "P1_op.csv").rename(videos / "labels" / "other.csv")
    (videos / "videos" / "P2_op.mp4").unlink()
    (videos / "videos" / "P2_op.mp4").write_bytes(b"no video")
    said = cut(code=1)
    assert "P0_op.mp4: 1 of 2 segments end after the video, the last at 90.0 s of 6.0 s" in said
    assert "annotations without a video: other.csv" in said
    assert "videos without an annotation: P1_op.mp4" in said
    assert "1 could not be cut:" in said and "P2_op.mp4: cannot be read" in said
    assert len(listing(videos / "cut")) == 6


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--seconds", 0], "seconds = 0.0: must be from 0.04 to 3600"),
        (["--stride", "nan"], "stride = nan: must be from 0.01"),
        (["--margin", -1], "margin = -1.0: must be from 0"),
        (["--min-share", 1], "min_share = 1.0: must be at least 0 and below 1"),
        (["--annotation-fps", "inf"], "annotation_fps = inf"),
        (["--num-workers", -1], "num_workers = -1"),
        (
            ["--labels", "knot"],
            "no segment is labelled knot (--labels): the labels are a/b: sew, cut",
        ),
        (["--patient-pattern", "X"], "--patient-pattern X finds no patient in 3 of 3 videos"),
        (["--patient-pattern", "("], "is no regular expression"),
        (["--background", "time"], "no class may be called 'time'"),
        (["--annotations", "none"], "none: No such file"),
        (["--seconds", 7], "labels: no clip to cut"),
    ],
)
def test_mistakes_are_one_message(videos: Path, mistake, flags, message) -> None:
    code, stderr = mistake(main, *FLAGS, "--num-workers", 0, *flags, cwd=videos)
    assert code == 2 and message in stderr and "Traceback" not in stderr
    assert not (videos / "cut").exists()


def test_two_processes_do_not_cut_into_one_folder(videos: Path, mistake) -> None:
    from utils.lock import FolderLock

    with FolderLock(videos / "cut"):
        other = subprocess.run(
            [sys.executable, str(ROOT / "prepare_data.py"), *map(str, FLAGS)],
            cwd=videos,
            capture_output=True,
            text=True,
            check=False,
        )
    assert other.returncode == 2 and "another process is working in it" in other.stderr


def test_a_real_operation(real: Path, tmp_path: Path, run_main) -> None:
    """Ten seconds of a cholecystectomy, 25 frames per second, 1280 x 720, with made-up phases."""
    (tmp_path / "videos").mkdir()
    link(tmp_path / "videos" / "video01.mp4", real / "laparoscopy" / "endo.mp4")
    phases = ["Preparation"] * 20 + ["CalotTriangleDissection"] * 230
    text = "Frame\tPhase\n" + "".join(f"{n}\t{phase}\n" for n, phase in enumerate(phases))
    (tmp_path / "video01-phase.txt").write_text(text)
    flags = ("--output", "cut", "--seconds", 0.4, "--stride", 0.4, "--labels")
    run_main(
        main, "clips", "videos", "--annotations", "video01-phase.txt", *flags, "Preparation",
        "--num-workers", 0, cwd=tmp_path,
    )  # fmt: skip
    (row,) = listing(tmp_path / "cut")  # the second one, 0.4 to 0.8 s, is too near the boundary
    assert row["path"] == "clips/Preparation/video01_0-400.mp4"
    source = read_frames(real / "laparoscopy" / "endo.mp4", lambda _: range(10), size=None)
    assert np.array_equal(read_frames(tmp_path / "cut" / row["path"], range, size=None), source)
