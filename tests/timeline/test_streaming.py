"""Streaming against recomputing everything, over hundreds of frames."""

import gc

import pytest
import torch
from helpers import lively
from torch import nn

from cnn_lstm import CNNLSTM
from models import MODELS, build_model
from timeline.streaming import SlidingWindows, Streamer, can_stream
from utils.errors import UserError

N = 8  # frames a window
CLOSE = {"atol": 1e-5, "rtol": 0}


def video(streams: int, frames: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(
        0, 256, (streams, frames, 3, 32, 32), dtype=torch.uint8, generator=generator
    )


def causal_tsm(**options: object) -> nn.Module:
    return lively(shift_mode="causal", **options)


def cnn_lstm(**options: object) -> nn.Module:
    torch.manual_seed(0)
    model = CNNLSTM(**options).eval()
    with torch.no_grad():  # a random head says almost the same of everything
        model.head.weight *= 20
    return model


@torch.no_grad()
def of_window(model: nn.Module, frames: torch.Tensor, t: int) -> torch.Tensor:
    """What a model says of the window that ends at t as a clip, `(S, classes)`."""
    return model(frames[:, max(0, t - N + 1) : t + 1]).softmax(dim=-1).double()


@torch.no_grad()
def means_of(logits: torch.Tensor) -> torch.Tensor:
    """The mean of the last N frames' logits at each frame, as probabilities."""
    rows = [logits[:, max(0, t - N + 1) : t + 1].mean(dim=1) for t in range(logits.shape[1])]
    return torch.stack(rows, dim=1).softmax(dim=-1).double()


def one_by_one(streamer: Streamer, frames: torch.Tensor) -> torch.Tensor:
    return torch.stack([streamer.push(frames[:, t]) for t in range(frames.shape[1])], dim=1)


@pytest.mark.parametrize("options", [{}, {"shift_place": "stage", "shift_div": 4}])
def test_tsm_streams_what_it_says_of_the_whole_video(options: dict) -> None:
    model, frames = causal_tsm(**options), video(1, 300)
    found = one_by_one(Streamer(model, N), frames)
    with torch.no_grad():
        wanted = means_of(model.per_frame(frames)[0])  # all 300 frames as one batch
    torch.testing.assert_close(found, wanted, **CLOSE)
    assert (found.amax(dim=1) - found.amin(dim=1)).max() > 0.01  # the answers do differ
    with torch.no_grad():
        first = model(frames[:, :N]).softmax(dim=-1).double()
    torch.testing.assert_close(found[:, N - 1], first, **CLOSE)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temporal_pooling": "attention", "lstm_layers": 2},
        {"bidirectional": True, "temporal_pooling": "last"},
    ],
)
def test_cnn_lstm_streams_what_it_says_of_each_window(options: dict) -> None:
    model, frames = cnn_lstm(lstm_hidden=64, **options), video(1, 300)
    found = one_by_one(Streamer(model, N), frames)
    for t in [*range(N + 1), *range(20, 300, 40), 298, 299]:
        torch.testing.assert_close(found[:, t], of_window(model, frames, t), **CLOSE)
    with torch.no_grad():
        features = model.per_frame(frames)  # no frame's depend on others
        for t in range(300):
            logits = model.over_window(features[:, max(0, t - N + 1) : t + 1])
            torch.testing.assert_close(found[:, t], logits.softmax(-1).double(), **CLOSE)
    assert (found.amax(dim=1) - found.amin(dim=1)).max() > 0.01


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"temporal_pooling": "max", "lstm_layers": 2}])
def test_the_state_of_a_cnn_lstm_goes_on(options: dict) -> None:
    model, frames = cnn_lstm(lstm_hidden=64, **options), video(1, 300)
    found = one_by_one(Streamer(model, N, memory="state"), frames)
    outputs, _ = model.lstm(model.per_frame(frames))  # of the whole video at once
    rows = [model.conclude(outputs[:, max(0, t - N + 1) : t + 1]) for t in range(300)]
    torch.testing.assert_close(found, torch.stack(rows, 1).softmax(-1).double(), **CLOSE)
    assert not torch.allclose(found[:, 200], of_window(model, frames, 200), **CLOSE)


MEMORIES = [(causal_tsm, "window"), (cnn_lstm, "window"), (cnn_lstm, "state")]


@pytest.mark.parametrize(("make", "memory"), MEMORIES)
def test_several_streams_are_each_alone(make, memory: str) -> None:
    model, frames = make(), video(3, 14)
    together = one_by_one(Streamer(model, N, 3, memory), frames)
    for stream in range(3):
        alone = one_by_one(Streamer(model, N, 1, memory), frames[stream : stream + 1])
        torch.testing.assert_close(together[stream : stream + 1], alone, **CLOSE)


@pytest.mark.parametrize(("make", "memory"), MEMORIES)
def test_after_a_reset_nothing_is_left(make, memory: str) -> None:
    model, frames = make(), video(1, 10)
    streamer = Streamer(model, N, 1, memory)
    wanted = one_by_one(streamer, frames)
    one_by_one(streamer, video(1, 11, seed=1))
    streamer.reset()
    torch.testing.assert_close(one_by_one(streamer, frames), wanted, atol=1e-12, rtol=0)


@pytest.mark.parametrize(("make", "memory"), MEMORIES)
def test_one_stream_can_start_anew_among_others(make, memory: str) -> None:
    model, frames, next_video = make(), video(3, 12), video(1, 10, seed=1)
    streamer = Streamer(model, N, 3, memory)
    undisturbed = one_by_one(Streamer(model, N, 3, memory), frames)
    one_by_one(streamer, frames[:, :2])
    streamer.reset(1)
    mixed = frames[:, 2:].clone()
    mixed[1] = next_video[0]
    found = one_by_one(streamer, mixed)
    for stream in (0, 2):
        torch.testing.assert_close(found[stream], undisturbed[stream, 2:], **CLOSE)
    fresh = one_by_one(Streamer(model, N, 1, memory), next_video)
    torch.testing.assert_close(found[1], fresh[0], **CLOSE)


@pytest.mark.parametrize(("make", "memory"), MEMORIES)
def test_many_frames_at_once_get_the_same_answers(make, memory: str) -> None:
    model, frames = make(), video(2, 18)
    wanted = one_by_one(Streamer(model, N, 2, memory), frames)
    streamer = Streamer(model, N, 2, memory)
    parts = [streamer.push_many(part) for part in frames.split([1, 11, 2, 4], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), wanted, **CLOSE)


def test_windows_of_one_frame() -> None:
    frames = video(1, 5)
    for make, memory in MEMORIES:
        found = one_by_one(Streamer(make(), 1, 1, memory), frames)
        assert found.shape == (1, 5, 7)
    found = one_by_one(Streamer(cnn_lstm(), 1), frames)
    with torch.no_grad():
        wanted = torch.stack([cnn_lstm()(frames[:, t : t + 1]) for t in range(5)], 1).softmax(-1)
    torch.testing.assert_close(found, wanted.double(), **CLOSE)


def test_the_temperature_divides_the_logits() -> None:
    frames = video(1, 3)
    plain = one_by_one(Streamer(cnn_lstm(), N), frames)
    tempered = one_by_one(Streamer(cnn_lstm(), N, temperature=2.0), frames)
    torch.testing.assert_close(tempered, (plain.log() / 2).softmax(dim=-1))


@pytest.mark.parametrize(("make", "memory"), MEMORIES)
def test_memory_does_not_grow(make, memory: str) -> None:
    def held() -> int:
        gc.collect()
        tensors = [x for x in gc.get_objects() if issubclass(type(x), torch.Tensor)]
        packed = [x for x in tensors if x.layout is torch._mkldnn]  # has no storage
        plain = [x for x in tensors if x.layout is torch.strided]
        return sum(x.nbytes for x in packed) + sum(x.untyped_storage().nbytes() for x in plain)

    streamer, frames = Streamer(make(), N, 1, memory), video(1, 24)
    one_by_one(streamer, frames[:, :10])
    before = held()
    one_by_one(streamer, frames[:, 10:])
    assert held() == before


@pytest.mark.parametrize("name", MODELS)
def test_what_cannot_be_streamed_is_refused(name: str) -> None:
    options = {"image_size": 32, "n_frames": N} if name == "vivit" else {}
    model = build_model(name, 7, **options)
    assert can_stream(model) is (name == "cnn_lstm")
    assert not can_stream(build_model("cnn_lstm", 7, bidirectional=True), "state")
    assert not can_stream(build_model("tsm", 7), "state")
    if name != "cnn_lstm":
        with pytest.raises(UserError, match="trained with shift_mode causal"):
            Streamer(model, N)


def test_frames_of_the_wrong_number_of_streams_are_refused() -> None:
    with pytest.raises(ValueError, match="2 streams need frames"):
        Streamer(cnn_lstm(), N, 2).push(video(3, 1)[:, 0])


@torch.no_grad()
@pytest.mark.parametrize("stride", [1, 3, 11])
def test_sliding_windows(stride: int) -> None:
    model, frames = lively(), video(1, 30)
    windows = SlidingWindows(model, N, stride)
    for t in range(30):
        found = windows.push(frames[0, t])
        due = t >= N - 1 and (t - N + 1) % stride == 0
        assert (found is not None) is due
        if due:
            wanted = model(frames[:, t - N + 1 : t + 1]).softmax(dim=-1)[0]
            torch.testing.assert_close(found, wanted.double(), **CLOSE)
    windows.reset()
    assert [windows.push(frames[0, t]) is None for t in range(N)] == [True] * (N - 1) + [False]
