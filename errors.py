"""What a person did wrong, said in one line."""

import functools
import sys
from collections.abc import Callable


class UserError(Exception):
    """A mistake in what the user gave: a path, a column, a class, a checkpoint of another model.

    The message names the thing and the remedy. Scripts print it without a traceback and exit with
    code 2 (see `script`).
    """


def first_line(error: BaseException) -> str:
    """An error's own words, as far as they fit into one line; without any, its type's name."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def script(main: Callable[[], None]) -> Callable[[], None]:
    """Wrap a script's `main` so that a user's mistake ends as one line and exit code 2.

    Running out of memory and a full disk are told the same way: nobody is helped by a traceback.
    Everything else is a bug of ours and keeps its traceback.
    """

    @functools.wraps(main)
    def wrapped() -> None:
        try:
            main()
        except UserError as error:
            sys.exit(_fail(str(error)))
        except KeyboardInterrupt:
            print("\ninterrupted", file=sys.stderr)
            sys.exit(130)
        except OSError as error:
            if error.errno is None or (error.filename is None and error.errno != 28):
                raise  # not about a file: ours to debug
            sys.exit(_fail(f"{error.strerror}: {error.filename or 'the disk'}"))
        except RuntimeError as error:
            if "PytorchStreamWriter" in str(error):
                sys.exit(_fail("a checkpoint could not be written: is the disk full?"))
            if "out of memory" not in str(error).lower():
                raise
            sys.exit(_fail(f"{first_line(error)} (lower batch_size, image_size or n_frames)"))

    return wrapped


def _fail(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2
