"""Measures how often 95 % intervals contain the true score, on simulated data.

python -m benchmarks.intervals
python -m benchmarks.intervals --patients 5 34 --data-sets 1000
"""

from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from evaluation.bootstrap import score_intervals
from evaluation.metrics import confusion_matrix, scores
from utils.cli import cli_main, parse
from utils.errors import UserError
from utils.files import to_markdown

KINDS = ("patients", "clips")


@dataclass
class IntervalConfig:
    """What to simulate, and how often."""

    patients: tuple[int, ...] = (5, 12, 34)
    """numbers of patients per data set; each number is a row of the table"""
    data_sets: int = 500
    """simulated data sets per row"""
    n_resamples: int = 1000
    """bootstrap resamples per interval"""
    seed: int = 0
    """random seed"""


def simulate(
    patients: int, rng: np.random.Generator, most: int = 30
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Simulate a model that classifies some patients' clips better than others'.

    Every patient has 5 to `most` clips and an offset of the logit of being correct, drawn from a
    normal distribution. The three classes differ in frequency and difficulty.

    Returns:
        Labels `(N,)`, probabilities `(N, 3)` and patients `(N,)`.
    """
    clips = rng.integers(5, most + 1, patients)
    logits = np.repeat(rng.normal(1, 1, patients), clips)
    labels = rng.choice(3, len(logits), p=[0.6, 0.3, 0.1])
    accuracy = 1 / (1 + np.exp(-logits - np.array([0.5, 0, -0.5])[labels]))
    correct = rng.random(len(logits)) < accuracy
    y_pred = np.where(correct, labels, (labels + rng.integers(1, 3, len(labels))) % 3)
    names = np.repeat([f"P{number}" for number in range(patients)], clips).astype(object)
    return labels, 0.1 + 0.7 * np.eye(3)[y_pred], names


def true_scores() -> dict[str, float]:
    """The scores of the simulated model over 200,000 patients."""
    labels, probabilities, _ = simulate(200_000, np.random.default_rng(99))
    matrix = confusion_matrix(labels, probabilities.argmax(axis=1), 3)
    return {name: float(value) for name, value in scores(matrix).items()}


def coverage(
    patients: int, data_sets: int, n_resamples: int, seed: int = 0
) -> dict[tuple[str, str], float]:
    """The fraction of data sets in which each kind of interval of each score contains the truth."""
    truth = true_scores()
    rng = np.random.default_rng(seed)
    hits = dict.fromkeys(((name, kind) for name in truth for kind in KINDS), 0)
    for index in tqdm(range(data_sets), f"{patients} patients", leave=False, delay=1):
        intervals = score_intervals(*simulate(patients, rng), n_resamples, index)
        for name, kind in hits:
            low, high = intervals[name][kind]
            hits[name, kind] += low <= truth[name] <= high
    return {key: count / data_sets for key, count in hits.items()}


@cli_main
def main() -> None:
    config = parse(IntervalConfig, __doc__, old_names={"draws": "n_resamples"})
    import pandas as pd  # not above: --help does without it

    if min(config.patients, default=0) < 2 or config.data_sets < 1 or config.n_resamples < 100:
        raise UserError("patients must be at least 2, data_sets 1, n_resamples 100")
    rows = []
    for patients in config.patients:
        fractions = coverage(patients, config.data_sets, config.n_resamples, config.seed)
        cells = {f"{name}, {kind}": f"{part:.1%}" for (name, kind), part in fractions.items()}
        rows.append({"patients": str(patients), **cells})
    conditions = {
        "data sets": config.data_sets,
        "resamples": config.n_resamples,
        "seed": config.seed,
    }
    print(to_markdown(pd.DataFrame(rows), conditions))


if __name__ == "__main__":
    main()
