"""UserError, which scripts print without a traceback, and warnings that go into results."""

from typing import Literal, TypedDict


class UserError(Exception):
    """A mistake in what the user gave: a path, a column, a class, a checkpoint of another model.

    The message names the thing and the remedy. Scripts print it without a traceback and exit with
    code 2 (utils/cli.py).
    """


class ResultWarning(TypedDict):
    """Something that a reader must know before believing a result."""

    kind: Literal["leakage", "class balance", "other"]
    text: str


def format_warning(warning: ResultWarning) -> str:
    """The warning in one line."""
    return f"LEAKAGE: {warning['text']}" if warning["kind"] == "leakage" else warning["text"]


def is_out_of_memory(text: str) -> bool:
    """Whether an error message of PyTorch says that memory is short, on a GPU or a CPU."""
    return any(phrase in text.lower() for phrase in ("out of memory", "allocate memory"))


def first_line(error: BaseException) -> str:
    """The first line of an error message; without one, the name of the error's type."""
    return (str(error).splitlines() or [type(error).__name__])[0]
