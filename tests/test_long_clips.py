"""Clips of 32 and 64 frames, through every model and from files that have fewer or more frames."""

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import make_model
from torch import nn

from clips.cache import CacheSettings, ClipCache
from clips.manifest import ClipRow
from dataset import ClipsDataset
from modeling.weights import load_weights
from models import MODELS
from video.clip_reader import FrameSampler, read_clip
from video.encoder import write_video
from vivit import ViViT

VIVIT = {"image_size": 16, "patch_size": 8, "dim": 24, "depth": 1, "dim_head": 8}


@pytest.mark.parametrize("n_frames", [32, 64])
@pytest.mark.parametrize("name", MODELS)
def test_every_model_learns_from_them(name: str, n_frames: int) -> None:
    """Every frame counts: the gradient of the logits reaches the pixels of each frame."""
    torch.manual_seed(0)
    options = {**VIVIT} if name == "vivit" else {"image_size": 16}
    model = make_model(name, 7, n_frames=n_frames, **options).train()
    clips = torch.rand(1, n_frames, 3, 16, 16, requires_grad=True)
    logits = model(clips)
    assert logits.shape == (1, 7)
    nn.functional.cross_entropy(logits, torch.tensor([3])).backward()
    reached = clips.grad.abs().amax(dim=(2, 3, 4))  # (B, T)
    assert (reached > 0).all()


@pytest.mark.parametrize("frames", [20, 90])
@pytest.mark.parametrize("n_frames", [32, 64])
def test_decoded_and_cached_clips_have_the_sampled_frames(
    n_frames: int, frames: int, tmp_path: Path
) -> None:
    """Short clips repeat their last frame, whatever the sampling and wherever they are read."""
    clip = tmp_path / "data" / "clip.mp4"
    clip.parent.mkdir()
    levels = 30 + 2 * np.arange(frames, dtype=np.uint8).reshape(-1, 1, 1, 1)
    write_video(clip, np.broadcast_to(levels, (frames, 64, 64, 3)), lossless=True)
    settings = CacheSettings(n_frames=n_frames, image_size=64)
    cache = ClipCache.create(tmp_path / "cache", tmp_path / "data", settings)
    cache.write(clip)
    whole = read_clip(clip, FrameSampler(frames, "first"), 64).rgb  # (frames, H, W, C)
    for sampling in ("uniform", "random"):
        read = {
            name: ClipsDataset([ClipRow(clip, 0)], n_frames, 64, sampling, cache=source)[0, 5][0]
            for name, source in (("decoded", None), ("cached", cache))
        }
        for decoded in read.values():
            means = decoded.float().mean(dim=(1, 2, 3)).numpy()  # (T,): the frames differ by 2
            seen = np.abs(means[:, None] - whole.mean(axis=(1, 2, 3))).argmin(axis=1).tolist()
            if frames < n_frames:
                assert seen == [*range(frames), *[frames - 1] * (n_frames - frames)]
            elif sampling == "uniform":
                assert seen == FrameSampler(n_frames).indices(frames)
            else:  # one in each segment, and of a segment's frames the cache keeps some
                edges = np.arange(n_frames + 1) * frames / n_frames
                assert all(np.floor(edges[:-1]) <= seen)
                assert all(seen <= np.ceil(edges[1:]))


def test_vivit_continues_from_16_frames_with_32(tmp_path: Path) -> None:
    """Its positions in time are interpolated: new frame i is old frame (i + 1/2) / 2 - 1/2."""
    torch.manual_seed(0)
    short = ViViT(7, n_frames=16, **VIVIT)
    with torch.no_grad():
        steps = torch.arange(16.0).view(1, 16, 1, 1)
        short.embedding.positions.copy_(steps.expand_as(short.embedding.positions))
    torch.save({"model": short.state_dict(), "classes": list("abcdefg")}, tmp_path / "best.pt")
    long = ViViT(7, n_frames=32, **VIVIT)
    assert "positions resized" in load_weights(long, str(tmp_path / "best.pt")).line
    times = ((torch.arange(32.0) + 0.5) / 2 - 0.5).clamp(0, 15).view(1, 32, 1, 1)
    positions = long.embedding.positions.detach()
    torch.testing.assert_close(positions, times.expand_as(positions))
    assert long(torch.rand(1, 32, 3, 16, 16)).isfinite().all()
