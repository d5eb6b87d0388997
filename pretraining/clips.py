"""The clips of a pretraining: which they are, windows of long videos, and how they are read."""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F

from clips.fingerprints import (
    COMPARED_PER_SECOND,
    HASHES_PER_SECOND,
    Fingerprint,
    find_seen,
    fingerprints,
    pack,
)
from clips.manifest import ClipRow, parse_manifest, raise_problems
from clips.manifest_formats import ManifestOptions, parse_slam_filename, patient_finder
from clips.splits import find_splits
from clips.transforms import ClipAugment
from dataset import ClipsDataset
from utils.errors import UserError
from utils.workers import in_parallel
from video.container import ClipError, probe
from video.excerpt import Excerpt, frame_times, write_excerpts
from video.files import fingerprint as stamp
from video.files import is_video

_PER_TASK = 20  # windows that a process cuts at once: the video is decoded through them
Tell = Callable[[str], Any]


def find_clips(
    sources: Sequence[str],
    data_root: str = "",
    options: ManifestOptions | None = None,
    whole: bool = False,
) -> list[ClipRow]:
    """The clips and videos that are named, each one once, whatever their labels.

    Args:
        sources: videos, manifests, or folders. Of a folder or a manifest with splits only the
            training clips are taken; of any other folder all videos below it.
        data_root: folder of the clips of manifests (empty: the folder of each).
        whole: take the clips of all splits.

    Raises:
        UserError: a source does not exist, lists clips that do not exist, or holds none.
    """
    options = options or ManifestOptions()
    rows: dict[str, ClipRow] = {}
    for source in map(Path, sources):
        for row in _clips_of(source, data_root or None, options, "" if whole else "train"):
            known = rows.setdefault(os.path.realpath(row.path), row)
            if row.patient and not known.patient:  # another source says whose it is
                rows[os.path.realpath(row.path)] = row
    return list(rows.values())


def _clips_of(
    source: Path, data_root: str | None, options: ManifestOptions, split: str
) -> list[ClipRow]:
    if source.is_file() and is_video(source.name):
        patient = patient_finder(options.patient_pattern)(str(source))
        patient = patient or parse_slam_filename(source.name).get("patient")
        return [ClipRow(source, 0, patient)]
    found = find_splits(source, None, options) if source.is_dir() else source
    manifests = [found]
    if isinstance(found, dict):
        manifests = [path for name, path in found.items() if split in ("", name)]
    rows, problems = [], []
    for manifest in manifests:
        root = data_root or (source if source.is_dir() else None)
        more, new_problems = parse_manifest(manifest, root, None, options, split)
        rows += more
        problems += new_problems
    raise_problems(problems)
    return rows


def exclude(rows: Sequence[ClipRow], excluded: Sequence[ClipRow], tell: Tell) -> list[ClipRow]:
    """The rows without the files and the patients of others.

    Raises:
        UserError: nothing is left.
    """
    files = {os.path.realpath(row.path) for row in excluded}
    patients = {row.patient for row in excluded if row.patient}
    kept = [
        row
        for row in rows
        if os.path.realpath(row.path) not in files and row.patient not in patients
    ]
    if not kept:
        raise UserError("--exclude leaves no clip to pretrain on")
    tell(f"excluded: {len(rows) - len(kept):,} of {len(rows):,} clips and videos")
    if unknown := sum(row.patient is None for row in kept):
        tell(
            f"the patients of {unknown:,} clips are unknown: they may be excluded ones (give "
            "--patient-pattern, or a manifest with a column `patient`)"
        )
    return kept


def cut_windows(
    rows: Sequence[ClipRow],
    folder: Path,
    seconds: float,
    stride: float,
    longest: float,
    num_workers: int,
    tell: Tell,
) -> tuple[list[ClipRow], list[ClipRow]]:
    """The clips, with windows in place of the long videos.

    A window is cut once and kept as a file, because reading it out of a long video would read all
    of the video. Started again, only the missing ones are cut.

    Args:
        folder: where the windows are kept; their names tell no patient.
        seconds, stride: length of a window, and the time from one start to the next.
        longest: videos that are longer are cut; folders of images never.

    Returns:
        The clips, and the videos that were cut.
    """
    clips, videos, tasks, windows = [], [], [], {}
    for row, duration in in_parallel(_duration, rows, num_workers, "reading", "video"):
        if duration <= longest:
            clips.append(row)
            continue
        videos.append(row)
        name = json.dumps([str(row.path.absolute()), *stamp(row.path)])
        name = hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest()[:16]
        count = int((duration - seconds) / stride + 1e-6) + 1
        excerpts = []
        for start in (number * stride for number in range(count)):
            times = f"{round(1000 * start)}-{round(1000 * (start + seconds))}"
            excerpts.append(Excerpt(start, start + seconds, folder / f"{name}_{times}.mp4"))
        windows |= {e.target: row._replace(path=e.target) for e in excerpts}
        missing = [excerpt for excerpt in excerpts if not excerpt.target.is_file()]
        parts = range(0, len(missing), _PER_TASK)
        tasks += [(row.path, missing[i : i + _PER_TASK]) for i in parts]
    if not videos:
        return clips, []
    folder.mkdir(parents=True, exist_ok=True)
    problems = []
    for (path, excerpts), results in in_parallel(_cut, tasks, num_workers, "cutting", "part"):
        pairs = zip(excerpts, results, strict=True)
        problems += [f"{path}, {e.start:.1f} s: {reason}" for e, reason in pairs if reason]
    cut = [row for target, row in windows.items() if target.is_file()]
    tell(f"{len(videos):,} long videos: {len(cut):,} windows of {seconds:g} s in {folder}")
    if problems:
        tell("\n  ".join([f"{len(problems):,} windows could not be cut:", *problems]))
    return clips + cut, videos


def _duration(row: ClipRow) -> float:
    """Seconds; 0 for what is not cut: folders of images, and what cannot be read."""
    try:
        metadata = probe(row.path)
        return 0.0 if row.path.is_dir() or not metadata.rate else frame_times(row.path).duration
    except ClipError:  # `keep_usable` tells it
        return 0.0


def _cut(task: tuple[Path, list[Excerpt]]) -> list[str]:
    return write_excerpts(*task)


class Usable(NamedTuple):
    """The clips that are pretrained on, and what happened to all."""

    rows: list[ClipRow]
    fingerprints: list[Fingerprint]
    """those of `rows`"""
    left_out: dict[Path, str]
    """why the other clips are not used"""


def keep_usable(rows: Sequence[ClipRow], num_workers: int, tell: Tell) -> Usable:
    """The clips that can be read and are not black, with their fingerprints.

    Raises:
        UserError: there is none.
    """
    found = fingerprints(rows, HASHES_PER_SECOND, num_workers)
    left_out = {}
    for row, one in zip(rows, found, strict=True):
        if one.problem:
            left_out[row.path] = one.problem
        elif one.uniform:
            left_out[row.path] = "black, or almost of one colour"
    kept = [(r, one) for r, one in zip(rows, found, strict=True) if r.path not in left_out]
    if left_out:
        unreadable = [f"{row.path}: {f.problem}" for row, f in zip(rows, found, strict=True)
                      if f.problem]  # fmt: skip
        tell(f"left out: {len(left_out) - len(unreadable):,} clips with black frames")
        if unreadable:
            heading = f"left out: {len(unreadable):,} clips that cannot be read:"
            tell("\n  ".join([heading, *unreadable]))
    if not kept:
        raise UserError("none of the clips can be used: they cannot be read, or are black")
    return Usable([row for row, _ in kept], [one for _, one in kept], left_out)


def exclude_copies(
    usable: Usable, excluded: Sequence[ClipRow], num_workers: int, tell: Tell
) -> Usable:
    """The clips without those that show what excluded clips show, under whatever name.

    Raises:
        UserError: nothing is left.
    """
    # Densely, for these may be short, and their frames must lie near those of the others.
    shown = fingerprints(excluded, COMPARED_PER_SECOND, num_workers)
    packed = pack("", 0, "", [], [each for each in shown if not each.problem])
    copies = set(find_seen(usable.rows, packed, num_workers).clips)
    if not copies:
        return usable
    tell(f"excluded: {len(copies):,} clips that look like excluded ones")
    pairs = zip(usable.rows, usable.fingerprints, strict=True)
    kept = [pair for pair in pairs if pair[0].path not in copies]
    if not kept:
        raise UserError("--exclude leaves no clip to pretrain on")
    left_out = usable.left_out | dict.fromkeys(copies, "looks like an excluded clip")
    return Usable([row for row, _ in kept], [each for _, each in kept], left_out)


class CropFlip:
    """A random crop and flip, and colours, drawn once per clip: `(T, C, H, W)` to `(T, C, size,
    size)`, uint8.

    Args:
        min_area: smallest part of the frame's area that is kept; a crop has the frame's shape.
        hflip_prob: probability of a horizontal flip.
        colours: see `ClipAugment`; without its geometry, which would bring in black from outside.
    """

    def __init__(
        self, size: int, min_area: float, hflip_prob: float, colours: tuple[float, ...]
    ) -> None:
        self.size = size
        self.min_area = min_area
        self.hflip_prob = hflip_prob
        self.colours = ClipAugment(size, 0.0, 0.0, 0.0, 0.0, *colours)

    @property
    def read_size(self) -> int:
        """Height and width to read frames in, so that the smallest crop is not enlarged."""
        return round(self.size / self.min_area**0.5)

    def __call__(self, clip: torch.Tensor) -> torch.Tensor:
        area, down, right, flip = torch.rand(4).tolist()
        whole = clip.shape[-1]
        side = round(whole * (self.min_area + area * (1 - self.min_area)) ** 0.5)
        top, left = (int(part * (whole - side + 1)) for part in (down, right))
        clip = clip[..., top : top + side, left : left + side]
        if flip < self.hflip_prob:
            clip = clip.flip(-1)
        if side != self.size:
            size = (self.size, self.size)
            clip = F.interpolate(clip.float(), size, mode="bilinear", antialias=True)
            clip = clip.round_().clamp_(0, 255).to(torch.uint8)
        return self.colours(clip.contiguous())


class PretrainingClips(ClipsDataset):
    """Clips without labels: `((T, C, H, W) uint8, 0)`; see `ClipsDataset`.

    Args:
        transform: a `CropFlip`.
        shuffle: show the frames of each clip in a random order, a new one each time.
        views: if above 0, a clip has so many fixed random views: the index `(i, seed)` gives view
            `seed % views`, and in place of the label the number `i * views + view`.
        seed: of the views.
    """

    def __init__(
        self,
        rows: Sequence[ClipRow],
        n_frames: int,
        sampling: Any,
        transform: CropFlip,
        shuffle: bool = False,
        views: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(rows, n_frames, transform.read_size, sampling, transform)
        self.shuffle = shuffle
        self.fixed_views = views
        self.seed = seed

    def __getitem__(self, index: int | tuple[int, int]) -> tuple:
        if not self.fixed_views:
            return super().__getitem__(index)
        index, seed = index if isinstance(index, tuple) else (index, 0)
        number = index * self.fixed_views + seed % self.fixed_views
        clip, _ = super().__getitem__((index, (self.seed * 2**31 + number) % 2**63))
        return clip, number

    def _item(self, index: int) -> tuple:
        clip = self.transform(self._read(index))
        return clip[torch.randperm(len(clip))] if self.shuffle else clip, 0
