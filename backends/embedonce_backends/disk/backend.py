"""The disk tier: frames in one SQLite file of a folder, in diskcache's layout, shared by the processes of a host.

Nothing is pickled or unpickled, keys included. ``docs/disk.md`` tells what happens when a process is
killed, when the disk is full, and what makes room.
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
from typing import Annotated, Any, Final, Literal, NoReturn, TypeVar

import diskcache  # type: ignore[import-untyped]
from annotated_types import Ge

from embedonce import hookimpl
from embedonce.contracts import Capabilities
from embedonce.errors import ConfigError
from embedonce.options import Doc, Size

from .sqlite import (
    STEPS,
    Connection,
    Connections,
    explained,
    holding,
    interrupted,
    patiently,
    primary_code,
    remaining,
    rows,
)

api = 1

T = TypeVar("T")

log = logging.getLogger("embedonce.disk")

GIB = 2**30
LEAST_BYTES = 2**20
KEYS = 512
"""Keys of one statement; the deadline is looked at in between."""
PAGE = 8192
"""Of the file, in bytes. Smaller pages waste more on frames of 1.6 kB, larger ones write more for each random key."""
LOG_BYTES = 2**25
MODE_RAW: Final = 1
"""diskcache's ``mode`` of a value that is itself in the table; the only one that this backend writes."""

ALWAYS_INLINE = 2**31 - 1
"""diskcache's ``min_file_size``: no value is in a file beside the database."""

# Settings of diskcache, all of them: what somebody else wrote into the table has no say.
SETTINGS: Mapping[str, str | int] = {
    **diskcache.DEFAULT_SETTINGS,
    "statistics": 0,
    "tag_index": 0,
    # Room is made here, in the order of storing: rowids give it without an index to keep.
    "eviction_policy": "none",
    "cull_limit": 0,
    "sqlite_auto_vacuum": 2,
    "sqlite_cache_size": -16384,
    "sqlite_journal_mode": "wal",
    # A page that cannot be read, or a file cut short, is an error here; through a mapping it kills the process.
    "sqlite_mmap_size": 0,
    "sqlite_synchronous": 1,
    "disk_min_file_size": ALWAYS_INLINE,
    "disk_pickle_protocol": 0,
}
COUNTERS = ("count", "size", "hits", "misses")
MADE = {
    "Cache",
    "Cache_key_raw",
    "Cache_expire_time",
    "Settings_count_insert",
    "Settings_count_delete",
    "Settings_size_insert",
    "Settings_size_update",
    "Settings_size_delete",
}
"""What diskcache makes in the database, beside Settings."""

NEW_FILE = (f"page_size = {PAGE}", "auto_vacuum = INCREMENTAL")  # before the first table; later the second one writes
PRAGMAS = (
    "journal_mode = WAL",
    "synchronous = NORMAL",
    "cache_size = -16384",
    "mmap_size = 0",
    f"journal_size_limit = {LOG_BYTES}",
    "temp_store = MEMORY",
    "secure_delete = ON",  # a forgotten vector is overwritten, not just unlinked
    "trusted_schema = OFF",
    "cell_size_check = ON",
)

_FOUND = (
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
# Keys as bytes, since a planted one need not be UTF-8; the plus signs keep CAST from changing how keys are compared.
_SCAN = "SELECT CAST(key AS BLOB) FROM Cache WHERE key >= +CAST(? AS TEXT) AND key < ? AND raw = 1 ORDER BY key LIMIT ?"
_COUNT = "SELECT COUNT(*) FROM Cache WHERE key >= ? AND key < ? AND raw = 1"
_PAGES = "SELECT page_count, freelist_count, page_size FROM pragma_page_count, pragma_freelist_count, pragma_page_size"


class BytesDisk(diskcache.Disk):  # type: ignore[misc]  # diskcache has no types
    """Stores str keys and bytes values, and refuses everything else: nothing is ever unpickled.

    ``diskcache.Cache(folder, disk=BytesDisk)`` looks into a folder of this backend safely.
    """

    def __init__(self, directory: str, **settings: Any) -> None:
        super().__init__(directory, min_file_size=ALWAYS_INLINE)

    def put(self, key: object) -> tuple[str, Literal[True]]:
        """Return the columns of a key."""
        if type(key) is not str:
            raise TypeError(f"a key is a str, not {type(key).__name__}")
        return key, True

    def get(self, key: object, raw: object) -> str:
        """Return the key of its columns."""
        if type(key) is not str or not raw:
            _refuse("key")
        return key

    def store(self, value: object, read: bool, key: object = None) -> tuple[Literal[0], Literal[1], None, memoryview]:
        """Return the columns of a value."""
        if type(value) is not bytes or read:
            raise TypeError(f"a value is bytes, not {type(value).__name__}")
        return 0, MODE_RAW, None, sqlite3.Binary(value)

    def fetch(self, mode: int, filename: str | None, value: object, read: bool) -> bytes:
        """Return the value of its columns."""
        if mode != MODE_RAW or filename is not None or type(value) is not bytes or read:
            _refuse("value")
        return value

    def remove(self, file_path: str) -> None:
        """Do nothing: no value is in a file, and a planted name may point anywhere."""


def _refuse(what: str) -> NoReturn:
    raise ValueError(f"a {what} that embedonce did not write; it is not read")


class _Layout(diskcache.Cache):  # type: ignore[misc]  # diskcache has no types
    """Makes diskcache's tables and triggers through a connection of ours; its own calls are not used."""

    def __init__(self, folder: Path, connection: Connection, settings: Mapping[str, Any]) -> None:
        self._connection = connection
        super().__init__(str(folder), disk=BytesDisk, **settings)

    @property
    def _con(self) -> Connection:
        return self._connection

    @property
    def _sql_retry(self) -> Callable[..., sqlite3.Cursor]:
        return lambda statement, *values: patiently(lambda: self._connection.execute(statement, *values))

    def reset(self, key: str, value: Any = diskcache.ENOVAL, update: bool = True) -> Any:
        """Keep a setting; pragmas are set where the connection is made, never from what the table says."""
        if key.startswith("sqlite_"):
            return value
        return super().reset(key, value, update)

    def close(self) -> None:
        """Leave the connection to its owner."""


class _File:
    """The folder and its database: made when first used, so that a wrong disk costs no start."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.folder = folder
        self.path = folder / diskcache.core.DBNAME
        self.max_bytes = max_bytes
        self.made = False

    def connect(self) -> Connection:
        """Open a connection, after making the folder and the tables where this has not been done."""
        if not self.made:
            _check_folder(self.folder)
            _make_folder(self.folder)
            _make_file(self.path)
        connection = self._open()
        try:
            if not self.made:
                self._lay_out(connection)
        except BaseException:
            connection.close()
            raise
        self.made = True
        return connection

    def log_bytes(self) -> int:
        """Return the size of SQLite's log, 0 where there is none."""
        try:
            return os.stat(f"{self.path}-wal").st_size
        except FileNotFoundError:
            return 0

    def _open(self) -> Connection:
        # mode=rw: a file that was removed is an error, which makes it anew, never an empty database without tables.
        connection = sqlite3.connect(
            self.path.as_uri() + "?mode=rw",
            uri=True,
            timeout=0,
            isolation_level=None,
            check_same_thread=False,
            factory=Connection,
        )
        try:
            new = rows(connection, "PRAGMA page_count") == [(0,)]
            for pragma in (*NEW_FILE, *PRAGMAS) if new else PRAGMAS:
                rows(connection, f"PRAGMA {pragma}")
        except BaseException:
            connection.close()
            raise
        connection.set_progress_handler(interrupted, STEPS)
        return connection

    def _lay_out(self, connection: Connection) -> None:
        """Make the tables, unless they are as they should be: a full disk or a busy writer then keeps nobody out."""
        settings = {**SETTINGS, "size_limit": self.max_bytes}
        there = {name for (name,) in rows(connection, "SELECT name FROM sqlite_master")}
        if "Settings" in there:
            found = dict(rows(connection, "SELECT key, value FROM Settings"))
            if there >= MADE and {key: found[key] for key in found if key not in COUNTERS} == settings:
                return
            known = (*settings, *COUNTERS)
            marks = ", ".join("?" * len(known))
            rows(connection, f"DELETE FROM Settings WHERE key NOT IN ({marks})", known)
        _Layout(self.folder, connection, settings)


def _check_folder(folder: Path) -> None:
    """Refuse a folder in which others can plant or replace files.

    Raises:
        ConfigError: saying what to do.
    """
    try:
        found = folder.stat()
    except OSError:  # not there, or not to be seen: making it says what is wrong
        return
    if not stat.S_ISDIR(found.st_mode):
        raise ConfigError(f"{folder} is not a folder; give the disk tier's path a folder of its own")
    if sys.platform == "win32":
        return
    if problem := _ownership(found.st_uid, found.st_mode, os.geteuid()):
        raise ConfigError(f"{folder} {problem}")


def _ownership(owner: int, mode: int, user: int) -> str | None:
    """Return what makes a folder unsafe for ``user``, None where nothing does."""
    if mode & stat.S_IWOTH:
        return "can be written by every user; run `chmod o-w` on it, or give the disk tier another path"
    # Root may use anybody's: in a container it is root that meets folders of the host's users.
    if user not in (0, owner) and owner != 0:
        return f"belongs to another user (uid {owner}); give the disk tier a path of your own"
    return None


def _make_folder(folder: Path) -> None:
    """Make a folder, and those above it that are not there, for this user only, whatever the umask."""
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
            os.fchmod(handle, 0o600)  # SQLite gives the files beside it the same mode
    finally:
        os.close(handle)


class DiskBackend:
    """Holds frames in a folder; threads and processes of one host share it, and it outlives them."""

    def __init__(
        self,
        *,
        path: Annotated[Path, Doc("A folder of its own, made (for this user only) when first used. ~ is the home.")],
        max_bytes: Annotated[
            Size,
            Ge(LEAST_BYTES),
            Doc("Keep the file below this; the entries stored first make room. A log of up to 32 MiB comes on top."),
        ] = 4 * GIB,
    ) -> None:
        if max_bytes < LEAST_BYTES:
            raise ConfigError(f"max_bytes is at least 1 MiB, not {max_bytes} bytes")
        try:
            folder = Path(path).expanduser().absolute()
        except RuntimeError as error:
            raise ConfigError(f"path: {error}") from error
        _check_folder(folder)
        self.path = folder
        self.max_bytes = max_bytes
        self._most = min(max_bytes // 16, 2**28)
        self.capabilities = Capabilities(
            scope="host",
            deadline=True,
            ttl=True,
            max_value_bytes=self._most,
            get=True,
            delete=True,
            scan=True,
            count=True,
            add=True,
            bounded=True,
        )
        self.clock: Callable[[], float] = time.time
        """Unix time in seconds, for ttl."""
        self._file = _File(folder, max_bytes)
        self._connections = Connections(self._file.connect)
        self._warned = False
        weakref.finalize(self, self._connections.close)

    def get_many(self, keys: Sequence[str], /) -> dict[str, bytes]:
        """Return what is there, by one query per 512 keys.

        A row that this backend did not write comes back as it is, or as ``b""``: no frame, so corrupt.
        """
        if len(keys) == 1:  # a third of the time
            value = self.get(keys[0])
            return {} if value is None else {keys[0]: value}
        found: dict[str, bytes] = {}
        now = self.clock()
        for start in range(0, len(keys), KEYS):
            chunk = list(keys[start : start + KEYS])
            for at, value in self._read(_FOUND, (json.dumps(chunk), now)):
                found[chunk[at]] = value if type(value) is bytes else b""
        return found

    def get(self, key: str, /) -> bytes | None:
        """Return the frame of one key, or None."""
        found = self._read(_GET, (key, self.clock()))
        if not found:
            return None
        value = found[0][0]
        return value if type(value) is bytes else b""

    def set_many(self, items: Mapping[str, bytes], ttl: float | None, /) -> None:
        """Store every item; each transaction of up to 512 is there as a whole or not at all.

        When it returns, killing the process loses nothing of it.

        Raises:
            OSError: the disk is full, or read-only.
        """
        for chunk in self._chunks(items):
            with self._transaction() as connection:
                evicted = self._make_room(connection, chunk)
                self._store(connection, chunk, ttl)
            self._evicted(evicted)
        self._bound_log()

    def add_many(self, items: Mapping[str, bytes], ttl: float | None, /) -> set[str]:
        """Store the items whose key is absent or expired, and return those keys; exactly one caller gets each."""
        added: set[str] = set()
        for chunk in self._chunks(items):
            with self._transaction() as connection:
                keys = list(chunk)
                held = {keys[at] for at, _ in rows(connection, _FOUND, (json.dumps(keys), self.clock()))}
                new = {key: value for key, value in chunk.items() if key not in held}
                evicted = self._make_room(connection, new)
                self._store(connection, new, ttl)
            self._evicted(evicted)
            added.update(new)
        return added

    def delete_many(self, keys: Sequence[str], /) -> None:
        """Remove the keys and overwrite what they held, in the file and, unless a reader is in the way, in its log."""
        for start in range(0, len(keys), KEYS):
            with self._transaction() as connection:
                rows(connection, _DELETE, (json.dumps(list(keys[start : start + KEYS])),))
            self._use(lambda connection: _shrink(connection, None))
        self._use(_start_log_anew)

    def scan(self, prefix: str, /) -> Iterator[str]:
        """Yield the keys that start with ``prefix`` in order, those too whose ttl has passed but that still take space.

        Nothing is held open between pages: keys stored or removed meanwhile may or may not be among them.
        """
        start, end = prefix.encode(), _end(prefix)
        while True:
            page = self._read(_SCAN, (start, end, KEYS))
            for (key,) in page:
                yield key.decode("utf-8", "replace")
            if len(page) < KEYS:
                return
            start = page[-1][0] + b"\0"

    def count(self, prefix: str, /) -> int:
        """Return how many keys ``scan(prefix)`` gives."""
        ((count,),) = self._read(_COUNT, (prefix, _end(prefix)))
        return int(count)

    def close(self) -> None:
        """Close the file; a call that is under way in another thread ends first."""
        self._connections.close()

    # --- one call ---

    def _read(self, sql: str, values: tuple[object, ...]) -> list[tuple[Any, ...]]:
        return self._use(lambda connection: rows(connection, sql, values))

    def _use(self, call: Callable[[Connection], T]) -> T:
        connection: Connection | None = None
        sound = False
        try:
            connection = self._connections.take()
            result = call(connection)
            sound = True
            return result
        except (sqlite3.Error, UnicodeDecodeError) as error:
            raise self._explained(error) from error
        finally:
            if connection is not None:
                self._connections.give(connection, sound)

    @contextmanager
    def _transaction(self) -> Iterator[Connection]:
        with holding(self._connections.writing):
            connection: Connection | None = None
            try:
                connection = self._connections.take()
                rows(connection, "BEGIN IMMEDIATE")
                yield connection
                rows(connection, "COMMIT")
            except (sqlite3.Error, UnicodeDecodeError) as error:
                raise self._explained(error) from error
            finally:
                if connection is not None:
                    # In a transaction still: something was raised, and closing the connection rolls it back.
                    self._connections.give(connection, sound=not connection.in_transaction)

    def _explained(self, error: sqlite3.Error | UnicodeDecodeError) -> Exception:
        if primary_code(error) not in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_INTERRUPT):
            # The file may have been removed or replaced: the next call looks again.
            self._file.made = False
            self._connections.renew()
        return explained(error, self._file.path)

    def _chunks(self, items: Mapping[str, bytes]) -> Iterator[dict[str, bytes]]:
        """Split by number and by bytes, so that one transaction is short and small beside ``max_bytes``."""
        chunk: dict[str, bytes] = {}
        size = 0
        most = min(self._most, LOG_BYTES // 2)
        for key, value in items.items():
            if len(value) > self._most:
                raise ValueError(f"a value of {len(value)} bytes; with this max_bytes the largest is {self._most}")
            if chunk and (len(chunk) == KEYS or size + len(value) > most):
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
        """Free what has expired and, where the file would grow above ``max_bytes``, what was stored first.

        Returns:
            How many entries were evicted before their time.

        Raises:
            OSError: there is more to free than the call has time for; what was freed stays free.
        """
        connection.execute(_EXPIRE, (self.clock(), 2 * len(items) + 64))
        # A row costs its key twice, and pages are not full: 30 to 40 % at the usual sizes.
        need = sum(map(len, items.values())) * 7 // 5 + 300 * len(items)
        until = time.monotonic() + remaining() / 2
        evicted = 0
        while self._used(connection) + need > self.max_bytes:
            count = connection.execute(_EVICT, (max(8, len(items) // 4),)).rowcount
            evicted += count
            if not count:
                break
            if time.monotonic() > until:
                connection.execute("COMMIT")
                raise OSError(
                    errno.ENOSPC, "the file is above max_bytes and is being made smaller", str(self._file.path)
                )
        return evicted

    def _used(self, connection: Connection) -> int:
        ((pages, free, size),) = connection.execute(_PAGES).fetchall()
        return int((pages - free) * size)

    def _bound_log(self) -> None:
        """Keep the log short where readers that overlap keep SQLite from starting it anew by itself."""
        if self._file.log_bytes() > LOG_BYTES:
            self._use(_start_log_anew)

    def _evicted(self, count: int) -> None:
        if not count:
            return
        self._use(lambda connection: _shrink(connection, self.max_bytes))
        if self._warned:
            return
        self._warned = True
        log.warning(
            "%s has reached max_bytes (%d): the entries stored first make room. "
            "A larger max_bytes keeps them from being computed again",
            self.path,
            self.max_bytes,
        )


def _start_log_anew(connection: Connection) -> None:
    """Write the log back into the file and empty it.

    Readers under way are waited for, a quarter of a second at most: who comes meanwhile reads the file
    itself. Where that was too short the log stays until the next time, and nothing is wrong.
    """
    wait = int(1000 * min(0.25, remaining() / 2))
    connection.execute(f"PRAGMA busy_timeout = {wait}")
    try:
        rows(connection, "PRAGMA wal_checkpoint(TRUNCATE)")
    finally:
        connection.execute("PRAGMA busy_timeout = 0")


def _shrink(connection: Connection, max_bytes: int | None = None) -> None:
    """Give free pages back to the file system: those above ``max_bytes``, else those above a quarter of the file.

    A thousand at most, since each may have to be moved.
    """
    ((pages, free, size),) = rows(connection, _PAGES)
    over = free - pages // 4 if max_bytes is None else min(free, pages - max_bytes // size)
    if over > 0:
        # A script, because `execute` ends this statement after its first page.
        patiently(lambda: connection.executescript(f"PRAGMA incremental_vacuum({min(over, 1000)})"))


def _end(prefix: str) -> str | bytes:
    """Return what sorts after every key that starts with ``prefix``."""
    return prefix[:-1] + chr(ord(prefix[-1]) + 1) if prefix else b""  # SQLite sorts every blob after every text


@hookimpl
def embedonce_backends() -> Mapping[str, type]:
    """Name this file's backend."""
    return {"disk": DiskBackend}
