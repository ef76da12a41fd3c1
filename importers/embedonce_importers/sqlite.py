"""The ``sqlite`` importer: a table of SQLite that some program made for its vectors.

Such a table has a column with a key that is made from the text, a column with the whole text, or both. Tutorials use
names such as ``embeddings(cache_key, vector)`` and ``embedding_cache(text_hash, embedding)``.
"""

from __future__ import annotations

import sqlite3
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

from embedonce import hookimpl
from embedonce.contracts import FoundVectors, Source
from embedonce.errors import SourceError
from embedonce.options import Doc

from ._found import add_unreadable, make_found, merge_repeated
from ._key_templates import KeyOption, ModelOption, StepsOption, has_utf8
from ._sqlite import Connection, ReadOnlyDatabase, check_columns, fetch_by_keys, get_bytes, quote_identifier
from ._table_options import (
    DEFAULT_KEY,
    OTHER_TEXT,
    KeyColumnOption,
    ModelColumnOption,
    TextColumnOption,
    make_template,
)
from ._values import DecodedVector, ValueForm, ValueOption, decode

api = 1

PAGE = 1000
"""Number of rows in a part of a scan. Each part is a query of its own, so that no lock is held between two parts."""

NOT_TEXT = "the text of the row is not text in UTF-8"
TOO_LARGE = "a row larger than 4 MiB"


class SqliteImporter:
    """Reads a table with a vector per row, and a key made from the text, the text, or both."""

    def __init__(
        self,
        *,
        path: Annotated[Path, Doc("The database file.")],
        table: Annotated[str, Doc("Name of the table or the view.")],
        key_column: KeyColumnOption = None,
        text_column: TextColumnOption = None,
        vector_column: Annotated[str, Doc("Column with the vectors.")] = "embedding",
        model_column: ModelColumnOption = None,
        key: KeyOption = DEFAULT_KEY,
        model: ModelOption = None,
        steps: StepsOption = (),
        value: ValueOption = "json",
    ) -> None:
        self._template = make_template(
            key, key_column=key_column, text_column=text_column, model_column=model_column, model=model, steps=steps
        )
        self._database = ReadOnlyDatabase(Path(path))
        self._table = table
        self._key_column = key_column
        self._text_column = text_column
        self._vector_column = vector_column
        self._model_column = model_column
        self._model = model
        self._value: ValueForm = value
        self._is_checked = False
        self._row_number: str | None = None
        self.source = Source(self._describe())
        if text_column is not None:
            self.scan = self._scan
            self.count = self._count

    def __repr__(self) -> str:
        return f"<SqliteImporter of {self.source.name}>"

    def _describe(self) -> str:
        columns = [
            f"{option}={column}"
            for option, column in (
                ("key_column", self._key_column),
                ("text_column", self._text_column),
                ("vector_column", self._vector_column),
                ("model_column", self._model_column),
            )
            if column is not None
        ]
        keys = [self._template.name] if self._template is not None else []
        model = [f"model={self._model}"] if self._model_column is not None else []
        options = [f"table={self._table}", *columns, *model, *keys, f"value={self._value}"]
        return f"sqlite: {self._database.path.absolute()}, {', '.join(options)}"

    def check(self) -> None:
        """Check that the table and its columns exist and can be read.

        Raises:
            SourceError: the file is missing or is not a database, or it has no such table or column.
        """
        self._is_checked = False
        with self._connect() as (connection, _):
            connection.execute(f"{self._select(self._columns)} LIMIT 1").fetchall()

    def lookup(self, texts: Sequence[str], /) -> FoundVectors:
        """Return the texts that the table has."""
        if self._template is not None:
            groups = self._template.group_by_key(texts)
        else:
            groups = {text: [text] for text in texts if has_utf8(text)}
        column = self._key_column or self._text_column or ""
        columns = [column, self._vector_column, *([self._text_column] if self._text_column else [])]
        query = f"{self._select(columns)} AND {_quote(column)} IN"
        with self._connect() as (connection, _):
            rows, too_large = fetch_by_keys(connection, query, groups, before=self._parameters)
        by_key = {key.encode(): same for key, same in groups.items()}
        pairs: list[tuple[str, Any]] = []
        other_texts = 0
        for key, value, *stored in rows:
            # SQLite may compare without case, or as numbers, so the keys are compared again here.
            same = by_key.get(key, ())
            matching = [text for text in same if not stored or stored[0] == text.encode()]
            other_texts += bool(same and not matching)
            pairs += [(text, value) for text in matching]
        found = merge_repeated(self._make_found(pairs))
        return add_unreadable(found, {TOO_LARGE: too_large, OTHER_TEXT: other_texts})

    def close(self) -> None:
        """Close the connections."""
        self._database.close()

    def _scan(self) -> Iterator[FoundVectors]:
        """Yield all rows, in the order of their numbers."""
        last = -(2**63)
        size = PAGE
        while True:
            with self._connect() as (connection, number):
                if number is None:
                    raise SourceError(
                        f'{self._database.path}: "{self._table}" is a view or has no row numbers, so it cannot be read '
                        "in parts; name another table, or give the texts with --texts"
                    )
                columns = ", ".join([number, *map(_quote, self._columns)])
                page = f"{self._where} AND {number} > ? ORDER BY {number} LIMIT ?"
                try:
                    rows = connection.execute(f"SELECT {columns} {page}", (*self._parameters, last, size)).fetchall()
                except sqlite3.DataError:  # a row is larger than the limit; find it with smaller pages
                    if size > 1:
                        size = max(1, size // 10)
                        continue
                    row = connection.execute(f"SELECT {number} {page}", (*self._parameters, last, 1)).fetchone()
                    last = row[0]
                    yield FoundVectors([], [], {TOO_LARGE: 1})
                    continue
            if not rows:
                return
            last, size = rows[-1][0], PAGE
            yield self._read_rows(rows)

    def _read_rows(self, rows: Sequence[tuple[Any, ...]]) -> FoundVectors:
        unreadable: Counter[str] = Counter()
        pairs: list[tuple[str, Any]] = []
        for _, stored, value, *keys in rows:
            try:
                text = stored.decode()
            except (AttributeError, UnicodeDecodeError):
                unreadable[NOT_TEXT] += 1
                continue
            if self._template is not None and keys != [self._template.make_key(text).encode()]:
                unreadable[OTHER_TEXT] += 1
            else:
                pairs.append((text, value))
        return add_unreadable(self._make_found(pairs), unreadable)

    def _count(self) -> int:
        """Return the number of rows."""
        with self._connect() as (connection, _):
            return int(connection.execute(f"SELECT count(*) {self._where}", self._parameters).fetchone()[0])

    @contextmanager
    def _connect(self) -> Iterator[tuple[Connection, str | None]]:
        """Lend a connection and the expression of the row numbers. The first call checks the columns."""
        with self._database.connect() as connection:
            if not self._is_checked:
                columns = [*self._columns, *([self._model_column] if self._model_column else [])]
                self._row_number = check_columns(connection, self._database.path, self._table, columns)
                self._is_checked = True
            yield connection, self._row_number

    @property
    def _columns(self) -> list[str]:
        columns = (self._text_column, self._vector_column, self._key_column)
        return [column for column in columns if column is not None]

    def _select(self, columns: Iterable[str]) -> str:
        return f"SELECT {', '.join(map(_quote, columns))} {self._where}"

    @property
    def _where(self) -> str:
        condition = f"{_quote(self._model_column)} = ?" if self._model_column is not None else "1"
        return f"FROM {quote_identifier(self._table)} AS source WHERE {condition}"

    @property
    def _parameters(self) -> tuple[str, ...]:
        return (self._model or "",) if self._model_column is not None else ()

    def _make_found(self, pairs: Sequence[tuple[str, Any]]) -> FoundVectors:
        return make_found([text for text, _ in pairs], [value for _, value in pairs], self._decode)

    def _decode(self, stored: object) -> DecodedVector:
        return decode(get_bytes(stored), self._value)


def _quote(column: str) -> str:
    # Without the name of the table, SQLite would take the name of a missing column as a string.
    return f"source.{quote_identifier(column)}"


@hookimpl
def embedonce_importers() -> Mapping[str, type[SqliteImporter]]:
    return {"sqlite": SqliteImporter}
