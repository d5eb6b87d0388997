"""Mixup and cutmix: train on two clips at once, and on their labels in the same proportion.

Mixup: Zhang et al., ICLR 2018, arXiv:1710.09412, equation 1. Cutmix: Yun et al., ICCV 2019,
arXiv:1905.04899, equation 1.
"""

import torch


def mix(
    clips: torch.Tensor, labels: torch.Tensor, mixup: float, cutmix: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mix each clip of a batch with the one before it (the first with the last).

    Batches come in random order: the one before is any clip, and never the clip itself. Shares and
    boxes are drawn for each clip, from torch's generator on the CPU.

    Args:
        clips: `(B, T, C, H, W)` uint8 or float in [0, 1]; for mixup also features `(B, T, D)`.
        labels: `(B,)`.
        mixup, cutmix: alpha of the Beta(alpha, alpha) that shares are drawn from, 0 for never; if
            both are above 0 a fair coin chooses one for the batch.

    Returns:
        The mixed clips; the labels of what was mixed in, `(B,)`; and the share that is left of each
        clip itself, `(B,)` fp32. A clip's loss is share * loss(its label) + (1 - share) *
        loss(the other label). A single clip has nothing to be mixed with and stays as it is.

    Raises:
        ValueError: cutmix of features, which have no place to cut.
    """
    count = len(clips)
    if count < 2:
        return clips, labels, torch.ones(count, device=clips.device)
    if cutmix and clips.dim() != 5:
        raise ValueError(f"cutmix is for pictures (B, T, C, H, W), not {tuple(clips.shape)}")
    cut = bool(cutmix) and (not mixup or bool(torch.rand(()) < 0.5))
    alpha = torch.tensor(float(cutmix if cut else mixup))
    share = torch.distributions.Beta(alpha, alpha).sample((count,))
    if cut:
        height, width = clips.shape[-2:]
        boxes = draw_boxes(share, height, width)
        share = 1 - (boxes[:, 1] - boxes[:, 0]).prod(dim=1) / (height * width)
        clips = paste(clips, boxes.to(clips.device, non_blocking=True))
    share = share.to(clips.device, non_blocking=True)
    return clips if cut else blend(clips, share), labels.roll(1), share


def blend(clips: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
    """Mixup: share * clip + (1 - share) * the clip before it, with `share` `(B,)`.

    uint8 becomes fp32 in [0, 1], as it would in the model's first layer; floats keep their dtype.
    """
    x = clips if clips.is_floating_point() else clips.float() / 255
    share = share.to(x.dtype).view(-1, *[1] * (x.dim() - 1))  # (B, 1, ...)
    return x.roll(1, dims=0).lerp_(x, share)


def draw_boxes(share: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """For each share a box, `(B, 2, 2)`: its first and, not included, last row and column.

    The box has 1 - share of the picture's area, up to rounding, and the picture's aspect ratio; its
    centre is anywhere in the picture, and what is outside is cut off.
    """
    picture = torch.tensor([height, width])
    size = ((1 - share).sqrt().unsqueeze(1) * picture).round().long()  # (B, 2)
    first = (torch.rand(len(share), 2) * picture).long() - size // 2
    return torch.stack((first, first + size), dim=1).clamp_min(0).minimum(picture)


def paste(clips: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
    """Cutmix: in each clip's box, `(B, 2, 2)`, what all frames of the clip before it show there."""
    (top, left), (bottom, right) = boxes.view(-1, 2, 2, 1).permute(1, 2, 0, 3)  # (B, 1) each
    rows = torch.arange(clips.shape[-2], device=clips.device)
    columns = torch.arange(clips.shape[-1], device=clips.device)
    rows = (rows >= top) & (rows < bottom)  # (B, H)
    columns = (columns >= left) & (columns < right)  # (B, W)
    inside = rows.unsqueeze(2) & columns.unsqueeze(1)  # (B, H, W)
    return torch.where(inside[:, None, None], clips.roll(1, dims=0), clips)
