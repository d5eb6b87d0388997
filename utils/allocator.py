"""Settings of glibc's malloc: keep freed memory in the process, or give it back to the kernel."""

import ctypes
import os

SWITCH = "SURGICAL_CLIPS_ALLOCATOR"

# (option, value), see mallopt(3)
_KEEP = (
    (-4, 0),  # M_MMAP_MAX: no block gets its own mapping, which free() would give back at once
    (-1, -1),  # M_TRIM_THRESHOLD: the end of the heap is never given back
    (-2, 64 * 2**20),  # M_TOP_PAD: the heap grows by 64 MiB at a time
)

_GIVE_BACK = (
    (-4, 65536),  # M_MMAP_MAX: glibc's default
    (-3, 4 * 2**20),  # M_MMAP_THRESHOLD: blocks of at least 4 MiB get their own mappings
)


def keep_freed_memory() -> bool:
    """Make glibc's malloc keep freed memory. Returns whether it does now.

    The activations of a network have megabytes each. By default glibc gives such blocks back to the
    kernel when they are freed, and the next allocation must get new, zeroed pages: this takes up to
    half of the time of a forward pass on a CPU (docs/results/speed.md). The price is that the
    process never gets smaller than its peak. The function does nothing without glibc, or if the
    environment variable SURGICAL_CLIPS_ALLOCATOR is `default`, which is for comparisons.
    """
    return _set(_KEEP)


def restore_malloc_defaults() -> bool:
    """Make glibc's malloc give large blocks back again. Returns whether it does now.

    This is for the processes that read clips. There every batch is a large block; on the heap these
    blocks would leave gaps, and the heap would grow for many epochs.
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
