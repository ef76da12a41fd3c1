"""Attacks that the fault matrix does not cover: the network, a server or another client attacks a shared tier."""

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
from faults.cells import FACES, RECOVERY_TIMEOUT, Caller, Face
from servers import HOST, MemcachedServer, PostgresServer, RedisClusterServers, RedisServer, Server, wait_until

from embedonce import Cache, EraseIncomplete, Tier, TierError
from embedonce.contracts import Backend
from embedonce.testing import CountingProvider
from embedonce.testing.contracts.support import run_in_threads
from embedonce_backends.memcached import MemcachedBackend
from embedonce_backends.postgres import PostgresBackend
from embedonce_backends.redis import RedisBackend

LONG_TIMEOUT = 60.0
TEXTS = [f"text {number}" for number in range(30)]

faces = pytest.mark.parametrize("face", FACES)


class CheckedCache:
    """Calls a cache over one tier, with the blocking or the async methods, and checks every answer."""

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

    def wait_until_served(self) -> None:
        wait_until(lambda: self.fetch() == ["far"] * len(TEXTS), "the tier serves", RECOVERY_TIMEOUT)

    @property
    def causes(self) -> Counter[str]:
        return Counter(self.cache.stats().tiers["far"].causes)


@contextmanager
def open_checked(
    backend: Backend, face: Face, *, timeout: float = LONG_TIMEOUT, **options: Any
) -> Iterator[CheckedCache]:
    provider = CountingProvider(dimensions=32)
    clock = options.pop("clock", None)
    tier = Tier(backend, name="far", timeout=timeout, write="inline", **options)
    cache = Cache(provider, [tier], **({"clock": clock} if clock else {}))
    with ExitStack() as stack:
        runner = stack.enter_context(asyncio.Runner()) if face == "async" else None
        one = CheckedCache(cache, provider, runner)
        stack.callback(one.caller.close)
        yield one


@pytest.fixture(scope="module")
def servers() -> Iterator[dict[str, Any]]:
    """One server of each kind, which a test may pause."""
    with RedisServer() as redis, PostgresServer() as postgres, MemcachedServer() as memcached:
        yield {"redis": redis, "postgres": postgres, "memcached": memcached}


@pytest.fixture(params=["redis", "postgres", "memcached"])
def kind(request: pytest.FixtureRequest, servers: dict[str, Any]) -> Iterator[str]:
    yield request.param
    servers["redis"].call("FLUSHALL")
    servers["postgres"].call("DROP TABLE IF EXISTS embedonce")
    servers["memcached"].call("flush_all")


def make_backend(kind: str, address: str, **options: Any) -> Any:
    if kind == "redis":
        return RedisBackend(url=f"redis://{address}/0", **options)
    if kind == "postgres":
        return PostgresBackend(url=f"postgresql://postgres@{address}/postgres", **options)
    return MemcachedBackend(servers=[address], **options)


# --- servers that hang, names that do not resolve ---------------------------------------------------


@contextmanager
def pause(server: Server) -> Iterator[None]:
    """Pause a server with all its processes."""
    server.pause()
    try:
        yield
    finally:
        server.resume()


@faces
def test_a_call_waits_only_once_for_a_paused_server_even_with_leases(
    kind: str, face: Face, servers: dict[str, Any]
) -> None:
    server = servers[kind]
    tier = Tier(make_backend(kind, server.address), name="far", timeout=0.5, lease=LONG_TIMEOUT)
    provider = CountingProvider()
    with Cache(provider, [tier]) as cache, pause(server):
        vectors = asyncio.run(cache.aembed_batch(TEXTS)) if face == "async" else cache.embed_batch(TEXTS)
        assert (vectors[0] == provider.vector_of(TEXTS[0])).all()
        assert cache.stats().tiers["far"].causes == {"timeout": len(TEXTS)}


def test_a_paused_server_does_not_block_a_listing(
    kind: str, servers: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("embedonce_backends._pages.PAGE_SECONDS", 0.3)
    server = servers[kind]
    tier = Tier(make_backend(kind, server.address), name="far", timeout=0.5, write="inline")
    with Cache(CountingProvider(), [tier]) as cache:
        cache.embed_batch(TEXTS)
        with pause(server):
            assert cache.contents()[0].error
            with pytest.raises(EraseIncomplete):
                cache.purge(version="v1")
            with pytest.raises(TierError):
                cache.list_metadata()
            assert cache.explain("never seen").tiers["far"] != "miss"


@faces
def test_calls_wait_only_once_for_a_paused_server(kind: str, face: Face, servers: dict[str, Any]) -> None:
    """The operating system still accepts connections, so only a deadline reveals that the server hangs."""
    server = servers[kind]
    with open_checked(make_backend(kind, server.address), face, timeout=0.5) as one:
        one.wait_until_served()
        before = one.causes["timeout"]
        with pause(server):
            for _ in range(5):
                one.fetch()
            paid = one.causes["timeout"] - before
        assert paid == len(TEXTS)
        one.wait_until_served()


@faces
def test_a_host_name_that_does_not_resolve_is_an_error(kind: str, face: Face) -> None:
    with open_checked(make_backend(kind, "no-such-host.invalid:9"), face) as one:
        for _ in range(4):
            assert one.fetch() == ["provider"] * len(TEXTS)
        assert one.causes.total() == 3 * len(TEXTS)
        assert one.causes.keys() <= {"gaierror", "ConnectionError", "OperationalError"}


@faces
def test_an_ipv6_address_without_a_server_is_an_error(kind: str, face: Face) -> None:
    with open_checked(make_backend(kind, "[::1]:9"), face) as one:
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
    with open_checked(backend, "sync") as one:
        one.wait_until_served()
        assert secret not in repr(backend)
        assert not one.causes


# --- many loops, clocks, neighbours -----------------------------------------------------------------


def test_many_loops_in_many_threads(kind: str, servers: dict[str, Any]) -> None:
    provider = CountingProvider(dimensions=32)
    backend = make_backend(kind, servers[kind].address)
    with Cache(provider, [Tier(backend, name="far", timeout=LONG_TIMEOUT)]) as cache:

        async def ask(number: int) -> None:
            for turn in range(5):
                texts = [f"{number} {turn} {place}" for place in range(5)] + TEXTS
                found = await asyncio.gather(*(cache.afetch(texts) for _ in range(4)))
                for fetched in found:
                    for text, row in zip(texts, fetched.rows, strict=True):
                        assert row is not None
                        assert row.tobytes() == provider.vector_of(text).tobytes()
            await cache._chain.tiers[0].close_twin(cache._chain.ports.get_loop_port())

        run_in_threads(8, lambda number: asyncio.run(ask(number)), "a loop in each of eight threads")
        assert cache.flush(LONG_TIMEOUT)
        assert max(provider.count.values()) == 1
        assert not cache.stats().tiers["far"].causes


@faces
def test_a_clock_that_jumps(kind: str, face: Face, servers: dict[str, Any]) -> None:
    """When the clock jumps by more than a minute, entries have expired and are replaced.

    Before a jump back, an entry was stored with an expiry date that is too far ahead of the new clock.
    """
    now = [1_800_000_000.0]
    day = 86_400.0
    with open_checked(make_backend(kind, servers[kind].address), face, ttl=7 * day, clock=lambda: now[0]) as one:
        one.wait_until_served()
        now[0] -= 30.0
        assert one.fetch() == ["far"] * len(TEXTS)
        for jump in (-day, 30 * day, -20 * day):
            now[0] += jump
            assert one.fetch() == ["provider"] * len(TEXTS)
            assert one.fetch() == ["far"] * len(TEXTS)
        assert not one.causes


@faces
def test_texts_with_junk_under_their_keys_are_embedded_and_stored_again(face: Face, servers: dict[str, Any]) -> None:
    for junk in (b"", b"junk", b"EO1\0" + bytes(100)):
        with open_checked(make_backend("redis", servers["redis"].address), face) as one:
            one.wait_until_served()
            keys = [one.cache.explain(text).key for text in TEXTS]
            for key in keys[:10]:
                servers["redis"].call("SET", key, junk)
            assert one.fetch() == ["provider"] * 10 + ["far"] * 20
            assert one.fetch() == ["far"] * len(TEXTS)
            assert one.cache.stats().tiers["far"].corrupt == 10


@faces
def test_a_key_of_another_type_is_a_miss_and_replaced(face: Face, servers: dict[str, Any]) -> None:
    """A cluster answers a read of such a key with an error, which must not open the breaker or prevent a write."""
    with RedisClusterServers() as cluster:
        for url, call in (
            (servers["redis"].url, servers["redis"].call),
            (cluster.url, lambda *words: call_owning_node(cluster, *words)),
        ):
            with open_checked(RedisBackend(url=url), face) as one:
                one.wait_until_served()
                keys = [one.cache.explain(text).key for text in TEXTS]
                for _ in range(4):
                    for key in keys[:5]:
                        call("DEL", key)
                        call("LPUSH", key, "junk")
                    assert one.fetch() == ["provider"] * 5 + ["far"] * 25
                    assert one.fetch() == ["far"] * len(TEXTS)
                assert not one.causes


def call_owning_node(cluster: RedisClusterServers, *words: str) -> Any:
    for node in cluster.members:
        try:
            return node.call(*words)
        except redis.exceptions.MovedError:
            continue
    raise AssertionError("no node has the key")


def test_loops_that_end_without_closing_leave_no_connection(kind: str, servers: dict[str, Any]) -> None:
    """Warnings are errors in the tests, so this test also fails on a warning about an unclosed connection."""
    backend = make_backend(kind, servers[kind].address)
    with Cache(CountingProvider(), [Tier(backend, name="far", timeout=LONG_TIMEOUT)]) as cache:
        asyncio.run(cache.afetch(TEXTS))
        assert cache.flush(LONG_TIMEOUT)
        before = count_sockets()
        gc.disable()  # a closed loop is in a reference cycle, and the collection of that cycle would hide a leak
        try:
            for _ in range(10):
                asyncio.run(cache.afetch(TEXTS))
                assert count_sockets() <= before
        finally:
            gc.enable()


def count_sockets() -> int:
    """Return the number of open sockets in this process."""
    return sum(stat.S_ISSOCK(os.fstat(int(name)).st_mode) for name in os.listdir("/dev/fd") if is_open(int(name)))


def is_open(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError:  # os.listdir had opened this descriptor, and closed it again
        return False
    return True


# --- servers that accept no more clients --------------------------------------------------------------


@faces
def test_a_postgres_that_takes_no_more_clients(face: Face) -> None:
    with (
        PostgresServer("-c", "max_connections=4", "-c", "superuser_reserved_connections=0") as server,
        ExitStack() as others,
        open_checked(PostgresBackend(url=server.url), face) as one,
    ):
        # ``is_ready`` may have opened a session. A session may keep its slot for a moment after it has ended.
        for _ in range(4):
            wait_until(lambda: take_client_slot(server.url, others), "a client slot is free")
        for _ in range(4):
            assert one.fetch() == ["provider"] * len(TEXTS)
        assert one.causes.keys() == {"TooManyConnections"}
        others.close()
        one.wait_until_served()


def take_client_slot(url: str, others: ExitStack) -> bool:
    """Take one client slot, and return whether a slot was free."""
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
        open_checked(RedisBackend(url=server.url), face) as one,
    ):
        other.config_set("maxclients", 1)
        for _ in range(4):
            assert one.fetch() == ["provider"] * len(TEXTS)
        assert one.causes.keys() <= {"ConnectionError", "ConnectionResetError", "MaxConnectionsError", "ResponseError"}
        other.config_set("maxclients", 100)
        one.wait_until_served()


# --- a server with arbitrary replies ----------------------------------------------------------------


class ScriptedRedis:
    """A server that answers each Redis command with the reply that the test chooses."""

    def __init__(self, answer: Callable[[list[bytes]], bytes]) -> None:
        self.commands: list[list[bytes]] = []
        scripted = self

        class Handler(socketserver.StreamRequestHandler):
            def handle(self) -> None:
                try:
                    while line := self.rfile.readline():
                        words = []
                        for _ in range(int(line[1:])):
                            words.append(self.rfile.read(int(self.rfile.readline()[1:])))
                            self.rfile.readline()
                        scripted.commands.append(words)
                        self.wfile.write(answer(words))
                except (OSError, ValueError):
                    return

        class Threads(socketserver.ThreadingTCPServer):
            daemon_threads = True
            allow_reuse_address = True

        self._server = Threads((HOST, 0), Handler)
        self.address = f"{HOST}:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def __enter__(self) -> ScriptedRedis:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


ERRORS = {
    "LOADING Redis is loading the dataset in memory": "LOADING",
    "READONLY You can't write against a read only replica.": "READONLY",
    "OOM command not allowed when used memory > 'maxmemory'.": "OOM",
    "MOVED 3999 127.0.0.1:1": "MOVED",
    "ASK 3999 127.0.0.1:1": "ASK",
    "CLUSTERDOWN The cluster is down": "CLUSTERDOWN",
    "MASTERDOWN Link with MASTER is down": "MASTERDOWN",
    "BUSY Redis is busy running a script.": "BUSY",
    "NOAUTH Authentication required.": "NOAUTH",
    "MISCONF Redis is configured to save RDB snapshots": "MISCONF",
    "ERR \xff unheard of": "ResponseError",
}


@faces
@pytest.mark.parametrize("words", ERRORS, ids=lambda words: words.split()[0])
def test_every_error_of_redis_is_counted_under_its_name(words: str, face: Face) -> None:
    with (
        ScriptedRedis(lambda _: b"-" + words.encode("latin-1") + b"\r\n") as server,
        open_checked(RedisBackend(url=f"redis://{server.address}"), face) as one,
    ):
        for _ in range(5):
            assert one.fetch() == ["provider"] * len(TEXTS)
        assert one.causes == {ERRORS[words]: 3 * len(TEXTS)}
        assert len(server.commands) <= 8


INVALID_REPLIES: dict[str, Callable[[list[bytes]], bytes]] = {
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
@pytest.mark.parametrize("name", INVALID_REPLIES)
def test_a_reply_of_the_wrong_shape_is_an_error(name: str, face: Face) -> None:
    with (
        ScriptedRedis(INVALID_REPLIES[name]) as server,
        open_checked(RedisBackend(url=f"redis://{server.address}"), face, timeout=1.0) as one,
    ):
        for _ in range(5):
            assert one.fetch() == ["provider"] * len(TEXTS)
        stats = one.cache.stats().tiers["far"]
        assert stats.hits == stats.misses == stats.stored == 0
        assert stats.errors


@faces
def test_a_value_that_never_ends_causes_a_timeout(face: Face) -> None:
    with (
        ScriptedRedis(lambda words: b"*%d\r\n$500000000\r\n" % (len(words) - 1) + bytes(1000)) as server,
        open_checked(RedisBackend(url=f"redis://{server.address}"), face, timeout=0.5) as one,
    ):
        for _ in range(5):
            assert one.fetch() == ["provider"] * len(TEXTS)
        assert one.causes == {"timeout": len(TEXTS)}


@faces
def test_a_cluster_that_redirects_in_circles(face: Face) -> None:
    def answer(words: list[bytes]) -> bytes:
        port = int(server.address.rpartition(":")[2])
        if words[0] == b"CLUSTER":
            return b"*1\r\n*3\r\n:0\r\n:16383\r\n*2\r\n$9\r\n127.0.0.1\r\n:%d\r\n" % port
        return b"-MOVED 1 127.0.0.1:%d\r\n" % port

    with (
        ScriptedRedis(answer) as server,
        open_checked(RedisBackend(url=f"redis+cluster://{server.address}"), face) as one,
    ):
        for _ in range(5):
            assert one.fetch() == ["provider"] * len(TEXTS)
        assert one.causes == {"MOVED": 3 * len(TEXTS)}
