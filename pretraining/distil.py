"""Distillation: a video model learns the features that a frozen image network has of the frames.

The teacher sees single frames, so its features of a clip change in time only as the picture does.
With a frozen teacher nothing can collapse, and its features are computed once.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from cnn_lstm import CNNLSTM
from dataset import collate
from modeling.features import last_layer
from modeling.inference import prepare_for_inference, require_finite
from modeling.weights import LoadedWeights, load_weights
from pretraining.clips import PretrainingClips
from tsm_resnet import TSM
from utils.errors import UserError
from utils.files import atomic
from utils.interrupt import Interrupt
from utils.workers import show_batches, start_worker
from video.files import fingerprint

_VERSION = 1  # raise it when the same settings and weights give other features than before
RANDOM_FEATURES = 256


class Distillation(nn.Module):
    """A video model whose classifier is replaced by a prediction of the teacher's features.

    TSM, whose last layer sees each frame, predicts the features of each frame. Every other model
    predicts two vectors per clip: the mean of the features over time, and the mean of the second
    half minus that of the first, which a model that ignores time cannot know.

    Args:
        model: built for `target_width` classes.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, clips: torch.Tensor) -> torch.Tensor:
        """`(B, T, C, H, W)` to predictions, `(B, T * D)` or `(B, 2 * D)`."""
        if isinstance(self.model, TSM):
            return self.model.frame_logits(clips)[0].flatten(1)
        return self.model(clips)

    def stages(self) -> dict[str, list[nn.Module]]:
        """The modules from stem to head."""
        return self.model.stages()


def is_per_frame(model_name: str) -> bool:
    """Whether a model predicts the features of each frame; see `Distillation`."""
    return model_name == "tsm_resnet"


def target_width(features: int, model_name: str) -> int:
    """The number of classes that the model is built for, for a teacher of so many features."""
    return features if is_per_frame(model_name) else 2 * features


def make_targets(features: torch.Tensor, per_frame: bool) -> torch.Tensor:
    """The teacher's features of all views, `(N, T, D)`, as targets, `(N, T * D)` or `(N, 2 * D)`.

    Each of the D (or 2 D) numbers is standardised over all views (and frames): otherwise the
    difference of the halves would weigh next to nothing.
    """
    features = features.float()
    if not per_frame:
        half = features.shape[1] // 2
        later, earlier = features[:, -half:].mean(dim=1), features[:, :half].mean(dim=1)
        features = torch.cat((features.mean(dim=1), later - earlier), dim=1).unsqueeze(1)
    flat = features.flatten(0, 1)  # (N * T, D) or (N, 2 * D)
    mean, deviation = flat.mean(dim=0), flat.std(dim=0, correction=0)
    return ((features - mean) / deviation.clamp(min=1e-6)).flatten(1)


class DistillationLoss:
    """Smooth L1 between predictions and targets, averaged per clip.

    Args:
        targets: of all views, see `make_targets`.
    """

    def __init__(self, targets: torch.Tensor) -> None:
        self.targets = targets

    def __call__(self, outputs: torch.Tensor, numbers: torch.Tensor, _: int) -> torch.Tensor:
        """`(B, D)` predictions of the views with these numbers to losses `(B,)`."""
        wanted = self.targets[numbers.cpu()].to(outputs.device)
        return F.smooth_l1_loss(outputs, wanted, reduction="none").mean(dim=1)


def load_teacher(name: str, weights: str) -> tuple[CNNLSTM, LoadedWeights]:
    """A frozen image network without temporal part, and where its weights come from.

    Args:
        name: of a backbone, see `modeling.backbones`.
        weights: as `modeling.weights.load_weights` takes them; random ones teach nothing.

    Raises:
        UserError: there is no such network, or its weights cannot be had.
    """
    if weights == "none":
        raise UserError("teacher_weights none: a teacher of random weights: give --teacher random")
    teacher = CNNLSTM(2, name, lstm_layers=0)
    loaded = load_weights(teacher, weights)
    if loaded.mean_std:
        from modeling.layers import Normalize

        teacher.normalize = Normalize(loaded.mean_std)
    return teacher.requires_grad_(False), loaded


def random_features(views: int, n_frames: int, seed: int) -> torch.Tensor:
    """Targets that say nothing of the clips, `(views, T, RANDOM_FEATURES)`: the control."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(views, n_frames, RANDOM_FEATURES, generator=generator)


@torch.inference_mode()
def teacher_features(
    teacher: CNNLSTM,
    clips: PretrainingClips,
    folder: Path,
    device: torch.device,
    batch_size: int,
    num_workers: int,
    interrupt: Interrupt | None = None,
) -> torch.Tensor:
    """The features of every frame of every view, `(N * views, T, D)` fp16, computed once and kept.

    Args:
        clips: with fixed views.
        folder: where they are kept, in a file whose name depends on clips, views and teacher.

    Raises:
        UserError: a clip cannot be read any more.
    """
    views = clips.fixed_views
    path = folder / f"{_key(teacher, clips)}.npy"
    if path.exists():
        return torch.from_numpy(np.load(path, allow_pickle=False))
    folder.mkdir(parents=True, exist_ok=True)
    loader = DataLoader(
        clips,
        batch_size,
        sampler=[(index, view) for index in range(len(clips)) for view in range(views)],
        num_workers=num_workers,
        collate_fn=collate,
        worker_init_fn=start_worker,
        generator=torch.Generator(),  # as in training/loaders.py
    )
    model = prepare_for_inference(teacher, device)
    parts = []
    for batch in show_batches(loader, "teacher's features", interrupt):
        if batch.unreadable:
            raise UserError("cannot be read any more:\n  " + "\n  ".join(batch.unreadable))
        parts.append(require_finite(model.frame_features(batch.clips.to(device)).half().cpu()))
    features = torch.cat(parts)
    with atomic(path) as unfinished:
        np.save(unfinished, features.numpy())
    return features


def _key(teacher: CNNLSTM, clips: PretrainingClips) -> str:
    """A name for the features: another one if clips, views or teacher change."""
    sampler, transform = clips.sampler, clips.transform
    crop = (transform.size, transform.min_area, transform.hflip_prob)
    key = [_VERSION, sampler.n_frames, sampler.sampling, *crop, *transform.colours.colors]
    key += [clips.fixed_views, clips.seed, teacher.normalize.mean_std, clips.shuffle]
    key += [[str(row.path.absolute()), *fingerprint(row.path)] for row in clips.rows]
    digest = hashlib.sha256(json.dumps(key).encode("utf-8", "surrogateescape"))
    digest.update(type(teacher.backbone).__name__.encode())
    for name, value in teacher.backbone.state_dict().items():
        digest.update(name.encode() + value.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:24]


def feature_width(teacher: CNNLSTM) -> int:
    """The number of features of a frame."""
    return last_layer(teacher).in_features


def teacher_provenance(
    name: str, loaded: LoadedWeights, start: Mapping[str, str]
) -> dict[str, str]:
    """What is known of the weights that a model was made from, for checkpoints.

    Args:
        name, loaded: the teacher, see `load_teacher`.
        start: of the weights that the model starts from; both licences hold.
    """
    taught = loaded.provenance
    licences = dict.fromkeys(filter(None, (start.get("licence"), taught.get("licence"))))
    licence = {"licence": " and ".join(licences)} if licences else {}
    return {**start, "teacher": taught.get("encoder", name), **licence}
