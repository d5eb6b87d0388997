"""Which frames a model's wrong answers depended on: why the predicted class and not the true one.

PyTorch is imported only if there is a clip to explain, a checkpoint, and the clip is still there.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from evaluation.runs import Run
from utils.errors import ClipError, UserError, first_line

if TYPE_CHECKING:
    from config import TrainConfig
    from dataset import ClipsDataset


@dataclass(frozen=True)
class RelevanceCurve:
    """The relevance of the frames of a clip for a wrong answer, or why it is not known."""

    times: np.ndarray
    """`(T,)` times of the frames in seconds of the clip, or their numbers in it, from 1"""
    values: np.ndarray
    """`(T,)` relevance of the frames for the logit of the predicted class minus that of the true
    class: positive where a frame speaks for the predicted one"""
    in_seconds: bool = True
    """whether `times` are seconds; False: they are numbers, because the frame rate is unknown"""
    method: str = ""
    """by which it was computed"""
    warnings: Sequence[str] = ()
    """what a reader must know of the method, a line each"""
    missing: str = ""
    """why there is no curve, in a few words that name no clip; empty: there is one"""


def explain_mistakes(run: Run, indices: Sequence[int]) -> list[RelevanceCurve]:
    """The curves of some wrong predictions of a run, in their order.

    The model is that of the run, in a cross-validation that of the clip's own fold. It is shown
    the clip as in the test, but once, in its middle view.

    Args:
        indices: which predictions.
    """
    curves: dict[int, RelevanceCurve] = {}
    groups: dict[str, list[int]] = {}  # the clips of each fold
    for index in indices:
        fold = run.predictions.folds[index] if run.predictions.folds else ""
        if reason := _find_obstacle(run, index, fold):
            curves[index] = _without(reason)
        else:
            groups.setdefault(fold, []).append(index)
    total = len(indices) - len(curves)
    with tqdm(desc="explaining", total=total, leave=False, disable=not total) as bar:
        for fold, members in groups.items():
            for index, curve in zip(members, _explain(run, fold, members), strict=True):
                curves[index] = curve
                bar.update()
    return [curves[index] for index in indices]


def _without(reason: str) -> RelevanceCurve:
    return RelevanceCurve(np.empty(0), np.empty(0), missing=reason)


def _find_obstacle(run: Run, index: int, fold: str) -> str:
    """Why a prediction cannot be explained, as far as that can be seen without PyTorch."""
    if run.results.get("shuffle_frames"):
        return "the model saw its frames in another order (--shuffle-frames)"
    if run.checkpoint(fold) is None:
        return "there is no checkpoint here"
    if not os.path.exists(run.predictions.rows[index].path):
        return "this clip is no longer there"
    return ""


def _explain(run: Run, fold: str, indices: Sequence[int]) -> Iterator[RelevanceCurve]:
    """The curves of predictions that one model made."""
    from checkpoint import rebuild_model
    from config import from_dict
    from explanation.methods import default_method
    from modeling.inference import prepare_for_inference
    from utils.device import get_device

    try:
        state = run.load_state(fold)
    except UserError:  # its message names folders
        yield from [_without("the checkpoint here cannot be read")] * len(indices)
        return
    if list(state["classes"]) != list(run.classes):
        yield from [_without("the checkpoint here is of a model with other classes")] * len(indices)
        return
    try:
        config = from_dict(state["config"])
        model = prepare_for_inference(rebuild_model(state), get_device())
    except UserError as error:  # a package is missing, or a model of the user's own
        yield from [_without(f"the model cannot be built here: {first_line(error)}")] * len(indices)
        return
    method = default_method(config.model_name, of_class=True)
    for index in indices:
        try:
            yield _explain_clip(run, index, config, model, method)
        except (ClipError, OSError):  # its message names the clip
            yield _without("this clip cannot be read")
        except UserError as error:
            yield _without(first_line(error))


def _explain_clip(
    run: Run, index: int, config: "TrainConfig", model: Any, method: Any
) -> RelevanceCurve:
    """The curve of one prediction.

    Raises:
        ClipError: the clip cannot be read.
        UserError: the outputs of the model are not finite, or it cannot be explained.
    """
    import torch

    from explanation.methods import advice, explain_frames
    from modeling.inference import require_finite

    clips, clip = _read(run, index, config)
    clip = clip[None].to(next(model.parameters()).device)  # (1, T, C, H, W)
    with torch.inference_mode():
        answer = int(require_finite(model(clip)).argmax())
    predicted = int(run.predictions.y_pred[index])
    if answer != predicted:
        return _without(_other_answer(run, run.classes[answer]))
    true = torch.tensor([run.predictions.labels[index]])
    frames = explain_frames(model, clip, torch.tensor([predicted]), method, true)
    values = frames[0].double().numpy()  # (T,)
    if not np.isfinite(values).all():
        return _without("the relevance is not finite")
    times, in_seconds = _frame_times(clips)
    return RelevanceCurve(times, values, in_seconds, method, advice(config.model_name, method))


def _other_answer(run: Run, name: str) -> str:
    """Why the model answers otherwise here than in the test."""
    if run.results.get("logit_adjust_tau"):
        return f"the answer comes from adjusted logits; without --logit-adjust-tau it is {name}"
    if run.num_views > 1:
        return f"the answer is the mean of {run.num_views} views; in the middle one it is {name}"
    return f"the model that is here answers otherwise: {name}"


def _read(run: Run, index: int, config: "TrainConfig") -> "tuple[ClipsDataset, Any]":
    """A clip as the test saw it, `(T, C, H, W)` uint8, and the data set of this clip alone.

    Raises:
        ClipError: it cannot be read.
    """
    from clips.cache import ClipCache
    from dataset import ClipsDataset, get_val_transform
    from video.motion import Modality

    rows, motion = [run.predictions.rows[index]], Modality.parse(config.modality).stored_motion
    shape = config.n_frames, config.image_size, config.eval_sampling
    options = {"transform": get_val_transform(config.image_size), "motion": motion}
    if config.cache and config.data_root and not run.results.get("csv"):
        try:
            cache = ClipCache(config.cache, config.data_root)
            if cache.settings.image_size == config.image_size and motion in (
                None,
                cache.settings.motion,
            ):
                clips = ClipsDataset(rows, *shape, **options, cache=cache)
                return clips, clips[0][0]
        except UserError:  # it is gone, or without this clip (a ClipError is a UserError)
            pass
    clips = ClipsDataset(rows, *shape, **options)
    return clips, clips[0][0]


def _frame_times(clips: "ClipsDataset") -> tuple[np.ndarray, bool]:
    """The times of the frames of the only clip, `(T,)` seconds, and True; or their numbers in the
    clip, from 1, and False, if its frame rate is unknown."""
    from explanation.clips import frame_times
    from video.container import probe

    times = frame_times(clips.rows[0], clips.sampler)
    if np.isfinite(times).all():
        return times, True
    count = max(1, probe(clips.rows[0].path).frames)
    return np.array(clips.sampler.indices(count)) + 1.0, False
