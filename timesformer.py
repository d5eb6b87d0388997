"""TimeSformer: in every block attention in time, then in space.

Bertasius, Wang and Torresani, "Is Space-Time Attention All You Need for Video Understanding?",
ICML 2021, arXiv:2102.05095: divided space-time attention. The parameters have the names of the
authors' files, so that these open, and those of Endo-FM, which is the same network.
"""

import re
from typing import TYPE_CHECKING, Literal

import torch
from torch import nn
from torch.nn import functional as F

from modeling.layers import (
    IMAGENET_MEAN_STD,
    Normalize,
    ParameterGroup,
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
    resize_frames,
    resize_positions,
    select_patches,
)

if TYPE_CHECKING:
    from modeling.timm_networks import Pretrained


class PatchEmbedding(nn.Module):
    """Frames `(N, 3, H, W)` to patches `(N, patches, dim)`."""

    def __init__(self, patch_size: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, dim, patch_size, patch_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class Attention(nn.Module):
    """Multi-head self-attention over the tokens of a row, `(N, tokens, dim)`."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(attend(self.qkv(x), self.heads))


class MLP(nn.Module):
    """Two layers, the first four times as wide as its input."""

    def __init__(self, dim: int, dropout: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.dropout(self.fc2(self.dropout(F.gelu(self.fc1(x)))))


class Block(nn.Module):
    """Attention between the frames of a patch, then between the patches of a frame, then an MLP.

    The temporal branch ends in a layer that starts at zero: at first the block is that of an image
    ViT, applied to each frame.
    """

    def __init__(self, dim: int, heads: int, dropout: float, drop_path_rate: float) -> None:
        super().__init__()
        self.drop_path_rate = drop_path_rate
        self.temporal_norm1 = nn.LayerNorm(dim, LAYER_NORM_EPS)
        self.temporal_attn = Attention(dim, heads)
        self.temporal_fc = nn.Linear(dim, dim)
        self.norm1 = nn.LayerNorm(dim, LAYER_NORM_EPS)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, LAYER_NORM_EPS)
        self.mlp = MLP(dim, dropout)

    def forward(self, tokens: torch.Tensor, n_frames: int) -> torch.Tensor:
        """`(B, 1 + T * patches, dim)` to the same shape: a class token, then frame after frame."""
        cls, x = tokens[:, :1], tokens[:, 1:].unflatten(1, (n_frames, -1))  # (B, T, patches, dim)
        batch, _, patches, _ = x.shape

        rows = x.transpose(1, 2).flatten(0, 1)  # (B * patches, T, dim)
        change = self._drop(self.temporal_attn(self.temporal_norm1(rows)), patches)
        change = self.temporal_fc(change).unflatten(0, (batch, patches))
        x = x + change.transpose(1, 2)

        # Each frame has the same class token; what the frames would change in it is averaged.
        rows = torch.cat((cls.unsqueeze(1).expand(-1, n_frames, -1, -1), x), dim=2).flatten(0, 1)
        change = self._drop(self.attn(self.norm1(rows)), n_frames)  # (B * T, 1 + patches, dim)
        change = change.unflatten(0, (batch, n_frames))
        cls, x = cls + change[:, :, :1].mean(dim=1), x + change[:, :, 1:]

        tokens = torch.cat((cls, x.flatten(1, 2)), dim=1)
        return tokens + self._drop(self.mlp(self.norm2(tokens)), 1)

    def _drop(self, branch: torch.Tensor, rows_per_clip: int) -> torch.Tensor:
        return drop_path(branch, self.drop_path_rate, self.training, rows_per_clip)


class TimeSformer(nn.Module):
    """Patches of all frames, a class token for the clip, blocks of divided attention, a classifier.

    Args:
        n_frames, image_size: T and the pixels of a side; both fix the position embeddings. Weights
            of another T or size are fitted by `adapt_state_dict`.
        model_size: `tiny`, `small` or `base`, those of the image ViTs (empty: tiny).
        patch_size: pixels of a patch's side.
        dropout: in the MLPs and before the classifier.
        drop_path: stochastic depth; see `modeling.layers.drop_path`.

    Raises:
        UserError: the image size is not a multiple of the patch size.
    """

    new_parts = ("head.",)
    """what the weights of another program leave as it is"""

    def __init__(
        self,
        num_classes: int = 7,
        n_frames: int = 16,
        image_size: int = 224,
        model_size: Literal["", "tiny", "small", "base"] = "",
        patch_size: int = 16,
        dropout: float = 0.0,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.model_size = model_size or "tiny"
        dim, depth, heads = SIZES[self.model_size]
        patches = patches_per_side(image_size, patch_size, "timesformer") ** 2
        self.normalize = Normalize(IMAGENET_MEAN_STD)
        self.patch_embed = PatchEmbedding(patch_size, dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + patches, dim))
        self.time_embed = nn.Parameter(torch.zeros(1, n_frames, dim))
        rates = drop_path_rates(drop_path, depth)
        self.blocks = nn.ModuleList(Block(dim, heads, dropout, rate) for rate in rates)
        self.norm = nn.LayerNorm(dim, LAYER_NORM_EPS)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(dim, num_classes)
        for parameter in (self.cls_token, self.pos_embed):
            nn.init.trunc_normal_(parameter, std=0.02)
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
            if name.endswith("temporal_fc"):
                nn.init.zeros_(module.weight)

    def forward(self, clips: torch.Tensor) -> torch.Tensor:
        """`(B, T, C, H, W)` uint8 or float in [0, 1] to logits `(B, num_classes)`."""
        n_frames = clips.shape[1]
        x = self.patch_embed(self.normalize(clips).flatten(0, 1))  # (B * T, patches, dim)
        x = (x + self.pos_embed[:, 1:]).unflatten(0, (-1, n_frames))  # (B, T, patches, dim)
        return self.head(self.dropout(self.norm(self._encode(x)[:, 0])))

    def _encode(self, x: torch.Tensor) -> torch.Tensor:
        """Embedded patches, `(B, T, patches, dim)`, to the output of the last block, `(B, 1 + T *
        patches, dim)`."""
        batch, n_frames = x.shape[:2]
        x = x + self.time_embed.unsqueeze(2)
        cls = (self.cls_token + self.pos_embed[:, :1]).expand(batch, -1, -1)
        x = torch.cat((cls, x.flatten(1, 2)), dim=1)
        for block in self.blocks:
            x = checkpointed([block], block, x, n_frames)
        return x

    def forward_tokens(
        self, clips: torch.Tensor, visible: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The output tokens for masked autoencoding. Patches that are not visible are not computed.

        A patch is visible in all frames or in none, so that divided attention keeps its grid.

        Args:
            clips: as in `forward`.
            visible: `(B, K)` numbers of the visible patches, the same in all frames (None: all).

        Returns:
            The tokens of the patches, `(B, T, K, dim)`, and the class token, `(B, 1, dim)`.
        """
        shape, projection = clips.shape[:2], self.patch_embed.proj
        frames, side = self.normalize(clips).flatten(0, 1), projection.kernel_size[0]
        x = F.unfold(frames, side, stride=side).transpose(1, 2).unflatten(0, shape)
        positions = self.pos_embed[:, None, 1:]  # (1, 1, patches, dim)
        if visible is not None:
            x, positions = select_patches(x, visible), select_patches(positions, visible)
        # The convolution, of the visible patches alone: (B, T, K, dim).
        x = F.linear(x, projection.weight.flatten(1), projection.bias)
        tokens = self.norm(self._encode(x + positions))
        return tokens[:, 1:].unflatten(1, (shape[1], -1)), tokens[:, :1]

    def pretrained_file(self) -> "Pretrained":
        """The image ViT that `--weights default` starts from."""
        return pretrained_image_vit(self.model_size, self.patch_embed.proj.kernel_size[0])

    def stages(self) -> dict[str, list[nn.Module]]:
        """The modules from stem to head."""
        positions = ParameterGroup(self.cls_token, self.pos_embed, self.time_embed)
        stages: dict[str, list[nn.Module]] = {"embedding": [self.patch_embed, positions]}
        for number, block in enumerate(self.blocks, 1):
            stages[f"block{number}"] = [block]
        return stages | {"head": [self.norm, self.head]}

    def adapt_state_dict(self, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Fit the position embeddings of a state dict to this model's T and image size."""
        fitted = dict(state)
        if "pos_embed" in state:
            fitted["pos_embed"] = resize_positions(state["pos_embed"], self.pos_embed.shape[1])
        if "time_embed" in state:
            fitted["time_embed"] = resize_frames(state["time_embed"], self.time_embed.shape[1])
        return fitted

    def convert_state_dict(self, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The weights of a TimeSformer or of an image ViT, without a classifier, under this model's
        names.

        From an image ViT the temporal branch starts as in the paper's code: its attention is that
        of space, and its last layer and the positions in time are zero. The answer to a still clip
        is then the image network's.
        """
        if not is_image_vit(weights):
            return self.adapt_state_dict(weights)
        weights = fold_layer_scale(weights)
        for key, value in list(weights.items()):
            if match := re.fullmatch(r"(blocks\.\d+\.)((?:attn|norm1)\..+)", key):
                weights[f"{match[1]}temporal_{match[2]}"] = value
        for key, value in self.state_dict().items():
            if ".temporal_fc." in key or key == "time_embed":
                weights[key] = torch.zeros_like(value)
        return self.adapt_state_dict(weights)
