"""What the vision transformers share: their sizes, their positions, and the files of image ViTs.

Dosovitskiy et al., "An Image is Worth 16x16 Words", ICLR 2021, arXiv:2010.11929.
"""

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F

from utils.errors import UserError, require_package

if TYPE_CHECKING:
    from modeling.timm_networks import Pretrained

SIZES = {
    "tiny": (192, 12, 3),
    "small": (384, 12, 6),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
}
"""width, blocks and heads of the usual sizes of an image ViT"""

LAYER_NORM_EPS = 1e-6
"""that of image ViTs; torch's own default is another"""


def attend(qkv: torch.Tensor, heads: int, dropout: float = 0.0) -> torch.Tensor:
    """Multi-head self-attention over the tokens of a row.

    Args:
        qkv: queries, keys and values, one behind the other, `(N, tokens, 3 * heads * dim_head)`.
        dropout: of the attention; it is applied in eval mode too.

    Returns:
        `(N, tokens, heads * dim_head)`.
    """
    q, k, v = qkv.unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)  # (N, heads, tokens, dim)
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout).transpose(1, 2).flatten(2)


def pretrained_image_vit(model_size: str, patch_size: int) -> "Pretrained":
    """timm's weights of the image ViT of this size: ImageNet's, with patches of 14 px DINOv2's.

    Raises:
        UserError: there are none, timm is not installed, or they cannot be downloaded.
    """
    kind = {16: "224", 14: "dinov2"}.get(patch_size)
    if not model_size or kind is None or (kind == "dinov2" and model_size == "tiny"):
        raise UserError(
            "there are no pretrained weights of this size: give --model-size tiny, small or base "
            "(with --patch-size 14 small or base), --weights none to train from scratch, or a file"
        )
    require_package("timm", "weights of an image ViT")
    from modeling.timm_networks import create_network, pretrained_file

    name = f"vit_{model_size}_patch{patch_size}_{kind}"
    with torch.device("meta"):
        net = create_network(name)
    return pretrained_file(net, f"timm:{name}")


def patches_per_side(image_size: int, patch_size: int, model: str) -> int:
    """How many patches are beside each other.

    Raises:
        UserError: the image size is not a multiple of the patch size.
    """
    if image_size % patch_size:
        nearest = max(1, round(image_size / patch_size)) * patch_size
        raise UserError(
            f"{model} cuts frames into patches of {patch_size} pixels: image_size {image_size} "
            f"must be a multiple, e.g. {nearest}"
        )
    return image_size // patch_size


def resize_positions(positions: torch.Tensor, tokens: int) -> torch.Tensor:
    """Position embeddings of a class token and a square of patches, for another number of patches.

    `(1, 1 + side**2, dim)` to `(1, tokens, dim)`. The patches' are interpolated in two dimensions,
    bicubic and antialiased as in timm; the class token keeps its own. What is no such square stays
    as it is.
    """
    if positions.dim() != 3 or not positions.is_floating_point() or positions.shape[1] == tokens:
        return positions
    old, new = (round(max(n - 1, 0) ** 0.5) for n in (positions.shape[1], tokens))
    if not old or old**2 + 1 != positions.shape[1]:
        return positions
    grid = positions[:, 1:].unflatten(1, (old, old)).permute(0, 3, 1, 2)  # (1, dim, side, side)
    grid = F.interpolate(grid.float(), (new, new), mode="bicubic", antialias=True)
    grid = grid.flatten(2).transpose(1, 2).to(positions.dtype)  # (1, new side**2, dim)
    return torch.cat((positions[:, :1], grid), dim=1)


def resize_frames(positions: torch.Tensor, n_frames: int) -> torch.Tensor:
    """Position embeddings in time, `(1, T, dim)`, for another T: interpolated linearly."""
    if positions.dim() != 3 or not positions.is_floating_point() or not positions.numel():
        return positions
    if positions.shape[1] == n_frames:
        return positions
    return F.interpolate(positions.transpose(1, 2), n_frames, mode="linear").transpose(1, 2)


def select_patches(x: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
    """The visible patches of each clip, the same ones at all times.

    Args:
        x: `(B, T, patches, D)`.
        visible: `(B, K)` numbers of patches.

    Returns:
        `(B, T, K, D)`.
    """
    index = visible[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])
    return x.expand(len(visible), -1, -1, -1).gather(2, index)


def is_image_vit(weights: Mapping[str, torch.Tensor]) -> bool:
    """Whether these are the weights of an image ViT, under timm's names."""
    image = {"cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.attn.qkv.weight"}
    shape = weights["patch_embed.proj.weight"].shape if image <= weights.keys() else ()
    return len(shape) == 4 and "time_embed" not in weights


def fold_layer_scale(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same network without LayerScale (Touvron et al., 2021, arXiv:2103.17239).

    Its factors, `ls1.gamma` of the attention and `ls2.gamma` of the MLP, are multiplied into the
    last layer of each branch: DINOv2's ViTs have them, the models here do not.
    """
    folded = dict(weights)
    for key in weights:
        if match := re.fullmatch(r"(blocks\.\d+\.)ls([12])\.gamma", key):
            gamma = folded.pop(key)
            layer = match[1] + ("attn.proj" if match[2] == "1" else "mlp.fc2")
            for name in (f"{layer}.weight", f"{layer}.bias"):
                value = folded.get(name)
                if value is not None and value.shape[:1] == gamma.shape:
                    folded[name] = value * gamma.view(-1, *[1] * (value.dim() - 1))
    return folded
