"""The embedded demo data: seven rendered actions laid out exactly like SLAM.

    python -m demo.data data/demo          render the data set (train.py does it by itself)

`clips/<patient>/Clip_P###_V###_C#_<Action>_part#.mp4`, 30 frames at 25 fps, and train.csv, val.csv
and test.csv with SLAM's columns (index, path below clips/, label). No patient is in two splits, and
the classes are unequally frequent, as in life.
"""

import csv
import glob
import json
import os
import shutil
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from pathlib import Path

import numpy as np
import tyro
from tqdm import tqdm

from clips.manifest import CLASSES
from demo.scene import make_patient, render_clip
from utils.cli import script
from utils.errors import UserError
from video.encoder import write_video

VERSION = 2  # raise it when the pictures change: older renderings are then made anew

MARKER = "demo.json"  # says that a folder is ours, and complete

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
    """One clip to render; the numbers seed it."""

    split: str
    patient: int
    video: int
    action_number: int
    part: int
    action: str

    @property
    def path(self) -> str:
        """Below clips/, as in SLAM."""
        name = self.action
        if name == "Suturing":
            name = ("NeedleIn", "NeedleOut")[self.action_number % 2]
        return (
            f"{self.patient:03d}/Clip_P{self.patient:03d}_V{self.video:03d}"
            f"_C{self.action_number}_{name}_part{self.part}.mp4"
        )


def render_demo(
    root: Path,
    patients: dict[str, int] | None = None,
    clips_per_patient: dict[str, int] | None = None,
    seed: int = 0,
    workers: int | None = None,
) -> Path:
    """Render the demo data into `root`, unless it is there already. Returns `root`.

    The clips are made in a hidden folder beside `root`, which gets its name when it is complete:
    whatever interrupts the rendering, a `root` that exists is whole. Processes that render the same
    `root` at the same time do so twice, and the first one's folder stays.

    Args:
        patients: number of patients in train, val and test.
        clips_per_patient: number of clips of each class for each patient.
        workers: processes that render (None: one a core, at most 8).

    Raises:
        UserError: `root` holds something else; it is left as it is.
    """
    root = Path(root).resolve()  # "." has no name to put a hidden folder beside, a link no room
    recipe = {
        "version": VERSION,
        "seed": seed,
        "patients": patients or PATIENTS,
        "clips_per_patient": clips_per_patient or CLIPS_PER_PATIENT,
    }
    if _recipe_of(root) == recipe:
        return root
    _refuse_foreign(root)
    clips = list(plan_clips(recipe["patients"], recipe["clips_per_patient"]))
    _remove_leftovers(root)
    unfinished = _hidden(root, os.getpid())
    try:
        _render_all(clips, unfinished / "clips", seed, workers)
        for split in recipe["patients"]:
            _write_csv(unfinished / f"{split}.csv", [c for c in clips if c.split == split])
        (unfinished / MARKER).write_text(json.dumps(recipe))
        _replace(root, unfinished, recipe)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return root


def plan_clips(patients: dict[str, int], clips_per_patient: dict[str, int]) -> Iterator[Clip]:
    """All clips of the data set. A source action gives two parts, as SLAM's give several."""
    number = 0
    for split, count in patients.items():
        for _ in range(count):
            number += 7  # SLAM's patients are not numbered in a row either
            action_number = 0
            for action in CLASSES:
                for i in range(clips_per_patient[action]):
                    action_number += i % 2 == 0
                    yield Clip(
                        split, number, 1 + action_number % 2, action_number, 1 + i % 2, action
                    )


def render(clip: Clip, seed: int = 0) -> np.ndarray:
    """The frames of a clip, `(30, 96, 128, 3)` uint8; the same on every call."""

    def rng(*numbers: int) -> np.random.Generator:
        return np.random.default_rng([seed, clip.patient, *numbers])

    patient = make_patient(rng())
    scene = rng(clip.action_number)
    return render_clip(clip.action, patient, scene, rng(clip.action_number, clip.part))


def _recipe_of(root: Path) -> dict | None:
    """What the demo data in a folder was made from; None where there is none of ours."""
    try:
        recipe = json.loads((root / MARKER).read_text())
    except (OSError, ValueError):
        return None
    # Somebody else's demo.json must not make their folder ours to replace.
    ours = isinstance(recipe, dict) and {"version", "seed", "clips_per_patient"} <= recipe.keys()
    return recipe if ours else None


def _refuse_foreign(root: Path) -> None:
    if not root.exists() or _recipe_of(root) is not None:
        return
    if not root.is_dir() or any(root.iterdir()):
        raise UserError(f"{root} is to hold the demo data but holds something else: move it away")


def _hidden(root: Path, process: int | str) -> Path:
    return root.with_name(f".{root.name}.{process}.unfinished")


def _remove_leftovers(root: Path) -> None:
    """Delete what renderings that were killed left beside `root`, but not one that goes on."""
    for leftover in root.parent.glob(_hidden(Path(glob.escape(str(root))), "*").name):
        process = leftover.name.split(".")[-2]
        if not (process.isdecimal() and _alive(int(process))):
            shutil.rmtree(leftover, ignore_errors=True)


def _alive(process: int) -> bool:
    if process == os.getpid():
        return False  # an earlier process of the same number: this one has just begun
    if os.name != "posix":
        return True  # os.kill would end it there; better a leftover too many
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # there, but another user's
        return True
    return True


def _replace(root: Path, finished: Path, recipe: dict) -> None:
    """Give the finished folder its name, unless another process was faster."""
    if _recipe_of(root) == recipe:
        return
    _refuse_foreign(root)
    if root.exists():  # ours, of another recipe, or empty
        # Renamed first: a folder half deleted would still have the marker of a whole one.
        old = _hidden(root, f"old.{os.getpid()}")
        os.replace(root, old)
        shutil.rmtree(old)
    os.replace(finished, root)


def _render_one(clip: Clip, folder: Path, seed: int) -> None:
    path = folder / clip.path
    path.parent.mkdir(parents=True, exist_ok=True)
    write_video(path, render(clip, seed))


def _render_all(clips: Sequence[Clip], folder: Path, seed: int, workers: int | None) -> None:
    workers = workers or min(os.cpu_count() or 1, 8)
    # Fresh processes: a fork would copy whatever threads the caller has started.
    spawn = get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=spawn, initializer=_end_with_parent) as pool:
        jobs = [pool.submit(_render_one, clip, folder, seed) for clip in clips]
        try:
            for job in tqdm(jobs, "rendering demo clips", unit="clip", leave=False):
                job.result()
        finally:  # after an error, a full disk say, the clips still waiting are not worth it
            pool.shutdown(cancel_futures=True)


def _end_with_parent() -> None:
    """In a worker: stop when the main process is killed, instead of waiting for it for ever."""

    def watch() -> None:
        parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _write_csv(path: Path, clips: Sequence[Clip]) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["", "path", "label"])
        for number, clip in enumerate(clips):
            writer.writerow([number, clip.path, _LABEL.get(clip.action, clip.action)])


@dataclass
class DemoConfig:
    """Where the demo data goes."""

    root: tyro.conf.Positional[Path] = Path("data/demo")
    """folder of the demo data"""


@script
def main() -> None:
    config = tyro.cli(DemoConfig, description=__doc__)
    print(render_demo(config.root))


if __name__ == "__main__":
    main()
