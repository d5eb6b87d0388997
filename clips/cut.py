"""Clips cut out of whole videos by their annotations: `prepare_data.py clips`.

Which clips these are, and their labels, says clip_plan.py.

Interrupted at any moment, it continues when started again. `cut.json` holds what each clip was cut
from: clips of other settings, labels or videos are removed, and those that are missing are cut.
"""

import itertools
import os
import shlex
import sys
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import tyro

from clips.annotations import CHOLEC80_FPS, annotate_videos
from clips.clip_plan import PlannedClip, plan_clips
from clips.manifest import NON_CLASS_LABELS, class_problems
from clips.manifest_formats import parse_slam_filename, patient_finder
from clips.segments import Segment
from utils.errors import UserError
from utils.files import (
    read_json,
    remove_empty,
    remove_unfinished,
    require_writable,
    safe_file_names,
    write_json,
)
from utils.lock import FolderLock
from utils.run_dir import sanitize
from utils.tables import write_csv
from utils.text_table import list_some, text_table
from utils.workers import in_parallel
from video.container import ClipError
from video.excerpt import Excerpt, frame_times, write_excerpts
from video.files import find_videos, no_video

FORMAT = 1
_MOST_PATIENTS = 30  # that are listed with a line of their own
_SHAPE = {"format": int, "clips": {str: str}}
_PER_TASK = 20  # clips that a process cuts at once: the video is decoded through them
_LATE = 1.0  # seconds that an annotation may be longer than its video: frames of 1 second


@dataclass
class CutConfig:
    """Cut labelled clips out of whole videos by their annotations, and write clips.csv.

    A clip gets the label that covers the largest part of it. Clips whose middle is near a boundary
    are left out.
    """

    videos: tyro.conf.Positional[str]
    """a folder of videos, or a video"""
    annotations: str
    """a folder of annotations named like the videos, or one file: timelines (start,end,label),
    Cholec80, CholecT50, ELAN, BORIS, Audacity"""
    output: str
    """folder for clips.csv and the clips; where it exists already, it is brought up to date"""
    seconds: float = 2.0
    """length of a clip"""
    stride: float = 2.0
    """seconds from the start of a clip to that of the next one"""
    margin: float = 0.5
    """a clip is left out if its middle is closer to a boundary than this many seconds"""
    min_share: float = 0.5
    """a clip is left out unless its label covers more than this part of it"""
    background: str = ""
    """class for the clips without a label (empty: they are left out)"""
    tier: tuple[str, ...] = ()
    """tiers, categories or behaviours to take, where several overlap"""
    labels: tuple[str, ...] = ()
    """labels to take (default: all)"""
    annotation_fps: float = CHOLEC80_FPS
    """frames per second of frame numbers in annotations (Cholec80's phases)"""
    patient_pattern: str = ""
    """regular expression that finds the patient in the path of a video, e.g. "(P[0-9]+)_" """
    num_workers: int = 2
    """number of processes that cut"""


class _Plan(NamedTuple):
    """What an annotated video is cut into."""

    duration: float
    counted: bool
    """whether its frames have to be counted from the start"""
    clips: list[PlannedClip]
    left_out: Counter[str]
    """how many clips are left out for each reason"""


class _Row(NamedTuple):
    """A clip as clips.csv lists it, and what it is cut from."""

    path: str
    """relative to the output"""
    clip: PlannedClip
    video: Path
    patient: str
    name: str
    """name of the video, which is unique and safe in a path"""


def cut(config: CutConfig) -> int:
    """Cut the clips that the output lacks, and write clips.csv.

    Returns:
        The exit code: 1 if a video or a clip could not be cut.

    Raises:
        UserError: a setting cannot work, there are no videos or annotations, an annotation is wrong
            or not certain to belong to one video.
    """
    _check(config)
    output = Path(config.output)
    root = Path(config.videos)
    videos = _find_videos(root, output)
    source = Path(config.annotations)
    segments, notes = annotate_videos(videos, source, config.tier, config.annotation_fps)
    segments = _select(config, segments)
    patients, remark = _patients(list(segments), root, config.patient_pattern)
    notes += [remark] if remark else []
    require_writable(output)
    with FolderLock(output):
        for note in notes:
            print(sanitize(note))
        plans, problems = _plan(config, segments)
        rows = _rows(plans, patients, root)
        if not rows:
            raise UserError(
                "\n  ".join([f"{config.annotations}: no clip to cut: none has a label", *problems])
            )
        counted = {video for video, plan in plans.items() if plan.counted}
        problems += _cut_missing(output, rows, counted, config.num_workers)
        rows = [row for row in rows if (output / row.path).is_file()]
        _write_manifest(output / "clips.csv", rows)
    print(_summary(rows))
    if problems:
        print("\n  ".join([f"{len(problems):,} could not be cut:", *map(sanitize, problems)]))
    print(f"\n{_next_step(output, rows)}")
    return int(bool(problems))


def _check(config: CutConfig) -> None:
    for name, low, high in (("seconds", 0.04, 3600), ("stride", 0.01, 36000), ("margin", 0, 3600)):
        if not low <= getattr(config, name) <= high:
            raise UserError(f"{name} = {getattr(config, name)}: must be from {low:g} to {high:g}")
    if not 0 <= config.min_share < 1:
        raise UserError(f"min_share = {config.min_share}: must be at least 0 and below 1")
    if not 0.001 <= config.annotation_fps <= 1000:
        raise UserError(f"annotation_fps = {config.annotation_fps}: must be from 0.001 to 1000")
    if config.num_workers < 0:
        raise UserError(f"num_workers = {config.num_workers}: must be at least 0")


def _find_videos(root: Path, output: Path) -> list[Path]:
    """The videos, without the clips of an earlier run below them."""
    if root.is_file():
        return [root]
    if not root.is_dir():
        raise UserError(f"{root}: no such folder or video")
    found = find_videos(root)
    made_here = output.absolute()
    videos = [path for path in found.paths if made_here not in path.absolute().parents]
    if not videos:
        raise UserError(no_video(root, found))
    if found.passed_over:
        print(f"{root}: {found.passed_over}")
    return videos


def _select(config: CutConfig, segments: dict[Path, list[Segment]]) -> dict[Path, list[Segment]]:
    """The segments with the wanted labels.

    Raises:
        UserError: a wanted label does not occur, or train.py would refuse the classes.
    """
    labels = {segment.label for rows in segments.values() for segment in rows}
    if unknown := [label for label in config.labels if label not in labels]:
        raise UserError(
            f"{config.annotations}: no segment is labelled {list_some(unknown)} (--labels): the "
            f"labels are {list_some(sorted(labels), 20)}"
        )
    if config.labels:
        segments = {
            v: [s for s in rows if s.label in config.labels] for v, rows in segments.items()
        }
        labels = set(config.labels)
    classes = sorted(labels - set(NON_CLASS_LABELS) | ({config.background} - {""}))
    if problems := class_problems(classes):
        raise UserError("\n  ".join([f"{config.annotations}: train.py would refuse:", *problems]))
    return segments


def _patients(
    videos: Sequence[Path], root: Path, pattern: str
) -> tuple[dict[Path, str | None], str]:
    """The patient of each video if it is known, and a remark if it is not known of all."""
    find_patient = patient_finder(pattern)
    patients = {}
    for video in videos:
        path = _relative(video, root)
        patients[video] = find_patient(path) or parse_slam_filename(path).get("patient")
    unknown = [video.name for video, patient in patients.items() if not patient]
    if unknown and pattern:
        raise UserError(
            f"--patient-pattern {shlex.quote(pattern)} finds no patient in {len(unknown):,} "
            f"of {len(videos):,} videos: {list_some(unknown)}"
        )
    if unknown:
        return patients, (
            f"the patients of {len(unknown):,} videos are not known: each video counts as a "
            "patient of its own (--patient-pattern finds patients in the names)"
        )
    return patients, ""


def _relative(video: Path, root: Path) -> str:
    return video.relative_to(root).as_posix() if video != root else video.name


def _plan(
    config: CutConfig, segments: dict[Path, list[Segment]]
) -> tuple[dict[Path, _Plan], list[str]]:
    """What each video is cut into, and the problems with those that cannot be read."""
    plans, problems = {}, []
    left_out: Counter[str] = Counter()
    items, plan_video = list(segments.items()), partial(_plan_video, config)
    for (video, of_video), plan in in_parallel(
        plan_video, items, config.num_workers, "reading", "video"
    ):
        if isinstance(plan, str):
            problems.append(f"{video}: {plan}")
            continue
        plans[video] = plan
        left_out += plan.left_out
        if late := [segment for segment in of_video if segment.end > plan.duration + _LATE]:
            print(
                f"{sanitize(video.name)}: {len(late):,} of {len(of_video):,} segments end after "
                f"the video, the last at {late[-1].end:.1f} s of {plan.duration:.1f} s: what is "
                "beyond its end is left out"
            )
    for reason, count in left_out.items():
        print(f"left out: {count:,} clips {reason}")
    return plans, problems


def _plan_video(config: CutConfig, item: tuple[Path, list[Segment]]) -> _Plan | str:
    """What a video is cut into; or why it cannot be read."""
    video, segments = item
    try:
        times = frame_times(video)
    except ClipError as error:
        return error.reason
    grid = config.seconds, config.stride, config.margin, config.min_share
    clips, left_out = plan_clips(segments, times.duration, *grid, config.background)
    return _Plan(times.duration, not len(times.pts), clips, left_out)


def _rows(plans: dict[Path, _Plan], patients: dict[Path, str | None], root: Path) -> list[_Row]:
    """All clips with their files: `clips/<class>/<video>_<start ms>-<end ms>.mp4`."""
    paths = {video: _relative(video, root) for video in plans}
    names = safe_file_names([(path, PurePosixPath(path).stem) for path in paths.values()])
    labels = sorted({clip.label for plan in plans.values() for clip in plan.clips})
    folders = safe_file_names([(label, label) for label in labels])
    rows = []
    for video, plan in plans.items():
        name = names[paths[video]]
        for clip in plan.clips:
            times = f"{round(1000 * clip.start)}-{round(1000 * clip.end)}"
            path = f"clips/{folders[clip.label]}/{name}_{times}.mp4"
            rows.append(_Row(path, clip, video, patients[video] or name, name))
    return rows


def _cut_missing(
    output: Path, rows: Sequence[_Row], counted: Collection[Path], num_workers: int
) -> list[str]:
    """Remove clips that are out of date, and cut those that are missing. Returns the problems."""
    stamps = {video: os.stat(video) for video in {row.video for row in rows}}
    wanted = {
        row.path: f"{stamps[row.video].st_size} {stamps[row.video].st_mtime_ns} "
        f"{row.clip.start!r} {row.clip.end!r}"
        for row in rows
    }
    record = read_json(output / "cut.json", _SHAPE) or {"format": FORMAT, "clips": {}}
    if record["format"] != FORMAT:
        raise UserError(f"{output}: cut by another version of this project: give another --output")
    present = {path for path in {*wanted, *record["clips"]} if (output / path).is_file()}
    if foreign := sorted(present - record["clips"].keys()):
        raise UserError(
            f"{output}: holds {len(foreign):,} clips that were not cut here ({foreign[0]}): give "
            "another --output"
        )
    stale = [p for p in present if _is_clip_path(p) and wanted.get(p) != record["clips"][p]]
    kept = present - set(stale)
    missing = [row for row in rows if row.path not in kept]
    if stale or missing:  # the list appears again when it is complete
        (output / "clips.csv").unlink(missing_ok=True)
    # Only then the record names the new clips: a file that is there is always the one it names.
    for path in stale:
        (output / path).unlink()
    write_json(output / "cut.json", {"format": FORMAT, "clips": wanted})
    if stale:
        print(f"removed: {len(stale):,} clips of other settings, labels or videos")
    print(f"{len(rows):,} clips, {len(rows) - len(missing):,} of them cut already")
    folders = {(output / row.path).parent for row in rows}
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
    problems = []
    tasks = _tasks(output, missing, counted)
    for (video, excerpts), results in in_parallel(_write, tasks, num_workers, "cutting", "part"):
        for excerpt, problem in zip(excerpts, results, strict=True):
            if problem:
                problems.append(f"{video}, {excerpt.start:.1f} to {excerpt.end:.1f} s: {problem}")
    for folder in folders:
        remove_unfinished(folder)
    remove_empty({(output / path).parent for path in stale})
    return problems


def _is_clip_path(path: str) -> bool:
    """Whether a path in cut.json leads to a clip, and nowhere else: these files are deleted."""
    parts = PurePosixPath(path).parts
    return len(parts) == 3 and parts[0] == "clips" and ".." not in parts and path.endswith(".mp4")


def _tasks(
    output: Path, rows: Iterable[_Row], counted: Collection[Path]
) -> list[tuple[Path, list[Excerpt]]]:
    """What each process cuts at once: clips of one video that follow each other."""
    tasks = []
    for video, group in itertools.groupby(rows, key=lambda row: row.video):
        excerpts = [Excerpt(row.clip.start, row.clip.end, output / row.path) for row in group]
        # Where frames must be counted from the start, the video is decoded once for all.
        size = len(excerpts) if video in counted else _PER_TASK
        tasks += [(video, excerpts[i : i + size]) for i in range(0, len(excerpts), size)]
    return tasks


def _write(task: tuple[Path, list[Excerpt]]) -> list[str]:
    return write_excerpts(*task)


def _write_manifest(path: Path, rows: Iterable[_Row]) -> None:
    table = [["path", "label", "patient", "video", "action"]]
    for row in rows:
        segment = row.clip.segment
        action = f"{row.name}_{round(1000 * segment.start)}-{round(1000 * segment.end)}"
        table.append([row.path, row.clip.label, row.patient, row.name, action])
    write_csv(path, table)


def _summary(rows: Sequence[_Row]) -> str:
    """The number of clips of each patient and class."""
    labels = sorted({row.clip.label for row in rows})
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for row in rows:
        counts[row.patient][row.clip.label] += 1
    patients = sorted(counts)
    if len(patients) > _MOST_PATIENTS:
        rest = patients[_MOST_PATIENTS:]
        name = f"{len(rest):,} others"
        counts[name] = sum((counts[patient] for patient in rest), Counter())
        patients = [*patients[:_MOST_PATIENTS], name]
    counts["(all)"] = sum((counts[patient] for patient in patients), Counter())
    table = [["patient", *labels, "all"]]
    for patient in (*patients, "(all)"):
        numbers = [counts[patient][label] for label in labels]
        table.append([patient, *map(str, numbers), str(sum(numbers))])
    return text_table(table)


def _next_step(output: Path, rows: Sequence[_Row]) -> str:
    """The command that divides the clips into train, val and test; it works as it is printed."""
    names = itertools.chain(["splits"], (f"splits{n}" for n in itertools.count(2)))
    free = next(name for name in names if not (output / name).exists())
    manifest, splits = str(output / "clips.csv"), str(output / free)
    command = ["python", sys.argv[0], "split", manifest, "--output", splits]
    groups = {"patient": {r.patient for r in rows}, "video": {r.name for r in rows}}
    by = next((group for group, names in groups.items() if len(names) >= 3), "clip")
    if by == "patient":
        return f"to divide them: {shlex.join(command)}"
    return (
        f"fewer than 3 patients, who cannot fill train, val and test. Until there are more, the "
        f"results will not hold for other patients: {shlex.join([*command, '--group-by', by])}"
    )
