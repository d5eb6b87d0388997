"""Networks of timm as backbones: their features, stages, shifts, weights, and what is refused."""

import copy
import re
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers import make_model
from torch import nn
from torch.nn import functional as F

from config import TrainConfig
from modeling.backbones import Backbone, _recomputed, build_backbone, split_evenly
from modeling.inference import fold_batchnorms, prepare_for_inference
from modeling.layers import HALF_MEAN_STD, IMAGENET_MEAN_STD, enable_gradient_checkpointing
from modeling.weights import load_weights
from models import freeze, keep_frozen_in_eval
from timeline.streaming import Streamer
from training.checks import require_frozen, resolve
from training.feature_cache import _digest
from training.optim import param_groups
from tsm_resnet import TSM, causal_shift, temporal_shift
from utils.device import prepare_model
from utils.distributed import wrap_ddp
from utils.errors import UserError

timm = pytest.importorskip("timm", reason="requirements-optional.txt is not installed")
safetensors = pytest.importorskip("safetensors.torch")

CPU = torch.device("cpu")
CNNS = ["test_resnet", "test_convnext", "test_efficientnet", "test_mambaout", "test_nfnet"]
VITS = ["test_vit", "test_vit2", "test_vit3", "test_vit4"]
every_network = pytest.mark.parametrize("name", CNNS + VITS)


def backbone(name: str, spatial_pool: int = 1) -> Backbone:
    """Random weights, with which no norm and no block is the identity."""
    torch.manual_seed(0)
    net = build_backbone(f"timm:{name}", spatial_pool).eval()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    for parameter in net.parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter, 1.0, 0.2)
    return net


def reference(name: str, net: Backbone, **options: object) -> nn.Module:
    """timm's own network with the same weights."""
    own = timm.create_model(name, num_classes=0, **options).eval()
    own.load_state_dict(net.net.state_dict())
    return own


def frames(n: int = 2, size: int = 64) -> torch.Tensor:
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(1))


def clips(n: int = 2, frames: int = 2, size: int = 64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randint(0, 256, (n, frames, 3, size, size), dtype=torch.uint8, generator=generator)


def one_line(build: object, *arguments: object, **options: object) -> str:
    with pytest.raises(UserError) as refused:
        build(*arguments, **options)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 700  # a few paths and addresses
    return str(refused.value)


@pytest.mark.parametrize("name", [*CNNS, "resnet10t"])
@torch.no_grad()
def test_features_of_cnns_are_timms(name: str) -> None:
    net = backbone(name)
    wanted = reference(name, net)(frames())
    assert torch.equal(net(frames()), wanted)
    assert wanted.shape == (2, net.num_features)


@pytest.mark.parametrize("name", ["test_vit", "eva02_tiny_patch14_224"])
@torch.no_grad()
def test_features_of_vits_are_those_of_both_poolings(name: str) -> None:
    """The first one normalises its tokens before the pooling, the other one after it."""
    net, x = backbone(name), frames(size=80 if name == "test_vit" else 70)
    own = reference(name, net, dynamic_img_size=True)
    for half, pooling in zip(net(x).chunk(2, dim=1), ("token", "avg"), strict=True):
        own.global_pool = pooling
        assert torch.equal(half, own(x))
    assert net.num_features == 2 * own.num_features


@torch.no_grad()
def test_attention_pooling_takes_the_place_of_the_class_token() -> None:
    net = backbone("test_vit3")
    own = reference("test_vit3", net, dynamic_img_size=True)
    summary, mean = net(frames()).chunk(2, dim=1)
    assert torch.equal(summary, own(frames()))
    assert torch.equal(mean, own.forward_features(frames())[:, own.num_prefix_tokens :].mean(1))


@torch.no_grad()
def test_registers_are_left_out_of_the_mean() -> None:
    net = backbone("vit_tiny_patch16_dinov3_qkvb")  # a class token, four registers
    tokens = net.net.forward_features(frames())
    assert tokens.shape == (2, 1 + 4 + 16, 192)
    wanted = torch.cat((tokens[:, 0], tokens[:, 5:].mean(1)), 1)
    torch.testing.assert_close(net(frames()), wanted, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", ["test_vit2", "test_vit4", "test_vit_relpos"])
@torch.no_grad()
def test_a_network_without_a_class_token_gives_the_mean_alone(name: str) -> None:
    net, x = backbone(name), frames(size=160)  # the last one takes no other size
    features = net(x)
    assert torch.equal(features, reference(name, net)(x))
    assert features.shape == (2, net.num_features)


@pytest.mark.parametrize(
    "name", ["test_resnet", "test_efficientnet", "test_mambaout", "test_convnext"]
)
@torch.no_grad()
def test_parts_of_frames(name: str) -> None:
    """Each part of the last map goes through timm's pooling and what follows by itself."""
    net, pooled, x = backbone(name), backbone(name, spatial_pool=2), frames(size=96)
    width = net.num_features
    assert pooled.num_features == 4 * width
    maps = net.net.forward_features(x)  # 3 x 3 cells: the parts overlap
    last = name == "test_mambaout"  # its channels
    parts = pooled(x).unflatten(1, (width, 2, 2))  # channels, then cells
    for row in (0, 1):
        for column in (0, 1):
            rows, columns = slice(row, row + 2), slice(column, column + 2)
            cell = maps[:, rows, columns] if last else maps[:, :, rows, columns]
            assert torch.equal(parts[:, :, row, column], net.net.forward_head(cell))
    assert not torch.allclose(parts[:, :, 0, 0], parts[:, :, 1, 1], atol=1e-3)


@torch.no_grad()
def test_parts_are_those_of_adaptive_pooling() -> None:
    x = torch.randn(2, 3, 7, 5)
    parts = [
        part.mean((2, 3)) for band in split_evenly(x, 3, 2) for part in split_evenly(band, 3, 3)
    ]
    wanted = F.adaptive_avg_pool2d(x, 3).flatten(2)
    torch.testing.assert_close(torch.stack(parts, 2), wanted)


@torch.no_grad()
def test_parts_of_the_patches() -> None:
    pooled = backbone("eva02_tiny_patch14_224", spatial_pool=2)
    net, x = pooled.net, frames(size=56)
    tokens = net.forward_features(x)[:, 1:].unflatten(1, (4, 4))  # (N, rows, columns, C)
    summary, parts = pooled(x).split((192, 4 * 192), dim=1)
    wanted = net.fc_norm(tokens[:, :2, 2:].mean((1, 2)))  # above, to the right
    torch.testing.assert_close(parts.unflatten(1, (192, 4))[:, :, 1], wanted)
    assert torch.equal(summary, backbone("eva02_tiny_patch14_224")(x)[:, :192])


@torch.no_grad()
def test_any_multiple_of_the_patch_and_positions_as_in_the_file() -> None:
    net = backbone("test_vit")
    assert net.net.pos_embed.shape == (1, 1 + 10 * 10, 64)  # 160 px in patches of 16
    for height, width in ((160, 160), (32, 32), (48, 96)):
        assert net(torch.zeros(1, 3, height, width)).shape == (1, 128)
    wide = torch.randn(1, 3, 32, 64)
    parts = backbone("test_vit", spatial_pool=2)(wide)[:, 64:].unflatten(1, (64, 4))
    tokens = net.net.forward_features(wide)[:, 1:].unflatten(1, (2, 4))  # 2 rows, 4 columns
    torch.testing.assert_close(parts[:, :, 3], tokens[:, 1, 2:].mean(1))


@every_network
def test_every_weight_is_in_one_stage(name: str) -> None:
    net = backbone(name)
    stages = net.stages()
    staged = [p for modules in stages.values() for m in modules for p in m.parameters()]
    assert len({id(p) for p in staged}) == len(staged)
    assert {id(p) for p in staged} == {id(p) for p in net.parameters()}
    layers = [stage for stage in stages if stage.startswith("layer")]
    assert layers == [f"layer{k}" for k in range(1, len(layers) + 1)]
    assert list(stages) == ["stem", *layers] + ["top"] * ("top" in stages)
    first = net.get_submodule(net.first_conv)
    assert any(first is m for top in stages["stem"] for m in top.modules())


def test_a_layer_is_a_block_of_a_vit_and_a_stage_of_a_cnn() -> None:
    vit = backbone("test_vit")
    assert vit.stages()["layer2"] == [vit.net.blocks[1]]
    assert vit.stages()["layer6"] == [vit.net.blocks[5], vit.net.norm]
    shapes = {p.shape for p in vit.stages()["stem"][-1].parameters()}
    assert shapes == {vit.net.pos_embed.shape, vit.net.cls_token.shape}
    cnn = backbone("test_convnext")
    second = cnn.net.stages[1]
    assert cnn.stages()["layer2"] == [second.downsample, *second.blocks]
    assert cnn.stages()["top"] == [cnn.net.head]


# Families that are often used, and CAFormer, whose names timm does not group by itself.
FAMILIES = {
    "convnextv2_atto": (320, 4, True),
    "caformer_s18": (512, 4, True),
    "swin_tiny_patch4_window7_224": (768, 4, True),
    "pvt_v2_b0": (256, 4, False),
    "resnet34.a1_in1k": (512, 4, False),
    "vit_tiny_patch16_224": (2 * 192, 12, False),
    "vit_small_patch14_dinov2": (2 * 384, 12, False),
    "mobilenetv4_conv_small": (1280, 5, True),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_families(name: str) -> None:
    width, layers, has_top = FAMILIES[name]
    with torch.device("meta"):
        net = build_backbone(f"timm:{name}").eval()
        assert net(torch.zeros(2, 3, 112, 112)).shape == (2, net.num_features) == (2, width)
    names = [f"layer{k}" for k in range(1, layers + 1)]
    assert list(net.stages()) == ["stem", *names] + ["top"] * has_top
    staged = [id(p) for modules in net.stages().values() for m in modules for p in m.parameters()]
    assert sorted(staged) == sorted(id(p) for p in net.parameters())


def test_the_weights_decide_mean_and_deviation() -> None:
    with torch.device("meta"):
        nets = [build_backbone(f"timm:{name}") for name in ("vit_tiny_patch16_224", "resnet10t")]
    assert [net.mean_std for net in nets] == [HALF_MEAN_STD, IMAGENET_MEAN_STD]
    assert nets[1].frame_size == 176
    assert nets[0].net.pos_embed.shape == (1, 197, 192)


@every_network
def test_freezing_and_layer_decay(name: str) -> None:
    torch.manual_seed(0)
    net = make_model("cnnlstm", 3, backbone=f"timm:{name}", lstm_hidden=8)
    names = list(net.stages())
    last = names[names.index("lstm") - 1]
    groups = param_groups(net, 1.0, 0.05, layer_decay=0.5)
    assert groups[0]["lr"] == pytest.approx(0.5 ** (len(names) - 1))
    assert sum(len(group["params"]) for group in groups) == len(list(net.parameters()))
    freeze(net, last)
    require_frozen(net)
    net.train()
    keep_frozen_in_eval(net)
    stages = net.frame_stages()
    assert not any(
        m.training for modules in stages.values() for top in modules for m in top.modules()
    )
    before = {key: value.clone() for key, value in net.backbone.state_dict().items()}
    net(clips()).sum().backward()
    assert all(torch.equal(value, before[key]) for key, value in net.backbone.state_dict().items())
    assert all((p.grad is None) == k.startswith("backbone.") for k, p in net.named_parameters())


# DenseNet and HRNet pass lists of maps from block to block, and change them afterwards.
@pytest.mark.parametrize("name", [*CNNS, *VITS, "dla46x_c", "hrnet_w18_small"])
def test_checkpointing_computes_blocks_again_and_changes_nothing(name: str) -> None:
    torch.manual_seed(0)
    model = make_model("cnnlstm", 3, backbone=f"timm:{name}", lstm_hidden=8).train()
    other = copy.deepcopy(model)  # before any statistic changes
    enable_gradient_checkpointing(other)
    calls = {id(net): 0 for net in (model, other)}
    for net in (model, other):

        def count(_: nn.Module, *__: object, key: int = id(net)) -> None:
            calls[key] += 1

        block = net.backbone.stages()["layer1"][0]
        inner = next(m for m in block.modules() if not [*m.children()] and [*m.parameters()])
        inner.register_forward_pre_hook(count)
    torch.manual_seed(1)
    loss = model(clips()).pow(2).sum()
    loss.backward()
    torch.manual_seed(1)
    same = other(clips()).pow(2).sum()
    same.backward()
    assert calls == {id(model): 1, id(other): 2}
    assert torch.equal(loss, same)
    pairs = zip(model.named_parameters(), other.parameters(), strict=True)
    for (key, first), second in pairs:
        assert torch.equal(first.grad, second.grad), key
    state = other.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


class Listed(nn.Module):
    """A block of maps in a list, which it changes, as in HRNet."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(3.0))
        self.recomputed = True

    def forward(self, maps: list[torch.Tensor]) -> torch.Tensor:
        maps[0] = maps[0] * self.scale
        return sum(maps) ** 2


def test_lists_that_change_after_a_block_are_recomputed_as_they_were() -> None:
    """DenseNet appends the output of each block to the list that the block got."""
    block, x = Listed(), torch.ones((), requires_grad=True)
    maps = [x, 2 * x]
    out = _recomputed(block, block.forward, maps)
    assert len(maps) == 2
    assert maps[0] is x
    maps.append(out)
    out.backward()  # of (3 x + 2 x) ** 2
    assert (out.item(), x.grad.item(), block.scale.grad.item()) == (25.0, 50.0, 10.0)


@torch.no_grad()
def test_what_gives_no_vector_is_refused() -> None:
    net = backbone("test_resnet")
    net.net.global_pool = nn.Identity()
    assert "timm:test_resnet computes no features of whole frames" in one_line(net, frames())


@torch.no_grad()
def test_a_copy_uses_its_own_weights() -> None:
    model = backbone("test_vit")
    wanted, other = model(frames()), copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.zero_()
    assert torch.equal(other(frames()), wanted)
    assert not torch.equal(model(frames()), wanted)


# The first module of every residual branch with an identity path, counted by hand.
BRANCHES = {
    "test_resnet": ("BasicBlock|Bottleneck", "conv1", 4),
    "test_convnext": ("ConvNeXtBlock", "conv_dw", 9),
    "regnetx_002": ("Bottleneck", "conv1", 13),
    "mobilenetv3_small_050": ("InvertedResidual", "conv_pw", 7),
}


@pytest.mark.parametrize("name", BRANCHES)
@pytest.mark.parametrize("causal", [False, True])
@torch.no_grad()
def test_shift_equals_hooks_on_each_branch(name: str, causal: bool) -> None:
    net = backbone(name)
    kind, first, count = BRANCHES[name]
    hooked = copy.deepcopy(net)
    blocks = [
        module
        for module in hooked.modules()
        if re.fullmatch(kind, type(module).__name__) and getattr(module, "has_skip", True)
    ]
    assert len(blocks) == count
    for block in blocks:
        shift = partial(causal_shift, n_frames=4) if causal else partial(temporal_shift, n_frames=4)
        block.get_submodule(first).register_forward_pre_hook(
            lambda _, x, shift=shift: shift(x[0])[0] if causal else shift(x[0])
        )
    mode = "causal" if causal else "bidirectional"
    model = TSM(3, f"timm:{name}", shift_mode=mode).eval()
    model.backbone.load_state_dict(net.state_dict())
    x = model.normalize(clips(1, 4))[0]
    features, head = [], model.head.register_forward_pre_hook(lambda _, x: features.extend(x))
    model.frame_logits(clips(1, 4))
    head.remove()
    torch.testing.assert_close(features[0], hooked(x), atol=1e-5, rtol=1e-4)
    assert not torch.allclose(features[0], net(x), atol=1e-4)


@torch.no_grad()
def test_stage_shift_is_before_each_stage() -> None:
    """FasterNet keeps the downsampling that each stage begins with at the end of its list."""
    for name in ("test_convnext", "fasternet_t0"):
        net = backbone(name)
        hooked = copy.deepcopy(net)
        for stage in hooked.net.stages:
            stage.register_forward_pre_hook(lambda _, x: temporal_shift(x[0], 4))
        model = TSM(3, f"timm:{name}", shift_place="stage").eval()
        model.backbone.load_state_dict(net.state_dict())
        model.head = nn.Identity()
        x = model.normalize(clips(1, 4))[0]
        wanted = hooked(x)
        torch.testing.assert_close(model.frame_logits(clips(1, 4))[0][0], wanted)
        assert not torch.allclose(wanted, net(x), atol=1e-4)


@pytest.mark.parametrize(
    ("name", "place", "remedy"),
    [
        ("test_byobnet", "blockres", "give --model-name cnnlstm or --shift-place stage"),
        ("dla46x_c", "blockres", "give --model-name cnnlstm"),
        ("dla46x_c", "stage", "give --model-name cnnlstm"),
        ("test_vit", "blockres", "give --model-name cnnlstm"),
        ("test_vit", "stage", "give --model-name cnnlstm"),
        ("test_mambaout", "stage", "give --model-name cnnlstm"),
    ],
)
def test_what_tsm_cannot_shift_is_refused(name: str, place: str, remedy: str) -> None:
    with torch.device("meta"):
        message = one_line(TSM, 3, f"timm:{name}", shift_place=place)
    assert f"timm:{name}" in message
    assert message.endswith(remedy)


@torch.no_grad()
def test_early_fusion_widens_the_first_convolution() -> None:
    for name in ("test_resnet", "test_vit"):
        options = {"backbone": f"timm:{name}", "lstm_hidden": 8}
        net = make_model("cnnlstm", 3, **options, modality="rgb+rgbdiff", fusion="early").eval()
        conv = net.backbone.get_submodule(net.backbone.first_conv)
        assert conv.weight.shape[1] == 6
        plain = make_model("cnnlstm", 3, **options).eval()
        weights = net.backbone.state_dict()
        key = f"{net.backbone.first_conv}.weight"
        weights[key] = weights[key][:, :3]
        plain.backbone.load_state_dict(weights)
        still = clips(1, 1).expand(1, 2, 3, 64, 64)  # no differences between its frames
        torch.testing.assert_close(net.frame_features(still), plain.frame_features(still))
    with torch.device("meta"):
        message = one_line(
            make_model, "cnnlstm", backbone="timm:fastvit_t8", modality="rgb+mv", fusion="early"
        )
    assert "timm:fastvit_t8 has not just one: give --fusion late" in message


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "mobilenetv3_small_050"])
@pytest.mark.parametrize("gpus", [1, 2])
@torch.no_grad()
def test_batchnorms_with_activations_are_folded(
    name: str, gpus: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model("cnnlstm", 3, backbone=f"timm:{name}", lstm_hidden=8).eval()
    model.backbone.load_state_dict(backbone(name).state_dict())
    wanted = model.frame_features(clips())
    if gpus > 1:  # their statistics are shared, and their activations stay
        monkeypatch.setattr("utils.distributed.world_size", lambda: gpus)
        monkeypatch.setattr(nn.parallel, "DistributedDataParallel", lambda model, **_: model)
        wrap_ddp(model, torch.device("cuda", 0)).eval()
        assert any(isinstance(module, nn.SyncBatchNorm) for module in model.modules())
        assert torch.equal(model.frame_features(clips()), wanted)
    count = sum(isinstance(m, nn.BatchNorm2d | nn.SyncBatchNorm) for m in model.modules())
    assert count > 10
    assert fold_batchnorms(model) == count
    torch.testing.assert_close(model.frame_features(clips()), wanted, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("name", ["test_efficientnet", "test_vit2", "test_convnext"])
@torch.inference_mode()
def test_bf16_is_close(name: str) -> None:
    model = make_model("cnnlstm", 3, backbone=f"timm:{name}", lstm_layers=0).eval()
    model.backbone.load_state_dict(backbone(name).state_dict())
    wanted = model.frame_features(clips())
    features = prepare_for_inference(model, CPU, torch.bfloat16).frame_features(clips())
    assert features.dtype == torch.bfloat16
    assert (features.float() - wanted).abs().max() < 0.05 * wanted.abs().max()


def test_relus_stay_out_of_place() -> None:
    """In place, a ReLU at the start of a branch would change the identity path beside it."""
    relu, in_place = nn.ReLU(), nn.ReLU(inplace=True)
    prepare_model(nn.Sequential(relu, in_place), CPU, torch.float32)
    assert (relu.inplace, in_place.inplace) == (False, True)
    prepare_model(in_place, CPU, torch.bfloat16)
    assert not in_place.inplace


@pytest.mark.parametrize("name", ["test_vit", "test_resnet"])
@torch.no_grad()
def test_a_stream_gets_the_predictions_of_its_windows(name: str) -> None:
    torch.manual_seed(0)
    model = make_model("cnnlstm", 3, backbone=f"timm:{name}", lstm_hidden=8).eval()
    model.head.weight *= 20
    video, streamer = clips(1, 6, 32), Streamer(model, 3)
    for t in range(6):
        wanted = model(video[:, max(0, t - 2) : t + 1]).softmax(-1).double()
        torch.testing.assert_close(streamer.step(video[:, t]), wanted, atol=1e-5, rtol=0)


def test_convnext_large_is_torchvisions() -> None:
    from torchvision.models import ConvNeXt_Large_Weights, convnext_large

    with torch.device("meta"):
        net, own = build_backbone("convnext_large"), convnext_large(weights=None)
        assert net(torch.zeros(1, 3, 64, 64)).shape == (1, 1536)
    own.classifier[2] = nn.Identity()
    shapes = [{k: v.shape for k, v in n.state_dict().items()} for n in (net, own)]
    assert shapes[0] == shapes[1]
    assert net.torchvision_weights is ConvNeXt_Large_Weights
    assert len(net.residual_branches()) == 3 + 3 + 27 + 3


@pytest.mark.parametrize(
    "name",
    ["../../x", "hf-hub:timm/resnet10t", "local-dir:/tmp", "/etc/passwd", "", "a\nb",
     "x" * 10**6, "resnet34.none", "tf_efficientnet_b0_ns"],
)  # fmt: skip
def test_names_that_timm_does_not_list_are_refused(name: str) -> None:
    assert f"timm {timm.__version__} has no network" in one_line(build_backbone, f"timm:{name}")


def test_near_names_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    message = one_line(build_backbone, "timm:resnt34")
    assert "did you mean resnet34, " in message
    assert message.count(",") == 4
    assert "choose from resnet18, " in one_line(build_backbone, "resnet19")
    monkeypatch.setattr(timm, "__version__", "1.0.9.dev0")
    message = one_line(build_backbone, "timm:resnet34")
    assert message == "backbone timm:NAME needs timm 1.0.31, not 1.0.9.dev0: pip install -U timm"
    monkeypatch.setitem(sys.modules, "timm", None)
    message = one_line(build_backbone, "timm:resnet34")
    assert message.endswith("pip install -r requirements-optional.txt")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"backbone": "timm:resnt34"}, "did you mean resnet34"),
        ({"backbone": "resnet19"}, "no backbone is called 'resnet19'"),
        ({"backbone": "timm:test_vit", "image_size": 72}, "divisible by patch size"),
        ({"backbone": "timm:test_coatnet", "image_size": 64}, "it was made for 160"),
        ({"backbone": "convnext_tiny", "image_size": 16}, "takes no frames of 16 px"),
        ({"backbone": "timm:coat_tiny"}, "shares weights between its layers"),
        ({"backbone": "timm:pit_ti_224", "spatial_pool": 2, "image_size": 224}, "--spatial-pool 1"),
        ({"backbone": "timm:test_convnext", "freeze_batchnorm": True}, "has no BatchNorm"),
        ({"backbone": "timm:test_vit", "model_name": "tsm_resnet"}, "give --model-name cnnlstm"),
    ],
)
def test_what_cannot_work_is_told_before_training(settings: dict, message: str) -> None:
    with pytest.raises(UserError) as refused:
        resolve(TrainConfig(**{"model_name": "cnnlstm"} | settings))
    lines = str(refused.value).split("\n")
    assert len(lines) == 2
    assert message in lines[1]


def test_what_works_is_not_refused() -> None:
    vit = TrainConfig(model_name="cnnlstm", backbone="timm:test_vit", image_size=80, spatial_pool=2)
    assert resolve(vit).backbone == "timm:test_vit"
    resolve(TrainConfig(backbone="timm:test_efficientnet", shift_place="stage"))
    resolve(TrainConfig(backbone="timm:test_resnet", freeze_batchnorm=True))


def test_kept_features_belong_to_one_network() -> None:
    """Two names with the same weights; the tag of the second one is that of other statistics."""
    digests = []
    for name in ("resnet10t", "resnet10t.c3_in1k"):
        torch.manual_seed(0)
        model = make_model("cnnlstm", 3, backbone=f"timm:{name}", lstm_layers=0)
        digests += [_digest(model), _digest(model)]
    assert digests[0] == digests[1]
    assert digests[2] == digests[3] != digests[0]


# ---- Weights ----


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the hub, laid out as it is, without a network."""

    def download(repository: str, file: str) -> str:
        path = tmp_path / f"models--{repository.replace('/', '--')}" / file
        if not path.exists():
            raise OSError("Name or service not known\nmore")
        return str(path)

    monkeypatch.setattr("modeling.timm_networks.hf_hub_download", download)
    return tmp_path


def official(name: str, seed: int = 1) -> dict[str, torch.Tensor]:
    """A random network with timm's classifier, as its files are."""
    torch.manual_seed(seed)
    return timm.create_model(name).state_dict()


def cnn_lstm(name: str, **options: object) -> nn.Module:
    return make_model("cnnlstm", 3, backbone=f"timm:{name}", lstm_hidden=8, **options)


def is_loaded(model: nn.Module, state: dict[str, torch.Tensor]) -> bool:
    own = model.backbone.net.state_dict()
    return all(torch.equal(value, state[key]) for key, value in own.items())


@pytest.mark.parametrize("name", CNNS[:3] + VITS[:2])
def test_timms_file_is_taken_from_the_hub(name: str, hub: Path) -> None:
    folder = hub / f"models--timm--{name}.r160_in1k"
    folder.mkdir()
    state = official(name)
    safetensors.save_file(state, folder / "model.safetensors")
    model = cnn_lstm(name)
    line = load_weights(model, "default").line
    start = f"weights: {folder / 'model.safetensors'}, backbone only; the head is new"
    assert line.startswith(start)
    assert is_loaded(model, state)


def test_both_networks_of_two_streams_are_filled(hub: Path, tmp_path: Path) -> None:
    state = official("test_resnet")
    safetensors.save_file(state, tmp_path / "file.safetensors")
    late = cnn_lstm("test_resnet", modality="rgb+rgbdiff")
    early = cnn_lstm("test_resnet", modality="rgb+rgbdiff", fusion="early")
    for model in (late, early):
        load_weights(model, str(tmp_path / "file.safetensors"))
    assert torch.equal(late.motion_backbone.net.bn1.weight, state["bn1.weight"])
    wider, first = early.backbone.net.conv1[0].weight, state["conv1.0.weight"]
    assert torch.equal(wider[:, :3], first)
    torch.testing.assert_close(wider[:, 3:], first.mean(1, keepdim=True).expand(-1, 3, -1, -1))


def test_no_network_and_no_weights(hub: Path) -> None:
    message = one_line(load_weights, cnn_lstm("test_resnet"), "default")
    for part in ("Name or service not known", "timm:test_resnet", "--weights FILE",
                 "model.safetensors of https://huggingface.co/timm/test_resnet.r160_in1k",
                 "--weights none"):  # fmt: skip
        assert part in message
    message = one_line(load_weights, cnn_lstm("test_mambaout"), "default")
    assert "timm has no pretrained weights of timm:test_mambaout" in message
    message = one_line(load_weights, cnn_lstm("test_resnet"), "IMAGENET1K_V1")
    assert message.endswith("neither a file nor one of default, none")


def test_a_file_from_a_url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    asked, state = [], official("test_resnet")
    model = cnn_lstm("test_resnet")
    model.backbone.net.pretrained_cfg = model.backbone.net.pretrained_cfg | {
        "hf_hub_id": None,
        "url": "https://example.org/models/test-01234567.pth",
    }
    assert "https://example.org/models/test-01234567.pth" in no_network(model, monkeypatch)

    def download(url: str, target: str) -> None:
        asked.append(url)
        torch.save(state, target)

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    for _ in range(2):  # the second time it is there
        assert "test-01234567.pth" in load_weights(model, "default").line
    assert len(asked) == 1
    assert is_loaded(model, state)


def no_network(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> str:
    def fail(*_: object) -> None:
        raise OSError("Name or service not known")

    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    return one_line(load_weights, model, "default")


@pytest.mark.parametrize("kept", [0, 4, 100, 50_000])
def test_truncated_files_are_one_line(kept: int, hub: Path) -> None:
    """In the hub's cache a link leads to the file: that is what must be deleted."""
    folder = hub / "models--timm--test_resnet.r160_in1k"
    folder.mkdir()
    safetensors.save_file(official("test_resnet"), folder / "whole.safetensors")
    (folder / "blob").write_bytes((folder / "whole.safetensors").read_bytes()[:kept])
    (folder / "model.safetensors").symlink_to(folder / "blob")
    model = cnn_lstm("test_resnet")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    message = one_line(load_weights, model, "default")
    for part in ("cannot be loaded: it is damaged", f"delete {folder / 'blob'} and run again",
                 "timm:test_resnet", "huggingface.co/timm/test_resnet.r160_in1k"):  # fmt: skip
        assert part in message
    message = one_line(load_weights, model, str(folder / "model.safetensors"))
    assert "give another file" in message
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_files_of_the_authors_fit(tmp_path: Path) -> None:
    """ConvNeXt as at Facebook: other names, and the classifier of ImageNet."""
    state = official("test_convnext")
    renamed = {}
    for key, value in state.items():
        key = re.sub(r"^stem\.", "downsample_layers.0.", key)
        key = re.sub(r"^stages\.(\d)\.downsample", r"downsample_layers.\1", key)
        key = key.replace(".blocks.", ".").replace("conv_dw", "dwconv").replace("mlp.fc", "pwconv")
        key = key.replace("head.norm", "norm").replace("head.fc", "head")
        renamed[key] = value
    assert renamed.keys() != state.keys()
    torch.save({"model": renamed}, tmp_path / "author.pth")
    model = cnn_lstm("test_convnext")
    load_weights(model, str(tmp_path / "author.pth"))
    assert is_loaded(model, state)


def test_original_dinov2_fits(tmp_path: Path) -> None:
    state = official("test_vit")
    original = state | {"mask_token": torch.zeros(1, 64)}  # of its training alone
    torch.save({"teacher": original}, tmp_path / "dino.pth")
    model = cnn_lstm("test_vit")
    load_weights(model, str(tmp_path / "dino.pth"))
    assert is_loaded(model, state)


def test_positions_of_another_size_are_resized_to_the_networks_own(tmp_path: Path) -> None:
    torch.manual_seed(1)
    state = timm.create_model("test_vit", img_size=96).state_dict()
    torch.save(state, tmp_path / "small.pth")
    model = cnn_lstm("test_vit")
    load_weights(model, str(tmp_path / "small.pth"))
    positions = model.backbone.net.pos_embed
    assert positions.shape == (1, 101, 64)
    assert torch.equal(positions[:, 0], state["pos_embed"][:, 0])  # of the class token
    grid = state["pos_embed"][:, 1:].transpose(1, 2).unflatten(2, (6, 6))
    wanted = F.interpolate(grid, (10, 10), mode="bicubic", antialias=True).flatten(2)
    torch.testing.assert_close(positions[:, 1:], wanted.transpose(1, 2))


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state.pop("conv1.0.weight"),
        lambda state: state.update(other=torch.zeros(1)),
        lambda state: state.update({"conv1.0.weight": torch.zeros(1)}),
    ],
)
def test_files_that_do_not_fit_are_refused(change: object, tmp_path: Path) -> None:
    state = official("test_resnet")
    change(state)
    torch.save(state, tmp_path / "other.pth")
    message = one_line(load_weights, cnn_lstm("test_resnet"), str(tmp_path / "other.pth"))
    assert re.search(r"other\.pth does not fit ResNet: weights 1 \w+", message)


@pytest.mark.parametrize(
    ("name", "state"),
    [
        ("test_vit", {"pos_embed": torch.zeros(3)}),
        ("test_convnext", {"a.b": torch.zeros(2, 2)}),
        ("caformer_s18", {3: torch.zeros(1)}),
    ],
)
def test_files_that_timm_stumbles_over_are_refused(name: str, state: dict, tmp_path: Path) -> None:
    with torch.device("meta"):
        model = cnn_lstm(name)
    torch.save(state, tmp_path / "odd.pth")
    message = one_line(load_weights, model, str(tmp_path / "odd.pth"))
    assert "odd.pth does not fit" in message or "odd.pth: holds no weights" in message


def test_the_backbone_of_another_model_of_this_project_fits(tmp_path: Path) -> None:
    trained, model = TSM(5, "timm:test_resnet"), cnn_lstm("test_resnet")
    torch.save(trained.state_dict(), tmp_path / "tsm.pth")
    assert "backbone only" in load_weights(model, str(tmp_path / "tsm.pth")).line
    assert is_loaded(model, trained.backbone.net.state_dict())
