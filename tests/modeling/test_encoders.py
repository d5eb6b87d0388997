"""Public encoders: files made here, with the published names and shapes."""

import argparse
import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from helpers import make_model, only_run, train_flags
from torch import nn
from torchvision.models import resnet18, resnet50

import evaluate
import train
from checkpoint import load_checkpoint, rebuild_model
from config import TrainConfig
from modeling import encoders
from modeling.encoders import ENCODERS, Encoder, licence_warning, list_encoders, recognise
from modeling.layers import IMAGENET_MEAN_STD
from modeling.weights import LoadedWeights, load_weights
from models import build_model, use_normalization
from utils.errors import UserError

timm = pytest.importorskip("timm", reason="requirements-optional.txt is not installed")
Weights = dict[str, torch.Tensor]


def build(name: str, **options: object) -> nn.Module:
    """A model whose weights are not initialised: those of large ones would take seconds."""
    with torch.device("meta"):
        model = make_model(name, 3, **options)
    model = model.to_empty(device="cpu").eval()
    for parameter in model.head.parameters():
        nn.init.zeros_(parameter)
    model.normalize = type(model.normalize)(model.normalize.mean_std)  # its buffers were empty
    return model


def random_weights(shapes: dict[str, torch.Size], seed: int = 0) -> Weights:
    """Values of a size that passes through many layers."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.rand(shape, generator=generator).sub_(0.5).mul_(0.1)
        + (0.5 if "running_var" in name else 0)
        for name, shape in shapes.items()
    }


def shapes_of(net: nn.Module, without: str = "head.") -> dict[str, torch.Size]:
    state = net.state_dict()
    return {k: v.shape for k, v in state.items() if not k.startswith(without) and v.dim()}


def prefixed(weights: Weights, prefix: str) -> Weights:
    return {prefix + name: value for name, value in weights.items()}


DINO_HEAD = {"head.mlp.0.weight": torch.zeros(4, 8), "head.last_layer.weight_g": torch.zeros(4, 1)}
ARGS = argparse.Namespace(lr=0.1, name="pretraining")


def clip(n_frames: int = 2, size: int = 32) -> torch.Tensor:
    shape = (1, n_frames, 3, size, size)
    return torch.randint(
        0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )


def features(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The input of the classifier."""
    model.head = nn.Identity()
    with torch.no_grad():
        return model(x)


def save(content: object, path: Path) -> str:
    torch.save(content, path)
    return str(path)


VIT_B = {"n_frames": 2, "image_size": 32, "model_size": "base"}


@pytest.fixture(scope="module")
def endo_fm() -> Weights:
    with torch.device("meta"):
        net = make_model("timesformer", 3, model_size="base", n_frames=8, image_size=224)
    return random_weights(shapes_of(net))


def endo_fm_file(weights: Weights) -> dict[str, object]:
    teacher = prefixed(weights, "backbone.") | DINO_HEAD
    student = {"module.backbone.cls_token": torch.zeros(1, 1, 768)}
    return {"student": student, "teacher": teacher, "args": ARGS, "epoch": 30, "optimizer": {}}


def test_endo_fm(endo_fm: Weights, tmp_path: Path) -> None:
    model = build("timesformer", **VIT_B | {"n_frames": 8, "image_size": 224})
    loaded = load_weights(model, save(endo_fm_file(endo_fm), tmp_path / "endo_fm.pth"))
    own = model.state_dict()
    assert all(torch.equal(own[name], value) for name, value in endo_fm.items())
    assert len(endo_fm) == 247
    assert loaded.mean_std == ((0.45,) * 3, (0.225,) * 3)
    assert "2 of head (not part of the encoder)" in loaded.line
    assert "not loaded: student, optimizer" in loaded.line
    assert "it looks like Endo-FM" in loaded.line
    assert loaded.provenance["licence"].startswith("Apache-2.0")
    assert not licence_warning(loaded.provenance)
    # And the answer of a network that got the tensors directly, at a size that is quick.
    small, twin = build("timesformer", **VIT_B), build("timesformer", **VIT_B)
    load_weights(small, str(tmp_path / "endo_fm.pth"))
    twin.load_state_dict(twin.state_dict() | twin.adapt_state_dict(endo_fm))
    assert torch.equal(features(small, clip()), features(twin, clip()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("backbone.blocks.3.temporal_fc.bias"), "1 missing: blocks.3.temporal_fc"),
        (
            lambda w: w.update({"backbone.blocks.5.attn.proj.bias": torch.zeros(9)}),
            "1 of another shape or type: blocks.5.attn.proj.bias",
        ),
        (lambda w: w.update({"backbone.adapter": torch.zeros(9)}), "1 unexpected: adapter"),
    ],
)
def test_a_file_that_is_not_complete_is_refused(
    change, message: str, endo_fm: Weights, tmp_path: Path
) -> None:
    content = endo_fm_file(endo_fm)
    change(content["teacher"])
    with pytest.raises(UserError) as told:
        load_weights(build("timesformer", **VIT_B), save(content, tmp_path / "file.pth"))
    assert message in str(told.value)
    assert "it looks like Endo-FM" in str(told.value)
    assert "\n" not in str(told.value)


class Hostile:
    def __reduce__(self) -> tuple:
        return os.system, ("touch hostile",)


@pytest.mark.parametrize("thing", [Hostile(), argparse.Namespace(inner=Hostile())])
def test_a_hostile_file_runs_nothing(
    thing: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = save({"teacher": {"backbone.cls_token": torch.zeros(1)}, "args": thing}, tmp_path / "x")
    model = make_model("timesformer", 3, n_frames=2, image_size=32)
    with pytest.raises(UserError, match="Python objects") as told:
        load_weights(model, path)
    assert "\n" not in str(told.value)
    assert not Path("hostile").exists()
    (tmp_path / "plain.pkl").write_bytes(pickle.dumps({"model": thing}))
    with pytest.raises(UserError):
        load_weights(model, str(tmp_path / "plain.pkl"))
    assert not Path("hostile").exists()


@pytest.fixture(scope="module")
def vit_b() -> tuple[nn.Module, Weights]:
    """timm's ViT-B/16, and its weights."""
    with torch.device("meta"):
        net = timm.create_model("vit_base_patch16_224", num_classes=0, dynamic_img_size=True)
    net = net.to_empty(device="cpu").eval()
    weights = random_weights(shapes_of(net))
    net.load_state_dict(weights)
    return net, weights


MAE_DECODER = {
    "mask_token": torch.zeros(1, 1, 512),
    "decoder_embed.weight": torch.zeros(512, 768),
    "decoder_blocks.0.norm1.weight": torch.zeros(512),
}
ENDOVIT = ((0.3464, 0.2280, 0.2228), (0.2520, 0.2128, 0.2093))


@pytest.mark.parametrize(
    ("wrap", "name", "mean_std", "line"),
    [
        (
            lambda w: {"teacher": prefixed(w, "module.backbone.") | prefixed(DINO_HEAD, "module.")},
            "SurgeNetXL DINOv1 ViT-Base/16 or PL-Stitch ViT-Base/16",
            IMAGENET_MEAN_STD,
            "2 of head (not part of the encoder)",
        ),
        (
            lambda w: {"model": w | MAE_DECODER, "epoch": 14, "args": ARGS},
            "EndoViT (ViT-Base/16)",
            ENDOVIT,
            "1 of mask_token (used in pretraining only), 1 of decoder_embed",
        ),
        (
            lambda w: w | {"head.weight": torch.zeros(1000, 768), "head.bias": torch.zeros(1000)},
            "ImageNet ViT-Base/16",
            None,
            "2 of head (classifier or projection head)",
        ),
    ],
)
def test_image_vits_answer_still_clips_as_before(
    wrap, name: str, mean_std: object, line: str, vit_b: tuple[nn.Module, Weights], tmp_path: Path
) -> None:
    net, weights = vit_b
    model = build("timesformer", **VIT_B)
    loaded = load_weights(model, save(wrap(weights), tmp_path / "vit.pth"))
    assert loaded.provenance["encoder"] == name
    assert loaded.mean_std == mean_std
    assert line in loaded.line
    assert ("--pixel-mean" in loaded.line) == (mean_std is None)
    config = use_normalization(model, loaded.mean_std, TrainConfig(model_name="timesformer"))
    x = clip(1)
    with torch.no_grad():
        wanted = net(model.normalize(x)[:, 0])
    assert (features(model, x.expand(-1, 2, -1, -1, -1)) - wanted).abs().max() == 0
    assert (config.pixel_mean, config.pixel_std) == (mean_std if mean_std == ENDOVIT else ((), ()))


def test_surgrec_mae(tmp_path: Path) -> None:
    model = build("vivit", **VIT_B | {"attention": "joint", "tubelet_frames": 2})
    own = model.state_dict()
    weights = {"patch_embed.proj.weight": torch.randn(768, 3, 2, 16, 16)}
    weights |= {"patch_embed.proj.bias": torch.randn(768), "norm.weight": torch.randn(768)}
    weights |= {"norm.bias": torch.randn(768)}
    for n in range(12):
        for theirs, ours in {
            "norm1.weight": "attention_norm.weight",
            "norm1.bias": "attention_norm.bias",
            "norm2.weight": "mlp_norm.weight",
            "norm2.bias": "mlp_norm.bias",
            "attn.qkv.weight": "qkv.weight",
            "attn.proj.weight": "out.weight",
            "attn.proj.bias": "out.bias",
            "mlp.fc1.weight": "mlp.0.weight",
            "mlp.fc1.bias": "mlp.0.bias",
            "mlp.fc2.weight": "mlp.3.weight",
            "mlp.fc2.bias": "mlp.3.bias",
        }.items():
            weights[f"blocks.{n}.{theirs}"] = torch.rand(own[f"spatial.{n}.{ours}"].shape)
        weights |= {f"blocks.{n}.attn.{q}_bias": torch.rand(768) for q in "qv"}
    decoder = {"decoder.norm.weight": torch.zeros(384), "encoder_to_decoder.weight": torch.zeros(2)}
    content = {"model": prefixed(weights, "encoder.") | decoder}
    loaded = load_weights(model, save(content, tmp_path / "surgrec_mae.pth"))
    own = model.state_dict()
    bias = own["spatial.7.qkv.bias"].chunk(3)
    assert torch.equal(bias[0], weights["blocks.7.attn.q_bias"])
    assert not bias[1].any()
    assert torch.equal(bias[2], weights["blocks.7.attn.v_bias"])
    assert torch.equal(own["spatial.7.mlp.3.weight"], weights["blocks.7.mlp.fc2.weight"])
    assert "1 of decoder (not part of the encoder)" in loaded.line
    (warning,) = licence_warning(loaded.provenance)
    assert "SurgRec-MAE" in warning["text"]
    assert "not for commercial use" in warning["text"]


@pytest.mark.parametrize(
    ("wrap", "name"),
    [
        (
            lambda w: (
                prefixed(w, "backbone_img.model.")
                | {"backbone_img.global_embedder.weight": torch.zeros(768, 2048)}
                | {"backbone_text.model.embeddings.weight": torch.zeros(5, 768)}
            ),
            "PeskaVLP, HecVL or SurgVLP (ResNet-50)",
        ),
        (
            lambda w: {
                "classy_state_dict": {
                    "base_model": {
                        "model": {
                            "trunk": prefixed(w, "_feature_blocks."),
                            "heads": {"0.clf.0.weight": torch.zeros(2)},
                        }
                    }
                }
            },
            "SelfSupSurg (ResNet-50)",
        ),
    ],
)
def test_resnets(wrap, name: str, tmp_path: Path) -> None:
    net = resnet50(weights=None).eval()
    net.fc = nn.Identity()
    net.load_state_dict(random_weights(shapes_of(net)), strict=False)
    weights = {k: v for k, v in net.state_dict().items() if v.dim()}  # without BatchNorm's counters
    model = make_model("cnnlstm", 3, backbone="resnet50", lstm_layers=0).eval()
    loaded = load_weights(model, save(wrap(weights), tmp_path / "resnet.pth"))
    assert loaded.provenance["encoder"] == name
    assert loaded.provenance["licence"] == "CC-BY-NC-SA-4.0"
    x = clip(2, 64)
    with torch.no_grad():
        wanted = net(model.normalize(x)[0])
        assert torch.equal(model.frame_features(x)[0], wanted)


def test_a_model_that_does_not_take_an_encoder_says_what_does(tmp_path: Path) -> None:
    weights = {"_feature_blocks." + k: v for k, v in resnet50(weights=None).state_dict().items()}
    path = save(weights, tmp_path / "selfsupsurg.torch")
    with pytest.raises(UserError, match=r"it looks like SelfSupSurg .*: give --backbone resnet50"):
        load_weights(make_model("cnnlstm", 3), path)
    with pytest.raises(UserError, match="give --backbone resnet50"):
        load_weights(make_model("r2plus1d", 3), path)


def test_the_official_timesformer_is_told_from_endo_fm() -> None:
    (endo_fm,) = (encoder for encoder in ENCODERS if encoder.name.startswith("Endo-FM"))
    weights = {name: torch.zeros(shape) for name, shape in endo_fm.shapes.items()}
    assert recognise(weights).name.startswith("Endo-FM")
    official = recognise(weights | {"head.weight": torch.zeros(400, 768)})
    assert official.name.startswith("TimeSformer, Kinetics-400")
    assert official.licence == "CC-BY-NC-4.0"
    assert recognise({"conv1.weight": torch.zeros(64, 3, 7, 7)}) is None


@pytest.mark.parametrize("encoder", ENCODERS, ids=lambda encoder: encoder.name)
def test_the_settings_of_the_list_build_the_network(encoder: Encoder) -> None:
    """And it has as many parameters as the list says, up to its head."""
    assert f"{encoder.name}: {encoder.parameters:g} million" in list_encoders()
    first = encoder.flags.split(", or ")[0].split()
    settings = {
        flag.removeprefix("--").replace("-", "_"): int(value) if value.isdecimal() else value
        for flag, value in zip(first[::2], first[1::2], strict=True)
    }
    settings = {
        "model_name": "cnnlstm",
        "lstm_layers": 0,
        "n_frames": 8,
        "image_size": 224,
    } | settings
    if settings.get("patch_size") == 14 or "patch14" in encoder.flags:
        settings["image_size"] = 336
    with torch.device("meta"):
        model = build_model(TrainConfig(**settings), 2)
    count = sum(p.numel() for p in model.parameters()) / 1e6
    if settings["model_name"] == "cnnlstm":
        assert count == pytest.approx(encoder.parameters, abs=0.2)
    else:  # with the temporal branch, which image networks lack
        assert count >= encoder.parameters - 0.2


def test_a_licence_travels_with_the_weights(tmp_path: Path) -> None:
    provenance = {"file": "x.pth", "encoder": "SelfSupSurg", "licence": "CC-BY-NC-SA-4.0"}
    assert licence_warning(provenance)[0]["text"].startswith("trained from SelfSupSurg (CC-BY-NC")
    assert licence_warning({"licence": "Apache-2.0"}) == licence_warning({}) == []
    model = make_model("tsm_resnet", 3)
    mean_std = ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    state = {
        "format_version": 1,
        "model": model.state_dict(),
        "pretrained": provenance,
        "config": {"pixel_mean": mean_std[0], "pixel_std": mean_std[1]},
    }
    loaded = load_weights(model, save(state, tmp_path / "best.pt"))
    assert (loaded.provenance, loaded.mean_std) == (provenance, mean_std)
    for odd in ({"pixel_mean": (0.1,), "pixel_std": (0.0, 1.0)}, {"pixel_mean": "x"}):
        path = save({**state, "config": odd}, tmp_path / "odd.pt")
        assert load_weights(model, path).mean_std is None
    plain = load_weights(model, save({**state, "config": {}, "pretrained": 3}, tmp_path / "b.pt"))
    assert plain == LoadedWeights(plain.line, whole=True)


def test_training_from_an_encoder_tells_its_licence_and_keeps_it(
    tiny_data: Path, tmp_path: Path, run_main, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the log, the checkpoints and the results, also of what is evaluated or trained later."""
    small = {"_feature_blocks.layer4.1.conv2.weight": (512, 512, 3, 3)}
    encoder = Encoder("a ResNet-18", "", "", 11, "CC-BY-NC-SA-4.0", small)
    monkeypatch.setattr(encoders, "ENCODERS", (encoder,))
    net, path = resnet18(weights=None), tmp_path / "small.torch"
    weights = {k: v for k, v in net.state_dict().items() if not k.startswith("fc.")}
    save(prefixed(weights, "_feature_blocks."), path)
    flags = train_flags(tiny_data, "--model-name", "cnnlstm", "--epochs", 1)
    flags += ["--weights", path, "--lstm-layers", 0, "--image-size", 32]
    flags += ["--pixel-mean", 0.4, 0.4, 0.4, "--pixel-std", 0.2, 0.2, 0.2]
    done = run_main(train.main, *flags, cwd=tmp_path)
    run = only_run(tmp_path)
    text = "trained from a ResNet-18 (CC-BY-NC-SA-4.0): not for commercial use"
    assert text in done.stdout
    for name in ("best.pt", "last.pt"):
        state = load_checkpoint(run, name)
        assert state["pretrained"]["licence"] == "CC-BY-NC-SA-4.0"
        assert rebuild_model(state).normalize.mean_std == ((0.4,) * 3, (0.2,) * 3)
    resumed = run_main(train.main, "--resume", run, cwd=tmp_path)
    assert text in resumed.stdout
    assert load_checkpoint(run, "last.pt")["pretrained"] == state["pretrained"]
    run_main(evaluate.main, run, "--num-workers", 0, "--device", "cpu", cwd=tmp_path)
    for folder in (run, run / "evaluate_test"):
        results = json.loads((folder / "test_metrics.json").read_text())
        assert text in [warning["text"] for warning in results["warnings"]]
    assert load_weights(rebuild_model(state), str(run)).provenance == state["pretrained"]


def test_the_normalisation_of_the_weights_is_kept_in_the_settings() -> None:
    mean_std = ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    config = TrainConfig(n_frames=2, image_size=32)
    model = build_model(config)
    assert use_normalization(model, IMAGENET_MEAN_STD, config) == config
    assert use_normalization(model, None, config) == config
    changed = use_normalization(model, mean_std, config)
    assert (changed.pixel_mean, changed.pixel_std) == mean_std
    x = clip(1)
    wanted = (x.float() / 255 - torch.tensor(mean_std[0]).view(3, 1, 1)) / torch.tensor(
        mean_std[1]
    ).view(3, 1, 1)
    for normalised in (model.normalize(x), build_model(changed).normalize(x)):
        torch.testing.assert_close(normalised, wanted, atol=1e-6, rtol=1e-5)
    # What the user has set stays.
    assert use_normalization(model, IMAGENET_MEAN_STD, changed) == changed


@pytest.mark.parametrize(
    "values",
    [
        {"pixel_mean": (0.5, 0.5, 0.5)},
        {"pixel_mean": (0.5,), "pixel_std": (0.5,)},
        {"pixel_mean": (0.5, 0.5, 0.5), "pixel_std": (0.5, 0.0, 0.5)},
    ],
)
def test_a_normalisation_that_cannot_be_is_refused(values: dict) -> None:
    with pytest.raises(UserError, match="pixel_mean and pixel_std: give three numbers each"):
        build_model(TrainConfig(**values))


def frame_network(name: str, **options: object) -> nn.Module:
    """A network of timm with random weights, none of them 0 or 1."""
    with torch.device("meta"):
        net = timm.create_model(name, num_classes=0, **options)
    net = net.to_empty(device="cpu").eval()
    net.load_state_dict(random_weights({k: v.shape for k, v in net.state_dict().items()}))
    return net


def same_features(
    backbone: str, net: nn.Module, content: object, path: Path, size: int = 64
) -> LoadedWeights:
    """Check that a model with this file gives the features of the source network, exactly."""
    model = make_model("cnnlstm", 3, backbone=backbone, lstm_layers=0).eval()
    loaded = load_weights(model, save(content, path))
    x = clip(1, size)
    with torch.no_grad():
        wanted = net(model.normalize(x)[0])
        assert wanted.abs().max() > 1e-3
        assert torch.equal(model.frame_features(x)[0][:, : wanted.shape[1]], wanted)
    return loaded


def sail_names(weights: Weights) -> Weights:
    """timm's names of a CAFormer as its authors have them, whose first two stages are linear."""
    renamed = {}
    for name, value in weights.items():
        for ours, theirs in (
            ("stem.conv", "downsample_layers.0.conv"),
            ("stem.norm", "downsample_layers.0.post_norm"),
            *((f"stages.{n}.downsample.conv", f"downsample_layers.{n}.conv") for n in range(4)),
            *((f"stages.{n}.downsample.norm", f"downsample_layers.{n}.pre_norm") for n in range(4)),
            ("head.norm", "norm"),
            (".blocks", ""),
        ):
            name = name.replace(ours, theirs)
        is_linear = value.dim() == 4 and value.shape[2:] == (1, 1)
        renamed[name] = value[:, :, 0, 0] if is_linear else value
    return renamed


def test_surgenet_caformer_has_relu(tmp_path: Path) -> None:
    from timm.models.metaformer import StarReLU

    net = timm.create_model("caformer_s18", num_classes=0).eval()
    for name, module in list(net.named_modules()):
        if isinstance(module, StarReLU):
            net.set_submodule(name, nn.ReLU())
    net.load_state_dict(random_weights({k: v.shape for k, v in net.state_dict().items()}))
    weights = sail_names(net.state_dict())
    assert len(weights) == 152
    content = weights | {"head.mlp.0.weight": torch.zeros(2, 2)}
    loaded = same_features("caformer_s18_relu", net, content, tmp_path / "SurgeNetXL.pth")
    assert loaded.provenance["encoder"] == "SurgeNet or SurgeNetXL CAFormer-S18"
    assert "1 of head (classifier or projection head)" in loaded.line
    assert licence_warning(loaded.provenance)
    with pytest.raises(UserError, match="give --backbone caformer_s18_relu"):
        model = make_model("cnnlstm", 3, backbone="timm:caformer_s18", lstm_layers=0)
        load_weights(model, str(tmp_path / "SurgeNetXL.pth"))


def test_surgenet_convnextv2(tmp_path: Path) -> None:
    net = frame_network("convnextv2_tiny")
    weights = {}
    for name, value in net.state_dict().items():
        for ours, theirs in (
            ("stem.", "downsample_layers.0."),
            *((f"stages.{n}.downsample.", f"downsample_layers.{n}.") for n in range(4)),
            ("head.norm.", "norm."),
            (".blocks", ""),
            ("conv_dw", "dwconv"),
            ("mlp.fc1", "pwconv1"),
            ("mlp.fc2", "pwconv2"),
            ("mlp.grn.weight", "grn.gamma"),
            ("mlp.grn.bias", "grn.beta"),
        ):
            name = name.replace(ours, theirs)
        weights[name] = value.view(1, 1, 1, -1) if "grn" in name else value
    path = tmp_path / "SurgeNet_ConvNextv2.pth"
    loaded = same_features("timm:convnextv2_tiny", net, {"model": weights}, path)
    assert loaded.provenance["encoder"] == "SurgeNet ConvNeXtV2-Tiny"


def test_surgenet_pvtv2(tmp_path: Path) -> None:
    net = frame_network("pvt_v2_b2")
    weights = {}
    for name, value in net.state_dict().items():
        first, *rest = name.split(".")
        if first == "patch_embed":
            name = f"patch_embed1.{'.'.join(rest)}"
        elif rest[1] == "downsample":
            name = f"patch_embed{int(rest[0]) + 1}.{'.'.join(rest[2:])}"
        elif rest[1] == "blocks":
            name = f"block{int(rest[0]) + 1}.{'.'.join(rest[2:])}"
        else:
            name = f"norm{int(rest[0]) + 1}.{rest[2]}"
        weights[name.replace("mlp.dwconv", "mlp.dwconv.dwconv")] = value
    loaded = same_features("timm:pvt_v2_b2", net, weights, tmp_path / "SurgeNet_PVTv2.pth")
    assert loaded.provenance["encoder"] == "SurgeNet PVTv2-B2"


def test_surgenet_dinov2_of_336_px(tmp_path: Path) -> None:
    net = frame_network("vit_small_patch14_dinov2", img_size=336, dynamic_img_size=True)
    content = net.state_dict() | {"mask_token": torch.zeros(1, 384)}
    path = tmp_path / "DINOv2_ViTs14_size336.pth"
    loaded = same_features("dinov2_small_336", net, content, path, size=56)
    model = make_model("cnnlstm", 3, backbone="timm:vit_small_patch14_dinov2", lstm_layers=0)
    load_weights(model.eval(), str(path))  # timm's own network takes it, with coarser positions
    assert loaded.provenance["encoder"] == "SurgeNetXL DINOv2 ViT-Small/14"
    assert "1 of mask_token (used in pretraining only)" in loaded.line
    x = clip(1, 28)
    with torch.no_grad():  # they are interpolated twice: from 24 to 37 a side, then to 2
        wanted = net(model.normalize(x)[0])
        found = model.frame_features(x)[0][:, :384]
    assert torch.nn.functional.cosine_similarity(found, wanted).item() > 0.99


def test_surgenet_dinov3(tmp_path: Path) -> None:
    """timm's own attention, with the bias of keys in the buffer where it looks for one."""
    options = {"num_reg_tokens": 0, "global_pool": "token", "dynamic_img_size": True}
    net = timm.create_model("vit_small_patch16_dinov3_qkvb", num_classes=0, **options).eval()
    for module in net.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 1e-6
    own = random_weights({k: v.shape for k, v in net.state_dict().items()})
    net.load_state_dict(own)
    weights = {k: v for k, v in own.items() if not k.endswith(("q_bias", "v_bias"))}
    for n, block in enumerate(net.blocks):
        block.attn.k_bias.uniform_(-0.5, 0.5)
        biases = [getattr(block.attn, f"{part}_bias").detach() for part in "qkv"]
        weights[f"blocks.{n}.attn.qkv.bias"] = torch.cat(biases)
    extra = {"mask_token": torch.zeros(1, 384), "rope_embed.periods": torch.zeros(16)}
    path = tmp_path / "DINOv3_ViTs16.pth"
    loaded = same_features("dinov3_small_qkv_bias", net, weights | extra, path)
    assert loaded.provenance["encoder"] == "SurgeNetXL DINOv3 ViT-Small/16"
    assert "1 of rope_embed (computed by the model)" in loaded.line


def test_lemonfm(tmp_path: Path) -> None:
    """In half precision, in which 200 million parameters are quicker to write and to read."""
    from torchvision.models import convnext_large

    with torch.device("meta"):
        net = convnext_large()
    net.classifier[2] = nn.Identity()
    net = net.to_empty(device="cpu").eval()
    weights = {k: v.half() for k, v in random_weights(shapes_of(net)).items()}
    net.load_state_dict(weights)
    model = build("cnnlstm", backbone="convnext_large", lstm_layers=0)
    content = {"teacher": prefixed(weights, "backbone.") | DINO_HEAD, "student": {}, "args": ARGS}
    loaded = load_weights(model, save(content, tmp_path / "lemonfm.pth"))
    assert loaded.provenance["encoder"] == "LemonFM (ConvNeXt-Large)"
    x = clip(1, 32)
    with torch.no_grad():
        assert torch.equal(model.frame_features(x)[0], net(model.normalize(x)[0]))
