"""benchmarks/scale.py and benchmarks/shards.py on tiny tables and caches."""

import json
from pathlib import Path

from benchmarks import scale, shards


def test_every_command_is_measured(tmp_path: Path, run_main) -> None:
    flags = ("--clips", 40, "--rows", 60, "--patients", 10, "--what", "report", "audit")
    run_main(scale.main, *flags, "--output", tmp_path, cwd=tmp_path)
    rows = json.loads((tmp_path / "scale.json").read_text())["rows"]
    assert [row["command"].split()[0] for row in rows] == [
        "write_results",
        "report.py",
        "report.py",
        "prepare_data.py",
    ]
    assert all(row["CPU seconds"] > 0 and row["peak MB"] > 10 for row in rows)
    assert rows[1]["page (MB)"] > 0.01


def test_both_caches_are_read(tmp_path: Path, run_main) -> None:
    flags = ("--entries", 12, "--shards", 3, "--reads", 5, "--decoded", 2, "--repeats", 1)
    sizes = ("--frames", 16, "--image-size", 32, "--folder", tmp_path)
    run_main(shards.main, *flags, *sizes, "--output", tmp_path / "out", cwd=tmp_path)
    single, packed = json.loads((tmp_path / "out/shards.json").read_text())["rows"]
    assert packed["files and folders"] == "5"  # three, the index, cache.json
    assert int(single["files and folders"]) > 12
    assert all(row["read, cold (clips/s)"] > 0 for row in (single, packed))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
