"""CSV tables: what people and spreadsheets save is read, and what is written is read unchanged."""

import csv
import itertools
import random
from pathlib import Path

import pandas as pd
import pytest

from utils.errors import UserError
from utils.tables import parse_number, read_table, write_csv, write_table

PLAIN = [(1, ["path", "label"]), (2, ["a.mp4", "cut"]), (3, ["b.mp4", "sew"])]


def table(folder: Path, content: str | bytes, **options: str):
    path = folder / "t.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_table(path, **options)


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ("path,label\na.mp4,cut\nb.mp4,sew\n", PLAIN),
        ("path;label\r\na.mp4;cut\r\nb.mp4;sew", PLAIN),
        ("path\tlabel\ra.mp4\tcut\rb.mp4\tsew\r", PLAIN),  # lines end so in old tables of macOS
        ("\ufeffpath,label\na.mp4,cut\nb.mp4,sew\n\n", PLAIN),
        ('"path","label"\n"a.mp4","cut"\n"b.mp4","sew"\n', PLAIN),
        ("sep=;\npath;label\na.mp4;cut\n", [(2, ["path", "label"]), (3, ["a.mp4", "cut"])]),
        ('"sep=|"\r\na,b|c\r\n', [(2, ["a,b", "c"])]),
        ("sep=\t\na\tb\n", [(2, ["a", "b"])]),
        ("\n;;\npath;label\n ; \na.mp4;cut\n", [(3, ["path", "label"]), (5, ["a.mp4", "cut"])]),
        ('"a, b, c";d\n', [(1, ["a, b, c", "d"])]),  # the commas are inside of a cell
        ('"a "",,,"" b";d\n', [(1, ['a ",,," b', "d"])]),
        ('5" scope,path\n1,a"b.mp4\n', [(1, ['5" scope', "path"]), (2, ["1", 'a"b.mp4'])]),
        ('n,"a\nb"\n1,"x ""y""\r\nz"\n2,\n', [(1, ["n", "a\nb"]), (3, ["1", 'x "y"\r\nz']),
                                               (5, ["2", ""])]),
        ("n,m\n'=1+1,''=x\n'x,'-a\n", [(1, ["n", "m"]), (2, ["=1+1", "'=x"]), (3, ["'x", "-a"])]),
        ('"my clip.mp4" 3\n\nb.mp4 4\n', [(1, ['"my clip.mp4" 3']), (3, ["b.mp4 4"])]),
        ("", []),
        ("\ufeff\n,,\n", []),
    ],
)  # fmt: skip
def test_tables_of_people(text: str, rows: list, tmp_path: Path) -> None:
    assert [tuple(row) for row in table(tmp_path, text).rows] == rows


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("path,label\n".encode("utf-16"), "UTF-16"),
        ("path,label\n".encode("utf-16-be"), "line 1: a NUL"),  # without a byte order mark
        (b"path,label\nM\xfcller.mp4,cut\n", "line 2: not UTF-8"),
        (b"path,label\n\na\0.mp4,cut\n", "line 3: a NUL"),
        (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + bytes(range(256)) * 999, "line 3: a NUL"),
        (b"path,label\na,cut\n" + b"b" * 131_073 + b",cut\n", "line 3: .* more than 131,072"),
        (b'path,label\na,cut\n"b,cut\nc,cut\nd,cut\n', "line 3: a quotation mark"),
        (b'path,label\n"a"b,cut\n', "line 2: a quotation mark"),
    ],
)
def test_what_is_no_table_is_one_line(content: bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"t\.csv.*{message}") as error:
        table(tmp_path, content)
    assert len(str(error.value).splitlines()) == 1


def test_cells_by_column(tmp_path: Path) -> None:
    read = table(tmp_path, " Path ,LABEL,\na.mp4,cut\nb.mp4,sew,,,\n")
    assert read.records() == [
        (2, {"path": "a.mp4", "label": "cut"}),
        (3, {"path": "b.mp4", "label": "sew", "": ""}),
    ]
    assert read.header(str) == [" Path ", "LABEL", ""]
    with pytest.raises(UserError, match=r"line 2: two columns are called 'patient id'"):
        table(tmp_path, "\nPatient ID,label,patient  id\n1,2,3\n").header()
    with pytest.raises(UserError, match="line 3: has 3 cells, but the header has 2"):
        table(tmp_path, "path,label\na,b\n0,12,5\n").records()  # 12,5 is one number


@pytest.mark.parametrize(
    ("text", "delimiter", "number"),
    [
        ("12.5", ",", 12.5),
        (" 12,5 ", ",", 12.5),
        ("1,234", ";", 1.234),
        ("1,234", "\t", 1.234),
        ("1,234", ",", None),
        ("-1e-5", ",", -1e-5),
        ("5.", ",", 5),
        (",5", ";", 0.5),
        ("1,234.5", ";", None),
        ("1.234,5", ";", None),
        ("1_000", ",", None),
        ("nan", ",", None),
        ("inf", ",", None),
        ("٣", ",", None),
        ("", ",", None),
    ],
)
def test_numbers(text: str, delimiter: str, number: float | None) -> None:
    if number is None:
        with pytest.raises(ValueError, match=r"not a number|ambiguous"):
            parse_number(text, delimiter)
    else:
        assert parse_number(text, delimiter) == number


def test_formulas_are_harmless_and_come_back(tmp_path: Path) -> None:
    cells = ["=1+1", "+a", "-a", "@a", "\ta", "\r1", "\na", "'=a", "'a", "", "a=", -1.5, "-2", None]
    write_csv(tmp_path / "t.csv", [["n", "m"], *([i, cell] for i, cell in enumerate(cells))])
    with open(tmp_path / "t.csv", newline="", encoding="utf-8") as file:
        written = [row[1] for row in csv.reader(file)][1:]
    assert written == ["'=1+1", "'+a", "'-a", "'@a", "'\ta", "'\r1", "'\na", "''=a", "'a", "", "a=",
                       "-1.5", "-2", ""]  # fmt: skip
    read = [cells[1] for _, cells in read_table(tmp_path / "t.csv").rows[1:]]
    assert read == [str("" if cell is None else cell) for cell in cells]


def test_random_tables_come_back(tmp_path: Path) -> None:
    draw = random.Random(0)
    rows = [["n", "x", "y"]]
    for number in range(500):
        texts = ["".join(draw.choices("'\"=+-@,;\t\r\n aé1.", k=draw.randrange(6))) for _ in "xy"]
        rows.append([str(number), *texts])
    write_csv(tmp_path / "t.csv", rows)
    assert [row.cells for row in read_table(tmp_path / "t.csv").rows] == rows
    # The slow references: apart from the apostrophes, other readers see the same cells.
    with open(tmp_path / "t.csv", newline="", encoding="utf-8") as file:
        by_csv = list(csv.reader(file))
    by_pandas = pd.read_csv(tmp_path / "t.csv", dtype=str, keep_default_na=False)
    assert [list(by_pandas.columns), *by_pandas.to_numpy().tolist()] == by_csv
    for ours, theirs in zip(itertools.chain(*rows), itertools.chain(*by_csv), strict=True):
        assert theirs in (ours, f"'{ours}")
        assert not theirs.startswith(tuple("=@\t\r\n"))
        if theirs.startswith(("+", "-")):
            float(theirs.replace(",", "."))  # a number, and no formula


def test_a_data_frame_is_written_as_by_pandas(tmp_path: Path) -> None:
    frame = pd.DataFrame(
        {"x": [0.1, float("nan"), -2.0], "n": [1, -2, 3], "t": ["a", None, 'b"'], "b": [True] * 3},
        index=pd.Index(["p", "q", "r"], name="i"),
    )
    frame["k"] = pd.array([1, None, 3], "Int64")
    write_table(tmp_path / "t.csv", frame, index=True, float_format=".6g")
    expected = frame.to_csv(float_format="%.6g", lineterminator="\n")
    assert (tmp_path / "t.csv").read_bytes().decode() == expected
    write_table(tmp_path / "t.csv", frame.iloc[:0])
    assert (tmp_path / "t.csv").read_text("utf-8") == "x,n,t,b,k\n"


def test_a_hostile_data_frame(tmp_path: Path) -> None:
    frame = pd.DataFrame({"=c": ["=x", -1]}, index=pd.Index(["@i", "j"], name="+n"))
    write_table(tmp_path / "t.csv", frame, index=True)
    assert (tmp_path / "t.csv").read_text("utf-8") == "'+n,'=c\n'@i,'=x\nj,-1\n"


def test_names_of_files_that_are_not_utf8(tmp_path: Path) -> None:
    write_csv(tmp_path / "t.csv", [["path", "label"], [Path("b\udcff.mp4"), "cut"]])
    assert (tmp_path / "t.csv").read_text("utf-8") == "path,label\nb\\udcff.mp4,cut\n"
