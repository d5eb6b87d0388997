"""Compare the scores and the speed of runs that were tested on the same clips.

    python compare.py runs/20260101-120000_tsm_resnet runs/20260102-120000_vivit
    python compare.py runs/*/evaluate_other_hospital --by accuracy --device cuda --precision bf16
    python compare.py RUN RUN RUN --no-speed                       scores only

A run is a run folder, a folder that evaluate.py made in one, or the folder of a cross-validation
(its predictions come from several models; parameters and speed are those of the one of fold 1).
A clip is identified by its path and true class; all runs must have been tested on the same clips.

Scores have 95 % intervals over patients. The difference of each run from the best one has an
interval too, computed in pairs on the same resamples of the same patients: two intervals that
overlap do not show that there is no difference. Speed is measured now, with the models in turn, as
in benchmark_latency.py.
"""

# Everything that imports torch or pandas is imported where it is used: --help does without.
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from config import Precision
from utils.cli import cli_main, parse
from utils.errors import UserError
from utils.files import require_writable, to_markdown, write_all, write_text
from utils.tables import write_table

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from torch import nn

    from evaluation.runs import Run

SCORES = {"macro_f1": "Macro F1", "accuracy": "Accuracy"}
"""the scores of the table, with the titles of their columns"""

UNSTEADY = 0.2  # std / mean of the batch times above which they are not reliable


@dataclass
class CompareConfig:
    """The runs to compare, and how to measure their speed."""

    runs: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN RUN ...")]
    """folders of at least two runs"""
    by: Literal["macro_f1", "accuracy"] = "macro_f1"
    """score that decides which run is best, and that the figure shows"""
    speed: bool = True
    """measure the speed and draw the figure of score against speed"""
    batch_size: int = 8
    """clips per timed batch"""
    warmup: int = 3
    """batches per model before the timed ones"""
    repeats: int = 10
    """timed batches per model"""
    device: str = "auto"
    """device: auto, cpu, cuda, cuda:1, mps"""
    precision: Precision = "fp32"
    """precision of the timed models; the scores have the precision that each run was tested in"""
    output: str = "runs/comparison"
    """folder for comparison.csv, comparison.md and accuracy_latency.png"""


@dataclass(frozen=True)
class Candidate:
    """A run of the comparison with its model."""

    run: "Run"
    model: "nn.Module"
    label: str
    """name of the model, with the run's folder where several runs are of one model"""
    n_frames: int
    image_size: int

    @property
    def clip_shape(self) -> str:
        return f"{self.n_frames} frames of {self.image_size} px"


def load_candidates(folders: Sequence[str]) -> list[Candidate]:
    """Read the runs and rebuild their models.

    Raises:
        UserError: one of them cannot be read, or they cannot be compared.
    """
    from checkpoint import rebuild_model
    from config import from_dict
    from evaluation.runs import read_runs, run_labels

    runs = read_runs(folders)
    states = [run.load_state() for run in runs]
    configs = [from_dict(state["config"]) for state in states]
    names = [config.model_name for config in configs]
    labels = run_labels(names, [run.folder.resolve() for run in runs])
    return [
        Candidate(run, rebuild_model(state), label, config.n_frames, config.image_size)
        for run, state, label, config in zip(runs, states, labels, configs, strict=True)
    ]


def score_table(candidates: Sequence[Candidate], best: int) -> "pd.DataFrame":
    """One row per run: scores, and the differences of the best run from it.

    Every number has an interval in two more columns, `low` and `high`, NaN where there is none.
    """
    import pandas as pd

    from evaluation.bootstrap import (
        compare_scores,
        interval_columns,
        n_clusters,
        score_intervals,
    )
    from evaluation.runs import patients_of

    patients = patients_of([candidate.run for candidate in candidates])
    best_predictions = candidates[best].run.predictions
    labels = best_predictions.labels
    models = [candidate.run.predictions.probabilities for candidate in candidates]
    all_intervals, all_differences = compare_scores(labels, models, best, patients)
    if not n_clusters(patients):
        # Naive intervals only; the text below the table says so.
        naive = [score_intervals(labels, model, patients) for model in models]
        all_intervals = [{name: both["clips"] for name, both in part.items()} for part in naive]
    rows = []
    for candidate, intervals, differences in zip(
        candidates, all_intervals, all_differences, strict=True
    ):
        predictions = candidate.run.predictions
        row: dict[str, Any] = {
            "Model": candidate.label,
            "Run": str(candidate.run.folder),
            "Params (M)": sum(p.numel() for p in candidate.model.parameters()) / 1e6,
        }
        for name in ("accuracy", "macro_f1"):
            row[SCORES[name]] = predictions.scores[name]
            row |= interval_columns(SCORES[name], intervals[name])
        for name in ("accuracy", "macro_f1"):
            column = f"{SCORES[name]}: best - this"
            row[column] = best_predictions.scores[name] - predictions.scores[name]
            row |= interval_columns(column, differences[name])
        rows.append(row)
    return pd.DataFrame(rows)


def speed_table(candidates: Sequence[Candidate], config: CompareConfig) -> "pd.DataFrame":
    """One row per run: the published columns, and the median, which one slow batch does not change.

    The models take turns, so that other work of the machine slows all of them alike. A run that was
    tested on several views of each clip is timed on as many.
    """
    from functools import partial

    import numpy as np
    import pandas as pd
    import torch

    from benchmarks.timing import interleave, random_clips, throughput_columns
    from modeling.inference import prepare_for_inference
    from utils.device import autocast_dtype, get_device

    device = get_device(config.device)
    dtype = autocast_dtype(config.precision, device)
    calls: dict[str, Callable[[], Any]] = {}
    for number, candidate in enumerate(candidates):
        model = prepare_for_inference(candidate.model, device, dtype)
        batch = random_clips(
            config.batch_size * candidate.run.num_views,
            candidate.n_frames,
            candidate.image_size,
            device,
            getattr(candidate.model, "channels", 3),
        )
        calls[f"{number}"] = partial(model, batch)
    with torch.inference_mode():
        times = interleave(calls, config.repeats, device, config.warmup)
    rows = [
        {
            **throughput_columns(seconds, config.batch_size),
            "Median (ms/clip)": float(np.median(seconds)) / config.batch_size * 1000,
            "Views": candidate.run.num_views,
            "Frames": candidate.n_frames,
            "Size (px)": candidate.image_size,
        }
        for candidate, seconds in zip(candidates, times.values(), strict=True)
    ]
    return pd.DataFrame(rows)


def pareto_front(latency: Sequence[float], score: Sequence[float]) -> list[int]:
    """The indices of the models that no other model dominates, the fastest first.

    A model is dominated by another one that is at least as fast and at least as good, and better in
    one of the two.
    """
    points = list(zip(latency, score, strict=True))
    front = [
        index
        for index, (time, value) in enumerate(points)
        if not any(t <= time and v >= value and (t, v) != (time, value) for t, v in points)
    ]
    return sorted(front, key=lambda index: points[index][0])


def format_comparison(
    table: "pd.DataFrame", candidates: Sequence[Candidate], best: int, config: CompareConfig
) -> str:
    """The comparison as Markdown: what was measured on what, the table, and how to read it."""
    import pandas as pd

    from benchmarks.timing import environment
    from evaluation.runs import patients_of
    from utils.device import autocast_dtype, get_device

    device = get_device(config.device)
    precision = str(autocast_dtype(config.precision, device)).removeprefix("torch.")
    conditions = environment(device)
    hardware = conditions.pop("device")
    patients = patients_of([candidate.run for candidate in candidates])
    known = len({patient for patient in patients if patient is not None})
    header = f"{len(candidates)} runs on the same {len(patients)} clips of "
    header += f"{known} patient{'s' * (known != 1)}" if known else "unknown patients"
    if config.speed:
        shapes = {candidate.clip_shape for candidate in candidates}
        named = ", ".join(f"{c.label}: {c.clip_shape}" for c in candidates)
        header += (
            f"; speed of batches of {config.batch_size} clips of "
            f"{shapes.pop() if len(shapes) == 1 else named}, {precision}, "
            f"on {hardware}, {config.repeats} rounds in turn"
        )
    records = table.to_dict(orient="records")
    cells = pd.DataFrame([_cells(row, index == best) for index, row in enumerate(records)])
    notes = [*_table_notes(table, best, config), *_patient_notes(patients), *_run_notes(candidates)]
    return f"{header}.\n\n{to_markdown(cells, conditions)}\n" + "".join(f"- {n}\n" for n in notes)


def _cells(row: dict[str, Any], best: bool) -> dict[str, str]:
    """A row of the table for people."""
    from evaluation.bootstrap import format_interval

    def with_interval(name: str, sign: str = "") -> str:
        interval = [row[f"{name} low"], row[f"{name} high"]]
        return f"{row[name]:{sign}.3f} ({format_interval(interval, f'{sign}.3f')})"

    cells = {"Model": row["Model"], "Params (M)": f"{row['Params (M)']:.2f}"}
    for name in ("Accuracy", "Macro F1"):
        cells[name] = with_interval(name)
    if "Latency (ms/clip)" in row:
        mean, std = row["Mean Batch Time (s)"], row["+- std (s)"]
        cells["Mean Batch Time (s)"] = f"{mean:.4f} +- {std:.4f}"
        for name in ("Latency (ms/clip)", "Median (ms/clip)"):
            cells[name] = f"{row[name]:.2f}"
    for name in ("Accuracy: best - this", "Macro F1: best - this"):
        cells[name] = "best" if best else with_interval(name, "+")
    return cells


def _table_notes(table: "pd.DataFrame", best: int, config: CompareConfig) -> list[str]:
    """How to read the columns, one line each."""
    score = SCORES[config.by]
    others = table.drop(index=best)
    if others[f"{score}: best - this low"].isna().all():
        notes = [
            f"Highest {score}: {table['Model'][best]}. Differences were not tested: without "
            "intervals nothing tells whether they are chance."
        ]
    else:
        notes = [
            f"Best: {table['Model'][best]}, by {score}. Where `best - this` is above zero, the "
            "best run is ahead; where its interval (95 %, in pairs) includes zero, that may be "
            "chance.",
            f"Each of the {2 * len(others)} intervals of a difference is for that difference "
            "alone: of many intervals some exclude zero by chance, and the best run was chosen on "
            "these same clips.",
        ]
    if equal := list(others["Model"][others[f"{score}: best - this"] == 0]):
        notes.append(f"The same {score} as the best run: {', '.join(equal)}.")
    if config.speed:
        front = pareto_front(table["Median (ms/clip)"], table[SCORES[config.by]])
        notes += [
            f"Latency (ms/clip) is the mean batch time / {config.batch_size}: the throughput at "
            f"batch {config.batch_size}, not the time that one clip waits (benchmark_latency.py "
            "measures that).",
            f"Pareto front, {SCORES[config.by]} against median ms/clip: "
            f"{', '.join(table['Model'][front])}.",
        ]
        if (table["+- std (s)"] > UNSTEADY * table["Mean Batch Time (s)"]).any():
            notes.append(
                f"UNSTEADY: batch times vary by more than {UNSTEADY:.0%}, because the machine was "
                "busy with something else. Measure again when it is not, or with more --repeats."
            )
    return notes


def _patient_notes(patients: "np.ndarray") -> list[str]:
    """What the intervals mean, given how many of the patients `(N,)` are known."""
    unknown = sum(patient is None for patient in patients)
    if unknown == len(patients):
        return ["No patient is known: the intervals treat clips as independent and are too narrow."]
    if not unknown and len(set(patients)) == 1:
        return ["One patient does not show how patients differ: there are no intervals."]
    if unknown:
        return [f"{unknown} clips of unknown patients count as one patient each."]
    return []


def _run_notes(candidates: Sequence[Candidate]) -> list[str]:
    """What distinguishes a run from a plain test of one model, one line each."""
    notes = []
    for candidate in candidates:
        run, label = candidate.run, candidate.label
        if run.folds > 1:
            notes.append(
                f"{label}: scores of {run.folds} models, each on the clips that it was not trained "
                "on; parameters and speed are those of fold 1."
            )
        if run.num_views > 1:
            notes.append(f"{label}: {run.num_views} views of each clip, all of them timed.")
        if run.results.get("shuffle_frames"):
            notes.append(f"{label}: was tested on shuffled frames.")
        if tau := run.results.get("logit_adjust_tau"):
            notes.append(f"{label}: was tested with --logit-adjust-tau {tau:g}.")
        if run.results.get("warnings"):
            notes.append(f"{label}: was tested with warnings, see its test_metrics.json.")
    return notes


def draw(table: "pd.DataFrame", config: CompareConfig, path: Path) -> None:
    """Draw the score against the speed."""
    from evaluation.plots import plot_tradeoff

    score, latency = SCORES[config.by], "Median (ms/clip)"
    plot_tradeoff(
        table[latency].to_numpy(),
        table[[score, f"{score} low", f"{score} high"]].to_numpy(),
        list(table["Model"]),
        pareto_front(table[latency], table[score]),
        (
            f"median ms/clip at batch {config.batch_size} (log scale)",
            f"{score} (bars: 95 % intervals)",
        ),
        path,
    )


@cli_main
def main() -> None:
    config = parse(CompareConfig, __doc__, old_names={"amp": "precision"})
    if config.batch_size < 1 or config.repeats < 1 or config.warmup < 0:
        raise UserError("batch_size and repeats must be at least 1, warmup at least 0")
    require_writable(config.output)
    candidates = load_candidates(config.runs)
    scores = [candidate.run.predictions.scores[config.by] for candidate in candidates]
    best = scores.index(max(scores))
    table = score_table(candidates, best)
    if config.speed:
        import pandas as pd

        table = pd.concat([table, speed_table(candidates, config)], axis=1)
    text = format_comparison(table, candidates, best, config)
    print(text)
    folder = Path(config.output)
    folder.mkdir(parents=True, exist_ok=True)
    writers = {
        folder / "comparison.csv": lambda path: write_table(path, table),
        folder / "comparison.md": lambda path: write_text(path, text),
    }
    figure = folder / "accuracy_latency.png"
    figure.unlink(missing_ok=True)  # of an earlier comparison
    if config.speed:
        writers[figure] = lambda path: draw(table, config, path)
    write_all(writers)
    print(f"saved in {folder}")


if __name__ == "__main__":
    main()
