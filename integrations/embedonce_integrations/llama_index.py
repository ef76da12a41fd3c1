"""LlamaIndex: an embedding model that embeds each text once, for pipelines, indexes and retrievers."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any, NoReturn

from embedonce import Cache, Limits, SpaceError, VectorSpace, config
from embedonce.config import Source
from embedonce.contracts import Task
from embedonce.vectors import Matrix, Vector

from .wrapping import (
    WrappedProvider,
    WrappedSpaces,
    check_pickling,
    keep_source,
    make_describer,
    open_shared_cache,
)

try:
    from llama_index.core.base.embeddings.base import BaseEmbedding, Embedding
    from llama_index.core.bridge.pydantic import BaseModel, Field, PrivateAttr
    from llama_index.core.callbacks import CallbackManager
except ImportError as error:
    raise ImportError("LlamaIndex is not installed: pip install 'embedonce[llama-index]'") from error

TASKS = ("document", "query")


class CachedEmbedding(BaseEmbedding):
    """Embeds texts and queries through a cache.

    If ``embed_model`` is wrapped, queries and texts share no vectors unless ``symmetric`` is set.

    Args:
        embed_model: the embedding model to wrap; None to use the ``[provider]`` of ``config``.
        config: a TOML file, a dict of the same shape, or None to look for a file.
        space: the vector space, at least the model; required if ``embed_model`` does not describe its vectors.
        ignore: names of fields of ``embed_model`` that do not affect the vectors, at any depth: ``["name"]``, or
            ``["inner.name"]`` for a field of one inner object.
        symmetric: whether ``embed_model`` treats queries like texts, so that both share their vectors.
        kwargs: fields of BaseEmbedding. ``embed_batch_size`` is the number of texts per lookup; its default is the
            batch size of ``embed_model``.

    Raises:
        ConfigError: the configuration is invalid.
        SpaceError: ``embed_model`` does not say what determines its vectors.
    """

    vectors: dict[str, Any] = Field(
        default_factory=dict,
        description="Hashes and settings that identify the vectors. If two models make different vectors, the values "
        "of this field differ.",
    )
    _handle: _Handle = PrivateAttr()

    def __init__(
        self,
        embed_model: BaseEmbedding | None = None,
        *,
        config: Source = None,
        space: VectorSpace | Mapping[str, Any] | None = None,
        ignore: Collection[str] = (),
        symmetric: bool = False,
        **kwargs: Any,
    ) -> None:
        if embed_model is not None and not isinstance(embed_model, BaseEmbedding):
            raise TypeError(
                f"expected a LlamaIndex embedding model, got {type(embed_model).__name__}; "
                "to pass a configuration, use config="
            )
        for name, reason in REFUSED_FIELDS.items():
            if kwargs.get(name) is not None:
                raise TypeError(f"CachedEmbedding does not accept {name!r}: {reason}")
        handle = _Handle(embed_model, config, space, ignore, symmetric)
        defaults = {"model_name": handle.model}
        if embed_model is not None:
            defaults |= {name: getattr(embed_model, name) for name in ("embed_batch_size", "num_workers")}
        super().__init__(**{**defaults, **kwargs, "vectors": handle.vectors})
        self._handle = handle

    @classmethod
    def class_name(cls) -> str:
        return "CachedEmbedding"

    @property
    def cache(self) -> Cache:
        """The cache. Its ``stats()`` count hits and computed vectors."""
        return self._handle.cache

    def _get_query_embedding(self, query: str) -> Embedding:
        return _to_floats(self.cache.embed(query, "query"))

    async def _aget_query_embedding(self, query: str) -> Embedding:
        return _to_floats(await self.cache.aembed(query, "query"))

    def _get_text_embedding(self, text: str) -> Embedding:
        return _to_floats(self.cache.embed(text))

    async def _aget_text_embedding(self, text: str) -> Embedding:
        return _to_floats(await self.cache.aembed(text))

    def _get_text_embeddings(self, texts: list[str]) -> list[Embedding]:
        return _to_lists(self.cache.embed_batch(texts))

    async def _aget_text_embeddings(self, texts: list[str]) -> list[Embedding]:
        return _to_lists(await self.cache.aembed_batch(texts))

    @classmethod
    def from_dict(cls, data: dict[str, Any], **kwargs: Any) -> NoReturn:
        """Raise TypeError, because a dict from ``to_dict`` is incomplete.

        ``to_dict`` omits the embedding model and the tiers, because they may contain secrets.
        """
        raise TypeError(
            "CachedEmbedding cannot be made from a dict; construct it with its embedding model and configuration"
        )

    def __getstate__(self) -> dict[str, Any]:
        """Return the state from which another process rebuilds this model.

        Raises:
            SpaceError: pickling fails, or the embedding model would make different vectors in that process.
        """
        # Check here and not while unpickling, because a multiprocessing pool hangs if a worker cannot unpickle its
        # work.
        self._handle.check_pickling()
        return super().__getstate__()

    def __setstate__(self, state: dict[str, Any]) -> None:
        # BaseComponent's method would call __init__ with only the fields, and the embedding model would be lost.
        for name, default in (("callback_manager", CallbackManager([])), ("rate_limiter", None)):
            state["__dict__"].setdefault(name, default)  # the state lacks a value that could not be pickled
        BaseModel.__setstate__(self, state)


REFUSED_FIELDS = {
    "embeddings_cache": "a second cache is not needed; remove it",
    "rate_limiter": "hits need no limit; give the rate limiter to the embedding model, so that only misses wait",
    "vectors": "this field is derived from the embedding model; remove it",
}


class _Handle:
    """An embedding model and its cache. A pickle holds only the arguments, and another process makes a new cache."""

    def __init__(
        self,
        embed_model: BaseEmbedding | None,
        source: Source,
        space: VectorSpace | Mapping[str, Any] | None,
        ignore: Collection[str],
        symmetric: bool,
    ) -> None:
        if embed_model is None and (space is not None or ignore or symmetric):
            raise SpaceError(
                "space=, ignore= and symmetric= can only be used with an embedding model; without one, the [provider] "
                "of the configuration describes its own vector space"
            )
        loaded = config.load(source, own_provider=embed_model is not None)
        self._parts = (embed_model, keep_source(source, loaded), space, ignore, symmetric)
        provider = None if embed_model is None else _wrap(embed_model, self._describe_spaces(embed_model))
        self.cache = open_shared_cache(loaded, provider=provider)
        spaces = {task: self.cache.provider.space(task) for task in TASKS}
        self.model = spaces["document"].model
        self.vectors = {
            **{task: space.fingerprint().hex() for task, space in spaces.items()},
            "normalize": list(loaded.key.normalize),
            "dtype": loaded.cache.dtype,
        }

    def __reduce__(self) -> tuple[Any, ...]:
        return _Handle, self._parts

    def check_pickling(self) -> None:
        """Check that pickling does not change the embedding model.

        LlamaIndex leaves out the parts of a model that cannot be pickled.

        Raises:
            SpaceError: pickling fails or changes the model.
        """
        if self._parts[0] is not None:
            check_pickling(self._parts[0], self._describe_spaces)

    def _describe_spaces(self, embed_model: BaseEmbedding) -> Callable[[Task], VectorSpace]:
        _, _, space, ignore, symmetric = self._parts
        return make_describer(embed_model, space=space, ignore=ignore, has_tasks=not symmetric)


def _wrap(inner: Any, describe: Callable[[Task], VectorSpace]) -> WrappedProvider:
    spaces = WrappedSpaces(describe)

    # After unpickling, `inner` has no `rate_limiter` if the rate limiter could not be pickled.
    limiter = getattr(inner, "rate_limiter", None)

    def embed(texts: list[str], task: Task) -> Any:
        with spaces.calling(task) as read:
            if limiter is not None:
                limiter.acquire()
            if task == "query":
                answers = [inner._get_query_embedding(text) for text in texts]
            else:
                answers = inner._get_text_embeddings(texts)
        return read.make_answer([_vector_of(answer) for answer in answers])

    async def aembed(texts: list[str], task: Task) -> Any:
        with spaces.calling(task) as read:
            if limiter is not None:
                await limiter.async_acquire()
            if task == "query":
                answers = [await inner._aget_query_embedding(text) for text in texts]
            else:
                answers = await inner._aget_text_embeddings(texts)
        return read.make_answer([_vector_of(answer) for answer in answers])

    return WrappedProvider(
        embed=embed,
        aembed=aembed,
        space=spaces,
        limits=Limits(max_batch=inner.embed_batch_size),
    )


def _vector_of(answer: Any) -> Any:
    """Return the vector in an answer. Some versions of LlamaIndex wrap the vector in an EmbeddingResponse."""
    return getattr(answer, "embedding", answer)


def _to_floats(vector: Vector) -> list[float]:
    floats: list[float] = vector.tolist()
    return floats


def _to_lists(vectors: Matrix) -> list[list[float]]:
    lists: list[list[float]] = vectors.tolist()
    return lists
