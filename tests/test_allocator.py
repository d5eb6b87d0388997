"""The allocator's settings, seen by what happens to memory that is freed."""

import subprocess
import sys

import pytest
from conftest import ROOT

CODE = """
import allocator, torch
done = allocator.keep_freed_memory()
def pages():
    return int(open("/proc/self/statm").read().split()[1])
block = torch.ones(100_000_000 // 4)
full = pages()
del block
print(done, (full - pages()) * 4096)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc only")
@pytest.mark.parametrize("switch", ["", "default"])
def test_freed_memory_is_kept_unless_switched_off(switch: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CODE],
        cwd=ROOT,
        env={"SURGICAL_CLIPS_ALLOCATOR": switch},
        capture_output=True,
        text=True,
        check=True,
    )
    kept, given_back = done.stdout.split()
    assert kept == str(switch != "default")
    if kept == "True":
        assert int(given_back) < 5e6
    else:
        assert int(given_back) > 90e6
