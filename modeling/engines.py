"""Engines: networks that another runtime computes, called like the models of this project.

An engine maps clips `(B, T, C, H, W)`, uint8, to logits `(B, num_classes)`, and keeps the features
of its last call, so that it can stand wherever a prepared model does (`prepare_for_inference`
returns it as it is). It runs on the CPU.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from utils.errors import require_package

if TYPE_CHECKING:
    import openvino

# The names of the input and of the outputs of every exported network.
CLIPS, LOGITS, FEATURES = "clips", "logits", "features"


class Engine(nn.Module):
    """A network that another runtime computes."""

    name = "engine"

    def __init__(self) -> None:
        super().__init__()
        self.features: torch.Tensor | None = None
        """`(B, F)`: the input of the last layer at the last call, averaged over the frames"""

    def forward(self, clips: torch.Tensor) -> torch.Tensor:
        """`(B, T, C, H, W)` uint8 to logits `(B, num_classes)`."""
        logits, self.features = self.run(clips)
        return logits

    def run(self, clips: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits `(B, num_classes)` and features `(B, F)` of uint8 clips."""
        raise NotImplementedError


class OpenVINOEngine(Engine):
    """A network in OpenVINO on the CPU.

    Args:
        model: an `openvino.Model`, or the path of an .xml or .onnx file.
        threads: number of threads (None: all cores).
    """

    name = "openvino"

    def __init__(self, model: "openvino.Model | str | Path", threads: int | None = None) -> None:
        super().__init__()
        require_package("openvino", "--engine openvino")
        import openvino

        # fp32 although a CPU may compute bf16 faster: the logits are to be those of the model.
        options: dict[str, Any] = {
            "INFERENCE_PRECISION_HINT": "f32",
            "PERFORMANCE_HINT": "LATENCY",
        }
        if threads:
            options["INFERENCE_NUM_THREADS"] = threads
        source = str(model) if isinstance(model, str | Path) else model
        self._model = openvino.Core().compile_model(source, "CPU", options)
        self._request = self._model.create_infer_request()

    def run(self, clips: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        outputs = self._request.infer({CLIPS: clips.numpy()})
        return torch.from_numpy(outputs[LOGITS].copy()), torch.from_numpy(outputs[FEATURES].copy())


class OnnxRuntimeEngine(Engine):
    """A network in ONNX Runtime on the CPU.

    Args:
        model: the bytes of an ONNX file, or its path.
        threads: number of threads (None: all cores).
    """

    name = "onnxruntime"

    def __init__(self, model: "bytes | str | Path", threads: int | None = None) -> None:
        super().__init__()
        require_package("onnxruntime", "--engine onnxruntime")
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or 0
        source = str(model) if isinstance(model, Path) else model
        self._session = onnxruntime.InferenceSession(
            source, options, providers=["CPUExecutionProvider"]
        )

    def run(self, clips: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits, features = self._session.run([LOGITS, FEATURES], {CLIPS: clips.numpy()})
        return torch.from_numpy(logits), torch.from_numpy(features)
