"""The memcached backend against real servers: contract, options, placement, limits, ttl, eviction, forks, threads."""

from __future__ import annotations

import asyncio
import gc
import itertools
import os
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from hashlib import sha256
from typing import Any

import numpy as np
import pytest
from descriptors import without_descriptors
from hypothesis import given
from hypothesis import strategies as st
from pymemcache.client.base import Client
from pymemcache.exceptions import MemcacheError, MemcacheServerError, MemcacheUnknownError
from servers import MemcachedServer, find_program, send_memcached_line, wait_until

import embedonce
from embedonce import Cache, Tier
from embedonce.contracts import deadline
from embedonce.errors import CacheClosed, ConfigError, EraseIncomplete, TierBusy, TierError
from embedonce.testing import BackendContract, CountingProvider, FaultProxy, NetworkFault, Recipe
from embedonce.testing.contracts.support import run_in_fork, run_in_threads
from embedonce_backends._call_slots import CallSlots
from embedonce_backends.memcached import MemcachedBackend, nodes
from embedonce_backends.memcached.backend import MAX_VALUE_BYTES
from embedonce_backends.memcached.nodes import ValueTooLarge

PATIENT = 60.0
"""Seconds within which a healthy server answers on any machine."""
DAY = 86_400
_numbers = itertools.count()


def make_prefix() -> str:
    """Return a prefix that no other test has used, so that a shared server seems empty."""
    return f"{os.getpid()}-{next(_numbers)}-"


def key_of(number: int) -> str:
    return f"eo1.0123456789abcdef.{sha256(b'%d' % number).hexdigest()}"


def value_of(number: int, size: int = 1600) -> bytes:
    return sha256(b"value %d" % number).digest() * (size // 32)


def items_of(numbers: range, size: int = 1600) -> dict[str, bytes]:
    return {key_of(number): value_of(number, size) for number in numbers}


@contextmanager
def open_backend(servers: list[str], **options: Any) -> Iterator[MemcachedBackend]:
    backend = MemcachedBackend(servers=servers, **{"prefix": make_prefix(), **options})
    try:
        yield backend
    finally:
        backend.close()


@pytest.fixture
def backend(memcached_servers: list[str]) -> Iterator[MemcachedBackend]:
    with open_backend(memcached_servers) as backend:
        yield backend


class TestMemcached(BackendContract):
    """Two nodes, one of them behind a proxy."""

    examples = 30

    @pytest.fixture(autouse=True)
    def on_servers(self, memcached_servers: list[str]) -> Iterator[None]:
        self.options: dict[int, dict[str, Any]] = {}
        host, port = memcached_servers[0].split(":")
        with FaultProxy(host, int(port)) as self.proxy:
            self.servers = [self.proxy.url_port, *memcached_servers[1:]]
            yield

    def make(self) -> MemcachedBackend:
        return self.make_backend({"servers": self.servers, "prefix": make_prefix()})

    def make_backend(self, options: dict[str, Any]) -> MemcachedBackend:
        backend = MemcachedBackend(**options)
        self.options[id(backend)] = options
        return backend

    def reopen(self, backend: Any) -> MemcachedBackend:
        return self.make_backend(self.options[id(backend)])

    def recipe(self, backend: Any) -> Recipe:
        return Recipe(MemcachedBackend, self.options[id(backend)])

    @contextmanager
    def lose_a_node(self, backend: Any) -> Iterator[None]:
        if len(self.servers) < 2:
            pytest.skip("there is only one node")
        self.proxy.fault = NetworkFault("refuse")
        yield
        self.proxy.heal()


class TestOneNode(TestMemcached):
    """A single node, which the tests can stall."""

    @pytest.fixture(autouse=True)
    def only_one_node(self, on_servers: None) -> None:
        del self.servers[1:]

    def server(self) -> tuple[str, int]:
        return self.proxy.address

    def through(self, backend: Any, host: str, port: int) -> MemcachedBackend:
        return self.make_backend({**self.options[id(backend)], "servers": [f"{host}:{port}"]})

    @contextmanager
    def stall(self, backend: Any) -> Iterator[None]:
        self.proxy.fault = NetworkFault("black_hole")
        yield
        self.proxy.heal()


# --- options ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "servers",
    ["a:1", [], [""], [":11211"], ["a:0"], ["a:70000"], ["a:x"], ["::1"], ["a b:1"], [11211], ["memcached://u:pass@h"]],
)
def test_invalid_servers_are_refused(servers: Any) -> None:
    with pytest.raises(ConfigError, match="servers") as raised:
        MemcachedBackend(servers=servers)
    assert "pass" not in str(raised.value)


@pytest.mark.parametrize(
    ("server", "words"),
    [
        ("memcached://h:11211", "without a scheme"),
        ("memcacheds://h:11211", "does not support TLS"),
        ("user:hush@h:11211", "does not support a login"),
        ("h:11211?timeout=1", "in the table of the tier"),
        ("h1:11211,h2:11211", "each node as an item"),
    ],
)
def test_an_address_of_another_client_is_explained(server: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as raised:
        MemcachedBackend(servers=[server])
    assert "hush" not in str(raised.value)


def test_the_same_node_twice_is_refused() -> None:
    with pytest.raises(ConfigError, match="twice"):
        MemcachedBackend(servers=["a", "b", "a:11211"])


@pytest.mark.parametrize("prefix", ["a b", "a\n", "ä", "x" * 132, "\0"])
def test_an_invalid_prefix_is_refused(prefix: str) -> None:
    with pytest.raises(ConfigError, match="prefix must be at most 131 ASCII characters"):
        MemcachedBackend(servers=["a"], prefix=prefix)


def test_a_new_backend_does_not_connect() -> None:
    for servers in (["192.0.2.1", "memcached.invalid:11211"], ["[::1]:11211"], ["/run/memcached.sock"], ["unix:/m"]):
        backend = MemcachedBackend(servers=servers)
        backend.close()
        backend.close()
        with pytest.raises(CacheClosed):
            backend.get_many([key_of(0)])


def test_a_cache_from_toml(memcached_servers: list[str], tmp_path: Any) -> None:
    file = tmp_path / "embedonce.toml"
    servers = ", ".join(f'"{server}"' for server in memcached_servers)
    file.write_text(
        f'[provider]\ntype = "ngram"\n[[tiers]]\ntype = "memcached"\nservers = [{servers}]\n'
        f'prefix = "{make_prefix()}"\nmax_value_bytes = "512 KiB"\ntimeout = "30s"\nwrite = "inline"\n'
    )
    with embedonce.open(file) as cache:
        vector = cache.embed("hello")
    with embedonce.open(file) as cache:
        found = cache.fetch(["hello"])
        assert found.sources == ["memcached"]
        assert np.array_equal(found.vectors[0], vector)
        assert cache.check()[0].detail == f"frames on {len(memcached_servers)} nodes"


class UnixServer(MemcachedServer):
    """memcached on a Unix socket only."""

    @property
    def path(self) -> str:
        return f"{self.folder}/m.sock"

    def command(self) -> list[str]:
        user = ["-u", "root"] if os.geteuid() == 0 else []
        return [find_program("memcached"), "-s", self.path, *user]

    def is_ready(self) -> bool:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(self.path)
        return True


def test_a_node_can_be_a_unix_socket() -> None:
    with UnixServer() as server, open_backend([server.path]) as backend:
        backend.set_many(items_of(range(3)), None)
        assert backend.get_many([key_of(0), key_of(9)]) == {key_of(0): value_of(0)}


def test_a_host_name_is_resolved(memcached_servers: list[str]) -> None:
    with open_backend([f"localhost:{memcached_servers[0].split(':')[1]}"]) as backend:
        backend.set_many(items_of(range(3)), None)
        assert backend.get_many([key_of(0)]) == {key_of(0): value_of(0)}


# --- placement --------------------------------------------------------------------------------


def place_keys(servers: list[str], count: int = 3000) -> dict[str, str]:
    """Return the name of the node of each key."""
    backend = MemcachedBackend(servers=servers)
    parts = backend._group_keys([key_of(number) for number in range(count)])
    return {key: node.name for node, keys in parts.items() for key in keys}


def test_keys_are_spread_evenly_and_a_new_node_moves_few_of_them() -> None:
    three = place_keys(["a:1", "b:1", "c:1"])
    assert three == place_keys(["c:1", "a:1", "b:1"])
    assert min(Counter(three.values()).values()) > 900
    four = place_keys(["a:1", "b:1", "c:1", "d:1"])
    moved = {key for key in three if three[key] != four[key]}
    assert {four[key] for key in moved} == {"d:1"}
    assert 600 < len(moved) < 900


def test_placement_is_the_same_in_every_process_and_version() -> None:
    places = place_keys(["a:1", "b:1", "c:1"], 24)
    assert "".join(places[key][0] for key in sorted(places)) == GOLDEN


GOLDEN = "acbcbacbbbcaccbbaaacbcca"


def test_every_key_is_asked_of_one_node(memcached_servers: list[str]) -> None:
    with open_backend(memcached_servers) as backend:
        backend.set_many(items_of(range(100)), None)
        before = [count_gets(address) for address in memcached_servers]
        assert backend.get_many([key_of(number) for number in range(100)]) == items_of(range(100))
        # The server counts a "get" once per key.
        after = [count_gets(address) for address in memcached_servers]
        assert sum(after) - sum(before) == 100
        assert all(new > old for new, old in zip(after, before, strict=True))


def count_gets(address: str) -> int:
    host, port = address.split(":")
    with socket.create_connection((host, int(port))) as connection, connection.makefile("rb") as reader:
        connection.sendall(b"stats\r\n")
        for line in reader:
            if line.startswith(b"STAT cmd_get "):
                return int(line.split()[2])
    raise AssertionError


# --- values and keys --------------------------------------------------------------------------


def test_the_largest_value_fits_under_the_longest_key(memcached_servers: list[str]) -> None:
    key = "k" * 119
    with open_backend(memcached_servers, prefix="p" * 131) as backend:
        assert backend.capabilities.max_value_bytes == MAX_VALUE_BYTES
        backend.set_many({key: b"x" * MAX_VALUE_BYTES}, None)
        assert backend.get_many([key]) == {key: b"x" * MAX_VALUE_BYTES}
        backend.delete_many([key])
        assert backend.get_many([key]) == {}


def test_a_refused_value_is_an_error_and_not_stored(memcached_servers: list[str]) -> None:
    with open_backend(memcached_servers[:1]) as backend:
        backend.set_many({key_of(0): b"old"}, None)
        with pytest.raises(MemcacheServerError):
            backend.set_many({key_of(0): b"x" * (2**20 + 1)}, None)
        assert backend.get_many([key_of(0)]) == {}
        backend.set_many(items_of(range(5)), None)
        assert backend.get_many([key_of(1)]) == {key_of(1): value_of(1)}


def test_a_vector_that_is_too_large_is_not_stored_and_counted(memcached_servers: list[str]) -> None:
    provider = CountingProvider(dimensions=2**18)
    with open_backend(memcached_servers) as backend:
        with Cache(provider, [Tier(backend, write="inline", timeout=60.0)]) as cache:
            cache.embed_batch(["a", "b"])
            counted = cache.stats().tiers["memcached"]
        assert (counted.stored, counted.dropped, counted.errors) == (0, 2, 0)


def test_prefixes_keep_stores_apart(memcached_servers: list[str]) -> None:
    with open_backend(memcached_servers) as one, open_backend(memcached_servers) as two:
        one.set_many(items_of(range(5)), None)
        assert two.get_many([key_of(0)]) == {}
        assert two.add_many({key_of(0): b"lease"}, 60.0) == {key_of(0)}
        two.delete_many([key_of(1)])
        assert one.get_many([key_of(0), key_of(1)]) == items_of(range(2))


# --- names with several addresses -------------------------------------------------------------


def resolve_name(monkeypatch: pytest.MonkeyPatch, addresses: Sequence[str], port: int) -> None:
    """Let every name have these addresses."""
    look_up = socket.getaddrinfo

    def answer(host: str, _: int, *more: Any) -> list[Any]:
        if host == "several.test":
            if more[-1] == socket.AI_NUMERICHOST:
                raise socket.gaierror(socket.EAI_NONAME, "not a number")
            return [info for address in addresses for info in look_up(address, port, 0, socket.SOCK_STREAM)]
        return look_up(host, _, *more)

    monkeypatch.setattr(socket, "getaddrinfo", answer)


@pytest.mark.parametrize("addresses", [("127.0.0.1", "127.0.0.2"), ("127.0.0.1", "::1", "127.0.0.3"), ("::1", "::2")])
def test_a_name_with_several_addresses_is_refused(
    memcached_servers: list[str], monkeypatch: pytest.MonkeyPatch, addresses: Sequence[str]
) -> None:
    """Each process could otherwise use another address, and ``forget`` would leave entries on the others."""
    resolve_name(monkeypatch, addresses, int(memcached_servers[0].rpartition(":")[2]))
    backend = MemcachedBackend(servers=["several.test:11211"])
    with Cache(CountingProvider(), [Tier(backend, name="far", write="inline", timeout=PATIENT)]) as cache:
        cache.embed("one text")
        assert set(cache.stats().tiers["far"].causes) == {"SeveralAddresses"}
        with pytest.raises(EraseIncomplete, match=r"has \d addresses.* write every address into servers"):
            cache.forget(["one text"])
        (check,) = cache.check()
        assert not check.ok or "write every address" in check.detail


def test_a_name_with_several_addresses_is_named_beside_other_nodes(
    memcached_servers: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    resolve_name(monkeypatch, ["127.0.0.1", "127.0.0.2"], 1)
    with open_backend([memcached_servers[0], "several.test:11211"]) as backend:
        assert "write every address into servers" in backend.describe()
        with pytest.raises(TierError, match="write every address into servers"):
            backend.delete_many([key_of(number) for number in range(50)])


def test_the_addresses_of_both_kinds_of_one_name_are_one_node(
    memcached_servers: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    resolve_name(monkeypatch, ["::1", "127.0.0.1", "127.0.0.1"], int(memcached_servers[0].rpartition(":")[2]))
    with open_backend(["several.test:11211"]) as backend:
        backend.set_many({key_of(0): b"x"}, None)
        assert backend.get_many([key_of(0)]) == {key_of(0): b"x"}


# --- the cause of a failure -------------------------------------------------------------------


def test_a_full_server_is_the_cause() -> None:
    with MemcachedServer("-m", "8", "-M") as server:
        tier = Tier(MemcachedBackend(servers=[server.address]), name="far", write="inline", timeout=PATIENT)
        with Cache(CountingProvider(dimensions=384), [tier]) as cache:
            for start in range(0, 8000, 1000):
                cache.embed_batch([f"text {number}" for number in range(start, start + 1000)])
            assert set(cache.stats().tiers["far"].causes) == {"OutOfMemory"}


def test_a_value_that_is_too_large_is_the_cause(memcached_servers: list[str]) -> None:
    with open_backend(memcached_servers[:1]) as backend, pytest.raises(ValueTooLarge, match="object too large"):
        backend.set_many({key_of(0): b"x" * (2**20 + 1)}, None)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_missing_descriptors_are_the_cause(memcached_servers: list[str], host: str) -> None:
    with (
        open_backend([f"{host}:{memcached_servers[0].rpartition(':')[2]}"]) as backend,
        without_descriptors(),
        pytest.raises(OSError, match="Too many open files") as caught,
    ):
        backend.get_many([key_of(0)])
    assert type(caught.value).__name__ == "EMFILE"


# --- time to live -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ttl", "least", "most"),
    [
        (None, -1, -1),
        (0.001, 0, 1),
        (1.5, 1, 2),
        (3600, 3590, 3600),
        (30 * DAY, 30 * DAY - 10, 30 * DAY),
        (30 * DAY + 1, 30 * DAY - 10, 30 * DAY + 5),
        (31 * DAY, 31 * DAY - 10, 31 * DAY + 5),
        (3650 * DAY, 3650 * DAY - 10, 3650 * DAY + 5),
        (50_000 * DAY, -1, -1),
    ],
)
@pytest.mark.parametrize("write", ["set_many", "add_many"])
def test_an_entry_has_the_ttl_that_was_given(
    memcached_servers: list[str], write: str, ttl: float | None, least: int, most: int
) -> None:
    prefix = make_prefix()
    with open_backend(memcached_servers[:1], prefix=prefix) as backend:
        start = time.monotonic()
        getattr(backend, write)({key_of(0): b"x"}, ttl)
        found = send_memcached_line(memcached_servers[0], f"mg {prefix}{key_of(0)} t")
        gone = int(time.monotonic() - start)
        if 0 <= least <= gone and found == "EN":
            return  # the entry has expired
        assert found.startswith("HD t"), found
        assert least - gone * (least > 0) <= int(found[4:]) <= most


@pytest.mark.parametrize("error", [-400 * DAY, 400 * DAY])
def test_a_wrong_clock_of_this_host_does_not_change_a_ttl(
    memcached_servers: list[str], monkeypatch: pytest.MonkeyPatch, error: float
) -> None:
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + error)
    prefix = make_prefix()
    with open_backend(memcached_servers[:1], prefix=prefix) as backend:
        for ttl in (3600, 60 * DAY):
            backend.set_many({key_of(0): b"x"}, ttl)
            found = send_memcached_line(memcached_servers[0], f"mg {prefix}{key_of(0)} t")
            assert ttl - 120 <= int(found.removeprefix("HD t")) <= ttl + 5


# --- memory -----------------------------------------------------------------------------------


def test_a_full_server_evicts() -> None:
    with MemcachedServer("-m", "2") as server, open_backend([server.address]) as backend:
        for start in range(0, 5000, 500):
            backend.set_many(items_of(range(start, start + 500)), None)
        found = backend.get_many([key_of(number) for number in range(4900, 5000)])
        assert found == items_of(range(4900, 5000))
        there = sum(len(backend.get_many([key_of(n) for n in range(s, s + 500)])) for s in range(0, 5000, 500))
        assert 100 <= there < 5000


def test_a_full_server_that_does_not_evict_is_an_error() -> None:
    with MemcachedServer("-m", "2", "-M") as server, open_backend([server.address]) as backend:

        def fill() -> None:
            for start in range(0, 5000, 500):
                backend.set_many(items_of(range(start, start + 500)), None)

        with pytest.raises(MemcacheServerError, match="out of memory"):
            fill()
        assert backend.get_many([key_of(0)]) == {key_of(0): value_of(0)}


# --- forget, purge, stats ---------------------------------------------------------------------


def test_forget_works_and_purge_names_the_tier(memcached_servers: list[str]) -> None:
    provider = CountingProvider()
    with (
        open_backend(memcached_servers) as backend,
        Cache(provider, [Tier(backend, write="inline", timeout=60.0)]) as cache,
    ):
        cache.embed_batch(["a", "b"])
        cache.forget(["a"])
        assert cache.lookup(["a", "b"]).sources == [None, "memcached"]
        with pytest.raises(EraseIncomplete) as raised:
            cache.purge(version="v1")
        assert list(raised.value.tiers) == ["memcached"]


# --- threads, forks, close --------------------------------------------------------------------


def test_connections_are_shared_and_bounded(memcached_servers: list[str]) -> None:
    host, port = memcached_servers[0].split(":")
    with FaultProxy(host, int(port)) as proxy, open_backend([proxy.url_port], max_connections=2) as backend:
        backend.set_many(items_of(range(50)), None)

        def work(number: int) -> None:
            for turn in range(50):
                wanted = (number + turn) % 50
                assert backend.get_many([key_of(wanted)]) == {key_of(wanted): value_of(wanted)}

        run_in_threads(8, work, "get_many from eight threads over two connections")
        assert proxy.accepted <= 2


class ImpatientSlots:
    """Slots for which a call waits for 0.02 s, whatever time it has."""

    def __init__(self, slots: CallSlots) -> None:
        self.slots = slots

    def take(self, get_seconds: Callable[[], float | None]) -> bool:
        seconds = get_seconds()
        assert seconds is not None
        assert 0 < seconds <= 60
        return self.slots.take(lambda: 0.02)

    def free(self) -> None:
        self.slots.free()


def test_an_exhausted_pool_raises_busy_and_the_node_stays_up(
    memcached_servers: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    host, port = memcached_servers[0].split(":")
    with FaultProxy(host, int(port)) as proxy, open_backend([proxy.url_port], max_connections=1) as backend:
        backend.set_many(items_of(range(2)), None)
        proxy.fault = NetworkFault("black_hole", direction="replies")
        asked = threading.Thread(target=backend.get_many, args=([key_of(0)],))
        asked.start()
        node = backend._nodes[proxy.url_port]
        try:
            wait_until(lambda: not node._idle, "the connection is in use")
            # The deadline is long, because a short one might pass before the call starts to wait.
            monkeypatch.setattr(node, "_slots", ImpatientSlots(node._slots))
            with deadline(60.0), pytest.raises(TierBusy, match="max_connections = 1"):
                backend.get_many([key_of(1)])
            assert node.is_up
        finally:
            proxy.heal()
            asked.join()
        assert backend.get_many([key_of(1)]) == {key_of(1): value_of(1)}


def test_an_interrupted_call_leaves_no_reply_for_the_next_one(
    backend: MemcachedBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend.set_many(items_of(range(40)), None)
    receive = nodes._Socket.recv

    def interrupted(*_: object) -> bytes:
        raise KeyboardInterrupt

    for number in range(10):
        monkeypatch.setattr(nodes._Socket, "recv", interrupted)
        with pytest.raises(KeyboardInterrupt):
            backend.get_many([key_of(number)])
        monkeypatch.setattr(nodes._Socket, "recv", receive)
        assert backend.get_many([key_of(number + 1)]) == {key_of(number + 1): value_of(number + 1)}


def test_a_fork_shares_no_connection(memcached_servers: list[str]) -> None:
    """The forks happen before and after the first use, and while other threads make calls or use every connection."""
    with open_backend(memcached_servers, max_connections=2) as backend:
        everything = items_of(range(30))

        def use() -> None:
            for _ in range(20):
                assert backend.get_many(list(everything)) == everything

        def child() -> None:
            backend.set_many(everything, None)
            use()

        run_in_fork(child, "a backend that was not used before the fork")
        stop = threading.Event()
        errors: list[BaseException] = []

        def work() -> None:
            while not stop.is_set():
                try:
                    use()
                except BaseException as error:
                    errors.append(error)

        threads = [threading.Thread(target=work) for _ in range(3)]
        for thread in threads:
            thread.start()
        try:
            for _ in range(5):
                run_in_fork(child, "a backend that threads used during the fork")
        finally:
            stop.set()
            for thread in threads:
                thread.join()
        assert errors == []
        use()


async def test_an_async_cache_over_memcached(backend: MemcachedBackend) -> None:
    provider = CountingProvider()
    cache = Cache(provider, [Tier(backend, name="shared", timeout=60.0, write="inline")])
    texts = [f"text {number}" for number in range(50)]
    first = await cache.aembed_batch(texts)
    answers = await asyncio.gather(*(cache.afetch(texts) for _ in range(5)))
    for answer in answers:
        assert answer.sources == ["shared"] * 50
        assert np.array_equal(answer.vectors, first)
    await cache.aclose()


def test_an_unclosed_backend_closes_its_sockets_when_it_is_collected(memcached_servers: list[str]) -> None:
    backend = MemcachedBackend(servers=memcached_servers, prefix=make_prefix())
    backend.set_many(items_of(range(100)), None)  # so many that each node gets some, whatever its port
    sockets = [node._idle[0].sock for node in backend._nodes.values()]
    del backend
    gc.collect()
    assert all(connection.fileno() == -1 for connection in sockets)


def test_after_close_a_connection_in_use_is_closed_when_its_call_ends(memcached_servers: list[str]) -> None:
    backend = MemcachedBackend(servers=memcached_servers, prefix=make_prefix())
    backend.set_many(items_of(range(10)), None)

    def work(number: int) -> None:
        while True:
            if number == 3:
                backend.close()
            with suppress(OSError, ValueError):
                backend.get_many([key_of(number)])

    with pytest.raises(CacheClosed):
        run_in_threads(4, work, "get_many during close")
    assert all(node._idle == [] for node in backend._nodes.values())


def test_a_missing_pymemcache_is_an_error_that_names_the_extra() -> None:
    code = (
        "import sys; sys.modules['pymemcache'] = None\n"
        "import embedonce\n"
        "embedonce.open({'provider': {'type': 'ngram'}, 'tiers': [{'type': 'memcached', 'servers': ['a']}]})\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "embedonce[memcached]" in done.stderr


# --- replies to get -----------------------------------------------------------------------------


class ScriptedSocket:
    """A socket that receives a given reply in given pieces."""

    def __init__(self, reply: bytes, sizes: Sequence[int]) -> None:
        self.sent = b""
        self.pieces = []
        for size in sizes:
            self.pieces.append(reply[:size])
            reply = reply[size:]
        self.pieces = [piece for piece in (*self.pieces, reply) if piece]

    def sendall(self, data: bytes) -> None:
        self.sent += data

    def recv(self, _: int) -> bytes:
        return self.pieces.pop(0) if self.pieces else b""

    def close(self) -> None:
        pass


def ask(call: Callable[[Any, list[str]], Any], reply: bytes, sizes: Sequence[int], keys: list[str]) -> Any:
    """Return the answer or the class of the error, and what was sent."""
    connection = nodes.Connection(("127.0.0.1", 1), key_prefix=b"p-")
    connection.sock = scripted = ScriptedSocket(reply, sizes)
    try:
        return call(connection, keys), scripted.sent
    except (MemcacheError, UnicodeError) as error:
        return type(error), scripted.sent


_names = st.sampled_from(["a", "b", "c", "END", "VALUE", "k" * 240])
_pieces = st.lists(st.integers(1, 40), max_size=60)


@given(
    keys=st.lists(_names, min_size=1, unique=True),
    values=st.dictionaries(_names, st.binary(max_size=60) | st.just(b"END\r\n") | st.just(b"\r\nVALUE a 0 1\r\n")),
    sizes=_pieces,
)
def test_a_reply_in_any_pieces_is_read_as_pymemcache_reads_it(
    keys: list[str], values: dict[str, bytes], sizes: list[int]
) -> None:
    found = {key: values[key] for key in keys if key in values}
    reply = b"".join(b"VALUE p-%b 0 %d\r\n%b\r\n" % (key.encode(), len(v), v) for key, v in found.items()) + b"END\r\n"
    ours = ask(nodes.Connection.get_all, reply, sizes, keys)
    assert ours == ask(Client.get_many, reply, sizes, keys) == (found, b"get p-" + " p-".join(keys).encode() + b"\r\n")


@given(
    reply=st.sampled_from(
        [b"ERROR\r\n", b"CLIENT_ERROR bad\r\n", b"SERVER_ERROR out of memory\r\n", b"what\r\n", b"VALUE p-a 0 5\r\nab"]
    ),
    sizes=_pieces,
)
def test_an_error_reply_raises_what_pymemcache_raises(reply: bytes, sizes: list[int]) -> None:
    answer, _ = ask(nodes.Connection.get_all, reply, sizes, ["a"])
    assert issubclass(answer, MemcacheError)
    assert answer == ask(Client.get_many, reply, sizes, ["a"])[0]


@pytest.mark.parametrize(
    "reply",
    [
        b"VALUE p-b 0 1\r\nx\r\nEND\r\n",  # a key that was not requested
        b"VALUE p-a 0 1\r\nxyz\r\nEND\r\n",  # a wrong size
        b"END\r\nEND\r\n",  # the reply to another call
    ],
)
def test_a_reply_that_does_not_fit_the_request_is_an_error(reply: bytes) -> None:
    assert ask(nodes.Connection.get_all, reply, [], ["a"])[0] is MemcacheUnknownError


@pytest.mark.parametrize("key", ["a b", "a\r\nflush_all", "", "k" * 249, "\xe4", "a\0"])
def test_a_key_that_memcached_does_not_allow_is_treated_as_pymemcache_treats_it(key: str) -> None:
    ours = ask(nodes.Connection.get_all, b"END\r\n", [], ["fine", key])
    assert ours == ask(Client.get_many, b"END\r\n", [], ["fine", key])
