"""Embeddings of Google's Gemini API, through the google-genai package.

The provider imports the package and makes a client at the first miss, so a run in which every text is a hit needs
neither a key nor a network. ``prepare`` imports the package earlier. The client repeats a request that could not be
connected. The engine repeats a request that was answered with an error status, as a whole or in parts.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from annotated_types import Ge, Gt, Le, MinLen

from embedonce import Embedded, Limits, TextRefused, VectorSpace, hookimpl
from embedonce.contracts import Task
from embedonce.errors import ErrorInAnswer, ProviderError
from embedonce.keys import canonical_url
from embedonce.options import Doc, Duration
from embedonce.tasks import check_task

from ._access import check_headers, check_key, read_key_variable, require_key, split_credentials
from ._clients import Clients, require_package
from ._guard import ACCEPT_ENCODING, Guard, expect_vectors

if TYPE_CHECKING:
    from google import genai
    from google.genai import types

require_package("google.genai")

api = 1

TASK_TYPES: Mapping[str, str] = {"document": "RETRIEVAL_DOCUMENT", "query": "RETRIEVAL_QUERY"}

KNOWN_TASK_TYPES = (
    "RETRIEVAL_DOCUMENT",
    "RETRIEVAL_QUERY",
    "SEMANTIC_SIMILARITY",
    "CLASSIFICATION",
    "CLUSTERING",
    "CODE_RETRIEVAL_QUERY",
    "QUESTION_ANSWERING",
    "FACT_VERIFICATION",
)
"""Gemini's task types. Each of them, in lower case, can also be passed as a task."""

ADVICE = "Add the task to task_types to use it."

NO_STATUS = 0
"""A status that no answer has. For an empty list of statuses, the client would use a list of its own."""

RETRY_SECONDS = 8.0
"""Longest pause of the client before it repeats a request after a failed connection."""


class GeminiProvider:
    """Calls ``batchEmbedContents``. Documents and queries get different vectors, because their task types differ."""

    def __init__(
        self,
        *,
        model: Annotated[str, MinLen(1), Doc("The model, such as gemini-embedding-001.")],
        api_key: Annotated[str | None, Doc("Default: GEMINI_API_KEY. Needed at the first miss.")] = None,
        dimensions: Annotated[int | None, Gt(0), Doc("Request vectors with this many dimensions.")] = None,
        normalize: Annotated[
            bool,
            Doc("Scale vectors to unit length. Set this for gemini-embedding-001 with fewer than 3072 dimensions."),
        ] = False,
        task_types: Annotated[
            Mapping[str, str] | None,
            Doc('Gemini\'s task type for each task; document and query have a default. "" sends no task type.'),
        ] = None,
        prefixes: Annotated[
            Mapping[str, str] | None, Doc("Text to put before each text of a task, for models without task types.")
        ] = None,
        base_url: Annotated[
            str | None, Doc("The endpoint's URL. Default: GOOGLE_GEMINI_BASE_URL, else Google's.")
        ] = None,
        endpoint_name: Annotated[
            str | None,
            Doc("Name that replaces base_url in keys, so that hosts with the same model share their vectors."),
        ] = None,
        headers: Annotated[
            Mapping[str, str] | None,
            Doc("Extra headers of each request. They are not part of the keys, so they must not change vectors."),
        ] = None,
        batch_size: Annotated[int, Ge(1), Le(100), Doc("Maximum number of texts per call.")] = 100,
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
            raise ValueError("model is empty; set it to a name such as gemini-embedding-001")
        self._model = model.removeprefix("models/")
        self._api_key = api_key
        self._dimensions = dimensions
        self._normalize = normalize
        self._task_types = {**TASK_TYPES, **(task_types or {})}
        self._prefixes = dict(prefixes or {})
        self._base_url = base_url or read_key_variable("GOOGLE_GEMINI_BASE_URL")
        self._login: tuple[str, str] | None = None
        if self._base_url:
            self._base_url, self._login = split_credentials(self._base_url)
        self._headers = check_headers(headers)
        check_key(api_key, "api_key")
        if api_key is None and not {"authorization", "x-goog-api-key"} & self._headers.keys():
            read_key_variable("GEMINI_API_KEY", "GOOGLE_API_KEY")
        self._max_retries = max_retries
        self._timeout = timeout
        self._space_fields: dict[str, Any] = {
            "provider": "gemini",
            "model": self._model,
            "endpoint": endpoint_name or (canonical_url(self._base_url) if self._base_url else None),
            "dimensions": dimensions,
            "truncate": "provider",
            "normalize": True if normalize else None,
        }
        self.limits = Limits(
            max_batch=batch_size,
            concurrency=concurrency,
            requests_per_minute=requests_per_minute,
            tokens_per_minute=tokens_per_minute,
            max_retries=max_retries,
            timeout=(max_retries + 1) * timeout + max_retries * RETRY_SECONDS,
        )
        self._guard = Guard(dimensions=dimensions, timeout=timeout, list_secrets=self._list_secrets, raises=True)
        self._clients: Clients[genai.Client, genai.Client] = Clients(
            "google.genai",
            make=self._make_client,
            amake=self._make_client,
            aclose=_close_client,
            close=_close_blocking,
        )

    def space(self, task: Task) -> VectorSpace:
        """Describe the request in which a text of this task is sent.

        Raises:
            SpaceError: the task has no task type and no prefix.
        """
        task_type, prefix = self._find_task_type(task), self._prefixes.get(task)
        prefixes = {self._prefixes.get(name) for name in ("document", "query", task)}
        is_symmetric = task_type is None and len(prefixes) == 1
        return VectorSpace(
            **self._space_fields,
            task=None if is_symmetric else task,
            prefix=prefix or None,
            extra=None if task_type is None else {"task_type": task_type},
        )

    def embed(self, texts: Sequence[str], task: Task) -> Embedded:
        """Return one vector per text.

        Raises:
            TextRefused: a text is empty.
            google.genai.errors.APIError: the client failed.
            ErrorInAnswer: the answer has no vectors.
            ProviderError: the number of vectors in the answer is not the number of texts.
        """
        contents = self._add_prefix(texts, task)
        with self._clients.borrow() as client, expect_vectors(len(texts)):
            answer = client.models.embed_content(**self._build_request(contents, task))
        return self._read_answer(answer, len(texts))

    async def aembed(self, texts: Sequence[str], task: Task) -> Embedded:
        """Async twin of :meth:`embed`, with the async client of the running event loop."""
        contents = self._add_prefix(texts, task)
        client = await self._clients.aget()
        with expect_vectors(len(texts)):
            answer = await client.aio.models.embed_content(**self._build_request(contents, task))
        return self._read_answer(answer, len(texts))

    def check(self) -> None:
        """Check that there is an API key.

        Raises:
            ValueError: the key is missing; the message names the environment variable.
        """
        if "authorization" not in self._headers and "x-goog-api-key" not in self._headers:
            require_key(self._api_key, ("GEMINI_API_KEY", "GOOGLE_API_KEY"))

    def prepare(self) -> None:
        """Import the client's package, which takes about a second."""
        self._clients.prepare()

    def close(self) -> None:
        """Close the clients and their connections."""
        self._clients.close()

    def _find_task_type(self, task: Task) -> str | None:
        """Return Gemini's task type for a task, or None if the request has no task type.

        Raises:
            SpaceError: the task has no task type and no prefix.
        """
        if task in self._task_types:
            return self._task_types[task] or None
        if task.upper() in KNOWN_TASK_TYPES:
            return task.upper()
        if task in self._prefixes:
            return None
        known = [*self._task_types, *self._prefixes, *(name.lower() for name in KNOWN_TASK_TYPES)]
        check_task(task, list(dict.fromkeys(known)), what="provider 'gemini'", advice=ADVICE)
        return None

    def _add_prefix(self, texts: Sequence[str], task: Task) -> list[str]:
        prefix = self._prefixes.get(task, "")
        sent = [prefix + text for text in texts]
        empty = [position for position, text in enumerate(sent) if not text]
        if empty:  # the API would refuse the whole call without saying which text is empty
            raise TextRefused("an empty text has no embedding", empty)
        return sent

    def _build_request(self, texts: Sequence[str], task: Task) -> dict[str, Any]:
        from google.genai import types

        config = types.EmbedContentConfig(task_type=self._find_task_type(task), output_dimensionality=self._dimensions)
        # Make one Content per text, because for some models, the client turns a list of strings into a single Content.
        contents = [types.Content(parts=[types.Part(text=text)]) for text in texts]
        return {"model": self._model, "contents": contents, "config": config}

    def _read_answer(self, answer: types.EmbedContentResponse, texts: int) -> Embedded:
        """Return the vectors of an answer. They have no indexes, so only their number can be checked."""
        embeddings = answer.embeddings or []
        if not embeddings:
            raise ErrorInAnswer("the endpoint's answer has status 200 but contains no vectors; nothing was stored")
        if len(embeddings) != texts:
            error = ProviderError(
                f"expected one vector per text; texts: {texts}, vectors received: {len(embeddings)}; nothing was stored"
            )
            tokens = _read_tokens(answer)
            error.tokens = tokens if isinstance(tokens, int) else None
            raise error
        vectors = [np.array(item.values) if item.values else None for item in embeddings]
        if self._normalize:
            # A zero vector cannot be scaled. It stays as it is, and the engine's check of the answer refuses it.
            vectors = [None if vector is None else vector / (np.linalg.norm(vector) or 1.0) for vector in vectors]
        return Embedded(vectors, _read_tokens(answer))

    def _list_secrets(self) -> list[str | None]:
        """Return the secrets that an endpoint may repeat in a message."""
        keys = [os.environ.get(name) for name in ("GEMINI_API_KEY", "GOOGLE_API_KEY")]
        return [self._api_key, *keys, *self._headers.values()]

    def _make_client(self) -> genai.Client:
        from google import genai
        from google.genai import types

        package = import_module("google.genai._api_client")
        http = getattr(package, "httpx2", None) or package.httpx
        common = {"auth": self._login, "follow_redirects": False, "timeout": self._timeout}
        key = self._api_key or read_key_variable("GEMINI_API_KEY", "GOOGLE_API_KEY")
        is_replaced = "authorization" in self._headers
        client = genai.Client(
            api_key=key or ("none" if is_replaced or "x-goog-api-key" in self._headers else None),
            vertexai=False,
            http_options=types.HttpOptions(
                base_url=self._base_url,
                headers={"accept-encoding": ACCEPT_ENCODING, **self._headers},
                httpx_client=self._guard.make_client(http.Client, **common),
                httpx_async_client=self._guard.make_async_client(http.AsyncClient, **common),
                timeout=max(1, round(self._timeout * 1000)),
                retry_options=types.HttpRetryOptions(
                    attempts=self._max_retries + 1, max_delay=RETRY_SECONDS, http_status_codes=[NO_STATUS]
                ),
            ),
        )
        if is_replaced:  # the client requires a key, and would send it beside the header
            sent = client._api_client._http_options.headers
            if sent is not None and "x-goog-api-key" not in self._headers:
                sent.pop("x-goog-api-key", None)
        return client


@hookimpl
def embedonce_providers() -> Mapping[str, type[GeminiProvider]]:
    return {"gemini": GeminiProvider}


def _read_tokens(answer: types.EmbedContentResponse) -> int | list[int | None] | None:
    """Return the tokens of an answer: one number per text from Vertex AI, else one number or None."""
    counts = [None if item.statistics is None else item.statistics.token_count for item in answer.embeddings or []]
    if any(count is not None for count in counts):
        return [None if count is None or not math.isfinite(count) else round(count) for count in counts]
    usage = getattr(answer, "usage_metadata", None)  # google-genai 2 has no usage_metadata
    return None if usage is None else usage.prompt_token_count


def _close_blocking(client: genai.Client) -> None:
    client.close()
    own: Any = client._api_client._http_options.httpx_client
    own.close()  # the client closes only what it has made itself


async def _close_client(client: genai.Client) -> None:
    await client.aio.aclose()
    own: Any = client._api_client._http_options.httpx_async_client
    await own.aclose()
    _close_blocking(client)
