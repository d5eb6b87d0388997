"""All clips that somebody points at, as one table, whether their files are there or not.

For the work on a data set as a whole (prepare_data.py); training reads manifest.py's rows.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from clips.manifest import CLASSES, locate, match_class
from clips.manifest_formats import Record, is_video, name_facts, read_records
from utils.errors import UserError

SPLIT_FILES = ("train.csv", "val.csv", "test.csv")

NO_LABEL = "(no label)"


def read_clips(
    sources: Sequence[str | Path], data_root: str = "", patient_pattern: str = ""
) -> pd.DataFrame:
    """The clips of manifests and folders.

    Args:
        sources: manifests; folders that hold train.csv, val.csv or test.csv; folders of videos,
            whose labels are then SLAM's in the file names, or else the names of the clips' folders.
        data_root: what the manifests' paths are relative to (empty: each one's own folder).
        patient_pattern: a regular expression, searched in each path as it is written; what its
            first group (or all of it) finds is the patient.

    Returns:
        A row a clip: manifest, line, path (as written), place (the file, None if it is not there),
        split (of the column, else the manifest's name), label (SLAM's other names joined), patient,
        video, action.

    Raises:
        UserError: a source cannot be read or lists nothing; the pattern is none.
    """
    places = [place for source in sources for place in _files(Path(source))]
    places = list({place.resolve(): place for place in places}.values())  # each once
    if not places:
        raise UserError("name a manifest (a CSV of clips) or a folder")
    find_patient = _finder(patient_pattern)
    rows, problems = [], []
    for place, split in zip(places, _split_names(places), strict=True):
        records, found = _folder_records(place) if place.is_dir() else read_records(place)
        problems += found or ([] if records else [f"{place}: lists no clip"])
        root = Path(data_root or (place if place.is_dir() else place.parent))
        for record in records:
            row = _row(record, place, root, split)
            rows.append(row | {"patient": find_patient(record.path) or row["patient"]})
    if problems:
        raise UserError("\n  ".join(["the manifests need mending:", *problems]))
    return _join_aliases(pd.DataFrame(rows).astype(object))


def splits_of(clips: pd.DataFrame) -> list[str]:
    """The splits in their usual order."""
    usual = ["train", "val", "test"]
    found = list(dict.fromkeys(clips["split"]))
    return sorted(found, key=lambda name: usual.index(name) if name in usual else len(usual))


def _row(record: Record, manifest: Path, root: Path, split: str) -> dict[str, Any]:
    """Only in this table may a file name stand in for a missing label: nothing is trained on it."""
    return {
        **record._asdict(),
        "manifest": str(manifest),
        "place": locate(record.path, root),
        "split": record.split or split,
        "label": record.label or name_facts(record.path).get("label", NO_LABEL),
    }


def _join_aliases(clips: pd.DataFrame) -> pd.DataFrame:
    """SLAM's other names of its classes as one, if all classes are SLAM's."""
    known = {label: match_class(label, CLASSES) for label in clips["label"].unique()}
    if any(number is None or label.isdigit() for label, number in known.items()):
        return clips  # another data set's classes keep their names
    return clips.assign(label=clips["label"].map(lambda label: CLASSES[known[label]]))


def _files(source: Path) -> list[Path]:
    """The manifests that a source means, or the folder of videos itself."""
    if not source.is_dir():
        return [source]
    return [source / name for name in SPLIT_FILES if (source / name).is_file()] or [source]


def _folder_records(folder: Path) -> tuple[list[Record], list[str]]:
    videos = sorted(path for path in folder.rglob("*") if is_video(path.name) and path.is_file())
    records = []
    for number, video in enumerate(videos, 1):
        path = video.relative_to(folder).as_posix()
        if not path.isprintable():  # control characters, bytes that are no UTF-8: no CSV holds them
            return [], [f"{folder}: rename {path!r}: a manifest cannot hold that name"]
        named = name_facts(path)
        label = named.pop("label", video.parent.name if video.parent != folder else None)
        records.append(Record(number, path, label, **named))
    return records, [] if records else [f"{folder}: holds neither train.csv nor any video"]


def _finder(pattern: str) -> Any:
    """A function from a path to the patient that the pattern finds in it."""
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise UserError(f"patient_pattern {pattern!r} is no regular expression: {error}") from None

    def find(path: str) -> str | None:
        found = compiled.search(path) if pattern else None
        return found and (found[1] if compiled.groups else found[0])

    return find


def _split_names(manifests: Sequence[Path]) -> list[str]:
    """What each manifest's split is called: its name, with its folders' as far as names repeat."""
    paths = [place.absolute().with_suffix("").parts for place in manifests]
    for length in range(1, max(map(len, paths)) + 1):
        names = ["/".join(parts[-length:]) for parts in paths]
        if len(set(names)) == len(names):
            break
    return names
