"""ViViT: attention against explicit softmax, the patches, the positions."""

import pytest
import torch
from torch.nn import functional as F

from modeling.vit import SIZES
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


# Parameters of an image ViT without its classifier, as timm counts them.
@pytest.mark.parametrize(
    ("size", "image_vit"), [("tiny", 5_524_416), ("small", 21_665_664), ("base", 85_798_656)]
)
def test_sizes_are_those_of_image_vits(size: str, image_vit: int) -> None:
    with torch.device("meta"):
        model = ViViT(model_size=size)
    dim = SIZES[size][0]
    block = 12 * dim**2 + 13 * dim  # qkv, out, two layers of the MLP, two norms
    new = 15 * 197 * dim + 4 * block + dim + 2 * 2 * dim + 7 * (dim + 1)
    assert sum(p.numel() for p in model.parameters()) == image_vit + new


@torch.no_grad()
@pytest.mark.parametrize("tubelet_frames", [1, 2])
def test_the_spatial_encoder_starts_as_an_image_vit(tubelet_frames: int) -> None:
    """Each tubelet's class token is the image network's for its central frame."""
    timm = pytest.importorskip("timm", reason="requirements-optional.txt is not installed")
    torch.manual_seed(0)
    net = timm.create_model("vit_tiny_patch16_224", num_classes=0, dynamic_img_size=True).eval()
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    model = ViViT(3, 4, 64, model_size="tiny", tubelet_frames=tubelet_frames).eval()
    own = model.state_dict()
    new = {key: own[key] for key in own if key.startswith(model.new_parts)}
    model.load_state_dict(model.convert_state_dict(net.state_dict()) | new)
    seen = []
    model.spatial_norm.register_forward_hook(lambda *call: seen.append(call[2]))
    x = clips(2, 4, 3, 64, 64)
    model(x)
    wanted = net(model.normalize(x)[:, tubelet_frames // 2 :: tubelet_frames].flatten(0, 1))
    torch.testing.assert_close(seen[0], wanted, atol=1e-6, rtol=1e-5)


def test_tubelets_must_fill_the_clip() -> None:
    with pytest.raises(UserError, match="n_frames 5 must be a multiple"):
        ViViT(n_frames=5, tubelet_frames=2)


def videomae(state: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """VideoMAE's encoder (Tong et al., 2022), written out: normalised clips `(B, C, T, H, W)` to
    the mean of the normalised tokens, `(B, dim)`; 64 dimensions per head."""
    w = state["patch_embed.proj.weight"]
    dim = w.shape[0]
    x = F.conv3d(x, w, state["patch_embed.proj.bias"], stride=w.shape[2:])
    x = x.flatten(2).transpose(1, 2)  # (B, tokens, dim): time by time, row by row
    position = torch.arange(x.shape[1], dtype=torch.float64)
    for j in range(dim):
        angle = position / 10000 ** (2 * (j // 2) / dim)
        x[..., j] += (angle.cos() if j % 2 else angle.sin()).float()
    for n in range(12):
        p = {k.removeprefix(f"blocks.{n}."): v for k, v in state.items()}
        y = F.layer_norm(x, (dim,), p["norm1.weight"], p["norm1.bias"], 1e-6)
        q, k, v = (y @ p["attn.qkv.weight"].T).chunk(3, dim=2)
        q, v = q + p["attn.q_bias"], v + p["attn.v_bias"]
        heads = zip(*(z.split(64, 2) for z in (q, k, v)), strict=True)
        y = torch.cat([(a @ b.mT / 8).softmax(2) @ c for a, b, c in heads], dim=2)
        x = x + F.linear(y, p["attn.proj.weight"], p["attn.proj.bias"])
        y = F.layer_norm(x, (dim,), p["norm2.weight"], p["norm2.bias"], 1e-6)
        y = F.gelu(F.linear(y, p["mlp.fc1.weight"], p["mlp.fc1.bias"]))
        x = x + F.linear(y, p["mlp.fc2.weight"], p["mlp.fc2.bias"])
    return F.layer_norm(x, (dim,), state["norm.weight"], state["norm.bias"], 1e-6).mean(1)


def videomae_weights(dim: int = 192) -> dict[str, torch.Tensor]:
    """Random weights with the names and shapes of a VideoMAE encoder."""
    shapes = {"patch_embed.proj.weight": (dim, 3, 2, 16, 16), "patch_embed.proj.bias": (dim,)}
    for n in range(12):
        shapes |= {
            f"blocks.{n}.{name}": shape
            for name, shape in {
                **dict.fromkeys(("norm1.weight", "norm1.bias", "norm2.weight"), (dim,)),
                **dict.fromkeys(("norm2.bias", "attn.q_bias", "attn.v_bias"), (dim,)),
                **dict.fromkeys(("attn.proj.bias", "mlp.fc2.bias"), (dim,)),
                "attn.qkv.weight": (3 * dim, dim),
                "attn.proj.weight": (dim, dim),
                "mlp.fc1.weight": (4 * dim, dim),
                "mlp.fc1.bias": (4 * dim,),
                "mlp.fc2.weight": (dim, 4 * dim),
            }.items()
        }
    shapes |= {"norm.weight": (dim,), "norm.bias": (dim,)}
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(s, generator=generator) * 0.05 for name, s in shapes.items()}


@torch.no_grad()
def test_joint_attention_is_videomaes_encoder() -> None:
    model = ViViT(3, 16, 224, model_size="tiny", tubelet_frames=2, attention="joint").eval()
    own, state = model.state_dict(), videomae_weights()
    head = {key: own[key] for key in own if key.startswith("head.")}
    model.load_state_dict(model.convert_state_dict(state) | head)
    x = clips(1, 16, 3, 224, 224)
    wanted = videomae(state, model.normalize(x).transpose(1, 2))
    model.head = torch.nn.Identity()
    torch.testing.assert_close(model(x), wanted, atol=1e-5, rtol=1e-4)
    # At another size the positions are interpolated.
    small = ViViT(3, 8, 112, model_size="tiny", tubelet_frames=2, attention="joint")
    positions = small.convert_state_dict(state)["embedding.positions"]
    assert positions.shape == (1, 4, 49, 192)


@torch.no_grad()
def test_joint_attention_sees_all_tokens_and_the_order() -> None:
    model = tiny(attention="joint")
    assert list(model.stages()) == ["embedding", "spatial1", "spatial2", "head"]
    x = clips(1, 4, 3, 32, 32)
    assert not torch.allclose(model(x), model(x[:, [2, 0, 3, 1]]), atol=1e-6)
