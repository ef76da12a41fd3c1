"""Time the disk backend without the engine, in µs per text, and compare it with one SELECT … IN and with diskcache.

Run: python benchmarks/disk_tier.py [--entries N] [--dimensions D] [--repeats R]

All stores run in turn, repeat by repeat. The quickest repeat counts, because other load on the machine only adds time.
The frames stay bytes; run.py and frames.py measure what the engine's checks cost.
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
    """A table without TTL, size limit and counters."""

    name = "SELECT … IN over a plain table"

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
    """diskcache as in tutorials, but with bytes as values, so that it pickles nothing."""

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


def split_chunks(keys: Sequence[str]) -> Iterator[Sequence[str]]:
    for start in range(0, len(keys), CHUNK):
        yield keys[start : start + CHUNK]


def measure(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def read(store: Any, keys: Sequence[str]) -> None:
    if sum(len(store.get_many(chunk)) for chunk in split_chunks(keys)) != len(keys):
        raise RuntimeError(f"{store.name} did not return all stored keys")


def read_singly(store: Any, keys: Sequence[str]) -> None:
    for key in keys:
        store.get(key)


def write(store: Any, batches: Sequence[Mapping[str, bytes]]) -> None:
    for batch in batches:
        store.set_many(batch)


def measure_quickest(stores: Sequence[Any], call: Callable[[Any], object], repeats: int, texts: int) -> list[float]:
    """Return µs per text of each store's quickest repeat."""
    times: list[list[float]] = [[] for _ in stores]
    for _ in range(repeats):
        for index, store in enumerate(stores):
            times[index].append(measure(lambda store=store: call(store)))  # type: ignore[misc]
    return [min(each) / texts * 1e6 for each in times]


def make_key(number: int) -> str:
    return f"eo1.0123456789abcdef.{hashlib.sha256(b'%d' % number).hexdigest()}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--entries", type=int, default=20_000, help="number of entries stored before the reads")
    parser.add_argument("--dimensions", type=int, default=384)
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    size = HEADER + 4 * options.dimensions
    frames = [os.urandom(size) for _ in range(1000)]
    keys = [make_key(number) for number in range(options.entries)]
    batches = [{key: frames[index % 1000] for index, key in enumerate(chunk)} for chunk in split_chunks(keys)]
    requested = random.Random(1).sample(keys, min(READ, len(keys)))

    with tempfile.TemporaryDirectory() as folder:
        stores: list[Any] = [made(Path(folder)) for made in (Floor, Loop, Transaction, Embedonce, Evicting)]
        for store in stores:
            write(store, [{"opened": frames[0]}])
        first = [measure(lambda store=store: write(store, batches)) / len(keys) * 1e6 for store in stores]  # type: ignore[misc]
        again = measure_quickest(stores, lambda store: write(store, batches[:8]), options.repeats, 8 * CHUNK)
        readers = stores[:-1]
        batch = measure_quickest(readers, lambda store: read(store, requested), options.repeats, len(requested))
        single = measure_quickest(readers, lambda store: read_singly(store, requested), options.repeats, len(requested))

    print(f"{len(keys)} entries of {size} bytes; {len(requested)} read in random order by {CHUNK}; µs per text\n")
    print("| store | read a batch | against the loop | read singly | write new | write again |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for index, store in enumerate(stores):
        reads = " |  | "
        if index < len(readers):
            reads = f"{batch[index]:.1f} | {batch[index] / batch[1]:.2f} | {single[index]:.1f}"
        print(f"| {store.name} | {reads} | {first[index]:.1f} | {again[index]:.1f} |")


if __name__ == "__main__":
    main()
