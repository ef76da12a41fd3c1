"""A function of the caller decides which texts are computed, is asked about no others, and learns what they cost."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from patience import LONG_TIMEOUT, count_followers, wait_until, wait_until_async
from tests.core.test_isolation import StatusError

from embedonce import Cache, Fetched, KeyPolicy, Tier, TierError
from embedonce.contracts import Embedded, Limits
from embedonce.drift import DriftGuard
from embedonce.errors import ReplayMiss, TextRefused
from embedonce.keys import LEASE_PREFIX, VectorSpace
from embedonce.testing.fakes import CountingProvider, DictBackend
from embedonce.testing.faults import Fault, FaultyBackend, FaultyProvider, ProviderFault
from embedonce.vectors import NO_WORK, Work

FACES = pytest.mark.parametrize("face", ["blocking", "async"])


class OverBudget(Exception):
    pass


class Guard:
    """Notes what it is asked and told. Refuses the texts of ``refused``, and everything after ``most`` questions."""

    def __init__(self, *refused: str, most: int = 1000) -> None:
        self.refused = set(refused)
        self.most = most
        self.asked: list[list[str]] = []
        self.spaces: list[VectorSpace] = []
        self.settled: list[tuple[Work, Work]] = []
        self._lock = threading.Lock()
        self.error: Exception | None = None
        """Error of the function that takes the costs."""

    def __call__(self, texts: Sequence[str], space: VectorSpace) -> Callable[[Work, Work], None]:
        with self._lock:
            self.asked.append(list(texts))
            self.spaces.append(space)
            number = len(self.asked)
        if number > self.most or not self.refused.isdisjoint(texts):
            raise OverBudget
        return self.settle

    def settle(self, computed: Work, wasted: Work) -> None:
        self.settled.append((computed, wasted))
        if self.error is not None:
            raise self.error

    @property
    def texts(self) -> list[str]:
        return [text for texts in self.asked for text in texts]

    @property
    def costs(self) -> tuple[Work, Work]:
        return sum((c for c, _ in self.settled), NO_WORK), sum((w for _, w in self.settled), NO_WORK)


class AsyncGuard(Guard):
    """The same as an async function that waits, so that other tasks run in between."""

    def __call__(self, texts: Sequence[str], space: VectorSpace) -> Any:
        async def admit() -> Any:
            await asyncio.sleep(0)
            settle = Guard.__call__(self, texts, space)

            async def settle_later(computed: Work, wasted: Work) -> None:
                await asyncio.sleep(0)
                settle(computed, wasted)

            return settle_later

        return admit()


def fetch(cache: Cache, texts: Sequence[str], face: str, **options: Any) -> Fetched:
    if face == "blocking":
        return cache.fetch(texts, **options)
    return asyncio.run(cache.afetch(texts, **options))


@pytest.fixture(params=[Guard, AsyncGuard])
def make_guard(request: pytest.FixtureRequest) -> Any:
    return request.param


# --- what is asked --------------------------------------------------------------------------------


@FACES
def test_only_the_texts_that_no_tier_has_are_asked_for_and_each_tier_is_read_once(face: str, make_guard: Any) -> None:
    provider, slow, guard = CountingProvider(max_batch=2), FaultyBackend(DictBackend()), make_guard()
    tiers = [Tier(DictBackend(), name="memory"), Tier(slow, name="slow", lease="off")]
    with Cache(provider, tiers, key=KeyPolicy(normalize=["strip"])) as cache:
        cache.embed_batch(["known"])
        before, reads = cache.stats(), slow.called("get")
        fetched = fetch(cache, [" a", "known", "b ", "a", "c"], face, admit=guard)
        after = cache.stats()
        assert fetched.sources == ["provider", "memory", "provider", "provider", "provider"]
        assert sorted(guard.asked) == [["a", "b"], ["c"]]
        assert set(guard.spaces) == {fetched.space}
        assert slow.called("get") - reads == 1
        assert (after.requested - before.requested, after.found - before.found) == (4, 1)
        assert [after.tiers[name].misses - before.tiers[name].misses for name in ("memory", "slow")] == [3, 3]
        assert guard.costs[0][:2] == fetched.computed[:2] == (3, fetched.computed.tokens)
        assert fetch(cache, ["a", "known", "c"], face, admit=guard).computed == NO_WORK
    assert len(guard.asked) == 2


@FACES
def test_refused_texts_fail_with_the_error_and_hits_do_not(face: str, make_guard: Any) -> None:
    provider, guard = CountingProvider(), make_guard("b")
    with Cache(provider, [Tier(DictBackend(), name="memory")]) as cache:
        cache.embed("known")
        fetched = fetch(cache, ["a", "known", "b"], face, admit=guard)
        assert fetched.sources == [None, "memory", None]
        assert {i: type(error) for i, error in fetched.failed.items()} == {0: OverBudget, 2: OverBudget}
        assert (fetched.computed, fetched.wasted) == (NO_WORK, NO_WORK)
        stats = cache.stats()
        assert (stats.requested, stats.found) == (4, 1)
        assert next(iter(stats.providers.values())).failed == 0
        assert not cache._chain.in_flight._flights
        assert fetch(cache, ["a", "b"], face).failed == {}
    assert guard.settled == []
    assert [texts for _, texts in provider.calls] == [("known",), ("a", "b")]


@FACES
def test_after_a_refusal_the_call_asks_no_more(face: str, make_guard: Any) -> None:
    provider, guard = CountingProvider(max_batch=1), make_guard(most=2)
    with Cache(provider, [DictBackend()]) as cache:
        fetched = fetch(cache, list("abcdef"), face, admit=guard)
        assert fetched.sources == ["provider"] * 2 + [None] * 4
        assert guard.asked == [["a"], ["b"], ["c"]]
        assert [row is None for row in cache.lookup(list("abcdef")).rows] == [False] * 2 + [True] * 4


@FACES
def test_fresh_asks_for_every_text(face: str, make_guard: Any) -> None:
    with Cache(CountingProvider(), [DictBackend()]) as cache:
        cache.embed("known")
        guard = make_guard()
        fetched = fetch(cache, ["known", "new"], face, fresh=True, admit=guard)
        assert guard.asked == [["known", "new"]]
        assert guard.costs[0][:2] == fetched.computed[:2]
        fetched = fetch(cache, ["known", "other"], face, fresh=True, admit=make_guard("known"))
        assert list(map(type, fetched.failed.values())) == [OverBudget] * 2
        assert [row is None for row in cache.lookup(["known", "new", "other"]).rows] == [False, False, True]


def test_replay_asks_for_nothing() -> None:
    guard = Guard()
    with Cache(CountingProvider(), [DictBackend()], mode="replay") as cache:
        for fresh in (False, True):
            assert isinstance(cache.fetch(["a"], fresh=fresh, admit=guard).failed[0], ReplayMiss)
    assert guard.asked == []


def test_something_that_is_not_a_function_is_refused() -> None:
    with Cache(CountingProvider()) as cache, pytest.raises(TypeError, match="admit must be a function, got int"):
        cache.fetch(["a"], admit=5)  # type: ignore[arg-type]


@FACES
def test_a_result_that_is_not_a_function_is_refused_before_anything_is_computed(face: str) -> None:
    provider = CountingProvider()
    with Cache(provider, [DictBackend()]) as cache:
        with pytest.raises(TypeError, match="admit must return a function or None, got int"):
            fetch(cache, ["a", "b"], face, admit=lambda texts, space: 5)
        assert provider.texts == 0
        assert fetch(cache, ["a"], face, admit=lambda texts, space: None).sources == ["provider"]


# --- other calls ----------------------------------------------------------------------------------


@FACES
@pytest.mark.parametrize("others", [[False, None], [None, None], [True, True]], ids=["asks", "is not asked", "refuses"])
@pytest.mark.parametrize("fresh", [False, True], ids=["", "fresh"])
def test_a_refusal_fails_no_other_call_that_waits_for_the_text(
    face: str, others: list[bool | None], fresh: bool
) -> None:
    provider, reached, go = CountingProvider(), threading.Event(), threading.Event()
    guards = [None if refuses is None else Guard(*(["a"] if refuses else [])) for refuses in others]

    def refuse_late(texts: Sequence[str], space: VectorSpace) -> None:
        reached.set()
        assert go.wait(LONG_TIMEOUT)
        raise OverBudget

    async def refuse_late_async(texts: Sequence[str], space: VectorSpace) -> None:
        await asyncio.to_thread(refuse_late, texts, space)

    with Cache(provider, [DictBackend()]) as cache, ThreadPoolExecutor(3) as pool:
        refuse = refuse_late if face == "blocking" else refuse_late_async
        first = pool.submit(fetch, cache, ["a"], face, fresh=fresh, admit=refuse)
        assert reached.wait(LONG_TIMEOUT)
        followers = [pool.submit(fetch, cache, ["a"], face, fresh=fresh, admit=guard) for guard in guards]
        wait_until(lambda: count_followers(cache) == 2)
        go.set()
        assert isinstance(first.result(LONG_TIMEOUT).failed[0], OverBudget)
        for refuses, follower in zip(others, followers, strict=True):
            assert list(follower.result(LONG_TIMEOUT).failed) == ([0] if refuses else [])
        assert not cache._chain.in_flight._flights
    computing = others.count(None) + others.count(False)
    # No tier has a fresh vector, so a follower that wakes late computes another one.
    assert provider.count["a"] in (range(min(1, computing), computing + 1) if fresh else [min(1, computing)])


@FACES
def test_after_several_refusals_one_of_the_other_calls_computes_the_text(face: str) -> None:
    provider, followers = CountingProvider(), iter([7, 6, 5])

    def admit(texts: Sequence[str], space: VectorSpace) -> None:
        """Refuse the first three calls, each when all other calls wait for it."""
        expected = next(followers, None)
        if expected is not None:
            wait_until(lambda: count_followers(cache) == expected)
            raise OverBudget

    async def admit_async(texts: Sequence[str], space: VectorSpace) -> None:
        await asyncio.to_thread(admit, texts, space)

    with Cache(provider, [Tier(DictBackend(), name="memory")]) as cache, ThreadPoolExecutor(8) as pool:
        chosen = admit if face == "blocking" else admit_async
        calls = [pool.submit(fetch, cache, ["a"], face, admit=chosen) for _ in range(8)]
        answers = [call.result(LONG_TIMEOUT) for call in calls]
        assert sum(bool(answer.failed) for answer in answers) == 3
        assert provider.count["a"] == 1
        assert sum(answer.computed.texts for answer in answers) == 1
        assert cache.stats().tiers["memory"].misses == 8


@FACES
def test_a_refused_call_does_not_wait_for_other_calls(face: str) -> None:
    provider = FaultyProvider(CountingProvider(), [ProviderFault("hang", calls={1})])
    with Cache(provider, [DictBackend()], max_wait=1e6) as cache, ThreadPoolExecutor(1) as pool:
        leader = pool.submit(cache.embed, "a")
        provider.gate.until(1)
        fetched = fetch(cache, ["a", "b"], face, admit=Guard("b"))
        assert list(map(type, fetched.failed.values())) == [OverBudget] * 2
        assert not leader.done()
        provider.release()
        leader.result(LONG_TIMEOUT)


@FACES
def test_a_refused_call_does_not_wait_for_other_processes(face: str) -> None:
    store, provider = DictBackend(), FaultyProvider(CountingProvider(), [ProviderFault("hang", calls={1})])
    tier = Tier(DictBackend(store=store, scope="host"), name="shared", lease=LONG_TIMEOUT)
    with (
        Cache(provider, [tier]) as one,
        Cache(CountingProvider(), [tier], max_wait=1e6) as other,
        ThreadPoolExecutor(1) as pool,
    ):
        leader = pool.submit(one.embed, "a")
        provider.gate.until(1)
        fetched = fetch(other, ["a", "b"], face, admit=Guard("b"))
        assert list(map(type, fetched.failed.values())) == [OverBudget] * 2
        assert not other._chain.in_flight._flights
        assert not leader.done()
        provider.release()
        leader.result(LONG_TIMEOUT)


@FACES
def test_texts_that_another_call_is_computing_are_not_asked_for(face: str) -> None:
    provider, guard = FaultyProvider(CountingProvider(), [ProviderFault("hang", calls={1})]), Guard()
    with Cache(provider, [DictBackend()]) as cache, ThreadPoolExecutor(2) as pool:
        first = pool.submit(cache.embed_batch, ["a", "b"])
        provider.gate.until(1)
        second = pool.submit(fetch, cache, ["b", "c", "a"], face, admit=guard)
        wait_until(lambda: guard.settled)
        provider.release()
        first.result(LONG_TIMEOUT)
        assert not second.result(LONG_TIMEOUT).failed
    assert guard.asked == [["c"]]


@FACES
@pytest.mark.parametrize("fails", [False, True])
def test_texts_that_another_process_computes_are_asked_for_only_if_it_fails(face: str, fails: bool) -> None:
    store, guard = DictBackend(), Guard()
    reached, go = threading.Event(), threading.Event()

    class Leader(CountingProvider):
        def vector_of(self, text: str, task: str = "document") -> Any:
            reached.set()
            assert go.wait(LONG_TIMEOUT)
            if fails:
                raise RuntimeError
            return super().vector_of(text, task)

    def open_cache(provider: Any) -> Cache:
        return Cache(provider, [Tier(DictBackend(store=store, scope="host"), name="shared", lease=LONG_TIMEOUT)])

    with open_cache(Leader()) as one, open_cache(CountingProvider()) as other, ThreadPoolExecutor(2) as pool:
        first = pool.submit(one.fetch, ["a"])
        assert reached.wait(LONG_TIMEOUT)
        second = pool.submit(fetch, other, ["a", "b"], face, admit=guard)
        wait_until(lambda: guard.settled)
        go.set()
        assert list(first.result(LONG_TIMEOUT).failed) == ([0] if fails else [])
        assert second.result(LONG_TIMEOUT).sources == ["provider" if fails else "shared", "provider"]
    assert guard.asked == ([["b"], ["a"]] if fails else [["b"]])


@FACES
def test_a_refused_text_has_no_lease(face: str) -> None:
    store = DictBackend(scope="host")
    tier = Tier(store, name="shared", lease=LONG_TIMEOUT)
    with Cache(CountingProvider(), [tier]) as cache:
        assert fetch(cache, ["a"], face, admit=Guard("a")).failed
        wait_until(lambda: not any(key.startswith(LEASE_PREFIX) for key in store._store))


async def test_each_of_the_calls_that_share_a_request_pays_its_own_share() -> None:
    guards = [Guard(), Guard()]
    provider = CountingProvider(max_batch=4)
    async with Cache(provider, [DictBackend()], coalesce=1.0) as cache:
        answers = await asyncio.gather(
            *(cache.afetch([f"{i} a", f"{i} b"], admit=guard) for i, guard in enumerate(guards))
        )
    assert len(provider.calls) == 1
    for guard, answer in zip(guards, answers, strict=True):
        assert guard.costs[0][:2] == answer.computed[:2]
        assert answer.computed.texts == 2


async def test_a_computation_that_outlives_its_call_is_settled() -> None:
    provider, guard = FaultyProvider(CountingProvider(), [ProviderFault("hang", calls={1})]), AsyncGuard()
    async with Cache(provider, [Tier(DictBackend(), name="memory")]) as cache:
        call = asyncio.create_task(cache.afetch(["a"], admit=guard))
        await wait_until_async(lambda: len(provider.calls) == 1)
        call.cancel()
        with suppress(asyncio.CancelledError):
            await call
        assert guard.settled == []
        provider.release()
        await wait_until_async(lambda: guard.settled)
        assert cache.lookup(["a"]).sources == ["memory"]
    assert guard.costs[0].texts == 1


# --- what it costs --------------------------------------------------------------------------------


class Charging:
    """Charges 10 tokens for each text, and refuses the texts that begin with "bad"."""

    def __init__(self, *, name: str = "charging", max_batch: int = 4) -> None:
        self.limits = Limits(max_batch=max_batch, concurrency=2)
        self.name = name
        self.requests: list[list[str]] = []
        self.charged: list[int] = []
        """Tokens of each answer."""
        self.served = "m"
        self.error: Exception | None = None
        self.takes = 1000
        """Most texts of a request."""

    def space(self, task: str) -> VectorSpace:
        return VectorSpace(provider=self.name, model="m", dimensions=2)

    def embed(self, texts: Sequence[str], task: str) -> Embedded:
        self.requests.append(list(texts))
        if self.error is not None:
            raise self.error
        if len(texts) > self.takes:
            raise StatusError("too many inputs", 400)
        refused = [i for i, text in enumerate(texts) if text.startswith("bad")]
        if refused:
            raise TextRefused("refused", refused)
        self.charged.append(10 * len(texts))
        rows = [[0.0, 0.0] if text.startswith("zero") else [1.0, float(len(text))] for text in texts]
        return Embedded(np.array(rows, np.float32), tokens=[10] * len(texts), model=self.served)

    def close(self) -> None:
        pass


@settings(max_examples=60, deadline=None)
@given(
    texts=st.lists(st.sampled_from([f"{kind}{i}" for kind in ("text", "bad", "zero") for i in range(4)]), max_size=14),
    known=st.sets(st.sampled_from([f"text{i}" for i in range(4)])),
    most=st.integers(0, 6),
    max_batch=st.integers(1, 5),
    takes=st.integers(1, 5),
    fresh=st.booleans(),
    face=st.sampled_from(["blocking", "async"]),
    kind=st.sampled_from([Guard, AsyncGuard]),
)
def test_what_is_sent_was_admitted_and_what_is_settled_is_what_the_call_reports(
    texts: list[str], known: set[str], most: int, max_batch: int, takes: int, fresh: bool, face: str, kind: type[Guard]
) -> None:
    provider, guard = Charging(max_batch=max_batch), kind(most=most)
    with Cache(provider, [DictBackend()]) as cache:
        cache.embed_batch(sorted(known))
        provider.requests.clear()
        provider.charged.clear()
        provider.takes = takes
        fetched = fetch(cache, texts, face, admit=guard, fresh=fresh)
    wanted = set(texts) if fresh else set(texts) - known
    assert sorted(provider.requests) == sorted(guard.asked[:most])
    assert set(guard.texts) <= wanted
    was_refused = len(guard.asked) > most
    computed, wasted = guard.costs
    assert computed[:2] == fetched.computed[:2]
    assert computed.tokens + wasted.tokens == sum(provider.charged)
    if face == "async":  # several threads may add to the number at the same moment
        assert wasted[:2] == fetched.wasted[:2]
    assert len(guard.settled) == min(len(guard.asked), most)
    for i, text in enumerate(texts):
        error = fetched.failed.get(i)
        if text not in wanted:
            assert fetched.rows[i] is not None
        elif isinstance(error, OverBudget):
            assert was_refused
        elif text.startswith("text"):
            assert error is None or takes < max_batch, "a search gives up after many failures in a row"
        else:
            assert error is not None


@FACES
def test_an_error_of_the_function_that_takes_the_costs_is_raised_after_the_vectors_are_stored(
    face: str, make_guard: Any
) -> None:
    guard = make_guard()
    guard.error = RuntimeError("no ledger")
    with Cache(Charging(max_batch=1), [DictBackend()]) as cache:
        for fresh in (False, True):
            with pytest.raises(RuntimeError, match="no ledger"):
                fetch(cache, [f"a {fresh}", f"b {fresh}"], face, fresh=fresh, admit=guard)
            assert all(cache.lookup([f"a {fresh}", f"b {fresh}"]).sources)
    assert len(guard.settled) == 4


@FACES
def test_each_request_of_a_chunk_that_is_cut_is_asked_for_and_settled_before_the_next_one(
    face: str, make_guard: Any
) -> None:
    provider, guard = Charging(max_batch=8), make_guard()
    provider.takes = 2
    texts = list("abcdefgh")
    with Cache(provider, [DictBackend()]) as cache:
        assert fetch(cache, texts, face, admit=guard).failed == {}
    assert guard.asked == provider.requests
    assert guard.asked[:3] == [texts, texts[:4], texts[:2]]
    assert [computed.tokens for computed, _ in guard.settled[:3]] == [0, 0, 20]
    assert sum(computed.tokens for computed, _ in guard.settled) == 80
    assert max(computed.tokens for computed, _ in guard.settled) == 20


@FACES
def test_texts_of_a_chunk_that_is_cut_are_refused_from_the_first_refusal_on(face: str, make_guard: Any) -> None:
    provider, guard = Charging(max_batch=8), make_guard(most=3)
    provider.takes = 2
    with Cache(provider, [Tier(DictBackend(), name="memory")]) as cache:
        fetched = fetch(cache, list("abcdefgh"), face, admit=guard)
        assert fetched.sources == ["provider"] * 2 + [None] * 6
        assert {type(error) for error in fetched.failed.values()} == {OverBudget}
        assert next(iter(cache.stats().providers.values())).failed == 0
        assert not cache._chain.in_flight._flights
        assert cache.lookup(["a", "b", "c"]).sources == ["memory", "memory", None]
        assert fetch(cache, list("abcdefgh"), face).failed == {}
    assert len(guard.settled) == 3


async def test_a_joined_request_that_fails_is_cut_into_requests_that_each_call_is_asked_for() -> None:
    provider, guards = Charging(max_batch=6), [Guard(), Guard(), Guard()]
    provider.takes = 2
    batches = [["0 a", "0 b"], ["1 a", "1 b", "1 c"], ["2 a"]]
    async with Cache(provider, [DictBackend()], coalesce=1.0) as cache:
        calls = [
            cache.afetch(texts, admit=guard if i < 2 else None)
            for i, (texts, guard) in enumerate(zip(batches, guards, strict=True))
        ]
        answers = await asyncio.gather(*calls)
    assert all(not answer.failed for answer in answers)
    # The calls read the tier in threads, so they join in any order.
    assert sorted(provider.requests[0]) == [text for texts in batches for text in texts]
    for texts, guard in zip(batches[:2], guards, strict=False):
        assert guard.asked[0] == texts
        assert all(request in provider.requests[1:] for request in guard.asked[1:])
        assert len(guard.settled) == len(guard.asked)
        assert max(computed.tokens for computed, _ in guard.settled) <= 20
        assert guard.costs[0].tokens == 10 * len(texts)


async def test_a_call_that_finds_nobody_to_join_is_asked_once() -> None:
    provider, guard = Charging(), Guard()
    async with Cache(provider, [DictBackend()], coalesce=0.001) as cache:
        assert not (await cache.afetch(["a"], admit=guard)).failed
    assert guard.asked == [["a"]]
    assert guard.costs[0].tokens == 10


@FACES
def test_a_tier_that_fails_to_store_does_not_change_the_costs(face: str) -> None:
    guard = Guard()
    backend = FaultyBackend(DictBackend(), [Fault("raise", on="set")])
    with Cache(Charging(), [Tier(backend, name="memory", on_error="raise")]) as cache, pytest.raises(TierError):
        fetch(cache, ["a"], face, admit=guard)
    assert guard.costs[0].tokens == 10


# --- several vector spaces ------------------------------------------------------------------------


@FACES
def test_the_fallback_asks_too_and_is_not_used_after_a_refusal(face: str) -> None:
    provider, fallback = Charging(), Charging(name="fallback")
    with Cache(provider, [DictBackend()], fallback=fallback) as cache:
        guard = Guard("a")
        assert isinstance(fetch(cache, ["a"], face, admit=guard).failed[0], OverBudget)
        assert [space.provider for space in guard.spaces] == ["charging"]
        provider.error = ConnectionRefusedError()
        guard = Guard()
        fetched = fetch(cache, ["a"], face, admit=guard)
        assert [space.provider for space in guard.spaces] == ["charging", "fallback"]
        assert fetched.space.provider == "fallback"
        assert guard.costs[0].tokens == 10
        guard = Guard(most=1)
        assert isinstance(fetch(cache, ["b"], face, admit=guard).failed[0], OverBudget)
    assert fallback.requests == [["a"]]


@FACES
def test_a_call_that_moves_to_a_new_vector_space_asks_again(face: str) -> None:
    provider, guard = Charging(), Guard()
    drift = DriftGuard(action="new-space", every=86_400)
    with Cache(provider, [DictBackend()], drift=drift) as cache:
        cache.embed("a")
        provider.served = "another"
        fetched = fetch(cache, ["b"], face, admit=guard)
    assert fetched.failed == {}
    assert guard.asked == [["b"], ["b"]]
    assert guard.spaces[0] != guard.spaces[1] == fetched.space
    assert [(computed.tokens, wasted.tokens) for computed, wasted in guard.settled] == [(0, 10), (10, 0)]
    assert (fetched.computed.tokens, fetched.wasted.tokens) == (10, 10)


@FACES
def test_a_refusal_holds_in_the_new_vector_space(face: str) -> None:
    provider, guard = Charging(), Guard(most=1)
    provider.limits = Limits(max_batch=1, concurrency=1)
    with Cache(provider, [DictBackend()], drift=DriftGuard(action="new-space")) as cache:
        cache.embed("a")
        provider.served = "another"
        fetched = fetch(cache, ["b", "c"], face, admit=guard)
    assert set(map(type, fetched.failed.values())) == {OverBudget}
    assert len(guard.asked) == 2


# --- code of the caller that uses the cache -------------------------------------------------------


@FACES
@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize("max_batch", [1, 8])
def test_the_functions_may_embed_the_same_text_without_waiting_for_the_call(
    face: str, is_async: bool, max_batch: int
) -> None:
    provider = Charging()
    provider.limits = Limits(max_batch=max_batch, concurrency=1)
    waits = LONG_TIMEOUT * 10  # a call that waited for itself would exceed the time limit of the test
    with Cache(provider, [DictBackend()], max_wait=waits) as cache:

        def admit(texts: Sequence[str], space: VectorSpace) -> Any:
            cache.embed(texts[0])
            return lambda computed, wasted: cache.embed(texts[0]) is None

        async def admit_async(texts: Sequence[str], space: VectorSpace) -> Any:
            await cache.aembed(texts[0])

            async def settle(computed: Work, wasted: Work) -> None:
                await cache.aembed(texts[0])

            return settle

        fetched = fetch(cache, ["a", "b"], face, admit=admit_async if is_async else admit)
        assert fetched.failed == {}
