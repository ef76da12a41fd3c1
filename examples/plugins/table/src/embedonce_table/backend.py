"""A tier that keeps its frames in one SQLite table."""

import math
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Annotated

from embedonce import hookimpl
from embedonce.contracts import Capabilities
from embedonce.options import Doc

api = 1

PAGE = 500
"""Keys of a scan that are read at once."""


class TableBackend:
    capabilities = Capabilities(scope="host", delete=True, scan=True, ttl=True, add=True)

    def __init__(self, *, path: Annotated[Path, Doc("The database; made where it is not there.")]) -> None:
        self.path = path
        self.clock: Callable[[], float] = time.time
        self._closed = False
        with self._connected() as table:
            table.execute("CREATE TABLE IF NOT EXISTS frames (key TEXT PRIMARY KEY, frame BLOB, expires REAL)")
            table.execute("CREATE INDEX IF NOT EXISTS due ON frames (expires)")

    @contextmanager
    def _connected(self) -> Iterator[sqlite3.Connection]:
        if self._closed:
            raise RuntimeError("this backend is closed")
        with closing(sqlite3.connect(self.path, timeout=30)) as connection, connection:
            yield connection

    def get_many(self, keys: Sequence[str], /) -> dict[str, bytes]:
        marks = ", ".join("?" * len(keys))
        asked = f"SELECT key, frame FROM frames WHERE key IN ({marks}) AND expires > ?"
        with self._connected() as table:
            return dict(table.execute(asked, [*keys, self.clock()]))

    def set_many(self, items: Mapping[str, bytes], ttl: float | None, /) -> None:
        self._store("INSERT OR REPLACE", items, ttl)

    def add_many(self, items: Mapping[str, bytes], ttl: float | None, /) -> set[str]:
        return self._store("INSERT OR IGNORE", items, ttl)

    def _store(self, insert: str, items: Mapping[str, bytes], ttl: float | None) -> set[str]:
        now = self.clock()
        ends = math.inf if ttl is None else now + ttl
        stored = set()
        with self._connected() as table:
            table.execute("DELETE FROM frames WHERE expires <= ?", [now])
            for key, frame in items.items():
                values = (key, frame, ends)
                stored.update(table.execute(f"{insert} INTO frames VALUES (?, ?, ?) RETURNING key", values).fetchall())
        return {key for (key,) in stored}

    def delete_many(self, keys: Sequence[str], /) -> None:
        with self._connected() as table:
            table.executemany("DELETE FROM frames WHERE key = ?", [(key,) for key in keys])

    def scan(self, prefix: str, /) -> Iterator[str]:
        start = prefix
        while True:
            with self._connected() as table:
                page = table.execute("SELECT key FROM frames WHERE key >= ? ORDER BY key LIMIT ?", [start, PAGE])
                keys = [key for (key,) in page]
            for key in keys:
                if not key.startswith(prefix):
                    return
                yield key
            if len(keys) < PAGE:
                return
            start = keys[-1] + "\0"

    def close(self) -> None:
        self._closed = True


@hookimpl
def embedonce_backends() -> Mapping[str, type]:
    return {"table": TableBackend}
