"""The disk tier: frames in one SQLite file, which has diskcache's layout and is shared by the processes of a host.

Neither values nor keys are ever pickled or unpickled. ``docs/disk.md`` describes eviction, and what happens when a
process is killed or the disk is full.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import sqlite3
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any, TypeVar

from annotated_types import Ge

from embedonce import hookimpl
from embedonce.contracts import Capabilities, StoredSize
from embedonce.errors import ConfigError, EmbedonceError
from embedonce.options import Doc, Size

from .errors import DiskFull, explain_error, get_primary_code, is_writable
from .file import DatabaseFile
from .folder import check_folder
from .layout import MODE_RAW
from .log import LOG_BYTES
from .sqlite import Connection, Connections, fetch_rows, get_remaining_seconds, hold_lock, retry_while_locked

api = 1

T = TypeVar("T")

log = logging.getLogger("embedonce.disk")

MIB = 2**20
GIB = 2**30
MIN_FILE_BYTES = 2**20
"""Smallest ``max_bytes`` that is accepted."""
CHUNK_KEYS = 512
"""Maximum number of keys per statement; the deadline is checked between statements."""
SMALL_BYTES = 64
"""Values of fewer bytes are leases. They contain no vector, so removing them does not empty the log each time."""
CLOCK_SECONDS = 1.0
"""If an entry with a TTL seems to have been stored further in the future, the clock has been set back since then. The
entry has expired, because its true age is unknown."""

# The first parameter is the time now, and the second one is the latest time at which an entry may have been stored.
_IS_ALIVE = "(expire_time IS NULL OR (expire_time > ? AND store_time <= ?))"
_GET_MANY = (
    "SELECT wanted.key, Cache.value FROM json_each(?) AS wanted"
    f" CROSS JOIN Cache ON Cache.key = wanted.value AND Cache.raw = 1 WHERE {_IS_ALIVE}"
)
_GET = f"SELECT value FROM Cache WHERE key = ? AND raw = 1 AND {_IS_ALIVE}"
_COUNT_LARGE = (
    "SELECT COUNT(*), COUNT(CASE WHEN LENGTH(Cache.value) < ? THEN 1 END) FROM json_each(?) AS wanted"
    " CROSS JOIN Cache ON Cache.key = wanted.value AND Cache.raw = 1"
)
_DELETE = (
    "DELETE FROM Cache WHERE rowid IN (SELECT Cache.rowid FROM json_each(?) AS wanted"
    " CROSS JOIN Cache ON Cache.key = wanted.value AND Cache.raw = 1)"
)
_STORE = (
    "INSERT INTO Cache (key, raw, store_time, expire_time, access_time, mode, value)"
    f" VALUES (?, 1, ?, ?, ?, {MODE_RAW}, ?)"
    " ON CONFLICT (key, raw) DO UPDATE SET store_time = excluded.store_time, expire_time = excluded.expire_time,"
    " access_time = excluded.access_time, mode = excluded.mode, value = excluded.value,"
    " size = 0, tag = NULL, filename = NULL"
)
_EXPIRE = (
    "DELETE FROM Cache WHERE rowid IN (SELECT rowid FROM Cache WHERE expire_time <= ? ORDER BY expire_time LIMIT ?)"
)
_EVICT = "DELETE FROM Cache WHERE rowid IN (SELECT rowid FROM Cache ORDER BY rowid LIMIT ?)"
# The keys are read as bytes, because another program may have stored a key that is invalid UTF-8. The unary plus
# removes the TEXT affinity of CAST. With that affinity, SQLite could convert stored keys before it compares them.
_SCAN = "SELECT CAST(key AS BLOB) FROM Cache WHERE key >= +CAST(? AS TEXT) AND key < ? AND raw = 1 ORDER BY key LIMIT ?"
_COUNT = "SELECT COUNT(*) FROM Cache WHERE key >= ? AND key < ? AND raw = 1"
_MEASURE = (
    "SELECT SUM(LENGTH(value)), MIN(store_time), MAX(store_time) FROM Cache WHERE key >= ? AND key < ? AND raw = 1"
)
_PAGES = "SELECT page_count, freelist_count, page_size FROM pragma_page_count, pragma_freelist_count, pragma_page_size"


class DiskBackend:
    """Holds frames in a folder that the threads and processes of one host share. The frames outlive the processes."""

    def __init__(
        self,
        *,
        path: Annotated[
            Path,
            Doc(
                "Folder for this cache alone. It is made when first used, and only this user can access it. "
                "~ means the home folder."
            ),
        ],
        max_bytes: Annotated[
            Size,
            Ge(MIN_FILE_BYTES),
            Doc(
                "Maximum size of the file; the oldest entries are evicted first. SQLite's log takes up to 32 MiB more."
            ),
        ] = 4 * GIB,
    ) -> None:
        if max_bytes < MIN_FILE_BYTES:
            raise ConfigError(f"max_bytes must be at least 1 MiB, got {max_bytes} bytes")
        try:
            folder = Path(path).expanduser().absolute()
        except RuntimeError as error:
            raise ConfigError(f"cannot expand ~ in path: {error}") from error
        check_folder(folder)
        self.path = folder
        self.max_bytes = max_bytes
        self._max_value_bytes = min(max_bytes // 16, 2**28)
        self.capabilities = Capabilities(
            scope="host",
            deadline=True,
            ttl=True,
            max_value_bytes=self._max_value_bytes,
            get=True,
            delete=True,
            scan=True,
            count=True,
            add=True,
            bounded=True,
        )
        self.clock: Callable[[], float] = time.time
        """Function that returns the Unix time in seconds. The backend uses this clock to tell when an entry expires."""
        self._file = DatabaseFile(folder, max_bytes)
        self._connections = Connections(self._file.connect)
        self._has_warned = False
        weakref.finalize(self, self._connections.close)

    def get_many(self, keys: Sequence[str], /) -> dict[str, bytes]:
        """Return the frames that are stored under ``keys``, with one query per 512 keys.

        A value that is not bytes was not written by this backend. It is returned as ``b""``, which is not a valid
        frame, so that the tier counts it as corrupt.
        """
        if len(keys) == 1:  # for a single key, get() takes a third of the time of the query below
            value = self.get(keys[0])
            return {} if value is None else {keys[0]: value}
        found: dict[str, bytes] = {}
        times = self._get_times()
        for start in range(0, len(keys), CHUNK_KEYS):
            chunk = list(keys[start : start + CHUNK_KEYS])
            for index, value in self._read(_GET_MANY, (json.dumps(chunk), *times)):
                found[chunk[index]] = value if type(value) is bytes else b""
        return found

    def get(self, key: str, /) -> bytes | None:
        """Return the frame of one key, or None."""
        found = self._read(_GET, (key, *self._get_times()))
        if not found:
            return None
        value = found[0][0]
        return value if type(value) is bytes else b""

    def set_many(self, items: Mapping[str, bytes], ttl: float | None, /) -> None:
        """Store every item, in transactions of up to 512 items; each transaction succeeds as a whole or not at all.

        After this has returned, no item is lost even if the process is killed.

        Raises:
            DiskFull: the disk has no space left.
            ReadOnlyFile: the file or its folder is read-only.
            LogTooLarge: SQLite's log has reached its limit, because a reader keeps it from being emptied.
        """
        for chunk in self._split_items(items):
            with self._open_transaction() as connection:
                evicted = self._make_room(connection, chunk)
                self._store(connection, chunk, ttl)
            self._tidy(evicted)

    def add_many(self, items: Mapping[str, bytes], ttl: float | None, /) -> set[str]:
        """Store the items whose key is missing or expired, and return those keys.

        If several callers add the same key at the same time, only one call stores the item and returns the key.
        """
        added: set[str] = set()
        for chunk in self._split_items(items):
            with self._open_transaction() as connection:
                keys = list(chunk)
                found = fetch_rows(connection, _GET_MANY, (json.dumps(keys), *self._get_times()))
                held = {keys[index] for index, _ in found}
                new = {key: value for key, value in chunk.items() if key not in held}
                evicted = self._make_room(connection, new)
                self._store(connection, new, ttl)
            self._tidy(evicted)
            added.update(new)
        return added

    def delete_many(self, keys: Sequence[str], /) -> None:
        """Remove the keys, and overwrite their data in every file of the folder.

        The data is also in SQLite's log, so this empties the log. A reader that uses the log may prevent that.

        Raises:
            DataNotOverwritten: the keys are removed, but a reader still uses the log. The next write after the reader
                has ended overwrites the data. Another call with the same keys also does, or raises this error again.
            LogTooLarge: the log is twice as large as its limit, so not even keys can be removed.
        """
        is_overwrite_needed = False
        for start in range(0, len(keys), CHUNK_KEYS):
            chunk = json.dumps(list(keys[start : start + CHUNK_KEYS]))
            size = min(CHUNK_KEYS, len(keys) - start)
            with self._open_transaction(2 * self._file.log.limit) as connection:
                # If a key is missing, an earlier call may have removed it without overwriting its data.
                are_small = fetch_rows(connection, _COUNT_LARGE, (SMALL_BYTES, chunk)) == [(size, size)]
                is_overwrite_needed = is_overwrite_needed or not are_small
                fetch_rows(connection, _DELETE, (chunk,))
            self._call_for_upkeep(lambda connection: _release_pages(connection, None))
        if is_overwrite_needed:
            with hold_lock(self._connections.write_lock):
                self._call_with_connection(self._file.log.overwrite_removed_data)

    def compact(self) -> str:
        """Rewrite the file without unused space, empty the log, and return the size of both.

        Other threads and processes can read meanwhile, and their writes wait. SQLite needs free space of twice the size
        of the file: for a temporary file, and for the log. An interrupted call changes nothing.

        Raises:
            DiskFull: there is not enough free space.
            ReadOnlyFile: the file or its folder is read-only.
            TierTimeout: another process writes all the time.
        """
        with hold_lock(self._connections.write_lock):
            self._call_with_connection(self._file.log.limit_size)
            before = self._count_stored_bytes()
            self._call_with_connection(_rewrite_file)
            self._call_with_connection(self._file.log.limit_size)
        after = self._count_stored_bytes()
        return f"{after / MIB:.1f} MiB, was {before / MIB:.1f} MiB"

    def _count_stored_bytes(self) -> int:
        """Return the size of the file and its log in bytes."""
        return os.stat(self._file.path).st_size + self._file.log.get_bytes()

    def describe(self) -> str:
        """Describe the sizes of the file and its log, and whether the file is read-only."""
        is_read_only = self._call_with_connection(lambda connection: connection.stamp is not None)
        is_read_only = is_read_only or not is_writable(self._file.path)
        size = os.stat(self._file.path).st_size / MIB
        return f"file {size:.1f} MiB, {self._file.log.describe()}{', read-only' if is_read_only else ''}"

    def scan(self, prefix: str, /) -> Iterator[str]:
        """Yield the keys that start with ``prefix``, in order, including expired keys that have not been deleted yet.

        Each page of 512 keys has its own query, so a key that is stored or removed during the scan may or may not be
        listed.
        """
        start, end = prefix.encode(), _find_prefix_end(prefix)
        while True:
            page = self._read(_SCAN, (start, end, CHUNK_KEYS))
            for (key,) in page:
                yield key.decode("utf-8", "replace")
            if len(page) < CHUNK_KEYS:
                return
            start = page[-1][0] + b"\0"

    def count(self, prefix: str, /) -> int:
        """Return how many keys ``scan(prefix)`` yields."""
        ((count,),) = self._read(_COUNT, (prefix, _find_prefix_end(prefix)))
        return int(count)

    def measure(self, prefix: str, /) -> StoredSize:
        """Return the size and the dates of the entries whose keys start with ``prefix``."""
        ((size, oldest, newest),) = self._read(_MEASURE, (prefix, _find_prefix_end(prefix)))
        return StoredSize(bytes=int(size or 0), oldest=oldest, newest=newest)

    def close(self) -> None:
        """Close the idle connections now, and each connection in use when its call ends."""
        self._connections.close()

    # --- one call ---

    def _get_times(self) -> tuple[float, float]:
        """Return the time now and the latest time at which an entry with a TTL may have been stored."""
        now = self.clock()
        return now, now + CLOCK_SECONDS

    def _read(self, sql: str, values: tuple[object, ...]) -> list[tuple[Any, ...]]:
        return self._call_with_connection(lambda connection: fetch_rows(connection, sql, values))

    def _call_with_connection(self, call: Callable[[Connection], T]) -> T:
        connection: Connection | None = None
        is_reusable = False
        try:
            connection = self._take_connection()
            result = call(connection)
            is_reusable = True
            return result
        except (sqlite3.Error, UnicodeDecodeError) as error:
            raise self._handle_error(error) from error
        finally:
            if connection is not None:
                self._connections.give(connection, is_reusable)

    def _take_connection(self) -> Connection:
        connection = self._connections.take()
        while self._file.is_outdated(connection):
            self._connections.give(connection, is_reusable=False)
            connection = self._connections.take()
        return connection

    def _call_for_upkeep(self, call: Callable[[Connection], object]) -> None:
        """Make a call that frees space after a write has succeeded. The next write repeats it, so it may fail."""
        with suppress(OSError, sqlite3.Error, EmbedonceError), hold_lock(self._connections.write_lock):
            self._call_with_connection(call)

    @contextmanager
    def _open_transaction(self, max_log_bytes: int | None = None) -> Iterator[Connection]:
        with hold_lock(self._connections.write_lock):
            connection: Connection | None = None
            try:
                connection = self._take_connection()
                self._file.log.make_room(connection, max_log_bytes or self._file.log.limit)
                fetch_rows(connection, "BEGIN IMMEDIATE")
                yield connection
                fetch_rows(connection, "COMMIT")
            except (sqlite3.Error, UnicodeDecodeError) as error:
                raise self._handle_error(error) from error
            finally:
                if connection is not None:
                    # If an exception was raised, the transaction is still open; closing the connection rolls it back.
                    self._connections.give(connection, is_reusable=not connection.in_transaction)

    def _handle_error(self, error: sqlite3.Error | UnicodeDecodeError) -> Exception:
        """Return the exception to raise. Unless the error is a timeout, make the next call open the file again."""
        if get_primary_code(error) not in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_INTERRUPT):
            # The file may have been removed or replaced.
            self._file.is_made = False
            self._connections.renew()
        return explain_error(error, self._file.path)

    def _split_items(self, items: Mapping[str, bytes]) -> Iterator[dict[str, bytes]]:
        """Split the items into groups, each with a limited number of items and bytes, to keep transactions short."""
        chunk: dict[str, bytes] = {}
        size = 0
        max_chunk_bytes = min(self._max_value_bytes, LOG_BYTES // 2)
        for key, value in items.items():
            if len(value) > self._max_value_bytes:
                raise ValueError(f"value has {len(value)} bytes; max_bytes allows at most {self._max_value_bytes}")
            if chunk and (len(chunk) == CHUNK_KEYS or size + len(value) > max_chunk_bytes):
                yield chunk
                chunk, size = {}, 0
            chunk[key] = value
            size += len(value)
        if chunk:
            yield chunk

    def _store(self, connection: Connection, items: Mapping[str, bytes], ttl: float | None) -> None:
        now = self.clock()
        expires = None if ttl is None else now + ttl
        connection.executemany(_STORE, [(key, now, expires, now, value) for key, value in items.items()])

    def _make_room(self, connection: Connection, items: Mapping[str, bytes]) -> int:
        """Delete some expired entries and, if the file would grow above ``max_bytes``, the oldest entries.

        Returns:
            The number of entries that were evicted before they expired.

        Raises:
            OSError: the call has no time left to make enough room. The entries evicted so far stay deleted.
        """
        connection.execute(_EXPIRE, (self.clock(), 2 * len(items) + 64))
        # At the usual sizes, a row takes 30 to 40 % more space than its value, because the row's key is also in an
        # index, and because pages are not full.
        need = sum(map(len, items.values())) * 7 // 5 + 300 * len(items)
        until = time.monotonic() + get_remaining_seconds() / 2
        evicted = 0
        while self._count_used_bytes(connection) + need > self.max_bytes:
            count = connection.execute(_EVICT, (max(8, len(items) // 4),)).rowcount
            evicted += count
            if not count:
                break
            if time.monotonic() > until:
                connection.execute("COMMIT")
                raise DiskFull(
                    errno.ENOSPC,
                    "the file would exceed max_bytes, because there was no time to evict enough entries; "
                    "the next writes will evict more entries",
                    str(self._file.path),
                )
        return evicted

    def _count_used_bytes(self, connection: Connection) -> int:
        ((pages, free, size),) = connection.execute(_PAGES).fetchall()
        return int((pages - free) * size)

    def _tidy(self, evicted: int) -> None:
        """After a write, limit the log. If entries were evicted, also give free pages back to the file system."""
        if evicted:
            self._call_for_upkeep(lambda connection: _release_pages(connection, self.max_bytes))
            self._warn_of_eviction()
        if self._file.log.is_due():
            self._call_for_upkeep(self._file.log.limit_size)

    def _warn_of_eviction(self) -> None:
        if self._has_warned:
            return
        self._has_warned = True
        log.warning(
            "%s has reached max_bytes (%d); evicting the oldest entries. "
            "Raise max_bytes to keep them; otherwise, evicted texts will be embedded again",
            self.path,
            self.max_bytes,
        )


def _rewrite_file(connection: Connection) -> None:
    """Write the database anew without unused space."""
    # With the connection's own setting, SQLite would hold the whole database in memory.
    connection.execute("PRAGMA temp_store = FILE")
    try:
        fetch_rows(connection, "VACUUM")
    finally:
        connection.execute("PRAGMA temp_store = MEMORY")


def _release_pages(connection: Connection, max_bytes: int | None) -> None:
    """Give free pages back to the file system.

    With ``max_bytes``, this gives back free pages until the file is no longer larger than ``max_bytes``. If
    ``max_bytes`` is None, this gives back the free pages that exceed a quarter of the file. One call gives back at most
    1,000 pages, because SQLite may have to move a used page for each page that it gives back.
    """
    ((pages, free, size),) = fetch_rows(connection, _PAGES)
    excess = free - pages // 4 if max_bytes is None else min(free, pages - max_bytes // size)
    if excess > 0:
        # This uses executescript, because `execute` would stop the statement after the first page.
        retry_while_locked(lambda: connection.executescript(f"PRAGMA incremental_vacuum({min(excess, 1000)})"))


def _find_prefix_end(prefix: str) -> str | bytes:
    """Return a value that sorts after every key that starts with ``prefix``."""
    return prefix[:-1] + chr(ord(prefix[-1]) + 1) if prefix else b""  # SQLite sorts every blob after every text


@hookimpl
def embedonce_backends() -> Mapping[str, type]:
    """Register the disk backend."""
    return {"disk": DiskBackend}
