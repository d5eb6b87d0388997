"""The models side by side, trained with equal data, equal steps and an equal budget of tuning.

    python -m benchmarks.models --output runs/models                    the demo data, all models
    python -m benchmarks.models --data-root /data/clips --weights default --n-frames 16 \\
      --image-size 224 --epochs 30 --output runs/models

Every model is trained once per learning rate with the first seed; the rate with the best validation
macro-F1 is kept, and trained with the other seeds. All other settings are train.py's. Each run is
tested twice: as usual, and with the frames of each clip shuffled, which shows whether the model
uses their order. The majority-class baseline is the first row. Started again, it trains only what
is missing.

Scores are means over the seeds, with 95 % intervals over patients (evaluation/ablation.py).
"""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from benchmarks.timing import environment, report
from evaluation.ablation import ablation_table
from evaluation.predictions import Predictions, read_predictions
from models import MODELS
from utils.cli import cli_main, parse
from utils.device import get_device
from utils.errors import UserError
from utils.files import require_writable

ROOT = Path(__file__).resolve().parent.parent
SCORES = ("accuracy", "accuracy sd", "accuracy low", "accuracy high")
SCORES += tuple(name.replace("accuracy", "macro_f1") for name in SCORES)
SHUFFLED = ("accuracy", "accuracy delta", "accuracy delta low", "accuracy delta high")
FORMATS = {"learning rate": "{:g}", "seeds": "{:.0f}"}
FORMATS |= dict.fromkeys((*SCORES, *(f"shuffled: {score}" for score in SHUFFLED)), "{:.3f}")


@dataclass(frozen=True)
class ModelsConfig:
    """The models, the budget of each, and the data."""

    model_names: tuple[str, ...] = tuple(MODELS)
    """models to compare"""
    learning_rates: tuple[float, ...] = (1e-3, 3e-4)
    """learning rates that each model is tried with"""
    seeds: tuple[int, ...] = (0, 1, 2)
    """seeds of the rate that is kept; the first one chooses it"""
    data_root: str = ""
    """folder of your data (empty: the demo data)"""
    weights: str = "none"
    """pretrained weights: default, or none"""
    n_frames: int = 8
    """frames per clip"""
    image_size: int = 48
    """height and width of the frames in pixels"""
    epochs: int = 4
    """passes over the training clips"""
    batch_size: int = 8
    """clips per step"""
    output: str = "runs/models"
    """folder for the runs and the table"""


def compare_models(config: ModelsConfig) -> pd.DataFrame:
    """Train what is missing. One row per model, after the majority-class baseline's."""
    folder = Path(config.output).resolve()
    runs: dict[str, list[Path]] = {}
    rates: dict[str, float] = {}
    for name in config.model_names:
        first, *others = config.seeds
        tried = {rate: _train(config, folder, name, rate, first) for rate in config.learning_rates}
        rates[name] = max(tried, key=lambda rate: _validation_score(tried[rate]))
        more = [_train(config, folder, name, rates[name], seed) for seed in others]
        runs[name] = [tried[rates[name]], *more]
    baseline = _predictions(runs[config.model_names[0]][0]).summary()["majority_baseline"]
    rows: list[dict[str, object]] = [{"model": "majority class", "accuracy": baseline}]
    for name, seeds in runs.items():
        plain = [_predictions(run) for run in seeds]
        shuffled = [_predictions(_shuffle(run)) for run in seeds]
        row, other = ablation_table({"ordered": plain, "shuffled": shuffled}).to_dict("records")
        rows.append(
            {"model": name, "learning rate": rates[name], "seeds": len(seeds)}
            | {score: row[score] for score in SCORES}
            | {f"shuffled: {score}": other[score] for score in SHUFFLED}
        )
    return pd.DataFrame(rows)


def _train(config: ModelsConfig, folder: Path, name: str, rate: float, seed: int) -> Path:
    """The finished run of a model, a learning rate and a seed."""
    parent = folder / f"{name}-{rate:g}-{seed}"
    while not any(parent.glob("*/test_metrics.json")):
        if begun := sorted(parent.glob("*/last.pt")):
            flags = ["--resume", str(begun[0].parent)]
        else:
            flags = [
                *("--model-name", name, "--learning-rate", str(rate), "--seed", str(seed)),
                *("--epochs", str(config.epochs), "--batch-size", str(config.batch_size)),
                *("--n-frames", str(config.n_frames), "--image-size", str(config.image_size)),
                *("--weights", config.weights, "--run-dir", str(parent)),
            ]
            flags += ["--data-root", config.data_root] if config.data_root else []
        print(f"\n##### {name}, learning rate {rate:g}, seed {seed}", flush=True)
        _call("train.py", *flags)
    return next(parent.glob("*/test_metrics.json")).parent


def _shuffle(run: Path) -> Path:
    """The test of a run with shuffled frames."""
    output = run / "shuffled"
    if not (output / "predictions.csv").exists():
        _call("evaluate.py", str(run), "--shuffle-frames", "--output", str(output))
    return output


def _call(script: str, *flags: str) -> None:
    """Run a script of this project as a user would.

    Raises:
        UserError: it fails; its own message is above.
    """
    ended = subprocess.run([sys.executable, str(ROOT / script), *flags], cwd=ROOT, check=False)
    if ended.returncode:
        raise UserError(f"{script} {' '.join(flags)} ended with code {ended.returncode}")


def _validation_score(run: Path) -> float:
    return pd.read_csv(run / "metrics.csv")["val_macro_f1"].max()


def _predictions(folder: Path) -> Predictions:
    return read_predictions(folder / "predictions.csv")[0]


@cli_main
def main() -> None:
    config = parse(ModelsConfig, __doc__)
    if unknown := set(config.model_names) - MODELS.keys():
        raise UserError(f"no model is called {min(unknown)!r}: choose from {', '.join(MODELS)}")
    if not config.seeds or not config.learning_rates or not config.model_names:
        raise UserError("give at least one model, one seed and one learning rate")
    require_writable(config.output)
    table = compare_models(config)
    conditions = environment(get_device("auto"), epochs=config.epochs, batch=config.batch_size)
    report("models", table, conditions, config.output, FORMATS)


if __name__ == "__main__":
    main()
