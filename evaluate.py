"""Evaluate a checkpoint on a split, or predicted timelines of whole videos.

    python evaluate.py runs/20260101-120000_tsm                    the test split
    python evaluate.py runs/20260101-120000_tsm --split val --views 2
    python evaluate.py best.pt --data-root /data/SLAM --csv other_hospital.csv
    python evaluate.py RUN --shuffle-frames                        how much of it is motion?
    python evaluate.py RUN --adjust 1                              as if classes were of equal size
    python evaluate.py RUN --corruptions                           what do smoke, blood ... cost?
    python evaluate.py --timeline operation.csv operation.mp4.timeline
    python evaluate.py --timeline truth/ predictions/ --relaxed 5 --output judged/

Everything needed to rebuild the model is in the checkpoint. Results go into a folder of the run.
With --timeline no model is needed: see timeline_metrics.py for what the scores mean.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from checkpoint import build_from_checkpoint, load_checkpoint
from clips.corruptions import CORRUPTIONS, Corruption
from clips.manifest import ClipRow, patient_overlap, read_manifest
from clips.manifest_formats import read_records
from config import TrainConfig, from_dict, manifest_paths
from evaluation.calibration import Calibration
from evaluation.predictions import Predictions
from evaluation.results import write_results
from evaluation.robustness import measure_robustness
from timeline.results import evaluate_timelines
from training.engine import evaluate
from training.loaders import eval_loader, load_splits
from training.losses import adjusted_twice, post_hoc_shift
from utils.cli import script
from utils.device import choose_device, choose_precision, describe_device
from utils.errors import UserError
from utils.run_dir import command, record_session
from video.motion import brought


@dataclass
class EvaluateConfig:
    """What to evaluate, on what."""

    checkpoint: Annotated[str, tyro.conf.Positional] = ""
    """a run folder (its best.pt) or a checkpoint file; none with --timeline"""
    split: Literal["train", "val", "test"] = "test"
    """which of the run's splits"""
    csv: str = ""
    """a manifest to evaluate on instead of a split"""
    data_root: str = ""
    """where the clips are now (empty: where they were in training; for --csv, beside it)"""
    cache: str | None = None
    """folder of cached clips; empty: decode (None: as in training; for --csv, decode)"""
    views: int | None = None
    """temporal views of each clip, their probabilities averaged (None: as in training)"""
    crops: Literal[1, 3, 5] | None = None
    """spatial crops of each view: the whole picture, 3 along its width, 5 (None: as in training).
    A clip then costs views x crops times as much"""
    shuffle_frames: bool = False
    """shuffle each clip's frames in time: what is lost came from motion"""
    adjust: float = 0.0
    """TAU: subtract TAU x the log of the classes' shares of the training clips from the logits, for
    classes as if of equal size (0: do not; 1: wholly; see losses.py)"""
    corruptions: tuple[Corruption, ...] | None = None
    """also test on corrupted clips, 5 severities each: these, or none named for all ten"""
    wanted_error: float | None = None
    """share of wrong answers to keep by saying `uncertain` (None: as in training)"""
    skip_unreadable: bool = False
    """leave out clips that cannot be read, and say how many"""
    batch_size: int | None = None
    """clips a batch (None: as in training)"""
    workers: int = 2
    """processes that decode clips"""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps"""
    amp: Literal["auto", "fp32", "bf16", "fp16"] = "fp32"
    """precision of the forward pass"""
    output: str = ""
    """folder for the results (empty: a folder of its own inside the run; with --timeline: none)"""
    timeline: tuple[str, str] | None = None
    """truth and prediction of whole videos instead of a checkpoint: each a timeline.csv
    (start,end,label and, of several videos, video), or a folder: <video>.csv of the truth,
    <video>.mp4.timeline/ of predict.py or <video>.csv of the prediction"""
    relaxed: float = 0.0
    """with --timeline: also scores that forgive boundaries shifted by this many seconds"""


def output_folder(config: EvaluateConfig) -> Path:
    """A folder that says by its name what was evaluated."""
    if config.output:
        return Path(config.output)
    place = Path(config.checkpoint)
    parts = ["evaluate"] + [place.stem] * (place.is_file() and place.stem != "best")
    parts.append(Path(config.csv).stem if config.csv else config.split)
    parts += [f"{name}{n}" for name in ("views", "crops") if (n := getattr(config, name))]
    parts += ["shuffled"] * config.shuffle_frames
    parts += [f"adjust{config.adjust:g}"] * bool(config.adjust)
    return (place if place.is_dir() else place.parent) / "_".join(parts)


def _cache(config: EvaluateConfig, training: TrainConfig) -> str:
    if config.cache is not None:
        return config.cache
    return "" if config.csv else training.cache


def _seen_patients(rows: Sequence[ClipRow], training: TrainConfig, name: str) -> list[str]:
    """Warnings if another manifest has patients that the model was trained or chosen on.

    By the names in the manifests of its training, if they are still there; the clips need not be.
    """
    if not training.data_root or not any(row.patient for row in rows):
        return []
    warnings = []
    for split in ("train", "val"):
        manifest = manifest_paths(training)[split]
        records, problems = read_records(manifest)
        seen = [ClipRow(Path(record.path), 0, record.patient) for record in records]
        warnings += patient_overlap({f"the training's {split}": seen, name: rows})
        if problems:
            warnings.append(f"patients were not compared with the training's {split}: {manifest}")
    return warnings


def _other_threshold(calibration: Calibration, config: EvaluateConfig) -> Calibration:
    if not calibration.right:
        raise UserError(
            f"{config.checkpoint}: was not calibrated on validation clips, so there is nothing to "
            "choose a threshold from (leave --wanted-error out)"
        )
    return calibration.with_wanted_error(config.wanted_error)


def _only_for_checkpoints(config: EvaluateConfig) -> list[str]:
    """Which options were given that mean nothing with --timeline."""
    fields = {field.name: field.default for field in dataclasses.fields(config)}
    given = [name for name, default in fields.items() if getattr(config, name) != default]
    return [name for name in given if name not in ("timeline", "relaxed", "output")]


@script
def main() -> None:
    config = tyro.cli(EvaluateConfig, description=__doc__)
    if config.timeline:
        if senseless := _only_for_checkpoints(config):
            raise UserError(
                f"--timeline judges files, without a model: leave out {', '.join(senseless)}"
            )
        print(evaluate_timelines(*config.timeline, config.relaxed, config.output))
        return
    if config.relaxed:
        raise UserError("--relaxed is for --timeline: clips have no boundaries")
    if not config.checkpoint:
        raise UserError("name a run folder or a checkpoint, or --timeline TRUTH PREDICTION")
    given = (config.views, config.batch_size)
    if any(n is not None and n < 1 for n in given) or config.workers < 0:
        raise UserError("views and batch_size must be at least 1, workers at least 0")
    if config.wanted_error is not None and not 0 <= config.wanted_error <= 1:
        raise UserError(f"wanted_error = {config.wanted_error}: must be from 0 to 1")
    if not 0 <= config.adjust <= 5:
        raise UserError(f"adjust = {config.adjust}: must be from 0 to 5")
    state = load_checkpoint(config.checkpoint)
    shift = post_hoc_shift(state, config.adjust, config.checkpoint)
    training = from_dict(state["config"])
    if config.corruptions is not None and brought(training.inputs) != "rgb":
        raise UserError(
            f"{config.checkpoint}: was trained with {training.inputs}, and a corrupted picture "
            "would keep the motion of the clean one: leave --corruptions out"
        )
    training = dataclasses.replace(
        training,
        data_root=config.data_root or training.data_root,
        batch_size=config.batch_size or training.batch_size,
        workers=config.workers,
        cache=_cache(config, training),
        test_views=config.views or training.test_views,
        test_crops=config.crops or training.test_crops,
    )
    if training.test_views > 1 and training.eval_sampling == "first":
        raise UserError("views: the model was trained on the first frames of a clip, one view only")
    device = choose_device(config.device)
    dtype = choose_precision(config.amp, device)
    model = build_from_checkpoint(state)
    if config.csv:
        rows = read_manifest(config.csv, config.data_root or None, training.classes)
        warnings = _seen_patients(rows, from_dict(state["config"]), Path(config.csv).stem)
    else:
        splits = load_splits(training)
        rows, warnings = splits[config.split], patient_overlap(splits)

    def answer(corruption: tuple[Corruption, int] | None = None) -> Predictions:
        views, crops = training.test_views, training.test_crops
        loader = eval_loader(rows, training, views, config.shuffle_frames, corruption, crops)
        name = f"{corruption[0]} {corruption[1]}" if corruption else what
        skip, temperature = config.skip_unreadable, calibration.temperature
        return evaluate(
            model, loader, device, dtype, name, skip, temperature=temperature, shift=shift
        )

    warnings += adjusted_twice(training, config.adjust)
    what = Path(config.csv).stem if config.csv else config.split
    print(f"{training.model} on {len(rows)} {what} clips, {describe_device(device)}, {dtype}")
    if (looks := training.test_views * training.test_crops) > 1:
        print(f"{looks} looks at each clip, at {looks} times the cost of one")
    print("\n".join(warnings), end="\n" if warnings else "")
    calibration = Calibration.from_state(state.get("calibration"))
    if config.wanted_error is not None:
        calibration = _other_threshold(calibration, config)
    predictions = answer()
    folder = output_folder(config)
    folder.mkdir(parents=True, exist_ok=True)
    record_session(folder, describe_device(device))
    for earlier in folder.glob("robustness.*"):
        earlier.unlink()  # it fits the new results no longer
    facts = {
        "checkpoint": str(Path(config.checkpoint).absolute()),
        "command": command(),
        "split": what,
        "csv": config.csv,
        "views": training.test_views,
        "crops": training.test_crops,
        "shuffle_frames": config.shuffle_frames,
        "adjust": config.adjust,
        "warnings": warnings,
    }
    print(write_results(predictions, state["classes"], folder, [calibration], facts))
    if config.corruptions is not None:
        print(measure_robustness(answer, predictions, config.corruptions or CORRUPTIONS, folder))
    print(f"results: {folder}")


if __name__ == "__main__":
    main()
