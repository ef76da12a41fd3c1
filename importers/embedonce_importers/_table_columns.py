"""Reads Parquet and Arrow files, a few thousand rows at a time.

This module imports pyarrow, so an importer imports this module inside its methods. :mod:`._files` opens the files, and
pyarrow gets the opened file.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as parquet  # type: ignore[import-untyped]

from embedonce.contracts import FoundVectors
from embedonce.errors import SourceError

from ._arrow_rows import BATCH_ROWS, Columns, is_text, is_vector, read_parts
from ._files import open_file


class TableFile(Protocol):
    """A file whose rows can be read."""

    def read_schema(self) -> Schema: ...

    def read(self, columns: Columns) -> Iterator[FoundVectors]: ...

    def count(self) -> int | None: ...


@dataclass(frozen=True, slots=True)
class Schema:
    """The columns of a file, by what they may have."""

    types: Mapping[str, str]
    """The name of each column's type."""
    texts: Sequence[str]
    vectors: Sequence[str]


@contextmanager
def translate_errors(path: Path, format_: str) -> Iterator[None]:
    """Raise :class:`SourceError` for the errors of pyarrow. Their messages may contain text, so they are left out."""
    try:
        yield
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise SourceError(
            f"{path} cannot be read as {format_} ({type(error).__name__}), so it is damaged or incomplete; copy "
            "it again"
        ) from None


def describe_schema(schema: Any, path: Path) -> Schema:
    if len(set(schema.names)) < len(schema.names):
        raise SourceError(f"{path} has several columns of the same name; rename them")
    return Schema(
        {field.name: str(field.type) for field in schema},
        [field.name for field in schema if is_text(field.type)],
        [field.name for field in schema if is_vector(field.type)],
    )


class ParquetTable:
    def __init__(self, path: Path, below: Path) -> None:
        self._path = path
        self._below = below

    @contextmanager
    def _open(self) -> Iterator[Any]:
        # Without pre_buffer=False, pyarrow reads a whole row group ahead, which may be the whole file.
        with (
            open_file(self._path, below=self._below) as file,
            translate_errors(self._path, "Parquet"),
            parquet.ParquetFile(file, pre_buffer=False, buffer_size=2**20) as table,
        ):
            yield table

    def read_schema(self) -> Schema:
        with self._open() as table:
            return describe_schema(table.schema_arrow, self._path)

    def read(self, columns: Columns) -> Iterator[FoundVectors]:
        with self._open() as table:
            names = [name for name in columns.names if name in table.schema_arrow.names]
            if not names:
                yield from _count_rows(table.metadata.num_rows)
                return
            for batch in table.iter_batches(batch_size=BATCH_ROWS, columns=names):
                yield from read_parts(batch, columns)

    def count(self) -> int:
        with self._open() as table:
            return int(table.metadata.num_rows)


def _count_rows(number: int) -> Iterator[FoundVectors]:
    if number:
        yield FoundVectors([], [], {"row without a text": number})


class ArrowTable:
    """Arrow's file format, which is also the second version of Feather."""

    format_ = "Arrow"

    def __init__(self, path: Path, below: Path) -> None:
        self._path = path
        self._below = below

    def _open_reader(self, source: Any, options: Any) -> Any:
        return pa.ipc.open_file(source, options=options)

    @contextmanager
    def _open(self, columns: Columns | None = None) -> Iterator[Any]:
        # The file is mapped into memory, so that a record batch of any size takes no memory of the process. The mapping
        # ends when the last array that refers to it is gone.
        with open_file(self._path, below=self._below) as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        with translate_errors(self._path, self.format_):
            source = pa.py_buffer(mapped)
            options = pa.ipc.IpcReadOptions()
            if columns is not None:
                schema = self._open_reader(source, options).schema
                fields = [index for index, name in enumerate(schema.names) if name in columns.names]
                options = pa.ipc.IpcReadOptions(included_fields=fields)
            yield self._open_reader(source, options)

    def read_schema(self) -> Schema:
        with self._open() as reader:
            return describe_schema(reader.schema, self._path)

    def read(self, columns: Columns) -> Iterator[FoundVectors]:
        with self._open(columns) as reader:
            for batch in self._read_batches(reader):
                batch.validate(full=True)  # pyarrow trusts the offsets in a file otherwise, and could read beyond it
                yield from read_parts(batch, columns)

    def _read_batches(self, reader: Any) -> Iterator[Any]:
        for index in range(reader.num_record_batches):
            yield reader.get_batch(index)

    def count(self) -> int | None:
        with self._open() as reader:
            return sum(int(reader.get_batch(index).num_rows) for index in range(reader.num_record_batches))


class ArrowStream(ArrowTable):
    """Arrow's stream format, which Hugging Face's datasets use."""

    format_ = "an Arrow stream"

    def _open_reader(self, source: Any, options: Any) -> Any:
        return pa.ipc.open_stream(source, options=options)

    def _read_batches(self, reader: Any) -> Iterator[Any]:
        yield from reader

    def count(self) -> int | None:
        return None  # the stream has no index
