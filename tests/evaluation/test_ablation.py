"""Ablations: differences by hand, and intervals that respect that seeds share their clips."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from clips.manifest import ClipRow
from evaluation.ablation import ablation_table, label_table, majority_scores
from evaluation.predictions import Predictions
from utils.errors import UserError


def predictions(correct: list[bool], order: list[int] | None = None) -> Predictions:
    """Two classes and four clips per patient; a wrong prediction is the other class."""
    n, labels = len(correct), np.arange(len(correct)) % 2
    rows = [ClipRow(Path(f"{i:03d}.mp4"), int(labels[i]), f"p{i // 4}") for i in range(n)]
    y_pred = np.where(correct, labels, 1 - labels)
    probabilities = np.where(np.arange(2) == y_pred[:, None], 0.9, 0.1)
    order = order or list(range(n))
    return Predictions([rows[n] for n in order], probabilities[order])


ALL = [True] * 16
NONE_OF_P0 = [n >= 4 for n in range(16)]


def test_means_deviations_and_deltas() -> None:
    two_wrong = [n >= 2 for n in range(16)]
    table = ablation_table(
        {
            "baseline": [predictions(two_wrong), predictions(ALL)],
            "other": [predictions(NONE_OF_P0), predictions(two_wrong)],
        }
    )
    baseline, other = table.to_dict(orient="records")
    assert baseline["accuracy"] == pytest.approx((14 / 16 + 1) / 2)
    assert baseline["accuracy sd"] == pytest.approx(np.std([14 / 16, 1], ddof=1))
    assert baseline["accuracy delta"] == baseline["accuracy delta low"] == 0
    assert other["accuracy"] == pytest.approx((12 / 16 + 14 / 16) / 2)
    assert other["accuracy delta"] == pytest.approx(-0.125)
    f1 = np.mean(
        [predictions(NONE_OF_P0).scores["macro_f1"], predictions(two_wrong).scores["macro_f1"]]
    )
    assert other["macro_f1"] == pytest.approx(f1)
    assert other["seeds"] == 2


def test_the_same_predictions_have_a_delta_of_exactly_zero() -> None:
    shuffled = np.random.default_rng(0).permutation(16).tolist()  # folds come in any order
    table = ablation_table(
        {"baseline": [predictions(NONE_OF_P0)], "same": [predictions(NONE_OF_P0, shuffled)]}
    )
    same = table.iloc[1]
    for name in ("accuracy", "macro_f1"):
        assert same[name] == table.iloc[0][name]
        assert same[f"{name} delta"] == same[f"{name} delta low"] == same[f"{name} delta high"] == 0
    assert np.isnan(same["accuracy sd"])


def test_a_delta_of_two_patients_may_be_chance() -> None:
    """Eight clips gained: all of two patients, or one each of eight patients among ten."""
    two_patients = [n >= 8 for n in range(40)]
    one_each = [n % 4 > 0 or n >= 32 for n in range(40)]
    found = {}
    for name, baseline in (("two", two_patients), ("each", one_each)):
        found[name] = ablation_table(
            {"baseline": [predictions(baseline)], name: [predictions([True] * 40)]}
        ).iloc[1]
        assert found[name]["accuracy delta"] == pytest.approx(0.2)
    assert found["two"]["accuracy delta low"] == 0
    assert found["each"]["accuracy delta low"] > 0.01
    assert found["each"]["accuracy delta high"] < found["two"]["accuracy delta high"]


def test_other_clips_are_refused() -> None:
    fewer = predictions(ALL)
    fewer = Predictions(fewer.rows[:-1], fewer.probabilities[:-1])
    with pytest.raises(UserError, match=r"other: was tested on other clips than baseline"):
        ablation_table({"baseline": [predictions(ALL)], "other": [fewer]})


def test_label_table_has_means_of_what_was_used_and_the_scores_of_ablation_table() -> None:
    tested = {0.1: [predictions(NONE_OF_P0), predictions(ALL)], 1.0: [predictions(ALL)] * 2}
    used = {"share": [0.1, 0.2, 1, 1], "patients": [1, 2, 9, 9], "clips": [10, 20, 100, 100]}
    runs = pd.DataFrame({"fraction": [0.1, 0.1, 1.0, 1.0], **used})
    small, full = label_table(runs, tested).to_dict(orient="records")
    assert (small["fraction"], small["share"]) == (0.1, pytest.approx(0.15))
    assert (small["patients"], small["clips"], small["seeds"]) == (1.5, 15, 2)
    assert (full["fraction"], full["share"], full["patients"], full["clips"]) == (1, 1, 9, 100)
    wanted = ablation_table({"full": tested[1.0], "small": tested[0.1]}).to_dict(orient="records")
    for name in ("accuracy", "accuracy low", "accuracy high", "macro_f1", "macro_f1 sd"):
        assert full[name] == wanted[0][name]
        assert small[name] == wanted[1][name]


def test_majority_scores() -> None:
    """6 clips of class 1 and 2 of class 0: F1 is 2 * 6 / (6 + 8) for class 1 and 0 for class 0."""
    rows = [ClipRow(Path(f"{n}"), int(n < 6)) for n in range(8)]
    scores = majority_scores(Predictions(rows, np.full((8, 2), 0.5)))
    assert scores == {"accuracy": 0.75, "macro_f1": pytest.approx(6 / 14)}
