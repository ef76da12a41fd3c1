"""Tests for headers, tokens, retries, rates and messages of the openai provider, with the real client."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from typer.testing import CliRunner

import embedonce
from embedonce import Cache, ConfigError, ProviderError, SpaceError, TextRefused
from embedonce.cli import app
from embedonce.testing import OpenAIServer
from embedonce_providers.openai import OpenAIProvider

from .chains import Face

MODEL = "text-embedding-3-small"
SECRET = "gateway-secret-0123"


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


def make_azure(server: OpenAIServer, **options: Any) -> OpenAIProvider:
    azure = {"azure_endpoint": server.url, "api_version": "2024-10-21", "deployment": "mine"}
    return OpenAIProvider(**{"model": MODEL, "max_retries": 0, "timeout": 20, **azure, **options})


def embed(provider: OpenAIProvider, face: Face, *texts: str) -> Any:
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


faces = pytest.mark.parametrize("face", ["blocking", "async"])


# --- headers ----------------------------------------------------------------------------------


@faces
def test_headers_are_sent_with_each_request(server: OpenAIServer, face: Face) -> None:
    provider = make_provider(server, api_key="key", headers={"X-Gateway-Key": SECRET, "x-team": "search"})
    embed(provider, face, "a")
    headers = server.requests[0].headers
    assert (headers["x-gateway-key"], headers["x-team"]) == (SECRET, "search")
    assert headers["authorization"] == "Bearer key"


@faces
@pytest.mark.parametrize("make", [make_provider, make_azure])
@pytest.mark.parametrize("key", [None, "key"])
@pytest.mark.parametrize("name", ["Authorization", "authorization"])
def test_authorization_in_headers_replaces_the_key(
    server: OpenAIServer, face: Face, make: Callable[..., OpenAIProvider], key: str | None, name: str
) -> None:
    embed(make(server, api_key=key, headers={name: "Basic abc"}), face, "a")
    assert server.requests[0].headers["authorization"] == "Basic abc"
    assert "api-key" not in server.requests[0].headers


def test_openai_itself_needs_no_key_beside_authorization() -> None:
    provider = OpenAIProvider(model=MODEL, headers={"Authorization": "Bearer abc"})
    provider._make_client().close()


@pytest.mark.parametrize(
    ("headers", "message"),
    [
        ({"X Key": SECRET}, "invalid name"),
        ({"": SECRET}, "invalid name"),
        ({"X-Key": SECRET + "\n"}, "X-Key"),
        ({"X-Key": f" {SECRET}"}, "X-Key"),
        ({"X-Key": f"{SECRET}é"}, "X-Key"),
        ({"X-Key": 7}, "must be a str"),
        ({"X-Key": SECRET, "x-key": SECRET}, "twice"),
    ],
    ids=str,
)
def test_invalid_headers_are_refused(headers: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        OpenAIProvider(model=MODEL, headers=headers)
    assert SECRET not in str(caught.value)


def write_configuration(folder: Path, server: OpenAIServer, *lines: str) -> Path:
    path = folder / "embedonce.toml"
    provider = ["[provider]", 'type = "openai"', f'model = "{MODEL}"', f'base_url = "{server.base_url}"']
    path.write_text("\n".join([*provider, *lines, "[[tiers]]", 'type = "memory"']))
    return path


def test_headers_in_toml_are_secrets(server: OpenAIServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GATEWAY_KEY", SECRET)
    path = write_configuration(
        tmp_path, server, 'headers = { X-Gateway-Key = "${GATEWAY_KEY}", X-Team = "plain-secret" }'
    )
    config = embedonce.config.load(path)
    with embedonce.open(path) as cache:
        cache.embed("a")
        shown = f"{config!r} {config.settings()} {config.provider!r} {cache!r} {cache.provider!r} {cache.stats()}"
        shown += f"{cache.explain('b')!r} {cache.provider.space('document')}"
    assert server.requests[0].headers["x-gateway-key"] == SECRET
    assert SECRET not in shown
    assert "plain-secret" not in shown


def test_no_command_shows_headers(server: OpenAIServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GATEWAY_KEY", SECRET)
    monkeypatch.chdir(tmp_path)
    write_configuration(tmp_path, server, 'headers = { X-Gateway-Key = "${GATEWAY_KEY}", X-Team = "plain-secret" }')
    for command in (["check"], ["check", "--json"], ["config"], ["config", "--json"], ["explain", "a"]):
        done = CliRunner().invoke(app, command)
        assert done.output
        assert SECRET not in done.output, command
        assert "plain-secret" not in done.output, command


# --- tokens -----------------------------------------------------------------------------------


@faces
@pytest.mark.parametrize("make", [make_provider, make_azure])
def test_each_request_has_a_new_token(
    server: OpenAIServer, face: Face, make: Callable[..., OpenAIProvider], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AZURE_OPENAI_API_KEY", "unused")
    monkeypatch.setenv("OPENAI_API_KEY", "unused")
    tokens = iter(["one", "two"])
    provider = make(server, token_provider=lambda: next(tokens))
    for text in "ab":
        embed(provider, face, text)
    assert [request.headers["authorization"] for request in server.requests] == ["Bearer one", "Bearer two"]
    assert not any("api-key" in request.headers for request in server.requests)


@faces
@pytest.mark.parametrize("make", [make_provider, make_azure])
def test_an_error_of_the_token_provider_reaches_the_caller(
    server: OpenAIServer, face: Face, make: Callable[..., OpenAIProvider]
) -> None:
    def fail() -> str:
        raise PermissionError("not signed in")

    with pytest.raises(PermissionError, match="not signed in"):
        embed(make(server, token_provider=fail, max_retries=3), face, "a")
    assert not server.requests


@pytest.mark.parametrize("token", ["", None, b"bytes"])
def test_a_token_is_a_str(server: OpenAIServer, token: Any) -> None:
    with pytest.raises(TypeError, match="token_provider must return a str that is not empty"):
        embed(make_azure(server, token_provider=lambda: token), "blocking", "a")


@pytest.fixture
def tokens_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    (tmp_path / "embedonce_test_tokens.py").write_text("def get():\n    return 'from-module'\n\nvalue = 7\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield "embedonce_test_tokens"
    sys.modules.pop("embedonce_test_tokens", None)


def test_a_token_provider_in_toml(server: OpenAIServer, tmp_path: Path, tokens_module: str) -> None:
    path = write_configuration(tmp_path, server, f'token_provider = "{tokens_module}:get"')
    with embedonce.open(path) as cache:
        cache.embed("a")
    assert server.requests[0].headers["authorization"] == "Bearer from-module"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_module_here:get", "cannot be imported"),
        ("embedonce_test_tokens:no_such", "has no 'no_such'"),
        ("embedonce_test_tokens:value", "expected a function"),
        ("get", '"module:function"'),
        ("", '"module:function"'),
    ],
)
def test_a_wrong_token_provider_is_an_error_with_its_place(
    server: OpenAIServer, tmp_path: Path, tokens_module: str, name: str, message: str
) -> None:
    path = write_configuration(tmp_path, server, f'token_provider = "{name}"')
    with pytest.raises(ConfigError, match=message) as caught:
        embedonce.open(path)
    (problem,) = caught.value.problems
    assert problem.line is not None


async def get_token() -> str:
    return "token"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"token_provider": get_token}, "coroutine function"),
        ({"token_provider": 7}, "expected a function"),
        ({"token_provider": lambda: "a", "api_key": "k"}, "api_key cannot be used together"),
        ({"token_provider": lambda: "a", "headers": {"Authorization": "k"}}, "cannot be used together"),
        ({"answers_as": "one"}, "must be a list"),
    ],
    ids=["async", "number", "key", "header", "answers_as"],
)
def test_options_that_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OpenAIProvider(model=MODEL, **options)


# --- retries and rates ------------------------------------------------------------------------


@faces
@pytest.mark.parametrize("kind", ["rate_limit", "rate_limit_message", "rate_limit_no_hint", "quota"])
def test_the_client_does_not_repeat_a_call_that_is_rate_limited(server: OpenAIServer, face: Face, kind: Any) -> None:
    """The engine repeats it. The error has what the engine needs."""
    server.misbehave(kind, times=None, seconds=14.9)
    with pytest.raises(openai.RateLimitError) as caught:
        embed(make_provider(server, max_retries=4), face, "a", "b")
    assert len(server.requests) == 1
    error = caught.value
    assert error.status_code == 429
    assert error.response.headers.get("retry-after") == ("14.9" if kind == "rate_limit" else None)
    assert ("try again in 14.9s" in str(error.body)) == (kind == "rate_limit_message")


@faces
@pytest.mark.parametrize("texts", [["a"], ["a", "b"]])
@pytest.mark.parametrize("kind", ["server_error", "bad_request"])
def test_the_client_does_not_repeat_a_call_after_an_error_status(
    server: OpenAIServer, face: Face, kind: Any, texts: list[str]
) -> None:
    server.misbehave(kind, times=None)
    with pytest.raises(openai.APIStatusError):
        embed(make_provider(server, max_retries=4), face, *texts)
    assert len(server.requests) == 1


def test_limits() -> None:
    provider = OpenAIProvider(model=MODEL, requests_per_minute=30, tokens_per_minute=1000.0, max_retries=2, timeout=10)
    limits = provider.limits
    assert (limits.requests_per_minute, limits.tokens_per_minute, limits.max_retries) == (30, 1000.0, 2)
    assert limits.timeout == 3 * 10 + 2 * 8
    assert limits.lease


# --- answers ----------------------------------------------------------------------------------


@faces
def test_the_model_that_an_answer_names(face: Face) -> None:
    with OpenAIServer(served_model="e5-base") as server:
        assert embed(make_provider(server), face, "a").model == "e5-base"
    assert make_provider(server, answers_as=["e5-base", "e5"]).answers_as == ("e5-base", "e5")


@faces
@pytest.mark.parametrize("kind", ["null", "nan", "zeros", "ragged", "no_values"])
def test_a_bad_row_leaves_the_others_as_they_are(server: OpenAIServer, face: Face, kind: Any) -> None:
    server.misbehave(kind, where=lambda text: text == "b")
    found = embed(make_provider(server), face, "a", "b", "c").vectors
    for place, text in ((0, "a"), (2, "c")):
        assert np.array_equal(np.float32(found[place]), server.vector_of(text))
    assert (found[1] is None) == (kind == "null")


VOYAGE = "https://api.voyageai.com/v1"


def test_the_documented_example_for_voyage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Voyage accepts no ``encoding_format``, null or ``base64``."""
    page = (Path(__file__).parents[2] / "docs" / "providers.md").read_text()
    (example,) = [block for block in page.split("```") if VOYAGE in block]
    monkeypatch.setenv("VOYAGE_API_KEY", "voyage-key")
    path = tmp_path / "embedonce.toml"
    with OpenAIServer(model="voyage-3.5", encoding_formats=("base64",), api_key="voyage-key") as server:
        path.write_text(example.removeprefix("toml").replace(VOYAGE, server.base_url))
        with embedonce.open(path) as cache:
            found = cache.embed("a", task="query")
        assert np.array_equal(found, server.vector_of("a", input_type="query"))


@faces
@pytest.mark.parametrize("kind", ["no_zero_index", "no_index"])
@pytest.mark.parametrize("texts", ["a", "abc"])
def test_an_answer_with_missing_indexes(server: OpenAIServer, face: Face, kind: Any, texts: str) -> None:
    server.misbehave(kind)
    found = embed(make_provider(server), face, *texts).vectors
    assert np.array_equal(np.float32(found), [server.vector_of(text) for text in texts])


# --- messages ---------------------------------------------------------------------------------


@faces
@pytest.mark.parametrize("quote", ["{text}", "{text!r}"])
def test_a_message_has_the_reason_without_the_text_and_the_key(server: OpenAIServer, face: Face, quote: str) -> None:
    text = 'My "secret" diary:\n1 January é'
    options: dict[str, Any] = {"headers": {"X-Key": SECRET}, "prefixes": {"document": "pass: "}}
    provider = make_provider(server, api_key="my-own-key-77", **options)
    message = f"provider is down, key my-own-key-77, gateway {SECRET}, input {quote} at http://u:pw@host/"
    server.misbehave("error_as_200", message=message)
    with pytest.raises(ProviderError, match="contains an error; nothing was stored: provider is down") as caught:
        embed(provider, face, text)
    server.misbehave("bad_request", message="maximum input length exceeded by " + quote)
    with pytest.raises(
        TextRefused, match="more tokens than the endpoint accepts: maximum input length exceeded by"
    ) as too_long:
        embed(provider, face, text)
    shown = f"{caught.value} {too_long.value} {caught.value!r}"
    for hidden in ("pass: ", "diary", "January", "my-own-key", SECRET, "pw@"):
        assert hidden not in shown


def test_no_secret_is_logged(server: OpenAIServer, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, logger="embedonce")
    server.misbehave("unauthorized")
    provider = make_provider(server, headers={"X-Key": SECRET}, token_provider=lambda: "token-0123456")
    with Cache(provider) as cache:
        failed = cache.fetch(["a"]).failed[0]
        shown = f"{failed!r} {''.join(traceback.format_exception(failed))} {provider!r} {cache!r} {caplog.text}"
    assert SECRET not in shown
    assert "token-0123456" not in shown


# --- settings of the batch, tasks -------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"extra_body": {"late_chunking": True}}, r"extra_body\.late_chunking"),
        ({"task_body": {"query": {"late_chunking": True}}}, r"task_body\.query\.late_chunking"),
        ({"extra_body": {"options": [{"lateChunking": 1}]}}, r"extra_body\.options\[0\]\.lateChunking"),
    ],
    ids=str,
)
def test_settings_that_depend_on_the_batch_are_refused_at_once(options: dict[str, Any], name: str) -> None:
    with pytest.raises(SpaceError, match=name):
        OpenAIProvider(model=MODEL, **options)


def test_settings_that_depend_on_the_batch_are_refused_with_their_place(server: OpenAIServer, tmp_path: Path) -> None:
    path = write_configuration(tmp_path, server, "extra_body = { late_chunking = true }")
    with pytest.raises(ConfigError, match=r"extra_body\.late_chunking") as caught:
        embedonce.open(path)
    assert caught.value.problems[0].line is not None


@pytest.mark.parametrize("options", [{}, {"prefixes": {"query": "query: "}}], ids=str)
def test_a_misspelled_task_is_refused(server: OpenAIServer, options: dict[str, Any]) -> None:
    with Cache(make_provider(server, **options)) as cache, pytest.raises(SpaceError, match='did you mean "query"'):
        cache.embed("a", task="qurey")
    assert not server.requests
