"""ClipsDataset, its transforms, and clips that cannot be read."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from clips.corruptions import ShuffleFrames
from clips.manifest import ClipRow, read_manifest
from dataset import ClipsDataset, collate, get_train_transform, get_val_transform
from video.clip_reader import FrameSampler, read_clip
from video.container import ClipError
from video.encoder import write_video

TINY_CLASSES = ("dark", "grey", "light")


@pytest.fixture(scope="module")
def rows(tiny_data: Path) -> list[ClipRow]:
    return read_manifest(tiny_data / "train.csv", classes=TINY_CLASSES)


@pytest.mark.parametrize("n_frames", [4, 16, 32, 64])
def test_item_is_a_clip_and_a_label(rows, n_frames: int) -> None:
    clip, label = ClipsDataset(rows, n_frames, size=40)[7]
    assert clip.shape == (n_frames, 3, 40, 40)
    assert clip.dtype == torch.uint8
    assert label == rows[7].label == 1
    frames = read_clip(rows[7].path, FrameSampler(n_frames), 40).rgb
    assert np.array_equal(clip.permute(0, 2, 3, 1).numpy(), frames)


def test_default_is_sixteen_frames_of_224_pixels(rows) -> None:
    assert ClipsDataset(rows)[0][0].shape == (16, 3, 224, 224)


def test_seeded_item_is_the_same_anywhere(rows) -> None:
    clips = ClipsDataset(rows, 8, 32, "random", get_train_transform(32))
    before = torch.get_rng_state()
    first = clips[3, 11][0]
    assert torch.equal(torch.get_rng_state(), before)  # the model's dropout is not affected
    torch.rand(5)
    assert torch.equal(clips[3, 11][0], first)
    assert not torch.equal(clips[3, 12][0], first)
    order = [(3, 11), (4, 5)]
    one, two = (
        next(iter(DataLoader(clips, 2, sampler=order, num_workers=n, collate_fn=collate))).clips
        for n in (0, 2)
    )
    assert torch.equal(one, two)
    assert torch.equal(one[0], first)


def test_views_show_other_frames_of_the_clip(rows) -> None:
    clip, _ = ClipsDataset(rows, 4, 32, views=2)[0]
    assert clip.shape == (2, 4, 3, 32, 32)
    assert not torch.equal(clip[0], clip[1])
    frames = read_clip(rows[0].path, FrameSampler(4, views=2), 32).rgb
    assert np.array_equal(clip.flatten(0, 1).permute(0, 2, 3, 1).numpy(), frames)


def test_shuffled_frames_are_the_same_frames_in_another_fixed_order(rows) -> None:
    shuffle = ClipsDataset(rows, 16, 32, perturbations=[ShuffleFrames()])
    clip, shuffled = ClipsDataset(rows, 16, 32)[2][0], shuffle[2][0]
    assert not torch.equal(clip, shuffled)
    order = [next(i for i in range(16) if torch.equal(frame, clip[i])) for frame in shuffled]
    assert sorted(order) == list(range(16))
    assert torch.equal(shuffled, shuffle[2][0])


def still(n_frames: int = 6, size: int = 48) -> torch.Tensor:
    """The same noisy image n_frames times."""
    image = torch.randint(0, 256, (1, 3, size, size), dtype=torch.uint8)
    image = v2.functional.gaussian_blur(image, [7, 7])
    return image.repeat(n_frames, 1, 1, 1)


def test_augmentation_is_drawn_once_per_clip() -> None:
    """Identical frames stay identical: no frame is flipped, turned or tinted by itself."""
    transform = get_train_transform(48, 0.5, 30, 0.2, 0.3, 0.5, 0.5, 0.5, 0.3)
    changed = 0
    for seed in range(20):
        torch.manual_seed(seed)
        clip = still()
        out = transform(clip)
        assert out.shape == clip.shape
        assert out.dtype == torch.uint8
        assert type(out) is torch.Tensor
        assert all(torch.equal(frame, out[0]) for frame in out)
        changed += not torch.equal(out, clip)
    assert changed >= 19


@pytest.mark.parametrize(
    ("name", "strength"),
    [
        ("hflip_prob", 1.0),
        ("rotation", 30.0),
        ("translate", 0.3),
        ("scale", 0.4),
        ("brightness", 0.8),
        ("contrast", 0.8),
        ("saturation", 0.8),
        ("hue", 0.5),
    ],
)
def test_each_strength_is_a_setting(name: str, strength: float) -> None:
    off = dict.fromkeys(("hflip_prob", "rotation", "translate", "scale"), 0.0)
    off |= dict.fromkeys(("brightness", "contrast", "saturation", "hue"), 0.0)
    clip = still()
    assert torch.equal(get_train_transform(48, **off)(clip), clip)
    torch.manual_seed(0)
    assert not torch.equal(get_train_transform(48, **{**off, name: strength})(clip), clip)


def test_flip_is_the_mirror_image() -> None:
    flip = get_train_transform(48, 1, 0, 0, 0, 0, 0, 0, 0)
    clip = still()
    assert torch.equal(flip(clip), clip.flip(-1))


def test_val_transform_changes_nothing_but_the_size() -> None:
    clip = still()
    assert torch.equal(get_val_transform(48)(clip), clip)
    assert get_val_transform(32)(clip).shape == (6, 3, 32, 32)
    assert get_val_transform()(clip).shape == (6, 3, 224, 224)


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_clip_is_reported_and_never_replaced(tmp_path, workers: int) -> None:
    write_video(tmp_path / "good.mp4", np.zeros((8, 32, 32, 3), np.uint8))
    (tmp_path / "bad.mp4").write_bytes(b"not a video")
    rows = [ClipRow(tmp_path / name, label) for label, name in enumerate(("good.mp4", "bad.mp4"))]
    clips = ClipsDataset(rows, 4, 32)
    with pytest.raises(ClipError, match=r"bad\.mp4"):
        clips[1]
    loader = DataLoader(clips, 2, collate_fn=collate, num_workers=workers)
    (batch,) = list(loader)
    assert batch.clips.shape == (1, 4, 3, 32, 32)
    assert batch.labels.tolist() == batch.indices == [0]
    assert len(batch.unreadable) == 1
    assert "bad.mp4: cannot be read" in batch.unreadable[0]


def test_batch_of_unreadable_clips_is_empty(tmp_path) -> None:
    clips = ClipsDataset([ClipRow(tmp_path / "none.mp4", 0)], 4, 32)
    batch = collate(clips.__getitems__([0, (0, 5)]))
    assert len(batch.labels) == len(batch.clips) == 0
    assert len(batch.unreadable) == 2


def test_augmentation_on_the_device_gives_the_same_clips(rows) -> None:
    """A GPU that augments the batch makes the same of it as the workers."""
    transform = get_train_transform(32)
    ready = ClipsDataset(rows, 8, 32, "random", transform)
    raw = ClipsDataset(rows, 8, 32, "random", transform, augment_on_device=True)
    order = [(3, 11), (0, 12), (3, 13)]
    one, two = (collate(clips.__getitems__(order)) for clips in (ready, raw))
    assert one.params is None
    assert two.params.shape == (3, 9)
    assert not torch.equal(one.clips, two.clips)
    applied = transform.apply(two.clips, two.params)
    difference = (applied.int() - one.clips.int()).abs().max()
    assert difference <= 1  # rounding in batches of another size
    assert torch.equal(one.labels, two.labels)
