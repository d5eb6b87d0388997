"""Files that are either complete or not there."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it to `path` if the block ends well.

    Whoever looks at `path`, even after a kill or a power cut, sees the old file or the whole new
    one. The temporary file keeps the suffix, from which writers choose the format.
    """
    path = Path(path)
    unfinished = path.with_name(f".{path.stem}.{os.getpid()}.unfinished{path.suffix}")
    try:
        yield unfinished
        with open(unfinished, "rb") as file:  # on the disk before the name points to it
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write a text file as a whole."""
    with atomic(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def remove_unfinished(folder: str | Path) -> None:
    """Delete what writers that were killed left in a folder."""
    for leftover in Path(folder).glob(".*.unfinished*"):
        leftover.unlink(missing_ok=True)
