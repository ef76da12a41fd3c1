"""memcached with a bad network or node: every call ends in time, no answer is wrong, and service resumes."""

from __future__ import annotations

import logging
import random
import socket
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from hashlib import sha256
from typing import Any, TypeVar

import numpy as np
import pytest
from pymemcache.exceptions import MemcacheError, MemcacheUnknownError
from servers import MemcachedServer, wait_until

from embedonce import Cache, Tier
from embedonce.contracts import deadline
from embedonce.errors import EraseIncomplete, PartialAnswer, TierError
from embedonce.testing import CountingProvider, FaultProxy, ManualClock, NetworkFault
from embedonce.testing.contracts.support import run_in_threads
from embedonce_backends._nodes import NodeDown, NodeTimeout
from embedonce_backends.memcached import MemcachedBackend, nodes

R = TypeVar("R")

LONG_TIMEOUT = 20.0
"""Seconds within which a call with a short deadline ends on any machine."""

OPERATIONS: dict[str, Callable[[Any], object]] = {
    "get": lambda backend: backend.get_many([key_of(number) for number in range(60)]),
    "set": lambda backend: backend.set_many(items_of(range(60)), 3600.0),
    "add": lambda backend: backend.add_many({key_of(number): b"lease" for number in range(1000, 1060)}, 60.0),
    "delete": lambda backend: backend.delete_many([key_of(number) for number in range(2000, 2060)]),
}


def key_of(number: int) -> str:
    return f"eo1.0123456789abcdef.{sha256(b'%d' % number).hexdigest()}"


def items_of(numbers: range) -> dict[str, bytes]:
    return {key_of(number): sha256(b"value %d" % number).digest() * 50 for number in numbers}


def keys_of(numbers: range) -> list[str]:
    return list(items_of(numbers))


@pytest.fixture(scope="module")
def servers() -> Iterator[list[MemcachedServer]]:
    with MemcachedServer() as first, MemcachedServer() as second:
        yield [first, second]


@pytest.fixture
def proxies(servers: list[MemcachedServer]) -> Iterator[list[FaultProxy]]:
    for server in servers:
        server.call("flush_all")
    with FaultProxy("127.0.0.1", servers[0].port) as first, FaultProxy("127.0.0.1", servers[1].port) as second:
        yield [first, second]


@contextmanager
def open_backend(*nodes: Any, **options: Any) -> Iterator[MemcachedBackend]:
    backend = MemcachedBackend(
        servers=[n.url_port if isinstance(n, FaultProxy) else n.address for n in nodes], **options
    )
    try:
        yield backend
    finally:
        backend.close()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> ManualClock:
    """The clock that decides when a failed node is tried again."""
    clock = ManualClock(1000.0)
    monkeypatch.setattr(nodes, "_now", clock)
    return clock


def keys_on_node(backend: MemcachedBackend, node: Any, keys: list[str]) -> list[str]:
    """Return those of the keys that are stored on the node."""
    name = node.url_port if isinstance(node, FaultProxy) else node.address
    return [key for owner, part in backend._group_keys(keys).items() if owner.name == name for key in part]


# --- one node with network faults ---------------------------------------------------------------

FAULTS = {
    "refuse": NetworkFault("refuse"),
    "reset": NetworkFault("reset"),
    "reset in mid-reply": NetworkFault("reset", after=100),
    "cut": NetworkFault("cut"),
    "cut in mid-reply": NetworkFault("cut", after=100),
    "garbage": NetworkFault("garbage"),
    "garbage in mid-reply": NetworkFault("garbage", after=100),
    "black hole": NetworkFault("black_hole"),
    "replies lost": NetworkFault("black_hole", direction="replies"),
    "slow": NetworkFault("latency", seconds=30.0),
    "a byte at a time": NetworkFault("bandwidth", bytes_per_second=20),
    "replies a byte at a time": NetworkFault("bandwidth", bytes_per_second=20, direction="replies"),
    "half-open": NetworkFault("half_open"),
}


SILENT = ("black hole", "replies lost", "slow", "a byte at a time", "replies a byte at a time", "half-open")


@pytest.mark.parametrize("used", [True, False], ids=["used", "unused"])
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("name", FAULTS)
def test_a_call_ends_in_time_and_service_resumes(
    proxies: list[FaultProxy], name: str, operation: str, used: bool
) -> None:
    call = OPERATIONS[operation]
    with open_backend(proxies[0]) as backend, open_backend(proxies[0]) as other:
        other.set_many(items_of(range(60)), None)
        if used:
            backend.get_many(keys_of(range(3)))
        proxies[0].fault = FAULTS[name]
        error: Exception | None = None
        start = time.monotonic()
        is_unaffected = name == "half-open" and not used
        try:
            with deadline(LONG_TIMEOUT if is_unaffected else 0.15):
                call(backend)
        except Exception as raised:
            error = raised
        assert time.monotonic() - start < LONG_TIMEOUT
        if is_unaffected:
            assert error is None
        elif name in SILENT:
            assert isinstance(error, TimeoutError)
        else:
            assert isinstance(error, (OSError, MemcacheError, ValueError))
        proxies[0].heal()
        # Service resumes at once, and each call gets its own replies.
        for first in range(0, 60, 7):
            wanted = range(first, min(60, first + 7))
            assert backend.get_many(keys_of(wanted)) == items_of(wanted)
        assert backend.add_many({key_of(5000): b"lease"}, 60.0) == {key_of(5000)}
        backend.delete_many([key_of(5000)])


def test_connecting_ends_in_time() -> None:
    """The queue of a listening socket is full, so the system does not answer, as a firewall that drops packets."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(0)
        waiting = [socket.socket() for _ in range(4)]
        for connection in waiting:
            connection.setblocking(False)
            with suppress(BlockingIOError):
                connection.connect(listening.getsockname())
        backend = MemcachedBackend(servers=["{}:{}".format(*listening.getsockname())])
        for operation in OPERATIONS.values():
            with deadline(0.1), pytest.raises(TimeoutError):
                operation(backend)
        backend.close()
        for connection in waiting:
            connection.close()


def test_a_name_lookup_ends_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    released = threading.Event()
    look_up = socket.getaddrinfo

    def hang(host: Any, *args: Any) -> Any:
        if args[-1] != socket.AI_NUMERICHOST:
            released.wait(LONG_TIMEOUT)
        return look_up(host, *args)

    monkeypatch.setattr(socket, "getaddrinfo", hang)
    backend = MemcachedBackend(servers=["memcached.invalid"])
    try:
        with deadline(0.1), pytest.raises(TimeoutError):
            backend.get_many([key_of(0)])
    finally:
        released.set()
        backend.close()


def test_a_write_that_the_server_does_not_read_ends_in_time(proxies: list[FaultProxy]) -> None:
    with open_backend(proxies[0]) as backend:
        proxies[0].fault = NetworkFault("black_hole")
        large = {key_of(number): bytes(10**6) for number in range(30)}
        with deadline(0.3), pytest.raises(TimeoutError):
            backend.set_many(large, None)


def test_a_restart_of_the_server_causes_no_error(servers: list[MemcachedServer]) -> None:
    """A call whose idle connection the server has closed is made again with a new one."""
    with MemcachedServer() as server, open_backend(server) as backend:
        for operation in ("get", "set", "delete"):
            run_in_threads(4, lambda _: backend.set_many(items_of(range(60)), None), "set_many")
            server.kill()
            server.restart()
            OPERATIONS[operation](backend)
        server.kill()
        with pytest.raises(ConnectionRefusedError):
            backend.get_many([key_of(0)])
        server.restart()
        assert backend.get_many([key_of(0)]) == {}


@contextmanager
def serve_replies(*connections: Sequence[bytes]) -> Iterator[MemcachedBackend]:
    """Yield a backend of a server that sends the given replies on each connection, one per request, and closes it."""

    def answer() -> None:
        for replies in connections:
            try:
                connection, _ = listening.accept()
            except OSError:  # the test has ended without using this connection
                return
            with connection:
                for reply in replies:
                    connection.recv(1000)
                    connection.sendall(reply)

    with socket.create_server(("127.0.0.1", 0)) as listening:
        answering = threading.Thread(target=answer)
        answering.start()
        backend = MemcachedBackend(servers=["{}:{}".format(*listening.getsockname())])
        try:
            yield backend
        finally:
            backend.close()
            listening.shutdown(socket.SHUT_RDWR)  # ends a wait in accept()
            answering.join()


def test_add_is_not_retried_if_its_reply_is_lost() -> None:
    """If it were, the key would seem to be another caller's."""
    with serve_replies([b"END\r\n", b""], [b"NOT_STORED\r\n"]) as backend:
        assert backend.get_many([key_of(0)]) == {}
        with pytest.raises((MemcacheError, ConnectionError)):
            backend.add_many({key_of(0): b"lease"}, 60.0)


def test_set_is_retried_if_its_reply_is_lost() -> None:
    with serve_replies([b"END\r\n", b""], [b"STORED\r\n"]) as backend:
        assert backend.get_many([key_of(0)]) == {}
        backend.set_many({key_of(0): b"value"}, None)


def test_an_invalid_reply_to_delete_is_an_error() -> None:
    """pymemcache's own ``delete_many`` accepts any reply as a success, but a forgotten text must really be gone."""
    with serve_replies([b"STORED\r\n"]) as backend, pytest.raises(MemcacheError):
        backend.delete_many([key_of(0)])


def test_a_value_of_another_key_is_an_error() -> None:
    shifted = f"VALUE {key_of(1)} 0 5\r\nwrong\r\nEND\r\n".encode()
    with serve_replies([shifted], [b"END\r\n"]) as backend:
        with pytest.raises(MemcacheUnknownError, match="invalid reply"):
            backend.get_many([key_of(0)])
        assert backend.get_many([key_of(1)]) == {}


# --- two nodes ----------------------------------------------------------------------------------


def catch_partial_answer(call: Callable[[], Any], failed: Collection[str]) -> Any:
    """Return the answer of a call that must fail for exactly the keys ``failed``."""
    with pytest.raises(PartialAnswer) as caught:
        call()
    assert isinstance(caught.value.__cause__, NodeDown)
    assert caught.value.failed == set(failed)
    return caught.value.answer


def test_the_keys_of_a_dead_node_fail_and_the_other_node_serves(
    servers: list[MemcachedServer], clock: ManualClock, caplog: pytest.LogCaptureFixture
) -> None:
    everything = items_of(range(100))
    with MemcachedServer() as mortal, open_backend(servers[0], mortal) as backend:
        backend.set_many(everything, None)
        lost = keys_on_node(backend, mortal, keys_of(range(100)))
        kept = {key: value for key, value in everything.items() if key not in lost}
        assert len(lost) > 20
        assert len(kept) > 20
        mortal.kill()
        for turn in range(3):
            assert catch_partial_answer(lambda: backend.get_many(list(everything)), lost) == kept
            with pytest.raises(NodeDown, match=mortal.address):
                backend.get_many(lost[:1])
            assert catch_partial_answer(lambda: backend.set_many(everything, None), lost) is None
            with pytest.raises(NodeDown):
                backend.add_many({key: b"lease" for key in lost}, None)
            leases = {f"{key}.{turn}": b"lease" for key in everything}
            down = keys_on_node(backend, mortal, list(leases))
            assert catch_partial_answer(
                lambda leases=leases: backend.add_many(leases, None), down
            ) == leases.keys() - set(down)
            with pytest.raises(ConnectionRefusedError):
                backend.delete_many(lost)
        assert backend.describe() == f"frames on 2 nodes; {mortal.address} does not answer (ConnectionRefusedError)"
        mortal.restart()
        assert catch_partial_answer(lambda: backend.get_many(list(everything)), lost) == kept
        clock.advance(nodes.LONGEST_WAIT * 2)
        backend.set_many(everything, None)
        assert backend.get_many(list(everything)) == everything
        assert backend.describe() == "frames on 2 nodes"
    assert [record.getMessage() for record in caplog.records] == [
        f"memcached {mortal.address} does not answer (ConnectionRefusedError); skipping it until a probe succeeds",
        f"memcached {mortal.address} answers again",
    ]


def test_a_node_that_is_skipped_while_it_comes_back_is_down_for_this_call(
    proxies: list[FaultProxy], monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_backend(*proxies) as backend:
        monkeypatch.setattr(nodes.Node, "admits_call", lambda node: False)
        with pytest.raises(NodeDown, match="failed recently") as caught:
            backend.get_many(keys_of(range(20)))
        assert type(caught.value) is NodeDown  # the name of the class is the cause in statistics


def call_until_other_node_answers(clock: ManualClock, call: Callable[[], R]) -> R:
    """Make a call while one node does not answer; if the other one is too slow as well, retry with more time."""
    for seconds in (0.9, 9.0):
        try:
            with deadline(seconds):
                return call()
        except TimeoutError:
            clock.advance(nodes.LONGEST_WAIT * 2)
    with deadline(90.0):
        return call()


def test_a_node_that_hangs_delays_only_one_call(proxies: list[FaultProxy], clock: ManualClock) -> None:
    everything = items_of(range(100))
    with open_backend(*proxies) as backend:
        backend.set_many(everything, None)
        kept = {key: everything[key] for key in keys_on_node(backend, proxies[1], keys_of(range(100)))}
        proxies[0].fault = NetworkFault("black_hole")
        lost = everything.keys() - kept.keys()
        assert (
            call_until_other_node_answers(
                clock, lambda: catch_partial_answer(lambda: backend.get_many(list(everything)), lost)
            )
            == kept
        )
        # From now on, no call connects to the node that hangs.
        accepted = proxies[0].accepted
        for _ in range(20):
            assert catch_partial_answer(lambda: backend.get_many(list(everything)), lost) == kept
        catch_partial_answer(lambda: backend.set_many(everything, None), lost)
        assert proxies[0].accepted == accepted
        # Later one call probes it, and no other call does at the same time.
        clock.advance(nodes.LONGEST_WAIT * 2)
        found: list[Any] = []
        trying = threading.Thread(target=lambda: found.append(backend.get_many(list(everything))))
        trying.start()
        try:
            wait_until(lambda: proxies[0].accepted > accepted, "the node is probed")
            for _ in range(5):
                assert catch_partial_answer(lambda: backend.get_many(list(everything)), lost) == kept
            assert proxies[0].accepted == accepted + 1
        finally:
            proxies[0].heal()
            trying.join()
        assert found == [everything]
        clock.advance(nodes.LONGEST_WAIT * 2)
        assert backend.get_many(list(everything)) == everything


def test_a_read_of_only_a_hanging_node_is_an_error_not_a_miss(proxies: list[FaultProxy], clock: ManualClock) -> None:
    with open_backend(*proxies) as backend:
        mine = keys_on_node(backend, proxies[0], keys_of(range(100)))[:1]
        proxies[0].fault = NetworkFault("black_hole")
        with deadline(0.4), pytest.raises(NodeTimeout):
            backend.get_many(mine)
        with pytest.raises(NodeDown):
            backend.get_many(mine)


def test_if_no_node_answers_every_call_is_an_error(proxies: list[FaultProxy], clock: ManualClock) -> None:
    with open_backend(*proxies) as backend:
        backend.set_many(items_of(range(100)), None)
        for proxy in proxies:
            proxy.fault = NetworkFault("refuse")
        for _ in range(10):
            for operation in OPERATIONS.values():
                with pytest.raises(ConnectionRefusedError):
                    operation(backend)
        proxies[0].heal()
        mine = keys_on_node(backend, proxies[0], keys_of(range(100)))
        # The node is asked although no time has passed: while no node is up, the tier's breaker does the waiting.
        assert len(backend.get_many(mine)) == len(mine)


def test_the_wait_grows_with_failures_not_with_simultaneous_calls(
    proxies: list[FaultProxy], clock: ManualClock
) -> None:
    with open_backend(*proxies) as backend:
        proxies[0].fault = NetworkFault("black_hole")
        node = backend._nodes[proxies[0].url_port]

        def work(number: int) -> None:
            if number == 8:  # once the other eight wait for the node, make all of them fail at the same time
                wait_until(lambda: proxies[0].accepted == 8, "eight calls are in flight")
                proxies[0].fault = NetworkFault("refuse")
                return
            with pytest.raises(PartialAnswer):
                OPERATIONS["get"](backend)

        run_in_threads(9, work, "get_many from eight threads")
        waits = [node._wait_seconds]
        for _ in range(10):
            clock.advance(100.0)
            with pytest.raises(PartialAnswer):
                OPERATIONS["get"](backend)
            waits.append(node._wait_seconds)
        assert waits == [0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0, 60.0, 60.0]


# --- in a cache -----------------------------------------------------------------------------------


def test_a_cache_over_a_dead_node(
    servers: list[MemcachedServer], caplog: pytest.LogCaptureFixture, clock: ManualClock
) -> None:
    texts = [f"dead node {number}" for number in range(60)]
    provider = CountingProvider()
    with MemcachedServer() as mortal, open_backend(servers[0], mortal) as backend:
        tier = Tier(backend, name="shared", timeout=60.0, write="inline")
        with Cache(provider, [tier]) as cache:
            first = cache.embed_batch(texts)
            mortal.kill()
            found = cache.fetch(texts)
            assert np.array_equal(found.vectors, first)
            lost = found.sources.count("provider")
            assert 10 < lost < 50
            assert found.sources.count("shared") == 60 - lost
            for text in texts:  # one text per call, so that the breaker would open if the node's errors counted
                assert (cache.embed(text) == first[texts.index(text)]).all()
            stats = cache.stats().tiers["shared"]
            assert stats.skipped == 0
            assert stats.errors > 0
            with pytest.raises(EraseIncomplete):
                cache.forget(texts)
            assert cache.lookup(texts).sources == [None] * 60
            mortal.restart()
            clock.advance(1000.0)
            cache.embed_batch(texts)
            assert cache.fetch(texts).sources == ["shared"] * 60
    assert not [record for record in caplog.records if record.getMessage().startswith("tier 'shared': reads")]


def test_check_names_a_dead_node_whichever_node_has_the_key(servers: list[MemcachedServer]) -> None:
    with MemcachedServer() as mortal:
        mortal.kill()
        for place in (servers[0].address, mortal.address):
            with open_backend(servers[0], mortal) as backend:
                backend._ring.get_node = lambda _, place=place: place
                tier = Tier(backend, name="shared", timeout=60.0)
                with Cache(CountingProvider(), [tier]) as cache:
                    (report,) = cache.check()
                    assert report.ok
                    shown = f"frames on 2 nodes; {mortal.address} does not answer (ConnectionRefusedError)"
                    assert report.detail.startswith(shown)
        with open_backend(mortal) as backend:
            tier = Tier(backend, name="shared", timeout=60.0)
            with Cache(CountingProvider(), [tier]) as cache:
                (report,) = cache.check()
                assert not report.ok
                assert report.detail.startswith("ConnectionRefusedError")


def test_on_error_raise_raises_for_a_dead_node(servers: list[MemcachedServer]) -> None:
    with MemcachedServer() as mortal, open_backend(servers[0], mortal) as backend:
        tier = Tier(backend, name="shared", timeout=60.0, write="inline", on_error="raise")
        with Cache(CountingProvider(), [tier]) as cache:
            mortal.kill()
            with pytest.raises(TierError, match="shared"):
                cache.embed_batch([f"strict {number}" for number in range(40)])


@pytest.mark.parametrize("face", ["sync", "async"])
async def test_random_faults_never_cause_a_wrong_vector(proxies: list[FaultProxy], face: str) -> None:
    """Two nodes have one fault after another while a cache reads from them all the time."""
    chance = random.Random(1)
    provider = CountingProvider(dimensions=384)
    texts = [f"text {number}" for number in range(200)]
    faults = [None, None, *FAULTS.values()]
    with open_backend(*proxies) as backend:
        cache = Cache(provider, [Tier(backend, timeout=0.1, write="inline")])
        for _ in range(60):
            for proxy in proxies:
                proxy.fault = chance.choice(faults)
            some = chance.sample(texts, 40)
            vectors = cache.embed_batch(some) if face == "sync" else await cache.aembed_batch(some)
            assert all((row == provider.vector_of(text)).all() for text, row in zip(some, vectors, strict=True))
        for proxy in proxies:
            proxy.heal()
        corrupt = cache.stats().tiers["memcached"].corrupt
        await cache.aclose()
    assert corrupt == 0
    with open_backend(*proxies) as backend, Cache(provider, [Tier(backend, timeout=60.0, write="inline")]) as cache:
        cache.embed_batch(texts)
        assert cache.fetch(texts).sources == ["memcached"] * 200


def test_the_log_contains_no_key(proxies: list[FaultProxy], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    with open_backend(*proxies) as backend:
        backend.set_many(items_of(range(60)), None)
        for fault in FAULTS.values():
            for proxy in proxies:
                proxy.fault = fault
            with suppress(Exception), deadline(0.05):
                OPERATIONS["get"](backend)
    assert "eo1." not in caplog.text
