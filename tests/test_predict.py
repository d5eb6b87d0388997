"""predict.py: whole videos, live streams, bad files, interruptions; and the parts it is made of."""

import csv
import dataclasses
import itertools
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
from helpers import ROOT, run_script
from torch import nn

from checkpoint import save_checkpoint
from clips.manifest import UNCERTAIN
from config import TrainConfig
from evaluation.calibration import Calibration
from models import build_model_from_config
from predict import PredictConfig, find_inputs, main, make_recipe
from timeline.output import output_folders
from timeline.predictor import Follower, Recipe, load_hook
from timeline.segments import OUT_OF_BODY, UNREADABLE, Segment, Snapshot, read_timeline
from timeline.sources import FileSource, Picture
from timeline.streaming import Answerer, can_stream
from training.checks import resolve
from utils.errors import UserError
from video.clip_reader import read_clip, seen_frame_rate
from video.container import ClipError, decoding_stream, open_video
from video.encoder import write_video

CLASSES = ("dark", "grey", "light")
LEVELS = (40, 128, 216)  # of the classes, and what the frames of a video are painted with


class Brightness(nn.Module):
    """Knows the class of a window by its mean brightness."""

    def forward(self, clips: torch.Tensor) -> torch.Tensor:
        mean = clips.float().mean(dim=(1, 2, 3, 4))  # (B,)
        return -((mean[:, None] - torch.tensor(LEVELS)) ** 2) / 400


def painted(plan: Sequence[tuple[str, float]], rate: int = 25) -> Iterator[np.ndarray]:
    """Frames `(48, 64, 3)` of the classes' brightness, for so many seconds each."""
    for name, seconds in plan:
        level = LEVELS[CLASSES.index(name)]
        for _ in range(round(seconds * rate)):
            yield np.full((48, 64, 3), level, np.uint8)


PLAN = (("dark", 6.0), ("grey", 5.0), ("light", 3.0), ("grey", 6.0))


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("videos") / "an operation.mp4"
    write_video(path, painted(PLAN), 25, group=25)
    return path


def recipe(**changes: object) -> Recipe:
    settings = Recipe(
        model=Brightness(),
        classes=CLASSES,
        n_frames=8,
        image_size=16,
        rate=10.0,
        stride=2,
        memory="window",
        calibration=Calibration(threshold=0.4),
        smoothing="auto",
        segment_seconds=5.0,
        minimum_seconds=1.0,
        out_of_body=None,
        device=torch.device("cpu"),
        dtype=torch.float32,
    )
    return dataclasses.replace(settings, **changes)


def follow(path: Path, folder: Path, **changes: object):
    settings = recipe(**changes)
    with Follower(FileSource(path, settings.rate, settings.image_size), settings, folder) as one:
        return one.follow("test")


def rows_of(path: Path) -> list[list[str]]:
    return list(csv.reader(path.read_text().splitlines()))


def check_plan(segments: Sequence[Segment], tolerance: float) -> None:
    assert [segment.label for segment in segments] == [name for name, _ in PLAN]
    ends = list(itertools.accumulate(seconds for _, seconds in PLAN))
    assert [s.end for s in segments] == pytest.approx(ends, abs=tolerance)
    assert segments[0].start == 0
    assert all(segment.confidence > 0.9 for segment in segments)


def test_a_video_becomes_its_timeline(video: Path, tmp_path: Path) -> None:
    timeline = follow(video, tmp_path / "out")
    check_plan(timeline.segments, 0.2)
    assert timeline.duration == 20.0
    assert timeline.notes == []
    rows = rows_of(tmp_path / "out" / "frames.csv")
    assert rows[0] == ["time", *CLASSES]
    table = np.array(rows[1:], float)
    np.testing.assert_allclose(table[:, 0], timeline.times, atol=6e-4)
    np.testing.assert_allclose(table[:, 1:], timeline.probabilities, atol=6e-5)
    # windows of 8 pictures, a tenth of a second apart: the first stands at 0.35 s
    assert table[0, 0] == pytest.approx(0.36, abs=0.03)
    assert np.diff(table[:, 0]) == pytest.approx(0.2, abs=0.05)


def test_the_causal_filter_is_late_and_the_other_is_not(video: Path, tmp_path: Path) -> None:
    early = follow(video, tmp_path, smoothing="viterbi").segments
    late = follow(video, tmp_path, smoothing="causal").segments
    late = [segment for segment in late if segment.label != UNCERTAIN]  # while it changes its mind
    assert [s.label for s in late] == [s.label for s in early]
    assert all(b.start > a.start for a, b in zip(early[1:], late[1:], strict=True))


def test_without_smoothing_each_answer_counts(video: Path, tmp_path: Path) -> None:
    timeline = follow(video, tmp_path, smoothing="none")
    sure = timeline.probabilities.max(axis=1) >= 0.4
    said = [CLASSES[k] if s else UNCERTAIN
            for k, s in zip(timeline.probabilities.argmax(1), sure, strict=True)]  # fmt: skip
    assert [s.label for s in timeline.segments] == [key for key, _ in itertools.groupby(said)]


def test_nothing_is_answered_without_a_threshold(video: Path, tmp_path: Path) -> None:
    timeline = follow(video, tmp_path, calibration=Calibration(threshold=None))
    assert [segment.label for segment in timeline.segments] == [UNCERTAIN]


def test_a_bad_stretch_is_marked_and_bridged(video: Path, tmp_path: Path) -> None:
    data = bytearray(video.read_bytes())
    with open_video(video) as container:
        stream = decoding_stream(container, 0)
        for packet in container.demux(stream):
            if packet.pts is not None and 8 <= packet.pts * packet.time_base < 10:
                data[packet.pos : packet.pos + packet.size] = b"\xff" * packet.size
    bad = tmp_path / "bad.mp4"
    bad.write_bytes(data)
    timeline = follow(bad, tmp_path)
    labels = [segment.label for segment in timeline.segments]
    assert labels == ["dark", "grey", UNREADABLE, "grey", "light", "grey"]
    assert timeline.segments[2][:2] == pytest.approx((8.0, 10.0), abs=0.1)
    assert len(timeline.notes) == 1


def test_frames_out_of_the_body_are_not_looked_at(video: Path, tmp_path: Path) -> None:
    shown = []

    class Spy(Brightness):
        def forward(self, clips: torch.Tensor) -> torch.Tensor:
            shown.append(float(clips.float().mean()))
            return super().forward(clips)

    timeline = follow(video, tmp_path, model=Spy(), out_of_body=lambda image: image.mean() > 190)
    assert [segment.label for segment in timeline.segments] == ["dark", "grey", OUT_OF_BODY, "grey"]
    assert timeline.segments[2][:2] == pytest.approx((11.0, 14.0), abs=0.15)
    assert max(shown) < 140  # nothing light, not even in a mixture


def test_a_video_wholly_out_of_the_body(video: Path, tmp_path: Path) -> None:
    timeline = follow(video, tmp_path, out_of_body=lambda image: True)
    assert [segment[:3] for segment in timeline.segments] == [(0.0, 20.0, OUT_OF_BODY)]
    assert len(timeline.times) == 0


def test_viewers_do_not_see_what_is_out_of_the_body(video: Path, tmp_path: Path) -> None:
    settings = recipe(out_of_body=lambda image: np.bool_(image.mean() > 190))
    source = FileSource(video, 10.0, 16, preview=True)
    seen: list[Snapshot] = []
    with Follower(source, settings, tmp_path, on_update=seen.append) as follower:
        follower.follow("test")
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

    source = Live(video, 10.0, 16)
    with Follower(source, recipe(stride=1), tmp_path) as follower:
        assert follower._kind == "causal"
    with Follower(FileSource(video, 10.0, 16), recipe(), tmp_path) as follower:
        assert follower._kind == "viterbi"


def test_an_error_in_the_middle_keeps_what_is_known(video: Path, tmp_path: Path) -> None:
    class Breaks(FileSource):
        def __iter__(self) -> Iterator[Picture]:
            yield from itertools.islice(super().__iter__(), 80)
            raise ClipError(self.name, "the disk is gone")

    with Follower(Breaks(video, 10.0, 16), recipe(), tmp_path) as follower:
        timeline = follower.follow("test")
    assert timeline.segments[0].label == "dark"
    assert "the disk is gone" in timeline.notes[-1]


def test_a_detector_that_fails_is_told_in_one_line(video: Path, tmp_path: Path) -> None:
    def broken(image: np.ndarray) -> bool:
        raise ZeroDivisionError("mine")

    with pytest.raises(UserError, match="detector failed: ZeroDivisionError: mine"):
        follow(video, tmp_path, out_of_body=broken)


def test_a_detector_is_loaded_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("def outside(image):\n    return image.mean() > 190\nnumber = 3\n")
    hook = load_hook(f"{file}:outside")
    assert hook(np.full((2, 2, 3), 200, np.uint8))
    for text, words in (("nowhere.py:f", "no such file"), (f"{file}:number", "no function"),
                        (f"{file}", "no such file")):  # fmt: skip
        with pytest.raises(UserError, match=words):
            load_hook(text)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Checkpoints of models with random weights."""
    folder = tmp_path_factory.mktemp("runs")

    def make(model: str, **options: object) -> Path:
        config = resolve(TrainConfig(model=model, image_size=32, n_frames=4, classes=CLASSES,
                                     **options))  # fmt: skip
        torch.manual_seed(0)
        settings = dataclasses.asdict(config)
        run = folder / "_".join([model, *map(str, options.values())])
        run.mkdir(exist_ok=True)
        weights = build_model_from_config(settings, 3).state_dict()
        state = {"model": weights, "config": settings, "classes": list(CLASSES), "frame_rate": 5.0}
        save_checkpoint(run / "best.pt", state)
        return run

    return make


def pictures_of(path: Path, size: int = 32, rate: float = 5.0) -> list[Picture]:
    return list(FileSource(path, rate, size))


MODELS = [("tsm", {}), ("tsm", {"shift_mode": "causal"}), ("cnn_lstm", {}),
          ("cnn_lstm", {"bidirectional": True}), ("r2plus1d", {}), ("vivit", {})]  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize(("name", "options"), MODELS)
def test_answers_are_those_of_windows(name: str, options: dict, runs, video: Path) -> None:
    config = PredictConfig(str(runs(name, **options)), ())
    settings, _ = make_recipe(config)
    model, pictures = settings.model, pictures_of(video)[:11]
    answerer = Answerer(model, 3, 4, 5.0, 3)
    parts = [answerer.push(pictures[:2]), answerer.push(pictures[2:9]), answerer.push(pictures[9:])]
    times = np.concatenate([part.times for part in parts])
    found = np.concatenate([part.probabilities for part in parts])
    ends = list(range(3, 11, 1 if can_stream(model) else 3))
    wanted_times = [(pictures[k - 3].time + pictures[k].time) / 2 for k in ends]
    assert times.tolist() == pytest.approx(wanted_times)
    assert len(answerer.finish().times) == 0
    images = torch.from_numpy(np.stack([p.image for p in pictures])).permute(0, 3, 1, 2)
    if options.get("shift_mode") == "causal":
        logits = model.per_frame(images[None])[0][0]
        rows = [logits[k - 3 : k + 1].mean(0) for k in ends]
    else:
        rows = [model(images[None, k - 3 : k + 1])[0] for k in ends]
    wanted = torch.stack(rows).softmax(dim=1).double().numpy()
    np.testing.assert_allclose(found, wanted, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(("name", "options"), MODELS[:3])
def test_a_short_video_is_answered_as_a_short_clip(
    name: str, options: dict, runs, tmp_path
) -> None:
    path = tmp_path / "short.mp4"
    write_video(path, painted([("dark", 0.08), ("light", 0.04)]), 25, lossless=True)
    settings, _ = make_recipe(PredictConfig(str(runs(name, **options)), ()))
    answerer = Answerer(settings.model, 3, 4, 25.0, 2)
    assert len(answerer.push(pictures_of(path, rate=25.0)).times) == 0
    answers = answerer.finish()
    clip = torch.from_numpy(read_clip(path, 4, size=32)).permute(0, 3, 1, 2)
    wanted = settings.model(clip[None]).softmax(dim=1).double()
    np.testing.assert_allclose(answers.probabilities, wanted, atol=1e-5)
    assert answers.times.tolist() == pytest.approx([0.04])


def test_live_answers_stand_at_the_newest_picture(runs, video: Path) -> None:
    settings, _ = make_recipe(PredictConfig(str(runs("cnn_lstm")), ()))
    pictures = pictures_of(video)[:6]
    answerer = Answerer(settings.model, 3, 4, 5.0, 1, live=True)
    answers = [answerer.push([picture]) for picture in pictures]
    assert [a.times.tolist() for a in answers] == [[picture.time] for picture in pictures]


@pytest.mark.parametrize(("name", "options"), MODELS[:3])
def test_after_a_long_gap_the_model_starts_anew(name: str, options: dict, runs, video) -> None:
    settings, _ = make_recipe(PredictConfig(str(runs(name, **options)), ()))
    pictures = pictures_of(video)[:12]
    after = [picture._replace(time=picture.time + 3) for picture in pictures[6:]]
    answerer = Answerer(settings.model, 3, 4, 5.0, 1)
    answerer.push(pictures[:6])
    found = answerer.push(after)
    fresh = Answerer(settings.model, 3, 4, 5.0, 1).push(after)
    np.testing.assert_allclose(found.probabilities, fresh.probabilities, atol=1e-6)
    assert found.times.tolist() == fresh.times.tolist()
    small = [picture._replace(time=picture.time + 0.4) for picture in pictures[6:]]  # it goes on
    goes_on = Answerer(settings.model, 3, 4, 5.0, 1)
    goes_on.push(pictures[:6])
    assert len(goes_on.push(small).times) == 6


def test_the_frame_rate_of_training_clips(tmp_path: Path) -> None:
    for number, seconds in enumerate((1.0, 2.0, 4.0)):
        write_video(tmp_path / f"{number}.mp4", painted([("dark", seconds)]), 25)
    paths = [tmp_path / f"{number}.mp4" for number in range(3)]
    assert seen_frame_rate(paths, 16, "uniform") == 8.0
    assert seen_frame_rate(paths, 16, "first") == 25.0
    assert seen_frame_rate(paths[:1], 40, "random") == 25.0  # no frame is taken twice
    assert seen_frame_rate([*paths[:1], tmp_path / "none.mp4"], 16, "uniform") == 16.0
    assert seen_frame_rate([tmp_path / "none.mp4"], 16, "uniform") is None


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


def test_inputs(video: Path, tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    for name in ("b.mp4", "deep/a.MKV", "notes.txt"):
        (tmp_path / name).write_bytes(b"")
    assert find_inputs((str(tmp_path),)) == [tmp_path / "b.mp4", tmp_path / "deep" / "a.MKV"]
    assert find_inputs(("0",)) == ["0"]
    assert find_inputs(("-",)) == ["-"]
    for inputs, words in (
        ((), "nothing to look at"),
        (("missing.mp4",), "no such file"),
        ((str(tmp_path / "deep"), "0"), "goes alone"),
    ):
        with pytest.raises(UserError, match=words):
            find_inputs(inputs)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--rate", "0"], "rate = 0"),
        (["--segment-seconds", "inf"], "segment_seconds = inf"),
        (["--out-of-body", str(ROOT / "README.md") + ":f"], "not a Python file"),
        (["--memory", "state"], "reads forward only"),
        (["--wanted-error", "0.1"], "be calibrated"),
        (["--minimum-seconds", "-1"], "must be 0 or more"),
        (["--out-of-body", "x.py:f"], "no such file"),
    ],
)
def test_mistakes_are_one_line(flags: list, words: str, runs, video, mistake, tmp_path) -> None:
    found = mistake(main, runs("tsm"), video, *flags, cwd=tmp_path)
    assert found.code == 2
    assert words in found.stderr
    assert "Traceback" not in found.stderr


def test_a_vivit_keeps_its_frames_and_an_old_checkpoint_asks_for_its_rate(runs, tmp_path) -> None:
    with pytest.raises(UserError, match="made for 4 frames"):
        make_recipe(PredictConfig(str(runs("vivit")), (), n_frames=8))
    state = torch.load(runs("cnn_lstm") / "best.pt", weights_only=True)
    del state["frame_rate"]
    save_checkpoint(tmp_path / "old.pt", state)
    with pytest.raises(UserError, match="give --rate"):
        make_recipe(PredictConfig(str(tmp_path / "old.pt"), ()))
    assert make_recipe(PredictConfig(str(tmp_path / "old.pt"), (), rate=7.0))[0].rate == 7.0


def test_bad_files_are_told_and_the_others_go_on(runs, video: Path, tmp_path: Path) -> None:
    """The script, as a person starts it."""
    for name in ("1.mp4", "3.mp4"):
        shutil.copy(video, tmp_path / name)
    (tmp_path / "2.mp4").write_bytes(b"no video at all")
    done = run_script("predict.py", runs("cnn_lstm"), ".", cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert "2.mp4: cannot be read" in done.stderr
    assert "1 of 3 videos could not be read" in done.stderr
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
    """Wait until some frames.csv below a folder has so many lines."""
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        for path in folder.rglob("frames.csv"):
            if path.read_bytes().count(b"\n") > count:
                return path
        time.sleep(0.05)
    raise AssertionError("no answers came")


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
    """A pipe that does not end: after some answers the run is stopped, or killed."""
    process = start(runs("cnn_lstm"), "-", "--output", "out", cwd=tmp_path)
    process.stdin.write(transport)
    process.stdin.flush()
    frames = wait_for_rows(tmp_path / "out", 20)
    process.send_signal(number)
    process.wait(60)  # the pipe is still open
    process.stdin.close()
    stderr = process.stderr.read().decode()
    process.stdout.close()
    process.stderr.close()
    rows = rows_of(frames)
    assert all(len(row) == 4 for row in rows[:-1])
    if number == signal.SIGKILL:
        assert not (frames.parent / "timeline.csv").exists()
        return
    assert process.returncode == 130
    assert "what was known by then is written" in stderr
    segments = read_timeline(frames.parent / "timeline.csv")[""]
    assert float(rows[-1][0]) <= segments[-1].end <= 20
    assert "interrupted after" in (frames.parent / "timeline.html").read_text()


def test_a_pipe_gives_what_the_file_gives(runs, video: Path, transport: bytes, tmp_path) -> None:
    process = start(runs("cnn_lstm"), "-", "--output", "out", cwd=tmp_path)
    _, stderr = process.communicate(transport, timeout=90)
    assert process.returncode == 0, stderr
    (folder,) = (tmp_path / "out").iterdir()
    assert folder.name.endswith("_pipe.timeline")
    piped = read_timeline(folder / "timeline.csv")[""]
    assert piped[-1].end == pytest.approx(20, abs=0.1)


def test_a_live_stream_is_shown_and_written_down(runs, transport: bytes, tmp_path: Path) -> None:
    """A network stream that is lost once, looked at in the browser, and ended with Ctrl-C."""
    server = socket.create_server(("127.0.0.1", 0))
    server.settimeout(60)
    address = f"tcp://anna:secret@127.0.0.1:{server.getsockname()[1]}"
    process = start(runs("cnn_lstm"), address, "--serve", "--output", "out", cwd=tmp_path)
    with server:
        for _ in range(2):
            connection, _ = server.accept()
            with connection:
                for place in range(0, len(transport), 2000):
                    connection.sendall(transport[place : place + 2000])
                    time.sleep(0.02)
        page = re.search(r"http://127\.0\.0\.1:\d+/\S{20,}/", process.stdout.readline().decode())[0]
        with urllib.request.urlopen(page, timeout=10) as answer:
            assert b"127.0.0.1" in answer.read()  # the stream's name
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(page.rsplit("/", 2)[0] + "/", timeout=10)
        wait_for_rows(tmp_path / "out", 5)
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    (folder,) = (tmp_path / "out").iterdir()
    assert read_timeline(folder / "timeline.csv")[""][0].start == 0
    assert "<video" not in (folder / "timeline.html").read_text()
    said = stdout + stderr + b"".join(f.read_bytes() for f in folder.iterdir())
    assert b"secret" not in said
    assert b"as fast as it plays" not in said
