"""Masked autoencoding: most patches of a clip are hidden, and their pixels are predicted.

Tong et al., "VideoMAE: Masked Autoencoders are Data-Efficient Learners for Self-Supervised Video
Pre-Training", NeurIPS 2022, arXiv:2203.12602. The same patches are hidden at all times (a tube
mask): otherwise a hidden patch could be copied from the frame before.
"""

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from modeling.layers import ParameterGroup
from timesformer import TimeSformer
from vivit import Block, ViViT, patchify, sinusoids

MAE_MODELS = ("vivit", "timesformer")
"""the models that it is for: those with `forward_tokens`"""

FEW_PATCHES = 64
"""patches of a frame below which a smaller part of them is hidden by default"""


def default_mask_ratio(patches: int) -> float:
    """0.9, as in the paper; 0.75 where a tenth of the patches of a frame would be next to none."""
    return 0.9 if patches >= FEW_PATCHES else 0.75


def count_visible(patches: int, mask_ratio: float) -> int:
    """The number of visible patches of a frame: at least one, and not all."""
    return min(patches - 1, max(1, round(patches * (1 - mask_ratio))))


def tube_mask(clips: int, patches: int, visible: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The numbers of the visible and of the hidden patches of each clip, in order, `(clips, K)`.

    They are drawn on the CPU, whose generator a resumed run restores.
    """
    order = torch.rand(clips, patches).argsort(dim=1)
    return order[:, :visible].sort(dim=1).values, order[:, visible:].sort(dim=1).values


def pixel_targets(clips: torch.Tensor, patch_size: int, tubelet_frames: int) -> torch.Tensor:
    """The pixels of each tubelet with mean 0 and standard deviation 1, `(B, T', patches, D)`.

    Args:
        clips: `(B, T, 3, H, W)` uint8, or float in [0, 1].
    """
    pixels = clips.float() / 255 if clips.dtype == torch.uint8 else clips.float()
    x = patchify(pixels, patch_size, tubelet_frames)
    return (x - x.mean(dim=-1, keepdim=True)) / (x.std(dim=-1, keepdim=True) + 1e-6)


class Decoder(nn.Module):
    """The pixels of hidden patches from the tokens of the visible ones: a small joint transformer.

    Every hidden patch starts as the mask token with its fixed position. The tokens of no patch
    (class tokens, frames of ViViT's temporal encoder) are read beside the patches.

    Args:
        dim: width of the encoder's tokens.
        times, patches: number of times of a clip, and of patches of a frame.
        others: number of tokens of no patch.
        pixels: number of values of a tubelet.
        width, depth: of the decoder.
    """

    def __init__(
        self, dim: int, times: int, patches: int, others: int, pixels: int, width: int, depth: int
    ) -> None:
        super().__init__()
        self.embed = nn.Linear(dim, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, 1, width))
        self.other_positions = nn.Parameter(torch.zeros(1, others, width))
        positions = sinusoids(times * patches, width).view(1, times, patches, width)
        self.register_buffer("positions", positions, persistent=False)
        heads = max(1, width // 32)
        self.blocks = nn.ModuleList(
            Block(width, heads, width // heads, dropout=0.0, qkv_bias=True) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width)
        self.pixels = nn.Linear(width, pixels)
        for parameter in (self.mask_token, self.other_positions):
            nn.init.trunc_normal_(parameter, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias) if module.bias is not None else None

    def forward(
        self,
        tokens: torch.Tensor,
        others: torch.Tensor,
        visible: torch.Tensor,
        masked: torch.Tensor,
    ) -> torch.Tensor:
        """`(B, T', K, dim)` visible tokens and `(B, S, dim)` others to the pixels of the masked
        patches, `(B, T', M, pixels)`."""
        batch, times = tokens.shape[:2]
        seen = self.embed(tokens)  # (B, T', K, width)
        hidden = self.mask_token.expand(batch, times, masked.shape[1], -1)
        x = torch.cat((seen, hidden.to(seen.dtype)), dim=2)
        order = torch.cat((visible, masked), dim=1)  # (B, patches)
        positions = self.positions[0, :, order].transpose(0, 1)  # (B, T', patches, width)
        x = (x + positions).flatten(1, 2)
        rest = self.embed(others) + self.other_positions
        x = torch.cat((rest, x), dim=1)  # (B, S + T' * patches, width)
        for block in self.blocks:
            x = block(x)
        x = x[:, others.shape[1] :].unflatten(1, (times, -1))[:, :, visible.shape[1] :]
        return self.pixels(self.norm(x))


class MaskedAutoencoder(nn.Module):
    """An encoder that sees the visible patches of a clip, and a decoder that predicts the others.

    Args:
        encoder: a ViViT or a TimeSformer; its classifier takes no part.
        n_frames, image_size: T and the pixels of a side.
    """

    def __init__(
        self,
        encoder: ViViT | TimeSformer,
        n_frames: int,
        image_size: int,
        mask_ratio: float,
        decoder_width: int,
        decoder_depth: int,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.patch_size, self.tubelet_frames = patch_shape(encoder)
        self.patches = (image_size // self.patch_size) ** 2
        self.visible = count_visible(self.patches, mask_ratio)
        with torch.no_grad():  # how many tokens there are depends on the model
            clip = torch.zeros(1, n_frames, 3, image_size, image_size)
            tokens, others = encoder.forward_tokens(clip, torch.zeros(1, 1, dtype=torch.long))
        pixels = 3 * self.tubelet_frames * self.patch_size**2
        shape = (tokens.shape[-1], tokens.shape[1], self.patches, others.shape[1], pixels)
        self.decoder = Decoder(*shape, decoder_width, decoder_depth)
        for name, parameter in encoder.named_parameters():
            if name.startswith("head."):  # DistributedDataParallel would wait for its gradients
                parameter.requires_grad_(False)

    def forward(self, clips: torch.Tensor) -> torch.Tensor:
        """`(B, T, C, H, W)` uint8 to the mean squared error of each clip, `(B, 1)`."""
        predicted, _, masked = self.predict(clips)
        targets = pixel_targets(clips, self.patch_size, self.tubelet_frames)
        index = masked[:, None, :, None].expand(-1, targets.shape[1], -1, targets.shape[3])
        errors = (predicted.float() - targets.gather(2, index)) ** 2  # (B, T', M, pixels)
        return errors.mean(dim=(1, 2, 3)).unsqueeze(1)

    def predict(self, clips: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The pixels of the masked patches, `(B, T', M, pixels)`, and the numbers of the visible
        and of the masked ones."""
        masks = tube_mask(len(clips), self.patches, self.visible)
        visible, masked = (numbers.to(clips.device) for numbers in masks)
        tokens, others = self.encoder.forward_tokens(clips, visible)
        return self.decoder(tokens, others, visible, masked), visible, masked

    def stages(self) -> dict[str, list[nn.Module]]:
        """The modules from stem to pixels."""
        tokens = ParameterGroup(self.decoder.mask_token, self.decoder.other_positions)
        parts = [self.decoder.embed, *self.decoder.blocks, self.decoder.norm, self.decoder.pixels]
        return self.encoder.stages() | {"decoder": [tokens, *parts]}


def patch_shape(encoder: ViViT | TimeSformer) -> tuple[int, int]:
    """Pixels of a patch's side, and frames of a tubelet."""
    if isinstance(encoder, ViViT):
        return encoder.embedding.patch_size, encoder.embedding.tubelet_frames
    return encoder.patch_embed.proj.kernel_size[0], 1


def encoder_gflops(
    encoder: ViViT | TimeSformer, n_frames: int, image_size: int, visible: int
) -> tuple[float, float]:
    """GFLOP of the encoder for a clip: with its visible patches alone, and with all.

    Args:
        encoder: one on the meta device, where nothing is computed.
    """
    clip = torch.zeros(1, n_frames, 3, image_size, image_size, device="meta")
    counts = []
    for numbers in (torch.zeros(1, visible, dtype=torch.long, device="meta"), None):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            encoder.forward_tokens(clip, numbers)
        counts.append(counter.get_total_flops() / 1e9)
    return counts[0], counts[1]


@torch.no_grad()
def reconstruction(model: MaskedAutoencoder, clips: torch.Tensor) -> torch.Tensor:
    """Clips, what the model sees of them, and what it predicts, as one picture `(H, W, 3)` uint8.

    Each clip has three rows of frames. A predicted patch has the mean and the deviation of the true
    one, because these are not predicted.

    Args:
        clips: `(B, T, 3, H, W)` uint8, on the model's device.
    """
    predicted, _, masked = model.predict(clips)
    p, f = model.patch_size, model.tubelet_frames
    pixels = patchify(clips.float(), p, f)  # (B, T', patches, f * p * p * 3)
    index = masked[:, None, :, None].expand(-1, pixels.shape[1], -1, pixels.shape[3])
    true = pixels.gather(2, index)
    mean, deviation = true.mean(dim=-1, keepdim=True), true.std(dim=-1, keepdim=True)
    hidden = pixels.scatter(2, index, torch.full_like(true, 127.0))
    painted = pixels.scatter(2, index, predicted.float() * deviation + mean)
    side = clips.shape[-1] // p

    def strip(patches: torch.Tensor) -> torch.Tensor:
        """`(T', patches, f * p * p * 3)` to frames beside each other, `(H, T * W, 3)`."""
        x = patches.view(-1, side, side, f, p, p, 3).permute(1, 4, 0, 3, 2, 5, 6)
        return x.reshape(side * p, -1, 3)

    rows = [strip(part[b]) for b in range(len(clips)) for part in (pixels, hidden, painted)]
    return torch.cat(rows).round().clamp(0, 255).to(torch.uint8).cpu()
