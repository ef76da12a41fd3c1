"""After forget or purge, no queued write, promotion or running call stores the text again; failures are reported."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
from patience import LONG_TIMEOUT

from embedonce import Cache, EraseIncomplete, KeyPolicy, Tier, TierError
from embedonce.keys import SpaceCard
from embedonce.testing.clocks import ManualClock
from embedonce.testing.fakes import CountingProvider, DictBackend
from embedonce.testing.faults import Fault, FaultyBackend, FaultyProvider, ProviderFault
from embedonce_backends.memory import MemoryBackend

Forget = Callable[[Cache, list[str]], None]


def forget_async(cache: Cache, texts: list[str]) -> None:
    asyncio.run(cache.aforget(texts))


faces = pytest.mark.parametrize("forget", [Cache.forget, forget_async], ids=["sync", "async"])


def entries(backend: DictBackend) -> list[str]:
    return [key for key in backend.scan("") if not key.startswith(("eo1.card.", "eo1.lease."))]


@faces
def test_forget_removes_from_every_tier_and_from_the_memo(forget: Forget) -> None:
    near, far = MemoryBackend(), DictBackend(scope="network")
    with Cache(CountingProvider(symmetric=False), [near, Tier(far, name="far")]) as cache:
        for task in ("document", "query"):
            cache.embed_batch(["secret", "other"], task)
        cache.flush(LONG_TIMEOUT)
        forget(cache, ["secret"])
        for route in cache._routes.values():
            assert "secret" not in route.recent_keys
            assert "secret" not in route._older_keys
        for task in ("document", "query"):
            assert cache.lookup(["secret", "other"], task).sources == [None, "memory"]
        assert len(entries(far)) == 2


@faces
def test_a_probe_write_that_starts_after_its_call_does_not_store_a_forgotten_text(
    forget: Forget, monkeypatch: pytest.MonkeyPatch
) -> None:
    far = DictBackend(scope="host")
    with Cache(CountingProvider(), [Tier(far, name="far", write="inline", lease="off")]) as cache:
        writer = cache._chain.tiers[0].writer
        waiting: list[Callable[[], None]] = []
        monkeypatch.setattr(writer.breaker, "admit", lambda: "probe")
        monkeypatch.setattr(writer._calls, "run_in_background", lambda call: waiting.append(call) or True)
        cache.embed_batch(["secret", "other"])
        forget(cache, ["secret"])
        assert len(waiting) == 1
        waiting.pop()()
        assert cache.lookup(["secret", "other"]).sources == [None, "far"]
        assert not cache._chain.in_flight._calls
        assert not cache._chain.in_flight._erased


def test_forget_of_one_task_leaves_the_other() -> None:
    with Cache(CountingProvider(symmetric=False), [MemoryBackend()]) as cache:
        cache.embed("text", "document")
        cache.embed("text", "query")
        cache.forget(["text"], task="query")
        assert cache.lookup(["text"], "document").sources == ["memory"]
        assert cache.lookup(["text"], "query").sources == [None]


@faces
def test_forget_wins_over_queued_writes(forget: Forget) -> None:
    far = DictBackend(scope="network")
    faulty = FaultyBackend(far, [Fault("hang", on="set", calls={1})])
    tier = Tier(faulty, name="far", timeout=LONG_TIMEOUT, write="background")
    with Cache(CountingProvider(), [tier]) as cache:
        cache.embed("first")  # the write of this entry hangs, so the next writes are queued
        faulty.gate.until(1)
        cache.embed_batch(["queued", "kept"])
        assert cache._chain.in_flight.count_queued("far") == 2
        forget(cache, ["queued"])
        assert cache._chain.in_flight.count_queued("far") == 1
        faulty.heal()
        assert cache.flush(LONG_TIMEOUT)
        assert cache.lookup(["first", "queued", "kept"]).sources == ["far", None, "far"]


@faces
def test_forget_names_a_tier_with_a_write_that_hangs(forget: Forget) -> None:
    faulty = FaultyBackend(DictBackend(scope="network"), [Fault("hang", on="set", calls={1})])
    with Cache(CountingProvider(), [Tier(faulty, name="far", write="background")]) as cache:
        cache._chain.upkeep._busy_timeout = 0.2  # the default includes the tier's timeout, which is long in tests
        cache.embed("text")
        faulty.gate.until(1)
        with pytest.raises(EraseIncomplete) as caught:
            forget(cache, ["text"])
        assert set(caught.value.tiers) == {"far"}
        faulty.heal()
        assert cache.flush(LONG_TIMEOUT)
        forget(cache, ["text"])
        assert cache.lookup(["text"]).sources == [None]


@faces
def test_forget_wins_over_a_running_flight(forget: Forget) -> None:
    provider = FaultyProvider(CountingProvider(), [ProviderFault("hang", calls={1})])
    near, far = MemoryBackend(), DictBackend(scope="network")
    with Cache(provider, [near, Tier(far, name="far")]) as cache, ThreadPoolExecutor(1) as pool:
        leader = pool.submit(cache.embed, "text")
        provider.gate.until(1)
        forget(cache, ["text"])
        provider.release()
        assert (leader.result(LONG_TIMEOUT) == provider.inner.vector_of("text")).all()
        assert cache.flush(LONG_TIMEOUT)
        assert cache.lookup(["text"]).sources == [None]
        assert entries(far) == []


def test_forget_wins_over_a_promotion() -> None:
    near = DictBackend()
    far = FaultyBackend(DictBackend(scope="host"))
    with Cache(CountingProvider(), [Tier(near, name="near"), Tier(far, name="far", timeout=LONG_TIMEOUT)]) as cache:
        cache.embed("text")
        near.delete_many(entries(near))
        reading, go_on = threading.Event(), threading.Event()
        get_many = far.get_many

        def get_and_wait(keys: Any) -> Any:
            found = get_many(keys)
            reading.set()
            go_on.wait(LONG_TIMEOUT)
            return found

        far.get_many = get_and_wait  # type: ignore[method-assign]
        with ThreadPoolExecutor(1) as pool:
            reader = pool.submit(cache.lookup, ["text"])
            reading.wait(LONG_TIMEOUT)
            del far.get_many
            cache.forget(["text"])
            go_on.set()
            assert reader.result(LONG_TIMEOUT).sources == ["far"]  # the vector was read before forget() was called
        assert entries(near) == []
        assert cache.lookup(["text"]).sources == [None]


def test_after_a_forget_the_text_is_embedded_and_stored_again() -> None:
    provider = CountingProvider()
    with Cache(provider, [MemoryBackend(), Tier(DictBackend(scope="network"), name="far")]) as cache:
        for _ in range(3):
            cache.embed("text")
            cache.embed("text")
            cache.forget(["text"])
        cache.embed("text")
        assert cache.lookup(["text"]).sources == ["memory"]
    assert provider.texts == 4
    assert not cache._chain.in_flight._erasures


@pytest.mark.parametrize("seed", range(40))
def test_no_call_that_began_before_a_forget_stores_after_it(seed: int) -> None:
    """``forget`` is called at a random moment between the first read and the last write of four calls."""
    chance = random.Random(seed)
    near, far = MemoryBackend(), DictBackend(scope="network")
    slow = FaultyBackend(far, [Fault("slow", seconds=0.002, probability=0.5)], seed=seed)
    texts = [f"text {i}" for i in range(20)]
    provider = CountingProvider(delay=0.004, max_batch=7, asynchronous=bool(seed % 2))
    write = chance.choice(["inline", "background"])
    with Cache(provider, [near, Tier(slow, name="far", timeout=LONG_TIMEOUT, write=write)]) as cache:
        cache.embed_batch(chance.sample(texts, 5))
        # Only the second tier keeps these five texts, so the calls below promote them.
        near.delete_many(list(near.scan("")))
        with ThreadPoolExecutor(4) as pool:
            began = threading.Barrier(5)

            futures = [pool.submit(lambda: (began.wait(LONG_TIMEOUT), cache.embed_batch(texts))) for _ in range(4)]
            began.wait(LONG_TIMEOUT)
            while len(cache._chain.in_flight._calls) < 4 and not all(future.done() for future in futures):
                time.sleep(0)
            time.sleep(chance.uniform(0, 0.02))
            cache.forget(texts)
            for future in futures:
                future.result(LONG_TIMEOUT)
        assert cache.flush(LONG_TIMEOUT)
        assert cache.lookup(texts).sources == [None] * len(texts)


@faces
def test_forget_reports_every_tier_that_fails(forget: Forget) -> None:
    near, down = DictBackend(), FaultyBackend(DictBackend(scope="host"))
    stubborn = DictBackend(delete=False)
    tiers = [Tier(near, name="near"), Tier(down, name="down"), Tier(stubborn, name="stubborn")]
    with Cache(CountingProvider(), tiers) as cache:
        cache.embed("text")
        down.faults.append(Fault("refuse"))
        with pytest.raises(EraseIncomplete, match="stubborn") as caught:
            forget(cache, ["text"])
        assert caught.value.tiers == {
            "down": "ConnectionRefusedError: an injected fault",
            "stubborn": "it cannot delete",
        }
        assert caught.value.unable == {"stubborn"}
        assert "Call it again" in str(caught.value)
        assert "text" not in str(caught.value)
        assert entries(near) == []  # forget has removed the text from the tier that works


# --- purge ------------------------------------------------------------------------------------


def chain(store: DictBackend, model: str = "m1", **policy: Any) -> Cache:
    return Cache(
        CountingProvider(model=model), [Tier(DictBackend(store=store, scope="host"), name="t")], key=KeyPolicy(**policy)
    )


def test_purge_selects_scopes_by_their_space_cards() -> None:
    store = DictBackend()
    caches = {
        "old": chain(store, version="v1"),
        "new": chain(store, version="v2"),
        "other": chain(store, "m2", version="v2"),
        "tenant": chain(store, version="v2", namespace="tenant"),
    }
    for cache in caches.values():
        cache.embed_batch(["a", "b", "c"])
    new = caches["new"]
    held = {(h.card["version"], h.card["model"], h.card["namespace"], h.entries) for h in new.contents() if h.card}
    assert held == {
        ("v1", "m1", "", 3),
        ("v2", "m1", "", 3),
        ("v2", "m2", "", 3),
        ("v2", "m1", "tenant", 3),
    }
    before = len(store)
    dry = new.purge(version="v1", dry_run=True)
    assert dry.removed == {"t": 3}
    assert len(store) == before
    assert new.purge(version="v1").removed == {"t": 3}
    assert caches["old"].lookup(["a"]).sources == [None]
    assert new.purge(model="m1", namespace="tenant").removed == {"t": 3}
    assert new.lookup(["a"]).sources == ["t"]
    assert caches["other"].lookup(["a"]).sources == ["t"]
    (scope,) = {h.scope for h in new.contents() if h.card and h.card["model"] == "m2"}
    assert list(new.purge(scope=scope).scopes) == [scope]
    assert new.contents()[0].entries == 3
    assert new.purge(version="never").removed == {"t": 0}
    assert new.purge(version="v2", where=lambda card: card["model"] == "m2", dry_run=True).removed == {"t": 0}
    assert new.purge(where=lambda card: card["model"] == "m1").removed == {"t": 3}
    for cache in caches.values():
        cache.close()


def test_a_purged_scope_is_listed_again_once_something_is_stored() -> None:
    store = DictBackend()
    with chain(store) as cache:
        cache.embed("a")
        cache.purge(model="m1")
        assert len(store) == 0
        cache.embed("a")
        assert [held.card and held.card["model"] for held in cache.contents()] == ["m1"]


def forget_where(cache: Cache, texts: list[str], where: Callable[[SpaceCard], bool]) -> dict[str, SpaceCard]:
    return cache.forget(texts, where=where)


def forget_where_async(cache: Cache, texts: list[str], where: Callable[[SpaceCard], bool]) -> dict[str, SpaceCard]:
    return asyncio.run(cache.aforget(texts, where=where))


@pytest.mark.parametrize("face", [forget_where, forget_where_async], ids=["sync", "async"])
@pytest.mark.parametrize("secret", [None, "a secret"])
def test_forget_removes_texts_from_the_scopes_of_other_programs_that_are_chosen(
    face: Callable[..., dict[str, SpaceCard]], secret: str | None
) -> None:
    store = DictBackend()
    policies: list[dict[str, Any]] = [
        {},
        {"version": "v0"},
        {"hash": "blake2b"},
        {"namespace": "a"},
        {"namespace": "b"},
        {"namespace": "b", "version": "v0"},
    ]
    places = [(model, {**policy, "secret": secret}) for model in ("m1", "m2") for policy in policies]
    for model, policy in places:
        with chain(store, model, **policy) as other:
            other.embed_batch([" Tea ", "milk"])
    with chain(store, "m3", secret=secret, normalize=["strip"]) as cache:
        cache.embed_batch([" Tea ", "milk"])
        assert face(cache, ["never seen"], lambda card: False) == {}
        face(cache, [" Tea "], lambda card: card["namespace"] != "b")
        assert cache.lookup(["Tea", "milk"]).sources == [None, "t"]
        left = face(cache, ["milk"], lambda card: card["namespace"] != "b")
        assert sorted((card["model"], card["version"]) for card in left.values()) == [
            (model, version) for model in ("m1", "m2") for version in ("v0", "v1")
        ]
    for model, policy in places:
        with chain(store, model, **policy) as other:
            was_chosen = policy.get("namespace") != "b"
            assert other.lookup([" Tea ", "milk"]).sources == ([None, None] if was_chosen else ["t", "t"])


def test_forget_reaches_queued_writes_and_running_calls_of_other_caches() -> None:
    provider = FaultyProvider(CountingProvider(), [ProviderFault("hang", calls={1})])
    far = DictBackend(scope="host")
    with Cache(provider, [Tier(far, name="far", write="inline", lease="off")]) as cache, ThreadPoolExecutor(1) as pool:
        other = cache.for_namespace("other")
        running = pool.submit(other.embed, "tea")
        provider.gate.until(1)
        cache.forget(["tea"], where=lambda card: True)
        provider.release()
        running.result(LONG_TIMEOUT)
        assert entries(far) == []
        assert all("tea" not in route.recent_keys for route in other._routes.values())


def test_forget_names_tiers_that_cannot_list_and_scopes_whose_keys_are_not_known() -> None:
    store, blind = DictBackend(), DictBackend(scan=False, scope="network")
    scopes = {}
    for secret in ("one", "two", "three"):
        with chain(store, secret=secret, namespace=secret) as other:
            other.embed("tea")
            (scopes[secret],) = other._list_scopes()
    store.delete_many([f"eo1.card.{scopes['two']}"])
    tiers = [Tier(DictBackend(store=store, scope="host"), name="t"), Tier(blind, name="blind")]
    with Cache(CountingProvider(), tiers, key=KeyPolicy(secret="one")) as cache:
        cache.embed("tea")
        with pytest.raises(EraseIncomplete, match="space card is missing") as caught:
            cache.forget(["tea"], where=lambda card: card["namespace"] in ("", "three"))
        assert caught.value.left.keys() == {scopes["one"]}
        assert caught.value.tiers == {"blind": "it cannot list its keys"}
        assert caught.value.unable == {"blind"}
        assert "Call it again" not in str(caught.value)
        assert caught.value.scopes.keys() == {scopes["two"], scopes["three"]}
        assert "tea" not in str(caught.value)
        assert cache.lookup(["tea"]).sources == [None]
        with pytest.raises(ValueError, match="exclude each other"):
            cache.forget(["tea"], "query", where=lambda card: True)


def test_purge_requires_at_least_one_criterion() -> None:
    with chain(DictBackend()) as cache, pytest.raises(ValueError, match="at least one of"):
        cache.purge()


def test_purge_reports_tiers_that_cannot_list_and_purges_the_others() -> None:
    good = DictBackend()
    with Cache(CountingProvider(), [Tier(good, name="good"), Tier(DictBackend(scan=False), name="blind")]) as cache:
        cache.embed("text")
        with pytest.raises(EraseIncomplete) as caught:
            cache.purge(version="v1")
        assert caught.value.tiers == {"blind": "it cannot list its keys"}
        assert caught.value.unable == {"blind"}
        assert (len(caught.value.matched), caught.value.removed) == (1, {"good": 1})
        assert len(good) == 0


def test_a_failure_of_a_tier_that_cannot_list_either_may_pass() -> None:
    down = FaultyBackend(DictBackend(scan=False, scope="host"))
    with Cache(CountingProvider(), [Tier(down, name="down")]) as cache:
        cache.embed("text")
        for forget in (partial(cache.forget, ["text"]), partial(cache.forget, ["text"], where=lambda card: True)):
            down.faults.append(Fault("refuse"))
            with pytest.raises(EraseIncomplete, match="Call it again once these tiers are reachable") as caught:
                forget()
            assert (set(caught.value.tiers), caught.value.unable) == ({"down"}, set())


def test_purge_wins_over_a_running_flight() -> None:
    provider = FaultyProvider(CountingProvider(), [ProviderFault("hang", calls={1})])
    far = DictBackend(scope="network")
    with Cache(provider, [MemoryBackend(), Tier(far, name="far")]) as cache, ThreadPoolExecutor(1) as pool:
        leader = pool.submit(cache.embed, "text")
        provider.gate.until(1)
        cache.purge(version="v1")
        provider.release()
        leader.result(LONG_TIMEOUT)
        cache.flush(LONG_TIMEOUT)
        assert cache.lookup(["text"]).sources == [None]
        assert entries(far) == []


def test_a_tier_that_cannot_be_listed_does_not_hide_the_others() -> None:
    blind, down = DictBackend(scan=False, scope="host"), FaultyBackend(DictBackend(scope="host"), [Fault("refuse")])
    tiers = [Tier(DictBackend(), name="good"), Tier(blind, name="blind"), Tier(down, name="down")]
    with Cache(CountingProvider(), tiers) as cache:
        cache.embed("a")
        good, cannot, broken = cache.contents()
        assert (good.tier, good.entries, good.error) == ("good", 1, None)
        assert (cannot.tier, cannot.entries, cannot.error) == ("blind", 0, "it cannot list its keys")
        assert broken.error is not None
        assert broken.error.startswith("ConnectionRefusedError")


# --- list_metadata ----------------------------------------------------------------------------


@pytest.mark.parametrize("face", ["sync", "async"])
def test_metadata_of_a_space_is_listed_once_per_entry(face: str) -> None:
    near, far = DictBackend(), DictBackend(scope="network")
    provider = CountingProvider(symmetric=False)
    with Cache(provider, [Tier(near, name="near"), Tier(far, name="far")]) as cache:
        other = cache.for_provider(CountingProvider(model="other"))
        cache.fetch(["a", "b", "a"], metadata=[{"n": 1}, {"n": 2}, {"n": 3}])
        cache.fetch(["no metadata"])
        cache.fetch(["a"], "query", metadata=[{"n": 4}])
        other.fetch(["a"], metadata=[{"n": 5}])
        assert cache.flush(LONG_TIMEOUT)
        near.delete_many([cache.explain("b").key])

        def listed(cache: Cache, task: str = "document") -> list[int]:
            found = cache.list_metadata(task) if face == "sync" else asyncio.run(cache.alist_metadata(task))
            return sorted(metadata["n"] for metadata in found)

        assert listed(cache) == [1, 2]
        assert listed(cache, "query") == [4]
        assert listed(other) == [5]
        cache.list_metadata()[0]["n"] = 9
        assert listed(cache) == [1, 2]
        cache.forget(["a"])
        assert listed(cache) == [2]


def test_metadata_of_a_tier_that_cannot_list_or_fails_is_an_error() -> None:
    blind = [Tier(DictBackend(), name="good"), Tier(DictBackend(scan=False), name="blind")]
    with Cache(CountingProvider(), blind) as cache, pytest.raises(TierError, match="tier 'blind': it cannot list"):
        cache.list_metadata()
    down = [Tier(FaultyBackend(DictBackend(scope="host"), [Fault("refuse")]), name="down")]
    with Cache(CountingProvider(), down) as cache, pytest.raises(TierError, match="tier 'down'"):
        cache.list_metadata()


def test_expired_metadata_is_not_listed() -> None:
    clock = ManualClock()
    with Cache(CountingProvider(), [Tier(DictBackend(), ttl=10)], clock=clock) as cache:
        cache.fetch(["a"], metadata=[{"n": 1}])
        clock.advance(20)
        assert cache.list_metadata() == []
