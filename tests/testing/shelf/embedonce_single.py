"""A store for one process at a time: SQLite with an exclusive lock, as DuckDB and some modes of LMDB have it.

Three of its variants are broken, each in one way.
"""

from __future__ import annotations

import os
import sqlite3
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from embedonce.contracts import Capabilities


class SingleBackend:
    """Holds frames in a file that only one process at a time can open."""

    capabilities = Capabilities(
        scope="single", fork=False, ttl=True, get=True, delete=True, scan=True, count=True, add=True
    )

    def __init__(self, *, path: Path) -> None:
        self.path = path
        path.mkdir(parents=True, exist_ok=True)
        self.clock: Callable[[], float] = time.time
        self._pid = os.getpid()
        self._lock = threading.RLock()
        self._connection: sqlite3.Connection | None = self._open()

    def _open(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self.path / "single.db", isolation_level=None, check_same_thread=False, timeout=5)
        connection.execute("PRAGMA locking_mode = EXCLUSIVE")
        connection.execute("CREATE TABLE IF NOT EXISTS entries (key TEXT PRIMARY KEY, value BLOB, expires REAL)")
        connection.execute("BEGIN EXCLUSIVE")  # from here on, the connection keeps the lock until it is closed
        connection.execute("COMMIT")
        return connection

    def _run(self, sql: str, *rows: Sequence[object]) -> list[tuple]:
        if self._connection is None or self._pid != os.getpid():
            raise RuntimeError("the store is closed, or belongs to the parent of this process")
        with self._lock:
            self._connection.execute("BEGIN")
            try:
                return [row for values in rows for row in self._connection.execute(sql, values).fetchall()]
            finally:
                self._connection.execute("COMMIT")

    def get(self, key: str) -> bytes | None:
        return self.get_many([key]).get(key)

    def get_many(self, keys: Sequence[str]) -> dict[str, bytes]:
        now = self.clock()
        sql = "SELECT key, value FROM entries WHERE key = ? AND (expires IS NULL OR expires > ?)"
        return dict(self._run(sql, *((key, now) for key in keys)))

    def set_many(self, items: Mapping[str, bytes], ttl: float | None) -> None:
        expires = None if ttl is None else self.clock() + ttl
        self._run("INSERT OR REPLACE INTO entries VALUES (?, ?, ?)", *((key, items[key], expires) for key in items))

    def add_many(self, items: Mapping[str, bytes], ttl: float | None) -> set[str]:
        with self._lock:
            new = {key: items[key] for key in items.keys() - self.get_many(list(items)).keys()}
            self.set_many(new, ttl)
        return set(new)

    def delete_many(self, keys: Sequence[str]) -> None:
        self._run("DELETE FROM entries WHERE key = ?", *((key,) for key in keys))

    def scan(self, prefix: str) -> list[str]:
        sql = "SELECT key FROM entries WHERE substr(key, 1, ?) = ? AND (expires IS NULL OR expires > ?) ORDER BY key"
        return [key for (key,) in self._run(sql, (len(prefix), prefix, self.clock()))]

    def count(self, prefix: str) -> int:
        return len(self.scan(prefix))

    def close(self) -> None:
        # In a forked child, closing the inherited connection could release the parent's lock.
        if self._connection is not None and self._pid == os.getpid():
            with self._lock:
                self._connection.close()
                self._connection = None


class ForgetsWhenClosedBackend(SingleBackend):
    """Declares scope `single`, but deletes its entries in `close`."""

    def close(self) -> None:
        if self._connection is not None:
            self._run("DELETE FROM entries", ())
        super().close()


class KeepsItsLockBackend(SingleBackend):
    """Declares scope `single`, but does not release its lock in `close`, so no other process can open the store."""

    kept: list[sqlite3.Connection] = []  # noqa: RUF012  (shared on purpose)

    def close(self) -> None:
        if self._connection is not None:
            self.kept.append(self._connection)
            self._connection = None


class CommitsRarelyBackend(SingleBackend):
    """Declares scope `single`, but commits only in `close`, so a killed process loses what it has stored."""

    def _open(self) -> sqlite3.Connection:
        connection = super()._open()
        connection.execute("CREATE TEMP TABLE late (key TEXT PRIMARY KEY, value BLOB, expires REAL)")
        return connection

    def set_many(self, items: Mapping[str, bytes], ttl: float | None) -> None:
        expires = None if ttl is None else self.clock() + ttl
        self._run("INSERT OR REPLACE INTO late VALUES (?, ?, ?)", *((key, items[key], expires) for key in items))

    def get_many(self, keys: Sequence[str]) -> dict[str, bytes]:
        return super().get_many(keys) | dict(
            self._run("SELECT key, value FROM late WHERE key = ?", *((key,) for key in keys))
        )

    def close(self) -> None:
        if self._connection is not None:
            self._run("INSERT OR REPLACE INTO entries SELECT * FROM late", ())
        super().close()
