"""A backend with one file per key, as a first plugin may look. Other processes can import it."""

from __future__ import annotations

import json
import os
import sqlite3
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path

from embedonce.contracts import Capabilities


class ShelfBackend:
    """Holds frames as files in a folder."""

    capabilities = Capabilities(scope="host", delete=True, scan=True, add=True)

    def __init__(self, *, path: str) -> None:
        self.path = path
        self._folder: Path | None = Path(path)

    @property
    def folder(self) -> Path:
        if self._folder is None:
            raise RuntimeError("this backend is closed")
        return self._folder

    def get_many(self, keys: Sequence[str], /) -> Mapping[str, bytes]:
        folder, found = self.folder, {}
        for key in keys:
            try:
                found[key] = (folder / key).read_bytes()
            except FileNotFoundError:
                continue
        return found

    def set_many(self, items: Mapping[str, bytes], ttl: float | None, /) -> None:
        for key, frame in items.items():
            os.replace(self._write_temporary(frame), self.folder / key)

    def add_many(self, items: Mapping[str, bytes], ttl: float | None, /) -> set[str]:
        added = set()
        for key, frame in items.items():
            written = self._write_temporary(frame)
            try:
                os.link(written, self.folder / key)
            except FileExistsError:
                continue
            else:
                added.add(key)
            finally:
                os.unlink(written)
        return added

    def delete_many(self, keys: Sequence[str], /) -> None:
        for key in keys:
            (self.folder / key).unlink(missing_ok=True)

    def scan(self, prefix: str, /) -> Iterator[str]:
        for name in os.listdir(self.folder):
            if name.startswith(prefix) and not name.endswith("~"):
                yield name

    def close(self) -> None:
        self._folder = None

    def _write_temporary(self, frame: bytes) -> str:
        """Write a frame to a temporary file and return its path; the name ends with ~, which no key does."""
        handle, name = tempfile.mkstemp("~", dir=self.folder)
        with open(handle, "wb") as file:
            file.write(frame)
        return name


class HashingShelfBackend(ShelfBackend):
    """Names its files by Python's `hash()`, which differs in every process."""

    def get_many(self, keys: Sequence[str], /) -> Mapping[str, bytes]:
        found = super().get_many([f"eo1.{hash(key)}" for key in keys])
        return {key: found[name] for key in keys if (name := f"eo1.{hash(key)}") in found}

    def set_many(self, items: Mapping[str, bytes], ttl: float | None, /) -> None:
        super().set_many({f"eo1.{hash(key)}": frame for key, frame in items.items()}, ttl)


class WritesInPlaceShelfBackend(ShelfBackend):
    """Writes a value directly into the file of its key, so that a killed writer leaves half of it."""

    def set_many(self, items: Mapping[str, bytes], ttl: float | None, /) -> None:
        for key, frame in items.items():
            with open(self.folder / key, "wb", buffering=0) as file:
                for byte in frame:
                    file.write(bytes([byte]))
                    time.sleep(0.0001)


class ListsWhatIsUnfinishedShelfBackend(ShelfBackend):
    """Lists its unfinished files; those of a killed writer stay for ever."""

    def set_many(self, items: Mapping[str, bytes], ttl: float | None, /) -> None:
        for key, frame in items.items():
            (self.folder / f"{key}.new").write_bytes(frame)
            time.sleep(0.01)
            os.replace(self.folder / f"{key}.new", self.folder / key)


class WritesAtItsEndShelfBackend(ShelfBackend):
    """Collects its entries in memory and writes them in `close`, so that a killed process loses them all."""

    def __init__(self, *, path: str) -> None:
        super().__init__(path=path)
        self._pending: dict[str, bytes] = {}

    def get_many(self, keys: Sequence[str], /) -> Mapping[str, bytes]:
        return {**super().get_many(keys), **{key: self._pending[key] for key in keys if key in self._pending}}

    def set_many(self, items: Mapping[str, bytes], ttl: float | None, /) -> None:
        self._pending.update(items)

    def close(self) -> None:
        if self._folder is not None:
            super().set_many(self._pending, None)
        super().close()


class MovesToANewFolderShelfBackend(ShelfBackend):
    """Moves its entries to a new folder in `compact`, and other clients do not look there."""

    def compact(self) -> str:
        folder = Path(tempfile.mkdtemp("~", dir=self.folder))
        for name in self.scan(""):
            os.replace(self.folder / name, folder / name)
        self._folder = folder
        return "nothing to give back"


class OneConnectionShelfBackend(ShelfBackend):
    """Keeps a SQLite connection with a WAL across a fork: the parent's `close` deletes the file the child writes to."""

    def __init__(self, *, path: str) -> None:
        super().__init__(path=path)
        self._lock = threading.Lock()
        file = self.folder / "all.db"
        self._connection = sqlite3.connect(file, timeout=50, isolation_level=None, check_same_thread=False)
        self._connection.execute("PRAGMA journal_mode = WAL")
        self._connection.execute("CREATE TABLE IF NOT EXISTS Frames (Key TEXT PRIMARY KEY, Frame BLOB)")

    def get_many(self, keys: Sequence[str], /) -> Mapping[str, bytes]:
        question = "SELECT Key, Frame FROM Frames WHERE Key = ?"
        with self._lock:
            return dict(row for key in keys for row in self._connection.execute(question, (key,)))

    def set_many(self, items: Mapping[str, bytes], ttl: float | None, /) -> None:
        with self._lock:
            self._connection.executemany("REPLACE INTO Frames VALUES (?, ?)", list(items.items()))

    def close(self) -> None:
        with self._lock:
            self._connection.close()


_process_lock = threading.Lock()


@cache
def wait_for_other_process(folder: Path) -> None:
    """Wait once in a child process of the kit until a second child process waits here too.

    It makes a race between two processes happen in every run, however late one of them starts.
    """
    if getattr(sys.modules["__main__"].__spec__, "name", "") != "embedonce.testing.contracts.child":
        return
    (folder / f"{os.getpid()}.here~").touch()
    end = time.monotonic() + 50
    while len(list(folder.glob("*.here~"))) < 2 and time.monotonic() < end:
        time.sleep(0.001)


class AddsUnderALockShelfBackend(ShelfBackend):
    """Looks up and stores absent keys under a lock that only its own process knows."""

    def add_many(self, items: Mapping[str, bytes], ttl: float | None, /) -> set[str]:
        with _process_lock:
            absent = {key: frame for key, frame in items.items() if not (self.folder / key).exists()}
            wait_for_other_process(self.folder)
            self.set_many(absent, ttl)
            return set(absent)


class OneFileShelfBackend(ShelfBackend):
    """Reads and rewrites one file under a lock of its process, so that two processes overwrite each other's entries."""

    def get_many(self, keys: Sequence[str], /) -> Mapping[str, bytes]:
        held = self._read_all()
        return {key: held[key] for key in keys if key in held}

    def set_many(self, items: Mapping[str, bytes], ttl: float | None, /) -> None:
        with _process_lock:
            held = {**self._read_all(), **items}
            wait_for_other_process(self.folder)
            whole = json.dumps({key: frame.hex() for key, frame in held.items()})
            os.replace(self._write_temporary(whole.encode()), self.folder / "all")

    def _read_all(self) -> Mapping[str, bytes]:
        try:
            return {key: bytes.fromhex(frame) for key, frame in json.loads((self.folder / "all").read_text()).items()}
        except FileNotFoundError:
            return {}
