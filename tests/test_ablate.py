"""ablate.py: what it trains, that it goes on where it stopped, and where its table goes."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import TINY_FLAGS

import ablate
import evaluate
from ablate import ADJUSTED, LEVERS, AblateConfig, put_section
from checkpoint import load_checkpoint
from config import TrainConfig, resolve
from predictions import read_predictions

FLAGS = [
    *TINY_FLAGS, "--model", "cnn_lstm", "--lstm-hidden", 4, "--freeze-to", "layer4",
    "--epochs", 1, "--seeds", 0, 1, "--tau", 0,
]  # fmt: skip


def flags(data: Path, folder: Path, *more: object) -> list[object]:
    store = folder / "features"
    return [*FLAGS, "--data-root", data, "--features", store, "--output", folder / "study", *more]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train.plot_curves", lambda *_: None)


@pytest.mark.parametrize("lever", LEVERS)
def test_every_lever_is_a_recipe_that_can_work(lever: str) -> None:
    base = TrainConfig(model="cnn_lstm", freeze_to="layer4", lstm_layers=0)
    resolve(dataclasses.replace(base, **LEVERS[lever]))
    known = {field.name for field in dataclasses.fields(TrainConfig)}
    assert set(LEVERS[lever]) <= known


@pytest.mark.usefixtures("quick")
def test_trains_what_is_left_and_writes_the_table(
    tiny_data: Path, tmp_path: Path, run_main: Callable
) -> None:
    results = tmp_path / "RESULTS.md"
    results.write_text("# Results\n\nabove\n")
    levers = ["--levers", "mean over time", "--into", results, "--name", "tiny"]
    run_main(ablate.main, *flags(tiny_data, tmp_path, *levers), cwd=tmp_path)
    study = tmp_path / "study"
    runs = sorted(path.parent for path in study.glob("*/*/test_metrics.json"))
    assert [str(run.relative_to(study)) for run in runs] == [
        "mean_over_time/seed0", "mean_over_time/seed1", "recipe/seed0", "recipe/seed1",
    ]  # fmt: skip
    seeds = [load_checkpoint(run)["config"]["seed"] for run in runs]
    assert seeds == [0, 1, 0, 1]
    table = pd.read_csv(study / "study.csv")
    assert table["lever"].tolist() == ["recipe", "mean over time", *ADJUSTED]
    scores = [read_predictions(run / "predictions.csv")[0].scores["macro_f1"] for run in runs[2:]]
    assert table["macro_f1"][0] == pytest.approx(np.mean(scores))
    # Balanced classes, the same recipe but for its pooling: adjusting and repeating change nothing.
    assert table["macro_f1 gain"][2:].tolist() == [0, 0]
    text = results.read_text()
    assert text.startswith("# Results\n\nabove\n")
    assert text.count("<!-- ablate: tiny -->") == text.count("<!-- end: tiny -->") == 1
    assert f"| recipe | {table['accuracy'][0]:.3f} +-" in text
    assert (study / "study.png").stat().st_size > 10_000

    before = {run: (run / "best.pt").stat().st_mtime_ns for run in runs}
    (runs[0] / "test_metrics.json").unlink()  # as if it had been killed in its test
    run_main(ablate.main, *flags(tiny_data, tmp_path, *levers), cwd=tmp_path)
    after = {run: (run / "best.pt").stat().st_mtime_ns for run in runs}
    assert {run for run in runs if after[run] != before[run]} <= {runs[0]}
    assert (runs[0] / "test_metrics.json").exists()
    assert results.read_text() == text


@pytest.mark.usefixtures("quick")
def test_adjusting_afterwards_is_evaluates(
    tiny_data: Path, tmp_path: Path, run_main: Callable
) -> None:
    uneven = tmp_path / "uneven"
    uneven.mkdir()
    for split in ("train", "val", "test"):
        table = pd.read_csv(tiny_data / f"{split}.csv")
        if split == "train":
            table = table[(table["label"] == "dark") | table["path"].str.endswith("_0.mp4")]
        table["path"] = [str(tiny_data / "clips" / path) for path in table["path"]]
        table.to_csv(uneven / f"{split}.csv", index=False)
    run_main(
        ablate.main, *flags(uneven, tmp_path, "--levers", "recipe", "--seeds", 0), cwd=tmp_path
    )
    run = tmp_path / "study" / "recipe" / "seed0"
    run_main(evaluate.main, run, "--adjust", 1, "--workers", 0, cwd=tmp_path)
    wanted, _ = read_predictions(run / "evaluate_test_adjust1" / "predictions.csv")
    found = ablate._adjusted(run, 1.0)
    assert [row.path for row in found.rows] == [row.path for row in wanted.rows]
    np.testing.assert_allclose(found.probabilities, wanted.probabilities, atol=1e-3)
    plain, _ = read_predictions(run / "predictions.csv")
    assert abs(plain.probabilities - wanted.probabilities).max() > 0.01


def test_mistakes_are_one_line(tiny_data: Path, tmp_path: Path, mistake: Callable) -> None:
    told = mistake(ablate.main, *flags(tiny_data, tmp_path, "--levers", "magic"), cwd=tmp_path)
    assert "no lever is called 'magic'" in told.stderr
    study = tmp_path / "study"
    study.mkdir()
    recipe = json.loads(json.dumps(dataclasses.asdict(AblateConfig())))
    (study / "recipe.json").write_text(json.dumps({**recipe, "lstm_hidden": 77}))
    told = mistake(ablate.main, *flags(tiny_data, tmp_path), cwd=tmp_path)
    assert "its runs had" in told.stderr
    assert "another --output" in told.stderr


def test_a_section_is_put_in_once_and_replaced(tmp_path: Path) -> None:
    path = tmp_path / "file.md"
    put_section(path, "a", "one")
    put_section(path, "b", "two")
    path.write_text(path.read_text() + "\nafter\n")
    put_section(path, "a", "three\nlines")
    assert path.read_text() == (
        "<!-- ablate: a -->\nthree\nlines\n<!-- end: a -->\n\n"
        "<!-- ablate: b -->\ntwo\n<!-- end: b -->\n\nafter\n"
    )
