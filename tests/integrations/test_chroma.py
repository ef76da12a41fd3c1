"""Tests for Chroma, with real collections and a real embedding function against an HTTP API on loopback."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import chromadb
import numpy as np
import openai as openai_client
import pytest
from chromadb.api.types import Documents, EmbeddingFunction, Embeddings
from chromadb.utils.embedding_functions import (
    JinaEmbeddingFunction,
    OpenAIEmbeddingFunction,
    register_embedding_function,
)
from hypothesis import given, settings

from embedonce import ConfigError, ProviderError, SpaceError
from embedonce.testing import OpenAIServer
from embedonce_integrations.chroma import CachedEmbeddingFunction

from .embedder_settings import Pair, attach, pairs
from .embedders import memory_config

MODEL = "text-embedding-3-small"
DOCUMENTS = ["Green tea is steamed.", "Black tea is oxidised.", "White tea is withered.", "Oolong is between."]
NGRAM = {"provider": {"type": "ngram", "dimensions": 64}, "tiers": [{"type": "memory"}]}


@pytest.fixture
def server() -> Iterator[OpenAIServer]:
    with OpenAIServer(dimensions=64) as server:
        yield server


@pytest.fixture
def openai(server: OpenAIServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., OpenAIEmbeddingFunction]]:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret-of-the-test")
    made: list[OpenAIEmbeddingFunction] = []

    def make(**options: Any) -> OpenAIEmbeddingFunction:
        function = OpenAIEmbeddingFunction(
            **{"model_name": MODEL, "api_base": server.base_url, "dimensions": 32, **options}
        )
        function.client = function.client.with_options(max_retries=0)
        made.append(function)
        return function

    yield make
    for function in made:
        function.client.close()


@pytest.fixture
def tiers(tmp_path: Path) -> dict[str, Any]:
    disk = {"type": "disk", "path": str(tmp_path / "vectors"), "timeout": "60s"}  # long enough for a busy machine
    return {"tiers": [{"type": "memory"}, disk]}


def collection(name: str, function: Any, path: Path | None = None) -> Any:
    client = chromadb.EphemeralClient() if path is None else chromadb.PersistentClient(str(path))
    return client.get_or_create_collection(name, embedding_function=function)


def stored(collection: Any, ids: list[str]) -> np.ndarray:
    found = collection.get(ids=ids, include=["embeddings"])
    by_id = dict(zip(found["ids"], found["embeddings"], strict=True))
    return np.stack([by_id[name] for name in ids]).astype(np.float32)


def test_vectors_without_a_cache_cold_and_warm_are_equal(
    server: OpenAIServer, openai: Callable[..., Any], tiers: dict[str, Any]
) -> None:
    ids = [str(i) for i in range(len(DOCUMENTS))]
    answers, computed = [], []
    for name, function in (
        ("without", openai()),
        ("cold", CachedEmbeddingFunction(openai(), config=tiers)),
        ("warm", CachedEmbeddingFunction(openai(), config=tiers)),
    ):
        before = server.texts
        tea = collection(f"{name}-tea", function)
        tea.add(ids=ids, documents=DOCUMENTS)
        nearest = tea.query(query_texts=["Which tea is steamed?", DOCUMENTS[1]], n_results=4)
        answers.append((stored(tea, ids), nearest["ids"], nearest["distances"]))
        computed.append(server.texts - before)
    for vectors, order, distances in answers[1:]:
        assert (vectors == answers[0][0]).all()
        assert (order, distances) == answers[0][1:]
    # The model is symmetric, and the second query is a document that is already stored.
    assert computed == [6, 5, 0]


def test_each_document_of_a_mixed_batch_gets_its_own_vector(
    server: OpenAIServer, openai: Callable[..., Any], tiers: dict[str, Any]
) -> None:
    function = CachedEmbeddingFunction(openai(), config=tiers)
    function(DOCUMENTS[1:3])
    texts = [DOCUMENTS[3], DOCUMENTS[1], DOCUMENTS[0], DOCUMENTS[3], DOCUMENTS[2]]
    for text, vector in zip(texts, function(texts), strict=True):
        assert vector.dtype == np.float32
        assert (vector == server.vector_of(text, model=MODEL, dimensions=32)).all()
    assert server.texts == 4


@pytest.mark.parametrize("how", ["short", "long", "nan", "zeros", "dimension", "ragged", "server_error", "not_json"])
def test_an_invalid_answer_is_an_error_and_keeps_stored_vectors(
    server: OpenAIServer, openai: Callable[..., Any], tiers: dict[str, Any], how: Any
) -> None:
    function = CachedEmbeddingFunction(openai(), config=tiers)
    function(DOCUMENTS[:2])
    server.misbehave(how, times=None)
    with pytest.raises((ProviderError, openai_client.OpenAIError, ValueError, AttributeError)):
        function(DOCUMENTS)
    server.heal()
    for text, vector in zip(DOCUMENTS, function(DOCUMENTS), strict=True):
        assert (vector == server.vector_of(text, model=MODEL, dimensions=32)).all()


def test_an_answer_in_another_order_is_sorted_by_index(
    server: OpenAIServer, openai: Callable[..., Any], tiers: dict[str, Any]
) -> None:
    function = CachedEmbeddingFunction(openai(), config=tiers)
    function(DOCUMENTS[1:2])
    server.misbehave("out_of_order")
    for _ in range(2):
        for text, vector in zip(DOCUMENTS, function(DOCUMENTS), strict=True):
            assert (vector == server.vector_of(text, model=MODEL, dimensions=32)).all()
    server.misbehave("duplicate_index")
    with pytest.raises(ProviderError, match="index"):
        function(["Oolong again.", "Rooibos."])


def test_a_persistent_collection_is_opened_by_the_wrapped_name(
    server: OpenAIServer, openai: Callable[..., Any], tiers: dict[str, Any], tmp_path: Path
) -> None:
    old = collection("tea", openai(), tmp_path / "chroma")
    old.add(ids=["0"], documents=DOCUMENTS[:1])
    ours = collection("tea", CachedEmbeddingFunction(openai(), config=tiers), tmp_path / "chroma")
    ours.add(ids=["1"], documents=DOCUMENTS[1:2])
    assert ours.query(query_texts=[DOCUMENTS[1]], n_results=1)["ids"] == [["1"]]
    again = collection("tea", openai(), tmp_path / "chroma")
    assert again.count() == 2
    new = collection("new", CachedEmbeddingFunction(openai(), config=tiers), tmp_path / "chroma")
    assert new.configuration["embedding_function"].name() == "openai"
    function = CachedEmbeddingFunction(openai(), config=tiers)
    assert function.get_config() == openai().get_config()
    assert "sk-secret" not in json.dumps(function.get_config())


def test_the_configuration_is_stored_with_the_collection(tmp_path: Path) -> None:
    tea = collection("tea", CachedEmbeddingFunction(config=NGRAM), tmp_path)
    tea.add(ids=["0", "1"], documents=DOCUMENTS[:2])
    # Without a function, Chroma makes one from the stored name and configuration.
    again = chromadb.PersistentClient(str(tmp_path)).get_collection("tea")
    assert again.query(query_texts=[DOCUMENTS[1]], n_results=1)["ids"] == [["1"]]
    function = CachedEmbeddingFunction.build_from_config({"config": NGRAM})
    assert function.cache is CachedEmbeddingFunction(config=NGRAM).cache


def test_a_configuration_that_makes_other_vectors_is_refused() -> None:
    function = CachedEmbeddingFunction(config=NGRAM)
    other = {**NGRAM, "provider": {"type": "ngram", "dimensions": 128}}
    function.validate_config_update({"config": NGRAM}, {"config": {**NGRAM, "tiers": []}})
    with pytest.raises(ValueError, match="different vectors"):
        function.validate_config_update({"config": NGRAM}, {"config": other})


@register_embedding_function
class TwoSided(EmbeddingFunction[Documents]):
    """Embeds queries differently from documents, as some models do."""

    def __init__(self, model: str = "two") -> None:
        self.model = model
        self.calls: list[tuple[str, list[str]]] = []

    def __call__(self, input: Documents) -> Embeddings:
        self.calls.append(("document", list(input)))
        return [np.array([len(text), 1.0], np.float32) for text in input]

    def embed_query(self, input: Documents) -> Embeddings:
        self.calls.append(("query", list(input)))
        return [np.array([len(text), 2.0], np.float32) for text in input]

    @staticmethod
    def name() -> str:
        return "two-sided"

    def get_config(self) -> dict[str, Any]:
        return {"model": self.model}

    @staticmethod
    def build_from_config(config: dict[str, Any]) -> TwoSided:
        return TwoSided(config["model"])


def test_an_asymmetric_function_shares_no_vectors_between_queries_and_documents() -> None:
    inner = TwoSided()
    function = CachedEmbeddingFunction(inner, config={"tiers": [{"type": "memory"}]})
    for _ in range(2):
        assert function(["four"])[0].tolist() == [4.0, 1.0]
        assert function.embed_query(["four"])[0].tolist() == [4.0, 2.0]
    assert inner.calls == [("document", ["four"]), ("query", ["four"])]


def test_only_equal_functions_share_vectors() -> None:
    tiers = {"tiers": [{"type": "memory"}], "key": {"namespace": "sharing"}}
    one, equal, other = TwoSided(), TwoSided(), TwoSided("three")
    functions = [CachedEmbeddingFunction(inner, config=tiers) for inner in (one, equal, other)]
    for function in functions:
        function(["text"])
    assert (len(one.calls), len(equal.calls), len(other.calls)) == (1, 0, 1)


class Bare(EmbeddingFunction[Documents]):
    """Has no description of its vectors."""

    def __init__(self) -> None:
        pass

    def __call__(self, input: Documents) -> Embeddings:
        return [np.array([len(text), 1.0], np.float32) for text in input]


def test_a_function_that_cannot_be_described_is_refused_with_advice() -> None:
    tiers = {"tiers": [{"type": "memory"}]}
    with pytest.raises(SpaceError, match=r"Bare does not say.*space="):
        CachedEmbeddingFunction(Bare(), config=tiers)
    function = CachedEmbeddingFunction(Bare(), config=tiers, space={"model": "bare-v1"})
    assert function(["four"])[0].tolist() == [4.0, 1.0]
    with pytest.raises(SpaceError, match="provider"):
        CachedEmbeddingFunction(config=NGRAM, space={"model": "bare-v1"})


@settings(deadline=None)
@given(pairs())
def test_embedders_share_a_key_only_if_their_settings_make_the_same_vectors(pair: Pair) -> None:
    config = memory_config()
    keys = [
        CachedEmbeddingFunction(attach(TwoSided(), mix), config=config).cache.explain("a").key for mix in pair.mixes
    ]
    assert (keys[0] == keys[1]) is pair.are_equal


def test_the_endpoint_is_in_the_space_wherever_it_comes_from(
    server: OpenAIServer, openai: Callable[..., OpenAIEmbeddingFunction], monkeypatch: pytest.MonkeyPatch
) -> None:
    tiers = {"tiers": [{"type": "memory"}]}
    functions: list[CachedEmbeddingFunction] = []  # a memory tier lives as long as somebody has its cache
    with OpenAIServer(dimensions=64) as other:
        for url in (server.base_url, other.base_url):
            monkeypatch.setenv("OPENAI_BASE_URL", url)
            functions.append(CachedEmbeddingFunction(openai(api_base=None), config=tiers))
            functions[-1](["text"])
        functions.append(CachedEmbeddingFunction(openai(api_base=other.base_url), config=tiers))
        functions[-1](["text"])
        assert (server.texts, other.texts) == (1, 1)


def test_the_description_is_the_same_before_and_after_the_first_calls(openai: Callable[..., Any]) -> None:
    config = memory_config()
    for inner in (openai(), TwoSided()):
        before = CachedEmbeddingFunction(inner, config=config).cache.explain("a").key
        inner(["a"])
        inner.embed_query(["b"])
        assert CachedEmbeddingFunction(inner, config=config).cache.explain("a").key == before


def test_late_chunking_is_refused_even_with_a_declared_space(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHROMA_JINA_API_KEY", "any")
    function = JinaEmbeddingFunction(api_key_env_var="CHROMA_JINA_API_KEY", late_chunking=True)
    for space in (None, {"model": "mine"}):
        with pytest.raises(SpaceError, match="with late_chunking, the vector of a text depends on the other texts"):
            CachedEmbeddingFunction(function, config=memory_config(), space=space)
    plain = JinaEmbeddingFunction(api_key_env_var="CHROMA_JINA_API_KEY")
    CachedEmbeddingFunction(plain, config=memory_config())


def test_functions_can_be_copied_and_pickled(tmp_path: Path) -> None:
    for function in (
        CachedEmbeddingFunction(TwoSided(), config=memory_config()),
        CachedEmbeddingFunction(TwoSided(), config=memory_config(), space={"model": "mine"}),
        CachedEmbeddingFunction(config=NGRAM),
    ):
        rows = function(DOCUMENTS)
        for again in (copy.copy(function), copy.deepcopy(function), pickle.loads(pickle.dumps(function))):
            assert again is not function
            assert np.array_equal(again(DOCUMENTS), rows)
            assert again.name() == function.name()
            assert again.cache.lookup(DOCUMENTS).sources == ["memory"] * len(DOCUMENTS)


def test_a_changed_function_is_refused(server: OpenAIServer, openai: Callable[..., OpenAIEmbeddingFunction]) -> None:
    inner = openai()
    function = CachedEmbeddingFunction(inner, config={"tiers": [{"type": "memory"}]})
    function(["text"])
    inner.model_name = "text-embedding-3-large"
    function(["text"])
    with pytest.raises(SpaceError, match=r"changed after it was wrapped \(model_name\)"):
        function(["another"])
    assert server.texts == 1


def test_a_secret_in_plain_text_is_not_stored_with_a_collection() -> None:
    function = CachedEmbeddingFunction(config={**NGRAM, "key": {"secret": "hunter2" * 5}})
    with pytest.raises(ConfigError, match=r"key\.secret: a secret would be written") as raised:
        function.get_config()
    assert "hunter2" not in str(raised.value)


@pytest.mark.parametrize("wrong", [TwoSided, len, "text-embedding-3-small"])
def test_other_types_than_embedding_functions_are_refused(wrong: Any) -> None:
    with pytest.raises(TypeError, match=r"expected one of Chroma's embedding functions.*config="):
        CachedEmbeddingFunction(wrong, config=NGRAM)


def test_normalisation_reaches_the_wrapped_function() -> None:
    inner = TwoSided()
    tiers = {"tiers": [{"type": "memory"}], "key": {"normalize": ["strip"]}}
    CachedEmbeddingFunction(inner, config=tiers)(["  four  ", "four"])
    assert inner.calls == [("document", ["four"])]


def test_a_value_that_is_not_a_text_is_a_type_error() -> None:
    function = CachedEmbeddingFunction(config=NGRAM)
    with pytest.raises(TypeError, match="item 1"):
        function(["text", 5])  # type: ignore[list-item]
    with pytest.raises(TypeError, match="list of texts"):
        function("text")  # type: ignore[arg-type]


class Short(TwoSided):
    def __call__(self, input: Documents) -> Embeddings:
        return super().__call__(input)[1:]


def test_too_few_vectors_are_not_shifted() -> None:
    function = CachedEmbeddingFunction(Short(), config={"tiers": [{"type": "memory"}]})
    with pytest.raises(ProviderError, match="1 vector for 2 texts"):
        function(["a", "bb"])
