"""Parts of a list, and results that several processes work out together."""

import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest

from utils.errors import UserError
from utils.sharding import Shard, remove_results, run_shared, this_shard


@pytest.mark.parametrize("count", [1, 2, 3, 7, 20])
def test_the_parts_are_the_whole_and_about_equally_large(count: int) -> None:
    items = [f"video{i}" for i in range(13)]
    sizes = [i * i for i in range(13)]
    parts = [Shard(index, count).part(items, sizes) for index in range(count)]
    assert sorted(item for part in parts for item in part) == sorted(items)
    assert parts[0][0] == "video12"
    if count < 13:
        totals = [sum(int(name[5:]) ** 2 for name in part) for part in parts]
        assert max(totals) - min(totals) <= max(sizes)


@pytest.mark.parametrize("text", ["0/4", "3/4", "0/1", "9/10"])
def test_a_part_is_named_by_its_number(text: str) -> None:
    assert str(this_shard(text)) == text


@pytest.mark.parametrize("text", ["4/4", "1", "-1/4", "a/b", "1/0", "1/4/2", "1 /4", "٣/٤"])
def test_no_other_text_is_a_part(text: str) -> None:
    with pytest.raises(UserError, match="give i/n for process i of n"):
        this_shard(text)


def test_torchrun_says_the_part(monkeypatch: pytest.MonkeyPatch) -> None:
    assert this_shard() is None
    monkeypatch.setenv("WORLD_SIZE", "6")
    monkeypatch.setenv("RANK", "5")
    assert this_shard() == Shard(5, 6)
    with pytest.raises(UserError, match="torchrun shares the files already"):
        this_shard("1/6")


def length(path: Path) -> int:
    with open(path.with_name("calls"), "a") as calls:
        calls.write(f"{path.name}\n")
    return len(path.read_text())


def shared(root: Path, shard: Shard | None) -> dict[Path, int] | None:
    files = sorted(root.glob("*.txt"))
    return run_shared(length, files, 0, "test", shard, root / "parts", int, int)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for number in range(9):
        (tmp_path / f"{number}.txt").write_text("x" * number)
    return tmp_path


def expected(root: Path) -> dict[Path, int]:
    return {root / f"{number}.txt": number for number in range(9)}


def calls(root: Path) -> list[str]:
    return (root / "calls").read_text().split()


def test_the_last_process_has_all_results_and_each_file_is_read_once(root: Path) -> None:
    assert shared(root, Shard(0, 3)) is None
    assert shared(root, Shard(2, 3)) is None
    assert shared(root, Shard(1, 3)) == expected(root)
    assert sorted(calls(root)) == [f"{n}.txt" for n in range(9)]
    assert shared(root, None) == expected(root)  # alone it keeps nothing, and reads all
    assert len(calls(root)) == 18
    remove_results(root / "parts")
    assert not (root / "parts").exists()


def test_another_number_of_processes_does_what_is_left(root: Path) -> None:
    assert shared(root, Shard(1, 4)) is None
    (root / "5.txt").write_text("y" * 77)  # changed meanwhile
    os.utime(root / "0.txt", ns=(1, 1))
    done = set(calls(root))
    results = [shared(root, Shard(index, 2)) for index in range(2)]
    assert results == [None, {**expected(root), root / "5.txt": 77}]
    again = [name for name in set(calls(root)) if calls(root).count(name) > 1]
    assert set(again) <= done & {"5.txt", "0.txt"}


def slow(path: Path) -> int:
    time.sleep(0.02)
    return length(path)


def run_slowly(root: Path, shard: Shard) -> None:
    files = sorted(root.glob("*.txt"))
    run_shared(slow, files, 0, "test", shard, root / "parts", int, int)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes cannot be forked here")
def test_a_killed_process_leaves_what_it_had_done(root: Path) -> None:
    process = multiprocessing.get_context("fork").Process(
        target=run_slowly, args=(root, Shard(0, 1))
    )
    process.start()
    while not (root / "calls").exists() or len(calls(root)) < 3:
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    (log,) = (root / "parts").iterdir()
    with open(log, "a") as lines:
        lines.write('["half a li')  # the line that it was writing
    assert shared(root, Shard(0, 1)) == expected(root)
    twice = len(calls(root)) - 9
    assert 0 <= twice <= 1  # the file that it was reading


@pytest.mark.parametrize("line", ["[]", "3", "null", '["a"]', "{}", '[["a"], 1]'])
def test_foreign_lines_are_left_out(line: str, root: Path) -> None:
    (root / "parts").mkdir()
    (root / "parts" / "other.jsonl").write_text(f"{line}\n{json.dumps(['a', 1])}\n")
    assert shared(root, Shard(0, 1)) == expected(root)
