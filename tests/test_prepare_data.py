"""prepare_data.py as a person runs it: cache, check, renamed flags, and its help."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pandas as pd
import pytest
from helpers import ROOT, TINY_FLAGS, link, make_clip, run_script, touch

from clips.build_cache import CacheConfig, fill_cache
from config import TrainConfig
from evaluate import main as evaluate_main
from prepare_data import CheckConfig, check, main
from train import main as train_main
from train import train
from utils.errors import UserError
from video.clip_reader import check_clip, read_clip
from video.container import ClipError
from video.decoder import check_video
from video.encoder import write_video

SIZES = ("--n-frames", 4, "--image-size", 32)


@pytest.fixture
def data(tiny_data: Path, tmp_path: Path) -> Path:
    """A copy of the tiny data that may be changed."""
    subprocess.run(["cp", "-r", str(tiny_data), str(tmp_path / "data")], check=True)
    return tmp_path / "data"


CACHE = ("cache", "data", "--output", "cached", *SIZES)


@pytest.fixture
def cache(run_main: Callable, tmp_path: Path) -> Callable[..., str]:
    """Fill the cache, in this process: what was printed."""
    return lambda *more, code=0: run_main(main, *CACHE, *more, cwd=tmp_path, code=code).stdout


def entries(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.glob("???/*.clip")}


def settings(data: Path, folder: Path) -> dict:
    """Settings of a tiny training from the cache in `folder`."""
    paths = {"data_root": str(data), "cache": str(folder / "cached")}
    sizes = {
        "n_frames": 4,
        "image_size": 32,
        "num_workers": 0,
        "device": "cpu",
        "precision": "fp32",
    }
    classes = {"classes": ("dark", "grey", "light"), "weights": "none", "model_name": "vivit"}
    return {**paths, **sizes, **classes, "run_dir": str(folder / "runs")}


def test_every_clip_is_cached_once(data: Path, tmp_path: Path, capsys) -> None:
    def fill(**changes) -> str:
        settings = {"data_root": str(data), "output": str(tmp_path / "cached"), "num_workers": 0}
        fill_cache(CacheConfig(**{"n_frames": 4, "image_size": 32, **settings, **changes}))
        return capsys.readouterr().out

    said = fill()
    assert "36 clips, 0 of them cached already" in said
    assert "to write: 36 clips, about 0.00 GB of" in said
    before = entries(tmp_path / "cached")
    assert len(before) == 36
    assert "36 clips, 36 of them cached already" in fill()
    assert entries(tmp_path / "cached") == before
    os.utime(next((data / "clips/train").glob("*.mp4")), ns=(1, 1))
    assert "36 clips, 35 of them cached already" in fill()
    now = entries(tmp_path / "cached")
    assert sum(now[path] != before[path] for path in now) == 1
    assert "36 clips, 0 of them cached already" in fill(quality=80)


def test_training_and_evaluation_from_the_cache(data: Path, tmp_path, cache, run_main) -> None:
    cache()
    run = train(TrainConfig(**settings(data, tmp_path), epochs=1))
    tested = json.loads((run / "test_metrics.json").read_text())
    cache("--shards", 3)  # the same clips in tar files
    run_main(evaluate_main, run, cwd=tmp_path)
    again = json.loads((run / "evaluate_test/test_metrics.json").read_text())
    assert again["loss"] == pytest.approx(tested["loss"], rel=1e-6)
    run_main(evaluate_main, run, "--cache", "", "--output", "decoded", cwd=tmp_path)
    decoded = json.loads((tmp_path / "decoded/test_metrics.json").read_text())
    assert decoded["loss"] == pytest.approx(tested["loss"], rel=0.1)
    assert decoded["loss"] != tested["loss"]  # JPEG loses a little


def test_cache_that_does_not_fit_is_told_before_training(data: Path, tmp_path, cache) -> None:
    def refused(match: str, **changes) -> None:
        with pytest.raises(UserError, match=match):
            train(TrainConfig(**{**settings(data, tmp_path), **changes}))
        assert not (tmp_path / "runs").exists()

    refused("cached: holds no cache .make one: python prepare_data.py cache")
    cache("--manifests", "train.csv")
    refused("cached: 18 not in the cache")
    cache()
    os.utime(next((data / "clips/val").glob("*.mp4")), ns=(1, 1))
    refused("cached: 1 changed since it was cached")
    refused("cached for image_size 32, not 48: give --image-size 32", image_size=48)
    refused("none: holds no cache", cache="none")


def test_unreadable_clips_are_listed_and_left_to_training(
    data: Path, tmp_path: Path, cache, run_main
) -> None:
    broken = next((data / "clips/train").glob("*.mp4"))
    broken.write_bytes(b"no video")
    said = cache(code=1)
    assert "done: cached holds 35 of 36 clips\n1 clips cannot be read:" in said
    assert f"{broken.relative_to(tmp_path)}: cannot be read" in said
    arguments = (
        "--data-root",
        data,
        "--cache",
        "cached",
        *TINY_FLAGS,
        "--epochs",
        1,
        "--sampler-tau",
        0,
    )
    said = run_main(train_main, *arguments, cwd=tmp_path).stdout
    assert "1 training clips that were drawn could not be read and were left out" in said
    shutil.copy(next((data / "clips/test").glob("*.mp4")), broken)
    assert "36 clips, 35 of them cached already" in cache()  # mended, done again


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_interrupted_caching_goes_on(data: Path, tmp_path: Path, number: int) -> None:
    with open(data / "train.csv", newline="", encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    clips = [path for path, *_ in rows]
    with open(data / "many.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        for copy in range(10):
            for clip in clips:
                linked = data / "clips" / f"{copy}_{Path(clip).name}"
                os.link(data / "clips" / clip, linked)
                writer.writerow([linked.name, "dark", "p"])
    flags = [*map(str, CACHE), "--manifests", "many.csv"]
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "prepare_data.py"), *flags],
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    while len(entries(tmp_path / "cached")) < 12:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert "Traceback" not in errors
    assert process.returncode == (130 if number == signal.SIGINT else -signal.SIGKILL)
    time.sleep(0.5)  # orphaned workers end with their pipe
    finished = len(entries(tmp_path / "cached"))
    assert finished >= 12
    done = run_script("prepare_data.py", *flags, cwd=tmp_path)
    if finished < 180:
        assert "180 clips, 0 of" not in done.stdout
    assert len(entries(tmp_path / "cached")) == 180
    assert not list((tmp_path / "cached").glob("*/.*"))
    assert pd.read_csv(data / "many.csv").shape[0] == 180


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output", "c", "--manifests", "none.csv"], "none.csv: no such manifest"),
        (["--output", "c", "--frames-per-segment", "2"], "frames_per_segment = 2: must be odd"),
        (["--output", "c", "--quality", "0"], "quality = 0: must be from 20 to 100"),
        (["--output", "c", "--num-workers", "-1"], "num_workers = -1: must be at least 0"),
    ],
)
def test_mistakes_are_one_line(data: Path, tmp_path: Path, arguments, message, mistake) -> None:
    code, stderr = mistake(main, "cache", "data", *arguments, cwd=tmp_path)
    assert code == 2
    assert message in stderr


FOLDERS = [
    ("check", "empty", "empty: holds neither train.csv nor any video (it is empty)"),
    ("check", "notes", "notes: holds neither train.csv nor any video (passed over: 1 .txt)"),
    ("check", "a.mp4", "a.mp4: is a video: name the folder that it lies in, or a manifest"),
    ("audit", "a.mp4", "a.mp4: is a video: name the folder that it lies in, or a manifest"),
    ("cache", "empty", "empty: holds neither train.csv nor any video (it is empty)"),
    ("cache", "a.mp4", "a.mp4: no such folder (data_root is the folder of the clips)"),
]


@pytest.mark.parametrize(("command", "folder", "message"), FOLDERS)
def test_folders_without_clips_are_told(
    command: str, folder: str, message: str, tmp_path: Path, mistake
) -> None:
    (tmp_path / "empty").mkdir()
    touch(tmp_path, "a.mp4", "notes/a.txt")
    output = ("--output", "o") if command == "cache" else ()
    assert message in mistake(main, command, folder, *output, cwd=tmp_path).stderr


def test_files_passed_over_are_counted(tmp_path: Path, run_main) -> None:
    make_clip(tmp_path / "store/a.mp4", 100)
    link(tmp_path / "data/cut", tmp_path / "store")
    touch(tmp_path / "data", "cut/notes.txt", "._a.mp4")
    done = run_main(main, "check", "data", "--num-workers", 0, cwd=tmp_path)
    assert "data: passed over: 1 .txt, 1 hidden" in done.stdout
    assert "1 files, 0 of them bad" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["check", "data", "--workers", "1"], "--workers is now called --num-workers"),
        (["audit", "data", "--alike-bits=9"], "--alike-bits is now called --max-hamming-distance"),
        (["cache", "data", "--inputs", "rgb"], "--inputs is now called --modality"),
        (["cache", "data", "--per-segment", "3"], "is now called --frames-per-segment"),
    ],
)
def test_renamed_flags_are_told(tmp_path: Path, arguments, message: str, mistake) -> None:
    stderr = mistake(main, *arguments, cwd=tmp_path).stderr
    assert message in stderr
    assert len(stderr.splitlines()) == 1


def test_the_earlier_name_of_a_modality_is_understood(tmp_path: Path, mistake) -> None:
    arguments = ("cache", "none", "--output", "c", "--modality", "rgb+vectors")
    assert "none/train.csv" not in mistake(main, *arguments, cwd=tmp_path).stderr


LIGHT = """
import sys
import prepare_data
sys.argv = ["prepare_data.py", "--help"]
try:
    prepare_data.main()
finally:
    heavy = {"torch", "torchvision", "pandas", "scipy", "sklearn", "PIL", "matplotlib"}
    print("heavy:", sorted(heavy & set(sys.modules)))
"""


def test_help_is_light_and_shows_one_example_per_line(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LIGHT], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "heavy: []" in done.stdout
    examples = [line for line in done.stdout.splitlines() if "python prepare_data.py" in line]
    names = [line.split()[2] for line in examples]
    assert names == ["audit", "check", "split", "split", "cache", "clips"]


@pytest.mark.parametrize(("command", "code"), [("audit", 3), ("check", 0)])
def test_work_on_files_needs_no_torch(tmp_path: Path, command: str, code: int) -> None:
    """Importing torch would take seconds and memory in every worker."""
    make_clip(tmp_path / "clips/a.mp4", 100)
    (tmp_path / "m.csv").write_text("path,label\na.mp4,x\n")
    (tmp_path / "torch.py").write_text("raise RuntimeError('torch was imported')")
    environment = {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    done = run_script("prepare_data.py", command, "m.csv", cwd=tmp_path, check=False, **environment)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr


def test_bad_files_are_listed_with_reasons(tmp_path: Path) -> None:
    for number in range(3):
        make_clip(tmp_path / f"clips/good{number}.mp4", 100, seed=number)
    whole = (tmp_path / "clips/good0.mp4").read_bytes()
    (tmp_path / "clips/cut.mp4").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "clips/text.mp4").write_text("not a video")
    (tmp_path / "all.csv").write_text(
        "path,label\n" + "".join(f"{n}.mp4,x\n" for n in ("good0", "good1", "cut", "text", "gone"))
    )
    done = run_script("prepare_data.py", "check", "all.csv", cwd=tmp_path, check=False)
    assert done.returncode == 1
    assert "5 files, 3 of them bad: runs/bad_clips.csv" in done.stdout
    table = pd.read_csv(tmp_path / "runs/bad_clips.csv").set_index("path")["reason"]
    assert {Path(path).name for path in table.index} == {"cut.mp4", "text.mp4", "gone.mp4"}
    assert table["gone.mp4"] == "no such file"
    assert "gone.mp4" not in done.stdout  # names stay in the list


def test_good_files_pass(tiny_data: Path, tmp_path: Path, capsys) -> None:
    output = str(tmp_path / "new/bad.csv")
    assert check(CheckConfig((str(tiny_data),), output=output, num_workers=0)) == 0
    assert "36 files, 0 of them bad" in capsys.readouterr().out
    assert len(pd.read_csv(output)) == 0
    assert check(CheckConfig((str(tiny_data / "clips/val"),), output=output, num_workers=2)) == 0
    assert "9 files, 0 of them bad" in capsys.readouterr().out  # a folder of videos
    manifest = tmp_path / "train.csv"
    manifest.write_bytes(before := (tiny_data / "train.csv").read_bytes())
    with pytest.raises(UserError, match=r"train\.csv: exists already, is not a table that this"):
        check(CheckConfig((str(tiny_data),), output=str(manifest), num_workers=0))
    assert manifest.read_bytes() == before


def test_damage_where_no_sampling_looks_is_found(tmp_path: Path) -> None:
    """One picture of 40 is overwritten; every one is decoded."""
    frames = np.random.default_rng(0).integers(0, 256, (40, 64, 64, 3), dtype=np.uint8)
    write_video(tmp_path / "clip.mp4", frames, group=10)
    assert check_video(tmp_path / "clip.mp4") is None
    content = bytearray((tmp_path / "clip.mp4").read_bytes())
    middle = len(content) // 2
    content[middle : middle + 3000] = b"\xff" * 3000
    (tmp_path / "clip.mp4").write_bytes(content)
    assert check_video(tmp_path / "clip.mp4") is not None


def write_in_matrix(path: Path, matrix: int, count: int) -> bytes:
    """Write H.264 whose header names a colour matrix; what is in the file."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"threads": "1"})
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        stream.codec_context.colorspace = matrix
        for brightness in range(count):
            frame = np.full((64, 64, 3), brightness, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    return path.read_bytes()


@pytest.mark.parametrize(
    ("matrix", "convertible"), [(1, True), (9, True), (10, False), (14, False)]
)
@pytest.mark.parametrize("suffix", ["mp4", "ts"])  # needed packets alone, all packets
def test_what_passes_the_check_can_be_trained_on(
    matrix: int, convertible: bool, suffix: str, tmp_path: Path
) -> None:
    """Matrix 10 is the constant luminance of BT.2020, 14 is ICtCp."""
    path = tmp_path / f"clip.{suffix}"
    write_in_matrix(path, matrix, 40)
    assert check_video(path) == check_clip(path)
    if convertible:
        assert check_clip(path) is None
        assert read_clip(path).rgb.shape == (16, 224, 224, 3)
    else:
        assert check_clip(path).startswith("its colours cannot be converted to RGB (yuv420p")
        with pytest.raises(ClipError) as refused:
            read_clip(path)
        assert str(refused.value) == f"{path}: cannot be read: {check_clip(path)}"


def test_colours_that_change_where_no_sampling_looks_are_found(tmp_path: Path) -> None:
    usual = write_in_matrix(tmp_path / "usual.h264", 1, 60)
    last = write_in_matrix(tmp_path / "last.h264", 10, 1)
    (tmp_path / "clip.h264").write_bytes(usual + last)
    assert read_clip(tmp_path / "clip.h264").rgb.shape == (16, 224, 224, 3)
    assert "matrix 10" in check_clip(tmp_path / "clip.h264")


def test_files_without_motion_vectors_are_bad_if_training_needs_them(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "still.avi"), "w") as container:
        stream = container.add_stream("mjpeg", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuvj420p"
        frame = np.full((64, 64, 3), 90, np.uint8)
        for _ in range(20):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    output = str(tmp_path / "bad.csv")
    assert check(CheckConfig((str(tmp_path),), output=output, num_workers=0)) == 0
    with_motion = CheckConfig((str(tmp_path),), modality="rgb+mv", output=output, num_workers=0)
    assert check(with_motion) == 1
    assert "motion vectors" in pd.read_csv(output)["reason"][0]


def test_a_clip_that_only_training_refuses_is_bad(tmp_path: Path, monkeypatch) -> None:
    """Decoding is not all that training does with a file."""
    make_clip(tmp_path / "clips/a.mp4", 100)

    def refuse(path: Path, *_: object) -> None:
        raise ClipError(path, "cannot be sampled")

    monkeypatch.setattr("video.clip_reader.read_frames", refuse)
    assert check_video(tmp_path / "clips/a.mp4") is None
    assert check_clip(tmp_path / "clips/a.mp4") == "cannot be sampled"


def test_real_files(real: Path, tmp_path: Path) -> None:
    sources = (str(real / "odd/not-a-video"), str(real / "cholect50/clips/preparation"))
    assert check(CheckConfig(sources, output=str(tmp_path / "bad.csv"), num_workers=2)) == 1
    bad = {Path(path).parent.name for path in pd.read_csv(tmp_path / "bad.csv")["path"]}
    assert bad == {"not-a-video"}
