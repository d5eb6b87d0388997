"""Train and test on every fold of a split, with train.py's own code.

    python prepare_data.py split /data/SLAM --output folds --folds 5
    python cross_validate.py --folds folds --data-root /data/SLAM --model cnn_lstm
    python cross_validate.py --resume runs/20260101-120000_cv_cnn_lstm      go on where it stopped

Every clip is tested once, by the model that saw neither it nor its patient; these out-of-fold
predictions together give the numbers. All other settings are train.py's.
"""

import dataclasses
import json
import os
import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import tyro

from checkpoint import load_checkpoint
from clips.split import SPLITS
from config import TrainConfig, from_dict
from evaluation.calibration import Calibration
from evaluation.predictions import Predictions, read_predictions
from evaluation.results import write_results
from train import train
from training.checks import check_clips, check_model, refuse_changes, resolve
from training.loaders import eval_loader, load_splits
from utils.cli import script
from utils.device import choose_device, describe_device
from utils.errors import UserError
from utils.files import write_json, write_text
from utils.run_dir import new_run_folder, record_session

COUNTS = ("clips", "patients", "epoch", "unreadable_clips")

SCORES = ("accuracy", "balanced_accuracy", "macro_f1", "ece", "brier", "nll")


@dataclass(frozen=True)
class CrossValidateConfig(TrainConfig):
    """The settings of the training of each fold, and where the folds are."""

    folds: str = ""
    """what `prepare_data.py split --folds K` wrote: fold1, fold2 ..., three manifests each"""


def cross_validate(config: CrossValidateConfig, folder: Path | None = None) -> Path:
    """Train and test what is left of the folds. Returns the folder with the results.

    Args:
        folder: where (None: config.resume, or a new one below config.run_dir).

    Raises:
        UserError: the folds or the settings need mending.
        SystemExit: interrupted; finished folds are kept, the one under way is saved.
    """
    folds = fold_folders(config.folds)
    device = describe_device(choose_device(config.device))
    if not config.resume:
        check_folds(config, folds)
        folder = folder or new_run_folder(config.run_dir, f"cv_{config.model}")
        folder.mkdir(parents=True, exist_ok=True)
        config = dataclasses.replace(config, folds=os.path.abspath(config.folds))
        write_json(folder / "config.json", dataclasses.asdict(config))
    folder = Path(config.resume) if config.resume else folder
    record_session(folder, device)
    for fold in folds:
        run = folder / fold.name
        if not (run / "test_metrics.json").exists():  # written last of all
            print(f"\n=== {fold.name} of {len(folds)}: {run}", flush=True)
            _train_fold(_of_fold(config, fold), run, folder)
    return collect(folder, [folder / fold.name for fold in folds])


def check_folds(config: CrossValidateConfig, folds: Sequence[Path]) -> None:
    """Look at everything before the first fold that would stop the last one.

    Raises:
        UserError: manifests, settings or weights need mending, a clip is tested in two folds, or
            test clips cannot be read.
    """
    loaders, seen = {}, Counter()
    for fold in folds:
        settings = resolve(_of_fold(config, fold))
        try:
            rows = load_splits(settings)["test"]
        except UserError as error:
            raise UserError(f"{fold.name}: {error}") from None
        seen.update(os.path.realpath(row.path) for row in rows)
        loaders[f"{fold.name}'s test"] = eval_loader(rows, settings)
    twice = [path for path, count in seen.items() if count > 1]
    if twice:
        raise UserError(f"{config.folds}: {len(twice)} clips are tested in more than one fold")
    check_model(settings)
    if config.check_clips:  # each clip is a test clip of one fold
        check_clips(loaders, config.skip_unreadable)


def fold_folders(folder: str) -> list[Path]:
    """The folders fold1, fold2 ... that hold three manifests each.

    Raises:
        UserError: there are none, or manifests are missing.
    """
    found = [path for path in Path(folder or ".").glob("fold*") if path.name[4:].isdigit()]
    if not folder or not found:
        raise UserError(
            f"folds = {folder!r}: holds no fold1, fold2 ... (make them: python prepare_data.py "
            "split DATA --output FOLDER --folds 5)"
        )
    missing = [p / f"{s}.csv" for p in found for s in SPLITS if not (p / f"{s}.csv").is_file()]
    if missing:
        raise UserError(f"{missing[0]}: no such manifest ({len(missing)} are missing)")
    return sorted(found, key=lambda path: int(path.name[4:]))


def collect(folder: Path, runs: Sequence[Path]) -> Path:
    """Put the results of the folds together and print them. Returns the folder.

    Writes predictions.csv (every clip once, with its fold), test_metrics.json (of all these), the
    confusion matrix, and cross_validation.csv: a row a fold, their mean and standard deviation.
    """
    parts, calibrations, rows, warnings = [], [], [], []
    for run in runs:
        predictions, classes = read_predictions(run / "predictions.csv")
        parts.append(predictions)
        fitted = Calibration.from_state(load_checkpoint(run)["calibration"])
        calibrations += [fitted] * len(predictions)
        tested = json.loads((run / "test_metrics.json").read_text(encoding="utf-8"))
        rows.append(_fold_row(run.name, tested))
        warnings += [f"{run.name}: {warning}" for warning in tested["warnings"]]
    pooled = Predictions(
        [row for part in parts for row in part.rows],
        np.concatenate([part.probabilities for part in parts]),
        [line for part in parts for line in part.unreadable],
    )
    facts = {"split": f"out of {len(runs)} folds", "folds": rows, "warnings": warnings}
    table = write_results(pooled, classes, folder, calibrations, facts)
    numbers = np.repeat([run.name for run in runs], [len(part) for part in parts])
    listing = pd.read_csv(folder / "predictions.csv", dtype=str, keep_default_na=False)
    listing.insert(1, "fold", numbers)
    write_text(folder / "predictions.csv", listing.to_csv(index=False))
    pooled_results = json.loads((folder / "test_metrics.json").read_text(encoding="utf-8"))
    summary = fold_table(rows, pooled_results)
    write_text(folder / "cross_validation.csv", summary.to_csv(float_format="%.6g"))
    blanked = summary.astype(object).where(summary.notna(), "-")
    shown = blanked.to_string(float_format="{:.4f}".format)
    leaky = any("LEAKAGE" in warning for warning in warnings)
    who = "a model that saw some of their patients" if leaky else "the model that did not see it"
    print(f"\nall clips, each tested by {who}:\n{table}")
    print(f"\nthe folds:\n{shown}\n\nresults: {folder}")
    return folder


def fold_table(rows: Sequence[dict[str, Any]], pooled: dict[str, Any]) -> pd.DataFrame:
    """A row a fold; the scores' mean and standard deviation (n - 1) over the folds; then the scores
    of all clips together with the ends of their 95 % intervals over patients."""
    table = pd.DataFrame(rows).set_index("fold")
    counts = {name: table[name].astype("Int64") for name in COUNTS}
    scores = table[list(SCORES)]
    whole = {**pooled, **pooled["calibration"]}
    found = {name: pooled["intervals"].get(name, {}).get("patients") for name in SCORES}
    ends = {name: ends or [float("nan")] * 2 for name, ends in found.items()}
    below = {
        "mean": scores.mean(),
        "std": scores.std(),
        "all clips": pd.Series({name: whole[name] for name in SCORES}),
        "95 % low": pd.Series({name: low for name, (low, _) in ends.items()}),
        "95 % high": pd.Series({name: high for name, (_, high) in ends.items()}),
    }
    return pd.concat([table.assign(**counts), pd.DataFrame(below).T])


def _fold_row(name: str, tested: dict[str, Any]) -> dict[str, Any]:
    scores = {**tested, **tested["calibration"]}
    counts = {key: tested[key] for key in COUNTS}
    return {"fold": name, **counts, **{key: scores[key] for key in SCORES}}


def _of_fold(config: CrossValidateConfig, fold: Path) -> TrainConfig:
    """The training's settings for one fold, its manifests in place of train.csv and so on."""
    fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(TrainConfig)}
    manifests = {f"{split}_csv": str((fold / f"{split}.csv").absolute()) for split in SPLITS}
    return TrainConfig(**{**fields, **manifests, "resume": "", "check_clips": False})


def _train_fold(config: TrainConfig, run: Path, folder: Path) -> None:
    """Train and test one fold, from where it stopped."""
    state = load_checkpoint(run, "last.pt") if (run / "last.pt").exists() else None
    hint = shlex.join(["python", "cross_validate.py", "--resume", str(folder)])
    train(config, state, run, hint)


def read_settings() -> CrossValidateConfig:
    """The settings of the command line; with --resume on top of those that the folder brings."""
    config = tyro.cli(CrossValidateConfig, description=__doc__)
    if not config.resume:
        return config
    place = Path(config.resume) / "config.json"
    try:
        settings = json.loads(place.read_text(encoding="utf-8"))
        saved = from_dict({**settings, "resume": config.resume}, CrossValidateConfig)
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{place}: not the settings of a cross-validation") from None
    config = tyro.cli(CrossValidateConfig, default=saved, description=__doc__)
    refuse_changes(saved, config)
    return config


@script
def main() -> None:
    config = read_settings()
    if not config.data_root:
        raise UserError("data_root: name the folder of the clips (the demo data has no folds)")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("cross_validate.py is one process: under torchrun, run train.py a fold")
    cross_validate(config)


if __name__ == "__main__":
    main()
