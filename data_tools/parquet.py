"""Reads parquet files. pyarrow is imported only here, and only if there is such a file."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from megatron_lite.errors import ConfigError, DataError


def num_row_groups(path: str) -> int:
    """How many row groups the file has. Raises DataError if it is not parquet, ConfigError without pyarrow."""
    return _open(path).num_row_groups


def rows(path: str, group: int, column: str) -> Iterator[bytes | None]:
    """The strings of ``column`` in one row group, as stored bytes; None for null."""
    file = _open(path)
    import pyarrow as pa  # installed: _open has used it

    names = file.schema_arrow.names
    if column not in names:
        raise DataError(f"{path}: no column {column!r} (--text_key); its columns are: {', '.join(names)}")
    try:
        for batch in file.iter_batches(batch_size=256, row_groups=[group], columns=[column], use_threads=False):
            values = batch.column(0)
            if not (pa.types.is_string(values.type) or pa.types.is_large_string(values.type)):
                raise DataError(f"{path}: column {column!r} holds {values.type}, expected strings")
            # As bytes: parquet does not check its strings, and one that is not UTF-8 would fail the whole batch.
            yield from values.cast(pa.large_binary()).to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: damaged parquet file: {' '.join(str(error).split())}") from None


def objects(path: str, group: int) -> Iterator[dict[str, Any] | None]:
    """The rows of one row group as objects; None for a row with a string that is not UTF-8."""
    file = _open(path)
    import pyarrow as pa

    try:
        for batch in file.iter_batches(batch_size=256, row_groups=[group], use_threads=False):
            for i in range(batch.num_rows):
                try:
                    yield batch.slice(i, 1).to_pylist()[0]
                except UnicodeDecodeError:
                    yield None
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: damaged parquet file: {' '.join(str(error).split())}") from None


def _open(path: str) -> Any:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ModuleNotFoundError:
        raise ConfigError(f"{path}: reading parquet needs pyarrow: pip install 'megatron_lite[parquet]'") from None
    try:
        return pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a readable parquet file: {' '.join(str(error).split())}") from None
