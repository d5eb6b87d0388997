"""Command lines: which errors end in one line, which keep a traceback, and renamed flags."""

import errno
import os
import subprocess
import sys

import pandas as pd
import pytest
import torch
from helpers import ROOT, TINY_FLAGS, make_data, run_script

from utils.allocator import SWITCH
from utils.cli import cli_main
from utils.errors import UserError


def too_much() -> None:
    torch.empty(1 << 50)


def no_primitive() -> None:
    raise RuntimeError("could not create a primitive descriptor for the LSTM forward propagation")


def mistaken() -> None:
    raise UserError("clips: no such folder")


def full() -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("main", "words"),
    [
        (too_much, "(lower batch_size, image_size or n_frames)"),
        (no_primitive, "give --precision fp32"),
        (mistaken, "clips: no such folder"),
        (full, "No space left on device: the disk"),
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


def test_scripts_on_a_console_without_the_letters(tmp_path) -> None:
    classes = ("қан", "тігу")
    data = make_data(tmp_path, classes, {"train": 2, "val": 1, "test": 1}, frames=4)

    def run(*arguments: object, code: int = 0) -> str:
        done = run_script(*arguments, cwd=tmp_path, check=False, PYTHONIOENCODING="cp1252")
        assert done.returncode == code, done.stderr
        assert "Error" not in done.stderr
        assert r"\u049b\u0430\u043d" in done.stdout  # the first class
        return done.stdout

    run("prepare_data.py", "audit", data)
    run("prepare_data.py", "split", data, "--output", "new", "--group-by", "clip")
    (tmp_path / "t.csv").write_text("start,end,label\n0,1,қан\n", "utf-8")
    run("evaluate.py", "timeline", "t.csv", "t.csv")
    flags = [*TINY_FLAGS, "--classes", *classes, "--data-root", data, "--epochs", 1]
    run("train.py", *flags, "--run-dir", "trained")
    (trained,) = (tmp_path / "trained").iterdir()
    assert "қан" in (trained / "train.log").read_text("utf-8")
    assert list(pd.read_csv(trained / "confusion_matrix.csv", index_col=0)) == list(classes)
    run("evaluate.py", trained)
