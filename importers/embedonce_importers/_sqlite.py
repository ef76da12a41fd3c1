"""Reads SQLite databases of other programs, which may write them at the same time."""

from __future__ import annotations

import math
import os
import sqlite3
import time
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from embedonce.contracts import time_left
from embedonce.errors import SourceError, TierTimeout

from ._files import check_file
from ._missing_names import describe_missing
from ._values import MAX_VALUE_BYTES

MAX_PARAMETERS = 500
"""Maximum number of keys in a query. Some builds of SQLite allow only 999 parameters."""
LOCK_TIMEOUT = 5.0
"""Maximum number of seconds that a query waits for a lock of the other program. Ctrl-C has no effect during this time,
because SQLite waits in its own code."""

_PRAGMAS = (
    "query_only = ON",
    "trusted_schema = OFF",  # the schema may be hostile: it must not call functions with side effects
    "cell_size_check = ON",
    "mmap_size = 0",  # a file that another process shortens would end this process with SIGBUS
    "temp_store = MEMORY",
)
_PROGRESS_STEPS = 10_000
"""Instructions of SQLite between two checks of the deadline: less than a millisecond."""

_LIMITS = (
    (sqlite3.SQLITE_LIMIT_LENGTH, 4 * MAX_VALUE_BYTES),  # of a row, which may have other columns too
    (sqlite3.SQLITE_LIMIT_SQL_LENGTH, 100_000),
    (sqlite3.SQLITE_LIMIT_ATTACHED, 0),
    (sqlite3.SQLITE_LIMIT_VDBE_OP, 100_000),
    (sqlite3.SQLITE_LIMIT_EXPR_DEPTH, 100),
)


class Connection(sqlite3.Connection):
    """A connection that only reads. Each of its queries has a deadline, see :func:`set_deadline`."""

    is_immutable = False
    """Whether SQLite reads the file without locks, so that it does not notice when another program writes it."""
    progress: _Progress | None = None

    def get_interruption(self) -> BaseException | None:
        """Return the exception of a signal that has ended the last query, such as :class:`KeyboardInterrupt`."""
        return None if self.progress is None else self.progress.interruption


class _Progress:
    """Ends a query at a time, or when a signal arrives.

    SQLite calls :attr:`callback` while it runs a query, and drops an exception of the callback. Python runs the handler
    of a signal, which raises KeyboardInterrupt, at the first instruction of a function. No ``try`` in the function is
    entered yet there, so a function could not catch it. A generator goes on at its ``yield``, inside a ``try``.
    """

    def __init__(self, end: float) -> None:
        self.interruption: BaseException | None = None
        watch = self._watch(end)
        next(watch)
        self.callback: Callable[[], bool] = watch.__next__

    def _watch(self, end: float) -> Generator[bool, None, None]:
        while True:
            try:
                yield self.interruption is not None or time.monotonic() > end
            except GeneratorExit:
                raise
            except BaseException as error:  # noqa: BLE001  (the handler of a signal may raise anything)
                self.interruption = error


class ReadOnlyDatabase:
    """A database file that several threads may read. It keeps the connections that no thread is using."""

    def __init__(self, path: Path) -> None:
        self.path = path
        # Appending and removing are atomic. A lock could be held by another thread at the time of a fork.
        self._idle: list[Connection] = []
        self._pid = os.getpid()

    @contextmanager
    def connect(self) -> Iterator[Connection]:
        """Lend a connection for the duration of a ``with`` block. Text in its rows is bytes.

        A query ends with an error when :func:`~embedonce.contracts.time_left` is over.

        Raises:
            SourceError: the file is missing, is not a database, is damaged, or is locked by another program.
            TierTimeout: a query took too long.
        """
        with self._translate():
            connection = self._take() or self._open()
            try:
                set_deadline(connection)
                yield connection
            except BaseException as error:
                connection.close()
                _raise_interruption(connection, error)
                raise
            if connection.is_immutable:  # the next call finds out again whether another program uses the database
                connection.close()
                return
            self._idle.append(connection)

    def close(self) -> None:
        """Close the connections that are not in use."""
        while (connection := self._take()) is not None:
            connection.close()

    def _take(self) -> Connection | None:
        if self._pid != os.getpid():
            # SQLite forbids the use of a connection after a fork, even to close it.
            _CONNECTIONS_OF_PARENTS.extend(self._idle)
            self._idle, self._pid = [], os.getpid()
        try:
            return self._idle.pop()
        except IndexError:
            return None

    def _open(self) -> Connection:
        check_file(self.path)
        try:
            return self._open_with("mode=ro")
        except sqlite3.OperationalError as error:
            # A database with a log (WAL) in a folder that cannot be written: SQLite cannot make its shared memory. If
            # there is no log, then no other program is using the database, and SQLite can read it without locks.
            if error.sqlite_errorcode & 0xFF not in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN):
                raise
            log = self.path.with_name(f"{self.path.name}-wal")
            if os.access(self.path.parent, os.W_OK) or (log.exists() and log.stat().st_size):
                raise
            connection = self._open_with("mode=ro&immutable=1")
            connection.is_immutable = True
            return connection

    def _open_with(self, mode: str) -> Connection:
        # as_uri() escapes "?", "#" and "%", so that a path cannot add parameters.
        connection = sqlite3.connect(
            f"{self.path.absolute().as_uri()}?{mode}",
            uri=True,
            timeout=0,
            isolation_level=None,
            check_same_thread=False,
            factory=Connection,
        )
        try:
            connection.text_factory = bytes
            for limit, value in _LIMITS:
                connection.setlimit(limit, value)
            set_deadline(connection)
            for pragma in _PRAGMAS:
                connection.execute(f"PRAGMA {pragma}").close()
            connection.execute("SELECT count(*) FROM sqlite_master").fetchall()  # reads the file for the first time
        except BaseException as error:
            connection.close()
            _raise_interruption(connection, error)
            raise
        return connection

    @contextmanager
    def _translate(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.DatabaseError as error:
            code = getattr(error, "sqlite_errorcode", 0) & 0xFF
            if code == sqlite3.SQLITE_INTERRUPT:
                raise TierTimeout(f"{self.path}: a query did not end in time; is there an index for it?") from error
            if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
                raise SourceError(
                    f"{self.path} is locked by another program that is writing to it; try again when it has finished"
                ) from error
            if code == sqlite3.SQLITE_NOTADB:
                raise SourceError(f"{self.path} is not an SQLite database, or it is encrypted") from error
            if code == sqlite3.SQLITE_CORRUPT:
                raise SourceError(
                    f'{self.path} is damaged; check it with "PRAGMA integrity_check" of the sqlite3 command'
                ) from error
            if code == sqlite3.SQLITE_CANTOPEN:
                raise SourceError(
                    f"SQLite cannot open {self.path}; check the permissions of the file, of the files beside it that "
                    "end in -wal and -shm, and of the folder"
                ) from error
            raise


def _raise_interruption(connection: Connection, error: BaseException) -> None:
    """Raise the exception of the signal that has ended a query with ``error``, if there is one."""
    interruption = connection.get_interruption()
    if interruption is not None and isinstance(error, sqlite3.OperationalError):
        raise interruption from None


_CONNECTIONS_OF_PARENTS: list[Connection] = []
"""Connections that a parent process opened. They are kept here, because deleting them would close them."""


def check_columns(connection: Connection, path: Path, table: str, columns: Collection[str]) -> str | None:
    """Check that a table or view exists and has these columns. Return the expression of its row numbers.

    The result is None if there are no row numbers: in a view, and in a table that was made WITHOUT ROWID.

    Raises:
        SourceError: the table or a column is missing; the message lists those that exist.
    """
    rows = connection.execute(
        "SELECT name, type FROM sqlite_master "
        "WHERE type IN ('table', 'view') AND name NOT LIKE 'sqlite\\_%' ESCAPE '\\'"
    ).fetchall()
    kinds = {name.decode(errors="replace"): kind for name, kind in rows}
    exact = next((name for name in kinds if name.lower() == table.lower()), None)
    if exact is None:
        raise SourceError(describe_missing(f"{path} has no table", table, list(kinds), "tables"))
    rows = connection.execute(f"PRAGMA table_xinfo({quote_identifier(table)})").fetchall()
    known = [row[1].decode(errors="replace") for row in rows]
    lower = {name.lower() for name in known}
    for column in columns:
        if column.lower() not in lower:
            raise SourceError(describe_missing(f'table "{exact}" of {path} has no column', column, known, "columns"))
    number = next((name for name in ("rowid", "oid", "_rowid_") if name not in lower), None)
    if number is None or kinds[exact] == b"view":
        return None
    try:
        connection.execute(f"SELECT source.{number} FROM {quote_identifier(table)} AS source LIMIT 0").close()
    except sqlite3.OperationalError as error:
        if error.sqlite_errorcode & 0xFF == sqlite3.SQLITE_ERROR:  # there is no such column
            return None
        raise
    return f"source.{number}"


def fetch_by_keys(
    connection: Connection, select: str, keys: Collection[str], *, before: Sequence[str | float] = ()
) -> tuple[list[tuple[Any, ...]], int]:
    """Run a query for many keys. Return its rows, and the number of keys whose row is too large.

    ``select`` ends before the list of keys, such as ``SELECT ... WHERE key IN``. ``before`` are its own parameters.
    """
    rows: list[tuple[Any, ...]] = []
    too_large = 0
    todo = list(keys)
    parts = [todo[start : start + MAX_PARAMETERS] for start in range(0, len(todo), MAX_PARAMETERS)]
    while parts:
        part = parts.pop()
        try:
            # The deadline is set again for each query, because it also limits how long SQLite waits for a lock.
            set_deadline(connection)
            query = f"{select} ({', '.join('?' * len(part))})"
            rows += connection.execute(query, (*before, *part)).fetchall()
        except sqlite3.DataError:  # a row is larger than the limit, but SQLite does not say which
            if len(part) == 1:
                too_large += 1
            else:
                parts += [part[: len(part) // 2], part[len(part) // 2 :]]
    return rows, too_large


def get_bytes(value: object) -> bytes:
    """Return a value of a row, if it is text or a BLOB.

    Raises:
        ValueError: it is a number.
    """
    if isinstance(value, bytes):  # text too, because of the connection's `text_factory`
        return value
    raise ValueError("a number in place of a vector")


def quote_identifier(name: str) -> str:
    """Return the name of a table or column, quoted for SQLite."""
    return '"' + name.replace('"', '""') + '"'


def set_deadline(connection: Connection) -> None:
    """Let the next query end when the current call has no time left.

    Raises:
        TierTimeout: it has none.
    """
    seconds = time_left()
    wait = LOCK_TIMEOUT if seconds is None else min(LOCK_TIMEOUT, seconds)
    connection.execute(f"PRAGMA busy_timeout = {max(1, int(wait * 1000))}").close()
    progress = _Progress(math.inf if seconds is None else time.monotonic() + seconds)
    connection.set_progress_handler(progress.callback, _PROGRESS_STEPS)
    connection.progress = progress
