"""Streaming against recomputing everything, over hundreds of frames."""

import gc
import itertools

import pytest
import torch
from helpers import lively
from torch import nn

from cnn_lstm import CNNLSTM
from config import TrainConfig
from models import MODELS, build_model
from timeline import streaming
from timeline.sources import Frame
from timeline.streaming import OnlinePredictor, SlidingWindows, Streamer, supports_streaming
from utils.errors import UserError

N = 8  # frames per window
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
    with torch.no_grad():  # a random head gives almost the same logits for all clips
        model.head.weight *= 20
    return model


@torch.no_grad()
def of_window(model: nn.Module, frames: torch.Tensor, t: int) -> torch.Tensor:
    """The prediction for the window that ends at t as a clip, `(S, classes)`."""
    return model(frames[:, max(0, t - N + 1) : t + 1]).softmax(dim=-1).double()


@torch.no_grad()
def means_of(logits: torch.Tensor) -> torch.Tensor:
    """The mean of the logits of the last N frames at each frame, as probabilities."""
    rows = [logits[:, max(0, t - N + 1) : t + 1].mean(dim=1) for t in range(logits.shape[1])]
    return torch.stack(rows, dim=1).softmax(dim=-1).double()


def one_by_one(streamer: Streamer, frames: torch.Tensor) -> torch.Tensor:
    return torch.stack([streamer.step(frames[:, t]) for t in range(frames.shape[1])], dim=1)


@pytest.mark.parametrize("options", [{}, {"shift_place": "stage", "shift_div": 4}])
def test_tsm_streams_its_predictions_for_the_whole_video(options: dict) -> None:
    model, frames = causal_tsm(**options), video(1, 300)
    predictions = one_by_one(Streamer(model, N), frames)
    with torch.no_grad():
        wanted = means_of(model.frame_logits(frames)[0])  # all 300 frames as one batch
    torch.testing.assert_close(predictions, wanted, **CLOSE)
    assert (
        predictions.amax(dim=1) - predictions.amin(dim=1)
    ).max() > 0.01  # the predictions do differ
    with torch.no_grad():
        first = model(frames[:, :N]).softmax(dim=-1).double()
    torch.testing.assert_close(predictions[:, N - 1], first, **CLOSE)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temporal_pooling": "attention", "lstm_layers": 2},
        {"bidirectional": True, "temporal_pooling": "last"},
    ],
)
def test_cnn_lstm_streams_its_predictions_for_each_window(options: dict) -> None:
    model, frames = cnn_lstm(lstm_hidden=64, **options), video(1, 300)
    predictions = one_by_one(Streamer(model, N), frames)
    for t in [*range(N + 1), *range(20, 300, 40), 298, 299]:
        torch.testing.assert_close(predictions[:, t], of_window(model, frames, t), **CLOSE)
    with torch.no_grad():
        features = model.frame_features(frames)  # those of a frame do not depend on others
        for t in range(300):
            logits = model.consensus(features[:, max(0, t - N + 1) : t + 1])
            torch.testing.assert_close(predictions[:, t], logits.softmax(-1).double(), **CLOSE)
    assert (predictions.amax(dim=1) - predictions.amin(dim=1)).max() > 0.01


MODELS_TO_STREAM = [causal_tsm, cnn_lstm]


@pytest.mark.parametrize("make", MODELS_TO_STREAM)
def test_several_streams_are_each_alone(make) -> None:
    model, frames = make(), video(3, 14)
    together = one_by_one(Streamer(model, N, 3), frames)
    for stream in range(3):
        alone = one_by_one(Streamer(model, N, 1), frames[stream : stream + 1])
        torch.testing.assert_close(together[stream : stream + 1], alone, **CLOSE)


@pytest.mark.parametrize("make", MODELS_TO_STREAM)
def test_after_a_reset_nothing_is_left(make) -> None:
    model, frames = make(), video(1, 10)
    streamer = Streamer(model, N, 1)
    wanted = one_by_one(streamer, frames)
    one_by_one(streamer, video(1, 11, seed=1))
    streamer.reset()
    torch.testing.assert_close(one_by_one(streamer, frames), wanted, atol=1e-12, rtol=0)


@pytest.mark.parametrize("make", MODELS_TO_STREAM)
def test_one_stream_can_start_anew_among_others(make) -> None:
    model, frames, next_video = make(), video(3, 12), video(1, 10, seed=1)
    streamer = Streamer(model, N, 3)
    undisturbed = one_by_one(Streamer(model, N, 3), frames)
    one_by_one(streamer, frames[:, :2])
    streamer.reset(1)
    mixed = frames[:, 2:].clone()
    mixed[1] = next_video[0]
    predictions = one_by_one(streamer, mixed)
    for stream in (0, 2):
        torch.testing.assert_close(predictions[stream], undisturbed[stream, 2:], **CLOSE)
    fresh = one_by_one(Streamer(model, N, 1), next_video)
    torch.testing.assert_close(predictions[1], fresh[0], **CLOSE)


@pytest.mark.parametrize("make", MODELS_TO_STREAM)
def test_many_frames_at_once_give_the_same_predictions(make) -> None:
    model, frames = make(), video(2, 18)
    wanted = one_by_one(Streamer(model, N, 2), frames)
    streamer = Streamer(model, N, 2)
    parts = [streamer.step_many(part) for part in frames.split([1, 11, 2, 4], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), wanted, **CLOSE)


def test_windows_of_one_frame() -> None:
    frames = video(1, 5)
    for make in MODELS_TO_STREAM:
        predictions = one_by_one(Streamer(make(), 1, 1), frames)
        assert predictions.shape == (1, 5, 7)
    predictions = one_by_one(Streamer(cnn_lstm(), 1), frames)
    with torch.no_grad():
        wanted = torch.stack([cnn_lstm()(frames[:, t : t + 1]) for t in range(5)], 1).softmax(-1)
    torch.testing.assert_close(predictions, wanted.double(), **CLOSE)


def test_the_temperature_divides_the_logits() -> None:
    frames = video(1, 3)
    plain = one_by_one(Streamer(cnn_lstm(), N), frames)
    calibrated = one_by_one(Streamer(cnn_lstm(), N, temperature=2.0), frames)
    torch.testing.assert_close(calibrated, (plain.log() / 2).softmax(dim=-1))


@pytest.mark.parametrize("make", MODELS_TO_STREAM)
def test_memory_does_not_grow(make) -> None:
    def held() -> int:
        gc.collect()
        tensors = [x for x in gc.get_objects() if issubclass(type(x), torch.Tensor)]
        packed = [x for x in tensors if x.layout is torch._mkldnn]  # has no storage
        plain = [x for x in tensors if x.layout is torch.strided]
        return sum(x.nbytes for x in packed) + sum(x.untyped_storage().nbytes() for x in plain)

    streamer, frames = Streamer(make(), N, 1), video(1, 24)
    one_by_one(streamer, frames[:, :10])
    before = held()
    one_by_one(streamer, frames[:, 10:])
    assert held() == before


@pytest.mark.parametrize("name", MODELS)
def test_other_models_are_refused(name: str) -> None:
    model = build_model(TrainConfig(model_name=name, image_size=32, n_frames=N))
    assert supports_streaming(model) is (name == "cnnlstm")
    if name != "cnnlstm":
        with pytest.raises(UserError, match="trained with shift_mode causal"):
            Streamer(model, N)


def test_frames_of_the_wrong_number_of_streams_are_refused() -> None:
    with pytest.raises(ValueError, match="2 streams need frames"):
        Streamer(cnn_lstm(), N, 2).step(video(3, 1)[:, 0])


@torch.no_grad()
@pytest.mark.parametrize("stride", [1, 3, 11])
def test_sliding_windows(stride: int) -> None:
    model, frames = lively(), video(1, 30)
    windows = SlidingWindows(model, N, stride)
    for t in range(30):
        predictions = windows.step(frames[0, t])
        due = t >= N - 1 and (t - N + 1) % stride == 0
        assert (predictions is not None) is due
        if due:
            wanted = model(frames[:, t - N + 1 : t + 1]).softmax(dim=-1)[0]
            torch.testing.assert_close(predictions, wanted.double(), **CLOSE)
    windows.reset()
    assert [windows.step(frames[0, t]) is None for t in range(N)] == [True] * (N - 1) + [False]


def frames_of(images: torch.Tensor, fps: float) -> list[Frame]:
    """Images `(n, C, H, W)` as frames of a video."""
    return [Frame(i / fps, x.permute(1, 2, 0).numpy()) for i, x in enumerate(images)]


@pytest.mark.parametrize("make", [causal_tsm, cnn_lstm, lively])
def test_a_predictor_is_prepared_once_for_many_videos(
    make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a reset, live or not, it predicts as a new one does; the model is not copied again."""
    model = make()
    videos = [frames_of(video(1, length, seed)[0], 5.0) for seed, length in enumerate((20, 5, 13))]

    def fresh() -> OnlinePredictor:
        return OnlinePredictor(model, "abcdefg", N, 32, 5.0, 3)

    predictor = fresh()
    expected = {}
    for live, (number, frames) in itertools.product((False, True), enumerate(videos)):
        other = fresh()
        other.reset(live)
        expected[live, number] = [other.step(frames), other.flush()]
    monkeypatch.setattr(streaming, "prepare_for_inference", None)
    for live, number in expected:
        predictor.reset(live)
        for part, wanted in zip(
            [predictor.step(videos[number]), predictor.flush()], expected[live, number], strict=True
        ):
            assert part.times.tolist() == wanted.times.tolist()
            torch.testing.assert_close(*map(torch.from_numpy, (part[1], wanted[1])), **CLOSE)
    assert len(expected[False, 1][1].times) == 1  # the short recording is predicted at its end
