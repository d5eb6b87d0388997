"""Files of torch.save: written so that errors keep their cause, read without running code.

Files of safetensors, which hold nothing but tensors, are read as well.
"""

import contextlib
import pickle
import warnings
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.serialization import safe_globals

from utils.errors import UserError, first_line, require_package
from utils.files import atomic
from utils.text_table import list_some

_MAX_EXPANSION = 10  # tensors may share memory; more than this is meant to fill it
_MAX_OBJECTS = 4_000_000  # bytes beside the tensors: torch reads two million of them in a second


def save_safely(path: str | Path, state: dict[str, Any]) -> None:
    """Write a dict with torch.save, atomically.

    Raises:
        OSError: the file cannot be written, with the path and the code of the operating system.
    """
    with atomic(path) as unfinished, open(unfinished, "wb") as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:  # torch hides the error of the file behind one of its own
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


def load_safely(path: Path, remedy: str, allow: Sequence[type] = ()) -> dict:
    """Read a file of torch.save, or `.safetensors`, onto the CPU, without running code from it.

    Args:
        remedy: what the user can do if the file cannot be used; the error message ends with it.
        allow: kinds of objects that may be in the file beside tensors and plain values.

    Raises:
        UserError: the file is damaged, would fill the memory, or holds something else than a dict.
        OSError: it cannot be opened.
    """
    with open(path, "rb") as file:
        start = file.read(262)
    size = path.stat().st_size
    if path.suffix == ".safetensors":
        return _load_safetensors(path, remedy)
    try:
        _check_claims(path)
        # The warnings are of kinds of tensors that are refused later.
        with warnings.catch_warnings(action="ignore"), safe_globals(list(allow)):
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # flipped bytes raise IndexError, struct.error, AssertionError ...
        reason = error if isinstance(error, _Refused) else _reason(path, start, error)
        raise UserError(
            f"{path} ({size / 1e6:.1f} MB) cannot be loaded: {reason}: {remedy}"
        ) from None
    if not isinstance(state, dict):
        raise UserError(f"{path} holds a {type(state).__name__}, not weights: {remedy}")
    if _claimed_bytes(state) > _MAX_EXPANSION * size:
        raise UserError(
            f"{path} ({size / 1e6:.1f} MB) cannot be loaded: its tensors would take more than "
            f"{_MAX_EXPANSION} times its size: {remedy}"
        )
    return state


def _load_safetensors(path: Path, remedy: str) -> dict[str, torch.Tensor]:
    require_package("safetensors", path.name, "pip install safetensors")
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:  # its tensors must fill the file exactly
        reason = f"it is damaged ({first_line(error)})"
        size = path.stat().st_size / 1e6
        raise UserError(f"{path} ({size:.1f} MB) cannot be loaded: {reason}: {remedy}") from None


class _Refused(Exception):
    """A file that is not loaded; the message says why."""


def _check_claims(path: Path) -> None:
    """Refuse a file that would be larger in memory; torch.save compresses nothing."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
            if sum(record.file_size for record in records) > path.stat().st_size:
                raise _Refused("it is compressed, and would fill the memory")
            names = [r.filename for r in records if r.filename.endswith("data.pkl")]
            if sum(archive.getinfo(name).file_size for name in names) > _MAX_OBJECTS:
                raise _Refused(f"beside its tensors it holds over {_MAX_OBJECTS / 1e6:.0f} MB")
            objects = b"".join(map(archive.read, names))
    else:
        objects = path.read_bytes()
    # torch allows it, and a few bytes are enough to ask for one of any size.
    if b"\nbytearray\n" in objects:
        raise _Refused("it holds a bytearray, which weights do not")


def _claimed_bytes(state: dict) -> int:
    """The bytes of all tensors below a dict, as if none of them shared memory."""
    total, seen, waiting = 0, set(), [state]
    while waiting:
        value = waiting.pop()
        if isinstance(value, torch.Tensor):
            total += value.numel() * value.element_size()
        elif isinstance(value, dict | list | tuple | set) and id(value) not in seen:
            seen.add(id(value))  # a list may be in many lists
            waiting += value.values() if isinstance(value, dict) else value
    return total


def _reason(path: Path, start: bytes, error: Exception) -> str:
    """Why torch.load failed, in a few words, without the advice to let code in the file run."""
    # torchvision's first ResNet-18, resnet18-5c106cde.pth, is one of these even when intact.
    if start.endswith(b"ustar"):
        return "it has the .tar format of 2017, which torch no longer loads safely"
    objects = []
    if isinstance(error, pickle.UnpicklingError):
        with contextlib.suppress(Exception):  # it is damaged, or older than the zip format
            objects = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    if not objects:
        return "it is damaged, or not a file of torch.save"
    return (
        f"it holds Python objects ({list_some(objects, 3)}), which could run code; save its "
        "weights alone, with torch.save(model.state_dict(), FILE)"
    )
