"""The experiment on pretraining: its arms, equal budgets, and what it does when started again."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from helpers import make_data

from benchmarks import pretraining
from benchmarks.pretraining import ARMS, PretrainingConfig, count_epochs, is_possible, run_all
from clips.manifest import ClipRow, read_manifest
from evaluation.predictions import Predictions

LABELS = np.array([0, 1, 2, 0] * 4)


def predictions(wrong: int) -> Predictions:
    """16 clips of four patients, of which the first ones are wrong."""
    rows = [ClipRow(Path(f"{i:02d}.mp4"), int(y), f"p{i // 4}") for i, y in enumerate(LABELS)]
    answers = np.where(np.arange(16) < wrong, (LABELS + 1) % 3, LABELS)
    return Predictions(rows, np.where(np.arange(3) == answers[:, None], 0.9, 0.05))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The commands, which make what the real ones make: mae errs twice less than scratch."""
    made = []

    def call(script: str, *flags: str) -> None:
        made.append([script, *flags])
        run = Path(flags[flags.index("--run-dir") + 1]) / "run"
        run.mkdir(parents=True)
        (run / ("encoder.pt" if script == "pretrain.py" else "test_metrics.json")).touch()

    def read(path: Path) -> tuple:
        return (predictions(4 if "-mae-" in str(path) else 6),)

    monkeypatch.setattr(pretraining, "_call", call)
    monkeypatch.setattr(pretraining, "read_predictions", read)
    return made


def test_each_arm_is_trained_once_with_equal_steps(calls: list, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    make_data(data, ("a", "b", "c"), {"train": 4, "val": 1, "test": 1}, frames=2)
    config = PretrainingConfig(
        ("vivit",), ("scratch", "mae", "order", "scratch_longer"), (0.5, 1.0), (0,), str(data),
        pretraining_epochs=5, steps=12, batch_size=4, output=str(tmp_path / "out"),
    )  # fmt: skip
    table = run_all(config)
    scripts = [call[0] for call in calls]
    assert scripts.count("pretrain.py") == 1  # for both fractions, and vivit has no order
    assert scripts.count("train.py") == 6
    runs = pd.read_csv(tmp_path / "out" / "runs_adamw.csv")
    assert runs["arm"].tolist() == ["scratch", "mae", "scratch_longer"] * 2
    assert runs["clips"].tolist() == [6] * 3 + [12] * 3
    assert runs["patients"].tolist() == [1] * 3 + [2] * 3
    # 12 steps of 4 clips are 6 epochs of 6 clips; the pretraining made 5 * 3 steps more.
    assert runs["epochs"].tolist() == [6, 6, 14, 4, 4, 9]
    weights = [call[call.index("--weights") + 1] for call in calls if call[0] == "train.py"]
    assert [Path(w).name for w in weights] == ["none", "encoder.pt", "none"] * 2
    listed = tmp_path / "out" / "labels" / "train-adamw-0.5-0.csv"
    drawn = read_manifest(listed, data, ("a", "b", "c"))
    assert {row.label for row in drawn} == {0, 1, 2}
    mae = table[table["arm"] == "mae"]
    assert mae["accuracy delta"].tolist() == pytest.approx([2 / 16] * 2)
    assert (mae["accuracy delta low"] <= 2 / 16).all()
    assert (mae["accuracy delta high"] >= 2 / 16).all()
    calls.clear()
    again = run_all(config)
    assert calls == []
    assert again.equals(table)
    assert len(pd.read_csv(tmp_path / "out" / "runs_adamw.csv")) == 6


def test_arms_suit_their_models() -> None:
    assert [arm for arm in ARMS if is_possible("vivit", arm)] == [
        *("scratch", "mae", "distil", "mae_shuffled", "distil_random", "scratch_longer")
    ]
    assert [arm for arm in ARMS if is_possible("tsm_resnet", arm)] == [
        *("scratch", "distil", "order", "distil_random", "scratch_longer")
    ]


def test_a_training_has_at_least_one_epoch() -> None:
    assert count_epochs(PretrainingConfig(steps=1), "scratch", 1000, 1000) == 1
