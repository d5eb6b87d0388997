"""prepare_data.py split: no patient twice, every clip once, balanced, deterministic, never over."""

from collections import Counter
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
    labels = groups = np.array(list("abcdef"))
    splits = np.stack(list(fold_splits(numbers, labels, groups, seed=0)))
    assert splits.tolist() == [
        ["test", "test", "val", "train", "train", "train"],
        ["train", "train", "test", "val", "val", "val"],
        ["val", "val", "train", "test", "test", "test"],
    ]


def test_of_two_folds_the_other_one_is_divided_by_patient() -> None:
    groups = np.repeat([f"p{number}" for number in range(12)], 5)
    numbers, labels = np.repeat([0, 1], 30), np.array(["a", "b"] * 30)
    for fold, splits in enumerate(fold_splits(numbers, labels, groups, seed=0)):
        assert ((splits == "test") == (numbers == fold)).all()
        parts = {name: set(groups[splits == name]) for name in ("train", "val")}
        assert not parts["train"] & parts["val"]
        assert {name: len(names) for name, names in parts.items()} == {"train": 5, "val": 1}


def random_rows(seed: int) -> list[ClipRow]:
    """Clips of 12 patients in any order, some of unknown patients, with rare classes."""
    rng = np.random.default_rng(seed)
    patients = [*np.repeat([f"p{n}" for n in range(12)], rng.integers(1, 30, 12)), *[None] * 7]
    labels = rng.choice(5, len(patients), p=[0.6, 0.25, 0.1, 0.03, 0.02])
    pairs = enumerate(zip(labels, patients, strict=True))
    rows = [ClipRow(Path(f"{i}.mp4"), int(label), p and str(p)) for i, (label, p) in pairs]
    return [rows[i] for i in rng.permutation(len(rows))]


def group(row: ClipRow) -> str:
    return row.patient or str(row.path)


FRACTIONS = (0.001, 0.05, 0.1, 0.3, 0.5, 0.8, 0.99, 1)


@pytest.mark.parametrize("seed", range(8))
def test_drawn_patients_are_whole_nested_and_cover_the_classes(seed: int) -> None:
    rows = random_rows(seed)
    sizes = Counter(map(group, rows))
    previous: set[ClipRow] = set()
    for fraction in FRACTIONS:
        drawn = draw_patients(rows, fraction, seed)
        assert drawn == draw_patients(rows, fraction, seed)
        assert drawn == [row for row in rows if row in set(drawn)]  # in their order, none twice
        assert {row.label for row in drawn} == {row.label for row in rows}
        patients = Counter(map(group, drawn))
        assert all(sizes[patient] == count for patient, count in patients.items())
        assert previous <= set(drawn)
        previous = set(drawn)
    assert drawn == rows
    assert len({tuple(draw_patients(rows, 0.3, other)) for other in range(6)}) > 3


def test_the_number_of_patients_is_the_nearest() -> None:
    """Of all numbers of patients that this seed's order allows, the nearest one, from slow counting
    over a fine grid of fractions."""
    rows = [ClipRow(Path(f"{p}_{i}"), i % 2, f"p{p}") for p in range(7) for i in range(2 + 3 * p)]
    grid = [n / 1000 for n in range(1, 1001)]
    reached = sorted({len(draw_patients(rows, fraction, 3)) for fraction in grid})
    assert len(reached) == 7  # each number of patients is drawn for some fraction
    for fraction in grid:
        distance = {clips: abs(clips - fraction * len(rows)) for clips in reached}
        clips = len(draw_patients(rows, fraction, 3))
        assert distance[clips] == min(distance.values())


def test_a_patient_with_several_missing_classes_is_drawn_before_many_with_one() -> None:
    """The classes need p5 and p6 alone, and a fraction that is smaller than both takes both."""
    rows = [ClipRow(Path(f"{p}_{i}"), p % 4, f"p{p}") for p in range(4) for i in range(9)]
    rows += [ClipRow(Path(f"a{k}"), k, "p5") for k in (0, 1)]
    rows += [ClipRow(Path(f"b{k}"), k, "p6") for k in (2, 3)]
    for seed in range(10):
        assert {row.patient for row in draw_patients(rows, 0.01, seed)} == {"p5", "p6"}
        assert len(draw_patients(rows, 0.35, seed)) == 13  # 14 clips: one more patient


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
        (["all.csv", "--output", "o", "--folds", "1"], "folds = 1: must be at least 2"),
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
