"""Freed memory stays in the process."""

import subprocess
import sys

import pytest

PROGRAM = """
import resource
from concurrent.futures import ThreadPoolExecutor
from loopfm_jax.memory import keep_freed
import numpy as np

pool = ThreadPoolExecutor(1)  # a step on CPU does not run in the thread that asks for it

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        pool.submit(lambda: np.ones(20_000_000).size).result()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

before = faults()
keep_freed()
faults()
print(before, faults())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc alone maps and unmaps")
def test_a_large_block_is_not_mapped_anew():
    """Page faults of five blocks of 160 MB, one after the other, not in the first thread."""
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, check=True)
    before, after = map(int, done.stdout.split())
    assert after < 0.05 * before
