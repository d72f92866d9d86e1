"""CPU devices that share one machine (XLA's `--xla_force_host_platform_device_count`)."""

import os
import re

COUNT = re.compile(r"--xla_force_host_platform_device_count=(\d+)")
THREADS = "NPROC"
"""As many threads XLA starts; by default one a core."""


def give_threads() -> None:
    """Call before JAX opens its devices. In a collective each waits in a thread for the others: if
    there are fewer than devices, XLA ends the process by chance. What a user set is kept."""
    found = COUNT.search(os.environ.get("XLA_FLAGS", ""))
    if found:
        os.environ.setdefault(THREADS, str(max(int(found[1]) + 1, os.cpu_count() or 1)))
