"""Tables of Postgres and their columns, and the vectors in them, for the importers that read from Postgres."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from psycopg import sql

from embedonce.contracts import FoundVectors
from embedonce.errors import SourceError
from embedonce.vectors import Matrix, Vector

from ._found import make_found
from ._missing_names import describe_missing
from ._postgres import Database, Statement


@dataclass(frozen=True, slots=True)
class Table:
    """A table or a view, and the types of its columns."""

    name: str
    """The name for messages: schema and table."""
    identifier: sql.Identifier
    columns: Mapping[str, str]
    """For each column, the name of its type in ``pg_type``, such as ``_float4`` for ``real[]``."""

    def check_column(self, column: str, option: str, expected: Iterable[str], advice: str) -> str:
        """Return the type of a column that an option names.

        Raises:
            SourceError: there is no such column, or its type is not ``expected``; ``advice`` says what to do then.
        """
        if column not in self.columns:
            raise SourceError(
                describe_missing(f"{option}: {self.name} has no column", column, [*self.columns], "columns")
            )
        kind = self.columns[column]
        if kind not in expected:
            raise SourceError(
                f"the column {column!r} ({option}) of {self.name} has the type {format_type(kind)}; {advice}"
            )
        return kind


def format_type(name: str) -> str:
    """Return a type's name in ``pg_type`` as people write it: ``real[]`` for ``_float4``."""
    known = {"float4": "real", "float8": "double precision", "bpchar": "char"}
    base = name.removeprefix("_")
    return known.get(base, base) + "[]" * name.startswith("_")


_FIND_TABLE = sql.SQL("""
SELECT c.oid FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
WHERE c.relname = %s AND n.nspname = %s AND c.relkind IN ('r', 'v', 'm', 'p', 'f')""")

_LIST_TABLES = sql.SQL("""
SELECT n.nspname::text, c.relname::text
FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
WHERE c.relkind IN ('r', 'v', 'm', 'p', 'f') AND n.nspname <> 'information_schema' AND n.nspname !~ '^pg_'
ORDER BY 1, 2""")

# A domain counts as the type that it is based on.
_LIST_COLUMNS = sql.SQL("""
SELECT a.attname::text, coalesce(b.typname, t.typname)::text
FROM pg_catalog.pg_attribute a
JOIN pg_catalog.pg_type t ON t.oid = a.atttypid
LEFT JOIN pg_catalog.pg_type b ON b.oid = t.typbasetype
WHERE a.attrelid = %s AND a.attnum > 0 AND NOT a.attisdropped
ORDER BY a.attnum""")


def inspect_table(database: Database, table: str, schema: str | None = None, *, advice: str = "") -> Table:
    """Return a table and its columns. Without ``schema``, the table is searched as in a query, in the search path.

    Raises:
        SourceError: there is no such table. The message lists the tables that exist, and ends with ``advice``.
    """
    if schema is None:
        regclass = sql.SQL("SELECT pg_catalog.to_regclass(pg_catalog.quote_ident(%s))::oid")
        found = [row for row in database.run(regclass, (table,)) if row[0] is not None]
    else:
        found = database.run(_FIND_TABLE, (table, schema))
    if not found:
        raise SourceError(_describe_missing_table(database, table, schema) + advice)
    columns = {str(name): str(kind) for name, kind in database.run(_LIST_COLUMNS, (int(found[0][0]),))}
    identifier = sql.Identifier(schema, table) if schema else sql.Identifier(table)
    return Table(f"{schema}.{table}" if schema else table, identifier, columns)


def _describe_missing_table(database: Database, table: str, schema: str | None) -> str:
    tables = [(str(where), str(name)) for where, name in database.run(_LIST_TABLES)]
    elsewhere = [where for where, name in tables if name == table]
    if elsewhere and schema:
        return f'{database.name} has the table "{table}" in the schema {elsewhere[0]}: set schema = "{elsewhere[0]}"'
    if elsewhere:
        path = f"?options=-csearch_path%3D{elsewhere[0]}"
        return f'{database.name} has the table "{table}" in the schema {elsewhere[0]}: add {path} to url'
    names = [name if where == (schema or "public") else f"{where}.{name}" for where, name in tables]
    return describe_missing(f"{database.name} has no table", table, names, "tables")


# --- vectors ----------------------------------------------------------------------------------

_HEADER = np.dtype([("axes", ">i4"), ("has_null", ">i4"), ("kind", ">u4"), ("size", ">i4"), ("first", ">i4")])
"""The beginning of an array of one axis in Postgres' binary format. The elements follow, each after its size."""


def _parse_array(block: NDArray[np.uint8], number: str) -> NDArray[Any]:
    if block.shape[1] < _HEADER.itemsize:
        raise ValueError("an empty array")
    headers = np.ascontiguousarray(block[:, : _HEADER.itemsize]).view(_HEADER)
    if (headers["axes"] != 1).any():
        raise ValueError("an array of arrays")
    if headers["has_null"].any():
        raise ValueError("an array with a null")
    elements = np.ascontiguousarray(block[:, _HEADER.itemsize :]).view([("size", ">i4"), ("value", number)])
    values: NDArray[Any] = elements["value"]
    return values


def _parse_pgvector(block: NDArray[np.uint8], number: str) -> NDArray[Any]:
    # The number of dimensions, two unused bytes, and the numbers.
    dimensions = np.ascontiguousarray(block[:, :2]).view(">i2")
    if (4 + dimensions * np.dtype(number).itemsize != block.shape[1]).any():
        raise ValueError("not a vector in the format of pgvector")
    return np.ascontiguousarray(block[:, 4:]).view(number)


BINARY: Mapping[str, Callable[[NDArray[np.uint8]], NDArray[Any]]] = {
    "vector": partial(_parse_pgvector, number=">f4"),
    "halfvec": partial(_parse_pgvector, number=">f2"),
    "_float4": partial(_parse_array, number=">f4"),
    "_float8": partial(_parse_array, number=">f8"),
}
"""The types that are read in Postgres' binary format, which is fastest and needs nothing of pgvector in this process.
Each function turns rows of bytes of one length (uint8, shape (n, bytes)) into numbers of shape (n, d)."""


def select_vector(column: sql.Composable, kind: str) -> Statement:
    """Return the expression that selects a vector column: a type of :data:`BINARY` as bytes, bytea, or text."""
    if kind in ("_float4", "_float8"):
        return sql.SQL("pg_catalog.array_send({})").format(column)  # psycopg would make a list of it
    return sql.SQL("{}" if kind in BINARY or kind == "bytea" else "{}::text").format(column)


class BinaryDecoder:
    """Decodes the values of a column of a type in :data:`BINARY`."""

    def __init__(self, kind: str) -> None:
        self._parse = BINARY[kind]

    def __call__(self, value: bytes) -> Vector:
        """Return a float32 vector of shape (d,).

        Raises:
            ValueError: the array is empty, has several axes, or has a null.
        """
        vector: Vector = _round(self._parse(np.frombuffer(value, np.uint8)[np.newaxis]))[0]
        return vector

    def decode_all(self, values: Sequence[bytes | None]) -> Matrix | None:
        """Return a matrix with the vector of each value, or None if one is missing, invalid, or of another length."""
        size = len(values[0] or b"") if values else 0
        if not size or any(value is None or len(value) != size for value in values):
            return None
        block = np.frombuffer(b"".join(values), np.uint8).reshape(len(values), size)  # type: ignore[arg-type]
        try:
            return _round(self._parse(block))
        except ValueError:
            return None


def _round(numbers: NDArray[Any]) -> NDArray[np.float32]:
    with np.errstate(over="ignore"):  # it becomes infinity, which the engine refuses
        return numbers.astype(np.float32)


def decode_rows(
    texts: Sequence[str], values: Sequence[Any], decode: Callable[[Any], NDArray[np.floating[Any]]]
) -> FoundVectors:
    """Return texts with the vectors of their values, as :func:`make_found` does; a matrix if that is possible."""
    if isinstance(decode, BinaryDecoder) and (matrix := decode.decode_all(values)) is not None:
        return FoundVectors(texts, matrix)
    return make_found(texts, values, decode)
