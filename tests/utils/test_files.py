"""Files: written whole or not at all, tried before the work, JSON that may be damaged."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from clips.cache import ClipCache
from config import from_dict
from utils.errors import UserError, describe_os_error, require_package
from utils.files import (
    atomic,
    make_folder,
    read_json,
    remove_unfinished,
    require_writable,
    try_write,
    unfinished_path,
    write_all,
    write_text,
)
from utils.run_dir import log_environment, read_sessions


@pytest.fixture
def dead() -> int:
    """The number of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_leftovers_of_dead_processes_are_cleared_by_the_next_write(tmp_path, dead: int) -> None:
    target = tmp_path / "a.b.csv"
    unfinished_path(target, dead).touch()
    unfinished_path(tmp_path / "demo", dead).mkdir()
    (unfinished_path(tmp_path / "demo", dead) / "clip").touch()
    living = unfinished_path(target, os.getppid())
    own_name = tmp_path / ".notes.unfinished.txt"  # not a name of ours
    for path in (living, own_name):
        path.touch()
    write_text(target, "x")
    assert set(tmp_path.iterdir()) == {target, living, own_name}
    remove_unfinished(tmp_path / "absent")


@pytest.mark.skipif(sys.platform != "linux", reason="/proc tells what has ended")
def test_a_process_that_nobody_has_waited_for_has_ended(tmp_path: Path) -> None:
    """As the workers of a killed process in a container, which are nobody's children."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    leftover = unfinished_path(tmp_path / "a.csv", process.pid)
    leftover.touch()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    remove_unfinished(tmp_path)
    assert not leftover.exists()
    process.wait()


def test_an_error_of_a_write_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(OSError) as told, atomic(tmp_path / "last.pt"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert describe_os_error(told.value).startswith(f"{tmp_path / 'last.pt'}: the disk is full")
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError) as told:
        write_text(tmp_path / "folder", "x")
    assert describe_os_error(told.value) == f"{tmp_path / 'folder'}: Is a directory"
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_a_folder_is_tried_and_left_as_it_was(tmp_path: Path) -> None:
    require_writable(tmp_path / "new" / "folder")
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"a file is in the place of a folder.*\(--output\)"):
        require_writable(tmp_path / "file" / "folder")


@pytest.mark.parametrize(
    ("code", "hidden", "cause"),
    [
        (errno.ENOSPC, False, "the disk is full: free some space, or write to another disk"),
        (errno.EROFS, True, "the disk is read-only: write to another one"),
    ],
)
def test_the_folder_is_named_that_has_no_room(code, hidden, cause, tmp_path, monkeypatch) -> None:
    """And not a hidden file in it, which is removed."""

    def fail(path: Path, _: bytes) -> int:
        path.touch()
        raise OSError(code, os.strerror(code), *([str(path)] if hidden else []))

    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.raises(UserError) as told:
        require_writable(tmp_path / "new", "--run-dir")
    assert str(told.value) == f"{tmp_path / 'new'}: {cause} (--run-dir)"
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made_leaves_no_parents(tmp_path, monkeypatch) -> None:
    mkdir = Path.mkdir

    def fail_at_the_last(path: Path) -> None:
        if path.name == "c":
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        mkdir(path)

    monkeypatch.setattr(Path, "mkdir", fail_at_the_last)
    with pytest.raises(UserError, match="c: the disk is full"):
        require_writable(tmp_path / "a" / "b" / "c")
    assert not list(tmp_path.iterdir())
    assert make_folder(tmp_path / "a" / "b") == [tmp_path / "a" / "b", tmp_path / "a"]
    assert make_folder(tmp_path / "a" / "b") == []


def test_the_most_valuable_files_are_written_although_one_fails(tmp_path: Path) -> None:
    def fail(path: Path) -> None:
        raise MemoryError

    first, second, third = (tmp_path / name for name in ("a.png", "b.csv", "c.png"))
    with pytest.raises(UserError) as told:
        write_all({first: fail, second: lambda path: write_text(path, "x"), third: fail})
    problem = "could not be written: MemoryError: MemoryError"
    assert str(told.value) == f"{first}: {problem}; {third}: {problem}"
    assert second.read_text() == "x"
    assert try_write(second, lambda path: write_text(path, "y")) == ""


def test_a_missing_package_is_one_line() -> None:
    require_package("json", "nothing")
    with pytest.raises(UserError, match="--x needs a package: pip install -r requirements-opt"):
        require_package("no_such_package.part", "--x")


DAMAGED = {
    "half": '{"sessions": [',
    "brackets": "[" * 200_000,
    "digits": '{"a": ' + "9" * 5001 + "}",
    "more digits than a float has": '{"a": ' + "9" * 400 + "}",
    "infinite": '{"a": 1e999}',
    "infinite with many digits": '{"a": ' + "9" * 5001 + ".5}",
    "not a number": '{"a": NaN}',
    "a list": "[]",
    "a number": "3",
    "sessions a text": '{"sessions": "x"}',
    "sessions of numbers": '{"sessions": [3]}',
    "a session of lists": '{"sessions": [{"device": ["x"]}]}',
}


@pytest.mark.parametrize("what", DAMAGED)
def test_a_damaged_environment_is_one_line(what: str, tmp_path: Path) -> None:
    path = tmp_path / "environment.json"
    path.write_text(DAMAGED[what])
    for read in (read_sessions, lambda folder: log_environment(folder, "cpu")):
        with pytest.raises(UserError) as told:
            read(tmp_path)
        assert str(told.value).startswith(f"{path}: ")
        assert len(str(told.value).splitlines()) == 1
        assert len(str(told.value)) < len(str(path)) + 120
        assert "set_int_max_str_digits" not in str(told.value)
    assert path.read_text() == DAMAGED[what]


def test_bytes_that_are_no_text_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(UserError, match="not a text in UTF-8"):
        read_json(tmp_path / "x.json")
    assert read_json(tmp_path / "absent.json") == {}


@pytest.mark.parametrize(
    "change", [{"n_frames": "16"}, {"quality": 9.5}, {"modality": []}, {"x": 1}]
)
def test_a_damaged_cache_is_one_line(change: dict, tmp_path: Path) -> None:
    settings = {"n_frames": 16, "image_size": 224, "quality": 92, "frames_per_segment": 5}
    (tmp_path / "cache.json").write_text(json.dumps({"format": 1, **settings}))
    assert ClipCache(tmp_path, tmp_path).settings.n_frames == 16
    (tmp_path / "cache.json").write_text(json.dumps({"format": 1, **settings, **change}))
    with pytest.raises(UserError, match="a cache of another version"):
        ClipCache(tmp_path, tmp_path)


def test_settings_of_a_file_are_checked() -> None:
    with pytest.raises(UserError, match=r"run/config\.json: .*epochs is of type str"):
        from_dict({"classes": ["a", "b"], "epochs": "x"}, source="run/config.json")
    with pytest.raises(UserError, match="names no classes"):
        from_dict({}, source="run/config.json")
