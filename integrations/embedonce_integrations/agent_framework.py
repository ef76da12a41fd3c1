"""Microsoft Agent Framework: an embedding client that embeds each text once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import Any

from embedonce import Cache, SpaceError, VectorSpace
from embedonce.config import Source
from embedonce.contracts import Task

from .wrapping import HOW_TO_DECLARE, WrappedProvider, describe_space, open_shared_cache, resolve_declared_space

try:
    from agent_framework import BaseEmbeddingClient, Embedding, GeneratedEmbeddings, UsageDetails, add_usage_details
except ImportError as error:
    raise ImportError("Microsoft Agent Framework is not installed: pip install 'embedonce[agent-framework]'") from error

NOT_IN_OPTIONS = ("encoding_format", "user")
"""Options that do not affect the vectors: the format of the answer, and the name of the end user."""

NOT_IN_SPACE = ("additional_properties", "org_id", "type")

MODEL = ("model", "model_id", "deployment_name", "model_deployment_name")
"""Names of the fields in which embedding clients keep their model."""


@dataclass(frozen=True, slots=True)
class _Call:
    """A call of ``get_embeddings``.

    The cache passes only texts and a task to ``_embed``, so a context variable holds the call. ``_embed`` runs in a
    copy of the caller's context and reads the variable there.
    """

    options: dict[str, Any]
    usages: list[UsageDetails] = field(default_factory=list)
    """The usage that the client reported, one item per request."""


MAX_CACHES = 64
"""Maximum number of caches that are kept, one per combination of options. If a call needs one cache more than this,
the oldest cache is dropped. Its vectors stay in the tiers."""

_current_call: ContextVar[_Call] = ContextVar("embedonce_agent_framework_call")


class CachedEmbeddingClient(BaseEmbeddingClient[str, list[float], Any]):
    """Gets embeddings through a cache.

    Args:
        client: the embedding client to wrap; None to use the ``[provider]`` of ``config``.
        config: anything that :func:`embedonce.open` accepts.
        space: the vector space of ``client``; required if the client's ``to_dict`` is missing or names no model.
        task: the task of all texts. It is set here, because the framework's protocol has no tasks. The task matters
            only for a ``[provider]``, because clients embed texts in the same way for every task.

    Raises:
        ConfigError: the configuration is invalid.
        SpaceError: ``client`` does not say what determines its vectors.
    """

    def __init__(
        self,
        client: BaseEmbeddingClient[str, list[float], Any] | None = None,
        *,
        config: Source = None,
        space: VectorSpace | Mapping[str, Any] | None = None,
        task: Task = "document",
        additional_properties: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(additional_properties=additional_properties)
        if client is None and space is not None:
            raise SpaceError(
                "space= can only be used with a client; without one, the [provider] of the configuration describes its "
                "own vector space"
            )
        self._client = client
        self._config = config
        self._space = space
        self._task = task
        self._caches: dict[bytes, Cache] = {}
        self.cache = self._cache_for({})
        """The cache for calls without options."""

    async def get_embeddings(
        self, values: Sequence[str], *, options: Any = None
    ) -> GeneratedEmbeddings[list[float], Any]:
        """Return one embedding per value, in order.

        ``usage`` is the client's usage in this call. Hits add nothing to it. ``additional_properties["sources"]`` is a
        list with the source of each vector: a tier's name, or ``"provider"``.

        Raises:
            TypeError: a value is not a str.
            ValueError: there are options that affect vectors, but the vectors come from the ``[provider]``.
            Exception: the client's own error.
        """
        call = _Call(dict(options or {}))
        token = _current_call.set(call)
        try:
            fetched = await self._cache_for(call.options).afetch(values, task=self._task)
        finally:
            _current_call.reset(token)
        for error in fetched.failed.values():
            raise error
        model = fetched.space.model
        rows = fetched.vectors.tolist()
        return GeneratedEmbeddings(
            [Embedding(vector=row, model=model, dimensions=len(row)) for row in rows],
            options=options,
            usage=reduce(add_usage_details, call.usages, None),
            additional_properties={"sources": list(fetched.sources)},
        )

    def _cache_for(self, options: dict[str, Any]) -> Cache:
        """Return the cache for options. Each combination of options that affect vectors has its own vector space."""
        deciding = {name: value for name, value in options.items() if name not in NOT_IN_OPTIONS}
        if self._client is None:
            if deciding:
                raise ValueError(
                    f"the options {', '.join(sorted(deciding))} are not available here, because the [provider] of the "
                    "configuration makes the vectors; set its options in the configuration"
                )
            return open_shared_cache(self._config)
        space = _describe_client(self._client, self._space, deciding)
        fingerprint = space.fingerprint()
        if fingerprint not in self._caches:
            if len(self._caches) == MAX_CACHES:
                del self._caches[next(iter(self._caches))]
            provider = WrappedProvider(aembed=self._embed, space=lambda task: space)
            self._caches[fingerprint] = open_shared_cache(self._config, provider=provider)
        return self._caches[fingerprint]

    async def _embed(self, texts: list[str], task: Task) -> list[list[float]]:
        assert self._client is not None
        call = _current_call.get()
        embeddings = await self._client.get_embeddings(texts, options=call.options or None)
        if embeddings.usage:
            call.usages.append(embeddings.usage)
        return [item.vector for item in embeddings]


def _describe_client(
    client: BaseEmbeddingClient[str, list[float], Any],
    declared: VectorSpace | Mapping[str, Any] | None,
    options: dict[str, Any],
) -> VectorSpace:
    name = type(client).__name__
    if declared is not None:
        space = resolve_declared_space(declared)
    else:
        fields = client.to_dict(exclude_none=True) if hasattr(client, "to_dict") else {}
        model = options.get("model") or next((fields[field] for field in MODEL if fields.get(field)), None)
        if not model:
            raise SpaceError(f"{name} does not say which model it uses; {HOW_TO_DECLARE}")
        service_url = getattr(client, "service_url", None)
        if callable(service_url):  # if the caller made the SDK client, to_dict omits the client's URL
            fields["endpoint"] = service_url()
        space = describe_space(client, fields, model=str(model), leave_out=(*NOT_IN_SPACE, *MODEL))
    if not options:
        return space
    described = describe_space(client, options, model=space.model, leave_out=("model",))
    return replace(
        space,
        model=str(options.get("model", space.model)),
        extra={**(space.extra or {}), "options": described.extra or {}},
    )
