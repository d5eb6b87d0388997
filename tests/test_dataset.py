"""ClipsDataset, its transforms, and what happens to clips that cannot be read."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from clips.manifest import ClipRow, read_manifest
from dataset import ClipsDataset, ReportingDataset, collate, get_train_transform, get_val_transform
from video.clip_reader import read_clip
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
    frames = read_clip(rows[7].path, n_frames, "uniform", 40)
    assert np.array_equal(clip.permute(0, 2, 3, 1).numpy(), frames)


def test_default_is_sixteen_frames_of_224_pixels(rows) -> None:
    assert ClipsDataset(rows)[0][0].shape == (16, 3, 224, 224)


def test_seeded_item_is_the_same_anywhere(rows) -> None:
    clips = ClipsDataset(rows, 8, 32, "random", get_train_transform(32))
    before = torch.get_rng_state()
    first = clips[3, 11][0]
    assert torch.equal(torch.get_rng_state(), before)  # the model's dropout is left alone
    torch.rand(5)
    assert torch.equal(clips[3, 11][0], first)
    assert not torch.equal(clips[3, 12][0], first)
    one, two = (
        next(iter(DataLoader(clips, 2, sampler=[(3, 11), (4, 5)], num_workers=workers)))[0]
        for workers in (0, 2)
    )
    assert torch.equal(one, two)
    assert torch.equal(one[0], first)


def test_views_are_the_clip_at_other_places(rows) -> None:
    clip, _ = ClipsDataset(rows, 4, 32, views=2)[0]
    assert clip.shape == (2, 4, 3, 32, 32)
    assert not torch.equal(clip[0], clip[1])
    frames = read_clip(rows[0].path, 4, size=32, views=2)
    assert np.array_equal(clip.flatten(0, 1).permute(0, 2, 3, 1).numpy(), frames)


def test_shuffled_frames_are_the_same_frames_in_another_fixed_order(rows) -> None:
    clip, shuffled = (ClipsDataset(rows, 16, 32, shuffle_frames=on)[2][0] for on in (False, True))
    assert not torch.equal(clip, shuffled)
    order = [next(i for i in range(16) if torch.equal(frame, clip[i])) for frame in shuffled]
    assert sorted(order) == list(range(16))
    assert torch.equal(shuffled, ClipsDataset(rows, 16, 32, shuffle_frames=True)[2][0])


def still(n_frames: int = 6, size: int = 48) -> torch.Tensor:
    """The same noisy picture n_frames times."""
    picture = torch.randint(0, 256, (1, 3, size, size), dtype=torch.uint8)
    picture = v2.functional.gaussian_blur(picture, [7, 7])
    return picture.repeat(n_frames, 1, 1, 1)


def test_augmentation_is_drawn_once_a_clip() -> None:
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
        ("flip", 1.0),
        ("rotation", 30.0),
        ("translate", 0.3),
        ("zoom", 0.4),
        ("brightness", 0.8),
        ("contrast", 0.8),
        ("saturation", 0.8),
        ("hue", 0.5),
    ],
)
def test_each_strength_is_a_setting(name: str, strength: float) -> None:
    names = ("flip", "rotation", "translate", "zoom", "brightness", "contrast", "saturation", "hue")
    off = dict.fromkeys(names, 0.0)
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
    loader = DataLoader(ReportingDataset(clips), 2, collate_fn=collate, num_workers=workers)
    (batch,) = list(loader)
    assert batch.clips.shape == (1, 4, 3, 32, 32)
    assert batch.labels.tolist() == batch.indices.tolist() == [0]
    assert len(batch.unreadable) == 1
    assert "bad.mp4: cannot be read" in batch.unreadable[0]


def test_batch_of_unreadable_clips_is_empty(tmp_path) -> None:
    clips = ReportingDataset(ClipsDataset([ClipRow(tmp_path / "none.mp4", 0)], 4, 32))
    batch = collate([clips[0], clips[0, 5]])
    assert len(batch.labels) == len(batch.clips) == 0
    assert len(batch.unreadable) == 2


def test_deferred_draws_give_the_same_clips(rows) -> None:
    """A GPU that augments the batch sees what workers would have made of it."""
    transform = get_train_transform(32)
    ready = ReportingDataset(ClipsDataset(rows, 8, 32, "random", transform))
    deferred = ReportingDataset(ClipsDataset(rows, 8, 32, "random", transform, defer=True))
    order = [(3, 11), (0, 12), (3, 13)]
    one, two = (collate([clips[pair] for pair in order]) for clips in (ready, deferred))
    assert one.draws is None
    assert two.draws.shape == (3, 9)
    assert not torch.equal(one.clips, two.clips)
    applied = transform.apply(two.clips, two.draws)
    assert (
        applied.int() - one.clips.int()
    ).abs().max() <= 1  # rounding, in batches of another size
    assert torch.equal(one.labels, two.labels)
