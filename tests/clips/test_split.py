"""prepare_data.py split: no patient twice, every clip once, balanced, deterministic, never over."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from helpers import link, run_script, touch

from clips import split as splitting
from clips.manifest import ClipRow
from clips.split import SplitConfig, draw_patients, fold_splits, split
from prepare_data import main
from utils.errors import UserError

SPLITS = ("train", "val", "test")


def test_every_clip_is_tested_once_and_validates_once() -> None:
    numbers = np.array([0, 0, 1, 2, 2, 2])
    splits = np.stack(list(fold_splits(numbers)))
    assert splits.tolist() == [
        ["test", "test", "val", "train", "train", "train"],
        ["train", "train", "test", "val", "val", "val"],
        ["val", "val", "train", "test", "test", "test"],
    ]


@pytest.fixture
def listed(tmp_path: Path) -> Path:
    """One big CSV, its files elsewhere."""
    rng = np.random.default_rng(3)
    groups = np.repeat([f"p{number:02d}" for number in range(8)], rng.integers(3, 30, 8))
    labels = rng.choice(["a", "b", "c"], len(groups), p=[0.6, 0.3, 0.1])
    table = pd.DataFrame({"path": [f"{g}/{i}.mp4" for i, g in enumerate(groups)]})
    table.assign(label=labels, patient=groups, age=50).to_csv(tmp_path / "all.csv", index=False)
    return tmp_path


def read(folder: Path) -> dict[str, pd.DataFrame]:
    return {name: pd.read_csv(folder / f"{name}.csv") for name in ("train", "val", "test")}


def test_script_writes_folds_and_says_what_is_unbalanced(listed: Path, mistake) -> None:
    arguments = ("split", "all.csv", "--output", "folds", "--folds", 4)
    done = run_script("prepare_data.py", *arguments, cwd=listed)
    assert {path.name for path in (listed / "folds").iterdir()} == {
        "fold1",
        "fold2",
        "fold3",
        "fold4",
        "split.json",
    }
    source = pd.read_csv(listed / "all.csv")
    tested = pd.concat([read(listed / f"folds/fold{k}")["test"] for k in range(1, 5)])
    assert sorted(tested["path"]) == sorted(source["path"])
    for k in range(1, 5):
        fold = read(listed / f"folds/fold{k}")
        assert sum(map(len, fold.values())) == len(source)
        patients = [set(table["patient"]) for table in fold.values()]
        assert sum(map(len, patients)) == 8
        merged = pd.concat(fold.values()).merge(source, on="path", suffixes=("", "_source"))
        assert (merged["label"] == merged["label_source"]).all()
    assert "imbalance: " in done.stdout
    assert "cross_validate.py --folds folds --data-root ." in done.stdout
    before = {path: path.read_bytes() for path in (listed / "folds").rglob("*.csv")}
    code, stderr = mistake(main, *arguments, cwd=listed)
    assert code == 2
    assert "folds: exists already" in stderr
    assert {path: path.read_bytes() for path in (listed / "folds").rglob("*.csv")} == before
    split(SplitConfig(str(listed / "all.csv"), str(listed / "twin"), folds=4))
    for path, content in before.items():  # the same bytes again
        assert (listed / "twin" / path.relative_to(listed / "folds")).read_bytes() == content


def test_one_split_and_too_few_patients(listed: Path, capsys) -> None:
    table = pd.read_csv(listed / "all.csv")
    table.loc[table["patient"] == "p00", "label"] = "rare"
    table.to_csv(listed / "all.csv", index=False)
    split(SplitConfig(str(listed / "all.csv"), str(listed / "one"), seed=4))
    said = capsys.readouterr().out
    assert "too few patients: rare has 1, not enough for train, val and test" in said
    assert "no val clip of rare: it is not evaluated there" in said
    assert "train.py --train-csv" in said
    tables = read(listed / "one")
    assert set(tables["train"]["label"]) == {"a", "b", "c", "rare"}  # what is rare is learnt
    assert sum(map(len, tables.values())) == len(table)


def test_the_official_split_is_divided_anew(tmp_path: Path) -> None:
    """A folder with train.csv, val.csv and test.csv; labels in SLAM's words."""
    number = 0
    for name, patients in {"train": range(6), "val": range(4), "test": range(2, 8)}.items():
        rows = []
        for patient in patients:
            number += 1
            for label in ("HookCut", "NeedleIn"):
                clip = f"Clip_P{patient:03d}_V001_C{number}_{label}_part1.mp4"
                rows.append((f"{patient:03d}/{clip}", label.replace("In", "")))
        pd.DataFrame(rows).to_csv(tmp_path / f"{name}.csv", header=["path", "label"])
    split(SplitConfig(str(tmp_path), str(tmp_path / "anew")))
    parts = {name: pd.read_csv(tmp_path / f"anew/{name}.csv", dtype=str) for name in SPLITS}
    assert sum(len(set(part["patient"])) for part in parts.values()) == 8
    assert set(parts["train"]["label"]) == {"HookCut", "Suturing"}
    assert parts["train"]["patient"].str.fullmatch(r"00\d").all()  # 007 stays 007
    assert parts["train"]["action"].str.contains("_C").all()


def test_folders_of_videos(tmp_path: Path, capsys) -> None:
    for label in ("cut", "sew"):
        for patient in range(6):
            path = tmp_path / "data" / label / f"VID{patient}_{label}.mp4"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
    data, pattern = str(tmp_path / "data"), r"VID\d"
    with pytest.raises(UserError, match="the patient of 12 of 12 clips is unknown"):
        split(SplitConfig(data, str(tmp_path / "no")))
    assert not (tmp_path / "no").exists()
    split(SplitConfig(data, str(tmp_path / "by"), patient_pattern=pattern, folds=3))
    fold = read(tmp_path / "by/fold1")
    assert set(fold["test"]["label"]) == {"cut", "sew"}
    assert fold["test"]["path"].str.match(r"(cut|sew)/VID\d_").all()
    assert not set(fold["test"]["patient"]) & set(fold["train"]["patient"])
    split(SplitConfig(data, str(tmp_path / "clips"), group_by="clip", folds=3))
    assert "patients may be in more than one split" in capsys.readouterr().out


def test_links_to_classes_are_classes_and_other_files_are_counted(tmp_path: Path, capsys) -> None:
    for label in ("cut", "sew"):
        for patient in range(6):
            touch(tmp_path, f"store/{label}/VID{patient}.mp4")
        link(tmp_path / "data" / label, tmp_path / "store" / label)
    touch(tmp_path, "store/cut/notes.txt", "store/cut/._VID0.mp4", "data/.Trash/sew/VID9.mp4")
    link(tmp_path / "data/cut/up", tmp_path / "data")
    link(tmp_path / "data/sew/VID5_again.mp4", tmp_path / "store/sew/VID5.mp4")
    config = SplitConfig(str(tmp_path / "data"), str(tmp_path / "new"), patient_pattern=r"VID\d")
    split(config)
    tables = read(tmp_path / "new")
    assert sorted(path for table in tables.values() for path in table["path"]) == sorted(
        f"{label}/VID{patient}.mp4" for label in ("cut", "sew") for patient in range(6)
    )
    said = capsys.readouterr().out
    assert "data: passed over: 2 hidden, 1 .txt, 1 read under another name\n" in said
    assert "data: 1 clips are there more than once and are kept once\n" in said


def test_one_folder_under_the_names_of_two_classes_is_refused(tmp_path: Path) -> None:
    touch(tmp_path, "data/cut/VID1.mp4")
    link(tmp_path / "data/sew", tmp_path / "data/cut")
    with pytest.raises(UserError, match=r"sew and .*cut are one folder, but two classes"):
        split(SplitConfig(str(tmp_path / "data"), str(tmp_path / "new")))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ((), "holds neither train.csv nor any video (it is empty)"),
        (("a.txt", ".b.mp4"), "nor any video (passed over: 1 .txt, 1 hidden)"),
        (("a.mp4", "cut/b.mp4"), "1 clips have no label (a.mp4 ...): give them one, or put them"),
        (("P1/Cut/a.mp4", "P2/cut/b.mp4"), "'Cut' and 'cut' differ only in case"),
    ],
)
def test_folders_that_cannot_be_divided_are_one_line(
    tmp_path: Path, names: tuple[str, ...], message: str, mistake
) -> None:
    (tmp_path / "data").mkdir()
    touch(tmp_path / "data", *names)
    assert message in mistake(main, "split", "data", "--output", "o", cwd=tmp_path).stderr
    assert not (tmp_path / "o").exists()


def test_nothing_is_left_of_a_split_that_failed(listed: Path, monkeypatch) -> None:
    """The message names the folder that was asked for, and not the hidden one that was written."""

    def full(path: Path, *_: object) -> None:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(splitting, "write_json", full)
    with pytest.raises(UserError) as told:
        split(SplitConfig(str(listed / "all.csv"), str(listed / "new")))
    assert str(told.value).startswith(f"{listed / 'new'}: the disk is full")
    assert [path.name for path in listed.iterdir()] == ["all.csv"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["all.csv", "--output", "o", "--folds", "2"], "folds = 2: must be at least 3"),
        (["all.csv", "--output", "o", "--folds", "9"], "8 patients (or other groups) cannot"),
        (["all.csv", "--output", "o", "--test", "0"], "val and test must be above 0"),
        (["none.csv", "--output", "o"], "none.csv: no such manifest"),
        (["twice.csv", "--output", "o"], "1 clips are listed with two labels"),
        (["names.csv", "--output", "o"], "1 clips have no label"),
        (["two.csv", "--output", "o"], "1 clips are listed with two patients"),
        (["all.csv", "--output", "all.csv/o"], "a file is in the place of a folder"),
        (["reserved.csv", "--output", "o"], "no class may be called 'uncertain'"),
        (["spellings.csv", "--output", "o"], "'Cut' and 'cut' differ only in case"),
    ],
)
def test_mistakes_are_one_line(listed: Path, flags: list[str], message: str, mistake) -> None:
    (listed / "twice.csv").write_text("path,label,patient\na.mp4,x,1\na.mp4,y,1\nb.mp4,x,2\n")
    (listed / "two.csv").write_text("path,label,patient\na.mp4,x,1\n./a.mp4,x,2\nb.mp4,x,2\n")
    (listed / "names.csv").write_text("path,split\na.mp4,train\n")
    (listed / "reserved.csv").write_text("path,label,patient\na.mp4,x,1\nb.mp4,uncertain,2\n")
    (listed / "spellings.csv").write_text("path,label,patient\na.mp4,Cut,1\nb.mp4,cut,2\n")
    code, stderr = mistake(main, "split", *flags, cwd=listed)
    assert code == 2
    assert message in stderr
    assert not (listed / "o").exists()


def test_drawn_patients_are_whole_nested_and_have_all_classes() -> None:
    rng = np.random.default_rng(0)
    rows = [
        ClipRow(Path(f"{patient}_{n}.mp4"), int(label), f"P{patient}")
        for patient in range(20)
        for n, label in enumerate(rng.choice(4, 3, p=[0.7, 0.2, 0.05, 0.05]))
    ]
    for seed in range(5):
        before: set[ClipRow] = set()
        for fraction in (0.05, 0.1, 0.25, 0.5, 1.0):
            drawn = draw_patients(rows, fraction, seed)
            patients = {row.patient for row in drawn}
            assert drawn == [row for row in rows if row.patient in patients]
            assert {row.label for row in drawn} == {0, 1, 2, 3}
            assert before <= set(drawn)
            assert len(patients) >= round(20 * fraction)
            before = set(drawn)
        assert drawn == rows
        assert len({r.patient for r in draw_patients(rows, 0.25, seed)}) == 5
    assert draw_patients(rows, 0.25, 0) == draw_patients(rows, 0.25, 0)
    assert draw_patients(rows, 0.25, 0) != draw_patients(rows, 0.25, 1)
