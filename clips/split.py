"""Splits that share no patient: `prepare_data.py split`."""

import dataclasses
import os
import shlex
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import tyro

from clips.clip_table import NO_LABEL, read_clips
from clips.stratified_groups import absent, divide, imbalance
from utils.errors import UserError
from utils.files import write_json

SPLITS = ("train", "val", "test")

_COLUMNS = ["path", "label", "patient", "video", "action"]


@dataclass
class SplitConfig:
    """Divide clips into train, val and test, or into K folds, no patient in two of them."""

    source: tyro.conf.Positional[str]
    """a manifest; a folder whose train.csv, val.csv and test.csv are to be divided anew; or a
    folder of videos, in a folder a class or with SLAM's names"""
    output: str
    """new folder for the manifests"""
    folds: int = 0
    """K: write fold1 to foldK, each patient tested in one of them (as many as there are patients:
    leave one patient out); 0: one split"""
    val: float = 0.15
    """share of the clips for validation (of one split)"""
    test: float = 0.15
    """share of the clips for the test (of one split)"""
    group_by: Literal["patient", "video", "clip"] = "patient"
    """what is kept together; anything but patient tests on patients seen in training"""
    patient_pattern: str = ""
    """regular expression that finds the patient in a path, e.g. "(VID[0-9]+)_" """
    data_root: str = ""
    """folder of the clips (empty: the manifest's own)"""
    seed: int = 0
    """of the shuffles; the same seed gives the same split"""


def split(config: SplitConfig) -> int:
    """Divide, write the manifests, and print what imbalance is left. Returns the exit code.

    Raises:
        UserError: the output is there already, or the clips cannot be divided like this.
    """
    output = Path(config.output)
    if output.exists():
        raise UserError(f"{output}: is there already; a split is not overwritten: name another")
    _check(config)
    clips = _clips_to_divide(config)
    labels, groups = clips["label"].to_numpy(str), _groups(clips, config.group_by)
    shares = _shares(config)
    divided = divide(labels, groups, shares, config.seed)
    if config.folds:
        parts = list(fold_splits(divided.astype(int)))
        names = [f"fold{number}" for number in range(1, config.folds + 1)]
    else:
        parts, names = [divided], [""]
    _write(output, config, clips, dict(zip(names, parts, strict=True)))
    for name, part in zip(names, parts, strict=True):
        print(f"\n{name or output}\n{balance(clips, part).to_string()}")
    left = imbalance(labels, divided, shares)
    print(f"\nimbalance left: {left:.1%} of a class's clips are in the wrong part (mean)")
    for remark in _remarks(labels, groups, parts, config):
        print(remark)
    data = config.data_root or (config.source if Path(config.source).is_dir() else "")
    data = data or str(Path(config.source).parent)
    how = ["cross_validate.py", "--folds", str(output)]
    if not config.folds:
        manifests = [(f"--{kind}-csv", f"{output / kind}.csv") for kind in SPLITS]
        how = ["train.py", *(word for pair in manifests for word in pair)]
    print(f"\nto train: {shlex.join(['python', *how, '--data-root', data])}")
    return 0


def fold_splits(numbers: np.ndarray) -> Iterator[np.ndarray]:
    """For each fold, 0 to K - 1, the split of each clip: it is the test, the next one validates."""
    folds = int(numbers.max()) + 1
    for test in range(folds):
        parts = np.full(len(numbers), "train", object)
        parts[numbers == (test + 1) % folds] = "val"
        parts[numbers == test] = "test"
        yield parts


def balance(clips: pd.DataFrame, parts: np.ndarray) -> pd.DataFrame:
    """Clips, and in brackets patients, of each class in each split, and each split's share."""
    table = {}
    for part in SPLITS:
        some = clips[parts == part]
        counts = some["label"].value_counts()
        patients = some.groupby("label")["patient"].nunique()
        table[part] = {c: f"{counts.get(c, 0)} ({patients.get(c, 0)})" for c in _classes(clips)}
        table[part]["(all)"] = f"{len(some)} ({some['patient'].nunique()})"
        table[part]["(share)"] = f"{len(some) / len(clips):.1%}"
    return pd.DataFrame(table).rename_axis("clips (patients)")


def _shares(config: SplitConfig) -> dict[int, float] | dict[str, float]:
    """What share of the clips each fold, or train, val and test, is to have."""
    if config.folds:
        return dict.fromkeys(range(config.folds), 1 / config.folds)
    return {"train": 1 - config.val - config.test, "val": config.val, "test": config.test}


def _check(config: SplitConfig) -> None:
    if config.folds in (1, 2) or config.folds < 0:
        raise UserError(
            f"folds = {config.folds}: at least 3 (one tests, one validates, the others train)"
        )
    if config.val <= 0 or config.test <= 0 or config.val + config.test >= 0.9:
        raise UserError("val and test must be above 0 and leave at least 0.1 for train")
    if not 0 <= config.seed < 2**32:
        raise UserError(f"seed = {config.seed}: must be from 0 to {2**32 - 1}")


def _clips_to_divide(config: SplitConfig) -> pd.DataFrame:
    """The clips, each once.

    Raises:
        UserError: clips without a label, or whom it belongs to; one clip with two labels.
    """
    clips = read_clips([config.source], config.data_root, config.patient_pattern)
    unlabelled = clips[clips["label"] == NO_LABEL]
    if len(unlabelled):
        raise UserError(f"{config.source}: {len(unlabelled)} clips have no label")
    files = [os.path.realpath(p) if p else os.path.normpath(t) for p, t in
             zip(clips["place"], clips["path"], strict=True)]  # fmt: skip
    for what in ("label", "patient"):
        twice = clips.groupby(files)[what].nunique() > 1
        if twice.any():
            raise UserError(f"{config.source}: {twice.sum()} clips are listed with two {what}s")
    clips = clips[~pd.Series(files).duplicated()].reset_index(drop=True)
    unknown = 0 if config.group_by == "clip" else int(clips[config.group_by].isna().sum())
    if unknown:
        raise UserError(
            f"{config.source}: the {config.group_by} of {unknown} of {len(clips)} clips is "
            f"unknown: add a column `{config.group_by}`, or --patient-pattern that finds the "
            "patient in the path; --group-by clip divides without it, and may test on patients "
            "seen in training"
        )
    return clips


def _groups(clips: pd.DataFrame, group_by: str) -> np.ndarray:
    """What is kept together, by name: a column, or each clip for itself."""
    if group_by == "clip":
        return clips["path"].to_numpy(str)
    return clips[group_by].to_numpy(str)


def _classes(clips: pd.DataFrame) -> list[str]:
    return sorted(clips["label"].unique())


def _write(
    output: Path, config: SplitConfig, clips: pd.DataFrame, parts: Mapping[str, np.ndarray]
) -> None:
    """Write all manifests into a hidden folder that then gets its name: all of them, or none."""
    try:
        output.absolute().parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix=".split", dir=output.absolute().parent))
    except OSError as error:
        raise UserError(f"{output}: cannot be made: {error.strerror}") from None
    try:
        for name, part in parts.items():
            (unfinished / name).mkdir(exist_ok=True)
            for kind in SPLITS:
                some = clips.loc[part == kind, _COLUMNS]
                some.to_csv(unfinished / name / f"{kind}.csv", index=False)
        write_json(unfinished / "split.json", dataclasses.asdict(config))
        unfinished.chmod(0o755)
        os.rename(unfinished, output)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _remarks(
    labels: np.ndarray, groups: np.ndarray, parts: list[np.ndarray], config: SplitConfig
) -> list[str]:
    """What is not as it should be, in words."""
    what = {"patient": "patients", "video": "videos", "clip": "clips"}[config.group_by]
    remarks = []
    wanted = config.folds or 3
    for name in sorted(set(labels)):
        count = len(set(groups[labels == name]))
        if count < wanted:
            parted = f"each of {wanted} folds" if config.folds else "train, val and test"
            remarks.append(f"too few {what}: {name} has {count}, not enough for {parted}")
    for number, part in enumerate(parts, 1):
        fold = f"fold{number}: " if config.folds else ""
        if missing := absent(labels, part, "train"):
            remarks.append(f"{fold}no training clip of {', '.join(missing)}: train.py will refuse")
        for kind in () if config.folds else ("val", "test"):  # folds test each clip once, together
            if missing := absent(labels, part, kind):
                remarks.append(f"no {kind} clip of {', '.join(missing)}: it is not judged there")
    if config.group_by != "patient":
        remarks.append(f"grouped by {config.group_by}: patients may be in more than one split")
    return remarks
