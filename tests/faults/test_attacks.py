"""What a hostile network, server or neighbour can do to the tiers that machines share, beyond the matrix."""

from __future__ import annotations

import asyncio
import gc
import os
import socketserver
import stat
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from urllib.parse import quote

import psycopg
import pytest
import redis
from faults.cells import FACES, RESUME, Caller, Face
from servers import HOST, MemcachedServer, PostgresServer, RedisClusterServers, RedisServer, Server, wait_until

from embedonce import Cache, EraseIncomplete, Tier, TierError
from embedonce.contracts import Backend
from embedonce.testing import CountingProvider
from embedonce.testing.contracts.support import in_threads
from embedonce_backends.memcached import MemcachedBackend
from embedonce_backends.postgres import PostgresBackend
from embedonce_backends.redis import RedisBackend

PATIENT = 60.0
TEXTS = [f"text {number}" for number in range(30)]

faces = pytest.mark.parametrize("face", FACES)


class Asked:
    """A cache over one tier, asked through one face; every answer is checked."""

    def __init__(self, cache: Cache, provider: CountingProvider, runner: asyncio.Runner | None) -> None:
        self.cache = cache
        self.provider = provider
        self.caller = Caller(cache, runner)

    def fetch(self, texts: list[str] = TEXTS) -> list[str | None]:
        fetched = self.caller.fetch(texts)
        for text, row in zip(texts, fetched.rows, strict=True):
            assert row is not None
            assert row.tobytes() == self.provider.vector_of(text).tobytes(), text
        return list(fetched.sources)

    def until_back(self) -> None:
        wait_until(lambda: self.fetch() == ["far"] * len(TEXTS), "the tier serves", RESUME)

    @property
    def causes(self) -> Counter[str]:
        return Counter(self.cache.stats().tiers["far"].causes)


@contextmanager
def asked(backend: Backend, face: Face, *, timeout: float = PATIENT, **options: Any) -> Iterator[Asked]:
    provider = CountingProvider(dimensions=32)
    clock = options.pop("clock", None)
    tier = Tier(backend, name="far", timeout=timeout, write="inline", **options)
    cache = Cache(provider, [tier], **({"clock": clock} if clock else {}))
    with ExitStack() as stack:
        runner = stack.enter_context(asyncio.Runner()) if face == "async" else None
        one = Asked(cache, provider, runner)
        stack.callback(one.caller.close)
        yield one


@pytest.fixture(scope="module")
def servers() -> Iterator[dict[str, Any]]:
    """One of each, that a test may stop."""
    with RedisServer() as redis, PostgresServer() as postgres, MemcachedServer() as memcached:
        yield {"redis": redis, "postgres": postgres, "memcached": memcached}


@pytest.fixture(params=["redis", "postgres", "memcached"])
def kind(request: pytest.FixtureRequest, servers: dict[str, Any]) -> Iterator[str]:
    yield request.param
    servers["redis"].call("FLUSHALL")
    servers["postgres"].call("DROP TABLE IF EXISTS embedonce")
    servers["memcached"].call("flush_all")


def backend_of(kind: str, address: str, **options: Any) -> Any:
    if kind == "redis":
        return RedisBackend(url=f"redis://{address}/0", **options)
    if kind == "postgres":
        return PostgresBackend(url=f"postgresql://postgres@{address}/postgres", **options)
    return MemcachedBackend(servers=[address], **options)


# --- servers that hang, names that stand for nothing ------------------------------------------------


@contextmanager
def stopped(server: Server) -> Iterator[None]:
    """Let a server hang, all of it."""
    server.pause()
    try:
        yield
    finally:
        server.resume()


@faces
def test_a_server_that_is_stopped_costs_one_timeout_with_a_lease_too(
    kind: str, face: Face, servers: dict[str, Any]
) -> None:
    server = servers[kind]
    tier = Tier(backend_of(kind, server.address), name="far", timeout=0.5, lease=PATIENT)
    provider = CountingProvider()
    with Cache(provider, [tier]) as cache, stopped(server):
        vectors = asyncio.run(cache.aembed_batch(TEXTS)) if face == "async" else cache.embed_batch(TEXTS)
        assert (vectors[0] == provider.vector_of(TEXTS[0])).all()
        assert cache.stats().tiers["far"].causes == {"timeout": len(TEXTS)}


def test_a_server_that_is_stopped_holds_up_no_listing(
    kind: str, servers: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("embedonce_backends._pages.PAGE_SECONDS", 0.3)
    server = servers[kind]
    tier = Tier(backend_of(kind, server.address), name="far", timeout=0.5, write="inline")
    with Cache(CountingProvider(), [tier]) as cache:
        cache.embed_batch(TEXTS)
        with stopped(server):
            assert cache.contents()[0].error
            with pytest.raises(EraseIncomplete):
                cache.purge(version="v1")
            with pytest.raises(TierError):
                cache.list_metadata()
            assert cache.explain("never seen").tiers["far"] != "miss"


@faces
def test_a_server_that_is_stopped_costs_one_timeout(kind: str, face: Face, servers: dict[str, Any]) -> None:
    """Its system goes on accepting connections: nothing but a deadline tells."""
    server = servers[kind]
    with asked(backend_of(kind, server.address), face, timeout=0.5) as one:
        one.until_back()
        before = one.causes["timeout"]
        with stopped(server):
            for _ in range(5):
                one.fetch()
            paid = one.causes["timeout"] - before
        assert paid == len(TEXTS)
        one.until_back()


@faces
def test_a_name_that_stands_for_nothing_is_an_error(kind: str, face: Face) -> None:
    with asked(backend_of(kind, "no-such-host.invalid:9"), face) as one:
        for _ in range(4):
            assert one.fetch() == ["provider"] * len(TEXTS)
        assert one.causes.total() == 3 * len(TEXTS)
        assert one.causes.keys() <= {"gaierror", "ConnectionError", "OperationalError"}


@faces
def test_addresses_of_ipv6(kind: str, face: Face) -> None:
    with asked(backend_of(kind, "[::1]:9"), face) as one:
        assert one.fetch() == ["provider"] * len(TEXTS)
        assert one.causes.keys() <= {"ConnectionError", "ConnectionRefusedError", "OperationalError", "OSError"}


def test_a_password_of_odd_characters_in_a_url(servers: dict[str, Any]) -> None:
    server = servers["postgres"]
    secret = "p@ss/w:rd#% ?&"
    access = server.data / "pg_hba.conf"
    access.write_text(f"host all odd 127.0.0.1/32 scram-sha-256\n{access.read_text()}")
    server.call(f"CREATE ROLE odd LOGIN PASSWORD '{secret}'; GRANT CREATE ON SCHEMA public TO odd")
    server.reload()
    url = f"postgresql://odd:{quote(secret, safe='')}@{server.address}/postgres"
    backend = PostgresBackend(url=url, table="odd")
    with asked(backend, "sync") as one:
        one.until_back()
        assert secret not in repr(backend)
        assert not one.causes


# --- many loops, clocks, neighbours -----------------------------------------------------------------


def test_many_loops_in_many_threads(kind: str, servers: dict[str, Any]) -> None:
    provider = CountingProvider(dimensions=32)
    backend = backend_of(kind, servers[kind].address)
    with Cache(provider, [Tier(backend, name="far", timeout=PATIENT)]) as cache:

        async def ask(number: int) -> None:
            for turn in range(5):
                texts = [f"{number} {turn} {place}" for place in range(5)] + TEXTS
                found = await asyncio.gather(*(cache.afetch(texts) for _ in range(4)))
                for fetched in found:
                    for text, row in zip(texts, fetched.rows, strict=True):
                        assert row is not None
                        assert row.tobytes() == provider.vector_of(text).tobytes()
            await cache._chain.tiers[0].close_twin(cache._chain.ports.get_loop_port())

        in_threads(8, lambda number: asyncio.run(ask(number)), "a loop in each of eight threads")
        assert cache.flush(PATIENT)
        assert max(provider.count.values()) == 1
        assert not cache.stats().tiers["far"].causes


@faces
def test_a_clock_that_jumps(kind: str, face: Face, servers: dict[str, Any]) -> None:
    """Back: what is stored is served. Ahead: it has expired, and is replaced. No entry is lost for good."""
    now = [1_800_000_000.0]
    day = 86_400.0
    with asked(backend_of(kind, servers[kind].address), face, ttl=7 * day, clock=lambda: now[0]) as one:
        one.until_back()
        now[0] -= day
        assert one.fetch() == ["far"] * len(TEXTS)
        now[0] += 30 * day
        assert one.fetch() == ["provider"] * len(TEXTS)
        assert one.fetch() == ["far"] * len(TEXTS)
        now[0] -= 20 * day
        assert one.fetch() == ["far"] * len(TEXTS)
        assert not one.causes


@faces
def test_what_somebody_else_writes_under_our_keys_is_computed_and_replaced(face: Face, servers: dict[str, Any]) -> None:
    for junk in (b"", b"junk", b"EO1\0" + bytes(100)):
        with asked(backend_of("redis", servers["redis"].address), face) as one:
            one.until_back()
            keys = [one.cache.explain(text).key for text in TEXTS]
            for key in keys[:10]:
                servers["redis"].call("SET", key, junk)
            assert one.fetch() == ["provider"] * 10 + ["far"] * 20
            assert one.fetch() == ["far"] * len(TEXTS)
            assert one.cache.stats().tiers["far"].corrupt == 10


@faces
def test_a_key_of_another_type_is_a_miss_and_replaced(face: Face, servers: dict[str, Any]) -> None:
    """A cluster answers it with an error, which must neither open the breaker nor keep the key from being stored."""
    with RedisClusterServers() as cluster:
        for url, call in (
            (servers["redis"].url, servers["redis"].call),
            (cluster.url, lambda *words: on_its_node(cluster, *words)),
        ):
            with asked(RedisBackend(url=url), face) as one:
                one.until_back()
                keys = [one.cache.explain(text).key for text in TEXTS]
                for _ in range(4):
                    for key in keys[:5]:
                        call("DEL", key)
                        call("LPUSH", key, "junk")
                    assert one.fetch() == ["provider"] * 5 + ["far"] * 25
                    assert one.fetch() == ["far"] * len(TEXTS)
                assert not one.causes


def on_its_node(cluster: RedisClusterServers, *words: str) -> Any:
    for node in cluster.members:
        try:
            return node.call(*words)
        except redis.exceptions.MovedError:
            continue
    raise AssertionError("no node has the key")


def test_loops_that_end_without_closing_leave_no_connection(kind: str, servers: dict[str, Any]) -> None:
    """Warnings are errors: nor does one of them tell of what was left open."""
    backend = backend_of(kind, servers[kind].address)
    with Cache(CountingProvider(), [Tier(backend, name="far", timeout=PATIENT)]) as cache:
        asyncio.run(cache.afetch(TEXTS))
        assert cache.flush(PATIENT)
        before = sockets()
        gc.disable()  # a loop that has ended is part of a cycle
        try:
            for _ in range(10):
                asyncio.run(cache.afetch(TEXTS))
                assert sockets() <= before
        finally:
            gc.enable()


def sockets() -> int:
    """Return how many sockets this process has open."""
    return sum(stat.S_ISSOCK(os.fstat(int(name)).st_mode) for name in os.listdir("/dev/fd") if is_open(int(name)))


def is_open(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError:  # the listing itself
        return False
    return True


# --- servers that are full of clients, or have become something else ----------------------------------


@faces
def test_a_postgres_that_takes_no_more_clients(face: Face) -> None:
    with (
        PostgresServer("-c", "max_connections=4", "-c", "superuser_reserved_connections=0") as server,
        ExitStack() as others,
        asked(PostgresBackend(url=server.url), face) as one,
    ):
        for _ in range(4):  # a session that has ended, as those of ``ready``, may keep its place for a moment
            wait_until(lambda: taken(server.url, others), "one more is let in")
        for _ in range(4):
            assert one.fetch() == ["provider"] * len(TEXTS)
        assert one.causes.keys() == {"OperationalError"}
        others.close()
        one.until_back()


def taken(url: str, others: ExitStack) -> bool:
    """Take one of the places for clients, if one is free."""
    try:
        others.enter_context(psycopg.connect(url))
    except psycopg.OperationalError:
        return False
    return True


@faces
def test_a_redis_that_takes_no_more_clients(face: Face) -> None:
    with (
        RedisServer() as server,
        redis.Redis(host=HOST, port=server.port) as other,
        asked(RedisBackend(url=server.url), face) as one,
    ):
        other.config_set("maxclients", 1)
        for _ in range(4):
            assert one.fetch() == ["provider"] * len(TEXTS)
        assert one.causes.keys() <= {"ConnectionError", "ConnectionResetError", "MaxConnectionsError", "ResponseError"}
        other.config_set("maxclients", 100)
        one.until_back()


# --- a server that says anything ------------------------------------------------------------------


class Saying:
    """A server that answers each command of the Redis protocol with what the test says."""

    def __init__(self, answer: Callable[[list[bytes]], bytes]) -> None:
        self.commands: list[list[bytes]] = []
        saying = self

        class Handler(socketserver.StreamRequestHandler):
            def handle(self) -> None:
                try:
                    while line := self.rfile.readline():
                        words = []
                        for _ in range(int(line[1:])):
                            words.append(self.rfile.read(int(self.rfile.readline()[1:])))
                            self.rfile.readline()
                        saying.commands.append(words)
                        self.wfile.write(answer(words))
                except (OSError, ValueError):
                    return

        class Threads(socketserver.ThreadingTCPServer):
            daemon_threads = True
            allow_reuse_address = True

        self._server = Threads((HOST, 0), Handler)
        self.address = f"{HOST}:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def __enter__(self) -> Saying:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


ERRORS = {
    "LOADING Redis is loading the dataset in memory": "BusyLoadingError",
    "READONLY You can't write against a read only replica.": "ReadOnlyError",
    "OOM command not allowed when used memory > 'maxmemory'.": "OutOfMemoryError",
    "MOVED 3999 127.0.0.1:1": "MovedError",
    "ASK 3999 127.0.0.1:1": "AskError",
    "CLUSTERDOWN The cluster is down": "ClusterDownError",
    "MASTERDOWN Link with MASTER is down": "MasterDownError",
    "BUSY Redis is busy running a script.": "ResponseError",
    "NOAUTH Authentication required.": "AuthenticationError",
    "MISCONF Redis is configured to save RDB snapshots": "ResponseError",
    "ERR \xff unheard of": "ResponseError",
}


@faces
@pytest.mark.parametrize("words", ERRORS, ids=lambda words: words.split()[0])
def test_whatever_error_redis_answers_is_counted_by_its_name(words: str, face: Face) -> None:
    with (
        Saying(lambda _: b"-" + words.encode("latin-1") + b"\r\n") as server,
        asked(RedisBackend(url=f"redis://{server.address}"), face) as one,
    ):
        for _ in range(5):
            assert one.fetch() == ["provider"] * len(TEXTS)
        assert one.causes == {ERRORS[words]: 3 * len(TEXTS)}
        assert len(server.commands) <= 8


NONSENSE: dict[str, Callable[[list[bytes]], bytes]] = {
    "too few": lambda words: b"*1\r\n$1\r\nx\r\n",
    "too many": lambda words: b"*%d\r\n" % len(words) + b"$1\r\nx\r\n" * len(words),
    "nested": lambda words: b"*%d\r\n" % (len(words) - 1) + b"*1\r\n$1\r\nx\r\n" * (len(words) - 1),
    "numbers": lambda words: b"*%d\r\n" % (len(words) - 1) + b":7\r\n" * (len(words) - 1),
    "errors in it": lambda words: b"*%d\r\n" % (len(words) - 1) + b"-ERR no\r\n" * (len(words) - 1),
    "a status": lambda words: b"+OK\r\n",
    "nothing": lambda words: b"*-1\r\n",
    "a push": lambda words: b">2\r\n$1\r\nx\r\n$1\r\ny\r\n",
    "two replies": lambda words: b"+OK\r\n+OK\r\n",
    "http": lambda words: b"HTTP/1.1 400 Bad Request\r\n\r\n",
}


@faces
@pytest.mark.parametrize("name", NONSENSE)
def test_a_reply_of_another_shape_is_an_error(name: str, face: Face) -> None:
    with (
        Saying(NONSENSE[name]) as server,
        asked(RedisBackend(url=f"redis://{server.address}"), face, timeout=1.0) as one,
    ):
        for _ in range(5):
            assert one.fetch() == ["provider"] * len(TEXTS)
        stats = one.cache.stats().tiers["far"]
        assert stats.hits == stats.misses == stats.stored == 0
        assert stats.errors


@faces
def test_a_value_that_never_ends_is_a_timeout(face: Face) -> None:
    with (
        Saying(lambda words: b"*%d\r\n$500000000\r\n" % (len(words) - 1) + bytes(1000)) as server,
        asked(RedisBackend(url=f"redis://{server.address}"), face, timeout=0.5) as one,
    ):
        for _ in range(5):
            assert one.fetch() == ["provider"] * len(TEXTS)
        assert one.causes == {"timeout": len(TEXTS)}


@faces
def test_a_cluster_that_sends_one_round_in_circles(face: Face) -> None:
    def answer(words: list[bytes]) -> bytes:
        port = int(server.address.rpartition(":")[2])
        if words[0] == b"CLUSTER":
            return b"*1\r\n*3\r\n:0\r\n:16383\r\n*2\r\n$9\r\n127.0.0.1\r\n:%d\r\n" % port
        return b"-MOVED 1 127.0.0.1:%d\r\n" % port

    with Saying(answer) as server, asked(RedisBackend(url=f"redis+cluster://{server.address}"), face) as one:
        for _ in range(5):
            assert one.fetch() == ["provider"] * len(TEXTS)
        assert one.causes == {"MovedError": 3 * len(TEXTS)}
