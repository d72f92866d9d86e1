"""Files in another order: the same bytes as `np.save` writes, however little is held in memory."""

import tracemalloc

import numpy as np
import pytest

from loopfm_jax.history import files
from loopfm_jax.history.files import write_rows


@pytest.fixture
def small(monkeypatch):
    """Parts of 1,000 bytes, dealt out 64 bytes at a time."""
    monkeypatch.setattr(files, "HELD_BYTES", 1000)
    monkeypatch.setattr(files, "PART_BYTES", 1000)
    monkeypatch.setattr(files, "BLOCK_BYTES", 64)


def written(folder, values, rows) -> tuple[bytes, bytes]:
    write_rows(folder / "found.npy", values, rows)
    np.save(folder / "expected.npy", values[rows])
    return (folder / "found.npy").read_bytes(), (folder / "expected.npy").read_bytes()


@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 2)])
@pytest.mark.parametrize("dtype", ["uint8", "int8", "int32", "float16", "float32"])
def test_bytes_are_those_of_np_save(tmp_path, shape, dtype, small):
    rng = np.random.default_rng(0)
    values = rng.integers(0, 100, (901, *shape)).astype(dtype)
    for rows in (
        rng.permutation(901),
        rng.permutation(901)[:500],
        np.array([900]),
        np.array([], int),
    ):
        found, expected = written(tmp_path, values, rows.astype(np.int32))
        assert found == expected


def test_parts_are_really_used(tmp_path, small, monkeypatch):
    calls = []
    deal = files._deal
    monkeypatch.setattr(files, "_deal", lambda *a, **k: (calls.append(len(a[2])), deal(*a, **k)))
    values = np.arange(1000, dtype=np.int32)
    found, expected = written(tmp_path, values, np.arange(1000)[::-1].copy())
    assert found == expected and calls == [4]


def test_memory_does_not_grow_with_the_width(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "HELD_BYTES", 1 << 18)
    monkeypatch.setattr(files, "PART_BYTES", 1 << 18)
    monkeypatch.setattr(files, "BLOCK_BYTES", 1 << 16)
    rows = np.random.default_rng(0).permutation(20_000).astype(np.int32)
    peaks = []
    for width in (32, 512):
        np.save(tmp_path / "values.npy", np.zeros((len(rows), width), np.uint8))
        values = np.load(tmp_path / "values.npy", mmap_mode="r")
        tracemalloc.start()
        write_rows(tmp_path / "found.npy", values, rows)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.5 * peaks[0] < 4 << 18
