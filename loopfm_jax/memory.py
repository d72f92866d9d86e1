"""Memory of the host process."""

import ctypes
import os

MMAP_MAX, TRIM_THRESHOLD = -4, -1


def keep_freed() -> None:
    """Keeps freed memory in the process, where the C library is glibc.

    A step's temporaries on CPU are one block, which glibc maps anew at every step when it exceeds
    32 MB: some ten thousand page faults, half the time of a VM step. The price: the process
    holds on to its peak.
    """
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is not None:
        set_option(MMAP_MAX, 0)
        set_option(TRIM_THRESHOLD, 2**31 - 1)


def host_bytes() -> int:
    """Memory of the machine."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
