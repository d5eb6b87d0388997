"""Other engines compute what torch does; auto takes the fastest, and keeps what it found."""

import json
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import lively
from torch import nn

from deployment import runtime
from deployment.runtime import build_engine, engine_device, fastest_engine, in_engine
from modeling.features import per_clip, recorded_features
from timeline.streaming import EngineStreamer, Streamer
from utils.errors import UserError
from vivit import ViViT

pytest.importorskip("openvino")
pytest.importorskip("onnxruntime")

N, SIZE = 4, 32
CPU, FP32 = torch.device("cpu"), torch.float32


def clips(batch: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(batch)
    shape = batch, N, 3, SIZE, SIZE
    return torch.randint(256, shape, generator=generator, dtype=torch.uint8)


def vivit() -> nn.Module:
    torch.manual_seed(0)
    return ViViT(7, n_frames=N, image_size=SIZE).eval()


@pytest.mark.parametrize("engine", ["openvino", "onnxruntime"])
@pytest.mark.parametrize("build", [lively, vivit])
@torch.inference_mode()
def test_an_engine_gives_the_logits_and_features_of_the_model(
    build: Callable[[], nn.Module], engine: str
) -> None:
    model = build()
    computed = build_engine(model, engine, N, SIZE)
    for batch in (1, 2, 5, 3, 4):  # more sizes than one engine is compiled for
        with recorded_features(model) as features, recorded_features(computed) as others:
            torch.testing.assert_close(
                computed(clips(batch)), model(clips(batch)), atol=1e-5, rtol=0
            )
        torch.testing.assert_close(
            per_clip(others[0], batch), per_clip(features[0], batch), atol=1e-5, rtol=1e-5
        )


def test_a_stream_is_the_same_in_an_engine() -> None:
    model = lively(shift_mode="causal")
    step = build_engine(model, "openvino", N, SIZE, step=True)
    ours, theirs = Streamer(model, N), EngineStreamer(step)
    frames = torch.cat([clips(1), clips(1).flip(1), clips(1)], dim=1)  # three windows
    first = theirs.step_many(frames)
    torch.testing.assert_close(first, ours.step_many(frames), atol=1e-5, rtol=0)
    theirs.reset()  # forgets everything
    torch.testing.assert_close(theirs.step_many(frames), first, atol=0, rtol=0)
    more = theirs.step_many(frames[:, :5])  # in pieces, going on
    torch.testing.assert_close(more, ours.step_many(frames[:, :5]), atol=1e-5, rtol=0)


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "surgical_clips" / "engines.json"


class Clock:
    """A clock that only the fake engines move on."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[str] = []

    def run(self, name: str, seconds: float) -> Callable[[], torch.Tensor]:
        def call() -> torch.Tensor:
            self.calls.append(name)
            self.now += seconds
            return torch.zeros(1, 7)

        return call


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, float]], Clock]:
    def install(seconds: dict[str, float]) -> Clock:
        clock = Clock()
        runs = {name: clock.run(name, value) for name, value in seconds.items()}
        monkeypatch.setattr(runtime, "_call", lambda _, name, *__: runs[name])
        monkeypatch.setattr(runtime.time, "perf_counter", lambda: clock.now)
        return clock

    return install


def test_auto_takes_the_fastest_and_remembers_it(
    cache: Path, fake: Callable, capsys: pytest.CaptureFixture
) -> None:
    clock = fake({"torch": 1.0, "openvino": 0.25, "onnxruntime": 0.5})
    assert fastest_engine(lively(), N, SIZE) == "openvino"
    told = capsys.readouterr().out.splitlines()
    assert told[-1].startswith("engine openvino: the fastest of a trial (ms per clip: torch 1000.0")
    assert clock.now < 20  # ten seconds of calls, in turn, and one of each before
    timed = clock.calls[-9:]
    assert timed == ["torch", "openvino", "onnxruntime"] * 3

    calls = len(clock.calls)
    assert fastest_engine(lively(), N, SIZE) == "openvino"
    assert len(clock.calls) == calls  # from the file
    assert "kept in" in capsys.readouterr().out
    fake({"torch": 0.1, "openvino": 0.25, "onnxruntime": 0.5})
    assert fastest_engine(lively(), 2 * N, SIZE) == "torch"  # other clips are another case
    assert fastest_engine(lively(num_classes=3), N, SIZE) == "torch"  # and so is another model
    assert len(json.loads(cache.read_text())) >= 2


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"a": 3}', '{"a": {"magic": 1.0}}'])
def test_a_damaged_cache_is_made_again(
    content: str, cache: Path, fake: Callable, capsys: pytest.CaptureFixture
) -> None:
    cache.parent.mkdir()
    cache.write_text(content)
    fake({"torch": 1.0, "openvino": 2.0, "onnxruntime": 3.0})
    assert fastest_engine(lively(), N, SIZE) == "torch"
    assert len(json.loads(cache.read_text())) == 1


def test_a_cache_that_cannot_be_written_is_told(
    cache: Path, fake: Callable, capsys: pytest.CaptureFixture
) -> None:
    cache.parent.parent.mkdir(exist_ok=True)
    cache.parent.write_text("a file")
    fake({"torch": 1.0, "openvino": 2.0, "onnxruntime": 3.0})
    assert fastest_engine(lively(), N, SIZE) == "torch"
    assert "not kept" in capsys.readouterr().out


def test_an_engine_with_other_logits_is_not_chosen(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def call(_: nn.Module, name: str, *__: object) -> Callable[[], torch.Tensor]:
        if name == "onnxruntime":
            raise RuntimeError("no such operator\nin this version")
        return lambda: torch.full((1, 7), float(name == "openvino"))

    monkeypatch.setattr(runtime, "_call", call)
    monkeypatch.setattr(runtime, "TRIAL_SECONDS", 0.0)
    assert fastest_engine(lively(), N, SIZE) == "torch"
    told = capsys.readouterr().out
    assert "openvino is left out: its logits differ by 1.0e+00" in told
    assert "onnxruntime is left out: no such operator\n" in told


def test_auto_is_torch_where_the_others_do_not_compute() -> None:
    model = lively()
    assert in_engine(model, "auto", N, SIZE, torch.device("cuda"), FP32) == (model, "torch")
    assert in_engine(model, "auto", N, SIZE, CPU, torch.bfloat16) == (model, "torch")
    assert in_engine(model, "torch", N, SIZE, CPU, FP32) == (model, "torch")


@pytest.mark.parametrize(
    ("device", "precision", "message"),
    [
        ("cuda", "fp32", "--engine openvino computes on the CPU: leave out --device cuda"),
        ("cpu", "bf16", "--engine openvino computes in fp32: leave out --precision bf16"),
    ],
)
def test_what_an_engine_cannot_do_is_refused(device: str, precision: str, message: str) -> None:
    assert engine_device("openvino", "auto", "auto") == (CPU, FP32)
    with pytest.raises(UserError, match=message):
        engine_device("openvino", device, precision)


def test_an_engine_uses_as_many_threads_as_torch() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        engine = build_engine(lively(), "onnxruntime", N, SIZE)
        threads = threading.active_count()
        engine(clips(1))
        assert engine._session.get_session_options().intra_op_num_threads == 1
        assert threading.active_count() == threads
        engine = build_engine(lively(), "openvino", N, SIZE)
        compiled = engine._request(1).get_compiled_model()
        assert compiled.get_property("INFERENCE_NUM_THREADS") == 1
    finally:
        torch.set_num_threads(before)
