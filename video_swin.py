"""Video Swin: attention within windows of space and time, which move from block to block.

Liu et al., "Video Swin Transformer", CVPR 2022, arXiv:2106.13230.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from modeling.layers import IMAGENET_MEAN_STD, LAYERS, Normalize, checkpointed

SIZES = {
    "tiny": (96, (2, 2, 6, 2)),
    "small": (96, (2, 2, 18, 2)),
    "base": (128, (2, 2, 18, 2)),
}
"""width of the first layer, and number of blocks of each layer (section 3.3 of the paper)"""

WINDOW = (8, 7, 7)
"""tokens of a window in time, height and width"""


class WindowAttention(nn.Module):
    """Self-attention within windows, with a learned bias for every offset between two tokens.

    It replaces torchvision's ShiftedWindowAttention3d, with the same weights and the same outputs,
    except where a map is smaller than a window: there torchvision reads the biases of other offsets
    (see `relative_position_bias`).

    Args:
        dim: channels.
        window_size: tokens of a window, (time, height, width).
        shift_size: by how many tokens the windows are moved, (time, height, width).
        dropouts: torchvision passes its rates here, which are all 0.
    """

    def __init__(
        self,
        dim: int,
        window_size: Sequence[int],
        shift_size: Sequence[int],
        num_heads: int,
        **dropouts: float,
    ) -> None:
        super().__init__()
        self.window_size = tuple(window_size)
        self.shift_size = tuple(shift_size)
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        t, h, w = (2 * size - 1 for size in window_size)  # offsets along each axis
        self.relative_position_bias_table = nn.Parameter(torch.zeros(t * h * w, num_heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`(B, T, H, W, C)` to the same shape."""
        b, *size, c = x.shape
        window = [min(pair) for pair in zip(self.window_size, size, strict=True)]
        # One window over the whole axis sees everything and has nowhere to move.
        shift = [s if n > w else 0 for s, n, w in zip(self.shift_size, size, window, strict=True)]
        t, h, w = (-n % w for n, w in zip(size, window, strict=True))
        x = F.pad(x, (0, 0, 0, w, 0, h, 0, t))
        padded = x.shape[1:4]
        if any(shift):
            x = x.roll([-s for s in shift], dims=(1, 2, 3))
        x = to_windows(x, window)  # (B * windows, tokens, C)

        qkv = self.qkv(x).unflatten(2, (3, self.num_heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # 3 x (B * windows, heads, tokens, C / heads)
        # In one call, scaled_dot_product_attention would round otherwise than torchvision.
        scores = (q * (c // self.num_heads) ** -0.5) @ k.transpose(2, 3)
        scores = scores + self.relative_position_bias(window)
        if any(shift):
            mask = attention_mask(padded, window, shift, scores)  # (windows, 1, tokens, tokens)
            scores = (scores.unflatten(0, (b, -1)) + mask).flatten(0, 1)
        x = scores.softmax(dim=3) @ v
        x = self.proj(x.transpose(1, 2).flatten(2))  # (B * windows, tokens, C)

        x = from_windows(x, window, padded)  # (B, T, H, W, C), padded
        if any(shift):
            x = x.roll(shift, dims=(1, 2, 3))
        return x[:, : size[0], : size[1], : size[2]]

    def relative_position_bias(self, window: Sequence[int]) -> torch.Tensor:
        """The bias of each pair of tokens of a window, `(heads, tokens, tokens)`.

        The table has a row for each offset (dt, dh, dw) between two tokens of a window of full
        size. In a smaller window, which a small map has, only some of these offsets occur.
        torchvision reads there the biases of as many first tokens of a full window, which are
        other offsets, because its rows of tokens are longer.
        """
        rows = []
        for n, full in zip(window, self.window_size, strict=True):
            i = torch.arange(n, device=self.relative_position_bias_table.device)
            rows.append(i[:, None] - i + full - 1)  # (n, n), from 0 to 2 * full - 2
        t, h, w = rows
        table = self.relative_position_bias_table.unflatten(
            0, [2 * n - 1 for n in self.window_size]
        )
        bias = table[
            t[:, None, None, :, None, None],
            h[None, :, None, None, :, None],
            w[None, None, :, None, None, :],
        ]  # (t, h, w, t, h, w, heads)
        return bias.flatten(3, 5).flatten(0, 2).permute(2, 0, 1).contiguous()


def to_windows(x: torch.Tensor, window: Sequence[int]) -> torch.Tensor:
    """A map `(B, T, H, W, C)` as windows `(B * windows, tokens, C)`."""
    for axis, n in zip((1, 3, 5), window, strict=True):
        x = x.unflatten(axis, (-1, n))
    x = x.permute(0, 1, 3, 5, 2, 4, 6, 7)  # (B, T/t, H/h, W/w, t, h, w, C)
    return x.flatten(4, 6).flatten(0, 3)


def from_windows(x: torch.Tensor, window: Sequence[int], size: Sequence[int]) -> torch.Tensor:
    """The inverse of `to_windows`, for a map of size (T, H, W)."""
    counts = [n // w for n, w in zip(size, window, strict=True)]
    x = x.unflatten(0, (-1, *counts)).unflatten(4, window)  # (B, T/t, H/h, W/w, t, h, w, C)
    x = x.permute(0, 1, 4, 2, 5, 3, 6, 7)
    return x.flatten(5, 6).flatten(3, 4).flatten(1, 2)


def attention_mask(
    size: Sequence[int], window: Sequence[int], shift: Sequence[int], like: torch.Tensor
) -> torch.Tensor:
    """What is added to the scores of a shifted map: -100 for two tokens that are no neighbours.

    After the shift the last window of an axis holds the end of the map and, behind it, the tokens
    that came round from its beginning; they must not see each other (figure 3 of the paper).

    Args:
        size: of the padded map, (T, H, W).
        like: a tensor of the device and dtype of the mask.

    Returns:
        `(windows, 1, tokens, tokens)`.
    """
    regions = torch.zeros(1, device=like.device)
    for n, w, s in zip(size, window, shift, strict=True):
        i = torch.arange(n, device=like.device)
        region = (i >= n - w).int() + (i >= n - s)  # 0, 1, 2
        regions = 3 * regions[..., None] + region  # (1, T), (1, T, H), (1, T, H, W)
    regions = to_windows(regions[..., None], window)  # (windows, tokens, 1)
    apart = regions != regions.transpose(1, 2)  # (windows, tokens, tokens)
    return like.new_zeros(apart.shape).masked_fill(apart, -100).unsqueeze(1)


class VideoSwin(nn.Module):
    """torchvision's Video Swin with our window attention and a new classifier.

    It takes clips of any length and size. Its Kinetics-400 weights were trained on 32 frames, every
    second one of the video, of 224 pixels; see `WindowAttention` for smaller ones.

    Args:
        model_size: `tiny` (the default), `small` or `base`.
        dropout: before the classifier.
        drop_path: stochastic depth (Huang et al., 2016, arXiv:1603.09382): probability that a clip
            skips a residual branch; it grows linearly from 0 at the first block to this at the
            last.
    """

    def __init__(
        self,
        num_classes: int = 7,
        model_size: str = "",
        dropout: float = 0.0,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        from torchvision.models.swin_transformer import SwinTransformerBlock  # takes seconds
        from torchvision.models.video import SwinTransformer3d

        def block(*shape: int, **options: Any) -> nn.Module:
            return SwinTransformerBlock(*shape, **{**options, "attn_layer": WindowAttention})

        self.model_size = model_size or "tiny"
        dim, depths = SIZES[self.model_size]
        self.normalize = Normalize(IMAGENET_MEAN_STD)
        self.backbone = SwinTransformer3d(
            patch_size=[2, 4, 4],
            embed_dim=dim,
            depths=list(depths),
            num_heads=[dim * 2**layer // 32 for layer in range(4)],
            window_size=list(WINDOW),
            stochastic_depth_prob=drop_path,
            num_classes=num_classes,
            block=block,
        )
        self.dropout = nn.Dropout(dropout)
        self.head, self.backbone.head = self.backbone.head, nn.Identity()

    @property
    def torchvision_weights(self) -> Any:
        """torchvision's enum of pretrained weights."""
        from torchvision.models import get_model_weights

        return get_model_weights(f"swin3d_{self.model_size[0]}")

    def forward(self, clips: torch.Tensor) -> torch.Tensor:
        """`(B, T, C, H, W)` uint8 or float in [0, 1] to logits `(B, num_classes)`."""
        x = self.normalize(clips).transpose(1, 2)  # (B, T, C, H, W) -> (B, C, T, H, W)
        x = self.backbone.patch_embed(x)  # (B, T / 2, H / 4, W / 4, dim)
        for layer in self._layers():
            for block in layer:
                x = checkpointed([block], block, x)
        x = self.backbone.norm(x).mean(dim=(1, 2, 3))  # (B, 8 * dim)
        return self.head(self.dropout(x))

    def _layers(self) -> list[list[nn.Module]]:
        """The blocks of each layer, and the merging of 2 x 2 patches at its end."""
        parts = list(self.backbone.features)  # blocks, merging, blocks, merging, ..., blocks
        layers = [[*blocks] for blocks in parts[::2]]
        for layer, merging in zip(layers, parts[1::2], strict=False):
            layer.append(merging)
        return layers

    def stages(self) -> dict[str, list[nn.Module]]:
        """The modules from stem to head."""
        layers = dict(zip(LAYERS, self._layers(), strict=True))
        ends = {"head": [self.backbone.norm, self.head]}
        return {"patch_embed": [self.backbone.patch_embed]} | layers | ends

    def adapt_state_dict(self, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Leave out torchvision's tables of offsets, which we compute."""
        suffix = ".relative_position_index"
        return {key: value for key, value in state.items() if not str(key).endswith(suffix)}
