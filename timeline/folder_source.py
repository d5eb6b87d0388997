"""Folders of numbered images as sources of whole videos."""

from collections.abc import Iterator
from pathlib import Path

import av

from timeline.sources import Frame, FrameSource
from video.container import ClipError
from video.frame_folder import frame_positions, mixed_sizes, read_image


class FolderSource(FrameSource):
    """A folder of numbered images. Only the images that the model is shown are decoded.

    Where images are missing or damaged there is a gap, as in a video.

    Args:
        rate: images per second.
    """

    def __init__(
        self, path: Path, fps: float, size: int, rate: float, preview: bool = False
    ) -> None:
        super().__init__(str(path), fps, size, preview)
        self.path = path
        self.rate = rate

    def __iter__(self) -> Iterator[Frame]:
        frames = frame_positions(self.path)
        self.duration = (frames[-1][0] + 1) / self.rate
        first_size: tuple[int, int] | None = None
        error = ""
        for position, name in frames:
            if self.closing:
                return
            seconds, frame = position / self.rate, None
            if self._is_due(seconds):
                try:
                    image = read_image(self.path / name)  # (H, W, 3)
                    size = (image.shape[1], image.shape[0])
                    first_size = first_size or size
                    if size != first_size:
                        raise ClipError(self.path, mixed_sizes(name, size, first_size))
                except ClipError as problem:
                    error = error or problem.reason
                    continue
                frame = self._take(av.VideoFrame.from_ndarray(image, format="rgb24"), seconds)
            if seconds > self.end + 0.5 / self.rate:
                self._mark_gap(seconds, error or "images are missing")
            error = ""
            self.end = (position + 1) / self.rate
            if frame:
                yield frame
        if not self.end:
            raise ClipError(self.path, f"holds no image that can be read: {error}")
        if error:
            self._mark_gap(self.duration, error)
