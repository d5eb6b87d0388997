"""The input of frame encoders: RGB, motion or both; each kind equals a computation by hand."""

import pytest
import torch
from helpers import make_model
from torch import nn

from config import TrainConfig
from modeling.frame_encoder import FrameEncoder, camera_motion, decode_motion, rgb_difference
from timeline.streaming import supports_streaming
from training.checks import resolve
from utils.errors import UserError

every_model = pytest.mark.parametrize("name", ["tsm_resnet", "cnnlstm"])


def clips(channels: int = 3, n: int = 2, frames: int = 3, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (n, frames, channels, 32, 32)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def lively(name: str, **options: object) -> FrameEncoder:
    torch.manual_seed(0)
    model = make_model(name, 4, **options).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model


def network_inputs(model: FrameEncoder, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The input of the networks: RGB, and motion as three channels, `(B * T, 3, H, W)` each."""
    rgb = model.normalize(x[:, :, :3])
    if x.shape[2] == 3:
        motion = 2 * rgb_difference(rgb)
    else:
        field = decode_motion(x[:, :, 3:]) / 0.025
        speed = (field[:, :, :1] ** 2 + field[:, :, 1:] ** 2).sqrt()
        motion = torch.cat((field, speed), 2)
    return rgb.flatten(0, 1), motion.flatten(0, 1)


@pytest.mark.parametrize("motion", ["rgbdiff", "flow", "mv"])
@torch.no_grad()
def test_features_by_hand(motion: str) -> None:
    x = clips(3 if motion == "rgbdiff" else 5)
    alone = lively("cnnlstm", modality=motion)
    rgb, image = network_inputs(alone, x)
    wanted = alone.backbone(image).unflatten(0, (2, 3))
    torch.testing.assert_close(alone.frame_features(x), wanted, atol=1e-4, rtol=1e-3)

    late = lively("cnnlstm", modality=f"rgb+{motion}", fusion="late")
    wanted = torch.cat((late.backbone(rgb), late.motion_backbone(image)), 1)
    assert late.num_features == 1024
    torch.testing.assert_close(late.frame_features(x).flatten(0, 1), wanted, atol=1e-4, rtol=1e-3)

    early = lively("cnnlstm", modality=f"rgb+{motion}", fusion="early")
    extra = image if motion == "rgbdiff" else image[:, :2]
    wanted = early.backbone(torch.cat((rgb, extra), 1))
    torch.testing.assert_close(early.frame_features(x).flatten(0, 1), wanted, atol=1e-4, rtol=1e-3)


@torch.no_grad()
def test_the_summary_follows_the_features() -> None:
    x = clips(5)
    model = lively("cnnlstm", modality="rgb+flow", fusion="summary")
    features = model.frame_features(x)
    rgb, _ = network_inputs(model, x)
    torch.testing.assert_close(
        features[..., :512].flatten(0, 1), model.backbone(rgb), atol=1e-4, rtol=1e-3
    )
    wanted = camera_motion(decode_motion(x[:, :, 3:])) / 0.025
    torch.testing.assert_close(features[..., 512:], wanted, atol=1e-4, rtol=1e-3)


@every_model
@torch.no_grad()
def test_early_motion_starts_as_the_mean_filter(name: str) -> None:
    plain = lively(name)
    model = lively(name, modality="rgb+flow", fusion="early")
    conv, rgb = model.backbone.conv1.weight, plain.backbone.conv1.weight
    assert conv.shape == (64, 5, 7, 7)
    torch.testing.assert_close(conv[:, 3:], conv[:, :3].mean(1, keepdim=True).expand(-1, 2, -1, -1))
    torch.testing.assert_close(conv[:, :3], rgb)
    still = clips(5)
    still[:, :, 3:] = 128  # no motion: it must be as if there were no such channels
    torch.testing.assert_close(model(still), plain(still[:, :, :3]), atol=1e-4, rtol=1e-3)


@every_model
@pytest.mark.parametrize("modality", ["rgbdiff", "rgb+rgbdiff", "flow", "rgb+mv"])
def test_motion_changes_the_logits_and_learns(name: str, modality: str) -> None:
    model = lively(name, modality=modality)
    x = clips(model.channels)
    other = x.clone()
    if model.channels == 5:
        other[:, :, 3:] = 255 - other[:, :, 3:]
    else:
        other = other.flip(1)
    assert not torch.allclose(model(x), model(other), atol=1e-4)
    model(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    staged = {id(p) for stage in model.stages().values() for m in stage for p in m.parameters()}
    assert staged == {id(p) for p in model.parameters()}


def test_a_second_network_shifts_too() -> None:
    model = lively("tsm_resnet", modality="rgb+rgbdiff", fusion="late", shift_mode="causal")
    x = clips(frames=4)
    with torch.no_grad():
        before, kept = model.frame_logits(x)
        assert len(kept) == 16  # eight blocks each
        x[:, 3] = 0
        after, _ = model.frame_logits(x)
    torch.testing.assert_close(before[:, :3], after[:, :3])
    assert not torch.allclose(before[:, 3], after[:, 3])


@every_model
def test_rgb_differences_need_windows(name: str) -> None:
    causal = {"shift_mode": "causal"} if name == "tsm_resnet" else {}
    assert supports_streaming(make_model(name, 3, **causal))
    assert not supports_streaming(make_model(name, 3, modality="rgbdiff", **causal))
    assert not supports_streaming(make_model(name, 3, modality="rgb+rgbdiff", **causal))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"modality": "rgb+rgbdiff", "fusion": "summary"}, "summary needs a field of motion"),
        ({"fusion": "early"}, r"fusion is a setting of modality rgb\+rgbdiff"),
        ({"modality": "flow", "fusion": "early"}, r"fusion is a setting of modality rgb\+rgbdiff"),
        (
            {"model_name": "vivit", "modality": "rgbdiff"},
            "modality is a setting of tsm_resnet, cnnlstm",
        ),
        (
            {"model_name": "r2plus1d", "backbone": "resnet50"},
            "backbone is a setting of tsm_resnet, cnnlstm",
        ),
        ({"backbone": "convnext_tiny", "image_size": 16}, "convnext_tiny takes no frames of 16 px"),
        ({"modality": "rgb+flow", "random_erase": 0.5}, "RGB alone"),
    ],
)
def test_settings_that_cannot_work(settings: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        resolve(TrainConfig(**settings))
