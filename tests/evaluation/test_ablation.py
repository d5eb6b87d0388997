"""Levers: gains by hand, intervals that know that seeds share their clips."""

from pathlib import Path

import numpy as np
import pytest

from clips.manifest import ClipRow
from evaluation.ablation import lever_table
from evaluation.predictions import Predictions
from utils.errors import UserError


def said(right: list[bool], order: list[int] | None = None) -> Predictions:
    """Two classes, four clips a patient; where not right, the other class."""
    labels = np.arange(len(right)) % 2
    rows = [ClipRow(Path(f"{n:03d}.mp4"), int(labels[n]), f"p{n // 4}") for n in range(len(right))]
    answers = np.where(right, labels, 1 - labels)
    probabilities = np.where(np.arange(2) == answers[:, None], 0.9, 0.1)
    order = order or list(range(len(right)))
    return Predictions([rows[n] for n in order], probabilities[order])


ALL = [True] * 16
NONE_OF_P0 = [n >= 4 for n in range(16)]


def test_means_deviations_and_gains() -> None:
    two_wrong = [n >= 2 for n in range(16)]
    table = lever_table(
        {"recipe": [said(two_wrong), said(ALL)], "other": [said(NONE_OF_P0), said(two_wrong)]}
    )
    recipe, other = table.to_dict(orient="records")
    assert recipe["accuracy"] == pytest.approx((14 / 16 + 1) / 2)
    assert recipe["accuracy sd"] == pytest.approx(np.std([14 / 16, 1], ddof=1))
    assert recipe["accuracy gain"] == recipe["accuracy gain low"] == 0
    assert other["accuracy"] == pytest.approx((12 / 16 + 14 / 16) / 2)
    assert other["accuracy gain"] == pytest.approx(-0.125)
    f1 = np.mean([said(NONE_OF_P0).scores["macro_f1"], said(two_wrong).scores["macro_f1"]])
    assert other["macro_f1"] == pytest.approx(f1)
    assert other["seeds"] == 2


def test_the_same_answers_gain_exactly_nothing() -> None:
    shuffled = np.random.default_rng(0).permutation(16).tolist()  # folds come in any order
    table = lever_table({"recipe": [said(NONE_OF_P0)], "same": [said(NONE_OF_P0, shuffled)]})
    same = table.iloc[1]
    for name in ("accuracy", "macro_f1"):
        assert same[name] == table.iloc[0][name]
        assert same[f"{name} gain"] == same[f"{name} gain low"] == same[f"{name} gain high"] == 0
    assert np.isnan(same["accuracy sd"])


def test_a_gain_with_one_patient_alone_may_be_chance() -> None:
    """Eight clips gained: of two patients whole, or one each of eight among ten."""
    two_patients = [n >= 8 for n in range(40)]
    one_each = [n % 4 > 0 or n >= 32 for n in range(40)]
    found = {}
    for name, recipe in (("two", two_patients), ("each", one_each)):
        found[name] = lever_table({"recipe": [said(recipe)], name: [said([True] * 40)]}).iloc[1]
        assert found[name]["accuracy gain"] == pytest.approx(0.2)
    assert found["two"]["accuracy gain low"] == 0
    assert found["each"]["accuracy gain low"] > 0.01
    assert found["each"]["accuracy gain high"] < found["two"]["accuracy gain high"]


def test_other_clips_are_refused() -> None:
    fewer = said(ALL)
    fewer = Predictions(fewer.rows[:-1], fewer.probabilities[:-1])
    with pytest.raises(UserError, match=r"lever: was tested on other clips than recipe"):
        lever_table({"recipe": [said(ALL)], "lever": [fewer]})
