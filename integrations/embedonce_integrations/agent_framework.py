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

from .wrapping import WrappedProvider, declared_space, described_space, shared_cache

try:
    from agent_framework import BaseEmbeddingClient, Embedding, GeneratedEmbeddings, UsageDetails, add_usage_details
except ImportError as error:
    raise ImportError("Microsoft Agent Framework is not installed: pip install 'embedonce[agent-framework]'") from error

NOT_IN_OPTIONS = ("encoding_format", "user")
"""Options that change how vectors travel or who is billed, not the vectors."""

NOT_IN_SPACE = ("additional_properties", "org_id", "type")

MODEL = ("model", "model_id", "deployment_name", "model_deployment_name")
"""What embedding clients call the model."""


@dataclass(frozen=True, slots=True)
class _Call:
    """The call under way; a computation runs in a copy of its caller's context."""

    options: dict[str, Any]
    spent: list[UsageDetails] = field(default_factory=list)
    """What the client was charged for."""


MOST_SPACES = 64
"""For so many different options a cache is kept; beyond, the oldest is made again. The vectors are in the tiers."""

_call: ContextVar[_Call] = ContextVar("embedonce_agent_framework_call")


class CachedEmbeddingClient(BaseEmbeddingClient[str, list[float], Any]):
    """Gets embeddings through a cache.

    Args:
        client: what makes the vectors; None for the ``[provider]`` of ``config``.
        config: what :func:`embedonce.open` takes.
        space: the vector space of a client that does not describe itself (``to_dict`` with a model).
        task: what texts are embedded for; the framework's protocol does not say. Clients do not tell tasks apart,
            a ``[provider]`` may.

    Raises:
        ConfigError: the configuration cannot be used.
        SpaceError: ``client`` does not say what decides its vectors.
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
            raise SpaceError("space= describes a client; the [provider] of a configuration has its own")
        self._client = client
        self._config = config
        self._space = space
        self._task = task
        self._caches: dict[bytes, Cache] = {}
        self.cache = self._cache_for({})
        """The cache of calls without options."""

    async def get_embeddings(
        self, values: Sequence[str], *, options: Any = None
    ) -> GeneratedEmbeddings[list[float], Any]:
        """Return one embedding per value, in order.

        ``usage`` is what the client used in this call: hits use nothing. ``additional_properties["sources"]`` says of
        each value where its vector came from: a tier's name, or ``"provider"``.

        Raises:
            TypeError: a value is not a str.
            ValueError: options were given, but the provider is the configuration's.
            Exception: whatever the client raised.
        """
        call = _Call(dict(options or {}))
        token = _call.set(call)
        try:
            fetched = await self._cache_for(call.options).afetch(values, task=self._task)
        finally:
            _call.reset(token)
        for error in fetched.failed.values():
            raise error
        model = fetched.space.model
        rows = fetched.vectors.tolist()
        return GeneratedEmbeddings(
            [Embedding(vector=row, model=model, dimensions=len(row)) for row in rows],
            options=options,
            usage=reduce(add_usage_details, call.spent, None),
            additional_properties={"sources": list(fetched.sources)},
        )

    def _cache_for(self, options: dict[str, Any]) -> Cache:
        """Return the cache for options: those that decide vectors make a vector space of their own."""
        deciding = {name: value for name, value in options.items() if name not in NOT_IN_OPTIONS}
        if self._client is None:
            if deciding:
                raise ValueError(
                    f"the options {', '.join(sorted(deciding))} cannot be given here: the vectors are made by the "
                    "[provider] of the configuration, which has options of its own"
                )
            return shared_cache(self._config)
        space = _space(self._client, self._space, deciding)
        fingerprint = space.fingerprint()
        if fingerprint not in self._caches:
            if len(self._caches) == MOST_SPACES:
                del self._caches[next(iter(self._caches))]
            provider = WrappedProvider(aembed=self._embed, space=lambda task: space)
            self._caches[fingerprint] = shared_cache(self._config, provider=provider)
        return self._caches[fingerprint]

    async def _embed(self, texts: list[str], task: Task) -> list[list[float]]:
        assert self._client is not None
        call = _call.get()
        made = await self._client.get_embeddings(texts, options=call.options or None)
        if made.usage:
            call.spent.append(made.usage)
        return [item.vector for item in made]


def _space(
    client: BaseEmbeddingClient[str, list[float], Any],
    declared: VectorSpace | Mapping[str, Any] | None,
    options: dict[str, Any],
) -> VectorSpace:
    name = type(client).__name__
    if declared is not None:
        space = declared_space(declared)
    else:
        fields = client.to_dict(exclude_none=True) if hasattr(client, "to_dict") else {}
        model = options.get("model") or next((fields[field] for field in MODEL if fields.get(field)), None)
        if not model:
            raise SpaceError(
                f"{name} does not say which model it asks; declare what decides its vectors: "
                'space={"model": "my-model-v2"}, with whatever else does'
            )
        service_url = getattr(client, "service_url", None)
        if callable(service_url):  # a ready-made client has its URL inside, where to_dict does not look
            fields["endpoint"] = service_url()
        space = described_space(client, fields, model=str(model), leave_out=(*NOT_IN_SPACE, *MODEL))
    if not options:
        return space
    asked = described_space(client, options, model=space.model, leave_out=("model",))
    return replace(
        space, model=str(options.get("model", space.model)), extra={**(space.extra or {}), "options": asked.extra or {}}
    )
