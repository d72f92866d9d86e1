"""Freed memory stays in the process, whole and in large pages."""

import subprocess
import sys
from pathlib import Path

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


CUT = """
import sys
from loopfm_jax.memory import keep_freed, resident_bytes, set_aside

BLOCK = 400_000_000
keep_freed()
if "aside" in sys.argv:
    set_aside()
step = bytearray(BLOCK)
kept = [bytearray(1_000_000)]  # behind it: it does not become the end of the heap
del step
kept += [bytearray(1_000_000) for _ in range(100)]
before = resident_bytes()
step = bytearray(BLOCK)
print(resident_bytes() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc alone cuts so")
def test_small_blocks_are_not_cut_from_the_one_that_a_step_leaves():
    """What the second large block adds to resident memory: nothing, where it finds the first's."""

    def grown(*how: str) -> int:
        command = [sys.executable, "-c", CUT, *how]
        return int(subprocess.run(command, capture_output=True, check=True).stdout)

    assert grown() > 200_000_000
    assert grown("aside") < 50_000_000


LARGE = """
import re
from pathlib import Path
from loopfm_jax.memory import keep_freed

def large_kb():
    return int(re.search(r"AnonHugePages: +(\\d+)", Path("/proc/self/smaps_rollup").read_text())[1])

before = large_kb()
kept = [b"x" * 160_000_000]
usual = large_kb() - before
del kept
keep_freed()
keep_freed()  # marks once
kept = [b"x" * 160_000_000 for _ in range(5)]
print(usual, large_kb() - before)
"""
PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.mark.skipif(
    not PAGES.exists() or "[madvise]" not in PAGES.read_text(),
    reason="large pages are not for those who ask (transparent_hugepage is not at madvise)",
)
def test_what_a_process_takes_from_then_on_lies_in_large_pages():
    """Five blocks of 160 MB, all but the ends of them; NumPy's arrays always do."""
    done = subprocess.run([sys.executable, "-c", LARGE], capture_output=True, check=True)
    usual, large = map(int, done.stdout.split())
    assert usual < 1000
    assert large > 700_000
