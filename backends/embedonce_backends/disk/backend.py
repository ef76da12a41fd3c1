"""The disk tier: frames in one SQLite file, which has diskcache's layout and is shared by the processes of a host.

Neither values nor keys are ever pickled or unpickled. ``docs/disk.md`` describes eviction, and what happens when a
process is killed or the disk is full.
"""

from __future__ import annotations

import errno
import heapq
import logging
import math
import os
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge

from embedonce import hookimpl
from embedonce.contracts import Capabilities, StoredSize
from embedonce.errors import ConfigError
from embedonce.options import Doc, Size

from .compaction import compact
from .database import Database, count_used_bytes, estimate_bytes, release_pages
from .entries_file import EntriesFile
from .errors import DiskFull, is_writable
from .folder import check_folder
from .lease_file import LeaseFile
from .log import LOG_BYTES
from .sqlite import Connection, fetch_rows, get_remaining_seconds
from .statements import (
    COUNT,
    DELETE,
    EVICT,
    EXPIRE,
    EXPIRE_LEASES,
    GET,
    GET_MANY,
    HAS_EARLIER_KEYS,
    MEASURE,
    SCAN,
    STORE,
    Statement,
)
from .stored_keys import Form, decode_key, encode_key, find_range, group_keys, pick_leases

api = 1

log = logging.getLogger("embedonce.disk")

MIB = 2**20
GIB = 2**30
MIN_FILE_BYTES = 2**20
"""Smallest ``max_bytes`` that is accepted."""
CHUNK_KEYS = 512
"""Maximum number of keys per statement that reads; the deadline is checked between statements."""
CHUNK_ITEMS = 4096
"""Maximum number of items per transaction. A transaction writes each page of the index that it changes once, so one
large transaction takes less time than many small ones. Other processes wait for a transaction to end."""
CLEAR_SECONDS = 2.0
"""Seconds after which a process deletes the expired leases again. It reads all leases for that."""
CLOCK_SECONDS = 1.0
"""If an entry with a TTL seems to have been stored further in the future, the clock has been set back since then. The
entry has expired, because its true age is unknown."""


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
            max_batch=CHUNK_ITEMS,
        )
        self.clock: Callable[[], float] = time.time
        """Function that returns the Unix time in seconds. The backend uses this clock to tell when an entry expires."""
        self._file = EntriesFile(folder, max_bytes)
        self._database = Database(self._file)
        self._leases = Database(LeaseFile(folder))
        self._has_warned = False
        self._leases_cleared_at = -math.inf
        for database in (self._database, self._leases):
            weakref.finalize(self, database.connections.close)

    def get_many(self, keys: Sequence[str], /) -> dict[str, bytes]:
        """Return the frames that are stored under ``keys``, with one query per 512 keys.

        A value that is not bytes was not written by this backend. It is returned as ``b""``, which is not a valid
        frame, so that the tier counts it as corrupt.
        """
        if len(keys) == 1:  # for a single key, get() takes a third of the time of the query below
            value = self.get(keys[0])
            return {} if value is None else {keys[0]: value}
        leases = pick_leases(keys)
        if not leases:
            return self._database.call(self._find_values, keys)
        found = self._leases.call(self._find_values, leases) if self._leases.exists() else {}
        others = _leave_out(keys, leases)
        return {**found, **self._database.call(self._find_values, others)} if others else found

    def get(self, key: str, /) -> bytes | None:
        """Return the frame of one key, or None."""
        form, stored = encode_key(key)
        times = self._get_times()
        found = self._read_form(form, GET, (stored, *times))
        if not found and self._file.has_earlier_keys and form is Form.ENTRY:
            found = self._read_form(Form.TEXT, GET, (key, *times))
        if not found:
            return None
        value = found[0][0]
        return value if type(value) is bytes else b""

    def set_many(self, items: Mapping[str, bytes], ttl: float | None, /) -> None:
        """Store every item, in transactions of up to 4,096 items; each transaction succeeds as a whole or not at all.

        After this has returned, no item is lost even if the process is killed.

        Raises:
            DiskFull: the disk has no space left.
            ReadOnlyFile: the file or its folder is read-only.
            LogTooLarge: SQLite's log has reached its limit, because a reader keeps it from being emptied.
        """
        for database, chunk in self._split_items(items):
            with database.open_transaction() as connection:
                evicted = self._make_room(connection, database, chunk)
                self._store(connection, chunk, ttl)
            self._tidy(database, evicted)

    def add_many(self, items: Mapping[str, bytes], ttl: float | None, /) -> set[str]:
        """Store the items whose key is missing or expired, and return those keys.

        If several callers add the same key at the same time, only one call stores the item and returns the key.
        """
        added: set[str] = set()
        for database, chunk in self._split_items(items):
            with database.open_transaction() as connection:
                held = self._find_values(connection, list(chunk))
                new = {key: value for key, value in chunk.items() if key not in held}
                evicted = self._make_room(connection, database, new)
                self._store(connection, new, ttl)
            self._tidy(database, evicted)
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
        leases = pick_leases(keys)
        if leases and self._leases.exists():
            for chunk in _split_keys(leases):
                with self._leases.open_transaction(2 * self._leases.log.limit) as connection:
                    self._delete(connection, chunk)
        others = _leave_out(keys, leases)
        for chunk in _split_keys(others):
            with self._database.open_transaction(2 * self._database.log.limit) as connection:
                self._delete(connection, chunk)
            self._database.tidy(release_pages)
        if others:
            # Even if no key was there, an earlier call may have removed an entry without overwriting its data.
            self._database.call_alone(self._database.log.overwrite_removed_data)

    def compact(self) -> str:
        """Give unused space back to the file system, empty the log, and return the size of both.

        Other threads and processes can read and write meanwhile. An interrupted call loses nothing; the next one goes
        on.

        Raises:
            DiskFull: the disk has no space left, not even for one step.
            ReadOnlyFile: the file or its folder is read-only.
            LogTooLarge: readers kept SQLite's log from being emptied for 60 s.
            TierTimeout: another process held the lock for 60 s.
        """
        before = self._database.get_bytes()
        compact(self._database)
        return f"{self._database.get_bytes() / MIB:.1f} MiB, was {before / MIB:.1f} MiB"

    def describe(self) -> str:
        """Describe the sizes of the file and its log, and whether the file is read-only."""
        is_read_only = self._database.call(lambda connection: connection.stamp is not None)
        is_read_only = is_read_only or not is_writable(self._database.path)
        size = os.stat(self._database.path).st_size / MIB
        return f"file {size:.1f} MiB, {self._database.log.describe()}{', read-only' if is_read_only else ''}"

    def scan(self, prefix: str, /) -> Iterator[str]:
        """Yield the keys that start with ``prefix``, in order, including expired keys that have not been deleted yet.

        Each page of 512 keys has its own query, so a key that is stored or removed during the scan may or may not be
        listed.
        """
        pages = (self._scan_form(form, prefix) for form in Form)
        last = None
        for key in heapq.merge(*pages):
            if key != last:  # a folder of an earlier version may have a key in two forms
                yield key
            last = key

    def _scan_form(self, form: Form, prefix: str) -> Iterator[str]:
        bounds = find_range(form, prefix)
        while bounds is not None:
            page = self._read_form(form, SCAN, (*bounds, CHUNK_KEYS))
            for (stored,) in page:
                yield decode_key(form, stored)
            bounds = (page[-1][0] + b"\0", bounds[1]) if len(page) == CHUNK_KEYS else None

    def count(self, prefix: str, /) -> int:
        """Return how many keys ``scan(prefix)`` yields."""
        if self._database.read(HAS_EARLIER_KEYS, ()):  # a key may be stored in two forms
            return sum(1 for _ in self.scan(prefix))
        return sum(int(count) for (count,) in self._read_ranges(COUNT, prefix))

    def measure(self, prefix: str, /) -> StoredSize:
        """Return the size and the dates of the entries whose keys start with ``prefix``."""
        sizes, oldest, newest = zip(*self._read_ranges(MEASURE, prefix), strict=True)
        return StoredSize(
            bytes=sum(int(size or 0) for size in sizes),
            oldest=min((date for date in oldest if date is not None), default=None),
            newest=max((date for date in newest if date is not None), default=None),
        )

    def _read_ranges(self, statement: Statement, prefix: str) -> list[tuple[Any, ...]]:
        """Return one row for each form of keys."""
        bounds = {form: found for form in Form if (found := find_range(form, prefix)) is not None}
        return [row for form, found in bounds.items() for row in self._read_form(form, statement, found)]

    def _read_form(self, form: Form, statement: Statement, values: tuple[object, ...]) -> list[tuple[Any, ...]]:
        """Return the rows of a statement for one form of keys."""
        if form is not Form.LEASE:
            return self._database.read(statement[form], values)
        return self._leases.read(statement[form], values) if self._leases.exists() else []

    def close(self) -> None:
        """Close the idle connections now, and each connection in use when its call ends."""
        for database in (self._database, self._leases):
            database.connections.close()

    # --- one call ---

    def _get_times(self) -> tuple[float, float]:
        """Return the time now and the latest time at which an entry with a TTL may have been stored."""
        now = self.clock()
        return now, now + CLOCK_SECONDS

    def _find_values(self, connection: Connection, keys: Sequence[str]) -> dict[str, bytes]:
        """Return the values that are stored under ``keys``, with one query for each chunk and form of keys."""
        found: dict[str, bytes] = {}
        times = self._get_times()
        for chunk in _split_keys(keys):
            for group in group_keys(chunk):
                rows: list[tuple[int, object]] = fetch_rows(
                    connection, GET_MANY[group.form], (*group.parameters, *times)
                )
                if len(rows) < len(group.keys) and self._file.has_earlier_keys:
                    texts = (*group.as_texts().parameters, *times)
                    rows = fetch_rows(connection, GET_MANY[Form.TEXT], texts) + rows  # the later row counts
                names = group.keys
                found |= {names[index]: value if type(value) is bytes else b"" for index, value in rows}
        return found

    def _split_items(self, items: Mapping[str, bytes]) -> Iterator[tuple[Database, Mapping[str, bytes]]]:
        """Split the items into the contents of transactions, each with a limited number of items and bytes."""
        sizes = list(map(len, items.values()))
        if sizes and max(sizes) > self._max_value_bytes:
            raise ValueError(f"value has {max(sizes)} bytes; max_bytes allows at most {self._max_value_bytes}")
        leases = dict.fromkeys(pick_leases(list(items)))
        if leases:
            yield from self._split_part(self._leases, {key: items[key] for key in leases})
            items = {key: value for key, value in items.items() if key not in leases}
        yield from self._split_part(self._database, items)

    def _split_part(
        self, database: Database, items: Mapping[str, bytes]
    ) -> Iterator[tuple[Database, Mapping[str, bytes]]]:
        """Split the items of one database."""
        max_chunk_bytes = min(self._max_value_bytes, LOG_BYTES // 2)
        if len(items) <= CHUNK_ITEMS and sum(map(len, items.values())) <= max_chunk_bytes:  # nearly always
            if items:
                yield database, items
            return
        chunk: dict[str, bytes] = {}
        size = 0
        for key, value in items.items():
            if chunk and (len(chunk) == CHUNK_ITEMS or size + len(value) > max_chunk_bytes):
                yield database, chunk
                chunk, size = {}, 0
            chunk[key] = value
            size += len(value)
        yield database, chunk

    def _store(self, connection: Connection, items: Mapping[str, bytes], ttl: float | None) -> None:
        now = self.clock()
        expires = None if ttl is None else now + ttl
        for chunk in _split_keys(list(items)):
            for group in group_keys(chunk):
                rows = [(stored, now, expires, items[key]) for key, stored in group.list_stored()]
                connection.executemany(STORE[group.form], rows)
                if self._file.has_earlier_keys and group.form is Form.ENTRY:
                    fetch_rows(connection, DELETE[Form.TEXT], group.as_texts().parameters)

    def _delete(self, connection: Connection, keys: Sequence[str]) -> None:
        for group in group_keys(keys):
            fetch_rows(connection, DELETE[group.form], group.parameters)
            if group.form is Form.ENTRY:
                # An earlier version stored the keys of entries as text.
                fetch_rows(connection, DELETE[Form.TEXT], group.as_texts().parameters)

    def _make_room(self, connection: Connection, database: Database, items: Mapping[str, bytes]) -> int:
        """Delete some expired entries and, if the file would grow above ``max_bytes``, the oldest entries.

        In the file of the leases, delete only the expired leases.

        Returns:
            The number of entries that were evicted before they expired.

        Raises:
            OSError: the call has no time left to make enough room. The entries evicted so far stay deleted.
        """
        now = self.clock()
        if database is self._leases:
            if not 0 <= now - self._leases_cleared_at < CLEAR_SECONDS:
                self._leases_cleared_at = now
                connection.execute(EXPIRE_LEASES, (now,))
            return 0
        connection.execute(EXPIRE, (now, 2 * len(items) + 64))
        # Pages of the index may be split, so more space than for full pages is needed.
        need = estimate_bytes(connection, Counter(map(len, items.values())).items()) + 300 * len(items)
        until = time.monotonic() + get_remaining_seconds() / 2
        evicted = 0
        while count_used_bytes(connection) + need > self.max_bytes:
            count = connection.execute(EVICT, (max(8, len(items) // 4),)).rowcount
            evicted += count
            if not count:
                break
            if time.monotonic() > until:
                connection.execute("COMMIT")
                raise DiskFull(
                    errno.ENOSPC,
                    "the file would exceed max_bytes, because there was no time to evict enough entries; "
                    "the next writes will evict more entries",
                    str(self._database.path),
                )
        return evicted

    def _tidy(self, database: Database, evicted: int) -> None:
        """After a write, limit the log. If entries were evicted, also give free pages back to the file system."""
        if evicted:
            database.tidy(lambda connection: release_pages(connection, self.max_bytes))
            self._warn_of_eviction()
        if database.log.is_due():
            database.tidy(database.log.limit_size)

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


def _leave_out(keys: Sequence[str], leases: Sequence[str]) -> Sequence[str]:
    """Return the keys that are not among the leases."""
    if not leases:
        return keys
    left_out = set(leases)
    return [key for key in keys if key not in left_out]


def _split_keys(keys: Sequence[str]) -> Iterator[Sequence[str]]:
    for start in range(0, len(keys), CHUNK_KEYS):
        yield keys[start : start + CHUNK_KEYS]


@hookimpl
def embedonce_backends() -> Mapping[str, type]:
    """Register the disk backend."""
    return {"disk": DiskBackend}
