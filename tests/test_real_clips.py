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
import torch
from helpers import ROOT, make_model
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as pil

from clips.cache import CacheSettings, ClipCache
from clips.transforms import inverse_affine, sampling_grid, warp
from modeling.inference import prepare_for_inference
from video import decoder as video
from video.clip_reader import FrameSampler, read_clip
from video.container import TOLERANT, ClipError
from video.decoder import read_frames

with open(Path(__file__).parent / "real_outcomes.csv", encoding="utf-8") as table:
    OUTCOMES = list(csv.DictReader(table))

# Runs in a process of its own, which shows the peak memory of this work alone.
READ_ALL = """
import json, operator, resource, sys, time
from torch.utils.data import DataLoader
from dataset import ClipsDataset
from clips.manifest import ClipRow
from video.container import ClipError

class Timed(ClipsDataset):
    def __getitem__(self, index):
        start = time.perf_counter()
        try:
            item = super().__getitem__(index)
        except ClipError as error:
            item = str(error)
        seconds = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        failed = isinstance(item, str)
        shape = None if failed else list(item[0].shape)
        return {"shape": shape, "error": item if failed else "", "s": seconds, "bytes": peak}

if __name__ == "__main__":
    paths = json.load(sys.stdin)
    clips = Timed([ClipRow(path, 0) for path in paths])
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
            continue  # many similar ones, and slow
        path = real / row["path"]
        indices = FrameSampler(16).indices(int(row["frames"]))
        chosen, count = {}, 0
        with av.open(str(path), **TOLERANT) as container:
            for frame in container.decode(video=0):
                if count in indices:
                    image = frame.to_ndarray(format="rgb24", width=32, height=32)
                    chosen[count] = np.rot90(image, round(frame.rotation / 90))
                count += 1
        assert count == int(row["frames"]), row["path"]
        wanted = np.stack([chosen[i] for i in indices])
        assert np.array_equal(read_clip(path, size=32).rgb, wanted), row["path"]


def test_needed_packets_give_the_frames_of_the_plain_path(real: Path, monkeypatch) -> None:
    """Errors too; most H.264 files take the fast path. Of many similar files every third one."""
    paths = [real / row["path"] for row in OUTCOMES if not row["path"].startswith("fights/")]
    paths += sorted((real / "fights").glob("*/*.mp4"))[::3]
    paths += sorted((real / "cholect50").glob("clips/*/*.mp4"))[::3]
    assert len(paths) == 238
    fast, read_needed = [], video._read_needed

    def watched(*arguments):
        frames = read_needed(*arguments)
        fast.append(frames is not None)
        return frames

    for number, path in enumerate(paths):
        offsets = np.random.default_rng(number).random(8)
        monkeypatch.setattr(video, "_read_needed", watched)
        clip = outcome(path, offsets)
        monkeypatch.setattr(video, "_read_needed", lambda *_: None)
        assert np.array_equal(clip, outcome(path, offsets)), path
    assert sum(fast) > 130


def outcome(path: Path, offsets: np.ndarray) -> np.ndarray | str:
    try:
        return read_clip(path, FrameSampler(8, "random"), 32, offsets).rgb
    except ClipError as error:
        return str(error)


@pytest.fixture(scope="module")
def some_clips(real: Path) -> dict[Path, np.ndarray]:
    """Sixteen frames of surgery, of CCTV and of a laparoscope."""
    paths = [real / "laparoscopy/endo.mp4", *sorted((real / "fights").glob("*/*.mp4"))[::20]]
    paths += sorted((real / "cholect50").glob("clips/*/*.mp4"))[::30]
    return {path: read_clip(path).rgb for path in paths}


def test_cache_of_real_clips(some_clips, real: Path, tmp_path: Path) -> None:
    cache = ClipCache.create(tmp_path, real, CacheSettings())
    for path, decoded in some_clips.items():
        cache.write(path)
        error = np.abs(cache.read(path).rgb.astype(int) - decoded).mean()
        assert error < 6, path  # below 2 except for one noisy CCTV clip


def test_warp_of_real_clips(some_clips) -> None:
    params = torch.tensor([[1.0, 8.0, 10 / 224, -6 / 224, 1.07, 1.0, 1.0, 1.0, 0.0]])
    grid = sampling_grid(inverse_affine(params), (224, 224))
    for path, decoded in some_clips.items():
        clip = torch.from_numpy(decoded).permute(0, 3, 1, 2)[None].float()
        ours = warp(clip, grid)[0].round().permute(0, 2, 3, 1).numpy()
        for frame, result in zip(decoded, ours, strict=True):
            image = pil.affine(
                Image.fromarray(frame), 8.0, [10, -6], 1.07, [0.0], InterpolationMode.BILINEAR
            )
            assert np.percentile(np.abs(result - np.asarray(image)), 99) <= 1, path


@torch.inference_mode()
def test_prepared_models_on_real_clips(some_clips) -> None:
    clips = torch.from_numpy(np.stack(list(some_clips.values())[:2])).permute(0, 1, 4, 2, 3)
    for name in ("tsm_resnet", "cnnlstm", "vivit"):
        torch.manual_seed(0)
        model = make_model(name, 7).eval()
        fast = prepare_for_inference(model, torch.device("cpu"))
        assert (fast(clips) - model(clips)).abs().max() < 1e-5


def test_first_needs_no_more_than_the_first_frames(real: Path) -> None:
    """A file that breaks off after 28 frames still has its first 16."""
    broken = real / "odd/decord/corrupted.mp4"
    with pytest.raises(ClipError, match="breaks off after 28 frames"):
        read_clip(broken)
    first = read_clip(broken, FrameSampler(16, "first"), 64).rgb
    assert np.array_equal(first, read_frames(broken, lambda n: range(16), 64, stop_after=16))


def test_rotation_is_applied(real: Path) -> None:
    """A 100 x 60 frame with rotation -90 is stored on its side: upright it is 60 pixels wide."""
    clip = read_clip(real / "odd/mozilla-mp4parse/video_rotation_90.mp4", FrameSampler(1), None).rgb
    assert clip.shape == (1, 100, 60, 3)
    upper, lower = clip[0, :18].mean(), clip[0, 30:].mean()
    assert upper > 240  # the white bar is at the top when upright, at the left as stored
    assert lower < 15
