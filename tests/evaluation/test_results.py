"""The results of a test: every number of a small case by hand, as JSON and as text."""

import json
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from clips.manifest import ClipRow
from evaluation.calibration import Calibration, apply_temperature
from evaluation.embedding import embed
from evaluation.metrics import brier_scores, expected_calibration_error, per_sample_nll
from evaluation.plots import (
    plain_text,
    plot_confusion,
    plot_embedding,
    plot_precision_recall,
    save_figure,
)
from evaluation.predictions import Predictions, read_predictions
from evaluation.results import (
    compute_results,
    format_results,
    headline,
    read_results,
    write_results,
)
from utils.errors import UserError

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
    [0.90, 0.05, 0.05],  # cut, correct
    [0.30, 0.60, 0.10],  # cut, wrong; but the mean of its action is correct: 0.6 to 0.325
    [0.20, 0.80, 0.00],  # sew, correct
    [0.70, 0.20, 0.10],  # cut, correct
    [0.45, 0.50, 0.05],  # sew, correct
    [0.85, 0.10, 0.05],  # sew, wrong; and so is the mean: 0.65 to 0.3
])
# fmt: on
FITTED = Calibration(1.0, 0.25, 0.65, (0.9, 0.65), (True, True))


def small(**changes: object) -> Predictions:
    """The case above, with these changes to all rows."""
    return Predictions([row._replace(**changes) for row in ROWS], PROBABILITIES)


def strict(found: dict) -> str:
    return json.dumps(found, allow_nan=False)


def test_all_numbers_by_hand() -> None:
    found = compute_results(small(), CLASSES, [FITTED])
    assert set(found) == {
        *("accuracy", "balanced_accuracy", "macro_f1", "majority_baseline", "classes_present"),
        *("clips", "loss", "unreadable_clips", "patients", "clips_of_unknown_patient"),
        "macro_average_precision",
        *("intervals", "averages", "actions", "calibration", "selective", "per_class"),
    }
    # cut: recall 2 of 3, precision 2 of 3; sew: the same
    pooled = {name: pytest.approx(2 / 3) for name in ("accuracy", "balanced_accuracy", "macro_f1")}
    assert {name: found[name] for name in pooled} == pooled
    assert found["majority_baseline"] == 1 / 2
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
            "groups": 3,
        },
        "patient": {
            # Anna: cut 1 of 2, sew 1 of 1, sew predicted twice; Bert: cut 1 of 1, sew 1 of 2
            "accuracy": pytest.approx(2 / 3),
            "balanced_accuracy": pytest.approx(3 / 4),
            "macro_f1": pytest.approx(2 / 3),
            "worst_accuracy": pytest.approx(2 / 3),
            "groups": 2,
        },
    }
    actions = found["actions"]  # deeds 1 and 3 are cut, both found; 2 and 4 sew, one found
    assert (actions["clips"], actions["accuracy"]) == (4, 3 / 4)
    assert actions["macro_f1"] == pytest.approx((4 / 5 + 2 / 3) / 2)
    # By falling probability, cut is: 0.9 yes, 0.85 no, 0.7 yes, 0.45 no, 0.3 yes, 0.2 no; and sew:
    # 0.8 yes, 0.6 no, 0.5 yes, 0.2 no, 0.1 yes, 0.05 no. Precision 1 of 1, 2 of 3, 3 of 5.
    average_precision = (1 + 2 / 3 + 3 / 5) / 3
    assert found["macro_average_precision"] == pytest.approx(average_precision)
    assert found["per_class"] == {
        name: {
            **{score: pytest.approx(2 / 3) for score in ("precision", "recall", "f1")},
            "average_precision": pytest.approx(average_precision),
            "clips": 3,
            "patients": 2,
        }
        for name in ("cut", "sew")
    } | {
        "look": {
            **dict.fromkeys(("precision", "recall", "f1", "average_precision")),
            "clips": 0,
            "patients": 0,
        }
    }
    brier = 0.015 + 0.86 + 0.08 + 0.14 + 0.455 + 1.535
    assert found["calibration"]["temperature"] == 1
    assert found["calibration"]["brier"] == pytest.approx(brier / 6)
    assert found["calibration"]["nll"] == pytest.approx(nll)
    # No two confidences are in the same one of 15 bins: the mean of |correct - confidence|.
    ece = (0.1 + 0.6 + 0.2 + 0.3 + 0.5 + 0.85) / 6
    assert found["calibration"]["ece"] == pytest.approx(ece)
    # By falling confidence: 0.9 correct, 0.85 wrong, 0.8, 0.7 correct, 0.6 wrong, 0.5 correct
    assert found["selective"] == {
        "target_error": 0.25,
        "threshold": 0.65,
        "coverage": pytest.approx(4 / 6),
        "error": pytest.approx(1 / 4),
        "aurc": pytest.approx((0 + 1 / 2 + 1 / 3 + 1 / 4 + 2 / 5 + 2 / 6) / 6),
    }


def test_the_summary_counts_missing_clips() -> None:
    predictions = small()
    predictions.unreadable += ["6.mp4: damaged", "7.mp4: damaged"]
    found = predictions.summary()
    assert found["unreadable_clips"] == 2
    assert found["clips"] == 6
    assert "MISSING: 2 clips" in headline(found)
    assert "MISSING: 2 clips" in format_results(compute_results(predictions, CLASSES, [FITTED]))
    assert "MISSING" not in format_results(compute_results(small(), CLASSES, [FITTED]))


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
        (small(label=2), 2, 0),  # one class, never predicted
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
    with np.errstate(divide="raise", invalid="raise"):  # not even a warning
        found = compute_results(predictions, CLASSES, [calibration])
    assert json.loads(strict(found)) == found
    assert (found["patients"], found["clips_of_unknown_patient"]) == (patients, unknown)
    assert format_results(json.loads(strict(found))) == format_results(found)


def test_one_patient_has_no_interval() -> None:
    found = compute_results(small(patient=ANNA), CLASSES, [FITTED])
    assert [both["patients"] for both in found["intervals"].values()] == [None] * 5
    assert None not in [both["clips"] for both in found["intervals"].values()]
    assert "no 95 % interval: one patient" in format_results(found)


def test_unknown_patients_are_reported() -> None:
    text = format_results(compute_results(small(patient=None), CLASSES, [FITTED]))
    assert text.count("no patient is known, so it may be far too narrow") == 2
    assert "over 0 patients" not in text
    assert "averaged over 3 videos" in text
    assert "far too narrow" not in format_results(compute_results(small(), CLASSES, [FITTED]))


def test_unknown_groups_are_not_reported() -> None:
    found = compute_results(small(patient=None, video=None, action=None), CLASSES, [FITTED])
    assert found["actions"] == {}
    assert found["averages"]["video"] == found["averages"]["patient"] == {}
    text = format_results(found)
    assert "averaged over" not in text
    assert "source actions" not in text


def test_the_text_holds_the_numbers() -> None:
    found = compute_results(small(), CLASSES, [FITTED])
    text = format_results(found)
    assert "6 clips: accuracy 0.6667" in text
    low, high = found["intervals"]["accuracy"]["patients"]
    naive = found["intervals"]["accuracy"]["clips"]
    assert f"accuracy: 95 % interval {low:.3f} to {high:.3f} over 2 patients" in text
    assert f"(clips taken as independent: {naive[0]:.3f} to {naive[1]:.3f})" in text
    assert "averaged over 2 patients: accuracy 0.6667 (the worst: 0.6667)" in text
    assert "averaged over 3 videos: accuracy 0.7222 (the worst: 0.5000)" in text
    assert "one prediction per source action (4): accuracy 0.7500" in text
    assert "at temperature 1.000" in text
    assert "uncertain below a confidence of 0.650 (for an error rate of at most 25% on" in text
    assert "66.7% of the clips are answered, 25.0% of the answers are wrong" in text
    look = next(line for line in text.splitlines() if line.startswith("look"))
    assert look.split() == ["look", "-", "-", "-", "-", "0", "0"]  # no clip: no score
    assert "macro average precision 0.7556" in text
    assert "top-2" not in text  # of three classes


def test_top_2_accuracy_where_there_are_more_than_five_classes() -> None:
    """Six classes; of equal probabilities the lower class comes first, as in argmax."""
    probabilities = np.array(
        [
            [0.5, 0.3, 0.2, 0.0, 0.0, 0.0],  # 0: the first
            [0.5, 0.3, 0.2, 0.0, 0.0, 0.0],  # 1: the second
            [0.5, 0.3, 0.2, 0.0, 0.0, 0.0],  # 2: the third, no hit
            [0.4, 0.3, 0.3, 0.0, 0.0, 0.0],  # 1: shares the second place, and comes first
            [0.4, 0.3, 0.3, 0.0, 0.0, 0.0],  # 2: shares the second place, and comes second: no hit
            [1 / 6] * 6,  # 1: second of six equal ones
            [1 / 6] * 6,  # 5: the last of them, no hit
        ]
    )
    rows = [ClipRow(Path(f"{i}.mp4"), label) for i, label in enumerate((0, 1, 2, 1, 2, 1, 5))]
    results = compute_results(Predictions(rows, probabilities), tuple("abcdef"), [Calibration()])
    assert results["top2_accuracy"] == pytest.approx(4 / 7)
    assert results["accuracy"] == pytest.approx(1 / 7)
    assert "top-2 accuracy 0.5714" in headline(results)


def test_the_text_about_the_threshold() -> None:
    none = Calibration()
    never = Calibration(1.0, 0.1, None, (0.9,), (False,))
    assert "the checkpoint has no threshold" in format_results(
        compute_results(small(), CLASSES, [none])
    )
    assert "every clip is uncertain (for an error rate of at most 10% on" in format_results(
        compute_results(small(), CLASSES, [never])
    )


def test_a_useless_threshold_names_the_switch_and_its_cost() -> None:
    """Ten validation clips: of the most confident five one is wrong, (1 + 1) / (5 + 2) = 0.286."""
    confidence = tuple(0.99 - 0.01 * k for k in range(10))
    correct = (True, True, False, True, True, False, False, True, False, False)
    fitted = Calibration(1.0, 0.1, None, confidence, correct)
    results = compute_results(small(), CLASSES, [fitted])
    assert results["selective"]["alternative"] == {
        "target_error": 0.29,
        "clips": 10,
        "answered": 5,
        "error": 0.2,
    }
    sentence = "--target-error 0.29 would answer 5 of the 10 validation clips, 20% of these wrongly"
    assert f"With evaluate.py and predict.py, {sentence}" in format_results(results)
    assert not np.isinf(fitted.with_target_error(0.29).min_confidence)  # it does what it says
    # Without the clips of one calibration no cost is known, only the switch.
    folds = compute_results(small(), CLASSES, [fitted] * 6)
    assert "a higher --target-error answers more" in format_results(folds)


@pytest.mark.parametrize("patients", [(ANNA, BERT), (ANNA, ANNA), (ANNA, None)])
def test_the_text_names_nobody(patients: tuple[str | None, str | None]) -> None:
    names = dict(zip((ANNA, BERT), patients, strict=True))
    rows = [row._replace(patient=names[row.patient]) for row in ROWS]
    predictions = Predictions(rows, PROBABILITIES, [f"/data/{ANNA}/film-9.mp4: damaged"])
    text = format_results(compute_results(predictions, CLASSES, [FITTED]))
    for part in ("Smith", "Anna", "Jones", "Bert", "film-", "deed-", ".mp4"):
        assert part not in text


def test_every_clip_by_the_model_of_its_fold() -> None:
    first = Calibration(2.0, 0.1, 0.75, (0.9,), (True,))
    second = Calibration(0.5, 0.1, 0.6, (0.9,), (True,))
    found = compute_results(small(), CLASSES, [first] * 3 + [second] * 3)
    assert found["calibration"]["temperature"] is None
    assert found["selective"]["threshold"] is None
    # first: of 0.9, 0.6, 0.8 two are above 0.75, both correct
    # second: of 0.7, 0.5, 0.85 two are above 0.6, one of them wrong
    assert found["selective"]["coverage"] == pytest.approx(4 / 6)
    assert found["selective"]["error"] == pytest.approx(1 / 4)
    text = format_results(found)
    assert "at each model's temperature" in text
    assert "uncertain below a confidence of each model's threshold" in text
    same = compute_results(small(), CLASSES, [first] * 6)
    assert same == compute_results(small(), CLASSES, [first])
    assert (same["calibration"]["temperature"], same["selective"]["threshold"]) == (2.0, 0.75)


def test_a_fold_that_answers_nothing() -> None:
    never = Calibration(1.0, 0.1, None, (0.9,), (False,))
    found = compute_results(small(), CLASSES, [never] * 3 + [FITTED] * 3)
    assert found["selective"]["threshold"] is None
    # of the second fold's 0.7, 0.5, 0.85 two are above 0.65, one of them wrong
    assert found["selective"]["coverage"] == pytest.approx(2 / 6)
    assert found["selective"]["error"] == pytest.approx(1 / 2)
    strict(found)


@pytest.mark.parametrize("temperatures", [[2.5], [0.4], [2.5, 2.5, 2.5, 0.4, 0.4, 1.0]])
def test_before_is_before_the_temperature(temperatures: list[float]) -> None:
    raw = PROBABILITIES * 0.97 + 0.01
    labels = small().labels
    calibrated = Predictions(list(ROWS), apply_temperature(raw, np.array(temperatures)))
    calibrations = [Calibration(one, 0.1, 0.5, (0.9,), (True,)) for one in temperatures]
    found = compute_results(calibrated, CLASSES, calibrations)["calibration"]
    for scores, probabilities in ((found["before"], raw), (found, calibrated.probabilities)):
        right = probabilities.argmax(axis=1) == labels
        ece = expected_calibration_error(probabilities.max(axis=1), right)
        assert scores["ece"] == pytest.approx(ece)
        assert scores["brier"] == pytest.approx(brier_scores(labels, probabilities).mean())
        assert scores["nll"] == pytest.approx(per_sample_nll(labels, probabilities).mean())
    assert found["nll"] != pytest.approx(found["before"]["nll"], rel=1e-3)


def test_files(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"
    results = write_results(small(), CLASSES, folder, [FITTED], {"split": "test", "views": 2})
    found = compute_results(small(), CLASSES, [FITTED])
    assert results == {**found, "split": "test", "views": 2}
    assert {path.name for path in folder.iterdir()} == {
        *("test_metrics.json", "predictions.csv", "confusion_matrix.csv", "confusion_matrix.png"),
        "precision_recall.png",
    }
    written = json.loads((folder / "test_metrics.json").read_text())
    assert written == results
    counts = pd.read_csv(folder / "confusion_matrix.csv", index_col=0)
    assert counts.index.tolist() == counts.columns.tolist() == list(CLASSES)
    assert counts.to_numpy().tolist() == [[2, 1, 0], [1, 2, 0], [0, 0, 0]]
    read, classes, decided = read_predictions(folder / "predictions.csv")
    assert classes == list(CLASSES)
    assert read.rows == list(ROWS)
    decisions = pd.read_csv(folder / "predictions.csv")["decision"].tolist()
    assert decisions == ["cut", "uncertain", "sew", "cut", "uncertain", "cut"]  # below 0.65
    assert decided.tolist() == [True, False, True, True, False, True]


def test_results_of_earlier_versions_are_read(tmp_path: Path) -> None:
    results = write_results(small(), CLASSES, tmp_path, [FITTED], {"logit_adjust_tau": 0.5})
    text = json.dumps({**results, "warnings": ["LEAKAGE: of 2 patients", "drawn twice"]})
    for old, new in (
        ("chance_accuracy", "majority_baseline"),
        ("wanted_error", "target_error"),
        ("units", "groups"),
        ("adjust", "logit_adjust_tau"),
    ):
        assert f'"{new}"' in text
        text = text.replace(f'"{new}"', f'"{old}"')
    (tmp_path / "test_metrics.json").write_text(text)
    warnings = [
        {"kind": "leakage", "text": "of 2 patients"},
        {"kind": "other", "text": "drawn twice"},
    ]
    read = read_results(tmp_path / "test_metrics.json")
    assert read == {**results, "warnings": warnings}
    assert format_results(read) == format_results(results)
    assert read_results(tmp_path / "none.json") == {}
    (tmp_path / "test_metrics.json").write_text("{")
    with pytest.raises(UserError, match="is damaged"):
        read_results(tmp_path / "test_metrics.json")


def test_files_of_several_folds(tmp_path: Path) -> None:
    never = Calibration(1.0, 0.1, None, (0.9,), (False,))
    folds = ["fold1"] * 3 + ["fold2"] * 3
    write_results(small(), CLASSES, tmp_path, [never] * 3 + [FITTED] * 3, folds=folds)
    table = pd.read_csv(tmp_path / "predictions.csv")
    assert table["fold"].tolist() == folds
    assert table["decision"].tolist() == ["uncertain"] * 3 + ["cut", "uncertain", "cut"]


@pytest.mark.parametrize(
    "content",
    [
        {"accuracy": "high"},
        {"warnings": 3},
        {"per_class": {"cut": 3}},
        {"intervals": []},
        {"views": [1]},
        {"checkpoint": 5},
    ],
)
def test_results_of_other_types_are_refused(content: dict, tmp_path: Path) -> None:
    path = tmp_path / "test_metrics.json"
    path.write_text(json.dumps(content))
    with pytest.raises(UserError) as told:
        read_results(path)
    assert str(told.value).startswith(f"{path}: not the results of a test ({next(iter(content))}")


@pytest.mark.parametrize(
    ("writer", "lost"),
    [
        ("evaluation.plots.plot_confusion", {"confusion_matrix.png"}),
        ("evaluation.results.write_predictions", {"predictions.csv", "test_metrics.json"}),
    ],
)
def test_a_file_that_cannot_be_written_costs_no_other(
    writer: str, lost: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where there is a test_metrics.json, there are the predictions."""

    def fail(*_: object) -> None:
        raise RuntimeError("no font")

    monkeypatch.setattr(writer, fail)
    shown: list[str] = []
    with pytest.raises(UserError) as told:
        write_results(small(), CLASSES, tmp_path, [FITTED], show=shown.append)
    path = tmp_path / next(name for name in sorted(lost))
    assert str(told.value) == f"{path}: could not be written: RuntimeError: no font"
    names = {"predictions.csv", "test_metrics.json", "confusion_matrix.csv", "confusion_matrix.png"}
    names |= {"precision_recall.png"}
    assert {file.name for file in tmp_path.iterdir()} == names - lost
    assert "accuracy" in shown[0]


def test_names_that_the_font_of_pictures_lacks_are_drawn_without_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("🔪 hook", "✂️ cut", "吸引", "Өт пен қан", "a $ of $ b", "x" * 49 + "1", "x" * 49 + "2")
    assert [plain_text(name) for name in names[:4]] == ["□ hook", "✂ cut", "□□", "Өт пен қан"]
    rows = [ClipRow(Path("x"), label) for label in (1, 1, 1, *range(2, 7))]
    features = np.random.default_rng(0).normal(size=(len(rows), 5))
    predictions = Predictions(rows, np.eye(7)[[row.label for row in rows]], features=features)
    figures = []
    monkeypatch.setattr("evaluation.plots.save_figure", lambda *written: figures.append(written))
    plot_confusion(predictions.confusion, names, tmp_path / "confusion.png")
    plot_precision_recall(predictions.labels, predictions.probabilities, names, tmp_path / "pr.png")
    plot_embedding(embed(features), predictions, names, tmp_path / "embedding.png")
    monkeypatch.undo()
    assert len(figures) == 3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for figure, path in figures:
            save_figure(figure, path)
