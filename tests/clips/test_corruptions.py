"""The same scene, only worse: reproducible, steady over time, growing with the severity."""

import math
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from helpers import run_script
from PIL import Image
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as tv

from clips.corruptions import CORRUPTIONS, SEVERITIES, Corruption, corrupt
from clips.image_filters import disc_kernel, line_kernel
from demo import data as demo_data
from demo.figures import demo_clip, draw_corruptions

NAMES = ["smoke", "blood_splash", "lens_fog", "specular_glare", "low_light",
         "motion_blur", "defocus", "compression", "frame_drop", "frame_freeze"]  # fmt: skip
IN_PICTURE, IN_TIME = NAMES[:8], NAMES[8:]
NOT_DRAWN = ["defocus", "compression"]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """More gain nothing on small clips, and wait for each other where the machine is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def scene() -> torch.Tensor:
    """A rendered laparoscopic clip, (8, 3, 96, 128) uint8; not to be changed."""
    frames = demo_data.render(demo_data.Clip("train", 5, 1, 1, 1, "Suturing"))[::4]
    return torch.from_numpy(frames).permute(0, 3, 1, 2).contiguous()


def grey(t: int, h: int, w: int, level: int = 128) -> torch.Tensor:
    return torch.full((t, 3, h, w), level, dtype=torch.uint8)


def numbered(t: int) -> torch.Tensor:
    """A clip whose frames show their own number."""
    return torch.arange(t, dtype=torch.uint8).view(t, 1, 1, 1).repeat(1, 3, 16, 16)


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return (one.float() - other.float()).abs().mean().item()


def shown(t: int, name: str, severity: int, seed: int) -> list[int]:
    """The number of the frame that is seen at each time."""
    out = corrupt(numbered(t), name, severity, seed)
    assert (out == out[:, :1, :1, :1]).all()  # whole frames
    return out[:, 0, 0, 0].tolist()


def test_names_for_code_and_command_lines_agree() -> None:
    assert list(CORRUPTIONS) == NAMES
    assert list(get_args(Corruption)) == NAMES
    assert SEVERITIES == (1, 2, 3, 4, 5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [(1, 16, 16), (4, 17, 31), (5, 75, 48), (2, 64, 201)])
def test_shape_and_type_stay(name: str, size: tuple[int, int, int]) -> None:
    t, h, w = size
    clip = torch.randint(256, (t, 3, h, w), dtype=torch.uint8, generator=torch.manual_seed(0))
    for severity in (1, 5):
        out = corrupt(clip, name, severity, 3)
        assert out.shape == clip.shape
        assert out.dtype == torch.uint8
        assert out.is_contiguous()


@pytest.mark.parametrize("name", NAMES)
def test_neither_its_input_nor_any_global_generator_changes(name: str, scene: torch.Tensor) -> None:
    clip = scene.clone()
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()
    out = corrupt(clip, name, 4, 0)
    assert torch.equal(clip, scene)
    assert torch.equal(torch.get_rng_state(), before)
    assert (np.random.get_state()[1] == numpy_before).all()
    out.fill_(0)  # the result shares no memory with the clip either
    assert torch.equal(clip, scene)


@pytest.mark.parametrize("name", NAMES)
def test_same_bytes_in_every_call_and_with_any_number_of_threads(
    name: str, scene: torch.Tensor
) -> None:
    clip = tv.resize(scene, [224, 224])

    def several() -> list[torch.Tensor]:
        return [corrupt(clip, name, 5, seed) for seed in range(2)]

    once = several()
    assert all(map(torch.equal, several(), once))
    try:
        torch.set_num_threads(2)
        assert all(map(torch.equal, several(), once))
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("name", IN_PICTURE)
def test_each_severity_is_further_from_the_clean_clip(name: str, scene: torch.Tensor) -> None:
    for seed in range(2):
        away = [distance(corrupt(scene, name, severity, seed), scene) for severity in SEVERITIES]
        assert away[0] > 0.25
        assert all(far > 1.05 * near for near, far in pairwise(away)), away


@pytest.mark.parametrize("name", NAMES)
def test_the_seed_decides_what_is_drawn(name: str, scene: torch.Tensor) -> None:
    variants = [corrupt(scene, name, 3, seed) for seed in range(4)]
    equal = [torch.equal(variant, variants[0]) for variant in variants]
    assert equal == ([True] * 4 if name in NOT_DRAWN else [True, *equal[1:]])
    assert (sum(equal) == 4) == (name in NOT_DRAWN)


def test_name_and_seed_decide_the_draw_and_severity_does_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    drawn = []

    def draw(clip: torch.Tensor, severity: int, rng: np.random.Generator) -> torch.Tensor:
        drawn.append(rng.random())
        return clip

    for name in ("smoke", "lens_fog"):
        monkeypatch.setitem(CORRUPTIONS, name, draw)
        for seed in (0, 1):
            for severity in SEVERITIES:
                corrupt(grey(1, 16, 16), name, severity, seed)
    assert len(drawn) == 20
    assert all(drawn[i] == drawn[i - i % 5] for i in range(20))
    assert len(set(drawn)) == 4


@pytest.mark.parametrize("name", ["blood_splash", "lens_fog", "motion_blur", "defocus"])
def test_what_sits_on_the_lens_stands_still(name: str, scene: torch.Tensor) -> None:
    out = corrupt(scene[3:4].repeat(6, 1, 1, 1), name, 4, 1)
    assert torch.equal(out, out[:1].expand_as(out))


@pytest.mark.parametrize("name", ["smoke", "specular_glare"])
def test_what_moves_moves_smoothly(name: str, scene: torch.Tensor) -> None:
    still = scene[3:4].repeat(16, 1, 1, 1)
    for seed in range(3):
        out = corrupt(still, name, 3, seed)
        steps = [distance(a, b) for a, b in pairwise(out)]
        assert 0 < max(steps) < 0.15 * distance(out, still)
        # It gets somewhere: redrawn frames would be as far from the next one as from any.
        assert max(distance(out[0], later) for later in out) > 3 * max(steps)


def test_only_the_noise_of_low_light_is_redrawn(scene: torch.Tensor) -> None:
    still = scene[3:4].repeat(6, 1, 1, 1)
    out = corrupt(still, "low_light", 4, 0).float()
    noise = out - out.mean(0)
    assert np.corrcoef(noise[0].flatten(), noise[1].flatten())[0, 1] < 0
    assert out.mean((1, 2, 3)).std() < 0.1


def test_noise_grows_as_the_light_falls() -> None:
    """Shot noise alone: the relative noise goes with one over the root of the light."""
    relative, brightness = [], []
    for severity in SEVERITIES:
        out = corrupt(grey(2, 128, 128, 200), "low_light", severity, 0).float()
        relative.append((out.std() / out.mean()).item())
        brightness.append(out.mean().item())
    assert brightness == sorted(brightness, reverse=True)
    assert brightness[-1] < 80
    # From 45 % to 10 % of the light: the root of 4.5, and a bit for read noise and rounding.
    assert relative[2] / relative[0] == pytest.approx(math.sqrt(4.5), rel=0.1)
    assert relative[4] > 1.5 * relative[2]


@pytest.mark.parametrize("radius", [0.3, 1.0, 2.7, 8.96])
def test_disc_kernel(radius: float) -> None:
    kernel = disc_kernel(radius)
    place = torch.arange(len(kernel)) - len(kernel) // 2
    assert kernel.sum().item() == pytest.approx(1, abs=1e-6)
    assert torch.allclose(kernel, kernel.T, atol=1e-7)
    assert torch.allclose(kernel, kernel.flip(0), atol=1e-7)
    outside = place[:, None] ** 2 + place**2 > (radius + math.sqrt(2)) ** 2
    assert kernel[outside].sum() == 0
    # A disc's variance along an axis is r^2 / 4; sharing points among pixels adds at most 1 / 4.
    variance = (kernel.sum(0) * place**2).sum().item()
    assert radius**2 / 4 <= variance * 1.001 <= radius**2 / 4 * 1.05 + 0.25
    if radius > 2:  # flat inside
        assert kernel.max() == pytest.approx(1 / (math.pi * radius**2), rel=0.05)


@pytest.mark.parametrize("length", [0.5, 3.0, 20.0])
@pytest.mark.parametrize("angle", [0.0, 0.4, math.pi / 2, 2.5])
def test_line_kernel(length: float, angle: float) -> None:
    kernel = line_kernel(length, angle)
    y, x = np.mgrid[: len(kernel), : len(kernel)] - len(kernel) // 2
    assert kernel.sum().item() == pytest.approx(1, abs=1e-6)
    along, across = np.cos(angle) * x + np.sin(angle) * y, np.cos(angle) * y - np.sin(angle) * x
    weights = kernel.numpy()
    assert (weights * along).sum() == pytest.approx(0, abs=1e-5)
    # A line's variance is length^2 / 12; sharing points among pixels adds at most 1 / 4 each way.
    assert -1e-6 <= (weights * across**2).sum() <= 0.25
    assert length**2 / 12 * 0.99 <= (weights * along**2).sum() <= length**2 / 12 * 1.05 + 0.25


@pytest.mark.parametrize("name", ["motion_blur", "defocus"])
def test_blurs_keep_brightness(name: str, scene: torch.Tensor) -> None:
    for level in (0, 1, 77, 255):
        clip = grey(2, 45, 60, level)
        assert torch.equal(corrupt(clip, name, 5, 0), clip)
    # Away from the frame's edges: beyond them the picture is not known.
    black = F.pad(scene, [20] * 4)
    out = corrupt(black, name, 5, 0)
    assert out.float().mean().item() == pytest.approx(black.float().mean().item(), abs=0.1)


def test_defocus_is_the_convolution_with_its_disc(scene: torch.Tensor) -> None:
    """By hand: radius 0.04 of the shorter side, the edges repeated."""
    kernel = disc_kernel(0.04 * 96)
    padded = F.pad(scene.float(), [len(kernel) // 2] * 4, mode="replicate")
    wanted = F.conv2d(padded.flatten(0, 1).unsqueeze(1), kernel[None, None]).view(scene.shape)
    out = corrupt(scene, "defocus", 5, 0).float()
    assert (out - wanted).abs().max() < 0.51


def test_motion_blur_is_a_line_of_one_direction() -> None:
    dot = grey(1, 101, 101, 0)
    dot[..., 50, 50] = 255
    angles = []
    for severity, length in zip((3, 4, 5), (0.065, 0.1, 0.15), strict=True):
        out = corrupt(dot, "motion_blur", severity, 5)[0, 0].double().numpy()
        y, x = np.mgrid[:101, :101] - 50
        moments = np.cov(np.stack([x.ravel(), y.ravel()]), aweights=out.ravel(), ddof=0)
        spread, axes = np.linalg.eigh(moments)
        assert spread[1] == pytest.approx((101 * length) ** 2 / 12, rel=0.25)
        assert spread[0] < 0.3
        angles.append(math.atan2(axes[1, 1], axes[0, 1]) % math.pi)
    assert np.ptp(angles) < 0.05


@pytest.mark.parametrize("name", ["smoke", "blood_splash", "lens_fog", "specular_glare"])
def test_the_severities_of_a_seed_are_in_the_same_places(name: str) -> None:
    clip = grey(3, 64, 80)

    def change(severity: int, seed: int) -> torch.Tensor:
        return (corrupt(clip, name, severity, seed).float() - 128).abs().sum(1).flatten()

    for seed in range(3):
        weak, strong = change(2, seed), change(4, seed)
        assert (strong >= weak - 3).float().mean() > 0.97  # more of it everywhere
        same = np.corrcoef(weak, strong)[0, 1]
        other = np.corrcoef(weak, change(4, seed + 10))[0, 1]
        assert same > 0.4
        assert same > other + 0.05


@pytest.mark.parametrize("name", ["smoke", "blood_splash", "lens_fog", "specular_glare"])
def test_the_black_around_the_view_stays_black(name: str) -> None:
    y, x = np.mgrid[:96, :128]
    inside = torch.from_numpy(np.hypot(y - 48, x - 64) < 46)
    clip = torch.where(inside, grey(2, 96, 128), torch.tensor(8, dtype=torch.uint8))
    clip[:, :, 40:46, 60:70] = 5  # a shadow in the scene, which smoke hides
    out = corrupt(clip, name, 5, 0)
    far = torch.from_numpy(np.hypot(y - 48, x - 64) > (58 if name == "specular_glare" else 49))
    assert (out[..., far].int() - 8).abs().max() <= (4 if name == "specular_glare" else 1)
    assert distance(out[..., inside], clip[..., inside]) > 8
    if name in ("smoke", "lens_fog"):
        assert out[..., 40:46, 60:70].float().mean() > 20


@pytest.mark.parametrize("name", ["smoke", "blood_splash", "lens_fog", "motion_blur", "defocus"])
def test_small_and_large_pictures_look_alike(name: str, scene: torch.Tensor) -> None:
    large = tv.resize(scene[:3], [256, 256], antialias=True)
    small = tv.resize(large, [64, 64], antialias=True)
    of_large = tv.resize(corrupt(large, name, 4, 0), [64, 64], antialias=True)
    of_small = corrupt(small, name, 4, 0)
    assert distance(of_small, of_large) < 0.25 * distance(of_small, small)


def test_smoke_takes_colour_and_contrast_away_and_fog_sharpness(scene: torch.Tensor) -> None:
    """Colour and fine detail suffer more than a mere veil, which takes the same share of all."""

    def chroma(clip: torch.Tensor) -> float:
        return (clip.float().amax(1) - clip.float().amin(1)).mean().item()

    def contrast(clip: torch.Tensor) -> float:
        return F.avg_pool2d(clip[..., 24:72, 40:88].float(), 12).std().item()

    def detail(clip: torch.Tensor) -> float:
        return clip[..., 24:72, 40:88].float().diff(dim=-1).abs().mean().item()

    smoked, fogged = corrupt(scene, "smoke", 3, 0), corrupt(scene, "lens_fog", 4, 0)
    assert chroma(smoked) / chroma(scene) < 0.85 * detail(smoked) / detail(scene)
    assert contrast(smoked) / contrast(scene) < 0.75
    assert detail(fogged) / detail(scene) < 0.7 * contrast(fogged) / contrast(scene)
    assert contrast(fogged) / contrast(scene) < 0.75
    for out in (smoked, fogged):
        assert out.float().mean() > 1.1 * scene.float().mean()


def test_blood_is_red_and_dark_and_glare_is_saturated() -> None:
    clip = grey(2, 96, 96, 160)
    blood, glare = corrupt(clip, "blood_splash", 4, 0), corrupt(clip, "specular_glare", 4, 0)
    red, green, blue = blood.float().unbind(1)
    covered = green < 30
    assert 0.05 < covered.float().mean() < 0.6
    assert (red[covered] > green[covered] + 20).all()
    assert red[covered].max() < 155
    assert blue[covered].max() < 45
    white = (glare >= 244).all(1)
    assert 0.01 < white.float().mean() < 0.4


def test_what_is_seen_through_blood_is_blurred() -> None:
    clip = grey(1, 96, 96, 100)
    clip[..., ::2] = 180  # stripes
    red, green, _ = corrupt(clip, "blood_splash", 4, 0).float()[0]
    covered = (green < 15)[:, 1:]
    assert red.diff(dim=1)[covered].abs().mean() < 10  # 19 if it were sharp
    assert red.diff(dim=1)[green[:, 1:] > 90].abs().mean() > 60


def test_glare_makes_highlights_bloom_that_are_there_already() -> None:
    plain = grey(1, 96, 96, 60)
    shiny = plain.clone()
    shiny[..., 44:52, 44:52] = 255
    around = torch.zeros(96, 96, dtype=torch.bool)
    around[40:56, 40:56] = True
    around[44:52, 44:52] = False
    for seed in range(3):
        before, after = (
            corrupt(clip, "specular_glare", 5, seed)[..., around].float().mean()
            for clip in (plain, shiny)
        )
        assert after > before + 10


@pytest.mark.parametrize("name", IN_TIME)
@pytest.mark.parametrize(
    ("t", "lost"),  # 1/8, 1/4, 3/8, 1/2 and 5/8 of t, halves rounded up, one frame always left
    [
        (16, [2, 4, 6, 8, 10]),
        (4, [1, 1, 2, 2, 3]),
        (3, [0, 1, 1, 2, 2]),
        (2, [0, 1, 1, 1, 1]),
        (1, [0, 0, 0, 0, 0]),
    ],
)
def test_frames_are_lost_as_the_table_says(name: str, t: int, lost: list[int]) -> None:
    for seed in range(8):
        gone: set[int] = set()
        for severity, count in zip(SEVERITIES, lost, strict=True):
            seen = shown(t, name, severity, seed)
            assert seen[0] == 0
            assert seen == sorted(seen)
            now = {time for time, number in enumerate(seen) if number != time}
            assert len(now) == count
            # Each is replaced by the last frame that arrived.
            assert all(
                number == max(set(range(time + 1)) - now) for time, number in enumerate(seen)
            )
            assert gone <= now  # what a lesser severity loses is lost here too
            gone = now


def test_a_freeze_is_one_run_and_ends_with_a_jump() -> None:
    starts = set()
    for seed in range(12):
        for severity, count in zip(SEVERITIES, (2, 4, 6, 8, 10), strict=True):
            seen = shown(16, "frame_freeze", severity, seed)
            start = next(time for time in range(16) if seen[time + 1] == time)
            after = list(range(start + count + 1, 16))
            assert seen == [*range(start), *[start] * (count + 1), *after]
            assert after
            starts.add((seed, start))
    assert len(starts) == 12  # one moment a seed, whatever the severity
    assert len({start for _, start in starts}) >= 3


def test_dropped_frames_are_scattered_one_by_one() -> None:
    for seed in range(8):
        for severity in (1, 2, 3):
            seen = shown(16, "frame_drop", severity, seed)
            assert max(seen.count(number) for number in seen) == 2


def test_lost_frames_of_a_real_clip_come_from_it(scene: torch.Tensor) -> None:
    for name in IN_TIME:
        assert torch.equal(corrupt(scene, name, 4, 3), scene[shown(8, name, 4, 3)])


def test_mistakes_are_named(scene: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"no such corruption: fire.*lens_fog"):
        corrupt(scene, "fire", 1, 0)
    for severity in (0, 6):
        with pytest.raises(ValueError, match="severity"):
            corrupt(scene, "smoke", severity, 0)
    for clip in (scene.float(), scene[0], scene[:, :1]):
        with pytest.raises(ValueError, match="uint8"):
            corrupt(clip, "smoke", 1, 0)


def test_the_script_draws_the_same_picture_as_this_process(tmp_path: Path) -> None:
    """Python's hash seed differs from process to process: the corruptions must not."""
    arguments = ("corruptions", "grid.png", "--size", "40", "--seed", "1")
    run_script("demo.figures", *arguments, cwd=tmp_path, PYTHONHASHSEED="12345")
    assert [path.name for path in tmp_path.iterdir()] == ["grid.png"]
    draw_corruptions(tmp_path / "here.png", demo_clip(40), seed=1)
    there, here = (np.asarray(Image.open(tmp_path / f"{name}.png")) for name in ("grid", "here"))
    assert there.shape[0] > there.shape[1] > 500
    assert len(np.unique(there.reshape(-1, there.shape[-1]), axis=0)) > 1000
    assert np.array_equal(there, here)
