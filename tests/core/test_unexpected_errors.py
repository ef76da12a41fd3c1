"""After an unexpected error in one chunk, the other chunks are stored and settled, and then the call raises it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
from patience import LONG_TIMEOUT, wait_until_async

from embedonce import Cache, Fetched, Tier
from embedonce.contracts import Embedded, Limits
from embedonce.errors import ProviderError
from embedonce.keys import VectorSpace
from embedonce.testing.fakes import DictBackend
from embedonce.vectors import Entry, Work

FACES = pytest.mark.parametrize("face", ["blocking", "async"])


class Paid:
    """Charges 10 tokens for each text. The text "slow" waits until another chunk of its call has failed."""

    def __init__(self, concurrency: int = 2) -> None:
        self.limits = Limits(max_batch=1, concurrency=concurrency)
        self.sent: list[str] = []
        self.is_slow_sent = threading.Event()
        self.has_other_failed = threading.Event()

    def space(self, task: str) -> VectorSpace:
        return VectorSpace(provider="paid", model="m", dimensions=2)

    def embed(self, texts: Sequence[str], task: str) -> Embedded:
        self.sent += texts
        if "slow" in texts:
            self.is_slow_sent.set()
            assert self.has_other_failed.wait(LONG_TIMEOUT)
        return Embedded([[1.0, float(len(text))] for text in texts], tokens=[10] * len(texts))

    def close(self) -> None:
        pass


class Guard:
    """Admits all texts, and notes the tokens of the texts that are settled."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.settled: list[tuple[int, int]] = []

    def __call__(self, texts: Sequence[str], space: VectorSpace) -> Callable[[Work, Work], None]:
        self.asked += texts
        return lambda computed, wasted: self.settled.append((computed.tokens, wasted.tokens))


def fetch(cache: Cache, texts: Sequence[str], face: str, **options: Any) -> Fetched:
    if face == "blocking":
        return cache.fetch(texts, **options)
    return asyncio.run(cache.afetch(texts, **options))


@FACES
def test_the_chunks_that_have_begun_are_stored_and_settled_and_no_more_begin(
    face: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    provider, guard = Paid(), Guard()
    with Cache(provider, [Tier(DictBackend(), name="memory")]) as cache:
        engine = cache._chain.engine
        store, key_of_bad = engine.store, cache.explain("bad").key

        async def fail_to_store(call: Any, entries: Mapping[str, Entry]) -> None:
            if key_of_bad in entries:
                if face == "async":  # without blocking the event loop, which has to send the other text first
                    await wait_until_async(provider.is_slow_sent.is_set)
                else:
                    assert provider.is_slow_sent.wait(LONG_TIMEOUT)
                provider.has_other_failed.set()
                raise LookupError("a bug")
            await store(call, entries)

        monkeypatch.setattr(engine, "store", fail_to_store)
        with pytest.raises(LookupError, match="a bug"):
            fetch(cache, ["bad", "slow", *"123"], face, admit=guard)
        assert cache.lookup(["slow"]).sources == ["memory"]
        assert not cache._chain.in_flight._flights
        assert not cache._chain.in_flight._calls
    assert sorted(guard.asked) == sorted(provider.sent)  # threads send them, so their order is not fixed
    assert guard.settled == [(10, 0)] * len(provider.sent)
    assert set(provider.sent) == {"bad", "slow"}


@FACES
@pytest.mark.parametrize("concurrency", [1, 2])
def test_a_chunk_is_settled_with_what_it_has_been_charged_before_the_error(
    face: str, concurrency: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    provider, guard = Paid(concurrency), Guard()
    with Cache(provider, [DictBackend()]) as cache:

        async def fail(*args: Any) -> Any:
            raise LookupError("a bug")

        monkeypatch.setattr(cache._chain.engine, "request_chunk", fail)
        with pytest.raises(LookupError, match="a bug"):
            fetch(cache, ["a", "b", "c"], face, admit=guard)
    assert guard.settled == [(0, 0)] * len(guard.asked)
    assert "c" not in guard.asked


@FACES
def test_a_function_that_is_cancelled_refuses_its_own_texts(face: str) -> None:
    provider, guard = Paid(), Guard()

    async def admit(texts: Sequence[str], space: VectorSpace) -> Any:
        if texts == ["bad"]:
            await asyncio.to_thread(provider.is_slow_sent.wait, LONG_TIMEOUT)
            provider.has_other_failed.set()
            raise asyncio.CancelledError
        return guard(texts, space)

    with Cache(provider, [DictBackend()]) as cache:
        fetched = fetch(cache, ["slow", "bad"], face, admit=admit)
    assert fetched.sources == ["provider", None]
    assert type(fetched.failed[1]).__name__ == "CancelledError"
    assert guard.settled == [(10, 0)]


@FACES
def test_a_provider_that_cancels_its_own_call_fails_like_any_other(face: str) -> None:
    class Cancelling(Paid):
        async def aembed(self, texts: Sequence[str], task: str) -> Embedded:
            if texts == ["bad"]:
                raise asyncio.CancelledError
            return Paid.embed(self, texts, task)

        embed = None  # type: ignore[assignment]

    provider, guard = Cancelling(concurrency=1), Guard()
    with Cache(provider, [DictBackend()]) as cache:
        fetched = fetch(cache, ["a", "bad", "c"], face, admit=guard)
    assert fetched.sources == ["provider", None, "provider"]
    assert isinstance(fetched.failed[1], ProviderError)
    assert "cancelled its own call" in str(fetched.failed[1])
    assert fetched.wasted.texts == 1, "nobody knows whether the call was charged"
