"""Command lines: which errors end in one line, which keep a traceback, and renamed flags."""

import errno

import pytest
import torch

from utils.allocator import SWITCH
from utils.cli import cli_main
from utils.errors import UserError


def too_much() -> None:
    torch.empty(1 << 50)


def no_memory() -> None:
    bytearray(1 << 60)


def mistaken() -> None:
    raise UserError("clips: no such folder")


def full() -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def forbidden() -> None:
    raise PermissionError(errno.EACCES, "Permission denied", "secret.csv")


@pytest.mark.parametrize(
    ("main", "words"),
    [
        (too_much, "(lower batch_size, image_size or n_frames)"),
        (no_memory, "(lower batch_size, image_size or n_frames)"),
        (forbidden, "secret.csv: permission denied"),
        (mistaken, "clips: no such folder"),
        (full, "the disk: the disk is full: free some space"),
    ],
)
def test_one_line_and_code_2(main, words: str, monkeypatch, capsys) -> None:
    monkeypatch.setenv(SWITCH, "default")
    with pytest.raises(SystemExit) as end:
        cli_main(main)()
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert words in said
    assert len(said.strip().splitlines()) == 1


def test_a_bug_of_ours_keeps_its_traceback(monkeypatch) -> None:
    def broken() -> None:
        raise RuntimeError("shapes do not match")

    monkeypatch.setenv(SWITCH, "default")
    with pytest.raises(RuntimeError, match="shapes"):
        cli_main(broken)()
