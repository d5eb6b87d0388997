"""Transforms: one draw per clip, geometry as in torchvision's affine, colours by their formulas."""

import colorsys
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import TINY_FLAGS
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as pil
from torchvision.transforms.v2 import functional as tv

import evaluate
import train
from checkpoint import load_checkpoint, rebuild_model
from clips.manifest import ClipRow, read_manifest
from clips.transforms import (
    CROP_RATIO,
    ClipAugment,
    RandAugmentErase,
    apply_color,
    color_maps,
    inverse_affine,
    sampling_grid,
    spatial_crops,
    warp,
)
from config import TrainConfig
from dataset import ClipsDataset, collate, get_train_transform, get_val_transform
from train import main
from training.loaders import build_dataloaders
from video.container import LUMA

NAMES = (
    "hflip_prob",
    "rotation",
    "translate",
    "scale",
    "brightness",
    "contrast",
    "saturation",
    "hue",
)
OFF = dict.fromkeys(NAMES, 0.0)
SAME = [1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 0.0]


def blurred(n_frames: int = 4, size: int = 96, clips: int = 1) -> torch.Tensor:
    """(B, T, 3, size, size) uint8 with soft edges, as a camera sees them."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(clips * n_frames, 3, size, size, generator=generator)
    soft = tv.gaussian_blur(noise, [9, 9])
    soft = (soft - soft.min()) / (soft.max() - soft.min())
    return (soft * 255).to(torch.uint8).unflatten(0, (clips, n_frames))


def draw(**changes: float) -> torch.Tensor:
    names = ("flip", "angle", "right", "down", "scale", "brightness", "contrast", "saturation")
    return torch.tensor([{**dict(zip((*names, "hue"), SAME, strict=True)), **changes}[n]
                         for n in (*names, "hue")])  # fmt: skip


def coloured(clip: torch.Tensor, one: torch.Tensor) -> torch.Tensor:
    """Recoloured by one draw, the mean taken of all pixels."""
    return apply_color(clip, *color_maps(one[None], clip.mean((1, 3, 4))))


@pytest.mark.parametrize(
    ("angle", "right", "down", "scale"),
    [(0, 0, 0, 1), (10, 0, 0, 1), (-33, 12, -7, 1), (90, 0, 0, 1), (7, 3, 5, 1.2), (0, -9, 0, 0.7)],
)
@pytest.mark.parametrize("flip", [False, True])
def test_geometry_is_torchvisions(flip: bool, angle, right, down, scale) -> None:
    clip, size = blurred(), 96
    one = draw(
        flip=-1.0 if flip else 1.0, angle=angle, right=right / size, down=down / size, scale=scale
    )
    grid = sampling_grid(inverse_affine(one[None]), (size, size))
    ours = warp(clip.float(), grid)[0].round()
    # PIL does not blend the outermost pixels with the black around them.
    inside = warp(torch.ones_like(clip, dtype=torch.float32), grid)[0] > 0.999
    for frame, result, there in zip(clip[0], ours, inside, strict=True):
        image = Image.fromarray(frame.permute(1, 2, 0).numpy())
        image = pil.hflip(image) if flip else image
        image = pil.affine(image, angle, [right, down], scale, [0.0], InterpolationMode.BILINEAR)
        wanted = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        error = (result - wanted).abs()[there]
        assert np.percentile(error, 99) <= 1
        assert error.mean() < 0.7


def test_nothing_drawn_is_nothing_changed() -> None:
    clip = blurred(clips=2)
    assert torch.equal(ClipAugment(96).apply(clip, torch.tensor([SAME, SAME])), clip)
    assert torch.equal(ClipAugment(96, **OFF)(clip[0]), clip[0])


def test_flip_is_the_exact_mirror_image() -> None:
    clip = blurred()[0]
    assert torch.equal(ClipAugment(96, **{**OFF, "hflip_prob": 1.0})(clip), clip.flip(-1))


def test_brightness_contrast_saturation_by_their_formulas() -> None:
    clip = blurred().float()
    luma = (clip * torch.tensor(LUMA).view(3, 1, 1)).sum(2, keepdim=True)
    wanted = {
        "brightness": 1.3 * clip,
        "contrast": 0.7 * clip + 0.3 * luma.mean(),
        "saturation": 1.4 * clip - 0.4 * luma,
    }
    for name, factor in (("brightness", 1.3), ("contrast", 0.7), ("saturation", 1.4)):
        out = coloured(clip, draw(**{name: factor}))
        assert torch.allclose(out, wanted[name], atol=0.05), name
    together = coloured(clip, draw(brightness=1.3, contrast=0.7, saturation=1.4))
    step = 0.7 * (1.3 * clip) + 0.3 * (1.3 * luma).mean()
    grey = (step * torch.tensor(LUMA).view(3, 1, 1)).sum(2, keepdim=True)
    assert torch.allclose(together, 1.4 * step - 0.4 * grey, atol=0.05)


@pytest.mark.parametrize("hue", [-0.02, 0.02, 0.1])
def test_hue_turns_colours_and_keeps_luma_and_greys(hue: float) -> None:
    clip = blurred().float() * 0.3 + 90  # pale: nothing is clipped by the reference
    out = coloured(clip, draw(hue=hue))
    weights = torch.tensor(LUMA).view(3, 1, 1)
    assert torch.allclose((out * weights).sum(2), (clip * weights).sum(2), atol=0.05)
    grey = torch.full((1, 1, 3, 2, 2), 120.0)
    assert torch.allclose(coloured(grey, draw(hue=hue)), grey, atol=0.05)
    red, turned = torch.tensor([200.0, 60.0, 50.0]), []
    for colour in (red, coloured(red.view(1, 1, 3, 1, 1), draw(hue=hue)).flatten()):
        turned.append(colorsys.rgb_to_hsv(*(colour / 255).tolist())[0])
    moved = (turned[1] - turned[0] + 0.5) % 1 - 0.5
    assert moved * hue > 0  # the same way round as HSV, and about as far
    assert abs(moved) == pytest.approx(abs(hue), rel=0.6)


def test_each_clip_of_a_batch_has_its_own_draw() -> None:
    """What a GPU does to a batch is what a worker does to each clip."""
    augment, clips = ClipAugment(96), blurred(clips=3)
    draws = torch.stack([augment.sample_params() for _ in range(3)])
    together = augment.apply(clips, draws)
    alone = [
        augment.apply(clip[None], one[None])[0] for clip, one in zip(clips, draws, strict=True)
    ]
    assert not torch.equal(draws[0], draws[1])
    assert (together.int() - torch.stack(alone).int()).abs().max() <= 1


def test_draws_stay_within_their_strengths() -> None:
    augment = ClipAugment(96, 0.25, 20, 0.1, 0.3, 0.2, 1.5, 0.4, 0.05)
    draws = torch.stack([augment.sample_params() for _ in range(4000)])
    assert (draws[:, 0] < 0).float().mean() == pytest.approx(0.25, abs=0.03)
    low, high = draws.amin(0)[1:], draws.amax(0)[1:]
    wanted = [(-20, 20), (-0.1, 0.1), (-0.1, 0.1), (0.7, 1.3), (0.8, 1.2), (0, 2.5), (0.6, 1.4),
              (-0.05, 0.05)]  # fmt: skip
    for (a, b), smallest, largest in zip(wanted, low, high, strict=True):
        assert a <= smallest + 1e-6 < a + 0.02 * (b - a)
        assert b - 0.02 * (b - a) < largest <= b + 1e-6


def test_clips_of_another_size_are_resized_first() -> None:
    clip = blurred(size=64)[0]
    assert ClipAugment(96)(clip).shape == (4, 3, 96, 96)
    with pytest.raises(ValueError, match="uint8"):
        ClipAugment(96)(clip.float())


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
        assert span == pytest.approx(CROP_RATIO, abs=0.02)


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
        assert clips.num_views == views * crops
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
    run_main(evaluate.main, run, "--views", "2", "--crops", "3", "--num-workers", 0, cwd=tmp_path)
    folder = run / "evaluate_test_views2_crops3"
    facts = json.loads((folder / "test_metrics.json").read_text())
    assert (facts["views"], facts["crops"]) == (2, 3)
    state = load_checkpoint(run)
    model = rebuild_model(state)
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
    strong, changed = RandAugmentErase(2, 20, 0.5), 0
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
        strong = RandAugmentErase(operations, magnitude)
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
        out = RandAugmentErase(random_erase=0.5)(clip)
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
        RandAugmentErase(1)(torch.zeros(2, 5, 8, 8, dtype=torch.uint8))


def test_a_clip_is_the_same_whoever_reads_it_and_wherever_the_rest_is_done(rows) -> None:
    transform, strong = get_train_transform(32), RandAugmentErase(2, 15, 0.5)
    settings = (rows, 4, 32, "random", transform)
    clips = ClipsDataset(*settings, pre_transform=strong)
    draws = [(index, 100 + index) for index in range(6)]
    here, elsewhere = (
        next(iter(DataLoader(clips, 6, sampler=draws, num_workers=n, collate_fn=collate))).clips
        for n in (0, 1)
    )
    assert torch.equal(here, elsewhere)
    # On a GPU `ClipAugment` comes later, by the draw that is handed on: strong changes do not wait.
    deferred = ClipsDataset(*settings, pre_transform=strong, augment_on_device=True)
    plain = ClipsDataset(*settings, augment_on_device=True)
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
        "num_workers": 0,
        "device": "cpu",
    }
    flags = {"rand_augment": 2, "ra_magnitude": 17, "random_erase": 0.3}
    train, val, test, _ = build_dataloaders(TrainConfig(**common, **flags))
    strong = train.dataset.pre_transform
    assert (strong.operations.num_ops, strong.operations.magnitude) == (2, 17)
    assert strong.erase.p == 0.3
    assert val.dataset.pre_transform is None
    assert test.dataset.pre_transform is None
    # Without these settings nothing is drawn for them: the clips are those of a plain data set.
    train = build_dataloaders(TrainConfig(**common))[0].dataset
    rows = train.rows
    before = ClipsDataset(rows, 4, 32, "random", get_train_transform(32))
    assert torch.equal(train[3, 8][0], before[3, 8][0])


@pytest.mark.parametrize("flag", ["--ra-magnitude=31", "--rand-augment=-1", "--random-erase=1.5"])
def test_impossible_strengths_are_refused(flag: str, tiny_data, tmp_path, mistake) -> None:
    done = mistake(main, "--data-root", tiny_data, *TINY_FLAGS, flag, cwd=tmp_path)
    assert flag[2:].split("=")[0].replace("-", "_") in done.stderr
