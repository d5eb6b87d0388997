"""Exported files: ONNX (.onnx), and OpenVINO (.xml, with the weights beside it in .bin)."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from config import from_dict
from deployment.metadata import unpack
from modeling.engines import (
    CLIPS,
    FEATURES,
    LOGITS,
    Engine,
    OnnxRuntimeEngine,
    OpenVINOEngine,
    openvino_core,
)
from utils.errors import UserError, first_line, require_package
from utils.files import atomic
from video.motion import Modality

if TYPE_CHECKING:
    import onnx
    import openvino

FRAME = "frame"
"""the input of the network of one frame, beside its memory; see deployment/step.py"""

SUFFIXES = {"onnx": ".onnx", "openvino": ".xml"}
_SECTION = "surgical_clips"  # of OpenVINO's rt_info, in which other programs have sections as well
_DIGEST = "sha256"  # of the network: what was changed since it was compared is refused
_MAX_PROTOBUF = 2**31 - 1


def is_exported(path: str | Path) -> bool:
    """Whether a path is that of an exported file, by its name, and not of a run folder."""
    path = Path(path)
    return path.suffix.lower() in SUFFIXES.values() and not path.is_dir()


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; what was written there replaces `path` at the end.

    An .xml has its weights in a .bin of the same name. They are replaced first, and the .xml holds
    their SHA-256: if the program is killed between the two, `read_exported` refuses the pair.
    """
    with ExitStack() as stack:
        unfinished = stack.enter_context(atomic(path))
        if path.suffix == ".xml":
            stack.enter_context(atomic(path.with_suffix(".bin")))
        yield unfinished


def write_onnx(path: Path, model: bytes, metadata: Mapping[str, str]) -> None:
    """Write an ONNX file with metadata, and without what the exporter notes about this machine.

    Raises:
        UserError: it would be larger than 2 GB.
    """
    import onnx

    proto = onnx.load_from_string(model)
    for graph in _graphs(proto.graph):
        for part in (graph, *graph.node, *graph.value_info, *graph.initializer):
            part.ClearField("doc_string")
            part.ClearField("metadata_props")  # paths of the source, line by line
    proto.ClearField("metadata_props")
    try:
        digest = hashlib.sha256(proto.SerializeToString(deterministic=True)).hexdigest()
        onnx.helper.set_model_props(proto, {**metadata, _DIGEST: digest})
        path.write_bytes(proto.SerializeToString())
    except ValueError:
        raise UserError("an ONNX file holds at most 2 GB: use --format openvino") from None


def write_openvino(path: Path, model: "openvino.Model", metadata: Mapping[str, str]) -> None:
    """Write `path`, an .xml, and the .bin beside it, with metadata."""
    import openvino

    weights = path.with_suffix(".bin")
    openvino.serialize(model, path, weights)
    written = {**metadata, _DIGEST: _sha256(weights)}
    for name, text in written.items():
        model.set_rt_info(text, [_SECTION, name])
    openvino.serialize(model, path, weights)
    if _sha256(weights) != written[_DIGEST]:
        raise RuntimeError("OpenVINO wrote other weights the second time")


def read_exported(
    path: str | Path, engine_name: str = "", threads: int | None = None
) -> tuple[dict[str, Any], Engine]:
    """Read an exported file.

    Args:
        engine_name: `openvino` or `onnxruntime` (empty: the one that the file was written for). An
            .onnx file runs in both.
        threads: number of threads (None: all cores).

    Returns:
        The checkpoint without its weights, see `deployment.metadata.unpack`; and the network, which
        has computed one clip of zeros. For a network of one frame use `Engine.compute`.

    Raises:
        UserError: export.py has not written this file, it is damaged, a package is missing, or this
            engine cannot compute it.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file (give a run folder, a .pt, .onnx or .xml file)")
    if engine_name not in ("", "openvino", "onnxruntime"):
        raise UserError(f"{path}: is not computed by {engine_name}: use openvino or onnxruntime")
    engine: Engine
    if path.suffix.lower() == ".xml":
        if engine_name == "onnxruntime":
            raise UserError(f"{path}: is computed by openvino: export with --format onnx")
        model, metadata = _read_openvino(path)
        state = unpack(metadata, str(path))
        _check_ports(_ports_of_openvino(model), state, path)
        source: Any = model
    else:
        source, proto, metadata = _read_onnx(path)
        state = unpack(metadata, str(path))
        _check_ports(_ports_of_onnx(proto), state, path)
        if engine_name == "openvino":
            source = _parse_openvino(path, source)
    kind = OnnxRuntimeEngine if isinstance(source, bytes) else OpenVINOEngine
    try:
        engine = kind(source, threads)
        exported = state["exported"]
        engine.dynamic_batch = exported["dynamic_batch"]
        engine.memory = {part["name"]: tuple(part["shape"]) for part in exported["memory"]}
        _try(engine, state)
    except UserError:
        raise
    except Exception as error:  # a runtime has errors of its own, for whatever is in the file
        raise _damaged(path, f"{kind.name} cannot compute it ({first_line(error)[:200]})") from None
    return state, engine


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata of an exported file, which need not be complete.

    Raises:
        UserError: it cannot be read.
    """
    return _read_openvino(path)[1] if path.suffix.lower() == ".xml" else _read_onnx(path)[2]


def _read_onnx(path: Path) -> tuple[bytes, "onnx.ModelProto", dict[str, str]]:
    require_package("onnx", path.name)
    import onnx

    if path.stat().st_size > _MAX_PROTOBUF:
        raise _damaged(path, "it is larger than 2 GB, which no ONNX file is")
    content = path.read_bytes()
    try:
        proto = onnx.load_from_string(content)
    except Exception as error:  # protobuf's own, of several kinds
        raise _damaged(path, f"not an ONNX file ({first_line(error)})") from None
    if not proto.graph.node:
        raise _damaged(path, "not an ONNX file (no network in it)")
    for tensor in _tensors(proto):
        if tensor.data_location == onnx.TensorProto.EXTERNAL or tensor.external_data:
            raise UserError(
                f"{path}: its weights lie in other files, which export.py never does, and which "
                "could be any files of this machine: export the run again"
            )
    metadata = {entry.key: entry.value for entry in proto.metadata_props}
    expected = metadata.pop(_DIGEST, "")
    if "checkpoint" in metadata:
        proto.ClearField("metadata_props")
        digest = hashlib.sha256(proto.SerializeToString(deterministic=True)).hexdigest()
        if digest != expected:
            raise UserError(
                f"{path}: its network is damaged or was changed since it was exported: export the "
                "run again"
            )
    return content, proto, metadata


def _graphs(graph: "onnx.GraphProto") -> Iterator["onnx.GraphProto"]:
    """A graph and all graphs inside its nodes."""
    waiting = [graph]
    while waiting:
        current = waiting.pop()
        yield current
        waiting += _inner_graphs(current.node)


def _inner_graphs(nodes: Iterable["onnx.NodeProto"]) -> list["onnx.GraphProto"]:
    attributes = [attribute for node in nodes for attribute in node.attribute]
    single = [attribute.g for attribute in attributes if attribute.HasField("g")]
    return single + [graph for attribute in attributes for graph in attribute.graphs]


def _tensors(proto: "onnx.ModelProto") -> Iterator["onnx.TensorProto"]:
    """All tensors of a model: weights, and constants inside of nodes, graphs and functions."""
    roots = [proto.graph, *_inner_graphs(node for f in proto.functions for node in f.node)]
    graphs = [graph for root in roots for graph in _graphs(root)]
    for graph in graphs:
        yield from graph.initializer
        for sparse in graph.sparse_initializer:
            yield from (sparse.values, sparse.indices)
    for node in (node for part in (*graphs, *proto.functions) for node in part.node):
        for attribute in node.attribute:
            yield from (attribute.t, *attribute.tensors)
            for sparse in (attribute.sparse_tensor, *attribute.sparse_tensors):
                yield from (sparse.values, sparse.indices)


def _read_openvino(path: Path) -> tuple["openvino.Model", dict[str, str]]:
    require_package("openvino", path.name)
    weights = path.with_suffix(".bin")
    if not weights.is_file():
        raise UserError(f"{path}: its weights are missing: {weights.name} must lie beside it")
    content = path.read_bytes(), weights.read_bytes()
    model = _parse_openvino(path, *content)
    section = model.get_rt_info([_SECTION]) if model.has_rt_info([_SECTION]) else None
    values = section.value if section is not None else None
    metadata = {}
    for name, value in values.items() if isinstance(values, dict) else ():
        value = getattr(value, "value", value)
        metadata[name] = value if isinstance(value, str) else str(value)
    expected = metadata.pop(_DIGEST, "")
    if "checkpoint" in metadata and hashlib.sha256(content[1]).hexdigest() != expected:
        raise UserError(
            f"{path}: {weights.name} beside it is damaged or of another export: export the run "
            "again"
        )
    return model, metadata


def _parse_openvino(path: Path, model: bytes, weights: bytes = b"") -> "openvino.Model":
    require_package("openvino", path.name)

    try:
        return openvino_core().read_model(model, weights)
    except Exception as error:  # OpenVINO's own, for whatever is in the file
        raise _damaged(path, f"OpenVINO cannot read it ({_reason(error)})") from None


def _reason(error: Exception) -> str:
    """The line of an error of OpenVINO that says what is wrong, below those that say where."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:200] if lines else type(error).__name__


def _damaged(path: Path, reason: str) -> UserError:
    return UserError(f"{path}: cannot be used: {reason}: export a run (python export.py RUN)")


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


Ports = tuple[dict[str, tuple[str, list[int | None]]], list[str]]
"""type and shape of each input by its name, where None is any size; and the names of the outputs"""


def _ports_of_openvino(model: "openvino.Model") -> Ports:
    inputs = {}
    for port in model.inputs:
        shape = [None if d.is_dynamic else d.get_length() for d in port.partial_shape]
        kind = port.element_type.to_string()
        inputs[_name(port)] = ({"u8": "uint8", "f32": "float32"}.get(kind, kind), shape)
    return inputs, [_name(port) for port in model.outputs]


def _name(port: "openvino.Output") -> str:
    return min(port.names, default="")


def _ports_of_onnx(proto: "onnx.ModelProto") -> Ports:
    import onnx

    weights, inputs = {tensor.name for tensor in proto.graph.initializer}, {}
    for value in proto.graph.input:
        if value.name in weights:
            continue
        tensor = value.type.tensor_type
        kind = onnx.TensorProto.DataType.Name(tensor.elem_type).lower()
        dims = tensor.shape.dim
        shape = [d.dim_value if d.HasField("dim_value") else None for d in dims]
        inputs[value.name] = ({"float": "float32"}.get(kind, kind), shape)
    return inputs, [value.name for value in proto.graph.output]


def expected_inputs(state: Mapping[str, Any]) -> dict[str, tuple[str, list[int | None]]]:
    """Type and shape of each input that the network of an exported file has; see `Ports`."""
    config, exported = from_dict(state["config"]), state["exported"]
    batch = None if exported["dynamic_batch"] else 1
    frame = [Modality.parse(config.modality).channels, config.image_size, config.image_size]
    if not exported["memory"]:
        return {CLIPS: ("uint8", [batch, config.n_frames, *frame])}
    memory = {part["name"]: ("float32", [batch, *part["shape"]]) for part in exported["memory"]}
    return {FRAME: ("uint8", [batch, *frame]), **memory}


def _check_ports(ports: Ports, state: Mapping[str, Any], path: Path) -> None:
    """Raise a UserError where the network is not the one that the metadata describes."""
    inputs, outputs = ports
    expected = expected_inputs(state)
    if inputs != expected:
        raise _damaged(path, f"the network takes {_text(inputs)}, not {_text(expected)}")
    names = [LOGITS, *(next_name(name) for name in list(expected)[1:])]
    names = names if state["exported"]["memory"] else [LOGITS, FEATURES]
    if outputs != names:
        raise _damaged(path, f"the network gives {', '.join(outputs)}, not {', '.join(names)}")


def _text(inputs: Mapping[str, tuple[str, list[int | None]]]) -> str:
    parts = [
        f"{name} {kind} {tuple(size or 'batch' for size in shape)}"
        for name, (kind, shape) in inputs.items()
    ]
    return "; ".join(parts)[:300].replace("'", "") or "nothing"


def next_name(memory: str) -> str:
    """The name of the output that a memory of the network of one frame takes at the next frame."""
    return f"{memory}_next"


def _try(engine: Engine, state: Mapping[str, Any]) -> None:
    """Compute zeros, so that what the network cannot do is found before any clip is read."""
    batch = 2 if engine.dynamic_batch else 1
    inputs = {
        name: np.zeros([batch, *shape[1:]], kind)
        for name, (kind, shape) in expected_inputs(state).items()
    }
    outputs = engine.compute(inputs)
    shapes = {next_name(name): value.shape for name, value in inputs.items()}
    shapes[LOGITS] = (batch, len(state["classes"]))
    novelty = state.get("novelty")
    if FEATURES in outputs:
        width = novelty["means"].shape[1] if novelty else outputs[FEATURES].shape[-1]
        shapes[FEATURES] = (batch, width)
    for name, array in outputs.items():
        if array.shape != shapes[name] or array.dtype != np.float32:
            raise ValueError(f"{name} is {array.dtype} {array.shape}, not float32 {shapes[name]}")
        if not np.isfinite(array).all():
            raise ValueError(f"{name} are not finite")
