"""Requests without an answer are counted, because a client repeats them and an endpoint may charge each of them."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from importlib import import_module
from typing import Any

import optional
import pytest

from embedonce import Cache
from embedonce.testing.fakes import DictBackend

optional.needs("openai")

VECTOR = base64.b64encode(b"\x00\x00\x80?" * 2).decode()


class Endpoint:
    """Raises some errors of the HTTP client, and then answers."""

    def __init__(self, http: Any, *errors: str) -> None:
        self.http = http
        self.errors = list(errors)
        self.requests = 0
        self.change: Callable[[dict[str, Any]], None] = lambda answer: None

    def handle(self, request: Any) -> Any:
        self.requests += 1
        if self.errors:
            raise getattr(self.http, self.errors.pop(0))("lost", request=request)
        count = len(json.loads(request.content)["input"])
        data = [{"index": i, "embedding": VECTOR} for i in range(count)]
        answer = {"data": data, "model": "m", "usage": {"total_tokens": 5 * count}}
        self.change(answer)
        return self.http.Response(200, json=answer)


@pytest.fixture
def open_cache(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Cache, Endpoint]]:
    import openai

    from embedonce_providers.openai import OpenAIProvider

    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.0)
    http = import_module(openai.DefaultHttpxClient.__mro__[1].__module__.partition(".")[0])

    def open_cache(*errors: str) -> tuple[Cache, Endpoint]:
        endpoint = Endpoint(http, *errors)
        provider = OpenAIProvider(model="m", base_url="http://127.0.0.1:1/v1", encoding_format="base64", max_retries=2)
        options = provider._http_options

        def with_transport(hooks: Any) -> dict[str, Any]:
            return {**options(hooks), "transport": http.MockTransport(endpoint.handle)}

        monkeypatch.setattr(provider, "_http_options", with_transport)
        return Cache(provider, [DictBackend()]), endpoint

    return open_cache


@pytest.mark.parametrize(
    ("errors", "tokens", "unknown"),
    [
        ([], 0, 0),
        (["ReadTimeout"], 10, 0),
        (["ReadTimeout", "WriteTimeout"], 20, 0),
        (["ConnectTimeout", "ReadTimeout"], 10, 0),
        (["PoolTimeout", "ConnectError"], 0, 0),
        (["ReadTimeout"] * 3, 0, 6),
    ],
)
@pytest.mark.parametrize("is_async", [False, True])
async def test_each_request_without_an_answer_counts(
    open_cache: Any, errors: list[str], tokens: int, unknown: int, is_async: bool
) -> None:
    cache, endpoint = open_cache(*errors)
    async with cache:
        fetched = await cache.afetch(["a", "b"]) if is_async else cache.fetch(["a", "b"])
    assert (fetched.wasted.tokens, fetched.wasted.unknown_tokens) == (tokens, unknown)
    assert fetched.computed.tokens == (10 if endpoint.requests > len(errors) else 0)


@pytest.mark.parametrize(
    "change",
    [
        lambda answer: answer["data"].pop(),
        lambda answer: answer["data"][0].update(index=1),
        lambda answer: [item.update(embedding=7) for item in answer["data"]],
        lambda answer: [item.update(embedding=[]) for item in answer["data"]],
    ],
    ids=["number", "order", "format", "empty"],
)
async def test_the_tokens_of_a_refused_answer_count(open_cache: Any, change: Any) -> None:
    cache, endpoint = open_cache()
    endpoint.change = change
    async with cache:
        fetched = await cache.afetch(["a", "b"])
    assert sorted(fetched.failed) == [0, 1]
    assert (fetched.wasted.tokens, fetched.wasted.unknown_tokens) == (10 * endpoint.requests, 0)
