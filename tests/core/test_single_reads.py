"""Reading one text without the plan gives the same vectors, errors, counts and calls of the stores as the plan does."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embedonce import Cache, Tier
from embedonce.errors import CacheClosed, PartialAnswer, TextError, TierError
from embedonce.testing import CountingProvider, DictBackend
from embedonce.vectors import Entry, freeze

MOODS = ("well", "well", "well", "error", "timeout", "partial", "corrupt", "text", "other dimensions")
TIERS = ("first", "second")


class MoodyBackend(DictBackend):
    """Fails, or returns invalid values, as the test says. It notes the keys of every read and write."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.mood = "well"
        self.reads: list[int] = []
        self.writes = 0

    def _judge(self, key: str, value: Any) -> Any:
        if self.mood == "error":
            raise ValueError("a problem of the store")
        if self.mood == "timeout":
            raise TimeoutError
        if self.mood == "partial":
            raise PartialAnswer({}, {key}) from ConnectionError()
        if value is None or self.mood == "well":
            return value
        if self.mood == "text":
            return "text"
        if isinstance(value, Entry):
            vector = value.vector[:-1] if self.mood == "other dimensions" else np.full_like(value.vector, np.nan)
            return value._replace(vector=freeze(vector))
        return value[:-4] if self.mood == "other dimensions" else b"corrupt" + bytes(value[7:])

    def get(self, key: str, /) -> Any:
        self.reads.append(1)
        return self._judge(key, super().get(key))

    def get_many(self, keys: Any, /) -> Any:
        self.reads.append(len(keys))
        found = super().get_many(keys)
        judged = {key: self._judge(key, found.get(key)) for key in keys}
        return {key: value for key, value in judged.items() if value is not None}

    def set_many(self, items: Any, ttl: Any, /) -> None:
        self.writes += 1
        if self.mood in ("error", "timeout"):
            raise ValueError("a problem of the store")
        super().set_many(items, ttl)


class Pair:
    """Two caches of equal configuration. The second one always uses the plan."""

    def __init__(self, on_error: Any, fallback: bool, holds: Any) -> None:
        self.now = 1e9
        self.caches, self.backends = [], []
        for _ in range(2):
            # The backends of servers have no ``get``.
            kinds: list[dict[str, Any]] = [{"scope": "host", "holds": holds}, {"scope": "network", "get": False}]
            backends = [MoodyBackend(**kind, deadline=True, clock=lambda: self.now) for kind in kinds]
            tiers = [
                Tier(backend, name=name, on_error=on_error, write="inline", lease="off", ttl=100.0)
                for name, backend in zip(TIERS, backends, strict=True)
            ]
            other = CountingProvider(model="other") if fallback else None
            cache = Cache(CountingProvider(), tiers, fallback=other, clock=lambda: self.now)
            self.caches.append(cache)
            self.backends.append(backends)
        self.caches[1]._reads_singly = False

    def run(self, step: Any) -> list[Any]:
        name, *arguments = step
        if name == "later":
            self.now += arguments[0]
        elif name == "mood":
            for backends in self.backends:
                backends[TIERS.index(arguments[0])].mood = arguments[1]
        else:
            return [self._call(cache, name, arguments[0]) for cache in self.caches]
        return [None, None]

    def _call(self, cache: Cache, name: str, text: Any) -> Any:
        try:
            result = getattr(cache, name)([text] if name in ("forget", "embed_batch") else text)
        except Exception as error:
            return type(error), str(error)
        return result.tolist() if isinstance(result, np.ndarray) else result

    def describe(self, number: int) -> Any:
        """Return the counts of a cache, without seconds, and the calls of its stores."""
        stats = self.caches[number].stats()
        tiers = {
            name: replace(tier, seconds=0.0, saved=tier.saved._replace(seconds=0.0))
            for name, tier in stats.tiers.items()
        }
        calls = [(backend.reads, backend.writes, sorted(backend._store)) for backend in self.backends[number]]
        return tiers, stats.requested, stats.found, stats.shared, calls

    def close(self) -> None:
        for cache in self.caches:
            cache.close()


steps = st.one_of(
    st.tuples(st.just("embed"), st.sampled_from(["a", "b", "c", "d", "\ud800", 5])),
    st.tuples(st.just("embed"), st.sampled_from(["a", "b", "c", "d"])),
    st.tuples(st.just("embed_batch"), st.sampled_from(["a", "b"])),
    st.tuples(st.just("forget"), st.sampled_from("abc")),
    st.tuples(st.just("mood"), st.sampled_from(TIERS), st.sampled_from(MOODS)),
    st.tuples(st.just("later"), st.sampled_from([1.0, 200.0, -500.0])),
)


@given(
    st.lists(steps, max_size=15),
    st.sampled_from(["skip", "raise"]),
    st.booleans(),
    st.sampled_from(["frames", "entries", "either"]),
)
@settings(deadline=None, max_examples=150)
def test_a_single_read_is_the_plan_in_less_time(plan: Any, on_error: Any, fallback: bool, holds: Any) -> None:
    pair = Pair(on_error, fallback, holds)
    try:
        for step in [("embed", "a"), ("embed", "b"), *plan]:
            single, planned = pair.run(step)
            assert single == planned
            assert pair.describe(0) == pair.describe(1)
    finally:
        pair.close()


def make_cache(*backends: DictBackend, **options: Any) -> Cache:
    tiers = [Tier(backend, name=f"tier {i}", lease="off", write="inline") for i, backend in enumerate(backends)]
    return Cache(CountingProvider(), tiers, **options)


@pytest.mark.parametrize("holds", ["frames", "entries", "either"])
def test_a_hit_in_a_slower_tier_needs_no_plan(monkeypatch: pytest.MonkeyPatch, holds: Any) -> None:
    memory, store = DictBackend(holds="entries"), DictBackend(scope="network", deadline=True, holds=holds)
    with make_cache(memory, store) as cache:
        expected = cache.embed_batch(["a", "b"])
        memory._store.clear()
        monkeypatch.setattr(cache._chain.engine, "fetch", None)
        assert (cache.embed("a") == expected[0]).all()
        assert len([key for key in memory._store if key.count(".") == 2 and "card" not in key]) == 1, "it is promoted"
        assert (cache.embed("a") == expected[0]).all()
        with pytest.raises(TypeError):
            cache.embed("new")


def test_a_miss_asks_each_store_once() -> None:
    first, second = MoodyBackend(scope="host", deadline=True), MoodyBackend(scope="network", deadline=True)
    with make_cache(first, second) as cache:
        cache.embed("a")
        first.reads.clear()
        second.reads.clear()
        cache.embed("b")
        assert (first.reads, second.reads) == ([1], [1])
        first.mood = "timeout"
        cache.embed("a")
        assert (first.reads, second.reads) == ([1, 1], [1, 1]), "a store that hangs costs its timeout once"


def test_an_error_of_the_text_names_its_position() -> None:
    with make_cache(DictBackend(scope="host", deadline=True)) as cache:
        cache.embed("a")
        with pytest.raises(TextError, match="item 0"):
            cache.embed("\ud800")


def test_a_strict_tier_raises_and_the_request_is_counted() -> None:
    store = MoodyBackend(scope="host", deadline=True)
    with Cache(CountingProvider(), [Tier(store, name="store", on_error="raise", lease="off")]) as cache:
        cache.embed("a")
        store.mood = "error"
        with pytest.raises(TierError, match="store"):
            cache.embed("a")
        assert cache.stats().requested == 2
        assert cache.stats().tiers["store"].errors == 1


def test_listeners_see_single_reads() -> None:
    seen: list[Any] = []
    with make_cache(DictBackend(scope="host", deadline=True)) as cache:
        cache.embed("a")
        cache.subscribe(seen.append)
        cache.embed("a")
    assert [event.hits for event in seen] == [1]


def test_a_closed_cache_reads_nothing() -> None:
    cache = make_cache(DictBackend(scope="host", deadline=True))
    cache.embed("a")
    cache.close()
    with pytest.raises(CacheClosed):
        cache.embed("a")


def test_every_ticket_ends() -> None:
    store = MoodyBackend(scope="host", deadline=True)
    with make_cache(store) as cache:
        for mood in ("well", "error", "corrupt", "well"):
            store.mood = mood
            for text in ("a", "b", "a"):
                cache.embed(text)
        assert not cache._chain.in_flight._reading
