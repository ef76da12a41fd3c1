"""Tests for Haystack, with real pipelines, a real model, OpenAI's client on loopback, and faulty embedders."""

from __future__ import annotations

import asyncio
import copy
import pickle
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
from haystack.components.embedders import (
    AzureOpenAITextEmbedder,
    MockTextEmbedder,
    OpenAIDocumentEmbedder,
    OpenAITextEmbedder,
)
from haystack.components.retrievers.in_memory import InMemoryEmbeddingRetriever
from haystack.components.writers import DocumentWriter
from haystack.dataclasses import SparseEmbedding
from haystack.document_stores.in_memory import InMemoryDocumentStore
from haystack.document_stores.types import DuplicatePolicy
from haystack.utils import Secret
from haystack_integrations.components.embedders.sentence_transformers import (
    SentenceTransformersDocumentEmbedder,
    SentenceTransformersSparseTextEmbedder,
    SentenceTransformersTextEmbedder,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from sentence_transformers import SentenceTransformer

from embedonce import ConfigError, ProviderError, SpaceError
from embedonce.testing import OpenAIServer
from embedonce_integrations.wrapping import open_shared_cache
from haystack_integrations.components.embedders.embedonce import CachedDocumentEmbedder, CachedTextEmbedder
from haystack_integrations.components.embedders.embedonce._described import describe_component

from .embedder_settings import Pair, attach, pairs

AsyncPipeline: Any = getattr(haystack, "AsyncPipeline", Pipeline)  # Haystack 3 has one class for both
NGRAM: dict[str, Any] = {"provider": {"type": "ngram", "dimensions": 64}}
MEMORY: dict[str, Any] = {"tiers": [{"type": "memory"}]}
KEY = "sk-secret-of-the-test"


def vector_of(text: str, salt: str = "") -> list[float]:
    """Return a vector that is unique to the text."""
    random = np.random.default_rng(list(f"{salt}|{text}".encode()))
    return [float(value) for value in random.standard_normal(8, dtype=np.float32)]


@component
class Embedder:
    """A typical custom embedder, which counts its texts and can be made to misbehave."""

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
        return {
            "documents": self.spoil(embedded),
            "meta": {"model": self.model, "usage": {"total_tokens": len(texts)}},
        }


@component
class Bare:
    """An embedder without any description of its vectors."""

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


def close(*embedders: Any) -> None:
    for embedder in embedders:
        if hasattr(embedder, "close"):  # Haystack 3
            embedder.close()


def documents(*contents: str) -> list[Document]:
    return [Document(content=content) for content in contents]


@pytest.fixture
def disk(tmp_path: Path) -> dict[str, Any]:
    disk = {"type": "disk", "path": str(tmp_path / "vectors"), "timeout": "60s"}  # long enough for a busy machine
    return {"tiers": [{"type": "memory"}, disk]}


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
    """Counts the texts that go through the model itself."""

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

    counter = Model()
    hook = register_module_forward_hook(counter)
    yield counter
    hook.remove()


@pytest.fixture
def minilm(minilm_path: Path) -> dict[str, Any]:
    return {"model": str(minilm_path), "progress_bar": False}


def make_pipeline(embedder: Any, store: InMemoryDocumentStore) -> Any:
    pipeline = AsyncPipeline()
    pipeline.add_component("embedder", embedder)
    pipeline.add_component("writer", DocumentWriter(store, policy=DuplicatePolicy.OVERWRITE))
    pipeline.connect("embedder.documents", "writer.documents")
    return pipeline


def retrieve(embedder: Any, store: InMemoryDocumentStore) -> list[list[tuple[str, float | None]]]:
    pipeline = Pipeline()
    pipeline.add_component("embedder", embedder)
    pipeline.add_component("retriever", InMemoryEmbeddingRetriever(store, top_k=5))
    pipeline.connect("embedder.embedding", "retriever.query_embedding")
    found = [pipeline.run({"embedder": {"text": question}})["retriever"]["documents"] for question in QUESTIONS]
    return [[(document.id, document.score) for document in ranking] for ranking in found]


def ingest(embedder: Any, corpus: list[Document]) -> tuple[InMemoryDocumentStore, dict[str, Any]]:
    store = InMemoryDocumentStore()
    output = make_pipeline(embedder, store).run({"embedder": {"documents": corpus}}, include_outputs_from={"embedder"})
    assert output["writer"]["documents_written"] == len(corpus)
    assert all(document.embedding for document in store.filter_documents())
    return store, output["embedder"].get("meta", {})


def test_the_second_pass_runs_no_model_and_retrieves_the_same(
    minilm: dict[str, Any], model: Model, disk: dict[str, Any]
) -> None:
    plain, _ = ingest(SentenceTransformersDocumentEmbedder(**minilm), CORPUS)
    expected = retrieve(SentenceTransformersTextEmbedder(**minilm), plain)
    assert model.texts == len(CORPUS) + len(QUESTIONS)

    # Keep the cache, because the memory tier lives only as long as a cache that uses it.
    first = CachedDocumentEmbedder(SentenceTransformersDocumentEmbedder(**minilm), config=disk)
    cold, meta = ingest(first, CORPUS)
    assert meta["cache"] == {"hits": {}, "computed": len(CORPUS), "failed": 0}
    assert retrieve(CachedTextEmbedder(SentenceTransformersTextEmbedder(**minilm), config=disk), cold) == expected
    model.passes = 0

    texts, queries = SentenceTransformersDocumentEmbedder(**minilm), SentenceTransformersTextEmbedder(**minilm)
    warm, meta = ingest(CachedDocumentEmbedder(texts, config=disk), CORPUS)
    assert meta["cache"] == {"hits": {"memory": len(CORPUS)}, "computed": 0, "failed": 0}
    assert retrieve(CachedTextEmbedder(queries, config=disk), warm) == expected
    assert model.passes == 0
    assert texts.embedding_backend is None, "the model was not even loaded"
    assert queries.embedding_backend is None

    by_id = {one.id: one.embedding for one in plain.filter_documents()}
    for store in (cold, warm):
        assert {one.id: one.embedding for one in store.filter_documents()} == by_id


def test_after_one_document_changed_one_is_embedded(minilm: dict[str, Any], model: Model, disk: dict[str, Any]) -> None:
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
        await make_pipeline(embedder, store).run_async({"embedder": {"documents": CORPUS}})
        assert model.passes == passes
    expected = SentenceTransformersDocumentEmbedder(**minilm)
    expected.warm_up()
    by_id = {one.id: one.embedding for one in expected.run(documents=CORPUS)["documents"]}
    assert {one.id: one.embedding for one in store.filter_documents()} == by_id


def test_a_new_version_ignores_old_vectors_and_purge_removes_them(
    minilm: dict[str, Any], model: Model, disk: dict[str, Any]
) -> None:
    embedder = SentenceTransformersDocumentEmbedder(**minilm)
    ingest(CachedDocumentEmbedder(embedder, config=disk), CORPUS)
    model.texts = 0
    newer = {**disk, "key": {"version": "v2"}}
    ingest(CachedDocumentEmbedder(embedder, config=newer), CORPUS)
    assert model.texts == len(CORPUS)
    cache = open_shared_cache({**newer, **NGRAM})
    assert cache.purge(version="v1").removed["disk"] == len(CORPUS)
    _, meta = ingest(CachedDocumentEmbedder(embedder, config=newer), CORPUS)
    assert meta["cache"]["computed"] == 0
    assert {held.card["version"] for held in cache.contents() if held.card and held.tier == "disk"} == {"v2"}


def test_weights_changed_in_place_are_another_model(minilm_path: Path, tmp_path: Path) -> None:
    folder, elsewhere = tmp_path / "model", tmp_path / "elsewhere"
    shutil.copytree(minilm_path, folder)

    def model_of(path: Path) -> str:
        embedder = CachedDocumentEmbedder(SentenceTransformersDocumentEmbedder(model=str(path)), config=MEMORY)
        return str(embedder.run(documents=[])["meta"]["model"])

    before = model_of(folder)
    assert before == model_of(minilm_path), "a copy in another folder is the same model"
    (folder / "README.md").write_text("Read me.")
    assert model_of(folder) == before
    embedder = CachedDocumentEmbedder(SentenceTransformersDocumentEmbedder(model=str(folder)), config=MEMORY)
    embedder.warm_up()
    with (folder / "model.safetensors").open("r+b") as weights:
        weights.seek(-1, 2)
        weights.write(b"\x01")
    assert model_of(folder) != before
    with pytest.raises(SpaceError, match="has changed"):
        embedder.run(documents=documents("opened before, embedded after"))
    folder.rename(elsewhere)
    assert model_of(elsewhere) not in (before, str(elsewhere))


def test_a_model_that_haystack_loaded_before_its_folder_changed_is_not_used(minilm_path: Path, tmp_path: Path) -> None:
    """Haystack's embedders share loaded models by the name of the folder."""
    folder = tmp_path / "model"
    shutil.copytree(minilm_path, folder)

    def run_embedder(plain: SentenceTransformersDocumentEmbedder) -> Any:
        answer = CachedDocumentEmbedder(plain, config=MEMORY).run(documents=documents("the same text"))
        return np.float32(answer["documents"][0].embedding)

    plain = SentenceTransformersDocumentEmbedder(model=str(folder), progress_bar=False)
    plain.warm_up()  # outside of any cache
    weights = load_file(folder / "model.safetensors")
    name = "embeddings.word_embeddings.weight"
    save_file({**weights, name: weights[name][:, ::-1].copy()}, folder / "model.safetensors", {"format": "pt"})
    truth = SentenceTransformer(str(folder), device="cpu").encode("the same text")
    other = SentenceTransformersDocumentEmbedder(model=str(folder), progress_bar=False)
    np.testing.assert_allclose(run_embedder(other), truth, atol=1e-6)
    third = SentenceTransformersDocumentEmbedder(model=str(folder), progress_bar=False)
    third.warm_up()
    assert third.embedding_backend is other.embedding_backend, "models loaded after the change are shared as before"
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(SpaceError, match="before its model's folder changed"):
        run_embedder(third)


# --- effective texts and vector spaces --------------------------------------------------------

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
    for given_documents in runs:
        before = [replace(one) for one in given_documents]
        output = embedder.run(documents=given_documents)
        expected = plain.run(documents=given_documents)["documents"]
        assert [replace(one, embedding=None) for one in output["documents"]] == before
        assert given_documents == before, "the given documents must not change"
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


def test_the_text_is_normalised_without_prefix_and_suffix() -> None:
    inner = Embedder(prefix="passage: ", suffix=" .", meta_fields_to_embed=["title"])
    config = {**MEMORY, "key": {"normalize": ["strip"], "namespace": "normalised"}}
    embedder = CachedDocumentEmbedder(inner, config=config)
    output = embedder.run(documents=[Document(content="tea \n", meta={"title": " green"}), *documents("tea", " tea")])
    assert inner.count == {"passage: green\ntea .": 1, "passage: tea .": 1}
    assert output["meta"]["cache"]["computed"] == 2
    assert embeddings(output)[1] == embeddings(output)[2] == vector_of("passage: tea .", "m")


def test_another_embedder_is_another_space() -> None:
    config = {**MEMORY, "key": {"namespace": "spaces"}}
    made: list[CachedDocumentEmbedder] = []  # keeps the memory tier alive

    def run_embedder(**options: Any) -> int:
        made.append(CachedDocumentEmbedder(Embedder(**options), config=config))
        output = made[-1].run(documents=documents("tea"))
        assert embeddings(output) == [one.embedding for one in Embedder(**options).run(documents("tea"))["documents"]]
        return int(output["meta"]["cache"]["computed"])

    assert run_embedder() == 1
    assert run_embedder(batch_size=1) == 0
    assert run_embedder(embedding_separator="; ", meta_fields_to_embed=["title"]) == 0, (
        "the separator is part of the text"
    )
    for options in ({"model": "n"}, {"prefix": "p"}, {"suffix": "p"}):
        assert run_embedder(**options) == 1


def test_further_arguments_of_run_are_passed_on_and_part_of_the_space() -> None:
    @component
    class Styled:
        meta_fields_to_embed: list[str] = []  # noqa: RUF012

        def __init__(self, model: str = "styled") -> None:
            self.model = model
            self.count: Counter[Any] = Counter()

        @component.output_types(documents=list[Document])
        def run(self, documents: list[Document], style: str = "plain", level: int | None = None) -> dict[str, Any]:
            self.count.update((one.content, style, level) for one in documents)
            embedded = [replace(one, embedding=vector_of(f"{one.content} {style} {level}")) for one in documents]
            return {"documents": embedded}

    inner = Styled()
    embedder = CachedDocumentEmbedder(inner, config={**MEMORY, "key": {"namespace": "styled"}})
    pipeline = Pipeline()
    pipeline.add_component("embedder", embedder)
    tea = documents("tea")
    for _ in range(2):
        assert embeddings(embedder.run(documents=tea)) == [vector_of("tea plain None")]
        assert embeddings(embedder.run(documents=tea, style="bold")) == [vector_of("tea bold None")]
        output = pipeline.run({"embedder": {"documents": tea, "style": "bold", "level": 3}})["embedder"]
        assert embeddings(output) == [vector_of("tea bold 3")]
        assert embeddings(pipeline.run({"embedder": {"documents": tea}})["embedder"]) == [vector_of("tea plain None")]
    assert set(inner.count.values()) == {1}
    with pytest.raises(TypeError, match="colour"):
        embedder.run(documents=tea, colour="red")
    with pytest.raises(TypeError, match="style"):
        CachedDocumentEmbedder(config={**MEMORY, **NGRAM}).run(documents=tea, style="bold")


# --- faulty embedders -------------------------------------------------------------------------


def test_documents_in_another_order_keep_their_vectors() -> None:
    inner = Embedder()
    inner.spoil = lambda embedded: embedded[::-1]
    output = CachedDocumentEmbedder(inner, config={**MEMORY, "key": {"namespace": "order"}}, ignore=["spoil"]).run(
        documents=documents("a", "b", "c")
    )
    assert embeddings(output) == [vector_of(text, "m") for text in "abc"]


@pytest.mark.parametrize(
    "spoil",
    [lambda found: [found[0], *found[2:]], lambda found: [found[0], replace(found[1], embedding=None), *found[2:]]],
    ids=["fewer", "none"],
)
def test_a_document_without_an_embedding_is_tried_again_in_the_next_run(
    spoil: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    inner = Embedder()
    config = {**MEMORY, "key": {"namespace": f"failed {spoil(documents('1', '2', '3'))[1].content}"}}
    embedder = CachedDocumentEmbedder(inner, config=config, ignore=["spoil"])
    given_documents = [replace(one, embedding=[1.0]) for one in documents("a", "b", "c", "b")]
    inner.spoil = spoil
    output = embedder.run(documents=given_documents)
    assert embeddings(output) == [vector_of("a", "m"), None, vector_of("c", "m"), None]
    assert output["meta"]["cache"] == {"hits": {}, "computed": 2, "failed": 2}
    assert inner.calls.count("run") == 1, "the other texts of the call are not embedded again"
    assert f"2 of 4 documents got no embedding: {given_documents[1].id}" in caplog.text

    inner.spoil = list
    output = embedder.run(documents=given_documents)
    assert embeddings(output) == [vector_of(text, "m") for text in "abcb"]
    assert output["meta"]["cache"] == {"hits": {"memory": 2}, "computed": 1, "failed": 0}
    assert inner.count == {"a": 1, "b": 2, "c": 1}


@pytest.mark.parametrize(
    "spoil",
    [
        lambda found: [*found, found[0]],
        lambda found: [*found, Document(content="new", embedding=[1.0] * 8)],
        lambda found: [replace(one, id="same") for one in found],
        lambda found: [*found[:-1], replace(found[-1], embedding=[float("nan")] * 8)],
        lambda found: [*found[:-1], replace(found[-1], embedding=[1.0] * 7)],
        lambda found: [*found[:-1], replace(found[-1], embedding=[])],
        lambda found: [*found[:-1], replace(found[-1], embedding=[0.0] * 8)],
    ],
    ids=["twice", "more", "same id", "nan", "dimension", "empty", "zeros"],
)
async def test_an_invalid_answer_is_an_error_and_nothing_of_it_is_stored(
    spoil: Callable[..., Any], request: pytest.FixtureRequest
) -> None:
    inner = Embedder()
    embedder = CachedDocumentEmbedder(
        inner, config={**MEMORY, "key": {"namespace": request.node.name}}, ignore=["spoil"]
    )
    embedder.run(documents=documents("a", "b"))
    inner.spoil = spoil
    with pytest.raises(ProviderError):
        embedder.run(documents=documents("c", "a", "d", "b"))
    with pytest.raises(ProviderError):
        await embedder.run_async(documents=documents("c", "a", "d", "b"))
    inner.spoil = list
    output = embedder.run(documents=documents("c", "a", "d", "b"))
    assert embeddings(output) == [vector_of(text, "m") for text in "cadb"]
    # If one vector is invalid, the other one has been stored.
    is_one_row = request.node.callspec.id in ("nan", "dimension", "empty", "zeros")
    expected = {"hits": {"memory": 3}, "computed": 1, "failed": 0}
    assert output["meta"]["cache"] == (expected if is_one_row else {"hits": {"memory": 2}, "computed": 2, "failed": 0})


# --- OpenAI's client ---------------------------------------------------------------------------


@pytest.fixture
def server() -> Iterator[OpenAIServer]:
    with OpenAIServer(dimensions=16, api_key=KEY) as server:
        yield server


@pytest.fixture
def openai(server: OpenAIServer, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    return {"api_base_url": server.base_url, "max_retries": 0, "model": "text-embedding-3-small"}


DOCUMENT_OPTIONS: dict[str, Any] = {
    "prefix": "passage: ",
    "suffix": " .",
    "meta_fields_to_embed": ["title"],
    "progress_bar": False,
    "batch_size": 2,
}
TEAS = [Document(content=f"tea {number}", meta={"title": f"t{number}", "page": number}) for number in range(5)]


def expected_vector(server: OpenAIServer, number: int) -> list[float]:
    return list(np.float32(server.vector_of(f"passage: t{number}\ntea {number} .")).tolist())


@pytest.mark.parametrize("face", ["run", "run_async"])
async def test_only_misses_are_paid_for(
    server: OpenAIServer, openai: dict[str, Any], disk: dict[str, Any], face: str
) -> None:
    embedder = CachedDocumentEmbedder(OpenAIDocumentEmbedder(**openai, **DOCUMENT_OPTIONS), config=disk)

    async def run(teas: list[Document]) -> dict[str, Any]:
        return dict(await embedder.run_async(documents=teas) if face == "run_async" else embedder.run(documents=teas))

    first = await run(TEAS[1:4])
    mixed = await run([TEAS[4], TEAS[2], TEAS[0], TEAS[2], TEAS[1], TEAS[4]])
    assert embeddings(first) == [expected_vector(server, number) for number in (1, 2, 3)]
    assert embeddings(mixed) == [expected_vector(server, number) for number in (4, 2, 0, 2, 1, 4)]
    assert server.texts == 5
    assert mixed["meta"]["cache"] == {"hits": {"memory": 3}, "computed": 2, "failed": 0}
    assert mixed["meta"]["model"] == "text-embedding-3-small"
    plain = OpenAIDocumentEmbedder(**openai, **DOCUMENT_OPTIONS)
    two = plain.run(documents=[TEAS[4], TEAS[0]])
    assert mixed["meta"]["usage"] == two["meta"]["usage"]
    assert embeddings(mixed)[::2] == float32([*embeddings(two), embeddings(first)[0]])
    close(plain)

    assert (await run(TEAS))["meta"] == {
        "model": "text-embedding-3-small",
        "cache": {"hits": {"memory": 5}, "computed": 0, "failed": 0},
    }
    await embedder.close_async()
    embedder.close()


@pytest.mark.parametrize(
    "how", ["short", "long", "empty", "duplicate_index", "nan", "zeros", "dimension", "ragged", "no_values"]
)
async def test_an_invalid_reply_is_an_error(
    server: OpenAIServer, openai: dict[str, Any], disk: dict[str, Any], how: Any
) -> None:
    embedder = CachedDocumentEmbedder(
        OpenAIDocumentEmbedder(**openai, **{**DOCUMENT_OPTIONS, "batch_size": 32}), config=disk
    )
    embedder.run(documents=TEAS[1:3])
    server.misbehave(how, times=2)
    with pytest.raises((ProviderError, ValueError)):
        embedder.run(documents=TEAS)
    with pytest.raises((ProviderError, ValueError)):
        await embedder.run_async(documents=TEAS)
    assert embeddings(embedder.run(documents=TEAS)) == [expected_vector(server, number) for number in range(5)]
    await embedder.close_async()
    embedder.close()


@pytest.mark.parametrize("how", ["out_of_order", "no_index"])
async def test_a_reply_is_sorted_by_index(
    server: OpenAIServer, openai: dict[str, Any], disk: dict[str, Any], how: Any
) -> None:
    """Haystack's own embedder ignores the index of each vector."""
    embedder = CachedDocumentEmbedder(OpenAIDocumentEmbedder(**openai, **DOCUMENT_OPTIONS), config=disk)
    server.misbehave(how, times=None)
    assert embeddings(embedder.run(documents=TEAS[1:3])) == [expected_vector(server, number) for number in (1, 2)]
    output = await embedder.run_async(documents=TEAS)
    assert embeddings(output) == [expected_vector(server, number) for number in range(5)]
    assert server.texts == 5
    await embedder.close_async()
    embedder.close()


@pytest.mark.parametrize("how", ["server_error", "rate_limit", "unauthorized", "disconnect"])
async def test_a_failure_is_not_cached(
    server: OpenAIServer, openai: dict[str, Any], disk: dict[str, Any], how: Any
) -> None:
    """The second of three calls fails. Its documents get no embedding, and the next run embeds them."""
    embedder = CachedDocumentEmbedder(OpenAIDocumentEmbedder(**openai, **DOCUMENT_OPTIONS), config=disk)
    embedder.run(documents=TEAS[:1])
    server.misbehave(how)
    output = await embedder.run_async(documents=TEAS)
    assert embeddings(output) == [None if i in (1, 2) else expected_vector(server, i) for i in range(5)]
    assert output["meta"]["cache"] == {"hits": {"memory": 1}, "computed": 2, "failed": 2}
    assert embeddings(embedder.run(documents=TEAS)) == [expected_vector(server, number) for number in range(5)]
    assert server.texts == 5

    strict = OpenAIDocumentEmbedder(**{**openai, "model": "other"}, **DOCUMENT_OPTIONS, raise_on_failure=True)
    server.misbehave(how, times=None)
    with pytest.raises(Exception, match=r"Error code|Connection error"):
        CachedDocumentEmbedder(strict, config=disk).run(documents=TEAS)
    server.heal()
    await embedder.close_async()
    embedder.close()
    close(strict)


async def test_a_query_is_paid_for_once(server: OpenAIServer, openai: dict[str, Any], disk: dict[str, Any]) -> None:
    embedder = CachedTextEmbedder(OpenAITextEmbedder(**openai, prefix="query: "), config=disk)
    first = embedder.run(text="tea")
    assert first["embedding"] == np.float32(server.vector_of("query: tea")).tolist()
    assert first["meta"]["usage"]["total_tokens"] > 0
    again = await embedder.run_async(text="tea")
    assert again["embedding"] == first["embedding"]
    assert again["meta"]["cache"] == {"hits": {"memory": 1}, "computed": 0, "failed": 0}
    server.misbehave("server_error", times=2)
    for _ in range(2):
        with pytest.raises(Exception, match="500"):
            await embedder.run_async(text="coffee")
    assert (await embedder.run_async(text="coffee"))["embedding"] == np.float32(
        server.vector_of("query: coffee")
    ).tolist()
    await embedder.close_async()
    embedder.close()


def test_a_query_and_a_document_share_nothing_unless_declared(
    server: OpenAIServer, openai: dict[str, Any], disk: dict[str, Any]
) -> None:
    quiet = {"progress_bar": False}
    document, query = OpenAIDocumentEmbedder(**openai, **quiet), OpenAITextEmbedder(**openai)

    def compute_both(**options: Any) -> list[int]:
        one = CachedDocumentEmbedder(document, config=disk, **options).run(documents=documents("tea"))
        other = CachedTextEmbedder(query, config=disk, **options).run(text="tea")
        assert embeddings(one) == [other["embedding"]]
        return [output["meta"]["cache"]["computed"] for output in (one, other)]

    assert compute_both() == [1, 1]
    assert compute_both(space={"model": "text-embedding-3-small"}) == [1, 1]
    assert compute_both(space={"model": "text-embedding-3-small", "task": "any"}) == [1, 0]
    close(document, query)


# --- from and to YAML -------------------------------------------------------------------------


def test_a_pipeline_survives_yaml(server: OpenAIServer, openai: dict[str, Any], disk: dict[str, Any]) -> None:
    pipeline = Pipeline()
    inner = OpenAIDocumentEmbedder(**openai, **DOCUMENT_OPTIONS)
    pipeline.add_component("wrapped", CachedDocumentEmbedder(inner, config=disk))
    pipeline.add_component("text", CachedTextEmbedder(config={**disk, **NGRAM}))
    pipeline.add_component(
        "declared",
        CachedTextEmbedder(OpenAITextEmbedder(**openai), config=Path("embedonce.toml"), space={"model": "m", "n": 2}),
    )
    pipeline.add_component(
        "provider",
        CachedDocumentEmbedder(config={**disk, **NGRAM}, meta_fields_to_embed=["title"], embedding_separator=": "),
    )
    embedded = pipeline.get_component("wrapped").run(documents=TEAS)
    dumped = pipeline.dumps()
    assert KEY not in dumped
    again = Pipeline.loads(dumped)
    assert again.dumps() == dumped
    provider = again.get_component("provider")
    assert (provider.meta_fields_to_embed, provider.embedding_separator) == (["title"], ": ")
    assert again.get_component("declared").config == "embedonce.toml"
    output = again.get_component("wrapped").run(documents=TEAS)
    assert output["meta"]["cache"]["hits"] == {"memory": 5}
    assert embeddings(output) == embeddings(embedded)
    close(inner)


def test_no_secret_is_written() -> None:
    config = {"tiers": [{"type": "redis", "url": "redis://:hunter2@localhost:6379/0"}]}
    with pytest.raises(ConfigError, match=r"tiers\[0\]\.url: a secret") as raised:
        CachedTextEmbedder(Texts(), config=config).to_dict()
    assert "hunter2" not in str(raised.value)
    config["tiers"][0]["url"] = "redis://:${PASSWORD}@localhost:6379/0"
    assert CachedTextEmbedder(Texts(), config=config).to_dict()["init_parameters"]["config"] == config


def test_a_secret_that_is_not_a_variable_is_not_in_the_space(
    server: OpenAIServer, openai: dict[str, Any], disk: dict[str, Any]
) -> None:
    text = {"text": "tea"}
    for secret in (Secret.from_env_var("OPENAI_API_KEY"), Secret.from_token(KEY)):
        inner = OpenAITextEmbedder(**openai, api_key=secret)
        CachedTextEmbedder(inner, config=disk).run(**text)
        close(inner)
    assert server.texts == 1


# --- refused arguments ------------------------------------------------------------------------


@component
class Texts:
    """Embeds texts and describes its model."""

    def __init__(self, model: str = "texts", precision: str = "float32") -> None:
        self.model = model
        self.precision = precision
        self.count: Counter[str] = Counter()

    @component.output_types(embedding=list[float])
    def run(self, text: str) -> dict[str, Any]:
        self.count[text] += 1
        return {"embedding": vector_of(text) if text else None}


@pytest.mark.parametrize("wrong", [None, "text", Document(content="a"), [Document(content="a"), "b"], ["a"], [None]])
async def test_other_types_than_documents_are_refused(wrong: Any) -> None:
    embedder = CachedDocumentEmbedder(Embedder(), config=MEMORY)
    with pytest.raises(TypeError, match="list of Documents"):
        embedder.run(documents=wrong)
    with pytest.raises(TypeError, match="list of Documents"):
        await embedder.run_async(documents=wrong)


@pytest.mark.parametrize("wrong", [None, 1, ["a"], b"a", Document(content="a")])
async def test_other_types_than_a_str_are_refused(wrong: Any) -> None:
    embedder = CachedTextEmbedder(Texts(), config=MEMORY)
    with pytest.raises(TypeError, match="expected a str"):
        embedder.run(text=wrong)
    with pytest.raises(TypeError, match="expected a str"):
        await embedder.run_async(text=wrong)


def test_a_text_without_embedding_is_an_error() -> None:
    with pytest.raises(ProviderError, match="returned no embedding"):
        CachedTextEmbedder(Texts(), config=MEMORY).run(text="")


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: CachedTextEmbedder(Embedder()), "with a method run that takes 'text'"),
        (lambda: CachedDocumentEmbedder(Texts()), "with a method run that takes 'documents'"),
        (lambda: CachedDocumentEmbedder("openai"), "with a method run that takes 'documents'"),
        (lambda: CachedTextEmbedder(Texts), r"is a class; pass an instance, such as Texts\(...\)"),
        (lambda: CachedTextEmbedder(space={"model": "m"}), "can only be used with an embedder"),
        (lambda: CachedDocumentEmbedder(Embedder(), meta_fields_to_embed=[]), "set it there"),
    ],
)
def test_what_cannot_be_wrapped_is_refused(make: Callable[[], Any], why: str) -> None:
    with pytest.raises(TypeError, match=why):
        make()


def test_an_embedder_without_a_description_is_refused_until_declared() -> None:
    with pytest.raises(SpaceError, match="pass meta_fields_to_embed to CachedDocumentEmbedder"):
        CachedDocumentEmbedder(Bare(), config=MEMORY)
    with pytest.raises(SpaceError, match="declare what determines its vectors: space="):
        CachedDocumentEmbedder(Bare(), config=MEMORY, meta_fields_to_embed=[]).run(documents=[])
    inner = Bare()
    embedder = CachedDocumentEmbedder(inner, config=MEMORY, space={"model": "bare"}, meta_fields_to_embed=["title"])
    tea = Document(content="tea", meta={"title": "green", "page": 3})
    assert embeddings(embedder.run(documents=[tea])) == [vector_of("green\ntea")]
    assert [(one.content, one.meta) for one in inner.seen] == [("green\ntea", {})]


def test_sparse_embeddings_are_refused() -> None:
    inner = Embedder()
    sparse = SparseEmbedding(indices=[0], values=[1.0])
    inner.spoil = lambda found: [replace(one, embedding=None, sparse_embedding=sparse) for one in found]
    with pytest.raises(ProviderError, match="sparse"):
        CachedDocumentEmbedder(inner, config=MEMORY, ignore=["spoil"]).run(documents=documents("a"))
    with pytest.raises(TypeError, match="returns 'embedding'"):
        CachedTextEmbedder(SentenceTransformersSparseTextEmbedder(), config=MEMORY)


def test_an_embedder_defined_in_the_running_script_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Texts, "__module__", "__main__")
    with pytest.raises(SpaceError, match="move the class to a module, or declare"):
        CachedTextEmbedder(Texts(), config=MEMORY).warm_up()


def test_vectors_that_depend_on_their_batch_are_refused() -> None:
    with pytest.raises(SpaceError, match="quantization_ranges"):
        CachedTextEmbedder(Texts(precision="int8"), config=MEMORY).warm_up()


# --- a component's life -----------------------------------------------------------------------


def test_only_a_miss_warms_up_the_embedder() -> None:
    inner = Embedder()
    embedder = CachedDocumentEmbedder(inner, config={**MEMORY, "key": {"namespace": "life"}})
    pipeline = Pipeline()
    pipeline.add_component("embedder", embedder)
    embedder.close()
    assert inner.calls == ["close"], "nothing was opened"
    pipeline.warm_up()
    pipeline.warm_up()
    embedder.run(documents=[])
    assert inner.calls == ["close"]
    for content in ("a", "a", "b"):
        pipeline.run({"embedder": {"documents": documents(content)}})
    assert inner.calls == ["close", "warm_up", "run", "run"]
    embedder.close()
    pipeline.run({"embedder": {"documents": documents("a", "c")}})
    assert inner.calls == ["close", "warm_up", "run", "run", "close", "warm_up", "run"]


def test_an_invalid_configuration_is_an_error_before_anything_runs() -> None:
    pipeline = Pipeline()
    pipeline.add_component("embedder", CachedTextEmbedder(Texts(), config={"tiers": [{"type": "memry"}]}))
    with pytest.raises(ConfigError, match='did you mean "memory"'):
        pipeline.warm_up()


def test_equal_configurations_share_one_cache(disk: dict[str, Any]) -> None:
    one, other = Embedder(), Embedder()
    first = CachedDocumentEmbedder(one, config=disk)
    first.run(documents=documents("a", "b"))
    output = CachedDocumentEmbedder(other, config=dict(disk)).run(documents=documents("b", "a"))
    assert output["meta"]["cache"]["hits"] == {"memory": 2}
    assert not other.calls


def test_threads_and_tasks_compute_each_text_once() -> None:
    inner = Embedder()
    config = {**MEMORY, "key": {"namespace": "threads"}}
    # Keep a cache, because a thread may end before another begins, and the memory tier would be gone.
    kept = CachedDocumentEmbedder(inner, config=config)
    kept.warm_up()
    contents = [f"text {number}" for number in range(40)]
    at_once = 8
    start = threading.Barrier(at_once)

    def work(shift: int) -> list[Any]:
        embedder = CachedDocumentEmbedder(inner, config=config)
        order = documents(*contents[shift:], *contents[:shift])
        start.wait()

        async def tasks() -> list[dict[str, Any]]:
            return list(await asyncio.gather(*(embedder.run_async(documents=order) for _ in range(3))))

        outputs = asyncio.run(tasks()) if shift % 2 else [embedder.run(documents=order)]
        return [(one.content, one.embedding) for output in outputs for one in output["documents"]]

    with ThreadPoolExecutor(at_once) as pool:
        for found in pool.map(work, range(at_once)):
            assert all(embedding == vector_of(str(content), "m") for content, embedding in found)
    assert set(inner.count.values()) == {1}
    assert len(inner.count) == len(contents)


# --- a provider of the configuration ----------------------------------------------------------


async def test_a_provider_embeds_documents_and_queries() -> None:
    config = {**MEMORY, **NGRAM, "key": {"namespace": "provider"}}
    embedder = CachedDocumentEmbedder(config=config, meta_fields_to_embed=["title"])
    tea = Document(content="tea", meta={"title": "green"})
    output = embedder.run(documents=[tea, *documents("tea")])
    assert output["meta"]["cache"] == {"hits": {}, "computed": 2, "failed": 0}
    cache = open_shared_cache(config)
    assert embeddings(output) == cache.embed_batch(["green\ntea", "tea"]).tolist()
    # ngram describes the same vectors for queries and documents.
    answer = await CachedTextEmbedder(config=config).run_async(text="green\ntea")
    assert answer["meta"]["cache"]["hits"] == {"memory": 1}
    assert answer["embedding"] == output["documents"][0].embedding


# --- what the walk finds ----------------------------------------------------------------------


@component
class Private(Texts):
    """Keeps its settings in private attributes and in an object inside it."""

    def __init__(self, model: str = "texts", task: str = "a", inner: Any = None, timeout: float = 1) -> None:
        self.model = model
        self._task = task
        self._inner = inner
        self._timeout = timeout
        self.count: Counter[str] = Counter()

    @component.output_types(embedding=list[float])
    def run(self, text: str) -> dict[str, Any]:
        self.count[text] += 1
        return {"embedding": vector_of(text, f"{self._task} {self._inner}")}


def computed(embedder: Any, config: dict[str, Any], **options: Any) -> int:
    return int(CachedTextEmbedder(embedder, config=config, **options).run(text="tea")["meta"]["cache"]["computed"])


def test_private_and_nested_settings_are_in_the_space(disk: dict[str, Any]) -> None:
    for options in ({}, {"task": "b"}, {"inner": {"dimensions": 3}}, {"inner": {"dimensions": 4}}):
        assert computed(Private(**options), disk) == 1
        assert computed(Private(**options, timeout=5), disk) == 0
    assert computed(Private(inner=1.5), disk, ignore=["inner"]) == 0, "as without the setting"


def test_settings_that_decide_nothing_are_not_in_the_space(
    server: OpenAIServer, disk: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AZURE_OPENAI_API_KEY", KEY)
    monkeypatch.setattr(server, "deployments", {"mine": "text-embedding-3-small"})
    for number, version in enumerate(["2024-02-01", "2024-10-21"]):
        inner = AzureOpenAITextEmbedder(azure_endpoint=server.url, azure_deployment="mine", api_version=version)
        assert computed(inner, disk) == 1 - number
        close(inner)
    assert server.texts == 1


def test_a_setting_that_cannot_be_described_is_refused_until_it_is_ignored(disk: dict[str, Any]) -> None:
    hidden = Private(inner=lambda text: text)
    with pytest.raises(SpaceError, match=r'Private\._inner.*ignore=\["_inner"\]'):
        computed(hidden, disk)
    assert computed(hidden, disk, ignore=["_inner"]) == 1
    with pytest.raises(SpaceError, match='did you mean "_inner"'):
        computed(Private(), disk, ignore=["_iner"])
    with pytest.raises(TypeError, match=r'such as \["_inner"\]'):
        CachedTextEmbedder(hidden, ignore="_inner")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="ignore= can only be used with an embedder"):
        CachedTextEmbedder(ignore=["_inner"])


def test_an_embedder_that_was_changed_is_not_asked(disk: dict[str, Any]) -> None:
    inner = Embedder()
    embedder = CachedDocumentEmbedder(inner, config=disk)
    embedder.run(documents=documents("a"))
    inner.prefix = "changed: "
    with pytest.raises(SpaceError, match=r"was changed after it was wrapped \(prefix\)"):
        embedder.run(documents=documents("b"))
    assert embeddings(embedder.run(documents=documents("a"))) == [vector_of("a", "m")]


@pytest.mark.parametrize("space", [None, {"model": "declared"}])
@pytest.mark.parametrize("inner", [{"late_chunking": True}, {"precision": "uint8"}], ids=str)
def test_settings_that_tie_a_text_to_its_batch_are_refused_also_with_a_declared_space(
    inner: dict[str, Any], space: dict[str, Any] | None
) -> None:
    with pytest.raises(SpaceError, match="depends on the other texts of its batch"):
        CachedTextEmbedder(Private(inner=inner), config=MEMORY, space=space).warm_up()


def test_the_description_is_the_same_before_and_after_the_first_run(
    server: OpenAIServer, openai: dict[str, Any], minilm: dict[str, Any], disk: dict[str, Any]
) -> None:
    for embedder in (
        OpenAITextEmbedder(**openai),
        SentenceTransformersTextEmbedder(**minilm),
        MockTextEmbedder(model="mock"),
    ):
        describe = describe_component(embedder, space=None, ignore=())
        before = describe("query")
        assert computed(embedder, disk) == 1
        assert describe("query") == before
        assert computed(embedder, disk) == 0
        close(embedder)


# --- arguments with one value per text ---------------------------------------------------------


@component
class Titled:
    """Embeds documents with a title for each, and with arguments for all."""

    def __init__(self, model: str = "titled") -> None:
        self.model = model
        self.meta_fields_to_embed: list[str] = []
        self.calls: list[Any] = []

    @component.output_types(documents=list[Document])
    def run(
        self, documents: list[Document], titles: list[str] | None = None, stop: Any = None, late_chunking: bool = False
    ) -> dict[str, Any]:
        titles = titles or [""] * len(documents)
        self.calls.append([one.content for one in documents])
        embedded = [
            replace(one, embedding=vector_of(f"{title}: {one.content}"))
            for one, title in zip(documents, titles, strict=True)
        ]
        return {"documents": embedded}


async def test_an_argument_with_one_value_per_text_is_cut_with_the_texts(disk: dict[str, Any]) -> None:
    inner = Titled()
    embedder = CachedDocumentEmbedder(inner, config={**disk, "key": {"normalize": ["strip"]}})
    runs = [
        (["Intro", "It is steamed."], ["Tea book", "Chapter 2"]),
        (["Intro", "It is oxidised. "], ["Tea book", "Chapter 2"]),
        (["Intro", "Intro", "Intro"], ["Tea book", "Coffee book", "Tea book"]),
    ]
    for contents, titles in runs:
        expected = [vector_of(f"{title}: {text.strip()}") for text, title in zip(contents, titles, strict=True)]
        assert embeddings(embedder.run(documents=documents(*contents), titles=titles)) == expected
        assert embeddings(await embedder.run_async(documents=documents(*contents), titles=titles)) == expected
    assert inner.calls == [["Intro", "It is steamed."], ["It is oxidised."], ["Intro"]]
    assert embeddings(embedder.run(documents=documents("Intro"))) == [vector_of(": Intro")]
    with pytest.raises(ValueError, match="titles must have one value per text"):
        embedder.run(documents=documents("a", "b"), titles=["one"])


def test_another_list_as_long_as_the_batch_is_refused(disk: dict[str, Any]) -> None:
    embedder = CachedDocumentEmbedder(Titled(), config=disk)
    for stop in (["a", "b"], ("a", "b"), np.array([1, 2]), {"words": ["a", "b"]}):
        with pytest.raises(SpaceError, match=r"stop.* has as many values as there are texts"):
            embedder.run(documents=documents("a", "b"), stop=stop)
    embedder.run(documents=documents("a", "b"), stop=["a"])
    with pytest.raises(SpaceError, match="late_chunking"):
        embedder.run(documents=documents("a", "b"), late_chunking=True)


# --- copies and pickles -------------------------------------------------------------------------

COPIES: dict[str, Callable[[Any], Any]] = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda item: pickle.loads(pickle.dumps(item)),
}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("is_warm", [False, True])
def test_components_and_pipelines_can_be_copied_and_pickled(
    server: OpenAIServer, openai: dict[str, Any], disk: dict[str, Any], how: str, is_warm: bool
) -> None:
    inner = OpenAITextEmbedder(**openai, prefix="p: ")
    component = CachedTextEmbedder(inner, config=disk, ignore=["suffix"])
    pipeline = Pipeline()
    pipeline.add_component("embedder", component)
    if is_warm:
        component.run(text="one")
    other = COPIES[how](component)
    assert (other.config, other.ignore) == (disk, ["suffix"])
    assert (other.embedder is inner) == (how == "copy")
    assert other.run(text="one")["embedding"] == np.float32(server.vector_of("p: one")).tolist()
    again = COPIES[how](pipeline)
    made = again.run({"embedder": {"text": "two"}})["embedder"]
    assert made["embedding"] == np.float32(server.vector_of("p: two")).tolist()
    assert component.run(text="two")["meta"]["cache"]["computed"] == 0
    assert server.texts == 2
    close(inner, other.embedder, again.get_component("embedder").embedder)


def test_a_component_of_a_provider_can_be_copied_and_pickled() -> None:
    component = CachedDocumentEmbedder(config={**MEMORY, **NGRAM}, meta_fields_to_embed=["title"])
    expected = embeddings(component.run(documents=documents("tea")))
    for how in COPIES.values():
        other = how(component)
        assert other.meta_fields_to_embed == ["title"]
        assert embeddings(other.run(documents=documents("tea"))) == expected


def test_an_embedder_that_cannot_be_pickled_is_named_and_a_copy_shares_it() -> None:
    inner = Private(inner=(text for text in ()))
    component = CachedTextEmbedder(inner, config=MEMORY, ignore=["_inner"])
    with pytest.raises(SpaceError, match="Private"):
        pickle.dumps(component)
    assert copy.deepcopy(component).embedder is inner


def test_ignore_survives_serialisation() -> None:
    pipeline = Pipeline()
    component = CachedTextEmbedder(MockTextEmbedder(model="mock"), config=MEMORY, ignore=["dimension"])
    pipeline.add_component("embedder", component)
    assert Pipeline.loads(pipeline.dumps()).get_component("embedder").ignore == ["dimension"]


@settings(deadline=None)
@given(pairs())
def test_embedders_share_a_key_only_if_their_settings_make_the_same_vectors(pair: Pair) -> None:
    keys = []
    for mix in pair.mixes:
        embedder = CachedTextEmbedder(attach(Private(), mix), config=MEMORY)
        embedder.warm_up()
        keys.append(embedder._cache.explain("a", "query").key)
    assert (keys[0] == keys[1]) is pair.are_equal
