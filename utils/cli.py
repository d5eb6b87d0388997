"""What every script does around its `main`."""

import atexit
import functools
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable

from utils.allocator import keep_freed_memory
from utils.errors import UserError, first_line, is_out_of_memory


def script(main: Callable[[], None]) -> Callable[[], None]:
    """Wrap a script's `main`: freed memory is kept, a user's mistake is one line and exit code 2.

    Running out of memory and a full disk are told the same way: nobody is helped by a traceback.
    Everything else is a bug of ours and keeps its traceback.
    """

    @functools.wraps(main)
    def wrapped() -> None:
        keep_freed_memory()
        atexit.register(end_workers)
        try:
            main()
        except UserError as error:
            sys.exit(_fail(str(error)))
        except KeyboardInterrupt:
            print("\ninterrupted", file=sys.stderr)
            sys.exit(130)
        except BrokenPipeError:  # whoever read the output, `head` say, has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(141)
        except OSError as error:
            if error.errno is None or (error.filename is None and error.errno != 28):
                raise  # not about a file: ours to debug
            sys.exit(_fail(f"{error.strerror}: {error.filename or 'the disk'}"))
        except RuntimeError as error:
            if "PytorchStreamWriter" in str(error):
                sys.exit(_fail("a checkpoint could not be written: is the disk full?"))
            if "could not create a primitive" in str(error):  # oneDNN's LSTM, for one, in bf16
                sys.exit(_fail("this CPU cannot run the model in that precision: give --amp fp32"))
            if not is_out_of_memory(str(error)):
                raise
            sys.exit(_fail(f"{first_line(error)} (lower batch_size, image_size or n_frames)"))

    return wrapped


def end_workers() -> None:
    """Kill the loaders' workers that are still there when the program ends, after an error.

    They stay after the one SIGTERM that Python sends them then (workers.py), and it would wait for
    them for ever.
    """
    workers = multiprocessing.active_children()
    if workers and hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's handler would raise an error
    for worker in workers:
        worker.kill()


def _fail(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2
