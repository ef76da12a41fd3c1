"""An OpenAI-compatible embeddings API on loopback, for tests: it answers like the real API, or misbehaves on demand.

::

    with OpenAIServer() as server:
        client = openai.OpenAI(base_url=server.base_url, api_key="any")
        client.embeddings.create(model="text-embedding-3-small", input=["a", "b"])
        server.texts  # 2
        server.misbehave("out_of_order")

The server requires only numpy. It accepts the requests that OpenAI's Python client sends, and its replies and errors
follow OpenAI's API reference.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal, TypeAlias, get_args

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

OpenAIMisbehaviour: TypeAlias = Literal[
    "out_of_order",
    "duplicate_index",
    "no_index",
    "no_zero_index",
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
    "quota",
    "server_error",
    "bad_request",
    "unauthorized",
    "error_as_200",
    "not_json",
    "truncated",
    "drip",
    "hang",
    "disconnect",
]

OPENAI_PATH = re.compile(r"(?:/openai)?/v1/(embeddings|models)")
AZURE_PATH = re.compile(r"/openai/deployments/([^/]+)/embeddings")

NOT_IN_SPACE = ("input", "model", "dimensions", "encoding_format", "user")
"""Fields of a request's body. All other fields are passed to :meth:`OpenAIServer.vector_of` as ``extra``."""


class OpenAIServer(LoopbackServer[OpenAIMisbehaviour]):
    """Speaks ``POST /v1/embeddings`` and ``GET /v1/models``, and Azure's variants of both paths.

    The vector of an input depends on the model, the dimensions and every other field of the body except
    ``user`` and ``encoding_format``. :meth:`vector_of` returns the vector of an input. The server accepts any model.
    ``deployments`` maps the deployment names in Azure's URLs to models. With ``base64=False`` the server always
    sends vectors as lists of floats, as some servers do.

    A request with more than ``max_inputs`` inputs gets ``batch_status`` and ``batch_message``, in which ``{limit}``
    becomes ``max_inputs``. ``encoding_formats`` are the values of ``encoding_format`` that the server accepts; it
    always accepts a request without the field. ``served_model`` is the model that answers name, in place of the model
    of the request.

    :meth:`misbehave` takes:

    ======================  ===============================================================================
    ``out_of_order``        the items come in reverse order, each with its correct ``index``
    ``duplicate_index``     the last item has the first item's ``index``; a single item has ``index`` 1
    ``no_index``            the items have no ``index``
    ``no_zero_index``       an item whose ``index`` is 0 has no ``index``, as in answers made with protobuf
    ``short``               the first vector is missing, and the other vectors have moved up
    ``long``                there is one vector too many, at the front
    ``empty``               there are no vectors
    ``nan``                 one value is NaN (as JSON, ``NaN``)
    ``infinity``            one value is infinite
    ``zeros``               one vector has only zeros
    ``dimension``           every vector is one value short
    ``ragged``              one vector is one value short
    ``no_values``           one vector has no values
    ``null``                one vector is null
    ``rate_limit``          status 429 with ``Retry-After``
    ``rate_limit_message``  status 429; only the message names the time to wait
    ``rate_limit_no_hint``  status 429 without a time to wait
    ``quota``               status 429, ``insufficient_quota``
    ``server_error``        status 500
    ``bad_request``         status 400
    ``unauthorized``        status 401
    ``error_as_200``        status 200 with an error in place of the data
    ``not_json``            status 200 with a page of HTML
    ``truncated``           the body ends half-way
    ``drip``                the body arrives one byte at a time
    ``hang``                there is no reply until ``heal()``
    ``disconnect``          the connection is closed without a reply
    ======================  ===============================================================================
    """

    KINDS = get_args(OpenAIMisbehaviour)

    def __init__(
        self,
        *,
        model: str = "text-embedding-3-small",
        dimensions: int = 16,
        max_inputs: int = 2048,
        max_tokens: int = 8192,
        max_total_tokens: int = 300_000,
        batch_status: int = 400,
        batch_message: str = "Invalid 'input': array too long. Expected at most {limit} items.",
        encoding_formats: Sequence[str] = ("float", "base64"),
        base64: bool = True,
        served_model: str | None = None,
        deployments: Mapping[str, str] | None = None,
        api_key: str | None = None,
    ) -> None:
        self.max_inputs = max_inputs
        self.max_tokens = max_tokens
        self.max_total_tokens = max_total_tokens
        self.batch_status = batch_status
        self.batch_message = batch_message
        self.encoding_formats = tuple(encoding_formats)
        self.served_model = served_model
        self.base64 = base64
        self.deployments = dict(deployments or {})
        super().__init__(model=model, dimensions=dimensions, api_key=api_key)

    @property
    def base_url(self) -> str:
        """URL for the client's ``base_url``. An Azure client needs ``url`` as its endpoint."""
        return f"{self.url}/v1"

    def vector_of(
        self, text: str | Sequence[int], *, model: str | None = None, dimensions: int | None = None, **extra: Any
    ) -> Vector:
        """Return the vector of a text or of tokens. This does not count as a request.

        The vector has unit length and the shape (dimensions,).
        """
        about = ["openai", model or self.model, text if isinstance(text, str) else list(text), extra]
        return make_vector(about, dimensions or self.dimensions)

    def tokens_of(self, text: str | Sequence[int]) -> int:
        """Return the number of tokens that the server charges: an estimate for a text, the exact number for tokens."""
        return estimate_tokens(text) if isinstance(text, str) else len(text)

    def route(self, request: Request) -> Reply | None:
        """Implement the method of the base class."""
        openai, azure = OPENAI_PATH.fullmatch(request.path), AZURE_PATH.fullmatch(request.path)
        if not self._is_allowed(request.headers):
            return self.failure(ActiveFault("unauthorized"), [])
        if request.method == "POST" and (azure or (openai and openai[1] == "embeddings")):
            return None
        if request.method == "GET" and openai and openai[1] == "models":
            models = [{"id": self.model, "object": "model", "created": 0, "owned_by": "loopback"}]
            return Reply(200, {"object": "list", "data": models})
        return _make_error(404, f"Invalid URL ({request.method} {request.path})")

    def inputs_of(self, request: Request) -> list[Any]:
        """Implement the method of the base class."""
        try:
            return _parse_inputs(request.body.get("input"))
        except (RequestRefused, AttributeError):
            return []

    def embed(self, request: Request, fault: ActiveFault | None) -> Reply:
        """Implement the method of the base class."""
        body = request.body
        if not isinstance(body, dict):
            raise RequestRefused(_make_error(400, "We could not parse the JSON body of your request."))
        model = self._get_model(request)
        inputs = _parse_inputs(body.get("input"))
        total = self._check_lengths(inputs)
        dimensions = body.get("dimensions", self.dimensions)
        if type(dimensions) is not int or not 1 <= dimensions <= self.dimensions:
            raise RequestRefused(
                _make_error(400, f"Invalid value for 'dimensions': {dimensions!r}.", param="dimensions")
            )
        form = body.get("encoding_format")
        if form is not None and form not in self.encoding_formats:
            message = f"Invalid value for 'encoding_format': {form!r}. Use {' or '.join(self.encoding_formats)}."
            raise RequestRefused(_make_error(400, message, param="encoding_format"))
        extra = {name: value for name, value in body.items() if name not in NOT_IN_SPACE}
        self.count_inputs([text if isinstance(text, str) else tuple(text) for text in inputs])
        vectors = [self.vector_of(text, model=model, dimensions=dimensions, **extra) for text in inputs]
        items = damage_items(vectors, fault, inputs)
        encode = _encode_base64 if form == "base64" and self.base64 else _encode_floats
        data = [
            {
                "object": "embedding",
                "index": item.index,
                "embedding": None if item.vector is None else encode(item.vector),
            }
            for item in items
        ]
        for item in data:
            if fault and (fault.kind == "no_index" or (fault.kind == "no_zero_index" and item["index"] == 0)):
                del item["index"]
        usage = {"prompt_tokens": total, "total_tokens": total}
        return Reply(200, {"object": "list", "data": data, "model": self.served_model or model, "usage": usage})

    def failure(self, fault: ActiveFault, inputs: Sequence[Any]) -> Reply | None:
        """Implement the method of the base class."""
        write = partial(fault.write_message, inputs=inputs)
        match fault.kind:
            case "rate_limit":
                reply = _make_rate_limit(write("Rate limit reached for requests."))
                return Reply(reply.status, reply.content, {"Retry-After": f"{fault.seconds:g}"})
            case "rate_limit_message":
                return _make_rate_limit(write(f"Rate limit reached. Please try again in {fault.seconds:g}s."))
            case "rate_limit_no_hint":
                return _make_rate_limit(write("Too many requests."))
            case "quota":
                message = write("You exceeded your current quota, please check your plan and billing details.")
                return _make_error(429, message, type="insufficient_quota", code="insufficient_quota")
            case "server_error":
                message = write("The server had an error while processing your request.")
                return _make_error(500, message, type="server_error")
            case "bad_request":
                return _make_error(400, write("The input is invalid."))
            case "unauthorized":
                return _make_error(401, write("Incorrect API key provided."), code="invalid_api_key")
            case "error_as_200":
                return Reply(200, {"error": {"message": write("Provider returned an error."), "code": 502}})
            case "not_json":
                return Reply(200, b"<html><body>Please log in.</body></html>", {"Content-Type": "text/html"})
            case _:
                return None

    def _is_allowed(self, headers: Mapping[str, str]) -> bool:
        given = headers.get("api-key") or headers.get("authorization", "").removeprefix("Bearer ")
        return self.api_key is None or given == self.api_key

    def _get_model(self, request: Request) -> str:
        azure = AZURE_PATH.fullmatch(request.path)
        if azure is None:
            model = request.body.get("model")
            if not isinstance(model, str) or not model:
                raise RequestRefused(_make_error(400, "you must provide a model parameter"))
            return self.deployments.get(model, model)
        if "api-version" not in request.query:
            raise RequestRefused(_make_error(404, "Resource not found", type=None, code="404"))
        if azure[1] not in self.deployments:
            message = "The API deployment for this resource does not exist."
            raise RequestRefused(_make_error(404, message, type=None, code="DeploymentNotFound"))
        return self.deployments[azure[1]]

    def _check_lengths(self, inputs: Sequence[Any]) -> int:
        """Return the total number of tokens, after checking each input against the limits of the API."""
        if len(inputs) > self.max_inputs:
            message = self.batch_message.replace("{limit}", str(self.max_inputs))
            raise RequestRefused(_make_error(self.batch_status, message, param="input", code="array_above_max_length"))
        lengths = [self.tokens_of(text) for text in inputs]
        for position, length in enumerate(lengths):
            if length > self.max_tokens:
                message = f"Invalid 'input[{position}]': maximum input length is {self.max_tokens} tokens."
                raise RequestRefused(_make_error(400, message))
        if sum(lengths) > self.max_total_tokens:
            message = f"Requested {sum(lengths)} tokens, max {self.max_total_tokens} tokens per request"
            kind = "max_tokens_per_request"
            raise RequestRefused(_make_error(400, message, type=kind, code=kind))
        return sum(lengths)


def _parse_inputs(given: Any) -> list[Any]:
    """Return the inputs as a list. ``given`` is a text, a list of texts, a list of tokens, or a list of token lists.

    Raises:
        RequestRefused: ``given`` is something else, or an input is empty.
    """
    if isinstance(given, str) or (isinstance(given, list) and all(type(token) is int for token in given)):
        given = [given]
    texts = isinstance(given, list) and all(isinstance(text, str) for text in given)
    tokens = isinstance(given, list) and all(
        isinstance(one, list) and all(type(token) is int and token >= 0 for token in one) for one in given
    )
    if not given or not (texts or tokens) or not all(given):
        raise RequestRefused(_make_error(400, "'$.input' is invalid."))
    return list(given)


def _encode_floats(vector: Vector) -> list[float]:
    return [float(value) for value in vector]


def _encode_base64(vector: Vector) -> str:
    return base64.b64encode(vector.astype("<f4").tobytes()).decode()


def _make_rate_limit(message: str) -> Reply:
    return _make_error(429, message, type="requests", code="rate_limit_exceeded")


def _make_error(
    status: int,
    message: str,
    *,
    type: str | None = "invalid_request_error",
    param: str | None = None,
    code: str | None = None,
) -> Reply:
    return Reply(status, {"error": {"message": message, "type": type, "param": param, "code": code}})
