"""What a frozen backbone makes of the clips, computed once and kept: then an epoch takes a second.

A CNN-LSTM whose whole backbone is frozen sees the same features of the same pixels in every epoch.
Of each training clip a few random draws (frames, flips, colours ...) are kept, of validation and
test clips the views that they have. The files are found again by later runs with the same pixels
and the same backbone: other folds, other losses, other heads.
"""

import copy
import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from clips.manifest import ClipRow
from clips.transforms import Augment
from cnn_lstm import CNNLSTM
from config import TrainConfig
from dataset import ClipsDataset, collate
from modeling.inference import prepare_for_inference
from utils import distributed
from utils.errors import UserError
from utils.files import atomic
from utils.workers import start_worker
from video.container import ClipError

# The settings that decide what a clip's pixels are, and those that matter to training clips only.
_PIXELS = ("n_frames", "image_size", "inputs", "cache", "eval_sampling")

_DRAWN = ("sampling", "flip", "rotation", "translate", "zoom", "brightness", "contrast")

_DRAWN += ("saturation", "hue", "rand_augment", "rand_magnitude", "erasing")

_VERSION = 2  # to be raised when the same settings and weights come to give other features


class FrozenFeatures(Dataset):
    """The features of a data set's clips, for loaders: `(index, ((T, width) float32, label))`.

    Of several views or crops `(V, T, width)`.

    Args:
        clips: the clips, read only where features are missing.
        folder: where the features are kept, as fp16.
        draws: how many random draws of each clip there are; 0: none, the clip as it is. The index
            `(i, seed)` of a training sampler means draw `seed % draws`.
    """

    def __init__(self, clips: ClipsDataset, folder: Path, draws: int) -> None:
        self.clips = clips
        self.folder = folder
        self.draws = draws
        self.unreadable: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, index: int | tuple[int, int]) -> tuple[int, tuple | str]:
        number, seed = index if isinstance(index, tuple) else (index, 0)
        if number in self.unreadable:
            return number, self.unreadable[number]
        row = self.clips.rows[number]
        features = np.load(self.place(row, seed % max(1, self.draws)), allow_pickle=False)
        return number, (torch.from_numpy(features).float(), row.label)

    def place(self, row: ClipRow, draw: int) -> Path:
        """The file of one draw of a clip, as the clip's own file is now."""
        status = row.path.stat() if row.path.exists() else None
        now = [status.st_size, status.st_mtime_ns] if status else []
        facts = json.dumps([str(row.path.absolute()), *now])
        name = hashlib.sha256(facts.encode("utf-8", "surrogateescape")).hexdigest()
        return self.folder / f"{name[:24]}-{draw}.npy"

    def missing(self) -> list[tuple[int, int]]:
        """Numbers and draws of the clips whose features are not kept yet."""
        return [
            (number, draw)
            for number, row in enumerate(self.clips.rows)
            for draw in range(max(1, self.draws))
            if not self.place(row, draw).exists()
        ]

    @torch.inference_mode()
    def compute(
        self,
        missing: Sequence[tuple[int, int]],
        model: CNNLSTM,
        device: torch.device,
        workers: int,
        batch_size: int,
    ) -> None:
        """Compute and keep what is missing.

        Args:
            model: prepared for inference; only its `per_frame` is used.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        loader = DataLoader(
            _Missing(self.clips, missing, bool(self.draws)),
            batch_size,
            num_workers=workers,
            collate_fn=list,
            worker_init_fn=start_worker,
            generator=torch.Generator(),  # as in loaders.py
        )
        for batch in tqdm(loader, "frozen features", unit="batch", leave=False, delay=1):
            for number, _, clip in batch:
                if isinstance(clip, str):
                    self.unreadable[number] = clip
            read = [one for one in batch if not isinstance(one[2], str)]
            if not read:
                continue
            clips = torch.stack([clip for *_, clip in read]).to(device)  # (B, [V,] T, C, H, W)
            features = model.per_frame(clips.flatten(0, -5))  # (B * V, T, width)
            features = features.unflatten(0, clips.shape[:-4]).half().cpu().numpy()
            for (number, draw, _), one in zip(read, features, strict=True):
                with atomic(self.place(self.clips.rows[number], draw)) as unfinished:
                    np.save(unfinished, one)


class _Missing(Dataset):
    """Clips whose features are to be computed: `(number, draw, clip or why it cannot be read)`."""

    def __init__(self, clips: ClipsDataset, wanted: Sequence[tuple[int, int]], drawn: bool) -> None:
        self.clips = clips
        self.wanted = wanted
        self.drawn = drawn

    def __len__(self) -> int:
        return len(self.wanted)

    def __getitem__(self, place: int) -> tuple[int, int, torch.Tensor | str]:
        number, draw = self.wanted[place]
        # By its path, so that a clip has the same draws wherever it stands in a manifest.
        name = f"{self.clips.rows[number].path.absolute()} {draw}"
        digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()
        try:
            index = (number, int.from_bytes(digest[:7])) if self.drawn else number
            clip, _, *draws = self.clips[index]
            if draws:  # left to a GPU, where a training step would apply them
                clip = self.clips.transform.apply(clip[None], draws[0][None])[0]
            return number, draw, clip
        except ClipError as error:
            return number, draw, str(error)


def over_features(
    loader: DataLoader, model: CNNLSTM, config: TrainConfig, device: torch.device
) -> DataLoader:
    """A loader of the features of another loader's clips, in the same order.

    What is missing is computed first, in fp32.

    Args:
        model: with its weights; see `require_frozen`.
    """
    clips = loader.dataset.clips
    drawn = isinstance(clips.transform, Augment)  # a training set
    draws = config.feature_draws if drawn else 0
    settings = {name: getattr(config, name) for name in _PIXELS + (_DRAWN if drawn else ())}
    settings |= {"views": clips.views, "crops": clips.crops, "frozen": _digest(model)}
    settings |= {"version": _VERSION}
    if clips.cache:
        settings |= {"cached": dataclasses.asdict(clips.cache.settings)}
    name = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:24]
    features = FrozenFeatures(clips, Path(config.features) / name, draws)
    if missing := features.missing():
        prepared = prepare_for_inference(model, device)
        batch_size = max(1, config.batch_size // clips.answers)
        features.compute(missing, prepared, device, config.workers, batch_size)
    return DataLoader(
        features,
        loader.batch_size,
        sampler=loader.sampler,
        collate_fn=collate,
        generator=torch.Generator(),  # as in loaders.py
    )


def without_backbone(model: CNNLSTM) -> CNNLSTM:
    """A view of a model that answers to features only, and so is copied and prepared at no cost."""
    head = copy.copy(model)
    frozen = ("normalize", "backbone", "motion_backbone")
    head._modules = {name: part for name, part in model._modules.items() if name not in frozen}
    return head


def require_frozen(model: nn.Module) -> None:
    """Check that a model's features do not change in training.

    Raises:
        UserError: they do.
    """
    if not isinstance(model, CNNLSTM):
        raise UserError("features: only cnn_lstm has features of single frames to keep")
    stages = model.frame_stages()
    if any(p.requires_grad for modules in stages.values() for m in modules for p in m.parameters()):
        raise UserError(
            f"features: they change in training unless you give --freeze-to {list(stages)[-1]}"
        )
    if distributed.world_size() > 1:
        raise UserError("features: for one process; an epoch on them takes a second")


def _digest(model: CNNLSTM) -> str:
    """A hash of the weights that make the features."""
    built = (type(model.backbone), model.inputs, model.fusion, model.grid)
    digest = hashlib.sha256(repr(built).encode())
    for modules in model.frame_stages().values():
        for module in modules:
            for name, value in module.state_dict().items():
                digest.update(name.encode() + value.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
