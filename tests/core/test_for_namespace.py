"""Caches of several namespaces over one chain."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from embedonce import Cache, CacheClosed, DriftError, DriftGuard, KeyPolicy
from embedonce.testing.fakes import CountingProvider, DictBackend


def test_each_namespace_has_its_own_entries_in_the_same_tiers() -> None:
    provider, backend = CountingProvider(), DictBackend()
    with Cache(provider, [backend]) as cache:
        caches = [cache, cache.for_namespace("a"), cache.for_namespace("b")]
        for one in caches:
            one.embed("text")
        assert provider.texts == 3
        assert [one.fetch(["text"]).computed.texts for one in caches] == [0, 0, 0]
        caches[1].forget(["text"])
        assert [one.lookup(["text"]).sources[0] is None for one in caches] == [False, True, False]
        assert cache.stats().tiers == caches[2].stats().tiers


def test_the_name_is_appended_to_the_namespace_of_the_key_policy() -> None:
    with Cache(CountingProvider(), [DictBackend()], key=KeyPolicy(namespace="project")) as cache:
        search = cache.for_namespace("search")
        assert search.explain("text").policy["namespace"] == "project/search"
        assert search.for_namespace("eu").explain("text").policy["namespace"] == "project/search/eu"
        search.embed("text")
        assert cache.purge(namespace="project/search").removed == {"dict": 1}


@pytest.mark.parametrize("name", ["", "a/b", "\ud800", 5])
def test_names_that_would_be_ambiguous_are_refused(name: str) -> None:
    with Cache(CountingProvider(), []) as cache, pytest.raises(ValueError, match="namespace"):
        cache.for_namespace(name)


def test_closing_a_namespace_closes_nothing_else_and_closing_the_cache_closes_both() -> None:
    provider = CountingProvider()
    cache = Cache(provider, [DictBackend()])
    own = cache.for_namespace("a")
    own.close()
    with pytest.raises(CacheClosed):
        own.embed("text")
    assert cache.embed("text") is not None
    other = cache.for_namespace("b")
    cache.close()
    with pytest.raises(CacheClosed):
        other.embed("text")


def test_a_namespace_of_another_provider_is_closed_with_that_provider() -> None:
    with Cache(CountingProvider(), [DictBackend()]) as cache:
        other = cache.for_provider(CountingProvider(model="other"))
        own = other.for_namespace("a")
        own.embed("text")
        other.close()
        with pytest.raises(CacheClosed):
            own.embed("text")
        assert cache.embed("text") is not None


def test_unused_scopes_are_those_of_no_cache_over_the_chain() -> None:
    with Cache(CountingProvider(), [DictBackend()]) as cache:
        search = cache.for_namespace("search")
        search.embed("text")
        cache.embed("text")
        assert cache.purge(unused=True, dry_run=True).removed.get("dict", 0) == 0


async def test_namespaces_compute_the_same_text_at_the_same_time_without_sharing_it() -> None:
    provider = CountingProvider()
    async with Cache(provider, [DictBackend()]) as cache:
        caches = [cache.for_namespace(name) for name in "abc"]
        await asyncio.gather(*(one.aembed("text") for one in caches))
        assert provider.texts == 3


class Drifting(CountingProvider):
    """Returns other vectors after a while."""

    has_drifted = False

    def vector_of(self, text: str, task: str = "document") -> Any:
        vector = super().vector_of(text, task)
        return -vector if self.has_drifted else vector


@pytest.mark.parametrize("action", ["refuse", "new-space"])
def test_a_namespace_detects_drift_although_another_one_is_always_checked_first(action: Any) -> None:
    now = 1e9
    provider = Drifting()
    with Cache(provider, [DictBackend()], drift=DriftGuard(action=action, every=100), clock=lambda: now) as cache:
        known, other = cache.for_namespace("known"), cache.for_namespace("other")
        known.embed("old")
        provider.has_drifted = True
        for day in range(3):
            now += 101
            other.fetch([f"other {day}"])
            fetched = known.fetch(["old", f"new {day}"])
            if action == "refuse":
                assert isinstance(fetched.failed[1], DriftError)
            else:
                assert fetched.failed == {}
                assert fetched.space.extra == {"drift": 1}
