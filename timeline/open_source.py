"""What the arguments of predict.py name: files, folders, cameras, addresses and a pipe."""

from pathlib import Path
from typing import TYPE_CHECKING

from utils.errors import UserError
from video.files import videos_below

if TYPE_CHECKING:
    from timeline.sources import FrameSource

# The sources are imported where they are opened: predict.py --help is fast.


def find_sources(texts: tuple[str, ...], frame_rate: float | None = None) -> list[str | Path]:
    """The sources: files, and the videos of folders, as paths; cameras, addresses and - as text.

    Args:
        frame_rate: images per second in folders of numbered images.

    Raises:
        UserError: there is none; a text is not a file, folder, camera or address; the frame rate of
            a folder of images is not known.
    """
    from timeline.live_source import is_live

    sources: list[str | Path] = []
    for text in texts:
        path = Path(text)
        if text == "-" or (is_live(text) and not path.exists()):
            sources.append(text)
        elif path.is_dir():
            sources += videos_below(path)
        elif path.suffix.lower() in (".csv", ".tsv", ".xlsx") and path.is_file():
            raise UserError(f"{path}: is a table: for the clips that it lists, add --clips OUT.csv")
        elif path.exists():
            sources.append(path)
        else:
            raise UserError(f"{text}: no such file, and not the number of a camera or an address")
    if not sources:
        raise UserError("no source: give a video file, a folder, the number of a camera ...")
    if len(sources) > 1 and any(isinstance(source, str) for source in sources):
        raise UserError("a live source or a pipe must be the only source: start one process each")
    folders = [s for s in sources if isinstance(s, Path) and s.is_dir()]
    if folders and frame_rate is None:
        raise UserError(
            f"{folders[0]}: images do not tell how many of them were taken per second: give it as "
            "--frame-rate (25 if they are all frames of a usual video, 1 for one per second); "
            "move the folder away if it is no recording"
        )
    if frame_rate is not None and not folders:
        raise UserError("--frame-rate is for folders of images, and no source is one: leave it out")
    unique = {s if isinstance(s, str) else s.resolve(): s for s in sources}
    return list(unique.values())


def open_source(
    source: str | Path,
    fps: float,
    size: int,
    preview: bool,
    frame_rate: float | None,
    reconnect_timeout: float,
) -> "FrameSource":
    """The frames of a source as the model needs them.

    Args:
        source: one of `find_sources`.
        fps, size, preview: see `FrameSource`.
        frame_rate: images per second, if the source is a folder of images.
        reconnect_timeout: seconds after which a lost live stream is given up; 0: never.
    """
    from timeline.folder_source import FolderSource
    from timeline.live_source import open_address
    from timeline.sources import FileSource, PipeSource

    if isinstance(source, Path) and source.is_dir():
        return FolderSource(source, fps, size, frame_rate, preview)
    if isinstance(source, Path):
        return FileSource(source, fps, size, preview)
    if source == "-":
        return PipeSource(fps, size, preview)
    return open_address(source, fps, size, preview, reconnect_timeout)
