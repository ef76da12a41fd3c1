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
import stat
import sys
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, TypeVar

import diskcache  # type: ignore[import-untyped]
from annotated_types import Ge

from embedonce import hookimpl
from embedonce.contracts import Capabilities, StoredSize
from embedonce.errors import ConfigError
from embedonce.options import Doc, Size

from .layout import COUNTERS, MODE_RAW, SCHEMA_OBJECTS, SETTINGS, Layout
from .sqlite import (
    PROGRESS_STEPS,
    Connection,
    Connections,
    explain_error,
    fetch_rows,
    get_primary_code,
    get_remaining_seconds,
    hold_lock,
    is_out_of_time,
    retry_while_locked,
)

api = 1

T = TypeVar("T")

log = logging.getLogger("embedonce.disk")

GIB = 2**30
MIN_FILE_BYTES = 2**20
"""Smallest ``max_bytes`` that is accepted."""
CHUNK_KEYS = 512
"""Maximum number of keys per statement; the deadline is checked between statements."""
PAGE_BYTES = 8192
"""Page size of the file in bytes. With frames of 1.6 kB (384 dimensions), smaller pages would waste space. With larger
pages, storing an entry would write more bytes, because SQLite writes whole pages."""
LOG_BYTES = 2**25
"""Size in bytes above which SQLite's log is written back into the file and emptied."""
# These pragmas have an effect only before the first table is made. Later, auto_vacuum would have no effect, but setting
# it would still write to the file.
NEW_FILE_PRAGMAS = (f"page_size = {PAGE_BYTES}", "auto_vacuum = INCREMENTAL")
PRAGMAS = (
    "journal_mode = WAL",
    "synchronous = NORMAL",
    "cache_size = -16384",
    "mmap_size = 0",
    f"journal_size_limit = {LOG_BYTES}",
    "temp_store = MEMORY",
    "secure_delete = ON",  # deleted data is overwritten, not only marked as free space
    "trusted_schema = OFF",
    "cell_size_check = ON",
)

_GET_MANY = (
    "SELECT wanted.key, Cache.value FROM json_each(?) AS wanted"
    " CROSS JOIN Cache ON Cache.key = wanted.value AND Cache.raw = 1"
    " WHERE Cache.expire_time IS NULL OR Cache.expire_time > ?"
)
_GET = "SELECT value FROM Cache WHERE key = ? AND raw = 1 AND (expire_time IS NULL OR expire_time > ?)"
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


class _File:
    """The folder and its database. Both are made when first used, so that a broken disk does not prevent startup."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.folder = folder
        self.path = folder / diskcache.core.DBNAME
        self.max_bytes = max_bytes
        self.is_made = False

    def connect(self) -> Connection:
        """Open a connection. The first call also makes the folder and the tables if they are missing."""
        if not self.is_made:
            _check_folder(self.folder)
            _make_folder(self.folder)
            _make_file(self.path)
        connection = self._open()
        try:
            if not self.is_made:
                self._make_tables(connection)
        except BaseException:
            connection.close()
            raise
        self.is_made = True
        return connection

    def get_log_bytes(self) -> int:
        """Return the size of SQLite's log in bytes, or 0 if there is no log."""
        try:
            return os.stat(f"{self.path}-wal").st_size
        except FileNotFoundError:
            return 0

    def _open(self) -> Connection:
        # With mode=rw, opening a removed file raises an error, and the next call makes the file again with its tables.
        # The default mode would make an empty file without tables.
        connection = sqlite3.connect(
            self.path.as_uri() + "?mode=rw",
            uri=True,
            timeout=0,
            isolation_level=None,
            check_same_thread=False,
            factory=Connection,
        )
        try:
            is_new = fetch_rows(connection, "PRAGMA page_count") == [(0,)]
            for pragma in (*NEW_FILE_PRAGMAS, *PRAGMAS) if is_new else PRAGMAS:
                fetch_rows(connection, f"PRAGMA {pragma}")
        except BaseException:
            connection.close()
            raise
        connection.set_progress_handler(is_out_of_time, PROGRESS_STEPS)
        return connection

    def _make_tables(self, connection: Connection) -> None:
        """Make the tables and the settings, unless all of them are already as expected.

        If all of them are as expected, nothing is written, so the file can be opened while the disk is full or the
        database is locked.
        """
        settings = {**SETTINGS, "size_limit": self.max_bytes}
        existing = {name for (name,) in fetch_rows(connection, "SELECT name FROM sqlite_master")}
        if "Settings" in existing:
            found = dict(fetch_rows(connection, "SELECT key, value FROM Settings"))
            if existing >= SCHEMA_OBJECTS and {key: found[key] for key in found if key not in COUNTERS} == settings:
                return
            known = (*settings, *COUNTERS)
            marks = ", ".join("?" * len(known))
            fetch_rows(connection, f"DELETE FROM Settings WHERE key NOT IN ({marks})", known)
        Layout(self.folder, connection, settings)


def _check_folder(folder: Path) -> None:
    """Refuse a folder in which other users can plant or replace files.

    Raises:
        ConfigError: the folder is unsafe or not a folder; the message says what to do.
    """
    try:
        found = folder.stat()
    except OSError:  # missing or inaccessible; making the folder will report the problem
        return
    if not stat.S_ISDIR(found.st_mode):
        raise ConfigError(f"{folder} is not a folder; set the disk tier's path to a folder of its own")
    if sys.platform == "win32":
        return
    if problem := _find_permission_problem(found.st_uid, found.st_mode, os.geteuid()):
        raise ConfigError(f"{folder} {problem}")


def _find_permission_problem(owner: int, mode: int, user: int) -> str | None:
    """Return why a folder is unsafe for ``user``, or None if it is safe."""
    if mode & stat.S_IWOTH:
        return "is writable by every user; run `chmod o-w` on it, or give the disk tier another path"
    # Root may use any user's folder, because in a container, root often gets folders that belong to users of the host.
    if user not in (0, owner) and owner != 0:
        return f"belongs to another user (uid {owner}); give the disk tier a path of your own"
    return None


def _make_folder(folder: Path) -> None:
    """Make a folder and its missing parents, accessible to this user only, whatever the umask is."""
    missing = [folder]
    missing.extend(parent for parent in folder.parents if not parent.exists())
    for path in reversed(missing):
        try:
            path.mkdir(mode=0o700)
        except FileExistsError:
            continue
        path.chmod(0o700)


def _make_file(path: Path) -> None:
    try:
        handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
    except FileExistsError:
        return
    try:
        if sys.platform != "win32":
            os.fchmod(handle, 0o600)  # SQLite gives its log and index the same mode
    finally:
        os.close(handle)


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
        _check_folder(folder)
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
        self._file = _File(folder, max_bytes)
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
        now = self.clock()
        for start in range(0, len(keys), CHUNK_KEYS):
            chunk = list(keys[start : start + CHUNK_KEYS])
            for index, value in self._read(_GET_MANY, (json.dumps(chunk), now)):
                found[chunk[index]] = value if type(value) is bytes else b""
        return found

    def get(self, key: str, /) -> bytes | None:
        """Return the frame of one key, or None."""
        found = self._read(_GET, (key, self.clock()))
        if not found:
            return None
        value = found[0][0]
        return value if type(value) is bytes else b""

    def set_many(self, items: Mapping[str, bytes], ttl: float | None, /) -> None:
        """Store every item, in transactions of up to 512 items; each transaction succeeds as a whole or not at all.

        After this has returned, no item is lost even if the process is killed.

        Raises:
            OSError: the disk is full or read-only.
        """
        for chunk in self._split_items(items):
            with self._open_transaction() as connection:
                evicted = self._make_room(connection, chunk)
                self._store(connection, chunk, ttl)
            self._handle_eviction(evicted)
        self._limit_log()

    def add_many(self, items: Mapping[str, bytes], ttl: float | None, /) -> set[str]:
        """Store the items whose key is missing or expired, and return those keys.

        If several callers add the same key at the same time, only one call stores the item and returns the key.
        """
        added: set[str] = set()
        for chunk in self._split_items(items):
            with self._open_transaction() as connection:
                keys = list(chunk)
                held = {keys[index] for index, _ in fetch_rows(connection, _GET_MANY, (json.dumps(keys), self.clock()))}
                new = {key: value for key, value in chunk.items() if key not in held}
                evicted = self._make_room(connection, new)
                self._store(connection, new, ttl)
            self._handle_eviction(evicted)
            added.update(new)
        return added

    def delete_many(self, keys: Sequence[str], /) -> None:
        """Remove the keys and overwrite their data in the file.

        Afterwards, this also empties the log, because the log may contain the data. If a reader is still using the
        log then, the log keeps the data until a later call empties the log.
        """
        for start in range(0, len(keys), CHUNK_KEYS):
            with self._open_transaction() as connection:
                fetch_rows(connection, _DELETE, (json.dumps(list(keys[start : start + CHUNK_KEYS])),))
            self._call_with_connection(lambda connection: _release_pages(connection, None))
        self._call_with_connection(_truncate_log)

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

    def _read(self, sql: str, values: tuple[object, ...]) -> list[tuple[Any, ...]]:
        return self._call_with_connection(lambda connection: fetch_rows(connection, sql, values))

    def _call_with_connection(self, call: Callable[[Connection], T]) -> T:
        connection: Connection | None = None
        is_reusable = False
        try:
            connection = self._connections.take()
            result = call(connection)
            is_reusable = True
            return result
        except (sqlite3.Error, UnicodeDecodeError) as error:
            raise self._handle_error(error) from error
        finally:
            if connection is not None:
                self._connections.give(connection, is_reusable)

    @contextmanager
    def _open_transaction(self) -> Iterator[Connection]:
        with hold_lock(self._connections.write_lock):
            connection: Connection | None = None
            try:
                connection = self._connections.take()
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
                raise OSError(
                    errno.ENOSPC,
                    "the file would exceed max_bytes, because there was no time to evict enough entries; "
                    "the next writes will evict more entries",
                    str(self._file.path),
                )
        return evicted

    def _count_used_bytes(self, connection: Connection) -> int:
        ((pages, free, size),) = connection.execute(_PAGES).fetchall()
        return int((pages - free) * size)

    def _limit_log(self) -> None:
        """Empty the log if it is larger than ``LOG_BYTES``.

        SQLite itself empties the log only when no reader is active. If there is always an active reader, SQLite never
        empties the log.
        """
        if self._file.get_log_bytes() > LOG_BYTES:
            self._call_with_connection(_truncate_log)

    def _handle_eviction(self, count: int) -> None:
        """If entries were evicted, give free pages back to the file system. The first time, also log a warning."""
        if not count:
            return
        self._call_with_connection(lambda connection: _release_pages(connection, self.max_bytes))
        if self._has_warned:
            return
        self._has_warned = True
        log.warning(
            "%s has reached max_bytes (%d); evicting the oldest entries. "
            "Raise max_bytes to keep them; otherwise, evicted texts will be embedded again",
            self.path,
            self.max_bytes,
        )


def _truncate_log(connection: Connection) -> None:
    """Write SQLite's log back into the file, and then empty the log.

    This waits up to 0.25 s for readers that still use the log. It does not wait for readers that start later, because
    those use only the main file. If a reader uses the log for longer, the log is not emptied until the next attempt.
    """
    wait = int(1000 * min(0.25, get_remaining_seconds() / 2))
    connection.execute(f"PRAGMA busy_timeout = {wait}")
    try:
        fetch_rows(connection, "PRAGMA wal_checkpoint(TRUNCATE)")
    finally:
        connection.execute("PRAGMA busy_timeout = 0")


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
