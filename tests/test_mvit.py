"""MViT: torchvision's networks behind our contract, at any length and size, and their positions."""

from pathlib import Path

import pytest
import torch
from torch import nn
from torchvision.models.video import MViT_V2_S_Weights, mvit_v1_b, mvit_v2_s

from modeling.weights import load_weights
from mvit import MViT
from utils.errors import UserError

SPACE, TIME = (f"backbone.pos_encoding.{name}_pos" for name in ("spatial", "temporal"))


def clips(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def small() -> MViT:
    torch.manual_seed(0)
    return MViT(7, dropout=0.3).eval()


@pytest.fixture(scope="module")
def base() -> MViT:
    """Version 1 for 4 frames of 64 px: 2 x 16 x 16 tokens."""
    torch.manual_seed(0)
    return MViT(7, 4, 64, "base").eval()


@pytest.fixture(scope="module")
def official() -> dict[str, torch.Tensor]:
    """Version 1 with random weights as in torchvision's file: 8 x 56 x 56 positions."""
    torch.manual_seed(1)
    return mvit_v1_b().state_dict()


def meta(*arguments: object, **options: object) -> MViT:
    with torch.device("meta"):
        return MViT(7, *arguments, **options)


@pytest.mark.parametrize(
    ("size", "image_size", "count"),
    [("", 224, 34_235_527), ("small", 112, 34_235_527), ("base", 224, 36_308_455),
     ("base", 112, 36_082_663)],
)  # fmt: skip
def test_parameters(size: str, image_size: int, count: int) -> None:
    model = meta(image_size=image_size, model_size=size)
    assert sum(p.numel() for p in model.parameters()) == count


def test_a_size_that_torchvision_lacks_is_refused() -> None:
    with pytest.raises(UserError, match=r"^mvit has no model_size tiny: choose small or base$"):
        MViT(model_size="tiny")


@torch.no_grad()
@pytest.mark.parametrize("size", ["small", "base"])
def test_the_network_is_torchvisions(size: str, small: MViT, base: MViT) -> None:
    """Bit for bit, where its fixed sizes are those of the clips."""
    model = {"small": small, "base": base}[size]
    model.backbone.pos_encoding.temporal_size = 2
    model.backbone.pos_encoding.spatial_size = (16, 16)
    x = clips(2, 4, 3, 64, 64)
    pixels = model.normalize(x)
    torch.testing.assert_close(pixels, (x - 0.45) / 0.225)
    features = model.backbone(pixels.transpose(1, 2))
    assert features.shape == (2, 768)
    assert torch.equal(model(x), model.head(features))


@pytest.mark.parametrize(
    ("frames", "size"),
    [(1, 16), (16, 112), (17, 100), (64, 48)],
)
def test_any_length_and_size(frames: int, size: int) -> None:
    for model_size in ("small", "base"):
        model = meta(frames, size, model_size)
        x = torch.zeros(2, frames, 3, size, size, dtype=torch.uint8, device="meta")
        assert model(x).shape == (2, 7)


@torch.no_grad()
@pytest.mark.parametrize(("frames", "size"), [(1, 16), (5, 48), (3, 100)])
def test_small_takes_odd_lengths_and_sizes(frames: int, size: int, small: MViT) -> None:
    x = clips(2, frames, 3, size, size)
    assert small(x).isfinite().all()
    assert not torch.allclose(small(x), small(x.flip(4)), atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("size", ["small", "base"])
def test_the_order_of_frames_matters(size: str, small: MViT, base: MViT) -> None:
    model, x = {"small": small, "base": base}[size], clips(1, 4, 3, 64, 64)
    assert not torch.allclose(model(x), model(x.flip(1)), atol=1e-4)


def test_stages_are_the_blocks(small: MViT) -> None:
    net, stages = small.backbone, small.stages()
    assert stages["patch"] == [net.conv_proj, net.pos_encoding]
    assert [stages[f"block{number}"] for number in range(1, 17)] == [[b] for b in net.blocks]
    assert stages["head"] == [net.norm, small.head]


@pytest.mark.parametrize("size", ["small", "base"])
def test_drop_path_grows_linearly_over_the_blocks_and_is_drawn_for_each_clip(size: str) -> None:
    for rate in (0.3, 0.0):
        blocks = meta(model_size=size, drop_path=rate).backbone.blocks
        rates = [block.stochastic_depth.p for block in blocks]
        assert rates == pytest.approx([rate * k / 15 for k in range(16)])
        assert {block.stochastic_depth.mode for block in blocks} == {"row"}


def test_the_only_other_dropout_is_before_the_head(small: MViT) -> None:
    dropouts = [module for module in small.modules() if isinstance(module, nn.Dropout) and module.p]
    assert dropouts == [small.dropout]
    assert small.dropout.p == 0.3


def test_weights_of_torchvision(small: MViT) -> None:
    assert small.torchvision_weights is MViT_V2_S_Weights
    assert meta(model_size="base").torchvision_weights.__name__ == "MViT_V1_B_Weights"


def test_small_has_the_same_weights_for_any_length_and_size(small: MViT, tmp_path: Path) -> None:
    torch.manual_seed(1)
    file = mvit_v2_s().state_dict()
    torch.save(file, tmp_path / "mvit_v2_s.pth")
    line = load_weights(small, str(tmp_path / "mvit_v2_s.pth")).line
    assert "backbone only; the head is new; not loaded: 2 of head" in line
    own = small.backbone.state_dict()
    assert all(torch.equal(own[key], file[key]) for key in file if not key.startswith("head."))
    shapes = [{k: v.shape for k, v in m.state_dict().items()} for m in (small, meta(5, 32))]
    assert shapes[0] == shapes[1]


@torch.no_grad()
def test_positions_of_base_are_fitted_to_the_clips(
    base: MViT, official: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    """An official file and a checkpoint of ours give the same positions."""
    torch.save(official, tmp_path / "mvit_v1_b.pth")
    line = load_weights(base, str(tmp_path / "mvit_v1_b.pth")).line
    assert "the head is new; positions resized to this T and image size; not loaded" in line
    own = {f"backbone.{k}": v for k, v in official.items() if not k.startswith("head.")}
    fitted = base.adapt_state_dict(own)
    state = base.state_dict()
    assert all(torch.equal(state[key], fitted[key]) for key in own)
    assert {key for key in own if fitted[key] is not own[key]} == {SPACE, TIME}
    assert base(clips(1, 4, 3, 64, 64)).isfinite().all()
    torch.save({"model": base.state_dict(), "format_version": 1}, tmp_path / "best.pt")
    other = MViT(3, 8, 32, "base")
    assert load_weights(other, str(tmp_path / "best.pt")).line.endswith(
        "all but the head, which is new; positions resized to this T and image size"
    )
    assert other.state_dict()[SPACE].shape == (64, 96)
    assert other.state_dict()[TIME].shape == (4, 96)
    assert base.adapt_state_dict(state) is state  # of this size


def cubic(t: torch.Tensor) -> torch.Tensor:
    """The kernel of bicubic interpolation (Keys, 1981) with a = -3/4."""
    a, t = -0.75, t.abs()
    near = (a + 2) * t**3 - (a + 3) * t**2 + 1
    far = a * t**3 - 5 * a * t**2 + 8 * a * t - 4 * a
    return torch.where(t <= 1, near, torch.where(t < 2, far, 0))


def test_positions_are_interpolated_along_time_rows_and_columns() -> None:
    """Linear in time: 0, 1/4, 3/4, 1 between 0 and 1. Bicubic in space, as it is defined."""
    model = meta(8, 40, "base")  # 4 x 10 x 10
    time, space = torch.arange(2.0)[:, None] * torch.arange(96.0), clips(36, 96)  # of 2 x 6 x 6
    state = model.adapt_state_dict({SPACE: space, TIME: time})
    wanted = torch.tensor([[0, 0.25, 0.75, 1]]).T * torch.arange(96.0)
    torch.testing.assert_close(state[TIME], wanted)

    places = (torch.arange(10) + 0.5) * 6 / 10 - 0.5
    weights = torch.zeros(10, 6)  # of each old row in each new row; beyond the edge it is repeated
    for row in range(-2, 8):
        weights[:, min(max(row, 0), 5)] += cubic(places - row)
    grid = space.unflatten(0, (6, 6))
    wanted = torch.einsum("ar,bc,rcd->abd", weights, weights, grid)
    torch.testing.assert_close(state[SPACE].unflatten(0, (10, 10)), wanted)


@pytest.mark.parametrize(
    "change",
    [lambda p: p.long(), lambda p: p[:-1], lambda p: p[:, :48], lambda p: p[:0], lambda p: p[None]],
)
def test_damaged_positions_are_left_to_the_loader(
    change, base: MViT, official: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    key = "pos_encoding.spatial_pos"
    torch.save({**official, key: change(official[key])}, tmp_path / "damaged.pth")
    with pytest.raises(UserError, match=rf"weights 1 of another shape or type: {key}$"):
        load_weights(base, str(tmp_path / "damaged.pth"))


def test_weights_of_the_other_version_are_refused(
    small: MViT, official: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    torch.save(official, tmp_path / "mvit_v1_b.pth")
    with pytest.raises(UserError, match=r"does not fit MViT: weights \d+ missing: .*rel_pos"):
        load_weights(small, str(tmp_path / "mvit_v1_b.pth"))
