"""The files of a timeline: they are read as they were written, and problems are reported."""

import csv
import math
from pathlib import Path

import numpy as np
import pytest

from clips.manifest import UNREADABLE
from clips.segments import parse_seconds
from timeline.output import plot_timeline
from timeline.segments import (
    FramesWriter,
    Segment,
    Timeline,
    format_timestamp,
    read_timeline,
    write_subtitles,
    write_timeline,
)
from utils.errors import UserError
from utils.tables import read_table, write_csv

SEGMENTS = [
    Segment(0.0, 12.5, 'a "quoted", name', 0.75),
    Segment(12.5, 13.0, UNREADABLE),
    Segment(13.0, 3723.25, "=1+1 <b> & ü", 0.5),
]


def test_what_is_written_is_read(tmp_path: Path) -> None:
    write_timeline(tmp_path / "timeline.csv", SEGMENTS)
    (segments,) = read_timeline(tmp_path / "timeline.csv").values()
    assert [segment[:3] for segment in segments] == [segment[:3] for segment in SEGMENTS]
    assert [segments[0].confidence, segments[2].confidence] == [0.75, 0.5]
    assert math.isnan(segments[1].confidence)
    assert segments[2].duration == 3710.25


def test_people_write_timelines_too(tmp_path: Path) -> None:
    path = tmp_path / "mine.csv"
    path.write_text(
        "\ufeffvideo,label,start,end\nb,cut,0:10,1:02:03.5\na,sew,5,7.5\nb,sew,2,10\n", "utf-8"
    )
    assert {name: [s[:3] for s in segments] for name, segments in read_timeline(path).items()} == {
        "a": [(5.0, 7.5, "sew")],
        "b": [(2.0, 10.0, "sew"), (10.0, 3723.5, "cut")],
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("start,end\n1,2\n", "no column label"),
        ("start,end,label\n", "holds no segments"),
        ("start,end,label\n1,x,cut\n", "line 2: end is 'x', not a time (not a number)"),
        ("start,end,label\n1,nan,cut\n", "line 2: end is 'nan', not a time"),
        ("start,end,label\n-1,2,cut\n", "start is '-1', not a time"),
        ("start,end,label\n3,3,cut\n", "ends at 3 s, not after its start"),
        ("start,end,label\n3,4,\n", "has no label"),
        ("start,end,label\n0,5,a\n4,6,b\n", "line 3: starts before the segment before it ends"),
        ("start,end,label,video\n0,5,a,x\n4,6,b,x\n", "ends of video x"),
        ("start,end,label\n1\n", "line 2"),
    ],
)
def test_problems_are_reported(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "wrong.csv"
    path.write_text(text)
    with pytest.raises(UserError, match=str(path)) as error:
        read_timeline(path)
    assert message in str(error.value)


def test_no_file_and_no_text(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No such file"):
        read_timeline(tmp_path / "none.csv")
    (tmp_path / "binary.csv").write_bytes(bytes(range(256)))
    with pytest.raises(UserError, match=r"binary\.csv"):
        read_timeline(tmp_path / "binary.csv")


def test_rows_are_in_the_file_as_soon_as_they_are_written(tmp_path: Path) -> None:
    path = tmp_path / "frames.csv"
    writer = FramesWriter(path, ["a", "b, c"])
    writer.write([0.5, 0.75], np.array([[0.25, 0.75], [1.0, 0.0]]))
    rows = list(csv.reader(path.read_text().splitlines()))  # not closed yet
    assert rows == [["time", "a", "b, c"], ["0.500", "0.2500", "0.7500"],
                    ["0.750", "1.0000", "0.0000"]]  # fmt: skip
    writer.close()


def test_timestamps() -> None:
    assert [format_timestamp(x) for x in (0, 1.0006, 59.9996, 3723.25, 360000)] == [
        "00:00:00.000",
        "00:00:01.001",
        "00:01:00.000",
        "01:02:03.250",
        "100:00:00.000",
    ]


def test_subtitles(tmp_path: Path) -> None:
    hostile = Segment(3723.25, 3724.0, "x\n\n00:00:00.000 --> 00:00:09.000\nfake", 0.914)
    write_subtitles(tmp_path / "timeline.vtt", [*SEGMENTS, hostile])
    assert (tmp_path / "timeline.vtt").read_text("utf-8") == (
        "WEBVTT\n\n"
        '00:00:00.000 --> 00:00:12.500\na "quoted", name 75%\n\n'
        "00:00:12.500 --> 00:00:13.000\nunreadable\n\n"
        "00:00:13.000 --> 01:02:03.250\n=1+1 &lt;b&gt; &amp; ü 50%\n\n"
        "01:02:03.250 --> 01:02:04.000\nx 00:00:00.000 --&gt; 00:00:09.000 fake 91%\n"
    )


@pytest.mark.parametrize("count", [0, 1, 50])
def test_any_timeline_is_plotted(count: int, tmp_path: Path) -> None:
    classes = ("$a$", "b" * 40)
    times = np.linspace(0, 100, count)
    probabilities = np.random.default_rng(0).dirichlet(np.ones(2), count)
    segments = [Segment(0, 60, "$a$", 0.9), Segment(60, 100, UNREADABLE)]
    timeline = Timeline("x_$y.mp4", classes, 100.0, segments, times, probabilities)
    plot_timeline(timeline, tmp_path / "timeline.png")
    assert (tmp_path / "timeline.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("83.5", 83.5),
        ("83,5", 83.5),
        (" 83 ", 83.0),
        ("1e-05", 1e-5),
        ("0", 0.0),
        ("1:23.5", 83.5),
        ("01:23,5", 83.5),
        ("90:00", 5400.0),
        ("0:01:23.500", 83.5),
        ("01:02:03,250", 3723.25),
        ("1h02m03s", 3723.0),
        ("1 h 2 min 3,5 s", 3723.5),
        ("90s", 90.0),
        ("2 min", 120.0),
        ("1h", 3600.0),
    ],
)
def test_times_of_people(text: str, seconds: float) -> None:
    assert parse_seconds(text) == seconds


@pytest.mark.parametrize(
    "text",
    [
        *("", "x", "nan", "inf", "-inf", "1e308", "1e999", "9" * 400, "-1", "-0:05", "3600001"),
        *("1:75", "1:60:00", "1.5:30", "1:2:3:4", "00:01:02:12", "00:01:02;12", "1::2", ":30"),
        *("1h75m", "1h02", "1.5h", "s", "12:34:56 PM", "1,234", "1.234,5", "1_000", "٣", "1 2"),
    ],
)
def test_what_is_no_time(text: str, tmp_path: Path) -> None:
    write_csv(tmp_path / "t.csv", [("start", "end", "label"), (text, "5", "cut")])
    with pytest.raises(UserError, match=r"line 2: start is '") as error:
        read_timeline(tmp_path / "t.csv")
    assert len(str(error.value).splitlines()) == 2
    assert len(str(error.value)) < 400


def test_a_comma_is_decimal_where_semicolons_divide(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("sep=;\nStart; END ;Label;Confidence\n0;1,234;cut;0,75\n\n;;;\n", "utf-8")
    assert read_timeline(path) == {"": [(0.0, 1.234, "cut", 0.75)]}
    path.write_text("start,end,label\n0,12,5,cut\n", "utf-8")  # not: from 0 to 12, called 5
    with pytest.raises(UserError, match="line 2: has 4 cells, but the header has 3"):
        read_timeline(path)


def test_columns_with_one_name_are_refused(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("start,end,label,Label \n0,1,a,b\n", "utf-8")
    with pytest.raises(UserError, match="two columns are called 'label'"):
        read_timeline(tmp_path / "t.csv")


def test_line_numbers_after_a_line_break_in_a_cell(tmp_path: Path) -> None:
    text = 'start,end,label,note\n0,1,a,"x\ny"\n1,2,a,\n3,2,a,\n'
    (tmp_path / "t.csv").write_text(text, "utf-8")
    with pytest.raises(UserError, match="line 5: ends at 2 s"):
        read_timeline(tmp_path / "t.csv")


def test_many_problems_are_counted(tmp_path: Path) -> None:
    write_csv(tmp_path / "t.csv", [("start", "end", "label"), *([("x", 1, "a")] * 1000)])
    with pytest.raises(UserError, match="and 980 more"):
        read_timeline(tmp_path / "t.csv")


def test_hostile_classes_come_back(tmp_path: Path) -> None:
    names = ["=1+1", "-a", "+a", "@SUM(A1)", "'=a", "-2", "a\tb", "a;b", "қан"]
    write_timeline(tmp_path / "t.csv", [Segment(n, n + 1, name) for n, name in enumerate(names)])
    (segments,) = read_timeline(tmp_path / "t.csv").values()
    assert [segment.label for segment in segments] == names
    writer = FramesWriter(tmp_path / "frames.csv", names)
    writer.write([0.5], np.full((1, len(names)), 0.25))
    writer.close()
    header, values = read_table(tmp_path / "frames.csv", delimiter=",").rows
    assert header.cells == ["time", *names]
    assert values.cells == ["0.500", *["0.2500"] * len(names)]
