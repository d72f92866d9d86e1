"""Freed memory stays in the process."""

import subprocess
import sys

import pytest

PROGRAM = """
import resource
import numpy as np
from loopfm_jax.memory import keep_freed

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        np.ones(8_000_000)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

before = faults()
keep_freed()
faults()
print(before, faults())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc alone maps and unmaps")
def test_a_large_block_is_not_mapped_anew():
    """Page faults of five blocks of 64 MB, one after the other."""
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, check=True)
    before, after = map(int, done.stdout.split())
    assert after < 0.05 * before
