"""The graph of a trained model, and its conversion to OpenVINO and ONNX."""

import contextlib
import copy
import io
import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.export import Dim, ExportedProgram
from torch.utils._pytree import tree_leaves, tree_map

from modeling.engines import CLIPS, FEATURES, LOGITS
from modeling.features import recorded_features
from modeling.inference import fold_batchnorms
from utils.errors import require_package

if TYPE_CHECKING:
    import openvino

# A batch of one would be taken for a constant: the exporter specialises sizes 0 and 1.
EXAMPLE_BATCH = 2
_MAX_BATCH = 1024


class LogitsAndFeatures(nn.Module):
    """A model that also returns the features of the clips, the input of its last layer."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, clips: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`(B, T, C, H, W)` uint8 to `(B, num_classes)` and `(B, F)`."""
        with recorded_features(self.model) as newest:
            logits = self.model(clips)
        # (B, F), or (B * T, F) where the last layer is applied to each frame
        features = newest[0].unflatten(0, (clips.shape[0], -1)).mean(dim=1)
        return logits, features


def trace(
    model: nn.Module, n_frames: int, image_size: int, dynamic_batch: bool = True
) -> ExportedProgram:
    """The graph of a model for uint8 clips of T frames, its BatchNorms folded, in fp32.

    Args:
        model: a trained model, which is left as it is.
        n_frames, image_size: T, and height and width of the clips in pixels.
        dynamic_batch: whether the graph takes batches of any size, or single clips only.
    """
    channels = getattr(model, "channels", 3)
    batch = EXAMPLE_BATCH if dynamic_batch else 1
    clips = torch.zeros(batch, n_frames, channels, image_size, image_size, dtype=torch.uint8)
    return trace_module(LogitsAndFeatures(folded(model, image_size)), (clips,), dynamic_batch)


def folded(model: nn.Module, image_size: int) -> nn.Module:
    """A copy of a model on the CPU for tracing, its BatchNorms folded, in fp32."""
    model = copy.deepcopy(model).cpu().eval().requires_grad_(False)
    fold_batchnorms(model)
    _resize_positions(model, image_size)
    return model


def trace_module(
    module: nn.Module, inputs: tuple[Any, ...], dynamic_batch: bool
) -> ExportedProgram:
    """The graph of a module; the first dimension of all inputs and outputs is the batch.

    torch.export is called here although torch.onnx.export would: it raises where a batch of any
    size is not possible, and the other one freezes the size in silence.

    Args:
        inputs: examples, tensors and lists of them; with `dynamic_batch`, of `EXAMPLE_BATCH` clips.
    """
    batch = {0: Dim("batch", min=1, max=_MAX_BATCH)} if dynamic_batch else {}
    shapes = tree_map(lambda _: batch, inputs)
    # An LSTM refreshes its list of weights, which is warned of.
    with warnings.catch_warnings(action="ignore"), _fixed_positions():
        return torch.export.export(module, inputs, dynamic_shapes=shapes)


@contextlib.contextmanager
def _fixed_positions() -> Iterator[None]:
    """Within this block timm's networks take position embeddings of the right size as they are.

    For a file that takes images of any size they would be resized in the graph at every call, by an
    operator that OpenVINO does not have; the files of this project take one size.
    """
    layers = sys.modules.get("timm.layers.pos_embed")
    original = getattr(layers, "is_exporting", None)
    if original is None:
        yield
        return
    layers.is_exporting = lambda: False
    try:
        yield
    finally:
        layers.is_exporting = original


def _resize_positions(model: nn.Module, image_size: int) -> None:
    """Resize timm's position embeddings to the size of the clips, once."""
    for module in model.modules():
        if getattr(module, "dynamic_img_size", False) and hasattr(module, "set_input_size"):
            module.set_input_size(img_size=image_size)


def to_openvino(
    program: ExportedProgram,
    inputs: Sequence[str] = (CLIPS,),
    outputs: Sequence[str] = (LOGITS, FEATURES),
) -> "openvino.Model":
    """A graph as a model of OpenVINO, straight from torch: ONNX cannot express some of them.

    Args:
        inputs, outputs: their names in the file.
    """
    require_package("openvino", "the format openvino")
    import openvino

    model = openvino.convert_model(program)
    dynamic = bool(program.range_constraints)
    examples = tree_leaves(program.example_inputs[0])
    shapes = [[-1 if dynamic else len(example), *example.shape[1:]] for example in examples]
    model.reshape(dict(zip(model.inputs, shapes, strict=True)))
    ports = [*model.inputs, *model.outputs]
    for port, name in zip(ports, (*inputs, *outputs), strict=True):
        port.set_names({name})
    return model


def to_onnx(
    program: ExportedProgram,
    inputs: Sequence[str] = (CLIPS,),
    outputs: Sequence[str] = (LOGITS, FEATURES),
) -> bytes:
    """A graph as the bytes of an ONNX file; see `to_openvino`."""
    require_package("onnx", "the format onnx")
    require_package("onnxscript", "the format onnx")
    with warnings.catch_warnings(action="ignore"):  # about what onnxscript does inside
        exported = torch.onnx.export(
            program,
            input_names=list(inputs),
            output_names=list(outputs),
            dynamo=True,
            optimize=True,
            verbose=False,
        )
    file = io.BytesIO()
    exported.save(file)
    return file.getvalue()


def conversion_problem(error: Exception) -> str:
    """Why a graph cannot be converted, in one line, from an error of torch, onnxscript or OpenVINO;
    the latter says where in its source it was found before it says what."""
    lines = [line.strip(" -") for line in str(error).splitlines() if line.strip(" -")]
    telling = [line for line in lines if "No conversion rule" in line] or lines
    return telling[0][:200] if telling else type(error).__name__
