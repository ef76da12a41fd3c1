"""LangChain: an ``Embeddings`` class that embeds each text once, and a byte store for CacheBackedEmbeddings. The byte
store keeps the vectors in a chain of tiers."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NoReturn

import numpy as np

from embedonce import Cache, ConfigError, Limits, SpaceError, VectorSpace, config
from embedonce.config import Source, load
from embedonce.contracts import Task
from embedonce.vectors import Matrix, Vector

from .composite_texts import join_keywords, split_all, split_keywords
from .wrapping import (
    Rebuilt,
    WrappedProvider,
    WrappedSpaces,
    add_request,
    keep_source,
    make_describer,
    open_shared_cache,
    resolve_declared_space,
)

try:
    import orjson  # writes an array three times as fast as json
    from langchain_core.embeddings import Embeddings
    from langchain_core.stores import ByteStore
except ImportError as error:
    raise ImportError("LangChain is not installed: pip install 'embedonce[langchain]'") from error

ASYNC_METHODS = ("aembed_documents", "aembed_query")


class CachedEmbeddings(Rebuilt, Embeddings):
    """Embeds documents and queries through a cache.

    If ``embeddings`` are wrapped, queries and documents share no vectors unless ``symmetric`` is set.

    Args:
        embeddings: the embeddings to wrap; None to use the ``[provider]`` of ``config``.
        config: a TOML file, a dict of the same shape, or None to look for a file.
        space: the vector space, at least the model; required if ``embeddings`` do not describe their vectors.
        ignore: names of fields of ``embeddings`` that do not affect the vectors, at any depth: ``["name"]``, or
            ``["inner.name"]`` for a field of one inner object.
        symmetric: whether ``embeddings`` treat queries like documents, so that both share their vectors.

    Raises:
        ConfigError: the configuration is invalid.
        SpaceError: ``embeddings`` do not say what determines their vectors.
    """

    def __init__(
        self,
        embeddings: Embeddings | None = None,
        *,
        config: Source = None,
        space: VectorSpace | Mapping[str, Any] | None = None,
        ignore: Collection[str] = (),
        symmetric: bool = False,
    ) -> None:
        if embeddings is None:
            if space is not None or ignore or symmetric:
                raise SpaceError(
                    "space=, ignore= and symmetric= can only be used with embeddings; without embeddings, the "
                    "[provider] of the configuration describes its own vector space"
                )
        elif not isinstance(embeddings, Embeddings):
            raise TypeError(
                f"expected LangChain embeddings, got {type(embeddings).__name__}; to pass a configuration, use config="
            )
        loaded = load(config, own_provider=embeddings is not None)
        self._embedder = embeddings
        self._arguments = {
            "config": keep_source(config, loaded),
            "space": space,
            "ignore": ignore,
            "symmetric": symmetric,
        }
        self._inner = None
        provider = None
        if embeddings is not None:
            self._inner = _WrappedEmbeddings(embeddings, WrappedSpaces(self._describe_spaces(embeddings)))
            provider = self._inner.make_provider({})
        self.cache = open_shared_cache(loaded, provider=provider)

    def embed_documents(self, texts: list[str], **kwargs: Any) -> list[list[float]]:
        """Return one vector per document, in order. Raises whatever the embeddings raise.

        ``kwargs`` are passed to the embeddings. Vectors made with different ``kwargs`` have different keys. ``titles``
        has one value per text. Each value is a part of its text's key, and goes to the embeddings with its text.

        Raises:
            SpaceError: another keyword has as many values as there are texts, so they may belong to one text each.
            ValueError: ``titles`` has not as many values as there are texts.
        """
        cache, composed = self._prepare_batch(texts, kwargs)
        return _to_lists(cache.embed_batch(composed))

    def embed_query(self, text: str, **kwargs: Any) -> list[float]:
        """Return the vector of a query."""
        return _to_floats(self._cache_for(kwargs).embed(text, "query"))

    async def aembed_documents(self, texts: list[str], **kwargs: Any) -> list[list[float]]:
        """Async twin of :meth:`embed_documents`."""
        cache, composed = self._prepare_batch(texts, kwargs)
        return _to_lists(await cache.aembed_batch(composed))

    async def aembed_query(self, text: str, **kwargs: Any) -> list[float]:
        """Async twin of :meth:`embed_query`."""
        return _to_floats(await self._cache_for(kwargs).aembed(text, "query"))

    def __repr__(self) -> str:
        return f"CachedEmbeddings({self.cache!r})"

    def _describe_spaces(self, embedder: Any) -> Callable[[Task], VectorSpace]:
        space, ignore, symmetric = (self._arguments[name] for name in ("space", "ignore", "symmetric"))
        return make_describer(embedder, space=space, ignore=ignore, has_tasks=not symmetric)

    def _prepare_batch(self, texts: list[str], kwargs: Mapping[str, Any]) -> tuple[Cache, list[str]]:
        """Return the cache for a batch, and the batch's texts, joined with the keywords that each text has."""
        if not kwargs or self._inner is None:
            return self._cache_for(kwargs), texts
        texts = list(texts)
        per_text, request = split_keywords(kwargs, texts)
        if not per_text:
            return self._cache_for(request), texts
        cache = self.cache.for_provider(self._inner.make_provider(request, per_text))
        return cache, join_keywords(texts, per_text, cache.normalize)

    def _cache_for(self, kwargs: Mapping[str, Any]) -> Cache:
        if not kwargs:
            return self.cache
        if self._inner is None:
            raise TypeError(
                f"embeddings that come from the [provider] do not accept the arguments {', '.join(kwargs)}; "
                "set options in the configuration"
            )
        return self.cache.for_provider(self._inner.make_provider(kwargs))


class _WrappedEmbeddings:
    """LangChain embeddings, and their vector spaces by task."""

    def __init__(self, embeddings: Embeddings, spaces: WrappedSpaces) -> None:
        self._embeddings = embeddings
        self._spaces = spaces
        sizes = (getattr(embeddings, name, None) for name in ("chunk_size", "batch_size"))
        size = next((size for size in sizes if type(size) is int and size > 0), None)
        self._limits = Limits() if size is None else Limits(max_batch=size)

    def make_provider(self, kwargs: Mapping[str, Any], per_text: Collection[str] = ()) -> WrappedProvider:
        """Return the embeddings as a provider that passes ``kwargs`` with every call.

        ``per_text`` are the names of the keywords that are joined with each text.

        Raises:
            SpaceError: ``kwargs`` hold an object that cannot be described.
        """
        inner: Any = self._embeddings
        spaces = self._spaces

        def split_texts(texts: list[str]) -> tuple[list[str], dict[str, Any]]:
            plain, values = split_all(texts) if per_text else (texts, {})
            return plain, {**kwargs, **values}

        def embed(texts: list[str], task: Task) -> Any:
            plain, request = split_texts(texts)
            with spaces.calling(task) as read:
                if task == "query":
                    vectors = [inner.embed_query(text, **request) for text in plain]
                else:
                    vectors = inner.embed_documents(plain, **request)
            return read.make_answer(vectors)

        async def aembed(texts: list[str], task: Task) -> Any:
            plain, request = split_texts(texts)
            with spaces.calling(task) as read:
                if task == "query":
                    vectors = [await inner.aembed_query(text, **request) for text in plain]
                else:
                    vectors = await inner.aembed_documents(plain, **request)
            return read.make_answer(vectors)

        # LangChain's default async methods run the blocking methods in a thread and drop kwargs. If the embeddings have
        # only these default methods, the provider gets no `aembed`. The cache then runs `embed` in a thread and passes
        # kwargs.
        is_async = any(getattr(type(inner), name) is not getattr(Embeddings, name) for name in ASYNC_METHODS)
        request = {**kwargs, "one value per text": sorted(per_text)} if per_text else kwargs
        return WrappedProvider(
            embed=embed,
            aembed=aembed if is_async else None,
            space=lambda task: add_request(spaces(task), request),
            limits=self._limits,
        )


def _to_floats(vector: Vector) -> list[float]:
    floats: list[float] = vector.tolist()
    return floats


def _to_lists(vectors: Matrix) -> list[list[float]]:
    lists: list[list[float]] = vectors.tolist()
    return lists


class VectorByteStore(ByteStore):
    """Stores the values of CacheBackedEmbeddings, which are JSON lists of numbers, as entries in a chain of tiers.

    The numbers come back as JSON without spaces, with the precision of float32 or of the ``dtype`` in ``[cache]``. Each
    key is stored as metadata beside its vector, so that ``yield_keys`` can list it.

    Args:
        space: what determines the vectors, at least ``{"model": ...}``. It is required, because the keys of
            CacheBackedEmbeddings do not identify the model.
        config: a TOML file, a dict of the same shape, or None to look for a file. Its ``[provider]`` is not read.

    Raises:
        ConfigError: the configuration is invalid, or ``[key]`` has ``normalize``.
        SpaceError: ``space`` names no model.
    """

    def __init__(self, *, space: VectorSpace | Mapping[str, Any], config: Source = None) -> None:
        loaded = _load_config(config)
        declared = resolve_declared_space(space)
        self._arguments: dict[str, Any] = {"space": declared, "config": keep_source(config, loaded)}
        provider = WrappedProvider(embed=_refuse_to_embed, space=lambda _: declared)
        self.cache = open_shared_cache(loaded, provider=provider)

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(type(self), **self._arguments), ()  # copies and other processes make a cache of their own

    def mget(self, keys: Sequence[str]) -> list[bytes | None]:
        """Return the value of each key, in order.

        A value is None if no tier has the key, or if every tier that has the key fails.
        """
        return [_dump_vector(row) for row in self.cache.lookup(keys).rows]

    async def amget(self, keys: Sequence[str]) -> list[bytes | None]:
        """Async twin of :meth:`mget`."""
        return [_dump_vector(row) for row in (await self.cache.alookup(keys)).rows]

    def mset(self, key_value_pairs: Sequence[tuple[str, bytes]]) -> None:
        """Store the values. A new value replaces the old value of its key.

        Raises:
            ValueError: a value is not a JSON list of numbers; nothing was stored.
            ProviderError: a value is not a valid vector (NaN, all zero, empty), or the vectors differ in their number
                of dimensions; nothing was stored.
            EraseIncomplete: a tier failed, or cannot delete the old value of a key.
        """
        vectors = _parse_vectors(key_value_pairs)
        stale = _find_stale(vectors, self.cache.lookup(list(vectors)).rows)
        if stale:
            self.cache.forget(stale)
        self.cache.put(list(vectors), list(vectors.values()), metadata=_make_metadata(vectors))

    async def amset(self, key_value_pairs: Sequence[tuple[str, bytes]]) -> None:
        """Async twin of :meth:`mset`."""
        vectors = _parse_vectors(key_value_pairs)
        stale = _find_stale(vectors, (await self.cache.alookup(list(vectors))).rows)
        if stale:
            await self.cache.aforget(stale)
        await self.cache.aput(list(vectors), list(vectors.values()), metadata=_make_metadata(vectors))

    def mdelete(self, keys: Sequence[str]) -> None:
        """Remove the keys from every tier. A missing key is ignored.

        Raises:
            EraseIncomplete: tiers failed or cannot delete; the error names them.
        """
        self.cache.forget(keys)

    async def amdelete(self, keys: Sequence[str]) -> None:
        """Async twin of :meth:`mdelete`."""
        await self.cache.aforget(keys)

    def yield_keys(self, *, prefix: str | None = None) -> Iterator[str]:
        """Yield each key that starts with ``prefix`` and is in any tier, in no particular order.

        Raises:
            TierError: a tier failed or cannot list its keys.
        """
        self.cache.flush()
        yield from _filter_keys(self.cache.list_metadata(), prefix)

    async def ayield_keys(  # pyright: ignore[reportIncompatibleMethodOverride]  (the base method has no yield)
        self, *, prefix: str | None = None
    ) -> AsyncIterator[str]:
        """Async twin of :meth:`yield_keys`."""
        await self.cache.aflush()
        for key in _filter_keys(await self.cache.alist_metadata(), prefix):
            yield key


def _load_config(source: Source) -> config.Config:
    loaded = config.load(source, own_provider=True)
    if loaded.key.normalize:
        raise ConfigError(
            "[key] normalize cannot be used here, because a byte store sees keys and never the texts; remove "
            "normalize, or use CachedEmbeddings, which passes the normalised texts to its embeddings"
        )
    return loaded


def _refuse_to_embed(texts: Sequence[str], task: Task) -> NoReturn:
    raise TypeError("VectorByteStore stores vectors and cannot compute them; use CachedEmbeddings to embed texts")


def _dump_vector(row: Any) -> bytes | None:
    return None if row is None else orjson.dumps(row, option=orjson.OPT_SERIALIZE_NUMPY)


def _parse_vectors(pairs: Sequence[tuple[str, bytes]]) -> dict[str, list[float]]:
    """Return the vector of each key. If a key occurs twice, its last value is used.

    Raises:
        ValueError: a value is not a JSON list of numbers.
    """
    vectors = {}
    for position, (key, value) in enumerate(pairs):
        try:
            numbers = orjson.loads(value)
            if not isinstance(numbers, list) or not all(type(number) in (int, float) for number in numbers):
                raise ValueError
            vectors[key] = [float(number) for number in numbers]
        except (ValueError, OverflowError):
            raise ValueError(
                f"the value of item {position} is not a JSON list of numbers; VectorByteStore holds only the vectors "
                "of CacheBackedEmbeddings"
            ) from None
    return vectors


def _find_stale(vectors: Mapping[str, list[float]], rows: Sequence[Any]) -> list[str]:
    """Return the keys for which a tier holds a vector that differs from the given one."""
    with np.errstate(over="ignore"):  # no warning, because `put` refuses a number that is too large for float32
        return [
            key
            for (key, vector), row in zip(vectors.items(), rows, strict=True)
            if row is not None and not np.array_equal(np.asarray(vector, np.float32), row)
        ]


def _make_metadata(keys: Mapping[str, Any]) -> list[dict[str, str]]:
    return [{"key": key} for key in keys]


def _filter_keys(metadata: Sequence[Mapping[str, Any]], prefix: str | None) -> Iterator[str]:
    for item in metadata:
        key = item.get("key")
        if isinstance(key, str) and key.startswith(prefix or ""):
            yield key
