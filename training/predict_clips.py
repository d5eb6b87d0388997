"""The answers of a trained model for clips without labels: `predict.py RUN SOURCES --clips`."""

import dataclasses
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from clips.manifest import ClipRow, class_problems, read_paths
from clips.manifest_formats import ManifestOptions
from config import EngineName, Precision, from_dict
from deployment.loading import ModelSource
from evaluation.calibration import load_calibration
from evaluation.clip_answers import COLUMNS, clip_answers, describe_answers, write_answers
from evaluation.novelty import NoveltyReference
from training.engine import NoClipError, evaluate
from training.loaders import eval_loader
from utils.device import describe_device
from utils.errors import UserError
from utils.files import make_folder, require_writable
from utils.tables import require_own_table
from utils.text_table import list_some
from video.files import videos_below

MANIFESTS = (".csv", ".tsv", ".txt", ".xlsx")


def find_clips(sources: Sequence[str], data_root: str = "", path_column: str = "") -> list[Path]:
    """The distinct clips of files, folders and manifests, in this order; labels do not count.

    Raises:
        UserError: there is none; a source is none of these, or holds no clip; a manifest has
            problems.
    """
    if not sources:
        raise UserError(
            "no source: name video files, folders or manifests; --clips names the table that the "
            "answers are written into"
        )
    clips: list[Path] = []
    for text in sources:
        path = Path(text)
        if path.is_dir():
            clips += videos_below(path)
        elif path.suffix.lower() in MANIFESTS:
            clips += read_paths(path, data_root or None, ManifestOptions(path_column=path_column))
        elif path.is_file():
            clips.append(path)
        else:
            raise UserError(
                f"{text}: no such file; --clips takes video files, folders and manifests"
            )
    distinct: dict[str, Path] = {}
    for path in clips:
        distinct.setdefault(os.path.realpath(path), path)
    return list(distinct.values())


def predict_clips(
    run: str,
    clips: Sequence[Path],
    output: Path,
    device_name: str,
    precision: Precision,
    num_workers: int,
    target_error: float | None,
    engine: EngineName | None = None,
) -> None:
    """Write the answer for each clip into a CSV, and print how many got which.

    The clips are sampled and batched as evaluate.py does, so the probabilities are the same.

    Args:
        clips: from `find_clips`.
        engine: see `ModelSource`.

    Raises:
        UserError: something is wrong with the sources, the checkpoint or the output; or clips could
            not be read, after the answers for the others are written.
    """
    if output.suffix.lower() != ".csv" or output.is_dir():
        raise UserError(f"--clips {output}: give the name of a .csv file to write the answers into")
    require_own_table(output, COLUMNS, "--clips")
    require_writable(output.parent, "--clips")
    source = ModelSource(run, engine, device_name, precision)
    state, device, dtype = source.state, source.device, source.dtype
    classes = tuple(state["classes"])
    if problems := class_problems(classes):
        raise UserError("\n  ".join([f"{run}: cannot be used for answers:", *problems]))
    settings = dataclasses.replace(from_dict(state["config"]), num_workers=num_workers)
    calibration = load_calibration(state, target_error, run)
    reference = NoveltyReference.of_checkpoint(state)
    model = source.build()
    hardware = f"{describe_device(device)}, {dtype}, {source.engine}"
    print(f"{settings.model_name} on {len(clips)} clips, {hardware}")

    rows = [ClipRow(path, 0) for path in clips]  # the label is not looked at
    views, crops = settings.test_views, settings.test_crops
    loader = eval_loader(rows, settings, None, views, crops)
    predictions = None
    options = calibration.temperature, 0.0, reference and reference.means
    try:
        predictions = evaluate(model, loader, device, dtype, "clips", True, None, *options)
        unreadable = predictions.unreadable
    except NoClipError as error:
        unreadable = error.unreadable

    answers = clip_answers(clips, predictions, classes, calibration, reference)
    make_folder(output.parent)
    write_answers(output, answers, classes)
    folder = Path(run) if Path(run).is_dir() else Path(run).parent
    print(describe_answers(answers, reference, shlex.quote(str(folder))))
    print(f"answers: {output}")
    if unreadable:
        print(
            list_some([f"error: {line}" for line in sorted(unreadable)], 20, "\n"), file=sys.stderr
        )
        raise UserError(f"{len(unreadable)} of {len(clips)} clips could not be read (see above)")
