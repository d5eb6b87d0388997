"""ViViT: attention within each frame, then between frames.

Arnab et al., "ViViT: A Video Vision Transformer", ICCV 2021, arXiv:2103.15691: model 2, the
factorised encoder.
"""

import torch
from torch import nn
from torch.nn import functional as F

from modeling.layers import (
    IMAGENET_MEAN_STD,
    Normalize,
    checkpointed,
    drop_path,
    drop_path_rates,
)
from utils.errors import UserError


class Block(nn.Module):
    """A pre-norm transformer block: attention, then an MLP four times as wide.

    In training each of the two branches is skipped with probability `drop_path_rate`: see
    `modeling.layers.drop_path`.
    """

    def __init__(
        self, dim: int, heads: int, dim_head: int, dropout: float, drop_path_rate: float = 0.0
    ) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.drop_path_rate = drop_path_rate
        inner = heads * dim_head
        self.attention_norm = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * inner, bias=False)
        self.out = nn.Linear(inner, dim)
        self.mlp_norm = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(
            nn.Linear(dim, 4 * dim),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(4 * dim, dim),
            nn.Dropout(dropout),
        )

    def forward(self, x: torch.Tensor, rows_per_clip: int = 1) -> torch.Tensor:
        """`(N, tokens, dim)` to the same shape; every `rows_per_clip` rows belong to one clip."""
        x = x + self._drop(self._attention(self.attention_norm(x)), rows_per_clip)
        return x + self._drop(self.mlp(self.mlp_norm(x)), rows_per_clip)

    def _drop(self, branch: torch.Tensor, rows_per_clip: int) -> torch.Tensor:
        return drop_path(branch, self.drop_path_rate, self.training, rows_per_clip)

    def _attention(self, x: torch.Tensor) -> torch.Tensor:
        qkv = self.qkv(x).unflatten(2, (3, self.heads, -1))  # (N, tokens, 3, heads, dim_head)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # 3 x (N, heads, tokens, dim_head)
        # The functional form would apply dropout in eval mode too.
        dropout = self.dropout if self.training else 0.0
        x = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
        x = self.out(x.transpose(1, 2).flatten(2))  # (N, heads, tokens, dim_head) -> (N, tokens, -)
        return F.dropout(x, self.dropout, self.training)


class Embedding(nn.Module):
    """Frames to tokens: patches, a class token before them, positions added."""

    def __init__(
        self, n_frames: int, image_size: int, patch_size: int, dim: int, dropout: float
    ) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.patches = nn.Linear(3 * patch_size**2, dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        tokens = (image_size // patch_size) ** 2 + 1
        self.positions = nn.Parameter(torch.zeros(1, n_frames, tokens, dim))
        self.dropout = nn.Dropout(dropout)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.positions, std=0.02)

    def forward(self, clips: torch.Tensor) -> torch.Tensor:
        """`(B, T, C, H, W)` to `(B, T, 1 + patches, dim)`."""
        b, t, c, h, w = clips.shape
        p = self.patch_size
        x = clips.reshape(b, t, c, h // p, p, w // p, p)
        x = x.permute(0, 1, 3, 5, 4, 6, 2).flatten(4)  # (B, T, H/p, W/p, p * p * C)
        x = self.patches(x.flatten(2, 3))  # (B, T, patches, dim)
        cls = self.cls_token.expand(b, t, -1, -1)
        return self.dropout(torch.cat((cls, x), dim=2) + self.positions)


class ViViT(nn.Module):
    """The spatial encoder turns each frame into one token, the temporal encoder each clip into one.

    Args:
        n_frames, image_size: T and the pixels of a side; both fix the position embeddings. Weights
            of another T or size are fitted by `adapt_state_dict`.
        dropout: in the embedding, the blocks and their attention.
        drop_path: stochastic depth (Huang et al., 2016, arXiv:1603.09382): probability that a clip
            skips a residual branch. It grows linearly from 0 at the first spatial block to this at
            the last temporal one, both encoders counted as one (the linear rule, as in DeiT).

    Raises:
        UserError: the image size is not a multiple of the patch size.
    """

    torchvision_weights = None

    def __init__(
        self,
        num_classes: int = 7,
        n_frames: int = 16,
        image_size: int = 224,
        patch_size: int = 16,
        dim: int = 192,
        depth: int = 4,
        heads: int = 3,
        dim_head: int = 64,
        dropout: float = 0.0,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        if image_size % patch_size:
            raise UserError(
                f"vivit cuts frames into patches of {patch_size} pixels: image_size {image_size} "
                f"must be a multiple, e.g. {max(1, round(image_size / patch_size)) * patch_size}"
            )
        self.normalize = Normalize(IMAGENET_MEAN_STD)
        self.embedding = Embedding(n_frames, image_size, patch_size, dim, dropout)
        shape = (dim, heads, dim_head, dropout)
        rates = drop_path_rates(drop_path, 2 * depth)
        self.spatial = nn.ModuleList(Block(*shape, rate) for rate in rates[:depth])
        self.spatial_norm = nn.LayerNorm(dim)
        # A list with one parameter: stages() lists modules, and a parameter alone is not a module.
        self.clip_token = nn.ParameterList([torch.zeros(1, 1, dim)])
        self.temporal = nn.ModuleList(Block(*shape, rate) for rate in rates[depth:])
        self.temporal_norm = nn.LayerNorm(dim)
        self.head = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, num_classes))
        nn.init.trunc_normal_(self.clip_token[0], std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, clips: torch.Tensor) -> torch.Tensor:
        """`(B, T, C, H, W)` uint8 or float in [0, 1] to logits `(B, num_classes)`."""
        x = self.embedding(self.normalize(clips)).flatten(0, 1)  # (B * T, 1 + patches, dim)
        for block in self.spatial:
            x = checkpointed([block], block, x, clips.shape[1])
        x = self.spatial_norm(x[:, 0]).unflatten(0, clips.shape[:2])  # (B, T, dim)
        x = torch.cat((self.clip_token[0].expand(len(x), -1, -1), x), dim=1)  # (B, 1 + T, dim)
        for block in self.temporal:
            x = checkpointed([block], block, x)
        return self.head(self.temporal_norm(x[:, 0]))

    def stages(self) -> dict[str, list[nn.Module]]:
        """The modules from stem to head."""
        stages: dict[str, list[nn.Module]] = {"embedding": [self.embedding]}
        for number, block in enumerate(self.spatial, 1):
            stages[f"spatial{number}"] = [block]
        stages[f"spatial{len(self.spatial)}"].append(self.spatial_norm)
        for number, block in enumerate(self.temporal, 1):
            stages[f"temporal{number}"] = [block]
        stages["temporal1"].append(self.clip_token)
        stages[f"temporal{len(self.temporal)}"].append(self.temporal_norm)
        return stages | {"head": [self.head]}

    def adapt_state_dict(self, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Fit the position embeddings of a state dict to this model's T and image size.

        The positions of the patches are interpolated trilinearly over (T, H, W), those of the class
        token linearly over T. Positions of this size, or of another width, are left untouched.
        """
        key = "embedding.positions"
        if key not in state:
            return state
        old, new = state[key], self.embedding.positions
        if old.shape == new.shape or not old.is_floating_point() or not old.numel():
            return state
        side = round((old.shape[2] - 1) ** 0.5) if old.dim() == 4 else 0
        if old.dim() != 4 or old.shape[2] != side**2 + 1 or old.shape[3] != new.shape[3]:
            return state  # more than the size differs: the loader reports the shapes
        cls, grid = old[:, :, :1], old[:, :, 1:]  # (1, T, 1, dim), (1, T, patches, dim)
        new_side = round((new.shape[2] - 1) ** 0.5)
        frames = new.shape[1]
        grid = grid.unflatten(2, (side, side)).permute(0, 4, 1, 2, 3)  # (1, dim, T, H, W)
        grid = F.interpolate(grid, (frames, new_side, new_side), mode="trilinear")
        grid = grid.permute(0, 2, 3, 4, 1).flatten(2, 3)  # (1, T', patches', dim)
        cls = F.interpolate(cls[:, :, 0].transpose(1, 2), frames, mode="linear")  # (1, dim, T')
        cls = cls.transpose(1, 2).unsqueeze(2)  # (1, T', 1, dim)
        return {**state, key: torch.cat((cls, grid), dim=2)}
