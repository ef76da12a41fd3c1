"""Stores of several servers when one server fails."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
from faults.cells import Cell, CellRun, capture_log
from faults.stores import NETWORK, Cluster, Memcached

from embedonce import PartialAnswer

PAUSE, CALLS = 0.05, 30


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    store = Cluster()
    yield store
    store.close()


@pytest.mark.parametrize("node", [0, 1, 2])
def test_calls_wait_only_once_for_a_node_that_hangs(cluster: Cluster, node: int) -> None:
    """If the probe asked other nodes instead, the breaker would close, and the next call would wait again."""
    run = CellRun(cluster, Cell("cluster", "black hole", "read", "sync"))
    with capture_log() as lines, run.open_cache() as caller:
        run.fetch_until_served(caller, run.known)
        run.wait_for_closed_breakers(caller)
        run.fetch_until_served(caller, run.known)
        lines.messages.clear()  # a busy machine may already have caused a timeout
        cluster.proxies[node].fault = NETWORK["black hole"]
        try:
            for _ in range(CALLS):  # these calls take long enough for two probes
                run.fetch(caller, run.make_call_texts())
                time.sleep(PAUSE)
        finally:
            cluster.proxies[node].heal()
        assert [line for line in lines.messages if "reads" in line] == [
            "tier 'cluster': reads are failing (timeout); skipping it until a probe succeeds"
        ]
        run.fetch_until_served(caller, [*run.known, *run.make_texts(4)])


def test_the_error_of_the_node_that_fails_last_is_raised() -> None:
    """The node that failed first is skipped with a NodeDown. If it were raised, the breaker would stay closed."""
    store = Memcached()
    backend: Any = store.backend("refused")
    texts = {f"eo1.{number}": b"frame" for number in range(20)}
    first = next(iter(backend._group_keys([*texts])))
    other = 1 - [f"127.0.0.1:{proxy.address[1]}" for proxy in store.proxies].index(first.name)
    try:
        store.proxies[1 - other].fault = NETWORK["refused"]
        with pytest.raises(PartialAnswer):
            backend.set_many(texts, None)
        store.proxies[other].fault = NETWORK["refused"]
        with pytest.raises(ConnectionRefusedError):
            backend.set_many(texts, None)
    finally:
        backend.close()
        store.close()
