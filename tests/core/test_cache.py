"""The public methods of a cache, blocking and async: what they return and what they refuse."""

from __future__ import annotations

import asyncio
import itertools
import logging
import subprocess
import sys
import textwrap
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from patience import LONG_TIMEOUT, retry_when_busy

import embedonce
from embedonce import (
    Cache,
    CacheClosed,
    ConfigError,
    Embedded,
    Incomplete,
    KeyPolicy,
    Limits,
    ProviderError,
    ProviderTimeout,
    ReplayMiss,
    SpaceError,
    TextRefused,
    Tier,
)
from embedonce.events import Computed, Event, LookedUp, Stored
from embedonce.functions import FunctionProvider
from embedonce.testing.fakes import CountingProvider, DictBackend
from embedonce.testing.faults import Fault, FaultyBackend, FaultyProvider, ProviderFault
from embedonce_backends.memory import MemoryBackend


class Face:
    """Makes the same calls with the blocking or the async methods."""

    def __init__(self, cache: Cache, asynchronous: bool) -> None:
        self._cache = cache
        self._asynchronous = asynchronous

    def __getattr__(self, name: str) -> Any:
        if not self._asynchronous:
            return getattr(self._cache, name)
        method = getattr(self._cache, f"a{name}")

        def call(*args: Any, **kwargs: Any) -> Any:
            async def run() -> Any:
                if name == "embed_iter":
                    return [row async for row in method(*args, **kwargs)]
                return await method(*args, **kwargs)

            return asyncio.run(run())

        return call


faces = pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])


@faces
def test_shapes_and_dtypes(asynchronous: bool) -> None:
    provider = CountingProvider(dimensions=8)
    with Cache(provider, [MemoryBackend()]) as cache:
        face = Face(cache, asynchronous)
        one = face.embed("a")
        assert (one.shape, one.dtype, one.flags.writeable) == ((8,), np.float32, False)
        with pytest.raises(ValueError, match="WRITEABLE"):
            one.setflags(write=True)
        many = face.embed_batch(["a", "b", "a"])
        assert (many.shape, many.dtype) == ((3, 8), np.float32)
        assert (many[0] == one).all()
        assert (many[2] == one).all()
        assert face.embed_batch([]).shape == (0, 8)
        assert face.fetch([]).vectors.shape == (0, 8)
        assert [row.shape for row in face.embed_iter(iter("abc"))] == [(8,)] * 3
    with Cache(CountingProvider(tells_dimensions=False)) as cache:
        assert Face(cache, asynchronous).embed_batch([]).shape == (0, 0)


def test_a_returned_matrix_cannot_change_what_is_cached() -> None:
    with Cache(CountingProvider(), [MemoryBackend()]) as cache:
        matrix = cache.embed_batch(["a", "b"])
        before = matrix.copy()
        matrix[:] = 7
        assert (cache.embed_batch(["a", "b"]) == before).all()


@faces
@given(
    batches=st.lists(st.lists(st.sampled_from([f"t{i}" for i in range(12)]), max_size=10), max_size=6),
    max_batch=st.integers(1, 5),
    concurrency=st.integers(1, 3),
)
def test_row_i_is_text_i_for_every_mix_of_hits_misses_and_duplicates(
    asynchronous: bool, batches: list[list[str]], max_batch: int, concurrency: int
) -> None:
    provider = CountingProvider(max_batch=max_batch, concurrency=concurrency)
    with Cache(provider, [Tier(MemoryBackend(max_entries=3), name="near"), Tier(DictBackend(), name="far")]) as cache:
        face = Face(cache, asynchronous)
        for texts in batches:
            matrix = face.embed_batch(texts)
            assert len(matrix) == len(texts)
            assert all((row == provider.vector_of(text)).all() for text, row in zip(texts, matrix, strict=True))
    assert provider.count == dict.fromkeys(set(itertools.chain(*batches)), 1)


def test_duplicates_are_embedded_once_even_without_tiers() -> None:
    provider = CountingProvider()
    with Cache(provider) as cache:
        cache.embed_batch(["a", "b", "a", "a", "b"])
        assert provider.calls == [("document", ("a", "b"))]


def test_equal_keys_mean_equal_embedded_text() -> None:
    seen: list[str] = []

    def embed(texts: list[str]) -> list[list[float]]:
        seen.extend(texts)
        return [[len(text), 1] for text in texts]

    policy = KeyPolicy(normalize=["strip", "casefold"])
    with Cache(embed, [MemoryBackend()], space={"model": "m"}, key=policy) as cache:
        cache.embed("  Hello ")
        cache.embed("hello\n")
        cache.embed_batch(["HELLO", "hello."])
    assert seen == ["hello", "hello."]


# --- what is refused --------------------------------------------------------------------------


@faces
@pytest.mark.parametrize("method", ["embed_batch", "fetch", "lookup", "embed_iter", "forget"])
def test_a_str_or_a_list_with_a_non_text_is_refused_with_its_position(asynchronous: bool, method: str) -> None:
    provider = CountingProvider()
    with Cache(provider, [MemoryBackend()]) as cache:
        call = getattr(Face(cache, asynchronous), method)
        with pytest.raises(TypeError, match="expected a list of texts, got one str"):
            list(call("text"))
        for wrong in (None, 7, b"bytes", ["nested"]):
            with pytest.raises(TypeError, match="item 1 must be a str"):
                list(call(["fine", wrong]))
    assert provider.calls == []


@faces
@pytest.mark.parametrize("wrong", [None, 7, b"bytes", ["text"]])
def test_embed_refuses_what_is_not_a_str(asynchronous: bool, wrong: Any) -> None:
    with Cache(CountingProvider(), [MemoryBackend()]) as cache, pytest.raises(TypeError, match="item 0 must be a str"):
        Face(cache, asynchronous).embed(wrong)


def test_a_function_without_a_space_is_refused() -> None:
    with pytest.raises(SpaceError, match="space="):
        Cache(lambda texts: [[1.0]] * len(texts))


def test_a_closed_cache_refuses_calls_and_a_second_close_does_nothing() -> None:
    provider = CountingProvider()
    cache = Cache(provider, [MemoryBackend()])
    cache.embed("a")
    cache.close()
    cache.close()
    for call in (lambda: cache.embed("a"), lambda: cache.fetch(["a"]), lambda: cache.forget(["a"]), cache.contents):
        with pytest.raises(CacheClosed):
            call()
    assert provider.closed == 1


def test_embed_iter_refuses_wrong_arguments_immediately() -> None:
    with Cache(CountingProvider(), [MemoryBackend()]) as cache:
        for call in (cache.embed_iter, cache.aembed_iter):
            with pytest.raises(ValueError, match="batch must be at least 1"):
                call(["a"], batch=0)
            with pytest.raises(TypeError, match="expected a list of texts, got one str"):
                call("text")


@pytest.mark.parametrize("task", [None, 7, ["document"], ""])
def test_a_task_must_be_a_str(task: Any) -> None:
    with Cache(CountingProvider(), [MemoryBackend()]) as cache, pytest.raises(TypeError, match="task must be a str"):
        cache.embed("a", task)


@pytest.mark.parametrize("options", [{"max_wait": -1}, {"flush_timeout": -3}, {"max_queued": 0}, {"dtype": "float64"}])
def test_invalid_options_are_refused(options: Any) -> None:
    with pytest.raises(ConfigError):
        Cache(CountingProvider(), [MemoryBackend()], **options)


# --- provider answers -------------------------------------------------------------------------

KINDS = ["short", "long", "dimension", "empty"]


@faces
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tells", [True, False], ids=["dimensions stated", "dimensions not stated"])
def test_a_wrong_answer_raises_an_error_and_none_of_it_is_stored(asynchronous: bool, kind: Any, tells: bool) -> None:
    inner = CountingProvider(tells_dimensions=tells)
    provider = FaultyProvider(inner, [])
    with Cache(provider, [MemoryBackend()]) as cache:
        face = Face(cache, asynchronous)
        good = face.embed("good")
        provider.faults.append(ProviderFault(kind))
        fetched = face.fetch(["a", "good", "b"])
        assert fetched.sources == [None, "memory", None]
        assert sorted(fetched.failed) == [0, 2]
        assert all(isinstance(error, ProviderError) for error in fetched.failed.values())
        with pytest.raises(Incomplete):
            fetched.vectors  # noqa: B018
        with pytest.raises(ProviderError):
            face.embed_batch(["good", "a"])
        provider.heal()
        assert (face.embed_batch(["a", "good"]) == [inner.vector_of("a"), good]).all()


@faces
@pytest.mark.parametrize("kind", ["nan", "infinity", "zeros"])
@pytest.mark.parametrize("tells", [True, False], ids=["dimensions stated", "dimensions not stated"])
def test_a_wrong_vector_fails_its_text_and_the_others_are_stored(asynchronous: bool, kind: Any, tells: bool) -> None:
    provider = FaultyProvider(CountingProvider(tells_dimensions=tells), [ProviderFault(kind)])
    with Cache(provider, [MemoryBackend()]) as cache:
        face = Face(cache, asynchronous)
        fetched = face.fetch(list("abcd"))
        (bad,) = fetched.failed
        assert isinstance(fetched.failed[bad], ProviderError)
        assert fetched.sources == [None if i == bad else "provider" for i in range(4)]
        assert len(provider.calls) == 1
        assert cache.lookup(list("abcd")).sources == [None if i == bad else "memory" for i in range(4)]
        with pytest.raises(ProviderError):  # the only vector of this call is wrong
            face.embed("abcd"[bad])


@pytest.mark.parametrize(
    "answer",
    [
        None,
        7,
        "text",
        ["text"],
        [["x"]],
        [[1.0, 2.0, None]],
        [[[1.0]]],
        [1.0],
        {"a": 1},
        [[1e39, 1.0]],
        [[True, False]],
        [object()],
        [[1 + 2j]],
    ],
    ids=lambda answer: repr(answer)[:12],
)
def test_an_answer_that_is_not_a_matrix_raises_an_error(answer: Any) -> None:
    with Cache(lambda texts: answer, [MemoryBackend()], space={"model": "m"}) as cache:
        with pytest.raises(ProviderError):
            cache.embed("a")
        assert cache.lookup(["a"]).sources == [None]


@pytest.mark.parametrize(
    "answer",
    [
        [[1, 2]],
        ((1.0, 2.0),),
        [np.array([1.0, 2.0])],
        np.array([[1, 2]], np.float16),
        np.array([[1, 2]], ">f8"),
        np.array([[1.0, 9.0, 2.0, 9.0]])[:, ::2],
        Embedded([[1.0, 2.0]], tokens=3),
        iter([[1.0, 2.0]]),
    ],
    ids=lambda answer: type(answer).__name__,
)
def test_every_form_of_answer_that_a_provider_may_return(answer: Any) -> None:
    with Cache(lambda texts: answer, space={"model": "m"}) as cache:
        assert cache.embed("a").tolist() == [1.0, 2.0]


@faces
def test_a_providers_exception_reaches_the_caller_and_does_not_affect_hits(asynchronous: bool) -> None:
    class VendorError(Exception):
        pass

    provider = FaultyProvider(CountingProvider(), [ProviderFault("raise", calls={2}, error=VendorError)])
    with Cache(provider, [MemoryBackend()]) as cache:
        face = Face(cache, asynchronous)
        face.embed("hit")
        fetched = face.fetch(["new", "hit", "new"])
        assert fetched.sources == [None, "memory", None]
        assert {i: type(error) for i, error in fetched.failed.items()} == {0: VendorError, 2: VendorError}
        assert face.fetch(["new", "hit"]).sources == ["provider", "memory"]


@faces
def test_a_batch_that_fails_half_way_keeps_the_first_half(asynchronous: bool) -> None:
    fault = ProviderFault("raise", calls={6, 7, 8, 9, 10}, error=ConnectionError)
    provider = FaultyProvider(CountingProvider(max_batch=10), [fault])
    texts = [str(i) for i in range(100)]
    with Cache(provider, [DictBackend()]) as cache:
        face = Face(cache, asynchronous)
        with pytest.raises(ConnectionError):
            face.embed_batch(texts)
        assert cache.lookup(texts).sources == ["dict"] * 50 + [None] * 50
        provider.heal()
        face.embed_batch(texts)
    assert provider.inner.count == dict.fromkeys(texts, 1)


def test_each_chunk_is_stored_as_soon_as_it_is_embedded() -> None:
    backend = DictBackend()
    stored: list[int] = []
    inner = CountingProvider(max_batch=10)

    class Watching(CountingProvider):
        def _embed(self, texts: Any, task: Any, /) -> Any:
            stored.append(len(backend))
            return super()._embed(texts, task)

    inner = Watching(max_batch=10)
    with Cache(inner, [backend]) as cache:
        cache.embed_batch([str(i) for i in range(40)])
    assert stored == [0, 10, 20, 30]


@faces
@pytest.mark.parametrize("positions", [True, False], ids=["says which", "does not say which"])
def test_a_refused_text_does_not_fail_the_others(asynchronous: bool, positions: bool) -> None:
    fault = ProviderFault("refuse", refused=lambda text: text in ("", "too long"), positions=positions)
    provider = FaultyProvider(CountingProvider(), [fault])
    texts = ["a", "", "b", "c", "too long", "d", "", "e"]
    with Cache(provider, [MemoryBackend()]) as cache:
        fetched = Face(cache, asynchronous).fetch(texts)
        assert sorted(fetched.failed) == [1, 4, 6]
        assert all(isinstance(error, TextRefused) for error in fetched.failed.values())
        for i, text in enumerate(texts):
            if i not in fetched.failed:
                assert (fetched.rows[i] == provider.inner.vector_of(text)).all()
        with pytest.raises(TextRefused):
            Face(cache, asynchronous).embed("")


@faces
def test_a_provider_that_hangs_beyond_its_timeout(asynchronous: bool) -> None:
    provider = FaultyProvider(CountingProvider(timeout=0.1), [ProviderFault("hang")])
    with Cache(provider, [MemoryBackend()]) as cache:
        with pytest.raises(ProviderTimeout, match=r"within 0\.1 s"):
            retry_when_busy(lambda: Face(cache, asynchronous).embed("a"))
        provider.release()


def test_chunks_are_cut_by_tokens_if_the_provider_counts_them() -> None:
    calls: list[list[str]] = []

    class ByWords:
        limits = Limits(max_batch=100, max_tokens=5)

        def space(self, task: str, /) -> Any:
            return embedonce.VectorSpace(provider="w", model="w", dimensions=1)

        def count_tokens(self, text: str) -> int:
            return len(text.split())

        def embed(self, texts: Any, task: str, /) -> Any:
            calls.append(list(texts))
            return [[1.0]] * len(texts)

        def close(self) -> None: ...

    with Cache(ByWords()) as cache:
        cache.embed_batch(["a b", "c d e", "f", "g h i j k l", "m"])
    assert calls == [["a b", "c d e"], ["f"], ["g h i j k l"], ["m"]]


# --- tasks and spaces -------------------------------------------------------------------------


def test_query_and_document_share_vectors_only_if_the_provider_is_symmetric() -> None:
    for symmetric in (True, False):
        provider = CountingProvider(symmetric=symmetric)
        with Cache(provider, [MemoryBackend()]) as cache:
            document, query = cache.embed("text", "document"), cache.embed("text", task="query")
            assert (document == query).all() == symmetric
            assert provider.texts == (1 if symmetric else 2)


def test_a_custom_task() -> None:
    provider = CountingProvider(symmetric=False)
    with Cache(provider, [MemoryBackend()]) as cache:
        cache.embed("text", "clustering")
        assert cache.fetch(["text"], "clustering").sources == ["memory"]
        cache.forget(["text"])
        assert cache.lookup(["text"], "clustering").sources == [None]


# --- lookup, put, replay, explain -------------------------------------------------------------


@faces
def test_lookup_computes_nothing(asynchronous: bool) -> None:
    provider = CountingProvider()
    with Cache(provider, [MemoryBackend()]) as cache:
        face = Face(cache, asynchronous)
        face.embed("a")
        found = face.lookup(["a", "b"])
        assert (found.sources, dict(found.failed)) == (["memory", None], {})
        assert (found.rows[0] == provider.vector_of("a")).all()
        assert found.rows[1] is None
    assert provider.texts == 1


@faces
@pytest.mark.parametrize("write", ["inline", "background"])
def test_put_stores_vectors_and_keeps_existing_metadata(asynchronous: bool, write: Any) -> None:
    provider = CountingProvider()
    with Cache(provider, [Tier(DictBackend(scope="network"), name="far", write=write)]) as cache:
        face = Face(cache, asynchronous)
        vectors = np.stack([provider.vector_of(t) for t in "abc"])
        face.put(list("abc"), vectors, metadata=[{"source": "x", "chunk": i} for i in range(3)])
        assert None not in cache.lookup(list("abc")).sources
        face.put(["a"], vectors[:1] + 1, metadata=[{"source": "late"}])
        fetched = face.fetch(["b", "a"])
        assert (fetched.vectors == vectors[[1, 0]]).all()
        assert list(fetched.metadata) == [{"source": "x", "chunk": 1}, {"source": "x", "chunk": 0}]
        assert fetched.sources == ["far", "far"] or write == "background"
        assert cache.flush(LONG_TIMEOUT)
        assert list(face.lookup(["b"]).metadata) == [{"source": "x", "chunk": 1}]
    assert provider.texts == 0


@faces
def test_put_keeps_the_first_entry_while_its_write_is_queued(asynchronous: bool) -> None:
    backend = FaultyBackend(DictBackend(scope="network"), [Fault("hang", on="set")])
    with Cache(CountingProvider(), [Tier(backend, name="far", write="background", timeout=60)]) as cache:
        face = Face(cache, asynchronous)
        first, late = np.ones((1, 8), np.float32), np.full((1, 8), 2, np.float32)
        face.put(["a"], first, metadata=[{"source": "first"}])
        backend.gate.until(1)
        face.put(["a", "b"], np.concatenate([late, late]), metadata=[{"source": "late"}, None])
        backend.heal()
        assert cache.flush(60)
        fetched = face.lookup(["a", "b"])
        assert (fetched.vectors == np.concatenate([first, late])).all()
        assert list(fetched.metadata) == [{"source": "first"}, None]


def test_put_checks_vectors_like_a_providers_answer() -> None:
    with Cache(CountingProvider(dimensions=2), [MemoryBackend()]) as cache:
        for wrong in ([[1.0, 2.0]], [[1.0], [2.0]], [[1.0, 2.0], [float("nan"), 1.0]], [[0, 0], [1, 1]]):
            with pytest.raises(ProviderError, match="put was given"):
                cache.put(["a", "b"], wrong)
        with pytest.raises(ValueError, match="metadata must have one item per text: got 1 for 2 texts"):
            cache.put(["a", "b"], [[1, 2], [3, 4]], metadata=[None])
        with pytest.raises(ProviderError, match="1 vector for 0 texts"):
            cache.put([], [[1.0, 2.0]])
        with pytest.raises(TypeError, match="expected a list of texts, got NoneType"):
            cache.embed_batch(None)  # type: ignore[arg-type]
        cache.put([], [])
        assert cache.lookup(["a", "b"]).sources == [None, None]


def test_metadata_that_is_not_json_is_refused_before_anything_is_stored() -> None:
    backend = DictBackend()
    with Cache(CountingProvider(dimensions=2), [backend]) as cache:
        with pytest.raises(TypeError):
            cache.put(["a"], [[1, 2]], metadata=[{"x": object()}])
        with pytest.raises(TypeError):
            cache.fetch(["a"], metadata=[{"x": object()}])
        with pytest.raises(ValueError, match="metadata"):
            cache.put(["a"], [[1, 2]], metadata=[{"x": "y" * 100_000}])
        assert len(backend) == 0


def test_metadata_is_a_copy_and_the_same_before_and_after_a_restart() -> None:
    mine = {"path": ("a", "b"), "deep": {"n": [1]}}
    plain = {"path": ["a", "b"], "deep": {"n": [1]}}
    with Cache(CountingProvider(), [MemoryBackend(), DictBackend()]) as cache:
        cache.fetch(["a"], metadata=[mine])
        mine["deep"]["n"].append(2)  # type: ignore[index]
        theirs = cache.fetch(["a"]).metadata[0]
        assert theirs == plain
        theirs["deep"]["n"].append(3)  # type: ignore[index]
        assert cache.fetch(["a"]).metadata[0] == plain


def test_fetch_stores_metadata_with_computed_vectors() -> None:
    with Cache(CountingProvider(), [DictBackend()]) as cache:
        cache.fetch(["a", "b"], metadata=[{"id": 1}, None])
        assert list(cache.fetch(["b", "a"], metadata=[{"id": 9}, {"id": 9}]).metadata) == [None, {"id": 1}]


@faces
def test_replay_computes_nothing_and_names_the_missing_texts(asynchronous: bool) -> None:
    store = DictBackend()
    provider = CountingProvider()
    with Cache(provider, [DictBackend(store=store)]) as cache:
        cache.embed("recorded")
    with Cache(provider, [DictBackend(store=store)], mode="replay") as cache:
        face = Face(cache, asynchronous)
        assert (face.embed("recorded") == provider.vector_of("recorded")).all()
        with pytest.raises(ReplayMiss):
            face.embed("new")
        fetched = face.fetch(["new", "recorded"])
        assert (fetched.sources, {i: type(e) for i, e in fetched.failed.items()}) == ([None, "dict"], {0: ReplayMiss})
    assert provider.texts == 1


@faces
def test_explain_shows_the_parts_of_the_key_and_the_reason_of_a_miss(asynchronous: bool) -> None:
    store = DictBackend()

    def open_(version: str) -> Cache:
        tier = Tier(DictBackend(store=store, scope="host"), name="disk")
        return Cache(CountingProvider(), [MemoryBackend(), tier], key=KeyPolicy(version=version, normalize=["strip"]))

    with open_("v1") as old, open_("v2") as new:
        old.embed("some private text")
        hit = Face(old, asynchronous).explain(" some private text ")
        assert (dict(hit.tiers), hit.found, hit.normalized) == ({"memory": "hit", "disk": "hit"}, "memory", True)
        miss = Face(new, asynchronous).explain("some private text")
        assert miss.found is None
        assert miss.reasons == ["tier 'disk' holds entries with version 'v1' instead of 'v2'"]
        assert miss.key.split(".")[1] == miss.scope != hit.scope
        assert "private" not in repr(miss) + repr(hit)
        assert new.stats().tiers["disk"].misses == 0  # explain() is not counted as a lookup


@faces
@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ({"endpoint": "https://a.example"}, {"endpoint": "https://b.example"}, "another endpoint"),
        ({"prompt": "a: "}, {}, "another prompt"),
        ({"api_version": "1", "kwargs": {"x": 1, "y": 2}}, {"api_version": "2", "kwargs": {"x": 1, "y": 3}}, None),
        (
            {f"s{i}": 1 for i in range(7)},
            {f"s{i}": 2 for i in range(7)},
            "another s0, s1, s2, s3, s4 and 2 more settings",
        ),
        (
            {"model": "m-1", "prompt": "a"},
            {"model": "m-2", "prompt": "b"},
            "model 'm-1' instead of 'm-2', another prompt",
        ),
        ({"model": "m-1", "a": 1, "version": 1}, {"model": "m-2", "revision": "2", "dimensions": 2}, ""),
    ],
)
def test_explain_names_the_settings_in_which_another_space_differs(
    asynchronous: bool, old: dict[str, Any], new: dict[str, Any], reason: str | None
) -> None:
    store = DictBackend()

    def open_(space: dict[str, Any]) -> Cache:
        tier = Tier(DictBackend(store=store, scope="host"), name="disk")
        return Cache(lambda texts: [[1.0, 2.0] for _ in texts], [tier], space={"model": "m", **space})

    expected = "another api_version, kwargs.y" if reason is None else reason
    with open_(old) as first, open_(new) as second:
        first.embed("text")
        reasons = Face(second, asynchronous).explain("text").reasons
    assert reasons == ([f"tier 'disk' holds entries with {expected}"] if expected else [])


def test_repr_and_messages_contain_no_text_and_no_secret() -> None:
    policy = KeyPolicy(secret="hunter2-hunter2")
    provider = FaultyProvider(CountingProvider(), [ProviderFault("short")])
    with Cache(provider, [MemoryBackend()], key=policy) as cache:
        with pytest.raises(ProviderError) as caught:
            cache.embed_batch(["a private text", "b"])
        said = repr(cache) + repr(policy) + str(caught.value) + repr(cache.explain("a private text"))
        assert "private" not in said
        assert "hunter2" not in said


# --- iterating --------------------------------------------------------------------------------


def test_embed_iter_reads_ahead_by_one_batch_only_and_keeps_order() -> None:
    provider = CountingProvider(max_batch=64)
    read = 0

    def texts() -> Iterator[str]:
        nonlocal read
        for i in range(1000):
            read += 1
            yield f"text {i % 700}"

    with Cache(provider, [MemoryBackend()]) as cache:
        for i, row in enumerate(cache.embed_iter(texts(), batch=50)):
            assert (row == provider.vector_of(f"text {i % 700}")).all()
            assert read <= i + 50
    assert provider.texts == 700


def test_aembed_iter_accepts_an_async_iterable() -> None:
    provider = CountingProvider()

    async def texts() -> AsyncIterator[str]:
        for i in range(25):
            await asyncio.sleep(0)
            yield f"{i}"

    async def main() -> list[Any]:
        async with Cache(provider, [MemoryBackend()]) as cache:
            return [row async for row in cache.aembed_iter(texts(), batch=10)]

    rows = asyncio.run(main())
    assert all((row == provider.vector_of(f"{i}")).all() for i, row in enumerate(rows))


# --- fallback ---------------------------------------------------------------------------------


@faces
def test_a_fallback_embeds_whole_batches_in_its_own_space(asynchronous: bool, caplog: Any) -> None:
    main = FaultyProvider(CountingProvider(model="main"), [])
    other = CountingProvider(model="other")
    with Cache(main, [MemoryBackend()], fallback=other) as cache, caplog.at_level(logging.WARNING, "embedonce"):
        face = Face(cache, asynchronous)
        face.embed("hit")
        main.faults.append(ProviderFault("raise"))
        fetched = face.fetch(["hit", "new"])
        assert fetched.space.model == "other"
        assert (fetched.vectors == [other.vector_of("hit"), other.vector_of("new")]).all()
        assert (face.embed("new") == other.vector_of("new")).all()
        assert face.fetch(["hit"]).space.model == "main"  # hits need no provider, so no fallback is used
        stats = cache.stats().providers
        assert stats["fallback:counting"].texts == 2
        assert len([r for r in caplog.records if "has its own vector space" in r.message]) >= 1
        main.heal()
        assert (face.embed("new") == main.inner.vector_of("new")).all()
        assert caplog.records[-1].message == "provider 'counting' is working again"
        cache.forget(["hit", "new"])
        assert cache.contents() == []


def test_a_fallback_with_different_dimensions_requires_fetch_only() -> None:
    main = FaultyProvider(CountingProvider(dimensions=8), [ProviderFault("raise", error=OSError)])
    other = CountingProvider(dimensions=4, model="other")
    with pytest.raises(SpaceError, match="fetch_only"):
        Cache(main, [MemoryBackend()], fallback=other)
    with Cache(main, [MemoryBackend()], fallback=other, fallback_fetch_only=True) as cache:
        assert cache.fetch(["a"]).space.dimensions == 4
        with pytest.raises(OSError, match="injected"):
            cache.embed("a")
        with pytest.raises(OSError, match="injected"):
            cache.embed_batch(["a", "b"])


def test_a_text_that_the_provider_refuses_does_not_call_the_fallback() -> None:
    main = FaultyProvider(CountingProvider(), [ProviderFault("refuse", refused=lambda text: not text)])
    other = CountingProvider(model="other")
    with Cache(main, fallback=other) as cache:
        assert isinstance(cache.fetch(["", "a"]).failed[0], TextRefused)
    assert other.texts == 0


def test_when_the_fallback_fails_too_the_first_providers_error_is_raised() -> None:
    main = FaultyProvider(CountingProvider(), [ProviderFault("raise", error=ConnectionError)])
    other = FaultyProvider(CountingProvider(model="other"), [ProviderFault("raise", error=KeyError)])
    with Cache(main, fallback=other) as cache, pytest.raises(ConnectionError):
        cache.embed("a")


# --- precision --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
def test_the_answer_is_the_same_before_and_after_a_restart_and_in_every_tier(dtype: Any) -> None:
    store = DictBackend()
    provider = CountingProvider(dimensions=32)
    texts = [f"text {i}" for i in range(50)]

    def open_() -> Cache:
        return Cache(provider, [MemoryBackend(), Tier(DictBackend(store=store), name="far")], dtype=dtype)

    with open_() as cache:
        first = cache.embed_batch(texts)
        assert (cache.embed_batch(texts) == first).all()
    with open_() as cache:
        assert (cache.embed_batch(texts) == first).all()
        assert (cache.embed_batch(texts[::-1]) == first[::-1]).all()
        assert all((cache.embed(text) == row).all() for text, row in zip(texts, first, strict=True))
    assert provider.texts == 50


def test_a_finer_entry_is_rounded_on_read_and_a_coarser_one_is_a_miss() -> None:
    store = DictBackend()
    provider = CountingProvider(dimensions=32)

    def open_(dtype: Any) -> Cache:
        return Cache(provider, [DictBackend(store=store)], dtype=dtype)

    with open_("int8") as cache:
        coarse = cache.embed("a")
    with open_("float32") as cache:
        assert cache.explain("a").tiers == {"dict": "coarser"}
        assert (cache.embed("a") == provider.vector_of("a")).all()
    with open_("int8") as cache:
        assert cache.lookup(["a"]).sources == ["dict"]
        assert (cache.embed("a") == coarse).all()
    assert provider.texts == 2


# --- counters and events ----------------------------------------------------------------------


@faces
def test_stats_count_texts(asynchronous: bool) -> None:
    provider = CountingProvider()
    with Cache(provider, [MemoryBackend(), Tier(DictBackend(), name="far")]) as cache:
        face = Face(cache, asynchronous)
        face.embed_batch(["a", "bb", "a"])
        face.embed("a")
        face.embed("a")
        face.lookup(["bb", "c"])
        stats = cache.stats()
        memory, far = stats.tiers["memory"], stats.tiers["far"]
        assert (memory.hits, memory.misses, memory.stored) == (3, 3, 2)
        assert (far.hits, far.misses, far.stored) == (0, 3, 2)
        counted = stats.providers["counting"]
        assert (counted.texts, counted.tokens, counted.failed) == (2, 3, 0)
        assert cache.stats() == stats  # reading the counters changes nothing


def test_single_hits_from_many_threads_are_all_counted() -> None:
    with Cache(CountingProvider(), [MemoryBackend()]) as cache:
        cache.embed("a")
        threads = [threading.Thread(target=lambda: [cache.embed("a") for _ in range(2000)]) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert cache.stats().tiers["memory"].hits == 16_000


def test_events_are_complete_and_contain_no_text(caplog: Any) -> None:
    events: list[Event] = []

    def broken(event: Event) -> None:
        raise RuntimeError("the listener failed")

    with Cache(CountingProvider(), [MemoryBackend()], listeners=[broken, events.append]) as cache:
        cache.embed("private text")
        cache.embed("private text")
    assert [type(event) for event in events] == [LookedUp, Computed, Stored, LookedUp]
    assert [event.hits for event in events if isinstance(event, LookedUp)] == [0, 1]
    assert "private" not in repr(events)
    assert "listener failed on LookedUp" in caplog.text
    assert "private" not in caplog.text


# --- exit of the program ----------------------------------------------------------------------


def run_program(source: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(source)],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


def test_background_writes_are_flushed_at_exit_without_close(tmp_path: Any) -> None:
    done = run_program(f"""
        import time
        from embedonce import Cache, Tier
        from embedonce.testing.fakes import CountingProvider
        from embedonce_backends.disk import DiskBackend

        class Slow(DiskBackend):
            def set_many(self, items, ttl, /):
                time.sleep(0.05)
                super().set_many(items, ttl)

        tier = Tier(Slow(path={str(tmp_path / "d")!r}), name="d", write="background", timeout={LONG_TIMEOUT})
        cache = Cache(CountingProvider(max_batch=5), [tier], flush_timeout={LONG_TIMEOUT})
        cache.embed_batch([str(i) for i in range(100)])
    """)
    assert (done.returncode, done.stderr) == (0, "")
    from embedonce_backends.disk import DiskBackend

    with Cache(CountingProvider(), [DiskBackend(path=tmp_path / "d")], mode="replay") as cache:
        assert cache.lookup([str(i) for i in range(100)]).sources == ["disk"] * 100


def test_unreferenced_caches_and_their_providers_are_closed_at_exit() -> None:
    done = run_program("""
        import gc
        from embedonce import Cache, Tier
        from embedonce.testing.fakes import CountingProvider, DictBackend

        class Provider(CountingProvider):
            def close(self):
                print("provider")

        class Backend(DictBackend):
            def close(self):
                print("backend")
                super().close()

        gc.disable()  # the garbage collector would close neither the backend nor a provider
        Cache(Provider(), [Backend()], fallback=Provider(model="2")).embed("a text")
    """)
    assert (done.returncode, done.stdout, done.stderr) == (0, "backend\nprovider\nprovider\n", "")


def test_options_are_checked_before_the_providers_space() -> None:
    for options in ({"dtype": "f8"}, {"mode": "write"}, {"max_wait": -1}, {"flush_timeout": -1}, {"max_queued": 0}):
        with pytest.raises(ConfigError, match=next(iter(options))):
            Cache(lambda texts: texts, **options)  # type: ignore[arg-type]


def test_a_hanging_background_write_does_not_keep_the_program_alive() -> None:
    done = run_program("""
        from embedonce import Cache, Tier
        from embedonce.testing.fakes import CountingProvider, DictBackend
        from embedonce.testing.faults import Fault, FaultyBackend

        backend = FaultyBackend(DictBackend(scope="network"), [Fault("hang")])
        cache = Cache(CountingProvider(), [Tier(backend, name="far")], flush_timeout=0.5)
        cache.embed("a")
        print("done")
    """)
    assert (done.returncode, done.stdout) == (0, "done\n")


def test_a_function_provider_in_one_line() -> None:
    with Cache(lambda texts: [[len(text), 1] for text in texts], space={"model": "lengths"}) as cache:
        assert cache.embed("four").tolist() == [4, 1]


def test_limits_of_a_function() -> None:
    sizes: list[int] = []

    def embed(texts: list[str]) -> list[list[int]]:
        sizes.append(len(texts))
        return [[1]] * len(texts)

    with Cache(FunctionProvider(embed, {"model": "m"}, Limits(max_batch=3))) as cache:
        cache.embed_batch(list("abcdefgh"))
    assert sizes == [3, 3, 2]


def test_at_exit_an_open_cache_has_only_its_flush_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    """If a write hangs at exit, ``_flush_open_chains`` waits for it once, for at most ``flush_timeout``.

    After that, ``_close_open_chains`` waits for the same write, because closing the backend may end the write.
    """
    from embedonce._engine import running
    from embedonce._engine.writing import TierWriter

    waited: list[str] = []
    monkeypatch.setattr(running, "_seconds_waited", 0.0)
    monkeypatch.setattr(running, "_open_chains", set())
    monkeypatch.setattr(TierWriter, "wait_until_chain_is_flushed", lambda writing, timeout: waited.append(writing.name))
    backend = FaultyBackend(DictBackend(scope="network"), [Fault("hang", on="set")])
    far = Tier(backend, name="open", write="background", timeout=60)
    with Cache(CountingProvider(), [far], flush_timeout=0.05) as cache:
        cache.embed("a text")
        backend.gate.until(1)
        running._flush_open_chains()
        assert "open" not in waited
        assert cache.embed("a text").size
        backend.heal()
        assert cache.flush(60)
