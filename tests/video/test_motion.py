"""Motion from its measurement to the models' input: sampling, cache, augmenting, and the maths."""

import json
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
from clips.manifest import ClipRow
from clips.transforms import Augment, inverse_maps, sampling_grid, warp, warp_motion
from dataset import ClipsDataset
from modeling.frame_encoder import (
    decode_motion,
    global_motion,
    inflate_first_conv,
    join_motion,
    temporal_gradients,
)
from video.clip_reader import read_clip, read_motion_clip, read_with_motion
from video.encoder import write_video
from video.motion import NONE, RANGE, encode_motion, flow_fields

MEASURES = ["rgb+flow", "rgb+vectors"]
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


@pytest.mark.parametrize("inputs", MEASURES)
def test_motion_depends_on_the_frame_alone(tmp_path: Path, inputs: str) -> None:
    """It is the motion since the frame before in the file, whichever were sampled."""
    clip = moving(tmp_path / "clip.mp4")
    frames, fields = read_with_motion(clip, lambda n: range(n), 64, inputs)
    assert frames.shape == (12, 64, 64, 3)
    assert fields.shape == (12, 2, 16, 16)
    assert (fields[0] == NONE).all()
    for field in fields[1:]:
        assert np.allclose(pixels(field), (3, -2), atol=0.3)
    for wanted in ([5], [0, 4, 9], [11, 11, 2]):
        some, motion = read_with_motion(clip, lambda n, wanted=wanted: wanted, 64, inputs)
        assert np.array_equal(some, frames[wanted])
        assert np.array_equal(motion, fields[wanted])


@pytest.mark.parametrize("inputs", MEASURES)
def test_dataset_gives_pictures_and_their_motion(tmp_path: Path, inputs: str) -> None:
    clip = moving(tmp_path / "clip.mp4")
    rows = [ClipRow(clip, 0)]
    both, _ = ClipsDataset(rows, 4, 64, inputs=inputs)[0]
    rgb, _ = ClipsDataset(rows, 4, 64)[0]
    assert both.shape == (4, 5, 64, 64)
    assert both.is_contiguous()
    assert torch.equal(both[:, :3], rgb)
    centre = decode_motion(both[:, 3:, 24:40, 24:40]).mean((2, 3)) * SIDE
    assert torch.allclose(centre, torch.tensor([3.0, -2.0]).expand(4, 2), atol=0.3)
    whole, _ = ClipsDataset(rows, 12, 64, inputs=inputs)[0]
    assert [bool((frame == NONE).all()) for frame in whole[:, 3:]] == [True, *[False] * 11]
    views, _ = ClipsDataset(rows, 2, 64, views=2, inputs=inputs)[0]
    assert views.shape == (2, 2, 5, 64, 64)
    shuffled, _ = ClipsDataset(rows, 4, 64, shuffle_frames=True, inputs=inputs)[0]
    plain, _ = ClipsDataset(rows, 4, 64, shuffle_frames=True)[0]
    order = [int((rgb == frame).flatten(1).all(1).nonzero()) for frame in plain]
    assert order != [0, 1, 2, 3]
    assert torch.equal(shuffled, both[order])


@pytest.mark.parametrize("inputs", MEASURES)
@pytest.mark.parametrize("frames", [10, 40])  # kept whole, and some of them
def test_cache_keeps_motion_exactly(tmp_path: Path, inputs: str, frames: int) -> None:
    clip = moving(tmp_path / "data/clip.mp4", 1, -1, frames)
    settings = CacheSettings(4, 64, per_segment=3, inputs=inputs)
    cache = ClipCache.create(tmp_path / "cache", tmp_path / "data", settings)
    size, error = cache.write(clip)
    assert error is None
    assert cache.place(clip).stat().st_size == size
    for sampling, draws in (("uniform", None), ("random", [1 / 6, 5 / 6, 0.5, 0.5])):
        cached, motion = cache.read_motion(clip, 4, sampling, draws)
        decoded, field = read_motion_clip(clip, 4, sampling, 64, draws, 1, inputs)
        assert np.array_equal(motion, field)
        assert cached.shape == decoded.shape
        assert np.array_equal(cache.read(clip, 4, sampling, draws), cached)
    rgb, _ = ClipsDataset([ClipRow(clip, 0)], 4, 64, cache=cache)[0]
    both, _ = ClipsDataset([ClipRow(clip, 0)], 4, 64, cache=cache, inputs=inputs)[0]
    assert torch.equal(both[:, :3], rgb)
    cache.place(clip).write_bytes(cache.place(clip).read_bytes()[:-1])
    assert cache.problem(clip) == "damaged in the cache"


def test_older_caches_stay_valid(tmp_path: Path) -> None:
    """Those from before there was motion do not name their inputs, in the folder or its files."""
    clip = moving(tmp_path / "data/clip.mp4")
    cache = ClipCache.create(tmp_path / "cache", tmp_path / "data", CacheSettings(4, 64))
    cache.write(clip)
    place, header = cache.place(clip), tmp_path / "cache/cache.json"
    content = json.loads(header.read_text())
    assert content.pop("inputs") == "rgb"
    header.write_text(json.dumps(content))
    start, old = place.read_bytes(), b', "inputs": "rgb"'
    assert old in start
    length = int.from_bytes(start[8:12], "little") - len(old)
    place.write_bytes(start[:8] + length.to_bytes(4, "little") + start[12:].replace(old, b""))
    older = ClipCache(tmp_path / "cache", tmp_path / "data")
    assert older.problem(clip) is None
    assert np.array_equal(older.read(clip, 4), cache.read(clip, 4))
    flow = CacheSettings(4, 64, inputs="rgb+flow")
    other = ClipCache.create(tmp_path / "cache", tmp_path / "data", flow)
    assert other.problem(clip) == "cached with other settings"


def test_codes_are_shares_of_the_side() -> None:
    shares = np.array([-1.0, -RANGE, -0.01, 0.0, 0.02, RANGE, 0.3])
    codes = encode_motion(shares)
    assert codes.tolist() == [1, 1, 103, 128, 179, 255, 255]
    back = decode_motion(torch.from_numpy(codes))
    assert torch.allclose(back, torch.from_numpy(shares).float().clamp(-RANGE, RANGE), atol=2e-4)
    assert torch.allclose(decode_motion(torch.from_numpy(codes) / 255), back, atol=1e-7)
    large = join_motion(torch.zeros(1, 3, 32, 32, dtype=torch.uint8), smooth_field(8)[0, :1])
    assert large.shape == (1, 5, 32, 32)
    level = torch.full((1, 2, 8, 8), 77, dtype=torch.uint8)
    assert (join_motion(large[:, :3], level)[:, 3:] == 77).all()


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
    field = torch.tensor([30, 20]).view(1, 1, 2, 1, 1).expand(1, 2, 2, 32, 32) + NONE
    maps = inverse_maps(draw(**change))
    out = warp_motion(field.to(torch.uint8), sampling_grid(maps, (32, 32)), maps).int() - NONE
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
    maps = inverse_maps(draw(**change))
    grid = sampling_grid(maps, (LARGE, LARGE))
    warped = warp(clip.float(), grid).round().to(torch.uint8)[0].permute(0, 2, 3, 1).numpy()
    measured = flow_fields([(warped[0], warped[1])], LARGE)[0]
    field = torch.from_numpy(flow_fields([(first, second)], LARGE))
    joined = join_motion(clip[0, 1:], field)[None, :, 3:]
    augmented = warp_motion(joined, grid, maps)[0, 0]
    inside = slice(LARGE // 3, -LARGE // 3)
    ours = np.median(decode_motion(augmented)[:, inside, inside].numpy(), axis=(1, 2)) * LARGE
    centre = slice(len(measured[0]) // 3, -len(measured[0]) // 3)
    assert np.allclose(pixels(measured[:, centre, centre], LARGE), ours, atol=0.35)


def test_augmenting_leaves_the_picture_as_without_motion() -> None:
    generator = torch.Generator().manual_seed(2)
    clips = torch.randint(0, 256, (2, 5, 3, 48, 48), dtype=torch.uint8, generator=generator)
    motion = smooth_field(48, 5).expand(2, -1, -1, -1, -1)
    augment = Augment(48)
    draws = torch.stack([augment.draw() for _ in range(2)])
    draws[:, 3] = 0.4  # much comes in from above
    both = augment.apply(torch.cat([clips, motion], 2), draws)
    assert torch.equal(both[:, :, :3], augment.apply(clips, draws))
    assert (both[:, :, 3:, :8] == NONE).all()
    assert not (both[:, :, 3:, 24:] == NONE).all()
    colours = Augment(48, flip=0, rotation=0, translate=0, zoom=0)
    kept = colours.apply(torch.cat([clips, motion], 2), torch.stack([colours.draw()] * 2))
    assert torch.equal(kept[:, :, 3:], motion)
    still = Augment(48).apply(torch.cat([clips, motion], 2), draw().expand(2, -1))
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


def test_global_motion_is_the_least_squares_fit() -> None:
    rng = np.random.default_rng(0)
    fields = rng.normal(0, 0.02, (2, 3, 2, 10, 14))
    y, x = np.meshgrid((np.arange(10) + 0.5) / 10 - 0.5, (np.arange(14) + 0.5) / 14 - 0.5,
                       indexing="ij")  # fmt: skip
    one, zero = np.ones_like(x), np.zeros_like(x)
    rows = [np.stack([one, zero, x, -y], -1), np.stack([zero, one, y, x], -1)]
    design = np.concatenate([part.reshape(-1, 4) for part in rows])
    ours = global_motion(torch.from_numpy(fields)).numpy()
    assert ours.shape == (2, 3, 6)
    for field, found in zip(fields.reshape(-1, 2, 10, 14), ours.reshape(-1, 6), strict=True):
        solution, squares, *_ = np.linalg.lstsq(design, field.reshape(-1), rcond=None)
        length = np.hypot(field[0], field[1]).mean()
        wanted = [*solution, length, np.sqrt(squares[0] / 140)]
        assert np.allclose(found, wanted, atol=1e-6)


def test_global_motion_of_a_camera_leaves_nothing_over() -> None:
    camera = (0.01, -0.02, 0.03, -0.04)
    found = global_motion(torch.from_numpy(similarity(*camera, 24))[None, None])[0, 0]
    assert torch.allclose(found[:4], torch.tensor(camera), atol=1e-6)
    assert found[5] < 1e-6


@pytest.mark.parametrize(("zoom", "turn"), [(0.03, 0.0), (-0.03, 0.0), (0.0, 0.03), (0.0, -0.03)])
def test_global_motion_of_measured_flow(zoom: float, turn: float) -> None:
    """A picture that was enlarged and turned clockwise about its centre."""
    still = torch.from_numpy(scene(2 * LARGE, 2 * LARGE)).permute(2, 0, 1).float()[None, None]
    maps = inverse_maps(draw(angle=float(np.degrees(turn)), scale=1 + zoom))
    moved = warp(still, sampling_grid(maps, still.shape[-2:]))
    pair = [one[0, 0, :, 96:288, 96:288].round().byte() for one in (still, moved)]
    first, second = (one.permute(1, 2, 0).contiguous().numpy() for one in pair)
    field = decode_motion(torch.from_numpy(flow_fields([(first, second)], LARGE)))
    found = global_motion(field[None])[0, 0]
    assert found[2].item() == pytest.approx(zoom, rel=0.1, abs=0.003)
    assert found[3].item() == pytest.approx(turn, rel=0.1, abs=0.003)
    assert found[:2].abs().max() < 0.003


def test_temporal_gradients() -> None:
    clips = torch.randint(0, 256, (2, 4, 3, 5, 6), dtype=torch.uint8)
    changes = temporal_gradients(clips)
    assert (changes[:, 0] == 0).all()
    for t in range(1, 4):
        wanted = (clips[:, t].int() - clips[:, t - 1].int()) / 255
        assert torch.allclose(changes[:, t], wanted, atol=1e-6)
    assert torch.allclose(temporal_gradients(clips / 255), changes, atol=1e-6)
    assert temporal_gradients(clips[:, :1]).shape == (2, 1, 3, 5, 6)


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
    arguments = ["--data-root", tiny_data, *TINY_FLAGS, "--model", "tsm", "--inputs", "rgb+flow"]
    said = mistake(train.main, *arguments, cwd=tmp_path).stderr
    assert "pip install -r requirements-flow.txt" in said
    assert len(said.strip().splitlines()) == 1
    filling = ["cache", tiny_data, "--output", tmp_path / "cache", "--inputs", "rgb+flow"]
    assert "requirements-flow.txt" in mistake(prepare_data.main, *filling, cwd=tmp_path).stderr
    assert not (tmp_path / "cache").exists()


def test_cache_without_motion_is_refused(run_main, mistake, tiny_data, tmp_path) -> None:
    filling = ["cache", tiny_data, "--output", tmp_path / "cache", "--workers", "0"]
    size = ["--image-size", "32", "--n-frames", "4"]
    run_main(prepare_data.main, *filling, *size, cwd=tmp_path)
    training = ["--data-root", tiny_data, *TINY_FLAGS, "--model", "tsm"]
    training += ["--cache", tmp_path / "cache"]
    said = mistake(train.main, *training, "--inputs", "rgb+vectors", cwd=tmp_path).stderr
    assert "cached with inputs rgb, not rgb+vectors" in said
    both = [*training, "--inputs", "rgb+vectors", "--erasing", "0.5"]
    assert "change RGB alone" in mistake(train.main, *both, cwd=tmp_path).stderr


def test_what_cannot_follow_motion_says_so(mistake, tmp_path: Path, monkeypatch) -> None:
    write_video(tmp_path / "operation.mp4", pan(1, 1, 3))
    state = {"config": {"inputs": "rgb+flow", "classes": ["a", "b"], "n_frames": 4}}
    for script in (predict, evaluate):
        monkeypatch.setattr(script, "load_checkpoint", lambda run: state)
    monkeypatch.setattr(evaluate, "post_hoc_shift", lambda *_: 0.0)
    said = mistake(predict.main, "run", "operation.mp4", cwd=tmp_path).stderr
    assert "trained with rgb+flow" in said
    said = mistake(evaluate.main, "run", "--corruptions", cwd=tmp_path).stderr
    assert "trained with rgb+flow" in said


def test_read_clip_is_what_it_was(tmp_path: Path) -> None:
    clip = moving(tmp_path / "clip.mp4")
    frames, nothing = read_with_motion(clip, lambda n: [1, 4], 64, "rgb")
    assert nothing is None
    assert np.array_equal(frames, read_clip(clip, 12, size=64)[[1, 4]])
