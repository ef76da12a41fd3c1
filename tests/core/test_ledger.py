"""The work that providers have done and that hits have saved: in statistics, events and metrics."""

from __future__ import annotations

import asyncio
import sys
import threading
from decimal import Decimal
from typing import Any

import numpy as np
import pytest
from prometheus_client import CollectorRegistry

from embedonce import Cache, Cost, Tier
from embedonce._engine import ledger
from embedonce.contracts import Embedded
from embedonce.events import Computed, Event, LookedUp
from embedonce.metrics import register
from embedonce.prices import Price
from embedonce.testing.fakes import CountingProvider, DictBackend
from embedonce.vectors import Work
from embedonce_backends.memory import MemoryBackend

PRICE = "0.02 USD / 1M tokens"
DOLLARS = Price.parse(PRICE)


def test_each_hit_saves_what_its_text_cost() -> None:
    with Cache(CountingProvider(), [MemoryBackend(), Tier(DictBackend(), name="far")], price=PRICE) as cache:
        cache.embed_batch(["a", "bb", "a"])
        cache.embed("bb")
        cache.embed_batch(["a", "bb", "bb"])
        stats = cache.stats()
    assert (stats.computed.texts, stats.computed.tokens) == (2, 3)
    assert (stats.saved.texts, stats.saved.tokens) == (3, 5)
    assert stats.saved.unknown_tokens == stats.saved.unknown_seconds == 0
    assert stats.saved.seconds > 0
    assert stats.tiers["memory"].saved == stats.saved
    assert stats.tiers["far"].saved == Work()
    assert stats.spent == {"USD": DOLLARS.of(3)}
    assert stats.money_saved == {"USD": DOLLARS.of(5)}
    (space,) = stats.spaces.values()
    assert (space.card["provider"], space.price) == ("counting", DOLLARS)


def test_a_promoted_entry_keeps_its_cost() -> None:
    far = DictBackend()
    with Cache(CountingProvider(), [Tier(far, name="far")]) as cache:
        cache.embed_batch(["four", "xx"])
        seconds = cache.stats().computed.seconds
    with Cache(CountingProvider(), [MemoryBackend(), Tier(DictBackend(store=far), name="far")]) as cache:
        cache.embed_batch(["four", "xx"])
        cache.embed_batch(["four", "xx"])
        cache.embed("four")
        tiers = cache.stats().tiers
    assert (tiers["far"].saved.texts, tiers["far"].saved.tokens) == (2, 6)
    assert (tiers["memory"].saved.texts, tiers["memory"].saved.tokens) == (3, 10)
    assert tiers["far"].saved.seconds == pytest.approx(seconds)


@pytest.mark.parametrize("as_frames", [True, False])
def test_an_unknown_cost_is_never_zero(as_frames: bool) -> None:
    tier = DictBackend() if as_frames else MemoryBackend()
    with Cache(CountingProvider(dimensions=2), [tier], price=PRICE) as cache:
        vectors = np.ones((4, 2))
        costs = [None, Cost(tokens=5), Cost(seconds=0.5), Cost(7, 1)]
        cache.put(["a", "b", "c", "d"], vectors, costs=costs)
        cache.put(["e"], vectors[:1])
        cache.embed_batch(["a", "b", "c", "d", "e"])
        for text in "abcde":
            cache.embed(text)
        saved = cache.stats().saved
    assert saved == Work(texts=10, tokens=24, seconds=3.0, unknown_tokens=6, unknown_seconds=6)


def test_the_async_put_takes_costs() -> None:
    async def run() -> Work:
        async with Cache(CountingProvider(dimensions=2), [DictBackend()]) as cache:
            await cache.aput(["a"], [[1.0, 2.0]], costs=[Cost(3, 0.25)])
            await cache.aembed("a")
            return cache.stats().saved

    assert asyncio.run(run()) == Work(1, 3, 0.25)


@pytest.mark.parametrize(
    "costs",
    [
        [],
        [Cost(1)] * 2,
        [Cost(-1)],
        [Cost(2**41)],
        [Cost(True)],
        [Cost(1.0)],  # type: ignore[arg-type]
        [Cost(1, -0.5)],
        [Cost(1, float("nan"))],
        [Cost(1, float("inf"))],
        [Cost(1, True)],
        [(1, 2, 3)],
        [5],
        ["ab"],
    ],
)
def test_wrong_costs_are_refused_and_nothing_is_stored(costs: Any) -> None:
    backend = DictBackend()
    with Cache(CountingProvider(dimensions=2), [backend]) as cache:
        with pytest.raises(ValueError, match="costs"):
            cache.put(["a"], [[1.0, 2.0]], costs=costs)
        assert len(backend) == 0


@pytest.mark.parametrize(
    ("tokens", "expected", "unknown"),
    [
        (7, 7, 0),
        ([4, 3], 7, 0),
        ((4, None), 4, 1),
        (np.array([4, 3]), 7, 0),
        (np.int64(7), 7, 0),
        (None, 0, 2),
        ([4], 0, 2),
        ([4, 3, 1], 0, 2),
        ([4, -3], 4, 1),
        (True, 0, 2),
        (7.0, 0, 2),
        ("77", 0, 2),
        (2**41, 0, 2),
        ([], 0, 2),
    ],
)
def test_tokens_of_a_call_and_of_each_text(tokens: Any, expected: int, unknown: int) -> None:
    def embed(texts: list[str]) -> Embedded:
        return Embedded(np.ones((len(texts), 2)), tokens)

    with Cache(embed, [MemoryBackend()], space={"model": "m"}) as cache:
        cache.embed_batch(["aaa", "b"])
        cache.embed_batch(["aaa", "b"])
        stats = cache.stats()
    assert (stats.computed.texts, stats.computed.tokens, stats.computed.unknown_tokens) == (2, expected, unknown)
    assert (stats.saved.texts, stats.saved.tokens, stats.saved.unknown_tokens) == (2, expected, unknown)
    assert stats.saved.unknown_seconds == 0


def test_texts_that_fail_are_charged_but_are_not_stored() -> None:
    def embed(texts: list[str]) -> Embedded:
        return Embedded([[1.0, 2.0] if text != "bad" else None for text in texts], tokens=100)

    with Cache(embed, [MemoryBackend()], space={"model": "m"}) as cache:
        fetched = cache.fetch(["good", "bad"])
        assert list(fetched.failed) == [1]
        cache.embed("good")
        stats = cache.stats()
    assert (stats.computed.texts, stats.computed.tokens) == (1, 100)
    assert (stats.saved.texts, stats.saved.tokens) == (1, 57)  # four sevenths, rounded down


def test_events_have_the_work_the_scope_and_the_price() -> None:
    events: list[Event] = []
    with Cache(CountingProvider(), [MemoryBackend()], price=PRICE, listeners=[events.append]) as cache:
        cache.embed_batch(["a", "bb"])
        cache.embed("bb")
        scope = cache.explain("a").scope
    computed = [event for event in events if isinstance(event, Computed)]
    looked_up = [event for event in events if isinstance(event, LookedUp)]
    assert [(event.scope, event.tokens, event.price) for event in computed] == [(scope, 3, DOLLARS)]
    assert [(event.scope, event.saved.texts, event.saved.tokens, event.price) for event in looked_up] == [
        (scope, 0, 0, DOLLARS),
        (scope, 1, 2, DOLLARS),
    ]


def test_caches_of_one_chain_have_their_own_prices() -> None:
    with Cache(CountingProvider(model="dear"), [MemoryBackend()], price="1 EUR / 1 token") as cache:
        other = cache.for_provider(CountingProvider(model="cheap"), price=PRICE)
        free = cache.for_provider(CountingProvider(model="free"))
        for one in (cache, other, free):
            one.embed("abc")
            one.embed("abc")
        stats = cache.stats()
    assert stats.spent == stats.money_saved == {"EUR": Decimal(3), "USD": DOLLARS.of(3)}
    assert (stats.saved.texts, stats.saved.tokens) == (3, 9)


def test_a_fallback_has_its_own_price() -> None:
    def fail(texts: list[str]) -> Any:
        raise ConnectionError

    fallback = CountingProvider(dimensions=2)
    space = {"model": "m", "dimensions": 2}
    with Cache(
        fail, [MemoryBackend()], space=space, fallback=fallback, price="1 EUR / 1 token", fallback_price=PRICE
    ) as cache:
        cache.embed("abc")
        cache.embed("abc")
        stats = cache.stats()
    assert stats.spent == {"EUR": Decimal(0), "USD": DOLLARS.of(3)}
    assert stats.money_saved["USD"] == DOLLARS.of(3)


def test_no_hit_of_many_threads_is_lost() -> None:
    interval = sys.getswitchinterval()
    with Cache(CountingProvider(), [MemoryBackend()]) as cache:
        cache.embed_batch(["a", "bb", "ccc"])
        start = threading.Barrier(8)

        def work() -> None:
            start.wait()
            for _ in range(700):
                cache.embed("a")
                cache.embed("bb")
                cache.embed_batch(["bb", "ccc"])

        threads = [threading.Thread(target=work) for _ in range(8)]
        sys.setswitchinterval(1e-6)
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        finally:
            sys.setswitchinterval(interval)
        stats = cache.stats()
    assert stats.tiers["memory"].hits == stats.saved.texts == stats.found == 8 * 700 * 4
    assert stats.saved.tokens == 8 * 700 * (1 + 2 + 2 + 3)
    assert stats.saved.unknown_tokens == 0


def test_the_work_in_more_scopes_than_the_ledger_keeps_is_added_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger, "MAX_SPACES", 4)
    with Cache(CountingProvider(symmetric=False), [MemoryBackend()]) as cache:
        for number in range(10):
            cache.embed("abc", task=f"task {number}")
            cache.embed("abc", task=f"task {number}")
        stats = cache.stats()
    assert len(stats.spaces) <= 5
    assert (stats.computed.texts, stats.saved.texts, stats.saved.tokens) == (10, 10, 30)
    assert stats.spaces[ledger.OTHERS].card == {}


def test_the_work_in_further_scopes_is_read_without_a_fast_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger, "MAX_SPACES", 4)
    with Cache(CountingProvider(symmetric=False), [Tier(DictBackend(scope="network"), name="far")]) as cache:
        for number in range(10):
            cache.embed("abc", task=f"task {number}")
            cache.flush()
            cache.embed("abc", task=f"task {number}")
        stats = cache.stats()
    assert (stats.computed.texts, stats.saved.texts, stats.saved.tokens) == (10, 10, 30)
    assert stats.spaces[ledger.OTHERS].computed.texts > 0


def test_metrics_show_the_work_by_tier_and_model() -> None:
    registry = CollectorRegistry()
    with Cache(CountingProvider(model="m"), [MemoryBackend()], price=PRICE) as cache:
        register(cache, registry=registry)
        cache.embed_batch(["a", "bb"])
        cache.embed_batch(["a", "bb"], task="document")
        cache.put(["c"], [cache.embed("a")])
        cache.embed("c")
        saved, computed = {"tier": "memory", "model": "m"}, {"provider": "counting", "model": "m"}
        read = registry.get_sample_value
        assert read("embed_cache_computed_texts_total", computed) == 2
        assert read("embed_cache_computed_tokens_total", computed) == 3
        assert read("embed_cache_computed_seconds_total", computed) > 0
        assert read("embed_cache_computed_money_total", {**computed, "currency": "USD"}) == pytest.approx(3 * 2e-8)
        assert read("embed_cache_saved_texts_total", saved) == 4
        assert read("embed_cache_saved_tokens_total", saved) == 4
        assert read("embed_cache_saved_seconds_total", saved) > 0
        assert read("embed_cache_saved_money_total", {**saved, "currency": "USD"}) == pytest.approx(4 * 2e-8)
        assert read("embed_cache_saved_unknown_tokens_total", saved) == 1


def test_stats_for_people_name_the_saved_tokens() -> None:
    with Cache(CountingProvider(), [MemoryBackend()], price="2 EUR / 1 token") as cache:
        cache.embed("abc")
        assert "saved" not in repr(cache.stats())
        cache.embed("abc")
        assert repr(cache.stats()).endswith(", 0 shared, 3 tokens saved (6.00 EUR)>")
        assert "<th>saved tokens</th>" in cache.stats()._repr_html_()
