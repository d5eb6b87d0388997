"""Files that are either complete or not there."""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from utils.errors import UserError


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


def load_safely(path: Path, remedy: str) -> dict:
    """Read a file that torch.save wrote, onto the CPU, without running any code from it.

    Raises:
        UserError: it cannot be read, is damaged, or holds something else than a dict; in one line,
            with the remedy.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # flipped bytes raise IndexError, struct.error, AssertionError ...
        size = path.stat().st_size / 1e6
        raise UserError(
            f"{path} ({size:.1f} MB) is damaged or holds no weights ({_reason(path, error)}): "
            f"{remedy}"
        ) from None
    if not isinstance(state, dict):
        raise UserError(f"{path} holds no weights but a {type(state).__name__}: {remedy}")
    return state


def _reason(path: Path, error: Exception) -> str:
    """Why torch.load failed, in a few words.

    Its own text is cut after the first sentence, and left out where it speaks of `weights_only`:
    it advises to switch that off, which would run whatever code a stranger's file holds.
    """
    if not isinstance(error, OSError):  # it can be opened
        with open(path, "rb") as file:
            start = file.read(262)
        # torchvision's first ResNet-18, resnet18-5c106cde.pth, is one of these even when intact.
        if start.endswith(b"ustar"):
            return "the .tar format of 2017, which torch no longer loads safely"
    text = str(error).split("Cannot use ``weights_only")[0].strip()
    return text.splitlines()[0].split(". ")[0].rstrip(".") if text else type(error).__name__


def write_json(path: str | Path, content: dict[str, Any]) -> None:
    """Write a dict as JSON, as a whole."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def to_markdown(
    table: pd.DataFrame, facts: Mapping[str, Any], formats: Mapping[str, str] | None = None
) -> str:
    """A table and its conditions as Markdown; numbers have two digits unless `formats` says so."""
    rows = [
        [_cell(row[name], (formats or {}).get(name, "{:.2f}")) for name in table.columns]
        for row in table.to_dict(orient="records")
    ]
    lines = [list(table.columns), ["---"] * len(table.columns), *rows]
    text = "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
    said = "; ".join(f"{name}: {value}" for name, value in facts.items())
    return f"{text}\n\n{said}\n"


def _cell(value: Any, pattern: str) -> str:
    if isinstance(value, str):
        return value.replace("\\", "\\\\").replace("|", "\\|")
    if value is None or np.isnan(value):
        return "-"
    return pattern.format(value)
