"""An exported file, or a run in another engine, wherever a script takes a run."""

import csv
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import benchmark_latency
import evaluate
import export
import predict
from video.encoder import write_video

pytest.importorskip("openvino")
pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("videos") / "operation.mp4"
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (60, 1, 1, 3)) + rng.integers(0, 50, (48, 64, 1))
    write_video(path, frames.clip(0, 255).astype(np.uint8), 25)
    return path


def table(path: Path) -> np.ndarray:
    """The numbers of predictions.csv or frames.csv."""
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    names = [name for name in rows[0] if name.removeprefix("p_") in ("dark", "grey", "light")]
    assert len(names) == 3
    return np.array([[float(row[name]) for name in names] for row in rows])


@pytest.fixture
def file(trained: tuple[Path, str], run_main: Callable, tmp_path: Path) -> Path:
    run_main(export.main, trained[0], "--output", tmp_path / "net.onnx", cwd=tmp_path)
    return tmp_path / "net.onnx"


def test_evaluate_gives_the_same_in_every_engine(
    trained: tuple[Path, str], file: Path, tiny_data: Path, run_main: Callable, tmp_path: Path,
    no_figures: None,
) -> None:  # fmt: skip
    run, results = trained[0], {}
    for name, flags in {
        "torch": [run],
        "openvino": [run, "--engine", "openvino", "--views", 2],
        "views": [run, "--views", 2],
        "file": [file, "--data-root", tiny_data],
        "other engine": [file, "--data-root", tiny_data, "--engine", "openvino"],
    }.items():
        flags += ["--num-workers", 0, "--output", tmp_path / name]
        done = run_main(evaluate.main, *flags, cwd=tmp_path)
        metrics = json.loads((tmp_path / name / "test_metrics.json").read_text())
        results[name] = metrics["engine"], table(tmp_path / name / "predictions.csv")
        warned = "an exported file does not name the patients of its training" in done.stdout
        assert warned == ("--data-root" in flags)
    engines = {name: engine for name, (engine, _) in results.items()}
    assert engines == {
        "torch": "torch",
        "openvino": "openvino",
        "views": "torch",
        "file": "onnxruntime",
        "other engine": "openvino",
    }
    for name, reference in (("file", "torch"), ("other engine", "torch"), ("openvino", "views")):
        np.testing.assert_allclose(results[name][1], results[reference][1], atol=1e-5)


def test_predict_gives_the_same_timeline(
    trained: tuple[Path, str], file: Path, video: Path, run_main: Callable, tmp_path: Path
) -> None:
    for name, flags in {
        "torch": [trained[0]],
        "openvino": [trained[0], "--engine", "openvino"],
        "file": [file],
    }.items():
        done = run_main(predict.main, *flags, video, "--output", tmp_path / name, cwd=tmp_path)
        assert "computed" not in done.stderr
        page = (tmp_path / name / "operation.mp4.timeline" / "timeline.html").read_text()
        assert ("onnxruntime" in page) == (name == "file")
    folders = [tmp_path / name / "operation.mp4.timeline" for name in ("torch", "openvino", "file")]
    first, *others = (table(folder / "frames.csv") for folder in folders)
    for other in others:
        np.testing.assert_allclose(other, first, atol=2e-4)  # frames.csv has four digits


def test_clips_are_answered_the_same(
    trained: tuple[Path, str], file: Path, tiny_data: Path, run_main: Callable, tmp_path: Path
) -> None:
    for name, flags in {"torch": [trained[0]], "file": [file]}.items():
        flags += [tiny_data / "test.csv", "--num-workers", 0, "--clips", f"{name}.csv"]
        run_main(predict.main, *flags, cwd=tmp_path)
    ours, theirs = ((tmp_path / f"{name}.csv").read_text() for name in ("file", "torch"))
    assert [row.split(",")[:2] for row in ours.splitlines()] == [
        row.split(",")[:2] for row in theirs.splitlines()
    ]


def test_an_exported_file_is_timed(file: Path, run_main: Callable, tmp_path: Path) -> None:
    flags = ["--model-names", file, "--batch-size", 2, "--repeats", 1, "--warmup", 0]
    run_main(benchmark_latency.main, *flags, "--output", "bench", cwd=tmp_path)
    (row,) = json.loads((tmp_path / "bench" / "latency.json").read_text())["rows"]
    assert row["Engine"] == "onnxruntime"
    assert row["Latency (ms/clip)"] > 0
    assert row["GFLOPs"] is None and row["Params (M)"] is None


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--engine", "torch"], "--engine torch is for a run or a checkpoint"),
        (["--engine", "auto"], "--engine auto is for a run or a checkpoint"),
        ([], "an exported file does not say where clips are: give --data-root or --csv"),
        (["--device", "cuda"], "computes on the CPU: leave out --device cuda"),
        (["--precision", "bf16"], "computes in fp32: leave out --precision bf16"),
    ],
)
def test_contradictions_are_refused(
    flags: list[str], message: str, file: Path, mistake: Callable, tmp_path: Path
) -> None:
    error = mistake(evaluate.main, file, *flags, cwd=tmp_path).stderr
    assert message in error
    assert len(error.splitlines()) == 1


def test_another_length_and_explanations_are_refused(
    trained: tuple[Path, str], file: Path, video: Path, mistake: Callable, tmp_path: Path
) -> None:
    error = mistake(predict.main, file, video, "--n-frames", 6, cwd=tmp_path).stderr
    assert "6" in error and len(error.splitlines()) == 1
    for flags in ([file], [trained[0], "--engine", "openvino"]):
        error = mistake(predict.main, *flags, video, "--explain", cwd=tmp_path).stderr
        assert "--explain needs gradients" in error
