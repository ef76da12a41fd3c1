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
import logging
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
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
    tiers = [Tier(MemoryBackend(max_bytes=8 * 2**20))] if memory else []
    tiers += [
        Tier(DiskBackend(path=Path(addresses["disk"]), max_bytes=256 * 2**20), timeout=5.0),
        Tier(RedisBackend(url=addresses["redis"])),
        Tier(MemcachedBackend(servers=[addresses["memcached"]])),
        Tier(PostgresBackend(url=addresses["postgres"])),
    ]
    return Cache(CountingProvider(dimensions=DIMENSIONS), tiers, key=KeyPolicy(namespace=namespace))


# --- a worker -------------------------------------------------------------------------------------


class Worker:
    """One process: its threads and tasks make random calls and check every answer."""

    def __init__(self, number: int, addresses: dict[str, str], seed: int, stop: str, report: str) -> None:
        self.number = number
        self.addresses = addresses
        self.seed = seed
        self.stop = Path(stop)
        """The workers end when this file exists."""
        self.report_file = os.open(report, os.O_WRONLY | os.O_APPEND)
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
            while not self.stop.exists():
                time.sleep(SAMPLE_SECONDS)
                self.report()
            for thread in threads:
                thread.join(60)
            if any(thread.is_alive() for thread in threads):
                self.fault("a thread of a worker did not end within 60 s")
            self.report()

    def report(self) -> None:
        with self.lock:
            counts, self.counts = dict(self.counts), Counter()
        self.write({"worker": self.number, "counts": counts, **read_resources()})

    def count(self, **counts: int) -> None:
        with self.lock:
            self.counts.update(counts)

    def fault(self, message: str) -> None:
        self.write({"fault": message})

    def write(self, line: dict[str, Any]) -> None:
        os.write(self.report_file, json.dumps(line).encode() + b"\n")

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
        while not self.stop.exists():
            call = rng.choices(functions, weights)[0]
            try:
                call(rng)
            except Exception as error:
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
                while not self.stop.exists():
                    texts = pick_texts(rng)
                    try:
                        if rng.random() < 0.1:
                            time.sleep(rng.uniform(0.05, 0.5))
                        if rng.random() < 0.1:
                            await self._cancel_call(cache, texts, rng)
                            continue
                        self.check(texts, await cache.aembed_batch(texts), "aembed_batch")
                    except Exception as error:
                        self.fault(f"aembed_batch: {type(error).__name__}: {error}")

            await asyncio.gather(*(work(self.seed * 1000 + 500 + n) for n in range(TASKS)))

    async def _cancel_call(self, cache: Cache, texts: list[str], rng: random.Random) -> None:
        call = asyncio.ensure_future(cache.aembed_batch(texts))
        await asyncio.sleep(rng.uniform(0.0, 0.01))
        call.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            self.check(texts, await call, "aembed_batch")
        self.count(cancelled=1)


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
    """The workers and servers of a run, what they report, and what is wrong."""

    def __init__(self, seconds: float, seed: int, folder: Path) -> None:
        self.seconds = seconds
        self.rng = random.Random(seed)
        self.seed = seed * 1_000_000
        self.folder = folder
        self.stop = folder / "stop"
        self.faults: Counter[str] = Counter()
        self.counts: Counter[str] = Counter()
        self.samples: list[dict[str, int]] = []
        """Resources of worker 0, which lives to the end."""
        self._reports: dict[Path, Any] = {}
        self._workers: dict[int, subprocess.Popen[bytes]] = {}

    def run(self) -> None:
        with contextlib.ExitStack() as stack:
            made = (servers.RedisServer(), servers.PostgresServer(), servers.MemcachedServer())
            self.servers = [stack.enter_context(server) for server in made]
            redis, postgres, memcached = self.servers
            self.addresses = {
                "disk": str(self.folder / "cache"),
                "redis": redis.url,
                "postgres": postgres.url,
                "memcached": memcached.address,
            }
            kept = [f"kept {number}" for number in range(1000)]
            with make_cache(self.addresses) as cache:
                cache.embed_batch(kept)
            stack.callback(self._end_workers)
            self._disturb()
            self._end_workers()
            with make_cache(self.addresses, memory=False) as cache:
                lost = sum(row is None for row in cache.lookup(kept).rows)
                if lost:
                    self.faults["a text that was stored before the run was lost"] += lost

    def _disturb(self) -> None:
        """Kill workers and disturb servers until the time is over."""
        end = time.monotonic() + self.seconds
        next_kill, next_fault, next_line = self._draw(KILL_SECONDS), self._draw(FAULT_SECONDS), time.monotonic() + 30
        disturbed: Any = None
        for number in range(WORKERS):
            self._start(number)
        while time.monotonic() < end:
            time.sleep(0.2)
            self._read_reports()
            for number, worker in list(self._workers.items()):
                if worker.poll() is not None:
                    self.faults[f"a worker ended with exit code {worker.returncode}"] += 1
                    self._start(number)
            if time.monotonic() > next_kill:
                self._kill(self.rng.randrange(1, WORKERS))
                next_kill = self._draw(KILL_SECONDS)
            if time.monotonic() > next_fault:
                disturbed = self._disturb_server(disturbed)
                next_fault = self._draw(FAULT_SECONDS)
            if time.monotonic() > next_line:
                next_line += 30
                print(f"{end - time.monotonic():4.0f} s left: {self.describe()}", file=sys.stderr, flush=True)
        if disturbed is not None:
            self._disturb_server(disturbed)

    def _draw(self, mean: float) -> float:
        return time.monotonic() + self.rng.uniform(0.5, 1.5) * mean

    def _disturb_server(self, disturbed: Any) -> Any:
        """Pause or kill a server and return it; if one is disturbed already, let it work again and return None."""
        if disturbed is not None:
            server, is_killed = disturbed
            if is_killed:
                server.restart()
            else:
                server.resume()
            return None
        server, is_killed = self.rng.choice(self.servers), self.rng.random() < 0.5
        if is_killed:
            server.kill()
        else:
            server.pause()
        self.counts["server faults"] += 1
        return server, is_killed

    # --- workers ------------------------------------------------------------------------------

    def _start(self, number: int) -> None:
        self.seed += 1
        report = self.folder / f"report-{self.seed}"
        report.touch()
        self._reports[report] = report.open()
        options = {"number": number, "addresses": self.addresses, "seed": self.seed, "stop": str(self.stop)}
        command = [sys.executable, __file__, "--worker", json.dumps({**options, "report": str(report)})]
        self._workers[number] = subprocess.Popen(command)

    def _kill(self, number: int) -> None:
        self._workers[number].kill()
        self._workers[number].wait()
        self.counts["kills"] += 1
        self._start(number)

    def _end_workers(self) -> None:
        self.stop.touch()
        for worker in self._workers.values():
            try:
                code = worker.wait(120)
            except subprocess.TimeoutExpired:
                worker.kill()
                worker.wait()
                code = None
            if code != 0:
                self.faults["a worker did not end" if code is None else f"a worker ended with exit code {code}"] += 1
        self._workers.clear()
        self._read_reports()

    def _read_reports(self) -> None:
        for file in self._reports.values():
            while (line := file.readline()).endswith("\n"):  # a killed worker may leave half a line
                report = json.loads(line)
                if "fault" in report:
                    self.faults[report["fault"]] += 1
                    continue
                self.counts.update(report["counts"])
                if report["worker"] == 0:
                    self.samples.append({name: report[name] for name in RESOURCES})

    # --- results ------------------------------------------------------------------------------

    def describe(self) -> str:
        counts = ", ".join(f"{count:,} {name}" for name, count in sorted(self.counts.items()))
        return f"{counts}; {self.faults.total():,} faults"

    def measure_growth(self) -> dict[str, tuple[int, int]]:
        """Return for each resource its use in the second quarter of the run and in the last.

        For memory and descriptors this is the minimum, because a paused server keeps both in use for a while. For
        threads it is the maximum: while calls keep coming, a pool keeps the threads that it needed during a fault.
        """
        quarter = len(self.samples) // 4
        if not quarter:
            return {}
        parts = (self.samples[quarter : 2 * quarter], self.samples[-quarter:])
        growth = {}
        for name in RESOURCES:
            choose = max if name == "threads" else min
            before, after = (choose(sample[name] for sample in part) for part in parts)
            growth[name] = (before, after)
        return growth


RESOURCES = {"bytes": 24 * 2**20, "descriptors": 12, "threads": 32}
"""The resources of a worker, and the growth from the second to the last quarter of the run that is not yet a fault."""


def main() -> int:
    parser = argparse.ArgumentParser(description="soak test of a whole chain with real servers")
    parser.add_argument("--minutes", type=float, default=10.0, help="length of the run (default: 10)")
    parser.add_argument("--seed", type=int, default=1, help="seed of the random calls (default: 1)")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        logging.getLogger("embedonce").setLevel(logging.ERROR)  # the faults that the run makes are warnings
        Worker(**json.loads(options.worker)).run()
        return 0
    with tempfile.TemporaryDirectory() as folder:
        soak = Soak(options.minutes * 60, options.seed, Path(folder))
        soak.run()
    print(f"\n{options.minutes:g} minutes, seed {options.seed}: {soak.describe()}")
    print("\n| worker 0 | second quarter | last quarter |\n| --- | ---: | ---: |")
    for name, (before, after) in soak.measure_growth().items():
        print(f"| {name} | {before:,} | {after:,} |")
        if after - before > RESOURCES[name]:
            soak.faults[f"the {name} of a worker grew from {before:,} to {after:,}"] += 1
    for fault, count in soak.faults.most_common():
        print(f"FAULT, {count:,} times: {fault}")
    print("nothing is wrong" if not soak.faults else "the run found faults")
    return 1 if soak.faults else 0


if __name__ == "__main__":
    sys.exit(main())
