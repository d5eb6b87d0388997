"""Spatial crops: where they are, and that averaging over them is what evaluate.py does."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY_FLAGS
from torchvision.transforms.v2 import functional as tv

import evaluate
import train
from checkpoint import build_from_checkpoint, load_checkpoint
from crops import SHARE, spatial_crops
from dataset import ClipsDataset, get_val_transform, read_manifest


def ramp(channels: int = 3, size: int = 64) -> torch.Tensor:
    """A clip whose first channel grows to the right, the second downward: values say places."""
    place = (torch.arange(size) * 255 / (size - 1)).round()
    clip = torch.full((2, channels, size, size), 128.0)
    clip[:, 0], clip[:, 1] = place, place[:, None]
    return clip.to(torch.uint8)


@pytest.mark.parametrize(
    ("count", "middles"),
    [
        (3, [(0.5, 0.4375), (0.5, 0.5), (0.5, 0.5625)]),
        (
            5,
            [(0.5, 0.5), (0.4375, 0.4375), (0.4375, 0.5625), (0.5625, 0.4375), (0.5625, 0.5625)],
        ),
    ],
)
def test_where_the_crops_are(count: int, middles: list[tuple[float, float]]) -> None:
    crops = spatial_crops(ramp(), count)
    assert crops.shape == (count, 2, 3, 64, 64)
    assert crops.dtype == torch.uint8
    for crop, (down, right) in zip(crops, middles, strict=True):
        assert crop[:, 0].float().mean() / 255 == pytest.approx(right, abs=0.01)
        assert crop[:, 1].float().mean() / 255 == pytest.approx(down, abs=0.01)
        span = (crop[0, 0].max().item() - crop[0, 0].min().item()) / 255
        assert span == pytest.approx(SHARE, abs=0.02)


def test_one_crop_is_the_clip_itself() -> None:
    assert torch.equal(spatial_crops(ramp(), 1)[0], ramp())


def test_motion_grows_as_the_crop_is_enlarged() -> None:
    clip = ramp(5)
    clip[:, 3], clip[:, 4] = 128 + 42, 128 - 120
    crops = spatial_crops(clip, 3)
    assert crops[:, :, 3].unique().tolist() == [128 + 48]  # 42 / 0.875
    assert crops[:, :, 4].unique().tolist() == [1]  # clamped


def test_the_data_set_puts_crops_of_a_view_side_by_side(tiny_data: Path) -> None:
    rows = read_manifest(tiny_data / "test.csv", tiny_data, ("dark", "grey", "light"))

    def item(views: int, crops: int) -> torch.Tensor:
        clips = ClipsDataset(rows, 4, 32, "uniform", get_val_transform(32), views, crops=crops)
        assert clips.answers == views * crops
        return clips[0][0]

    views, both = item(2, 1), item(2, 3)
    assert both.shape == (6, 4, 3, 32, 32)
    assert torch.equal(both, torch.cat([spatial_crops(view, 3) for view in views]))
    assert torch.equal(item(1, 3), spatial_crops(item(1, 1), 3))
    left = tv.resize(views[0][..., 2:30, 0:28], [32, 32], antialias=False)
    assert torch.equal(both[0], left)


def test_evaluate_averages_the_probabilities(
    tiny_data: Path, tmp_path: Path, run_main: Callable
) -> None:
    flags = [*TINY_FLAGS, "--epochs", 1, "--data-root", tiny_data, "--run-dir", tmp_path / "runs"]
    run_main(train.main, *flags, cwd=tmp_path)
    (run,) = (tmp_path / "runs").iterdir()
    run_main(evaluate.main, run, "--views", "2", "--crops", "3", "--workers", 0, cwd=tmp_path)
    folder = run / "evaluate_test_views2_crops3"
    facts = json.loads((folder / "test_metrics.json").read_text())
    assert (facts["views"], facts["crops"]) == (2, 3)
    state = load_checkpoint(run)
    model = build_from_checkpoint(state)
    config = state["config"]
    rows = read_manifest(tiny_data / "test.csv", tiny_data, tuple(config["classes"]))
    clips = ClipsDataset(rows, config["n_frames"], config["image_size"], views=2)
    temperature = state["calibration"]["temperature"]
    wanted = []
    with torch.inference_mode():
        for views, _ in (clips[index] for index in range(len(clips))):
            looks = torch.cat([spatial_crops(view, 3) for view in views])
            wanted.append((model(looks).double() / temperature).softmax(1).mean(0).numpy())
    table = np.genfromtxt(folder / "predictions.csv", delimiter=",", names=True, dtype=None)
    found = np.stack([table[f"p_{name}"] for name in config["classes"]], 1)
    np.testing.assert_allclose(found, np.stack(wanted), atol=1e-5)
