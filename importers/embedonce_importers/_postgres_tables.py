"""Tables of Postgres and their columns, and the vectors in them, for the importers that read from Postgres."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
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

ARRAYS = ("vector", "halfvec", "_float4", "_float8")
"""The types that :func:`select_vector` reads as arrays of numbers."""

_HEADER = np.dtype([("axes", ">i4"), ("has_null", ">i4"), ("kind", ">u4"), ("size", ">i4"), ("first", ">i4")])
"""The beginning of an array of one axis in Postgres' binary format. The elements follow, each after its size."""
_ELEMENTS = {
    700: np.dtype([("size", ">i4"), ("value", ">f4")]),
    701: np.dtype([("size", ">i4"), ("value", ">f8")]),
}
"""The layout of an element, by the number of the type (float4, float8)."""


def select_vector(column: sql.Composable, kind: str) -> Statement:
    """Return the expression that selects a vector column in the form in which this module or ``_values`` decodes it.

    The types in :data:`ARRAYS` become Postgres' binary form of an array, in which a value is read fastest. It needs
    nothing of pgvector in this process.
    """
    if kind in ("vector", "halfvec"):
        return sql.SQL("pg_catalog.array_send({}::real[])").format(column)
    if kind in ARRAYS:
        return sql.SQL("pg_catalog.array_send({})").format(column)
    return sql.SQL("{}").format(column) if kind == "bytea" else sql.SQL("{}::text").format(column)


def decode_array(value: bytes) -> Vector:
    """Return the float32 vector in the binary form of an array.

    Raises:
        ValueError: the array is empty, has several axes, or has a null.
    """
    if len(value) < _HEADER.itemsize:
        raise ValueError("an empty array")
    header = np.frombuffer(value, _HEADER, count=1)[0]
    if header["axes"] != 1:
        raise ValueError("an array of arrays")
    if header["has_null"]:
        raise ValueError("an array with a null")
    elements = np.frombuffer(value, _ELEMENTS[int(header["kind"])], offset=_HEADER.itemsize)
    return _round(elements["value"])


def decode_arrays(values: Sequence[bytes | None]) -> Matrix | None:
    """Return a matrix with the vector of each value, or None if a value is missing, invalid, or of another length."""
    size = len(values[0] or b"") if values else 0
    if size <= _HEADER.itemsize or any(value is None or len(value) != size for value in values):
        return None
    block = np.frombuffer(b"".join(values), np.uint8).reshape(len(values), size)  # type: ignore[arg-type]
    headers = np.ascontiguousarray(block[:, : _HEADER.itemsize]).view(_HEADER)[:, 0]
    if (headers["axes"] != 1).any() or headers["has_null"].any():
        return None
    elements = np.ascontiguousarray(block[:, _HEADER.itemsize :]).view(_ELEMENTS[int(headers["kind"][0])])
    return _round(elements["value"])


def _round(numbers: NDArray[Any]) -> NDArray[np.float32]:
    with np.errstate(over="ignore"):  # it becomes infinity, which the engine refuses
        return numbers.astype(np.float32)


def decode_rows(
    texts: Sequence[str],
    values: Sequence[Any],
    decode: Callable[[Any], NDArray[np.floating[Any]]] = decode_array,
) -> FoundVectors:
    """Return texts with the vectors of their values, as :func:`make_found` does; arrays become one matrix."""
    if decode is decode_array and (matrix := decode_arrays(values)) is not None:
        return FoundVectors(texts, matrix)
    return make_found(texts, values, decode)
