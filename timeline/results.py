"""Evaluation of timelines of whole videos: pairing files, computing scores, writing tables.

The scores are described in timeline/metrics.py. The scores of each video are averaged over the
videos, which count equally; those of time are also pooled over the time of all videos.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from clips.annotations import (
    CHOLEC80_FPS,
    is_same_video,
    read_annotations,
    read_folder,
    video_name,
)
from timeline.metrics import (
    Intervals,
    align_segments,
    concatenate,
    duration_scores,
    merge_segments,
    per_class,
    segmental_scores,
)
from timeline.segments import Segment, format_timestamp, read_timeline
from utils.errors import UserError
from utils.files import require_writable, write_json
from utils.run_dir import command
from utils.text_table import list_some, text_table

# The columns of the tables, and their headings.
_CLASS_COLUMNS = {
    "precision": "precision",
    "recall": "recall",
    "f1": "F1",
    "jaccard": "Jaccard",
    "seconds": "seconds",
}
_VIDEO_COLUMNS = {
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
_RELAXED_SCORES = ("accuracy", "macro_f1", "jaccard", "accuracy_answered")

Scores = dict[str, float | None]
"""Scores by name; None (null in JSON) where a score is not defined."""


class Pair(NamedTuple):
    """The true and the predicted segments of a video."""

    truth: list[Segment]
    prediction: list[Segment]


def evaluate_timelines(
    truth: str,
    prediction: str,
    relaxed: float = 0.0,
    output: str = "",
    tiers: Sequence[str] = (),
    fps: float = CHOLEC80_FPS,
) -> None:
    """Score predicted timelines and print the tables; with a folder `output`, write
    timeline_metrics.json into it.

    Args:
        truth, prediction: files or folders; see `read_pairs`.
        relaxed: seconds by which boundaries may be shifted in additional scores; 0: no such scores.
        output: folder for the results; empty: nothing is written.
        tiers, fps: of the truth; see `clips.annotations.read_annotations`.

    Raises:
        UserError: see `read_pairs`; `relaxed` is not a number of seconds.
    """
    if not 0 <= relaxed < math.inf:
        raise UserError(f"relaxed = {relaxed}: must be a number of seconds, 0 or more")
    if output:
        require_writable(output)
    pairs, warnings = read_pairs(truth, prediction, tiers, fps)
    results = compute_results(pairs, relaxed)
    print("\n".join([*warnings, format_results(results)]))
    if not output:
        print("not written to a file (--output FOLDER does so)")
        return
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    metadata = {
        "truth": truth,
        "predicted": prediction,
        "command": command(),
        "warnings": warnings,
    }
    write_json(folder / "timeline_metrics.json", {**results, **metadata})
    print(f"results: {folder / 'timeline_metrics.json'}")


def read_pairs(
    truth: str, prediction: str, tiers: Sequence[str] = (), fps: float = CHOLEC80_FPS
) -> tuple[dict[str, Pair], list[str]]:
    """Read the true and the predicted timelines, and pair them by the names of the videos.

    Args:
        truth: an annotation in any format of clips/annotations.py (of one video, or of those that
            it names), or a folder of them.
        prediction: a timeline.csv (of one video it belongs to the only video of the truth), an
            output folder of predict.py, or a folder of such folders (`<video>.mp4.timeline/`) or
            else of `<video>.csv`. Names are the same with and without an ending (.mp4).
        tiers, fps: of the truth; see `clips.annotations.read_annotations`.

    Returns:
        The pairs by the names of the videos, and warnings: how the truth was understood,
        predictions without a truth, predicted labels that never occur in the truth.

    Raises:
        UserError: videos have no prediction or two (all of them are listed); a file is missing or
            is not a timeline; a truth has no class.
    """
    true, warnings = _read_truth(Path(truth), tiers, fps)
    predicted, unused = _read_predictions(Path(prediction), list(true))
    pairs = {name: Pair(true[name], predicted[name]) for name in true}
    classes = _labels(pair.truth for pair in pairs.values())
    unknown = _labels(pair.prediction for pair in pairs.values()) - classes
    if unknown:
        warnings.append(
            f"WARNING: predicted, but nowhere in the truth, so always wrong: {_list(unknown)} "
            f"(the truth has {_list(classes)}: is it only spelled differently?)"
        )
    if unused:
        warnings.append(f"predictions without a truth are not scored: {_list(unused)}")
    return pairs, warnings


def compute_results(pairs: Mapping[str, Pair], relaxed: float = 0.0) -> dict[str, Any]:
    """All scores of some videos, in types that JSON knows.

    Returns:
        `videos` (by name), `average` (over the videos that have the score) and `pooled` (over all
        time): the scores of `duration_scores`, with `relaxed` again as `relaxed_accuracy` etc., and
        `seconds` of truth; for videos and average also those of `segmental_scores`. `per_class`:
        pooled, not relaxed. `relaxed_seconds`: null if there are no relaxed scores.
    """
    videos, parts = {}, []
    for name, (truth, prediction) in pairs.items():
        intervals = align_segments(truth, prediction, relaxed)
        videos[name] = _time_scores(intervals, relaxed) | segmental_scores(truth, prediction)
        parts.append(intervals)
    all_time = concatenate(parts)
    scores = {
        name: [video[name] for video in videos.values()] for name in next(iter(videos.values()))
    }
    return {
        "videos": {name: _for_json(video) for name, video in videos.items()},
        "average": _for_json({name: _mean(values) for name, values in scores.items()}),
        "pooled": _for_json(_time_scores(all_time, relaxed)),
        "per_class": {name: _for_json(row) for name, row in per_class(all_time).items()},
        "relaxed_seconds": relaxed or None,
    }


def format_results(results: dict[str, Any]) -> str:
    """The results as tables with one row per class and one row per video."""
    videos = results["videos"].items()
    rows = [*videos, ("average of videos", results["average"])]
    rows.append(("all time pooled", results["pooled"]))
    lines = [
        "each class, all time pooled:",
        _format_table(results["per_class"].items(), _CLASS_COLUMNS),
        f"\neach video, {format_timestamp(results['pooled']['seconds'])} of truth in all:",
        _format_table(rows, _VIDEO_COLUMNS),
        "(answered: accuracy over the answered time, whose fraction of all time is the coverage)",
    ]
    if results["relaxed_seconds"]:
        columns = {f"relaxed_{name}": _VIDEO_COLUMNS[name] for name in _RELAXED_SCORES}
        lines.append(f"\nwith boundaries relaxed by {results['relaxed_seconds']:g} s:")
        lines.append(_format_table(rows, columns))
    return "\n".join(lines)


def _time_scores(intervals: Intervals, relaxed: float) -> dict[str, float]:
    scores = duration_scores(intervals)
    if relaxed:
        lenient = duration_scores(intervals._replace(correct=intervals.correct_relaxed))
        scores |= {f"relaxed_{name}": lenient[name] for name in _RELAXED_SCORES}
    return {**scores, "seconds": math.fsum(intervals.seconds)}


def _mean(values: Sequence[float]) -> float:
    """The mean of the values that are not nan; nan if there is none."""
    return math.nan if np.isnan(values).all() else float(np.nanmean(values))


def _for_json(scores: Mapping[str, float]) -> Scores:
    return {name: _round(score) for name, score in scores.items()}


def _round(score: float) -> float | None:
    """The score with 15 decimals, which hide the rounding errors of sums; None for nan."""
    if math.isnan(score):
        return None
    whole = math.floor(score)
    return (whole * 10**15 + round((score - whole) * 1e15)) / 10**15


def _format_table(rows: Iterable[tuple[str, Scores]], columns: Mapping[str, str]) -> str:
    """A table with one row per name; `columns` maps scores to headings."""
    names, scores = zip(*rows, strict=True)
    cells = [["", *names]]
    for score, heading in columns.items():
        digits = 1 if score == "seconds" else 3
        values = [row.get(score) for row in scores]
        cells.append([heading, *("-" if v is None else f"{v:.{digits}f}" for v in values)])
    return text_table(zip(*cells, strict=True))


def _read_truth(
    path: Path, tiers: Sequence[str], fps: float
) -> tuple[dict[str, list[Segment]], list[str]]:
    """The true segments of each video, and notes on how the files were understood.

    Raises:
        UserError: there is no annotation, one has no class, or two are of one video.
    """
    if path.is_dir():
        files, unknown = read_folder(path, tiers, fps, recursive=False)
        names = list_some(file.name for file in unknown)
        notes = [f"no annotations, passed over: {names}"] if unknown else []
    else:
        files, notes = {path: read_annotations(path, tiers, fps)}, []
    truth: dict[str, list[Segment]] = {}
    for file, annotations in files.items():
        for name, segments in annotations.videos.items():
            name = name or video_name(file)
            if twice := [other for other in truth if is_same_video(name, other)]:
                raise UserError(f"{file}: {twice[0]} has two annotations in {path}: keep one")
            truth[name] = segments
    notes += dict.fromkeys(note for each in files.values() for note in each.notes)
    empty = [name for name, segments in truth.items() if not merge_segments(segments)]
    if empty:
        raise UserError(f"{path}: the truth has no class, only marks, in {_list(empty)}")
    return truth, notes


def _read_predictions(
    path: Path, names: Sequence[str]
) -> tuple[dict[str, list[Segment]], list[str]]:
    """The predicted segments of each of these videos; the names of other videos.

    Raises:
        UserError: a video has no prediction or two.
    """
    if (path / "timeline.csv").is_file():
        path = path / "timeline.csv"
    if path.is_dir():
        files = _files(path, "*.timeline/timeline.csv") or _files(path, "*.csv")
        matches = _match(path, names, list(files))
        predictions = {name: _read_single(files[matches[name]]) for name in names}
        return predictions, sorted(files.keys() - matches.values())
    videos = read_timeline(path)
    if list(videos) == [""]:
        if len(names) > 1:
            raise UserError(
                f"{path}: has no column video, but the truth has {len(names)} videos "
                "(add the column, or give a folder of timelines)"
            )
        return {names[0]: videos[""]}, []
    matches = _match(path, names, list(videos))
    predictions = {name: videos[matches[name]] for name in names}
    return predictions, sorted(videos.keys() - matches.values())


def _files(folder: Path, pattern: str) -> dict[str, Path]:
    """Timelines in a folder by the names of their videos: `op1.csv`, `op1.mp4.timeline/...`."""
    paths = sorted(folder.glob(pattern))
    return {(path.parent.stem if "/" in pattern else path.stem): path for path in paths}


def _read_single(path: Path) -> list[Segment]:
    videos = read_timeline(path)
    if len(videos) > 1:
        raise UserError(f"{path}: holds {len(videos)} videos (give the file, not its folder)")
    return next(iter(videos.values()))


def _match(path: Path, names: Sequence[str], available: Sequence[str]) -> dict[str, str]:
    """The available name, with or without an ending (op1.mp4), of each video of the truth."""
    matches = {
        name: [
            candidate
            for candidate in available
            if candidate == name or (is_same_video(candidate, name) and candidate not in names)
        ]
        for name in names
    }
    if missing := [name for name, candidates in matches.items() if not candidates]:
        raise UserError(
            f"{path}: no prediction for {len(missing)} of {len(names)} videos of the truth: "
            f"{_list(missing)} (it has {_list(available) or 'no timeline'})"
        )
    if unclear := [f"{name} ({_list(found)})" for name, found in matches.items() if found[1:]]:
        raise UserError(f"{path}: more than one prediction for {_list(unclear)}: keep one")
    return {name: candidates[0] for name, candidates in matches.items()}


def _labels(timelines: Iterable[Sequence[Segment]]) -> set[str]:
    return {segment.label for segments in timelines for segment in merge_segments(segments)}


def _list(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))
