"""The composition of a data set and what its splits share: `prepare_data.py audit`.

A model that is tested on patients it was trained on may recognise them. The audit finds what two
splits have in common: patients, videos, source actions (SLAM cuts an action into several clips),
identical files and near-duplicates. Patients, videos and actions are read from the manifests and
need no files; missing files are only counted.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import tyro

from clips.clip_table import read_clips, splits_of
from clips.manifest import class_problems
from clips.manifest_formats import ManifestOptions, read_records
from clips.perceptual_hash import duplicate_groups, perceptual_hash, sha256_file
from utils.errors import UserError, os_error_cause
from utils.files import require_writable, write_all
from utils.sharding import Shard, remove_results, run_shared, this_shard
from utils.tables import write_table
from utils.text_table import frame_table
from video.container import ClipError, VideoMetadata, probe

if TYPE_CHECKING:
    import pandas as pd

ALL = "(all)"  # in parentheses, because a class or a manifest may be called "all"

# Columns of the table of clips whose values may be in more than one split, and their names.
KINDS = {
    "patient": "patients",
    "video": "videos",
    "action": "source actions",
    "content": "identical files",
    "near_duplicate": "groups of near-duplicates",
}


@dataclass(frozen=True)
class AuditConfig(ManifestOptions):
    """Report the composition of a data set, and whether its splits share patients, videos or clips.

    The exit code is 1 if they do. It is 3 if nothing shared was found, but patients are unknown or
    files could not be read, so that not everything was compared.
    """

    manifests: tyro.conf.Positional[tuple[str, ...]]
    """manifests, one per split or with a column `split`; folders that hold train.csv, val.csv and
    test.csv, or folders train, val and test; or folders of clips, one per split"""
    data_root: str = ""
    """folder of the clips (empty: the folder of each manifest)"""
    looped: str = ""
    """SLAM's looped_clips.csv: count the clips that were padded by looping"""
    contents: bool = True
    """read and compare the files: hashes, durations, sizes, frame rates; without it, the audit
    compares names alone, and the exit code is 0 if all patients are known and none is shared"""
    max_hamming_distance: int = 20
    """two clips are near-duplicates if at most this many of the 192 bits of their perceptual hashes
    differ (docs/results/data.md says what that finds)"""
    names: bool = False
    """write the names of patients and videos into overlaps.csv, instead of numbers"""
    output: str = ""
    """folder for the tables (empty: runs/audit_<name of the first manifest or folder>)"""
    num_workers: int = 2
    """number of processes that read the files"""
    shard: str = ""
    """i/n: read part i of n, from 0, and keep the results in the output; the process that finds all
    parts done makes the audit (docs/scale.md; torchrun does this by itself)"""


class Contents(NamedTuple):
    """What was read from the file of a clip."""

    metadata: VideoMetadata | None
    sha256: str | None
    hash: np.ndarray | None
    problem: str | None = None


def audit(config: AuditConfig) -> int:
    """Print the tables and write them as CSVs.

    Returns:
        The exit code, see `verdict`.

    Raises:
        UserError: a manifest cannot be read, or a setting is invalid.
    """
    if config.num_workers < 0 or config.max_hamming_distance < 0:
        raise UserError("num_workers and max_hamming_distance must be at least 0")
    shard = this_shard(config.shard)
    if shard and not config.contents:
        raise UserError("--shard: without the contents of the files there is nothing to share")
    clips = read_clips(config.manifests, config.data_root, ManifestOptions.of(config))
    folder = Path(config.output or f"runs/audit_{Path(config.manifests[0]).stem}")
    require_writable(folder)
    contents: dict[Path, Contents] | None = {}
    if config.contents:
        contents = read_contents(clips, config.num_workers, shard, folder / "parts")
        if contents is None:
            return 0
    print(f"{len(clips):,} clips in {', '.join(map(str, splits_of(clips)))}")
    _print_unknown_patients(clips)
    for problem in class_problems(sorted(clips["label"].unique())):
        print(f"train.py will refuse these labels: {problem}")
    tables = {"composition": composition(clips)}
    print(f"\nclips / patients / videos / source actions\n{_by_split(tables['composition'])}")
    if config.looped:
        tables["looped"] = looped_clips(clips, config.looped)
        print(f"\nclips padded by looping\n{frame_table(tables['looped'])}")
    exists = clips["file"].notna()
    print(f"\nfiles: {exists.sum():,} of {len(clips):,} exist")
    if exists.any() and config.contents:
        clips = add_contents(clips, contents, config.max_hamming_distance)
        tables["files"] = file_statistics(clips)
        print(frame_table(tables["files"], index=False))
        _print_not_compared(clips)
    else:
        print("no file was read: the audit compares names only, not the contents of the clips")
    tables["overlaps"] = overlaps(clips, config.names)
    code, text = verdict(clips, _print_overlaps(clips), config.contents)
    print(text)
    folder.mkdir(parents=True, exist_ok=True)
    write_all(
        {
            folder / f"{name}.csv": partial(write_table, table=table, index=name == "looped")
            for name, table in tables.items()
        }
    )
    print(f"\ntables: {folder}")
    if shard:
        remove_results(folder / "parts")
    return code


def verdict(clips: "pd.DataFrame", leaks: bool, contents: bool) -> tuple[int, str]:
    """The exit code of the audit, and its result in one line.

    Args:
        leaks: whether anything shared was found.
        contents: whether the contents of the files were to be compared.

    Returns:
        1 if the splits share anything; 3 if nothing was compared, or not all clips by their
        patients and (if `contents`) by their files; otherwise 0.
    """
    if leaks:
        return 1, "LEAKAGE: test numbers partly measure memory"
    if len(splits_of(clips)) < 2:
        return 3, "NOTHING WAS COMPARED: only one split (name a manifest or folder per split)"
    if not any(_known(clips, kind) for kind in KINDS if kind != "content"):
        return 3, "NOTHING WAS COMPARED: no patient is known, and no file was read"
    counts = {"patients": _known(clips, "patient")}
    if contents:
        counts["files"] = _known(clips, "near_duplicate")
    compared = " and ".join(f"the {what} of {n:,}" for what, n in counts.items())
    compared += f" of {len(clips):,} clips were compared"
    if min(counts.values()) < len(clips):
        return 3, f"NOT EVERYTHING WAS COMPARED: no leakage found, but only {compared}"
    return 0, f"no leakage found: {compared}"


def composition(clips: "pd.DataFrame") -> "pd.DataFrame":
    """Number of clips, patients, videos and source actions per class and split, and in total."""
    import pandas as pd

    rows = []
    for label in [*sorted(clips["label"].unique()), ALL]:
        for split in [*splits_of(clips), ALL]:
            subset = clips[(clips["label"] == label) | (label is ALL)]
            subset = subset[(subset["split"] == split) | (split is ALL)]
            counts = {f"{kind}s": subset[kind].nunique() for kind in ("patient", "video", "action")}
            rows.append({"class": label, "split": split, "clips": len(subset), **counts})
    return pd.DataFrame(rows)


def overlaps(clips: "pd.DataFrame", names: bool = False) -> "pd.DataFrame":
    """Everything that is in more than one split.

    Args:
        names: write the names of patients, videos and actions. Otherwise they are numbered, and the
            manifest lines tell which they are.

    Returns:
        One row per shared patient, video, source action, file content or group of near-duplicates:
        its kind, its name (`unit`), the number of its clips in each split, and their lines in the
        manifests.
    """
    import pandas as pd

    parts = [pd.DataFrame(columns=["kind", "unit", *splits_of(clips), "lines"])]
    for kind in KINDS:
        shared = _shared(clips, kind)
        if shared.empty:
            continue
        members = clips[clips[kind].isin(shared.index)]
        names_of = {path: Path(path).name for path in members["manifest"].unique()}
        lines: dict[str, list[str]] = {unit: [] for unit in shared.index}
        for unit, manifest, line in zip(
            members[kind], members["manifest"], members["line"], strict=True
        ):
            lines[unit].append(f"{names_of[manifest]}:{line}")
        units = shared.index if names else [f"{kind} {n}" for n in range(1, len(shared) + 1)]
        part = shared.reset_index(drop=True).astype(object)
        part.insert(0, "kind", kind)
        part.insert(1, "unit", list(units))
        parts.append(part.assign(lines=[" ".join(lines[unit]) for unit in shared.index]))
    return pd.concat(parts, ignore_index=True)


def looped_clips(clips: "pd.DataFrame", csv: str) -> "pd.DataFrame":
    """The number of clips in SLAM's looped_clips.csv, per class and split.

    Raises:
        UserError: the file cannot be read.
    """
    import pandas as pd

    records, problems = read_records(Path(csv), labels=False)
    if problems or not records:
        raise UserError((problems or [f"{csv}: lists no clip"])[0])
    looped = {_file_name(record.path) for record in records}
    subset = clips[[_file_name(path) in looped for path in clips["path"]]]
    return pd.crosstab(subset["label"], subset["split"], margins=True, margins_name=ALL)


def _file_name(path: str) -> str:
    return Path(path.strip().replace("\\", "/")).name


def read_contents(
    clips: "pd.DataFrame", num_workers: int, shard: Shard | None, parts: Path
) -> dict[Path, Contents] | None:
    """What is in each file of the clips; None if other processes have not read theirs yet.

    Args:
        shard, parts: see `run_shared`.
    """
    files = list(dict.fromkeys(clips["file"].dropna()))
    options = num_workers, "reading the files", shard, parts, _encode, _decode
    return run_shared(_read_contents, files, *options)


def _encode(contents: Contents) -> list:
    metadata = contents.metadata and list(contents.metadata)
    bits = None if contents.hash is None else contents.hash.astype(int).tolist()
    return [metadata, contents.sha256, bits, contents.problem]


def _decode(kept: list) -> Contents:
    metadata, sha256, bits, problem = kept
    return Contents(
        metadata and VideoMetadata(*metadata),
        sha256,
        None if bits is None else np.array(bits, bool),
        problem,
    )


def add_contents(
    clips: "pd.DataFrame", contents: Mapping[Path, Contents], max_hamming_distance: int
) -> "pd.DataFrame":
    """The table with what is in the files of the clips.

    The new columns are metadata, content (SHA-256), near_duplicate (number of a group), problem,
    and uniform: whether the pictures are too uniform to be compared.
    """
    groups = duplicate_groups([c.hash for c in contents.values()], max_hamming_distance)
    group_of = {file: str(g) for file, g in zip(contents, groups, strict=True) if g >= 0}
    rows = [contents.get(file) for file in clips["file"]]
    clips = clips.assign(
        metadata=[row and row.metadata for row in rows],
        content=[row and row.sha256 for row in rows],
        near_duplicate=[group_of.get(file) for file in clips["file"]],
        problem=[row and row.problem for row in rows],
        uniform=[bool(row and row.metadata and row.hash is None) for row in rows],
    )
    # A group that holds only copies of one file is reported as identical files.
    copies = clips.groupby("near_duplicate")["content"].transform("nunique") < 2
    return clips.assign(near_duplicate=clips["near_duplicate"].where(~copies, None))


def file_statistics(clips: "pd.DataFrame") -> "pd.DataFrame":
    """The number of readable files per split, their durations, sizes, frame rates and codecs."""
    import pandas as pd

    rows = []
    for split in splits_of(clips):
        known = [m for m in clips.loc[clips["split"] == split, "metadata"] if m is not None]
        rows.append(
            {
                "split": split,
                "files": len(known),
                "seconds": _range([m.seconds for m in known if m.rate]),
                "frames": _range([m.frames for m in known]),
                "size": _most_common([f"{m.width}x{m.height}" for m in known]),
                "fps": _most_common([f"{m.rate:.4g}" if m.rate else "unknown" for m in known]),
                "codec": _most_common([m.codec for m in known]),
            }
        )
    return pd.DataFrame(rows)


def _read_contents(file: Path) -> Contents:
    try:
        return Contents(probe(file), sha256_file(file), perceptual_hash(file))
    except ClipError as error:
        return Contents(None, sha256_file(file), None, error.reason)
    except OSError as error:  # for example without the permission to read the file
        return Contents(None, None, None, os_error_cause(error))


def _shared(clips: "pd.DataFrame", kind: str) -> "pd.DataFrame":
    """The number of clips in each split of all units of a kind that are in more than one split.

    The index are the units, in the order of the table.
    """
    import pandas as pd

    splits = splits_of(clips)
    known = clips[clips[kind].notna()] if kind in clips else clips[:0].assign(**{kind: None})
    unit_of, units = pd.factorize(known[kind])
    split_of = pd.Categorical(known["split"], categories=splits).codes
    counts = np.zeros((len(units), len(splits)), int)
    np.add.at(counts, (unit_of, split_of), 1)
    shared = (counts > 0).sum(axis=1) > 1
    return pd.DataFrame(counts[shared], index=units[shared], columns=splits)


def _print_overlaps(clips: "pd.DataFrame") -> bool:
    """Print what the splits share. Returns whether they share anything."""
    splits = splits_of(clips)
    if len(splits) < 2:
        return False
    print("\nin more than one split:")
    leaks = False
    for kind, plural in KINDS.items():
        known = _known(clips, kind)
        if not known:
            print(f"  {plural}: unknown")
            continue
        shared = _shared(clips, kind)
        leaks = leaks or not shared.empty
        only = "" if known == len(clips) else f" (known for {known:,} of {len(clips):,} clips)"
        print(f"  {plural}: {len(shared):,} of {clips[kind].nunique():,}{only}")
        for first, second in combinations(splits, 2):
            pairs = shared[(shared[first] > 0) & (shared[second] > 0)]
            if len(pairs):
                print(
                    f"    {first} and {second} share {len(pairs):,}, with {pairs[first].sum():,} "
                    f"clips of {first} and {pairs[second].sum():,} of {second}"
                )
    return leaks


def _known(clips: "pd.DataFrame", kind: str) -> int:
    """The number of clips that could be compared by this kind."""
    if kind == "near_duplicate" and "metadata" in clips:
        kind = "metadata"  # of all files that can be decoded; most of them have no near-duplicate
    return int(clips[kind].notna().sum()) if kind in clips else 0


def _print_unknown_patients(clips: "pd.DataFrame") -> None:
    unknown = int(clips["patient"].isna().sum())
    if unknown:
        print(
            f"the patient of {unknown:,} clips is unknown, and their overlaps cannot be found: add "
            "a column `patient`, or give --patient-pattern"
        )


def _print_not_compared(clips: "pd.DataFrame") -> None:
    unreadable, uniform = int(clips["problem"].notna().sum()), int(clips["uniform"].sum())
    if unreadable:
        print(f"{unreadable:,} files cannot be read: python prepare_data.py check lists them")
    if uniform:
        print(f"{uniform:,} clips are almost uniform (black, white): only their bytes are compared")


def _by_split(table: "pd.DataFrame") -> str:
    """The composition as text, with one row per class and one column per split."""
    columns = ("clips", "patients", "videos", "actions")
    cells = [" / ".join(f"{row[name]:,}" for name in columns) for _, row in table.iterrows()]
    wide = table.assign(cell=cells).pivot(index="class", columns="split", values="cell")
    return frame_table(wide.loc[table["class"].unique(), table["split"].unique()])


def _range(values: Sequence[float]) -> str:
    if not values:
        return "-"
    low, median, high = (f"{np.quantile(values, q):.4g}" for q in (0, 0.5, 1))
    return low if low == high else f"{low} to {high}, median {median}"


def _most_common(values: Sequence[str], limit: int = 3) -> str:
    """The most frequent values and their counts. Ties keep the order of the values."""
    counts = Counter(values).most_common()
    shown = [f"{value} ({count:,})" for value, count in counts[:limit]]
    others = f" and {len(counts) - limit} others" if len(counts) > limit else ""
    return ", ".join(shown) + others
