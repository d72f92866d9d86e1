"""numpy sorts by AVX2 where AVX-512 is slow."""

import os
import subprocess
import sys

import pytest

from loopfm_jax import vectors

ZEN4 = """processor\t: 0
vendor_id\t: AuthenticAMD
cpu family\t: 25
flags\t\t: fpu avx2 avx512f avx512bw
"""


@pytest.mark.parametrize(
    "line, other",
    [("AuthenticAMD", "GenuineIntel"), ("25", "26"), ("25", "6"), (" avx512f avx512bw", "")],
)
def test_zen4_is_amd_of_family_25_with_avx512(line, other):
    assert vectors.is_zen4(ZEN4)
    assert not vectors.is_zen4(ZEN4.replace(line, other))
    assert not vectors.is_zen4("")


@pytest.mark.parametrize("asked, found", [(None, vectors.AVX512), ("AVX512_SPR", "AVX512_SPR")])
def test_it_is_asked_for_once_and_what_a_user_set_is_kept(monkeypatch, tmp_path, asked, found):
    monkeypatch.setattr(vectors, "CPU", tmp_path / "cpuinfo")
    monkeypatch.setattr(os, "environ", {} if asked is None else {vectors.DISABLED: asked})
    vectors.sort_by_avx2()
    assert os.environ.get(vectors.DISABLED) == asked
    vectors.CPU.write_text(ZEN4)
    vectors.sort_by_avx2()
    assert os.environ[vectors.DISABLED] == found


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/cpuinfo")
def test_the_package_asks_before_numpy_is_there():
    """numpy tells which of its loops it will not use."""
    program = (
        "import sys, loopfm_jax\n"
        "assert 'numpy' not in sys.modules\n"
        "from numpy._core._multiarray_umath import __cpu_features__ as found\n"
        "from loopfm_jax.vectors import CPU, is_zen4\n"
        "print(not is_zen4(CPU.read_text()) or not found.get('X86_V4', False))"
    )
    env = {name: value for name, value in os.environ.items() if name != vectors.DISABLED}
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True)
    assert done.stdout == "True\n", done.stderr
