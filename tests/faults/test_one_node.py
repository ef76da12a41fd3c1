"""Several servers of which one fails."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
from faults.cells import Cell, Run, listening
from faults.stores import NETWORK, Cluster, Memcached

from embedonce import PartialAnswer

PAUSE, CALLS = 0.05, 30


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    store = Cluster()
    yield store
    store.close()


@pytest.mark.parametrize("node", [0, 1, 2])
def test_one_node_that_hangs_is_paid_for_once(cluster: Cluster, node: int) -> None:
    """A probe that another node answered would open the tier again, for a call to pay the timeout, and so on."""
    run = Run(cluster, Cell("cluster", "black hole", "read", "sync"))
    with listening() as lines, run.opened() as caller:
        run.settle(caller, run.known)
        run.settled(caller)
        run.settle(caller, run.known)
        lines.said.clear()  # a busy machine may have had a timeout of its own
        cluster.proxies[node].fault = NETWORK["black hole"]
        try:
            for _ in range(CALLS):  # two probes' time
                run.fetch(caller, run.mixed())
                time.sleep(PAUSE)
        finally:
            cluster.proxies[node].heal()
        assert [line for line in lines.said if "reads" in line] == [
            "tier 'cluster': reads fail (timeout); it is left out and tried again until it answers"
        ]
        run.settle(caller, [*run.known, *run.texts(4)])


def test_when_the_last_node_goes_its_error_is_the_tiers() -> None:
    """Not that of the node which was left out before: nobody would leave the tier alone."""
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
