"""Faults of an endpoint, met through every framework: one bad text fails alone, and no wrong vector is stored."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import openai
import pytest
from agent_framework.openai import OpenAIEmbeddingClient
from autogen_core.memory import MemoryContent, MemoryMimeType
from chromadb.utils.embedding_functions import OpenAIEmbeddingFunction
from haystack import Document
from haystack.components.embedders import OpenAIDocumentEmbedder
from haystack.utils import Secret
from langchain_openai import OpenAIEmbeddings
from llama_index.embeddings.openai import OpenAIEmbedding

from embedonce import ConfigError, DriftError, SpaceError, TextError
from embedonce.testing import OpenAIServer
from embedonce.vectors import Matrix
from embedonce_integrations.agent_framework import CachedEmbeddingClient
from embedonce_integrations.autogen import CachedMemory
from embedonce_integrations.chroma import CachedEmbeddingFunction
from embedonce_integrations.langchain import CachedEmbeddings
from embedonce_integrations.llama_index import CachedEmbedding
from embedonce_integrations.openai import cached
from embedonce_integrations.ray import BatchEmbedder
from embedonce_integrations.wrapping import open_shared_cache
from haystack_integrations.components.embedders.embedonce import CachedDocumentEmbedder

Ask: TypeAlias = Callable[[list[str]], Matrix]
CLIENTS = ("client", "_client", "_aclient", "async_client")
MODEL = "text-embedding-3-small"
KEY = "sk-0123456789-do-not-tell"
TEXTS = [f"A sentence about tea, number {number}." for number in range(20)]
BAD = TEXTS[13]
GOOD = [text for text in TEXTS if text != BAD]
OTHERS = [f"A sentence about coffee, number {number}." for number in range(20)]


@pytest.fixture
def server() -> Iterator[OpenAIServer]:
    with OpenAIServer(dimensions=64) as server:
        yield server


class Frameworks:
    """Makes, for each framework, a function that embeds texts through embedonce."""

    def __init__(self, server: OpenAIServer, folder: Path, runner: asyncio.Runner) -> None:
        self.server = server
        self.runner = runner
        disk = {"type": "disk", "path": str(folder / "vectors"), "timeout": "60s"}  # long enough for a busy machine
        self.tiers: dict[str, Any] = {"tiers": [disk]}
        provider = {"type": "openai", "model": MODEL, "base_url": server.base_url, "api_key": KEY, "max_retries": 0}
        self.config: dict[str, Any] = {"provider": provider, **self.tiers}
        self.client = openai.OpenAI(base_url=server.base_url, api_key=KEY, max_retries=0)
        self.async_client = openai.AsyncOpenAI(base_url=server.base_url, api_key=KEY, max_retries=0)
        self.caches: list[Any] = []
        """Caches whose async clients belong to the runner."""
        self.made: list[Any] = []
        """Embedders that have an OpenAI client in one of the attributes in CLIENTS."""

    def close(self) -> None:
        with suppress(ConfigError):  # a test has made the configuration invalid
            self.caches.append(open_shared_cache(self.config))
        for cache in self.caches:
            self.runner.run(cache.aclose())
            cache.close()
        clients = [getattr(embedder, name, None) for embedder in self.made for name in CLIENTS]
        for client in [self.client, self.async_client, *clients]:
            close = getattr(client, "close", None)
            closing = close() if close is not None else None
            if closing is not None:
                self.runner.run(closing)

    def provider(self) -> Ask:
        return open_shared_cache(self.config).embed_batch

    def provider_on_a_loop(self) -> Ask:
        cache = open_shared_cache(self.config)
        self.caches.append(cache)
        return lambda texts: self.runner.run(cache.aembed_batch(texts))

    def openai_client(self) -> Ask:
        client = cached(self.client, config=self.tiers)
        return lambda texts: _read_items(client.embeddings.create(model=MODEL, input=texts))

    def async_openai_client(self) -> Ask:
        client = cached(self.async_client, config=self.tiers)
        return lambda texts: _read_items(self.runner.run(client.embeddings.create(model=MODEL, input=texts)))

    def langchain(self) -> Ask:
        inner = OpenAIEmbeddings(
            model=MODEL, base_url=self.server.base_url, api_key=KEY, max_retries=0, check_embedding_ctx_length=False
        )
        self.made += [inner.client, inner.async_client]  # each of the two is the ``embeddings`` of a client
        embeddings = CachedEmbeddings(inner, config=self.tiers)
        return lambda texts: np.array(embeddings.embed_documents(texts), np.float32)

    def llama_index(self) -> Ask:
        inner = OpenAIEmbedding(model_name=MODEL, api_base=self.server.base_url, api_key=KEY, max_retries=0)
        self.made.append(inner)
        model = CachedEmbedding(inner, config=self.tiers)
        return lambda texts: np.array(model.get_text_embedding_batch(texts), np.float32)

    def chroma(self) -> Ask:
        inner = OpenAIEmbeddingFunction(
            model_name=MODEL, api_base=self.server.base_url, api_key_env_var="OPENAI_API_KEY"
        )
        self.made.append(inner)
        inner.client = inner.client.with_options(max_retries=0)
        function = CachedEmbeddingFunction(inner, config=self.tiers)
        return lambda texts: np.array(function(texts), np.float32)

    def haystack(self) -> Ask:
        inner = OpenAIDocumentEmbedder(
            model=MODEL,
            api_base_url=self.server.base_url,
            api_key=Secret.from_token(KEY),
            max_retries=0,
            raise_on_failure=True,
            progress_bar=False,
        )
        self.made.append(inner)
        embedder = CachedDocumentEmbedder(inner, config=self.tiers)

        def ask(texts: list[str]) -> Matrix:
            made = embedder.run([Document(id=str(i), content=text) for i, text in enumerate(texts)])["documents"]
            return np.array([document.embedding for document in made], np.float32)

        return ask

    def autogen(self) -> Ask:
        cache = open_shared_cache(self.config)
        self.caches.append(cache)

        def ask(texts: list[str]) -> Matrix:
            chunks = [MemoryContent(content=text, mime_type=MemoryMimeType.TEXT) for text in texts]
            self.runner.run(CachedMemory(self.config).add_all(chunks))
            return cache.lookup(texts).vectors

        return ask

    def agent_framework(self) -> Ask:
        inner = OpenAIEmbeddingClient(model=MODEL, async_client=self.async_client)
        client = CachedEmbeddingClient(inner, config=self.tiers)

        def ask(texts: list[str]) -> Matrix:
            made = self.runner.run(client.get_embeddings(texts))
            return np.array([item.vector for item in made], np.float32)

        return ask

    def ray(self) -> Ask:
        embed = BatchEmbedder(self.config)
        return lambda texts: embed({"text": np.array(texts, dtype=object)})["embedding"]


def _read_items(answer: Any) -> Matrix:
    return np.array([item.embedding for item in answer.data], np.float32)


NAMES = [name for name in vars(Frameworks) if not name.startswith("_") and name != "close"]


@pytest.fixture
def frameworks(server: OpenAIServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Frameworks]:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with asyncio.Runner() as runner:
        made = Frameworks(server, tmp_path, runner)
        yield made
        made.close()


@pytest.fixture(params=NAMES)
def ask(frameworks: Frameworks, request: pytest.FixtureRequest) -> Ask:
    made: Ask = getattr(frameworks, request.param)()
    return made


def right(server: OpenAIServer, texts: list[str]) -> Matrix:
    return np.array([server.vector_of(text) for text in texts], np.float32)


def catch_error(ask: Ask, texts: list[str]) -> Exception:
    """Return the error of a call. Each framework raises an error of its own."""
    try:
        ask(texts)
    except Exception as error:
        return error
    raise AssertionError("the call did not fail")


def check_that_the_others_are_stored(server: OpenAIServer, ask: Ask) -> None:
    server.heal()
    sent = len(server.requests)
    assert np.array_equal(ask(GOOD), right(server, GOOD))
    assert len(server.requests) == sent, "a good text was sent again"
    assert np.array_equal(ask(TEXTS), right(server, TEXTS))
    assert len(server.requests) == sent + 1, "only the bad text is sent"


@pytest.mark.parametrize(
    ("kind", "message"), [("server_error", "json: unsupported value: NaN"), ("bad_request", None)], ids=["500", "400"]
)
def test_one_refused_text_fails_alone(server: OpenAIServer, ask: Ask, kind: Any, message: str | None) -> None:
    server.misbehave(kind, times=None, where=BAD.__eq__, message=message)
    assert KEY not in str(catch_error(ask, TEXTS))
    assert len(server.requests) <= 1 + 2 * math.ceil(math.log2(len(TEXTS)))
    check_that_the_others_are_stored(server, ask)


@pytest.mark.parametrize("kind", ["null", "zeros"])
def test_one_row_without_a_vector_fails_alone(server: OpenAIServer, ask: Ask, kind: Any) -> None:
    server.misbehave(kind, times=None, where=BAD.__eq__)
    catch_error(ask, TEXTS)
    check_that_the_others_are_stored(server, ask)


def test_one_lone_surrogate_fails_alone(server: OpenAIServer, ask: Ask) -> None:
    error = catch_error(ask, ["\ud800" if text == BAD else text for text in TEXTS])
    assert type(error) is TextError
    assert "surrogates" in str(error)
    check_that_the_others_are_stored(server, ask)


def test_a_batch_size_that_the_server_refuses_is_found(server: OpenAIServer, ask: Ask) -> None:
    server.max_inputs = 3
    assert np.array_equal(ask(TEXTS), right(server, TEXTS))
    sent = len(server.requests)
    assert np.array_equal(ask(OTHERS), right(server, OTHERS))
    assert len(server.requests) - sent <= len(OTHERS), "no request of the second call is refused"


@pytest.mark.parametrize("kind", ["out_of_order", "no_zero_index"])
def test_each_text_gets_its_own_vector_by_index(server: OpenAIServer, ask: Ask, kind: Any) -> None:
    server.misbehave(kind, times=None)
    assert np.array_equal(ask(TEXTS), right(server, TEXTS))
    server.heal()
    assert np.array_equal(ask(TEXTS), right(server, TEXTS))


def test_another_served_model_is_noticed(server: OpenAIServer, ask: Ask) -> None:
    assert np.array_equal(ask(TEXTS), right(server, TEXTS))
    server.served_model = "e5-base"
    with pytest.raises(DriftError, match="e5-base"):
        ask(OTHERS)
    server.served_model = None
    sent = server.texts
    assert np.array_equal(ask(OTHERS), right(server, OTHERS))
    assert server.texts == sent + len(OTHERS), "no vector of the other model was stored"


LATE = {"late_chunking": True}


@pytest.mark.parametrize("name", ["provider", "provider_on_a_loop", "autogen", "ray"])
def test_a_provider_that_ties_a_text_to_its_batch_is_refused(frameworks: Frameworks, name: str) -> None:
    frameworks.config["provider"]["extra_body"] = LATE
    with pytest.raises(ConfigError, match="late_chunking"):
        getattr(frameworks, name)()(TEXTS)


@pytest.mark.parametrize("space", [None, {"model": "jina"}])
def test_an_embedder_that_ties_a_text_to_its_batch_is_refused(frameworks: Frameworks, space: Any) -> None:
    one = OpenAIEmbeddings(model=MODEL, api_key=KEY, model_kwargs={"extra_body": LATE})
    with pytest.raises(SpaceError, match="late_chunking"):
        CachedEmbeddings(one, config=frameworks.tiers, space=space)
    other = OpenAIEmbedding(model_name=MODEL, api_key=KEY, additional_kwargs={"extra_body": LATE})
    with pytest.raises(SpaceError, match="late_chunking"):
        CachedEmbedding(other, config=frameworks.tiers, space=space)


def test_a_request_that_ties_a_text_to_its_batch_is_refused(frameworks: Frameworks) -> None:
    client, async_client = (
        cached(one, config=frameworks.tiers) for one in (frameworks.client, frameworks.async_client)
    )
    with pytest.raises(SpaceError, match=r"extra_body\.late_chunking"):
        client.embeddings.create(model=MODEL, input=TEXTS, extra_body=LATE)
    with pytest.raises(SpaceError, match=r"extra_body\.late_chunking"):
        frameworks.runner.run(async_client.embeddings.create(model=MODEL, input=TEXTS, extra_body=LATE))
    inner = OpenAIEmbeddingClient(model=MODEL, async_client=frameworks.async_client)
    wrapped: Any = CachedEmbeddingClient(inner, config=frameworks.tiers)
    with pytest.raises(SpaceError, match="late_chunking"):
        frameworks.runner.run(wrapped.get_embeddings(TEXTS, options={"extra_body": LATE}))
    embeddings = CachedEmbeddings(OpenAIEmbeddings(model=MODEL, api_key=KEY), config=frameworks.tiers)
    with pytest.raises(SpaceError, match="late_chunking"):
        embeddings.embed_documents(TEXTS, extra_body=LATE)
