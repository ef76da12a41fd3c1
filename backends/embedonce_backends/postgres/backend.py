"""The Postgres tier: one row per key, with the vector in a pgvector column where there is one.

``docs/postgres.md`` describes the table, and how to query the vectors where they lie.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Annotated, Any

import psycopg
from annotated_types import Ge

from embedonce import hookimpl
from embedonce.contracts import Capabilities, time_left
from embedonce.errors import ConfigError, TierError
from embedonce.options import Doc
from embedonce_backends._pages import limit_page_time

from .connections import AsyncPool, Connection, Pool, has_rows, is_sound, parameters
from .rows import Item, columns, items_of, texts
from .schema import Column, Found, Run, Statements, look, make, statements

api = 1

log = logging.getLogger("embedonce.postgres")

PAGE = 5000
"""Keys of one query of a scan."""
SWEEP_EVERY = 1000
"""Expired rows are looked for with the first write and each time that so many rows were written."""
LONGEST_NAME = 63
"""Bytes; Postgres cuts off the rest of a longer name."""


class PostgresBackend:
    """Holds entries in a table of Postgres, and frames where a tier is encrypted."""

    def __init__(
        self,
        *,
        url: Annotated[str, Doc("postgresql://user@host:5432/database, or what else libpq takes.")],
        table: Annotated[str, Doc("The table of the cache.")] = "embedonce",
        schema: Annotated[str, Doc("The schema that the table is in.")] = "public",
        column: Annotated[
            Column,
            Doc(
                "What holds a vector: a pgvector column, a bytea column, or (auto) the former where pgvector is"
                " installed in the database."
            ),
        ] = "auto",
        create: Annotated[bool, Doc("Make the table when it is first used; else `embedonce migrate` does.")] = True,
        max_connections: Annotated[int, Ge(1), Doc("Most connections of this process, and of each event loop.")] = 8,
        text_preview: Annotated[
            bool, Doc("Keep the entry's text_preview in a column of its own: the beginning of the text, readable.")
        ] = False,
    ) -> None:
        for option, name in (("table", table), ("schema", schema)):
            if not name or "\0" in name or len(name.encode()) > LONGEST_NAME:
                raise ConfigError(f"{option} is a name of 1 to {LONGEST_NAME} bytes")
        self._parameters = parameters(url)
        self.schema = schema
        self.table = table
        self._column: Column = column
        self._create = create
        self._most = max_connections
        self.keeps_preview = text_preview
        self.capabilities = Capabilities(
            holds="either",
            scope="network",
            deadline=True,
            ttl=True,
            delete=True,
            scan=True,
            count=True,
            add=True,
            twin=True,
            bounded=False,
            text_preview=text_preview,
        )
        self.ahead = 0.0
        """Seconds that are added to the server's clock, by which a ttl goes."""
        self._pool = Pool(self._parameters, max_connections)
        self.known: Statements | None = None
        """The statements for the table, once it has been looked at."""
        self._unswept = SWEEP_EVERY

    def __repr__(self) -> str:
        return f"<PostgresBackend of the table {self.schema}.{self.table}>"

    def get_many(self, keys: Sequence[str], /) -> Mapping[str, Item]:
        """Return what is there, by one query."""
        if not keys:
            return {}
        return items_of(self._run(self.prepared().get, (self.ahead, texts(keys))))

    def set_many(self, items: Mapping[str, Item], ttl: float | None, /) -> None:
        """Store every item by one statement: all of them or none. A row that would stay as it is is not written."""
        if not items:
            return
        made = self.prepared()
        self._run(made.set, (self.ahead, ttl, *columns(items, made.vector_oid, self.keeps_preview)))
        if self._sweep_is_due(len(items)):
            self._sweep(made)

    def add_many(self, items: Mapping[str, Item], ttl: float | None, /) -> set[str]:
        """Store the items whose key is absent or expired, and return those keys; exactly one caller gets each."""
        if not items:
            return set()
        made = self.prepared()
        values = columns(items, made.vector_oid, self.keeps_preview)
        return {key for (key,) in self._run(made.add, (self.ahead, ttl, *values))}

    def delete_many(self, keys: Sequence[str], /) -> None:
        """Remove the keys, by one statement."""
        if keys:
            self._run(self.prepared().delete, (texts(keys),))

    def scan(self, prefix: str, /) -> Iterator[str]:
        """Yield the keys in order, 5,000 a query; expired ones that are not swept yet among them."""
        last = ""
        while True:
            with limit_page_time():
                keys = self._run(self.prepared().scan, (prefix, _end(prefix), last, PAGE))
            for (last,) in keys:
                yield last
            if len(keys) < PAGE:
                return

    def count(self, prefix: str, /) -> int:
        """Return how many keys start with ``prefix``, expired ones that are not swept yet among them."""
        ((count,),) = self._run(self.prepared().count, (prefix, _end(prefix)))
        return int(count)

    def twin(self) -> PostgresTwin:
        """Return a client for the running event loop, with connections of its own."""
        return PostgresTwin(self, AsyncPool(self._parameters, self._most))

    def close(self) -> None:
        """Close every connection, those in use when their call ends."""
        self._pool.close()

    # --- the table ----------------------------------------------------------------------------

    def migrate(self) -> str:
        """Make the table and what else is missing, and say what was done; processes that do so wait for each other.

        Raises:
            psycopg.Error: the role may not, among others.
        """
        with self._transaction() as run:
            done = make(run, self.schema, self.table, self._column)
        self.known = None
        return done

    def describe(self) -> str:
        """Say what holds the vectors; asks the server."""
        found = self._found()
        if not found.table:
            return "no table yet"
        if found.has_vectors and self._column != "bytea":
            return f"pgvector {found.extension}: vectors of float32 in a vector column, the rest in bytea"
        if self._column == "bytea":
            return 'bytea (column = "bytea")'
        if found.extension is not None:
            return "bytea: the table was made without pgvector; `embedonce migrate` adds the column for vectors"
        if found.available is not None:
            return "bytea: pgvector is not installed in this database (CREATE EXTENSION vector)"
        return "bytea: the server has no pgvector"

    def prepared(self) -> Statements:
        """Return the statements for the table, which is looked at, and made where it is not there, at first use."""
        if self.known is not None:
            return self.known
        found = self._found()
        if not found.table or (self._column == "vector" and not found.has_vectors):
            found = self._made()
        made = self.known = statements(found, self.schema, self.table, self._column)
        return made

    def forget(self, error: BaseException) -> None:
        """After an error that a changed table explains, look at the table again."""
        if isinstance(error, psycopg.ProgrammingError):
            self.known = None

    def _found(self) -> Found:
        return look(self._run, self.schema, self.table)

    def _made(self) -> Found:
        if not self._create:
            raise TierError(f"{self._missing()}: run `embedonce migrate`")
        try:
            self.migrate()
        except psycopg.errors.InsufficientPrivilege as error:
            raise TierError(
                f"{self._missing()}, and this role may not make it: run `embedonce migrate` with one that may"
            ) from error
        return self._found()

    def _missing(self) -> str:
        return f"the table {self.table!r} in the schema {self.schema!r} is not there, or has no column for vectors"

    # --- statements ---------------------------------------------------------------------------

    def _run(self, statement: bytes, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """Run one statement, a transaction of its own, and return its rows."""
        connection = self._pool.take()
        try:
            rows = _execute(connection, statement, values)
        except BaseException as error:
            self.forget(error)
            if is_sound(connection, error):
                self._pool.give(connection)
            else:
                self._pool.drop(connection)
            raise
        self._pool.give(connection)
        return rows

    @contextmanager
    def _transaction(self) -> Iterator[Run]:
        """Give the block what runs statements inside one transaction; an error undoes all of them."""
        connection = self._pool.take()
        try:
            _execute(connection, b"BEGIN")
            yield partial(_execute, connection)
            _execute(connection, b"COMMIT")
        except BaseException:
            self._pool.drop(connection)
            raise
        self._pool.give(connection)

    def _sweep_is_due(self, written: int) -> bool:
        self._unswept += written
        return self._unswept >= SWEEP_EVERY

    def _sweep(self, made: Statements) -> None:
        """Delete some of what has expired. What was to be stored is stored: a failure is nobody's but the log's."""
        self._unswept = 0
        try:
            self._run(made.sweep, (self.ahead,))
        except (psycopg.Error, TierError) as error:
            log.warning("expired rows could not be deleted (%s); it is tried again later", type(error).__name__)


class PostgresTwin:
    """The native async client of a :class:`PostgresBackend`, for one event loop."""

    def __init__(self, backend: PostgresBackend, pool: AsyncPool) -> None:
        self._backend = backend
        self._pool = pool

    async def get_many(self, keys: Sequence[str], /) -> Mapping[str, Item]:
        """Return what is there, by one query."""
        if not keys:
            return {}
        made = await self._prepared()
        return items_of(await self._run(made.get, (self._backend.ahead, texts(keys))))

    async def set_many(self, items: Mapping[str, Item], ttl: float | None, /) -> None:
        """Store every item by one statement."""
        if not items:
            return
        made = await self._prepared()
        values = columns(items, made.vector_oid, self._backend.keeps_preview)
        await self._run(made.set, (self._backend.ahead, ttl, *values))

    async def close(self) -> None:
        """Close every connection, those in use when their call ends."""
        self._pool.close()

    async def _prepared(self) -> Statements:
        # The first use looks at the table, and may make it: by the blocking client, whose code that is.
        known = self._backend.known
        return await asyncio.to_thread(self._backend.prepared) if known is None else known

    async def _run(self, statement: bytes, values: Sequence[Any]) -> list[tuple[Any, ...]]:
        async with asyncio.timeout(time_left()):
            connection = await self._pool.take()
            try:
                cursor = await connection.execute(statement, values, binary=True)
                rows = await cursor.fetchall() if has_rows(cursor) else []
            except BaseException as error:
                self._backend.forget(error)
                if is_sound(connection, error):
                    self._pool.give(connection)
                else:
                    self._pool.drop(connection)
                raise
            self._pool.give(connection)
            return rows


def _execute(connection: Connection, statement: bytes, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
    cursor = connection.execute(statement, values, binary=True)
    return cursor.fetchall() if has_rows(cursor) else []


def _end(prefix: str) -> str | None:
    """Return what sorts after every key that starts with ``prefix``; None: there is no such end."""
    return prefix[:-1] + chr(ord(prefix[-1]) + 1) if prefix else None


@hookimpl
def embedonce_backends() -> Mapping[str, type]:
    """Name this file's backend."""
    return {"postgres": PostgresBackend}
