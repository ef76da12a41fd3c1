"""The public API: signatures, types and printed values.

A method and its async twin have the same signature. The type tests cover every public name. A value prints as one line.
"""

from __future__ import annotations

import ast
import asyncio
import inspect
import threading
import xml.etree.ElementTree
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from patience import LONG_TIMEOUT, wait_until

import embedonce
from embedonce import Cache, Entry, Explanation, Fetched, Purged, Stats, Tier, TierError, VectorSpace
from embedonce.contracts import Embedded
from embedonce.errors import TextRefused
from embedonce.events import ProviderStats, TierStats
from embedonce.testing.fakes import CountingProvider, DictBackend
from embedonce.testing.faults import Fault, FaultyBackend, FaultyProvider, ProviderFault
from embedonce_backends.memory import MemoryBackend

TYPED = Path(__file__).parents[1] / "typing" / "public_api.py"
WITHOUT_IO = {
    *("count_passed_by", "find_in_memory", "for_namespace", "for_provider", "normalize", "provider_stats", "stats"),
    "subscribe",
}

METHODS = [name for name, _ in inspect.getmembers(Cache, inspect.isfunction) if not name.startswith("_")]
TWINS = [name for name in METHODS if f"a{name}" in METHODS]


# --- signatures and types ---------------------------------------------------------------------


def test_every_method_that_does_io_has_a_twin() -> None:
    assert {name for name in METHODS if name not in TWINS and name[1:] not in TWINS} == WITHOUT_IO


@pytest.mark.parametrize("name", TWINS)
def test_a_method_and_its_twin_have_the_same_signature(name: str) -> None:
    blocking, awaited = (inspect.signature(getattr(Cache, each)) for each in (name, f"a{name}"))
    texts = blocking.parameters.get("texts")
    if name in ("embed_iter", "estimate"):  # the async twin also accepts async iterables
        assert awaited.parameters["texts"].annotation == "Iterable[str] | AsyncIterable[str]"
        awaited = awaited.replace(
            parameters=[texts if p.name == "texts" else p for p in awaited.parameters.values()],
            return_annotation=awaited.return_annotation.replace("AsyncIterator", "Iterator"),
        )
    assert blocking == awaited


def test_options_of_fetch_and_put_are_keyword_only() -> None:
    for name, options in {"fetch": {"store", "metadata", "fresh", "admit"}, "put": {"metadata", "costs"}}.items():
        parameters = inspect.signature(getattr(Cache, name)).parameters.values()
        assert {p.name for p in parameters if p.kind is p.KEYWORD_ONLY} == options


def test_type_tests_cover_the_package_and_the_cache() -> None:
    tree = ast.parse(TYPED.read_text(encoding="utf-8"))
    used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    used |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names}
    public = {name for name in dir(Cache) if not name.startswith("_")}
    assert (public | set(embedonce.__all__)) - used == set()


# --- one line each ----------------------------------------------------------------------------


def many(cache: Cache, count: int) -> Fetched:
    return cache.fetch([f"private {i}" for i in range(count)], metadata=[{"note": "private"}] * count)


def a_stats(hits: int = 0, misses: int = 0, **counts: int) -> TierStats:
    zeros = dict.fromkeys(("errors", "corrupt", "skipped", "stored", "dropped"), 0)
    return TierStats(hits=hits, misses=misses, **{**zeros, **counts}, seconds=0.0, causes={}, drops={})


def printed() -> dict[str, Any]:
    """Return a large value of each type, with a text, a line break and markup in every field that can have them."""
    hostile = "<b>&\n"
    space = VectorSpace(
        provider="p",
        model=hostile * 100,
        prompt="x" * 5000,
        extra={f"{hostile}{i}": list(range(1000)) for i in range(99)},
    )
    down = FaultyBackend(DictBackend(), [Fault("refuse")])
    tiers = [MemoryBackend(), Tier(DictBackend(scope="network"), name="far"), Tier(down, name="down")]
    with Cache(CountingProvider(dimensions=384), tiers) as cache:
        many(cache, 700)
        fetched = many(cache, 1000)
        explanation = cache.explain("private 1")
        estimate = cache.estimate([f"private {i}" for i in range(2000)])
        stats = cache.stats()
        down.faults.clear()
        purged = cache.purge(model="counting", dry_run=True)
    failed = {0: TextRefused("private")}
    provider = ProviderStats(texts=1, failed=0, tokens=0, seconds=0.0)
    return {
        "Fetched": fetched,
        "Fetched with failures": Fetched(
            [None] * 9, [None] * 9, failed, [None] * 9, space, {hostile: 1.0}, {hostile: hostile}
        ),
        "Fetched of nothing": Fetched([], [], {}, [], space, {}, {}),
        "Stats": stats,
        "Stats with odd names": Stats({hostile: a_stats(1, 2)}, {hostile: provider}, 3),
        "Stats of nothing": Stats({}, {}, 0),
        "VectorSpace": space,
        "Explanation": explanation,
        "Explanation of a miss": Explanation(
            "eo1.k", "s", "f", hostile, {"extra": "y" * 9999}, {hostile: hostile}, True, {hostile: hostile}, [hostile]
        ),
        "Estimate": estimate,
        "Estimate of nothing": replace(estimate, texts=0, hits={}, missing=0, errors={}, price=None),
        "Estimate with odd names": replace(estimate, hits={hostile: 1}, errors={hostile: hostile}),
        "Purged": purged,
        "Purged a lot": Purged({str(i): None for i in range(1000)}, {hostile: 12345}),
        "Entry": Entry(fetched.vectors[0], 1.0, None, {"text_preview": "private"}),
        "Embedded": Embedded(fetched.vectors, tokens=7),
        "Embedded with nothing": Embedded(None),  # type: ignore[arg-type]
        "Embedded with a number": Embedded(np.float32(1), tokens="x"),  # type: ignore[arg-type]
    }


VALUES = printed()


@pytest.mark.parametrize("name", VALUES)
def test_a_value_prints_one_short_line_without_texts_and_vectors(name: str) -> None:
    shown = repr(VALUES[name])
    assert shown.isprintable()
    assert len(shown) < 600
    assert "private" not in shown
    assert shown == str(VALUES[name])
    assert "array" not in shown


@pytest.mark.parametrize("name", [name for name, value in VALUES.items() if hasattr(value, "_repr_html_")])
def test_a_notebook_shows_a_small_table_in_which_every_name_is_escaped(name: str) -> None:
    shown = VALUES[name]._repr_html_()
    table = xml.etree.ElementTree.fromstring(shown)
    assert {node.tag for node in table.iter()} <= {"table", "caption", "thead", "tbody", "tr", "th", "td"}
    widths = {len(row) for row in table.iter("tr")}
    assert len(widths) == 1
    assert "private" not in shown
    assert len(shown) < 20_000


def test_what_a_reader_sees() -> None:
    with Cache(CountingProvider(dimensions=3), [MemoryBackend()], space=None) as cache:
        cache.embed_batch(["a", "b"])
        assert repr(cache.fetch(["a", "b", "c"])) == "<Fetched 3 texts of 3 dimensions: 2 from memory, 1 from provider>"
        assert repr(cache.lookup(["z"])) == "<Fetched 1 text of 3 dimensions: 1 missing>"
        assert (
            repr(cache.stats())
            == "<Stats hit rate 33.3 % (memory 33.3 %), 3 computed, 0 failed, 0 shared, 2 tokens saved>"
        )
        explained = cache.explain("a")
        assert repr(explained) == f"<Explanation found in memory: memory hit; scope {explained.scope}, task 'document'>"
    space = VectorSpace(provider="openai", model="text-embedding-3-small", dimensions=256)
    assert repr(space) == "VectorSpace(provider='openai', model='text-embedding-3-small', dimensions=256)"
    assert eval(repr(space)) == space
    assert repr(Entry(np.ones(3, np.float32), 5.0, 9.0, {"a": 1})) == (
        "<Entry 3 x float32, created=5.0, expires=9.0, metadata of 1 key>"
    )


# --- hit rates --------------------------------------------------------------------------------


def test_the_hit_rate_is_the_share_of_requested_texts_that_some_tier_had() -> None:
    near = MemoryBackend()
    with Cache(CountingProvider(), [near, Tier(DictBackend(), name="far")]) as cache:
        assert cache.stats().hit_rate is None
        cache.embed_batch(["a", "a", "b"])
        assert (cache.stats().requested, cache.stats().found) == (2, 0)
        cache.embed("a")  # the fast path
        cache.lookup(["a", "b", "c"])
        near.delete_many(list(near.scan("")))
        asyncio.run(cache.aembed("b"))  # from the second tier
        stats = cache.stats()
        assert (stats.requested, stats.found) == (7, 4)
        assert stats.hit_rate == 4 / 7
        other = cache.for_provider(CountingProvider())
        other.embed("b")
        assert (cache.stats().requested, cache.stats().found) == (8, 5)


def test_a_failed_tier_counts_its_texts_as_requested_and_not_as_found() -> None:
    down = FaultyBackend(DictBackend(), [Fault("refuse")])
    with Cache(CountingProvider(), [Tier(down, name="down", on_error="raise")]) as cache:
        with pytest.raises(TierError):
            cache.embed("a")
        assert (cache.stats().requested, cache.stats().found, cache.stats().hit_rate) == (1, 0, 0.0)


def test_a_fallback_does_not_count_the_texts_again() -> None:
    broken = FaultyProvider(CountingProvider(), [ProviderFault("raise", error=OSError)])
    fallback = CountingProvider(model="other")
    with Cache(broken, [MemoryBackend()], fallback=fallback) as cache:
        for _ in range(2):
            cache.embed_batch(["a", "b"])
        assert (cache.stats().requested, cache.stats().found) == (4, 0)


def test_a_vector_that_another_process_computed_during_a_lease_is_a_hit() -> None:
    store = DictBackend(scope="network")
    entered, go = threading.Event(), threading.Event()

    def slow(texts: list[str]) -> list[list[float]]:
        entered.set()
        go.wait(LONG_TIMEOUT)
        return [[float(len(text)), 1.0] for text in texts]

    space = {"model": "m"}
    with (
        Cache(slow, [Tier(store, name="net", lease=60.0)], space=space) as one,
        Cache(lambda texts: pytest.fail("one computes"), [Tier(store, name="net", lease=60.0)], space=space) as two,
        ThreadPoolExecutor(2) as pool,
    ):
        first = pool.submit(one.embed, "text")
        assert entered.wait(LONG_TIMEOUT)
        second = pool.submit(two.embed, "text")
        wait_until(lambda: two.stats().tiers["net"].misses == 1)
        go.set()
        assert (first.result(LONG_TIMEOUT) == second.result(LONG_TIMEOUT)).all()
        assert (two.stats().requested, two.stats().found, two.stats().hit_rate) == (1, 1, 1.0)


def test_the_hit_rate_never_exceeds_1_while_calls_run() -> None:
    """A call counts its texts only when it ends. A text whose vector was found by polling is not counted earlier."""
    store, near = DictBackend(scope="network"), FaultyBackend(DictBackend(), [])
    space = {"model": "m"}
    entered, go = threading.Event(), threading.Event()

    def slow(texts: list[str]) -> list[list[float]]:
        entered.set()
        go.wait(LONG_TIMEOUT)
        return [[float(len(text)), 1.0] for text in texts]

    with (
        Cache(slow, [Tier(store, name="net", lease=60.0)], space=space) as one,
        Cache(slow, [Tier(near, name="near"), Tier(store, name="net", lease=60.0)], space=space) as two,
        ThreadPoolExecutor(2) as pool,
    ):
        first = pool.submit(one.embed, "text")
        assert entered.wait(LONG_TIMEOUT)
        second = pool.submit(two.embed, "text")
        wait_until(lambda: two.stats().tiers["net"].misses == 1)
        # The poll will find the entry, and then the promotion of this entry will hang.
        near.faults.append(Fault("hang", on="set"))
        go.set()
        near.gate.until(1)
        assert (two.stats().requested, two.stats().found) == (0, 0)
        near.release()
        assert (first.result(LONG_TIMEOUT) == second.result(LONG_TIMEOUT)).all()
        assert (two.stats().requested, two.stats().found) == (1, 1)


def test_errors_do_not_lower_a_tiers_hit_rate() -> None:
    assert a_stats(1, 1, errors=7, skipped=7, corrupt=7).hit_rate == 0.5
    assert a_stats(errors=7).hit_rate is None
