"""Annotations of whole videos: the formats that tools really write, and hostile files.

The layouts are those of the sources that clips/annotation_formats.py and clips/elan.py name. The
header of BORIS 7 is one that its users published (README of the R package ecber).
"""

import json
import os
import resource
from pathlib import Path

import pytest
from helpers import touch

from clips.annotations import (
    annotate_videos,
    is_same_video,
    match_videos,
    read_annotations,
    read_folder,
    video_name,
)
from clips.segments import UnknownFormatError
from evaluate import main as evaluate_main
from timeline.segments import Segment, write_timeline
from utils.errors import UserError


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8", newline="")
    return path


def rows(path: Path, *tiers: str, video: str = "") -> list[tuple[float, float, str]]:
    return [tuple(segment[:3]) for segment in read_annotations(path, tiers).videos[video]]


def test_cholec80(tmp_path: Path) -> None:
    """A row per frame from 0 on, at 25 frames per second."""
    phases = ["Preparation"] * 50 + ["CalotTriangleDissection"] * 25 + ["Preparation"] * 5
    lines = ["Frame\tPhase", *(f"{n}\t{phase}" for n, phase in enumerate(phases))]
    path = write(tmp_path / "video01-phase.txt", "\n".join(lines) + "\n")
    expected = [
        (0.0, 2.0, "Preparation"),
        (2.0, 3.0, "CalotTriangleDissection"),
        (3.0, 3.2, "Preparation"),
    ]
    assert rows(path) == expected
    assert "25 per second (--annotation-fps)" in read_annotations(path).notes[0]
    assert read_annotations(path, fps=1).videos[""][0][:2] == (0.0, 50.0)


def test_frames_that_are_not_listed_have_no_label(tmp_path: Path) -> None:
    """A row per second, as some copies have; from frame 75 on a second is missing."""
    text = "Frame\tPhase\n0\tA\n25\tA\n50\tB\n100\tB\n125\tB\n"
    path = write(tmp_path / "v-phase.txt", text)
    assert rows(path) == [(0.0, 2.0, "A"), (2.0, 3.0, "B"), (4.0, 6.0, "B")]


def cholect50(instances: dict[str, list[tuple[int, int, int]]], fps: float = 1) -> str:
    """The JSON for (triplet, instrument, phase) per frame."""
    names = {
        "triplet": {"17": "grasper,retract,gallbladder", "60": "hook,dissect,gallbladder"},
        "instrument": {"0": "grasper", "2": "hook"},
        "verb": {},
        "target": {},
        "phase": {"0": "preparation", "1": "carlot-triangle-dissection"},
    }
    frames = {
        frame: [[t, i, 1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, p] for t, i, p in of_frame]
        for frame, of_frame in instances.items()
    }
    return json.dumps(
        {"video": 1, "fps": fps, "num_frames": 4, "categories": names, "annotations": frames}
    )


def test_cholect50(tmp_path: Path) -> None:
    both = [(17, 0, 1), (60, 2, 1)]
    frames = {"0": [(-1, -1, 0)], "1": [(17, 0, 0)], "2": both, "3": [(60, 2, 1)], "4": []}
    path = write(tmp_path / "VID01.json", cholect50(frames))
    phases = [(0.0, 2.0, "preparation"), (2.0, 4.0, "carlot-triangle-dissection")]
    assert rows(path) == rows(path, "phase") == phases
    assert rows(path, "hook") == [(2.0, 4.0, "hook")]
    with pytest.raises(UserError, match=r"'grasper' and 'hook' overlap: choose with --tier: ") as e:
        read_annotations(path, ["instrument"])
    assert "grasper hook" in str(e.value) and "\n" not in str(e.value)
    with pytest.raises(UserError, match=r"no tier tool .--tier.: it has phase"):
        read_annotations(path, ["tool"])


EAF = """<?xml version="1.0" encoding="UTF-8"?>
<ANNOTATION_DOCUMENT AUTHOR="" DATE="2024-01-01T10:00:00+01:00" FORMAT="3.0" VERSION="3.0"
 xmlns:xsi="http://www.w3.org/2001/XMLSchema-instance"
 xsi:noNamespaceSchemaLocation="http://www.mpi.nl/tools/elan/EAFv3.0.xsd">
<HEADER MEDIA_FILE="" TIME_UNITS="milliseconds">
<MEDIA_DESCRIPTOR MEDIA_URL="file:///op1.mp4" MIME_TYPE="video/mp4"{origin}/></HEADER>
<TIME_ORDER>
<TIME_SLOT TIME_SLOT_ID="ts1" TIME_VALUE="440"/><TIME_SLOT TIME_SLOT_ID="ts2" TIME_VALUE="2960"/>
<TIME_SLOT TIME_SLOT_ID="ts3" TIME_VALUE="3620"/><TIME_SLOT TIME_SLOT_ID="ts4"/>
</TIME_ORDER>
<TIER LINGUISTIC_TYPE_REF="default-lt" TIER_ID="phase">
<ANNOTATION><ALIGNABLE_ANNOTATION ANNOTATION_ID="a1" TIME_SLOT_REF1="ts1" TIME_SLOT_REF2="ts2">
<ANNOTATION_VALUE>cut &amp; sew</ANNOTATION_VALUE></ALIGNABLE_ANNOTATION></ANNOTATION>
<ANNOTATION><ALIGNABLE_ANNOTATION ANNOTATION_ID="a2" TIME_SLOT_REF1="ts2" TIME_SLOT_REF2="ts3">
<ANNOTATION_VALUE>клип</ANNOTATION_VALUE></ALIGNABLE_ANNOTATION></ANNOTATION>
</TIER>
<TIER LINGUISTIC_TYPE_REF="note" PARENT_REF="phase" TIER_ID="surgeon's note">
<ANNOTATION><REF_ANNOTATION ANNOTATION_ID="a3" ANNOTATION_REF="a1">
<ANNOTATION_VALUE>slow</ANNOTATION_VALUE></REF_ANNOTATION></ANNOTATION>
<ANNOTATION><ALIGNABLE_ANNOTATION ANNOTATION_ID="a4" TIME_SLOT_REF1="ts3" TIME_SLOT_REF2="ts4">
<ANNOTATION_VALUE>?</ANNOTATION_VALUE></ALIGNABLE_ANNOTATION></ANNOTATION>
</TIER>
</ANNOTATION_DOCUMENT>
"""


def test_eaf(tmp_path: Path) -> None:
    path = write(tmp_path / "op1.eaf", EAF.format(origin=""))
    assert rows(path, "phase") == [(0.44, 2.96, "cut & sew"), (2.96, 3.62, "клип")]
    assert rows(path, "surgeon's note") == [(0.44, 2.96, "slow")]  # the time of its parent
    assert read_annotations(path, ["phase"]).notes == ["1 annotations without times are left out"]
    with pytest.raises(UserError, match="has several tiers: choose with --tier: phase 'surgeon's"):
        read_annotations(path)
    moved = write(tmp_path / "op2.eaf", EAF.format(origin=' TIME_ORIGIN="1500"'))
    assert rows(moved, "phase")[0][:2] == (1.94, 4.46)


ELAN_ROWS = (
    "phase\t\t00:00:00.440\t0.44\t00:00:02.960\t2.96\t00:00:02.520\t2.52\tcut\n"
    "phase\t\t00:00:02.960\t2.96\t00:00:03.620\t3.62\t00:00:00.660\t0.66\t2.0\n"
)


@pytest.mark.parametrize(
    "text",
    [
        ELAN_ROWS,
        '"#file:///C:/op1.mp4 -- offset: 0"\n' + ELAN_ROWS,
        "phase\t0.44\t2.96\t2.52\tcut\nphase\t2.96\t3.62\t0.66\t2.0\n",  # without participants
        "00:00:00.440\t00:00:02.960\tcut\n00:00:02.960\t00:00:03.620\t2.0\n",  # without names
        "Begin Time - hh:mm:ss.ms\tEnd Time - hh:mm:ss.ms\tDuration - hh:mm:ss.ms\tphase\n"
        "00:00:00.440\t00:00:02.960\t00:00:02.520\tcut\n"
        "00:00:02.960\t00:00:03.620\t00:00:00.660\t2.0\n",
        "Begin Time - msec\tEnd Time - msec\tphase\tFile Name\tFile Path\n"
        "440\t2960\tcut\t\t\n2960\t3620\t2.0\t\t\n",
        '"Begin Time - ss.msec","End Time - ss.msec","phase"\n0.44,2.96,"cut"\n2.96,3.62,"2.0"\n',
    ],
)
def test_text_of_elan(text: str, tmp_path: Path) -> None:
    path = write(tmp_path / "op1.txt", text)
    assert rows(path) == [(0.44, 2.96, "cut"), (2.96, 3.62, "2.0")]


def test_columns_of_elan_are_tiers(tmp_path: Path) -> None:
    header = "Begin Time - ss.msec\tEnd Time - ss.msec\tPhase\tTool\n"
    path = write(tmp_path / "op1.txt", header + "0.0\t2.0\tcut\thook\n2.0\t3.0\tsew\t\n")
    assert rows(path, "Phase") == [(0, 2, "cut"), (2, 3, "sew")]
    assert rows(path, "Tool") == [(0, 2, "hook")]
    with pytest.raises(UserError, match="choose with --tier: Phase Tool"):
        read_annotations(path)


def test_milliseconds_without_a_header_are_not_guessed(tmp_path: Path) -> None:
    with pytest.raises(UnknownFormatError, match="understood are"):
        read_annotations(write(tmp_path / "op1.txt", "phase\t\t0\t2000\tcut\n"))


BORIS_7 = (
    "Observation id,Observation date,Description,Media file,Total length,FPS,Subject,Behavior,"
    "Behavioral category,Modifiers,Behavior type,Start (s),Stop (s),Duration (s),Comment start,"
    "Comment stop\n"
)


def test_aggregated_events_of_boris(tmp_path: Path) -> None:
    row = "o1,2021-12-06 13:26:24,,T:/Video Coding/6008.mp4,1381.010,29.97,No focal subject,"
    text = BORIS_7 + "".join(
        f"{row}{behavior},Steps,,{kind},{times},,\n"
        for behavior, kind, times in (
            ("cut", "STATE", "689.000,989.023,300.023"),
            ("sew", "STATE", "989.023,990.000,0.977"),
            ("bleeding", "POINT", "700.000,700.000,NA"),
        )
    )
    found = read_annotations(write(tmp_path / "6008BECNR.csv", text))
    assert {name: [s[:3] for s in segments] for name, segments in found.videos.items()} == {
        "T:/Video Coding/6008.mp4": [(689.0, 989.023, "cut"), (989.023, 990.0, "sew")]
    }
    assert found.notes == ["1 points in time, which have no duration, are left out"]
    overlapping = text + f"{row}hold,Hands,,STATE,700.000,800.000,100,,\n"
    path = write(tmp_path / "overlapping.csv", overlapping)
    with pytest.raises(
        UserError, match=r"'cut' and 'hold' overlap .*choose with --tier: Steps cut"
    ):
        read_annotations(path)
    assert rows(path, "Hands", video="T:/Video Coding/6008.mp4") == [(700, 800, "hold")]


BORIS_8 = (
    "Observation id\tObservation date\tDescription\tObservation duration\tObservation type\t"
    "Source\tTime offset (s)\tMedia duration (s)\tFPS\tSubject\tBehavior\tBehavioral category\t"
    "Behavior type\tTime\tMedia file name\tImage index\tImage file path\tComment\n"
)


def boris_8(*events: str, source: str = "player #1:/d/op1.mp4", offset: str = "0") -> str:
    start = f"o1\t2024-01-01\t\t10\tMedia file(s)\t{source}\t{offset}\t60.000\t25.000\tsurgeon"
    lines = (
        f"{start}\t{b}\t\t{kind}\t{t}\t/d/op1.mp4\t\tNA\t" for b, kind, t in map(str.split, events)
    )
    return BORIS_8 + "".join(f"{line}\n" for line in lines)


def test_tabular_events_of_boris(tmp_path: Path) -> None:
    events = ("cut START 1.000", "look POINT 2.000", "sew START 3.5", "cut STOP 3.5", "sew STOP 9")
    path = write(tmp_path / "o1.tsv", boris_8(*events))
    assert rows(path, video="/d/op1.mp4") == [(1, 3.5, "cut"), (3.5, 9, "sew")]
    old = "Observation id\to1\n\nMedia file(s)\n\nPlayer #1\top1.mp4\n\n"
    old += "Time\tMedia file path\tTotal length\tFPS\tSubject\tBehavior\tBehavioral category\t"
    old += "Comment\tStatus\n"
    old += "".join(
        f"{t}\top1.mp4\t60\t25\t\tcut\t\t\t{s}\n" for t, s in ((1, "START"), (2, "STOP"))
    )
    assert rows(write(tmp_path / "old.tsv", old), video="op1.mp4") == [(1, 2, "cut")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (boris_8("cut START 1"), "line 2: 'cut' never stops"),
        (boris_8("cut STOP 1"), "line 2: 'cut' stops, but has not started"),
        (boris_8("cut START 1", "cut START 2"), "line 3: 'cut' starts again"),
        (boris_8("cut START 1", "cut STOP 2", offset="5.0"), "a time offset of 5.0 s"),
        (boris_8("cut START 1", source="player #1:a.mp4;b.mp4"), "2 media files"),
        (BORIS_7 + "o,,,a.mp4,1,25,,cut,,,STATE,2.0,NA,NA,,\n", "line 2: stop is 'NA', not a time"),
    ],
)
def test_what_boris_leaves_open_is_not_guessed(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a timeline") as error:
        read_annotations(write(tmp_path / "o1.tsv", text))
    assert message in str(error.value)


def test_audacity(tmp_path: Path) -> None:
    text = (
        "2.150000\t2.150000\tpoint label\n"
        '3.400000\t6.100000\tcut, then "sew"\n'
        "\\\t-1.000000\t6334.588867\n"
        "6.100000\t7.000000\t=1+1\n"
    )
    path = write(tmp_path / "op1.txt", "\ufeff" + text)
    assert rows(path) == [(3.4, 6.1, 'cut, then "sew"'), (6.1, 7.0, "=1+1")]
    assert read_annotations(path).notes == [
        "1 points in time, which have no duration, are left out"
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("1e308\t2e308\tcut", "start is '1e308', not a time from 0"),
        ("nan\tnan \tcut", "start is 'nan', not a time"),
        ("0\tinf\tcut", "end is 'inf', not a time"),
        ("-5.0\t3.0\tcut", "start is '-5.0', not a time from 0"),
        ("5.0\t3.0\tcut", "ends at 3 s, not after its start, 5 s"),
        ("5.0\t6.0\t", "has no label"),
        ("5.0\t6.0\tcut\n5.5\t7.0\tsew", "line 2: starts before the segment before it ends"),
    ],
)
def test_impossible_times(line: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        read_annotations(write(tmp_path / "op1.txt", f"{line}\n"))
    assert message in str(error.value) and len(str(error.value)) < 300


LAUGHS = (
    '<?xml version="1.0"?><!DOCTYPE x [<!ENTITY a "lol">'
    + "".join(
        f'<!ENTITY {b} "{f"&{a};" * 10}">' for a, b in zip("abcdefgh", "bcdefghi", strict=True)
    )
    + "]><ANNOTATION_DOCUMENT>&i;</ANNOTATION_DOCUMENT>"
)
OUTSIDE = '<!DOCTYPE x [<!ENTITY e SYSTEM "file:///etc/passwd">]><ANNOTATION_DOCUMENT>&e;</a>'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (LAUGHS.encode(), "a DOCTYPE, which no .eaf file of ELAN has"),
        (OUTSIDE.encode(), "a DOCTYPE, which no .eaf file of ELAN has"),
        (b"<ANNOTATION_DOCUMENT><TIER>", "is damaged: no element found"),
        (b"<html></html>", "not an annotation: it is XML of the kind 'html'"),
        (b"<a>" * 100_000, "is damaged"),
        (b'{"a": 1}', "not an annotation: it is JSON with ['a']"),
        (b"[" * 100_000, "is damaged: brackets in brackets without end"),
        (b'{"annotations": {"0": [[NaN]]}, "categories": {}}', "is damaged: the number NaN"),
        (b'{"annotations": {"0": [5]}, "categories": {}}', "not CholecT50's format"),
        (b'{"annotations": {"0": [[5]]}, "categories": {}}', "vectors of fewer than 15 numbers"),
        (b'{"annotations": {}, "categories": {}, "fps": 0}', "not CholecT50's format: fps is 0"),
        (b"Frame\tPhase\n0\tA\n1e9\tB\n", "line 3: '1e9' is no number of a frame"),
        (b"Frame\tPhase\n0\tA\n0\tB\n", "line 3: frame 0 is there twice"),
        ("start,end,label\n0,1,schön\n".encode("latin-1"), "not UTF-8 text"),
        ("start,end,label\n0,1,cut\n".encode("utf-16"), "UTF-16 text"),
        (b"\x00\x00\x00\x18ftypmp42", "a NUL character"),
        (b"", "no column end, label, start"),
        (b"path,name\na.mp4,cut\n", "it is a text that begins with 'path,name a.mp4,cut'"),
    ],
)
def test_hostile_files_are_one_message(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "op1.txt"
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        read_annotations(path)
    assert message in str(error.value) and str(path) in str(error.value)
    assert len(str(error.value)) < 700


def test_a_huge_file_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "op1.txt"
    with open(path, "wb") as file:  # a line of 200 MB, which needs no place on the disk
        file.truncate(200_000_000)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match="200 MB are too much for an annotation"):
        read_annotations(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # kB


def test_names_of_videos() -> None:
    names = {
        "phase_annotations/video01-phase.txt": "video01",
        "op1.csv": "op1",
        "op1.mp4.csv": "op1.mp4",
        "op1.mp4.timeline/timeline.csv": "op1.mp4",
        "VID01.json": "VID01",
    }
    assert {path: video_name(Path(path)) for path in names} == names
    assert is_same_video("OP1", r"C:\data\op1.MP4") and is_same_video("a/op1.avi", "op1.mp4")
    assert not is_same_video("op.1", "op.2") and not is_same_video("op1", "op10.mp4")


TIMELINE = "start,end,label\n0,5,cut\n"


def test_files_are_matched_to_videos(tmp_path: Path) -> None:
    videos = [tmp_path / name for name in ("a/op1.mp4", "b/op1.mp4", "op2.avi", "op3.mp4")]
    notes = tmp_path / "notes"
    write(notes / "a" / "op1.csv", TIMELINE)
    write(notes / "op2.mp4.timeline" / "timeline.csv", TIMELINE)
    touch(notes, "op2.mp4.timeline/frames.csv", ".hidden.csv")
    write(notes / "both.csv", "video,start,end,label\nb/op1.mp4,0,2,sew\nop9,0,1,sew\n")
    write(notes / "readme.txt", "Labelled by two surgeons.\n")
    segments, remarks = annotate_videos(videos, notes)
    assert {video: [s[:3] for s in rows] for video, rows in segments.items()} == {
        videos[0]: [(0, 5, "cut")],
        videos[1]: [(0, 2, "sew")],
        videos[2]: [(0, 5, "cut")],
    }
    assert remarks == [
        f"{notes}: no annotations, passed over: readme.txt",
        "annotations without a video: op9",
        "videos without an annotation: op3.mp4",
    ]


def test_what_is_not_certain_is_refused(tmp_path: Path) -> None:
    videos = [tmp_path / "a" / "op1.mp4", tmp_path / "b" / "op1.mp4"]
    write(tmp_path / "x" / "op1.csv", TIMELINE)
    with pytest.raises(UserError, match=r"op1 may be any of .*a/op1.mp4, .*b/op1.mp4: rename"):
        annotate_videos(videos, tmp_path / "x")
    write(tmp_path / "x" / "OP1.mp4.csv", TIMELINE)
    with pytest.raises(UserError, match=r"has two annotations, in .*: keep one"):
        match_videos(videos[:1], read_folder(tmp_path / "x").files.items())
    write(tmp_path / "y" / "other.csv", TIMELINE)
    with pytest.raises(UserError, match=r"belongs to none of the videos:\n  annotations without a"):
        annotate_videos(videos, tmp_path / "y")
    assert list(annotate_videos(videos[:1], tmp_path / "y" / "other.csv")[0]) == videos[:1]
    touch(tmp_path / "z", "readme.txt")
    os.remove(tmp_path / "z" / "readme.txt")
    with pytest.raises(UserError, match="holds no annotation: understood are timelines"):
        annotate_videos(videos, tmp_path / "z")


def test_annotations_are_the_truth_of_timelines(tmp_path: Path, run_main) -> None:
    """Of 10 s, 1 s is predicted wrongly; the other video has 3.18 s of truth."""
    write(tmp_path / "truth" / "video01-phase.txt", "Frame\tPhase\n" + "".join(
        f"{n}\t{'cut' if n < 125 else 'sew'}\n" for n in range(250)
    ))  # fmt: skip
    write(tmp_path / "truth" / "op2.eaf", EAF.format(origin="").replace("клип", "sew"))
    for name, start, middle, end in (("video01", 0, 6, 10), ("op2", 0.44, 2.96, 3.62)):
        folder = tmp_path / "predicted" / f"{name}.mp4.timeline"
        folder.mkdir(parents=True)
        parts = [Segment(start, middle, "cut"), Segment(middle, end, "sew")]
        write_timeline(folder / "timeline.csv", parts)
    done = run_main(
        evaluate_main, "timeline", "truth", "predicted", "--tier", "phase", "--output", "scores",
        cwd=tmp_path,
    )  # fmt: skip
    assert "25 per second" in done.stdout
    scores = json.loads((tmp_path / "scores" / "timeline_metrics.json").read_text())
    assert scores["videos"]["video01"]["accuracy"] == pytest.approx(0.9)
    assert scores["videos"]["op2"]["seconds"] == pytest.approx(3.18)
