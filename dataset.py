"""Clips as tensors: `ClipsDataset`, its transforms, and batches."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F
from torch.utils.data import Dataset

from clips.cache import ClipCache
from clips.manifest import CLASSES, ClipRow, get_num_classes, read_manifest
from clips.transforms import ClipAugment, Resize, spatial_crops
from utils.errors import UserError
from video.clip_reader import FrameSampler, Sampling, read_clip
from video.container import ClipError
from video.motion import StoredMotion, require_opencv

__all__ = [
    "CLASSES",
    "Batch",
    "ClipRow",
    "ClipsDataset",
    "build_dataloaders",  # noqa: F822, see __getattr__
    "collate",
    "get_num_classes",
    "get_train_transform",
    "get_val_transform",
    "read_manifest",
    "require_readable",
]

Transform = Callable[[torch.Tensor], torch.Tensor]
Perturbation = Callable[[torch.Tensor, int], torch.Tensor]
"""maps `(T, C, H, W)` and the index of the clip to a changed clip, the same one at every call"""

get_train_transform = ClipAugment
"""The transform of training clips; see `ClipAugment` for its strengths."""

get_val_transform = Resize
"""The transform of validation and test clips, without anything random."""


class ClipsDataset(Dataset):
    """The clips of a manifest: `dataset[i]` is `((T, C, H, W) uint8, label)`.

    Frames are squeezed into the square of `size` pixels: nothing at the edge of the view is cut off
    (instruments enter there, and PanoView and LocPanoView differ by how much is in view). Every
    source, cache and stream is squeezed alike, in training and in testing.

    An index may be a pair `(i, seed)`: sampling and transforms then draw from that seed alone, so
    that a clip comes out the same whatever the number of workers and wherever training resumed.

    Args:
        rows: clips, as returned by `read_manifest`.
        n_frames: T.
        size: H and W in pixels.
        sampling: which frames; see `FrameSampler`.
        transform: applied once to the whole clip; see `get_train_transform`.
        views: temporal views per clip, for evaluation; above 1 a clip is `(V, T, C, H, W)`.
        crops: spatial crops per view, for evaluation; see `spatial_crops`. Above 1 a clip is
            `(V * crops, T, C, H, W)`, the crops of a view one after another.
        cache: read the clips from this cache instead of decoding them.
        motion: read this motion too: C is then 5 instead of 3; see video/motion.py.
        pre_transform: applied once to the whole clip, before `transform`.
        augment_on_device: only draw the parameters of `transform`, a `ClipAugment`, and return them
            beside the clip, `(clip, label, params)`, for a device that augments whole batches.
        perturbations: applied to each view, for robustness tests; see `training.loaders`.

    Raises:
        UserError: optical flow is to be computed and OpenCV is not installed.
        ClipError: on access to a clip that cannot be read. It is never replaced by another clip.
    """

    def __init__(
        self,
        rows: Sequence[ClipRow],
        n_frames: int = 16,
        size: int = 224,
        sampling: Sampling = "uniform",
        transform: Transform | None = None,
        views: int = 1,
        crops: int = 1,
        cache: ClipCache | None = None,
        motion: StoredMotion | None = None,
        pre_transform: Transform | None = None,
        augment_on_device: bool = False,
        perturbations: Sequence[Perturbation] = (),
    ) -> None:
        if motion == "flow" and cache is None:
            require_opencv()
        self.rows = list(rows)
        self.sampler = FrameSampler(n_frames, sampling, views)
        self.size = size
        self.transform = transform
        self.crops = crops
        self.cache = cache
        self.motion = motion
        self.pre_transform = pre_transform
        self.augment_on_device = augment_on_device
        self.perturbations = perturbations

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def num_views(self) -> int:
        """How many times a model sees each clip: temporal views times spatial crops."""
        return self.sampler.views * self.crops

    def __getitem__(self, index: int | tuple[int, int]) -> tuple:
        if isinstance(index, tuple):
            index, seed = index
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                return self._item(index)
        return self._item(index)

    def __getitems__(
        self, indices: Sequence[int | tuple[int, int]]
    ) -> list[tuple[int, tuple | str]]:
        """What a DataLoader calls for a batch: `(i, item)` for each clip, or `(i, error message)`
        for a clip that cannot be read."""
        items: list[tuple[int, tuple | str]] = []
        for index in indices:
            number = index[0] if isinstance(index, tuple) else index
            try:
                items.append((number, self[index]))
            except ClipError as error:
                items.append((number, str(error)))
        return items

    def _item(self, index: int) -> tuple:
        clip, label = self._read(index), self.rows[index].label
        if self.pre_transform is not None:
            clip = self.pre_transform(clip)
        if self.augment_on_device:
            return clip, label, self.transform.sample_params()
        if self.transform is not None:
            frames = clip.flatten(0, -4)  # all views of a clip are transformed alike
            clip = self.transform(frames).view(*clip.shape[:-3], -1, self.size, self.size)
        if self.crops > 1:
            views = clip if self.sampler.views > 1 else clip.unsqueeze(0)
            clip = torch.cat([spatial_crops(view, self.crops) for view in views])
        return clip, label

    def _read(self, index: int) -> torch.Tensor:
        sampler, path = self.sampler, self.rows[index].path
        random = sampler.sampling == "random"
        offsets = torch.rand(sampler.n_frames).tolist() if random else None
        if self.cache:
            decoded = self.cache.read(path, sampler, offsets, self.motion)
        else:
            decoded = read_clip(path, sampler, self.size, offsets, self.motion)
        clip = torch.from_numpy(decoded.rgb).permute(0, 3, 1, 2)  # (V*T, H, W, C) -> (V*T, C, H, W)
        if decoded.motion is not None:
            clip = concat_motion(clip, torch.from_numpy(decoded.motion))
        clip = clip.unflatten(0, (sampler.views, sampler.n_frames))  # (V, T, C, H, W)
        for perturb in self.perturbations:
            clip = torch.stack([perturb(view, index) for view in clip])
        return clip.contiguous() if sampler.views > 1 else clip[0].contiguous()


def concat_motion(clip: torch.Tensor, field: torch.Tensor) -> torch.Tensor:
    """`(T, 3, H, W)` uint8 frames and their `(T, 2, h, w)` uint8 motion field as `(T, 5, H, W)`."""
    return torch.cat([clip, F.interpolate(field, clip.shape[-2:], mode="bilinear")], 1)


class Batch(NamedTuple):
    """Clips ready for the model, and the clips that are missing."""

    clips: torch.Tensor  # (B, T, C, H, W), or (B, V, T, C, H, W) with views
    labels: torch.Tensor  # (B,)
    indices: list[int]  # B indices into the data set
    unreadable: list[str]  # an error message for each clip that could not be read
    params: torch.Tensor | None = None  # (B, 9) where the device augments the batch


def collate(samples: Sequence[tuple[int, tuple | str]]) -> Batch:
    """Stack what `ClipsDataset.__getitems__` returns. A batch may come out short, or empty."""
    readable = [(index, *item) for index, item in samples if not isinstance(item, str)]
    unreadable = [item for _, item in samples if isinstance(item, str)]
    if not readable:
        return Batch(torch.empty(0), torch.empty(0, dtype=torch.long), [], unreadable)
    indices, clips, labels, *params = zip(*readable, strict=True)
    return Batch(
        clips=torch.stack(clips),
        labels=torch.tensor(labels, dtype=torch.long),
        indices=list(indices),
        unreadable=unreadable,
        params=torch.stack(params[0]) if params else None,
    )


class _ByValue:
    """A tensor that is pickled with its values, and not as an address in shared memory.

    What comes out of the pickle is the tensor itself.
    """

    def __init__(self, tensor: torch.Tensor) -> None:
        self.array = tensor.numpy()

    def __reduce__(self) -> tuple:
        return torch.as_tensor, (self.array,)


def collate_by_value(samples: Sequence[tuple[int, tuple | str]]) -> Batch:
    """`collate` for worker processes that have no shared memory for their batches."""
    batch = collate(samples)
    if torch.utils.data.get_worker_info() is None:  # nothing is pickled
        return batch
    params = None if batch.params is None else _ByValue(batch.params)
    clips, labels = _ByValue(batch.clips), _ByValue(batch.labels)
    return batch._replace(clips=clips, labels=labels, params=params)


def require_readable(unreadable: Sequence[str], description: str) -> None:
    """Raise a UserError that lists the unreadable clips, if there are any."""
    if unreadable:
        heading = (
            f"{len(unreadable)} {description} clips cannot be read (repair them, take them out of "
            "the manifest, or give --skip-unreadable):"
        )
        raise UserError("\n  ".join([heading, *unreadable]))


def __getattr__(name: str) -> Any:
    """`from dataset import build_dataloaders` works too, although training.loaders defines it."""
    if name == "build_dataloaders":
        from training.loaders import build_dataloaders

        return build_dataloaders
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
