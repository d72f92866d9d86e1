"""Which vector instructions numpy uses."""

import os
import re
from pathlib import Path

CPU = Path("/proc/cpuinfo")
DISABLED = "NPY_DISABLE_CPU_FEATURES"
AVX512 = "X86_V4 AVX512_ICL AVX512_SPR"
"""As numpy >= 2.4 names what it sorts by; an older one knows other names, and is left as it is."""


def sort_by_avx2() -> None:
    """On AMD's Zen 4 numpy leaves AVX-512 alone: call before numpy is imported.

    Its sort stores compressed vectors, which that processor does in microcode: five times slower
    than AVX2 (github.com/numpy/x86-simd-sort, issue 6), and structuring sorts three times. What a
    user set is kept.
    """
    if is_zen4(CPU.read_text() if CPU.exists() else ""):
        os.environ.setdefault(DISABLED, AVX512)


def is_zen4(cpuinfo: str) -> bool:
    """Family 25 is Zen 3 and 4, of which 4 has AVX-512."""
    wanted = (r"^vendor_id\s*: AuthenticAMD$", r"^cpu family\s*: 25$", r"^flags\s*:.*\bavx512f\b")
    return all(re.search(line, cpuinfo, re.MULTILINE) for line in wanted)
