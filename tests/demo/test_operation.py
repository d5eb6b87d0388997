"""The demo operation: it shows what its CSV says, and its patient is not in the demo data."""

import itertools
from collections import Counter
from pathlib import Path

import av
import numpy as np
import pytest
from helpers import run_script

from clips.manifest import CLASSES
from demo.data import CLIPS_PER_PATIENT, PATIENTS, plan_clips, render
from demo.operation import (
    PATIENT,
    SEGMENT_CLIPS,
    main,
    plan_operation,
    render_operation,
    true_segments,
)
from timeline.segments import read_timeline


@pytest.fixture(scope="module")
def short(tmp_path_factory) -> Path:
    """The folder of a short operation, 15 clips and more than one segment; read-only."""
    folder = tmp_path_factory.mktemp("operation")
    done = run_script("demo.operation", "new/op.mp4", "--minutes", 0.3, "--seed", 1, cwd=folder)
    assert "18.0 s" in done.stdout
    return folder / "new"


def test_the_script_writes_the_video_and_its_truth_alone(short: Path) -> None:
    assert {path.name for path in short.iterdir()} == {"op.mp4", "op.csv"}
    assert (short / "op.csv").read_text().startswith("start,end,label\n0.000,")


def test_the_truth_is_what_the_video_shows(short: Path) -> None:
    with av.open(str(short / "op.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.average_rate, stream.codec_context.name) == (25, "h264")
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(stream)])
    segments = read_timeline(short / "op.csv")[""]
    assert len(segments) > 1
    assert frames.shape == (15 * 30, 96, 128, 3)
    assert segments[0].start == 0 and segments[-1].end == len(frames) / 25
    assert all(a.end == b.start for a, b in itertools.pairwise(segments))
    plan = plan_operation(0.3, seed=1)
    assert len(plan) == len(segments)
    for segment, clips in zip(segments, plan, strict=True):
        shown = frames[round(segment.start * 25) : round(segment.end * 25)]
        drawn = np.concatenate([render(clip, seed=1) for clip in clips])
        assert {clip.action for clip in clips} == {segment.label}
        assert shown.shape == drawn.shape
        assert np.abs(shown.astype(int) - drawn).mean() < 6  # H.264, but no frame out of place


def test_same_seed_same_bytes(short: Path, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("sys.argv", ["x", str(tmp_path / "op.mp4"), "--minutes", "0.3", "--seed=1"])
    main()
    for name in ("op.mp4", "op.csv"):
        assert (tmp_path / name).read_bytes() == (short / name).read_bytes()
    assert plan_operation(10, seed=1) != plan_operation(10, seed=2)


def test_the_plan_of_ten_minutes() -> None:
    plan = plan_operation(10)
    assert sum(map(len, plan)) == 500
    assert true_segments(plan)[-1].end == 600
    lengths = [len(clips) for clips in plan[:-1]]  # the last one is cut
    assert min(lengths) >= SEGMENT_CLIPS[0] and max(map(len, plan)) <= SEGMENT_CLIPS[1]
    actions = [clips[0].action for clips in plan]
    assert set(actions) == set(CLASSES)
    assert all(a != b for a, b in itertools.pairwise(actions))


def test_actions_are_as_frequent_as_in_the_demo_data() -> None:
    counts = Counter(clips[0].action for clips in plan_operation(1000))
    fractions = np.array([counts[action] for action in CLASSES]) / counts.total()
    expected = np.array([CLIPS_PER_PATIENT[action] for action in CLASSES])
    expected = expected / expected.sum()
    assert np.abs(fractions - expected).max() < 0.03  # not exactly: no action follows itself


def test_a_segment_has_one_patient_and_scene_and_no_clip_comes_twice() -> None:
    plan = plan_operation(10)
    for clips in plan:
        assert len({(clip.patient, clip.action_number, clip.action) for clip in clips}) == 1
    everything = [(clip.action_number, clip.part) for clips in plan for clip in clips]
    assert len(set(everything)) == len(everything)


def test_nobody_has_seen_the_patient() -> None:
    demo = {clip.patient for clip in plan_clips(PATIENTS, CLIPS_PER_PATIENT)}
    assert PATIENT not in demo
    assert {clip.patient for clips in plan_operation(5) for clip in clips} == {PATIENT}


def test_frames_are_drawn_as_they_are_asked_for(monkeypatch) -> None:
    """Not all at once: those of ten minutes are half a gigabyte."""
    drawn = []
    monkeypatch.setattr("demo.operation.render", lambda *args: drawn.append(args) or render(*args))
    frames = render_operation(plan_operation(10))
    for _ in range(31):
        assert next(frames).shape == (96, 128, 3)
    assert len(drawn) == 2
    frames.close()


def test_the_shortest_is_one_clip() -> None:
    assert [len(clips) for clips in plan_operation(1e-9)] == [1]


def test_mistakes(tmp_path, mistake) -> None:
    def refused(*arguments: object) -> str:
        code, error = mistake(main, *arguments, cwd=tmp_path)
        assert code == 2 and error.startswith("error: ")
        return error

    for name in ("op.csv", "film.mp4"):
        (tmp_path / name).write_text("years of work")
    assert "op.csv exists already" in refused("op.mp4")
    assert "film.mp4 exists already" in refused("film.mp4")
    assert "must end in .mp4" in refused("op.avi")
    assert "must end in .mp4" in refused("op")
    for minutes in ("0", "-1", "nan", "inf"):
        assert "minutes must be more than 0" in refused("new.mp4", "--minutes", minutes)
    assert "seed at least 0" in refused("new.mp4", "--seed", "-1")
    assert {path.name for path in tmp_path.iterdir()} == {"op.csv", "film.mp4"}
    assert (tmp_path / "op.csv").read_text() == "years of work"
