"""95 % intervals by the cluster bootstrap: patients are resampled first, then their clips.

Clips of one patient resemble each other, so a thousand clips of ten patients are closer to ten
observations than to a thousand. Resampling single clips ignores this, and its intervals are
several times too narrow (Reinke et al., arXiv:2511.03769); both kinds are reported side by side.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from evaluation.metrics import brier_scores, per_sample_nll, scores

N_RESAMPLES = 5000
LEVEL = 0.95
_CHUNK = 2**24  # weights in memory at a time

# From so many clips on, the clips of a resample are drawn and counted, in a tenth of the time.
# Below, the counts themselves are drawn, as in earlier versions: their results stay the same bit
# for bit. Both are the same distribution.
_MANY = 20_000

Interval = list[float] | None
"""low and high; None where there is no interval"""


def cluster_bootstrap_weights(
    patients: np.ndarray, n_resamples: int, seed: int = 0
) -> Iterator[np.ndarray]:
    """How often each clip is in each resample, `(n, N)` at a time, `n_resamples` rows in all.

    As many patients as there are, drawn with replacement; for each drawn patient as many of
    the patient's clips as there are, drawn with replacement.

    Args:
        patients: `(N,)` names; a clip of an unknown patient (None) counts as a patient by itself.
    """
    rng = np.random.default_rng(seed)
    clusters = patient_clips(patients)
    if len(patients) >= _MANY:
        yield from _drawn_cluster_weights(clusters, n_resamples, rng)
        return
    for rows in _chunks(n_resamples, len(patients)):
        times = rng.multinomial(len(clusters), [1 / len(clusters)] * len(clusters), rows)
        weights = np.empty((rows, len(patients)))
        for clips, count in zip(clusters, times.T, strict=True):
            # m independent resamples of n clips are one of m * n clips.
            weights[:, clips] = rng.multinomial(count * len(clips), [1 / len(clips)] * len(clips))
        yield weights


def iid_bootstrap_weights(clips: int, n_resamples: int, seed: int = 0) -> Iterator[np.ndarray]:
    """As `cluster_bootstrap_weights`, resampling single clips as if they were independent."""
    rng = np.random.default_rng(seed)
    for rows in _chunks(n_resamples, clips):
        if clips >= _MANY:
            weights = np.empty((rows, clips))
            for row in weights:
                row[:] = np.bincount(rng.integers(clips, size=clips), minlength=clips)
            yield weights
        else:
            yield rng.multinomial(clips, [1 / clips] * clips, rows).astype(float)


def _drawn_cluster_weights(
    clusters: Sequence[np.ndarray], n_resamples: int, rng: np.random.Generator
) -> Iterator[np.ndarray]:
    """The weights of `cluster_bootstrap_weights` for many clips."""
    sizes = np.array([len(clips) for clips in clusters])
    starts, order = np.cumsum(sizes) - sizes, np.concatenate(clusters)
    for rows in _chunks(n_resamples, len(order)):
        weights = np.empty((rows, len(order)))
        for row in weights:
            drawn = rng.integers(len(clusters), size=len(clusters))
            draws = np.bincount(drawn, minlength=len(clusters)) * sizes  # clips per patient
            number = rng.random(draws.sum()) * np.repeat(sizes, draws)  # of the patient's clips
            positions = number.astype(int) + np.repeat(starts, draws)
            row[order] = np.bincount(positions, minlength=len(order))
        yield weights


def patient_clips(patients: np.ndarray) -> list[np.ndarray]:
    """The indices of each patient's clips; a clip of an unknown patient is a group by itself."""
    groups: dict[object, list[int]] = {}
    for index, patient in enumerate(patients):
        groups.setdefault(index if patient is None else str(patient), []).append(index)
    return [np.array(clips) for clips in groups.values()]


def n_clusters(patients: np.ndarray) -> int:
    """The number of independent observations; 0 if no patient is known."""
    known = any(patient is not None for patient in patients)
    return len(patient_clips(patients)) if known else 0


def resampled_scores(
    weights: Iterator[np.ndarray], labels: np.ndarray, probabilities: np.ndarray
) -> dict[str, np.ndarray]:
    """`metrics.scores`, Brier score and negative log-likelihood of each resample,
    `(n_resamples,)`."""
    return resampled_tables(weights, [(labels, probabilities)])[0]


def resampled_tables(
    weights: Iterator[np.ndarray], tables: Sequence[tuple[np.ndarray, np.ndarray]]
) -> list[dict[str, np.ndarray]]:
    """`resampled_scores` of several tables of labels and probabilities, on the same resamples."""
    cells, losses = [], []
    for labels, probabilities in tables:
        cells.append(labels * probabilities.shape[1] + probabilities.argmax(axis=1))
        brier, nll = brier_scores(labels, probabilities), per_sample_nll(labels, probabilities)
        losses.append({"brier": brier, "nll": nll})
    parts: list[list[dict[str, np.ndarray]]] = [[] for _ in tables]
    for chunk in weights:
        total = chunk.sum(axis=1)
        for k, (_, probabilities) in enumerate(tables):
            num_classes = probabilities.shape[1]
            counts = [np.bincount(cells[k], row, num_classes**2) for row in chunk]
            matrices = np.reshape(counts, (-1, num_classes, num_classes))
            means = {name: chunk @ values / total for name, values in losses[k].items()}
            parts[k].append({**scores(matrices), **means})
    return [{name: np.concatenate([p[name] for p in part]) for name in part[0]} for part in parts]


def confidence_interval(values: np.ndarray, n: int, level: float = LEVEL) -> Interval:
    """The interval of resampled values, for `n` independent observations.

    Percentiles, spread for small n as Hesterberg, "What Teachers Should Know About the Bootstrap",
    arXiv:1411.5279, recommends ("expanded percentile"): plain ones are too narrow by the factor
    sqrt((n - 1) / n) and by the difference between the normal and Student's t.

    Returns:
        Low and high; None for fewer than two observations, whose variation is unknown.
    """
    from scipy import special  # takes half a second to import

    if n < 2:
        return None
    spread = special.stdtrit(n - 1, (1 + level) / 2) * np.sqrt(n / (n - 1))
    tail = special.ndtr(-spread)
    low, high = np.quantile(values, [tail, 1 - tail])
    return [float(low), float(high)]


def interval_columns(name: str, interval: Interval) -> dict[str, float]:
    """The columns `<name> low` and `<name> high` of a table; NaN without an interval."""
    low, high = interval or (float("nan"), float("nan"))
    return {f"{name} low": low, f"{name} high": high}


def format_interval(interval: Interval, pattern: str = ".3f", missing: str = "-") -> str:
    """An interval as `0.519 to 0.717`.

    Args:
        pattern: format of both numbers, e.g. `+.3f`.
        missing: what is shown without an interval.
    """
    if interval is None or np.isnan(interval).any():
        return missing
    low, high = interval
    return f"{low:{pattern}} to {high:{pattern}}"


def score_intervals(
    labels: np.ndarray,
    probabilities: np.ndarray,
    patients: np.ndarray,
    n_resamples: int = N_RESAMPLES,
    seed: int = 0,
) -> dict[str, dict[str, Interval]]:
    """95 % intervals of the scores.

    Returns:
        For each score `patients`, the interval to quote (None if no patient or only one is known),
        and `clips`, the naive one.
    """
    n = len(labels)
    order = canonical_order(labels, probabilities, patients)
    labels, probabilities, patients = labels[order], probabilities[order], patients[order]
    kinds = {
        "patients": (cluster_bootstrap_weights(patients, n_resamples, seed), n_clusters(patients)),
        "clips": (iid_bootstrap_weights(n, n_resamples, seed), n),
    }
    intervals: dict[str, dict[str, Interval]] = {}
    for kind, (weights, count) in kinds.items():
        for name, values in resampled_scores(weights, labels, probabilities).items():
            intervals.setdefault(name, {})[kind] = confidence_interval(values, count)
    return intervals


def paired_difference(
    labels: np.ndarray,
    first: np.ndarray,
    second: np.ndarray,
    patients: np.ndarray,
    n_resamples: int = N_RESAMPLES,
    seed: int = 0,
) -> dict[str, Interval]:
    """95 % intervals of the scores of a first model minus those of a second one, on the same clips.

    Both are scored on the same resamples, so that variation which both models share cancels
    out.

    Args:
        first, second: probabilities of the two models, `(N, num_classes)`.
    """
    return compare_scores(labels, [first, second], 0, patients, n_resamples, seed)[1][1]


def compare_scores(
    labels: np.ndarray,
    models: Sequence[np.ndarray],
    best: int,
    patients: np.ndarray,
    n_resamples: int = N_RESAMPLES,
    seed: int = 0,
) -> tuple[list[dict[str, Interval]], list[dict[str, Interval]]]:
    """For each of several models, the intervals over patients of its scores (`score_intervals`) and
    of the scores of the model `best` minus its own (`paired_difference`).

    All use the same resamples, which are drawn once: that takes most of the time.

    Args:
        models: probabilities of each model, `(N, num_classes)`.
    """
    orders = [canonical_order(labels, probabilities, patients) for probabilities in models]
    tables = [(labels[o], model[o]) for o, model in zip(orders, models, strict=True)]
    others = [k for k in range(len(models)) if k != best]
    for k in others:
        # symmetric in the two
        both = np.concatenate((models[best] + models[k], abs(models[best] - models[k])), axis=1)
        order = canonical_order(labels, both, patients)
        tables += [(labels[order], models[best][order]), (labels[order], models[k][order])]
    # In whatever order a patient's clips are, the patients are in the same one.
    weights = cluster_bootstrap_weights(patients[orders[best]], n_resamples, seed)
    values = resampled_tables(weights, tables)
    own, pairs = values[: len(models)], iter(values[len(models) :])
    differences = [{name: np.zeros(n_resamples) for name in own[best]} for _ in models]
    for k in others:
        first, second = next(pairs), next(pairs)
        differences[k] = {name: first[name] - second[name] for name in first}
    n_scores, n_differences = n_clusters(patients), len(patient_clips(patients))
    return (
        [{name: confidence_interval(v, n_scores) for name, v in part.items()} for part in own],
        [
            {name: confidence_interval(v, n_differences) for name, v in part.items()}
            for part in differences
        ],
    )


def canonical_order(labels: np.ndarray, values: np.ndarray, patients: np.ndarray) -> np.ndarray:
    """An order of the clips, `(N,)` indices, that does not depend on the order they come in.

    The same results then have the same intervals wherever they are computed.

    Args:
        values: `(N, K)` numbers that distinguish the clips of one patient and class.
    """
    names = np.array([str(patient or "") for patient in patients])
    return np.lexsort((*values.T, labels, names))


def _chunks(n_resamples: int, clips: int) -> Iterator[int]:
    size = _CHUNK if clips < _MANY else _CHUNK // 16  # then it stays in the processor's cache
    max_rows = max(1, size // max(1, clips))
    for start in range(0, n_resamples, max_rows):
        yield min(max_rows, n_resamples - start)
