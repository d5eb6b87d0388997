"""TimeSformer: divided attention against loops, and an image ViT's answer to a still clip."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from timesformer import Block, TimeSformer
from utils.errors import UserError

timm = pytest.importorskip("timm", reason="requirements-optional.txt is not installed")


def clips(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0))


def randomise(net: nn.Module) -> nn.Module:
    """Weights of which none is zero or one."""
    torch.manual_seed(1)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.05)
    return net.eval()


def with_own_head(model: TimeSformer, weights: dict[str, torch.Tensor]) -> None:
    """Load converted weights, strictly, beside the model's own head."""
    head = {k: v for k, v in model.state_dict().items() if k.startswith("head.")}
    model.load_state_dict(weights | head)


@pytest.mark.parametrize(
    ("size", "n_frames", "count"),
    [
        *(("", 16, 7_756_807), ("tiny", 8, 7_755_271), ("small", 16, 30_554_119)),
        *(("small", 8, 30_551_047), ("base", 16, 121_270_279), ("base", 8, 121_264_135)),
    ],
)
def test_parameters(size: str, n_frames: int, count: int) -> None:
    with torch.device("meta"):
        model = TimeSformer(n_frames=n_frames, model_size=size)
    assert sum(p.numel() for p in model.parameters()) == count


def attend(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Softmax attention of tokens `(n, dim)`, head by head."""
    q, k, v = layer.qkv(x).chunk(3, dim=1)
    heads = []
    for q_head, k_head, v_head in zip(*(y.chunk(layer.heads, 1) for y in (q, k, v)), strict=True):
        scores = q_head @ k_head.T / q_head.shape[1] ** 0.5
        heads.append(scores.softmax(dim=1) @ v_head)
    return layer.proj(torch.cat(heads, dim=1))


@torch.no_grad()
def test_a_block_equals_loops_over_patches_and_frames() -> None:
    """Equations 4 to 9 of the paper, one token after the other; the class token as in its code."""
    block = randomise(Block(dim=12, heads=3, dropout=0.0, drop_path_rate=0.0))
    n_frames, patches = 3, 4
    tokens = clips(2, 1 + n_frames * patches, 12)
    wanted = tokens.clone()
    for b in range(2):
        cls, x = tokens[b, 0], tokens[b, 1:].view(n_frames, patches, 12).clone()
        for p in range(patches):
            x[:, p] += block.temporal_fc(attend(block.temporal_attn, block.temporal_norm1(x[:, p])))
        new_cls = []
        for t in range(n_frames):
            change = attend(block.attn, block.norm1(torch.cat((cls[None], x[t]))))
            new_cls.append(cls + change[0])
            x[t] += change[1:]
        row = torch.cat((torch.stack(new_cls).mean(0, keepdim=True), x.flatten(0, 1)))
        hidden = F.gelu(block.mlp.fc1(block.norm2(row)))
        wanted[b] = row + block.mlp.fc2(hidden)
    torch.testing.assert_close(block(tokens, n_frames), wanted, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_still_clip_gets_the_answer_of_the_image_network() -> None:
    net = randomise(timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=64))
    model = TimeSformer(n_frames=4, image_size=64).eval()
    with_own_head(model, model.convert_state_dict(net.state_dict()))
    frame = clips(2, 1, 3, 64, 64)
    wanted = net(model.normalize(frame)[:, 0])
    model.head = nn.Identity()
    assert (model(frame.expand(-1, 4, -1, -1, -1)) - wanted).abs().max() == 0
    # The temporal attention is that of space, and answers differently once its last layer learns.
    block = model.blocks[3]
    assert torch.equal(block.temporal_attn.qkv.weight, net.blocks[3].attn.qkv.weight)
    assert torch.equal(block.temporal_norm1.bias, net.blocks[3].norm1.bias)
    nn.init.normal_(block.temporal_fc.weight)
    assert not torch.allclose(model(frame.expand(-1, 4, -1, -1, -1)), wanted)


@torch.no_grad()
def test_layer_scale_is_folded() -> None:
    """DINOv2's ViTs have it; folding it changes the rounding only."""
    net = randomise(timm.create_model("vit_small_patch14_dinov2", num_classes=0, img_size=28))
    assert "blocks.0.ls1.gamma" in net.state_dict()
    model = TimeSformer(n_frames=2, image_size=28, model_size="small", patch_size=14).eval()
    with_own_head(model, model.convert_state_dict(net.state_dict()))
    frame = clips(1, 1, 3, 28, 28)
    wanted = net(model.normalize(frame)[:, 0])
    model.head = nn.Identity()
    found = model(frame.expand(-1, 2, -1, -1, -1))
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_positions_of_another_size_are_timms() -> None:
    """Two-dimensional, bicubic, the class token apart; timm does the same at run time."""
    net = timm.create_model("vit_tiny_patch16_224", num_classes=0, dynamic_img_size=True)
    randomise(net)
    model = TimeSformer(n_frames=2, image_size=96).eval()
    with_own_head(model, model.convert_state_dict(net.state_dict()))
    frame = clips(1, 1, 3, 96, 96)
    wanted = net(model.normalize(frame)[:, 0])
    model.head = nn.Identity()
    assert torch.equal(model(frame.expand(-1, 2, -1, -1, -1)), wanted)
    assert model.pos_embed.shape == (1, 37, 192)


@torch.no_grad()
def test_positions_in_time_are_interpolated() -> None:
    few, many = TimeSformer(n_frames=2, image_size=32), TimeSformer(n_frames=4, image_size=32)
    few.time_embed.copy_(torch.tensor([0.0, 1.0]).view(1, 2, 1).expand(-1, -1, 192))
    times = many.adapt_state_dict(few.state_dict())["time_embed"]
    torch.testing.assert_close(times[0, :, 7], torch.tensor([0, 0.25, 0.75, 1]))


@torch.no_grad()
def test_only_the_temporal_branch_and_its_positions_see_the_order() -> None:
    model, x = TimeSformer(n_frames=4, image_size=32).eval(), clips(1, 4, 3, 32, 32)
    shuffled = x[:, [2, 0, 3, 1]]
    torch.testing.assert_close(model(x), model(shuffled), atol=1e-6, rtol=1e-5)
    for block in model.blocks:
        nn.init.normal_(block.temporal_fc.weight, std=0.1)
    model.time_embed.normal_()
    assert not torch.allclose(model(x), model(shuffled), atol=1e-4)


def test_drop_path_grows_linearly_and_drops_whole_clips() -> None:
    model = TimeSformer(n_frames=2, image_size=32, drop_path=0.5)
    rates = [block.drop_path_rate for block in model.blocks]
    assert rates == pytest.approx([0.5 * number / 11 for number in range(12)])
    block = randomise(Block(dim=12, heads=3, dropout=0.0, drop_path_rate=0.5)).train()
    nn.init.zeros_(block.temporal_fc.bias)
    nn.init.zeros_(block.temporal_fc.weight)
    nn.init.zeros_(block.mlp.fc2.weight)
    nn.init.zeros_(block.mlp.fc2.bias)
    tokens = clips(1, 7, 12).repeat(40, 1, 1)  # T = 2, three patches: space alone changes them
    with torch.no_grad():
        change = (block(tokens, 2) - tokens).abs().amax(dim=2)  # (B, tokens)
    dropped = (change < 1e-7).all(dim=1)
    assert 5 < dropped.sum() < 35
    assert torch.equal(dropped, (change < 1e-7).any(dim=1))


def test_image_sizes_that_are_no_multiple_of_the_patch_are_refused() -> None:
    with pytest.raises(UserError, match="image_size 100 must be a multiple"):
        TimeSformer(image_size=100)
