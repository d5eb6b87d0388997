"""Export a trained model to ONNX or OpenVINO, for programs without PyTorch and this project.

    python export.py runs/20260101-120000_tsm_resnet               RUN/tsm_resnet.onnx
    python export.py RUN --format openvino                         RUN/tsm_resnet.xml and .bin
    python export.py RUN --dynamic-batch --output tsm.onnx         batches of any size
    python export.py RUN --streaming                               one frame, with its memory
    python export.py RUN --format openvino --int8                  int8, if that costs little

The file takes raw pixels and holds classes, clip length, frame rate, temperature, threshold and
licence. It is written only if it computes what the trained model computes, on 50 clips. evaluate.py
and predict.py take it wherever they take a run. See docs/deployment.md.
"""

# What imports torch is imported where it is used: --help does without.
import dataclasses
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from utils.cli import cli_main, parse
from utils.errors import UserError, require_package

if TYPE_CHECKING:
    import torch
    from torch import nn

    from clips.manifest import ClipRow
    from config import TrainConfig
    from modeling.engines import Engine

PARITY_CLIPS = 50
"""clips, or frames of a stream, on which the file is compared with the model"""

SLOW = {"mvit": "the conversion of mvit takes one to two minutes on a free core"}


@dataclass(frozen=True)
class ExportConfig:
    """The checkpoint, and the file that is made of it."""

    checkpoint: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """a run folder (its best.pt is used) or a checkpoint file"""
    format: Literal["onnx", "openvino"] = "onnx"
    """onnx: one file that ONNX Runtime, OpenVINO, TensorRT and others take; openvino: an .xml, and
    a .bin beside it"""
    dynamic_batch: bool = False
    """take batches of any size, not single clips only"""
    streaming: bool = False
    """export the step from one frame to the next of a causal TSM or a CNN-LSTM: it takes a frame
    and its memory, and gives logits and the memory for the next frame"""
    int8: bool = False
    """compute in int8, calibrated on training clips; fp32 is kept, and the exit code is 1, if more
    than 0.01 of macro-F1 is lost on the validation clips"""
    vnni: bool | None = None
    """int8: whether the CPU that will run the file has VNNI, without which weights use 7 bits
    (None: as this one)"""
    n_frames: int | None = None
    """frames per clip, T (None: as in training; the file has this one only)"""
    data_root: str = ""
    """folder of the clips that the file is compared on (empty: the one of the training)"""
    num_workers: int = 2
    """processes that read these clips"""
    output: str = ""
    """file to write, ending in .onnx or .xml (empty: inside the run, named after the model)"""

    def __post_init__(self) -> None:
        if self.n_frames is not None and not 1 <= self.n_frames <= 1024:
            raise UserError(f"n_frames = {self.n_frames}: must be from 1 to 1024")
        if self.num_workers < 0:
            raise UserError(f"num_workers = {self.num_workers}: must be 0 or more")
        if self.int8 and self.format != "openvino":
            raise UserError("--int8 needs --format openvino")
        suffix = ".onnx" if self.format == "onnx" else ".xml"
        if self.output and Path(self.output).suffix != suffix:
            raise UserError(f"--output {self.output}: with --format {self.format} the name of the "
                            f"file must end in {suffix}")  # fmt: skip

    def output_file(self, training: "TrainConfig") -> Path:
        """The file, whose name says what was exported."""
        if self.output:
            return Path(self.output)
        checkpoint = Path(self.checkpoint)
        parts = [training.model_name]
        parts += [checkpoint.stem] * (checkpoint.is_file() and checkpoint.stem != "best")
        parts += [f"{self.n_frames}frames"] * bool(self.n_frames)
        parts += ["step"] * self.streaming
        parts += ["int8"] * self.int8
        folder = checkpoint if checkpoint.is_dir() else checkpoint.parent
        return folder / ("_".join(parts) + (".onnx" if self.format == "onnx" else ".xml"))


def require_packages(config: ExportConfig) -> None:
    """Raise a UserError if a package that this export needs is missing."""
    what = f"--format {config.format}"
    modules = ("onnx", "onnxscript", "onnxruntime") if config.format == "onnx" else ("openvino",)
    for module in modules:
        require_package(module, what)
    if config.int8:
        require_package("nncf", "--int8")


def require_own_output(path: Path) -> None:
    """Check that nothing is overwritten but an earlier export.

    Raises:
        UserError: there is another file of this name.
    """
    from deployment.files import read_metadata

    weights = path.with_suffix(".bin")
    pair = [path, weights] if path.suffix == ".xml" else [path]
    if not any(file.exists() for file in pair):
        return
    try:
        own = "checkpoint" in read_metadata(path)
    except (UserError, OSError):
        own = False
    if not own:
        raise UserError(
            f"--output {next(file for file in pair if file.exists())}: exists already, is not a "
            "whole file that this command wrote, and is not overwritten: move it away, or give "
            "another name"
        )


def clip_settings(config: ExportConfig, training: "TrainConfig") -> "TrainConfig":
    """The settings of the training, with which single clips of the run are read."""
    return dataclasses.replace(
        training,
        data_root=config.data_root or training.data_root,
        num_workers=config.num_workers,
        batch_size=1,
        cache="" if config.data_root or config.n_frames else training.cache,
    )


def parity_rows(
    config: ExportConfig, training: "TrainConfig", count: int
) -> "tuple[list[ClipRow], TrainConfig, str]":
    """So many clips of the run to compare on, validation before training, and settings for them.

    Returns:
        No rows where the clips are not here; the last item then says why.
    """
    from training.loaders import DEMO_ROOT, load_splits, open_cache

    settings = clip_settings(config, training)
    if not settings.data_root and not DEMO_ROOT.is_dir():
        return [], settings, f"there is no {DEMO_ROOT} here"
    try:
        splits = load_splits(settings)
        open_cache(settings)
    except UserError as error:
        return [], settings, str(error).splitlines()[0]
    rows = []
    for split in ("val", "train"):
        missing = count - len(rows)
        rows += spread(splits[split], missing)
    return rows, settings, ""


def spread(rows: "list[ClipRow]", most: int) -> "list[ClipRow]":
    """At most so many rows, spread evenly."""
    count = min(most, len(rows))
    return [rows[i * len(rows) // count] for i in range(count)]


class ParityClips:
    """The clips `(T, C, H, W)` that the file is compared on, one after another: those of the run
    that can be read, and noise for the rest."""

    def __init__(
        self, config: ExportConfig, training: "TrainConfig", channels: int, count: int
    ) -> None:
        self._rows, self._settings, self._why = parity_rows(config, training, count)
        self._count = count
        self._shape = (training.n_frames, channels, training.image_size, training.image_size)
        self.real = 0

    def __iter__(self) -> "Iterator[torch.Tensor]":
        import torch

        from training.loaders import eval_loader, open_cache

        self.real = 0
        if self._rows:
            for batch in eval_loader(self._rows, self._settings, open_cache(self._settings)):
                for clip in batch.clips:
                    self.real += 1
                    yield clip
        generator = torch.Generator().manual_seed(0)
        for _ in range(self._count - self.real):
            yield torch.randint(256, self._shape, generator=generator, dtype=torch.uint8)

    def describe(self) -> str:
        """What they were, after they were read."""
        if self.real == self._count:
            return f"{self.real} clips of the run"
        noise = f"{self._count - self.real} clips of noise"
        if self.real:
            return f"{self.real} clips of the run and {noise}"
        why = self._why or "none of the run's clips can be read"
        return f"{noise}, not of the run ({why})"


def export(config: ExportConfig) -> int:
    """Export the model, compare it with the trained one, and write the file.

    Returns:
        The exit code: 1 if int8 lost too much and the file is in fp32.

    Raises:
        UserError: something is wrong with the checkpoint or the settings, the model cannot be
            exported like this, or the file does not compute what the model does.
    """
    from checkpoint import load_checkpoint, rebuild_model
    from config import from_dict
    from deployment.files import read_exported, replacing
    from deployment.step import find_streaming_problem
    from utils.files import make_folder, require_space, require_writable_file

    # checkpoint
    require_packages(config)
    state = load_checkpoint(config.checkpoint)
    training = from_dict(state["config"])
    made_for = training.n_frames
    training = other_length(training, config.n_frames)
    model = rebuild_model(state)
    if config.streaming and (problem := find_streaming_problem(model)):
        raise UserError(f"--streaming: this {training.model_name} cannot: {problem}")
    output = config.output_file(training)
    require_writable_file(output)
    require_own_output(output)
    size = sum(value.numel() * value.element_size() for value in state["model"].values())
    require_space(output.parent, 1.1 * size, "the file needs about")
    if config.format == "onnx" and size > 2e9:
        raise UserError(f"{config.checkpoint}: its weights take {size / 1e9:.1f} GB, and an ONNX "
                        "file holds at most 2: use --format openvino")  # fmt: skip

    # network
    print(
        f"{training.model_name}, T = {training.n_frames}, {training.image_size} pixels, to "
        f"{config.format}",
        flush=True,
    )
    if training.model_name in SLOW:
        print(SLOW[training.model_name], flush=True)
    if config.n_frames:
        print(f"temperature and threshold are those for {made_for} frames")
    state = {**state, "config": vars(training)}
    make_folder(output.parent)
    with replacing(output) as unfinished:
        memory = write_network(config, state, model, unfinished)

        # parity
        try:
            engine = read_exported(unfinished)[1]
        except UserError as error:  # it names the temporary file
            reason = str(error).removeprefix(f"{unfinished}: ")
            raise UserError(f"the {config.format} file {reason}") from None
        print(require_parity(config, training, model, engine, memory), flush=True)
        kept_fp32 = config.int8 and not write_int8(config, state, engine, unfinished)
    print(f"exported: {output}")
    return int(kept_fp32)


def write_int8(
    config: ExportConfig, state: "Mapping[str, Any]", fp32: "Engine", path: Path
) -> bool:
    """Replace a network in fp32 by one in int8, unless that loses too much.

    Args:
        state: the checkpoint, whose config says T.
        fp32: the network that `path` holds.

    Returns:
        Whether `path` holds int8 now.

    Raises:
        UserError: there are no clips to calibrate on, or to measure the loss on.
    """
    import torch

    from config import from_dict
    from deployment import quantization
    from deployment.files import write_openvino
    from deployment.metadata import pack
    from deployment.step import ClipsByStep
    from modeling.engines import OpenVINOEngine, openvino_core
    from training.engine import evaluate
    from training.loaders import eval_loader, load_splits, open_cache

    training = from_dict(state["config"])
    settings = clip_settings(config, training)
    splits, cache = load_splits(settings), open_cache(settings)
    rows = quantization.calibration_rows(splits, quantization.CALIBRATION_CLIPS)
    if not splits["val"]:
        raise UserError("--int8: the run has no validation clips to measure on what int8 costs")
    vnni = quantization.has_vnni() if config.vnni is None else config.vnni
    patients = len({row.patient for row in rows if row.patient})
    print(
        f"int8: calibrating on {len(rows)} training clips of {patients or 'unknown'} patients, for "
        f"CPUs with{'' if vnni else 'out'} VNNI",
        flush=True,
    )
    clips = (clip for batch in eval_loader(rows, settings, cache) for clip in batch.clips)
    if fp32.memory:
        samples = (inputs for clip in clips for inputs in ClipsByStep(fp32).inputs(clip))
    else:
        samples = (clip[None].numpy() for clip in clips)
    network = quantization.quantize(
        # From memory: a file that is mapped cannot be replaced below.
        openvino_core().read_model(path.read_bytes(), path.with_suffix(".bin").read_bytes()),
        samples,
        training.model_name in quantization.TOKEN_MODELS,
        vnni,
    )
    int8 = OpenVINOEngine(network, torch.get_num_threads())
    int8.dynamic_batch, int8.memory = fp32.dynamic_batch, fp32.memory
    engines = (ClipsByStep(fp32), ClipsByStep(int8)) if fp32.memory else (fp32, int8)
    device = torch.device("cpu")
    before, after = (
        evaluate(engine, eval_loader(splits["val"], settings, cache), device, description="val")
        for engine in engines
    )
    cost = quantization.measure_cost(before, after)
    print(cost.describe(), flush=True)
    if not cost.acceptable:
        print(f"more than {quantization.MAX_LOSS} is lost: the file stays in fp32")
        return False
    metadata = pack(state, "int8", config.dynamic_batch, fp32.memory)
    write_openvino(path, network, {**metadata, "int8": cost.describe()})
    return True


def write_network(
    config: ExportConfig, state: "Mapping[str, Any]", model: "nn.Module", path: Path
) -> dict[str, tuple[int, ...]]:
    """Write the network of a model, with its metadata.

    Args:
        state: the checkpoint, whose config says T.

    Returns:
        With --streaming the shape of each memory, without the batch, by its name.

    Raises:
        UserError: the exporter cannot express the model.
    """
    from config import from_dict
    from deployment.files import write_onnx, write_openvino
    from deployment.graph import conversion_problem, to_onnx, to_openvino, trace
    from deployment.metadata import pack
    from deployment.step import StepNames, trace_step

    training = from_dict(state["config"])
    options = training.n_frames, training.image_size, config.dynamic_batch
    names: tuple = ()
    memory: dict[str, tuple[int, ...]] = {}
    try:
        if config.streaming:
            program, memory = trace_step(model, *options)
            names = StepNames(len(memory)).inputs, StepNames(len(memory)).outputs
        else:
            program = trace(model, *options)
        network = (to_onnx if config.format == "onnx" else to_openvino)(program, *names)
    except (UserError, OSError, MemoryError):
        raise
    except (
        Exception
    ) as error:  # of torch, onnxscript or OpenVINO, for a network of timm for example
        reason = conversion_problem(error)
        batch = " or leave --dynamic-batch out" if config.dynamic_batch else ""
        raise UserError(
            f"{training.model_name} with these settings cannot be exported to {config.format} "
            f"({type(error).__name__}: {reason}): try another --format{batch}"
        ) from None
    metadata = pack(state, dynamic_batch=config.dynamic_batch, memory=memory)
    (write_onnx if config.format == "onnx" else write_openvino)(path, network, metadata)
    return memory


def require_parity(
    config: ExportConfig,
    training: "TrainConfig",
    model: "nn.Module",
    engine: "Engine",
    memory: "Mapping[str, Sequence[int]]",
) -> str:
    """Compare the exported network with the model.

    Returns:
        The largest difference, and what it was seen on, in one line.

    Raises:
        UserError: it is too large.
    """
    import numpy as np

    from deployment.parity import BATCH_SIZES, compare, compare_step, in_batches
    from timeline.streaming import Streamer

    channels = getattr(model, "channels", 3)
    if not config.streaming:
        clips = ParityClips(config, training, channels, PARITY_CLIPS)
        sizes = BATCH_SIZES if config.dynamic_batch else (1,)
        parity = compare(model, engine, in_batches(clips, sizes))
        parity.require(f"the {config.format} file")
        return (
            f"largest difference from the model: {parity.logits:.1e} in the logits, "
            f"{parity.features:.1e} in the features, on {clips.describe()}"
        )
    # So many that the window moves on, and forgets its first frames.
    count = max(PARITY_CLIPS, 2 * training.n_frames)
    clips = ParityClips(config, training, channels, -(-count // training.n_frames))
    frames = [frame for clip in clips for frame in clip][:count]
    zeros = {name: np.zeros((1, *shape), np.float32) for name, shape in memory.items()}
    worst = 0.0
    for streams in (1, 2) if config.dynamic_batch else (1,):
        streamer = Streamer(model, training.n_frames, streams)
        parity = compare_step(streamer.step, engine, zeros, frames, streams)
        parity.require(f"the {config.format} file", "frames")
        worst = max(worst, parity.logits)
    return (
        f"largest difference from the model: {worst:.1e} in the log probabilities, at each of "
        f"{count} frames, of {clips.describe()}"
    )


def other_length(training: "TrainConfig", n_frames: int | None) -> "TrainConfig":
    """The settings of the training with another T, if the model takes it.

    Raises:
        UserError: it does not.
    """
    from models import have_same_weights

    if n_frames in (None, training.n_frames):
        return training
    other = dataclasses.replace(training, n_frames=n_frames)
    if not have_same_weights(training, other):
        name, made_for = training.model_name, training.n_frames
        raise UserError(f"n_frames = {n_frames}: this {name} is made for {made_for} frames")
    return other


@cli_main
def main() -> None:
    sys.exit(export(parse(ExportConfig, __doc__)))


if __name__ == "__main__":
    main()
