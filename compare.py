"""Compare runs that were tested on the same clips: the published table, and what each costs.

    python compare.py runs/20260101-120000_tsm runs/20260102-120000_vivit
    python compare.py runs/*/evaluate_other_hospital --by accuracy --device cuda --amp bf16
    python compare.py RUN RUN RUN --no-speed                       scores only

A run is a run folder, a folder that evaluate.py made in one, or a folder of a cross-validation (its
clips are judged by several models; fold 1's stands for their parameters and speed). A clip is known
by its path and true class, and all runs must have been tested on the same ones.

Scores have 95 % intervals over patients. How far each run is behind the best one is judged in
pairs, on the same resamples of the same patients: two intervals that overlap do not say that there
is no difference. Speed is measured here and now, the models in turn, as benchmark_latency.py does.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pandas as pd
import torch
import tyro
from tqdm import tqdm

from benchmarks.timing import conditions, interleave, published_speed, random_clips
from evaluation import bootstrap
from evaluation.plots import plot_tradeoff
from evaluation.runs import Run, known_patients, read_runs
from modeling.inference import prepare_for_inference
from utils.cli import script
from utils.device import choose_device, choose_precision
from utils.errors import UserError
from utils.files import to_markdown, write_text

SCORES = {"macro_f1": "Macro F1", "accuracy": "Accuracy"}  # the columns by the names of metrics.py

UNSTEADY = 0.2  # std / mean of batch times that are not to be trusted


@dataclass
class CompareConfig:
    """What to compare, by what."""

    runs: Annotated[tuple[str, ...], tyro.conf.Positional]
    """folders, two at least"""
    by: Literal["macro_f1", "accuracy"] = "macro_f1"
    """the score that says which run is best, and that the picture shows"""
    speed: bool = True
    """measure the speed, and draw the picture of score against speed"""
    batch_size: int = 8
    """clips a batch"""
    warmup: int = 3
    """batches before the clock starts"""
    repeats: int = 10
    """timed batches of each model"""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps"""
    amp: Literal["auto", "fp32", "bf16", "fp16"] = "fp32"
    """precision of the timed models; the scores are of the precision that each was tested in"""
    output: str = "comparison"
    """folder for comparison.csv, comparison.md and accuracy_latency.png"""


def score_table(runs: Sequence[Run], best: int) -> pd.DataFrame:
    """A row a run, all numbers: scores, their intervals, and what `best` scores above the run.

    Every number has its interval in two columns, `low` and `high`, NaN where there is none.
    """
    patients = known_patients(runs)
    # Without any patient there are naive intervals only; the text below the table says so.
    kind = "patients" if bootstrap.independent_units(patients) else "clips"
    labels = runs[0].predictions.labels
    top = runs[best].predictions.probabilities
    rows = []
    for run in tqdm(runs, "resampling", unit="run", leave=False, delay=1):
        probabilities = run.predictions.probabilities
        intervals = bootstrap.intervals(labels, probabilities, patients)
        gaps = bootstrap.difference(labels, top, probabilities, patients)
        row: dict[str, Any] = {
            "Model": run.label,
            "Run": str(run.folder),
            "Params (M)": sum(p.numel() for p in run.model.parameters()) / 1e6,
        }
        for name in ("accuracy", "macro_f1"):
            row |= _with_interval(SCORES[name], run.predictions.scores[name], intervals[name][kind])
        for name in ("accuracy", "macro_f1"):
            gap = runs[best].predictions.scores[name] - run.predictions.scores[name]
            row |= _with_interval(f"{SCORES[name]}: best - this", gap, gaps[name])
        rows.append(row)
    return pd.DataFrame(rows)


@torch.inference_mode()
def speed_table(
    runs: Sequence[Run], config: CompareConfig, device: torch.device, dtype: torch.dtype
) -> pd.DataFrame:
    """A row a run: the published columns, and the median, which one slow batch does not change.

    The models take turns, so that whatever else the machine does slows all alike. A run that was
    tested on several views of each clip is timed on as many.
    """
    calls: dict[str, Callable[[], Any]] = {}
    for number, run in enumerate(runs):
        model = prepare_for_inference(run.model, device, dtype)
        frames, size = run.config["n_frames"], run.config["image_size"]
        channels = getattr(run.model, "channels", 3)
        batch = random_clips(config.batch_size * run.views, frames, size, device, channels)
        calls[f"{number}"] = partial(model, batch)
    times = interleave(calls, config.repeats, device, config.warmup)
    rows = [
        {
            **published_speed(seconds, config.batch_size),
            "Median (ms/clip)": float(np.median(seconds)) / config.batch_size * 1000,
            "Views": run.views,
            "Frames": run.config["n_frames"],
            "Size (px)": run.config["image_size"],
        }
        for run, seconds in zip(runs, times.values(), strict=True)
    ]
    return pd.DataFrame(rows)


def pareto_front(latency: Sequence[float], score: Sequence[float]) -> list[int]:
    """The places of the models that no other beats, the fastest first.

    One is beaten by another that is as fast and as good at least, and better in one of the two.
    """
    points = list(zip(latency, score, strict=True))
    best = [
        n
        for n, (time, value) in enumerate(points)
        if not any(t <= time and v >= value and (t, v) != (time, value) for t, v in points)
    ]
    return sorted(best, key=lambda n: points[n][0])


def to_text(table: pd.DataFrame, runs: Sequence[Run], best: int, config: CompareConfig) -> str:
    """The table for people, as Markdown: what it was made on, the table, how to read it."""
    device = choose_device(config.device)
    precision = str(choose_precision(config.amp, device)).removeprefix("torch.")
    facts = conditions(device)
    hardware = facts.pop("device")
    patients = known_patients(runs)
    known = len({patient for patient in patients if patient is not None})
    header = f"{len(runs)} runs on the same {len(patients)} clips of "
    header += f"{known} patient{'s' * (known != 1)}" if known else "unknown patients"
    if config.speed:
        shapes = [_shape(run) for run in runs]
        named = [f"{run.label}: {shape}" for run, shape in zip(runs, shapes, strict=True)]
        header += (
            f"; speed of batches of {config.batch_size} clips of "
            f"{shapes[0] if len(set(shapes)) == 1 else ', '.join(named)}, {precision}, "
            f"on {hardware}, {config.repeats} rounds in turn"
        )
    records = table.to_dict(orient="records")
    shown = pd.DataFrame([_shown(row, n == best) for n, row in enumerate(records)])
    lines = [*_reading(table, best, config), *_about_patients(patients), *_about_runs(runs)]
    return f"{header}.\n\n{to_markdown(shown, facts)}\n" + "".join(f"- {x}\n" for x in lines)


def _shown(row: dict[str, Any], best: bool) -> dict[str, str]:
    """A row of the table as people read it."""
    cells = {"Model": row["Model"], "Params (M)": f"{row['Params (M)']:.2f}"}
    for name in ("Accuracy", "Macro F1"):
        cells[name] = _with_range(row, name, "")
    if "Latency (ms/clip)" in row:
        mean, spread = row["Mean Batch Time (s)"], row["+- std (s)"]
        cells["Mean Batch Time (s)"] = f"{mean:.4f} +- {spread:.4f}"
        for name in ("Latency (ms/clip)", "Median (ms/clip)"):
            cells[name] = f"{row[name]:.2f}"
    for name in ("Accuracy: best - this", "Macro F1: best - this"):
        cells[name] = "best" if best else _with_range(row, name, "+")
    return cells


def _with_range(row: dict[str, Any], name: str, sign: str) -> str:
    low, high = row[f"{name} low"], row[f"{name} high"]
    between = "-" if np.isnan(low) else f"{low:{sign}.3f} to {high:{sign}.3f}"
    return f"{row[name]:{sign}.3f} ({between})"


def _reading(table: pd.DataFrame, best: int, config: CompareConfig) -> list[str]:
    """How to read the columns, a line each."""
    others = len(table) - 1
    lines = [
        f"Best: {table['Model'][best]}, by {SCORES[config.by]}. Where `best - this` is above zero, "
        "the best is ahead; where its interval (95 %, in pairs) holds zero, that may be chance.",
        f"Each of the {2 * others} intervals of a difference is for that difference by itself: of "
        "many, some leave out zero by chance, and the best was chosen on these same clips.",
    ]
    if config.speed:
        front = pareto_front(table["Median (ms/clip)"], table[SCORES[config.by]])
        lines += [
            f"Latency (ms/clip) is the mean batch time / {config.batch_size}: throughput at batch "
            f"{config.batch_size}, not what one clip waits (benchmark_latency.py has that).",
            f"Pareto front, {SCORES[config.by]} against median ms/clip: "
            f"{', '.join(table['Model'][front])}.",
        ]
        if (table["+- std (s)"] > UNSTEADY * table["Mean Batch Time (s)"]).any():
            lines.append(
                f"UNSTEADY: batch times vary by more than {UNSTEADY:.0%}: the machine was busy "
                "otherwise. Measure again when it is not, or with more --repeats."
            )
    return lines


def _about_patients(patients: np.ndarray) -> list[str]:
    """What is to be said of the intervals, by how many patients `(N,)` are known."""
    unknown = sum(patient is None for patient in patients)
    if unknown == len(patients):
        return ["No patient is known: the intervals treat clips as independent and are too narrow."]
    if not unknown and len(set(patients)) == 1:
        return ["One patient does not tell how patients differ: there are no intervals."]
    if unknown:
        return [f"{unknown} clips of unknown patients count as a patient each."]
    return []


def _about_runs(runs: Sequence[Run]) -> list[str]:
    """What sets a run apart from a plain test of one model, a line each."""
    lines = []
    for run in runs:
        if run.folds > 1:
            lines.append(
                f"{run.label}: scores of {run.folds} models, each on the clips that it was not "
                "trained on; parameters and speed are those of fold 1's."
            )
        if run.views > 1:
            lines.append(f"{run.label}: {run.views} looks at each clip, all of them timed.")
        if run.facts.get("shuffle_frames"):
            lines.append(f"{run.label}: was tested on shuffled frames.")
        if adjust := run.facts.get("adjust"):
            lines.append(f"{run.label}: was tested with logits adjusted by --adjust {adjust:g}.")
        if run.facts.get("warnings"):
            lines.append(f"{run.label}: was tested with warnings, see its test_metrics.json.")
    return lines


def _shape(run: Run) -> str:
    return f"{run.config['n_frames']} frames of {run.config['image_size']} px"


def _with_interval(name: str, value: float, interval: list[float] | None) -> dict[str, float]:
    low, high = interval or (np.nan, np.nan)
    return {name: value, f"{name} low": low, f"{name} high": high}


def draw(table: pd.DataFrame, config: CompareConfig, path: Path) -> None:
    """The picture of score against speed."""
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


@script
def main() -> None:
    config = tyro.cli(CompareConfig, description=__doc__)
    if config.batch_size < 1 or config.repeats < 1 or config.warmup < 0:
        raise UserError("batch_size and repeats must be at least 1, warmup at least 0")
    device = choose_device(config.device)
    runs = read_runs(config.runs)
    best = max(range(len(runs)), key=lambda n: runs[n].predictions.scores[config.by])
    table = score_table(runs, best)
    if config.speed:
        speed = speed_table(runs, config, device, choose_precision(config.amp, device))
        table = pd.concat([table, speed], axis=1)
    text = to_text(table, runs, best, config)
    folder = Path(config.output)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "comparison.csv", table.to_csv(index=False))
    write_text(folder / "comparison.md", text)
    picture = folder / "accuracy_latency.png"
    picture.unlink(missing_ok=True)  # an earlier one fits this table no longer
    if config.speed:
        draw(table, config, picture)
    print(f"{text}\nsaved in {folder}")


if __name__ == "__main__":
    main()
