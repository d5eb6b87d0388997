"""Every real file gives a clip or one clear error: in time, in memory, in a DataLoader worker."""

import csv
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import av
import numpy as np
import pytest
from conftest import ROOT

import video
from sampling import sample_indices
from video import _TOLERANT as TOLERANT
from video import ClipError, read_clip, read_frames

with open(Path(__file__).parent / "real_outcomes.csv", encoding="utf-8") as table:
    OUTCOMES = list(csv.DictReader(table))

# Runs in a process of its own, to see the peak memory of this work alone.
READ_ALL = """
import json, resource, sys, time
from torch.utils.data import DataLoader
from dataset import ClipsDataset, ReportingDataset
from manifest import ClipRow

class Timed(ReportingDataset):
    def __getitem__(self, index):
        began = time.perf_counter()
        number, item = super().__getitem__(index)
        took = time.perf_counter() - began
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        failed = isinstance(item, str)
        shape = None if failed else list(item[0].shape)
        return {"shape": shape, "error": item if failed else "", "s": took, "bytes": peak}

if __name__ == "__main__":
    paths = json.load(sys.stdin)
    clips = Timed(ClipsDataset([ClipRow(path, 0) for path in paths]))
    loader = DataLoader(clips, batch_size=None, num_workers=2, multiprocessing_context="spawn")
    print(json.dumps(list(loader)))
"""


def test_table_covers_every_real_file(real: Path) -> None:
    with open(real / "MANIFEST.csv", encoding="utf-8") as file:
        listed = [row["path"] for row in csv.DictReader(file)]
    assert [row["path"] for row in OUTCOMES] == listed
    assert Counter(row["outcome"] == "clip" for row in OUTCOMES) == {True: 224, False: 30}


def test_every_real_file_in_a_worker(real: Path, tmp_path: Path) -> None:
    script = tmp_path / "read_all.py"
    script.write_text(READ_ALL)
    paths = json.dumps([str(real / row["path"]) for row in OUTCOMES])
    done = subprocess.run(
        [sys.executable, str(script)],
        input=paths,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    for row, result in zip(OUTCOMES, results, strict=True):
        if row["outcome"] == "clip":
            assert result["shape"] == [16, 3, 224, 224], row["path"]
        else:
            assert result["error"] == f"{real / row['path']}: {row['outcome']}"
    assert max(result["s"] for result in results) < 20
    assert max(result["bytes"] for result in results) < 2e9


def test_frames_are_those_the_decoder_puts_out(real: Path) -> None:
    """Reading the chosen frames equals decoding all and choosing then, in decode order."""
    for row in OUTCOMES:
        if row["outcome"] != "clip" or row["path"].startswith(("fights/", "laparoscopy/")):
            continue  # many alike, and slow
        path = real / row["path"]
        with av.open(str(path), **TOLERANT) as container:
            decoded = [
                np.rot90(
                    frame.to_ndarray(format="rgb24", width=32, height=32),
                    round(frame.rotation / 90),
                )
                for frame in container.decode(video=0)
            ]
        assert len(decoded) == int(row["frames"]), row["path"]
        clip = read_clip(path, size=32)
        wanted = np.stack([decoded[i] for i in sample_indices(len(decoded), 16)])
        assert np.array_equal(clip, wanted), row["path"]


def test_needed_packets_give_the_frames_of_the_plain_path(real: Path, monkeypatch) -> None:
    """On every real file, errors included; most H.264 files do take the fast path."""
    paths = [real / row["path"] for row in OUTCOMES]
    paths += sorted((real / "cholect50").glob("clips/*/*.mp4"))
    assert len(paths) == len(OUTCOMES) + 148
    fast, read_needed = [], video._read_needed

    def watched(*arguments):
        frames = read_needed(*arguments)
        fast.append(frames is not None)
        return frames

    for number, path in enumerate(paths):
        draws = np.random.default_rng(number).random(8)
        monkeypatch.setattr(video, "_read_needed", watched)
        clip = outcome(path, draws)
        monkeypatch.setattr(video, "_read_needed", lambda *_: None)
        assert np.array_equal(clip, outcome(path, draws)), path
    assert sum(fast) > 300


def outcome(path: Path, draws: np.ndarray) -> np.ndarray | str:
    try:
        return read_clip(path, 8, "random", 32, draws)
    except ClipError as error:
        return str(error)


def test_first_needs_no_more_than_the_first_frames(real: Path) -> None:
    """A file that breaks off after 28 frames still has its first 16."""
    broken = real / "odd/decord/corrupted.mp4"
    with pytest.raises(ClipError, match="breaks off after 28 frames"):
        read_clip(broken, 16, "uniform")
    first = read_clip(broken, 16, "first", size=64)
    assert np.array_equal(first, read_frames(broken, lambda n: range(16), 64, stop_after=16))


def test_rotation_is_applied(real: Path) -> None:
    """A 100 x 60 picture with rotation -90 is stored lying on its side: upright it is 60 wide."""
    clip = read_clip(real / "odd/mozilla-mp4parse/video_rotation_90.mp4", 1, size=None)
    assert clip.shape == (1, 100, 60, 3)
    upper, lower = clip[0, :18].mean(), clip[0, 30:].mean()
    assert upper > 240  # the white bar is at the top when upright, at the left as stored
    assert lower < 15
