"""Reading files of tensors that may come from anywhere."""

from pathlib import Path

import torch

from errors import UserError


def load_safely(path: Path, remedy: str) -> dict:
    """Read a file that torch.save wrote, onto the CPU, without running any code from it.

    Raises:
        UserError: it cannot be read, is damaged, or holds something else than a dict; in one line,
            with the remedy.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # flipped bytes raise IndexError, struct.error, AssertionError ...
        size = path.stat().st_size / 1e6
        raise UserError(
            f"{path} ({size:.1f} MB) is damaged or holds no weights ({_reason(path, error)}): "
            f"{remedy}"
        ) from None
    if not isinstance(state, dict):
        raise UserError(f"{path} holds no weights but a {type(state).__name__}: {remedy}")
    return state


def _reason(path: Path, error: Exception) -> str:
    """Why torch.load failed, in a few words.

    Its own text is cut after the first sentence, and left out where it speaks of `weights_only`:
    it advises to switch that off, which would run whatever code a stranger's file holds.
    """
    if not isinstance(error, OSError):  # it can be opened
        with open(path, "rb") as file:
            start = file.read(262)
        # torchvision's first ResNet-18, resnet18-5c106cde.pth, is one of these even when intact.
        if start.endswith(b"ustar"):
            return "the .tar format of 2017, which torch no longer loads safely"
    text = str(error).split("Cannot use ``weights_only")[0].strip()
    return text.splitlines()[0].split(". ")[0].rstrip(".") if text else type(error).__name__
