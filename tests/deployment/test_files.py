"""Exported files: written whole, and refused if they are damaged or of another program."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from config import TrainConfig
from deployment.files import (
    is_exported,
    read_exported,
    read_metadata,
    replacing,
    write_onnx,
    write_openvino,
)
from deployment.metadata import pack
from modeling.engines import openvino_core
from utils.errors import UserError
from utils.files import remove_unfinished

onnx = pytest.importorskip("onnx")
openvino = pytest.importorskip("openvino")
pytest.importorskip("onnxruntime")


WEIGHTS = {"tiny": np.float32([[0.5, -1], [0.1, 0.2], [0, 2]]), "other": np.ones((3, 2), "f")}


def network(name: str) -> bytes:
    """An ONNX file with the input and the outputs of an exported network: the features are the
    mean of each channel, the logits their products with `WEIGHTS[name]`."""
    make, kinds = onnx.helper, onnx.TensorProto
    axes = np.array([1, 3, 4])
    graph = make.make_graph(
        [
            make.make_node("Cast", ["clips"], ["float"], to=kinds.FLOAT),
            make.make_node("ReduceMean", ["float", "axes"], ["features"], keepdims=0),
            make.make_node("MatMul", ["features", "weights"], ["logits"]),
        ],
        "network",
        [make.make_tensor_value_info("clips", kinds.UINT8, ["batch", 2, 3, 32, 32])],
        [
            make.make_tensor_value_info("logits", kinds.FLOAT, ["batch", 2]),
            make.make_tensor_value_info("features", kinds.FLOAT, ["batch", 3]),
        ],
        [
            onnx.numpy_helper.from_array(WEIGHTS[name], "weights"),
            onnx.numpy_helper.from_array(axes, "axes"),
        ],
    )
    opsets = [make.make_opsetid("", 18)]
    return make.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()


CONFIG = TrainConfig(classes=("a", "b"), model_name="vivit", n_frames=2, image_size=32)
STATE = {"config": vars(CONFIG), "classes": ["a", "b"]}
METADATA = pack(STATE, dynamic_batch=True)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tiny.onnx, tiny.xml and tiny.bin, and another .xml and .bin; read-only."""
    folder = tmp_path_factory.mktemp("exported")
    write_onnx(folder / "tiny.onnx", network("tiny"), METADATA)
    for name in WEIGHTS:
        model = openvino_core().read_model(network(name))
        write_openvino(folder / f"{name}.xml", model, METADATA)
    return folder


@pytest.mark.parametrize(
    ("name", "engine"),
    [
        ("tiny.onnx", "onnxruntime"),
        ("tiny.onnx", "openvino"),
        ("tiny.xml", "openvino"),
        ("tiny.onnx", ""),
        ("tiny.xml", ""),
    ],
)
def test_a_file_is_read_into_an_engine(files: Path, name: str, engine: str) -> None:
    state, read = read_exported(files / name, engine)
    assert is_exported(files / name) and read_metadata(files / name) == METADATA
    assert state["classes"] == ["a", "b"]
    assert read.name == (engine or {"tiny.onnx": "onnxruntime", "tiny.xml": "openvino"}[name])
    clips = torch.randint(256, (5, 2, 3, 32, 32), dtype=torch.uint8)
    features = clips.float().mean(dim=(1, 3, 4))
    logits = features @ torch.from_numpy(WEIGHTS["tiny"])
    torch.testing.assert_close(read(clips), logits)
    torch.testing.assert_close(read.features, features)
    read.dynamic_batch = False
    torch.testing.assert_close(read(clips), logits)
    torch.testing.assert_close(read.features, features)


def test_nothing_of_this_machine_is_in_the_files(files: Path) -> None:
    for path in files.iterdir():
        content = path.read_bytes()
        assert str(Path(__file__).parent.parent).encode() not in content
        assert b".py" not in content


def refused(path: Path, engine: str = "") -> str:
    with pytest.raises(UserError) as caught:
        read_exported(path, engine)
    message = str(caught.value)
    assert "\n" not in message and str(path.parent) in message
    return message


def test_the_engine_must_suit_the_file(files: Path) -> None:
    assert "--format onnx" in refused(files / "tiny.xml", "onnxruntime")
    assert "not computed by torch" in refused(files / "tiny.onnx", "torch")
    assert "no such file" in refused(files / "missing.onnx")
    assert "no such file" in refused(files / "missing.xml")


def change(source: Path, target: Path, edit: Callable, sign: bool = False) -> Path:
    """An ONNX file after an edit; signed, as a hostile program would do it."""
    proto = onnx.load_from_string(source.read_bytes())
    metadata = {entry.key: entry.value for entry in proto.metadata_props}
    edit(proto, metadata)
    if sign:
        write_onnx(target, proto.SerializeToString(), metadata)
    else:
        onnx.helper.set_model_props(proto, metadata)
        target.write_bytes(proto.SerializeToString())
    return target


def outside(tensor: "onnx.TensorProto") -> None:
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    entry = tensor.external_data.add()
    entry.key, entry.value = "location", "../../../../etc/hostname"


def outside_constant(graph: "onnx.GraphProto") -> None:
    node = graph.node.add(op_type="Constant", output=["unused"])
    attribute = node.attribute.add(name="value", type=onnx.AttributeProto.TENSOR)
    attribute.t.data_type, attribute.t.dims[:] = 1, [2]
    outside(attribute.t)


def outside_branch(graph: "onnx.GraphProto") -> None:
    node = graph.node.add(op_type="If", output=["unused"])
    attribute = node.attribute.add(name="then_branch", type=onnx.AttributeProto.GRAPH)
    outside_constant(attribute.g)


def clips_type(proto: "onnx.ModelProto") -> "onnx.TypeProto.Tensor":
    return proto.graph.input[0].type.tensor_type


def set_weights(proto: "onnx.ModelProto", value: float) -> None:
    tensor = next(t for t in proto.graph.initializer if t.name == "weights")
    tensor.raw_data = np.full(len(tensor.raw_data) // 4, value, np.float32).tobytes()


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_damaged_and_hostile_onnx_files_are_refused(
    files: Path, tmp_path: Path, engine: str
) -> None:
    good, bad = files / "tiny.onnx", tmp_path / "bad.onnx"
    content = good.read_bytes()
    for damaged in (b"", content[:100], content[:-9], b"hello" * 100):
        bad.write_bytes(damaged)
        assert "ONNX file" in refused(bad, engine)
    bad.unlink()
    bad.mkdir()
    assert "no such file" in refused(bad, engine)
    assert not is_exported(bad)
    bad.rmdir()

    def check(message: str, edit: Callable, sign: bool = True) -> None:
        assert message in refused(change(good, bad, edit, sign), engine)

    check("export.py has not written", lambda p, m: m.clear(), sign=False)
    check("was changed", lambda p, m: m.pop("sha256"), sign=False)
    check("was changed", lambda p, m: set_weights(p, 3.0), sign=False)
    check("not finite", lambda p, m: set_weights(p, np.nan))
    check("in other files", lambda p, m: outside(p.graph.initializer[0]))
    check("in other files", lambda p, m: outside_constant(p.graph))
    check("in other files", lambda p, m: outside_branch(p.graph))
    check("the network takes", lambda p, m: setattr(clips_type(p).shape.dim[1], "dim_value", 3))
    check("the network takes", lambda p, m: setattr(clips_type(p), "elem_type", 1))
    check("the network gives", lambda p, m: p.graph.output.pop())
    # Three classes in the metadata, two in the network.
    three = pack(
        {"config": {**STATE["config"], "classes": ("a", "b", "c")}, "classes": ["a", "b", "c"]},
        dynamic_batch=True,
    )
    check("logits is float32 (2, 2), not float32 (2, 3)", lambda p, m: m.update(three))
    check("cannot", lambda p, m: setattr(p.graph.node[0], "op_type", "Unknown"))


def test_damaged_openvino_files_are_refused(files: Path, tmp_path: Path) -> None:
    path, weights = tmp_path / "bad.xml", tmp_path / "bad.bin"
    text, numbers = ((files / name).read_bytes() for name in ("tiny.xml", "tiny.bin"))
    path.write_bytes(text)
    assert "bad.bin must lie beside it" in refused(path)
    for damaged in (b"", numbers[:4], b"\0" + numbers[1:], numbers + b"\0"):
        weights.write_bytes(damaged)
        refused(path)
    weights.write_bytes(numbers)
    assert read_exported(path)
    begin, end = text.index(b"<surgical_clips>"), text.index(b"</surgical_clips>")
    for damaged in (b"", text[:300], b"<net>", text.replace(b'type="MatMul"', b'type="Other"')):
        path.write_bytes(damaged)
        assert "OpenVINO cannot read it" in refused(path)
    path.write_bytes(text[:begin] + text[end + len(b"</surgical_clips>") :])
    assert "export.py has not written" in refused(path)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
@pytest.mark.parametrize("renames", [0, 1, 2])
def test_a_kill_leaves_a_pair_that_is_whole_or_refused(
    files: Path, tmp_path: Path, renames: int
) -> None:
    """The program ends without any clearing up before the first, second or third rename."""
    target = tmp_path / "target.xml"
    old, new = files / "tiny.xml", files / "other.xml"
    copy_pair(old, target)

    def replace(source: str, to: str, real: Callable = os.replace) -> None:
        nonlocal renames
        if not renames:
            os._exit(7)
        renames -= 1
        real(source, to)

    child = os.fork()
    if not child:
        os.replace = replace
        with replacing(target) as unfinished:
            copy_pair(new, unfinished)
        os._exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    if renames == 1:
        assert "target.bin beside it is damaged or of another export" in refused(target)
    else:
        read_exported(target)
        assert target.read_bytes() == (new if renames else old).read_bytes()
    remove_unfinished(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"target.xml", "target.bin"}


def copy_pair(source: Path, target: Path) -> None:
    for suffix in (".xml", ".bin"):
        shutil.copy(source.with_suffix(suffix), target.with_suffix(suffix))


@pytest.mark.parametrize("name", ["tiny.onnx", "tiny.xml"])
def test_a_failure_leaves_the_old_files(files: Path, tmp_path: Path, name: str) -> None:
    for path in files.iterdir():
        shutil.copy(path, tmp_path)
    with pytest.raises(RuntimeError), replacing(tmp_path / name) as unfinished:
        unfinished.write_bytes(b"half")
        raise RuntimeError
    assert {p.name: p.read_bytes() for p in files.iterdir()} == {
        p.name: p.read_bytes() for p in tmp_path.iterdir()
    }
