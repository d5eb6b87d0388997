"""Motion from its measurement to the input of the models: sampling, cache, augmentation, maths."""

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import SIDE, TINY_FLAGS, moving, pan, pixels, scene
from torch import nn
from torchvision.transforms.v2 import functional as tv

import evaluate
import predict
import prepare_data
import train
from clips.cache import CacheSettings, ClipCache
from clips.corruptions import ShuffleFrames
from clips.manifest import ClipRow
from clips.transforms import ClipAugment, inverse_affine, sampling_grid, warp, warp_motion
from dataset import ClipsDataset, concat_motion
from modeling.frame_encoder import (
    camera_motion,
    decode_motion,
    inflate_first_conv,
    rgb_difference,
)
from video.clip_reader import FrameSampler, read_clip, read_frames_and_motion
from video.encoder import write_video
from video.motion import MAX_MOTION, ZERO, encode_motion, flow_fields

KINDS = ["flow", "mv"]
LARGE = 192


def smooth_field(side: int = 48, frames: int = 3) -> torch.Tensor:
    """`(1, T, 2, side, side)` uint8 motion that differs from place to place."""
    generator = torch.Generator().manual_seed(1)
    coarse = torch.rand(frames, 2, 4, 4, generator=generator) * 100 + 78
    return tv.resize(coarse, [side, side]).round().to(torch.uint8)[None]


@pytest.mark.parametrize(("right", "down"), [(3, 0), (-3, 0), (0, 3), (-2, -4)])
def test_flow_of_a_pan(right: int, down: int) -> None:
    first, second = pan(right, down, 2)
    assert np.allclose(pixels(flow_fields([(first, second)], SIDE)[0]), (right, down), atol=0.3)


@pytest.mark.parametrize("motion", KINDS)
def test_motion_depends_on_the_frame_alone(tmp_path: Path, motion: str) -> None:
    """It is the motion since the frame before in the file, whichever were sampled."""
    clip = moving(tmp_path / "clip.mp4")
    frames, fields = read_frames_and_motion(clip, lambda n: range(n), 64, motion)
    assert frames.shape == (12, 64, 64, 3)
    assert fields.shape == (12, 2, 16, 16)
    assert (fields[0] == ZERO).all()
    for field in fields[1:]:
        assert np.allclose(pixels(field), (3, -2), atol=0.3)
    for wanted in ([5], [0, 4, 9], [11, 11, 2]):
        chosen = read_frames_and_motion(clip, lambda n, wanted=wanted: wanted, 64, motion)
        assert np.array_equal(chosen.rgb, frames[wanted])
        assert np.array_equal(chosen.motion, fields[wanted])


@pytest.mark.parametrize("motion", KINDS)
def test_dataset_gives_frames_and_their_motion(tmp_path: Path, motion: str) -> None:
    clip = moving(tmp_path / "clip.mp4")
    rows = [ClipRow(clip, 0)]
    both, _ = ClipsDataset(rows, 4, 64, motion=motion)[0]
    rgb, _ = ClipsDataset(rows, 4, 64)[0]
    assert both.shape == (4, 5, 64, 64)
    assert both.is_contiguous()
    assert torch.equal(both[:, :3], rgb)
    centre = decode_motion(both[:, 3:, 24:40, 24:40]).mean((2, 3)) * SIDE
    assert torch.allclose(centre, torch.tensor([3.0, -2.0]).expand(4, 2), atol=0.3)
    whole, _ = ClipsDataset(rows, 12, 64, motion=motion)[0]
    assert [bool((frame == ZERO).all()) for frame in whole[:, 3:]] == [True, *[False] * 11]
    views, _ = ClipsDataset(rows, 2, 64, views=2, motion=motion)[0]
    assert views.shape == (2, 2, 5, 64, 64)
    shuffle = [ShuffleFrames()]
    shuffled, _ = ClipsDataset(rows, 4, 64, motion=motion, perturbations=shuffle)[0]
    plain, _ = ClipsDataset(rows, 4, 64, perturbations=shuffle)[0]
    order = [int((rgb == frame).flatten(1).all(1).nonzero()) for frame in plain]
    assert order != [0, 1, 2, 3]
    assert torch.equal(shuffled, both[order])


@pytest.mark.parametrize("motion", KINDS)
@pytest.mark.parametrize("frames", [10, 40])  # kept whole, and some of them
def test_cache_keeps_motion_exactly(tmp_path: Path, motion: str, frames: int) -> None:
    clip = moving(tmp_path / "data/clip.mp4", 1, -1, frames)
    settings = CacheSettings(4, 64, frames_per_segment=3, modality=f"rgb+{motion}")
    cache = ClipCache.create(tmp_path / "cache", tmp_path / "data", settings)
    size, error = cache.write(clip)
    assert error is None
    assert cache.path(clip).stat().st_size == size
    for sampling, offsets in (("uniform", None), ("random", [1 / 6, 5 / 6, 0.5, 0.5])):
        sampler = FrameSampler(4, sampling)
        cached = cache.read(clip, sampler, offsets, motion)
        decoded = read_clip(clip, sampler, 64, offsets, motion)
        assert np.array_equal(cached.motion, decoded.motion)
        assert cached.rgb.shape == decoded.rgb.shape
        assert np.array_equal(cache.read(clip, sampler, offsets).rgb, cached.rgb)
    rgb, _ = ClipsDataset([ClipRow(clip, 0)], 4, 64, cache=cache)[0]
    both, _ = ClipsDataset([ClipRow(clip, 0)], 4, 64, cache=cache, motion=motion)[0]
    assert torch.equal(both[:, :3], rgb)
    cache.path(clip).write_bytes(cache.path(clip).read_bytes()[:-1])
    assert cache.check(clip) == "damaged in the cache"


def test_older_caches_stay_valid(tmp_path: Path) -> None:
    """Caches of earlier versions have other names, and the first ones held no motion."""
    clip, sampler = moving(tmp_path / "data/clip.mp4"), FrameSampler(4)

    def make_old(folder: Path, modality: str, old: dict[str, str]) -> tuple:
        """Make a cache and rename its settings in the folder and its files.

        Returns its settings and the clip as it was read before.
        """
        settings = CacheSettings(4, 64, modality=modality)
        cache = ClipCache.create(folder, tmp_path / "data", settings)
        cache.write(clip)
        decoded = cache.read(clip, sampler, motion=settings.motion)
        header, file = folder / "cache.json", cache.path(clip)
        content, length = file.read_bytes(), int.from_bytes(file.read_bytes()[8:12], "little")
        texts = [header.read_text(), content[12 : 12 + length].decode()]
        for name, older in old.items():
            assert all(name in text for text in texts)
            texts = [text.replace(name, older) for text in texts]
        header.write_text(texts[0].replace(",\n}", "\n}"))
        encoded = texts[1].encode()
        start = content[:8] + len(encoded).to_bytes(4, "little") + encoded
        file.write_bytes(start + content[12 + length :])
        return settings, decoded

    names = {"frames_per_segment": "per_segment", '"modality": ': '"inputs": '}
    for modality, old in (
        ("rgb", names),
        ("rgb", {**names, '"inputs": "rgb"': '"quality": 92'}),  # before there was motion
        ("rgb+flow", names),
        ("rgb+mv", {**names, "rgb+mv": "rgb+vectors"}),
    ):
        folder = tmp_path / f"cache{len(list(tmp_path.iterdir()))}"
        settings, before = make_old(folder, modality, old)
        older = ClipCache(folder, tmp_path / "data")
        assert older.settings == settings
        assert older.check(clip) is None
        again = older.read(clip, sampler, motion=settings.motion)
        assert np.array_equal(again.rgb, before.rgb)
        assert np.array_equal(again.motion, before.motion)
        other = CacheSettings(4, 64, modality="rgb+flow" if modality != "rgb+flow" else "rgb")
        assert ClipCache.create(folder, tmp_path / "data", other).check(clip) == (
            "cached with other settings"
        )


def test_codes_are_fractions_of_the_side() -> None:
    fractions = np.array([-1.0, -MAX_MOTION, -0.01, 0.0, 0.02, MAX_MOTION, 0.3])
    codes = encode_motion(fractions)
    assert codes.tolist() == [1, 1, 103, 128, 179, 255, 255]
    back = decode_motion(torch.from_numpy(codes))
    assert torch.allclose(
        back, torch.from_numpy(fractions).float().clamp(-MAX_MOTION, MAX_MOTION), atol=2e-4
    )
    assert torch.allclose(decode_motion(torch.from_numpy(codes) / 255), back, atol=1e-7)
    large = concat_motion(torch.zeros(1, 3, 32, 32, dtype=torch.uint8), smooth_field(8)[0, :1])
    assert large.shape == (1, 5, 32, 32)
    level = torch.full((1, 2, 8, 8), 77, dtype=torch.uint8)
    assert (concat_motion(large[:, :3], level)[:, 3:] == 77).all()


def draw(flip: float = 1.0, angle=0.0, right=0.0, down=0.0, scale=1.0) -> torch.Tensor:
    return torch.tensor([[flip, angle, right, down, scale, 1.0, 1.0, 1.0, 0.0]])


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"flip": -1.0}, (-30, 20)),
        ({"angle": 90.0}, (-20, 30)),  # clockwise: right becomes down, down becomes left
        ({"scale": 1.5}, (45, 30)),
        ({"right": 0.1, "down": -0.1}, (30, 20)),
        ({"flip": -1.0, "angle": 180.0, "scale": 2.0}, (60, -40)),
    ],
)
def test_vectors_turn_with_the_picture(change: dict, expected: tuple[int, int]) -> None:
    field = torch.tensor([30, 20]).view(1, 1, 2, 1, 1).expand(1, 2, 2, 32, 32) + ZERO
    maps = inverse_affine(draw(**change))
    out = warp_motion(field.to(torch.uint8), sampling_grid(maps, (32, 32)), maps).int() - ZERO
    centre = out[..., 12:20, 12:20]
    wanted = torch.tensor(expected).view(2, 1, 1)
    assert (centre - wanted).abs().max() <= 1


@pytest.mark.parametrize(
    "change",
    [{"flip": -1.0}, {"angle": 25.0}, {"scale": 1.2}, {"flip": -1.0, "angle": -15.0, "scale": 0.9}],
)
def test_augmented_field_is_the_field_of_the_augmented_clip(change: dict) -> None:
    """Flow measured after augmenting equals flow augmented after measuring."""
    first, second = pan(3, -2, 2, LARGE, LARGE)
    clip = torch.from_numpy(np.stack([first, second])).permute(0, 3, 1, 2)[None]  # (1, 2, 3, H, W)
    maps = inverse_affine(draw(**change))
    grid = sampling_grid(maps, (LARGE, LARGE))
    warped = warp(clip.float(), grid).round().to(torch.uint8)[0].permute(0, 2, 3, 1).numpy()
    measured = flow_fields([(warped[0], warped[1])], LARGE)[0]
    field = torch.from_numpy(flow_fields([(first, second)], LARGE))
    joined = concat_motion(clip[0, 1:], field)[None, :, 3:]
    augmented = warp_motion(joined, grid, maps)[0, 0]
    inside = slice(LARGE // 3, -LARGE // 3)
    ours = np.median(decode_motion(augmented)[:, inside, inside].numpy(), axis=(1, 2)) * LARGE
    centre = slice(len(measured[0]) // 3, -len(measured[0]) // 3)
    assert np.allclose(pixels(measured[:, centre, centre], LARGE), ours, atol=0.35)


def test_augmenting_leaves_the_frames_as_without_motion() -> None:
    generator = torch.Generator().manual_seed(2)
    clips = torch.randint(0, 256, (2, 5, 3, 48, 48), dtype=torch.uint8, generator=generator)
    motion = smooth_field(48, 5).expand(2, -1, -1, -1, -1)
    augment = ClipAugment(48)
    params = torch.stack([augment.sample_params() for _ in range(2)])
    params[:, 3] = 0.4  # much comes in from above
    both = augment.apply(torch.cat([clips, motion], 2), params)
    assert torch.equal(both[:, :, :3], augment.apply(clips, params))
    assert (both[:, :, 3:, :8] == ZERO).all()
    assert not (both[:, :, 3:, 24:] == ZERO).all()
    colours = ClipAugment(48, hflip_prob=0, rotation=0, translate=0, scale=0)
    kept = colours.apply(torch.cat([clips, motion], 2), torch.stack([colours.sample_params()] * 2))
    assert torch.equal(kept[:, :, 3:], motion)
    still = ClipAugment(48).apply(torch.cat([clips, motion], 2), draw().expand(2, -1))
    assert torch.equal(still[:, :, 3:], motion)


def similarity(shift_x: float, shift_y: float, zoom: float, turn: float, side: int):
    """`(2, side, side)` motion of a camera, written out pixel by pixel."""
    field = np.zeros((2, side, side))
    for row in range(side):
        for column in range(side):
            x, y = (column + 0.5) / side - 0.5, (row + 0.5) / side - 0.5
            field[0, row, column] = shift_x + zoom * x - turn * y
            field[1, row, column] = shift_y + zoom * y + turn * x
    return field


def test_camera_motion_is_the_least_squares_fit() -> None:
    rng = np.random.default_rng(0)
    fields = rng.normal(0, 0.02, (2, 3, 2, 10, 14))
    y, x = np.meshgrid((np.arange(10) + 0.5) / 10 - 0.5, (np.arange(14) + 0.5) / 14 - 0.5,
                       indexing="ij")  # fmt: skip
    one, zero = np.ones_like(x), np.zeros_like(x)
    rows = [np.stack([one, zero, x, -y], -1), np.stack([zero, one, y, x], -1)]
    design = np.concatenate([part.reshape(-1, 4) for part in rows])
    ours = camera_motion(torch.from_numpy(fields)).numpy()
    assert ours.shape == (2, 3, 6)
    for field, found in zip(fields.reshape(-1, 2, 10, 14), ours.reshape(-1, 6), strict=True):
        solution, squares, *_ = np.linalg.lstsq(design, field.reshape(-1), rcond=None)
        length = np.hypot(field[0], field[1]).mean()
        wanted = [*solution, length, np.sqrt(squares[0] / 140)]
        assert np.allclose(found, wanted, atol=1e-6)


def test_camera_motion_of_a_camera_leaves_nothing_over() -> None:
    camera = (0.01, -0.02, 0.03, -0.04)
    found = camera_motion(torch.from_numpy(similarity(*camera, 24))[None, None])[0, 0]
    assert torch.allclose(found[:4], torch.tensor(camera), atol=1e-6)
    assert found[5] < 1e-6


@pytest.mark.parametrize(("zoom", "turn"), [(0.03, 0.0), (-0.03, 0.0), (0.0, 0.03), (0.0, -0.03)])
def test_camera_motion_of_measured_flow(zoom: float, turn: float) -> None:
    """A picture that was enlarged and turned clockwise about its centre."""
    still = torch.from_numpy(scene(2 * LARGE, 2 * LARGE)).permute(2, 0, 1).float()[None, None]
    maps = inverse_affine(draw(angle=float(np.degrees(turn)), scale=1 + zoom))
    moved = warp(still, sampling_grid(maps, still.shape[-2:]))
    pair = [one[0, 0, :, 96:288, 96:288].round().byte() for one in (still, moved)]
    first, second = (one.permute(1, 2, 0).contiguous().numpy() for one in pair)
    field = decode_motion(torch.from_numpy(flow_fields([(first, second)], LARGE)))
    found = camera_motion(field[None])[0, 0]
    assert found[2].item() == pytest.approx(zoom, rel=0.1, abs=0.003)
    assert found[3].item() == pytest.approx(turn, rel=0.1, abs=0.003)
    assert found[:2].abs().max() < 0.003


def test_rgb_difference() -> None:
    clips = torch.randint(0, 256, (2, 4, 3, 5, 6), dtype=torch.uint8)
    changes = rgb_difference(clips)
    assert (changes[:, 0] == 0).all()
    for t in range(1, 4):
        wanted = (clips[:, t].int() - clips[:, t - 1].int()) / 255
        assert torch.allclose(changes[:, t], wanted, atol=1e-6)
    assert torch.allclose(rgb_difference(clips / 255), changes, atol=1e-6)
    assert rgb_difference(clips[:, :1]).shape == (2, 1, 3, 5, 6)


@pytest.mark.parametrize("kind", [nn.Conv2d, nn.Conv3d])
def test_inflated_convolution(kind: type) -> None:
    """As before where the new channels are zero; a new channel is seen as a grey picture is."""
    conv = kind(3, 4, 3, stride=2, padding=1)
    wider = inflate_first_conv(conv, 2)
    shape = (2, 3, 8, 8) if kind is nn.Conv2d else (2, 3, 4, 8, 8)
    x = torch.randn(shape)
    motion = torch.randn(2, 2, *shape[2:])
    before = conv(x)
    assert torch.allclose(wider(torch.cat([x, 0 * motion], 1)), before, atol=1e-5)
    grey = motion.sum(1, keepdim=True).expand(-1, 3, *motion.shape[2:]) / 3
    wanted = before + conv(grey) - conv(0 * x)
    assert torch.allclose(wider(torch.cat([x, motion], 1)), wanted, atol=1e-5)
    assert conv.weight.shape[1] == 3
    assert wider.in_channels == 5
    assert wider.weight.requires_grad


def test_flow_without_opencv_is_said_at_once(mistake, tiny_data, tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "cv2", None)
    arguments = [
        "--data-root",
        tiny_data,
        *TINY_FLAGS,
        "--model-name",
        "tsm_resnet",
        "--modality",
        "rgb+flow",
    ]
    said = mistake(train.main, *arguments, cwd=tmp_path).stderr
    assert "pip install -r requirements-optional.txt" in said
    assert len(said.strip().splitlines()) == 1
    filling = ["cache", tiny_data, "--output", tmp_path / "cache", "--modality", "rgb+flow"]
    assert "requirements-optional.txt" in mistake(prepare_data.main, *filling, cwd=tmp_path).stderr
    assert not (tmp_path / "cache").exists()


def test_cache_without_motion_is_refused(run_main, mistake, tiny_data, tmp_path) -> None:
    filling = ["cache", tiny_data, "--output", tmp_path / "cache", "--num-workers", "0"]
    size = ["--image-size", "32", "--n-frames", "4"]
    run_main(prepare_data.main, *filling, *size, cwd=tmp_path)
    training = ["--data-root", tiny_data, *TINY_FLAGS, "--model-name", "tsm_resnet"]
    training += ["--cache", tmp_path / "cache"]
    said = mistake(train.main, *training, "--modality", "rgb+mv", cwd=tmp_path).stderr
    assert "cached with modality rgb, not rgb+mv" in said
    both = [*training, "--modality", "rgb+mv", "--random-erase", "0.5"]
    assert "change RGB alone" in mistake(train.main, *both, cwd=tmp_path).stderr


def test_what_cannot_follow_motion_says_so(mistake, tmp_path: Path, monkeypatch) -> None:
    write_video(tmp_path / "operation.mp4", pan(1, 1, 3))
    state = {"config": {"modality": "rgb+flow", "classes": ["a", "b"], "n_frames": 4}}
    monkeypatch.setattr("deployment.loading.load_checkpoint", lambda run: state)
    monkeypatch.setattr("training.losses.logit_adjustment", lambda *_: 0.0)
    said = mistake(predict.main, "run", "operation.mp4", cwd=tmp_path).stderr
    assert "trained with modality rgb+flow" in said
    said = mistake(evaluate.main, "run", "--corruptions", cwd=tmp_path).stderr
    assert "trained with modality rgb+flow" in said


def test_without_motion_only_frames_are_read(tmp_path: Path) -> None:
    clip = moving(tmp_path / "clip.mp4")
    frames, motion = read_frames_and_motion(clip, lambda n: [1, 4], 64, None)
    assert motion is None
    assert np.array_equal(frames, read_clip(clip, FrameSampler(12), 64).rgb[[1, 4]])
