"""Memory of the host process."""

import ctypes
import mmap
import os
import re
from functools import cache
from pathlib import Path

MMAP_MAX, TRIM_THRESHOLD, ARENA_MAX = -4, -1, -8
SET_ASIDE = 1 << 28
"""Bytes; half of it was too little while a step is compiled."""
GROUP = Path("/sys/fs/cgroup")
"""A container's limits: no such files outside one, `max` in them where nothing is limited."""


def share_arena() -> None:
    """One heap for all threads, where the C library is glibc: call before any is started.

    A thread with a heap of its own maps every large block anew, whatever `keep_freed` asks, and on
    CPU a step runs in such a thread.
    """
    _set_options({ARENA_MAX: 1})


def keep_freed() -> None:
    """Keeps freed memory in the process, in large pages, where the C library is glibc.

    A step's temporaries on CPU are one block, which glibc maps anew at every step when it exceeds
    32 MB: some ten thousand page faults, half the time of a VM step. The price: the process
    holds on to its peak. Large pages bring another twentieth to eighth (benchmarks/LOG.md).
    """
    _set_options({MMAP_MAX: 0, TRIM_THRESHOLD: -1})  # -1: none is given back
    _want_large_pages()


@cache
def _want_large_pages() -> None:
    """For half of the machine's memory, as far as the heap comes to use it: a heap grows at its
    end, so a block that is taken, marked and freed at once marks what comes next."""
    size, page, libc = host_bytes() // 2, mmap.PAGESIZE, _heap()
    if libc is None or not hasattr(mmap, "MADV_HUGEPAGE"):
        return
    start = libc.malloc(size)  # an address, no memory yet; none where the system promises no more
    if start:
        libc.madvise(-(-start // page) * page, size - page, mmap.MADV_HUGEPAGE)
        libc.free(start)


@cache
def set_aside() -> None:
    """Leaves a free block for small requests, once a process: after `keep_freed`, and after what
    stays is there.

    They are cut from the smallest free block that holds them. Without one it is that of the step
    before, and where that has become too small for the next step the heap grows by as much
    (benchmarks/LOG.md).
    """
    libc = _heap()
    if libc is None:
        return
    block, fence = libc.malloc(SET_ASIDE), libc.malloc(SET_ASIDE)
    if fence:
        libc.realloc(fence, 64)  # what is left of it keeps the block from the end of the heap
    libc.free(block)


@cache
def _heap() -> ctypes.CDLL | None:
    """The C library, if it is glibc."""
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        return None
    libc.malloc.restype = libc.realloc.restype = ctypes.c_void_p
    libc.malloc.argtypes, libc.free.argtypes = [ctypes.c_size_t], [ctypes.c_void_p]
    libc.realloc.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return libc


def _set_options(options: dict[int, int]) -> None:
    if (libc := _heap()) is not None:
        for name, value in options.items():
            libc.mallopt(name, value)


def host_bytes() -> int:
    """Memory of the machine, or of the control group where that is less."""
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min(machine, _number(GROUP / "memory.max", r"^(\d+)$") or machine)


def free_bytes() -> int | None:
    """What processes may still take: of the machine, or of the control group where that is less;
    None where there is no /proc."""
    free = _number(Path("/proc/meminfo"), r"MemAvailable:\s+(\d+)", unit=1024)
    limit, used = (_number(GROUP / f"memory.{x}", r"^(\d+)$") for x in ("max", "current"))
    if free is None or limit is None or used is None:
        return free
    cached = _number(GROUP / "memory.stat", r"^inactive_file (\d+)$") or 0
    return min(free, limit - used + cached)


def resident_bytes() -> int:
    """What this process holds now; 0 where there is no /proc."""
    return _number(Path("/proc/self/status"), r"VmRSS:\s+(\d+)", unit=1024) or 0


def _number(path: Path, pattern: str, *, unit: int = 1) -> int | None:
    found = re.search(pattern, path.read_text(), re.MULTILINE) if path.exists() else None
    return unit * int(found[1]) if found else None
