"""Measure how the stores on one host grow: 10,000 to 1,000,000 entries, side by side in one run.

    python benchmarks/growth.py                      # about a quarter of an hour, and up to 30 GB in the folder
    python benchmarks/growth.py --full               # up to 10,000,000 entries, in the disk tier and one floor only
    python benchmarks/growth.py --sizes 10000,100000 --plot growth.png

An entry is a frame of 384 dimensions (1,600 bytes) under a random key. A call writes or reads 256 entries. The stores
take turns every few calls, so that other work of the machine slows all of them alike, and each new turn begins with
another store.

CPU time is that of the calling thread; for RocksDB, it is that of the process, from the call until its compactions have
ended. Times of writing are means over the last calls before each size, because some calls pay for many, for example
with a checkpoint. Times of hits are medians.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import os
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from growth_stores import BYTES_PER_ENTRY, FULL_STORES, STORES, Store, find_missing

SIZES = (10_000, 30_000, 100_000, 300_000, 1_000_000)
FULL_SIZES = (*SIZES, 3_000_000, 10_000_000)
BATCH = 256
FRAME_BYTES = 1600
TURN = 16
"""Number of calls that one store makes before the next store's turn."""
MEASURED = 40_000
"""Number of entries before each size whose writes are measured."""
HITS = 128
"""Number of batches that are read at each size."""
SINGLE_HITS = 4096

Span = tuple[float, float]
"""Wall time and CPU time, in seconds."""


@dataclass(frozen=True, slots=True)
class Point:
    """What one store took at one size. Times are in µs per text, except those of a call, in ms."""

    store: str
    entries: int
    bytes_per_entry: float
    write: float
    write_cpu: float
    write_call_p50: float
    write_call_p99: float
    hit: float
    hit_cpu: float
    hit_call_p50: float
    hit_call_p99: float
    single: float
    single_cpu: float


@dataclass(slots=True)
class Times:
    """The spans that one store took for one kind of call at one size."""

    writes: list[Span] = field(default_factory=list)
    hits: list[Span] = field(default_factory=list)
    singles: list[Span] = field(default_factory=list)


def make_digest(number: int) -> bytes:
    """Return the digest of entry ``number``. It is computed again when needed, because ten million take 1 GB."""
    return hashlib.sha256(b"%d" % number).digest()


def measure(store: Store, call: Callable[[], object], spans: list[Span] | None) -> None:
    """Make a call, wait until the store has settled, and record the span."""
    clock = time.process_time if store.has_threads else time.thread_time
    cpu, wall = clock(), time.perf_counter()
    call()
    wall = time.perf_counter() - wall
    store.settle()
    if spans is not None:
        spans.append((wall, clock() - cpu))


def read_singly(store: Store, keys: Sequence[Any]) -> None:
    for key in keys:
        store.get(key)


def take_turns(stores: Sequence[Store]) -> Iterator[Sequence[Store]]:
    """Yield the stores again and again, each time with another one first."""
    while True:
        for first in range(len(stores)):
            yield [*stores[first:], *stores[:first]]


class Growth:
    """Grows the stores together, and measures them at each size."""

    def __init__(self, stores: Sequence[Store], frames: Sequence[bytes]) -> None:
        self._stores = stores
        self._turns = take_turns(stores)
        self._frames = frames
        self._chance = random.Random(1)
        self._entries = 0

    def grow(self, size: int) -> list[Point]:
        """Write entries until there are ``size``, and return what each store took."""
        times = {store.name: Times() for store in self._stores}
        while self._entries < size:
            numbers = range(self._entries, min(size, self._entries + TURN * BATCH))
            is_measured = size - numbers.start <= MEASURED
            digests = [make_digest(number) for number in numbers]
            for store in next(self._turns):
                self._write(store, digests, times[store.name].writes if is_measured else None)
            self._entries = numbers.stop
        for _ in range(-(-HITS // TURN)):
            self._read_batches(times)
        for _ in range(-(-SINGLE_HITS // BATCH)):
            self._read_singly(times)
        return [self._make_point(store, times[store.name]) for store in self._stores]

    def _write(self, store: Store, digests: Sequence[bytes], spans: list[Span] | None) -> None:
        for start in range(0, len(digests), BATCH):
            keys = map(store.make_key, digests[start : start + BATCH])
            items = {key: self._frames[place % len(self._frames)] for place, key in enumerate(keys)}
            is_full = len(items) == BATCH
            measure(store, partial(store.set_many, items), spans if is_full else None)

    def _read_batches(self, times: Mapping[str, Times]) -> None:
        digests = [self._choose_digests(BATCH) for _ in range(TURN)]
        for store in next(self._turns):
            for batch in digests:
                keys = list(map(store.make_key, batch))
                measure(store, partial(store.get_many, keys), times[store.name].hits)
            if len(store.get_many(keys)) != len(set(keys)):
                raise RuntimeError(f"{store.name} did not return all stored entries")

    def _read_singly(self, times: Mapping[str, Times]) -> None:
        digests = self._choose_digests(BATCH)
        for store in next(self._turns):
            keys = list(map(store.make_key, digests))
            measure(store, partial(read_singly, store, keys), times[store.name].singles)

    def _choose_digests(self, count: int) -> list[bytes]:
        return [make_digest(self._chance.randrange(self._entries)) for _ in range(count)]

    def _make_point(self, store: Store, times: Times) -> Point:
        writes, hits, singles = (np.array(spans) for spans in (times.writes, times.hits, times.singles))
        write = 1e6 * writes.mean(0) / BATCH
        hit, single = (1e6 * np.median(spans, 0) / BATCH for spans in (hits, singles))
        write_calls, hit_calls = (1e3 * np.percentile(spans[:, 0], (50, 99)) for spans in (writes, hits))
        return Point(
            store=store.name,
            entries=self._entries,
            bytes_per_entry=store.count_bytes() / self._entries,
            write=write[0],
            write_cpu=write[1],
            write_call_p50=write_calls[0],
            write_call_p99=write_calls[1],
            hit=hit[0],
            hit_cpu=hit[1],
            hit_call_p50=hit_calls[0],
            hit_call_p99=hit_calls[1],
            single=single[0],
            single_cpu=single[1],
        )


# --- output -----------------------------------------------------------------------------------

TABLES: Mapping[str, Callable[[Point], str]] = {
    "Writing new entries, µs per text: CPU (wall)": lambda one: f"{one.write_cpu:.1f} ({one.write:.1f})",
    "Random batch hit, µs per text: CPU (wall)": lambda one: f"{one.hit_cpu:.1f} ({one.hit:.1f})",
    "Single hit, µs: CPU (wall)": lambda one: f"{one.single_cpu:.1f} ({one.single:.1f})",
    "Bytes per entry": lambda one: f"{one.bytes_per_entry:,.0f}",
    "A call that writes 256 entries, ms: p50, p99": lambda one: f"{one.write_call_p50:.1f}, {one.write_call_p99:.1f}",
    "A call that reads 256 entries, ms: p50, p99": lambda one: f"{one.hit_call_p50:.1f}, {one.hit_call_p99:.1f}",
}


def make_tables(points: Sequence[Point]) -> Iterator[str]:
    """Yield the lines of the tables in Markdown, with a row for each store and a column for each size."""
    sizes = sorted({one.entries for one in points})
    found = {(one.store, one.entries): one for one in points}
    for title, describe in TABLES.items():
        yield from (f"| {title} | {' | '.join(f'{size:,}' for size in sizes)} |", f"| --- |{' ---: |' * len(sizes)}")
        for store in dict.fromkeys(one.store for one in points):
            cells = [describe(found[store, size]) if (store, size) in found else "" for size in sizes]
            yield f"| {store} | {' | '.join(cells)} |"
        yield ""


def draw_plot(points: Sequence[Point], file: Path) -> None:
    """Write a plot: CPU time of writing and of a batch hit, and the bytes per entry, over the number of entries."""
    from embedonce.cli.plot import make_figure

    figure = make_figure(11, 3.6)
    panels: Mapping[str, Callable[[Point], float]] = {
        "Writing new entries, µs of CPU per text": lambda one: one.write_cpu,
        "Random batch hit, µs of CPU per text": lambda one: one.hit_cpu,
        "Bytes per entry": lambda one: one.bytes_per_entry,
    }
    for axes, (title, read) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        for store in dict.fromkeys(one.store for one in points):
            line = [one for one in points if one.store == store]
            is_ours = "**" in store
            axes.plot(
                [one.entries for one in line],
                [read(one) for one in line],
                marker="o",
                markersize=4 if is_ours else 3,
                linewidth=2.4 if is_ours else 1.1,
                label=store.strip("*"),
            )
        axes.set_xscale("log")
        axes.set_ylim(bottom=0)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("entries", fontsize=9)
        axes.tick_params(labelsize=8)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    figure.savefig(file, dpi=110)


# --- running ----------------------------------------------------------------------------------


def check_free_space(folder: Path, entries: int, stores: int) -> None:
    """Exit with a message unless the folder has room for the entries of all stores."""
    needed, free = entries * stores * BYTES_PER_ENTRY, shutil.disk_usage(folder).free
    if needed > free:
        raise SystemExit(
            f"{folder} has {free / 1e9:.1f} GB of free space, but {entries:,} entries in {stores} stores need up to "
            f"{needed / 1e9:.1f} GB. Choose smaller --sizes, or another disk with --folder"
        )


@contextmanager
def open_stores(kinds: Sequence[type[Store]], folder: Path) -> Iterator[list[Store]]:
    with ExitStack() as stack:
        stores = []
        for kind in kinds:
            stores.append(kind(folder / kind.__name__))
            stack.callback(stores[-1].close)
        yield stores


def run(kinds: Sequence[type[Store]], sizes: Sequence[int], folder: Path) -> Iterator[list[Point]]:
    """Yield the points of all stores, size by size. The stores are in a temporary folder inside ``folder``."""
    chance = random.Random(2)
    frames = [chance.randbytes(FRAME_BYTES) for _ in range(1000)]
    with tempfile.TemporaryDirectory(prefix="growth-", dir=folder) as own, open_stores(kinds, Path(own)) as stores:
        growth = Growth(stores, frames)
        gc.disable()
        try:
            for size in sizes:
                yield growth.grow(size)
                gc.collect()
        finally:
            gc.enable()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=lambda text: [int(one) for one in text.split(",")], help="numbers of entries")
    parser.add_argument("--full", action="store_true", help="up to 10,000,000 entries, in the disk tier and one floor")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="where the stores are made")
    parser.add_argument("--plot", type=Path, help="write a plot to this file; requires matplotlib")
    parser.add_argument("--json", type=Path, help="write all measured values to this file")
    options = parser.parse_args()
    sizes = sorted(options.sizes or (FULL_SIZES if options.full else SIZES))
    wanted = FULL_STORES if options.full else STORES
    kinds = [kind for kind in wanted if not find_missing(kind)]
    for kind in wanted:
        if kind not in kinds:
            print(f"left out: {kind.name}, because {kind.requires} is not installed")
    check_free_space(options.folder, sizes[-1], len(kinds))
    points: list[Point] = []
    try:
        for found in run(kinds, sizes, options.folder):
            points += found
            print(f"measured {found[0].entries:,} entries", flush=True)
    except KeyboardInterrupt:
        print("interrupted; these are the sizes that were measured")
    print("", f"{FRAME_BYTES:,} bytes per frame, batches of {BATCH}, {os.cpu_count()} cores", "", sep="\n")
    print("\n".join(make_tables(points)))
    if options.json:
        options.json.write_text(json.dumps([asdict(one) for one in points], indent=1))
    if options.plot:
        draw_plot(points, options.plot)


if __name__ == "__main__":
    main()
