"""Tests for OpenAI's client with a cache inside, against an API on loopback."""

from __future__ import annotations

import asyncio
import copy
import inspect
import json
import os
import pickle
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import numpy as np
import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.types import CreateEmbeddingResponse

import embedonce
from embedonce import ProviderError, SpaceError, keys
from embedonce.testing import OpenAIServer
from embedonce.testing.servers.loopback import Reply
from embedonce_integrations.openai import AsyncCachedEmbeddings, CachedEmbeddings, cached
from embedonce_providers.openai import OpenAIProvider

Face = Literal["blocking", "async"]
MODEL = "text-embedding-3-small"


@pytest.fixture(autouse=True)
def clear_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(("OPENAI_", "AZURE_OPENAI_")):
            monkeypatch.delenv(name)


@pytest.fixture
def server() -> Iterator[OpenAIServer]:
    with OpenAIServer(deployments={"mine": MODEL}) as server:
        yield server


@pytest.fixture
def tiers(tmp_path: Path) -> dict[str, Any]:
    """Return a configuration that no other test has, because equal configurations share a cache."""
    disk = {"type": "disk", "path": str(tmp_path / "disk"), "timeout": "60s"}  # long enough for a busy machine
    return {"tiers": [{"type": "memory"}, disk]}


@pytest.fixture(params=["blocking", "async"])
def face(request: pytest.FixtureRequest) -> Face:
    face: Face = request.param
    return face


class Program:
    """A program that makes a client and calls its ``create`` several times in a row."""

    def __init__(self, server: OpenAIServer, face: Face, **options: Any) -> None:
        self.face = face
        self.options = {"base_url": server.base_url, "api_key": "any", "max_retries": 0, "timeout": 20, **options}

    def __call__(self, *calls: dict[str, Any], **wrap: Any) -> list[Any]:
        """Return the answers or exceptions of calls to the plain client or, with ``wrap``, to the cached one."""
        if self.face == "async":
            return asyncio.run(self._call_async(calls, wrap))
        answers: list[Any] = []
        with openai.OpenAI(**self.options) as plain:
            client = cached(plain, **wrap) if wrap else plain
            for call in calls:
                try:
                    answers.append(_send(client, call))
                except Exception as error:
                    answers.append(error)
        return answers

    async def _call_async(self, calls: tuple[dict[str, Any], ...], wrap: dict[str, Any]) -> list[Any]:
        answers: list[Any] = []
        async with openai.AsyncOpenAI(**self.options) as plain:
            client = cached(plain, **wrap) if wrap else plain
            for call in calls:
                try:
                    answers.append(await _send(client, call))
                except Exception as error:
                    answers.append(error)
        return answers


def _send(client: Any, call: dict[str, Any]) -> Any:
    if "post" in call:
        return client.post(**call["post"])
    embeddings = client.embeddings.with_raw_response if call.get("raw") else client.embeddings
    return embeddings.create(**{name: value for name, value in call.items() if name != "raw"})


def vectors(answer: Any) -> list[list[float]]:
    return [np.float32(item.embedding).tolist() for item in answer.data]


# --- without a cache, cold, warm ---------------------------------------------------------------

SHAPES: dict[str, Any] = {
    "a text": "one",
    "texts": ["one", "two", "three", "one"],
    "tokens": [3, 1, 4],
    "lists of tokens": [[3, 1, 4], [1, 5], [3, 1, 4]],
}


@pytest.mark.parametrize("form", [openai.omit, "float", "base64"], ids=["unset", "float", "base64"])
@pytest.mark.parametrize("given", SHAPES.values(), ids=SHAPES.keys())
def test_answers_without_a_cache_cold_and_warm_are_equal(
    server: OpenAIServer, tiers: dict[str, Any], face: Face, given: Any, form: Any
) -> None:
    program = Program(server, face)
    call = {"model": MODEL, "input": given, "encoding_format": form, "dimensions": 12}
    (plain,) = program(call)
    server.count.clear()
    (cold,) = program(call, config=tiers)
    computed = server.texts
    (warm,) = program(call, config=tiers)
    assert computed == len(server.count)
    assert server.texts == computed
    for answer in (cold, warm):
        assert type(answer) is type(plain)
        assert type(answer.data[0].embedding) is type(plain.data[0].embedding)
        assert [item.index for item in answer.data] == [item.index for item in plain.data]
        assert [item.embedding for item in answer.data] == [item.embedding for item in plain.data]
        assert (answer.object, answer.model) == (plain.object, plain.model)
    assert cold.usage.total_tokens == sum(map(server.tokens_of, server.count))
    assert (warm.usage.prompt_tokens, warm.usage.total_tokens) == (0, 0)


def test_each_input_of_a_call_is_looked_up(server: OpenAIServer, tiers: dict[str, Any], face: Face) -> None:
    first, second = Program(server, face)(
        {"model": MODEL, "input": ["one", "two"]},
        {"model": MODEL, "input": ["three", "two", "four", "one", "three"]},
        config=tiers,
    )
    assert server.requests[1].body["input"] == ["three", "four"]
    assert vectors(second) == [server.vector_of(text).tolist() for text in ("three", "two", "four", "one", "three")]
    assert second.usage.total_tokens == 2
    assert first.model == second.model == MODEL


def test_iterables_that_can_be_read_only_once_work(server: OpenAIServer, tiers: dict[str, Any], face: Face) -> None:
    program = Program(server, face)
    texts, tokens = program(
        {"model": MODEL, "input": (text for text in ("one", "two"))},
        {"model": MODEL, "input": (iter(tokens) for tokens in ((1, 2), (3,)))},
        config=tiers,
    )
    assert vectors(texts) == [server.vector_of(text).tolist() for text in ("one", "two")]
    assert vectors(tokens) == [server.vector_of(tokens).tolist() for tokens in ([1, 2], [3])]


def test_tokens_and_the_same_digits_as_text_share_no_vector(
    server: OpenAIServer, tiers: dict[str, Any], face: Face
) -> None:
    answers = Program(server, face)(
        *({"model": MODEL, "input": given} for given in (["1,2", "12"], [[1, 2], [12]], [1, 2])), config=tiers
    )
    assert [vectors(answer) for answer in answers] == [
        [server.vector_of("1,2").tolist(), server.vector_of("12").tolist()],
        [server.vector_of([1, 2]).tolist(), server.vector_of([12]).tolist()],
        [server.vector_of([1, 2]).tolist()],
    ]
    assert server.requests[1].body["input"] == [[1, 2], [12]]
    assert len(server.requests) == 2


@pytest.mark.parametrize("step", [lambda text: text.replace(",", ""), lambda text: re.sub(r"\d", "0", text)])
def test_a_normalisation_step_that_changes_tokens_is_an_error(
    server: OpenAIServer, tiers: dict[str, Any], face: Face, step: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(keys.NORMALIZERS, "strip", step)
    call = {"model": MODEL, "input": [[1, 23], [12, 3]]}
    (error,) = Program(server, face)(call, config={**tiers, "key": {"normalize": ["strip"]}})
    assert type(error) is SpaceError
    assert server.texts == 0


def test_the_endpoint_gets_the_normalised_text(server: OpenAIServer, tiers: dict[str, Any], face: Face) -> None:
    tiers["key"] = {"normalize": ["strip"]}
    (answer,) = Program(server, face)({"model": MODEL, "input": [" one ", "one"]}, config=tiers)
    assert vectors(answer) == [server.vector_of("one").tolist()] * 2
    assert server.count == {"one": 1}


# --- keys -------------------------------------------------------------------------------------

OTHERS: list[dict[str, Any]] = [
    {"model": "another"},
    {"dimensions": 8},
    {"extra_body": {"input_type": "query"}},
    {"extra_body": {"dimensions": 9}},
    {"extra_query": {"tenant": "t"}},
]


def test_arguments_that_decide_vectors_are_in_the_key(server: OpenAIServer, tiers: dict[str, Any], face: Face) -> None:
    calls = [{"model": MODEL, "input": "one"} | other for other in [{}, *OTHERS]]
    answers = Program(server, face)(*calls, *calls, config=tiers)
    assert len(server.requests) == len(calls)
    assert [vectors(answer) for answer in answers[: len(calls)]] == [
        vectors(answer) for answer in answers[len(calls) :]
    ]
    assert vectors(answers[3]) == [server.vector_of("one", input_type="query").tolist()]
    assert vectors(answers[4]) == [server.vector_of("one", dimensions=9).tolist()]


def test_other_arguments_are_not_in_the_key(server: OpenAIServer, tiers: dict[str, Any], face: Face) -> None:
    others = {"user": "me", "extra_headers": {"x-mine": "1"}, "timeout": 19.0, "encoding_format": "float"}
    Program(server, face)(
        {"model": MODEL, "input": "one", **others},
        {"model": MODEL, "input": "one"},
        {"model": MODEL, "input": "one", "extra_body": {"user": "you"}},
        config=tiers,
    )
    assert len(server.requests) == 1
    assert server.requests[0].body == {"model": MODEL, "input": ["one"], "user": "me", "encoding_format": "float"}
    assert server.requests[0].headers["x-mine"] == "1"


def test_another_endpoint_is_another_space(server: OpenAIServer, tiers: dict[str, Any], face: Face) -> None:
    call = {"model": MODEL, "input": "one"}
    with OpenAIServer() as other:
        for endpoint in (server, other):
            Program(endpoint, face)(call, config=tiers)
        assert other.texts == 1
        for endpoint in (server, other):
            Program(endpoint, face)(call, config=tiers, endpoint_name="ours")
        assert (server.texts, other.texts) == (2, 1)


def test_the_openai_provider_has_the_same_vectors(server: OpenAIServer, tiers: dict[str, Any], face: Face) -> None:
    """Programs that use the client and programs that use the provider can share a chain."""
    with embedonce.open(tiers, provider=OpenAIProvider(model=MODEL, base_url=server.base_url)) as cache:
        found = cache.embed("one")
    (answer,) = Program(server, face)({"model": MODEL, "input": "one"}, config=tiers)
    assert vectors(answer) == [found.tolist()]
    assert server.texts == 1


# --- failures ---------------------------------------------------------------------------------

CLIENT_ERRORS: dict[str, type[Exception]] = {
    "empty": ValueError,  # the client raises it
    "error_as_200": ValueError,
    "not_json": AttributeError,
    "rate_limit": openai.RateLimitError,
    "rate_limit_message": openai.RateLimitError,
    "rate_limit_no_hint": openai.RateLimitError,
    "quota": openai.RateLimitError,
    "server_error": openai.InternalServerError,
    "bad_request": openai.BadRequestError,
    "unauthorized": openai.AuthenticationError,
    "truncated": openai.APIConnectionError,
    "disconnect": openai.APIConnectionError,
    "hang": openai.APITimeoutError,
}
KNOWN = ["known one", "known two", "known three"]
FRESH = ["fresh one", "fresh two", "fresh three", "fresh four"]
MIXED = [FRESH[0], KNOWN[0], FRESH[1], KNOWN[2], FRESH[2], FRESH[0], KNOWN[1], FRESH[3]]


@pytest.mark.parametrize("kind", OpenAIServer.KINDS)
def test_hits_and_misses_during_each_fault(server: OpenAIServer, tiers: dict[str, Any], face: Face, kind: Any) -> None:
    program = Program(server, face)
    program({"model": MODEL, "input": KNOWN}, config=tiers)
    server.misbehave(kind, times=None, seconds=0.0001)
    timeout = {"timeout": 0.3} if kind == "hang" else {}
    known, mixed = program({"model": MODEL, "input": KNOWN}, {"model": MODEL, "input": MIXED, **timeout}, config=tiers)
    server.heal()
    expected = [server.vector_of(text).tolist() for text in MIXED]
    assert vectors(known) == [server.vector_of(text).tolist() for text in KNOWN]
    if kind in ("out_of_order", "no_index", "no_zero_index", "drip"):
        assert vectors(mixed) == expected
    else:
        assert isinstance(mixed, CLIENT_ERRORS.get(kind, ProviderError))
        assert not any(text in str(mixed) for text in MIXED)
        (again,) = program({"model": MODEL, "input": MIXED}, config=tiers)
        assert vectors(again) == expected
        # The vectors of the other texts have been stored if only the first one is invalid.
        is_one_row = kind in ("nan", "infinity", "zeros", "ragged", "no_values", "null")
        assert server.requests[-1].body["input"] == (FRESH[:1] if is_one_row else FRESH)


@pytest.mark.parametrize(
    "call",
    [
        {"input": ""},
        {"input": []},
        {"input": [[]]},
        {"input": ["one", ""]},
        {"input": ["one", 1]},
        {"input": {"one": 1}},
        {"input": "word " * 9000},
        {"input": "one", "dimensions": 1000},
        {"input": "one", "encoding_format": "hex"},
    ],
    ids=str,
)
def test_what_the_api_refuses_is_refused_with_the_cache_too(
    server: OpenAIServer, tiers: dict[str, Any], face: Face, call: dict[str, Any]
) -> None:
    program = Program(server, face)
    (plain,), (ours,) = program({"model": MODEL, **call}), program({"model": MODEL, **call}, config=tiers)
    assert isinstance(plain, openai.BadRequestError)
    assert isinstance(ours, openai.BadRequestError)
    assert ours.body == plain.body


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        ({"extra_body": {"encoding_format": "float"}}, "extra_body replaces the argument encoding_format"),
        ({"extra_body": {"input": "two"}}, "extra_body replaces the argument input"),
        ({"extra_body": {"model": 7}}, "model is not a str"),
        ({"dimensions": "8"}, "dimensions is not an int"),
        ({"input": {"one": 1}}, "input is neither a text, nor a list of texts"),
    ],
    ids=str,
)
def test_a_call_that_cannot_be_cached_is_passed_on_counted_and_warned_of_once(
    server: OpenAIServer, tiers: dict[str, Any], call: dict[str, Any], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    with openai.OpenAI(base_url=server.base_url, api_key="any", max_retries=0) as plain:
        client = cached(plain, config=tiers)
        for number in range(1, 4):
            ours, theirs = (_try(one, {"model": MODEL, "input": "one", **call}) for one in (client, plain))
            assert ours == theirs
            assert client.embeddings.cache.stats().passed_by == number
        assert f"{number} calls passed by" in repr(client.embeddings.cache.stats())
    assert len(server.requests) == 6
    (record,) = caplog.records
    assert reason in record.getMessage()
    assert "stats().passed_by" in record.getMessage()
    assert record.name.startswith("embedonce")


def _try(client: openai.OpenAI, call: dict[str, Any]) -> Any:
    try:
        return client.embeddings.create(**call).model_dump()
    except openai.APIStatusError as error:
        return error.status_code, error.body


def test_an_invalid_query_gives_the_error_of_the_client(server: OpenAIServer, tiers: dict[str, Any]) -> None:
    call: dict[str, Any] = {"model": MODEL, "input": "one", "extra_query": [("tenant", "t")]}
    with openai.OpenAI(base_url=server.base_url, api_key="any", max_retries=0) as plain:
        client = cached(plain, config=tiers)
        errors = []
        for one in (client, plain):
            with pytest.raises(TypeError) as caught:
                one.embeddings.create(**call)
            errors.append(str(caught.value))
        assert errors[0] == errors[1]
        assert client.embeddings.cache.stats().passed_by == 1


def test_calls_that_use_the_cache_are_not_passed_by(server: OpenAIServer, tiers: dict[str, Any]) -> None:
    with openai.OpenAI(base_url=server.base_url, api_key="any", max_retries=0) as plain:
        client = cached(plain, config=tiers)
        client.embeddings.create(model=MODEL, input="one")
        stats = client.embeddings.cache.stats()
    assert stats.passed_by == 0
    assert "passed by" not in repr(stats)


# --- None and raw responses, as LiteLLM uses them -----------------------------------------------

NONE: dict[str, Any] = {
    "dimensions": None,
    "encoding_format": None,
    "user": None,
    "extra_headers": None,
    "extra_query": None,
    "extra_body": None,
}


@pytest.mark.parametrize("name", [*NONE, "all"])
def test_an_optional_argument_that_is_none_is_absent(
    server: OpenAIServer, tiers: dict[str, Any], face: Face, name: str
) -> None:
    absent = NONE if name == "all" else {name: None}
    first, second, third = Program(server, face)(
        {"model": MODEL, "input": "one", **absent},
        {"model": MODEL, "input": "one"},
        {"model": MODEL, "input": "one", "extra_body": {"dimensions": None, "user": None}},
        config=tiers,
    )
    assert vectors(first) == vectors(second) == vectors(third) == [server.vector_of("one").tolist()]
    (request,) = server.requests
    assert request.body == {"model": MODEL, "input": ["one"], "encoding_format": "base64"}


@pytest.mark.parametrize("form", [openai.omit, None, "float", "base64"], ids=["unset", "None", "float", "base64"])
def test_a_raw_response_is_served_from_the_cache(
    server: OpenAIServer, tiers: dict[str, Any], face: Face, form: Any
) -> None:
    def ask(raw: bool, *texts: str) -> dict[str, Any]:
        return {"model": MODEL, "input": list(texts), "encoding_format": form, "raw": raw}

    program = Program(server, face)
    (expected,) = program({**ask(False, "one", "two"), "encoding_format": form or openai.omit})
    before = len(server.requests)
    answers = program(ask(True, "one"), ask(True, "two", "one"), ask(True, "one", "two"), config=tiers)
    assert [request.body["input"] for request in server.requests[before:]] == [["one"], ["two"]]
    assert [raw.headers["x-embedonce-cache"] for raw in answers] == ["miss", "partial", "hit"]
    assert [raw.headers["x-embedonce-hits"] for raw in answers] == ["0", "1", "2"]
    assert [raw.headers["x-embedonce-computed"] for raw in answers] == ["1", "1", "0"]
    raw = answers[-1]
    parsed = raw.parse()
    assert type(parsed) is type(expected)
    assert parsed is raw.parse()
    assert [item.embedding for item in parsed.data] == [item.embedding for item in expected.data]
    assert [item.index for item in parsed.data] == [0, 1]
    assert (parsed.model, parsed.usage.total_tokens) == (MODEL, 0)


def test_a_raw_response_has_everything_that_the_clients_own_has(
    server: OpenAIServer, tiers: dict[str, Any], face: Face
) -> None:
    call = {"model": MODEL, "input": ["one", "two"], "raw": True}
    program = Program(server, face)
    (plain,) = program(call)
    for ours in program(call, call, config=tiers):
        assert type(ours) is type(plain)
        assert type(ours.http_response) is type(plain.http_response)
        for name in ("status_code", "url", "method", "http_version", "is_closed", "retries_taken", "request_id"):
            assert getattr(ours, name) == getattr(plain, name), name
        body = json.loads(ours.text)
        assert body["data"] == json.loads(plain.text)["data"]
        assert json.loads(ours.content) == ours.http_response.json() == body
        assert dict(ours.headers)["content-type"] == "application/json"
        assert int(ours.headers["content-length"]) == len(ours.content)
        assert ours.elapsed >= timedelta()


def test_a_raw_response_has_the_headers_of_the_endpoint_if_it_was_asked(
    server: OpenAIServer, tiers: dict[str, Any], face: Face
) -> None:
    call = {"model": MODEL, "input": ["one"], "raw": True}
    program = Program(server, face)
    (plain,), (cold, warm) = program(call), program(call, call, config=tiers)
    own = {name for name in plain.headers if name not in ("content-type", "content-length")}
    assert own
    assert all(cold.headers[name] for name in own)
    assert own.isdisjoint(warm.headers)


@pytest.mark.parametrize("form", [None, "float", "base64"])
@pytest.mark.parametrize("raw", [False, True])
def test_a_request_that_litellm_posts_is_served_from_the_cache(
    server: OpenAIServer, tiers: dict[str, Any], face: Face, raw: bool, form: str | None
) -> None:
    """LiteLLM posts its requests itself, without ``embeddings.create``, unless it is told an encoding."""
    texts = ["one", "two"]
    body = {"model": MODEL, "input": texts, **({} if form is None else {"encoding_format": form})}
    options = {"headers": {"X-Stainless-Raw-Response": "true"} if raw else {}, "timeout": 30.0}
    post = {"path": "/embeddings", "body": body, "options": options, "cast_to": CreateEmbeddingResponse}
    program = Program(server, face)
    (plain,) = program({"post": post})
    cold, warm, created = program(
        {"post": post}, {"post": post}, {"model": MODEL, "input": "two", "user": "me"}, config=tiers
    )
    assert len(server.requests) == 2
    assert server.requests[0].body == server.requests[1].body == body
    assert created.data[0].embedding == server.vector_of("two").tolist()
    for answer in (cold, warm):
        assert type(answer) is type(plain)
        ours, theirs = (one.parse() if raw else one for one in (answer, plain))
        assert ours.data == theirs.data
        assert ours.model == theirs.model
        if raw:
            assert json.loads(answer.text)["data"] == json.loads(plain.text)["data"]


def test_other_requests_that_are_posted_are_passed_on(server: OpenAIServer, tiers: dict[str, Any]) -> None:
    with openai.OpenAI(base_url=server.base_url, api_key="any", max_retries=0) as plain:
        client = cached(plain, config=tiers)
        body = {"model": MODEL, "input": ["one"]}
        assert client.post("/embeddings", body=body, cast_to=object)["object"] == "list"  # type: ignore[index]
        assert client.embeddings.cache.stats().passed_by == 1
        with pytest.raises(openai.NotFoundError):
            client.post("/responses", body=body, cast_to=object)
        assert client.embeddings.cache.stats().passed_by == 1
        with pytest.raises(SpaceError, match="late_chunking"):
            client.post("/embeddings", body={**body, "late_chunking": True}, cast_to=CreateEmbeddingResponse)


def test_a_raw_call_raises_the_clients_errors(server: OpenAIServer, tiers: dict[str, Any], face: Face) -> None:
    server.misbehave("server_error", times=None)
    (error,) = Program(server, face)({"model": MODEL, "input": "one", "raw": True}, config=tiers)
    assert isinstance(error, openai.InternalServerError)


# --- answers ------------------------------------------------------------------------------------


def test_one_index_that_is_left_out_is_the_free_one(server: OpenAIServer, tiers: dict[str, Any], face: Face) -> None:
    texts = ["one", "two", "three"]
    call = {"model": MODEL, "input": texts}
    with answering(server, lambda body: {**body, "data": [_without_index_0(item) for item in reversed(body["data"])]}):
        answers = Program(server, face)(call, call, config=tiers)
    for answer in answers:
        assert vectors(answer) == [server.vector_of(text).tolist() for text in texts]


def _without_index_0(item: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in item.items() if name != "index" or value != 0}


def test_the_model_is_named_as_the_endpoint_names_it_and_on_a_hit_as_the_call_does(
    server: OpenAIServer, tiers: dict[str, Any], face: Face
) -> None:
    call = {"model": MODEL, "input": "one"}
    with answering(server, lambda body: {**body, "model": f"{MODEL}-001"}):
        cold, warm = Program(server, face)(call, call, config=tiers)
    assert cold.model == f"{MODEL}-001"
    assert warm.model == MODEL


@contextmanager
def answering(server: OpenAIServer, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Iterator[None]:
    """Change the body of each answer of the server."""
    embed = server.embed

    def changed(request: Any, kind: str | None) -> Any:
        reply = embed(request, kind)
        return Reply(reply.status, change(reply.content))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(server, "embed", changed)
        yield


# --- settings that concern the other texts of a call ---------------------------------------------


@pytest.mark.parametrize("place", ["extra_body", "extra_query"])
@pytest.mark.parametrize("settings", [{"late_chunking": True}, {"task": {"lateChunking": "true"}}], ids=str)
def test_settings_that_tie_a_text_to_its_batch_are_refused(
    server: OpenAIServer, tiers: dict[str, Any], face: Face, place: str, settings: dict[str, Any]
) -> None:
    call = {"model": MODEL, "input": "one", place: settings}
    refused, off = Program(server, face)(call, {"model": MODEL, "input": "one"}, config=tiers)
    assert isinstance(refused, SpaceError)
    assert f"{place}." in str(refused)
    assert vectors(off) == [server.vector_of("one").tolist()]
    assert server.texts == 1


@pytest.mark.parametrize("given", [["one", "two"], [[1, 2], [3]]], ids=["texts", "tokens"])
def test_a_field_with_one_value_per_input_is_cut_with_the_inputs(
    server: OpenAIServer, tiers: dict[str, Any], face: Face, given: list[Any]
) -> None:
    def ask(inputs: list[Any], titles: list[str]) -> dict[str, Any]:
        return {"model": MODEL, "input": inputs, "extra_body": {"titles": titles, "truncate": "END"}}

    third: Any = "three" if isinstance(given[0], str) else [4]
    program = Program(server, face)
    program(ask(given, ["a", "b"]), ask([given[0], third], ["a", "b"]), ask([given[0]], ["c"]), config=tiers)
    sent = [(request.body["input"], request.body["titles"]) for request in server.requests]
    assert sent == [(given, ["a", "b"]), ([third], ["b"]), ([given[0]], ["c"])]
    assert all(request.body["truncate"] == "END" for request in server.requests)
    (wrong,) = program(ask(given, ["a"]), config=tiers)
    assert isinstance(wrong, ValueError)
    assert "titles must have one value per text" in str(wrong)


@pytest.mark.parametrize("place", ["extra_body", "extra_query"])
def test_another_list_as_long_as_the_input_is_refused(
    server: OpenAIServer, tiers: dict[str, Any], face: Face, place: str
) -> None:
    refused, nested, numbered, allowed = Program(server, face)(
        {"model": MODEL, "input": ["one", "two"], place: {"tags": ["a", "b"]}},
        {"model": MODEL, "input": ["one", "two"], place: {"options": {"titles": [("a", "b"), "c", "d"]}}},
        {"model": MODEL, "input": ["one", "two"], place: {"titles": {"0": "a", "1": "b"}}},
        {"model": MODEL, "input": ["one", "two"], place: {"tags": ["a", "b", "c"]}},
        config=tiers,
    )
    assert isinstance(refused, SpaceError)
    assert "tags has as many values as there are texts" in str(refused)
    assert isinstance(nested, SpaceError)
    assert isinstance(numbered, SpaceError)
    assert len(allowed.data) == 2
    assert len(server.requests) == 1


def test_such_a_setting_of_the_client_itself_is_refused(server: OpenAIServer, tiers: dict[str, Any]) -> None:
    client = openai.OpenAI(base_url=server.base_url, api_key="any", default_query={"late_chunking": "true"})
    with client, pytest.raises(SpaceError, match="late_chunking"):
        cached(client, config=tiers).embeddings.create(model=MODEL, input="one")


# --- the rest of the client -------------------------------------------------------------------


def test_create_has_the_signature_of_the_client() -> None:
    ours = (CachedEmbeddings.create, AsyncCachedEmbeddings.create)
    theirs = (openai.resources.Embeddings.create, openai.resources.AsyncEmbeddings.create)
    for one, other in zip(ours, theirs, strict=True):
        assert _shape(one) == _shape(other)


def _shape(function: Any) -> list[Any]:
    return [(p.name, p.kind, str(p.default)) for p in inspect.signature(function).parameters.values()]


def test_the_rest_of_the_client_is_unchanged(server: OpenAIServer, tiers: dict[str, Any]) -> None:
    with openai.OpenAI(base_url=server.base_url, api_key="any", max_retries=0) as plain:
        client = cached(plain, config=tiers)
        assert type(client) is openai.OpenAI
        assert [model.id for model in client.models.list()] == [MODEL]
        call: Any = {"model": MODEL, "input": "one"}
        client.embeddings.create(**call)
        before = len(server.requests)
        raw = client.embeddings.with_raw_response.create(**call)
        assert raw.parse().data[0].embedding == server.vector_of("one").tolist()
        assert client.with_raw_response.embeddings.create(**call).parse().usage.total_tokens == 0
        with client.embeddings.with_streaming_response.create(**call) as stream:
            assert stream.status_code == 200
        with client.with_streaming_response.embeddings.create(**call) as stream:
            assert stream.status_code == 200
        plain.embeddings.create(**call)
        assert len(server.requests) == before + 3
        assert client.embeddings.cache.stats().passed_by == 2
        for other in (client.with_options(timeout=7), client.copy(), client.with_options().with_options()):
            assert other.embeddings.create(**call).usage.total_tokens == 0
        assert client.with_options(timeout=7).timeout == 7
        assert client.embeddings.cache.stats().tiers["memory"].hits == 5


async def test_raw_responses_of_an_async_client_are_cached_and_streams_are_not(
    server: OpenAIServer, tiers: dict[str, Any]
) -> None:
    async with openai.AsyncOpenAI(base_url=server.base_url, api_key="any", max_retries=0) as plain:
        client = cached(plain, config=tiers)
        call: Any = {"model": MODEL, "input": "one"}
        await client.embeddings.create(**call)
        for resource in (client.with_raw_response.embeddings, client.embeddings.with_raw_response):
            raw = await resource.create(**call)
            assert raw.parse().data[0].embedding == server.vector_of("one").tolist()
        async with client.with_streaming_response.embeddings.create(**call) as stream:
            assert stream.status_code == 200
        assert len(server.requests) == 2
        assert client.embeddings.cache.stats().passed_by == 1


def test_a_cached_client_can_be_copied_as_a_plain_one_can(server: OpenAIServer, tiers: dict[str, Any]) -> None:
    with openai.OpenAI(base_url=server.base_url, api_key="any", max_retries=0) as plain:
        client = cached(plain, config=tiers)
        client.embeddings.create(model=MODEL, input="one")
        for other in (copy.copy(client), copy.copy(client).with_options(timeout=7)):
            assert vectors(other.embeddings.create(model=MODEL, input="one")) == [server.vector_of("one").tolist()]
        assert len(server.requests) == 1
        errors = []
        for one in (plain, client):
            with pytest.raises(TypeError) as caught:
                pickle.dumps(one)
            errors.append(str(caught.value))
        assert errors[0] == errors[1]


def test_the_drift_guard_of_a_configuration_works(server: OpenAIServer, tiers: dict[str, Any], face: Face) -> None:
    program, call = Program(server, face), {"model": MODEL, "input": ["one"]}
    program(call, config=tiers)
    assert server.texts == 1
    answer, again = program({**call, "input": ["two"]}, call, config={**tiers, "drift": {"action": "refuse"}})
    assert len(server.requests) == 3, "the canaries, then the text"
    assert vectors(answer) == [server.vector_of("two").tolist()]
    assert vectors(again) == [server.vector_of("one").tolist()]


async def test_concurrent_tasks_pay_once(server: OpenAIServer, tiers: dict[str, Any]) -> None:
    async with openai.AsyncOpenAI(base_url=server.base_url, api_key="any") as plain:
        client = cached(plain, config=tiers)
        answers = await asyncio.gather(
            *(client.embeddings.create(model=MODEL, input=["one", f"text {number % 3}"]) for number in range(12))
        )
    assert server.count.total() == 4
    assert sum(answer.usage.total_tokens for answer in answers) == sum(map(server.tokens_of, server.count))


def test_two_clients_of_one_configuration_share_vectors(server: OpenAIServer, tiers: dict[str, Any]) -> None:
    call = {"model": MODEL, "input": ["one", "two"]}
    Program(server, "blocking")(call, config=tiers)
    Program(server, "async", api_key="another")(call, config=dict(tiers))
    assert server.texts == 2


def test_azure_requires_the_model_of_a_deployment(server: OpenAIServer, tiers: dict[str, Any]) -> None:
    call: Any = {"model": "mine", "input": "one"}
    with openai.AzureOpenAI(azure_endpoint=server.url, api_key="k", api_version="2024-10-21") as plain:
        with pytest.raises(SpaceError, match="models="):
            cached(plain, config=tiers).embeddings.create(**call)
        client = cached(plain, config=tiers, models={"mine": MODEL})
        assert type(client) is openai.AzureOpenAI
        for _ in range(2):
            assert vectors(client.embeddings.create(**call)) == [server.vector_of("one").tolist()]
    assert [request.path for request in server.requests] == ["/openai/deployments/mine/embeddings"]


def test_an_invalid_configuration_is_refused_at_once(server: OpenAIServer) -> None:
    with openai.OpenAI(base_url=server.base_url, api_key="any") as plain:
        with pytest.raises(embedonce.ConfigError):
            cached(plain, config={"tiers": [{"type": "memry"}]})
        with pytest.raises(TypeError, match="client"):
            cached("no client", config={"tiers": []})  # type: ignore[type-var]


def test_more_spaces_than_kept_caches_work(
    server: OpenAIServer, tiers: dict[str, Any], face: Face, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("embedonce_integrations.openai.MAX_CACHES", 2)
    calls = [{"model": f"model {number % 4}", "input": "one"} for number in range(12)]
    answers = Program(server, face)(*calls, config=tiers)
    for call, answer in zip(calls, answers, strict=True):
        assert vectors(answer) == [server.vector_of("one", model=call["model"]).tolist()]
    assert server.texts == 4


# --- random calls -----------------------------------------------------------------------------

POOL: list[Any] = ["one", "two", "three", "1,2", "1"]
TOKENS: list[Any] = [[1], [1, 2], [2, 1], [12], [0]]
INPUTS = st.one_of(
    st.sampled_from(POOL),
    st.lists(st.sampled_from(POOL), min_size=1, max_size=6),
    st.sampled_from(TOKENS),
    st.lists(st.sampled_from(TOKENS), min_size=1, max_size=6),
)
CALLS = st.fixed_dictionaries(
    {"model": st.sampled_from(["m", "n"]), "input": INPUTS},
    optional={
        "dimensions": st.sampled_from([8, 16]),
        "extra_body": st.sampled_from([{"input_type": "query"}, {"input_type": "document"}]),
        "encoding_format": st.sampled_from(["float"]),
        "user": st.sampled_from(["me", "you"]),
    },
)


def test_any_calls_in_any_order_get_their_own_vectors(server: OpenAIServer) -> None:
    with openai.OpenAI(base_url=server.base_url, api_key="any", max_retries=0) as plain:

        @settings(max_examples=25, deadline=None)
        @given(st.lists(CALLS, min_size=1, max_size=5), st.sampled_from([None, "out_of_order"]))
        def property_of(calls: list[dict[str, Any]], kind: Any) -> None:
            client = cached(
                plain, config={"key": {"version": str(len(server.requests))}, "tiers": [{"type": "memory"}]}
            )
            for call in calls:
                if kind is not None:
                    server.misbehave(kind)
                inputs = call["input"] if isinstance(call["input"], list) else [call["input"]]
                inputs = [inputs] if isinstance(inputs[0], int) else inputs
                about = {"dimensions": call.get("dimensions"), **call.get("extra_body", {})}
                expected = [server.vector_of(one, model=call["model"], **about).tolist() for one in inputs]
                assert vectors(client.embeddings.create(**call)) == expected
                server.heal()

        property_of()
