"""What is in a data set, and what its splits share: `prepare_data.py audit`.

A model tested on patients it was trained on is tested on its memory. This looks for what two splits
have in common: patients, videos, source actions (SLAM cuts an action into parts), files, and clips
that look alike. Names are read from the manifests; files that are not there are only counted.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import tyro

from clips.clip_table import read_clips, splits_of
from clips.manifest_formats import read_records
from clips.perceptual_hash import alike, content_hash, look
from utils.errors import UserError
from utils.files import write_text
from utils.workers import in_parallel
from video.container import ClipError, VideoFacts, probe

ALL = "(all)"  # not the name of any class or manifest

KINDS = ("patient", "video", "action", "content", "look")

_MEANING = {
    "patient": "patients",
    "video": "videos",
    "action": "source actions",
    "content": "identical files",
    "look": "groups of look-alikes",
}


@dataclass
class AuditConfig:
    """Say what a data set is made of, and whether its splits share patients, videos or clips.

    Ends with exit code 1 if they do.
    """

    manifests: tyro.conf.Positional[tuple[str, ...]]
    """manifests, one a split or with a column `split`; folders that hold train.csv, val.csv and
    test.csv; folders of videos, each a split"""
    data_root: str = ""
    """folder of the clips (empty: each manifest's own)"""
    patient_pattern: str = ""
    """regular expression that finds the patient in a path, e.g. "(VID[0-9]+)_" """
    looped: str = ""
    """SLAM's looped_clips.csv: count the clips that were padded by looping"""
    contents: bool = True
    """read the files: hashes, looks, durations, sizes, frame rates"""
    alike_bits: int = 20
    """clips look alike if at most so many of 192 bits differ (RESULTS.md tells what that finds)"""
    names: bool = False
    """name patients and videos in overlaps.csv, instead of numbering them"""
    output: str = ""
    """folder for the tables (empty: audit_<name>, here)"""
    workers: int = 2
    """processes that read the files"""


class Contents(NamedTuple):
    """What the file of a clip is."""

    facts: VideoFacts | None
    hash: str | None
    look: Any
    problem: str | None = None


def audit(config: AuditConfig) -> int:
    """Print the tables and write them as CSVs. Returns the exit code: 1 if splits share anything.

    Raises:
        UserError: no manifest can be read, or a setting cannot work.
    """
    if config.workers < 0 or config.alike_bits < 0:
        raise UserError("workers and alike_bits must be at least 0")
    clips = read_clips(config.manifests, config.data_root, config.patient_pattern)
    folder = Path(config.output or f"audit_{Path(config.manifests[0]).stem}")
    folder.mkdir(parents=True, exist_ok=True)
    print(f"{len(clips):,} clips in {', '.join(map(str, splits_of(clips)))}")
    _say_unknown(clips)
    tables = {"composition": composition(clips)}
    print(f"\nclips / patients / videos / source actions\n{_wide(tables['composition'])}")
    if config.looped:
        tables["looped"] = looped_clips(clips, config.looped)
        print(f"\nclips padded by looping\n{tables['looped'].to_string()}")
    there = clips["place"].notna()
    print(f"\nfiles: {there.sum():,} of {len(clips):,} are there")
    if there.any() and config.contents:
        clips = add_contents(clips, config.alike_bits, config.workers)
        tables["files"] = file_facts(clips)
        print(tables["files"].to_string(index=False))
        _say_unreadable(clips)
    else:
        print("this audit goes by names: overlaps of contents were not looked for")
    tables["overlaps"] = overlaps(clips, config.names)
    leaks = _say_overlaps(clips)
    for name, table in tables.items():
        write_text(folder / f"{name}.csv", table.to_csv(index=name == "looped"))
    print(f"\ntables: {folder}")
    return int(leaks)


def composition(clips: pd.DataFrame) -> pd.DataFrame:
    """Clips, patients, videos and source actions of each class and split, and of ALL of them."""
    rows = []
    for label in [*sorted(clips["label"].unique()), ALL]:
        for split in [*splits_of(clips), ALL]:
            some = clips[(clips["label"] == label) | (label is ALL)]
            some = some[(some["split"] == split) | (split is ALL)]
            known = {f"{kind}s": some[kind].nunique() for kind in ("patient", "video", "action")}
            rows.append({"class": label, "split": split, "clips": len(some), **known})
    return pd.DataFrame(rows)


def overlaps(clips: pd.DataFrame, names: bool = False) -> pd.DataFrame:
    """Everything that is in more than one split.

    Args:
        names: say what it is called; otherwise it is numbered, and found by the lines it is in.

    Returns:
        A row a shared patient, video, source action, file content or group of look-alikes: kind,
        unit, a count of clips for each split, and the manifest lines of its clips.
    """
    rows = []
    for kind in KINDS:
        for number, (unit, some) in enumerate(_shared(clips, kind), 1):
            counts = some["split"].value_counts()
            where = zip(some["manifest"], some["line"], strict=True)
            row = {"kind": kind, "unit": unit if names else f"{kind} {number}"}
            row |= {split: int(counts.get(split, 0)) for split in splits_of(clips)}
            rows.append(row | {"lines": " ".join(f"{Path(m).name}:{line}" for m, line in where)})
    return pd.DataFrame(rows, columns=["kind", "unit", *splits_of(clips), "lines"])


def looped_clips(clips: pd.DataFrame, csv: str) -> pd.DataFrame:
    """How many clips of each class and split SLAM's looped_clips.csv lists.

    Raises:
        UserError: it cannot be read.
    """
    records, problems = read_records(Path(csv))
    if problems:
        raise UserError(problems[0])
    looped = {Path(record.path.replace("\\", "/")).name for record in records}
    listed = [Path(path.replace("\\", "/")).name in looped for path in clips["path"]]
    some = clips[listed]
    return pd.crosstab(some["label"], some["split"], margins=True, margins_name=ALL)


def add_contents(clips: pd.DataFrame, alike_bits: int, workers: int) -> pd.DataFrame:
    """The clips with what is in their files: facts, content, look (a group's number), problem."""
    places = list(dict.fromkeys(clips["place"].dropna()))
    read = dict(in_parallel(_contents, places, workers, "reading the files"))
    groups = alike([one.look for one in read.values()], alike_bits)
    look_of = {place: str(group) for place, group in zip(read, groups, strict=True) if group >= 0}
    found = [read.get(place) for place in clips["place"]]
    clips = clips.assign(
        facts=[one and one.facts for one in found],
        content=[one and one.hash for one in found],
        look=[look_of.get(place) for place in clips["place"]],
        problem=[one and one.problem for one in found],
    )
    # A group of nothing but one file's copies is reported as identical files.
    copies = clips.groupby("look")["content"].transform("nunique") < 2
    return clips.assign(look=clips["look"].where(~copies, None))


def file_facts(clips: pd.DataFrame) -> pd.DataFrame:
    """Of each split: how many files could be read, how long they are, sizes and frame rates."""
    rows = []
    for split in splits_of(clips):
        facts = [one for one in clips.loc[clips["split"] == split, "facts"] if one is not None]
        seconds, frames = ([getattr(f, name) for f in facts] for name in ("seconds", "frames"))
        rows.append(
            {
                "split": split,
                "files": len(facts),
                "seconds": _range(seconds),
                "frames": _range(frames),
                "size": _common([f"{f.width}x{f.height}" for f in facts]),
                "frames a second": _common([f"{f.rate:.4g}" for f in facts]),
                "codec": _common([f.codec for f in facts]),
            }
        )
    return pd.DataFrame(rows)


def _contents(place: Path) -> Contents:
    try:
        return Contents(probe(place), content_hash(place), look(place))
    except ClipError as error:
        return Contents(None, content_hash(place), None, error.reason)
    except OSError as error:  # a file that is there but may not be read
        return Contents(None, None, None, error.strerror or str(error))


def _shared(clips: pd.DataFrame, kind: str) -> list[tuple[str, pd.DataFrame]]:
    """(unit, its clips) of the units of a kind that are in more than one split."""
    if kind not in clips:
        return []
    groups = clips.groupby(kind, sort=False)
    return [(unit, some) for unit, some in groups if some["split"].nunique() > 1]


def _say_overlaps(clips: pd.DataFrame) -> bool:
    """Print what the splits share. Returns whether they do."""
    splits = splits_of(clips)
    if len(splits) < 2:
        print("\nonly one split: there is nothing to compare it with")
        return False
    print("\nin more than one split:")
    leaks = False
    for kind in KINDS:
        shared = _shared(clips, kind)
        named = kind in clips and kind in ("patient", "video", "action")
        if kind not in clips or (named and not clips[kind].notna().any()):
            print(f"  {_MEANING[kind]}: unknown")
            continue
        leaks = leaks or bool(shared)
        print(f"  {_MEANING[kind]}: {len(shared):,} of {clips[kind].nunique():,}")
        for one, other in combinations(splits, 2):
            pairs = [some for _, some in shared if {one, other} <= set(some["split"])]
            clips_of = partial(_count, pairs)
            if pairs:
                print(
                    f"    {one} and {other} share {len(pairs):,}, with {clips_of(one):,} clips of "
                    f"{one} and {clips_of(other):,} of {other}"
                )
    print("LEAKAGE: test numbers partly measure memory" if leaks else "no leakage found")
    return leaks


def _count(groups: Sequence[pd.DataFrame], split: str) -> int:
    return sum(int((some["split"] == split).sum()) for some in groups)


def _say_unknown(clips: pd.DataFrame) -> None:
    unknown = int(clips["patient"].isna().sum())
    if unknown:
        print(
            f"the patient of {unknown:,} clips is unknown (a column `patient`, or SLAM's file "
            "names, would tell): overlaps of those cannot be seen"
        )


def _say_unreadable(clips: pd.DataFrame) -> None:
    unreadable = int(clips["problem"].notna().sum())
    if unreadable:
        print(f"{unreadable:,} files cannot be read: python prepare_data.py check lists them")


def _wide(table: pd.DataFrame) -> str:
    """The composition as a table of classes by splits."""
    kinds = ("clips", "patients", "videos", "actions")
    cells = [" / ".join(f"{row[kind]:,}" for kind in kinds) for _, row in table.iterrows()]
    wide = table.assign(cell=cells).pivot(index="class", columns="split", values="cell")
    return wide.loc[table["class"].unique(), table["split"].unique()].to_string()


def _range(values: Sequence[float]) -> str:
    if not values:
        return "-"
    low, middle, high = (f"{pd.Series(values).quantile(q):.4g}" for q in (0, 0.5, 1))
    return low if low == high else f"{low} to {high}, median {middle}"


def _common(values: Sequence[str], most: int = 3) -> str:
    counts = pd.Series(values, dtype=object).value_counts()
    shown = [f"{value} ({count:,})" for value, count in counts.head(most).items()]
    return ", ".join(shown) + (f" and {len(counts) - most} others" if len(counts) > most else "")
