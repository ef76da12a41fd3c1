"""Use one cache from many threads, asyncio tasks and processes while processes and servers fail, and check everything.

    python benchmarks/soak.py                # ten minutes, as `make soak` runs it
    python benchmarks/soak.py --minutes 1 --seed 7

Each worker process has a memory tier, and all share a disk tier, Redis, memcached and Postgres. Their threads and
asyncio tasks embed, look up, forget and purge at random. One worker lives from the beginning to the end. The others are
killed with ``kill -9`` and replaced. Meanwhile a server is paused, or stopped and started again, one at a time.

The run fails, with exit code 1, in these cases:

- A vector is not exactly the vector of its text.
- A call fails, although the provider works: a failed tier must never fail a call.
- A text that was forgotten, or a purged namespace, is still in a tier although the call returned normally.
- A text whose vector was stored while no server was failing is later not found in any tier.
- The memory, the descriptors or the threads of the worker that lives to the end grow.
- A worker ends although nobody killed it.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import multiprocessing
import os
import random
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from embedonce import Cache, EraseIncomplete, Tier
from embedonce.keys import KeyPolicy
from embedonce.testing import CountingProvider
from embedonce_backends.disk import DiskBackend
from embedonce_backends.memcached import MemcachedBackend
from embedonce_backends.memory import MemoryBackend
from embedonce_backends.postgres import PostgresBackend
from embedonce_backends.redis import RedisBackend

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
import servers

WORKERS = 4
THREADS, TASKS = 4, 8
"""Threads and asyncio tasks in each worker."""
BATCH = 32
TEXTS = 20_000
"""Number of different texts that all workers share."""
DIMENSIONS = 64
SAMPLE_SECONDS = 2.0
KILL_SECONDS, FAULT_SECONDS = 9.0, 7.0
"""Mean seconds between two kills, and between two faults of servers."""


def make_cache(addresses: dict[str, str], *, namespace: str = "", memory: bool = True) -> Cache:
    tiers = [Tier(MemoryBackend(max_bytes="8MB"))] if memory else []
    tiers += [
        Tier(DiskBackend(path=Path(addresses["disk"]), max_bytes="256MB"), timeout=5.0),
        Tier(RedisBackend(url=addresses["redis"])),
        Tier(MemcachedBackend(servers=[addresses["memcached"]])),
        Tier(PostgresBackend(url=addresses["postgres"])),
    ]
    return Cache(CountingProvider(dimensions=DIMENSIONS), tiers, keys=KeyPolicy(namespace=namespace))


# --- a worker -------------------------------------------------------------------------------------


class Worker:
    """One process: its threads and tasks make random calls and check every answer."""

    def __init__(self, number: int, addresses: dict[str, str], seed: int, out: Any, stop: Any) -> None:
        self.number = number
        self.addresses = addresses
        self.seed = seed
        self.out = out
        self.stop = stop
        self.counts: Counter[str] = Counter()
        self.lock = threading.Lock()
        self.serial = 0

    def run(self) -> None:
        with make_cache(self.addresses) as cache, make_cache(self.addresses, memory=False) as outside:
            self.cache, self.outside = cache, outside
            threads = [
                threading.Thread(target=self.work, args=(self.seed * 1000 + n,), daemon=True) for n in range(THREADS)
            ]
            threads.append(threading.Thread(target=lambda: asyncio.run(self.work_async()), daemon=True))
            for thread in threads:
                thread.start()
            while not self.stop.is_set():
                self.stop.wait(SAMPLE_SECONDS)
                self.report()
            for thread in threads:
                thread.join(60)
            if any(thread.is_alive() for thread in threads):
                self.fault("a thread of a worker did not end within 60 s")
            self.report()

    def report(self) -> None:
        with self.lock:
            counts, self.counts = dict(self.counts), Counter()
        self.out.put({"worker": self.number, "counts": counts, **read_resources()})

    def count(self, **counts: int) -> None:
        with self.lock:
            self.counts.update(counts)

    def fault(self, message: str) -> None:
        self.out.put({"worker": self.number, "fault": message})

    def check(self, texts: list[str], vectors: Any, what: str) -> None:
        expected = compute_vectors(texts)
        for row, right in zip(vectors, expected, strict=True):
            if row is not None and not np.array_equal(row, right):
                self.fault(f"{what} returned a wrong vector")
        self.count(texts=len(texts))

    def work(self, seed: int) -> None:
        rng = random.Random(seed)
        calls: list[tuple[int, Callable[[random.Random], None]]] = [
            (60, self.embed_batch),
            (20, self.fetch),
            (10, self.look_up),
            (6, self.forget),
            (1, self.purge),
        ]
        weights, functions = zip(*calls, strict=True)
        while not self.stop.is_set():
            call = rng.choices(functions, weights)[0]
            try:
                call(rng)
            except Exception as error:  # noqa: BLE001  (each error is a fault of the run)
                self.fault(f"{call.__name__}: {type(error).__name__}: {error}")

    def embed_batch(self, rng: random.Random) -> None:
        texts = pick_texts(rng)
        self.check(texts, self.cache.embed_batch(texts), "embed_batch")

    def fetch(self, rng: random.Random) -> None:
        texts = pick_texts(rng)
        fetched = self.cache.fetch(texts)
        self.check(texts, fetched.rows, "fetch")
        if fetched.failed:
            self.fault(f"fetch failed for {len(fetched.failed)} texts")

    def look_up(self, rng: random.Random) -> None:
        texts = pick_texts(rng)
        self.check(texts, self.cache.lookup(texts).rows, "lookup")

    def forget(self, rng: random.Random) -> None:
        """Erase a text that only this call uses, and look for it in the shared tiers."""
        with self.lock:
            self.serial += 1
            text = f"secret {self.number} {os.getpid()} {self.serial}"
        self.cache.embed_batch([text])
        try:
            self.cache.forget([text])
        except EraseIncomplete:
            self.count(incomplete=1)
            return
        self.count(forgotten=1)
        if self.outside.lookup([text]).rows[0] is not None or self.cache.lookup([text]).rows[0] is not None:
            self.fault("a forgotten text is still in a tier")

    def purge(self, rng: random.Random) -> None:
        """Fill a namespace that only this call uses, purge it, and look for its texts."""
        with self.lock:
            self.serial += 1
            namespace = f"n{self.number}-{os.getpid()}-{self.serial}"
        texts = pick_texts(rng)
        with make_cache(self.addresses, namespace=namespace) as cache:
            cache.embed_batch(texts)
            cache.flush(timeout=30)
            try:
                cache.purge(namespace=namespace)
            except EraseIncomplete:
                self.count(incomplete=1)
                return
            self.count(purged=1)
            if any(row is not None for row in cache.lookup(texts).rows):
                self.fault("an entry of a purged namespace is still in a tier")

    async def work_async(self) -> None:
        async with make_cache(self.addresses) as cache:

            async def work(seed: int) -> None:
                rng = random.Random(seed)
                while not self.stop.is_set():
                    texts = pick_texts(rng)
                    try:
                        if rng.random() < 0.1:
                            time.sleep(rng.uniform(0.05, 0.5))  # noqa: ASYNC251  (services block their loop, too)
                        if rng.random() < 0.1:
                            await self._cancel_call(cache, texts, rng)
                            continue
                        self.check(texts, await cache.aembed_batch(texts), "aembed_batch")
                    except Exception as error:  # noqa: BLE001  (each error is a fault of the run)
                        self.fault(f"aembed_batch: {type(error).__name__}: {error}")

            await asyncio.gather(*(work(self.seed * 1000 + 500 + n) for n in range(TASKS)))

    async def _cancel_call(self, cache: Cache, texts: list[str], rng: random.Random) -> None:
        call = asyncio.ensure_future(cache.aembed_batch(texts))
        await asyncio.sleep(rng.uniform(0.0, 0.01))
        call.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            self.check(texts, await call, "aembed_batch")
        self.count(cancelled=1)


def run_worker(number: int, addresses: dict[str, str], seed: int, out: Any, stop: Any) -> None:
    Worker(number, addresses, seed, out, stop).run()
    out.close()
    out.join_thread()


def pick_texts(rng: random.Random) -> list[str]:
    """Return texts of which some are used often and most seldom."""
    return [f"text {int(TEXTS * rng.random() ** 3)}" for _ in range(rng.randint(1, BATCH))]


def compute_vectors(texts: list[str]) -> Any:
    provider = CountingProvider(dimensions=DIMENSIONS)
    return np.array([provider.vector_of(text) for text in texts])


def read_resources() -> dict[str, int]:
    """Return this process's resident bytes, and its numbers of descriptors and threads (Linux)."""
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return {"bytes": resident, "descriptors": len(os.listdir("/proc/self/fd")), "threads": threading.active_count()}


# --- the run --------------------------------------------------------------------------------------


class Soak:
    def __init__(self, minutes: float, seed: int) -> None:
        self.seconds = minutes * 60
        self.rng = random.Random(seed)
        self.seed = seed
        self.faults: Counter[str] = Counter()
        self.counts: Counter[str] = Counter()
        self.samples: list[dict[str, int]] = []
        """Resources of the worker that lives to the end."""

    def run(self) -> bool:
        context = multiprocessing.get_context("spawn")
        self.context, self.out = context, context.Queue()
        with contextlib.ExitStack() as stack:
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            self.servers = [
                stack.enter_context(server)
                for server in (servers.RedisServer(), servers.PostgresServer(), servers.MemcachedServer())
            ]
            redis, postgres, memcached = self.servers
            self.addresses = {
                "disk": str(Path(folder, "cache")),
                "redis": redis.url,
                "postgres": postgres.url,
                "memcached": memcached.address,
            }
            self._check_durability("before")
            self._work()
            self._check_durability("after")
        return self._print_results()

    def _work(self) -> None:
        end = time.monotonic() + self.seconds
        next_kill, next_fault = self._draw(KILL_SECONDS), self._draw(FAULT_SECONDS)
        next_line = time.monotonic() + 30
        faults = _run_faults(self)
        workers = {number: self._start(number) for number in range(WORKERS)}
        while time.monotonic() < end:
            self._receive()
            for number, (process, _) in workers.items():
                if not process.is_alive():
                    self.faults[f"a worker ended with exit code {process.exitcode}"] += 1
                    workers[number] = self._start(number)
            if time.monotonic() > next_kill:
                number = self.rng.randrange(1, WORKERS)
                workers[number][0].kill()
                workers[number][0].join()
                self.counts["killed"] += 1
                workers[number] = self._start(number)
                next_kill = self._draw(KILL_SECONDS)
            if time.monotonic() > next_fault:
                next(faults)
                next_fault = self._draw(FAULT_SECONDS)
            if time.monotonic() > next_line:
                next_line += 30
                print(f"{end - time.monotonic():4.0f} s left: {self._describe()}", file=sys.stderr, flush=True)
        faults.close()
        for process, stop in workers.values():
            stop.set()
        for process, _ in workers.values():
            self._join(process)
        self._receive()

    def _draw(self, mean: float) -> float:
        return time.monotonic() + self.rng.uniform(0.5, 1.5) * mean

    def _start(self, number: int) -> Any:
        # Each worker has its own event, because a process that is killed while it reads an event leaves the event locked.
        stop = self.context.Event()
        self.seed += 1
        process = self.context.Process(
            target=run_worker, args=(number, self.addresses, self.seed, self._open_queue(), stop), daemon=True
        )
        process.start()
        return process, stop
