"""MViT: attention over pooled queries, keys and values; the maps shrink from block to block.

Fan et al., "Multiscale Vision Transformers", ICCV 2021, arXiv:2104.11227 (version 1); Li et al.,
"MViTv2: Improved Multiscale Vision Transformers for Classification and Detection", CVPR 2022,
arXiv:2112.01526.
"""

import functools
import math
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from modeling.layers import SLOWFAST_MEAN_STD, Normalize, checkpointed
from utils.errors import UserError

SIZES = {"small": "mvit_v2_s", "base": "mvit_v1_b"}
"""the networks that torchvision has: version 2 in one size, version 1 in another"""


Size = tuple[int, int, int]


def _apply_block(block: nn.Module, x: torch.Tensor, thw: Size) -> tuple[torch.Tensor, Size]:
    """The output of a block, and the size of its map of tokens.

    torchvision makes the indices of the relative positions on the default device. Made on the CPU,
    each of the 48 would have to be copied to a GPU, which must finish its work first.
    """
    if x.device.type == "cpu":
        return block(x, thw)
    with torch.device(x.device):
        return block(x, thw)


class MViT(nn.Module):
    """torchvision's MViT with a new classifier.

    The Kinetics-400 weights were trained on 16 frames, every fourth one of the video, of 224
    pixels. `small` takes clips of any length and size: it knows the positions of tokens relative to
    each other, and interpolates them in every forward pass. `base` has a position embedding for
    `n_frames` and `image_size`; weights of another T or size are fitted by `adapt_state_dict`.

    Args:
        n_frames, image_size: T and the pixels of a side (`base`).
        model_size: `small` (MViTv2-S; also if empty) or `base` (MViTv1-B).
        dropout: before the classifier.
        drop_path: stochastic depth (Huang et al., 2016, arXiv:1603.09382): probability that a clip
            skips a residual branch; it grows linearly from 0 at the first block to this at the
            last.

    Raises:
        UserError: there is no such size.
    """

    def __init__(
        self,
        num_classes: int = 7,
        n_frames: int = 16,
        image_size: int = 224,
        model_size: str = "",
        dropout: float = 0.0,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        from torchvision.models import get_model  # takes seconds to import
        from torchvision.models.video.mvit import PositionalEncoding

        self.model_size = model_size or "small"
        if self.model_size not in SIZES:
            raise UserError(f"mvit has no model_size {model_size}: choose {' or '.join(SIZES)}")
        self.normalize = Normalize(SLOWFAST_MEAN_STD)
        self.backbone = net = get_model(
            SIZES[self.model_size], num_classes=num_classes, stochastic_depth_prob=drop_path
        )
        if self.model_size == "base":  # torchvision's function makes positions for 16 x 224 only
            dim, t, side = (
                net.conv_proj.out_channels,
                math.ceil(n_frames / 2),
                math.ceil(image_size / 4),
            )
            net.pos_encoding = PositionalEncoding(dim, (side, side), t, rel_pos_embed=False)
            for embedding in net.pos_encoding.parameters():
                nn.init.trunc_normal_(embedding, std=0.02)
        self.dropout = nn.Dropout(dropout)
        self.head, net.head = net.head[1], nn.Identity()

    @property
    def torchvision_weights(self) -> Any:
        """torchvision's enum of pretrained weights."""
        from torchvision.models import get_model_weights

        return get_model_weights(SIZES[self.model_size])

    def forward(self, clips: torch.Tensor) -> torch.Tensor:
        """`(B, T, C, H, W)` uint8 or float in [0, 1] to logits `(B, num_classes)`."""
        net = self.backbone
        x = self.normalize(clips).transpose(1, 2)  # (B, T, C, H, W) -> (B, C, T, H, W)
        x = net.conv_proj(x)  # (B, dim, T / 2, H / 4, W / 4)
        thw = tuple(x.shape[2:])
        x = net.pos_encoding(x.flatten(2).transpose(1, 2))  # (B, 1 + T * H * W / 32, dim)
        for block in net.blocks:
            x, thw = checkpointed([block], functools.partial(_apply_block, block), x, thw)
        return self.head(self.dropout(net.norm(x)[:, 0]))

    def stages(self) -> dict[str, list[nn.Module]]:
        """The modules from stem to head."""
        net = self.backbone
        blocks = {f"block{number}": [block] for number, block in enumerate(net.blocks, 1)}
        return (
            {"patch": [net.conv_proj, net.pos_encoding]} | blocks | {"head": [net.norm, self.head]}
        )

    def adapt_state_dict(self, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Fit the position embeddings of a state dict to this model's T and image size.

        Those in space are interpolated bicubically over (H, W), those in time linearly over T.
        Embeddings of this size, or of another width, are left untouched.
        """
        fitted, own = {}, self.state_dict()
        for name, axes, mode in (("spatial_pos", 2, "bicubic"), ("temporal_pos", 1, "linear")):
            key = f"backbone.pos_encoding.{name}"
            if key not in state or key not in own or state[key].shape == own[key].shape:
                continue
            old, (count, dim) = state[key], own[key].shape
            side = round(len(old) ** (1 / axes)) if old.dim() == 2 else 0
            if not old.is_floating_point() or not side or old.shape != (side**axes, dim):
                continue  # more than the size differs: the loader reports the shapes
            grid = old.T.unflatten(1, (side,) * axes)[None]  # (1, dim, T) or (1, dim, H, W)
            grid = F.interpolate(grid.float(), round(count ** (1 / axes)), mode=mode)
            fitted[key] = grid.flatten(2)[0].T  # (T, dim) or (H * W, dim)
        return {**state, **fitted} if fitted else state
