"""A newcomer's hour: real clips in the forms people have them, from nothing to the two pages.

The commands are those of README.md and docs/data.md, with settings that make them fast.
"""

import csv
import itertools
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import av
import pytest

import evaluate
import predict
import prepare_data
import report
import train
from video.encoder import write_video

pytestmark = pytest.mark.usefixtures("no_figures")
FAST = [
    *("--model-name", "vivit", "--weights", "none", "--image-size", "32", "--n-frames", "4"),
    *("--epochs", "1", "--num-workers", "0", "--device", "cpu", "--precision", "fp32"),
]


@pytest.fixture
def fights(real: Path) -> list[tuple[Path, str, str]]:
    """(clip, class, patient) of twelve real clips of two classes."""
    clips = []
    for name in ("fight", "noFight"):
        files = sorted((real / "fights" / name).glob("*.mp4"))[:6]
        clips += [(path, name, f"P{number}") for number, path in enumerate(files)]
    return clips


def to_pages(run_main: Callable, tmp_path: Path, video: Path, *arguments: object) -> Path:
    """Train, evaluate, report, predict: returns the run."""
    run_main(train.main, *arguments, *FAST, cwd=tmp_path)
    (run,) = (tmp_path / "runs").glob("*_vivit")
    run_main(evaluate.main, run, "--num-workers", 0, cwd=tmp_path)
    run_main(report.main, run, cwd=tmp_path)
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "<title>" in page
    assert "noFight" in page or "Preparation" in page
    flags = ["--output", tmp_path / "seen", "--device", "cpu"]
    said = run_main(predict.main, run, video, *flags, cwd=tmp_path).stdout
    (timeline,) = (tmp_path / "seen").rglob("timeline.html")
    assert f"open {timeline}" in said
    return run


def printed_command(said: str) -> list[str]:
    """The command that split prints for the training, without `python train.py`."""
    command = shlex.split(said.splitlines()[-1].removeprefix("to train: "))
    assert command[:2] == ["python", "train.py"]
    return command[2:]


def test_class_folders(fights: list, tmp_path: Path, run_main: Callable) -> None:
    for path, name, patient in fights:
        target = tmp_path / "lab" / name / f"{patient}_{path.name}"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    said = run_main(prepare_data.main, "check", "lab", "--num-workers", 0, cwd=tmp_path).stdout
    assert "12 files, 0 of them bad" in said
    pattern = ["--patient-pattern", "(P[0-9]+)_"]
    run = to_pages(run_main, tmp_path, fights[0][0], "--data-root", "lab", *pattern)
    said = run_main(prepare_data.main, "audit", run, "--data-root", "lab", cwd=tmp_path).stdout
    assert "no leakage found: the patients of 12" in said


def test_frame_folders(fights: list, tmp_path: Path, run_main: Callable) -> None:
    for path, name, patient in fights:
        folder = tmp_path / "frames" / name / f"{patient}_{path.stem}"
        folder.mkdir(parents=True)
        with av.open(str(path)) as container:
            for number, frame in enumerate(container.decode(video=0), 1):
                if number % 5 == 0:
                    frame.to_image().resize((64, 48)).save(folder / f"{number // 5:06d}.jpg")
    split = ["split", "frames", "--output", "splits", "--patient-pattern", "(P[0-9]+)_"]
    said = run_main(prepare_data.main, *split, cwd=tmp_path).stdout
    folder = tmp_path / "frames" / fights[0][1] / f"P0_{fights[0][0].stem}"
    shutil.copytree(folder, tmp_path / "operation")
    rate = ["--frame-rate", "5"]
    run = to_pages(
        lambda main, *rest, cwd: run_main(main, *rest, *rate * (main is predict.main), cwd=cwd),
        tmp_path,
        tmp_path / "operation",
        *printed_command(said),
        *rate,
    )
    assert "/frames/" in (run / "predictions.csv").read_text()


def test_a_table_as_a_spreadsheet_saves_it(
    fights: list, tmp_path: Path, run_main: Callable
) -> None:
    splits = {0: "Train", 1: "Train", 2: "Train", 3: "Train", 4: "Validation", 5: "Test"}
    with open(tmp_path / "clips.csv", "w", newline="", encoding="utf-8-sig") as file:
        writer = csv.writer(file, delimiter=";")
        writer.writerow(["File Name", "Class", "Patient ID", "Split", "Remark"])
        for path, name, patient in fights:
            writer.writerow([path, name, patient, splits[int(patient[1:])], "a; b"])
            writer.writerow([])
    said = run_main(prepare_data.main, "audit", "clips.csv", cwd=tmp_path).stdout
    assert "12 clips in train, val, test" in said
    assert "no leakage found: the patients of 12" in said
    run = to_pages(run_main, tmp_path, fights[0][0], "--csv", "clips.csv")
    with open(run / "predictions.csv", newline="") as file:
        assert {Path(row["path"]) for row in csv.DictReader(file)} == {
            path for path, _, patient in fights if patient == "P5"
        }


def test_phases_of_whole_operations(real: Path, tmp_path: Path, run_main: Callable) -> None:
    """Cholec80's files: a phase per frame at 25 fps; cut, split, train, judge the timelines."""
    (tmp_path / "operations").mkdir()
    (tmp_path / "phases").mkdir()
    with av.open(str(real / "laparoscopy" / "endo.mp4")) as container:
        decoded = itertools.islice(container.decode(video=0), 200)
        frames = [frame.reformat(64, 48, "rgb24").to_ndarray() for frame in decoded]
    for number in range(1, 4):
        write_video(tmp_path / "operations" / f"video{number:02d}.mp4", frames, 25)
        change = 80 + 10 * number
        rows = [f"{i}\t{'Preparation' if i < change else 'ClippingCutting'}" for i in range(200)]
        name = f"video{number:02d}-phase.txt"
        (tmp_path / "phases" / name).write_text("\n".join(["Frame\tPhase", *rows]) + "\n")
    cut = ["clips", "operations", "--annotations", "phases", "--output", "cut"]
    said = run_main(prepare_data.main, *cut, "--num-workers", 0, cwd=tmp_path).stdout
    (line,) = [line for line in said.splitlines() if "prepare_data.py split" in line]
    command = shlex.split(line[line.index("python ") :])
    said = run_main(prepare_data.main, *command[2:], cwd=tmp_path).stdout
    video = tmp_path / "operations" / "video03.mp4"
    to_pages(run_main, tmp_path, video, *printed_command(said))
    said = run_main(
        evaluate.main, "timeline", "phases/video03-phase.txt", "seen", cwd=tmp_path
    ).stdout
    assert "accuracy" in said
