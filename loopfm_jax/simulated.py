"""CPU devices that share one machine: XLA's `--xla_force_host_platform_device_count`, or JAX's
`JAX_NUM_CPU_DEVICES`."""

import os
import re

COUNT = re.compile(r"--xla_force_host_platform_device_count=(\d+)")
THREADS = "NPROC"
"""As many threads XLA starts; by default one a core."""


def give_threads() -> None:
    """Call before JAX opens its devices. In a collective each waits in a thread for the others: if
    there are fewer than devices, XLA ends the process by chance. What a user set is kept."""
    asked = COUNT.findall(os.environ.get("XLA_FLAGS", "")), os.environ.get("JAX_NUM_CPU_DEVICES")
    devices = [int(count) for count in (*asked[0][-1:], asked[1]) if count]  # XLA takes the last
    if devices:
        os.environ.setdefault(THREADS, str(max(max(devices) + 1, os.cpu_count() or 1)))
