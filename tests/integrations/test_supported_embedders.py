"""Every supported embedder that is installed: its description is the same before and after its first calls."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from agent_framework.openai import OpenAIEmbeddingClient
from chromadb.utils.embedding_functions import OpenAIEmbeddingFunction, SentenceTransformerEmbeddingFunction
from haystack import Document
from haystack.components.embedders import (
    AzureOpenAIDocumentEmbedder,
    AzureOpenAITextEmbedder,
    OpenAIDocumentEmbedder,
    OpenAITextEmbedder,
)
from haystack.utils import Secret
from haystack_integrations.components.embedders.sentence_transformers import (
    SentenceTransformersDocumentEmbedder,
    SentenceTransformersTextEmbedder,
)
from langchain_classic.embeddings import CacheBackedEmbeddings
from langchain_core.embeddings import DeterministicFakeEmbedding
from langchain_core.stores import InMemoryByteStore
from langchain_openai import AzureOpenAIEmbeddings, OpenAIEmbeddings
from llama_index.core import MockEmbedding
from llama_index.embeddings.openai import OpenAIEmbedding

from embedonce.testing import OpenAIServer
from embedonce_integrations.agent_framework import CachedEmbeddingClient
from embedonce_integrations.chroma import CachedEmbeddingFunction
from embedonce_integrations.describing import describe_embedder
from embedonce_integrations.langchain import CachedEmbeddings
from embedonce_integrations.llama_index import CachedEmbedding
from haystack_integrations.components.embedders.embedonce import CachedDocumentEmbedder, CachedTextEmbedder

MODEL = "text-embedding-3-small"
KEY = "sk-0123456789-do-not-tell"
TIERS: dict[str, Any] = {"tiers": [{"type": "memory"}]}
TEXTS = ["Green tea is steamed.", "Black tea is oxidised."]


class Embedders:
    """Makes each embedder, its wrapper, and a function that calls the embedder itself."""

    def __init__(self, server: OpenAIServer, minilm: str, runner: asyncio.Runner) -> None:
        self.server = server
        self.minilm = minilm
        self.runner = runner
        self.azure = {"azure_endpoint": server.url, "api_version": "2024-10-21"}

    def langchain_openai(self) -> Any:
        return self._langchain(self._make_langchain_openai())

    def _make_langchain_openai(self) -> OpenAIEmbeddings:
        # Otherwise the embedder downloads a tokenizer.
        return OpenAIEmbeddings(
            model=MODEL, base_url=self.server.base_url, api_key=KEY, check_embedding_ctx_length=False
        )

    def langchain_azure(self) -> Any:
        inner = AzureOpenAIEmbeddings(
            model=MODEL, azure_deployment="mine", api_key=KEY, check_embedding_ctx_length=False, **self.azure
        )
        return self._langchain(inner)

    def langchain_hugging_face(self) -> Any:
        from langchain_huggingface import HuggingFaceEmbeddings

        return self._langchain(HuggingFaceEmbeddings(model_name=self.minilm, model_kwargs={"device": "cpu"}))

    def langchain_cache_backed(self) -> Any:
        store = InMemoryByteStore()
        inner = self._make_langchain_openai()
        return self._langchain(
            CacheBackedEmbeddings.from_bytes_store(inner, store, namespace="a_b", key_encoder="sha256")
        )

    def langchain_fake(self) -> Any:
        return self._langchain(DeterministicFakeEmbedding(size=8))

    def _langchain(self, inner: Any) -> Any:
        return inner, CachedEmbeddings, lambda: (inner.embed_documents(TEXTS), inner.embed_query(TEXTS[0]))

    def llama_index_openai(self) -> Any:
        return self._llama_index(OpenAIEmbedding(model_name=MODEL, api_base=self.server.base_url, api_key=KEY))

    def llama_index_openai_with_a_client_per_call(self) -> Any:
        inner = OpenAIEmbedding(model_name=MODEL, api_base=self.server.base_url, api_key=KEY, reuse_client=False)
        return self._llama_index(inner)

    def llama_index_hugging_face(self) -> Any:
        from llama_index.embeddings.huggingface import HuggingFaceEmbedding

        return self._llama_index(HuggingFaceEmbedding(self.minilm, device="cpu", query_instruction="query: "))

    def llama_index_mock(self) -> Any:
        return self._llama_index(MockEmbedding(embed_dim=8))

    def _llama_index(self, inner: Any) -> Any:
        def call() -> None:
            inner.get_text_embedding_batch(TEXTS)
            inner.get_query_embedding(TEXTS[0])

        return inner, CachedEmbedding, call

    def chroma_openai(self) -> Any:
        inner = OpenAIEmbeddingFunction(
            model_name=MODEL, api_base=self.server.base_url, api_key_env_var="OPENAI_API_KEY"
        )
        return inner, CachedEmbeddingFunction, lambda: inner(TEXTS)

    def chroma_sentence_transformers(self) -> Any:
        inner = SentenceTransformerEmbeddingFunction(model_name=self.minilm, device="cpu")
        return inner, CachedEmbeddingFunction, lambda: (inner(TEXTS), inner.embed_query(TEXTS))

    def haystack_openai_documents(self) -> Any:
        inner = OpenAIDocumentEmbedder(Secret.from_token(KEY), MODEL, api_base_url=self.server.base_url)
        return self._haystack(inner)

    def haystack_openai_texts(self) -> Any:
        inner = OpenAITextEmbedder(Secret.from_token(KEY), MODEL, api_base_url=self.server.base_url)
        return self._haystack(inner)

    def haystack_azure_documents(self) -> Any:
        inner = AzureOpenAIDocumentEmbedder(azure_deployment="mine", api_key=Secret.from_token(KEY), **self.azure)
        return self._haystack(inner)

    def haystack_azure_texts(self) -> Any:
        inner = AzureOpenAITextEmbedder(azure_deployment="mine", api_key=Secret.from_token(KEY), **self.azure)
        return self._haystack(inner)

    def haystack_sentence_transformers_documents(self) -> Any:
        return self._haystack(SentenceTransformersDocumentEmbedder(model=self.minilm, progress_bar=False))

    def haystack_sentence_transformers_texts(self) -> Any:
        return self._haystack(SentenceTransformersTextEmbedder(model=self.minilm, progress_bar=False))

    def _haystack(self, inner: Any) -> Any:
        def call() -> None:
            inner.warm_up()
            is_text = "TextEmbedder" in type(inner).__name__
            inner.run(TEXTS[0]) if is_text else inner.run([Document(content=text) for text in TEXTS])

        wrapper = CachedTextEmbedder if "TextEmbedder" in type(inner).__name__ else CachedDocumentEmbedder
        return inner, wrapper, call

    def agent_framework_openai(self) -> Any:
        client = openai.AsyncOpenAI(base_url=self.server.base_url, api_key=KEY)
        inner = OpenAIEmbeddingClient(model=MODEL, async_client=client)

        async def call() -> None:
            await inner.get_embeddings(TEXTS)
            await client.close()

        return inner, CachedEmbeddingClient, lambda: self.runner.run(call())


NAMES = [name for name in vars(Embedders) if not name.startswith("_")]


@pytest.fixture
def embedders(minilm_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Embedders]:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    server = OpenAIServer(dimensions=8, deployments={"mine": MODEL})
    with server, asyncio.Runner() as runner:
        yield Embedders(server, str(minilm_path), runner)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning")
@pytest.mark.parametrize("name", NAMES)
def test_the_description_is_the_same_before_and_after_the_first_calls(embedders: Embedders, name: str) -> None:
    inner, wrapper, call = getattr(embedders, name)()
    wrap: Callable[..., Any] = wrapper
    first = wrap(inner, config=TIERS)
    before = [describe_embedder(inner), *_list_spaces(first)]
    call()
    after = [describe_embedder(inner), *_list_spaces(wrap(inner, config=TIERS))]
    assert after == before
    assert not any(KEY in repr(space) for space in before)
    # Collect the connections here, where their warnings are ignored.
    del inner, first, call, wrapper, wrap
    gc.collect()


def _list_spaces(wrapped: Any) -> list[Any]:
    """Return the vector spaces of a wrapper that has one cache, for both tasks."""
    cache = getattr(wrapped, "cache", None)
    return [] if cache is None else [cache.provider.space(task) for task in ("document", "query")]
