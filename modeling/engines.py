"""Engines: networks that another runtime computes, called like the models of this project.

An engine maps clips `(B, T, C, H, W)`, uint8, to logits `(B, num_classes)`, and keeps the features
of its last call, so that it can stand wherever a prepared model does (`prepare_for_inference`
returns it as it is). It runs on the CPU.
"""

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from utils.errors import require_package

if TYPE_CHECKING:
    import openvino

# The names of the input and of the outputs of every exported network.
CLIPS, LOGITS, FEATURES = "clips", "logits", "features"


@functools.cache
def openvino_core() -> "openvino.Core":
    """The only Core of this process. When the last one goes, OpenVINO unloads its CPU plugin, and
    the plugin's threads, which still run, end the process with a segmentation fault."""
    import openvino

    core = openvino.Core()
    core.get_property("CPU", "FULL_DEVICE_NAME")  # loads the plugin: NNCF has Cores of its own
    return core


class Engine(nn.Module):
    """A network that another runtime computes."""

    name = "engine"

    def __init__(self) -> None:
        super().__init__()
        self.features: torch.Tensor | None = None
        """`(B, F)`: the input of the last layer at the last call, averaged over the frames"""
        self.dynamic_batch = True
        """whether the network takes batches of any size; otherwise it gets one clip at a time"""
        self.memory: dict[str, tuple[int, ...]] = {}
        """of a network of one frame (deployment/step.py): the shape of each memory by its name,
        without the batch; empty for a network of whole clips"""

    def forward(self, clips: torch.Tensor) -> torch.Tensor:
        """`(B, T, C, H, W)` uint8 to logits `(B, num_classes)`."""
        parts = [clips] if self.dynamic_batch else clips.split(1)
        outputs = [self.compute({CLIPS: part.numpy()}) for part in parts]
        logits, self.features = (
            torch.from_numpy(np.concatenate([arrays[name] for arrays in outputs]))
            for name in (LOGITS, FEATURES)
        )
        return logits

    def compute(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The outputs of the network by their names; the next call may overwrite them."""
        raise NotImplementedError


class OpenVINOEngine(Engine):
    """A network in OpenVINO on the CPU.

    A network for batches of any size is compiled for each size that comes, up to three: that takes
    a second, and shapes that are known make each call 5 to 10 % faster.

    Args:
        model: an `openvino.Model`, or the path of an .xml or .onnx file.
        threads: number of threads (None: all cores).
    """

    name = "openvino"
    _MAX_SIZES = 3

    def __init__(self, model: "openvino.Model | str | Path", threads: int | None = None) -> None:
        super().__init__()
        require_package("openvino", "--engine openvino")
        # fp32 although a CPU may compute bf16 faster: the logits are to be those of the model.
        self._options: dict[str, Any] = {
            "INFERENCE_PRECISION_HINT": "f32",
            "PERFORMANCE_HINT": "LATENCY",
        }
        if threads:
            self._options["INFERENCE_NUM_THREADS"] = threads
        is_path = isinstance(model, str | Path)
        self._graph = openvino_core().read_model(str(model)) if is_path else model
        self._requests: dict[int, Any] = {}
        """by batch size; 0: for every size"""

    def compute(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        outputs = self._request(len(next(iter(inputs.values())))).infer(inputs)
        return {port.get_any_name(): outputs[port] for port in outputs}

    def _request(self, batch: int) -> Any:
        """What computes batches of this size."""
        fixed = all(port.partial_shape[0].is_static for port in self._graph.inputs)
        if fixed or (batch not in self._requests and len(self._requests) >= self._MAX_SIZES):
            batch = 0
        if batch not in self._requests:
            graph = self._graph
            if batch:
                graph = graph.clone()
                shapes = {port: [batch, *list(port.partial_shape)[1:]] for port in graph.inputs}
                graph.reshape(shapes)
            compiled = openvino_core().compile_model(graph, "CPU", self._options)
            self._requests[batch] = compiled.create_infer_request()
        return self._requests[batch]


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
        # Threads that spin between two calls take the CPU from the decoder and the other engines.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 3  # errors; warnings about a file's graph help no one
        source = str(model) if isinstance(model, Path) else model
        self._session = onnxruntime.InferenceSession(
            source, options, providers=["CPUExecutionProvider"]
        )

    def compute(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        names = [output.name for output in self._session.get_outputs()]
        return dict(zip(names, self._session.run(names, inputs), strict=True))
