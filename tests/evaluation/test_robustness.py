"""Robustness to corruptions: the means and their intervals, and corrupted clips of a data set."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import make_clip

from clips.corruptions import Corrupt, corrupt
from clips.manifest import ClipRow
from dataset import ClipsDataset
from evaluation.predictions import Predictions
from evaluation.robustness import measure_robustness, summarize

PATIENTS = ("p", "p", "q", "q")


def predictions(*y_pred: int) -> Predictions:
    """The predicted classes of four clips of class 0 of two patients."""
    rows = [ClipRow(Path(f"{n}.mp4"), 0, patient) for n, patient in enumerate(PATIENTS)]
    return Predictions(rows, np.eye(2)[list(y_pred)])


def test_means_by_hand() -> None:
    clean = predictions(0, 0, 0, 1)  # 3/4 correct
    correct = {("smoke", s): predictions(0, 0, 1, 1).correct for s in range(1, 6)}  # 2/4 always
    correct |= {("defocus", s): predictions(0, 0, 0, 1).correct for s in (1, 2, 3, 4)}  # 3/4
    correct |= {("defocus", 5): predictions(1, 1, 1, 1).correct}  # 0/4: mean (4 * 3/4 + 0) / 5
    found = summarize(clean, correct)
    assert found["clean_accuracy"] == 0.75
    means = {name: row["mean_accuracy"] for name, row in found["corruptions"].items()}
    assert means == pytest.approx({"smoke": 0.5, "defocus": 0.6, "all": 0.55})
    assert found["corruptions"]["all"]["relative"] == pytest.approx(0.55 / 0.75)
    low, high = found["corruptions"]["smoke"]["loss_interval"]
    # One clip of patient q is lost and none of p: a resample loses 0 (p twice) to 1 (q twice).
    assert low == 0
    assert 0.25 < high <= 1


def test_the_same_predictions_lose_nothing_and_one_patient_has_no_interval() -> None:
    clean = predictions(0, 1, 0, 1)
    correct = {("smoke", s): clean.correct for s in range(1, 6)}
    found = summarize(clean, correct)["corruptions"]["smoke"]
    assert found["relative"] == 1
    assert found["loss_interval"] == [0, 0]
    alone = Predictions([row._replace(patient="p") for row in clean.rows], clean.probabilities)
    assert summarize(alone, correct)["corruptions"]["all"]["loss_interval"] is None
    never = predictions(1, 1, 1, 1)
    assert (
        summarize(never, {("smoke", s): never.correct for s in range(1, 6)})["corruptions"]["all"][
            "relative"
        ]
        is None
    )


def test_every_severity_is_evaluated_once_and_written(tmp_path: Path, capsys) -> None:
    asked = []

    def evaluate(name: str, severity: int) -> Predictions:
        asked.append((name, severity))
        return predictions(*([1] * (severity - 1 if name == "smoke" else 0) + [0] * 4)[:4])

    measure_robustness(evaluate, predictions(0, 0, 0, 0), ("smoke", "defocus"), tmp_path)
    text = capsys.readouterr().out
    assert asked == [(name, s) for name in ("smoke", "defocus") for s in range(1, 6)]
    table = pd.read_csv(tmp_path / "robustness.csv").set_index(["corruption", "severity"])
    assert table["accuracy"]["smoke"].tolist() == [1, 0.75, 0.5, 0.25, 0]
    assert table["accuracy"]["defocus"].tolist() == [1] * 5
    assert "mean corruption accuracy 0.7500, 75.0% of the clean one" in text
    assert (tmp_path / "robustness.png").read_bytes()[:4] == b"\x89PNG"
    assert not any(name in text + table.to_csv() for name in ("0.mp4", " p", " q"))


def test_without_patients_the_loss_is_not_known(tmp_path: Path, capsys) -> None:
    rows = [ClipRow(Path(f"{n}.mp4"), 0) for n in range(4)]
    clean = Predictions(rows, np.eye(2)[[0, 0, 0, 0]])
    measure_robustness(lambda *_: clean, clean, ("smoke",), tmp_path)
    text = capsys.readouterr().out
    assert "lost (95 % interval): not known: there are no two patients to compare" in text


def test_a_data_set_corrupts_each_clip_by_its_index(tmp_path: Path) -> None:
    rows = [ClipRow(make_clip(tmp_path / f"{n}.mp4", 200, seed=1), 0) for n in range(2)]
    clean = ClipsDataset(rows, 4, 32)
    smoky = ClipsDataset(rows, 4, 32, perturbations=[Corrupt("smoke", 3)])
    for index in range(2):
        expected = corrupt(clean[index][0], "smoke", 3, seed=index)
        assert torch.equal(smoky[index][0], expected)
    assert not torch.equal(smoky[0][0], smoky[1][0])
    views = ClipsDataset(rows, 4, 32, views=2, perturbations=[Corrupt("frame_freeze", 5)])
    assert views[0][0].shape == (2, 4, 3, 32, 32)
