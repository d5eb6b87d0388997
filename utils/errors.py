"""What a person did wrong, said in one line."""


class UserError(Exception):
    """A mistake in what the user gave: a path, a column, a class, a checkpoint of another model.

    The message names the thing and the remedy. Scripts print it without a traceback and exit with
    code 2 (see script.py).
    """


def is_out_of_memory(text: str) -> bool:
    """Whether PyTorch says so: a GPU's memory is "out", a CPU's "cannot" be allocated."""
    return any(words in text.lower() for words in ("out of memory", "allocate memory"))


def first_line(error: BaseException) -> str:
    """An error's own words, as far as they fit into one line; without any, its type's name."""
    return (str(error).splitlines() or [type(error).__name__])[0]
