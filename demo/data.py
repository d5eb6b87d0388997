"""The demo data: rendered clips of seven actions, in the layout of the SLAM data set.

    python -m demo.data data/demo          render the demo data (train.py does it when it is needed)

`clips/<patient>/Clip_P###_V###_C#_<Action>_part#.mp4` are clips of 30 frames at 25 frames per
second; train.csv, val.csv and test.csv have SLAM's columns (index, path below clips/, label). No
patient is in two splits, and the classes have unequal numbers of clips, as in real data.
"""

import functools
import itertools
import json
import os
import shutil
import signal
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from types import ModuleType

import numpy as np

from clips.manifest import CLASSES
from demo.scene import Patient, make_patient, make_tissue, render_clip
from utils.allocator import keep_freed_memory
from utils.errors import UserError
from utils.files import read_json, remove_unfinished, unfinished_path, write_text
from utils.tables import write_csv
from utils.workers import exit_with_parent
from video.encoder import write_video

VERSION = 2  # raise it when the pixels change: older renderings are then replaced

MARKER = "demo.json"  # the file that a folder of demo data holds when it is complete

PATIENTS = {"train": 12, "val": 4, "test": 6}

CLIPS_PER_PATIENT = {
    "AbdominalEntry": 3,
    "UseClipper": 6,
    "HookCut": 5,
    "Suturing": 4,
    "PanoView": 2,
    "LocPanoView": 3,
    "Suction": 5,
}

# SLAM calls this class Needle in its tables, NeedleIn and NeedleOut in its file names.
_LABEL = {"Suturing": "Needle"}


@dataclass(frozen=True)
class Clip:
    """One clip to render; its numbers determine its random seed."""

    split: str
    patient: int
    video: int
    action_number: int
    part: int
    action: str

    @property
    def path(self) -> str:
        """The path below clips/, as in SLAM."""
        name = self.action
        if name == "Suturing":
            name = ("NeedleIn", "NeedleOut")[self.action_number % 2]
        return (
            f"{self.patient:03d}/Clip_P{self.patient:03d}_V{self.video:03d}"
            f"_C{self.action_number}_{name}_part{self.part}.mp4"
        )

    def render(self, seed: int) -> np.ndarray:
        """The frames, `(T, 96, 128, 3)` uint8; the same on every call."""
        return render(self, seed)


def render_demo(
    root: Path,
    patients: dict[str, int] | None = None,
    clips_per_patient: dict[str, int] | None = None,
    seed: int = 0,
    num_workers: int | None = None,
) -> Path:
    """Render the demo data into `root`, unless it is there already. Returns the absolute path.

    Args:
        patients: number of patients in train, val and test.
        clips_per_patient: number of clips of each class per patient.
        num_workers: number of processes that render (None: one per core, at most 8).

    Raises:
        UserError: see `render_folder`.
    """
    settings = {
        "version": VERSION,
        "seed": seed,
        "patients": patients or PATIENTS,
        "clips_per_patient": clips_per_patient or CLIPS_PER_PATIENT,
    }
    clips = list(plan_clips(settings["patients"], settings["clips_per_patient"]))
    return render_folder(root, MARKER, settings, clips, {}, num_workers)


def render_folder(
    root: Path,
    marker: str,
    settings: dict,
    clips: Sequence[Clip],
    tables: dict[str, Sequence[Sequence]],
    num_workers: int | None,
) -> Path:
    """Render clips into `root` and write their manifests, unless it is there already.

    The clips are written to a hidden folder beside `root`, which is renamed to `root` when it is
    complete: whatever interrupts the rendering, a `root` that exists is complete. If several
    processes render the same `root` at the same time, each does all of the work, and the folder of
    the first one stays.

    Args:
        marker: name of the file that holds `settings` when the folder is complete. A folder with
            this file and other settings is replaced.
        settings: what the clips depend on: `version`, `seed`, `patients` per split, and more.
        clips: the parts of a source action follow one another.
        tables: the rows of further CSV files by their names.
        num_workers: number of processes that render (None: one per core, at most 8).

    Returns:
        The absolute path.

    Raises:
        UserError: `root` holds something else, which is left as it is; or a process was killed.
    """
    root = Path(root).resolve()  # "." has no name, and beside a link there may be no space
    if _read_settings(root / marker) == settings:
        return root
    _refuse_foreign(root, marker)
    remove_unfinished(root.parent)
    unfinished = unfinished_path(root)
    try:
        _render_all(clips, unfinished / "clips", settings["seed"], num_workers)
        for split in settings["patients"]:
            _write_csv(unfinished / f"{split}.csv", [c for c in clips if c.split == split])
        for name, rows in tables.items():
            write_csv(unfinished / name, rows)
        write_text(unfinished / marker, json.dumps(settings))
        _replace(root, unfinished, marker, settings)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return root


def plan_clips(patients: dict[str, int], clips_per_patient: dict[str, int]) -> Iterator[Clip]:
    """All clips of the data set. Most source actions give two parts; SLAM's give several."""
    number = 0
    for split, count in patients.items():
        for _ in range(count):
            number += 7  # as in SLAM, the patients are not numbered 1, 2, 3
            action_number = 0
            for action in CLASSES:
                for i in range(clips_per_patient[action]):
                    action_number += i % 2 == 0
                    yield Clip(
                        split, number, 1 + action_number % 2, action_number, 1 + i % 2, action
                    )


def render(clip: Clip, seed: int = 0) -> np.ndarray:
    """The frames of a clip, `(30, 96, 128, 3)` uint8; the same on every call."""

    patient, tissue = _patient_and_tissue(seed, clip.patient, clip.action_number)
    rng = np.random.default_rng([seed, clip.patient, clip.action_number, clip.part])
    return render_clip(clip.action, patient, tissue, rng)


@functools.lru_cache(maxsize=1)  # the parts of a source action are rendered one after the other
def _patient_and_tissue(
    seed: int, patient_number: int, action_number: int
) -> tuple[Patient, np.ndarray]:
    patient = make_patient(np.random.default_rng([seed, patient_number]))
    rng = np.random.default_rng([seed, patient_number, action_number])
    return patient, make_tissue(patient, rng)


def _read_settings(marker: Path) -> dict | None:
    """The settings that the demo data beside a marker was rendered with; None if there is none."""
    try:
        # A folder with the demo.json of another program must not be replaced.
        return read_json(marker, {"version": int, "seed": int, "patients": dict}) or None
    except (OSError, UserError):
        return None


def _refuse_foreign(root: Path, marker: str) -> None:
    if not root.exists() or _read_settings(root / marker) is not None:
        return
    if not root.is_dir() or any(root.iterdir()):
        raise UserError(
            f"{root}: the demo data is to be rendered there, but it holds something else: move it "
            "away"
        )


def _replace(root: Path, finished: Path, marker: str, settings: dict) -> None:
    """Rename the finished folder to `root`, unless another process was faster."""
    if _read_settings(root / marker) == settings:
        return
    _refuse_foreign(root, marker)
    if root.exists():  # demo data of other settings, or an empty folder
        # It is renamed first: a folder that is half deleted would still hold the marker.
        old = unfinished_path(root.with_name(f"{root.name}.old"))
        os.replace(root, old)
        shutil.rmtree(old)
    os.replace(finished, root)


def _render_all(clips: Sequence[Clip], folder: Path, seed: int, num_workers: int | None) -> None:
    from tqdm import tqdm  # not above: the worker processes import numpy and av alone

    num_workers = num_workers or min(os.cpu_count() or 1, 8)
    groups = itertools.groupby(clips, lambda clip: (clip.patient, clip.action_number))
    # Processes are spawned: a fork would copy the locks of the threads that the caller has started.
    pool = ProcessPoolExecutor(num_workers, get_context("spawn"), _start_worker)
    try:
        with _hidden_main():
            jobs = [pool.submit(_render_files, list(group), folder, seed) for _, group in groups]
        with tqdm(total=len(clips), desc="rendering demo clips", unit="clip", leave=False) as bar:
            for job in as_completed(jobs):
                bar.update(job.result())
    except BrokenProcessPool:
        raise UserError(
            "rendering the demo data: a process was killed, probably because memory ran out: free "
            "some memory and start again"
        ) from None
    finally:  # after an error, such as a full disk, the other clips are not needed
        pool.shutdown(cancel_futures=True)


def _render_files(clips: Sequence[Clip], folder: Path, seed: int) -> int:
    """Render clips into files, in a worker process. Returns the number of clips."""
    for clip in clips:
        path = folder / clip.path
        path.parent.mkdir(parents=True, exist_ok=True)
        write_video(path, clip.render(seed))
    return len(clips)


@contextmanager
def _hidden_main() -> Iterator[None]:
    """Hide the main script from the processes that are spawned meanwhile.

    A spawned process imports the main script again, and with train.py it would import PyTorch,
    which takes longer than rendering 50 clips.
    """
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process handles Ctrl-C
    keep_freed_memory()
    exit_with_parent()


def _write_csv(path: Path, clips: Sequence[Clip]) -> None:
    rows = [(n, clip.path, _LABEL.get(clip.action, clip.action)) for n, clip in enumerate(clips)]
    write_csv(path, [("", "path", "label"), *rows])


def main() -> None:
    import tyro

    # Not the function above: worker processes look functions up in `demo.data`, not in `__main__`.
    from demo.data import render_demo
    from utils.cli import cli_main

    def run(root: tyro.conf.Positional[Path] = Path("data/demo")) -> None:
        """Render the demo data.

        Args:
            root: folder of the demo data
        """
        print(render_demo(root))

    cli_main(lambda: tyro.cli(run, description=__doc__))()


if __name__ == "__main__":
    main()
