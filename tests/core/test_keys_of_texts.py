"""Cache.keys returns the keys under which the tiers store the vectors of texts."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedonce import Cache, CacheClosed, DriftGuard, KeyPolicy, ProviderError, SpaceError, TextError
from embedonce.functions import NoProvider
from embedonce.keys import NORMALIZERS
from embedonce.testing import CountingProvider, ManualClock
from embedonce.testing.fakes import DictBackend
from embedonce_backends.memory import MemoryBackend
from embedonce_providers.ngram import NgramProvider

POLICIES = st.builds(
    KeyPolicy,
    normalize=st.lists(st.sampled_from(sorted(NORMALIZERS)), max_size=3),
    version=st.sampled_from(["v1", "2"]),
    namespace=st.sampled_from(["", "team"]),
    hash=st.sampled_from(["sha256", "blake2b"]),
    secret=st.sampled_from([None, b"secret"]),
)
TEXTS = st.lists(st.text(st.sampled_from(" \r\naAéß\U0001f375"), max_size=4), max_size=8)


@given(policy=POLICIES, texts=TEXTS, task=st.sampled_from(["document", "query", "other"]))
def test_the_keys_are_those_that_explain_shows(policy: KeyPolicy, texts: list[str], task: str) -> None:
    def embed(batch: list[str], task: str) -> list[list[float]]:
        raise AssertionError("keys must compute nothing")

    with Cache(embed, [], space={"model": "m"}, key=policy) as cache:
        for one in (cache, cache.for_namespace("inner")):
            expected = [one.explain(text, task).key for text in texts]
            assert one.keys(texts, task) == expected
            assert one.keys(iter(texts), task) == expected
            assert asyncio.run(one.akeys(tuple(texts), task)) == expected


def test_the_keys_are_those_in_the_store() -> None:
    backend = DictBackend()
    with Cache(CountingProvider(), [backend]) as cache:
        texts = [f"text {i}" for i in range(600)]
        cache.embed_batch(texts)
        found = backend.get_many(cache.keys(texts))
        assert len(found) == 600
        assert list(found) == cache.keys(texts)


def test_no_tier_is_read_and_no_text_is_remembered() -> None:
    class Unreadable(DictBackend):
        def get_many(self, keys: Any) -> Any:
            raise AssertionError("keys must not read")

    with Cache(CountingProvider(), [Unreadable()]) as cache:
        route = cache._routes[cache._source, "document"]
        assert len(set(cache.keys(["a", "b", "a"]))) == 2
        assert not route.recent_keys


def test_errors_name_the_position_and_never_the_text() -> None:
    with Cache(CountingProvider(), []) as cache:
        with pytest.raises(TextError, match="item 2: the text has a lone surrogate at character 3") as caught:
            cache.keys(["a", "b", "tea\ud800", "c"])
        assert "tea" not in str(caught.value)
        assert caught.value.position == 2
        with pytest.raises(TypeError, match=r"got one str; write one text as \[text\]"):
            cache.keys("one text")
        with pytest.raises(TypeError, match="item 1 must be a str, got NoneType"):
            cache.keys(["a", None])  # type: ignore[list-item]
        with pytest.raises(TypeError, match="expected a list of texts, got int"):
            cache.keys(3)  # type: ignore[arg-type]
    with pytest.raises(CacheClosed):
        cache.keys(["a"])


def test_a_text_that_a_step_makes_valid_has_a_key() -> None:
    with Cache(CountingProvider(), [], key=KeyPolicy(normalize=["surrogates"])) as cache:
        assert cache.keys(["tea\ud800"]) == cache.keys(["tea�"])


def test_the_error_of_a_provider_that_does_not_know_the_task_is_raised() -> None:
    with Cache(NgramProvider(), []) as cache, pytest.raises(SpaceError, match="documnet"):
        cache.keys(["a"], "documnet")


def test_a_cache_without_a_provider_has_no_keys() -> None:
    with Cache(NoProvider(), [MemoryBackend()]) as cache, pytest.raises(ProviderError, match="has no provider"):
        cache.keys(["a"])


@pytest.mark.parametrize("face", ["sync", "async"])
def test_after_a_drift_the_keys_are_those_of_the_new_space_also_after_a_restart(face: str) -> None:
    class Changing(CountingProvider):
        changed = False

        def vector_of(self, text: str, task: str = "document") -> Any:
            return super().vector_of(f"another model: {text}" if self.changed else text, task)

    provider, clock, backend = Changing(), ManualClock(), DictBackend()
    guard = DriftGuard(action="new-space", every=60)

    def read_keys(cache: Cache) -> list[str]:
        return cache.keys(["b"]) if face == "sync" else asyncio.run(cache.akeys(["b"]))

    with Cache(provider, [DictBackend(store=backend)], drift=guard, clock=clock) as cache:
        cache.embed("a")
        before = read_keys(cache)
        provider.changed = True
        clock.advance(61)
        cache.embed("b")
        after = read_keys(cache)
        assert after != before
        assert after[0] in backend.get_many(after)
    with Cache(provider, [DictBackend(store=backend)], drift=guard, clock=clock) as again:
        assert read_keys(again) == after
