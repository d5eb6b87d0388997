"""The answers for clips whose class is not known: one row per clip in a CSV, and a summary."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from clips.manifest import UNCERTAIN, UNREADABLE
from evaluation.calibration import Calibration
from evaluation.novelty import NoveltyReference
from evaluation.predictions import Predictions
from utils.tables import write_csv
from utils.text_table import text_table

NOVEL = 0.95
"""novelty above which a clip is said to look novel: one in twenty ordinary clips does by chance"""


class ClipAnswer(NamedTuple):
    """The answer for one clip. Of a clip that cannot be read, nothing but the path is known."""

    path: Path
    answer: str
    """a class, `uncertain` below the threshold, or `unreadable`"""
    likeliest: str | None = None
    """the class with the highest probability"""
    confidence: float | None = None
    """the probability of that class"""
    novelty: float | None = None
    """see `NoveltyReference.novelty`; None: the checkpoint has nothing to compare with"""
    probabilities: tuple[float, ...] = ()
    """one per class"""


COLUMNS = ClipAnswer._fields[:-1]
"""the first columns of the table of answers; the probabilities of the classes follow"""


def clip_answers(
    clips: Sequence[Path],
    predictions: Predictions | None,
    classes: Sequence[str],
    calibration: Calibration,
    reference: NoveltyReference | None,
) -> list[ClipAnswer]:
    """The answer for each clip, in the order of the clips.

    Args:
        clips: distinct paths.
        predictions: of those clips that can be read; None: of none.
    """
    novelty, known = None, {}
    if predictions is not None:
        known = {row.path: i for i, row in enumerate(predictions.rows)}
        if reference and predictions.distance is not None:
            novelty = reference.novelty(predictions.distance)
    answers = []
    for path in clips:
        if path not in known:
            answers.append(ClipAnswer(path, UNREADABLE))
            continue
        i = known[path]
        likeliest = classes[predictions.y_pred[i]]
        confidence = float(predictions.confidence[i])
        answers.append(
            ClipAnswer(
                path,
                likeliest if confidence >= calibration.min_confidence else UNCERTAIN,
                likeliest,
                confidence,
                None if novelty is None else float(novelty[i]),
                tuple(map(float, predictions.probabilities[i])),
            )
        )
    return answers


def write_answers(path: str | Path, answers: Sequence[ClipAnswer], classes: Sequence[str]) -> None:
    """Write one row per clip: path, answer, likeliest class, confidence, novelty, probabilities.

    The columns of probabilities are called as in predictions.csv.
    """
    table: list[Sequence] = [[*COLUMNS, *(f"p_{name}" for name in classes)]]
    for answer in answers:
        *texts, confidence, novelty, probabilities = answer
        numbers = (confidence, novelty, *(probabilities or [None] * len(classes)))
        table.append([str(texts[0]), *texts[1:], *(_number(value) for value in numbers)])
    write_csv(path, table)


def _number(value: float | None) -> str | None:
    return None if value is None else f"{value:.9g}"


def describe_answers(
    answers: Sequence[ClipAnswer], reference: NoveltyReference | None, run: str
) -> str:
    """How many clips got each answer, and how many look novel, as text.

    Args:
        run: the run folder, for the command that makes up for a missing novelty.
    """
    counts = Counter(answer.answer for answer in answers).most_common()
    lines = [text_table([("answer", "clips"), *((name, str(n)) for name, n in counts)])]
    values = np.array([answer.novelty for answer in answers if answer.novelty is not None])
    if reference is None:
        lines.append(
            "the novelty is not known: this checkpoint holds nothing to compare with. If its data "
            f"and its last.pt are still there, python train.py --resume {run} adds that, without "
            "further training"
        )
    elif (n := len(reference.distances)) / (n + 1) <= NOVEL:
        lines.append(f"{n} validation clips are too few to call a clip novel")
    else:
        lines.append(
            f"{(values > NOVEL).sum()} of {len(values)} clips look novel: more unusual than "
            f"{NOVEL:.0%} of the validation clips"
        )
    return "\n".join(lines)
