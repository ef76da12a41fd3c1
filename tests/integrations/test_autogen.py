"""Tests for AutoGen: the memory in a real agent, and the embedding function in AutoGen's Chroma memory."""

from __future__ import annotations

import asyncio
import copy
import pickle
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from autogen_agentchat.agents import AssistantAgent
from autogen_core import CancellationToken, Image
from autogen_core.memory import MemoryContent, MemoryMimeType, MemoryQueryResult
from autogen_core.model_context import BufferedChatCompletionContext
from autogen_core.models import FunctionExecutionResultMessage, SystemMessage, UserMessage
from autogen_ext.memory.chromadb import (
    ChromaDBVectorMemory,
    CustomEmbeddingFunctionConfig,
    PersistentChromaDBVectorMemoryConfig,
)
from autogen_ext.models.replay import ReplayChatCompletionClient

from embedonce import ConfigError, ProviderError
from embedonce.testing import OpenAIServer
from embedonce_integrations.autogen import CachedMemory
from embedonce_integrations.chroma import CachedEmbeddingFunction
from embedonce_integrations.wrapping import open_shared_cache

NGRAM = {"provider": {"type": "ngram", "dimensions": 256}, "tiers": [{"type": "memory"}]}
TEA = ["Green tea is steamed.", "Black tea is oxidised.", "White tea is withered."]


def chunk(text: str, **metadata: Any) -> MemoryContent:
    return MemoryContent(content=text, mime_type=MemoryMimeType.TEXT, metadata=metadata or None)


def texts(result: MemoryQueryResult) -> list[Any]:
    return [content.content for content in result.results]


@pytest.fixture
def server() -> Iterator[OpenAIServer]:
    with OpenAIServer(dimensions=64) as server:
        yield server


@pytest.fixture
async def config(
    server: OpenAIServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[dict[str, Any]]:
    monkeypatch.setenv("TEA_API_KEY", "sk-secret")
    config = {
        "key": {"normalize": ["strip"]},
        "provider": {
            "type": "openai",
            "model": "text-embedding-3-small",
            "base_url": server.base_url,
            "api_key": "${TEA_API_KEY}",
            "max_retries": 0,
        },
        # This timeout is long enough for a busy machine.
        "tiers": [{"type": "memory"}, {"type": "disk", "path": str(tmp_path / "vectors"), "timeout": "60s"}],
    }
    cache = open_shared_cache(config)
    yield config
    await cache.aclose()  # else its connections end with the loop, which is a warning


async def test_a_query_returns_the_nearest_chunks_with_their_metadata() -> None:
    memory = CachedMemory(NGRAM, k=2)
    await memory.add_all([chunk(text, place=i) for i, text in enumerate(TEA)])
    found = await memory.query("black teas are oxidised")
    assert texts(found)[0] == TEA[1]
    assert found.results[0].metadata is not None
    assert found.results[0].metadata["place"] == 1
    scores = [content.metadata["score"] for content in found.results if content.metadata]
    assert scores == sorted(scores, reverse=True)
    assert len(scores) == 2
    assert texts(await memory.query(TEA[0], k=1)) == [TEA[0]]
    assert texts(await memory.query(TEA[0], k=9, score_threshold=0.99)) == [TEA[0]]
    assert (await memory.query("anything", score_threshold=1.1)).results == []


async def test_changes_to_found_chunks_do_not_change_the_memory() -> None:
    memory = CachedMemory(NGRAM)
    await memory.add(chunk(TEA[0], place=0))
    (found,) = (await memory.query(TEA[0])).results
    assert found.metadata is not None
    found.metadata["place"] = "changed"
    (again,) = (await memory.query(TEA[0])).results
    assert again.metadata is not None
    assert again.metadata["place"] == 0


async def test_an_empty_memory_finds_nothing_and_computes_nothing(server: OpenAIServer, config: dict[str, Any]) -> None:
    memory = CachedMemory(config)
    assert (await memory.query("anything")).results == []
    context = BufferedChatCompletionContext(buffer_size=9, initial_messages=[UserMessage(content="hi", source="u")])
    assert (await memory.update_context(context)).memories.results == []
    assert len(await context.get_messages()) == 1
    assert await memory.add_all([]) == []
    assert server.texts == 0


async def test_chunks_go_to_the_api_in_one_call_and_are_paid_for_once(
    server: OpenAIServer, config: dict[str, Any]
) -> None:
    memory = CachedMemory(config)
    sources = await memory.add_all([chunk(text) for text in [*TEA, TEA[0], f"  {TEA[1]}\n"]])
    assert sources == ["provider"] * 5
    assert [request.body["input"] for request in server.requests] == [TEA]
    other = CachedMemory(dict(config))
    assert other.cache is memory.cache
    assert await other.add_all([chunk(TEA[2]), chunk(TEA[2].rstrip("."))]) == ["memory", "provider"]
    assert server.texts == 4


async def test_a_batch_with_a_failing_chunk_adds_nothing(server: OpenAIServer, config: dict[str, Any]) -> None:
    memory = CachedMemory(config)
    await memory.add(chunk(TEA[0]))
    server.misbehave("short")
    with pytest.raises(ProviderError):
        await memory.add_all([chunk(text) for text in TEA])
    assert len((await memory.query(TEA[0], k=9)).results) == 1
    await memory.add_all([chunk(text) for text in TEA[1:]])
    for text in TEA:
        assert texts(await memory.query(text, k=1)) == [text]


async def test_concurrent_adds_and_queries_work(server: OpenAIServer, config: dict[str, Any]) -> None:
    memory = CachedMemory(config)
    await asyncio.gather(*(memory.add(chunk(TEA[i % 3], place=i)) for i in range(9)), memory.query(TEA[0]))
    assert len((await memory.query(TEA[0], k=20)).results) == 9
    assert server.texts == 3


async def test_a_dumped_memory_loads_with_its_chunks(server: OpenAIServer, config: dict[str, Any]) -> None:
    memory = CachedMemory(config, k=1, name="tea")
    await memory.add_all([chunk(text) for text in TEA])
    dumped = memory.dump_component()
    loaded = CachedMemory.load_component(dumped.model_dump())
    assert (loaded.name, texts(await loaded.query(TEA[2]))) == ("tea", [TEA[2]])
    assert server.texts == 3, "the query is a chunk, and the model is symmetric"


@pytest.mark.parametrize(
    "part",
    [
        {"key": {"secret": "hunter2" * 5}},
        {"provider": {"type": "openai", "model": "m", "api_key": "hunter2"}},
        {"tiers": [{"type": "memory"}, {"type": "redis", "url": "redis://:hunter2@127.0.0.1:1/0"}]},
    ],
)
async def test_a_secret_in_plain_text_is_not_dumped(part: dict[str, Any]) -> None:
    memory = CachedMemory({**NGRAM, **part})
    with pytest.raises(ConfigError, match="a secret would be written") as raised:
        memory.dump_component()
    assert "hunter2" not in str(raised.value)


async def test_later_changes_of_a_chunk_do_not_affect_the_memory() -> None:
    given, later = chunk(TEA[0], where={"page": 1}), chunk(TEA[1], where={"page": 2})
    memory = CachedMemory(NGRAM, k=1, memory_contents=[later])
    await memory.add(given)
    for content in (given, later):
        content.content = "something else"
        assert content.metadata is not None
        content.metadata["where"]["page"] = 9
    for page, text in enumerate(TEA[:2], 1):
        found = (await memory.query(text)).results[0]
        assert (found.content, found.metadata) == (text, {"where": {"page": page}, "score": pytest.approx(1.0)})
        assert found.metadata is not None
        found.metadata["where"]["page"] = 9
        assert (await memory.query(text)).results[0].metadata["where"] == {"page": page}  # type: ignore[index]


async def test_other_types_than_content_are_refused() -> None:
    memory = CachedMemory(NGRAM)
    with pytest.raises(TypeError, match="expected MemoryContent, got str"):
        await memory.add_all(["text"])  # type: ignore[list-item]
    with pytest.raises(TypeError, match="expected MemoryContent, got str"):
        CachedMemory(NGRAM, memory_contents=["text"])  # type: ignore[list-item]
    for k in (1.5, "2", True):
        with pytest.raises(TypeError, match="k must be an integer"):
            CachedMemory(NGRAM, k=k)  # type: ignore[arg-type]


async def test_clear_empties_the_memory_but_not_the_cache(server: OpenAIServer, config: dict[str, Any]) -> None:
    memory = CachedMemory(config)
    await memory.add(chunk(TEA[0]))
    await memory.clear()
    assert (await memory.query(TEA[0])).results == []
    assert await memory.add_all([chunk(TEA[0])]) == ["memory"]
    await memory.close()


async def test_store_metadata_stores_metadata_in_the_tiers(config: dict[str, Any]) -> None:
    for store, expected in ((False, None), (True, {"source": "a.md", "chunk": 3})):
        memory = CachedMemory({**config, "key": {"namespace": str(store)}}, store_metadata=store)
        await memory.add(chunk(TEA[0], source="a.md", chunk=3))
        assert memory.cache.lookup([TEA[0]]).metadata == [expected]
        await memory.cache.aclose()  # else its connections end with the loop, which is a warning


async def test_the_order_of_keys_in_json_does_not_matter() -> None:
    memory = CachedMemory(NGRAM)
    one, same = ({"a": 1, "b": "ü"}, {"b": "ü", "a": 1})
    for content in (one, same):
        await memory.add(MemoryContent(content=content, mime_type=MemoryMimeType.JSON))
    assert await memory.add_all([MemoryContent(content='{"a": 1, "b": "ü"}', mime_type="text/plain")]) == ["memory"]


@pytest.mark.parametrize(
    ("content", "kind"),
    [(b"raw", MemoryMimeType.BINARY), ("text", "text/html"), ("text", MemoryMimeType.JSON)],
)
async def test_content_without_text_is_refused(content: Any, kind: Any) -> None:
    memory = CachedMemory(NGRAM)
    with pytest.raises(ValueError, match="no text to embed"):
        await memory.add(MemoryContent(content=content, mime_type=kind))
    assert (await memory.query("text")).results == []


def test_k_must_be_at_least_1() -> None:
    with pytest.raises(ValueError, match="k must be at least 1, got"):
        CachedMemory(NGRAM, k=0)


async def test_a_cancelled_add_adds_nothing(server: OpenAIServer, config: dict[str, Any]) -> None:
    memory = CachedMemory(config)
    token = CancellationToken()
    token.cancel()
    with pytest.raises(asyncio.CancelledError):
        await memory.add(chunk(TEA[0]), token)
    assert (await memory.query(TEA[0])).results == []
    await memory.add(chunk(TEA[0]), CancellationToken())
    assert texts(await memory.query(TEA[0], CancellationToken())) == [TEA[0]]


async def test_the_context_gets_the_chunks_nearest_to_the_last_message() -> None:
    memory = CachedMemory(NGRAM, k=1)
    await memory.add_all([chunk(text, place=i) for i, text in enumerate(TEA)])
    image = Image.from_base64(
        "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
    )
    for content in ("what about white tea?", ["what about white tea?", image]):
        context = BufferedChatCompletionContext(buffer_size=9)
        await context.add_message(UserMessage(content=content, source="user"))
        result = await memory.update_context(context)
        assert texts(result.memories) == [TEA[2]]
        added = (await context.get_messages())[-1]
        assert isinstance(added, SystemMessage)
        assert added.content == f"Relevant memory content:\n1. {TEA[2]} (place: 2)"
    context = BufferedChatCompletionContext(buffer_size=9)
    await context.add_message(FunctionExecutionResultMessage(content=[]))
    assert (await memory.update_context(context)).memories.results == []


async def test_an_agent_reads_the_chunks() -> None:
    memory = CachedMemory(NGRAM, k=1)
    await memory.add(chunk(TEA[1], source="tea.md"))
    agent = AssistantAgent("clerk", model_client=ReplayChatCompletionClient(["It is oxidised."]), memory=[memory])
    result = await agent.run(task="What is black tea?")
    assert [type(message).__name__ for message in result.messages] == ["TextMessage", "MemoryQueryEvent", "TextMessage"]
    read = [message.content for message in await agent.model_context.get_messages()]
    assert f"Relevant memory content:\n1. {TEA[1]} (source: tea.md)" in read


async def test_autogens_chroma_memory_uses_the_embedding_function(
    server: OpenAIServer, config: dict[str, Any], tmp_path: Path
) -> None:
    for name in ("first", "second"):
        memory = ChromaDBVectorMemory(
            PersistentChromaDBVectorMemoryConfig(
                collection_name=name,
                persistence_path=str(tmp_path / "chroma"),
                embedding_function_config=CustomEmbeddingFunctionConfig(
                    function=CachedEmbeddingFunction, params={"config": config}
                ),
                k=1,
            )
        )
        for text in TEA:
            await memory.add(chunk(text))
        assert texts(await memory.query(TEA[1])) == [TEA[1]]
        await memory.close()
    assert server.texts == 3


@pytest.mark.parametrize("how", [copy.copy, copy.deepcopy, lambda item: pickle.loads(pickle.dumps(item))])
async def test_a_memory_can_be_copied_and_pickled(server: OpenAIServer, config: dict[str, Any], how: Any) -> None:
    memory = CachedMemory(config, name="tea", k=1)
    await memory.add_all([chunk(text, page=number) for number, text in enumerate(TEA)])
    other = how(memory)
    await other.add(chunk("Coffee is roasted."))
    assert other.name == "tea"
    assert texts(await other.query(TEA[1])) == [TEA[1]]
    assert server.count[TEA[1]] == 1, "the vectors of the copied chunks are in the tiers"
    assert len(memory.dump_component().config["memory_contents"]) == 3, "the original is unchanged"


def test_a_provider_that_ties_a_text_to_its_batch_is_refused(config: dict[str, Any]) -> None:
    provider = {**config["provider"], "extra_body": {"late_chunking": True}}
    with pytest.raises(ConfigError, match="late_chunking"):
        CachedMemory({**config, "provider": provider})
