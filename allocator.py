"""Freed memory stays with the process, so that the next batch need not fetch it from the kernel."""

import ctypes
import os

SWITCH = "SURGICAL_CLIPS_ALLOCATOR"

# (option, value), see mallopt(3)
_SETTINGS = (
    (-4, 0),  # M_MMAP_MAX: no block gets a mapping of its own, which free() would give back at once
    (-1, -1),  # M_TRIM_THRESHOLD: the end of the heap is never given back
    (-2, 64 * 2**20),  # M_TOP_PAD: the heap grows by 64 MiB at a time
)


def keep_freed_memory() -> bool:
    """Tell glibc's malloc to keep what is freed. Returns whether it does now.

    A network's activations are megabytes each. By default glibc gives such blocks back to the
    kernel at every free, and the next allocation pays for fresh, zeroed pages again: up to half of
    the time of a forward pass on a CPU (RESULTS.md). The price is that the process holds on to its
    peak. Does nothing where there is no glibc, and where the environment variable
    SURGICAL_CLIPS_ALLOCATOR is `default`, for comparison.
    """
    if os.environ.get(SWITCH) == "default":
        return False
    try:
        libc = ctypes.CDLL(None)
        libc.gnu_get_libc_version  # noqa: B018 - musl, macOS and Windows have none
        return all(libc.mallopt(option, value) == 1 for option, value in _SETTINGS)
    except (OSError, TypeError, AttributeError):
        return False
