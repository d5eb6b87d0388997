"""Manifests of splits or folds that share no patient: `prepare_data.py split`."""

import dataclasses
import os
import shlex
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import tyro

from clips.clip_table import NO_LABEL, read_clips
from clips.manifest import ClipRow, class_problems, classes_of
from clips.manifest_formats import ManifestOptions, Record
from clips.splits import SPLITS
from clips.stratified_groups import class_imbalance, missing_classes, stratified_group_split
from utils.errors import UserError, describe_os_error
from utils.files import remove_unfinished, require_writable, unfinished_path, write_json
from utils.lock import FolderLock
from utils.tables import write_table
from utils.text_table import frame_table

if TYPE_CHECKING:
    import pandas as pd

_COLUMNS = ["path", "label", "patient", "video", "action"]


@dataclass(frozen=True)
class SplitConfig(ManifestOptions):
    """Divide clips into train, val and test, or into K folds, with no patient in two of them."""

    source: tyro.conf.Positional[str]
    """a manifest; a folder whose train.csv, val.csv and test.csv (or folders train, val and test)
    are put together and divided again; or a folder of clips, with one folder per class or with
    SLAM's file names"""
    output: str
    """new folder for the manifests"""
    folds: int = 0
    """K: write fold1 to foldK; each patient is tested in one of them (as many folds as patients:
    leave one patient out). 0: write train, val and test"""
    val: float = 0.15
    """fraction of the clips for validation (without folds)"""
    test: float = 0.15
    """fraction of the clips for the test (without folds)"""
    group_by: Literal["patient", "video", "clip"] = "patient"
    """clips of one patient (or video) stay together; with video or clip, patients of the training
    are also in the test"""
    data_root: str = ""
    """folder of the clips (empty: the folder of the manifest)"""
    seed: int = 0
    """random seed; the same seed gives the same split"""


def split(config: SplitConfig) -> int:
    """Divide the clips, write the manifests, and print the class balance. Returns the exit code.

    Raises:
        UserError: the output exists already, or the clips cannot be divided like this.
    """
    output = Path(config.output)
    if output.exists():
        raise UserError(f"{output}: exists already and is not overwritten: give another --output")
    _check(config)
    require_writable(output.absolute().parent)
    with FolderLock(output.absolute(), beside=True):
        return _divide(config, output)


def _divide(config: SplitConfig, output: Path) -> int:
    """Divide the clips and write the manifests, while no other process does. Returns the exit code.

    Raises:
        UserError: the clips cannot be divided like this.
    """
    clips = _clips_to_divide(config)
    labels = clips["label"].to_numpy(str)
    groups = clips["path" if config.group_by == "clip" else config.group_by].to_numpy(str)
    fractions = _fractions(config)
    divided = stratified_group_split(labels, groups, fractions, config.seed)
    # The split (train, val or test) of each clip, per fold.
    if config.folds:
        names = [f"fold{number}" for number in range(1, config.folds + 1)]
        folds = dict(zip(names, fold_splits(divided.astype(int)), strict=True))
    else:
        folds = {"": divided}
    _write(output, config, clips, folds)
    for name, splits in folds.items():
        print(f"\n{name or output}\n{frame_table(balance(clips, splits))}")
    imbalance = class_imbalance(labels, divided, fractions)
    print(f"\nimbalance: {imbalance:.1%} of a class's clips are in the wrong split or fold (mean)")
    for remark in _remarks(labels, groups, folds, config):
        print(remark)
    classes = classes_of({"": [Record(0, "", label) for label in labels]})
    print(f"\nto train: {shlex.join(['python', *_training_command(config, classes)])}")
    return 0


def _training_command(config: SplitConfig, classes: Sequence[str]) -> list[str]:
    """The script and its arguments that train on the new manifests."""
    output, source = Path(config.output), Path(config.source)
    data_root = config.data_root or str(source if source.is_dir() else source.parent)
    command = ["cross_validate.py", "--folds", str(output)]
    if not config.folds:
        command = ["train.py"]
        for split in SPLITS:
            command += [f"--{split}-csv", f"{output / split}.csv"]
    return [*command, "--data-root", data_root, "--classes", *classes]


def divide_by_patient(rows: Sequence[ClipRow]) -> list[str]:
    """The split of each clip: 70 % train, 15 % val and 15 % test, with no patient in two of them.

    Where patients are unknown, the source videos are not divided, or else the clips; training warns
    about that (`clips.splits.patient_overlap`).

    Raises:
        UserError: there are fewer than three patients.
    """
    groups = next(
        groups
        for groups in ([r.patient for r in rows], [r.video for r in rows], [r.path for r in rows])
        if all(groups)
    )
    labels = np.array([row.label for row in rows])
    fractions = {"train": 0.7, "val": 0.15, "test": 0.15}
    return list(stratified_group_split(labels, np.array(groups, str), fractions))


def draw_patients(rows: Sequence[ClipRow], fraction: float, seed: int) -> list[ClipRow]:
    """The clips of a random part of the patients, in their order, with clips of every class.

    With the same seed the patients of a smaller fraction are among those of a larger one. There are
    more patients than the fraction says where fewer do not have all classes. A clip of an unknown
    patient counts as a patient by itself.

    Args:
        fraction: of the patients, above 0 and at most 1.
    """
    groups = [row.patient or str(row.path) for row in rows]
    names = np.random.default_rng(seed).permutation(sorted(set(groups))).tolist()
    labels: dict[str, set[int]] = {name: set() for name in names}
    for group, row in zip(groups, rows, strict=True):
        labels[group].add(row.label)
    covered: set[int] = set()
    first = []  # those that bring in a class come first, so that every prefix behind them has all
    for name in names:
        if labels[name] - covered:
            first.append(name)
            covered |= labels[name]
    order = first + [name for name in names if name not in first]
    drawn = set(order[: max(len(first), round(fraction * len(order)))])
    return [row for group, row in zip(groups, rows, strict=True) if group in drawn]


def fold_splits(numbers: np.ndarray) -> Iterator[np.ndarray]:
    """For each fold the split of each clip.

    Args:
        numbers: `(N,)` number of the part of each clip, 0 to K - 1. Fold k tests on part k,
            validates on the next part and trains on the others.
    """
    n_folds = int(numbers.max()) + 1
    for fold in range(n_folds):
        splits = np.full(len(numbers), "train", object)
        splits[numbers == (fold + 1) % n_folds] = "val"
        splits[numbers == fold] = "test"
        yield splits


def balance(clips: "pd.DataFrame", splits: np.ndarray) -> "pd.DataFrame":
    """Clips, and in brackets patients, per class and split, and the fraction of all clips."""
    import pandas as pd

    classes = sorted(clips["label"].unique())
    table = {}
    for split in SPLITS:
        subset = clips[splits == split]
        counts = subset["label"].value_counts()
        patients = subset.groupby("label")["patient"].nunique()
        table[split] = {c: f"{counts.get(c, 0)} ({patients.get(c, 0)})" for c in classes}
        table[split]["(all)"] = f"{len(subset)} ({subset['patient'].nunique()})"
        table[split]["(fraction)"] = f"{len(subset) / len(clips):.1%}"
    return pd.DataFrame(table).rename_axis("clips (patients)")


def _fractions(config: SplitConfig) -> dict[int, float] | dict[str, float]:
    """The fraction of the clips that each fold, or train, val and test, should have."""
    if config.folds:
        return dict.fromkeys(range(config.folds), 1 / config.folds)
    return {"train": 1 - config.val - config.test, "val": config.val, "test": config.test}


def _check(config: SplitConfig) -> None:
    if config.folds in (1, 2) or config.folds < 0:
        raise UserError(
            f"folds = {config.folds}: must be at least 3 (one to test, one to validate, the others "
            "to train)"
        )
    if config.val <= 0 or config.test <= 0 or config.val + config.test >= 0.9:
        raise UserError("val and test must be above 0 and leave more than 0.1 for train")
    if not 0 <= config.seed < 2**32:
        raise UserError(f"seed = {config.seed}: must be from 0 to {2**32 - 1}")


def _clips_to_divide(config: SplitConfig) -> "pd.DataFrame":
    """The distinct clips.

    Raises:
        UserError: the label or the patient of a clip is unknown, or a clip has two of them.
    """
    import pandas as pd

    clips = read_clips([config.source], config.data_root, ManifestOptions.of(config))
    unlabelled = clips[clips["label"] == NO_LABEL]
    if len(unlabelled):
        raise UserError(
            f"{config.source}: {len(unlabelled)} clips have no label ({unlabelled['path'].iloc[0]} "
            "...): give them one, or put them into a folder that is named like their class"
        )
    if problems := class_problems(clips["label"].unique()):
        raise UserError("\n  ".join([f"{config.source}: train.py would refuse:", *problems]))
    pairs = zip(clips["file"], clips["path"], strict=True)
    files = [os.path.realpath(file) if file else os.path.normpath(path) for file, path in pairs]
    for column in ("label", "patient"):
        twice = clips.groupby(files)[column].nunique() > 1
        if twice.any():
            raise UserError(f"{config.source}: {twice.sum()} clips are listed with two {column}s")
    repeated = pd.Series(files).duplicated()
    if repeated.any():
        print(f"{config.source}: {repeated.sum()} clips are there more than once and are kept once")
    clips = clips[~repeated].reset_index(drop=True)
    unknown = 0 if config.group_by == "clip" else int(clips[config.group_by].isna().sum())
    if unknown:
        raise UserError(
            f"{config.source}: the {config.group_by} of {unknown} of {len(clips)} clips is "
            f"unknown: add a column `{config.group_by}`, or give --patient-pattern to find the "
            "patient in the path. --group-by clip works without it, but may put a patient into "
            "several splits"
        )
    return clips


def _write(
    output: Path, config: SplitConfig, clips: "pd.DataFrame", folds: Mapping[str, np.ndarray]
) -> None:
    """Write all manifests into a hidden folder and then rename it: all appear at once, or none."""
    unfinished = unfinished_path(output.absolute())
    remove_unfinished(unfinished.parent)
    try:
        unfinished.mkdir()
        for name, splits in folds.items():
            (unfinished / name).mkdir(exist_ok=True)
            for split in SPLITS:
                subset = clips.loc[splits == split, _COLUMNS]
                write_table(unfinished / name / f"{split}.csv", subset)
        write_json(unfinished / "split.json", dataclasses.asdict(config))
        os.rename(unfinished, output)
    except OSError as error:
        raise UserError(describe_os_error(error, output)) from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _remarks(
    labels: np.ndarray,
    groups: np.ndarray,
    folds: Mapping[str, np.ndarray],
    config: SplitConfig,
) -> list[str]:
    """Remarks on classes with too few groups or missing in a split, and on shared patients."""
    n_splits = config.folds or 3
    splits_text = f"each of {n_splits} folds" if config.folds else "train, val and test"
    remarks = []
    for label in sorted(set(labels)):
        count = len(set(groups[labels == label]))
        if count < n_splits:
            remarks.append(
                f"too few {config.group_by}s: {label} has {count}, not enough for {splits_text}"
            )
    for name, splits in folds.items():
        prefix = f"{name}: " if name else ""
        if missing := missing_classes(labels, splits, "train"):
            remarks.append(
                f"{prefix}no training clip of {', '.join(missing)}: train.py will refuse this"
            )
        # Together the folds test each clip once: there a missing class does not matter.
        for split in () if config.folds else ("val", "test"):
            if missing := missing_classes(labels, splits, split):
                remarks.append(
                    f"no {split} clip of {', '.join(missing)}: it is not evaluated there"
                )
    if config.group_by != "patient":
        remarks.append(f"grouped by {config.group_by}: patients may be in more than one split")
    return remarks
