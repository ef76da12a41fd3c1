"""Microsoft Agent Framework: an embedding client that embeds each text once."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import Any

from embedonce import Cache, Embedded, SpaceError, VectorSpace
from embedonce.config import Source, load
from embedonce.contracts import Task

from .composite_texts import join_keywords, split_all, split_keywords
from .describing import describe_request
from .wrapping import (
    Rebuilt,
    WrappedProvider,
    WrappedSpaces,
    keep_source,
    make_describer,
    open_shared_cache,
)

try:
    from agent_framework import BaseEmbeddingClient, Embedding, GeneratedEmbeddings, UsageDetails, add_usage_details
except ImportError as error:
    raise ImportError("Microsoft Agent Framework is not installed: pip install 'embedonce[agent-framework]'") from error

NOT_IN_OPTIONS = ("encoding_format", "user")
"""Options that do not affect the vectors: the format of the answer, and the name of the end user."""


@dataclass(frozen=True, slots=True)
class _Call:
    """A call of ``get_embeddings``.

    The cache passes only texts and a task to ``_embed``, so a context variable holds the call. ``_embed`` runs in a
    copy of the caller's context and reads the variable there.
    """

    options: dict[str, Any]
    """The options, without those that have one value per text."""
    per_text: Collection[str]
    """Names of the options that have one value per text. Their values are joined with the texts."""
    usages: list[UsageDetails] = field(default_factory=list)
    """The usage that the client reported, one item per request."""


MAX_CACHES = 64
"""Maximum number of caches that are kept, one per combination of options. If a call needs one cache more than this,
the oldest cache is dropped. Its vectors stay in the tiers."""

_current_call: ContextVar[_Call] = ContextVar("embedonce_agent_framework_call")


class CachedEmbeddingClient(Rebuilt, BaseEmbeddingClient[str, list[float], Any]):
    """Gets embeddings through a cache.

    Args:
        client: the embedding client to wrap; None to use the ``[provider]`` of ``config``.
        config: anything that :func:`embedonce.open` accepts.
        space: the vector space of ``client``; required if the client does not say what determines its vectors.
        ignore: names of the client's fields that do not affect its vectors. They are left out of the description.
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
        ignore: Collection[str] = (),
        task: Task = "document",
        additional_properties: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(additional_properties=additional_properties)
        if client is None and (space is not None or ignore):
            raise SpaceError(
                "space= and ignore= can only be used with a client; without one, the [provider] of the configuration "
                "describes its own vector space"
            )
        loaded = load(config, own_provider=client is not None)
        self._embedder = client
        self._arguments = {
            "config": keep_source(config, loaded),
            "space": space,
            "ignore": ignore,
            "task": task,
            "additional_properties": self.additional_properties,
        }
        self._loaded = loaded
        self._task = task
        self._spaces = None if client is None else WrappedSpaces(self._describe_spaces(client))
        self._caches: dict[bytes, Cache] = {}
        self.cache = self._cache_for({}, ())
        """The cache for calls without options."""

    async def get_embeddings(
        self, values: Sequence[str], *, options: Any = None
    ) -> GeneratedEmbeddings[list[float], Any]:
        """Return one embedding per value, in order.

        ``usage`` is the client's usage in this call. Hits add nothing to it. ``additional_properties["sources"]`` is a
        list with the source of each vector: a tier's name, or ``"provider"``. The option ``titles`` has one value per
        text. Each value is a part of its text's key, and goes to the client with its text.

        Raises:
            SpaceError: another option has as many values as there are texts, so they may belong to one text each; or an
                option makes the vector of a text depend on the other texts.
            TypeError: a value is not a str.
            ValueError: there are options that affect vectors, but the vectors come from the ``[provider]``; or
                ``titles`` has not as many values as there are texts.
            Exception: the client's own error.
        """
        texts = list(values)
        per_text, others = split_keywords(dict(options or {}), texts)
        cache = self._cache_for(others, per_text)
        call = _Call(others, tuple(per_text))
        token = _current_call.set(call)
        try:
            composed = join_keywords(texts, per_text, cache.normalize) if per_text else texts
            fetched = await cache.afetch(composed, task=self._task)
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

    def _describe_spaces(self, embedder: Any) -> Callable[[Task], VectorSpace]:
        space, ignore = self._arguments["space"], self._arguments["ignore"]
        return make_describer(
            embedder, space=space, ignore=ignore, has_tasks=False, more=lambda: _read_endpoint(embedder)
        )

    def _cache_for(self, options: dict[str, Any], per_text: Collection[str]) -> Cache:
        """Return the cache for options. Each combination of options that affect vectors has its own vector space."""
        deciding = {name: value for name, value in options.items() if name not in NOT_IN_OPTIONS}
        if self._spaces is None:
            if deciding or per_text:
                raise ValueError(
                    f"the options {', '.join(sorted({*deciding, *per_text}))} are not available here, because the "
                    "[provider] of the configuration makes the vectors; set its options in the configuration"
                )
            return open_shared_cache(self._loaded)
        if per_text:
            deciding["one value per text"] = sorted(per_text)
        space = _add_options(self._spaces(self._task), deciding)
        fingerprint = space.fingerprint()
        if fingerprint not in self._caches:
            if len(self._caches) == MAX_CACHES:
                del self._caches[next(iter(self._caches))]
            provider = WrappedProvider(aembed=self._embed, space=lambda task: space)
            self._caches[fingerprint] = open_shared_cache(self._loaded, provider=provider)
        return self._caches[fingerprint]

    async def _embed(self, texts: list[str], task: Task) -> Embedded:
        assert self._spaces is not None
        call = _current_call.get()
        plain, values = split_all(texts) if call.per_text else (texts, {})
        with self._spaces.calling(self._task) as answers:
            embeddings = await self._embedder.get_embeddings(plain, options={**call.options, **values} or None)
        if embeddings.usage:
            call.usages.append(embeddings.usage)
        tokens = (embeddings.usage or {}).get("total_token_count")
        return Embedded([item.vector for item in embeddings], tokens, answers.model or _find_model(embeddings))


def _add_options(space: VectorSpace, options: Mapping[str, Any]) -> VectorSpace:
    """Return a vector space with the options of a call added.

    Raises:
        SpaceError: an option cannot be described, or makes a vector depend on the other texts of its batch.
    """
    if not options:
        return space
    described = describe_request({name: value for name, value in options.items() if name != "model"})
    return replace(
        space, model=str(options.get("model") or space.model), extra={**(space.extra or {}), "options": described}
    )


def _read_endpoint(client: Any) -> dict[str, Any]:
    """Return the URL of the service, which the caller may have set in a client of the service's own package."""
    service_url = getattr(client, "service_url", None)
    return {"endpoint": service_url()} if callable(service_url) else {}


def _find_model(embeddings: GeneratedEmbeddings[list[float], Any]) -> str | None:
    """Return the name of the model in an answer, or None if the answer names none, or several."""
    names = {item.model for item in embeddings}
    name = names.pop() if len(names) == 1 else None
    return name if isinstance(name, str) and name else None
