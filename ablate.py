"""Ablation study: train a baseline, and variants with one change each, over seeds and folds.

    python ablate.py --data-root /data/clips --folds folds --output study --model-name cnnlstm
    python ablate.py ... --ablations "focal loss" "EMA of the weights" --seeds 0 1 2
    python ablate.py ... --label-fractions 0.05 0.1 0.25 0.5 1     how many labels are needed?

The baseline has the settings that are given, which are those of train.py; each ablation changes
some of them (evaluation/ablation.py lists them). Every ablation is trained once per seed: with
--folds on every fold, as by cross_validate.py, otherwise on the one split, as by train.py. Started
again with the same --output, it trains only what is missing: ablations and seeds may be added,
other changes of the settings are refused.

A row's scores are means over the seeds, +- their standard deviation. Its difference from the
baseline has a 95 % interval over patients: the seeds are averaged, and both are scored on the same
resamples of the same patients. Where the interval includes zero, no effect is shown.

With --label-fractions the baseline is trained on fractions of the training clips instead, once per
fraction and seed: whole patients, of which each seed draws others. The validation and test clips
stay the same. The scores are drawn against the share of the labels in label_efficiency.png.
"""

# Everything that imports torch is imported where it is used: --help does without.
import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from clips.manifest import ClipRow, clips_digest, read_manifest
from clips.splits import SPLITS
from config import (
    OLD_NAMES,
    OLD_VALUES,
    RECIPES,
    TrainConfig,
    differences,
    fitted_splits,
    from_dict,
    names_with,
    setting,
)
from cross_validate import CrossValidateConfig, check_folds, cross_validate, fold_folders
from utils.cli import cli_main, parse
from utils.errors import UserError
from utils.files import read_json, require_writable, write_all, write_json, write_text
from utils.tables import write_table

if TYPE_CHECKING:
    from evaluation.predictions import Predictions

MANIFESTS = [f"{split}_csv" for split in SPLITS]


@dataclass(frozen=True)
class AblateConfig(CrossValidateConfig):
    """The settings of the baseline, and the ablations to train."""

    ablations: tuple[str, ...] = setting((), section="Ablations")
    """names of ablations, besides the baseline (none given: all that can work with the baseline)"""
    label_fractions: tuple[float, ...] = setting(())
    """train the baseline on these fractions of the training clips (above 0 to 1, whole patients),
    and no ablation"""
    seeds: tuple[int, ...] = setting((0, 1, 2))
    """each ablation, or fraction, is trained once per seed"""
    output: str = setting("runs/study")
    """folder for the runs and the table"""


def ablate(config: AblateConfig) -> str:
    """Train what is missing, print the table and write it. Returns the table as Markdown.

    Raises:
        UserError: an ablation is unknown or cannot work, or the folder's runs had other settings.
        SystemExit: interrupted; the same command continues.
    """
    from utils.lock import FolderLock

    require_writable(config.output)
    work = _label_efficiency if config.label_fractions else _ablate
    with FolderLock(config.output):
        return work(config, Path(config.output))


def _ablate(config: AblateConfig, folder: Path) -> str:
    """The same, in a folder in which no other process works."""
    from evaluation.ablation import BASELINE, POST_HOC, ablation_table, format_table, plot_deltas

    ablations = select_ablations(config)
    hold_to_baseline(config, folder)
    runs = {name: [_run_dir(folder, name, seed) for seed in config.seeds] for name in ablations}
    for name in ablations:
        for seed, run in zip(config.seeds, runs[name], strict=True):
            settings = ablation_settings(config, name, seed)
            if not is_finished(run, settings):
                print(f"\n##### {name}, seed {seed}: {run}", flush=True)
                _train(settings, run)
    predictions = {name: [_read(run) for run in seeds] for name, seeds in runs.items()}
    if config.test_views * config.test_crops == 1:
        for name, tau in POST_HOC.items():
            predictions[name] = [_adjusted(run, tau) for run in runs[BASELINE]]
    table = ablation_table(predictions)
    text = format_table(table, config.seeds, predictions[BASELINE][0], runs[BASELINE][0])
    print(f"\n{text}")
    write_all(
        {
            folder / "study.csv": lambda path: write_table(path, table),
            folder / "study.md": lambda path: write_text(path, text),
            folder / "study.png": lambda path: plot_deltas(table, path),
        }
    )
    return text


def _label_efficiency(config: AblateConfig, folder: Path) -> str:
    """The same for the fractions of the training clips: `ablate` with label_fractions."""
    import pandas as pd

    from clips.split import draw_patients
    from evaluation.ablation import (
        BASELINE,
        SCORES,
        format_label_table,
        label_table,
        majority_scores,
    )
    from evaluation.bootstrap import n_clusters
    from evaluation.plots import plot_label_efficiency
    from training.checks import check_smallest_batch
    from training.loaders import load_splits

    check_fractions(config)
    settings = _check(ablation_settings(config, BASELINE, config.seeds[0]))
    splits = load_splits(settings)
    fitted = fitted_splits(settings)
    labelled = sum(len(splits[split]) for split in fitted)
    subsets: dict[float, list[dict[str, list[ClipRow]]]] = {}
    for fraction in sorted(config.label_fractions):
        drawn = [
            {split: draw_patients(splits[split], fraction, seed) for split in fitted}
            for seed in config.seeds
        ]
        if same := [other for other in subsets if subsets[other] == drawn]:
            print(f"label fraction {fraction:g}: draws the same patients as {same[0]:g}, left out")
            continue
        subsets[fraction] = drawn
        for parts in drawn:
            check_smallest_batch(settings, len(parts["train"]))
    hold_to_baseline(config, folder)

    predictions: dict[float, list[Predictions]] = {}
    trained = []
    for fraction, drawn in subsets.items():
        predictions[fraction] = []
        for seed, parts in zip(config.seeds, drawn, strict=True):
            run = _run_dir(folder, f"labels {fraction:g}", seed)
            settings_of_run = dataclasses.replace(settings, seed=seed)
            settings_of_run = keep_subset(settings_of_run, {**splits, **parts}, run)
            if not is_finished(run, settings_of_run, MANIFESTS):
                print(f"\n##### label fraction {fraction:g}, seed {seed}: {run}", flush=True)
                _train(settings_of_run, run)
            tested = _read(run)
            predictions[fraction].append(tested)
            rows = [row for part in parts.values() for row in part]
            patients = len({row.patient for row in rows if row.patient}) or float("nan")
            used = {"share": len(rows) / labelled, "patients": patients, "clips": len(rows)}
            scores = {name: tested.scores[name] for name in SCORES}
            trained.append({"fraction": fraction, "seed": seed, **used, **scores})
    runs, first = pd.DataFrame(trained), next(iter(predictions.values()))[0]
    table, majority = label_table(runs, predictions), majority_scores(first)
    text = format_label_table(table, config.seeds, first, run, majority)
    print(f"\n{text}")
    test_patients = n_clusters(first.groups("patient"))
    pictures = [folder / f"label_efficiency.{suffix}" for suffix in ("png", "svg")]
    write_all(
        {
            folder / "label_efficiency.csv": lambda path: write_table(path, table),
            folder / "label_efficiency_runs.csv": lambda path: write_table(path, runs),
            folder / "label_efficiency.md": lambda path: write_text(path, text),
            **dict.fromkeys(
                pictures,
                lambda path: plot_label_efficiency(table, runs, majority, test_patients, path),
            ),
        }
    )
    return text


def check_fractions(config: AblateConfig) -> None:
    """Check the settings of a training on fractions of the clips.

    Raises:
        UserError: one is out of range, or does not go with label_fractions.
    """
    fractions = config.label_fractions
    if len(set(fractions)) < len(fractions) or not all(0 < value <= 1 for value in fractions):
        raise UserError(f"label_fractions = {fractions}: each must be above 0 to 1, none twice")
    if config.ablations:
        raise UserError("label_fractions trains the baseline alone: leave --ablations out")
    if config.pretrain:
        raise UserError("pretrain is for --folds, which label_fractions has none of: leave it out")
    if config.folds:
        raise UserError("label_fractions draws from one training split: leave --folds out")
    check_seeds(config)


def keep_subset(
    settings: CrossValidateConfig, splits: Mapping[str, Sequence[ClipRow]], run: Path
) -> CrossValidateConfig:
    """The resolved settings of a run on these splits, whose manifests are written into its folder.

    Raises:
        UserError: the manifests are there already, and list other clips.
    """
    from training.loaders import use_splits, write_splits

    kept = use_splits(settings, run)
    if not all((run / f"{split}.csv").exists() for split in splits):
        run.mkdir(parents=True, exist_ok=True)
        write_splits(settings, splits, run)
        return kept
    for split, rows in splits.items():
        saved = read_manifest(run / f"{split}.csv", kept.data_root, kept.classes)
        if clips_digest(saved, kept.data_root) != clips_digest(rows, kept.data_root):
            raise UserError(
                f"{run}: its {split} clips were others, because the data has changed since: delete "
                "it, or give another --output"
            )
    return kept


def select_ablations(config: AblateConfig) -> list[str]:
    """The baseline and the ablations, each of them checked before anything is trained.

    Without --ablations those that cannot work with the baseline are left out, and listed.

    Raises:
        UserError: a name is unknown, a named ablation cannot work, or the seeds are wrong.
    """
    from evaluation.ablation import ABLATIONS, BASELINE

    unknown = [name for name in config.ablations if name not in ABLATIONS]
    if unknown:
        raise UserError(f"no ablation is called {unknown[0]!r}: choose from {', '.join(ABLATIONS)}")
    check_seeds(config)
    if config.pretrain and not config.folds:
        raise UserError("pretrain is for folds, each of which is pretrained: give --folds")
    if config.folds:
        check_folds(config, fold_folders(config.folds))
    names, problems, baseline = [], {}, None
    for name in ABLATIONS:  # the baseline comes first
        if name != BASELINE and name not in (config.ablations or ABLATIONS):
            continue
        try:
            settings = _check(ablation_settings(config, name, config.seeds[0]))
            if settings == baseline:
                raise UserError("the baseline does this already")
        except UserError as error:
            problems[name] = " ".join(str(error).split())
        else:
            names.append(name)
            baseline = baseline or settings
    listing = "\n  ".join(f"{name}: {problem}" for name, problem in problems.items())
    if problems and (config.ablations or BASELINE in problems):
        raise UserError(f"these ablations cannot work with the baseline:\n  {listing}")
    if problems:
        print(f"left out, as they cannot work with the baseline:\n  {listing}")
    return names


def check_seeds(config: AblateConfig) -> None:
    """Check the seeds.

    Raises:
        UserError: there are none, or wrong ones.
    """
    if not config.seeds or len(set(config.seeds)) < len(config.seeds) or min(config.seeds) < 0:
        raise UserError(f"seeds = {config.seeds}: give at least one, none twice, none below 0")
    if config.seed:
        raise UserError("seed: give --seeds, with which each ablation is trained")


def _check(settings: CrossValidateConfig) -> CrossValidateConfig:
    """The resolved settings of an ablation, checked for what would stop its training.

    Raises:
        UserError: something would.
    """
    from training.checks import check_model, resolve
    from training.loaders import open_cache
    from video.motion import Modality, require_opencv

    settings = resolve(settings)
    check_model(settings)
    motion = Modality.parse(settings.modality).stored_motion
    if open_cache(settings) is None and motion == "flow":
        require_opencv()
    return settings


def ablation_settings(config: AblateConfig, name: str, seed: int) -> CrossValidateConfig:
    """The baseline's settings, with the changes of one ablation."""
    from evaluation.ablation import ABLATIONS

    fields = [field.name for field in dataclasses.fields(CrossValidateConfig)]
    baseline = {field: getattr(config, field) for field in fields}
    # select_ablations has read the clips of the folds once.
    check_clips = config.check_clips and not config.folds
    own = {"seed": seed, "check_clips": check_clips, "resume": ""}
    return CrossValidateConfig(**{**baseline, **ABLATIONS[name], **own})


def hold_to_baseline(config: AblateConfig, folder: Path) -> None:
    """Write the baseline's settings into the folder, or compare them with those that are there.

    Raises:
        UserError: the folder's runs had other settings.
    """
    from evaluation.ablation import BASELINE
    from training.checks import resolve

    baseline = ablation_settings(config, BASELINE, 0)
    paths = {name: getattr(baseline, name) for name in ("data_root", "folds", "cache")}
    absolute = {name: os.path.abspath(path) for name, path in paths.items() if path}
    baseline = dataclasses.replace(baseline, **absolute)
    file = folder / "recipe.json"
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_json(file, dataclasses.asdict(baseline))
        return
    saved = from_dict(read_json(file), CrossValidateConfig, str(file))
    may_differ = _may_differ(config)
    for name, before, value in differences(resolve(saved), resolve(baseline), ignore=may_differ):
        raise UserError(
            f"{folder}: its runs had {name} {before!r}, not {value!r}: give the same settings, or "
            "another --output"
        )


def _may_differ(settings: CrossValidateConfig) -> list[str]:
    """Names of the settings in which two runs of one ablation may differ."""
    return [*names_with("neutral", True), "seed", *(MANIFESTS if settings.folds else [])]


def is_finished(run: Path, settings: CrossValidateConfig, ignore: Sequence[str] = ()) -> bool:
    """Whether the run of an ablation has been tested.

    Args:
        ignore: more settings that may differ.

    Raises:
        UserError: it has been, with other settings: the ablation has changed since.
    """
    from training.checks import resolve

    if not (run / "test_metrics.json").exists():  # written last
        return False
    first = run / fold_folders(settings.folds)[0].name if settings.folds else run
    saved = from_dict(read_json(first / "config.json"), source=str(first / "config.json"))
    may_differ = [*_may_differ(settings), *ignore]
    if settings.pretrain:  # each fold starts from an encoder of its own
        may_differ.append("weights")
    for name, before, value in differences(saved, resolve(settings), ignore=may_differ):
        raise UserError(f"{run}: was trained with {name} {before!r}, not {value!r}: delete it")
    return True


def _run_dir(folder: Path, ablation: str, seed: int) -> Path:
    slug = re.sub(r"\W+", "_", ablation.replace("+", "plus")).strip("_")
    return folder / slug / f"seed{seed}"


def _train(settings: CrossValidateConfig, run: Path) -> None:
    if settings.folds:
        cross_validate(settings, run)
        return
    from checkpoint import load_checkpoint
    from train import train

    fields = {f.name: getattr(settings, f.name) for f in dataclasses.fields(TrainConfig)}
    state = load_checkpoint(run, "last.pt") if (run / "last.pt").exists() else None
    train(TrainConfig(**fields), state, run, "the same command again")


def _read(run: Path) -> "Predictions":
    from evaluation.predictions import read_predictions

    return read_predictions(run / "predictions.csv")[0]


def _adjusted(run: Path, tau: float) -> "Predictions":
    """The predictions of a run with the logits adjusted after training, fold by fold.

    `evaluate.py --logit-adjust-tau` does the same to the logits. The log probabilities times the
    temperature differ from the logits by a constant per clip, which the softmax cancels. (This is
    so for one view per clip only: a mean over several views has no logits.)
    """
    import numpy as np

    from checkpoint import load_checkpoint
    from evaluation.calibration import Calibration
    from evaluation.predictions import Predictions
    from training.losses import log_prior

    parts = []
    for fold in sorted(run.glob("fold*")) or [run]:
        state, predictions = load_checkpoint(fold), _read(fold)
        temperature = Calibration.from_state_dict(state.get("calibration")).temperature
        logits = np.log(np.maximum(predictions.probabilities, 1e-300)) * temperature
        logits = (logits - log_prior(state["class_counts"], tau).numpy()) / temperature
        odds = np.exp(logits - logits.max(axis=1, keepdims=True))
        parts.append(Predictions(predictions.rows, odds / odds.sum(axis=1, keepdims=True)))
    rows = [row for part in parts for row in part.rows]
    return Predictions(rows, np.concatenate([part.probabilities for part in parts]))


@cli_main
def main() -> None:
    old_names = {**OLD_NAMES, "levers": "ablations"}
    names = old_names, OLD_VALUES, ("model",)
    config = parse(AblateConfig, __doc__, None, *names, recipes=RECIPES)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("ablate.py is one process: start it several times, each with its --output")
    ablate(config)
    print(f"saved in {config.output}")


if __name__ == "__main__":
    main()
