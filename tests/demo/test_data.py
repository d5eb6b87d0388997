"""The demo data: SLAM's layout, no incomplete folders, and actions that only motion tells apart."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path

import av
import numpy as np
import pytest
from helpers import ROOT, run_script

from clips.manifest import CLASSES, read_manifest
from demo import data as demo_data
from demo.data import CLIPS_PER_PATIENT, MARKER, PATIENTS, Clip, plan_clips, render, render_demo
from demo.figures import draw_filmstrip
from utils.errors import UserError
from utils.files import unfinished_path

ONE_EACH = dict.fromkeys(CLASSES, 1)
TINY = {"patients": {"train": 1, "val": 1, "test": 1}, "clips_per_patient": ONE_EACH}
# The smallest data set there is, for tests of folders: two clips of one patient.
TWO_CLIPS = {
    "patients": {"train": 1},
    "clips_per_patient": {**dict.fromkeys(CLASSES, 0), "Suction": 2},
}


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clip of each class in each split, read-only."""
    return render_demo(tmp_path_factory.mktemp("demo") / "new" / "demo", **TINY, num_workers=2)


@pytest.fixture(scope="module")
def two_clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The smallest data set, read-only."""
    return render_demo(tmp_path_factory.mktemp("two") / "demo", **TWO_CLIPS, num_workers=1)


def contents(root: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    files = (path for path in root.rglob("*") if path.is_file())
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in files}


def table(path: Path) -> list[list[str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


def test_layout_is_that_of_slam(demo: Path) -> None:
    for split in ("train", "val", "test"):
        header, *rows = table(demo / f"{split}.csv")
        assert len(header) == 3
        assert [row[0] for row in rows] == [str(number) for number in range(len(rows))]
        for _, path, label in rows:
            patient, name = path.split("/")
            assert (demo / "clips" / path).is_file()
            clip, p, video, action_number, action, part = name.removesuffix(".mp4").split("_")
            assert (clip, p) == ("Clip", f"P{patient}")
            assert patient.isdecimal() and len(patient) == 3
            assert video[0] == "V" and action_number[0] == "C" and part.startswith("part")
            if label == "Needle":
                assert action in ("NeedleIn", "NeedleOut")
            else:
                assert action == label
    listed = {row[1] for split in TINY["patients"] for row in table(demo / f"{split}.csv")[1:]}
    on_disk = {path.relative_to(demo / "clips").as_posix() for path in demo.rglob("*.mp4")}
    assert listed == on_disk


def test_splits_share_no_patient_and_hold_all_classes(demo: Path) -> None:
    splits = {split: read_manifest(demo / f"{split}.csv") for split in TINY["patients"]}
    patients = {split: {row.patient for row in rows} for split, rows in splits.items()}
    assert len(set.union(*patients.values())) == sum(map(len, patients.values()))
    for rows in splits.values():
        assert {row.label for row in rows} == set(range(len(CLASSES)))


def test_the_whole_data_set_is_as_large_and_unequal_as_it_says() -> None:
    clips = list(plan_clips(PATIENTS, CLIPS_PER_PATIENT))
    assert len({clip.path for clip in clips}) == len(clips)
    sizes = Counter(clip.split for clip in clips)
    for split, (low, high) in {"train": (300, 450), "val": (60, 120), "test": (140, 220)}.items():
        assert low <= sizes[split] <= high
    for split in PATIENTS:
        counts = Counter(clip.action for clip in clips if clip.split == split)
        assert set(counts) == set(CLASSES)
        assert max(counts.values()) >= 2.5 * min(counts.values())
    homes = {(clip.patient, clip.split) for clip in clips}
    assert len(homes) == len({patient for patient, _ in homes}) == sum(PATIENTS.values())


def test_clips_have_30_frames_and_show_what_was_drawn(demo: Path) -> None:
    path = next((demo / "clips").rglob("*_Suction_*.mp4"))
    name = path.relative_to(demo / "clips").as_posix()
    drawn = next(clip for clip in plan_clips(**TINY) if clip.path == name)
    frames = render(drawn)
    assert frames.shape == (30, 96, 128, 3) and frames.dtype == np.uint8
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert (stream.average_rate, stream.codec_context.name) == (25, "h264")
        read = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(stream)])
    assert read.shape == frames.shape
    assert np.abs(read.astype(int) - frames).mean() < 6  # not scrambled, not shifted by a frame


def test_workers_import_neither_the_script_nor_torch(tmp_path: Path) -> None:
    """train.py imports torch, and a worker would import train.py again."""
    (tmp_path / "torch.py").write_text(
        "import multiprocessing\nassert not multiprocessing.parent_process(), 'torch in a worker'\n"
    )
    (tmp_path / "script.py").write_text(
        "import torch\n"
        "from demo import data\n"
        "data.render = lambda *_: exit('the script was imported')\n"
        "if __name__ == '__main__':\n"
        f"    data.render_demo('demo', **{TWO_CLIPS}, num_workers=1)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "script.py"], cwd=tmp_path, env=environment, check=True)
    assert len(list(tmp_path.rglob("*.mp4"))) == 2
    code = (
        "import sys, demo.data\n"
        "heavy = {'torch', 'torchvision', 'pandas', 'matplotlib', 'PIL', 'tyro', 'tqdm'}\n"
        "assert not heavy & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_the_module_is_a_script(tmp_path: Path, monkeypatch) -> None:
    marker = {"version": 2, "seed": 0, "patients": PATIENTS}
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / MARKER).write_text(
        json.dumps({**marker, "clips_per_patient": CLIPS_PER_PATIENT})
    )
    done = run_script("demo.data", "demo", cwd=tmp_path)  # complete already
    assert done.stdout.strip() == str(tmp_path / "demo")


def test_a_killed_worker_is_one_line(tmp_path: Path, monkeypatch) -> None:
    # A function of this file would make the worker import it, and torch with it.
    monkeypatch.setattr(demo_data, "_start_worker", partial(os._exit, 1))
    with pytest.raises(UserError, match="a process was killed"):
        render_demo(tmp_path / "demo", **TWO_CLIPS, num_workers=1)
    assert not any(tmp_path.iterdir())


def test_same_seed_same_frames_and_bytes(two_clips: Path, tmp_path) -> None:
    again = render_demo(tmp_path / "again", **TWO_CLIPS, num_workers=2)
    assert contents(again) == contents(two_clips)
    clip = next(plan_clips(**TINY))
    assert np.array_equal(render(clip, 3), render(clip, 3))
    assert not np.array_equal(render(clip, 3), render(clip, 4))


def test_finished_is_reused_and_other_settings_are_rendered_anew(two_clips: Path, tmp_path) -> None:
    root = shutil.copytree(two_clips, tmp_path / "demo")
    times = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    render_demo(root, **TWO_CLIPS)
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == times
    before = contents(root)
    render_demo(root, **TWO_CLIPS, seed=1, num_workers=1)
    after = contents(root)
    assert before.keys() == after.keys()
    assert all(before[name] != after[name] for name in before if name.endswith(".mp4"))
    assert [path.name for path in tmp_path.iterdir()] == ["demo"]


@pytest.mark.parametrize("marker", [None, "", "[1]", '{"version": 1}'])
def test_a_folder_that_is_not_ours_is_left_alone(tmp_path, marker: str | None) -> None:
    root = tmp_path / "demo"
    root.mkdir()
    (root / "thesis.txt").write_text("years of work")
    if marker is not None:
        (root / MARKER).write_text(marker)
    before = contents(root)
    with pytest.raises(UserError, match="move it away"):
        render_demo(root, **TWO_CLIPS)
    assert contents(root) == before


def test_a_file_in_the_way_is_left_alone(tmp_path) -> None:
    (tmp_path / "demo").write_text("years of work")
    with pytest.raises(UserError, match="move it away"):
        render_demo(tmp_path / "demo", **TWO_CLIPS)


def test_an_empty_folder_and_an_odd_name_are_fine(tmp_path) -> None:
    root = tmp_path / "demo [1] 腹腔鏡.x"
    root.mkdir()
    render_demo(root, **TWO_CLIPS, num_workers=1)
    assert len(list(root.rglob("*.mp4"))) == 2


def alive(process: int) -> bool:
    """Whether a process still runs; a zombie does not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks up processes in /proc")
def test_a_killed_rendering_leaves_nothing_that_looks_finished(tmp_path) -> None:
    root = tmp_path / "demo"
    code = f"from demo.data import render_demo; render_demo({str(root)!r}, num_workers=2)"
    process = subprocess.Popen(
        [sys.executable, "-c", f"if __name__ == '__main__': {code}"],
        cwd=ROOT,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    try:
        deadline = time.monotonic() + 60
        while len(list(tmp_path.rglob("*.mp4"))) < 3:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not root.exists()
    assert any(tmp_path.iterdir())  # the leftover, hidden
    while any(alive(int(child)) for child in children):  # workers exit with their parent
        assert time.monotonic() < deadline
        time.sleep(0.05)
    # Another process that is rendering now must not lose its folder to the cleaning.
    busy = unfinished_path(tmp_path / "demo", os.getppid())
    busy.mkdir()
    render_demo(root, **TWO_CLIPS, num_workers=1)
    assert {path.name for path in tmp_path.iterdir()} == {"demo", busy.name}
    assert json.loads((root / MARKER).read_text())["patients"] == TWO_CLIPS["patients"]


def test_of_two_renderings_at_once_the_first_to_finish_stays(tmp_path, monkeypatch) -> None:
    root, render_all = tmp_path / "demo", demo_data._render_all

    def overtaken(*arguments) -> None:
        monkeypatch.undo()
        monkeypatch.setattr(os, "getpid", os.getppid)
        render_demo(root, **TWO_CLIPS, num_workers=1)  # another process, which is faster
        (root / "theirs").touch()
        render_all(*arguments)

    monkeypatch.setattr(demo_data, "_render_all", overtaken)
    render_demo(root, **TWO_CLIPS, num_workers=1)
    assert (root / "theirs").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["demo"]


# What moves. Everything is measured on pixels, over several patients.


def clips_of(action: str, count: int = 4) -> list[np.ndarray]:
    return [render(Clip("train", 3 + 5 * i, 1, 1 + i, 1, action)) for i in range(count)]


def expansion(frames: np.ndarray) -> float:
    """Mean rate at which the image grows, 1/frame: least squares of -dI/dt = e (x Ix + y Iy)."""
    grey = frames.mean(axis=3)
    height, width = grey.shape[1:]
    dt = np.diff(grey, axis=0)
    _, dy, dx = np.gradient((grey[1:] + grey[:-1]) / 2)
    y, x = np.mgrid[0:height, 0:width]
    radial = (x - width / 2) * dx + (y - height / 2) * dy
    return float(-(dt * radial).sum() / (radial**2).sum())


def sinking(frames: np.ndarray) -> float:
    """Mean downward motion of red-green edges in the lower two thirds, pixels per frame."""
    contrast = frames[..., 1] - 0.4 * frames[..., 0]  # blood has far less green than tissue
    dt = np.diff(contrast, axis=0)[:, 30:92, 30:98]
    _, dy, _ = np.gradient((contrast[1:] + contrast[:-1]) / 2)
    dy = dy[:, 30:92, 30:98]
    return float(-(dt * dy).sum() / (dy**2).sum())


def test_entry_expands_and_panoview_backwards_is_an_entry() -> None:
    entries = [expansion(frames) for frames in clips_of("AbdominalEntry")]
    views = [expansion(frames) for frames in clips_of("PanoView")]
    assert min(entries) > 0.002 and max(views) < -0.002
    backwards = [expansion(frames[::-1]) for frames in clips_of("AbdominalEntry")]
    assert max(backwards) < -0.002  # an entry played backwards is a PanoView
    others = [expansion(clip) for name in ("LocPanoView", "Suction") for clip in clips_of(name)]
    assert max(map(abs, others)) < min(*entries, *(-view for view in views))


def test_blood_sinks_in_suction_only() -> None:
    suction = [sinking(frames) for frames in clips_of("Suction")]
    assert min(suction) > 0 and np.mean(suction) > 0.08
    assert np.mean([sinking(frames[::-1]) for frames in clips_of("Suction")]) < -0.08
    for action in ("UseClipper", "HookCut"):
        assert np.mean([sinking(frames) for frames in clips_of(action)]) < 0.02


def test_tissue_moves_in_locpanoview_and_rests_in_suction() -> None:
    def change(frames: np.ndarray) -> float:
        upper = frames[:, 20:40, 30:98].astype(float)  # above the blood
        return np.abs(np.diff(upper, axis=0)).mean()

    moving = min(map(change, clips_of("LocPanoView")))
    assert moving > 1.2 * max(map(change, clips_of("Suction")))


def test_filmstrip_is_an_image(tmp_path) -> None:
    draw_filmstrip(tmp_path / "strip.png", columns=2)
    assert (tmp_path / "strip.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert [path.name for path in tmp_path.iterdir()] == ["strip.png"]
