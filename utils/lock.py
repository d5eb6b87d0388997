"""A lock on a folder, so that two processes do not write into it at the same time."""

import contextlib
import errno
import os
import shutil
import socket
import sys
import time
from pathlib import Path
from typing import Self

from utils.errors import UserError, describe_os_error
from utils.files import make_folder, remove_empty

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

_TAKEN = (errno.EACCES, errno.EAGAIN, errno.EDEADLK)

_FAR = 1 << 30  # Windows lets nobody read a locked byte: this one is behind the text


class FolderLock:
    """Holds a folder for this process: `with FolderLock(folder): ...`.

    The operating system drops the lock when the process ends, however it ends. It is a record lock
    (`fcntl.lockf`), not `flock`: forked worker processes do not inherit it, so that workers that
    outlive a killed process do not hold the folder. The file `.lock` says who holds it.

    Args:
        folder: it is made if it does not exist, and removed again if it is still empty at the end.
        result: name of a file or folder in it. If the folder was made here and has no such file at
            the end, it is removed with all that is in it.
        new: refuse a folder that exists.
        beside: do not make the folder, which will be renamed to its name when it is complete: the
            lock file lies beside it.

    Raises:
        UserError: another process holds it, or the folder cannot be written.
        FileExistsError: the folder was to be a new one, and exists.
    """

    def __init__(
        self, folder: str | Path, result: str = "", new: bool = False, beside: bool = False
    ) -> None:
        self.folder = folder = Path(folder)
        self._path = folder.with_name(f".{folder.name}.lock") if beside else folder / ".lock"
        self._result = result
        self._descriptor = -1
        self._made: list[Path] = []
        try:
            self._made = make_folder(self._path.parent, new)
            self._take()
        except OSError as error:
            remove_empty(self._made)
            if new and isinstance(error, FileExistsError):
                raise
            raise UserError(describe_os_error(error, folder)) from None

    def _take(self) -> None:
        """Open the lock file and lock it, unless the drive has no locks."""
        while self._descriptor < 0:
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                _lock(descriptor)
                if not _is_file(descriptor, self._path):  # the holder has just removed it
                    os.close(descriptor)
                    continue
            except OSError as error:
                holder = os.read(descriptor, 500).decode("utf-8", "replace").strip()
                os.close(descriptor)
                if error.errno in _TAKEN:
                    raise UserError(
                        f"{self.folder}: another process is working in it "
                        f"({holder or 'just started'}): wait until it has ended, or stop it"
                    ) from None
                self._path.unlink(missing_ok=True)  # some network drives have no locks
                print(
                    f"warning: {self.folder}: this drive has no locks ({error.strerror}): take "
                    "care that no other process works in this folder",
                    file=sys.stderr,
                )
                return
            self._descriptor = descriptor
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        text = f"process {os.getpid()} on {socket.gethostname()}, since {since}\n"
        with contextlib.suppress(OSError):  # on a full disk the lock holds nevertheless
            os.ftruncate(self._descriptor, 0)
            os.write(self._descriptor, text.encode())

    def release(self) -> None:
        """Let go of the folder, and remove the lock file and a folder without results."""
        descriptor, self._descriptor = self._descriptor, -1
        made, self._made = self._made, []
        if os.name == "posix":  # while it is held: otherwise another process's could be removed
            self._clear(descriptor >= 0, made)
        if descriptor >= 0:
            os.close(descriptor)
        if os.name != "posix":  # a file that anybody has open cannot be removed
            self._clear(descriptor >= 0, made)

    def _clear(self, locked: bool, made: list[Path]) -> None:
        if self._result and self.folder in made and not (self.folder / self._result).exists():
            shutil.rmtree(self.folder, ignore_errors=True)
        elif locked:
            with contextlib.suppress(OSError):
                self._path.unlink()
        remove_empty(made)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def _lock(descriptor: int) -> None:
    """Lock an open file, or raise OSError at once."""
    if sys.platform == "win32":
        os.lseek(descriptor, _FAR, os.SEEK_SET)
        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        finally:
            os.lseek(descriptor, 0, os.SEEK_SET)
    else:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _is_file(descriptor: int, path: Path) -> bool:
    """Whether the open file is still the one of this name."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
