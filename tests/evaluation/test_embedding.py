"""The map of the test clips: features to positions, and whose neighbours are whose."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.text import Text

from clips.manifest import ClipRow
from evaluation import embedding
from evaluation.embedding import embed, neighbour_agreement, patient_numbers
from evaluation.plots import plot_embedding
from evaluation.predictions import Predictions
from evaluation.results import draw_embedding

CLASSES = ("cut", "sew", "look")


def islands(n: int = 60, width: int = 20) -> tuple[np.ndarray, np.ndarray]:
    """Features of three groups that lie far from each other, and the groups."""
    rng = np.random.default_rng(0)
    groups = np.arange(n) % 3
    centres = 20 * rng.normal(size=(3, width))
    return (centres[groups] + rng.normal(size=(n, width))).astype(np.float32), groups


def predictions(features: np.ndarray, labels: np.ndarray, patients: list) -> Predictions:
    rows = [
        ClipRow(Path(f"Smith_{i}.mp4"), int(label), patient)
        for i, (label, patient) in enumerate(zip(labels, patients, strict=True))
    ]
    return Predictions(rows, np.eye(3)[labels], features=features)


def test_groups_stay_together_and_the_same_features_give_the_same_map() -> None:
    features, groups = islands()
    found = embed(features)
    assert found.method == (
        "t-SNE (perplexity 19.7) of 20 principal components of the 20 features before the "
        "classifier"
    )
    assert found.clips.tolist() == list(range(60))
    centres = np.stack([found.positions[groups == g].mean(axis=0) for g in range(3)])
    distances = np.linalg.norm(found.positions[:, None] - centres, axis=2)
    assert (distances.argmin(axis=1) == groups).all()
    assert neighbour_agreement(groups, found.neighbours) == (1.0, pytest.approx(19 / 59))
    assert np.array_equal(embed(features).positions, found.positions)


def test_few_clips_are_mapped_by_pca_which_keeps_their_distances() -> None:
    flat = np.array([[0, 0], [3, 0], [0, 4], [3, 4]], np.float32)
    features = flat @ np.linalg.qr(np.random.default_rng(0).normal(size=(9, 2)))[0].T
    found = embed(features)
    assert found.method == "PCA of the 9 features before the classifier"
    wanted = np.linalg.norm(flat[:, None] - flat, axis=2)
    distances = np.linalg.norm(found.positions[:, None] - found.positions, axis=2)
    assert np.allclose(distances, wanted, atol=1e-5)
    assert found.neighbours.tolist() == [1, 0, 3, 2]


@pytest.mark.parametrize(
    "features",
    [np.ones((1, 4)), np.ones((30, 4)), np.arange(5.0)[:, None], np.arange(20.0)[:, None]],
    ids=["one clip", "the same features", "one feature", "one feature, t-SNE"],
)
def test_features_of_less_than_two_dimensions(features: np.ndarray) -> None:
    found = embed(features)
    assert found.positions.shape == (len(features), 2)
    assert np.isfinite(found.positions).all()


def test_of_many_clips_some_are_drawn_and_the_picture_says_so(monkeypatch) -> None:
    monkeypatch.setattr(embedding, "MAX_CLIPS", 15)
    found = embed(islands(60)[0])
    assert len(found.clips) == len(found.positions) == 15
    assert (found.clips[0], found.clips[-1]) == (0, 59)
    assert found.method.endswith(", 15 of 60 clips")


def test_agreement_by_hand() -> None:
    """Of the five neighbours one is of an unknown group; two of the other four agree."""
    groups, neighbours = np.array([0, 0, 1, 1, -1, 1]), np.array([1, 2, 3, 4, 3, 0])
    # Pairs of the five known clips: 2 * 1 + 3 * 2 of 5 * 4
    assert neighbour_agreement(groups, neighbours) == (2 / 4, pytest.approx(8 / 20))
    assert neighbour_agreement(np.zeros(3, int), np.array([1, 0, 0])) is None  # one group
    assert neighbour_agreement(np.full(3, -1), np.array([1, 0, 0])) is None  # none is known
    assert neighbour_agreement(np.array([0, 1]), np.array([0, 1])) is None  # no neighbours


def test_the_files_number_the_patients_and_name_nobody(tmp_path: Path, monkeypatch) -> None:
    features, labels = islands(30)
    patients = ["Smith", "Jones", None] * 10
    tested = predictions(features, labels, patients)
    tested.probabilities[0] = [0, 1, 0]  # a mistake for Smith, who therefore comes first
    figures = []
    monkeypatch.setattr("evaluation.plots.save_figure", lambda *written: figures.append(written))
    draw_embedding(tmp_path / "embedding.png", tested, CLASSES)
    table = pd.read_csv(tmp_path / "embedding.csv")
    assert table["clip"].tolist() == list(range(30))
    assert table["label"].tolist() == [CLASSES[label] for label in labels]
    assert table["prediction"][0] == "sew"
    assert table["patient"].fillna(0).tolist() == [1, 2, 0] * 10
    assert patient_numbers(tested).tolist() == [1, 2, -1] * 10
    texts = [text.get_text() for text in figures[0][0].findobj(Text)]
    shown = "\n".join([*texts, (tmp_path / "embedding.csv").read_text()])
    assert "patient 1 (10)" in texts
    assert "unknown" in texts
    for name in ("Smith", "Jones", ".mp4"):
        assert name not in shown
    assert "not the distance" in " ".join(shown.split())


def test_more_groups_than_there_are_colours_and_markers(tmp_path: Path, monkeypatch) -> None:
    features, labels = islands(60)
    figures = []
    monkeypatch.setattr("evaluation.plots.save_figure", lambda *written: figures.append(written))
    tested = predictions(features, labels, [f"P{n}" for n in range(60)])
    plot_embedding(embed(features), tested, CLASSES, tmp_path / "x.png")
    legend = figures[0][0].axes[1].get_legend()
    names = [text.get_text() for text in legend.get_texts()]
    assert (len(names), names[0], names[-1]) == (50, "patient 1 (1)", "11 more")
