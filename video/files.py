"""Videos on disk: their extensions, whether they changed, and the walk that finds them."""

import hashlib
import os
import stat
from collections import Counter, deque
from pathlib import Path, PurePath
from typing import NamedTuple

from utils.errors import UserError, describe_os_error
from utils.text_table import list_some
from video.frame_folder import frame_files, is_image, is_numbered_image

# fmt: off
VIDEO_SUFFIXES = frozenset({
    # containers
    ".3g2", ".3gp", ".asf", ".avi", ".divx", ".dv", ".f4v", ".flv", ".gxf", ".m2p", ".m2t", ".m2ts",
    ".m4v", ".mkv", ".mod", ".mov", ".mp4", ".mpe", ".mpeg", ".mpg", ".mts", ".mxf", ".nut", ".ogm",
    ".ogv", ".qt", ".rm", ".rmvb", ".swf", ".tod", ".ts", ".vob", ".vro", ".webm", ".wmv", ".wtv",
    # streams of one codec, and animations
    ".264", ".265", ".apng", ".gif", ".h263", ".h264", ".h265", ".hevc", ".ivf", ".m1v", ".m2v",
    ".mjpeg", ".mjpg", ".obu", ".y4m",
})
# fmt: on
"""extensions of files in the formats that video/container.py opens"""

# Folders that a system makes by itself. Their files are copies, previews or deleted ones.
_SYSTEM_FOLDERS = {
    "__MACOSX",
    "@eaDir",
    "@Recycle",
    "#recycle",
    "$RECYCLE.BIN",
    "lost+found",
    "System Volume Information",
}
_MOST_KINDS = 8  # that are named in one line
_MOST_PATHS = 10  # that are named in an error message


class FoundVideos(NamedTuple):
    """The videos in a folder, and the number of other files."""

    paths: list[Path]
    """the videos, and folders of images, sorted"""
    twice: list[tuple[Path, Path]]
    """links to folders that had been read already, and the paths they were read under"""
    passed_over: str
    """how many files and folders of each kind were not read, in one line; empty if none were"""


def no_video(folder: Path, found: FoundVideos, wanted: str = "no video") -> str:
    """The error message for a folder without a video: what it holds instead."""
    return f"{folder}: holds {wanted} ({found.passed_over or 'it is empty'})"


def videos_below(folder: Path) -> list[Path]:
    """All videos below a folder; what is passed over is printed in one line.

    Raises:
        UserError: there are none, or folders or files cannot be read.
    """
    found = find_videos(folder)
    if not found.paths:
        raise UserError(no_video(folder, found))
    if found.passed_over:
        print(f"{folder}: {found.passed_over}")
    return found.paths


def is_video(name: str) -> bool:
    """Whether a file name has the extension of a video."""
    return PurePath(name.strip()).suffix.lower() in VIDEO_SUFFIXES


def fingerprint(clip: Path) -> list[int]:
    """Size and modification time: a file with the same ones is taken for the same file.

    Of a folder of images they are those of all images together with their names. Empty if there is
    no such clip.
    """
    try:
        status = os.stat(clip)
        if not stat.S_ISDIR(status.st_mode):
            return [status.st_size, status.st_mtime_ns]
        images = [(file.entry.name, file.entry.stat()) for file in frame_files(clip)]
    except OSError:
        return []
    known = [(name, status.st_size, status.st_mtime_ns) for name, status in images]
    digest = hashlib.sha256(repr(known).encode("utf-8", "surrogateescape")).digest()
    return [sum(size for _, size, _ in known), int.from_bytes(digest[:7])]


def find_videos(folder: Path) -> FoundVideos:
    """All videos below a folder, and all folders of numbered images.

    A folder is a clip made of images (frame_folder.py) if it holds at least one numbered image, and
    neither a video nor another folder. In all other folders images are passed over: previews beside
    videos, or pictures beside the folders of the classes.

    Links to files and folders are followed. A folder that several paths lead to is read once, under
    its own name if it lies below `folder`; so links that form a loop end there. Hidden files and
    folders, those of the system, and the results of predict.py (`*.timeline`) are passed over.

    Raises:
        UserError: folders or files below it cannot be read.
    """
    paths: list[Path] = []
    twice: list[tuple[Path, Path]] = []
    passed_over: Counter[str] = Counter()
    unreadable: list[str] = []
    read: dict[str, Path] = {}  # the real path of each folder, and the path that it was read under
    waiting = deque([folder])  # links are put at the end, so that they are read last
    while waiting:
        current = waiting.popleft()
        first = read.setdefault(os.path.realpath(current), current)
        if first is not current:
            twice.append((current, first))
            passed_over["read under another name"] += 1
            continue
        try:
            entries = list(os.scandir(current))
        except OSError as error:
            unreadable.append(describe_os_error(error, current))
            continue
        videos: list[Path] = []
        folders: list[os.DirEntry[str]] = []
        images: Counter[str] = Counter()
        has_numbers = False
        for entry in sorted(entries, key=lambda entry: entry.name):
            try:
                kind = _passed_over(entry)
            except OSError as error:  # for example links that lead to each other
                unreadable.append(describe_os_error(error, entry.path))
                continue
            if kind and is_image(entry.name) and entry.is_file():
                images[kind] += 1
                has_numbers |= is_numbered_image(entry.name)
            elif kind:
                passed_over[kind] += 1
            elif entry.is_file():
                videos.append(Path(entry))
            else:
                folders.append(entry)
        if has_numbers and not videos and not folders:
            paths.append(current)
        else:
            passed_over += images
        paths += videos
        for entry in folders:
            if entry.is_symlink():
                waiting.append(Path(entry))
            else:
                waiting.appendleft(Path(entry))
    if unreadable:
        listing = list_some(sorted(unreadable), _MOST_PATHS, "\n  ")
        raise UserError(f"{folder}: allow reading these, or take them out:\n  {listing}")
    return FoundVideos(sorted(paths), twice, _in_one_line(passed_over))


def _passed_over(entry: os.DirEntry[str]) -> str | None:
    """The kind of an entry that is passed over; None for a video or a folder to read."""
    suffix = PurePath(entry.name).suffix.lower()
    if entry.name.startswith("."):
        return "hidden"
    if entry.is_dir():
        if suffix == ".timeline":
            return "made by predict.py"
        return "made by the system" if entry.name in _SYSTEM_FOLDERS else None
    if not entry.is_file():
        return "without content (broken links, pipes)"
    return None if is_video(entry.name) else suffix or "without a suffix"


def _in_one_line(counts: Counter[str]) -> str:
    kinds = sorted(counts, key=lambda kind: (-counts[kind], kind))
    texts = [f"{counts[kind]:,} {kind}" for kind in kinds[:_MOST_KINDS]]
    if others := sum(counts[kind] for kind in kinds[_MOST_KINDS:]):
        texts.append(f"{others:,} others")
    return f"passed over: {', '.join(texts)}" if texts else ""
