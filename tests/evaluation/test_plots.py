"""What the pictures of a test show: texts, curves and panels."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from evaluation.plots import (
    plot_confusion,
    plot_curves,
    plot_label_efficiency,
    plot_precision_recall,
)


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures, which are not written."""
    drawn: list[Figure] = []
    monkeypatch.setattr("evaluation.plots.save_figure", lambda figure, _: drawn.append(figure))
    return drawn


@pytest.mark.parametrize("n", [3, 40])
def test_a_confusion_matrix_holds_counts_and_shares(n: int, figures: list[Figure]) -> None:
    matrix = np.zeros((n, n), int)
    matrix[0, :3], matrix[1, 1] = (5, 0, 3), 7
    plot_confusion(matrix, [f"class {k}" for k in range(n)], Path("x.png"))
    axes = figures[0].axes[0]
    texts = {(*text.get_position(), text.get_text()) for text in axes.texts}
    wanted = {(0, 0, "5"), (0, 0, "62%"), (2, 0, "3"), (2, 0, "38%"), (1, 1, "7"), (1, 1, "100%")}
    assert texts == wanted | {((n - 1) / 2, row, "no clips") for row in range(2, n)}
    rows = [label.get_text() for label in axes.get_yticklabels()]
    assert rows[:3] == ["class 0  (8)", "class 1  (7)", "class 2  (0)"]
    # The cells are at least as large as their two lines.
    canvas = FigureCanvasAgg(figures[0])
    canvas.draw()
    cell = abs(axes.transData.transform((0, 1)) - axes.transData.transform((0, 0)))[1]
    numbers = [text for text in axes.texts if text.get_text() != "no clips"]
    assert 2 * max(text.get_window_extent(canvas.get_renderer()).height for text in numbers) < cell


def test_the_area_under_a_drawn_curve_is_its_average_precision(figures: list[Figure]) -> None:
    """cut: 0.9 yes, 0.8 no, twice 0.7, once yes: precision 1, then 2 of 4 for the other half of the
    clips. sew: twice 0.3, once yes, 0.2 yes: 1 of 2, then 2 of 3."""
    labels = np.array([0, 1, 0, 1])
    probabilities = np.array([[0.9, 0.1, 0], [0.8, 0.2, 0], [0.7, 0.3, 0], [0.7, 0.3, 0]])
    plot_precision_recall(labels, probabilities, ["cut", "sew", "look"], Path("x.png"))
    cut, sew, look = figures[0].axes[:3]
    x, y = cut.lines[0].get_data()
    assert cut.lines[0].get_drawstyle() == "steps-pre"
    assert (np.diff(x) * y[1:]).sum() == pytest.approx(1 / 2 * 1 + 1 / 2 * 2 / 4)
    assert cut.get_title() == "cut\nAP 0.750, 2 clips"
    assert sew.get_title() == "sew\nAP 0.583, 2 clips"
    assert (look.get_title(), look.texts[0].get_text()) == ("look\nno AP", "no clips of this class")
    assert figures[0].get_suptitle() == "macro average precision 0.667 over 2 classes"


def test_the_curves_hold_the_learning_rate(figures: list[Figure]) -> None:
    row = {"train_loss": 1.0, "val_loss": 1.1, "train_accuracy": 0.5, "val_accuracy": 0.4}
    history = [{"epoch": n, **row, "val_macro_f1": 0.3, "learning_rate": 1e-4 / n} for n in (1, 2)]
    plot_curves(history, 2, Path("x.png"))
    loss, score, rate = figures[0].axes
    assert [axes.get_ylabel() for axes in (loss, score, rate)] == ["loss", "score", "learning rate"]
    assert rate.lines[0].get_ydata().tolist() == [1e-4, 5e-5]
    # The rows of earlier versions may lack it.
    plot_curves([{"epoch": 1, **row, "val_macro_f1": 0.3}], 1, Path("x.png"))
    assert np.isnan(figures[1].axes[2].lines[0].get_ydata()).all()


def label_efficiency(shares: list[float], low: float, high: float, seeds: int) -> list:
    """A table and its trainings, whose scores are 0.4 with the first seed and 0.6 with another."""
    counts = {"clips": [1000 * s for s in shares], "patients": [20 * s for s in shares]}
    scores = {}
    for name in ("accuracy", "macro_f1"):
        scores |= {name: 0.5, f"{name} low": low, f"{name} high": high}
    points = [(share, 0.4 + 0.2 * k, 0.4 + 0.2 * k) for share in shares for k in range(seeds)]
    runs = pd.DataFrame(points, columns=["share", "accuracy", "macro_f1"])
    return [pd.DataFrame({"share": shares, **counts, **scores}), runs]


MAJORITY = {"accuracy": 0.25, "macro_f1": 0.1}


def test_label_efficiency_is_drawn_over_the_real_shares(figures: list[Figure]) -> None:
    tables = label_efficiency([1.0, 0.5, 0.45, 0.05], 0.3, 0.7, seeds=2)  # in any order
    plot_label_efficiency(*tables, MAJORITY, 6, Path("x.png"))
    axes, f1 = figures[0].axes
    assert (axes.get_title(), f1.get_title()) == ("accuracy", "macro-F1")
    assert axes.get_xscale() == "log"
    lines = {line.get_label(): line for line in axes.lines}
    assert lines["mean over the seeds"].get_xdata().tolist() == [0.05, 0.45, 0.5, 1]
    assert sorted(lines["single trainings"].get_ydata()) == pytest.approx([0.4] * 4 + [0.6] * 4)
    assert list(lines["guessing the largest class"].get_ydata()) == [0.25, 0.25]
    assert list(f1.lines[-1].get_ydata()) == [0.1, 0.1]
    (band,) = (c for c in axes.collections if "over 6 test patients" in str(c.get_label()))
    assert set(band.get_paths()[0].vertices[:, 1]) == {0.3, 0.7}
    assert [label.get_text() for label in axes.get_xticklabels()] == [
        "5.0 %\n50 clips\n1 patient",
        "50 %\n500 clips\n10 patients",  # 45 % is too near for a text of its own
        "100 %\n1000 clips\n20 patients",
    ]


@pytest.mark.parametrize("shares", [[0.5], [0.05, 0.1, 0.14, 0.2, 0.27, 0.37, 0.5, 0.75, 1.0]])
def test_label_efficiency_has_texts_that_do_not_overlap(
    shares: list[float], figures: list[Figure]
) -> None:
    """Also with one fraction, one seed and no interval."""
    tables = label_efficiency(shares, float("nan"), float("nan"), seeds=1)
    plot_label_efficiency(*tables, MAJORITY, 1, Path("x.png"))
    axes = figures[0].axes[0]
    assert [line.get_label() for line in axes.lines] == [
        "no interval: one test patient",
        "one training each",
        "guessing the largest class",
    ]
    canvas = FigureCanvasAgg(figures[0])
    canvas.draw()
    boxes = [t.get_window_extent(canvas.get_renderer()) for t in axes.get_xticklabels()]
    assert len(boxes) >= min(4, len(shares))
    assert all(a.x1 < b.x0 for a, b in pairwise(boxes))
