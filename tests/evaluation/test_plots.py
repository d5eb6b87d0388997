"""What the pictures of a test show: texts, curves and panels."""

from pathlib import Path

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from evaluation.plots import plot_confusion, plot_curves, plot_precision_recall


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
