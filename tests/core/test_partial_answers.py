"""A tier with several nodes: if one node fails, only its keys count as errors, and the other nodes are used."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Literal, TypeVar

import pytest
from patience import LONG_TIMEOUT

from embedonce import Cache, EraseIncomplete, Fetched, PartialAnswer, Tier, TierBusy, TierError
from embedonce._engine.breaker import Breaker
from embedonce.events import Event, LookedUp, Stored
from embedonce.testing import CountingProvider, DictBackend

R = TypeVar("R")

TEXTS = [f"text {number}" for number in range(40)]

Fetch = Callable[[Cache, list[str]], Fetched]


def fetch_async(cache: Cache, texts: list[str]) -> Fetched:
    return asyncio.run(cache.afetch(texts))


faces = pytest.mark.parametrize("fetch", [Cache.fetch, fetch_async], ids=["sync", "async"])
writes = pytest.mark.parametrize("write", ["inline", "background"])


class TwoNodes(DictBackend):
    """A tier with two nodes. One node has the keys that end in an even digit, and may fail."""

    def __init__(self, **capabilities: Any) -> None:
        super().__init__(scope="network", **capabilities)
        self.problem: Exception | None = None
        self.written: list[str] = []

    def get_many(self, keys: Sequence[str], /) -> dict[str, Any]:
        return self._call_healthy_nodes(list(keys), super().get_many)

    def set_many(self, items: Mapping[str, Any], ttl: float | None, /) -> None:
        self.written += items
        self._call_healthy_nodes(
            list(items), lambda keys: super(TwoNodes, self).set_many({key: items[key] for key in keys}, ttl)
        )

    def add_many(self, items: Mapping[str, bytes], ttl: float | None, /) -> set[str]:
        return self._call_healthy_nodes(
            list(items), lambda keys: super(TwoNodes, self).add_many({key: items[key] for key in keys}, ttl)
        )

    def delete_many(self, keys: Sequence[str], /) -> None:
        self._call_healthy_nodes(list(keys), super().delete_many)

    def _call_healthy_nodes(self, keys: list[str], call: Callable[[list[str]], R]) -> R:
        failed = [key for key in keys if on_first(key)] if self.problem else []
        answer = call([key for key in keys if key not in failed])
        if failed and len(failed) == len(keys):
            assert self.problem is not None
            raise self.problem
        if failed:
            raise PartialAnswer("one node of two", answer=answer, failed=failed) from self.problem
        return answer


def on_first(key: str) -> bool:
    return int(key[-1], 16) % 2 == 0


def split(cache: Cache, texts: Collection[str] = TEXTS) -> tuple[list[str], list[str]]:
    """Return the texts on the node that may fail, and those on the other node."""
    keys = {text: cache.explain(text).key for text in texts}
    return [t for t in texts if on_first(keys[t])], [t for t in texts if not on_first(keys[t])]


@faces
@writes
@pytest.mark.parametrize("holds", ["frames", "entries"])
def test_hits_of_the_healthy_node_are_served_and_the_other_keys_are_errors(
    fetch: Fetch, write: Literal["inline", "background"], holds: Literal["frames", "entries"]
) -> None:
    events: list[Event] = []
    backend = TwoNodes(holds=holds)
    provider = CountingProvider()
    with Cache(provider, [Tier(backend, name="far", write=write)], listeners=[events.append]) as cache:
        first, other = split(cache)
        fetch(cache, [*first[:10], *other[:10]])
        assert cache.flush(LONG_TIMEOUT)
        events.clear()
        backend.problem = TierBusy("a node is down")
        backend.written.clear()
        fetched = fetch(cache, TEXTS)
        assert cache.flush(LONG_TIMEOUT)
        for text, row, source in zip(TEXTS, fetched.rows, fetched.sources, strict=True):
            assert row is not None
            assert row.tobytes() == provider.vector_of(text).tobytes()
            assert source == ("far" if text in other[:10] else "provider")
        assert dict(fetched.errors) == {"far": "TierBusy"}
        (read,) = [event for event in events if isinstance(event, LookedUp)]
        assert (read.hits, read.errors, read.misses) == (10, len(first), len(other) - 10)
        assert read.cause == "TierBusy"
        # The same call writes the misses of the other node, but no keys of the failed node.
        assert {key for key in backend.written if not key.startswith("eo1.card")} == {
            cache.explain(text).key for text in other[10:]
        }
        (stored,) = [event for event in events if isinstance(event, Stored)]
        assert (stored.stored, stored.errors) == (len(other) - 10, 0)
        backend.problem = None
        assert fetch(cache, TEXTS).sources.count("far") == 10 + len(other)


@writes
def test_a_write_that_one_node_refuses_is_an_error_for_its_keys_only(write: Literal["inline", "background"]) -> None:
    backend = TwoNodes(holds="frames")
    provider = CountingProvider()
    with Cache(provider, [Tier(backend, name="far", write=write)]) as cache:
        first, other = split(cache)
        answer = provider.embed

        def embed(texts: Sequence[str], task: str, /) -> Any:
            backend.problem = TierBusy("a node is down")
            return answer(texts, task)

        provider.embed = embed
        cache.fetch(TEXTS)
        assert cache.flush(LONG_TIMEOUT)
        stats = cache.stats().tiers["far"]
        assert (stats.stored, stats.errors, dict(stats.causes)) == (len(other), len(first), {"TierBusy": len(first)})
        assert not cache._chain.tiers[0].writer.breaker.is_open


@pytest.mark.parametrize(
    ("problem", "calls"), [(TierBusy("down"), None), (TimeoutError(), 1), (ConnectionRefusedError(), 3)]
)
def test_a_partial_answer_moves_the_breaker_as_its_cause_does(problem: Exception, calls: int | None) -> None:
    backend = TwoNodes()
    with Cache(CountingProvider(), [Tier(backend, name="far", write="none")]) as cache:
        backend.problem = problem
        for turn in range(1, 6):
            cache.fetch(TEXTS)
            assert cache._chain.tiers[0].reader.breaker.is_open == (calls is not None and turn >= calls)


def test_a_probe_reads_keys_of_the_failed_node(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Breaker, "FIRST_WAIT", 1e-9)
    backend = TwoNodes()
    with Cache(CountingProvider(), [Tier(backend, name="far", write="none")]) as cache:
        first, _ = split(cache)
        backend.problem = TimeoutError()
        cache.fetch(TEXTS)
        assert {*cache._chain.tiers[0].reader.failing} == {cache.explain(text).key for text in first}


@faces
def test_on_error_raise_raises_if_one_node_fails(fetch: Fetch) -> None:
    backend = TwoNodes()
    with Cache(CountingProvider(), [Tier(backend, name="far", on_error="raise", write="inline")]) as cache:
        backend.problem = ConnectionRefusedError()
        with pytest.raises(TierError, match="'far'"):
            fetch(cache, TEXTS)


def test_every_process_computes_if_the_node_of_the_leases_fails() -> None:
    backend = TwoNodes(add=True)
    provider, other_provider = CountingProvider(), CountingProvider()
    tier = Tier(backend, name="far", lease=60.0)
    with Cache(provider, [tier]) as cache, Cache(other_provider, [tier]) as second:
        first, other = split(cache)
        backend.problem = TierBusy("a node is down")
        cache.embed_batch(TEXTS)
        second.embed_batch(TEXTS)
        assert provider.texts == len(TEXTS)
        assert {text: n for text, n in other_provider.count.items() if n} == dict.fromkeys(first, 1)
        assert len(other) + len(first) == len(TEXTS)


def test_forget_reports_a_node_that_fails() -> None:
    backend = TwoNodes(delete=True, scan=True)
    with Cache(CountingProvider(), [Tier(backend, name="far", write="inline")]) as cache:
        cache.embed_batch(TEXTS)
        backend.problem = TierBusy("a node is down")
        with pytest.raises(EraseIncomplete, match="far"):
            cache.forget(TEXTS)


def test_entries_are_stored_even_if_the_node_of_the_space_card_is_down() -> None:
    class CardsFail(DictBackend):
        def set_many(self, items: Mapping[str, Any], ttl: float | None, /) -> None:
            if any(key.startswith("eo1.card") for key in items):
                raise TierBusy("the node of the card is down")
            super().set_many(items, ttl)

    with Cache(CountingProvider(), [Tier(CardsFail(scope="network"), name="far", write="inline")]) as cache:
        cache.embed_batch(TEXTS)
        assert cache.fetch(TEXTS).sources == ["far"] * len(TEXTS)


@pytest.mark.parametrize("answer", [None, [], 7])
def test_an_invalid_partial_answer_makes_the_whole_call_an_error(answer: Any) -> None:
    class Broken(DictBackend):
        def get_many(self, keys: Sequence[str], /) -> dict[str, Any]:
            raise PartialAnswer("half", answer=answer, failed=[keys[0]])

    with Cache(CountingProvider(), [Tier(Broken(scope="network"), name="far", write="none")]) as cache:
        cache.embed_batch(TEXTS)
        stats = cache.stats().tiers["far"]
        assert (stats.errors, stats.misses, dict(stats.causes)) == (len(TEXTS), 0, {"PartialAnswer": len(TEXTS)})


def test_unrequested_keys_of_a_partial_answer_are_ignored() -> None:
    class Talkative(DictBackend):
        def get_many(self, keys: Sequence[str], /) -> dict[str, Any]:
            found = super().get_many(list(self.scan("")))
            raise PartialAnswer("half", answer=found, failed=[keys[0], "eo1.nobodys"]) from TierBusy("down")

    backend = Talkative(scope="network")
    provider = CountingProvider()
    with Cache(provider, [Tier(backend, name="far", write="inline")]) as cache:
        cache.put(TEXTS, [provider.vector_of(text) for text in TEXTS])
        found = cache.fetch(TEXTS[:3])
        assert found.sources == ["provider", "far", "far"]  # the value of the failed key is ignored
        assert cache.stats().tiers["far"].hits == 2


def test_a_partial_answer_must_name_the_keys_that_failed() -> None:
    with pytest.raises(ValueError, match="at least one key"):
        PartialAnswer("half", failed=[])
