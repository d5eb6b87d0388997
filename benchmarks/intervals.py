"""How often 95 % intervals hold the truth, on simulated data where the truth is known.

python -m benchmarks.intervals
python -m benchmarks.intervals --patients 5 34 --data-sets 1000
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd
import tyro
from tqdm import tqdm

from evaluation.bootstrap import intervals
from evaluation.metrics import confusion_matrix, scores
from utils.cli import script
from utils.errors import UserError
from utils.files import to_markdown

KINDS = ("patients", "clips")


@dataclass
class IntervalConfig:
    """What to simulate."""

    patients: tuple[int, ...] = (5, 12, 34)
    """patients of a data set; each number gives a row"""
    data_sets: int = 500
    """simulated data sets for each"""
    draws: int = 1000
    """resamples for each interval"""
    seed: int = 0
    """of everything random"""


def simulate(
    patients: int, rng: np.random.Generator, most: int = 30
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels, probabilities and patients of a model that finds some patients harder than others.

    Every patient has 5 to `most` clips and a skill of his own, normal on the logit scale; the three
    classes are unequally frequent and unequally hard.
    """
    clips = rng.integers(5, most + 1, patients)
    skill = np.repeat(rng.normal(1, 1, patients), clips)
    labels = rng.choice(3, len(skill), p=[0.6, 0.3, 0.1])
    chance = 1 / (1 + np.exp(-skill - np.array([0.5, 0, -0.5])[labels]))
    right = rng.random(len(skill)) < chance
    said = np.where(right, labels, (labels + rng.integers(1, 3, len(labels))) % 3)
    names = np.repeat([f"P{number}" for number in range(patients)], clips).astype(object)
    return labels, 0.1 + 0.7 * np.eye(3)[said], names


def true_scores() -> dict[str, float]:
    """The scores of that model over very many patients."""
    labels, probabilities, _ = simulate(200_000, np.random.default_rng(99))
    found = scores(confusion_matrix(labels, probabilities.argmax(axis=1), 3))
    return {name: float(value) for name, value in found.items()}


def coverage(
    patients: int, data_sets: int, draws: int, seed: int = 0
) -> dict[tuple[str, str], float]:
    """In which share of the data sets each kind of interval of each score holds the truth."""
    truth = true_scores()
    rng = np.random.default_rng(seed)
    held = dict.fromkeys(((name, kind) for name in truth for kind in KINDS), 0)
    for number in tqdm(range(data_sets), f"{patients} patients", leave=False, delay=1):
        found = intervals(*simulate(patients, rng), draws, number)
        for name, kind in held:
            low, high = found[name][kind]
            held[name, kind] += low <= truth[name] <= high
    return {key: count / data_sets for key, count in held.items()}


@script
def main() -> None:
    config = tyro.cli(IntervalConfig, description=__doc__)
    if min(config.patients, default=0) < 2 or config.data_sets < 1 or config.draws < 100:
        raise UserError("patients must be 2 at least, data_sets 1, draws 100")
    rows = []
    for patients in config.patients:
        found = coverage(patients, config.data_sets, config.draws, config.seed)
        shares = {f"{name}, {kind}": f"{share:.1%}" for (name, kind), share in found.items()}
        rows.append({"patients": str(patients), **shares})
    facts = {"data sets": config.data_sets, "draws": config.draws, "seed": config.seed}
    print(to_markdown(pd.DataFrame(rows), facts))


if __name__ == "__main__":
    main()
