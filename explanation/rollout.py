"""Attention rollout: how far each patch reaches the answer through the attention of all blocks.

Abnar and Zuidema, "Quantifying Attention Flow in Transformers", ACL 2020, arXiv:2005.00928. The
attention of a block, averaged over its heads, is mixed with the identity of the residual path,
(A + I) / 2, and these matrices are multiplied. Only the row of the answer is needed, so it is a
vector that goes from the last block to the first. It says what the model looked at, for all classes
alike.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from explanation.relevance import Relevance
from timesformer import TimeSformer
from vivit import ViViT


@contextmanager
def recorded_attention(layers: Sequence[tuple[nn.Linear, int]]) -> Iterator[list[torch.Tensor]]:
    """Within this block the list holds the attention of each layer, `(N, tokens, tokens)`, averaged
    over the heads, in the order of the calls.

    Args:
        layers: the layer of queries, keys and values of each attention, and its heads.
    """
    attention: list[torch.Tensor] = []

    def record(heads: int, qkv: torch.Tensor) -> None:
        q, k, _ = qkv.unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)  # (N, heads, tokens, dim)
        scores = q.float() @ k.float().transpose(2, 3) / q.shape[-1] ** 0.5
        attention.append(scores.softmax(dim=3).mean(dim=1))

    hooks = [
        layer.register_forward_hook(lambda _, __, qkv, heads=heads: record(heads, qkv))
        for layer, heads in layers
    ]
    try:
        yield attention
    finally:
        for hook in hooks:
            hook.remove()


def propagate(row: torch.Tensor, attention: torch.Tensor) -> torch.Tensor:
    """Weights of a block's outputs, `(..., tokens)`, as weights of its inputs.

    Args:
        attention: `(..., tokens, tokens)`; each row sums to 1, and so the weights keep their sum.
    """
    return (row + (row.unsqueeze(-2) @ attention).squeeze(-2)) / 2


@torch.no_grad()
def rollout(model: ViViT | TimeSformer, clips: torch.Tensor) -> Relevance:
    """The weight of each patch of each frame in the answer, and their sum for each frame.

    The weights of the patches and of the class tokens together sum to 1. Where a token stands for
    several frames, they get equal parts of its weight.

    Args:
        model: in eval mode.
        clips: `(B, T, C, H, W)` uint8, or float in [0, 1].
    """
    t = clips.shape[1]
    if isinstance(model, TimeSformer):
        weights = _timesformer(model, clips)  # (B, T, patches)
    elif model.temporal_norm is None:
        weights = _joint(model, clips)
    else:
        weights = _factorised(model, clips)
    repeats = t // weights.shape[1]
    weights = weights.repeat_interleave(repeats, 1) / repeats
    side = round(weights.shape[2] ** 0.5)
    maps = weights.unflatten(2, (side, -1)).cpu()
    return Relevance(maps, maps.sum((2, 3)))


def _factorised(model: ViViT, clips: torch.Tensor) -> torch.Tensor:
    """The weight of a patch is that of its frame in the clip times its own in the frame."""
    spatial, temporal = len(model.spatial), len(model.temporal)
    blocks = [*model.spatial, *model.temporal]
    with recorded_attention([(block.qkv, block.heads) for block in blocks]) as attention:
        model(clips)
    of_frames = _first_token(attention[spatial : spatial + temporal])[:, 1:]  # (B, T')
    of_patches = _first_token(attention[:spatial])[:, 1:]  # (B * T', patches)
    return of_frames[..., None] * of_patches.unflatten(0, of_frames.shape)


def _first_token(attention: Sequence[torch.Tensor]) -> torch.Tensor:
    """The weights `(N, tokens)` of all tokens in the output of the first one."""
    row = torch.zeros_like(attention[0][:, 0])
    row[:, 0] = 1
    for matrix in reversed(attention):
        row = propagate(row, matrix)
    return row


def _joint(model: ViViT, clips: torch.Tensor) -> torch.Tensor:
    """The mean of all tokens is classified."""
    with recorded_attention([(block.qkv, block.heads) for block in model.spatial]) as attention:
        model(clips)
    row = torch.full_like(attention[0][:, 0], 1 / attention[0].shape[1])
    for matrix in reversed(attention):
        row = propagate(row, matrix)
    return row.unflatten(1, (model.embedding.positions.shape[1], -1))


def _timesformer(model: TimeSformer, clips: torch.Tensor) -> torch.Tensor:
    """A block attends in time and then in space, so the row passes space first."""
    b, t = clips.shape[:2]
    parts = [part for block in model.blocks for part in (block.temporal_attn, block.attn)]
    with recorded_attention([(part.qkv, part.heads) for part in parts]) as attention:
        model(clips)
    patches = attention[1].shape[1] - 1
    cls = attention[0].new_ones(b)
    x = attention[0].new_zeros(b, t, patches)
    for in_time, in_space in zip(reversed(attention[::2]), reversed(attention[1::2]), strict=True):
        # The class token is the mean of those of the frames.
        rows = torch.cat((cls[:, None, None].expand(-1, t, 1) / t, x), dim=2)  # (B, T, 1 + patches)
        rows = propagate(rows, in_space.unflatten(0, (b, t)))
        cls, x = rows[..., 0].sum(dim=1), rows[..., 1:]
        x = propagate(x.transpose(1, 2), in_time.unflatten(0, (b, patches))).transpose(1, 2)
    return x
