"""One invalid text fails alone, and positions in errors count from the first text that the caller passed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import embedonce
from embedonce import Cache, KeyPolicy, ReplayMiss, TextError, TextRefused
from embedonce.functions import FunctionProvider
from embedonce.testing.fakes import CountingProvider, DictBackend
from embedonce_backends.memory import MemoryBackend

BAD = "xy\ud800z"

faces = pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])


def call(cache: Cache, asynchronous: bool, name: str, *args: Any, **options: Any) -> Any:
    if asynchronous:
        return asyncio.run(getattr(cache, f"a{name}")(*args, **options))
    return getattr(cache, name)(*args, **options)


def read_all(cache: Cache, asynchronous: bool, texts: Any, batch: int) -> list[Any]:
    if not asynchronous:
        return list(cache.embed_iter(texts, batch=batch))

    async def run() -> list[Any]:
        return [row async for row in cache.aembed_iter(texts, batch=batch)]

    return asyncio.run(run())


# --- fetch and lookup -------------------------------------------------------------------------


@faces
def test_fetch_reports_an_invalid_text_by_position_and_serves_the_others(asynchronous: bool) -> None:
    provider = CountingProvider()
    with Cache(provider, [MemoryBackend()]) as cache:
        cache.embed("hit")
        metadata = [{"n": n} for n in range(5)]
        fetched = call(cache, asynchronous, "fetch", ["hit", BAD, "a", BAD, "b"], metadata=metadata)
        assert fetched.sources == ["memory", None, "provider", None, "provider"]
        assert [row is None for row in fetched.rows] == [False, True, False, True, False]
        assert fetched.metadata == [None, None, {"n": 2}, None, {"n": 4}]
        assert sorted(fetched.failed) == [1, 3]
        for position, error in fetched.failed.items():
            assert isinstance(error, TextError)
            assert error.position == position
            assert str(error).startswith(f"item {position}: the text has a lone surrogate at character 2")
            assert 'add "surrogates" to [key] normalize' in str(error)
        assert cache.lookup(["a", "b"]).sources == ["memory", "memory"]
    assert provider.count == {"hit": 1, "a": 1, "b": 1}


@faces
def test_lookup_reports_an_invalid_text(asynchronous: bool) -> None:
    with Cache(CountingProvider(), [MemoryBackend()]) as cache:
        cache.embed("hit")
        found = call(cache, asynchronous, "lookup", [BAD, "hit", "miss"])
        assert found.sources == [None, "memory", None]
        assert list(found.failed) == [0]
        assert isinstance(found.failed[0], TextError)


@faces
def test_a_batch_of_invalid_texts_only(asynchronous: bool) -> None:
    provider, backend = CountingProvider(), DictBackend()
    with Cache(provider, [backend]) as cache:
        assert sorted(call(cache, asynchronous, "fetch", [BAD, "\udfff"]).failed) == [0, 1]
    assert provider.calls == []
    assert len(backend) == 0


@faces
def test_embed_batch_raises_after_the_other_texts_are_stored(asynchronous: bool) -> None:
    provider = CountingProvider()
    with Cache(provider, [MemoryBackend()]) as cache:
        with pytest.raises(TextError, match="item 1") as caught:
            call(cache, asynchronous, "embed_batch", ["a", BAD, "b", "\ud800"])
        assert caught.value.position == 1
        assert cache.lookup(["a", "b"]).sources == ["memory", "memory"]
        with pytest.raises(TextError, match="item 0"):
            call(cache, asynchronous, "embed", BAD)


@faces
def test_put_refuses_all_texts(asynchronous: bool) -> None:
    provider = CountingProvider()
    with Cache(provider, [MemoryBackend()]) as cache:
        with pytest.raises(TextError, match="item 1"):
            call(cache, asynchronous, "put", ["a", BAD], [provider.vector_of("a")] * 2)
        assert cache.lookup(["a"]).sources == [None]


@faces
def test_put_names_a_position_beyond_its_first_window(asynchronous: bool) -> None:
    provider = CountingProvider()
    texts = [f"text {number}" for number in range(1500)] + [BAD]
    with Cache(provider, [MemoryBackend()]) as cache, pytest.raises(TextError, match="item 1500"):
        call(cache, asynchronous, "put", texts, [provider.vector_of("a")] * len(texts))


@faces
def test_a_fallback_is_not_asked_because_of_an_invalid_text(asynchronous: bool) -> None:
    fallback = CountingProvider(model="second")
    with Cache(CountingProvider(), [MemoryBackend()], fallback=fallback) as cache:
        fetched = call(cache, asynchronous, "fetch", ["a", BAD])
        assert fetched.sources == ["provider", None]
    assert fallback.calls == []


def test_a_fallback_serves_the_valid_texts() -> None:
    def fail(texts: list[str]) -> Any:
        raise ConnectionError

    provider = FunctionProvider(fail, {"model": "m", "dimensions": 4})
    fallback = CountingProvider(dimensions=4)
    with Cache(provider, [MemoryBackend()], fallback=fallback) as cache:
        fetched = cache.fetch(["a", BAD, "b"])
        assert fetched.space.model == fallback.space("document").model
        assert fetched.sources == ["provider", None, "provider"]
        assert isinstance(fetched.failed[1], TextError)


def test_replay_reports_invalid_and_missing_texts() -> None:
    with Cache(CountingProvider(), [MemoryBackend()], mode="replay") as cache:
        failed = cache.fetch([BAD, "missing"]).failed
        assert isinstance(failed[0], TextError)
        assert isinstance(failed[1], ReplayMiss)


def test_no_tier_sees_an_invalid_text() -> None:
    seen: list[str] = []

    class Watching(DictBackend):
        def get_many(self, keys: Sequence[str], /) -> Any:
            seen.extend(keys)
            return super().get_many(keys)

    with Cache(CountingProvider(), [Watching()]) as cache:
        cache.fetch(["a", BAD])
        assert cache.stats().requested == 1
    assert all(key.startswith("eo1.") for key in seen)


@faces
def test_a_normalisation_step_that_fails_for_one_text_fails_it_alone(
    asynchronous: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def step(text: str) -> str:
        if text == "broken":
            raise ZeroDivisionError
        return text

    monkeypatch.setitem(embedonce.keys.NORMALIZERS, "fragile", step)
    fallback = CountingProvider(model="second")
    with Cache(CountingProvider(), [MemoryBackend()], key=KeyPolicy(normalize=["fragile"]), fallback=fallback) as cache:
        fetched = call(cache, asynchronous, "fetch", ["a", "broken", "b"])
        assert fetched.sources == ["provider", None, "provider"]
        assert isinstance(fetched.failed[1], ZeroDivisionError)
        with pytest.raises(ZeroDivisionError):
            call(cache, asynchronous, "embed_batch", ["a", "broken"])
    assert fallback.calls == []


# --- the step surrogates ----------------------------------------------------------------------


@faces
def test_the_step_embeds_what_was_refused(asynchronous: bool, tmp_path: Path) -> None:
    file = tmp_path / "embedonce.toml"
    file.write_text(
        '[provider]\ntype = "ngram"\n[[tiers]]\ntype = "memory"\n[key]\nnormalize = ["surrogates", "strip"]\n'
    )
    with embedonce.open(file) as cache:
        texts = ["tea \ud83c\udf75", "tea \U0001f375", "lone \ud83c", "lone \ufffd", " lone \udf75 "]
        fetched = call(cache, asynchronous, "fetch", texts)
        assert not fetched.failed
        rows = fetched.vectors
        assert (rows[0] == rows[1]).all()
        assert (rows[2] == rows[3]).all()
        assert (rows[2] == rows[4]).all()
        assert not (rows[0] == rows[2]).all()


def test_the_provider_gets_valid_text() -> None:
    seen: list[str] = []

    def embed(texts: list[str]) -> Any:
        seen.extend(texts)
        return [[1.0, 2.0]] * len(texts)

    with Cache(embed, [MemoryBackend()], space={"model": "m"}, key=KeyPolicy(normalize=["surrogates"])) as cache:
        cache.embed_batch(["\ud83d\ude00", "a\ud800"])
    assert seen == ["\U0001f600", "a\ufffd"]


# --- positions in a stream --------------------------------------------------------------------


def count_from(make: Callable[[int], Any], number: int, at: int) -> list[Any]:
    return [make(i) if i == at else f"text {i}" for i in range(number)]


@faces
@pytest.mark.parametrize("at", [0, 2, 3, 7])
def test_an_error_in_a_stream_names_the_position_in_the_stream(asynchronous: bool, at: int) -> None:
    provider = CountingProvider()
    with Cache(provider, [MemoryBackend()]) as cache:
        with pytest.raises(TextError, match=rf"^item {at}: ") as caught:
            read_all(cache, asynchronous, iter(count_from(lambda _: BAD, 8, at)), batch=3)
        assert caught.value.position == at
        with pytest.raises(TypeError, match=rf"^item {at} must be a str, got int"):
            read_all(cache, asynchronous, iter(count_from(lambda _: 7, 8, at)), batch=3)
        before = [f"text {i}" for i in range(8) if i // 3 <= at // 3 and i != at]
        assert set(cache.lookup(before).sources) == {"memory"}, "the vectors of the other texts must be stored"


def test_an_async_stream_counts_too() -> None:
    async def stream() -> AsyncIterator[str]:
        for text in count_from(lambda _: BAD, 8, 5):
            yield text

    with Cache(CountingProvider(), [MemoryBackend()]) as cache, pytest.raises(TextError, match="item 5"):
        read_all(cache, True, stream(), batch=2)


def refuse_some(texts: list[str]) -> list[list[float]]:
    refused = [i for i, text in enumerate(texts) if text.startswith("no")]
    if refused:
        raise TextRefused("a text is refused", refused)
    return [[len(text), 1.0] for text in texts]


@faces
def test_positions_of_refused_texts_count_in_the_batch_and_not_in_the_chunk(asynchronous: bool) -> None:
    provider = FunctionProvider(refuse_some, {"model": "m"}, embedonce.Limits(max_batch=2))
    texts = ["a", "b", "no 1", "c", "d", "no 2", "no 1"]
    with Cache(provider, [MemoryBackend()]) as cache:
        failed = call(cache, asynchronous, "fetch", texts).failed
        assert {i: getattr(error, "positions", None) for i, error in failed.items()} == {2: (2,), 5: (5,), 6: (6,)}
        with pytest.raises(TextRefused) as caught:
            call(cache, asynchronous, "embed_batch", texts)
        assert caught.value.positions == (2, 5, 6)
        with pytest.raises(TextRefused) as caught:
            read_all(cache, asynchronous, texts, batch=4)
        assert caught.value.positions == (2,)
        with pytest.raises(TextRefused) as caught:
            read_all(cache, asynchronous, ["a", "b", "c", "d", "a", "no 3", "no 4"], batch=3)
        assert caught.value.positions == (5,)


def test_a_cache_may_be_the_provider_of_a_cache() -> None:
    inner = Cache(FunctionProvider(refuse_some, {"model": "m"}, embedonce.Limits(max_batch=2)), [MemoryBackend()])
    with inner, Cache(inner.embed_batch, [MemoryBackend()], space={"model": "m"}) as outer:
        fetched = outer.fetch(["a", "b", "c", "no 1", "d"])
        assert sorted(fetched.failed) == [3], "positions of the inner cache's chunks would name the wrong text"


@given(texts=st.lists(st.sampled_from(["a", "b", BAD, "\udc00", "c"]), max_size=12), batch=st.integers(1, 5))
def test_a_stream_fails_at_its_first_invalid_text(texts: list[str], batch: int) -> None:
    first = next((i for i, text in enumerate(texts) if text in (BAD, "\udc00")), None)
    with Cache(CountingProvider(), [MemoryBackend()]) as cache:
        if first is None:
            assert len(read_all(cache, False, texts, batch)) == len(texts)
            return
        with pytest.raises(TextError) as caught:
            read_all(cache, False, texts, batch)
        assert caught.value.position == first
        fetched = cache.fetch(texts)
        assert sorted(fetched.failed) == [i for i, text in enumerate(texts) if text in (BAD, "\udc00")]
        assert all(fetched.failed[i].position == i for i in fetched.failed)  # type: ignore[attr-defined]
