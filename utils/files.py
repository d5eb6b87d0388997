"""Writing files atomically, clearing what killed processes left, and reading JSON files."""

import contextlib
import functools
import hashlib
import json
import math
import os
import re
import shutil
import socket
import time
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.errors import UserError, describe_os_error, first_line
from utils.structure import find_mismatch
from utils.text_table import shorten

if TYPE_CHECKING:
    import pandas as pd


# Names that Windows does not allow.
_RESERVED = {"con", "prn", "aux", "nul", *(f"{d}{n}" for d in ("com", "lpt") for n in range(10))}


@contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`, and rename it to `path` if the block ends well.

    Even after a kill or a power cut `path` is either the old file or the complete new one. The
    temporary file has the suffix of `path`, because some writers choose the format by it. What
    earlier processes left in the folder, because they were killed, is deleted.

    Raises:
        OSError: the file cannot be written; its `filename` is `path`.
    """
    path = Path(path)
    unfinished = unfinished_path(path)
    try:
        _clear_once(path.parent.absolute())
        yield unfinished
        with open(unfinished, "r+b") as file:  # on the disk before the name points to it
            os.fsync(file.fileno())
        _replace(unfinished, path)
    except OSError as error:
        # Errors of write() name no file, and the temporary one is of no interest.
        if error.errno and error.filename in (None, str(unfinished)):
            error.filename, error.filename2 = str(path), None
        raise
    finally:
        unfinished.unlink(missing_ok=True)


def _replace(source: Path, target: Path) -> None:
    """Rename a file over another one, and wait until the new name is on the disk as well."""
    for seconds in (0.1, 0.3, 1, None):
        try:
            os.replace(source, target)
            break
        except PermissionError:  # on Windows while a virus scanner or a viewer has it open
            if os.name == "posix" or seconds is None:
                raise
            time.sleep(seconds)
    if os.name == "posix":  # Windows cannot open folders
        with contextlib.suppress(OSError):  # some network drives cannot either
            folder = os.open(target.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)


def write_text(path: str | Path, text: str) -> None:
    r"""Write a text file atomically, with the same bytes on every system.

    The name of a file may hold bytes that are not UTF-8: such a byte is written as `\udcff`, which
    JSON reads back as the same name.
    """
    with atomic(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8", errors="backslashreplace", newline="\n")


def write_all(writers: Mapping[Path, Callable[[Path], object]]) -> None:
    """Write several files, the most valuable first: if one fails, the others are still written.

    Args:
        writers: for each path the function that writes it.

    Raises:
        UserError: naming the files that could not be written, and why.
    """
    problems = [problem for path, write in writers.items() if (problem := try_write(path, write))]
    if problems:
        raise UserError("; ".join(problems))


def try_write(path: Path, write: Callable[[Path], object]) -> str:
    """Call a function that writes a file. Returns why it could not, in one line, or nothing."""
    try:
        write(path)
    except UserError as error:
        return str(error)
    except OSError as error:
        named = error.filename2 or error.filename or path
        return f"could not be written: {describe_os_error(error, named)}"
    except Exception as error:  # e.g. of a library that draws: no reason to lose other files
        return f"{path}: could not be written: {type(error).__name__}: {first_line(error)}"
    return ""


def require_writable(folder: str | Path, flag: str = "--output") -> None:
    """Make a folder and try to write into it, before hours of work depend on it.

    The permissions alone do not tell: on Windows and network drives they are not the whole truth.
    What did not exist is removed again.

    Args:
        flag: how the user chooses the folder.

    Raises:
        UserError: that is not possible; with the cause and the remedy.
    """
    made = []
    try:
        made = make_folder(folder)
        unfinished = unfinished_path(Path(folder) / "writable")
        try:
            unfinished.write_bytes(b" ")
        finally:  # on a full disk there is an empty file
            unfinished.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"{describe_os_error(error, folder)} ({flag})") from None
    finally:  # a command that fails later leaves no empty folder
        remove_empty(made)


def require_space(folder: str | Path, needed: float, what: str, flag: str = "--output") -> None:
    """Check that a disk has room, before hours of work depend on it.

    Args:
        folder: it need not exist yet.
        needed: bytes.
        what: what needs them, for the message.
        flag: how the user chooses the folder.

    Raises:
        UserError: there is less room.
    """
    folder = Path(folder).absolute()
    try:
        parent = next(path for path in (folder, *folder.parents) if path.exists())
        total, _, free = shutil.disk_usage(parent)
    except OSError:  # unknown: the writing will tell
        return
    if total and needed > free:  # some network drives say 0
        raise UserError(
            f"{folder}: the disk is too small: {what} {_size(needed)}, and {_size(free)} are free: "
            f"free some space, or write to another disk ({flag})"
        )


def _size(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:,.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:,.1f} MB"


def require_writable_file(path: Path, flag: str = "--output") -> None:
    """Check that a file can be written; see `require_writable`.

    Raises:
        UserError: it is a folder, or its folder cannot be written.
    """
    if path.is_dir():
        raise UserError(f"{path}: is a folder: name a file ({flag})")
    require_writable(path.parent, flag)


def make_folder(folder: str | Path, new: bool = False) -> list[Path]:
    """Make a folder. Returns what this call made of it and its parents, the innermost first.

    Args:
        new: refuse a folder that exists.

    Raises:
        OSError: that is not possible; nothing of it is left.
    """
    folder, made = Path(folder), []
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        for path in reversed(missing or [folder]):
            try:
                path.mkdir()
                made.insert(0, path)
            except FileExistsError:  # also where another process has just made it
                if not path.is_dir() or (new and path == folder):
                    raise
    except OSError:
        remove_empty(made)
        raise
    return made


def remove_empty(folders: Iterable[Path]) -> None:
    """Remove folders that are empty, the innermost first."""
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()


# This machine in the names of unfinished files: on a network drive several write into one folder.
_HOST = re.sub(r"[^A-Za-z0-9-]", "-", socket.gethostname())[:32]


_ABANDONED = 24 * 3600  # seconds


def unfinished_path(path: Path, process_id: int | None = None) -> Path:
    """The hidden name, beside `path`, of what a process has not finished writing."""
    owner = f"{_HOST}.{process_id or os.getpid()}"
    return path.with_name(f".{path.stem}.{owner}.unfinished{path.suffix}")


def remove_unfinished(folder: str | Path) -> None:
    """Delete the temporary files and folders that killed processes left in a folder.

    Those of processes that still run on this machine stay. Nobody here can ask another machine:
    what it has not touched for a day is deleted.
    """
    for leftover in Path(folder).glob(".*.unfinished*"):
        *_, host, process_id = ("", *leftover.name.rpartition(".unfinished")[0].split("."))
        if not process_id.isdecimal():
            continue
        with contextlib.suppress(OSError):  # another user's, or another process has removed it
            if host == _HOST:
                is_dead = not _is_running(int(process_id))
            else:
                is_dead = leftover.stat().st_mtime < time.time() - _ABANDONED
            if is_dead and leftover.is_dir() and not leftover.is_symlink():
                shutil.rmtree(leftover, ignore_errors=True)
            elif is_dead:
                leftover.unlink()


_clear_once = functools.cache(remove_unfinished)


def _is_running(process_id: int) -> bool:
    """Whether another process has this number."""
    if process_id == os.getpid():
        return False  # an earlier process had the same number: this one has only begun
    if os.name != "posix":
        return _is_running_on_windows(process_id)
    try:
        os.kill(process_id, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # it is another user's process
        return True
    try:  # ended, but not yet waited for: in a container that may take long
        status = Path(f"/proc/{process_id}/stat").read_bytes()
    except OSError:  # not on Linux
        return True
    return status.rpartition(b")")[2].split()[:1] not in ([b"Z"], [b"X"])


def _is_running_on_windows(process_id: int) -> bool:
    """The same on Windows, where os.kill would end the process."""
    import ctypes

    kernel = ctypes.WinDLL("kernel32", use_last_error=True)
    handle = kernel.OpenProcess(0x00100000, False, process_id)  # the right to wait for its end
    if not handle:
        return ctypes.get_last_error() != 87  # "invalid parameter": there is no such process
    ended = kernel.WaitForSingleObject(handle, 0) == 0
    kernel.CloseHandle(handle)
    return not ended


def safe_file_names(texts: Sequence[tuple[str, str]]) -> dict[str, str]:
    """A file name for each key, safe on every system and different from the others.

    Args:
        texts: each key, and the text that its name is made of.
    """
    names = {}
    for key, text in texts:
        name = re.sub(
            r"[^\w.-]+", "_", unicodedata.normalize("NFC", text.encode("utf-8", "replace").decode())
        )
        name = name.encode()[:80].decode("utf-8", "ignore").strip("._-")
        names[key] = f"_{name}" if name.casefold().split(".")[0] in _RESERVED else name or "_"
    counts = Counter(name.casefold() for name in names.values())
    for key, name in names.items():
        if counts[name.casefold()] > 1:
            digest = hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()
            names[key] = f"{name}-{digest[:8]}"
    return names


def write_json(path: str | Path, content: dict[str, Any]) -> None:
    """Write a dict as JSON, atomically."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path, shape: Any = dict) -> dict[str, Any]:
    """The content of a JSON file of this project; empty if there is no file.

    Args:
        shape: what it must hold; see `utils.structure.find_mismatch`.

    Raises:
        UserError: it is damaged, or holds something else.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return {}
    except UnicodeDecodeError:
        raise UserError(f"{path}: is damaged: not a text in UTF-8") from None
    return parse_json(text, str(path), shape)


def parse_json(text: str | bytes, source: str, shape: Any = dict) -> dict[str, Any]:
    """The content of a JSON text; `source` says in messages where it is from.

    Raises:
        UserError: it is damaged, or holds something else than `shape`.
    """
    try:
        content = json.loads(
            text, parse_constant=_refuse_number, parse_float=_finite, parse_int=_whole
        )
    except RecursionError:
        raise UserError(f"{source}: is damaged: brackets in brackets without end") from None
    except ValueError as error:
        raise UserError(f"{source}: is damaged: {first_line(error)}") from None
    mismatch = find_mismatch(content, shape)
    if mismatch:
        raise UserError(f"{source}: not one of this project's files ({mismatch})")
    return content


def _finite(text: str) -> float:
    return float(text) if math.isfinite(float(text)) else _refuse_number(text)


def _whole(text: str) -> int:
    if len(text) > 300:  # as a float it is infinite; of 4301 digits on, int() refuses it
        raise ValueError(f"a number of {len(text):,} digits")
    return int(text)


def _refuse_number(text: str) -> float:
    raise ValueError(f"the number {shorten(text)}")


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
