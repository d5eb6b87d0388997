"""Command lines: which errors end in one line, which keep a traceback, and renamed flags."""

import errno
import json
import os
import subprocess
import sys

import pandas as pd
import pytest
import torch
from helpers import ROOT, TINY_FLAGS, make_data

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


# Letters that one of the encodings lacks, and a file name that is not UTF-8.
PRINTER = r"""
import logging, sys
from utils.cli import cli_main
@cli_main
def main():
    print("қан тігу ü")
    logging.basicConfig(stream=sys.stdout, format="%(message)s")
    logging.warning("a\udcff.mp4")
    print("қан", file=sys.stderr)
main()
"""


@pytest.mark.parametrize("encoding", ["cp1251", "cp866", "cp1252", "ascii", "utf-8"])
def test_every_console_can_show_every_name(encoding: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PRINTER],
        env={**os.environ, "PYTHONIOENCODING": encoding},
        cwd=ROOT,
        capture_output=True,
        check=False,
    )
    shown = "қан тігу ü\na\\udcff.mp4\n".encode(encoding, "backslashreplace")
    assert done.stdout.replace(b"\r\n", b"\n") == shown
    assert done.stderr.split() == ["қан".encode(encoding, "backslashreplace")]
    assert done.returncode == 0


# Runs scripts one after another in one process, which imports torch once. RUN is the trained run.
RUNNER = """
import importlib, json, pathlib, sys
for script, *arguments in json.loads(sys.argv.pop()):
    runs = list(pathlib.Path("trained").glob("*"))
    sys.argv = [script, *(str(*runs) if argument == "RUN" else argument for argument in arguments)]
    print("#####", script, flush=True)
    try:
        importlib.import_module(script.removesuffix(".py")).main()
    except SystemExit as end:
        assert not end.code, (script, end.code)
"""


def test_scripts_on_a_console_without_the_letters(tmp_path) -> None:
    classes = ("қан", "тігу")
    data = str(make_data(tmp_path, classes, {"train": 2, "val": 1, "test": 1}, frames=4))
    (tmp_path / "t.csv").write_text("start,end,label\n0,1,қан\n", "utf-8")
    flags = [*TINY_FLAGS, "--classes", *classes, "--data-root", data, "--epochs", "1"]
    scripts = [
        ["prepare_data.py", "audit", data],
        ["prepare_data.py", "split", data, "--output", "new", "--group-by", "clip"],
        ["evaluate.py", "timeline", "t.csv", "t.csv"],
        ["train.py", *flags, "--run-dir", "trained"],
        ["evaluate.py", "RUN"],
    ]
    done = subprocess.run(
        [sys.executable, "-c", RUNNER, json.dumps(scripts)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "cp1252"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Error" not in done.stderr
    printed = done.stdout.split("#####")[1:]
    assert len(printed) == len(scripts)
    assert all(r"\u049b\u0430\u043d" in text for text in printed)  # the first class
    (trained,) = (tmp_path / "trained").iterdir()
    assert "қан" in (trained / "train.log").read_text("utf-8")
    assert list(pd.read_csv(trained / "confusion_matrix.csv", index_col=0)) == list(classes)
