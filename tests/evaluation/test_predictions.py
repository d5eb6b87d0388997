"""predictions.csv comes back as it was written, whatever clips, patients and classes are called."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from clips.manifest import ClipRow
from evaluation.predictions import Predictions, read_predictions, write_predictions
from utils.errors import UserError

CLASSES = ["cut", "sew", "look"]
HEADER = "path,label,prediction,decision,patient,video,action,p_cut,p_sew\n"


def of_rows(*rows: ClipRow, num_classes: int = 3) -> Predictions:
    """Predictions for these clips: random probabilities with all digits of a float."""
    rng = np.random.default_rng(len(rows))
    return Predictions(list(rows), rng.dirichlet(np.ones(num_classes), len(rows)))


def test_properties_by_hand() -> None:
    rows = [
        ClipRow(Path("a"), 0, "x", "v", "s"),
        ClipRow(Path("b"), 2, None, "v"),
        ClipRow(Path("c"), 2, "y", None, "s"),
    ]
    predictions = Predictions(rows, np.array([[0.5, 0.3, 0.2], [0.1, 0.7, 0.2], [0.25, 0.35, 0.4]]))
    assert len(predictions) == 3
    assert predictions.labels.tolist() == [0, 2, 2]
    assert predictions.y_pred.tolist() == [0, 1, 2]
    assert predictions.confidence.tolist() == [0.5, 0.7, 0.4]
    assert predictions.correct.tolist() == [True, False, True]
    assert predictions.confusion.tolist() == [[1, 0, 0], [0, 0, 0], [0, 1, 1]]
    assert predictions.loss == pytest.approx(-(np.log(0.5) + np.log(0.2) + np.log(0.4)) / 3)
    assert predictions.groups("patient").tolist() == ["x", None, "y"]
    assert predictions.groups("video").tolist() == ["v", "v", None]
    assert predictions.groups("action").tolist() == ["s", None, "s"]


def test_groups_of_equally_long_names_stay_names() -> None:
    """numpy turns some lists of names into arrays of letters or numbers."""
    groups = of_rows(ClipRow(Path("a"), 0, "058"), ClipRow(Path("b"), 1, "058")).groups("patient")
    assert groups.shape == (2,)
    assert groups.dtype == object


@pytest.mark.parametrize(
    "name",
    [
        "058",
        "NA",
        "nan",
        "None",
        "null",
        "1e5",
        "inf",
        "True",
        " x ",
        "-",
        "Müller, Ö.",
        '"q"',
        "#",
    ],
)
def test_patients_come_back_by_their_names(name: str, tmp_path: Path) -> None:
    rows = [ClipRow(Path("a.mp4"), 1, name, name, name), ClipRow(Path("b.mp4"), 0)]
    written = of_rows(*rows)
    write_predictions(tmp_path / "p.csv", written, CLASSES, 0.0)
    read, _, _ = read_predictions(tmp_path / "p.csv")
    assert read.rows == rows


def test_an_empty_name_is_an_unknown_one(tmp_path: Path) -> None:
    written = of_rows(ClipRow(Path("a"), 1, "", None, ""), ClipRow(Path("b"), 0, None, "", None))
    write_predictions(tmp_path / "p.csv", written, CLASSES, 0.0)
    read, _, _ = read_predictions(tmp_path / "p.csv")
    assert read.rows == [ClipRow(Path("a"), 1), ClipRow(Path("b"), 0)]


@pytest.mark.parametrize(
    "path",
    [
        "with, comma.mp4",
        'with "quotes".mp4',
        "with\nnewline.mp4",
        "with\r\nboth.mp4",
        "手术/Schädel–ö.mp4",
        "-1",
        "NA",
        "back\\slash",
        "'=1+1",
    ],
)
def test_paths_come_back(path: str, tmp_path: Path) -> None:
    rows = [ClipRow(Path(path), 2, "x"), ClipRow(Path("/other/clip.mp4"), 0, "y")]
    write_predictions(tmp_path / "p.csv", of_rows(*rows), CLASSES, 0.0)
    read, _, _ = read_predictions(tmp_path / "p.csv")
    assert read.rows == rows


@pytest.mark.parametrize(
    "classes",
    [
        ["cut, deep", 'the "cut"', "<script>alert(1)</script>"],
        ["NA", "nan", ""],
        ["058", "58", "5.8e1"],
        ["p_cut", "cut", "path"],
        ["Nähen", "切", "two\nlines"],
        ["label", "prediction", "patient"],
    ],
)
def test_classes_come_back_in_their_order(classes: list[str], tmp_path: Path) -> None:
    rows = [ClipRow(Path(f"{number}.mp4"), number % 3) for number in range(6)]
    written = of_rows(*rows)
    write_predictions(tmp_path / "p.csv", written, classes, 0.0)
    read, names, _ = read_predictions(tmp_path / "p.csv")
    assert names == classes
    assert read.rows == rows
    assert (read.y_pred == written.y_pred).all()


def test_probabilities_come_back_to_nine_digits(tmp_path: Path) -> None:
    written = of_rows(*[ClipRow(Path(str(number)), 0) for number in range(50)])
    written.probabilities[:3] = [[1, 0, 0], [1 - 2e-12, 1e-12, 1e-12], [1e-300, 0.5, 0.5]]
    write_predictions(tmp_path / "p.csv", written, CLASSES, 0.0)
    read, _, _ = read_predictions(tmp_path / "p.csv")
    assert read.probabilities.dtype == float
    assert np.allclose(read.probabilities, written.probabilities, rtol=1e-8, atol=0)
    assert read.loss == pytest.approx(written.loss)


@pytest.mark.parametrize(
    ("thresholds", "expected"),
    [
        (0.0, ["cut", "sew", "look"]),
        (0.7, ["uncertain", "sew", "uncertain"]),  # exactly the threshold is enough
        (0.71, ["uncertain"] * 3),
        (np.inf, ["uncertain"] * 3),
        (np.array([0.5]), ["cut", "sew", "uncertain"]),
        (np.array([0.6, np.inf, 0.4]), ["uncertain", "uncertain", "look"]),  # one per clip
    ],
)
def test_below_the_threshold_the_decision_is_uncertain(
    thresholds: float | np.ndarray, expected: list[str], tmp_path: Path
) -> None:
    predictions = Predictions(
        [ClipRow(Path(name), 0) for name in "abc"],
        np.array([[0.5, 0.3, 0.2], [0.1, 0.7, 0.2], [0.25, 0.35, 0.4]]),
    )
    write_predictions(tmp_path / "p.csv", predictions, CLASSES, thresholds)
    table = pd.read_csv(tmp_path / "p.csv")
    assert table["decision"].tolist() == expected
    assert table["prediction"].tolist() == ["cut", "sew", "look"]
    assert table["label"].tolist() == ["cut"] * 3
    assert table["p_sew"].tolist() == [0.3, 0.7, 0.35]
    decided = read_predictions(tmp_path / "p.csv")[2]
    assert decided.tolist() == [name != "uncertain" for name in expected]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no such file"),
        ("", "not a predictions.csv"),
        (HEADER, "holds no predictions"),
        ("path,label,patient\na.mp4,cut,x\n", "not a predictions.csv"),  # a manifest
        (HEADER.replace("patient", "person") + "a,cut,cut,cut,,,,0.6,0.4\n", "not a predictions"),
        (HEADER.replace("p_", "q_") + "a,cut,cut,cut,,,,0.6,0.4\n", "not a predictions.csv"),
        (HEADER + "a,fry,cut,cut,,,,0.6,0.4\n", "not a predictions.csv"),  # label of no class
        (HEADER + "a,cut,cut,cut,,,,much,0.4\n", "not a predictions.csv"),
        (HEADER + "a,cut,cut,cut,,,,0.6\n", "not a predictions.csv"),  # cut off
        (HEADER + '"a,cut,cut,cut,,,,0.6,0.4\n', "not a predictions.csv"),
        ("\x89PNG\r\n\x1a\n\0\0", "not a predictions.csv"),
    ],
)
def test_what_is_not_ours_is_one_line(text: str | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "p.csv"
    if text is not None:
        path.write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=message) as raised:
        read_predictions(path)
    assert str(raised.value).startswith(f"{path}: ")
    assert "\n" not in str(raised.value)


def test_files_of_earlier_versions_are_read(tmp_path: Path) -> None:
    """The column `decision` was called `answer`, and before that there was none."""
    rows = ("a,sew,cut,cut,x,,,0.6,0.4\n", "b,sew,cut,uncertain,x,,,0.5,0.5\n")
    (tmp_path / "p.csv").write_text(HEADER.replace("decision", "answer") + "".join(rows))
    assert read_predictions(tmp_path / "p.csv")[2].tolist() == [True, False]
    (tmp_path / "p.csv").write_text(HEADER.replace("decision,", "") + "a,sew,cut,x,,,0.6,0.4\n")
    read, _, decided = read_predictions(tmp_path / "p.csv")
    assert (decided.tolist(), read.rows[0].patient) == ([True], "x")


def test_folds_are_a_column_of_their_own(tmp_path: Path) -> None:
    written = of_rows(ClipRow(Path("a"), 1, "x"), ClipRow(Path("b"), 0))
    write_predictions(tmp_path / "p.csv", written, CLASSES, 0.0, ["fold2", "fold1"])
    assert pd.read_csv(tmp_path / "p.csv")["fold"].tolist() == ["fold2", "fold1"]
    assert read_predictions(tmp_path / "p.csv")[0].rows == written.rows


def test_the_same_file_without_the_mistake_is_read(tmp_path: Path) -> None:
    """The file that the cases above were made from."""
    (tmp_path / "p.csv").write_text(HEADER + "a,sew,cut,cut,x,,,0.6,0.4\n")
    read, classes, _ = read_predictions(tmp_path / "p.csv")
    assert classes == ["cut", "sew"]
    assert read.rows == [ClipRow(Path("a"), 1, "x")]
    assert read.probabilities.tolist() == [[0.6, 0.4]]
    assert read.unreadable == []


def test_hostile_names_come_back_and_are_harmless(tmp_path: Path) -> None:
    classes = ["=1+1", "-a", "x;y", "a,b"]
    names = ["=a.mp4", " b.mp4", 'c"\n.mp4', "+d.mp4"]
    rows = [ClipRow(Path(name), n, "@p", "'=v", None) for n, name in enumerate(names)]
    predictions = Predictions(rows, np.eye(4))
    write_predictions(tmp_path / "p.csv", predictions, classes, 0.0)
    read, known, decided = read_predictions(tmp_path / "p.csv")
    assert (read.rows, known, decided.all()) == (rows, classes, True)
    cells = pd.read_csv(tmp_path / "p.csv", dtype=str, keep_default_na=False).to_numpy().ravel()
    assert not [cell for cell in cells if cell.startswith(("=", "+", "-", "@"))]
