"""Freed memory stays with the process, so that the next batch need not fetch it from the kernel."""

import ctypes
import os

SWITCH = "SURGICAL_CLIPS_ALLOCATOR"

# (option, value), see mallopt(3)
_KEEP = (
    (-4, 0),  # M_MMAP_MAX: no block gets a mapping of its own, which free() would give back at once
    (-1, -1),  # M_TRIM_THRESHOLD: the end of the heap is never given back
    (-2, 64 * 2**20),  # M_TOP_PAD: the heap grows by 64 MiB at a time
)

_GIVE_BACK = (
    (-4, 65536),  # M_MMAP_MAX: glibc's default
    (-3, 4 * 2**20),  # M_MMAP_THRESHOLD: blocks from 4 MiB on get mappings of their own
)


def keep_freed_memory() -> bool:
    """Tell glibc's malloc to keep what is freed. Returns whether it does now.

    A network's activations are megabytes each. By default glibc gives such blocks back to the
    kernel at every free, and the next allocation pays for fresh, zeroed pages again: up to half of
    the time of a forward pass on a CPU (RESULTS.md). The price is that the process holds on to its
    peak. Does nothing where there is no glibc, and where the environment variable
    SURGICAL_CLIPS_ALLOCATOR is `default`, for comparison.
    """
    return _set(_KEEP)


def give_back_batches() -> bool:
    """Tell glibc's malloc to give large blocks back after all. Returns whether it does now.

    For the processes that read clips: there a batch is one large block that comes and goes, and on
    the heap it would leave gaps, so that the heap would grow for many epochs.
    """
    return _set(_GIVE_BACK)


def _set(settings: tuple[tuple[int, int], ...]) -> bool:
    if os.environ.get(SWITCH) == "default":
        return False
    try:
        libc = ctypes.CDLL(None)
        libc.gnu_get_libc_version  # noqa: B018 - musl, macOS and Windows have none
        return all(libc.mallopt(option, value) == 1 for option, value in settings)
    except (OSError, TypeError, AttributeError):
        return False
