"""Pairing of timelines, their average scores and tables, and evaluate.py timeline."""

import json
from pathlib import Path

import pytest
from helpers import run_script

from evaluate import main
from timeline.results import Pair, compute_results, format_results, read_pairs
from timeline.segments import Segment, write_timeline
from utils.errors import UserError


def line(*texts: str) -> list[Segment]:
    """A timeline: `line("A 0 10", "B 10 20")`."""
    parts = (text.split() for text in texts)
    return [Segment(float(start), float(end), label) for label, start, end in parts]


def test_average_and_pooled_by_hand() -> None:
    pairs = {
        "x": Pair(line("A 0 10", "B 10 20"), line("A 0 12", "B 12 20")),  # 18 of 20 s correct
        "y": Pair(line("A 0 80"), line("uncertain 0 80")),  # none of 80 s
    }
    results = compute_results(pairs, relaxed=2)
    average, pooled = results["average"], results["pooled"]
    assert average["accuracy"] == pytest.approx((18 / 20 + 0) / 2)
    assert pooled["accuracy"] == pytest.approx(18 / 100)
    assert pooled["relaxed_accuracy"] == pytest.approx(20 / 100)
    assert (average["coverage"], pooled["coverage"]) == pytest.approx((1 / 2, 20 / 100))
    assert average["edit"] == pytest.approx((1 + 0) / 2)
    # y answers nothing, so the mean is over x alone
    assert results["videos"]["y"]["accuracy_answered"] is None
    assert average["accuracy_answered"] == pytest.approx(18 / 20)
    # A: true 90 s, predicted 12 s, correct 10 s; B: true 10 s, predicted 8 s, correct 8 s
    assert pooled["macro_f1"] == pytest.approx((2 * 10 / 102 + 2 * 8 / 18) / 2)
    assert pooled["jaccard"] == pytest.approx((10 / 92 + 8 / 10) / 2)
    # y has no B, so its mean is over A alone
    assert average["macro_f1"] == pytest.approx(((20 / 22 + 16 / 18) / 2 + 0) / 2)
    assert results["per_class"]["A"]["recall"] == pytest.approx(10 / 90)
    assert "edit" not in pooled
    text = format_results(results)
    assert "00:01:40.000 of truth" in text and "relaxed by 2 s" in text
    assert "relaxed" not in format_results(compute_results(pairs))


def save(path: Path, *texts: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_timeline(path, line(*texts))
    return path


def table(path: Path, *rows: str) -> Path:
    path.write_text("\n".join(rows) + "\n")
    return path


def plain(segments: list[Segment]) -> list[tuple]:
    return [segment[:3] for segment in segments]  # without the confidence: nan equals nothing


def test_folders_are_paired_by_the_names_of_videos(tmp_path) -> None:
    truth, predicted = tmp_path / "truth", tmp_path / "predicted"
    names = {"op1": "op1.mp4", "op.2": "op.2.MOV", "op3": "op3"}
    for number, (name, video) in enumerate(names.items(), 1):
        save(truth / f"{name}.csv", f"A 0 {number}")
        save(predicted / f"{video}.timeline" / "timeline.csv", f"A 0 {number}")
    save(predicted / "more.mp4.timeline" / "timeline.csv", "A 0 1")
    table(predicted / "clips.csv", "path,label")  # not a timeline, and not looked at
    pairs, warnings = read_pairs(str(truth), str(predicted))
    assert pairs.keys() == names.keys()
    for number, name in enumerate(names, 1):
        assert plain(pairs[name].truth) == plain(pairs[name].prediction) == [(0, number, "A")]
    assert warnings == ["predictions without a truth are not scored: more.mp4"]
    # the same from folders of .csv, and from one file each
    again, _ = read_pairs(str(truth), str(truth))
    assert again.keys() == names.keys()
    single = table(
        tmp_path / "one.csv",
        "video,start,end,label",
        *(f"{video},0,{number},A" for number, video in enumerate(names.values(), 1)),
    )
    pairs, _ = read_pairs(str(truth), str(single))
    for number, name in enumerate(names, 1):
        assert plain(pairs[name].truth) == plain(pairs[name].prediction) == [(0, number, "A")]
    assert read_pairs(str(single), str(single))[0].keys() == set(names.values())


def test_one_video_needs_no_name(tmp_path) -> None:
    truth = save(tmp_path / "truth.csv", "A 0 1")
    save(tmp_path / "op1.mp4.timeline" / "timeline.csv", "A 0 2")
    for path in ("op1.mp4.timeline/timeline.csv", "op1.mp4.timeline"):
        pairs, warnings = read_pairs(str(truth), str(tmp_path / path))
        assert pairs.keys() == {"truth"}
        assert [plain(segments) for segments in pairs["truth"]] == [[(0, 1, "A")], [(0, 2, "A")]]
        assert warnings == []
    # a folder of predictions goes by names, also for one video
    with pytest.raises(UserError, match=r"no prediction for 1 of 1 videos.*: truth \(it has op1"):
        read_pairs(str(truth), str(tmp_path))


def test_a_label_that_the_truth_never_has_is_reported(tmp_path) -> None:
    truth = save(tmp_path / "truth.csv", "HookCut 0 1", "Suction 1 2")
    predicted = save(tmp_path / "predicted.csv", "hook_cut 0 1", "Suction 1 2", "uncertain 2 3")
    _, (warning,) = read_pairs(str(truth), str(predicted))
    assert "always wrong: hook_cut (the truth has HookCut, Suction" in warning


@pytest.fixture(scope="module")
def timelines(tmp_path_factory) -> Path:
    """A truth and a prediction of two videos, read-only."""
    folder = tmp_path_factory.mktemp("timelines")
    for name in ("op1", "op2"):
        save(folder / "truth" / f"{name}.csv", "A 0 10", "B 10 20")
        save(folder / "predicted" / f"{name}.mp4.timeline" / "timeline.csv", "A 0 12", "B 12 20")
    return folder


def test_script(timelines: Path, tmp_path) -> None:
    truth, predicted = timelines / "truth", timelines / "predicted"
    done = run_script(
        "evaluate.py", "timeline", truth, predicted, "--relaxed", 2, "--output", "out", cwd=tmp_path
    )
    for text in ("op1", "op2", "average of videos", "all time pooled", "F1@50", "0.900", "by 2 s"):
        assert text in done.stdout
    results = json.loads((tmp_path / "out" / "timeline_metrics.json").read_text())
    assert results["pooled"]["accuracy"] == results["average"]["accuracy"] == 0.9
    assert results["average"]["relaxed_accuracy"] == 1
    assert results["videos"].keys() == {"op1", "op2"}
    assert results["relaxed_seconds"] == 2 and results["warnings"] == []
    assert "--relaxed 2" in results["command"]
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "timeline_metrics.json"]


def test_nothing_is_written_unasked(timelines: Path, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["timeline", str(timelines / "truth"), str(timelines / "predicted")]
    monkeypatch.setattr("sys.argv", ["evaluate.py", *arguments])
    main()
    assert "--output FOLDER" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_mistakes(timelines: Path, tmp_path, mistake) -> None:
    truth, predicted = timelines / "truth", timelines / "predicted"

    def refused(*arguments: object) -> str:
        code, error = mistake(main, *arguments, cwd=tmp_path)
        assert code == 2 and error.startswith("error: ") and "Traceback" not in error
        return error

    assert "relaxed = -1" in refused("timeline", truth, predicted, "--relaxed", -1)
    assert "relaxed = nan" in refused("timeline", truth, predicted, "--relaxed", "nan")
    assert "nowhere: No such file" in refused("timeline", "nowhere", predicted)
    assert "nowhere: No such file" in refused("timeline", truth, "nowhere")
    (tmp_path / "empty").mkdir()
    assert "holds no annotation: understood are" in refused("timeline", "empty", predicted)
    assert "2 of 2 videos of the truth: op1, op2 (it has no timeline)" in refused(
        "timeline", truth, "empty"
    )
    single = save(tmp_path / "single.csv", "A 0 1")
    assert "no column video, but the truth has 2" in refused("timeline", truth, single)
    both = table(tmp_path / "both.csv", "video,start,end,label", "op2,0,1,A", "op2.mp4,0,1,A")
    assert "1 of 2 videos of the truth: op1 (it has op2, op2.mp4)" in refused(
        "timeline", truth, both
    )
    twice = table(tmp_path / "twice.csv", "video,start,end,label", "op2,0,1,A")
    assert "more than one prediction for op2 (op2, op2.mp4)" in refused("timeline", twice, both)
    marks = save(tmp_path / "marks.csv", "uncertain 0 1")
    assert "only marks, in marks" in refused("timeline", marks, single)
    save(tmp_path / "many" / "a.csv", "A 0 1")
    table(tmp_path / "many" / "b.csv", "video,start,end,label", "x,0,1,A", "y,0,1,A")
    assert "no prediction for 3 of 3 videos of the truth: a, x, y" in refused(
        "timeline", "many", predicted
    )
    save(tmp_path / "many" / "X.mp4.csv", "A 0 1")
    assert "X.mp4 has two annotations in many: keep one" in refused("timeline", "many", predicted)
    assert "no.csv: not an annotation: it is a text that begins with 'path'; understood" in refused(
        "timeline", table(tmp_path / "no.csv", "path"), single
    )


def test_a_prediction_is_never_taken_for_two_videos(tmp_path) -> None:
    """`op.1` is a video of the truth, not `op` with an ending."""
    rows = ("video,start,end,label", "op,0,1,A", "op.1,0,1,A")
    truth = table(tmp_path / "truth.csv", *rows)
    predicted = table(tmp_path / "predicted.csv", rows[0], rows[2])
    with pytest.raises(UserError, match=r"no prediction for 1 of 2 videos of the truth: op \("):
        read_pairs(str(truth), str(predicted))
