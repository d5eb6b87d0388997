"""The files of a timeline: they are read as they were written, and problems are reported."""

import csv
import math
from pathlib import Path

import numpy as np
import pytest

from timeline.output import plot_timeline
from timeline.segments import (
    UNREADABLE,
    FramesWriter,
    Segment,
    Timeline,
    format_timestamp,
    read_timeline,
    write_subtitles,
    write_timeline,
)
from utils.errors import UserError

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
