"""Tests for Microsoft Agent Framework, with its real OpenAI client against an HTTP API on loopback."""

from __future__ import annotations

import asyncio
import copy
import pickle
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from agent_framework import BaseEmbeddingClient, Embedding, GeneratedEmbeddings, SupportsGetEmbeddings
from agent_framework.openai import OpenAIEmbeddingClient
from hypothesis import given, settings

from embedonce import ProviderError, SpaceError
from embedonce.testing import OpenAIServer
from embedonce_integrations.agent_framework import MAX_CACHES, CachedEmbeddingClient

from .embedder_settings import Pair, attach, pairs

MODEL = "text-embedding-3-small"
TEXTS = ["Green tea is steamed.", "Black tea is oxidised.", "White tea is withered."]
MEMORY = {"tiers": [{"type": "memory"}]}


@pytest.fixture
def server() -> Iterator[OpenAIServer]:
    with OpenAIServer(dimensions=64) as server:
        yield server


@pytest.fixture
async def client(server: OpenAIServer) -> AsyncIterator[OpenAIEmbeddingClient]:
    async with openai.AsyncOpenAI(base_url=server.base_url, api_key="sk-secret", max_retries=0) as inner:
        yield OpenAIEmbeddingClient(model=MODEL, async_client=inner)


@pytest.fixture
def tiers(tmp_path: Path) -> dict[str, Any]:
    disk = {"type": "disk", "path": str(tmp_path / "vectors"), "timeout": "60s"}  # long enough for a busy machine
    return {"tiers": [{"type": "memory"}, disk]}


def rows(made: GeneratedEmbeddings[list[float], Any]) -> np.ndarray:
    return np.array([item.vector for item in made], np.float32)


async def test_it_satisfies_the_protocol(client: OpenAIEmbeddingClient) -> None:
    cached = CachedEmbeddingClient(client, config=MEMORY, additional_properties={"team": "search"})
    assert isinstance(cached, SupportsGetEmbeddings)
    assert isinstance(cached, BaseEmbeddingClient)
    assert cached.additional_properties == {"team": "search"}
    assert "sk-secret" not in repr(cached) + str(cached.to_dict())


async def test_vectors_without_a_cache_cold_and_warm_are_equal(
    server: OpenAIServer, client: OpenAIEmbeddingClient, tiers: dict[str, Any]
) -> None:
    without = await client.get_embeddings(TEXTS)
    first = CachedEmbeddingClient(client, config=tiers)  # keeps the memory tier alive
    cold = await first.get_embeddings(TEXTS)
    warm = await CachedEmbeddingClient(client, config=tiers).get_embeddings(TEXTS)
    assert server.texts == 6
    assert (rows(cold) == rows(without)).all()
    assert (rows(warm) == rows(without)).all()
    assert cold.usage == without.usage
    assert not warm.usage
    assert cold.additional_properties == {"sources": ["provider"] * 3}
    assert warm.additional_properties == {"sources": ["memory"] * 3}
    assert [(type(item), type(item.vector), item.dimensions, item.model) for item in warm] == [
        (Embedding, list, 64, MODEL)
    ] * 3


async def test_usage_counts_only_misses(server: OpenAIServer, client: OpenAIEmbeddingClient) -> None:
    cached = CachedEmbeddingClient(client, config=MEMORY)
    await cached.get_embeddings(TEXTS[:2])
    mixed = await cached.get_embeddings(TEXTS)
    assert mixed.usage == (await client.get_embeddings(TEXTS[2:])).usage
    assert mixed.additional_properties["sources"] == ["memory", "memory", "provider"]


async def test_options_that_decide_vectors_have_their_own_space(
    server: OpenAIServer, client: OpenAIEmbeddingClient
) -> None:
    cached = CachedEmbeddingClient(client, config=MEMORY)
    for _ in range(2):
        for options in ({}, {"dimensions": 32}, {"model": "text-embedding-3-large"}):
            made = await cached.get_embeddings(TEXTS[:1], options=options)
            expected = {"model": MODEL, "dimensions": 64, **options}
            assert (rows(made)[0] == server.vector_of(TEXTS[0], **expected)).all()
            assert made.options == options
            assert made[0].model == expected["model"]
    assert server.texts == 3
    await cached.get_embeddings(TEXTS[:1], options={"user": "me", "encoding_format": "base64"})
    assert server.texts == 3


async def test_the_number_of_caches_is_limited(server: OpenAIServer, client: OpenAIEmbeddingClient) -> None:
    cached = CachedEmbeddingClient(client, config=MEMORY)
    await cached.get_embeddings(["text"])
    for number in range(2 * MAX_CACHES):
        await cached.get_embeddings(["text"], options={"extra_body": {"number": number}})
    assert len(cached._caches) == MAX_CACHES
    expected = server.texts
    assert expected == 1 + 2 * MAX_CACHES
    for options in (None, {"extra_body": {"number": 0}}):
        await cached.get_embeddings(["text"], options=options)
    assert server.texts == expected, "dropped caches still have their vectors in the tiers"


async def test_options_that_decide_nothing_reach_the_client(
    server: OpenAIServer, client: OpenAIEmbeddingClient
) -> None:
    cached = CachedEmbeddingClient(client, config=MEMORY)
    await cached.get_embeddings(TEXTS, options={"user": "me"})
    assert server.requests[-1].body["user"] == "me"


async def test_two_endpoints_share_no_vectors(client: OpenAIEmbeddingClient) -> None:
    cached = CachedEmbeddingClient(client, config=MEMORY)
    await cached.get_embeddings(TEXTS)
    with OpenAIServer(dimensions=64) as other:
        async with openai.AsyncOpenAI(base_url=other.base_url, api_key="any") as inner:
            elsewhere = OpenAIEmbeddingClient(model=MODEL, async_client=inner)
            await CachedEmbeddingClient(elsewhere, config=MEMORY).get_embeddings(TEXTS)
        assert other.texts == 3


async def test_concurrent_tasks_compute_each_text_once(server: OpenAIServer, client: OpenAIEmbeddingClient) -> None:
    cached = CachedEmbeddingClient(client, config=MEMORY)
    answers = await asyncio.gather(*(cached.get_embeddings(TEXTS[i % 3 :]) for i in range(12)))
    assert server.texts == 3
    for i, made in enumerate(answers):
        for text, row in zip(TEXTS[i % 3 :], rows(made), strict=True):
            assert (row == server.vector_of(text, model=MODEL)).all()


@pytest.mark.parametrize(
    "how",
    ["out_of_order", "short", "long", "empty", "nan", "zeros", "dimension", "ragged", "server_error", "truncated"],
)
async def test_a_mixed_batch_during_a_fault_gets_no_wrong_vector(
    server: OpenAIServer, client: OpenAIEmbeddingClient, tiers: dict[str, Any], how: Any
) -> None:
    cached = CachedEmbeddingClient(client, config=tiers)
    await cached.get_embeddings(TEXTS[:1])
    server.misbehave(how, times=None)
    mixed = cached.get_embeddings([TEXTS[2], TEXTS[0], TEXTS[1]])
    if how == "out_of_order":
        assert (rows(await mixed)[0] == server.vector_of(TEXTS[2], model=MODEL)).all()
    else:
        with pytest.raises((ProviderError, openai.OpenAIError, ValueError)) as failed:
            await mixed
        assert not any(text in str(failed.value) for text in TEXTS)
    server.heal()
    after = await cached.get_embeddings(TEXTS)
    for text, row in zip(TEXTS, rows(after), strict=True):
        assert (row == server.vector_of(text, model=MODEL)).all()


async def test_without_a_client_the_provider_makes_the_vectors() -> None:
    config = {"provider": {"type": "ngram", "dimensions": 64}, **MEMORY}
    cached = CachedEmbeddingClient(config=config)
    assert rows(await cached.get_embeddings(TEXTS)).shape == (3, 64)
    assert (await cached.get_embeddings([])) == []
    with pytest.raises(ValueError, match="dimensions"):
        await cached.get_embeddings(TEXTS, options={"dimensions": 8})
    assert CachedEmbeddingClient(config=dict(config)).cache is cached.cache


class Nameless(BaseEmbeddingClient[str, list[float], Any]):
    """Does not say which model it uses."""

    async def get_embeddings(self, values: Any, *, options: Any = None) -> GeneratedEmbeddings[list[float], Any]:
        return GeneratedEmbeddings([Embedding(vector=[float(len(text)), 1.0]) for text in values][-1:])


async def test_a_client_that_cannot_be_described_is_refused_with_advice() -> None:
    with pytest.raises(SpaceError, match=r"object does not say.*space="):
        CachedEmbeddingClient(object(), config=MEMORY)  # type: ignore[arg-type]
    with pytest.raises(SpaceError, match=r"Nameless does not say.*space="):
        CachedEmbeddingClient(Nameless(), config=MEMORY)
    cached = CachedEmbeddingClient(Nameless(), config=MEMORY, space={"model": "nameless-v1"})
    assert rows(await cached.get_embeddings(["four"])).tolist() == [[4.0, 1.0]]
    with pytest.raises(ProviderError, match="1 vector for 2 texts"):
        await cached.get_embeddings(["a", "bb"])
    with pytest.raises(TypeError, match="item 0"):
        await cached.get_embeddings([5])
    with pytest.raises(SpaceError, match="provider"):
        CachedEmbeddingClient(config=MEMORY, space={"model": "nameless-v1"})


# --- what the walk finds ----------------------------------------------------------------------


class Private(BaseEmbeddingClient[str, list[float], Any]):
    """Keeps its settings in private attributes, and records its calls."""

    def __init__(self, model: str = "m", task: Any = "a", timeout: float = 1.0) -> None:
        super().__init__()
        self.model = model
        self._task = task
        self._timeout = timeout
        self.calls: list[Any] = []

    async def get_embeddings(self, values: Any, *, options: Any = None) -> GeneratedEmbeddings[list[float], Any]:
        self.calls.append((list(values), options))
        titles = (options or {}).get("titles", [""] * len(values))
        return GeneratedEmbeddings(
            [
                Embedding(vector=[float(len(title)), float(len(text)), 1.0])
                for title, text in zip(titles, values, strict=True)
            ]
        )


async def sources_of(client: Any, config: dict[str, Any], **options: Any) -> list[str]:
    made = await CachedEmbeddingClient(client, config=config, **options).get_embeddings(["one"])
    return list(made.additional_properties["sources"])


async def test_private_settings_are_in_the_space_and_a_timeout_is_not(tiers: dict[str, Any]) -> None:
    kept = CachedEmbeddingClient(Private(), config=tiers)  # keeps the memory tier alive
    for task in ("a", {"dimensions": 3}, {"dimensions": 4}):
        assert await sources_of(Private(task=task), tiers) == ["provider"]
        assert await sources_of(Private(task=task, timeout=9.0), tiers) == ["memory"]
    assert await sources_of(Private(task=1.5), tiers, ignore=["_task"]) == ["provider"]
    assert await sources_of(Private(task=2.5), tiers, ignore=["_task"]) == ["memory"]
    with pytest.raises(SpaceError, match=r'Private\._task.*ignore=\["_task"\]'):
        CachedEmbeddingClient(Private(task=lambda text: text), config=tiers)
    with pytest.raises(SpaceError, match="ignore="):
        CachedEmbeddingClient(config=tiers, ignore=["_task"])
    assert kept.cache.stats().tiers


async def test_a_client_that_was_changed_is_not_asked(tiers: dict[str, Any]) -> None:
    client = Private()
    cached = CachedEmbeddingClient(client, config=tiers)
    await cached.get_embeddings(["one"])
    client._task = "b"
    with pytest.raises(SpaceError, match="_task"):
        await cached.get_embeddings(["two"])


@pytest.mark.parametrize("space", [None, {"model": "declared"}])
def test_settings_that_tie_a_text_to_its_batch_are_refused(space: dict[str, Any] | None) -> None:
    with pytest.raises(SpaceError, match="late_chunking"):
        CachedEmbeddingClient(Private(task={"late_chunking": True}), config=MEMORY, space=space)


async def test_options_with_one_value_per_text_are_cut_and_other_lists_refused(tiers: dict[str, Any]) -> None:
    client = Private()
    cached = CachedEmbeddingClient(client, config=tiers)
    await cached.get_embeddings(["one", "two"], options={"titles": ["a", "bb"], "user": "me"})
    made = await cached.get_embeddings(["one", "three", "one"], options={"titles": ["a", "bb", "ccc"]})
    assert rows(made).tolist() == [[1, 3, 1], [2, 5, 1], [3, 3, 1]]
    assert client.calls[1] == (["three", "one"], {"titles": ["bb", "ccc"]})
    for options in ({"stop": ["a", "b"]}, {"extra_body": {"stop": ("a", "b")}}):
        with pytest.raises(SpaceError, match=r"stop.* has as many values as there are texts"):
            await cached.get_embeddings(["one", "two"], options=options)
    with pytest.raises(SpaceError, match="late_chunking"):
        await cached.get_embeddings(["one"], options={"extra_body": {"late_chunking": True}})
    with pytest.raises(ValueError, match="titles must have one value per text"):
        await cached.get_embeddings(["one"], options={"titles": []})
    assert len(client.calls) == 2


async def test_an_index_of_0_that_is_left_out_is_the_free_place(
    server: OpenAIServer, client: OpenAIEmbeddingClient, tiers: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    embed = server.embed

    def embed_without_index_0(request: Any, kind: str | None) -> Any:
        reply = embed(request, kind)
        for item in reply.content["data"]:
            if item["index"] == 0:
                del item["index"]
        reply.content["data"].reverse()
        return reply

    monkeypatch.setattr(server, "embed", embed_without_index_0)
    made = await CachedEmbeddingClient(client, config=tiers).get_embeddings(TEXTS)
    for text, row in zip(TEXTS, rows(made), strict=True):
        assert (row == server.vector_of(text, model=MODEL)).all()


async def test_the_description_is_the_same_before_and_after_the_first_call(
    server: OpenAIServer, client: OpenAIEmbeddingClient, tiers: dict[str, Any]
) -> None:
    before = CachedEmbeddingClient(client, config=tiers)
    await before.get_embeddings(TEXTS)
    after = CachedEmbeddingClient(client, config=tiers)
    assert after.cache.provider.space("document") == before.cache.provider.space("document")


@pytest.mark.parametrize("how", [copy.copy, copy.deepcopy, lambda item: pickle.loads(pickle.dumps(item))])
async def test_a_cached_client_can_be_copied_and_pickled(tiers: dict[str, Any], how: Any) -> None:
    cached = CachedEmbeddingClient(Private(), config=tiers, task="query", additional_properties={"team": "search"})
    await cached.get_embeddings(["one"])
    other = how(cached)
    assert other.additional_properties == {"team": "search"}
    assert (await other.get_embeddings(["one"])).additional_properties["sources"] == ["memory"]


async def test_a_client_that_cannot_be_pickled_is_named(client: OpenAIEmbeddingClient, tiers: dict[str, Any]) -> None:
    with pytest.raises(SpaceError, match="OpenAIEmbeddingClient"):
        pickle.dumps(CachedEmbeddingClient(client, config=tiers))


@settings(deadline=None)
@given(pairs())
def test_clients_share_a_key_only_if_their_settings_make_the_same_vectors(pair: Pair) -> None:
    keys = [CachedEmbeddingClient(attach(Private(), mix), config=MEMORY).cache.explain("a").key for mix in pair.mixes]
    assert (keys[0] == keys[1]) is pair.are_equal
