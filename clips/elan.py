"""Parses the annotations of ELAN: .eaf files, and the text that it exports.

Sources: the schema EAFv3.0.xsd (times are in milliseconds), and ELAN's own
Transcription2TabDelimitedText, which writes a row per annotation without a header, or a column per
tier with a header.
"""

import itertools
import math
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path

from clips.segments import (
    FRAMES,
    Entry,
    Parsed,
    UnknownFormatError,
    is_float,
    parse_seconds,
    parse_segment,
)
from utils.errors import UserError
from utils.tables import Row, Table, column_name
from utils.text_table import shorten

# What the columns of times of ELAN look like: hh:mm:ss.ms, ss.msec, msec and frames.
_TIMES = {
    "clock": re.compile(r"\d+:\d\d:\d\d[.,]\d+", re.ASCII),
    "seconds": re.compile(r"\d+[.,]\d+", re.ASCII),
    "milliseconds": re.compile(r"\d+", re.ASCII),
    "frames": FRAMES,
}


def _kind(cell: str) -> str:
    kinds = (kind for kind, pattern in _TIMES.items() if pattern.fullmatch(cell.strip()))
    return next(kinds, "")


def find_columns(cells: Sequence[str]) -> tuple[int, int, int] | None:
    """The columns of begin, end and annotation in ELAN's rows without a header, or None.

    ELAN writes tier and participant, then begin, end and duration, each in the same one to four
    kinds of time, then the annotation. The annotation may look like a time as well.
    """
    kinds = [_kind(cell) for cell in cells]
    first = next((i for i, kind in enumerate(kinds) if kind), len(kinds))
    block = list(itertools.takewhile(bool, kinds[first:]))
    if first > 2 or len(block) < 2 or len(kinds) < first + 3:
        return None
    period = next((i for i in range(1, len(block)) if block[i] == block[0]), 0)
    if not period or block[0] == "milliseconds":  # seconds or milliseconds: not certain
        return None
    times = 1
    while block[times * period : (times + 1) * period] == block[:period] and times < 3:
        times += 1
    if times == 3:
        begin, end, third = (_seconds(cells[first + i * period]) for i in range(3))
        times = 3 if abs(end - begin - third) < 0.002 else 2
    label = first + times * period
    return (first, first + period, label) if times > 1 and label < len(cells) else None


def _seconds(cell: str) -> float:
    try:
        return parse_seconds(cell, "\t")
    except ValueError:
        return math.nan


def parse_rows(rows: Sequence[Row], columns: tuple[int, int, int]) -> Parsed:
    """ELAN's tab-delimited text with a row per annotation."""
    begin, end, label = columns
    entries, problems = [], []
    for line, cells in rows:
        if len(cells) <= label:
            problems.append(f"line {line}: has {len(cells)} columns, not {label + 1} or more")
            continue
        try:
            segment = parse_segment(cells[begin], cells[end], cells[label], "\t", ("begin", "end"))
            tiers = tuple(cell.strip() for cell in cells[:begin] if cell.strip())
            entries.append(Entry(f"line {line}", segment, tiers))
        except ValueError as error:
            problems.append(f"line {line}: {error}")
    return Parsed(entries, problems, [], one_tier=True)


def parse_elan_table(path: Path, table: Table) -> Parsed:
    """ELAN's text with a column per tier, and a header."""
    header = table.header(str.strip)
    by_name = {column_name(name): name for name in header}
    units = ("hh:mm:ss.ms", "ss.msec", "msec")
    unit = next((u for u in units if {f"begin time - {u}", f"end time - {u}"} <= set(by_name)), "")
    if not unit:
        raise UserError(
            f"{path}: no columns of begin and end times in hh:mm:ss.ms, ss.msec or msec: choose "
            "them in ELAN when you export"
        )
    begin, end = by_name[f"begin time - {unit}"], by_name[f"end time - {unit}"]
    times = re.compile(r"(begin time|end time|duration) - ")
    tiers = [n for n in header if n and not times.match(column_name(n))]
    tiers = [n for n in tiers if column_name(n) not in ("file name", "file path")]
    entries, problems = [], []
    for line, row in table.records(str.strip):
        for tier in tiers:
            if not row.get(tier, "").strip():
                continue
            try:
                cells = [row.get(name, "") for name in (begin, end)]
                if unit == "msec":
                    cells = [f"{float(c) / 1000:.6f}" if is_float(c) else c for c in cells]
                segment = parse_segment(*cells, row[tier], table.delimiter, (begin, end))
                video = row.get(by_name.get("file name", ""), "").strip()
                entries.append(Entry(f"line {line}", segment, (tier,), video))
            except ValueError as error:
                problems.append(f"line {line}: {error}")
    return Parsed(entries, problems, [], one_tier=True)


class _EafReader:
    """Receives the elements of an .eaf file from the XML parser, and keeps what is needed."""

    def __init__(self) -> None:
        self.root = ""
        self.origin: float | None = None  # milliseconds of the first media file where time is 0
        self.slots: dict[str, str] = {}
        self.annotations: dict[str, dict[str, str]] = {}
        self._tier, self._annotation, self._text = "", None, None

    def start(self, tag: str, attributes: dict[str, str]) -> None:
        self.root = self.root or tag
        if tag == "TIME_SLOT":
            self.slots[attributes.get("TIME_SLOT_ID", "")] = attributes.get("TIME_VALUE", "")
        elif tag == "MEDIA_DESCRIPTOR" and self.origin is None:
            self.origin = float(attributes.get("TIME_ORIGIN", 0))
        elif tag == "TIER":
            self._tier = attributes.get("TIER_ID", "")
        elif tag in ("ALIGNABLE_ANNOTATION", "REF_ANNOTATION"):
            self._annotation = {**attributes, "tier": self._tier, "text": ""}
            self.annotations[attributes.get("ANNOTATION_ID", "")] = self._annotation
        elif tag == "ANNOTATION_VALUE":
            self._text = []

    def data(self, text: str) -> None:
        if self._text is not None:
            self._text.append(text)

    def end(self, tag: str) -> None:
        if tag == "ANNOTATION_VALUE" and self._text is not None:
            if self._annotation is not None:
                self._annotation["text"] = "".join(self._text)
            self._text = None

    def close(self) -> None:
        pass

    def slots_of(self, annotation: dict[str, str]) -> list[str | None]:
        """The times of an annotation, in milliseconds; those of its parent if it has none."""
        for _ in range(100):  # tiers that depend on tiers; a circle would be endless
            parent = self.annotations.get(annotation.get("ANNOTATION_REF", ""))
            if parent is None:
                break
            annotation = parent
        names = (annotation.get(f"TIME_SLOT_REF{n}", "") for n in (1, 2))
        return [self.slots.get(name) for name in names]


def parse_eaf(path: Path, text: str) -> Parsed:
    """An .eaf file of ELAN. A DOCTYPE, which could name other files or grow without end, is
    refused: ELAN writes none."""
    if re.search(r"<!\s*(DOCTYPE|ENTITY)", text, re.IGNORECASE):
        raise UserError(f"{path}: holds a DOCTYPE, which no .eaf file of ELAN has: it is not read")
    reader = _EafReader()
    parser = ElementTree.XMLParser(target=reader)
    try:
        parser.feed(text)
        parser.close()
    except (ElementTree.ParseError, ValueError) as error:
        raise UserError(f"{path}: is damaged: {error}") from None
    if reader.root != "ANNOTATION_DOCUMENT":
        raise UnknownFormatError(path, f"XML of the kind {shorten(reader.root)!r}")
    entries, problems, unaligned = [], [], 0
    for name, annotation in reader.annotations.items():
        slots = reader.slots_of(annotation)
        if not all(slots):
            unaligned += 1
            continue
        try:
            times = [f"{(float(slot) + (reader.origin or 0)) / 1000:.6f}" for slot in slots]
            segment = parse_segment(*times, annotation["text"], ",", ("begin", "end"))
            entries.append(Entry(f"annotation {name}", segment, (annotation["tier"],)))
        except ValueError as error:
            problems.append(f"annotation {shorten(name)}: {error}")
    notes = [f"{unaligned:,} annotations without times are left out"] if unaligned else []
    return Parsed(entries, problems, notes, one_tier=True)
