"""The fast path of hits in memory gives the same results, errors and counts as the slow path."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embedonce import Cache, Fetched, Tier
from embedonce.errors import CacheClosed, TextError
from embedonce.testing.fakes import CountingProvider
from embedonce.vectors import Cost, Entry
from embedonce_backends.memory import MemoryBackend


class SubclassOfStr(str):
    __slots__ = ()


CALLS = ("embed", "embed_batch", "fetch", "lookup", "aembed", "aembed_batch", "afetch", "alookup")
ODD = (SubclassOfStr("b"), "\ud800", 5)
known = st.lists(st.sampled_from("abc"), max_size=5)
texts = st.one_of(known, known, known.map(tuple), st.lists(st.sampled_from(["a", "new", *ODD]), max_size=3))
tasks = st.one_of(st.just("document"), st.sampled_from(["document", "query", "other", 3]))
steps = st.one_of(
    st.tuples(st.sampled_from(CALLS), texts, tasks),
    st.tuples(st.sampled_from(CALLS), texts, tasks),
    st.tuples(st.just("put"), st.lists(st.sampled_from("abc"), min_size=1, max_size=3)),
    st.tuples(st.just("forget"), st.sampled_from("abc")),
    st.tuples(st.just("later"), st.sampled_from([1.0, 200.0, -500.0])),
)


class Pair:
    """Two caches of equal configuration. The second one never takes the fast path."""

    def __init__(self, dtype: Any, ttl: float | None) -> None:
        self.now = 1e9
        self.caches = [
            Cache(
                CountingProvider(), [Tier(MemoryBackend(max_entries=4), ttl=ttl)], dtype=dtype, clock=lambda: self.now
            )
            for _ in range(2)
        ]
        self.caches[1]._find_hot_tier = lambda: ((lambda key: None), {})  # type: ignore[method-assign]
        self.caches[1]._refresh_hot_path()

    def run(self, step: Any) -> list[Any]:
        name, *arguments = step
        if name == "later":
            self.now += arguments[0]
            return [None, None]
        return [describe(call(cache, name, arguments)) for cache in self.caches]

    def close(self) -> None:
        for cache in self.caches:
            cache.close()


def call(cache: Cache, name: str, arguments: Any) -> Any:
    if name == "put":
        vectors = [[1.0, 2.0, 3.0, ord(text)] + [0.5] * 4 for text in arguments[0]]
        arguments = [*arguments, vectors]
        keywords = {"metadata": [{"of": text} for text in arguments[0]]}
    else:
        keywords = {}
    if name == "forget":
        arguments = [list(arguments)]
    if name.endswith("embed"):
        asked, task = arguments
        arguments = [asked[0] if asked else "a", task]
    try:
        result = getattr(cache, name)(*arguments, **keywords)
        return asyncio.run(result) if name.startswith("a") else result
    except Exception as error:
        return error


def describe(result: Any) -> Any:
    """Return everything about a result except the seconds, in a form that can be compared."""
    if isinstance(result, Exception):
        return type(result), str(result)
    if isinstance(result, np.ndarray):
        return result.shape, str(result.dtype), result.tolist(), result.flags.writeable
    if not isinstance(result, Fetched):
        return result
    rows = [None if row is None else describe(row) for row in result.rows]
    failed = {i: describe(error) for i, error in result.failed.items()}
    known = (result.sources, result.metadata, result.space, result.errors, result.dimensions)
    return rows, failed, known, list(result.seconds)


def count(cache: Cache) -> Any:
    stats = cache.stats()
    tiers = {
        name: replace(tier, seconds=0.0, saved=tier.saved._replace(seconds=0.0)) for name, tier in stats.tiers.items()
    }
    spaces = {
        scope: {tier: work._replace(seconds=0.0) for tier, work in space.saved.items()}
        for scope, space in stats.spaces.items()
    }
    return tiers, spaces, stats.requested, stats.found, stats.shared


@given(st.lists(steps, max_size=12), st.sampled_from(["float32", "int8"]), st.sampled_from([None, 100.0]))
@settings(deadline=None)
def test_the_fast_path_is_the_slow_path_in_less_time(plan: Any, dtype: Any, ttl: float | None) -> None:
    pair = Pair(dtype, ttl)
    try:
        for step in [("embed_batch", ["a", "b", "c"], "document"), *plan]:
            fast, slow = pair.run(step)
            assert fast == slow
            assert count(pair.caches[0]) == count(pair.caches[1])
    finally:
        pair.close()


@pytest.mark.parametrize("name", ["embed_batch", "aembed_batch", "fetch", "afetch", "lookup", "alookup"])
@pytest.mark.parametrize("size", [1, 3])
def test_hits_in_memory_need_no_plan(name: str, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with Cache(CountingProvider(), [MemoryBackend()]) as cache:
        asked = ["a", "b", "c"][:size]
        cache.embed_batch(asked)
        monkeypatch.setattr(cache, "_chain", cache._chain)
        monkeypatch.setattr(cache._chain.engine, "fetch", None)
        assert not isinstance(call(cache, name, [asked, "document"]), Exception)
        assert cache.stats().tiers["memory"].hits == size
        assert isinstance(call(cache, name, [[*asked, "new"], "document"]), TypeError)


def test_a_result_of_the_fast_path_belongs_to_the_caller() -> None:
    with Cache(CountingProvider(), [MemoryBackend()]) as cache:
        cache.put(["a", "b"], np.ones((2, 8)), metadata=[{"n": [1]}, None])
        for asked in (["a"], ["a", "b"]):
            cache.embed_batch(asked)[:] = 0
            cache.fetch(asked).metadata[0]["n"].append(2)  # type: ignore[index]
            assert (cache.embed_batch(asked) == 1).all()
            assert cache.fetch(asked).metadata[0] == {"n": [1]}


def test_a_closed_cache_has_no_fast_path() -> None:
    cache = Cache(CountingProvider(), [MemoryBackend()])
    cache.embed_batch(["a"])
    cache.close()
    for name in ("embed_batch", "fetch", "lookup"):
        assert isinstance(call(cache, name, [["a"], "document"]), CacheClosed)


def test_a_listener_sees_the_hits_of_a_batch() -> None:
    seen: list[Any] = []
    with Cache(CountingProvider(), [MemoryBackend()]) as cache:
        cache.embed_batch(["a"])
        cache.subscribe(seen.append)
        cache.embed_batch(["a"])
        cache.fetch(["a"])
    assert [event.hits for event in seen] == [1, 1]


class OddBackend(MemoryBackend):
    """Answers a batch with entries that were not asked for, or with something else than entries."""

    capabilities = replace(MemoryBackend.capabilities)
    answer: Any = None

    def get_many(self, keys: Any, /) -> Any:
        found = super().get_many(keys)
        return found if self.answer is None else self.answer(found)


@pytest.mark.parametrize(
    "answer",
    [
        lambda found: {**found, "eo1.0.0": next(iter(found.values()))},
        lambda found: dict.fromkeys(found, None),
        lambda found: dict.fromkeys(found, Entry(np.ones(3, np.float32), 0.0)),
        lambda found: dict(reversed(found.items())),
    ],
)
def test_an_odd_answer_of_a_backend_is_left_to_the_slow_path(answer: Any) -> None:
    backend = OddBackend()
    with Cache(CountingProvider(), [backend]) as cache:
        right = cache.embed_batch(["a", "b"])
        backend.answer = answer
        assert (cache.embed_batch(["a", "b"]) == right).all()
        assert (cache.fetch(["a", "b"]).vectors == right).all()


def test_find_in_memory_is_a_fetch_that_never_waits() -> None:
    both = [Cache(CountingProvider(symmetric=False), [MemoryBackend()]) for _ in range(2)]
    for cache in both:
        cache.put(["a"], [[1.0] * 8], metadata=[{"of": "a"}], costs=[Cost(3, 0.5)])
    first, second = both
    for text in ("a", "new", "a", SubclassOfStr("a")):
        entry = first.find_in_memory(text)
        if type(text) is str and text == "a":
            fetched = second.fetch([text])
            assert entry is not None
            assert fetched.rows[0] is not None
            assert entry.vector.tolist() == fetched.rows[0].tolist()
            assert (entry.metadata, entry.tokens) == (fetched.metadata[0], fetched.saved.tokens)
            assert entry.metadata is not None
            entry.metadata["of"] = "changed"
        else:
            assert entry is None
    assert count(first) == count(second)
    assert first.find_in_memory("a", "query") is None
    with pytest.raises(TextError):
        first.find_in_memory("\ud800")
    first.subscribe(print)
    assert first.find_in_memory("a") is None
    for cache in both:
        cache.close()
    assert second.find_in_memory("a") is None
