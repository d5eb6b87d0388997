"""The comparison of scores of novelty: by hand, and once as a whole."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from benchmarks.novelty import auroc, auroc_interval, main, novelty_scores


def test_auroc_by_hand() -> None:
    assert auroc(np.array([0.0, 1.0]), np.array([2.0])) == 1
    assert auroc(np.array([0.0, 1.0, 2.0, 3.0]), np.array([1.0, 4.0])) == (1.5 / 4 + 1) / 2
    assert auroc(np.ones(3), np.ones(2)) == 0.5
    low, high = auroc_interval(np.arange(20.0), ["a"] * 10 + ["b"] * 10, np.arange(10.0, 30.0))
    assert low < auroc(np.arange(20.0), np.arange(10.0, 30.0)) < high


def test_scores_by_hand() -> None:
    known = np.array([[2.0, 0], [1, 0], [0, 1], [0, 3]])
    logits, features = np.array([[np.log(3), 0.0]]), np.array([[3.0, 3.0]])
    scores = novelty_scores(logits, features, known, np.array([0, 0, 1, 1]), 2)
    half = 0.5**0.5
    assert scores["energy"] == pytest.approx([-np.log(4)])
    assert scores["1 - max softmax"] == pytest.approx([0.25])
    assert scores["cosine to class means"] == pytest.approx([1 - half])
    assert scores["k nearest, k = 2"] == pytest.approx([np.sqrt(2 - 2 * half)])
    # centred: (+-0.5, 0) and (0, +-1); the variances are 1/8 and 1/2, with a ridge of 1/320
    x, y = 1 / 8 + 1 / 320, 1 / 2 + 1 / 320
    nearest = min(1.5**2 / x + 9 / y, 9 / x + 1 / y)
    assert scores["Mahalanobis"] == pytest.approx([nearest])


def test_the_command(trained, tiny_data: Path, tmp_path: Path, run_main) -> None:
    others = (tiny_data / "clips" / "test", tiny_data / "val.csv")
    run_main(main, trained[0], *others, "--output", "out", cwd=tmp_path)
    table = pd.read_csv(tmp_path / "out" / "novelty.csv")
    assert list(table["other clips"]) == ["test"] * 5 + ["val.csv"] * 5
    assert (table["AUROC"][:5] == 0.5).all()  # the test clips themselves
    assert table["AUROC"].between(0, 1).all()
