"""Tests for LlamaIndex, with its OpenAI client, ingestion pipeline, vector index and events."""

from __future__ import annotations

import asyncio
import pickle
import subprocess
import sys
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import llama_index.core
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llama_index.core import Document, VectorStoreIndex
from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.bridge.pydantic import PrivateAttr
from llama_index.core.callbacks import CallbackManager, CBEventType, LlamaDebugHandler
from llama_index.core.embeddings.mock_embed_model import MockEmbedding
from llama_index.core.ingestion import IngestionPipeline
from llama_index.core.ingestion.pipeline import get_transformation_hash
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.node_parser import SentenceSplitter
from llama_index.core.rate_limiter import BaseRateLimiter, TokenBucketRateLimiter
from llama_index.core.schema import TextNode
from llama_index.embeddings.openai import OpenAIEmbedding
from patience import wait_until_collected

from embedonce import ProviderError, SpaceError
from embedonce.testing import OpenAIServer
from embedonce_integrations.llama_index import CachedEmbedding

from .embedder_settings import Pair, attach, pairs
from .embedders import (
    MIXED,
    NGRAM,
    SECRET,
    check_only_own_vectors,
    disk_config,
    equal_as_float32,
    memory_config,
    vector,
)

OpenAI: TypeAlias = Callable[..., OpenAIEmbedding]


class Letters(BaseEmbedding):
    """A deterministic embedding model that treats queries differently and counts its texts."""

    model_name: str = "letters-1"
    prompt: str = "query: "
    _count: Counter[str] = PrivateAttr(default_factory=Counter)

    def _get_text_embedding(self, text: str) -> list[float]:
        self._count[text] += 1
        return vector(text)

    def _get_query_embedding(self, query: str) -> list[float]:
        return self._get_text_embedding(self.prompt + query)

    async def _aget_query_embedding(self, query: str) -> list[float]:
        return self._get_query_embedding(query)


class Response:
    """The object that newer versions of LlamaIndex may return in place of a vector."""

    def __init__(self, embedding: list[float]) -> None:
        self.embedding = embedding


class Responding(Letters):
    def _get_text_embedding(self, text: str) -> Any:
        return Response(super()._get_text_embedding(text))


@pytest.fixture
def openai(server: OpenAIServer, runner: asyncio.Runner) -> Iterator[OpenAI]:
    """Make LlamaIndex's client for the loopback server."""
    made = []

    def make(**options: Any) -> OpenAIEmbedding:
        options = {"model": "text-embedding-3-small", "api_key": SECRET, "max_retries": 0, **options}
        made.append(OpenAIEmbedding(api_base=server.base_url, **options))
        return made[-1]

    yield make
    for embedding in made:
        if embedding._client is not None:
            embedding._client.close()
        if embedding._aclient is not None:
            runner.run(embedding._aclient.close())


class Face:
    """The blocking or the async methods of an embedding model, under the same names."""

    def __init__(self, name: str, runner: asyncio.Runner) -> None:
        self._sync = name == "sync"
        self._run = runner.run

    def texts(self, model: BaseEmbedding, texts: list[str]) -> Any:
        if self._sync:
            return model.get_text_embedding_batch(texts)
        return self._run(model.aget_text_embedding_batch(texts))

    def text(self, model: BaseEmbedding, text: str) -> Any:
        return model.get_text_embedding(text) if self._sync else self._run(model.aget_text_embedding(text))

    def query(self, model: BaseEmbedding, query: str) -> Any:
        return model.get_query_embedding(query) if self._sync else self._run(model.aget_query_embedding(query))


@pytest.fixture(params=["sync", "async"])
def face(request: pytest.FixtureRequest, runner: asyncio.Runner) -> Face:
    return Face(request.param, runner)


# --- without a cache, cold, warm ---------------------------------------------------------------


def test_openai_without_a_cache_cold_and_warm(server: OpenAIServer, openai: OpenAI, face: Face) -> None:
    inner = openai()
    cached = CachedEmbedding(inner, config=memory_config())
    texts, text, query = face.texts(inner, MIXED), face.text(inner, "alone"), face.query(inner, MIXED[0])
    before = server.texts
    for computed in (len(set(MIXED)) + 2, 0):  # cold, then warm; a query is no text
        assert equal_as_float32(face.texts(cached, MIXED), texts)
        assert equal_as_float32(face.text(cached, "alone"), text)
        assert equal_as_float32(face.query(cached, MIXED[0]), query)
        assert server.texts == before + computed
        before = server.texts


@pytest.mark.parametrize("model", [Letters, Responding])
def test_a_custom_class_without_a_cache_cold_and_warm(face: Face, model: type[Letters]) -> None:
    inner, plain = model(), Letters()
    cached = CachedEmbedding(inner, config=memory_config())
    for _ in range(2):
        assert equal_as_float32(face.texts(cached, MIXED), face.texts(plain, MIXED))
        assert equal_as_float32(face.query(cached, MIXED[0]), face.query(plain, MIXED[0]))
        assert inner._count == Counter([*set(MIXED), inner.prompt + MIXED[0]])
    first = face.texts(cached, MIXED)
    assert type(first) is list
    assert type(first[0]) is list
    assert type(first[0][0]) is float
    assert face.texts(cached, []) == []
    assert face.text(cached, MIXED[0]) == first[0]
    means = [model.get_agg_embedding_from_queries(["a", "b"]) for model in (cached, plain)]
    np.testing.assert_allclose(means[0], means[1], atol=1e-7)


@pytest.mark.timeout(300)  # it imports torch
def test_minilm_without_a_cache_cold_and_warm(minilm_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llama_index.embeddings.huggingface import HuggingFaceEmbedding

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    inner = HuggingFaceEmbedding(str(minilm_path), device="cpu", query_instruction="query: ")
    cached = CachedEmbedding(inner, config=memory_config())
    texts, query = inner.get_text_embedding_batch(MIXED), inner.get_query_embedding(MIXED[0])
    encoded: list[str] = []
    encode = inner._model.encode
    monkeypatch.setattr(
        inner._model, "encode", lambda texts, **options: encoded.extend(texts) or encode(texts, **options)
    )
    cold = cached.get_text_embedding_batch(MIXED), cached.get_query_embedding(MIXED[0])
    assert len(encoded) == len(set(MIXED)) + 1
    warm = cached.get_text_embedding_batch(MIXED), cached.get_query_embedding(MIXED[0])
    assert len(encoded) == len(set(MIXED)) + 1
    assert cold == warm
    np.testing.assert_allclose(cold[0], texts, atol=1e-6)  # another batch, other rounding
    np.testing.assert_allclose(cold[1], query, atol=1e-6)
    assert not np.allclose(cold[1], cold[0][0], atol=1e-3)


def test_the_provider_of_the_configuration_is_used(face: Face) -> None:
    # This namespace is unique: tests with an equal configuration would share the cache and its counters.
    cached = CachedEmbedding(config={**NGRAM, "key": {"namespace": f"a provider, {face}"}})
    rows = face.texts(cached, ["one", "two", "one"])
    assert rows[0] == rows[2] == face.query(cached, "one")
    assert cached.cache.stats().providers["ngram"].texts == 2
    assert cached.model_name == cached.cache.provider.space("document").model
    with pytest.raises(SpaceError, match=r"\[provider\] of the configuration describes its own vector space"):
        CachedEmbedding(config=NGRAM, symmetric=True)


# --- never another text's vector --------------------------------------------------------------


@pytest.mark.parametrize("kind", OpenAIServer.KINDS)
def test_no_fault_returns_the_vector_of_another_text(
    server: OpenAIServer, openai: OpenAI, kind: Any, face: Face
) -> None:
    config = memory_config()
    inner = openai(timeout=60)
    cached = CachedEmbedding(inner, config=config)
    ask_hastily = CachedEmbedding(openai(timeout=0.5 if kind == "hang" else 60), config=config)
    right = face.texts(inner, MIXED)
    check_only_own_vectors(server, kind, right, partial(face.texts, cached), partial(face.texts, ask_hastily))


@pytest.mark.parametrize("kind", ["short", "long", "duplicate_index", "dimension", "nan", "zeros"])
def test_a_fault_during_a_query_is_an_error(server: OpenAIServer, openai: OpenAI, kind: Any, face: Face) -> None:
    cached = CachedEmbedding(openai(), config=memory_config())
    right = face.query(cached, "Known")
    server.misbehave(kind)
    with pytest.raises((ProviderError, ValueError)):
        face.query(cached, "Not known")
    assert face.query(cached, "Known") == right


@settings(deadline=None, max_examples=60)
@given(st.lists(st.lists(st.sampled_from("abcdefgh"), max_size=12), max_size=6), st.integers(1, 4), st.integers(1, 5))
def test_every_row_belongs_to_its_text(batches: list[list[str]], entries: int, size: int) -> None:
    config = {"tiers": [{"type": "memory", "max_entries": entries}]}
    cached = CachedEmbedding(Letters(embed_batch_size=size), config=config)
    for batch in batches:
        rows = cached.get_text_embedding_batch(batch)
        assert len(rows) == len(batch)
        assert all(equal_as_float32(row, vector(text)) for row, text in zip(rows, batch, strict=True))
        for text in batch[:2]:
            assert equal_as_float32(cached.get_query_embedding(text), vector("query: " + text))


# --- spaces -----------------------------------------------------------------------------------


def vectors_of(model: BaseEmbedding, **options: Any) -> dict[str, Any]:
    return CachedEmbedding(model, config=memory_config(), **options).vectors


def test_everything_that_decides_vectors_is_in_the_space(openai: OpenAI) -> None:
    plain = vectors_of(openai())
    assert plain["document"] != plain["query"]
    for options in (
        {"model": "text-embedding-3-large"},
        {"dimensions": 8},
        {"additional_kwargs": {"truncate": True}},
    ):
        assert vectors_of(openai(**options)) != plain, options
    for options in (
        {"embed_batch_size": 3},
        {"max_retries": 9},
        {"timeout": 3.0},
        {"api_key": "other"},
        {"default_headers": {"x": "y"}},
        {"reuse_client": False},
        {"num_workers": 4},
        {"api_version": "2026-01-01"},
        {"additional_kwargs": {"user": "me", "encoding_format": "float"}},
    ):
        assert vectors_of(openai(**options)) == plain, options
    similar, search = (openai(model="davinci", mode=mode) for mode in ("similarity", "text_search"))
    assert vectors_of(similar) != vectors_of(search)
    assert vectors_of(Letters(prompt="")) != vectors_of(Letters())
    assert vectors_of(MockEmbedding(embed_dim=3)) != vectors_of(MockEmbedding(embed_dim=4))


def test_queries_and_texts_share_vectors_only_if_symmetric() -> None:
    inner = Letters(prompt="")
    cached = CachedEmbedding(inner, config=memory_config(), symmetric=True)
    cached.get_text_embedding("a")
    assert equal_as_float32(cached.get_query_embedding("a"), vector("a"))
    assert inner._count == {"a": 1}
    declared = vectors_of(Letters(), space={"model": "mine"})
    assert declared["document"] != declared["query"]


class Wordless(BaseEmbedding):
    """Has no field of its own."""

    def _get_text_embedding(self, text: str) -> list[float]:
        return vector(text)

    _get_query_embedding = _get_text_embedding

    async def _aget_query_embedding(self, query: str) -> list[float]:
        return vector(query)


class Holding(Letters):
    model: Any = None


def test_a_model_without_a_description_is_refused_until_declared() -> None:
    class Local(Letters):
        pass

    script = type("Letters", (Letters,), {"__module__": "__main__"})
    for model, message in (
        (Wordless(), "Wordless does not say"),
        (Holding(model=object()), r"Holding\.model .of type object"),
        (script(), "another script may define a different class"),
        (Local(), "defined in a function"),
    ):
        with pytest.raises(SpaceError, match=message + r".*space="):
            CachedEmbedding(model, config=memory_config())
        cached = CachedEmbedding(model, config=memory_config(), space={"model": "mine"})
        assert equal_as_float32(cached.get_text_embedding("a"), vector("a"))
        assert cached.model_name == "mine"


@settings(deadline=None)
@given(pairs())
def test_embedders_share_a_key_only_if_their_settings_make_the_same_vectors(pair: Pair) -> None:
    config = memory_config()
    keys = [
        CachedEmbedding(attach(Wordless(model_name="m"), mix), config=config).cache.explain("a").key
        for mix in pair.mixes
    ]
    assert (keys[0] == keys[1]) is pair.are_equal


def test_a_changed_model_is_refused() -> None:
    inner = Letters(model_name="before")
    cached = CachedEmbedding(inner, config=memory_config())
    cached.get_text_embedding("a")
    inner.model_name = "after"
    assert equal_as_float32(cached.get_text_embedding("a"), vector("a"))
    for ask in (
        lambda: cached.get_text_embedding("b"),
        lambda: cached.get_query_embedding("b"),
        lambda: asyncio.run(cached.aget_text_embedding_batch(["b"])),
    ):
        with pytest.raises(SpaceError, match=r"changed after it was wrapped \(model_name\)"):
            ask()
    assert inner._count == {"a": 1}


def test_unsupported_arguments_are_refused_with_advice() -> None:
    with pytest.raises(TypeError, match="use config="):
        CachedEmbedding("embedonce.toml")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"rate_limiter.*give the rate limiter to the embedding model"):
        CachedEmbedding(Letters(), config=memory_config(), rate_limiter=TokenBucketRateLimiter(requests_per_minute=1))
    with pytest.raises(TypeError, match=r"embeddings_cache.*remove it"):
        CachedEmbedding(Letters(), config=memory_config(), embeddings_cache=object())
    cached = CachedEmbedding(Letters(), config=memory_config())
    with pytest.raises(TypeError, match="made from a dict"):
        CachedEmbedding.from_dict(cached.to_dict())


def test_the_description_is_the_same_before_and_after_the_first_calls(openai: OpenAI, face: Face) -> None:
    for inner in (openai(), Letters()):
        before = vectors_of(inner)
        face.texts(inner, ["a", "b"])
        face.query(inner, "c")
        assert vectors_of(inner) == before


def test_the_model_gets_the_normalised_text() -> None:
    inner = Letters()
    cached = CachedEmbedding(inner, config=memory_config(normalize=["strip"]))
    assert equal_as_float32(cached.get_text_embedding_batch([" a", "a\n"]), [vector("a")] * 2)
    assert inner._count == {"a": 1}
    assert cached.vectors != CachedEmbedding(inner, config=memory_config()).vectors


# --- to_dict, secrets, events -----------------------------------------------------------------


def test_to_dict_is_stable_and_differs_between_spaces(openai: OpenAI) -> None:
    nodes = [TextNode(text="one"), TextNode(text="two")]
    cached = CachedEmbedding(openai(), config=memory_config())
    before, hashed = cached.to_dict(), get_transformation_hash(nodes, cached)
    cached.get_text_embedding_batch(["a", "b"])
    cached.get_text_embedding_batch(["a", "b"])
    assert cached.to_dict() == before
    again = CachedEmbedding(openai(api_key="other"), config=memory_config())
    assert get_transformation_hash(nodes, again) == hashed
    assert get_transformation_hash(nodes, pickle.loads(pickle.dumps(cached))) == hashed
    assert get_transformation_hash(nodes, CachedEmbedding(openai(dimensions=8), config=memory_config())) != hashed
    assert get_transformation_hash(nodes, CachedEmbedding(openai(), config=memory_config(normalize=["nfc"]))) != hashed
    assert cached.to_dict()["class_name"] == CachedEmbedding.class_name() == "CachedEmbedding"


def test_secrets_are_shown_nowhere(openai: OpenAI) -> None:
    inner = openai(default_headers={"authorization": SECRET}, additional_kwargs={"access_token": SECRET})
    cached = CachedEmbedding(inner, config=memory_config(secret=SECRET))
    shown = [cached, cached.to_dict(), cached.to_json(), cached.to_payload(), cached.model_dump(), cached.cache]
    shown += [cached.cache.explain("a"), cached.cache.provider.space("query")]
    assert SECRET not in f"{shown!r} {cached}"


class Recorder(BaseEventHandler):
    """Records the class, the chunks and the number of vectors of each embedding event."""

    _seen: list[tuple[str, Any, Any]] = PrivateAttr(default_factory=list)

    def handle(self, event: Any, **_: Any) -> None:
        name = type(event).__name__
        if name.startswith("Embedding"):
            chunks, vectors = getattr(event, "chunks", None), getattr(event, "embeddings", ())
            model = event.model_dict["model_name"] if hasattr(event, "model_dict") else None
            self._seen.append((name, model or chunks, len(vectors)))


def test_events_are_the_same_as_for_any_embedding_model(face: Face) -> None:
    def record_events(make: Callable[[CallbackManager], BaseEmbedding]) -> Any:
        debug, recorder = LlamaDebugHandler(print_trace_on_end=False), Recorder()
        model = make(CallbackManager([debug]))
        dispatcher = get_dispatcher()
        dispatcher.add_event_handler(recorder)
        try:
            face.texts(model, MIXED)
            face.query(model, "a")
        finally:
            dispatcher.event_handlers.remove(recorder)
        pairs = debug.get_event_pairs(CBEventType.EMBEDDING)
        return recorder._seen, sorted(str(end.payload["chunks"]) for _, end in pairs if end.payload)

    def cached(manager: CallbackManager, config: dict[str, Any]) -> BaseEmbedding:
        return CachedEmbedding(Letters(embed_batch_size=4), config=config, callback_manager=manager)

    plain = record_events(lambda manager: Letters(callback_manager=manager, embed_batch_size=4))
    config = memory_config()
    for _ in range(2):
        assert record_events(lambda manager: cached(manager, config)) == plain


class Counting(BaseRateLimiter):
    """Counts how often a call waited for it."""

    def __init__(self) -> None:
        self.count = 0

    def acquire(self, num_tokens: int = 0) -> None:
        self.count += 1

    async def async_acquire(self, num_tokens: int = 0) -> None:
        self.count += 1


def test_hits_do_not_use_up_the_rate_limit(face: Face) -> None:
    limiter = Counting()
    inner = Letters(rate_limiter=limiter, embed_batch_size=2)
    cached = CachedEmbedding(inner, config=memory_config())
    face.texts(cached, ["a", "b", "c", "d"])
    face.query(cached, "a")
    assert limiter.count == 3
    face.texts(cached, ["a", "b", "c", "d"])
    face.query(cached, "a")
    assert limiter.count == 3


# --- calls ------------------------------------------------------------------------------------


def test_misses_come_in_batches_of_the_models_size(server: OpenAIServer, openai: OpenAI, face: Face) -> None:
    texts = [f"text {i}" for i in range(8)]
    cached = CachedEmbedding(openai(embed_batch_size=3), config=memory_config(), embed_batch_size=100)
    face.texts(cached, texts[:2])
    server.requests.clear()
    face.texts(cached, texts)
    assert [len(request.body["input"]) for request in server.requests] == [3, 3]
    assert CachedEmbedding(openai(embed_batch_size=3), config=memory_config()).embed_batch_size == 3


def test_threads_and_tasks_compute_each_text_once() -> None:
    inner = Letters()
    cached = CachedEmbedding(inner, config=memory_config())
    texts = [f"text {i}" for i in range(20)]
    start = threading.Barrier(6)

    def work(turn: int) -> Any:
        start.wait(60)
        mine = texts[turn:] + texts[:turn]
        if turn % 2:
            return mine, cached.get_text_embedding_batch(mine)
        return mine, asyncio.run(cached.aget_text_embedding_batch(mine))

    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(work, range(6)))
    for mine, rows in answers:
        assert equal_as_float32(rows, [vector(text) for text in mine])
    assert inner._count == Counter(texts)


def test_equal_configurations_share_one_cache() -> None:
    one, two, other = Letters(), Letters(), Letters(model_name="letters-2")
    config = memory_config()
    first, second, third = (CachedEmbedding(inner, config=dict(config)) for inner in (one, two, other))
    for model in (first, second, third):
        model.get_text_embedding("a")
    assert (one._count, two._count, other._count) == ({"a": 1}, {}, {"a": 1})


def test_after_a_restart_the_disk_has_every_vector(tmp_path: Path, face: Face) -> None:
    cached = CachedEmbedding(Letters(), config=disk_config(tmp_path))
    texts, query = face.texts(cached, MIXED), face.query(cached, "a")
    cache = weakref.ref(cached.cache._chain)
    del cached
    wait_until_collected(cache)
    inner = Letters()
    cached = CachedEmbedding(inner, config=disk_config(tmp_path))
    assert face.texts(cached, MIXED) == texts
    assert face.query(cached, "a") == query
    assert not inner._count


# --- pickling ---------------------------------------------------------------------------------


def test_a_pickled_model_shares_the_cache_again(openai: OpenAI, tmp_path: Path) -> None:
    file = tmp_path / "embedonce.toml"
    file.write_text('[key]\nversion = "v7"\n[[tiers]]\ntype = "memory"\n')
    inner = openai(rate_limiter=TokenBucketRateLimiter(requests_per_minute=10_000))
    for source in (file, memory_config()):
        cached = CachedEmbedding(inner, config=source, embed_batch_size=7)
        rows = cached.get_text_embedding_batch(MIXED)
        other = pickle.loads(pickle.dumps(cached))
        assert other.to_dict() == cached.to_dict()
        assert other.cache.lookup(MIXED).vectors.tolist() == rows
        assert other.get_text_embedding_batch(MIXED) == rows
        assert SECRET not in repr(other)


def test_a_model_that_pickling_changes_is_refused(openai: OpenAI) -> None:
    cached = CachedEmbedding(openai(model="davinci", mode="similarity"), config=memory_config())
    with pytest.raises(SpaceError, match="would make different vectors in another process"):
        pickle.dumps(cached)


# --- pipelines and indexes --------------------------------------------------------------------

DOCUMENTS = [Document(text=f"{city} is a city. It has number {i}.", id_=city) for i, city in enumerate("ABCDEF")]


def test_a_pipeline_embeds_each_node_once(face: Face) -> None:
    inner = Letters()
    cached = CachedEmbedding(inner, config=memory_config())

    def run(model: BaseEmbedding, documents: list[Document] = DOCUMENTS) -> Any:
        pipeline = IngestionPipeline(transformations=[SentenceSplitter(), model], disable_cache=True)
        nodes = pipeline.run(documents=documents)
        return [(node.get_content(), node.embedding) for node in nodes]

    plain = run(Letters())
    for _ in range(2):
        found = run(cached)
        assert [text for text, _ in found] == [text for text, _ in plain]
        assert equal_as_float32([row for _, row in found], [row for _, row in plain])
        assert inner._count.total() == len(DOCUMENTS)
    run(cached, [*DOCUMENTS[:-1], Document(text="One that was changed.")])
    assert inner._count.total() == len(DOCUMENTS) + 1


async def test_an_async_pipeline_embeds_each_node_once() -> None:
    inner = Letters()
    cached = CachedEmbedding(inner, config=memory_config(), num_workers=2)
    for _ in range(2):
        pipeline = IngestionPipeline(transformations=[SentenceSplitter(), cached], disable_cache=True)
        nodes = await pipeline.arun(documents=DOCUMENTS)
        assert all(equal_as_float32(node.embedding, vector(node.get_content())) for node in nodes)
        assert inner._count.total() == len(DOCUMENTS)


@pytest.mark.timeout(300)  # each process imports LlamaIndex
def test_the_processes_of_a_pipeline_share_a_disk(
    server: OpenAIServer, openai: OpenAI, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The processes unpickle the splitter's tokenizer, and must not download it.
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(Path(llama_index.core.__file__).parent / "_static" / "tiktoken_cache"))
    cached = CachedEmbedding(openai(), config=disk_config(tmp_path))
    pipeline = IngestionPipeline(transformations=[SentenceSplitter(), cached], disable_cache=True)
    found = {node.get_content(): node.embedding for node in pipeline.run(documents=DOCUMENTS, num_workers=2)}
    assert all(equal_as_float32(row, server.vector_of(text)) for text, row in found.items())
    assert server.count == Counter(list(found))
    assert cached.cache.lookup(list(found)).sources == ["disk"] * len(DOCUMENTS), "the processes wrote them"
    assert {node.get_content(): node.embedding for node in pipeline.run(documents=DOCUMENTS)} == found
    assert server.texts == len(DOCUMENTS)


def test_retrieval_from_a_vector_index_is_the_same() -> None:
    def found(model: BaseEmbedding) -> list[tuple[str, float | None]]:
        index = VectorStoreIndex.from_documents(DOCUMENTS, embed_model=model, transformations=[SentenceSplitter()])
        return [(hit.text, hit.score) for hit in index.as_retriever(similarity_top_k=4).retrieve("Which city?")]

    plain = found(Letters())
    inner = Letters()
    cached = CachedEmbedding(inner, config=memory_config())
    for _ in range(2):
        hits = found(cached)
        assert [text for text, _ in hits] == [text for text, _ in plain]
        np.testing.assert_allclose([score for _, score in hits], [score for _, score in plain], atol=1e-6)
        assert inner._count.total() == len(DOCUMENTS) + 1


def test_a_missing_framework_is_named_with_its_install_command() -> None:
    code = "import sys; sys.modules['llama_index'] = None; import embedonce_integrations.llama_index"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "ImportError: " in done.stderr
    assert "pip install 'embedonce[llama-index]'" in done.stderr
