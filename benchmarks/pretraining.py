"""What pretraining without labels is worth, for fine-tuning with few labelled patients.

    python -m benchmarks.pretraining --models vivit tsm_resnet --output runs/pretraining
    python -m benchmarks.pretraining --models vivit --arms scratch mae --fractions 0.1 1 --seeds 0

Every model is pretrained once per method and seed on all training clips, and then fine-tuned on the
labels of a part of the training patients; whole patients are drawn, so that every class occurs, and
a smaller part lies within a larger one. All arms are fine-tuned with the same settings and the same
number of steps; the last epoch counts, and the clips of as few validation patients as have all
classes serve for the calibration alone. With --head linear the encoder stays frozen, and a linear
head is fitted to the same labels instead. The controls are pretrained on clips with shuffled frames
(mae_shuffled: is it time that is learned?) and on random targets (distil_random), or train from
scratch for as many steps more as the pretraining took (scratch_longer). Arms that a model has no
method for are left out.

runs_HEAD.csv has one row per run. Started again, only what is missing is trained. The table has the
means over the seeds and the paired differences to scratch, with 95 % intervals over the test
patients (evaluation/ablation.py).
"""

import csv
import math
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pandas as pd

from benchmarks.timing import environment, report
from clips.manifest import ClipRow, write_manifest
from clips.split import draw_patients
from config import Precision, TrainConfig
from demo.data import render_demo
from evaluation.ablation import ablation_table
from evaluation.predictions import read_predictions
from models import MODELS
from pretraining.mae import MAE_MODELS
from pretraining.order import ORDER_MODELS
from training.checks import resolve
from training.loaders import DEMO_ROOT, load_splits
from utils.cli import cli_main, parse
from utils.device import get_device
from utils.errors import UserError
from utils.files import require_writable
from utils.tables import write_csv

ROOT = Path(__file__).resolve().parent.parent
ARMS = {
    "scratch": [],
    "mae": ["--method", "mae"],
    "distil": ["--method", "distil"],
    "order": ["--method", "order"],
    "mae_shuffled": ["--method", "mae", "--shuffle-frames"],
    "distil_random": ["--method", "distil", "--teacher", "random"],
    "scratch_longer": [],
}
"""the flags of the pretraining of each arm; none: not pretrained"""
COLUMNS = (
    "model",
    "arm",
    "fraction",
    "seed",
    "patients",
    "clips",
    "epochs",
    "accuracy",
    "macro_f1",
)
SCORES = ("accuracy", "accuracy delta", "accuracy delta low", "accuracy delta high")
SCORES += tuple(name.replace("accuracy", "macro_f1") for name in SCORES)
FORMATS = {"fraction": "{:g}", "seeds": "{:.0f}"} | dict.fromkeys(SCORES, "{:.3f}")


@dataclass(frozen=True)
class PretrainingConfig:
    """The models, the arms, the parts of the labels, and the budgets."""

    models: tuple[str, ...] = ("vivit", "tsm_resnet")
    """models to pretrain and fine-tune"""
    arms: tuple[str, ...] = tuple(ARMS)
    """arms to compare; scratch has to be one of them"""
    fractions: tuple[float, ...] = (0.05, 0.1, 0.25, 1.0)
    """parts of the training clips whose labels are used, whole patients"""
    seeds: tuple[int, ...] = (0, 1, 2)
    """seeds of pretraining, drawing and fine-tuning"""
    data_root: str = ""
    """folder of your data (empty: the demo data)"""
    n_frames: int = 9
    """frames per clip; order needs a multiple of 3"""
    image_size: int = 48
    """height and width of the frames in pixels"""
    patch_size: int = 8
    """pixels of a patch's side of vivit and timesformer"""
    pretraining_epochs: int = 40
    """passes over all training clips without labels"""
    head: Literal["adamw", "linear"] = "adamw"
    """fine-tune the whole model, or fit a linear head to the features of the frozen encoder"""
    steps: int = 200
    """optimizer steps of the fine-tuning, whatever the fraction"""
    batch_size: int = 8
    """clips per step, in pretraining and fine-tuning"""
    pretraining_rate: float = 1e-3
    """learning rate of the pretraining"""
    learning_rate: float = 1e-3
    """learning rate of the fine-tuning"""
    precision: Precision = "auto"
    """precision of the forward pass"""
    cache: str = ""
    """folder that `prepare_data.py cache` has filled for these frames and pixels: the fine-tuning
    reads it much faster than videos"""
    num_workers: int = 2
    """processes that read clips"""
    output: str = "runs/pretraining"
    """folder for the runs and the tables"""


def is_possible(model: str, arm: str) -> bool:
    """Whether a model has the method of an arm."""
    models = {"mae": MAE_MODELS, "order": ORDER_MODELS}
    return all(method not in ARMS[arm] or model in names for method, names in models.items())


def run_all(config: PretrainingConfig) -> pd.DataFrame:
    """Train what is missing. One row per model, fraction and arm."""
    folder = Path(config.output).resolve()
    root = Path(config.data_root).resolve() if config.data_root else render_demo(DEMO_ROOT)
    settings = resolve(TrainConfig(data_root=str(root)))
    splits, tables = load_splits(settings), []
    rows = splits["train"]
    for model in config.models:
        arms = [arm for arm in config.arms if is_possible(model, arm)]
        if config.head == "linear":
            arms = [arm for arm in arms if arm != "scratch_longer"]  # it takes no steps
        for fraction in config.fractions:
            runs: dict[str, list[Path]] = {arm: [] for arm in arms}
            for seed in config.seeds:
                drawn = draw_patients(rows, fraction, seed)
                parts = {"train": drawn, "val": draw_patients(splits["val"], 1e-6, seed)}
                if config.head == "linear":  # which is fitted to both: no label more
                    others = [row for i, row in enumerate(drawn) if i % 5]
                    parts = {"train": others, "val": drawn[::5]}
                labels = [f"--data-root={root}", "--classes", *settings.classes]
                for split, clips in parts.items():
                    manifest = folder / "labels" / f"{split}-{config.head}-{fraction:g}-{seed}.csv"
                    manifest.parent.mkdir(parents=True, exist_ok=True)
                    write_manifest(manifest, clips, root, settings.classes)
                    labels = [f"--{split}-csv={manifest}", *labels]
                for arm in arms:
                    epochs = count_epochs(config, arm, len(drawn), len(rows))
                    key = model, arm, fraction, seed
                    encoder = _pretrain(config, folder, root, model, arm, seed)
                    run = _finetune(config, folder, labels, key, encoder, epochs)
                    _append(folder / f"runs_{config.head}.csv", key, drawn, epochs, run)
                    runs[arm].append(run)
            predictions = {
                arm: [read_predictions(run / "predictions.csv")[0] for run in of_arm]
                for arm, of_arm in runs.items()
            }
            table = ablation_table(predictions).rename(columns={"ablation": "arm"})
            table.insert(0, "model", model)
            table.insert(1, "fraction", fraction)
            tables.append(table[["model", "fraction", "arm", "seeds", *SCORES]])
    return pd.concat(tables, ignore_index=True)


def count_epochs(config: PretrainingConfig, arm: str, labelled: int, clips: int) -> int:
    """Epochs of the fine-tuning: those of `steps`, and for scratch_longer of the pretraining too.

    Args:
        labelled, clips: number of clips with labels, and of all training clips.
    """
    steps = config.steps
    if arm == "scratch_longer":
        steps += config.pretraining_epochs * math.ceil(clips / config.batch_size)
    return max(1, round(steps / math.ceil(labelled / config.batch_size)))


def _pretrain(
    config: PretrainingConfig, folder: Path, root: Path, model: str, arm: str, seed: int
) -> str:
    """The encoder of an arm, as `--weights` takes it; it is made once for all fractions."""
    if not ARMS[arm]:
        return "none"
    parent = folder / "pretrained" / f"{model}-{arm}-{seed}"
    while not any(parent.glob("*/encoder.pt")):
        if begun := sorted(parent.glob("*/last.pt")):
            flags = ["--resume", str(begun[0].parent)]
        else:
            flags = [str(root), *ARMS[arm], *_shared(config, model, seed), "--weights", "none"]
            flags += ["--epochs", str(config.pretraining_epochs)]
            flags += ["--learning-rate", str(config.pretraining_rate), "--run-dir", str(parent)]
            flags += ["--longest", "36000"]  # the clips as train.py has them
        print(f"\n##### pretraining: {model}, {arm}, seed {seed}", flush=True)
        _call("pretrain.py", *flags)
    return str(next(parent.glob("*/encoder.pt")))


def _finetune(
    config: PretrainingConfig,
    folder: Path,
    labels: Sequence[str],
    key: tuple[str, str, float, int],
    encoder: str,
    epochs: int,
) -> Path:
    """The finished training of a model, an arm, a fraction and a seed."""
    model, arm, fraction, seed = key
    parent = folder / config.head / f"{model}-{arm}-{fraction:g}-{seed}"
    while not any(parent.glob("*/test_metrics.json")):
        if begun := sorted(parent.glob("*/last.pt")):
            flags = ["--resume", str(begun[0].parent)]
        else:
            flags = [*labels, *_shared(config, model, seed), "--weights", encoder]
            flags += ["--no-check-clips", "--run-dir", str(parent), f"--cache={config.cache}"]
            if config.head == "linear":
                flags += ["--head", "linear"]
            else:
                flags += ["--learning-rate", str(config.learning_rate), "--epochs", str(epochs)]
                flags += [
                    "--rotation",
                    "0",
                    "--translate",
                    "0",
                    "--scale",
                    "0",
                    "--monitor",
                    "last",
                ]
        print(f"\n##### {model}, {arm}, {fraction:g} of the labels, seed {seed}", flush=True)
        _call("train.py", *flags)
    return next(parent.glob("*/test_metrics.json")).parent


def _shared(config: PretrainingConfig, model: str, seed: int) -> list[str]:
    """The flags that pretraining and fine-tuning have in common."""
    names = ("n_frames", "image_size", "batch_size", "num_workers", "precision")
    values = {"model_name": model, "seed": seed} | {name: getattr(config, name) for name in names}
    if model in MAE_MODELS:
        values["patch_size"] = config.patch_size
    pairs = [(f"--{name.replace('_', '-')}", str(value)) for name, value in values.items()]
    return [word for pair in pairs for word in pair]


def _append(
    path: Path, key: tuple[str, str, float, int], drawn: Sequence[ClipRow], epochs: int, run: Path
) -> None:
    """Add a row to the table of runs, unless it has one of this run."""
    lines = []
    if path.exists():
        with open(path, newline="", encoding="utf-8") as file:
            lines = list(csv.reader(file))[1:]
    if any(tuple(line[:4]) == tuple(map(str, key)) for line in lines):
        return
    scores = read_predictions(run / "predictions.csv")[0].summary()
    patients = len({row.patient for row in drawn})
    row = [*key, patients, len(drawn), epochs, scores["accuracy"], scores["macro_f1"]]
    write_csv(path, [COLUMNS, *lines, row])


def _call(script: str, *flags: str) -> None:
    """Run a script of this project as a user would.

    Raises:
        UserError: it fails; its own message is above.
    """
    ended = subprocess.run([sys.executable, str(ROOT / script), *flags], check=False)
    if ended.returncode:
        raise UserError(f"{script} {' '.join(flags)} ended with code {ended.returncode}")


@cli_main
def main() -> None:
    config = parse(PretrainingConfig, __doc__)
    for what, names, known in (("model", config.models, MODELS), ("arm", config.arms, ARMS)):
        if unknown := set(names) - known.keys():
            raise UserError(f"no {what} is called {min(unknown)!r}: choose from {', '.join(known)}")
    if "scratch" not in config.arms or config.arms[0] != "scratch":
        raise UserError("arms: the first has to be scratch, which the others are compared with")
    if not (config.models and config.fractions and config.seeds):
        raise UserError("give at least one model, one fraction and one seed")
    if not all(0 < fraction <= 1 for fraction in config.fractions):
        raise UserError("fractions: must be above 0 and at most 1")
    require_writable(config.output)
    table = run_all(config)
    conditions = environment(get_device("auto"), steps=config.steps, batch=config.batch_size)
    report(f"pretraining_{config.head}", table, conditions, config.output, FORMATS)


if __name__ == "__main__":
    main()
