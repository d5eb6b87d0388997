"""95 % intervals by resampling: patients first, then their clips.

Clips of one patient resemble each other, so a thousand clips of ten patients are closer to ten
observations than to a thousand. Resampling single clips overlooks that, and its intervals come out
several times too narrow (Reinke et al., arXiv:2511.03769); both kinds are reported side by side.
"""

from collections.abc import Iterator

import numpy as np
from scipy import special

from evaluation.metrics import brier_scores, log_losses, scores

DRAWS = 5000

LEVEL = 0.95

_CHUNK = 2**24  # weights held at a time


def patient_weights(patients: np.ndarray, draws: int, seed: int = 0) -> Iterator[np.ndarray]:
    """How often each clip is in each resample, `(n, N)` at a time, `draws` rows in all.

    As many patients as there are, drawn with replacement; for each drawn patient as many of his
    clips as there are, drawn with replacement.

    Args:
        patients: `(N,)` names; a clip of an unknown patient (None) counts as a patient by itself.
    """
    rng = np.random.default_rng(seed)
    members = patient_clips(patients)
    for rows in _rows(draws, len(patients)):
        times = rng.multinomial(len(members), [1 / len(members)] * len(members), rows)
        weights = np.empty((rows, len(patients)))
        for clips, often in zip(members, times.T, strict=True):
            # m independent resamples of n clips are one of m * n clips.
            weights[:, clips] = rng.multinomial(often * len(clips), [1 / len(clips)] * len(clips))
        yield weights


def clip_weights(clips: int, draws: int, seed: int = 0) -> Iterator[np.ndarray]:
    """As `patient_weights`, resampling single clips as if they were independent."""
    rng = np.random.default_rng(seed)
    for rows in _rows(draws, clips):
        yield rng.multinomial(clips, [1 / clips] * clips, rows).astype(float)


def patient_clips(patients: np.ndarray) -> list[np.ndarray]:
    """The places of each patient's clips; a clip of an unknown patient stands alone."""
    groups: dict[object, list[int]] = {}
    for place, patient in enumerate(patients):
        groups.setdefault(place if patient is None else str(patient), []).append(place)
    return [np.array(clips) for clips in groups.values()]


def independent_units(patients: np.ndarray) -> int:
    """How many independent observations the clips are; 0 if nothing is known of that."""
    known = any(patient is not None for patient in patients)
    return len(patient_clips(patients)) if known else 0


def resampled_scores(
    weights: Iterator[np.ndarray], labels: np.ndarray, probabilities: np.ndarray
) -> dict[str, np.ndarray]:
    """`metrics.scores`, Brier score and negative log-likelihood of each resample, `(draws,)`."""
    n, num_classes = probabilities.shape
    cells = np.zeros((n, num_classes**2))
    cells[np.arange(n), labels * num_classes + probabilities.argmax(axis=1)] = 1
    losses = {
        "brier": brier_scores(labels, probabilities),
        "nll": log_losses(labels, probabilities),
    }
    parts = []
    for chosen in weights:
        matrices = (chosen @ cells).reshape(-1, num_classes, num_classes)
        total = chosen.sum(axis=1)
        means = {name: chosen @ values / total for name, values in losses.items()}
        parts.append({**scores(matrices), **means})
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def interval(values: np.ndarray, units: int, level: float = LEVEL) -> list[float] | None:
    """The interval that resampled values give, for `units` independent observations.

    Percentiles, spread for small numbers of units as Hesterberg, "What Teachers Should Know About
    the Bootstrap", arXiv:1411.5279, recommends ("expanded percentile"): plain ones are too narrow
    by the factor sqrt((n - 1) / n) and by the difference between the normal and Student's t.

    Returns:
        Low and high; None for fewer than two units, which tell nothing of how units differ.
    """
    if units < 2:
        return None
    spread = special.stdtrit(units - 1, (1 + level) / 2) * np.sqrt(units / (units - 1))
    tail = special.ndtr(-spread)
    low, high = np.quantile(values, [tail, 1 - tail])
    return [float(low), float(high)]


def intervals(
    labels: np.ndarray,
    probabilities: np.ndarray,
    patients: np.ndarray,
    draws: int = DRAWS,
    seed: int = 0,
) -> dict[str, dict[str, list[float] | None]]:
    """95 % intervals of the scores.

    Returns:
        For each score `patients`, the interval to quote (None if no patient or only one is known),
        and `clips`, the naive one.
    """
    n = len(labels)
    order = canonical_order(labels, probabilities, patients)
    labels, probabilities, patients = labels[order], probabilities[order], patients[order]
    resamples = {
        "patients": (patient_weights(patients, draws, seed), independent_units(patients)),
        "clips": (clip_weights(n, draws, seed), n),
    }
    found: dict[str, dict[str, list[float] | None]] = {}
    for kind, (weights, units) in resamples.items():
        for name, values in resampled_scores(weights, labels, probabilities).items():
            found.setdefault(name, {})[kind] = interval(values, units)
    return found


def difference(
    labels: np.ndarray,
    one: np.ndarray,
    other: np.ndarray,
    patients: np.ndarray,
    draws: int = DRAWS,
    seed: int = 0,
) -> dict[str, list[float] | None]:
    """95 % intervals of what model `one` scores above model `other` on the same clips.

    Both are scored on the same resamples, so that what patients have in common cancels out.

    Args:
        one, other: their probabilities, `(N, num_classes)`.
    """
    both = np.concatenate((one + other, abs(one - other)), axis=1)  # the same if they change places
    order = canonical_order(labels, both, patients)
    labels, one, other, patients = labels[order], one[order], other[order], patients[order]
    units = len(patient_clips(patients))
    values = [
        resampled_scores(patient_weights(patients, draws, seed), labels, probabilities)
        for probabilities in (one, other)
    ]
    return {name: interval(values[0][name] - values[1][name], units) for name in values[0]}


def canonical_order(labels: np.ndarray, values: np.ndarray, patients: np.ndarray) -> np.ndarray:
    """An order of the clips, `(N,)` places, that does not depend on the one they come in.

    The same results then have the same intervals wherever they are worked out.

    Args:
        values: `(N, K)` numbers that tell clips of one patient and class apart.
    """
    names = np.array([str(patient or "") for patient in patients])
    return np.lexsort((*values.T, labels, names))


def _rows(draws: int, clips: int) -> Iterator[int]:
    most = max(1, _CHUNK // max(1, clips))
    for start in range(0, draws, most):
        yield min(most, draws - start)
