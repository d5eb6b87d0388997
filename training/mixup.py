"""Mixup and CutMix for clips.

Mixup: Zhang et al., ICLR 2018, arXiv:1710.09412, equation 1. CutMix: Yun et al., ICCV 2019,
arXiv:1905.04899, equation 1. Both draw one lambda per clip (torchvision and timm: per batch) and
return two labels per clip, so that every loss can be used with them.
"""

import torch

from utils.device import to_device


def mixup_cutmix(
    clips: torch.Tensor, labels: torch.Tensor, mixup_alpha: float, cutmix_alpha: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mix each clip of a batch with the one before it (the first with the last).

    Batches come in random order, so the one before is a random clip and never the clip itself.
    Lambdas and boxes are drawn per clip from torch's CPU generator.

    Args:
        clips: `(B, T, C, H, W)` uint8 or float in [0, 1]; for mixup also features `(B, T, D)`.
        labels: `(B,)`.
        mixup_alpha, cutmix_alpha: alpha of the Beta(alpha, alpha) that lambdas are drawn from, 0
            for never; if both are above 0, a fair coin chooses one of them for the batch.

    Returns:
        The mixed clips; the labels of the clips that were mixed in, `(B,)`; and lambda, the
        fraction that is left of each clip itself, `(B,)` fp32. The loss of a clip is lambda *
        loss(its label) + (1 - lambda) * loss(the other label). A batch of a
        single clip is returned unchanged.

    Raises:
        ValueError: CutMix of features: only pixels can be cut.
    """
    count = len(clips)
    if count < 2:
        return clips, labels, torch.ones(count, device=clips.device)
    if cutmix_alpha and clips.dim() != 5:
        raise ValueError(f"cutmix is for pixels (B, T, C, H, W), not {tuple(clips.shape)}")
    use_cutmix = bool(cutmix_alpha) and (not mixup_alpha or bool(torch.rand(()) < 0.5))
    alpha = torch.tensor(float(cutmix_alpha if use_cutmix else mixup_alpha))
    lam = torch.distributions.Beta(alpha, alpha).sample((count,))
    if use_cutmix:
        height, width = clips.shape[-2:]
        boxes = rand_bbox(lam, height, width)
        lam = 1 - (boxes[:, 1] - boxes[:, 0]).prod(dim=1) / (height * width)  # exact after rounding
        clips = cutmix(clips, to_device(boxes, clips.device))
    lam = to_device(lam, clips.device)
    return clips if use_cutmix else mixup(clips, lam), labels.roll(1), lam


def mixup(clips: torch.Tensor, lam: torch.Tensor) -> torch.Tensor:
    """lambda * clip + (1 - lambda) * the clip before it, with `lam` `(B,)`.

    uint8 becomes fp32 in [0, 1], as it would in the model's first layer; floats keep their dtype.
    """
    x = clips if clips.is_floating_point() else clips.float() / 255
    lam = lam.to(x.dtype).view(-1, *[1] * (x.dim() - 1))  # (B, 1, ...)
    return x.roll(1, dims=0).lerp_(x, lam)


def rand_bbox(lam: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """For each lambda a box, `(B, 2, 2)`: its first and, not included, last row and column.

    The box has 1 - lambda of the frame's area, up to rounding, and the frame's aspect ratio; its
    centre is anywhere in the frame, and what is outside is cut off.
    """
    frame = torch.tensor([height, width])
    size = ((1 - lam).sqrt().unsqueeze(1) * frame).round().long()  # (B, 2)
    first = (torch.rand(len(lam), 2) * frame).long() - size // 2
    return torch.stack((first, first + size), dim=1).clamp_min(0).minimum(frame)


def cutmix(clips: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
    """Fill each clip's box, `(B, 2, 2)`, with the pixels of the clip before it, in all frames."""
    (top, left), (bottom, right) = boxes.view(-1, 2, 2, 1).permute(1, 2, 0, 3)  # (B, 1) each
    rows = torch.arange(clips.shape[-2], device=clips.device)
    columns = torch.arange(clips.shape[-1], device=clips.device)
    rows = (rows >= top) & (rows < bottom)  # (B, H)
    columns = (columns >= left) & (columns < right)  # (B, W)
    inside = rows.unsqueeze(2) & columns.unsqueeze(1)  # (B, H, W)
    return torch.where(inside[:, None, None], clips.roll(1, dims=0), clips)
