"""Gemini's embeddings API on loopback, for tests: it answers like the real API, or misbehaves on demand.

::

    with GeminiServer() as server:
        client = google.genai.Client(api_key="any", http_options={"base_url": server.base_url})
        client.models.embed_content(model="gemini-embedding-001", contents=["a", "b"])
        server.texts  # 2
        server.misbehave("short")

The server requires only numpy. It accepts the requests that google-genai 3.6 sends, and its replies and errors follow
Gemini's API reference.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal, TypeAlias, get_args

import numpy as np

from embedonce.vectors import Vector

from .loopback import (
    ActiveFault,
    LoopbackServer,
    Reply,
    Request,
    RequestRefused,
    damage_items,
    estimate_tokens,
    make_vector,
)

GeminiMisbehaviour: TypeAlias = Literal[
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
    "rate_limit",
    "rate_limit_message",
    "rate_limit_no_hint",
    "rate_limit_info",
    "quota",
    "server_error",
    "bad_request",
    "unauthorized",
    "not_json",
    "truncated",
    "drip",
    "hang",
    "disconnect",
]

PATH = re.compile(r"/v1\w*/models/([^/:]+):(batchEmbedContents|embedContent)")

NOT_IN_SPACE = ("model", "content", "taskType", "outputDimensionality")
"""Fields of a request for one vector. All other fields are passed to :meth:`GeminiServer.vector_of` as ``extra``."""


class GeminiServer(LoopbackServer[GeminiMisbehaviour]):
    """Speaks ``:batchEmbedContents``, which google-genai sends for every call, and ``:embedContent``.

    A ``content`` with several parts has one vector, as in the real API. The vector depends on the text, the model,
    the dimensions, the task type and every other field; :meth:`vector_of` returns the same vector. The
    server silently truncates a text of more than ``max_tokens`` tokens, as Gemini does; with ``truncates=False``, the
    server refuses such a text.

    :meth:`misbehave` takes:

    ======================  ======================================================================
    ``short``               the first vector is missing, and the other vectors have moved up
    ``long``                there is one vector too many, at the front
    ``empty``               there are no vectors
    ``nan``                 one value is NaN
    ``infinity``            one value is infinite
    ``zeros``               one vector has only zeros
    ``dimension``           every vector is one value short
    ``ragged``              one vector is one value short
    ``no_values``           one vector has no values
    ``null``                the values of one vector are null
    ``rate_limit``          status 429, ``RESOURCE_EXHAUSTED``, with ``Retry-After``
    ``rate_limit_message``  status 429; only the message names the time to wait
    ``rate_limit_no_hint``  status 429 without a time to wait
    ``rate_limit_info``     status 429 with the time to wait in ``RetryInfo``
    ``quota``               status 429, ``RESOURCE_EXHAUSTED``, because the daily quota is used up
    ``server_error``        status 500
    ``bad_request``         status 400, ``INVALID_ARGUMENT``
    ``unauthorized``        status 400, ``API_KEY_INVALID``
    ``not_json``            status 200 with a page of HTML
    ``truncated``           the body ends half-way
    ``drip``                the body arrives one byte at a time
    ``hang``                there is no reply until ``heal()``
    ``disconnect``          the connection is closed without a reply
    ======================  ======================================================================
    """

    KINDS = get_args(GeminiMisbehaviour)

    def __init__(
        self,
        *,
        model: str = "gemini-embedding-001",
        dimensions: int = 16,
        max_inputs: int = 100,
        max_tokens: int = 2048,
        truncates: bool = True,
        api_key: str | None = None,
    ) -> None:
        self.max_inputs = max_inputs
        self.max_tokens = max_tokens
        self.truncates = truncates
        super().__init__(model=model, dimensions=dimensions, api_key=api_key)

    @property
    def base_url(self) -> str:
        """URL for the client's ``http_options``."""
        return self.url

    def vector_of(
        self,
        text: str,
        *,
        model: str | None = None,
        dimensions: int | None = None,
        task_type: str | None = None,
        **extra: Any,
    ) -> Vector:
        """Return the vector of a text, shape (dimensions,). This does not count as a request.

        Like a vector of Gemini, the vector has unit length only if it has all of the model's dimensions.
        """
        dimensions = dimensions or self.dimensions
        cut = text if self.tokens_of(text) <= self.max_tokens else text[: 4 * self.max_tokens]
        vector = make_vector(["gemini", model or self.model, cut, task_type, extra], dimensions)
        return vector if dimensions == self.dimensions else vector * np.float32(0.75)

    def tokens_of(self, text: str) -> int:
        """Return the number of tokens that the server charges for a text. The number is an estimate."""
        return estimate_tokens(text)

    def route(self, request: Request) -> Reply | None:
        """Implement the method of the base class."""
        key = request.headers.get("x-goog-api-key", request.query.get("key"))
        if self.api_key is not None and key != self.api_key:
            return self.failure(ActiveFault("unauthorized"), [])
        if request.method == "POST" and PATH.fullmatch(request.path):
            return None
        return _make_error(404, "NOT_FOUND", f"Requested entity was not found: {request.path}")

    def inputs_of(self, request: Request) -> list[Any]:
        """Implement the method of the base class."""
        try:
            return [_join_parts(asked) for asked in _list_asked(request)[2]]
        except (AttributeError, TypeError):
            return []

    def embed(self, request: Request, fault: ActiveFault | None) -> Reply:
        """Implement the method of the base class."""
        model, batch, asked = _list_asked(request)
        if not isinstance(asked, list) or not asked:
            raise _make_refusal("BatchEmbedContentsRequest.requests: at least one request is required")
        if len(asked) > self.max_inputs:
            raise _make_refusal(f"at most {self.max_inputs} requests can be in one batch")
        texts = [self._get_text(one, f"models/{model}") for one in asked]
        vectors = [self._make_vector(one, text, model) for one, text in zip(asked, texts, strict=True)]
        self.count_inputs(texts)
        items = damage_items(vectors, fault, texts)
        embeddings = [{"values": None if item.vector is None else item.vector.tolist()} for item in items]
        usage = {"usageMetadata": {"promptTokenCount": sum(map(self.tokens_of, texts))}}
        if batch:
            return Reply(200, {"embeddings": embeddings, **usage})
        return Reply(200, {**({"embedding": embeddings[0]} if embeddings else {}), **usage})

    def failure(self, fault: ActiveFault, inputs: Sequence[Any]) -> Reply | None:
        """Implement the method of the base class."""
        write = partial(fault.write_message, inputs=inputs)
        exhausted = "Resource has been exhausted (e.g. check quota)."
        match fault.kind:
            case "rate_limit":
                reply = _make_error(429, "RESOURCE_EXHAUSTED", write(exhausted))
                return Reply(reply.status, reply.content, {"Retry-After": f"{fault.seconds:g}"})
            case "rate_limit_message":
                message = write(f"{exhausted} Please retry in {fault.seconds:g}s.")
                return _make_error(429, "RESOURCE_EXHAUSTED", message)
            case "rate_limit_no_hint":
                return _make_error(429, "RESOURCE_EXHAUSTED", write(exhausted))
            case "rate_limit_info":
                detail: dict[str, Any] = {
                    "@type": "type.googleapis.com/google.rpc.RetryInfo",
                    "retryDelay": f"{fault.seconds:g}s",
                }
                return _make_error(429, "RESOURCE_EXHAUSTED", write(exhausted), [detail])
            case "quota":
                detail = {
                    "@type": "type.googleapis.com/google.rpc.QuotaFailure",
                    "violations": [{"quotaId": "EmbedContentRequestsPerDayPerUserPerProjectPerModel-FreeTier"}],
                }
                return _make_error(429, "RESOURCE_EXHAUSTED", write("You exceeded your current quota."), [detail])
            case "server_error":
                return _make_error(500, "INTERNAL", write("An internal error has occurred."))
            case "bad_request":
                return _make_error(400, "INVALID_ARGUMENT", write("Request contains an invalid argument."))
            case "unauthorized":
                detail = {"@type": "type.googleapis.com/google.rpc.ErrorInfo", "reason": "API_KEY_INVALID"}
                message = write("API key not valid. Please pass a valid API key.")
                return _make_error(400, "INVALID_ARGUMENT", message, [detail])
            case "not_json":
                return Reply(200, b"<html><body>Please log in.</body></html>", {"Content-Type": "text/html"})
            case _:
                return None

    def _get_text(self, asked: Any, model: str) -> str:
        """Return the text of a request for one vector.

        Raises:
            RequestRefused: the text is empty, or the server refuses it because it is too long.
        """
        if asked.get("model", model) != model:
            raise _make_refusal("the model of a request in the batch differs from the model of the batch")
        text = _join_parts(asked)
        if not text:
            raise _make_refusal("EmbedContentRequest.content contains an empty Part.")
        if not self.truncates and self.tokens_of(text) > self.max_tokens:
            raise _make_refusal(
                f"The input token count exceeds the maximum number of tokens allowed ({self.max_tokens})."
            )
        return text

    def _make_vector(self, asked: Mapping[str, Any], text: str, model: str) -> Vector:
        dimensions = asked.get("outputDimensionality", self.dimensions)
        if type(dimensions) is not int or not 1 <= dimensions <= self.dimensions:
            raise _make_refusal(f"outputDimensionality must be in [1, {self.dimensions}]")
        extra = {name: value for name, value in asked.items() if name not in NOT_IN_SPACE}
        return self.vector_of(text, model=model, dimensions=dimensions, task_type=asked.get("taskType"), **extra)


def _list_asked(request: Request) -> tuple[str, bool, Any]:
    """Return the model, whether the request is a batch, and the requests for one vector."""
    found = PATH.fullmatch(request.path)
    assert found is not None
    model, method = found.groups()
    is_batch = method == "batchEmbedContents"
    return model, is_batch, request.body.get("requests") if is_batch else [request.body]


def _join_parts(asked: Any) -> str:
    """Return the text of a request for one vector, with its parts joined."""
    return "".join(part.get("text", "") for part in asked.get("content", {}).get("parts", []))


def _make_refusal(message: str) -> RequestRefused:
    return RequestRefused(_make_error(400, "INVALID_ARGUMENT", message))


def _make_error(status: int, name: str, message: str, details: Sequence[Any] = ()) -> Reply:
    error: dict[str, Any] = {"code": status, "message": message, "status": name}
    if details:
        error["details"] = list(details)
    return Reply(status, {"error": error})
