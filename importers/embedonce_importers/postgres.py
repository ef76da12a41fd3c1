"""The ``postgres`` importer: a table of Postgres that some program made for its vectors.

Such a table has a column with a key that is made from the text, a column with the whole text, or both.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from psycopg import sql

from embedonce import hookimpl
from embedonce.contracts import FoundVectors, Source
from embedonce.errors import SourceError
from embedonce.options import Doc

from ._found import NO_TEXT, add_unreadable, merge_repeated
from ._key_templates import KeyOption, ModelOption, StepsOption
from ._postgres import Database, Row, Statement, explain_errors, is_storable
from ._postgres_tables import BINARY, BinaryDecoder, Table, decode_rows, format_type, inspect_table, select_vector
from ._table_options import (
    DEFAULT_KEY,
    OTHER_TEXT,
    KeyColumnOption,
    ModelColumnOption,
    TextColumnOption,
    make_template,
)
from ._values import ValueForm, ValueOption, decode

api = 1

Decode: TypeAlias = Callable[[Any], NDArray[np.floating[Any]]]

SAME_KEY = "the row has another text, which has the same key because of the option steps"

TEXTS = ("text", "varchar")
"""Types of a column with texts. Not ``char(n)``, because it does not tell spaces at the end of a text from its own."""
KEYS = (*TEXTS, "bpchar", "bytea")
JSON = ("json", "jsonb")
VECTORS = (*BINARY, *JSON, "text", "varchar", "bytea")
TEXT_FORMS = ("json", "pgvector", "base64-float64")
"""The forms of vectors that are text."""


@dataclass(frozen=True, slots=True)
class _Plan:
    """How to read the table, once the types of its columns are known."""

    table: Table
    vector: Statement
    decode: Decode
    key_kind: str | None


class PostgresImporter:
    """Reads a table with a vector per row, and a key made from the text, the text, or both."""

    def __init__(
        self,
        *,
        url: Annotated[
            str, Doc("postgresql://user@host:5432/database, or any other connection string that libpq accepts.")
        ],
        table: Annotated[str, Doc("Name of the table or the view.")],
        schema: Annotated[str, Doc("Schema that contains the table.")] = "public",
        vector_column: Annotated[
            str,
            Doc("Column with the vectors: vector, halfvec, real[], double precision[], json, jsonb, text or bytea."),
        ] = "embedding",
        key_column: KeyColumnOption = None,
        text_column: TextColumnOption = None,
        model_column: ModelColumnOption = None,
        key: KeyOption = DEFAULT_KEY,
        model: ModelOption = None,
        steps: StepsOption = (),
        value: ValueOption | None = None,
    ) -> None:
        self._template = make_template(
            key, key_column=key_column, text_column=text_column, model_column=model_column, model=model, steps=steps
        )
        self._database = Database(url)
        self._names = table, schema
        self._vector_column = vector_column
        self._key_column = key_column
        self._text_column = text_column
        self._model_column = model_column
        self._model = model
        self._value: ValueForm | None = value
        self._known: _Plan | None = None
        self.source = Source(self._describe())
        if text_column is not None:
            self.scan = self._scan
            self.count = self._count

    def __repr__(self) -> str:
        return f"<PostgresImporter of {self.source.name}>"

    def _describe(self) -> str:
        table, schema = self._names
        parts = [f"postgres {self._database.name} table={schema}.{table} vector_column={self._vector_column}"]
        for option, column in (("key_column", self._key_column), ("text_column", self._text_column)):
            parts += [f"{option}={column}"] * (column is not None)
        if self._model_column is not None:
            parts.append(f"model_column={self._model_column} model={self._model}")
        if self._template is not None:
            parts.append(self._template.name)
        return " ".join([*parts, *([f"value={self._value}"] if self._value else [])])

    def check(self) -> None:
        """Check that the table and its columns exist, have suitable types, and can be read."""
        with explain_errors(self._database):
            self._known = None
            plan = self._get_plan()
            columns = [name for name in (self._key_column, self._text_column) if name is not None]
            self._database.run(self._select(plan, map(sql.Identifier, columns)) + sql.SQL(" LIMIT 1"), self._filter())

    def lookup(self, texts: Sequence[str], /) -> FoundVectors:
        """Return the texts that the table has, with one query."""
        plan = self._get_plan()
        if self._template is None:
            return self._look_up_texts(plan, texts)
        groups: dict[str | bytes, list[str]] = {}
        for key, same in self._template.group_by_key(texts).items():
            if (encoded := _encode_key(key, plan.key_kind)) is not None:
                groups[encoded] = same
        assert self._key_column is not None
        column = sql.Identifier(self._key_column)
        shown = _show_column(column, plan.key_kind)
        # An array of the column's own type, because the index of the column would not be used otherwise.
        kind = sql.SQL("bytea[]" if plan.key_kind == "bytea" else "bpchar[]" if plan.key_kind == "bpchar" else "text[]")
        condition = sql.SQL("{} = ANY(%s::{})").format(column, kind)
        text_columns = [] if self._text_column is None else [_show_column(sql.Identifier(self._text_column), "text")]
        texts_found: list[str] = []
        vectors: list[Any] = []
        other_texts = 0
        for key, *stored, vector in self._run(plan, [shown, *text_columns], condition, list(groups)):
            same = groups.get(key, [])
            # With steps, several texts have this key. A stored text that has it too is the one that was embedded.
            whole = [text for text in stored if text is not None and self._encode_key_of(plan, text) == key]
            matching = [text for text in same if not whole or text in whole]
            other_texts += bool(same and not matching)
            texts_found += matching
            vectors += [vector] * len(matching)
        found = merge_repeated(decode_rows(texts_found, vectors, plan.decode))
        return add_unreadable(found, {SAME_KEY: other_texts})

    def _encode_key_of(self, plan: _Plan, text: str) -> str | bytes | None:
        assert self._template is not None
        return _encode_key(self._template.make_key(text), plan.key_kind)

    def _look_up_texts(self, plan: _Plan, texts: Sequence[str]) -> FoundVectors:
        asked = [text for text in texts if is_storable(text)]
        assert self._text_column is not None
        column = sql.Identifier(self._text_column)
        shown = _show_column(column, "text")
        condition = sql.SQL("{} = ANY(%s::text[])").format(column)
        # The collation of the column may count different texts as equal.
        wanted = set(asked)
        rows = [row for row in self._run(plan, [shown], condition, asked) if row[0] in wanted]
        return merge_repeated(decode_rows([text for text, _ in rows], [vector for _, vector in rows], plan.decode))

    def _scan(self) -> Iterator[FoundVectors]:
        """Yield all rows, in the order of the table."""
        plan = self._get_plan()
        names = [name for name in (self._text_column, self._key_column) if name is not None]
        columns = [_show_column(sql.Identifier(name), plan.table.columns[name]) for name in names]
        for rows in self._database.scan(self._select(plan, columns), self._filter()):
            yield self._make_part(plan, rows)

    def _make_part(self, plan: _Plan, rows: Sequence[Row]) -> FoundVectors:
        unreadable: Counter[str] = Counter()
        kept: list[Row] = []
        for row in rows:
            if row[0] is None:
                unreadable[NO_TEXT] += 1
            elif self._template is not None and row[1] != self._encode_key_of(plan, row[0]):
                unreadable[OTHER_TEXT] += 1
            else:
                kept.append(row)
        found = decode_rows([row[0] for row in kept], [row[-1] for row in kept], plan.decode)
        return add_unreadable(found, unreadable)

    def _count(self) -> int | None:
        """Return the number of rows; None if counting takes long."""
        plan = self._get_plan()
        statement = sql.SQL("SELECT count(*) FROM {}{}").format(plan.table.identifier, self._where())
        return self._database.count(statement, self._filter())

    def close(self) -> None:
        """Close the connections."""
        self._database.close()

    # --- statements ---------------------------------------------------------------------------

    def _run(
        self, plan: _Plan, columns: Sequence[sql.Composable], condition: sql.Composable, wanted: Sequence[Any]
    ) -> list[Row]:
        statement = self._select(plan, columns) + sql.SQL(" AND ") + condition
        return self._database.run(statement, (*self._filter(), wanted))

    def _select(self, plan: _Plan, columns: Iterator[sql.Composable] | Sequence[sql.Composable]) -> sql.Composed:
        selected = sql.SQL(", ").join([*columns, plan.vector])
        return sql.SQL("SELECT {} FROM {}{}").format(selected, plan.table.identifier, self._where())

    def _where(self) -> Statement:
        if self._model_column is None:
            return sql.SQL(" WHERE true")
        return sql.SQL(" WHERE {}::text = %s::text").format(sql.Identifier(self._model_column))

    def _filter(self) -> tuple[str, ...]:
        return () if self._model_column is None else (self._model or "",)

    def _get_plan(self) -> _Plan:
        """Return how to read the table. The first call asks the server for the types of the columns."""
        if self._known is None:
            table = inspect_table(self._database, *self._names)
            kind = table.check_column(
                self._vector_column,
                "vector_column",
                VECTORS,
                "expected vector, halfvec, real[], double precision[], json, jsonb, text or bytea",
            )
            key_kind = None
            if self._key_column is not None:
                expected = "expected text, varchar, char or bytea"
                key_kind = table.check_column(self._key_column, "key_column", KEYS, expected)
                self._check_key(table, key_kind)
            if self._text_column is not None:
                expected = "expected text or varchar, which keep every text as it is"
                table.check_column(self._text_column, "text_column", TEXTS, expected)
            if self._model_column is not None:
                advice = "expected text, varchar or char"
                table.check_column(self._model_column, "model_column", (*TEXTS, "bpchar"), advice)
            decoder = self._choose_decoder(table, kind)
            vector = select_vector(sql.Identifier(self._vector_column), kind)
            self._known = _Plan(table, vector, decoder, key_kind)
        return self._known

    def _check_key(self, table: Table, kind: str) -> None:
        """Check that a column of the type ``kind`` has different keys for different texts.

        Raises:
            SourceError: it has not.
        """
        assert self._template is not None
        column = f"the column {self._key_column!r} (key_column) of {table.name} has the type {format_type(kind)}"
        if kind == "bytea" and not self._template.is_hash:
            raise SourceError(
                f"{column}, so it can only have the bytes of a hash; set key to a hash such as {DEFAULT_KEY}"
            )
        if kind == "bpchar" and self._template.ends_with_text:
            raise SourceError(
                f"{column}, which drops spaces at the end of a key, so texts that end differently would have the same "
                "key; create a view with another type, or set text_column"
            )

    def _choose_decoder(self, table: Table, kind: str) -> Decode:
        if kind in BINARY or kind in JSON:
            if self._value is not None:
                raise SourceError(
                    f"the type of the column {self._vector_column!r} of {table.name} tells how to read it; remove value"
                )
            return BinaryDecoder(kind) if kind in BINARY else lambda text: decode(text, "json")
        if kind == "bytea" and self._value is None:
            raise SourceError(
                f"the column {self._vector_column!r} of {table.name} has bytes; set value to their form, for example "
                "float32"
            )
        form: ValueForm = self._value or "json"
        if kind != "bytea" and form not in TEXT_FORMS:
            raise SourceError(
                f"the column {self._vector_column!r} of {table.name} has text, which cannot have the form {form}; set "
                f"value to one of {', '.join(TEXT_FORMS)}"
            )
        return lambda stored: decode(stored, form)


def _show_column(column: sql.Identifier, kind: str | None) -> sql.Composable:
    """Return the expression that selects a key or a text."""
    return column if kind == "bytea" else sql.SQL("{}::text").format(column)


def _encode_key(key: str, kind: str | None) -> str | bytes | None:
    """Return a key as the column has it; None if the column cannot have it. A bytea column has the bytes of a hash."""
    if kind != "bytea":
        return key if is_storable(key) else None
    try:
        return bytes.fromhex(key)
    except ValueError:
        return None


@hookimpl
def embedonce_importers() -> Mapping[str, type[PostgresImporter]]:
    """Return the class of the ``postgres`` importer."""
    return {"postgres": PostgresImporter}
