"""The allocator's settings, seen by what happens to memory that is freed."""

import subprocess
import sys

import pytest
from helpers import ROOT

CODE = """
import sys, torch
from utils import allocator
done = allocator.keep_freed_memory()
if len(sys.argv) > 1:
    done = allocator.restore_malloc_defaults()
def pages():
    return int(open("/proc/self/statm").read().split()[1])
block = torch.ones(100_000_000 // 4)
full = pages()
del block
print(done, (full - pages()) * 4096)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc only")
@pytest.mark.parametrize(
    ("switch", "worker"), [("", False), ("", True), ("default", False), ("default", True)]
)
def test_freed_memory_is_kept_but_in_workers(switch: str, worker: bool) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CODE, *["worker"] * worker],
        cwd=ROOT,
        env={"SURGICAL_CLIPS_ALLOCATOR": switch},
        capture_output=True,
        text=True,
        check=True,
    )
    done, given_back = done.stdout.split()
    assert done == str(switch != "default")
    if switch != "default" and not worker:
        assert int(given_back) < 5e6
    else:
        assert int(given_back) > 90e6
