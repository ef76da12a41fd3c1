"""Compare candidates for the memory tier: cost of a call, hit ratio on four traces, bytes per entry, import time.

Run ``python benchmarks/policies.py`` with embedonce, cachebox, cachetools and theine installed; a missing one is
skipped. ``docs/memory.md`` has the table of one run and the decision.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import os
import subprocess
import sys
import time
import timeit
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

CAPACITY = 2048
DIMENSIONS = 384


class Candidate(Protocol):
    """The methods of a candidate."""

    get: Callable[[str], Any]
    set: Callable[[str, Any], Any]


# --- candidates -------------------------------------------------------------------------------


class OrderedDictLru:
    """LRU as in tutorials: an OrderedDict with ``move_to_end`` on a hit. It is not thread-safe."""

    def __init__(self, capacity: int) -> None:
        self._held: OrderedDict[str, Any] = OrderedDict()
        self._capacity = capacity

    def get(self, key: str) -> Any:
        held = self._held
        if key in held:
            held.move_to_end(key)
            return held[key]
        return None

    def set(self, key: str, value: Any) -> None:
        held = self._held
        held[key] = value
        held.move_to_end(key)
        if len(held) > self._capacity:
            held.popitem(last=False)


class Clock:
    """FIFO with a second chance: a hit sets a mark, and eviction skips a marked key once."""

    def __init__(self, capacity: int) -> None:
        self._held: OrderedDict[str, Any] = OrderedDict()
        self._marked: set[str] = set()
        self._capacity = capacity

    def get(self, key: str) -> Any:
        value = self._held.get(key)
        if value is not None:
            self._marked.add(key)
        return value

    def set(self, key: str, value: Any) -> None:
        held, marked = self._held, self._marked
        if len(held) >= self._capacity and key not in held:
            while (oldest := next(iter(held))) in marked:
                marked.discard(oldest)
                held.move_to_end(oldest)
            del held[oldest]
        held[key] = value


class Sieve:
    """SIEVE: like Clock, but the hand stays where it evicted, and surviving keys keep their place."""

    def __init__(self, capacity: int) -> None:
        self._held: dict[str, Any] = {}
        self._marked: set[str] = set()
        self._hand: Iterator[str] = iter(())
        self._capacity = capacity

    def get(self, key: str) -> Any:
        value = self._held.get(key)
        if value is not None:
            self._marked.add(key)
        return value

    def set(self, key: str, value: Any) -> None:
        if len(self._held) >= self._capacity and key not in self._held:
            self._evict()
        self._held[key] = value

    def _evict(self) -> None:
        while True:
            for key in self._hand:
                if key in self._marked:
                    self._marked.discard(key)
                elif self._held.pop(key, None) is not None:
                    return
            # A dict must not change during iteration, so each round of the hand iterates over a copy of the keys.
            self._hand = iter(list(self._held))


class Cachebox:
    """One of cachebox's classes."""

    def __init__(self, capacity: int, name: str) -> None:
        import cachebox

        cache = getattr(cachebox, name)(capacity)
        self.get, self.set = cache.get, cache.insert


class Cachetools:
    """One of cachetools' classes. Its documentation leaves locking to the caller."""

    def __init__(self, capacity: int, name: str) -> None:
        import cachetools

        cache = getattr(cachetools, name)(capacity)
        self.get, self.set = cache.get, cache.__setitem__


class Theine:
    """theine's W-TinyLFU."""

    def __init__(self, capacity: int) -> None:
        from theine import Cache

        self._cache: Any = Cache(capacity)
        self.set = self._cache.set

    def get(self, key: str) -> Any:
        return self._cache.get(key)[0]


class Tier:
    """embedonce's own backend, called as the engine calls it."""

    def __init__(self, capacity: int, policy: Any, max_bytes: int | None = None) -> None:
        from embedonce_backends.memory import MemoryBackend

        backend = MemoryBackend(max_entries=capacity, policy=policy, max_bytes=max_bytes)
        self.get = backend.get
        self._set_many = backend.set_many

    def set(self, key: str, value: Any) -> None:
        self._set_many({key: value}, None)


def _list_candidates() -> dict[str, Callable[[int], Candidate]]:
    found: dict[str, Callable[[int], Candidate]] = {
        "OrderedDict LRU": OrderedDictLru,
        "clock": Clock,
        "SIEVE": Sieve,
    }
    if importlib.util.find_spec("cachebox"):
        for name in ("FIFOCache", "RRCache", "LRUCache", "LFUCache", "VTTLCache"):
            found[f"cachebox {name}"] = partial(Cachebox, name=name)
        found["embedonce lru"] = partial(Tier, policy="lru")
        found["embedonce segmented"] = partial(Tier, policy="segmented")
        found["embedonce lru, max_bytes"] = partial(Tier, policy="lru", max_bytes=1 << 40)
    if importlib.util.find_spec("cachetools"):
        for name in ("LRUCache", "LFUCache"):
            found[f"cachetools {name}"] = partial(Cachetools, name=name)
    if importlib.util.find_spec("theine"):
        found["theine W-TinyLFU"] = Theine
    return found


# --- traces -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trace:
    """Keys in the order of requests; ``counted`` marks the requests that count for the hit ratio."""

    keys: NDArray[np.int64]
    counted: NDArray[np.bool_]


def _draw_zipf(rng: np.random.Generator, count: int, of: int = 20_000, exponent: float = 1.0) -> NDArray[np.int64]:
    weights = 1.0 / np.arange(1, of + 1) ** exponent
    return rng.choice(of, size=count, p=weights / weights.sum()).astype(np.int64)


def queries(rng: np.random.Generator, count: int) -> Trace:
    """Only hot queries: 20,000 different ones, Zipf-distributed with exponent 1."""
    return Trace(_draw_zipf(rng, count), np.ones(count, dtype=np.bool_))


def reindex(rng: np.random.Generator, count: int, batch: int = 256) -> Trace:
    """The same queries while a corpus is indexed: 256 new documents after every 256 queries."""
    asked = _draw_zipf(rng, count // 2).reshape(-1, batch)
    documents = (1_000_000 + np.arange(asked.size)).reshape(-1, batch)
    keys = np.concatenate([asked, documents], axis=1).ravel()
    return Trace(keys, keys < 1_000_000)


def shifting(rng: np.random.Generator, count: int, phases: int = 8) -> Trace:
    """Queries whose popularity changes completely, eight times."""
    keys = _draw_zipf(rng, count) + np.arange(count) // (count // phases) * 100_000
    return Trace(keys, np.ones(count, dtype=np.bool_))


def loop(rng: np.random.Generator, count: int) -> Trace:
    """The same 3,072 documents in the same order, repeatedly: 1.5 times the capacity."""
    return Trace(np.arange(count) % (CAPACITY * 3 // 2), np.ones(count, dtype=np.bool_))


TRACES = {"queries": queries, "re-index": reindex, "shifting": shifting, "loop": loop}


def measure_hit_ratio(make: Callable[[int], Candidate], trace: Trace) -> float:
    """Return hits / requests over the counted keys; the first eighth only warms up."""
    held = make(CAPACITY)
    get, put = held.get, held.set
    names = [key_of(int(i)) for i in trace.keys]
    hits = np.zeros(len(names), dtype=np.bool_)
    value = sample_entry()
    for i, key in enumerate(names):
        if get(key) is None:
            put(key, value)
        else:
            hits[i] = True
    counted = trace.counted.copy()
    counted[: len(names) // 8] = False
    return float(hits[counted].mean())


# --- costs ------------------------------------------------------------------------------------


def key_of(number: int) -> str:
    """Return a key in embedonce's format: 85 characters."""
    return f"eo1.0123456789abcdef.{number:064x}"


def sample_entry(created: float = 0.0) -> Any:
    """Return an entry of 384 dimensions with its own bytes."""
    from embedonce.vectors import Entry

    payload = np.ones(DIMENSIONS, dtype=np.float32).tobytes()
    return Entry(np.frombuffer(payload, dtype=np.float32), created)


def measure_get(make: Callable[[int], Candidate]) -> float:
    """Return the cost of a hit in µs: the best of several runs over keys that are all stored."""
    held = make(CAPACITY)
    names = [key_of(i) for i in range(1000)]
    entry = sample_entry()
    for _ in range(2):  # the second round moves each key to the segment of hot keys
        for key in names:
            if held.get(key) is None:
                held.set(key, entry)
    get = held.get

    def run() -> None:
        for key in names:
            get(key)

    def run_empty_loop() -> None:
        for _ in names:
            pass

    def time_best(call: Callable[[], None]) -> float:
        return min(timeit.repeat(call, number=100, repeat=7))

    return (time_best(run) - time_best(run_empty_loop)) / 100 / len(names) * 1e6


def measure_set(make: Callable[[int], Candidate], capacity: int = CAPACITY) -> float:
    """Return the cost in µs of a hit and a new entry that evicts another: the steady state."""
    held = make(capacity)
    entry = sample_entry()
    names = [key_of(i) for i in range(capacity + 4000)]
    for key in names[:capacity]:
        held.set(key, entry)
    hot = names[capacity // 2 : capacity]
    start = time.perf_counter()
    for i, key in enumerate(names[capacity:]):
        held.get(hot[i % len(hot)])
        held.set(key, entry)
    return (time.perf_counter() - start) / 4000 * 1e6


def get_resident_bytes() -> int:
    """Return the resident memory of this process in bytes (Linux)."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def measure_bytes_per_entry(name: str) -> float:
    """Return resident bytes per entry (key, Entry, array, payload and container), measured in a new process."""
    code = f"import policies; print(policies.measure_growth({name!r}))"
    path = os.pathsep.join([os.path.dirname(os.path.abspath(__file__)), *sys.path])
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    return float(done.stdout)


def measure_growth(name: str, start: int = 40_000, stop: int = 120_000) -> float:
    """Fill a candidate, and return the bytes that each entry after ``start`` adds to the process.

    The first entries are not counted, because they also fill memory that the interpreter had free.
    """
    held = _list_candidates()[name](stop)
    for i in range(start):
        held.set(key_of(i), sample_entry(1.0))
    gc.collect()
    before = get_resident_bytes()
    for i in range(start, stop):
        held.set(key_of(i), sample_entry(1.0))
    return (get_resident_bytes() - before) / (stop - start)


def measure_import(module: str) -> float:
    """Return the best of five imports of ``module`` in a new interpreter, without the interpreter's start-up."""
    code = f"import time; a = time.perf_counter(); import {module}; print((time.perf_counter() - a) * 1e3)"
    runs = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True) for _ in range(5)]
    return min(float(run.stdout) for run in runs)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=2**18, help="length of each trace (default: 262144)")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    traces = {name: make(np.random.default_rng(options.seed), options.requests) for name, make in TRACES.items()}
    print("| | get, µs | set, µs | set of 50,000, µs | bytes per entry | " + " | ".join(traces) + " |")
    print("| --- | " + " | ".join(["---:"] * (4 + len(traces))) + " |")
    for name, make in _list_candidates().items():
        cells = [
            f"{measure_get(make):.2f}",
            f"{measure_set(make):.1f}",
            f"{measure_set(make, 50_000):.1f}",
            f"{measure_bytes_per_entry(name):.0f}",
            *(f"{measure_hit_ratio(make, trace):.3f}" for trace in traces.values()),
        ]
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)
    print()
    for module in ("cachebox", "cachetools", "theine"):
        if importlib.util.find_spec(module):
            print(f"import {module}: {measure_import(module):.0f} ms")


if __name__ == "__main__":
    main()
