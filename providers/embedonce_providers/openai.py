"""Embeddings of OpenAI, of Azure, and of any endpoint that speaks OpenAI's protocol, through the openai package.

The package is imported, and a client made, at the first miss: a run in which every text is a hit needs
neither a key nor a network. Retries and rate limits are the client's own.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any, Literal
from urllib.parse import urlsplit

from annotated_types import Ge, Gt, Le, MinLen

from embedonce import Embedded, Limits, SpaceError, TextRefused, VectorSpace, hookimpl
from embedonce.contracts import Task
from embedonce.keys import canonical_url
from embedonce.options import Doc, Duration

from ._clients import Clients, need
from ._openai_answer import read_answer, too_long

if TYPE_CHECKING:
    import openai

need("openai")

api = 1

OPENAI_URL = "https://api.openai.com/v1"
RETRY_SECONDS = 60.0
"""The longest that the client waits before it tries again: it gives up on a longer Retry-After."""

OPTIONS = ("input", "model", "dimensions", "encoding_format")
"""Fields of a request that are options of their own."""

FINAL = ("insufficient_quota", "billing_hard_limit_reached", "billing_not_active")
"""Codes that come with status 429 and do not pass by waiting."""


class OpenAIProvider:
    """Asks ``POST /embeddings`` of an endpoint. Symmetric, unless ``prefixes`` or ``task_body`` tell tasks apart."""

    def __init__(
        self,
        *,
        model: Annotated[str, MinLen(1), Doc("The model, such as text-embedding-3-small.")],
        base_url: Annotated[
            str | None, Doc("The endpoint, up to and with /v1. Default: OPENAI_BASE_URL, else OpenAI's own.")
        ] = None,
        api_key: Annotated[
            str | None, Doc("Default: OPENAI_API_KEY, for Azure AZURE_OPENAI_API_KEY. Needed at the first miss.")
        ] = None,
        dimensions: Annotated[int | None, Gt(0), Doc("Ask for vectors of this length, where the model can.")] = None,
        revision: Annotated[
            str | None, Doc("Which version of the model this is, where its name alone does not say.")
        ] = None,
        deployment: Annotated[
            str | None, Doc("The name that the endpoint has for the model, where it has one of its own.")
        ] = None,
        azure_endpoint: Annotated[str | None, Doc("Azure's endpoint, in place of base_url.")] = None,
        api_version: Annotated[str | None, Doc("Azure's api-version. Default: OPENAI_API_VERSION.")] = None,
        endpoint_name: Annotated[
            str | None, Doc("Stands in keys for the URL, where several hosts serve the same model.")
        ] = None,
        prefixes: Annotated[
            Mapping[str, str] | None, Doc("What is put before a text, by task: { query = 'query: ' }.")
        ] = None,
        extra_body: Annotated[
            Mapping[str, Any] | None, Doc("Fields of the request beside OpenAI's own; all but user are part of keys.")
        ] = None,
        task_body: Annotated[
            Mapping[str, Mapping[str, Any]] | None,
            Doc("As extra_body, by task: { query = { input_type = 'query' } }."),
        ] = None,
        truncate: Annotated[
            Literal["error", "provider"],
            Doc(
                'What happens to a text that is too long: "error" if the endpoint refuses it, "provider" if it cuts it.'
            ),
        ] = "error",
        encoding_format: Annotated[
            Literal["float", "base64"] | None,
            Doc("How vectors travel. Default: base64 from OpenAI and Azure, float from others, which all have it."),
        ] = None,
        batch_size: Annotated[int, Ge(1), Le(2048), Doc("Most texts of one call.")] = 256,
        max_tokens: Annotated[
            int, Gt(0), Doc("Most tokens of one call; a byte counts as one, which is never too few.")
        ] = 300_000,
        concurrency: Annotated[int, Ge(1), Doc("Calls under way at once for one batch.")] = 4,
        max_retries: Annotated[int, Ge(0), Doc("How often a call that failed is made again.")] = 4,
        timeout: Annotated[Duration, Gt(0), Doc("How long the endpoint may take each time.")] = 60.0,
    ) -> None:
        if not model:
            raise ValueError("model is empty; it is a name, such as text-embedding-3-small")
        if azure_endpoint is not None and base_url is not None:
            raise ValueError("azure_endpoint takes the place of base_url: give one of them")
        if api_version is not None and azure_endpoint is None:
            raise ValueError("api_version goes with azure_endpoint: nothing else sends it")
        self._base_url = base_url or os.environ.get("OPENAI_BASE_URL") or OPENAI_URL
        self._azure_endpoint = azure_endpoint
        self._api_version = api_version
        self._api_key = api_key
        self._model = model
        self._sent_model = deployment or model
        self._dimensions = dimensions
        self._prefixes = dict(prefixes or {})
        self._bodies = {task: dict(body) for task, body in (task_body or {}).items()}
        self._extra_body = dict(extra_body or {})
        for body in (self._extra_body, *self._bodies.values()):
            _check_body(body)
        endpoint = canonical_url(azure_endpoint or self._base_url)
        self._default = endpoint == OPENAI_URL
        theirs = self._default or azure_endpoint is not None or _host(endpoint).endswith(".api.openai.com")
        self._format: Literal["float", "base64"] = encoding_format or ("base64" if theirs else "float")
        self._max_retries = max_retries
        self._timeout = timeout
        self._about: dict[str, Any] = {
            "provider": "openai",
            "model": model,
            "endpoint": endpoint_name or endpoint,
            "revision": revision,
            "dimensions": dimensions,
            "truncate": truncate,
        }
        self.limits = Limits(
            max_batch=batch_size,
            max_tokens=max_tokens,
            concurrency=concurrency,
            # Of the whole call: the client's timeout is one per read, and a body that drips never ends.
            timeout=(max_retries + 1) * timeout + max_retries * RETRY_SECONDS,
        )
        self._clients: Clients[openai.OpenAI, openai.AsyncOpenAI] = Clients(
            "openai", make=self._make, amake=self._amake, aclose=lambda client: client.close()
        )

    def space(self, task: Task) -> VectorSpace:
        """Describe the request that a text of this task is sent in.

        Raises:
            SpaceError: other tasks are told apart, and this one is not named.
        """
        told_apart = self._prefixes.keys() | self._bodies.keys()
        if told_apart and task not in {"document", "query", *told_apart}:
            raise SpaceError(f"prefixes and task_body say nothing of the task {task!r}; name it there")
        body = {name: value for name, value in self._body(task).items() if name != "user"}
        alike = self._parts("document") == self._parts("query") == self._parts(task)
        return VectorSpace(
            **self._about, task=None if alike else task, prefix=self._prefixes.get(task) or None, extra=body or None
        )

    def count_tokens(self, text: str) -> int:
        """Return the bytes of a text: no tokenizer that works on bytes makes more tokens.

        A tokenizer would count fewer and fill calls better; OpenAI's downloads its tables when it is first used.
        """
        return len(text) if text.isascii() else len(text.encode())

    def embed(self, texts: Sequence[str], task: Task) -> Embedded:
        """Return one vector per text, as the endpoint answers it.

        Raises:
            TextRefused: a text is empty, or too long for the endpoint.
            openai.OpenAIError: what the client raises, among it a missing key.
            ProviderError: the endpoint's answer is none.
        """
        request = self._request(texts, task)
        with self._clients.using() as client, _refusing(request["input"]):
            answer = client.embeddings.with_raw_response.create(**request)
        return read_answer(answer.content, len(texts))

    async def aembed(self, texts: Sequence[str], task: Task) -> Embedded:
        """As :meth:`embed`, with the async client of the running loop."""
        request = self._request(texts, task)
        client = await self._clients.aget()
        with _refusing(request["input"]):
            answer = await client.embeddings.with_raw_response.create(**request)
        return read_answer(answer.content, len(texts))

    def close(self) -> None:
        """Close the clients and their connections."""
        self._clients.close()

    def _body(self, task: Task) -> dict[str, Any]:
        return {**self._extra_body, **self._bodies.get(task, {})}

    def _parts(self, task: Task) -> tuple[str, dict[str, Any]]:
        return self._prefixes.get(task, ""), self._bodies.get(task, {})

    def _request(self, texts: Sequence[str], task: Task) -> dict[str, Any]:
        prefix = self._prefixes.get(task, "")
        sent = [prefix + text for text in texts]
        empty = [position for position, text in enumerate(sent) if not text]
        if empty:  # the API would refuse the whole call, and not say which
            raise TextRefused("an empty text has no embedding", empty)
        request: dict[str, Any] = {"model": self._sent_model, "input": sent, "encoding_format": self._format}
        if self._dimensions is not None:
            request["dimensions"] = self._dimensions
        if body := self._body(task):
            request["extra_body"] = body
        return request

    def _options(self) -> dict[str, Any]:
        options: dict[str, Any] = {"max_retries": self._max_retries, "timeout": self._timeout}
        if self._azure_endpoint is not None:
            return {
                **options,
                "azure_endpoint": self._azure_endpoint,
                "api_version": self._api_version,
                "api_key": self._api_key,
            }
        key = self._api_key or os.environ.get("OPENAI_API_KEY")
        if not key and not self._default:
            key = "none"  # a server of one's own needs no key, and the client will not go without
        return {**options, "base_url": self._base_url, "api_key": key}

    def _make(self) -> openai.OpenAI:
        import openai

        kind = openai.OpenAI if self._azure_endpoint is None else openai.AzureOpenAI
        options = self._options()
        return kind(**options, http_client=openai.DefaultHttpxClient(event_hooks={"response": [_give_up]}))

    def _amake(self) -> openai.AsyncOpenAI:
        import openai

        kind = openai.AsyncOpenAI if self._azure_endpoint is None else openai.AsyncAzureOpenAI
        options = self._options()
        return kind(**options, http_client=openai.DefaultAsyncHttpxClient(event_hooks={"response": [_agive_up]}))


@hookimpl
def embedonce_providers() -> Mapping[str, type[OpenAIProvider]]:
    return {"openai": OpenAIProvider}


def _host(url: str) -> str:
    return urlsplit(url).hostname or ""


def _check_body(body: Mapping[str, Any]) -> None:
    for name in OPTIONS:
        if name in body:
            raise ValueError(f"{name} belongs to no extra field of the request: it is an option, or the text itself")


@contextmanager
def _refusing(texts: Sequence[str]) -> Iterator[None]:
    """Raise TextRefused for an endpoint's error that is about the length of a text."""
    import openai

    try:
        yield
    except openai.APIStatusError as error:
        positions = too_long(error.status_code, f"{error} {error.body}", texts)
        if positions is None:
            raise
        raise TextRefused("a text has more tokens than the endpoint takes", positions) from error


def _give_up(response: Any) -> None:
    """Tell the client not to try again where waiting does not help: it retries every status 429."""
    if response.status_code == 429:
        response.read()
        _mark(response)


async def _agive_up(response: Any) -> None:
    """As :func:`_give_up`."""
    if response.status_code == 429:
        await response.aread()
        _mark(response)


def _mark(response: Any) -> None:
    try:
        error = response.json()["error"]
        final = error.get("code") in FINAL or error.get("type") in FINAL
    except (ValueError, LookupError, TypeError, AttributeError):
        return  # not OpenAI's form
    if final:
        response.headers["x-should-retry"] = "false"
