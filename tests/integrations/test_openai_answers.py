"""Tests for the answers of OpenAI clients inside embedders, wherever the embedder keeps or makes its clients."""

from __future__ import annotations

import asyncio
import contextvars
import json
import pickle
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import numpy as np
import openai
import pytest
from langchain_core.embeddings import Embeddings

from embedonce import ProviderError
from embedonce.testing import OpenAIServer
from embedonce_integrations import openai_answers
from embedonce_integrations.langchain import CachedEmbeddings
from embedonce_integrations.openai_answers import AnswersRead, reading_answers, watch_client

from .embedders import equal_as_float32, memory_config

MODEL = "text-embedding-3-small"
TEXTS = ["Green tea", "Black tea", "White tea"]


_clients: list[openai.OpenAI] = []


@pytest.fixture(autouse=True)
def closed_clients() -> Iterator[None]:
    yield
    while _clients:
        _clients.pop().close()


class Holder:
    """Holds a client, so that the embeddings only hold an object that holds it."""

    def __init__(self, client: Any) -> None:
        self.client = client


class Asking(Embeddings):
    """Asks an OpenAI client and takes the vectors as they come."""

    def __init__(self, server: OpenAIServer) -> None:
        self.base_url = server.base_url
        self.model = MODEL

    def make_client(self) -> openai.OpenAI:
        _clients.append(openai.OpenAI(base_url=self.base_url, api_key="any", max_retries=0))
        return _clients[-1]

    def get_client(self) -> openai.OpenAI:
        raise NotImplementedError

    def ask(self, client: openai.OpenAI, texts: list[str]) -> list[Any]:
        return [item.embedding for item in client.embeddings.create(model=self.model, input=texts).data]

    def embed_documents(self, texts: list[str]) -> list[Any]:
        return self.ask(self.get_client(), texts)

    def embed_query(self, text: str) -> Any:
        return self.embed_documents([text])[0]


class Held(Asking):
    def __init__(self, server: OpenAIServer) -> None:
        super().__init__(server)
        self._inner = [Holder(self.make_client())]

    def get_client(self) -> openai.OpenAI:
        client: openai.OpenAI = self._inner[0].client
        return client


class Lazy(Asking):
    _client: openai.OpenAI | None = None

    def get_client(self) -> openai.OpenAI:
        self._client = self._client or self.make_client()
        return self._client


class PerCall(Asking):
    def get_client(self) -> openai.OpenAI:
        return self.make_client()


class Raw(Lazy):
    def ask(self, client: openai.OpenAI, texts: list[str]) -> list[Any]:
        answer = client.embeddings.with_raw_response.create(model=self.model, input=texts)
        return [item.embedding for item in answer.parse().data]


class Streaming(Lazy):
    def ask(self, client: openai.OpenAI, texts: list[str]) -> list[Any]:
        with client.embeddings.with_streaming_response.create(model=self.model, input=texts) as answer:
            return [item.embedding for item in answer.parse().data]


class Iterating(Lazy):
    def ask(self, client: openai.OpenAI, texts: list[str]) -> list[Any]:
        return super().ask(client, texts) if len(texts) < 2 else super().ask(client, list(iter(texts)))


class InThreads(Held):
    """Calls its client in threads that do not copy the caller's context."""

    def embed_documents(self, texts: list[str]) -> list[Any]:
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(self.ask, self.get_client(), texts).result()


class Swallowing(Lazy):
    def embed_documents(self, texts: list[str]) -> list[Any]:
        try:
            return super().embed_documents(texts)
        except Exception:
            return [[1.0, 2.0] for _ in texts]


class InChunks(Asking):
    """Sends several requests at the same time, with an async client that it makes in each call."""

    def embed_documents(self, texts: list[str]) -> list[Any]:
        return asyncio.run(self.aembed_documents(texts))

    async def aembed_documents(self, texts: list[str]) -> list[Any]:
        async with openai.AsyncOpenAI(base_url=self.base_url, api_key="any", max_retries=0) as client:

            async def ask(part: list[str]) -> list[Any]:
                answer = await client.embeddings.create(model=self.model, input=part)
                return [item.embedding for item in answer.data]

            parts = await asyncio.gather(*(ask(texts[at : at + 2]) for at in range(0, len(texts), 2)))
            return [row for part in parts for row in part]


class LazyInThreads(Lazy):
    """Makes its client in a thread that does not copy the caller's context."""

    def embed_documents(self, texts: list[str]) -> list[Any]:
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(super().embed_documents, texts).result()


class PerCallInThreads(PerCall):
    def embed_documents(self, texts: list[str]) -> list[Any]:
        with ThreadPoolExecutor(2) as pool:
            parts = pool.map(super().embed_documents, [texts[:2], texts[2:]] if len(texts) > 2 else [texts])
            return [row for part in parts for row in part]


class InAnotherLoop(InChunks):
    def embed_documents(self, texts: list[str]) -> list[Any]:
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(super().embed_documents, texts).result()


class Posting(Lazy):
    """Sends its requests as LiteLLM does."""

    cast_to: Any = openai.types.CreateEmbeddingResponse

    def ask(self, client: openai.OpenAI, texts: list[str]) -> list[Any]:
        body = {"model": self.model, "input": texts, "encoding_format": "float"}
        return self.read(client.post("/embeddings", body=body, cast_to=self.cast_to))

    def read(self, answer: Any) -> list[Any]:
        return [item.embedding for item in answer.data]


class PostingForADict(Posting):
    cast_to = object

    def read(self, answer: Any) -> list[Any]:
        return [item["embedding"] for item in answer["data"]]


class PostingAsync(Posting):
    def embed_documents(self, texts: list[str]) -> list[Any]:
        return asyncio.run(self.aembed_documents(texts))

    async def aembed_documents(self, texts: list[str]) -> list[Any]:
        async with openai.AsyncOpenAI(base_url=self.base_url, api_key="any", max_retries=0) as client:
            body = {"model": self.model, "input": texts, "encoding_format": "float"}
            return self.read(await client.post("/embeddings", body=body, cast_to=self.cast_to))


class ReadingTheBody(Lazy):
    """Decodes the body of the response by itself."""

    def ask(self, client: openai.OpenAI, texts: list[str]) -> list[Any]:
        answer = client.embeddings.with_raw_response.create(model=self.model, input=texts, encoding_format="float")
        decoded = [json.loads(answer.text), json.loads(answer.content), answer.http_response.json()]
        assert decoded[0] == decoded[1] == decoded[2]
        assert [item.embedding for item in answer.parse().data] == [item["embedding"] for item in decoded[0]["data"]]
        return [item["embedding"] for item in decoded[0]["data"]]


class ReadingTheStream(Lazy):
    def ask(self, client: openai.OpenAI, texts: list[str]) -> list[Any]:
        with client.embeddings.with_streaming_response.create(
            model=self.model, input=texts, encoding_format="float"
        ) as answer:
            return [item["embedding"] for item in json.loads(b"".join(answer.iter_bytes()))["data"]]


class ReadingTheStreamAsync(InChunks):
    async def aembed_documents(self, texts: list[str]) -> list[Any]:
        async with (
            openai.AsyncOpenAI(base_url=self.base_url, api_key="any", max_retries=0) as client,
            client.embeddings.with_streaming_response.create(
                model=self.model, input=texts, encoding_format="float"
            ) as answer,
        ):
            return [item["embedding"] for item in (await answer.json())["data"]]


class Original(Lazy):
    """Calls the method that it took from the class before this package replaced it."""

    def ask(self, client: openai.OpenAI, texts: list[str]) -> list[Any]:
        with reading_answers():
            create: Any = openai.resources.embeddings.Embeddings.create
        return [
            item.embedding
            for item in create.__embedonce_original__(client.embeddings, model=self.model, input=texts).data
        ]


KINDS = [
    *(Held, Lazy, PerCall, Raw, Streaming, Iterating, InThreads, InChunks),
    *(LazyInThreads, PerCallInThreads, InAnotherLoop, Original),
    *(Posting, PostingForADict, PostingAsync),
    *(ReadingTheBody, ReadingTheStream, ReadingTheStreamAsync),
]


@pytest.fixture
def plain(server: OpenAIServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server.base_url, api_key="any", max_retries=0) as client:
        yield client


def right(server: OpenAIServer, texts: list[str]) -> list[Any]:
    return [server.vector_of(text, model=MODEL) for text in texts]


@pytest.mark.parametrize("kind", KINDS)
def test_each_text_gets_its_own_vector(server: OpenAIServer, kind: Callable[[OpenAIServer], Asking]) -> None:
    cached = CachedEmbeddings(kind(server), config=memory_config())
    server.misbehave("out_of_order", times=None)
    for _ in range(2):
        assert equal_as_float32(cached.embed_documents(TEXTS), right(server, TEXTS))
    assert equal_as_float32(cached.embed_documents([*TEXTS[::-1], "Oolong"])[:3], right(server, TEXTS[::-1]))


@pytest.mark.parametrize("kind", [*KINDS, Swallowing])
def test_an_answer_that_does_not_say_which_vector_is_whose_is_an_error(
    server: OpenAIServer, kind: Callable[[OpenAIServer], Asking]
) -> None:
    cached = CachedEmbeddings(kind(server), config=memory_config())
    server.misbehave("duplicate_index")
    with pytest.raises(ProviderError, match="index"):
        cached.embed_documents(TEXTS)
    assert cached.cache.lookup(TEXTS).sources == [None] * 3
    server.heal()
    assert equal_as_float32(cached.embed_documents(TEXTS), right(server, TEXTS))


async def test_async_clients_are_read_in_the_callers_event_loop(server: OpenAIServer) -> None:
    cached = CachedEmbeddings(InChunks(server), config=memory_config())
    server.misbehave("out_of_order")
    assert equal_as_float32(await cached.aembed_documents([*TEXTS, "Oolong"]), right(server, [*TEXTS, "Oolong"]))


def test_other_clients_see_the_answers_as_they_are(server: OpenAIServer, plain: openai.OpenAI) -> None:
    embedder = Held(server)
    CachedEmbeddings(embedder, config=memory_config()).embed_documents(TEXTS)
    server.misbehave("out_of_order")
    answer = plain.embeddings.create(model=MODEL, input=TEXTS)
    assert [item.index for item in answer.data] != [0, 1, 2]
    server.misbehave("short")
    assert len(plain.embeddings.create(model=MODEL, input=TEXTS).data) == 2
    server.heal()
    with reading_answers() as read:
        ask_elsewhere(plain)
    assert read.model is None, "the model of an unknown client is not read"


def ask_elsewhere(client: openai.OpenAI) -> Any:
    """Call a client in a context of its own."""
    return contextvars.Context().run(client.embeddings.create, model=MODEL, input=TEXTS)


def test_an_answer_in_another_context_is_sorted_while_a_call_runs(server: OpenAIServer, plain: openai.OpenAI) -> None:
    server.misbehave("out_of_order", times=None)
    with reading_answers():
        answer = ask_elsewhere(plain)
    assert [item.index for item in answer.data] == [0, 1, 2]
    assert [item.index for item in ask_elsewhere(plain).data] != [0, 1, 2]


def test_an_answer_in_another_context_that_cannot_be_sorted_fails_all_calls(
    server: OpenAIServer, plain: openai.OpenAI
) -> None:
    server.misbehave("short")
    with ExitStack() as stack:
        for _ in range(2):
            stack.enter_context(pytest.raises(ProviderError, match="one vector per text"))
            stack.enter_context(reading_answers())
        assert len(ask_elsewhere(plain).data) == 2, "its caller gets the answer as it is"


def test_the_error_of_an_embedder_hides_the_error_of_an_answer(server: OpenAIServer, plain: openai.OpenAI) -> None:
    server.misbehave("short")
    with ExitStack() as stack:
        stack.enter_context(pytest.raises(KeyError))
        stack.enter_context(reading_answers())
        ask_elsewhere(plain)
        raise KeyError


def test_the_model_of_a_watched_client_is_known_if_one_call_runs(server: OpenAIServer, plain: openai.OpenAI) -> None:
    watch_client(plain)
    with reading_answers() as read:
        ask_elsewhere(plain)
        assert read.model == MODEL
        assert read.tokens is not None
        with reading_answers() as other:
            ask_elsewhere(plain)
    assert (read.model, other.model) == (None, None), "the answer belongs to one of two calls"


def test_a_request_is_counted_once(server: OpenAIServer, plain: openai.OpenAI) -> None:
    server.misbehave("out_of_order")
    counts = []
    for method in (plain.embeddings.create, plain.embeddings.with_raw_response.create):
        with reading_answers() as read:
            answer = method(model=MODEL, input=TEXTS)
        counts.append(read.tokens)
    with reading_answers() as read:
        plain.post("/embeddings", body={"model": MODEL, "input": TEXTS}, cast_to=openai.types.CreateEmbeddingResponse)
    assert counts == [read.tokens, read.tokens]
    assert read.tokens is not None
    assert answer.headers["content-type"].startswith("application/json"), "a sorted response keeps its headers"


@pytest.mark.parametrize("path", ["/embeddings", "embeddings", "{base_url}/embeddings"])
@pytest.mark.parametrize("place", ["body", "extra_json"])
def test_the_answer_to_a_posted_request_is_sorted(
    server: OpenAIServer, plain: openai.OpenAI, path: str, place: str
) -> None:
    server.misbehave("out_of_order")
    body, extra = {"model": MODEL, "input": iter(TEXTS)}, {}
    if place == "extra_json":
        body, extra = {"model": MODEL, "input": "other"}, {"input": TEXTS}
    with reading_answers():
        answer = plain.post(
            path.format(base_url=server.base_url),
            body=body,
            options={"extra_json": extra},
            cast_to=openai.types.CreateEmbeddingResponse,
        )
    assert [item.index for item in answer.data] == [0, 1, 2]


def test_a_posted_request_may_return_a_text_or_a_response(server: OpenAIServer, plain: openai.OpenAI) -> None:
    body = {"model": MODEL, "input": TEXTS}
    server.misbehave("out_of_order", times=None)
    with reading_answers():
        text = plain.post("/embeddings", body=body, cast_to=str)
        response = plain.post("/embeddings", body=body, cast_to=type(_get_response(plain)))
    for decoded in (json.loads(text), response.json()):
        assert [item["index"] for item in decoded["data"]] == [0, 1, 2]


def _get_response(client: openai.OpenAI) -> Any:
    """Return a response of the HTTP library that the client uses: httpx or its successor."""
    return client.embeddings.with_raw_response.create(model=MODEL, input=TEXTS).http_response


def test_a_body_that_is_not_json_is_an_error(plain: openai.OpenAI) -> None:
    reader = openai_answers._find_reader(plain)
    assert reader is None
    with ExitStack() as stack:
        stack.enter_context(pytest.raises(ProviderError, match="not a JSON object"))
        stack.enter_context(reading_answers())
        reader = openai_answers._find_reader(plain)
        assert reader is not None
        reader.call(lambda: "<html>", TEXTS)


def test_other_requests_are_left_alone(plain: openai.OpenAI) -> None:
    with reading_answers() as read, pytest.raises(openai.NotFoundError):
        plain.post("/other", body={"model": MODEL, "input": TEXTS}, cast_to=object)
    assert read.model is None


def test_what_the_answers_say_goes_to_the_cache(server: OpenAIServer, plain: openai.OpenAI) -> None:
    with reading_answers() as read:
        plain.embeddings.create(model=MODEL, input=TEXTS)
        plain.embeddings.create(model=MODEL, input="one")
    answer = read.make_answer(np.ones((4, 2)))
    assert answer.model == MODEL
    assert answer.tokens is not None
    assert answer.tokens > 0
    read.add(SimpleNamespace(model="other", usage=None))
    assert read.model == f"other + {MODEL}", "an embedder that joins two models has a name of its own"
    assert read.tokens is None
    read.add(SimpleNamespace(model=None))
    assert read.model is None


def test_an_embedder_without_a_client_has_no_model_and_no_tokens() -> None:
    read = AnswersRead()
    assert (read.model, read.tokens) == (None, None)


@pytest.mark.parametrize("given", ["text", [1, 2, 3], ["text"], [[1, 2]], ("text",), np.array([1, 2])])
def test_one_input_has_one_vector(plain: openai.OpenAI, server: OpenAIServer, given: Any) -> None:
    if isinstance(given, np.ndarray):
        given = given.tolist()
    with reading_answers():
        assert len(plain.embeddings.create(model=MODEL, input=given).data) == 1
    server.misbehave("long")
    with pytest.raises(ProviderError, match="one vector per text"), reading_answers():
        plain.embeddings.create(model=MODEL, input=given)


def test_a_client_is_watched_by_itself_or_its_embeddings(server: OpenAIServer) -> None:
    clients = [openai.OpenAI(base_url=server.base_url, api_key="any") for _ in range(2)]
    watch_client(clients[0])
    watch_client(clients[1].embeddings)
    watch_client(object())
    server.misbehave("out_of_order")
    for client in clients:
        assert [item.index for item in client.embeddings.create(model=MODEL, input=TEXTS).data] == [0, 1, 2]
        client.close()


@pytest.mark.parametrize(
    ("names", "module"), [(("Embeddings", "create"), openai.resources.embeddings), (("OpenAI", "post"), openai)]
)
def test_the_methods_keep_their_names_and_can_be_pickled(names: tuple[str, str], module: Any) -> None:
    with reading_answers():
        method = getattr(getattr(module, names[0]), names[1])
    assert method.__name__ == names[1]
    assert pickle.loads(pickle.dumps(method)) is method
