"""Calls to the database: each one borrows a connection, and each transaction is committed or rolled back as a whole."""

from __future__ import annotations

import math
import os
import sqlite3
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

from embedonce.errors import EmbedonceError

from .errors import explain_error, get_primary_code
from .file import DatabaseFile
from .sqlite import Connection, Connections, fetch_rows, hold_lock, retry_while_locked

T = TypeVar("T")

ROW_BYTES = 90
"""Bytes of a row of the table ``Cache`` beside its value: the key, the times and the headers. At most this many if the
key has 40 bytes."""
INDEX_BYTES = 70
"""Bytes of an entry in the two indexes, whose pages are two thirds full on average."""

_PAGES = "SELECT page_count, freelist_count, page_size FROM pragma_page_count, pragma_freelist_count, pragma_page_size"


class Database:
    """One database file, for all threads of this process."""

    def __init__(self, file: DatabaseFile) -> None:
        self._file = file
        self.path = file.path
        self.log = file.log
        self.connections = Connections(file.connect)

    def exists(self) -> bool:
        """Return whether the file has been made."""
        return os.path.exists(self.path)

    def read(self, sql: str, values: tuple[object, ...]) -> list[tuple[Any, ...]]:
        """Run one statement and return its rows."""
        return self.call(fetch_rows, sql, values)

    def call(self, call: Callable[..., T], *values: object) -> T:
        """Return ``call(connection, *values)``."""
        connection: Connection | None = None
        try:
            connection = self._take_connection()
            result = call(connection, *values)
        except BaseException as error:
            if connection is not None:
                self.connections.give(connection, is_reusable=False)
            if isinstance(error, sqlite3.Error | UnicodeDecodeError):
                raise self._handle_error(error) from error
            raise
        self.connections.give(connection, is_reusable=True)
        return result

    def _take_connection(self) -> Connection:
        connection = self.connections.take()
        while connection.stamp is not None and self._file.is_outdated(connection):
            self.connections.give(connection, is_reusable=False)
            connection = self.connections.take()
        return connection

    def call_alone(self, call: Callable[[Connection], T]) -> T:
        """Return ``call(connection)`` while no other thread of this process writes."""
        with hold_lock(self.connections.write_lock):
            return self.call(call)

    def tidy(self, call: Callable[[Connection], object]) -> None:
        """Make a call that frees space after a write has succeeded. The next write repeats it, so it may fail."""
        with suppress(OSError, sqlite3.Error, EmbedonceError):
            self.call_alone(call)

    @contextmanager
    def open_transaction(self, max_log_bytes: int | None = None) -> Iterator[Connection]:
        """Commit the block's statements as a whole, or none of them if it raises.

        Raises:
            LogTooLarge: the log is larger than ``max_log_bytes`` or its own limit, and cannot be emptied.
        """
        with hold_lock(self.connections.write_lock):
            connection: Connection | None = None
            try:
                connection = self._take_connection()
                self.log.make_room(connection, max_log_bytes or self.log.limit)
                fetch_rows(connection, "BEGIN IMMEDIATE")
                yield connection
                fetch_rows(connection, "COMMIT")
            except (sqlite3.Error, UnicodeDecodeError) as error:
                raise self._handle_error(error) from error
            finally:
                if connection is not None:
                    # If an exception was raised, the transaction is still open; closing the connection rolls it back.
                    self.connections.give(connection, is_reusable=not connection.in_transaction)

    def _handle_error(self, error: sqlite3.Error | UnicodeDecodeError) -> Exception:
        """Return the exception to raise. Unless the error is a timeout, make the next call open the file again."""
        if get_primary_code(error) not in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_INTERRUPT):
            # The file may have been removed or replaced.
            self._file.is_made = False
            self.connections.renew()
        return explain_error(error, self.path)

    def get_bytes(self) -> int:
        """Return the size of the file and its log in bytes."""
        # The first call makes the file.
        return self.call(lambda _: os.stat(self.path).st_size + self.log.get_bytes())


def count_used_bytes(connection: Connection) -> int:
    """Return the size in bytes of the pages of the file that are in use."""
    ((pages, free, size),) = fetch_rows(connection, _PAGES)
    return int((pages - free) * size)


def estimate_row_bytes(value_bytes: int, page_bytes: int) -> float:
    """Return the bytes of the file that an entry takes, with its part of the index, if the table has no unused space.

    SQLite splits a row only if the row is larger than a page. So the end of a page is unused if no other row fits.
    """
    row = value_bytes + ROW_BYTES
    overflow_pages = 0
    if row > page_bytes - 33:  # SQLite then stores most of the row in pages of its own
        smallest = (page_bytes - 12) * 32 // 255 - 23
        rest = smallest + (row - smallest) % (page_bytes - 4)
        first = rest if rest <= page_bytes - 35 else smallest
        overflow_pages = -((first - row) // (page_bytes - 4))
        row = first
    return page_bytes * (overflow_pages + 1 / max(1, (page_bytes - 8) // row)) + INDEX_BYTES


def estimate_bytes(connection: Connection, sizes: Iterable[tuple[int | None, int]]) -> int:
    """Return the bytes that entries take in a file without unused space.

    ``sizes`` has pairs of the size of a value in bytes, and the number of entries with such a value.
    """
    ((page_bytes,),) = fetch_rows(connection, "PRAGMA page_size")
    return math.ceil(sum(number * estimate_row_bytes(size or 0, page_bytes) for size, number in sizes))


def release_pages(connection: Connection, max_bytes: int | None = None) -> int:
    """Give free pages back to the file system, and return how many.

    With ``max_bytes``, this gives back free pages until the file is no longer larger than ``max_bytes``. If
    ``max_bytes`` is None, this gives back the free pages that exceed a quarter of the file. One call gives back at most
    1,000 pages, because SQLite may have to move a used page for each page that it gives back. It gives back none if
    another program has made the file without ``auto_vacuum``.
    """
    ((pages, free, size),) = fetch_rows(connection, _PAGES)
    excess = int(free - pages // 4 if max_bytes is None else min(free, pages - max_bytes // size))
    if excess <= 0:
        return 0
    # This uses executescript, because `execute` would stop the statement after the first page.
    retry_while_locked(lambda: connection.executescript(f"PRAGMA incremental_vacuum({min(excess, 1000)})"))
    ((left, _, _),) = fetch_rows(connection, _PAGES)
    return max(0, int(pages - left))
