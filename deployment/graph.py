"""The graph of a trained model, and its conversion to OpenVINO and ONNX."""

import copy
import io
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.export import Dim, ExportedProgram

from modeling.engines import CLIPS, FEATURES, LOGITS
from modeling.features import recorded_features
from modeling.inference import fold_batchnorms
from utils.errors import require_package

if TYPE_CHECKING:
    import openvino

# A batch of one would be taken for a constant: the exporter specialises sizes 0 and 1.
_EXAMPLE_BATCH = 2
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

    torch.export is called here although torch.onnx.export would: it raises where a batch of any
    size is not possible, and the other one freezes the size in silence.

    Args:
        model: a trained model, which is left as it is.
        n_frames, image_size: T, and height and width of the clips in pixels.
        dynamic_batch: whether the graph takes batches of any size, or single clips only.
    """
    model = copy.deepcopy(model).cpu().eval().requires_grad_(False)
    fold_batchnorms(model)
    channels = getattr(model, "channels", 3)
    batch = _EXAMPLE_BATCH if dynamic_batch else 1
    clips = torch.zeros(batch, n_frames, channels, image_size, image_size, dtype=torch.uint8)
    sizes = {0: Dim("batch", min=1, max=_MAX_BATCH)} if dynamic_batch else {}
    return torch.export.export(LogitsAndFeatures(model), (clips,), dynamic_shapes=(sizes,))


def to_openvino(program: ExportedProgram) -> "openvino.Model":
    """A graph as a model of OpenVINO, straight from torch: ONNX cannot express some of them."""
    require_package("openvino", "the format openvino")
    import openvino

    model = openvino.convert_model(program)
    (clips,) = program.example_inputs[0]
    batch = -1 if program.range_constraints else len(clips)
    model.reshape([batch, *clips.shape[1:]])
    model.inputs[0].set_names({CLIPS})
    for output, name in zip(model.outputs, (LOGITS, FEATURES), strict=True):
        output.set_names({name})
    return model


def to_onnx(program: ExportedProgram) -> bytes:
    """A graph as the bytes of an ONNX file."""
    require_package("onnx", "the format onnx")
    require_package("onnxscript", "the format onnx")
    exported = torch.onnx.export(
        program,
        input_names=[CLIPS],
        output_names=[LOGITS, FEATURES],
        dynamo=True,
        optimize=True,
        verbose=False,
    )
    file = io.BytesIO()
    exported.save(file)
    return file.getvalue()
