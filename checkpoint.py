"""Checkpoints: plain dicts that `torch.load(weights_only=True)` accepts, written atomically.

A checkpoint holds everything that is needed to continue training or to rebuild the model: `model`,
`optimizer`, `scheduler`, `scaler`, `epoch`, `step`, `rng`, `best`, `history`, `config`, `classes`
and `format_version`. With an EMA, `model` holds the averaged weights, and the checkpoint also
holds the `trained` weights and `averaged_steps`. Loading a checkpoint runs no code from it.
"""

import random
from pathlib import Path
from typing import Any

import torch
from torch import nn

from config import TrainConfig, from_dict
from modeling.features import last_layer
from modeling.weights import (
    PRETRAINING,
    find_weights,
    find_wrong_pretraining,
    is_finite,
    is_ordinary,
)
from models import build_model
from utils.errors import UserError, first_line
from utils.structure import find_mismatch, short_repr
from utils.torch_files import load_safely, save_safely

FORMAT_VERSION = 1


def save_checkpoint(path: str | Path, state: dict[str, Any]) -> None:
    """Write a checkpoint; a kill at any moment leaves the old file or the new one."""
    save_safely(path, {**state, "format_version": FORMAT_VERSION})


def load_checkpoint(run_or_file: str | Path, name: str = "best.pt") -> dict[str, Any]:
    """Read a checkpoint file, or the one called `name` in a run folder, onto the CPU.

    Raises:
        UserError: there is none, it is damaged, or it is not a checkpoint of this project.
    """
    path = Path(run_or_file)
    if path.is_dir():
        path = path / name
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint (give a run folder or a .pt file)")
    state = load_safely(path, "give a run folder or a .pt file of this project")
    _check_version(state, path)
    if not find_mismatch(state, {"config": {"method": str}}):
        raise UserError(
            f"{path}: is of a pretraining, which classifies nothing yet: python train.py --weights "
            "and its encoder.pt train a classifier from it"
        )
    if mismatch := find_mismatch(state, {"model": {str: torch.Tensor}, **_SHAPE}):
        raise UserError(f"{path}: not a checkpoint of this project ({mismatch})")
    model = check_all_but_weights(state, str(path))
    if problem := find_wrong_weight(state["model"], model.state_dict()):
        raise UserError(f"{path}: is damaged: {problem}")
    return state


def check_all_but_weights(state: dict[str, Any], source: str) -> nn.Module:
    """Check everything in a checkpoint but its weights; an exported file holds the same.

    Args:
        source: the file, for messages.

    Returns:
        The model that it describes, on the meta device.

    Raises:
        UserError: something is missing, of the wrong type, or contradicts itself.
    """
    if mismatch := find_mismatch(state, _SHAPE):
        raise UserError(f"{source}: not a checkpoint of this project ({mismatch})")
    config = from_dict(state["config"], source=source)
    if problem := _find_problem(state, config):
        raise UserError(f"{source}: is damaged: {problem}")
    try:
        with torch.device("meta"):  # takes no memory, whatever the settings claim
            model = build_model(config, len(config.classes))
    except Exception as error:  # the settings are a file's, and may be anything
        why = f"its settings describe no model ({first_line(error)})"
        raise UserError(f"{source}: is damaged: {why}") from None
    if "novelty" in state:
        means, num_classes = state["novelty"]["means"], len(config.classes)
        if problem := _find_wrong_means(means, model, num_classes):
            raise UserError(f"{source}: is damaged: {problem}")
    return model


# What a checkpoint holds beside its weights; see `utils.structure.find_mismatch`. Losses may be
# infinite.
_NUMBER = int | float | None
_ROW = {"epoch": int, "train_loss": _NUMBER, "val_loss": _NUMBER, "val_accuracy": _NUMBER}
_SHAPE = {
    "config": {str: object},
    "classes": [str],
    "epoch?": int,
    "best?": dict,
    "history?": [_ROW],
    "class_counts?": [int],
    "clips?": {str: str},
    "pretrained?": {str: str},
    "pretraining?": PRETRAINING,
    "calibration?": {
        "temperature": float,
        "target_error?": float | None,
        "wanted_error?": float | None,  # its earlier name
        "threshold": float | None,
        "confidence": [float],
    },
    "novelty?": {"means": torch.Tensor, "distances": [float]},
    "frame_rate?": float | None,
}
_RESUME_SHAPE = {
    "optimizer": {
        "state": {int: {str: torch.Tensor}},
        "param_groups": [
            {"params": [int], "lr": float, "betas": [float], "eps": float, "weight_decay": float}
        ],
    },
    "scheduler": {"last_epoch": int, "_last_lr": [float]},
    "scaler": {str: float},
    "epoch": int,
    "step": int,
    "best": dict,
    "history": [{"epoch": int, "train_loss": _NUMBER}],
    "totals": [[float]],
    "rng": [{"python": [object], "torch": torch.Tensor, "cuda": [torch.Tensor]}],
    "unreadable": [str],
}
_ADAMW = {"step", "exp_avg", "exp_avg_sq"}  # what AdamW keeps per parameter


def _check_version(state: dict[str, Any], path: Path) -> None:
    version = state.get("format_version")
    if version is None:
        message = f"{path}: not a checkpoint of this project (no 'format_version' in it)"
        if count := len(find_weights(state)[0]):
            message += (
                f"; it holds {count} tensors of another program, from which a model can be trained:"
                f" python train.py --weights {path}"
            )
        raise UserError(message)
    if isinstance(version, bool) or not isinstance(version, int):
        raise UserError(f"{path}: is damaged: its format_version is no whole number")
    if version > FORMAT_VERSION:
        raise UserError(
            f"{path}: written by a newer version of this project "
            f"(format {short_repr(version)}, this one reads up to {FORMAT_VERSION})"
        )


def _find_problem(state: dict[str, Any], config: TrainConfig) -> str:
    """What contradicts itself in a checkpoint of the right structure; empty if nothing does."""
    if list(state["classes"]) != list(config.classes):
        return "its classes are not those of its settings"
    if None in (config.n_frames, config.image_size):
        return "its settings do not say how long or how large the clips are"
    best, calibration = state.get("best"), state.get("calibration")
    if best and (mismatch := find_mismatch(best, _ROW, "best")):
        return mismatch
    if len(state.get("class_counts", ())) not in (0, len(config.classes)):
        return "class_counts has another length than classes"
    if min(0, state.get("epoch", 0), *state.get("class_counts", ())) < 0:
        return "a count in it is below 0"
    if (state.get("frame_rate") or 1) <= 0:
        return "its frame_rate is not above 0"
    if calibration:
        correct = calibration.get("correct", calibration.get("right"))  # its earlier name
        if find_mismatch(correct, [bool]) or len(correct) != len(calibration["confidence"]):
            return "its calibration has not one `correct` per clip"
        if calibration["temperature"] <= 0:
            return "its calibration has a temperature that is not above 0"
    if "pretraining" in state:
        return find_wrong_pretraining(state["pretraining"])
    return ""


def _find_wrong_means(means: torch.Tensor, model: nn.Module, num_classes: int) -> str:
    """Why a model's features cannot be compared with these means; empty if they can."""
    width = last_layer(model).in_features
    if means.dim() != 2 or not 1 <= len(means) <= num_classes or means.shape[1] != width:
        return f"the means of its novelty have the shape {tuple(means.shape)}"
    if means.dtype != torch.float64 or not is_ordinary(means) or not is_finite(means):
        return "the means of its novelty are no ordinary, finite tensor of torch.float64"
    return ""


def find_wrong_weight(weights: dict[str, Any], own: dict[str, torch.Tensor]) -> str:
    """The first tensor that is missing, or not as the model has it; empty if there is none."""
    if missing := own.keys() ^ weights.keys():
        return f"{len(missing)} weights are missing or unknown, e.g. {min(missing)}"
    for name, value in weights.items():
        if value.shape != own[name].shape:
            return f"weight {name} has the shape {tuple(value.shape)}, not {tuple(own[name].shape)}"
        if value.dtype != own[name].dtype or not is_ordinary(value):
            return f"weight {name} is no ordinary tensor of {own[name].dtype}"
        if not is_finite(value):
            return f"weight {name} holds numbers that are not finite"
    return ""


def check_resume(
    state: dict[str, Any],
    fresh: dict[str, Any],
    optimizer: torch.optim.Optimizer,
    source: str | Path,
) -> None:
    """Check, before any part of a run is changed, that training can continue from a checkpoint.

    Args:
        state: the checkpoint, as `load_checkpoint` returns it.
        fresh: `TrainState.state_dict()` of a run that begins, with the same settings.
        optimizer: the optimizer of that run.
        source: the file or folder, for messages.

    Raises:
        UserError: a part is missing, damaged or of another run.
    """
    problem = find_mismatch(state, _RESUME_SHAPE) or _find_resume_problem(state, fresh, optimizer)
    if problem:
        raise UserError(
            f"{source}: the training cannot continue from its last.pt ({problem}); its weights can "
            f"be trained further: python train.py --weights {source}"
        )


def _find_resume_problem(
    state: dict[str, Any], fresh: dict[str, Any], optimizer: torch.optim.Optimizer
) -> str:
    """Why a run cannot continue from this state; empty if it can. See `check_resume`."""
    if "trained" in fresh:
        if mismatch := find_mismatch(
            state, {"trained": {str: torch.Tensor}, "averaged_steps": int}
        ):
            return mismatch
        if problem := find_wrong_weight(state["trained"], fresh["trained"]):
            return problem
    if state["step"] < 0:
        return "its step is below 0"
    groups = state["optimizer"]["param_groups"]
    if [g["params"] for g in groups] != [g["params"] for g in fresh["optimizer"]["param_groups"]]:
        return "its optimizer trains other parameters"
    for part in ("optimizer", "scheduler"):
        if not _has_types_of(state[part], fresh[part]):
            return f"its {part} is of another kind"
    scalers = state["scaler"], fresh["scaler"]  # empty except in fp16
    if all(scalers) and not (_has_types_of(*scalers) and scalers[0].keys() == scalers[1].keys()):
        return "its scaler is of another kind"
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for number, averages in state["optimizer"]["state"].items():
        if not 0 <= number < len(parameters) or averages.keys() != _ADAMW:
            return "its optimizer is of another kind"
        shapes = {name: value.shape for name, value in averages.items()}
        expected = dict.fromkeys(_ADAMW, parameters[number].shape) | {"step": torch.Size()}
        if shapes != expected or not all(map(is_finite, averages.values())):
            return f"its optimizer's averages of parameter {number} are damaged"
    if len(state["totals"]) != len(state["rng"]) or any(len(sums) != 3 for sums in state["totals"]):
        return "its totals are not three per process"
    try:
        for rng in state["rng"]:
            version, internal, gauss = rng["python"]
            random.Random().setstate((version, tuple(internal), gauss))
            torch.Generator().set_state(rng["torch"])
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return "its states of the random generators are damaged"
    if any(value.dtype != torch.uint8 for rng in state["rng"] for value in rng["cuda"]):
        return "its states of the GPUs' random generators are damaged"
    return ""


def _has_types_of(value: Any, fresh: Any) -> bool:
    """Whether a value has the types of a fresh one.

    Keys that only one of them has do not count: other versions of torch have others.
    """
    if fresh is None or value is None:
        return True
    if isinstance(fresh, dict):
        return isinstance(value, dict) and all(
            _has_types_of(value[key], fresh[key]) for key in fresh.keys() & value.keys()
        )
    if isinstance(fresh, list | tuple):
        return (
            isinstance(value, list | tuple)
            and len(value) == len(fresh)
            and all(map(_has_types_of, value, fresh))
        )
    if isinstance(fresh, int | float):
        return isinstance(value, int | float) and not find_mismatch(float(value), float)
    return isinstance(value, type(fresh))


def rebuild_model(state: dict[str, Any]) -> nn.Module:
    """The model of a checkpoint with its weights, in eval mode."""
    model = build_model(from_dict(state["config"]), len(state["classes"]))
    model.load_state_dict(state["model"])
    return model.eval()


def rng_state() -> dict[str, Any]:
    """The states of the random generators, in types that a safe load accepts."""
    return {
        "python": random.getstate(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Continue the random generators from `rng_state()`."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    torch.set_rng_state(state["torch"])
    if state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
