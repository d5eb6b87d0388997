"""Writing files atomically, and reading files without running code from them."""

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.errors import UserError

if TYPE_CHECKING:
    import pandas as pd


@contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`, and rename it to `path` if the block ends well.

    Even after a kill or a power cut `path` is either the old file or the complete new one. The
    temporary file has the suffix of `path`, because some writers choose the format by it.
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
    r"""Write a text file atomically, with the same bytes on every system.

    The name of a file may hold bytes that are not UTF-8: such a byte is written as `\udcff`, which
    JSON reads back as the same name.
    """
    with atomic(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8", errors="backslashreplace", newline="\n")


def remove_unfinished(folder: str | Path) -> None:
    """Delete the temporary files that killed processes left in a folder."""
    for leftover in Path(folder).glob(".*.unfinished*"):
        leftover.unlink(missing_ok=True)


def load_safely(path: Path, remedy: str) -> dict:
    """Read a file that torch.save wrote, onto the CPU, without running any code from it.

    Args:
        remedy: what the user can do if the file cannot be used; the error message ends with it.

    Raises:
        UserError: the file cannot be read, is damaged, or holds something other than a dict.
    """
    import torch  # not above: programs without a model use this module too

    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # flipped bytes raise IndexError, struct.error, AssertionError ...
        size = path.stat().st_size / 1e6
        raise UserError(
            f"{path} ({size:.1f} MB) is damaged or holds no weights ({_reason(path, error)}): "
            f"{remedy}"
        ) from None
    if not isinstance(state, dict):
        raise UserError(f"{path} holds a {type(state).__name__}, not weights: {remedy}")
    return state


def _reason(path: Path, error: Exception) -> str:
    """Why torch.load failed, in a few words.

    The error's own text is cut after its first sentence. Text about `weights_only` is left out: it
    advises to switch that off, and then code in the file would run.
    """
    if not isinstance(error, OSError):  # the file can be opened
        with open(path, "rb") as file:
            start = file.read(262)
        # torchvision's first ResNet-18, resnet18-5c106cde.pth, is one of these even when intact.
        if start.endswith(b"ustar"):
            return "the .tar format of 2017, which torch no longer loads safely"
    text = str(error).split("Cannot use ``weights_only")[0].strip()
    return text.splitlines()[0].split(". ")[0].rstrip(".") if text else type(error).__name__


def write_json(path: str | Path, content: dict[str, Any]) -> None:
    """Write a dict as JSON, atomically."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """The content of a JSON file of this project; empty if there is no file.

    Raises:
        UserError: it is damaged.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise UserError(f"{path}: is damaged: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: not one of this project's files")
    return content


def to_markdown(
    table: "pd.DataFrame", metadata: Mapping[str, Any], formats: Mapping[str, str] | None = None
) -> str:
    """A table as Markdown, and below it the metadata in one line.

    Args:
        formats: format of the numbers of a column, for example `{:.3f}` (default: two digits).
    """
    rows = [
        [_cell(row[name], (formats or {}).get(name, "{:.2f}")) for name in table.columns]
        for row in table.to_dict(orient="records")
    ]
    lines = [list(table.columns), ["---"] * len(table.columns), *rows]
    text = "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
    footer = "; ".join(f"{name}: {value}" for name, value in metadata.items())
    return f"{text}\n\n{footer}\n"


def _cell(value: Any, number_format: str) -> str:
    if isinstance(value, str):
        return value.replace("\\", "\\\\").replace("|", "\\|")
    if value is None or math.isnan(value):
        return "-"
    return number_format.format(value)
