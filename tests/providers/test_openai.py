"""Tests for the openai provider, with the real client against a loopback API that can be made to misbehave."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest

import embedonce
from embedonce import Cache, ProviderError, SpaceError, TextRefused, Tier
from embedonce.testing import CountingProvider, OpenAIServer, ProviderContract, Recipe
from embedonce.testing.contracts.support import run_in_fork
from embedonce_backends.disk import DiskBackend
from embedonce_providers._openai_answer import find_too_long, read_answer
from embedonce_providers.openai import OpenAIProvider

from .chains import FRESH, MIXED, Face, ask, check_only_own_vectors

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


def make_provider(server: OpenAIServer, **options: Any) -> OpenAIProvider:
    return OpenAIProvider(**{"model": MODEL, "base_url": server.base_url, "max_retries": 0, "timeout": 20, **options})


class TestOpenAI(ProviderContract):
    @pytest.fixture(autouse=True)
    def start_server(self) -> Iterator[None]:
        with OpenAIServer() as self.server:
            yield

    def options(self) -> dict[str, Any]:
        return {"model": MODEL, "base_url": self.server.base_url, "api_key": "any"}

    def make(self) -> OpenAIProvider:
        return OpenAIProvider(**self.options())

    def recipe(self) -> Recipe:
        return Recipe(OpenAIProvider, self.options())


class TestOpenAIWithTasks(TestOpenAI):
    def options(self) -> dict[str, Any]:
        by_task = {"prefixes": {"query": "query: "}, "task_body": {"document": {"input_type": "passage"}}}
        return {**super().options(), **by_task, "dimensions": 12, "encoding_format": "base64"}

    def recipe(self) -> Any:
        return None  # TestOpenAI already covers another process, which takes seconds to import the client


# --- failures ---------------------------------------------------------------------------------

EXPECTED_ERRORS: dict[str, tuple[type[Exception], ...]] = {
    **dict.fromkeys(
        [
            "duplicate_index",
            "short",
            "long",
            "empty",
            "nan",
            "infinity",
            "zeros",
            "dimension",
            "ragged",
            "no_values",
            "null",
            "error_as_200",
            "not_json",
        ],
        (ProviderError,),
    ),
    "rate_limit": (openai.RateLimitError,),
    "rate_limit_message": (openai.RateLimitError,),
    "rate_limit_no_hint": (openai.RateLimitError,),
    "quota": (openai.RateLimitError,),
    "server_error": (openai.InternalServerError,),
    "bad_request": (openai.BadRequestError,),
    "unauthorized": (openai.AuthenticationError,),
    "truncated": (openai.APIConnectionError,),
    "disconnect": (openai.APIConnectionError,),
    "hang": (openai.APITimeoutError, embedonce.ProviderTimeout),
    "drip": (openai.APITimeoutError, embedonce.ProviderTimeout),
}


HARMLESS = {"out_of_order", "no_index", "no_zero_index"}
"""Faults for which every text still gets its own vector."""


def test_every_fault_is_tested() -> None:
    assert EXPECTED_ERRORS.keys() | HARMLESS == set(OpenAIServer.KINDS)
    assert not EXPECTED_ERRORS.keys() & HARMLESS


ONE_INVALID_ROW = ("nan", "infinity", "zeros", "ragged", "no_values", "null")
INVALID_VALUES = ("nan", "infinity", "zeros", "dimension", "ragged", "no_values")


@pytest.mark.parametrize("face", ["blocking", "async"])
@pytest.mark.parametrize(
    ("kind", "encoding_format"),
    [*((kind, "float") for kind in OpenAIServer.KINDS), *((kind, "base64") for kind in INVALID_VALUES)],
)
def test_hits_and_misses_during_each_fault(
    server: OpenAIServer, tmp_path: Path, kind: Any, face: Face, encoding_format: str
) -> None:
    timeout = 0.3 if kind in ("hang", "drip") else 20

    failed = check_only_own_vectors(
        face,
        tmp_path,
        make=lambda: make_provider(server, encoding_format=encoding_format),
        make_hasty=lambda: make_provider(server, encoding_format=encoding_format, timeout=timeout),
        break_api=lambda: server.misbehave(kind, times=None),
        heal=server.heal,
        vector_of=server.vector_of,
    )
    if kind in HARMLESS:
        assert not failed
    else:
        texts = {MIXED[place] for place in failed}
        assert len(texts) == 1 if kind in ONE_INVALID_ROW else texts == set(FRESH)
        assert all(isinstance(error, EXPECTED_ERRORS[kind]) for error in failed.values())
        assert not any(text in str(error) for error in failed.values() for text in MIXED)


@pytest.mark.parametrize("kind", ["server_error", "disconnect"])
def test_a_failed_call_is_repeated(server: OpenAIServer, kind: Any) -> None:
    server.misbehave(kind, seconds=0.01)
    with Cache(make_provider(server, max_retries=1)) as cache:
        assert np.array_equal(cache.embed("a"), server.vector_of("a"))
    assert len(server.requests) == 2


@pytest.mark.parametrize("face", ["blocking", "async"])
def test_an_exhausted_quota_is_not_retried(server: OpenAIServer, face: Face) -> None:
    server.misbehave("quota", times=None)
    provider = make_provider(server, max_retries=3)
    failed = ask(Cache(provider), face, ["a"]).failed
    assert isinstance(failed[0], openai.RateLimitError)
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"[]",
        b"null",
        b'{"data": null}',
        b'{"data": {"index": 0}}',
        b'{"data": [null]}',
        b'{"data": [{"index": true, "embedding": [1.0]}]}',
        b'{"data": [{"index": "0", "embedding": [1.0]}]}',
        b'{"data": [{"index": -1, "embedding": [1.0]}]}',
        b'{"data": [{"index": 0, "embedding": null}]}',
        b'{"data": [{"index": 0, "embedding": ["1.0"]}]}',
        b'{"data": [{"index": 0, "embedding": [true]}]}',
        b'{"data": [{"index": 0, "embedding": [[1.0], [2.0]]}]}',
        b'{"data": [{"index": 0, "embedding": [[1.0], 2.0]}]}',
        b'{"data": [{"index": 0, "embedding": "AAAAAA"}]}',
        b'{"data": [{"index": 0, "embedding": "AAA="}]}',
        b'{"data": [{"index": 0, "embedding": "AAAA AAA="}]}',
    ],
)
def test_an_invalid_answer_is_an_error(answer: bytes) -> None:
    with pytest.raises(ProviderError, match=r"was stored|not JSON"):
        read_answer(answer, ["text"])


@pytest.mark.parametrize("usage", [None, {}, {"total_tokens": "7"}, {"total_tokens": True}, {"total_tokens": -1}, 7])
def test_invalid_usage_is_ignored(usage: Any) -> None:
    answer = {"data": [{"index": 0, "embedding": [1, 2]}], "usage": usage}
    assert read_answer(json.dumps(answer).encode(), ["text"]).tokens is None


# --- texts ------------------------------------------------------------------------------------


def test_empty_and_long_texts_fail_alone() -> None:
    texts = ["one", "", "word " * 60, "two", "word " * 70]
    with OpenAIServer(max_tokens=50) as server, Cache(make_provider(server)) as cache:
        fetched = cache.fetch(texts)
        assert [type(fetched.failed.get(place)) for place in range(5)] == [
            type(None),
            TextRefused,
            TextRefused,
            type(None),
            TextRefused,
        ]
        assert np.array_equal(fetched.rows[3], server.vector_of("two"))
        assert server.count == {"one": 1, "two": 1}


def test_a_call_with_too_many_tokens_is_halved() -> None:
    texts = [f"{number} " + "word " * 20 for number in range(8)]
    with OpenAIServer(max_total_tokens=100) as server, Cache(make_provider(server)) as cache:
        assert np.array_equal(cache.embed_batch(texts), np.stack([server.vector_of(text) for text in texts]))
        assert server.texts == 8


def test_calls_are_filled_by_count_and_by_tokens() -> None:
    texts = [f"text number {number}" for number in range(10)]
    with OpenAIServer(max_inputs=4) as server, Cache(make_provider(server, batch_size=4, concurrency=1)) as cache:
        cache.embed_batch(texts)
        assert [len(request.body["input"]) for request in server.requests] == [4, 4, 2]
    with OpenAIServer(max_total_tokens=100) as server, Cache(make_provider(server, max_tokens=100)) as cache:
        cache.embed_batch([text * 3 for text in texts])
        assert sorted(len(request.body["input"]) for request in server.requests) == [2, 2, 2, 2, 2]


@pytest.mark.parametrize("text", ["plain", "ä", "富士山", "🧪"])
def test_a_byte_counts_as_a_token(server: OpenAIServer, text: str) -> None:
    assert make_provider(server).count_tokens(text) == len(text.encode())


@pytest.mark.parametrize(
    ("status", "message", "expected"),
    [
        (400, "Error code: 400 - Invalid 'input[3]': maximum input length is 8192 tokens.", [3]),
        (400, "Invalid 'input[9]': maximum input length is 8192 tokens.", []),
        (400, "This model's maximum context length is 512 tokens. However, you requested 600 tokens", []),
        (413, "Input validation error: `inputs` must have less than 512 tokens. Given: 534", []),
        (400, "{'message': '…', 'code': 'max_tokens_per_request'}", []),
        (400, "Invalid value for 'dimensions': 7.", None),
        (401, "maximum input length", None),
        (404, "The model `m` does not exist", None),
        (429, "Rate limit reached: you requested too many tokens", None),
    ],
)
def test_which_errors_are_about_the_length_of_a_text(status: int, message: str, expected: list[int] | None) -> None:
    assert find_too_long(status, message, ["text"] * 5) == expected


def test_an_error_about_every_text_reaches_the_caller_after_a_bounded_search(server: OpenAIServer) -> None:
    with Cache(make_provider(server, dimensions=1000)) as cache, pytest.raises(openai.BadRequestError):
        cache.embed_batch(["a", "b", "c", "d"])
    assert len(server.requests) <= 1 + 4 * 2


@pytest.mark.parametrize("kind", ["unauthorized", "quota"])
def test_an_error_about_the_account_reaches_the_caller_at_once(server: OpenAIServer, kind: Any) -> None:
    server.misbehave(kind, times=None)
    with Cache(make_provider(server, max_retries=2)) as cache, pytest.raises(openai.APIStatusError):
        cache.embed_batch(["a", "b", "c", "d"])
    assert len(server.requests) == 1


# --- requests and vector spaces ---------------------------------------------------------------


def test_options_are_in_the_request_and_the_space(server: OpenAIServer) -> None:
    provider = make_provider(
        server,
        dimensions=8,
        api_key="secret-key",
        prefixes={"query": "query: "},
        extra_body={"user": "me", "truncate": False},
        task_body={"query": {"input_type": "query"}},
    )
    with Cache(provider) as cache:
        query, document = cache.embed("a", task="query"), cache.embed("a")
    assert np.array_equal(query, server.vector_of("query: a", dimensions=8, truncate=False, input_type="query"))
    assert np.array_equal(document, server.vector_of("a", dimensions=8, truncate=False))
    assert server.requests[0].headers["authorization"] == "Bearer secret-key"
    assert server.requests[0].body["user"] == "me"
    assert provider.space("query").prefix == "query: "
    assert provider.space("query").extra == {"truncate": False, "input_type": "query"}
    assert provider.space("query").task == "query"


def test_tokens_are_counted_for_misses_only(server: OpenAIServer) -> None:
    with Cache(make_provider(server), []) as cache:
        cache.embed_batch(["one two", "one two three", "one two"])
        assert cache.stats().providers["openai"].tokens == 5


@pytest.mark.parametrize(
    ("given", "sent"),
    [(None, {"encoding_format": "float"}), ("base64", {"encoding_format": "base64"}), ("none", {})],
    ids=["default", "base64", "none"],
)
@pytest.mark.parametrize("face", ["blocking", "async"])
def test_the_format_in_the_request(server: OpenAIServer, given: Any, sent: Any, face: Face) -> None:
    found = ask(Cache(make_provider(server, encoding_format=given)), face, ["a"])
    assert np.array_equal(found.rows[0], server.vector_of("a"))
    assert server.requests[0].body == {"model": MODEL, "input": ["a"], **sent}


@pytest.mark.parametrize("encoding_format", ["base64", "none"])
def test_an_endpoint_that_refuses_float(encoding_format: str) -> None:
    with OpenAIServer(encoding_formats=("base64",)) as server:
        with Cache(make_provider(server, encoding_format=encoding_format)) as cache:
            assert np.array_equal(cache.embed("a"), server.vector_of("a"))
        with Cache(make_provider(server, encoding_format="float")) as cache, pytest.raises(openai.BadRequestError):
            cache.embed("b")


@pytest.mark.parametrize(
    ("options", "format"),
    [
        ({}, "base64"),
        ({"base_url": "https://eu.api.openai.com/v1/"}, "base64"),
        ({"azure_endpoint": "https://me.openai.azure.com"}, "base64"),
        ({"base_url": "https://me.openai.azure.com/openai/v1"}, "base64"),
        ({"base_url": "http://localhost:11434/v1"}, "float"),
        ({"base_url": "https://api.openai.com.example.org/v1"}, "float"),
    ],
)
def test_base64_is_the_default_only_for_openai_and_azure(options: dict[str, Any], format: str) -> None:
    assert OpenAIProvider(model="m", **options)._format == format


def test_an_endpoint_that_answers_floats_when_asked_for_base64() -> None:
    with OpenAIServer(base64=False) as server, Cache(make_provider(server, encoding_format="base64")) as cache:
        assert np.array_equal(cache.embed("a"), server.vector_of("a"))


def fingerprints(*tasks: str, **options: Any) -> list[bytes]:
    provider = OpenAIProvider(**{"model": "m", **options})
    return [provider.space(task).fingerprint() for task in tasks or ("document",)]


@pytest.mark.parametrize(
    "options",
    [
        {"model": "n"},
        {"base_url": "http://localhost/v1"},
        {"endpoint_name": "ours"},
        {"dimensions": 8},
        {"revision": "2"},
        {"truncate": "provider"},
        {"extra_body": {"input_type": "query"}},
        {"prefixes": {"document": "passage: "}},
        {"task_body": {"document": {"input_type": "passage"}}},
    ],
    ids=str,
)
def test_options_that_change_the_space(options: dict[str, Any]) -> None:
    assert fingerprints(**options) != fingerprints()


@pytest.mark.parametrize(
    "options",
    [
        {"api_key": "k"},
        {"deployment": "mine"},
        {"encoding_format": "float"},
        {"encoding_format": "none"},
        {"headers": {"X-Gateway-Key": "k"}, "answers_as": ["other"], "token_provider": "os:getcwd"},
        {"requests_per_minute": 3, "tokens_per_minute": 1000},
        {"batch_size": 3, "max_tokens": 7, "concurrency": 9, "max_retries": 9, "timeout": 9.0},
        {"extra_body": {"user": "me"}},
        {"base_url": "https://api.openai.com/v1/"},
        {"base_url": "HTTPS://user:pass@API.openai.com:443/v1"},
    ],
    ids=str,
)
def test_options_that_do_not_change_the_space(options: dict[str, Any]) -> None:
    assert fingerprints(**options) == fingerprints()


def test_hosts_of_one_endpoint_name_share_a_space() -> None:
    one, two = ({"base_url": f"http://gpu{number}:8000/v1", "endpoint_name": "gpus"} for number in (1, 2))
    assert fingerprints(**one) == fingerprints(**two)


def test_the_environment_names_the_endpoint(monkeypatch: pytest.MonkeyPatch, server: OpenAIServer) -> None:
    monkeypatch.setenv("OPENAI_BASE_URL", server.base_url + "/")
    monkeypatch.setenv("OPENAI_API_KEY", "from-environment")
    with Cache(OpenAIProvider(model=MODEL)) as cache:
        cache.embed("a")
    assert server.requests[0].headers["authorization"] == "Bearer from-environment"
    assert fingerprints() == fingerprints(base_url=server.base_url)


def test_tasks_have_their_own_spaces_only_if_they_differ() -> None:
    assert len(set(fingerprints("document", "query", "anything"))) == 1
    assert len(set(fingerprints("document", "query", prefixes={"query": "query: "}))) == 2
    three = {"query": "query: ", "clustering": "cluster: "}
    assert len(set(fingerprints("document", "query", "clustering", prefixes=three))) == 3
    assert len(set(fingerprints("document", "query", prefixes={"document": "", "query": ""}))) == 1
    with pytest.raises(SpaceError, match="clustering"):
        fingerprints("clustering", prefixes={"query": "query: "})


@pytest.mark.parametrize(
    "options",
    [
        {"base_url": "localhost:8000"},
        {"base_url": "http://host/v1?key=1"},
        {"base_url": "ftp://host"},
        {"base_url": "http://host", "azure_endpoint": "http://host"},
        {"base_url": "http://host", "api_version": "2024-10-21"},
        {"extra_body": {"dimensions": 8}},
        {"task_body": {"query": {"model": "n"}}},
    ],
    ids=str,
)
def test_invalid_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"URL|azure_endpoint|option"):
        OpenAIProvider(model="m", **options)


def test_a_model_without_a_name_is_refused() -> None:
    with pytest.raises(ValueError, match="model is empty"):
        OpenAIProvider(model="")


# --- Azure ------------------------------------------------------------------------------------


@pytest.mark.parametrize("face", ["blocking", "async"])
def test_azure(server: OpenAIServer, face: Face, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AZURE_OPENAI_API_KEY", "azure-key")
    provider = OpenAIProvider(
        model=MODEL, deployment="mine", azure_endpoint=server.url, api_version="2024-10-21", max_retries=0
    )
    with Cache(provider) as cache:
        found = cache.embed("a") if face == "blocking" else asyncio.run(cache.aembed("a"))
    assert np.array_equal(found, server.vector_of("a"))
    assert server.requests[0].path == "/openai/deployments/mine/embeddings"
    assert server.requests[0].query == {"api-version": "2024-10-21"}
    assert server.requests[0].headers["api-key"] == "azure-key"
    assert provider.space("document").model == MODEL


def test_azures_newer_path(server: OpenAIServer) -> None:
    with Cache(make_provider(server, base_url=f"{server.url}/openai/v1/", deployment="mine", api_key="k")) as cache:
        assert np.array_equal(cache.embed("a"), server.vector_of("a"))


# --- API keys ---------------------------------------------------------------------------------


def test_no_key_is_needed_until_the_first_miss(server: OpenAIServer, tmp_path: Path) -> None:
    with Cache(
        make_provider(server, endpoint_name="openai"), [Tier(DiskBackend(path=tmp_path), timeout=60.0)]
    ) as cache:
        cache.embed("a")
    keyless = OpenAIProvider(model=MODEL, endpoint_name="openai")
    with Cache(keyless, [Tier(DiskBackend(path=tmp_path), timeout=60.0)]) as cache:
        assert np.array_equal(cache.embed("a"), server.vector_of("a"))
        with pytest.raises(openai.OpenAIError, match="OPENAI_API_KEY"):
            cache.embed("b")


def test_a_local_server_needs_no_key(server: OpenAIServer) -> None:
    with Cache(make_provider(server)) as cache:
        assert cache.embed("a").shape == (16,)


def test_a_warm_run_imports_no_client(server: OpenAIServer, tmp_path: Path) -> None:
    configuration = {
        "provider": {"type": "openai", "model": MODEL, "base_url": server.base_url},
        "tiers": [{"type": "disk", "path": str(tmp_path), "timeout": "60s"}],
    }
    with embedonce.open(configuration) as cache:
        cache.embed("a")
    program = (
        "import json, sys, embedonce\n"
        "with embedonce.open(json.loads(sys.argv[1])) as cache: cache.embed('a')\n"
        "sys.exit('openai' in sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", program, json.dumps(configuration)], check=True, timeout=100)
    assert len(server.requests) == 1


def test_no_key_and_no_text_is_shown(server: OpenAIServer, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, logger="embedonce")
    server.misbehave("unauthorized")
    provider = make_provider(server, api_key="sk-very-secret")
    with Cache(provider) as cache:
        failed = cache.fetch(["a private text"]).failed[0]
        shown = f"{failed} {failed!r} {provider!r} {cache!r} {cache.stats()} {provider.space('document')} {caplog.text}"
    assert "sk-very-secret" not in shown
    assert "private" not in shown


def test_a_missing_package_is_named() -> None:
    program = (
        "import sys, embedonce\n"
        "sys.modules['openai'] = None\n"
        "embedonce.open({'provider': {'type': 'openai', 'model': 'm'}, 'tiers': []})\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=100)
    assert "pip install 'embedonce[openai]'" in done.stderr


# --- clients: threads, loops, forks -----------------------------------------------------------


def test_each_loop_has_a_client_that_ends_with_it(server: OpenAIServer) -> None:
    """A connection that outlives its loop raises a ResourceWarning, and warnings are errors in tests."""
    with Cache(make_provider(server)) as cache:
        for text in ("a", "b", "c"):
            assert np.array_equal(asyncio.run(cache.aembed(text)), server.vector_of(text))
            assert not cache.provider._clients._by_loop  # type: ignore[union-attr]


def test_one_client_for_all_tasks_of_a_loop(server: OpenAIServer) -> None:
    provider = make_provider(server)

    async def work() -> None:
        cache = Cache(provider)
        await asyncio.gather(*(cache.aembed(f"text {number}") for number in range(20)))
        assert len(provider._clients._by_loop) == 1
        await cache.aclose()
        assert len(provider._clients._by_loop) == 0

    asyncio.run(work())


def test_closing_from_another_thread_closes_the_client_of_a_running_loop(
    server: OpenAIServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("embedonce_providers._clients.CLOSE_SECONDS", 60.0)  # the loop is not blocked, but may be slow
    provider = make_provider(server)
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        asyncio.run_coroutine_threadsafe(provider.aembed(["a"], "document"), loop).result(60)
        (client,) = [client for client, _ in provider._clients._by_loop.values()]
        provider.close()
        assert client.is_closed()
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def test_closing_within_the_loop(server: OpenAIServer) -> None:
    async def work() -> None:
        provider = make_provider(server)
        await provider.aembed(["a"], "document")
        (client,) = [client for client, _ in provider._clients._by_loop.values()]
        provider.close()
        await asyncio.gather(*provider._clients._closing)
        assert client.is_closed()

    asyncio.run(work())


def test_a_forked_child_has_its_own_connections(server: OpenAIServer) -> None:
    provider = make_provider(server)
    provider.embed(["parent"], "document")
    inherited = provider._clients._blocking
    assert inherited is not None

    def child() -> None:
        assert provider._clients._blocking is None
        assert np.array_equal(np.array(provider.embed(["child"], "document").vectors)[0], server.vector_of("child"))

    run_in_fork(child, "embedding")
    assert provider._clients._blocking is inherited
    provider.embed(["parent"], "document")
    provider.close()


def test_a_client_is_closed_when_its_last_call_ends(server: OpenAIServer) -> None:
    provider = make_provider(server)
    provider.embed(["a"], "document")
    assert provider._clients._blocking is not None
    client = provider._clients._blocking.client
    server.misbehave("hang")
    thread = threading.Thread(target=provider.embed, args=(["b"], "document"))
    thread.start()
    server.until_hanging()
    provider.close()
    assert not client.is_closed()
    server.heal()
    thread.join()
    assert client.is_closed()


# --- in a chain -------------------------------------------------------------------------------


def test_from_toml(server: OpenAIServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", "from-toml")
    (tmp_path / "embedonce.toml").write_text(
        f"""
        [provider]
        type = "openai"
        model = "{MODEL}"
        base_url = "{server.base_url}"
        api_key = "${{MY_KEY}}"
        dimensions = 8
        timeout = "20s"
        prefixes = {{ query = "query: " }}

        [provider.task_body.query]
        input_type = "query"

        [[tiers]]
        type = "memory"
        """
    )
    with embedonce.open(tmp_path / "embedonce.toml") as cache:
        found = cache.embed("a", task="query")
    assert np.array_equal(found, server.vector_of("query: a", dimensions=8, input_type="query"))
    assert server.requests[0].headers["authorization"] == "Bearer from-toml"


def test_a_fallback_answers_for_it(server: OpenAIServer) -> None:
    fallback = CountingProvider(dimensions=8, model="fallback")
    with Cache(make_provider(server, dimensions=8), fallback=fallback) as cache:
        server.misbehave("server_error")
        assert np.array_equal(cache.embed("a"), fallback.vector_of("a"))
        assert np.array_equal(cache.embed("b"), server.vector_of("b", dimensions=8))
