"""Evaluate a checkpoint on a split, or predicted timelines of whole videos.

    python evaluate.py runs/20260101-120000_tsm_resnet             the test split
    python evaluate.py RUN --split val --views 2                   another split, two views per clip
    python evaluate.py best.pt --data-root /data/SLAM --csv other_hospital.csv
    python evaluate.py RUN --shuffle-frames                        how much accuracy is from motion?
    python evaluate.py RUN --logit-adjust-tau 1                    for classes of equal size
    python evaluate.py RUN --corruptions                           what do smoke, blood ... cost?
    python evaluate.py tsm.onnx --data-root /data/SLAM             a file of export.py
    python evaluate.py timeline operation.csv operation.mp4.timeline
    python evaluate.py timeline truth/ predictions/ --relaxed 5 --output scores/

The checkpoint holds everything that is needed to rebuild the model. The results and their pictures
go into a folder inside the run. `timeline` needs no model; timeline/metrics.py says what its scores
mean.
"""

# Everything that imports torch is imported where it is used: --help and `timeline` do without.
import dataclasses
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from clips.manifest import ClipRow, read_manifest
from clips.manifest_formats import ManifestOptions, read_records
from clips.splits import patient_overlap
from config import EngineName, Precision, TrainConfig, fitted_splits, from_dict, manifest_paths
from utils.cli import cli_main, parse
from utils.errors import ResultWarning, UserError, format_warning

if TYPE_CHECKING:
    from evaluation.predictions import Predictions

CorruptionName = Literal[
    "smoke",
    "blood_splash",
    "lens_fog",
    "specular_glare",
    "low_light",
    "motion_blur",
    "defocus",
    "compression",
    "frame_drop",
    "frame_freeze",
]


@dataclass(frozen=True)
class EvaluateConfig(ManifestOptions):
    """The checkpoint, and the clips to evaluate it on."""

    checkpoint: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """a run folder (its best.pt is used), a checkpoint, or a file of export.py"""
    split: Literal["train", "val", "test"] = "test"
    """split of the run"""
    csv: str = ""
    """a manifest, or a folder of clips per class, instead of a split of the run (of a table with a
    column of splits, the clips of --split)"""
    data_root: str = ""
    """folder of the clips (empty: the one of the training; for --csv, the manifest's own)"""
    cache: str | None = None
    """folder of cached clips; empty: decode (None: as in training; for --csv, decode)"""
    views: int | None = None
    """temporal views per clip, whose probabilities are averaged (None: as in training)"""
    crops: Literal[1, 3, 5] | None = None
    """spatial crops per view: the whole frame, 3 along its width, or 5 (None: as in training). A
    clip then costs views x crops times as much"""
    shuffle_frames: bool = False
    """shuffle the frames of each clip: the accuracy that is lost came from motion"""
    logit_adjust_tau: float = 0.0
    """subtract tau times the log frequency of the classes in training from the logits, as if all
    classes were equally frequent (0: no adjustment, 1: the full one; see training/losses.py)"""
    corruptions: tuple[CorruptionName, ...] | None = None
    """also evaluate on corrupted clips, 5 severities each: the named corruptions, or all ten if
    none is named"""
    target_error: float | None = None
    """error rate among the answered clips that the confidence threshold aims at (None: as in
    training)"""
    skip_unreadable: bool = False
    """leave out clips that cannot be read and report how many"""
    batch_size: int | None = None
    """clips per batch (None: as in training)"""
    num_workers: int = 2
    """processes that read clips"""
    device: str = "auto"
    """device: auto, cpu, cuda, cuda:1, mps"""
    precision: Precision = "fp32"
    """precision of the forward pass"""
    engine: EngineName | None = None
    """what computes the model: torch, openvino, onnxruntime, or auto, the one that is fastest in a
    trial here (None: torch; for an exported file the engine that it was exported for)"""
    output: str = ""
    """folder for the results (empty: a folder inside the run, named after what was evaluated)"""

    def __post_init__(self) -> None:
        given = (self.views, self.batch_size)
        if any(n is not None and n < 1 for n in given) or self.num_workers < 0:
            raise UserError("views and batch_size must be at least 1, num_workers at least 0")
        if self.target_error is not None and not 0 <= self.target_error <= 1:
            raise UserError(f"target_error = {self.target_error}: must be from 0 to 1")
        if not 0 <= self.logit_adjust_tau <= 5:
            raise UserError(f"logit_adjust_tau = {self.logit_adjust_tau}: must be from 0 to 5")


@dataclass
class TimelineConfig:
    """True and predicted timelines of whole videos."""

    truth: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="TRUTH")]
    """a timeline.csv (columns start, end, label and, with several videos, video), or an annotation
    of Cholec80, CholecT50, ELAN, BORIS or Audacity; or a folder of them, named like the videos"""
    prediction: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PREDICTION")]
    """a timeline.csv, a folder of predict.py, or a folder that holds <video>.mp4.timeline/ or
    <video>.csv for each video"""
    relaxed: float = 0.0
    """also scores that forgive boundaries that are shifted by up to this many seconds"""
    output: str = ""
    """folder for timeline_metrics.json (empty: it is not written)"""
    tier: tuple[str, ...] = ()
    """tiers, categories or behaviours of the truth, where it has several that overlap"""
    annotation_fps: float = 25.0
    """frames per second of frame numbers in the truth (Cholec80's phases)"""


def output_folder(config: EvaluateConfig) -> Path:
    """A folder whose name says what was evaluated."""
    if config.output:
        return Path(config.output)
    checkpoint = Path(config.checkpoint)
    parts = ["evaluate"]
    parts += [checkpoint.stem] * (checkpoint.is_file() and checkpoint.stem != "best")
    parts.append(Path(config.csv).stem if config.csv else config.split)
    parts += [f"{name}{n}" for name in ("views", "crops") if (n := getattr(config, name))]
    parts += ["shuffled"] * config.shuffle_frames
    parts += [f"adjusted{config.logit_adjust_tau:g}"] * bool(config.logit_adjust_tau)
    parts += [checkpoint.suffix[1:]] * (checkpoint.suffix in (".onnx", ".xml"))
    parts += [str(config.engine)] * (config.engine not in (None, "torch"))
    return (checkpoint if checkpoint.is_dir() else checkpoint.parent) / "_".join(parts)


def evaluation_settings(config: EvaluateConfig, training: TrainConfig) -> TrainConfig:
    """The settings of the training, with those that the evaluation changes.

    Raises:
        UserError: they cannot be evaluated like this.
    """
    from video.motion import Modality

    if config.corruptions is not None and Modality.parse(training.modality).stored_motion:
        raise UserError(
            f"{config.checkpoint}: was trained with modality {training.modality}, and a corrupted "
            "frame would keep the motion of the clean one: leave --corruptions out"
        )
    cache = ("" if config.csv else training.cache) if config.cache is None else config.cache
    settings = dataclasses.replace(
        training,
        data_root=config.data_root or training.data_root,
        batch_size=config.batch_size or training.batch_size,
        num_workers=config.num_workers,
        cache=cache,
        test_views=config.views or training.test_views,
        test_crops=config.crops or training.test_crops,
    )
    if settings.test_views > 1 and settings.eval_sampling == "first":
        raise UserError("views: the model was trained on the first frames of a clip, one view only")
    return settings


def load_rows(
    config: EvaluateConfig, settings: TrainConfig, training: TrainConfig
) -> tuple[list[ClipRow], list[ResultWarning]]:
    """The clips to evaluate on, and warnings about patients that the model has seen.

    Raises:
        UserError: a manifest is wrong.
    """
    if config.csv:
        refuse_unlabelled(config)
        options = ManifestOptions.of(config)
        root, classes = config.data_root or None, settings.classes
        rows = read_manifest(config.csv, root, classes, options, config.split)
        return rows, warn_seen_patients(rows, training, Path(config.csv).stem)
    from training.loaders import load_splits

    splits, warnings = load_splits(settings), []
    if config.split in fitted_splits(training)[1:]:
        text = f"the head was fitted to the {config.split} clips too: their numbers measure memory"
        warnings = [ResultWarning(kind="leakage", text=text)]
    return splits[config.split], patient_overlap(splits) + warnings


def refuse_unlabelled(config: EvaluateConfig) -> None:
    """Raise a UserError if the manifest names no class at all: what gives the answers alone."""
    records, _ = read_records(Path(config.csv), ManifestOptions.of(config), labels=False)
    if not records or any(record.label for record in records):
        return
    words = ["python", "predict.py", config.checkpoint, config.csv]
    words += ["--data-root", config.data_root] if config.data_root else []
    words += ["--clips", f"{Path(config.csv).stem}_answers.csv"]
    raise UserError(
        f"{config.csv}: has no labels to compare the answers with; for the answers alone, run "
        f"{shlex.join(words)}"
    )


def warn_seen_patients(
    rows: Sequence[ClipRow], training: TrainConfig, name: str
) -> list[ResultWarning]:
    """Warnings that the manifest `name` has patients that the model was trained or chosen on, or
    that this is not known.

    The patients are compared by the manifests of the training, if these are still there; the clips
    of the training need not be.
    """
    if not training.data_root:  # trained on the rendered demo data
        return []
    warnings: list[ResultWarning] = []
    splits: dict[str, Sequence[ClipRow]] = {}
    found, options = manifest_paths(training), ManifestOptions.of(training)
    for split in ("train", "val"):
        manifest = found if isinstance(found, Path) else found[split]
        records, problems = read_records(manifest, options)
        if problems:
            text = f"patients were not compared with the training's {split}: {manifest}"
            warnings.append({"kind": "other", "text": text})
        seen = [ClipRow(Path(record.path), 0, record.patient) for record in records]
        splits[f"the training's {split}"] = seen
    return patient_overlap({**splits, name: rows}, compared=name) + warnings


def evaluate_checkpoint(config: EvaluateConfig) -> None:
    """Evaluate, write the results and print them.

    Raises:
        UserError: something is wrong with the checkpoint, the clips or the settings.
    """
    from clips.corruptions import CORRUPTIONS, Corrupt, ShuffleFrames
    from deployment.loading import ModelSource
    from evaluation.calibration import load_calibration
    from evaluation.results import write_results
    from evaluation.robustness import measure_robustness
    from modeling.encoders import licence_warning
    from training.engine import evaluate
    from training.leakage import pretraining_leaks
    from training.loaders import eval_loader, open_cache
    from training.losses import logit_adjustment, warn_double_adjustment
    from utils.device import describe_device
    from utils.files import require_writable
    from utils.run_dir import command, log_environment

    # checkpoint
    source = ModelSource(config.checkpoint, config.engine, config.device, config.precision)
    state, device, dtype = source.state, source.device, source.dtype
    training = from_dict(state["config"])
    if source.exported and not (config.csv or config.data_root):
        raise UserError(
            f"{config.checkpoint}: an exported file does not say where clips are: give --data-root "
            "or --csv"
        )
    settings = evaluation_settings(config, training)
    calibration = load_calibration(state, config.target_error, config.checkpoint)
    adjustment = logit_adjustment(state, config.logit_adjust_tau, config.checkpoint)

    folder = output_folder(config)
    require_writable(folder)

    # data
    rows, warnings = load_rows(config, settings, training)
    if source.exported:
        warnings.append(
            {
                "kind": "leakage",
                "text": "an exported file does not name the patients of its training: whether the "
                "model has seen these is not known (evaluate the run to find out)",
            }
        )
    model = source.build()
    warnings += warn_double_adjustment(settings, config.logit_adjust_tau)
    warnings += licence_warning(state.get("pretrained", {}))
    cache = open_cache(settings)
    split = Path(config.csv).stem if config.csv else config.split
    compared = {Path(config.csv).name if config.csv else split: rows}
    allowing = dataclasses.replace(settings, allow_pretraining_leak=True)  # a warning will do
    warnings += pretraining_leaks(state.get("pretraining", {}), compared, allowing)
    engine = "" if source.engine == "torch" else f", {source.engine}"
    hardware = f"{describe_device(device)}, {dtype}{engine}"
    print(f"{settings.model_name} on {len(rows)} {split} clips, {hardware}")
    num_views = settings.test_views * settings.test_crops
    if num_views > 1:
        print(f"{num_views} views of each clip, at {num_views} times the cost of one")
    for warning in warnings:
        print(format_warning(warning))

    # evaluation
    shuffle = [ShuffleFrames()] if config.shuffle_frames else []

    def predict(corruption: str = "", severity: int = 0) -> "Predictions":
        corrupt = [Corrupt(corruption, severity)] if corruption else []
        views, crops = settings.test_views, settings.test_crops
        return evaluate(
            model,
            eval_loader(rows, settings, cache, views, crops, [*corrupt, *shuffle]),
            device,
            dtype,
            f"{corruption} {severity}" if corruption else split,
            config.skip_unreadable,
            temperature=calibration.temperature,
            logit_adjustment=adjustment,
            with_features=not corruption,
        )

    predictions = predict()

    # results
    metadata = {
        "checkpoint": str(Path(config.checkpoint).absolute()),
        "command": command(),
        "engine": source.engine,
        "split": split,
        "csv": config.csv,
        "views": settings.test_views,
        "crops": settings.test_crops,
        "shuffle_frames": config.shuffle_frames,
        "logit_adjust_tau": config.logit_adjust_tau,
        "warnings": warnings,
    }
    write_results(predictions, state["classes"], folder, [calibration], metadata, show=print)
    log_environment(folder, describe_device(device))
    for earlier in folder.glob("robustness.*"):
        earlier.unlink()  # results of an earlier evaluation
    if config.corruptions is not None:
        corruptions = config.corruptions or tuple(CORRUPTIONS)
        measure_robustness(predict, predictions, corruptions, folder)
    print(f"results: {folder}")


@cli_main
def main() -> None:
    if sys.argv[1:2] == ["timeline"]:
        from timeline.results import evaluate_timelines

        config = parse(TimelineConfig, __doc__, subcommand="timeline")
        paths = config.truth, config.prediction
        evaluate_timelines(
            *paths, config.relaxed, config.output, config.tier, config.annotation_fps
        )
        return
    if "--timeline" in sys.argv:
        raise UserError("timelines are evaluated by: python evaluate.py timeline TRUTH PREDICTION")
    old_names = {
        "adjust": "logit_adjust_tau",
        "amp": "precision",
        "wanted_error": "target_error",
        "workers": "num_workers",
    }
    evaluate_checkpoint(parse(EvaluateConfig, __doc__, old_names=old_names))


if __name__ == "__main__":
    main()
