"""Embeddings of OpenAI, Azure, and any endpoint that speaks OpenAI's protocol, through the openai package.

The provider imports the package and makes a client at the first miss, so a run in which every text is a hit needs
neither a key nor a network. ``prepare`` imports the package earlier. The client repeats a request whose connection
failed. The engine repeats a request that was answered with an error status, as a whole or in parts.
"""

from __future__ import annotations

import json
import os
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal
from urllib.parse import urlsplit

from annotated_types import Ge, Gt, Le, MinLen

from embedonce import Embedded, Limits, TextRefused, VectorSpace, hookimpl
from embedonce.batch_settings import refuse_batch_settings
from embedonce.contracts import Task
from embedonce.keys import canonical_url
from embedonce.options import Doc, Duration
from embedonce.tasks import TASKS, check_task

from ._access import (
    FunctionName,
    check_headers,
    check_key,
    load_token_provider,
    make_async,
    read_key_variable,
    require_key,
    split_credentials,
)
from ._clients import Clients, require_package
from ._guard import ACCEPT_ENCODING, Guard, expect_vectors, find_error
from ._openai_answer import find_too_long, read_answer
from ._openai_tokens import count_tokens
from ._reasons import describe_reason

if TYPE_CHECKING:
    import openai

require_package("openai")

api = 1

OPENAI_URL = "https://api.openai.com/v1"
RETRY_SECONDS = 8.0
"""Longest pause of the client before it repeats a request after a failed connection or a timeout."""

OPENAI_HOSTS = (".api.openai.com", ".openai.azure.com")
"""Suffixes of the names of hosts that serve OpenAI's own models. These hosts accept base64."""

RESERVED_FIELDS = ("input", "model", "dimensions", "encoding_format")
"""Fields of a request that extra_body and task_body must not set."""

RAW_RESPONSE = {"X-Stainless-Raw-Response": "true"}
"""Makes the client return the answer as it was received, as ``embeddings.with_raw_response`` does. That method cannot
leave out ``encoding_format``."""


class OpenAIProvider:
    """Calls ``POST /embeddings`` of an endpoint.

    A text has the same vector for every task, unless ``prefixes`` or ``task_body`` distinguish tasks.
    """

    def __init__(
        self,
        *,
        model: Annotated[str, MinLen(1), Doc("The model, such as text-embedding-3-small.")],
        base_url: Annotated[
            str | None, Doc("The endpoint's URL, including /v1. Default: OPENAI_BASE_URL, else OpenAI's.")
        ] = None,
        api_key: Annotated[
            str | None, Doc("Default: OPENAI_API_KEY (for Azure, AZURE_OPENAI_API_KEY). Needed at the first miss.")
        ] = None,
        dimensions: Annotated[
            int | None, Gt(0), Doc("Request vectors with this many dimensions, if the model supports it.")
        ] = None,
        revision: Annotated[str | None, Doc("Version of the model, if its name alone does not identify it.")] = None,
        deployment: Annotated[
            str | None, Doc("The endpoint's own name for the model, sent in place of model. Default: model.")
        ] = None,
        azure_endpoint: Annotated[str | None, Doc("Azure's endpoint, in place of base_url.")] = None,
        api_version: Annotated[str | None, Doc("Azure's api-version. Default: OPENAI_API_VERSION.")] = None,
        token_provider: Annotated[
            FunctionName,
            Doc('Function that returns a token for each call, in place of api_key: "module:function". It is imported.'),
        ] = None,
        headers: Annotated[
            Mapping[str, str] | None,
            Doc("Extra headers of each request. They are not part of the keys, so they must not change vectors."),
        ] = None,
        answers_as: Annotated[
            Sequence[str] | None, Doc("Other names under which the endpoint's answers may name the same model.")
        ] = None,
        endpoint_name: Annotated[
            str | None,
            Doc("Name that replaces the URL in keys, so that hosts with the same model share their vectors."),
        ] = None,
        prefixes: Annotated[
            Mapping[str, str] | None, Doc("Text to put before each text of a task: { query = 'query: ' }.")
        ] = None,
        extra_body: Annotated[
            Mapping[str, Any] | None,
            Doc('Extra fields of each request. All except "user" become part of the keys.'),
        ] = None,
        task_body: Annotated[
            Mapping[str, Mapping[str, Any]] | None,
            Doc("Like extra_body, but with separate fields for each task: { query = { input_type = 'query' } }."),
        ] = None,
        truncate: Annotated[
            Literal["error", "provider"],
            Doc('How the endpoint treats a text that is too long: "error" refuses it, "provider" truncates it.'),
        ] = "error",
        encoding_format: Annotated[
            Literal["float", "base64", "none"] | None,
            Doc(
                "Format of vectors in answers. Default: base64 for OpenAI and Azure, float for other endpoints. "
                '"none" leaves the field out of requests.'
            ),
        ] = None,
        token_inputs: Annotated[
            bool,
            Doc(
                "Each text is a list of token numbers as JSON, such as [1,2,3], and is sent as such a list. "
                "embedonce serve uses this for clients that send token numbers."
            ),
        ] = False,
        batch_size: Annotated[int, Ge(1), Le(2048), Doc("Maximum number of texts per call.")] = 256,
        max_tokens: Annotated[
            int,
            Gt(0),
            Doc("Maximum number of tokens per call. Each byte of a text counts as one token."),
        ] = 300_000,
        concurrency: Annotated[
            int, Ge(1), Doc("Make at most this many calls at the same time to embed one list of texts.")
        ] = 4,
        requests_per_minute: Annotated[float | None, Gt(0), Doc("Maximum number of calls per minute.")] = None,
        tokens_per_minute: Annotated[
            float | None, Gt(0), Doc("Maximum number of tokens per minute. Each byte of a text counts as one token.")
        ] = None,
        max_retries: Annotated[int, Ge(0), Doc("Maximum number of retries of a failed call.")] = 4,
        timeout: Annotated[Duration, Gt(0), Doc("Time limit of each attempt.")] = 60.0,
    ) -> None:
        if not model:
            raise ValueError("model is empty; set it to a name such as text-embedding-3-small")
        if azure_endpoint is not None and base_url is not None:
            raise ValueError("azure_endpoint and base_url cannot be used together; remove one of them")
        if api_version is not None and azure_endpoint is None:
            raise ValueError("api_version requires azure_endpoint: set azure_endpoint, or remove api_version")
        if isinstance(answers_as, str):
            raise ValueError("answers_as must be a list of names; write it in brackets")
        self._headers = check_headers(headers)
        if token_provider is not None and (api_key is not None or "authorization" in self._headers):
            other = "headers.Authorization" if api_key is None else "api_key"
            raise ValueError(f"token_provider and {other} cannot be used together; remove one of them")
        self._get_token = load_token_provider(token_provider)
        self.answers_as = tuple(answers_as or ())
        self._base_url = base_url or read_key_variable("OPENAI_BASE_URL") or OPENAI_URL
        self._base_url, self._login = split_credentials(self._base_url)
        self._azure_endpoint = azure_endpoint
        if azure_endpoint is not None:
            self._azure_endpoint, self._login = split_credentials(azure_endpoint)
        self._api_version = api_version
        self._api_key = api_key
        self._model = model
        self._sent_model = deployment or model
        self._dimensions = dimensions
        self._prefixes = dict(prefixes or {})
        self._has_token_inputs = token_inputs
        if token_inputs and any(self._prefixes.values()):
            raise ValueError("prefixes and token_inputs cannot be used together; remove one of them")
        self._bodies = {task: dict(body) for task, body in (task_body or {}).items()}
        self._extra_body = dict(extra_body or {})
        _check_body(self._extra_body, "extra_body")
        for task, body in self._bodies.items():
            _check_body(body, f"task_body.{task}")
        endpoint = canonical_url(azure_endpoint or self._base_url)
        self._is_default_endpoint = endpoint == OPENAI_URL
        host = urlsplit(endpoint).hostname or ""
        self._is_openai = self._is_default_endpoint or azure_endpoint is not None or host.endswith(OPENAI_HOSTS)
        self._format: Literal["float", "base64", "none"] = encoding_format or ("base64" if self._is_openai else "float")
        self._max_retries = max_retries
        self._timeout = timeout
        self._space_fields: dict[str, Any] = {
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
            requests_per_minute=requests_per_minute,
            tokens_per_minute=tokens_per_minute,
            max_retries=max_retries,
            # This timeout limits the whole call. The client's timeout applies to each read, so the client would wait
            # without limit for an answer that arrives one byte at a time.
            timeout=(max_retries + 1) * timeout + max_retries * RETRY_SECONDS,
        )
        self._guard = Guard(dimensions=dimensions, timeout=timeout, list_secrets=self._list_secrets, raises=False)
        self._check_access()
        self._clients: Clients[openai.OpenAI, openai.AsyncOpenAI] = Clients(
            "openai", make=self._make_client, amake=self._make_async_client, aclose=lambda client: client.close()
        )

    def space(self, task: Task) -> VectorSpace:
        """Describe the request in which a text of this task is sent.

        Raises:
            SpaceError: ``prefixes`` or ``task_body`` distinguish tasks, and neither of them names this task. If they
                do not distinguish tasks, only a misspelled task is refused.
        """
        named_tasks = dict.fromkeys([*self._prefixes, *self._bodies])
        check_task(
            task,
            list(dict.fromkeys([*TASKS, *named_tasks])),
            what="provider 'openai'",
            accepts_others=not named_tasks,
            advice="Add the task to prefixes or task_body to use it." if named_tasks else "",
        )
        body = {name: value for name, value in self._merge_body(task).items() if name != "user"}
        if self._has_token_inputs:
            body["input"] = "tokens"  # no field of the request has this name (RESERVED_FIELDS)
        is_symmetric = self._task_parts("document") == self._task_parts("query") == self._task_parts(task)
        return VectorSpace(
            **self._space_fields,
            task=None if is_symmetric else task,
            prefix=self._prefixes.get(task) or None,
            extra=body or None,
        )

    def count_tokens(self, text: str) -> int:
        """Return the number of bytes in a text, which is an upper bound for its number of tokens.

        A tokenizer that works on bytes makes at most one token per byte. OpenAI's tokenizer would count fewer tokens,
        so a call could hold more texts. But it may block an event loop for seconds, because the tokens of all texts of
        a call are counted before the first request.
        """
        if self._has_token_inputs:
            return text.count(",") + 1
        return len(text) if text.isascii() else len(text.encode())

    def count_exact_tokens(self, texts: Sequence[str], task: Task) -> list[int] | None:
        """Return the number of tokens of each text, or None if OpenAI's tokenizer is not on this machine.

        Only OpenAI's own models at OpenAI or Azure are counted, with the package ``tiktoken`` and a table that it has
        downloaded before. Other endpoints may use other tokenizers for the same name.
        """
        if self._has_token_inputs:
            return [text.count(",") + 1 for text in texts]
        if not self._is_openai:
            return None
        prefix = self._prefixes.get(task, "")
        return count_tokens(self._model, [prefix + text for text in texts])

    def embed(self, texts: Sequence[str], task: Task) -> Embedded:
        """Return one vector per text, exactly as the endpoint returned it.

        Raises:
            TextRefused: a text is empty, or too long for the endpoint.
            openai.OpenAIError: the client failed, for example because the key is missing.
            ProviderError: the endpoint's answer is invalid.
        """
        request, sent = self._build_request(texts, task)
        with self._clients.borrow() as client, expect_vectors(len(texts)):
            import openai

            answer, failure = None, None
            try:
                answer = client.post("/embeddings", **_wrap_request(request))
            except openai.APIStatusError as error:
                failure = error
        return self._read(answer, failure, sent)

    async def aembed(self, texts: Sequence[str], task: Task) -> Embedded:
        """Async twin of :meth:`embed`, with the async client of the running event loop."""
        request, sent = self._build_request(texts, task)
        client = await self._clients.aget()
        with expect_vectors(len(texts)):
            import openai

            answer, failure = None, None
            try:
                answer = await client.post("/embeddings", **_wrap_request(request))
            except openai.APIStatusError as error:
                failure = error
        return self._read(answer, failure, sent)

    def check(self) -> None:
        """Check that there is an API key if the endpoint needs one.

        Raises:
            ValueError: the key is missing; the message names the environment variable.
        """
        if self._get_token is not None or "authorization" in self._headers:
            return
        if self._azure_endpoint is not None:
            require_key(self._api_key, ("AZURE_OPENAI_API_KEY", "AZURE_OPENAI_AD_TOKEN"))
        elif self._is_default_endpoint:
            require_key(self._api_key, ("OPENAI_API_KEY",))

    def prepare(self) -> None:
        """Import the client's package, which takes about a second."""
        self._clients.prepare()

    def close(self) -> None:
        """Close the clients and their connections."""
        self._clients.close()

    def _merge_body(self, task: Task) -> dict[str, Any]:
        return {**self._extra_body, **self._bodies.get(task, {})}

    def _task_parts(self, task: Task) -> tuple[str, dict[str, Any]]:
        return self._prefixes.get(task, ""), self._bodies.get(task, {})

    def _build_request(self, texts: Sequence[str], task: Task) -> tuple[dict[str, Any], list[str]]:
        """Return the body of a request, and the texts that it sends."""
        prefix = self._prefixes.get(task, "")
        sent = [prefix + text for text in texts]
        empty = [position for position, text in enumerate(sent) if not text]
        if empty:  # the API would refuse the whole call without saying which text is empty
            raise TextRefused("an empty text has no embedding", empty)
        inputs = _read_token_inputs(sent) if self._has_token_inputs else sent
        request: dict[str, Any] = {"model": self._sent_model, "input": inputs}
        if self._format != "none":
            request["encoding_format"] = self._format
        if self._dimensions is not None:
            request["dimensions"] = self._dimensions
        return {**request, **self._merge_body(task)}, sent

    def _list_secrets(self) -> list[str | None]:
        """Return the secrets that an endpoint may repeat in a message."""
        keys = [os.environ.get(name) for name in ("OPENAI_API_KEY", "AZURE_OPENAI_API_KEY", "AZURE_OPENAI_AD_TOKEN")]
        return [self._api_key, *keys, *self._headers.values()]

    def _read(self, answer: Any, failure: openai.APIStatusError | None, texts: Sequence[str]) -> Embedded:
        """Return the vectors of an answer. Call this function outside of an ``except`` block.

        Otherwise, the context of a guard's error would be the client's exception, which shows where a redirect points.

        Raises:
            TextRefused: the endpoint says that a text is too long.
            openai.APIStatusError: the endpoint answered with another error.
            ProviderError: the answer is invalid.
        """
        error = find_error(answer.http_response if failure is None else failure.response)
        if error is not None:
            raise error
        if failure is None:
            return read_answer(answer.content, texts, self._list_secrets())
        positions = find_too_long(failure.status_code, f"{failure} {failure.body}", texts)
        if positions is None:
            raise failure
        reason = describe_reason(failure.body or failure.message, texts=texts, secrets=self._list_secrets())
        raise TextRefused(f"a text has more tokens than the endpoint accepts{reason}", positions) from failure

    # --- clients ------------------------------------------------------------------------------

    def _client_options(self, get_token: Callable[[], str | Awaitable[str]] | None) -> dict[str, Any]:
        options: dict[str, Any] = {"max_retries": self._max_retries, "timeout": self._timeout}
        key = self._api_key
        if self._azure_endpoint is not None:
            options |= {"azure_endpoint": self._azure_endpoint, "api_version": self._api_version}
            if get_token is not None:
                return {**options, "azure_ad_token_provider": get_token}
        else:
            options |= {"base_url": self._base_url}
            if get_token is not None:
                return {**options, "api_key": get_token}
            key = key or read_key_variable("OPENAI_API_KEY")
            if not key and not self._is_default_endpoint:
                key = "none"  # a local server needs no key, but the client requires one
        if not key and "authorization" in self._headers:
            key = "none"  # replaced by the header, but the client requires one
        elif not key and self._azure_endpoint is not None:
            key = read_key_variable("AZURE_OPENAI_API_KEY")
            read_key_variable("AZURE_OPENAI_AD_TOKEN")
        return {**options, "api_key": key}

    def _check_access(self) -> None:
        """Check the keys that are known before the first call.

        Raises:
            ValueError: a key has a character that a header cannot have.
        """
        check_key(self._api_key, "api_key")
        if self._api_key is None and self._get_token is None and "authorization" not in self._headers:
            azure = ("AZURE_OPENAI_API_KEY", "AZURE_OPENAI_AD_TOKEN")
            for name in ("OPENAI_API_KEY",) if self._azure_endpoint is None else azure:
                read_key_variable(name)
        for name in ("OPENAI_ORG_ID", "OPENAI_PROJECT_ID"):  # the client sends them in headers
            read_key_variable(name)

    def _http_options(self, hooks: Mapping[str, Any]) -> dict[str, Any]:
        return {"event_hooks": hooks, "auth": self._login, "follow_redirects": False}

    def _make_client(self) -> openai.OpenAI:
        import openai

        hooks: dict[str, Any] = {"request": [self._set_headers], "response": [_stop_retries]}
        options = self._client_options(self._get_token)
        options["http_client"] = self._guard.make_client(openai.DefaultHttpxClient, **self._http_options(hooks))
        return openai.OpenAI(**options) if self._azure_endpoint is None else openai.AzureOpenAI(**options)

    def _make_async_client(self) -> openai.AsyncOpenAI:
        import openai

        async def set_headers(request: Any) -> None:
            self._set_headers(request)

        async def stop_retries(response: Any) -> None:
            _stop_retries(response)

        hooks: dict[str, Any] = {"request": [set_headers], "response": [stop_retries]}
        options = self._client_options(None if self._get_token is None else make_async(self._get_token))
        options["http_client"] = self._guard.make_async_client(
            openai.DefaultAsyncHttpxClient, **self._http_options(hooks)
        )
        return openai.AsyncOpenAI(**options) if self._azure_endpoint is None else openai.AsyncAzureOpenAI(**options)

    def _set_headers(self, request: Any) -> None:
        """Add the headers to a request."""
        request.headers["accept-encoding"] = ACCEPT_ENCODING
        if "authorization" in self._headers:
            request.headers.pop("api-key", None)
        request.headers.update(self._headers)


@hookimpl
def embedonce_providers() -> Mapping[str, type[OpenAIProvider]]:
    return {"openai": OpenAIProvider}


def _wrap_request(request: Mapping[str, Any]) -> dict[str, Any]:
    return {"body": request, "cast_to": object, "options": {"headers": RAW_RESPONSE}}


def _read_token_inputs(texts: Sequence[str]) -> list[list[int]]:
    """Return the token numbers of each text.

    Raises:
        TextRefused: a text is not a list of token numbers as JSON.
    """
    inputs: list[list[int]] = []
    invalid = []
    for position, text in enumerate(texts):
        try:
            tokens = json.loads(text)
        except (ValueError, RecursionError):
            tokens = None
        if not isinstance(tokens, list) or not tokens or set(map(type, tokens)) != {int} or min(tokens) < 0:
            invalid.append(position)
        else:
            inputs.append(tokens)
    if invalid:
        raise TextRefused("with token_inputs, each text must be a list of token numbers as JSON", invalid)
    return inputs


def _stop_retries(response: Any) -> None:
    """Keep the client from repeating a request after an error status. The engine does it, as a whole or in parts."""
    if response.status_code >= 400:
        response.headers["x-should-retry"] = "false"


def _check_body(body: Mapping[str, Any], option: str) -> None:
    """Refuse fields that the provider sets itself, and fields that make a vector depend on other texts.

    Raises:
        ValueError: there is such a field.
    """
    for name in RESERVED_FIELDS:
        if name in body:
            advice = "the provider sends the texts itself" if name == "input" else f"use the option {name} instead"
            raise ValueError(f"{option} must not set {name}: {advice}")
    refuse_batch_settings(body, option)
