"""What happens when in a whole operation, or right now.

    python predict.py runs/20260101-120000_tsm operation.mp4        files, as many as you like
    python predict.py RUN /data/operations                          all videos of a folder
    python predict.py RUN 0 --serve                                 a camera, shown in the browser
    python predict.py RUN rtsp://192.168.0.7/stream                 a network stream
    cat operation.ts | python predict.py RUN -                      a pipe

For operation.mp4 the folder operation.mp4.timeline beside it gets timeline.csv, frames.csv,
timeline.vtt (subtitles), timeline.png and timeline.html: open that one. Ctrl-C ends the work and
writes what is known by then.
"""

import math
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from checkpoint import build_from_checkpoint, load_checkpoint
from config import from_dict
from evaluation.calibration import Calibration
from timeline.live_source import LiveSource, is_live
from timeline.output import output_folders, plot_timeline
from timeline.predictor import Follower, Recipe, load_hook
from timeline.segments import MARKS, Timeline, write_subtitles, write_timeline
from timeline.sources import FileSource, PipeSource, Source
from timeline.streaming import Memory, can_stream
from utils.cli import script
from utils.device import choose_device, choose_precision, describe_device
from utils.errors import UserError
from utils.files import remove_unfinished
from utils.interrupt import Interrupt, Interrupted
from utils.run_dir import command, printable, record_session
from video.container import ClipError
from video.motion import brought
from web.live_server import LivePage
from web.timeline_page import write_timeline_page

VIDEOS = {".mp4", ".mkv", ".mov", ".avi", ".m4v", ".mpg", ".mpeg", ".ts", ".mts", ".m2ts", ".webm",
          ".wmv", ".flv", ".ivf", ".3gp", ".ogv", ".vob", ".mxf", ".asf"}  # fmt: skip


@dataclass
class PredictConfig:
    """What to look at, and how."""

    run: Annotated[str, tyro.conf.Positional]
    """a run folder (its best.pt) or a checkpoint file"""
    inputs: Annotated[tuple[str, ...], tyro.conf.Positional]
    """video files, folders of them, a camera's number, a stream's address, or - for a pipe"""
    output: str = ""
    """folder for the results (empty: beside each video; of live sources predictions/)"""

    n_frames: int | None = None
    """frames that an answer looks at (None: as in training)"""
    rate: float | None = None
    """frames a second that the model is shown (None: as in training)"""
    stride: int | None = None
    """frames from one window to the next, for models that cannot be streamed (None: a quarter of
    n_frames); the others answer at every frame"""
    memory: Memory = "window"
    """what a CNN-LSTM remembers: the last n_frames frames, or its LSTM's state since the start"""

    smoothing: Literal["auto", "viterbi", "causal", "none"] = "auto"
    """viterbi looks at the whole video, causal at the past only (auto: causal for live sources)"""
    segment_seconds: float = 10.0
    """how long an action lasts, about"""
    minimum_seconds: float = 1.0
    """shorter segments are smoothed away"""
    wanted_error: float | None = None
    """share of wrong answers to keep by saying `uncertain` (None: as in training)"""
    out_of_body: str = ""
    """detector.py:function, your own: gets a frame (H, W, 3), uint8 RGB of the model's size, and
    says whether it was taken outside the patient; such frames are marked, and shown to nobody"""

    serve: bool = False
    """show what is going on in the browser"""
    host: str = "127.0.0.1"
    """where the page can be reached: this machine alone, unless you change it"""
    port: int = 0
    """of the page (0: any that is free)"""
    give_up: float = 0.0
    """seconds after which a lost live stream is given up (0: never)"""

    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps"""
    amp: Literal["auto", "fp32", "bf16", "fp16"] = "fp32"
    """precision of the forward pass"""


def make_recipe(config: PredictConfig) -> tuple[Recipe, dict[str, str]]:
    """How all inputs are followed, and what is to be told about it.

    Raises:
        UserError: settings that cannot work.
    """
    state = load_checkpoint(config.run)
    training = from_dict(state["config"])
    if brought(training.inputs) != "rgb":
        raise UserError(
            f"{config.run}: was trained with {training.inputs}, which is for clips only: "
            "for whole videos train with inputs rgb or gradients"
        )
    for name in ("n_frames", "stride", "rate", "segment_seconds"):
        value = getattr(config, name)
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"{name} = {value}: must be a number above 0")
    for name in ("minimum_seconds", "give_up"):
        if not 0 <= getattr(config, name) < math.inf:
            raise UserError(f"{name} = {getattr(config, name)}: must be 0 or more")
    n_frames = config.n_frames or training.n_frames
    if training.model == "vivit" and n_frames != training.n_frames:
        raise UserError(f"n_frames = {n_frames}: this ViViT is made for {training.n_frames} frames")
    rate = config.rate or state.get("frame_rate")
    if not rate:
        raise UserError(
            f"{config.run}: does not know at which frame rate it was trained (an older checkpoint):"
            " give --rate, the frames a second it saw, e.g. 16 frames of a clip of 1.2 s: 13.3"
        )
    classes = tuple(state["classes"])
    if taken := set(classes) & set(MARKS):
        raise UserError(f"a class is called {', '.join(taken)}, which means something else here")
    calibration = Calibration.from_state(state.get("calibration"))
    if config.wanted_error is not None:
        if not 0 <= config.wanted_error <= 1 or not calibration.right:
            raise UserError("--wanted-error must be from 0 to 1, and the run be calibrated")
        calibration = calibration.with_wanted_error(config.wanted_error)
    device = choose_device(config.device)
    model = build_from_checkpoint(state)
    if config.memory == "state" and not can_stream(model, "state"):
        raise UserError("--memory state is for a CNN-LSTM that reads forward only")
    recipe = Recipe(
        model=model,
        classes=classes,
        n_frames=n_frames,
        image_size=training.image_size,
        rate=float(rate),
        stride=config.stride or max(1, n_frames // 4),
        memory=config.memory,
        calibration=calibration,
        smoothing=config.smoothing,
        segment_seconds=config.segment_seconds,
        minimum_seconds=config.minimum_seconds,
        out_of_body=load_hook(config.out_of_body) if config.out_of_body else None,
        device=device,
        dtype=choose_precision(config.amp, device),
    )
    facts = {
        "command": command(),
        "model": f"{training.model}, {n_frames} frames at {rate:.3g} frames a second",
        "computed on": f"{describe_device(device)}, {config.amp}",
    }
    return recipe, facts


def find_inputs(inputs: tuple[str, ...]) -> list[str | Path]:
    """The inputs one by one: addresses and camera numbers as they are, folders as their videos.

    Raises:
        UserError: there are none; a name is neither file, folder, camera nor address.
    """
    found: list[str | Path] = []
    for text in inputs:
        path = Path(text)
        if text == "-" or (is_live(text) and not path.exists()):
            found.append(text)
        elif path.is_dir():
            videos = [
                file
                for file in sorted(path.rglob("*"))
                if file.suffix.lower() in VIDEOS and file.is_file() and file.name[0] != "."
            ]
            if not videos:
                raise UserError(f"{path}: no videos in this folder ({', '.join(sorted(VIDEOS))})")
            found += videos
        elif path.exists():
            found.append(path)
        else:
            raise UserError(f"{text}: no such file, and neither a camera's number nor an address")
    if not found:
        raise UserError("nothing to look at: give a video file, a folder, a camera's number ...")
    if len(found) > 1 and any(isinstance(one, str) for one in found):
        raise UserError("a live source or a pipe goes alone: start one process for each")
    return list({one if isinstance(one, str) else one.resolve(): one for one in found}.values())


def open_source(name: str | Path, recipe: Recipe, config: PredictConfig) -> Source:
    """The source that an input means."""
    how = recipe.rate, recipe.image_size, config.serve
    if isinstance(name, Path):
        return FileSource(name, *how)
    return PipeSource(*how) if name == "-" else LiveSource(name, *how, config.give_up)


def predict(
    recipe: Recipe, config: PredictConfig, names: list[str | Path], facts: dict[str, str]
) -> list[str]:
    """Follow the inputs one by one, and write what was seen.

    Returns:
        What went wrong, a line for each input that could not be read.

    Raises:
        Interrupted: after the results so far were written.
    """
    failures = []
    interrupt = Interrupt()
    folders = output_folders(names, config.output)
    for number, (name, folder) in enumerate(zip(names, folders, strict=True), 1):
        counted = f"{number}/{len(names)} " if len(names) > 1 else ""
        try:
            source = open_source(name, recipe, config)
            with ExitStack() as stack:
                show = None
                if config.serve:
                    page = LivePage(recipe.classes, source.name, config.host, config.port)
                    show = stack.enter_context(page).show
                    print(f"watch it at {page.address}", flush=True)
                follower = stack.enter_context(Follower(source, recipe, folder, interrupt, show))
                timeline = follower.follow(f"{counted}{printable(Path(source.name).name)}")
        except ClipError as error:
            failures.append(str(error))
            print(f"error: {error}", file=sys.stderr)
            continue
        record_session(folder, describe_device(recipe.device))
        write_outputs(folder, timeline, name if isinstance(name, Path) else None, facts)
        print(_summary(timeline, follower.seconds, source.live, folder))
        interrupt.check()
    interrupt.restore()
    return failures


def _summary(timeline: Timeline, seconds: float, live: bool, folder: Path) -> str:
    """What was found, how fast, and where it is."""
    times = {}
    for segment in timeline.segments:
        times[segment.label] = times.get(segment.label, 0.0) + segment.duration
    longest = sorted(times.items(), key=lambda pair: -pair[1])
    lines = [f"note: {note}" for note in timeline.notes]
    lines += [f"{label:>16} {time:9.1f} s" for label, time in longest]
    said = f"{len(timeline.segments)} segments in {timeline.duration:.1f} s of video"
    if not live:
        said += f", {timeline.duration / max(seconds, 1e-9):.1f} times as fast as it plays"
    lines.append(said)
    return "\n".join([*lines, f"open {printable(str(folder / 'timeline.html'))}"])


def write_outputs(
    folder: Path, timeline: Timeline, video: Path | None, facts: dict[str, str]
) -> None:
    """Write timeline.csv, timeline.vtt, timeline.png and timeline.html; frames.csv is there."""
    remove_unfinished(folder)
    write_timeline(folder / "timeline.csv", timeline.segments)
    write_subtitles(folder / "timeline.vtt", timeline.segments)
    plot_timeline(timeline, folder / "timeline.png")
    write_timeline_page(folder / "timeline.html", timeline, video, facts)


@script
def main() -> None:
    config = tyro.cli(PredictConfig, description=__doc__)
    names = find_inputs(config.inputs)  # before the model: a misspelt name is told at once
    recipe, facts = make_recipe(config)
    try:
        failures = predict(recipe, config, names, facts)
    except Interrupted:
        print("interrupted: what was known by then is written", file=sys.stderr)
        sys.exit(130)
    if failures:
        raise UserError(f"{len(failures)} of {len(names)} videos could not be read (told above)")


if __name__ == "__main__":
    main()
