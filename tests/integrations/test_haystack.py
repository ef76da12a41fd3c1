"""Haystack: real pipelines, a real model, OpenAI's client against its API on loopback, embedders that misbehave."""

from __future__ import annotations

import asyncio
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import haystack
import numpy as np
import pytest
from haystack import Document, Pipeline, component
from haystack.components.embedders import OpenAIDocumentEmbedder, OpenAITextEmbedder
from haystack.components.retrievers.in_memory import InMemoryEmbeddingRetriever
from haystack.components.writers import DocumentWriter
from haystack.document_stores.in_memory import InMemoryDocumentStore
from haystack.document_stores.types import DuplicatePolicy
from haystack.utils import Secret
from haystack_integrations.components.embedders.embedonce import CachedDocumentEmbedder, CachedTextEmbedder
from haystack_integrations.components.embedders.sentence_transformers import (
    SentenceTransformersDocumentEmbedder,
    SentenceTransformersTextEmbedder,
)
from hypothesis import given
from hypothesis import strategies as st

from embedonce import ConfigError, ProviderError, SpaceError
from embedonce.testing import OpenAIServer
from embedonce_integrations.wrapping import shared_cache

AsyncPipeline: Any = getattr(haystack, "AsyncPipeline", Pipeline)  # Haystack 3 has one class for both
NGRAM: dict[str, Any] = {"provider": {"type": "ngram", "dimensions": 64}}
MEMORY: dict[str, Any] = {"tiers": [{"type": "memory"}]}
KEY = "sk-secret-of-the-test"


def vector_of(text: str, salt: str = "") -> list[float]:
    """Return a vector that no other text has."""
    random = np.random.default_rng(list(f"{salt}|{text}".encode()))
    return [float(value) for value in random.standard_normal(8, dtype=np.float32)]


@component
class Embedder:
    """An embedder as people write them, which counts, and misbehaves on demand."""

    def __init__(
        self,
        model: str = "m",
        prefix: str = "",
        suffix: str = "",
        meta_fields_to_embed: list[str] | None = None,
        embedding_separator: str = "\n",
        batch_size: int = 32,
    ) -> None:
        self.model = model
        self.prefix = prefix
        self.suffix = suffix
        self.meta_fields_to_embed = meta_fields_to_embed or []
        self.embedding_separator = embedding_separator
        self.batch_size = batch_size
        self.count: Counter[str] = Counter()
        self.calls: list[str] = []
        self.spoil: Callable[[list[Document]], list[Document]] = list

    def warm_up(self) -> None:
        self.calls.append("warm_up")

    def close(self) -> None:
        self.calls.append("close")

    def _prepare_texts_to_embed(self, documents: list[Document]) -> list[str]:
        texts = []
        for document in documents:
            values = [
                str(document.meta[key]) for key in self.meta_fields_to_embed if document.meta.get(key) is not None
            ]
            texts.append(self.prefix + self.embedding_separator.join([*values, document.content or ""]) + self.suffix)
        return texts

    @component.output_types(documents=list[Document], meta=dict[str, Any])
    def run(self, documents: list[Document]) -> dict[str, Any]:
        self.calls.append("run")
        texts = self._prepare_texts_to_embed(documents)
        self.count.update(texts)
        embedded = [
            replace(document, embedding=vector_of(text, self.model))
            for document, text in zip(documents, texts, strict=True)
        ]
        return {"documents": self.spoil(embedded), "meta": {"model": self.model, "usage": {"total_tokens": len(texts)}}}


@component
class Bare:
    """An embedder that says nothing of itself."""

    def __init__(self) -> None:
        self.seen: list[Document] = []

    @component.output_types(documents=list[Document])
    def run(self, documents: list[Document]) -> dict[str, Any]:
        self.seen += documents
        return {"documents": [replace(one, embedding=vector_of(one.content or "")) for one in documents]}


def embeddings(output: dict[str, Any]) -> list[Any]:
    return [document.embedding for document in output["documents"]]


def float32(vectors: list[list[float]]) -> list[list[float]]:
    return [np.float32(vector).tolist() for vector in vectors]


def documents(*contents: str) -> list[Document]:
    return [Document(content=content) for content in contents]


@pytest.fixture
def disk(tmp_path: Path) -> dict[str, Any]:
    return {"tiers": [{"type": "memory"}, {"type": "disk", "path": str(tmp_path / "vectors")}]}


# --- a real model, in real pipelines ----------------------------------------------------------

CORPUS = [
    Document(content=text, meta={"source": f"{number}.md"})
    for number, text in enumerate(
        [
            "Green tea is steamed soon after it is picked.",
            "Black tea is rolled and oxidised.",
            "White tea is left to wither in the sun.",
            "Coffee beans are roasted between 180 and 240 degrees.",
            "A bicycle chain wants oil after every ride in the rain.",
            "Sourdough rises slowly in a cold kitchen.",
            "The moon takes 27 days to go round the earth.",
            "Granite is made of quartz, feldspar and mica.",
        ]
    )
]
QUESTIONS = ["How is green tea made?", "What are rocks made of?", "How do I look after my bike?"]


class Model:
    """Counts what goes through the model itself."""

    def __init__(self) -> None:
        self.passes = 0
        self.texts = 0

    def __call__(self, module: Any, given: Any, output: Any) -> None:
        from sentence_transformers import SentenceTransformer

        if isinstance(module, SentenceTransformer):
            self.passes += 1
            self.texts += len(given[0]["input_ids"])


@pytest.fixture
def model() -> Iterator[Model]:
    from torch.nn.modules.module import register_module_forward_hook

    counting = Model()
    hook = register_module_forward_hook(counting)
    yield counting
    hook.remove()


@pytest.fixture
def minilm(minilm_path: Path) -> dict[str, Any]:
    return {"model": str(minilm_path), "progress_bar": False}


def ingestion(embedder: Any, store: InMemoryDocumentStore) -> Any:
    pipeline = AsyncPipeline()
    pipeline.add_component("embedder", embedder)
    pipeline.add_component("writer", DocumentWriter(store, policy=DuplicatePolicy.OVERWRITE))
    pipeline.connect("embedder.documents", "writer.documents")
    return pipeline


def answers(embedder: Any, store: InMemoryDocumentStore) -> list[list[tuple[str, float | None]]]:
    pipeline = Pipeline()
    pipeline.add_component("embedder", embedder)
    pipeline.add_component("retriever", InMemoryEmbeddingRetriever(store, top_k=5))
    pipeline.connect("embedder.embedding", "retriever.query_embedding")
    found = [pipeline.run({"embedder": {"text": question}})["retriever"]["documents"] for question in QUESTIONS]
    return [[(document.id, document.score) for document in ranking] for ranking in found]


def ingest(embedder: Any, corpus: list[Document]) -> tuple[InMemoryDocumentStore, dict[str, Any]]:
    store = InMemoryDocumentStore()
    output = ingestion(embedder, store).run({"embedder": {"documents": corpus}}, include_outputs_from={"embedder"})
    assert output["writer"]["documents_written"] == len(corpus)
    assert all(document.embedding for document in store.filter_documents())
    return store, output["embedder"].get("meta", {})


def test_the_second_pass_runs_no_model_and_retrieves_the_same(
    minilm: dict[str, Any], model: Model, disk: dict[str, Any]
) -> None:
    plain, _ = ingest(SentenceTransformersDocumentEmbedder(**minilm), CORPUS)
    expected = answers(SentenceTransformersTextEmbedder(**minilm), plain)
    assert model.texts == len(CORPUS) + len(QUESTIONS)

    cold, meta = ingest(CachedDocumentEmbedder(SentenceTransformersDocumentEmbedder(**minilm), config=disk), CORPUS)
    assert meta["cache"] == {"hits": {}, "computed": len(CORPUS), "failed": 0}
    assert answers(CachedTextEmbedder(SentenceTransformersTextEmbedder(**minilm), config=disk), cold) == expected
    model.passes = 0

    texts, queries = SentenceTransformersDocumentEmbedder(**minilm), SentenceTransformersTextEmbedder(**minilm)
    warm, meta = ingest(CachedDocumentEmbedder(texts, config=disk), CORPUS)
    assert meta["cache"] == {"hits": {"memory": len(CORPUS)}, "computed": 0, "failed": 0}
    assert answers(CachedTextEmbedder(queries, config=disk), warm) == expected
    assert model.passes == 0
    assert texts.embedding_backend is None, "the model was not even loaded"
    assert queries.embedding_backend is None

    by_id = {one.id: one.embedding for one in plain.filter_documents()}
    for store in (cold, warm):
        assert {one.id: one.embedding for one in store.filter_documents()} == by_id


def test_one_document_changed_is_one_embedded(minilm: dict[str, Any], model: Model, disk: dict[str, Any]) -> None:
    embedder = CachedDocumentEmbedder(SentenceTransformersDocumentEmbedder(**minilm), config=disk)
    first, _ = ingest(embedder, CORPUS)
    model.texts = 0
    changed = [
        replace(one, content=f"{one.content} Or so they say.") if i == 3 else one for i, one in enumerate(CORPUS)
    ]
    second, meta = ingest(CachedDocumentEmbedder(SentenceTransformersDocumentEmbedder(**minilm), config=disk), changed)
    assert model.texts == 1
    assert meta["cache"] == {"hits": {"memory": len(CORPUS) - 1}, "computed": 1, "failed": 0}
    before, after = ({one.id: one.embedding for one in store.filter_documents()} for store in (first, second))
    assert {name for name in before if before[name] != after[name]} == {CORPUS[3].id}


async def test_an_async_pipeline_does_the_same(minilm: dict[str, Any], model: Model, disk: dict[str, Any]) -> None:
    for passes in (1, 0):
        model.passes = 0
        store = InMemoryDocumentStore()
        embedder = CachedDocumentEmbedder(SentenceTransformersDocumentEmbedder(**minilm), config=disk)
        await ingestion(embedder, store).run_async({"embedder": {"documents": CORPUS}})
        assert model.passes == passes
    expected = SentenceTransformersDocumentEmbedder(**minilm)
    expected.warm_up()
    by_id = {one.id: one.embedding for one in expected.run(documents=CORPUS)["documents"]}
    assert {one.id: one.embedding for one in store.filter_documents()} == by_id


def test_a_version_leaves_old_vectors_behind_and_purge_removes_them(
    minilm: dict[str, Any], model: Model, disk: dict[str, Any]
) -> None:
    embedder = SentenceTransformersDocumentEmbedder(**minilm)
    ingest(CachedDocumentEmbedder(embedder, config=disk), CORPUS)
    model.texts = 0
    newer = {**disk, "key": {"version": "v2"}}
    ingest(CachedDocumentEmbedder(embedder, config=newer), CORPUS)
    assert model.texts == len(CORPUS)
    cache = shared_cache({**newer, **NGRAM})
    assert cache.purge(version="v1").removed["disk"] == len(CORPUS)
    _, meta = ingest(CachedDocumentEmbedder(embedder, config=newer), CORPUS)
    assert meta["cache"]["computed"] == 0
    assert {held.card["version"] for held in cache.contents() if held.card and held.tier == "disk"} == {"v2"}


def test_weights_that_change_in_place_are_another_model(minilm_path: Path, tmp_path: Path) -> None:
    folder, elsewhere = tmp_path / "model", tmp_path / "elsewhere"
    shutil.copytree(minilm_path, folder)

    def described(path: Path) -> str:
        embedder = CachedDocumentEmbedder(SentenceTransformersDocumentEmbedder(model=str(path)), config=MEMORY)
        return str(embedder.run(documents=[])["meta"]["model"])

    before = described(folder)
    assert before == described(minilm_path), "a copy is the same model, wherever it lies"
    (folder / "README.md").write_text("Read me.")
    assert described(folder) == before
    embedder = CachedDocumentEmbedder(SentenceTransformersDocumentEmbedder(model=str(folder)), config=MEMORY)
    embedder.warm_up()
    with (folder / "model.safetensors").open("r+b") as weights:
        weights.seek(-1, 2)
        weights.write(b"\x01")
    assert described(folder) != before
    with pytest.raises(SpaceError, match="has changed"):
        embedder.run(documents=documents("opened before, embedded after"))
    folder.rename(elsewhere)
    assert described(elsewhere) not in (before, str(elsewhere))


# --- what a document's vector depends on ------------------------------------------------------

META = st.dictionaries(st.sampled_from(["title", "year", "other"]), st.sampled_from(["", "a", "\n", 0, None, 1999]))
DOCUMENTS = st.builds(
    lambda content, meta: Document(content=content, meta=meta),
    st.sampled_from([None, "", "a", "b", "a\nb", "None", " a"]),
    META,
)


@given(st.lists(st.lists(DOCUMENTS, max_size=8), min_size=1, max_size=4), st.sampled_from([1, 3]), st.booleans())
def test_every_document_has_the_vector_of_its_own_text(
    runs: list[list[Document]], batch_size: int, with_meta: bool
) -> None:
    options: dict[str, Any] = {"prefix": "p ", "suffix": " s", "embedding_separator": "\n", "batch_size": batch_size}
    options["meta_fields_to_embed"] = ["title", "year"] if with_meta else None
    inner, plain = Embedder(**options), Embedder(**options)
    embedder = CachedDocumentEmbedder(inner, config={**MEMORY, "key": {"namespace": "hypothesis"}})
    assert embedder._cache is None
    shared_cache({**MEMORY, **NGRAM, "key": {"namespace": "hypothesis"}}).purge(namespace="hypothesis")
    for given_documents in runs:
        before = [replace(one) for one in given_documents]
        output = embedder.run(documents=given_documents)
        expected = plain.run(documents=given_documents)["documents"]
        assert [replace(one, embedding=None) for one in output["documents"]] == before
        assert given_documents == before, "what was handed in is left alone"
        assert embeddings(output) == [one.embedding for one in expected]


def test_equal_texts_are_computed_once() -> None:
    inner = Embedder(meta_fields_to_embed=["title"], embedding_separator=": ")
    embedder = CachedDocumentEmbedder(inner, config={**MEMORY, "key": {"namespace": "equal"}})
    first, second = Document(content="tea", meta={"title": "green"}), Document(content="green: tea", meta={"page": 2})
    output = embedder.run(documents=[first, second, first])
    assert inner.count == {"green: tea": 1}
    assert output["meta"]["cache"] == {"hits": {}, "computed": 1, "failed": 0}
    assert embeddings(output)[0] == embeddings(output)[1]
    assert [one.meta for one in output["documents"]] == [first.meta, second.meta, first.meta]
