"""Reads all files of a table, with the columns that the options name or that are the only ones possible."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from embedonce.contracts import FoundVectors

from ._arrow_rows import Columns, choose_columns
from ._table_files import open_table


def choose_table_columns(
    files: Sequence[Path], below: Path, *, text_column: str | None, vector_column: str | None, where: str
) -> Columns:
    """Return the columns to read. A column counts if at least one of the files has it.

    ``below`` is the folder of the files, or the file if there is only one.

    Raises:
        SourceError: a file cannot be read, a named column is missing, or it is not clear which columns are meant.
    """
    types: dict[str, str] = {}
    texts: dict[str, None] = {}
    vectors: dict[str, None] = {}
    for file in files:
        schema = open_table(file, below).read_schema()
        types.update(schema.types)
        texts.update(dict.fromkeys(schema.texts))
        vectors.update(dict.fromkeys(schema.vectors))
    return choose_columns(
        list(texts), list(vectors), types, text_column=text_column, vector_column=vector_column, where=where
    )


def scan_files(files: Sequence[Path], below: Path, columns: Columns) -> Iterator[FoundVectors]:
    """Yield the rows of the files, in order.

    Raises:
        SourceError: a file cannot be read.
    """
    for file in files:
        yield from open_table(file, below).read(columns)


def count_rows(files: Sequence[Path], below: Path) -> int | None:
    """Return the number of rows of all files; None if a file does not say it."""
    total = 0
    for file in files:
        rows = open_table(file, below).count()
        if rows is None:
            return None
        total += rows
    return total
