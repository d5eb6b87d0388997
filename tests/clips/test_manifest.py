"""The three layouts, the labels, and every problem that must be found before training."""

import csv
from pathlib import Path, PureWindowsPath

import pytest

from clips.manifest import (
    CLASSES,
    ClipRow,
    class_problems,
    get_num_classes,
    parse_label,
    path_candidates,
    read_manifest,
)
from clips.manifest_formats import read_records
from clips.splits import patient_overlap
from clips.splits import read_splits as read
from utils.errors import UserError
from utils.tables import write_csv


def write(root: Path, text: str, files: tuple[str, ...] = (), name: str = "m.csv") -> Path:
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).touch()
    (root / name).write_text(text, encoding="utf-8")
    return root / name


def test_classes_and_their_order() -> None:
    assert CLASSES == (
        "AbdominalEntry",
        "UseClipper",
        "HookCut",
        "Suturing",
        "PanoView",
        "LocPanoView",
        "Suction",
    )
    assert get_num_classes() == 7
    assert get_num_classes(("a", "b")) == 2


def test_our_layout(tmp_path) -> None:
    text = "video,label,path,patient,notes\nv1,HookCut,a b/c.mp4,p1,\n,2,d.mp4,,x\n"
    rows = read_manifest(write(tmp_path, text, ("a b/c.mp4", "d.mp4")))
    assert rows[0][:5] == (tmp_path / "a b/c.mp4", 2, "p1", "p1_v1", None)
    assert rows[1][:5] == (tmp_path / "d.mp4", 2, None, None, None)


@pytest.mark.parametrize("header", ["", ",clip_path,phase\n", "id,path,label\n"])
def test_slam_layout(tmp_path, header: str) -> None:
    name = "058/Clip_P058_V001_C3_NeedleIn_part6.mp4"
    rows = read_manifest(write(tmp_path, f"{header}0,{name},Needle\n", (f"clips/{name}",)))
    place, label = tmp_path / "clips" / name, CLASSES.index("Suturing")
    assert rows == [ClipRow(place, label, "058", "058_V001", "058_V001_C3")]


@pytest.mark.parametrize("separator", [" ", "\t", ",", ";"])
def test_headerless_layout(tmp_path, separator: str) -> None:
    files = ("my clips/a, b.mp4", "c.mp4")
    text = "".join(f"{file}{separator}{label}\n" for file, label in zip(files, (6, 0), strict=True))
    if separator == ",":
        text = text.replace("a, b", "a b")
        files = ("my clips/a b.mp4", "c.mp4")
    rows = read_manifest(write(tmp_path, text, files))
    assert [(row.path, row.label) for row in rows] == [
        (tmp_path / files[0], 6),
        (tmp_path / files[1], 0),
    ]


def test_windows_separators_byte_order_mark_and_semicolons(tmp_path) -> None:
    text = "\ufeffpath;label\r\nsub\\clip 1.mp4;Use Clip\r\n"
    rows = read_manifest(write(tmp_path, text, ("clips/sub/clip 1.mp4",)))
    assert rows[0][:2] == (tmp_path / "clips/sub/clip 1.mp4", 1)


def test_data_root_is_where_clips_are_looked_up(tmp_path) -> None:
    (tmp_path / "elsewhere").mkdir()
    manifest = write(tmp_path / "elsewhere", "path,label\nc.mp4,Suction\n")
    write(tmp_path, "", ("data/c.mp4",))
    assert read_manifest(manifest, tmp_path / "data")[0].path == tmp_path / "data/c.mp4"


def test_the_199_real_slam_paths(real: Path, tmp_path) -> None:
    with open(real / "slam/looped_clips.csv", encoding="utf-8-sig") as file:
        looped = list(csv.DictReader(file))
    lines = [",path,label"]
    for number, row in enumerate(looped):
        action = row["loop_path"].split("_")[4]
        lines.append(f"{number},{row['loop_path']},{action}")
        clip = tmp_path / "clips" / row["loop_path"]
        clip.parent.mkdir(parents=True, exist_ok=True)
        clip.touch()
    rows = read_manifest(write(tmp_path, "\n".join(lines)))
    assert len(rows) == 199
    assert len({row.patient for row in rows}) == 33
    assert len({row.video for row in rows}) == 82
    counts = {name: sum(CLASSES[row.label] == name for row in rows) for name in CLASSES}
    assert counts == {  # field.md, section 1: NeedleIn 22 + NeedleOut 11 are Suturing
        "AbdominalEntry": 10,
        "UseClipper": 51,
        "HookCut": 39,
        "Suturing": 33,
        "PanoView": 9,
        "LocPanoView": 18,
        "Suction": 39,
    }
    splits = {
        name: [row for row, one in zip(rows, looped, strict=True) if one["phase"] == name]
        for name in ("train", "val", "test")
    }
    warnings = " ".join(warning["text"] for warning in patient_overlap(splits))
    shared = {
        row.patient
        for name, others in splits.items()
        for row in others
        if any(row.patient == o.patient for n in splits if n != name for o in splits[n])
    }
    assert len(shared) == 21
    assert "patients of test are also in train (27 of 29 test clips)" in warnings
    assert "P058" not in warnings  # counts, not names


@pytest.mark.parametrize(
    ("label", "name"),
    [
        ("Suturing", "Suturing"),
        ("Needle", "Suturing"),
        ("NeedleOut", "Suturing"),
        ("UseClip", "UseClipper"),
        ("use clip", "UseClipper"),
        ("abdominal_entry", "AbdominalEntry"),
        ("Local Panoramic View", "LocPanoView"),
        (" 4 ", "PanoView"),
        ("7", None),
        ("-1", None),
        ("Knotting", None),
    ],
)
def test_labels(label: str, name: str | None) -> None:
    assert parse_label(label, CLASSES) == (None if name is None else CLASSES.index(name))


def test_other_classes_come_before_aliases_and_numbers() -> None:
    assert parse_label("Needle", ("Suturing", "Needle")) == 1
    assert parse_label("1", ("2", "1", "0")) == 1
    assert parse_label("fight", ("Fight", "noFight")) == 0


@pytest.mark.parametrize(
    ("text", "files", "message"),
    [
        ("path,label\na.mp4,HookCut\n", (), "do not exist"),
        ("path,label\na.mp4,HokCut\n", ("a.mp4",), "'HokCut' (1 row, did you mean 'HookCut'?)"),
        ("path,label\na.mp4,0\na.mp4,0\n", ("a.mp4",), "in more than one row"),
        ("path,label\n", (), "lists no clip"),
        ("", (), "lists no clip"),
        ("path,label\na.mp4\n", ("a.mp4",), "line 2: neither"),
        ("0,a.mp4,HookCut\n1,b\n", ("a.mp4",), "line 2: neither"),
        ("path,label\n../../../../etc\0,0\n", (), "line 2: a NUL character"),
    ],
)
def test_problems_of_one_manifest(tmp_path, text: str, files, message: str) -> None:
    with pytest.raises(UserError) as error:
        read_manifest(write(tmp_path, text, files))
    assert message in str(error.value)
    assert "m.csv" in str(error.value)


def test_missing_manifest_and_wrong_encoding(tmp_path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.csv: no such manifest"):
        read_manifest(tmp_path / "nowhere.csv")
    (tmp_path / "latin.csv").write_bytes(b"path,label\nM\xfcller.mp4,0\n")
    with pytest.raises(UserError, match="not UTF-8"):
        read_manifest(tmp_path / "latin.csv")


def test_all_problems_of_all_splits_in_one_message(tmp_path) -> None:
    files = ("a.mp4", "b.mp4", "c.mp4")
    write(tmp_path, "path,label\na.mp4,HookCut\nb.mp4,Suctoin\n", files, "train.csv")
    write(tmp_path, "path,label\na.mp4,HookCut\ngone.mp4,Suction\n", (), "val.csv")
    write(tmp_path, "path,label\n", (), "test.csv")
    manifests = {name: tmp_path / f"{name}.csv" for name in ("train", "val", "test")}
    with pytest.raises(UserError) as error:
        read(manifests, tmp_path)
    message = str(error.value)
    for part in ("did you mean 'Suction'", "gone.mp4", "lists no clip", "a.mp4 (train, val)"):
        assert part in message
    assert "no training clip" not in message  # rows are missing: nobody can tell


def test_another_spelling_of_a_path_is_the_same_file(tmp_path) -> None:
    write(tmp_path, "path,label\na.mp4,x\nb.mp4,y\n", ("a.mp4", "b.mp4"), "train.csv")
    write(tmp_path, f"path,label\n{tmp_path}/a.mp4,x\n", (), "test.csv")
    manifests = {name: tmp_path / f"{name}.csv" for name in ("train", "test")}
    with pytest.raises(UserError, match="the same file in two splits"):
        read(manifests, tmp_path, ("x", "y"))


def test_class_without_training_clip(tmp_path) -> None:
    write(tmp_path, "path,label\na.mp4,x\n", ("a.mp4", "b.mp4"), "train.csv")
    write(tmp_path, "path,label\nb.mp4,y\n", (), "val.csv")
    with pytest.raises(UserError, match=r"no training clip .*: 1: y"):
        read({name: tmp_path / f"{name}.csv" for name in ("train", "val")}, tmp_path, ("x", "y"))


def test_shared_patients_are_a_warning_with_counts(tmp_path) -> None:
    header = "path,label,patient\n"
    files = tuple(f"{n}.mp4" for n in range(5))
    write(tmp_path, header + "0.mp4,x,Ada\n1.mp4,y,Ben\n", files, "train.csv")
    write(tmp_path, header + "2.mp4,x,Ben\n3.mp4,x,Cy\n4.mp4,x,Ben\n", (), "test.csv")
    manifests = {name: tmp_path / f"{name}.csv" for name in ("train", "test")}
    warnings = patient_overlap(read(manifests, tmp_path, ("x", "y")))
    assert [warning["kind"] for warning in warnings] == ["leakage"]
    text = warnings[0]["text"]
    assert "1 of 2 patients of test are also in train (2 of 3 test clips)" in text
    assert "Ben" not in text


def test_unknown_patients_are_a_warning(tmp_path) -> None:
    """Nothing was compared, or not everything: this is not the same as nothing found."""
    known = [ClipRow(Path("a"), 0, "Ada"), ClipRow(Path("b"), 0, "Ben")]
    unknown = [ClipRow(Path("c"), 0), ClipRow(Path("d"), 0, "Ben")]
    assert patient_overlap({"train": known, "test": known[:0]}) == []
    assert patient_overlap({"train": unknown}) == []  # there is nothing to compare it with
    leakage, other = patient_overlap({"train": known, "val": [], "test": unknown})
    assert leakage["text"].startswith("1 of 1 patients of test are also in train")
    assert other == {
        "kind": "other",
        "text": "the patients of 1 of 2 clips of test are unknown and were not compared: the "
        "splits may share patients (add a column `patient`, or give --patient-pattern)",
    }
    (nothing,) = patient_overlap({"train": unknown[:1], "test": unknown[:1]})
    assert "patients of 1 of 1 clips of train, 1 of 1 clips of test are unknown" in nothing["text"]


def test_one_split_is_compared_with_the_others() -> None:
    rows = [ClipRow(Path("a"), 0, "Ada")]
    texts = [w["text"] for w in patient_overlap({"x": rows, "y": rows, "z": rows}, compared="z")]
    assert [text.split(" patients")[1].split(" (")[0] for text in texts] == [
        " of z are also in x",
        " of z are also in y",
    ]


def test_long_lists_are_cut_short(tmp_path) -> None:
    text = "path,label\n" + "".join(f"{n}.mp4,0\n" for n in range(1205))
    with pytest.raises(UserError, match="and 1,200 more"):
        read_manifest(write(tmp_path, text))


def test_quoted_line_breaks_and_their_line_numbers(tmp_path) -> None:
    text = 'path,notes,label\na.mp4,"two\nlines, here",cut\n\nb.mp4,,\nc.mp4,sew\n'
    records, problems = read_records(write(tmp_path, text))
    assert [(r.line, r.path, r.label) for r in records] == [(2, "a.mp4", "cut"), (5, "b.mp4", None)]
    assert problems == [f"{tmp_path / 'm.csv'}, line 6: neither 'path,label' nor SLAM's columns"]


def test_headers_of_spreadsheets(tmp_path) -> None:
    text = "\ufeffsep=;\r\n Path ; LABEL ;Patient;\r\nK 1.mp4;UseClip;P1;\r\n;;;\r\n"
    (row,) = read_manifest(write(tmp_path, text, ("K 1.mp4",)))
    assert row[:5] == (tmp_path / "K 1.mp4", 1, "P1", None, None)


@pytest.mark.parametrize(
    "text", ["path,label,Label\na.mp4,0,1\n", ",path,Path\n0,a.mp4,0\n", "path,label\na.mp4,0,1\n"]
)
def test_columns_that_are_not_unique(tmp_path, text: str) -> None:
    with pytest.raises(UserError, match=r"two columns are called|has 3 cells, but"):
        read_manifest(write(tmp_path, text, ("a.mp4",)))


def test_headerless_labels_with_spaces_and_quotes(tmp_path) -> None:
    files = ("a, b.mp4", "c.mp4")
    text = '"a, b.mp4","Local Panoramic View"\nc.mp4,Use Clip\n'
    assert [row.label for row in read_manifest(write(tmp_path, text, files))] == [5, 1]
    text = '"a, b.mp4" 3\nc.mp4 0\n'
    assert [row.label for row in read_manifest(write(tmp_path, text, files))] == [3, 0]


def test_a_long_line_is_read_in_no_time(tmp_path) -> None:
    with pytest.raises(UserError, match="line 1: neither"):
        read_manifest(write(tmp_path, "a" + " " * 100_000 + ";\n"))


@pytest.mark.parametrize(
    ("label", "classes", "number"),
    [
        ("1", ("1", "2"), 0),
        ("0", ("1", "2"), None),  # not an index where the classes are numbers
        ("1", ("2", "cut"), None),
        ("2.0", ("1", "2"), 1),
        ("1", ("01", "02"), 0),  # spreadsheets drop the zero
        ("1.5", ("1", "2"), None),
        ("-1", ("-1", "1"), 0),
        ("1.0", ("cut", "sew"), 1),
        ("2.0", ("cut", "sew"), None),
        ("0.5", ("cut", "sew"), None),
        ("²", ("cut", "sew"), None),
        ("9" * 5000, ("cut", "sew"), None),
        ("Ku\u0308he", ("K\u00fche", "Hund"), 0),  # as macOS writes the names of folders
    ],
)
def test_a_name_comes_before_an_index(label: str, classes, number: int | None) -> None:
    assert parse_label(label, classes) == number


def test_labels_that_look_like_indices_of_numbers(tmp_path) -> None:
    files = ("a.mp4", "b.mp4", "c.mp4")
    text = "path,label\na.mp4,0\nb.mp4,1\nc.mp4,2\n"
    with pytest.raises(UserError, match=r"unknown labels \(the classes are 1, 2.*'0' \(1 row\)"):
        read_manifest(write(tmp_path, text, files), classes=("1", "2"))


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (("cut", "uncertain"), "no class may be called 'uncertain'"),
        (("cut", "unreadable"), "no class may be called 'unreadable'"),
        (("cut", "out_of_body"), "no class may be called 'out_of_body'"),
        (("time", "cut"), "no class may be called 'time'"),
        (("path", "cut"), "no class may be called 'path'"),
        (("cut", ""), "'' is an empty name"),
        (("cut", " "), "' ' is an empty name"),
        (("cut", "sew "), "'sew ' begins or ends with a space"),
        (("cut", "s\new"), "control character"),
        (("cut", "s\x1bew"), "control character"),
        (("cut", "s\udcffw"), "control character"),
        (("cut", "cut"), "a name occurs twice: 'cut'"),
        (("Use Clip", "use_clip"), "'Use Clip' and 'use_clip' differ only"),
        (("1", "1.0"), "'1' and '1.0' differ only"),
    ],
)
def test_names_that_no_class_can_have(classes, message: str) -> None:
    (problem,) = class_problems(classes)
    assert message in problem


def test_names_that_classes_can_have() -> None:
    assert class_problems(CLASSES) == []
    assert class_problems(("1", "2", "-1", "қан тігу", "=1+1", "Time out", "می\u200cروم")) == []


def test_paths_of_windows() -> None:
    def found(name: str) -> list[str]:
        return list(map(str, path_candidates(name, PureWindowsPath(r"D:\data"))))

    assert found("C:/clips/a.mp4") == [r"C:\clips\a.mp4"]
    assert found(r"C:\clips\a.mp4") == [r"C:\clips\a.mp4"]
    assert found(r"\\server\share\a.mp4") == [r"\\server\share\a.mp4"]
    assert found("P1/a.mp4") == [r"D:\data\P1\a.mp4", r"D:\data\clips\P1\a.mp4"]


def test_file_names_that_begin_with_a_space_or_a_sign(tmp_path) -> None:
    files = (" a.mp4", "=b.mp4", "-c.mp4")
    write(tmp_path, "", files)
    write_csv(tmp_path / "m.csv", [["path", "label"], *([name, "0"] for name in files)])
    assert [row.path.name for row in read_manifest(tmp_path / "m.csv")] == list(files)


def test_messages_stay_on_their_line(tmp_path) -> None:
    text = f'path,label\n"a\n\x1b[1m.mp4",0\n{"b" * 9000},0\nc.mp4,{"x" * 9000}\n'
    with pytest.raises(UserError) as error:
        read_manifest(write(tmp_path, text, ("c.mp4",)))
    lines = str(error.value).splitlines()
    assert len(lines) == 3
    assert max(map(len, lines)) < 1000
    assert "\x1b" not in lines[1]
