"""Predict an action timeline for whole videos, cameras and network streams.

    python predict.py runs/20260101-120000_tsm_resnet operation.mp4   one or several files
    python predict.py RUN /data/operations                            all videos of a folder
    python predict.py RUN /data/frames/video01 --frame-rate 25        a folder of numbered images
    python predict.py RUN 0 --serve                                   a camera, on a live page
    python predict.py RUN rtsp://192.168.0.7/stream                   a network stream
    python predict.py RUN https://host/operation.mp4                  a file on a web server
    cat operation.ts | python predict.py RUN -                        a pipe
    python predict.py RUN operation.mp4 --overlay                     also a video with the answers
    python predict.py RUN operation.mp4 --explain                     which seconds decided
    python predict.py RUN /data/clips --clips answers.csv             one answer per clip
    torchrun --nproc-per-node=4 predict.py RUN /data/operations       an archive (docs/scale.md)

The results of operation.mp4 are written into the folder operation.mp4.timeline beside it:
timeline.csv, frames.csv, timeline.vtt (subtitles), timeline.png and timeline.html, a page to look
through. Of several videos, summary.csv beside these folders has a row per video. Ctrl-C stops early
and writes the results so far.
"""

import dataclasses
import math
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from config import EngineName, Precision
from timeline.open_source import find_sources, open_source
from utils.cli import cli_main, parse
from utils.errors import UserError, require_package
from utils.run_dir import sanitize, strip_credentials
from utils.sharding import this_shard

if TYPE_CHECKING:
    import numpy as np

    from evaluation.calibration import Calibration
    from timeline.archive import Archive
    from timeline.relevance import WindowExplainer
    from timeline.segments import Timeline
    from timeline.smoothing import SmoothingConfig
    from timeline.sources import FrameSource
    from timeline.streaming import OnlinePredictor
    from utils.interrupt import Interrupt

# What imports torch and other large libraries is imported where it is needed: --help is fast.

OLD_NAMES = {
    "amp": "precision",
    "give_up": "reconnect_timeout",
    "minimum_seconds": "min_duration",
    "rate": "fps",
    "segment_seconds": "mean_duration",
    "wanted_error": "target_error",
}

# The settings that change nothing in the results of a video.
OF_THE_START = {
    *("run", "sources", "output", "skip_done", "shard", "serve", "host", "port", "device"),
    *("reconnect_timeout", "clips", "data_root", "path_column", "num_workers"),
}

# The settings that --clips uses.
OF_CLIPS = {
    *("run", "sources", "clips", "data_root", "path_column", "num_workers"),
    *("target_error", "device", "precision", "engine"),
}


@dataclass
class PredictConfig:
    """Settings of predict.py."""

    run: Annotated[str, tyro.conf.Positional]
    """run folder (its best.pt), checkpoint, or file of export.py"""
    sources: Annotated[tuple[str, ...], tyro.conf.Positional]
    """video files, folders of videos or of numbered images, the number of a camera, the address of
    a stream or of a video file, or - for a pipe; with --clips files, folders and manifests"""
    clips: str = ""
    """take each video as one clip, as evaluate.py does, and write one answer per clip into this
    .csv file"""
    data_root: str = ""
    """folder of the clips of manifests, with --clips (empty: the manifest's own)"""
    path_column: str = ""
    """column of the paths in manifests, with --clips (empty: recognised by its name)"""
    num_workers: int = 2
    """processes that read clips, with --clips"""
    output: str = ""
    """folder for the results (empty: beside each video; for live sources predictions/)"""

    n_frames: int | None = None
    """frames per prediction, T (None: as in training)"""
    fps: float | None = None
    """frames per second that the model is shown (None: as in training)"""
    frame_rate: float | None = None
    """images per second of the recordings in folders of numbered images, which do not tell it"""
    stride: int | None = None
    """frames from one window to the next for models that cannot be streamed (None: a quarter of
    n_frames); the other models predict at every frame"""

    smoothing: Literal["auto", "viterbi", "causal", "none"] = "auto"
    """viterbi uses the whole video, causal only the past (auto: causal for live sources)"""
    mean_duration: float = 10.0
    """expected mean duration of an action in seconds"""
    min_duration: float = 1.0
    """shortest duration of an action in seconds; shorter segments are smoothed away"""
    target_error: float | None = None
    """error rate among the answered frames that the threshold for `uncertain` aims at (None: as in
    training)"""
    out_of_body: str = ""
    """detector.py:function, a function of your own that gets a frame (H, W, 3), uint8 RGB in the
    size of the model's frames, and tells whether it was taken outside the patient; such frames are
    marked and never shown"""

    skip_done: bool = False
    """leave out videos that have been predicted with this checkpoint and these settings"""
    shard: str = ""
    """i/n: predict part i of n of the videos, from 0, that are not done; the process that finds all
    of them done writes summary.csv (docs/scale.md; torchrun does this by itself)"""

    overlay: bool = False
    """also write overlay.mp4, the video with its predictions and the timeline below the picture"""
    explain: bool = False
    """also read the video again and show in timeline.html, and in relevance.csv, which seconds
    decided for the label of each segment"""
    serve: bool = False
    """show the newest frame and prediction on a live page in the browser"""
    host: str = "127.0.0.1"
    """address that the live page listens on (the default: only this machine can open it)"""
    port: int = 0
    """port of the live page (0: any free one)"""
    reconnect_timeout: float = 0.0
    """seconds after which a lost live stream is given up (0: never)"""

    device: str = "auto"
    """device: auto, cpu, cuda, cuda:1, mps"""
    precision: Precision = "fp32"
    """precision of the forward pass: auto (what the device computes fast), fp32, bf16, fp16"""
    engine: EngineName | None = None
    """what computes the model: torch, openvino, onnxruntime, or auto, the one that is fastest in a
    trial here (None: torch; for an exported file the engine that it was exported for)"""


def check_settings(config: PredictConfig) -> None:
    """Check what can be checked without the checkpoint.

    Raises:
        UserError: a number is out of range, or a package is missing.
    """
    for name in ("n_frames", "stride", "fps", "frame_rate", "mean_duration"):
        value = getattr(config, name)
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"{name} = {value}: must be a number above 0")
    for name in ("min_duration", "reconnect_timeout"):
        value = getattr(config, name)
        if not 0 <= value < math.inf:
            raise UserError(f"{name} = {value}: must be 0 or more")
    if config.num_workers < 0:
        raise UserError(f"num_workers = {config.num_workers}: must be 0 or more")
    if config.serve:
        require_package("aiohttp", "--serve")
    if config.explain and (config.engine or "torch") != "torch":
        raise UserError(f"--explain needs gradients: leave out --engine {config.engine}")
    if config.explain and Path(config.run).suffix.lower() in (".onnx", ".xml"):
        raise UserError(f"--explain needs gradients: give the run, not {config.run}")
    if not config.clips:
        return
    if os.path.realpath(config.clips) in map(os.path.realpath, config.sources):
        raise UserError(f"--clips {config.clips}: is one of the sources: give another name")
    for field in dataclasses.fields(config):
        if field.name not in OF_CLIPS and getattr(config, field.name) != field.default:
            flag = f"--{field.name.replace('_', '-')}"
            raise UserError(f"{flag} is for whole videos and changes nothing with --clips")


def build_predictor(
    config: PredictConfig,
) -> "tuple[OnlinePredictor, SmoothingConfig, Calibration, dict[str, str]]":
    """The model of a checkpoint, how its predictions are smoothed, its calibration, and a
    description of all.

    Raises:
        UserError: the checkpoint or the settings do not suit whole videos.
    """
    from clips.manifest import class_problems
    from config import from_dict
    from deployment.loading import ModelSource
    from evaluation.calibration import load_calibration
    from models import have_same_weights
    from timeline.smoothing import SmoothingConfig
    from timeline.streaming import OnlinePredictor
    from utils.device import describe_device
    from utils.run_dir import command
    from video.motion import Modality

    model_source = ModelSource(config.run, config.engine, config.device, config.precision)
    state = model_source.state
    training = from_dict(state["config"])
    if Modality.parse(training.modality).stored_motion:
        raise UserError(
            f"{config.run}: was trained with modality {training.modality}, which only clips have: "
            "for whole videos train with rgb or rgbdiff"
        )
    n_frames = config.n_frames or training.n_frames
    other = dataclasses.replace(training, n_frames=n_frames)
    if n_frames != training.n_frames and not have_same_weights(training, other):
        name, made_for = training.model_name, training.n_frames
        raise UserError(f"n_frames = {n_frames}: this {name} is made for {made_for} frames")
    fps = config.fps or state.get("frame_rate")
    if not fps:
        raise UserError(
            f"{config.run}: does not say at which frame rate it was trained (an older checkpoint, "
            "or clips whose rate is unknown): give --fps, the frames per second of the training "
            "clips (16 frames of a clip of 1.2 s are 13.3); if these were folders of images, "
            f"python train.py --resume {config.run} --frame-rate R stores their rate"
        )
    classes = tuple(state["classes"])
    if problems := class_problems(classes):
        raise UserError("\n  ".join([f"{config.run}: cannot be used on videos:", *problems]))
    calibration = load_calibration(state, config.target_error, config.run)
    model = model_source.build(n_frames, follow=True)
    predictor = OnlinePredictor(
        model,
        classes,
        n_frames,
        training.image_size,
        float(fps),
        config.stride or max(1, n_frames // 4),
        model_source.device,
        model_source.dtype,
        calibration.temperature,
    )
    smoothing = SmoothingConfig(
        config.mean_duration,
        config.min_duration,
        predictor.window,
        calibration.min_confidence,
        config.smoothing,
    )
    metadata = {
        "command": command(),
        "model": f"{training.model_name}, {describe_window(predictor)}",
        "computed on": f"{describe_device(predictor.device)}, {config.precision}"
        + (f", {model_source.engine}" if model_source.engine != "torch" else ""),
    }
    return predictor, smoothing, calibration, metadata


def build_explainer(config: PredictConfig, predictor: "OnlinePredictor") -> "WindowExplainer":
    """What explains the labels of segments, by the method that does best for the model.

    Raises:
        UserError: the checkpoint cannot be read, or the method is not defined for the model.
    """
    from checkpoint import load_checkpoint, rebuild_model
    from config import from_dict
    from explanation.methods import advice, default_method
    from timeline.relevance import WindowExplainer

    state = load_checkpoint(config.run)
    name = from_dict(state["config"]).model_name
    method = default_method(name, of_class=True)
    warnings = advice(name, method)
    print("".join(f"{line}\n" for line in warnings), end="", flush=True)
    options = predictor.n_frames, predictor.device, warnings
    return WindowExplainer(rebuild_model(state), method, *options)


def own_device(name: str) -> str:
    """The GPU of this process among those of its machine, which torchrun numbers."""
    import torch

    if name not in ("auto", "cuda") or not torch.cuda.is_available():
        return name
    return f"cuda:{int(os.environ.get('LOCAL_RANK', '0')) % torch.cuda.device_count()}"


def describe_window(predictor: "OnlinePredictor") -> str:
    """What the model sees at once, in frames and in seconds."""
    frames, fps = predictor.n_frames, predictor.fps
    return f"windows of {frames} frames at {fps:.3g} frames per second = {predictor.window:.2f} s"


def predict(
    config: PredictConfig,
    archive: "Archive",
    todo: "Sequence[tuple[str | Path, Path]]",
    predictor: "OnlinePredictor",
    smoothing: "SmoothingConfig",
    calibration: "Calibration",
    frame_filter: "Callable[[np.ndarray], bool] | None",
    metadata: dict[str, str],
    explainer: "WindowExplainer | None" = None,
) -> list[str]:
    """Predict the timeline of each source, and write its results into its folder.

    Args:
        archive: keeps the record that a video is done.
        todo: the sources, each with the folder of its results.

    Returns:
        One error message per source that could not be predicted or whose results not be written.

    Raises:
        Interrupted: the process was asked to stop; the results so far are written.
    """
    from timeline.archive import video_state
    from timeline.output import advice, summary
    from timeline.overlay import EVERY_FRAME, write_overlay
    from timeline.predictor import VideoPredictor
    from timeline.sources import FileSource
    from utils.device import describe_device
    from utils.interrupt import Interrupt
    from video.container import ClipError

    failures, device = [], describe_device(predictor.device)
    interrupt = Interrupt()
    for number, (source, folder) in enumerate(todo, 1):
        counter = f"{number}/{len(todo)} " if len(todo) > 1 else ""
        is_file = isinstance(source, Path)
        state = video_state(source) if is_file else []
        try:
            options = predictor.fps, predictor.image_size, config.serve
            frames = open_source(source, *options, config.frame_rate, config.reconnect_timeout)
            with ExitStack() as stack:
                on_update = None
                if config.serve:
                    from web.live_server import LivePage

                    page = LivePage(predictor.classes, frames.name, config.host, config.port)
                    on_update = stack.enter_context(page).show
                    print(f"watch it at {page.address}", flush=True)
                video = stack.enter_context(
                    VideoPredictor(
                        frames, predictor, smoothing, folder, frame_filter, interrupt, on_update
                    )
                )
                timeline = video.run(f"{counter}{sanitize(Path(frames.name).name)}")
        except ClipError as error:
            failures.append(str(error))
            print(f"error: {error}", file=sys.stderr)
            if is_file:  # if not even that can be written, it is not done
                archive.record(source, folder, state, None, error.reason)
            continue
        timeline.notes += advice(timeline, calibration)
        rate = {"video": f"{frames.rate:.3g} frames per second"} if frames.rate else {}
        print(summary(timeline, video.seconds, frames, folder))
        path = source if isinstance(source, Path) and source.is_file() else None
        problems = [video.problem] * bool(video.problem)
        try:
            write_outputs(folder, timeline, path, {**metadata, **rate}, device)
        except UserError as error:
            problems.append(str(error))
        if config.overlay and not interrupt.signal:
            frames = FileSource(source, EVERY_FRAME, None)
            overlay = folder / "overlay.mp4"
            failed = write_overlay(overlay, frames, timeline, predictor.fps, interrupt)
            problems += failed
            if not failed:
                print(f"overlay: {sanitize(str(overlay))}")
        if explainer and not interrupt.signal:
            options = predictor.fps, predictor.image_size, False, config.frame_rate, 0.0
            frames = open_source(source, *options)
            notes = [f"relevance: {line.removeprefix('warning: ')}" for line in explainer.warnings]
            timeline.notes += notes
            about = {**metadata, **rate, "relevance": explainer.method}
            problems += write_explanation(
                folder, timeline, path, about, frames, explainer, interrupt
            )
        if is_file and not problems and not interrupt.signal:
            problem = archive.record(source, folder, state, timeline, video.broke_off)
            problems += [problem] * bool(problem)
        if problems:
            failures.append("; ".join(problems))
            print(f"error: {failures[-1]}", file=sys.stderr)
        interrupt.check()
    interrupt.restore()
    return failures


def write_explanation(
    folder: Path,
    timeline: "Timeline",
    video: Path | None,
    metadata: dict[str, str],
    source: "FrameSource",
    explainer: "WindowExplainer",
    interrupt: "Interrupt",
) -> list[str]:
    """Explain the segments of a timeline, write relevance.csv, and timeline.html anew.

    Args:
        source: the video again.
        interrupt: request to stop; nothing is written then.

    Returns:
        Why it could not be done, as a list of one line; an empty list if it could.
    """
    from timeline.relevance import explain_timeline, write_relevance
    from utils.files import write_all
    from utils.interrupt import Interrupted
    from web.timeline_page import write_timeline_page

    try:
        relevance = explain_timeline(source, timeline, explainer, interrupt)
        write_all(
            {
                folder / "relevance.csv": lambda p: write_relevance(p, timeline, relevance),
                folder / "timeline.html": lambda p: write_timeline_page(
                    p, timeline, video, metadata, relevance
                ),
            }
        )
        print(f"relevance: {sanitize(str(folder / 'relevance.csv'))}")
    except Interrupted:
        pass  # the caller sees the interrupt too
    except UserError as error:
        return [f"no relevance: {error}"]
    return []


def write_outputs(
    folder: Path, timeline: "Timeline", video: Path | None, metadata: dict[str, str], device: str
) -> None:
    """Write timeline.csv, .html, .vtt and .png and environment.json beside frames.csv.

    Raises:
        UserError: one of them could not be written; the others are.
    """
    from timeline.output import plot_timeline
    from timeline.segments import write_subtitles, write_timeline
    from utils.files import write_all
    from utils.run_dir import log_environment
    from web.timeline_page import write_timeline_page

    write_all(
        {
            folder / "timeline.csv": lambda p: write_timeline(p, timeline.segments),
            folder / "timeline.html": lambda p: write_timeline_page(p, timeline, video, metadata),
            folder / "timeline.vtt": lambda p: write_subtitles(p, timeline.segments),
            folder / "timeline.png": lambda p: plot_timeline(timeline, p),
            folder / "environment.json": lambda _: log_environment(folder, device),
        }
    )


@cli_main
def main() -> None:
    config = parse(PredictConfig, __doc__, old_names=OLD_NAMES)
    check_settings(config)
    shard = this_shard(config.shard)
    if shard and config.clips:
        raise UserError("--clips writes one table: start it once, without torchrun")
    if config.clips:
        from training.predict_clips import find_clips, predict_clips

        options = config.device, config.precision, config.num_workers, config.target_error
        options = *options, config.engine
        clips = find_clips(config.sources, config.data_root, config.path_column)
        predict_clips(config.run, clips, Path(config.clips), *options)
        return
    # Before the model is built: a misspelt name is found at once.
    sources = find_sources(config.sources, config.frame_rate)
    flag = "torchrun and --shard" if shard else "--skip-done" if config.skip_done else ""
    if flag and (other := [s for s in sources if not isinstance(s, Path)]):
        raise UserError(f"{flag}: for files and folders, not for {strip_credentials(other[0])}")
    if config.overlay and (other := [s for s in sources if not Path(s).is_file()]):
        source = strip_credentials(str(other[0]))
        raise UserError(f"--overlay reads the video twice: for a file, not for {source}")
    if config.explain and (other := [s for s in sources if not isinstance(s, Path)]):
        source = strip_credentials(other[0])
        raise UserError(
            f"--explain reads the video twice: for a file or a folder of images, not for {source}"
        )

    from timeline.archive import COLUMNS, Archive, fingerprint, summary_path
    from timeline.output import output_folders
    from timeline.predictor import load_frame_filter
    from utils.files import require_writable
    from utils.interrupt import Interrupted
    from utils.tables import require_own_table

    folders = output_folders(sources, config.output)
    table = summary_path(folders)
    if len(sources) > 1:
        require_own_table(table, COLUMNS)
    for folder in folders:
        require_writable(folder)
    frame_filter = load_frame_filter(config.out_of_body) if config.out_of_body else None
    if shard:
        config = dataclasses.replace(config, device=own_device(config.device))
    predictor, smoothing, calibration, metadata = build_predictor(config)

    run = Path(config.run)
    files = [run / "best.pt" if run.is_dir() else run]
    files += [Path(config.out_of_body.rpartition(":")[0])] if config.out_of_body else []
    settings = {k: v for k, v in vars(config).items() if k not in OF_THE_START}
    videos, shared = list(zip(sources, folders, strict=True)), bool(shard) or config.skip_done
    archive = Archive(videos, fingerprint(files, settings), shard, shared)
    todo = archive.remaining() if shared else videos
    print(f"the model sees {describe_window(predictor)}", flush=True)
    explainer = build_explainer(config, predictor) if config.explain else None
    try:
        options = predictor, smoothing, calibration, frame_filter, metadata, explainer
        failures = predict(config, archive, todo, *options)
    except Interrupted:
        print("interrupted: the results so far are written", file=sys.stderr)
        sys.exit(130)
    if len(sources) > 1 and (problem := archive.summarize(table, predictor.classes)):
        failures.append(problem)
    elif shard and all(archive.read(*video) for video in todo):
        return  # what is unreadable is in the summary: torchrun would end the other processes
    if failures:
        count = f"{len(failures)} of {len(sources)} videos"
        raise UserError(f"{count} could not be predicted or written (see above)")


if __name__ == "__main__":
    main()
