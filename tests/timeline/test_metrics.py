"""Scores of whole videos, against cases worked out by hand and against sampling."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest

from clips.manifest import NON_CLASS_LABELS
from timeline.metrics import (
    align_segments,
    duration_scores,
    edit_score,
    merge_segments,
    per_class,
    segmental_f1,
    segmental_scores,
)
from timeline.segments import Segment


def line(*texts: str) -> list[Segment]:
    """A timeline: `line("A 0 10", "B 10 20")`."""
    parts = (text.split() for text in texts)
    return [Segment(float(start), float(end), label) for label, start, end in parts]


def column(table: dict[str, dict[str, float]], score: str) -> dict[str, float]:
    return {name: row[score] for name, row in table.items()}


def strict(truth: list[Segment], predicted: list[Segment]) -> dict[str, float]:
    return duration_scores(align_segments(truth, predicted))


def lenient(truth: list[Segment], predicted: list[Segment], relaxed: float) -> dict[str, float]:
    intervals = align_segments(truth, predicted, relaxed)
    return duration_scores(intervals._replace(correct=intervals.correct_relaxed))


def everything(truth: list[Segment], predicted: list[Segment], relaxed: float) -> dict[str, float]:
    later = {f"relaxed_{name}": score for name, score in lenient(truth, predicted, relaxed).items()}
    return {**strict(truth, predicted), **later, **segmental_scores(truth, predicted)}


TRUTH, LATE = line("A 0 10", "B 10 20"), line("A 0 12", "B 12 20")


def test_a_boundary_two_seconds_late() -> None:
    table = per_class(align_segments(TRUTH, LATE))
    # A: true 0-10, predicted 0-12, correct 0-10; B: true 10-20, predicted 12-20, correct 12-20
    assert column(table, "precision") == pytest.approx({"A": 10 / 12, "B": 8 / 8})
    assert column(table, "recall") == pytest.approx({"A": 10 / 10, "B": 8 / 10})
    # F1 = 2 x correct / (true + predicted)
    assert column(table, "f1") == pytest.approx({"A": 20 / 22, "B": 16 / 18})
    assert column(table, "jaccard") == pytest.approx({"A": 10 / 12, "B": 8 / 10})
    assert column(table, "seconds") == {"A": 10, "B": 10}
    assert strict(TRUTH, LATE) == pytest.approx(
        {
            "accuracy": 18 / 20,
            "macro_f1": (20 / 22 + 16 / 18) / 2,
            "jaccard": (10 / 12 + 8 / 10) / 2,
            "coverage": 1,
            "accuracy_answered": 18 / 20,
        }
    )
    # the order is right, and both IoU (10/12 and 8/10) are above a half
    assert segmental_scores(TRUTH, LATE) == {"edit": 1, "f1_10": 1, "f1_25": 1, "f1_50": 1}


def test_relaxed_boundary_by_hand() -> None:
    # 10-12 is wrong; by one second 10-11 of it is forgiven
    intervals = align_segments(TRUTH, LATE, 1)
    table = per_class(intervals._replace(correct=intervals.correct_relaxed))
    # A: 0-11 of the predicted 0-12; B: 10-11 and 12-20 of the true 10-20
    assert column(table, "precision") == pytest.approx({"A": 11 / 12, "B": 1})
    assert column(table, "recall") == pytest.approx({"A": 1, "B": 9 / 10})
    # the unions are 0-12 and 10-20
    assert column(table, "jaccard") == pytest.approx({"A": 11 / 12, "B": 9 / 10})
    assert lenient(TRUTH, LATE, 1)["accuracy"] == pytest.approx(19 / 20)
    assert duration_scores(intervals) == pytest.approx(strict(TRUTH, LATE))  # not changed


def test_relaxed_boundary_exactly() -> None:
    early = line("A 0 8", "B 8 20")
    for predicted in (LATE, early):
        assert lenient(TRUTH, predicted, 2)["accuracy"] == 1
        assert lenient(TRUTH, predicted, 2)["macro_f1"] == 1
        assert lenient(TRUTH, predicted, 2)["jaccard"] == 1
        assert lenient(TRUTH, predicted, 1.5)["accuracy"] == pytest.approx(19.5 / 20)
    assert lenient(TRUTH, LATE, 0) == strict(TRUTH, LATE)


def test_relaxed_forgives_only_the_label_of_the_other_side() -> None:
    truth = line("A 0 10", "B 10 12", "C 12 20")
    # C from 8: 10-12 is next to the boundary with C; 8-10 is next to that with B only
    assert lenient(truth, line("A 0 8", "C 8 20"), 5)["accuracy"] == pytest.approx(18 / 20)
    # a third label is wrong wherever it is
    assert lenient(truth, line("A 0 9", "X 9 13", "C 13 20"), 5)["accuracy"] == pytest.approx(
        16 / 20
    )
    # unanswered time is wrong at the ends of the video and beside a boundary
    assert lenient(truth, line("A 2 9", "uncertain 9 13", "C 13 18"), 5)["accuracy"] == 12 / 20


def test_no_boundary_where_true_segments_do_not_touch() -> None:
    late = line("A 0 14", "B 14 22")
    assert lenient(line("A 0 10", "B 12 22"), late, 5)["accuracy"] == pytest.approx(18 / 20)
    marked = line("A 0 10", "uncertain 10 12", "B 12 22")
    assert lenient(marked, late, 5)["accuracy"] == pytest.approx(18 / 20)


def test_relaxed_precision_and_recall_stay_below_one() -> None:
    """Evaluate.m: 18 s of A are correct in the union of both, 0-18, but only 8 s are predicted."""
    truth, predicted = line("A 0 18", "B 18 40"), line("A 0 8", "B 8 40")
    intervals = align_segments(truth, predicted, 10)
    table = per_class(intervals._replace(correct=intervals.correct_relaxed))
    for name in ("precision", "recall", "f1", "jaccard"):
        assert column(table, name) == {"A": 1, "B": 1}


def test_unanswered_time_is_wrong() -> None:
    truth = line("A 0 10")
    predicted = line("A 0 4", "uncertain 4 6", "B 6 8")  # nothing at all in 8-10
    scores = strict(truth, predicted)
    assert scores["accuracy"] == pytest.approx(4 / 10)
    assert scores["coverage"] == pytest.approx(6 / 10)
    assert scores["accuracy_answered"] == pytest.approx(4 / 6)
    assert scores["jaccard"] == pytest.approx(4 / 10)
    assert scores["macro_f1"] == pytest.approx(2 * 4 / (10 + 4))  # B has no truth: left out


@pytest.mark.parametrize("predicted", [[], *(line(f"{mark} 0 20") for mark in NON_CLASS_LABELS)])
def test_nothing_answered(predicted: list[Segment]) -> None:
    scores = everything(TRUTH, predicted, 3)
    assert math.isnan(scores.pop("accuracy_answered"))
    assert math.isnan(scores.pop("relaxed_accuracy_answered"))
    assert set(scores.values()) == {0}


def test_all_correct_and_one_class() -> None:
    for truth in (TRUTH, line("A 3 7")):
        assert set(everything(truth, truth, 3).values()) == {1}
    # always another class
    assert strict(line("A 0 5"), line("B 0 5"))["accuracy"] == 0
    assert segmental_scores(line("A 0 5"), line("B 0 5")) == {
        "edit": 0,
        "f1_10": 0,
        "f1_25": 0,
        "f1_50": 0,
    }


def test_over_segmentation_costs_the_segmental_scores() -> None:
    truth = line("A 0 20")
    predicted = line("A 0 4", "B 4 6", "A 6 12", "B 12 14", "A 14 20")
    assert strict(truth, predicted)["accuracy"] == pytest.approx(16 / 20)
    # A -> ABABA takes 4 insertions; the IoUs of the three A are 0.2, 0.3 and 0.3: one can match
    assert segmental_scores(truth, predicted) == pytest.approx(
        {"edit": 1 - 4 / 5, "f1_10": 2 / 6, "f1_25": 2 / 6, "f1_50": 0}
    )


def test_edit_score_by_hand() -> None:
    assert edit_score("ABC", "ABC") == 1
    assert edit_score("ABC", "AC") == pytest.approx(1 - 1 / 3)  # one left out
    assert edit_score("AC", "ABC") == pytest.approx(1 - 1 / 3)  # one too many
    assert edit_score("ABC", "AXC") == pytest.approx(1 - 1 / 3)  # one wrong
    assert edit_score("ABCD", "BADC") == pytest.approx(1 - 3 / 4)  # A moved, D moved: 3 edits
    assert edit_score("AB", "") == 0


def test_a_taken_segment_is_not_matched_again() -> None:
    truth, predicted = line("A 0 10", "B 10 11", "A 11 13"), line("A 0 5", "A 6 13")
    # 0-5: IoU 5/10 with 0-10. 6-13: 4/13 with 0-10, which is taken, though 2/7 with 11-13 would do
    assert segmental_f1(truth, predicted, 0.25) == pytest.approx(2 * 1 / (3 + 2))
    # Above 4/13 and below 5/10 nothing changes; at 5/10 the first still matches, above none does
    assert segmental_f1(truth, predicted, 0.5) == pytest.approx(2 * 1 / (3 + 2))
    assert segmental_f1(truth, predicted, 0.51) == 0


def test_an_iou_on_the_threshold_counts() -> None:
    for start in (0, 0.1, 1 / 3, 1234.567):
        truth = [Segment(start, start + 30, "A")]
        assert segmental_f1(truth, [Segment(start + 0.7, start + 3.7, "A")], 0.1) == 1


def test_marks_split_what_they_interrupt_in_segmental_scores_only() -> None:
    truth, predicted = line("A 0 20"), line("A 0 9", "uncertain 9 10", "A 10 20")
    assert segmental_scores(truth, predicted)["edit"] == pytest.approx(1 - 1 / 2)
    assert merge_segments(line("A 0 9", "A 9 20", "B 20 21", "uncertain 21 22")) == line(
        "A 0 20", "B 20 21"
    )


def test_time_without_truth_is_not_scored() -> None:
    truth = line("A 5 10", "uncertain 10 15", "B 20 25")
    predicted = line("C 0 5", "A 5 12", "C 12 18", "B 18 30", "A 30 40")
    assert set(everything(truth, predicted, 0).values()) == {1}
    # a segment over the gap is one on each side of it
    assert segmental_scores(line("A 0 10", "A 20 30"), line("A 0 30"))["edit"] == 1


def test_a_class_without_truth_is_left_out_of_the_mean() -> None:
    scores = strict(line("A 0 10", "B 10 20"), line("A 0 10", "C 10 20"))
    assert scores["macro_f1"] == pytest.approx((1 + 0) / 2)
    assert scores["jaccard"] == pytest.approx((1 + 0) / 2)
    assert scores["coverage"] == 1


def random_line(rng: np.random.Generator, labels: str, shift: float = 0.0) -> list[Segment]:
    """Segments on a grid of half seconds, with marks and gaps, a class somewhere."""
    segments, time = [Segment(shift, shift + 1, labels[0])], 1.0
    while time < 30:
        end = time + rng.integers(1, 9) / 2
        label = rng.choice(
            [*labels, "uncertain", ""], p=[0.8 / len(labels)] * len(labels) + [0.1] * 2
        )
        if label:
            segments.append(Segment(time + shift, end + shift, str(label)))
        time = end
    return segments


def sampled(truth: list[Segment], predicted: list[Segment], relaxed: float, step: float) -> dict:
    """All scores from labels at samples `step` apart, in plain loops."""

    def labels(segments: list[Segment]) -> list[str]:
        names = [""] * count
        for i in range(count):
            time = (i + 0.5) * step
            for segment in segments:
                if segment.start <= time < segment.end and segment.label not in NON_CLASS_LABELS:
                    names[i] = segment.label
        return names

    def runs(names: list[str]) -> list[Segment]:
        segments, start = [], 0
        for name, group in itertools.groupby(names):
            end = start + len(list(group))
            if name:
                segments.append(Segment(start, end, name))
            start = end
        return segments

    count = round(max(segment.end for segment in (*truth, *predicted)) / step)
    true, guess = labels(truth), labels(predicted)
    guess = [g if t else "" for t, g in zip(true, guess, strict=True)]
    allowed = [{name} for name in true]
    reach = round(relaxed / step)
    for before, after in itertools.pairwise(runs(true)):
        if before.end == after.start:
            for i in range(max(before.start, before.end - reach), before.end):
                allowed[i].add(after.label)
            for i in range(after.start, min(after.end, after.start + reach)):
                allowed[i].add(before.label)
    scored = [i for i in range(count) if true[i]]
    answered = [i for i in scored if guess[i]]
    scores = {"coverage": len(answered) / len(scored)}
    scores["relaxed_coverage"] = scores["coverage"]
    classes = {true[i] for i in scored}
    for prefix in ("", "relaxed_"):
        correct = {
            i for i in answered if guess[i] == true[i] or (prefix and guess[i] in allowed[i])
        }
        scores[f"{prefix}accuracy"] = len(correct) / len(scored)
        scores[f"{prefix}accuracy_answered"] = (
            len(correct) / len(answered) if answered else math.nan
        )
        f1s, jaccards = [], []
        for name in classes:
            positive = {i for i in scored if true[i] == name}
            called = {i for i in scored if guess[i] == name}
            precision = len(correct & called) / len(called) if called else 0
            recall = len(correct & positive) / len(positive)
            f1s.append(2 * precision * recall / (precision + recall) if precision + recall else 0)
            jaccards.append(len(correct & (positive | called)) / len(positive | called))
        scores[f"{prefix}macro_f1"] = float(np.mean(f1s))
        scores[f"{prefix}jaccard"] = float(np.mean(jaccards))
    real, called = runs(true), runs(guess)
    table = np.zeros((len(real) + 1, len(called) + 1), int)
    table[:, 0], table[0] = range(len(real) + 1), range(len(called) + 1)
    for i, j in itertools.product(range(len(real)), range(len(called))):
        change = table[i, j] + (real[i].label != called[j].label)
        table[i + 1, j + 1] = min(change, table[i, j + 1] + 1, table[i + 1, j] + 1)
    scores["edit"] = 1 - table[-1, -1] / max(len(real), len(called))
    for percent in (10, 25, 50):
        hits = Counter()
        for segment in called:
            ious = [0.0] * len(real)
            for i, other in enumerate(real):
                first, second = set(range(*segment[:2])), set(range(*other[:2]))
                if other.label == segment.label:
                    ious[i] = len(first & second) / len(first | second)
            best = int(np.argmax(ious))
            hits[best] += ious[best] >= percent / 100
        matched = sum(count > 0 for count in hits.values())
        precision, recall = matched / len(called) if called else 0, matched / len(real)
        scores[f"f1_{percent}"] = (
            2 * precision * recall / (precision + recall) if precision + recall else 0
        )
    return scores


@pytest.mark.parametrize("seed", range(60))
def test_equals_sampling(seed: int) -> None:
    rng = np.random.default_rng(seed)
    truth, predicted = random_line(rng, "ABC"), random_line(rng, "ABCD")
    relaxed = rng.integers(0, 7) / 2
    scores = everything(truth, predicted, relaxed)
    assert scores == pytest.approx(sampled(truth, predicted, relaxed, 0.5), abs=1e-12, nan_ok=True)
    for name, score in scores.items():
        assert 0 <= score <= 1, name
        assert score <= scores.get(f"relaxed_{name}", 1) + 1e-12, name


def test_is_the_limit_of_finer_sampling() -> None:
    rng = np.random.default_rng(7)

    def stretched(segments: list[Segment]) -> list[Segment]:
        return [s._replace(start=s.start * 1.0347, end=s.end * 1.0347) for s in segments]

    truth, predicted = random_line(rng, "ABC"), stretched(random_line(rng, "ABC"))
    names = ("accuracy", "macro_f1", "jaccard", "relaxed_accuracy", "relaxed_jaccard")
    exact = everything(truth, predicted, 1.25)
    errors = []
    for step in (0.25, 0.01):
        approximate = sampled(truth, predicted, 1.25, step)
        errors.append(max(abs(approximate[name] - exact[name]) for name in names))
    assert errors[1] < 1e-3 < errors[0]


def test_shifting_and_splitting_change_nothing() -> None:
    rng = np.random.default_rng(3)
    for _ in range(20):
        truth, predicted = random_line(rng, "ABC"), random_line(rng, "ABC")
        expected = pytest.approx(everything(truth, predicted, 1.5), abs=1e-9)

        def shifted(segments: list[Segment]) -> list[Segment]:
            return [s._replace(start=s.start + 3333.3, end=s.end + 3333.3) for s in segments]

        def split(segments: list[Segment]) -> list[Segment]:
            halves = []
            for segment in segments:
                middle = segment.start + segment.duration * rng.uniform(0.1, 0.9)
                halves += [segment._replace(end=middle), segment._replace(start=middle)]
            return halves

        assert everything(shifted(truth), shifted(predicted), 1.5) == expected
        assert everything(split(truth), predicted, 1.5) == expected
        assert everything(truth, split(predicted), 1.5) == expected
