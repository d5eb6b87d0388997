"""Judging timelines of whole videos: which belong together, their scores, a table for people.

What the scores mean is in timeline_metrics.py. Those of a video are averaged over the videos, so
that each counts the same, and those of time are also pooled over the time of all videos.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import pandas as pd

from timeline import metrics as timeline_metrics
from timeline.metrics import Intervals, class_segments
from timeline.segments import Segment, clock, read_timeline
from utils.errors import UserError
from utils.files import write_json
from utils.run_dir import command

_HEADS = {
    "accuracy": "accuracy",
    "macro_f1": "macro-F1",
    "jaccard": "Jaccard",
    "coverage": "coverage",
    "accuracy_answered": "answered",
    "edit": "edit",
    "f1_10": "F1@10",
    "f1_25": "F1@25",
    "f1_50": "F1@50",
    "seconds": "seconds",
}

_RELAXED = ("accuracy", "macro_f1", "jaccard", "accuracy_answered")


class Pair(NamedTuple):
    """What is true of a video and what was predicted."""

    truth: list[Segment]
    predicted: list[Segment]


def evaluate_timelines(truth: str, predicted: str, relaxed: float = 0.0, output: str = "") -> str:
    """Judge predicted timelines; with a folder `output`, write timeline_metrics.json into it.

    Args:
        truth: see `read_pairs`, as for `predicted`.
        relaxed: seconds by which boundaries are relaxed in scores beside the strict ones; 0: none.

    Returns:
        The tables for people.

    Raises:
        UserError: see `read_pairs`; `relaxed` is no number of seconds.
    """
    if not 0 <= relaxed < math.inf:
        raise UserError(f"relaxed = {relaxed}: must be a number of seconds, 0 or more")
    pairs, warnings = read_pairs(truth, predicted)
    results = assess_timelines(pairs, relaxed)
    lines = [*warnings, describe_timelines(results)]
    if not output:
        return "\n".join([*lines, "not written to a file (--output FOLDER does so)"])
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    facts = {"truth": truth, "predicted": predicted, "command": command(), "warnings": warnings}
    write_json(folder / "timeline_metrics.json", {**results, **facts})
    return "\n".join([*lines, f"results: {folder / 'timeline_metrics.json'}"])


def read_pairs(truth: str, predicted: str) -> tuple[dict[str, Pair], list[str]]:
    """Find and read what belongs together.

    Args:
        truth: a timeline.csv (of one video, or with a column `video`), or a folder of
            `<video>.csv`.
        predicted: a timeline.csv (that of one video goes to the only video of the truth), a folder
            of predict.py, or a folder that holds such folders (`<video>.mp4.timeline/`) or else
            `<video>.csv`. A video of the truth is found by its name with or without an ending.

    Returns:
        The pairs by the names of the videos, and warnings: predictions without truth, predicted
        labels that the truth never has.

    Raises:
        UserError: videos without a prediction or with two, all of them; files that are missing or
            are no timelines; a truth without any class.
    """
    true = _read_truth(Path(truth))
    said, unused = _read_predictions(Path(predicted), list(true))
    pairs = {name: Pair(true[name], said[name]) for name in true}
    classes = _labels(pair.truth for pair in pairs.values())
    strange = _labels(pair.predicted for pair in pairs.values()) - classes
    warnings = []
    if strange:
        warnings.append(
            f"WARNING: predicted, but nowhere in the truth, so always wrong: {_list(strange)} "
            f"(the truth has {_list(classes)}: is it only spelled differently?)"
        )
    if unused:
        warnings.append(f"predictions without a truth are not judged: {_list(unused)}")
    return pairs, warnings


def assess_timelines(pairs: Mapping[str, Pair], relaxed: float = 0.0) -> dict[str, Any]:
    """All scores, in types that JSON knows (nan is null).

    Returns:
        `videos`, `average` (over the videos that have the score) and `pooled` (over all time): the
        scores of `timeline_metrics.time_scores`, with `relaxed` again as `relaxed_accuracy` and so
        on, and `seconds` of truth; for videos and average also those of `segmental_scores`.
        `per_class`, pooled and strict. `relaxed_seconds`, null if there are none.
    """
    videos, parts = {}, []
    for name, (truth, predicted) in pairs.items():
        intervals = timeline_metrics.elementary_intervals(truth, predicted, relaxed)
        segmental = timeline_metrics.segmental_scores(truth, predicted)
        videos[name] = {**_of_time(intervals, relaxed), **segmental}
        parts.append(intervals)
    table = pd.DataFrame.from_dict(videos, orient="index")
    all_time = timeline_metrics.pooled(parts)
    return {
        "videos": _for_json(table),
        "average": _for_json(table.mean().to_frame("all").T)["all"],
        "pooled": _for_json(pd.DataFrame([_of_time(all_time, relaxed)], ["all"]))["all"],
        "per_class": _for_json(timeline_metrics.per_class(all_time)),
        "relaxed_seconds": relaxed or None,
    }


def describe_timelines(results: dict[str, Any]) -> str:
    """The results in words: a line a class, a line a video, their average, and all time pooled."""
    videos = results["videos"]
    rows = {**videos, "average of videos": results["average"], "all time pooled": results["pooled"]}
    table = pd.DataFrame(rows.values(), rows.keys()).astype(float)  # a video may be called anything
    classes = pd.DataFrame.from_dict(results["per_class"], orient="index")
    strict = table[list(_HEADS)].rename(columns=_HEADS)
    blocks = [
        "each class, all time pooled:",
        _text(classes.rename(columns={"f1": "F1", "jaccard": "Jaccard"})),
        f"\neach video, {clock(results['pooled']['seconds'])} of truth in all:",
        _text(strict),
        "(answered: accuracy where there is an answer, the share of time that coverage tells)",
    ]
    if results["relaxed_seconds"]:
        names = {f"relaxed_{name}": _HEADS[name] for name in _RELAXED}
        blocks.append(f"\nwith boundaries relaxed by {results['relaxed_seconds']:g} s:")
        blocks.append(_text(table[list(names)].rename(columns=names)))
    return "\n".join(blocks)


def _of_time(intervals: Intervals, relaxed: float) -> dict[str, float]:
    scores = timeline_metrics.time_scores(intervals)
    if relaxed:
        lenient = timeline_metrics.time_scores(intervals._replace(right=intervals.right_relaxed))
        scores |= {f"relaxed_{name}": lenient[name] for name in _RELAXED}
    return {**scores, "seconds": math.fsum(intervals.seconds)}


def _read_truth(place: Path) -> dict[str, list[Segment]]:
    """The segments of each video, each with a class somewhere."""
    if place.is_dir():
        truth = {name: _read_one(path) for name, path in _files(place, "*.csv").items()}
        if not truth:
            raise UserError(f"{place}: has no <video>.csv to take the truth from")
    else:
        truth = {name or place.stem: found for name, found in read_timeline(place).items()}
    empty = [name for name, found in truth.items() if not class_segments(found)]
    if empty:
        raise UserError(f"{place}: the truth has no class, only marks, in {_list(empty)}")
    return truth


def _read_predictions(
    place: Path, names: Sequence[str]
) -> tuple[dict[str, list[Segment]], list[str]]:
    """The segments predicted for each of these videos; the names of other videos."""
    if (place / "timeline.csv").is_file():
        place = place / "timeline.csv"
    if place.is_dir():
        files = _files(place, "*.timeline/timeline.csv") or _files(place, "*.csv")
        found = _find(place, names, list(files))
        said = {name: _read_one(files[found[name]]) for name in names}
        return said, sorted(files.keys() - found.values())
    videos = read_timeline(place)
    if list(videos) == [""]:
        if len(names) > 1:
            raise UserError(
                f"{place}: has no column video, but the truth has {len(names)} videos "
                "(add the column, or give a folder of timelines)"
            )
        return {names[0]: videos[""]}, []
    found = _find(place, names, list(videos))
    return {name: videos[found[name]] for name in names}, sorted(videos.keys() - found.values())


def _files(folder: Path, pattern: str) -> dict[str, Path]:
    """Timelines in a folder by the names of their videos: `op1.csv`, `op1.mp4.timeline/...`."""
    paths = sorted(folder.glob(pattern))
    return {(path.parent.stem if "/" in pattern else path.stem): path for path in paths}


def _read_one(path: Path) -> list[Segment]:
    videos = read_timeline(path)
    if len(videos) > 1:
        raise UserError(f"{path}: holds {len(videos)} videos (give the file, not its folder)")
    return next(iter(videos.values()))


def _find(place: Path, names: Sequence[str], available: Sequence[str]) -> dict[str, str]:
    """Which of the available names, with or without an ending (op1.mp4), means each video."""
    means = {
        name: [
            other
            for other in available
            if other == name or (PurePath(other).stem == name and other not in names)
        ]
        for name in names
    }
    if absent := [name for name, others in means.items() if not others]:
        raise UserError(
            f"{place}: no prediction for {len(absent)} of {len(names)} videos of the truth: "
            f"{_list(absent)} (it has {_list(available) or 'no timeline'})"
        )
    if unclear := [f"{name} ({_list(others)})" for name, others in means.items() if others[1:]]:
        raise UserError(f"{place}: more than one prediction for {_list(unclear)}: keep one")
    return {name: others[0] for name, others in means.items()}


def _labels(timelines: Iterable[Sequence[Segment]]) -> set[str]:
    return {one.label for segments in timelines for one in class_segments(segments)}


def _list(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))


def _text(table: pd.DataFrame) -> str:
    seconds = {"seconds": "{:.1f}".format} if "seconds" in table else {}
    return table.to_string(float_format="{:.3f}".format, formatters=seconds, na_rep="-")


def _for_json(table: pd.DataFrame) -> dict[str, Any]:
    return json.loads(table.to_json(orient="index", double_precision=15))  # nan -> null
