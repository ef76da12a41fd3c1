"""LangChain: embeddings that embed each text once, and a store for CacheBackedEmbeddings over a chain of tiers."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from typing import Any, NoReturn, TypeAlias

import numpy as np
from numpy.typing import NDArray

from embedonce import Cache, ConfigError, Limits, SpaceError, VectorSpace, config
from embedonce.config import Source
from embedonce.contracts import Task

from .wrapping import (
    InOrder,
    WrappedProvider,
    WrappedSpaces,
    asked_with,
    declared_space,
    is_openai_resource,
    model_space,
    shared_cache,
)

try:
    import orjson  # three times as fast as json for an array
    from langchain_core.embeddings import Embeddings
    from langchain_core.stores import ByteStore
except ImportError as error:
    raise ImportError("LangChain is not installed: pip install 'embedonce[langchain]'") from error

Floats: TypeAlias = NDArray[np.float32]
CLIENTS = ("client", "async_client")
"""Where LangChain's OpenAI embeddings keep their clients."""
ASYNC_METHODS = ("aembed_documents", "aembed_query")


class CachedEmbeddings(Embeddings):
    """Embeds documents and queries through a cache. Queries and documents never share vectors, unless said otherwise.

    Args:
        embeddings: what makes the vectors; None for the ``[provider]`` of ``config``.
        config: a TOML file, a dict of its shape, or None to look for a file.
        space: the vector space of embeddings that cannot describe it: at least their model.
        symmetric: ``embeddings`` treat queries as they treat documents, so that both share their vectors.

    Raises:
        ConfigError: the configuration cannot be used.
        SpaceError: ``embeddings`` do not say what decides their vectors.
    """

    def __init__(
        self,
        embeddings: Embeddings | None = None,
        *,
        config: Source = None,
        space: VectorSpace | Mapping[str, Any] | None = None,
        symmetric: bool = False,
    ) -> None:
        if embeddings is None:
            if space is not None or symmetric:
                raise SpaceError("space= and symmetric= describe embeddings; a [provider] describes itself")
            self._inner = None
            self.cache = shared_cache(config)
            return
        if not isinstance(embeddings, Embeddings):
            raise TypeError(
                f"CachedEmbeddings wraps LangChain embeddings, not {type(embeddings).__name__}; "
                "a configuration is given as config="
            )
        self._inner = _Inner(embeddings, space, symmetric)
        self.cache = shared_cache(config, provider=self._inner.provider({}))

    def embed_documents(self, texts: list[str], **kwargs: Any) -> list[list[float]]:
        """Return one vector per document, in order; raises what the embeddings raise.

        ``kwargs`` are passed on, and vectors that were made with other ones are other vectors.
        """
        return _lists(self._cache(kwargs).embed_batch(texts))

    def embed_query(self, text: str, **kwargs: Any) -> list[float]:
        """Return the vector of a query."""
        return _floats(self._cache(kwargs).embed(text, "query"))

    async def aembed_documents(self, texts: list[str], **kwargs: Any) -> list[list[float]]:
        """As :meth:`embed_documents`."""
        return _lists(await self._cache(kwargs).aembed_batch(texts))

    async def aembed_query(self, text: str, **kwargs: Any) -> list[float]:
        """As :meth:`embed_query`."""
        return _floats(await self._cache(kwargs).aembed(text, "query"))

    def __repr__(self) -> str:
        return f"CachedEmbeddings({self.cache!r})"

    def _cache(self, kwargs: Mapping[str, Any]) -> Cache:
        if not kwargs:
            return self.cache
        if self._inner is None:
            raise TypeError(f"the [provider] of a configuration takes no {', '.join(kwargs)}; set it there")
        return self.cache.for_provider(self._inner.provider(kwargs))


class _Inner:
    """LangChain embeddings, and their vector spaces by task."""

    def __init__(self, embeddings: Embeddings, space: VectorSpace | Mapping[str, Any] | None, symmetric: bool) -> None:
        self._embeddings = _in_order(embeddings)

        def describe(task: Task) -> VectorSpace:
            told = None if symmetric else task
            return _described(embeddings, told) if space is None else declared_space(space, task=told)

        self._spaces = WrappedSpaces(describe)
        sizes = (getattr(embeddings, name, None) for name in ("chunk_size", "batch_size"))
        size = next((size for size in sizes if type(size) is int and size > 0), None)
        self._limits = Limits() if size is None else Limits(max_batch=size)

    def provider(self, kwargs: Mapping[str, Any]) -> WrappedProvider:
        """Return the embeddings as a provider that passes ``kwargs`` on with every call.

        Raises:
            SpaceError: ``kwargs`` hold what cannot be described.
        """
        inner: Any = self._embeddings
        spaces = self._spaces

        def embed(texts: list[str], task: Task) -> Any:
            spaces.check(task)
            if task == "query":
                return [inner.embed_query(text, **kwargs) for text in texts]
            return inner.embed_documents(texts, **kwargs)

        async def aembed(texts: list[str], task: Task) -> Any:
            spaces.check(task)
            if task == "query":
                return [await inner.aembed_query(text, **kwargs) for text in texts]
            return await inner.aembed_documents(texts, **kwargs)

        # LangChain's default async methods are the blocking ones in a thread, without kwargs; the cache does it with.
        native = any(getattr(type(inner), name) is not getattr(Embeddings, name) for name in ASYNC_METHODS)
        return WrappedProvider(
            embed=embed,
            aembed=aembed if native else None,
            space=lambda task: asked_with(spaces(task), kwargs),
            limits=self._limits,
        )


def _in_order(embeddings: Any) -> Any:
    """Return embeddings that read an OpenAI answer by its ``index``: theirs do not."""
    clients = {name: getattr(embeddings, name, None) for name in CLIENTS}
    ordered = {name: InOrder(client) for name, client in clients.items() if is_openai_resource(client)}
    return embeddings.model_copy(update=ordered) if ordered else embeddings


def _described(embeddings: Any, task: Task | None) -> VectorSpace:
    for name in ("encode_kwargs", "query_encode_kwargs"):
        options = getattr(embeddings, name, None)
        if isinstance(options, Mapping) and options.get("precision") in ("int8", "uint8"):
            raise SpaceError(
                f"{type(embeddings).__name__} with precision={options['precision']!r} takes its range from the batch: "
                "a text has no vector of its own that could be cached. Leave precision out, and "
                'keep bytes instead with [cache] dtype = "int8"'
            )
    clients = (getattr(embeddings, name, None) for name in CLIENTS)
    client: Any = next((client for client in clients if is_openai_resource(client)), None)
    # The client may have its URL from the environment, which the embeddings' own field does not show.
    also = {} if client is None else {"openai_api_base": str(client._client.base_url)}
    return model_space(embeddings, task=task, also=also)


def _floats(vector: Floats) -> list[float]:
    floats: list[float] = vector.tolist()
    return floats


def _lists(vectors: Floats) -> list[list[float]]:
    lists: list[list[float]] = vectors.tolist()
    return lists


class VectorByteStore(ByteStore):
    """Holds what CacheBackedEmbeddings stores, JSON lists of numbers, as entries in a chain of tiers.

    The numbers come back as float32, or as coarse as ``[cache] dtype`` says, in JSON without spaces. A key is kept
    beside its vector, as metadata, so that ``yield_keys`` can tell it.

    Args:
        space: what decides the vectors, at least ``{"model": ...}``: the keys of CacheBackedEmbeddings do not say it.
        config: a TOML file, a dict of its shape, or None to look for a file. Its ``[provider]`` is not read.

    Raises:
        ConfigError: the configuration cannot be used, or has ``[key] normalize``.
        SpaceError: ``space`` names no model.
    """

    def __init__(self, *, space: VectorSpace | Mapping[str, Any], config: Source = None) -> None:
        loaded = _loaded(config)
        declared = declared_space(space)
        self.cache = shared_cache(loaded, provider=WrappedProvider(embed=_computes_nothing, space=lambda _: declared))

    def mget(self, keys: Sequence[str]) -> list[bytes | None]:
        """Return the value of each key, in order; None where no tier has one, or none that has it answers."""
        return [_value(row) for row in self.cache.lookup(keys).rows]

    async def amget(self, keys: Sequence[str]) -> list[bytes | None]:
        """As :meth:`mget`."""
        return [_value(row) for row in (await self.cache.alookup(keys)).rows]

    def mset(self, key_value_pairs: Sequence[tuple[str, bytes]]) -> None:
        """Store the values, in the place of those that are there.

        Raises:
            ValueError: a value is not a JSON list of numbers; nothing was stored.
            ProviderError: a value is no vector (NaN, all zero, empty) or has other dimensions; nothing was stored.
            EraseIncomplete: a tier cannot let go of another value that it has under a key.
        """
        vectors = _vectors(key_value_pairs)
        stale = _stale(vectors, self.cache.lookup(list(vectors)).rows)
        if stale:
            self.cache.forget(stale)
        self.cache.put(list(vectors), list(vectors.values()), metadata=_labels(vectors))

    async def amset(self, key_value_pairs: Sequence[tuple[str, bytes]]) -> None:
        """As :meth:`mset`."""
        vectors = _vectors(key_value_pairs)
        stale = _stale(vectors, (await self.cache.alookup(list(vectors))).rows)
        if stale:
            await self.cache.aforget(stale)
        await self.cache.aput(list(vectors), list(vectors.values()), metadata=_labels(vectors))

    def mdelete(self, keys: Sequence[str]) -> None:
        """Remove the keys from every tier; one that is not there is no error.

        Raises:
            EraseIncomplete: tiers that failed or cannot delete, by name.
        """
        self.cache.forget(keys)

    async def amdelete(self, keys: Sequence[str]) -> None:
        """As :meth:`mdelete`."""
        await self.cache.aforget(keys)

    def yield_keys(self, *, prefix: str | None = None) -> Iterator[str]:
        """Yield the keys that start with ``prefix``, in no order; walks over all tiers.

        Raises:
            TierError: a tier failed or cannot list.
        """
        self.cache.flush()
        yield from _keys(self.cache.list_metadata(), prefix)

    async def ayield_keys(  # pyright: ignore[reportIncompatibleMethodOverride]  (the base has no yield in it)
        self, *, prefix: str | None = None
    ) -> AsyncIterator[str]:
        """As :meth:`yield_keys`."""
        await self.cache.aflush()
        for key in _keys(await self.cache.alist_metadata(), prefix):
            yield key


def _loaded(source: Source) -> config.Config:
    loaded = config.load(source, own_provider=True)
    if loaded.key.normalize:
        raise ConfigError(
            "[key] normalize changes what is embedded, and a byte store sees keys alone: leave it out, or use "
            "CachedEmbeddings, which hands its embeddings the normalised text"
        )
    return loaded


def _computes_nothing(texts: Sequence[str], task: Task) -> NoReturn:
    raise TypeError("a byte store makes no vectors")


def _value(row: Any) -> bytes | None:
    return None if row is None else orjson.dumps(row, option=orjson.OPT_SERIALIZE_NUMPY)


def _vectors(pairs: Sequence[tuple[str, bytes]]) -> dict[str, list[float]]:
    """Return the vector of each key, the last one where a key comes twice."""
    vectors = {}
    for position, (key, value) in enumerate(pairs):
        try:
            numbers = orjson.loads(value)
            if not isinstance(numbers, list) or not all(type(number) in (int, float) for number in numbers):
                raise ValueError
            vectors[key] = [float(number) for number in numbers]
        except (ValueError, OverflowError):
            raise ValueError(
                f"the value of item {position} is not a JSON list of numbers, which is all that this store holds: "
                "it is for the vectors of CacheBackedEmbeddings"
            ) from None
    return vectors


def _stale(vectors: Mapping[str, list[float]], rows: Sequence[Any]) -> list[str]:
    """Return the keys under which the tiers hold another vector."""
    with np.errstate(over="ignore"):  # a number beyond float32 is refused when it is stored
        return [
            key
            for (key, vector), row in zip(vectors.items(), rows, strict=True)
            if row is not None and not np.array_equal(np.asarray(vector, np.float32), row)
        ]


def _labels(keys: Mapping[str, Any]) -> list[dict[str, str]]:
    return [{"key": key} for key in keys]


def _keys(labels: Sequence[Mapping[str, Any]], prefix: str | None) -> Iterator[str]:
    for label in labels:
        key = label.get("key")
        if isinstance(key, str) and key.startswith(prefix or ""):
            yield key
