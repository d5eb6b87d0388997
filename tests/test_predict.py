"""predict.py and its parts: whole videos, live streams, bad files, interruptions."""

import base64
import csv
import dataclasses
import html
import itertools
import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ROOT, link, start_script, touch, write_images, write_stamped
from torch import nn

from checkpoint import load_checkpoint, rebuild_model, save_checkpoint
from clips.manifest import OUT_OF_BODY, UNCERTAIN, UNREADABLE
from config import TrainConfig
from evaluation.calibration import Calibration
from explanation.methods import default_method, explain
from models import build_model
from predict import PredictConfig, build_predictor, find_sources, main, write_outputs
from timeline.output import NO_PREDICTION, output_folders, probability_curves
from timeline.overlay import Band
from timeline.predictor import FrameFilter, VideoPredictor, load_frame_filter
from timeline.relevance import WindowExplainer
from timeline.segments import Segment, Snapshot, Timeline, read_timeline
from timeline.smoothing import SmoothingConfig
from timeline.sources import FileSource, Frame
from timeline.streaming import OnlinePredictor, supports_streaming
from training.checks import resolve
from utils.errors import UserError
from video.clip_reader import FrameSampler, effective_fps, read_clip
from video.container import ClipError, decode, decoding_stream, open_video, to_rgb
from video.encoder import write_video

CLASSES = ("dark", "grey", "light")
LEVELS = (40, 128, 216)  # brightness of the frames of each class


class Brightness(nn.Module):
    """Predicts the class of a window by its mean brightness."""

    def forward(self, clips: torch.Tensor) -> torch.Tensor:
        mean = clips.float().mean(dim=(1, 2, 3, 4))  # (B,)
        return -((mean[:, None] - torch.tensor(LEVELS)) ** 2) / 400


def painted(plan: Sequence[tuple[str, float]], fps: int = 25) -> Iterator[np.ndarray]:
    """Frames `(48, 64, 3)` with the brightness of each class, for some seconds each."""
    for name, seconds in plan:
        level = LEVELS[CLASSES.index(name)]
        for _ in range(round(seconds * fps)):
            yield np.full((48, 64, 3), level, np.uint8)


PLAN = (("dark", 6.0), ("grey", 5.0), ("light", 3.0), ("grey", 6.0))


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("videos") / "an operation.mp4"
    write_video(path, painted(PLAN), 25, group=25)
    return path


def predictor(model: nn.Module | None = None, stride: int = 2) -> OnlinePredictor:
    return OnlinePredictor(model or Brightness(), CLASSES, 8, 16, 10.0, stride)


def smoothing(method: str = "auto", threshold: float = 0.4) -> SmoothingConfig:
    return SmoothingConfig(5.0, 1.0, 0.8, threshold, method)


def run(
    path: Path,
    folder: Path,
    method: str = "auto",
    threshold: float = 0.4,
    model: nn.Module | None = None,
    frame_filter: FrameFilter | None = None,
    stride: int = 2,
) -> Timeline:
    source = FileSource(path, 10.0, 16)
    config = smoothing(method, threshold)
    with VideoPredictor(source, predictor(model, stride), config, folder, frame_filter) as video:
        return video.run("test")


def rows_of(path: Path) -> list[list[str]]:
    return list(csv.reader(path.read_text().splitlines()))


def check_plan(segments: Sequence[Segment], tolerance: float) -> None:
    assert [segment.label for segment in segments] == [name for name, _ in PLAN]
    ends = list(itertools.accumulate(seconds for _, seconds in PLAN))
    assert [s.end for s in segments] == pytest.approx(ends, abs=tolerance)
    assert segments[0].start == 0
    assert all(segment.confidence > 0.9 for segment in segments)


def test_a_video_becomes_its_timeline(video: Path, tmp_path: Path) -> None:
    timeline = run(video, tmp_path / "out")
    check_plan(timeline.segments, 0.2)
    assert timeline.duration == 20.0
    assert timeline.notes == []
    rows = rows_of(tmp_path / "out" / "frames.csv")
    assert rows[0] == ["time", *CLASSES]
    table = np.array(rows[1:], float)
    np.testing.assert_allclose(table[:, 0], timeline.times, atol=6e-4)
    np.testing.assert_allclose(table[:, 1:], timeline.probabilities, atol=6e-5)
    # windows of 8 frames, a tenth of a second apart: the middle of the first is at 0.35 s
    assert table[0, 0] == pytest.approx(0.36, abs=0.03)
    assert np.diff(table[:, 0]) == pytest.approx(0.2, abs=0.05)


def test_only_the_causal_filter_is_late(video: Path, tmp_path: Path) -> None:
    early = run(video, tmp_path, "viterbi").segments
    late = run(video, tmp_path, "causal").segments
    late = [
        segment for segment in late if segment.label != UNCERTAIN
    ]  # while the filter changes its state
    assert [s.label for s in late] == [s.label for s in early]
    assert all(b.start > a.start for a, b in zip(early[1:], late[1:], strict=True))


def test_without_smoothing_each_prediction_counts(video: Path, tmp_path: Path) -> None:
    timeline = run(video, tmp_path, "none")
    sure = timeline.probabilities.max(axis=1) >= 0.4
    labels = [CLASSES[k] if s else UNCERTAIN
              for k, s in zip(timeline.probabilities.argmax(1), sure, strict=True)]  # fmt: skip
    assert [s.label for s in timeline.segments] == [key for key, _ in itertools.groupby(labels)]


def test_nothing_is_answered_without_a_threshold(video: Path, tmp_path: Path) -> None:
    timeline = run(video, tmp_path, threshold=math.inf)
    assert [segment.label for segment in timeline.segments] == [UNCERTAIN]


def damage(video: Path, path: Path, start: float = 8.0, end: float = 10.0) -> Path:
    """A copy of a video that cannot be decoded for some seconds."""
    data = bytearray(video.read_bytes())
    with open_video(video) as container:
        stream = decoding_stream(container, 0)
        for packet in container.demux(stream):
            if packet.pts is not None and start <= packet.pts * packet.time_base < end:
                data[packet.pos : packet.pos + packet.size] = b"\xff" * packet.size
    path.write_bytes(data)
    return path


def test_a_bad_stretch_is_marked_and_skipped(video: Path, tmp_path: Path) -> None:
    timeline = run(damage(video, tmp_path / "bad.mp4"), tmp_path)
    labels = [segment.label for segment in timeline.segments]
    assert labels == ["dark", "grey", UNREADABLE, "grey", "light", "grey"]
    assert timeline.segments[2][:2] == pytest.approx((8.0, 10.0), abs=0.1)
    assert len(timeline.notes) == 1


def test_the_model_never_sees_frames_from_outside_the_body(video: Path, tmp_path: Path) -> None:
    shown = []

    class Spy(Brightness):
        def forward(self, clips: torch.Tensor) -> torch.Tensor:
            shown.append(float(clips.float().mean()))
            return super().forward(clips)

    timeline = run(video, tmp_path, model=Spy(), frame_filter=lambda image: image.mean() > 190)
    assert [segment.label for segment in timeline.segments] == ["dark", "grey", OUT_OF_BODY, "grey"]
    assert timeline.segments[2][:2] == pytest.approx((11.0, 14.0), abs=0.15)
    assert max(shown) < 140  # no light frame, not even within a window


def test_a_video_wholly_out_of_the_body(video: Path, tmp_path: Path) -> None:
    timeline = run(video, tmp_path, frame_filter=lambda image: True)
    assert [segment[:3] for segment in timeline.segments] == [(0.0, 20.0, OUT_OF_BODY)]
    assert len(timeline.times) == 0


def test_viewers_do_not_see_what_is_out_of_the_body(video: Path, tmp_path: Path) -> None:
    source = FileSource(video, 10.0, 16, preview=True)
    seen: list[Snapshot] = []
    with VideoPredictor(
        source,
        predictor(),
        smoothing(),
        tmp_path,
        frame_filter=lambda image: np.bool_(image.mean() > 190),
        on_update=seen.append,
    ) as video_predictor:
        video_predictor.run("test")
    hidden = [snapshot for snapshot in seen if snapshot.label == OUT_OF_BODY]
    shown = [snapshot for snapshot in seen if snapshot.label != OUT_OF_BODY]
    assert hidden
    assert shown
    assert all(snapshot.frame is None for snapshot in hidden)
    assert all(np.isnan(snapshot.probabilities).all() for snapshot in hidden)
    assert max(snapshot.frame.mean() for snapshot in shown) < 190
    assert all(snapshot.frame.shape == (48, 64, 3) for snapshot in shown)


def test_live_sources_are_smoothed_from_the_past_only(video: Path, tmp_path: Path) -> None:
    class Live(FileSource):
        live = True

    for kind, method in ((Live, "causal"), (FileSource, "viterbi")):
        source = kind(video, 10.0, 16)
        assert VideoPredictor(source, predictor(), smoothing(), tmp_path).method == method


def test_an_error_in_the_middle_keeps_what_is_known(video: Path, tmp_path: Path) -> None:
    class Breaks(FileSource):
        def __iter__(self) -> Iterator[Frame]:
            yield from itertools.islice(super().__iter__(), 80)
            raise ClipError(self.name, "the disk is gone")

    source = Breaks(video, 10.0, 16)
    with VideoPredictor(source, predictor(), smoothing(), tmp_path) as video_predictor:
        timeline = video_predictor.run("test")
    assert timeline.segments[0].label == "dark"
    assert "the disk is gone" in timeline.notes[-1]


@pytest.mark.parametrize(
    "kind",
    ["damaged", "outside", "all outside", "flicker", "short", "pause", "one frame", "stride"],
)
def test_all_outputs_agree_where_something_was_predicted(
    kind: str, video: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """frames.csv, timeline.csv, timeline.html and timeline.png, of what is not seen in parts."""
    frame_filter, path = None, tmp_path / "video.mkv"
    if kind in ("damaged", "stride"):
        damage(video, path)
    elif kind in ("outside", "all outside", "flicker"):
        shutil.copy(video, path)
        first = itertools.count()
        is_outside = {
            "outside": lambda n: 40 <= n < 90,
            "all outside": lambda n: True,
            "flicker": lambda n: 60 <= n % 80 < 64,
        }[kind]
        frame_filter = lambda image: is_outside(next(first))  # noqa: E731
    elif kind == "pause":  # one window does not fit on either side of the pause
        write_stamped(path, [*range(0, 600, 40), *range(4000, 4600, 40)], "mpeg4")
    else:
        write_video(path, painted([("dark", 0.2 if kind == "short" else 0.04)]), 25)
    stride = 30 if kind == "stride" else 2
    timeline = run(path, tmp_path / "out", frame_filter=frame_filter, stride=stride)
    pictures = []
    monkeypatch.setattr("evaluation.plots.save_figure", lambda *saved: pictures.append(saved[0]))
    write_outputs(tmp_path / "out", timeline, path, {}, "cpu")

    table = np.array(rows_of(tmp_path / "out" / "frames.csv")[1:], float).reshape(-1, 4)
    times, duration = table[:, 0], timeline.duration
    assert times == pytest.approx(timeline.times, abs=6e-4)
    assert (np.diff(times) > 0).all()
    assert len(times) == 0 or (times[0] >= 0 and times[-1] <= duration)
    assert np.isfinite(table).all()

    segments = read_timeline(tmp_path / "out" / "timeline.csv")[""]
    assert [s.start for s in segments] == [0, *(s.end for s in segments[:-1])]
    assert segments[-1].end == pytest.approx(duration, abs=6e-4)
    seen = 0
    for segment in segments:
        inside = ((times >= segment.start) & (times < segment.end)).sum()
        seen += inside
        assert bool(inside) == (not math.isnan(segment.confidence)), segment
        assert not (inside and segment.label in (UNREADABLE, OUT_OF_BODY))
    assert seen == len(times)

    page = (tmp_path / "out" / "timeline.html").read_text()
    data = json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])
    assert [s[3] for s in data["segments"]] == [
        None if math.isnan(s.confidence) else pytest.approx(s.confidence, abs=1e-4)
        for s in segments
    ]
    curves = np.frombuffer(base64.b64decode(data["curves"]), np.uint8).reshape(3, -1).T
    np.testing.assert_array_equal(curves, probability_curves(timeline))
    edges = np.linspace(0, duration, len(curves) + 1)
    drawn = [patch.get_data() for patch in pictures[0].axes[0].patches]
    assert len(drawn) == 3
    for number, (heights, ends, baseline) in enumerate(drawn):
        np.testing.assert_array_equal(ends, edges)
        expected = np.where(curves[:, number] == NO_PREDICTION, np.nan, curves[:, number] / 254)
        np.testing.assert_allclose((baseline - heights) / 0.5, expected, atol=1e-9)
    is_known = (curves != NO_PREDICTION).all(axis=1)
    assert (is_known == (curves != NO_PREDICTION).any(axis=1)).all()
    per_bin = np.histogram(times, edges)[0]
    assert is_known[per_bin > 0].all()
    distance = np.abs(edges[:-1, None] - times).min(axis=1, initial=math.inf)
    assert (distance[is_known] < 2 * max(0.2, stride / 10) + 0.1).all() or len(times) == 1
    for segment in segments:
        if segment.label in (UNREADABLE, OUT_OF_BODY):
            is_within = (edges[:-1] >= segment.start) & (edges[1:] <= segment.end)
            assert not is_known[is_within].any()


@pytest.mark.parametrize("kind", ["nan", "later"])
def test_no_answer_from_outputs_that_are_not_finite(kind: str, video: Path, tmp_path: Path) -> None:
    class Overflows(Brightness):
        def forward(self, clips: torch.Tensor) -> torch.Tensor:
            logits = super().forward(clips)
            is_light = clips.float().mean() > 190
            return logits * (math.nan if kind == "nan" else math.inf if is_light else 1.0)

    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "timeline.csv").write_text("of an earlier model")
    with pytest.raises(
        ClipError, match=r"operation\.mp4: no timeline, because the model's outputs"
    ):
        run(video, folder, model=Overflows())
    if kind == "nan":  # nothing was written, and what was there is there
        assert [file.name for file in folder.iterdir()] == ["timeline.csv"]
    else:
        table = np.array(rows_of(folder / "frames.csv")[1:], float)
        assert np.isfinite(table).all()
        assert table[-1, 0] < 11.5  # the first light frame is at 11 s
        assert not (folder / "timeline.csv").exists()


def test_a_checkpoint_of_nan_predicts_nothing(runs, video: Path, run_main, tmp_path: Path) -> None:
    state = torch.load(runs("tsm_resnet") / "best.pt", weights_only=True)
    state["model"] = {
        name: tensor * math.nan if tensor.is_floating_point() else tensor
        for name, tensor in state["model"].items()
    }
    save_checkpoint(tmp_path / "nan.pt", state)
    ended = run_main(main, "nan.pt", video, "--output", "out", cwd=tmp_path, code=2)
    (error,) = [line for line in ended.stderr.splitlines() if "error: " in line]
    assert error.startswith("error: nan.pt: is damaged: weight ")
    assert error.endswith(" holds numbers that are not finite")
    assert not (tmp_path / "out").exists()


def test_a_newcomer_is_told_what_the_model_sees(runs, run_main, tmp_path: Path) -> None:
    state = torch.load(runs("tsm_resnet") / "best.pt", weights_only=True)
    confidence = (0.9, 0.8, 0.7, 0.6)
    never = Calibration(1.0, 0.1, None, confidence, (True, True, False, True))
    save_checkpoint(tmp_path / "run.pt", {**state, "calibration": never.state_dict()})
    write_video(tmp_path / "a.mp4", painted([("dark", 3)], 3), 3)
    write_video(tmp_path / "b.mp4", painted([("dark", 0.2)]), 25)
    ended = run_main(main, "run.pt", "a.mp4", "b.mp4", cwd=tmp_path)
    first, *lines = ended.stdout.splitlines()
    window = "windows of 4 frames at 5 frames per second = 0.80 s"
    assert first == f"the model sees {window}"
    slow = "the model expects 5 frames per second, and the video has 3: a window lasts 1.33 s here"
    short = "a window of the model has 4 frames (0.80 s), and the video gave only 1 in one piece"
    remedy = "--target-error 0.25 would answer 2 of the 4 validation clips, 0% of these wrongly"
    for text, count in ((slow, 1), (short, 1), (remedy, 2)):
        assert sum(text in line for line in lines if line.startswith("note: ")) == count
    assert any("in 3.0 s of video at 3 frames per second" in line for line in lines)
    page = (tmp_path / "a.mp4.timeline" / "timeline.html").read_text()
    page = re.sub(r"</?span[^>]*>", "", page)
    assert all(text in html.unescape(page) for text in (slow, remedy, window))
    assert read_timeline(tmp_path / "a.mp4.timeline" / "timeline.csv")[""][0].label == UNCERTAIN
    ended = run_main(main, "run.pt", "a.mp4", "--target-error", "1", cwd=tmp_path)
    assert remedy not in ended.stdout


STAMPS = {
    "one frame": [0],
    "short": range(0, 200, 40),
    "one per second": range(0, 20_000, 1000),
    "pause": [*range(0, 2000, 40), *range(5000, 7000, 40)],
}


@pytest.mark.parametrize("kind", [*STAMPS, "no stamps"])
@pytest.mark.parametrize(
    ("fps", "n_frames", "stride"), [(13.3, 16, 4), (1.0, 16, 4), (240.0, 4, 1), (5.0, 1, 1000)]
)
def test_any_video_gets_sensible_times(
    kind: str, fps: float, n_frames: int, stride: int, tmp_path: Path
) -> None:
    if kind == "no stamps":
        path, length = tmp_path / "v.h264", 4.0
        write_video(path, painted([("dark", 4)]), 25)
    else:
        stamps = STAMPS[kind]
        path, length = write_stamped(tmp_path / "v.mkv", stamps, "mpeg4"), stamps[-1] / 1000
    source = FileSource(path, fps, 16)
    model = OnlinePredictor(Brightness(), CLASSES, n_frames, 16, fps, stride)
    config = SmoothingConfig(5.0, 1.0, n_frames / fps, 0.4)
    with VideoPredictor(source, model, config, tmp_path / "out") as video:
        timeline = video.run("test")
    assert length <= timeline.duration <= length + 1.001
    assert len(timeline.times) >= 1
    assert (np.diff(timeline.times) > 0).all()
    assert 0 <= timeline.times[0] <= timeline.times[-1] <= timeline.duration
    edges = [timeline.segments[0].start, *(s.end for s in timeline.segments)]
    assert (edges[0], edges[-1]) == (0, timeline.duration)
    assert edges == sorted(edges)
    gaps = [s[:2] for s in timeline.segments if s.label == UNREADABLE]
    assert gaps == ([pytest.approx((2, 5), abs=0.05)] if kind == "pause" else [])
    if kind == "one per second" and fps == 240:  # the video's own rate counts, not the model's
        assert timeline.times == pytest.approx(np.arange(1.5, 18))


def test_a_detector_that_fails_is_reported_in_one_line(video: Path, tmp_path: Path) -> None:
    def broken(image: np.ndarray) -> bool:
        raise ZeroDivisionError("mine")

    with pytest.raises(UserError, match="detector failed: ZeroDivisionError: mine"):
        run(video, tmp_path, frame_filter=broken)


def test_a_detector_is_loaded_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("def outside(image):\n    return image.mean() > 190\nnumber = 3\n")
    frame_filter = load_frame_filter(f"{file}:outside")
    assert frame_filter(np.full((2, 2, 3), 200, np.uint8))
    for text, message in (("nowhere.py:f", "no such file"), (f"{file}:number", "no function"),
                        (f"{file}", "no such file")):  # fmt: skip
        with pytest.raises(UserError, match=message):
            load_frame_filter(text)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Checkpoints of models with random weights."""
    folder = tmp_path_factory.mktemp("runs")

    def make(name: str, **options: object) -> Path:
        config = resolve(TrainConfig(model_name=name, image_size=32, n_frames=4, classes=CLASSES,
                                     **options))  # fmt: skip
        torch.manual_seed(0)
        run = folder / "_".join([name, *map(str, options.values())])
        run.mkdir(exist_ok=True)
        weights = build_model(config, 3).state_dict()
        state = {
            "model": weights,
            "config": dataclasses.asdict(config),
            "classes": list(CLASSES),
            "frame_rate": 5.0,
        }
        save_checkpoint(run / "best.pt", state)
        return run

    return make


def frames_of(path: Path, fps: float = 5.0) -> list[Frame]:
    return list(FileSource(path, fps, 32))


def online(model: nn.Module, fps: float = 5.0, stride: int = 1) -> OnlinePredictor:
    return OnlinePredictor(model, CLASSES, 4, 32, fps, stride)


def model_of(run: Path) -> nn.Module:
    return rebuild_model(load_checkpoint(run))


MODELS = [("tsm_resnet", {}), ("tsm_resnet", {"shift_mode": "causal"}), ("cnnlstm", {}),
          ("cnnlstm", {"bidirectional": True}), ("r2plus1d", {}), ("vivit", {}),
          ("timesformer", {}), ("video_swin", {}), ("mvit", {})]  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize(("name", "options"), MODELS)
def test_predictions_are_those_of_windows(name: str, options: dict, runs, video: Path) -> None:
    model, frames = model_of(runs(name, **options)), frames_of(video)[:11]
    predictor = online(model, stride=3)
    parts = [predictor.step(frames[:2]), predictor.step(frames[2:9]), predictor.step(frames[9:])]
    times = np.concatenate([part.times for part in parts])
    probabilities = np.concatenate([part.probabilities for part in parts])
    ends = list(range(3, 11, 1 if supports_streaming(model) else 3))
    wanted_times = [(frames[k - 3].time + frames[k].time) / 2 for k in ends]
    assert times.tolist() == pytest.approx(wanted_times)
    assert len(predictor.flush().times) == 0
    images = torch.from_numpy(np.stack([f.image for f in frames])).permute(0, 3, 1, 2)
    if options.get("shift_mode") == "causal":
        logits = model.frame_logits(images[None])[0][0]
        rows = [logits[k - 3 : k + 1].mean(0) for k in ends]
    else:
        rows = [model(images[None, k - 3 : k + 1])[0] for k in ends]
    wanted = torch.stack(rows).softmax(dim=1).double().numpy()
    np.testing.assert_allclose(probabilities, wanted, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(("name", "options"), MODELS[:3])
def test_a_short_video_is_predicted_as_a_short_clip(
    name: str, options: dict, runs, tmp_path
) -> None:
    path = tmp_path / "short.mp4"
    write_video(path, painted([("dark", 0.08), ("light", 0.04)]), 25, lossless=True)
    model = model_of(runs(name, **options))
    predictor = online(model, fps=25.0, stride=2)
    assert len(predictor.step(frames_of(path, fps=25.0)).times) == 0
    predictions = predictor.flush()
    clip = torch.from_numpy(read_clip(path, FrameSampler(4), 32).rgb).permute(0, 3, 1, 2)
    wanted = model(clip[None]).softmax(dim=1).double()
    np.testing.assert_allclose(predictions.probabilities, wanted, atol=1e-5)
    assert predictions.times.tolist() == pytest.approx([0.04])


def test_live_predictions_stand_at_the_newest_frame(runs, video: Path) -> None:
    frames = frames_of(video)[:6]
    predictor = online(model_of(runs("cnnlstm")))
    predictor.reset(live=True)
    predictions = [predictor.step([frame]) for frame in frames]
    assert [p.times.tolist() for p in predictions] == [[frame.time] for frame in frames]


@pytest.mark.parametrize(("name", "options"), MODELS[:3])
def test_after_a_long_pause_the_model_starts_anew(name: str, options: dict, runs, video) -> None:
    model = model_of(runs(name, **options))
    frames = frames_of(video)[:12]
    after = [frame._replace(time=frame.time + 3) for frame in frames[6:]]
    predictor = online(model)
    predictor.step(frames[:6])
    predictions, fresh = predictor.step(after), online(model).step(after)
    np.testing.assert_allclose(predictions.probabilities, fresh.probabilities, atol=1e-6)
    assert predictions.times.tolist() == fresh.times.tolist()
    short = [frame._replace(time=frame.time + 0.4) for frame in frames[6:]]  # it goes on
    predictor = online(model)
    predictor.step(frames[:6])
    assert len(predictor.step(short).times) == 6


def test_the_frame_rate_of_training_clips(tmp_path: Path) -> None:
    for number, seconds in enumerate((1.0, 2.0, 4.0)):
        write_video(tmp_path / f"{number}.mp4", painted([("dark", seconds)]), 25)
    paths = [tmp_path / f"{number}.mp4" for number in range(3)]
    assert effective_fps(paths, FrameSampler(16)) == 8.0
    assert effective_fps(paths, FrameSampler(16, "first")) == 25.0
    assert effective_fps(paths[:1], FrameSampler(40, "random")) == 25.0  # no frame is taken twice
    assert effective_fps([*paths[:1], tmp_path / "none.mp4"], FrameSampler(16)) == 16.0
    assert effective_fps([tmp_path / "none.mp4"], FrameSampler(16)) is None


def test_where_results_go(tmp_path: Path) -> None:
    a, b = tmp_path / "x" / "op.mp4", tmp_path / "y" / "op.mp4"
    assert output_folders([a, b], "") == [
        tmp_path / "x" / "op.mp4.timeline",
        tmp_path / "y" / "op.mp4.timeline",
    ]
    out = tmp_path / "out"
    assert output_folders([a, b], str(out)) == [
        out / "op.mp4.timeline",
        out / "op.mp4_2.timeline",
    ]
    (live,) = output_folders(["rtsp://anna:secret@host/../cam"], "")
    assert live.parent == Path("predictions")
    assert live.name.endswith("_rtsp_host_.._cam.timeline")
    assert "secret" not in live.name


def test_sources(tmp_path: Path, capsys) -> None:
    touch(tmp_path, "b.mp4", "deep/a.MKV", "notes.txt", "b.mp4.timeline/part.mp4", "empty/a.txt")
    assert find_sources((str(tmp_path),)) == [tmp_path / "b.mp4", tmp_path / "deep" / "a.MKV"]
    assert f"{tmp_path}: passed over: 2 .txt, 1 made by predict.py\n" == capsys.readouterr().out
    assert find_sources(("0",)) == ["0"]
    assert find_sources(("-",)) == ["-"]
    assert find_sources(("HTTP://host/a.mp4",)) == ["HTTP://host/a.mp4"]
    for texts, message in (
        ((), "no source"),
        (("missing.mp4",), "no such file"),
        ((str(tmp_path / "empty"),), "holds no video .passed over: 1 .txt."),
        ((str(tmp_path / "deep"), "0"), "must be the only source"),
    ):
        with pytest.raises(UserError, match=message):
            find_sources(texts)


def test_videos_behind_links_are_sources(tmp_path: Path) -> None:
    touch(tmp_path, "disk/a.mp4")
    link(tmp_path / "data/operations", tmp_path / "disk")
    link(tmp_path / "data/operations/all", tmp_path / "data")
    link(tmp_path / "data/b.mp4", tmp_path / "disk/a.mp4")
    (source,) = find_sources((str(tmp_path / "data"),))  # two names of one video
    assert source.resolve() == tmp_path / "disk/a.mp4"


def test_help_is_light() -> None:
    """Help does not import the large libraries."""
    code = (
        "import runpy, sys\nsys.argv = ['predict.py', '--help']\n"
        "try:\n    runpy.run_path('predict.py', run_name='__main__')\n"
        "except SystemExit:\n    print('imported', *sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "--reconnect-timeout" in done.stdout
    imported = set(done.stdout.split("imported ")[1].split())
    large = {"torch", "torchvision", "aiohttp", "matplotlib", "pandas", "scipy", "jinja2", "PIL"}
    assert not imported & large


def test_serve_needs_aiohttp(
    runs, video: Path, mistake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "aiohttp", None)
    ended = mistake(main, runs("tsm_resnet"), video, "--serve", cwd=tmp_path)
    assert ended.stderr == (
        "error: --serve needs a package: pip install -r requirements-optional.txt\n"
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--fps", "0"], "fps = 0"),
        (["--mean-duration", "inf"], "mean_duration = inf"),
        (["--out-of-body", str(ROOT / "README.md") + ":f"], "not a Python file"),
        (["--memory", "state"], "--memory"),
        (["--rate", "5"], "--rate is now called --fps"),
        (["--segment-seconds=5"], "--segment-seconds is now called --mean-duration"),
        (["--minimum-seconds", "5"], "--minimum-seconds is now called --min-duration"),
        (["--give-up", "5"], "--give-up is now called --reconnect-timeout"),
        (["--target-error", "0.1"], "was not calibrated on validation clips"),
        (["--min-duration", "-1"], "must be 0 or more"),
        (["--out-of-body", "x.py:f"], "no such file"),
    ],
)
def test_mistakes_are_one_line(flags: list, message: str, runs, video, mistake, tmp_path) -> None:
    ended = mistake(main, runs("tsm_resnet"), video, *flags, cwd=tmp_path)
    assert ended.code == 2
    assert message in ended.stderr
    assert "Traceback" not in ended.stderr


def test_models_with_positions_keep_their_frames(runs) -> None:
    for name, options in (("vivit", {}), ("timesformer", {}), ("mvit", {"model_size": "base"})):
        with pytest.raises(UserError, match=f"n_frames = 8: this {name} is made for 4 frames$"):
            build_predictor(PredictConfig(str(runs(name, **options)), (), n_frames=8))
    assert build_predictor(PredictConfig(str(runs("video_swin")), (), n_frames=8))[0].n_frames == 8


def test_an_old_checkpoint_needs_fps(runs, tmp_path) -> None:
    state = torch.load(runs("cnnlstm") / "best.pt", weights_only=True)
    del state["frame_rate"]
    save_checkpoint(tmp_path / "old.pt", state)
    with pytest.raises(UserError, match="give --fps"):
        build_predictor(PredictConfig(str(tmp_path / "old.pt"), ()))
    assert build_predictor(PredictConfig(str(tmp_path / "old.pt"), (), fps=7.0))[0].fps == 7.0


def test_a_model_whose_class_is_a_column_of_the_tables(runs, tmp_path: Path) -> None:
    state = torch.load(runs("cnnlstm") / "best.pt", weights_only=True)
    state["classes"] = state["config"]["classes"] = ["cut", "time", "out_of_body"]
    save_checkpoint(tmp_path / "own.pt", state)
    with pytest.raises(UserError, match=r"own\.pt: cannot be used .*\n.*'time'.*\n.*'out_of_body'"):
        build_predictor(PredictConfig(str(tmp_path / "own.pt"), ()))


def test_bad_files_are_reported_and_the_others_go_on(runs, video, tmp_path, run_main) -> None:
    for name in ("1.mp4", "3.mp4"):
        shutil.copy(video, tmp_path / name)
    (tmp_path / "2.mp4").write_bytes(b"no video at all")
    done = run_main(main, runs("cnnlstm"), ".", cwd=tmp_path, code=2)
    assert "2.mp4: cannot be read" in done.stderr
    assert "1 of 3 videos could not be predicted or written" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "2.mp4.timeline").exists()
    for name in ("1.mp4", "3.mp4"):
        folder = tmp_path / f"{name}.timeline"
        names = {"timeline.csv", "frames.csv", "timeline.vtt", "timeline.png", "timeline.html"}
        assert names <= {file.name for file in folder.iterdir()}
        segments = read_timeline(folder / "timeline.csv")[""]
        assert segments[0].start == 0
        assert segments[-1].end == 20
        assert (folder / "timeline.vtt").read_text().startswith("WEBVTT\n\n00:00:00.000 --> ")
        assert f'src="../{name}"' in (folder / "timeline.html").read_text()


def start(*arguments: object, cwd: Path) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, str(ROOT / "predict.py"), *map(str, arguments)],
        cwd=cwd,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def wait_for_rows(folder: Path, count: int) -> Path:
    """Wait until a frames.csv below a folder has more than `count` lines."""
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        for path in folder.rglob("frames.csv"):
            if path.read_bytes().count(b"\n") > count:
                return path
        time.sleep(0.05)
    raise AssertionError("no predictions came")


@pytest.fixture(scope="module")
def transport(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("transport") / "operation.ts"
    write_video(path, painted(PLAN), 25, group=25)
    return path.read_bytes()


@pytest.mark.skipif(os.name != "posix", reason="signals are sent")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_run_keeps_what_it_had(
    number: signal.Signals, runs, transport: bytes, tmp_path: Path
) -> None:
    """A pipe that does not end: after some predictions the run is stopped, or killed."""
    os.mkfifo(tmp_path / "pipe")
    arguments = [runs("cnnlstm"), "-", "--output", "out"]
    process = start_script("predict.py", *arguments, cwd=tmp_path, stdin=tmp_path / "pipe")
    with open(tmp_path / "pipe", "wb") as pipe:
        pipe.write(transport)
        pipe.flush()
        frames = wait_for_rows(tmp_path / "out", 20)
        os.kill(process.pid, number)
        process.join(60)  # the pipe is still open
    rows = rows_of(frames)
    assert all(len(row) == 4 for row in rows[:-1])
    if number == signal.SIGKILL:
        assert not (frames.parent / "timeline.csv").exists()
        return
    assert process.exitcode == 130
    assert "the results so far are written" in (tmp_path / "out.txt").read_text()
    segments = read_timeline(frames.parent / "timeline.csv")[""]
    assert float(rows[-1][0]) <= segments[-1].end <= 20
    assert "interrupted after" in (frames.parent / "timeline.html").read_text()


def test_a_pipe_gives_what_the_file_gives(runs, video: Path, transport: bytes, tmp_path) -> None:
    (tmp_path / "operation.ts").write_bytes(transport)
    process = start_script(
        "predict.py",
        *(runs("cnnlstm"), "-", "--output", "out"),
        cwd=tmp_path,
        stdin=tmp_path / "operation.ts",
    )
    process.join(90)
    assert process.exitcode == 0, (tmp_path / "out.txt").read_text()
    (folder,) = (tmp_path / "out").iterdir()
    assert folder.name.endswith("_pipe.timeline")
    piped = read_timeline(folder / "timeline.csv")[""]
    assert piped[-1].end == pytest.approx(20, abs=0.1)


def test_a_live_stream_is_shown_and_written_down(runs, transport: bytes, tmp_path: Path) -> None:
    """A network stream that is lost once, watched in the browser, and ended with Ctrl-C."""
    server = socket.create_server(("127.0.0.1", 0))
    server.settimeout(60)
    address = f"tcp://anna:secret@127.0.0.1:{server.getsockname()[1]}"
    process = start(runs("cnnlstm"), address, "--serve", "--output", "out", cwd=tmp_path)
    with server:
        for _ in range(2):
            connection, _ = server.accept()
            with connection:
                for start_byte in range(0, len(transport), 2000):
                    connection.sendall(transport[start_byte : start_byte + 2000])
                    time.sleep(0.02)
        watch = next(line for line in iter(process.stdout.readline, b"") if b"watch" in line)
        page = re.search(rb"http://127\.0\.0\.1:\d+/\S{20,}/", watch)[0].decode()
        with urllib.request.urlopen(page, timeout=10) as response:
            assert b"127.0.0.1" in response.read()  # the stream's name
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(page.rsplit("/", 2)[0] + "/", timeout=10)
        wait_for_rows(tmp_path / "out", 5)
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    (folder,) = (tmp_path / "out").iterdir()
    assert read_timeline(folder / "timeline.csv")[""][0].start == 0
    assert "<video" not in (folder / "timeline.html").read_text()
    written = stdout + stderr + b"".join(f.read_bytes() for f in folder.iterdir())
    assert b"secret" not in written
    assert b"as fast as it plays" not in written


def test_the_overlay_shows_nothing_from_outside(runs, run_main, tmp_path: Path) -> None:
    detector = tmp_path / "detector.py"
    detector.write_text("def outside(frame):\n    return frame.mean() < 80\n")
    plan = [("grey", 1.0), ("dark", 1.02), ("light", 1.5)]
    write_video(tmp_path / "a.mp4", painted(plan), 25)
    flags = ("--overlay", "--out-of-body", f"{detector}:outside")
    run_main(main, runs("vivit"), "a.mp4", *flags, cwd=tmp_path)
    folder = tmp_path / "a.mp4.timeline"
    pictures = [to_rgb(frame, None)[:240] for frame in decode(folder / "overlay.mp4", 0)]
    levels = [picture.mean() for picture in pictures]
    assert len(levels) == 25 + 26 + 38  # round(1.5 * 25)
    assert all(level == pytest.approx(216, abs=4) for level in levels[55:])
    assert all(level == pytest.approx(128, abs=4) for level in levels[:17])
    # The detector saw 5 frames per second: nothing is shown from the last one inside to the next.
    (outside,) = [s for s in read_timeline(folder / "timeline.csv")[""] if s.label == OUT_OF_BODY]
    hidden = range(math.ceil((outside.start - 1 / 5 - 1 / 25) * 25), 55)
    assert {round(levels[n]) for n in hidden} <= {39, 40, 41}
    assert all(pictures[n][:200].std() < 2 for n in hidden)  # an empty picture

    run_main(main, runs("vivit"), "a.mp4", cwd=tmp_path)
    assert not (folder / "overlay.mp4").exists()  # it would not fit the new timeline


@pytest.mark.parametrize("source", ["-", "0", "rtsp://10.255.255.1/stream"])
def test_a_live_source_has_no_overlay(source: str, runs, mistake, tmp_path: Path) -> None:
    ended = mistake(main, runs("vivit"), source, "--overlay", cwd=tmp_path)
    assert ended.stderr == (
        f"error: --overlay reads the video twice: for a file, not for {source}\n"
    )


def test_an_interrupt_while_the_overlay_is_written_leaves_none(
    runs, run_main, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_video(tmp_path / "a.mp4", painted([("grey", 1.0)]), 25)

    def interrupting(*arguments: object) -> np.ndarray:
        os.kill(os.getpid(), signal.SIGINT)
        return Band.below(*arguments)

    band = type("InterruptingBand", (Band,), {"below": interrupting})
    monkeypatch.setattr("timeline.overlay.Band", band)
    ended = run_main(main, runs("vivit"), "a.mp4", "--overlay", cwd=tmp_path, code=130)
    assert "interrupted: the results so far are written" in ended.stderr
    names = {path.name for path in (tmp_path / "a.mp4.timeline").iterdir()}
    assert "timeline.html" in names and not any("overlay" in name for name in names)


def test_explained_segments_are_those_of_the_model(
    runs, video: Path, run_main, tmp_path: Path
) -> None:
    """relevance.csv holds what the method says about windows of the video, at their times."""
    shutil.copy(video, tmp_path / "a.mp4")
    run, folder = runs("tsm_resnet"), tmp_path / "a.mp4.timeline"
    flags = ("--smoothing", "none", "--explain")
    ended = run_main(main, run, "a.mp4", *flags, cwd=tmp_path)
    assert ended.stdout.splitlines()[-1] == "relevance: a.mp4.timeline/relevance.csv"
    segments = read_timeline(folder / "timeline.csv")[""]
    header, *rows = rows_of(folder / "relevance.csv")
    assert header == ["segment", "start", "end", "label", "time", "relevance"]
    explained = {int(row[0]) for row in rows}
    assert explained == {n for n, s in enumerate(segments, 1) if s.label in CLASSES}

    frames = {round(frame.time, 3): frame.image for frame in frames_of(video)}
    model = model_of(run)
    for number in explained:
        segment, own = segments[number - 1], [row for row in rows if int(row[0]) == number]
        assert own[0][1:4] == [f"{segment.start:.3f}", f"{segment.end:.3f}", segment.label]
        times = [float(row[4]) for row in own]
        assert len(times) % 4 == 0 and len(times) <= 4 * 8
        if segment.end - segment.start > 0.8:
            assert segment.start <= times[0] and times[-1] <= segment.end
        windows = np.stack([frames[time] for time in times]).reshape(-1, 4, 32, 32, 3)
        clips = torch.from_numpy(windows).permute(0, 1, 4, 2, 3).contiguous()
        targets = torch.full((len(clips),), CLASSES.index(segment.label))
        expected = explain(model, clips, targets, default_method("tsm_resnet")).frames.flatten()
        values = [float(row[5]) for row in own]
        np.testing.assert_allclose(values, expected, rtol=1e-3, atol=1e-5)
    page = (folder / "timeline.html").read_text()
    data = json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])
    assert {int(key) + 1 for key in data["relevance"]} == explained
    assert "<dt>relevance</dt><dd>gradcam++</dd>" in page

    run_main(main, run, "a.mp4", *flags[:-1], cwd=tmp_path)
    assert not (folder / "relevance.csv").exists()  # it would not fit the new timeline
    assert 'id="relevance"' not in (folder / "timeline.html").read_text()


def test_a_folder_of_images_is_explained_and_what_is_outside_is_not(
    runs, run_main, tmp_path: Path
) -> None:
    plan = [("grey", 2.0), ("dark", 1.0), ("light", 2.0)]
    write_images(tmp_path / "frames", painted(plan, 10))
    detector = tmp_path / "detector.py"
    detector.write_text("def outside(frame):\n    return frame.mean() < 80\n")
    flags = ("--frame-rate", 10, "--explain")
    outside = ("--out-of-body", f"{detector}:outside")
    run_main(main, runs("vivit"), "frames", *flags, *outside, cwd=tmp_path)
    rows = rows_of(tmp_path / "frames.timeline" / "relevance.csv")[1:]
    times = np.array([row[4] for row in rows], float)
    assert len(times) and not ((times >= 2) & (times < 3)).any()
    assert (times < 2).any() and (times >= 3).any()


@pytest.mark.parametrize("source", ["-", "0", "rtsp://anna:secret@10.255.255.1/stream"])
def test_a_live_source_is_not_explained(source: str, runs, mistake, tmp_path: Path) -> None:
    ended = mistake(main, runs("vivit"), source, "--explain", cwd=tmp_path)
    assert ended.stderr.startswith("error: --explain reads the video twice: for a file or a folder")
    assert ended.stderr.count("\n") == 1
    assert "secret" not in ended.stderr


def test_an_interrupt_while_it_is_explained_leaves_the_timeline(
    runs, run_main, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_video(tmp_path / "a.mp4", painted([("grey", 60.0)], 5), 5)

    def interrupting(*arguments: object) -> np.ndarray:
        os.kill(os.getpid(), signal.SIGINT)
        return WindowExplainer.explain(*arguments)

    kind = type("Interrupting", (WindowExplainer,), {"explain": interrupting})
    monkeypatch.setattr("timeline.relevance.WindowExplainer", kind)
    flags = ("--explain", "--smoothing", "none")
    ended = run_main(main, runs("vivit"), "a.mp4", *flags, cwd=tmp_path, code=130)
    assert "interrupted: the results so far are written" in ended.stderr
    folder = tmp_path / "a.mp4.timeline"
    assert not (folder / "relevance.csv").exists()
    assert 'id="relevance"' not in (folder / "timeline.html").read_text()


def test_relevance_that_cannot_be_computed_leaves_the_timeline(
    runs, run_main, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_video(tmp_path / "a.mp4", painted([("grey", 2.0)]), 25)

    def fails(*_: object) -> np.ndarray:
        raise UserError("the relevance is not finite")

    monkeypatch.setattr("timeline.relevance.WindowExplainer.explain", fails)
    ended = run_main(main, runs("vivit"), "a.mp4", "--explain", cwd=tmp_path, code=2)
    assert "error: no relevance: the relevance is not finite" in ended.stderr
    assert (tmp_path / "a.mp4.timeline" / "timeline.csv").exists()
