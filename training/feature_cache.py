"""Features of a frozen backbone, computed once and kept, so that an epoch takes a second.

A CNN-LSTM whose whole backbone is frozen computes the same features from the same pixels in every
epoch. Of each training clip a few random augmentations (frames, flips, colours ...) are kept, of
validation and test clips the views that they have. Later runs with the same pixels and the same
backbone find the files again: other folds, other losses, other heads.
"""

import copy
import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from clips.manifest import ClipRow
from clips.transforms import ClipAugment
from cnn_lstm import CNNLSTM
from config import TrainConfig, names_with
from dataset import ClipsDataset, collate, collate_by_value
from modeling.inference import prepare_for_inference, require_finite
from utils.files import atomic
from utils.workers import show_batches, start_worker
from video.container import ClipError
from video.files import fingerprint

_VERSION = 4  # raise it when the same settings and weights give other features than before


class CachedFeatures(Dataset):
    """The features of a data set's clips: `(index, ((T, num_features) float32, label))`.

    With several views or crops `(V, T, num_features)`.

    Args:
        clips: the clips, which are read only where features are missing.
        folder: where the features are kept: those of random augmentations, of which there are
            many, as fp16, those of the clips as they are in fp32.
        augmentations: number of random augmentations per clip; 0: none, the clip as it is. The
            index `(i, seed)` of a training sampler means augmentation `seed % augmentations`.
    """

    def __init__(self, clips: ClipsDataset, folder: Path, augmentations: int) -> None:
        self.clips = clips
        self.folder = folder
        self.augmentations = augmentations
        self.unreadable: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self.clips)

    @property
    def rows(self) -> list[ClipRow]:
        """The clips that the features belong to."""
        return self.clips.rows

    @property
    def num_views(self) -> int:
        """How many times a model sees each clip."""
        return self.clips.num_views

    def __getitem__(self, index: int | tuple[int, int]) -> tuple[int, tuple | str]:
        index, seed = index if isinstance(index, tuple) else (index, 0)
        if index in self.unreadable:
            return index, self.unreadable[index]
        row = self.rows[index]
        path = self.path(row, seed % max(1, self.augmentations))
        features = np.load(path, allow_pickle=False)
        return index, (torch.from_numpy(features).float(), row.label)

    def path(self, row: ClipRow, augmentation: int) -> Path:
        """The file of one augmentation of a clip; its name changes when the clip's file changes."""
        key = json.dumps([str(row.path.absolute()), *fingerprint(row.path)])
        name = hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()
        return self.folder / f"{name[:24]}-{augmentation}.npy"

    def uncached(self) -> list[tuple[int, int]]:
        """(index, augmentation) of the features that are not kept yet."""
        return [
            (index, augmentation)
            for index, row in enumerate(self.rows)
            for augmentation in range(max(1, self.augmentations))
            if not self.path(row, augmentation).exists()
        ]

    @torch.inference_mode()
    def compute(
        self,
        uncached: Sequence[tuple[int, int]],
        model: CNNLSTM,
        device: torch.device,
        num_workers: int,
        batch_size: int,
        by_value: bool = False,
    ) -> None:
        """Compute and keep the missing features.

        Args:
            model: prepared for inference; only its `frame_features` is used.
            by_value: the worker processes have no shared memory for the clips.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        loader = DataLoader(
            _Uncached(self.clips, uncached, bool(self.augmentations), by_value),
            batch_size,
            num_workers=num_workers,
            collate_fn=list,
            worker_init_fn=start_worker,
            generator=torch.Generator(),  # as in training/loaders.py
        )
        for batch in show_batches(loader, "frozen features"):
            for index, _, clip in batch:
                if isinstance(clip, str):
                    self.unreadable[index] = clip
            readable = [item for item in batch if not isinstance(item[2], str)]
            if not readable:
                continue
            clips = torch.stack([torch.as_tensor(clip) for *_, clip in readable])
            clips = clips.to(device)  # (B, [V,] T, C, H, W)
            features = model.frame_features(clips.flatten(0, -5))  # (B * V, T, num_features)
            features = features.unflatten(0, clips.shape[:-4]).cpu()
            features = features.half() if self.augmentations else features.float()
            features = require_finite(features).numpy()
            for (index, augmentation, _), array in zip(readable, features, strict=True):
                with atomic(self.path(self.rows[index], augmentation)) as unfinished:
                    np.save(unfinished, array)


class _Uncached(Dataset):
    """Clips whose features are to be computed: `(index, augmentation, clip or error message)`."""

    def __init__(
        self,
        clips: ClipsDataset,
        uncached: Sequence[tuple[int, int]],
        augment: bool,
        by_value: bool,
    ) -> None:
        self.clips = clips
        self.uncached = uncached
        self.augment = augment
        self.by_value = by_value

    def __len__(self) -> int:
        return len(self.uncached)

    def __getitem__(self, position: int) -> tuple[int, int, torch.Tensor | np.ndarray | str]:
        index, augmentation = self.uncached[position]
        # Seeded by its path, so that a clip is augmented alike wherever a manifest lists it.
        key = f"{self.clips.rows[index].path.absolute()} {augmentation}"
        seed = hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()[:7]
        try:
            clip, _, *params = self.clips[(index, int.from_bytes(seed)) if self.augment else index]
            if params:  # not applied yet: in training a GPU would do it
                clip = self.clips.transform.apply(clip[None], params[0][None])[0]
            # Only tensors are passed on in shared memory; arrays are pickled with their values.
            return index, augmentation, clip.numpy() if self.by_value else clip
        except ClipError as error:
            return index, augmentation, str(error)


def feature_loader(
    loader: DataLoader, model: CNNLSTM, config: TrainConfig, device: torch.device
) -> DataLoader:
    """A loader of the features of another loader's clips, in the same order.

    Missing features are computed first, in fp32.

    Args:
        model: with its weights; see `training.checks.require_frozen`.
    """
    clips: ClipsDataset = loader.dataset
    augment = isinstance(clips.transform, ClipAugment)  # the training clips
    augmentations = config.feature_augmentations if augment else 0
    decisive = names_with("pixels", "all clips", *["training clips"] * augment)
    key = {name: getattr(config, name) for name in decisive}
    key |= {"views": clips.sampler.views, "crops": clips.crops, "backbone": _digest(model)}
    key |= {"version": _VERSION}
    if clips.cache:
        key |= {"cached": dataclasses.asdict(clips.cache.settings)}
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]
    features = CachedFeatures(clips, Path(config.feature_cache) / name, augmentations)
    if uncached := features.uncached():
        prepared = prepare_for_inference(model, device)
        batch_size = max(1, config.batch_size // clips.num_views)
        by_value = loader.collate_fn is collate_by_value
        features.compute(uncached, prepared, device, config.num_workers, batch_size, by_value)
    return DataLoader(
        features,
        loader.batch_size,
        sampler=loader.sampler,
        collate_fn=collate,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # as in training/loaders.py
    )


def head_only(model: CNNLSTM) -> CNNLSTM:
    """A view of a model that takes features only, so that copying and preparing it is cheap."""
    head = copy.copy(model)
    frozen = ("normalize", "backbone", "motion_backbone")
    head._modules = {name: part for name, part in model._modules.items() if name not in frozen}
    return head


def _digest(model: CNNLSTM) -> str:
    """A hash of the weights that compute the features."""
    built = (type(model.backbone), model.modality, model.fusion, model.num_features)
    digest = hashlib.sha256(repr(built).encode())
    digest.update(getattr(model.backbone, "name", "").encode())  # of a network of timm
    for modules in model.frame_stages().values():
        for module in modules:
            for name, value in module.state_dict().items():
                digest.update(name.encode() + value.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
