"""Sharing files between processes and machines: each process takes its part of a list.

There is no server and no queue: every process finds the same list and takes every n-th file of it,
by size, so that all have about the same to do. What is done is seen from the results themselves.
When a process dies, a second start, of the same or another number of processes, does what is left.
"""

import json
import os
import re
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from utils.errors import UserError, describe_os_error
from utils.files import remove_empty
from utils.workers import in_parallel

Item = TypeVar("Item")


class Shard(NamedTuple):
    """The part of a process: number `index`, from 0, of `count`."""

    index: int
    count: int

    def part(self, items: Sequence[Item], sizes: Sequence[int]) -> list[Item]:
        """Every count-th of the items, the largest first."""
        order = sorted(range(len(items)), key=lambda i: (-sizes[i], i))
        return [items[i] for i in order[self.index :: self.count]]

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"


def this_shard(text: str = "") -> Shard | None:
    """The part of this process, from the flag `--shard i/n`, or from torchrun's environment.

    Args:
        text: `i/n`, i from 0 to n - 1; empty: what torchrun says, and None without torchrun.

    Raises:
        UserError: the text is not such a part, or torchrun says something else.
    """
    count = os.environ.get("WORLD_SIZE", "1")
    if not text:
        return Shard(int(os.environ["RANK"]), int(count)) if count != "1" else None
    if count != "1":
        raise UserError("--shard: torchrun shares the files already: leave out one of the two")
    match = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", text)
    if not match or not int(match[1]) < int(match[2]):
        raise UserError(
            f"--shard {text}: give i/n for process i of n, i from 0 to n - 1, e.g. 0/4 to 3/4"
        )
    return Shard(int(match[1]), int(match[2]))


def file_size(path: Path) -> int:
    """The size of a file in bytes, or of a folder's files together; 0 if it cannot be read."""
    try:
        if path.is_dir():
            return sum(entry.stat().st_size for entry in os.scandir(path) if entry.is_file())
        return path.stat().st_size
    except OSError:
        return 0


def run_shared(
    function: Callable[[Path], Any],
    files: Sequence[Path],
    num_workers: int,
    description: str,
    shard: Shard | None,
    folder: Path,
    encode: Callable[[Any], Any],
    decode: Callable[[Any], Any],
) -> dict[Path, Any] | None:
    """The result of a function for each file; several processes share the work.

    Every process appends its results to a file of its own in `folder`. A result counts as long as
    the file has its size and time of modification.

    Args:
        num_workers, description: see `in_parallel`.
        shard: the part of this process; None: it does all, and keeps nothing.
        encode, decode: a result to something that JSON keeps, and back.

    Returns:
        None while results are missing that other processes, or a second start, will make.

    Raises:
        UserError: the results cannot be written.
    """
    if shard is None:
        return dict(in_parallel(function, files, num_workers, description))
    keys = {file: _key(file) for file in files}
    known = _read_results(folder)
    todo = [file for file in files if keys[file] not in known]
    part = [f for f in shard.part(files, [file_size(f) for f in files]) if keys[f] not in known]
    print(f"{len(files) - len(todo):,} of {len(files):,} files are done; here {len(part):,}")
    own = folder / f"{socket.gethostname()}-{os.getpid()}.jsonl"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Not atomic on purpose: a killed process keeps the lines that it has written.
        with open(own, "a", encoding="utf-8") as lines:
            for file, result in in_parallel(function, part, num_workers, description):
                lines.write(json.dumps([keys[file], encode(result)]) + "\n")
                lines.flush()
    except OSError as error:
        raise UserError(describe_os_error(error, own)) from None
    known = _read_results(folder)
    if missing := sum(keys[file] not in known for file in files):
        print(
            f"{missing:,} of {len(files):,} files are left to the other processes; if none of them "
            "runs any more, start again"
        )
        return None
    return {file: decode(known[keys[file]]) for file in files}


def _key(file: Path) -> str:
    """What a result belongs to: the file as it is now."""
    try:
        status = file.stat()
        return f"{os.path.abspath(file)}|{status.st_size}|{status.st_mtime_ns}"
    except OSError:
        return f"{os.path.abspath(file)}|missing"


def _read_results(folder: Path) -> dict[str, Any]:
    """The results of all processes by key, without the unfinished last line of a killed one."""
    results = {}
    for path in sorted(folder.glob("*.jsonl")):
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                key, result = json.loads(line)
            except (ValueError, TypeError):
                continue
            if isinstance(key, str):
                results[key] = result
    return results


def remove_results(folder: Path) -> None:
    """Delete what `run_shared` has kept, when nothing is missing any more."""
    for path in folder.glob("*.jsonl"):
        path.unlink(missing_ok=True)
    remove_empty([folder])
