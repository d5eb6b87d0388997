"""UserError and ClipError, which scripts print without a traceback, and warnings for results."""

import errno
import importlib
import sys
from pathlib import Path
from typing import Literal, TypedDict


class UserError(Exception):
    """A mistake in what the user gave: a path, a column, a class, a checkpoint of another model.

    The message names the thing and the remedy. Scripts print it without a traceback and exit with
    code 2 (utils/cli.py).
    """


class ClipError(UserError):
    """A clip cannot be read; the message is its path and the reason."""

    def __init__(self, path: str | Path, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path = str(path)
        self.reason = reason

    def __reduce__(self) -> tuple:  # a worker process sends exceptions as pickles
        return type(self), (self.path, self.reason)


class ResultWarning(TypedDict):
    """Something that a reader must know before believing a result."""

    kind: Literal["leakage", "class balance", "other"]
    text: str


def format_warning(warning: ResultWarning) -> str:
    """The warning in one line."""
    return f"LEAKAGE: {warning['text']}" if warning["kind"] == "leakage" else warning["text"]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory is short, on a GPU or a CPU."""
    torch = sys.modules.get("torch")  # a program that has not imported it gets no error from it
    if isinstance(error, MemoryError) or (torch and isinstance(error, torch.OutOfMemoryError)):
        return True
    # On a CPU and on Apple's GPUs, PyTorch raises a RuntimeError without a code: its text is all.
    text = str(error).lower() if isinstance(error, RuntimeError) else ""
    return "can't allocate memory" in text or "out of memory" in text


def require_package(
    module: str, what: str, remedy: str = "pip install -r requirements-optional.txt"
) -> None:
    """Check that an optional package can be imported.

    Raises:
        UserError: it cannot; `what` says in the message what needs it, `remedy` how to get it.
    """
    # OpenVINO and NNCF send statistics of their use over the network if they find this package.
    sys.modules.setdefault("openvino_telemetry", None)
    try:
        importlib.import_module(module)
    except ImportError:  # it is missing, or lacks something itself
        raise UserError(f"{what} needs a package: {remedy}") from None


FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

_CAUSES = {
    errno.ENOSPC: "the disk is full: free some space, or write to another disk",
    errno.EDQUOT: "your share of the disk is full: free some space, or write to another disk",
    errno.EFBIG: "the file is larger than this disk or account allows: write to another disk",
    errno.EROFS: "the disk is read-only: write to another one",
    errno.EACCES: "permission denied: change its permissions, close the program that has it open, "
    "or choose another place",
    errno.ENOTDIR: "a file is in the place of a folder: move it away, or choose another place",
    errno.EEXIST: "a file is in the place of a folder: move it away, or choose another place",
    errno.EMFILE: "too many files are open: lower num_workers, or raise the limit (ulimit -n)",
}
_CAUSES[errno.EPERM] = _CAUSES[errno.EACCES]


def describe_os_error(error: OSError, path: str | Path | None = None) -> str:
    """What an error of the operating system is about, its cause and the remedy, in one line.

    Args:
        path: what the line names (None: the file that the error names).
    """
    path = path or error.filename2 or error.filename  # the target of a rename comes second
    return f"{path or 'the disk'}: {os_error_cause(error)}"


def os_error_cause(error: OSError) -> str:
    """The cause of an error of the operating system and the remedy, without the path."""
    return _CAUSES.get(error.errno) or error.strerror or str(error)


def first_line(error: BaseException) -> str:
    """The first line of an error message; without one, the name of the error's type."""
    return (str(error).splitlines() or [type(error).__name__])[0]
