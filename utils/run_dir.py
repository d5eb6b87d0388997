"""A run's folder: `runs/<time>_<model>/` and the small files in it."""

import json
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
from utils.files import write_json


def new_run_folder(run_dir: str | Path, model: str) -> Path:
    """Make a folder for a run; two runs started in the same second get two folders."""
    name = f"{time.strftime('%Y%m%d-%H%M%S')}_{model}"
    for number in range(1, 1000):
        folder = Path(run_dir) / (name if number == 1 else f"{name}_{number}")
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            continue
        except OSError as error:
            raise UserError(f"{folder}: cannot be made: {error.strerror}") from None
    raise UserError(f"{run_dir}: no free name for a run folder")


def command() -> str:
    """What a person types to start this very program, without passwords in addresses."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    start = ["torchrun", f"--nproc-per-node={processes}"] if processes > 1 else ["python"]
    arguments = [printable(public_address(argument)) for argument in sys.argv[1:]]
    return shlex.join([*start, Path(sys.argv[0]).name, *arguments])


def printable(text: str) -> str:
    """A text from outside, a file name say, without control characters and invalid bytes."""
    text = text.encode("utf-8", "replace").decode()
    return "".join(character if character.isprintable() else "?" for character in text)


def public_address(text: str) -> str:
    """A network address without user, password and query; other texts as they are."""
    return re.sub(r"^(\w+://)(?:[^/?#]*@)?([^?#]*).*$", r"\1\2", text, flags=re.DOTALL)


def record_session(folder: Path, device: str) -> None:
    """Add to environment.json what makes a run's numbers: the exact command, versions, hardware.

    A resumed run has an entry for each time that it was started.
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
    path = folder / "environment.json"
    earlier = json.loads(path.read_text(encoding="utf-8"))["sessions"] if path.exists() else []
    write_json(path, {"sessions": [*earlier, session]})


def _commit() -> str | None:
    """The commit of the code, with a + if files were changed since; None without git."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        commit, changes = (
            subprocess.run([*git, *words], capture_output=True, text=True, check=True, timeout=10)
            for words in (["rev-parse", "--short=12", "HEAD"], ["status", "--porcelain", "-uno"])
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return commit.stdout.strip() + "+" * bool(changes.stdout.strip())
