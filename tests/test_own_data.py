"""Data as people have it: class folders, split folders, one table, each trained as it is."""

import csv
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import TINY_FLAGS
from PIL import Image

import cross_validate
import evaluate
import prepare_data
import train
from checkpoint import load_checkpoint
from clips.manifest import read_manifest, write_manifest
from clips.manifest_formats import ManifestOptions
from config import TrainConfig
from training.checks import resolve
from training.loaders import load_splits
from utils.errors import UserError

pytestmark = pytest.mark.usefixtures("no_figures")

CLASSES = ("dark", "grey", "light")
FLAGS = [*TINY_FLAGS[TINY_FLAGS.index("--weights") :], "--epochs", "1"]  # without --classes


def link(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    os.link(source, target)


@pytest.fixture
def class_folders(tiny_data: Path, tmp_path: Path) -> Path:
    """`root/<class>/<patient>_<number>.mp4`, with six patients."""
    root = tmp_path / "class folders"
    for split in ("train", "val", "test"):
        for row in read_manifest(tiny_data / f"{split}.csv", classes=CLASSES):
            link(row.path, root / CLASSES[row.label] / f"{row.patient}_{row.path.name}")
    return root


def patients(rows: list) -> set[str]:
    return {row.patient for row in rows}


def test_class_folders_train_as_they_are(
    class_folders: Path, tmp_path: Path, run_main: Callable
) -> None:
    flags = ["--data-root", class_folders, "--patient-pattern", "([a-z]+[0-9])_", *FLAGS]
    said = run_main(train.main, *flags, cwd=tmp_path).stdout
    assert "has no splits: its clips are divided" in said
    (run,) = (tmp_path / "runs").iterdir()
    assert load_checkpoint(run)["classes"] == list(CLASSES)
    rows = {
        s: read_manifest(run / f"{s}.csv", class_folders, CLASSES) for s in ("train", "val", "test")
    }
    assert sum(map(len, rows.values())) == 36
    assert len(set.union(*(patients(part) for part in rows.values()))) == 6
    assert sum(len(patients(part)) for part in rows.values()) == 6  # none is in two splits
    # A clip that comes later is in no split, and the evaluation is that of the training.
    link(next((class_folders / "dark").iterdir()), class_folders / "dark" / "test9_new.mp4")
    (tmp_path / "elsewhere").mkdir()
    run_main(evaluate.main, run, "--num-workers", 0, cwd=tmp_path / "elsewhere")
    assert (run / "evaluate_test" / "predictions.csv").read_text() == (
        run / "predictions.csv"
    ).read_text()


def test_split_folders_train_as_they_are(
    tiny_data: Path, tmp_path: Path, run_main: Callable
) -> None:
    root = tmp_path / "data"
    for split, name in (("train", "train"), ("val", "validation"), ("test", "test")):
        for row in read_manifest(tiny_data / f"{split}.csv", classes=CLASSES):
            link(row.path, root / name / CLASSES[row.label] / row.path.name)
    run_main(train.main, "--data-root", root, *FLAGS, cwd=tmp_path)
    (run,) = (tmp_path / "runs").iterdir()
    with open(run / "predictions.csv", newline="") as file:
        tested = [row["path"] for row in csv.DictReader(file)]
    assert len(tested) == 9
    assert all("/test/" in path for path in tested)
    said = run_main(prepare_data.main, "audit", root, "--no-contents", cwd=tmp_path, code=3).stdout
    assert (
        said.startswith("36 clips in train, validation, test")
        or "in train, test, validation" in said
    )
    run_main(prepare_data.main, "split", root, "--output", "s", "--group-by", "clip", cwd=tmp_path)
    assert len(read_manifest(tmp_path / "s" / "train.csv", root, CLASSES)) > 18


def one_table(tiny_data: Path, path: Path, splits: bool = True) -> None:
    with open(path, "w", newline="") as file:
        writer = csv.writer(file, delimiter=";")
        writer.writerow(["File Name", "Class", "Patient ID", *["Subset"] * splits])
        for split in ("train", "val", "test"):
            for row in read_manifest(tiny_data / f"{split}.csv", classes=CLASSES):
                name = row.path.relative_to(tiny_data / "clips")
                writer.writerow([name, CLASSES[row.label], row.patient, *[split.upper()] * splits])


def test_one_table_is_as_good_as_three(tiny_data: Path, tmp_path: Path) -> None:
    one_table(tiny_data, tmp_path / "all.csv")
    config = resolve(TrainConfig(data_root=str(tiny_data), csv=str(tmp_path / "all.csv")))
    three = resolve(TrainConfig(data_root=str(tiny_data)))
    assert config.classes == three.classes == CLASSES
    assert load_splits(config) == load_splits(three)
    rows = read_manifest(tmp_path / "all.csv", tiny_data, CLASSES, split="val")
    assert rows == load_splits(three)["val"]


def test_a_table_without_splits_is_divided_by_patient(tiny_data: Path, tmp_path: Path) -> None:
    one_table(tiny_data, tmp_path / "all.csv", splits=False)
    config = resolve(TrainConfig(data_root=str(tiny_data), csv=str(tmp_path / "all.csv")))
    splits = load_splits(config)
    assert load_splits(config) == splits
    assert sum(len(patients(rows)) for rows in splits.values()) == 6
    assert all(Counter(row.label for row in rows).keys() == {0, 1, 2} for rows in splits.values())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("path,label,fold\n0_0.mp4,a,1\n0_1.mp4,b,2\n", "its splits are '1', '2': they must be"),
        ("path,label,split\n0_0.mp4,a,train\n0_1.mp4,b,test\n", "they must be train, val and test"),
        ("path,label,patient\n0_0.mp4,a,P\n0_1.mp4,b,P\n", "1 patients .* cannot fill 3 splits"),
    ],
)
def test_splits_that_cannot_be_used(
    tiny_data: Path, tmp_path: Path, text: str, message: str
) -> None:
    (tmp_path / "all.csv").write_text(text)
    clips = str(tiny_data / "clips" / "train")
    with pytest.raises(UserError, match=message):
        load_splits(resolve(TrainConfig(data_root=clips, csv=str(tmp_path / "all.csv"))))


def test_a_class_without_training_clips_is_named(tiny_data: Path, tmp_path: Path) -> None:
    for name in ("train", "val", "test"):
        (tmp_path / f"{name}.csv").write_text((tiny_data / f"{name}.csv").read_text())
    with open(tmp_path / "val.csv", "a") as file:
        file.write("train/0_0.mp4,gray,p9\n")
    with pytest.raises(UserError, match=r"no training clip has the label 'gray' \(val\)"):
        resolve(TrainConfig(data_root=str(tmp_path)))


def test_what_split_prints_is_what_trains(
    class_folders: Path, tmp_path: Path, run_main: Callable
) -> None:
    """The printed command is run as it is, apart from the settings that make it fast."""
    import shlex

    pattern = ["--patient-pattern", "([a-z]+[0-9])_"]
    said = run_main(
        prepare_data.main,
        "split",
        class_folders,
        "--output",
        "f",
        "--folds",
        3,
        *pattern,
        cwd=tmp_path,
    ).stdout
    command = shlex.split(said.splitlines()[-1].removeprefix("to train: "))
    assert command[:2] == ["python", "cross_validate.py"]
    assert command[-4:] == ["--classes", *CLASSES]
    said = run_main(cross_validate.main, *command[2:], *FLAGS, cwd=tmp_path).stdout
    assert "36 clips: accuracy" in said
    without = [part for part in command[2:] if part not in ("--classes", *CLASSES)]
    config = cross_validate.classes_of_folds(cross_validate.fold_folders(without[1]))
    assert config == CLASSES


def test_lists_of_frame_folders(tmp_path: Path) -> None:
    """TSM's and mmaction2's `folder n label`; the rate is a setting or a column."""
    for name, count in (("c1", 3), ("c2", 5)):
        for number in range(count):
            make_image(tmp_path / name / f"img_{number:05d}.png")
    (tmp_path / "list.txt").write_text("c1 3 0\nc2 5 1\n")
    options = ManifestOptions(frame_rate=25.0)
    rows = read_manifest(tmp_path / "list.txt", classes=("cut", "sew"), options=options)
    assert [(row.path.name, row.label, row.fps) for row in rows] == [("c1", 0, 25), ("c2", 1, 25)]
    (tmp_path / "m.csv").write_text("path,label,fps\nc1,cut,2.5\nc2,sew,\n")
    rows = read_manifest(tmp_path / "m.csv", classes=("cut", "sew"), options=options)
    assert [row.fps for row in rows] == [2.5, 25]
    write_manifest(tmp_path / "again.csv", rows, tmp_path, ("cut", "sew"))
    assert read_manifest(tmp_path / "again.csv", classes=("cut", "sew")) == rows
    (tmp_path / "list.txt").write_text("c1 4 0\nc2 5 1\n")
    with pytest.raises(UserError, match=r"images than listed: 1: c1 \(3 of 4\)"):
        read_manifest(tmp_path / "list.txt", classes=("cut", "sew"))


def make_image(path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    Image.new("RGB", (16, 16)).save(path)


def test_a_table_beside_the_clips_is_never_left_out_silently(
    tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Folders of patients are no classes where a table says what the classes are."""
    for number, row in enumerate(read_manifest(tiny_data / "train.csv", classes=CLASSES)):
        link(row.path, tmp_path / f"P{number % 3}" / row.path.name)
    files = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.mp4"))
    lines = [f"{path},{CLASSES[number % 3]}" for number, path in enumerate(files)]
    table = tmp_path / "clips.csv"
    table.write_text("\n".join(["clip file,diagnosis", *lines]))
    with pytest.raises(UserError, match=r"clips\.csv: which column holds .*'diagnosis'"):
        resolve(TrainConfig(data_root=str(tmp_path)))
    config = resolve(TrainConfig(data_root=str(tmp_path), label_column="diagnosis"))
    assert config.classes == CLASSES
    table.write_bytes("clip file,diagnosis\n".encode("utf-16"))
    with pytest.raises(UserError, match="UTF-16"):
        resolve(TrainConfig(data_root=str(tmp_path)))
    table.write_text("path,reason\n" + "\n".join(lines))  # of prepare_data.py check
    assert resolve(TrainConfig(data_root=str(tmp_path))).classes == ("P0", "P1", "P2")
    (tmp_path / "P0" / "more").mkdir()
    link(tmp_path / files[0], tmp_path / "P0" / "more" / "x.mp4")
    capsys.readouterr()
    resolve(TrainConfig(data_root=str(tmp_path)))
    assert "(of P0/more/x.mp4 'more')" in capsys.readouterr().out
    table.write_text("a.mp4,cut,P1\nb.mp4,sew,P2\n")
    with pytest.raises(UserError, match=r"has no header: write one, e\.g\. path,label,patient"):
        resolve(TrainConfig(data_root=str(tmp_path)))
    with pytest.raises(UserError, match="gone: no such folder: give --data-root"):
        load_splits(TrainConfig(data_root=str(tmp_path / "gone"), classes=CLASSES))
    (tmp_path / "train").mkdir()
    with pytest.raises(UserError, match="val: no such folder of clips"):
        resolve(TrainConfig(data_root=str(tmp_path)))
