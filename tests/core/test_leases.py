"""With leases, only one process embeds a missing text. If the lease tier fails, every process embeds the text."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import children
import pytest
from patience import LONG_TIMEOUT, wait_until

from embedonce import Cache, ConfigError, Tier
from embedonce._engine.leases import Leases, lease_key
from embedonce.testing.fakes import CountingProvider, DictBackend
from embedonce.testing.faults import Fault, FaultyBackend, FaultyProvider, ProviderFault
from embedonce_backends.memory import MemoryBackend


@pytest.mark.slow
def test_eight_processes_embed_each_of_a_thousand_texts_once(tmp_path: Path) -> None:
    table = {"type": "disk", "path": str(tmp_path / "d"), "lease": "100s", "timeout": "60s"}
    found = children.run_eight_processes(table, "disk")
    assert sum(computed for computed, _ in found) == len(children.COLD_TEXTS)


def open_two_caches(store: DictBackend, lease: float = LONG_TIMEOUT, **options: Any) -> tuple[Any, Any]:
    """Open two caches that share only a store, as two processes do."""

    def one() -> Any:
        provider = FaultyProvider(CountingProvider(max_batch=4))
        tier = Tier(DictBackend(store=store, scope="host"), name="shared", lease=lease)
        return provider, Cache(provider, [MemoryBackend(), tier], **options)

    return one(), one()


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_a_follower_waits_for_the_vector_of_another_process(asynchronous: bool) -> None:
    (leader, one), (follower, other) = open_two_caches(DictBackend())
    leader.faults.append(ProviderFault("hang", calls={1}))
    with one, other, ThreadPoolExecutor(2) as pool:
        first = pool.submit(one.embed_batch, ["a", "b"])
        leader.gate.until(1)

        def follow() -> Any:
            if asynchronous:
                return asyncio.run(other.afetch(["b", "c", "a"]))
            return other.fetch(["b", "c", "a"])

        second = pool.submit(follow)
        wait_until(
            lambda: follower.count["c"]
        )  # the follower has embedded its own text, and now polls for the other texts
        assert not second.done()
        leader.release()
        fetched = second.result(LONG_TIMEOUT)
        assert fetched.sources == ["shared", "provider", "shared"]
        assert (fetched.rows[0] == first.result(LONG_TIMEOUT)[1]).all()
        assert other.lookup(["a"]).sources == ["memory"]
        assert dict(follower.count) == {"c": 1}
        assert other.stats().tiers["shared"].misses == 3


def test_when_the_leader_dies_a_follower_computes_once_its_lease_has_expired() -> None:
    store = DictBackend()
    (leader, one), (follower, other) = open_two_caches(store, lease=0.5)
    leader.faults.append(ProviderFault("hang"))
    with one, other, ThreadPoolExecutor(2) as pool:
        pool.submit(one.embed, "a")
        leader.gate.until(1)
        assert (other.embed("a") == follower.inner.vector_of("a")).all()
        assert follower.count["a"] == 1
        leader.heal()


def test_waiting_for_another_process_has_a_limit() -> None:
    (leader, one), (follower, other) = open_two_caches(DictBackend(), max_wait=0.3)
    leader.faults.append(ProviderFault("hang"))
    with one, other, ThreadPoolExecutor(2) as pool:
        pool.submit(one.embed, "a")
        leader.gate.until(1)
        assert (other.embed("a") == follower.inner.vector_of("a")).all()
        leader.heal()


def test_a_cache_does_not_wait_for_its_own_lease(monkeypatch: pytest.MonkeyPatch) -> None:
    store = DictBackend()
    (provider, one), _ = open_two_caches(store)
    with one:
        one.embed("a")
        one.forget(["a"])
        monkeypatch.setattr(Leases, "pauses", lambda *_: pytest.fail("the cache waits for its own lease"))
        one.embed("a")
        assert provider.count["a"] == 2


def test_forget_and_purge_remove_leases_too() -> None:
    store = DictBackend()
    (_, one), (provider, other) = open_two_caches(store)
    with one, other:
        one.embed_batch(["a", "b"])
        one.forget(["a"])
        other.embed("a")  # if the lease still existed, this call would wait for it
        assert provider.count["a"] == 1
        one.purge(version="v1")
        assert not list(store.scan(""))


@pytest.mark.parametrize("fault", [Fault("refuse"), Fault("raise", on="add"), Fault("hang", on="add")])
def test_every_process_computes_if_the_lease_tier_fails(fault: Fault) -> None:
    provider = CountingProvider()
    faulty = FaultyBackend(DictBackend(scope="network"), [fault])
    with Cache(provider, [Tier(faulty, name="shared", lease=LONG_TIMEOUT, timeout=0.2)]) as cache:
        assert (cache.embed("a") == provider.vector_of("a")).all()
        faulty.heal()


def test_a_tier_that_failed_in_a_call_is_not_asked_for_leases_in_that_call() -> None:
    provider = CountingProvider()
    faulty = FaultyBackend(DictBackend(scope="network"), [Fault("raise", on="get")])
    with Cache(provider, [Tier(faulty, name="shared", lease=LONG_TIMEOUT)]) as cache:
        assert (cache.embed("a") == provider.vector_of("a")).all()
        assert cache.stats().tiers["shared"].errors == 1
        faulty.heal()
        assert not list(faulty.inner.scan(""))


def test_batches_with_the_same_texts_in_opposite_order_in_two_processes_do_not_deadlock() -> None:
    for round_ in range(10):
        (_, one), (_, other) = open_two_caches(DictBackend())
        with one, other, ThreadPoolExecutor(2) as pool:
            a, b = [f"a{round_}", f"b{round_}"], [f"b{round_}", f"a{round_}"]
            futures = [pool.submit(one.embed_batch, a), pool.submit(other.embed_batch, b)]
            assert (futures[0].result(LONG_TIMEOUT) == futures[1].result(LONG_TIMEOUT)[::-1]).all()


def test_a_leases_key_has_the_form_of_a_key() -> None:
    key = "eo1." + "0" * 16 + "." + "f" * 64
    assert lease_key(key) == "eo1.lease." + "0" * 16 + "." + "f" * 64
    assert len(lease_key(key)) < 120


@pytest.mark.parametrize(
    ("tiers", "message"),
    [
        ([Tier(MemoryBackend(), lease=1.0)], "several processes share"),
        ([Tier(DictBackend(scope="host", add=False), lease=1.0)], "requires a backend with add_many"),
        ([Tier(DictBackend(scope="host"), lease=1.0, write="background")], 'requires write = "inline"'),
        (
            [Tier(DictBackend(scope="host"), name=name, lease=1.0) for name in ("a", "b")],
            "'a' and 'b' both have a lease",
        ),
    ],
)
def test_a_lease_that_cannot_work_is_refused(tiers: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Cache(CountingProvider(), tiers)
