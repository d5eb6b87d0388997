"""What a test reports: every number of a small case by hand, as JSON and as words."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from clips.manifest import ClipRow
from evaluation import results
from evaluation.calibration import Calibration, temper
from evaluation.metrics import brier_scores, expected_calibration_error, log_losses
from evaluation.predictions import Predictions, read_predictions
from evaluation.results import assess, describe, headline, headline_scores, write_results

CLASSES = ("cut", "sew", "look")  # no clip of the last one
ANNA, BERT = "Smith, Anna", "Jones, Bert"
ROWS = (
    ClipRow(Path("0.mp4"), 0, ANNA, "film-1", "deed-1"),
    ClipRow(Path("1.mp4"), 0, ANNA, "film-1", "deed-1"),
    ClipRow(Path("2.mp4"), 1, ANNA, "film-2", "deed-2"),
    ClipRow(Path("3.mp4"), 0, BERT, "film-3", "deed-3"),
    ClipRow(Path("4.mp4"), 1, BERT, "film-3", "deed-4"),
    ClipRow(Path("5.mp4"), 1, BERT, "film-3", "deed-4"),
)
# fmt: off
PROBABILITIES = np.array([
    [0.90, 0.05, 0.05],  # cut, right
    [0.30, 0.60, 0.10],  # cut, wrong; but its action's other part outvotes it: 0.6 to 0.325
    [0.20, 0.80, 0.00],  # sew, right
    [0.70, 0.20, 0.10],  # cut, right
    [0.45, 0.50, 0.05],  # sew, right
    [0.85, 0.10, 0.05],  # sew, wrong; and the vote is lost: 0.65 to 0.3
])
# fmt: on
FITTED = Calibration(1.0, 0.25, 0.65, (0.9, 0.65), (True, True))


def small(**changes: object) -> Predictions:
    """The case above, all rows changed."""
    return Predictions([row._replace(**changes) for row in ROWS], PROBABILITIES)


def strict(found: dict) -> str:
    return json.dumps(found, allow_nan=False)


def test_all_numbers_by_hand() -> None:
    found = assess(small(), CLASSES, [FITTED])
    assert set(found) == {
        *("accuracy", "balanced_accuracy", "macro_f1", "chance_accuracy", "classes_present"),
        *("clips", "loss", "unreadable_clips", "patients", "clips_of_unknown_patient"),
        *("intervals", "averages", "actions", "calibration", "selective", "per_class"),
    }
    # cut: 2 of 3 found, 2 of 3 said; sew: 2 of 3 found, 2 of 3 said
    pooled = {name: pytest.approx(2 / 3) for name in ("accuracy", "balanced_accuracy", "macro_f1")}
    assert {name: found[name] for name in pooled} == pooled
    assert found["chance_accuracy"] == 1 / 2
    assert (found["classes_present"], found["clips"], found["unreadable_clips"]) == (2, 6, 0)
    assert (found["patients"], found["clips_of_unknown_patient"]) == (2, 0)
    nll = -np.log([0.9, 0.3, 0.8, 0.7, 0.5, 0.1]).mean()
    assert found["loss"] == pytest.approx(nll)
    assert found["averages"] == {
        "clip": pooled,
        "video": {
            # film-1: 1 of 2, all cut; film-2: 1 of 1; film-3: cut 1 of 1, sew 1 of 2
            "accuracy": pytest.approx((1 / 2 + 1 + 2 / 3) / 3),
            "balanced_accuracy": pytest.approx((1 / 2 + 1 + 3 / 4) / 3),
            "macro_f1": pytest.approx((2 / 3 + 1 + 2 / 3) / 3),
            "worst_accuracy": pytest.approx(1 / 2),
            "units": 3,
        },
        "patient": {
            # Anna: cut 1 of 2, sew 1 of 1, said sew twice; Bert: cut 1 of 1, sew 1 of 2
            "accuracy": pytest.approx(2 / 3),
            "balanced_accuracy": pytest.approx(3 / 4),
            "macro_f1": pytest.approx(2 / 3),
            "worst_accuracy": pytest.approx(2 / 3),
            "units": 2,
        },
    }
    actions = found["actions"]  # deeds 1 and 3 are cut, both found; 2 and 4 sew, one found
    assert (actions["clips"], actions["accuracy"]) == (4, 3 / 4)
    assert actions["macro_f1"] == pytest.approx((4 / 5 + 2 / 3) / 2)
    assert found["per_class"] == {
        name: {
            **{score: pytest.approx(2 / 3) for score in ("precision", "recall", "f1")},
            "clips": 3,
            "patients": 2,
        }
        for name in ("cut", "sew")
    } | {"look": {"precision": None, "recall": None, "f1": None, "clips": 0, "patients": 0}}
    brier = 0.015 + 0.86 + 0.08 + 0.14 + 0.455 + 1.535
    assert found["calibration"]["temperature"] == 1
    assert found["calibration"]["brier"] == pytest.approx(brier / 6)
    assert found["calibration"]["nll"] == pytest.approx(nll)
    # No two confidences share one of 15 bins: the mean of |right - confidence|.
    ece = (0.1 + 0.6 + 0.2 + 0.3 + 0.5 + 0.85) / 6
    assert found["calibration"]["ece"] == pytest.approx(ece)
    # From sure to unsure: 0.9 right, 0.85 wrong, 0.8, 0.7 right, 0.6 wrong, 0.5 right
    assert found["selective"] == {
        "wanted_error": 0.25,
        "threshold": 0.65,
        "coverage": pytest.approx(4 / 6),
        "error": pytest.approx(1 / 4),
        "aurc": pytest.approx((0 + 1 / 2 + 1 / 3 + 1 / 4 + 2 / 5 + 2 / 6) / 6),
    }


def test_headline_scores_count_what_is_missing() -> None:
    predictions = small()
    predictions.unreadable += ["6.mp4: damaged", "7.mp4: damaged"]
    found = headline_scores(predictions)
    assert found["unreadable_clips"] == 2
    assert found["clips"] == 6
    assert "MISSING: 2 clips" in headline(found)
    assert "MISSING: 2 clips" in describe(assess(predictions, CLASSES, [FITTED]))
    assert "MISSING" not in describe(assess(small(), CLASSES, [FITTED]))


def some_unknown() -> Predictions:
    rows = [row._replace(patient=None) if row.patient == BERT else row for row in ROWS]
    return Predictions(rows, PROBABILITIES)


@pytest.mark.parametrize(
    ("predictions", "patients", "unknown"),
    [
        (small(), 2, 0),
        (small(patient=ANNA), 1, 0),
        (small(patient=None), 0, 6),
        (small(patient=None, video=None, action=None), 0, 6),
        (some_unknown(), 1, 3),
        (small(label=2), 2, 0),  # one class, never found
        (Predictions(ROWS[:1], PROBABILITIES[:1]), 1, 0),  # a single clip
    ],
    ids=["all", "one patient", "no patients", "nothing known", "unknown", "one class", "one clip"],
)
@pytest.mark.parametrize(
    "calibration", [Calibration(), FITTED, Calibration(2.0, 0.1, None, (0.9,), (False,))]
)
def test_json_knows_every_number(
    predictions: Predictions, patients: int, unknown: int, calibration: Calibration
) -> None:
    with np.errstate(divide="raise", invalid="raise"):  # no warning on the screen either
        found = assess(predictions, CLASSES, [calibration])
    assert json.loads(strict(found)) == found
    assert (found["patients"], found["clips_of_unknown_patient"]) == (patients, unknown)
    assert describe(json.loads(strict(found))) == describe(found)


def test_one_patient_has_no_interval() -> None:
    found = assess(small(patient=ANNA), CLASSES, [FITTED])
    assert [both["patients"] for both in found["intervals"].values()] == [None] * 5
    assert None not in [both["clips"] for both in found["intervals"].values()]
    assert "no 95 % interval: one patient" in describe(found)


def test_no_patient_known_is_said() -> None:
    words = describe(assess(small(patient=None), CLASSES, [FITTED]))
    assert words.count("no patient is known, so it may be far too narrow") == 2
    assert "over 0 patients" not in words
    assert "averaged over 3 videos" in words
    assert "far too narrow" not in describe(assess(small(), CLASSES, [FITTED]))


def test_nothing_is_said_of_what_is_unknown() -> None:
    found = assess(small(patient=None, video=None, action=None), CLASSES, [FITTED])
    assert found["actions"] == {}
    assert found["averages"]["video"] == found["averages"]["patient"] == {}
    words = describe(found)
    assert "averaged over" not in words
    assert "source actions" not in words


def test_words_hold_the_numbers() -> None:
    found = assess(small(), CLASSES, [FITTED])
    words = describe(found)
    assert "6 clips: accuracy 0.6667" in words
    low, high = found["intervals"]["accuracy"]["patients"]
    naive = found["intervals"]["accuracy"]["clips"]
    assert f"accuracy: 95 % interval {low:.3f} to {high:.3f} over 2 patients" in words
    assert f"(clips taken as independent: {naive[0]:.3f} to {naive[1]:.3f})" in words
    assert "averaged over 2 patients: accuracy 0.6667 (the worst: 0.6667)" in words
    assert "averaged over 3 videos: accuracy 0.7222 (the worst: 0.5000)" in words
    assert "one vote for each of 4 source actions: accuracy 0.7500" in words
    assert "at temperature 1.000" in words
    assert "uncertain below 0.650 (for at most 25% wrong" in words
    assert "answers 66.7% of the clips, 25.0% of the answers are wrong" in words
    look = next(line for line in words.splitlines() if line.startswith("look"))
    assert look.split() == ["look", "-", "-", "-", "0", "0"]  # no clip: no score


def test_words_about_the_threshold() -> None:
    none = Calibration()
    never = Calibration(1.0, 0.1, None, (0.9,), (False,))
    assert "the checkpoint has no threshold" in describe(assess(small(), CLASSES, [none]))
    assert "all is uncertain (for at most 10% wrong" in describe(assess(small(), CLASSES, [never]))


@pytest.mark.parametrize("patients", [(ANNA, BERT), (ANNA, ANNA), (ANNA, None)])
def test_words_name_nobody(patients: tuple[str | None, str | None]) -> None:
    names = dict(zip((ANNA, BERT), patients, strict=True))
    rows = [row._replace(patient=names[row.patient]) for row in ROWS]
    predictions = Predictions(rows, PROBABILITIES, [f"/data/{ANNA}/film-9.mp4: damaged"])
    words = describe(assess(predictions, CLASSES, [FITTED]))
    for part in ("Smith", "Anna", "Jones", "Bert", "film-", "deed-", ".mp4"):
        assert part not in words


def test_every_clip_by_the_model_of_its_fold() -> None:
    first = Calibration(2.0, 0.1, 0.75, (0.9,), (True,))
    second = Calibration(0.5, 0.1, 0.6, (0.9,), (True,))
    found = assess(small(), CLASSES, [first] * 3 + [second] * 3)
    assert found["calibration"]["temperature"] is None
    assert found["selective"]["threshold"] is None
    # first: 0.9, 0.6, 0.8 above 0.75: two, right; second: 0.7, 0.5, 0.85 above 0.6: two, one wrong
    assert found["selective"]["coverage"] == pytest.approx(4 / 6)
    assert found["selective"]["error"] == pytest.approx(1 / 4)
    words = describe(found)
    assert "at each model's temperature" in words
    assert "uncertain below each model's threshold" in words
    same = assess(small(), CLASSES, [first] * 6)
    assert same == assess(small(), CLASSES, [first])
    assert (same["calibration"]["temperature"], same["selective"]["threshold"]) == (2.0, 0.75)


def test_a_fold_that_answers_nothing() -> None:
    never = Calibration(1.0, 0.1, None, (0.9,), (False,))
    found = assess(small(), CLASSES, [never] * 3 + [FITTED] * 3)
    assert found["selective"]["threshold"] is None
    # of the second fold's 0.7, 0.5, 0.85 two are above 0.65, one of them wrong
    assert found["selective"]["coverage"] == pytest.approx(2 / 6)
    assert found["selective"]["error"] == pytest.approx(1 / 2)
    strict(found)


@pytest.mark.parametrize("temperatures", [[2.5], [0.4], [2.5, 2.5, 2.5, 0.4, 0.4, 1.0]])
def test_before_is_before_tempering(temperatures: list[float]) -> None:
    raw = PROBABILITIES * 0.97 + 0.01
    labels = small().labels
    tempered = Predictions(list(ROWS), temper(raw, np.array(temperatures)))
    calibrations = [Calibration(one, 0.1, 0.5, (0.9,), (True,)) for one in temperatures]
    found = assess(tempered, CLASSES, calibrations)["calibration"]
    for scores, probabilities in ((found["before"], raw), (found, tempered.probabilities)):
        right = probabilities.argmax(axis=1) == labels
        ece = expected_calibration_error(probabilities.max(axis=1), right)
        assert scores["ece"] == pytest.approx(ece)
        assert scores["brier"] == pytest.approx(brier_scores(labels, probabilities).mean())
        assert scores["nll"] == pytest.approx(log_losses(labels, probabilities).mean())
    assert found["nll"] != pytest.approx(found["before"]["nll"], rel=1e-3)


def test_files(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"
    words = write_results(small(), CLASSES, folder, [FITTED], {"split": "test", "views": 2})
    found = assess(small(), CLASSES, [FITTED])
    assert words == describe(found)
    assert {path.name for path in folder.iterdir()} == {
        *("test_metrics.json", "predictions.csv", "confusion_matrix.csv", "confusion_matrix.png")
    }
    written = json.loads((folder / "test_metrics.json").read_text())
    assert written == {**found, "split": "test", "views": 2}
    counts = pd.read_csv(folder / "confusion_matrix.csv", index_col=0)
    assert counts.index.tolist() == counts.columns.tolist() == list(CLASSES)
    assert counts.to_numpy().tolist() == [[2, 1, 0], [1, 2, 0], [0, 0, 0]]
    read, classes = read_predictions(folder / "predictions.csv")
    assert classes == list(CLASSES)
    assert read.rows == list(ROWS)
    answers = pd.read_csv(folder / "predictions.csv")["answer"].tolist()
    assert answers == ["cut", "uncertain", "sew", "cut", "uncertain", "cut"]  # below 0.65


def test_files_of_several_folds(tmp_path: Path) -> None:
    never = Calibration(1.0, 0.1, None, (0.9,), (False,))
    write_results(small(), CLASSES, tmp_path, [never] * 3 + [FITTED] * 3)
    answers = pd.read_csv(tmp_path / "predictions.csv")["answer"].tolist()
    assert answers == ["uncertain"] * 3 + ["cut", "uncertain", "cut"]


@pytest.mark.parametrize("writer", ["plot_confusion", "write_predictions"])
def test_metrics_are_written_last(
    writer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who finds a test_metrics.json finds everything else."""

    def fail(*_: object) -> None:
        raise RuntimeError("disk full")

    monkeypatch.setattr(results, writer, fail)
    with pytest.raises(RuntimeError, match="disk full"):
        write_results(small(), CLASSES, tmp_path, [FITTED])
    assert not list(tmp_path.glob("*test_metrics*"))
    assert not list(tmp_path.glob(".*"))  # nor anything unfinished
