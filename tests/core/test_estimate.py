"""An estimate says what a call would find and pay, and changes nothing."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from decimal import Decimal
from typing import Any

import pytest

import embedonce
from embedonce import Cache, CacheClosed, DriftGuard, Embedded, KeyPolicy, Limits, ProviderError, Tier
from embedonce._engine.estimating import KnownTexts
from embedonce.answers import Estimate
from embedonce.errors import PartialAnswer, SpaceError, TierBusy
from embedonce.functions import NoProvider, wrap
from embedonce.testing.clocks import ManualClock
from embedonce.testing.fakes import CountingProvider, DictBackend
from embedonce.testing.faults import Fault, FaultyBackend
from embedonce.vectors import Cost
from embedonce_backends.memory import MemoryBackend

Ask = Callable[..., Estimate]
SPACE = {"model": "m", "dimensions": 2}


def ask_async(cache: Cache, texts: Any, task: str = "document") -> Estimate:
    return asyncio.run(cache.aestimate(texts, task))


faces = pytest.mark.parametrize("ask", [Cache.estimate, ask_async], ids=["sync", "async"])


def embed(texts: Sequence[str]) -> Embedded:
    return Embedded([[float(len(text)), 1.0] for text in texts], sum(map(len, texts)))


def open_cache(*tiers: Any, limits: Limits | None = None, **options: Any) -> Cache:
    return Cache(wrap(embed, SPACE, limits), tiers, **options)


class LastingBackend(DictBackend):
    """Stays open, so that several caches can use it one after the other."""

    def close(self) -> None:
        """Do nothing."""


# --- what is found ----------------------------------------------------------------------------


@faces
def test_hits_are_counted_by_the_first_tier_that_has_them(ask: Ask) -> None:
    near, far = MemoryBackend(), DictBackend(scope="host")
    with open_cache(near, Tier(far, name="far", write="inline")) as cache:
        cache.embed_batch(["both", "far 1", "far 2"])
        near.delete_many(cache._get_route(cache._source, "document").keys(["far 1", "far 2"]))
        found = ask(cache, ["both", "far 1", "new", "far 2", "new", "both", "néw"])
    assert (found.texts, found.distinct, found.invalid, found.missing) == (7, 5, 0, 2)
    assert found.hits == {"memory": 1, "far": 2}
    assert found.bytes == len("new") + len("néw".encode())
    assert found.errors == {}


@faces
def test_texts_without_a_key_are_invalid_and_counted_once(ask: Ask) -> None:
    with open_cache(MemoryBackend()) as cache:
        found = ask(cache, ["a", "\ud800", "\ud800", "\udfff"])
    assert (found.texts, found.distinct, found.invalid, found.missing) == (4, 3, 2, 1)


@faces
def test_texts_are_equal_after_normalisation(ask: Ask) -> None:
    with open_cache(MemoryBackend(), key=KeyPolicy(normalize=["strip"])) as cache:
        found = ask(cache, [" tea", "tea", "tea  ", "x"])
    assert (found.distinct, found.missing, found.bytes) == (2, 2, 4)


@faces
@pytest.mark.parametrize("texts", [[], (), iter(())])
def test_no_texts(ask: Ask, texts: Any) -> None:
    with open_cache(MemoryBackend(), price="1 USD / 1 token") as cache:
        found = ask(cache, texts)
    assert (found.texts, found.distinct, found.missing, found.bytes, found.tokens) == (0, 0, 0, 0, 0)
    assert (found.min_tokens, found.max_tokens, found.seconds, found.money) == (0, 0, 0.0, 0)


@faces
def test_a_cache_without_tiers(ask: Ask) -> None:
    with open_cache() as cache:
        found = ask(cache, ["a", "b", "a"])
    assert (found.hits, found.missing) == ({}, 2)


@faces
def test_entries_that_a_call_would_not_use_are_missing(ask: Ask) -> None:
    clock = ManualClock(1000.0)
    store = LastingBackend(ttl=False)
    provider = CountingProvider(tells_dimensions=False)
    with Cache(provider, [Tier(store, ttl=60, write="inline")], dtype="int8", clock=clock) as cache:
        cache.embed_batch(["coarse"])
    with Cache(provider, [Tier(store, ttl=60, write="inline")], clock=clock) as cache:
        cache.embed_batch(["late", "broken", "good 1", "good 2"])
        key = cache._get_route(cache._source, "document").keys
        store.set_many({key(["broken"])[0]: b"no frame"}, None)
        clock.advance(50)
        cache.embed_batch(["fresh"])
        found = ask(cache, ["coarse", "late", "broken", "good 1", "fresh", "other"])
        assert (found.hits, found.missing) == ({"lasting": 3}, 3)
        clock.advance(20)
        found = ask(cache, ["coarse", "late", "broken", "good 1", "fresh", "other"])
        assert (found.hits, found.missing) == ({"lasting": 1}, 5)


@faces
def test_entries_of_other_dimensions_are_missing_if_the_provider_does_not_tell(ask: Ask) -> None:
    store = LastingBackend()
    for dimensions, texts in ((8, ["a", "b", "c"]), (3, ["d"])):
        provider = CountingProvider(dimensions=dimensions, tells_dimensions=False)
        with Cache(provider, [Tier(store, write="inline")]) as cache:
            cache.embed_batch(texts)
    with Cache(CountingProvider(tells_dimensions=False), [store]) as cache:
        assert ask(cache, ["a", "b", "c", "d"]).hits == {"lasting": 3}


@faces
def test_entries_that_wait_for_a_background_write_are_hits(ask: Ask) -> None:
    written = threading.Event()

    class Slow(DictBackend):
        def set_many(self, items: Any, ttl: Any) -> None:
            written.wait(30)
            super().set_many(items, ttl)

    with open_cache(Tier(Slow(), name="slow", write="background")) as cache:
        cache.embed("a")
        try:
            found = ask(cache, ["a", "b"])
        finally:
            written.set()
    assert (found.hits, found.missing) == ({"slow": 1}, 1)


@faces
def test_replay_mode_and_other_tasks(ask: Ask) -> None:
    store = LastingBackend()
    provider = CountingProvider(symmetric=False)
    with Cache(provider, [Tier(store, write="inline")]) as cache:
        cache.embed("a", "query")
    with Cache(provider, [store], mode="replay") as cache:
        assert ask(cache, ["a", "b"], "query").hits == {"lasting": 1}
        assert ask(cache, ["a", "b"]).hits == {"lasting": 0}


@faces
def test_a_space_that_has_drifted_is_not_looked_up(ask: Ask) -> None:
    shift = [0.0]

    def drifting(texts: Sequence[str]) -> list[list[float]]:
        return [[1.0, float(len(text)) * (1 - shift[0])] for text in texts]

    clock = ManualClock(1000.0)
    guard = DriftGuard(action="new-space", every=10)
    with Cache(drifting, [MemoryBackend()], space=SPACE, drift=guard, clock=clock) as cache:
        cache.embed("old")
        assert ask(cache, ["old"]).missing == 0
        shift[0] = 2.0
        clock.advance(100)
        cache.embed("new")
        assert ask(cache, ["old", "new"]).hits == {"memory": 1}


# --- streams ----------------------------------------------------------------------------------


@faces
def test_a_stream_of_several_windows_is_read_once(ask: Ask) -> None:
    with open_cache(MemoryBackend()) as cache:
        cache.embed_batch([f"text {number}" for number in range(100)])
        found = ask(cache, (f"text {number % 3000}" for number in range(9000)))
    assert (found.texts, found.distinct, found.missing) == (9000, 3000, 2900)
    assert found.hits == {"memory": 100}


def test_an_async_stream() -> None:
    async def stream() -> AsyncIterator[str]:
        for number in range(2500):
            await asyncio.sleep(0)
            yield f"text {number % 2000}"

    with open_cache(MemoryBackend()) as cache:
        found = ask_async(cache, stream())
        with pytest.raises(TypeError):
            cache.estimate(stream())  # type: ignore[arg-type]
    assert (found.texts, found.distinct) == (2500, 2000)


@faces
@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ("tea", "expected a list of texts, got one str; use embed"),
        (b"tea", "expected a list of texts, got one bytes"),
        (7, "expected a list of texts, got int"),
        (["a"] * 2000 + [None], "item 2000 must be a str, got NoneType"),
        (["a", 1], "item 1 must be a str, got int"),
    ],
)
def test_what_is_not_a_text_is_refused_by_its_position(ask: Ask, texts: Any, message: str) -> None:
    with open_cache(MemoryBackend()) as cache, pytest.raises(TypeError, match=message):
        ask(cache, texts)


@faces
def test_a_closed_cache_and_a_cache_that_is_closed_meanwhile(ask: Ask) -> None:
    cache = open_cache(MemoryBackend())

    def texts() -> Iterator[str]:
        yield from (f"text {number}" for number in range(1024))
        cache.close()
        yield "one more"

    for given in (texts(), ["a"]):
        with pytest.raises(CacheClosed):
            ask(cache, given)


@faces
def test_a_cache_without_a_provider_raises_the_error_of_embed(ask: Ask) -> None:
    with Cache(NoProvider(), [MemoryBackend()]) as cache:
        with pytest.raises(ProviderError) as expected:
            cache.embed("a")
        with pytest.raises(ProviderError) as raised:
            ask(cache, ["a"])
    assert str(raised.value) == str(expected.value)


@faces
def test_an_unknown_task_is_refused(ask: Ask) -> None:
    with Cache(CountingProvider(), [MemoryBackend()]) as cache, pytest.raises((SpaceError, TypeError, ValueError)):
        ask(cache, ["a"], 7)


def test_known_texts_in_many_windows() -> None:
    known, expected = KnownTexts(), set()
    for start in range(0, 3000, 7):
        hashes = [(number * 2654435761) % 1009 for number in range(start, start + 7)]
        distinct = list(dict.fromkeys(hashes))
        assert known.add(distinct) == [number not in expected for number in distinct]
        expected.update(distinct)
    assert len(known._runs) <= 10


# --- nothing changes --------------------------------------------------------------------------


@faces
def test_nothing_is_computed_stored_promoted_leased_or_counted(ask: Ask) -> None:
    near, far = MemoryBackend(), DictBackend(scope="network")
    provider = CountingProvider()
    events: list[Any] = []
    with Cache(provider, [near, Tier(far, name="far", write="inline")], listeners=[events.append]) as cache:
        cache.embed_batch(["a", "b"])
        near.delete_many(list(near.scan("")))
        before = (cache.stats(), sorted(near.scan("")), sorted(far.scan("")), len(events), provider.calls[:])
        found = ask(cache, ["a", "b", "c", "\ud800"])
        assert found.hits == {"memory": 0, "far": 2}
        after = (cache.stats(), sorted(near.scan("")), sorted(far.scan("")), len(events), provider.calls[:])
    assert after == before


@faces
def test_the_texts_of_recent_calls_stay_in_the_memo(ask: Ask) -> None:
    with open_cache(MemoryBackend()) as cache:
        cache.embed("recent")
        ask(cache, (f"text {number}" for number in range(10_000)))
        assert list(cache._get_route(cache._source, "document").recent_keys) == ["recent"]


# --- tiers that fail --------------------------------------------------------------------------


class Broken(DictBackend):
    """Fails after some reads."""

    def __init__(self, good: int, error: Callable[[Sequence[str]], Exception]) -> None:
        super().__init__(scope="host")
        self.good = good
        self.error = error
        self.reads = 0
        self.is_broken = False

    def get_many(self, keys: Sequence[str]) -> Any:
        if not self.is_broken:
            return super().get_many(keys)
        self.reads += 1
        if self.reads > self.good:
            raise self.error(keys)
        return super().get_many(keys)


@faces
@pytest.mark.parametrize("on_error", ["skip", "raise"])
@pytest.mark.parametrize(
    ("error", "cause"),
    [(lambda keys: ConnectionError("no"), "ConnectionError"), (lambda keys: TimeoutError("no"), "timeout")],
)
def test_a_tier_that_fails_is_named_and_not_asked_again(ask: Ask, on_error: Any, error: Any, cause: str) -> None:
    near, far = Broken(1, error), DictBackend(scope="network")
    texts = [f"text {number}" for number in range(3000)]
    tiers = [Tier(near, name="near", write="inline", on_error=on_error), Tier(far, name="far", write="inline")]
    with open_cache(*tiers) as cache:
        for start in range(0, 3000, 1000):
            cache.embed_batch(texts[start : start + 1000])
        near.is_broken = True
        breaker = cache._chain.tiers[0].reader.breaker
        found = ask(cache, texts)
        assert (found.hits, found.missing) == ({"near": 1024, "far": 1976}, 0)
        assert found.errors == {"near": cause}
        assert near.reads == 2
        assert not breaker.is_open


@faces
def test_a_tier_whose_breaker_is_open_is_skipped(ask: Ask) -> None:
    store = Broken(0, lambda keys: TimeoutError())
    with open_cache(Tier(store, name="store", write="inline")) as cache:
        cache.embed("a")
        store.is_broken = True
        cache.lookup(["a"])
        assert store.reads == 1
        found = ask(cache, ["a", "b"])
        assert (found.missing, found.errors, found.hits) == (2, {"store": "skipped"}, {"store": 0})
        assert store.reads == 1


@faces
@pytest.mark.parametrize(("cause", "reads"), [(TierBusy("skipped"), 3), (ConnectionError("no"), 1)])
def test_the_nodes_that_answer_are_used(ask: Ask, cause: Exception, reads: int) -> None:
    def fail_for_a_part(keys: Sequence[str]) -> Exception:
        error = PartialAnswer("a node", answer=DictBackend.get_many(store, keys[1:]), failed=keys[:1])
        error.__cause__ = cause
        return error

    store = Broken(0, fail_for_a_part)
    texts = [f"text {number}" for number in range(3 * 1024)]
    with open_cache(Tier(store, name="store", write="inline")) as cache:
        cache.embed_batch(texts)
        store.is_broken = True
        found = ask(cache, texts)
    assert found.hits == {"store": 1023 * reads}
    assert found.errors == {"store": type(cause).__name__}
    assert store.reads == reads


@faces
@pytest.mark.parametrize("answer", [None, 7, ["x"], {"strange key": b"x"}])
def test_a_backend_that_answers_nonsense(ask: Ask, answer: Any) -> None:
    class Odd(DictBackend):
        def get_many(self, keys: Sequence[str]) -> Any:
            return answer

    with open_cache(Tier(Odd(), name="odd", write="none")) as cache:
        found = ask(cache, ["a"])
    assert found.missing == 1
    assert found.errors.keys() == (set() if isinstance(answer, dict) else {"odd"})


@faces
def test_a_tier_that_hangs_costs_its_timeout_once(ask: Ask) -> None:
    store = FaultyBackend(DictBackend(scope="network"), [Fault("hang", on="get")])
    with open_cache(Tier(store, name="store", timeout=0.05, write="none")) as cache:
        found = ask(cache, (f"text {number}" for number in range(5000)))
        store.release()
    assert (found.missing, found.errors) == (5000, {"store": "timeout"})


# --- tokens -----------------------------------------------------------------------------------


class Counted(CountingProvider):
    """Counts words, as its answers do."""

    def __init__(self, answer: Any = None) -> None:
        super().__init__()
        self.answer = answer
        self.threads: set[int] = set()

    def count_exact_tokens(self, texts: Sequence[str], task: str) -> Any:
        self.threads.add(threading.get_ident())
        return [len(text.split()) for text in texts] if self.answer is None else self.answer(texts)


@faces
def test_a_providers_tokenizer_counts_the_missing_texts(ask: Ask) -> None:
    provider = Counted()
    with Cache(provider, [MemoryBackend()], price="2 USD / 1K tokens") as cache:
        cache.embed("one two three")
        found = ask(cache, ["one two three", "a b", "c", "a b"])
        assert (found.tokens, found.min_tokens, found.max_tokens, found.method) == (3, 3, 3, "counted")
        assert found.money == found.max_money == Decimal("0.006")
        assert (threading.get_ident() in provider.threads) == (ask is Cache.estimate)


@faces
@pytest.mark.parametrize("answer", [lambda texts: None, lambda texts: [1], lambda texts: 1 / 0])
def test_a_tokenizer_that_fails_is_replaced_by_an_estimate(ask: Ask, answer: Any) -> None:
    with Cache(Counted(answer), [MemoryBackend()]) as cache:
        found = ask(cache, ["a" * 160, "b"])
    assert (found.method, found.tokens, found.min_tokens, found.max_tokens) == ("guessed", 41, 10, 169)


@faces
def test_a_tokenizer_that_fails_later_counts_nothing(ask: Ask) -> None:
    calls: list[int] = []

    def fail_at_the_second(texts: Sequence[str]) -> Any:
        calls.append(len(texts))
        return [1] * len(texts) if len(calls) == 1 else None

    with Cache(Counted(fail_at_the_second), [MemoryBackend()]) as cache:
        found = ask(cache, (f"{number:04}" for number in range(4000)))
    assert (found.method, found.tokens, len(calls)) == ("guessed", 4000, 2)


@faces
def test_tokens_are_guessed_from_the_length_if_nothing_is_known(ask: Ask) -> None:
    with open_cache(MemoryBackend()) as cache:
        found = ask(cache, ["ä" * 50, "b" * 61])
    assert (found.bytes, found.method, found.sample) == (161, "guessed", 0)
    assert (found.tokens, found.min_tokens, found.max_tokens) == (41, 10, 169)
    assert (found.price, found.money, found.max_money) == (None, None, None)


@faces
@pytest.mark.parametrize("texts", [[""], ["a"], [f"{number}" for number in range(100)]], ids=["empty", "one", "many"])
def test_a_guess_includes_the_special_tokens_of_short_texts(ask: Ask, texts: list[str]) -> None:
    with open_cache(MemoryBackend()) as cache:
        found = ask(cache, texts)
    paid = sum(len(text) + 2 for text in texts)  # one token per letter, one for the start and one for the end
    assert found.method == "guessed"
    assert found.min_tokens <= paid <= found.max_tokens


@faces
def test_few_calls_give_a_ratio_but_no_limits(ask: Ask) -> None:
    clock = ManualClock(1000.0)
    with open_cache(MemoryBackend(), clock=clock) as cache:
        for number in range(3):
            clock.advance(1)
            cache.embed_batch([f"{number} {text}" for text in ("a", "bb", "ccc")])
        found = ask(cache, ["0 a", "1 bb", "2 ccc", "missing" * 10])
    assert (found.method, found.sample) == ("guessed", 3)
    assert (found.tokens, found.min_tokens, found.max_tokens) == (70, 4, 74)


@faces
def test_limits_are_measured_on_several_calls(ask: Ask) -> None:
    clock = ManualClock(1000.0)

    def embed_with_noise(texts: Sequence[str]) -> Embedded:
        return Embedded(embed(texts).vectors, sum(map(len, texts)) // 4 + int(clock() % 3))

    with Cache(embed_with_noise, [MemoryBackend()], space=SPACE, clock=clock) as cache:
        for number in range(20):
            clock.advance(1)
            cache.embed_batch([f"text {number} {i}" * 9 for i in range(5)])
        found = ask(cache, (f"text {number} {i}" * 9 for number in range(20) for i in range(10)))
    assert (found.method, found.sample, found.missing) == ("measured", 100, 100)
    assert found.min_tokens < found.tokens < found.max_tokens
    assert found.min_tokens <= found.bytes / 4 + 20 <= found.max_tokens
    assert found.max_tokens - found.min_tokens < found.tokens / 10


@faces
def test_entries_without_tokens_are_no_sample(ask: Ask) -> None:
    with open_cache(MemoryBackend()) as cache:
        cache.put(["a", "bb", "ccc"], [[1.0, 2.0]] * 3, costs=[Cost(9, None), None, Cost(None, 3.0)])
        found = ask(cache, ["a", "bb", "ccc", "dddddd"])
    assert (found.sample, found.tokens) == (1, 54)
    assert found.seconds == pytest.approx(6.0)


@faces
def test_a_provider_that_charges_nothing_counts_zero(ask: Ask) -> None:
    with embedonce.open({"provider": {"type": "ngram"}, "tiers": [{"type": "memory"}]}) as cache:
        found = ask(cache, ["some text", "another"])
    assert (found.method, found.tokens, found.max_tokens) == ("counted", 0, 0)


# --- seconds ----------------------------------------------------------------------------------


def put_with_seconds(cache: Cache, seconds: float) -> None:
    cache.put(["1234567890"], [[1.0, 2.0]], costs=[Cost(None, seconds)])


@faces
@pytest.mark.parametrize(
    ("limits", "pace", "count", "expected"),
    [
        (Limits(), 1.0, 7, 7.0),
        (Limits(), None, 7, None),
        (Limits(concurrency=4), 1.0, 7, 7.0),
        (Limits(concurrency=4, max_batch=4), 1.0, 8, 4.0),
        (Limits(concurrency=4, max_batch=1), 1.0, 8, 2.0),
        (Limits(max_batch=1, requests_per_minute=3), None, 7, 120.0),
        (Limits(max_batch=1, requests_per_minute=0.5), None, 7, 720.0),
        (Limits(max_batch=1, requests_per_minute=3), 1.0, 7, 120.0),
        (Limits(max_batch=1, requests_per_minute=3), 100.0, 7, 700.0),
        (Limits(requests_per_minute=3), None, 7, None),
        (Limits(tokens_per_minute=20), None, 7, 180.0),
        (Limits(concurrency=9, max_tokens=20), 1.0, 8, 8.0),
        (Limits(concurrency=9, tokens_per_minute=20), 900.0, 8, 1800.0),
    ],
)
def test_how_long_it_takes(ask: Ask, limits: Limits, pace: float | None, count: int, expected: float | None) -> None:
    with open_cache(MemoryBackend(), limits=limits) as cache:
        known = ["1234567890"]
        if pace is not None:
            put_with_seconds(cache, pace)
        else:
            known = []
        found = ask(cache, [*known, *(f"{number:010}" for number in range(count))])
    if limits.max_tokens is not None:  # each call has two texts of ten bytes
        expected = pytest.approx(2.0)
    assert found.seconds == (None if expected is None else pytest.approx(expected))


def test_the_blocking_method_needs_no_event_loop_and_the_async_one_has_any() -> None:
    async def both(cache: Cache) -> Iterable[Estimate]:
        return await asyncio.gather(cache.aestimate(["a"]), cache.aestimate(["a", "b"]))

    with open_cache(MemoryBackend()) as cache:
        cache.embed("a")
        assert [found.missing for found in asyncio.run(both(cache))] == [0, 1]
