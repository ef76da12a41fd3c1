"""Endpoints that answer with too much, that point elsewhere, or that repeat a key; and keys that no header can have."""

from __future__ import annotations

import asyncio
import gzip
import json
import logging
import traceback
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from http_servers import Handler, HttpServer

pytest.importorskip("openai")
pytest.importorskip("google.genai")

from embedonce import Cache, ProviderError
from embedonce.testing.fakes import DictBackend
from embedonce_providers.gemini import GeminiProvider
from embedonce_providers.openai import OpenAIProvider

KEY = "sk-proj-abcdefghijklmnop123456"


class Endpoint:
    """A loopback server that gives one answer to every request."""

    def __init__(self) -> None:
        self.status = 200
        self.headers: dict[str, str] = {}
        self.chunks: Callable[[bytes], Iterator[bytes]] = lambda request: iter([b"{}"])
        self.paths: list[str] = []
        self.sent: list[Any] = []
        self.written = 0
        endpoint = self

        class EndpointHandler(Handler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("content-length", 0)))
                endpoint.paths.append(self.path)
                endpoint.sent.append(self.headers)
                self.send_response(endpoint.status)
                self.send_header("content-type", "application/json")
                for name, value in endpoint.headers.items():
                    self.send_header(name, value)
                self.end_headers()
                try:
                    for chunk in endpoint.chunks(body):
                        self.wfile.write(chunk)
                        endpoint.written += len(chunk)
                except OSError:
                    pass
                self.close_connection = True

            do_GET = do_POST

        self.server = HttpServer(EndpointHandler)
        self.url = self.server.url

    def close(self) -> None:
        self.server.close()


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    server = Endpoint()
    yield server
    server.close()


@pytest.fixture
def other() -> Iterator[Endpoint]:
    server = Endpoint()
    yield server
    server.close()


def make_openai(url: str, **options: Any) -> OpenAIProvider:
    return OpenAIProvider(**{"model": "m", "base_url": f"{url}/v1", "api_key": KEY, **options})


def make_azure(url: str, **options: Any) -> OpenAIProvider:
    return OpenAIProvider(
        **{"model": "m", "azure_endpoint": url, "api_version": "2024-10-21", "api_key": KEY, **options}
    )


def make_gemini(url: str, **options: Any) -> GeminiProvider:
    return GeminiProvider(**{"model": "m", "base_url": url, "api_key": KEY, **options})


makers = pytest.mark.parametrize("make", [make_openai, make_azure, make_gemini])
faces = pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])


def embed(provider: Any, asynchronous: bool, texts: list[str]) -> Any:
    """Embed texts through a cache, and return what ``fetch`` returns."""
    with Cache(provider, [DictBackend()]) as cache:
        if asynchronous:

            async def call() -> Any:
                async with cache:
                    return await cache.afetch(texts)

            return asyncio.run(call())
        return cache.fetch(texts)


def show(error: BaseException) -> str:
    """Return everything that a traceback or a debugger would show of an error and the errors behind it."""
    parts, seen, waiting = [], set(), [error]
    while waiting:
        one = waiting.pop()
        if id(one) not in seen:
            seen.add(id(one))
            parts.append(f"{one!r} {one} {getattr(one, '__notes__', '')} {getattr(one, 'body', '')}")
            waiting += [behind for behind in (one.__cause__, one.__context__) if behind is not None]
    return "\n".join([*parts, *traceback.format_exception(error)])


def answer(make: Any, texts: int, dimensions: int, *, indent: int | None = None) -> bytes:
    values = np.random.default_rng(0).normal(size=dimensions).tolist()
    if make is make_gemini:
        return json.dumps({"embeddings": [{"values": values}] * texts}, indent=indent).encode()
    data = [{"index": place, "embedding": values} for place in range(texts)]
    return json.dumps({"data": data, "model": "m"}, indent=indent).encode()


# --- size -------------------------------------------------------------------------------------


PACKED = {
    "gzip": gzip.compress(b" " * 60_000_000, 1),
    "deflate": zlib.compress(b" " * 60_000_000, 1),
}


@makers
@faces
@pytest.mark.parametrize("encoding", ["gzip", "deflate", None])
@pytest.mark.parametrize("status", [200, 400, 500])
def test_an_answer_that_unpacks_to_far_too_much_is_not_read(
    endpoint: Endpoint, make: Any, asynchronous: bool, encoding: str | None, status: int
) -> None:
    endpoint.status = status
    if encoding is None:
        endpoint.chunks = lambda request: (b" " * 100_000 for _ in range(10_000))
    else:
        endpoint.headers = {"content-encoding": encoding}
        endpoint.chunks = lambda request: iter([PACKED[encoding]])
    fetched = embed(make(endpoint.url, dimensions=8, max_retries=0), asynchronous, ["one"])
    message = str(fetched.failed[0])
    if status == 200 or make is make_gemini:
        assert isinstance(fetched.failed[0], ProviderError)
        assert "is larger than" in message or "an error of more than" in message
        assert "base_url" in message
    assert endpoint.written < 200_000_000


@makers
@faces
@pytest.mark.parametrize("encoding", ["br", "zstd", "gzip, gzip", "gzip, identity, gzip", "compress"])
def test_an_answer_in_another_encoding_is_refused(
    endpoint: Endpoint, make: Any, asynchronous: bool, encoding: str
) -> None:
    endpoint.headers = {"content-encoding": encoding}
    endpoint.chunks = lambda request: iter([b"x" * 100])
    fetched = embed(make(endpoint.url, dimensions=8), asynchronous, ["one"])
    assert isinstance(fetched.failed[0], ProviderError)
    assert "Accept-Encoding" in str(fetched.failed[0])
    assert endpoint.sent[0]["accept-encoding"] == "gzip, deflate"
    assert len(endpoint.paths) == 1


@makers
@faces
@pytest.mark.parametrize("encoding", ["gzip", "deflate", "identity", None])
def test_large_answers_that_the_texts_explain_are_read(
    endpoint: Endpoint, make: Any, asynchronous: bool, encoding: str | None
) -> None:
    written = answer(make, 50, 2048, indent=8)
    endpoint.headers = {"content-encoding": encoding} if encoding else {}
    packed = {"gzip": gzip.compress, "deflate": zlib.compress}.get(encoding or "", bytes)(written)
    endpoint.chunks = lambda request: iter([packed[:1000], packed[1000:]])
    for dimensions in (None, 2048):
        fetched = embed(make(endpoint.url, dimensions=dimensions), asynchronous, [f"{i}" for i in range(50)])
        assert fetched.failed == {}
        assert fetched.vectors.shape == (50, 2048)


@makers
@faces
def test_a_damaged_compressed_answer_is_an_error(endpoint: Endpoint, make: Any, asynchronous: bool) -> None:
    endpoint.headers = {"content-encoding": "gzip"}
    endpoint.chunks = lambda request: iter([b"this is not gzip"])
    fetched = embed(make(endpoint.url), asynchronous, ["one"])
    assert "is damaged" in str(fetched.failed[0])


# --- redirects --------------------------------------------------------------------------------


@makers
@faces
@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize(
    "target",
    [
        "{other}/v1/embeddings?key=" + KEY,
        "http://user:password@127.0.0.1:1/x?sig=" + KEY,
        "https://127.0.0.1/x",
        "/another/path?token=" + KEY,
        "//evil.example/x",
        "http://[bad/x",
        "javascript:alert(1)",
    ],
)
def test_a_redirect_is_not_followed(
    endpoint: Endpoint, other: Endpoint, make: Any, asynchronous: bool, status: int, target: str
) -> None:
    if status not in (302, 307) and "other" not in target:
        pytest.skip("the same code")
    endpoint.status = status
    endpoint.headers = {"location": target.format(other=other.url)}
    fetched = embed(make(endpoint.url, max_retries=3), asynchronous, ["one", "two"])
    for error in fetched.failed.values():
        assert isinstance(error, ProviderError)
        assert f"status {status}, a redirect to" in str(error)
        for hidden in (KEY, "password", "/another", "key=", "sig="):
            assert hidden not in show(error)
    assert len(fetched.failed) == 2
    assert other.paths == []
    assert len(endpoint.paths) == 1  # not repeated, and not in parts
    if "{other}" in target:
        assert f"a redirect to {other.url}." in str(fetched.failed[0])


# --- keys -------------------------------------------------------------------------------------

BAD_KEYS = [f"{KEY}\n", f" {KEY}", f"{KEY}\r\n", f"{KEY}\0", f"{KEY}\u200b", f"{KEY}é", f"{KEY}\nX: y", f"\ufeff{KEY}"]
VARIABLES = {
    make_openai: ["OPENAI_API_KEY"],
    make_azure: ["AZURE_OPENAI_API_KEY", "AZURE_OPENAI_AD_TOKEN"],
    make_gemini: ["GEMINI_API_KEY", "GOOGLE_API_KEY"],
}


@makers
@pytest.mark.parametrize("key", BAD_KEYS, ids=ascii)
def test_a_key_that_no_header_can_have_is_refused_at_once(endpoint: Endpoint, make: Any, key: str) -> None:
    with pytest.raises(ValueError, match=r"^api_key ") as caught:
        make(endpoint.url, api_key=key)
    assert KEY not in show(caught.value)


@makers
@pytest.mark.parametrize("key", [key for key in BAD_KEYS if "\0" not in key], ids=ascii)
def test_a_key_in_a_variable_is_checked_when_the_provider_is_made(
    endpoint: Endpoint, make: Any, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in VARIABLES[make]:
        monkeypatch.delenv(name, raising=False)
    for name in VARIABLES[make]:
        monkeypatch.setenv(name, key)
        with pytest.raises(ValueError, match=f"the environment variable {name} ") as caught:
            make(endpoint.url, api_key=None)
        assert KEY not in show(caught.value)
        monkeypatch.delenv(name)


@makers
@faces
def test_a_key_that_is_set_after_the_provider_was_made_is_checked_too(
    endpoint: Endpoint, make: Any, asynchronous: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in VARIABLES[make]:
        monkeypatch.delenv(name, raising=False)
    provider = make(endpoint.url, api_key=None)
    monkeypatch.setenv(VARIABLES[make][0], f"{KEY}\n")
    with caplog.at_level(logging.DEBUG):
        fetched = embed(provider, asynchronous, ["one"])
    assert VARIABLES[make][0] in str(fetched.failed[0])
    assert KEY not in show(fetched.failed[0]) + caplog.text
    assert endpoint.paths == []


@pytest.mark.parametrize("name", ["OPENAI_ORG_ID", "OPENAI_PROJECT_ID"])
def test_other_variables_that_become_headers_are_checked(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "org-1\n")
    with pytest.raises(ValueError, match=name):
        OpenAIProvider(model="m", api_key=KEY)


@makers
@faces
@pytest.mark.parametrize("status", [400, 401, 403, 429, 500])
def test_an_error_that_repeats_the_key_is_masked(
    endpoint: Endpoint, make: Any, asynchronous: bool, status: int, caplog: pytest.LogCaptureFixture
) -> None:
    endpoint.status = status
    message = f"Incorrect API key provided: {KEY}. Bearer {KEY} other sk-live-0123456789abcdef"
    endpoint.chunks = lambda request: iter([json.dumps({"error": {"message": message, "code": status}}).encode()])
    with caplog.at_level(logging.DEBUG):
        fetched = embed(make(endpoint.url, max_retries=0), asynchronous, ["one"])
    shown = show(fetched.failed[0]) + caplog.text
    assert "Incorrect API key provided" in shown
    assert KEY not in shown
    assert "sk-live-0123" not in shown


@faces
def test_a_token_of_a_provider_of_tokens_is_masked(endpoint: Endpoint, asynchronous: bool) -> None:
    token = "azure-token-0123456789"
    endpoint.status = 401
    endpoint.chunks = lambda request: iter([json.dumps({"error": {"message": f"bad token {token}"}}).encode()])
    provider = make_openai(endpoint.url, api_key=None, token_provider=lambda: token, max_retries=0)
    shown = show(embed(provider, asynchronous, ["one"]).failed[0])
    assert "bad token" in shown
    assert token not in shown
    assert endpoint.sent[0]["authorization"] == f"Bearer {token}"


@makers
@faces
def test_the_password_of_a_url_is_sent_and_is_in_no_log(
    endpoint: Endpoint, make: Any, asynchronous: bool, caplog: pytest.LogCaptureFixture
) -> None:
    endpoint.status = 403
    url = endpoint.url.replace("://", "://someone:s3cret-word@")
    with caplog.at_level(logging.DEBUG):
        fetched = embed(make(url, max_retries=0), asynchronous, ["one"])
    assert endpoint.sent[0]["authorization"].startswith("Basic ")
    assert "s3cret-word" not in show(fetched.failed[0]) + caplog.text


# --- answers with status 200 that are no vectors --------------------------------------------------


BODIES = {
    "object": {"error": {"message": "cannot embed this input", "type": "invalid_request_error"}},
    "text": {"error": "cannot embed this input"},
    "other": {"object": "error", "message": "cannot embed this input", "code": 400},
    "no data": {"data": None},
    "no vectors": {"data": []},
}


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
def test_an_error_with_status_200_fails_only_its_text(endpoint: Endpoint, body: Any, asynchronous: bool) -> None:
    def answer_request(request: bytes) -> Iterator[bytes]:
        texts = json.loads(request)["input"]
        yield json.dumps(body).encode() if "bad" in texts else answer(make_openai, len(texts), 4)

    endpoint.chunks = answer_request
    fetched = embed(make_openai(endpoint.url, encoding_format="float"), asynchronous, ["a", "b", "bad", "c", "d"])
    assert set(fetched.failed) == {2}
    assert isinstance(fetched.failed[2], ProviderError)


@faces
@pytest.mark.parametrize("body", [{"error": {"code": 400, "message": "no"}}, {"embeddings": None}, {"embeddings": []}])
def test_an_answer_of_gemini_without_vectors_fails_only_its_text(
    endpoint: Endpoint, body: Any, asynchronous: bool
) -> None:
    def answer_request(request: bytes) -> Iterator[bytes]:
        texts = len(json.loads(request)["requests"])
        yield json.dumps(body).encode() if b'"bad"' in request else answer(make_gemini, texts, 4)

    endpoint.chunks = answer_request
    fetched = embed(make_gemini(endpoint.url), asynchronous, ["a", "b", "bad", "c", "d"])
    assert set(fetched.failed) == {2}
    assert "contains no vectors" in str(fetched.failed[2])


@pytest.mark.parametrize("code", [401, "invalid_api_key", 429])
def test_an_error_with_status_200_that_concerns_all_texts_is_not_searched(endpoint: Endpoint, code: Any) -> None:
    endpoint.chunks = lambda _: iter([json.dumps({"error": {"message": "no", "code": code}}).encode()])
    provider = make_openai(endpoint.url, max_retries=0)
    assert set(embed(provider, False, ["a", "b", "c", "d"]).failed) == {0, 1, 2, 3}
    assert len(endpoint.paths) == 1
