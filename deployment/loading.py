"""Models for the scripts: of a run, a checkpoint or an exported file, in the engine that is chosen."""

from pathlib import Path

import torch
from torch import nn

from checkpoint import load_checkpoint, rebuild_model
from config import EngineName, from_dict
from deployment.files import is_exported, read_exported
from deployment.runtime import build_engine, fastest_engine
from deployment.step import find_streaming_problem
from modeling.engines import Engine
from utils.device import autocast_dtype, get_device
from utils.errors import UserError


class ModelSource:
    """What a model is loaded from, and what computes it.

    Args:
        source: a run folder, a checkpoint, or a file of export.py.
        engine: what computes the model (None: torch, or the engine that a file was exported for).
        device, precision: as the scripts take them; an engine computes fp32 on the CPU.

    Raises:
        UserError: the source cannot be read, or the choices contradict each other.
    """

    def __init__(
        self, source: str | Path, engine: EngineName | None, device: str, precision: str
    ) -> None:
        self.source = source
        self.exported = is_exported(source) and not Path(source).is_dir()
        self._file: Engine | None = None
        if self.exported:
            if engine in ("torch", "auto"):
                raise UserError(
                    f"{source}: --engine {engine} is for a run or a checkpoint; an exported file "
                    "runs in openvino or onnxruntime"
                )
            self.state, self._file = read_exported(source, engine or "", torch.get_num_threads())
            memory = self.state["exported"]["memory"]
            self._file.memory = {part["name"]: tuple(part["shape"]) for part in memory}
            engine = self._file.name
        else:
            self.state = load_checkpoint(source)
        self.engine: EngineName = engine or "torch"
        if self.engine in ("openvino", "onnxruntime"):
            _require_cpu_fp32(self.engine, device, precision)
            device, precision = "cpu", "fp32"
        self.device = get_device(device)
        self.dtype = autocast_dtype(precision, self.device)

    def build(self, n_frames: int | None = None, follow: bool = False) -> nn.Module:
        """The model, or the engine that computes it, which is then ready to run.

        Args:
            n_frames: T (None: as in training).
            follow: for whole videos: a model that can be streamed becomes the network of one frame.

        Raises:
            UserError: an exported file is of another T, or is the network of one frame where whole
                clips are needed.
        """
        training = from_dict(self.state["config"])
        n_frames = n_frames or training.n_frames
        if self._file is not None:
            if n_frames != training.n_frames:
                raise UserError(
                    f"{self.source}: is made for {training.n_frames} frames, not for {n_frames}: "
                    "export the run with --n-frames"
                )
            if self._file.memory and not follow:
                raise UserError(
                    f"{self.source}: computes frame by frame, for whole videos: for clips, export "
                    "the run without --streaming"
                )
            return self._file
        model = rebuild_model(self.state)
        options = n_frames, training.image_size, follow and not find_streaming_problem(model)
        if self.engine == "auto":
            automatic = self.device.type == "cpu" and self.dtype == torch.float32
            self.engine = fastest_engine(model, *options) if automatic else "torch"
        return model if self.engine == "torch" else build_engine(model, self.engine, *options)


def _require_cpu_fp32(engine: str, device: str, precision: str) -> None:
    if device not in ("auto", "cpu"):
        raise UserError(f"--engine {engine} computes on the CPU: leave out --device {device}")
    if precision not in ("auto", "fp32"):
        raise UserError(f"--engine {engine} computes in fp32: leave out --precision {precision}")
