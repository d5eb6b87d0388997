"""compare.py: its numbers are those of metrics.py and bootstrap.py, of the same clips for all."""

import dataclasses
import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import compare
from checkpoint import save_checkpoint
from clips.manifest import ClipRow
from compare import pareto_front
from config import TrainConfig
from evaluation import metrics
from evaluation.bootstrap import paired_difference, score_intervals
from evaluation.calibration import Calibration
from evaluation.plots import plot_tradeoff
from evaluation.predictions import Predictions, write_predictions
from evaluation.results import write_results
from evaluation.runs import run_labels
from models import build_model
from utils.allocator import SWITCH
from utils.files import write_json

CLASSES = ("cut", "suture", "a|b $x_1$")  # a hostile one
PATIENTS = ("Nightingale", "Blackwell", "Seacole", "Barton", "Cavell")
ERRORS = {"bad": 0.8, "good": 0.1, "middle": 0.25}
COLUMNS = ["Accuracy", "Macro F1", "Accuracy: best - this", "Macro F1: best - this"]
SPEED = ["Mean Batch Time (s)", "+- std (s)", "Latency (ms/clip)", "Median (ms/clip)"]


def patient_of(clip: int) -> int:
    return clip * 7 // 3 % 5


def rows(patients: tuple[str | None, ...] = PATIENTS) -> list[ClipRow]:
    """60 clips, 20 a class, of the five patients or of those given."""
    names = [patients[patient_of(n) % len(patients)] for n in range(60)]
    return [ClipRow(Path(f"/data/{n}.mp4"), n % 3, name) for n, name in enumerate(names)]


def predict(clips: list[ClipRow], errors: float, seed: int) -> Predictions:
    """Predictions with about that share of errors, more for some patients than for others."""
    rng = np.random.default_rng(seed)
    probabilities = rng.dirichlet([1, 1, 1], len(clips)) * 0.4
    hard = np.array([patient_of(n) < 2 for n in range(len(clips))])
    wrong = rng.random(len(clips)) < errors * np.where(hard, 1.4, 0.7)
    said = (np.array([row.label for row in clips]) + wrong) % 3
    probabilities[np.arange(len(clips)), said] += 0.6
    return Predictions(clips, probabilities)


def save_model(folder: Path, image_size: int = 32) -> None:
    """A best.pt of a ViViT, the smallest of the models."""
    config = TrainConfig(model_name="vivit", classes=CLASSES, n_frames=2, image_size=image_size)
    model = build_model(config, len(CLASSES))
    state = {"model": model.state_dict(), "epoch": 1, "best": {}, "history": []}
    folder.mkdir(parents=True, exist_ok=True)
    save_checkpoint(
        folder / "best.pt",
        {**state, "config": dataclasses.asdict(config), "classes": list(CLASSES)},
    )


def write_test(
    folder: Path,
    predictions: Predictions,
    classes: tuple[str, ...] = CLASSES,
    facts: dict | None = None,
) -> None:
    """What compare.py reads of `results.write_results`, without what takes long."""
    folder.mkdir(parents=True, exist_ok=True)
    write_predictions(folder / "predictions.csv", predictions, classes, 0.0)
    write_json(folder / "test_metrics.json", facts or {})


def save_run(
    folder: Path,
    predictions: Predictions,
    classes: tuple[str, ...] = CLASSES,
    facts: dict | None = None,
) -> Path:
    save_model(folder)
    write_test(folder, predictions, classes, facts)
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A bad run, a good one and one in between; read-only."""
    root = tmp_path_factory.mktemp("compared")
    for seed, name in enumerate(ERRORS):
        save_model(root / name)
        write_results(predict(rows(), ERRORS[name], seed), CLASSES, root / name, [Calibration()])
    return tuple(root / name for name in ERRORS)


@pytest.fixture
def call(tmp_path: Path, monkeypatch, capsys) -> Callable[..., tuple[pd.DataFrame, str]]:
    """Run compare.py here: its comparison.csv and what it printed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(SWITCH, "default")  # pytest's own memory stays as it is

    def run(*arguments: object) -> tuple[pd.DataFrame, str]:
        monkeypatch.setattr(sys, "argv", ["compare.py", *map(str, arguments), "--device", "cpu"])
        compare.main()
        return pd.read_csv("runs/comparison/comparison.csv"), capsys.readouterr().out

    return run


@pytest.fixture
def fails(call, capsys) -> Callable[..., str]:
    """Run compare.py here: the line that it fails with."""

    def run(*arguments: object) -> str:
        with pytest.raises(SystemExit) as caught:
            call(*arguments, "--no-speed")
        assert caught.value.code == 2
        assert not Path("runs/comparison").exists()
        message = capsys.readouterr().err
        assert message.count("\n") == 1
        return message

    return run


def test_numbers_are_those_of_metrics_and_bootstrap(runs, call) -> None:
    table, _ = call(*runs, "--no-speed")
    said = [predict(rows(), share, seed) for seed, share in enumerate(ERRORS.values())]
    order = sorted(range(60), key=lambda n: str(rows()[n].path))
    labels, patients = (array[order] for array in (said[0].labels, said[0].groups("patient")))
    probabilities = [one.probabilities[order] for one in said]
    for n, column in enumerate(("accuracy", "macro_f1")):
        summaries = [metrics.summarize(one.confusion)[column] for one in said]
        assert table[COLUMNS[n]].tolist() == summaries
        gaps = [summaries[1] - value for value in summaries]
        assert table[COLUMNS[2 + n]].tolist() == pytest.approx(gaps, abs=1e-15)
        for place, one in enumerate(probabilities):
            expected = score_intervals(labels, one, patients)[column]["patients"]
            found = table.loc[place, [f"{COLUMNS[n]} low", f"{COLUMNS[n]} high"]].tolist()
            assert found == pytest.approx(expected, abs=1e-12)
            expected = paired_difference(labels, probabilities[1], one, patients)[column]
            found = table.loc[place, [f"{COLUMNS[2 + n]} low", f"{COLUMNS[2 + n]} high"]].tolist()
            assert found == pytest.approx(expected, abs=1e-12)
    assert table["Macro F1: best - this low"][0] > 0  # far behind: not by chance
    config = TrainConfig(model_name="vivit", n_frames=2, image_size=32)
    parameters = sum(p.numel() for p in build_model(config, 3).parameters())
    assert table["Params (M)"].tolist() == [parameters / 1e6] * 3


def test_differences_are_paired(runs, call, tmp_path: Path) -> None:
    """A run behind its own copy by nothing, for certain."""
    copy = shutil.copytree(runs[2], tmp_path / "copy")
    table, text = call(runs[2], copy, "--no-speed")
    assert (table.filter(like="best - this") == 0).all(axis=None)
    assert table["Macro F1 high"][0] - table["Macro F1 low"][0] > 0.02
    assert "+0.000 (+0.000 to +0.000)" in text
    assert "- The same Macro F1 as the best run: vivit (copy).\n" in text


def test_order_does_not_matter(runs, call, tmp_path: Path) -> None:
    table, _ = call(*runs, "--no-speed")
    mixed = [shutil.copytree(run, tmp_path / run.name) for run in runs]
    for seed, run in enumerate(mixed[:2]):
        listing = pd.read_csv(run / "predictions.csv", dtype=str, keep_default_na=False)
        listing.sample(frac=1, random_state=seed).to_csv(run / "predictions.csv", index=False)
    numbers = table.drop(columns="Run")
    other_way = call(*reversed(mixed), "--no-speed")[0].drop(columns="Run")
    pd.testing.assert_frame_equal(other_way.iloc[::-1].reset_index(drop=True), numbers)


def test_best_by_another_score(call, tmp_path: Path) -> None:
    """One is right about all clips of a large class only, the other about most of each class."""
    clips = [ClipRow(Path(f"{n}"), int(n > 7), f"{n % 4}") for n in range(10)]
    large, each = np.eye(3)[[0] * 10], np.eye(3)[[0] * 5 + [1] * 5]
    one = save_run(tmp_path / "large", Predictions(clips, large))
    other = save_run(tmp_path / "each", Predictions(clips, each))
    assert "Best: vivit (each), by Macro F1." in call(one, other, "--no-speed")[1]
    table, text = call(one, other, "--no-speed", "--by", "accuracy")
    assert "Best: vivit (large), by Accuracy." in text
    assert table["Accuracy: best - this"].tolist() == pytest.approx([0, 0.1])
    assert table["Macro F1: best - this"][1] < 0


@pytest.mark.parametrize(
    ("patients", "message", "intervals"),
    [
        ((None,), "treat clips as independent and are too narrow", True),
        (("Seacole",), "One patient does not show how patients differ", False),
        (("Seacole", None, "Barton", "Cavell"), "12 clips of unknown patients", True),
    ],
)
def test_few_or_unknown_patients(call, tmp_path: Path, patients, message, intervals) -> None:
    folders = [
        save_run(tmp_path / f"{seed}", predict(rows(patients), 0.3, seed)) for seed in (0, 1)
    ]
    table, text = call(*folders, "--no-speed")
    assert message in text
    for side in ("low", "high"):
        assert table[[f"{name} {side}" for name in COLUMNS]].notna().all(axis=None) == intervals
    assert ("(-)" in text) != intervals
    assert ("Differences were not tested: without intervals" in text) != intervals
    assert ("Best: " in text) == intervals


def test_patients_that_only_one_run_knows(call, runs, tmp_path: Path) -> None:
    nameless = save_run(tmp_path / "nameless", predict(rows((None,)), ERRORS["bad"], 0))
    named, _ = call(runs[0], runs[1], "--no-speed")
    mixed, text = call(nameless, runs[1], "--no-speed")
    assert "60 clips of 5 patients" in text
    assert mixed[COLUMNS].equals(named[COLUMNS])


def test_evaluation_and_cross_validation(call, runs, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    save_model(folder, image_size=48)
    facts = {
        "views": 3,
        "shuffle_frames": True,
        "warnings": [{"kind": "leakage", "text": "Nightingale is in two splits"}],
    }
    predictions = predict(rows(), 0.2, 4)
    write_test(folder / "evaluate_test", predictions, facts=facts)
    for fold in (1, 2):
        save_model(tmp_path / f"cv/fold{fold}")
    write_test(tmp_path / "cv", predict(rows(), 0.2, 5), facts={"folds": [{}, {}]})
    arguments = [folder / "evaluate_test", tmp_path / "cv", "--repeats", 1, "--batch-size", 2]
    table, text = call(*arguments)
    assert table["Model"].tolist() == ["vivit (evaluate_test)", "vivit (cv)"]
    assert table["Params (M)"][0] > table["Params (M)"][1]
    assert table["Views"].tolist() == [3, 1]
    assert "vivit (evaluate_test): 3 views of each clip, all of them timed" in text
    assert "vivit (evaluate_test): was tested on shuffled frames" in text
    assert "vivit (cv): scores of 2 models" in text
    assert "Nightingale" not in text


def test_other_clips_are_refused(runs, fails, tmp_path: Path) -> None:
    clips = [*rows()[:50], ClipRow(Path("/data/new.mp4"), 0)]
    clips[0] = clips[0]._replace(label=1)
    other = save_run(tmp_path / "other", predict(clips, 0.3, 0))
    message = fails(runs[0], runs[1], other)
    assert f"{runs[0]} and {other} were tested on different clips" in message
    assert "11 only in the first, 2 only in the second, 49 in both" in message
    assert "evaluate.py RUN --csv" in message
    assert not any(name in message for name in PATIENTS)


@pytest.mark.parametrize("classes", [("cut", "suture", "rinse"), CLASSES[::-1]])
def test_other_classes_are_refused(runs, fails, tmp_path: Path, classes) -> None:
    other = save_run(tmp_path / "other", predict(rows(), 0.3, 0), classes)
    assert f"{other} has '{classes[0]}', '{classes[1]}'" in fails(runs[0], other)


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda run: (run / "best.pt").unlink(), "no best.pt in it, in its fold1 or"),
        (lambda run: (run / "predictions.csv").unlink(), "predictions.csv: no such file"),
        (lambda run: (run / "predictions.csv").write_text("a,b\n1,2\n"), "not a predictions.csv"),
        (lambda run: (run / "test_metrics.json").write_text("{"), "is damaged"),
        (lambda run: (run / "best.pt").write_bytes(b"PK"), "best.pt"),
        (shutil.rmtree, "no such file"),
    ],
)
def test_missing_and_damaged_files(runs, fails, tmp_path: Path, break_it, message) -> None:
    broken = shutil.copytree(runs[1], tmp_path / "broken")
    break_it(broken)
    assert message in fails(runs[0], broken)


def test_settings_that_cannot_work(runs, fails) -> None:
    assert "give two runs at least, each once" in fails(runs[0])
    assert "give two runs at least, each once" in fails(runs[0], runs[1], f"{runs[0]}/")
    assert "must be at least 1" in fails(*runs, "--repeats", 0)


def test_without_speed_there_is_no_picture(runs, call) -> None:
    table, text = call(*runs, "--no-speed")
    assert {path.name for path in Path("runs/comparison").iterdir()} == {
        "comparison.csv",
        "comparison.md",
    }
    assert not any(name in table for name in SPEED)
    assert "ms/clip" not in text


def test_labels_tell_runs_apart() -> None:
    folders = [Path(name) for name in ("/a/x", "/a/y/test", "/a/z/test", "/b/x", "/c/new\nline")]
    assert run_labels(
        ["vivit", "tsm_resnet", "tsm_resnet", "tsm_resnet", "tsm_resnet"], folders
    ) == [
        "vivit",
        "tsm_resnet (y/test)",
        "tsm_resnet (z/test)",
        "tsm_resnet (x)",
        "tsm_resnet (new line)",
    ]


@pytest.mark.parametrize(
    ("latency", "score", "front"),
    [
        ([5.0], [0.5], [0]),
        ([1, 2, 3], [0.5, 0.6, 0.7], [0, 1, 2]),
        ([3, 2, 1], [0.7, 0.6, 0.5], [2, 1, 0]),  # the fastest first
        ([1, 2, 3], [0.7, 0.6, 0.5], [0]),
        ([1, 2, 3, 4], [0.5, 0.7, 0.6, 0.8], [0, 1, 3]),
        ([1, 1], [0.5, 0.6], [1]),  # as fast, and better
        ([1, 2], [0.5, 0.5], [0]),  # as good, and faster
        ([2, 1, 2], [0.6, 0.5, 0.6], [1, 0, 2]),  # equals do not beat each other
    ],
)
def test_pareto_front_by_hand(latency, score, front) -> None:
    assert pareto_front(latency, score) == front


def test_picture_of_close_points_and_missing_intervals(tmp_path: Path) -> None:
    """Names never lie on each other, whatever is in them."""
    latency, scores = np.full(12, 20.0), np.full((12, 3), [0.9, np.nan, np.nan])
    plot_tradeoff(latency, scores, ["$a_{ " * 30] * 12, [0], ("x", "y"), tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 10_000


def test_script(runs, tmp_path: Path, run_main) -> None:
    hostile = shutil.copytree(runs[1], tmp_path / "a\\|b $x_1$ | *c*")
    arguments = ["--device", "cpu", "--repeats", 2, "--warmup", 1, "--output", "out"]
    done = run_main(compare.main, runs[0], hostile, runs[2], *arguments, cwd=tmp_path)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "accuracy_latency.png",
        "comparison.csv",
        "comparison.md",
    ]
    table = pd.read_csv(tmp_path / "out/comparison.csv")
    numeric = table.drop(columns=["Model", "Run"])
    assert all(np.issubdtype(kind, np.number) for kind in numeric.dtypes)
    assert numeric.notna().all(axis=None)
    sides = [f"{name} {side}" for name in COLUMNS for side in ("low", "high")]
    assert {*COLUMNS, *sides, *SPEED, "Params (M)", "Frames", "Size (px)"} < set(table)
    assert (table["Latency (ms/clip)"] / 1000 * 8).tolist() == pytest.approx(
        table["Mean Batch Time (s)"].tolist()
    )
    assert (table["Median (ms/clip)"] > 0).all()
    text = (tmp_path / "out/comparison.md").read_text(encoding="utf-8")
    assert text in done.stdout
    lines = [line for line in text.splitlines() if line.startswith("|")]
    # GitHub's rule: a backslash guards what follows it, and only a bare | parts cells
    assert {len(re.sub(r"\\.", "", line).split("|")) for line in lines} == {11}
    assert len(lines) == 5
    header = text.splitlines()[0]
    for part in ("60 clips of 5 patients", "batches of 8 clips of 2 frames of 32 px", "float32"):
        assert part in header
    assert "2 rounds in turn" in header
    assert "throughput at batch 8" in text
    assert "intervals of a difference is for that difference alone" in text
    everything = done.stdout + done.stderr + (tmp_path / "out/comparison.csv").read_text()
    assert not any(name in everything for name in PATIENTS)
    assert json.loads((runs[0] / "test_metrics.json").read_text())["patients"] == 5


def test_a_busy_machine_is_told(runs, call, monkeypatch) -> None:
    for seconds, told in (([1.0, 1.1, 0.9], False), ([1.0, 1.0, 4.0], True)):
        times = {"0": np.ones(3), "1": np.array(seconds)}
        monkeypatch.setattr("benchmarks.timing.interleave", lambda *_, times=times: times)
        table, text = call(*runs[:2], "--batch-size", 2)
        assert ("UNSTEADY" in text) == told
        assert table["Median (ms/clip)"].tolist() == [500, 500]
        assert table["Latency (ms/clip)"].tolist() == pytest.approx([500, np.mean(seconds) * 500])
        assert table["+- std (s)"].tolist() == pytest.approx([0, np.std(seconds)])


def test_models_of_different_sizes_are_named(call, tmp_path: Path) -> None:
    folders = [save_run(tmp_path / f"{n}", predict(rows(), 0.3, n)) for n in (0, 1)]
    save_model(folders[1], image_size=48)
    torch.manual_seed(0)
    _, text = call(*folders, "--repeats", 1, "--batch-size", 1)
    assert "vivit (0): 2 frames of 32 px, vivit (1): 2 frames of 48 px, float32" in text
