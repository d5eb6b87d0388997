"""The files that predict.py leaves for a video, and where."""

import re
import time
from pathlib import Path

from atomic import remove_unfinished
from plots import plot_timeline
from run_folder import public_address
from timeline import Timeline, write_subtitles, write_timeline
from timeline_page import write_timeline_page


def output_folders(names: list[str | Path], output: str) -> list[Path]:
    """A folder for each input: `operation.mp4.timeline` beside the video, or below `output`.

    Args:
        names: paths of files, and what else predict.py reads from, as text.
    """
    folders: list[Path] = []
    for name in names:
        if isinstance(name, Path):
            folder = Path(output or name.parent) / f"{name.name}.timeline"
        else:
            stream = "pipe" if name == "-" else safe_name(public_address(name))
            now = time.strftime("%Y%m%d-%H%M%S")
            folder = Path(output or "predictions") / f"{now}_{stream}.timeline"
        stem, number = folder.stem, 1
        while folder in folders:  # files of one name in several folders, one output
            number += 1
            folder = folder.with_name(f"{stem}_{number}.timeline")
        folders.append(folder)
    return folders


def write_outputs(
    folder: Path, timeline: Timeline, video: Path | None, facts: dict[str, str]
) -> None:
    """Write timeline.csv, timeline.vtt, timeline.png and timeline.html; frames.csv is there."""
    remove_unfinished(folder)
    write_timeline(folder / "timeline.csv", timeline.segments)
    write_subtitles(folder / "timeline.vtt", timeline.segments)
    plot_timeline(timeline, folder / "timeline.png")
    write_timeline_page(folder / "timeline.html", timeline, video, facts)


def safe_name(name: str) -> str:
    """A source's name as part of a file name."""
    return re.sub(r"[^\w.-]+", "_", name).strip("._") or "video"
