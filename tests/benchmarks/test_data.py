"""benchmarks/data.py and what it compares with, on tiny videos; speed itself is not tested."""

import json
from pathlib import Path

import av
import numpy as np
import pandas as pd
import pytest
import torch

from benchmarks import data as benchmark_data
from benchmarks import epoch_time
from benchmarks.baselines import decode_naively, decoders
from benchmarks.data import BenchmarkConfig, main
from benchmarks.timing import interleave
from benchmarks.videos import write_benchmark_video
from video.clip_reader import DecodedClip, read_clip
from video.decoder import read_frames


def test_calls_take_turns() -> None:
    order: list[str] = []
    calls = {name: lambda name=name: order.append(name) for name in "ab"}
    times = interleave(calls, 2, in_a_row=2, warmup=1)
    assert "".join(order) == "ab" + "aabb" * 2
    assert {name: len(seconds) for name, seconds in times.items()} == {"a": 2, "b": 2}


def test_videos_are_as_asked(tmp_path: Path) -> None:
    write_benchmark_video(tmp_path / "a.mp4", 90, 12, 5)
    frames = read_frames(tmp_path / "a.mp4", range, None)
    assert frames.shape == (12, 90, 160, 3)
    assert np.abs(np.diff(frames.astype(int), axis=0)).mean() > 1  # it moves
    write_benchmark_video(tmp_path / "b.mp4", 48, 30, 5, source=str(tmp_path / "a.mp4"))
    again = read_frames(tmp_path / "b.mp4", range, None).astype(int)
    assert again.shape == (30, 48, 84, 3)
    errors = [np.abs(again[0] - other).mean() for other in again[1:24]]
    assert np.argmin(errors) + 1 == 12  # from its start again when it ends


@pytest.mark.parametrize("name", decoders())
def test_peers_read_the_same_frames(tmp_path: Path, name: str) -> None:
    """Their resizers differ, but the frames and their order do not."""
    write_benchmark_video(tmp_path / "clip.mp4", 180, 50, 10)
    ours = read_clip(tmp_path / "clip.mp4", size=64).rgb.astype(int)
    theirs = decoders()[name](tmp_path / "clip.mp4", 16, 64)
    assert theirs.shape == (16, 64, 64, 3)
    errors = [[np.abs(frame - other).mean() for other in theirs] for frame in ours]
    assert np.argmin(errors, axis=1).tolist() == list(range(16))


def config(**changes) -> BenchmarkConfig:
    settings = {"repeats": 1, "clips": 3, "batch_size": 2, "image_size": 32, "num_workers": 0}
    return BenchmarkConfig(**{**settings, **changes})


def test_decoding_table(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(benchmark_data, "VIDEOS", [(90, 20, 10), (90, 40, 250)])
    table = benchmark_data.time_decoding(config(), tmp_path)
    assert table["video"].tolist() == ["90p, 20 frames, g 10", "90p, 40 frames, g 250",
                                       "all, summed"]  # fmt: skip
    ours, naive = table["this project (ms)"], table["naive PyAV (ms)"]
    assert ours[2] == pytest.approx(ours[0] + ours[1])
    assert (table["naive PyAV (x)"] - naive / ours).abs().max() < 1e-9


def test_wrong_frames_stop_the_benchmark(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(benchmark_data, "VIDEOS", [(90, 20, 10)])
    monkeypatch.setattr(
        benchmark_data, "read_clip", lambda path: DecodedClip(decode_naively(path, 16, 224) + 1)
    )
    with pytest.raises(RuntimeError, match="the frames differ"):
        benchmark_data.time_decoding(config(), tmp_path)


def test_cache_table(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(benchmark_data, "CACHED_VIDEOS", [(90, 20, 10), (90, 100, 250)])
    table = benchmark_data.time_cache(config(), tmp_path)
    assert table["frames kept"].tolist() == ["20", "80"]
    assert (table["kB per 16 frames"] < 250).all()
    assert (table["mean difference (grey levels)"] < 10).all()


def test_training_and_memory_tables(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(epoch_time, "HEIGHT", 90)
    monkeypatch.setattr(epoch_time, "FRAMES", 20)
    (tmp_path / "one").mkdir()
    table = epoch_time.time_training(config(model_name="vivit"), tmp_path / "one")
    assert len(table) == 3
    assert (table["clips/s"] > 0).all()
    assert table["waiting for clips (%)"].iloc[1:].between(0, 100).all()
    (tmp_path / "two").mkdir()
    settings = config(model_name="vivit", epochs=2, num_workers=1)
    memory = epoch_time.watch_memory(settings, tmp_path / "two")
    with av.open(str(tmp_path / "two/clips/train_0.mp4")) as video:
        assert (video.streams.video[0].height, video.streams.video[0].frames) == (90, 20)
    assert memory["epoch"].tolist() == ["1", "2"]
    assert (memory["training process (MB)"] > 100).all()
    assert (memory["its workers (MB)"] > 10).all()


def test_script(tmp_path: Path, run_main) -> None:
    done = run_main(main, "--what", "augment", "--repeats", 1, cwd=tmp_path)
    last = json.loads(done.stdout.strip().splitlines()[-1])
    assert last == json.loads((tmp_path / "runs/benchmarks/augment.json").read_text())
    table = pd.read_csv(tmp_path / "runs/benchmarks/augment.csv")
    assert table["chain"].iloc[-1] == "this project"
    assert {"device", "allocator", "torch", "command", "n"} <= set(last["conditions"])
    assert torch.__version__.startswith(last["conditions"]["torch"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--repeats", "0"], "repeats = 0: must be at least 1"),
        (["--source", "none.mp4"], "none.mp4: no such file"),
        (["--workers", "0"], "--workers is now called --num-workers"),
        (["--what", "training", "--device", "tpu"], "device 'tpu' cannot be used here"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], message: str, tmp_path, mistake) -> None:
    code, stderr = mistake(main, *arguments, cwd=tmp_path)
    assert code == 2
    assert message in stderr
