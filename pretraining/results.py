"""What a pretraining writes beside its log: the encoder, the table of its clips, pictures."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from checkpoint import save_checkpoint
from clips.manifest import ClipRow
from modeling.weights import find_wrong_pretraining
from pretraining.clips import PretrainingClips, Usable
from pretraining.mae import MaskedAutoencoder, reconstruction
from utils.errors import UserError
from utils.files import atomic, try_write
from utils.structure import find_mismatch
from utils.tables import write_csv
from utils.torch_files import load_safely

log = logging.getLogger(__name__)


def save_encoder(
    path: Path,
    encoder: nn.Module,
    settings: Mapping[str, Any],
    pretrained: Mapping[str, str],
    pretraining: Mapping[str, Any],
) -> None:
    """Write the encoder without its classifier, as `modeling.weights.load_weights` reads it.

    Args:
        settings: those of the model; no name of a patient, a file or a folder.
        pretrained, pretraining: see `modeling.weights.LoadedWeights`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    weights = encoder.state_dict()
    save_checkpoint(
        path,
        {
            "model": {k: v for k, v in weights.items() if not k.startswith("head.")},
            "config": dict(settings),
            "pretrained": dict(pretrained),
            "pretraining": dict(pretraining),
        },
    )


def write_clips(path: Path, usable: Usable, videos: Sequence[ClipRow]) -> None:
    """Write the table of what was pretrained on, with plain names: it is for the user alone."""
    table = [("path", "patient", "video", "used")]
    table += [(row.path, row.patient, row.video, "yes") for row in usable.rows]
    table += [(row.path, row.patient, row.video, "cut into windows") for row in videos]
    table += [(path, None, None, f"no: {reason}") for path, reason in usable.left_out.items()]
    write_csv(path, table)


def draw_loss(path: Path, history: Sequence[dict[str, Any]]) -> None:
    """Draw the loss over the epochs. An error is no reason to lose the encoder."""
    from evaluation.plots import plot_losses  # importing matplotlib takes seconds

    if problem := try_write(path, lambda path: plot_losses(history, path)):
        log.warning(problem)


def draw_reconstruction(
    path: Path, model: MaskedAutoencoder, clips: PretrainingClips, device: torch.device
) -> None:
    """Draw some clips, what the model sees of them and what it predicts."""
    from PIL import Image

    def write(path: Path) -> None:
        numbers = range(0, len(clips), max(1, len(clips) // 4))[:4]
        batch = torch.stack([clips[number, 0][0] for number in numbers]).to(device)
        picture = Image.fromarray(reconstruction(model.eval(), batch).numpy())
        with atomic(path) as unfinished:
            picture.save(unfinished)

    if problem := try_write(path, write):
        log.warning(problem)


def load_last(run: Path) -> dict[str, Any]:
    """The state of a pretraining, to continue from it.

    Raises:
        UserError: there is none, or it is damaged or of something else.
    """
    path = run / "last.pt"
    if not path.is_file():
        raise UserError(f"{path}: no such file: give the run folder of a pretraining")
    state = load_safely(path, "give the run folder of a pretraining")
    shape = {"model": {str: torch.Tensor}, "config": {"method": str}, "pretraining": dict}
    if mismatch := find_mismatch(state, shape | {"clips": {str: str}, "pretrained": {str: str}}):
        raise UserError(f"{path}: not the state of a pretraining ({mismatch})")
    if problem := find_wrong_pretraining(state["pretraining"]):
        raise UserError(f"{path}: is damaged: {problem}")
    return state
