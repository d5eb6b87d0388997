"""Which lever earns its place? A recipe, and one change at a time, over seeds and folds.

    python ablate.py --data-root /data/clips --folds folds --output study --model cnn_lstm
    python ablate.py ... --levers "focal loss" "averaged weights" --seeds 0 1 2
    python ablate.py ... --into RESULTS.md --name clips          the table goes into a file

The recipe is the settings that are given, all of them train.py's; each lever changes some (LEVERS
below). Every lever is trained for every seed by cross_validate.py's code; without --folds, by
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import tyro

from atomic import write_text
from benchmarking import to_markdown
from calibration import Calibration
from checkpoint import load_checkpoint
from config import TrainConfig
from cross_validate import CrossValidateConfig, cross_validate
from device import choose_device, describe_device
from errors import UserError
from lever_table import TITLES, lever_table
from losses import prior_shift
from plots import plot_differences
from predictions import Predictions, read_predictions
from run_folder import write_json
from script import script
from train import train

RECIPE = "recipe"

LEVERS: dict[str, dict[str, Any]] = {
    RECIPE: {},
    "plain shuffling": {"tau": 0.0},
    "all classes equally often": {"tau": 1.0},
    "inverse class weights": {"class_weights": "inverse", "tau": 0.0},
    "effective class weights": {"class_weights": "effective", "tau": 0.0},
    "focal loss": {"loss": "focal"},
    "LDAM, deferred weights": {"loss": "ldam", "class_weights": "effective", "tau": 0.0},
    "balanced softmax": {"loss": "balanced_softmax", "tau": 0.0},
    "logit adjustment": {"loss": "logit_adjustment", "tau": 0.0, "adjustment_tau": 0.5},
    "no label smoothing": {"label_smoothing": 0.0},
    "averaged weights": {"ema": 0.98},
    "mixup": {"mixup": 0.2},
    "RandAugment": {"rand_augment": 2},
    "random erasing": {"erasing": 0.25},
    "no augmentation": {
        **dict.fromkeys(("flip", "rotation", "translate", "zoom"), 0.0),
        **dict.fromkeys(("brightness", "contrast", "saturation", "hue"), 0.0),
    },
    "4 frames": {"n_frames": 4},
    "8 frames": {"n_frames": 8},
    "16 frames": {"n_frames": 16},
    "32 frames": {"n_frames": 32},
    "2 views": {"test_views": 2},
    "2 views x 3 crops": {"test_views": 2, "test_crops": 3},
    "LSTM": {"lstm_layers": 1, "temporal_pooling": "mean"},
    "attention": {"temporal_pooling": "attention"},
    "mean over time": {"temporal_pooling": "mean"},
    "gradients alone": {"inputs": "gradients"},
    "flow alone": {"inputs": "flow"},
    "vectors alone": {"inputs": "vectors"},
    "+ gradients": {"inputs": "rgb+gradients"},
    "+ flow": {"inputs": "rgb+flow"},
    "+ flow summary": {"inputs": "rgb+flow", "fusion": "summary"},
    "+ vectors": {"inputs": "rgb+vectors"},
    "+ vectors summary": {"inputs": "rgb+vectors", "fusion": "summary"},
}

ADJUSTED = {"adjusted afterwards, 0.5": 0.5, "adjusted afterwards, 1": 1.0}
"""levers that need no training: the recipe's answers, `evaluate.py --adjust` so much"""


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
        UserError: a lever is not known, or the folder's runs had another recipe.
        SystemExit: interrupted; the same command goes on.
    """
    levers = _chosen(config)
    folder = Path(config.output)
    _hold_to_recipe(config, folder)
    for name in levers:
        for seed in config.seeds:
            place = _place(folder, name, seed)
            if not (place / "test_metrics.json").exists():  # written last of all
                print(f"\n##### {name}, seed {seed}: {place}", flush=True)
                _run(config, name, seed, place)
    found = {name: [_read(_place(folder, name, seed)) for seed in config.seeds] for name in levers}
    for name, tau in ADJUSTED.items():
        places = [_place(folder, RECIPE, seed) for seed in config.seeds]
        found[name] = [_adjusted(place, tau) for place in places]
    table = lever_table(found)
    write_text(folder / "study.csv", table.to_csv(index=False))
    plot_differences(table, folder / "study.png")
    text = to_text(table, config, found[RECIPE][0])
    write_text(folder / "study.md", text)
    if config.into:
        put_section(Path(config.into), config.name, text)
    return text


def _chosen(config: AblateConfig) -> list[str]:
    unknown = [name for name in config.levers if name not in LEVERS]
    if unknown:
        raise UserError(f"no lever is called {unknown[0]!r}: choose from {', '.join(LEVERS)}")
    if not config.seeds:
        raise UserError("seeds: name one at least")
    chosen = config.levers or LEVERS
    return [RECIPE, *(name for name in LEVERS if name in chosen and name != RECIPE)]


def _hold_to_recipe(config: AblateConfig, folder: Path) -> None:
    """Note the recipe in the folder, or compare with the one that is there."""
    fields = [f.name for f in dataclasses.fields(CrossValidateConfig)]
    free = ("workers", "device", "seed", "run_dir", "resume", "check_clips")
    recipe = {name: getattr(config, name) for name in fields if name not in free}
    places = [name for name in ("data_root", "folds", "features", "cache") if recipe[name]]
    recipe |= {name: os.path.abspath(recipe[name]) for name in places}
    recipe = json.loads(json.dumps(recipe))
    noted = folder / "recipe.json"
    if not noted.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_json(noted, recipe)
        return
    before = json.loads(noted.read_text(encoding="utf-8"))
    other = [name for name, value in recipe.items() if before.get(name, value) != value]
    if other:
        raise UserError(
            f"{folder}: its runs had {other[0]} {before[other[0]]!r}, not {recipe[other[0]]!r}: "
            "give the same settings, or another --output"
        )


def _place(folder: Path, lever: str, seed: int) -> Path:
    slug = re.sub(r"\W+", "_", lever.replace("+", "plus")).strip("_")
    return folder / slug / f"seed{seed}"


def _run(config: AblateConfig, lever: str, seed: int, place: Path) -> None:
    settings = {f.name: getattr(config, f.name) for f in dataclasses.fields(CrossValidateConfig)}
    settings |= {**LEVERS[lever], "seed": seed}
    if config.folds:
        cross_validate(CrossValidateConfig(**settings), place)
        return
    del settings["folds"]
    state = load_checkpoint(place, "last.pt") if (place / "last.pt").exists() else None
    train(TrainConfig(**settings), state, place, "the same command again")


def _read(place: Path) -> Predictions:
    return read_predictions(place / "predictions.csv")[0]


def _adjusted(place: Path, tau: float) -> Predictions:
    """What the runs of a place say with their logits adjusted after training, fold by fold.

    `evaluate.py --adjust` does it to the logits; the log of the probabilities times the temperature
    differs from them by a number a clip, which the softmax forgets.
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


def to_text(table: pd.DataFrame, config: AblateConfig, example: Predictions) -> str:
    """The table for people, as Markdown: what it was made on, the table, how to read it."""
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
        "seeds": ", ".join(map(str, config.seeds)),
        "test clips": len(example),
        "patients": patients or "unknown: the intervals take clips as independent",
        "device": describe_device(choose_device(config.device)),
        "torch": torch.__version__,
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
