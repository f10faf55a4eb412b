"""Rows of Parquet files in order, each read when it is asked for; files and row groups of which none is are skipped unread."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

BATCH = 64  # rows that are in memory at once


def deferred_rows(
    footer: pq.FileMetaData,
    opened: Callable[[], IO[bytes]],
    guard: Callable[[], AbstractContextManager[None]],
    columns: Sequence[str] | None = None,
) -> Iterator[Callable[[], dict[str, Any]]]:
    """One function for each row of a file, in order, which reads it; they may be called in that order, and any left out.

    The file is opened when the first of them is called. Of a row group, rows after the last one that is asked for are not
    decoded; those before the first one are, where the group's columns are not stored apart for each of them, but they become no
    Python objects.

    Args:
        footer: of the file.
        opened: opens the file.
        guard: what reading happens under; explains errors.
        columns: read only these; where the file has none of them, rows are empty and nothing is read.
    """
    schema = footer.schema.to_arrow_schema()
    wanted = [name for name in schema.names if columns is None or name in columns]
    if not wanted:
        yield from (dict[str, Any] for _ in range(footer.num_rows))
        return
    coded = {name: kind for name, kind in json_columns(schema).items() if name in wanted}
    file = _File(footer, opened, guard)
    for number in range(footer.num_row_groups):
        group = _Group(file, number, wanted, coded)
        for index in range(footer.row_group(number).num_rows):
            yield partial(group.row, index)


class _File:
    """A Parquet file that is opened when it is first read from."""

    def __init__(
        self,
        footer: pq.FileMetaData,
        opened: Callable[[], IO[bytes]],
        guard: Callable[[], AbstractContextManager[None]],
    ):
        self.guard = guard
        self._footer = footer
        self._opened = opened
        self._file: pq.ParquetFile | None = None

    def batches(self, group: int, columns: list[str]) -> Iterator[pa.RecordBatch]:
        import pyarrow.parquet as pq

        if self._file is None:
            self._file = pq.ParquetFile(self._opened(), metadata=self._footer)
        batches: Iterator[pa.RecordBatch] = self._file.iter_batches(BATCH, row_groups=[group], columns=columns)
        return batches


class _Group:
    """The rows of one row group, read forwards in batches."""

    def __init__(self, file: _File, number: int, columns: list[str], coded: Mapping[str, pa.DataType]):
        self._file = file
        self._number = number
        self._columns = columns
        self._coded = coded
        self._batches: Iterator[pa.RecordBatch] | None = None
        self._rows: list[dict[str, Any]] = []
        self._first = 0

    def row(self, index: int) -> dict[str, Any]:
        """The row at this place of the group; no earlier one may be asked for after it."""
        with self._file.guard():
            if self._batches is None:
                self._batches = self._file.batches(self._number, self._columns)
            while index >= self._first + len(self._rows):
                self._first += len(self._rows)
                batch = next(self._batches)
                if index >= self._first + len(batch):
                    self._first += len(batch)
                    self._rows = []
                    continue
                self._rows = [with_json(row, self._coded) for row in batch.to_pylist()]
        return self._rows[index - self._first]


def json_columns(schema: pa.Schema) -> dict[str, pa.DataType]:
    """The columns in which `datasets` keeps JSON (its feature `Json`), alone or inside lists and mappings."""
    return {entry.name: entry.type for entry in schema if "arrow.json" in str(entry.type)}


def with_json(row: dict[str, Any], columns: Mapping[str, pa.DataType]) -> dict[str, Any]:
    """A row whose JSON columns are read."""
    return {**row, **{name: _from_json(row[name], kind) for name, kind in columns.items() if name in row}}


def _from_json(value: Any, kind: pa.DataType) -> Any:
    import pyarrow as pa

    if value is None:
        return None
    if isinstance(kind, pa.BaseExtensionType) and kind.extension_name == "arrow.json":
        return json.loads(value)
    if pa.types.is_struct(kind):
        return {entry.name: _from_json(value[entry.name], entry.type) for entry in kind.fields}
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return [_from_json(item, kind.value_type) for item in value]
    return value
