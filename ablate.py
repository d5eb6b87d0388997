"""Which lever earns its place? A recipe, and one change at a time, over seeds and folds.

    python ablate.py --data-root /data/clips --folds folds --output study --model cnn_lstm
    python ablate.py ... --levers "focal loss" "averaged weights" --seeds 0 1 2
    python ablate.py ... --into RESULTS.md --name clips          the table goes into a file

The recipe is the settings that are given, all of them train.py's; each lever changes some
(levers.py). Every lever is trained for every seed by cross_validate.py's code; without --folds, by
train.py's on the one split that there is. Started again with the same --output, it does what is
left. Adding a lever or a seed is no reason to begin anew; other settings are refused.

A row's scores are means over the seeds, +- their standard deviation. Its difference from the recipe
has a 95 % interval over patients, the seeds averaged, both on the same resamples of the same
patients: where it holds zero, the lever has not shown that it does anything.
"""

import dataclasses
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import tyro

from checkpoint import load_checkpoint
from config import TrainConfig, from_dict
from cross_validate import CrossValidateConfig, check_folds, cross_validate, fold_folders
from evaluation.ablation import ADJUSTED, LEVERS, RECIPE, TITLES, lever_table, plot_differences
from evaluation.calibration import Calibration
from evaluation.predictions import Predictions, read_predictions
from train import train
from training.checks import check_model, resolve
from training.loaders import open_cache
from training.losses import prior_shift
from utils.cli import script
from utils.errors import UserError
from utils.files import to_markdown, write_json, write_text
from video.motion import brought, require_opencv


@dataclass(frozen=True)
class AblateConfig(CrossValidateConfig):
    """The recipe's settings, and what is to be tried."""

    levers: tuple[str, ...] = ()
    """names of LEVERS, besides the recipe (none: all)"""
    seeds: tuple[int, ...] = (0, 1, 2)
    """each lever is trained once for each"""
    output: str = "study"
    """folder of the runs and of the table"""
    into: str = ""
    """a Markdown file that the table is put into"""
    name: str = "study"
    """what the table is called there"""


def ablate(config: AblateConfig) -> str:
    """Train what is left, and say what came of it, in Markdown.

    Raises:
        UserError: a lever is not known or cannot work, or the folder's runs had other settings.
        SystemExit: interrupted; the same command goes on.
    """
    folder = Path(config.output)
    levers = _chosen(config)
    _hold_to_recipe(config, folder)
    places = {name: [_place(folder, name, seed) for seed in config.seeds] for name in levers}
    for name in levers:
        for seed, place in zip(config.seeds, places[name], strict=True):
            if _finished(place, _settings(config, name, seed)):
                continue
            print(f"\n##### {name}, seed {seed}: {place}", flush=True)
            _run(_settings(config, name, seed), place)
    found = {name: [_read(place) for place in of_seeds] for name, of_seeds in places.items()}
    if config.test_views * config.test_crops == 1:
        for name, tau in ADJUSTED.items():
            found[name] = [_adjusted(place, tau) for place in places[RECIPE]]
    table = lever_table(found)
    write_text(folder / "study.csv", table.to_csv(index=False))
    plot_differences(table, folder / "study.png")
    text = to_text(table, config.seeds, found[RECIPE][0], places[RECIPE][0])
    write_text(folder / "study.md", text)
    if config.into:
        put_section(Path(config.into), config.name, text)
    return text


def _chosen(config: AblateConfig) -> list[str]:
    """The recipe and the levers, each of them looked at before anything is trained.

    Of all levers those that cannot work with the recipe are left out, and told.
    """
    unknown = [name for name in config.levers if name not in LEVERS]
    if unknown:
        raise UserError(f"no lever is called {unknown[0]!r}: choose from {', '.join(LEVERS)}")
    if not config.seeds or len(set(config.seeds)) < len(config.seeds) or min(config.seeds) < 0:
        raise UserError(f"seeds = {config.seeds}: name one at least, none twice, none below 0")
    if config.seed:
        raise UserError("seed: give --seeds, which each lever is trained with")
    if config.folds:
        check_folds(config, fold_folders(config.folds))
    chosen, problems, recipe = [], {}, None
    for name in LEVERS:  # the recipe is the first
        if name != RECIPE and name not in (config.levers or LEVERS):
            continue
        try:
            wanted = _check(_settings(config, name, config.seeds[0]))
            if wanted == recipe:
                raise UserError("it is what the recipe does")
        except UserError as error:
            problems[name] = " ".join(str(error).split())
        else:
            chosen.append(name)
            recipe = recipe or wanted
    told = "\n  ".join(f"{name}: {problem}" for name, problem in problems.items())
    if problems and (config.levers or RECIPE in problems):
        raise UserError(f"these levers cannot work with the recipe:\n  {told}")
    if problems:
        print(f"left out, as they cannot work with the recipe:\n  {told}")
    return chosen


def _check(settings: CrossValidateConfig) -> CrossValidateConfig:
    """The resolved settings of a lever, after a look for what would stop it, without training.

    Raises:
        UserError: something would.
    """
    wanted = resolve(settings)
    check_model(wanted)
    if open_cache(wanted) is None and brought(wanted.inputs) == "rgb+flow":
        require_opencv()
    return wanted


def _settings(config: AblateConfig, lever: str, seed: int) -> CrossValidateConfig:
    names = [field.name for field in dataclasses.fields(CrossValidateConfig)]
    recipe = {name: getattr(config, name) for name in names}
    # Of folds the clips are checked once, by _chosen.
    checked = config.check_clips and not config.folds
    own = {"seed": seed, "check_clips": checked, "resume": ""}
    return CrossValidateConfig(**{**recipe, **LEVERS[lever], **own})


# What may differ between the starts of a study.
_FREE = {"workers", "device", "seed", "run_dir", "resume", "check_clips", "features", "tensorboard"}


def _hold_to_recipe(config: AblateConfig, folder: Path) -> None:
    """Note the recipe in the folder, or compare with the one that is there."""
    recipe = json.loads(json.dumps(dataclasses.asdict(_settings(config, RECIPE, 0))))
    for name in ("data_root", "folds", "cache"):
        recipe[name] = os.path.abspath(recipe[name]) if recipe[name] else ""
    noted = folder / "recipe.json"
    if not noted.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_json(noted, recipe)
        return
    before = json.loads(noted.read_text(encoding="utf-8"))
    for field in dataclasses.fields(CrossValidateConfig):
        was, now = before.get(field.name, field.default), recipe[field.name]
        if was != now and field.name not in _FREE:
            raise UserError(
                f"{folder}: its runs had {field.name} {was!r}, not {now!r}: give the same "
                "settings, or another --output"
            )


def _finished(place: Path, settings: CrossValidateConfig) -> bool:
    """Whether a lever's run has been tested.

    Raises:
        UserError: it has been, with other settings: the lever has changed since.
    """
    if not (place / "test_metrics.json").exists():  # written last of all
        return False
    run = place / fold_folders(settings.folds)[0].name if settings.folds else place
    saved = from_dict(json.loads((run / "config.json").read_text(encoding="utf-8")))
    wanted = resolve(settings)
    for field in dataclasses.fields(saved):
        was, now = getattr(saved, field.name), getattr(wanted, field.name)
        free = field.name in _FREE or (settings.folds and field.name.endswith("_csv"))
        if was != now and not free:
            raise UserError(
                f"{place}: was trained with {field.name} {was!r}, by now {now!r}: delete it"
            )
    return True


def _place(folder: Path, lever: str, seed: int) -> Path:
    slug = re.sub(r"\W+", "_", lever.replace("+", "plus")).strip("_")
    return folder / slug / f"seed{seed}"


def _run(settings: CrossValidateConfig, place: Path) -> None:
    if settings.folds:
        cross_validate(settings, place)
        return
    fields = {f.name: getattr(settings, f.name) for f in dataclasses.fields(TrainConfig)}
    state = load_checkpoint(place, "last.pt") if (place / "last.pt").exists() else None
    train(TrainConfig(**fields), state, place, "the same command again")


def _read(place: Path) -> Predictions:
    return read_predictions(place / "predictions.csv")[0]


def _adjusted(place: Path, tau: float) -> Predictions:
    """What the runs of a place say with their logits adjusted after training, fold by fold.

    `evaluate.py --adjust` does it to the logits; the log of the probabilities times the temperature
    differs from them by a number a clip, which the softmax forgets. (Only of single looks: the mean
    over several has no logits.)
    """
    folds = sorted(place.glob("fold*")) or [place]
    parts = []
    for fold in folds:
        state = load_checkpoint(fold)
        part = _read(fold)
        temperature = Calibration.from_state(state.get("calibration")).temperature
        logits = np.log(np.maximum(part.probabilities, 1e-300)) * temperature
        logits = (logits - prior_shift(state["class_counts"], tau).numpy()) / temperature
        odds = np.exp(logits - logits.max(axis=1, keepdims=True))
        parts.append(Predictions(part.rows, odds / odds.sum(axis=1, keepdims=True)))
    rows = [row for part in parts for row in part.rows]
    return Predictions(rows, np.concatenate([part.probabilities for part in parts]))


def to_text(table: pd.DataFrame, seeds: Sequence[int], example: Predictions, run: Path) -> str:
    """The table for people, as Markdown, and what it was made on by the word of a run."""
    sessions = json.loads((run / "environment.json").read_text(encoding="utf-8"))["sessions"]
    patients = len({patient for patient in example.units("patient") if patient is not None})
    rows = []
    for row in table.to_dict(orient="records"):
        cells = {"lever": row["lever"]}
        for score, title in TITLES.items():
            low, high = row[f"{score} low"], row[f"{score} high"]
            between = "" if np.isnan(low) else f" ({low:.3f} to {high:.3f})"
            cells[title] = f"{row[score]:.3f} +- {row[f'{score} sd']:.3f}{between}"
        for score, title in TITLES.items():
            gap, low, high = (row[f"{score} gain{end}"] for end in ("", " low", " high"))
            between = "" if np.isnan(low) else f" ({low:+.3f} to {high:+.3f})"
            cells[f"{title} - recipe's"] = "-" if row["lever"] == RECIPE else f"{gap:+.3f}{between}"
        rows.append(cells)
    facts = {
        "seeds": ", ".join(map(str, seeds)),
        "test clips": len(example),
        "patients": patients or "unknown: the intervals take clips as independent",
        "device": sessions[-1]["device"],
        "torch": sessions[-1]["torch"],
    }
    return to_markdown(pd.DataFrame(rows), facts)


def put_section(path: Path, name: str, text: str) -> None:
    """Put text into a Markdown file between two comments with a name; at its end if they are not
    there yet."""
    begin, end = f"<!-- ablate: {name} -->", f"<!-- end: {name} -->"
    before = path.read_text(encoding="utf-8") if path.exists() else ""
    section = f"{begin}\n{text.strip()}\n{end}"
    if begin in before and end in before:
        head, rest = before.split(begin, 1)
        whole = head + section + rest.split(end, 1)[1]
    else:
        whole = f"{before.rstrip()}\n\n{section}\n".lstrip()
    write_text(path, whole)


@script
def main() -> None:
    config = tyro.cli(AblateConfig, description=__doc__)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("ablate.py is one process: start it several times with other --output")
    print(f"\n{ablate(config)}\nsaved in {config.output}")


if __name__ == "__main__":
    main()
