"""Clips that are folders of numbered JPEG or PNG images, one image per frame.

Cholec80 and CholecT50 are distributed like this, and so are the "raw frames" of TSM and mmaction2
(`img_00001.jpg`). The number of an image is the last run of digits in its name. The first one may
be 0, 1 or any other, and all numbers may be apart by the same step (0, 25, 50 ...).

Anything else is an error and never guessed: a missing or a double number, JPEG beside PNG, an image
without a number, images of different sizes. Other files, hidden ones, folders, and the pictures of
optical flow that TSM and mmaction2 keep beside the frames (`flow_x_00001.jpg`) are ignored.
"""

import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from utils.errors import ClipError, os_error_cause
from utils.run_dir import sanitize

if TYPE_CHECKING:
    from PIL import Image

# Larger frames are decompression bombs and do not come from an endoscope: 8K is 33 million pixels.
MAX_PIXELS = 8192 * 4608

# Regular expressions, because pathlib would take half of the time of reading a clip.
_IMAGE = re.compile(r"(?!\.)(.*)\.(jpe?g|png)", re.IGNORECASE | re.DOTALL)
_LAST_DIGITS = re.compile(r"([0-9]+)[^0-9]*\Z")
_FLOW = re.compile(r"(flow_)?[xy]_[0-9]+", re.IGNORECASE)


class FrameFile(NamedTuple):
    """An image in a folder of frames."""

    number: int | None
    """the last run of digits in its name; None: it has none"""
    kind: str
    """jpeg or png, by its extension; the content decides how it is decoded"""
    entry: os.DirEntry[str]


class ImageMetadata(NamedTuple):
    """What the header of an image tells."""

    width: int
    height: int
    codec: str
    """jpeg or png"""


def is_image(name: str) -> bool:
    """Whether a file name is that of a JPEG or PNG image, and not hidden."""
    return _IMAGE.fullmatch(name) is not None


def is_numbered_image(name: str) -> bool:
    """Whether a file name is that of an image with a number."""
    match = _IMAGE.fullmatch(name)
    return match is not None and _LAST_DIGITS.search(match[1]) is not None


def is_frame_folder(path: str | os.PathLike[str]) -> bool:
    """Whether a path is a folder that holds a JPEG or PNG image; `list_frames` may still refuse
    it."""
    try:
        with os.scandir(path) as entries:
            return any(is_image(entry.name) for entry in entries)
    except (OSError, ValueError):  # no folder, or a name that no path can have
        return False


def frame_files(folder: Path) -> list[FrameFile]:
    """The images of a folder in the order of their numbers, whatever may be wrong with them.

    Raises:
        OSError: the folder cannot be read.
    """
    images, flow = [], []
    with os.scandir(folder) as entries:
        for entry in entries:
            if match := _IMAGE.fullmatch(entry.name):
                stem, suffix = match.groups()
                digits = _LAST_DIGITS.search(stem)
                kind = "png" if suffix.lower() == "png" else "jpeg"
                file = FrameFile(int(digits[1]) if digits else None, kind, entry)
                (flow if _FLOW.fullmatch(stem) else images).append(file)
    return sorted(images or flow, key=lambda file: (file.number or 0, file.entry.name))


def list_frames(folder: Path) -> list[str]:
    """The names of a folder's images, in the order of their numbers.

    Raises:
        ClipError: there is no such folder, it holds no image, the images cannot be put in order, or
            some are missing between the first and the last one.
    """
    names, step = _numbered(folder)
    numbers = list(names)
    for before, number in pairwise(numbers):
        if number != before + step:
            raise _error(
                folder,
                f"image {before + step} is missing: {names[number]} comes after {names[before]}",
            )
    return list(names.values())


def frame_positions(folder: Path) -> list[tuple[int, str]]:
    """The position of each image in the video, counted from 0, and its name.

    Where images are missing, the positions jump.

    Raises:
        ClipError: see `list_frames`.
    """
    names, step = _numbered(folder)
    first = min(names)
    return [((number - first) // step, name) for number, name in names.items()]


def _numbered(folder: Path) -> tuple[dict[int, str], int]:
    """The name of each image by its number, in their order, and the step between two numbers."""
    try:
        files = frame_files(folder)
        odd = next((file.entry.name for file in files if not file.entry.is_file()), None)
    except OSError as error:
        raise _error(folder, f"cannot be read: {os_error_cause(error)}") from error
    if not files:
        raise _error(folder, "not a file, and a folder without JPEG or PNG images")
    if odd:  # opening a pipe would block for ever
        raise _error(folder, f"{odd} is not a file (a broken link, a folder, a pipe)")
    if len({file.kind for file in files}) > 1:
        raise _error(folder, "holds JPEG and PNG images: keep one of the two kinds")
    names: dict[int, str] = {}
    for number, _, entry in files:
        if number is None:
            raise _error(folder, f"{entry.name} has no number: its place is not known")
        if number in names:
            raise _error(
                folder, f"two images have the number {number}: {names[number]} and {entry.name}"
            )
        names[number] = entry.name
    # Two numbers alone do not tell whether they are a step apart or whether images are missing.
    first = min(names)
    return names, math.gcd(*(number - first for number in names)) if len(names) > 2 else 1


def read_metadata(path: Path) -> ImageMetadata:
    """The size and codec of an image by its header. A rotation by EXIF is not applied to the size.

    Raises:
        ClipError: see `read_image`.
    """
    with _open(path) as image:
        return ImageMetadata(*image.size, "png" if image.format == "PNG" else "jpeg")


def read_image(path: Path, size: tuple[int, int] | None = None) -> np.ndarray:
    """Decode an image as a viewer shows it: `(H, W, 3)` uint8 RGB, upright by its EXIF data.

    Of 16 bits the upper 8 are kept, as everywhere. What is transparent is shown on black.

    Args:
        size: width and height that the header must tell (None: any).

    Raises:
        ClipError: it is neither JPEG nor PNG, of another size, too large, or damaged. The error
            names the folder as the clip.
    """
    from PIL import ImageOps  # not above: --help does without it

    with _open(path) as image:
        if size and image.size != size:
            raise _error(path.parent, mixed_sizes(path.name, image.size, size))
        image.load()
        if "exif" in image.info:
            image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):  # 16 bits of grey, which Pillow would clip to 255
            grey = (np.asarray(image).astype(np.int32) >> 8).astype(np.uint8)
            return np.repeat(grey[..., None], 3, axis=2)
        if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
            premultiplied = image.convert("RGBA").convert("RGBa")
            return np.ascontiguousarray(np.asarray(premultiplied)[..., :3])
        return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))


def mixed_sizes(name: str, size: tuple[int, int], first: tuple[int, int]) -> str:
    """The error message for an image of another width and height than the first one."""
    return (
        f"images of mixed sizes: {name} has {size[0]} x {size[1]} pixels, the first image "
        f"{first[0]} x {first[1]}"
    )


def _error(folder: Path, reason: str) -> ClipError:
    """An error whose message stays one line, whatever the images are called."""
    return ClipError(folder, sanitize(reason))


@contextmanager
def _open(path: Path) -> Iterator["Image.Image"]:
    """An image whose header was read. All errors inside become a ClipError of the folder."""
    from PIL import Image

    try:
        with Image.open(path, formats=["JPEG", "PNG"]) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise ValueError(f"{width} x {height} pixels are too many")
            yield image
    except ClipError:
        raise
    except Image.UnidentifiedImageError:
        what = "is empty" if not path.stat().st_size else "is no JPEG or PNG image, or damaged"
        raise _error(path.parent, f"{path.name} {what}") from None
    except OSError as error:
        reason = os_error_cause(error)
        raise _error(path.parent, f"{path.name} cannot be read: {reason}") from error
    except Exception as error:  # Pillow's parsers let many kinds through (SyntaxError, IndexError)
        raise _error(path.parent, f"{path.name} cannot be read: {error}") from error
