"""ViViT: attention against explicit softmax, the patches, the positions."""

import pytest
import torch

from utils.errors import UserError
from vivit import Block, Embedding, ViViT

KEY = "embedding.positions"


def tiny(seed: int = 0, **options: object) -> ViViT:
    torch.manual_seed(seed)
    sizes = {"n_frames": 4, "image_size": 32, "patch_size": 8, "dim": 24, "depth": 2, "dim_head": 8}
    return ViViT(7, **{**sizes, **options}).eval()


def clips(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("size", "count"), [(224, 4_310_023), (128, 3_904_519), (112, 3_858_439)])
def test_parameters(size: int, count: int) -> None:
    assert sum(p.numel() for p in ViViT(image_size=size).parameters()) == count


@torch.no_grad()
def test_block_equals_explicit_softmax() -> None:
    torch.manual_seed(0)
    block = Block(dim=24, heads=3, dim_head=5, dropout=0.0).eval()
    x = clips(2, 6, 24)
    q, k, v = block.qkv(block.attention_norm(x)).chunk(3, dim=2)  # (N, tokens, heads * dim_head)
    heads = []
    for head in range(3):
        q_head, k_head, v_head = (y[..., 5 * head : 5 * head + 5] for y in (q, k, v))
        scores = (q_head @ k_head.transpose(1, 2)) / 5**0.5
        weights = scores.exp() / scores.exp().sum(dim=2, keepdim=True)
        heads.append(weights @ v_head)
    wanted = x + block.out(torch.cat(heads, dim=2))
    wanted = wanted + block.mlp(block.mlp_norm(wanted))
    torch.testing.assert_close(block(x), wanted, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_embedding_cuts_patches_row_by_row() -> None:
    torch.manual_seed(0)
    embedding = Embedding(n_frames=2, image_size=8, patch_size=4, dim=6, dropout=0.0)
    x = clips(1, 2, 3, 8, 8)
    out = embedding(x)
    assert out.shape == (1, 2, 5, 6)
    for t in range(2):
        torch.testing.assert_close(
            out[0, t, 0], embedding.cls_token[0, 0] + embedding.positions[0, t, 0]
        )
        for row in range(2):
            for column in range(2):
                patch = x[0, t, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
                token = embedding.patches(patch.permute(1, 2, 0).flatten())
                number = 1 + 2 * row + column
                wanted = token + embedding.positions[0, t, number]
                torch.testing.assert_close(out[0, t, number], wanted)


@torch.no_grad()
def test_the_order_of_frames_matters() -> None:
    model, x = tiny(), clips(1, 4, 3, 32, 32)
    model.embedding.positions.normal_()
    assert not torch.allclose(model(x), model(x[:, [2, 0, 3, 1]]), atol=1e-5)


@torch.no_grad()
def test_order_is_known_from_positions_alone() -> None:
    model, x = tiny(), clips(1, 4, 3, 32, 32)
    model.embedding.positions.zero_()
    torch.testing.assert_close(model(x), model(x[:, [2, 0, 3, 1]]), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_attention_drops_in_training_only() -> None:
    model, x = tiny(dropout=0.5), clips(2, 4, 3, 32, 32)
    assert torch.equal(model(x), model(x))
    model.train()
    assert not torch.equal(model(x), model(x))


def test_image_size_must_be_a_multiple_of_the_patch() -> None:
    with pytest.raises(UserError, match=r"image_size 100 must be a multiple, e\.g\. 96"):
        ViViT(image_size=100)


def test_resize_is_the_identity_for_equal_sizes() -> None:
    state = tiny().state_dict()
    assert tiny(seed=1).adapt_state_dict(state) is state


@torch.no_grad()
@pytest.mark.parametrize("sizes", [{"n_frames": 8}, {"image_size": 64}, {"n_frames": 2,
                         "image_size": 48}])  # fmt: skip
def test_resized_positions_load_and_run(sizes: dict[str, int]) -> None:
    state = tiny().state_dict()
    model = tiny(seed=1, **sizes)
    fitted = model.adapt_state_dict(state)
    model.load_state_dict(fitted)
    assert state[KEY].shape != fitted[KEY].shape  # the state given is left as it was
    assert all(fitted[key] is state[key] for key in state if key != KEY)
    size, frames = sizes.get("image_size", 32), sizes.get("n_frames", 4)
    assert model(clips(1, frames, 3, size, size)).isfinite().all()


@torch.no_grad()
def test_resize_interpolates_time_rows_and_columns() -> None:
    """Twice as many points between 0 and 1, as `interpolate` places them: 0, 1/4, 3/4, 1."""
    twice = torch.tensor([0, 0.25, 0.75, 1])
    old = tiny(n_frames=2, image_size=16)  # 2 x 2 x 2 patches
    new = tiny(n_frames=4, image_size=32)  # 4 x 4 x 4
    state = old.state_dict()
    t, row, column = torch.meshgrid(*[torch.arange(2.0)] * 3, indexing="ij")
    # Each feature tells one axis; the class token has values that may not leak into the grid.
    grid = torch.stack((t, row, column), dim=-1).flatten(1, 2)  # (T, patches, 3)
    state[KEY] = torch.zeros(1, 2, 5, 24)
    state[KEY][0, :, 1:, :3] = grid
    state[KEY][0, 1, 0, :] = 100
    positions = new.adapt_state_dict(state)[KEY]
    out = positions[0, :, 1:].unflatten(1, (4, 4))  # (T, H, W, dim)
    torch.testing.assert_close(out[..., 0], twice.view(4, 1, 1).expand(4, 4, 4))
    torch.testing.assert_close(out[..., 1], twice.view(1, 4, 1).expand(4, 4, 4))
    torch.testing.assert_close(out[..., 2], twice.view(1, 1, 4).expand(4, 4, 4))
    assert not out[..., 3:].any()
    torch.testing.assert_close(positions[0, :, 0, 5], 100 * twice)


def test_positions_of_another_width_are_left_to_the_loader() -> None:
    state = tiny(dim=48, image_size=64).state_dict()
    assert tiny().adapt_state_dict(state) is state


def test_drop_path_grows_linearly_over_both_encoders() -> None:
    model = tiny(depth=2, drop_path=0.3)
    rates = [block.drop_path_rate for block in (*model.spatial, *model.temporal)]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3])
    assert not any(block.drop_path_rate for block in (*tiny().spatial, *tiny().temporal))


@torch.no_grad()
def test_drop_path_sleeps_in_eval_and_never_shows_in_the_weights() -> None:
    model, dropping, x = tiny(), tiny(drop_path=0.9), clips(2, 4, 3, 32, 32)
    assert model.state_dict().keys() == dropping.state_dict().keys()
    assert torch.equal(model(x), dropping(x))
    draws = torch.get_rng_state()
    model.train()(x)
    assert torch.equal(torch.get_rng_state(), draws)  # off, nothing is drawn
    assert not torch.equal(dropping.train()(x), model(x))


def linear_block(drop_path: float) -> Block:
    """A block whose branches do not see each other: each adds its own constant."""
    block = Block(dim=8, heads=2, dim_head=4, dropout=0.0, drop_path_rate=drop_path)
    for branch in (block.out, block.mlp[3]):
        torch.nn.init.zeros_(branch.weight)
    torch.nn.init.constant_(block.out.bias, 1)
    torch.nn.init.constant_(block.mlp[3].bias, 10)
    return block.train()


@torch.no_grad()
def test_all_frames_of_a_clip_share_the_fate_and_the_mean_is_the_whole_block() -> None:
    """Attention adds 1 and the MLP 10, each to a quarter of the clips not, to the others 4/3."""
    torch.manual_seed(0)
    block, b, t = linear_block(0.25), 2000, 3
    added = block(torch.zeros(b * t, 2, 8), t).unflatten(0, (b, t))  # (B, T, tokens, dim)
    first = added[:, :1, :1, :1]
    assert torch.equal(added, first.expand_as(added))
    wanted = torch.tensor([0, 4 / 3, 40 / 3, 44 / 3])  # neither, one of them, both
    fates = (first.flatten()[:, None] - wanted).abs().argmin(dim=1)
    torch.testing.assert_close(first.flatten(), wanted[fates])
    share = torch.bincount(fates, minlength=4) / b
    expected = torch.tensor([1 / 16, 3 / 16, 3 / 16, 9 / 16])
    torch.testing.assert_close(share, expected, atol=0.03, rtol=0)
    assert added.mean().item() == pytest.approx(11, abs=0.4)


@torch.no_grad()
def test_a_dropped_clip_skips_its_branches_in_the_whole_model() -> None:
    """The spatial encoder of clips of T frames is told so: each clip has one draw a branch."""
    model = tiny(drop_path=0.5).train()
    seen = []
    model.spatial[1].register_forward_hook(lambda block, inputs, out: seen.append((*inputs, out)))
    torch.manual_seed(0)
    model(clips(1, 4, 3, 32, 32).repeat(64, 1, 1, 1, 1))  # the first spatial block drops nothing
    ((x, rows_a_clip, out),) = seen
    assert rows_a_clip == 4
    change = (out - x).unflatten(0, (64, 4)).flatten(2).norm(dim=2)  # (B, T)
    assert 2 <= len(change[:, 0].round(decimals=4).unique()) <= 4
    dropped = change[:, 0] == 0
    assert dropped.any()
    assert torch.equal(dropped, (change == 0).all(dim=1))
    assert torch.equal(dropped, (change == 0).any(dim=1))
