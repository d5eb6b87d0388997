"""RandAugment and erasing: one draw a clip, from the clip's own seed, before everything else."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY_FLAGS
from torch.utils.data import DataLoader

from config import TrainConfig
from dataset import ClipsDataset, get_train_transform
from loaders import build_dataloaders
from manifest import ClipRow, read_manifest
from strong_augment import StrongAugment
from train import main

GREY = torch.tensor([124, 116, 104], dtype=torch.uint8)  # 255 x (0.485, 0.456, 0.406)


def noise(n_frames: int = 5, height: int = 40, width: int = 56) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(
        0, 256, (n_frames, 3, height, width), dtype=torch.uint8, generator=generator
    )


@pytest.fixture(scope="module")
def rows(tiny_data: Path) -> list[ClipRow]:
    return read_manifest(tiny_data / "train.csv", classes=("dark", "grey", "light"))


def test_all_frames_share_the_draw() -> None:
    """Identical frames stay identical, for every operation, sign and box."""
    still = noise(1).repeat(4, 1, 1, 1)
    strong, changed = StrongAugment(2, 20, 0.5), 0
    for seed in range(60):
        torch.manual_seed(seed)
        out = strong(still)
        assert out.shape == still.shape
        assert out.dtype == torch.uint8
        assert type(out) is torch.Tensor
        assert all(torch.equal(frame, out[0]) for frame in out)
        changed += not torch.equal(out, still)
    assert changed > 50


def test_the_number_of_operations_and_their_strength() -> None:
    """Two of fourteen change nothing here: the identity, and AutoContrast, as the noise has every
    value already. At magnitude 0 most do nothing."""
    clip = noise()

    def unchanged(operations: int, magnitude: int) -> float:
        torch.manual_seed(0)
        strong = StrongAugment(operations, magnitude)
        return np.mean([torch.equal(strong(clip), clip) for _ in range(200)])

    assert unchanged(0, 30) == 1
    assert unchanged(1, 30) == pytest.approx(2 / 14, abs=0.08)
    assert unchanged(2, 30) < unchanged(1, 30)
    assert unchanged(1, 0) > 0.5


def test_the_box_has_one_place_and_one_colour_in_all_frames() -> None:
    clip = noise(6, 64, 64)
    erased, areas = 0, []
    torch.manual_seed(0)
    for _ in range(100):
        out = StrongAugment(erasing=0.5)(clip)
        box = (out == GREY.view(3, 1, 1)).all(dim=1)  # (T, H, W)
        changed = (out != clip).any(dim=1)
        if not changed.any():
            continue
        erased += 1
        assert not (changed & ~box).any()
        inside = box.all(dim=0)
        rows, columns = (inside.any(dim=axis).nonzero().flatten() for axis in (1, 0))
        height, width = (int(x[-1] - x[0]) + 1 for x in (rows, columns))
        assert inside.sum() == height * width  # a full rectangle, in every frame
        assert changed.any(0).sum() > 0.99 * inside.sum()
        areas.append(height * width / 64**2)
    assert erased == pytest.approx(50, abs=15)
    assert min(areas) > 0.015
    assert max(areas) < 0.34
    assert max(areas) > 0.25


def test_channels_besides_rgb_are_refused() -> None:
    with pytest.raises(ValueError, match="not 5 channels"):
        StrongAugment(1)(torch.zeros(2, 5, 8, 8, dtype=torch.uint8))


def test_a_clip_is_the_same_whoever_reads_it_and_wherever_the_rest_is_done(rows) -> None:
    transform, strong = get_train_transform(32), StrongAugment(2, 15, 0.5)
    settings = (rows, 4, 32, "random", transform)
    clips = ClipsDataset(*settings, strong=strong)
    draws = [(index, 100 + index) for index in range(6)]
    here, elsewhere = (
        next(iter(DataLoader(clips, 6, sampler=draws, num_workers=workers)))[0]
        for workers in (0, 1)
    )
    assert torch.equal(here, elsewhere)
    # On a GPU `Augment` comes later, by the draw that is handed on: strong changes do not wait.
    deferred = ClipsDataset(*settings, strong=strong, defer=True)
    plain = ClipsDataset(*settings, defer=True)
    changed = 0
    for number, draw in enumerate(draws):
        clip, _, numbers = deferred[draw]
        assert torch.equal(transform.apply(clip[None], numbers[None])[0], here[number])
        changed += not torch.equal(clip, plain[draw][0])
    assert changed >= 4


def test_settings_reach_the_training_clips_only(tiny_data: Path, monkeypatch) -> None:
    monkeypatch.chdir(tiny_data)
    common = {
        "data_root": str(tiny_data),
        "classes": ("dark", "grey", "light"),
        "n_frames": 4,
        "image_size": 32,
        "workers": 0,
        "device": "cpu",
    }
    flags = {"rand_augment": 2, "rand_magnitude": 17, "erasing": 0.3}
    train, val, test, _ = build_dataloaders(TrainConfig(**common, **flags))
    strong = train.dataset.clips.strong
    assert (strong.operations.num_ops, strong.operations.magnitude) == (2, 17)
    assert strong.erase.p == 0.3
    assert val.dataset.clips.strong is None
    assert test.dataset.clips.strong is None
    # Off, nothing is drawn: clips are those of a version that knew nothing of this.
    train = build_dataloaders(TrainConfig(**common))[0].dataset.clips
    rows = train.rows
    before = ClipsDataset(rows, 4, 32, "random", get_train_transform(32))
    assert torch.equal(train[3, 8][0], before[3, 8][0])


@pytest.mark.parametrize("flag", ["--rand-magnitude=31", "--rand-augment=-1", "--erasing=1.5"])
def test_impossible_strengths_are_refused(flag: str, tiny_data, tmp_path, mistake) -> None:
    done = mistake(main, "--data-root", tiny_data, *TINY_FLAGS, flag, cwd=tmp_path)
    assert flag[2:].split("=")[0].replace("-", "_") in done.stderr
