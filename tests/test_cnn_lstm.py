"""CNN-LSTM against a loop over LSTM cells, and each pooling by hand."""

import pytest
import torch
from torch import nn

from cnn_lstm import CNNLSTM, Standardise, signed_root, temporal_statistics


def build(seed: int = 0, **options: object) -> CNNLSTM:
    torch.manual_seed(seed)
    return CNNLSTM(**options).eval()


def clips(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0))


def run_cell(lstm: nn.LSTM, suffix: str, x: torch.Tensor) -> torch.Tensor:
    """`(B, T, features)` to `(B, T, hidden)`: a cell with the LSTM's weights, frame by frame."""
    cell = nn.LSTMCell(x.shape[2], lstm.hidden_size)
    for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
        getattr(cell, kind).data = getattr(lstm, f"{kind}_{suffix}").data
    hidden, memory = torch.zeros(2, len(x), lstm.hidden_size)
    outputs = []
    for t in range(x.shape[1]):
        hidden, memory = cell(x[:, t], (hidden, memory))
        outputs.append(hidden)
    return torch.stack(outputs, dim=1)


def test_parameters() -> None:
    assert sum(p.numel() for p in CNNLSTM().parameters()) == 13_281_351


@torch.no_grad()
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("pooling", ["mean", "last", "max", "attention"])
def test_model_equals_the_loop(layers: int, bidirectional: bool, pooling: str) -> None:
    model = build(
        lstm_hidden=12, lstm_layers=layers, bidirectional=bidirectional, temporal_pooling=pooling
    )
    x = clips(2, 3, 3, 32, 32)
    # One frame at a time: features of a batch would hide a confusion of clips and frames.
    features = [[model.backbone(model.normalize(x[b : b + 1, t])) for t in range(3)]
                for b in range(2)]  # fmt: skip
    out = torch.stack([torch.cat(frames) for frames in features])  # (B, T, 512)
    for layer in range(layers):
        forward = run_cell(model.lstm, f"l{layer}", out)
        if bidirectional:
            backward = run_cell(model.lstm, f"l{layer}_reverse", out.flip(1)).flip(1)
            out = torch.cat((forward, backward), dim=2)
        else:
            out = forward

    if pooling == "mean":
        pooled = (out[:, 0] + out[:, 1] + out[:, 2]) / 3
    elif pooling == "max":
        pooled = torch.maximum(torch.maximum(out[:, 0], out[:, 1]), out[:, 2])
    elif pooling == "attention":
        scores = (out @ model.attention.weight[0] + model.attention.bias).exp()  # (B, T)
        pooled = sum(out[:, t] * (scores[:, t] / scores.sum(1))[:, None] for t in range(3))
    elif bidirectional:  # each direction where it has seen all frames
        pooled = torch.cat((out[:, 2, :12], out[:, 0, 12:]), dim=1)
    else:
        pooled = out[:, 2]
    wanted = pooled @ model.head.weight.T + model.head.bias
    torch.testing.assert_close(model(x), wanted, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_last_is_the_final_state_of_both_directions() -> None:
    model = build(lstm_hidden=8, bidirectional=True, temporal_pooling="last")
    out, (final, _) = model.lstm(clips(2, 5, 512))  # final: (directions, B, hidden)
    torch.testing.assert_close(model.pool(out), torch.cat((final[0], final[1]), dim=1))


@torch.no_grad()
@pytest.mark.parametrize("pooling", ["mean", "last", "max", "attention"])
def test_the_order_of_frames_matters(pooling: str) -> None:
    model = build(temporal_pooling=pooling)
    x = clips(1, 4, 3, 32, 32)
    assert not torch.allclose(model(x), model(x.flip(1)), atol=1e-5)


def test_dropout_lies_between_layers_too() -> None:
    assert CNNLSTM(lstm_layers=2, lstm_hidden=8, dropout=0.3).lstm.dropout == 0.3
    assert CNNLSTM(lstm_layers=1, lstm_hidden=8, dropout=0.3).lstm.dropout == 0.0  # torch warns


@torch.no_grad()
def test_a_forward_lstm_is_causal_and_a_bidirectional_one_is_not() -> None:
    x = clips(1, 6, 3, 32, 32)
    other = x.clone()
    other[:, 4:] = 1 - other[:, 4:]
    for bidirectional in (False, True):
        model = build(bidirectional=bidirectional, lstm_hidden=32)
        assert model.causal is not bidirectional
        changed = (
            model.lstm(model.frame_features(other))[0] - model.lstm(model.frame_features(x))[0]
        ).abs()
        changed = changed.amax(dim=2)[0]  # (T,)
        assert (changed[4:] > 1e-4).all()
        assert bool((changed[:4] < 1e-6).all()) is not bidirectional


def test_statistics_by_hand() -> None:
    x = clips(2, 3, 4)
    found = temporal_statistics(x)
    for b in range(2):
        for c in range(4):
            values = [x[b, t, c].item() for t in range(3)]
            mean = sum(values) / 3
            deviation = (sum((value - mean) ** 2 for value in values) / 3) ** 0.5
            change = (abs(values[1] - values[0]) + abs(values[2] - values[1])) / 2
            wanted = torch.tensor([mean, deviation, change])
            torch.testing.assert_close(found[b, [c, 4 + c, 8 + c]], wanted, atol=1e-4, rtol=1e-4)
    still = torch.ones(1, 1, 4, requires_grad=True)
    temporal_statistics(still).sum().backward()
    assert torch.isfinite(still.grad).all()
    assert temporal_statistics(still)[0, 4:].abs().max() < 1e-3


def test_standardise_is_batchnorm_but_for_single_clips() -> None:
    torch.manual_seed(0)
    own, reference = Standardise(6), nn.BatchNorm1d(6, affine=False)
    for _ in range(3):
        x = torch.randn(5, 6) * 3 + 1
        torch.testing.assert_close(own(x), reference(x))
    one = torch.randn(1, 6)
    before = own.running_mean.clone()
    alone = own(one)
    assert torch.equal(own.running_mean, before)
    own.eval(), reference.eval()
    torch.testing.assert_close(alone, own(one))
    torch.testing.assert_close(own(one), reference(one))


@torch.no_grad()
def test_without_an_lstm_the_features_are_pooled() -> None:
    model = build(lstm_layers=0, temporal_pooling="statistics", num_classes=5)
    x = clips(2, 3, 3, 32, 32)
    features = torch.stack([model.backbone(model.normalize(x[b : b + 1])[0]) for b in range(2)])
    wanted = model.head(temporal_statistics(features))  # mean 0 and variance 1 until it trains
    torch.testing.assert_close(model(x), wanted, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(model(features), model(x), atol=1e-4, rtol=1e-4)
    assert list(model.stages())[-2:] == ["layer4", "head"]
    assert sum(p.numel() for p in model.head.parameters()) == 5 * (3 * 512 + 1)


@torch.no_grad()
def test_spatial_pool_widens_what_the_lstm_reads() -> None:
    model = build(spatial_pool=2, lstm_hidden=8)
    x = clips(1, 2, 3, 64, 64)
    assert model.lstm.input_size == 2048
    wanted = model.backbone(model.normalize(x)[0])
    torch.testing.assert_close(model.frame_features(x)[0], wanted, atol=1e-5, rtol=1e-4)


def test_root_statistics_are_the_signed_roots() -> None:
    x = torch.tensor([4.0, -9.0, 0.0, 1e-10])
    assert signed_root(x).tolist() == pytest.approx([2, -3, 0, 1e-6])
    zero = torch.zeros(1, requires_grad=True)
    signed_root(zero).backward()
    assert zero.grad.isfinite().all()
    torch.manual_seed(0)
    model = build(lstm_layers=0, temporal_pooling="root_statistics").eval()
    x = torch.randn(3, 6, model.num_features)
    plain = temporal_statistics(x)
    expected = plain.sign() * plain.abs().sqrt()
    torch.testing.assert_close(model.pool(x), expected, atol=1e-4, rtol=1e-4)
