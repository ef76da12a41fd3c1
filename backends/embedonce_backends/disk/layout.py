"""The layout that diskcache uses in a folder: settings, tables, and the form of keys and values."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, Literal, NoReturn

import diskcache  # type: ignore[import-untyped]

from .sqlite import Connection, retry_while_locked
from .stored_keys import STORED_BYTES, Form, StoredKey, decode_key, encode_key

MODE_RAW: Final = 1
"""diskcache's ``mode`` for a value that is stored in the table itself; this backend writes no other mode."""

ALWAYS_INLINE = 2**31 - 1
"""diskcache's ``min_file_size``, set so high that no value is stored in a file of its own."""

# All of diskcache's settings are set here. Otherwise, diskcache would read the missing settings from the table, and
# another program may have changed them there.
SETTINGS: Mapping[str, str | int] = {
    **diskcache.DEFAULT_SETTINGS,
    "statistics": 0,
    "tag_index": 0,
    # diskcache must not evict entries, because this backend evicts the oldest entries itself. The backend finds the
    # oldest entries without an index, because the rowids are in the order in which the keys were first stored.
    "eviction_policy": "none",
    "cull_limit": 0,
    "sqlite_auto_vacuum": 2,
    "sqlite_cache_size": -65536,
    "sqlite_journal_mode": "wal",
    # Without mmap, reading a damaged page or a truncated file causes an error. With mmap, the process would be killed.
    "sqlite_mmap_size": 0,
    "sqlite_synchronous": 1,
    "disk_min_file_size": ALWAYS_INLINE,
    "disk_pickle_protocol": 0,
}
COUNTERS = ("count", "size", "hits", "misses")
SCHEMA_OBJECTS = {"Settings", "Cache", "Cache_key_raw", "Cache_expire_time"}
"""Tables and indexes of the database."""
TRIGGERS = {
    "Settings_count_insert",
    "Settings_count_delete",
    "Settings_size_insert",
    "Settings_size_update",
    "Settings_size_delete",
}
"""Triggers with which diskcache counts its entries. They would take a third of the time of a write, so they are dropped
whenever this backend opens the file."""


class BytesDisk(diskcache.Disk):  # type: ignore[misc]  # diskcache has no types
    """Stores str keys and bytes values and refuses everything else, so that nothing is ever unpickled.

    Use ``diskcache.Cache(folder, disk=BytesDisk)`` to inspect a folder of this backend safely. diskcache then makes its
    triggers, which count from that moment; ``cache.check(fix=True)`` counts everything. Leases are not in its table.
    """

    def __init__(self, directory: str, **settings: Any) -> None:
        super().__init__(directory, min_file_size=ALWAYS_INLINE)

    def put(self, key: object) -> tuple[StoredKey, Literal[True]]:
        """Return the values of the columns ``key`` and ``raw`` for a key."""
        if type(key) is not str:
            raise TypeError(f"key must be a str, got {type(key).__name__}")
        form, stored = encode_key(key)
        # Leases are not in diskcache's table. As text, a lease is not found there.
        return key if form is Form.LEASE else stored, True

    def get(self, key: object, raw: object) -> str:
        """Return the key from its columns."""
        if type(key) is str and raw:
            return key
        if type(key) is bytes and len(key) == STORED_BYTES and raw:
            return decode_key(Form.ENTRY, key)
        _refuse("key")

    def store(self, value: object, read: bool, key: object = None) -> tuple[Literal[0], Literal[1], None, memoryview]:
        """Return the values of the columns ``size``, ``mode``, ``filename`` and ``value`` for a value."""
        if type(value) is not bytes or read:
            raise TypeError(f"value must be bytes, got {type(value).__name__}")
        if type(key) is str and encode_key(key)[0] is Form.LEASE:
            raise TypeError("a lease cannot be stored through diskcache")
        return 0, MODE_RAW, None, sqlite3.Binary(value)

    def fetch(self, mode: int, filename: str | None, value: object, read: bool) -> bytes:
        """Return the value from its columns."""
        if mode != MODE_RAW or filename is not None or type(value) is not bytes or read:
            _refuse("value")
        return value

    def remove(self, file_path: str) -> None:
        """Do nothing, because no value is stored in a file of its own.

        If this method removed files, a planted file name could make it delete any file.
        """


def _refuse(column: str) -> NoReturn:
    raise ValueError(f"embedonce did not write this {column}; refusing to read it")


class Layout(diskcache.Cache):  # type: ignore[misc]  # diskcache has no types
    """Makes diskcache's tables and triggers through the backend's own connection.

    The backend reads and writes entries with its own SQL, and not with the methods of ``diskcache.Cache``.
    """

    def __init__(self, folder: Path, connection: Connection, settings: Mapping[str, Any]) -> None:
        self._connection = connection
        super().__init__(str(folder), disk=BytesDisk, **settings)

    @property
    def _con(self) -> Connection:
        return self._connection

    @property
    def _sql_retry(self) -> Callable[..., sqlite3.Cursor]:
        return lambda statement, *values: retry_while_locked(lambda: self._connection.execute(statement, *values))

    def reset(self, key: str, value: Any = diskcache.ENOVAL, update: bool = True) -> Any:
        """Store a setting, but ignore the settings of pragmas, because the backend sets the pragmas itself."""
        if key.startswith("sqlite_"):
            return value
        return super().reset(key, value, update)

    def close(self) -> None:
        """Do nothing, because the connection belongs to the caller."""
