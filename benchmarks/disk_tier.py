"""Time the disk backend alone, in µs per text, beside one SELECT … IN per batch and loops over diskcache.

Run: python benchmarks/disk_tier.py [--entries N] [--dimensions D] [--repeats R]

Everything runs in turn, repeat by repeat, and the quickest counts: what else the machine does only ever adds.
The frames stay bytes: what the engine adds for its checks is in run.py and frames.py.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import sqlite3
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import diskcache

from embedonce_backends.disk import DiskBackend

CHUNK = 256
READ = 2000
HEADER = 64


class Floor:
    """A table made for this alone: no ttl, no bound, no counters."""

    name = "SELECT … IN over a table of its own"

    def __init__(self, folder: Path) -> None:
        self.connection = sqlite3.connect(folder / "floor.db", isolation_level=None)
        for pragma in ("page_size = 8192", "journal_mode = WAL", "synchronous = NORMAL"):
            self.connection.execute(f"PRAGMA {pragma}")
        self.connection.execute("CREATE TABLE t (key TEXT NOT NULL UNIQUE, value BLOB NOT NULL)")

    def get_many(self, keys: Sequence[str]) -> Mapping[str, bytes]:
        marks = ",".join("?" * len(keys))
        return dict(self.connection.execute(f"SELECT key, value FROM t WHERE key IN ({marks})", keys))

    def get(self, key: str) -> bytes | None:
        return self.connection.execute("SELECT value FROM t WHERE key = ?", (key,)).fetchone()[0]  # type: ignore[no-any-return]

    def set_many(self, items: Mapping[str, bytes]) -> None:
        self.connection.execute("BEGIN IMMEDIATE")
        self.connection.executemany("INSERT OR REPLACE INTO t VALUES (?, ?)", list(items.items()))
        self.connection.execute("COMMIT")


class Loop:
    """diskcache as tutorials use it, with bytes as values so that nothing is pickled."""

    name = "a loop of diskcache.get and set"

    def __init__(self, folder: Path) -> None:
        self.cache = diskcache.Cache(str(folder / "loop"), size_limit=2**34)

    def get_many(self, keys: Sequence[str]) -> Mapping[str, bytes]:
        return {key: self.cache.get(key) for key in keys}

    def get(self, key: str) -> Any:
        return self.cache.get(key)

    def set_many(self, items: Mapping[str, bytes]) -> None:
        for key, value in items.items():
            self.cache.set(key, value)


class Transaction(Loop):
    name = "the same in one transaction per batch"

    def __init__(self, folder: Path) -> None:
        self.cache = diskcache.Cache(str(folder / "transaction"), size_limit=2**34)

    def get_many(self, keys: Sequence[str]) -> Mapping[str, bytes]:
        with self.cache.transact():
            return super().get_many(keys)

    def set_many(self, items: Mapping[str, bytes]) -> None:
        with self.cache.transact():
            super().set_many(items)


class Embedonce:
    name = "**DiskBackend**"

    def __init__(self, folder: Path, name: str = "embedonce", max_bytes: int = 2**34) -> None:
        self.backend = DiskBackend(path=folder / name, max_bytes=max_bytes)
        self.get_many = self.backend.get_many
        self.get = self.backend.get

    def set_many(self, items: Mapping[str, bytes]) -> None:
        self.backend.set_many(items, None)


class Evicting(Embedonce):
    name = "**DiskBackend**, full: each write evicts"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, "evicting", 16 * 2**20)


def chunks(keys: Sequence[str]) -> Iterator[Sequence[str]]:
    for start in range(0, len(keys), CHUNK):
        yield keys[start : start + CHUNK]


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def read(store: Any, keys: Sequence[str]) -> None:
    if sum(len(store.get_many(chunk)) for chunk in chunks(keys)) != len(keys):
        raise RuntimeError(f"{store.name} does not give back what was stored")


def read_singly(store: Any, keys: Sequence[str]) -> None:
    for key in keys:
        store.get(key)


def write(store: Any, batches: Sequence[Mapping[str, bytes]]) -> None:
    for batch in batches:
        store.set_many(batch)


def quickest(stores: Sequence[Any], call: Callable[[Any], object], repeats: int, texts: int) -> list[float]:
    """Return µs per text of each store's quickest repeat."""
    times: list[list[float]] = [[] for _ in stores]
    for _ in range(repeats):
        for at, store in enumerate(stores):
            times[at].append(seconds(lambda store=store: call(store)))  # type: ignore[misc]
    return [min(each) / texts * 1e6 for each in times]


def key_of(number: int) -> str:
    return f"eo1.0123456789abcdef.{hashlib.sha256(b'%d' % number).hexdigest()}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--entries", type=int, default=20_000, help="stored before reading begins")
    parser.add_argument("--dimensions", type=int, default=384)
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    size = HEADER + 4 * options.dimensions
    frames = [os.urandom(size) for _ in range(1000)]
    keys = [key_of(number) for number in range(options.entries)]
    batches = [{key: frames[at % 1000] for at, key in enumerate(chunk)} for chunk in chunks(keys)]
    asked = random.Random(1).sample(keys, min(READ, len(keys)))

    with tempfile.TemporaryDirectory() as folder:
        stores: list[Any] = [made(Path(folder)) for made in (Floor, Loop, Transaction, Embedonce, Evicting)]
        for store in stores:
            write(store, [{"opened": frames[0]}])
        first = [seconds(lambda store=store: write(store, batches)) / len(keys) * 1e6 for store in stores]  # type: ignore[misc]
        again = quickest(stores, lambda store: write(store, batches[:8]), options.repeats, 8 * CHUNK)
        readers = stores[:-1]
        batch = quickest(readers, lambda store: read(store, asked), options.repeats, len(asked))
        single = quickest(readers, lambda store: read_singly(store, asked), options.repeats, len(asked))

    print(f"{len(keys)} entries of {size} bytes; {len(asked)} read in random order, batches of {CHUNK}; µs per text\n")
    print("| store | read a batch | against the loop | read singly | write new | write again |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for at, store in enumerate(stores):
        reads = f"{batch[at]:.1f} | {batch[at] / batch[1]:.2f} | {single[at]:.1f}" if at < len(readers) else " |  | "
        print(f"| {store.name} | {reads} | {first[at]:.1f} | {again[at]:.1f} |")


if __name__ == "__main__":
    main()
