"""Models for the scripts: of a run, a checkpoint or an exported file, in the chosen engine."""

from pathlib import Path

import torch
from torch import nn

from checkpoint import load_checkpoint, rebuild_model
from config import EngineName, from_dict
from deployment.files import is_exported, read_exported
from deployment.runtime import engine_device, in_engine
from deployment.step import find_streaming_problem
from modeling.engines import Engine
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
            engine = self._file.name
        else:
            self.state = load_checkpoint(source)
        self.engine: EngineName = engine or "torch"
        self.device, self.dtype = engine_device(self.engine, device, precision)

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
        step = follow and not find_streaming_problem(model)
        shape = n_frames, training.image_size
        model, self.engine = in_engine(model, self.engine, *shape, self.device, self.dtype, step)
        return model
