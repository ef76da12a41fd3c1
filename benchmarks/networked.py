"""Print the tables of the shared tiers: Redis, Postgres, memcached, and one disk for many processes.

    python benchmarks/networked.py                      # about five minutes
    python benchmarks/networked.py --quick              # fewer repeats
    python benchmarks/networked.py --only hits growth   # some sections
    python benchmarks/networked.py --full               # growth up to 1,000,000 entries

tests/servers.py starts real servers on loopback for each run. The first row of a table is the floor: the raw client
with one SHA-256 per text and one float32 matrix per chunk. README.md describes how everything is measured.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import multiprocessing
import os
import platform
import statistics
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from peers import Matrix, Peer, sha256
from run import (
    CHUNK,
    TEXTS,
    Calls,
    FreshTexts,
    fill_peers,
    get_resident_bytes,
    make_texts,
    measure,
    print_table,
    split_chunks,
)

import embedonce
from embedonce._messages import format_count
from embedonce.vectors import Entry, encode_frames, freeze_rows
from embedonce_backends.disk import DiskBackend
from embedonce_backends.memory import MemoryBackend

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
import servers

CALL_TIMEOUT = 60.0
"""Timeout in seconds of a call to a tier, so long that it cuts off no measurement."""
SINGLE_TEXTS = 500
"""Number of texts in the tables of single reads."""
THREADS = (1, 2, 4, 8, 16)
PROCESSES, CALLS, WRITTEN = 8, 60, 64
"""Number of processes that write to one disk in parallel, calls per process, and entries per call."""


def make_vectors(count: int, dimensions: int) -> Matrix:
    """Return random rows of length 1."""
    made = np.random.default_rng(7).standard_normal((count, dimensions), np.float32)
    return made / np.linalg.norm(made, axis=1, keepdims=True)


def join_vectors(values: Sequence[Any]) -> Matrix:
    return np.frombuffer(b"".join(values), np.float32).reshape(len(values), -1)


# --- CPU time -------------------------------------------------------------------------------------


def measure_cpu(calls: Calls, repeats: int, before: Callable[[], object]) -> dict[str, float]:
    """Return by name the CPU seconds of a call in this process and in its servers (Linux).

    The result is the median of the repeats. Unlike elapsed time, it depends little on other load on the machine.
    """
    below = _find_descendants(os.getpid())
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            before()
            servers_before, start = _sum_cpu_seconds(below), time.process_time()
            deque(call(), maxlen=0)  # type: ignore[arg-type]
            seconds[name].append(time.process_time() - start + _sum_cpu_seconds(below) - servers_before)
    return {name: statistics.median(found) for name, found in seconds.items()}


def _find_descendants(root: int) -> list[Path]:
    """Return the folders in /proc of all descendants of process ``root``."""
    parents: dict[int, int] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
    found = {root}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return [Path(f"/proc/{pid}") for pid in found - {root}]


def _sum_cpu_seconds(folders: Sequence[Path]) -> float:
    """Return the CPU seconds that all threads of the processes have used."""
    nanoseconds = 0
    for folder in folders:
        for thread in folder.glob("task/*/schedstat"):
            with suppress(OSError):
                nanoseconds += int(thread.read_text().split()[0])
    return nanoseconds / 1e9


# --- floors and peers -----------------------------------------------------------------------------


class Raw(Peer):
    """A raw client per thread. Subclasses define how to connect, read and write."""

    url: str

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._local = threading.local()
        self._clients: list[Any] = []

    @property
    def client(self) -> Any:
        client = getattr(self._local, "client", None)
        if client is None:
            client = self._local.client = self.connect()
            self._clients.append(client)
        return client

    def connect(self) -> Any:
        raise NotImplementedError

    def close(self) -> None:
        for client in self._clients:
            client.close()


class RawRedis(Raw):
    name = "floor: sha256 + MGET, hiredis"

    def connect(self) -> Any:
        import redis

        return redis.Redis.from_url(self.url)

    def store(self, texts: Sequence[str], vectors: Matrix) -> None:
        with self.client.pipeline(transaction=False) as pipeline:
            for text, vector in zip(texts, vectors, strict=True):
                pipeline.set(sha256(text), vector.tobytes(), px=3_600_000)
            pipeline.execute()

    def read(self, texts: Sequence[str]) -> Matrix:
        return join_vectors(self.client.mget([sha256(text) for text in texts]))

    def find(self, texts: Sequence[str]) -> None:
        self.client.mget([sha256(text) for text in texts])


class RawMemcached(Raw):
    name = "floor: sha256 + get_many, pymemcache"

    def connect(self) -> Any:
        from pymemcache.client.base import Client

        host, _, port = self.url.rpartition(":")
        return Client((host, int(port)), no_delay=True, default_noreply=False)

    def store(self, texts: Sequence[str], vectors: Matrix) -> None:
        values = {sha256(text): vector.tobytes() for text, vector in zip(texts, vectors, strict=True)}
        self.client.set_many(values, expire=3600)

    def read(self, texts: Sequence[str]) -> Matrix:
        keys = [sha256(text) for text in texts]
        found = self.client.get_many(keys)
        return join_vectors([found[key] for key in keys])

    def find(self, texts: Sequence[str]) -> None:
        self.client.get_many([sha256(text) for text in texts])


class RawPostgres(Raw):
    """One table of key and bytea, with prepared statements and binary results."""

    name = "floor: sha256 + SELECT = ANY, bytea"
    kind = "bytea"
    table = "raw_bytes"
    value = "value"
    prepare: int | None = 0

    def connect(self) -> Any:
        import psycopg

        connection = psycopg.connect(self.url, autocommit=True, prepare_threshold=self.prepare)
        with connection.transaction():
            connection.execute("SELECT pg_advisory_xact_lock(1)")
            connection.execute("CREATE EXTENSION IF NOT EXISTS vector")
            connection.execute(
                f"CREATE TABLE IF NOT EXISTS {self.table} (key text PRIMARY KEY, value {self.kind} STORAGE EXTERNAL)"
                " WITH (toast_tuple_target = 8160)"
            )
        return connection

    def store(self, texts: Sequence[str], vectors: Matrix) -> None:
        self.client.execute(
            f"INSERT INTO {self.table} SELECT * FROM unnest(%b::text[], %b::bytea[]) ON CONFLICT DO NOTHING",
            ([sha256(text) for text in texts], [vector.tobytes() for vector in vectors]),
        )

    def find(self, texts: Sequence[str]) -> dict[str, bytes]:
        query = f"SELECT key, {self.value} FROM {self.table} WHERE key = ANY(%b)"
        cursor = self.client.cursor(binary=True)
        return dict(cursor.execute(query, ([sha256(text) for text in texts],)).fetchall())

    def read(self, texts: Sequence[str]) -> Matrix:
        found = self.find(texts)
        return join_vectors([found[sha256(text)] for text in texts])


class RawUnprepared(RawPostgres):
    """The same without prepared statements, as behind a transaction pooler."""

    name = "the same, nothing prepared"
    prepare = None
    table = "raw_unprepared"


class RawVectors(RawUnprepared):
    """The same with a pgvector column, whose bytes are converted to this machine's byte order."""

    name = "the same with a pgvector column"
    kind = "vector"
    table = "raw_vectors"
    value = "vector_send(value)"

    def store(self, texts: Sequence[str], vectors: Matrix) -> None:
        self.client.execute(
            f"INSERT INTO {self.table} SELECT key, value::vector FROM unnest(%b::text[], %b::text[]) AS t (key, value)"
            " ON CONFLICT DO NOTHING",
            ([sha256(text) for text in texts], [str(vector.tolist()) for vector in vectors]),
        )

    def read(self, texts: Sequence[str]) -> Matrix:
        found = self.find(texts)
        words = np.frombuffer(b"".join([found[sha256(text)] for text in texts]), ">f4").reshape(len(texts), -1)
        return words[:, 1:].astype(np.float32)


class RedisVL(Raw):
    """RedisVL's EmbeddingsCache: a Redis hash per text, with the vector as JSON."""

    name = "RedisVL EmbeddingsCache"
    note = "mget, mset"

    def connect(self) -> Any:
        from redisvl.extensions.cache.embeddings import EmbeddingsCache

        return EmbeddingsCache(name="redisvl", redis_url=self.url, ttl=3600)

    def store(self, texts: Sequence[str], vectors: Matrix) -> None:
        for chunk, rows in zip(split_chunks(texts), np.split(vectors, range(CHUNK, len(vectors), CHUNK)), strict=True):
            items = zip(chunk, rows.tolist(), strict=True)
            self.client.mset([{"content": text, "model_name": "m", "embedding": row} for text, row in items])

    def read(self, texts: Sequence[str]) -> Matrix:
        found = self.client.mget(texts, "m")
        return np.array([entry["embedding"] for entry in found], np.float32)

    def read_one(self, text: str) -> Any:
        return np.array(self.client.get(text, "m")["embedding"], np.float32)

    def find(self, texts: Sequence[str]) -> None:
        self.client.mget(texts, "m")

    def close(self) -> None:
        for client in self._clients:
            client.disconnect()


# --- embedonce ------------------------------------------------------------------------------------


class Embedonce(Peer):
    """A cache over one tier; subclasses make its backend."""

    url: str
    memory = False

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.cache: Any = None

    def backend(self) -> Any:
        raise NotImplementedError

    def open_cache(self, function: Callable[..., Any], dimensions: int, write: Any = "inline") -> Any:
        """Return a cache over the tier; ``function`` computes what it misses."""
        tiers: list[Any] = [embedonce.Tier(self.backend(), name="shared", ttl=3600, timeout=CALL_TIMEOUT, write=write)]
        if self.memory:
            self.held = MemoryBackend(max_entries=2 * TEXTS)
            tiers.insert(0, self.held)
        space = {"model": "benchmark-v1", "dimensions": dimensions}
        return embedonce.Cache(function, tiers, space=space, max_queued=1_000_000, flush_timeout=CALL_TIMEOUT)

    def store(self, texts: Sequence[str], vectors: Matrix) -> None:
        if self.cache is None:
            self.cache = self.open_cache(_refuse, vectors.shape[1])
        for start in range(0, len(texts), CHUNK):
            self.cache.put(texts[start : start + CHUNK], vectors[start : start + CHUNK])

    def read(self, texts: Sequence[str]) -> Matrix:
        return self.cache.embed_batch(texts)

    def read_one(self, text: str) -> Any:
        return self.cache.embed(text)

    def evict(self) -> None:
        """Empty the memory tier."""
        self.held.delete_many(list(self.held.scan("")))

    def close(self) -> None:
        if self.cache is not None:
            self.cache.close()


class OverRedis(Embedonce):
    name = "**embedonce**, Redis"

    def backend(self) -> Any:
        from embedonce_backends.redis import RedisBackend

        return RedisBackend(url=self.url)


class OverMemcached(Embedonce):
    name = "**embedonce**, memcached"

    def backend(self) -> Any:
        from embedonce_backends.memcached import MemcachedBackend

        return MemcachedBackend(servers=[self.url])


class OverPostgres(Embedonce):
    name = "**embedonce**, Postgres, bytea"
    column: Any = "bytea"

    def backend(self) -> Any:
        from embedonce_backends.postgres import PostgresBackend

        return PostgresBackend(url=self.url, column=self.column, table=f"embedonce_{self.column}", max_connections=32)


class OverVectors(OverPostgres):
    name = "**embedonce**, Postgres, pgvector"
    column = "vector"


class OverDisk(Embedonce):
    name = "**embedonce**, disk"

    def backend(self) -> Any:
        return DiskBackend(path=self.folder, max_bytes=2**36)


class OverMemory(Embedonce):
    name = "**embedonce**, memory"

    def open_cache(self, function: Callable[..., Any], dimensions: int, write: Any = "inline") -> Any:
        space = {"model": "benchmark-v1", "dimensions": dimensions}
        return embedonce.Cache(function, [MemoryBackend(max_entries=2_000_000)], space=space)


def _refuse(texts: list[str]) -> Matrix:
    raise AssertionError("a stored text was computed again")


# --- servers --------------------------------------------------------------------------------------

KINDS: dict[str, tuple[Callable[[], Any], list[type[Peer]]]] = {
    "Redis": (servers.RedisServer, [RawRedis, OverRedis, RedisVL]),
    "Postgres": (
        lambda: servers.PostgresServer("-c", "shared_buffers=512MB", "-c", "max_wal_size=8GB"),
        [RawPostgres, RawUnprepared, OverPostgres, RawVectors, OverVectors],
    ),
    "memcached": (lambda: servers.MemcachedServer("-m", "8192"), [RawMemcached, OverMemcached]),
}


@contextmanager
def start_server(kind: str) -> Iterator[tuple[Any, list[type[Peer]]]]:
    """Start a server, and yield it with the classes of peers that use it."""
    start, classes = KINDS[kind]
    with start() as server:
        url = getattr(server, "url", server.address)
        yield server, [type(cls.__name__, (cls,), {"url": url}) for cls in classes]


def iterate_servers() -> Iterator[tuple[str, Any, list[type[Peer]]]]:
    """Start the installed servers one after the other, and yield each with its peers."""
    for kind in KINDS:
        try:
            with start_server(kind) as (server, classes):
                yield kind, server, classes
        except servers.pytest.skip.Exception as missing:
            print(f"(skipped: {kind}: {missing})", file=sys.stderr)


def select_floor_and_ours(classes: Sequence[type[Peer]]) -> list[type[Peer]]:
    """Return the floor and embedonce over the same server."""
    return [classes[0], next(filter(is_embedonce, classes))]


def is_embedonce(cls: type[Peer]) -> bool:
    return issubclass(cls, Embedonce)


# --- the sections ---------------------------------------------------------------------------------


def measure_hits(repeats: int) -> None:
    """Read 2,000 vectors in chunks of 256, each chunk into one matrix; then read texts one by one."""
    for kind, _, classes in iterate_servers():
        for dimensions in (384, 1536):
            texts = [f"{dimensions} {text}" for text in make_texts(TEXTS)]
            with fill_peers(classes, texts, make_vectors(TEXTS, dimensions)) as ready:
                many, ones = FreshTexts(texts), FreshTexts(texts[:SINGLE_TEXTS])
                calls = make_read_calls(ready, many)
                times = measure(calls, repeats, many.renew)
                spent = {
                    name: seconds / TEXTS * 1e6 for name, seconds in measure_cpu(calls, repeats, many.renew).items()
                }
                floor = spent[ready[0].name]
                notes = {
                    p.name: f"CPU of both sides {spent[p.name]:.1f} µs, {spent[p.name] / floor:.2f} times; {p.note}"
                    for p in ready
                }
                print_table(f"{kind}: batch hit, {dimensions} dimensions", times, TEXTS, notes)
                measure_single_hits(f"{kind}: one hit, {dimensions} dimensions", ready, ones, repeats)


def measure_single_hits(title: str, peers: Sequence[Peer], texts: FreshTexts, repeats: int) -> None:
    """Read texts one by one, and the keys of these texts with embedonce's backend alone."""
    calls: Calls = {p.name: (lambda p=p: list(map(p.read_one, texts.now))) for p in peers}
    with ExitStack() as stack:
        for peer in filter(lambda peer: isinstance(peer, Embedonce), peers):
            calls[f"{peer.name}, the backend alone"] = make_backend_call(peer, texts.now, stack)
        times = measure(calls, repeats, texts.renew)
        spent = measure_cpu(calls, repeats, texts.renew)
    notes = {name: f"CPU of both sides {seconds / SINGLE_TEXTS * 1e6:.0f} µs" for name, seconds in spent.items()}
    print_table(title, times, SINGLE_TEXTS, notes)


def make_backend_call(peer: Any, texts: Sequence[str], stack: ExitStack) -> Callable[[], object]:
    """Return a call that reads the keys of the texts one by one, with the backend's own method."""
    keys = [peer.cache.explain(text).key for text in texts]
    backend = peer.backend()
    stack.callback(backend.close)
    return lambda: [backend.get_many([key]) for key in keys]


def make_read_calls(peers: Sequence[Peer], texts: FreshTexts) -> Calls:
    """Return a call per peer that reads the texts chunk by chunk."""
    return {p.name: (lambda p=p: map(p.read, split_chunks(texts.now))) for p in peers}


def measure_misses(repeats: int) -> None:
    """Embed new texts with a provider that costs nothing, so that only overhead is measured."""
    matrix = make_vectors(CHUNK, 384)
    rounds = count()

    def make_new_texts() -> list[str]:
        prefix = f"miss {next(rounds)} "
        return [prefix + text for text in texts]

    def provider(texts: Sequence[str]) -> Matrix:
        return matrix[: len(texts)]

    texts = make_texts(TEXTS)
    for kind, _, classes in iterate_servers():
        raw = classes[0](Path())
        with ExitStack() as stack:
            stack.callback(raw.close)
            caches = []

            def make_embed_call(cls: Any, write: str, memory: bool, stack: Any = stack, caches: Any = caches) -> Any:
                peer = type(cls.__name__, (cls,), {"memory": memory})(Path())
                cache = stack.enter_context(peer.open_cache(provider, 384, write))
                caches.append(cache)
                return lambda: [cache.embed_batch(chunk) for chunk in split_chunks(make_new_texts())]

            def read_and_write(raw: Any = raw) -> None:
                for chunk in split_chunks(make_new_texts()):
                    raw.find(chunk)
                    raw.store(chunk, matrix[: len(chunk)])

            calls: Calls = {"floor: sha256 + read + write, raw client": read_and_write}
            for cls in filter(is_embedonce, classes):
                calls[f"{cls.name}, write = background"] = make_embed_call(cls, "background", False)
                calls[f"memory + {cls.name}, write = background"] = make_embed_call(cls, "background", True)
                calls[f"{cls.name}, write = inline"] = make_embed_call(cls, "inline", False)

            def before(caches: Any = caches) -> None:
                for cache in caches:
                    assert cache.flush(CALL_TIMEOUT)
                gc.collect()

            print_table(
                f"{kind}: all misses, over a provider that costs nothing", measure(calls, repeats, before), TEXTS
            )
            for cache in caches:
                stats = cache.stats().tiers["shared"]
                assert stats.errors == stats.dropped == 0, stats


def measure_leases(repeats: int) -> None:
    """Embed new texts with and without the default lease, over a provider that costs nothing."""
    with tempfile.TemporaryDirectory() as folder:
        disk = type("Disk", (OverDisk,), {"folder": Path(folder)})
        _measure_leases("disk", disk.backend(disk), repeats)
    for kind, _, classes in iterate_servers():
        cls = [cls for cls in classes if is_embedonce(cls)][-1]
        _measure_leases(kind, cls.backend(cls), repeats)


def _measure_leases(kind: str, backend: Any, repeats: int) -> None:
    matrix = make_vectors(CHUNK, 384)
    texts, rounds = make_texts(TEXTS), count()
    space = {"model": "benchmark-leases", "dimensions": 384}
    tiers = {
        "lease = off, write = inline": embedonce.Tier(backend, lease="off", write="inline", timeout=CALL_TIMEOUT),
        "**the default lease**": embedonce.Tier(backend, timeout=CALL_TIMEOUT),
    }
    if backend.capabilities.scope == "network":
        tiers["lease = off, write = background"] = embedonce.Tier(backend, lease="off", timeout=CALL_TIMEOUT)
    with ExitStack() as stack:
        caches = [
            stack.enter_context(embedonce.Cache(lambda some: matrix[: len(some)], [tier], space=space))
            for tier in tiers.values()
        ]

        def before() -> None:
            for cache in caches:
                assert cache.flush(CALL_TIMEOUT)
            gc.collect()

        def embed(cache: Any, size: int, total: int) -> Iterator[object]:
            prefix = f"lease {next(rounds)} "
            for start in range(0, total, size):
                yield cache.embed_batch([prefix + text for text in texts[start : start + size]])

        for size, total in ((CHUNK, TEXTS), (1, SINGLE_TEXTS)):
            calls: Calls = {
                name: (lambda cache=cache, size=size, total=total: embed(cache, size, total))
                for name, cache in zip(tiers, caches, strict=True)
            }
            times = measure(calls, repeats, before)
            spent = measure_cpu(calls, repeats, before)
            notes = {name: f"CPU of both sides {seconds / total * 1e6:.1f} µs" for name, seconds in spent.items()}
            print_table(f"{kind}: all misses, {format_count(size, 'text')} a call", times, total, notes)


def measure_writes(repeats: int) -> None:
    """Store 2,000 new vectors in chunks of 256."""
    texts, rounds = make_texts(TEXTS), count()

    def write(peer: Any, matrix: Matrix, ask: bool = False) -> None:
        prefix = f"write {next(rounds)} "
        for start in range(0, TEXTS, CHUNK):
            chunk = [prefix + text for text in texts[start : start + CHUNK]]
            if ask:
                peer.find(chunk)
            peer.store(chunk, matrix[start : start + CHUNK])

    for dimensions in (384, 1536):
        matrix = make_vectors(TEXTS, dimensions)
        for kind, _, classes in iterate_servers():
            with fill_peers(classes, make_texts(CHUNK), matrix[:CHUNK]) as ready:
                raw, *others = ready
                calls: Calls = {
                    "floor: sha256 + raw write": lambda raw=raw, matrix=matrix: write(raw, matrix),  # type: ignore[misc]
                    "sha256 + raw read + raw write": lambda raw=raw, matrix=matrix: write(raw, matrix, ask=True),  # type: ignore[misc]
                }
                calls |= {p.name: (lambda p=p, matrix=matrix: write(p, matrix)) for p in others}
                notes = {p.name: "put reads first, then stores" for p in ready if isinstance(p, Embedonce)}
                notes[RawVectors.name] = "vectors sent as text"
                print_table(f"{kind}: writes, {dimensions} dimensions", measure(calls, repeats), TEXTS, notes)


def measure_promotion(repeats: int) -> None:
    """Read entries from the server that the memory tier has evicted, and promote them."""
    for kind, _, classes in iterate_servers():
        raw, ours = select_floor_and_ours(classes)
        above = type(ours.__name__, (ours,), {"memory": True, "name": f"memory, evicted, + {ours.name}"})
        texts = FreshTexts(make_texts(TEXTS))
        with fill_peers([raw, ours, above], texts.now, make_vectors(TEXTS, 384)) as ready:
            evicted: Any = ready[-1]

            def before(evicted: Any = evicted, texts: FreshTexts = texts) -> None:
                evicted.evict()
                texts.renew()

            print_table(f"{kind}: promotion", measure(make_read_calls(ready, texts), repeats, before), TEXTS)


def measure_threads(repeats: int) -> None:
    """Let each thread read 2,000 vectors through one shared cache, or through its own raw client."""
    texts = make_texts(TEXTS)
    for kind, _, classes in iterate_servers():
        print(f"\n### {kind}: batch hit, threads\n\n| threads | floor, µs per text | embedonce | times the floor |")
        print("| ---: | ---: | ---: | ---: |")
        with fill_peers(select_floor_and_ours(classes), texts, make_vectors(TEXTS, 384)) as ready:
            for number in THREADS:
                with ThreadPoolExecutor(number) as pool:
                    calls: Calls = {
                        p.name: lambda p=p, pool=pool, number=number: _read_in_threads(pool, number, p, texts)  # type: ignore[misc]
                        for p in ready
                    }
                    floor, ours = (quickest for quickest, _ in measure(calls, max(3, repeats // 2)).values())
                each = [seconds / number / TEXTS * 1e6 for seconds in (floor, ours)]
                print(f"| {number} | {each[0]:.2f} | {each[1]:.2f} | {ours / floor:.2f} |", flush=True)


def _read_in_threads(pool: ThreadPoolExecutor, number: int, peer: Peer, texts: Sequence[str]) -> None:
    list(pool.map(lambda _: [peer.read(chunk) for chunk in split_chunks(texts)], range(number)))


# --- one disk, many processes ---------------------------------------------------------------------


def _make_batches(seed: int, calls: int) -> list[dict[str, bytes]]:
    rows = freeze_rows(make_vectors(WRITTEN, 384))
    made = []
    for call in range(calls):
        keys = [f"eo1.0123456789abcdef.{sha256(f'{seed} {call} {row}')}" for row in range(WRITTEN)]
        made.append(encode_frames({key: Entry(row, 0.0) for key, row in zip(keys, rows, strict=True)}))
    return made


def _make_writer(how: str, folder: str) -> Callable[[dict[str, bytes]], None]:
    if how.startswith("**"):
        backend = DiskBackend(path=Path(folder))
        return lambda batch: backend.set_many(batch, None)
    import diskcache

    cache = diskcache.Cache(folder, timeout=CALL_TIMEOUT)

    def loop(batch: dict[str, bytes]) -> None:
        for key, value in batch.items():
            cache.set(key, value)

    def write_in_transaction(batch: dict[str, bytes]) -> None:
        with cache.transact():
            loop(batch)

    return loop if "loop" in how else write_in_transaction


def _time_writes(how: str, folder: str, seed: int, calls: int, barrier: Any) -> list[float]:
    write, (warm, *batches) = _make_writer(how, folder), _make_batches(seed, calls + 1)
    write(warm)
    barrier.wait(CALL_TIMEOUT)
    found = []
    for batch in batches:
        start = time.perf_counter()
        write(batch)
        found.append(time.perf_counter() - start)
    return found


WRITERS = ("diskcache, a loop of set", "diskcache, one transaction", "**embedonce**, disk")


def measure_processes(repeats: int) -> None:
    """Let eight processes write to one disk in parallel."""
    context = multiprocessing.get_context("spawn")
    print(f"\n### disk: {PROCESSES} processes write at once, {WRITTEN} vectors of 384 dimensions a call\n")
    print("| | calls | ms per call, median | p99 | max | vectors/s, all |\n| --- | ---: | ---: | ---: | ---: | ---: |")
    with context.Manager() as manager, context.Pool(PROCESSES) as pool:
        for how in WRITERS:
            with tempfile.TemporaryDirectory() as folder:
                barrier = manager.Barrier(PROCESSES)
                given = [(how, folder, seed, CALLS, barrier) for seed in range(PROCESSES)]
                each = pool.starmap(_time_writes, given, chunksize=1)
            found = sorted(seconds for one in each for seconds in one)
            ms = [statistics.median(found) * 1e3, found[int(len(found) * 0.99)] * 1e3, found[-1] * 1e3]
            rate = len(found) * WRITTEN / max(map(sum, each))
            cells = " | ".join(f"{value:.1f}" for value in ms)
            print(f"| {how} | {len(found)} | {cells} | {rate:,.0f} |", flush=True)


# --- growth ---------------------------------------------------------------------------------------


def measure_growth(repeats: int, max_entries: int = 100_000) -> None:
    """Fill each backend, and measure the time of a batch and the bytes of an entry."""
    print("\n### growth: 384 dimensions, a payload of 1,536 bytes; 2,000 texts read at random\n")
    print("| | entries | batch hit, µs per text | CPU of both sides | bytes per entry | stored, µs per text |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    _measure_growth(OverMemory(Path()), repeats, max_entries, lambda _: get_resident_bytes())
    with tempfile.TemporaryDirectory() as folder:
        _measure_growth(OverDisk(Path(folder)), repeats, max_entries, _measure_disk_bytes)
    for _, server, classes in iterate_servers():
        for cls in filter(is_embedonce, classes):
            _measure_growth(
                cls(Path()), repeats, max_entries, lambda peer, server=server: _measure_server_bytes(server, peer)
            )


def _measure_growth(peer: Any, repeats: int, max_entries: int, size: Callable[[Any], float]) -> None:
    matrix = make_vectors(1000, 384)
    texts = [f"growth {at}" for at in range(max_entries)]
    peer.store(["makes what is needed"], matrix[:1])
    before = size(peer)
    chance = np.random.default_rng(5)
    there = 0
    for entries in (1_000, 100_000, 1_000_000):
        if entries > max_entries:
            break
        start, new = time.perf_counter(), range(there, entries, 1000)
        for at in new:
            peer.store(texts[at : at + 1000], matrix)
        stored_in = (time.perf_counter() - start) / (entries - there) * 1e6
        there = entries
        asked = FreshTexts([texts[at] for at in chance.choice(entries, min(TEXTS, entries), replace=False)])
        calls: Calls = {"read": lambda asked=asked: map(peer.read, split_chunks(asked.now))}  # type: ignore[misc]
        ((quickest, _),) = measure(calls, repeats, asked.renew).values()
        each = quickest / len(asked.now) * 1e6
        spent = measure_cpu(calls, repeats, asked.renew)["read"] / len(asked.now) * 1e6
        weight = (size(peer) - before) / entries
        print(f"| {peer.name} | {entries:,} | {each:.1f} | {spent:.1f} | {weight:,.0f} | {stored_in:.1f} |", flush=True)
    peer.close()


def _measure_server_bytes(server: Any, peer: Any) -> float:
    if isinstance(server, servers.RedisServer):
        return float(server.call("INFO", "memory")["used_memory"])
    if isinstance(server, servers.PostgresServer):
        server.call(f"VACUUM embedonce_{peer.column}")
        return float(server.call(f"SELECT pg_total_relation_size('embedonce_{peer.column}')"))
    from pymemcache.client.base import Client

    client = Client(server.address)
    try:
        return float(client.stats()[b"bytes"])
    finally:
        client.close()


def _measure_disk_bytes(peer: Any) -> float:
    return float(sum(path.stat().st_size for path in peer.folder.rglob("*") if path.is_file()))


# --- main -----------------------------------------------------------------------------------------


SECTIONS: dict[str, Callable[[int], None]] = {
    "hits": measure_hits,
    "misses": measure_misses,
    "leases": measure_leases,
    "writes": measure_writes,
    "promotion": measure_promotion,
    "threads": measure_threads,
    "processes": measure_processes,
    "growth": measure_growth,
}


def list_versions() -> str:
    found = [f"Python {platform.python_version()}"]
    for package in ("embedonce", "numpy", "redis", "hiredis", "redisvl", "psycopg", "pymemcache", "diskcache"):
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"{package} not installed")
    return ", ".join(found)


def main() -> None:
    parser = argparse.ArgumentParser(description="Print the tables of the shared tiers.")
    parser.add_argument("--quick", action="store_true", help="3 repeats instead of 9")
    parser.add_argument("--full", action="store_true", help="growth up to 1,000,000 entries: GBs of memory and disk")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, help="only these sections")
    parser.add_argument("--servers", nargs="+", choices=KINDS, help="only these servers")
    options = parser.parse_args()
    for kind in [kind for kind in KINDS if options.servers and kind not in options.servers]:
        del KINDS[kind]
    print(list_versions(), flush=True)
    repeats = 3 if options.quick else 9
    for name, section in SECTIONS.items():
        if options.only and name not in options.only:
            continue
        if section is measure_growth:
            measure_growth(repeats, 1_000_000 if options.full else 100_000)
        else:
            section(repeats)


if __name__ == "__main__":
    main()
