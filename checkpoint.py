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

from config import from_dict
from models import build_model
from utils.errors import UserError
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
    if "format_version" not in state:
        raise UserError(f"{path}: not a checkpoint of this project (no 'format_version' in it)")
    if state["format_version"] > FORMAT_VERSION:
        raise UserError(
            f"{path}: written by a newer version of this project "
            f"(format {state['format_version']}, this one reads up to {FORMAT_VERSION})"
        )
    for key, kind in {"model": dict, "config": dict, "classes": (list, tuple)}.items():
        if not isinstance(state.get(key), kind):
            raise UserError(f"{path}: not a checkpoint of this project (no {key!r} in it)")
    return state


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
