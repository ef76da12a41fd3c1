"""The stores that growth.py compares: the disk tier, minimal tables of SQLite, LMDB, RocksDB and diskcache.

The raw stores get keys of 32 bytes, the digests of embedonce's keys. They do only what a cache cannot do without: no
TTL, no size limit, no counters. None of the stores waits for the disk after a write; a killed process loses nothing.
"""

from __future__ import annotations

import importlib.util
import sqlite3
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, ClassVar

from embedonce_backends.disk import DiskBackend

MAX_BYTES = 2**40
"""Size limit of the stores that have one, so that none of them evicts."""
LOG_FILES = ("-wal", "-shm")
CACHE_KIB = 16_384
"""Page cache of each SQLite connection, in KiB."""

sys.path.insert(0, str(Path(__file__).parent.parent / "examples" / "plugins" / "lmdb" / "src"))


class Store:
    """A store under test. ``make_key`` runs outside the timed parts."""

    name: ClassVar[str]
    requires: ClassVar[str] = ""
    """The module that the store requires; "" if it is always there."""
    is_sqlite: ClassVar[bool] = False
    """Whether the store's file is a database of SQLite."""
    has_threads: ClassVar[bool] = False
    """Whether the store works in threads of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()

    def make_key(self, digest: bytes) -> Any:
        return digest

    def set_many(self, items: Mapping[Any, bytes]) -> None:
        raise NotImplementedError

    def get_many(self, keys: Sequence[Any]) -> Mapping[Any, bytes]:
        raise NotImplementedError

    def get(self, key: Any) -> bytes:
        raise NotImplementedError

    def settle(self) -> None:
        """Wait until the work that the store does in its own threads has ended."""

    def close(self) -> None:
        raise NotImplementedError

    def count_bytes(self) -> int:
        """Return the bytes that the store's files take. Entries in a log of SQLite count as those in the file."""
        files = [file for file in self.folder.rglob("*") if file.is_file() and not file.name.endswith(LOG_FILES)]
        return sum(map(_count_pages if self.is_sqlite else _count_blocks, files))


def _count_blocks(file: Path) -> int:
    found = file.stat()
    return min(found.st_size, found.st_blocks * 512)


def _count_pages(file: Path) -> int:
    with closing(sqlite3.connect(file)) as connection:
        ((pages,),), ((size,),) = (connection.execute(f"PRAGMA {name}") for name in ("page_count", "page_size"))
        return int(pages * size)


class DiskTier(Store):
    name = "**disk tier**"
    is_sqlite = True

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.backend: Any = self.make_backend()
        self.get_many = self.backend.get_many
        self.get = self.backend.get
        self.close = self.backend.close

    def make_backend(self) -> Any:
        return DiskBackend(path=self.folder, max_bytes=MAX_BYTES)

    def make_key(self, digest: bytes) -> str:
        return f"eo1.0123456789abcdef.{digest.hex()}"

    def set_many(self, items: Mapping[Any, bytes]) -> None:
        self.backend.set_many(items, None)


class LmdbTier(DiskTier):
    name = "lmdb plugin, sync = false"
    requires = "lmdb"
    is_sqlite = False

    def make_backend(self) -> Any:
        from embedonce_lmdb.backend import LmdbBackend

        return LmdbBackend(path=self.folder, max_bytes=MAX_BYTES, sync=False)


class MinimalSqlite(Store):
    """A table of keys and values, with one index and without triggers."""

    is_sqlite = True
    page_bytes: ClassVar[int]

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.connection = sqlite3.connect(folder / "minimal.db", isolation_level=None)
        for pragma in (
            f"page_size = {self.page_bytes}",
            "journal_mode = WAL",
            "synchronous = NORMAL",
            f"cache_size = -{CACHE_KIB}",
        ):
            self.connection.execute(f"PRAGMA {pragma}")
        self.connection.execute("CREATE TABLE t (key BLOB NOT NULL UNIQUE, value BLOB NOT NULL)")
        self.close = self.connection.close

    def set_many(self, items: Mapping[Any, bytes]) -> None:
        self.connection.execute("BEGIN IMMEDIATE")
        self.connection.executemany("INSERT INTO t VALUES (?, ?)", items.items())
        self.connection.execute("COMMIT")

    def get_many(self, keys: Sequence[Any]) -> Mapping[Any, bytes]:
        marks = ",".join("?" * len(keys))
        return dict(self.connection.execute(f"SELECT key, value FROM t WHERE key IN ({marks})", keys))

    def get(self, key: Any) -> bytes:
        value: bytes = self.connection.execute("SELECT value FROM t WHERE key = ?", (key,)).fetchone()[0]
        return value


class MinimalSqlite8(MinimalSqlite):
    name = "minimal SQLite, 8 KiB pages"
    page_bytes = 8192


class MinimalSqlite16(MinimalSqlite):
    name = "minimal SQLite, 16 KiB pages"
    page_bytes = 16_384


class Lmdb(Store):
    name = "LMDB"
    requires = "lmdb"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        import lmdb

        self.handle = lmdb.open(str(folder), map_size=MAX_BYTES, sync=False, metasync=False, readahead=False)
        self.close = self.handle.close

    def set_many(self, items: Mapping[Any, bytes]) -> None:
        with self.handle.begin(write=True) as transaction:
            for key, value in items.items():
                transaction.put(key, value)

    def get_many(self, keys: Sequence[Any]) -> Mapping[Any, bytes]:
        with self.handle.begin() as transaction:
            get = transaction.get
            return {key: value for key in keys if (value := get(key)) is not None}

    def get(self, key: Any) -> bytes:
        with self.handle.begin() as transaction:
            value: bytes = transaction.get(key)
            return value


class RocksDb(Store):
    name = "RocksDB"
    requires = "rocksdict"
    has_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        import rocksdict

        self.write_batch = rocksdict.WriteBatch
        self.database: Any = rocksdict.Rdict(str(folder), rocksdict.Options(raw_mode=True))
        self.close = self.database.close

    def set_many(self, items: Mapping[Any, bytes]) -> None:
        batch = self.write_batch(raw_mode=True)
        for key, value in items.items():
            batch.put(key, value)
        self.database.write(batch)

    def get_many(self, keys: Sequence[Any]) -> Mapping[Any, bytes]:
        found = zip(keys, self.database.get(list(keys)), strict=True)
        return {key: value for key, value in found if value is not None}

    def get(self, key: Any) -> bytes:
        value: bytes = self.database.get(key)
        return value

    def settle(self) -> None:
        work = ("mem-table-flush-pending", "num-running-flushes", "compaction-pending", "num-running-compactions")
        while any(self.database.property_int_value(f"rocksdb.{name}") for name in work):
            time.sleep(0.001)


class Diskcache(Store):
    """diskcache with one transaction per batch, and with bytes as keys and values, so that it pickles nothing."""

    name = "diskcache"
    requires = "diskcache"
    is_sqlite = True

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        import diskcache

        self.cache = diskcache.Cache(str(folder), size_limit=MAX_BYTES)
        self.get: Callable[[Any], Any] = self.cache.get
        self.close = self.cache.close

    def set_many(self, items: Mapping[Any, bytes]) -> None:
        with self.cache.transact():
            for key, value in items.items():
                self.cache.set(key, value)

    def get_many(self, keys: Sequence[Any]) -> Mapping[Any, bytes]:
        return {key: value for key in keys if (value := self.cache.get(key)) is not None}


STORES: Sequence[type[Store]] = (DiskTier, MinimalSqlite8, MinimalSqlite16, Lmdb, LmdbTier, RocksDb, Diskcache)
FULL_STORES: Sequence[type[Store]] = (DiskTier, MinimalSqlite16)
"""The stores that grow to 10,000,000 entries with ``--full``."""
BYTES_PER_ENTRY = 4000
"""The most that an entry of 1,600 bytes takes in one of the stores, with room for logs and compactions."""


def find_missing(store: type[Store]) -> bool:
    """Return whether the module that a store requires is missing."""
    return bool(store.requires) and importlib.util.find_spec(store.requires) is None
