"""Annotations of whole videos, as people have them: labelled segments, and their videos.

`read_annotations` understands

- timelines: a table with the header `start,end,label`, and if known `confidence` and `video`: what
  predict.py and its timeline.html write;
- Cholec80's phases (`video01-phase.txt`) and CholecT50's JSON (phases, or another category);
- ELAN: .eaf files, and tab-delimited text with a row per annotation or a column per tier;
- BORIS: aggregated events, and tabular events with START and STOP rows;
- Audacity's label tracks.

The format is recognised by the content. A file belongs to the video that it names in a column, or
else to the one of its own name.
"""

import itertools
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePath
from typing import NamedTuple

from clips.annotation_formats import CHOLEC80_FPS, parse_file
from clips.segments import UNDERSTOOD, Entry, Segment, UnknownFormatError, list_tiers
from utils.errors import UserError
from utils.run_dir import sanitize
from utils.text_table import list_some, shorten
from video.files import is_video

SUFFIXES = (".csv", ".tsv", ".txt", ".json", ".eaf")

_TOLERANCE = 1e-6  # seconds by which segments may overlap, because of rounding


class Annotations(NamedTuple):
    """The segments of some videos."""

    videos: dict[str, list[Segment]]
    """by the name of the video (empty: the file does not name it), in order of time, without
    overlap"""
    notes: list[str]
    """what the reader must know: how a file was understood, and what was left out"""


class FolderAnnotations(NamedTuple):
    """The annotation files in a folder."""

    files: dict[Path, Annotations]
    unknown: list[Path]
    """files that are no annotations"""


def read_annotations(
    path: str | Path, tiers: Sequence[str] = (), fps: float = CHOLEC80_FPS
) -> Annotations:
    """The segments of each video in a file.

    Args:
        tiers: names of the tiers (ELAN), categories (CholecT50), or behaviours, their categories or
            subjects (BORIS) whose segments are wanted; none: all, of CholecT50 the phases. Formats
            without tiers ignore it.
        fps: frames per second of frame numbers, where the file does not say it (Cholec80).

    Raises:
        UnknownFormatError: it is no annotation in a format that is understood.
        UserError: segments overlap, or something else is wrong; the message lists all problems.
    """
    path = Path(path)
    parsed = parse_file(path, fps)
    entries, problems = parsed.entries, parsed.problems
    known = list(dict.fromkeys(tier for entry in entries for tier in entry.tiers))
    wanted = tuple(tiers) or ((parsed.default_tier,) if parsed.default_tier else ())
    if wanted and known:
        if missing := [tier for tier in wanted if tier not in known]:
            raise UserError(f"{path}: no tier {_names(missing)} (--tier): it has {_names(known)}")
        entries = [entry for entry in entries if set(entry.tiers) & set(wanted)]
    if parsed.one_tier and not tiers and len(choices := list_tiers(entries)) > 1:
        raise UserError(f"{path}: has several tiers: choose with --tier: {_names(choices)}")
    videos: dict[str, list[Entry]] = {}
    for entry in entries:
        videos.setdefault(entry.video, []).append(entry)
    for name, of_video in videos.items():
        of_video.sort(key=lambda entry: entry.segment.start)
        where = f" of video {shorten(name)}" if name else ""
        for before, after in itertools.pairwise(of_video):
            if after.segment.start >= before.segment.end - _TOLERANCE:
                continue
            if choices := list_tiers(of_video):
                labels = " and ".join(repr(shorten(e.segment.label)) for e in (before, after))
                raise UserError(
                    f"{path}, {after.where}: {labels} overlap{where}: choose with --tier: "
                    f"{_names(choices)}"
                )
            problems.append(f"{after.where}: starts before the segment before it ends{where}")
    if not videos and not problems:
        problems.append("holds no segments")
    if problems:
        listing = list_some(problems, 20, "\n  ")
        raise UserError(f"{path}: not a timeline:\n  {listing}")
    segments = {name: [entry.segment for entry in rows] for name, rows in videos.items()}
    return Annotations(segments, parsed.notes)


def read_folder(
    folder: Path, tiers: Sequence[str] = (), fps: float = CHOLEC80_FPS, recursive: bool = True
) -> FolderAnnotations:
    """The annotations in a folder: all files in a format that is understood.

    Hidden files are passed over, and all results of predict.py but timeline.csv.

    Args:
        recursive: read the folders in it too, among them those of predict.py.

    Raises:
        UserError: a file has problems, or none is an annotation.
    """
    files, unknown = {}, []
    for path in _candidates(folder, recursive):
        try:
            files[path] = read_annotations(path, tiers, fps)
        except UnknownFormatError:
            unknown.append(path)
    if not files:
        found = f"; none of them is {', '.join(p.name for p in unknown[:3])}" if unknown else ""
        raise UserError(f"{folder}: holds no annotation: understood are {UNDERSTOOD}{found}")
    return FolderAnnotations(files, unknown)


def _candidates(folder: Path, recursive: bool) -> list[Path]:
    paths = []
    for root, folders, names in os.walk(folder):
        folders[:] = [name for name in sorted(folders) if recursive and not name.startswith(".")]
        if root.lower().endswith(".timeline"):
            names = ["timeline.csv"] if "timeline.csv" in names else []
        paths += [
            Path(root, name)
            for name in sorted(names)
            if not name.startswith(".") and name.lower().endswith(SUFFIXES)
        ]
    return paths


def video_name(path: Path) -> str:
    """The name of the video that an annotation file belongs to, if it does not say it itself.

    `op1.csv` and `op1.mp4.csv` belong to op1.mp4, `video01-phase.txt` (Cholec80) to video01.mp4,
    and `op1.mp4.timeline/timeline.csv` (predict.py) to op1.mp4.
    """
    if path.parent.suffix == ".timeline":
        return path.parent.stem
    return path.stem.removesuffix("-phase")


def is_same_video(name: str, other: str) -> bool:
    """Whether two names mean one video: with or without an ending (.mp4), and whatever the case."""
    return _stem(name) == _stem(other)


def _stem(name: str) -> str:
    name = PurePath(name.replace("\\", "/")).name
    return (PurePath(name).stem if is_video(name) else name).casefold()


def match_videos(
    videos: Sequence[Path], files: Iterable[tuple[Path, Annotations]]
) -> tuple[dict[Path, list[Segment]], list[str]]:
    """The segments of each video, and the names of annotations that belong to none of them.

    Videos of one name in several folders are told apart by the name of the folder, which must be
    that of the annotation's folder too.

    Raises:
        UserError: an annotation belongs to two videos, or a video has two annotations.
    """
    by_stem: dict[str, list[Path]] = {}
    for video in videos:
        by_stem.setdefault(_stem(video.name), []).append(video)
    found: dict[Path, tuple[Path, list[Segment]]] = {}
    unmatched, problems = [], []
    for path, annotations in files:
        for name, segments in annotations.videos.items():
            source = Path(name.replace("\\", "/")) if name else path.with_name(video_name(path))
            candidates = by_stem.get(_stem(source.name), [])
            exact = [video for video in candidates if video.name == source.name]
            candidates = exact or candidates
            if len(candidates) > 1:
                same = [v for v in candidates if v.parent.name == source.parent.name]
                candidates = same if len(same) == 1 else candidates
            if not candidates:
                unmatched.append(name or path.name)
            elif len(candidates) > 1:
                listing = list_some((str(video) for video in candidates), 3)
                problems.append(f"{path}: {source.name} may be any of {listing}: rename them")
            elif candidates[0] in found:
                other = found[candidates[0]][0]
                problems.append(
                    f"{candidates[0]}: has two annotations, in {other} and in {path}: keep one"
                )
            else:
                found[candidates[0]] = path, segments
    if problems:
        heading = "not certain which video is meant:"
        raise UserError("\n  ".join([heading, *map(sanitize, problems)]))
    return {video: segments for video, (_, segments) in found.items()}, unmatched


def annotate_videos(
    videos: Sequence[Path], source: Path, tiers: Sequence[str] = (), fps: float = CHOLEC80_FPS
) -> tuple[dict[Path, list[Segment]], list[str]]:
    """The segments of each annotated video, and notes for the reader.

    Args:
        source: an annotation, or a folder of them. One that does not name its video belongs to the
            only video, if there are no others.
        tiers, fps: see `read_annotations`.

    Raises:
        UserError: an annotation is wrong, or none is of any of the videos.
    """
    notes = []
    if source.is_dir():
        folder = read_folder(source, tiers, fps)
        files = folder.files
        if folder.unknown:
            names = list_some(path.name for path in folder.unknown)
            notes.append(f"{source}: no annotations, passed over: {names}")
    else:
        files = {source: read_annotations(source, tiers, fps)}
        if len(videos) == 1 and list(files[source].videos) == [""]:
            named = {videos[0].name: files[source].videos[""]}
            files[source] = Annotations(named, files[source].notes)
    for note, count in Counter(note for file in files.values() for note in file.notes).items():
        notes.append(f"{note} ({count:,} files)" if count > 1 else note)
    segments, unmatched = match_videos(videos, files.items())
    if unmatched:
        notes.append(f"annotations without a video: {list_some(unmatched)}")
    if missing := [video.name for video in videos if video not in segments]:
        notes.append(f"videos without an annotation: {list_some(missing)}")
    if not segments:
        raise UserError("\n  ".join([f"{source}: belongs to none of the videos:", *notes]))
    return segments, notes


def _names(names: Iterable[str]) -> str:
    """Names as a shell takes them, the longest shortened."""
    return list_some((f"'{n}'" if re.search(r"\W", n) else n for n in map(shorten, names)), 10, " ")
