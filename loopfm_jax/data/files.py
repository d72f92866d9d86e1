"""Raw files -> frames, with errors that name the file, the column and the fix."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow

from loopfm_jax.data.checks import require_columns
from loopfm_jax.errors import UserError

PARQUET = (".parquet", ".pq")
CSV = (".csv", ".csv.gz")
ALL = slice(None)


def find_table(folder: Path | None, name: str, *, needed: bool = True) -> Path | None:
    """`name.csv` or `name.csv.gz`, found as `find_file` does."""
    path = find_file(folder, f"{name}.csv", f"{name}.csv.gz")
    if path is None and needed:
        raise UserError(f"{folder} holds neither {name}.csv nor {name}.csv.gz")
    return path


def find_file(folder: Path | None, *names: str) -> Path | None:
    """The first of `names` in `folder` or its `data/` sub-folder (the release's layout)."""
    if folder is None:
        raise UserError("where is the data? give the folder of its files with --data.raw-dir")
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder: check --data.raw-dir")
    paths = (parent / name for parent in (folder, folder / "data") for name in names)
    return next((path for path in paths if path.exists()), None)


def read_csv(
    path: Path | None,
    columns: Iterable[str],
    *,
    types: Mapping[str, Any] | None = None,
    count: int | None = None,
) -> pl.DataFrame:
    """A CSV file (gzip or not) that has at least these columns; without a type: as strings.

    Raises:
      UserError: a column is missing, a value has the wrong type, or the file is cut off.
    """
    assert path is not None
    with reading(path):
        header = pl.read_csv(path, n_rows=0, glob=False).columns
        require_columns(header, columns, where=path)
        whole = {name: pl.String for name in header} | dict(types or {})
        return pl.read_csv(path, schema_overrides=whole, glob=False, n_rows=count)


def scan_csv(path: Path | None, types: Mapping[str, Any]) -> pl.LazyFrame:
    """The named columns of a CSV file, to be read in a streaming query; NULL means missing.

    Headers are taken without surrounding blanks. Ids that were saved as floats (`17.0`) are given
    the type Float64 here, and cast by the caller.

    Raises:
      UserError: the file cannot be opened, or a column is missing. What is found later, in the
        middle of the file, is a PolarsError of the query: collect it under `reading(path)`.
    """
    assert path is not None
    with reading(path):
        header = pl.read_csv(path, n_rows=0, glob=False, infer_schema=False).columns
        names = {name.strip(): name for name in header}
        require_columns(names, types, where=path)
        whole = {names[name]: kind for name, kind in types.items()}
        scan = pl.scan_csv(
            path, schema_overrides=whole, glob=False, null_values=["NULL"], infer_schema=False
        )
        return scan.select(pl.col(raw).alias(raw.strip()) for raw in whole)


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turns what goes wrong while a file is read into one message that names it."""
    try:
        yield
    except (pl.exceptions.PolarsError, pyarrow.ArrowInvalid, OSError, EOFError) as error:
        raise UserError(f"{path} cannot be read: {_first_line(error)}") from None


def read_table(path: Path, columns: Iterable[str], *, rows: slice = ALL) -> pl.DataFrame:
    """A CSV or Parquet file, by its suffix, that has at least these columns; CSV columns come as
    strings.

    Args:
      rows: which of them; of a CSV file, the first ones.
    """
    if path.suffix.lower() not in PARQUET:
        return read_csv(path, columns, count=rows.stop)
    with reading(path):
        require_columns(pl.read_parquet_schema(path), columns, where=path)
        low, high, _ = rows.indices(2**62)
        scan = pl.scan_parquet(path, glob=False)
        return scan.collect() if rows == ALL else scan.slice(low, high - low).collect()


def row_parts(path: Path, size: int) -> list[slice]:
    """A file in parts that `read_table` takes, of `size` rows where it is a Parquet file."""
    if path.suffix.lower() not in PARQUET:
        return [ALL]
    with reading(path):
        count = pl.scan_parquet(path, glob=False).select(pl.len()).collect().item()
    return [slice(low, min(low + size, count)) for low in range(0, count, size)]


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def concat(tables: Sequence[pl.DataFrame]) -> pl.DataFrame:
    """The rows of all tables; columns that some lack are empty there."""
    try:
        return pl.concat(tables, how="diagonal_relaxed")
    except pl.exceptions.PolarsError as error:
        raise UserError(
            f"the files do not fit together: {_first_line(error)}; make their columns alike"
        ) from None


def drop_duplicates(frame: pl.DataFrame) -> tuple[pl.DataFrame, int]:
    """Without exact duplicates (all columns of the file alike), and how many there were."""
    kept = frame.unique(maintain_order=True)
    return kept, len(frame) - len(kept)
