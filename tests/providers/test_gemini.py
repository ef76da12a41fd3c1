"""Tests for the gemini provider, with the real client against a loopback API that can be made to misbehave."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
from google.genai import errors

import embedonce
from embedonce import Cache, ProviderError, SpaceError, TextRefused, Tier
from embedonce.testing import GeminiServer, ProviderContract, Recipe
from embedonce_backends.disk import DiskBackend
from embedonce_providers.gemini import KNOWN_TASK_TYPES, GeminiProvider

from .chains import FRESH, MIXED, Face, check_only_own_vectors

MODEL = "gemini-embedding-001"

# google-genai's async client uses aiohttp if that is installed, and httpx2 otherwise.
pytestmark = pytest.mark.filterwarnings("ignore:Inheritance class AiohttpClientSession:DeprecationWarning")


@pytest.fixture(autouse=True)
def clear_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(("GEMINI_", "GOOGLE_")):
            monkeypatch.delenv(name)


@pytest.fixture
def server() -> Iterator[GeminiServer]:
    with GeminiServer() as server:
        yield server


def make_provider(server: GeminiServer, **options: Any) -> GeminiProvider:
    usual = {"model": MODEL, "base_url": server.base_url, "api_key": "any", "max_retries": 0, "timeout": 20}
    return GeminiProvider(**{**usual, **options})


class TestGemini(ProviderContract):
    tasks = ("document", "query", "clustering")

    @pytest.fixture(autouse=True)
    def start_server(self) -> Iterator[None]:
        with GeminiServer() as self.server:
            yield

    def options(self) -> dict[str, Any]:
        return {"model": MODEL, "base_url": self.server.base_url, "api_key": "any"}

    def make(self) -> GeminiProvider:
        return GeminiProvider(**self.options())

    def recipe(self) -> Recipe:
        return Recipe(GeminiProvider, self.options())


# --- failures ---------------------------------------------------------------------------------

try:
    import aiohttp
except ModuleNotFoundError:
    AIOHTTP_ERRORS: tuple[type[Exception], ...] = ()
else:
    AIOHTTP_ERRORS = (aiohttp.ClientError,)

EXPECTED_ERRORS: dict[str, tuple[type[Exception], ...]] = {
    **dict.fromkeys(
        ["short", "long", "empty", "nan", "infinity", "zeros", "dimension", "ragged", "no_values", "null"],
        (ProviderError,),
    ),
    **dict.fromkeys(
        ["rate_limit", "rate_limit_message", "rate_limit_no_hint", "rate_limit_info", "quota", "bad_request"],
        (errors.ClientError,),
    ),
    "server_error": (errors.ServerError,),
    "unauthorized": (errors.ClientError,),
    "not_json": (json.JSONDecodeError,),
    "truncated": (httpx2.RemoteProtocolError, *AIOHTTP_ERRORS),
    "disconnect": (httpx2.RemoteProtocolError, *AIOHTTP_ERRORS),
    # On a busy machine, the timeout may pass before there is anything to read.
    "hang": (httpx2.TimeoutException, TimeoutError),
    "drip": (httpx2.TimeoutException, TimeoutError),
}


INVALID_ROW = ("nan", "infinity", "zeros", "ragged", "no_values", "null")
"""Faults of one vector in an answer. The other vectors may be stored."""


def test_every_fault_is_tested() -> None:
    assert set(EXPECTED_ERRORS) == set(GeminiServer.KINDS)


@pytest.mark.parametrize("face", ["blocking", "async"])
@pytest.mark.parametrize("kind", GeminiServer.KINDS)
def test_hits_and_misses_during_each_fault(server: GeminiServer, tmp_path: Path, kind: Any, face: Face) -> None:
    timeout = 0.3 if kind in ("hang", "drip") else 20
    failed = check_only_own_vectors(
        face,
        tmp_path,
        make=lambda: make_provider(server),
        make_hasty=lambda: make_provider(server, timeout=timeout),
        break_api=lambda: server.misbehave(kind, times=None),
        heal=server.heal,
        vector_of=lambda text: server.vector_of(text, task_type="RETRIEVAL_DOCUMENT"),
    )
    texts = {MIXED[place] for place in failed}
    assert texts == set(FRESH) or (kind in INVALID_ROW and texts and texts < set(FRESH))
    assert all(isinstance(error, EXPECTED_ERRORS[kind]) for error in failed.values())
    assert not any(text in str(error) for error in failed.values() for text in MIXED)


@pytest.fixture
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    # The client's first pause is one second by default.
    monkeypatch.setattr("google.genai._api_client._RETRY_INITIAL_DELAY", 0.001)
    monkeypatch.setattr("google.genai._api_client._RETRY_JITTER", 0.0)


faces = pytest.mark.parametrize("face", ["blocking", "async"])


def embed(provider: GeminiProvider, face: Face, *texts: str) -> Any:
    """Call the provider itself through one of its interfaces, and close it."""

    async def call() -> Any:
        try:
            return await provider.aembed(texts, "document")
        finally:
            provider.close()
            await asyncio.gather(*provider._clients._closing)

    if face == "async":
        return asyncio.run(call())
    try:
        return provider.embed(texts, "document")
    finally:
        provider.close()


@faces
@pytest.mark.usefixtures("short_pauses")
def test_the_client_repeats_calls(server: GeminiServer, face: Face) -> None:
    server.misbehave("server_error", times=2)
    with Cache(make_provider(server, max_retries=2)) as cache:
        found = cache.embed("a") if face == "blocking" else asyncio.run(cache.aembed("a"))
    assert np.array_equal(found, server.vector_of("a", task_type="RETRIEVAL_DOCUMENT"))
    assert len(server.requests) == 3


@faces
@pytest.mark.usefixtures("short_pauses")
def test_only_a_call_of_one_text_is_repeated_after_status_500(server: GeminiServer, face: Face) -> None:
    server.misbehave("server_error", times=None, where=lambda text: text == "bad")
    for sent in (["good", "bad"], ["bad"]):
        provider = make_provider(server, max_retries=2)
        with pytest.raises(errors.ServerError):
            embed(provider, face, *sent)
    assert len(server.requests) == 1 + 3
    provider = make_provider(server, max_retries=2)
    for sent in (["good", "bad"], ["bad"]):
        with pytest.raises(errors.ServerError):
            provider.embed(sent, "document")
    assert len(server.requests) == 4 + 2
    provider.close()


@faces
@pytest.mark.parametrize("kind", ["rate_limit", "rate_limit_message", "rate_limit_no_hint", "rate_limit_info", "quota"])
def test_the_client_does_not_repeat_a_call_that_is_rate_limited(server: GeminiServer, face: Face, kind: Any) -> None:
    """The engine repeats it. The error has what the engine needs."""
    server.misbehave(kind, times=None, seconds=32)
    with pytest.raises(errors.ClientError) as caught:
        embed(make_provider(server, max_retries=4), face, "a")
    assert len(server.requests) == 1
    error = caught.value
    assert error.code == 429
    assert ("'retryDelay': '32s'" in str(error.details)) == (kind == "rate_limit_info")
    assert ("retry in 32s" in str(error.message)) == (kind == "rate_limit_message")
    assert (error.response.headers.get("retry-after") == "32") == (kind == "rate_limit")


def test_limits() -> None:
    limits = GeminiProvider(model=MODEL, requests_per_minute=30, tokens_per_minute=1000, max_retries=2).limits
    assert (limits.requests_per_minute, limits.tokens_per_minute, limits.max_retries) == (30, 1000, 2)


@faces
def test_headers_are_sent_with_each_request(server: GeminiServer, face: Face) -> None:
    embed(make_provider(server, headers={"X-Gateway-Key": "gateway-secret"}), face, "a")
    assert server.requests[0].headers["x-gateway-key"] == "gateway-secret"
    assert server.requests[0].headers["x-goog-api-key"] == "any"


@faces
@pytest.mark.parametrize("key", [None, "key"])
def test_authorization_in_headers_replaces_the_key(server: GeminiServer, face: Face, key: str | None) -> None:
    embed(make_provider(server, api_key=key, headers={"Authorization": "Bearer abc"}), face, "a")
    assert server.requests[0].headers["authorization"] == "Bearer abc"
    assert "x-goog-api-key" not in server.requests[0].headers


def test_a_header_may_be_the_key(server: GeminiServer) -> None:
    embed(make_provider(server, api_key=None, headers={"X-Goog-Api-Key": "from-header"}), "blocking", "a")
    assert server.requests[0].headers["x-goog-api-key"] == "from-header"


def test_headers_are_not_part_of_the_space() -> None:
    plain, other = GeminiProvider(model=MODEL), GeminiProvider(model=MODEL, headers={"X-Key": "secret"})
    assert plain.space("query").fingerprint() == other.space("query").fingerprint()
    assert "secret" not in f"{other!r} {other.space('query')}"


@faces
def test_a_null_row_leaves_the_others_as_they_are(server: GeminiServer, face: Face) -> None:
    server.misbehave("null", where=lambda text: text == "b")
    found = embed(make_provider(server, normalize=True), face, "a", "b", "c").vectors
    assert found[1] is None
    assert found[0].shape == found[2].shape == (16,)


def test_a_misspelled_task_is_refused(server: GeminiServer) -> None:
    provider = make_provider(server, task_types={"search": "RETRIEVAL_QUERY"})
    for task, meant in (("qurey", "query"), ("serach", "search"), ("clusterng", "clustering")):
        with Cache(provider) as cache, pytest.raises(SpaceError, match=f'did you mean "{meant}"'):
            cache.embed("a", task=task)
    assert not server.requests


# --- texts ------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["gemini-embedding-001", "gemini-embedding-2", "text-embedding-004"])
@pytest.mark.parametrize("face", ["blocking", "async"])
def test_every_text_is_a_content_of_its_own(server: GeminiServer, model: str, face: Face) -> None:
    """For newer models, the client would turn a list of strings into one content with one vector."""
    with Cache(make_provider(server, model=model)) as cache:
        ask = cache.embed_batch if face == "blocking" else lambda texts: asyncio.run(cache.aembed_batch(texts))
        found = ask(["a", "b"])
    expected = [server.vector_of(text, model=model, task_type="RETRIEVAL_DOCUMENT") for text in "ab"]
    assert np.array_equal(found, np.stack(expected))


def test_an_empty_text_fails_alone(server: GeminiServer) -> None:
    with Cache(make_provider(server)) as cache:
        fetched = cache.fetch(["a", "", "b"])
        assert [type(error) for error in fetched.failed.values()] == [TextRefused]
        assert fetched.sources == ["provider", None, "provider"]


def test_calls_have_at_most_a_hundred_texts(server: GeminiServer) -> None:
    with Cache(make_provider(server)) as cache:
        cache.embed_batch([f"text {number}" for number in range(250)])
    assert sorted(len(request.body["requests"]) for request in server.requests) == [50, 100, 100]


def test_tokens_are_counted_for_misses_only(server: GeminiServer) -> None:
    with Cache(make_provider(server)) as cache:
        cache.embed_batch(["one two", "one two three", "one two"])
        assert cache.stats().providers["gemini"].tokens == 5


# --- tasks and the space ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "task", "sent"),
    [
        ({}, "document", "RETRIEVAL_DOCUMENT"),
        ({}, "query", "RETRIEVAL_QUERY"),
        ({}, "CLASSIFICATION", "CLASSIFICATION"),
        ({}, "semantic_similarity", "SEMANTIC_SIMILARITY"),
        ({"task_types": {"document": "CLUSTERING"}}, "document", "CLUSTERING"),
        ({"task_types": {"document": "CLUSTERING"}}, "query", "RETRIEVAL_QUERY"),
        ({"task_types": {"faq": "QUESTION_ANSWERING"}}, "faq", "QUESTION_ANSWERING"),
        ({"task_types": {"document": ""}}, "document", None),
        ({"prefixes": {"faq": "faq: "}}, "faq", None),
    ],
    ids=str,
)
def test_each_task_is_sent_with_its_task_type(
    server: GeminiServer, options: dict[str, Any], task: str, sent: str | None
) -> None:
    provider = make_provider(server, **options)
    with Cache(provider) as cache:
        cache.embed("a", task=task)
    assert server.requests[0].body["requests"][0].get("taskType") == sent
    assert (provider.space(task).extra or {}).get("task_type") == sent


def test_every_task_has_a_space_of_its_own(server: GeminiServer) -> None:
    provider = make_provider(server)
    tasks = ["document", "query", *(name.lower() for name in KNOWN_TASK_TYPES[2:])]
    assert len({provider.space(task).fingerprint() for task in tasks}) == len(tasks)
    with pytest.raises(SpaceError, match="task_types"):
        provider.space("no_such_task")


NO_TASK_TYPES = {"document": "", "query": ""}


def test_prefixes_for_models_without_task_types(server: GeminiServer) -> None:
    provider = make_provider(server, task_types=NO_TASK_TYPES, prefixes={"query": "task: search result | query: "})
    with Cache(provider) as cache:
        assert np.array_equal(cache.embed("a", task="query"), server.vector_of("task: search result | query: a"))
        assert np.array_equal(cache.embed("a"), server.vector_of("a"))
    assert provider.space("query").fingerprint() != provider.space("document").fingerprint()
    symmetric = make_provider(server, task_types=NO_TASK_TYPES)
    assert symmetric.space("query").fingerprint() == symmetric.space("document").fingerprint()


def test_normalize_scales_vectors_to_length_1(server: GeminiServer) -> None:
    about = {"dimensions": 8, "task_type": "RETRIEVAL_DOCUMENT"}
    with Cache(make_provider(server, dimensions=8)) as cache:
        assert np.array_equal(cache.embed("a"), server.vector_of("a", **about))
    with Cache(make_provider(server, dimensions=8, normalize=True)) as cache:
        found = cache.embed("a")
    assert np.linalg.norm(found) == pytest.approx(1, abs=1e-6)
    assert float(found @ server.vector_of("a", **about)) == pytest.approx(0.75, abs=1e-6)


def fingerprint(**options: Any) -> bytes:
    return GeminiProvider(**{"model": MODEL, **options}).space("document").fingerprint()


@pytest.mark.parametrize(
    "options",
    [
        {"model": "gemini-embedding-2"},
        {"dimensions": 768},
        {"normalize": True},
        {"task_types": {"document": ""}},
        {"prefixes": {"document": "text: "}},
        {"base_url": "http://localhost"},
        {"endpoint_name": "ours"},
    ],
    ids=str,
)
def test_options_that_change_the_space(options: dict[str, Any]) -> None:
    assert fingerprint(**options) != fingerprint()


def test_a_model_without_a_name_is_refused() -> None:
    with pytest.raises(ValueError, match="model is empty"):
        GeminiProvider(model="")


@pytest.mark.parametrize(
    "options",
    [
        {"model": f"models/{MODEL}"},
        {"api_key": "k"},
        {"batch_size": 3, "concurrency": 9, "max_retries": 9, "timeout": 9.0},
    ],
    ids=str,
)
def test_options_that_do_not_change_the_space(options: dict[str, Any]) -> None:
    assert fingerprint(**options) == fingerprint()


# --- keys, clients ----------------------------------------------------------------------------


def test_no_key_is_needed_until_the_first_miss(
    server: GeminiServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Cache(make_provider(server), [Tier(DiskBackend(path=tmp_path), timeout=60.0)]) as cache:
        cache.embed("a")
    with Cache(make_provider(server, api_key=None), [Tier(DiskBackend(path=tmp_path), timeout=60.0)]) as cache:
        assert cache.embed("a").shape == (16,)
        with pytest.raises(ValueError, match="API key"):
            cache.embed("b")
        monkeypatch.setenv("GEMINI_API_KEY", "from-environment")
        assert cache.embed("b").shape == (16,)
    assert server.requests[-1].headers["x-goog-api-key"] == "from-environment"


def test_a_warm_run_imports_no_client(server: GeminiServer, tmp_path: Path) -> None:
    configuration = {
        "provider": {"type": "gemini", "model": MODEL, "base_url": server.base_url, "api_key": "k"},
        "tiers": [{"type": "disk", "path": str(tmp_path), "timeout": "60s"}],
    }
    with embedonce.open(configuration) as cache:
        cache.embed("a")
    program = (
        "import json, sys, embedonce\n"
        "with embedonce.open(json.loads(sys.argv[1])) as cache: cache.embed('a')\n"
        "sys.exit('google.genai' in sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", program, json.dumps(configuration)], check=True, timeout=100)
    assert len(server.requests) == 1


def test_a_missing_package_is_named() -> None:
    program = (
        "import sys, embedonce\n"
        "sys.modules['google.genai'] = None\n"
        "embedonce.open({'provider': {'type': 'gemini', 'model': 'm'}, 'tiers': []})\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=100)
    assert "pip install 'embedonce[gemini]'" in done.stderr


def test_each_loop_has_a_client_that_ends_with_it(server: GeminiServer) -> None:
    """A connection that outlives its loop raises a ResourceWarning, and warnings are errors in tests."""
    with Cache(make_provider(server)) as cache:
        for text in ("a", "b", "c"):
            found = asyncio.run(cache.aembed(text))
            assert np.array_equal(found, server.vector_of(text, task_type="RETRIEVAL_DOCUMENT"))
            assert not cache.provider._clients._by_loop  # type: ignore[union-attr]
