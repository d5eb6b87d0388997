"""Video Swin: the bias of every offset, windows as torchvision's, any length and size, weights."""

import math
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import pytest
import torch
from helpers import make_model
from torch import nn
from torchvision.models.video import Swin3D_T_Weights, swin3d_s, swin3d_t
from torchvision.models.video.swin_transformer import ShiftedWindowAttention3d

from modeling.weights import load_weights
from utils.errors import UserError
from video_swin import VideoSwin, WindowAttention, from_windows, to_windows

FULL, HALF = (8, 7, 7), (4, 3, 3)


def clips(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def official() -> nn.Module:
    """torchvision's network with random weights, as its file of pretrained weights holds it."""
    torch.manual_seed(0)
    return swin3d_t().eval()


@pytest.fixture(scope="module")
def model(official: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> VideoSwin:
    """Our model with these weights."""
    path = tmp_path_factory.mktemp("weights") / "swin3d_t-00000000.pth"
    torch.save(official.state_dict(), path)
    torch.manual_seed(1)
    model = VideoSwin(7, dropout=0.3).eval()
    assert "backbone only; the head is new" in load_weights(model, str(path)).line
    return model


def attentions(shift: Sequence[int], dim: int = 12) -> tuple[nn.Module, nn.Module]:
    """Our window attention and torchvision's, with the same weights."""
    torch.manual_seed(0)
    ours = WindowAttention(dim, FULL, shift, 3).eval()
    theirs = ShiftedWindowAttention3d(dim, list(FULL), list(shift), 3).eval()
    nn.init.normal_(ours.relative_position_bias_table)
    missing, unexpected = theirs.load_state_dict(ours.state_dict(), strict=False)
    assert (missing, unexpected) == (["relative_position_index"], [])
    return ours, theirs


@pytest.mark.parametrize(
    ("size", "count"),
    [("", 27_855_853), ("tiny", 27_855_853), ("small", 49_514_461), ("base", 87_646_159)],
)
def test_parameters(size: str, count: int) -> None:
    with torch.device("meta"):
        assert sum(p.numel() for p in VideoSwin(model_size=size).parameters()) == count


@torch.no_grad()
@pytest.mark.parametrize(
    ("window", "torchvisions"),
    [(FULL, 1), ((4, 7, 7), 1), ((8, 4, 4), 0.0255), ((4, 2, 2), 0.1172), ((8, 7, 4), 0.0147),
     ((1, 2, 2), 0.5), ((1, 1, 1), 1)],
)  # fmt: skip
def test_every_pair_reads_the_bias_of_its_offset(
    window: tuple[int, int, int], torchvisions: float
) -> None:
    """Against the row of (dt, dh, dw) in the table, of which torchvision reads this share."""
    ours, theirs = attentions((0, 0, 0))
    rows = torch.arange(15 * 13 * 13.0)
    for attention in (ours, theirs):
        attention.relative_position_bias_table[:] = torch.stack((rows, -rows, 2 * rows), dim=1)
    tokens = list(product(*map(range, window)))
    wanted = torch.tensor(
        [
            [((t - t2 + 7) * 13 + h - h2 + 6) * 13 + w - w2 + 6 for t2, h2, w2 in tokens]
            for t, h, w in tokens
        ],
        dtype=torch.float32,
    )
    bias = ours.relative_position_bias(window)
    assert torch.equal(bias, torch.stack((wanted, -wanted, 2 * wanted)))  # (heads, tokens, tokens)
    share = (theirs.get_relative_position_bias(list(window))[0, 0] == wanted).float().mean()
    assert share.item() == pytest.approx(torchvisions, abs=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("shift", [(0, 0, 0), HALF])
@pytest.mark.parametrize(
    "size",
    [
        (16, 14, 14),  # 32 frames: the windows move in time too
        (16, 7, 7),  # in time alone
        (8, 14, 14),  # 16 frames: the windows have all of time, and move in space alone
        (9, 10, 15),  # padded in time, height and width
        (3, 7, 7),  # a single window, shorter in time
    ],
)
def test_attention_is_torchvisions(size: tuple[int, int, int], shift: tuple[int, ...]) -> None:
    ours, theirs = attentions(shift)
    x = clips(2, *size, 12)
    assert torch.equal(ours(x), theirs(x))
    if any(n > m and s for n, m, s in zip(size, FULL, shift, strict=True)):
        assert not torch.equal(ours(x), attentions((0, 0, 0))[0](x))  # the shift has an effect


@torch.no_grad()
@pytest.mark.parametrize("size", [(16, 9, 4), (2, 3, 20), (16, 2, 2), (1, 1, 1), (5, 4, 6)])
def test_without_biases_small_maps_are_torchvisions_too(size: tuple[int, int, int]) -> None:
    """Windows and masks of small maps are the same, so that only the biases differ."""
    ours, theirs = attentions(HALF)
    x = clips(2, *size, 12)
    assert size == (1, 1, 1) or not torch.equal(ours(x), theirs(x))
    for attention in (ours, theirs):
        attention.relative_position_bias_table.zero_()
    assert torch.equal(ours(x), theirs(x))


def test_windows_are_boxes_and_come_back() -> None:
    x = torch.arange(2 * 4 * 6 * 2.0).view(2, 4, 6, 2, 1)
    windows = to_windows(x, (2, 3, 2))  # 2 x 2 x 1 windows per clip
    assert windows.shape == (8, 12, 1)
    assert torch.equal(windows[1], x[0, :2, 3:].reshape(12, 1))
    assert torch.equal(windows[6], x[1, 2:, :3].reshape(12, 1))
    assert torch.equal(from_windows(windows, (2, 3, 2), (4, 6, 2)), x)


@torch.no_grad()
def test_the_network_is_torchvisions(model: VideoSwin, official: nn.Module) -> None:
    """Bit for bit at 224 px, whose maps are not smaller than a window; not at 64 px."""
    official.head = nn.Identity()
    mean_std = Swin3D_T_Weights.DEFAULT.transforms()
    for size, same in ((224, True), (64, False)):
        x = clips(1, 4, 3, size, size)
        pixels = model.normalize(x)
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (mean_std.mean, mean_std.std))
        torch.testing.assert_close(pixels, (x - mean) / std)
        features = official(pixels.transpose(1, 2))
        assert features.shape == (1, 768)
        logits = model.head(features)
        assert torch.equal(model(x), logits) == same


FRAMES = (1, 2, 3, 5, 8, 16, 17, 33, 64)
PIXELS = (16, 32, 48, 64, 100, 112, 120, 224, 17)


@pytest.mark.parametrize(("frames", "size"), list(zip(FRAMES, PIXELS, strict=True)))
def test_any_length_and_size(frames: int, size: int) -> None:
    with torch.device("meta"):
        logits = VideoSwin(3)(torch.zeros(2, frames, 3, size, size, dtype=torch.uint8))
    assert logits.shape == (2, 3)


@torch.no_grad()
@pytest.mark.parametrize(("frames", "size"), [(1, 16), (5, 48), (3, 100)])
def test_odd_lengths_and_sizes_give_numbers(frames: int, size: int, model: VideoSwin) -> None:
    x = clips(2, frames, 3, size, size)
    assert model(x).isfinite().all()
    assert not torch.allclose(model(x), model(x.flip(4)), atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("frames", [5, 8])
def test_the_order_of_frames_matters(frames: int, model: VideoSwin) -> None:
    x = clips(1, frames, 3, 32, 32)
    assert not torch.allclose(model(x), model(x.flip(1)), atol=1e-4)


def test_a_layer_has_its_blocks_and_the_merging_after_them(model: VideoSwin) -> None:
    blocks = model.backbone.features
    stages = model.stages()
    assert [len(stages[f"layer{n}"]) for n in (1, 2, 3, 4)] == [2 + 1, 2 + 1, 6 + 1, 2]
    assert stages["layer3"] == [*blocks[4], blocks[5]]
    assert stages["layer4"] == [*blocks[6]]
    assert stages["head"] == [model.backbone.norm, model.head]


def test_drop_path_grows_linearly_over_the_blocks_and_is_drawn_for_each_clip() -> None:
    with torch.device("meta"):
        models = [VideoSwin(drop_path=rate) for rate in (0.22, 0.0)]
    for model, step in zip(models, (0.02, 0), strict=True):
        blocks = [block for layer in model.backbone.features[::2] for block in layer]
        assert [b.stochastic_depth.p for b in blocks] == pytest.approx(
            [step * k for k in range(12)]
        )
        assert {block.stochastic_depth.mode for block in blocks} == {"row"}


@torch.no_grad()
def test_dropout_is_before_the_head(model: VideoSwin) -> None:
    assert model.dropout.p == 0.3
    seen = []
    handles = [
        model.dropout.register_forward_hook(lambda _, inputs, out: seen.append((inputs[0], out))),
        model.head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0])),
    ]
    model.dropout.train()
    model(clips(2, 2, 3, 16, 16))
    model.dropout.eval()
    for handle in handles:
        handle.remove()
    (features, dropped), given = seen
    assert given is dropped
    assert features.shape == (2, 768)
    assert 0.2 < (dropped == 0).float().mean() < 0.4


def test_every_size_has_its_weights() -> None:
    names = {"tiny": {"KINETICS400_V1"}, "small": {"KINETICS400_V1"}}
    names["base"] = {"KINETICS400_V1", "KINETICS400_IMAGENET22K_V1"}
    for size, wanted in names.items():
        with torch.device("meta"):
            weights = VideoSwin(model_size=size).torchvision_weights
        assert weights.__name__ == f"Swin3D_{size[0].upper()}_Weights"
        assert {member.name for member in weights} == wanted


def test_own_weights_have_no_tables_of_offsets_and_load_at_any_size(
    model: VideoSwin, tmp_path: Path
) -> None:
    state = model.state_dict()
    assert not any("relative_position_index" in key for key in state)
    torch.save({"model": state, "format_version": 1}, tmp_path / "best.pt")
    other = make_model("video_swin", 5)
    line = load_weights(other, str(tmp_path / "best.pt")).line
    assert line.endswith("all but the head, which is new")
    assert all(torch.equal(v, state[k]) for k, v in other.state_dict().items() if "back" in k)


def test_weights_of_another_size_are_refused(model: VideoSwin, tmp_path: Path) -> None:
    with torch.device("meta"):
        shapes = {key: value.shape for key, value in swin3d_s().state_dict().items()}
    torch.save(
        {k: torch.zeros(math.prod(s)).view(s) for k, s in shapes.items()}, tmp_path / "s.pth"
    )
    with pytest.raises(UserError, match=r"156 unexpected: features\.4\.6\.norm1\.weight"):
        load_weights(model, str(tmp_path / "s.pth"))
