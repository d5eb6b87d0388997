"""Masked autoencoding: mask, targets, and an encoder that computes visible patches alone."""

import pytest
import torch
from helpers import make_model
from torch import nn
from torch.nn import functional as F

from pretraining.mae import (
    MaskedAutoencoder,
    count_visible,
    default_mask_ratio,
    encoder_gflops,
    pixel_targets,
    reconstruction,
    tube_mask,
)
from vivit import patchify

SIZE, FRAMES = 32, 4
SIZES = {"n_frames": FRAMES, "image_size": SIZE, "patch_size": 8}
ENCODERS = {
    "factorised": ("vivit", {"depth": 2, "tubelet_frames": 2}),
    "joint": ("vivit", {"depth": 2, "tubelet_frames": 2, "attention": "joint"}),
    "timesformer": ("timesformer", {}),
}
PATCHES = (SIZE // 8) ** 2


def encoder(kind: str) -> nn.Module:
    torch.manual_seed(0)
    name, options = ENCODERS[kind]
    model = make_model(name, 2, **SIZES, **options)
    for parameter in model.parameters():  # TimeSformer's temporal branch starts at zero
        nn.init.normal_(parameter, std=0.05) if not parameter.any() else None
    return model.eval()


def autoencoder(kind: str, mask_ratio: float = 0.75) -> MaskedAutoencoder:
    return MaskedAutoencoder(encoder(kind), FRAMES, SIZE, mask_ratio, 32, 1)


def some_clips(count: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    shape = (count, FRAMES, 3, SIZE, SIZE)
    return torch.randint(256, shape, dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize(
    ("patches", "ratio", "visible"), [(196, 0.9, 20), (9, 0.75, 2), (4, 0.98, 1), (4, 0.05, 3)]
)
def test_visible_and_masked_patches_are_all_patches(patches, ratio, visible) -> None:
    assert count_visible(patches, ratio) == visible
    seen, hidden = tube_mask(5, patches, visible)
    assert seen.shape == (5, visible)
    assert hidden.shape == (5, patches - visible)
    everything = torch.cat((seen, hidden), dim=1).sort(dim=1).values
    assert (everything == torch.arange(patches)).all()
    assert visible in (1, patches - 1) or len(seen.unique(dim=0)) > 1  # each clip has its own


def test_few_patches_are_hidden_less() -> None:
    assert default_mask_ratio(196) == 0.9
    assert default_mask_ratio(9) == 0.75


def test_targets_are_normalised_per_tubelet() -> None:
    targets = pixel_targets(some_clips(), 8, 2)
    assert targets.shape == (2, FRAMES // 2, PATCHES, 3 * 2 * 8 * 8)
    assert torch.allclose(targets.mean(dim=-1), torch.zeros(2, 2, PATCHES), atol=1e-5)
    assert torch.allclose(targets.std(dim=-1), torch.ones(2, 2, PATCHES), atol=1e-4)
    # The first tubelet, by hand: the corner of the first two frames.
    corner = some_clips()[0, :2, :, :8, :8].permute(0, 2, 3, 1).flatten() / 255
    assert torch.allclose(targets[0, 0, 0], (corner - corner.mean()) / corner.std(), atol=1e-4)
    black = torch.zeros(1, FRAMES, 3, SIZE, SIZE, dtype=torch.uint8)
    assert (pixel_targets(black, 8, 2) == 0).all()


@pytest.mark.parametrize("kind", ENCODERS)
def test_visible_tokens_are_those_of_a_masked_attention(kind, monkeypatch) -> None:
    """All patches computed, none of the hidden ones attended to: the visible ones come out equal,
    and so do the tokens of no patch."""
    model, clips = encoder(kind), some_clips()
    visible, masked = tube_mask(2, PATCHES, 5)
    with torch.no_grad():
        tokens, others = model.forward_tokens(clips, visible)
    times = tokens.shape[1]
    hidden = torch.zeros(2, PATCHES, dtype=torch.bool).scatter(1, masked, True)
    if kind == "joint":
        blocked = hidden.repeat(1, times)  # (B, T' * patches)
    else:  # a row per frame, after its class token
        blocked = F.pad(hidden, (1, 0)).repeat_interleave(times, dim=0)  # (B * T, 1 + patches)

    def attention(q, k, v, **_):
        scores = q @ k.transpose(2, 3) / q.shape[3] ** 0.5
        if k.shape[2] == blocked.shape[1]:
            scores = scores.masked_fill(blocked[:, None, None], -torch.inf)
        return scores.softmax(dim=3) @ v

    monkeypatch.setattr(F, "scaled_dot_product_attention", attention)
    with torch.no_grad():
        all_tokens, all_others = model.forward_tokens(clips)
    index = visible[:, None, :, None].expand(-1, times, -1, tokens.shape[3])
    assert all_tokens.shape[2] == PATCHES
    assert torch.allclose(all_tokens.gather(2, index), tokens, atol=1e-5)
    assert torch.allclose(all_others, others, atol=1e-5)


@pytest.mark.parametrize("kind", ENCODERS)
def test_all_tokens_classify_as_the_model_does(kind) -> None:
    model, clips = encoder(kind), some_clips()
    with torch.no_grad():
        tokens, others = model.forward_tokens(clips)
        clip = tokens.flatten(1, 2).mean(dim=1) if kind == "joint" else others[:, 0]
        assert torch.allclose(model.head(clip), model(clips), atol=1e-5)


def test_a_perfect_decoder_has_no_loss(monkeypatch) -> None:
    model, clips = autoencoder("factorised"), some_clips()
    targets = pixel_targets(clips, 8, 2)
    visible, masked = tube_mask(2, PATCHES, model.visible)
    right = torch.stack([targets[b][:, masked[b]] for b in range(2)])
    monkeypatch.setattr(model, "predict", lambda _: (right, visible, masked))
    assert model(clips).tolist() == [[0.0], [0.0]]
    monkeypatch.setattr(model, "predict", lambda _: (right + 2, visible, masked))
    assert torch.allclose(model(clips), torch.full((2, 1), 4.0), atol=1e-5)


@pytest.mark.parametrize("kind", ENCODERS)
def test_the_loss_is_that_of_masked_patches_and_trains_the_whole_encoder(kind, monkeypatch) -> None:
    """Other pixels to predict in the visible patches change no gradient, in the hidden ones all."""

    def gradients(change: str) -> dict[str, torch.Tensor]:
        model = autoencoder(kind)
        torch.manual_seed(3)
        visible, masked = tube_mask(2, PATCHES, model.visible)
        changed = {"": masked[:, :0], "visible": visible, "masked": masked}[change]
        targets = pixel_targets(some_clips(), model.patch_size, model.tubelet_frames)
        index = changed[:, None, :, None].expand(-1, targets.shape[1], -1, targets.shape[3])
        targets = targets.scatter(2, index, 5.0)
        with monkeypatch.context() as patch:
            patch.setattr("pretraining.mae.pixel_targets", lambda *_: targets)
            torch.manual_seed(3)
            model(some_clips()).sum().backward()
        return {name: p.grad for name, p in model.encoder.named_parameters() if p.requires_grad}

    plain, visible, masked = (gradients(change) for change in ("", "visible", "masked"))
    assert not [name for name, grad in plain.items() if grad is None or not grad.any()]
    assert not [name for name in plain if name.startswith("head.")]
    assert all(torch.equal(plain[name], visible[name]) for name in plain)
    assert not any(torch.equal(plain[name], masked[name]) for name in plain)


def test_hidden_pixels_do_not_reach_the_prediction() -> None:
    model, clips = autoencoder("factorised").eval(), some_clips()
    torch.manual_seed(4)
    with torch.no_grad():
        first, _, masked = model.predict(clips)
        patches = patchify(clips, 8, 2)
        index = masked[:, None, :, None].expand(-1, patches.shape[1], -1, patches.shape[3])
        hidden = patches.scatter(2, index, 0).view(2, 2, 4, 4, 2, 8, 8, 3)
        hidden = hidden.permute(0, 1, 4, 7, 2, 5, 3, 6).reshape(clips.shape)
        torch.manual_seed(4)
        second, *_ = model.predict(hidden)
    assert not torch.equal(hidden, clips)
    assert torch.equal(first, second)


@pytest.mark.parametrize("kind", ENCODERS)
def test_visible_patches_alone_cost_less(kind) -> None:
    name, options = ENCODERS[kind]
    with torch.device("meta"):
        model = make_model(name, 2, **SIZES, **options)
    few, everything = encoder_gflops(model, FRAMES, SIZE, 4)
    assert 0.1 * everything < few < 0.6 * everything


def test_the_picture_shows_the_visible_patches_in_all_rows() -> None:
    model, clips = autoencoder("timesformer").eval(), some_clips()
    torch.manual_seed(5)
    picture = reconstruction(model, clips)
    assert picture.shape == (2 * 3 * SIZE, FRAMES * SIZE, 3)
    torch.manual_seed(5)
    visible, masked = tube_mask(2, PATCHES, model.visible)

    def cell(row: int, patch: int, frame: int = 2) -> torch.Tensor:
        top, left = row * SIZE + patch // 4 * 8, frame * SIZE + patch % 4 * 8
        return picture[top : top + 8, left : left + 8]

    seen, hidden = int(visible[0, 0]), int(masked[0, 0])
    frame = clips[0, 2].permute(1, 2, 0)
    assert torch.equal(picture[:SIZE, 2 * SIZE : 3 * SIZE], frame)
    assert torch.equal(cell(0, seen), cell(1, seen))
    assert torch.equal(cell(0, seen), cell(2, seen))
    assert (cell(1, hidden) == 127).all()
    assert not torch.equal(cell(0, hidden), cell(2, hidden))
