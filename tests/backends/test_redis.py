"""The Redis backend passes the contract on one server, a cluster, and behind sentinels; then tests of its own."""

from __future__ import annotations

import asyncio
import gc
import itertools
import os
import re
import socket
import socketserver
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import quote

import numpy as np
import pytest
import redis
from descriptors import without_descriptors
from servers import (
    Certificates,
    RedisClusterServers,
    RedisSentinelServers,
    RedisServer,
    Server,
    ValkeyServer,
    wait_until,
)

import embedonce
from embedonce import Cache, Tier
from embedonce.contracts import deadline
from embedonce.errors import CacheClosed, ConfigError, PartialAnswer, TierBusy, TierError, TierTimeout
from embedonce.testing import BackendContract, CountingProvider, FaultProxy, NetworkFault, Recipe
from embedonce.testing.contracts.backend import key
from embedonce.testing.contracts.support import run_in_fork
from embedonce_backends._nodes import NodeDown
from embedonce_backends.redis import RedisBackend
from embedonce_backends.redis.errors import Parser

PATIENT = 60.0
"""Seconds within which a healthy server answers on any machine."""

numbers = itertools.count()


@contextmanager
def pause_servers(*servers: Server) -> Iterator[None]:
    for server in servers:
        server.pause()
    try:
        yield
    finally:
        for server in servers:
            server.resume()


class RedisContract(BackendContract):
    """Gives each backend its own prefix, which keeps the stores apart in one Redis."""

    url: ClassVar[str]
    examples = 15

    def make(self) -> RedisBackend:
        self.prefix = f"test[{next(numbers)}]*:"
        return RedisBackend(url=self.url, prefix=self.prefix, max_connections=8, max_value_bytes=2**21)

    def reopen(self, backend: Any) -> RedisBackend:
        return RedisBackend(url=self.url, prefix=backend._prefix)

    def recipe(self, backend: Any) -> Recipe:
        return Recipe(RedisBackend, {"url": self.url, "prefix": backend._prefix})


class TestOneServer(RedisContract):
    @pytest.fixture(autouse=True)
    def on_server(self, redis_server: RedisServer) -> Iterator[None]:
        type(self).url = redis_server.url
        self.running = redis_server
        yield
        with redis.Redis.from_url(redis_server.url) as client:
            client.flushdb()

    def stall(self, backend: Any) -> Any:
        return pause_servers(self.running)

    def server(self) -> tuple[str, int]:
        return "127.0.0.1", self.running.port

    def through(self, backend: Any, host: str, port: int) -> RedisBackend:
        return RedisBackend(url=f"redis://{host}:{port}/0", prefix=backend._prefix)


class TestValkey(TestOneServer):
    """Valkey speaks the same protocol."""

    @pytest.fixture(autouse=True)
    def on_server(self, valkey_server: ValkeyServer) -> Iterator[None]:
        type(self).url = valkey_server.url.replace("redis://", "valkey://")
        self.running = valkey_server
        yield
        valkey_server.call("FLUSHDB")


class TestCluster(RedisContract):
    @pytest.fixture(autouse=True)
    def on_cluster(self, redis_cluster: RedisClusterServers) -> Iterator[None]:
        type(self).url = redis_cluster.url
        self.servers = redis_cluster
        yield
        redis_cluster.flush()

    def stall(self, backend: Any) -> Any:
        return pause_servers(*self.servers.members)

    @contextmanager
    def lose_a_node(self, backend: Any) -> Iterator[None]:
        for node in self.servers.members:
            node.call("CONFIG", "SET", "cluster-require-full-coverage", "no")
        lost = self.servers.members[1]
        lost.kill()
        yield
        lost.restart()
        wait_until(self.servers.is_complete, "the cluster is complete again")


class TestBehindSentinels(RedisContract):
    @pytest.fixture(autouse=True)
    def behind_sentinels(self, redis_sentinel: RedisSentinelServers) -> Iterator[None]:
        type(self).url = redis_sentinel.url
        yield
        redis_sentinel.master.call("FLUSHALL")


# --- Redis only -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def valkey_server() -> Iterator[ValkeyServer]:
    with ValkeyServer() as server:
        yield server


@pytest.fixture
def server() -> Iterator[RedisServer]:
    """A server for one test alone, which may stop or change it."""
    with RedisServer() as server:
        yield server


@pytest.fixture
def backends() -> Iterator[Any]:
    """A function that makes backends; they are closed after the test."""
    made: list[RedisBackend] = []

    def make(**options: Any) -> RedisBackend:
        made.append(RedisBackend(**options))
        return made[-1]

    yield make
    for backend in made:
        backend.close()


def items(count: int, size: int = 100) -> dict[str, bytes]:
    return {key(number): number.to_bytes(4, "big") * (size // 4) for number in range(count)}


def test_the_prefix_is_before_every_key(server: RedisServer, backends: Any) -> None:
    backend, other = backends(url=server.url, prefix="embed:v1:"), backends(url=server.url)
    backend.set_many(items(1), None)
    assert server.call("KEYS", "*") == [b"embed:v1:" + key(0).encode()]
    assert (list(backend.scan("eo1.")), list(other.scan("eo1."))) == ([key(0)], [])


def test_a_prefix_is_not_read_as_a_pattern(server: RedisServer, backends: Any) -> None:
    for prefix in ("a*", "a?", "a[bc]", "a\\", "a^-"):
        backends(url=server.url, prefix=prefix).set_many(items(1), None)
    for prefix in ("a*", "a?", "a[bc]", "a\\", "a^-"):
        backend = backends(url=server.url, prefix=prefix)
        assert list(backend.scan("eo1.")) == [key(0)], prefix
    assert backends(url=server.url, prefix="a*").count("") == 1


def test_the_server_frees_expired_entries(server: RedisServer, backends: Any) -> None:
    backend = backends(url=server.url)
    backend.set_many({key(1): b"a"}, 3600.0)
    backend.set_many({key(2): b"b"}, None)
    backend.set_many({key(3): b"c"}, 0.0001)
    backend.set_many({key(4): b"d"}, 1e300)
    assert set(backend.add_many({key(5): b"e"}, 7200.0)) == {key(5)}
    assert 3_500_000 < server.call("PTTL", key(1)) <= 3_600_000
    assert server.call("PTTL", key(2)) == -1
    assert server.call("PTTL", key(3)) <= 1
    assert server.call("PTTL", key(4)) > 10**14
    wait_until(lambda: not backend.get_many([key(3)]), "what has expired is gone")
    assert 7_100_000 < server.call("PTTL", key(5)) <= 7_200_000


def test_a_batch_is_one_trip(server: RedisServer, backends: Any) -> None:
    backend = backends(url=server.url)
    backend.set_many(items(500), 60.0)
    server.call("CONFIG", "RESETSTAT")
    assert backend.get_many(list(items(500))) == items(500)
    assert b"cmdstat_mget:calls=1," in _commands(server)
    backend.delete_many(list(items(500)))
    assert b"cmdstat_unlink:calls=1," in _commands(server)
    assert b"cmdstat_keys" not in _commands(server)


def _commands(server: RedisServer) -> bytes:
    with redis.Redis(port=server.port) as client:
        found: bytes = client.execute_command("INFO", "commandstats", NEVER_DECODE=True)
    return (
        str(found).encode().replace(b"'", b"").replace(b": {calls: ", b":calls=") if isinstance(found, dict) else found
    )


def test_no_text_is_in_redis(server: RedisServer, backends: Any) -> None:
    text = "an unmistakable sentence about herons"
    tier = Tier(backends(url=server.url), name="shared", timeout=PATIENT, write="inline")
    with Cache(CountingProvider(), [tier]) as cache:
        cache.embed_batch([text, "another"], task="query")
        assert cache.stats().tiers["shared"].stored == 2
    dump = b"".join(server.call("DUMP", name) or b"" for name in server.call("KEYS", "*"))
    names = b" ".join(server.call("KEYS", "*"))
    for word in ("herons", "unmistakable", "another"):
        assert word.encode() not in dump + names


def test_entries_are_found_after_a_restart_of_the_program(server: RedisServer) -> None:
    provider = CountingProvider()
    for _ in range(2):
        tier = Tier(RedisBackend(url=server.url), timeout=PATIENT)
        with Cache(provider, [tier], flush_timeout=PATIENT) as cache:
            cache.embed_batch(["a", "b"])
    assert dict(provider.count) == {"a": 1, "b": 1}


def test_a_cache_from_toml(server: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_REDIS", server.url)
    tier = {
        "type": "redis",
        "url": "${SOME_REDIS}",
        "prefix": "embed:v1:",
        "write": "inline",
        "ttl": "1h",
        "timeout": "60s",
    }
    with embedonce.open({"provider": {"type": "ngram"}, "tiers": [tier]}) as cache:
        first = cache.embed("a text")
        assert cache.fetch(["a text"]).sources == ["redis"]
        assert np.array_equal(first, cache.embed("a text"))
    assert all(name.startswith(b"embed:v1:eo1.") for name in server.call("KEYS", "*"))


# --- urls -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("http://localhost", "scheme"),
        ("localhost:6379", "scheme"),
        ("redis://", "host"),
        ("redis://a,b", "several hosts"),
        ("redis://host:0", "port"),
        ("redis://host:70000", "port"),
        ("redis://host/x", "database"),
        ("redis://host?socket_timeout=1", "option socket_timeout .* set timeout in the table"),
        ("rediss://host?ssl_cert_reqs=none", "option ssl_cert_reqs .* set ca_file .* check_hostname = false"),
        ("rediss://host?ssl_ca_certs=/pass.pem", "set ca_file in the table"),
        ("rediss://host?ssl_certfile=/pass.pem", "set cert_file in the table"),
        ("rediss://host?ssl_keyfile=/pass.pem", "set key_file in the table"),
        ("redis://host?ssl=true", "write rediss instead of redis"),
        ("redis://host?max_connections=3", "set max_connections in the table"),
        ("redis://host?password=pass", "set password in the table"),
        ("redis://host?decode_responses=true", "remove it"),
        ("redis://host?pass=pass&x=y", "set password in the table"),
        ("redis://host?my-pass=1", "options other than db"),
        ("redis+cluster://host/3", "only database 0"),
        ("redis+sentinel://host:26379", "service"),
        ("unix://", "socket"),
        ("redis://:pass#word@host", "fragment"),
        ("redis://user:pa/ss@host", "invalid host"),
        ("redis://[::1:6379", "parsed"),
    ],
)
def test_an_invalid_url_is_explained_and_not_repeated(url: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        RedisBackend(url=url)
    assert "pass" not in str(caught.value).replace("password", "").replace("option pass ", "")


def test_hosts_with_colons_and_sockets_can_be_named(server: RedisServer, backends: Any) -> None:
    for url in (f"unix://{server.socket}?db=3", f"valkey://localhost:{server.port}/3"):
        backend = backends(url=url)
        backend.set_many(items(3), None)
        assert backend.get_many(list(items(3))) == items(3)
        assert len(asyncio.run(_read_by_twin(backend))) == 3
    with redis.Redis(port=server.port, db=3) as client:
        assert client.dbsize() == 3
    RedisBackend(url="redis://[::1]:6379/0").close()


async def _read_by_twin(backend: RedisBackend, count: int = 3) -> dict[str, bytes]:
    return await _by_twin(backend, list(items(count)))


async def _by_twin(backend: RedisBackend, names: list[str]) -> dict[str, bytes]:
    twin: Any = backend.twin()
    try:
        found: dict[str, bytes] = await twin.get_many(names)
        return found
    finally:
        await twin.close()


def test_contradicting_or_unusable_options_are_refused() -> None:
    with pytest.raises(ConfigError, match="password is set both in url and as an option"):
        RedisBackend(url="redis://:a@host", password="b")
    with pytest.raises(ConfigError, match="ca_file requires TLS: use a rediss:// URL"):
        RedisBackend(url="redis://host", ca_file=Path("x"))
    with pytest.raises(ConfigError, match="cannot load ca_file"):
        RedisBackend(url="rediss://host", ca_file=Path("/does/not/exist"))


# --- the cause of a failure ---------------------------------------------------------------------------


def make_snapshots_fail(server: RedisServer) -> None:
    """Make Redis refuse writes with MISCONF: its snapshots fail, because a folder is where the file has to be."""
    (server.folder / "dump.rdb").mkdir()
    server.call("CONFIG", "SET", "save", "3600 1")
    server.call("BGSAVE")
    wait_until(lambda: server.call("INFO", "persistence")["rdb_last_bgsave_status"] == "err", "the snapshot failed")


WRITE_FAULTS: dict[str, Callable[[RedisServer], object]] = {
    "MISCONF": make_snapshots_fail,
    "OOM": lambda server: server.call("CONFIG", "SET", "maxmemory", "1"),
    "NOREPLICAS": lambda server: server.call("CONFIG", "SET", "min-replicas-to-write", "1"),
    "NOPERM": lambda server: server.call("ACL", "SETUSER", "default", "-set"),
    "READONLY": lambda server: server.call("REPLICAOF", "127.0.0.1", "1"),
}
LOGIN_FAULTS = {"NOAUTH": "redis://{}", "WRONGPASS": "redis://:wrong@{}"}


@pytest.mark.parametrize("word", WRITE_FAULTS)
def test_the_cause_of_a_refused_write_is_the_first_word_of_the_reply(
    word: str, caplog: pytest.LogCaptureFixture
) -> None:
    with RedisServer() as server:
        tier = Tier(RedisBackend(url=server.url), name="far", write="inline", timeout=PATIENT)
        with Cache(CountingProvider(), [tier]) as cache:
            WRITE_FAULTS[word](server)
            for number in range(3):
                cache.embed_batch([f"text {number}"])
            causes = cache.stats().tiers["far"].causes
            assert set(causes) == {word}
        server.call("CONFIG", "SET", "save", "")  # a server that cannot save does not stop
        assert word in caplog.text


@pytest.mark.parametrize("face", ["blocking", "async"])
@pytest.mark.parametrize("word", LOGIN_FAULTS)
def test_the_cause_of_a_refused_login_is_the_first_word_of_the_reply(word: str, face: str, backends: Any) -> None:
    with RedisServer(password="right") as server:
        backend = backends(url=LOGIN_FAULTS[word].format(server.address))
        with pytest.raises(redis.AuthenticationError) as caught:
            asyncio.run(_read_by_twin(backend)) if face == "async" else backend.get_many(list(items(3)))
        assert type(caught.value).__name__ == word


def test_a_word_that_redis_does_not_have_is_not_a_cause(server: RedisServer, backends: Any) -> None:
    error = Parser(64).parse_error("HOSTILE_1 anything")
    assert type(error) is redis.ResponseError


def test_a_partial_answer_names_the_cause(redis_cluster: RedisClusterServers, backends: Any) -> None:
    backend = backends(url=redis_cluster.url)
    redis_cluster.members[0].call("CONFIG", "SET", "maxmemory", "1")
    try:
        with pytest.raises(PartialAnswer, match=r"of 60 keys failed \(OOM\)"):
            backend.set_many(items(60), None)
    finally:
        redis_cluster.members[0].call("CONFIG", "SET", "maxmemory", "0")


def call_each_face(backend: RedisBackend) -> Iterator[Exception]:
    """Yield the error of a read by each face."""
    for call in (lambda: backend.get_many(list(items(6))), lambda: asyncio.run(_read_by_twin(backend, 6))):
        with deadline(PATIENT), pytest.raises(Exception) as caught:  # noqa: PT011  (each test checks the error)
            call()
        yield caught.value


def test_a_url_for_another_kind_of_server_is_explained(
    redis_server: RedisServer, redis_cluster: RedisClusterServers, redis_sentinel: RedisSentinelServers, backends: Any
) -> None:
    node, sentinel = redis_cluster.members[0].address, redis_sentinel.sentinels[0].address
    single = redis_server.url.removeprefix("redis://").removesuffix("/0")
    cases = {
        f"redis://{node}": "node of a cluster: write the URL as redis\\+cluster://",
        f"redis://{node}/1": "node of a cluster: write the URL as redis\\+cluster://",
        f"redis://{sentinel}": "if it is a sentinel, write the URL as redis\\+sentinel://",
        f"redis://{sentinel}/1": "if it is a sentinel, write the URL as redis\\+sentinel://",
        f"redis+cluster://{sentinel}": "not a node of a cluster",
        f"redis+sentinel://{single}/service": "not a sentinel: write the URL as redis://",
        f"redis+sentinel://{node}/service": "not a sentinel",
    }
    for url, words in cases.items():
        for error in call_each_face(backends(url=url)):
            assert re.search(words, str(error)), (url, error)
            assert key(0) not in str(error)


def test_errors_of_tls_are_explained(tmp_path: Path, backends: Any) -> None:
    with RedisServer(tls=Certificates(tmp_path)) as server:
        for error in call_each_face(backends(url=f"redis://127.0.0.1:{server.tls_port}")):
            assert "if this port expects TLS, write rediss" in str(error)
        for error in call_each_face(backends(url=f"rediss://127.0.0.1:{server.tls_port}")):
            assert type(error).__name__ == "SSLCertVerificationError"
        with pytest.raises(TierTimeout, match="if this port has no TLS, write redis instead"), deadline(3.0):
            backends(url=f"rediss://127.0.0.1:{server.port}").get_many(["a"])


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "no-such-host.invalid"])
async def test_missing_descriptors_are_the_cause(server: RedisServer, backends: Any, host: str) -> None:
    backend = backends(url=f"redis://{host}:{server.port}")
    twin: Any = backend.twin()
    with without_descriptors(), deadline(PATIENT):
        with pytest.raises(redis.ConnectionError, match="Too many open files") as caught:
            backend.get_many(["a"])
        with pytest.raises(redis.ConnectionError, match="Too many open files") as caught_async:
            await twin.get_many(["a"])
    assert {type(caught.value).__name__, type(caught_async.value).__name__} == {"EMFILE"}
    await twin.close()


def test_a_host_name_that_does_not_exist_is_the_cause(backends: Any) -> None:
    for error in call_each_face(backends(url="redis://no-such-host.invalid")):
        assert type(error).__name__ == "gaierror"


# --- users and permissions -----------------------------------------------------------------------------


def test_user_and_password_by_url_or_option(backends: Any) -> None:
    with RedisServer(password="s3cr:t/@") as server:
        server.call("ACL", "SETUSER", "embed", "on", ">p@ss", "~embed:*", "+@read", "+@write", "+@connection")
        address = server.address
        good = [
            {"url": server.url},
            {"url": f"redis://{address}", "password": "s3cr:t/@"},
            {"url": f"redis://embed:p%40ss@{address}"},
            {"url": f"redis://{address}", "username": "embed", "password": "p@ss"},
        ]
        for options in good:
            backend = backends(prefix="embed:", **options)
            backend.set_many(items(3), 60.0)
            assert backend.get_many(list(items(3))) == items(3)
            assert len(asyncio.run(_read_by_twin(backend))) == 3
        for options in ({"url": f"redis://{address}"}, {"url": f"redis://:wr0ng@{address}"}):
            backend = backends(**options)
            with pytest.raises(redis.AuthenticationError) as caught:
                backend.get_many([key(1)])
            assert "wr0ng" not in str(caught.value)
            with pytest.raises(redis.AuthenticationError):
                asyncio.run(_read_by_twin(backend))
        with pytest.raises(redis.exceptions.NoPermissionError):
            backends(url=f"redis://embed:p%40ss@{address}", prefix="other:").get_many([key(1)])


def test_nothing_shows_a_password(backends: Any) -> None:
    backend = backends(url="redis://user:s3cret@localhost:1", sentinel_password="s3cret")
    for shown in (backend, backend.capabilities, backend._settings, backend._client, backend._topology):
        assert "s3cret" not in repr(shown)
    with pytest.raises(redis.ConnectionError) as caught:
        backend.get_many([key(1)])
    assert "s3cret" not in repr(caught.value)


def test_tls_with_an_authority_file(tmp_path: Path, backends: Any) -> None:
    certificates = Certificates(tmp_path)
    with RedisServer(tls=certificates) as server:
        url = f"rediss://127.0.0.1:{server.tls_port}"
        backend = backends(url=url, ca_file=certificates.authority)
        backend.set_many(items(400, 4000), None)
        assert backend.get_many(list(items(400, 4000))) == items(400, 4000)
        assert asyncio.run(_read_by_twin(backend)) == items(3, 4000)
        with pytest.raises(redis.ConnectionError, match="certificate"):
            backends(url=url).get_many([key(1)])
        with pause_servers(server), deadline(0.2), pytest.raises(TimeoutError):
            backend.get_many([key(1)])
        with deadline(0.3), pytest.raises((redis.ConnectionError, TimeoutError)):
            backends(url=f"rediss://127.0.0.1:{server.port}", ca_file=certificates.authority).get_many([key(1)])
        assert len(backend.get_many(list(items(2)))) == 2


@pytest.mark.parametrize("place", ["url", "options"])
def test_an_acl_user_over_tls_from_toml_and_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    certificates = Certificates(tmp_path)
    secret = "p@ss/w:rd#%"
    with RedisServer(tls=certificates, password="admin") as server:
        server.call("ACL", "SETUSER", "embed", "on", f">{secret}", "resetkeys", "~embed:v1:*", "-@all", "+mget", "+set")
        address = f"127.0.0.1:{server.tls_port}"
        monkeypatch.setenv("REDIS_USER", "embed")
        monkeypatch.setenv("REDIS_PASSWORD", secret)
        monkeypatch.setenv("REDIS_URL", f"rediss://embed:{quote(secret, safe='')}@{address}/0")
        login = 'url = "${REDIS_URL}"'
        if place == "options":
            login = f'url = "rediss://{address}"\nusername = "${{REDIS_USER}}"\npassword = "${{REDIS_PASSWORD}}"'
        config = tmp_path / "embedonce.toml"
        config.write_text(
            f'[provider]\ntype = "ngram"\n[[tiers]]\ntype = "redis"\nprefix = "embed:v1:"\nwrite = "inline"\n'
            f'timeout = "60s"\nca_file = "{certificates.authority}"\n{login}\n'
        )
        with embedonce.open(config) as cache:
            cache.embed("text")
            assert cache.fetch(["text"]).sources == ["redis"]
            assert cache.stats().tiers["redis"].errors == 0
            assert secret not in repr(cache)

        async def read() -> Any:
            async with embedonce.open(config) as cache:
                return await cache.afetch(["text"])

        assert asyncio.run(read()).sources == ["redis"]
        monkeypatch.setenv("EMBEDONCE__TIERS__REDIS__CA_FILE", str(tmp_path / "none.pem"))
        with pytest.raises(ConfigError, match="ca_file") as caught:
            embedonce.open(config)
        assert secret not in str(caught.value)


def test_the_acl_of_the_documentation_is_enough_and_lets_nothing_block(backends: Any) -> None:
    """The user of the documentation may not run KEYS, FLUSHDB or DEL."""
    page = (Path(__file__).parent.parent.parent / "docs" / "redis.md").read_text()
    (line,) = [line for line in page.splitlines() if line.startswith("ACL SETUSER embedonce ")]
    provider = CountingProvider()
    with RedisServer(password="admin") as server:
        server.call(*line.replace(">PASSWORD", ">secret").split())
        backend = backends(url=f"redis://embedonce:secret@{server.address}", prefix="embed:v1:")
        with Cache(provider, [Tier(backend, name="shared", timeout=PATIENT, lease=PATIENT)]) as cache:
            cache.embed_batch([f"text {number}" for number in range(50)])
            cache.forget(["text 1"])
            assert cache.lookup(["text 1", "text 2"]).sources == [None, "shared"]
            assert asyncio.run(_read_by_twin(backend)) == {}
            assert [held.entries for held in cache.contents() if held.card] == [49]
            cache.purge(model=str(provider.space("document").model))
            assert cache.lookup(["text 2"]).sources == [None]
            assert not cache.stats().tiers["shared"].causes


def test_values_that_are_too_large_are_counted_as_drops_not_as_errors(server: RedisServer, backends: Any) -> None:
    small, large = CountingProvider(dimensions=8), CountingProvider(dimensions=384)
    for provider, stored in ((small, 10), (large, 0)):
        backend = backends(url=server.url, max_value_bytes=300)
        with Cache(provider, [Tier(backend, name="shared", write="inline", timeout=PATIENT)]) as cache:
            for _ in range(4):
                cache.embed_batch([f"text {number}" for number in range(10)])
            stats = cache.stats().tiers["shared"]
            assert (stats.stored, dict(stats.causes)) == (stored, {})
            assert dict(stats.drops) == ({} if stored else {"too large": 40})


# --- servers that are full, read-only, down, or back ---------------------------------------------------


def test_a_full_server_refuses_writes_and_keeps_its_entries(backends: Any) -> None:
    with RedisServer("--maxmemory", "4mb", "--maxmemory-policy", "noeviction") as server:
        backend = backends(url=server.url)
        backend.set_many(items(10), None)
        many = {key(1000 + number): os.urandom(100_000) for number in range(100)}
        with pytest.raises(PartialAnswer) as caught:
            backend.set_many(many, None)
        assert isinstance(caught.value.__cause__, redis.exceptions.OutOfMemoryError)
        assert backend.get_many(list(many)).keys() == many.keys() - caught.value.failed
        server.call("CONFIG", "SET", "maxmemory", "1")
        with pytest.raises(redis.exceptions.OutOfMemoryError):
            backend.set_many(items(30), None)
        assert backend.get_many(list(items(10))) == items(10)
        server.call("CONFIG", "SET", "maxmemory", "100mb")
        backend.set_many(items(20), None)
        assert len(backend.get_many(list(items(20)))) == 20


def test_a_server_that_evicts_is_a_cache(backends: Any) -> None:
    with RedisServer("--maxmemory", "4mb", "--maxmemory-policy", "allkeys-lru") as server:
        backend = backends(url=server.url)
        for start in range(100):
            backend.set_many({key(start): os.urandom(100_000)}, None)
        found = backend.get_many([key(number) for number in range(100)])
        assert 0 < len(found) < 100
        assert key(99) in found


def test_a_replica_takes_no_writes(redis_sentinel: RedisSentinelServers, backends: Any) -> None:
    backend = backends(url=redis_sentinel.replica.url)
    with pytest.raises(redis.ReadOnlyError):
        backend.set_many(items(2), None)
    with pytest.raises(redis.ReadOnlyError):
        backend.add_many(items(2), 60.0)
    assert backend.get_many([key(1)]) == {}


def test_a_server_that_comes_back_is_used_at_once(server: RedisServer, backends: Any) -> None:
    backend = backends(url=server.url)
    backend.set_many(items(3), None)

    async def with_twin() -> None:
        twin: Any = backend.twin()
        await twin.set_many(items(3), None)
        server.kill()
        with pytest.raises(redis.ConnectionError):
            await twin.get_many([key(1)])
        with pytest.raises(redis.ConnectionError):
            backend.get_many([key(1)])
        server.restart()
        assert await twin.get_many([key(1)]) == {}
        assert backend.get_many([key(1)]) == {}
        await twin.set_many(items(3), None)
        server.kill()
        server.restart()  # no call was made meanwhile: the dead connections are noticed before they are used
        assert await twin.get_many([key(1)]) == {}
        assert backend.get_many([key(1)]) == {}
        await twin.close()

    asyncio.run(with_twin())


def test_sentinels_name_the_next_master(backends: Any) -> None:
    with RedisSentinelServers() as servers:
        backend = backends(url=servers.url)
        backend.set_many(items(5), None)
        assert servers.master.call("WAIT", "1", "50000") == 1
        servers.sentinels[0].kill()  # the other sentinels are enough
        servers.master.kill()
        with pytest.raises(redis.ConnectionError):
            backend.get_many([key(1)])
        servers.wait_for_failover()
        assert backend.get_many(list(items(5))) == items(5)
        backend.set_many(items(8), None)
        assert len(asyncio.run(_read_by_twin(backend, 8))) == 8
        # The old master comes back as a replica, so no call goes there.
        servers.master.restart()
        assert backend.get_many(list(items(8))) == items(8)


def test_an_unknown_service_is_an_error(redis_sentinel: RedisSentinelServers, backends: Any) -> None:
    sentinel = redis_sentinel.sentinels[0].address
    backend = backends(url=f"redis+sentinel://127.0.0.1:1,{sentinel}/another")
    with pytest.raises(redis.ConnectionError, match="knows no service"):
        backend.get_many([key(1)])


def test_a_demoted_master_is_not_used(backends: Any) -> None:
    """Nothing is read from a replica or written to it while the sentinels still name it as the master."""
    with RedisServer() as server, RedisServer() as other, FakeSentinel(server.port) as sentinel:
        url = f"redis+sentinel://127.0.0.1:{sentinel.port}/embeddings"
        backend, fresh = backends(url=url), backends(url=url)
        backend.set_many(items(1), None)
        server.call("REPLICAOF", "127.0.0.1", str(other.port))
        with pytest.raises(redis.ReadOnlyError):
            backend.set_many(items(1), None)
        with pytest.raises(redis.ConnectionError, match="no longer the master"):
            fresh.get_many([key(1)])
        with pytest.raises(redis.ConnectionError, match="no longer the master"):
            asyncio.run(_read_by_twin(fresh))
        sentinel.master = other.port
        backend.set_many(items(1), None)
        assert len(asyncio.run(_read_by_twin(fresh))) == len(fresh.get_many([key(0)])) == 1


class FakeSentinel:
    """A sentinel that always names ``master`` as the master."""

    def __init__(self, master: int) -> None:
        self.master = master
        sentinel = self

        class Handler(socketserver.StreamRequestHandler):
            def handle(self) -> None:
                while self.rfile.readline().startswith(b"*"):
                    for _ in range(6):
                        self.rfile.readline()
                    port = str(sentinel.master)
                    self.wfile.write(b"*2\r\n$9\r\n127.0.0.1\r\n$%d\r\n%s\r\n" % (len(port), port.encode()))

        class Threads(socketserver.ThreadingTCPServer):
            daemon_threads = True

        self._server = Threads(("127.0.0.1", 0), Handler)
        self.port: int = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)

    def __enter__(self) -> FakeSentinel:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


# --- clusters ---------------------------------------------------------------------------------------


def test_keys_that_have_moved_are_followed(backends: Any) -> None:
    with RedisClusterServers() as servers:
        first, second, _ = servers.members
        backend = backends(url=servers.url, prefix="{one}:")
        many = items(50)
        backend.set_many(many, None)
        slot = first.call("CLUSTER", "KEYSLOT", "{one}:")
        owner = next(node for node in servers.members if node.call("CLUSTER", "COUNTKEYSINSLOT", slot))
        target = first if owner is not first else second
        ids = {node.port: node.call("CLUSTER", "MYID").decode() for node in servers.members}
        target.call("CLUSTER", "SETSLOT", slot, "IMPORTING", ids[owner.port])
        owner.call("CLUSTER", "SETSLOT", slot, "MIGRATING", ids[target.port])
        moved = ["{one}:" + name for name in list(many)[:20]]
        owner.call("MIGRATE", "127.0.0.1", target.port, "", "0", "50000", "KEYS", *moved)
        # Half of the slot's keys are on the target: the owner replies ASK.
        assert backend.get_many(list(many)) == many
        assert asyncio.run(_read_by_twin(backend, 50)) == many
        backend.set_many(items(60), None)
        assert backend.get_many(list(items(60))) == items(60)
        assert backend.add_many({**many, "fresh": b"x"}, 60.0) == {"fresh"}
        backend.delete_many(["fresh"])
        rest = owner.call("CLUSTER", "GETKEYSINSLOT", slot, "1000")
        owner.call("MIGRATE", "127.0.0.1", target.port, "", "0", "50000", "KEYS", *rest)
        for node in (target, owner):
            node.call("CLUSTER", "SETSLOT", slot, "NODE", ids[target.port])
        # All keys are on the target: the owner replies MOVED once, then the new map of slots is used.
        assert backend.get_many(list(items(60))) == items(60)
        assert backend.get_many(list(items(60))) == items(60)
        assert sorted(backend.scan("eo1.")) == sorted(items(60))
        backend.delete_many(list(items(60)))
        assert backend.count("") == 0


def test_a_node_that_comes_back_is_used_again(backends: Any) -> None:
    with RedisClusterServers() as servers:
        backend = backends(url=servers.url)
        backend.set_many(items(60), None)
        servers.members[0].kill()
        with pytest.raises(PartialAnswer):
            backend.get_many(list(items(60)))
        servers.members[0].restart()
        wait_until(servers.is_complete, "the cluster is complete again")
        found = backend.get_many(list(items(60)))
        assert 0 < len(found) < 60
        backend.set_many(items(60), None)
        assert backend.get_many(list(items(60))) == items(60)


def test_a_listing_during_which_a_slot_moves_is_an_error(backends: Any) -> None:
    with RedisClusterServers() as servers:
        backend = backends(url=servers.url, prefix="")
        backend.set_many({key(number): b"v" for number in range(300)}, None)
        listing = backend.scan("eo1.")
        next(listing)
        ports = [node.address.port for node in backend._topology._known_slots.nodes]  # in the order of the listing
        first, last = (next(node for node in servers.members if node.port == port) for port in (ports[0], ports[-1]))
        (name, *_) = last.call("KEYS", "eo1.*")
        slot = last.call("CLUSTER", "KEYSLOT", name.decode())
        ids = {node: node.call("CLUSTER", "MYID").decode() for node in (first, last)}
        first.call("CLUSTER", "SETSLOT", slot, "IMPORTING", ids[last])
        last.call("CLUSTER", "SETSLOT", slot, "MIGRATING", ids[first])
        moved = [name.decode() for name in last.call("CLUSTER", "GETKEYSINSLOT", slot, "1000")]
        last.call("MIGRATE", "127.0.0.1", first.port, "", "0", "50000", "KEYS", *moved)
        for node in (first, last):
            node.call("CLUSTER", "SETSLOT", slot, "NODE", ids[first])
        with pytest.raises(TierError, match="slots of the cluster moved during the listing"):
            list(listing)


def test_a_slot_that_still_moves_at_the_end_of_a_listing_is_an_error(backends: Any) -> None:
    with RedisClusterServers() as servers:
        backend = backends(url=servers.url, prefix="")
        backend.set_many({key(number): b"v" for number in range(30)}, None)
        source, target = servers.members[0], servers.members[1]
        slot = source.call("CLUSTER", "KEYSLOT", source.call("RANDOMKEY").decode())
        source.call("CLUSTER", "SETSLOT", slot, "MIGRATING", target.call("CLUSTER", "MYID").decode())
        with pytest.raises(TierError, match="slots of the cluster moved during the listing"):
            list(backend.scan("eo1."))
        source.call("CLUSTER", "SETSLOT", slot, "STABLE")
        assert len(list(backend.scan("eo1."))) == 30


@contextmanager
def partial_cluster() -> Iterator[RedisClusterServers]:
    """Start a cluster whose nodes continue to serve while one is down."""
    with RedisClusterServers() as servers:
        for node in servers.members:
            node.call("CONFIG", "SET", "cluster-require-full-coverage", "no")
        yield servers


def catch_partial_answer(call: Callable[[int], object]) -> PartialAnswer:
    """Return the PartialAnswer that ``call`` raises within a deadline; ``call`` gets the number of the attempt.

    On a busy machine the running nodes may be too slow for the deadline, so the call is retried with more time.
    """
    for attempt, seconds in enumerate((0.6, 6.0, 60.0)):
        with deadline(seconds), pytest.raises((PartialAnswer, TierTimeout)) as caught:
            call(attempt)
        if isinstance(caught.value, PartialAnswer):
            break
    assert isinstance(caught.value, PartialAnswer)
    return caught.value


@pytest.mark.parametrize("fault", ["killed", "hangs"])
def test_a_node_that_is_down_fails_only_its_own_keys(backends: Any, fault: str) -> None:
    with partial_cluster() as servers:
        backend = backends(url=servers.url)
        backend.set_many(items(60), None)
        node = servers.members[1]
        assert len(backend.get_many(list(items(60)))) == 60
        mine = {name for name in items(60) if name.encode() in node.call("KEYS", "*")}
        assert 5 < len(mine) < 55
        if fault == "killed":
            node.kill()
        else:
            node.pause()
        for read in (backend.get_many, lambda names: asyncio.run(_by_twin(backend, names))):
            error = catch_partial_answer(lambda _, read=read: read(list(items(60))))
            assert error.failed == mine
            assert error.answer == {name: value for name, value in items(60).items() if name not in mine}
            assert isinstance(error.__cause__, NodeDown if fault == "killed" else TierTimeout)
        assert catch_partial_answer(lambda _: backend.set_many(items(60), None)).failed == mine
        leases = [{f"{name}.lease{attempt}": b"x" for name in items(60)} for attempt in range(3)]
        error = catch_partial_answer(lambda attempt: backend.add_many(leases[attempt], 60.0))
        assert error.failed | error.answer in [lease.keys() for lease in leases]
        assert not error.failed & error.answer
        with deadline(0.3), pytest.raises((NodeDown, TimeoutError)):
            backend.get_many([min(mine)])
        node.resume() if fault == "hangs" else node.restart()
        wait_until(servers.is_complete, "the cluster is complete again")


def test_a_cache_over_a_cluster_without_one_node(backends: Any) -> None:
    """A node that refuses connections does not open the breaker, and the others continue to serve and store."""
    texts = [f"text {number}" for number in range(60)]
    provider = CountingProvider()
    with partial_cluster() as servers:
        tier = Tier(backends(url=servers.url), name="shared", timeout=PATIENT, write="inline")
        with Cache(provider, [tier]) as cache:
            cache.embed_batch(texts)
            servers.members[2].kill()
            for _ in range(5):
                fetched = cache.fetch(texts)
                assert all(
                    (row == provider.vector_of(text)).all() for text, row in zip(texts, fetched.rows, strict=True)
                )
                assert 10 < fetched.sources.count("shared") < 50
                assert dict(fetched.errors) == {"shared": "NodeDown"}
            for number in range(5):
                cache.embed(texts[number])
            new = [f"new {number}" for number in range(60)]
            cache.embed_batch(new)
            assert 10 < cache.fetch(new).sources.count("shared") < 50
            stats = cache.stats().tiers["shared"]
            assert stats.skipped == 0
            assert stats.causes.keys() == {"NodeDown"}


def test_a_cluster_url_for_a_single_server_fails_with_a_reason(server: RedisServer, backends: Any) -> None:
    with pytest.raises(redis.ResponseError, match="cluster support disabled"):
        backends(url=f"redis+cluster://{server.address}").get_many([key(1)])


# --- deadlines ----------------------------------------------------------------------------------------


@pytest.fixture
def proxy(server: RedisServer) -> Iterator[FaultProxy]:
    with FaultProxy("127.0.0.1", server.port) as proxy:
        yield proxy


def assert_times_out(call: Any, seconds: float = 0.3) -> None:
    """Require that a call, blocking or async, ends by its deadline, not only by the test's own timeout."""
    with deadline(seconds), pytest.raises(TimeoutError):
        call()


@pytest.mark.parametrize("where", ["connecting", "connected"])
def test_a_server_that_drips_does_not_outlast_the_deadline(proxy: FaultProxy, backends: Any, where: str) -> None:
    # Ten bytes per second, each well before any timeout of a socket: the reply would take 1,000 s.
    backend = backends(url=f"redis://{proxy.url_port}/1")
    many = items(100)
    backend.set_many(many, None)
    if where == "connecting":
        backend.close()
        backend = backends(url=f"redis://{proxy.url_port}/1")
    proxy.fault = NetworkFault("bandwidth", bytes_per_second=10, direction="replies")
    assert_times_out(lambda: backend.get_many(list(many)))
    assert_times_out(lambda: asyncio.run(_read_by_twin(backend, 100)))
    proxy.fault = NetworkFault("bandwidth", bytes_per_second=10, direction="requests")
    assert_times_out(lambda: backend.set_many({key(1): os.urandom(20_000_000)}, None))
    proxy.heal()
    assert backend.get_many(list(many)) == many


def test_a_black_hole_does_not_outlast_the_deadline(proxy: FaultProxy, backends: Any) -> None:
    backend = backends(url=f"redis://{proxy.url_port}")
    many = items(10)
    backend.set_many(many, None)
    proxy.fault = NetworkFault("black_hole")
    for call in (
        lambda: backend.get_many([key(1)]),
        lambda: backend.set_many(many, None),
        lambda: backend.add_many(many, 60.0),
        lambda: backend.delete_many([key(1)]),
        lambda: list(backend.scan("")),
        lambda: backend.count(""),
    ):
        assert_times_out(call, 0.1)
    proxy.heal()
    assert len(backend.get_many(list(many))) >= 9  # the late UNLINK may have arrived


def test_a_name_server_that_hangs_does_not_outlast_the_deadline(backends: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    found = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found.wait(60) and [])
    assert_times_out(lambda: backends(url="redis://somewhere").get_many([key(1)]))
    found.set()
    with deadline(PATIENT), pytest.raises(redis.ConnectionError):
        backends(url="redis://somewhere").get_many([key(1)])


def test_garbage_is_an_error_and_ends_the_connection(proxy: FaultProxy, backends: Any) -> None:
    backend = backends(url=f"redis://{proxy.url_port}")
    many = items(50)
    backend.set_many(many, None)
    for kind in ("garbage", "cut", "reset"):
        proxy.fault = NetworkFault(kind, after=700)  # type: ignore[arg-type]
        with deadline(2.0), pytest.raises((redis.RedisError, OSError)):
            backend.get_many(list(many))
        with pytest.raises((redis.RedisError, OSError, TimeoutError)):
            asyncio.run(asyncio.wait_for(_read_by_twin(backend, 50), 2.0))
        proxy.heal()
        assert backend.get_many(list(many)) == many


async def is_busy(twin: Any) -> bool:
    """Return whether a call finds all connections in use.

    If the event loop stalls, the call's deadline may pass before its wait for a connection does, so it is retried.
    """
    for seconds in (0.2, 2.0, 20.0):
        try:
            with deadline(seconds):
                await twin.get_many([key(2)])
        except TierTimeout:
            continue
        except TierBusy:
            return True
    return False


def test_an_exhausted_pool_raises_busy(server: RedisServer, backends: Any) -> None:
    backend = backends(url=server.url, max_connections=1)
    backend.set_many(items(3), None)
    taken = backend._client._get_pool(next(iter(backend._client._pools))).take()
    with deadline(0.2), pytest.raises(TierBusy, match="max_connections = 1"):
        backend.get_many([key(1)])
    backend._client._get_pool(next(iter(backend._client._pools))).give(taken, is_reusable=True)
    assert len(backend.get_many(list(items(3)))) == 3

    async def with_twin() -> None:
        twin: Any = backend.twin()
        with pause_servers(server), deadline(PATIENT):
            first = asyncio.ensure_future(twin.get_many([key(1)]))
            await asyncio.sleep(0)
            assert await is_busy(twin)
        assert len(await first) == 1
        await twin.close()

    asyncio.run(with_twin())


def test_many_threads_share_few_connections(server: RedisServer, backends: Any) -> None:
    backend = backends(url=server.url, max_connections=3)
    many = items(64)
    backend.set_many(many, None)
    wrong: list[object] = []

    def work(number: int) -> None:
        for turn in range(50):
            wanted = {key((number + turn) % 64), key((number * 7 + turn) % 64)}
            found = backend.get_many(list(wanted))
            if found != {name: many[name] for name in wanted}:
                wrong.append(wanted)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    with redis.Redis.from_url(server.url) as client:
        assert len(client.client_list()) <= 4


def test_a_cancelled_call_does_not_shift_replies(redis_server: RedisServer, redis_cluster: Any, backends: Any) -> None:
    """No call gets the reply of another while calls are cancelled at many different moments."""
    many = items(200, 2000)

    async def hammer(twin: Any) -> None:
        async def read(number: int) -> None:
            names = [key((number * step) % 200) for step in (1, 3, 7)]
            found = await twin.get_many(names)
            assert found == {name: many[name] for name in names}

        async def read_and_cancel(number: int) -> None:
            call = asyncio.ensure_future(read(number))
            for _ in range(number % 23):
                await asyncio.sleep(0)
            if number % 3:
                await asyncio.sleep(0.0001 * (number % 11))
            call.cancel()
            result = (await asyncio.gather(call, return_exceptions=True))[0]
            assert result is None or isinstance(result, asyncio.CancelledError), result

        for start in range(0, 400, 20):
            calls = [(read if number % 2 else read_and_cancel)(number) for number in range(start, start + 20)]
            await asyncio.gather(*calls)
        await twin.close()

    for url in (redis_server.url, redis_cluster.url):
        backend = backends(url=url, prefix="hammer:", max_connections=4)
        backend.set_many(many, 60.0)

        async def run(backend: RedisBackend = backend) -> None:
            await hammer(backend.twin())

        asyncio.run(run())


# --- forks -------------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_fork_shares_no_connection(server: RedisServer, backends: Any) -> None:
    """Parent and child read at the same time, forked before and after the first use of the backend."""
    many = items(100, 1000)
    backend = backends(url=server.url)
    for _ in range(2):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                backend.set_many(many, None)
                if all(backend.get_many(list(many)) == many for _ in range(50)):
                    status = 0
            finally:
                os._exit(status)
        backend.set_many(many, None)
        assert all(backend.get_many(list(many)) == many for _ in range(50))
        assert os.waitpid(child, 0)[1] == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_has_free_connections_although_its_parents_are_in_use(
    server: RedisServer, backends: Any
) -> None:
    backend = backends(url=server.url, max_connections=1)
    backend.set_many(items(1), None)
    (pool,) = backend._client._pools.values()
    lent = pool.take()
    waiting = threading.Thread(target=backend.get_many, args=([key(0)],))
    waiting.start()
    wait_until(lambda: pool._slots._waiting, "a call waits for the connection")

    def read() -> None:
        with deadline(60.0):
            assert [backend.get_many([key(0)]) for _ in range(3)] == [items(1)] * 3

    try:
        run_in_fork(read, "get_many in a child whose parent uses its only connection")
    finally:
        pool.give(lent, is_reusable=True)
        waiting.join()
    read()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_a_fork_leaves_the_parents_event_loop_alone(server: RedisServer, backends: Any) -> None:
    backend = backends(url=server.url)
    many = items(20)
    backend.set_many(many, None)

    async def collect_and_read(twin: Any) -> int:
        twin._client._pools.clear()  # a connection that is collected in a running loop closes itself
        gc.collect()
        return 0 if await _read_by_twin(backend, 20) == many else 2

    async def main() -> None:
        twin: Any = backend.twin()
        assert await twin.get_many(list(many)) == many
        child = os.fork()
        if child == 0:
            status = 1
            try:
                status = asyncio.run(collect_and_read(twin))
            finally:
                os._exit(status)
        assert os.waitpid(child, 0)[1] == 0
        async with asyncio.timeout(20):
            assert await twin.get_many(list(many)) == many
        await twin.close()

    asyncio.run(main())


def test_a_closed_backend_raises(server: RedisServer) -> None:
    backend = RedisBackend(url=server.url)
    backend.set_many(items(1), None)
    backend.close()
    for call in (lambda: backend.get_many([key(0)]), lambda: list(backend.scan(""))):
        with pytest.raises(CacheClosed):
            call()


def test_a_new_backend_does_not_connect() -> None:
    for url in ("redis://127.0.0.1:1", "redis+cluster://127.0.0.1:1", "redis+sentinel://127.0.0.1:1/x"):
        RedisBackend(url=url).close()
