"""Clips as tensors: `ClipsDataset`, its transforms, and batches that know what is missing."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch.utils.data import Dataset
from torchvision.transforms.v2 import functional as tv

from clips.cache import ClipCache
from clips.corruptions import Corruption, corrupt
from clips.manifest import CLASSES, ClipRow, get_num_classes, read_manifest
from clips.transforms import Augment, spatial_crops
from modeling.frame_encoder import join_motion
from utils.errors import UserError
from video.clip_reader import Sampling, read_clip, read_motion_clip
from video.container import ClipError
from video.motion import Brought, require_opencv

__all__ = [
    "CLASSES",
    "Batch",
    "ClipRow",
    "ClipsDataset",
    "collate",
    "get_num_classes",
    "get_train_transform",
    "get_val_transform",
    "read_manifest",
    "require_readable",
]

Transform = Callable[[torch.Tensor], torch.Tensor]


class ClipsDataset(Dataset):
    """The clips of a manifest: `dataset[i]` is `((T, C, H, W) uint8, label)`, RGB or with motion.

    Args:
        rows: what `read_manifest` returns.
        n_frames: T.
        size: H and W in pixels. The whole picture is squeezed into the square: nothing at the edge
            of the view is cut off (instruments enter there, and PanoView and LocPanoView differ by
            how much is in view), and every source, cache and stream is squeezed alike. Shapes are
            distorted by the picture's aspect ratio, the same in training and testing.
        sampling: which frames; see `sampling.sample_indices`.
        strong: applied once to the whole clip before `transform`, also if that is deferred.
        transform: applied once to the whole clip; see `get_train_transform`.
        cache: where the clips are read instead of being decoded.
        defer: only draw the transform's random numbers (it is an `Augment`) and return them beside
            the clip, `(clip, label, draw)`, for a device that applies them to whole batches.
        views: temporal views of each clip, for evaluation; above 1 a clip is `(V, T, C, H, W)`.
        corruption: name and severity, see `corruptions.corrupt`; clip i is always corrupted alike.
        shuffle_frames: put each clip's frames into a fixed random order: how much accuracy this
            costs tells how much of it comes from motion. Measured motion stays with its frame.
        inputs: see motion.py.
        crops: spatial crops of each view, for evaluation; see `crops.spatial_crops`. Above 1 a clip
            is `(V * crops, T, C, H, W)`, the crops of a view one after another.

    An index may be a pair `(i, seed)`: sampling and transforms then draw from that seed alone, so
    that a clip comes out the same whatever the number of workers and wherever training resumed.

    Raises:
        UserError: flow is to be computed and OpenCV is not installed.
        ClipError: on access to a clip that cannot be read. No other clip takes its place.
    """

    def __init__(
        self,
        rows: Sequence[ClipRow],
        n_frames: int = 16,
        size: int = 224,
        sampling: Sampling = "uniform",
        transform: Transform | None = None,
        views: int = 1,
        shuffle_frames: bool = False,
        cache: ClipCache | None = None,
        defer: bool = False,
        corruption: tuple[Corruption, int] | None = None,
        strong: Transform | None = None,
        inputs: Brought = "rgb",
        crops: int = 1,
    ) -> None:
        if inputs == "rgb+flow" and cache is None:
            require_opencv()
        self.rows = list(rows)
        self.n_frames = n_frames
        self.size = size
        self.sampling = sampling
        self.transform = transform
        self.views = views
        self.shuffle_frames = shuffle_frames
        self.cache = cache
        self.defer = defer
        self.corruption = corruption
        self.strong = strong
        self.inputs = inputs
        self.crops = crops

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int | tuple[int, int]) -> tuple:
        if isinstance(index, tuple):
            index, seed = index
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                return self._item(index)
        return self._item(index)

    def _item(self, index: int) -> tuple:
        clip, label = self._read(index), self.rows[index].label
        if self.strong is not None:
            clip = self.strong(clip)
        if self.defer:
            return clip, label, self.transform.draw()
        if self.transform is not None:
            views = clip.flatten(0, -4)  # all views of a clip are changed alike
            clip = self.transform(views).view(*clip.shape[:-3], -1, self.size, self.size)
        if self.crops > 1:
            views = clip if self.views > 1 else clip.unsqueeze(0)
            clip = torch.cat([spatial_crops(view, self.crops) for view in views])
        return clip, label

    @property
    def answers(self) -> int:
        """How many times a model looks at each clip: views times crops."""
        return self.views * self.crops

    def _read(self, index: int) -> torch.Tensor:
        draws = torch.rand(self.n_frames).tolist() if self.sampling == "random" else None
        path = self.rows[index].path
        how = (self.n_frames, self.sampling)
        field = None
        if self.inputs != "rgb":
            if self.cache:
                frames, field = self.cache.read_motion(path, *how, draws, self.views)
            else:
                frames, field = read_motion_clip(
                    path, *how, self.size, draws, self.views, self.inputs
                )
        elif self.cache:
            frames = self.cache.read(path, *how, draws, self.views)
        else:
            frames = read_clip(path, *how, self.size, draws, self.views)
        clip = torch.from_numpy(frames).permute(0, 3, 1, 2)  # (V*T, H, W, C) -> (V*T, C, H, W)
        if field is not None:
            clip = join_motion(clip, torch.from_numpy(field))
        clip = clip.unflatten(0, (self.views, self.n_frames))  # (V, T, C, H, W)
        if self.corruption:
            clip = torch.stack([corrupt(view, *self.corruption, seed=index) for view in clip])
        if self.shuffle_frames:
            seed = torch.Generator().manual_seed(index)
            clip = clip[:, torch.randperm(self.n_frames, generator=seed)]
        return clip.contiguous() if self.views > 1 else clip[0].contiguous()


get_train_transform = Augment
"""The transform of training clips: see `augment.Augment` for its strengths."""


def get_val_transform(size: int = 224) -> Transform:
    """No randomness: `(T, C, H, W)` to `(T, C, size, size)`, unchanged if it has that size."""

    def resized(clip: torch.Tensor) -> torch.Tensor:
        # Clips of ClipsDataset come in this size from the decoder; others are resized here.
        same = clip.shape[-2:] == (size, size)
        return clip if same else tv.resize(clip, [size, size], antialias=True)

    return resized


class Batch(NamedTuple):
    """Clips ready for the model, and what is missing from them."""

    clips: torch.Tensor  # (B, T, C, H, W), or (B, V, T, C, H, W) with views
    labels: torch.Tensor  # (B,)
    indices: torch.Tensor  # (B,) places in the data set
    unreadable: list[str]  # a line for each clip that could not be read and is left out
    draws: torch.Tensor | None = None  # (B, 9) where augmenting is left to the training step


class ReportingDataset(Dataset):
    """A `ClipsDataset` for loaders: `(index, item)`; an unreadable clip's item is a line."""

    def __init__(self, clips: ClipsDataset) -> None:
        self.clips = clips

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, index: int | tuple[int, int]) -> tuple[int, tuple | str]:
        number = index[0] if isinstance(index, tuple) else index
        try:
            return number, self.clips[index]
        except ClipError as error:
            return number, str(error)


def require_readable(unreadable: Sequence[str], what: str) -> None:
    """Raise a UserError that lists the unreadable clips, if there are any."""
    if unreadable:
        heading = (
            f"{len(unreadable)} {what} clips cannot be read (mend them, take them out of the "
            "manifest, or give --skip-unreadable):"
        )
        raise UserError("\n  ".join([heading, *unreadable]))


def collate(samples: Sequence[tuple]) -> Batch:
    """Stack the samples of a `ReportingDataset`. A batch may come out short, or empty."""
    readable = [(number, *item) for number, item in samples if not isinstance(item, str)]
    unreadable = [item for _, item in samples if isinstance(item, str)]
    if not readable:
        nothing = torch.empty(0, dtype=torch.long)
        return Batch(torch.empty(0), nothing, nothing, unreadable)
    indices, clips, labels, *draws = zip(*readable, strict=True)
    return Batch(
        clips=torch.stack(clips),
        labels=torch.tensor(labels, dtype=torch.long),
        indices=torch.tensor(indices, dtype=torch.long),
        unreadable=unreadable,
        draws=torch.stack(draws[0]) if draws else None,
    )
