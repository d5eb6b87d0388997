"""The folder of a run, `runs/<time>_<model>/`, and what is recorded about its environment."""

import contextlib
import os
import platform
import re
import shlex
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

from utils.errors import UserError
from utils.files import read_json, write_json
from utils.lock import FolderLock


def new_run_dir(run_dir: str | Path, model: str, result: str = "") -> FolderLock:
    """Make a folder for a run, and hold it. Two runs started in the same second get two folders.

    Args:
        result: see `FolderLock`.

    Raises:
        UserError: the folder cannot be made.
    """
    name = f"{time.strftime('%Y%m%d-%H%M%S')}_{model}"
    for number in range(1, 1000):
        folder = Path(run_dir) / (name if number == 1 else f"{name}_{number}")
        with contextlib.suppress(FileExistsError):
            return FolderLock(folder, result, new=True)
    raise UserError(f"{run_dir}: no free name for a run folder")


def command() -> str:
    """The command line that starts this program, without passwords in addresses."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    start = ["torchrun", f"--nproc-per-node={processes}"] if processes > 1 else ["python"]
    arguments = [sanitize(strip_credentials(argument)) for argument in sys.argv[1:]]
    return shlex.join([*start, Path(sys.argv[0]).name, *arguments])


def sanitize(text: str) -> str:
    """A text from outside, such as a file name, without control characters and invalid bytes."""
    text = text.encode("utf-8", "replace").decode()
    return "".join(character if character.isprintable() else "?" for character in text)


def strip_credentials(text: str) -> str:
    """A network address without user, password and query; other texts are returned unchanged."""
    return re.sub(r"^(\w+://)(?:[^/?#]*@)?([^?#]*).*$", r"\1\2", text, flags=re.DOTALL)


def log_environment(folder: Path, device: str) -> None:
    """Add an entry to environment.json: exact command, versions, hardware and commit.

    A resumed run has one entry per start.
    """
    packages = ("torch", "torchvision", "av", "numpy", "pandas", "scikit-learn")
    session = {
        "command": command(),
        "time": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "device": device,
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
        "commit": _commit(),
    }
    write_json(folder / "environment.json", {"sessions": [*read_sessions(folder), session]})


_SESSION = {f"{name}?": str for name in ("command", "time", "device", "python", "torch")}


def read_sessions(folder: Path) -> list[dict]:
    """The entries of environment.json, none if there is no such file; an older file is one entry.

    Raises:
        UserError: it is damaged.
    """
    content = read_json(folder / "environment.json", {"sessions?": [_SESSION], **_SESSION})
    return content.get("sessions", [content] if "command" in content else [])


def _commit() -> str | None:
    """The commit of the code, followed by + if files were changed since; None without git."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        commit, changes = (
            subprocess.run([*git, *words], capture_output=True, text=True, check=True, timeout=10)
            for words in (["rev-parse", "--short=12", "HEAD"], ["status", "--porcelain", "-uno"])
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return commit.stdout.strip() + "+" * bool(changes.stdout.strip())
