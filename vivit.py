"""ViViT: attention within each frame, then between frames; or between all tokens of a clip.

Arnab et al., "ViViT: A Video Vision Transformer", ICCV 2021, arXiv:2103.15691: model 2, the
factorised encoder, and model 1, joint attention, which is also the encoder of VideoMAE (Tong et
al., NeurIPS 2022, arXiv:2203.12602).
"""

import re
from typing import TYPE_CHECKING, Literal

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
from modeling.vit import (
    LAYER_NORM_EPS,
    SIZES,
    attend,
    fold_layer_scale,
    is_image_vit,
    patches_per_side,
    pretrained_image_vit,
    resize_positions,
    select_patches,
)
from utils.errors import UserError

if TYPE_CHECKING:
    from modeling.timm_networks import Pretrained


class Block(nn.Module):
    """A pre-norm transformer block: attention, then an MLP four times as wide.

    In training each of the two branches is skipped with probability `drop_path_rate`: see
    `modeling.layers.drop_path`.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        dim_head: int,
        dropout: float,
        drop_path_rate: float = 0.0,
        qkv_bias: bool = False,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.drop_path_rate = drop_path_rate
        inner = heads * dim_head
        self.attention_norm = nn.LayerNorm(dim, norm_eps)
        self.qkv = nn.Linear(dim, 3 * inner, bias=qkv_bias)
        self.out = nn.Linear(inner, dim)
        self.mlp_norm = nn.LayerNorm(dim, norm_eps)
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
        x = attend(self.qkv(x), self.heads, self.dropout if self.training else 0.0)
        return F.dropout(self.out(x), self.dropout, self.training)


class Embedding(nn.Module):
    """Clips to tokens: tubelets, a class token before those of each time, positions added.

    A tubelet is the same patch in `tubelet_frames` successive frames.
    """

    def __init__(
        self,
        n_frames: int,
        image_size: int,
        patch_size: int,
        dim: int,
        dropout: float,
        tubelet_frames: int = 1,
        class_token: bool = True,
    ) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.tubelet_frames = tubelet_frames
        self.patches = nn.Linear(3 * tubelet_frames * patch_size**2, dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim)) if class_token else None
        tokens = (image_size // patch_size) ** 2 + class_token
        self.positions = nn.Parameter(torch.zeros(1, n_frames // tubelet_frames, tokens, dim))
        self.dropout = nn.Dropout(dropout)
        for parameter in self.parameters(recurse=False):
            nn.init.trunc_normal_(parameter, std=0.02)

    def forward(self, clips: torch.Tensor, visible: torch.Tensor | None = None) -> torch.Tensor:
        """`(B, T, C, H, W)` to `(B, T / tubelet_frames, [1 +] patches, dim)`.

        Args:
            visible: `(B, K)` numbers of the patches that become tokens (None: all).
        """
        b, t, _, _, _ = clips.shape
        x = patchify(clips, self.patch_size, self.tubelet_frames)
        positions = self.positions
        if visible is not None:
            x = select_patches(x, visible)
            first = int(self.cls_token is not None)
            patches = select_patches(positions[:, :, first:], visible)
            cls = positions[:, :, :first].expand(b, -1, -1, -1)
            positions = torch.cat((cls, patches), dim=2)  # (B, T/f, [1 +] K, dim)
        x = self.patches(x)  # (B, T/f, patches, dim)
        if self.cls_token is not None:
            x = torch.cat((self.cls_token.expand(b, t // self.tubelet_frames, -1, -1), x), dim=2)
        return self.dropout(x + positions)


def patchify(clips: torch.Tensor, patch_size: int, tubelet_frames: int = 1) -> torch.Tensor:
    """The pixels of tubelets: `(B, T, C, H, W)` to `(B, T / f, patches, f * p * p * C)`."""
    b, t, c, h, w = clips.shape
    p, f = patch_size, tubelet_frames
    x = clips.reshape(b, t // f, f, c, h // p, p, w // p, p)
    x = x.permute(0, 1, 4, 6, 2, 5, 7, 3).flatten(4)  # (B, T/f, H/p, W/p, f * p * p * C)
    return x.flatten(2, 3)


class ViViT(nn.Module):
    """The spatial encoder turns each frame into one token, the temporal encoder each clip into one.

    With joint attention there is one encoder for all tokens of a clip, whose mean is classified.

    Args:
        n_frames, image_size: T and the pixels of a side; both fix the position embeddings. Weights
            of another T or size are fitted by `adapt_state_dict`.
        model_size: `tiny`, `small` or `base`: the spatial encoder is the image ViT of that size,
            the temporal one has four blocks as in the paper. Empty: the small network of the
            project that this one follows, given by dim, depth (of each encoder), heads, dim_head.
        tubelet_frames: frames per token.
        attention: `factorised` or `joint`.
        dropout: in the embedding, the blocks and their attention.
        drop_path: stochastic depth; see `modeling.layers.drop_path`. It grows over the blocks of
            both encoders, counted as one.

    Raises:
        UserError: the image size is not a multiple of the patch size, or T not of tubelet_frames.
    """

    new_parts = ("clip_token.", "temporal.", "temporal_norm.", "head.")
    """what the weights of another program leave as it is"""

    def __init__(
        self,
        num_classes: int = 7,
        n_frames: int = 16,
        image_size: int = 224,
        model_size: Literal["", "tiny", "small", "base"] = "",
        patch_size: int = 16,
        tubelet_frames: int = 1,
        attention: Literal["factorised", "joint"] = "factorised",
        dim: int = 192,
        depth: int = 4,
        heads: int = 3,
        dim_head: int = 64,
        dropout: float = 0.0,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        patches_per_side(image_size, patch_size, "vivit")
        if n_frames % tubelet_frames:
            raise UserError(
                f"vivit cuts clips into tubelets of {tubelet_frames} frames: n_frames {n_frames} "
                f"must be a multiple, e.g. {(n_frames // tubelet_frames + 1) * tubelet_frames}"
            )
        self.model_size = model_size
        temporal_depth, qkv_bias, eps = depth, False, 1e-5
        if model_size:
            dim, depth, heads = SIZES[model_size]
            temporal_depth, qkv_bias, eps = 4, True, LAYER_NORM_EPS
        factorised = attention == "factorised"
        self.normalize = Normalize(IMAGENET_MEAN_STD)
        self.embedding = Embedding(
            n_frames, image_size, patch_size, dim, dropout, tubelet_frames, factorised
        )
        shape = (dim, heads, dim_head, dropout)
        rates = drop_path_rates(drop_path, depth + factorised * temporal_depth)
        blocks = [Block(*shape, rate, qkv_bias, eps) for rate in rates]
        self.spatial = nn.ModuleList(blocks[:depth])
        self.spatial_norm = nn.LayerNorm(dim, eps)
        # A list with one parameter: stages() lists modules, and a parameter alone is not a module.
        self.clip_token = nn.ParameterList([torch.zeros(1, 1, dim)] * factorised)
        self.temporal = nn.ModuleList(blocks[depth:])
        self.temporal_norm = nn.LayerNorm(dim, eps) if factorised else None
        self.head = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, num_classes))
        for token in self.clip_token:
            nn.init.trunc_normal_(token, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, clips: torch.Tensor) -> torch.Tensor:
        """`(B, T, C, H, W)` uint8 or float in [0, 1] to logits `(B, num_classes)`."""
        tokens = self.embedding(self.normalize(clips))  # (B, T', [1 +] patches, dim)
        if self.temporal_norm is None:
            x = self._spatial(tokens.flatten(1, 2))  # (B, T' * patches, dim)
            return self.head(self.spatial_norm(x).mean(dim=1))
        x = self._spatial(tokens.flatten(0, 1), tokens.shape[1])  # (B * T', 1 + patches, dim)
        x = self._temporal(self.spatial_norm(x[:, 0]), tokens.shape[:2])  # (B, 1 + T', dim)
        return self.head(self.temporal_norm(x[:, 0]))

    def _spatial(self, x: torch.Tensor, rows_per_clip: int = 1) -> torch.Tensor:
        for block in self.spatial:
            x = checkpointed([block], block, x, rows_per_clip)
        return x

    def _temporal(self, frames: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        """The tokens of the frames, `(B * T', dim)`, to `(B, 1 + T', dim)`, the clip's before."""
        x = frames.unflatten(0, shape)  # (B, T', dim)
        x = torch.cat((self.clip_token[0].expand(shape[0], -1, -1), x), dim=1)
        for block in self.temporal:
            x = checkpointed([block], block, x)
        return x

    def forward_tokens(
        self, clips: torch.Tensor, visible: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The output tokens for masked autoencoding. Patches that are not visible are not computed.

        Args:
            clips: as in `forward`.
            visible: `(B, K)` numbers of the visible patches, the same at all times (None: all).

        Returns:
            The tokens of the patches, `(B, T', K, dim)`, and those of no patch. Factorised, the
            patches come from the spatial encoder, and the others, `(B, 1 + T', dim)`, are the clip
            and its frames from the temporal one, so that both encoders are trained. With joint
            attention there are no others: `(B, 0, dim)`.
        """
        tokens = self.embedding(self.normalize(clips), visible)  # (B, T', [1 +] K, dim)
        shape = tokens.shape[:2]
        if self.temporal_norm is None:
            x = self.spatial_norm(self._spatial(tokens.flatten(1, 2)))
            return x.unflatten(1, (shape[1], -1)), x[:, :0]
        x = self.spatial_norm(self._spatial(tokens.flatten(0, 1), shape[1]))
        others = self.temporal_norm(self._temporal(x[:, 0], shape))
        return x[:, 1:].unflatten(0, shape), others

    def pretrained_file(self) -> "Pretrained":
        """The image ViT that `--weights default` starts from."""
        if self.temporal_norm is None:
            raise UserError(
                "there are no pretrained weights for joint attention to download: give the file of "
                "a VideoMAE encoder, or --weights none to train from scratch"
            )
        return pretrained_image_vit(self.model_size, self.embedding.patch_size)

    def stages(self) -> dict[str, list[nn.Module]]:
        """The modules from stem to head."""
        stages: dict[str, list[nn.Module]] = {"embedding": [self.embedding]}
        for number, block in enumerate(self.spatial, 1):
            stages[f"spatial{number}"] = [block]
        stages[f"spatial{len(self.spatial)}"].append(self.spatial_norm)
        for number, block in enumerate(self.temporal, 1):
            stages[f"temporal{number}"] = [block]
        if self.temporal_norm is not None:
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
        first = 0 if self.embedding.cls_token is None else 1  # patch, after the class token
        side = round((old.shape[2] - first) ** 0.5) if old.dim() == 4 else 0
        if old.dim() != 4 or old.shape[2] != side**2 + first or old.shape[3] != new.shape[3]:
            return state  # more than the size differs: the loader reports the shapes
        cls, grid = old[:, :, :first], old[:, :, first:]  # (1, T, 1, dim), (1, T, patches, dim)
        new_side = round((new.shape[2] - first) ** 0.5)
        frames = new.shape[1]
        grid = grid.unflatten(2, (side, side)).permute(0, 4, 1, 2, 3)  # (1, dim, T, H, W)
        grid = F.interpolate(grid, (frames, new_side, new_side), mode="trilinear")
        grid = grid.permute(0, 2, 3, 4, 1).flatten(2, 3)  # (1, T', patches', dim)
        if first:
            cls = F.interpolate(cls[:, :, 0].transpose(1, 2), frames, mode="linear")  # (1, dim, T')
            grid = torch.cat((cls.transpose(1, 2).unsqueeze(2), grid), dim=2)
        return {**state, key: grid}

    def convert_state_dict(self, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The weights of an image ViT, or with joint attention those of a VideoMAE encoder, under
        this model's names; other names stay, and fit nothing.

        An image ViT becomes the spatial encoder. Its patches become the tubelets' central frame,
        the other frames' filters are zero (central frame initialisation, section 3.4 of the paper),
        and its positions those of every time.
        """
        joint = self.temporal_norm is None
        filters = weights.get("patch_embed.proj.weight")
        if joint and filters is not None and filters.dim() == 5:  # (dim, C, f, p, p)
            tubelets = filters.permute(0, 2, 3, 4, 1)
            # The positions are not in the file: those of 16 frames of 224 pixels.
            positions = sinusoids(8 * 14**2, filters.shape[0]).view(1, 8, 14**2, -1)
        elif not joint and is_image_vit(weights):
            weights = fold_layer_scale(weights)
            filters = filters.permute(0, 2, 3, 1)  # (dim, p, p, C)
            frames = self.embedding.tubelet_frames
            tubelets = filters.new_zeros(filters.shape[0], frames, *filters.shape[1:])
            tubelets[:, frames // 2] = filters
            times, tokens = self.embedding.positions.shape[1:3]
            positions = resize_positions(weights.pop("pos_embed"), tokens)
            positions = positions.unsqueeze(1).repeat(1, times, *[1] * (positions.dim() - 1))
        else:
            return weights
        converted = {_own_name(key): value for key, value in weights.items()}
        for block in range(len(self.spatial)):
            names = [f"spatial.{block}.{part}_bias" for part in "qv"]
            if all(name in converted for name in names):
                q, v = map(converted.pop, names)  # VideoMAE has no biases of keys
                converted[f"spatial.{block}.qkv.bias"] = torch.cat((q, torch.zeros_like(q), v))
        converted |= {
            "embedding.patches.weight": tubelets.flatten(1),
            "embedding.positions": positions,
        }
        return self.adapt_state_dict(converted)


# From the names in the files of image ViTs and VideoMAE to those of this file.
_OWN_NAMES = {
    r"^cls_token$": "embedding.cls_token",
    r"^patch_embed\.proj\.": "embedding.patches.",
    r"^norm\.": "spatial_norm.",
    r"^blocks\.(\d+)\.norm1\.": r"spatial.\1.attention_norm.",
    r"^blocks\.(\d+)\.norm2\.": r"spatial.\1.mlp_norm.",
    r"^blocks\.(\d+)\.attn\.proj\.": r"spatial.\1.out.",
    r"^blocks\.(\d+)\.attn\.": r"spatial.\1.",
    r"^blocks\.(\d+)\.mlp\.fc1\.": r"spatial.\1.mlp.0.",
    r"^blocks\.(\d+)\.mlp\.fc2\.": r"spatial.\1.mlp.3.",
}


def _own_name(key: str) -> str:
    """The name in this file of a weight of an image ViT or VideoMAE; unknown names stay."""
    for pattern, name in _OWN_NAMES.items():
        key, changed = re.subn(pattern, name, key)
        if changed:
            break
    return key


def sinusoids(count: int, dim: int) -> torch.Tensor:
    """The fixed positions of VideoMAE, `(count, dim)`: of position n and channel j the sine (even
    j) or cosine (odd j) of n / 10000 ** (2 * (j // 2) / dim)."""
    channels = torch.arange(dim, dtype=torch.float64)
    angles = torch.arange(count).double()[:, None] / 10000 ** (2 * (channels // 2) / dim)
    return torch.where(channels % 2 == 0, angles.sin(), angles.cos()).float()
