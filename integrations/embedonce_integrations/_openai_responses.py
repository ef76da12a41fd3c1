"""Reads the endpoint's answers to a cached OpenAI client, and makes the responses that the client returns."""

from __future__ import annotations

import base64
import json
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from openai._legacy_response import LegacyAPIResponse
from openai._models import FinalRequestOptions
from openai.types import CreateEmbeddingResponse, Embedding
from openai.types.create_embedding_response import Usage

from embedonce import Cache, Embedded, Fetched, ProviderError
from embedonce.answer_order import order_by_index
from embedonce.vectors import Vector

RAW_HEADER: Final = "X-Stainless-Raw-Response"
"""Header that asks ``create`` for a raw answer. ``with_raw_response`` sets it to "true", ``with_streaming_response`` to
"stream"."""

BODY_HEADERS: Final = ("content-encoding", "content-length", "content-type", "transfer-encoding")
"""Headers that describe the body of one HTTP response. They do not fit the body that is made from the cache."""


@dataclass(slots=True, kw_only=True)
class Call:
    """A call of ``create`` or ``client.post``, and what the endpoint has answered so far."""

    cache: Cache
    client: Any
    texts: list[str]
    """The inputs as texts, from which the keys are made."""
    model: str
    """The model as the call named it; after a request to the endpoint, as the endpoint named it."""
    send: Callable[[list[str]], Any]
    """Send inputs to the endpoint. Returns the answer, or a coroutine if the client is async."""
    returns_base64: bool
    """Whether the response has base64 strings in place of lists of numbers."""
    sends_base64: bool
    """Whether the endpoint sends base64 strings. By default, the client decodes them."""
    is_raw: bool
    post_parser: Callable[[Any], Any] | None = None
    """A function that the response goes through, as in the client."""
    prompt_tokens: int = 0
    total_tokens: int = 0
    raw: LegacyAPIResponse[CreateEmbeddingResponse] | None = None
    """The endpoint's last raw answer; None if the call did not ask for raw answers, or needed no request."""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def read_answer(self, answer: Any, inputs: int) -> Embedded:
        """Return an answer's vectors in the order of the inputs, and add the answer's tokens to the call's totals.

        Raises:
            ProviderError: the answer does not have exactly one vector, with the right index, for each input.
        """
        raw = None
        if isinstance(answer, LegacyAPIResponse):
            raw, answer = answer, answer.parse()
        data: Any = getattr(answer, "data", None)
        if not isinstance(data, list):
            raise ProviderError(
                "the endpoint's answer contains no list of vectors, so nothing was stored; check base_url and the model"
            )
        order = order_by_index([getattr(item, "index", None) for item in data], inputs)
        vectors = [_read_vector(getattr(data[position], "embedding", None)) for position in order]
        model = answer.model if isinstance(answer.model, str) and answer.model else None
        prompt, total = (_read_count(answer.usage, name) for name in ("prompt_tokens", "total_tokens"))
        with self.lock:
            self.prompt_tokens += prompt
            self.total_tokens += total
            self.model = model or self.model
            self.raw = raw or self.raw
        return Embedded(vectors, total, model)

    def make_response(self, fetched: Fetched) -> Any:
        """Return a response like the endpoint's, with the vectors that were fetched; raw if the call asked for that.

        Raises:
            Exception: the error of the first input that failed. The client raised it, or :meth:`read_answer` did.
        """
        if fetched.failed:
            raise fetched.failed[min(fetched.failed)]
        encode = _encode_base64 if self.returns_base64 else _encode_floats
        response = CreateEmbeddingResponse(
            data=[encode(row, index) for index, row in enumerate(fetched.vectors)],
            model=self.model,
            object="list",
            usage=Usage(prompt_tokens=self.prompt_tokens, total_tokens=self.total_tokens),
        )
        if self.post_parser is not None:
            response = self.post_parser(response)
        return self._make_raw_response(response, fetched) if self.is_raw else response

    def _make_raw_response(
        self, response: CreateEmbeddingResponse, fetched: Fetched
    ) -> LegacyAPIResponse[CreateEmbeddingResponse]:
        """Return the raw form of a response.

        Its headers are those of the endpoint's last answer, if there was one, and these: ``x-embedonce-cache`` ("hit",
        "miss" or "partial"), ``x-embedonce-hits``, ``x-embedonce-computed`` and, if an importer had any,
        ``x-embedonce-imported`` (numbers of inputs). The body is the whole response, also if the endpoint sent only a
        part of it.
        """
        computed = fetched.sources.count("provider")
        imported = len(fetched.imported)
        hits = len(fetched.sources) - computed - imported
        sent = None if self.raw is None else self.raw.http_response
        kept = [] if sent is None else [item for item in sent.headers.multi_items() if item[0] not in BODY_HEADERS]
        headers = [
            *kept,
            ("content-type", "application/json"),
            ("x-embedonce-cache", "hit" if hits == len(fetched.sources) else "partial" if hits else "miss"),
            ("x-embedonce-hits", str(hits)),
            ("x-embedonce-computed", str(computed)),
            *([("x-embedonce-imported", str(imported))] if imported else []),
        ]
        # The client may use httpx or its successor, so the classes are taken from the client's own requests.
        request = self.client._client.build_request("POST", f"{str(self.client.base_url).rstrip('/')}/embeddings")
        library = sys.modules[type(request).__module__.partition(".")[0]]
        made = library.Response(
            200,
            headers=headers,
            content=json.dumps(self._make_body(response, fetched)).encode(),
            request=request if sent is None else sent.request,
        )
        made.elapsed = timedelta() if sent is None else sent.elapsed
        options = FinalRequestOptions(
            method="post",
            url="/embeddings",
            # ``parse()`` returns the finished response, because the body has its vectors in the form of the wire.
            post_parser=lambda parsed: response if isinstance(parsed, CreateEmbeddingResponse) else parsed,
        )
        return LegacyAPIResponse(
            raw=made,
            cast_to=CreateEmbeddingResponse,
            client=self.client,
            stream=False,
            stream_cls=None,
            options=options,
            retries_taken=0 if self.raw is None else self.raw.retries_taken,
        )

    def _make_body(self, response: CreateEmbeddingResponse, fetched: Fetched) -> dict[str, Any]:
        """Return the body that the endpoint would have sent."""
        encode: Any = _to_base64 if self.sends_base64 else np.ndarray.tolist
        return {
            "object": "list",
            "data": [
                {"object": "embedding", "index": index, "embedding": encode(row)}
                for index, row in enumerate(fetched.vectors)
            ],
            "model": response.model,
            "usage": {"prompt_tokens": self.prompt_tokens, "total_tokens": self.total_tokens},
        }


current_call: ContextVar[Call] = ContextVar("embedonce_openai_call")


@contextmanager
def set_current_call(call: Call) -> Iterator[None]:
    """Inside the ``with`` block, make ``call`` the current call. Its arguments go to the endpoint.

    The engine's threads and asyncio tasks copy the caller's context, so they see this call.
    """
    token = current_call.set(call)
    try:
        yield
    finally:
        current_call.reset(token)


def _read_count(usage: Any, name: str) -> int:
    value = getattr(usage, name, None)
    return value if type(value) is int and value >= 0 else 0


def _read_vector(embedding: Any) -> NDArray[Any] | None:
    """Return the vector of an embedding, or None if the embedding is null.

    The embedding is a list of numbers, or a string of little-endian float32 values in base64. A null in the list counts
    as NaN, because many JSON encoders write NaN as null.
    """
    if embedding is None:
        return None
    try:
        if isinstance(embedding, str):
            return np.frombuffer(base64.b64decode(embedding, validate=True), "<f4")
        vector = np.array([np.nan if value is None else value for value in embedding])
    except (TypeError, ValueError):
        vector = np.array(None)
    if vector.dtype.kind not in "fi" or vector.ndim != 1:
        raise ProviderError(
            "the endpoint returned an embedding that is neither a list of numbers nor base64; nothing was stored"
        )
    return vector


def _encode_floats(row: Vector, index: int) -> Embedding:
    return Embedding(embedding=row.tolist(), index=index, object="embedding")


def _encode_base64(row: Vector, index: int) -> Embedding:
    """Return an embedding whose vector is a base64 string.

    ``Embedding`` declares only lists, but the client returns strings for ``encoding_format="base64"``.
    """
    encoded: Any = _to_base64(row)
    return Embedding.construct(embedding=encoded, index=index, object="embedding")


def _to_base64(row: Vector) -> str:
    return base64.b64encode(row.astype("<f4").tobytes()).decode()
