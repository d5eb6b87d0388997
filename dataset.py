"""Clips as tensors: `ClipsDataset`, its transforms, and batches that know what is missing."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

from errors import UserError
from manifest import CLASSES, ClipRow, get_num_classes, read_manifest
from sampling import Sampling
from video import ClipError, read_clip

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
    """The clips of a manifest: `dataset[i]` is `((T, C, H, W) uint8 RGB, label)`.

    Args:
        rows: what `read_manifest` returns.
        n_frames: T.
        size: H and W in pixels. The whole picture is squeezed into the square: nothing at the edge
            of the view is cut off (instruments enter there, and PanoView and LocPanoView differ by
            how much is in view), and every source, cache and stream is squeezed alike. Shapes are
            distorted by the picture's aspect ratio, the same in training and testing.
        sampling: which frames; see `video.sample_indices`.
        transform: applied once to the whole clip; see `get_train_transform`.
        views: temporal views of each clip, for evaluation; above 1 a clip is `(V, T, C, H, W)`.
        shuffle_frames: put each clip's frames into a fixed random order: how much accuracy this
            costs tells how much of it comes from motion.

    An index may be a pair `(i, seed)`: sampling and transform then draw from that seed alone, so
    that a clip comes out the same whatever the number of workers and wherever training resumed.

    Raises:
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
    ) -> None:
        self.rows = list(rows)
        self.n_frames = n_frames
        self.size = size
        self.sampling = sampling
        self.transform = transform
        self.views = views
        self.shuffle_frames = shuffle_frames

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int | tuple[int, int]) -> tuple[torch.Tensor, int]:
        if isinstance(index, tuple):
            index, seed = index
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                return self._clip(index), self.rows[index].label
        return self._clip(index), self.rows[index].label

    def _clip(self, index: int) -> torch.Tensor:
        draws = torch.rand(self.n_frames).tolist() if self.sampling == "random" else None
        path = self.rows[index].path
        frames = read_clip(path, self.n_frames, self.sampling, self.size, draws, self.views)
        clip = torch.from_numpy(frames).permute(0, 3, 1, 2)  # (V*T, H, W, C) -> (V*T, C, H, W)
        if self.transform is not None:
            clip = self.transform(clip)
        clip = clip.unflatten(0, (self.views, self.n_frames))  # (V, T, C, H, W)
        if self.shuffle_frames:
            seed = torch.Generator().manual_seed(index)
            clip = clip[:, torch.randperm(self.n_frames, generator=seed)]
        return clip.contiguous() if self.views > 1 else clip[0].contiguous()


def get_train_transform(
    size: int = 224,
    flip: float = 0.5,
    rotation: float = 10.0,
    translate: float = 0.05,
    zoom: float = 0.1,
    brightness: float = 0.2,
    contrast: float = 0.2,
    saturation: float = 0.2,
    hue: float = 0.02,
) -> Transform:
    """Random flip, rotation, affine and colour jitter, drawn once for the whole clip.

    Takes and returns `(T, C, H, W)`; uint8 stays uint8 (the model converts and normalises), clips
    of another size are resized to `size` first. All frames share one draw: redrawing for each frame
    would make the scene jump and bury the motion that the classes differ in.

    Args:
        flip: probability of a horizontal flip.
        rotation: largest angle, degrees. Rotation, translation and zoom are one affine map, so
            that the pixels are interpolated once.
        translate: largest shift, as a share of the size.
        zoom: largest relative change of scale.
        brightness, contrast, saturation, hue: strengths of `ColorJitter`.

    Strong zoom and flips blur the difference between PanoView and LocPanoView, which is camera
    motion: keep them mild where that matters. A strength of 0 switches its step off.
    """
    steps: list[torch.nn.Module] = [_resize(size)]
    if flip:
        steps.append(v2.RandomHorizontalFlip(flip))
    if rotation or translate or zoom:
        steps.append(
            v2.RandomAffine(
                degrees=rotation,
                translate=(translate, translate),
                scale=(1 - zoom, 1 + zoom),
                interpolation=v2.InterpolationMode.BILINEAR,
            )
        )
    if brightness or contrast or saturation or hue:
        steps.append(v2.ColorJitter(brightness, contrast, saturation, hue))
    return v2.Compose([_AsVideo(), *steps, v2.ToPureTensor()])


def get_val_transform(size: int = 224) -> Transform:
    """No randomness: `(T, C, H, W)` to `(T, C, size, size)`, unchanged if it has that size."""
    return v2.Compose([_AsVideo(), _resize(size), v2.ToPureTensor()])


def _resize(size: int) -> v2.Resize:
    # Clips of ClipsDataset come in this size from the decoder; then v2 returns them untouched.
    return v2.Resize((size, size), antialias=True)


class _AsVideo(torch.nn.Module):
    """Tells v2 that the frames are one video, so that it draws once for all of them."""

    def forward(self, clip: torch.Tensor) -> tv_tensors.Video:
        return tv_tensors.Video(clip)


class Batch(NamedTuple):
    """Clips ready for the model, and what is missing from them."""

    clips: torch.Tensor  # (B, T, C, H, W), or (B, V, T, C, H, W) with views
    labels: torch.Tensor  # (B,)
    indices: torch.Tensor  # (B,) places in the data set
    unreadable: list[str]  # a line for each clip that could not be read and is left out


class ReportingDataset(Dataset):
    """A `ClipsDataset` for loaders: an unreadable clip becomes a line, not an exception."""

    def __init__(self, clips: ClipsDataset) -> None:
        self.clips = clips

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, index: int | tuple[int, int]) -> tuple:
        number = index[0] if isinstance(index, tuple) else index
        try:
            return *self.clips[index], number
        except ClipError as error:
            return str(error), None, number


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
    readable = [sample for sample in samples if sample[1] is not None]
    clips = [clip for clip, _, _ in readable]
    return Batch(
        clips=torch.stack(clips) if clips else torch.empty(0),
        labels=torch.tensor([label for _, label, _ in readable], dtype=torch.long),
        indices=torch.tensor([index for _, _, index in readable], dtype=torch.long),
        unreadable=[line for line, label, _ in samples if label is None],
    )
