"""A custom provider over configured tiers, and several providers over one chain."""

from __future__ import annotations

import asyncio
import gc
import os
import sys
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

import embedonce
from embedonce import Cache, CacheClosed, ProviderError, SpaceError, config
from embedonce.testing.fakes import CountingProvider, DictBackend

TIERS = {"tiers": [{"type": "memory"}]}


def lengths(texts: list[str]) -> np.ndarray:
    return np.array([[len(text), 1.0] for text in texts], dtype=np.float32)


def test_open_accepts_a_provider_instead_of_the_configured_one() -> None:
    broken = {"type": "no such plugin", "api_key": "${NOT_SET_ANYWHERE}"}
    for source in (TIERS, {**TIERS, "provider": broken}):
        with embedonce.open(source, provider=lengths, space={"model": "lengths"}) as cache:
            assert cache.embed("four").tolist() == [4.0, 1.0]
            assert cache.fetch(["four"]).sources == ["memory"]


def test_open_accepts_a_provider_although_the_environment_overrides_the_configured_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("EMBEDONCE__PROVIDER__DIMENSIONS", "64")
    with embedonce.open({**TIERS, "provider": {"type": "ngram"}}, provider=CountingProvider()) as cache:
        assert cache.embed("text").shape == (CountingProvider().space("document").dimensions,)


def test_open_refuses_a_function_without_a_space() -> None:
    with pytest.raises(SpaceError, match="space="):
        embedonce.open(TIERS, provider=lengths)
    with pytest.raises(TypeError, match="provider="):
        embedonce.open({**TIERS, "provider": {"type": "ngram"}}, space={"model": "x"})


def test_without_a_provider_nothing_is_computed() -> None:
    with config.compose(config.load(TIERS, own_provider=True)) as cache:
        cache.for_provider(CountingProvider()).embed("text")
        assert [held.entries for held in cache.contents()] == [1]
        with pytest.raises(ProviderError, match="no provider"):
            cache.embed("text")


def test_providers_share_tiers_but_not_vectors_of_other_spaces() -> None:
    backend = DictBackend()
    one, same, other = CountingProvider(), CountingProvider(), CountingProvider(model="another")
    with Cache(one, [backend]) as cache:
        equal, different = cache.for_provider(same), cache.for_provider(other)
        first = cache.embed("text")
        assert (equal.embed("text") == first).all()
        assert same.texts == 0, "providers of the same space share entries"
        assert (different.embed("text") == other.vector_of("text")).all()
        assert (one.texts, other.texts) == (1, 1)
        assert cache.stats().tiers == different.stats().tiers
        assert list(different.stats().providers) == list(equal.stats().providers)


def test_two_caches_of_one_space_share_a_computation() -> None:
    gate, started = threading.Event(), threading.Event()
    slow, idle = CountingProvider(), CountingProvider()
    embed = slow.embed

    def gated(texts: Sequence[str], task: str) -> Any:
        started.set()
        assert gate.wait(60)
        return embed(texts, task)

    slow.embed = gated
    with Cache(slow, [DictBackend()]) as cache:
        other = cache.for_provider(idle)
        answers: list[np.ndarray] = []
        threads = [threading.Thread(target=lambda c=c: answers.append(c.embed("text"))) for c in (cache, other)]
        threads[0].start()
        assert started.wait(60)
        threads[1].start()
        gate.set()
        for thread in threads:
            thread.join(60)
        assert (answers[0] == answers[1]).all()
        assert (slow.texts, idle.texts) == (1, 0)


def test_closing_a_cache_leaves_the_tiers_open_and_closing_the_first_closes_everything() -> None:
    first, second, third = CountingProvider(), CountingProvider(model="2"), CountingProvider(model="3")
    cache = Cache(first, [DictBackend()])
    two, three = cache.for_provider(second), cache.for_provider(third)
    two.close()
    assert (second.closed, first.closed, third.closed) == (1, 0, 0)
    with pytest.raises(CacheClosed):
        two.embed("text")
    three.embed("text")
    cache.close()
    assert (first.closed, third.closed, second.closed) == (1, 1, 1)
    for closed in (cache, three):
        assert closed.closed
        with pytest.raises(CacheClosed):
            closed.embed("text")
    with pytest.raises(CacheClosed):
        cache.for_provider(first)


def test_closing_the_first_closes_the_others_then_the_tiers_then_its_own_providers() -> None:
    closed: list[str] = []

    class Provider(CountingProvider):
        def close(self) -> None:
            closed.append(self.space("document").model)

    class Backend(DictBackend):
        def close(self) -> None:
            closed.append("backend")

    cache = Cache(Provider(model="own"), [Backend()], fallback=Provider(model="fallback"))
    other = cache.for_provider(Provider(model="other"))
    cache.close()
    assert closed == ["other", "backend", "own", "fallback"]
    other.close()
    cache.close()
    assert len(closed) == 4


def test_a_listener_may_subscribe_while_other_threads_create_caches() -> None:
    """If another thread could add a cache while ``subscribe`` iterates over all caches, ``subscribe`` would raise."""
    cache = Cache(CountingProvider(), [DictBackend()])
    others: list[Cache] = []
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    stopped = threading.Event()

    def make_many() -> None:
        while not stopped.is_set():
            others.append(cache.for_provider(CountingProvider()))
            if len(others) > 30:
                others.clear()

    threads = [threading.Thread(target=make_many) for _ in range(2)]
    try:
        for thread in threads:
            thread.start()
        for _ in range(2000):
            cache.subscribe(print)
            cache._chain.listeners.clear()
    finally:
        stopped.set()
        for thread in threads:
            thread.join(60)
        sys.setswitchinterval(interval)
    cache.close()


def test_the_first_cache_lives_as_long_as_any_other() -> None:
    provider = CountingProvider()
    other = Cache(provider, [DictBackend()]).for_provider(CountingProvider(model="2"))
    gc.collect()
    owner = other._chain._owner
    assert isinstance(owner, Cache)
    assert owner.provider is provider


def test_closing_the_first_cache_flushes_the_writes_of_the_others() -> None:
    backend = DictBackend()
    cache = Cache(CountingProvider(), [embedonce.Tier(backend, write="background")])
    cache.for_provider(CountingProvider(model="2")).embed_batch([str(i) for i in range(50)])
    cache.close()
    assert cache.stats().tiers["dict"].stored == 50


def test_a_listener_gets_the_events_of_all_caches_of_the_chain() -> None:
    heard: list[object] = []
    with embedonce.open(TIERS, provider=CountingProvider()) as cache:
        other = cache.for_provider(CountingProvider(model="2"))
        other.embed("text")
        other.embed("text")
        cache.subscribe(heard.append)
        other.embed("text")
        assert heard


def test_the_async_methods_of_another_provider() -> None:
    async def run() -> None:
        cache = embedonce.open(TIERS, provider=CountingProvider())
        other = cache.for_provider(CountingProvider(model="2"))
        await asyncio.gather(*(other.aembed_batch(["a", "b"]) for _ in range(5)))
        assert other.stats().providers["counting"].texts == 2
        await other.aclose()
        assert (await cache.aembed("a")).shape
        await cache.aclose()

    asyncio.run(run())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_both_caches_work_in_a_forked_child() -> None:
    with embedonce.open(TIERS, provider=CountingProvider()) as cache:
        other = cache.for_provider(CountingProvider(model="2"))
        cache.embed("before")
        pid = os.fork()
        if pid == 0:
            try:
                other.embed_batch(["before", "after"])
                cache.embed("after")
                os._exit(0)
            except BaseException:
                os._exit(1)
        assert os.waitpid(pid, 0)[1] == 0
