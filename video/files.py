"""Video files: their extensions, and the walk that finds them in a folder of a user."""

import os
from collections import Counter, deque
from pathlib import Path, PurePath
from typing import NamedTuple

from utils.errors import UserError, describe_os_error
from utils.text_table import list_some

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
    """the videos, sorted"""
    twice: list[tuple[Path, Path]]
    """links to folders that had been read already, and the paths they were read under"""
    passed_over: str
    """how many files and folders of each kind were not read, in one line; empty if none were"""


def no_video(folder: Path, found: FoundVideos, wanted: str = "no video") -> str:
    """The error message for a folder without a video: what it holds instead."""
    return f"{folder}: holds {wanted} ({found.passed_over or 'it is empty'})"


def is_video(name: str) -> bool:
    """Whether a file name has the extension of a video."""
    return PurePath(name.strip()).suffix.lower() in VIDEO_SUFFIXES


def find_videos(folder: Path) -> FoundVideos:
    """All videos below a folder.

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
        for entry in sorted(entries, key=lambda entry: entry.name):
            try:
                kind = _passed_over(entry)
            except OSError as error:  # for example links that lead to each other
                unreadable.append(describe_os_error(error, entry.path))
                continue
            if kind:
                passed_over[kind] += 1
            elif entry.is_file():
                paths.append(Path(entry))
            elif entry.is_symlink():
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
