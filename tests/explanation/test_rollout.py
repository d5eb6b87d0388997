"""Attention rollout, against whole matrices."""

import pytest
import torch
from helpers import make_model

from explanation.rollout import propagate, recorded_attention, rollout
from modeling.vit import attend


def random_clips(n: int = 2, t: int = 4, size: int = 32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (n, t, 3, size, size), generator=generator, dtype=torch.uint8)


def strong(name: str, **options: object) -> torch.nn.Module:
    """A model whose attention is far from even."""
    torch.manual_seed(0)
    model = make_model(name, n_frames=4, image_size=32, **options).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "qkv.weight" in key:
                parameter *= 12
    return model


def test_recorded_attention_is_what_the_layer_uses() -> None:
    torch.manual_seed(0)
    qkv = torch.nn.Linear(6, 3 * 6)
    x = torch.randn(2, 5, 6)
    with recorded_attention([(qkv, 1)]) as attention:
        output = qkv(x)
    torch.testing.assert_close(attention[0] @ output[..., 12:], attend(output, 1))
    torch.testing.assert_close(attention[0].sum(2), torch.ones(2, 5))


def test_weights_keep_their_sum() -> None:
    torch.manual_seed(0)
    attention = torch.randn(3, 5, 5).softmax(2)
    row = torch.randn(3, 5).softmax(1)
    torch.testing.assert_close(propagate(row, attention).sum(1), torch.ones(3))
    identity = torch.eye(5).expand(3, 5, 5)
    torch.testing.assert_close(propagate(row, identity), row)


def whole_matrices(model: torch.nn.Module, clips: torch.Tensor) -> torch.Tensor:
    """The rollout of a TimeSformer from matrices of all tokens, `(tokens, tokens)`."""
    t = clips.shape[1]
    parts = [part for block in model.blocks for part in (block.temporal_attn, block.attn)]
    with recorded_attention([(part.qkv, part.heads) for part in parts]) as attention:
        model(clips)
    p = attention[1].shape[1] - 1
    number = 1 + torch.arange(t * p).view(t, p)  # of the token of a frame's patch
    product = torch.eye(1 + t * p)
    for in_time, in_space in zip(attention[::2], attention[1::2], strict=True):
        time, space = torch.eye(1 + t * p), torch.zeros(1 + t * p, 1 + t * p)
        for patch in range(p):
            rows = number[:, patch]
            time[rows[:, None], rows] = (torch.eye(t) + in_time[patch]) / 2
        for frame in range(t):
            mixed = (torch.eye(1 + p) + in_space[frame]) / 2
            tokens = torch.cat((torch.zeros(1, dtype=torch.long), number[frame]))
            space[number[frame][:, None], tokens] += mixed[1:]
            space[0, tokens] += mixed[0] / t
        product = space @ time @ product
    return product


def test_timesformer_equals_the_product_of_whole_matrices() -> None:
    model, clips = strong("timesformer"), random_clips(1)
    matrix = whole_matrices(model, clips)
    torch.testing.assert_close(matrix.sum(1), torch.ones(len(matrix)))
    relevance = rollout(model, clips)
    torch.testing.assert_close(relevance.maps.flatten(), matrix[0, 1:], rtol=1e-4, atol=1e-7)
    assert relevance.maps.max() > 1.5 * relevance.maps.mean()  # far from even


def test_vivit_multiplies_the_frame_and_the_patch() -> None:
    model, clips = strong("vivit"), random_clips(1)
    blocks = [*model.spatial, *model.temporal]
    with recorded_attention([(block.qkv, block.heads) for block in blocks]) as attention:
        model(clips)

    def chain(matrices: list[torch.Tensor]) -> torch.Tensor:
        product = torch.eye(matrices[0].shape[1])
        for matrix in matrices:
            product = (matrix + torch.eye(matrix.shape[1])) / 2 @ product
        return product

    in_space, in_time = chain(attention[:4]), chain(attention[4:])
    torch.testing.assert_close(in_space.sum(2), torch.ones(in_space.shape[:2]))
    expected = in_time[0, 0, 1:, None] * in_space[:, 0, 1:]
    torch.testing.assert_close(rollout(model, clips).maps.flatten(2)[0], expected)


def test_joint_attention_is_the_mean_row_of_the_product() -> None:
    model = strong("vivit", attention="joint", tubelet_frames=2)
    relevance = rollout(model, random_clips())
    with recorded_attention([(block.qkv, block.heads) for block in model.spatial]) as attention:
        model(random_clips())
    product = torch.eye(8)  # 2 tubelets of 4 patches
    for matrix in attention:
        product = (matrix + torch.eye(8)) / 2 @ product
    expected = product.mean(1).view(2, 2, 2, 2).repeat_interleave(2, 1) / 2  # (B, T, h, w)
    torch.testing.assert_close(relevance.maps, expected)
    assert expected.max() > 1.2 * expected.mean()
    assert relevance.maps.shape == (2, 4, 2, 2)
    torch.testing.assert_close(relevance.frames.sum(1), torch.ones(2))
    torch.testing.assert_close(relevance.frames[:, 0], relevance.frames[:, 1])  # of one tubelet


@pytest.mark.parametrize("name", ["vivit", "timesformer"])
def test_even_attention_gives_an_even_map(name: str) -> None:
    model = make_model(name, n_frames=4, image_size=32).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "qkv." in key:
                parameter.zero_()
    maps = rollout(model, random_clips()).maps
    torch.testing.assert_close(maps, maps[:1, :1, :1, :1].expand_as(maps))


@pytest.mark.parametrize("name", ["vivit", "timesformer"])
def test_a_patch_that_moves_by_one_moves_the_map_by_one(name: str) -> None:
    model = strong(name)
    with torch.no_grad():
        (model.embedding.positions if name == "vivit" else model.pos_embed).zero_()
    clip = torch.full((1, 4, 3, 32, 32), 90, dtype=torch.uint8)
    maps = []
    for row, column in ((0, 0), (0, 1), (1, 0)):
        moved = clip.clone()
        moved[..., 16 * row : 16 * row + 16, 16 * column : 16 * column + 16] = 200
        maps.append(rollout(model, moved).maps)
    torch.testing.assert_close(maps[1].roll(-1, 3), maps[0])
    torch.testing.assert_close(maps[2].roll(-1, 2), maps[0])
    assert (maps[0][..., 0, 0] - maps[0][..., 1, 1]).abs().min() > 1e-4
