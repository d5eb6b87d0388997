"""Parses the formats that annotations of whole videos may have; annotations.py describes them.

Sources of the formats:

- Cholec80: `video01-phase.txt` with the header `Frame<tab>Phase` and a row per frame, numbered from
  0, at 25 frames per second (Twinanda et al., arXiv:1602.03012, and the README of the data set).
- CholecT50: github.com/CAMMA-public/cholect50, docs/README-Format.md and dataloader_pth.py.
- ELAN: see elan.py.
- BORIS: export_observation.py and export_events.py of github.com/olivierfriard/BORIS.
- Audacity: manual.audacityteam.org/man/importing_and_exporting_labels.html.
"""

import itertools
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

from clips.elan import find_columns, parse_eaf, parse_elan_table, parse_rows
from clips.segments import (
    LONGEST,
    Entry,
    Parsed,
    Segment,
    UnknownFormatError,
    is_float,
    parse_segment,
)
from utils.errors import UserError, describe_os_error
from utils.files import parse_json
from utils.structure import find_mismatch
from utils.tables import Row, Table, column_name, parse_number, read_table, read_text
from utils.text_table import shorten

CHOLEC80_FPS = 25.0
MAX_BYTES = 64 << 20  # the largest annotation is a few MB; a video by mistake is much larger

_CHOLECT50_PLACES = {"phase": 14, "triplet": 0, "instrument": 1, "verb": 7, "target": 8}
_BORIS_PREAMBLE = 100  # rows above the header in the tabular events of BORIS up to version 7


def parse_file(path: Path, fps: float = CHOLEC80_FPS) -> Parsed:
    """The segments in a file; its format is recognised by its content.

    Args:
        fps: frames per second of frame numbers, where the file does not say it (Cholec80).

    Raises:
        UnknownFormatError: the format is not understood.
        UserError: the file cannot be read, is too large, is damaged, or is not UTF-8.
    """
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise UserError(
                f"{path}: {size / 1e6:,.0f} MB are too much for an annotation (at most "
                f"{MAX_BYTES / 1e6:.0f} MB)"
            )
        text = read_text(path)
    except OSError as error:
        raise UserError(describe_os_error(error, path)) from None
    start = text.lstrip()[:1]
    if start == "<":
        return parse_eaf(path, text)
    if start in ("{", "["):
        return _parse_cholect50(path, text)
    return _parse_text(path, text, fps)


def _parse_text(path: Path, text: str, fps: float) -> Parsed:
    """The segments in a table, with or without a header."""
    lines = enumerate(re.split(r"\r\n|\r|\n", text), 1)
    # ELAN may write the media files first: `"#file:///op.mp4 -- offset: 0"`.
    rows = [Row(n, line.split("\t")) for n, line in lines if line.strip() and line[:2] != '"#']
    first = rows[0].cells if rows else []
    if len(first) in (2, 3) and all(map(is_float, first[:2])):
        return _parse_audacity(rows)
    if len(first) > 2 and (columns := find_columns(first)):
        return parse_rows(rows, columns)
    if any(column_name(cell).startswith("begin time - ") for cell in first):
        return parse_elan_table(path, Table(path, rows, "\t", []))
    table = read_table(path)
    header = [column_name(cell) for cell in table.rows[0].cells] if table.rows else []
    if {"frame", "phase"} <= set(header):
        return _parse_cholec80(table, fps)
    if any(name.startswith("begin time - ") for name in header):
        return parse_elan_table(path, table)  # ELAN's CSV
    for number, (_, cells) in enumerate(table.rows[:_BORIS_PREAMBLE]):
        names = {column_name(cell) for cell in cells}
        below = table if number == 0 else Table(path, table.rows[number:], table.delimiter, [])
        if {"behavior", "start (s)", "stop (s)"} <= names:
            return _parse_boris(below, aggregated=True)
        if {"behavior", "time"} <= names and names & {"behavior type", "status"}:
            return _parse_boris(below, aggregated=False)
    missing = {"start", "end", "label"} - set(header)
    if header and {"start", "end"} <= missing:
        beginning = shorten(" ".join(text.split(maxsplit=20)[:20]), 60)
        raise UnknownFormatError(path, f"a text that begins with {beginning!r}")
    if missing:
        raise UserError(
            f"{path}: no column {', '.join(sorted(missing))} (a timeline has the header "
            "start,end,label)"
        )
    return _parse_timeline(table)


def _parse_timeline(table: Table) -> Parsed:
    """This project's timeline.csv: start, end, label, and if known confidence and video."""
    entries, problems = [], []
    for line, row in table.records():
        cells = (row.get(name, "") for name in ("start", "end", "label"))
        try:
            segment = parse_segment(*cells, table.delimiter, ("start", "end"))
            confidence = row.get("confidence", "").strip()
            if confidence not in ("", "nan"):
                try:
                    number = parse_number(confidence, table.delimiter)
                except ValueError as error:
                    raise ValueError(f"confidence is {shorten(confidence)!r}, {error}") from None
                segment = segment._replace(confidence=number)
            entries.append(Entry(f"line {line}", segment, (), row.get("video", "").strip()))
        except ValueError as error:
            problems.append(f"line {line}: {error}")
    return Parsed(entries, problems, [])


def _parse_audacity(rows: Sequence[Row]) -> Parsed:
    r"""Audacity's label track: start, end and label; a line with `\` gives frequencies."""
    entries, problems, points = [], [], 0
    for line, cells in rows:
        if cells[0] == "\\":
            continue
        start, end, label = [*cells, "", ""][:3]
        if start == end:
            points += 1
            continue
        try:
            segment = parse_segment(start, end, label, "\t", ("start", "end"))
            entries.append(Entry(f"line {line}", segment))
        except ValueError as error:
            problems.append(f"line {line}: {error}")
    return Parsed(entries, problems, _points(points))


def _points(count: int) -> list[str]:
    return [f"{count:,} points in time, which have no duration, are left out"] if count else []


def _runs(
    labels: Mapping[int, Collection[str]], fps: float
) -> Iterator[tuple[int, float, float, str]]:
    """Stretches of successive frames with one label: first frame, start and end in seconds, label.

    A frame lasts until the next one that is listed, and at most as long as frames usually do.
    """
    numbers = sorted(labels)
    steps = Counter(after - before for before, after in itertools.pairwise(numbers))
    step = steps.most_common(1)[0][0] if steps else 1
    begun: dict[str, int] = {}
    for number, following in itertools.zip_longest(numbers, numbers[1:]):
        end = number + step if following is None else min(following, number + step)
        begun = dict.fromkeys(labels[number], number) | begun
        goes_on = labels[following] if following == end else ()
        for label in [label for label in begun if label not in goes_on]:
            first = begun.pop(label)
            yield first, first / fps, end / fps, label


def _parse_cholec80(table: Table, fps: float) -> Parsed:
    """Cholec80's phases: the label of each frame."""
    labels: dict[int, tuple[str]] = {}
    problems = []
    for line, row in table.records():
        frame, phase = row.get("frame", "").strip(), row.get("phase", "").strip()
        if not re.fullmatch(r"\d{1,9}", frame, re.ASCII) or int(frame) / fps > LONGEST:
            problems.append(f"line {line}: {shorten(frame)!r} is no number of a frame")
        elif int(frame) in labels:
            problems.append(f"line {line}: frame {frame} is there twice")
        elif not phase:
            problems.append(f"line {line}: has no phase")
        else:
            labels[int(frame)] = (phase,)
    entries = [Entry(f"frame {n}", Segment(*rest)) for n, *rest in _runs(labels, fps)]
    note = f"frame numbers are taken as {fps:g} per second (--annotation-fps)"
    return Parsed(entries, problems, [note])


def _parse_cholect50(path: Path, text: str) -> Parsed:
    """CholecT50's JSON: for each frame a list of vectors with the ids of triplet, phase etc."""
    content = parse_json(text, str(path), object)
    shape = {"annotations": {str: [[float]]}, "categories": object}
    if not isinstance(content, dict) or not {"annotations", "categories"} <= content.keys():
        keys = list(content)[:5] if isinstance(content, dict) else type(content).__name__
        raise UnknownFormatError(path, f"JSON with {shorten(str(keys))}")
    mismatch = find_mismatch(content, shape)
    fps = content.get("fps", 1)
    if isinstance(fps, bool) or not isinstance(fps, int | float) or not 0.001 <= fps <= 1000:
        mismatch = f"fps is {shorten(str(fps))}"
    if mismatch:
        raise UserError(f"{path}: not CholecT50's format: {mismatch}")
    categories = content["categories"]
    if isinstance(categories, list):
        categories = dict(
            pair for part in categories if isinstance(part, dict) for pair in part.items()
        )
    problems, frames = [], {}
    for frame, instances in content["annotations"].items():
        if not re.fullmatch(r"\d{1,9}", frame, re.ASCII) or int(frame) / fps > LONGEST:
            problems.append(f"{shorten(frame)!r} is no number of a frame")
        elif any(len(vector) < 15 for vector in instances):
            problems.append(f"frame {frame}: has vectors of fewer than 15 numbers")
        else:
            frames[int(frame)] = instances
    entries = []
    for tier, place in _CHOLECT50_PLACES.items():
        names = categories.get(tier) if isinstance(categories, dict) else None
        names = names if isinstance(names, dict) else {}
        labels = {
            frame: {
                str(names.get(str(int(vector[place])), f"{tier} {int(vector[place])}"))
                for vector in instances
                if vector[place] >= 0
            }
            for frame, instances in frames.items()
        }
        for first, *rest in _runs(labels, fps):
            segment = Segment(*rest)
            entries.append(Entry(f"frame {first}", segment, (tier, segment.label)))
    return Parsed(entries, problems, [], default_tier="phase")


def _parse_boris(table: Table, aggregated: bool) -> Parsed:
    """BORIS's aggregated events (a row per event), or its tabular events (START and STOP rows)."""
    entries, problems, points = [], [], 0
    begun: dict[tuple[str, ...], tuple[int, str]] = {}
    for line, row in table.records():
        row = {name: cell.strip() for name, cell in row.items()}
        behavior, subject = row.get("behavior", ""), row.get("subject", "")
        observation = row.get("observation id", "")
        kind = (row.get("status") or row.get("behavior type") or "STATE").upper()
        if kind == "POINT":
            points += 1
            continue
        tiers = (row.get("behavioral category", ""), subject, behavior)
        try:
            video = _boris_video(row)
            if aggregated:
                times = row.get("start (s)", ""), row.get("stop (s)", "")
            elif kind == "START":
                if (observation, subject, behavior) in begun:
                    raise ValueError(f"{shorten(behavior)!r} starts again before it stops")
                begun[observation, subject, behavior] = line, row.get("time", "")
                continue
            elif kind == "STOP":
                _, start = begun.pop((observation, subject, behavior), (0, ""))
                if not start:
                    raise ValueError(f"{shorten(behavior)!r} stops, but has not started")
                times = start, row.get("time", "")
            else:
                raise ValueError(f"{shorten(kind)!r} is neither START, STOP nor POINT")
            segment = parse_segment(*times, behavior, table.delimiter, ("start", "stop"))
            named = tuple(tier for tier in tiers if tier)
            entries.append(Entry(f"line {line}", segment, named, video))
        except ValueError as error:
            problems.append(f"line {line}: {error}")
    for (_, _, behavior), (line, _) in begun.items():
        problems.append(f"line {line}: {shorten(behavior)!r} never stops")
    return Parsed(entries, problems, _points(points))


def _boris_video(row: Mapping[str, str]) -> str:
    """The video of an event of BORIS: the file of its first player, or else the observation.

    Raises:
        ValueError: the times are not those of one video.
    """
    source = row.get("source") or row.get("media file") or ""
    files = [name for name in re.sub(r"^player #1: ?", "", source).split("|")[0].split(";") if name]
    if len(files) > 1:
        raise ValueError(
            f"the observation has {len(files)} media files one after the other: export one "
            "observation per video"
        )
    offset = row.get("time offset (s)", "")
    if is_float(offset) and float(offset.replace(",", ".")):
        raise ValueError(f"the observation has a time offset of {offset} s: set it to 0 in BORIS")
    names = (row.get("media file name"), row.get("media file path"), *files)
    known = (name for name in names if name and name not in ("NA", "Not found"))
    return next(known, row.get("observation id", ""))
