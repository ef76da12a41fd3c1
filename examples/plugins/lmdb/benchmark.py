"""Time the lmdb backend beside the disk tier and a loop over diskcache, in µs per text.

Run: python benchmark.py [--entries N] [--dimensions D ...] [--repeats R]

All stores run in turn in each repeat, and the fastest repeat counts. "8 processes" is the time in which eight processes
that start together have each read all requested entries, divided by the number of all their reads.
"""

from __future__ import annotations

import argparse
import hashlib
import multiprocessing
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from threading import Barrier
from typing import Any

import diskcache
from embedonce_lmdb._names import encode_keys
from embedonce_lmdb.backend import HEADER, LmdbBackend

from embedonce_backends.disk import DiskBackend

CHUNK = 256
READ = 2000
PROCESSES = 8
FRAME_HEADER = 64


class Diskcache:
    """diskcache as tutorials use it, with bytes as values so that nothing is pickled."""

    def __init__(self, folder: Path) -> None:
        self.cache = diskcache.Cache(str(folder / "diskcache"), size_limit=2**34)
        self.get: Callable[[str], Any] = self.cache.get

    def get_many(self, keys: Sequence[str]) -> Mapping[str, bytes]:
        found = {key: self.cache.get(key) for key in keys}
        return {key: value for key, value in found.items() if value is not None}

    def set_many(self, items: Mapping[str, bytes], ttl: float | None) -> None:
        for key, value in items.items():
            self.cache.set(key, value)


def make_lmdb(folder: Path) -> Any:
    return LmdbBackend(path=folder / "lmdb")


def make_lmdb_without_sync(folder: Path) -> Any:
    return LmdbBackend(path=folder / "lmdb-without", sync=False)


def make_disk(folder: Path) -> Any:
    return DiskBackend(path=folder / "disk")


STORES: Mapping[str, Callable[[Path], Any]] = {
    "lmdb": make_lmdb,
    "lmdb, sync = false": make_lmdb_without_sync,
    "disk tier": make_disk,
    "diskcache": Diskcache,
}


def key_of(number: int) -> str:
    return f"eo1.0123456789abcdef.{hashlib.sha256(b'%d' % number).hexdigest()}"


def split(keys: Sequence[str]) -> Iterator[Sequence[str]]:
    for start in range(0, len(keys), CHUNK):
        yield keys[start : start + CHUNK]


def read(store: Any, keys: Sequence[str], found: bool = True) -> None:
    if sum(len(store.get_many(chunk)) for chunk in split(keys)) != len(keys) * found:
        raise RuntimeError("the store did not return what it should")


def read_views(store: LmdbBackend, keys: Sequence[str]) -> None:
    """Read in the same way as the backend, but without copying. The views are invalid afterwards."""
    for chunk in split(keys):
        opened = store._shared._opened
        assert opened is not None
        with opened.handle.begin(buffers=True) as transaction:
            views = {name: transaction.get(name, None, opened.frames) for name in encode_keys(chunk)}
            assert all(view[:8] for view in views.values() if view is not None)


def read_singly(store: Any, keys: Sequence[str]) -> None:
    for key in keys:
        store.get(key)


def write(store: Any, batches: Sequence[Mapping[str, bytes]]) -> None:
    for batch in batches:
        store.set_many(batch, None)


def run_reader(name: str, folder: Path, keys: Sequence[str], begin: Barrier, end: Barrier) -> None:
    store = STORES[name](folder)
    read(store, keys)
    begin.wait()
    read(store, keys)
    end.wait()


def time_processes(name: str, folder: Path, keys: Sequence[str]) -> float:
    """Return the µs per text if eight processes read at once."""
    spawn = multiprocessing.get_context("spawn")
    begin, end = spawn.Barrier(PROCESSES + 1), spawn.Barrier(PROCESSES + 1)
    readers = [spawn.Process(target=run_reader, args=(name, folder, keys, begin, end)) for _ in range(PROCESSES)]
    for process in readers:
        process.start()
    begin.wait()
    start = time.perf_counter()
    end.wait()
    took = time.perf_counter() - start
    for process in readers:
        process.join()
    return took / (PROCESSES * len(keys)) * 1e6


def time_call(call: Callable[[], object]) -> float:
    """Return the seconds that a call takes."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def measure(folder: Path, entries: int, dimensions: int, repeats: int) -> None:
    size = FRAME_HEADER + 4 * dimensions
    frames = [os.urandom(size) for _ in range(1000)]
    keys = [key_of(number) for number in range(entries)]
    batches = [{key: frames[i % 1000] for i, key in enumerate(chunk)} for chunk in split(keys)]
    requested = random.Random(1).sample(keys, min(READ, entries))
    absent = [key_of(entries + number) for number in range(len(requested))]
    stores = {name: make(folder) for name, make in STORES.items()}
    rows: dict[str, list[float]] = {}

    def add_row(row: str, call: Callable[[Any], object], times: int, texts: int) -> None:
        best = dict.fromkeys(stores, float("inf"))
        for _ in range(times):
            for name, store in stores.items():
                best[name] = min(best[name], time_call(lambda store=store: call(store)))  # type: ignore[misc]
        rows[row] = [best[name] / texts * 1e6 for name in stores]

    for store in stores.values():
        write(store, [{"opened": frames[0]}])
    add_row("write, new", lambda store: write(store, batches), 1, entries)
    add_row("write, again", lambda store: write(store, batches[:8]), repeats, 8 * CHUNK)
    add_row("batch hit", lambda store: read(store, requested), repeats, len(requested))
    add_row("batch miss", lambda store: read(store, absent, found=False), repeats, len(absent))
    add_row("single hit", lambda store: read_singly(store, requested), repeats, len(requested))
    rows[f"batch hit, {PROCESSES} processes"] = [
        min(time_processes(name, folder, requested) for _ in range(max(1, repeats // 3))) for name in stores
    ]
    views = min(time_call(lambda: read_views(stores["lmdb"], requested)) for _ in range(repeats))
    views *= 1e6 / len(requested)

    print(f"\n{entries} entries, {dimensions} dimensions ({size} bytes), batches of {CHUNK}; µs per text\n")
    print(f"| | {' | '.join(stores)} | lmdb / disk tier |")
    print(f"| --- |{' ---: |' * (len(stores) + 1)}")
    for row, times in rows.items():
        print(f"| {row} | {' | '.join(f'{each:.1f}' for each in times)} | {times[0] / times[2]:.2f} |")
    print(f"\nA batch hit without the copy out of the map: {views:.1f} (each has {HEADER} bytes before its frame)")
    for store in stores.values():
        getattr(store, "cache", store).close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--entries", type=int, default=20_000, help="stored before reading begins")
    parser.add_argument("--dimensions", type=int, nargs="+", default=[384, 1536])
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    for dimensions in options.dimensions:
        with tempfile.TemporaryDirectory() as folder:
            measure(Path(folder), options.entries, dimensions, options.repeats)


if __name__ == "__main__":
    main()
