"""The Postgres tier: one row per key, with the vector in a pgvector column if the table has one.

``docs/postgres.md`` describes the table, and how to query the vectors inside Postgres.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Annotated

import psycopg
from annotated_types import Ge

from embedonce import hookimpl
from embedonce.contracts import Capabilities, StoredSize, time_left
from embedonce.errors import ConfigError, TierError
from embedonce.event_loops import async_deadline
from embedonce.options import Doc
from embedonce_backends._pages import limit_page_time

from .connections import AsyncPool, Pool, is_reusable, parse_url
from .errors import CONFLICTS, Repetition, shorten_message
from .exchange import (
    BEGIN,
    Parameter,
    Row,
    execute,
    execute_async,
    execute_isolated,
    execute_isolated_async,
)
from .rows import Item, decode_rows, encode_columns, encode_double, encode_long, encode_texts
from .schema import (
    Column,
    Run,
    Statements,
    TableState,
    add_cost_columns,
    inspect_table,
    list_grants,
    make_statements,
    make_table,
)

api = 1

log = logging.getLogger("embedonce.postgres")

SCAN_PAGE_KEYS = 5000
"""Number of keys that a scan reads per query."""
SWEEP_EVERY = 1000
"""Number of written rows after which expired rows are deleted. The first write of a backend also deletes some
expired rows."""
ADD_COLUMNS_MS = 50
"""Maximum milliseconds that the first call waits for the lock that adding columns needs. While it waits, other calls of
all processes wait behind it."""
SWEEP_FAILED = "could not delete expired rows (%s); retrying after later writes"
MAX_NAME_BYTES = 63
"""Maximum length of a table's or schema's name in bytes; Postgres truncates longer names."""


class PostgresBackend:
    """Holds entries in a Postgres table, or frames if the tier is encrypted."""

    def __init__(
        self,
        *,
        url: Annotated[
            str, Doc("postgresql://user@host:5432/database, or any other connection string that libpq accepts.")
        ],
        table: Annotated[str, Doc("Name of the table.")] = "embedonce",
        schema: Annotated[str, Doc("Schema that contains the table.")] = "public",
        column: Annotated[
            Column,
            Doc(
                "Column that stores the vectors. vector: a pgvector column. bytea: a bytea column. "
                "auto: a pgvector column if pgvector is installed in the database, otherwise bytea."
            ),
        ] = "auto",
        create: Annotated[
            bool, Doc("Make the table when it is first used. If false, run `embedonce migrate` to make it.")
        ] = True,
        max_connections: Annotated[
            int, Ge(1), Doc("At most this many connections, per process and per event loop.")
        ] = 8,
        text_preview: Annotated[
            bool, Doc("Store an entry's text_preview, the readable beginning of its text, in a column of its own.")
        ] = False,
    ) -> None:
        for option, name in (("table", table), ("schema", schema)):
            if not name or "\0" in name or len(name.encode()) > MAX_NAME_BYTES:
                raise ConfigError(f"{option} must be a name of 1 to {MAX_NAME_BYTES} bytes without NUL")
        self._parameters = parse_url(url)
        self.schema = schema
        self.table = table
        self._column: Column = column
        self._create = create
        self._max_connections = max_connections
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
        self.clock_offset = 0.0
        """Seconds that are added to the server's clock, which measures each ttl. Tests increase this number to make
        entries expire."""
        self._pool = Pool(self._parameters, max_connections)
        self.known_statements: Statements | None = None
        """The statements for the table, or None until the table has been inspected."""
        self._rows_since_sweep = SWEEP_EVERY

    def __repr__(self) -> str:
        return f"<PostgresBackend of the table {self.schema}.{self.table}>"

    def get_many(self, keys: Sequence[str], /) -> Mapping[str, Item]:
        """Return the items that are stored under ``keys``, with one query."""
        if not keys:
            return {}
        return decode_rows(self._run(self.get_statements().get, (encode_texts(keys),)), self.clock_offset)

    def set_many(self, items: Mapping[str, Item], ttl: float | None, /) -> None:
        """Store all items or none, with one statement. A row that would not change is not written."""
        if not items:
            return
        statements = self.get_statements()
        values = self.encode_write(items, ttl, statements)
        self._run(statements.set, values)
        if self.is_sweep_due(len(items)):
            self._sweep(statements)

    def add_many(self, items: Mapping[str, Item], ttl: float | None, /) -> set[str]:
        """Store the items whose key is missing or expired, and return those keys.

        If several callers add the same key at the same time, only one call stores the item and returns the key.
        """
        if not items:
            return set()
        statements = self.get_statements()
        values = self.encode_write(items, ttl, statements)
        return {key for (key,) in self._run(statements.add, values)}

    def delete_many(self, keys: Sequence[str], /) -> None:
        """Remove the keys, with one statement."""
        if keys:
            self._run(self.get_statements().delete, (encode_texts(keys),))

    def scan(self, prefix: str, /) -> Iterator[str]:
        """Yield the keys that start with ``prefix``, in order.

        Expired keys that have not been deleted yet are included. Each query reads up to 5,000 keys.
        """
        last = ""
        while True:
            with limit_page_time():
                values = (*_encode_range(prefix), last.encode(), encode_long(SCAN_PAGE_KEYS))
                keys = self._run(self.get_statements().scan, values)
            for (last,) in keys:
                yield last
            if len(keys) < SCAN_PAGE_KEYS:
                return

    def count(self, prefix: str, /) -> int:
        """Return how many keys start with ``prefix``, including expired keys that have not been deleted yet."""
        ((count,),) = self._run(self.get_statements().count, _encode_range(prefix))
        return int(count)

    def measure(self, prefix: str, /) -> StoredSize:
        """Return the size and the dates of the entries whose keys start with ``prefix``.

        An encrypted entry has no date in the table.
        """
        statement = self.get_statements().measure
        ((size, oldest, newest, dimensions),) = self._run(statement, _encode_range(prefix))
        return StoredSize(bytes=int(size or 0), oldest=oldest, newest=newest, dimensions=dimensions)

    def twin(self) -> PostgresTwin:
        """Return a native async client for the running event loop, with its own connections."""
        return PostgresTwin(self, AsyncPool(self._parameters, self._max_connections))

    def close(self) -> None:
        """Close the idle connections now, and each connection in use when its call ends."""
        self._pool.close()

    # --- the table ----------------------------------------------------------------------------

    def migrate(self) -> str:
        """Make the table and everything else that is missing, and return a description of what was done.

        A lock ensures that only one process at a time does this. The other processes wait.

        Raises:
            psycopg.Error: an error of the server, for example because the role is not allowed to make tables.
        """
        with self._open_transaction() as run:
            done = make_table(run, self.schema, self.table, self._column)
        self.known_statements = None
        return done

    def describe(self) -> str:
        """Ask the server, and return a description of the column that stores the vectors."""
        found = self._inspect_table()
        if not found.table:
            return "no table yet"
        vectors = self._describe_vectors(found)
        if found.has_costs:
            return vectors
        return f"{vectors}; no columns for costs: run `embedonce migrate` to add them"

    def _describe_vectors(self, found: TableState) -> str:
        if found.has_vectors and found.may_use_vectors and self._column != "bytea":
            return f"pgvector {found.extension}: float32 vectors in a vector column, all others in bytea"
        if self._column == "bytea":
            return 'bytea (column = "bytea")'
        if found.extension is not None and not found.may_use_vectors:
            return f"bytea: this role may not use pgvector; an administrator must run {self._make_vector_grant(found)}"
        if found.extension is not None:
            return "bytea: the table was made without pgvector; run `embedonce migrate` to add the vector column"
        if found.available is not None:
            return "bytea: pgvector is not installed in this database (CREATE EXTENSION vector)"
        return "bytea: the server has no pgvector"

    def list_grants(self) -> list[str]:
        """Return the statements that let another role use the table, for ``embedonce migrate``."""
        return list_grants(self._inspect_table(), self.schema, self.table, self._column)

    def _make_vector_grant(self, found: TableState) -> str:
        return f'GRANT USAGE ON SCHEMA "{found.extension_schema}" TO ROLE, with the name of this role'

    def get_statements(self) -> Statements:
        """Return the statements for the table. The first call inspects the table, and makes it if it is missing."""
        if self.known_statements is not None:
            return self.known_statements
        found = self._inspect_table()
        if not found.table or (self._column == "vector" and not found.has_vectors):
            found = self._make_table()
        elif self._create and found.is_owner and not found.has_costs:
            found = self._try_to_add_cost_columns(found)
        if self._column == "vector" and not found.may_use_vectors:
            grant = self._make_vector_grant(found)
            raise TierError(f'column = "vector": this role may not use pgvector; an administrator must run {grant}')
        statements = self.known_statements = make_statements(found, self.schema, self.table, self._column)
        return statements

    def check_table_after(self, error: BaseException) -> None:
        """Make the next call inspect the table again if a change to the table may have caused the error."""
        if isinstance(error, psycopg.ProgrammingError):
            self.known_statements = None

    def _inspect_table(self) -> TableState:
        return inspect_table(self._run, self.schema, self.table)

    def _make_table(self) -> TableState:
        missing = f"the table {self.table!r} in the schema {self.schema!r} is missing, or has no vector column"
        if not self._create:
            raise TierError(f"{missing}: run `embedonce migrate`")
        try:
            self.migrate()
        except psycopg.errors.InsufficientPrivilege as error:
            raise TierError(
                f"{missing}, and this role lacks the privileges to add what is missing: run `embedonce migrate` "
                "with a role that has these privileges"
            ) from error
        return self._inspect_table()

    def _try_to_add_cost_columns(self, found: TableState) -> TableState:
        """Add the columns for costs to a table of an earlier version, and return the new state of the table.

        A failure is only logged, because the tier works without these columns.
        """
        try:
            with self._open_transaction(lock_ms=ADD_COLUMNS_MS) as run:
                add_cost_columns(run, self.schema, self.table)
        except (psycopg.Error, TierError) as error:
            log.warning(
                "could not add the columns for costs to the table %s.%s (%s); costs are not stored until you run "
                "`embedonce migrate` and restart this process",
                self.schema,
                self.table,
                type(error).__name__,
            )
            return found
        return self._inspect_table()

    # --- statements ---------------------------------------------------------------------------

    def encode_write(self, items: Mapping[str, Item], ttl: float | None, statements: Statements) -> list[Parameter]:
        """Return the parameters of a statement that stores items."""
        columns = encode_columns(items, statements.vector_oid, self.keeps_preview)
        return [encode_double(self.clock_offset), None if ttl is None else encode_double(ttl), *columns]

    def _run(self, statement: bytes, values: Sequence[Parameter] = ()) -> list[Row]:
        """Run one statement in its own transaction, and return its rows. Repeat it after a conflict."""
        repetition = Repetition()
        while True:
            try:
                return self._run_once(statement, values)
            except CONFLICTS as error:
                time.sleep(repetition.choose_pause(error))

    def _run_once(self, statement: bytes, values: Sequence[Parameter]) -> list[Row]:
        connection = self._pool.take()
        try:
            rows = (execute_isolated if self.is_isolated else execute)(connection, statement, values)
        except BaseException as error:
            self.check_table_after(error)
            if is_reusable(connection, error):
                self._pool.give(connection)
            else:
                self._pool.drop(connection)
            shorten_message(error)
            raise
        self._pool.give(connection)
        return rows

    @property
    def is_isolated(self) -> bool:
        """Whether each statement needs a transaction that sets its isolation level."""
        return self.known_statements is not None and self.known_statements.is_isolated

    @contextmanager
    def _open_transaction(self, lock_ms: int = 0) -> Iterator[Run]:
        """Yield a function that runs statements inside one transaction; an exception rolls the transaction back.

        A statement fails if it waits for a lock for more than ``lock_ms`` milliseconds; 0 means no limit.
        """
        connection = self._pool.take()
        try:
            execute(connection, BEGIN)
            # Making the table may wait for another process that makes it, so the server's own limits do not apply.
            execute(connection, b"SET LOCAL lock_timeout = %d" % lock_ms)
            execute(connection, b"SET LOCAL statement_timeout = 0")
            yield partial(execute, connection)
            execute(connection, b"COMMIT")
        except BaseException:
            self._pool.drop(connection)
            raise
        self._pool.give(connection)

    def is_sweep_due(self, rows: int) -> bool:
        """Count written rows, and return whether it is time to delete expired rows."""
        self._rows_since_sweep += rows
        if self._rows_since_sweep < SWEEP_EVERY:
            return False
        self._rows_since_sweep = 0
        return True

    def _sweep(self, statements: Statements) -> None:
        """Delete some expired rows. A failure is only logged, because the call's own write has already succeeded."""
        try:
            self._run(statements.sweep, (encode_double(self.clock_offset),))
        except (psycopg.Error, TierError) as error:
            log.warning(SWEEP_FAILED, type(error).__name__)


class PostgresTwin:
    """The native async client of a :class:`PostgresBackend`, for one event loop."""

    def __init__(self, backend: PostgresBackend, pool: AsyncPool) -> None:
        self._backend = backend
        self._pool = pool

    async def get_many(self, keys: Sequence[str], /) -> Mapping[str, Item]:
        """Return the items that are stored under ``keys``, with one query."""
        if not keys:
            return {}
        statements = await self._get_statements()
        return decode_rows(await self._run(statements.get, (encode_texts(keys),)), self._backend.clock_offset)

    async def set_many(self, items: Mapping[str, Item], ttl: float | None, /) -> None:
        """Store all items or none, with one statement."""
        if not items:
            return
        statements = await self._get_statements()
        values = self._backend.encode_write(items, ttl, statements)
        await self._run(statements.set, values)
        if self._backend.is_sweep_due(len(items)):
            try:
                await self._run(statements.sweep, (encode_double(self._backend.clock_offset),))
            except (psycopg.Error, TierError) as error:
                log.warning(SWEEP_FAILED, type(error).__name__)

    async def close(self) -> None:
        """Close the idle connections now, and each connection in use when its call ends."""
        self._pool.close()

    async def _get_statements(self) -> Statements:
        # The first use inspects the table, and makes the table if it is missing. Only the blocking client has code
        # for this, so a thread runs that code.
        known = self._backend.known_statements
        return await asyncio.to_thread(self._backend.get_statements) if known is None else known

    async def _run(self, statement: bytes, values: Sequence[Parameter]) -> list[Row]:
        repetition = Repetition()
        while True:
            try:
                return await self._run_once(statement, values)
            except CONFLICTS as error:
                await asyncio.sleep(repetition.choose_pause(error))

    async def _run_once(self, statement: bytes, values: Sequence[Parameter]) -> list[Row]:
        async with async_deadline(time_left()):
            connection = await self._pool.take()
            try:
                if self._backend.is_isolated:
                    rows = await execute_isolated_async(connection, statement, values)
                else:
                    rows = await execute_async(connection, statement, values)
            except BaseException as error:
                self._backend.check_table_after(error)
                if is_reusable(connection, error):
                    self._pool.give(connection)
                else:
                    self._pool.drop(connection)
                shorten_message(error)
                raise
            self._pool.give(connection)
            return rows


def _encode_range(prefix: str) -> tuple[bytes, Parameter]:
    """Return the prefix, and a text that sorts after every key that starts with it, or None if the prefix is empty."""
    return prefix.encode(), (prefix[:-1] + chr(ord(prefix[-1]) + 1)).encode() if prefix else None


@hookimpl
def embedonce_backends() -> Mapping[str, type]:
    """Register the Postgres backend."""
    return {"postgres": PostgresBackend}
