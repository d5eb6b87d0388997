"""Train and test on every fold of a split, with the code of train.py.

    python prepare_data.py split /data/SLAM --output folds --folds 5
    python cross_validate.py --folds folds --data-root /data/SLAM --model-name cnnlstm
    python cross_validate.py --folds folds --data-root /data/clips --recipe laptop      few clips
    python cross_validate.py --resume runs/20260101-120000_cv_cnnlstm     continue where it stopped

Every clip is tested once, by the model that has seen neither the clip nor its patient; the scores
are those of all these out-of-fold predictions together. All other settings are those of train.py.
"""

import dataclasses
import os
import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from clips.manifest import classes_of, raise_problems
from clips.manifest_formats import read_records
from clips.splits import SPLITS
from config import OLD_NAMES, OLD_VALUES, RECIPES, TrainConfig, from_dict, setting
from utils.cli import cli_main, parse
from utils.errors import ResultWarning, UserError
from utils.files import read_json, require_writable, write_all, write_json
from utils.tables import write_table
from utils.text_table import frame_table

if TYPE_CHECKING:
    import pandas as pd

    from pretraining.settings import PretrainConfig

COUNTS = ("clips", "patients", "epoch", "unreadable_clips")

SCORES = ("accuracy", "balanced_accuracy", "macro_f1", "ece", "brier", "nll")


@dataclass(frozen=True)
class CrossValidateConfig(TrainConfig):
    """The settings of the training of each fold, and the folder of the folds."""

    folds: str = setting("", section="Folds")
    """folder with fold1, fold2 ..., three manifests in each, as `prepare_data.py split --folds K`
    writes them"""
    pretrain: Literal["", "mae", "distil", "order"] = ""
    """pretrain the model of each fold with this method of pretrain.py, on the fold's training clips
    alone: no patient that is validated or tested on is seen; it starts from --weights (empty: the
    training does)"""
    pretrain_epochs: int | None = setting(None, low=1)
    """epochs of the pretraining (None: those of pretrain.py)"""


def cross_validate(config: CrossValidateConfig, folder: Path | None = None) -> Path:
    """Train and test the folds that are not finished. Returns the folder with the results.

    Args:
        folder: folder for the results (None: config.resume, or a new one below config.run_dir).

    Raises:
        UserError: the folds or the settings are wrong.
        SystemExit: interrupted; finished folds are kept, and the state of the current one is saved.
    """
    from utils.device import describe_device, get_device
    from utils.lock import FolderLock
    from utils.run_dir import log_environment, new_run_dir

    folder = Path(config.resume) if config.resume else folder
    require_writable(folder or config.run_dir, "--resume" if config.resume else "--run-dir")
    folds = fold_folders(config.folds)
    if config.classes is None:  # the same in all folds
        config = dataclasses.replace(config, classes=classes_of_folds(folds))
    device = describe_device(get_device(config.device))
    if not config.resume:
        check_folds(config, folds)
    name = f"cv_{config.model_name}"
    first = folds[0].name  # without it, nothing has been trained
    with FolderLock(folder, first) if folder else new_run_dir(config.run_dir, name, first) as lock:
        folder = lock.folder
        if not config.resume:
            config = dataclasses.replace(config, folds=os.path.abspath(config.folds))
            write_json(folder / "config.json", dataclasses.asdict(config))
        log_environment(folder, device)
        for fold in folds:
            run = folder / fold.name
            if not (run / "test_metrics.json").exists():  # written last
                print(f"\n=== {fold.name} of {len(folds)}: {run}", flush=True)
                settings = _fold_config(config, fold)
                if config.pretrain:
                    pretraining = folder / f"{fold.name}_pretraining"
                    encoder = _pretrain_fold(config, settings, pretraining, folder)
                    settings = dataclasses.replace(settings, weights=str(encoder))
                _train_fold(settings, run, folder)
        return pool_folds(folder, [folder / fold.name for fold in folds])


def check_folds(config: CrossValidateConfig, folds: Sequence[Path]) -> None:
    """Check, before the first fold is trained, everything that would stop a later one.

    Raises:
        UserError: manifests, settings or weights are wrong, a clip is tested in two folds, or test
            clips cannot be read.
    """
    from training.checks import check_clips, check_model, require_some_readable, resolve
    from training.leakage import pretraining_leaks
    from training.loaders import eval_loader, load_splits, open_cache

    if config.pretrain_epochs and not config.pretrain:
        raise UserError(
            "pretrain_epochs has no effect without pretrain: give --pretrain, or leave it out"
        )
    loaders, times_tested = {}, Counter()
    for fold in folds:
        settings = resolve(_fold_config(config, fold))
        try:
            rows = load_splits(settings)["test"]
        except UserError as error:
            raise UserError(f"{fold.name}: {error}") from None
        times_tested.update(os.path.realpath(row.path) for row in rows)
        loaders[f"{fold.name}'s test"] = eval_loader(rows, settings, open_cache(settings))
    repeated = [path for path, count in times_tested.items() if count > 1]
    if repeated:
        raise UserError(f"{config.folds}: {len(repeated)} clips are tested in more than one fold")
    if config.pretrain:
        from pretraining.settings import resolve as resolve_pretraining

        pretraining = resolve_pretraining(_pretrain_config(config, _fold_config(config, fold)))
        settings = dataclasses.replace(settings, weights=pretraining.weights)
    loaded = check_model(settings)
    for name, loader in loaders.items():  # every patient is tested in one of the folds
        rows = {name: loader.dataset.rows}
        pretraining_leaks(loaded.pretraining, rows, settings)
    if config.check_clips:  # each clip is a test clip of one fold
        require_some_readable(loaders, config.classes)
        check_clips(loaders, config.skip_unreadable)


def fold_folders(folder: str) -> list[Path]:
    """The folders fold1, fold2 ... with three manifests each, in order.

    Raises:
        UserError: there are none, or manifests are missing.
    """
    folds = [path for path in Path(folder or ".").glob("fold*") if path.name[4:].isdecimal()]
    if not folder or not folds:
        raise UserError(
            f"folds = {folder!r}: holds no fold1, fold2 ... (make them: python prepare_data.py "
            "split DATA --output FOLDER --folds 5)"
        )
    missing = [p / f"{s}.csv" for p in folds for s in SPLITS if not (p / f"{s}.csv").is_file()]
    if missing:
        raise UserError(f"{missing[0]}: no such manifest ({len(missing)} are missing)")
    return sorted(folds, key=lambda path: int(path.name[4:]))


def classes_of_folds(folds: Sequence[Path]) -> tuple[str, ...]:
    """The classes that the labels of all folds name; see `clips.manifest.classes_of`.

    Raises:
        UserError: a manifest cannot be read.
    """
    records, problems = [], []
    for path in [fold / f"{split}.csv" for fold in folds for split in SPLITS]:
        new_records, new_problems = read_records(path)
        records += new_records
        problems += new_problems
    raise_problems(problems)
    classes = classes_of({"": records})
    print(f"classes: {', '.join(classes)}")
    return classes


def pool_folds(folder: Path, runs: Sequence[Path]) -> Path:
    """Pool the results of the folds and print them. Returns the folder.

    Writes predictions.csv (every clip once, with its fold), test_metrics.json of all these clips,
    the confusion matrix, and cross_validation.csv: see `fold_table`.
    """
    import numpy as np

    from checkpoint import load_checkpoint
    from evaluation.calibration import Calibration
    from evaluation.predictions import Predictions, read_predictions
    from evaluation.results import (
        compute_results,
        format_results,
        read_results,
        save_results,
    )

    parts, calibrations, rows, names = [], [], [], []
    warnings: list[ResultWarning] = []
    for run in runs:
        predictions, classes, _ = read_predictions(run / "predictions.csv")
        parts.append(predictions)
        calibration = Calibration.from_state_dict(load_checkpoint(run)["calibration"])
        calibrations += [calibration] * len(predictions)
        names += [run.name] * len(predictions)
        results = read_results(run / "test_metrics.json")
        rows.append(_fold_row(run.name, results))
        warnings += [{**w, "text": f"{run.name}: {w['text']}"} for w in results["warnings"]]
    pooled = Predictions(
        [row for part in parts for row in part.rows],
        np.concatenate([part.probabilities for part in parts]),
        [line for part in parts for line in part.unreadable],
    )
    metadata = {"split": f"out of {len(runs)} folds", "folds": rows, "warnings": warnings}
    results = {**compute_results(pooled, classes, calibrations), **metadata}
    table = fold_table(rows, results)
    leakage = any(warning["kind"] == "leakage" for warning in warnings)
    model = (
        "a model that saw some of their patients" if leakage else "the model that did not see it"
    )
    print(f"\nall clips, each tested by {model}:\n{format_results(results)}")
    print(f"\nthe folds:\n{frame_table(table, 4)}\n\nresults: {folder}")
    scores = results, pooled, classes, folder, calibrations, names
    write_all(
        {
            folder / "test_metrics.json": lambda _: save_results(*scores),
            folder / "cross_validation.csv": lambda path: write_table(
                path, table, index=True, float_format=".6g"
            ),
        }
    )
    return folder


def fold_table(rows: Sequence[dict[str, Any]], pooled: dict[str, Any]) -> "pd.DataFrame":
    """One row per fold; the mean and standard deviation (n - 1) of the scores over the folds; then
    the scores of all clips together, and their 95 % interval over patients."""
    import pandas as pd

    table = pd.DataFrame(rows).set_index("fold")
    counts = {name: table[name].astype("Int64") for name in COUNTS}
    scores = table[list(SCORES)]
    pooled_scores = {**pooled, **pooled["calibration"]}
    intervals = {name: pooled["intervals"].get(name, {}).get("patients") for name in SCORES}
    ends = {name: interval or [float("nan")] * 2 for name, interval in intervals.items()}
    below = {
        "mean": scores.mean(),
        "std": scores.std(),
        "all clips": pd.Series({name: pooled_scores[name] for name in SCORES}),
        "95 % low": pd.Series({name: low for name, (low, _) in ends.items()}),
        "95 % high": pd.Series({name: high for name, (_, high) in ends.items()}),
    }
    return pd.concat([table.assign(**counts), pd.DataFrame(below).T])


def _fold_row(name: str, results: dict[str, Any]) -> dict[str, Any]:
    scores = {**results, **results["calibration"]}
    counts = {key: results[key] for key in COUNTS}
    return {"fold": name, **counts, **{key: scores[key] for key in SCORES}}


def _fold_config(config: CrossValidateConfig, fold: Path) -> TrainConfig:
    """The settings of the training of one fold, with its manifests as train_csv and so on."""
    fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(TrainConfig)}
    manifests = {f"{split}_csv": str((fold / f"{split}.csv").absolute()) for split in SPLITS}
    return TrainConfig(**{**fields, **manifests, "resume": "", "check_clips": False})


def _pretrain_config(config: CrossValidateConfig, settings: TrainConfig) -> "PretrainConfig":
    """The settings of the pretraining of one fold, whose training has these `settings`."""
    from pretraining.settings import shared_settings

    own = {"method": config.pretrain, "epochs": config.pretrain_epochs}
    return shared_settings(settings, weights=config.weights, **own)


def _pretrain_fold(
    config: CrossValidateConfig, settings: TrainConfig, run: Path, folder: Path
) -> Path:
    """The encoder of one fold, whose training has these `settings`; from where it stopped."""
    from pretrain import pretrain
    from pretraining.results import load_last

    encoder = run / "encoder.pt"  # written last
    if not encoder.exists():
        state = load_last(run) if (run / "last.pt").exists() else None
        print(f"pretraining: {run}", flush=True)
        pretrain(_pretrain_config(config, settings), state, run, _resume_command(folder))
    return encoder


def _train_fold(config: TrainConfig, run: Path, folder: Path) -> None:
    """Train and test one fold, from where it stopped."""
    from checkpoint import load_checkpoint
    from train import train

    state = load_checkpoint(run, "last.pt") if (run / "last.pt").exists() else None
    train(config, state, run, _resume_command(folder))


def _resume_command(folder: Path) -> str:
    return shlex.join(["python", "cross_validate.py", "--resume", str(folder)])


def read_settings() -> CrossValidateConfig:
    """The settings of the command line; with --resume they start from those of the folder."""

    def parse_with(default: CrossValidateConfig | None = None) -> CrossValidateConfig:
        names = OLD_NAMES, OLD_VALUES, ("model",)
        return parse(CrossValidateConfig, __doc__, default, *names, recipes=RECIPES)

    config = parse_with()
    if not config.resume:
        return config
    path = Path(config.resume) / "config.json"
    settings = read_json(path, {"classes": list, "folds": str})
    if not settings:
        raise UserError(f"{path}: no such file: give the folder of a cross-validation")
    saved = from_dict({**settings, "resume": config.resume}, CrossValidateConfig, str(path))
    from training.checks import refuse_changes

    config = parse_with(saved)
    refuse_changes(saved, config)
    return config


@cli_main
def main() -> None:
    config = read_settings()
    if not config.data_root:
        raise UserError("data_root: name the folder of the clips (the demo data has no folds)")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            "cross_validate.py is one process: with torchrun, run train.py on each fold"
        )
    cross_validate(config)


if __name__ == "__main__":
    main()
