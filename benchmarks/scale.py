"""Measures seconds and memory of the scripts that read tables, on large synthetic tables.

    python -m benchmarks.scale                       a test of 100,000 clips, manifests of 1,000,000
    python -m benchmarks.scale --clips 5000 --rows 20000 --what report audit

Four commands, each in a process of its own:

- results: what train.py and evaluate.py do after the last clip of a test (`write_results`)
- report: `report.py RUN`, with the manifests of the training there, and with every option
- compare: `compare.py RUN RUN RUN --no-speed`
- audit: `prepare_data.py audit --no-contents` of a train.csv, a val.csv and a test.csv. Their
  clips do not exist, some patients are in two splits, and some actions have several clips.
"""

import multiprocessing
import os
import runpy
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

# What is heavy is imported where it is used: each measured process imports this module.
from clips.manifest import CLASSES, ClipRow
from utils.cli import cli_main, parse
from utils.errors import UserError
from utils.files import write_json
from utils.tables import write_csv

ROOT = Path(__file__).parents[1]

What = Literal["results", "report", "compare", "audit"]


@dataclass
class ScaleConfig:
    """How large the tables are."""

    what: tuple[What, ...] = ("results", "report", "compare", "audit")
    """commands to measure"""
    clips: int = 100_000
    """clips of the test"""
    rows: int = 1_000_000
    """rows of the three manifests together"""
    patients: int = 500
    """patients of the test; the manifests have ten times as many"""
    unknown: float = 0.01
    """fraction of the clips whose patient is not known"""
    output: str = "runs/benchmarks"
    """folder for the table"""


def make_rows(config: ScaleConfig, n: int, patients: int) -> list[ClipRow]:
    """`n` clips with names like those of SLAM, in the order of their patients."""
    rng = np.random.default_rng(0)
    numbers = np.sort(rng.integers(0, patients, n))
    labels = rng.choice(len(CLASSES), n, p=[0.3, 0.2, 0.2, 0.15, 0.1, 0.04, 0.01])
    unknown = rng.random(n) < config.unknown
    rows = []
    for i, (patient, label) in enumerate(zip(numbers.tolist(), labels.tolist(), strict=True)):
        video, action = f"P{patient}_V{i // 400}", f"P{patient}_V{i // 400}_C{i // 3}"
        path = Path(f"clips/Clip_P{patient}_V{i // 400}_C{i // 3}_{CLASSES[label]}_{i}.mp4")
        known = (None, None, None) if unknown[i] else (f"P{patient}", video, action)
        rows.append(ClipRow(path, label, *known))
    return rows


def write_run(config: ScaleConfig, folder: Path, seed: int, model: bool = True) -> None:
    """A run folder with the results of a test, a checkpoint and the settings of a training."""
    from config import TrainConfig
    from evaluation.calibration import Calibration, apply_temperature
    from evaluation.predictions import Predictions
    from evaluation.results import write_results

    rows = make_rows(config, config.clips, config.patients)
    rows = [row._replace(path=folder.parent / "data" / row.path) for row in rows]
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 1.4, (len(rows), len(CLASSES)))
    logits[np.arange(len(rows)), [row.label for row in rows]] += 3 + 0.2 * seed
    predictions = Predictions(rows, apply_temperature(np.exp(logits), 1.0))
    facts = {"checkpoint": "best.pt", "epoch": 1, "split": "test", "warnings": []}
    write_results(predictions, CLASSES, folder, [Calibration(1.2, 0.1, 0.62)], facts)
    settings = {"model_name": "vivit", "n_frames": 2, "image_size": 32, "classes": CLASSES}
    training = TrainConfig(**settings, data_root=str(folder.parent / "data"))
    write_json(folder / "config.json", vars(training))
    if model:
        from checkpoint import save_checkpoint
        from models import build_model

        weights = build_model(training, len(CLASSES)).state_dict()
        state = {"model": weights, "epoch": 1, "best": {}, "history": [], "classes": list(CLASSES)}
        save_checkpoint(folder / "best.pt", {**state, "config": vars(training)})


def write_manifests(config: ScaleConfig, n: int, patients: int, folder: Path) -> None:
    """train.csv, val.csv and test.csv; every hundredth patient is in two of them."""
    folder.mkdir(parents=True, exist_ok=True)
    tables: dict[str, list] = {name: [] for name in ("train", "val", "test")}
    for i, row in enumerate(make_rows(config, n, patients)):
        patient = int(row.path.name.split("_")[1][1:])
        split = "test" if patient % 7 == 0 else "val" if patient % 7 == 1 else "train"
        if patient % 100 == 0 and i % 2:
            split = "train"
        tables[split].append([str(row.path), CLASSES[row.label], row.patient])
    for name, rows in tables.items():
        write_csv(folder / f"{name}.csv", [["path", "label", "patient"], *rows])


def measure(function: Callable[..., Any], *arguments: Any) -> dict[str, float]:
    """Seconds of a call in a process of its own, those in which a processor worked for it, and the
    most memory of that process in MB.

    Raises:
        UserError: the call fails.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_call, args=(sender, function, arguments))
    start = time.perf_counter()
    process.start()
    sender.close()
    try:
        measured = receiver.recv()
    except EOFError:
        raise UserError(f"{arguments}: failed, see above") from None
    finally:
        process.join()
    return {"seconds": time.perf_counter() - start, **measured}


def _call(sender: Any, function: Callable[..., Any], arguments: tuple) -> None:
    function(*arguments)
    # Not ru_maxrss: it includes the memory of the process that this one was started from.
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    (line,) = (line for line in status.splitlines() if line.startswith("VmHWM"))
    times = os.times()
    busy = times.user + times.system + times.children_user + times.children_system
    sender.send({"CPU seconds": busy, "peak MB": int(line.split()[1]) / 1000})


def run_script(*arguments: str) -> None:
    """Run a script of this project as the command line does; an audit that finds leakage is
    well."""
    sys.argv = list(arguments)
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    try:
        runpy.run_path(str(ROOT / arguments[0]), run_name="__main__")
    except SystemExit as end:
        if end.code not in (None, 0, 1, 3):
            raise


def _measure_all(config: ScaleConfig, folder: Path) -> list[dict[str, Any]]:
    runs = [folder / f"run{number}" for number in range(3)]
    rows: list[dict[str, Any]] = []

    def add(command: str, size: int, unit: str, function: Callable[..., Any], *arguments: Any):
        measured = measure(function, *arguments)
        rows.append({"command": command, "table": f"{size:,} {unit}", **measured})
        print(f"{command}, {size:,} {unit}: {measured['seconds']:.1f} s", flush=True)

    if {"results", "report", "compare"} & set(config.what):
        add("write_results", config.clips, "clips", write_run, config, runs[0], 0, False)
    if "report" in config.what:
        # What the report hides are the names in all manifests of the training.
        write_manifests(config, config.clips, config.patients, folder / "data")
        add("report.py", config.clips, "clips", run_script, "report.py", str(runs[0]))
        flags = ["--with-patients", "--mistakes", "1000", "--output", str(folder / "named.html")]
        command = ["report.py", str(runs[0]), *flags]
        add("report.py --with-patients", config.clips, "clips", run_script, *command)
        for row, page in zip(
            rows[-2:], (runs[0] / "report.html", folder / "named.html"), strict=True
        ):
            row["page (MB)"] = page.stat().st_size / 1e6
    if "compare" in config.what:
        for number in range(3):
            measure(write_run, config, runs[number], number)
        output = ["--no-speed", "--output", str(folder / "comparison")]
        command = ["compare.py", *map(str, runs), *output]
        add("compare.py, 3 runs", config.clips, "clips", run_script, *command)
    if "audit" in config.what:
        write_manifests(config, config.rows, 10 * config.patients, folder / "audited")
        command = ["prepare_data.py", "audit", str(folder / "audited"), "--no-contents"]
        command += ["--output", str(folder / "audit")]
        add("prepare_data.py audit", config.rows, "rows", run_script, *command)
    return rows


@cli_main
def main() -> None:
    config = parse(ScaleConfig, __doc__)
    if min(config.clips, config.rows, config.patients) < 10:
        raise UserError("clips, rows and patients must be at least 10")
    if not Path("/proc/self/status").exists():
        raise UserError("the memory of a process is read from /proc: Linux alone has it")
    import pandas as pd

    from benchmarks.timing import environment, report
    from utils.device import get_device

    with tempfile.TemporaryDirectory() as folder:
        table = pd.DataFrame(_measure_all(config, Path(folder)))
    report("scale", table, environment(get_device("cpu"), n=1), config.output)


if __name__ == "__main__":
    main()
