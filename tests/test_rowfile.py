"""Rows of a file, written in any order, are the array that numpy would have saved."""

import numpy as np
import pytest

from loopfm_jax.history.rowfile import After, RowFile, open_rows, write_at


@pytest.mark.parametrize("values", [np.arange(14, dtype=np.uint8).reshape(7, 2), np.arange(7.0)])
def test_is_what_numpy_saves(tmp_path, values):
    saved, filled = tmp_path / "saved.npy", tmp_path / "filled.npy"
    np.save(saved, values)
    file = RowFile(filled, shape=values.shape, dtype=values.dtype)
    file[4:6] = values[4:6]
    After(file, 3)[0:1] = values[3:4]
    After(file, 6)[0:1] = values[6:]
    file[3:3] = values[:0]
    file[0:3] = values[:3]
    file.close()
    assert filled.read_bytes() == saved.read_bytes()


def test_rows_that_nobody_wrote_are_zeros(tmp_path):
    file = RowFile(tmp_path / "rows.npy", shape=(5,), dtype=np.float32)
    file[1:3] = np.ones(2)
    file.close()
    assert np.load(tmp_path / "rows.npy").tolist() == [0, 1, 1, 0, 0]


@pytest.mark.parametrize("values", [np.arange(14, dtype=np.uint8).reshape(7, 2), np.arange(7.0)])
def test_rows_are_read_and_written_where_they_are(tmp_path, values):
    np.save(tmp_path / "rows.npy", np.zeros_like(values))
    write_at(tmp_path / "rows.npy", 4, values[4:])
    write_at(tmp_path / "rows.npy", 0, values[:4].astype(np.int64))  # of another type
    rows = open_rows(tmp_path / "rows.npy")
    assert (len(rows), rows.shape, rows.dtype) == (7, values.shape, values.dtype)
    for part in (slice(None), slice(2, 5), slice(5, 99), slice(3, 3)):
        np.testing.assert_array_equal(rows[part], values[part])
