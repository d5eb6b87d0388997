"""Tables as people and spreadsheets write them, and folders: which clips and labels they list."""

import importlib.util
from pathlib import Path

import pytest

from clips.manifest import classes_of, read_manifest
from clips.manifest_formats import ManifestOptions, Record, read_records
from clips.splits import find_splits
from utils.errors import UserError


def records(tmp_path: Path, text: str, **options: str) -> list[Record]:
    (tmp_path / "m.csv").write_text(text, encoding="utf-8")
    rows, problems = read_records(tmp_path / "m.csv", ManifestOptions(**options))
    if problems:
        raise UserError("\n".join(problems))
    return rows


@pytest.mark.parametrize(
    ("header", "row"),
    [
        ("path,label", ("a.mp4", "cut", None)),
        ("file,class", ("a.mp4", "cut", None)),
        ("File Name;Class Name", ("a.mp4", "cut", None)),
        ("filename,action", ("a.mp4", "cut", None)),
        ("video_path,phase", ("a.mp4", "cut", None)),
        ("video,label,patient_id", ("a.mp4", "cut", "P1")),
        ("clip,category,subject-id", ("a.mp4", "cut", "P1")),
        ("Video Path\tTarget\tCase", ("a.mp4", "cut", "P1")),
    ],
)
def test_headers_under_other_names(tmp_path: Path, header: str, row: tuple) -> None:
    delimiter = next(mark for mark in "\t;," if mark in header)
    cells = ["a.mp4", "cut", "P1"][: header.count(delimiter) + 1]
    (record,) = records(tmp_path, f"{header}\n{delimiter.join(cells)}\n")
    assert (record.path, record.label, record.patient) == row


def test_columns_with_two_meanings(tmp_path: Path) -> None:
    """`action` is the label if no other column is; `phase` is the split if all its cells are."""
    (record,) = records(tmp_path, "path,label,action,patient\na.mp4,cut,C3,P1\n")
    assert (record.label, record.action) == ("cut", "P1_C3")
    (record,) = records(tmp_path, "path,label,phase\na.mp4,cut,Training\n")
    assert (record.label, record.split) == ("cut", "train")
    (record,) = records(tmp_path, "path,phase,subset\na.mp4,Clipping,valid\n")
    assert (record.label, record.split) == ("Clipping", "val")
    (record,) = records(tmp_path, "video,name,label\nop1.mp4,x,cut\n")
    assert record.path == "op1.mp4"
    (record,) = records(tmp_path, "file,video,label\na.mp4,V1,cut\n")
    assert (record.path, record.video) == ("a.mp4", "V1")
    first, _ = records(tmp_path, "path,class_id,class_name\na.mp4,0,cut\nb.mp4,1,sew\n")
    assert first.label == "cut"
    with pytest.raises(UserError, match="class and target could all hold the label: give --label-"):
        records(tmp_path, "path,class,target\na.mp4,cut,P1\nb.mp4,sew,P1\n")


def test_an_unknown_header_is_never_taken_for_a_clip(tmp_path: Path) -> None:
    for text in ("clip_id,kind\na.mp4,cut\n", "x,y,z\n1,a.mp4,cut\n", "x;y\na b.mp4;cut\n"):
        with pytest.raises(UserError, match=r"columns are .*'(kind|y)'.*--path-column, --label-"):
            records(tmp_path, text)
    with pytest.raises(UserError, match=r"which column holds the labels .*'path', 'kind'"):
        records(tmp_path, "path,kind\na.mp4,cut\n")
    text = "clip_id,kind,who,part\na.mp4,cut,P1,train\n"
    options = {"path_column": "Clip ID", "label_column": "kind", "patient_column": "who"}
    (record,) = records(tmp_path, text, **options, split_column="part")
    assert record[:4] == (2, "a.mp4", "cut", "P1")
    assert record.split == "train"
    with pytest.raises(UserError, match=r"has no column 'knd': its columns are 'clip_id', 'kind'"):
        records(tmp_path, text, path_column="clip_id", label_column="knd")


def test_lists_without_a_header(tmp_path: Path) -> None:
    def pairs(text: str) -> list[tuple]:
        return [(r.path, r.label) for r in records(tmp_path, text)]

    assert pairs("a.mp4,Needle In\nb.mp4,Cut\n") == [("a.mp4", "Needle In"), ("b.mp4", "Cut")]
    assert pairs('"a.mp4","Needle In"\n') == [("a.mp4", "Needle In")]
    assert pairs('"a b.mp4" "cut"\n') == [("a b.mp4", "cut")]
    assert pairs("P1/c1,Needle In\nP1/c2,Cut\n") == [("P1/c1", "Needle In"), ("P1/c2", "Cut")]


@pytest.mark.parametrize("separator", [" ", ",", "\t"])
def test_lists_of_frame_folders(tmp_path: Path, separator: str) -> None:
    """`folder number_of_frames label`, as TSM and mmaction2 write them."""
    lines = (separator.join(cells) for cells in (("P1/c 1", "118", "3"), ("P2/c2", "40", "0")))
    first, second = records(tmp_path, "\n".join(lines))
    assert (first.path, first.frames, first.label) == ("P1/c 1", 118, "3")
    assert (second.path, second.frames, second.label) == ("P2/c2", 40, "0")


@pytest.mark.parametrize(
    "text",
    [
        "path,label\na.mp4,cut|sew\nb.mp4,cut|sew\nc.mp4,cut\nd.mp4,sew\n",
        "path,label\na.mp4,cut\na.mp4,sew\n",
        "path,cut,sew\na.mp4,0,1\nb.mp4,1,1\n",
    ],
)
def test_several_labels_per_clip_are_refused_in_one_line(tmp_path: Path, text: str) -> None:
    with pytest.raises(UserError, match="here a clip has one class") as error:
        records(tmp_path, text)
    assert len(str(error.value).splitlines()) == 1


def test_a_class_may_have_a_comma_in_its_name(tmp_path: Path) -> None:
    rows = records(tmp_path, 'path,label\na.mp4,"hook, left"\nb.mp4,"hook, right"\nc.mp4,hook\n')
    assert [row.label for row in rows] == ["hook, left", "hook, right", "hook"]


def test_frame_rates_and_patients_by_pattern(tmp_path: Path) -> None:
    text = "path;label;fps\nVID7_a;cut;1,5\nVID8_b;cut;\n"
    first, second = records(tmp_path, text, patient_pattern="(VID[0-9]+)_")
    assert (first.fps, first.patient) == (1.5, "VID7")
    assert (second.fps, second.patient) == (None, "VID8")
    for rate in ("0", "x", "1e9"):
        with pytest.raises(UserError, match="line 2"):
            records(tmp_path, f"path;label;fps\na;cut;{rate}\n")


@pytest.mark.skipif(not importlib.util.find_spec("openpyxl"), reason="needs openpyxl")
def test_a_spreadsheet(tmp_path: Path) -> None:
    import openpyxl

    book = openpyxl.Workbook()
    for row in (["File Name", "Class", "Fold"], [None, None, None], ["a 1.mp4", 1.0, "train"]):
        book.active.append(row)
    book.active["H9"].number_format = "0.00"
    book.save(tmp_path / "clips.xlsx")
    (record,), problems = read_records(tmp_path / "clips.xlsx")
    assert (record.line, record.path, record.label, record.split) == (3, "a 1.mp4", "1", "train")
    assert not problems
    (tmp_path / "broken.xlsx").write_bytes(b"PK no workbook")
    assert "is no .xlsx that can be read" in read_records(tmp_path / "broken.xlsx")[1][0]
    assert "no such manifest" in read_records(tmp_path / "gone.xlsx")[1][0]


def test_a_spreadsheet_without_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "openpyxl", None)
    (tmp_path / "clips.xlsx").touch()
    (problem,) = read_records(tmp_path / "clips.xlsx")[1]
    assert "needs openpyxl (pip install -r requirements-optional.txt)" in problem


def labelled(**splits: str) -> dict[str, list[Record]]:
    return {
        split: [Record(0, "", label) for label in labels.split(",")]
        for split, labels in splits.items()
    }


def test_classes_from_the_labels() -> None:
    assert classes_of(labelled(train="Suction,NeedleIn,hook cut,Needle")) == (
        "HookCut",
        "Suturing",
        "Suction",
    )
    assert classes_of(labelled(train="P10,P2,cut,Cut,cut")) == ("cut", "P2", "P10")
    assert classes_of(labelled(train="10,2.0,1", val="2")) == ("1", "2", "10")
    assert classes_of(labelled(train="0,1,2")) == ("0", "1", "2")  # not SLAM's by number
    with pytest.raises(UserError, match=r"no training clip has the label 'Ct' \(val\): correct it"):
        classes_of(labelled(train="Cut,Sew", val="Ct", test="sew"))


def test_labels_that_count_from_one_get_a_hint(tmp_path: Path) -> None:
    for name in ("a.mp4", "b.mp4"):
        (tmp_path / name).touch()
    (tmp_path / "m.csv").write_text("path,label\na.mp4,1\nb.mp4,2\n")
    with pytest.raises(
        UserError, match=r"count from 0\. If its labels count from 1, leave --classes"
    ):
        read_manifest(tmp_path / "m.csv", classes=("cut", "sew"))


def test_where_the_splits_of_a_data_set_are(tmp_path: Path) -> None:
    for path in ("cut/a.mp4", "sew/b.mp4", "cut/notes.txt"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).touch()
    assert find_splits(tmp_path) == tmp_path
    (tmp_path / "bad_clips.csv").write_text("path,reason\ncut/a.mp4,no video\n")
    assert find_splits(tmp_path) == tmp_path  # no table of labelled clips
    (tmp_path / "clips.csv").write_text("path,label\ncut/a.mp4,cut\n")
    assert find_splits(tmp_path) == tmp_path / "clips.csv"
    for name in ("Training", "validation"):
        (tmp_path / name).mkdir()
    assert find_splits(tmp_path) == {
        "train": tmp_path / "Training",
        "val": tmp_path / "validation",
        "test": tmp_path / "test",
    }
    (tmp_path / "val.csv").touch()
    assert find_splits(tmp_path)["train"] == tmp_path / "train.csv"
    other = find_splits(tmp_path, {"train": "t.csv", "val": "v.csv", "test": "clips.csv"})
    assert other["test"] == tmp_path / "clips.csv"
