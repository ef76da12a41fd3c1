"""Embeddings of Google's Gemini API, through the google-genai package.

The package is imported, and a client made, at the first miss: a run in which every text is a hit needs
neither a key nor a network. Retries are the client's own, which makes none unless it is told to.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from annotated_types import Ge, Gt, Le, MinLen

from embedonce import Embedded, Limits, ProviderError, SpaceError, TextRefused, VectorSpace, hookimpl
from embedonce.contracts import Task
from embedonce.keys import canonical_url
from embedonce.options import Doc, Duration

from ._clients import Clients, need

if TYPE_CHECKING:
    from google import genai
    from google.genai import types

need("google.genai")

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
"""Gemini's task types; each is also the name of a task, in lower case."""

RETRY_SECONDS = 60.0
"""The longest that the client waits before it tries again."""


class GeminiProvider:
    """Asks ``batchEmbedContents``. Documents and queries have vectors of their own, by Gemini's task types."""

    def __init__(
        self,
        *,
        model: Annotated[str, MinLen(1), Doc("The model, such as gemini-embedding-001.")],
        api_key: Annotated[str | None, Doc("Default: GEMINI_API_KEY. Needed at the first miss.")] = None,
        dimensions: Annotated[int | None, Gt(0), Doc("Ask for vectors of this length.")] = None,
        normalize: Annotated[
            bool,
            Doc("Scale vectors to length 1: gemini-embedding-001's are not, unless they have all 3072 dimensions."),
        ] = False,
        task_types: Annotated[
            Mapping[str, str] | None,
            Doc('Gemini\'s task type by task, beside RETRIEVAL_DOCUMENT and RETRIEVAL_QUERY. "": none is sent.'),
        ] = None,
        prefixes: Annotated[
            Mapping[str, str] | None, Doc("What is put before a text, by task, for models that take no task type.")
        ] = None,
        base_url: Annotated[
            str | None, Doc("Another endpoint. Default: GOOGLE_GEMINI_BASE_URL, else Google's own.")
        ] = None,
        endpoint_name: Annotated[
            str | None, Doc("Stands in keys for base_url, where several hosts serve the same model.")
        ] = None,
        batch_size: Annotated[int, Ge(1), Le(100), Doc("Most texts of one call.")] = 100,
        concurrency: Annotated[int, Ge(1), Doc("Calls under way at once for one batch.")] = 4,
        max_retries: Annotated[int, Ge(0), Doc("How often a call that failed is made again.")] = 4,
        timeout: Annotated[Duration, Gt(0), Doc("How long the endpoint may take each time.")] = 60.0,
    ) -> None:
        if not model:
            raise ValueError("model is empty; it is a name, such as gemini-embedding-001")
        self._model = model.removeprefix("models/")
        self._api_key = api_key
        self._dimensions = dimensions
        self._normalize = normalize
        self._task_types = {**TASK_TYPES, **(task_types or {})}
        self._prefixes = dict(prefixes or {})
        self._base_url = base_url or os.environ.get("GOOGLE_GEMINI_BASE_URL")
        self._max_retries = max_retries
        self._timeout = timeout
        self._about: dict[str, Any] = {
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
            timeout=(max_retries + 1) * timeout + max_retries * RETRY_SECONDS,
        )
        self._clients: Clients[genai.Client, genai.Client] = Clients(
            "google.genai", make=self._make, amake=self._make, aclose=_aclose
        )

    def space(self, task: Task) -> VectorSpace:
        """Describe the request that a text of this task is sent in.

        Raises:
            SpaceError: the task has no task type and no prefix.
        """
        task_type, prefix = self._task_type(task), self._prefixes.get(task)
        alike = task_type is None and len({self._prefixes.get(name) for name in ("document", "query", task)}) == 1
        return VectorSpace(
            **self._about,
            task=None if alike else task,
            prefix=prefix or None,
            extra=None if task_type is None else {"task_type": task_type},
        )

    def embed(self, texts: Sequence[str], task: Task) -> Embedded:
        """Return one vector per text.

        Raises:
            TextRefused: a text is empty.
            google.genai.errors.APIError: what the client raises.
            ProviderError: the answer has fewer or more vectors than texts, or is none.
        """
        contents = self._texts(texts, task)
        with self._clients.using() as client:
            answer = client.models.embed_content(**self._request(contents, task))
        return self._read(answer, len(texts))

    async def aembed(self, texts: Sequence[str], task: Task) -> Embedded:
        """As :meth:`embed`, with the async client of the running loop."""
        contents = self._texts(texts, task)
        client = await self._clients.aget()
        answer = await client.aio.models.embed_content(**self._request(contents, task))
        return self._read(answer, len(texts))

    def close(self) -> None:
        """Close the clients and their connections."""
        self._clients.close()

    def _task_type(self, task: Task) -> str | None:
        """Return Gemini's task type of a task; None where none is sent."""
        if task in self._task_types:
            return self._task_types[task] or None
        if task.upper() in KNOWN_TASK_TYPES:
            return task.upper()
        if task in self._prefixes:
            return None
        raise SpaceError(
            f"Gemini has no task type for the task {task!r}: give it one in task_types, or use one of "
            f"{', '.join(name.lower() for name in KNOWN_TASK_TYPES)}"
        )

    def _texts(self, texts: Sequence[str], task: Task) -> list[str]:
        prefix = self._prefixes.get(task, "")
        sent = [prefix + text for text in texts]
        empty = [position for position, text in enumerate(sent) if not text]
        if empty:  # the API would refuse the whole call, and not say which
            raise TextRefused("an empty text has no embedding", empty)
        return sent

    def _request(self, texts: Sequence[str], task: Task) -> dict[str, Any]:
        from google.genai import types

        config = types.EmbedContentConfig(task_type=self._task_type(task), output_dimensionality=self._dimensions)
        # One Content for each text: of a list of strings the client makes, for some models, one with many parts.
        contents = [types.Content(parts=[types.Part(text=text)]) for text in texts]
        return {"model": self._model, "contents": contents, "config": config}

    def _read(self, answer: types.EmbedContentResponse, texts: int) -> Embedded:
        """Return the vectors of an answer. Nothing in it says which text one belongs to, but their order and number."""
        embeddings = answer.embeddings or []
        if len(embeddings) != texts:
            raise ProviderError(f"Gemini answered {len(embeddings)} vectors for {texts} texts; none was stored")
        vectors = [np.array(item.values or []) for item in embeddings]
        if self._normalize:
            # A vector that cannot be scaled stays as it is, for the check of the answer to refuse.
            vectors = [vector / (np.linalg.norm(vector) or 1.0) for vector in vectors]
        usage = getattr(answer, "usage_metadata", None)  # google-genai 2 has none
        return Embedded(vectors, None if usage is None else usage.prompt_token_count)

    def _make(self) -> genai.Client:
        from google import genai
        from google.genai import types

        return genai.Client(
            api_key=self._api_key or os.environ.get("GEMINI_API_KEY"),
            vertexai=False,
            http_options=types.HttpOptions(
                base_url=self._base_url,
                timeout=max(1, round(self._timeout * 1000)),
                retry_options=types.HttpRetryOptions(attempts=self._max_retries + 1, max_delay=RETRY_SECONDS),
            ),
        )


@hookimpl
def embedonce_providers() -> Mapping[str, type[GeminiProvider]]:
    return {"gemini": GeminiProvider}


async def _aclose(client: genai.Client) -> None:
    await client.aio.aclose()
    client.close()
