"""Temporal order: the classes, and the ways around looking at the motion that are closed."""

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import moving

from clips.manifest import ClipRow
from pretraining.clips import CropFlip
from pretraining.order import CLASSES, SegmentOrder, arrange, order_loss, split_segments
from video.clip_reader import read_clip
from video.container import ClipError
from video.encoder import write_video

PLAIN = CropFlip(32, 1.0, 0.0, (0.0, 0.0, 0.0, 0.0))


def test_each_class_is_an_order_and_a_direction() -> None:
    segments = torch.arange(6).view(3, 2)  # 0 1 | 2 3 | 4 5
    shown = [tuple(arrange(segments, number).tolist()) for number in range(CLASSES)]
    assert len(set(shown)) == CLASSES == 12
    assert shown[0] == (0, 1, 2, 3, 4, 5)
    assert shown[1] == (1, 0, 3, 2, 5, 4)
    assert shown[10] == (4, 5, 2, 3, 0, 1)
    assert shown[11] == (5, 4, 3, 2, 1, 0)  # the whole clip backward
    for number, frames in enumerate(shown):  # forward, each segment rises
        assert all((frames[i] < frames[i + 1]) == (number % 2 == 0) for i in (0, 2, 4))


def test_segments_are_equally_long_with_gaps_between_them() -> None:
    segments = split_segments(torch.arange(8), 2, 1)
    assert segments.tolist() == [[0, 1], [3, 4], [6, 7]]


def test_a_clip_shows_its_segments_in_the_order_of_its_class(tmp_path: Path) -> None:
    path = moving(tmp_path / "a.mp4", frames=11)
    clips = SegmentOrder([ClipRow(path, 0)], 9, "uniform", PLAIN)
    whole = torch.from_numpy(read_clip(path, clips.sampler, 32).rgb).permute(0, 3, 1, 2)
    assert len(whole) == 9 + 2 * clips.gap
    numbers = set()
    for seed in range(40):
        clip, number = clips[0, seed]
        assert torch.equal(clip, arrange(split_segments(whole, 3, clips.gap), number))
        numbers.add(number)
    assert len(numbers) > 8
    first, again = clips[0, 7], clips[0, 7]
    assert torch.equal(first[0], again[0])
    assert first[1] == again[1]


def test_all_frames_have_one_crop_flip_and_colour() -> None:
    """A clip of equal frames stays one, whatever is drawn; other draws give other frames."""
    noise = np.random.default_rng(0).integers(0, 255, (3, 40, 40), dtype=np.uint8)
    still = torch.from_numpy(noise).expand(6, -1, -1, -1)
    transform = CropFlip(32, 0.3, 0.5, (0.4, 0.4, 0.4, 0.1))
    torch.manual_seed(0)
    results = [transform(still) for _ in range(4)]
    assert all(result.shape == (6, 3, 32, 32) for result in results)
    assert all((result == result[:1]).all() for result in results)
    assert not torch.equal(results[0], results[1])


def test_a_crop_brings_in_no_black() -> None:
    bright = torch.full((2, 3, 40, 40), 200, dtype=torch.uint8)
    transform = CropFlip(32, 0.2, 0.5, (0.0, 0.0, 0.0, 0.0))
    assert all((transform(bright) == 200).all() for _ in range(20))


@pytest.mark.parametrize("still", ["all of it", "one segment"])
def test_a_segment_that_stands_still_is_left_out_and_told(still: str, tmp_path: Path) -> None:
    path = moving(tmp_path / "a.mp4", frames=11)
    frames = read_clip(path, size=96).rgb[:11]
    if still == "one segment":
        frames[7:] = frames[7]
    else:
        frames[:] = frames[0]
    write_video(tmp_path / "b.mp4", frames, lossless=True)
    clips = SegmentOrder([ClipRow(path, 0), ClipRow(tmp_path / "b.mp4", 0)], 9, "uniform", PLAIN)
    with pytest.raises(ClipError, match="does not move"):
        clips[1, 0]
    items = dict(clips.__getitems__([(0, 1), (1, 1)]))
    assert isinstance(items[1], str)  # the engine leaves it out of the loss, and names it
    assert not isinstance(items[0], str)


def test_the_loss_of_guessing_is_that_of_chance() -> None:
    losses = order_loss(torch.zeros(2, CLASSES), torch.tensor([0, 11]), 0)
    assert torch.allclose(losses, torch.full((2,), float(np.log(12))))
