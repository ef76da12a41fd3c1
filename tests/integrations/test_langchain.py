"""Tests for LangChain, with its own standard tests, its OpenAI client and its CacheBackedEmbeddings."""

from __future__ import annotations

import asyncio
import copy
import importlib.util
import json
import pickle
import subprocess
import sys
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from langchain_classic.embeddings import CacheBackedEmbeddings
from langchain_core.documents import Document
from langchain_core.embeddings import DeterministicFakeEmbedding, Embeddings, FakeEmbeddings
from langchain_core.vectorstores import InMemoryVectorStore
from langchain_openai import OpenAIEmbeddings
from langchain_tests.integration_tests import BaseStoreAsyncTests, BaseStoreSyncTests, EmbeddingsIntegrationTests
from langchain_tests.unit_tests import EmbeddingsUnitTests
from patience import wait_until_collected
from pydantic import BaseModel, PrivateAttr

from embedonce import Cache, ConfigError, ProviderError, SpaceError, TextError, TierError
from embedonce.testing import DictBackend, OpenAIServer
from embedonce_integrations.langchain import CachedEmbeddings, VectorByteStore

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

OpenAI: TypeAlias = Callable[..., OpenAIEmbeddings]


class Letters(BaseModel, Embeddings):
    """Deterministic embeddings that treat queries differently and count their texts."""

    model: str = "letters-1"
    prompt: str = "query: "
    size: int = 8
    _count: Counter[str] = PrivateAttr(default_factory=Counter)
    _calls: list[int] = PrivateAttr(default_factory=list)

    def embed_documents(self, texts: list[str], **kwargs: Any) -> list[list[float]]:
        self._count.update(texts)
        self._calls.append(len(texts))
        return [vector(f"{text}{kwargs or ''}")[: self.size] for text in texts]

    def embed_query(self, text: str, **kwargs: Any) -> list[float]:
        return self.embed_documents([self.prompt + text], **kwargs)[0]


@pytest.fixture(autouse=True)
def vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let tiktoken use the vocabulary that comes with LlamaIndex, because tests must not download one."""
    spec = importlib.util.find_spec("llama_index.core")
    assert spec is not None
    assert spec.origin is not None
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(Path(spec.origin).parent / "_static" / "tiktoken_cache"))


@pytest.fixture
def openai(server: OpenAIServer, runner: asyncio.Runner) -> Iterator[OpenAI]:
    """Make LangChain's client for the loopback server. With ``tokens``, it sends token ids, which is its default."""
    made = []

    def make(*, tokens: bool = True, **options: Any) -> OpenAIEmbeddings:
        options = {"model": "text-embedding-3-small", "api_key": SECRET, "max_retries": 0, **options}
        made.append(OpenAIEmbeddings(base_url=server.base_url, check_embedding_ctx_length=tokens, **options))
        return made[-1]

    yield make
    for embeddings in made:
        embeddings.client._client.close()
        runner.run(embeddings.async_client._client.close())


class Face:
    """The blocking or the async methods of embeddings, under the same names."""

    def __init__(self, name: str, runner: asyncio.Runner) -> None:
        self._sync = name == "sync"
        self._run = runner.run

    def documents(self, embeddings: Embeddings, texts: list[str], **kwargs: Any) -> Any:
        if self._sync:
            return embeddings.embed_documents(texts, **kwargs)
        return self._run(embeddings.aembed_documents(texts, **kwargs))

    def query(self, embeddings: Embeddings, text: str, **kwargs: Any) -> Any:
        if self._sync:
            return embeddings.embed_query(text, **kwargs)
        return self._run(embeddings.aembed_query(text, **kwargs))


@pytest.fixture(params=["sync", "async"])
def face(request: pytest.FixtureRequest, runner: asyncio.Runner) -> Face:
    return Face(request.param, runner)


# --- LangChain's own tests --------------------------------------------------------------------


class Standard:
    @property
    def embeddings_class(self) -> type[Embeddings]:
        return CachedEmbeddings

    @property
    def embedding_model_params(self) -> dict[str, Any]:
        return {"config": NGRAM}


class Wrapping(Standard):
    @property
    def embedding_model_params(self) -> dict[str, Any]:
        return {"embeddings": DeterministicFakeEmbedding(size=16), "config": memory_config()}


class TestStandardUnit(Standard, EmbeddingsUnitTests):
    pass


class TestStandardIntegration(Standard, EmbeddingsIntegrationTests):
    pass


class TestStandardUnitWrapping(Wrapping, EmbeddingsUnitTests):
    pass


class TestStandardIntegrationWrapping(Wrapping, EmbeddingsIntegrationTests):
    pass


class Stores:
    @pytest.fixture
    def three_values(self) -> tuple[bytes, bytes, bytes]:
        return b"[0.5,1.0]", b"[-2.0,0.25]", b"[3.0,0.0]"

    @pytest.fixture
    def kv_store(self, tmp_path: Path) -> VectorByteStore:
        return VectorByteStore(space={"model": "m"}, config=disk_config(tmp_path))


class TestByteStoreSync(Stores, BaseStoreSyncTests[bytes]):
    pass


class TestByteStoreAsync(Stores, BaseStoreAsyncTests[bytes]):
    pass


# --- without a cache, cold, warm ---------------------------------------------------------------


@pytest.mark.parametrize("tokens", [True, False])
def test_openai_without_a_cache_cold_and_warm(server: OpenAIServer, openai: OpenAI, face: Face, tokens: bool) -> None:
    inner = openai(tokens=tokens)
    cached = CachedEmbeddings(inner, config=memory_config())
    documents, query = face.documents(inner, MIXED), face.query(inner, MIXED[0])
    before = server.texts
    for computed in (len(set(MIXED)) + 1, 0):  # cold, then warm; a query is no document
        assert equal_as_float32(face.documents(cached, MIXED), documents)
        assert equal_as_float32(face.query(cached, MIXED[0]), query)
        assert server.texts == before + computed
        before = server.texts
    assert len(server.requests) == 4


def test_a_custom_class_without_a_cache_cold_and_warm(face: Face) -> None:
    inner, plain = Letters(), Letters()
    cached = CachedEmbeddings(inner, config=memory_config())
    for _ in range(2):
        assert equal_as_float32(face.documents(cached, MIXED), face.documents(plain, MIXED))
        assert equal_as_float32(face.query(cached, MIXED[0]), face.query(plain, MIXED[0]))
        assert inner._count == Counter([*set(MIXED), inner.prompt + MIXED[0]])
    first = face.documents(cached, MIXED)
    assert type(first) is list
    assert type(first[0]) is list
    assert type(first[0][0]) is float
    assert face.documents(cached, []) == []


@pytest.mark.timeout(300)  # it imports torch
def test_minilm_without_a_cache_cold_and_warm(minilm_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from langchain_huggingface import HuggingFaceEmbeddings

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    inner = HuggingFaceEmbeddings(
        model_name=str(minilm_path), model_kwargs={"device": "cpu"}, query_encode_kwargs={"prompt": "query: "}
    )
    cached = CachedEmbeddings(inner, config=memory_config())
    documents, query = inner.embed_documents(MIXED), inner.embed_query(MIXED[0])
    encoded: list[str] = []
    encode = inner._client.encode
    monkeypatch.setattr(
        inner._client, "encode", lambda texts, **options: encoded.extend(texts) or encode(texts, **options)
    )
    cold = cached.embed_documents(MIXED), cached.embed_query(MIXED[0])
    assert sorted(encoded) == sorted([*set(MIXED), MIXED[0]])
    warm = cached.embed_documents(MIXED), cached.embed_query(MIXED[0])
    assert len(encoded) == len(set(MIXED)) + 1
    assert cold == warm
    np.testing.assert_allclose(cold[0], documents, atol=1e-6)  # another batch, other rounding
    np.testing.assert_allclose(cold[1], query, atol=1e-6)
    assert not np.allclose(cold[1], cold[0][0], atol=1e-3)


def test_the_provider_of_the_configuration_is_used() -> None:
    # This namespace is unique: tests with an equal configuration would share the cache and its counters.
    config = {**NGRAM, "key": {"namespace": "test_the_provider_of_the_configuration_is_used"}}
    cached = CachedEmbeddings(config=config)
    rows = cached.embed_documents(["one", "two", "one"])
    assert rows[0] == rows[2] == cached.embed_query("one")
    assert cached.cache.stats().providers["ngram"].texts == 2
    with pytest.raises(TypeError, match=r"do not accept the arguments chunk_size"):
        cached.embed_query("one", chunk_size=2)
    with pytest.raises(SpaceError, match=r"\[provider\] of the configuration describes its own vector space"):
        CachedEmbeddings(config=NGRAM, space={"model": "m"})


def test_retrieval_is_the_same() -> None:
    documents = [Document(f"{city} is a city, number {i}.") for i, city in enumerate(["Oslo", "Rome", "Lima", "Bonn"])]

    def found(embeddings: Embeddings) -> list[tuple[str, float]]:
        store = InMemoryVectorStore(embeddings)
        store.add_documents(documents)
        return [(document.page_content, score) for document, score in store.similarity_search_with_score("Rome", k=4)]

    plain = found(Letters())
    cached = CachedEmbeddings(Letters(), config=memory_config())
    for _ in range(2):
        again = found(cached)
        assert [text for text, _ in again] == [text for text, _ in plain]
        np.testing.assert_allclose([score for _, score in again], [score for _, score in plain], atol=1e-6)


# --- never another text's vector --------------------------------------------------------------


@pytest.mark.parametrize("kind", OpenAIServer.KINDS)
@pytest.mark.parametrize(("face", "tokens"), [("sync", True), ("async", False)], indirect=["face"])
def test_no_fault_returns_the_vector_of_another_text(
    server: OpenAIServer, openai: OpenAI, kind: Any, face: Face, tokens: bool
) -> None:
    config = memory_config()
    inner = openai(tokens=tokens, timeout=60)
    cached = CachedEmbeddings(inner, config=config)
    ask_hastily = CachedEmbeddings(openai(tokens=tokens, timeout=0.5 if kind == "hang" else 60), config=config)
    right = face.documents(inner, MIXED)
    check_only_own_vectors(server, kind, right, partial(face.documents, cached), partial(face.documents, ask_hastily))


@pytest.mark.parametrize("kind", ["short", "long", "duplicate_index", "dimension", "nan", "zeros"])
def test_a_fault_during_a_query_is_an_error(server: OpenAIServer, openai: OpenAI, kind: Any, face: Face) -> None:
    cached = CachedEmbeddings(openai(), config=memory_config())
    right = face.query(cached, "Known")
    server.misbehave(kind)
    with pytest.raises((ProviderError, ValueError)):
        face.query(cached, "Not known")
    assert face.query(cached, "Known") == right


@settings(deadline=None, max_examples=60)
@given(st.lists(st.lists(st.sampled_from("abcdefgh"), max_size=12), max_size=6), st.integers(1, 4))
def test_every_row_belongs_to_its_text(batches: list[list[str]], entries: int) -> None:
    inner = Letters()
    config = {"tiers": [{"type": "memory", "max_entries": entries}]}
    cached = CachedEmbeddings(inner, config=config)
    for batch in batches:
        rows = cached.embed_documents(batch)
        assert len(rows) == len(batch)
        assert all(equal_as_float32(row, vector(text)) for row, text in zip(rows, batch, strict=True))
        for text in batch[:2]:
            assert equal_as_float32(cached.embed_query(text), vector("query: " + text))


# --- spaces -----------------------------------------------------------------------------------


def describe(embeddings: Embeddings, task: str = "document", **options: Any) -> Any:
    return CachedEmbeddings(embeddings, config=memory_config(), **options).cache.provider.space(task)


def test_queries_and_documents_share_vectors_only_if_symmetric() -> None:
    assert describe(Letters()) != describe(Letters(), "query")
    assert describe(Letters(), symmetric=True) == describe(Letters(), "query", symmetric=True)
    declared = {"model": "mine"}
    assert describe(Letters(), space=declared) != describe(Letters(), "query", space=declared)
    inner = Letters(prompt="")
    cached = CachedEmbeddings(inner, config=memory_config(), symmetric=True)
    cached.embed_documents(["a"])
    assert equal_as_float32(cached.embed_query("a"), vector("a"))
    assert inner._count == {"a": 1}


def test_everything_that_decides_vectors_is_in_the_space(openai: OpenAI, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = describe(openai())
    for options in (
        {"model": "text-embedding-3-large"},
        {"dimensions": 8},
        {"deployment": "mine"},
        {"embedding_ctx_length": 100},
        {"tokens": False},
        {"model_kwargs": {"truncate": True}},
        {"skip_empty": True},
    ):
        assert describe(openai(**options)) != plain, options
    for options in (
        {"chunk_size": 3},
        {"max_retries": 9},
        {"timeout": 3},
        {"api_key": "other"},
        {"organization": "mine"},
        {"default_headers": {"x": "y"}},
        {"show_progress_bar": True},
        {"model_kwargs": {"user": "me", "encoding_format": "float"}},
    ):
        assert describe(openai(**options)) == plain, options
    monkeypatch.setenv("OPENAI_BASE_URL", "http://one.example/v1")
    one = describe(OpenAIEmbeddings(api_key=SECRET))
    monkeypatch.setenv("OPENAI_BASE_URL", "http://two.example/v1")
    assert describe(OpenAIEmbeddings(api_key=SECRET)) != one, "the client has its URL from the environment"


def test_pydantic_embeddings_describe_themselves() -> None:
    assert describe(FakeEmbeddings(size=4)) != describe(FakeEmbeddings(size=5))
    assert describe(Letters(model="letters-2")) != describe(Letters())
    assert describe(Letters(prompt="")) != describe(Letters())
    assert describe(Letters()) == describe(Letters())


class Opaque(Embeddings):
    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        return [vector(text) for text in texts]

    def embed_query(self, text: str) -> list[float]:
        return vector(text)


class Named(Opaque):
    def __init__(self) -> None:
        self.model = "m"


class Nameless(BaseModel, Opaque):
    batch_size: int = 1
    _count: int = PrivateAttr(default=1)


class Nested(BaseModel, Opaque):
    model: str = "m"
    base: Any = None


def test_embeddings_without_a_description_are_refused_until_declared() -> None:
    class Local(Letters):
        pass

    script = type("Letters", (Letters,), {"__module__": "__main__"})
    for embeddings, message in (
        (Opaque(), "Opaque does not say"),
        (Nameless(), "Nameless does not say"),
        (Nested(base=object()), r"Nested\.base .of type object"),
        (script(), "another script may define a different class"),
        (Local(), "defined in a function"),
    ):
        with pytest.raises(SpaceError, match=message + r".*space="):
            CachedEmbeddings(embeddings, config=memory_config())
        cached = CachedEmbeddings(embeddings, config=memory_config(), space={"model": "mine"})
        assert equal_as_float32(cached.embed_documents(["a"]), [vector("a")])


@settings(deadline=None)
@given(pairs())
def test_embedders_share_a_key_only_if_their_settings_make_the_same_vectors(pair: Pair) -> None:
    config = memory_config()
    keys = [CachedEmbeddings(attach(Named(), mix), config=config).cache.explain("a").key for mix in pair.mixes]
    assert (keys[0] == keys[1]) is pair.are_equal


def test_changed_embeddings_are_refused(openai: OpenAI, face: Face) -> None:
    for inner, field in ((Letters(prompt="before: "), "prompt"), (openai(), "model")):
        config = memory_config()
        cached = CachedEmbeddings(inner, config=config)
        known = face.documents(cached, ["a"])
        as_it_was = inner.model_copy()
        setattr(inner, field, "after")
        assert face.documents(cached, ["a"]) == known
        for ask in (lambda: face.documents(cached, ["b"]), lambda: face.query(cached, "b")):  # noqa: B023
            with pytest.raises(SpaceError, match=rf"changed after it was wrapped \(.*{field}.*\)"):
                ask()
        again = CachedEmbeddings(as_it_was, config=config)
        assert face.documents(again, ["a", "b"])[0] == known[0]


class Quantized(Letters):
    encode_kwargs: dict[str, Any] = {}


def test_vectors_that_depend_on_the_batch_are_refused() -> None:
    tied = Quantized(encode_kwargs={"precision": "int8"})
    for declared in (None, {"model": "mine"}):
        with pytest.raises(SpaceError, match="depends on the other texts"):
            CachedEmbeddings(tied, config=memory_config(), space=declared)
        CachedEmbeddings(tied, config=memory_config(), space=declared, ignore=["encode_kwargs.precision"])
        plain = CachedEmbeddings(Letters(), config=memory_config(), space=declared)
        with pytest.raises(SpaceError, match="depends on the other texts"):
            plain.embed_documents(["a", "b"], late_chunking=True)
    CachedEmbeddings(Quantized(encode_kwargs={"precision": "float32"}), config=memory_config())


def test_other_types_than_embeddings_are_refused() -> None:
    with pytest.raises(TypeError, match="use config="):
        CachedEmbeddings("embedonce.toml")  # type: ignore[arg-type]


def test_kwargs_are_passed_on_and_change_the_space(server: OpenAIServer, openai: OpenAI, face: Face) -> None:
    cached = CachedEmbeddings(openai(), config=memory_config())
    plain = face.documents(cached, ["a"])
    assert len(plain[0]) == 16
    for _ in range(2):
        assert len(face.documents(cached, ["a"], dimensions=8)[0]) == 8
        assert len(face.query(cached, "a", dimensions=8)) == 8
    assert server.texts == 3
    assert face.documents(cached, ["a"], chunk_size=7, user="me") == plain
    assert server.texts == 3, "neither decides the vectors"
    with pytest.raises(SpaceError, match=r"the call's hook"):
        face.documents(cached, ["a"], hook=lambda text: text)
    inner = Letters()
    declared = CachedEmbeddings(inner, config=memory_config(), space={"model": "mine"})
    assert not equal_as_float32(face.query(declared, "a"), face.query(declared, "a", tone="kind"))
    assert len(inner._calls) == 2


class Titled(Embeddings):
    """Embeds each text with its title, as Google's embeddings do."""

    def __init__(self) -> None:
        self.model = "titled"
        self.calls: list[Any] = []

    def embed_documents(self, texts: list[str], *, titles: Any = None, batch_size: int = 1) -> list[list[float]]:
        self.calls.append((texts, titles))
        return [vector(f"{title} {text}") for text, title in zip(texts, titles or [""] * len(texts), strict=True)]

    def embed_query(self, text: str) -> list[float]:
        return vector(text)


def test_each_title_goes_with_its_text(face: Face) -> None:
    inner = Titled()
    cached = CachedEmbeddings(inner, config=memory_config(normalize=["strip", "casefold"]))

    def ask(texts: list[str], titles: Any) -> None:
        rows = face.documents(cached, texts, titles=titles, batch_size=1)
        assert equal_as_float32(
            rows, [vector(f"{title} {text.strip().lower()}") for text, title in zip(texts, titles, strict=True)]
        )

    ask(["Intro ", "It is steamed."], ["Tea Book", "Chapter 2"])
    ask(["intro", "It is oxidised."], ["Tea Book", "Chapter 2"])
    assert inner.calls[1:] == [(["it is oxidised."], ["Chapter 2"])]
    ask(["Intro", "Intro"], ["Coffee Book", None])
    ask(["Intro", "Intro"], ("Tea Book", "Coffee Book"))
    assert len(inner.calls) == 3
    assert equal_as_float32(face.documents(cached, ["Intro"]), [vector(" intro")]), "a text without a title is another"


def test_keywords_that_may_belong_to_single_texts_are_refused(face: Face) -> None:
    inner = Titled()
    for declared in (None, {"model": "mine"}):
        cached = CachedEmbeddings(inner, config=memory_config(), space=declared)
        with pytest.raises(SpaceError, match="headings has as many values as there are texts"):
            face.documents(cached, ["a", "b"], headings=["x", "y"])
        with pytest.raises(ValueError, match="titles must have one value per text; texts: 2, values: 1"):
            face.documents(cached, ["a", "b"], titles=["x"])
    assert inner.calls == []


def test_wrappers_can_be_copied_and_pickled(tmp_path: Path) -> None:
    file = tmp_path / "embedonce.toml"
    file.write_text('[key]\nversion = "copies"\n[[tiers]]\ntype = "memory"\n')
    for cached in (
        CachedEmbeddings(Letters(), config=file, symmetric=True, ignore=["size"]),
        CachedEmbeddings(Letters(), config=memory_config(), space={"model": "mine"}),
        CachedEmbeddings(config=NGRAM),
    ):
        rows = cached.embed_documents(MIXED)
        for again in (copy.copy(cached), copy.deepcopy(cached), pickle.loads(pickle.dumps(cached))):
            assert again is not cached
            assert again.embed_documents(MIXED) == rows
            assert again.cache.lookup(MIXED).sources == ["memory"] * len(MIXED)
    store = VectorByteStore(space={"model": "m"}, config=memory_config())
    store.mset([("a", b"[1.0]")])
    for other in (copy.copy(store), copy.deepcopy(store), pickle.loads(pickle.dumps(store))):
        assert other.mget(["a"]) == [b"[1.0]"]


def test_embeddings_with_connections_are_shared_by_copies_and_cannot_be_pickled(openai: OpenAI) -> None:
    cached = CachedEmbeddings(openai(), config=memory_config())
    rows = cached.embed_documents(MIXED)
    assert copy.deepcopy(cached).embed_documents(MIXED) == rows
    with pytest.raises(SpaceError, match="cannot pickle OpenAIEmbeddings") as raised:
        pickle.dumps(cached)
    assert SECRET not in str(raised.value)


def test_secrets_are_shown_nowhere(openai: OpenAI) -> None:
    inner = openai(default_headers={"authorization": SECRET}, model_kwargs={"access_token": SECRET})
    cached = CachedEmbeddings(inner, config=memory_config(secret=SECRET))
    shown = f"{cached!r} {cached.cache!r} {cached.cache.explain('a')} {cached.cache.provider.space('query')}"
    assert SECRET not in shown


def test_the_description_is_the_same_before_and_after_the_first_calls(openai: OpenAI, face: Face) -> None:
    for inner in (openai(), openai(tokens=False, model="m"), Letters(), CacheBackedEmbeddings(Letters(), None)):
        before = describe(inner)
        face.documents(inner, ["a", "b"]) if not isinstance(inner, CacheBackedEmbeddings) else face.query(inner, "a")
        face.query(inner, "c")
        assert describe(inner) == before


def test_embeddings_get_the_normalised_text() -> None:
    inner = Letters()
    cached = CachedEmbeddings(inner, config=memory_config(normalize=["strip"]))
    assert equal_as_float32(cached.embed_documents([" a", "a\n"]), [vector("a")] * 2)
    assert equal_as_float32(cached.embed_query(" a "), vector("query: a"))
    assert inner._count == {"a": 1, "query: a": 1}


# --- calls ------------------------------------------------------------------------------------


def test_misses_come_in_batches_of_the_embeddings_size(server: OpenAIServer, openai: OpenAI, face: Face) -> None:
    texts = [f"text {i}" for i in range(8)]
    cached = CachedEmbeddings(openai(chunk_size=3), config=memory_config())
    face.documents(cached, texts[:2])
    server.requests.clear()
    face.documents(cached, texts)
    assert [len(request.body["input"]) for request in server.requests] == [3, 3]


def test_vectors_computed_before_a_failure_are_kept(server: OpenAIServer, openai: OpenAI) -> None:
    texts = [f"text {i}" for i in range(9)]
    cached = CachedEmbeddings(openai(chunk_size=3), config=memory_config())
    cached.embed_documents(texts[:3])
    server.misbehave("unauthorized")
    with pytest.raises(Exception, match="401"):
        cached.embed_documents(texts)
    before = server.texts
    assert before == 6
    cached.embed_documents(texts)
    assert server.texts == 9


def test_threads_and_tasks_compute_each_text_once() -> None:
    inner = Letters()
    cached = CachedEmbeddings(inner, config=memory_config())
    texts = [f"text {i}" for i in range(20)]
    start = threading.Barrier(6)

    def work(turn: int) -> Any:
        start.wait(60)
        mine = texts[turn:] + texts[:turn]
        return mine, cached.embed_documents(mine) if turn % 2 else asyncio.run(cached.aembed_documents(mine))

    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(work, range(6)))
    for mine, rows in answers:
        assert equal_as_float32(rows, [vector(text) for text in mine])
    assert inner._count == Counter(texts)

    async def together() -> Any:
        return await asyncio.gather(*(cached.aembed_query("same") for _ in range(8)))

    rows = asyncio.run(together())
    assert all(equal_as_float32(row, vector("query: same")) for row in rows)
    assert inner._count["query: same"] == 1


def test_equal_configurations_share_one_cache() -> None:
    one, two, other = Letters(), Letters(), Letters(model="letters-2")
    config = memory_config()
    first, second, third = (CachedEmbeddings(inner, config=dict(config)) for inner in (one, two, other))
    first.embed_documents(["a"])
    second.embed_documents(["a"])
    third.embed_documents(["a"])
    assert (one._calls, two._calls, other._calls) == ([1], [], [1])


def test_after_a_restart_the_disk_has_every_vector(tmp_path: Path, face: Face) -> None:
    cached = CachedEmbeddings(Letters(), config=disk_config(tmp_path))
    documents, query = face.documents(cached, MIXED), face.query(cached, "a")
    cache = weakref.ref(cached.cache._chain)
    del cached
    wait_until_collected(cache)
    inner = Letters()
    cached = CachedEmbeddings(inner, config=disk_config(tmp_path))
    assert face.documents(cached, MIXED) == documents
    assert face.query(cached, "a") == query
    assert inner._calls == []
    assert cached.cache.stats().tiers["disk"].hits == len(set(MIXED)) + 1


# --- CacheBackedEmbeddings over a chain -------------------------------------------------------


def to_upper(text: str) -> str:
    return f"mine:{text.upper()}"


@pytest.mark.parametrize("encoder", ["sha256", "blake2b", "sha512", to_upper])
def test_cache_backed_embeddings_cold_warm_and_restarted(tmp_path: Path, face: Face, encoder: Any) -> None:
    namespace = {} if callable(encoder) else {"namespace": "letters-1"}
    unique = list(dict.fromkeys(MIXED))

    def make_backed(inner: Letters) -> tuple[CacheBackedEmbeddings, VectorByteStore]:
        store = VectorByteStore(space={"model": "letters-1"}, config=disk_config(tmp_path))
        return CacheBackedEmbeddings.from_bytes_store(inner, store, key_encoder=encoder, **namespace), store

    plain = face.documents(Letters(), unique)
    for computed in (unique, []):
        inner = Letters()
        embeddings, store = make_backed(inner)
        assert equal_as_float32(face.documents(embeddings, unique), plain)
        assert list(inner._count) == computed
        assert equal_as_float32(face.documents(embeddings, unique[::-1]), plain[::-1])
        assert list(inner._count) == computed
        cache = weakref.ref(store.cache._chain)
        del embeddings, store
        wait_until_collected(cache)
    _, store = make_backed(Letters())
    keys = list(store.yield_keys())
    assert len(keys) == len(unique)
    assert all(key.startswith("mine:" if callable(encoder) else "letters-1") for key in keys)
    assert not any(text in str(keys) for text in unique)


def test_cache_backed_queries(face: Face) -> None:
    inner = Letters()
    documents, queries = (
        VectorByteStore(space={"model": "letters-1", "task": task}, config=memory_config()) for task in "dq"
    )
    embeddings = CacheBackedEmbeddings.from_bytes_store(
        inner, documents, key_encoder="sha256", query_embedding_cache=queries
    )
    for _ in range(2):
        assert equal_as_float32(face.documents(embeddings, ["a"]), [vector("a")])
        assert equal_as_float32(face.query(embeddings, "a"), vector("query: a"))
    assert inner._calls == [1, 1]


def test_values_come_back_in_order_as_float32() -> None:
    store = VectorByteStore(space={"model": "m"}, config=memory_config())
    store.mset([(key, json.dumps(vector(key)).encode()) for key in "abc"])
    values = store.mget(["c", "x", "a", "c"])
    assert values[1] is None
    assert values[0] == values[3]
    assert equal_as_float32(json.loads(values[2] or b""), vector("a"))
    assert store.mget([]) == []
    store.mset([])
    store.mset([("a", b"[1, 1, 1, 1, 1, 1, 1, 1]"), ("a", json.dumps(vector("z")).encode())])
    assert equal_as_float32(json.loads(store.mget(["a"])[0] or b""), vector("z"))


def test_stores_of_different_spaces_share_nothing() -> None:
    config = memory_config()
    one, two = (VectorByteStore(space={"model": name}, config=config) for name in ("one", "two"))
    one.mset([("key", b"[1.0]")])
    assert two.mget(["key"]) == [None]
    assert list(two.yield_keys()) == []
    two.mdelete(["key"])
    assert one.mget(["key"]) == [b"[1.0]"]


def test_a_byte_store_holds_only_vectors() -> None:
    store = VectorByteStore(space={"model": "m"}, config=memory_config())
    for value in (b"text", b"{}", b'["a"]', b"[true]", b"[NaN]", b"\xff", b"[1" + b"0" * 400 + b"]"):
        with pytest.raises(ValueError, match="item 1 is not a JSON list of numbers"):
            store.mset([("good", b"[1.0]"), ("bad", value)])
    for value in (b"[]", b"[0.0]", b"[1e300]", b"[1.0, 2.0]"):
        with pytest.raises(ProviderError):
            store.mset([("good", b"[1.0]"), ("bad", value)])
    assert store.mget(["good", "bad"]) == [None, None]
    with pytest.raises(SpaceError, match="must name the model"):
        VectorByteStore(space={"dimensions": 3}, config=memory_config())
    with pytest.raises(ConfigError, match="a byte store sees keys and never the texts"):
        VectorByteStore(space={"model": "m"}, config=memory_config(normalize=["strip"]))
    with pytest.raises(TypeError, match="cannot compute them"):
        store.cache.embed("a")


def test_an_invalid_key_stores_and_removes_nothing() -> None:
    store = VectorByteStore(space={"model": "m"}, config=memory_config())
    store.mset([("good", b"[1.0]")])
    with pytest.raises(TextError):
        store.mset([("good", b"[2.0]"), ("\ud800", b"[1.0]")])
    with pytest.raises(TextError):
        asyncio.run(store.amset([("good", b"[2.0]"), ("\ud800", b"[1.0]")]))
    assert store.mget(["good", "\ud800"]) == [b"[1.0]", None]


def test_a_byte_store_works_on_a_tier_that_fails_or_cannot_list(face: Face) -> None:
    store = VectorByteStore(space={"model": "m"}, config=memory_config())

    def make_cache(*backends: DictBackend) -> Cache:
        return Cache(store.cache.provider, list(backends))

    down = DictBackend()
    store.cache = make_cache(DictBackend(scan=False))
    store.mset([("a", b"[1.0]")])
    assert store.mget(["a"]) == [b"[1.0]"]
    with pytest.raises(TierError, match="it cannot list its keys"):
        list(store.yield_keys())
    store.cache = make_cache(down)
    store.mset([("a", b"[1.0]")])
    broken: Callable[[Sequence[str]], Any] = lambda keys: 1 / 0  # noqa: E731
    down.get_many = broken  # type: ignore[method-assign]
    assert store.mget(["a"]) == [None], "a tier that fails is a miss, and the text is embedded again"


def test_a_missing_framework_is_named_with_its_install_command() -> None:
    code = "import sys; sys.modules['langchain_core'] = None; import embedonce_integrations.langchain"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "ImportError: " in done.stderr
    assert "pip install 'embedonce[langchain]'" in done.stderr
